"""LoftQ (arXiv 2310.08659, algorithm 1): alternate quantization and the best low-rank repair of its error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from loftq_cli.lowrank import LowRankFactors, top_r
from loftq_cli.methods.base import Decomposition, Timed, squared_norm, untimed
from loftq_cli.methods.qlora import zero_start
from loftq_cli.quantizers.base import QuantizedWeight, Quantizer, quantize_residual


def loftq(
    W: Tensor, quantizer: Quantizer, rank: int, *, iters: int, seeds: Sequence[int], timed: Timed = untimed
) -> Decomposition:
    """Decompose `W` [B, m, n] in `iters` alternations; keep each weight's best, for they need not improve steadily.

    Q ← quantize(W − B A), then B A ← the top `rank` of W − dequantize(Q). Where no alternation helps, as when the
    quantization is exact, the result is QLoRA's start. So it is where something is not finite, which no comparison
    calls better.

    The best is chosen on the device, which nothing here waits for. B A being a projection of the residual, the squared
    error is the residual's less that of B A.
    """
    start = zero_start(W, rank, seeds)
    with timed("quantize"):
        quantized, residual = quantize_residual(quantizer, W)
    energy = least = squared_norm(residual)
    best = Decomposition(quantized, start, start, torch.zeros(len(W), dtype=torch.int64, device=W.device))
    subspace = None
    for iteration in range(1, iters + 1):
        with timed("low_rank"):
            factors, subspace = top_r(residual, rank, seeds=seeds, start=subspace)
        error = energy - factors.energy
        better = error < least
        least = torch.where(better, error, least)
        best = Decomposition(
            _chosen_codes(better, quantized, best.quantized),
            _chosen(better, factors, best.factors),
            start,
            best.iterations.masked_fill(better, iteration),
        )
        if iteration < iters:
            with timed("quantize"):
                quantized, residual = quantize_residual(quantizer, W, factors.lora_A, factors.lora_B)
            energy = squared_norm(residual)
    return replace(best, factors=_with_live_rows(best.factors, start))


def _select(better: Tensor, ours: Tensor, other: Tensor) -> Tensor:
    """Take `ours` for the weights of the batch where `better` [B], for any tensor that has their parts in turn."""
    batch = len(better)
    return torch.where(better[:, None], ours.reshape(batch, -1), other.reshape(batch, -1)).view_as(ours)


def _chosen(better: Tensor, ours: LowRankFactors, other: LowRankFactors) -> LowRankFactors:
    return LowRankFactors(
        _select(better, ours.lora_A, other.lora_A),
        _select(better, ours.lora_B, other.lora_B),
        torch.where(better, ours.energy, other.energy),
    )


def _chosen_codes(better: Tensor, ours: QuantizedWeight, other: QuantizedWeight) -> QuantizedWeight:
    """As `_select`, for all that is stored; the codebooks are constant."""
    zero_point, nested = ours.zero_point, ours.nested
    if zero_point is not None and other.zero_point is not None:
        zero_point = _select(better, zero_point, other.zero_point)
    if nested is not None and other.nested is not None:
        nested = replace(
            nested,
            codes=_select(better, nested.codes, other.nested.codes),
            absmax=_select(better, nested.absmax, other.nested.absmax),
            offset=_select(better, nested.offset, other.nested.offset),
        )
    return replace(
        ours,
        codes=_select(better, ours.codes, other.codes),
        scale=_select(better, ours.scale, other.scale),
        zero_point=zero_point,
        nested=nested,
    )


def _with_live_rows(factors: LowRankFactors, start: LowRankFactors) -> LowRankFactors:
    """Replace rows of lora_A that are zero, where the rank exceeds the residual's, for a pair of zeros never trains."""
    live = factors.lora_A.any(dim=2, keepdim=True)
    return replace(factors, lora_A=torch.where(live, factors.lora_A, start.lora_A))
