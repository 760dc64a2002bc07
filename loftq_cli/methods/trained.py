"""A quantized weight with its factors while they are trained.

Shapes: m = out_features, n = in_features, g = group_size, G = groups of a row, r = rank.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from loftq_cli.kernels import fused
from loftq_cli.lowrank import LowRankFactors
from loftq_cli.methods.base import Decomposition
from loftq_cli.methods.levels import NEAREST, Levels, through
from loftq_cli.quantizers.nested import nest, unnest

CLIP_START = 4.0  # of ApiQ's clip factors before the sigmoid: 0.982 of a group's range
SMALLEST_SCALE = 2.0**-24  # the smallest positive fp16 number


class TrainedWeight(nn.Module):
    """Ŵ = dequantize(Q) + scaling · lora_B @ lora_A, differentiable in the factors and in what makes Q.

    Without `clip` a group's scale trains, as its start times the exponential of a number that starts at 0. With
    `codes`, so do the codes: each is a real number, in steps of the grid or in mean distances between the levels of a
    codebook, that is rounded to make Q (as the weights themselves in EfficientQAT, arXiv 2407.11062). It starts where
    the weight without its adapter lies between two codes, and moves freely from there.

    With `clip` it is ApiQ's learnable clipping (arXiv 2402.05147; it is OmniQuant's, arXiv 2308.13137): a group's
    range, shrunk by sigmoids of two trained numbers, decides scale, zero point and codes anew in each step. A symmetric
    grid has no two ends, nor has a codebook: there its scale trains, and decides the codes.

    Gradients pass straight through rounding. Scales are rounded to float16, or quantized as they are in the start, and
    values to the dtype of the loaded model in every step: what trains is what will be stored.

    Args:
        W: the weight that is quantized, float [m, n].
        start: its decomposition, of this one weight; groups lie in one row each.
        scaling: LoRA's; factors train as they are stored, as in ApiQ, and in fine-tuning later on.
        clip: see above.
        codes: see above; not with `clip`.
    """

    def __init__(self, W: Tensor, start: Decomposition, scaling: float, *, clip: bool, codes: bool) -> None:
        super().__init__()
        q = start.quantized
        self._start, self._scaling, self._clip = start, scaling, clip
        self._spare = -q.shape[1] % q.group_size  # the last group of a row may be short: it is filled up with zeros
        self._scales = q.scale.float().view(len(q.codes), -1)
        self._top = 2**q.bits - 1
        self._zero_point = None if q.zero_point is None else q.zero_point.float()
        self._levels = None if q.codebook is None else Levels(q.codebook)
        self.lora_A = nn.Parameter(start.factors.lora_A[0].clone())
        self.lora_B = nn.Parameter(start.factors.lora_B[0] / scaling)
        self.codes: nn.Parameter | None = None
        if clip:
            self._values = self._grouped(W.float())
            # a range that the zero point, which is one of the codes, can be in
            self._low, self._high = self._values.amin(2).clamp_max_(0), self._values.amax(2).clamp_min_(0)
        else:
            if self._levels is not None:
                centred = self._levels.values[self._grouped(q.codes).int()]
            else:
                assert self._zero_point is not None
                # bfloat16 holds integers up to 256
                centred = self._grouped(q.codes.bfloat16()) - self._zero_point[..., None].bfloat16()
            if codes:
                steps = self._grouped(W.float() - start.factors.product()[0]) / _divisor(self._scales)
                if self._levels is not None:
                    real = self._levels.near(steps, self._grouped(q.codes)) / self._levels.step
                else:
                    real = centred + (steps - centred).clamp(-NEAREST, NEAREST)
                self.codes = nn.Parameter(real)
            else:
                self._centred = centred
        ends = 2 if clip and not q.symmetric and self._levels is None else 1
        begin = CLIP_START if ends == 2 else 0.0
        self.grid = nn.Parameter(torch.full((ends, *self._scales.shape), begin, device=W.device))

    def forward(self) -> Tensor:
        """Return Ŵ, float32 [m, n]."""
        return torch.addmm(self.base(), self.lora_B, self.lora_A, alpha=self._scaling)

    def base(self) -> Tensor:
        """Return dequantize(Q), float32 [m, n]."""
        if self.codes is not None and self.codes.is_cuda and (kernels := fused()) is not None:
            return self._ungrouped(self._fused(kernels.rounded))
        centred, scale, _ = self._made()
        return self._ungrouped((centred * scale[..., None]).to(self._start.quantized.dtype).float())

    def decomposition(self) -> Decomposition:
        """What it has become."""
        with torch.no_grad():
            q = self._start.quantized
            centred, scale, zero_point = self._made()
            if self._levels is not None:
                codes = self._levels.codes(centred)
            else:
                assert zero_point is not None
                codes = centred + zero_point[..., None]
            q = replace(
                q,
                codes=self._ungrouped(codes).to(torch.uint8).contiguous(),
                scale=scale.to(q.scale.dtype).view(q.scale.shape),
                zero_point=None if zero_point is None else zero_point.to(torch.uint8),
                nested=None if q.nested is None else nest(self._trained_scales().view(-1)),
            )
            lora_A, lora_B = self.lora_A.detach()[None], self.lora_B.detach()[None] * self._scaling
            energy = torch.bmm(lora_B.mT, lora_B).double().mul_(torch.bmm(lora_A, lora_A.mT)).sum((1, 2))
            factors = LowRankFactors(lora_A, lora_B, energy)
            return replace(self._start, quantized=q, factors=factors, iterations=self._start.iterations.clamp_min(1))

    def _grouped(self, x: Tensor) -> Tensor:
        return pad(x, (0, self._spare)).unflatten(1, (-1, self._start.quantized.group_size))

    def _ungrouped(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, : self._start.quantized.shape[1]] if self._spare else x.flatten(1)

    def _fused(self, kernels: Any) -> Tensor:
        """The grouped values of `base` by `kernels.rounded`, where codes train."""
        parts = (None, None, None) if self._levels is None else self._levels.parts
        grid = kernels.Grid(self._zero_point, *parts, self._top, self._start.quantized.dtype)
        values: Tensor = _Rounded.apply(self.codes, self._scale(), grid, kernels)
        return values

    def _made(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes minus zero point, or levels, [m, G, g]; scale and zero point [m, G]: all as float32."""
        if not self._clip:
            return self._rounded(), self._scale(), self._zero_point
        if self._levels is not None:
            scale = self._scale()
            return self._levels.nearest(self._values / _divisor(scale)), scale, None
        if len(self.grid) == 1:
            scale, zero_point = self._scale(), self._zero_point
        else:
            low, high = self.grid[0].sigmoid() * self._low, self.grid[1].sigmoid() * self._high
            scale = through(((high - low) / self._top).clamp_min(SMALLEST_SCALE), _half)
            zero_point = through(-low / scale, torch.round).clamp(0, self._top)
        assert zero_point is not None
        codes = through(self._values / scale[..., None], torch.round) + zero_point[..., None]
        return codes.clamp(0, self._top) - zero_point[..., None], scale, zero_point

    def _rounded(self) -> Tensor:
        """Codes minus zero point, or levels, [m, G, g], where they train or stay."""
        if self.codes is None:
            return self._centred
        if self._levels is not None:
            return self._levels.nearest(self.codes * self._levels.step)
        assert self._zero_point is not None
        least = -self._zero_point[..., None]
        return torch.minimum(torch.maximum(through(self.codes, torch.round), least), least + self._top)

    def _trained_scales(self) -> Tensor:
        return self._scales * self.grid[0].exp()

    def _scale(self) -> Tensor:
        return through(self._trained_scales(), _half if self._start.quantized.nested is None else _twice)


class _Rounded(torch.autograd.Function):
    """Codes and scales to values, with straight-through gradients: what `base` computes in torch, to the last bit."""

    @staticmethod
    def forward(ctx: Any, codes: Tensor, scale: Tensor, grid: Any, kernels: Any) -> Tensor:
        ctx.save_for_backward(codes, scale)
        ctx.grid, ctx.kernels = grid, kernels
        values: Tensor = kernels.rounded(codes, scale, grid)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        of_codes, of_scale = ctx.kernels.rounded_gradients(gradient.contiguous(), *ctx.saved_tensors, ctx.grid)
        return of_codes, of_scale.sum(2), None, None


def _half(x: Tensor) -> Tensor:
    return x.half().float()


def _twice(scale: Tensor) -> Tensor:
    """Scales as they are when quantized themselves."""
    return unnest(nest(scale.view(-1))).view_as(scale)


def _divisor(scale: Tensor) -> Tensor:
    """Scales [m, G, 1] to divide by: a group of zeros may have the scale zero."""
    return scale.where(scale != 0, 1)[..., None]
