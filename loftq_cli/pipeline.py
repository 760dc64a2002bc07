"""The main path, top to bottom: source → plan → shards → finish → report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from loftq_cli import __version__
from loftq_cli.batches import compute_batch, load_batch, rehearse
from loftq_cli.blocks import Measured, run_blocks
from loftq_cli.calibration.text import Calibration
from loftq_cli.card import model_card
from loftq_cli.chart import error_chart
from loftq_cli.checkpoint.files import copy_file, write_file
from loftq_cli.checkpoint.loader import Loader, Loading, ahead
from loftq_cli.checkpoint.reader import TensorInfo
from loftq_cli.checkpoint.source import open_checkpoint
from loftq_cli.checkpoint.writer import ShardWriter
from loftq_cli.config import QuantizeConfig, build_config
from loftq_cli.device import resolve_device, wait_until_ready, wake
from loftq_cli.errors import LoftqError
from loftq_cli.formats import peft_adapter
from loftq_cli.identity import Identity
from loftq_cli.jobs import WeightBatch
from loftq_cli.journal import (
    ADAPTER_CONFIG,
    CARD_FILE,
    CHART_FILE,
    REPORT_FILE,
    WORK_FOLDER,
    Journal,
    claimed,
)
from loftq_cli.lanes import Lanes
from loftq_cli.lowrank import full_precision
from loftq_cli.outputs import Outputs
from loftq_cli.plan import ADAPTER_FILE, INDEX_FILE, Plan, Step, adapter_metadata, make_plan
from loftq_cli.ranks import ALONE, Ranks
from loftq_cli.report import base_fingerprint, build_report
from loftq_cli.resume import forget_lost, is_finished
from loftq_cli.streaming import refuse_eviction, refuse_sharing, streamed
from loftq_cli.targets import find_targets
from loftq_cli.windows import describe, prepare, told
from loftq_cli.written import output_config, output_index, planned_files, refuse_modules

READ_AHEAD = {"cuda": 2, "cpu": 1}  # batches
FINISHED = -1  # told to the other ranks instead of a journal's number

Progress = Callable[[str, int], None]  # called with a module name and its source bytes when its weight is done


def plan_quantize(model: str, config: QuantizeConfig, *, to_run: bool = False) -> Plan:
    """Read headers and decide everything; `model` is a folder or a Hub id. Nothing is written.

    With `to_run` a GPU is got ready at the same time, by threads and memory that a library must not take unasked.
    """
    checkpoint = open_checkpoint(model, config.revision)
    refuse_eviction(checkpoint, config)
    targets = find_targets(checkpoint, config.trust_remote_code)
    device = resolve_device(config.device)
    decided = config.model_copy(update={"device": str(device)})
    if to_run:
        wake(device, partial(rehearse, checkpoint, decided))
    plan = make_plan(checkpoint, decided, targets())
    refuse_modules(plan)
    return plan


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
    config = config or build_config(options)
    plan = plan_quantize(str(model), config)
    return run_plan(plan, Path(out), resume=resume, overwrite=overwrite, progress=progress)


def run_plan(
    plan: Plan,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
    note: Callable[[str], None] = lambda sentence: None,
    before: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Carry out `plan`; see `quantize`. Of several `ranks`, this process does its share; `note` is told of the text.

    `before` is called when nothing here stands in the way, and may refuse; never of a run that is finished already.
    """
    if (calibration := prepare(plan, ranks.size) if plan.is_calibrated else None) is not None:
        note(told(plan, calibration))
    identified = identity(plan, calibration)
    device = torch.device(plan.config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.reset_peak_memory_stats(device)
    progress = progress or (lambda name, size: None)
    refuse_sharing(plan.config, ranks.size)
    if ranks.rank > 0:
        return _follow(plan, out, identified, device, ranks, progress, calibration)
    if is_finished(plan, out, identified, resume, overwrite):
        ranks.tell(FINISHED)
        return read_finished(out)
    before()
    with claimed(out, identified, resume, overwrite) as journal:
        if journal is None:
            ranks.tell(FINISHED)
            return read_finished(out)
        forget_lost(plan, out, journal)
        journal.begin(identified, planned_files(plan))
        plan = streamed(plan, out, journal)
        with Outputs(plan, out, journal, device, ranks=ranks.size) as outputs:
            ranks.tell(journal.number)
            measured = run_steps(plan, outputs, device, ranks, progress, calibration)
            if ranks.size > 1:
                journal.load()  # the other ranks' rows
            report = finish(plan, out, outputs.adapter, journal, device, calibration, measured)
    ranks.wait()
    return report


def _follow(
    plan: Plan,
    out: Path,
    identity: Identity,
    device: torch.device,
    ranks: Ranks,
    progress: Progress,
    calibration: Calibration | None,
) -> dict[str, Any]:
    """What a rank other than 0 does: its share of the steps, in files that rank 0 has made."""
    number = ranks.tell(0)
    if number != FINISHED:
        journal = Journal(out / WORK_FOLDER, ranks.rank)
        if journal.number != number or journal.identity is None:
            raise LoftqError(
                f"rank {ranks.rank} does not see what rank 0 writes in `{out}`",
                "ranks must share OUT (or rank 0 has stopped, and says why)",
            )
        if changed := journal.identity.differences(identity):
            raise LoftqError(f"rank {ranks.rank} differs from rank 0: " + "; ".join(changed), "give all ranks the same")
        journal.join()
        with closing(journal), Outputs(plan, out, journal, device, ranks.rank, ranks.size) as outputs:
            run_steps(plan, outputs, device, ranks, progress, calibration)
        ranks.wait()
    return read_finished(out)


def run_steps(
    plan: Plan,
    outputs: Outputs,
    device: torch.device,
    ranks: Ranks,
    progress: Progress,
    calibration: Calibration | None = None,
) -> Measured | None:
    """Read ahead, compute, write behind: all at the same time, with a bounded number of weights under way.

    With `calibration`, weights in transformer blocks come afterwards, block by block.
    """
    in_blocks: list[WeightBatch] = []
    others: list[Step] = []
    for step in outputs.missing():
        if calibration and isinstance(step, WeightBatch) and step.first.block:
            in_blocks.append(step)
        else:
            others.append(step)
    beside = ranks.share(others)
    ranks.wait()  # all ranks have read what is missing, before any of them journals more
    outputs.expect([*beside, *(in_blocks if ranks.rank == 0 else ())])

    def report() -> None:
        for name, size in outputs.finished():
            progress(name, size)

    wait_until_ready(device)  # who gets it ready sets precisions, too
    with full_precision(), closing(Loader(device)) as loader, Lanes(device) as lanes:

        def load(step: Step) -> Loading | None:
            return None if isinstance(step, TensorInfo) else load_batch(plan, step, loader, lanes, outputs)

        for step, loading in ahead(beside, load, READ_AHEAD[device.type]):
            if isinstance(step, TensorInfo):
                outputs.copy(step)
            elif loading is not None:
                lanes.submit(compute_batch, plan, step, loading, outputs, lanes, device)
            report()
        lanes.wait()
        measured = None
        if calibration:

            def tell(block: str, passed: int) -> None:
                report()
                progress(block, passed)

            try:
                measured = run_blocks(plan, in_blocks, calibration, outputs, device, ranks, tell)
            except torch.OutOfMemoryError as error:
                why = f"a block of this model with its text does not fit: {str(error).splitlines()[0]}"
                hint = "begin again with a shorter `--seqlen`, or go on with `--resume` on a larger GPU"
                raise LoftqError(why, hint) from error
    outputs.drain()
    outputs.commit()
    ranks.wait()
    outputs.finish_shards()
    ranks.wait()
    report()
    return measured


def finish(
    plan: Plan,
    out: Path,
    adapter: ShardWriter,
    journal: Journal,
    device: torch.device,
    calibration: Calibration | None,
    measured: Measured | None,
) -> dict[str, Any]:
    """Write what surrounds the shards; index, config.json and report last, so that OUT is never half loadable."""
    late = {**(plan.remote_code.files if plan.remote_code else {}), "config.json": _json_bytes(output_config(plan))}
    if plan.checkpoint.index is not None:
        late[INDEX_FILE] = _json_bytes(output_index(plan))
    base_files: dict[str, str] = {}
    for shard in plan.shards:
        sha256 = journal.file(shard.file).sha256
        assert sha256 is not None, f"`{shard.file}` is not whole"
        base_files[shard.file] = sha256
    base_files |= {name: hashlib.sha256(data).hexdigest() for name, data in late.items()}

    adapter.set_metadata(adapter_metadata(base_fingerprint(base_files)))
    files = {**base_files, ADAPTER_FILE: adapter.finish()}
    adapter_config = peft_adapter.adapter_config(plan, str(out.resolve()), plan.targets.module_names)
    write_file(out / ADAPTER_CONFIG, _json_bytes(adapter_config))
    side_files = {name: copy_file(plan.checkpoint.path(name), out / name) for name in plan.checkpoint.side_files}
    journal.commit({}, [], {}, side_files)
    for name, data in late.items():
        write_file(out / name, data)
    report = build_report(plan, journal, files, side_files, adapter_config, device)
    if calibration is not None and measured is not None:
        report["config"]["calibration_tokens"] = describe(calibration)["sha256"]
        report["calibration"] = {**describe(calibration), **asdict(measured)}
    write_file(out / CHART_FILE, error_chart(report).encode())
    write_file(out / CARD_FILE, model_card(plan, report).encode())
    write_file(out / REPORT_FILE, _json_bytes(report))
    journal.remove()
    return report


def read_finished(out: Path) -> dict[str, Any]:
    """The report of a finished run."""
    return json.loads((out / REPORT_FILE).read_text(encoding="utf-8"))


def identity(plan: Plan, calibration: Calibration | None) -> Identity:
    """What a run is known by, in its journal and in caches: the device by its kind, and calibration by its tokens."""
    tokens = {"calibration_tokens": describe(calibration)["sha256"]} if calibration is not None else {}
    device = torch.device(plan.config.device).type
    config = {**plan.config.model_dump(mode="json"), "device": device, **tokens}
    return Identity(__version__, plan.checkpoint.fingerprint, config)


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
