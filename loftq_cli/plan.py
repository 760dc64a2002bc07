"""Headers + configuration → a frozen `Plan`: every decision and every refusal, before any weight is read."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from loftq_cli.adapters import EXPERT_FACTORS, about_experts, adapter_layout, factor_specs, for_format, stacked_factors
from loftq_cli.checkpoint.reader import TensorInfo, lookup, whole_name
from loftq_cli.checkpoint.source import Checkpoint
from loftq_cli.checkpoint.writer import TensorSpec, file_bytes, joined
from loftq_cli.choice import choose_format, other_formats
from loftq_cli.config import CALIBRATED, QuantizeConfig
from loftq_cli.embeddings import with_embeddings
from loftq_cli.errors import LoftqError
from loftq_cli.formats import FORMATS, make_quantizer, peft_adapter
from loftq_cli.formats.base import Format, Place, RemoteCode, stored_name, to_store
from loftq_cli.formats.peft_adapter import StackedFactors
from loftq_cli.heads import head_layout, with_output_head
from loftq_cli.jobs import (
    WeightBatch,
    WeightJob,
    choose_linears,
    make_batches,
    make_jobs,
    reasons,
)
from loftq_cli.misfits import ragged_groups, refuse_misfits
from loftq_cli.quantizers.base import QuantizedWeight, Quantizer, stackable
from loftq_cli.targets import Targets

GPU_ELEMENTS = 200_000_000  # weights that are computed at once on a GPU, at most; a larger one is computed alone
ADAPTER_FILE = "loftq_init/adapter_model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FINGERPRINT_KEY = "loftq_base_sha256"
BATCH_ELEMENTS = {"cuda": 100_000_000, "cpu": 2_000_000}  # of small weights computed together, for fewer operations

Step = WeightBatch | TensorInfo  # a TensorInfo is copied verbatim


@dataclass(frozen=True)
class ShardPlan:
    """One output shard, named as its input shard: its steps, and the tensors it will hold in the order of the bytes."""

    file: str
    steps: tuple[Step, ...]
    layout: tuple[TensorSpec, ...]
    metadata: dict[str, str]


@dataclass(frozen=True)
class Plan:
    """All that will be done.

    `config` has every default decided; `notes` are sentences for the user; `skipped` are those of `targets` and more.
    """

    checkpoint: Checkpoint
    config: QuantizeConfig
    format: Format
    jobs: tuple[WeightJob, ...]
    shards: tuple[ShardPlan, ...]
    stacked: dict[str, StackedFactors]  # of experts with an adapter, by tensor
    adapter_layout: tuple[TensorSpec, ...]
    skipped: dict[str, str]
    skipped_linears: tuple[str, ...]
    targets: Targets
    notes: tuple[str, ...]
    _stored: dict[object, dict[str, torch.Tensor]] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def remote_code(self) -> RemoteCode | None:
        """The code that loads the checkpoint where nothing is installed that does, of a format that has one."""
        return getattr(self.format, "remote_code", lambda _: None)(self)

    @cached_property
    def factor_files(self) -> dict[str, tuple[TensorSpec, ...]]:
        """The files that factors are written to as they come: the adapter's, and that of experts to be put together."""
        dtype = getattr(torch, self.config.adapter_dtype)
        parts = tuple(spec for job in self.jobs if job.tensor in self.stacked for spec in factor_specs(job, dtype))
        return {ADAPTER_FILE: self.adapter_layout} | ({EXPERT_FACTORS: parts} if parts else {})

    def factor_file(self, job: WeightJob) -> str:
        """Which of them has those of `job`."""
        return EXPERT_FACTORS if job.tensor in self.stacked else ADAPTER_FILE

    @property
    def block_paths(self) -> tuple[str, ...]:
        """Distinct paths of the module lists that hold jobs, e.g. `("model.layers",)`."""
        return tuple(dict.fromkeys(job.block.rpartition(".")[0] for job in self.jobs if job.block))

    @property
    def weight_bytes(self) -> int:
        """Source bytes of the weights to quantize."""
        return sum(self.info(job).nbytes for job in self.jobs)

    @property
    def parameters(self) -> int:
        """Elements of the weights to quantize."""
        return sum(math.prod(job.shape) for job in self.jobs)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of the quantized weights (codes, scales, zero points, indices) per element; adapter apart."""
        copied = {step.name for shard in self.shards for step in shard.steps if isinstance(step, TensorInfo)}
        stored = sum(spec.nbytes for shard in self.shards for spec in shard.layout if spec.name not in copied)
        return 8 * stored / self.parameters

    @property
    def base_bytes(self) -> int:
        """Bytes of the shards to write, headers included."""
        return sum(file_bytes(shard.layout, shard.metadata) for shard in self.shards)

    @property
    def adapter_bytes(self) -> int:
        """Bytes of `adapter_model.safetensors`."""
        return file_bytes(self.adapter_layout, adapter_metadata())

    @property
    def is_calibrated(self) -> bool:
        """Whether the method sees text, and so works on transformer blocks, one weight at a time."""
        return self.config.method in CALIBRATED

    @property
    def needs_moments(self) -> bool:
        """Whether anything asks for second moments of layers' inputs."""
        return self.config.method != "apiq-bw" or self.config.init in ("qera", "cloq")

    @property
    def quantizes_head(self) -> bool:
        """Whether the output head is among what is quantized."""
        return self.targets.output_head is not None and any(j.tensor == self.targets.output_head[0] for j in self.jobs)

    @property
    def scaling(self) -> float:
        """LoRA's."""
        assert self.config.alpha is not None, "a plan has decided it"
        return peft_adapter.scaling(self.config.rank, self.config.alpha, self.config.rslora)

    @property
    def on_gpu(self) -> bool:
        """Whether the weights are computed on a GPU."""
        return torch.device(self.config.device).type == "cuda"

    def info(self, job: WeightJob) -> TensorInfo:
        """Where the source has the weight."""
        info = lookup(self.checkpoint.tensors, job.tensor)
        assert info is not None
        return info

    def make_quantizer(self, job: WeightJob) -> Quantizer:
        """The quantizer of `job`, with its values rounded as the output format's loader rounds them."""
        return make_quantizer(self.format, job.quantizer, job.bits, job.group_size, job.dtype, self.config.double_quant)

    def empty(self, job: WeightJob) -> QuantizedWeight:
        """The quantized form of `job` on the meta device."""
        return self.make_quantizer(job).empty(*job.shape)

    def stored(self, job: WeightJob) -> list[TensorSpec]:
        """The tensors that `job` becomes in its shard."""
        alike = (job.shape, job.transposed, job.dtype, job.bits, job.group_size, job.quantizer)
        if alike not in self._stored:  # a model has few kinds of weights, and thousands of weights
            self._stored[alike] = to_store(self.format, Place("", job.transposed), self.empty(job))
        tensors = self._stored[alike].items()
        return [TensorSpec(stored_name(self.format, job.place, key), t.dtype, tuple(t.shape)) for key, t in tensors]


def adapter_metadata(base_sha256: str = "0" * 64) -> dict[str, str]:
    """Header metadata of the adapter file: what PEFT writes, and the hash of the base the adapter belongs to."""
    return {"format": "pt", FINGERPRINT_KEY: base_sha256}


def make_plan(checkpoint: Checkpoint, config: QuantizeConfig, targets: Targets) -> Plan:
    """Decide everything from headers and configuration.

    Raises:
        LoftqError: something in this model does not fit the options; names the tensors and the way out.
    """
    if config.quantize_head:
        targets = with_output_head(targets, checkpoint.model)
    if config.quantize_embeddings:
        targets = with_embeddings(targets, checkpoint.model, config.skip)
    linears, skipped, skipped_linears = choose_linears(targets, config)
    if not linears:
        raise LoftqError(f"`{checkpoint.model}` has no linear weight to quantize", reasons(skipped))
    decided = config.decided()
    jobs = make_jobs(checkpoint, linears, targets, decided)
    stacked = stacked_factors(jobs, targets.stacks)

    def build(format_name: str) -> Plan:
        chosen, jobs_of = decided.model_copy(update={"format": format_name}), jobs
        if config.format == "auto" and format_name == "packed" and config.quantizer is None:  # it has a better one
            chosen = config.model_copy(update={"format": format_name}).decided()
            jobs_of = make_jobs(checkpoint, linears, targets, chosen)
        return Plan(
            checkpoint=checkpoint,
            config=chosen,
            format=FORMATS[format_name],
            jobs=(jobs_of := for_format(jobs_of, targets, FORMATS[format_name])),
            shards=(),
            stacked=stacked,
            adapter_layout=(
                *adapter_layout(jobs_of, stacked, getattr(torch, chosen.adapter_dtype)),
                *head_layout(checkpoint, targets.head.tensors),
            ),
            skipped=skipped,
            skipped_linears=skipped_linears,
            targets=targets,
            notes=(),
        )

    ragged = ragged_groups(jobs)
    if config.format == "auto":
        plan, why = choose_format(build, ragged.message if ragged else None)
    else:
        plan, why = build(config.format), None
    refuse_misfits(plan.jobs, plan.config)
    if config.format != "auto":
        if config.format not in ("packed", "dense") and ragged:
            raise ragged
        if problem := plan.format.why_not(plan):
            raise LoftqError(f"`--format {config.format}` cannot hold this: {problem}", other_formats(build))
    about = (*checkpoint.notes, targets.note, targets.head.note, about_experts(plan.jobs), why)
    notes = [note for note in about if note]
    if config.bits_for and all(job.bits != config.bits for job in jobs):
        notes.append(f"no weight is left at `--bits {config.bits}`: what `--bits-for` names is all of them")
    if any(job.quantizer != plan.config.quantizer for job in plan.jobs):
        notes.append(f"what has 8 bits is `uniform`, for `{plan.config.quantizer}` has 2, 3 or 4")
    if config.quantize_head and not plan.quantizes_head:
        notes.append("`--quantize-head` does nothing: `--skip` leaves the output head out")
    if config.quantize_embeddings and not any(job.embedding for job in plan.jobs):
        notes.append("`--quantize-embeddings` does nothing: `--skip` leaves all of them out")
    return _with_shards(plan, tuple(notes))


def _with_shards(plan: Plan, notes: tuple[str, ...]) -> Plan:
    jobs: dict[str, list[WeightJob]] = {}
    for job in plan.jobs:
        jobs.setdefault(whole_name(job.tensor), []).append(job)
    shards = []
    elements = BATCH_ELEMENTS[torch.device(plan.config.device).type]

    def may_stack(job: WeightJob) -> bool:
        alone = plan.is_calibrated and job.expert is None  # the block loop, which has no experts, takes one by one
        return not alone and stackable(plan.make_quantizer(job), *job.shape)

    for file in plan.checkpoint.files:
        copies: list[Step] = []
        layout: list[TensorSpec] = []
        of_shard: list[WeightJob] = []
        for info in plan.checkpoint.tensors.values():
            if info.file != file:
                continue
            if of_tensor := jobs.get(info.name):
                of_shard += of_tensor
                layout += joined(spec for job in of_tensor for spec in plan.stored(job))
            else:
                copies.append(info)
                layout.append(TensorSpec(info.name, info.dtype, info.shape))
        metadata = {"format": "pt", **plan.checkpoint.metadata.get(file, {})}
        # copies first: they keep the disk busy while the first weights are computed
        steps = (*copies, *make_batches(of_shard, may_stack, elements))
        shards.append(ShardPlan(file, steps, tuple(layout), metadata))
    return replace(plan, shards=tuple(shards), notes=notes)
