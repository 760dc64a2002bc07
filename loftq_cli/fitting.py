"""What a calibrated method makes of one transformer block: closed forms layer by layer, then training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from loftq_cli.calibration.observe import Pair, by_input, moments
from loftq_cli.calibration.stand_in import Stack
from loftq_cli.calibration.stream import BlockStream, Entering
from loftq_cli.checkpoint.reader import read_tensor
from loftq_cli.jobs import WeightBatch, WeightJob
from loftq_cli.methods import Decomposition, Inputs
from loftq_cli.methods.apiq import fit_block, fit_layer
from loftq_cli.methods.trained import TrainedWeight
from loftq_cli.methods.training import Fit, Training, alone
from loftq_cli.plan import Plan
from loftq_cli.quantizers.base import dequantize
from loftq_cli.stopwatch import Stopwatch
from loftq_cli.worker import decompose

STEP_TOKENS = 2048  # of a step of training: one window, as published


@dataclass(frozen=True)
class Share:
    """The samples of one process.

    Its first `seen` are calibrated on; no process has more than `most` of these, and some have others if `held_out`.
    `mean` replaces a tensor by its mean over the processes, `tell` returns what the first of them says.
    """

    seen: int
    most: int
    held_out: bool
    mean: Callable[[Tensor], None] = alone
    tell: Callable[[Any], Any] = lambda value: value

    def batches(self, samples: int, seqlen: int) -> tuple[list[slice], list[slice]]:
        """The samples of each step of training, as many steps in every process; and of those that judge it."""
        size = max(1, STEP_TOKENS // seqlen)
        parts = micro_batches(self.seen, samples, size)
        ours = [part for part in parts if part.start < self.seen]
        steps = [ours[i % len(ours)] for i in range(math.ceil(self.most / size))]
        return steps, [part for part in parts if part.start >= self.seen] if self.held_out else ours


@dataclass(frozen=True)
class Block:
    """A block on the device, twice, between the activations that enter the two.

    `source` has the source's weights; those of `quantized` are replaced one after the other.
    """

    stream: BlockStream
    stack: Stack
    number: int
    source: nn.Module
    quantized: nn.Module
    enters_source: Entering
    enters_quantized: Entering
    share: Share
    watch: Stopwatch  # of what the block's weights share

    @property
    def name(self) -> str:
        """Its module name."""
        return f"{self.stack.path}.{self.number}"

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(iter(self.quantized.parameters())).device

    def pairs(self, held_out: bool | None = None) -> Iterable[Pair]:
        """The micro-batches of both streams: all, or those held out, or the others."""
        parts = [part for part in self.stream.parts if held_out in (None, part.start >= self.share.seen)]
        both = (self.enters_source, self.enters_quantized)
        return zip(*(self.stream.runs(self.stack, self.number, entering, parts) for entering in both), strict=True)

    def inputs(self, layer: str, held_out: bool) -> Inputs:
        """Moments of what enters a layer."""
        with self.watch("text"):
            found = moments(self.source, self.quantized, layer, self.pairs(held_out), self.share.mean)
        return Inputs(found.gram, found.drift)

    def put(self, layer: str, weight: Tensor) -> None:
        """Give a layer of the quantized block its weight."""
        self.quantized.get_parameter(f"{layer}.weight").copy_(weight)


@dataclass(frozen=True)
class Fitted:
    """One weight [1, m, n], what became of it, how it was trained, if it was, and whether anything reaches it."""

    W: Tensor
    made: Decomposition
    watch: Stopwatch
    training: Fit | None = None
    reached: bool = True


def fit(plan: Plan, block: Block, jobs: Mapping[str, WeightJob]) -> dict[str, Fitted]:
    """Decompose the weights of `jobs`, by their names in the block, each for what really reaches it.

    Layers that nothing reaches, such as experts that no token chose, get a weight-only method.
    """
    config = plan.config
    groups = _groups(block, list(jobs))
    fitted: dict[str, Fitted] = {}
    for layers in groups:
        inputs = block.inputs(layers[0], held_out=False) if plan.needs_moments else None
        held_out = block.inputs(layers[0], held_out=True) if config.method == "apiq-lw" else None
        for layer in layers:
            W = read_weight(plan, jobs[layer], block.device)[None]
            watch = Stopwatch(W.device)
            made = decompose(plan, WeightBatch((jobs[layer],)), W, inputs, watch)
            training = None
            if inputs is not None and held_out is not None:
                weight = _trained(plan, W, made)
                judge = held_out if held_out.gram.any() else inputs  # a router may have sent nothing of them
                steps = len(block.share.batches(*block.stream.tokens.shape)[0])
                with torch.enable_grad(), block.watch("train"):
                    training = fit_layer(W[0].float(), weight, inputs, judge, steps, _how(plan))
                made = weight.decomposition()
            fitted[layer] = Fitted(W, made, watch, training)
            block.put(layer, dequantize(made.quantized) + made.factors.product()[0])
    if config.method == "apiq-bw":
        with block.watch("train"):
            _train_block(plan, block, fitted)
    for layer in [layer for layer in jobs if layer not in fitted]:
        W = read_weight(plan, jobs[layer], block.device)[None]
        watch = Stopwatch(W.device)
        made = decompose(plan, WeightBatch((jobs[layer],)), W, None, watch)
        fitted[layer] = Fitted(W, made, watch, reached=False)
    return fitted


def _groups(block: Block, layers: list[str]) -> list[list[str]]:
    """The layers that anything reaches in any process, in the order of their calls, those of one input together."""
    groups: list[list[str]] = []
    for run in block.stream.runs(block.stack, block.number, block.enters_quantized):
        known = {layer for group in groups for layer in group}
        if len(known) == len(layers):
            break
        # what a router left out before comes in groups of its own
        found = ([layer for layer in group if layer not in known] for group in by_input(block.quantized, layers, run))
        groups += [group for group in found if group]
    known = {layer for group in groups for layer in group}
    reached = torch.tensor([float(layer in known) for layer in layers], device=block.device)
    block.share.mean(reached)
    groups = block.share.tell(groups)
    known = {layer for group in groups for layer in group}
    elsewhere = [layer for layer, share in zip(layers, reached.tolist(), strict=True) if share and layer not in known]
    return [*groups, *([layer] for layer in elsewhere)]


def _train_block(plan: Plan, block: Block, fitted: dict[str, Fitted]) -> None:
    """Train the weights of a block together, and put what they become into `fitted`."""
    stream, stack, number = block.stream, block.stack, block.number
    weights = {layer: _trained(plan, of.W, of.made) for layer, of in fitted.items()}
    wanted = [stream.outputs(stack, number, block.source, block.enters_source)]
    if plan.config.augmented:
        wanted.append(stream.outputs(stack, number, block.source, block.enters_quantized))
    dtype = next(iter(block.quantized.parameters())).dtype

    def outputs(rows: slice) -> tuple[Tensor, list[Tensor]]:
        values = {f"{layer}.weight": weight().to(dtype) for layer, weight in weights.items()}

        def call(*args: Any, **kwargs: Any) -> Any:
            return functional_call(block.quantized, values, args, kwargs)

        ours = stream.run(stack, number, block.enters_quantized, rows)(call)
        return ours, [made[rows].to(ours.device, non_blocking=True) for made in wanted]

    batches, held_out = block.share.batches(*stream.tokens.shape)
    with torch.enable_grad():
        training = fit_block(list(weights.values()), batches, outputs, held_out, _how(plan), block.share.mean)
    for layer, weight in weights.items():
        fitted[layer] = Fitted(fitted[layer].W, weight.decomposition(), fitted[layer].watch, training)


def micro_batches(seen: int, total: int, size: int) -> list[slice]:
    """Parts of at most `size` samples; none holds both samples for calibration and samples held out."""
    starts = [*range(0, seen, size), *range(seen, total, size)]
    return [slice(start, min(start + size, seen if start < seen else total)) for start in starts]


def _trained(plan: Plan, W: Tensor, made: Decomposition) -> TrainedWeight:
    clip = plan.config.init == "qlora"
    # for a layer alone, error feedback has found better codes than steps along a gradient do
    codes = plan.config.method == "apiq-bw" and plan.config.code_lr > 0 and not clip
    return TrainedWeight(W[0], made, plan.scaling, clip=clip, codes=codes)


def _how(plan: Plan) -> Training:
    config = plan.config
    assert config.epochs is not None, "a plan has decided it"
    # decay is ApiQ's; where training starts from a good place, what pulls to zero pulls away from it
    decay = 0.1 if config.init == "qlora" else 0.0
    return Training(config.epochs, config.factor_lr, config.clip_lr, config.code_lr, decay, config.seed)


def read_weight(plan: Plan, job: WeightJob, device: torch.device) -> Tensor:
    """The source's weight [m, n] on the device, in the dtype that is stored."""
    info = plan.info(job)
    stored = read_tensor(plan.checkpoint.path(info.file), info).to(device)
    return stored.T.contiguous() if job.transposed else stored
