"""ApiQ (arXiv 2402.05147): train factors, scales, codes so that outputs stay what they were, by layer or by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from loftq_cli.methods.inputs import Inputs
from loftq_cli.methods.trained import TrainedWeight
from loftq_cli.methods.training import Batch, Fit, Training, alone, train


def fit_layer(W: Tensor, weight: TrainedWeight, inputs: Inputs, held_out: Inputs, steps: int, how: Training) -> Fit:
    """Layer-wise (section 4.2): least ‖X Wᵀ − X̂ Ŵᵀ‖.

    That loss is a quadratic of Ŵ which the inputs enter by their second moments alone. So every step sees all samples
    at once, without their noise, and no activation is kept or run again: `steps` of an epoch are as many as batches
    would be. The loss lacks a constant (see `_quadratic`): compare before with after, and neither with other methods'.

    Args:
        W: float32 [m, n].
        weight: what trains.
        inputs: of the calibration samples.
        held_out: of the samples held out.
        steps: of an epoch.
        how: see `Training`.
    """
    losses = [_quadratic(W, moments) for moments in (inputs, held_out)]
    return train(_groups([weight], how), [0] * steps, [1], lambda which: losses[which](weight()), how)


def _quadratic(W: Tensor, inputs: Inputs) -> Callable[[Tensor], Tensor]:
    """The function Ŵ → (E‖W x − Ŵ x̂‖² − E‖W (x − x̂)‖²) / E‖W x̂‖².

    What is taken off no Ŵ changes, and it would take one more moment, of x − x̂ with itself. Without it the loss is
    below zero where Ŵ makes up for some of the drift; where there is none it is the relative squared error itself.
    """
    H, K = inputs.gram, inputs.drift
    pull = W @ K if K is not None else None  # E[(W x − W x̂) x̂ᵀ]
    size = ((W @ H) * W).sum().clamp_min(torch.finfo(torch.float32).tiny)  # there are weights of zeros

    def loss(weight: Tensor) -> Tensor:
        D = W - weight
        least = ((D @ H) * D).sum()
        return (least if pull is None else least + 2 * (pull * D).sum()) / size

    return loss


def fit_block(
    weights: Sequence[TrainedWeight],
    batches: Sequence[Batch],
    outputs: Callable[[Batch], tuple[Tensor, Sequence[Tensor]]],
    held_out: Sequence[Batch],
    how: Training,
    mean: Callable[[Tensor], None] = alone,
) -> Fit:
    """Block-wise (section 4.3): least ‖F(X) − F̂(X̂)‖, all weights of the block trained together.

    Args:
        weights: what trains.
        batches: micro-batches of calibration samples.
        outputs: of a micro-batch: F̂(X̂) [samples, tokens, hidden_size], and what it should be: F(X), and F(X̂) as well
            for the augmented loss of ApiQ's own code.
        held_out: micro-batches that decide.
        how: see `Training`.
        mean: see `train`.
    """

    def loss(batch: Batch) -> Tensor:
        ours, wanted = outputs(batch)
        return torch.stack([relative_error(ours, theirs) for theirs in wanted]).sum()

    return train(_groups(weights, how), batches, held_out, loss, how, mean)


def _groups(weights: Sequence[TrainedWeight], how: Training) -> list[tuple[list[Tensor], float]]:
    return [
        ([f for weight in weights for f in (weight.lora_A, weight.lora_B) if f.numel()], how.factor_lr),
        ([weight.grid for weight in weights], how.clip_lr),
        ([weight.codes for weight in weights if weight.codes is not None], how.code_lr),
    ]


def relative_error(ours: Tensor, theirs: Tensor) -> Tensor:
    """‖ours − theirs‖² / ‖theirs‖², in float32; of the same size in every block, as AdamW's epsilon wants it."""
    size = theirs.float().square().sum().clamp_min(torch.finfo(torch.float32).tiny)
    return (ours.float() - theirs.float()).square().sum() / size
