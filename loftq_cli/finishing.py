"""The finish: all factors of the model trained together, so that it says what the source says.

What every block has kept of its own outputs adds up to less than the whole model could keep: an error that one leaves
another can take back, and some matter to nobody. Hence a last, short training of the factors alone on what the model
says, as RILQ (arXiv 2412.01129) does on its last hidden states. Bases stay as they are on disk, from where those of a
large model are read and unpacked block by block, in forward and again in backward: it is never whole in memory, and
neither are activations but those between blocks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from loftq_cli.calibration.activations import Activations
from loftq_cli.calibration.stream import BlockStream
from loftq_cli.checkpoint.files import write_file
from loftq_cli.checkpoint.reader import read_tensor
from loftq_cli.fitting import Share
from loftq_cli.formats import peft_adapter
from loftq_cli.formats.base import from_store
from loftq_cli.jobs import WeightJob
from loftq_cli.journal import WORK_FOLDER
from loftq_cli.methods.apiq import relative_error
from loftq_cli.methods.training import Fit, Training, train
from loftq_cli.plan import Plan
from loftq_cli.resume import find, read_back

FINISH_FILE = f"{WORK_FOLDER}/finish.safetensors"
LOGIT_TOKENS = 512  # of which logits are float32 at once
KEPT_BYTES = 2 << 30  # of dequantized bases on the device: those of small models, which would be unpacked in no time

Factors = dict[str, tuple[Tensor, Tensor]]  # as stored, by module name


def finished(out: Path) -> tuple[Factors, Fit] | None:
    """What an earlier session trained; None where none did."""
    if not (out / FINISH_FILE).exists():
        return None
    with safetensors.safe_open(out / FINISH_FILE, "pt") as file:
        metadata = file.metadata()
        names = {module: peft_adapter.tensor_names(module) for module in json.loads(metadata["modules"])}
        factors = {module: (file.get_tensor(a), file.get_tensor(b)) for module, (a, b) in names.items()}
    return factors, Fit(**json.loads(metadata["fit"]))


def finish(
    plan: Plan,
    stream: BlockStream,
    out: Path,
    ends: dict[str, Activations],
    share: Share,
    tell: Callable[[str, int], None],
) -> tuple[Factors, Fit]:
    """Train the factors that are in `out`.

    Args:
        plan: what was decided.
        stream: the model, and the tokens that it is to speak of.
        out: where bases and factors are.
        ends: of the source's stacks, from which follows what the source says.
        share: which samples train.
        tell: called at the start of each epoch, with its name and the bytes of weights that the one before passed.
    """
    weights = {job.module: _LiveWeight(plan, out, job, stream) for job in plan.jobs if job.block}
    config = plan.config
    batches, held_out = share.batches(*stream.tokens.shape)
    steps = count()
    problem = plan.checkpoint.config.get("problem_type")

    def loss_of(rows: slice) -> Tensor:
        if torch.is_grad_enabled() and (step := next(steps)) % len(batches) == 0:
            passed = plan.weight_bytes // config.finish_epochs if step else 0
            epoch = min(step // len(batches) + 1, config.finish_epochs)  # a step that had to be repeated counts twice
            tell(f"finish, epoch {epoch} of {config.finish_epochs}", passed)
        with torch.no_grad():
            wanted = stream.said(rows, ends)
        said = stream.said(rows)
        text = stream.tokens[rows].shape
        apart = [
            relative_error(said[name], theirs)
            if are_numbers(name, theirs, text, problem)
            else divergence(said[name], theirs)
            for name, theirs in wanted.items()
        ]
        return torch.stack(apart).sum()

    with live_blocks(stream, weights), torch.enable_grad():
        how = Training(config.finish_epochs, config.finish_lr, seed=config.seed)
        factors = [factor for weight in weights.values() for factor in weight.parameters() if factor.numel()]
        fit = train([(factors, how.factor_lr)], batches, held_out, loss_of, how, share.mean)
    made = {module: weight.stored() for module, weight in weights.items()}
    return made, fit


def keep(out: Path, made: Factors, fit: Fit) -> None:
    """Write what was trained to where `finished` finds it, whole or not at all."""
    tensors = {
        name: tensor
        for module, pair in made.items()
        for name, tensor in zip(peft_adapter.tensor_names(module), pair, strict=True)
    }
    metadata = {"modules": json.dumps(list(made)), "fit": json.dumps(asdict(fit))}
    write_file(out / FINISH_FILE, save(tensors, metadata))


def are_numbers(name: str, said: Tensor, text: torch.Size, problem: str | None) -> bool:
    """Whether what a model says under this name is no distribution: a regression's number, a yes or no for each token.

    Args:
        name: of the output.
        said: e.g. [samples, tokens, words], [samples, labels] or [samples].
        text: the shape of the tokens, [samples, tokens].
        problem: `problem_type` of the model's configuration.
    """
    if name in ("start_logits", "end_logits"):  # of question answering: which token
        return False
    if not name.endswith("logits") or said.ndim < 2 or said.shape[-1] == 1:
        return True
    return said.shape == text if problem is None else problem != "single_label_classification"


def divergence(ours: Tensor, theirs: Tensor) -> Tensor:
    """KL(theirs ‖ ours) of logits [..., words], per token; a few tokens at a time, for vocabularies are large."""
    both = zip(*(logits.flatten(0, -2).split(LOGIT_TOKENS) for logits in (ours, theirs)), strict=True)
    sums = [checkpoint(_divergence, mine, other, use_reentrant=False) for mine, other in both]
    return torch.stack(sums).sum() / ours[..., 0].numel()


def _divergence(ours: Tensor, theirs: Tensor) -> Tensor:
    ours, theirs = ours.float().log_softmax(-1), theirs.float().log_softmax(-1)
    return (theirs.exp() * (theirs - ours)).sum()


class _LiveWeight(nn.Module):
    """A stored weight that is unpacked when it is needed, with factors that train as they are stored."""

    def __init__(self, plan: Plan, out: Path, job: WeightJob, stream: BlockStream) -> None:
        super().__init__()
        _, (lora_A, lora_B) = read_back(plan, out, job)
        self._plan, self._job, self._stream = plan, job, stream
        names = [spec.name for spec in plan.stored(job)]
        self._infos = dict(zip(names, find(out, job.file, names), strict=True))
        kept = plan.parameters * stream.dtype.itemsize <= KEPT_BYTES
        self._values = self._read().to(stream.dtype) if kept else None
        self.lora_A = nn.Parameter(lora_A.to(stream.device, torch.float32))
        self.lora_B = nn.Parameter(lora_B.to(stream.device, torch.float32))

    def forward(self) -> Tensor:
        """Return Ŵ [m, n]."""
        values = self._read() if self._values is None else self._values.float()
        return torch.addmm(values, self.lora_B, self.lora_A, alpha=self._plan.scaling).to(self._stream.dtype)

    def stored(self) -> tuple[Tensor, Tensor]:
        """The factors as they will be stored, on the CPU."""
        dtype = getattr(torch, self._plan.config.adapter_dtype)
        return self.lora_A.detach().to("cpu", dtype), self.lora_B.detach().to("cpu", dtype)

    def _read(self) -> Tensor:
        there = {name: read_tensor(path, info).to(self._stream.device) for name, (path, info) in self._infos.items()}
        with torch.no_grad():
            job, like = self._job, self._plan.empty(self._job)
            return from_store(self._plan.format, job.place, there, like)


def _others(stream: BlockStream, weights: Container[str]) -> dict[str, Callable[[], Tensor]]:
    """What reads a block's matrix, by module name, of those that are not in `weights`; none where they are small."""
    found = {}
    for stack in stream.stacks:
        for number, block in enumerate(stack.blocks):
            for path, module in block.named_modules(prefix=f"{stack.path}.{number}"):
                matrix = getattr(module, "weight", None)
                if isinstance(matrix, Tensor) and matrix.ndim == 2 and path not in weights:
                    found[path] = matrix.numel()
    if sum(found.values()) * stream.dtype.itemsize <= KEPT_BYTES:
        return {}
    return {path: partial(stream.parameter, f"{path}.weight") for path in found}


@contextmanager
def live_blocks(stream: BlockStream, weights: Mapping[str, Callable[[], Tensor]]) -> Iterator[None]:
    """Inside, the model of `stream` computes with its own blocks, and `weights` in them, by their module names.

    Other matrices of blocks, such as those that `--skip` leaves as they are, are read when they are needed, too.
    """
    weights = {**_others(stream, weights), **weights}
    with stream.all_loaded(weights.keys()) as modules:
        for name, module, stand_in in modules:
            inside = {
                f"{path.removeprefix(f'{name}.')}.weight": weight
                for path, weight in weights.items()
                if path.startswith(f"{name}.")
            }

            def run(*args: Any, module: nn.Module = module, inside: Any = inside, **kwargs: Any) -> Any:
                values = {parameter: weight() for parameter, weight in inside.items()}
                return functional_call(module, values, args, kwargs)

            def compute(*args: Any, run: Any = run, **kwargs: Any) -> Any:
                return checkpoint(run, *args, use_reentrant=False, **kwargs)

            stand_in.compute = compute
        try:
            yield
        finally:
            for _, _, stand_in in modules:
                stand_in.compute = None
