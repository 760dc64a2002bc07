"""The search of `quantizers.uniform`, fused: one read of the weights, all candidates in registers.

Its torch twin is `quantizers.uniform.search`, which says what it does and why; every step here is the same step there,
with the same rounding (IEEE division, no fused multiply-add), so that the two choose the same scales and codes but
where two errors differ in the last bits of a sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loftq_cli.kernels.tiles import VALUES, group_sum, on_device, place, product, shape_of_tile, spread


def uniform(
    W: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bits: int,
    symmetric: bool,
    g: int,
    shares: list[float],
    full_shares: int,
    tie: float,
    factors: tuple[float, float],
    values: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Quantize `W - lora_B @ lora_A` in groups of `g` inputs, the last one of a row as short as need be.

    Args:
        W: [B, m, n], any float dtype, on CUDA.
        lora_A: float32 [B, r, n], or None for no product.
        lora_B: float32 [B, m, r].
        bits: of a code.
        symmetric: the zero point is fixed.
        g: at most `TILE`.
        shares: as `tie` and `factors`, the twin's.
        full_shares: so many of the shares are tried with two zero points, the rest with three.
        tie: by how much an error must be smaller.
        factors: of the finer steps.
        values: the dtype that dequantized values are rounded to; None for no residual.

    Returns:
        codes uint8 [B * m, n], scale float16 [B * m, groups], zero_point uint8 [B * m, groups]; and the residual `W` −
        dequantized value, float32 [B, m, n], or None.
    """
    batch, m, n = W.shape
    groups = triton.cdiv(n, g)
    W = W.contiguous()
    if lora_A is not None and lora_B is not None:
        lora_A, lora_B = lora_A.contiguous(), lora_B.contiguous()
    codes = W.new_empty((batch * m, n), dtype=torch.uint8)
    scale = W.new_empty((batch * m, groups), dtype=torch.float16)
    zero_point = W.new_empty((batch * m, groups), dtype=torch.uint8)
    residual = None if values is None else W.new_empty(W.shape, dtype=torch.float32)
    tile = shape_of_tile(g)
    with torch.cuda.device_of(W):
        uniform_kernel[(groups * triton.cdiv(m, tile["ROWS"]), batch)](
            W, lora_A, lora_B, codes, scale, zero_point, residual, on_device(tuple(shares), W.device),
            m, n, 0 if lora_A is None else lora_A.shape[1], g, groups, full_shares, len(shares),
            float(2**bits - 1), float(2 ** (bits - 1)), tie, *factors,
            symmetric=symmetric, VALUES=VALUES[values or torch.float32], **tile, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return codes, scale, zero_point, residual


@triton.jit
def _round_half_even(x):
    # exact for |x| < 2**22, and codes are below 256 (torch.round does the same; tl has no portable one)
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _fp16_scale(scale):
    rounded = scale.to(tl.float16).to(tl.float32)
    return tl.where(tl.abs(rounded) < 5.9604644775390625e-08, 5.9604644775390625e-08, rounded)


@triton.jit
def _codes(w, scale, zero_point, top):
    u = w * spread(tl.math.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)) + spread(zero_point)
    # far outside the grid, where rounding by addition is not exact, the clamp gives the end of the grid all the same
    return u, tl.minimum(tl.maximum(_round_half_even(u), 0.0), top)


@triton.jit
def _error(w, top, scale, zero_point):
    u, codes = _codes(w, scale, zero_point, top)
    difference = codes - u
    return tl.math.sqrt_rn(group_sum(difference * difference)) * tl.abs(scale)


@triton.jit
def _consider(w, top, tie, scale, zero_point, least, next_scale, next_zero_point):
    next_scale = _fp16_scale(next_scale)
    error = _error(w, top, next_scale, next_zero_point)
    better = error * tie < least
    scale = tl.where(better, next_scale, scale)
    zero_point = tl.where(better, next_zero_point, zero_point)
    return scale, zero_point, tl.where(better, error, least)


@triton.jit
def _least_squares(w, top, scale, zero_point):
    _, codes = _codes(w, scale, zero_point, top)
    c = codes - spread(zero_point)
    return _fp16_scale(tl.math.div_rn(group_sum(w * c), tl.maximum(group_sum(c * c), 1.0)))


@triton.jit
def _search(w, shares_pointer, full_shares, shares, top, half, tie, finer, coarser, symmetric: tl.constexpr):
    """Coarse shares, finer steps, least squares: return codes of the tile, scale and zero point of each group."""
    low = tl.minimum(tl.min(tl.min(w, 1), 1), 0.0)
    high = tl.maximum(tl.max(tl.max(w, 1), 1), 0.0)
    ones = tl.full(low.shape, 1.0, tl.float32)
    if symmetric:
        zero_point = ones * half
        upward = tl.maximum(tl.math.div_rn(high, ones * (half - 1)), tl.math.div_rn(-low, zero_point))
        downward = -tl.maximum(tl.math.div_rn(high, zero_point), tl.math.div_rn(-low, ones * (half - 1)))
        scale = _fp16_scale(upward * tl.load(shares_pointer))
        least = _error(w, top, scale, zero_point)
        for i in range(shares):
            share = tl.load(shares_pointer + i)
            scale, zero_point, least = _consider(w, top, tie, scale, zero_point, least, upward * share, zero_point)
            scale, zero_point, least = _consider(w, top, tie, scale, zero_point, least, downward * share, zero_point)
    else:
        covering = _fp16_scale(tl.math.div_rn(high - low, ones * top))
        exact = tl.minimum(tl.maximum(tl.math.div_rn(-low, covering), 0.0), top)
        below, above = tl.floor(exact), tl.ceil(exact)
        centred = tl.minimum(tl.maximum(_round_half_even(exact), half - 1), half)
        scale, zero_point = _fp16_scale(covering * tl.load(shares_pointer)), below
        least = _error(w, top, scale, zero_point)
        for i in range(shares):
            share = tl.load(shares_pointer + i)
            scale, zero_point, least = _consider(w, top, tie, scale, zero_point, least, covering * share, below)
            scale, zero_point, least = _consider(w, top, tie, scale, zero_point, least, covering * share, above)
            if i >= full_shares:
                scale, zero_point, least = _consider(w, top, tie, scale, zero_point, least, covering * share, centred)

    start, middle = scale, zero_point
    for i in range(2):
        factor = tl.where(i == 0, finer, coarser)
        if symmetric:
            scale, zero_point, least = _consider(w, top, tie, scale, zero_point, least, start * factor, middle)
        else:
            for step in range(3):
                moved = tl.minimum(tl.maximum(middle + (step - 1), 0.0), top)
                scale, zero_point, least = _consider(w, top, tie, scale, zero_point, least, start * factor, moved)

    once = _least_squares(w, top, scale, zero_point)
    twice = _least_squares(w, top, once, zero_point)
    scale, zero_point, least = _consider(w, top, tie, scale, zero_point, least, once, zero_point)
    scale, zero_point, least = _consider(w, top, tie, scale, zero_point, least, twice, zero_point)
    _, codes = _codes(w, scale, zero_point, top)
    return codes, scale, zero_point


@triton.jit
def uniform_kernel(
    W_pointer,  # [B, m, n]
    lora_A_pointer,  # float32 [B, r, n] or None
    lora_B_pointer,  # float32 [B, m, r] or None
    codes_pointer,  # uint8 [B, m, n]
    scale_pointer,  # float16 [B, m, groups]
    zero_point_pointer,  # uint8 [B, m, groups]
    residual_pointer,  # float32 [B, m, n] or None
    shares_pointer,  # float32 [shares], falling
    m,
    n,
    r,
    g,
    groups,
    full_shares,
    shares,
    top,
    half,
    tie,
    finer,
    coarser,
    symmetric: tl.constexpr,
    VALUES: tl.constexpr,
    PIECES: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Search `ROWS` groups, one below the other."""
    row, column, in_rows, in_columns, group, matrix = place(m, n, g, groups, PIECES, ROWS, WIDTH)
    inside = spread(in_rows) & in_columns
    offsets = matrix * m * n + spread(row.to(tl.int64) * n) + column
    # The product comes before the load: of two layouts Triton keeps the later one's, and the dot's suits no group.
    low_rank = 0.0
    if lora_A_pointer is not None:
        lora_A_pointer += matrix * r * n
        lora_B_pointer += matrix * m * r
        low_rank = product(lora_A_pointer, lora_B_pointer, m, n, r, g, group, row, PIECES, WIDTH)
    # a column beyond the group must not count: with weight 0 its code is the zero point, and its error 0
    w = tl.load(W_pointer + offsets, mask=inside, other=0.0).to(tl.float32) - low_rank
    codes, scale, zero_point = _search(
        w, shares_pointer, full_shares, shares, top, half, tie, finer, coarser, symmetric
    )
    tl.store(codes_pointer + offsets, codes.to(tl.uint8), mask=inside)
    of_group = (matrix * m + row) * groups + group
    tl.store(scale_pointer + of_group, scale.to(tl.float16), mask=in_rows)
    tl.store(zero_point_pointer + of_group, zero_point.to(tl.uint8), mask=in_rows)
    if residual_pointer is not None:
        value = ((codes - spread(zero_point)) * spread(scale)).to(VALUES).to(tl.float32)
        # read again, from the cache, rather than kept in registers during the search
        w = tl.load(W_pointer + offsets, mask=inside, other=0.0).to(tl.float32)
        tl.store(residual_pointer + offsets, w - value, mask=inside)
