"""The fused rounding of codes that train equals its torch twin, gradients included.

`TRITON_INTERPRET=1` runs this file on a CPU, slowly.
"""

from __future__ import annotations

import contextlib
import os
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from loftq_cli import kernels
from loftq_cli.methods import METHODS, Inputs, trained
from loftq_cli.methods.apiq import fit_layer
from loftq_cli.methods.trained import TrainedWeight
from loftq_cli.methods.training import Training
from loftq_cli.quantizers import Lloyd, NormalFloat, NormalFloatSearch, Uniform, UniformSymmetric, dequantize

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() and not INTERPRETED, reason="needs an NVIDIA GPU"),
]

F16, BF16 = torch.float16, torch.bfloat16
QUANTIZERS = [
    Uniform(2, 64),
    Uniform(3, 48, F16),  # the last group of a row is short
    Uniform(4, -1),
    Uniform(2, 64, BF16),
    UniformSymmetric(4, 32),
    UniformSymmetric(2, 128, BF16),
    Lloyd(2, 32),
    Lloyd(2, 64, BF16),
    Lloyd(3, 48, F16),
    NormalFloatSearch(4, -1),
    NormalFloat(4, 64, double_quant=True),
]


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if INTERPRETED:
        monkeypatch.setattr(torch.cuda, "device_of", lambda _: contextlib.nullcontext())
    else:
        assert kernels.fused() is not None
    from loftq_cli.kernels import rounded

    return rounded


def begun(quantizer: Any, m: int = 40, n: int = 256) -> TrainedWeight:
    """Codes on the ends, where gradients halve or end, beyond them, and half-way from one to the next."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(m, n, generator=generator) * 0.02
    W[3], W[4, :64] = 0, 0  # groups whose scale is zero
    made = METHODS["loftq"](W.to(DEVICE)[None], quantizer, 4, iters=2, seeds=[0])
    weight = TrainedWeight(W.to(DEVICE), made, 0.5, clip=False, codes=True)
    assert weight.codes is not None
    with torch.no_grad():
        weight.codes += torch.randn(weight.codes.shape, generator=generator).to(DEVICE)
        weight.grid += 0.1 * torch.randn(weight.grid.shape, generator=generator).to(DEVICE)
        if weight._levels is None:
            weight.codes[::3].round_()
            weight.codes[1::3] += 0.5 - weight.codes[1::3].frac()
        else:
            _, middles, constants = weight._levels.parts
            ties = exactly(torch.cat([middles, constants[:2]]), constants[2])
            assert len(ties) >= 3
            weight.codes[0].view(-1)[: len(ties)] = ties
    return weight


def exactly(wanted: Tensor, step: Tensor) -> Tensor:
    """Codes that are one of `wanted` in steps, of those for which there is one."""
    near = wanted / step
    near = torch.cat([near, near.nextafter(near + 1), near.nextafter(near - 1)])
    return near[torch.isin(near * step, wanted)]


def computed(weight: TrainedWeight, values: Tensor, pull: Tensor) -> list[Tensor]:
    """The values, and the gradients of codes and scales of a sum of them, each times its `pull`."""
    weight.zero_grad(set_to_none=True)
    values.backward(pull)
    assert weight.codes is not None
    assert weight.codes.grad is not None
    assert weight.grid.grad is not None
    return [values.detach(), weight.codes.grad, weight.grid.grad]


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_values_and_gradients_are_the_twins_to_the_last_bit(
    quantizer: Any, fast: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    if INTERPRETED and quantizer.dtype == BF16:
        pytest.skip("the interpreter cuts bfloat16 off where it should round")
    weight = begun(quantizer)
    pull = torch.randn(40, 256, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    ours = computed(weight, weight._ungrouped(weight._fused(fast)), pull)
    monkeypatch.setattr(trained, "fused", lambda: None)
    twin = computed(weight, weight.base(), pull)
    assert 0 < (twin[1] == 0).double().mean() < 0.9, "some are beyond the ends"
    for one, other in zip(ours, twin, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("quantizer", [Uniform(2, 64), Lloyd(3, 48, F16)], ids=str)
def test_gradients_of_any_layout_and_size(quantizer: Any, fast: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transposed; and infinite, so that training skips the step, but for codes that are beyond the ends."""
    weight = begun(quantizer)
    pull = torch.randn(256, 40, generator=torch.Generator().manual_seed(5)).to(DEVICE).mT
    pull[::2] *= 1e30
    pull[1, :80], pull[2, ::7], pull[5, ::9] = torch.inf, torch.nan, 1e-42
    ours = computed(weight, weight._ungrouped(weight._fused(fast)), pull)
    monkeypatch.setattr(trained, "fused", lambda: None)
    twin = computed(weight, weight.base(), pull)
    assert not twin[1].isfinite().all()
    torch.testing.assert_close(ours[1], twin[1], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(ours[2], twin[2], rtol=1e-5, atol=0, equal_nan=True)  # another order of the sum


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU to be chosen")
@pytest.mark.parametrize("quantizer", [Uniform(2, 64, BF16), Lloyd(3, 48)], ids=str)
def test_training_comes_to_the_same_bytes(quantizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made, W = [], torch.randn(64, 256, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    gram = torch.eye(256, device=DEVICE) + 0.5
    for use in (kernels.fused(), None):
        called: list[int] = []
        kernel = None if use is None else use._replace(rounded=Counted(use.rounded, called))
        monkeypatch.setattr(trained, "fused", lambda kernel=kernel: kernel)
        weight = begun(quantizer, 64)
        fit_layer(W, weight, Inputs(gram), Inputs(gram), 5, Training(2, 1e-3, 1e-3, 5e-3))
        assert bool(called) == (use is not None)
        made.append(weight.decomposition())
    one, two = made
    assert torch.equal(dequantize(one.quantized), dequantize(two.quantized))
    assert torch.equal(one.factors.product(), two.factors.product())


class Counted:
    """A module whose calls are counted."""

    def __init__(self, module: Any, called: list[int]) -> None:
        self.module, self.called = module, called

    def __getattr__(self, name: str) -> Any:
        self.called.append(1)
        return getattr(self.module, name)
