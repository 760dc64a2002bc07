"""Every quantizer keeps the contract of `quantizers.base`; references that share no code with it check the numbers."""

from __future__ import annotations

import dataclasses
import itertools
import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loftq_cli.quantizers import (
    QUANTIZERS,
    LloydFit,
    NormalFloat,
    QuantizedWeight,
    Uniform,
    UniformSymmetric,
    dequantize,
    quantize_residual,
    residual,
    stackable,
    unstack,
)
from loftq_cli.quantizers import base as base_module
from loftq_cli.quantizers import codebook as codebook_module
from loftq_cli.quantizers import normal_float as normal_float_module
from loftq_cli.quantizers import uniform as uniform_module
from loftq_cli.quantizers.nested import dynamic_codebook
from loftq_cli.quantizers.normal_float import construct_codebook, normal_float_codebook

reference = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent.parent / "scripts" / "make_golden.py")))
GOLDEN = json.loads((Path(__file__).parent / "golden" / "algorithms.json").read_text())

SHAPES = [(1, 1), (3, 5), (5, 1), (1, 200), (7, 130), (64, 64), (96, 257), (33, 512)]
GRIDS = ("uniform", "uniform-symmetric")
EVERY = [(name, bits) for name, row in QUANTIZERS.items() for bits in row.supported_bits]
UNIFORM = [(row, bits) for row in (Uniform, UniformSymmetric) for bits in row.supported_bits]


def weight(m: int, n: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(reference.gaussian(m, n, seed)).float()


def tensors(q: QuantizedWeight) -> dict[str, Tensor]:
    """All tensors of a quantized weight, those of `nested` too."""
    flat = {**vars(q), **{f"nested.{k}": v for k, v in (vars(q.nested) if q.nested else {}).items()}}
    return {name: value for name, value in flat.items() if isinstance(value, Tensor)}


def share(q: QuantizedWeight, W: Tensor) -> float:
    """Squared error ÷ energy."""
    return float((dequantize(q) - W).double().square().sum() / W.double().square().sum())


# --- the contract


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "bits"), EVERY)
def test_result_has_the_promised_shapes_dtypes_and_ranges(name: str, bits: int, shape: tuple[int, int]) -> None:
    for options in (
        {"group_size": 64},
        {"group_size": 32, "dtype": torch.bfloat16},
        {"group_size": -1, "dtype": torch.float16},
        *([{"group_size": 64, "double_quant": True}] if name not in GRIDS else []),
    ):
        quantizer = QUANTIZERS[name](bits=bits, **options)
        W = weight(*shape)
        before = W.clone()
        q, again, empty = quantizer.quantize(W), quantizer.quantize(W), quantizer.empty(*shape)

        assert torch.equal(W, before), "quantize changed its input"
        assert {k: (v.shape, v.dtype) for k, v in tensors(q).items()} == {
            k: (v.shape, v.dtype) for k, v in tensors(empty).items()
        }
        assert all(v.is_meta for v in tensors(empty).values())
        for field in ("bits", "group_size", "shape", "dtype", "symmetric"):
            assert getattr(q, field) == getattr(empty, field)
        assert all(torch.equal(tensors(q)[k], tensors(again)[k]) for k in tensors(q)), "not deterministic"
        assert all(v.is_contiguous() for v in tensors(q).values())

        assert (q.bits, q.shape, q.dtype) == (bits, shape, quantizer.dtype)
        assert q.group_size > 0
        assert q.codes.dtype == torch.uint8
        assert q.codes.shape == shape
        assert int(q.codes.max()) < 2**bits
        groups = -(-shape[1] // q.group_size)
        if name == "nf":
            assert q.scale.dtype == torch.float32
            assert q.scale.shape == (-(-shape[0] * shape[1] // q.group_size),)
            assert q.zero_point is None
            assert torch.equal(q.codebook, normal_float_codebook(bits))
            assert not q.symmetric
        elif name not in GRIDS:
            assert q.scale.dtype == (torch.float16 if q.nested is None else torch.float32)
            assert q.scale.shape == (shape[0], groups)
            assert q.zero_point is None
            assert q.codebook is not None
            assert len(q.codebook) == 2**bits
            assert (q.codebook.diff() >= 0).all()
            assert q.codebook.abs().max() == 1
        else:
            assert q.scale.dtype == torch.float16
            assert q.scale.shape == q.zero_point.shape == (shape[0], groups)
            assert q.zero_point.dtype == torch.uint8
            assert int(q.zero_point.max()) < 2**bits
            assert q.codebook is None
            assert q.symmetric == (name == "uniform-symmetric")
            assert not q.symmetric or (q.zero_point == 2 ** (bits - 1)).all()

        values = dequantize(q)
        assert values.shape == shape
        assert values.dtype == torch.float32
        assert torch.equal(values, values.to(quantizer.dtype).float())
        assert share(q, W) < {2: 0.6, 3: 0.2, 4: 0.06, 8: 1e-3}[bits]


@pytest.mark.parametrize("name", QUANTIZERS)
def test_error_falls_with_bits(name: str) -> None:
    W = weight(64, 257)
    errors = [
        share(QUANTIZERS[name](bits=bits, group_size=64).quantize(W), W) for bits in QUANTIZERS[name].supported_bits
    ]
    assert all(more < 0.4 * fewer for fewer, more in itertools.pairwise(errors))


@pytest.mark.parametrize(("name", "bits"), EVERY)
def test_layout_dtype_and_chunks_of_the_source_do_not_matter(
    name: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantizer = QUANTIZERS[name](bits=bits, group_size=64)
    W = weight(96, 257).bfloat16()
    whole = tensors(quantizer.quantize(W.float()))
    for module in (uniform_module, normal_float_module, codebook_module):
        monkeypatch.setattr(module, "CPU_CHUNK", 700)
    for same in (W, W.float().T.contiguous().T):
        chunked = tensors(quantizer.quantize(same))
        assert all(torch.equal(whole[k], chunked[k]) for k in whole)


@pytest.mark.parametrize(("name", "bits"), EVERY)
def test_its_own_values_come_back(name: str, bits: int) -> None:
    quantizer = QUANTIZERS[name](bits=bits, group_size=64)
    W = weight(96, 256)
    once = dequantize(quantizer.quantize(W))
    assert share(quantizer.quantize(once), once) < 0.05 * share(quantizer.quantize(W), W)


# --- batches and residuals


def any_quantizer(draw: Any) -> Any:
    name, bits = draw(st.sampled_from(EVERY))
    more = {"double_quant": draw(st.booleans())} if name not in GRIDS else {}
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    return QUANTIZERS[name](bits, draw(st.sampled_from([16, 24, 64, -1])), dtype=dtype, **more)


@settings(deadline=None, max_examples=100)
@given(st.data(), st.integers(1, 9), st.integers(1, 140), st.sampled_from([torch.float32, torch.bfloat16]))
def test_residual_in_chunks_is_w_minus_dequantized(data: Any, m: int, n: int, dtype: torch.dtype) -> None:
    quantizer = any_quantizer(data.draw)
    W = weight(m, n).to(dtype)
    q = quantizer.quantize(W)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base_module, "CPU_CHUNK", data.draw(st.sampled_from([1, 200, 1 << 18])))
        assert torch.equal(residual(W, q), W.float() - dequantize(q))


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(1, 4), st.integers(1, 6), st.sampled_from([16, 30, 64, 96, 130]), st.integers(0, 5))
def test_a_stacked_weight_becomes_what_it_becomes_alone(data: Any, batch: int, m: int, n: int, rank: int) -> None:
    quantizer = any_quantizer(data.draw)
    W = weight(batch * m, n).view(batch, m, n)
    factors = (weight(batch * rank, n, 1).view(batch, rank, n) / 9, weight(batch * m, rank, 2).view(batch, m, rank))
    if not rank:
        factors = ()
    if not stackable(quantizer, m, n):
        ragged = isinstance(quantizer, NormalFloat) and m * n % quantizer.empty(m, n).group_size
        assert quantizer.double_quant or ragged or isinstance(quantizer, LloydFit)
        return
    q, left = quantize_residual(quantizer, W, *factors)
    assert q.shape == (batch * m, n)
    assert left.shape == W.shape
    assert len(unstack(q, batch)) == batch
    for i, one in enumerate(unstack(q, batch)):
        alone, left_alone = quantize_residual(quantizer, W[i : i + 1], *(factor[i : i + 1] for factor in factors))
        assert vars(one).keys() == vars(alone).keys()
        assert (one.shape, one.group_size, one.dtype) == (alone.shape, alone.group_size, alone.dtype)
        assert tensors(one).keys() == tensors(alone).keys()
        assert all(torch.equal(value, tensors(alone)[key]) for key, value in tensors(one).items())
        assert torch.equal(left[i], left_alone[0])
        assert torch.equal(left[i], W[i] - dequantize(one))


@pytest.mark.parametrize(("name", "bits"), EVERY)
def test_what_is_quantized_is_w_minus_the_product(name: str, bits: int) -> None:
    quantizer = QUANTIZERS[name](bits=bits, group_size=64)
    W, lora_A, lora_B = weight(2 * 96, 256).view(2, 96, 256).bfloat16(), weight(16, 256, 1), weight(2 * 96, 8, 2) / 9
    lora_A, lora_B = lora_A.view(2, 8, 256), lora_B.view(2, 96, 8)
    q, left = quantize_residual(quantizer, W, lora_A, lora_B)
    target = (W.double() - lora_B.double() @ lora_A.double()).view(-1, 256)
    ideal = quantizer.quantize(target.float())
    assert (q.codes != ideal.codes).double().mean() < 1e-3
    errors = [(target - dequantize(each).double()).square().sum().item() for each in (q, ideal)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-4 if bits == 8 else 1e-5)
    assert left.dtype == torch.float32
    assert torch.equal(left, W.float() - dequantize(q).view_as(W))


# --- uniform


@pytest.mark.parametrize(("row", "bits"), UNIFORM)
def test_groups_are_independent_and_padding_has_no_say(row: Any, bits: int) -> None:
    W = weight(5, 130)
    q = row(bits, 64).quantize(W)
    for group, columns in enumerate((slice(0, 64), slice(64, 128), slice(128, 130))):
        alone = row(bits, -1).quantize(W[:, columns])
        assert torch.equal(alone.codes, q.codes[:, columns])
        assert torch.equal(alone.scale[:, 0], q.scale[:, group])
        assert torch.equal(alone.zero_point[:, 0], q.zero_point[:, group])


@pytest.mark.parametrize(("bits", "bound"), [(2, 0.1245), (3, 0.0316), (4, 0.0080), (8, 4e-5)])
def test_error_on_gaussian_weights(bits: int, bound: float) -> None:
    W = weight(512, 256)
    assert share(Uniform(bits, 64).quantize(W), W) < bound  # min-max: 0.209, 0.0381, 0.0083
    assert share(UniformSymmetric(bits, 64).quantize(W), W) < bound * {2: 1.01, 3: 1.02, 4: 1.08, 8: 1.15}[bits]


def families() -> dict[str, np.ndarray]:
    rng = np.random.RandomState(1)
    gauss = rng.standard_normal((64, 64))
    outlier = gauss.copy()
    outlier[:, 7] = 30 * np.sign(gauss[:, 8])
    return {
        "gaussian": gauss,
        "student-t": rng.standard_t(3, (64, 64)),
        "shifted": rng.standard_normal((64, 64)) + 1.5 * rng.standard_normal((64, 1)),
        "one-sided": rng.standard_exponential((64, 64)) - 0.3,
        "outlier": outlier,
        "short": rng.standard_normal((64, 5)),
        "long": rng.standard_t(4, (16, 1024)),
    }


@pytest.mark.parametrize("family", families())
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_search_finds_what_brute_force_finds(bits: int, family: str) -> None:
    w = families()[family].astype(np.float32)
    energy = (w.astype(np.float64) ** 2).sum()
    for row in (Uniform, UniformSymmetric):
        brute = reference.grid_search(w.astype(np.float64), bits, symmetric=row is UniformSymmetric)
        W = torch.from_numpy(w)
        ratio = share(row(bits, -1).quantize(W), W) * energy / ((brute - w) ** 2).sum()
        assert ratio < (1.02 if family != "short" else 1.15), row


groups = st.lists(
    st.one_of(
        st.floats(-1, 1, width=32),
        st.floats(-1e4, 1e4, width=32),
        st.sampled_from([0.0, -0.0, 1e-6, -1e-6, 1e-3, 1.0, 1e4, -1e4, 6e4]),
    ),
    min_size=1,
    max_size=70,
)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(UNIFORM), groups, st.sampled_from([1.0, 1e-6, 1e-3]))
def test_never_worse_than_min_max(row_bits: tuple[Any, int], values: list[float], factor: float) -> None:
    row, bits = row_bits
    W = torch.tensor([values], dtype=torch.float32) * factor
    q = row(bits, 64).quantize(W)
    restored = dequantize(q).double().numpy()
    assert np.isfinite(restored).all()
    assert int(q.codes.max()) < 2**bits
    w = W.double().numpy()
    for start in range(0, w.shape[1], 64):
        group = w[:, start : start + 64]
        error = ((restored[:, start : start + 64] - group) ** 2).sum()
        if row is Uniform:
            naive = reference.min_max(group, bits)
        else:  # llama.cpp's rule: the largest weight takes the code that the other side lacks
            largest = group[0, np.abs(group).argmax()]
            scale = reference.fp16(np.array([-largest / 2 ** (bits - 1)]))
            naive = reference.on_grid(group, scale, np.array([2.0 ** (bits - 1)]), bits)
            if largest > 0 and bits == 2:
                continue  # then the code left for the other side may be the worse start; brute force judges above
        assert error <= ((naive - group) ** 2).sum() * (1 + 1e-5) + 1e-18


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(UNIFORM), st.floats(-6e4, 6e4, width=32), st.integers(1, 70))
def test_constants_come_back(row_bits: tuple[Any, int], value: float, n: int) -> None:
    row, bits = row_bits
    W = torch.full((2, n), value)
    restored = dequantize(row(bits, 64).quantize(W))
    # half a unit in the last place of an fp16 scale, normal or subnormal, times the largest code
    assert (restored - W).abs().max() <= max(abs(value) * 2.0**-11, 2**bits * 2.0**-25)


@pytest.mark.parametrize(("row", "bits"), UNIFORM)
def test_zeros_stay_zeros(row: Any, bits: int) -> None:
    q = row(bits, 64).quantize(torch.zeros(3, 130))
    assert not dequantize(q).any()
    assert torch.isfinite(q.scale).all()
    assert (q.scale != 0).all()


@pytest.mark.parametrize(("row", "bits"), UNIFORM)
@pytest.mark.parametrize("magnitude", [1e-6, 1e4])
def test_magnitude_does_not_matter_while_fp16_can_hold_the_scale(row: Any, bits: int, magnitude: float) -> None:
    W = weight(64, 128)
    plain, scaled = share(row(bits, 64).quantize(W), W), share(row(bits, 64).quantize(W * magnitude), W * magnitude)
    # near 1e-6 the scale is a subnormal number: at most 2**-25 off per step, and never fewer levels than it allows
    assert scaled < (plain * 1.01 if magnitude > 1 else plain * 1.1 + (2.0**-24 / 1e-6) ** 2 / 12 * 1.1)


@pytest.mark.parametrize(("row", "bits"), UNIFORM)
def test_a_scale_beyond_fp16_is_not_clipped_in_silence(row: Any, bits: int) -> None:
    W = weight(4, 128)
    W[1, 64:] *= 65504.0 * 2**bits
    finite = torch.isfinite(dequantize(row(bits, 64).quantize(W)))
    assert not finite[1, 64:].any()
    finite[1, 64:] = True
    assert finite.all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_symmetric_turns_its_longer_side_where_it_is_needed(bits: int) -> None:
    W = weight(64, 64).abs() * torch.tensor([1.0, -1.0]).repeat(32)[:, None]
    W[:, ::3] *= -0.3
    scale = UniformSymmetric(bits, 64).quantize(W).scale[:, 0]
    assert (scale[::2] < 0).all(), "rows that reach further up"
    assert (scale[1::2] > 0).all(), "rows that reach further down"


# --- NormalFloat


def test_levels_are_the_published_ones() -> None:
    from bitsandbytes.functional import create_dynamic_map, get_4bit_type

    assert torch.equal(normal_float_codebook(4), get_4bit_type("nf4", device="cpu"))
    assert (construct_codebook(4) - normal_float_codebook(4)).abs().max() < 1e-6
    assert torch.allclose(normal_float_codebook(2), torch.tensor([-1, 0, 0.3379152, 1]), atol=1e-7)
    for bits in (2, 3, 4):
        assert np.abs(normal_float_codebook(bits).numpy() - reference.normal_float_levels(bits)).max() < 1e-6
    assert torch.equal(dynamic_codebook(), create_dynamic_map())


def source(shape: tuple[int, int], dtype: torch.dtype, zeros: str) -> Tensor:
    W = weight(*shape) * 0.02
    if zeros == "first":
        W.view(-1)[:128] = 0
    elif zeros == "last":
        W.view(-1)[-70:] = 0
    return W.to(dtype)


def nibbles(packed: Tensor, count: int) -> Tensor:
    return torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], dim=1).view(-1)[:count]


@pytest.mark.parametrize("zeros", ["none", "first", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES, (130, 256)], ids=str)
def test_nf4_is_bitsandbytes_byte_for_byte(shape: tuple[int, int], dtype: torch.dtype, zeros: str) -> None:
    from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise, quantize_4bit

    W = source(shape, dtype, zeros)
    packed, state = quantize_4bit(W, quant_type="nf4", blocksize=64, compress_statistics=False)
    q = NormalFloat(4, dtype=dtype).quantize(W.float())
    assert torch.equal(q.codes.view(-1), nibbles(packed, W.numel()))
    assert torch.equal(q.scale, state.absmax)

    packed, state = quantize_4bit(W, quant_type="nf4", blocksize=64, compress_statistics=True)
    double = NormalFloat(4, dtype=dtype, double_quant=True).quantize(W.float())
    assert double.nested is not None
    assert torch.equal(double.codes, q.codes)
    assert torch.equal(double.nested.codes, state.absmax)
    assert torch.equal(double.nested.absmax, state.state2.absmax)
    assert torch.equal(double.nested.codebook, state.state2.code)
    assert torch.equal(double.nested.offset, state.offset)
    assert torch.equal(double.scale, dequantize_blockwise(state.absmax, state.state2) + state.offset)
    if shape[1] % 2 == 0:  # odd rows go through torch.compile there
        assert torch.equal(dequantize(double), dequantize_4bit(packed, state).float())


@pytest.mark.parametrize("length", [64, 40], ids=["full blocks", "a short block"])
def test_nf4_breaks_ties_as_bitsandbytes_does(length: int) -> None:
    from bitsandbytes.functional import quantize_4bit

    levels = normal_float_codebook(4)
    middles = (levels[:-1] + levels[1:]) / 2
    near = torch.cat([middles.nextafter(torch.tensor(1.0)), middles, middles.nextafter(torch.tensor(-1.0))])
    block = torch.cat([torch.ones(19), near])[:length]
    for absmax in [1.0, *weight(1, 200)[0].abs().tolist()]:
        W = block[None] * absmax
        packed, _ = quantize_4bit(W, quant_type="nf4", blocksize=64)
        assert torch.equal(NormalFloat(4).quantize(W).codes.view(-1), nibbles(packed, W.numel()))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_each_code_is_the_nearest_level(bits: int) -> None:
    W = weight(96, 256)
    W[:, ::5] *= 100  # outliers
    q = NormalFloat(bits).quantize(W)
    values = (W.double().view(-1, 64) / q.scale.double()[:, None]).view(-1, 1)
    distances = (values - normal_float_codebook(bits).double()).abs()
    chosen = distances.gather(1, q.codes.view(-1, 1).long())[:, 0]
    assert (chosen - distances.amin(1)).max() < 1e-7
    assert torch.equal(q.scale, W.view(-1, 64).abs().amax(1))


@settings(deadline=None, max_examples=100)
@given(st.sampled_from([2, 3, 4]), st.booleans(), groups, st.sampled_from([1.0, 1e-6, 1e-12]))
def test_nf_survives_wild_values(bits: int, double_quant: bool, values: list[float], factor: float) -> None:
    W = torch.tensor([values], dtype=torch.float32) * factor
    q = NormalFloat(bits, double_quant=double_quant).quantize(W)
    restored = dequantize(q)
    assert torch.isfinite(restored).all()
    if not double_quant:
        widest = torch.diff(normal_float_codebook(bits)).max() / 2
        absmax = q.scale.repeat_interleave(64)[: len(values)]
        assert ((restored - W)[0].abs() <= absmax * widest * (1 + 1e-5)).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_nf_golden(bits: int) -> None:
    W = weight(256, 384)
    assert share(NormalFloat(bits).quantize(W), W) == pytest.approx(GOLDEN[f"nf{bits}"], rel=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("name", ["uniform", "uniform-symmetric"])
def test_uniform_golden(name: str, bits: int) -> None:
    W = weight(64, 64)
    assert share(QUANTIZERS[name](bits, 64).quantize(W), W) == pytest.approx(GOLDEN[f"{name}{bits}"], rel=0.01)


def test_quantizers_are_frozen() -> None:
    for name, bits in EVERY:
        quantizer = QUANTIZERS[name](bits=bits, group_size=64)
        with pytest.raises(dataclasses.FrozenInstanceError):
            quantizer.bits = 5
