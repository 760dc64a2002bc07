"""How long the stages of the work take, on whatever does it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Seconds by stage on one device: in a GPU's own time, by events that nobody waits for until the end."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[tuple[str, float | torch.cuda.Event, float | torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time what runs inside as `stage`."""
        start = self._now()
        yield
        self._spans.append((stage, start, self._now()))

    def seconds(self) -> dict[str, float]:
        """The seconds of each stage; on a GPU only after its work is done."""
        totals: dict[str, float] = defaultdict(float)
        for stage, start, end in self._spans:
            if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
                totals[stage] += start.elapsed_time(end) / 1e3
            elif isinstance(start, float) and isinstance(end, float):
                totals[stage] += end - start
        return dict(totals)

    def _now(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
