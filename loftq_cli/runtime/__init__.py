"""Import this to load `packed` checkpoints with transformers: it registers their quantization method."""

from loftq_cli.runtime.embedding import PackedEmbedding
from loftq_cli.runtime.experts import PackedExperts
from loftq_cli.runtime.hf import PackedConfig, PackedQuantizer, register
from loftq_cli.runtime.layer import PackedLinear, PackedWrapper
from loftq_cli.runtime.scheme import Scheme

register(again=True)

__all__ = [
    "PackedConfig",
    "PackedEmbedding",
    "PackedExperts",
    "PackedLinear",
    "PackedQuantizer",
    "PackedWrapper",
    "Scheme",
]
