"""What stands in a model in the place of its transformer blocks, and tells what the model passes to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from loftq_cli.errors import LoftqError, is_unrepeatable

WAY_OUT = "use a weight-only method, `--method loftq`"
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class _ReachedError(Exception):
    """What was wanted of a call is there: the rest of it is not needed."""


def reached() -> None:
    """End a call inside `until_reached`."""
    raise _ReachedError


def until_reached() -> suppress:
    """A context that ends where `reached` is called."""
    return suppress(_ReachedError)


@contextmanager
def calling(what: str, way_out: str = WAY_OUT) -> Iterator[None]:
    """Inside, whatever a model raises becomes a refusal: it is as much as is known of why it cannot be run."""
    try:
        yield
    except (LoftqError, _ReachedError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if is_unrepeatable(error):  # then training tries again without
            raise
        told = (str(error) or "?").splitlines()[0]
        raise LoftqError(
            f"{what} cannot be run on text by itself: {type(error).__name__}: {told}",
            way_out,
        ) from error


class Stack:
    """A list of transformer blocks: `path` is its module name, `blocks` the real ones, `stand_ins` are in the model."""

    def __init__(self, model: nn.Module, path: str) -> None:
        self.path = path
        modules = model.get_submodule(path)
        if not isinstance(modules, nn.ModuleList):
            raise LoftqError(f"`{path}` is no list of blocks", WAY_OUT)
        self.blocks = list(modules)
        self.stand_ins = [StandIn(block) for block in self.blocks]
        self._modules = modules
        for i, stand_in in enumerate(self.stand_ins):
            modules[i] = stand_in

    def put_back(self) -> None:
        """Give the model its blocks again."""
        for i, block in enumerate(self.blocks):
            self._modules[i] = block


def not_called(stack: Stack) -> LoftqError:
    """What is said of blocks that text does not reach."""
    return LoftqError(
        f"the model does not call its blocks `{stack.path}` for text",
        f"leave them as they are with `--skip '{stack.path}.*'`, or {WAY_OUT}",
    )


class StandIn(nn.Module):
    """In a block's place: gives back the hidden states that it is called with, or `replay`, or what `compute` makes."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["block"] = block  # not a child: the model must not see its parameters
        self.catch: Callable[[Arguments], None] | None = None  # told of every call
        self.replay: Tensor | None = None
        self.compute: Callable[..., Any] | None = None
        self.idle = False  # do not compute
        self.extras: tuple[Any, ...] | None = None  # what the block returns beside hidden states; None: a bare tensor

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # models ask a layer for its kind of attention, say
            return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Be called in the block's place."""
        if self.catch is not None:
            self.catch((args, kwargs))
        if self.compute is not None and not self.idle:
            return self.compute(*args, **kwargs)
        hidden = hidden_of((args, kwargs)) if self.replay is None else self.replay
        return hidden if self.extras is None else (hidden, *self.extras)


def hidden_of(arguments: Arguments) -> Tensor:
    """The hidden states among what a block is called with."""
    args, kwargs = arguments
    hidden = args[0] if args else kwargs["hidden_states"]
    assert isinstance(hidden, Tensor)
    return hidden


def inputs_for(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """What a model is called with for tokens [samples, seqlen]: behind an encoder, a decoder is to say the same."""
    if not getattr(model.config, "is_encoder_decoder", False):
        return {"input_ids": tokens}
    start = getattr(model.config, "decoder_start_token_id", None)
    said = tokens if start is None else torch.cat([torch.full_like(tokens[:, :1], start), tokens[:, :-1]], 1)
    return {"input_ids": tokens, "decoder_input_ids": said}


def for_windows(model: Any) -> None:
    """Let a model keep no keys and values of earlier tokens, and take none for padding."""
    for module in model.modules():  # a T5's decoder has a configuration of its own
        if getattr(getattr(module, "config", None), "use_cache", None):
            module.config.use_cache = False
    with suppress(ValueError):  # there are several
        text = model.config.get_text_config()
        if getattr(text, "pad_token_id", None) is None:  # then classifiers would refuse more than one sample at a time
            text.pad_token_id = -1  # which no token is
