"""What calibrated methods know of a layer's inputs: their second moments, in the source model and in the quantized one.

What enters a layer of the quantized model, x̂, is no longer what enters it in the source model, x, for the layers
before it have errors. The best weights for x̂ are then not W but the T below, which also makes up for those errors, as
far as it can be told from x̂: ‖W x − Ŵ x̂‖² = ‖(T − Ŵ) x̂‖² + what no Ŵ can change (GPTAQ, arXiv 2504.02692; the layer
objective of ApiQ, arXiv 2402.05147, in closed form).

Shapes: B = weights in a batch, all of the same inputs, m = out_features, n = in_features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from loftq_cli.lowrank import full_precision
from loftq_cli.methods.base import Decomposition, Timed, untimed
from loftq_cli.methods.feedback import feedback_of
from loftq_cli.methods.gram import square_root
from loftq_cli.quantizers.base import Quantizer

# Of the mean of the Gram's diagonal, as if x̂ had that much white noise beside: what few tokens say of weak directions
# is chance, and T must not follow it.
DAMPING = 0.1


@dataclass(frozen=True)
class Inputs:
    """Second moments per token of what enters a layer.

    Shapes: gram E[x̂ x̂ᵀ] and drift E[(x − x̂) x̂ᵀ], float32 [n, n]; drift is None where x is x̂, or not known.
    """

    gram: Tensor
    drift: Tensor | None = None

    @cached_property
    def root(self) -> Tensor:
        """L of `square_root`, [n, n]."""
        return square_root(self.gram)

    @cached_property
    def feedback(self) -> Tensor:
        """How rounding errors spread, [n, n], see `feedback_of`."""
        return feedback_of(self.gram)

    @cached_property
    def _mending(self) -> Tensor | None:
        """(E[x x̂ᵀ] − H)(H + λ)⁻¹, float32 [n, n]; None where there is nothing to mend."""
        if self.drift is None or not self.drift.any():
            return None
        H = self.gram.double()
        H.diagonal().add_(DAMPING * H.diagonal().mean())
        factor, info = torch.linalg.cholesky_ex(H)
        mending = torch.cholesky_solve(self.drift.double().mT, factor).mT.float().contiguous()
        return mending if info == 0 and mending.isfinite().all() else None

    def target(self, W: Tensor) -> Tensor:
        """Return T, float32 [B, m, n], for `W` of any float dtype."""
        W = W.float()
        with full_precision():
            return W if self._mending is None else torch.baddbmm(W, W, self._mending.expand(len(W), -1, -1))


class GramMethod(Protocol):
    """A calibrated method is one function; one row in `GRAM_METHODS` adds it."""

    def __call__(
        self,
        W: Tensor,
        quantizer: Quantizer,
        rank: int,
        *,
        inputs: Inputs,
        iters: int,
        seeds: Sequence[int],
        timed: Timed = untimed,
    ) -> Decomposition:
        """Decompose `W` [B, m, n] for the least output error, deterministically, on its device.

        Args:
            W: weights of the same inputs that `stackable` allows to quantize together, or a single one; or the
                `target` of such.
            quantizer: how to quantize.
            rank: of the factors.
            inputs: their Gram may be of any scale, and singular; where it is not finite the result is QLoRA's start.
            iters: alternations.
            seeds: those of the weights (`seed_for`).
            timed: wraps the stages "quantize" and "low_rank".
        """
        ...
