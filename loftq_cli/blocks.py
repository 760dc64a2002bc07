"""The block loop: calibrated methods, one transformer block at a time, on two streams of activations.

The first stream is the source model's. The second is that of the model as it will be loaded, quantized and with its
adapter: what a layer is fitted to is what really reaches it, so that later layers see, and may make up for, what
earlier ones lost.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loftq_cli.calibration.stream import Activations, BlockStream, Run, reached, until_reached
from loftq_cli.calibration.text import Calibration, read_texts, token_batches
from loftq_cli.checkpoint.reader import read_tensor
from loftq_cli.errors import LoftqError
from loftq_cli.formats import peft_adapter
from loftq_cli.jobs import WeightBatch, WeightJob
from loftq_cli.meta_model import build_to_run
from loftq_cli.outputs import Outputs
from loftq_cli.plan import Plan
from loftq_cli.resume import Stored, read_back
from loftq_cli.targets import state_keys
from loftq_cli.worker import quantize_batch, relative

LONGEST_WINDOW = 2048  # tokens, unless more are asked for
MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}  # that run through a block at once


@dataclass(frozen=True)
class BlockRow:
    """What the report says of one block: ‖F(X) − F̂(X̂)‖_F / ‖F(X)‖_F of its output, X̂ being what really enters it."""

    name: str
    output_error: float
    held_out_output_error: float


def run_blocks(
    plan: Plan, batches: Iterable[WeightBatch], calibration: Calibration, outputs: Outputs, device: torch.device
) -> Iterator[BlockRow]:
    """Quantize the weights of `batches`, block by block; the plan's other weights in blocks are on disk already.

    Yields:
        A row for every block, once its weights are handed to `outputs`.

    Raises:
        LoftqError: the model cannot be run block by block.
    """
    model = build_to_run(plan.checkpoint, plan.config.trust_remote_code)
    names, _ = state_keys(plan.checkpoint, model)
    tokens = torch.cat([calibration.tokens, calibration.held_out])
    parts = _parts(len(calibration.tokens), len(tokens), max(1, MICRO_BATCH_TOKENS[device.type] // tokens.shape[1]))
    # on a GPU in the source's own dtype, as it will be used; a CPU is as fast in float32
    dtype = torch.float32 if device.type == "cpu" else plan.jobs[0].dtype
    stream = BlockStream(model, plan.checkpoint, names, plan.block_paths, tokens, parts, device, dtype)
    missing = {batch.first.tensor: batch for batch in batches}
    source_ends: dict[str, Tensor] = {}
    quantized_ends: dict[str, Tensor] = {}
    for stack in stream.stacks:
        source, quantized = stream.begin(stack, source_ends), stream.begin(stack, quantized_ends)
        for number in range(len(stack.blocks)):
            name = f"{stack.path}.{number}"
            jobs = {job.module.removeprefix(f"{name}."): job for job in plan.jobs if job.block == name}
            with stream.loaded(stack, number) as block, torch.no_grad():
                whole = stream.outputs(stack, number, block, source)
                for layers in _by_input(block, list(jobs), next(stream.runs(stack, number, quantized))):
                    grams = _grams(block, layers[0], stream.runs(stack, number, quantized), len(calibration.tokens))
                    for layer in layers:
                        job = jobs.pop(layer)
                        batch = missing.get(job.tensor)
                        _replace(plan, block, layer, job, _quantized(plan, job, batch, grams, outputs, device))
                for layer, job in jobs.items():  # nothing has reached them, as an expert that no token chose
                    batch = missing.get(job.tensor)
                    _replace(plan, block, layer, job, _quantized(plan, job, batch, (), outputs, device))
                ours = stream.outputs(stack, number, block, quantized)
            held = len(calibration.tokens)
            yield BlockRow(name, _error(whole[:held], ours[:held]), _error(whole[held:], ours[held:]))
            source, quantized = Activations(whole, source_ends), Activations(ours, quantized_ends)
        source_ends[stack.path], quantized_ends[stack.path] = source.hidden, quantized.hidden


def prepare(plan: Plan, ranks: int) -> Calibration:
    """The token windows that the plan's configuration asks for, by the model's own tokenizer.

    Raises:
        LoftqError: there is no tokenizer, or too little text; or several processes.
    """
    config, checkpoint = plan.config, plan.checkpoint
    if ranks > 1:
        raise LoftqError(f"`--method {config.method}` runs in one process", "start it without torchrun")
    if not plan.block_paths:
        raise LoftqError(
            f"`--method {config.method}` found no transformer blocks in `{checkpoint.model}`",
            "use a weight-only method, `--method loftq`",
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            checkpoint.model, revision=checkpoint.revision, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:  # of many kinds, as many as there are tokenizers
        raise LoftqError(
            f"`--method {config.method}` needs the tokenizer of `{checkpoint.model}`, which does not load: "
            f"{type(error).__name__}: {str(error).splitlines()[0]}",
            "put its files beside the weights, or use `--method loftq`",
        ) from error
    text = checkpoint.config.get("text_config") or checkpoint.config
    longest = min(LONGEST_WINDOW, text.get("max_position_embeddings") or text.get("n_positions") or LONGEST_WINDOW)
    return token_batches(
        read_texts(config.calibration), tokenizer, config.samples, config.seqlen or longest, config.seed
    )


def describe(calibration: Calibration) -> dict[str, Any]:
    """What the report says of the token windows."""
    sha256 = hashlib.sha256(torch.cat([calibration.tokens, calibration.held_out]).numpy().tobytes()).hexdigest()
    samples, seqlen = calibration.tokens.shape
    note = {} if calibration.note is None else {"note": calibration.note}
    return {"samples": samples, "held_out": len(calibration.held_out), "seqlen": seqlen, "sha256": sha256, **note}


def _parts(seen: int, total: int, size: int) -> list[slice]:
    """Micro-batches of samples; none holds both samples for calibration and samples held out."""
    starts = [*range(0, seen, size), *range(seen, total, size)]
    return [slice(start, min(start + size, seen if start < seen else total)) for start in starts]


def _by_input(block: nn.Module, layers: Sequence[str], run: Run) -> list[list[str]]:
    """The linear layers in the order in which they are called, those that share an input together."""
    groups: dict[tuple[int, int, torch.Size], list[str]] = {}
    kept: list[Tensor] = []  # alive, or another input might come to lie where one was

    def note(layer: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            kept.append(args[0])
            group = groups.setdefault((args[0].data_ptr(), args[0]._version, args[0].shape), [])
            if not any(layer in others for others in groups.values()):
                group.append(layer)

        return hook

    hooks = [block.get_submodule(layer).register_forward_pre_hook(note(layer)) for layer in layers]
    run(block)
    for hook in hooks:
        hook.remove()
    return [group for group in groups.values() if group]


def _grams(block: nn.Module, layer: str, runs: Iterator[Run], seen: int) -> tuple[Tensor, Tensor]:
    """The Gram matrices [n, n] per token of a layer's inputs, over calibration and over held-out samples."""
    weight = block.get_parameter(f"{layer}.weight")
    grams = [torch.zeros(weight.shape[1], weight.shape[1], device=weight.device) for _ in range(2)]
    counts = [0, 0]
    which = 0

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].flatten(0, -2).float()
        grams[which].addmm_(x.T, x)
        counts[which] += len(x)
        reached()

    handle = block.get_submodule(layer).register_forward_pre_hook(hook)
    for run in runs:
        which = int(run.rows.start >= seen)
        with until_reached():
            run(block)
    handle.remove()
    return grams[0] / max(1, counts[0]), grams[1] / max(1, counts[1])


def _quantized(
    plan: Plan, job: WeightJob, batch: WeightBatch | None, grams: Sequence[Tensor], outputs: Outputs,
    device: torch.device,
) -> Stored:  # fmt: skip
    """What `job` becomes: computed and handed to `outputs`, or read back where an earlier session wrote it."""
    if batch is None:
        return read_back(plan, outputs.out, job)
    info = plan.checkpoint.tensors[job.tensor]
    weight = read_tensor(plan.checkpoint.path(info.file), info).to(device)[None]
    result = quantize_batch(plan, batch, weight, grams)
    outputs.put(result, 0.0)
    result.ready()
    lora_A, lora_B = result.factors
    return result.base[0], (lora_A[0], lora_B[0])


def _replace(plan: Plan, block: nn.Module, layer: str, job: WeightJob, stored: Stored) -> None:
    """Put the weight that the loaded model will have in the layer's place."""
    parameter = block.get_parameter(f"{layer}.weight")
    base = {name: tensor.to(parameter.device) for name, tensor in stored[0].items()}
    lora_A, lora_B = (factor.to(parameter.device) for factor in stored[1])
    scaling = peft_adapter.scaling(plan.config.rank, plan.config.alpha or plan.config.rank, plan.config.rslora)
    lora_A, lora_B = peft_adapter.applied_factors(lora_A, lora_B, scaling)
    values = plan.format.read(job.stored_prefix, base, plan.empty(job))
    parameter.copy_(torch.addmm(values, lora_B, lora_A))


def _error(expected: Tensor, actual: Tensor) -> float:
    """‖expected − actual‖_F / ‖expected‖_F, sample by sample in float64; 0 of nothing."""
    error = sum((a.double() - b.double()).square().sum().item() for a, b in zip(expected, actual, strict=True))
    return relative(error, sum(a.double().square().sum().item() for a in expected))
