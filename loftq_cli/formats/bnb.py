"""bitsandbytes NF4, single or double quantization, written without bitsandbytes: same names, same bytes.

Layout: bitsandbytes `QuantState.as_dict(packed=True)` and transformers `quantizer_bnb_4bit.py`, read at 0.50.2 and
5.23. Loads through the `bitsandbytes` quantization method of transformers.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loftq_cli.errors import LoftqError
from loftq_cli.formats.base import stored, why_not_tables
from loftq_cli.quantizers.base import QuantizedWeight, dequantize
from loftq_cli.quantizers.nested import NESTED_BLOCK, NestedScale, unnest
from loftq_cli.quantizers.packing import pack_nibbles, unpack_nibbles

if TYPE_CHECKING:
    from loftq_cli.plan import Plan

name = "bnb"
requirements: tuple[str, ...] = ("bitsandbytes>=0.46.1",)
quantizers: tuple[str, ...] = ("nf",)
load_notes: tuple[str, ...] = (
    "on CPUs with AVX512-BF16, an eval-mode forward makes bitsandbytes repack its weights for inference; gradients, "
    "and outputs of an adapter attached later, are wrong from then on: call `.train()` before the first forward, or "
    "first set `support_avx512bf16_for_cpu = False` on every `Linear4bit`",
)

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
OFFSET_CHARACTERS = 24  # the longest that JSON writes a float64


def why_not(plan: Plan) -> str | None:
    """Refuse what bitsandbytes has no NF4 for, and module names that its loader would mix up."""
    if problem := why_not_tables(plan):
        return problem
    if expert := next((job for job in plan.jobs if job.expert is not None), None):
        return f"its loader would leave experts in 16 bits (`{expert.module}`)"
    for job in plan.jobs:
        if job.quantizer != "nf" or job.bits != 4:
            return f"it stores `nf` at 4 bits only, not `{job.quantizer}` at {job.bits} bits (`{job.tensor}`)"
        if job.group_size not in BLOCK_SIZES:
            sizes = ", ".join(map(str, BLOCK_SIZES))
            return f"bitsandbytes has blocks of {sizes} values, not {job.group_size} (`{job.tensor}`)"
        if job.dtype not in DTYPES:
            return f"bitsandbytes has no {job.dtype} (`{job.tensor}`)"
    if plan.targets.linear_subclass is not None:
        return f"its loader passes over `{plan.targets.linear_subclass}`, which is not quite torch's `Linear`"
    if plan.skipped_linears:
        # transformers' `should_convert_module`: a listed name is a regex for the start of a name, or its end
        starts = re.compile(rf"(?:{'|'.join(plan.skipped_linears)})(?:(?<=\.)|(?=\.|$))")
        for job in plan.jobs:
            if starts.match(job.module) or job.module.endswith(plan.skipped_linears):
                clashing = next(skip for skip in plan.skipped_linears if _disables(skip, job.module))
                return f"its loader cannot leave out `{clashing}` without leaving out `{job.module}`"
    return None


def value_dtype(source_dtype: torch.dtype) -> torch.dtype:
    """The source dtype: `quant_state` records it, and bitsandbytes dequantizes to it."""
    return source_dtype


def tensors(module: str, quantized: QuantizedWeight) -> dict[str, Tensor]:
    """See `Format.tensors`.

    Shapes: `weight` uint8 [ceil(m n / 2), 1]; `absmax` float32 [k = ceil(m n / g)], or uint8 [k] beside
    `nested_absmax` float32 [ceil(k / 256)] and `nested_quant_map` float32 [256]; `quant_map` float32 [16];
    `quant_state` JSON as uint8 [bytes].
    """
    q = quantized
    assert q.codebook is not None
    named = {"": pack_nibbles(q.codes), ".absmax": q.scale.float(), ".quant_map": q.codebook.float()}
    if q.nested is not None:
        named[".absmax"] = q.nested.codes
        named[".nested_absmax"] = q.nested.absmax
        named[".nested_quant_map"] = q.nested.codebook
    named[".quant_state.bitsandbytes__nf4"] = _quant_state(q)
    return {f"{module}.weight{suffix}": tensor for suffix, tensor in named.items()}


def read(module: str, tensors: dict[str, Tensor], like: QuantizedWeight) -> Tensor:
    """See `Format.read`.

    Raises:
        LoftqError: a tensor is missing or is not what `like` says it is.
    """
    m, n = like.shape
    weight = f"{module}.weight"
    blocks = math.ceil(m * n / like.group_size)
    packed = stored(tensors, weight, torch.uint8, (math.ceil(m * n / 2), 1))
    codebook = stored(tensors, f"{weight}.quant_map", torch.float32, (16,))
    offset = _read_offset(tensors, weight, like)
    if like.nested is None:
        scale = stored(tensors, f"{weight}.absmax", torch.float32, (blocks,))
    else:
        codes = stored(tensors, f"{weight}.absmax", torch.uint8, (blocks,))
        absmax = stored(tensors, f"{weight}.nested_absmax", torch.float32, (math.ceil(blocks / NESTED_BLOCK),))
        nested_map = stored(tensors, f"{weight}.nested_quant_map", torch.float32, (256,))
        scale = unnest(NestedScale(codes, absmax, nested_map, torch.tensor(offset)))
    codes = unpack_nibbles(packed, like.shape)
    return dequantize(replace(like, codes=codes, scale=scale, codebook=codebook, nested=None))


def quantization_config(plan: Plan) -> dict[str, Any] | None:
    """See `Format.quantization_config`: computes in the source's dtype, and names every linear left alone."""
    compute_dtype = reduce(torch.promote_types, (job.dtype for job in plan.jobs))
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": plan.config.double_quant,
        "bnb_4bit_compute_dtype": DTYPES[compute_dtype],
        "bnb_4bit_quant_storage": "uint8",
        # a list, even if empty: transformers reads null as "skip the output head, whatever its name"
        "llm_int8_skip_modules": list(plan.skipped_linears),
    }


def _disables(skip: str, module: str) -> bool:
    return bool(re.match(rf"(?:{skip})(?:(?<=\.)|(?=\.|$))", module)) or module.endswith(skip)


def _quant_state(q: QuantizedWeight) -> Tensor:
    """The JSON that bitsandbytes keeps beside the weight, uint8 [bytes].

    `nested_offset` depends on the weight and its digits vary in number; spaces, which JSON ignores, fill it up to a
    fixed length, since file headers are computed before any weight is read.
    """
    offset = 0.0 if q.nested is None or q.nested.offset.is_meta else float(q.nested.offset.item())
    fields = _fields(q)
    text = json.dumps(fields if q.nested is None else fields | {"nested_offset": offset})
    length = 0 if q.nested is None else len(json.dumps(fields | {"nested_offset": 0})) - 1 + OFFSET_CHARACTERS
    # not on the weight's GPU, where it would have to be waited for
    device = "meta" if q.codes.is_meta else "cpu"
    return torch.tensor(list(text.ljust(length).encode()), dtype=torch.uint8, device=device)


def _fields(q: QuantizedWeight) -> dict[str, Any]:
    fields = {"quant_type": "nf4", "blocksize": q.group_size, "dtype": DTYPES[q.dtype], "shape": list(q.shape)}
    if q.nested is not None:
        fields |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
    return fields


def _read_offset(tensors: dict[str, Tensor], weight: str, like: QuantizedWeight) -> float:
    """Check the stored JSON against `like`, and return its `nested_offset` (0 without double quantization)."""
    name = f"{weight}.quant_state.bitsandbytes__nf4"
    text = bytes(stored(tensors, name, torch.uint8, tuple(_quant_state(like).shape)).tolist())
    try:
        fields = json.loads(text)
        offset = float(fields.pop("nested_offset") if like.nested else 0)
    except (ValueError, KeyError, TypeError, AttributeError):
        fields, offset = None, 0.0
    if fields != _fields(like):
        raise LoftqError(f"`{name}` holds {text!r} where {json.dumps(_fields(like))} was expected")
    return offset
