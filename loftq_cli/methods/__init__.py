"""Methods: from a weight to a quantized weight and factors.

To add one, write its file and its row in `METHODS`; or in `GRAM_METHODS`, if it needs the Gram matrix of the inputs.
"""

from loftq_cli.methods.base import Decomposition, Method, Timed, seed_for, squared_norm, untimed
from loftq_cli.methods.cloq import cloq
from loftq_cli.methods.inputs import GramMethod, Inputs
from loftq_cli.methods.loftq import loftq
from loftq_cli.methods.qera import qera
from loftq_cli.methods.qlora import embedding_start, qlora, without_factors, zero_start

METHODS: dict[str, Method] = {
    "loftq": loftq,
    "qlora": qlora,
}

GRAM_METHODS: dict[str, GramMethod] = {
    "qera": qera,
    "cloq": cloq,
}

__all__ = [
    "GRAM_METHODS",
    "METHODS",
    "Decomposition",
    "GramMethod",
    "Inputs",
    "Method",
    "Timed",
    "cloq",
    "embedding_start",
    "loftq",
    "qera",
    "qlora",
    "seed_for",
    "squared_norm",
    "untimed",
    "without_factors",
    "zero_start",
]
