"""What a run writes in OUT beside its tensors: the names of all files, config.json and the index."""

from __future__ import annotations

from typing import Any

from loftq_cli.journal import ADAPTER_CONFIG, CARD_FILE, CHART_FILE, REPORT_FILE
from loftq_cli.plan import ADAPTER_FILE, INDEX_FILE, Plan


def planned_files(plan: Plan) -> list[str]:
    """Names of all files that the run writes in OUT."""
    names = [shard.file for shard in plan.shards]
    names += [ADAPTER_FILE, ADAPTER_CONFIG, "config.json", CARD_FILE, CHART_FILE]
    names += [INDEX_FILE] if plan.checkpoint.index is not None else []
    names += plan.remote_code.files if plan.remote_code else ()
    return [*names, *plan.checkpoint.side_files, REPORT_FILE]


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
