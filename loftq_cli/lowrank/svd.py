"""The best rank-r approximations of a batch of residuals [B, m, n] = [batch, out_features, in_features].

The residual of a quantization is almost white: its singular values fall slowly, so that the two power steps that serve
for a weight would give away a seventh of what rank r can recover. Nothing here waits for a GPU but the eigenvalues of
small Gram matrices, once per call from a warm start; and a matrix with NaN harms neither the call nor its neighbours.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loftq_cli.lowrank.draw import uniform
from loftq_cli.lowrank.small import eye, inverse_factor, scalings

# With these, LoftQ's error over five rounds at 2 bits is within 0.1 % of the error with exact factors (Gaussian,
# Student-t and power-law weights, 768² and 1536², rank 16 and 64), and within 0.01 % on a real model (`bench.py svd`).
# What the first round misses, the later ones never quite make up for: hence its degrees. The last half step in bfloat16
# as well would blur weak directions beside strong ones.
OVERSAMPLING = 16
COLD_POWER_STEPS, COLD_DEGREES, WARM_DEGREE = 3, (5, 5), 3  # degrees: odd, and of the residual, not of its square
STEEPEST = 1e8  # a filter treats directions alike that have less than the largest energy over this
LARGEST_BATCHED_EIGH = 32  # beyond it cuSOLVER takes matrix by matrix, slower than LAPACK and the way there and back


@dataclass(frozen=True)
class LowRankFactors:
    """`lora_B @ lora_A` for scaling 1.

    Shapes: lora_A float32 [B, r, n], lora_B float32 [B, m, r]; energy float64 [B], the squared norm of the product.
    """

    lora_A: Tensor
    lora_B: Tensor
    energy: Tensor

    def product(self) -> Tensor:
        """Return `lora_B @ lora_A` [B, m, n]."""
        with full_precision():
            return torch.bmm(self.lora_B, self.lora_A)


@dataclass(frozen=True)
class Subspace:
    """Where `top_r` found the leading directions, for the next call: a warm start.

    Shapes: rows [B, k, n], right vectors by falling value, of any length; inverse_bound [B, 1, 1], one over the squared
    singular value above which the filter grows; both of the dtype that the filter multiplies in.
    """

    rows: Tensor
    inverse_bound: Tensor


def top_r_exact(residual: Tensor, rank: int) -> LowRankFactors:
    """Return the best factors of rank `rank` (Eckart and Young) of `residual` [B, m, n], float32.

    By the eigenvectors of the smaller Gram matrix. Squaring the condition number does no harm here: only leading
    directions are kept, and their lengths are taken from the residual itself. Ten times as fast as a singular value
    decomposition.
    """
    m, n = residual.shape[1:]
    if m > n:
        flipped = top_r_exact(residual.mT, rank)
        return LowRankFactors(flipped.lora_B.mT.contiguous(), flipped.lora_A.mT.contiguous(), flipped.energy)
    with full_precision():
        # in the range of squares: of 1e-20 or 1e20, float32 holds none
        scaled = residual / residual.abs().amax((1, 2), keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
        left = torch.linalg.eigh(_finite(torch.bmm(scaled, scaled.mT))).eigenvectors.flip(2)[:, :, :rank]
        found = _ritz_vectors(left, torch.bmm(left.mT, residual), residual.dtype, left.shape[2])
        factors = _factors(found)
    missing = (0, rank - left.shape[2])  # zeros where the residual is smaller than the rank
    pad = torch.nn.functional.pad
    return LowRankFactors(pad(factors.lora_A, (0, 0, *missing)), pad(factors.lora_B, missing), factors.energy)


def top_r(
    residual: Tensor, rank: int, *, seeds: Sequence[int], start: Subspace | None = None
) -> tuple[LowRankFactors, Subspace | None]:
    """Return factors of rank `rank` close to the best, by Chebyshev-filtered subspace iteration.

    A random block (Halko et al., arXiv 0909.4061) takes a few power steps; its smallest Ritz value then bounds what is
    not wanted, and a Chebyshev polynomial of the singular values that is small below that bound and grows fastest above
    it (Zhou et al., Journal of Computational Physics 219, 2006) does what would take many more power steps.

    The filter only has to find the subspace, and multiplies in bfloat16 where the hardware does; the last product with
    the residual on either side, and all that the factors are made of, is float32.

    Args:
        residual: float32 [B, m, n].
        rank: of the factors.
        seeds: one per matrix; they draw the random starts.
        start: what the previous call returned for residuals much like these.

    Returns:
        The factors, and a warm start (None where the exact way was taken, being the cheaper one).
    """
    k = rank + OVERSAMPLING
    if 4 * k >= min(residual.shape[1:]):
        return top_r_exact(residual, rank), None
    with full_precision():
        rough = residual.to(_rough_dtype(residual.device))
        degree = WARM_DEGREE
        if start is None:
            rows = uniform(seeds, k, residual.shape[2], residual.device).to(rough.dtype)
            for _ in range(COLD_POWER_STEPS - 1):
                rows = torch.bmm(_orthonormal(torch.bmm(rough, rows.mT)).mT, rough)
            start = _subspace(_project(rough, rows, rough.dtype))
            for degree in COLD_DEGREES[:-1]:
                start = _subspace(_project(rough, _filtered(rough, start, degree), rough.dtype))
            degree = COLD_DEGREES[-1]
        found = _project(residual, _filtered(rough, start, degree), rough.dtype, rank)
        return _factors(found), _subspace(found)


def _filtered(rough: Tensor, start: Subspace, degree: int) -> Tensor:
    """Apply to `start.rows` [B, k, n] the Chebyshev polynomial T_degree of the singular values, but for one factor.

    `T_degree(s) ~ s · Π (s² − root)` stays small up to the bound. Between its factors the block is made orthonormal:
    that changes its basis only, and keeps the leading direction from drowning the others. The factor `s` is left to the
    product that follows.
    """
    rows = start.rows
    for i in range(degree // 2):
        if i > 0:
            rows = _orthonormal(rows.mT).mT
        left = torch.bmm(rough, rows.mT).mul_(start.inverse_bound)
        rows = torch.baddbmm(rows, left.mT, rough, beta=-(math.cos((i + 0.5) * math.pi / degree) ** 2))
    return rows


@dataclass(frozen=True)
class _Ritz:
    """The singular values and vectors of a residual within a subspace, by falling length.

    Shapes: left [B, m, k], orthonormal; rows [B, k, n], right vectors, each as long as the root of its value, or 0;
    turn float32 [B, k, rank], so that `left @ turn` are left vectors of such lengths; energy float64 [B], the squared
    norm of the product of both; inverse_bound [B, 1, 1], see `Subspace`.
    """

    left: Tensor
    rows: Tensor
    turn: Tensor
    energy: Tensor
    inverse_bound: Tensor


def _project(residual: Tensor, rows: Tensor, rough: torch.dtype, rank: int = 0) -> _Ritz:
    """Take the last half step, `residual @ rows.mT`, and what it spans."""
    left = _orthonormal(torch.bmm(residual, rows.to(residual.dtype).mT))
    return _ritz_vectors(left, torch.bmm(left.mT, residual), rough, rank)


def _ritz_vectors(left: Tensor, rows: Tensor, rough: torch.dtype, rank: int) -> _Ritz:
    """Turn an orthonormal `left` [B, m, k] and `rows = left.mT @ residual` [B, k, n] to singular vectors."""
    wide = rows.double()
    # negative, so that they come by falling energy
    values, turn = _eigh(torch.baddbmm(eye(wide.shape[1], wide.device), wide, wide.mT, beta=0, alpha=-1))
    right, inverse_bound, turn, energy = scalings(values, turn, rank, STEEPEST, rows.dtype, rough)
    return _Ritz(left, torch.bmm(right, rows), turn, energy, inverse_bound)


def _factors(found: _Ritz) -> LowRankFactors:
    """Share the singular values evenly, the root to either factor (LoftQ, arXiv 2310.08659, equation 8)."""
    rank = found.turn.shape[2]
    return LowRankFactors(found.rows[:, :rank].contiguous(), torch.bmm(found.left, found.turn), found.energy)


def _subspace(found: _Ritz) -> Subspace:
    return Subspace(found.rows.to(found.inverse_bound.dtype), found.inverse_bound)


def _orthonormal(x: Tensor) -> Tensor:
    """Return an orthonormal basis of the columns of `x` [B, m, k], of its dtype, by Cholesky-QR.

    In float64, which is cheap beside the products with the residual, and lets one pass serve. Dependent columns and
    zeros come out short, not as NaN, and a basis with short columns projects as safely, for its singular values are at
    most 1.
    """
    wide = x.double()
    return torch.bmm(wide, inverse_factor(torch.bmm(wide.mT, wide))).to(x.dtype)


def _eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues [B, k], rising, and eigenvectors of symmetric float64 matrices [B, k, k]."""
    gram = _finite(gram)
    if gram.is_cuda and gram.shape[1] > LARGEST_BATCHED_EIGH:
        values, vectors = torch.linalg.eigh(gram.cpu())
        return values.to(gram.device, non_blocking=True), vectors.to(gram.device, non_blocking=True)
    values, vectors = torch.linalg.eigh(gram)
    return values, vectors


def _finite(gram: Tensor) -> Tensor:
    """Replace what eigensolvers raise on; the factors of such a matrix are still NaN, by its own product."""
    return gram.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


@functools.cache
def _rough_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where the hardware multiplies it faster than float32."""
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        native = device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return torch.bfloat16 if native else torch.float32


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Multiply float32 matrices in float32: TF32 keeps three digits, and a Gram matrix needs all seven."""
    matmul = torch.backends.cuda.matmul  # torch 2.9 renamed the setting, and mixing both names is an error
    name, full = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    before = getattr(matmul, name)
    setattr(matmul, name, full)
    try:
        yield
    finally:
        setattr(matmul, name, before)
