"""QERA-exact (arXiv 2410.06040): the low-rank repair of a quantization that is best for the layer's outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from loftq_cli.methods.base import Decomposition, Timed, chosen, squared_norm, untimed, with_live_rows
from loftq_cli.methods.gram import weigh, weighted_top_r
from loftq_cli.methods.inputs import Inputs
from loftq_cli.methods.qlora import zero_start
from loftq_cli.quantizers.base import Quantizer, quantize_residual


def qera(
    W: Tensor,
    quantizer: Quantizer,
    rank: int,
    *,
    inputs: Inputs,
    iters: int,
    seeds: Sequence[int],
    timed: Timed = untimed,
) -> Decomposition:
    """Quantize `W` [B, m, n], and repair its error once, as `inputs` weigh it; `iters` is not used.

    Where nothing is to repair, the result is QLoRA's start.
    """
    start = zero_start(W, rank, seeds)
    with timed("quantize"):
        quantized, residual = quantize_residual(quantizer, W)
    with timed("low_rank"):
        root = inputs.root
        factors, error = weighted_top_r(residual, root, rank, seeds)
        better = error < squared_norm(weigh(residual, root))
    plain = Decomposition(quantized, start, start, torch.zeros_like(better, dtype=torch.int64))
    repaired = replace(plain, factors=factors, iterations=torch.ones_like(plain.iterations))
    best = chosen(better, repaired, plain)
    return replace(best, factors=with_live_rows(best.factors, start))
