"""The small steps of the low-rank factors in one launch each, for it is the host's time that they cost.

Their torch twins, of the same names, are in `lowrank.small`; they say what is computed and why. `draw` equals its twin
in every bit; the others do the same in float64 (but `inverse_factor` without square roots until the end), so that they
may differ from theirs in the last bits. One program, or one row of programs, has one matrix of the batch: no NaN of
another reaches it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST_FACTOR = 32  # a matrix lies in the registers of one program
TILE = 2048  # values of one program
BLOCK = 1024


def inverse_factor(gram: Tensor) -> Tensor:
    """Return U float64 [B, k, k], upper triangular, `U.mT @ gram @ U = I` but for the shift, for k ≤ `LARGEST_FACTOR`.

    Args:
        gram: float64 [B, k, k], contiguous, on CUDA; it is left as it is, and only its upper triangle counts.
    """
    batch, k = gram.shape[:2]
    result = torch.empty_like(gram)
    with torch.cuda.device_of(gram):
        if k <= 16:
            inverse_factor_kernel[(batch,)](gram, result, k, K=16, num_warps=1, enable_fp_fusion=False)
        else:
            inverse_factor_kernel[(batch,)](gram, result, k, K=32, num_warps=4, enable_fp_fusion=False)
    return result


def scalings(
    values: Tensor, turn: Tensor, rank: int, steepest: float, dtype: torch.dtype, rough: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what the eigenvectors of a negative Gram matrix are multiplied with, see the twin.

    Args:
        values: float64 [B, k], contiguous, rising, on CUDA.
        turn: float64 [B, k, k], of any strides.
        rank: of the factors; 0 for none.
        steepest: the twin's.
        dtype: of `right`.
        rough: of `inverse_bound`.

    Returns:
        right [B, k, k], inverse_bound [B, 1, 1], left float32 [B, k, rank], energy float64 [B], all contiguous; where
        `rank` is 0, there is nothing in `left`, and `energy` is undefined.
    """
    batch, k = values.shape
    right = turn.new_empty((batch, k, k), dtype=dtype)
    inverse_bound = turn.new_empty((batch, 1, 1), dtype=rough)
    left = turn.new_empty((batch, k, rank), dtype=torch.float32)
    energy = turn.new_empty(batch)
    K = triton.next_power_of_2(k)
    rows = max(1, min(K, TILE // K))
    with torch.cuda.device_of(turn):
        scalings_kernel[(triton.cdiv(k, rows), batch)](
            values, turn, right, inverse_bound, left, energy, k, rank, *turn.stride(),
            STEEPEST=steepest, FACTORS=rank > 0, ROWS=rows, K=K, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return right, inverse_bound, left, energy


def draw(seeds: Tensor, rows: int, columns: int) -> Tensor:
    """Return float32 [len(seeds), rows, columns] from [-1, 1), for `seeds` int64 [B] on CUDA."""
    result = seeds.new_empty((len(seeds), rows, columns), dtype=torch.float32)
    count = rows * columns
    with torch.cuda.device_of(seeds):
        draw_kernel[(triton.cdiv(count, BLOCK), len(seeds))](seeds, result, count, BLOCK=BLOCK, num_warps=4)
    return result


@triton.jit
def inverse_factor_kernel(
    gram_pointer,  # float64 [B, k, k]
    result_pointer,  # float64 [B, k, k]
    k,
    K: tl.constexpr,
):
    """Eliminate column by column: the rows that make `gram` triangular are the inverse of its unit lower factor.

    After `c` steps the columns before `c` hold that inverse, below the diagonal; those from `c` on what is left of
    `gram`, which stays symmetric; and the diagonal the pivots.
    """
    at = tl.arange(0, K)
    row, column = at[:, None], at[None, :]
    matrix = tl.program_id(0).to(tl.int64) * k * k
    a = tl.load(gram_pointer + matrix + row * k + column, mask=(row < k) & (column < k), other=0.0)
    a = tl.where(row == column, a * (1 + 1e-12) + 2.2250738585072014e-308, a)
    for c in range(k):
        pivots = tl.sum(tl.where(row == c, a, 0.0), 0)  # the row of the pivot: what is subtracted from those below it
        pivot = tl.sum(tl.where(at == c, pivots, 0.0), 0)
        times = (pivots / pivot)[:, None]  # by symmetry, the column below the pivot is that row
        below = row > c
        a = tl.where(below, tl.where(column == c, -times, a - times * pivots[None, :]), a)
    short = 1.0 / tl.sqrt(tl.sum(tl.where(row == column, a, 0.0), 1))[:, None]
    inverse = tl.where(column < row, a * short, tl.where(column == row, short, 0.0))
    tl.store(result_pointer + matrix + column * k + row, inverse, mask=(row < k) & (column < k))


@triton.jit
def scalings_kernel(
    values_pointer,  # float64 [B, k]
    turn_pointer,  # float64 [B, k, k]
    right_pointer,  # [B, k, k]
    inverse_bound_pointer,  # [B]
    left_pointer,  # float32 [B, k, rank]
    energy_pointer,  # float64 [B]
    k,
    rank,
    of_matrix,
    of_row,
    of_column,
    STEEPEST: tl.constexpr,
    FACTORS: tl.constexpr,
    ROWS: tl.constexpr,
    K: tl.constexpr,
):
    """Scale `ROWS` of the eigenvectors."""
    matrix = tl.program_id(1).to(tl.int64)
    values_pointer += matrix * k
    vector = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, K)
    inside = (vector < k)[:, None] & (at < k)[None, :]
    first = tl.load(values_pointer)
    values = tl.load(values_pointer + vector, mask=vector < k, other=0.0)
    inverse_root = 1.0 / tl.sqrt(tl.sqrt(tl.where(values < first * 1e-12, -values, float("inf"))))
    turn_pointer += matrix * of_matrix
    turn = tl.load(turn_pointer + vector[:, None] * of_column + at[None, :] * of_row, mask=inside, other=0.0)
    right = (turn * inverse_root[:, None]).to(tl.float32).to(right_pointer.dtype.element_ty)
    tl.store(right_pointer + matrix * k * k + vector[:, None] * k + at[None, :], right, mask=inside)
    if FACTORS:
        root = inverse_root * inverse_root * inverse_root * -values
        left = (turn * root[:, None]).to(tl.float32)
        left_pointer += matrix * k * rank
        tl.store(left_pointer + at[None, :] * rank + vector[:, None], left, mask=inside & (vector < rank)[:, None])
    if tl.program_id(0) == 0:
        last = tl.load(values_pointer + k - 1)
        bound = tl.minimum(last, first / STEEPEST)
        bound = tl.where(bound > -1e-37, -1e-37, bound)
        inverse_bound = (-(1.0 / bound)).to(tl.float32).to(inverse_bound_pointer.dtype.element_ty)
        tl.store(inverse_bound_pointer + matrix, inverse_bound)
        if FACTORS:
            wanted = tl.load(values_pointer + at, mask=at < rank, other=0.0)
            tl.store(energy_pointer + matrix, -tl.sum(wanted, 0))


@triton.jit
def draw_kernel(
    seeds_pointer,  # int64 [B]
    result_pointer,  # float32 [B, count]
    count,
    BLOCK: tl.constexpr,
):
    """A block of one matrix's numbers: unsigned, so that `>>` fills with zeros, but for the last shift."""
    matrix = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(seeds_pointer + matrix).to(tl.uint64) + (index + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    drawn = (x.to(tl.int64) >> 40).to(tl.float32) * 1.1920928955078125e-07
    tl.store(result_pointer + matrix * count + index, drawn, mask=index < count)
