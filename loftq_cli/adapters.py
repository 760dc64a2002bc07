"""What the adapter's file holds for the jobs of a plan."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from loftq_cli.checkpoint.writer import TensorSpec
from loftq_cli.formats import peft_adapter
from loftq_cli.jobs import WeightJob


def adapter_layout(jobs: Iterable[WeightJob], dtype: torch.dtype) -> tuple[TensorSpec, ...]:
    """The tensors of the adapter: the factors of each job that has any."""
    layout = []
    for job in jobs:
        if job.rank:
            name_A, name_B = peft_adapter.tensor_names(job.module)
            layout.append(TensorSpec(name_A, dtype, (job.rank, job.shape[1])))
            layout.append(TensorSpec(name_B, dtype, (job.shape[0], job.rank)))
    return tuple(layout)
