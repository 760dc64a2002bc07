"""Where activations are kept between blocks: in main memory, or in files that are mapped into it."""

from __future__ import annotations

import math
import os
import uuid
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from loftq_cli.checkpoint.files import allocate

CGROUP = Path("/sys/fs/cgroup")  # of a container, which sees its own there (version 2)


class Activations:
    """Hidden states of all samples on the CPU, uninitialized: `activations[rows]` is a view of some.

    In pieces, because pinned memory is given out in powers of two, of which a micro-batch usually is one.

    Args:
        parts: slices of samples that follow each other; whatever is asked for must lie in one of them.
        shape: of a sample, e.g. [seqlen, hidden_size].
        dtype: of the hidden states.
        folder: for files, which are gone when the activations are; None for memory.
        pinned: memory that a GPU reads and writes by itself.
    """

    def __init__(
        self, parts: Sequence[slice], shape: Sequence[int], dtype: torch.dtype, folder: Path | None, *, pinned: bool
    ) -> None:
        self._starts = [part.start for part in parts]
        self.shape = (parts[-1].stop, *shape)
        sizes = [(part.stop - part.start, *shape) for part in parts]
        if folder is None:
            self._pieces = [torch.empty(size, dtype=dtype, pin_memory=pinned) for size in sizes]
        else:
            self._pieces = [_mapped(size, dtype, folder) for size in sizes]

    def __getitem__(self, rows: slice) -> Tensor:
        """The hidden states of samples, [rows, *shape]."""
        piece = bisect_right(self._starts, rows.start) - 1
        start = self._starts[piece]
        found = self._pieces[piece][rows.start - start : rows.stop - start]
        assert len(found) == rows.stop - rows.start, "samples of two pieces"
        return found


def _mapped(shape: tuple[int, ...], dtype: torch.dtype, folder: Path) -> Tensor:
    path = folder / f"activations-{uuid.uuid4().hex}"
    # in its full size: a disk that is full when a page is written kills the process without a word
    allocate(path, math.prod(shape) * dtype.itemsize, folder)
    try:
        return torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype).view(shape)
    finally:
        path.unlink()  # what is mapped stays until it is let go


def available_bytes() -> int:
    """Main memory that is free, or could be: of the machine, and of the container if there is one."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    try:
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no container, or one without a limit: `max`
        return free
    return max(0, min(free, limit - used))
