"""The files of OUT while they are made: what is missing, written by several threads, journaled, and made whole."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from loftq_cli.checkpoint.reader import TensorInfo, read_chunks
from loftq_cli.checkpoint.writer import ShardWriter, TensorSpec, file_bytes
from loftq_cli.formats import peft_adapter
from loftq_cli.jobs import WeightBatch
from loftq_cli.journal import WORK_FOLDER, Journal
from loftq_cli.plan import ADAPTER_FILE, Plan, ShardPlan, Step, adapter_metadata
from loftq_cli.report import peak_host_bytes
from loftq_cli.worker import BatchResult, row_dict

# At most about this much work is lost to a kill, beside what is in flight. Often, so that the disk is never idle and
# little is left to flush at the end.
COMMIT_SECONDS = 0.5
GPU_THREADS, CPU_THREADS = 8, 1  # a hash takes 1.4 GB/s, and every byte is hashed twice
WAITING = 2  # results that wait for a thread, at most


@dataclass
class _Pending:
    """What is written and not yet journaled."""

    written: dict[str, list[str]] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    whole: dict[str, str] = field(default_factory=dict)


class Outputs:
    """Writes steps' results into shards and adapter; a context that journals what is done, however it ends.

    Args:
        plan: what is to be made.
        out: where.
        journal: what is there already; begun by rank 0.
        device: that of the results, which must be waited for.
        rank: of this process: 0 makes the files, the others join them.
        ranks: how many processes write.
    """

    def __init__(
        self, plan: Plan, out: Path, journal: Journal, device: torch.device, rank: int = 0, ranks: int = 1
    ) -> None:
        self.plan, self.out, self.journal, self._device = plan, out, journal, device
        self._rank, self._ranks = rank, ranks
        self.adapter = self._open(ADAPTER_FILE, plan.adapter_layout, adapter_metadata())
        self._shards = {s.file: self._open(s.file, s.layout, s.metadata) for s in plan.shards if not self._is_whole(s)}
        self._left: Counter[str] = Counter()
        threads = GPU_THREADS if device.type == "cuda" else CPU_THREADS
        self._pool = ThreadPoolExecutor(threads, "loftq-write")
        self._room = threading.Semaphore(threads + WAITING)
        self._futures: deque[Future[None]] = deque()
        self._finished: deque[tuple[str, int]] = deque()
        self._lock, self._committing = threading.Lock(), threading.Lock()
        self._pending, self._since = _Pending(), time.perf_counter()

    def missing(self) -> list[Step]:
        """The steps whose results are not all on disk; the others count as finished."""
        steps: list[Step] = []
        for shard in self.plan.shards:
            writer = self._shards.get(shard.file)
            for step in shard.steps:
                if writer is None or self._is_done(step, writer):
                    self._report(step)
                    continue
                steps.append(step)
                writer.forget([step.name] if isinstance(step, TensorInfo) else self._base_names(step))
                if isinstance(step, WeightBatch):
                    self.adapter.forget(_adapter_names(step))
        return steps

    def expect(self, steps: Iterable[Step]) -> None:
        """Learn what this process is going to hand over."""
        for step in steps:
            if isinstance(step, TensorInfo):
                self._left[step.file] += 1
            else:
                self._left[step.first.file] += len(step.jobs)

    def copy(self, info: TensorInfo) -> None:
        """Copy one tensor of the source, in the background."""
        self._submit(self._copy, info)

    def put(self, result: BatchResult, read_seconds: float) -> None:
        """Write the result of a batch, or of a part of one, in the background; waits while too many are under way."""
        self._submit(self._store, result, read_seconds)

    def finished(self) -> Iterable[tuple[str, int]]:
        """Modules that are done since the last call, with the bytes of their weights; raises what writing raised."""
        while self._futures and self._futures[0].done():
            self._futures.popleft().result()
        while self._finished:
            yield self._finished.popleft()

    def drain(self) -> None:
        """Wait until everything that was handed over is written.

        Raises:
            LoftqError: a weight or a file is not fit for it.
        """
        with suppress(IndexError):  # popped by another thread that drains
            while True:
                self._futures.popleft().result()

    def finish_shards(self) -> None:
        """Make the shards whole that are complete; with several ranks, once all have drained, each its share."""
        if self._ranks > 1:
            self.journal.load()
            self.adapter.written.update(self.journal.file(ADAPTER_FILE).written)
        for number, shard in enumerate(self.plan.shards):
            progress = self.journal.file(shard.file)
            if progress.sha256 is None and number % self._ranks == self._rank:
                self._shards[shard.file].written.update(progress.written)
                self._futures.append(self._pool.submit(self._finish_shard, shard.file))
        self.drain()

    def commit(self, wait: bool = True) -> None:
        """Flush what is written and journal it; without `wait` only if nobody else is at it."""
        if not self._committing.acquire(blocking=wait):
            return
        try:
            with self._lock:
                done, self._pending = self._pending, _Pending()
                since, self._since = self._since, time.perf_counter()
            if not done.written and not done.whole:
                return
            for file in done.written:
                (self.adapter if file == ADAPTER_FILE else self._shards[file]).sync()
            done.seconds["total"] = self._since - since
            peaks = {"host": peak_host_bytes(), "device": 0}
            if self._device.type == "cuda":
                peaks["device"] = torch.cuda.max_memory_allocated(self._device)
            self.journal.commit(done.written, done.rows, dict(done.seconds), done.whole, peaks)
        finally:
            self._committing.release()

    def __enter__(self) -> Outputs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Let what is under way end, journal it, close the files."""
        self._pool.shutdown(cancel_futures=kind is not None)
        try:
            self.commit()
        except Exception:
            if kind is None:  # else what stopped the run is what matters
                raise
        finally:
            for writer in (self.adapter, *self._shards.values()):
                writer.close()

    def _open(self, file: str, layout: Sequence[TensorSpec], metadata: dict[str, str]) -> ShardWriter:
        progress, growing = self.journal.file(file), self.out / WORK_FOLDER / Path(file).name
        writer = ShardWriter(growing, self.out / file, layout, metadata, progress.written, join=self._rank > 0)
        progress.written, progress.sha256 = set(writer.written), None
        return writer

    def _is_whole(self, shard: ShardPlan) -> bool:
        """Whether an earlier session finished this shard, and its files are still there."""
        path = self.out / shard.file
        return (
            self.journal.file(shard.file).sha256 is not None
            and path.exists()
            and path.stat().st_size == file_bytes(shard.layout, shard.metadata)
            and all(
                self.adapter.written.issuperset(_adapter_names(step))
                for step in shard.steps
                if isinstance(step, WeightBatch)
            )
        )

    def _is_done(self, step: Step, writer: ShardWriter) -> bool:
        if isinstance(step, TensorInfo):
            return step.name in writer.written
        return (
            all(job.tensor in self.journal.rows for job in step.jobs)
            and writer.written.issuperset(self._base_names(step))
            and self.adapter.written.issuperset(_adapter_names(step))
        )

    def _base_names(self, batch: WeightBatch) -> list[str]:
        return [spec.name for job in batch.jobs for spec in self.plan.stored(job)]

    def _report(self, step: Step) -> None:
        if isinstance(step, WeightBatch):
            for job in step.jobs:
                self._finished.append((job.module, self.plan.checkpoint.tensors[job.tensor].nbytes))

    def _submit(self, work: Any, *arguments: Any) -> None:
        self._room.acquire()
        future = self._pool.submit(work, *arguments)
        future.add_done_callback(lambda _: self._room.release())
        self._futures.append(future)

    def _copy(self, info: TensorInfo) -> None:
        start = time.perf_counter()
        path = self.plan.checkpoint.path(info.file)
        self._shards[info.file].write_chunks(info.name, read_chunks(path, info))
        self._done(info.file, {info.file: [info.name]}, [], {"write": time.perf_counter() - start}, 1)

    def _store(self, result: BatchResult, read_seconds: float) -> None:
        result.wait()
        start = time.perf_counter()
        file = result.batch.first.file
        written: dict[str, list[str]] = {file: [], ADAPTER_FILE: []}
        rows = []
        for weight in result.rows():
            for target, writer, tensors in (
                (file, self._shards[file], weight.base),
                (ADAPTER_FILE, self.adapter, weight.adapter),
            ):
                for name, tensor in tensors.items():
                    writer.write(name, tensor)
                    written[target].append(name)
            rows.append(row_dict(weight.row))
        seconds = {**result.watch.seconds(), "read": read_seconds, "write": time.perf_counter() - start}
        self._done(file, written, rows, seconds, len(rows))
        self._report(result.batch)

    def _done(
        self, file: str, written: dict[str, list[str]], rows: list[Any], seconds: dict[str, float], count: int
    ) -> None:
        with self._lock:
            for name, names in written.items():
                self._pending.written.setdefault(name, []).extend(names)
            self._pending.rows += rows
            for stage, value in seconds.items():
                self._pending.seconds[stage] += value
            self._left[file] -= count
            is_last = self._left[file] == 0
        if is_last and self._ranks == 1:
            self._finish_shard(file)
        elif time.perf_counter() - self._since > COMMIT_SECONDS:
            self.commit(wait=False)

    def _finish_shard(self, file: str) -> None:
        sha256 = self._shards[file].finish()
        with self._lock:
            self._pending.whole[file] = sha256
        self.commit()


def _adapter_names(batch: WeightBatch) -> list[str]:
    return [name for job in batch.jobs for name in peft_adapter.tensor_names(job.module)]
