"""Uniform grids: `W ≈ (codes - zero_point) * scale` with a clip range searched for least squared error.

Shapes: m = out_features, n = in_features, g = group_size, G = groups in flight (rows of a chunk * groups of a row).

What the search costs and gains, measured on two cores: squared error ÷ energy of Gaussian groups of 64 at 2, 3, 4 bits
is 0.1232, 0.0309, 0.0076 against 0.209, 0.038, 0.0083 of min-max, within 0.5 % (8 bits: 3 %) of trying every zero
point with 240 scales; 106 M weights take about 2.3 s. Half as many candidates would take half the time and lose
another 0.1 %, 0.4 %, 1.6 %.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loftq_cli.kernels import WIDEST, WIDEST_WITH_FEEDBACK, WIDEST_WITH_PRODUCT, fused
from loftq_cli.quantizers.base import CPU_CHUNK, GPU_CHUNK, QuantizedWeight

SMALLEST_SCALE = 2.0**-24  # the smallest positive fp16 number

LOWEST_SHARE = {2: 0.35, 3: 0.4, 4: 0.55, 8: 0.9}  # of the covering scale, that 64 Gaussian weights may want
TIE = 1 + 1e-5  # an error must be smaller by this to count, so that the last bit of a sum decides nothing
FINE_STEP = 0.02  # of the last, local round, relative to the scale


@dataclass(frozen=True)
class Uniform:
    """Affine grid: an fp16 scale and an integer zero point per group of consecutive inputs of a row.

    Args:
        bits: 2, 3, 4 or 8.
        group_size: inputs that share a scale; -1 for a whole row (`QuantizedWeight.group_size` is then n).
        dtype: what the dequantized values are rounded to.
    """

    bits: int
    group_size: int
    dtype: torch.dtype = torch.float32
    supported_bits: ClassVar[tuple[int, ...]] = (2, 3, 4, 8)
    symmetric: ClassVar[bool] = False

    def quantize(self, W: Tensor) -> QuantizedWeight:
        """Quantize `W` [m, n]. A group whose scale is beyond fp16 dequantizes to inf or NaN, never to a silent clip."""
        m, n = W.shape
        if W.is_cuda:
            done = self._fused(W[None], None, None, None)
            if done is not None:
                return done[0]
        result = self._allocate(m, n, W.device)
        assert result.zero_point is not None
        g, groups = result.group_size, result.scale.shape[1]
        rows = max(1, (CPU_CHUNK if W.device.type == "cpu" else GPU_CHUNK) // n)
        for start in range(0, m, rows):
            chunk = slice(start, start + rows)
            # Padding with zeros cannot move a result: zero lies on every grid, so it costs no error, and it adds
            # nothing to the two sums of the least-squares scale.
            w = torch.nn.functional.pad(W[chunk].float(), (0, groups * g - n)).reshape(-1, g)
            codes, scale, zero_point = search(w, self.bits, self.symmetric)
            result.codes[chunk] = codes.view(-1, groups * g)[:, :n]
            result.scale[chunk] = scale.view(-1, groups)
            result.zero_point[chunk] = zero_point.view(-1, groups)
        return result

    def empty(self, m: int, n: int) -> QuantizedWeight:
        """The result of `quantize` for an [m, n] weight, on the meta device."""
        return self._allocate(m, n, torch.device("meta"))

    def codebook(self, device: torch.device) -> None:
        """None."""

    def fused_residual(
        self, W: Tensor, lora_A: Tensor | None, lora_B: Tensor | None
    ) -> tuple[QuantizedWeight, Tensor] | None:
        """`quantize_residual` in one kernel, on CUDA; None where there is none for it."""
        return self._fused(W, lora_A, lora_B, self.dtype)

    def fused_feedback(
        self, columns: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor, feedback: Tensor, g: int | None
    ) -> bool:
        """`methods.feedback.round_block` in one kernel, on CUDA; False, with nothing done, where there is none."""
        width = g or len(columns)
        kernels = fused() if width <= WIDEST_WITH_FEEDBACK else None
        if kernels is None or kernels.feedback is None:
            return False
        constants = self._constants(width, coarse_shares(self.bits, g) if g else [])
        kernels.feedback(columns, codes, scale, zero_point, feedback, *constants, self.dtype)
        return True

    def _fused(
        self, W: Tensor, lora_A: Tensor | None, lora_B: Tensor | None, values: torch.dtype | None
    ) -> tuple[QuantizedWeight, Tensor] | None:
        n = W.shape[2]
        g = n if self.group_size == -1 else self.group_size
        kernels = fused() if g <= (WIDEST if lora_A is None else WIDEST_WITH_PRODUCT) else None
        if kernels is None:
            return None
        constants = self._constants(g, coarse_shares(self.bits, g))
        codes, scale, zero_point, residual = kernels.uniform(W, lora_A, lora_B, *constants, values)
        return self._result(codes, scale, zero_point, g), residual

    def _constants(
        self, g: int, shares: list[float]
    ) -> tuple[int, bool, int, list[float], int, float, tuple[float, float]]:
        """The kernels' arguments from `bits` to `factors`."""
        full_shares = sum(share >= LOWEST_SHARE[self.bits] for share in shares)
        return self.bits, self.symmetric, g, shares, full_shares, TIE, (1 - FINE_STEP, 1 + FINE_STEP)

    def _allocate(self, m: int, n: int, device: torch.device) -> QuantizedWeight:
        g = n if self.group_size == -1 else self.group_size
        groups = -(-n // g)
        return self._result(
            torch.empty(m, n, dtype=torch.uint8, device=device),
            torch.empty(m, groups, dtype=torch.float16, device=device),
            torch.empty(m, groups, dtype=torch.uint8, device=device),
            g,
        )

    def _result(self, codes: Tensor, scale: Tensor, zero_point: Tensor, g: int) -> QuantizedWeight:
        return QuantizedWeight(
            codes=codes,
            scale=scale,
            zero_point=zero_point,
            codebook=None,
            bits=self.bits,
            group_size=g,
            shape=(codes.shape[0], codes.shape[1]),
            dtype=self.dtype,
            symmetric=self.symmetric,
        )


@dataclass(frozen=True)
class UniformSymmetric(Uniform):
    """Grid with the zero point fixed at 2**(bits - 1), so that a format need store scales only.

    The grid is one step longer below zero than above it; a negative scale turns the longer side to where the group
    needs it (as llama.cpp's Q4_0 does), which saves a seventh of the error.
    """

    symmetric: ClassVar[bool] = True


def search(w: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Find the fp16 scale and the zero point of least squared error for each row of `w` [G, g].

    Three rounds, each keeping the best per group as judged with the scale that will be stored: shares of the covering
    scale; finer steps around the best, with its neighbouring zero points; the least-squares scale
    `<w, c> / <c, c>` of the codes `c` so found, twice.

    `kernels.uniform` is this function, fused, for CUDA: a change here is a change there.

    Returns codes [G, g], scale [G] and zero_point [G], all float32.
    """
    top = 2**bits - 1
    u, v = torch.empty_like(w), torch.empty_like(w)  # scratch space, so that a chunk stays in the cache

    def codes(scale: Tensor, zero_point: Tensor) -> Tensor:
        # u: the weights in units of the grid. (addcmul would save a pass, but with these shapes it is not vectorized.)
        torch.mul(w, scale.reciprocal()[:, None], out=u).add_(zero_point[:, None])
        return torch.round(u, out=v).clamp_(0, top)

    def best(candidates: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        scale, zero_point, least = None, None, None
        for next_scale, next_zero_point in candidates:
            next_scale = _round_to_fp16(next_scale)
            error = torch.linalg.vector_norm(codes(next_scale, next_zero_point).sub_(u), dim=1).mul_(next_scale.abs())
            if scale is None or zero_point is None or least is None:
                scale, zero_point, least = next_scale, next_zero_point, error
                continue
            # An infinite scale makes a NaN. In the first candidate, which needs no clipping, it means that fp16 cannot
            # hold the scale of this group: no comparison with NaN is true, and the first candidate stays.
            better = error * TIE < least
            scale = torch.where(better, next_scale, scale)
            zero_point = torch.where(better, next_zero_point, zero_point)
            least = torch.where(better, error, least)
        assert scale is not None
        assert zero_point is not None
        return scale, zero_point

    def least_squares(scale: Tensor, zero_point: Tensor) -> Tensor:
        c = codes(scale, zero_point).sub_(zero_point[:, None])
        return _round_to_fp16(torch.mul(w, c, out=u).sum(1) / c.square_().sum(1).clamp_min_(1))

    scale, zero_point = best(_coarse(w, bits, symmetric))
    fine = [(scale * factor, (zero_point + step).clamp_(0, top)) for factor, step in fine_moves(symmetric)]
    scale, zero_point = best(iter(fine))
    once = least_squares(scale, zero_point)
    twice = least_squares(once, zero_point)
    scale, zero_point = best((candidate, zero_point) for candidate in (scale, once, twice))
    return codes(scale, zero_point), scale, zero_point


def fine_moves(symmetric: bool) -> list[tuple[float, int]]:
    """Return the second round's factors of the scale and steps of the zero point."""
    steps = (0,) if symmetric else (-1, 0, 1)
    return [(1.0, 0), *((1 + move, step) for move in (-FINE_STEP, FINE_STEP) for step in steps)]


def coarse_shares(bits: int, g: int) -> list[float]:
    """Return the first round's shares of the covering scale, down to where clipping costs more than it gains."""
    lowest = LOWEST_SHARE[bits]
    shares = [1 - i * (1 - lowest) / 8 for i in range(9)]
    while shares[-1] > lowest * 12 / g**0.5:  # an outlier of √g standard deviations can still be clipped
        shares.append(shares[-1] * 0.85)
    return shares


def _coarse(w: Tensor, bits: int, symmetric: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield candidates: scale and zero_point [G]. Min-max is among them, so it cannot win.

    The affine zero point lies where min-max has it, rounded either way; where a long group is clipped far
    beyond what 64 weights would want, the few weights that set the range no longer say where its middle is.
    """
    low, high = w.amin(1).clamp_max_(0), w.amax(1).clamp_min_(0)
    top, half = 2**bits - 1, 2 ** (bits - 1)
    shares = coarse_shares(bits, w.shape[1])
    if symmetric:
        middle = torch.full_like(low, half)
        upward = torch.maximum(high / (half - 1), -low / half)
        downward = -torch.maximum(high / half, -low / (half - 1))
        for share in shares:
            yield upward * share, middle
            yield downward * share, middle
    else:
        scale = _round_to_fp16((high - low) / top)
        exact = (-low / scale).clamp_(0, top)
        zero_points = (exact.floor(), exact.ceil(), exact.round().clamp_(half - 1, half))
        for share in shares:
            for zero_point in zero_points[: 2 if share >= LOWEST_SHARE[bits] else 3]:
                yield scale * share, zero_point


def _round_to_fp16(scale: Tensor) -> Tensor:
    """Round to what will be stored, but never to zero: a group of zeros needs a scale too."""
    rounded = scale.half().float()
    return torch.where(rounded.abs() < SMALLEST_SCALE, SMALLEST_SCALE, rounded)
