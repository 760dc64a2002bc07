"""What a module of a model is, as far as it decides whether its weight may be quantized."""

from __future__ import annotations

import re
from typing import Any

import torch

from loftq_cli.checkpoint.reader import TensorInfo

ROUTERS = re.compile(r"(Router|Gate|Gating)$")  # names of classes
PLAIN_SUBCLASSES = ("FalconLinear", "EsmFoldLinear")  # of `nn.Linear`, which compute what it computes


def stored_as(info: TensorInfo) -> str:
    """The reason for skipping a weight of a dtype that no format has."""
    return f"stored as {str(info.dtype).removeprefix('torch.')}"


def retargeted_by_peft(model_type: str | None) -> tuple[str, ...]:
    """Last names that PEFT rewrites to fused experts while it loads an adapter (`_convert_peft_config_moe`)."""
    from transformers import conversion_mapping

    patterns = {"mixtral": "mixtral", **getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})}
    names = {"mixtral": ("gate", "w1", "w2", "w3"), "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj")}
    return names.get(patterns.get(model_type or "", ""), ())


def is_linear(module: torch.nn.Module) -> bool:
    """Whether it computes what `nn.Linear` computes, with a weight [out_features, in_features]."""
    return type(module) is torch.nn.Linear or type(module).__name__ in PLAIN_SUBCLASSES


def is_conv1d(module: torch.nn.Module) -> bool:
    """Whether it is GPT-2's linear layer, whose weight is [in_features, out_features]."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def is_replaceable(module: torch.nn.Module) -> bool:
    """Whether loaders put a quantized layer in this module's place unless they are told not to."""
    return isinstance(module, torch.nn.Linear) or is_conv1d(module)


def kind_of(module: torch.nn.Module) -> str:
    """The reason for skipping the weight of a module that is not a linear layer."""
    name = type(module).__name__
    if isinstance(module, torch.nn.Embedding) or "Embedding" in name:
        return "embedding"
    if "Norm" in name:
        return "norm"
    if "Conv" in name:
        return "convolution"
    return "router" if "Router" in name else f"not a linear layer ({name})"


def kept_in_float32(model: Any, name: str) -> str | None:
    """By which of its names transformers keeps the module in float32; its loaders quantize none that ends with one."""
    plain, strict = (getattr(model, f"_keep_in_fp32_modules{kind}", None) or () for kind in ("", "_strict"))
    found = (
        part for part in (*plain, *strict) if f".{part}." in f".{name}." or (part in plain and name.endswith(part))
    )
    return next(found, None)


def is_router(name: str, module: torch.nn.Linear, parent: Any, config: dict[str, Any]) -> bool:
    """Whether a linear layer of this name, in a module `parent`, is one that chooses experts."""
    text = config.get("text_config") or config
    counts = {text.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")}
    if "router" in name or (counts != {None} and ROUTERS.search(type(parent).__name__)):
        return True  # of any size: some models have experts beyond those counts, that do nothing
    last = name.rsplit(".", 1)[-1]
    return last in ("gate", "shared_expert_gate") and (module.out_features in counts or module.out_features == 1)
