"""Quantizers: tensors in, tensors out. To add one, write its file and its row in `QUANTIZERS`."""

from loftq_cli.quantizers.base import (
    QuantizedWeight,
    Quantizer,
    dequantize,
    expand_groups,
    quantize_residual,
    residual,
    stackable,
    unstack,
)
from loftq_cli.quantizers.codebook import Lloyd, NormalFloatSearch
from loftq_cli.quantizers.lloyd_fit import LloydFit
from loftq_cli.quantizers.nested import NestedScale
from loftq_cli.quantizers.normal_float import NormalFloat
from loftq_cli.quantizers.uniform import Uniform, UniformSymmetric

QUANTIZERS: dict[str, type] = {
    "uniform": Uniform,
    "uniform-symmetric": UniformSymmetric,
    "nf": NormalFloat,
    "nf-search": NormalFloatSearch,
    "lloyd": Lloyd,
    "lloyd-fit": LloydFit,
}

__all__ = [
    "QUANTIZERS",
    "Lloyd",
    "LloydFit",
    "NestedScale",
    "NormalFloat",
    "NormalFloatSearch",
    "QuantizedWeight",
    "Quantizer",
    "Uniform",
    "UniformSymmetric",
    "dequantize",
    "expand_groups",
    "quantize_residual",
    "residual",
    "stackable",
    "unstack",
]
