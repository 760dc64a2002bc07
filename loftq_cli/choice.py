"""Which formats hold a plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from loftq_cli.errors import LoftqError
from loftq_cli.formats import AUTO_ORDER, FORMATS

if TYPE_CHECKING:
    from loftq_cli.plan import Plan


def choose_format(build: Callable[..., Plan], uneven: str | None) -> tuple[Plan, str]:
    """The first format of `AUTO_ORDER` that holds the plan, and a sentence that says which and why.

    `uneven` is what all but `packed` and `dense` have against groups that do not divide a weight. Formats that would
    leave layers beside experts without an adapter are passed over, too.
    """
    refusals: list[tuple[str, str]] = []
    for name in AUTO_ORDER:
        plan = build(name)
        problem = plan.format.why_not(plan) or (uneven if name not in ("packed", "dense") else None) or _bare(plan)
        if problem is None:
            why = "; ".join(f"not `{other}`: {reason}" for other, reason in refusals)
            return plan, f"format `{name}`" + (f" ({why})" if why else " (first choice for these options)")
        refusals.append((name, problem))
    raise LoftqError("no format can hold this", "; ".join(f"`{name}`: {reason}" for name, reason in refusals))


def _bare(plan: Plan) -> str | None:
    bare = next((job.module for job in plan.jobs if job.rank == 0 and job.expert is None), None)
    return f"PEFT would put the adapter of `{bare}` on the experts" if bare else None


def other_formats(build: Callable[..., Plan]) -> str:
    """The formats that hold the plan, as a hint."""
    holding = [name for name in FORMATS if (plan := build(name)).format.why_not(plan) is None]
    return "these can: " + ", ".join(f"`--format {name}`" for name in holding) if holding else ""
