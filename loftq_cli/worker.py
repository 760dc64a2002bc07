"""One weight on one device: quantize, factorise, round to what is stored, measure."""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from loftq_cli.errors import LoftqError
from loftq_cli.formats import peft_adapter
from loftq_cli.jobs import WeightJob
from loftq_cli.methods import METHODS, seed_for, squared_norm
from loftq_cli.methods.qlora import zero_start
from loftq_cli.plan import Plan
from loftq_cli.quantizers.base import QuantizedWeight, Quantizer, dequantize


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
    iterations: int
    relative_error: float
    relative_error_without_adapter: float
    norm: float
    sha256: dict[str, str]  # of each stored tensor's bytes, so that `verify` can name what was changed
    seconds: float


@dataclass(frozen=True)
class WeightResult:
    """What one weight becomes: the tensors for its shard, those for the adapter, and its row."""

    base: dict[str, Tensor]
    adapter: dict[str, Tensor]
    row: WeightRow
    seconds: dict[str, float]


@dataclass
class Stopwatch:
    """Seconds by stage on one device, in the device's own time (CUDA work is asynchronous)."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    def now(self) -> float:
        """Seconds, after the device has finished what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def add(self, stage: str, since: float) -> float:
        """Add the time from `since` until now to `stage`; return now."""
        now = self.now()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - since
        return now


class _Timed:
    """A quantizer whose `quantize` is timed, so that the rest of a method's time is the low-rank step's."""

    def __init__(self, quantizer: Quantizer, watch: Stopwatch) -> None:
        self.bits, self.group_size, self.dtype = quantizer.bits, quantizer.group_size, quantizer.dtype
        self.empty = quantizer.empty
        self._quantizer, self._watch = quantizer, watch

    def quantize(self, W: Tensor) -> QuantizedWeight:
        start = self._watch.now()
        quantized = self._quantizer.quantize(W)
        self._watch.add("quantize", start)
        return quantized


def quantize_weight(plan: Plan, job: WeightJob, weight: Tensor, device: torch.device) -> WeightResult:
    """Run the plan's method on one weight.

    Args:
        plan: the decided options.
        job: which weight it is.
        weight: [m, n], any float dtype, on the CPU.
        device: where to compute.

    Raises:
        LoftqError: NaN or infinite values, or scales beyond float16; names the tensor.
    """
    watch = Stopwatch(device)
    start = watch.now()
    W = weight.to(device).float()
    _refuse_non_finite(job, W)
    quantizer = _Timed(plan.make_quantizer(job), watch)
    seed = seed_for(plan.config.seed, job.tensor)
    method = METHODS[plan.config.method]
    result = method(W, quantizer, plan.config.rank, iters=plan.config.iters, seed=seed)
    watch.seconds["low_rank"] = watch.now() - start - watch.seconds["quantize"]

    residual = W - dequantize(result.quantized)
    norm2, before2 = squared_norm(W), squared_norm(residual)
    if not torch.isfinite(before2):
        dtype_of_values = str(result.quantized.dtype).removeprefix("torch.")
        if job.quantizer == "nf":
            raise LoftqError(f"`{job.tensor}`: its weights, up to {W.abs().max():.3g}, are beyond {dtype_of_values}")
        raise LoftqError(
            f"`{job.tensor}`: a scale of `{job.quantizer}` is beyond float16 (largest weight {W.abs().max():.3g})",
            f"use `--quantizer nf` (float32 scales), or leave it out with `--skip '{job.module}'`",
        )
    scaling = peft_adapter.scaling(plan.config.rank, plan.alpha, plan.config.rslora)
    dtype = getattr(torch, plan.config.adapter_dtype)

    def stored(factors_A: Tensor, factors_B: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The adapter's tensors, and the squared error with them as PEFT will apply them."""
        tensors = peft_adapter.adapter_tensors(job.module, factors_A, factors_B, scaling, dtype)
        lora_A, lora_B = peft_adapter.effective(tensors, scaling)
        return tensors, squared_norm(residual - lora_B @ lora_A)

    iterations = result.iterations
    adapter, after2 = stored(result.factors.lora_A, result.factors.lora_B)
    if not after2 < before2:  # nothing to repair, or the adapter's dtype cannot hold the factors
        zero = zero_start(W, plan.config.rank, seed)
        adapter, after2 = stored(zero.lora_A, zero.lora_B)
        iterations = 0
    base = {name: tensor.cpu() for name, tensor in plan.format.tensors(job.stored_prefix, result.quantized).items()}
    adapter = {name: tensor.cpu() for name, tensor in adapter.items()}
    row = WeightRow(
        name=job.module,
        tensor=job.tensor,
        dtype=str(job.dtype).removeprefix("torch."),
        shape=job.shape,
        bits=job.bits,
        group_size=job.group_size,
        quantizer=job.quantizer,
        rank=plan.config.rank,
        iterations=iterations,
        relative_error=relative(after2, norm2),
        relative_error_without_adapter=relative(before2, norm2),
        norm=float(norm2.sqrt()),
        sha256={name: hash_tensor(tensor) for name, tensor in {**base, **adapter}.items()},
        seconds=round(watch.now() - start, 6),
    )
    return WeightResult(base, adapter, row, watch.seconds)


def hash_tensor(tensor: Tensor) -> str:
    """sha256 of the bytes of a CPU tensor, as they are stored."""
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()


def relative(squared_error: Tensor, squared_reference: Tensor) -> float:
    """√(squared_error / squared_reference); 0 where both are 0."""
    return float((squared_error / squared_reference).sqrt()) if squared_error > 0 else 0.0


def row_dict(row: WeightRow) -> dict[str, object]:
    """The row as JSON holds it."""
    return {**asdict(row), "shape": list(row.shape)}


def _refuse_non_finite(job: WeightJob, W: Tensor) -> None:
    bad = W.numel() - int(torch.isfinite(W).sum())
    if bad:
        raise LoftqError(
            f"`{job.tensor}` in `{job.file}` holds {bad} NaN or infinite values of {W.numel()}",
            f"repair the checkpoint, or leave this weight as it is with `--skip '{job.module}'`",
        )
