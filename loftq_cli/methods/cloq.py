"""CLoQ (arXiv 2501.18475) in LoftQ's alternation: calibrated rounding, then the calibrated low-rank repair of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from loftq_cli.methods.base import Decomposition, Timed, chosen, squared_norm, untimed, with_live_rows
from loftq_cli.methods.feedback import round_with_feedback
from loftq_cli.methods.gram import weigh, weighted_top_r
from loftq_cli.methods.inputs import Inputs
from loftq_cli.methods.qlora import zero_start
from loftq_cli.quantizers.base import Quantizer, in_rows, quantize_residual
from loftq_cli.quantizers.base import residual as residual_of


def cloq(
    W: Tensor,
    quantizer: Quantizer,
    rank: int,
    *,
    inputs: Inputs,
    iters: int,
    seeds: Sequence[int],
    timed: Timed = untimed,
) -> Decomposition:
    """Decompose `W` [B, m, n] in `iters` alternations; keep each weight's best by output error (`inputs`).

    Q ← round(W − B A) with error feedback, then B A ← the best for W − dequantize(Q), see `weighted_top_r`. It competes
    with plain quantization, which is the result, with QLoRA's start, where no alternation helps. Of rank 0, it is the
    first rounding.

    Raises:
        ValueError: the quantizer has groups that leave their row.
    """
    if not in_rows(quantizer, W.shape[2]):
        raise ValueError("cloq needs groups along each row")
    start = zero_start(W, rank, seeds)
    with timed("quantize"):
        quantized, residual = quantize_residual(quantizer, W)
        feedback = inputs.feedback
    with timed("low_rank"):
        root = inputs.root
        least = squared_norm(weigh(residual, root))
    best = Decomposition(quantized, start, start, torch.zeros(len(W), dtype=torch.int64, device=W.device))
    target = W.float()
    for iteration in range(1, (iters if rank else 1) + 1):
        with timed("quantize"):
            quantized = round_with_feedback(target.flatten(0, 1), quantizer, feedback)
            residual = residual_of(W.flatten(0, 1), quantized).view(W.shape)
        with timed("low_rank"):
            if rank:
                factors, error = weighted_top_r(residual, root, rank, seeds)
            else:
                factors, error = start, squared_norm(weigh(residual, root))
        better = error < least
        least = torch.where(better, error, least)
        now = Decomposition(quantized, factors, start, torch.full_like(best.iterations, iteration))
        best = chosen(better, now, best)
        target = W.float() - factors.product()
    return replace(best, factors=with_live_rows(best.factors, start))
