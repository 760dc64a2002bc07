"""Every method keeps the contract; LoftQ follows the published algorithm and never does worse than no adapter."""

from __future__ import annotations

import importlib
import itertools
import json
import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from loftq_cli.lowrank import Subspace, top_r
from loftq_cli.methods import METHODS, Decomposition, Method, loftq, qlora, seed_for, squared_norm
from loftq_cli.quantizers import QUANTIZERS, NormalFloat, QuantizedWeight, Quantizer, Uniform, dequantize
from loftq_cli.quantizers.base import stackable, unstack

reference = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent.parent / "scripts" / "make_golden.py")))
GOLDEN = json.loads((Path(__file__).parent / "golden" / "algorithms.json").read_text())
loftq_module = importlib.import_module("loftq_cli.methods.loftq")  # the package shows the function by that name


def weight(m: int, n: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(reference.gaussian(m, n, seed)).float()


def run(method: Method, W: Tensor, quantizer: Quantizer, rank: int, *, iters: int, seed: int) -> Decomposition:
    """One weight [m, n]."""
    return method(W[None], quantizer, rank, iters=iters, seeds=[seed])


def relative_error(W: Tensor, d: Decomposition, i: int = 0) -> float:
    """Of the weight `W` [m, n], the `i`-th of its batch: as a consumer computes it, in float64."""
    product = d.factors.lora_B[i].double() @ d.factors.lora_A[i].double()
    base = dequantize(unstack(d.quantized, len(d.iterations))[i])
    return float((W.double() - base.double() - product).norm() / W.double().norm())


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 130), (64, 64), (96, 257), (300, 320)], ids=str)
@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_contract(method: str, quantizer: str, shape: tuple[int, int]) -> None:
    W, row = weight(*shape), QUANTIZERS[quantizer](bits=2, group_size=64)
    before = W.clone()
    d, again = (run(METHODS[method], W, row, 8, iters=3, seed=7) for _ in range(2))
    assert torch.equal(W, before), "the method changed its input"
    assert d.factors.lora_A.shape == (1, 8, shape[1])
    assert d.factors.lora_B.shape == (1, shape[0], 8)
    for factor, same in ((d.factors.lora_A, again.factors.lora_A), (d.factors.lora_B, again.factors.lora_B)):
        assert factor.dtype == torch.float32
        assert factor.is_contiguous()
        assert torch.isfinite(factor).all()
        assert torch.equal(factor, same), "not deterministic"
    assert d.factors.lora_A.any(dim=2).all(), "a row of lora_A and a column of lora_B that are both zero never train"
    assert d.iterations.dtype == torch.int64
    assert 0 <= d.iterations.item() <= 3
    assert relative_error(W, d) <= relative_error(W, run(qlora, W, row, 8, iters=3, seed=7)) * (1 + 1e-6)


def test_qlora_starts_as_peft_does() -> None:
    W = weight(96, 257)
    d = run(qlora, W, NormalFloat(4), 16, iters=5, seed=11)
    torch.manual_seed(11)
    lora_A = torch.nn.init.kaiming_uniform_(torch.empty(16, 257), a=5**0.5)  # PEFT's reset_lora_parameters
    ours = d.factors.lora_A[0]
    assert ours.abs().max() <= 257**-0.5
    # the same distribution, for any numbers: Kolmogorov and Smirnov's distance, beyond this once in a million
    both = [values.flatten().sort().values for values in (ours, lora_A)]
    at = torch.linspace(-(257**-0.5), 257**-0.5, 1000)
    shares = [torch.searchsorted(values, at).double() / values.numel() for values in both]
    assert (shares[0] - shares[1]).abs().max() < 2.7 * (2 / lora_A.numel()) ** 0.5
    assert not d.factors.lora_B.any()
    assert d.iterations == 0
    assert torch.equal(d.quantized.codes, NormalFloat(4).quantize(W).codes)


def families(m: int, n: int) -> dict[str, np.ndarray]:
    rng = np.random.RandomState(3)
    low_rank = rng.standard_normal((m, 12)) * np.logspace(0, -1.5, 12) @ rng.standard_normal((12, n))
    return {
        "gaussian": rng.standard_normal((m, n)),
        "student-t": rng.standard_t(3, (m, n)),
        "low rank + noise": low_rank + 0.3 * rng.standard_normal((m, n)),
    }


@pytest.mark.parametrize("quantizer", [Uniform(2, 64), Uniform(4, 64), NormalFloat(2), NormalFloat(4)], ids=str)
@pytest.mark.parametrize("family", families(2, 2))
@pytest.mark.parametrize(("shape", "rank"), [((300, 384), 8), ((512, 320), 4), ((256, 256), 64)], ids=str)
def test_loop_against_full_singular_value_decompositions(
    shape: tuple[int, int], rank: int, family: str, quantizer: Quantizer
) -> None:
    W = families(*shape)[family].astype(np.float32)

    def fake_quantize(x: np.ndarray) -> np.ndarray:
        return dequantize(quantizer.quantize(torch.from_numpy(x).float())).double().numpy()

    best = min(reference.loftq_errors(W.astype(np.float64), fake_quantize, rank, 5))
    d = run(loftq, torch.from_numpy(W), quantizer, rank, iters=5, seed=0)
    assert relative_error(torch.from_numpy(W), d) <= best * 1.001


def test_golden() -> None:
    W = weight(256, 384)
    # the mean, for where the alternations end depends on the last bits, by a thousandth in so small a weight
    errors = [relative_error(W, run(loftq, W, NormalFloat(4), 16, iters=5, seed=seed)) for seed in range(8)]
    assert np.mean(errors) == pytest.approx(GOLDEN["loftq"], rel=1e-3)
    assert relative_error(W, run(qlora, W, NormalFloat(4), 16, iters=5, seed=0)) == pytest.approx(
        GOLDEN["qlora"], rel=1e-5
    )


def test_more_alternations_never_lose() -> None:
    W = torch.from_numpy(families(128, 192)["low rank + noise"]).float()
    for quantizer in (Uniform(2, 64), NormalFloat(2)):
        errors = [relative_error(W, run(loftq, W, quantizer, 8, iters=iters, seed=0)) for iters in range(6)]
        assert all(later <= earlier * (1 + 1e-7) for earlier, later in itertools.pairwise(errors))
        assert errors[5] < 0.95 * errors[1] < 0.95 * errors[0]


@dataclass(frozen=True)
class Faltering:
    """A quantizer that is good at its `good`-th call only."""

    calls: list[int]
    good: int
    bits: int = 4
    group_size: int = 64
    dtype: torch.dtype = torch.float32

    def quantize(self, W: Tensor) -> QuantizedWeight:
        self.calls.append(1)
        return replace(Uniform(4 if len(self.calls) == self.good else 2, 64).quantize(W), bits=4)

    def empty(self, m: int, n: int) -> QuantizedWeight:
        return Uniform(4, 64).empty(m, n)


@pytest.mark.parametrize("good", [1, 3, 5])
def test_the_best_alternation_is_kept(good: int) -> None:
    W = weight(96, 128)
    d = run(loftq, W, Faltering([], good), 4, iters=5, seed=0)
    assert d.iterations == good
    assert relative_error(W, d) < 0.1, "codes and factors of one and the same alternation"
    assert relative_error(W, d) == pytest.approx(
        relative_error(W, run(loftq, W, Faltering([], good), 4, iters=good, seed=0)), rel=1e-6
    )


@pytest.mark.parametrize("iters", [1, 5])
def test_full_rank_repairs_everything(iters: int) -> None:
    for shape in ((64, 96), (96, 64), (1, 1), (3, 5)):
        W = weight(*shape)
        d = run(loftq, W, Uniform(2, 64), min(shape), iters=iters, seed=0)
        assert relative_error(W, d) < 1e-5


def test_the_start_is_qloras_where_nothing_is_left_to_repair() -> None:
    W = torch.randint(-1, 3, (96, 128)).float()  # on the 2-bit grid of scale 1
    W[:, 0], W[:, 64], W[:, 1], W[:, 65] = -1, -1, 2, 2
    d, plain = (run(method, W, Uniform(2, 64), 4, iters=5, seed=0) for method in (loftq, qlora))
    assert relative_error(W, d) == 0
    assert d.iterations == 0
    assert torch.equal(d.factors.lora_A, plain.factors.lora_A)
    assert not d.factors.lora_B.any()


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-15, 1.0, 1e15, 1e30])
def test_squared_norm_in_the_whole_range_of_float32(scale: float) -> None:
    x = weight(70, 130) * scale
    both = squared_norm(torch.stack([x, weight(70, 130, seed=1)]))
    assert both[0].item() == pytest.approx(float(x.double().square().sum()), rel=1e-6)
    assert both[1] == pytest.approx(float(weight(70, 130, seed=1).double().square().sum()), rel=1e-6)
    assert squared_norm(torch.zeros(1, 3, 5)).tolist() == [0]


def test_spare_rank_can_still_train() -> None:
    W = torch.zeros(64, 64)
    W[5] = weight(1, 64)[0]  # a residual of rank 1
    d = run(loftq, W, Uniform(2, 64), 4, iters=2, seed=0)
    assert d.iterations > 0
    assert relative_error(W, d) < 1e-5
    assert d.factors.lora_A.any(dim=2).all()
    assert int(d.factors.lora_B.any(dim=1).sum()) == 1


def test_each_alternation_starts_from_the_last_ones_subspace(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def spy(residual: Tensor, rank: int, *, seeds: list[int], start: Subspace | None) -> object:
        given.append(start)
        return top_r(residual, rank, seeds=seeds, start=start)

    monkeypatch.setattr(loftq_module, "top_r", spy)
    run(loftq, weight(96, 128), Uniform(2, 64), 4, iters=3, seed=0)
    assert [start is None for start in given] == [True, False, False]


@pytest.mark.parametrize("shape", [(64, 64), (256, 320)], ids=["exact", "fast"])
def test_weights_beyond_fp16_scales_are_left_for_the_caller_to_refuse(shape: tuple[int, int]) -> None:
    W = weight(*shape)
    W[3] *= 1e6
    d = run(loftq, W, Uniform(2, 64), 4, iters=5, seed=0)
    assert d.iterations == 0
    assert not torch.isfinite(dequantize(d.quantized)[3]).any()


def test_the_loop_sees_the_dtype_of_the_stored_values() -> None:
    W = weight(96, 128)
    d = run(loftq, W, NormalFloat(4, dtype=torch.bfloat16), 16, iters=3, seed=0)
    blind = run(loftq, W, NormalFloat(4), 16, iters=3, seed=0)
    rounded = dequantize(blind.quantized).bfloat16().double() + blind.factors.product().double()
    assert relative_error(W, d) < float((W.double() - rounded).norm() / W.double().norm())


def test_seeds_are_stable_and_apart() -> None:
    assert seed_for(0, "model.layers.0.mlp.up_proj.weight") == 5872548965788916819  # printf, sha256sum
    seeds = {seed_for(seed, name) for seed in range(50) for name in ("a", "b", "1:a", "0")}
    assert len(seeds) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("shape", [(1,), (1023,), (1024,), (5, 1025), (400, 1000), (2_000_000,)], ids=str)
def test_squared_norm(shape: tuple[int, ...]) -> None:
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.5
    norms = squared_norm(torch.stack([x, 2 * x]))
    assert norms.dtype == torch.float64
    exact = float(x.double().square().sum())
    assert norms.tolist() == pytest.approx([exact, 4 * exact], rel=3e-7 if x.numel() < 10_000 else 1e-8)


def test_squared_norm_of_what_is_not_finite_is_not_finite() -> None:
    x = torch.ones(3, 8, 8)
    x[0, 0, 0], x[1, 0, 0] = torch.nan, torch.inf
    assert squared_norm(x).isfinite().tolist() == [False, False, True]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("quantizer", [Uniform(2, 64), NormalFloat(4), NormalFloat(2)], ids=str)
@pytest.mark.parametrize("shape", [(64, 128), (288, 320)], ids=["exact", "fast"])
def test_a_batch_is_its_weights_one_by_one(shape: tuple[int, int], quantizer: Quantizer, method: str) -> None:
    assert stackable(quantizer, *shape)
    batch = torch.stack(
        [weight(*shape), 0.02 * weight(*shape, seed=1), torch.zeros(shape), weight(*shape, seed=2) ** 3]
    )
    d = METHODS[method](batch, quantizer, 8, iters=4, seeds=[1, 2, 3, 4])
    assert d.quantized.shape == (4 * shape[0], shape[1])
    assert d.iterations.shape == (4,)
    assert d.iterations[2] == 0, "zeros need no repair"
    for i, W in enumerate(batch):
        alone = run(METHODS[method], W, quantizer, 8, iters=4, seed=i + 1)
        same = (unstack(d.quantized, 4)[i].codes == alone.quantized.codes).double().mean()
        assert same > 0.999, "but for ties"
        if W.any():
            assert relative_error(W, d, i) == pytest.approx(relative_error(W, alone), rel=1e-4)


def test_each_weight_of_a_batch_keeps_its_own_best() -> None:
    """The second is good at the first alternation, the first at the third."""

    @dataclass(frozen=True)
    class Taking(Faltering):
        def quantize(self, W: Tensor) -> QuantizedWeight:
            self.calls.append(1)
            tall = [
                Uniform(4 if len(self.calls) == good else 2, 64).quantize(half)
                for good, half in zip((3, 1), W.chunk(2), strict=True)
            ]
            fields = {name: torch.cat([getattr(q, name) for q in tall]) for name in ("codes", "scale", "zero_point")}
            return replace(tall[0], bits=4, shape=tuple(W.shape), **fields)

    batch = torch.stack([weight(288, 320), weight(288, 320, seed=1)])
    d = loftq(batch, Taking([], 0), 4, iters=5, seeds=[0, 1])
    assert d.iterations.tolist() == [3, 1]
    assert all(relative_error(W, d, i) < 0.1 for i, W in enumerate(batch))


def test_a_weight_beyond_repair_harms_no_other_of_its_batch() -> None:
    batch = torch.stack([weight(256, 320), weight(256, 320, seed=1)])
    alone = run(loftq, batch[1], Uniform(2, 64), 8, iters=3, seed=1)
    batch[0, 3] = torch.nan
    d = loftq(batch, Uniform(2, 64), 8, iters=3, seeds=[0, 1])
    assert d.iterations[0] == 0
    assert relative_error(batch[1], d, 1) == pytest.approx(relative_error(batch[1], alone), rel=1e-5)


def test_the_double_quantized_scales_are_kept_with_their_codes() -> None:
    W = weight(256, 320)
    d = run(loftq, W, NormalFloat(4, double_quant=True), 8, iters=4, seed=0)
    nested = d.quantized.nested
    assert nested is not None
    scale = nested.codebook[nested.codes.long()] * nested.absmax.repeat_interleave(256)[: len(nested.codes)]
    assert torch.allclose(d.quantized.scale, scale + nested.offset)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_may_come_in_half_precision(dtype: torch.dtype) -> None:
    W = weight(96, 128).to(dtype)
    for method in METHODS.values():
        ours, wide = (run(method, x, Uniform(2, 64), 4, iters=3, seed=0) for x in (W, W.float()))
        assert torch.equal(ours.quantized.codes, wide.quantized.codes)
        assert torch.equal(ours.factors.lora_A, wide.factors.lora_A)


def test_the_stages_are_timed_apart() -> None:
    stages: list[str] = []

    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        stages.append(stage)
        yield
        stages.append("end")

    loftq(weight(64, 64)[None], Uniform(2, 64), 4, iters=2, seeds=[0], timed=timed)
    assert stages == ["quantize", "end", "low_rank", "end"] * 2
    stages.clear()
    qlora(weight(64, 64)[None], Uniform(2, 64), 4, iters=2, seeds=[0], timed=timed)
    assert stages == ["quantize", "end"]
