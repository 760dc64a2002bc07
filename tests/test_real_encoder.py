"""A real encoder, all-MiniLM-L6-v2: how near its embeddings of sentences stay to those in full precision."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from loftq_cli import quantize
from loftq_cli.merge import merge
from loftq_cli.report import load_lines
from loftq_cli.verify import verify

ROOT = Path(__file__).parents[1]
ENCODER = ROOT / ".cache/all-MiniLM-L6-v2"
pytestmark = pytest.mark.skipif(
    not ENCODER.exists(), reason="no encoder: `python scripts/get_encoder.py .cache/all-MiniLM-L6-v2` fetches it"
)
CALIBRATED = {"method": "qera", "samples": 16, "seqlen": 128}
# (options, mean cosine with the adapter at least, its distance from 1 at most this part of that without); as measured:
CASES: dict[str, tuple[dict[str, Any], float, float]] = {
    "4 bits": ({"bits": 4}, 0.978, 0.75),  # 0.970 → 0.981
    "4 bits, calibrated": ({"bits": 4, **CALIBRATED}, 0.981, 0.75),  # 0.976 → 0.984
    "2 bits": ({"bits": 2}, 0.72, 0.5),  # 0.39 → 0.75
    "2 bits, calibrated": ({"bits": 2, **CALIBRATED}, 0.78, 0.5),  # 0.51 → 0.81
}


def embed(model: Any, sentences: list[str]) -> Tensor:
    """As the model's `modules.json` says: the mean over the tokens, of length 1."""
    tokens = AutoTokenizer.from_pretrained(ENCODER)(sentences, padding=True, return_tensors="pt")
    mask = tokens["attention_mask"][..., None]
    with torch.no_grad():
        states = model.eval()(**tokens).last_hidden_state
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1))


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    with (ROOT / "scripts/data/headlines.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line)["headline"] for line in itertools.islice(lines, 64)]


@pytest.fixture(scope="module")
def wanted(sentences: list[str]) -> Tensor:
    return embed(AutoModel.from_pretrained(ENCODER), sentences)


def test_it_is_the_trained_model() -> None:
    """Similarities as the documentation of Sentence Transformers prints them."""
    one = embed(
        AutoModel.from_pretrained(ENCODER),
        ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."],
    )
    published = torch.tensor([[1.0000, 0.6660, 0.1046], [0.6660, 1.0000, 0.1411], [0.1046, 0.1411, 1.0000]])
    torch.testing.assert_close(one @ one.T, published, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_the_adapter_brings_embeddings_nearer(
    case: str, tmp_path: Path, sentences: list[str], wanted: Tensor, record_property: Callable[[str, object], None]
) -> None:
    options, at_least, part = CASES[case]
    if options["bits"] == 4:
        pytest.importorskip("bitsandbytes")  # whose format is the default
    report = quantize(ENCODER, tmp_path / "out", alpha=32, device="cpu", **options)  # any alpha will do
    for file in ("modules.json", "1_Pooling/config.json"):  # without which Sentence Transformers would pool otherwise
        assert (tmp_path / "out" / file).read_bytes() == (ENCODER / file).read_bytes()
    verdict = verify(tmp_path / "out", str(ENCODER))
    assert verdict.violations == ()
    # six of each of six blocks; the pooler, which no embedding passes through, lies outside of them
    assert verdict.weights == len(report["weights"]) == (36 if "calibrated" in case else 37)

    names: dict[str, Any] = {}
    exec("\n".join(load_lines(report, str(tmp_path / "out"))), names)
    adapted = (embed(names["model"], sentences) * wanted).sum(1)
    with names["model"].disable_adapter():
        alone = (embed(names["model"], sentences) * wanted).sum(1)
    assert (adapted > alone).all()
    assert adapted.mean() > at_least
    assert 1 - adapted.mean() < part * (1 - alone.mean())
    record_property("cosine", f"{alone.mean():.4f} → {adapted.mean():.4f}")


def test_sentence_transformers_loads_it(tmp_path: Path, sentences: list[str], wanted: Tensor) -> None:
    """As the README says: base and adapter, or both as one."""
    SentenceTransformer = pytest.importorskip("sentence_transformers").SentenceTransformer
    report = quantize(ENCODER, tmp_path / "out", bits=2, format="dense", device="cpu")
    model = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    alone = torch.from_numpy(model.encode(sentences))
    model.load_adapter(str(tmp_path / "out"), adapter_kwargs={"subfolder": "loftq_init"})
    repaired = torch.from_numpy(model.encode(sentences))
    merge(tmp_path / "out", tmp_path / "merged")
    merged = torch.from_numpy(SentenceTransformer(str(tmp_path / "merged"), device="cpu").encode(sentences))

    names: dict[str, Any] = {}
    exec("\n".join(load_lines(report, str(tmp_path / "out"))), names)
    torch.testing.assert_close(repaired, embed(names["model"], sentences), rtol=0, atol=1e-5)
    torch.testing.assert_close(merged, repaired, rtol=0, atol=1e-4)
    with names["model"].disable_adapter():
        torch.testing.assert_close(alone, embed(names["model"], sentences), rtol=0, atol=1e-5)
    assert ((repaired * wanted).sum(1) > (alone * wanted).sum(1)).all()
