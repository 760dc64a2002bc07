"""Scales that are themselves quantized to 8 bits ("double quantization", QLoRA, arXiv 2305.14314, section 3)."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from loftq_cli.kernels.packed import NESTED_BLOCK as NESTED_BLOCK


@dataclass(frozen=True)
class NestedScale:
    """Scales in 8 bits: `scale = codebook[codes] * absmax + offset`, with one `absmax` per 256 consecutive scales.

    Shapes: codes uint8 [k], absmax float32 [ceil(k / 256)], codebook float32 [256], offset float32 [].
    """

    codes: Tensor
    absmax: Tensor
    codebook: Tensor
    offset: Tensor


@functools.cache
def dynamic_codebook(device: torch.device | str = "cpu") -> Tensor:
    """Return the signed 8-bit "dynamic" levels that bitsandbytes stores scales with, float32 [256], ascending.

    Seven decades, each twice as finely divided as the one below it (8-bit optimizers, arXiv 2110.02861, section 2.1);
    asymmetric: 1 is a level, -1 is not.
    """
    levels = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        middles = 10 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)
        levels += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(levels), dtype=torch.float32, device=device)


def nest(scale: Tensor) -> NestedScale:
    """Quantize `scale` [k] about its mean, to 8 bits in blocks of 256."""
    offset = scale.mean()
    blocks = torch.nn.functional.pad(scale - offset, (0, -len(scale) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    absmax = blocks.abs().amax(1)
    x = (blocks * absmax.reciprocal()[:, None]).clamp_(-1, 1)
    # bitsandbytes looks a value up in a table of 65,536 steps, and takes the lowest code in a block of zeros. The steps
    # move about one code in 600, to its neighbour; the zeros dequantize to zero all the same.
    x = -1 + 2 * ((x + 1) * 0.5 * 65535 + 0.5).floor_() / 65535
    levels = dynamic_codebook(scale.device)
    codes = torch.bucketize(x, (levels[:-1] + levels[1:]) * 0.5).to(torch.uint8).where(absmax[:, None] > 0, 0)
    return NestedScale(codes.view(-1)[: len(scale)].clone(), absmax, levels, offset)


def unnest(nested: NestedScale) -> Tensor:
    """Invert `nest`, but for the rounding: float32 [k]."""
    k = len(nested.codes)
    return nested.codebook[nested.codes.int()] * nested.absmax.repeat_interleave(NESTED_BLOCK)[:k] + nested.offset


def empty_nested(k: int) -> NestedScale:
    """The result of `nest` for `k` scales, on the meta device."""

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    return NestedScale(meta(k, dtype=torch.uint8), meta(-(-k // NESTED_BLOCK)), meta(256), meta())
