"""The small kernels against their torch twins, in `lowrank`. `TRITON_INTERPRET=1` runs this file on a CPU, slowly."""

from __future__ import annotations

import contextlib
import os
import threading
from types import ModuleType

import pytest
import torch
from torch import Tensor

from loftq_cli import kernels
from loftq_cli.lowrank import LowRankFactors, draw, small, svd, top_r, top_r_exact, uniform

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
CPU = torch.device("cpu")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() and not INTERPRETED, reason="needs an NVIDIA GPU"),
]

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


@pytest.fixture
def fast() -> ModuleType:
    if not INTERPRETED:
        assert kernels.fused() is not None
    from loftq_cli.kernels import small as module

    return module


@pytest.fixture(autouse=True)
def run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        monkeypatch.setattr(torch.cuda, "device_of", lambda _: contextlib.nullcontext())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def graded(batch: int, m: int, k: int, seed: int = 0) -> Tensor:
    """Columns of very different lengths, and not at right angles: condition numbers to 1e6 beside those."""
    u, v = torch.linalg.qr(random(batch, m, k, seed=seed))[0], torch.linalg.qr(random(batch, k, k, seed=seed + 1))[0]
    return (u * torch.logspace(0, -6, k, dtype=F64)) @ v * torch.logspace(-8, 8, k, dtype=F64)


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("k", [1, 2, 15, 16, 17, 20, 31, 32])
def test_the_inverse_factor_is_choleskys(fast: ModuleType, k: int, batch: int) -> None:
    x = random(batch, 200, k, seed=k)
    for scale in (1.0, 1e-30, 1e30):
        gram = (scale * x).mT @ (scale * x)
        ours, twin = fast.inverse_factor(gram.to(DEVICE)).cpu(), small.inverse_factor(gram.clone())
        assert ours.shape == twin.shape
        assert (ours - twin).abs().max() <= 1e-13 * twin.abs().max()
        assert torch.equal(ours.tril(-1), torch.zeros_like(ours))


@pytest.mark.parametrize("k", [4, 20, 32])
def test_bases_are_orthonormal_where_columns_are_alike_or_short(fast: ModuleType, k: int) -> None:
    x = graded(3, 300, k)
    gram = x.mT @ x
    for inverse in (fast.inverse_factor(gram.to(DEVICE)).cpu(), small.inverse_factor(gram.clone())):
        q = x @ inverse
        # 1e-12 of the shift and 1e-16 of the roundings, times the squared condition number
        assert (q.mT @ q - torch.eye(k, dtype=F64)).abs().max() < 0.5


def degenerate(k: int) -> dict[str, Tensor]:
    """Blocks [200, k]."""
    x = random(200, k)
    some = x.clone()
    some[:, ::3] = 0
    return {
        "zeros": torch.zeros(200, k, dtype=F64),
        "zero columns": some,
        "rank 1": x[:, :1] @ random(1, k, seed=1),
        "rank 3": x[:, :3] @ random(3, k, seed=1),
        "one column": x[:, :1].expand(200, k).clone(),
        "vanishing rank 2": 1e-30 * x[:, :2] @ random(2, k, seed=1),
        "huge rank 2": 1e30 * x[:, :2] @ random(2, k, seed=1),
        "rank 3 in float32": (x[:, :3] @ random(3, k, seed=1)).float().double(),
        "rank 3 in bfloat16": (x[:, :3] @ random(3, k, seed=1)).bfloat16().double(),
    }


@pytest.mark.parametrize("k", [3, 16, 20, 32])
def test_dependent_columns_come_out_short(fast: ModuleType, k: int) -> None:
    blocks = torch.stack(list(degenerate(k).values()))
    gram = blocks.mT @ blocks
    for inverse in (fast.inverse_factor(gram.to(DEVICE)).cpu(), small.inverse_factor(gram.clone())):
        assert torch.isfinite(inverse).all()
        q = blocks @ inverse
        assert torch.linalg.matrix_norm(q, 2).max() < 1 + 1e-10
        for block, basis in zip(blocks, q, strict=True):  # nothing of the block is lost
            scaled = block / block.abs().max().clamp_min(1e-300)
            left_over = scaled - basis @ torch.linalg.lstsq(basis, scaled, driver="gelsd").solution
            assert left_over.abs().max() < 1e-6


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e200])
@pytest.mark.parametrize("k", [5, 20, 32])
def test_a_bad_gram_matrix_disturbs_no_other(fast: ModuleType, k: int, bad: float) -> None:
    x = random(3, 200, k)
    gram = x.mT @ x
    alone = fast.inverse_factor(gram.to(DEVICE))
    for place in ((1, 0, 0), (1, k // 2, k // 2), (1, k - 1, k - 1), (1, 0, k - 1), (1,)):
        broken = gram.clone()
        broken[place] = bad
        together = fast.inverse_factor(broken.to(DEVICE))
        assert torch.equal(together[[0, 2]], alone[[0, 2]])


def spectrum(batch: int, k: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Values [B, k] and vectors [B, k, k] of negative Gram matrices, as `eigh` lays them out."""
    rows = scale * random(batch, k, 2 * k, seed=k) * torch.logspace(0, -2, k, dtype=F64)[:, None]
    values, turn = torch.linalg.eigh(-(rows @ rows.mT))
    return values, turn


def assert_alike(ours: Tensor, twin: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """But for the last bits of roots; the interpreter cuts bfloat16 off where it should round."""
    assert ours.dtype == twin.dtype == dtype
    assert ours.shape == twin.shape == shape
    last = 1e-13 if dtype == F64 else 1.01 * torch.finfo(dtype).eps
    assert torch.allclose(ours.cpu().double(), twin.double(), rtol=last, atol=0)
    if dtype != BF16 or not INTERPRETED:
        same = (ours.cpu() == twin).double().mean()
        assert dtype == F64 or same > 0.999 or ours.numel() < 1000


def check_scalings(
    fast: ModuleType, values: Tensor, turn: Tensor, rank: int, dtype: torch.dtype, rough: torch.dtype
) -> None:
    batch, k = values.shape
    arguments = rank, svd.STEEPEST, dtype, rough
    ours = fast.scalings(values.to(DEVICE), turn.to(DEVICE), *arguments)
    twin = small.scalings(values, turn, *arguments)
    assert_alike(ours[0], twin[0], dtype, (batch, k, k))
    assert_alike(ours[1], twin[1], rough, (batch, 1, 1))
    assert ours[2].shape == (batch, k, rank)
    assert ours[3].shape == (batch,)
    if rank:
        assert_alike(ours[2], twin[2], F32, (batch, k, rank))
        assert_alike(ours[3], twin[3], F64, (batch,))
    assert ours[0].is_contiguous()
    assert ours[2].is_contiguous()


@pytest.mark.parametrize("dtypes", [(F32, F32), (F32, BF16), (BF16, BF16)], ids=str)
@pytest.mark.parametrize(
    ("batch", "k", "rank"),
    [(1, 1, 1), (2, 3, 0), (5, 17, 1), (3, 20, 4), (1, 32, 16), (2, 32, 0), (4, 33, 33), (2, 80, 64), (1, 300, 284)],
)
def test_scalings_are_the_twins(
    fast: ModuleType, batch: int, k: int, rank: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    values, turn = spectrum(batch, k)
    check_scalings(fast, values, turn, rank, *dtypes)
    check_scalings(fast, values, turn.contiguous(), rank, *dtypes)
    assert torch.equal(turn.mT.contiguous().mT, turn)  # other strides, the same numbers
    check_scalings(fast, values, turn.mT.contiguous().mT, rank, *dtypes)


@pytest.mark.parametrize("k", [20, 80])
def test_scalings_of_extreme_and_missing_values(fast: ModuleType, k: int) -> None:
    for scale in (1e-30, 1e-19, 1e-12, 1e12, 1e17):
        values, turn = spectrum(2, k, scale)
        check_scalings(fast, values, turn, k - 16, F32, F32)
    values, turn = spectrum(5, k)
    values[0] = 0
    values[1, 1:] = 0
    values[2, k // 2 :] = values[2, :1] * torch.linspace(1e-15, 0, k - k // 2, dtype=F64)
    values[3, -3:] = values[3, :1] * torch.tensor([-1e-18, -1e-17, -1e-16], dtype=F64)  # rounded beyond zero
    check_scalings(fast, values, turn, k - 16, F32, F32)
    right, inverse_bound, left, energy = fast.scalings(values.to(DEVICE), turn.to(DEVICE), 4, 1e8, F32, F32)
    assert not right[0].any()
    assert not left[0].any()
    assert energy[0] == 0
    assert torch.isfinite(inverse_bound).all()


def test_a_nan_stays_in_its_matrix(fast: ModuleType) -> None:
    values, turn = (tensor.to(DEVICE) for tensor in spectrum(3, 20))
    alone = fast.scalings(values, turn, 4, 1e8, F32, F32)
    values[1, 3], turn[1] = torch.nan, torch.nan
    for one, together in zip(alone, fast.scalings(values, turn, 4, 1e8, F32, F32), strict=True):
        assert torch.equal(one[[0, 2]], together[[0, 2]])


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (32, 32), (33, 31), (80, 4000)], ids=str)
@pytest.mark.parametrize("seeds", [[0], [7, 1234567, 2**63 - 1], [0, 1, 2, 2**32, 2**62 + 1]], ids=str)
def test_draws_are_the_twins_in_every_bit(fast: ModuleType, seeds: list[int], shape: tuple[int, int]) -> None:
    ours = fast.draw(torch.tensor(seeds, device=DEVICE), *shape)
    assert ours.dtype == F32
    assert torch.equal(ours.cpu(), uniform(seeds, *shape, CPU))


def product(factors: LowRankFactors) -> Tensor:
    return factors.lora_B.cpu().double() @ factors.lora_A.cpu().double()


@pytest.mark.parametrize("rank", [4, 16, 40])  # k = 20, 32 and 56
@pytest.mark.parametrize("rough", [F32, BF16], ids=str)
def test_factors_with_the_kernels_are_those_without(
    monkeypatch: pytest.MonkeyPatch, fast: ModuleType, rank: int, rough: torch.dtype
) -> None:
    """To what float32 and cuBLAS leave of a product; the third matrix is NaN, the fourth zero."""
    monkeypatch.setattr(svd, "_rough_dtype", lambda _: rough)
    residual = random(4, 300, 400).float()
    residual[1] = (random(300, rank) @ random(rank, 400, seed=1)).float() * 1e-20
    residual[2, 5], residual[3] = torch.nan, 0
    seeds = [1, 2, 3, 4]
    expected, start = top_r(residual, rank, seeds=seeds)
    warm, _ = top_r(residual, rank, seeds=seeds, start=start)
    exact = top_r_exact(residual, rank)
    wide = top_r_exact(residual[:, :20], 2 * rank)
    if INTERPRETED:
        for module in (small, draw):
            monkeypatch.setattr(module, "kernels", lambda _: fast)
    else:
        assert small.kernels(DEVICE) is fast
    there = residual.to(DEVICE)
    ours, begin = top_r(there, rank, seeds=seeds)
    again, _ = top_r(there, rank, seeds=seeds, start=begin)
    assert begin is not None
    assert begin.rows.dtype == begin.inverse_bound.dtype == rough
    results = (ours, again, top_r_exact(there, rank), top_r_exact(there[:, :20], 2 * rank))
    for mine, other in zip(results, (expected, warm, exact, wide), strict=True):
        assert mine.lora_A.shape == other.lora_A.shape
        assert mine.lora_B.shape == other.lora_B.shape
        target = residual[:, : mine.lora_B.shape[1]].double()
        # products rounded otherwise find directions a little otherwise, as good
        tolerance = 1e-3
        for i in (0, 1):
            errors = [float((target[i] - product(factors)[i]).norm()) for factors in (mine, other)]
            assert errors[0] == pytest.approx(errors[1], rel=tolerance, abs=1e-4 * float(target[i].norm()))
            assert mine.energy[i].item() == pytest.approx(other.energy[i].item(), rel=tolerance)
        assert product(mine)[2].isnan().any() == product(other)[2].isnan().any()
        assert not product(mine)[3].any()
        assert mine.energy[3] == 0


@pytest.mark.skipif(INTERPRETED, reason="about a GPU")
def test_nothing_waits_for_the_gpu(fast: ModuleType) -> None:
    values, turn = (tensor.to(DEVICE) for tensor in spectrum(2, 20))
    gram = torch.eye(20, dtype=F64, device=DEVICE).repeat(2, 1, 1)

    def every() -> None:
        small.inverse_factor(gram.clone())
        small.scalings(values, turn, 4, 1e8, F32, BF16)
        small.scalings(values, turn, 0, 1e8, BF16, BF16)
        uniform([1, 2], 20, 300, DEVICE)

    every()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        every()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(INTERPRETED, reason="about a GPU")
def test_threads_with_streams_of_their_own_get_the_same() -> None:
    residual = random(3, 400, 500).float().to(DEVICE)
    expected, _ = top_r(residual, 16, seeds=[1, 2, 3])
    torch.cuda.synchronize()
    same: list[bool] = []

    def work() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(10):
                factors, _ = top_r(residual, 16, seeds=[1, 2, 3])
                same.append(
                    torch.equal(factors.lora_A, expected.lora_A) and torch.equal(factors.lora_B, expected.lora_B)
                )

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True] * 30
