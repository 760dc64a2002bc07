"""GPTQ's rounding (arXiv 2210.17323): column by column, with the errors fed to the columns that are still to come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from loftq_cli.lowrank import full_precision
from loftq_cli.methods.gram import normalized
from loftq_cli.quantizers.base import QuantizedWeight, Quantizer
from loftq_cli.quantizers.nested import nest, unnest

BLOCK = 128  # columns whose errors reach the columns beyond them in one product
GPU_BLOCK = 256  # the same on a GPU: fewer launches, and more for a product to do, which a few rows do slower
NARROW = 32  # the same within a group: so many columns stay in a core's cache
# Of the mean of the Gram's diagonal, GPTQ's own: as if the inputs had that much white noise beside. The inverse of a
# Gram of too few tokens would have columns mend errors by huge changes that no other input can stand.
DAMPING = 0.01


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

    The scale and zero point of a group, which lies in one row (`in_rows`), are what the quantizer finds for its columns
    as they are when its turn comes. Scales that are quantized themselves, by the mean of them all, are known only when
    all are found: the columns are then rounded again, with what is stored of these.

    Errors stay within a block of columns until it is done; blocks begin where groups do, so that a group never sees
    columns that miss some.
    """
    if quantizer.empty(*target.shape).nested is None:
        return _round(target, quantizer, feedback)
    plain: Quantizer = replace(cast(Any, quantizer), double_quant=False)
    nested = nest(_round(target, plain, feedback).scale.float().view(-1))
    return replace(_round(target, quantizer, feedback, unnest(nested)), nested=nested)


def _round(target: Tensor, quantizer: Quantizer, feedback: Tensor, given: Tensor | None = None) -> QuantizedWeight:
    """`round_with_feedback`, with the scales that are `given` [m * groups], if they are."""
    m, n = target.shape
    like = quantizer.empty(m, n)
    g = like.group_size
    columns = target.mT.clone(memory_format=torch.contiguous_format)  # never a view, as of one row
    codes = torch.empty(n, m, dtype=torch.uint8, device=target.device)
    scale = torch.empty_like(like.scale, device=target.device) if given is None else given
    scale = scale.view(m, -1)
    zero_point = None if like.zero_point is None else torch.empty_like(like.zero_point, device=target.device)
    whole = g <= BLOCK and given is None  # a block of several groups; else of one whose scale is there, or of its part
    most = GPU_BLOCK if target.is_cuda and whole else BLOCK
    with full_precision():
        for start, stop in _blocks(n, g, most if whole else min(g, most)):
            grid = _from(start // g, scale, zero_point)
            if given is None and not whole and start % g == 0:
                _search(quantizer, columns[start : start + g], *grid)
            among = feedback[start:stop, start:stop]
            round_block(columns[start:stop], codes[start:stop], *grid, among, quantizer, g if whole else None)
            _push(columns, feedback, start, stop, n)
    codebook = quantizer.codebook(target.device)
    codes = codes.mT.contiguous()
    return replace(like, codes=codes, scale=scale.view(like.scale.shape), zero_point=zero_point, codebook=codebook)


def round_block(
    columns: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    feedback: Tensor,
    quantizer: Quantizer,
    g: int | None,
) -> None:
    """Round columns in turn, each after the errors of those before it: whole groups, or a part of one.

    A quantizer with a method `fused_feedback` of these arguments does all of it in one launch on CUDA, where that
    method does not return False.

    Args:
        columns: float32 [k, m], one below the other; each becomes its value minus itself.
        codes: uint8 [k, m], to fill.
        scale: float [m, groups from this one on], to fill, or that of the part.
        zero_point: uint8, the shape of `scale`, likewise; None for a codebook.
        feedback: float32 [k, k], upper triangular with ones on its diagonal.
        quantizer: how.
        g: the group size; None for a part.
    """
    fused = getattr(quantizer, "fused_feedback", None) if columns.is_cuda else None
    if fused is not None and fused(columns, codes, scale, zero_point, feedback, g):
        return
    if g is None:
        _round_columns(columns, codes, scale, zero_point, feedback, quantizer)
        return
    k = len(columns)
    for group, first in enumerate(range(0, k, g)):
        of_group, grid = slice(first, min(first + g, k)), _from(group, scale, zero_point)
        _search(quantizer, columns[of_group], *grid)
        round_block(columns[of_group], codes[of_group], *grid, feedback[of_group, of_group], quantizer, None)
        _push(columns, feedback, of_group.start, of_group.stop, k)


def _from(group: int, scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points of this group and those after it."""
    return scale[:, group:], None if zero_point is None else zero_point[:, group:]


def _search(quantizer: Quantizer, columns: Tensor, scale: Tensor, zero_point: Tensor | None) -> None:
    """Fill in the scale and zero point of the first group, `columns` [g, m]."""
    found = quantizer.quantize(columns.mT.contiguous())
    scale[:, 0] = found.scale.view(-1)
    if zero_point is not None and found.zero_point is not None:
        zero_point[:, 0] = found.zero_point.view(-1)


def _to_grid(scale: Tensor, zero_point: Tensor, top: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The function that writes the codes [m] of a column [m] into its second argument, and returns their values."""
    steps, zeros = scale.float(), zero_point.float()
    per_step = steps.reciprocal()

    def rounded(column: Tensor, code: Tensor) -> Tensor:
        torch.addcmul(zeros, column, per_step, out=code).round_().clamp_(0, top)
        return code.sub(zeros).mul_(steps)

    return rounded


def _to_levels(scale: Tensor, levels: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Likewise, of the levels nearest to a column over its scale; all are as near where that is zero."""
    steps, middles = scale.float(), (levels[1:] + levels[:-1]) / 2
    per_step = steps.reciprocal().nan_to_num_(0, 0, 0)

    def rounded(column: Tensor, code: Tensor) -> Tensor:
        nearest = torch.bucketize(column * per_step, middles)
        code.copy_(nearest)
        return levels[nearest].mul_(steps)

    return rounded


def _round_columns(
    columns: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, feedback: Tensor, quantizer: Quantizer
) -> None:
    """`round_block` for columns of one group, whose scale and zero point come first."""
    dtype, levels = quantizer.dtype, quantizer.codebook(columns.device)
    if levels is not None:
        nearest = _to_levels(scale[:, 0], levels)
    else:
        assert zero_point is not None
        nearest = _to_grid(scale[:, 0], zero_point[:, 0], 2**quantizer.bits - 1)
    among, rounded = feedback.mT.contiguous(), torch.empty_like(columns)
    for start in range(0, len(columns), NARROW):
        near = slice(start, min(start + NARROW, len(columns)))
        done = columns[near].mT
        for mends, row, code in zip(
            among[near, near].unbind(), columns[near].unbind(), rounded[near].unbind(), strict=True
        ):
            # Done columns are minus their errors, and the diagonal is 1: this is the column with all that it mends. Of
            # columns to come it takes 0 times: a product of one shape spares the small ones their overhead.
            column = torch.mv(done, mends)
            torch.sub(nearest(column, code).to(dtype), column, out=row)
        _push(columns, feedback, near.start, near.stop, len(columns))
    codes.copy_(rounded)


def _push(columns: Tensor, feedback: Tensor, start: int, stop: int, end: int) -> None:
    """Push the errors of columns `start` to `stop`, which are done, to those from there to `end`."""
    if stop < end:
        columns[stop:end].addmm_(feedback[start:stop, stop:end].mT, columns[start:stop])


def _blocks(n: int, group_size: int, block: int) -> Iterator[tuple[int, int]]:
    """Yield the ends of blocks of at most `block` columns: whole groups, or parts of one."""
    span = block // group_size * group_size or group_size
    for first in range(0, n, span):
        end = min(first + span, n)
        for start in range(first, end, block):
            yield start, min(start + block, end)
