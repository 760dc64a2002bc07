"""Tensors read ahead of their use: in pieces, by several threads, straight to the device that computes with them."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from loftq_cli.checkpoint.reader import TensorInfo, open_file, read_at

# Few threads and large pieces: whenever one comes back to Python, it makes those wait that launch kernels. One moves
# 5 GB/s out of the page cache, and a GPU computes with about as many as two bring.
PIECE_BYTES = 32 << 20
GPU_THREADS, CPU_THREADS = 4, 2

T = TypeVar("T")
L = TypeVar("L")


@dataclass
class Loading:
    """Tensors on their way, to be [B, *shape]."""

    target: Tensor | None
    pieces: list[Future[tuple[float, torch.cuda.Event | None]]]

    def wait(self) -> tuple[Tensor, float]:
        """The tensors, ready for the current stream, and the seconds that threads spent reading them.

        Raises:
            LoftqError: a file cannot be read, or ends too early.
        """
        seconds = 0.0
        for piece in self.pieces:
            spent, copied = piece.result()
            seconds += spent
            if copied is not None:
                copied.wait()
        target, self.target = self.target, None  # theirs alone from here on
        assert target is not None
        return target, seconds


class Loader:
    """Reads tensors onto `device`.

    For a GPU every thread owns two pinned pieces of memory: one is filled from the file while the other is copied, so
    that host memory does not grow with the tensors. A tensor on the GPU belongs to the loader's own stream; who lets go
    of it must have waited for whatever still reads it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pool = ThreadPoolExecutor(GPU_THREADS if self.stream else CPU_THREADS, "loftq-read")
        self._own = threading.local()
        self._files: dict[Path, FileIO] = {}
        self._under_way: Counter[Path] = Counter()  # pieces
        self._lock = threading.Lock()

    def load(self, tensors: Sequence[tuple[Path, TensorInfo]], device: torch.device | None = None) -> Loading:
        """Begin to read tensors of one shape and dtype from files, onto `device` if not onto the loader's own."""
        info = tensors[0][1]
        with torch.cuda.stream(self.stream):
            target = torch.empty((len(tensors), *info.shape), dtype=info.dtype, device=device or self.device)
        flat = target.view(len(tensors), -1).view(torch.uint8)
        pieces = []
        self._close_all_but({path for path, _ in tensors})
        for row, (path, one) in zip(flat, tensors, strict=True):
            if path not in self._files:
                self._files[path] = open_file(path)
            for begin in range(0, one.nbytes, PIECE_BYTES):
                with self._lock:
                    self._under_way[path] += 1
                pieces.append(self._pool.submit(self._piece, path, one, begin, row[begin : begin + PIECE_BYTES]))
        return Loading(target, pieces)

    def close(self) -> None:
        """Drop what is not begun, wait for the rest, and close the files."""
        self._pool.shutdown(cancel_futures=True)
        for file in self._files.values():
            file.close()

    def _close_all_but(self, needed: set[Path]) -> None:
        """Close files that nothing is being read from: one that is deleted takes its room until it is closed."""
        with self._lock:
            for path in [path for path in self._files if path not in needed and not self._under_way[path]]:
                self._files.pop(path).close()

    def _piece(self, path: Path, info: TensorInfo, begin: int, target: Tensor) -> tuple[float, torch.cuda.Event | None]:
        try:
            return self._read_piece(path, info, begin, target)
        finally:
            with self._lock:
                self._under_way[path] -= 1

    def _read_piece(
        self, path: Path, info: TensorInfo, begin: int, target: Tensor
    ) -> tuple[float, torch.cuda.Event | None]:
        start, descriptor = time.perf_counter(), self._files[path].fileno()
        if self.stream is None or not target.is_cuda:
            read_at(descriptor, target.numpy().data, path, info, begin)
            return time.perf_counter() - start, None
        if not hasattr(self._own, "buffers"):
            torch.cuda.set_device(self.device)
            self._own.buffers = [[torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True), None] for _ in range(2)]
        self._own.buffers.reverse()
        buffer, busy = self._own.buffers[0]
        if busy is not None:
            busy.synchronize()
        piece = buffer[: len(target)]
        read_at(descriptor, piece.numpy().data, path, info, begin)
        with torch.cuda.stream(self.stream):
            target.copy_(piece, non_blocking=True)
            copied = self.stream.record_event(torch.cuda.Event(blocking=True))
        self._own.buffers[0][1] = copied
        return time.perf_counter() - start, copied


def ahead(items: Iterable[T], begin: Callable[[T], L], depth: int) -> Iterator[tuple[T, L]]:
    """Yield each item with what was begun for it, while the next `depth` items are begun already."""
    begun: list[tuple[T, L]] = []
    for item in items:
        begun.append((item, begin(item)))
        if len(begun) > depth:
            yield begun.pop(0)
    yield from begun
