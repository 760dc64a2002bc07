"""The quantization method `loftq_packed` of transformers: reads which layers are packed, and puts them in place.

Hooks as of transformers 5.17 to 5.23 (`quantizers/base.py`, `quantizers/auto.py`).
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from loftq_cli.runtime.embedding import PackedEmbedding
from loftq_cli.runtime.experts import PackedExpert, PackedExperts, pack_experts, packed_pieces, unpack_experts
from loftq_cli.runtime.layer import PackedLinear, PackedWrapper
from loftq_cli.runtime.scheme import Scheme
from loftq_cli.runtime.weight import PackedLayer, become_dense

METHOD = "loftq_packed"
DTYPES_OF_BUFFERS = {  # by the ends of their names
    "codes": (torch.int32,),
    "zero_point": (torch.int32,),
    "codebook": (torch.float32,),
    "scale": (torch.float16, torch.uint8),
    "scale_absmax": (torch.float32,),
    "scale_offset": (torch.float32,),
}


class PackedConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed checkpoint: schemes, each with the full names of its modules.

    `experts` are modules of experts by name, each with the matrices that its parameters are made of (see `Pieces`).
    These have schemes under `{module}.{number}.{matrix}`, or `{module}.*.{matrix}` for those of all experts. A layer
    `{module}.packed` is in a `PackedWrapper`, which stands for the module that the model has.
    """

    def __init__(
        self,
        schemes: list[dict[str, Any]],
        version: int = 1,
        experts: dict[str, dict[str, list[str]]] | None = None,
        **_: Any,
    ) -> None:
        if version != 1:
            raise ValueError(f"this checkpoint is packed in version {version}, and only 1 is known: update loftq")
        self.quant_method = METHOD  # type: ignore[assignment]
        self.version = version
        self.schemes = schemes
        self.experts = experts or {}

    def by_module(self) -> dict[str, Scheme]:
        """The scheme of each packed module."""
        found = {}
        for entry in self.schemes:
            scheme = Scheme(entry["bits"], entry["group_size"], entry["grid"], entry["double_quant"])
            found.update(dict.fromkeys(entry["modules"], scheme))
        return found


class PackedQuantizer(HfQuantizer):
    """Loads, saves and dequantizes packed checkpoints; it cannot make them, `loftq quantize` can."""

    requires_calibration = True
    quantization_config: PackedConfig

    def _process_model_before_weight_loading(self, model: Any, dtype: torch.dtype | None = None, **_: Any) -> None:
        """Replace the named layers, on the meta device, where the loader then fills their buffers.

        Raises:
            ValueError: the model has none of these names, or one is no plain linear layer and no plain embedding.
        """
        schemes = self.quantization_config.by_module()
        experts = self.quantization_config.experts
        inside = tuple(f"{name}." for name in experts)
        absent = dict.fromkeys([*(name for name in schemes if not name.startswith(inside)), *experts])
        wanted = len(absent)
        # which the names lack, or have more, where a part of the model is loaded
        prefix = f"{model.base_model_prefix}."
        for name, layer in list(model.named_modules()):
            own = (name, prefix + name, name.removeprefix(prefix))
            named = next((n for n in (*own, *(f"{n}.packed" for n in own)) if n in absent), None)
            if named is None:
                continue
            absent.pop(named)
            if named in experts:
                pieces = {parameter: tuple(names) for parameter, names in experts[named].items()}

                def scheme(number: int, piece: str, named: str = named) -> Scheme:
                    return schemes.get(f"{named}.*.{piece}") or schemes[f"{named}.{number}.{piece}"]

                pack_experts(layer, pieces, scheme)
                continue
            if not isinstance(layer, nn.Linear | Conv1D) and type(layer) is not nn.Embedding:
                raise ValueError(f"`{named}` is packed in the checkpoint, and a {type(layer).__name__} in this model")
            packed = _packed_like(layer, schemes[named])
            model.set_submodule(name, packed if named in own else PackedWrapper(packed))
        if absent:
            found = f"{wanted - len(absent)} of the {wanted} packed layers of the checkpoint"
            text = f"{type(model).__name__} has {found}; it has no `{next(iter(absent))}`"
            if len(absent) == wanted:
                raise ValueError(text)
            warnings.warn(text, stacklevel=2)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        """Refuse what was not filled, for a packed layer cannot start at random, and what is of another dtype.

        Raises:
            ValueError: the checkpoint has no tensor for a buffer of a packed layer, or one of another dtype.
        """
        devices = set(getattr(model, "hf_device_map", {}).values())
        marked = len(devices) <= 1 and "disk" not in devices  # else accelerate has moved the tensors, without the marks
        for name, layer in model.named_modules():
            for key, buffer in layer.named_buffers() if isinstance(layer, PackedLayer | PackedExpert) else ():
                if marked and not getattr(buffer, "_is_hf_initialized", False):
                    raise ValueError(f"the checkpoint has no tensor for `{name}.{key}`")
                if buffer.dtype not in DTYPES_OF_BUFFERS[next(end for end in DTYPES_OF_BUFFERS if key.endswith(end))]:
                    raise ValueError(f"`{name}.{key}` is {buffer.dtype} in the checkpoint: it is not a packed one")

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        named = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # as a saved config has it
        for layer in list(model.modules()):
            if isinstance(layer, PackedLayer):
                become_dense(layer, layer.dequantize(named or layer.compute_dtype))
            elif isinstance(layer, PackedExperts):
                unpack_experts(layer, named or layer.compute_dtype)
        _unwrap(model)
        _forget_code(model)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """Called by `save_pretrained`, ahead of config.json: no longer name layers that a merge has made dense."""
        _unwrap(model)
        packed = {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLayer)}
        if any(name.endswith(".base_layer") for name in packed):  # as they are called while an adapter is attached
            return None, {}
        _forget_code(model)
        experts = {name: module for name, module in model.named_modules() if isinstance(module, PackedExperts)}
        if not packed and not experts:
            self.remove_quantization_config(model)
            return None, {}
        schemes: dict[Scheme, list[str]] = {}
        for name, layer in packed.items():
            schemes.setdefault(layer.scheme, []).append(name)
        for name, module in experts.items():
            for piece, scheme in packed_pieces(module).items():
                schemes.setdefault(scheme, []).append(f"{name}.{piece}")
        self.quantization_config.experts = {
            name: {parameter: list(pieces) for parameter, pieces in module.pieces.items()}
            for name, module in experts.items()
        }
        self.quantization_config.schemes = [{**vars(scheme), "modules": names} for scheme, names in schemes.items()]
        return None, {}

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """`save_pretrained` writes the packed tensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on it are."""
        return True


def _packed_like(layer: nn.Linear | Conv1D | nn.Embedding, scheme: Scheme) -> PackedLayer:
    """A packed layer to stand for `layer`, on the meta device."""
    m, n = layer.weight.T.shape if isinstance(layer, Conv1D) else layer.weight.shape
    with torch.device("meta"):
        if isinstance(layer, nn.Embedding):
            return PackedEmbedding(m, n, layer.padding_idx, scheme, layer.weight.dtype)
        return PackedLinear(n, m, layer.bias is not None, scheme, layer.weight.dtype)


def _unwrap(model: Any) -> None:
    """Let layers that have become dense stand without their wrappers."""
    for layer in list(model.modules()):
        if isinstance(layer, PackedWrapper):
            layer.packed = layer.packed


def _forget_code(model: Any) -> None:
    """No longer name the checkpoint's copy of this package, which is not saved with the model: the import loads it.

    A model that this copy has loaded is of a class of its own, whose code transformers saves, and names again.
    """
    named = getattr(model.config, "auto_map", None) or {}
    left = {auto: path for auto, path in named.items() if not str(path).startswith("modeling_loftq_packed.")}
    if left != named and not type(model).__module__.startswith("transformers_modules"):
        model.config.auto_map = left
        if not left:
            del model.config.auto_map


def register(again: bool = False) -> None:
    """Make the method known to transformers: a checkpoint's own copy if it is not, the package `again`."""
    if again or METHOD not in AUTO_QUANTIZER_MAPPING:
        AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = PackedConfig
        AUTO_QUANTIZER_MAPPING[METHOD] = PackedQuantizer
