"""The training of calibrated methods: AdamW, the same bytes each time, and the best state kept."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.utils.deterministic
from torch import Tensor

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Training:
    """How to train: passes over the batches, and AdamW's rates for factors, for clip factors or scales, for codes."""

    epochs: int
    factor_lr: float
    clip_lr: float = 0.0
    code_lr: float = 0.0
    weight_decay: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Fit:
    """How it went: the loss on held-out samples before and after, steps, and those skipped for gradients not finite.

    A loss is as its method defines it (that of `fit_layer` may be negative); None is one that was not finite.
    `repeatable`: done again on the same GPU, it gives the same bytes.
    """

    before: float | None
    after: float | None
    steps: int
    skipped: int
    repeatable: bool


def alone(tensor: Tensor) -> None:
    """The mean over processes, where there is one."""


def train(
    groups: Sequence[tuple[Sequence[Tensor], float]],
    batches: Sequence[Batch],
    held_out: Sequence[Batch],
    loss_of: Callable[[Batch], Tensor],
    how: Training,
    mean: Callable[[Tensor], None] = alone,
) -> Fit:
    """Train parameters on `batches` in an order drawn anew for each epoch; keep what is best on held-out samples.

    That may be the state at the start. Rates fall to zero along a cosine.

    Args:
        groups: what trains, and at which rate.
        batches: what `loss_of` takes; as many in every process.
        held_out: those that decide.
        loss_of: the loss of a batch, differentiable; where its gradients are not finite the step is skipped.
        how: see `Training`; its rates are in `groups`.
        mean: replaces a tensor by its mean over all processes that train together.
    """
    parameters = [parameter for group, _ in groups for parameter in group]
    device = parameters[0].device
    optimizer = torch.optim.AdamW(
        [{"params": list(group), "lr": rate} for group, rate in groups if group],
        weight_decay=how.weight_decay,
        fused=True,
    )
    steps = how.epochs * len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps))
    # it skips the step of gradients that are not finite without waiting for the device to say so
    scaler = torch.amp.GradScaler(device.type, init_scale=1.0, growth_interval=2**31 - 1)
    generator = torch.Generator().manual_seed(how.seed)

    def judge() -> Tensor:
        with torch.no_grad():
            losses = [torch.zeros((), device=device), *(loss_of(batch).float() for batch in held_out)]
            total = torch.stack([torch.stack(losses).sum(), torch.full((), float(len(held_out)), device=device)])
            mean(total)
            return (total[0] / total[1]).nan_to_num(math.inf, math.inf, math.inf)

    def share_gradients() -> None:
        """Make gradients their means over the processes."""
        if mean is alone:
            return
        for parameter in parameters:  # a weight may have had no part in this batch, and one in another process
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        mean(flat)
        for parameter, shared in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = shared.view_as(parameter)

    strict = True

    def step(batch: Batch) -> None:
        nonlocal strict
        began_strict = strict
        try:
            scaler.scale(loss_of(batch)).backward()
        except RuntimeError as error:
            if not strict or "determinis" not in str(error):
                raise
            strict = False  # something in this model has no such sum, and all else keeps to it as far as it can
            torch.use_deterministic_algorithms(True, warn_only=True)
        if strict != began_strict:  # again, with what was kept for the first time let go
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss_of(batch)).backward()
        share_gradients()
        scaler.step(optimizer)
        scaler.update(1.0)
        optimizer.zero_grad(set_to_none=True)
        schedule.step()

    first = least = judge()
    best = [parameter.detach().clone() for parameter in parameters]
    for _ in range(how.epochs):
        with _repeatable(strict):
            for i in torch.randperm(len(batches), generator=generator).tolist():
                step(batches[i])
        now = judge()
        better = now < least
        least = torch.where(better, now, least)
        for kept, parameter in zip(best, parameters, strict=True):
            torch.where(better, parameter.detach(), kept, out=kept)
    with torch.no_grad():
        for kept, parameter in zip(best, parameters, strict=True):
            parameter.copy_(kept)
    taken = max(int(state["step"]) for state in optimizer.state.values())
    before, after = (loss if math.isfinite(loss) else None for loss in (first.item(), least.item()))
    return Fit(before, after, steps, steps - taken, strict)


@contextmanager
def _repeatable(strict: bool) -> Iterator[None]:
    """Inside, a GPU sums gradients in the same order each time: attention, for one, else takes them as they come.

    So it does, still, where torch is not `strict` and only warns. Where it is, it raises a RuntimeError for what has no
    such sum, and for products, unless CUBLAS_WORKSPACE_CONFIG was set before the first (`lean.claim_process`).
    """
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fills = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=not strict)
    memory.fill_uninitialized_memory = False
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*determinis")
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        memory.fill_uninitialized_memory = fills
