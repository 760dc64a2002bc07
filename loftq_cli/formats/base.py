"""What an output format is: from a `QuantizedWeight` to the tensors and the config key that its loader reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from loftq_cli.quantizers.base import QuantizedWeight

if TYPE_CHECKING:
    from loftq_cli.plan import Plan


class Format(Protocol):
    """A format is a module with these names; one row in `FORMATS` adds it."""

    name: str
    requirements: tuple[str, ...]  # what pip must install to load the checkpoint, beside transformers and peft
    quantizers: tuple[str, ...]  # names of quantizers it can store, the preferred one first

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
