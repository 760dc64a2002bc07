"""Low-rank factors against the singular value decomposition of LAPACK in float64."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from loftq_cli.lowrank import LowRankFactors, svd, top_r, top_r_exact

reference = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent.parent / "scripts" / "make_golden.py")))
GOLDEN = json.loads((Path(__file__).parent / "golden" / "algorithms.json").read_text())

FAST = (300, 400)  # large enough beside rank 4 for the subspace iteration


def white(m: int, n: int, seed: int = 0) -> Tensor:
    """Like the residual of a quantization: no direction stands out."""
    return torch.from_numpy(reference.gaussian(m, n, seed)).float()


def error(residual: Tensor, factors: LowRankFactors) -> float:
    return float((residual.double() - factors.lora_B.double() @ factors.lora_A.double()).norm())


def least_error(residual: Tensor, rank: int) -> float:
    """Eckart and Young: the singular values left over."""
    return float(torch.linalg.svdvals(residual.double())[rank:].norm())


@pytest.mark.parametrize("rank", [1, 4, 16, 64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 64), (96, 257), (257, 96), (1, 200)], ids=str)
def test_exact_is_the_best_of_its_rank(shape: tuple[int, int], rank: int) -> None:
    residual = white(*shape)
    factors = top_r_exact(residual, rank)
    assert factors.lora_A.shape == (rank, shape[1])
    assert factors.lora_B.shape == (shape[0], rank)
    assert factors.lora_A.dtype == factors.lora_B.dtype == torch.float32
    assert factors.lora_A.is_contiguous()
    assert factors.lora_B.is_contiguous()
    assert error(residual, factors) == pytest.approx(
        least_error(residual, rank), rel=1e-5, abs=1e-5 * float(residual.norm())
    )
    assert torch.allclose(factors.product(), factors.lora_B @ factors.lora_A)


def both_ways(residual: Tensor, rank: int) -> list[LowRankFactors]:
    """Exact, fast from a cold start, fast from a warm one."""
    cold, found = top_r(residual, rank, generator_seed=1)
    assert found is not None, "not the fast path"
    assert found.left.shape == (min(residual.shape), rank + svd.OVERSAMPLING)
    warm, _ = top_r(residual, rank, generator_seed=2, start=found)
    return [top_r_exact(residual, rank), cold, warm]


def test_singular_values_are_shared_evenly() -> None:
    residual = white(*FAST)
    roots = torch.linalg.svdvals(residual.double())[:4].sqrt()
    for factors in both_ways(residual, 4):
        assert torch.allclose(factors.lora_A.double().norm(dim=1), roots, rtol=2e-3)
        assert torch.allclose(factors.lora_B.double().norm(dim=0), roots, rtol=2e-3)
        gram = factors.lora_B.T @ factors.lora_B
        assert (gram - gram.diag().diag()).abs().max() < 1e-4 * gram.max()


@pytest.mark.parametrize("shape", [FAST, FAST[::-1], (280, 900)], ids=str)
def test_fast_is_close_to_the_best_on_a_flat_spectrum(shape: tuple[int, int]) -> None:
    residual = white(*shape)
    best, energy = least_error(residual, 4), float(residual.norm()) ** 2
    for factors in both_ways(residual, 4):
        assert error(residual, factors) < best * 1.0005
        captured = (energy - error(residual, factors) ** 2) / (energy - best**2)
        assert 0.985 < captured < 1 + 1e-5


def test_fast_is_exact_on_a_falling_spectrum() -> None:
    u, v = torch.linalg.qr(white(300, 300))[0], torch.linalg.qr(white(400, 300, seed=1))[0]
    residual = (u * 0.8 ** torch.arange(300.0)) @ v.T
    for factors in both_ways(residual, 4):
        assert error(residual, factors) == pytest.approx(least_error(residual, 4), rel=1e-5)


def test_a_warm_start_saves_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    before, change = white(*FAST), white(*FAST, seed=1)
    after = before + 0.2 * change
    _, found = top_r(before, 4, generator_seed=0)
    warm, _ = top_r(after, 4, generator_seed=0, start=found)
    monkeypatch.setattr(svd, "COLD_DEGREE", svd.WARM_DEGREE)
    cold, _ = top_r(after, 4, generator_seed=0)
    best = least_error(after, 4)
    assert error(after, warm) - best < 0.4 * (error(after, cold) - best)


@pytest.mark.parametrize(
    "make",
    [
        lambda m, n: torch.zeros(m, n),
        lambda m, n: torch.ones(m, n),
        lambda m, n: white(m, 1) @ white(1, n),
        lambda m, n: 1e-8 * white(m, 3) @ white(3, n),
        lambda m, n: 1e-20 * white(m, 2) @ white(2, n),
        lambda m, n: 1e8 * white(m, 3) @ white(3, n),
        lambda m, n: torch.cat([white(m, n // 2)[:, :1].expand(m, n // 2), torch.zeros(m, n - n // 2)], dim=1),
        lambda m, n: torch.eye(m, n)[:, torch.arange(n)] * (torch.arange(n) < 2),
    ],
    ids=["zeros", "ones", "rank 1", "tiny rank 3", "vanishing", "huge rank 3", "one column repeated", "two entries"],
)
def test_a_degenerate_residual_is_reproduced(make: Callable[[int, int], Tensor]) -> None:
    residual = make(*FAST)
    for factors in both_ways(residual, 4):
        assert torch.isfinite(factors.lora_A).all()
        assert torch.isfinite(factors.lora_B).all()
        # what vanishes when squared in float32 may be lost, all or in part, but never blown up
        assert error(residual, factors) <= float(residual.double().norm()) * (
            1e-5 if residual.abs().max() > 1e-15 else 1
        )


def test_full_rank_is_the_residual_itself() -> None:
    residual = white(96, 80)
    factors, _ = top_r(residual, 80, generator_seed=0)
    assert error(residual, factors) < 1e-5 * float(residual.norm())


def test_one_seed_one_result() -> None:
    residual = white(*FAST)
    (one, found), (same, _), (other, _) = (top_r(residual, 4, generator_seed=seed) for seed in (5, 5, 6))
    assert torch.equal(one.lora_A, same.lora_A)
    assert torch.equal(one.lora_B, same.lora_B)
    assert not torch.equal(one.lora_A, other.lora_A)
    torch.manual_seed(1)  # the global generator has no say, and is not moved
    state = torch.get_rng_state()
    again, _ = top_r(residual, 4, generator_seed=5)
    assert torch.equal(one.lora_A, again.lora_A)
    assert torch.equal(state, torch.get_rng_state())
    assert found is not None
    assert torch.allclose(found.left.T @ found.left, torch.eye(4 + svd.OVERSAMPLING), atol=1e-5)
    assert (found.values.diff() <= 0).all()


def test_products_are_taken_in_full_precision() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = True
    try:
        with svd._full_precision():
            inside = getattr(matmul, "fp32_precision", None) or matmul.allow_tf32
        assert inside in ("ieee", False)
        assert matmul.allow_tf32, "the user's setting comes back"
    finally:
        matmul.allow_tf32 = before


def test_golden() -> None:
    W = torch.from_numpy(reference.gaussian(256, 384)).float()
    factors = top_r_exact(W, 16)
    assert (error(W, factors) / float(W.double().norm())) ** 2 == pytest.approx(GOLDEN["top_r"], rel=1e-5)
    assert np.isclose(least_error(W, 16) ** 2 / float(W.double().norm()) ** 2, GOLDEN["top_r"])
