"""The `loftq` command: flags → config → pipeline → console. Heavy imports happen inside the commands."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from loftq_cli import __version__, lean, options
from loftq_cli.console import speaking
from loftq_cli.errors import ConfigError, Interrupted, again, interruptible, was_interrupted

EPILOG = """
[bold]Examples[/]

loftq quantize --bits 2 --rank 16 ./SmolLM2-135M-Instruct ./out

loftq quantize --config configs/2bit-gptq.yaml --dry-run HuggingFaceTB/SmolLM2-135M-Instruct ./out

loftq verify ./out --source ./SmolLM2-135M-Instruct

loftq push ./out you/SmolLM2-135M-Instruct-2bit --private

torchrun --nproc-per-node 2 -m loftq_cli quantize --bits 2 MODEL OUT
"""

app = typer.Typer(
    name="loftq",
    help="Turn a pretrained model into a low-bit base checkpoint plus a LoRA adapter that already repairs the damage.",
    epilog=EPILOG,
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

JsonFlag = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")]
QuietFlag = Annotated[bool, typer.Option("--quiet", "-q", help="No notes, no progress.")]
VerboseFlag = Annotated[int, typer.Option("--verbose", "-v", count=True, help="More detail; -vv adds tracebacks.")]


def main() -> None:
    """Entry point of the `loftq` script."""
    lean.claim_process()
    try:
        app()
    except SystemExit as end:
        device = sys.modules.get("loftq_cli.device")
        waking = device is not None and device.is_waking()  # nothing is left to do, and its context takes 0.3 s to end
        # of Ctrl-C in a library's `exec`, Python remembers that nobody had handled it, and would die of it after all
        if isinstance(end.code, int) and (waking or end.code == Interrupted.exit_code):
            with contextlib.suppress(BrokenPipeError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(end.code)
        raise


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"loftq {__version__}")
        raise typer.Exit


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Take SIGTERM, with which schedulers end a job, for Ctrl-C: it, too, gets to say how to go on."""
    on_interrupt = signal.getsignal(signal.SIGINT)  # that of `speaking`; a shell has jobs in the background ignore it
    earlier = signal.signal(signal.SIGTERM, on_interrupt if callable(on_interrupt) else signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)


@app.command(epilog="Options can also stand in a YAML file (--config), one `option: value` a line; flags win.")
def quantize(
    model: options.Model,
    out: options.Out,
    config: options.Config = None,
    bits: options.Bits = None,
    quantizer: options.Quantizer = None,
    group_size: options.GroupSize = None,
    format: options.Format = None,
    double_quant: options.DoubleQuant = None,
    skip: options.Skip = None,
    bits_for: options.BitsFor = None,
    method: options.Method = None,
    rank: options.Rank = None,
    alpha: options.Alpha = None,
    rslora: options.Rslora = None,
    iters: options.Iters = None,
    adapter_dtype: options.AdapterDtype = None,
    experts_adapter: options.ExpertsAdapter = None,
    quantize_head: options.QuantizeHead = None,
    quantize_embeddings: options.QuantizeEmbeddings = None,
    calibration: options.Calibration = None,
    samples: options.Samples = None,
    seqlen: options.Seqlen = None,
    init: options.Init = None,
    epochs: options.Epochs = None,
    factor_lr: options.FactorLr = None,
    clip_lr: options.ClipLr = None,
    code_lr: options.CodeLr = None,
    augmented: options.Augmented = None,
    finish_epochs: options.FinishEpochs = None,
    finish_lr: options.FinishLr = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = None,
    evict: options.Evict = None,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    push_to_hub: options.PushToHub = None,
    private: options.Private = False,
    report_control: options.ReportControl = False,
    dry_run: options.DryRun = False,
    device: options.Device = None,
    activation_budget: options.ActivationBudget = None,
    seed: options.Seed = None,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
    verbose: VerboseFlag = 0,
) -> None:
    """Write a quantized base checkpoint and the LoRA adapter that repairs it."""
    flags = {
        "bits": bits, "quantizer": quantizer, "group_size": group_size, "format": format, "double_quant": double_quant,
        "skip": tuple(skip) if skip else None, "bits_for": bits_for or None, "method": method,
        "rank": rank, "alpha": alpha, "rslora": rslora, "iters": iters, "adapter_dtype": adapter_dtype,
        "experts_adapter": experts_adapter, "quantize_head": quantize_head, "quantize_embeddings": quantize_embeddings,
        "calibration": calibration, "samples": samples, "seqlen": seqlen, "init": init, "epochs": epochs,
        "factor_lr": factor_lr, "clip_lr": clip_lr, "code_lr": code_lr, "augmented": augmented,
        "finish_epochs": finish_epochs, "finish_lr": finish_lr, "activation_budget": activation_budget,
        "revision": revision, "trust_remote_code": trust_remote_code, "evict": evict, "device": device, "seed": seed,
    }  # fmt: skip
    silent = os.environ.get("RANK", "0") != "0" and "TORCHELASTIC_RUN_ID" in os.environ  # torchrun: rank 0 speaks
    with speaking(json, quiet, verbose, silent) as output:
        from loftq_cli.config import load_config

        decided = load_config(config, flags)
        if resume and overwrite:
            raise ConfigError("`--resume` and `--overwrite` contradict each other", "give one of them")
        if report_control and decided.evict:
            raise ConfigError(
                "`--report-control` reads every weight again, and `--evict` keeps none", "give one of them"
            )
        if private and push_to_hub is None:
            raise ConfigError("`--private` is for `--push-to-hub`, which is not given", "give both, or neither")
        from loftq_cli import pipeline, show
        from loftq_cli.ranks import joined
        from loftq_cli.resume import refusal
        from loftq_cli.windows import prepare, told

        plan = pipeline.plan_quantize(model, decided, to_run=not dry_run)
        for note in plan.notes:
            (output.warning if note == plan.targets.note else output.note)(note)
        if dry_run:
            if (text := prepare(plan, 1) if plan.is_calibrated else None) is not None:
                output.note(told(plan, text))
            identity = pipeline.identity(plan, text)
            show.plan(output, plan, out, identity.key, refusal(plan, out, identity, resume, overwrite))
            return
        existed = (out / "loftq_report.json").exists()
        try:
            with (
                _terminable(),
                joined() as ranks,
                output.progress(*show.bar(plan, ranks.size), rate=not plan.is_calibrated) as advance,
            ):
                report = pipeline.run_plan(
                    plan, out, resume=resume, overwrite=overwrite, progress=advance, ranks=ranks, note=output.note,
                    before=lambda: show.prepare_push(output, push_to_hub, private),
                )  # fmt: skip
        except (Exception, KeyboardInterrupt) as error:
            if not (output.interrupted or was_interrupted(error)):
                raise
            kept = (out / ".loftq").exists()
            raise Interrupted(
                "interrupted; what is done is kept" if kept else "interrupted before anything was done",
                f"go on with `{again('--resume')}`" if kept else "",
            ) from None
        if report_control and not silent:
            from loftq_cli.control import add_control

            report = add_control(plan, out, report)
        if existed and not overwrite and not resume:
            output.note(f"`{out}` is finished already, with these very settings: nothing to do")
        if push_to_hub is not None and not silent:
            with _terminable():
                show.report_pushed(output, report, out, model, push_to_hub, private)
        else:
            show.report(output, report, out, model)


@app.command()
def inspect(
    target: Annotated[str, typer.Argument(metavar="OUT_OR_MODEL", help="An output of loftq, or a model to be.")],
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the table as a page, too.")] = None,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
    verbose: VerboseFlag = 0,
) -> None:
    """Show what is quantized, at how many bits, with which error; of a plain model, what would be."""
    with speaking(json, quiet, verbose) as output:
        from loftq_cli import show

        show.inspect(output, target, html)


@app.command()
def verify(
    out: Annotated[Path, typer.Argument(help="A folder that `loftq quantize` wrote.")],
    source: Annotated[
        str | None, typer.Option(metavar="MODEL", help="What it was made from: recompute every weight's error.")
    ] = None,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
    verbose: VerboseFlag = 0,
) -> None:
    """Recompute hashes, and with --source every error, from the files; exit 1 if anything is not so.

    Tokenizer files and the like that differ from the source's count too; --json lists them apart, as `edited`.
    """
    with speaking(json, quiet, verbose) as output:
        from loftq_cli import show

        if not show.verify(output, out, source):
            raise typer.Exit(1)


@app.command()
def merge(
    out: Annotated[Path, typer.Argument(help="A folder that `loftq quantize` wrote.")],
    dest: Annotated[Path, typer.Argument(help="Folder to make: a plain checkpoint.")],
    adapter: Annotated[Path | None, typer.Option(help="Another than OUT's: what you have trained it to.")] = None,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
    verbose: VerboseFlag = 0,
) -> None:
    """Write a plain checkpoint with the adapter folded into the dequantized weights, one weight at a time."""
    hint, state = "the same command begins anew", "nothing of it is left"
    with speaking(json, quiet, verbose) as output, _terminable(), interruptible(hint, state):
        from loftq_cli import show

        show.merge(output, out, dest, adapter)


@app.command()
def push(
    out: Annotated[Path, typer.Argument(help="A folder that `loftq quantize` wrote.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="Owner and name, such as you/model-2bit.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repo private.")] = False,
    revision: Annotated[
        str | None,
        typer.Option(metavar="BRANCH", help="Another branch, made if need be; or a pull request, refs/pr/N."),
    ] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List files and bytes; ask nothing of the Hub.")] = False,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
    verbose: VerboseFlag = 0,
) -> None:
    """Upload base, adapter and card to the Hub; typed again after a broken connection, it sends what is missing."""
    with speaking(json, quiet, verbose) as output, _terminable():
        from loftq_cli import show

        show.push(output, out, repo_id, private=private, revision=revision, message=message, dry_run=dry_run)


@app.command("eval")
def evaluate(
    out: Annotated[Path, typer.Argument(help="A folder that `loftq quantize` wrote.")],
    text: Annotated[Path, typer.Option(metavar="FILE", help="Plain text, or a .jsonl as `--calibration` takes.")],
    source: Annotated[str | None, typer.Option(metavar="MODEL", help="What OUT was made from: measure it too.")] = None,
    adapter: Annotated[Path | None, typer.Option(metavar="TUNED", help="The trained adapter: measure it too.")] = None,
    seqlen: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a window. \\[default: 2048, if it has them]")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Only the first N tokens of the text.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows at a time.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    card: Annotated[bool, typer.Option("--card", help="Put the result on OUT's model card, too.")] = False,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
    verbose: VerboseFlag = 0,
) -> None:
    """Measure perplexity on a text: base alone, base + adapter, and with --source what they were made from."""
    with speaking(json, quiet, verbose) as sink:
        from loftq_cli.show import perplexity

        window = {"seqlen": seqlen, "max_tokens": max_tokens, "batch_size": batch_size}
        perplexity(sink, out, text, source, card, adapter=adapter, device=device, **window)
