"""A Hub id's shards while they are quantized: fetched ahead and, with `--evict`, only a few of them on the disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from loftq_cli.checkpoint.hub import HubCommit
from loftq_cli.checkpoint.source import Checkpoint
from loftq_cli.checkpoint.streamed import Streamed
from loftq_cli.config import QuantizeConfig
from loftq_cli.errors import ConfigError
from loftq_cli.journal import WORK_FOLDER, Journal
from loftq_cli.plan import Plan

SOURCE_FOLDER = "source"  # in the work folder


def refuse_eviction(checkpoint: Checkpoint, config: QuantizeConfig) -> None:
    """Refuse `--evict` where nothing is downloaded, and deleting would delete what the user has."""
    if config.evict and checkpoint.is_local:
        raise ConfigError(f"`--evict` is for Hub ids, but `{checkpoint.model}` is already here", "leave it out")
    if config.evict and (checkpoint.stored_in or any(info.decoder for info in checkpoint.tensors.values())):
        raise ConfigError(
            f"`--evict` is for safetensors that are read once, not for pickles and fp8, as in `{checkpoint.model}`",
            "leave it out",
        )


def refuse_sharing(config: QuantizeConfig, ranks: int) -> None:
    """Refuse `--evict` where several processes read the same shards."""
    if config.evict and ranks > 1:
        raise ConfigError("`--evict` is for one process: of several, one would delete what another reads", "")


def streamed(plan: Plan, out: Path, journal: Journal) -> Plan:
    """`plan` with a checkpoint whose shards are fetched ahead: those that the journal does not know as done."""
    if not isinstance(plan.checkpoint.place, HubCommit):
        return plan
    left = [shard.file for shard in plan.shards if journal.file(shard.file).sha256 is None]
    files = [plan.checkpoint.stored_in.get(file, file) for file in left]
    folder = out / WORK_FOLDER / SOURCE_FOLDER if plan.config.evict else None
    return replace(plan, checkpoint=replace(plan.checkpoint, place=Streamed(plan.checkpoint.place, files, folder)))
