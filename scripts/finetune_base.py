"""The quantized models that `finetune.py` and `bench.py perplexity` look at: removed where nobody keeps them."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench_common import GROUP_SIZE, say
from bench_quantize import run_process
from finetune_tasks import digest, file_digest

from loftq_cli import __version__

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Base:
    """`report` is loftq's; None of the model itself. `process` is what made it, where one whole process did."""

    folder: Path
    report: dict[str, Any] | None
    process: dict[str, Any] | None

    @property
    def seconds(self) -> float | None:
        """That it took to make; 0 for the model itself, None where not all of it was made now."""
        return 0.0 if self.report is None else self.process and self.process["wall"]

    @property
    def made_of(self) -> str:
        """Names the bytes of its files: two runs with the same have been trained on the same."""
        files = {} if self.report is None else self.report["files"]
        return digest({name: value for name, value in sorted(files.items()) if name.endswith(".safetensors")})


@contextmanager
def made(model: Path, flags: list[str], device: str, cache: Path, keep: bool, again: bool = False) -> Iterator[Base]:
    """The output of `loftq quantize` with `flags`, from `cache` or made now; the model itself without flags.

    What the cache has is of the same version of loftq, of the model as it is now, and of files, named in flags, of the
    same content.
    """
    if not flags:
        yield Base(model, None, None)
        return
    from filelock import FileLock

    cache.mkdir(parents=True, exist_ok=True)
    contents = [file_digest(Path(flag)) for flag in flags if Path(flag).is_file()]
    weights = [(file.name, *file.stat()[6:9:2]) for file in sorted(model.glob("*.safetensors"))]  # bytes, time
    folder = cache / f"{model.resolve().name}-{digest([__version__, str(model.resolve()), weights, flags, contents])}"
    process = None
    with FileLock(folder.with_suffix(".lock")):  # another process may be making it: then it is waited for
        if again and folder.exists():
            shutil.rmtree(folder)
        if not (folder / "loftq_report.json").exists():  # written last
            absolute = [str(ROOT / flag) if flag.startswith("configs/") else flag for flag in flags]
            command = [sys.executable, "-m", "loftq_cli", "quantize", "--json", "-q", "--resume", *absolute]
            begun = folder.exists()
            process = run_process([*command, "--device", device, str(model), str(folder)])
            say(f"  quantized in {process['wall']:.1f} s" + (", having gone on with what was there" if begun else ""))
            process = None if begun else process
    try:
        yield Base(folder, json.loads((folder / "loftq_report.json").read_text()), process)
    finally:
        if not keep:
            shutil.rmtree(folder)


def describe_base(item: dict[str, Any], base: Base, model: Path, shown: list[str], text: str | None) -> dict[str, Any]:
    """A row of "bases": its sizes are those in `packed`, whatever format the arm is computed in.

    Args:
        text: a digest of what it is calibrated on.
    """
    row = {**item, "flags": shlex.join(shown), "text": text, "made_of": base.made_of, "seconds": base.seconds}
    row["before"] = {}
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


def share_of_process() -> slice:
    """Which bases are this process's, where `accelerate launch` or torchrun began several, each with a GPU of its own.

    To be called before anything looks for GPUs. What this process begins itself is none of those.
    """
    found = {name: os.environ.pop(name, None) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    rank, size, local = (int(value or default) for value, default in zip(found.values(), (0, 1, 0), strict=True))
    if size > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = (
            visible.split(",")[local % (visible.count(",") + 1)] if visible else str(local)
        )
    return slice(rank, None, size)


def digest_of_text(flags: list[str]) -> str | None:
    """Of the text that a method is calibrated on, if that is a file."""
    apart = [part for flag in flags for part in (flag.split("=", 1) if flag.startswith("--calibration=") else [flag])]
    given = [Path(value) for flag, value in pairwise(apart) if flag == "--calibration"]
    return file_digest(given[-1]) if given and given[-1].is_file() else None


def digest_of_weights(model: Path) -> str:
    """Of a checkpoint, which others of its name may differ from."""
    digest = hashlib.sha256()
    for file in sorted(model.glob("*.safetensors")) or sorted(model.glob("*.bin")):
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:12]


def write_control(model: Path, rank: int, device: str, file: Path, adapter: int) -> Path:
    """A configuration with as many bytes as a 2-bit base and an adapter of `rank`, spent as `--report-control` does.

    Args:
        adapter: the rank of the one that it has itself, out of the same bytes.
    """
    from loftq_cli.config import QuantizeConfig
    from loftq_cli.control import control
    from loftq_cli.pipeline import plan_quantize

    for quantizer in ("lloyd", "uniform"):  # the latter where a weight can have 8 bits, which codebooks do not have
        settings = {"bits": 2, "rank": rank, "group_size": GROUP_SIZE, "quantizer": quantizer, "format": "packed"}
        plan = plan_quantize(str(model), QuantizeConfig(**settings, device=device))
        factors = sum(spec.nbytes for spec in plan.adapter_layout)
        base = round(plan.bits_per_weight * plan.parameters / 8)
        found = control(plan, base + factors - factors * adapter // rank)
        if "8" not in found["weights"]:
            break
    bits_for = (f"  {module}: {bits}" for module, bits in found["bits_for"].items())
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join([f"quantizer: {quantizer}", "bits_for:", *bits_for, ""]))
    return file
