"""The fused kernels are their torch twins, but for ties. `TRITON_INTERPRET=1` runs this file on a CPU, slowly."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from loftq_cli import kernels
from loftq_cli.quantizers import NormalFloat, QuantizedWeight, Uniform, UniformSymmetric, base, normal_float, uniform
from loftq_cli.quantizers.base import dequantize, quantize_residual

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() and not INTERPRETED, reason="needs an NVIDIA GPU"),
]

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# quantizer, (batch, m, n), rank (0: no product), dtype of W
CASES = [
    (Uniform(2, 64, F16), (1, 129, 512), 0, BF16),
    (Uniform(2, 64, F16), (2, 129, 512), 16, BF16),
    (Uniform(3, 16, F32), (3, 7, 256), 1, F32),
    (Uniform(3, 32), (1, 131, 192), 40, F16),
    (Uniform(4, 128, BF16), (2, 33, 512), 64, F32),
    (Uniform(8, 256, F16), (1, 17, 512), 64, BF16),
    (Uniform(2, 512), (1, 9, 1024), 40, BF16),
    (Uniform(2, -1, F16), (2, 3, 4096), 0, BF16),
    (Uniform(4, 100), (2, 5, 330), 5, BF16),  # no power of two, and a short last group
    (UniformSymmetric(2, 64), (3, 65, 256), 16, BF16),
    (UniformSymmetric(3, 128, F16), (1, 1, 384), 64, F32),
    (UniformSymmetric(4, 64, BF16), (1, 63, 256), 1, F16),
    (UniformSymmetric(8, 32, F16), (2, 31, 128), 40, BF16),
    (NormalFloat(2, 64, F16), (3, 65, 256), 16, BF16),
    (NormalFloat(3, 128), (1, 33, 384), 64, F32),
    (NormalFloat(4, 64, BF16), (2, 129, 256), 40, BF16),
    (NormalFloat(4, 64, F16), (1, 129, 256), 0, F16),
    (NormalFloat(4, 64, F16, double_quant=True), (1, 65, 256), 16, BF16),
    (NormalFloat(4, 16), (1, 300, 64), 1, F32),
    (NormalFloat(2, 64, BF16, scale_dtype=F16), (2, 129, 256), 16, BF16),
    (NormalFloat(3, 32, F32, scale_dtype=F16), (1, 33, 96), 0, F32),
    (NormalFloat(2, -1), (1, 3, 100), 2, F32),
]


@pytest.fixture(autouse=True)
def run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    if not INTERPRETED:
        assert kernels.fused() is not None
        return
    from loftq_cli.kernels import codebook, residual
    from loftq_cli.kernels import uniform as uniform_kernel

    monkeypatch.setattr(torch.cuda, "device_of", lambda _: contextlib.nullcontext())
    every = kernels.Kernels(uniform_kernel.uniform, codebook.codebook, residual.residual)
    for module in (base, normal_float, uniform):
        monkeypatch.setattr(module, "fused", lambda: every)


def example(shape: tuple[int, int, int], rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """W, lora_A, lora_B on the CPU, with some rows that are unlike the others."""
    generator = torch.Generator().manual_seed(rank)
    batch, m, n = shape
    W = torch.randn(shape, generator=generator) * torch.rand(shape, generator=generator).rsqrt() * 0.02
    if m > 6:
        W[:, 2], W[:, 3], W[:, 4], W[:, 5] = 0, 0.5, W[:, 4].abs(), W[:, 5] * 1e-3
    if rank == 0:
        return W.to(dtype), None, None
    lora_A = torch.randn(batch, rank, n, generator=generator) * 0.02
    return W.to(dtype), lora_A, torch.randn(batch, m, rank, generator=generator) * 0.2 / rank**0.5


def there(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.to(DEVICE)


def squared_error(target: Tensor, q: QuantizedWeight) -> float:
    return float((target - dequantize(q).double()).square().sum())


def assert_alike(ours: QuantizedWeight, twin: QuantizedWeight, target: Tensor) -> None:
    """Equal, but where the last bit of a product or of a sum decides.

    The twin with two roundings of the same product, on 3 M weights, differs from itself in at most 1 code of 3 M and
    1e-8 of the squared error; at 8 bits, where a step is small, in 1 of 50,000 and 7e-6.
    """
    g, count = ours.group_size, ours.codes.numel()
    eight = ours.bits == 8
    differ = int((ours.codes.cpu() != twin.codes).sum())
    assert differ <= count * (1e-4 if eight else 1e-5) + 2 * g  # two groups may choose otherwise
    tolerance = (1e-4 if eight else 1e-6) + g / count * 1e-2
    assert squared_error(target, ours) == pytest.approx(squared_error(target, twin), rel=tolerance)
    if ours.codebook is None:
        assert ours.zero_point is not None
        assert ours.scale.shape == ours.zero_point.shape == twin.scale.shape
    else:
        # nested scales are codes themselves, about a mean whose last bits depend on the order of its sum
        close = torch.isclose(ours.scale.cpu(), twin.scale, rtol=1e-5).double().mean()
        assert close > (0.98 if ours.nested else 1 - 1e-12)
        assert torch.equal(ours.codebook.cpu(), twin.codebook)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_quantized_and_residual_are_the_twins(case: tuple[Any, tuple[int, int, int], int, torch.dtype]) -> None:
    quantizer, shape, rank, dtype = case
    W, lora_A, lora_B = example(shape, rank, dtype)
    done = quantizer.fused_residual(there(W), there(lora_A), there(lora_B))
    assert done is not None, "not fused"
    ours, difference = done
    exact = W.double() if lora_A is None or lora_B is None else W.double() - lora_B.double() @ lora_A.double()
    with pytest.MonkeyPatch.context() as patch:
        for module in (base, normal_float, uniform):
            patch.setattr(module, "fused", lambda: None)
        twin, _ = quantize_residual(quantizer, W, lora_A, lora_B)
        own = W.float() - dequantize(ours).cpu().view(shape)

    assert (ours.shape, ours.dtype, ours.bits, ours.symmetric) == (twin.shape, twin.dtype, twin.bits, twin.symmetric)
    on_cpu = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in vars(ours).items()}
    assert_alike(QuantizedWeight(**on_cpu), twin, exact.view(-1, shape[2]))
    if lora_A is None and isinstance(quantizer, NormalFloat):
        assert torch.equal(ours.codes.cpu(), twin.codes)
        assert torch.equal(ours.scale.cpu(), twin.scale)
    if not (INTERPRETED and quantizer.dtype == BF16):  # the interpreter cuts bfloat16 off where it should round
        assert torch.equal(difference.cpu(), own)


@pytest.mark.parametrize("values", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize(
    ("quantizer", "shape"),
    [
        (Uniform(2, 64), (7, 256)),
        (Uniform(4, 64), (5, 130)),
        (UniformSymmetric(3, -1), (3, 2500)),
        (NormalFloat(4, 64), (9, 128)),
        (NormalFloat(2, 64), (7, 130)),  # groups span rows
        (NormalFloat(3, -1), (5, 1300)),
        (NormalFloat(4, 64, double_quant=True), (5, 130)),
    ],
    ids=str,
)
def test_residual_is_w_minus_dequantized(quantizer: Any, shape: tuple[int, int], values: torch.dtype) -> None:
    if INTERPRETED and values == BF16:
        pytest.skip("the interpreter cuts bfloat16 off where it should round")
    W = example((1, *shape), 0, BF16)[0][0]
    q = type(quantizer)(**{**vars(quantizer), "dtype": values}).quantize(W)
    moved = QuantizedWeight(**{k: there(v) if isinstance(v, Tensor) else v for k, v in vars(q).items()})
    every = base.fused()
    assert every is not None
    ours = every.residual(
        there(W), moved.codes, moved.scale, moved.zero_point, moved.codebook, moved.group_size, moved.dtype
    )
    assert torch.equal(ours.cpu(), W.float() - dequantize(q))


def test_a_batch_is_its_weights_one_by_one() -> None:
    W, lora_A, lora_B = (there(tensor) for tensor in example((3, 65, 256), 16, BF16))
    for quantizer in (Uniform(2, 64, F16), NormalFloat(4, 64, F16)):
        q, difference = quantizer.fused_residual(W, lora_A, lora_B)
        for i, one in enumerate(base.unstack(q, 3)):
            alone, residual = quantizer.fused_residual(W[i : i + 1], lora_A[i : i + 1], lora_B[i : i + 1])
            assert torch.equal(one.codes, alone.codes)
            assert torch.equal(one.scale, alone.scale)
            assert torch.equal(difference[i], residual[0])


def test_views_and_a_scale_beyond_fp16() -> None:
    W, lora_A, lora_B = (there(tensor) for tensor in example((1, 64, 128), 4, F32))
    quantizer = Uniform(3, 64)
    q, difference = quantizer.fused_residual(W, lora_A, lora_B)
    for same in (W.mT.contiguous().mT, torch.cat([W, W], 2)[:, :, :128]):
        again, other = quantizer.fused_residual(same, lora_A.mT.contiguous().mT, lora_B.mT.contiguous().mT)
        assert torch.equal(q.codes, again.codes)
        assert torch.equal(difference, other)
    W[0, 7, 64:] *= 1e8
    finite = torch.isfinite(quantizer.fused_residual(W, lora_A, lora_B)[1][0])
    assert not finite[7, 64:].any()
    finite[7, 64:] = True
    assert finite.all()


@pytest.mark.skipif(INTERPRETED, reason="too large for the interpreter")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", [Uniform, UniformSymmetric, NormalFloat])
def test_ties_are_rare_on_a_large_weight(kind: Any, bits: int) -> None:
    if kind is NormalFloat and bits == 8:
        return
    quantizer = kind(bits, 64, F16)
    W, lora_A, lora_B = example((1, 2050, 2048), 64, BF16)
    assert lora_A is not None
    assert lora_B is not None
    ours, difference = quantize_residual(quantizer, W.cuda(), lora_A.cuda(), lora_B.cuda())
    twin, residual = quantize_residual(quantizer, W, lora_A, lora_B)
    on_cpu = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in vars(ours).items()}
    assert_alike(QuantizedWeight(**on_cpu), twin, W[0].double() - lora_B[0].double() @ lora_A[0].double())
    assert difference.double().square().sum().item() == pytest.approx(residual.double().square().sum().item(), rel=1e-6)


@pytest.mark.skipif(INTERPRETED, reason="about a GPU")
@pytest.mark.parametrize("quantizer", [Uniform(2, 64), NormalFloat(4, double_quant=True), Uniform(2, 1024)], ids=str)
def test_nothing_waits_for_the_gpu(quantizer: Any) -> None:
    arguments = [there(tensor) for tensor in example((1, 64, 1024), 16, BF16)]
    quantize_residual(quantizer, *arguments)  # compiles, and copies the constants
    torch.cuda.set_sync_debug_mode("error")
    try:
        q, _ = quantize_residual(quantizer, *arguments)
        base.residual(arguments[0][0], q)
    finally:
        torch.cuda.set_sync_debug_mode("default")
