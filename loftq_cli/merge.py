"""A plain checkpoint from an output: every weight dequantized and its adapter folded in, one at a time."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from loftq_cli.checkpoint.files import copy_file, sync_folder, write_file, writing
from loftq_cli.checkpoint.reader import Header, lookup, read_chunks, read_header, whole_name
from loftq_cli.checkpoint.writer import ShardWriter, TensorSpec, joined
from loftq_cli.errors import LoftqError
from loftq_cli.formats import FORMATS, peft_adapter
from loftq_cli.formats.base import to_store
from loftq_cli.plan import ADAPTER_FILE, INDEX_FILE
from loftq_cli.stored import Factors, place_of, read_tuned, stored_like, stored_weight
from loftq_cli.verify import check_adapter, check_all_tensors, check_files, read_report

WORK_FOLDER, STAGED = ".loftq-merge", "files"  # in DEST, until all is written and can be moved there


@dataclass(frozen=True)
class Merged:
    """What `merge` wrote."""

    weights: int
    files: int
    base_bytes: int


def merge(
    out: Path, dest: Path, progress: Callable[[str, int], None] | None = None, adapter: Path | None = None
) -> Merged:
    """Write `dest`: files and names of the source of `out`, with `dequantize(Q) + scaling · B A` as weights.

    A and B are those of `out`, or of an `adapter` that was trained from these, a folder as PEFT saves it.

    Weights have the dtype that they were quantized for (config.json's, where it is narrower than the source file's);
    all else is copied. It is moved to its place when all is written, config.json last: what is not whole does not load.

    Whatever stops it, nothing of it stays in `dest`. What a killed one has staged there is removed by the next, which
    refuses where that one had begun to move it: its files are then like anybody's.

    Raises:
        LoftqError: `out` is not a finished output whose adapter belongs to its base, or a file of it is not what was
            written, or `dest` is not empty, or `adapter` did not begin as that of `out`.
    """
    report = read_report(out)
    violations = check_adapter(out, report)
    there = all((out / name).is_file() for name in report["files"])
    if not violations and (violations := check_files(out, report)) and there:
        violations = check_all_tensors(out, report) or violations  # of a file that differs, the tensor if it is known
    if violations:
        hint = "make it again with `loftq quantize --overwrite`, or download it again"
        raise LoftqError(violations[0], f"see `loftq verify {out}`; {hint}")
    names = [name for name in report["files"] if name.endswith(".safetensors") and name != ADAPTER_FILE]
    shards = {name: read_header(out / name, name) for name in names}
    product = _adapter(out, report, adapter)
    with _claimed(dest) as staged:
        weight_map = _write_shards(out, staged, report, shards, product, progress)
        _write_surroundings(out, staged, report, weight_map)
        _move(staged, dest)
    return Merged(len(report["weights"]), len(shards), sum((dest / name).stat().st_size for name in shards))


def _adapter(out: Path, report: dict[str, Any], tuned: Path | None) -> Callable[[dict[str, Any]], Tensor]:
    """What the adapter of `out`, or one trained from it, adds to the weight of a row: float32 [m, n].

    Raises:
        LoftqError: see `merge`.
    """
    began, config = read_header(out / ADAPTER_FILE, ADAPTER_FILE).tensors, report["adapter_config"]
    factors = Factors(out, began)
    if tuned is not None:
        config, trained = read_tuned(out, tuned)
        way = "fold it in with PEFT's `merge_and_unload()`, in `--format packed` or `dense`"
        for key in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save"):
            if config.get(key) and (key == "modules_to_save" or config[key] != report["adapter_config"].get(key)):
                raise LoftqError(f"`{tuned}` has `{key}`, which is more than factors with one scaling", way)
        if more := sorted(set(trained) - set(began)):
            raise LoftqError(f"`{tuned}` has `{more[0]}`, which the adapter of `{out}` has not", way)
        factors = Factors(tuned, trained)
    scaling = peft_adapter.scaling(config["r"], config["lora_alpha"], config.get("use_rslora", False))
    return lambda row: factors.product(row, scaling)


@contextmanager
def _claimed(dest: Path) -> Iterator[Path]:
    """Take `dest` for this process; yields a new folder in it, of which nothing stays.

    What a killed merge has left in there goes. Beside it there must be nothing: whose that is nobody can know.

    Raises:
        LoftqError: `dest` holds something else, or another merge is at it.
    """
    work, created = dest / WORK_FOLDER, not dest.exists()
    _refuse_others(dest)
    work.mkdir(parents=True, exist_ok=True)
    lock = FileLock(work / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise LoftqError(f"another merge is writing to `{dest}`", "wait for it, or choose another DEST") from None
    try:
        _refuse_others(dest)  # another merge may have ended just now
        shutil.rmtree(work / STAGED, ignore_errors=True)
        (work / STAGED).mkdir()
        yield work / STAGED
    finally:
        shutil.rmtree(work, ignore_errors=True)  # while the lock is held: nobody else is in it
        if created and not any(dest.iterdir()):
            dest.rmdir()
        lock.release()


def _refuse_others(dest: Path) -> None:
    """Refuse a `dest` that holds anything but our own folder.

    Raises:
        LoftqError: nothing has been touched.
    """
    work = dest / WORK_FOLDER
    if not dest.exists() or (dest.is_dir() and not work.is_symlink() and not set(dest.iterdir()) - {work}):
        return
    killed = f", and a merge that was killed left its `{WORK_FOLDER}` there" if work.exists() else ""
    raise LoftqError(f"`{dest}` is not empty{killed}", "give a new folder as DEST, or remove this one")


def _move(staged: Path, dest: Path) -> None:
    """Move what is in `staged` to `dest`, config.json last: all of it, or where something goes wrong, nothing.

    Raises:
        LoftqError: somebody has put something in `dest` meanwhile.
    """
    paths = sorted(staged.iterdir(), key=lambda path: path.name == "config.json")
    begun: list[Path] = []
    try:
        for path in paths:
            if os.path.lexists(dest / path.name):
                raise LoftqError(f"there is a `{path.name}` in `{dest}` by now", "choose another DEST")
            begun.append(path)
            with writing(dest / path.name):
                path.rename(dest / path.name)
        sync_folder(dest)
    except BaseException:
        for path in begun:
            if not path.exists():
                (dest / path.name).rename(path)
        raise


def _write_shards(
    out: Path,
    dest: Path,
    report: dict[str, Any],
    shards: dict[str, Header],
    product: Callable[[dict[str, Any]], Tensor],
    progress: Callable[[str, int], None] | None,
) -> dict[str, str]:
    """Write every shard, one weight at a time; returns which tensor is in which."""
    weight_map: dict[str, str] = {}
    output = FORMATS[report["config"]["format"]]
    stored = {
        row["tensor"]: list(to_store(output, place_of(row), stored_like(output, row, report["config"])))
        for row in report["weights"]
    }
    for name, header in shards.items():
        rows = {
            row["tensor"]: row
            for row in report["weights"]
            if any(lookup(header.tensors, tensor) for tensor in stored[row["tensor"]])
        }
        replaced = {whole_name(tensor) for weight in rows for tensor in stored[weight]}
        layout = joined(
            TensorSpec(row["tensor"], getattr(torch, row["dtype"]), tuple(row["shape"][:: _order(row)]))
            for row in rows.values()
        )
        copies = [info for info in header.tensors.values() if info.name not in replaced]
        layout += [TensorSpec(info.name, info.dtype, info.shape) for info in copies]
        writer = ShardWriter(dest / f"{name}.tmp", dest / name, layout, header.metadata)
        try:
            for info in copies:
                writer.write_chunks(info.name, read_chunks(out / name, info))
            for tensor, row in rows.items():
                writer.write(tensor, _merged(out, report, row, header, product))
                if progress is not None:
                    progress(row["name"], 2 * math.prod(row["shape"]))
            writer.finish()
        finally:
            writer.close()
        weight_map |= {spec.name: name for spec in layout}
    return weight_map


def _merged(
    out: Path, report: dict[str, Any], row: dict[str, Any], shard: Header, product: Callable[[dict[str, Any]], Tensor]
) -> Tensor:
    """The weight of `row` as the source has it, [m, n] or transposed, added up in float32."""
    base = stored_weight(out, shard.tensors, FORMATS[report["config"]["format"]], row, report["config"])
    dtype: torch.dtype = getattr(torch, row["dtype"])
    merged = base.add_(product(row)).to(dtype)
    return merged.T.contiguous() if row.get("transposed", False) else merged


def _order(row: dict[str, Any]) -> int:
    return -1 if row.get("transposed", False) else 1


def _write_surroundings(out: Path, dest: Path, report: dict[str, Any], weight_map: dict[str, str]) -> None:
    for name in report["side_files"]:
        copy_file(out / name, dest / name)
    if (out / INDEX_FILE).exists():
        headers = {name: read_header(dest / name, name) for name in set(weight_map.values())}
        total = sum(info.nbytes for header in headers.values() for info in header.tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_file(dest / INDEX_FILE, (json.dumps(index, indent=2) + "\n").encode())
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    # code of the format's loader, unlike the source's own, is among the files that were made
    classes = {key: path for key, path in config.pop("auto_map", {}).items() if not _made(report, path)}
    config |= {"auto_map": classes} if classes else {}
    write_file(dest / "config.json", (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())


def _made(report: dict[str, Any], path: Any) -> bool:
    return isinstance(path, str) and f"{path.split('.')[0]}.py" in report["files"]
