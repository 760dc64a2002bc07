"""A real decoder, SmolLM2-135M-Instruct: what quantizing costs it, and how much of that the adapter gives back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loftq_cli import quantize
from loftq_cli.evaluate import evaluate
from loftq_cli.verify import verify

ROOT = Path(__file__).parents[1]
DECODER = ROOT / ".cache/SmolLM2-135M-Instruct"
pytestmark = pytest.mark.skipif(
    not DECODER.exists(), reason="no decoder: `python scripts/get_smollm2.py .cache/SmolLM2-135M-Instruct` fetches it"
)
# (options, perplexity with the adapter ÷ the source's at most, ÷ that of the base alone at most); as measured:
CASES: dict[str, tuple[dict[str, Any], float, float]] = {
    "4 bits": ({"bits": 4, "quantizer": "nf"}, 1.25, 0.95),  # 25.6; 33.7 → 29.9
    "3 bits, calibrated": ({"bits": 3, "method": "qera", "samples": 8, "seqlen": 256}, 2.0, 0.7),  # 79.9 → 48.1
}


@pytest.mark.parametrize("case", CASES)
def test_the_adapter_gives_perplexity_back(
    case: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    options, of_source, of_base = CASES[case]
    report = quantize(DECODER, tmp_path / "out", device="cpu", format="dense", **options)
    verdict = verify(tmp_path / "out", str(DECODER))
    assert verdict.violations == ()
    assert verdict.weights == len(report["weights"]) == 210  # seven of each of thirty blocks
    text = ROOT / "scripts/data/wikipedia_eval.txt"
    measured = evaluate(tmp_path / "out", text, str(DECODER), seqlen=512, max_tokens=1536, device="cpu")
    perplexity = {row.name: row.perplexity for row in measured.rows}
    record_property("perplexity", perplexity)
    assert perplexity["base + adapter"] < of_source * perplexity["source"]
    assert perplexity["base + adapter"] < of_base * perplexity["base alone"]
