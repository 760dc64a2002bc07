"""The processes of one run: one, or as many as `torchrun` has started, on one machine or several that share OUT."""

from __future__ import annotations

import functools
import heapq
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from loftq_cli.checkpoint.reader import TensorInfo
from loftq_cli.errors import LoftqError
from loftq_cli.plan import Step

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

TIMEOUT = timedelta(hours=12)  # ranks wait for the slowest; one that dies is noticed at once, by its connection

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run. Rank 0 makes the files and writes the report, all compute."""

    rank: int = 0
    size: int = 1

    def tell(self, value: T) -> T:
        """What rank 0 says, on all ranks.

        Raises:
            LoftqError: a rank has stopped.
        """
        if self.size == 1:
            return value
        from torch.distributed import broadcast_object_list

        values = [value]
        try:
            broadcast_object_list(values, src=0)
        except RuntimeError as error:
            raise _lost(error) from None
        return values[0]

    def wait(self) -> None:
        """Wait until all ranks are here.

        Raises:
            LoftqError: a rank has stopped.
        """
        if self.size == 1:
            return
        from torch.distributed import all_reduce

        try:
            all_reduce(torch.zeros(1))  # a barrier that gloo breaks off when a rank dies
        except RuntimeError as error:
            raise _lost(error) from None

    def mean(self, tensor: Tensor) -> None:
        """Replace `tensor` by its mean over the ranks: the same bits on all of them.

        Raises:
            LoftqError: a rank has stopped.
        """
        from torch.distributed import all_reduce

        try:
            all_reduce(tensor, group=_device_group() if tensor.is_cuda else None)
        except RuntimeError as error:
            raise _lost(error) from None
        tensor /= self.size

    def share(self, steps: Sequence[Step]) -> list[Step]:
        """The steps that are this rank's, in order: spread by size, the largest first, to who has least."""
        if self.size == 1:
            return list(steps)
        loads = [(0, rank) for rank in range(self.size)]
        mine = set()
        for position in sorted(range(len(steps)), key=lambda i: -_cost(steps[i])):  # stable: every rank agrees
            load, rank = heapq.heappop(loads)
            heapq.heappush(loads, (load + _cost(steps[position]), rank))
            if rank == self.rank:
                mine.add(position)
        return [step for position, step in enumerate(steps) if position in mine]


ALONE = Ranks()


def by_torchrun() -> bool:
    """Whether torchrun has started this process as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that torchrun has started; without it, one."""
    if not by_torchrun():
        yield ALONE
        return
    from torch import distributed

    distributed.init_process_group("gloo", timeout=TIMEOUT)
    try:
        yield Ranks(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()


def local_rank() -> int:
    """Which of the processes on this machine this is: the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0")) if by_torchrun() else 0


@functools.cache
def _device_group() -> ProcessGroup | None:
    """What sums on GPUs: NCCL where every process has a GPU of its own; else gloo, by way of main memory."""
    from torch import distributed

    of_its_own = torch.cuda.device_count() >= processes_here()
    return distributed.new_group(backend="nccl", timeout=TIMEOUT) if of_its_own else None


def processes_here() -> int:
    """How many processes of the run are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if by_torchrun() else 1


def _cost(step: Step) -> int:
    """What a step takes, in weights; copying costs little beside computing."""
    return math.prod(step.shape) // 8 if isinstance(step, TensorInfo) else step.parameters


def _lost(error: RuntimeError) -> LoftqError:
    return LoftqError(
        f"another rank of this run has stopped ({(str(error) or '?').splitlines()[0]})",
        "its own message says why; what is done is kept: start all ranks again with `--resume`",
    )
