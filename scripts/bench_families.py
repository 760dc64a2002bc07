"""`bench.py families`: what the suite says of each family of models, as a table.

Tiny random models of each kind are quantized, loaded by the printed lines, trained, verified, calibrated, and planned
in every format: see tests/test_families.py, whose outcome this is.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from bench_common import print_table, save

NAME = "families"
COLUMNS = {"family": "", "class": "", "weight-only": "", "calibrated": "", "formats at 4 bits": ""}
SUITE = "tests/test_families.py"
LOADED = "test_the_printed_lines_load_what_the_report_says"  # once for each of some formats


def families() -> None:
    """Run the suite, fill and print the table."""
    with tempfile.TemporaryDirectory() as work:
        report = Path(work) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", SUITE, "--numprocesses", "auto", f"--junitxml={report}"]
        ended = subprocess.run(command, cwd=Path(__file__).parents[1], stdout=sys.stderr)
        if ended.returncode:
            sys.exit(ended.returncode)
        rows = rows_of(report)
    save(NAME, rows, command="python scripts/bench.py families")
    print_table(rows, COLUMNS)


def rows_of(report: Path) -> list[dict[str, Any]]:
    """A row for each family of a suite that passed, in its order."""
    rows: dict[str, dict[str, str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        test, _, family = case.attrib["name"].removesuffix("]").partition("[")
        found = {entry.attrib["name"]: entry.attrib["value"] for entry in case.iter("property")}
        if test == LOADED:
            found, family = {"weight-only": "yes"}, family.rpartition("-")[0]
        if found:
            rows.setdefault(family, {}).update(found)
    return [{"family": family, **row} for family, row in sorted(rows.items())]
