"""The README speaks of what is there."""

from __future__ import annotations

import inspect
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from loftq_cli import cli
from loftq_cli.formats import FORMATS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_every_flag_is_in_the_option_table() -> None:
    arguments = set(inspect.signature(cli.quantize).parameters) - {"model", "out", "quiet", "verbose"}
    missing = [name for name in arguments if f"`--{name.replace('_', '-')}" not in README]
    assert not missing


def test_every_format_is_in_the_table() -> None:
    assert all(f"| `{name}` |" in README for name in FORMATS)


def test_every_module_is_in_the_layout() -> None:
    layout = README[README.index("## Layout") : README.index("### Add a quantizer")]
    for path in (ROOT / "loftq_cli").glob("*.py"):
        assert path.name in layout or path.name.startswith("__"), path.name
    for folder in (ROOT / "loftq_cli").iterdir():
        assert folder.name == "__pycache__" or folder.suffix or f"{folder.name}/" in layout


@pytest.mark.parametrize("command", sorted(set(re.findall(r"^scripts/\w+", README, re.MULTILINE))))
def test_the_commands_exist_and_can_be_run(command: str) -> None:
    assert os.access(ROOT / command, os.X_OK)


def test_advice_on_settings_is_what_was_measured() -> None:
    def row(file: str, arm: str, bits: object) -> dict[str, Any]:
        rows = json.loads((ROOT / "scripts/results" / f"{file}.json").read_text())["rows"]
        return next(row for row in rows if arm in (row.get("method"), row.get("arm")) and row["bits"] == bits)

    lines = README.partition("## Which settings")[2].partition("\n## ")[0].split("\n|")[3:]
    advised = (
        ("loftq-nf", 4), ("loftq-lloyd", 2), ("cloq-lloyd", 4), ("cloq-lloyd", 2), ("apiq-bw-finish-lloyd", 2),
        ("task-text", 2),
    )  # fmt: skip
    for line, (arm, bits) in zip(lines, advised, strict=True):  # of rank 16, which comes first
        after, before = row("finetune-cuda", arm, str(bits)), "–"
        if not arm.startswith("task"):
            worse = row("perplexity-cuda", arm, bits)["Wikipedia, × source"]
            before = f"{worse:,.{0 if worse > 10 else 2}f}"
        cells = f" | {before} | {after['accuracy, %'].split()[0]} %, {float(after['× 16-bit']):.2f} |"
        assert line.partition("\n")[0].endswith(cells), line


def test_what_lies_between_2_and_4_bits_is_what_was_measured() -> None:
    rows = json.loads((ROOT / "scripts/results/finetune-cuda.json").read_text())["rows"]
    lines = README.partition("At the widths between")[2].split("\n\n")[1].split("\n")
    widths = [(bits, rank) for bits in ("3", "2.5", "2.25") for rank in (16, 64)]
    for line, arm in zip(lines[2:], ("qlora-nf", "loftq-nf", "cloq-lloyd", "apiq-bw-finish-lloyd"), strict=True):
        found = {(row["bits"], row["rank"]): float(row["× 16-bit"]) for row in rows if row["arm"] == arm}
        assert [float(cell) for cell in line.split("|")[2:-1]] == pytest.approx([found[at] for at in widths], rel=0.005)


def test_measured_tables_are_those_of_the_results() -> None:
    """Every row that scripts/bench.py printed stands in the README as it was printed."""
    from scripts import bench

    files = sorted((ROOT / "scripts/results").glob("*.json"))
    places = set(re.findall(r"^<!-- (\S+) -->$", README, re.MULTILINE)) - {"end"}
    assert {file.stem for file in files if not file.stem.startswith("profile")} == places
    assert {"agree-cuda", "loop", "loop-cuda", "quantize-cuda", "svd", "table"} <= places
    for file in files:
        if file.stem not in places:  # profiles are to be read as they are
            continue
        rows = json.loads(file.read_text())["rows"]
        for row in rows:
            printed = sys.modules["bench_common"].table_row(row, bench.COLUMNS[file.stem.partition("-cuda")[0]])
            assert printed in README, f"{file.name}: {printed}"
