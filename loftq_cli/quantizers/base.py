"""What a quantizer is and what it returns. Shapes: m = out_features, n = in_features, g = group_size."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from loftq_cli.kernels import WIDEST_WITH_FEEDBACK, fused
from loftq_cli.quantizers.nested import NestedScale

# Weights per chunk. On a CPU a chunk's buffers should stay in the cache, where a pass over them costs 0.06 ns per
# weight rather than 0.2; on a GPU a chunk must be large enough to hide the launches.
CPU_CHUNK, GPU_CHUNK = 1 << 18, 1 << 24


@dataclass(frozen=True)
class QuantizedWeight:
    """One weight matrix in low-bit form: exactly the values that will be stored, before packing.

    Affine (`codebook is None`): `W ≈ (codes - zero_point) * scale`.
    Codebook: `W ≈ codebook[codes] * scale`.

    Shapes:
        codes: uint8 [m, n], each in 0 .. 2**bits - 1.
        scale: two-dimensional [m, ceil(n / g)] when groups run along the inputs of each output row (the last group
            of a row may be short), or one-dimensional [ceil(m * n / g)] when groups run along the flattened weight.
        zero_point: uint8, the shape of `scale`; None for codebook quantizers. Values 0 .. 2**bits - 1.
        codebook: float32 [2**bits] or None.

    `dtype` is what the dequantized values are rounded to on their way to the consumer: part of what is stored, so the
    error that is reported contains it.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    codebook: Tensor | None
    bits: int
    group_size: int
    shape: tuple[int, int]
    dtype: torch.dtype = torch.float32
    nested: NestedScale | None = None
    symmetric: bool = False  # zero_point is 2**(bits - 1) everywhere


class Quantizer(Protocol):
    """A quantizer is a frozen dataclass with these fields and this method; one row in `QUANTIZERS` adds it."""

    bits: int
    group_size: int
    dtype: torch.dtype

    def quantize(self, W: Tensor) -> QuantizedWeight:
        """Quantize `W` (float32 [m, n], finite, any device); deterministic, on the device of `W`."""
        ...

    def empty(self, m: int, n: int) -> QuantizedWeight:
        """The result of `quantize` for an [m, n] weight on the meta device: shapes and dtypes without values."""
        ...

    def codebook(self, device: torch.device) -> Tensor | None:
        """The levels, float32 [2**bits], ascending, kept for each device; None for a grid."""
        ...


def expand_groups(values: Tensor, shape: tuple[int, int], group_size: int) -> Tensor:
    """Repeat per-group `values` (see `QuantizedWeight.scale` for the two layouts) to one value per weight, [m, n]."""
    m, n = shape
    repeated = values.repeat_interleave(group_size, dim=-1)
    return repeated[..., : n if values.ndim == 2 else m * n].reshape(m, n)


def dequantize(quantized: QuantizedWeight) -> Tensor:
    """Return the weight that the stored form stands for, float32 [m, n], rounded to `quantized.dtype`."""
    q = quantized
    along = q.shape[1] if q.scale.ndim == 2 else q.codes.numel()
    whole = along % q.group_size == 0

    def spread(values: Tensor) -> Tensor:
        # [groups, 1] against [groups, g], so that nothing is repeated in memory; else a last group is short
        return values.reshape(-1, 1).float() if whole else expand_groups(values.float(), q.shape, q.group_size)

    codes = q.codes.reshape(-1, q.group_size) if whole else q.codes
    if q.codebook is not None:
        values = q.codebook[codes.int()]
    else:
        assert q.zero_point is not None
        values = codes.float().sub_(spread(q.zero_point))
    return values.mul_(spread(q.scale)).to(q.dtype).float().reshape(q.shape)


def residual(W: Tensor, quantized: QuantizedWeight) -> Tensor:
    """Return `W - dequantize(quantized)`, float32 [m, n], for `W` of any float dtype."""
    q = quantized
    m, n = q.shape
    kernels = fused() if W.is_cuda else None
    if kernels is not None:
        return kernels.residual(W, q.codes, q.scale, q.zero_point, q.codebook, q.group_size, q.dtype)
    result = torch.empty(q.shape, dtype=torch.float32, device=W.device)
    # in chunks of whole groups, so that temporaries stay small
    period = 1 if q.scale.ndim == 2 else q.group_size // math.gcd(q.group_size, n)
    step = max(1, (CPU_CHUNK if W.device.type == "cpu" else GPU_CHUNK) // (n * period)) * period
    for start in range(0, m, step):
        rows = slice(start, min(start + step, m))
        torch.sub(W[rows], dequantize(_rows(q, rows.start, rows.stop)), out=result[rows])
    return result


def quantize_residual(
    quantizer: Quantizer, W: Tensor, lora_A: Tensor | None = None, lora_B: Tensor | None = None
) -> tuple[QuantizedWeight, Tensor]:
    """Quantize `W - lora_B @ lora_A`; also return the residual `W - dequantize(quantized)`: a half of LoftQ's round.

    A batch is quantized as one tall weight, for groups never leave a row (see `stackable`). A quantizer with a method
    `fused_residual` of these arguments does all of it in one pass on CUDA, where that method does not return None.

    Args:
        quantizer: how.
        W: [B, m, n], any float dtype.
        lora_A: float32 [B, r, n], or None for no product.
        lora_B: float32 [B, m, r].

    Returns:
        The quantized [B * m, n], and the residual, float32 [B, m, n].
    """
    if W.is_cuda and hasattr(quantizer, "fused_residual"):
        done = quantizer.fused_residual(W, lora_A, lora_B)
        if done is not None:
            return done
    target = W if lora_A is None or lora_B is None else torch.baddbmm(W.float(), lora_B, lora_A, alpha=-1)
    n = W.shape[2]
    quantized = quantizer.quantize(target.reshape(-1, n))
    return quantized, residual(W.reshape(-1, n), quantized).view(W.shape)


def fitted(quantizer: Quantizer, W: Tensor) -> Quantizer:
    """The quantizer for the weight `W` [m, n], of any float dtype: of one with a method `fitted`, what that returns."""
    made: Quantizer = quantizer.fitted(W) if hasattr(quantizer, "fitted") else quantizer
    return made


def in_rows(quantizer: Quantizer, n: int) -> bool:
    """Whether groups of a weight of `n` inputs lie each in one row."""
    like = quantizer.empty(1, n)
    return like.scale.ndim == 2 or n % like.group_size == 0


def feedback_to_levels(
    columns: Tensor, codes: Tensor, scale: Tensor, feedback: Tensor, g: int | None, levels: Tensor, search: Any
) -> bool:
    """`methods.feedback.round_block` for a codebook in one kernel, on CUDA; False where there is none for it.

    `search` is what the kernel has from `shares` on. A short last group has other shares: it goes the other way.
    """
    k = len(columns)
    kernels = fused() if (g or k) <= WIDEST_WITH_FEEDBACK and k % (g or k) == 0 else None
    if kernels is None or kernels.feedback_to_levels is None:
        return False
    kernels.feedback_to_levels(columns, codes, scale, feedback, levels, g or k, g is not None, *search)
    return True


def stackable(quantizer: Quantizer, m: int, n: int) -> bool:
    """Whether weights [m, n] can be quantized one on top of the other, each to what it would become alone."""
    like = quantizer.empty(m, n)
    alike = like.nested is None and not hasattr(quantizer, "fitted")  # nothing is of the weight as a whole
    return alike and (like.scale.ndim == 2 or m * n % like.group_size == 0)


def unstack(quantized: QuantizedWeight, batch: int) -> list[QuantizedWeight]:
    """Take a quantized [batch * m, n] apart into its weights, as views."""
    if batch == 1:
        return [quantized]
    m = quantized.shape[0] // batch
    return [_rows(quantized, i * m, (i + 1) * m) for i in range(batch)]


def _rows(q: QuantizedWeight, start: int, stop: int) -> QuantizedWeight:
    """Some rows of a quantized weight, as views; they begin with a group."""
    n = q.shape[1]
    of_flat = slice(start * n // q.group_size, -(-stop * n // q.group_size))
    groups = slice(start, stop) if q.scale.ndim == 2 else of_flat
    return replace(
        q,
        codes=q.codes[start:stop],
        scale=q.scale[groups],
        zero_point=None if q.zero_point is None else q.zero_point[groups],
        shape=(stop - start, n),
    )
