"""QLoRA's start (arXiv 2305.14314): quantize the weight and let the adapter begin at zero."""

from __future__ import annotations

import torch
from torch import Tensor

from loftq_cli.lowrank import LowRankFactors
from loftq_cli.methods.base import Decomposition
from loftq_cli.quantizers.base import Quantizer


def qlora(W: Tensor, quantizer: Quantizer, rank: int, *, iters: int, seed: int) -> Decomposition:
    """Quantize `W` [m, n]; `iters` is not used."""
    return Decomposition(quantizer.quantize(W), zero_start(W, rank, seed), iterations=0)


def zero_start(W: Tensor, rank: int, seed: int) -> LowRankFactors:
    """Return factors whose product is zero and which can train: lora_A as PEFT draws it, lora_B zero.

    `kaiming_uniform_(lora_A, a=√5)` is uniform on ±1/√n. Drawn on the CPU, so that every device starts alike.
    """
    m, n = W.shape
    generator = torch.Generator().manual_seed(seed)
    lora_A = torch.empty(rank, n, dtype=torch.float32).uniform_(-(n**-0.5), n**-0.5, generator=generator)
    return LowRankFactors(lora_A.to(W.device), torch.zeros(m, rank, dtype=torch.float32, device=W.device))
