"""A codebook and a searched scale: NormalFloat's levels, and those of least squared error (Lloyd, 1982).

Shapes: m = out_features, n = in_features, g = group_size, G = groups in flight.

Scales may be negative, which turns the codebook around: of an asymmetric codebook each group takes the better of two,
for the sign bit that a float16 scale has anyway. The levels of `lloyd` are fitted with that in mind, and gain 5 to 7 %
of the error by it.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from loftq_cli.quantizers.base import CPU_CHUNK, GPU_CHUNK, QuantizedWeight, feedback_to_levels
from loftq_cli.quantizers.nested import empty_nested, nest, unnest
from loftq_cli.quantizers.normal_float import normal_float_codebook

# What Lloyd's algorithm finds for Gaussian groups of 64.
LLOYD = {
    2: (-0.7637, -0.1678, 0.3475, 1.0),
    3: (-0.8038, -0.4897, -0.2563, -0.0525, 0.1444, 0.3553, 0.61, 1.0),
    4: (
        -0.9096, -0.7075, -0.5544, -0.4266, -0.3141, -0.2122, -0.1171, -0.0261,
        0.0635, 0.1532, 0.2449, 0.3422, 0.4509, 0.5784, 0.7405, 1.0,
    ),
}  # fmt: skip

SHARES = (1.1, 0.95, 0.8, 0.65, 0.5)  # of the largest magnitude, tried as scales
REFINEMENTS = 2  # least-squares steps from the best of them


@dataclass(frozen=True)
class SearchedCodebook(ABC):
    """What the quantizers below share: a scale of least squared error per group of consecutive inputs of a row.

    Args:
        bits: 2, 3 or 4.
        group_size: inputs that share a scale; -1 for a whole row (`QuantizedWeight.group_size` is then n).
        dtype: what the dequantized values are rounded to.
        double_quant: also quantize the float16 scales, to 8 bits, and choose the codes after that.
    """

    bits: int
    group_size: int
    dtype: torch.dtype = torch.float32
    double_quant: bool = False
    supported_bits: ClassVar[tuple[int, ...]] = (2, 3, 4)

    @abstractmethod
    def levels(self) -> Sequence[float]:
        """The codebook, ascending."""

    def quantize(self, W: Tensor) -> QuantizedWeight:
        """Quantize `W` [m, n]. A group whose scale is beyond fp16 dequantizes to inf or NaN, never to a silent clip."""
        result, nested = self._allocate(W.shape[0], W.shape[1], W.device), None
        g, levels = result.group_size, self.levels()
        for rows, _, groups, w in pieces(W, g):
            scale = result.scale[rows, groups]
            scale.copy_(search(w, levels).view(scale.shape))
        if self.double_quant:
            nested = nest(result.scale.view(-1))
            result.scale.view(-1).copy_(unnest(nested))
        for rows, columns, groups, w in pieces(W, g):
            codes = result.codes[rows, columns]
            codes.copy_(encode(w, result.scale[rows, groups].reshape(-1), levels).view(codes.shape))
        return replace(result, codebook=self.codebook(W.device), nested=nested)

    def empty(self, m: int, n: int) -> QuantizedWeight:
        """The result of `quantize` for an [m, n] weight, on the meta device."""
        return self._allocate(m, n, torch.device("meta"))

    def codebook(self, device: torch.device) -> Tensor:
        """The levels, float32 [2**bits]."""
        return _on_device(tuple(self.levels()), device)

    def fused_feedback(
        self, columns: Tensor, codes: Tensor, scale: Tensor, zero_point: None, feedback: Tensor, g: int | None
    ) -> bool:
        """`methods.feedback.round_block` in one kernel, on CUDA; False, with nothing done, where there is none."""
        signed = [sign * share for share in shares_of(g or len(columns)) for sign in (1, -1)]
        search = signed, REFINEMENTS, torch.float16, self.dtype
        return feedback_to_levels(columns, codes, scale, feedback, g, self.codebook(columns.device), search)

    def _allocate(self, m: int, n: int, device: torch.device) -> QuantizedWeight:
        g = n if self.group_size == -1 else self.group_size
        groups = -(-n // g)
        scale_dtype = torch.float32 if self.double_quant else torch.float16
        return QuantizedWeight(
            codes=torch.empty(m, n, dtype=torch.uint8, device=device),
            scale=torch.empty(m, groups, dtype=scale_dtype, device=device),
            zero_point=None,
            codebook=torch.empty(2**self.bits, dtype=torch.float32, device=device),
            bits=self.bits,
            group_size=g,
            shape=(m, n),
            dtype=self.dtype,
            nested=empty_nested(m * groups) if self.double_quant else None,
        )


@dataclass(frozen=True)
class NormalFloatSearch(SearchedCodebook):
    """The levels of NormalFloat, with a searched scale in place of the largest magnitude."""

    def levels(self) -> Sequence[float]:
        """NF2, NF3 or NF4."""
        levels: list[float] = normal_float_codebook(self.bits).tolist()
        return levels


@dataclass(frozen=True)
class Lloyd(SearchedCodebook):
    """The levels of least squared error for Gaussian weights."""

    def levels(self) -> Sequence[float]:
        """Constants."""
        return LLOYD[self.bits]


@functools.cache  # for a copy to a GPU waits for it
def _on_device(levels: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(levels, dtype=torch.float32, device=device)


def search(w: Tensor, levels: Sequence[float]) -> Tensor:
    """Find the scale of least squared error for each row of `w` [G, g]; float16 [G].

    `kernels.feedback` repeats it, for CUDA: a change here is a change there.

    Of the codes that a scale leads to, with the values `v`, the best scale is `<w, v> / <v, v>`, and it takes
    `<w, v>² / <v, v>` off the squared error. So shares of the largest magnitude, of either sign, are judged by that,
    and then, twice, the codes of the best scale so far.
    """
    v, scratch = torch.empty_like(w), torch.empty_like(w)
    largest = w.abs().amax(1)
    best, gain = largest, torch.zeros_like(largest)  # what rows of zeros keep, and rows that are not finite

    def judge(scale: Tensor) -> None:
        nonlocal best, gain
        _nearest(w, scale, levels, levels, v, scratch)
        product = torch.mul(w, v, out=scratch).sum(1)
        optimum = product / v.square_().sum(1)
        better = product * optimum > gain
        best, gain = torch.where(better, optimum, best), torch.where(better, product * optimum, gain)

    for share in shares_of(w.shape[1]):
        judge(largest * share)
        judge(largest * -share)
    for _ in range(REFINEMENTS):
        judge(best)
    return best.half()


def shares_of(g: int) -> list[float]:
    """What is tried for groups of `g`."""
    shares = list(SHARES)
    while shares[-1] > 2 / g**0.5:  # an outlier of √g standard deviations can still be clipped
        shares.append(shares[-1] * 0.7)
    return shares


def encode(w: Tensor, scale: Tensor, levels: Sequence[float]) -> Tensor:
    """The code of the level nearest to each weight of `w` [G, g] over its row's `scale` [G]; uint8 [G, g]."""
    codes, scratch = torch.empty_like(w), torch.empty_like(w)
    _nearest(w, scale.float(), levels, range(len(levels)), codes, scratch)
    return codes.to(torch.uint8)


def _nearest(
    w: Tensor, scale: Tensor, levels: Sequence[float], values: Sequence[float], out: Tensor, scratch: Tensor
) -> None:
    """Write into `out` [G, g] the one of `values` that belongs to the level nearest to `w / scale`.

    One vectorized comparison per level, which on a CPU is five times as fast as torch.bucketize.
    """
    x = w * scale.reciprocal()[:, None]
    out.fill_(values[0])
    for i in range(len(levels) - 1):
        middle = (levels[i] + levels[i + 1]) / 2
        out.add_(torch.gt(x, middle, out=scratch), alpha=values[i + 1] - values[i])


def pieces(W: Tensor, g: int) -> Iterator[tuple[slice, slice, slice, Tensor]]:
    """Rows, columns and groups of what is computed at once, and its groups, float32 [G, g]: a short last one apart."""
    m, n = W.shape
    whole = n // g * g
    step = max(1, (CPU_CHUNK if W.device.type == "cpu" else GPU_CHUNK) // n)
    for start in range(0, m, step):
        rows = slice(start, start + step)
        if whole:
            yield rows, slice(0, whole), slice(0, whole // g), W[rows, :whole].float().reshape(-1, g)
        if whole < n:
            yield rows, slice(whole, n), slice(whole // g, whole // g + 1), W[rows, whole:].float().contiguous()
