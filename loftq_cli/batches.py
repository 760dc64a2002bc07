"""One batch on its way through the machine: read ahead, computed, handed on; and what is done where it has no room."""

from __future__ import annotations

from contextlib import suppress

import torch

from loftq_cli.checkpoint.loader import Loader, Loading
from loftq_cli.checkpoint.source import Checkpoint
from loftq_cli.config import QuantizeConfig
from loftq_cli.device import is_out_of_memory
from loftq_cli.jobs import WeightBatch
from loftq_cli.lanes import Lanes
from loftq_cli.outputs import Outputs
from loftq_cli.plan import Plan, make_plan
from loftq_cli.targets import guess_targets
from loftq_cli.worker import quantize_batch


def load_batch(plan: Plan, batch: WeightBatch, loader: Loader, lanes: Lanes, outputs: Outputs) -> Loading:
    """Begin to read a batch; onto the CPU where the GPU has no room even when nothing else is on it."""
    infos = [plan.info(job) for job in batch.jobs]
    tensors = [(plan.checkpoint.path(info.file), info) for info in infos]
    with suppress(torch.OutOfMemoryError):
        return loader.load(tensors)
    lanes.wait()
    _make_room(outputs)
    with suppress(torch.OutOfMemoryError):
        return loader.load(tensors)
    return loader.load(tensors, torch.device("cpu"))


def compute_batch(
    plan: Plan, batch: WeightBatch, loading: Loading, outputs: Outputs, lanes: Lanes, device: torch.device
) -> None:
    """Compute a batch; its weights one by one and alone where the GPU's memory is too small, or on the CPU."""
    weights, seconds = loading.wait()
    if batch.first.transposed:
        weights = weights.mT.contiguous()
    if weights.device.type == device.type:
        try:
            with lanes.room.share(batch.parameters):
                result = quantize_batch(plan, batch, weights)
            outputs.put(result, seconds)
            return
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
    with lanes.room.share(lanes.room.whole):
        _make_room(outputs)
        for i, job in enumerate(batch.jobs):
            alone, weight = WeightBatch((job,)), weights[i : i + 1]
            try:
                result = quantize_batch(plan, alone, weight.to(device))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                _make_room(outputs)
                result = quantize_batch(plan, alone, weight.cpu())
            outputs.put(result, seconds / len(batch.jobs))


def _make_room(outputs: Outputs) -> None:
    outputs.drain()
    torch.cuda.empty_cache()


def rehearse(checkpoint: Checkpoint, config: QuantizeConfig) -> None:
    """Compute noise as the run will probably compute its first batch: what a GPU does for the first time is slow."""
    unknown = dict.fromkeys(("quantize_head", "quantize_embeddings", "experts_adapter"), False)  # to a guess
    plan = make_plan(checkpoint, config.model_copy(update=unknown), guess_targets(checkpoint))
    batch = next(step for shard in plan.shards for step in shard.steps if isinstance(step, WeightBatch))
    shape = (len(batch.jobs), *batch.first.shape)
    noise = torch.randn(shape, generator=torch.Generator(config.device), device=config.device)
    quantize_batch(plan, batch, noise.to(batch.first.stored_dtype)).wait()
    torch.cuda.empty_cache()  # it would stay with this thread's stream (nothing is done without a GPU)
