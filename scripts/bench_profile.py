"""`bench.py profile`: where the time of a quantization goes, by torch's profiler."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from bench_common import now, print_table, save, say

COLUMNS = {"name": "", "calls": "", "self, ms": ".1f", "share": ".1%"}
TOP = 25


def top(averages: list[Any], attribute: str, wall: float) -> list[dict[str, Any]]:
    best = sorted(averages, key=lambda average: -getattr(average, attribute))[:TOP]
    return [
        {
            "name": average.key[:100].replace("|", "/"), "calls": average.count,
            "self, ms": getattr(average, attribute) / 1e3, "share": getattr(average, attribute) / 1e6 / wall,
        }
        for average in best
    ]  # fmt: skip


def busy_seconds(spans: list[tuple[float, float]]) -> float:
    """The length of the union of spans in microseconds: streams may overlap."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total / 1e6


def profile(model: Path) -> None:
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    from loftq_cli.pipeline import quantize

    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    try:  # reading and writing may have threads of their own
        every_thread = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    except TypeError:  # another torch
        every_thread = None
    walls = {}
    with tempfile.TemporaryDirectory() as work:
        for name in ("warm-up", "plain"):  # the first one compiles kernels
            start = now()
            quantize(model, Path(work) / name, bits=2, rank=16)
            walls[name] = now() - start
            say(f"{name}: {walls[name]:.2f} s")
        with torch.profiler.profile(activities=activities, experimental_config=every_thread) as profiler:
            start = now()
            report = quantize(model, Path(work) / "profiled", bits=2, rank=16)
            walls["profiled"] = wall = now() - start

    def is_work(event: Any) -> bool:
        return event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)

    say(f"profiled: {wall:.2f} s; reading the trace")
    averages = list(profiler.key_averages())
    cpu = top([a for a in averages if a.device_type == DeviceType.CPU], "self_cpu_time_total", wall)
    on_device = [a for a in averages if is_work(a)]
    device = top(on_device, "self_device_time_total", wall)
    spans = [(event.time_range.start, event.time_range.end) for event in (profiler.events() or ()) if is_work(event)]
    busy = busy_seconds(spans)
    launches = sum(a.count for a in on_device if not a.key.startswith(("Memcpy", "Memset")))
    summary = {
        "walls": walls, "device busy, s": busy, "device idle share": 1 - busy / wall if cuda else None,
        "kernel launches": launches, "copies": sum(a.count for a in on_device) - launches,
        "weights": report["totals"]["weights"], "seconds of the report": report["totals"]["seconds"],
    }  # fmt: skip
    for rows in (device, cpu) if device else (cpu,):
        print_table(rows, COLUMNS)
        print()
    print(summary, flush=True)
    save("profile", device or cpu, model=model.name, **summary, cpu_rows=cpu)
