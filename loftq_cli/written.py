"""What a run writes in OUT beside its tensors: the names of all files, config.json and the index."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from loftq_cli.checkpoint.modules import MODULES
from loftq_cli.errors import LoftqError
from loftq_cli.journal import ADAPTER_CONFIG, CARD_FILE, CHART_FILE, REPORT_FILE
from loftq_cli.plan import ADAPTER_FILE, INDEX_FILE, Plan


def planned_files(plan: Plan) -> list[str]:
    """Names of all files that the run writes in OUT."""
    names = [shard.file for shard in plan.shards]
    names += [ADAPTER_FILE, ADAPTER_CONFIG, "config.json", CARD_FILE, CHART_FILE]
    names += [INDEX_FILE] if plan.checkpoint.index is not None else []
    names += plan.remote_code.files if plan.remote_code else ()
    return [*names, *plan.checkpoint.side_files, REPORT_FILE]


def refuse_modules(plan: Plan) -> None:
    """Refuse a `modules.json` whose folders are not there, or whose files would lie where OUT has others.

    Raises:
        LoftqError: with the folder.
    """
    source = plan.checkpoint
    if source.modules.absent:
        hint = f"or remove {MODULES}, if nobody loads the model with Sentence Transformers"
        if source.revision is None:
            hint = f"download or copy the folder, too; {hint}"
        else:  # an offline cache may lack what the Hub has
            get = f"hf download {source.model} --revision {source.revision}"
            hint = f"download all of it, without HF_HUB_OFFLINE: `{get}`; {hint} (of a copy, `{get} --local-dir DIR`)"
        folder = source.modules.absent[0]
        raise LoftqError(f"{MODULES} names the folder `{folder}`, and nothing of it is in `{source.model}`", hint)
    planned = {name.casefold() for name in planned_files(plan)}
    for name in source.modules.files:
        taken = [str(path) for path in PurePosixPath(name).parents if str(path).casefold() in planned]
        if taken:
            raise LoftqError(
                f"{MODULES} names a folder `{taken[0]}`, where OUT has a file of that name",
                f"rename the folder in a copy of the checkpoint, and its `path` in {MODULES}",
            )


def output_config(plan: Plan) -> dict[str, Any]:
    """The source's config.json with the format's `quantization_config`, and without where the source once lay."""
    config: dict[str, Any] = _nameless(plan.checkpoint.config)
    if (entry := plan.format.quantization_config(plan)) is not None:
        config["quantization_config"] = entry
    return {**config, "auto_map": plan.remote_code.auto_map} if plan.remote_code else config


def _nameless(value: Any) -> Any:
    """`value` without `_name_or_path`, which earlier versions of transformers have saved: often somebody's folder."""
    if not isinstance(value, dict):
        return value
    return {key: _nameless(inner) for key, inner in value.items() if key != "_name_or_path"}


def output_index(plan: Plan) -> dict[str, Any]:
    """The weight map of the shards as written."""
    weight_map = {spec.name: shard.file for shard in plan.shards for spec in shard.layout}
    total = sum(spec.nbytes for shard in plan.shards for spec in shard.layout)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
