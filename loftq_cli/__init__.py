"""loftq: a low-bit base checkpoint plus the LoRA adapter that repairs it."""

from __future__ import annotations

from typing import Any

__version__ = "0.5.0"
__all__ = ["__version__", "quantize"]


def __getattr__(name: str) -> Any:
    # `from loftq_cli import quantize` without paying for torch when only the version is wanted
    if name == "quantize":
        from loftq_cli.pipeline import quantize

        return quantize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
