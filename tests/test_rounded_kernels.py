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
    """Some codes on the ends of the grid, and beyond: half a gradient there, or none."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(m, n, generator=generator) * 0.02
    W[3], W[4, :64] = 0, 0  # groups whose scale is zero
    made = METHODS["loftq"](W.to(DEVICE)[None], quantizer, 4, iters=2, seeds=[0])
    weight = TrainedWeight(W.to(DEVICE), made, 0.5, clip=False, codes=True)
    assert weight.codes is not None
    with torch.no_grad():
        weight.codes += torch.randn(weight.codes.shape, generator=generator).to(DEVICE)
        weight.codes[::3].round_()  # ties
        weight.codes[1::3] += 0.5 - weight.codes[1::3].frac()  # between two of them
        weight.grid += 0.1 * torch.randn(weight.grid.shape, generator=generator).to(DEVICE)
    return weight


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_values_and_gradients_are_the_twins_to_the_last_bit(
    quantizer: Any, fast: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    if INTERPRETED and quantizer.dtype == BF16:
        return  # the interpreter cuts bfloat16 off where it should round
    weight = begun(quantizer)
    pull = torch.randn(40, 256, generator=torch.Generator().manual_seed(5)).to(DEVICE)

    def computed(values: Tensor) -> list[Tensor]:
        weight.zero_grad(set_to_none=True)
        (values * pull).sum().backward()
        assert weight.codes is not None
        assert weight.codes.grad is not None
        assert weight.grid.grad is not None
        return [values.detach(), weight.codes.grad, weight.grid.grad]

    ours = computed(weight._ungrouped(weight._fused(fast)))
    monkeypatch.setattr(trained, "fused", lambda: None)
    twin = computed(weight.base())
    assert 0 < (twin[1] == 0).double().mean() < 0.9, "some are beyond the ends"
    for one, other in zip(ours, twin, strict=True):
        assert torch.equal(one, other)


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
