"""Refusals of jobs that need no format: ranks and groups."""

from __future__ import annotations

import math

from loftq_cli.config import QuantizeConfig
from loftq_cli.errors import LoftqError
from loftq_cli.jobs import WeightJob


def refuse_misfits(jobs: tuple[WeightJob, ...], config: QuantizeConfig) -> None:
    """Refuse a rank that some weight cannot have, and blocks that span rows where a method takes rows apart.

    Raises:
        LoftqError: with the largest rank that every weight takes, or other ways out.
    """
    if config.experts_adapter and all(job.expert is None for job in jobs):
        raise LoftqError("`--experts-adapter`: no experts of this model get bits", "leave it out")
    if all(job.rank == 0 for job in jobs):
        is_expert = all(job.expert is not None for job in jobs)
        why = "experts have one with `--experts-adapter` alone" if is_expert else "PEFT would put it on the experts"
        hint = "`--skip` fewer layers, such as those of attention"
        raise LoftqError(
            f"no adapter is left: {why}", hint if is_expert else f"{hint}; or use `--format packed` or `dense`"
        )
    if too_small := [job for job in jobs if job.rank > min(job.shape)]:
        largest = min(min(job.shape) for job in too_small)
        raise LoftqError(
            f"`--rank {config.rank}` is above the smaller side of {_name(too_small)}",
            f"the largest rank that every weight takes is `--rank {largest}`; or leave them out with `--skip`",
        )
    across = [job for job in jobs if job.quantizer == "nf" and job.shape[1] % job.group_size]
    across = [job for job in across if job.expert is None]  # which get a weight-only method
    if across and (config.method == "cloq" or config.is_trained):
        raise LoftqError(
            f"`--method {config.method}` needs blocks that lie in one row each, and those of {across[0].group_size} "
            f"would span the rows of {_name(across)}",
            "use a `--group-size` that divides their in_features, `--quantizer nf-search`, or `--method qera`",
        )


def ragged_groups(jobs: tuple[WeightJob, ...]) -> LoftqError | None:
    """What is wrong with a group size that leaves a short last group, which only `packed` and `dense` can hold."""
    ragged = [job for job in jobs if job.quantizer != "nf" and job.group_size > 0 and job.shape[1] % job.group_size]
    if not ragged:
        return None
    common = math.gcd(*(job.shape[1] for job in jobs))
    fitting = [str(size) for size in (256, 128, 96, 64, 48, 32, 16, 8) if common % size == 0]
    ways = f"sizes that divide every weight: {', '.join([*fitting, '-1 (a whole row)'])}"
    return LoftqError(
        f"`--group-size {ragged[0].group_size}` does not divide in_features {ragged[0].shape[1]} of {_name(ragged)}",
        f"{ways}; or `--skip` these, or `--format packed`, where a last group may be short",
    )


def _name(jobs: list[WeightJob]) -> str:
    """`first [m, n]` (and how many more)."""
    more = f" (and {len(jobs) - 1} more)" if len(jobs) > 1 else ""
    return f"`{jobs[0].tensor}` {list(jobs[0].shape)}{more}"
