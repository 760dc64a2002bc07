"""Codebooks fitted to each weight, against Lloyd's algorithm in float64 that shares no code with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor

from loftq_cli import quantize
from loftq_cli.quantizers import Lloyd, LloydFit, dequantize, lloyd_fit
from loftq_cli.quantizers.base import fitted
from loftq_cli.quantizers.codebook import LLOYD
from loftq_cli.runtime import PackedExperts
from loftq_cli.verify import verify
from tests.test_experts import SIZES, TOKENS

OPTIONS: dict[str, Any] = {"bits": 2, "quantizer": "lloyd-fit", "rank": 4, "iters": 2, "device": "cpu"}


def family(name: str, m: int, n: int, seed: int = 0) -> Tensor:
    rng = np.random.RandomState(seed)
    drawn = {
        "gaussian": lambda: rng.standard_normal((m, n)),
        "laplace": lambda: rng.laplace(size=(m, n)),
        "student-t": lambda: rng.standard_t(3, (m, n)),
        "uniform": lambda: rng.uniform(-1, 1, (m, n)),
        "one-sided": lambda: np.abs(rng.standard_normal((m, n))),
        "two-peaked": lambda: rng.choice([-0.3, 0.9], (m, n)) + 0.05 * rng.standard_normal((m, n)),
    }[name]()
    return torch.from_numpy(drawn).float()


def share(quantizer: Any, W: Tensor) -> float:
    """Squared error ÷ energy."""
    return float((dequantize(quantizer.quantize(W)) - W).double().square().sum() / W.double().square().sum())


def reference(w: np.ndarray, levels: np.ndarray, rounds: int) -> float:
    """Lloyd's algorithm on groups `w` [G, g], with the best of 120 scales each; squared error ÷ energy at its end."""
    shares = np.concatenate([np.linspace(0.15, 1.2, 60), -np.linspace(0.15, 1.2, 60)])
    for _ in range(rounds):
        scales = np.abs(w).max(1)[:, None] * shares
        codes = np.abs(w[:, None, :, None] / scales[:, :, None, None] - levels).argmin(3)
        values = levels[codes]
        gains = np.einsum("gsi,gi->gs", values, w) ** 2 / (values**2).sum(2)
        rows, best = np.arange(len(w)), gains.argmax(1)
        codes, values = codes[rows, best], values[rows, best]
        scale = ((values * w).sum(1) / (values**2).sum(1))[:, None] * np.ones_like(w)
        error = float(((w - scale * values) ** 2).sum() / (w**2).sum())
        cells = [codes == k for k in range(len(levels))]
        levels = np.array(
            [
                (scale * w)[cell].sum() / (scale**2)[cell].sum() if cell.any() else level
                for cell, level in zip(cells, levels, strict=True)
            ]
        )
    return error


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(
    ("name", "most"), [("gaussian", 1), ("laplace", 0.95), ("student-t", 0.85), ("uniform", 0.95), ("one-sided", 0.9)]
)
def test_it_errs_less_than_constants_and_as_little_as_a_fit_must(name: str, most: float, bits: int) -> None:
    W = family(name, 96, 64)
    quantizer = fitted(LloydFit(bits, 64), W)
    assert share(quantizer, W) <= most * share(Lloyd(bits, 64), W)
    bound = reference(W.double().numpy(), np.array(LLOYD[bits]), rounds=8)
    assert share(quantizer, W) < {2: 1.01, 3: 1.02, 4: 1.05}[bits] * bound
    other = family(name, 96, 64, seed=1)  # what was fitted is what such weights have in common
    assert share(quantizer, other) < 1.02 * most * share(Lloyd(bits, 64), other)


def test_a_large_weight_is_fitted_by_rows_from_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every 64 rows lie as the features of attention heads do: alike at the same place in each."""
    monkeypatch.setattr(lloyd_fit, "SAMPLE", 1 << 14)
    n = 64
    W = family("gaussian", 64 * (1 << 14) // n, n)
    W[::64] = family("two-peaked", len(W) // 64, n)
    assert max(abs(a - b) for a, b in zip(fitted(LloydFit(2, 64), W).levels(), LLOYD[2], strict=True)) < 0.05
    W[1::2] = family("two-peaked", len(W) // 2, n)
    assert share(fitted(LloydFit(2, 64), W), W[1::2]) < 0.5 * share(Lloyd(2, 64), W[1::2])

    # heads of 80, of which every 25th row would pass over four features in five
    W = family("two-peaked", 80 * 64, n)
    W[::5] = family("gaussian", len(W) // 5, n)
    monkeypatch.setattr(lloyd_fit, "SAMPLE", W.numel() // 25)
    assert share(fitted(LloydFit(2, 64), W), W[1::5]) < 0.5 * share(Lloyd(2, 64), W[1::5])


@pytest.mark.parametrize("value", [0.0, 1e9, 1e-9, float("nan"), float("inf")])
def test_what_cannot_be_fitted_keeps_the_constants(value: float) -> None:
    W = torch.full((5, 130), value)
    assert fitted(LloydFit(3, 64), W).levels() == LLOYD[3]
    W = family("one-sided", 5, 130)
    W[2, 7] = value
    assert (fitted(LloydFit(3, 64), W).levels() == LLOYD[3]) == (not abs(value) < 1), "one that is small is no matter"


def test_values_of_the_constants_keep_them() -> None:
    W = dequantize(Lloyd(4, 64).quantize(family("gaussian", 32, 128)))
    assert fitted(LloydFit(4, 64), W).levels() == LLOYD[4]
    assert fitted(Lloyd(4, 64), W) == Lloyd(4, 64), "no other quantizer is fitted"


def save_odd_llama(folder: Path, tiny_llama: Path) -> Path:
    """Weights of several families, alike in shape: together in a batch, if they could be."""
    model = tf.AutoModelForCausalLM.from_pretrained(tiny_llama)
    names = ("laplace", "one-sided", "uniform", "two-peaked", "student-t")
    with torch.no_grad():
        for i, parameter in enumerate(p for p in model.parameters() if p.ndim == 2):
            parameter.copy_(family(names[i % 5], *parameter.shape, seed=i) * 0.05)
    model.save_pretrained(folder)
    return folder


def test_each_weight_has_a_codebook_of_its_own(tiny_llama: Path, tmp_path: Path) -> None:
    """Made from it alone, stored with it, and what the loaded model computes with; a table of tokens has one, too."""
    import loftq_cli.runtime  # noqa: F401

    source = save_odd_llama(tmp_path / "model", tiny_llama)
    options = {**OPTIONS, "method": "qlora", "quantize_embeddings": True}
    reports = {f: quantize(source, tmp_path / f, format=f, **options) for f in ("packed", "dense")}
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "packed"))
    books = set()
    for row in reports["packed"]["weights"]:
        wanted = fitted(LloydFit(2, 64), before[row["tensor"]])
        book = after[row["tensor"].replace(".weight", ".codebook")]
        assert book.tolist() == list(wanted.levels()), row["name"]
        error = share(wanted, before[row["tensor"]]) ** 0.5
        assert row["relative_error"] == pytest.approx(error, rel=1e-5)
        books.add(tuple(book.tolist()))
    assert len(books) == len(reports["packed"]["weights"]) == 15
    for folder in reports:
        assert verify(tmp_path / folder, str(source)).violations == ()
    packed, dense = (tf.AutoModelForCausalLM.from_pretrained(tmp_path / f).eval() for f in reports)
    with torch.no_grad():
        assert torch.allclose(packed(TOKENS).logits, dense(TOKENS).logits, atol=1e-4)


def test_each_matrix_of_each_expert_has_its_own(tmp_path: Path) -> None:
    """In a model that has those of all experts in one parameter, transposed."""
    torch.manual_seed(0)
    model = tf.GptOssForCausalLM(tf.GptOssConfig(**SIZES))
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.randn(parameter.shape) ** (1 + 2 * (i % 2)) * 0.1)
    model.save_pretrained(tmp_path / "model")
    for format in ("packed", "dense"):
        quantize(tmp_path / "model", tmp_path / format, format=format, group_size=32, **OPTIONS)
    packed, dense = (tf.AutoModelForCausalLM.from_pretrained(tmp_path / f).eval() for f in ("packed", "dense"))
    experts = [module for module in packed.modules() if isinstance(module, PackedExperts)]
    books = {tuple(b.tolist()) for module in experts for name, b in module.named_buffers() if "codebook" in name}
    assert len(books) > 8, "of 4 experts, 2 layers and 2 or 3 matrices each"
    with torch.no_grad():
        assert torch.allclose(packed(TOKENS).logits, dense(TOKENS).logits, atol=1e-4)


def test_a_stopped_run_resumes_to_the_same_bytes(sharded_llama: Path, tmp_path: Path) -> None:
    def stop(name: str, _: int) -> None:
        if "layers.1.mlp.up_proj" in name:
            raise KeyboardInterrupt

    options = {**OPTIONS, "format": "packed"}
    with pytest.raises(KeyboardInterrupt):
        quantize(sharded_llama, tmp_path / "out", progress=stop, **options)
    resumed = quantize(sharded_llama, tmp_path / "out", resume=True, **options)
    assert resumed["files"] == quantize(sharded_llama, tmp_path / "whole", **options)["files"]
