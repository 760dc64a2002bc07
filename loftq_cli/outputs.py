"""The files of OUT while they are made: what is missing, written by several threads, journaled, and made whole."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from loftq_cli.adapters import EXPERT_FACTORS, assemble
from loftq_cli.checkpoint.reader import CHUNK_BYTES, TensorInfo, read_chunks
from loftq_cli.checkpoint.writer import ShardWriter, TensorSpec
from loftq_cli.jobs import WeightBatch, WeightJob
from loftq_cli.journal import Journal
from loftq_cli.plan import ADAPTER_FILE, Plan, Step, adapter_metadata
from loftq_cli.report import peak_host_bytes
from loftq_cli.resume import Headers, adapter_names, base_names, factor_file, growing, read_whenever
from loftq_cli.room import Room
from loftq_cli.worker import BatchResult, hash_tensor, row_dict

COMMIT_SECONDS = 0.2  # between commits: a kill loses that and what is in flight; little is left to flush at the end
GPU_THREADS, CPU_THREADS = 8, 1  # a hash takes 1.4 GB/s, and every byte is hashed twice
WAITING_BYTES = 1 << 30  # of results and copies that are written or wait for it, at most
COPY_BYTES = 2 * CHUNK_BYTES  # of memory that copying a tensor takes


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
        journal: what is there already (see `forget_lost`); begun by rank 0.
        device: that of the results, which must be waited for.
        rank: of this process: 0 makes the files, the others join them.
        ranks: how many processes write.
    """

    def __init__(
        self, plan: Plan, out: Path, journal: Journal, device: torch.device, rank: int = 0, ranks: int = 1
    ) -> None:
        self.plan, self.out, self.journal, self._device = plan, out, journal, device
        self._rank, self._ranks = rank, ranks
        self._factors = {
            file: self._open(file, layout, adapter_metadata(), join=rank > 0)
            for file, layout in plan.factor_files.items()
        }
        self.adapter = self._factors[ADAPTER_FILE]
        self._shards = {
            shard.file: self._open(shard.file, shard.layout, shard.metadata, join=rank > 0)
            for shard in plan.shards
            if journal.file(shard.file).sha256 is None
        }
        self._left: Counter[str] = Counter()
        on_gpu = device.type == "cuda"
        begin = partial(torch.cuda.set_device, device) if on_gpu else None
        self._pool = ThreadPoolExecutor(GPU_THREADS if on_gpu else CPU_THREADS, "loftq-write", begin)
        self._room = Room(WAITING_BYTES)
        self._futures: list[Future[None]] = []
        self._finished: list[tuple[str, int]] = []
        self._lock, self._committing = threading.Lock(), threading.Lock()
        self._pending, self._since, self._lost = _Pending(), time.perf_counter(), False

    def missing(self) -> list[Step]:
        """The steps whose results are not all on disk, copies a shard early: a file's hash often waits for one.

        But not where the shard is yet to be downloaded, for which results would wait.
        """
        early = self.plan.checkpoint.is_local
        steps: list[tuple[int, Step]] = []
        for number, shard in enumerate(self.plan.shards):
            writer = self._shards.get(shard.file)
            for step in shard.steps:
                if writer is None or self._is_done(step, writer):
                    self._report(step)
                    continue
                is_copy = isinstance(step, TensorInfo)
                steps.append((2 * number - 3 if is_copy and early else 2 * number, step))
                writer.forget([step.name] if isinstance(step, TensorInfo) else base_names(self.plan, step))
                self._factors[factor_file(self.plan, step)].forget(adapter_names(self.plan, step))
        return [step for _, step in sorted(steps, key=lambda pair: pair[0])]

    def expect(self, steps: Iterable[Step]) -> None:
        """Learn what this process is going to hand over."""
        for step in steps:
            if isinstance(step, TensorInfo):
                self._left[step.file] += 1
            else:
                self._left[step.first.file] += len(step.jobs)

    def copy(self, info: TensorInfo) -> None:
        """Copy one tensor of the source, in the background."""
        self._submit(COPY_BYTES, self._copy, info)

    def put(self, result: BatchResult, read_seconds: float) -> None:
        """Write the result of a batch, or of a part of one, in the background; waits while too many are under way."""
        self._submit(result.nbytes, self._store, result, read_seconds)

    def rewrite(self, job: WeightJob, factors: tuple[Tensor, Tensor], measured: Mapping[str, Any]) -> None:
        """Replace the factors of a weight that is written, and what its row says of them."""
        tensors = dict(zip(job.factor_names, factors, strict=True)) if job.rank else {}
        row = {k: value for k, value in {**self.journal.rows[job.tensor], **measured}.items() if value is not None}
        row["sha256"] = {**row["sha256"], **{name: hash_tensor(tensor) for name, tensor in tensors.items()}}
        for name, tensor in tensors.items():
            self.adapter.write(name, tensor)
        with self._lock:
            self._pending.written.setdefault(ADAPTER_FILE, []).extend(tensors)
            self._pending.rows.append(row)

    def spent(self, seconds: Mapping[str, float]) -> None:
        """Count what stages took that no weight's own result knows of."""
        with self._lock:
            for stage, value in seconds.items():
                self._pending.seconds[stage] += value

    def finished(self) -> list[tuple[str, int]]:
        """Modules that are done since the last call, with the bytes of their weights; raises what writing raised."""
        with self._lock:
            ended = [future for future in self._futures if future.done()]
            self._futures = [future for future in self._futures if not future.done()]
            finished, self._finished = self._finished, []
        for future in ended:
            future.result()
        return finished

    def drain(self) -> None:
        """Wait until everything that was handed over is written.

        Raises:
            LoftqError: a weight or a file is not fit for it.
        """
        with self._lock:
            under_way = list(self._futures)
        for future in under_way:
            future.result()

    def finish_shards(self) -> None:
        """Make the shards whole that are complete; with several ranks, once all have drained, each its share."""
        if self._ranks > 1:
            self.journal.load()
            self.adapter.written.update(self.journal.file(ADAPTER_FILE).written)
        for number, shard in enumerate(self.plan.shards):
            if self.journal.file(shard.file).sha256 is None and number % self._ranks == self._rank:
                if self._ranks > 1:  # opened again, for over a network what others wrote shows only then
                    self._shards[shard.file].close()
                    self._shards[shard.file] = self._open(shard.file, shard.layout, shard.metadata, join=True)
                self._submit(0, self._finish_shard, shard.file)
        self.drain()
        if self._rank == 0 and self.plan.stacked:
            known: Headers = {}

            def read(name: str) -> Tensor:
                (factor,) = read_whenever(self.out, EXPERT_FACTORS, [name], known)
                return factor

            assemble(self.plan.jobs, self.plan.stacked, self.plan.adapter_layout, read, self.adapter.write)

    def commit(self, wait: bool = True) -> None:
        """Flush what is written and journal it; without `wait` only if nobody else is at it."""
        if not self._committing.acquire(blocking=wait):
            return
        try:
            with self._lock:
                done = self._pending
                if self._lost or not (done.written or done.whole):
                    return
                self._pending, since = _Pending(), self._since
                self._since = time.perf_counter()
            self._lost = True  # unless it gets on the disk; and what comes after a failure may share its fate unseen
            for file in done.written:
                {**self._factors, **self._shards}[file].sync()
            self._lost = False
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
        try:
            self._pool.shutdown(cancel_futures=kind is not None)
            self.commit()
        except Exception:
            if kind is None:  # else what stopped the run is what matters
                raise
        finally:
            for writer in (*self._factors.values(), *self._shards.values()):
                writer.close()

    def _open(self, file: str, layout: Sequence[TensorSpec], metadata: dict[str, str], join: bool) -> ShardWriter:
        written, place = self.journal.file(file).written, growing(self.out, file)
        ahead = file not in self.plan.factor_files  # the adapter's metadata is known at the very end
        return ShardWriter(place, self.out / file, layout, metadata, written, join=join, hash_ahead=ahead)

    def _is_done(self, step: Step, writer: ShardWriter) -> bool:
        if not self._factors[factor_file(self.plan, step)].written.issuperset(adapter_names(self.plan, step)):
            return False
        if isinstance(step, TensorInfo):
            return step.name in writer.written
        rows = self.journal.rows
        return all(job.tensor in rows for job in step.jobs) and writer.written.issuperset(base_names(self.plan, step))

    def _report(self, step: Step) -> None:
        if isinstance(step, WeightBatch):
            sizes = [(job.module, self.plan.info(job).nbytes) for job in step.jobs]
            with self._lock:
                self._finished += sizes

    def _submit(self, share: int, work: Callable[..., None], *arguments: Any) -> None:
        self._room.take(share)
        future = self._pool.submit(work, *arguments)
        future.add_done_callback(lambda _: self._room.give(share))
        with self._lock:
            self._futures.append(future)

    def _copy(self, info: TensorInfo) -> None:
        start = time.perf_counter()
        path, heads = self.plan.checkpoint.path(info.file), adapter_names(self.plan, info)
        self._shards[info.file].write_chunks(info.name, read_chunks(path, info))
        for name in heads:  # now, because with `--evict` the file goes
            self.adapter.write_chunks(name, read_chunks(path, info))
        written = {info.file: [info.name], **({ADAPTER_FILE: heads} if heads else {})}
        self._done(info.file, written, [], {"write": time.perf_counter() - start}, 1)

    def _store(self, result: BatchResult, read_seconds: float) -> None:
        result.wait()
        start = time.perf_counter()
        file, factors = result.batch.first.file, self.plan.factor_file(result.batch.first)
        written: dict[str, list[str]] = {file: [], factors: []}
        rows = []
        for weight in result.rows():
            for target, writer, tensors in (
                (file, self._shards[file], weight.base),
                (factors, self._factors[factors], weight.adapter),
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
        self.spent(seconds)
        with self._lock:
            for name, names in written.items():
                self._pending.written.setdefault(name, []).extend(names)
            self._pending.rows += rows
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
        self.plan.checkpoint.release(file)
