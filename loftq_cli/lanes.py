"""Several batches computed at a time: on a GPU, one runs while the host prepares and waits for the other."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from loftq_cli.plan import GPU_ELEMENTS
from loftq_cli.room import Room

LANES = {"cuda": 2, "cpu": 0}  # 0: a CPU is kept busy by one batch, and Ctrl-C gets through at once
SWITCH_SECONDS = 2e-4  # for which a thread may make the others wait: launches must not


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
