"""Levels of least squared error for the weight at hand: Lloyd's algorithm on its own groups (Lloyd, 1982).

Those of `lloyd` are for Gaussian weights. Heavy tails, one-sided weights or weights of few values have others; and
formats that store codebooks have one for each weight anyway.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from loftq_cli.quantizers.codebook import LLOYD, SearchedCodebook, encode, pieces, search

ROUNDS = 12  # more bring next to nothing, but at 4 bits, of heavy tails, a few percent
SAMPLE = 1 << 18  # weights, of a larger weight: thousands for each of up to 16 numbers
MARGIN = 2e-4  # of the error: a round that takes away less, which it may owe to the sample, is not taken
STEPS = 4096  # of 1: levels are rounded, for a GPU, which sums in another order, to find mostly the same


@dataclass(frozen=True)
class LloydFit(SearchedCodebook):
    """The levels of least squared error for one weight, see `fitted`; those of `lloyd` for any other.

    Args:
        fit: the levels, ascending, the largest magnitude 1; None where nothing is fitted.
        book: the same, on the device of the weight: no use of it has to copy them there, nor to keep them for ever.
    """

    fit: tuple[float, ...] | None = None
    book: Tensor | None = field(default=None, repr=False, compare=False)

    def levels(self) -> Sequence[float]:
        """What was fitted."""
        return LLOYD[self.bits] if self.fit is None else self.fit

    def codebook(self, device: torch.device) -> Tensor:
        """The levels, float32 [2**bits]."""
        return super().codebook(device) if self.book is None else self.book.to(device)

    def fitted(self, W: Tensor) -> LloydFit:
        """The quantizer with levels for `W` [m, n], of any float dtype; deterministic, on the device of `W`.

        Of a large weight some rows are looked at, so far apart that the features of attention heads, which differ, all
        have their turn: a number that has no divisor in common with that of rows, nor with the size of a head.
        """
        step = -(-W.numel() // SAMPLE)
        while math.gcd(step, len(W)) > 1:
            step += 1
        rows = W[::step]
        g = rows.shape[1] if self.group_size == -1 else self.group_size
        fit = fit_levels([w for *_, w in pieces(rows, g)], LLOYD[self.bits])
        return replace(self, fit=fit, book=torch.tensor(fit, dtype=torch.float32, device=W.device))


def fit_levels(groups: Sequence[Tensor], start: tuple[float, ...]) -> tuple[float, ...]:
    """Alternate scales and codes for the levels, and the best levels for these, as long as that pays.

    The levels stay as they are where it never does, or where anything is not finite.

    Args:
        groups: float32 [G, g] each, in which no two rows share a scale.
        start: the first levels.
    """
    best, least, levels = start, math.inf, start
    for _ in range(ROUNDS + 1):
        error, product, energy = torch.stack([_cells(w, levels) for w in groups]).sum(0).cpu()
        now = error.sum().item()
        if not now < (1 - MARGIN) * least:
            break
        best, least = levels, now
        # a cell that holds nothing keeps its level
        moved = torch.where(energy > 0, product / energy, torch.tensor(levels, dtype=torch.float64)).sort().values
        levels = tuple((moved / moved.abs().max() * STEPS).round().div(STEPS).tolist())
    return best


def _cells(w: Tensor, levels: Sequence[float]) -> Tensor:
    """Squared error, `Σ s w` and `Σ s²` of what each level stands for: float64 [3, levels].

    Args:
        w: groups [G, g]; s are the scales found for them. The best level is the quotient of the last two.
        levels: ascending.
    """
    scale = search(w, levels).float()
    codes, sums = encode(w, scale, levels), []
    for code, level in enumerate(levels):
        inside = codes == code
        error = torch.where(inside, w - level * scale[:, None], 0).square()
        sums += [error.sum(1), (w * inside).sum(1) * scale, inside.sum(1) * scale.square()]
    return torch.stack([x.sum(dtype=torch.float64) for x in sums]).view(-1, 3).T
