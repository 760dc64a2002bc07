"""What blocks hand to one another beside hidden states, and whether they can be run one at a time all the same."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, MutableMapping, MutableSequence, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from loftq_cli.calibration.stand_in import WAY_OUT, Arguments, Stack, StandIn, for_windows, inputs_for, reached
from loftq_cli.errors import LoftqError

TOKENS = 8  # of a text, enough to see what a model passes to its blocks


def handed_on(name: str, known: Any, extras: tuple[Any, ...], is_taken: Callable[[Tensor], bool]) -> tuple[Any, ...]:
    """What goes to the other blocks beside hidden states, such as the position bias of T5's first block.

    Args:
        name: of the block.
        known: what it handed on for other text; None at first.
        extras: what it has just returned.
        is_taken: whether a later block is called with one of `extras`.

    Raises:
        LoftqError: a later block takes what is not the same for all texts.
    """

    def one_for_all(one: Any, other: Any) -> Any:
        if not isinstance(one, Tensor) or (isinstance(other, Tensor) and not one.is_meta and torch.equal(one, other)):
            return other
        if isinstance(other, Tensor) and not one.is_meta and is_taken(other):
            raise LoftqError(f"what `{name}` hands to other blocks depends on the text", WAY_OUT)
        # such as attention weights: nobody takes them, and to compute with what stays of them would fail
        return torch.empty_like(one, device="meta", requires_grad=False)

    return extras if known is None else tuple(tree_map(one_for_all, known, extras))


def takes(
    call: Callable[[], Any], stand_in: StandIn, later: Sequence[StandIn], extras: tuple[Any, ...], tensor: Tensor
) -> bool:
    """Whether one of the `later` blocks gets this very tensor of `extras` when `stand_in` hands them on.

    `call` calls the model.
    """
    found = False

    def catch(arguments: Arguments) -> None:
        nonlocal found
        found = found or any(leaf is tensor for leaf in tree_leaves(arguments))
        if found:
            reached()

    def catch_last(arguments: Arguments) -> None:
        catch(arguments)
        reached()

    before = [other.extras for other in (stand_in, *later)]
    stand_in.extras = extras
    for other in later:  # what they will return is not known yet: as much, of nothing
        other.catch, other.extras = catch, tuple(None for _ in extras)
    if later:
        later[-1].catch = catch_last  # a head may be large
        with suppress(Exception), torch.no_grad():
            call()
    for other, its in zip((stand_in, *later), before, strict=True):
        other.catch, other.extras = None, its
    return found


def refuse_shared(model: nn.Module, paths: Sequence[str], tokens: Tensor) -> None:
    """Refuse blocks that leave something for later ones in what both are called with, such as a dict of keys.

    Nothing is read: outside the blocks parameters become zeros that take no memory, and blocks run on the meta device.

    Args:
        model: from `build_to_run`.
        paths: of the stacks.
        tokens: int64 [samples, seqlen].

    Raises:
        LoftqError: there are such blocks.
    """
    stacks = [Stack(model, path) for path in paths]
    for_windows(model)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                module._parameters[name] = nn.Parameter(zeros, requires_grad=False)
    names = {stand_in: f"{stack.path}.{number}" for stack in stacks for number, stand_in in enumerate(stack.stand_ins)}
    calls: dict[str, tuple[StandIn, Arguments]] = {}
    for stand_in in names:

        def catch(arguments: Arguments, stand_in: StandIn = stand_in) -> None:
            calls[names[stand_in]] = stand_in, arguments
            if len(calls) == len(names):
                reached()

        stand_in.catch = catch
    with suppress(Exception), torch.no_grad():  # what a block returns is not known yet
        model(**inputs_for(model, tokens[:1, :TOKENS]))
    for stack in stacks:
        stack.put_back()
    _refuse_writers({name: (stand_in.__dict__["block"], arguments) for name, (stand_in, arguments) in calls.items()})


def _refuse_writers(calls: Mapping[str, tuple[nn.Module, Arguments]]) -> None:
    """Refuse a block that writes into what a later one is called with; `calls` are in order, by name."""
    named = {name: _by_name(block, arguments) for name, (block, arguments) in calls.items()}
    last = {id(value): name for name, values in named.items() for value in values.values()}
    for name, (block, (args, kwargs)) in calls.items():
        shared = {
            argument: (value, _content(value))
            for argument, value in named[name].items()
            if isinstance(value, MutableMapping | MutableSequence) and last[id(value)] != name
        }
        if not shared:
            continue
        whole = {id(value) for value, _ in shared.values()}
        on_meta = tuple(value if id(value) in whole else _on_meta(value) for value in args)
        by_name = {key: value if id(value) in whole else _on_meta(value) for key, value in kwargs.items()}
        with suppress(Exception), torch.no_grad():  # what it does with values cannot be known; it may have written
            functional_call(block, _on_meta(dict(block.named_buffers())), on_meta, by_name)
        for argument, (value, before) in shared.items():
            after = _content(value)
            if len(after) != len(before) or any(one is not other for one, other in zip(before, after, strict=True)):
                raise LoftqError(
                    f"`{name}` leaves something for later blocks in its argument `{argument}`, so that blocks cannot "
                    "be run one at a time",
                    WAY_OUT,
                )


def _by_name(block: nn.Module, arguments: Arguments) -> dict[str, Any]:
    args, kwargs = arguments
    return {**dict(zip(inspect.signature(block.forward).parameters, args, strict=False)), **kwargs}


def _content(value: MutableMapping[Any, Any] | MutableSequence[Any]) -> list[Any]:
    return [*value.keys(), *value.values()] if isinstance(value, MutableMapping) else list(value)


def _on_meta(value: Any) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.to("meta"), value)
