"""Output formats: one module each, one row each."""

from __future__ import annotations

from loftq_cli.formats import bnb, compressed_tensors, dense, gptq
from loftq_cli.formats.base import Format

FORMATS: dict[str, Format] = {
    "bnb": bnb,
    "gptq": gptq,
    "compressed-tensors": compressed_tensors,
    "dense": dense,
}

# what `--format auto` tries in turn; compressed-tensors trains dense in memory, so it is only taken when asked for
AUTO_ORDER = ("bnb", "gptq", "dense")
