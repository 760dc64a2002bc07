"""What an earlier session left in OUT: what of it counts, reading it back, and the room that the rest needs."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from loftq_cli.adapters import EXPERT_FACTORS
from loftq_cli.checkpoint.reader import TensorInfo, lookup, read_header, read_tensor
from loftq_cli.checkpoint.streamed import KEPT
from loftq_cli.checkpoint.writer import TensorSpec, file_bytes, is_unfinished
from loftq_cli.errors import LoftqError
from loftq_cli.heads import adapter_name
from loftq_cli.identity import Identity
from loftq_cli.jobs import WeightBatch, WeightJob
from loftq_cli.journal import WORK_FOLDER, Journal, check_out
from loftq_cli.plan import ADAPTER_FILE, Plan, ShardPlan, Step, adapter_metadata

Stored = tuple[dict[str, Tensor], tuple[Tensor, Tensor]]  # of the base, by name, and the factors as stored


def is_finished(plan: Plan, out: Path, identity: Identity, resume: bool, overwrite: bool) -> bool:
    """Whether there is nothing to do in `out`.

    Raises:
        LoftqError: the run may not write there, or the disk is too full.
    """
    refuse_source_as_out(plan, out)
    if check_out(out, identity, resume, overwrite):
        return True
    check_disk(plan, out)
    return False


def refusal(plan: Plan, out: Path, identity: Identity, resume: bool, overwrite: bool) -> str | None:
    """What `is_finished` would raise."""
    try:
        is_finished(plan, out, identity, resume, overwrite)
    except LoftqError as error:
        return "; ".join(filter(None, (error.message, error.hint)))
    return None


def forget_lost(plan: Plan, out: Path, journal: Journal) -> None:
    """Make the journal claim only what is really there.

    To be journaled before any file is made: a fresh one has its full size, and zeros where tensors would be.
    """

    def forget(file: str, layout: Sequence[TensorSpec], metadata: dict[str, str]) -> None:
        written = journal.file(file).written
        if not is_unfinished(growing(out, file), out / file, layout, metadata, written):
            written.clear()

    for file, layout in plan.factor_files.items():
        forget(file, layout, adapter_metadata())
    for shard in plan.shards:
        if not is_whole(plan, shard, out, journal):
            journal.file(shard.file).sha256 = None
            forget(shard.file, shard.layout, shard.metadata)
    while reopened := _forget_halves(plan, journal) if plan.is_calibrated else None:
        for shard in plan.shards:
            if shard.file in reopened:
                forget(shard.file, shard.layout, shard.metadata)


def _forget_halves(plan: Plan, journal: Journal) -> set[str]:
    """Forget weights of transformer blocks that are not whole, and of those behind them; files that are whole no more.

    A block is fitted as one: other hardware, or another number of processes, may fit it to other bytes, and halves of
    two fits are neither what the report says nor what later blocks were fitted to.
    """
    stacks: dict[str, dict[int, list[WeightJob]]] = {}
    for job in plan.jobs:
        if job.block:
            path, _, number = job.block.rpartition(".")
            stacks.setdefault(path, {}).setdefault(int(number), []).append(job)

    def parts(job: WeightJob) -> list[tuple[str, list[str]]]:
        factors = list(job.factor_names) if job.rank else []
        return [(job.file, [spec.name for spec in plan.stored(job)]), (plan.factor_file(job), factors)]

    def is_done(job: WeightJob) -> bool:
        written = all(journal.file(file).written.issuperset(names) for file, names in parts(job))
        return written and job.tensor in journal.rows

    reopened = set()
    for blocks in stacks.values():
        first = min((number for number, jobs in blocks.items() if not all(map(is_done, jobs))), default=math.inf)
        behind = [job for number, jobs in blocks.items() if number >= first for job in jobs]
        for file, names in (part for job in behind for part in parts(job)):
            journal.file(file).written.difference_update(names)
            if journal.file(file).sha256 is not None:
                journal.file(file).sha256 = None
                reopened.add(file)
    return reopened


def growing(out: Path, file: str) -> Path:
    """Where a file is until it is whole."""
    return out / WORK_FOLDER / Path(file).name


def is_whole(plan: Plan, shard: ShardPlan, out: Path, journal: Journal) -> bool:
    """Whether an earlier session finished this shard, and its files are still there."""
    path = out / shard.file
    return (
        journal.file(shard.file).sha256 is not None
        and path.exists()
        and path.stat().st_size == file_bytes(shard.layout, shard.metadata)
        and all(
            journal.file(factor_file(plan, step)).written.issuperset(adapter_names(plan, step)) for step in shard.steps
        )
    )


def read_back(plan: Plan, out: Path, job: WeightJob) -> Stored:
    """What was written for `job`, from files that are whole or still grow; factors of rank 0 are in none."""
    names = [spec.name for spec in plan.stored(job)]
    m, n = job.shape
    factors = [torch.empty(0, n), torch.empty(m, 0)]
    if job.rank:
        factors = read_whenever(out, ADAPTER_FILE, job.factor_names)
    lora_A, lora_B = factors
    return dict(zip(names, read_whenever(out, job.file, names), strict=True)), (lora_A, lora_B)


Headers = dict[Path, dict[str, TensorInfo]]


def read_whenever(out: Path, file: str, names: Sequence[str], known: Headers | None = None) -> list[Tensor]:
    """Tensors of a file that may become whole just then; `known` keeps headers, for who reads often."""
    try:
        return [read_tensor(path, info) for path, info in find(out, file, names, known)]
    except LoftqError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        return [read_tensor(path, info) for path, info in find(out, file, names, known)]


def find(out: Path, file: str, names: Sequence[str], known: Headers | None = None) -> list[tuple[Path, TensorInfo]]:
    """Where tensors of a file are, while it is whole or still grows."""
    path = growing(out, file) if growing(out, file).exists() else out / file
    known = {} if known is None else known
    if path not in known:
        known[path] = read_header(path).tensors
    return [(path, info) for name in names if (info := lookup(known[path], name)) is not None]


def base_names(plan: Plan, batch: WeightBatch) -> list[str]:
    """The base's tensors for a batch."""
    return [spec.name for job in batch.jobs for spec in plan.stored(job)]


def adapter_names(plan: Plan, step: Step) -> list[str]:
    """The tensors that a step leaves in `factor_file`: factors, or a copy of what is copied, of a head."""
    if isinstance(step, TensorInfo):
        key = plan.targets.head.tensors.get(step.name)
        return [] if key is None else [adapter_name(key)]
    return [name for job in step.jobs if job.rank for name in job.factor_names]


def factor_file(plan: Plan, step: Step) -> str:
    """Where a step leaves what is for the adapter."""
    return ADAPTER_FILE if isinstance(step, TensorInfo) else plan.factor_file(step.first)


def check_disk(plan: Plan, out: Path) -> None:
    """Refuse when the file system of `out` lacks room for what is still to be written.

    Raises:
        LoftqError: with the bytes needed and free.
    """
    parent = next(folder for folder in (out, *out.resolve().parents) if folder.exists())
    adapters = 1 + (plan.config.finish_epochs > 0)  # what a finish trains is kept beside
    factors = sum(spec.nbytes for spec in plan.factor_files.get(EXPERT_FACTORS, ()))
    copied = sum(plan.checkpoint.file_sizes[file] for file in plan.checkpoint.side_files)
    needed = plan.base_bytes + adapters * plan.adapter_bytes + factors + copied + (16 << 20)
    if plan.config.evict:
        needed += KEPT * max(plan.checkpoint.file_sizes[file] for file in plan.checkpoint.files)
    needed -= sum(path.stat().st_blocks * 512 for path in out.rglob("*") if path.is_file())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise LoftqError(
            f"`{out}` needs {needed / 2**30:.2f} GiB, and only {free / 2**30:.2f} GiB are free on its disk",
            "free some space, or choose an OUT on another disk",
        )


def refuse_source_as_out(plan: Plan, out: Path) -> None:
    """Refuse to write where the model lies."""
    source, target = Path(plan.checkpoint.model).expanduser(), out.resolve()
    if source.is_dir() and (source.resolve() == target or target in source.resolve().parents):
        raise LoftqError(f"OUT `{out}` holds the MODEL itself", "choose another folder as OUT")
