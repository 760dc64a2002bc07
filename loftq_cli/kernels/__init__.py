"""Triton kernels for CUDA, each beside the torch function that it repeats; never needed, only faster."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch


@functools.cache
def fused_uniform_search() -> Callable[..., Any] | None:
    """`kernels.uniform.search`, or None where Triton is missing or cannot compile (it needs a C compiler)."""
    try:
        from loftq_cli.kernels.uniform import search

        search(torch.zeros(1, 8, device="cuda"), 2, False, [1.0], 1, 1.0, (1.0, 1.0))
    except Exception as error:
        warnings.warn(f"the fused kernel does not run here, torch is used: {error}", stacklevel=2)
        return None
    return search
