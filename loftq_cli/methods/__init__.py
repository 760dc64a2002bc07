"""Methods: from a weight to a quantized weight and factors. To add one, write its file and its row in `METHODS`."""

from loftq_cli.methods.base import Decomposition, Method, Timed, seed_for, squared_norm, untimed
from loftq_cli.methods.loftq import loftq
from loftq_cli.methods.qlora import qlora

METHODS: dict[str, Method] = {
    "loftq": loftq,
    "qlora": qlora,
}

__all__ = ["METHODS", "Decomposition", "Method", "Timed", "loftq", "qlora", "seed_for", "squared_norm", "untimed"]
