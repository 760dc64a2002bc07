"""LoftQ (arXiv 2310.08659, algorithm 1): alternate quantization and the best low-rank repair of its error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from loftq_cli.lowrank import top_r
from loftq_cli.methods.base import Decomposition, Start, Timed, chosen, squared_norm, untimed, with_live_rows
from loftq_cli.methods.qlora import zero_start
from loftq_cli.quantizers.base import Quantizer, quantize_residual


def loftq(
    W: Tensor,
    quantizer: Quantizer,
    rank: int,
    *,
    iters: int,
    seeds: Sequence[int],
    start: Start = zero_start,
    timed: Timed = untimed,
) -> Decomposition:
    """Decompose `W` [B, m, n] in `iters` alternations; keep each weight's best, for they need not improve steadily.

    Q ← quantize(W − B A), then B A ← the top `rank` of W − dequantize(Q). Where no alternation helps, as when the
    quantization is exact, the result is QLoRA's start. So it is where something is not finite, which no comparison
    calls better.

    B A being a projection of the residual, the squared error is the residual's less that of B A. It is read in every
    round, right after the low-rank step, which has waited for the device anyway.
    """
    zero = start(W, rank, seeds)
    with timed("quantize"):
        quantized, residual = quantize_residual(quantizer, W)
    energy = squared_norm(residual)
    best = Decomposition(quantized, zero, zero, torch.zeros(len(W), dtype=torch.int64, device=W.device))
    least, subspace = energy.tolist(), None
    for iteration in range(1, iters + 1):
        with timed("low_rank"):
            factors, subspace = top_r(residual, rank, seeds=seeds, start=subspace)
        errors = (energy - factors.energy).tolist()
        better = [error < other for error, other in zip(errors, least, strict=True)]
        least = [error if yes else other for error, other, yes in zip(errors, least, better, strict=True)]
        now = Decomposition(quantized, factors, zero, torch.full_like(best.iterations, iteration))
        best = now if all(better) else chosen(torch.tensor(better), now, best) if any(better) else best
        if iteration < iters:
            with timed("quantize"):
                quantized, residual = quantize_residual(quantizer, W, factors.lora_A, factors.lora_B)
            energy = squared_norm(residual)
    return replace(best, factors=with_live_rows(best.factors, zero))
