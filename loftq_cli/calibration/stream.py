"""Activations streamed block by block: a model that is never whole in memory, run as transformers runs it.

The model is built with parameters on the meta device; everything but the transformer blocks is filled in. Each block is
replaced by a stand-in that hands its input on. To run one block on a micro-batch, the model itself is called, and what
it passes to that block's stand-in (rotary tables, masks, cross-attention inputs, whatever differs from layer to layer)
is what the block gets, with the activations of the stream as its hidden states; there the call ends. So no argument is
rebuilt here, and no family is known by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loftq_cli.checkpoint.reader import read_tensor
from loftq_cli.checkpoint.source import Checkpoint
from loftq_cli.errors import LoftqError

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class _ReachedError(Exception):
    """What was wanted of a call is there: the rest of it is not needed."""


def reached() -> None:
    """End a call inside `until_reached`."""
    raise _ReachedError


def until_reached() -> suppress:
    """A context that ends where `reached` is called."""
    return suppress(_ReachedError)


@dataclass(frozen=True)
class Activations:
    """A stream between two blocks.

    `hidden` [samples, seqlen, hidden_size] enters the next block; `ends` maps the path of every finished stack, e.g.
    `model.encoder.layers`, to what came out of it. All on the CPU.
    """

    hidden: Tensor
    ends: dict[str, Tensor]


class Stack:
    """A list of transformer blocks: `path` is its module name, `blocks` the real ones, `stand_ins` are in the model."""

    def __init__(self, model: nn.Module, path: str) -> None:
        self.path = path
        modules = model.get_submodule(path)
        if not isinstance(modules, nn.ModuleList):
            raise LoftqError(f"`{path}` is no list of blocks", "use a weight-only method, `--method loftq`")
        self.blocks = list(modules)
        self.stand_ins = [_StandIn(block) for block in self.blocks]
        for i, stand_in in enumerate(self.stand_ins):
            modules[i] = stand_in


class _StandIn(nn.Module):
    """In a block's place: gives back the hidden states that it is called with, or `replay`."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["block"] = block  # not a child: the model must not see its parameters
        self.catch: Callable[[Arguments], None] | None = None
        self.replay: Tensor | None = None
        self.extras: tuple[Any, ...] | None = None  # what the block returns beside hidden states; None: a bare tensor

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # models ask a layer for its kind of attention, say
            return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.catch is not None:
            self.catch((args, kwargs))
        hidden = _hidden((args, kwargs)) if self.replay is None else self.replay
        return hidden if self.extras is None else (hidden, *self.extras)


@dataclass(frozen=True)
class Run:
    """A micro-batch on its way through a block: which samples, and what the model passes beside hidden states."""

    rows: slice
    stand_in: _StandIn
    arguments: Arguments

    def __call__(self, block: nn.Module) -> Tensor:
        """Run `block` and return its hidden states."""
        args, kwargs = self.arguments
        out = block(*args, **kwargs)
        if isinstance(out, Tensor):
            return out
        # T5's first block, for one, hands its position bias to the others
        self.stand_in.extras = _moved(tuple(out[1:]), torch.device("cpu"), None)
        hidden = out[0]
        assert isinstance(hidden, Tensor)
        return hidden


class BlockStream:
    """A model whose blocks are run one at a time.

    Args:
        model: from `build_to_run`; its parameters are filled in here, but for those of the blocks.
        checkpoint: where they are.
        names: tensor name → key in the model's state dict, from `state_keys`.
        paths: of the stacks.
        tokens: int64 [samples, seqlen].
        parts: the samples of each micro-batch.
        device: what computes.
        dtype: in which.
    """

    def __init__(
        self, model: Any, checkpoint: Checkpoint, names: dict[str, str], paths: Sequence[str], tokens: Tensor,
        parts: Sequence[slice], device: torch.device, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self._model, self._checkpoint, self._device, self._dtype = model, checkpoint, device, dtype
        self._tokens, self._parts = tokens, parts
        self._tensor_of = {key: tensor for tensor, key in names.items()}
        self._ties = dict(getattr(model, "all_tied_weights_keys", None) or {})
        model.config.use_cache = False
        stacks = [Stack(model, path) for path in paths]
        for name, _ in list(model.named_parameters(remove_duplicate=False)):
            with suppress(KeyError):  # such as a head that is not in the file; nothing here gets so far
                _set(model, name, self._read(name).to(dtype))
        self.stacks = self._in_order(stacks)

    def begin(self, stack: Stack, ends: dict[str, Tensor]) -> Activations:
        """The stream that enters the first block of `stack`, behind stacks with these `ends`."""
        caught = [_hidden(self._caught(stack, 0, rows, ends)).to(self._dtype) for rows in self._parts]
        return Activations(torch.cat(caught), ends)

    @contextmanager
    def loaded(self, stack: Stack, number: int) -> Iterator[nn.Module]:
        """A block with its parameters and buffers on the device, from the files; its parameters go afterwards.

        Raises:
            LoftqError: a parameter is in the files under no name of its own, or transformers changes it on loading.
        """
        block = stack.blocks[number]
        names = [name for name, _ in block.named_parameters(remove_duplicate=False)]
        for name in names:
            key = f"{stack.path}.{number}.{name}"
            try:
                _set(block, name, self._read(key).to(self._device, self._dtype))
            except KeyError:
                raise LoftqError(
                    f"`{key}` is in no file as it stands: transformers makes it while loading",
                    "calibrated methods cannot run this model yet: use `--method loftq`",
                ) from None
        block.to(self._device)
        try:
            yield block
        finally:
            for name in names:
                _set(block, name, torch.empty_like(block.get_parameter(name), device="meta"))

    def runs(self, stack: Stack, number: int, stream: Activations) -> Iterator[Run]:
        """Every micro-batch of `stream`, ready to run through block `number`."""
        for rows in self._parts:
            args, kwargs = _moved(self._caught(stack, number, rows, stream.ends), self._device, self._dtype)
            hidden = stream.hidden[rows].to(self._device)
            if args:
                args = (hidden, *args[1:])
            else:
                kwargs = {**kwargs, "hidden_states": hidden}
            yield Run(rows, stack.stand_ins[number], (args, kwargs))

    def outputs(self, stack: Stack, number: int, block: nn.Module, stream: Activations) -> Tensor:
        """What `block` makes of `stream`: [samples, seqlen, hidden_size], on the CPU."""
        return torch.cat([run(block).cpu() for run in self.runs(stack, number, stream)])

    def _caught(self, stack: Stack, number: int, rows: slice, ends: dict[str, Tensor]) -> Arguments:
        """What the model passes to block `number`; finished stacks give back their own ends."""
        caught: list[Arguments] = []

        def catch(arguments: Arguments) -> None:
            caught.append(arguments)
            reached()

        for other in self.stacks:
            other.stand_ins[-1].replay = ends[other.path][rows] if other.path in ends else None
        stack.stand_ins[number].catch = catch
        with until_reached(), torch.no_grad():
            self._model(**self._inputs(self._tokens[rows]))
        stack.stand_ins[number].catch = None
        if not caught:
            raise LoftqError(
                f"the model does not call its blocks `{stack.path}` for text",
                "use a weight-only method, `--method loftq`",
            )
        return caught[0]

    def _inputs(self, tokens: Tensor) -> dict[str, Tensor]:
        both = getattr(self._model.config, "is_encoder_decoder", False)
        return {"input_ids": tokens, **({"decoder_input_ids": tokens} if both else {})}

    def _in_order(self, stacks: list[Stack]) -> list[Stack]:
        """The stacks as the model calls them: an encoder before the decoder that attends to it."""
        called: list[Stack] = []
        for stack in stacks:
            stack.stand_ins[0].catch = lambda _, stack=stack: called.append(stack)
        with suppress(Exception), torch.no_grad():  # what a block returns is not known yet, and there may be no head
            self._model(**self._inputs(self._tokens[:1]))
        for stack in stacks:
            stack.stand_ins[0].catch = None
        return called + [stack for stack in stacks if stack not in called]

    def _read(self, key: str) -> Tensor:
        """The parameter called `key`, from its file; KeyError where there is none."""
        info = self._checkpoint.tensors[self._tensor_of.get(key) or self._tensor_of[self._ties[key]]]
        return read_tensor(self._checkpoint.path(info.file), info)


def _hidden(arguments: Arguments) -> Tensor:
    args, kwargs = arguments
    hidden = args[0] if args else kwargs["hidden_states"]
    assert isinstance(hidden, Tensor)
    return hidden


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    path, _, last = name.rpartition(".")
    module.get_submodule(path)._parameters[last] = nn.Parameter(value, requires_grad=False)


def _moved(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """The same structure with its tensors on `device`, those of floats in `dtype`."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, tuple):
        return tuple(_moved(part, device, dtype) for part in value)
    if isinstance(value, dict):
        return {key: _moved(part, device, dtype) for key, part in value.items()}
    return value
