"""A weight while it is trained: what it computes is what it becomes, and its gradients are those of what it rounds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from loftq_cli.methods import METHODS, Inputs, qera
from loftq_cli.methods.apiq import fit_layer
from loftq_cli.methods.base import Decomposition
from loftq_cli.methods.trained import TrainedWeight
from loftq_cli.methods.training import Training
from loftq_cli.quantizers import Lloyd, NormalFloat, NormalFloatSearch, Uniform, UniformSymmetric, dequantize

F16, BF16 = torch.float16, torch.bfloat16
CODEBOOKS = [
    Lloyd(2, 32),
    Lloyd(3, 48, BF16),  # the last group of a row is short
    NormalFloatSearch(4, -1),
    NormalFloat(2, 32, F16, scale_dtype=F16),
    NormalFloat(4, 32),
    Lloyd(3, 32, double_quant=True),
    NormalFloat(4, 64, double_quant=True),
]
GRIDS = [Uniform(2, 48), UniformSymmetric(4, 32, BF16)]


def weight(m: int = 24, n: int = 128, seed: int = 0) -> Tensor:
    W = torch.randn(m, n, generator=torch.Generator().manual_seed(seed)) * 0.02
    W[3], W[4, :64] = 0, 0  # groups whose scale is zero
    return W


def begun(quantizer: Any, W: Tensor, *, clip: bool = False, codes: bool = False, alpha: float = 0.5) -> TrainedWeight:
    """From a start with factors that repair something, of rank 4."""
    return TrainedWeight(W, METHODS["loftq"](W[None], quantizer, 4, iters=2, seeds=[0]), alpha, clip=clip, codes=codes)


def disturbed(trained: TrainedWeight, seed: int = 1) -> TrainedWeight:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(
                0.3 * parameter.abs().mean().clamp_min(0.3) * torch.randn(parameter.shape, generator=generator)
            )
    return trained


def nearest(x: Tensor, levels: Tensor) -> Tensor:
    return (x.double()[..., None] - levels.double()).abs().argmin(-1)


def scale_of_each(trained: TrainedWeight, made: Decomposition) -> Tensor:
    q = made.quantized
    return q.scale.float().view(q.shape[0], -1).repeat_interleave(q.group_size, 1)[:, : q.shape[1]]


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("quantizer", GRIDS + CODEBOOKS, ids=str)
def test_it_begins_as_its_start(quantizer: Any, codes: bool) -> None:
    W = weight()
    trained = begun(quantizer, W, codes=codes)
    start = trained._start.quantized
    made = trained.decomposition().quantized
    assert torch.equal(made.codes[W != 0], start.codes[W != 0])
    # scales of float32 are rounded to float16, and scales in 8 bits about their mean once more
    once_more = 0.01 * float(start.scale.max() - start.scale.min()) if start.nested is not None else 0
    near, tiny = (1e-3, 2.0**-24) if start.scale.dtype == torch.float32 else (0, 0)  # below it float16 has none
    torch.testing.assert_close(dequantize(made), dequantize(start), rtol=near, atol=once_more + tiny)


@pytest.mark.parametrize(("clip", "codes"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("quantizer", GRIDS + CODEBOOKS, ids=str)
def test_what_it_computes_is_what_is_stored(quantizer: Any, clip: bool, codes: bool) -> None:
    W = weight()
    trained = disturbed(begun(quantizer, W, clip=clip, codes=codes))
    made = trained.decomposition()
    q, like = made.quantized, quantizer.empty(*W.shape)
    assert torch.equal(dequantize(q), trained.base().detach())
    whole = dequantize(q) + made.factors.lora_B[0] @ made.factors.lora_A[0]
    torch.testing.assert_close(whole, trained().detach())
    assert (q.codes.shape, q.codes.dtype, q.codes.max() < 2**quantizer.bits) == (W.shape, torch.uint8, True)
    assert (q.scale.shape, q.scale.dtype) == (like.scale.shape, like.scale.dtype)
    if like.nested is None:
        assert torch.equal(q.scale.half().to(q.scale.dtype), q.scale), "as any format has them"
    else:
        assert q.nested is not None
        blocks = q.nested.absmax.repeat_interleave(256)[: q.scale.numel()]
        assert torch.equal(q.scale.view(-1), q.nested.codebook[q.nested.codes.int()] * blocks + q.nested.offset)
    start = trained._start.quantized
    assert not torch.equal(q.scale, start.scale)
    assert torch.equal(q.codes, start.codes) == (not clip and not codes)


@pytest.mark.parametrize("quantizer", CODEBOOKS, ids=str)
def test_codes_are_of_the_nearest_levels(quantizer: Any) -> None:
    """To the real numbers that train, in units of the mean distance of levels; or to the weights over their scales."""
    W = weight()
    for clip in (False, True):
        trained = disturbed(begun(quantizer, W, clip=clip, codes=not clip))
        made = trained.decomposition()
        levels, scale = made.quantized.codebook, scale_of_each(trained, made)
        assert levels is not None
        if clip:
            real = W / scale
        else:
            assert trained.codes is not None
            real = trained.codes.detach().flatten(1)[:, : W.shape[1]] * levels.diff().mean()
        live = scale != 0
        wanted = nearest(real, levels)
        assert (made.quantized.codes[live] == wanted[live]).double().mean() > 0.999


@pytest.mark.parametrize("quantizer", [Lloyd(2, 32), NormalFloat(4, 32)], ids=str)
def test_gradients_pass_through_rounding(quantizer: Any) -> None:
    W = weight()
    for clip in (False, True):
        trained = begun(quantizer, W, clip=clip, codes=not clip)
        made = trained.decomposition()
        q, scale = made.quantized, scale_of_each(trained, made)
        assert q.codebook is not None
        pull = torch.randn(W.shape, generator=torch.Generator().manual_seed(5))
        (trained.base() * pull).sum().backward()
        value, inside = q.codebook[q.codes.int()] * scale, torch.ones_like(W, dtype=torch.bool)
        if clip:  # d (level(w / s) s) / d ln s, with d level(x) / d x = 1 but beyond the outermost levels
            first, last = q.codebook[:2], q.codebook[-2:]
            x = W / scale.where(scale != 0, 1)
            inside = (x > first[0] - first.diff() / 2) & (x < last[1] + last.diff() / 2)
            value = value - torch.where(inside, W, 0)
        else:
            assert trained.codes is not None
            assert trained.codes.grad is not None
            torch.testing.assert_close(trained.codes.grad.flatten(1), pull * scale * q.codebook.diff().mean())
        assert trained.grid.grad is not None
        expected = (pull * value).unflatten(1, (-1, 32)).sum(2)
        torch.testing.assert_close(trained.grid.grad[0], expected, rtol=1e-3, atol=1e-5)


def as_codebook(start: Decomposition) -> Decomposition:
    """The same values, of a codebook with half the step and a scale that is twice as large."""
    q = start.quantized
    levels = (torch.arange(2.0**q.bits) - 2 ** (q.bits - 1)) / 2
    return replace(start, quantized=replace(q, codebook=levels, zero_point=None, scale=q.scale * 2, symmetric=False))


@pytest.mark.parametrize(("clip", "codes"), [(False, False), (False, True), (True, False)])
def test_a_codebook_that_is_a_grid_trains_as_the_grid(clip: bool, codes: bool) -> None:
    W, gram = weight()[5:], torch.eye(128) + 0.5
    start = METHODS["qlora"](W[None], UniformSymmetric(3, 32), 4, iters=1, seeds=[0])
    made = []
    for begin in (start, as_codebook(start)):
        trained = TrainedWeight(W, begin, 1.0, clip=clip, codes=codes)
        fit = fit_layer(W, trained, Inputs(gram), Inputs(gram), 5, Training(4, 1e-3, 5e-3, 2e-2))
        assert fit.after < 0.95 * fit.before
        made.append(trained.decomposition())
    one, two = (dequantize(of.quantized) for of in made)
    assert not torch.equal(one, dequantize(start.quantized))
    if codes:  # a grid's outermost codes have half a gradient
        assert (made[0].quantized.codes == made[1].quantized.codes).double().mean() > 0.97
    else:
        torch.testing.assert_close(one, two, rtol=2e-3, atol=1e-6)
        torch.testing.assert_close(made[0].factors.product(), made[1].factors.product(), rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("quantizer", GRIDS + CODEBOOKS, ids=str)
def test_training_pays(quantizer: Any) -> None:
    """Beyond the closed form it begins with, and with codes beyond scales alone, by as much as for a grid."""
    W, generator = weight(), torch.Generator().manual_seed(1)
    x = torch.randn(400, 16, generator=generator) @ torch.randn(16, 128, generator=generator)
    x += 0.3 * torch.randn(x.shape, generator=generator)
    inputs = Inputs(x.T @ x / 400)
    start = qera(W[None], quantizer, 4, inputs=inputs, iters=1, seeds=[0])
    after = []
    for codes in (False, True):
        trained = TrainedWeight(W, start, 1.0, clip=False, codes=codes)
        fit = fit_layer(W, trained, inputs, inputs, 10, Training(5, 1e-4, 1e-3, 5e-3))
        assert fit.skipped == 0
        after.append(fit.after / fit.before)
    assert after[1] < 0.65
    assert after[0] < 0.96


def test_a_layer_makes_up_for_what_others_lost() -> None:
    """Its loss is that of outputs on inputs that have drifted, in float64 of the inputs themselves, but for a constant.

    So training comes nearer to the source's outputs than on what enters alone.
    """
    W, generator = weight(), torch.Generator().manual_seed(1)
    ours = torch.randn(400, 16, generator=generator) @ torch.randn(16, 128, generator=generator)
    ours += 0.3 * torch.randn(ours.shape, generator=generator)
    source = ours + 0.05 * ours @ torch.randn(128, 128, generator=generator)  # x, where x̂ enters
    gram, drift = ours.T @ ours / 400, (source - ours).T @ ours / 400
    start = qera(W[None], Uniform(2, 64), 4, inputs=Inputs(gram), iters=1, seeds=[0])

    def error(weight: Tensor) -> float:
        """‖X Wᵀ − X̂ Ŵᵀ‖² / ‖X̂ Wᵀ‖²."""
        x, entered, wanted = (tensor.double() for tensor in (source, ours, W))
        return float((x @ wanted.T - entered @ weight.double().T).square().sum() / (entered @ wanted.T).square().sum())

    def train(inputs: Inputs) -> tuple[Any, float, float]:
        trained = TrainedWeight(W, start, 1.0, clip=False, codes=False)
        before = error(trained().detach())
        return fit_layer(W, trained, inputs, inputs, 10, Training(5, 1e-3, 1e-3)), before, error(trained().detach())

    fit, before, after = train(Inputs(gram, drift))
    moved = (source - ours).double() @ W.double().T
    constant = float(moved.square().sum() / (ours.double() @ W.double().T).square().sum())
    assert (fit.before, fit.after) == pytest.approx((before - constant, after - constant), rel=1e-3)
    assert after < 0.9 * before
    assert after < 0.9 * train(Inputs(gram))[2]
