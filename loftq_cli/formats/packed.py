"""`packed`: dense codes of 2, 3, 4 or 8 bits, for a grid or any codebook, loaded by `loftq_cli.runtime`.

Stored for each weight [m, n] with groups of g inputs, G = ceil(n / g) of them in a row, under its module's name (of a
table of embeddings, m tokens of n features):

    codes        int32 [m, ceil(n bits / 32)]   one little-endian bit stream a row, see `quantizers.packing.pack`
    codebook     float32 [2**bits]              `W ≈ codebook[codes] · scale`; without it `(codes − zero_point) · scale`
    zero_point   int32 [ceil(m G bits / 32)]    one such stream for the whole weight; without it 2**(bits − 1)
    scale        float16 [m, G]; or, double-quantized, uint8 [m, G], see `quantizers.nested`, beside
    scale_absmax float32 [ceil(m G / 256)] and scale_offset float32 [1]

The matrices of experts are tensors of one experts' module, `experts.3.w1_codes` and so on; of experts that the source
has in one tensor, `experts.3.gate_up_proj_codes`. (Were they modules called `w1`, PEFT would take them for targets.)
And a layer beside them that is called as they are, so that PEFT would take it for them, is loaded as the one part of a
wrapper: `shared_experts.gate_proj.packed.codes`.

Which modules are packed, and how, is said by name in `quantization_config`, so that one checkpoint can mix bits.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loftq_cli.formats.base import Place, RemoteCode, stored
from loftq_cli.quantizers.base import QuantizedWeight, dequantize
from loftq_cli.quantizers.nested import NESTED_BLOCK, NestedScale, dynamic_codebook, unnest
from loftq_cli.quantizers.packing import pack, unpack

if TYPE_CHECKING:
    from loftq_cli.experts import ExpertStack
    from loftq_cli.plan import Plan

name = "packed"
requirements: tuple[str, ...] = ()
quantizers: tuple[str, ...] = ("lloyd", "lloyd-fit", "nf-search", "nf", "uniform", "uniform-symmetric")
load_imports: tuple[str, ...] = ("loftq_cli.runtime",)
remote_notes: tuple[str, ...] = (
    "`trust_remote_code=True` runs the copy of loftq's loader in this folder: then loftq need not be installed",
)
load_notes: tuple[str, ...] = (
    "`import loftq_cli.runtime` is of loftq itself, which is installed from its source: `pip install -e .` in the "
    "folder that holds loftq's own `pyproject.toml`",
    "without such a loader, transformers says that it does not know `loftq_packed` and fills the layers with random "
    "numbers",
)
scale_dtype = torch.float16
wraps_layers = True

PARAMETERS = ({"gate_up_proj", "down_proj"}, {"up_proj", "down_proj"})  # of experts
METHOD = "loftq_packed"  # as `loftq_cli.runtime` registers it
BITS = (2, 3, 4, 8)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REMOTE_FILE = "modeling_loftq_packed"
TRAVELLING = (  # of this package
    "quantizers/nested",
    "quantizers/packing",
    "kernels/packed",
    "kernels/unpack",
    "kernels/product",
    "runtime/unpacking",
    "runtime/scheme",
    "runtime/weight",
    "runtime/layer",
    "runtime/embedding",
    "runtime/experts",
    "runtime/hf",
)


def why_not(plan: Plan) -> str | None:
    """Refuse what has no place in the layout: other widths, and blocks that span rows."""
    for job in plan.jobs:
        if job.bits not in BITS or job.dtype not in DTYPES:
            return f"it has no {job.bits} bits for {job.dtype} (`{job.tensor}`)"
        if job.quantizer == "nf" and job.group_size > 0 and job.shape[1] % job.group_size:
            return (
                f"blocks of {job.group_size} would span the rows of `{job.tensor}`, whose in_features are "
                f"{job.shape[1]}"
            )
    return _why_not_experts(plan)


def _why_not_experts(plan: Plan) -> str | None:
    """Refuse experts that no layer of `loftq_cli.runtime` could stand for."""
    jobs = Counter(job.expert.stack for job in plan.jobs if job.expert is not None)
    modules: dict[str, list[ExpertStack]] = {}
    for stack in plan.targets.stacks:
        modules.setdefault(stack.module, []).append(stack)
    for module, stacks in modules.items():
        if not any(jobs[stack] for stack in stacks):
            continue
        if plan.config.experts_adapter:
            return "PEFT adds what `--experts-adapter` makes to all experts of a layer at once, dense"
        if not all(stack.standard for stack in stacks) or {stack.parameter for stack in stacks} not in PARAMETERS:
            return f"it has no layer for the experts of `{module}`"
        if part := next((stack for stack in stacks if jobs[stack] < stack.count * len(stack.pieces)), None):
            return f"the experts of `{module}` are packed all or none, and some of `{part.parameter}` are left out"
    return None


def expert_name(place: Place, suffix: str) -> str:
    """See the top of this file."""
    return f"{place.prefix}_{suffix.removeprefix('.')}"


def value_dtype(source_dtype: torch.dtype) -> torch.dtype:
    """The source dtype: the layer multiplies in float32 and rounds to the dtype that it computes in."""
    return source_dtype


def tensors(module: str, quantized: QuantizedWeight) -> dict[str, Tensor]:
    """See `Format.tensors`; the shapes stand at the top of this file."""
    q = quantized
    m, n = q.shape
    named = {"codes": pack(q.codes, q.bits)}
    if q.codebook is not None:
        named["codebook"] = q.codebook
    elif not q.symmetric:
        assert q.zero_point is not None
        named["zero_point"] = pack(q.zero_point.reshape(1, -1), q.bits)[0]
    groups = (m, math.ceil(n / q.group_size))
    if q.nested is None:
        named["scale"] = q.scale.to(scale_dtype).reshape(groups)
    else:
        named["scale"] = q.nested.codes.reshape(groups)
        named["scale_absmax"] = q.nested.absmax
        named["scale_offset"] = q.nested.offset.reshape(1)
    return {f"{module}.{key}": tensor.contiguous() for key, tensor in named.items()}


def read(module: str, tensors: dict[str, Tensor], like: QuantizedWeight) -> Tensor:
    """See `Format.read`.

    Raises:
        LoftqError: a tensor is missing or is not what `like` says it is.
    """
    m, n = like.shape
    groups = math.ceil(n / like.group_size)

    def get(key: str, dtype: torch.dtype, *shape: int) -> Tensor:
        return stored(tensors, f"{module}.{key}", dtype, shape)

    codes = unpack(get("codes", torch.int32, m, math.ceil(n * like.bits / 32)), like.bits, n)
    codebook, zero_point = None, None
    if like.codebook is not None:
        codebook = get("codebook", torch.float32, 2**like.bits)
    elif like.symmetric:
        zero_point = torch.full((m, groups), 2 ** (like.bits - 1), dtype=torch.uint8, device=codes.device)
    else:
        words = get("zero_point", torch.int32, math.ceil(m * groups * like.bits / 32))
        zero_point = unpack(words[None], like.bits, m * groups).view(m, groups)
    if like.nested is None:
        scale = get("scale", scale_dtype, m, groups)
    else:
        absmax = get("scale_absmax", torch.float32, math.ceil(m * groups / NESTED_BLOCK))
        offset = get("scale_offset", torch.float32, 1)
        nested = NestedScale(
            get("scale", torch.uint8, m, groups).view(-1), absmax, dynamic_codebook(codes.device), offset
        )
        scale = unnest(nested).view(m, groups)
    return dequantize(replace(like, codes=codes, scale=scale, zero_point=zero_point, codebook=codebook, nested=None))


def quantization_config(plan: Plan) -> dict[str, Any] | None:
    """See `Format.quantization_config`: every packed module by its full name, under the scheme that it is packed by."""
    schemes: dict[tuple[int, int, str], list[str]] = {}
    by_piece: dict[tuple[ExpertStack, str], dict[int, tuple[int, int, str]]] = {}
    for job in plan.jobs:
        grid = {"uniform": "affine", "uniform-symmetric": "symmetric"}.get(job.quantizer, "codebook")
        scheme = (job.bits, job.group_size, grid)
        if job.expert is None:
            schemes.setdefault(scheme, []).append(job.loaded_module)
        else:
            by_piece.setdefault((job.expert.stack, job.expert.piece), {})[job.expert.expert] = scheme
    experts: dict[str, dict[str, list[str]]] = {}
    for (stack, piece), of in by_piece.items():
        experts.setdefault(stack.module, {})[stack.parameter] = list(stack.pieces)
        numbers = ["*"] if len(set(of.values())) == 1 else of
        for number, scheme in zip(numbers, of.values(), strict=False):
            schemes.setdefault(scheme, []).append(f"{stack.module}.{number}.{piece}")
    return {
        "quant_method": METHOD,
        "version": 1,
        "schemes": [
            {
                "bits": bits,
                "group_size": group_size,
                "grid": grid,
                "double_quant": plan.config.double_quant,
                "modules": modules,
            }
            for (bits, group_size, grid), modules in schemes.items()
        ],
        **({"experts": experts} if experts else {}),
    }


def remote_code(plan: Plan) -> RemoteCode | None:
    """The runtime's own files, flat, and model classes whose import registers it; None for a model of foreign code."""
    if plan.checkpoint.config.get("auto_map") or not plan.targets.model_classes:
        return None
    files = {}
    for path in TRAVELLING:
        text = (Path(__file__).parents[1] / f"{path}.py").read_text(encoding="utf-8")
        # transformers takes relative imports of neighbours only
        text = re.sub(r"from loftq_cli\.([\w.]+) import", lambda m: f"from .{_flat(m[1])} import", text)
        files[f"{_flat(path)}.py"] = text.encode()
    names = "".join(f'    "{name}",\n' for name in sorted(set(plan.targets.model_classes.values())))
    files[f"{REMOTE_FILE}.py"] = REMOTE_TEXT.format(names=names).encode()
    return RemoteCode({auto: f"{REMOTE_FILE}.{name}" for auto, name in plan.targets.model_classes.items()}, files)


def _flat(path: str) -> str:
    return "loftq_cli_" + re.sub(r"\W", "_", path)


REMOTE_TEXT = '''"""Loads this checkpoint without loftq installed: `from_pretrained(..., trust_remote_code=True)`."""

import transformers

from .loftq_cli_runtime_hf import register

register()

NAMES = (
{names})

# transformers' own classes under their own names, now that it knows what their layers are packed in
for name in NAMES:
    if hasattr(transformers, name):  # not every release has all
        globals()[name] = type(name, (getattr(transformers, name),), {{"__module__": __name__}})
'''
