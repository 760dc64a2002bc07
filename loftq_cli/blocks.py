"""The block loop: calibrated methods, one transformer block at a time, on two streams of activations.

The first stream is the source model's. The second is that of the model as it will be loaded, quantized and with its
adapter: what a layer is fitted to is what really reaches it, so that later layers see, and may make up for, what
earlier ones lost.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loftq_cli.calibration.activations import Activations, available_bytes
from loftq_cli.calibration.observe import LayerErrors, compare, row_fields
from loftq_cli.calibration.stream import BlockStream
from loftq_cli.calibration.text import Calibration
from loftq_cli.checkpoint.reader import lookup, read_tensor
from loftq_cli.errors import LoftqError
from loftq_cli.experts import by_parameter, stacked
from loftq_cli.finishing import Factors, finish, finished, keep
from loftq_cli.fitting import STEP_TOKENS, Block, Share, fit, micro_batches, read_weight
from loftq_cli.formats import peft_adapter
from loftq_cli.formats.base import from_store
from loftq_cli.jobs import WeightBatch, WeightJob
from loftq_cli.journal import WORK_FOLDER
from loftq_cli.memory import activation_bytes, running_dtype
from loftq_cli.meta_model import build_to_run, state_keys
from loftq_cli.methods import squared_norm
from loftq_cli.methods.training import Fit, alone
from loftq_cli.outputs import Outputs
from loftq_cli.plan import Plan
from loftq_cli.ranks import Ranks, processes_here
from loftq_cli.resume import Headers, Stored, read_back, read_whenever
from loftq_cli.stopwatch import Stopwatch
from loftq_cli.worker import BatchResult, relative, store

MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}  # that run through a block at once


@dataclass(frozen=True)
class BlockRow:
    """What the report says of one block: ‖F(X) − F̂(X̂)‖_F / ‖F(X)‖_F of its output, X̂ being what really enters it.

    Without adapter: without those of this block. Of samples held out None where there are none.
    """

    name: str
    output_error: float | None
    output_error_without_adapter: float | None
    held_out_output_error: float | None
    held_out_output_error_without_adapter: float | None


@dataclass(frozen=True)
class Measured:
    """What the block loop measured: a row for every block, and how the finish went."""

    blocks: list[BlockRow]
    finish: Fit | None


def run_blocks(
    plan: Plan,
    batches: Iterable[WeightBatch],
    calibration: Calibration,
    outputs: Outputs,
    device: torch.device,
    ranks: Ranks,
    tell: Callable[[str, int], None],
) -> Measured:
    """Quantize the weights of `batches`, block by block; the plan's other weights in blocks are on disk already.

    Args:
        plan: what was decided.
        batches: of one weight each.
        calibration: the samples.
        outputs: what writes.
        device: what computes.
        ranks: each has a share of the samples, and all compute the same from what they have seen together; rank 0
            writes.
        tell: called with what is about to be done, the name of a block or an epoch of the finish; and with the bytes
            of weights that were passed once more since the last call.

    Raises:
        LoftqError: the model cannot be run block by block.
    """
    model = build_to_run(plan.checkpoint, plan.config.trust_remote_code)
    names, _ = state_keys(plan.checkpoint, model)
    ours, held_out = (samples[ranks.rank :: ranks.size] for samples in (calibration.tokens, calibration.held_out))
    tokens, seen = torch.cat([ours, held_out]), len(ours)
    most, any_held_out = math.ceil(len(calibration.tokens) / ranks.size), len(calibration.held_out) > 0
    share = Share(seen, most, any_held_out, ranks.mean if ranks.size > 1 else alone, ranks.tell)
    step = max(1, STEP_TOKENS // tokens.shape[1])  # samples; a micro-batch holds whole steps of training
    size = step * max(1, MICRO_BATCH_TOKENS[device.type] // (step * tokens.shape[1]))
    parts = micro_batches(seen, len(tokens), size)
    dtype = running_dtype(plan)
    folder = _folder_for_activations(plan, tokens.numel(), outputs.out)
    experts = by_parameter(plan.targets.experts)
    read_source = partial(_source_expert, plan)
    made = {key: partial(stacked, slots, read_source) for key, slots in experts.items()}
    stream = BlockStream(
        model, plan.checkpoint, names, plan.targets.transposed, made, plan.block_paths, tokens, parts, device, dtype,
        folder,
    )  # fmt: skip
    known: Headers = {}
    jobs_of_experts = {job.tensor: job for job in plan.jobs if job.expert is not None}

    def read_quantized(tensor: str) -> Tensor:
        job = jobs_of_experts.get(tensor)  # else it was left out
        return read_source(tensor) if job is None else _quantized_expert(plan, outputs.out, job, known)

    missing = {batch.first.tensor for batch in batches}
    put = outputs.put if ranks.rank == 0 else _leave_it
    rewrite = outputs.rewrite if ranks.rank == 0 else _leave_it

    def through(
        visit: Callable[[Block], BlockRow], again: bool = False
    ) -> tuple[list[BlockRow], dict[str, Activations]]:
        """Visit every block between its two streams; return their rows and the ends of the source's stacks."""
        rows, passed = [], 0
        source_ends: dict[str, Activations] = {}
        quantized_ends: dict[str, Activations] = {}
        for stack in stream.stacks:
            source, quantized = stream.begin(stack, source_ends), stream.begin(stack, quantized_ends)
            for number in range(len(stack.blocks)):
                tell(f"{stack.path}.{number}", passed)
                with stream.loaded(stack, number) as module, torch.no_grad():
                    watch = Stopwatch(torch.device("cpu"))  # each of its stages ends by waiting for the device
                    source_module = copy.deepcopy(module)
                    for key in (key for key in experts if key.startswith(f"{stack.path}.{number}.")):
                        parameter = module.get_parameter(key.removeprefix(f"{stack.path}.{number}."))
                        parameter.copy_(stacked(experts[key], read_quantized))
                    block = Block(stream, stack, number, source_module, module, source, quantized, share, watch)
                    rows.append(visit(block))
                outputs.spent(watch.seconds())
                jobs = _jobs(plan, block).values() if again else ()
                passed = sum(plan.info(job).nbytes for job in jobs)
            source_ends[stack.path], quantized_ends[stack.path] = source.hidden, quantized.hidden
        return rows, source_ends

    outputs.drain()  # no shard is renamed while weights of earlier sessions, or those of experts, are read back
    ranks.wait()
    trained = finished(outputs.out)
    if trained is not None and missing:
        raise LoftqError(f"files of `{outputs.out}` were lost after its finish", "begin again with `--overwrite`")
    if trained is None:
        rows, ends = through(lambda block: _quantize(plan, block, missing, outputs.out, put))
        if plan.config.finish_epochs == 0:
            return Measured(rows, None)
        ends_of_source, ends = ends, {}
        outputs.drain()
        outputs.commit()
        ranks.wait()  # what rank 0 has written is there for all
        watch = Stopwatch(torch.device("cpu"))
        with watch("train"):
            trained = finish(plan, stream, outputs.out, ends_of_source, share, tell)
        outputs.spent(watch.seconds())
        if ranks.rank == 0:
            keep(outputs.out, *trained)
        del ends_of_source  # as large as a stream
    factors, fit = trained
    rows, _ = through(lambda block: _rewrite(plan, block, factors, outputs.out, rewrite), again=True)
    return Measured(rows, fit)


def _folder_for_activations(plan: Plan, tokens: int, out: Path) -> Path | None:
    """Where activations go if they would take more memory than they may; None where they need not."""
    budget = plan.config.activation_budget
    may = available_bytes() // (2 * processes_here()) if budget is None else int(budget * 2**30)
    return out / WORK_FOLDER if activation_bytes(plan, tokens) > may else None


def _source_expert(plan: Plan, tensor: str) -> Tensor:
    """The source's matrix [m, n] of an expert."""
    info = lookup(plan.checkpoint.tensors, tensor)
    assert info is not None
    stored = read_tensor(plan.checkpoint.path(info.file), info)
    return stored.T if tensor in plan.targets.transposed else stored


def _quantized_expert(plan: Plan, out: Path, job: WeightJob, known: Headers) -> Tensor:
    """The matrix [m, n] of an expert as the loaded model will have it, from what is written."""
    names = [spec.name for spec in plan.stored(job)]
    stored = dict(zip(names, read_whenever(out, job.file, names, known), strict=True))
    return from_store(plan.format, job.place, stored, plan.empty(job))


def _leave_it(*arguments: Any) -> None:
    """What a rank other than 0 does with what it has computed."""


def _quantize(
    plan: Plan, block: Block, missing: set[str], out: Path, put: Callable[[BatchResult, float], None]
) -> BlockRow:
    """Fit a block and hand over its weights; those that are on disk are read back."""
    jobs = _jobs(plan, block)
    results: dict[str, BatchResult] = {}
    if any(job.tensor in missing for job in jobs.values()):
        # as a whole: what an earlier session has written of a part of it is forgotten
        for layer, of in fit(plan, block, jobs).items():
            result = store(plan, WeightBatch((jobs[layer],)), of.W, of.made, of.watch)
            results[layer] = replace(result, training=of.training, unreached=not of.reached)
    stored = {
        layer: _stored(results[layer]) if layer in results else read_back(plan, out, job) for layer, job in jobs.items()
    }
    row, errors = _measure(plan, block, jobs, stored)
    for layer, result in results.items():
        put(replace(result, output_errors=errors[layer]), 0.0)
    return row


def _rewrite(plan: Plan, block: Block, factors: Factors, out: Path, rewrite: Callable[..., None]) -> BlockRow:
    """Replace the factors of a block on disk by those of the finish, and measure it anew."""
    jobs = _jobs(plan, block)
    stored = {layer: (read_back(plan, out, job)[0], factors[job.module]) for layer, job in jobs.items()}
    row, errors = _measure(plan, block, jobs, stored)
    for layer, job in jobs.items():
        W = read_weight(plan, job, block.device).float()
        _, weight = _loaded(plan, job, stored[layer], block.device)
        size, error = squared_norm(torch.stack([W, W - weight])).tolist()
        measured = {"relative_error": relative(error, size), **row_fields(errors[layer])}
        rewrite(job, stored[layer][1], measured)
    return row


def _jobs(plan: Plan, block: Block) -> dict[str, WeightJob]:
    """The block's weights by their names in it."""
    return {job.module.removeprefix(f"{block.name}."): job for job in plan.jobs if job.block == block.name}


def _measure(
    plan: Plan, block: Block, jobs: Mapping[str, WeightJob], stored: Mapping[str, Stored]
) -> tuple[BlockRow, dict[str, LayerErrors]]:
    """Give the quantized block the weights that the loaded model will have, and run all samples through both blocks.

    The activations that enter become those that leave.
    """
    bases: dict[str, Tensor] = {}
    for layer, job in jobs.items():
        bases[layer], weight = _loaded(plan, job, stored[layer], block.device)
        block.put(layer, weight)
    sums, share = torch.zeros(2, 3, dtype=torch.float64, device=block.device), block.share

    def hand_on(rows: slice, whole: Tensor, ours: Tensor, alone: Tensor) -> None:
        differences = (whole, whole - ours, whole - alone)
        squares = [difference.float().square().sum(dtype=torch.float64) for difference in differences]
        sums[int(rows.start >= share.seen)] += torch.stack(squares)
        for entered, left in ((block.enters_source, whole), (block.enters_quantized, ours)):
            entered.hidden[rows].copy_(left, non_blocking=True)  # nobody needs any more what was there

    with block.watch("text"):
        errors = compare(block.source, block.quantized, bases, block.pairs(), share.seen, hand_on, share.mean)
    share.mean(sums)
    if not sums.isfinite().all():
        whose = "quantized" if sums[:, 0].isfinite().all() else "source's"
        raise LoftqError(
            f"what leaves the {whose} block `{block.name}` is not finite",
            "try other text with `--calibration`, or use a weight-only method, `--method loftq`",
        )
    seen, held_out = (
        (relative(error, size), relative(alone, size)) if size else (None, None) for size, error, alone in sums.tolist()
    )
    return BlockRow(block.name, *seen, *held_out), errors


def _stored(result: BatchResult) -> Stored:
    """What a single weight became, once the device is done with it."""
    result.ready()
    lora_A, lora_B = result.factors
    return result.base[0], (lora_A[0], lora_B[0])


def _loaded(plan: Plan, job: WeightJob, stored: Stored, device: torch.device) -> tuple[Tensor, Tensor]:
    """The weight that the loaded model will have, without and with its adapter: float32 [m, n]."""
    base = {name: tensor.to(device) for name, tensor in stored[0].items()}
    lora_A, lora_B = (factor.to(device) for factor in stored[1])
    lora_A, lora_B = peft_adapter.applied_factors(lora_A, lora_B, plan.scaling)
    values = from_store(plan.format, job.place, base, plan.empty(job))
    return values, torch.addmm(values, lora_B, lora_A)
