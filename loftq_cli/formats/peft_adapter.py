"""The PEFT adapter: names, the division by the scaling, and adapter_config.json.

Methods return factors for scaling 1, that is W ≈ dequantize(Q) + lora_B @ lora_A. PEFT multiplies the product by
`alpha / rank` (or `alpha / sqrt(rank)`), so what is stored must be divided by it, and here is the only place that does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loftq_cli.formats.base import WRAPPED

if TYPE_CHECKING:
    from loftq_cli.plan import Plan


PREFIX = "base_model.model."  # of all names in adapter_model.safetensors


def scaling(rank: int, alpha: float, rslora: bool) -> float:
    """What PEFT multiplies `lora_B @ lora_A` by (`LoraLayer.update_layer`; rslora: arXiv 2312.03732)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def loaded_name(module: str, wrapped: bool) -> str:
    """What the loaded model calls the layer of `module`, see `Place`."""
    return f"{module}.{WRAPPED}" if wrapped else module


def tensor_names(module: str, embedding: bool = False) -> tuple[str, str]:
    """The names of the factors in adapter_model.safetensors, for the module name of the loaded model."""
    if embedding:
        return f"{PREFIX}{module}.lora_embedding_A", f"{PREFIX}{module}.lora_embedding_B"
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


def of_embedding(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """`lora_A` [r, n] and `lora_B` [m, r] of a table [m, n] as PEFT has them there; or these as `lora_A`, `lora_B`.

    It looks tokens up in `lora_embedding_A` [r, m], and multiplies by `lora_embedding_B` [n, r]: each is the other
    factor, transposed.
    """
    return second.mT.contiguous(), first.mT.contiguous()


@dataclass(frozen=True)
class StackedFactors:
    """Where the factors of one matrix are, of a parameter that PEFT adapts as a whole, [experts, ...].

    PEFT has lora_A [experts · pieces · r, n], one expert after the other, and lora_B [pieces · m, pieces · r · experts]
    where the expert counts fastest (`ParamWrapper.get_delta_weight`). Pieces, matrices [m, n] that the parameter has
    one on top of the other, each have factors of their own: lora_B is zero beside them.
    """

    lora_A: str
    lora_B: str
    experts: int
    pieces: int
    expert: int
    piece: int

    def views(self, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
        """The part of this matrix in the whole tensors: [r, n] and [m, r]."""
        r, m = len(lora_A) // (self.experts * self.pieces), len(lora_B) // self.pieces
        first = (self.expert * self.pieces + self.piece) * r
        columns = slice(self.piece * r * self.experts + self.expert, (self.piece + 1) * r * self.experts, self.experts)
        return lora_A[first : first + r], lora_B[self.piece * m : (self.piece + 1) * m, columns]


def stored_factors(lora_A: Tensor, lora_B: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Divide the scaling out of the factors, and round them to what is stored.

    All of the division goes to `lora_B`. So `lora_A` stays what the method chose, above all for the `qlora` start,
    whose `lora_A` must keep the distribution that PEFT gives it; and for the usual scalings, powers of two, nothing
    is rounded, while a square root on each factor would round both.

    Args:
        lora_A: [..., r, n], for scaling 1.
        lora_B: [..., m, r], for scaling 1.
        scaling: see `scaling`.
        dtype: what the factors are stored in.
    """
    return lora_A.to(dtype).contiguous(), (lora_B.float() / scaling).to(dtype).contiguous()


def applied_factors(lora_A: Tensor, lora_B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Invert `stored_factors`: the stored factors as float32 `lora_A`, `lora_B` for scaling 1."""
    return lora_A.float(), lora_B.float() * scaling


def adapter_config(plan: Plan, base_model_name_or_path: str, all_module_names: Iterable[str]) -> dict[str, Any]:
    """The content of adapter_config.json, with keys that PEFT knows in any version (it warns about others).

    Args:
        plan: rank, alpha, task type and the modules that have factors.
        base_model_name_or_path: the base checkpoint, a folder or a Hub id.
        all_module_names: see `target_modules`.
    """
    alpha = plan.config.alpha
    assert alpha is not None, "a plan has decided it"
    head = plan.targets.head
    adapted = [job for job in plan.jobs if job.rank and job.expert is None]
    wrapped = [job.loaded_module for job in adapted if job.wrapped]
    modules = (job.module for job in adapted if not job.embedding and job.module not in plan.targets.retargeted)
    # by their whole names: where a target is `embed_tokens`, PEFT saves the base's table with the adapter (a head is
    # called `lm_head` whole, and there it does)
    tables = [job.module for job in adapted if job.embedding]
    parameters = target_parameters(plan)
    pattern = {name: pieces for name, pieces in parameters.items() if pieces > 1}
    return {
        "peft_type": "LORA",
        "task_type": head.task_type,
        "base_model_name_or_path": base_model_name_or_path,
        "r": plan.config.rank,
        "lora_alpha": _plain(alpha),
        "use_rslora": plan.config.rslora,
        "target_modules": [
            *target_modules(modules, all_module_names),
            *target_modules(wrapped, wrapped, parts=2),  # nothing else is called so
            *tables,
        ],
        **({"target_parameters": sorted(parameters)} if parameters else {}),
        "rank_pattern": {name: plan.config.rank * pieces for name, pieces in pattern.items()},
        # with which PEFT has the same scaling for all
        "alpha_pattern": {
            name: _plain(alpha * (math.sqrt(pieces) if plan.config.rslora else pieces))
            for name, pieces in pattern.items()
        },
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(job.transposed and job.rank and job.expert is None for job in plan.jobs)
        and getattr(plan.format, "keeps_layers", False),
        "inference_mode": True,
        # the factors are in the file: any other value makes PEFT compute some, or quantize the base, while loading
        "init_lora_weights": True,
        **({"modules_to_save": list(head.modules_to_save)} if head.modules_to_save else {}),
    }


def target_parameters(plan: Plan) -> dict[str, int]:
    """The parameters that PEFT is to adapt, and the pieces of each: last parts of names where all that end so are in.

    PEFT takes a parameter whose name ends in `.target`. So are adapted experts, and the weights of layers that it would
    take for experts, by the last part of their names, were they target modules.
    """
    retargeted = plan.targets.retargeted
    layers = [job.module for job in plan.jobs if job.rank and job.module in retargeted and not job.wrapped]
    ends = target_modules(layers, plan.targets.module_names, parts=2)
    adapted = {job.expert.stack for job in plan.jobs if job.expert is not None and job.rank}
    last = {stack: f"{_last(stack.module)}.{stack.parameter}" for stack in plan.targets.stacks}
    too_wide = {last[stack] for stack in plan.targets.stacks if stack not in adapted}
    return {
        f"{stack.module}.{stack.parameter}" if last[stack] in too_wide else last[stack]: len(stack.pieces)
        for stack in adapted
    } | {f"{end}.weight": 1 for end in ends}


def _plain(alpha: float) -> float:
    """An integer where it is one."""
    return int(alpha) if alpha == int(alpha) else alpha


def target_modules(modules: Iterable[str], all_module_names: Iterable[str], parts: int = 1) -> list[str]:
    """The shortest targets by which PEFT selects exactly `modules`: last parts of names where all that end so are in.

    PEFT takes a module whose name is a target or ends in `.target`; full names stand where the last part would select
    too much, or where it is not known what it would select.

    Args:
        modules: names of the modules that have factors.
        all_module_names: of the whole model; empty if not known.
        parts: how many last parts a target has.
    """
    wanted = set(modules)
    names = set(all_module_names)
    too_wide = {_last(name, parts) for name in names - wanted}
    ends = {module: _last(module, parts) for module in wanted}
    return sorted({end if names and end not in too_wide else module for module, end in ends.items()})


def _last(name: str, parts: int = 1) -> str:
    return ".".join(name.split(".")[-parts:])
