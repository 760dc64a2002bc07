"""What the commands print: plans, reports and verdicts as tables or as JSON."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal as size

from loftq_cli import push as pushing
from loftq_cli import verify as verification
from loftq_cli.card import load_notes, with_perplexity
from loftq_cli.checkpoint.files import write_file
from loftq_cli.checkpoint.reader import whole_name
from loftq_cli.checkpoint.source import open_checkpoint
from loftq_cli.config import CALIBRATED, QuantizeConfig
from loftq_cli.console import Out
from loftq_cli.control import sentence
from loftq_cli.errors import LoftqError, again, interruptible
from loftq_cli.evaluate import evaluate
from loftq_cli.journal import CARD_FILE, REPORT_FILE, WORK_FOLDER
from loftq_cli.page import PAGE, page
from loftq_cli.pipeline import plan_quantize
from loftq_cli.push import Parcel, Pushed, branch_of
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

LAYER_COLUMNS = (
    ("layers", "left"), ("weights", "right"), ("shape", "left"), ("parameters", "right"), ("bits", "right"),
)  # fmt: skip
SHOWN = 20  # violations
SHOWN_BLOCKS = 6  # evenly from the first to the last


def plan(output: Out, plan: Plan, out: Path | None, key: str | None = None, refusal: str | None = None) -> None:
    """What would be done; `key` is that of the result, for caches; `refusal` what stands in its way."""
    summary = plan_summary(plan)
    output.data({**summary, "key": key} if key else summary)
    totals, config = summary["totals"], plan.config
    rows = [
        (group.kind, str(group.weights), group.shapes, f"{group.parameters:,}", group.bits)
        for group in layer_groups(summary["weights"])
    ]
    target = f" → {out}" if out else ""
    device, activations = totals["estimated_peak_device_bytes"], totals["estimated_activation_bytes"]
    without = sum(row["rank"] == 0 for row in summary["weights"])
    but = f" (none for {without} of the weights)" if without else ""
    output.table(f"Plan: {plan.checkpoint.model}{target}", LAYER_COLUMNS, rows)
    _skips(output, summary["skipped"])
    output.result(
        f"{totals['weights']} weights, {totals['parameters']:,} parameters: {config.method}, {config.quantizer}, "
        f"{totals['bits_per_weight']:.2f} bits per weight in `{config.format}`, group {config.group_size}, "
        f"rank {config.rank}{but}, on {config.device}\n"
        f"source {size(totals['source_bytes'])}, base {size(totals['base_bytes'])}, "
        f"adapter {size(totals['adapter_bytes'])}, about {size(totals['estimated_peak_host_bytes'])} of host memory"
        + (f" and {size(device)} of device memory" if device else "")
        + (f", beside {size(activations)} of activations (`--activation-budget`)" if activations else "")
    )
    if refusal is not None:
        output.warning(f"without `--dry-run` this would be refused: {refusal}")


def bar(plan: Plan, processes: int) -> tuple[str, int]:
    """The label of a run's progress bar, and its end: a finish passes all weights twice more."""
    if not plan.is_calibrated:
        return "quantizing", plan.weight_bytes // processes
    return "calibrating", plan.weight_bytes * (3 if plan.config.finish_epochs else 1)


def report(
    output: Out, report: Mapping[str, Any], out: Path, source: str | None = None, pushed: Pushed | None = None
) -> None:
    """What was done, measured, and what to type next."""
    sent = {"push": asdict(pushed)} if pushed else {}
    output.data({**{key: value for key, value in report.items() if key != "weights"}, **sent})
    totals, config = report["totals"], report["config"]
    fields = error_columns(config)
    rows = [
        (group.kind, str(group.weights), group.shapes, f"{group.parameters:,}", group.bits, *in_figures(group.errors))
        for group in layer_groups(report["weights"], fields.values())
    ]
    every = in_figures(pooled_errors(report["weights"], fields.values()))
    parameters = f"{totals['parameters']:,}"
    rows.append(("all", str(totals["weights"]), "", parameters, f"{totals['bits_per_weight']:.2f}", *every))
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
    for told in (about_experts(report), trained(report)):
        if told:
            output.result(told)
    if control := report.get("control"):
        output.result(sentence(control, totals["relative_error"], config["method"]))
    load = "\n".join(f"  {line}" if line else "" for line in load_lines(report, str(out)))
    notes = "".join(f"\n  {note}" for note in load_notes(report))
    output.result(f"\nLoad it ({install_line(report)}):\n\n{load}\n{notes}")
    without_text = config["quantize_head"] or config["quantize_embeddings"]  # of which other methods make nothing
    if source is not None and config["bits"] == 2 and config["method"] not in CALIBRATED and not without_text:
        output.note(
            "made without looking at text, a 2-bit model hardly speaks before it is fine-tuned; looking at some takes "
            "longer, and its outputs stay much closer to the source's: "
            f"`{again('--method', 'cloq', '--overwrite')}`"
        )
    check = shlex.join(["loftq", "verify", str(out), "--source", source or report["source"]["model"]])
    output.result(f"\nCheck it:\n\n  {check}")


def prepare_push(output: Out, repo_id: str | None, private: bool) -> None:
    """Refuse before a run what would keep its output from being pushed, after hours, to a repo if there is one."""
    if repo_id is not None:
        pushing.open_repo(repo_id, private, None, output.note)


def report_pushed(output: Out, made: Mapping[str, Any], out: Path, source: str, repo_id: str, private: bool) -> None:
    """Push what was made, and report both; where the push fails, what was made."""
    pushed = None
    command = shlex.join(["loftq", "push", *["--private"] * private, str(out), repo_id])
    try:
        with interruptible(f"go on with `{command}`"):
            parcel = _packed(output, out, repo_id)
            output.note(f"pushing to {repo_id}")
            pushed = pushing.push(parcel, private=private, note=output.note)
    finally:
        report(output, made, out, source, pushed)
    _pushed(output, pushed, made)


def push(
    output: Out,
    out: Path,
    repo_id: str,
    *,
    private: bool,
    revision: str | None,
    message: str | None,
    dry_run: bool,
) -> None:
    """Push, or with `dry_run` say what would be."""
    parcel = _packed(output, out, repo_id, revision)
    if dry_run:
        output.data({"repo_id": repo_id, "revision": revision, "files": parcel.files, "bytes": parcel.total_bytes})
        rows = [(name, f"{count:,}") for name, count in [*parcel.files.items(), ("all", parcel.total_bytes)]]
        output.table(f"{out} → {repo_id}", (("file", "left"), ("bytes", "right")), rows, total=1)
        return
    with interruptible("the same command goes on: what is there is not sent again"):
        pushed = pushing.push(parcel, private=private, message=message, note=output.note)
    output.data(asdict(pushed))
    _pushed(output, pushed, parcel.report)


def _packed(output: Out, out: Path, repo_id: str, revision: str | None = None) -> Parcel:
    """Pack, and say what of `out` stays here, and what is no longer as it was made."""
    output.note(f"checking `{out}` against its report")
    parcel = pushing.pack(out, repo_id, revision)
    if left := [path.name for path in sorted(out.iterdir()) if path.is_file() and path.name not in parcel.files]:
        output.note(f"not from loftq, so it stays here: {', '.join(left)}")
    if parcel.edited:
        output.note(f"no longer as the source has it, pushed as it is: {', '.join(parcel.edited)}")
    return parcel


def _pushed(output: Out, pushed: Pushed, report: Mapping[str, Any]) -> None:
    gone = f"; {len(pushed.deleted)} of an earlier push removed" if pushed.deleted else ""
    lines = load_lines(report, pushed.repo_id, branch_of(pushed.revision), on_hub=True)
    load = "\n".join(f"  {line}" if line else "" for line in lines)
    output.result(f"{len(pushed.files)} files, {size(pushed.bytes)}, are on {pushed.url}{gone}\n\n{load}")


def inspect(output: Out, target: str, html: Path | None) -> None:
    """The report of an output, or the plan that defaults give for a model."""
    folder = Path(target)
    if html is not None and html.is_file() and not html.read_bytes().startswith(PAGE[:15].encode()):
        raise LoftqError(f"`{html}` is no page: it would be lost", "name another file")
    is_output = (folder / REPORT_FILE).exists() or (folder / WORK_FOLDER).is_dir()
    planned = None if is_output else plan_quantize(target, QuantizeConfig())
    told = verification.read_report(folder) if planned is None else plan_summary(planned)
    if html is not None:  # before a table that may be cut off, as by `head`
        try:
            html.write_text(page(told), encoding="utf-8")
        except OSError as error:
            raise LoftqError(f"cannot write `{html}`: {error.strerror}") from None
        output.note(f"wrote `{html}`")
    if planned is None:
        report(output, told, folder)
    else:
        plan(output, planned, None)


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
    violations = [*verdict.violations, *(f"`{name}` is no longer the source's" for name in verdict.edited)]
    output.data({**asdict(verdict), "ok": not violations})
    shown = 4 if verdict.other_source else SHOWN  # of what then is said of every weight
    for violation in violations[:shown]:
        output.result(f"✗ {violation}")
    if len(violations) > shown:
        output.result(f"✗ and {len(violations) - shown} more (`--json` has them all)")
    if violations:
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


def merge(output: Out, out: Path, dest: Path, adapter: Path | None) -> None:
    """Write the merged checkpoint, and say how to load it."""
    from loftq_cli import merge as merging

    made = verification.read_report(out)
    with output.progress("merging", 2 * made["totals"]["parameters"]) as advance:
        merged = merging.merge(out, dest, advance, adapter)
    output.data(asdict(merged))
    output.result(
        f"{merged.weights} weights with their adapters in `{dest}`, {size(merged.base_bytes)}; load it:\n\n"
        f'  {made["load"]["auto_class"]}.from_pretrained("{dest}")'
    )


def perplexity(output: Out, out: Path, text: Path, source: str | None, card: bool, **options: Any) -> None:
    """Measure and print perplexities, and with `card` put them there; `options` are those of `evaluate`."""
    before = (out / CARD_FILE).read_text(encoding="utf-8") if card else ""
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
    if card:
        write_file(out / CARD_FILE, with_perplexity(before, measured, text.name).encode())
        output.note(f"wrote it to `{out / CARD_FILE}`")


def _skips(output: Out, skipped: Sequence[Mapping[str, str]]) -> None:
    rows = [(reason, str(count), first) for reason, count, first in skip_counts(skipped)]
    output.table("Kept as they are", (("reason", "left"), ("tensors", "right"), ("e.g.", "left")), rows)
