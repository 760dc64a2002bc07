"""Token embeddings: which tables they are, and which of them can have bits and an adapter.

PEFT's adapter on an embedding repairs what is looked up there, and nothing else that uses the same weight: not a head
that is tied to it, nor another table. (With `ensure_weight_tying` PEFT 0.21 has the head's adapter follow, but a merge
then adds it to the one weight twice, and `packed` has no dense weight that could be shared.) So such a weight is
refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from torch import nn

from loftq_cli.checkpoint.reader import TensorInfo
from loftq_cli.errors import LoftqError
from loftq_cli.experts import FLOATS
from loftq_cli.layers import kept_in_float32

if TYPE_CHECKING:
    from loftq_cli.targets import Targets

UNTIE = (
    "leave it out; or untie them first: save the model with `tie_word_embeddings` false, and its head with a weight of "
    "its own"
)


@dataclass(frozen=True)
class TokenEmbedding:
    """A table that tokens are looked up in: its module, why it cannot be quantized, or None, and what to do then."""

    module: str
    why_not: str | None = None
    way_out: str = "leave it out"


def find_embeddings(
    model: Any, tensors: Mapping[str, TensorInfo], module_of: Mapping[str, str]
) -> dict[str, TokenEmbedding]:
    """The tables of `model` and of the models in it, as of an encoder and a decoder, by the names of their tensors.

    Args:
        model: on the meta device.
        tensors: of the checkpoint.
        module_of: tensor name → module name.
    """
    tables = _tables(model)
    found = {}
    for tensor, info in tensors.items():
        name = module_of.get(tensor)
        if name in tables and tensor.endswith(".weight"):
            found[tensor] = _examine(model, name, tables[name], info)
    return found


def _tables(model: Any) -> dict[str, nn.Embedding]:
    from transformers import PreTrainedModel

    tables = set[int]()
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            with suppress(Exception):  # how it says that it has none is up to the model's own code
                tables.add(id(part.get_input_embeddings()))
    return {name: m for name, m in model.named_modules() if id(m) in tables and isinstance(m, nn.Embedding)}


def _examine(model: Any, name: str, table: nn.Embedding, info: TensorInfo) -> TokenEmbedding:
    head = model.get_output_embeddings()
    if type(table) is not nn.Embedding or table.max_norm is not None:
        return TokenEmbedding(name, f"its {type(table).__name__} is not quite torch's `Embedding`")
    names = [other for other, module in model.named_modules(remove_duplicate=False) if module is table]
    if others := [*_tied_to(model, f"{name}.weight"), *(f"{other}.weight" for other in names if other != name)]:
        listed = ", ".join(f"`{other}`" for other in others)
        why = f"it is tied to {listed}, which would be quantized with it, and not repaired by its adapter"
        heads = [f"{other}.weight" for other, module in model.named_modules() if module is head]
        return TokenEmbedding(name, why, UNTIE if others == heads else "leave it out")
    if isinstance(head, nn.Linear) and head.out_features == table.embedding_dim != table.num_embeddings:
        why = f"the head ends in its {table.embedding_dim} features: it is multiplied by there, past its adapter"
        return TokenEmbedding(name, why)
    if kept := kept_in_float32(model, name):
        return TokenEmbedding(name, f"transformers keeps `{kept}` in float32")
    dtype = str(info.dtype).removeprefix("torch.")
    return TokenEmbedding(name, None if info.dtype in FLOATS else f"it is stored as {dtype}")


def _tied_to(model: Any, key: str) -> list[str]:
    """What else has the parameter of this name."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    first = tied.get(key, key)
    return [other for other in dict.fromkeys([first, *tied]) if other != key and tied.get(other, other) == first]


def with_embeddings(targets: Targets, model: str, skip: Sequence[str]) -> Targets:
    """`targets` with the token embeddings among the linears; what globs of `skip` match may be unfit, and stays.

    Raises:
        LoftqError: there are none, or one cannot be quantized.
    """
    if not targets.embeddings:
        raise LoftqError(f"`--quantize-embeddings`: no token embeddings were found in `{model}`", "leave it out")
    for tensor, table in targets.embeddings.items():
        if table.why_not is not None and not any(fnmatchcase(table.module, glob) for glob in skip):
            what = f"`--quantize-embeddings`: `{tensor}` must stay as it is, for {table.why_not}"
            others = any(other.why_not is None for other in targets.embeddings.values())
            raise LoftqError(what, table.way_out + (f", or add `--skip '{table.module}'`" if others else ""))
    return replace(
        targets,
        linears={**targets.linears, **{tensor: table.module for tensor, table in targets.embeddings.items()}},
        skipped={name: why for name, why in targets.skipped.items() if name not in targets.embeddings},
    )
