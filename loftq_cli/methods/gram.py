"""What calibrated methods share: errors and low-rank factors as the layer's own inputs weigh them.

The inputs x of a layer enter by their Gram matrix H = E[x xᵀ] alone: for a difference D of weights, E|D x|² =
tr(D H Dᵀ), the output error. With any root H = L Lᵀ it is the squared norm of D L, the "weighted" residual below.

Shapes: B = weights in a batch, all of the same inputs, m = out_features, n = in_features, r = rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loftq_cli.lowrank import LowRankFactors, full_precision, top_r, top_r_exact
from loftq_cli.lowrank.small import inverse_factor
from loftq_cli.methods.base import squared_norm

# A singular Gram has no Cholesky factor, and one summed in float32 may be a little indefinite: an input more noise, in
# proportion to its own strength (which leaves weak inputs alone beside strong ones), as little as serves.
NOISE = (1e-10, 1e-8, 1e-6, 1e-4, 1e-2)
LARGEST_EXACT = 1024
ROUNDS, GAIN = 4, 1e-5  # beyond it: at most so many, and each must lower the error by so much of itself


def normalized(gram: Tensor) -> Tensor:
    """Return `gram` in float64, of mean diagonal 1; zeros stay zeros, and one NaN or inf makes all NaN."""
    H = gram.double() / gram.diagonal().double().mean().clamp_min(torch.finfo(torch.float64).tiny)
    return H.masked_fill_(~H.isfinite().all(), torch.nan)


def square_root(gram: Tensor) -> Tensor:
    """Return L, float32 [n, n], lower triangular, with `L @ L.mT` the normalized `gram`; NaN where there is none.

    By Cholesky, a thirtieth of the work of eigenvectors. It suits float32 (and bfloat16) too: the energy of inputs
    thousands of times as strong as the others ends up in few of its columns, and rounds none but those.
    """
    H = normalized(gram)
    for noise in NOISE:
        noisy = H.clone()
        noisy.diagonal().mul_(1 + noise).add_(torch.finfo(torch.float64).tiny)  # for dead inputs, whose row is zero
        factor, info = torch.linalg.cholesky_ex(noisy)
        if info == 0 and factor.isfinite().all():  # cuSOLVER has been seen to find no fault with a factor of NaN
            return factor.float()
    return torch.full_like(H, torch.nan, dtype=torch.float32)


def weigh(residual: Tensor, root: Tensor) -> Tensor:
    """Return `residual @ root`, float32 [B, m, n]: its squared norm is the output error, up to the scale of H."""
    with full_precision():
        return torch.matmul(residual, root)


def weighted_top_r(residual: Tensor, root: Tensor, rank: int, seeds: Sequence[int]) -> tuple[LowRankFactors, Tensor]:
    """Return the factors of least output error of `residual` [B, m, n], and that error, float64 [B], up to a scale.

    With U the leading left singular vectors of D L, U Uᵀ D is optimal, for U Uᵀ D L is the best approximation of D L
    (Eckart and Young). It is QERA's closed form (arXiv 2410.06040) SVD_r(D L) L⁻¹ without the inverse, so that a
    singular Gram does no harm. Either factor has the root of the product's own singular values.
    """
    weighted = weigh(residual, root)
    with full_precision():
        left, error = _leading(weighted, rank, seeds)
        inner = top_r_exact(torch.bmm(left.mT, residual), rank)  # turns and balances: the rank is full
        return LowRankFactors(inner.lora_A, torch.bmm(left, inner.lora_B), inner.energy), error


def _leading(weighted: Tensor, rank: int, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the leading left singular vectors [B, m, <= r] of `weighted` [B, m, n], and the squared norm outside.

    Up to 1024 rows or columns, the eigenvectors of the smaller Gram matrix are as quick as anything. It has to be in
    float64: inputs with a few directions a thousand times as strong as others are common, and float32 would lose the
    weak ones, at the cost of 1 % of the remaining error and more.

    Beyond, they would take seconds to minutes. `top_r`, made for the nearly white residual of a quantization, is 0.01 %
    short there, and loses weak directions as well. So it is asked again for what it left, where these stand out, and
    the best of both spans is taken, until nothing is gained: within 1e-4 of the least error, but a few % where
    directions are 3000 times as strong as others.
    """
    if min(weighted.shape[1:]) <= LARGEST_EXACT:
        left = _eigenvectors(weighted, rank)
        return left, squared_norm(_without(left, weighted))
    left, rest, error = weighted[:, :, :0], weighted, squared_norm(weighted)
    for _ in range(ROUNDS):
        both = _orthonormal(torch.cat([left, top_r(rest, rank, seeds=seeds)[0].lora_B], 2).double())
        again = torch.bmm(both, _eigenvectors(torch.bmm(both.float().mT, weighted), rank).double()).float()
        rest = _without(again, weighted)
        less = squared_norm(rest)
        if left.shape[2] > 0 and not (less < error * (1 - GAIN)).any():
            break
        left, error = again, less
    return left, error


def _eigenvectors(x: Tensor, rank: int) -> Tensor:
    """Return the leading left singular vectors of `x` [B, m, n], float32 [B, m, min(r, m, n)], or zeros for value 0."""
    wide = x.double()
    tall = x.shape[1] > x.shape[2]
    gram = torch.bmm(wide.mT, wide) if tall else torch.bmm(wide, wide.mT)
    vectors = torch.linalg.eigh(gram.nan_to_num_(0, 0, 0)).eigenvectors.flip(2)[:, :, :rank]  # it raises on NaN
    return (_orthonormal(torch.bmm(wide, vectors)) if tall else vectors).float()


def _orthonormal(x: Tensor) -> Tensor:
    """Return an orthonormal basis of the columns of `x` [B, m, k], float64; columns that add nothing come out short."""
    return torch.bmm(x, inverse_factor(torch.bmm(x.mT, x)))


def _without(left: Tensor, x: Tensor) -> Tensor:
    """Return what is left of `x` [B, m, n] outside the span of `left`, orthonormal [B, m, k]."""
    return torch.baddbmm(x, left, torch.bmm(left.mT, x), alpha=-1)
