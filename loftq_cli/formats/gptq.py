"""GPTQ, version 2 layout (`gptq_v2`: zero points stored as they are), for uniform codes of 2, 3, 4 and 8 bits.

Layout and limits: GPTQModel 7.6 `nn_modules/qlinear`, optimum 2.3 `gptq/quantizer.py` (which replaces the layers that
transformers then fills). Stays packed in training.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loftq_cli.errors import LoftqError
from loftq_cli.formats.base import stored, why_not_tables
from loftq_cli.quantizers.base import QuantizedWeight, dequantize
from loftq_cli.quantizers.packing import pack, unpack

if TYPE_CHECKING:
    from loftq_cli.plan import Plan

name = "gptq"
requirements: tuple[str, ...] = ("gptqmodel>=7", "optimum>=2")
quantizers: tuple[str, ...] = ("uniform", "uniform-symmetric")
load_notes: tuple[str, ...] = (
    "on a CPU, gptqmodel compiles its dequantization in the first forward and needs a C++ compiler; without one, set "
    "`TORCHDYNAMO_DISABLE=1` in the environment before Python starts",
)

BITS = (2, 3, 4, 8)
GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)
# optimum's BLOCK_PATTERNS: where it expects the list of transformer blocks of a text model
BLOCK_PATHS = (
    "transformer.h",
    "model.decoder.layers",
    "gpt_neox.layers",
    "model.layers",
    "model.language_model.layers",
    "h",
    "decoder.layers",
    "layers",
)


def why_not(plan: Plan) -> str | None:
    """Refuse what optimum and GPTQModel would not load, or would load as something else."""
    return why_not_tables(plan) or _why_not_model(plan) or _why_not_jobs(plan)


def _why_not_model(plan: Plan) -> str | None:
    if plan.targets.main_input_name != "input_ids" or not plan.targets.architecture.endswith("ForCausalLM"):
        return f"its loader takes decoder-only text models, and `{plan.targets.architecture}` is none"
    if plan.targets.has_fused_experts:
        return f"its loader leaves the fused experts of `{plan.targets.architecture}` random"
    if plan.targets.linear_subclass is not None:
        return f"its loader passes over `{plan.targets.linear_subclass}`, which is not quite torch's `Linear`"
    outside = next((job.tensor for job in plan.jobs if job.block is None), None)
    if outside is not None or len(plan.block_paths) != 1:
        where = f"`{outside}` is in none" if outside else " and ".join(f"`{path}`" for path in plan.block_paths)
        return f"its loader takes layers of one list of blocks: {where}"
    if plan.block_paths[0] not in BLOCK_PATHS:
        return f"its loader does not know blocks at `{plan.block_paths[0]}`"
    kept = tuple(job.module for job in plan.jobs)
    if (turned := next((job.tensor for job in plan.jobs if job.transposed), None)) is not None:
        return f"its loader takes weights [out_features, in_features], and `{turned}` is transposed in this model"
    for skip in _skipped_inside(plan):
        if skip.endswith(kept):
            return f"its loader cannot leave out `{skip}`: its name ends in that of a quantized layer"
    return None


def _why_not_jobs(plan: Plan) -> str | None:
    first = plan.jobs[0]
    for job in plan.jobs:
        m, n = job.shape
        if job.quantizer not in quantizers:
            return f"it stores uniform codes, not `{job.quantizer}` (`{job.tensor}`)"
        if job.bits not in BITS or job.group_size not in GROUP_SIZES:
            return f"GPTQModel has no {job.bits} bits in groups of {job.group_size} (`{job.tensor}`)"
        for what in ("bits", "group_size"):
            if getattr(job, what) != getattr(first, what):
                return (
                    f"it holds one number of `{what}`, not {getattr(first, what)} (`{first.tensor}`) and "
                    f"{getattr(job, what)} (`{job.tensor}`)"
                )
        if m % 32 or n % 32:
            return f"both sides of a weight must be divisible by 32, those of `{job.tensor}` are {m} and {n}"
        if job.group_size > 0 and n % job.group_size:
            return f"the group size {job.group_size} does not divide in_features {n} of `{job.tensor}`"
    return None


def value_dtype(source_dtype: torch.dtype) -> torch.dtype:
    """float16, whatever the source's: GPTQModel keeps scales in float16 and multiplies in it."""
    return torch.float16


def tensors(module: str, quantized: QuantizedWeight) -> dict[str, Tensor]:
    """See `Format.tensors`.

    Shapes: `qweight` int32 [n bits / 32, m]; `qzeros` int32 [n / g, m bits / 32]; `scales` float16 [n / g, m];
    `g_idx` int32 [n], the group of each input.
    """
    q = quantized
    assert q.zero_point is not None
    return {
        f"{module}.qweight": pack(q.codes, q.bits).T.contiguous(),
        f"{module}.qzeros": pack(q.zero_point.T.contiguous(), q.bits),
        f"{module}.scales": q.scale.T.to(torch.float16).contiguous(),
        f"{module}.g_idx": _g_idx(q),
    }


def read(module: str, tensors: dict[str, Tensor], like: QuantizedWeight) -> Tensor:
    """See `Format.read`.

    Raises:
        LoftqError: a tensor is missing or is not what `like` says it is.
    """
    m, n = like.shape
    groups = like.scale.shape[1]
    qweight = stored(tensors, f"{module}.qweight", torch.int32, (n * like.bits // 32, m))
    qzeros = stored(tensors, f"{module}.qzeros", torch.int32, (groups, m * like.bits // 32))
    scales = stored(tensors, f"{module}.scales", torch.float16, (groups, m))
    g_idx = stored(tensors, f"{module}.g_idx", torch.int32, (n,))
    if not torch.equal(g_idx.cpu(), torch.arange(n, dtype=torch.int32) // like.group_size):
        raise LoftqError(f"`{module}.g_idx` does not number groups of {like.group_size} inputs")
    codes = unpack(qweight.T, like.bits, n)
    zero_point = unpack(qzeros, like.bits, m).T
    return dequantize(replace(like, codes=codes, scale=scales.T, zero_point=zero_point, dtype=torch.float16))


def quantization_config(plan: Plan) -> dict[str, Any] | None:
    """See `Format.quantization_config`: which layers are packed is said by block path and, if need be, by name."""
    job = plan.jobs[0]
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": job.bits,
        "group_size": job.group_size,
        "desc_act": False,
        "sym": all(job.quantizer == "uniform-symmetric" for job in plan.jobs),
        "lm_head": False,
        "checkpoint_format": "gptq_v2",
        "pack_dtype": "int32",
        "block_name_to_quantize": plan.block_paths[0],
        # `auto` would take kernels without a backward pass on GPUs (Marlin); the one that `auto_trainable` takes for
        # 4 bits on CPUs loses the gradients after an eval-mode forward
        "backend": "torch" if job.bits == 4 else "auto_trainable",
    }
    if _skipped_inside(plan):
        # without this the loader replaces every linear of the blocks, and fills those with garbage
        config["modules_in_block_to_quantize"] = [[job.module for job in plan.jobs]]
    return config


def _skipped_inside(plan: Plan) -> list[str]:
    """Linear layers that stay as they are and whose names start as the blocks' do: what the loader looks at."""
    return [skip for skip in plan.skipped_linears if skip.startswith(plan.block_paths[0])]


def _g_idx(q: QuantizedWeight) -> Tensor:
    n = q.shape[1]
    if q.codes.is_meta:  # a division on the meta device would import torch's compiler, for seconds
        return torch.empty(n, dtype=torch.int32, device="meta")
    # on the CPU, not on the weight's GPU, from where it would only have to come back
    return torch.arange(n, dtype=torch.int32) // q.group_size
