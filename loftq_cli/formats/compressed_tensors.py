"""compressed-tensors `pack-quantized`, symmetric 2, 3, 4 and 8 bits: what vLLM serves.

Layout: compressed-tensors 0.20 `compressors/pack_quantized`; loading with `dequantize`: transformers 5.23
`integrations/compressed_tensors.py`.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loftq_cli.errors import LoftqError
from loftq_cli.formats.base import SLICE, stored, why_not_tables
from loftq_cli.quantizers.base import QuantizedWeight, dequantize
from loftq_cli.quantizers.packing import pack, unpack

if TYPE_CHECKING:
    from loftq_cli.plan import Plan

name = "compressed-tensors"
requirements: tuple[str, ...] = ("compressed-tensors>=0.20",)
quantizers: tuple[str, ...] = ("uniform-symmetric",)
load_notes: tuple[str, ...] = (
    "transformers dequantizes this base while loading it (`dequantize` in its config), so it takes the memory of an "
    "unquantized model",
)


def why_not(plan: Plan) -> str | None:
    """Refuse what transformers would load as something else.

    With `dequantize` it applies the first scheme of the config to every layer: a second bit width loads as garbage, and
    silently so if the first is the smaller. And it drops what is not packed from the experts that it fuses.
    """
    if problem := why_not_tables(plan):
        return problem
    if plan.config.experts_adapter:
        return "experts get an adapter in `dense` alone"
    if plan.targets.has_fused_experts and (problem := _why_not_experts(plan)):
        return problem
    first = plan.jobs[0]
    for job in plan.jobs:
        if job.transposed:
            return f"its loader passes over `Conv1D`, which `{job.module}` is"
        if job.quantizer != "uniform-symmetric":
            return f"it stores `uniform-symmetric` codes, not `{job.quantizer}` (`{job.tensor}`)"
        for what in ("bits", "group_size"):
            if getattr(job, what) != getattr(first, what):
                return (
                    f"its loader takes one number of `{what}` for all layers, not {getattr(first, what)} "
                    f"(`{first.tensor}`) and {getattr(job, what)} (`{job.tensor}`)"
                )
        if job.group_size > 0 and job.shape[1] % job.group_size:
            return f"the group size {job.group_size} does not divide in_features {job.shape[1]} of `{job.tensor}`"
    return None


def _why_not_experts(plan: Plan) -> str | None:
    """It dequantizes experts that the files have one by one, all of them, before transformers puts them together."""
    jobs = Counter(job.expert.stack for job in plan.jobs if job.expert is not None)
    for job in plan.jobs:
        if job.expert is not None and SLICE.fullmatch(job.tensor):
            return f"its loader takes experts that the files have one by one, and `{job.tensor}` is part of a tensor"
        if job.expert is not None and job.dtype != torch.float16:
            kind = str(job.dtype).removeprefix("torch.")
            return f"its loader leaves experts in the dtype of their scales, and `{job.tensor}` is {kind}, not float16"
    for stack in plan.targets.stacks:
        if jobs[stack] < stack.count * len(stack.pieces):
            return f"its loader finds no weights for the experts of `{stack.module}` unless all are quantized"
    if not plan.targets.stacks:
        return f"its loader finds no weights for the experts of `{plan.targets.architecture}`"
    return None


def value_dtype(source_dtype: torch.dtype) -> torch.dtype:
    """float16 for all but bfloat16: the library multiplies in the dtype of the scales, then casts to the model's."""
    return torch.bfloat16 if source_dtype == torch.bfloat16 else torch.float16


def tensors(module: str, quantized: QuantizedWeight) -> dict[str, Tensor]:
    """See `Format.tensors`.

    Shapes: `weight_packed` int32 [m, ceil(n bits / 32)], unsigned codes along the inputs; `weight_scale` [m, n / g];
    `weight_shape` int64 [2].
    """
    q = quantized
    return {
        f"{module}.weight_packed": pack(q.codes, q.bits),
        f"{module}.weight_scale": q.scale.to(_scale_dtype(q)).contiguous(),
        f"{module}.weight_shape": torch.tensor(q.shape, dtype=torch.int64, device=q.codes.device),
    }


def read(module: str, tensors: dict[str, Tensor], like: QuantizedWeight) -> Tensor:
    """See `Format.read`.

    Raises:
        LoftqError: a tensor is missing or is not what `like` says it is.
    """
    m, n = like.shape
    packed = stored(tensors, f"{module}.weight_packed", torch.int32, (m, math.ceil(n * like.bits / 32)))
    scale = stored(tensors, f"{module}.weight_scale", _scale_dtype(like), tuple(like.scale.shape))
    shape = stored(tensors, f"{module}.weight_shape", torch.int64, (2,))
    if tuple(shape.tolist()) != like.shape:
        raise LoftqError(f"`{module}.weight_shape` says {shape.tolist()}, the weight is {list(like.shape)}")
    codes = unpack(packed, like.bits, n)
    zero_point = torch.full_like(scale, 2 ** (like.bits - 1), dtype=torch.uint8)
    return dequantize(replace(like, codes=codes, scale=scale, zero_point=zero_point))


def quantization_config(plan: Plan) -> dict[str, Any] | None:
    """See `Format.quantization_config`: one scheme for every linear but those listed under `ignore`."""
    job = plan.jobs[0]
    weights: dict[str, Any] = {"num_bits": job.bits, "type": "int", "symmetric": True, "dynamic": False}
    if job.group_size > 0:
        weights |= {"strategy": "group", "group_size": job.group_size}
    else:
        weights |= {"strategy": "channel"}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        # without it a fresh module has no `weight`, and PEFT cannot attach an adapter to it
        "dequantize": True,
        "ignore": list(plan.skipped_linears),
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
            }
        },
    }


def _scale_dtype(q: QuantizedWeight) -> torch.dtype:
    """The dtype to store the scales in, which is also the one that the library rounds the products to.

    So that values are rounded once, as `q.dtype` says: in that dtype if the scales are of it, else in float32, from
    which the cast to the model's dtype rounds.
    """
    return q.dtype if q.scale.dtype == q.dtype else torch.float32
