"""One batch of weights on one device: quantize, factorise, round to what is stored, measure."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from loftq_cli.calibration.observe import LayerErrors, row_fields
from loftq_cli.errors import LoftqError
from loftq_cli.formats import peft_adapter
from loftq_cli.formats.base import to_store
from loftq_cli.jobs import WeightBatch, WeightJob
from loftq_cli.methods import (
    GRAM_METHODS,
    METHODS,
    Decomposition,
    Inputs,
    embedding_start,
    seed_for,
    squared_norm,
    without_factors,
    zero_start,
)
from loftq_cli.methods.training import Fit
from loftq_cli.plan import Plan
from loftq_cli.quantizers.base import fitted, unstack
from loftq_cli.quantizers.base import residual as residual_of
from loftq_cli.stopwatch import Stopwatch


@dataclass(frozen=True)
class WeightRow:
    """What the report says of one weight. `relative_error` is ‖W − Ŵ‖_F / ‖W‖_F; `norm` is ‖W‖_F."""

    name: str
    tensor: str
    dtype: str  # of the weight once loaded, see `WeightJob`
    transposed: bool | None  # in the source's file
    expert: int | None  # which expert's it is
    embedding: bool | None  # a table of tokens, whose adapter is stored as PEFT has those of embeddings
    wrapped: bool | None  # see `Place`
    shape: tuple[int, int]
    bits: int
    group_size: int
    quantizer: str
    rank: int
    stacked: peft_adapter.StackedFactors | None  # where the adapter has its factors, if with those of other weights
    device: str  # the CPU's where the GPU had no room
    iterations: int
    relative_error: float
    relative_error_without_adapter: float
    norm: float
    output_error: float | None  # see `OutputErrors`: on the calibration samples, and on samples held out
    output_error_without_adapter: float | None
    held_out_output_error: float | None
    held_out_output_error_without_adapter: float | None
    training: Fit | None  # of the weight, its loss but for a constant (`apiq.fit_layer`), or of its block as a whole
    unreached: bool | None  # by any text: a weight-only method stood in
    sha256: dict[str, str]  # of each stored tensor's bytes, so that `verify` can name what was changed
    seconds: float


@dataclass(frozen=True)
class WeightResult:
    """What one weight becomes: the tensors for its shard, those for the adapter, and its row."""

    base: dict[str, Tensor]
    adapter: dict[str, Tensor]
    row: WeightRow


@dataclass
class BatchResult:
    """The result of a batch on its way from the device; `wait` for it, then it can be looked at.

    `output_errors`, `training` and `unreached` are of its only weight, where a calibrated method looked at it.

    Shapes: weights [B, m, n]; factors as stored, [B, r, n] and [B, m, r]; measured float64 [B, 4]: iterations, squared
    norms of the weight and of the error without and with the adapter.
    """

    plan: Plan
    batch: WeightBatch
    weights: Tensor | None
    device: torch.device
    base: list[dict[str, Tensor]]
    factors: list[Tensor]
    measured: Tensor
    watch: Stopwatch
    output_errors: LayerErrors = (None, None)
    training: Fit | None = None
    unreached: bool = False
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
                raise _refusal(job, self.weights[i].float(), self.plan.format.name)
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
            iterations, norm, before, after = self.measured[i].tolist()
            lora_A, lora_B = (factor[i] for factor in self.factors)
            factors = peft_adapter.of_embedding(lora_A, lora_B) if job.embedding else (lora_A, lora_B)
            adapter = dict(zip(job.factor_names, factors, strict=True)) if job.rank else {}
            row = WeightRow(
                name=job.module,
                tensor=job.tensor,
                dtype=str(job.dtype).removeprefix("torch."),
                transposed=job.transposed or None,
                expert=None if job.expert is None else job.expert.expert,
                embedding=job.embedding or None,
                wrapped=job.wrapped or None,
                shape=job.shape,
                bits=job.bits,
                group_size=job.group_size,
                quantizer=job.quantizer,
                rank=job.rank,
                stacked=self.plan.stacked.get(job.tensor),
                device=self.device.type,
                iterations=int(iterations),
                relative_error=relative(after, norm),
                relative_error_without_adapter=relative(before, norm),
                norm=norm**0.5,
                **row_fields(self.output_errors),
                training=self.training,
                unreached=self.unreached or None,
                sha256={name: hash_tensor(tensor) for name, tensor in {**self.base[i], **adapter}.items()},
                seconds=round(seconds, 6),
            )
            yield WeightResult(self.base[i], adapter, row)


def quantize_batch(plan: Plan, batch: WeightBatch, weights: Tensor) -> BatchResult:
    """Run the plan's weight-only method on a batch, on the device of `weights`.

    It does not wait for a GPU, but where a quantizer is fitted to the weight, which takes its time for each of them.

    Args:
        plan: the decided options.
        batch: which weights they are.
        weights: [B, m, n], any float dtype.
    """
    watch = Stopwatch(weights.device)
    return store(plan, batch, weights, decompose(plan, batch, weights, None, watch), watch)


def decompose(
    plan: Plan, batch: WeightBatch, weights: Tensor, inputs: Inputs | None, watch: Stopwatch
) -> Decomposition:
    """Run the plan's method, or the one that its training starts from, on a batch.

    Args:
        plan: as `batch`, `weights`, see `quantize_batch`.
        batch: which weights they are.
        weights: [B, m, n].
        inputs: of all of them; None for a weight-only method, which stands in for a calibrated one where nothing was
            seen.
        watch: for the stages of the method.
    """
    config = plan.config
    name = config.init or config.method
    seeds = [seed_for(config.seed, job.tensor) for job in batch.jobs]
    with watch("quantize"):
        quantizer = fitted(plan.make_quantizer(batch.first), weights.flatten(0, 1))
    rank = batch.first.rank
    if rank == 0 and (inputs is None or name != "cloq"):  # whose rounding sees text, too
        return without_factors(weights, quantizer, timed=watch)
    if inputs is not None and name in GRAM_METHODS:
        target, method = inputs.target(weights), GRAM_METHODS[name]
        return method(target, quantizer, rank, inputs=inputs, iters=config.iters, seeds=seeds, timed=watch)
    # a GPU's kernels read the stored dtype, a CPU would convert it in every round
    W = weights if weights.is_cuda else weights.float()
    start = embedding_start if batch.first.embedding else zero_start
    weight_only = METHODS.get(name, METHODS["loftq"])
    return weight_only(W, quantizer, rank, iters=config.iters, seeds=seeds, start=start, timed=watch)


def store(plan: Plan, batch: WeightBatch, weights: Tensor, made: Decomposition, watch: Stopwatch) -> BatchResult:
    """Round `made` to what is stored, and measure the errors that it then has."""
    config = plan.config
    W = weights if weights.is_cuda else weights.float()
    with watch("quantize"):
        dtype = getattr(torch, config.adapter_dtype)
        factors = peft_adapter.stored_factors(made.factors.lora_A, made.factors.lora_B, plan.scaling, dtype)
        zero = peft_adapter.stored_factors(made.start.lora_A, made.start.lora_B, plan.scaling, dtype)

        rows = W.view(-1, W.shape[2])
        norm = squared_norm(W)
        residual = residual_of(rows, made.quantized).view(W.shape)
        before = squared_norm(residual)
        lora_A, lora_B = peft_adapter.applied_factors(*factors, plan.scaling)
        after = squared_norm(residual.baddbmm_(lora_B, lora_A, alpha=-1)) if batch.first.rank else before
        del residual
        # else there is nothing to repair, or the adapter's dtype cannot hold the factors; what repairs outputs may
        # well move a weight away from the source's
        repaired = after.isfinite() if plan.is_calibrated else after < before
        chosen = [torch.where(repaired[:, None, None], a, b) for a, b in zip(factors, zero, strict=True)]
        iterations = torch.where(repaired, made.iterations, 0).double()
        measured = torch.stack([iterations, norm, before, torch.where(repaired, after, before)], 1)
        weights_of = zip(batch.jobs, unstack(made.quantized, len(batch.jobs)), strict=True)
        base = [to_store(plan.format, job.place, quantized) for job, quantized in weights_of]
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
    """√(squared_error / squared_reference); of nothing, 0 where nothing is wrong and else 1; NaN where either is."""
    return (squared_error / squared_reference) ** 0.5 if squared_reference != 0 else float(squared_error != 0)


def row_dict(row: WeightRow) -> dict[str, object]:
    """The row as JSON holds it, without what was not measured."""
    return {key: value for key, value in {**asdict(row), "shape": list(row.shape)}.items() if value is not None}


def _refusal(job: WeightJob, W: Tensor, format_name: str) -> LoftqError:
    if bad := W.numel() - int(torch.isfinite(W).sum()):
        return LoftqError(
            f"`{job.tensor}` in `{job.file}` holds {bad} NaN or infinite values of {W.numel()}",
            f"repair the checkpoint, or leave this weight as it is with `--skip '{job.module}'`",
        )
    if job.quantizer == "nf" and format_name != "packed":
        return LoftqError(
            f"`{job.tensor}`: its weights, up to {W.abs().max():.3g}, are beyond the dtype it is loaded in"
        )
    return LoftqError(
        f"`{job.tensor}`: a scale of `{job.quantizer}` is beyond float16 (largest weight {W.abs().max():.3g})",
        f"use `--quantizer nf --format bnb` or `dense` (float32 scales), or leave it out with `--skip '{job.module}'`",
    )
