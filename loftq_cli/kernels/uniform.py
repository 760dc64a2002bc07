"""The search of `quantizers.uniform`, fused: one read of the weights, all candidates in registers.

Its torch twin is `quantizers.uniform._search`, which says what it does and why; every step here is the same step there,
with the same rounding (IEEE division, no fused multiply-add), so that the two choose the same scales and codes but
where two errors differ in the last bits of a sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST = 4096  # weights of a group that one program holds in registers


def search(
    w: Tensor,
    bits: int,
    symmetric: bool,
    shares: list[float],
    full_shares: int,
    tie: float,
    factors: tuple[float, float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes uint8 [G, g], scale float16 [G], zero_point uint8 [G] of `w` float32 [G, g], contiguous, on CUDA.

    `shares`, `tie` and `factors` are the twin's; `full_shares` of the shares are tried with two zero points, the rest
    with three.
    """
    groups, g = w.shape
    width = triton.next_power_of_2(g)
    per_program = max(1, WIDEST // width)
    codes = torch.empty_like(w, dtype=torch.uint8)
    scale = torch.empty(groups, dtype=torch.float16, device=w.device)
    zero_point = torch.empty(groups, dtype=torch.uint8, device=w.device)
    share_values = torch.tensor(shares, dtype=torch.float32, device=w.device)
    top, half = float(2**bits - 1), float(2 ** (bits - 1))
    with torch.cuda.device_of(w):
        search_kernel[(triton.cdiv(groups, per_program),)](
            w, codes, scale, zero_point, share_values, groups, g, full_shares, len(shares), top, half, tie, *factors,
            symmetric=symmetric, GROUPS=per_program, WIDTH=width, enable_fp_fusion=False,
        )  # fmt: skip
    return codes, scale, zero_point


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
    u = w * tl.math.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)[:, None] + zero_point[:, None]
    # far outside the grid, where rounding by addition is not exact, the clamp gives the end of the grid all the same
    return u, tl.minimum(tl.maximum(_round_half_even(u), 0.0), top)


@triton.jit
def _consider(w, top, tie, scale, zero_point, least, next_scale, next_zero_point):
    next_scale = _fp16_scale(next_scale)
    u, codes = _codes(w, next_scale, next_zero_point, top)
    difference = codes - u
    error = tl.math.sqrt_rn(tl.sum(difference * difference, 1)) * tl.abs(next_scale)
    better = error * tie < least
    scale = tl.where(better, next_scale, scale)
    zero_point = tl.where(better, next_zero_point, zero_point)
    return scale, zero_point, tl.where(better, error, least)


@triton.jit
def _first(w, top, scale, zero_point):
    scale = _fp16_scale(scale)
    u, codes = _codes(w, scale, zero_point, top)
    difference = codes - u
    return scale, zero_point, tl.math.sqrt_rn(tl.sum(difference * difference, 1)) * tl.abs(scale)


@triton.jit
def _least_squares(w, top, scale, zero_point):
    _, codes = _codes(w, scale, zero_point, top)
    c = codes - zero_point[:, None]
    return _fp16_scale(tl.math.div_rn(tl.sum(w * c, 1), tl.maximum(tl.sum(c * c, 1), 1.0)))


@triton.jit
def search_kernel(
    w_pointer,  # float32 [G, g]
    codes_pointer,  # uint8 [G, g]
    scale_pointer,  # float16 [G]
    zero_point_pointer,  # uint8 [G]
    shares_pointer,  # float32 [shares], falling
    groups,
    g,
    full_shares,  # so many of the shares are for two zero points, the others for three
    shares,
    top,
    half,
    tie,
    finer,
    coarser,
    symmetric: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,  # the power of two from g
):
    """Search `GROUPS` groups: coarse shares, finer steps, least squares; then the codes."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    column = tl.arange(0, WIDTH)
    inside = (group < groups)[:, None] & (column < g)[None, :]
    offsets = group[:, None] * g + column[None, :]
    w = tl.load(w_pointer + offsets, mask=inside, other=0.0)
    # a column beyond g must not count: with weight 0 its code is the zero point, and its error 0
    low = tl.minimum(tl.min(w, 1), 0.0)
    high = tl.maximum(tl.max(w, 1), 0.0)
    ones = tl.full(low.shape, 1.0, tl.float32)
    if symmetric:
        middle = ones * half
        upward = tl.maximum(tl.math.div_rn(high, ones * (half - 1)), tl.math.div_rn(-low, middle))
        downward = -tl.maximum(tl.math.div_rn(high, middle), tl.math.div_rn(-low, ones * (half - 1)))
        scale, zero_point, least = _first(w, top, upward * tl.load(shares_pointer), middle)
        for i in range(shares):
            share = tl.load(shares_pointer + i)
            scale, zero_point, least = _consider(w, top, tie, scale, zero_point, least, upward * share, middle)
            scale, zero_point, least = _consider(w, top, tie, scale, zero_point, least, downward * share, middle)
    else:
        covering = _fp16_scale(tl.math.div_rn(high - low, ones * top))
        exact = tl.minimum(tl.maximum(tl.math.div_rn(-low, covering), 0.0), top)
        below, above = tl.floor(exact), tl.ceil(exact)
        centred = tl.minimum(tl.maximum(_round_half_even(exact), half - 1), half)
        scale, zero_point, least = _first(w, top, covering * tl.load(shares_pointer), below)
        for i in range(shares):
            share = tl.load(shares_pointer + i)
            scale, zero_point, least = _consider(w, top, tie, scale, zero_point, least, covering * share, below)
            scale, zero_point, least = _consider(w, top, tie, scale, zero_point, least, covering * share, above)
            if i >= full_shares:
                scale, zero_point, least = _consider(w, top, tie, scale, zero_point, least, covering * share, centred)

    start, middle_zero = scale, zero_point
    for i in range(2):
        factor = tl.where(i == 0, finer, coarser)
        if symmetric:
            scale, zero_point, least = _consider(w, top, tie, scale, zero_point, least, start * factor, middle_zero)
        else:
            for step in range(3):
                moved = tl.minimum(tl.maximum(middle_zero + (step - 1), 0.0), top)
                scale, zero_point, least = _consider(w, top, tie, scale, zero_point, least, start * factor, moved)

    once = _least_squares(w, top, scale, zero_point)
    twice = _least_squares(w, top, once, zero_point)
    settled = zero_point
    scale, zero_point, least = _consider(w, top, tie, scale, settled, least, once, settled)
    scale, zero_point, least = _consider(w, top, tie, scale, settled, least, twice, settled)

    _, codes = _codes(w, scale, zero_point, top)
    tl.store(codes_pointer + offsets, codes.to(tl.uint8), mask=inside)
    tl.store(scale_pointer + group, scale.to(tl.float16), mask=group < groups)
    tl.store(zero_point_pointer + group, zero_point.to(tl.uint8), mask=group < groups)
