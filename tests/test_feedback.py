"""Rounding with error feedback against GPTQ as published, and the kernel against its torch twin.

`TRITON_INTERPRET=1` runs the kernel's part on a CPU, slowly.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from loftq_cli import kernels
from loftq_cli.methods import feedback as module
from loftq_cli.methods.feedback import feedback_of, round_block, round_with_feedback
from loftq_cli.quantizers import (
    Lloyd,
    NormalFloat,
    NormalFloatSearch,
    QuantizedWeight,
    Uniform,
    UniformSymmetric,
    base,
    dequantize,
    uniform,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available() and not INTERPRETED, reason="needs an NVIDIA GPU")
F16, BF16 = torch.float16, torch.bfloat16

# quantizer, (m, n)
CASES = [
    (Uniform(2, 64), (33, 448)),
    (Uniform(3, 32, F16), (17, 300)),
    (Uniform(4, 128, BF16), (31, 640)),
    (Uniform(3, -1), (15, 300)),
    (Uniform(2, -1, F16), (7, 100)),  # the whole row is less than a block
    (Uniform(4, 96), (9, 330)),  # neither a power of two nor a part of a block
    (Uniform(2, 192), (9, 500)),  # a block and a half
    (Uniform(8, 16), (5, 90)),
    (Uniform(4, 300), (5, 700)),
    (UniformSymmetric(2, 32), (33, 290)),
    (UniformSymmetric(3, 64, BF16), (1, 200)),
    (UniformSymmetric(4, 128, F16), (35, 520)),
    (UniformSymmetric(4, -1, BF16), (32, 384)),
    (UniformSymmetric(2, 64), (64, 64)),
    (Uniform(2, 64), (1, 1)),
]

CODEBOOKS = [
    (Lloyd(2, 64), (33, 448)),
    (NormalFloatSearch(3, 32, F16), (17, 300)),  # the last group of a row is short
    (Lloyd(4, 128, BF16), (31, 640)),
    (Lloyd(3, -1), (15, 300)),
    (NormalFloatSearch(4, 300), (5, 700)),
    (NormalFloat(2, 64), (33, 448)),
    (NormalFloat(4, 32, BF16, scale_dtype=F16), (9, 320)),
    (NormalFloat(3, 192), (9, 576)),
]
NESTED = [
    (Lloyd(2, 64, double_quant=True), (33, 448)),
    (NormalFloatSearch(3, 192, F16, double_quant=True), (9, 500)),
    (NormalFloat(4, 64, BF16, double_quant=True), (21, 320)),
]


def example(m: int, n: int) -> tuple[Tensor, Tensor]:
    """A weight with rows unlike the others, and the Gram of inputs near a plane, float64 [n, n]."""
    g = torch.Generator().manual_seed(m + n)
    W = torch.randn(m, n, generator=g) * torch.rand(m, n, generator=g).rsqrt() * 0.02
    if m > 6:
        W[2], W[3], W[4], W[5] = 0, 0.5, W[4].abs(), W[5] * 1e-3
    k = max(1, n // 8)
    x = torch.randn(4 * n, k, generator=g) @ torch.randn(k, n, generator=g) / k**0.5
    x = (x + 0.2 * torch.randn(4 * n, n, generator=g)) * torch.randn(n, generator=g).exp()
    return W, x.double().mT @ x.double() / (4 * n)


def gptq(W: Tensor, quantizer: Any, gram: Tensor, scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """GPTQ as published: column by column, by Gaussian elimination of the inverse, which needs no Cholesky factor.

    With `scales` [m, groups] where they are known. Returns the codes and the values, float64.
    """
    m, n = W.shape
    g = quantizer.group_size if quantizer.group_size > 0 else n
    levels = quantizer.quantize(W).codebook
    inverse = torch.linalg.inv(gram + 0.01 * gram.diagonal().mean() * torch.eye(n, dtype=torch.float64))
    w, codes, values = W.double().clone(), torch.zeros(m, n, dtype=torch.uint8), torch.zeros(m, n, dtype=torch.float64)
    for j in range(n):
        if j % g == 0:
            group = quantizer.quantize(w[:, j : j + g].float())
            scale = (group.scale.view(m) if scales is None else scales[:, j // g]).double()
            zero_point = 0 if group.zero_point is None else group.zero_point[:, 0].double()
        if levels is not None:
            code = (w[:, j, None] - levels.double() * scale[:, None]).abs().argmin(1)
            values[:, j] = (levels[code] * scale.float()).to(quantizer.dtype).double()
        else:
            code = (w[:, j] / scale + zero_point).round().clamp(0, 2**quantizer.bits - 1)
            values[:, j] = ((code - zero_point) * scale).to(quantizer.dtype).double()
        codes[:, j] = code.to(torch.uint8)
        w -= torch.outer(w[:, j] - values[:, j], inverse[j] / inverse[j, j])
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j], inverse[:, j] = 0, 0
    return codes, values


def output_errors(D: Tensor, gram: Tensor) -> Tensor:
    """Of each row, [m]."""
    return ((D.double() @ gram) * D.double()).sum(1)


def assert_alike(codes: Tensor, other: Tensor) -> None:
    """Equal but in rows where the last bit of a sum decided a code (or a scale): the rest goes its own way, as good."""
    m, n = codes.shape
    own_way = int((codes != other).any(1).sum())
    assert own_way <= max(1, 0.1 * m) * max(1, n / 500)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_gptq(case: tuple[Uniform, tuple[int, int]]) -> None:
    quantizer, (m, n) = case
    W, gram = example(m, n)
    before = W.clone()
    ours = round_with_feedback(W, quantizer, feedback_of(gram))
    assert torch.equal(W, before)
    like = quantizer.empty(m, n)
    assert like.zero_point is not None
    assert ours.zero_point is not None
    for mine, wanted in ((ours.codes, like.codes), (ours.scale, like.scale), (ours.zero_point, like.zero_point)):
        assert (mine.shape, mine.dtype) == (wanted.shape, wanted.dtype)
        assert mine.is_contiguous()
    assert (ours.bits, ours.group_size, ours.shape, ours.dtype, ours.symmetric) == (
        like.bits, like.group_size, like.shape, like.dtype, like.symmetric
    )  # fmt: skip
    codes, values = gptq(W, quantizer, gram)
    assert_alike(ours.codes, codes)
    errors, published = (output_errors(W.double() - D, gram).sum() for D in (dequantize(ours).double(), values))
    assert float(errors) == pytest.approx(float(published), rel=2e-2)


@pytest.mark.parametrize("case", CODEBOOKS + NESTED, ids=str)
def test_it_is_gptq_with_a_codebook_too(case: tuple[Any, tuple[int, int]]) -> None:
    """Scales that are quantized themselves are what the plain ones become, and the codes are chosen with these."""
    quantizer, (m, n) = case
    W, gram = example(m, n)
    feedback, scales = feedback_of(gram), None
    ours, like = round_with_feedback(W, quantizer, feedback), quantizer.empty(m, n)
    if like.nested is not None:
        assert ours.nested is not None
        plain = round_with_feedback(W, replace(quantizer, double_quant=False), feedback).scale
        blocks = ours.nested.absmax.repeat_interleave(256)[: plain.numel()]
        stored = ours.nested.codebook[ours.nested.codes.int()] * blocks + ours.nested.offset
        assert torch.equal(ours.scale.view(-1), stored)
        distances = (ours.nested.codebook * blocks[:, None] + ours.nested.offset - plain.float().view(-1, 1)).abs()
        assert ((plain.view(-1) - stored).abs() <= distances.amin(1) + 1e-4 * blocks).all(), "not the nearest"
        scales = ours.scale.view(m, -1)
    for mine, wanted in ((ours.codes, like.codes), (ours.scale, like.scale), (ours.codebook, like.codebook)):
        assert mine is not None
        assert (mine.shape, mine.dtype) == (wanted.shape, wanted.dtype)
        assert mine.is_contiguous()
    assert ours.zero_point is None
    codes, values = gptq(W, quantizer, gram, scales)
    assert_alike(ours.codes[torch.arange(m) != 2], codes[torch.arange(m) != 2])  # any code of a row of zeros is right
    errors, published = (output_errors(W.double() - D, gram).sum() for D in (dequantize(ours).double(), values))
    assert float(errors) == pytest.approx(float(published), rel=2e-2)
    plainly = output_errors(W.double() - dequantize(quantizer.quantize(W)).double(), gram).sum()
    assert errors < 0.7 * plainly


@pytest.mark.parametrize(
    "quantizer",
    [Lloyd(2, 64), NormalFloatSearch(3, 128), NormalFloat(4, 40), Lloyd(3, 200, double_quant=True)],
    ids=str,
)
def test_without_correlations_a_codebook_is_rounded_plainly(quantizer: Any) -> None:
    W = example(24, 200)[0]
    ours = round_with_feedback(W, quantizer, feedback_of(torch.diag(torch.rand(200) + 0.1)))
    plain = quantizer.quantize(W)
    torch.testing.assert_close(ours.scale, plain.scale, rtol=1e-6, atol=0)
    assert (dequantize(ours) == dequantize(plain)).double().mean() > 0.999


@pytest.mark.parametrize("quantizer", [Lloyd(3, 64), NormalFloat(3, 64, scale_dtype=F16)], ids=str)
def test_a_row_beyond_a_codebook_disturbs_no_other(quantizer: Any) -> None:
    W, gram = example(33, 256)
    feedback = feedback_of(gram)
    alone = round_with_feedback(W, quantizer, feedback)
    W[7, 70:] *= 1e9
    W[9, 3] = torch.nan
    broken = round_with_feedback(W, quantizer, feedback)
    others = [i for i in range(33) if i not in (7, 9)]
    assert torch.equal(broken.codes[others], alone.codes[others])
    assert broken.codes.max() < 8
    assert not dequantize(broken)[7, 70:].isfinite().any(), "never clipped in silence"


def test_without_correlations_it_is_plain_rounding() -> None:
    W, quantizer = example(24, 200)[0], Uniform(3, 64)
    ours = round_with_feedback(W, quantizer, feedback_of(torch.diag(torch.rand(200) + 0.1)))
    plain = quantizer.quantize(W)
    assert plain.zero_point is not None
    assert ours.zero_point is not None
    assert torch.equal(ours.scale, plain.scale)
    assert torch.equal(ours.zero_point, plain.zero_point)
    assert (ours.codes == plain.codes).double().mean() > 0.999


def test_a_row_beyond_fp16_disturbs_no_other() -> None:
    W, gram = example(33, 256)
    quantizer, feedback = Uniform(3, 64), feedback_of(gram)
    alone = round_with_feedback(W, quantizer, feedback)
    W[7, 70:] *= 1e9
    W[9, 3] = torch.nan
    codes = round_with_feedback(W, quantizer, feedback).codes
    others = [i for i in range(33) if i not in (7, 9)]
    assert torch.equal(codes[others], alone.codes[others])
    assert codes.max() < 8


def none(*_: object) -> None:
    raise AssertionError("not asked for")


def only_fused(*arguments: Any) -> None:
    *block, quantizer, g = arguments
    done = quantizer.fused_feedback(*block, g)
    if not done and quantizer.codebook(torch.device("cpu")) is not None and g and len(block[0]) % g:
        round_block(*arguments)  # a short last group has other shares
        done = True
    assert done, "not fused"


def with_kernel(W: Tensor, quantizer: Any, feedback: Tensor) -> QuantizedWeight:
    """`round_with_feedback` by the kernel, its result on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            from loftq_cli.kernels.feedback import feedback as kernel
            from loftq_cli.kernels.feedback import feedback_to_levels

            patch.setattr(torch.cuda, "device_of", lambda _: contextlib.nullcontext())
            for quantizers in (uniform, base):
                patch.setattr(
                    quantizers, "fused", lambda: kernels.Kernels(none, none, none, None, kernel, feedback_to_levels)
                )
        else:
            assert kernels.fused() is not None
        patch.setattr(module, "round_block", only_fused)
        q = round_with_feedback(W.to(DEVICE), quantizer, feedback.to(DEVICE))
    return QuantizedWeight(**{k: v.cpu() if isinstance(v, Tensor) else v for k, v in vars(q).items()})


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_is_the_twin(case: tuple[Uniform, tuple[int, int]]) -> None:
    quantizer, (m, n) = case
    if INTERPRETED and quantizer.dtype == BF16:  # the interpreter cuts bfloat16 off where it should round
        quantizer = type(quantizer)(quantizer.bits, quantizer.group_size, F16)
    W, gram = example(m, n)
    feedback = feedback_of(gram)
    ours, twin = with_kernel(W, quantizer, feedback), round_with_feedback(W, quantizer, feedback)
    assert ours.zero_point is not None
    assert twin.zero_point is not None
    assert_alike(ours.codes, twin.codes)
    same = (ours.codes == twin.codes).all(1)
    for mine, other in ((ours.scale, twin.scale), (ours.zero_point, twin.zero_point)):
        assert mine.is_contiguous()
        # of two grids as good, the last bit of an error may choose either, and the codes be the same
        assert int((mine != other)[same].sum()) <= 1 + 0.01 * mine.numel()
    errors, others = (output_errors(W.double() - dequantize(q).double(), gram).sum() for q in (ours, twin))
    assert float(errors) == pytest.approx(float(others), rel=1e-2)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    "case",
    [
        *CODEBOOKS,
        *NESTED,
        (Lloyd(2, 32, F16), (17, 96)),
        (Lloyd(3, 96), (9, 288)),  # no power of two, and no level is zero
        (NormalFloat(4, 64, scale_dtype=F16), (32, 256)),
        (Lloyd(4, 16), (1, 48)),
    ],
    ids=str,
)
def test_the_kernel_is_the_twin_of_a_codebook(case: tuple[Any, tuple[int, int]]) -> None:
    quantizer, (m, n) = case
    if INTERPRETED and quantizer.dtype == BF16:
        quantizer = replace(quantizer, dtype=F16)
    W, gram = example(m, n)
    feedback = feedback_of(gram)
    ours, twin = with_kernel(W, quantizer, feedback), round_with_feedback(W, quantizer, feedback)
    assert ours.zero_point is None
    assert_alike(ours.codes, twin.codes)
    same = (ours.codes == twin.codes).all(1)
    scales, others = (q.scale.view(m, -1) for q in (ours, twin))
    assert scales.dtype == others.dtype
    # a float32 scale has the last bits of a sum, and one in 8 bits shares its mean with those that go their own way
    apart = ~torch.isclose(scales.float(), others.float(), rtol=1e-4 if ours.nested is None else 2e-2)
    assert int(apart[same].sum()) <= 1 + 0.01 * scales.numel()
    errors, wanted = (output_errors(W.double() - dequantize(q).double(), gram).sum() for q in (ours, twin))
    assert float(errors) == pytest.approx(float(wanted), rel=1e-2)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.skipif(INTERPRETED, reason="too large for the interpreter")
@pytest.mark.parametrize(
    "quantizer",
    [Uniform(2, 64, F16), Uniform(4, 32, BF16), UniformSymmetric(3, 128), Uniform(3, -1, BF16), Lloyd(2, 64, BF16)],
    ids=str,
)
def test_ties_are_rare_on_a_large_weight(quantizer: Any) -> None:
    W, gram = example(2050, 1032)
    feedback = feedback_of(gram)
    ours, twin = with_kernel(W, quantizer, feedback), round_with_feedback(W, quantizer, feedback)
    assert (ours.codes != twin.codes).double().mean() < 1e-3
    errors, others = (output_errors(W.double() - dequantize(q).double(), gram).sum() for q in (ours, twin))
    assert float(errors) == pytest.approx(float(others), rel=1e-3)


@pytest.mark.gpu
@needs_gpu
def test_rows_know_nothing_of_each_other() -> None:
    W, gram = example(33, 200)
    feedback, quantizer = feedback_of(gram), Uniform(3, 64)
    together = with_kernel(W, quantizer, feedback)
    parts = [with_kernel(rows, quantizer, feedback).codes for rows in W.split([16, 1, 16])]
    assert torch.equal(torch.cat(parts), together.codes)
    W[7, 70:] *= 1e9  # a scale beyond fp16
    W[9, 3] = torch.nan
    broken = with_kernel(W, quantizer, feedback).codes
    others = [i for i in range(33) if i not in (7, 9)]
    assert torch.equal(broken[others], together.codes[others])
    assert broken.max() < 8


@pytest.mark.gpu
@needs_gpu
@pytest.mark.skipif(INTERPRETED, reason="about a GPU")
@pytest.mark.parametrize(
    "quantizer",
    [Uniform(2, 64), UniformSymmetric(4, -1), Lloyd(2, 64), Lloyd(4, -1), NormalFloat(4, 40, scale_dtype=F16)],
    ids=str,
)
def test_nothing_waits_for_the_gpu(quantizer: Any) -> None:
    W, gram = (tensor.cuda() for tensor in example(64, 600))
    feedback = feedback_of(gram)
    round_with_feedback(W, quantizer, feedback)  # compiles, and copies the constants
    torch.cuda.set_sync_debug_mode("error")
    try:
        round_with_feedback(W, quantizer, feedback)
    finally:
        torch.cuda.set_sync_debug_mode("default")
