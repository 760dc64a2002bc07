"""The quantized models that `finetune.py` trains on: made once, described, removed where nobody keeps them."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_common import GROUP_SIZE, say
from bench_quantize import run_process
from finetune_tasks import digest

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Base:
    """`report` is loftq's; None of the model itself. `seconds` it took to make; None where it was there."""

    folder: Path
    report: dict[str, Any] | None
    seconds: float | None


@contextmanager
def made(model: Path, flags: list[str], device: str, cache: Path, keep: bool) -> Iterator[Base]:
    """The output of `loftq quantize` with `flags`, from `cache` or made now; the model itself without flags."""
    if not flags:
        yield Base(model, None, 0.0)
        return
    from filelock import FileLock

    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / f"{model.resolve().name}-{digest([str(model.resolve()), flags])}"
    seconds = None
    with FileLock(folder.with_suffix(".lock")):  # another process may be making it: then it is waited for
        if not (folder / "loftq_report.json").exists():  # written last
            absolute = [str(ROOT / flag) if flag.startswith("configs/") else flag for flag in flags]
            command = [sys.executable, "-m", "loftq_cli", "quantize", "--json", "-q", "--resume", *absolute]
            seconds = run_process([*command, "--device", device, str(model), str(folder)])["wall"]
            say(f"  quantized in {seconds:.1f} s")
    try:
        yield Base(folder, json.loads((folder / "loftq_report.json").read_text()), seconds)
    finally:
        if not keep:
            shutil.rmtree(folder)


def describe_base(item: dict[str, Any], base: Base, model: Path, shown: list[str]) -> dict[str, Any]:
    """A row of "bases": its sizes are those in `packed`, whatever format the arm is computed in."""
    row = {**item, "flags": shlex.join(shown), "seconds": base.seconds, "before": {}}
    if base.report is None:
        return row | {"bits per weight": 16.0, "with adapter": None, "relative error": 0.0}
    from loftq_cli.config import QuantizeConfig
    from loftq_cli.pipeline import plan_quantize

    known = {key: value for key, value in base.report["config"].items() if key in QuantizeConfig.model_fields}
    plan = plan_quantize(str(model), QuantizeConfig(**{**known, "format": "packed", "device": "cpu"}))
    idle = plan.config.method == "qlora" and plan.config.rank != item["rank"]  # of a control: zero, and stays so
    return row | {
        "bits per weight": plan.bits_per_weight,
        "with adapter": None if idle else plan.bits_per_weight + 8 * plan.adapter_bytes / plan.parameters,
        "relative error": base.report["totals"]["relative_error"],
    }


def write_control(model: Path, rank: int, device: str, file: Path) -> Path:
    """A configuration with as many bytes as a 2-bit base and an adapter of `rank`, spent as `--report-control` does."""
    from loftq_cli.config import QuantizeConfig
    from loftq_cli.control import control
    from loftq_cli.pipeline import plan_quantize

    config = QuantizeConfig(bits=2, rank=rank, group_size=GROUP_SIZE, quantizer="lloyd", format="packed", device=device)
    bits_for = control(plan_quantize(str(model), config))["bits_for"]
    quantizer = "uniform" if 8 in bits_for.values() else "lloyd"  # codebooks do not have 8 bits
    lines = [f"quantizer: {quantizer}", "bits_for:", *(f"  {module}: {bits}" for module, bits in bits_for.items())]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n")
    return file
