"""What a method returns, and what all methods share. Shapes: m = out_features, n = in_features, r = rank."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from loftq_cli.lowrank import LowRankFactors
from loftq_cli.quantizers.base import QuantizedWeight, Quantizer

RUN = 1024  # weights


@dataclass(frozen=True)
class Decomposition:
    """`W ≈ dequantize(quantized) + factors.product()`, for scaling 1.

    `iterations` counts the alternations that led to it: 0 where the weight was only quantized.
    """

    quantized: QuantizedWeight
    factors: LowRankFactors
    iterations: int


class Method(Protocol):
    """A method is one function; one row in `METHODS` adds it."""

    def __call__(self, W: Tensor, quantizer: Quantizer, rank: int, *, iters: int, seed: int) -> Decomposition:
        """Decompose `W` [m, n], deterministically, on its device; `seed` is that of this weight (`seed_for`)."""
        ...


def squared_norm(x: Tensor) -> Tensor:
    """Return the sum of squares of a float32 `x`, float64 [], to 1e-8 (1e-7 for a few thousand weights).

    Summed in float32 over short runs only: over 16 M weights that would be 0.2 % short. A float64 copy costs ten times
    as much, and is taken where squares may leave the range of float32.
    """
    flat = x.reshape(-1)
    whole = len(flat) // RUN * RUN
    runs = torch.linalg.vector_norm(flat[:whole].view(-1, RUN), dim=1)
    rest = torch.linalg.vector_norm(flat[whole:])
    total: Tensor = runs.double().square().sum() + rest.double().square()
    return total if 1e-20 < total < 1e30 else flat.double().square().sum()


def seed_for(seed: int, name: str) -> int:
    """Return the seed of what is drawn for the tensor `name`: stable across runs, platforms and orders of work."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1  # 63 bits
