"""Several batches computed at a time: on a GPU, one runs while the host prepares and waits for the other."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch

from loftq_cli.checkpoint.loader import GPU_THREADS, PIECE_BYTES
from loftq_cli.kernels import fused
from loftq_cli.plan import GPU_ELEMENTS
from loftq_cli.room import Room

LANES = {"cuda": 2, "cpu": 0}  # 0: a CPU is kept busy by one batch, and Ctrl-C gets through at once
SWITCH_SECONDS = 2e-4  # for which a thread may make the others wait: launches must not


_waking: threading.Thread | None = None


def wake(device: torch.device) -> None:
    """Have a GPU get ready in the background (context, pinned memory, libraries), while transformers is imported.

    Only what needs little Python: both threads take turns at that.
    """
    global _waking
    if device.type == "cuda" and _waking is None:
        _waking = threading.Thread(target=_get_ready, args=(device,), daemon=True)
        _waking.start()


def is_waking() -> bool:
    """Whether `wake` has started a GPU in this process."""
    return _waking is not None


def _get_ready(device: torch.device) -> None:
    with suppress(Exception):  # where something is wrong, the run itself will meet it and say so
        torch.cuda.set_device(device)
        kept = [torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2 * GPU_THREADS)]
        del kept  # torch keeps them for the loader
        _load_libraries(device)
        fused()


def _load_libraries(device: torch.device) -> None:
    """Have torch load its linear algebra, which it cannot do in two threads at a time."""
    with suppress(torch.OutOfMemoryError):
        eye = torch.eye(32, dtype=torch.float64, device=device).repeat(2, 1, 1)
        torch.linalg.solve_triangular(torch.linalg.cholesky_ex(eye).L, eye, upper=False)
        torch.linalg.eigh(eye)
        for dtype in (torch.float32, torch.bfloat16):
            torch.bmm(eye.to(dtype), eye.to(dtype))


class Lanes:
    """Threads that compute, each on a stream of its own; a context.

    Results do not depend on which lane computes what, or beside what: each batch is a computation of its own.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._own = device, threading.local()
        self._count = LANES[device.type]
        self._pool = ThreadPoolExecutor(max(1, self._count), "loftq-compute")
        self._running: deque[Future[None]] = deque()
        self.room = Room(GPU_ELEMENTS)  # weights that are computed at once; all of it for what must be alone

    def submit(self, work: Callable[..., None], *arguments: Any) -> None:
        """Do `work` once a lane is free; raises what earlier work has raised."""
        if self._count == 0:
            work(*arguments)
            return
        while len(self._running) >= self._count:
            self._running.popleft().result()
        self._running.append(self._pool.submit(self._run, work, *arguments))

    def wait(self) -> None:
        """Wait for all that was submitted; raises what it has raised."""
        while self._running:
            self._running.popleft().result()

    def __enter__(self) -> Lanes:
        self._interval = sys.getswitchinterval()
        if self._count > 1:
            if _waking is not None:
                _waking.join()
            _load_libraries(self._device)
            sys.setswitchinterval(SWITCH_SECONDS)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        sys.setswitchinterval(self._interval)

    def _run(self, work: Callable[..., None], *arguments: Any) -> None:
        if not hasattr(self._own, "stream"):
            torch.cuda.set_device(self._device)
            self._own.stream = torch.cuda.Stream(self._device)
        with torch.cuda.stream(self._own.stream):
            work(*arguments)
