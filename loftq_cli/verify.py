"""Recompute from the files what the report says: hashes, and with the source, every weight's error."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loftq_cli.chart import error_chart
from loftq_cli.checkpoint.files import hash_file, is_ours, leads_out
from loftq_cli.checkpoint.modules import MODULES
from loftq_cli.checkpoint.reader import TensorInfo, lookup, read_chunks, read_header, read_tensor, whole_name
from loftq_cli.checkpoint.source import Checkpoint, open_checkpoint
from loftq_cli.errors import LoftqError
from loftq_cli.formats import FORMATS, peft_adapter
from loftq_cli.journal import CHART_FILE, JOURNAL_FILE, REPORT_FILE, WORK_FOLDER, written_files
from loftq_cli.methods import squared_norm
from loftq_cli.plan import ADAPTER_FILE, FINGERPRINT_KEY
from loftq_cli.report import REWRITTEN, SCHEMA, base_fingerprint, pooled
from loftq_cli.stored import Factors, factor_names, stored_tensor, stored_weight
from loftq_cli.worker import hash_tensor, relative

MODULE_WEIGHTS = (".safetensors", ".bin")  # among side files: of modules beside the model
TOLERANCE = 1e-4  # of a relative error: float32 sums differ between devices and thread counts


@dataclass(frozen=True)
class Verdict:
    """What `verify` found. `violations` name the file or tensor; `weights` is how many errors were recomputed.

    `edited` are tokenizer files and the like that are no longer the source's: nothing here is measured on them, and a
    user may have meant it. `other_source`: violations may come of a source that is another model.
    """

    files: int
    weights: int
    relative_error: float | None
    violations: tuple[str, ...]
    edited: tuple[str, ...]
    other_source: bool = False


def read_report(out: Path) -> dict[str, Any]:
    """The report of a finished run.

    Raises:
        LoftqError: `out` is not a finished output of loftq, or has or names files elsewhere.
    """
    if (out / WORK_FOLDER / JOURNAL_FILE).exists():
        raise LoftqError(f"`{out}` holds an unfinished run", "finish it: the same `loftq quantize` with `--resume`")
    try:
        report = json.loads((out / REPORT_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        found = f"has no `{REPORT_FILE}`" if out.exists() else "does not exist"
        raise LoftqError(f"`{out}` {found}", "give an output of `loftq quantize`; `merge` makes plain models") from None
    except ValueError as error:
        raise LoftqError(f"`{out / REPORT_FILE}` is not valid JSON: {error}") from None
    needed = {"files", "side_files", "weights", "totals", "config", "source", "adapter_config"}
    if not isinstance(report, dict) or not needed <= report.keys():
        raise LoftqError(f"`{out / REPORT_FILE}` is not a report of loftq")
    if report.get("schema") != SCHEMA:
        made = f"loftq {report.get('version')}"
        raise LoftqError(f"`{out / REPORT_FILE}` was written by {made}", f"look at it with {made}, or make it again")
    if not isinstance(report["files"], dict) or not isinstance(report["side_files"], dict):
        raise LoftqError(f"`{out / REPORT_FILE}` is not a report of loftq")
    for name in written_files(report):  # which are read, published, and whose names merge gives to files
        if not is_ours(out, name):
            raise LoftqError(f"`{out / REPORT_FILE}` names {name!r}, which is not in the folder")
        if leads_out(out, name):
            raise LoftqError(f"`{out / name}` leads out of the folder", "replace the link by the file itself")
    return report


def verify(out: Path, source: str | None = None, progress: Callable[[str, int], None] | None = None) -> Verdict:
    """Check `out` against its own report, and with `source` against the weights it was made from.

    Every weight is dequantized from its stored tensors as its loader does, the adapter is applied with the scaling that
    its adapter_config.json states, and the error against the source must be the one in the report.
    """
    report = read_report(out)
    violations = check_adapter(out, report) + check_files(out, report)  # what explains most comes first
    extra = {path.name for path in out.glob("*.safetensors")} - set(report["files"])
    violations += [f"`{name}` is not part of what loftq wrote" for name in sorted(extra)]
    violations += check_all_tensors(out, report)
    violations += _check_totals(report) + _check_chart(out, report)
    count, edited = len(report["files"]) + len(report["side_files"]), _edited(out, report)
    if source is None:
        return Verdict(count, 0, None, tuple(violations), edited)
    checkpoint = open_checkpoint(source, None if Path(source).is_dir() else report["source"]["revision"])
    violations += _check_copies(out, report, checkpoint) + _check_heads(out, checkpoint)
    violations += _check_modules(report, checkpoint)
    rows: list[tuple[float, float]] = []
    if not violations:  # errors recomputed from files that are known to be wrong would tell nothing
        rows, violations = _recompute(out, report, checkpoint, progress or (lambda name, size: None))
    other = bool(violations) and checkpoint.fingerprint != report["source"]["fingerprint"]
    if other:
        at = f" at {report['source']['revision']}" if report["source"]["revision"] else ""
        made_from = f"`{report['source']['model']}`{at}"
        why = "its fingerprint differs; give that, or what follows may say no more than that it is another model"
        violations.insert(0, f"`{source}` is not the checkpoint this was made from, {made_from}: {why}")
    return Verdict(count, len(rows), pooled(rows) if rows else None, tuple(violations), edited, other)


def check_files(out: Path, report: dict[str, Any]) -> list[str]:
    """The files of base and adapter, and weights of other modules, have the hashes in the report; the rest is there."""
    violations = []
    for name, expected in (report["files"] | report["side_files"]).items():
        path, is_copy = out / name, name in report["side_files"] and not name.endswith(MODULE_WEIGHTS)
        if not path.is_file():
            violations.append(f"`{name}` is missing")
        elif not is_copy and (actual := hash_file(path)) != expected:
            violations.append(f"`{name}`: sha256 is {actual[:12]}…, the report says {expected[:12]}…")
    return violations


def _edited(out: Path, report: dict[str, Any]) -> tuple[str, ...]:
    """The copies of the source's files that differ from what was copied."""
    copies = (item for item in report["side_files"].items() if not item[0].endswith(MODULE_WEIGHTS))
    return tuple(name for name, sha256 in copies if (out / name).is_file() and hash_file(out / name) != sha256)


def check_all_tensors(out: Path, report: dict[str, Any]) -> list[str]:
    """Every stored tensor of a quantized weight, and its factors, must be what was computed for it."""
    violations = []
    infos: dict[str, TensorInfo] = {}
    for name in report["files"]:
        if name.endswith(".safetensors") and (out / name).is_file():
            try:
                infos.update(read_header(out / name, name).tensors)
            except LoftqError as error:
                violations.append(error.message)
    factors = Factors(out, infos)
    return violations + [text for row in report["weights"] for text in check_tensors(out, row, infos, factors)]


def check_tensors(out: Path, row: dict[str, Any], infos: dict[str, TensorInfo], factors: Factors) -> list[str]:
    """What is wrong with the stored tensors and the factors of one row of the report, by their hashes."""
    violations = []
    names = factor_names(row) if row["rank"] else ()
    for tensor, expected in row["sha256"].items():
        try:
            stored = factors.stored(row)[names.index(tensor)] if tensor in names else stored_tensor(out, infos, tensor)
        except LoftqError:
            violations.append(f"`{tensor}` of `{row['tensor']}` is in no file")
            continue
        if hash_tensor(stored) != expected:
            info = lookup(infos, tensor)
            file = ADAPTER_FILE if info is None else info.file
            violations.append(f"`{tensor}` in `{file}` is not what was written for `{row['tensor']}`")
    return violations


def _check_chart(out: Path, report: dict[str, Any]) -> list[str]:
    """The chart must draw the rows."""
    path = out / CHART_FILE
    if not path.is_file():
        return [f"`{CHART_FILE}` is missing"]
    return [] if path.read_bytes() == error_chart(report).encode() else [f"`{CHART_FILE}` does not draw the errors"]


def _check_totals(report: dict[str, Any]) -> list[str]:
    """The totals must pool the rows."""
    violations = []
    for key in ("relative_error", "relative_error_without_adapter"):
        total = pooled((row[key], row["norm"]) for row in report["weights"])
        if not math.isclose(total, report["totals"][key], rel_tol=1e-9, abs_tol=1e-12):
            violations.append(f"`{REPORT_FILE}`: totals.{key} is {report['totals'][key]}, its rows pool to {total}")
    return violations


def _check_copies(out: Path, report: dict[str, Any], checkpoint: Checkpoint) -> list[str]:
    """Every tensor that was not quantized must be the source's, byte for byte."""
    quantized = {whole_name(row["tensor"]) for row in report["weights"]}
    violations = []
    for file in checkpoint.files:
        try:
            infos = read_header(out / file, file).tensors
        except LoftqError as error:
            violations.append(error.message)
            continue
        for info in checkpoint.tensors.values():
            if info.file != file or info.name in quantized:
                continue
            if info.name not in infos or not _same_bytes(checkpoint.path(file), info, out / file, infos[info.name]):
                violations.append(f"`{info.name}` in `{file}` is not the source's")
    return violations


def _check_modules(report: dict[str, Any], checkpoint: Checkpoint) -> list[str]:
    """What was copied of a `modules.json`, and of what it names, must still be the source's."""
    copied = {name: sha256 for name, sha256 in report["side_files"].items() if "/" in name or name == MODULES}
    now = {*checkpoint.modules.files, *({MODULES} & set(checkpoint.side_files))}
    return [
        f"`{name}` is not the source's"
        for name in sorted(now | copied.keys())
        if name not in now or hash_file(checkpoint.path(name)) != copied.get(name)
    ]


def _check_heads(out: Path, checkpoint: Checkpoint) -> list[str]:
    """What the adapter holds beside factors are copies of the source's: of a head that PEFT trains as a whole."""
    if not (out / ADAPTER_FILE).is_file():
        return []
    violations, path = [], out / ADAPTER_FILE
    for info in read_header(path, ADAPTER_FILE).tensors.values():
        if ".lora_" in info.name:
            continue
        named = checkpoint.tensors.get(info.name.removeprefix(peft_adapter.PREFIX))
        # transformers may have other names than the files: then it must be a copy of some tensor
        of = checkpoint.tensors.values() if named is None else [named]
        if not any(_same_bytes(checkpoint.path(one.file), one, path, info) for one in of):
            violations.append(f"`{info.name}` in `{ADAPTER_FILE}` is not the source's")
    return violations


def _same_bytes(source: Path, info: TensorInfo, path: Path, other: TensorInfo) -> bool:
    if (info.dtype, info.shape) != (other.dtype, other.shape):
        return False
    pairs = zip(read_chunks(source, info), read_chunks(path, other), strict=True)
    return all(bytes(a) == bytes(b) for a, b in pairs)


def check_adapter(out: Path, report: dict[str, Any]) -> list[str]:
    """The adapter names this base; adapter_config.json, which a push may rewrite, means the same as the report."""
    violations = []
    if (out / ADAPTER_FILE).is_file():
        base_files = {name: sha256 for name, sha256 in report["files"].items() if name != ADAPTER_FILE}
        if read_header(out / ADAPTER_FILE).metadata.get(FINGERPRINT_KEY) != base_fingerprint(base_files):
            violations.append(f"`{ADAPTER_FILE}` belongs to another base: its `{FINGERPRINT_KEY}` differs")
    config_file = "loftq_init/adapter_config.json"
    try:
        adapter = json.loads((out / config_file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [*violations, f"`{config_file}` cannot be read: {error}"]
    expected = report["adapter_config"]
    for key in sorted({*expected, *adapter} - {*REWRITTEN}):
        if adapter.get(key) != expected.get(key):
            violations.append(f"`{config_file}`: `{key}` is {adapter.get(key)!r}, written was {expected.get(key)!r}")
    return violations


def _recompute(
    out: Path, report: dict[str, Any], checkpoint: Checkpoint, progress: Callable[[str, int], None]
) -> tuple[list[tuple[float, float]], list[str]]:
    """Every weight's (relative error, norm), and the rows of the report that say otherwise."""
    stored: dict[str, TensorInfo] = {}
    for name in report["files"]:
        if name.endswith(".safetensors") and name != ADAPTER_FILE:
            stored.update(read_header(out / name, name).tensors)
    factors = Factors(out, read_header(out / ADAPTER_FILE, ADAPTER_FILE).tensors)
    adapter_config = json.loads((out / "loftq_init/adapter_config.json").read_text(encoding="utf-8"))
    scaling = peft_adapter.scaling(adapter_config["r"], adapter_config["lora_alpha"], adapter_config["use_rslora"])
    output = FORMATS[report["config"]["format"]]

    pairs: list[tuple[float, float]] = []
    violations: list[str] = []
    for row in report["weights"]:
        try:
            W = _source_weight(checkpoint, row)
            base = stored_weight(out, stored, output, row, report["config"])
            product = factors.product(row, scaling)
        except LoftqError as error:
            violations.append(error.message)
            continue
        residual = W - base
        norm2, before2, after2 = squared_norm(torch.stack([W, residual, residual - product])).tolist()
        measured = {
            "relative_error": relative(after2, norm2),
            "relative_error_without_adapter": relative(before2, norm2),
        }
        for key, value in measured.items():
            if not abs(value - row[key]) <= TOLERANCE * max(1.0, value):
                violations.append(f"`{row['tensor']}`: {key} is {value:.6f}, the report says {row[key]:.6f}")
        pairs.append((measured["relative_error"], norm2**0.5))
        progress(row["name"], source_info(checkpoint, row).nbytes)
    return pairs, violations


def source_info(checkpoint: Checkpoint, row: dict[str, Any]) -> TensorInfo:
    """Where the source has the weight of a row of the report.

    Raises:
        LoftqError: nowhere, or in another shape.
    """
    info = lookup(checkpoint.tensors, row["tensor"])
    if info is None or list(info.shape) != (row["shape"][::-1] if row.get("transposed", False) else row["shape"]):
        raise LoftqError(f"`{row['tensor']}` {row['shape']} is not in the source")
    return info


def _source_weight(checkpoint: Checkpoint, row: dict[str, Any]) -> Tensor:
    info = source_info(checkpoint, row)
    stored = read_tensor(checkpoint.path(info.file), info).float()
    return stored.T.contiguous() if row.get("transposed", False) else stored
