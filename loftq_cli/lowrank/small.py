"""The small steps between the products, in torch; on CUDA each is one launch, of `kernels.small`.

A GPU is done with them at once: what they cost is the host's time, operation by operation.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from loftq_cli.kernels import fused


def kernels(device: torch.device) -> ModuleType | None:
    """Return `kernels.small` where it runs."""
    every = fused() if device.type == "cuda" else None
    return None if every is None else every.small


def inverse_factor(gram: Tensor) -> Tensor:
    """Return U [B, k, k], upper triangular, so that `x @ U` is orthonormal where `gram` is `x.mT @ x`, float64.

    The inverse of the Cholesky factor, turned over. The shift, relative to each column, lets dependent columns and
    zeros pass. `gram` may be changed.
    """
    small = kernels(gram.device)
    if small is not None and gram.shape[1] <= small.LARGEST_FACTOR:
        return small.inverse_factor(gram)
    gram.diagonal(dim1=1, dim2=2).mul_(1 + 1e-12).add_(torch.finfo(torch.float64).tiny)
    # the small inverse, and a product with it: many times faster on a GPU than solving for every row of `x`
    factor = torch.linalg.cholesky_ex(gram).L
    return torch.linalg.solve_triangular(factor, eye(gram.shape[1], gram.device), upper=False).mT


def scalings(
    values: Tensor, turn: Tensor, rank: int, steepest: float, dtype: torch.dtype, rough: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Share the singular values evenly between left and right vectors, the root to either, and take a filter's bound.

    Args:
        values: float64 [B, k], minus the squared singular values, rising; directions of hardly any length count as 0.
        turn: float64 [B, k, k], the eigenvectors, so that `turn.mT @ left.mT @ residual` are scaled right vectors.
        rank: of the factors, at most k; 0 for none.
        steepest: the bound is at least the largest value over this.
        dtype: of `right`.
        rough: of `inverse_bound`.

    Returns:
        right [B, k, k], `turn.mT` over the fourth root of each value, or 0; inverse_bound [B, 1, 1], one over the
        least value; left float32 [B, k, rank], the first of `turn` times those fourth roots; and energy float64 [B],
        the sum of their values. Nothing is in the last two where `rank` is 0.
    """
    small = kernels(turn.device)
    if small is not None:
        return small.scalings(values, turn, rank, steepest, dtype, rough)
    inverse_root = torch.where(values < 1e-12 * values[:, :1], -values, torch.inf).pow_(-0.25)[:, None]
    right = (turn * inverse_root).to(dtype).mT
    bound = torch.minimum(values[:, -1:], values[:, :1] / steepest).clamp_max_(-1e-37)
    inverse_bound = bound.reciprocal_().neg_().to(rough)[:, :, None]
    root = inverse_root[:, :, :rank].pow(3) * -values[:, None, :rank]  # and 0 where that is 0
    return right, inverse_bound, (turn[:, :, :rank] * root).float(), -values[:, :rank].sum(1)


@functools.cache
def eye(k: int, device: torch.device) -> Tensor:
    """Return the identity, float64; copied there, so that it is complete for any stream at once."""
    return torch.eye(k, dtype=torch.float64).to(device)
