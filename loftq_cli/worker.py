"""One batch of weights on one device: quantize, factorise, round to what is stored, measure."""

from __future__ import annotations

import functools
import hashlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from loftq_cli.errors import LoftqError
from loftq_cli.formats import peft_adapter
from loftq_cli.jobs import WeightBatch, WeightJob
from loftq_cli.methods import GRAM_METHODS, METHODS, Decomposition, output_error, seed_for, squared_norm
from loftq_cli.plan import Plan
from loftq_cli.quantizers.base import residual as residual_of
from loftq_cli.quantizers.base import unstack


@dataclass(frozen=True)
class WeightRow:
    """What the report says of one weight. `relative_error` is ‖W − Ŵ‖_F / ‖W‖_F; `norm` is ‖W‖_F."""

    name: str
    tensor: str
    dtype: str  # of the weight once loaded, see `WeightJob`
    shape: tuple[int, int]
    bits: int
    group_size: int
    quantizer: str
    rank: int
    device: str  # the CPU's where the GPU had no room
    iterations: int
    relative_error: float
    relative_error_without_adapter: float
    norm: float
    output_error: float | None  # ‖X(W − Ŵ)ᵀ‖_F / ‖XWᵀ‖_F on the calibration samples, and on samples held out
    output_error_without_adapter: float | None
    held_out_output_error: float | None
    held_out_output_error_without_adapter: float | None
    sha256: dict[str, str]  # of each stored tensor's bytes, so that `verify` can name what was changed
    seconds: float


@dataclass(frozen=True)
class WeightResult:
    """What one weight becomes: the tensors for its shard, those for the adapter, and its row."""

    base: dict[str, Tensor]
    adapter: dict[str, Tensor]
    row: WeightRow


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


@dataclass
class BatchResult:
    """The result of a batch on its way from the device; `wait` for it, then it can be looked at.

    Shapes: weights [B, m, n]; factors as stored, [B, r, n] and [B, m, r]; measured float64 [B, 1 + 3 K]: iterations,
    and squared norms of the weight and of the error without and with the adapter, in each of K metrics: plain (K = 1),
    or also those of the Gram matrices of calibration and of held-out samples (K = 3).
    """

    plan: Plan
    batch: WeightBatch
    weights: Tensor | None
    device: torch.device
    base: list[dict[str, Tensor]]
    factors: list[Tensor]
    measured: Tensor
    watch: Stopwatch
    done: torch.cuda.Event | None = None
    on_device: Tensor | None = None  # what is being copied from there

    def ready(self) -> None:
        """Wait for the device."""
        if self.done is not None:
            self.done.synchronize()

    def wait(self) -> None:
        """Wait for the device, check what came, and let go of the device's memory.

        Raises:
            LoftqError: NaN or infinite values, or scales beyond float16; names the tensor.
        """
        self.ready()
        assert self.weights is not None
        for i, job in enumerate(self.batch.jobs):
            if not self.measured[i, 1:3].isfinite().all():
                raise _refusal(job, self.weights[i].float())
        self.weights = self.on_device = None

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that it takes until it is written."""
        tensors = [*self.factors, *(tensor for base in self.base for tensor in base.values())]
        return sum(tensor.nbytes for tensor in tensors)

    def rows(self) -> Iterator[WeightResult]:
        """Each weight's tensors and row, after `wait`."""
        seconds = sum(self.watch.seconds().values()) / len(self.batch.jobs)
        for i, job in enumerate(self.batch.jobs):
            iterations, *squares = self.measured[i].tolist()
            in_metrics = zip(squares[::3], squares[1::3], squares[2::3], strict=True)
            pairs = [(relative(before, norm), relative(after, norm)) for norm, before, after in in_metrics]
            (before, after), *of_outputs = pairs
            measured = [*of_outputs, (None, None), (None, None)]
            names = peft_adapter.tensor_names(job.module)
            adapter = {name: factor[i] for name, factor in zip(names, self.factors, strict=True)}
            row = WeightRow(
                name=job.module,
                tensor=job.tensor,
                dtype=str(job.dtype).removeprefix("torch."),
                shape=job.shape,
                bits=job.bits,
                group_size=job.group_size,
                quantizer=job.quantizer,
                rank=self.plan.config.rank,
                device=self.device.type,
                iterations=int(iterations),
                relative_error=after,
                relative_error_without_adapter=before,
                norm=squares[0] ** 0.5,
                output_error=measured[0][1],
                output_error_without_adapter=measured[0][0],
                held_out_output_error=measured[1][1],
                held_out_output_error_without_adapter=measured[1][0],
                sha256={name: hash_tensor(tensor) for name, tensor in {**self.base[i], **adapter}.items()},
                seconds=round(seconds, 6),
            )
            yield WeightResult(self.base[i], adapter, row)


def quantize_batch(plan: Plan, batch: WeightBatch, weights: Tensor, grams: Sequence[Tensor] = ()) -> BatchResult:
    """Run the plan's method on a batch, on the device of `weights`, without waiting for a GPU.

    Args:
        plan: the decided options.
        batch: which weights they are.
        weights: [B, m, n], any float dtype.
        grams: [n, n] of what all of them multiply, of calibration and of held-out samples; none for a weight-only
            method, which stands in for a calibrated one where nothing was seen.
    """
    job, config = batch.first, plan.config
    assert config.alpha is not None, "a plan has decided it"
    watch = Stopwatch(weights.device)
    # a GPU's kernels read the stored dtype, a CPU would convert it in every round
    W = weights if weights.is_cuda and not grams else weights.float()
    quantizer = plan.make_quantizer(job)
    seeds = [seed_for(config.seed, job.tensor) for job in batch.jobs]
    method: Callable[..., Decomposition] = METHODS.get(config.method, METHODS["loftq"])
    if grams:
        method = partial(GRAM_METHODS[config.method], gram=grams[0])
    made = method(W, quantizer, config.rank, iters=config.iters, seeds=seeds, timed=watch)
    with watch("quantize"):
        scaling = peft_adapter.scaling(config.rank, config.alpha, config.rslora)
        dtype = getattr(torch, config.adapter_dtype)
        factors = peft_adapter.stored_factors(made.factors.lora_A, made.factors.lora_B, scaling, dtype)
        zero = peft_adapter.stored_factors(made.start.lora_A, made.start.lora_B, scaling, dtype)

        rows = W.view(-1, W.shape[2])
        metrics: list[Callable[[Tensor], Tensor]] = [
            squared_norm,
            *(partial(output_error, gram=gram) for gram in grams),
        ]
        norms = [metric(W) for metric in metrics]
        residual = residual_of(rows, made.quantized).view(W.shape)
        before = [metric(residual) for metric in metrics]
        lora_A, lora_B = peft_adapter.applied_factors(*factors, scaling)
        residual.baddbmm_(lora_B, lora_A, alpha=-1)
        after = [metric(residual) for metric in metrics]
        del residual
        # else there is nothing to repair, or the adapter's dtype cannot hold the factors
        deciding = 1 if grams else 0
        repaired = after[deciding] < before[deciding]
        chosen = [torch.where(repaired[:, None, None], a, b) for a, b in zip(factors, zero, strict=True)]
        iterations = torch.where(repaired, made.iterations, 0).double()
        after = [torch.where(repaired, a, b) for a, b in zip(after, before, strict=True)]
        measured = torch.stack([iterations, *chain(*zip(norms, before, after, strict=True))], 1)
        base = [
            plan.format.tensors(job.stored_prefix, quantized)
            for job, quantized in zip(batch.jobs, unstack(made.quantized, len(batch.jobs)), strict=True)
        ]
    result = BatchResult(plan, batch, weights, weights.device, base, chosen, measured, watch)
    return _to_host(result) if weights.is_cuda else result


def _to_host(result: BatchResult) -> BatchResult:
    """Start to copy it into pinned memory, in one piece, on a stream of its own: the next batch need not wait."""
    parts = [result.measured, *result.factors, *(t for base in result.base for t in base.values() if t.is_cuda)]
    flat = flatten(parts)
    copies = _copy_stream(flat.device)
    copies.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(copies):
        measured, *rest = unflatten(flat.to("cpu", non_blocking=True), parts)
        done = copies.record_event(torch.cuda.Event(blocking=True))
    factors, stored = rest[: len(result.factors)], iter(rest[len(result.factors) :])
    base = [{name: next(stored) if t.is_cuda else t for name, t in tensors.items()} for tensors in result.base]
    return replace(result, base=base, factors=factors, measured=measured, done=done, on_device=flat)


def flatten(tensors: list[Tensor]) -> Tensor:
    """The bytes of all of them, uint8; the wider the dtype the earlier, so that each is aligned."""
    return torch.cat([t.contiguous().view(-1).view(torch.uint8) for t in sorted(tensors, key=_by_width)])


def unflatten(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Invert `flatten`: views of `flat`, in the order of `like`."""
    views, begin = {}, 0
    for tensor in sorted(like, key=_by_width):
        views[id(tensor)] = flat[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        begin += tensor.nbytes
    return [views[id(tensor)] for tensor in like]


def _by_width(tensor: Tensor) -> int:
    return -tensor.dtype.itemsize


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def hash_tensor(tensor: Tensor) -> str:
    """sha256 of the bytes of a CPU tensor, as they are stored."""
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()


def relative(squared_error: float, squared_reference: float) -> float:
    """√(squared_error / squared_reference); 0 where both are 0."""
    return (squared_error / squared_reference) ** 0.5 if squared_error > 0 else 0.0


def row_dict(row: WeightRow) -> dict[str, object]:
    """The row as JSON holds it, without what was not measured."""
    return {key: value for key, value in {**asdict(row), "shape": list(row.shape)}.items() if value is not None}


def _refusal(job: WeightJob, W: Tensor) -> LoftqError:
    if bad := W.numel() - int(torch.isfinite(W).sum()):
        return LoftqError(
            f"`{job.tensor}` in `{job.file}` holds {bad} NaN or infinite values of {W.numel()}",
            f"repair the checkpoint, or leave this weight as it is with `--skip '{job.module}'`",
        )
    if job.quantizer == "nf":
        return LoftqError(
            f"`{job.tensor}`: its weights, up to {W.abs().max():.3g}, are beyond the dtype it is loaded in"
        )
    return LoftqError(
        f"`{job.tensor}`: a scale of `{job.quantizer}` is beyond float16 (largest weight {W.abs().max():.3g})",
        f"use `--quantizer nf` (float32 scales), or leave it out with `--skip '{job.module}'`",
    )
