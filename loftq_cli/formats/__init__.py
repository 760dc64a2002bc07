"""Output formats: one module each, one row each."""

from __future__ import annotations

from loftq_cli.formats import bnb, compressed_tensors, dense, gptq, packed
from loftq_cli.formats.base import Format, load_imports, make_quantizer

FORMATS: dict[str, Format] = {
    "bnb": bnb,
    "gptq": gptq,
    "compressed-tensors": compressed_tensors,
    "packed": packed,
    "dense": dense,
}

# what `--format auto` tries in turn; compressed-tensors trains dense in memory, so it is only taken when asked for
AUTO_ORDER = ("bnb", "gptq", "packed", "dense")

__all__ = ["AUTO_ORDER", "FORMATS", "Format", "load_imports", "make_quantizer"]
