"""The plain checkpoint with quantized values in place of the weights: loads and merges everywhere, saves no space."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loftq_cli.formats.base import Place, stored
from loftq_cli.quantizers.base import QuantizedWeight, dequantize

if TYPE_CHECKING:
    from loftq_cli.plan import Plan

name = "dense"
requirements: tuple[str, ...] = ()
quantizers: tuple[str, ...] = ("uniform", "uniform-symmetric", "nf", "nf-search", "lloyd", "lloyd-fit")
load_notes: tuple[str, ...] = ()
keeps_layers = True


def why_not(plan: Plan) -> str | None:
    """Any plan can be stored dense."""
    return None


def value_dtype(source_dtype: torch.dtype) -> torch.dtype:
    """The source dtype, which the values are stored in."""
    return source_dtype


def tensors(module: str, quantized: QuantizedWeight) -> dict[str, Tensor]:
    """See `Format.tensors`: `weight` [m, n] in the source dtype."""
    q = quantized
    if q.codes.is_meta:
        return {f"{module}.weight": torch.empty(q.shape, dtype=q.dtype, device="meta")}
    return {f"{module}.weight": dequantize(q).to(q.dtype)}


def expert_name(place: Place, suffix: str) -> str:
    """As in the source: experts of one tensor are slices of one tensor here, too."""
    return place.tensor


def read(module: str, tensors: dict[str, Tensor], like: QuantizedWeight) -> Tensor:
    """See `Format.read`.

    Raises:
        LoftqError: the tensor is missing or is not what `like` says it is.
    """
    return stored(tensors, f"{module}.weight", like.dtype, like.shape).float()


def quantization_config(plan: Plan) -> dict[str, Any] | None:
    """None: to its loader this is an ordinary checkpoint."""
    return None
