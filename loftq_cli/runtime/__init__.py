"""Import this to load `packed` checkpoints with transformers: it registers their quantization method."""

from loftq_cli.runtime.hf import PackedConfig, PackedQuantizer, register
from loftq_cli.runtime.layer import PackedLinear, Scheme

register(again=True)

__all__ = ["PackedConfig", "PackedLinear", "PackedQuantizer", "Scheme"]
