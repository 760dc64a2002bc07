"""The control of `--report-control`: what the bytes of base + adapter buy where all of them go into a base alone."""

from __future__ import annotations

import heapq
import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loftq_cli.checkpoint.files import write_file
from loftq_cli.checkpoint.reader import read_tensor
from loftq_cli.config import CALIBRATED, GRIDS
from loftq_cli.formats import FORMATS, make_quantizer
from loftq_cli.formats.base import to_store
from loftq_cli.jobs import WeightJob
from loftq_cli.journal import REPORT_FILE
from loftq_cli.lowrank import full_precision
from loftq_cli.plan import Plan
from loftq_cli.quantizers.base import Quantizer, dequantize, fitted

WIDTHS = (2, 3, 4, 8)
PACKED = FORMATS["packed"]


@dataclass(frozen=True)
class Width:
    """A weight at a number of bits: what it takes to store, and the squared error of plain rounding."""

    bits: int
    nbytes: int
    squared_error: float


def control(plan: Plan, limit: int | None = None) -> dict[str, Any]:
    """What a base of as many bytes as `plan`'s base and adapter, without an adapter, errs: a report's "control".

    Weights are rounded plainly by the plan's quantizer, and begin at the plan's bits; as long as bytes are left, the
    weight gets more of them whose squared error falls most for every byte. Bytes are those of `packed`, which can mix
    bits, of codes and scales; the adapter's are those of its factors as they are stored. Reads every weight again.

    Args:
        plan: of a run.
        limit: other bytes than those.
    """
    weights: list[tuple[WeightJob, list[Width]]] = []
    norm = 0.0
    with full_precision():
        for job in plan.jobs:
            info = plan.info(job)
            weight = read_tensor(plan.checkpoint.path(info.file), info).to(plan.config.device, torch.float32)
            W = weight.mT.contiguous() if job.transposed else weight
            weights.append((job, [measure(plan, job, bits, W) for bits in WIDTHS if bits >= job.bits]))
            norm += _square(W)
    narrowest = sum(widths[0].nbytes for _, widths in weights)
    if limit is None:
        limit = narrowest + sum(spec.nbytes for spec in plan.adapter_layout)
    levels = spend([widths for _, widths in weights], limit - narrowest)
    chosen = [(job, widths[level]) for (job, widths), level in zip(weights, levels, strict=True)]
    used = sum(width.nbytes for _, width in chosen)
    squares = math.fsum(width.squared_error for _, width in chosen)
    return {
        "bytes": limit,
        "bytes_used": used,
        "bits_per_weight": round(8 * used / plan.parameters, 4),
        "relative_error": math.sqrt(squares / norm) if norm else 0.0,
        "weights": {str(bits): count for bits, count in sorted(Counter(width.bits for _, width in chosen).items())},
        "bits_for": {job.module: width.bits for job, width in chosen if width.bits != job.bits},
    }


def measure(plan: Plan, job: WeightJob, bits: int, W: Tensor) -> Width:
    """`W` (float32 [m, n]), the weight of `job`, at `bits`."""
    quantizer = fitted(make_rounding(plan, job, bits), W)
    made = to_store(PACKED, job.place, quantizer.empty(*job.shape))
    error = _square(W - dequantize(quantizer.quantize(W)).view_as(W))
    return Width(bits, sum(tensor.nbytes for tensor in made.values()), error)


def make_rounding(plan: Plan, job: WeightJob, bits: int) -> Quantizer:
    """The plan's quantizer at `bits`, as `packed` stores it; at 8, which codebooks do not have, `uniform`."""
    name = "uniform" if bits == 8 and job.quantizer not in GRIDS else job.quantizer
    double_quant = plan.config.double_quant and name not in GRIDS
    return make_quantizer(PACKED, name, bits, job.group_size, job.dtype, double_quant)


def spend(weights: list[list[Width]], budget: int) -> list[int]:
    """Which width each weight gets, an index into its rising widths, for `budget` bytes beyond the narrowest.

    Always the step that lowers the squared error most for every byte, among those that fit. That is the best there is
    where widths bring less and less, but for what the last bytes could do.
    """
    levels = [0] * len(weights)

    def step(number: int) -> tuple[float, int, int] | None:
        widths, level = weights[number], levels[number]
        if level + 1 == len(widths):
            return None
        now, more = widths[level : level + 2]
        nbytes = more.nbytes - now.nbytes
        return (now.squared_error - more.squared_error) / -nbytes, number, nbytes

    heap = [found for number in range(len(weights)) if (found := step(number))]
    heapq.heapify(heap)
    while heap:
        _, number, nbytes = heapq.heappop(heap)
        if nbytes <= budget:
            budget -= nbytes
            levels[number] += 1
            if found := step(number):
                heapq.heappush(heap, found)
    return levels


def add_control(plan: Plan, out: Path, report: dict[str, Any]) -> dict[str, Any]:
    """The report of the finished `out` with a control, there as well as returned; one that it has is kept."""
    if "control" in report:
        return report
    report = {**report, "control": control(plan)}
    write_file(out / REPORT_FILE, (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode())
    return report


def sentence(control: dict[str, Any], relative_error: float, method: str) -> str:
    """What people read of it; `relative_error` is that of the weights of base + adapter."""
    widths = ", ".join(f"{count} weights at {bits} bits" for bits, count in control["weights"].items())
    return (
        f"Control, the same bytes without an adapter: {control['bits_per_weight']:.2f} bits per weight ({widths}), "
        f"rounded plainly: relative error of weights {control['relative_error']:.4f}, of base + adapter "
        f"{relative_error:.4f}" + (f", but `{method}` aims at outputs instead" if method in CALIBRATED else "")
    )


def _square(x: Tensor) -> float:
    return torch.linalg.vector_norm(x, dtype=torch.float64).square().item()
