"""NormalFloat: a codebook of normal quantiles and the largest magnitude of each block (QLoRA, arXiv 2305.14314).

The published baseline, never searched: codes and scales are those of bitsandbytes, byte for byte. Blocks run along the
flattened weight, so that a block may span two rows.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loftq_cli.kernels import WIDEST, WIDEST_WITH_PRODUCT, fused
from loftq_cli.quantizers.base import CPU_CHUNK, GPU_CHUNK, QuantizedWeight, feedback_to_levels, residual
from loftq_cli.quantizers.nested import NestedScale, empty_nested, nest, unnest

OFFSET = 0.9677083  # the outermost quantile, of QLoRA and LoftQ
SMALLEST_ABSMAX = 1e-38  # where bitsandbytes clamps, so that a block of zeros can be divided by it

# NF4 as bitsandbytes has it: the construction below differs from it by rounding, up to 1e-7.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class NormalFloat:
    """NF2, NF3 or NF4 with a scale per block.

    Args:
        bits: 2, 3 or 4.
        group_size: weights per block; -1 for a row's length.
        dtype: what the dequantized values are rounded to.
        double_quant: also quantize the scales, to 8 bits (`compress_statistics=True` of bitsandbytes).
        scale_dtype: what scales are rounded to before codes are chosen, where a format keeps fewer bits than float32.
    """

    bits: int
    group_size: int = 64
    dtype: torch.dtype = torch.float32
    double_quant: bool = False
    scale_dtype: torch.dtype = torch.float32

    supported_bits: ClassVar[tuple[int, ...]] = (2, 3, 4)

    def quantize(self, W: Tensor) -> QuantizedWeight:
        """Quantize `W` [m, n]: the level nearest to `W / absmax`, the lower one in a tie."""
        m, n = W.shape
        done = self._fused(W[None], None, None, None) if W.is_cuda else None
        codes, scale = (
            _blockwise(W.reshape(-1), self.bits, self._block(n), self.scale_dtype) if done is None else done[:2]
        )
        return self._nested(codes.view(m, n), scale)

    def fused_residual(
        self, W: Tensor, lora_A: Tensor | None, lora_B: Tensor | None
    ) -> tuple[QuantizedWeight, Tensor] | None:
        """`quantize_residual` in one kernel, on CUDA; None where there is none for it."""
        done = self._fused(W, lora_A, lora_B, None if self.double_quant else self.dtype)
        if done is None:
            return None
        codes, scale, difference = done
        quantized = self._nested(codes, scale)
        if difference is None:  # the scales changed after the fact
            difference = residual(W.reshape(codes.shape), quantized).view(W.shape)
        return quantized, difference

    def _fused(
        self, W: Tensor, lora_A: Tensor | None, lora_B: Tensor | None, values: torch.dtype | None
    ) -> tuple[Tensor, Tensor, Tensor | None] | None:
        n = W.shape[2]
        g = self._block(n)
        widest = WIDEST if lora_A is None else WIDEST_WITH_PRODUCT
        kernels = fused() if n % g == 0 and g <= widest else None
        if kernels is None:
            return None
        levels = normal_float_codebook(self.bits, W.device)
        return kernels.codebook(W, lora_A, lora_B, levels, g, values, self.scale_dtype)

    def empty(self, m: int, n: int) -> QuantizedWeight:
        """The result of `quantize` for an [m, n] weight, on the meta device."""
        blocks = -(-m * n // self._block(n))

        def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        nested = empty_nested(blocks) if self.double_quant else None
        return self._result(meta(m, n, dtype=torch.uint8), meta(blocks), nested)

    def codebook(self, device: torch.device) -> Tensor:
        """NF2, NF3 or NF4."""
        return normal_float_codebook(self.bits, device)

    def fused_feedback(
        self, columns: Tensor, codes: Tensor, scale: Tensor, zero_point: None, feedback: Tensor, g: int | None
    ) -> bool:
        """`methods.feedback.round_block` in one kernel, on CUDA; False, with nothing done, where there is none."""
        search: tuple[list[float], int, torch.dtype, torch.dtype] = [], 0, self.scale_dtype, self.dtype
        return feedback_to_levels(columns, codes, scale, feedback, g, self.codebook(columns.device), search)

    def _block(self, n: int) -> int:
        return n if self.group_size == -1 else self.group_size

    def _nested(self, codes: Tensor, scale: Tensor) -> QuantizedWeight:
        """The result, its scales quantized too if they are to be."""
        if not self.double_quant:
            return self._result(codes, scale, None)
        nested = nest(scale)
        return self._result(codes, unnest(nested), nested)

    def _result(self, codes: Tensor, scale: Tensor, nested: NestedScale | None) -> QuantizedWeight:
        m, n = codes.shape
        return QuantizedWeight(
            codes=codes,
            scale=scale,
            zero_point=None,
            codebook=normal_float_codebook(self.bits, codes.device),
            bits=self.bits,
            group_size=self._block(n),
            shape=(m, n),
            dtype=self.dtype,
            nested=nested,
        )


@functools.cache  # for a copy to a GPU waits for it
def normal_float_codebook(bits: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the levels of NF2, NF3 or NF4, float32 [2**bits], ascending from -1 to 1.

    Normal quantiles at even steps of probability, one more of them above zero than below, and zero itself
    (LoftQ, arXiv 2310.08659, section 3.1; `create_normal_map` in its code).
    """
    return (torch.tensor(NF4, dtype=torch.float32) if bits == 4 else construct_codebook(bits)).to(device)


def construct_codebook(bits: int) -> Tensor:
    """Compute the levels of `normal_float_codebook`."""
    half = 2 ** (bits - 1)
    above, below = (torch.linspace(OFFSET, 0.5, k, dtype=torch.float64)[:-1] for k in (half + 1, half))
    levels = torch.cat(
        [-torch.special.ndtri(below), torch.zeros(1, dtype=torch.float64), torch.special.ndtri(above).flip(0)]
    )
    return (levels / levels.max()).float()


def _blockwise(flat: Tensor, bits: int, g: int, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return codes uint8 [k] and the largest magnitude of each block of `flat` [k], float32 [ceil(k / g)].

    The magnitudes are rounded to `scale_dtype`, and the codes chosen with them so.
    """
    k, device = flat.numel(), flat.device
    codes = torch.empty(k, dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-k // g), dtype=torch.float32, device=device)
    levels = normal_float_codebook(bits)
    middles = ((levels[:-1] + levels[1:]) / 2).tolist()

    def nearest(x: Tensor) -> Tensor:
        # One vectorized comparison per level, five times as fast on a CPU as torch.bucketize.
        above, total = torch.empty_like(x), torch.zeros_like(x)
        for middle in middles:
            total += torch.gt(x, middle, out=above)
        return total

    blocks = k // g  # full ones
    step = max(1, (CPU_CHUNK if device.type == "cpu" else GPU_CHUNK) // g)
    for start in range(0, blocks, step):
        stop = min(start + step, blocks)
        w = flat[start * g : stop * g].float().view(-1, g)
        absmax[start:stop] = w.abs().amax(1).to(scale_dtype)
        w = w * absmax[start:stop].clamp_min(SMALLEST_ABSMAX).reciprocal()[:, None]
        codes[start * g : stop * g] = nearest(w).view(-1)
    if blocks * g < k:  # the short last block, which bitsandbytes divides instead of multiplying
        w = flat[blocks * g :].float()
        absmax[-1] = w.abs().amax().clamp_min(SMALLEST_ABSMAX).to(scale_dtype)
        codes[blocks * g :] = nearest(w / absmax[-1].clamp_min(SMALLEST_ABSMAX))
    return codes, absmax
