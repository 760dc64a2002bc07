"""The shape of the code itself: who may import whom, how long a file may be, who may speak."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "loftq_cli"
FILES = sorted(PACKAGE.rglob("*.py"))
OWN = {  # folder → what it may import of this package
    "kernels": {"loftq_cli.kernels"},
    "quantizers": {"loftq_cli.quantizers", "loftq_cli.kernels"},
    "lowrank": {"loftq_cli.lowrank", "loftq_cli.kernels"},
    "methods": {"loftq_cli.methods", "loftq_cli.lowrank", "loftq_cli.quantizers", "loftq_cli.kernels"},
    "formats": {"loftq_cli.formats", "loftq_cli.quantizers", "loftq_cli.errors"},
    "runtime": {"loftq_cli.runtime", "loftq_cli.quantizers", "loftq_cli.kernels"},
    "checkpoint": {"loftq_cli.checkpoint", "loftq_cli.errors"},
    "calibration": {"loftq_cli.calibration", "loftq_cli.checkpoint", "loftq_cli.errors"},
}
FOREIGN = {  # folder → packages beside the standard library
    "kernels": {"torch", "triton"},
    "quantizers": {"torch"},
    "lowrank": {"torch"},
    "methods": {"torch"},
    "formats": {"torch"},
    "runtime": {"torch", "transformers"},
    "checkpoint": {"torch", "safetensors", "huggingface_hub"},
    "calibration": {"torch", "datasets"},
}


def imported(path: Path) -> set[str]:
    """Modules a file imports when it runs: those under `if TYPE_CHECKING:` do not count."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = [ast.Pass()]
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_layers(path: Path) -> None:
    folder = path.relative_to(PACKAGE).parts[0]
    if folder not in OWN:
        return
    for name in imported(path):
        if name.startswith("loftq_cli"):
            assert any(name == allowed or name.startswith(allowed + ".") for allowed in OWN[folder]), name
        elif name.split(".")[0] not in sys.stdlib_module_names:
            assert name.split(".")[0] in FOREIGN[folder], name
            assert "huggingface_hub" not in name or path.name == "hub.py"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_can_be_held_in_the_head(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300


def test_help_loads_neither_torch_nor_transformers_and_is_quick() -> None:
    code = (
        "import sys, time\n"
        "from typer.testing import CliRunner\n"
        "from loftq_cli.cli import app\n"
        "result = CliRunner().invoke(app, ['--help'])\n"
        "assert result.exit_code == 0 and 'quantize' in result.output\n"
        "heavy = {'torch', 'transformers', 'pydantic', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "print(time.process_time())\n"
    )
    seconds = [float(subprocess.check_output([sys.executable, "-c", code], text=True)) for _ in range(3)]
    assert min(seconds) < 0.3, seconds
