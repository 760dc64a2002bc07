"""The main path, top to bottom: source → plan → shards → finish → report."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from loftq_cli import __version__
from loftq_cli.checkpoint.reader import read_chunks, read_tensor
from loftq_cli.checkpoint.source import open_checkpoint
from loftq_cli.checkpoint.writer import ShardWriter, copy_file, file_bytes, write_file
from loftq_cli.config import QuantizeConfig, build_config
from loftq_cli.errors import LoftqError
from loftq_cli.formats import peft_adapter
from loftq_cli.jobs import WeightJob
from loftq_cli.journal import (
    ADAPTER_CONFIG,
    JOURNAL_FILE,
    REPORT_FILE,
    WORK_FOLDER,
    Identity,
    Journal,
    check_out,
    claimed,
)
from loftq_cli.plan import (
    ADAPTER_FILE,
    INDEX_FILE,
    Plan,
    ShardPlan,
    adapter_metadata,
    check_disk,
    make_plan,
    output_config,
    output_index,
    planned_files,
)
from loftq_cli.report import base_fingerprint, build_report, model_card
from loftq_cli.worker import quantize_weight, row_dict

COMMIT_SECONDS = 2.0  # at most this much work is lost to a kill, beside the weight in flight

Progress = Callable[[str, int], None]  # called with a module name and its source bytes when its weight is done


def plan_quantize(model: str, config: QuantizeConfig) -> Plan:
    """Read headers and decide everything; `model` is a folder or a Hub id. Nothing is written."""
    device = resolve_device(config.device)
    return make_plan(open_checkpoint(model, config.revision), config.model_copy(update={"device": str(device)}))


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    config: QuantizeConfig | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Quantize `model` into `out` and return the report (the content of `loftq_report.json`).

    Args:
        model: folder or Hub id of a safetensors checkpoint.
        out: folder to make; see `loftq quantize --help` for its states.
        config: all options; or give them one by one as keywords, e.g. `bits=2, rank=16`.
        resume: go on with an unfinished run.
        overwrite: replace what an earlier run wrote.
        progress: called after every weight.
        options: fields of `QuantizeConfig`, when `config` is None.

    Raises:
        LoftqError: anything that stops the run; what is done stays in `out` for `resume`.
    """
    plan = plan_quantize(str(model), config or build_config(options))
    return run_plan(plan, Path(out), resume=resume, overwrite=overwrite, progress=progress)


def run_plan(
    plan: Plan, out: Path, *, resume: bool = False, overwrite: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Carry out `plan`; see `quantize`."""
    identity = Identity(__version__, plan.checkpoint.fingerprint, identity_config(plan.config))
    _refuse_source_as_out(plan, out)
    if check_out(out, identity, resume, overwrite):
        return read_finished(out)
    check_disk(plan, out, already_bytes=_bytes_in(out))
    device = torch.device(plan.config.device)
    with claimed(out, identity, planned_files(plan), resume, overwrite) as journal:
        if journal is None:
            return read_finished(out)
        adapter = ShardWriter(
            out / WORK_FOLDER / "adapter_model.safetensors",
            out / ADAPTER_FILE,
            plan.adapter_layout,
            adapter_metadata(),
            resume_written=journal.file(ADAPTER_FILE).written,
        )
        journal.keep(ADAPTER_FILE, adapter.written)
        try:
            for shard in plan.shards:
                run_shard(plan, shard, out, adapter, journal, device, progress or (lambda name, size: None))
            return finish(plan, out, adapter, journal, device)
        finally:
            adapter.close()


def run_shard(
    plan: Plan,
    shard: ShardPlan,
    out: Path,
    adapter: ShardWriter,
    journal: Journal,
    device: torch.device,
    progress: Progress,
) -> None:
    """Write one output shard: copy what stays, quantize what is planned, and journal what is safe on disk."""
    jobs = [step for step in shard.steps if isinstance(step, WeightJob)]
    if _is_whole(plan, shard, jobs, out, adapter, journal):
        for job in jobs:
            progress(job.module, plan.checkpoint.tensors[job.tensor].nbytes)
        return
    path = plan.checkpoint.path(shard.file)
    writer = ShardWriter(
        out / WORK_FOLDER / shard.file,
        out / shard.file,
        shard.layout,
        shard.metadata,
        resume_written=journal.file(shard.file).written,
    )
    journal.keep(shard.file, writer.written)
    batch = _Batch(journal, shard.file, writer, adapter)
    try:
        for step in shard.steps:
            if not isinstance(step, WeightJob):
                if step.name not in writer.written:
                    start = time.perf_counter()
                    writer.write_chunks(step.name, read_chunks(path, step))
                    batch.add({"write": time.perf_counter() - start}, [step.name])
                continue
            info = plan.checkpoint.tensors[step.tensor]
            if not _is_done(plan, step, writer, adapter, journal):
                start = time.perf_counter()
                weight = read_tensor(path, info)
                read_seconds = time.perf_counter() - start
                result = quantize_weight(plan, step, weight, device)
                start = time.perf_counter()
                for name, tensor in result.base.items():
                    writer.write(name, tensor)
                for name, tensor in result.adapter.items():
                    adapter.write(name, tensor)
                seconds = {**result.seconds, "read": read_seconds, "write": time.perf_counter() - start}
                batch.add(seconds, list(result.base), list(result.adapter), row_dict(result.row))
            progress(step.module, info.nbytes)
        sha256 = writer.finish()
        batch.commit(whole={shard.file: sha256})
    except BaseException:
        batch.commit()
        raise
    finally:
        writer.close()


def finish(plan: Plan, out: Path, adapter: ShardWriter, journal: Journal, device: torch.device) -> dict[str, Any]:
    """Write what surrounds the shards; index, config.json and report last, so that OUT is never half loadable."""
    late = {"config.json": _json_bytes(output_config(plan))}
    if plan.checkpoint.index is not None:
        late[INDEX_FILE] = _json_bytes(output_index(plan))
    base_files = {shard.file: journal.file(shard.file).sha256 or "" for shard in plan.shards}
    base_files |= {name: hashlib.sha256(data).hexdigest() for name, data in late.items()}

    adapter.set_metadata(adapter_metadata(base_fingerprint(base_files)))
    files = {**base_files, ADAPTER_FILE: adapter.finish()}
    adapter_config = peft_adapter.adapter_config(plan, str(out.resolve()), plan.module_names)
    write_file(out / ADAPTER_CONFIG, _json_bytes(adapter_config))
    for name in plan.checkpoint.side_files:
        copy_file(plan.checkpoint.path(name), out / name)
    for name, data in late.items():
        write_file(out / name, data)
    report = build_report(plan, list(journal.rows.values()), files, adapter_config, journal.seconds, device)
    write_file(out / "README.md", model_card(plan, report).encode())
    write_file(out / REPORT_FILE, _json_bytes(report))
    (out / WORK_FOLDER / JOURNAL_FILE).unlink()
    return report


class _Batch:
    """Tensors and rows since the last commit; commits to the journal once `COMMIT_SECONDS` have passed."""

    def __init__(self, journal: Journal, file: str, writer: ShardWriter, adapter: ShardWriter) -> None:
        self.journal, self.file, self.writer, self.adapter = journal, file, writer, adapter
        self._clear()

    def _clear(self) -> None:
        self.since = time.perf_counter()
        self.base_names: list[str] = []
        self.adapter_names: list[str] = []
        self.rows: list[dict[str, Any]] = []
        self.seconds: dict[str, float] = {}

    def add(
        self,
        seconds: dict[str, float],
        base_names: list[str],
        adapter_names: list[str] | None = None,
        row: dict[str, Any] | None = None,
    ) -> None:
        self.base_names += base_names
        self.adapter_names += adapter_names or []
        self.rows += [row] if row else []
        for stage, value in seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + value
        if time.perf_counter() - self.since > COMMIT_SECONDS:
            self.commit()

    def commit(self, whole: dict[str, str] | None = None) -> None:
        if not self.base_names and not whole:
            return
        if whole is None:  # a whole file was synced when it was renamed
            self.writer.sync()
        self.adapter.sync()
        self.seconds["total"] = time.perf_counter() - self.since
        written = {self.file: self.base_names, ADAPTER_FILE: self.adapter_names}
        self.journal.commit(written, self.rows, self.seconds, whole)
        self._clear()


def _is_done(plan: Plan, job: WeightJob, writer: ShardWriter, adapter: ShardWriter, journal: Journal) -> bool:
    base_names = plan.format.tensors(job.stored_prefix, plan.empty(job))
    return job.tensor in journal.rows and writer.written.issuperset(base_names) and _adapter_has(adapter, job)


def _is_whole(
    plan: Plan, shard: ShardPlan, jobs: list[WeightJob], out: Path, adapter: ShardWriter, journal: Journal
) -> bool:
    """Whether an earlier session finished this shard, and its files are still there."""
    path = out / shard.file
    return (
        journal.file(shard.file).sha256 is not None
        and path.exists()
        and path.stat().st_size == file_bytes(shard.layout, shard.metadata)
        and all(_adapter_has(adapter, job) for job in jobs)
    )


def _adapter_has(adapter: ShardWriter, job: WeightJob) -> bool:
    return adapter.written.issuperset(peft_adapter.tensor_names(job.module))


def read_finished(out: Path) -> dict[str, Any]:
    """The report of a finished run."""
    return json.loads((out / REPORT_FILE).read_text(encoding="utf-8"))


def _refuse_source_as_out(plan: Plan, out: Path) -> None:
    source, target = Path(plan.checkpoint.model).expanduser(), out.resolve()
    if source.is_dir() and (source.resolve() == target or target in source.resolve().parents):
        raise LoftqError(f"OUT `{out}` holds the MODEL itself", "choose another folder as OUT")


def resolve_device(name: str) -> torch.device:
    """`auto` → the first GPU, else the CPU.

    Raises:
        LoftqError: a GPU is asked for that torch does not see.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        seen = torch.cuda.device_count()
        raise LoftqError(f"`--device {name}`: torch sees {seen} CUDA devices", "use `--device auto` or `cpu`")
    return device


def identity_config(config: QuantizeConfig) -> dict[str, Any]:
    """The configuration as the journal and the report hold it: the device by its kind."""
    return {**config.model_dump(mode="json"), "device": torch.device(config.device).type}


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())
