"""What was decided and measured, as JSON for programs, and the figures and lines that people see of it."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import re
import resource
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loftq_cli import __version__
from loftq_cli.config import CALIBRATED
from loftq_cli.formats import FORMATS, load_imports
from loftq_cli.jobs import BLOCK
from loftq_cli.journal import Journal
from loftq_cli.memory import activation_bytes, device_bytes, host_bytes
from loftq_cli.plan import Plan

SCHEMA = 3
REWRITTEN = ("base_model_name_or_path", "revision")  # in adapter_config.json, by a push
PLACEHOLDER = "PATH_OR_HUB_ID_OF_THIS_FOLDER"  # in the load lines of a card, until a push knows better
STAGES = ("total", "read", "text", "quantize", "low_rank", "train", "write")  # text: running it through the model


def base_fingerprint(files: Mapping[str, str]) -> str:
    """The hash of a base checkpoint: sha256 over the names and sha256 of its shards, index and config.json."""
    return hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()


def pooled(errors_and_norms: Iterable[tuple[float, float]]) -> float:
    """Relative error over several weights: √(Σ (error · norm)² / Σ norm²), from each one's relative error and norm."""
    pairs = list(errors_and_norms)
    norms = math.fsum(norm**2 for _, norm in pairs)
    return math.sqrt(math.fsum((error * norm) ** 2 for error, norm in pairs) / norms) if norms else 0.0


def build_report(
    plan: Plan,
    journal: Journal,
    files: Mapping[str, str],
    side_files: Mapping[str, str],
    adapter_config: Mapping[str, Any],
    device: torch.device,
) -> dict[str, Any]:
    """The content of `loftq_report.json`; `files` and `side_files`, which are copies, map names in OUT to sha256."""
    order = {job.tensor: position for position, job in enumerate(plan.jobs)}
    rows = sorted(journal.rows.values(), key=lambda row: order[row["tensor"]])
    return {
        "schema": SCHEMA,
        "version": __version__,
        "source": {
            "model": plan.checkpoint.model,
            "revision": plan.checkpoint.revision,
            "fingerprint": plan.checkpoint.fingerprint,
        },
        "config": {**plan.config.model_dump(mode="json"), "device": device.type},
        "load": {
            "auto_class": plan.targets.auto_class,
            "requirements": list(plan.format.requirements),
            "imports": list(load_imports(plan.format)),
            "remote_code": plan.remote_code is not None,  # that does without those imports
        },
        # all but what a push rewrites
        "adapter_config": {k: v for k, v in adapter_config.items() if k not in REWRITTEN},
        "totals": {
            **plan_totals(plan),
            "relative_error": pooled((row["relative_error"], row["norm"]) for row in rows),
            "relative_error_without_adapter": pooled(
                (row["relative_error_without_adapter"], row["norm"]) for row in rows
            ),
            "seconds": {stage: round(journal.seconds.get(stage, 0.0), 3) for stage in STAGES},
            "peak_host_bytes": journal.peaks.get("host", 0),
            "peak_device_bytes": journal.peaks.get("device", 0),
        },
        "weights": rows,
        "skipped": [{"name": name, "reason": reason} for name, reason in plan.skipped.items()],
        "files": dict(files),
        "side_files": dict(side_files),
    }


def plan_totals(plan: Plan) -> dict[str, Any]:
    """The totals that are known from headers alone."""
    return {
        "weights": len(plan.jobs),
        "parameters": plan.parameters,
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "source_bytes": sum(info.nbytes for info in plan.checkpoint.tensors.values()),
        "base_bytes": plan.base_bytes,
        "adapter_bytes": plan.adapter_bytes,
    }


def plan_summary(plan: Plan) -> dict[str, Any]:
    """What `--dry-run --json` prints: the report's keys that need no weight to be read."""
    return {
        "schema": SCHEMA,
        "version": __version__,
        "source": {
            "model": plan.checkpoint.model,
            "revision": plan.checkpoint.revision,
            "fingerprint": plan.checkpoint.fingerprint,
        },
        "config": plan.config.model_dump(mode="json"),
        "totals": {
            **plan_totals(plan),
            "estimated_peak_host_bytes": host_bytes(plan),
            "estimated_peak_device_bytes": device_bytes(plan),
            "estimated_activation_bytes": activation_bytes(plan),
        },
        "weights": [
            {"name": job.module, "tensor": job.tensor, "shape": list(job.shape)}
            | {key: getattr(job, key) for key in ("bits", "group_size", "quantizer", "rank")}
            for job in plan.jobs
        ],
        "skipped": [{"name": name, "reason": reason} for name, reason in plan.skipped.items()],
        "notes": list(plan.notes),
    }


def peak_host_bytes() -> int:
    """Peak resident memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB


@dataclass(frozen=True)
class Group:
    """The weights of one kind of layer, pooled: one row of the table that people see."""

    kind: str
    weights: int
    parameters: int
    shapes: str
    bits: str
    errors: tuple[float | None, ...]  # those of `error_columns`; none in a plan


def error_columns(config: Mapping[str, Any]) -> dict[str, str]:
    """What the tables show of errors: heads, and the fields of a row that they stand over.

    Weights, where these are all that a method has looked at; else what layers say, for these weights are to be better
    than the source's where better serves what layers say.
    """
    if config["method"] not in CALIBRATED:
        return {"base alone": "relative_error_without_adapter", "base + adapter": "relative_error"}
    return {
        "base alone": "output_error_without_adapter",
        "base + adapter": "output_error",
        "held out: alone": "held_out_output_error_without_adapter",
        "+ adapter": "held_out_output_error",
    }


def pooled_errors(rows: Sequence[Mapping[str, Any]], fields: Iterable[str]) -> tuple[float | None, ...]:
    """Each field over the rows that have it, None where none has: weights by their norms, outputs all alike."""
    having = {field: [row for row in rows if field in row] for field in fields}
    return tuple(
        pooled((row[field], 1.0 if "output" in field else row["norm"]) for row in there) if there else None
        for field, there in having.items()
    )


def trained(report: Mapping[str, Any]) -> str | None:
    """What became of training, judged on the windows held out; None where nothing was trained."""
    fits = {
        (row["name"] if report["config"]["method"] == "apiq-lw" else (BLOCK.match(row["name"]) or [""])[0]): row[
            "training"
        ]
        for row in report["weights"]
        if "training" in row
    }  # of a block, all its rows have the same
    finish = report.get("calibration", {}).get("finish")
    if not fits and not finish:
        return None
    text = report["calibration"]
    held_out = f"{text['held_out']} × {text['seqlen']} tokens held out"
    on = f"on {held_out}" if text["held_out"] else "on the text itself, for want of any held out"
    parts = []
    if fits:
        what = "weights" if report["config"]["method"] == "apiq-lw" else "blocks"
        helped = sum(_helped(fit) for fit in fits.values())
        rest = "" if helped == len(fits) else "; the others keep their start"
        parts.append(f"training helped {helped} of {len(fits)} {what} {on}{rest}")
    if finish:
        how = f"{finish['before']:.4g} → {finish['after']:.4g}" if _helped(finish) else "no gain, so its start is kept"
        parts.append(f"finish {on}: {how}")
    return "; ".join(parts)


def about_experts(report: Mapping[str, Any]) -> str | None:
    """What the experts of a model have, and layers whose adapter PEFT takes for theirs; None where there are none."""
    experts = [row for row in report["weights"] if "expert" in row]
    others = [row for row in report["weights"] if "expert" not in row and not row["rank"]]
    why = f"{len(others)} weights of other layers have no adapter, because PEFT would put it on the experts"
    rest = f"{why} (in `packed` and `dense` they have one)" if others else "all other weights have one"
    if not experts:
        return rest if others else None
    adapter = "an adapter each" if experts[0]["rank"] else "no adapter"
    if report["adapter_config"]["rank_pattern"]:
        adapter += " (PEFT 0.21 says that it ignores keys of `rank_pattern` and `alpha_pattern`, and does not)"
    how = ", chosen without looking at text" if report["config"]["method"] in CALIBRATED else ""
    return f"the {len(experts)} weights of experts have their bits{how}, and {adapter}; {rest}"


def _helped(fit: Mapping[str, Any]) -> bool:
    before, after = fit["before"], fit["after"]
    return after is not None and (before is None or after < before)


def in_figures(errors: Iterable[float | None]) -> tuple[str, ...]:
    """Errors as tables show them; what was not measured is a dash."""
    return tuple("–" if error is None else f"{error:.4f}" for error in errors)


def layer_groups(weights: Iterable[Mapping[str, Any]], fields: Iterable[str] = ()) -> list[Group]:
    """Pool rows whose module names differ only in layer numbers, with the errors in `fields`."""
    kinds: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in weights:
        kinds[re.sub(r"\.\d+(?=\.|$)", ".*", row["name"])].append(row)
    fields = list(fields)
    return [
        Group(
            kind=kind,
            weights=len(rows),
            parameters=sum(math.prod(row["shape"]) for row in rows),
            shapes=", ".join(dict.fromkeys(f"{m}×{n}" for m, n in (row["shape"] for row in rows))),
            bits=_widths(Counter(row["bits"] for row in rows)),
            errors=pooled_errors(rows, fields),
        )
        for kind, rows in kinds.items()
    ]


def _widths(counts: Mapping[int, int]) -> str:
    """`4`, or where there are several, how many have each: `2 (20), 4 (10)`."""
    if len(counts) == 1:
        return str(next(iter(counts)))
    return ", ".join(f"{bits} ({count})" for bits, count in sorted(counts.items()))


def block_order(path: str) -> tuple[bool, str, int]:
    """To sort paths of blocks by their numbers, and what is in none behind them."""
    name, _, number = path.rpartition(".")
    return (False, name, int(number)) if number.isdigit() else (True, path, 0)


def skip_counts(skipped: Iterable[Mapping[str, str]]) -> list[tuple[str, int, str]]:
    """`(reason, how many, first name)` of skipped tensors, most frequent first."""
    first: dict[str, str] = {}
    for row in skipped:
        first.setdefault(row["reason"], row["name"])
    counts = Counter(row["reason"] for row in skipped)
    return [(reason, count, first[reason]) for reason, count in counts.most_common()]


def load_lines(
    report: Mapping[str, Any], folder: str, revision: str | None = None, *, on_hub: bool = False
) -> list[str]:
    """Python that loads base and adapter, ready to paste; `folder` is OUT or a Hub id, at a branch of it.

    From the Hub people load what they have not made: where the loader's code travels along, loftq is not needed.
    """
    auto_class, place = report["load"]["auto_class"], json.dumps(folder, ensure_ascii=False)
    travels = on_hub and report["load"].get("remote_code", False)
    remote = ", trust_remote_code=True" if report["config"]["trust_remote_code"] or travels else ""
    branch = f", revision={json.dumps(revision, ensure_ascii=False)}" if revision else ""
    return [
        *(f"import {name}" for name in ([] if travels else report["load"].get("imports", ()))),
        "from peft import PeftModel",
        f"from transformers import {auto_class}",
        "",
        f"base = {auto_class}.from_pretrained({place}{branch}{remote})",
        f'model = PeftModel.from_pretrained(base, {place}{branch}, subfolder="loftq_init", is_trainable=True)',
    ]


def import_loader(report: Mapping[str, Any]) -> None:
    """Import what the output's format is loaded with."""
    for name in load_imports(FORMATS[report["config"]["format"]]):  # not what a file says: that could be anything
        importlib.import_module(name)


def install_line(report: Mapping[str, Any]) -> str:
    """What must be installed to load."""
    # earlier ones take experts' parameters for transposed, and load nothing of models that have experts
    mixture = report["adapter_config"].get("target_parameters") or any("expert" in row for row in report["weights"])
    peft = "peft>=0.20" if mixture else "peft"
    return shlex.join(["pip", "install", "transformers", peft, *report["load"]["requirements"]])
