"""Which weights become jobs, and with how many bits."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch

from loftq_cli.checkpoint.reader import lookup, whole_name
from loftq_cli.checkpoint.source import Checkpoint
from loftq_cli.config import CALIBRATED, GRIDS, QuantizeConfig
from loftq_cli.errors import LoftqError, did_you_mean
from loftq_cli.experts import FLOATS, ExpertSlot
from loftq_cli.formats import peft_adapter
from loftq_cli.formats.base import Place
from loftq_cli.targets import Targets

BLOCK = re.compile(r"(.*?)\.(\d+)(?=\.)")  # the start of a module's name: the list of blocks, and which of them
SLICE = re.compile(r"blocks\[(-?\d+|\d+(?:\.\d+)?%|):(-?\d+|\d+(?:\.\d+)?%|)\]")


@dataclass(frozen=True)
class WeightJob:
    """One weight to quantize.

    `dtype` is what the loader will have the weight in: `stored_dtype`, the file's, or the narrower one that config.json
    names. `block` is the path of the transformer block it sits in, e.g. `model.layers.3`, where a calibrated method
    reaches it. `transposed`: the file has it as [n, m]. `rank` is that of its adapter: 0 where it has none. `tensor` of
    an expert may be a slice of one, `name[3]`. `embedding`: it is a table of m tokens with n features each.
    `wrapped`: see `Place`.
    """

    tensor: str
    module: str
    file: str
    shape: tuple[int, int]
    stored_dtype: torch.dtype
    dtype: torch.dtype
    bits: int
    group_size: int
    quantizer: str
    block: str | None
    rank: int
    transposed: bool = False
    expert: ExpertSlot | None = None
    embedding: bool = False
    wrapped: bool = False

    @property
    def loaded_module(self) -> str:
        """The module that has the weight in the loaded model."""
        return peft_adapter.loaded_name(self.module, self.wrapped)

    @property
    def factor_names(self) -> tuple[str, str]:
        """The names of its factors, as they are stored."""
        return peft_adapter.tensor_names(self.loaded_module, self.embedding)

    @property
    def place(self) -> Place:
        """Where it is in the source, from which follow the names of its quantized tensors."""
        return Place(self.tensor, self.transposed, self.expert is not None, self.wrapped)


@dataclass(frozen=True)
class WeightBatch:
    """Weights of one shard that are alike but for their values: computed together, as [B, m, n]."""

    jobs: tuple[WeightJob, ...]

    @property
    def first(self) -> WeightJob:
        """Any of them: shape, bits, group size and quantizer are the same."""
        return self.jobs[0]

    @property
    def parameters(self) -> int:
        """Their elements."""
        return len(self.jobs) * math.prod(self.first.shape)


def choose_linears(targets: Targets, config: QuantizeConfig) -> tuple[dict[str, str], dict[str, str], tuple[str, ...]]:
    """What becomes jobs (tensor → module); what does not, and why (tensor → reason); and its modules.

    Raises:
        LoftqError: a glob of `skip` matches nothing.
    """
    linears, skipped, skipped_linears = apply_skips(targets, config.skip)
    if config.method in CALIBRATED:  # the block loop has nothing that reaches them; experts get a weight-only method
        why = "outside the transformer blocks, which alone a calibrated method runs"
        outside = {t: name for t, name in linears.items() if not BLOCK.match(name) and t not in targets.experts}
        skipped, skipped_linears = {**skipped, **dict.fromkeys(outside, why)}, (*skipped_linears, *outside.values())
        linears = {tensor: module for tensor, module in linears.items() if tensor not in outside}
    if config.format == "bnb":
        why = "experts stay in 16 bits in `bnb`, whose loader quantizes layers alone: `--format packed` holds them"
        skipped |= {whole_name(tensor): why for tensor in linears if tensor in targets.experts}
        linears = {tensor: module for tensor, module in linears.items() if tensor not in targets.experts}
    return linears, skipped, skipped_linears


def make_batches(jobs: Iterable[WeightJob], may_stack: Callable[[WeightJob], bool], elements: int) -> list[WeightBatch]:
    """Put like weights together while a batch holds at most `elements`; in the order in which the batches fill up.

    Which weights share a batch must not depend on who computes it or when: a product of matrices may be summed in
    another order in another batch.
    """
    batches: list[WeightBatch] = []
    filling: dict[object, list[WeightJob]] = {}
    for job in jobs:
        how = (job.bits, job.group_size, job.quantizer, job.rank, job.expert is None, job.embedding)
        alike = (job.shape, job.transposed, job.stored_dtype, job.dtype, *how)
        together = filling.setdefault(alike, [])
        together.append(job)
        if (len(together) + 1) * math.prod(job.shape) > elements or not may_stack(job):
            batches.append(WeightBatch(tuple(filling.pop(alike))))
    return batches + [WeightBatch(tuple(together)) for together in filling.values()]


def apply_skips(targets: Targets, globs: Iterable[str]) -> tuple[dict[str, str], dict[str, str], tuple[str, ...]]:
    """Move what the globs match from the linears (tensor → module) to the skipped (tensor → reason) and their modules.

    Raises:
        LoftqError: a glob matches nothing.
    """
    linears, skipped, skipped_linears = dict(targets.linears), dict(targets.skipped), list(targets.skipped_linears)
    for glob in globs:
        matched = [tensor for tensor, module in linears.items() if fnmatchcase(module, glob)]
        alone = (tensor.removesuffix(".weight") for tensor in targets.skipped)  # as is a head: some skip it by habit
        if not matched and not any(fnmatchcase(module, glob) for module in alone):
            raise _no_match("--skip", glob, targets.linears.values())
        for tensor in matched:
            module = linears.pop(tensor)
            if tensor not in targets.experts and tensor not in targets.embeddings:  # no layers that loaders replace
                skipped_linears.append(module)
            skipped[whole_name(tensor)] = f"`--skip {glob}`"
    _refuse_parts(linears, skipped)
    return linears, skipped, tuple(skipped_linears)


def _refuse_parts(linears: Iterable[str], skipped: dict[str, str]) -> None:
    """Refuse to leave out some of the experts that the source has in one tensor."""
    for tensor in linears:
        if (whole := whole_name(tensor)) != tensor and whole in skipped:
            raise LoftqError(
                f"{skipped[whole]} leaves out some experts of `{whole}`, and not `{tensor}`",
                "a tensor of several experts is quantized or left alone as a whole: e.g. `*.experts.*`",
            )


def _no_match(flag: str, glob: str, modules: Iterable[str]) -> LoftqError:
    modules = list(modules)
    kinds = {module.rpartition(".")[2] for module in modules}
    if flag == "--bits-for" and glob.startswith("block"):
        blocks = {match.group(1, 2) for match in map(BLOCK.match, modules) if match}
        counts = Counter(name for name, _ in blocks)
        listed = ", ".join(f"`{name}` has {count}" for name, count in counts.items()) or "it has none"
        return LoftqError(
            f"`{flag} {glob}` matches no linear layer",
            f"{listed}; slices are Python's, or shares: `blocks[5:6]`, `blocks[-2:]`, `blocks[:50%]`",
        )
    return LoftqError(
        f"`{flag} {glob}` matches no linear layer",
        "globs are matched against whole module names, e.g. `*.down_proj` or `model.layers.0.*`"
        + (" (or `blocks[:50%]` for the first half); " if flag == "--bits-for" else "; ")
        + (f"did you mean `*.{glob}`?" if glob in kinds else did_you_mean(glob.rpartition(".")[2], kinds)),
    )


def make_jobs(
    checkpoint: Checkpoint, linears: dict[str, str], targets: Targets, config: QuantizeConfig
) -> tuple[WeightJob, ...]:
    """One job for each linear weight (tensor → module), with the bits that the rules give it.

    `targets` are those before skips: skipping some must not move the slices of blocks.

    Raises:
        LoftqError: a rule of `bits_for` matches nothing.
    """
    every_linear = list(targets.linears.values())
    selected = {glob: _select(glob, every_linear).intersection(linears.values()) for glob in config.bits_for}
    for glob, modules in selected.items():
        if not modules:
            raise _no_match("--bits-for", glob, linears.values())
    jobs = []
    for tensor, module in linears.items():
        info = lookup(checkpoint.tensors, tensor)
        assert info is not None
        m, n = reversed(info.shape) if tensor in targets.transposed else info.shape
        rules = (bits for glob, bits in config.bits_for.items() if module in selected[glob])
        bits = [config.bits, *rules][-1]  # the last rule wins, as in a .gitignore
        expert = targets.experts.get(tensor)
        block = BLOCK.match(module) if expert is None else None
        assert config.quantizer is not None
        jobs.append(
            WeightJob(
                tensor=tensor,
                module=module,
                file=info.file,
                shape=(m, n),
                stored_dtype=info.dtype,
                dtype=_loaded_dtype(info.dtype, checkpoint.config),
                bits=bits,
                group_size=config.group_size,
                quantizer=config.quantizer if bits < 8 or config.quantizer in GRIDS else "uniform",
                block=block[0] if block else None,
                rank=config.rank if config.experts_adapter or expert is None else 0,
                transposed=tensor in targets.transposed,
                expert=expert,
                embedding=tensor in targets.embeddings,
            )
        )
    return tuple(jobs)


def _select(rule: str, modules: Iterable[str]) -> set[str]:
    """The modules that a rule of `bits_for` is for: a glob, or `blocks[a:b]`, a slice of the transformer's blocks.

    Bounds are those of a Python slice, or shares of the depth: `blocks[:50%]` is the first half, `blocks[-1:]` the last
    one. A model with several lists of blocks, as of an encoder and a decoder, is sliced in each.
    """
    if (bounds := SLICE.fullmatch(rule)) is None:
        return {module for module in modules if fnmatchcase(module, rule)}
    numbers: dict[str, dict[int, list[str]]] = {}
    for module in modules:
        if block := BLOCK.match(module):
            numbers.setdefault(block[1], {}).setdefault(int(block[2]), []).append(module)
    found: set[str] = set()
    for of_list in numbers.values():
        depth = max(of_list) + 1
        start, stop = (_bound(text, depth) for text in bounds.groups())
        for number in range(depth)[start:stop]:
            found.update(of_list.get(number, ()))
    return found


def _bound(text: str, depth: int) -> int | None:
    """One bound of a slice of `depth` blocks; of a share of them, to the nearest, and at least one."""
    if not text.endswith("%"):
        return int(text) if text else None
    exact = float(text[:-1]) / 100 * depth
    return math.floor(exact + 0.5) or math.ceil(exact)


def _loaded_dtype(stored: torch.dtype, config: dict[str, Any]) -> torch.dtype:
    """What `from_pretrained` has a weight in: config.json's dtype where it is narrower than the file's."""
    named = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    return named if named in FLOATS and named.itemsize < stored.itemsize else stored


def reasons(skipped: dict[str, str]) -> str:
    """Count skipped tensors by reason, in a sentence."""
    return "tensors left alone: " + ", ".join(f"{count} × {why}" for why, count in Counter(skipped.values()).items())
