"""What a method returns, and what all methods share.

Shapes: B = weights in a batch, m = out_features, n = in_features, r = rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from loftq_cli.lowrank import LowRankFactors
from loftq_cli.quantizers.base import QuantizedWeight, Quantizer

RUN = 1024  # weights

Start = Callable[[Tensor, int, Sequence[int]], LowRankFactors]  # of weights, rank and seeds: see `zero_start`
Timed = Callable[[str], AbstractContextManager[None]]  # wraps the stages "quantize" and "low_rank"


def untimed(stage: str) -> AbstractContextManager[None]:
    """Measure nothing."""
    return nullcontext()


@dataclass(frozen=True)
class Decomposition:
    """`W ≈ dequantize(quantized) + factors.product()`, for scaling 1, of a batch of weights one on top of the other.

    `start` is QLoRA's, for weights that turn out to have nothing to repair. `iterations` counts the alternations that
    led to each weight's factors: 0 where it was only quantized.

    Shapes: quantized [B * m, n], iterations int64 [B].
    """

    quantized: QuantizedWeight
    factors: LowRankFactors
    start: LowRankFactors
    iterations: Tensor


class Method(Protocol):
    """A method is one function; one row in `METHODS` adds it."""

    def __call__(
        self,
        W: Tensor,
        quantizer: Quantizer,
        rank: int,
        *,
        iters: int,
        seeds: Sequence[int],
        start: Start = ...,
        timed: Timed = untimed,
    ) -> Decomposition:
        """Decompose `W` [B, m, n], of any float dtype, deterministically, on its device.

        Args:
            W: weights that `stackable` allows to quantize together, or a single one.
            quantizer: how to quantize.
            rank: of the factors.
            iters: alternations.
            seeds: those of the weights (`seed_for`).
            start: makes the factors of an adapter that begins at zero.
            timed: wraps the stages "quantize" and "low_rank".
        """
        ...


def squared_norm(x: Tensor) -> Tensor:
    """Return the sum of squares of each float32 `x[i]`, float64 [B], to 1e-8 (1e-7 for a few thousand weights).

    A GPU sums in float64 as it reads: no copy, and no wait for a decision. On a CPU a float64 copy costs ten times as
    much as summing in float32, over short runs only (over 16 M weights it would be 0.2 % short); the copy is taken
    where squares may leave the range of float32.
    """
    if x.is_cuda:
        return torch.stack(torch._foreach_norm(x.unbind(), 2, torch.float64)).square_()
    flat = x.flatten(1)
    whole = flat.shape[1] // RUN * RUN
    runs = torch.linalg.vector_norm(flat[:, :whole].unflatten(1, (-1, RUN)), dim=2)
    rest = torch.linalg.vector_norm(flat[:, whole:], dim=1)
    total: Tensor = runs.double().square_().sum(1) + rest.double().square_()
    return total if ((total > 1e-20) & (total < 1e30)).all() else flat.double().square_().sum(1)


def seed_for(seed: int, name: str) -> int:
    """Return the seed of what is drawn for the tensor `name`: stable across runs, platforms and orders of work."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1  # 63 bits


def chosen(better: Tensor, now: Decomposition, best: Decomposition) -> Decomposition:
    """Take the weights of the batch where `better` [B] from `now`, the others from `best`."""
    mask = better.to(now.iterations.device)

    def select(ours: object, other: object) -> object:
        """For any tensor that has the weights' parts one after the other, and all that such tensors are fields of."""
        if isinstance(ours, Tensor) and isinstance(other, Tensor):
            flat = torch.where(mask[:, None], ours.reshape(len(mask), -1), other.reshape(len(mask), -1))
            return flat.view_as(ours)
        if is_dataclass(ours) and not isinstance(ours, type):
            parts = {f.name: getattr(ours, f.name) for f in fields(ours) if f.name != "codebook"}  # that is constant
            return replace(ours, **{name: select(part, getattr(other, name)) for name, part in parts.items()})
        return ours

    selected = select(now, best)
    assert isinstance(selected, Decomposition)
    return selected


def with_live_rows(factors: LowRankFactors, start: LowRankFactors) -> LowRankFactors:
    """Replace rows of lora_A that are zero, where the rank exceeds the residual's, for a pair of zeros never trains."""
    live = factors.lora_A.any(dim=2, keepdim=True)
    return replace(factors, lora_A=torch.where(live, factors.lora_A, start.lora_A))
