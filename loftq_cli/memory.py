"""How much memory a plan will take: estimates, by figures of scripts/bench.py on Linux."""

from __future__ import annotations

import math
from collections import Counter

import torch

from loftq_cli.calibration.text import samples_wanted
from loftq_cli.jobs import BLOCK, WeightBatch
from loftq_cli.plan import GPU_ELEMENTS, Plan
from loftq_cli.windows import LONGEST_WINDOW, positions

RUNTIME_BYTES, GPU_RUNTIME_BYTES = 380 << 20, 3 << 30  # Python with torch and transformers imported
RUNNING_BYTES = 400 << 20  # ... with the code of a model and its tokenizer, more
WORKING_COPIES = 12  # float32, of the largest batch, alive at once on a CPU
GPU_BYTES_PER_WEIGHT = 21  # computed at once
MOMENT_BYTES = 72  # for each element of the square of a layer's inputs
TRAINED_BYTES, FUSED_BYTES = 56, 44  # for each weight of a block that trains; where kernels round its codes
LIKELY_WIDTH = 8192  # of hidden states, where the configuration has an unknown name for it


def host_bytes(plan: Plan) -> int:
    """Peak of main memory: the runtime, and on a CPU what is computed with; activations apart."""
    if plan.on_gpu:
        return GPU_RUNTIME_BYTES
    loop = RUNTIME_BYTES + WORKING_COPIES * 4 * _batches(plan)[-1]
    if not plan.is_calibrated:
        return loop
    outside = sum(math.prod(info.shape) for info in plan.checkpoint.tensors.values()) - plan.parameters
    return loop + RUNNING_BYTES + 4 * outside + _fitting_bytes(plan, 8)


def device_bytes(plan: Plan) -> int:
    """Peak of a GPU's memory: what is computed at once, and what waits before and after; 0 on a CPU."""
    if not plan.on_gpu:
        return 0
    if plan.is_calibrated:
        return _fitting_bytes(plan, 2 * running_dtype(plan).itemsize)
    batches = _batches(plan)
    return GPU_BYTES_PER_WEIGHT * max(batches[-1], min(GPU_ELEMENTS, sum(batches[-2:])))


def running_dtype(plan: Plan) -> torch.dtype:
    """What blocks are run in: on a GPU the source's own dtype, as it will be used; a CPU is as fast in float32.

    A model that does not fit float16 as a whole, such as T5, runs in float32 everywhere.
    """
    dtype = plan.jobs[0].dtype if plan.on_gpu else torch.float32
    return torch.float32 if dtype == torch.float16 and plan.targets.keeps_float32 else dtype


def activation_bytes(plan: Plan, tokens: int | None = None) -> int:
    """What the activations of `tokens` take at most, or of those that the configuration asks for."""
    if not plan.is_calibrated:
        return 0
    config, text = plan.config, plan.checkpoint.config.get("text_config") or plan.checkpoint.config
    if tokens is None:
        seqlen = config.seqlen or min(LONGEST_WINDOW, positions(plan.checkpoint.config))
        tokens = seqlen * samples_wanted(config.samples)
    width = next((text[name] for name in ("hidden_size", "d_model", "n_embd") if name in text), LIKELY_WIDTH)
    trained = (config.method == "apiq-bw") * (1 + config.augmented)
    streams = 2 * len(plan.block_paths) + trained  # an encoder's outlive it
    return int(streams * tokens * width * running_dtype(plan).itemsize)


def _fitting_bytes(plan: Plan, twice: int) -> int:
    """Moments of the widest inputs, or what trains; beside the block twice, `twice` bytes a weight."""
    weights, trained = Counter[str](), Counter[str]()
    for job in plan.jobs:
        block = found[0] if (found := BLOCK.match(job.module)) else ""
        weights[block] += math.prod(job.shape)
        trained[block] += math.prod(job.shape) * (job.block is not None)  # experts are not
    widest = max((job.shape[1] for job in plan.jobs if job.block), default=0) * plan.needs_moments
    each = FUSED_BYTES if plan.on_gpu and plan.config.init != "qlora" else TRAINED_BYTES
    trains = each * max(trained.values()) * (plan.config.method == "apiq-bw")
    return max(MOMENT_BYTES * widest**2, trains) + twice * max(weights.values())


def _batches(plan: Plan) -> list[int]:
    """Weights in each batch, rising."""
    return sorted(step.parameters for s in plan.shards for step in s.steps if isinstance(step, WeightBatch))
