"""Codebook quantization, fused. Its torch twin is `quantizers.normal_float._blockwise`: the same steps and rounding."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loftq_cli.kernels.tiles import VALUES, place, product, shape_of_tile, spread


def codebook(
    W: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    levels: Tensor,
    g: int,
    values: torch.dtype | None,
    scales: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantize `W - lora_B @ lora_A` to the levels times the largest magnitude of each group.

    Args:
        W: [B, m, n], any float dtype, on CUDA.
        lora_A: float32 [B, r, n], or None for no product.
        lora_B: float32 [B, m, r].
        levels: float32 [2**bits], ascending.
        g: divides n; at most `TILE`.
        values: the dtype that dequantized values are rounded to; None for no residual.
        scales: the dtype that the magnitudes are rounded to.

    Returns:
        codes uint8 [B * m, n], scale float32 [B * m * n / g]; and the residual `W` − dequantized value, float32
        [B, m, n], or None.
    """
    batch, m, n = W.shape
    groups = n // g
    W = W.contiguous()
    if lora_A is not None and lora_B is not None:
        lora_A, lora_B = lora_A.contiguous(), lora_B.contiguous()
    codes = W.new_empty((batch * m, n), dtype=torch.uint8)
    scale = W.new_empty(batch * m * groups, dtype=torch.float32)
    residual = None if values is None else W.new_empty(W.shape, dtype=torch.float32)
    tile = shape_of_tile(g)
    with torch.cuda.device_of(W):
        codebook_kernel[(groups * triton.cdiv(m, tile["ROWS"]), batch)](
            W, lora_A, lora_B, codes, scale, residual, levels,
            m, n, 0 if lora_A is None else lora_A.shape[1], g, groups,
            LEVELS=len(levels), VALUES=VALUES[values or torch.float32], SCALES=VALUES[scales], **tile,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return codes, scale, residual


@triton.jit
def codebook_kernel(
    W_pointer,  # [B, m, n]
    lora_A_pointer,  # float32 [B, r, n] or None
    lora_B_pointer,  # float32 [B, m, r] or None
    codes_pointer,  # uint8 [B, m, n]
    scale_pointer,  # float32 [B, m, groups]
    residual_pointer,  # float32 [B, m, n] or None
    levels_pointer,  # float32 [LEVELS]
    m,
    n,
    r,
    g,
    groups,
    LEVELS: tl.constexpr,
    VALUES: tl.constexpr,
    SCALES: tl.constexpr,
    PIECES: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Quantize `ROWS` groups, one below the other."""
    row, column, in_rows, in_columns, group, matrix = place(m, n, g, groups, PIECES, ROWS, WIDTH)
    inside = spread(in_rows) & in_columns
    offsets = matrix * m * n + spread(row.to(tl.int64) * n) + column
    low_rank = 0.0
    if lora_A_pointer is not None:  # before the load, see `uniform`
        lora_A_pointer += matrix * r * n
        lora_B_pointer += matrix * m * r
        low_rank = product(lora_A_pointer, lora_B_pointer, m, n, r, g, group, row, PIECES, WIDTH)
    source = tl.load(W_pointer + offsets, mask=inside, other=0.0).to(tl.float32)
    w = source - low_rank
    scale = tl.max(tl.max(tl.abs(w), 1), 1).to(SCALES).to(tl.float32)
    # where bitsandbytes clamps, so that a block of zeros can be divided by it
    divisor = tl.maximum(scale, tl.full(scale.shape, 1e-38, tl.float32))
    x = w * spread(tl.math.div_rn(tl.full(scale.shape, 1.0, tl.float32), divisor))
    codes = tl.zeros(x.shape, tl.int32)  # bytes would be packed and unpacked all the time
    value = tl.zeros(x.shape, tl.float32) + tl.load(levels_pointer)
    for i in tl.static_range(LEVELS - 1):
        low, high = tl.load(levels_pointer + i), tl.load(levels_pointer + i + 1)
        above = x > (low + high) * 0.5
        codes = tl.where(above, i + 1, codes)
        value = tl.where(above, high, value)
    tl.store(codes_pointer + offsets, codes.to(tl.uint8), mask=inside)
    tl.store(scale_pointer + (matrix * m + row) * groups + group, scale, mask=in_rows)
    if residual_pointer is not None:
        value = (value * spread(scale)).to(VALUES).to(tl.float32)
        tl.store(residual_pointer + offsets, source - value, mask=inside)
