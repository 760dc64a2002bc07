"""Where activations are kept between blocks: in main memory, or in files that are mapped into it."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor


def buffer(shape: tuple[int, ...], dtype: torch.dtype, folder: Path | None, *, pinned: bool) -> Tensor:
    """Return an uninitialized tensor on the CPU.

    Args:
        shape: of the tensor.
        dtype: of the tensor.
        folder: for a file, which is gone when the tensor is; None for memory.
        pinned: memory that a GPU reads and writes by itself.
    """
    if folder is None:
        return torch.empty(shape, dtype=dtype, pin_memory=pinned)
    handle, name = tempfile.mkstemp(prefix="activations-", dir=folder)
    os.close(handle)
    try:
        return torch.from_file(name, shared=True, size=math.prod(shape), dtype=dtype).view(shape)
    finally:
        Path(name).unlink()  # what is mapped stays until it is let go


def available_bytes() -> int:
    """Main memory that is free, or could be."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
