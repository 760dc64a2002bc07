"""The kernels of packed weights are their torch twin. `TRITON_INTERPRET=1` runs this file on a CPU, slowly."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from loftq_cli.kernels.packed import Packed
from loftq_cli.quantizers.nested import dynamic_codebook, nest
from loftq_cli.quantizers.packing import pack
from loftq_cli.runtime import PackedLinear, Scheme
from loftq_cli.runtime.unpacking import by_torch, dequantize, fused, multiply

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() and not INTERPRETED, reason="needs an NVIDIA GPU"),
]

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = [F32, F16] if INTERPRETED else [F32, F16, BF16]  # the interpreter cuts bfloat16 off where it should round
GRIDS = ("codebook", "affine", "symmetric")
SHAPES = [(1, 1), (3, 5), (17, 130), (33, 520), (8, 1500)]


@pytest.fixture(autouse=True)
def run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    if not INTERPRETED:
        assert fused(torch.device("cuda", 0)) is not None
        return
    from loftq_cli.kernels.product import MOST_INPUTS
    from loftq_cli.kernels.product import multiply as multiply_kernel
    from loftq_cli.kernels.unpack import unpack_weight
    from loftq_cli.runtime import unpacking

    monkeypatch.setattr(torch.cuda, "device_of", lambda _: contextlib.nullcontext())
    kernels = unpacking.Kernels(unpack_weight, multiply_kernel, MOST_INPUTS)
    monkeypatch.setattr(unpacking, "fused", lambda _: kernels)


def example(m: int, n: int, bits: int, g: int, grid: str, nested: bool) -> Packed:
    """On the CPU, with random codes and scales of either sign."""
    generator = torch.Generator().manual_seed(m + n + bits + g)
    groups = -(-n // g)

    def codes(rows: int, columns: int) -> Tensor:
        return pack(torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator), bits)

    scale = torch.randn(m, groups, generator=generator).half()
    packed = Packed((m, n), bits, g, codes(m, n), scale)
    if nested:
        made = nest(scale.float().view(-1))
        packed = packed._replace(
            scale=made.codes.view(m, groups), absmax=made.absmax, offset=made.offset.view(1),
            levels=dynamic_codebook(),
        )  # fmt: skip
    if grid == "affine":
        packed = packed._replace(zero_point=codes(1, m * groups)[0])
    if grid == "codebook":
        packed = packed._replace(codebook=torch.randn(2**bits, generator=generator).sort()[0])
    return packed


def there(packed: Packed) -> Packed:
    return packed._replace(**{k: t.to(DEVICE) for k, t in packed._asdict().items() if isinstance(t, Tensor)})


@pytest.mark.parametrize("nested", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_unpacked_weights_are_the_twins(bits: int, grid: str, nested: bool) -> None:
    for m, n in SHAPES:
        for g in {32, 64, 256, n} if not INTERPRETED else {64, n}:
            packed = example(m, n, bits, g, grid, nested)
            for dtype in DTYPES:
                ours = dequantize(there(packed), dtype)
                assert ours.dtype == dtype
                assert torch.equal(ours.cpu(), by_torch(packed, dtype)), (m, n, g, dtype)


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_product_with_few_inputs_is_the_twins(bits: int, grid: str, with_bias: bool) -> None:
    for (m, n), inputs in zip(SHAPES, (1, 3, 2, 1, 3), strict=True):
        packed = example(m, n, bits, 64, grid, nested=bits == 2)
        for dtype in DTYPES:
            x = torch.randn(1, inputs, n).to(dtype)
            bias = torch.randn(m).to(dtype) if with_bias else None
            ours = multiply(x.to(DEVICE), there(packed), None if bias is None else bias.to(DEVICE))
            assert ours.shape == (1, inputs, m)
            assert ours.dtype == dtype
            W = by_torch(packed, F32).double()
            wanted = x.double() @ W.T + (0 if bias is None else bias.double())
            size = x.double().abs() @ W.abs().T + 1
            unit = {F32: 2**-22, F16: 2**-10, BF16: 2**-7}[dtype]
            sums = 2**-16 if (bits, grid) == (3, "codebook") and dtype != F32 else 2**-21  # levels on a polynomial
            assert ((ours.cpu().double() - wanted).abs() <= unit * wanted.abs() + sums * size).all(), (m, n, dtype)


@pytest.mark.parametrize("g", [24, 40, 130])
def test_a_product_where_groups_end_within_words(g: int) -> None:
    packed = example(17, 130, 2, g, "codebook", nested=False)
    x = torch.randn(2, 130)
    wanted = x @ by_torch(packed, F32).T
    assert torch.allclose(multiply(x.to(DEVICE), there(packed), None).cpu(), wanted, rtol=1e-4, atol=1e-4)


def test_strided_inputs_and_nothing_to_multiply() -> None:
    packed = there(example(33, 520, 3, 64, "affine", nested=False))
    x = torch.randn(520, 3, device=DEVICE)
    assert torch.equal(multiply(x.T, packed, None), multiply(x.T.contiguous(), packed, None))
    assert multiply(x.T[:0], packed, None).shape == (0, 33)


@pytest.mark.parametrize("inputs", [1, 9])
def test_the_layer_uses_them_in_both_directions(inputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from loftq_cli.runtime import unpacking

    layer = PackedLinear(96, 40, True, Scheme(3, 32, "codebook"), F32)
    packed = example(40, 96, 3, 32, "codebook", nested=False)
    layer.codes, layer.scale, layer.codebook = packed.codes, packed.scale, packed.codebook
    torch.nn.init.normal_(layer.bias)
    W, bias = layer.dequantize(F32).cpu(), layer.bias.detach().clone()
    layer.to(DEVICE)
    monkeypatch.setattr(unpacking, "by_torch", lambda *_: pytest.fail("not fused"))
    x = torch.randn(inputs, 96)
    ours = x.to(DEVICE).requires_grad_()
    output = layer(ours)
    assert torch.allclose(output.cpu(), x @ W.T + bias, atol=1e-4)
    output.square().sum().backward()
    assert torch.allclose(ours.grad.cpu(), 2 * (x @ W.T + bias) @ W, atol=1e-2)
    with torch.no_grad():
        assert torch.allclose(layer(ours).cpu(), x @ W.T + bias, atol=1e-4)


@pytest.mark.skipif(INTERPRETED, reason="too large for the interpreter")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_large_weights(bits: int) -> None:
    packed = example(4100, 11008, bits, 64, "codebook", nested=True)
    for dtype in DTYPES:
        ours = dequantize(there(packed), dtype)
        assert torch.equal(ours.cpu(), by_torch(packed, dtype))
        x = torch.randn(1, 11008, device=DEVICE, dtype=dtype)
        wanted = x.double() @ ours.double().T
        assert (multiply(x, there(packed), None).double() - wanted).norm() <= 1e-2 * wanted.norm()


@pytest.mark.skipif(INTERPRETED, reason="about a GPU")
def test_no_more_than_one_dense_weight_at_a_time() -> None:
    """Sixteen layers, forward and backward: the peak holds one dense weight of them, and no other copy of one."""
    m = n = 2048
    layers: list[Any] = []
    for _ in range(16):
        layer = PackedLinear(n, m, False, Scheme(2, 64, "codebook"), BF16)
        packed = example(m, n, 2, 64, "codebook", nested=False)
        layer.codes, layer.scale, layer.codebook = packed.codes, packed.scale / 50, packed.codebook
        layers.append(layer.to(DEVICE))
    x = torch.randn(4, n, device=DEVICE, dtype=BF16, requires_grad=True)
    torch.nn.Sequential(*layers)(x).float().sum().backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.nn.Sequential(*layers)(x).float().sum().backward()
    torch.cuda.synchronize()
    dense_bytes = 2 * m * n
    assert torch.cuda.max_memory_allocated() - before < 1.5 * dense_bytes
