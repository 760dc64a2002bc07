"""QLoRA's start (arXiv 2305.14314): quantize the weight and let the adapter begin at zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from loftq_cli.lowrank import LowRankFactors, uniform
from loftq_cli.methods.base import Decomposition, Start, Timed, untimed
from loftq_cli.quantizers.base import Quantizer, quantize_residual


def zero_start(W: Tensor, rank: int, seeds: Sequence[int]) -> LowRankFactors:
    """Return factors for `W` [B, m, n] whose product is zero and which can train: lora_A random, lora_B zero.

    `kaiming_uniform_(lora_A, a=√5)`, which PEFT draws from, is uniform on ±1/√n.
    """
    B, m, n = W.shape
    return LowRankFactors(
        uniform(seeds, rank, n, W.device).mul_(n**-0.5) if rank else torch.zeros(B, 0, n, device=W.device),
        torch.zeros(B, m, rank, device=W.device),
        torch.zeros(B, dtype=torch.float64, device=W.device),
    )


def embedding_start(W: Tensor, rank: int, seeds: Sequence[int]) -> LowRankFactors:
    """As `zero_start`, for tables [B, m, n] of m tokens: lora_A is standard normal, as PEFT draws it there."""
    zero = zero_start(W, rank, seeds)
    cells = uniform(seeds, rank, W.shape[2], W.device).add_(2.0**-24)  # the middles of cells: none is -1
    return replace(zero, lora_A=cells.erfinv_().mul_(2**0.5))


def qlora(
    W: Tensor,
    quantizer: Quantizer,
    rank: int,
    *,
    iters: int,
    seeds: Sequence[int],
    start: Start = zero_start,
    timed: Timed = untimed,
) -> Decomposition:
    """Quantize `W` [B, m, n]; `iters` is not used."""
    with timed("quantize"):
        quantized = quantizer.quantize(W.float().flatten(0, 1))
    iterations = torch.zeros(len(W), dtype=torch.int64, device=W.device)
    zero = start(W, rank, seeds)
    return Decomposition(quantized, zero, zero, iterations)


def without_factors(W: Tensor, quantizer: Quantizer, *, timed: Timed = untimed) -> Decomposition:
    """Quantize `W` [B, m, n], and have no adapter: factors of rank 0."""
    with timed("quantize"):
        quantized, _ = quantize_residual(quantizer, W)
    none = zero_start(W, 0, ())
    return Decomposition(quantized, none, none, torch.zeros(len(W), dtype=torch.int64, device=W.device))
