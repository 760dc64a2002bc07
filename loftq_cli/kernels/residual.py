"""`W` minus the dequantized weight in one pass. Its torch twin is `quantizers.base.dequantize`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loftq_cli.kernels.tiles import VALUES

ROWS, COLUMNS = 4, 1024  # of one program


def residual(
    W: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    codebook: Tensor | None,
    g: int,
    values: torch.dtype,
) -> Tensor:
    """Return `W` [m, n] (any float dtype, on CUDA) − the dequantized weight, float32; see `QuantizedWeight`."""
    m, n = W.shape
    W, codes, scale = W.contiguous(), codes.contiguous(), scale.contiguous()
    zero_point = None if zero_point is None else zero_point.contiguous()
    result = torch.empty_like(W, dtype=torch.float32)
    blocks = triton.cdiv(n, COLUMNS)
    with torch.cuda.device_of(W):
        residual_kernel[(blocks * triton.cdiv(m, ROWS),)](
            W, codes, scale, zero_point, codebook, result, m, n, triton.cdiv(n, g), blocks,
            G=g, FLAT=scale.ndim == 1 and n % g != 0, VALUES=VALUES[values], ROWS=ROWS, COLUMNS=COLUMNS,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return result


@triton.jit
def residual_kernel(
    W_pointer,  # [m, n]
    codes_pointer,  # uint8 [m, n]
    scale_pointer,  # [m, groups], or one for each G of the flattened weight
    zero_point_pointer,  # uint8, like the scale; None for a codebook
    codebook_pointer,  # float32 [levels] or None
    residual_pointer,  # float32 [m, n]
    m,
    n,
    groups,
    blocks,
    G: tl.constexpr,
    FLAT: tl.constexpr,  # groups may span rows
    VALUES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile of the residual."""
    row = (tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < m) & (column < n)
    offsets = row * n + column
    of_group = offsets // G if FLAT else row * groups + column // G
    codes = tl.load(codes_pointer + offsets, mask=inside, other=0)
    if codebook_pointer is not None:
        value = tl.load(codebook_pointer + codes.to(tl.int32), mask=inside, other=0.0)
    else:
        value = codes.to(tl.float32) - tl.load(zero_point_pointer + of_group, mask=inside, other=0).to(tl.float32)
    value *= tl.load(scale_pointer + of_group, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(W_pointer + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(residual_pointer + offsets, w - value.to(VALUES).to(tl.float32), mask=inside)
