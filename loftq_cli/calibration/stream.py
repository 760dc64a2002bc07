"""Activations streamed block by block: a model that is never whole in memory, run as transformers runs it.

The model is built with parameters on the meta device; everything but the transformer blocks is filled in. Each block is
replaced by a stand-in that hands its input on. To run one block on a micro-batch, the model itself is called, and what
it passes to that block's stand-in (rotary tables, masks, cross-attention inputs, whatever differs from layer to layer)
is what the block gets, with the activations of the stream as its hidden states; there the call ends. So no argument is
rebuilt here, and no family is known by name.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loftq_cli.calibration.activations import Activations
from loftq_cli.calibration.handed import handed_on, takes
from loftq_cli.calibration.stand_in import (
    WAY_OUT,
    Arguments,
    Stack,
    StandIn,
    calling,
    for_windows,
    hidden_of,
    inputs_for,
    not_called,
    reached,
    until_reached,
)
from loftq_cli.checkpoint.reader import TensorInfo, read_tensor
from loftq_cli.checkpoint.source import Checkpoint
from loftq_cli.errors import LoftqError


@dataclass(frozen=True)
class Entering:
    """What enters a block: `hidden` states; and what came out of finished stacks, by path, e.g. `model.encoder.layers`.

    Shapes: [samples, seqlen, hidden_size].
    """

    hidden: Activations
    ends: dict[str, Activations]


@dataclass(frozen=True)
class Run:
    """A micro-batch about to enter a block: which samples, of how many tokens in all, and what the model passes."""

    rows: slice
    tokens: int
    name: str
    stand_in: StandIn
    arguments: Arguments
    takes: Callable[[tuple[Any, ...], Tensor], bool]  # whether a later block takes one of what a block returns

    def __call__(self, block: Callable[..., Any]) -> Tensor:
        """Run `block` and return its hidden states."""
        args, kwargs = self.arguments
        with calling(f"the block `{self.name}`"):
            out = block(*args, **kwargs)
            if isinstance(out, Tensor):
                return out
            extras = tuple(out[1:])
            is_taken = partial(self.takes, extras)
            self.stand_in.extras = handed_on(self.name, self.stand_in.extras, extras, is_taken)
        hidden = out[0]
        assert isinstance(hidden, Tensor)
        return hidden


def ties_of(model: Any) -> dict[str, str]:
    """Keys in the model's state dict that are the same parameter as another key."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


class BlockStream:
    """A model whose blocks are run one at a time.

    Args:
        model: from `build_to_run`; its parameters are filled in here, but for those of the blocks.
        checkpoint: where they are.
        names: tensor name → key in the model's state dict, from `state_keys`.
        transposed: names of tensors that the model has transposed.
        made: by key, parameters that transformers makes while loading, and what reads them: those of experts.
        paths: of the stacks.
        tokens: int64 [samples, seqlen].
        parts: the samples of each micro-batch.
        device: what computes.
        dtype: in which.
        folder: for activations; None to keep them in memory.
    """

    def __init__(
        self, model: Any, checkpoint: Checkpoint, names: dict[str, str], transposed: Container[str],
        made: Mapping[str, Callable[[], Tensor]], paths: Sequence[str], tokens: Tensor,
        parts: Sequence[slice], device: torch.device, dtype: torch.dtype, folder: Path | None = None,
    ) -> None:  # fmt: skip
        self._model, self._checkpoint, self.device, self.dtype = model, checkpoint, device, dtype
        self.tokens, self.parts, self._folder = tokens, parts, folder
        self._tensor_of = {key: tensor for tensor, key in names.items()}
        self._ties, self._transposed, self._made = ties_of(model), transposed, made
        for_windows(model)
        stacks = [Stack(model, path) for path in paths]
        there: dict[str, Tensor] = {}  # by tensor: tied ones are read once
        for name, _ in list(model.named_parameters(remove_duplicate=False)):
            with suppress(KeyError):  # such as a head that is not in the file; nothing here gets so far
                info = self._find(name)
                if info.name not in there:
                    there[info.name] = self._read(name).to(device, dtype)
                _set(model, name, there[info.name])
        self._fill_buffers(model, "")
        self.stacks = self._in_order(stacks)

    def begin(self, stack: Stack, ends: dict[str, Activations]) -> Entering:
        """The stream that enters the first block of `stack`, behind stacks with these `ends`."""
        made: Activations | None = None
        for rows in self.parts:
            hidden = hidden_of(self._caught(stack, 0, rows, None, ends))
            if len(hidden) != rows.stop - rows.start:
                raise LoftqError(f"samples are not the first dimension of what enters `{stack.path}`", WAY_OUT)
            made = self.buffer(hidden.shape[1:]) if made is None else made
            made[rows].copy_(hidden, non_blocking=True)
        assert made is not None
        return Entering(made, ends)

    def buffer(self, shape: Sequence[int]) -> Activations:
        """Room for activations of all samples, each of `shape`."""
        return Activations(self.parts, shape, self.dtype, self._folder, pinned=self.device.type == "cuda")

    @contextmanager
    def loaded(self, stack: Stack, number: int) -> Iterator[nn.Module]:
        """A block with its parameters and buffers on the device, from the files; its parameters go afterwards."""
        block = stack.blocks[number]
        names = self._fill(block, f"{stack.path}.{number}")
        try:
            yield block
        finally:
            _empty(block, names)

    @contextmanager
    def all_loaded(self, without: Container[str]) -> Iterator[list[tuple[str, nn.Module, StandIn]]]:
        """Every block by its name, loaded but for the weights of modules named in `without`, and its stand-in."""
        there = [(f"{s.path}.{i}", block, s.stand_ins[i]) for s in self.stacks for i, block in enumerate(s.blocks)]
        filled = [(block, self._fill(block, name, without)) for name, block, _ in there]
        try:
            yield there
        finally:
            for block, names in filled:
                _empty(block, names)

    def said(self, rows: slice, ends: dict[str, Activations] | None = None) -> dict[str, Tensor]:
        """What the model says of samples, by its name: all logits, e.g. [samples, tokens, words], or what comes first.

        With `ends` of all stacks from these, else by what the stand-ins compute.
        """
        for stack in self.stacks:
            stack.stand_ins[-1].replay = None if ends is None else ends[stack.path][rows].to(self.device)
            for stand_in in stack.stand_ins:
                stand_in.idle = ends is not None
        with calling("the model as a whole", "begin again with `--overwrite`, and without `--finish-epochs`"):
            out = self._model(**self._inputs(self.tokens[rows]))
        for stack in self.stacks:
            stack.stand_ins[-1].replay = None
        # of question answering two, where an answer begins and where it ends
        return {name: value for name, value in out.items() if name.endswith("logits")} or {"first": out[0]}

    def parameter(self, key: str) -> Tensor:
        """A parameter of a block, from the files."""
        return self._read(key).to(self.device, self.dtype)

    def _fill(self, block: nn.Module, prefix: str, without: Container[str] = ()) -> list[str]:
        """Fill in a block's parameters, but for the weights of modules in `without`; return their names."""
        names = []
        for name, _ in list(block.named_parameters(remove_duplicate=False)):
            key = f"{prefix}.{name}"
            if key.endswith(".weight") and key.removesuffix(".weight") in without:
                continue
            _set(block, name, self.parameter(key))
            names.append(name)
        self._fill_buffers(block, f"{prefix}.")
        return names

    def _fill_buffers(self, module: nn.Module, prefix: str) -> None:
        """Bring a module's buffers to the device, and those that the files have as the files have them."""
        for path, child in module.named_modules():
            for name, buffer in list(child._buffers.items()):
                key = prefix + (f"{path}.{name}" if path else name)
                if buffer is not None:
                    stored = self._read(key).to(buffer.dtype) if key in self._tensor_of else buffer
                    child._buffers[name] = stored.to(self.device)

    def run(self, stack: Stack, number: int, stream: Entering, rows: slice) -> Run:
        """Samples of `stream`, ready to run through block `number`."""
        arguments = self._caught(stack, number, rows, stream.hidden if number > 0 else None, stream.ends)
        tokens = (rows.stop - rows.start) * self.tokens.shape[1]
        stand_in = stack.stand_ins[number]
        return Run(rows, tokens, f"{stack.path}.{number}", stand_in, arguments, partial(self._takes, stand_in))

    def _takes(self, stand_in: StandIn, extras: tuple[Any, ...], tensor: Tensor) -> bool:
        """Whether a block behind `stand_in` takes `tensor`, one of the `extras` that are handed on there."""
        stand_ins = [stand_in for stack in self.stacks for stand_in in stack.stand_ins]
        later = stand_ins[stand_ins.index(stand_in) + 1 :]
        return takes(lambda: self._model(**self._inputs(self.tokens[:1])), stand_in, later, extras, tensor)

    def runs(self, stack: Stack, number: int, stream: Entering, parts: Sequence[slice] | None = None) -> Iterator[Run]:
        """Micro-batches of `stream`: all of them, or these."""
        return (self.run(stack, number, stream, rows) for rows in (self.parts if parts is None else parts))

    def outputs(self, stack: Stack, number: int, block: nn.Module, stream: Entering) -> Activations:
        """What `block` makes of `stream`: [samples, seqlen, hidden_size]."""
        made = self.buffer(stream.hidden.shape[1:])
        for run in self.runs(stack, number, stream):
            made[run.rows].copy_(run(block), non_blocking=True)
        return made

    def _caught(
        self, stack: Stack, number: int, rows: slice, hidden: Activations | None, ends: dict[str, Activations]
    ) -> Arguments:
        """What the model passes to block `number` when `hidden` leaves the block before it.

        Finished stacks give back their own ends. What a model does between blocks is done.
        """
        caught: list[Arguments] = []

        def catch(arguments: Arguments) -> None:
            caught.append(arguments)
            reached()

        replays = {other.stand_ins[-1]: ends[other.path] for other in self.stacks if other.path in ends}
        if hidden is not None:
            replays[stack.stand_ins[number - 1]] = hidden
        for stand_in, activations in replays.items():
            stand_in.replay = activations[rows].to(self.device, non_blocking=True)
        stack.stand_ins[number].catch = catch
        try:
            with until_reached(), calling(f"the model around `{stack.path}`"), torch.no_grad():
                self._model(**self._inputs(self.tokens[rows]))
        finally:
            stack.stand_ins[number].catch = None
            for stand_in in replays:
                stand_in.replay = None
        if not caught:
            raise not_called(stack)
        return caught[0]

    def _inputs(self, tokens: Tensor) -> dict[str, Tensor]:
        return inputs_for(self._model, tokens.to(self.device))

    def _in_order(self, stacks: list[Stack]) -> list[Stack]:
        """The stacks as the model calls them: an encoder before the decoder that attends to it.

        Raises:
            LoftqError: a block is called more than once, as ALBERT does: it has no input of its own; or not at all.
        """
        calls, ended = list[StandIn](), False
        stand_ins = {stand_in: stack for stack in stacks for stand_in in stack.stand_ins}
        for stand_in in stand_ins:
            stand_in.catch = lambda _, stand_in=stand_in: calls.append(stand_in)
        with suppress(Exception), torch.no_grad():  # what a block returns is not known yet, and there may be no head
            self._model(**self._inputs(self.tokens[:1]))
            ended = True
        for stand_in in stand_ins:
            stand_in.catch = None
        if len(set(calls)) < len(calls):
            repeated = next(stand_in for stand_in in calls if calls.count(stand_in) > 1)
            raise LoftqError(f"the blocks `{stand_ins[repeated].path}` are called more than once each", WAY_OUT)
        called = list(dict.fromkeys(stand_ins[stand_in] for stand_in in calls))
        left = [stack for stack in stacks if stack not in called]
        if ended and left:
            raise not_called(left[0])
        return called + left

    def _find(self, key: str) -> TensorInfo:
        """Where the parameter called `key` is; KeyError where it is in no file."""
        return self._checkpoint.tensors[self._tensor_of.get(key) or self._tensor_of[self._ties[key]]]

    def _read(self, key: str) -> Tensor:
        if key in self._made:
            return self._made[key]()
        info = self._find(key)
        stored = read_tensor(self._checkpoint.path(info.file), info)
        return stored.T.contiguous() if info.name in self._transposed else stored


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    path, _, last = name.rpartition(".")
    module.get_submodule(path)._parameters[last] = nn.Parameter(value, requires_grad=False)


def _empty(block: nn.Module, names: Sequence[str]) -> None:
    for name in names:
        _set(block, name, torch.empty_like(block.get_parameter(name), device="meta"))
