"""GPTQ's rounding of a block of columns in one launch, the search for each group's scale among it.

The search is that of `kernels.uniform`; or, for a codebook, `quantizers.codebook.search`, step by step.

The rows of a weight are rounded without regard to each other, so that one program does for a few of them what its torch
twin, `methods.feedback.round_block`, does for all. Every step is the same step there, with the same rounding (IEEE
division, no fused multiply-add), so that the codes are the same but where the last bits of a sum decide.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loftq_cli.kernels.tiles import VALUES, group_sum, on_device, spread
from loftq_cli.kernels.uniform import _search

ROWS = 16  # of a program, of a warp or two: few, so that many programs hide how long each waits for its sums
DEPTH = 16  # columns whose errors are multiplied at once


def feedback(
    columns: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    feedback: Tensor,
    bits: int,
    symmetric: bool,
    g: int,
    shares: list[float],
    full_shares: int,
    tie: float,
    factors: tuple[float, float],
    values: torch.dtype,
) -> None:
    """Round `columns` in groups of `g`, each column after the errors of those before it.

    Args:
        columns: float32 [k, m], one below the other, contiguous, on CUDA; each becomes its value minus itself.
        codes: uint8 [k, m], to fill, contiguous.
        scale: float16 [m, groups], of any stride along its rows: to fill, but with no `shares` it is there already.
        zero_point: uint8, the shape and the strides of `scale`, likewise.
        feedback: float32 [k, k], of any strides, upper triangular with ones on its diagonal.
        bits: as the others, what `kernels.uniform` has it for.
        symmetric: likewise.
        g: at most `WIDEST_WITH_FEEDBACK`.
        shares: none for no search.
        full_shares: likewise, as the rest.
        tie: above 1.
        factors: of the finer steps.
        values: the dtype that values are rounded to.
    """
    grid = full_shares, len(shares), float(2**bits - 1), float(2 ** (bits - 1)), tie, *factors
    _launch(
        columns, codes, scale, zero_point, feedback, None, shares, g, grid, SEARCH=len(shares) > 0,
        symmetric=symmetric, VALUES=VALUES[values], LEVELS=0, SCALES=tl.float16,
    )  # fmt: skip


def feedback_to_levels(
    columns: Tensor,
    codes: Tensor,
    scale: Tensor,
    feedback: Tensor,
    levels: Tensor,
    g: int,
    search: bool,
    shares: list[float],
    refinements: int,
    scales: torch.dtype,
    values: torch.dtype,
) -> None:
    """Round `columns` to levels, in whole groups of `g`, or in one with no `search`.

    Args:
        columns: as above.
        codes: as above.
        feedback: as above.
        scale: [m, groups], of any stride along its rows: to fill, but with no `search` it is there already.
        levels: float32 [2**bits], ascending.
        g: at most `WIDEST_WITH_FEEDBACK`.
        search: find the scales.
        shares: of the largest magnitude, of either sign, to try in turn; with none it is the scale itself.
        refinements: least-squares steps from the best of them.
        scales: the dtype that scales are rounded to.
        values: the dtype that values are rounded to.
    """
    grid = refinements, len(shares), 0.0, 0.0, 0.0, 0.0, 0.0
    _launch(
        columns, codes, scale, None, feedback, levels, shares, g, grid, SEARCH=search,
        symmetric=False, VALUES=VALUES[values], LEVELS=len(levels), SCALES=VALUES[scales],
    )  # fmt: skip


def _launch(
    columns: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    feedback: Tensor,
    levels: Tensor | None,
    shares: list[float],
    g: int,
    grid: tuple[float, ...],
    **constants: object,
) -> None:
    k, m = columns.shape
    width = max(16, triton.next_power_of_2(g))
    with torch.cuda.device_of(columns):
        feedback_kernel[(triton.cdiv(m, ROWS),)](
            columns, codes, scale, zero_point, feedback, on_device(tuple(shares), columns.device), levels,
            m, k, g, scale.stride(0), *feedback.stride(), *grid, **constants,
            ROWS=ROWS, DEPTH=DEPTH, PIECES=2 if width >= 32 else 1, WIDTH=width, num_warps=1 if width <= 64 else 2,
            enable_fp_fusion=False,
        )  # fmt: skip


@triton.jit
def _finite(per_scale):
    # a group of zeros has a scale of zero
    return tl.where(tl.abs(per_scale) < float("inf"), per_scale, 0.0)


@triton.jit
def _nearest(x, levels_pointer, LEVELS: tl.constexpr):
    """Codes and levels nearest to `x`, the lower one in a tie."""
    code = tl.zeros(x.shape, tl.int32)
    level = tl.zeros(x.shape, tl.float32) + tl.load(levels_pointer)
    for i in tl.static_range(LEVELS - 1):
        low, high = tl.load(levels_pointer + i), tl.load(levels_pointer + i + 1)
        above = x > (low + high) * 0.5
        code = tl.where(above, i + 1, code)
        level = tl.where(above, high, level)
    return code, level


@triton.jit
def _search_levels(w, inside, shares_pointer, shares, refinements, levels_pointer, LEVELS: tl.constexpr):
    """The scale of each group of the tile: of shares of its largest magnitude the best, and refined."""
    largest = tl.max(tl.max(tl.abs(w), 1), 1)
    best, gain = largest, largest * 0.0
    for i in range(shares + refinements):
        share = tl.load(shares_pointer + i, mask=i < shares, other=0.0)
        scale = tl.where(i < shares, largest * share, best)
        per_scale = tl.math.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
        _, level = _nearest(w * spread(per_scale), levels_pointer, LEVELS)
        v = tl.where(inside, level, 0.0)
        product = group_sum(w * v)
        optimum = tl.math.div_rn(product, group_sum(v * v))
        better = product * optimum > gain
        best = tl.where(better, optimum, best)
        gain = tl.where(better, product * optimum, gain)
    return best


# What differs from block to block compiles no other kernel, which takes seconds.
@triton.jit(
    do_not_specialize=["k", "of_groups", "full_shares", "shares"],
    do_not_specialize_on_alignment=["scale_pointer", "zero_point_pointer"],
)
def feedback_kernel(
    columns_pointer,  # float32 [k, m]
    codes_pointer,  # uint8 [k, m]
    scale_pointer,  # float16 [m, groups]
    zero_point_pointer,  # uint8 [m, groups], or None for a codebook
    feedback_pointer,  # float32 [k, k]
    shares_pointer,  # float32 [shares]
    levels_pointer,  # float32 [LEVELS], or None for a grid
    m,
    k,
    g,
    of_groups,  # stride of the rows of scale and zero_point
    of_row,  # strides of feedback
    of_column,
    full_shares,  # of a codebook: refinements
    shares,
    top,
    half,
    tie,
    finer,
    coarser,
    SEARCH: tl.constexpr,
    symmetric: tl.constexpr,
    VALUES: tl.constexpr,
    LEVELS: tl.constexpr,
    SCALES: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    PIECES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Round `ROWS` rows of the weight; no other program has anything to do with them."""
    within = tl.arange(0, WIDTH)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = row < m
    for start in range(0, k, g):
        count = tl.minimum(g, k - start)
        # the sum comes before the load, so that the tile has the layout of the load: a product's suits no group
        mended = tl.zeros((WIDTH, ROWS), tl.float32)
        for first in range(0, start, DEPTH):
            done = first + tl.arange(0, DEPTH)
            spread = tl.load(
                feedback_pointer + done[None, :] * of_row + (start + within)[:, None] * of_column,
                mask=(done < start)[None, :] & (within < count)[:, None],
                other=0.0,
            )
            errors = tl.load(
                columns_pointer + done[:, None] * m + row[None, :],
                mask=(done < start)[:, None] & in_rows[None, :],
                other=0.0,
            )
            mended = tl.dot(spread, errors, mended, input_precision="ieee")
        offsets = (start + within)[:, None] * m + row[None, :]
        inside = (within < count)[:, None] & in_rows[None, :]
        tile = tl.load(columns_pointer + offsets, mask=inside, other=0.0) + mended

        of_group = row.to(tl.int64) * of_groups + start // g
        if SEARCH:
            groups = tl.trans(tile).reshape(ROWS, PIECES, WIDTH // PIECES)
            if LEVELS > 0:
                column = tl.arange(0, PIECES)[None, :, None] * (WIDTH // PIECES)
                in_group = column + tl.arange(0, WIDTH // PIECES)[None, None, :] < count
                best = _search_levels(groups, in_group, shares_pointer, shares, full_shares, levels_pointer, LEVELS)
                scale = best.to(SCALES).to(tl.float32)
            else:
                _, scale, zero_point = _search(
                    groups, shares_pointer, full_shares, shares, top, half, tie, finer, coarser, symmetric
                )
                tl.store(zero_point_pointer + of_group, zero_point.to(tl.uint8), mask=in_rows)
            tl.store(scale_pointer + of_group, scale.to(SCALES), mask=in_rows)
        else:
            scale = tl.load(scale_pointer + of_group, mask=in_rows, other=1.0).to(tl.float32)
            if LEVELS == 0:
                zero_point = tl.load(zero_point_pointer + of_group, mask=in_rows, other=0).to(tl.float32)

        per_step = tl.math.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
        if LEVELS > 0:
            per_step = _finite(per_step)
        mends_pointer = feedback_pointer + (start + within) * of_row + start * of_column
        for i in tl.range(0, count, num_stages=3):  # loads ahead: nothing else here can hide a wait for them
            # no column is taken out of the tile: it comes with a 1 in the sum of all that it is to mend
            mends = tl.load(mends_pointer + i * of_column, mask=within <= i, other=0.0)
            x = tl.sum(tile * mends[:, None], 0)
            if LEVELS > 0:
                code, level = _nearest(x * per_step, levels_pointer, LEVELS)
            else:
                u = tl.minimum(tl.maximum(x * per_step + zero_point, 0.0), top)
                code = (u + 12582912.0) - 12582912.0  # rounds half to even, as torch.round does
                level = code - zero_point
            tl.store(codes_pointer + (start + i) * m + row, code.to(tl.uint8), mask=in_rows)
            value = (level * scale).to(VALUES).to(tl.float32)
            tile = tl.where((within == i)[:, None], (value - x)[None, :], tile)
        tl.store(columns_pointer + offsets, tile, mask=inside)
        tl.debug_barrier()  # the next group's sum reads what other threads wrote
