"""The page of `loftq inspect --html`: what it says, and how a real browser shows it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from loftq_cli import quantize
from loftq_cli.cli import app
from loftq_cli.config import QuantizeConfig
from loftq_cli.page import page
from loftq_cli.pipeline import plan_quantize
from loftq_cli.report import plan_summary
from tests.conftest import save_llama

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium, and `scripts/test` could not install it")
LAYERS = 12  # so that names in alphabetical order would stand out

# what the browser has made of the page, as JSON in its title: `--dump-dom` prints it
LOOK = """<script>addEventListener("load", () => {
  const shown = [...document.querySelectorAll(".panel")].map(p => getComputedStyle(p).display != "none")
  const panel = document.querySelectorAll(".panel")[shown.indexOf(true)]
  const lines = [...panel.querySelectorAll("tbody tr")].map(tr => [...tr.children].map(cell => {
    const box = cell.getBoundingClientRect()
    return {text: cell.innerText, paper: getComputedStyle(cell).backgroundColor, wide: box.width, high: box.height}}))
  const label = document.querySelectorAll("label")[CLICK]
  const found = {shown, lines, sideways: document.documentElement.scrollWidth - innerWidth}
  label.click()
  found.then = [...document.querySelectorAll(".panel")].map(p => getComputedStyle(p).display != "none")
  document.title = JSON.stringify(found)
})</script>"""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    model = save_llama(folder / "a <b> & c", num_hidden_layers=LAYERS, hidden_size=64, intermediate_size=96)
    out = folder / "out"
    quantize(model, out, bits=2, rank=4, iters=1, format="packed", bits_for={"*.3.mlp.*": 4}, device="cpu")
    return out


@pytest.fixture(scope="module")
def report(out: Path) -> dict[str, Any]:
    return json.loads((out / "loftq_report.json").read_text())


def browse(folder: Path, html: str, look: str) -> dict[str, Any]:
    file = folder / "page.html"
    file.write_text(html + look, encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1280,900", "--virtual-time-budget=2000"]
    assert CHROMIUM is not None
    command = [CHROMIUM, *flags, f"--user-data-dir={folder / 'profile'}", "--dump-dom", file.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    return json.loads(unescape(re.search("<title>(.*?)</title>", dom, re.S)[1]))


def test_the_page_needs_nothing_else_and_says_every_error(report: dict[str, Any]) -> None:
    html = page(report)
    assert not re.search(r"(src|href)=|@import|url\(|<script", html)
    assert "a &lt;b&gt; &amp; c, quantized" in html
    assert "<b>" not in html
    for row in report["weights"]:
        assert f'title="{row["name"]}: {row["relative_error"]:.6f}"' in html
        assert f'title="{row["name"]}: {row["relative_error_without_adapter"]:.6f}"' in html
        assert f'title="{row["name"]}: {row["bits"]} bits"' in html


def test_a_plan_has_bits_and_no_errors(tiny_llama: Path) -> None:
    told = plan_summary(plan_quantize(str(tiny_llama), QuantizeConfig(bits=3, rank=4)))
    html = page(told)
    assert "tiny-llama, plan" in html
    assert "error" not in html
    assert html.count(": 3 bits") == len(told["weights"]) == 14
    assert "output head" in html


@needs_chromium
def test_a_browser_shows_the_map(report: dict[str, Any], tmp_path: Path) -> None:
    seen = browse(tmp_path, page(report), LOOK.replace("CLICK", "2"))
    assert seen["shown"] == [False, True, False, False]  # with the adapter; beside it: without, bits, parameters
    assert seen["then"] == [False, False, True, False]  # bits, after a click
    assert [line[0]["text"] for line in seen["lines"]] == [f"model.layers.{n}" for n in range(LAYERS)]
    assert seen["sideways"] <= 0
    cells = [cell for line in seen["lines"] for cell in line[1:]]
    assert all(cell["wide"] > 20 and cell["high"] > 10 for cell in cells)
    errors = {f"{row['relative_error']:.3f}" for row in report["weights"]}
    assert {cell["text"] for cell in cells} == errors

    def opacity(cell: dict[str, Any]) -> float:
        return float([*re.findall(r"[\d.]+", cell["paper"]), "1"][3])

    at_4 = [cell for cell in seen["lines"][3][1:] if float(cell["text"]) < 0.2]
    assert len(at_4) == 3
    assert max(map(opacity, at_4)) < min(opacity(cell) for cell in cells if cell not in at_4)


@needs_chromium
def test_a_browser_shows_a_plan(tiny_llama: Path, tmp_path: Path) -> None:
    html = page(plan_summary(plan_quantize(str(tiny_llama), QuantizeConfig(bits=2, rank=4))))
    seen = browse(tmp_path, html, LOOK.replace("CLICK", "1"))
    assert (seen["shown"], seen["then"]) == ([True, False], [False, True])
    assert {cell["text"] for line in seen["lines"] for cell in line[1:]} == {"2"}


LOOK_AT_CARD = """<script>addEventListener("load", () => {
  const image = document.querySelector("img")
  document.title = JSON.stringify({
    chart: [image.naturalWidth, image.naturalHeight, image.alt],
    headings: [...document.querySelectorAll("h1, h2")].map(h => h.innerText),
    rows: [...document.querySelectorAll("table:first-of-type tbody tr")].map(tr => tr.innerText.split("\\t")),
    code: [...document.querySelectorAll("pre code")].map(code => code.innerText),
    stray: document.body.innerText.match(/\\*\\*|^#|\\]\\(/m)})
})</script>"""


@needs_chromium
def test_a_browser_shows_the_card_and_its_chart(out: Path, report: dict[str, Any], tmp_path: Path) -> None:
    """As the Hub does: the front matter apart, the rest as GitHub's Markdown, the chart beside it."""
    from markdown_it import MarkdownIt

    _, matter, body = (out / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert "library_name" in matter
    html = MarkdownIt("commonmark").enable("table").render(body)
    shutil.copy(out / "loftq_errors.svg", tmp_path)
    seen = browse(tmp_path, f"<!doctype html><title></title><body>{html}</body>", LOOK_AT_CARD)
    assert seen["chart"][0] > 300
    assert seen["chart"][2]
    assert seen["stray"] is None
    assert "2-bit base with a LoRA adapter" in seen["headings"][0]
    assert any("from_pretrained(" in code for code in seen["code"])
    errors = {cell for row in seen["rows"] for cell in row}
    assert f"{report['totals']['relative_error']:.4f}" in errors
    svg = (out / "loftq_errors.svg").read_text()
    drawn = re.findall(r"<title>model\.layers\.(\d+):", svg)
    assert drawn == [str(number) for number in range(LAYERS)]


def test_a_page_takes_no_other_file_s_place(tiny_llama: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    for _ in range(2):  # its own it does
        assert CliRunner().invoke(app, ["inspect", str(tiny_llama), "--html", str(page)]).exit_code == 0
    (tmp_path / "README.md").write_text("# a card\n")
    refused = CliRunner().invoke(app, ["inspect", str(tiny_llama), "--html", str(tmp_path / "README.md")])
    assert refused.exit_code == 1
    assert "README.md` is no page" in refused.stderr
    assert (tmp_path / "README.md").read_text() == "# a card\n"
