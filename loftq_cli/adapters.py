"""What the files of the adapter hold for the jobs of a plan.

Experts that get an adapter are parameters of PEFT's (`target_parameters`), whose factors lie in two tensors for all
experts. These are put together at the very end, from a file in the work folder that has the factors of each matrix.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from loftq_cli.checkpoint.writer import TensorSpec
from loftq_cli.errors import LoftqError
from loftq_cli.experts import ExpertStack
from loftq_cli.formats import peft_adapter
from loftq_cli.formats.base import Format
from loftq_cli.formats.peft_adapter import StackedFactors
from loftq_cli.jobs import WeightJob
from loftq_cli.targets import Targets

EXPERT_FACTORS = "expert_factors.safetensors"  # in the work folder


def for_format(jobs: tuple[WeightJob, ...], targets: Targets, output: Format) -> tuple[WeightJob, ...]:
    """`jobs` with the adapter of layers that PEFT would take for experts, as far as they can have it in `output`.

    They can where their weights are parameters, for PEFT takes `target_parameters` by the names that they have; or
    where they can be wrapped, and so called otherwise.
    """
    if getattr(output, "keeps_layers", False):
        return jobs
    wraps = getattr(output, "wraps_layers", False)
    return tuple(
        replace(job, wrapped=wraps, rank=job.rank * wraps) if job.module in targets.retargeted else job for job in jobs
    )


def about_experts(jobs: Iterable[WeightJob]) -> str | None:
    """What the user should know of the weights of experts, and of those whose adapter PEFT takes for the experts'."""
    without = Counter("experts" if job.expert else "others" for job in jobs if job.rank == 0)
    told = []
    if without["experts"]:
        flag = "`--experts-adapter` gives them one, in `dense`"
        told.append(f"experts: {without['experts']} weights get bits and no adapter ({flag})")
    if without["others"]:
        why = "because PEFT would put it on the experts: `--format packed` and `dense` give them one"
        told.append(f"{without['others']} weights of other layers get bits and no adapter, {why}")
    return "; ".join(told) or None


def stacked_factors(jobs: Iterable[WeightJob], stacks: Sequence[ExpertStack]) -> dict[str, StackedFactors]:
    """Where the adapter has the factors of experts, by the tensor of the job.

    Args:
        jobs: of the plan.
        stacks: all that the model has, in the order in which a module has them: the last that PEFT wraps is outermost.

    Raises:
        LoftqError: some experts of a parameter have no job, or PEFT would take the parameter for another.
    """
    of_stack: dict[ExpertStack, list[WeightJob]] = {}
    for job in jobs:
        if job.expert is not None and job.rank:
            of_stack.setdefault(job.expert.stack, []).append(job)
    found = {}
    for stack, members in of_stack.items():
        name = f"{stack.module}.{stack.parameter}"
        if len(members) < stack.count * len(stack.pieces):
            raise LoftqError(f"`--experts-adapter` needs bits for all experts of `{name}`", "leave out all or none")
        if not stack.standard or stack.count == 1:
            raise LoftqError(f"PEFT cannot adapt the experts `{name}`", "leave out `--experts-adapter`")
        inside = [other for other in stacks if other.module == stack.module and other in of_stack]
        path = stack.module + ".base_layer" * (len(inside) - 1 - inside.index(stack))
        for job in members:
            assert job.expert is not None
            found[job.tensor] = StackedFactors(
                *peft_adapter.tensor_names(path),
                experts=stack.count,
                pieces=len(stack.pieces),
                expert=job.expert.expert,
                piece=stack.pieces.index(job.expert.piece),
            )
    return found


def adapter_layout(
    jobs: Iterable[WeightJob], stacked: dict[str, StackedFactors], dtype: torch.dtype
) -> tuple[TensorSpec, ...]:
    """The tensors of the adapter: the factors of each job that has any, those of experts together."""
    layout: dict[str, TensorSpec] = {}
    for job in jobs:
        place = stacked.get(job.tensor)
        specs = factor_specs(job, dtype)
        if place is not None:
            (m, n), r = job.shape, job.rank * place.pieces
            shapes = {place.lora_A: (r * place.experts, n), place.lora_B: (m * place.pieces, r * place.experts)}
            specs = [TensorSpec(name, dtype, shape) for name, shape in shapes.items()]
        layout |= {spec.name: spec for spec in specs}
    return tuple(layout.values())


def factor_specs(job: WeightJob, dtype: torch.dtype) -> list[TensorSpec]:
    """The factors of one job, if it has any."""
    m, n = reversed(job.shape) if job.embedding else job.shape
    shapes = ((job.rank, n), (m, job.rank)) if job.rank else ()
    return [TensorSpec(name, dtype, shape) for name, shape in zip(job.factor_names, shapes, strict=False)]


def assemble(
    jobs: Iterable[WeightJob],
    stacked: dict[str, StackedFactors],
    layout: Iterable[TensorSpec],
    read: Callable[[str], Tensor],
    write: Callable[[str, Tensor], None],
) -> None:
    """Put the factors of experts together, a parameter at a time: `read` and `write` are told names of tensors."""
    specs = {spec.name: spec for spec in layout}
    members: dict[tuple[str, str], list[WeightJob]] = {}
    for job in jobs:
        if (place := stacked.get(job.tensor)) is not None:
            members.setdefault((place.lora_A, place.lora_B), []).append(job)
    for names, of in members.items():
        whole_A, whole_B = (torch.zeros(specs[name].shape, dtype=specs[name].dtype) for name in names)
        for job in of:
            factors = (read(name) for name in job.factor_names)
            for part, factor in zip(stacked[job.tensor].views(whole_A, whole_B), factors, strict=True):
                part.copy_(factor)
        for name, whole in zip(names, (whole_A, whole_B), strict=True):
            write(name, whole)
