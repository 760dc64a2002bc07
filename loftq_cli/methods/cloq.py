"""CLoQ (arXiv 2501.18475) in LoftQ's alternation: calibrated rounding, then the calibrated low-rank repair of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from loftq_cli.lowrank import full_precision
from loftq_cli.methods.base import Decomposition, Timed, chosen, squared_norm, untimed, with_live_rows
from loftq_cli.methods.gram import normalized, square_root, weigh, weighted_top_r
from loftq_cli.methods.qlora import zero_start
from loftq_cli.quantizers.base import QuantizedWeight, Quantizer, quantize_residual
from loftq_cli.quantizers.base import residual as residual_of

BLOCK = 128  # columns whose errors reach the columns beyond them in one product
# Of the mean of the Gram's diagonal, GPTQ's own: as if the inputs had that much white noise beside. The inverse of a
# Gram of too few tokens would have columns mend errors by huge changes that no other input can stand.
DAMPING = 0.01


def cloq(
    W: Tensor,
    quantizer: Quantizer,
    rank: int,
    *,
    gram: Tensor,
    iters: int,
    seeds: Sequence[int],
    timed: Timed = untimed,
) -> Decomposition:
    """Decompose `W` [B, m, n] in `iters` alternations; keep each weight's best by output error (`gram` [n, n]).

    Q ← round(W − B A) with error feedback, then B A ← the best for W − dequantize(Q), see `weighted_top_r`. It competes
    with plain quantization, which is the result, with QLoRA's start, where no alternation helps.

    Raises:
        ValueError: the quantizer has no integer zero points, or groups that leave their row.
    """
    like = quantizer.empty(1, W.shape[2])
    if like.zero_point is None or like.scale.ndim != 2:
        raise ValueError("cloq needs a uniform quantizer: integer zero points, and groups along each row")
    start = zero_start(W, rank, seeds)
    with timed("quantize"):
        quantized, residual = quantize_residual(quantizer, W)
        feedback = feedback_of(gram)
    with timed("low_rank"):
        root = square_root(gram)
        least = squared_norm(weigh(residual, root))
    best = Decomposition(quantized, start, start, torch.zeros(len(W), dtype=torch.int64, device=W.device))
    target = W.float()
    for iteration in range(1, iters + 1):
        with timed("quantize"):
            quantized = round_with_feedback(target.flatten(0, 1), quantizer, feedback)
            residual = residual_of(W.flatten(0, 1), quantized).view(W.shape)
        with timed("low_rank"):
            factors, error = weighted_top_r(residual, root, rank, seeds)
        better = error < least
        least = torch.where(better, error, least)
        now = Decomposition(quantized, factors, start, torch.full_like(best.iterations, iteration))
        best = chosen(better, now, best)
        target = W.float() - factors.product()
    return replace(best, factors=with_live_rows(best.factors, start))


def feedback_of(gram: Tensor) -> Tensor:
    """Return how rounding errors spread, float32 [n, n], upper triangular: row i, from input i to those after it.

    What GPTQ (arXiv 2210.17323) reads off the Cholesky factor R of the inverse, H⁻¹ = Rᵀ R: each row of R over its
    diagonal. The factor of H, taken from the last input to the first, is the inverse of R, and so saves one inverse.
    """
    H = normalized(gram)
    H.diagonal().add_(DAMPING)  # their mean being 1
    factor, info = torch.linalg.cholesky_ex(H.flip(0, 1))
    factor.masked_fill_(info != 0, torch.nan)
    identity = torch.eye(len(H), dtype=H.dtype, device=H.device)
    spread = torch.linalg.solve_triangular(factor / factor.diagonal(), identity, upper=False, unitriangular=True)
    return spread.flip(0, 1).float()


def round_with_feedback(target: Tensor, quantizer: Quantizer, feedback: Tensor) -> QuantizedWeight:
    """Quantize `target` [m, n], float32, column by column, each error pushed to the columns to its right (GPTQ).

    The scale and zero point of a group are what the quantizer finds for its columns as they are when its turn comes.
    Errors stay within a block of columns until it is done; blocks begin where groups do, so that a group never sees
    columns that miss some.
    """
    m, n = target.shape
    result = quantizer.empty(m, n)
    columns = target.mT.clone(memory_format=torch.contiguous_format)  # never a view, as of one row
    codes = torch.empty(n, m, dtype=torch.uint8, device=target.device)
    scales, zero_points = [], []
    with full_precision():
        for start, stop in _blocks(n, result.group_size):
            block, errors = columns[start:stop], torch.empty_like(columns[start:stop])
            for i in range(stop - start):
                if (start + i) % result.group_size == 0:
                    group = quantizer.quantize(columns[start + i : start + i + result.group_size].mT.contiguous())
                    assert group.zero_point is not None
                    scales.append(group.scale)
                    zero_points.append(group.zero_point)
                    scale, zero_point = group.scale[:, 0].float(), group.zero_point[:, 0].float()
                    per_step = scale.reciprocal()
                code = torch.addcmul(zero_point, block[i], per_step).round_().clamp_(0, 2**result.bits - 1)
                codes[start + i] = code
                value = code.sub_(zero_point).mul_(scale).to(result.dtype)
                torch.sub(block[i], value, out=errors[i])
                block[i + 1 :].addr_(feedback[start + i, start + i + 1 : stop], errors[i], alpha=-1)
            columns[stop:].addmm_(feedback[start:stop, stop:].mT, errors, alpha=-1)
    return replace(
        result, codes=codes.mT.contiguous(), scale=torch.cat(scales, 1), zero_point=torch.cat(zero_points, 1)
    )


def _blocks(n: int, group_size: int) -> Iterator[tuple[int, int]]:
    """Yield the ends of blocks of at most `BLOCK` columns: whole groups, or parts of one."""
    span = BLOCK // group_size * group_size or group_size
    for first in range(0, n, span):
        end = min(first + span, n)
        for start in range(first, end, BLOCK):
            yield start, min(start + BLOCK, end)
