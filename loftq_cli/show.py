"""What the commands print: plans, reports and verdicts as tables or as JSON."""

from __future__ import annotations

import io
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.filesize import decimal as size

from loftq_cli import verify as verification
from loftq_cli.checkpoint.reader import whole_name
from loftq_cli.checkpoint.source import open_checkpoint
from loftq_cli.config import CALIBRATED, QuantizeConfig
from loftq_cli.console import TABLE_WIDTH, Out
from loftq_cli.errors import LoftqError, again
from loftq_cli.evaluate import evaluate
from loftq_cli.formats import FORMATS
from loftq_cli.journal import REPORT_FILE, WORK_FOLDER
from loftq_cli.pipeline import plan_quantize
from loftq_cli.report import (
    about_experts,
    error_columns,
    in_figures,
    install_line,
    layer_groups,
    load_lines,
    plan_summary,
    pooled_errors,
    skip_counts,
    trained,
)

if TYPE_CHECKING:
    from loftq_cli.plan import Plan

LAYER_COLUMNS = (("layers", "left"), ("weights", "right"), ("shape", "left"), ("bits", "right"))
SHOWN = 20  # violations
SHOWN_BLOCKS = 6  # evenly from the first to the last


def plan(output: Out, plan: Plan, out: Path | None) -> None:
    """What would be done."""
    summary = plan_summary(plan)
    output.data(summary)
    totals, config = summary["totals"], plan.config
    rows = [(group.kind, str(group.weights), group.shapes, group.bits) for group in layer_groups(summary["weights"])]
    target = f" → {out}" if out else ""
    device = totals["estimated_peak_device_bytes"]
    without = sum(row["rank"] == 0 for row in summary["weights"])
    but = f" (none for the {without} weights of experts)" if without else ""
    output.table(f"Plan: {plan.checkpoint.model}{target}", LAYER_COLUMNS, rows)
    _skips(output, summary["skipped"])
    output.result(
        f"{totals['weights']} weights, {totals['parameters']:,} parameters: {config.method}, {config.quantizer}, "
        f"{totals['bits_per_weight']:.2f} bits per weight in `{config.format}`, group {config.group_size}, "
        f"rank {config.rank}{but}, on {config.device}\n"
        f"base {size(totals['base_bytes'])}, adapter {size(totals['adapter_bytes'])}, "
        f"about {size(totals['estimated_peak_host_bytes'])} of host memory"
        + (f" and {size(device)} of device memory" if device else "")
    )


def bar(plan: Plan, processes: int) -> tuple[str, int]:
    """The label of a run's progress bar, and its end: a finish passes all weights twice more."""
    if not plan.is_calibrated:
        return "quantizing", plan.weight_bytes // processes
    return "calibrating", plan.weight_bytes * (3 if plan.config.finish_epochs else 1)


def report(output: Out, report: Mapping[str, Any], out: Path, source: str | None = None) -> None:
    """What was done, measured, and what to type next."""
    output.data({key: value for key, value in report.items() if key != "weights"})
    totals, config = report["totals"], report["config"]
    fields = error_columns(config)
    rows = [
        (group.kind, str(group.weights), group.shapes, group.bits, *in_figures(group.errors))
        for group in layer_groups(report["weights"], fields.values())
    ]
    every = in_figures(pooled_errors(report["weights"], fields.values()))
    rows.append(("all", str(totals["weights"]), "", f"{totals['bits_per_weight']:.2f}", *every))
    heads = tuple((head, "right") for head in fields)
    of = "output error ‖Y − Ŷ‖/‖Y‖" if config["method"] in CALIBRATED else "relative error ‖W − Ŵ‖/‖W‖"
    output.table(f"{report['source']['model']}: {of} by kind of layer", (*LAYER_COLUMNS, *heads), rows, total=1)
    if blocks := report.get("calibration", {}).get("blocks"):
        some = sorted({round(i * (len(blocks) - 1) / (SHOWN_BLOCKS - 1)) for i in range(SHOWN_BLOCKS)})
        lines = [(blocks[i]["name"], *in_figures(blocks[i][field] for field in fields.values())) for i in some]
        output.table("Blocks: error of what leaves them", (("block", "left"), *heads), lines)
    _skips(output, report["skipped"])
    unrepaired = [row for row in report["weights"] if row["rank"] and row["iterations"] == 0 < row["relative_error"]]
    if unrepaired and config["method"] != "qlora":
        output.warning(
            f"{len(unrepaired)} weights have an adapter that starts at zero, because no factors helped in "
            f"{config['adapter_dtype']}: `{unrepaired[0]['name']}` is the first"
        )
    if moved := [row["name"] for row in report["weights"] if row["device"] != config["device"]]:
        output.warning(f"{len(moved)} weights did not fit the GPU's memory and were computed on the CPU: {moved[0]}, …")
    if config["method"] in CALIBRATED:
        blind = [row["name"] for row in report["weights"] if row.get("unreached")]
        if blind:
            output.warning(
                f"no text reached {len(blind)} weights, which were quantized without looking at any: {blind[0]}, …"
            )
    if note := report.get("calibration", {}).get("note"):
        output.warning(note)
    seconds = totals["seconds"]
    stages = ", ".join(
        f"{stage.replace('_', ' ')} {seconds[stage]:.1f}" for stage in seconds if stage != "total" and seconds[stage]
    )
    device = f", {size(totals['peak_device_bytes'])} of device memory" if totals["peak_device_bytes"] else ""
    output.result(
        f"{config['method']}, {config['quantizer']}, `{config['format']}`, group {config['group_size']}, "
        f"rank {config['rank']}: {totals['bits_per_weight']:.2f} bits per weight\n"
        f"base {size(totals['base_bytes'])}, adapter {size(totals['adapter_bytes'])}; "
        f"{seconds['total']:.1f} s ({stages}), {size(totals['peak_host_bytes'])} of host memory{device}"
    )
    if experts := about_experts(report):
        output.result(experts)
    if training := trained(report):
        output.result(training)
    load = "\n".join(f"  {line}" if line else "" for line in load_lines(report, str(out)))
    notes = "".join(f"\n  {note}" for note in FORMATS[config["format"]].load_notes)
    output.result(f"\nLoad it ({install_line(report)}):\n\n{load}\n{notes}")
    if source is not None and config["bits"] == 2 and config["method"] not in CALIBRATED:
        output.note(
            "made without looking at text, a 2-bit model hardly speaks before it is fine-tuned; looking at some takes "
            "longer, and its outputs stay much closer to the source's: "
            f"`{again('--method', 'cloq', '--overwrite')}`"
        )
    check = shlex.join(["loftq", "verify", str(out), "--source", source or report["source"]["model"]])
    output.result(f"\nCheck it:\n\n  {check}")


def inspect(output: Out, target: str, html: Path | None) -> None:
    """The report of an output, or the plan that defaults give for a model."""
    page = Out()  # the same words again, recorded for the page
    page.stdout = Console(record=True, file=io.StringIO(), width=TABLE_WIDTH)
    folder = Path(target)
    if (folder / REPORT_FILE).exists() or (folder / WORK_FOLDER).is_dir():
        made = verification.read_report(folder)
        for sink in (output, page):
            report(sink, made, folder)
    else:
        planned = plan_quantize(target, QuantizeConfig())
        for sink in (output, page):
            plan(sink, planned, None)
    if html is not None:
        try:
            html.write_text(page.stdout.export_html(), encoding="utf-8")
        except OSError as error:
            raise LoftqError(f"cannot write `{html}`: {error.strerror}") from None
        output.note(f"wrote `{html}`")


def verify(output: Out, out: Path, source: str | None) -> bool:
    """Say whether `out` is what its report says; True when it is."""
    total = 0
    if source is not None:
        made = verification.read_report(out)
        written = {whole_name(row["tensor"]) for row in made["weights"]}
        infos = open_checkpoint(source, None if Path(source).is_dir() else made["source"]["revision"]).tensors
        total = sum(info.nbytes for info in infos.values() if info.name in written)
    with output.progress("verifying", total) as advance:
        verdict = verification.verify(out, source, advance)
    output.data({**asdict(verdict), "ok": not verdict.violations})
    for violation in verdict.violations[:SHOWN]:
        output.result(f"✗ {violation}")
    if len(verdict.violations) > SHOWN:
        output.result(f"✗ and {len(verdict.violations) - SHOWN} more (`--json` has them all)")
    if verdict.violations:
        return False
    output.result(f"✓ {verdict.files} files have the hashes in `{REPORT_FILE}`; the adapter belongs to this base")
    if verdict.relative_error is not None:
        output.result(
            f"✓ {verdict.weights} weights recomputed from the stored tensors: relative error of weights "
            f"{verdict.relative_error:.6f}, as reported; all other tensors are the source's, byte for byte"
        )
    else:
        output.note("give `--source MODEL` to recompute every weight's error as well")
    return True


def merge(output: Out, out: Path, dest: Path) -> None:
    """Write the merged checkpoint, and say how to load it."""
    from loftq_cli import merge as merging

    made = verification.read_report(out)
    with output.progress("merging", 2 * made["totals"]["parameters"]) as advance:
        merged = merging.merge(out, dest, advance)
    output.data(asdict(merged))
    output.result(
        f"{merged.weights} weights with their adapters in `{dest}`, {size(merged.base_bytes)}; load it:\n\n"
        f'  {made["load"]["auto_class"]}.from_pretrained("{dest}")'
    )


def perplexity(output: Out, out: Path, text: Path, source: str | None, **options: Any) -> None:
    """Measure and print perplexities; `options` are those of `evaluate`."""
    measured = evaluate(out, text, source, progress=output.progress, **options)
    for note in measured.notes:
        output.warning(note)
    told = asdict(measured)
    for row in told["rows"]:  # JSON has no numbers for inf and nan
        row |= {key: None for key in ("nll", "perplexity") if not math.isfinite(row[key])}
    output.data(told)
    rows = [(row.name, f"{row.nll:.6f}", f"{row.perplexity:.6g}") for row in measured.rows]
    columns = (("model", "left"), ("nats per token", "right"), ("perplexity", "right"))
    output.table(f"{out} on {text}", columns, rows)
    output.result(measured.protocol)


def _skips(output: Out, skipped: Sequence[Mapping[str, str]]) -> None:
    rows = [(reason, str(count), first) for reason, count, first in skip_counts(skipped)]
    output.table("Kept as they are", (("reason", "left"), ("tensors", "right"), ("e.g.", "left")), rows)
