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
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loftq_cli.lowrank import LowRankFactors, Subspace, svd, top_r, top_r_exact, uniform

reference = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent.parent / "scripts" / "make_golden.py")))
GOLDEN = json.loads((Path(__file__).parent / "golden" / "algorithms.json").read_text())

FAST = (300, 400)  # large enough beside rank 4 for the subspace iteration


def white(m: int, n: int, seed: int = 0) -> Tensor:
    """Like the residual of a quantization: no direction stands out."""
    return torch.from_numpy(reference.gaussian(m, n, seed)).float()


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"], autouse=True)
def rough(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Whatever this machine multiplies natively."""
    monkeypatch.setattr(svd, "_rough_dtype", lambda device: request.param)
    return request.param


def fast(residual: Tensor, rank: int, seed: int = 0, start: Subspace | None = None) -> tuple[LowRankFactors, Subspace]:
    """One matrix [m, n]."""
    factors, found = top_r(residual[None], rank, seeds=[seed], start=start)
    assert found is not None, "not the fast path"
    return factors, found


def error(residual: Tensor, factors: LowRankFactors, i: int = 0) -> float:
    return float((residual.double() - factors.lora_B[i].double() @ factors.lora_A[i].double()).norm())


def least_error(residual: Tensor, rank: int) -> float:
    """Eckart and Young: the singular values left over."""
    return float(torch.linalg.svdvals(residual.double())[rank:].norm())


@pytest.mark.parametrize("rank", [1, 4, 16, 64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 64), (96, 257), (257, 96), (1, 200)], ids=str)
def test_exact_is_the_best_of_its_rank(shape: tuple[int, int], rank: int) -> None:
    residual = white(*shape)
    factors = top_r_exact(residual[None], rank)
    assert factors.lora_A.shape == (1, rank, shape[1])
    assert factors.lora_B.shape == (1, shape[0], rank)
    assert factors.lora_A.dtype == factors.lora_B.dtype == torch.float32
    assert factors.lora_A.is_contiguous()
    assert factors.lora_B.is_contiguous()
    assert error(residual, factors) == pytest.approx(
        least_error(residual, rank), rel=1e-5, abs=1e-5 * float(residual.norm())
    )
    assert torch.allclose(factors.product(), factors.lora_B @ factors.lora_A)


def every_way(residual: Tensor, rank: int) -> list[LowRankFactors]:
    """Exact, fast from a cold start, fast from a warm one."""
    cold, found = fast(residual, rank, seed=1)
    assert found.rows.shape == (1, rank + svd.OVERSAMPLING, residual.shape[1])
    warm, _ = fast(residual, rank, seed=2, start=found)
    return [top_r_exact(residual[None], rank), cold, warm]


def test_singular_values_are_shared_evenly() -> None:
    residual = white(*FAST)
    roots = torch.linalg.svdvals(residual.double())[:4].sqrt()
    for factors in every_way(residual, 4):
        assert torch.allclose(factors.lora_A[0].double().norm(dim=1), roots, rtol=2e-3)
        assert torch.allclose(factors.lora_B[0].double().norm(dim=0), roots, rtol=2e-3)
        gram = factors.lora_B[0].T @ factors.lora_B[0]
        assert (gram - gram.diag().diag()).abs().max() < 1e-4 * gram.max()


@pytest.mark.parametrize("shape", [FAST, FAST[::-1], (280, 900)], ids=str)
def test_fast_is_close_to_the_best_on_a_flat_spectrum(shape: tuple[int, int]) -> None:
    residual = white(*shape)
    best, energy = least_error(residual, 4), float(residual.norm()) ** 2
    for factors in every_way(residual, 4):
        assert error(residual, factors) < best * 1.0005
        captured = (energy - error(residual, factors) ** 2) / (energy - best**2)
        assert 0.985 < captured < 1 + 1e-5


def with_spectrum(values: Tensor, m: int = 300, n: int = 400) -> Tensor:
    u, v = torch.linalg.qr(white(m, len(values)).double())[0], torch.linalg.qr(white(n, len(values), 1).double())[0]
    return ((u * values) @ v.T).float()


@pytest.mark.parametrize("fall", [0.97, 0.9, 0.8, 0.5, 0.1])
def test_fast_is_exact_on_a_falling_spectrum(rough: torch.dtype, fall: float) -> None:
    residual = with_spectrum(fall ** torch.arange(300.0, dtype=torch.float64))
    for factors in every_way(residual, 4):
        if rough == torch.float32 and fall > 0.1:  # there, 3e-6 of the norm is missed
            assert error(residual, factors) == pytest.approx(least_error(residual, 4), rel=1e-5)
        # bfloat16 may find a direction to 1e-8 of its energy only
        assert error(residual, factors) ** 2 == pytest.approx(
            least_error(residual, 4) ** 2, rel=1e-4, abs=2e-8 * float(residual.norm()) ** 2
        )


@settings(max_examples=25, deadline=None)
@given(
    outliers=st.lists(st.floats(0, 2), min_size=1, max_size=6),
    shape=st.sampled_from([(150, 200), (200, 150), (400, 120)]),
)
def test_directions_that_stand_out_are_found_at_any_steepness(outliers: list[float], shape: tuple[int, int]) -> None:
    """Up to a hundred times the rest, whose own directions are so many that none matters."""
    values = torch.linspace(1, 0, 120, dtype=torch.float64)
    values[: len(outliers)] += 10 ** torch.tensor(outliers, dtype=torch.float64)
    residual = with_spectrum(values, *shape)
    for factors in every_way(residual, 8):
        least = least_error(residual, 8)
        assert least * (1 - 1e-5) - 1e-6 * values.max() < error(residual, factors) < least * 1.001 + 1e-6 * values.max()


def test_a_warm_start_saves_steps(rough: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    before, change = white(*FAST), white(*FAST, seed=1)
    after = before + 0.2 * change
    _, found = fast(before, 4)
    warm, _ = fast(after, 4, start=found)
    monkeypatch.setattr(svd, "COLD_DEGREES", (svd.WARM_DEGREE,))
    cold, _ = fast(after, 4)
    best = least_error(after, 4)
    assert error(after, warm) - best < (0.4 if rough == torch.float32 else 0.5) * (error(after, cold) - best)


@pytest.mark.parametrize(
    "make",
    [
        lambda m, n: torch.zeros(m, n),
        lambda m, n: torch.ones(m, n),
        lambda m, n: white(m, 1) @ white(1, n),
        lambda m, n: 1e-8 * white(m, 3) @ white(3, n),
        lambda m, n: 1e-20 * white(m, 2) @ white(2, n),
        lambda m, n: 1e8 * white(m, 3) @ white(3, n),
        lambda m, n: 1e15 * white(m, 3) @ white(3, n),
        lambda m, n: torch.cat([white(m, n // 2)[:, :1].expand(m, n // 2), torch.zeros(m, n - n // 2)], dim=1),
        lambda m, n: torch.eye(m, n)[:, torch.arange(n)] * (torch.arange(n) < 2),
    ],
    ids=["zeros", "ones", "rank 1", "tiny", "vanishing", "large", "huge", "one column repeated", "two entries"],
)
def test_a_degenerate_residual_is_reproduced(make: Callable[[int, int], Tensor]) -> None:
    residual = make(*FAST)
    for factors in every_way(residual, 4):
        assert torch.isfinite(factors.lora_A).all()
        assert torch.isfinite(factors.lora_B).all()
        assert error(residual, factors) <= float(residual.double().norm()) * 1e-5


def test_full_rank_is_the_residual_itself() -> None:
    residual = white(96, 80)
    factors, start = top_r(residual[None], 80, seeds=[0])
    assert start is None
    assert error(residual, factors) < 1e-5 * float(residual.norm())


def test_the_energy_is_the_squared_norm_of_the_product() -> None:
    for residual in (white(*FAST), with_spectrum(0.8 ** torch.arange(300.0)), 1e-10 * white(*FAST)):
        for factors in every_way(residual, 4):
            product = factors.lora_B.double() @ factors.lora_A.double()
            assert factors.energy.dtype == torch.float64
            assert factors.energy.tolist() == pytest.approx([float(product.square().sum())], rel=1e-6)
            squares = float(residual.double().square().sum()) - factors.energy.item()
            assert squares == pytest.approx(error(residual, factors) ** 2, rel=1e-6, abs=1e-6 * factors.energy.item())


@pytest.mark.parametrize("rank", [4, 60], ids=["fast", "exact"])
def test_each_matrix_of_a_batch_is_treated_as_if_alone(rank: int) -> None:
    batch = torch.stack([white(*FAST), 1e6 * white(*FAST, seed=1), with_spectrum(0.8 ** torch.arange(300.0))])
    together, start = top_r(batch, rank, seeds=[7, 8, 9])
    again, _ = top_r(batch, rank, seeds=[7, 8, 9], start=start)
    assert together.product().shape == batch.shape
    for i, residual in enumerate(batch):
        alone, start = top_r(residual[None], rank, seeds=[7 + i])
        warm, _ = top_r(residual[None], rank, seeds=[7 + i], start=start)
        for one, many in ((alone, together), (warm, again)):
            assert error(residual, many, i) == pytest.approx(error(residual, one), rel=1e-6)
            assert torch.allclose(many.product()[i], one.product()[0], atol=1e-4 * float(residual.abs().max()))
            assert many.energy[i].item() == pytest.approx(one.energy.item(), rel=1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e38])
@pytest.mark.parametrize("rank", [4, 60], ids=["fast", "exact"])
def test_a_matrix_beyond_repair_disturbs_no_other(rank: int, bad: float) -> None:
    batch = torch.stack([white(*FAST), white(*FAST, seed=1)])
    alone, _ = top_r(batch[1:], rank, seeds=[1])
    batch[0, 3] = bad
    factors, start = top_r(batch, rank, seeds=[0, 1])
    warm, _ = top_r(batch, rank, seeds=[0, 1], start=start)
    assert error(batch[1], factors, 1) == pytest.approx(error(batch[1], alone), rel=1e-6)
    assert error(batch[1], warm, 1) <= error(batch[1], alone) * (1 + 1e-6)
    assert not error(batch[0], factors, 0) > 1.001 * float(batch[0].double().norm()), "NaN, or no harm"


def test_one_seed_one_result(rough: torch.dtype) -> None:
    residual = white(*FAST)
    (one, found), (same, _), (other, _) = (fast(residual, 4, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(one.lora_A, same.lora_A)
    assert torch.equal(one.lora_B, same.lora_B)
    assert not torch.equal(one.lora_A, other.lora_A)
    torch.manual_seed(1)  # the global generator has no say, and is not moved
    state = torch.get_rng_state()
    again, _ = fast(residual, 4, seed=5)
    assert torch.equal(one.lora_A, again.lora_A)
    assert torch.equal(state, torch.get_rng_state())
    rows = torch.nn.functional.normalize(found.rows[0].float(), dim=1)
    assert torch.allclose(rows @ rows.T, torch.eye(4 + svd.OVERSAMPLING), atol=1e-5 if rough == torch.float32 else 3e-3)
    assert (found.rows[0].float().norm(dim=1).diff() <= 1e-2).all(), "by falling value"


def splitmix64(seed: int, index: int) -> int:
    """The reference implementation's, in Python's own integers (https://prng.di.unimi.it/splitmix64.c)."""
    z = (seed + index * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_uniform_numbers_are_splitmix64s() -> None:
    assert splitmix64(1234567, 1) == 6457827717110365317  # known answer
    for seed in (0, 1234567, 2**63 - 1):
        drawn = uniform([seed], 5, 7, torch.device("cpu"))
        assert drawn.dtype == torch.float32
        top = [splitmix64(seed, index) >> 40 for index in range(1, 36)]
        assert (drawn.flatten().double() * 2**23).tolist() == [t - 2**24 if t >= 2**23 else t for t in top]


def test_uniform_numbers_are_uniform_and_independent() -> None:
    seeds = [0, 1, 2, 2**32, 2**63 - 1]
    drawn = uniform(seeds, 100, 1000, torch.device("cpu")).double()
    assert drawn.shape == (5, 100, 1000)
    assert -1 <= drawn.min() < -0.9999
    assert 0.9999 < drawn.max() < 1
    assert drawn.mean((1, 2)).abs().max() < 0.01
    assert (drawn.square().mean((1, 2)) - 1 / 3).abs().max() < 0.005
    counts = torch.histc(drawn.float(), 64, -1, 1)
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 120  # chi-squared of 63: 1e-5 beyond it
    for values in (drawn.flatten(1), drawn[0], drawn[0].T):
        correlations = torch.corrcoef(values)
        largest = (correlations - torch.eye(len(values))).abs().max()
        assert largest < 6 / values.shape[1] ** 0.5
    assert torch.equal(drawn[3], uniform([2**32], 100, 1000, torch.device("cpu"))[0].double())


def test_products_are_taken_in_full_precision() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = True
    try:
        with svd.full_precision():
            inside = getattr(matmul, "fp32_precision", None) or matmul.allow_tf32
        assert inside in ("ieee", False)
        assert matmul.allow_tf32, "the user's setting comes back"
    finally:
        matmul.allow_tf32 = before


def test_golden() -> None:
    W = torch.from_numpy(reference.gaussian(256, 384)).float()
    factors = top_r_exact(W[None], 16)
    assert (error(W, factors) / float(W.double().norm())) ** 2 == pytest.approx(GOLDEN["top_r"], rel=1e-5)
    assert np.isclose(least_error(W, 16) ** 2 / float(W.double().norm()) ** 2, GOLDEN["top_r"])
