"""LoftQ (arXiv 2310.08659, algorithm 1): alternate quantization and the best low-rank repair of its error."""

from __future__ import annotations

import torch
from torch import Tensor

from loftq_cli.lowrank import LowRankFactors, top_r
from loftq_cli.methods.base import Decomposition, squared_norm
from loftq_cli.methods.qlora import zero_start
from loftq_cli.quantizers.base import Quantizer, dequantize


def loftq(W: Tensor, quantizer: Quantizer, rank: int, *, iters: int, seed: int) -> Decomposition:
    """Decompose `W` [m, n] in `iters` alternations and keep the best of them, for they need not improve steadily.

    Q ← quantize(W − B A), then B A ← the top `rank` of W − dequantize(Q). Where no alternation helps, as when the
    quantization is exact, the result is QLoRA's start.

    The error is read, and the device waited for, once per alternation. Choosing on the device would take a copy of the
    codes each time and knowledge of every quantizer's fields, to save a wait that is short beside a quantization.
    """
    W = W.float()
    start = zero_start(W, rank, seed)
    quantized, subspace = quantizer.quantize(W), None
    residual = W - dequantize(quantized)
    best, least = Decomposition(quantized, start, iterations=0), squared_norm(residual)
    for iteration in range(1, iters + 1):
        if not squared_norm(residual) < 1e30:  # beyond the scales, or its Gram matrix beyond float32
            break
        factors, subspace = top_r(residual, rank, generator_seed=seed, start=subspace)
        product = factors.product()
        error = squared_norm(residual.sub_(product))
        if error < least:
            best, least = Decomposition(quantized, _with_live_rows(factors, start), iteration), error
        if iteration < iters:
            quantized = quantizer.quantize(W - product)
            residual = W - dequantize(quantized)
    return best


def _with_live_rows(factors: LowRankFactors, start: LowRankFactors) -> LowRankFactors:
    """Replace rows of lora_A that are zero, where the rank exceeds the residual's, for a pair of zeros never trains."""
    live = factors.lora_A.any(dim=1, keepdim=True)
    return LowRankFactors(torch.where(live, factors.lora_A, start.lora_A), factors.lora_B)
