"""The model card and its chart: what they say, beside the report and the source's own card."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from loftq_cli import quantize
from loftq_cli.card import with_perplexity
from loftq_cli.chart import COLOURS, error_chart
from loftq_cli.evaluate import Evaluation, Row
from loftq_cli.journal import CHART_FILE
from loftq_cli.verify import verify
from tests.conftest import save_llama
from tests.test_blocks import speaking, text  # noqa: F401 - fixtures

FULL = """---
license: other
license_name: tiny-licence
license_link: LICENSE
language: [en, no]
pipeline_tag: text-generation
model-index: []
datasets: [secret]
---

# Tiny: a "quoted" name
"""


def matter(card: str) -> dict[str, Any]:
    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert found
    return yaml.safe_load(found[1])


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = save_llama(tmp_path_factory.mktemp("card") / "tiny", num_hidden_layers=5)
    (model / "README.md").write_text(FULL)
    (model / "LICENSE").write_text("do as you like")
    out = model.parent / "out"
    quantize(model, out, bits=2, rank=4, iters=1, device="cpu", format="dense", rslora=True)
    return out


def test_the_front_matter_carries_what_the_source_says(out: Path) -> None:
    told = matter((out / "README.md").read_text())
    assert told["license"] == "other"
    assert (told["license_name"], told["license_link"]) == ("tiny-licence", "LICENSE")
    assert told["language"] == ["en", "no"]  # which YAML 1.1 takes for false
    assert told["pipeline_tag"] == "text-generation"
    assert told["library_name"] == "transformers"
    assert {"loftq", "peft", "2-bit"} <= set(told["tags"])
    assert not {"base_model", "base_model_relation"} & told.keys()  # a folder has no name on the Hub
    assert not {"datasets", "model-index"} & told.keys()


@pytest.mark.parametrize(
    ("readme", "licence"),
    [
        (None, None),
        ("# no front matter\nlicense: mit\n", None),
        ("---\nlicense: [broken\n---\n", None),
        ("---\n- license\n---\n", None),
        ("---\r\nlicense: mit\r\n---\r\n# x\r\n", "mit"),
    ],
)
def test_other_source_cards(tmp_path: Path, readme: str | None, licence: str | None) -> None:
    model = save_llama(tmp_path / "tiny", num_hidden_layers=1)
    if readme is not None:
        (model / "README.md").write_bytes(readme.encode())
    quantize(model, tmp_path / "out", bits=2, rank=4, method="qlora", device="cpu", format="dense")
    assert matter((tmp_path / "out/README.md").read_text()).get("license") == licence


def test_the_settings_are_those_to_do_it_again_with(out: Path, tmp_path: Path) -> None:
    rules = {"bits_for": {"blocks[:1]": 4, "*.o_proj": 8}, "skip": ("*.up_proj", "lm_head")}
    quantize(save_llama(tmp_path / "tiny"), tmp_path / "out", bits=2, rank=4, iters=1, device="cpu", **rules)
    card = (tmp_path / "out" / "README.md").read_text()
    assert ", bits-for `blocks[:1]=4` `*.o_proj=8`, skip `*.up_proj` `lm_head`." in card
    assert "bits-for" not in (out / "README.md").read_text()


def test_what_the_card_links_to_is_there(out: Path) -> None:
    card = (out / "README.md").read_text()
    links = [link for link in re.findall(r"\]\(([^)]*)\)", card) if not link.startswith("https://")]
    assert links == [CHART_FILE]
    assert (out / CHART_FILE).is_file()
    sources = card[card.index("## Sources") :]
    for paper in ("2310.08659", "2312.03732"):  # LoftQ, rsLoRA
        assert paper in sources
    assert "2306" not in sources
    assert "2402.05147" not in sources


def bars(svg: str) -> dict[str, list[float]]:
    """Heights by colour, in order, of what stands in the plot."""
    root = ElementTree.fromstring(svg)
    groups = root.findall("{http://www.w3.org/2000/svg}g")
    found: dict[str, list[float]] = {colour: [] for colour in COLOURS}
    for group in groups:
        for rect in group.findall("{http://www.w3.org/2000/svg}rect"):
            found[rect.attrib["fill"]].append(float(rect.attrib["height"]))
    return found


def test_the_chart_draws_the_errors_of_blocks(out: Path) -> None:
    report = json.loads((out / "loftq_report.json").read_text())
    drawn = bars((out / CHART_FILE).read_text())
    heights = [drawn[colour] for colour in COLOURS]
    assert [len(row) for row in heights] == [5, 5]
    for row, field in zip(heights, ("relative_error_without_adapter", "relative_error"), strict=True):
        for block, height in enumerate(row):
            rows = [w for w in report["weights"] if w["name"].startswith(f"model.layers.{block}.")]
            squares = sum((w[field] * w["norm"]) ** 2 for w in rows)
            error = (squares / sum(w["norm"] ** 2 for w in rows)) ** 0.5
            scale = heights[0][0] / _pooled(report, 0, "relative_error_without_adapter")
            assert height == pytest.approx(error * scale, rel=2e-3)
    assert all(after < before for before, after in zip(*heights, strict=True))
    assert max(heights[0]) <= 260


def test_the_chart_s_axes_are_named(out: Path) -> None:
    root = ElementTree.fromstring((out / CHART_FILE).read_text())
    words = {found.text: found.attrib for found in root.iter("{http://www.w3.org/2000/svg}text")}
    assert "rotate(-90)" in words["relative error"]["transform"]
    height = float(root.attrib["viewBox"].split()[3])
    assert float(words["4"]["y"]) + 12 < float(words["transformer block"]["y"]) < height  # below the blocks' numbers


def _pooled(report: dict[str, Any], block: int, field: str) -> float:
    rows = [row for row in report["weights"] if row["name"].startswith(f"model.layers.{block}.")]
    return (sum((row[field] * row["norm"]) ** 2 for row in rows) / sum(row["norm"] ** 2 for row in rows)) ** 0.5


def test_verify_knows_the_chart(out: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    assert verify(copy).violations == ()
    (copy / CHART_FILE).write_text((copy / CHART_FILE).read_text().replace("rx=", "ry="))
    assert any(CHART_FILE in violation for violation in verify(copy).violations)
    (copy / CHART_FILE).unlink()
    assert any(CHART_FILE in violation for violation in verify(copy).violations)


@pytest.mark.parametrize("errors", [[(0.0, 0.0)], [(0.3, 0.1)] * 200, [(1e-7, 1e-9)], [(0.999, 0.4), (12.5, 3.0)]])
def test_charts_of_other_shapes(errors: list[tuple[float, float]]) -> None:
    """Many blocks, tiny and large errors, weights outside blocks with names that are not for markup."""
    weights = [
        {"name": f"<b>&.{n}.w", "norm": 1.0, "relative_error_without_adapter": before, "relative_error": after}
        for n, (before, after) in enumerate(errors)
    ]
    weights.append({**weights[0], "name": 'head"<&'})
    svg = error_chart({"config": {"method": "loftq"}, "weights": weights})
    drawn = bars(svg)
    assert [len(drawn[colour]) for colour in COLOURS] == [len(errors) + 1] * 2
    assert all(0 <= height <= 260 for row in drawn.values() for height in row)
    assert len(re.findall("text-anchor=.middle", svg)) <= 18
    assert len(re.findall("text-anchor=.end", svg)) <= 7


def test_calibrated_methods_chart_what_layers_say(speaking: Path, text: Path, tmp_path: Path) -> None:  # noqa: F811
    options = {"method": "qera", "calibration": str(text), "samples": 4, "seqlen": 16}
    report = quantize(speaking, tmp_path / "out", bits=2, rank=4, device="cpu", format="dense", **options)
    svg = (tmp_path / "out" / CHART_FILE).read_text()
    assert "error of outputs" in svg
    of_first = [row["output_error"] for row in report["weights"] if row["name"].startswith("model.layers.0.")]
    mean = (sum(error**2 for error in of_first) / len(of_first)) ** 0.5
    assert f", {mean:.4f}</title>" in svg
    assert "2410.06040" in (tmp_path / "out/README.md").read_text()


def test_perplexities_are_put_on_the_card_once_for_each_text(out: Path) -> None:
    card = (out / "README.md").read_text()

    def measured(adapter: float) -> Evaluation:
        rows = (Row("base alone", 3.0, 20.1), Row("base + adapter", 2.0, adapter))
        return Evaluation(62, 2, 32, "perplexity is what it is", rows, ())

    once = with_perplexity(card, measured(7.25), "wiki.txt")
    assert "| base + adapter | 2.0000 | 7.25 |" in once
    assert once.index("## Error") < once.index("## Perplexity on `wiki.txt`") < once.index("## Kept as it was")
    assert once.replace(once[once.index("## Perplexity") : once.index("## Kept as it was")], "") == card
    again = with_perplexity(with_perplexity(once, measured(8.5), "novel.txt"), measured(6.5), "wiki.txt")
    assert again.count("## Perplexity on `wiki.txt`") == again.count("## Perplexity on `novel.txt`") == 1
    assert "7.25" not in again
    assert "| base + adapter | 2.0000 | 6.5 |" in again
    assert again.endswith(card[card.index("## Kept as it was") :])
    edited = with_perplexity("# mine\n", measured(7.25), "wiki.txt")
    assert edited.startswith("# mine\n\n## Perplexity on `wiki.txt`\n")
    assert with_perplexity(edited, measured(6.5), "wiki.txt").count("## Perplexity") == 1


def test_a_trained_adapter_is_not_in_the_repository_and_the_card_says_so() -> None:
    measured = Evaluation(62, 2, 32, "as it is", (Row("base + trained adapter", 1.0, 2.75),), ())
    assert "| base + trained adapter, which is not in this folder | 1.0000 | 2.75 |" in with_perplexity(
        "", measured, "a"
    )
