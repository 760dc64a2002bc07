"""Triton kernels for CUDA, each beside the torch function that it repeats; never needed, only faster."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch

WIDEST = 4096  # longer groups do not fit the registers of one program
WIDEST_WITH_PRODUCT = 512  # a program of longer groups has so few rows that it reads lora_A too often
WIDEST_WITH_FEEDBACK = 128  # so are columns that mend each other, one by one


class Kernels(NamedTuple):
    """The functions of the modules that they are named after, two modules whole, and another function of `feedback`."""

    uniform: Callable[..., Any]
    codebook: Callable[..., Any]
    residual: Callable[..., Any]
    small: ModuleType | None = None
    feedback: Callable[..., Any] | None = None
    feedback_to_levels: Callable[..., Any] | None = None
    rounded: ModuleType | None = None


@functools.cache
def fused() -> Kernels | None:
    """The kernels, or None where Triton is missing or cannot compile (it needs a C compiler), or a GPU is too old."""
    if torch.cuda.get_device_capability() < (8, 0):
        return None
    try:
        from loftq_cli.kernels import rounded, small
        from loftq_cli.kernels.codebook import codebook
        from loftq_cli.kernels.feedback import feedback, feedback_to_levels
        from loftq_cli.kernels.residual import residual
        from loftq_cli.kernels.uniform import uniform

        zeros = torch.zeros(1, 8, device="cuda")
        residual(zeros, zeros.byte(), zeros[0, :1], None, zeros[0], 8, torch.float32)
    except torch.OutOfMemoryError:  # which says nothing of the kernels
        raise
    except Exception as error:
        warnings.warn(f"the fused kernels do not run here, torch is used: {error}", stacklevel=2)
        return None
    return Kernels(uniform, codebook, residual, small, feedback, feedback_to_levels, rounded)
