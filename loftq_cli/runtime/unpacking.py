"""A packed weight, dense for as long as it is needed: by Triton's kernels on a GPU, else by torch.

Shapes: m = out_features, n = in_features, G = groups in a row.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from loftq_cli.kernels.packed import NESTED_BLOCK, Packed
from loftq_cli.quantizers.nested import NestedScale, unnest
from loftq_cli.quantizers.packing import unpack

CHUNK = {"cpu": 1 << 18, "cuda": 1 << 24}  # weights that torch unpacks at once
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Kernels(NamedTuple):
    """What `kernels.unpack` and `kernels.product` offer."""

    unpack_weight: Callable[[Packed, torch.dtype], Tensor]
    multiply: Callable[[Tensor, Packed, Tensor | None], Tensor]
    most_inputs: int


def dequantize(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The weight [m, n]: computed in float32, rounded to `dtype`."""
    kernels = fused(packed.codes.device) if dtype in KERNEL_DTYPES else None
    if kernels is None:
        return by_torch(packed, dtype)
    return kernels.unpack_weight(packed, dtype)


def multiply(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias` for `x` [..., n]; with few inputs, as in generation, no dense weight is made on a GPU."""
    n = packed.shape[1]
    inputs = x.numel() // n
    kernels = fused(x.device) if x.dtype in KERNEL_DTYPES else None
    fits = x.shape[-1] == n and x.device == packed.codes.device  # what does not is for torch to refuse
    if kernels is None or not fits or not 0 < inputs <= kernels.most_inputs:
        return torch.nn.functional.linear(x, dequantize(packed, x.dtype), bias)
    return kernels.multiply(x, packed, bias)


def by_torch(packed: Packed, dtype: torch.dtype) -> Tensor:
    """`dequantize` without a kernel, some rows at a time."""
    (m, n), bits = packed.shape, packed.bits
    result = torch.empty(m, n, dtype=dtype, device=packed.codes.device)
    if result.is_meta:
        return result
    scale, zero_point = scales(packed), zero_points(packed)
    step = max(1, CHUNK.get(result.device.type, CHUNK["cpu"]) // n)
    for start in range(0, m, step):
        rows = slice(start, start + step)
        result[rows] = _values(packed, unpack(packed.codes[rows], bits, n), scale[rows], zero_point[rows])
    return result


def rows_by_torch(packed: Packed, index: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows of `dequantize(packed, dtype)` that `index` [k] names, [k, n]; no others are unpacked."""
    n = packed.shape[1]
    result = torch.empty(len(index), n, dtype=dtype, device=packed.codes.device)
    if result.is_meta:
        return result
    step = max(1, CHUNK.get(result.device.type, CHUNK["cpu"]) // n)
    for start in range(0, len(index), step):
        some = index[start : start + step]
        codes = unpack(packed.codes.index_select(0, some), packed.bits, n)  # which refuses what is no row
        result[start : start + step] = _values(packed, codes, *_row_scales(packed, some))
    return result


def _values(packed: Packed, codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """What codes [rows, n] stand for, with the scales and zero points of their groups [rows, G]: float32."""
    g, n = packed.group_size, packed.shape[1]
    if packed.codebook is not None:
        values = packed.codebook.index_select(0, codes.view(-1).int()).view(codes.shape)
    else:
        values = codes.float().sub_(spread(zero_point, g, n))
    return values.mul_(spread(scale, g, n))


def _row_scales(packed: Packed, index: Tensor) -> tuple[Tensor, Tensor]:
    """The scales and zero points of some rows [k]: `scales(packed)[index]` and `zero_points(packed)[index]`."""
    scale, bits = packed.scale.index_select(0, index), packed.bits
    group = index[:, None].long() * scale.shape[1] + torch.arange(scale.shape[1], device=index.device)
    if packed.absmax is not None and packed.levels is not None and packed.offset is not None:
        scale = packed.levels[scale.int()] * packed.absmax[group // NESTED_BLOCK] + packed.offset
    if packed.zero_point is None:
        return scale.float(), zero_points(packed)[:1].expand(scale.shape)
    words, bit = packed.zero_point, group * bits  # codes of one stream, which may straddle two words
    low, high = (words[(bit // 32 + i).clamp_(max=len(words) - 1)].long() & 0xFFFFFFFF for i in (0, 1))
    return scale.float(), (((high << 32 | low) >> bit % 32) & (2**bits - 1)).float()


def scales(packed: Packed) -> Tensor:
    """The scale of each group, float32 [m, G]."""
    if packed.absmax is None or packed.levels is None or packed.offset is None:
        return packed.scale.float()
    return unnest(NestedScale(packed.scale.view(-1), packed.absmax, packed.levels, packed.offset)).view(
        packed.scale.shape
    )


def zero_points(packed: Packed) -> Tensor:
    """The zero point of each group, float32 [m, G]; of no meaning for a codebook."""
    if packed.zero_point is not None:
        return unpack(packed.zero_point[None], packed.bits, packed.scale.numel()).view(packed.scale.shape).float()
    return torch.full((1, 1), 2.0 ** (packed.bits - 1), device=packed.scale.device).expand(packed.scale.shape)


def spread(values: Tensor, g: int, n: int) -> Tensor:
    """Repeat values of groups [rows, G] for their weights, [rows, n]."""
    return values.repeat_interleave(g, dim=1)[:, :n]


@functools.cache
def fused(device: torch.device) -> Kernels | None:
    """The kernels for `device`, or None: on a CPU, an old GPU, or where Triton cannot compile."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        from loftq_cli.kernels.product import MOST_INPUTS, multiply
        from loftq_cli.kernels.unpack import unpack_weight

        codes = torch.zeros(1, 1, dtype=torch.int32, device=device)
        trial = Packed((1, 8), 2, 8, codes, codes.half(), codebook=codes.new_zeros(4, dtype=torch.float32))
        unpack_weight(trial, torch.float32)
        multiply(codes.new_zeros(1, 8, dtype=torch.float32), trial, None)
    except torch.OutOfMemoryError:  # which says nothing of the kernels
        raise
    except Exception as error:
        warnings.warn(f"torch unpacks the weights, which is slower, for the kernels do not run: {error}", stacklevel=2)
        return None
    return Kernels(unpack_weight, multiply, MOST_INPUTS)
