"""GPTQ's rounding of a block of columns in one launch, the search of `kernels.uniform` for each group among it.

The rows of a weight are rounded without regard to each other, so that one program does for a few of them what its torch
twin, `methods.feedback.round_block`, does for all. Every step is the same step there, with the same rounding (IEEE
division, no fused multiply-add), so that the codes are the same but where the last bits of a sum decide.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loftq_cli.kernels.tiles import VALUES, on_device
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
    k, m = columns.shape
    width = max(16, triton.next_power_of_2(g))
    with torch.cuda.device_of(columns):
        feedback_kernel[(triton.cdiv(m, ROWS),)](
            columns, codes, scale, zero_point, feedback, on_device(tuple(shares), columns.device),
            m, k, g, scale.stride(0), *feedback.stride(), full_shares, len(shares), float(2**bits - 1),
            float(2 ** (bits - 1)), tie, *factors, SEARCH=len(shares) > 0, symmetric=symmetric, VALUES=VALUES[values],
            ROWS=ROWS, DEPTH=DEPTH, PIECES=2 if width >= 32 else 1, WIDTH=width, num_warps=1 if width <= 64 else 2,
            enable_fp_fusion=False,
        )  # fmt: skip


# What differs from block to block compiles no other kernel, which takes seconds.
@triton.jit(
    do_not_specialize=["k", "of_groups", "full_shares", "shares"],
    do_not_specialize_on_alignment=["scale_pointer", "zero_point_pointer"],
)
def feedback_kernel(
    columns_pointer,  # float32 [k, m]
    codes_pointer,  # uint8 [k, m]
    scale_pointer,  # float16 [m, groups]
    zero_point_pointer,  # uint8 [m, groups]
    feedback_pointer,  # float32 [k, k]
    shares_pointer,  # float32 [shares]
    m,
    k,
    g,
    of_groups,  # stride of the rows of scale and zero_point
    of_row,  # strides of feedback
    of_column,
    full_shares,
    shares,
    top,
    half,
    tie,
    finer,
    coarser,
    SEARCH: tl.constexpr,
    symmetric: tl.constexpr,
    VALUES: tl.constexpr,
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
            _, scale, zero_point = _search(
                tl.trans(tile).reshape(ROWS, PIECES, WIDTH // PIECES),
                shares_pointer, full_shares, shares, top, half, tie, finer, coarser, symmetric,
            )  # fmt: skip
            tl.store(scale_pointer + of_group, scale.to(tl.float16), mask=in_rows)
            tl.store(zero_point_pointer + of_group, zero_point.to(tl.uint8), mask=in_rows)
        else:
            scale = tl.load(scale_pointer + of_group, mask=in_rows, other=1.0).to(tl.float32)
            zero_point = tl.load(zero_point_pointer + of_group, mask=in_rows, other=0).to(tl.float32)

        per_step = tl.math.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
        mends_pointer = feedback_pointer + (start + within) * of_row + start * of_column
        for i in tl.range(0, count, num_stages=3):  # loads ahead: nothing else here can hide a wait for them
            # no column is taken out of the tile: it comes with a 1 in the sum of all that it is to mend
            mends = tl.load(mends_pointer + i * of_column, mask=within <= i, other=0.0)
            x = tl.sum(tile * mends[:, None], 0)
            u = tl.minimum(tl.maximum(x * per_step + zero_point, 0.0), top)
            code = (u + 12582912.0) - 12582912.0  # rounds half to even, as torch.round does
            tl.store(codes_pointer + (start + i) * m + row, code.to(tl.uint8), mask=in_rows)
            value = ((code - zero_point) * scale).to(VALUES).to(tl.float32)
            tile = tl.where((within == i)[:, None], (value - x)[None, :], tile)
        tl.store(columns_pointer + offsets, tile, mask=inside)
        tl.debug_barrier()  # the next group's sum reads what other threads wrote
