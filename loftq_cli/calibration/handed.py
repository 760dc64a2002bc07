"""What blocks hand to one another beside hidden states, and whether they can be run one at a time all the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from loftq_cli.calibration.stand_in import WAY_OUT, Arguments, StandIn, reached
from loftq_cli.errors import LoftqError


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
