"""Random numbers that are the same on every device: a hash of their index (splitmix64), not a generator's state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loftq_cli.lowrank.small import kernels

GOLDEN_GAMMA, FIRST, SECOND = (
    constant - 2**64 for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def uniform(seeds: Sequence[int], rows: int, columns: int, device: torch.device) -> Tensor:
    """Draw from [-1, 1), float32 [len(seeds), rows, columns]; each matrix depends on its own seed alone.

    The top 24 bits of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), so that all are exact in float32. On a GPU one
    launch, or a dozen small ones without Triton; drawing on the CPU would cost milliseconds and a copy.
    """
    start = torch.tensor(seeds, dtype=torch.int64).to(device, non_blocking=True)  # a blocking copy would wait
    small = kernels(device)
    if small is not None:
        return small.draw(start, rows, columns)
    index = torch.arange(1, rows * columns + 1, device=device)
    x = index.mul_(GOLDEN_GAMMA) + start[:, None]
    x = _xor_shifted(x, 30).mul_(FIRST)
    x = _xor_shifted(x, 27).mul_(SECOND)  # the last step of splitmix64 leaves the top bits as they are
    return (x >> 40).mul(2.0**-23).view(-1, rows, columns)  # this shift keeps the sign: 24 bits about zero


def _xor_shifted(x: Tensor, bits: int) -> Tensor:
    """`x ^ (x >> bits)`, the shift filling with zeros, as that of unsigned numbers does."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1).bitwise_xor_(x)
