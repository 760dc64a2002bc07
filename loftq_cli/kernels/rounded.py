"""Codes that train, rounded and dequantized in one pass, and their gradients in another.

In torch, `methods.trained` does the same in some twenty passes over as many numbers as the block has weights; these
equal it in every bit, gradients included, where the codes are finite.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from loftq_cli.kernels.tiles import VALUES

BLOCK = 2048


class Grid(NamedTuple):
    """What codes stand for.

    Args:
        zero_point: float32 [m, G], contiguous; None for a codebook.
        levels: a codebook, float32 [2**bits], ascending, or None, as are the next two.
        middles: between its levels.
        constants: the least and the greatest that has a gradient, and the mean distance of levels.
        top: the last code.
        dtype: that values are rounded to.
    """

    zero_point: Tensor | None
    levels: Tensor | None
    middles: Tensor | None
    constants: Tensor | None
    top: int
    dtype: torch.dtype


def rounded(codes: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """Return the values of the codes, float32 [m, G, g].

    Args:
        codes: float32 [m, G, g], contiguous, on CUDA: in steps of the grid, less the zero point; or in mean distances
            of the levels.
        scale: float32 [m, G], contiguous.
        grid: see there.
    """
    values = torch.empty_like(codes)
    _launch(rounded_kernel, (values,), codes, scale, grid)
    return values


def rounded_gradients(gradient: Tensor, codes: Tensor, scale: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return the gradients of the codes, and those of the scales before they are summed: float32 [m, G, g].

    Args:
        gradient: of the values, float32 [m, G, g], contiguous.
        codes: as `rounded` had them.
        scale: likewise.
        grid: likewise.
    """
    of_codes, of_scale = torch.empty_like(codes), torch.empty_like(codes)
    _launch(gradients_kernel, (gradient, of_codes, of_scale), codes, scale, grid)
    return of_codes, of_scale


def _launch(kernel: Any, first: tuple[Tensor, ...], codes: Tensor, scale: Tensor, grid: Grid) -> None:
    with torch.cuda.device_of(codes):
        kernel[(triton.cdiv(codes.numel(), BLOCK),)](
            *first, codes, scale, *grid[:4], codes.numel(), float(grid.top), G=codes.shape[2],
            LEVELS=0 if grid.levels is None else len(grid.levels), VALUES=VALUES[grid.dtype], BLOCK=BLOCK, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip


@triton.jit
def _round(
    offsets, inside, codes_pointer, scale_pointer, zero_point_pointer, levels_pointer, middles_pointer,
    constants_pointer, top, G: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Return codes less the zero point, or levels; scales; and the share of the gradient that passes."""
    code = tl.load(codes_pointer + offsets, mask=inside, other=0.0)
    scale = tl.load(scale_pointer + offsets // G, mask=inside, other=0.0)
    if LEVELS == 0:
        least = -tl.load(zero_point_pointer + offsets // G, mask=inside, other=0.0)
        most = least + top
        # half to even, as torch.round, exactly for |x| < 2**22
        whole = (code + 12582912.0) - 12582912.0
        centred = tl.minimum(tl.maximum(whole, least), most)
        # as torch has it of minimum and maximum: at an end of the grid half a gradient passes
        share = tl.where((whole == least) | (whole == most), 0.5, 1.0)
        share = tl.where((whole < least) | (whole > most), 0.0, share)
    else:
        low, high = tl.load(constants_pointer), tl.load(constants_pointer + 1)
        step = tl.load(constants_pointer + 2)
        x = code * step
        share = tl.where((x >= low) & (x <= high), 1.0, 0.0)
        centred = tl.zeros(x.shape, tl.float32) + tl.load(levels_pointer)
        for i in tl.static_range(LEVELS - 1):
            centred = tl.where(x > tl.load(middles_pointer + i), tl.load(levels_pointer + i + 1), centred)
    return centred, scale, share


@triton.jit
def rounded_kernel(
    values_pointer,  # float32 [m, G, g], as are codes
    codes_pointer,
    scale_pointer,  # float32 [m, G]
    zero_point_pointer,  # float32 [m, G] or None
    levels_pointer,  # float32 [LEVELS] or None
    middles_pointer,  # float32 [LEVELS - 1] or None
    constants_pointer,  # float32 [3] or None
    count,
    top,
    G: tl.constexpr,
    LEVELS: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Dequantize `BLOCK` codes."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < count
    centred, scale, _ = _round(
        offsets, inside, codes_pointer, scale_pointer, zero_point_pointer, levels_pointer, middles_pointer,
        constants_pointer, top, G, LEVELS,
    )  # fmt: skip
    tl.store(values_pointer + offsets, (centred * scale).to(VALUES).to(tl.float32), mask=inside)


@triton.jit
def gradients_kernel(
    gradient_pointer,  # float32 [m, G, g], as are the next three
    of_codes_pointer,
    of_scale_pointer,
    codes_pointer,
    scale_pointer,  # and so on: see `rounded_kernel`
    zero_point_pointer,
    levels_pointer,
    middles_pointer,
    constants_pointer,
    count,
    top,
    G: tl.constexpr,
    LEVELS: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradients of `BLOCK` codes."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < count
    centred, scale, share = _round(
        offsets, inside, codes_pointer, scale_pointer, zero_point_pointer, levels_pointer, middles_pointer,
        constants_pointer, top, G, LEVELS,
    )  # fmt: skip
    gradient = tl.load(gradient_pointer + offsets, mask=inside, other=0.0).to(VALUES).to(tl.float32)
    passes = tl.where(share > 0, gradient * scale * share, 0.0)
    if LEVELS > 0:
        passes *= tl.load(constants_pointer + 2)
    tl.store(of_codes_pointer + offsets, passes, mask=inside)
    tl.store(of_scale_pointer + offsets, gradient * centred, mask=inside)
