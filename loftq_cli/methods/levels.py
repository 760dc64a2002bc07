"""A codebook as training sees it: real numbers that are rounded to the nearest level, and gradients that are not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

NEAREST = 0.49  # of the way from a level to the next: nearer to no other


def through(x: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """`rounded(x)`, to the last bit, with the gradient of x: a straight-through estimator."""
    return (x - x.detach()) + rounded(x.detach())


@dataclass(frozen=True)
class Levels:
    """The levels, float32 [2**bits], ascending."""

    values: Tensor

    @cached_property
    def step(self) -> Tensor:
        """The mean distance between neighbours: what the step is to a grid."""
        return (self.values[-1] - self.values[0]) / (len(self.values) - 1)

    def codes(self, x: Tensor) -> Tensor:
        """The codes of the levels nearest to `x`, int32."""
        return torch.bucketize(x, self._middles, out_int32=True)

    def nearest(self, x: Tensor) -> Tensor:
        """The levels nearest to `x`; numbers more than half a distance beyond the outermost have no gradient."""
        return through(x.clamp(*self._ends), lambda x: self.values[self.codes(x)])

    def near(self, x: Tensor, codes: Tensor) -> Tensor:
        """`x`, moved to where the levels of `codes` are nearest."""
        codes = codes.int()
        level = self.values[codes]
        offset = torch.minimum(x - level, NEAREST * self._above[codes])
        return level + torch.maximum(offset, -NEAREST * self._below[codes])

    @cached_property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """As `kernels.rounded` takes them."""
        return self.values.contiguous(), self._middles, torch.stack([*self._ends, self.step])

    @cached_property
    def _middles(self) -> Tensor:
        return (self.values[1:] + self.values[:-1]) / 2

    @cached_property
    def _below(self) -> Tensor:
        """From each level to the one below it; the lowest has as far to go down as up."""
        gaps = self.values.diff()
        return torch.cat([gaps[:1], gaps])

    @cached_property
    def _above(self) -> Tensor:
        gaps = self.values.diff()
        return torch.cat([gaps, gaps[-1:]])

    @cached_property
    def _ends(self) -> tuple[Tensor, Tensor]:
        return self.values[0] - self._below[0] / 2, self.values[-1] + self._above[-1] / 2
