"""Calibrated methods against brute force in float64: least output error, and rounding as GPTQ has it."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loftq_cli.methods import GRAM_METHODS, Decomposition, GramMethod, Inputs, cloq, qera, qlora
from loftq_cli.methods.feedback import feedback_of, round_with_feedback
from loftq_cli.methods.gram import square_root, weighted_top_r
from loftq_cli.quantizers import (
    Lloyd,
    NormalFloat,
    NormalFloatSearch,
    Quantizer,
    Uniform,
    UniformSymmetric,
    dequantize,
    residual,
)
from loftq_cli.quantizers.base import unstack

gram_module = importlib.import_module("loftq_cli.methods.gram")
METHODS = list(GRAM_METHODS)


def weight(m: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def correlated(n: int, tokens: int = 0, seed: int = 1) -> Tensor:
    """The Gram of inputs near a plane of n / 8 dimensions, of unequal strength; float64 [n, n]."""
    g, tokens, k = torch.Generator().manual_seed(seed), tokens or 4 * n, max(1, n // 8)
    x = torch.randn(tokens, k, generator=g) @ torch.randn(k, n, generator=g) / k**0.5
    x = (x + 0.2 * torch.randn(tokens, n, generator=g)) * torch.randn(n, generator=g).exp()
    return x.double().mT @ x.double() / tokens


def run(
    method: GramMethod, W: Tensor, quantizer: Quantizer, rank: int, gram: Tensor, *, iters: int = 5, seed: int = 0
) -> Decomposition:
    """One weight [m, n]."""
    return method(W[None], quantizer, rank, inputs=Inputs(gram), iters=iters, seeds=[seed])


def plain_error(W: Tensor, quantizer: Quantizer, gram: Tensor) -> float:
    return brute_error(W.double() - dequantize(quantizer.quantize(W)).double(), gram)


def brute_error(D: Tensor, gram: Tensor) -> float:
    return float(torch.einsum("ij,jk,ik->", D.double(), gram.double(), D.double()))


def error(W: Tensor, d: Decomposition, gram: Tensor, i: int = 0) -> float:
    """Of the `i`-th weight of the batch: as a consumer computes it."""
    base = dequantize(unstack(d.quantized, len(d.iterations))[i]).double()
    return brute_error(W.double() - base - d.factors.lora_B[i].double() @ d.factors.lora_A[i].double(), gram)


def least_errors(D: Tensor, gram: Tensor, rank: int) -> float:
    """The weighted error that no factors of this rank can undercut (Eckart and Young), in float64."""
    values, vectors = torch.linalg.eigh(gram.double())
    root = vectors * values.clamp_min(0).sqrt()
    return float(torch.linalg.svdvals(D.double() @ root)[rank:].square().sum())


def gptq(W: Tensor, quantizer: Quantizer, gram: Tensor) -> Tensor:
    """GPTQ as published, column by column and in float64, through the inverse; returns the codes."""
    m, n = W.shape
    H = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(n)
    R = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    g = quantizer.group_size if quantizer.group_size > 0 else n
    w, codes = W.double().clone(), torch.zeros(m, n, dtype=torch.uint8)
    for j in range(n):
        if j % g == 0:
            group = quantizer.quantize(w[:, j : j + g].float())
            scale, zero_point = group.scale[:, 0].double(), group.zero_point[:, 0].double()
        code = (w[:, j] / scale + zero_point).round().clamp(0, 2**quantizer.bits - 1)
        value = ((code - zero_point) * scale).to(quantizer.dtype).double()
        w[:, j:] -= ((w[:, j] - value) / R[j, j])[:, None] * R[j, j:]
        codes[:, j] = code.to(torch.uint8)
    return codes


@pytest.mark.parametrize("shape", [(1, 1), (1, 70), (3, 5), (7, 130), (64, 64), (96, 257), (160, 96)], ids=str)
@pytest.mark.parametrize("quantizer", [Uniform(2, 64), UniformSymmetric(4, -1)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_contract(method: str, quantizer: Quantizer, shape: tuple[int, int]) -> None:
    W, gram = weight(*shape), correlated(shape[1])
    before = W.clone(), gram.clone()
    d, again = (run(GRAM_METHODS[method], W, quantizer, 8, gram, iters=3, seed=7) for _ in range(2))
    assert torch.equal(W, before[0])
    assert torch.equal(gram, before[1])
    like = quantizer.empty(*shape)
    for name in ("codes", "scale", "zero_point"):
        ours, same = getattr(d.quantized, name), getattr(again.quantized, name)
        assert torch.equal(ours, same), "not deterministic"
        assert (ours.shape, ours.dtype) == (getattr(like, name).shape, getattr(like, name).dtype)
        assert ours.is_contiguous()
    assert d.quantized.codes.max() < 2**quantizer.bits
    assert d.factors.lora_A.shape == (1, 8, shape[1])
    assert d.factors.lora_B.shape == (1, shape[0], 8)
    for factor, same in ((d.factors.lora_A, again.factors.lora_A), (d.factors.lora_B, again.factors.lora_B)):
        assert factor.dtype == torch.float32
        assert factor.is_contiguous()
        assert torch.isfinite(factor).all()
        assert torch.equal(factor, same), "not deterministic"
    assert d.factors.lora_A.any(dim=2).all(), "a row of lora_A and a column of lora_B that are both zero never train"
    assert d.iterations.dtype == torch.int64
    product = d.factors.lora_B.double() @ d.factors.lora_A.double()
    assert float(d.factors.energy) == pytest.approx(float(product.square().sum()), rel=1e-5, abs=1e-12)
    assert error(W, d, gram) <= plain_error(W, quantizer, gram)


@pytest.mark.parametrize(("shape", "rank"), [((40, 64), 4), ((64, 40), 4), ((48, 48), 1), ((96, 130), 32)], ids=str)
def test_qera_is_the_explicit_closed_form(shape: tuple[int, int], rank: int) -> None:
    W, gram, quantizer = weight(*shape), correlated(shape[1]), Uniform(2, 64)
    D = (W - dequantize(quantizer.quantize(W))).double()
    values, vectors = torch.linalg.eigh(gram)
    root, inverse = (vectors * values**power @ vectors.mT for power in (0.5, -0.5))
    left, singular, right = torch.linalg.svd(D @ root, full_matrices=False)
    explicit = left[:, :rank] * singular[:rank] @ right[:rank] @ inverse  # QERA, theorem 1
    d = run(qera, W, quantizer, rank, gram)
    product = d.factors.product()[0].double()
    assert (product - explicit).norm() <= 1e-5 * explicit.norm()
    assert error(W, d, gram) == pytest.approx(least_errors(D, gram, rank), rel=1e-5)
    for factor in (d.factors.lora_B[0], d.factors.lora_A[0].mT):  # balanced: the root of the product's values
        lengths = torch.linalg.svdvals(explicit)[:rank].sqrt().float()
        assert torch.allclose(factor.norm(dim=0), lengths, rtol=1e-4)


def overwhelming(n: int, boost: float) -> Tensor:
    """The Gram of inputs of which two are `boost` times as strong as others, and which all have a mean like that."""
    strength, shift = torch.ones(n, dtype=torch.float64), torch.full((n,), boost, dtype=torch.float64)
    strength[[3, 40]] = boost
    return strength[:, None] * correlated(n) * strength + shift.outer(shift)


@pytest.mark.parametrize("boost", [1, 1000])
@pytest.mark.parametrize("shape", [(96, 160), (160, 96)], ids=str)
def test_low_rank_is_optimal_with_overwhelming_inputs_too(shape: tuple[int, int], boost: float) -> None:
    gram = overwhelming(shape[1], boost)
    D = residual(weight(*shape), Uniform(2, 32).quantize(weight(*shape)))
    factors, reported = weighted_top_r(D[None], square_root(gram), 24, [0])
    least = least_errors(D, gram, 24)
    assert brute_error(D.double() - factors.product()[0].double(), gram) == pytest.approx(least, rel=1e-4)
    assert float(reported) * float(gram.diagonal().mean()) == pytest.approx(least, rel=5e-3)


@pytest.mark.parametrize("kind", ["white", "correlated"])
@pytest.mark.parametrize("shape", [(200, 320), (320, 200)], ids=str)
def test_large_weights_take_the_iterative_way_to_the_same_error(
    shape: tuple[int, int], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gram_module, "LARGEST_EXACT", 0)
    gram = correlated(shape[1]) if kind == "correlated" else torch.eye(shape[1])
    W = torch.stack([weight(*shape), weight(*shape, seed=1)])
    factors, reported = weighted_top_r(W, square_root(gram), 16, [0, 1])
    for i in range(2):
        least = least_errors(W[i], gram, 16)
        after = brute_error(W[i].double() - factors.product()[i].double(), gram)
        assert after == pytest.approx(least, rel=1e-4)
        assert float(reported[i]) * float(gram.diagonal().mean()) == pytest.approx(after, rel=1e-5)
    # where little is left, which the first round's span does not hold
    narrow = weight(shape[0], 5) @ weight(5, shape[1])
    factors, _ = weighted_top_r(narrow[None], square_root(gram), 16, [0])
    left = brute_error(narrow.double() - factors.product()[0].double(), gram)
    assert left < 1e-9 * brute_error(narrow, gram)


def test_asking_again_for_what_was_left_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram_module, "LARGEST_EXACT", 0)
    W, gram, errors = weight(256, 320), overwhelming(320, 300), []
    for rounds in (1, 4):
        monkeypatch.setattr(gram_module, "ROUNDS", rounds)
        factors, _ = weighted_top_r(W[None], square_root(gram), 64, [0])
        errors.append(brute_error(W.double() - factors.product()[0].double(), gram) / least_errors(W, gram, 64))
    assert errors[1] < 1.05
    assert errors[0] > 1.5


@pytest.mark.parametrize("method", METHODS)
def test_no_change_of_the_factors_lowers_the_error(method: str) -> None:
    W, gram = weight(48, 64), correlated(64)
    d = run(GRAM_METHODS[method], W, Uniform(2, 64), 6, gram)
    D = W.double() - dequantize(d.quantized).double()
    A, B = d.factors.lora_A[0].double(), d.factors.lora_B[0].double()
    least, g = brute_error(D - B @ A, gram), torch.Generator().manual_seed(0)
    for step in (1e-3, 1e-2, 1e-1):
        for _ in range(30):
            dA, dB = (step * x.std() * torch.randn(x.shape, generator=g) for x in (A, B))
            assert brute_error(D - (B + dB) @ (A + dA), gram) > least
    # and along the gradient, which a random change hardly sees
    pull = (D - B @ A) @ gram
    assert (B.mT @ pull).norm() < 1e-5 * (B.mT @ D @ gram).norm()
    assert (pull @ A.mT).norm() < 1e-5 * (D @ gram @ A.mT).norm()


def test_with_white_inputs_qera_is_the_best_repair_of_the_weight() -> None:
    W, quantizer = weight(80, 96), Uniform(2, 32)
    D = (W - dequantize(quantizer.quantize(W))).double()
    d = run(qera, W, quantizer, 8, torch.eye(96))
    left, singular, right = torch.linalg.svd(D)
    best = left[:, :8] * singular[:8] @ right[:8]
    assert (d.factors.product()[0].double() - best).norm() < 1e-5 * best.norm()
    assert error(W, run(qera, W, quantizer, 8, 1e-30 * torch.eye(96)), torch.eye(96)) == pytest.approx(
        error(W, d, torch.eye(96)), rel=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(40, 96), (96, 40)], ids=str)
def test_a_singular_gram_does_no_harm(shape: tuple[int, int], method: str, dtype: torch.dtype) -> None:
    W, quantizer = weight(*shape), Uniform(2, 32)
    gram = correlated(shape[1], tokens=20).to(dtype)
    d = run(GRAM_METHODS[method], W, quantizer, 8, gram)
    D = (W - dequantize(d.quantized)).double()
    assert error(W, d, gram) <= least_errors(D, gram, 8) * 1.001 < plain_error(W, quantizer, gram)
    assert d.factors.product().norm() < 10 * W.norm(), "nothing grows where the inputs do not tell"
    for rank in (20, 35):  # as much as there are tokens, and more
        full = run(GRAM_METHODS[method], W, quantizer, rank, gram)
        assert error(W, full, gram) < 1e-5 * plain_error(W, quantizer, gram)
        assert full.factors.product().norm() < 10 * W.norm()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("poison", [None, torch.nan, torch.inf, -torch.inf])
def test_a_gram_that_says_nothing_leaves_qloras_start(
    poison: float | None, exact: bool, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gram_module, "LARGEST_EXACT", 1024 if exact else 0)
    W, gram = weight(40, 64), torch.zeros(64, 64) if poison is None else correlated(64)
    plain = qlora(W[None], Uniform(2, 32), 4, iters=5, seeds=[0])
    places = [(5, 5), (3, 60), (60, 3)] if poison is not None else [(0, 0)]
    for row, column in places:
        bad = gram.clone()
        bad[row, column] = poison or 0
        d = run(GRAM_METHODS[method], W, Uniform(2, 32), 4, bad)
        assert d.iterations == 0
        assert torch.equal(d.factors.lora_A, plain.factors.lora_A)
        assert not d.factors.lora_B.any()
        assert torch.equal(d.quantized.codes, plain.quantized.codes)


@pytest.mark.parametrize("method", METHODS)
def test_dead_inputs_change_nothing_for_the_others(method: str) -> None:
    W, gram = weight(40, 64), correlated(64)
    dead = torch.zeros(64, dtype=torch.bool)
    dead[[0, 7, 63]] = True
    gram[dead] = 0
    gram[:, dead] = 0
    d = run(GRAM_METHODS[method], W, Uniform(4, 16), 4, gram)
    assert torch.isfinite(d.factors.product()).all()
    assert error(W, d, gram) < plain_error(W, Uniform(4, 16), gram)
    base = dequantize(d.quantized)
    assert (W - base)[:, dead].abs().max() < 0.5, "still rounded to nearest, not to zero"
    spread = feedback_of(gram)
    assert not torch.triu(spread, 1)[dead].any()
    assert not torch.triu(spread, 1)[:, dead].any()


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("shape", [(96, 256), (256, 96)], ids=str)
def test_calibration_pays(shape: tuple[int, int], bits: int) -> None:
    W, gram, quantizer = weight(*shape), correlated(shape[1]), Uniform(bits, 32)
    plain, once, ours = (
        plain_error(W, quantizer, gram),
        *(error(W, run(method, W, quantizer, 8, gram), gram) for method in (qera, cloq)),
    )
    assert ours < 0.8 * once < 0.8 * 0.9 * plain
    blind = torch.eye(shape[1])
    assert once < 0.95 * error(W, run(qera, W, quantizer, 8, blind), gram), "than repair that does not know the inputs"
    rounded = round_with_feedback(W, quantizer, feedback_of(gram))
    assert brute_error(W - dequantize(rounded), gram) < 0.8 * plain, "by feedback alone"


def test_more_alternations_never_lose() -> None:
    W, gram, quantizer = weight(96, 160), correlated(160), Uniform(2, 32)
    runs = [run(cloq, W, quantizer, 16, gram, iters=iters) for iters in range(6)]
    errors = [error(W, d, gram) for d in runs]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(errors))
    assert errors[5] < 0.99 * errors[1] < 0.99 * errors[0], "the alternation pays"
    assert [int(d.iterations) for d in runs][:2] == [0, 1]
    best = int(runs[5].iterations)
    assert torch.equal(runs[best].quantized.codes, runs[5].quantized.codes), "codes of that very alternation"
    assert torch.equal(runs[best].factors.lora_A, runs[5].factors.lora_A), "and its factors"


@pytest.mark.parametrize("good", [2, 3])
def test_the_best_alternation_is_kept(good: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("loftq_cli.methods.cloq")
    calls: list[int] = []

    def faltering(target: Tensor, quantizer: Quantizer, feedback: Tensor) -> object:
        calls.append(1)
        return round_with_feedback(target if len(calls) == good else target * 0.98, quantizer, feedback)

    monkeypatch.setattr(module, "round_with_feedback", faltering)
    W, gram = weight(48, 64), correlated(64)
    assert run(cloq, W, Uniform(4, 32), 4, gram, iters=good - 1).iterations == good - 1, "the others help, too"
    calls.clear()
    d = run(cloq, W, Uniform(4, 32), 4, gram, iters=4)
    assert d.iterations == good
    assert error(W, d, gram) < plain_error(W, Uniform(4, 32), gram)


@pytest.mark.parametrize("method", METHODS)
def test_full_rank_repairs_everything(method: str) -> None:
    for shape in ((48, 64), (64, 48), (1, 1), (3, 5)):
        W, gram = weight(*shape), correlated(shape[1])
        d = run(GRAM_METHODS[method], W, Uniform(2, 64), min(shape), gram, iters=2)
        assert error(W, d, gram) < 1e-9 * brute_error(W, gram)


@pytest.mark.parametrize("method", METHODS)
def test_the_start_is_qloras_where_nothing_is_left_to_repair(method: str) -> None:
    W = torch.randint(-1, 3, (48, 64), generator=torch.Generator().manual_seed(0)).float()  # the 2-bit grid of scale 1
    W[:, 0], W[:, 1] = -1, 2
    d = run(GRAM_METHODS[method], W, Uniform(2, 64), 4, correlated(64))
    assert d.iterations == 0
    assert not d.factors.lora_B.any()
    assert torch.equal(dequantize(d.quantized), W)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_its_weights_one_by_one(method: str, exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram_module, "LARGEST_EXACT", 1024 if exact else 0)
    gram = correlated(96)
    batch = torch.stack([weight(64, 96), 0.02 * weight(64, 96, seed=1), torch.zeros(64, 96), weight(64, 96, seed=2)])
    batch[3, 5] = torch.nan
    d = GRAM_METHODS[method](batch, Uniform(2, 32), 8, inputs=Inputs(gram), iters=3, seeds=[1, 2, 3, 4])
    assert d.quantized.shape == (256, 96)
    assert d.iterations[2:].tolist() == [0, 0], "nothing to repair, and beyond repair"
    for i in range(2):
        alone = run(GRAM_METHODS[method], batch[i], Uniform(2, 32), 8, gram, iters=3, seed=i + 1)
        assert d.iterations[i] > 0
        assert error(batch[i], d, gram, i) == pytest.approx(error(batch[i], alone, gram), rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_weights_may_come_in_half_precision(method: str) -> None:
    W, gram = weight(48, 64).bfloat16(), correlated(64)
    ours, wide = (run(GRAM_METHODS[method], x, Uniform(2, 32), 4, gram, iters=2) for x in (W, W.float()))
    assert torch.equal(ours.quantized.codes, wide.quantized.codes)
    assert torch.equal(ours.factors.lora_A, wide.factors.lora_A)


@pytest.mark.parametrize("method", METHODS)
def test_the_factors_repair_the_values_as_stored(method: str) -> None:
    W, gram = weight(48, 64), correlated(64)
    d = run(GRAM_METHODS[method], W, Uniform(4, 32, dtype=torch.bfloat16), 16, gram, iters=1)
    least = least_errors(W - dequantize(d.quantized), gram, 16)
    assert error(W, d, gram) == pytest.approx(least, rel=1e-5)


def test_cloq_refuses_blocks_that_leave_their_row() -> None:
    with pytest.raises(ValueError, match="along each row"):
        run(cloq, weight(48, 80), NormalFloat(4), 4, correlated(80))
    assert run(qera, weight(48, 80), NormalFloat(4), 4, correlated(80)).iterations == 1, "which qera does not mind"


@pytest.mark.parametrize(
    "quantizer",
    [
        Lloyd(2, 64),
        Lloyd(3, 48, torch.bfloat16),
        Lloyd(4, -1, double_quant=True),
        NormalFloatSearch(3, 32),
        NormalFloat(2, 32, scale_dtype=torch.float16),
        NormalFloat(4, 64, double_quant=True),
    ],
    ids=str,
)
def test_cloq_takes_codebooks(quantizer: Quantizer) -> None:
    """Factors are the best for the values stored; the alternation pays; other weights of a batch change nothing."""
    W, gram = weight(96, 128), correlated(128)
    d = run(cloq, W, quantizer, 8, gram)
    assert d.quantized.zero_point is None
    least = least_errors(W - dequantize(d.quantized), gram, 8)
    assert error(W, d, gram) == pytest.approx(least, rel=1e-4)
    assert error(W, d, gram) < 0.8 * error(W, run(qera, W, quantizer, 8, gram), gram)
    assert error(W, d, gram) <= error(W, run(cloq, W, quantizer, 8, gram, iters=1), gram)
    if quantizer.empty(1, 128).nested is not None:
        return
    batch = torch.stack([W, torch.zeros(96, 128), weight(96, 128, seed=1)])
    together = cloq(batch, quantizer, 8, inputs=Inputs(gram), iters=5, seeds=[0, 1, 2])
    assert together.iterations[1] == 0, "nothing to repair"
    assert error(W, together, gram) == pytest.approx(error(W, d, gram), rel=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 300),
    rank=st.integers(1, 12),
    group_size=st.sampled_from([-1, 16, 32, 48, 100, 128, 256]),
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    tokens=st.integers(1, 400),
)
def test_any_shape(m: int, n: int, rank: int, group_size: int, bits: int, symmetric: bool, tokens: int) -> None:
    """Ragged last groups, blocks and groups of every alignment, more rank than there is, Grams of few tokens."""
    quantizer = (UniformSymmetric if symmetric else Uniform)(bits, group_size)
    W, gram = weight(m, n), correlated(n, tokens)
    plain, tolerance = plain_error(W, quantizer, gram), 1e-9 * brute_error(W, gram)
    for method in (qera, cloq):
        d = run(method, W, quantizer, rank, gram, iters=2)
        least = least_errors(W - dequantize(d.quantized), gram, rank)
        if d.iterations > 0:
            assert error(W, d, gram) <= least * 1.001 + tolerance
        assert error(W, d, gram) <= plain * (1 + 1e-6) + tolerance
    ours = round_with_feedback(W, quantizer, feedback_of(gram))
    assert ours.scale.shape == quantizer.empty(m, n).scale.shape
    codes = gptq(W, quantizer, gram)
    first = ours.group_size if group_size != -1 and ours.group_size < n else n
    assert torch.equal(ours.scale[:, 0], quantizer.quantize(W[:, :first]).scale[:, 0])
    assert (ours.codes == codes).all(1).double().mean() >= 1 - max(2, 0.25 * m) / m


def test_a_factor_of_nan_is_no_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuSOLVER was seen to return NaN, and no error, for a Gram that is nearly singular."""
    gram, honest, calls = correlated(32).float(), torch.linalg.cholesky_ex, [0]

    def lying(H: Tensor) -> tuple[Tensor, Tensor]:
        calls[0] += 1
        factor, info = honest(H)
        return (torch.full_like(factor, torch.nan) if calls[0] == 1 else factor), torch.zeros_like(info)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", lying)
    root = square_root(gram)
    assert calls[0] == 2
    torch.testing.assert_close(root @ root.mT, (gram / gram.diagonal().mean()), rtol=1e-4, atol=1e-5)


@given(st.integers(0, 2**31), st.floats(0, 0.5))
@settings(max_examples=20, deadline=None)
def test_the_target_is_the_least_squares_solution(seed: int, drift: float) -> None:
    """T minimises ‖W x − T x̂‖² + λ ‖T − W‖², by which it stays near W where little is known (normal equations)."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(80, 24, generator=g, dtype=torch.float64) @ torch.randn(24, 24, generator=g, dtype=torch.float64)
    ours = x + drift * torch.randn(80, 24, generator=g, dtype=torch.float64)
    W = weight(16, 24, seed)
    inputs = Inputs((ours.mT @ ours / 80).float(), ((x - ours).mT @ ours / 80).float())
    T = inputs.target(W[None])[0].double()
    damping = importlib.import_module("loftq_cli.methods.inputs").DAMPING * float((ours * ours).sum() / 80 / 24)
    gradient = (T @ ours.mT - W.double() @ x.mT) @ ours / 80 + damping * (T - W.double())
    assert gradient.norm() < 1e-4 * (W.double() @ x.mT @ ours / 80).norm()
    assert torch.equal(Inputs(inputs.gram).target(W[None]), W[None])
