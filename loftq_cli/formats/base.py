"""What an output format is: from a `QuantizedWeight` to the tensors and the config key that its loader reads."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from loftq_cli.errors import LoftqError
from loftq_cli.quantizers import QUANTIZERS
from loftq_cli.quantizers.base import QuantizedWeight, Quantizer

if TYPE_CHECKING:
    from loftq_cli.plan import Plan

WRAPPED = "packed"  # the attribute of `runtime.layer.PackedWrapper`
SLICE = re.compile(r"(.+)\[(\d+)\]")  # as `checkpoint.reader` names slices of tensors


@dataclass(frozen=True)
class RemoteCode:
    """Python that travels in a checkpoint, for `trust_remote_code=True`: what config.json says of it, and its files."""

    auto_map: dict[str, str]
    files: dict[str, bytes]


class Format(Protocol):
    """A format is a module with these names; one row in `FORMATS` adds it.

    It may also have `load_imports` (modules that must be imported to load it), `keeps_layers` (true where the loaded
    model has the source's own layers, whose weights are parameters, not others in their place), `scale_dtype` (what
    the scales of `nf` are rounded to: float32 without it), `expert_name(place, suffix)`, see `stored_name`,
    `remote_code(plan)`, which makes a `RemoteCode`, or None, `remote_notes`, more `load_notes` where it has made one,
    and `wraps_layers` (true where layers can be loaded as the only part of another module, see `Place`).
    """

    name: str
    requirements: tuple[str, ...]  # what pip must install to load the checkpoint, beside transformers and peft
    quantizers: tuple[str, ...]  # names of quantizers it can store, the preferred one first
    load_notes: tuple[str, ...]  # what who loads it must know

    def why_not(self, plan: Plan) -> str | None:
        """Why this format cannot hold `plan`: a sentence that names the tensors, or None when it can."""
        ...

    def value_dtype(self, source_dtype: torch.dtype) -> torch.dtype:
        """The dtype that the loader's dequantized values are rounded to, for a weight stored as `source_dtype`."""
        ...

    def tensors(self, module: str, quantized: QuantizedWeight) -> dict[str, Tensor]:
        """The tensors to store for the weight of `module`, by their names in the file; works on the meta device."""
        ...

    def read(self, module: str, tensors: dict[str, Tensor], like: QuantizedWeight) -> Tensor:
        """Dequantize stored `tensors` (by their names in the file) as the loader does: float32 [m, n].

        `like` is `Quantizer.empty(m, n)` of the weight: shapes, bits and group size, no values.
        """
        ...

    def quantization_config(self, plan: Plan) -> dict[str, Any] | None:
        """The value of `quantization_config` in config.json, or None."""
        ...


@dataclass(frozen=True)
class Place:
    """Where a weight is in the source: the name of its tensor, or of a slice of one, and whether that is transposed.

    `wrapped`: its layer is loaded as the `WRAPPED` of a module that has the layer's name.
    """

    tensor: str
    transposed: bool = False
    is_expert: bool = False
    wrapped: bool = False

    @property
    def prefix(self) -> str:
        """What the names of its quantized tensors begin with; a slice `a.b[3]` becomes `a.3.b`."""
        if not self.is_expert or not (match := SLICE.fullmatch(self.tensor)):
            return self.tensor.removesuffix(".weight") + f".{WRAPPED}" * self.wrapped
        path, _, last = match[1].rpartition(".")
        return f"{path}.{match[2]}.{last}"


def stored_name(output: Format, place: Place, suffix: str) -> str:
    """The name in the file of a tensor that `output.tensors` calls `suffix`, e.g. `.codes`, of a weight without name.

    Experts are called otherwise by formats with `expert_name`.
    """
    if place.is_expert and (rename := getattr(output, "expert_name", None)) is not None:
        return str(rename(place, suffix))
    return place.prefix + suffix


def to_store(output: Format, place: Place, quantized: QuantizedWeight) -> dict[str, Tensor]:
    """`output.tensors`; of a weight that the source has transposed, transposed where the layer stays the source's."""
    made, turned = output.tensors("", quantized), _turned(output, place.transposed)
    return {
        stored_name(output, place, suffix): tensor.mT.contiguous() if turned else tensor
        for suffix, tensor in made.items()
    }


def from_store(output: Format, place: Place, tensors: dict[str, Tensor], like: QuantizedWeight) -> Tensor:
    """`output.read` of what `to_store` made."""
    turned = _turned(output, place.transposed)
    found = {}
    for suffix in output.tensors("", like):
        tensor = tensors.get(stored_name(output, place, suffix))
        if tensor is not None:
            found[place.prefix + suffix] = tensor.mT if turned else tensor
    return output.read(place.prefix, found, like)


def _turned(output: Format, transposed: bool) -> bool:
    return transposed and getattr(output, "keeps_layers", False)


def why_not_tables(plan: Plan) -> str | None:
    """Why a format for the linear layers of a model alone cannot hold `plan`, or None."""
    if plan.quantizes_head:
        return "output heads are quantized in `packed` and `dense`"
    if any(job.embedding for job in plan.jobs):
        return "embeddings are quantized in `packed` and `dense`"
    return None


def load_imports(output: Format) -> tuple[str, ...]:
    """What must be imported to load the format."""
    return getattr(output, "load_imports", ())


def make_quantizer(
    output: Format, quantizer: str, bits: int, group_size: int, source_dtype: torch.dtype, double_quant: bool
) -> Quantizer:
    """The quantizer of that name, with scales and values rounded as `output` stores them and its loader makes them."""
    options: dict[str, Any] = {"double_quant": True} if double_quant else {}
    if quantizer == "nf" and not double_quant:
        options["scale_dtype"] = getattr(output, "scale_dtype", torch.float32)
    made: Quantizer = QUANTIZERS[quantizer](
        bits=bits, group_size=group_size, dtype=output.value_dtype(source_dtype), **options
    )
    return made


def stored(tensors: dict[str, Tensor], name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The stored tensor called `name`, which must have this dtype and shape.

    Raises:
        LoftqError: it is missing, or it is another one.
    """
    if name not in tensors:
        raise LoftqError(f"the checkpoint has no tensor `{name}`")
    tensor = tensors[name]
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        found = f"{tensor.dtype} {list(tensor.shape)}".removeprefix("torch.")
        raise LoftqError(f"`{name}` is {found} where {str(dtype).removeprefix('torch.')} {list(shape)} was expected")
    return tensor
