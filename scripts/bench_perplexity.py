"""`bench.py perplexity`: what each method makes of a model before any fine-tuning, as perplexity on two texts.

    python scripts/bench.py perplexity --model FOLDER
    python scripts/bench.py perplexity --model FOLDER --bits 2 --ranks 16 64 --methods loftq cloq
    python scripts/bench.py perplexity --model FOLDER --bits 2 --ranks 16 --arm "loftq, 20 rounds=--iters 20"

Every combination of bits, rank and arm is a whole `loftq quantize` process, then base + adapter on the texts in
scripts/data/; the source once. A row is saved as soon as it is there, and what the file has already is skipped, so
the table can be filled by several calls; with `--cache`, one that was cut off goes on where it was, and its row has no
seconds. An arm that fails is reported, and the others go on.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import bench_common
from bench_common import GROUP_SIZE, file_name, machine, print_table, save, say

NAME, SOURCE = "perplexity", "source"
DATA = Path(__file__).parent / "data"
TEXTS = {"Wikipedia": DATA / "wikipedia_eval.txt", "Austen": DATA / "austen_persuasion.txt"}
UNIFORM = "--quantizer uniform --format dense"  # dense, so that every arm is computed in the same way
LLOYD, LLOYD_FIT = "--quantizer lloyd --format dense", "--quantizer lloyd-fit --format dense"
ARMS = {  # name → what it adds to `loftq quantize`
    "qlora-nf": "--method qlora --quantizer nf --format dense",
    "loftq-nf": "--method loftq --quantizer nf --format dense",  # LoftQ as published
    "loftq-lloyd": f"--method loftq {LLOYD}",
    "loftq-lloyd-packed": "--method loftq --quantizer lloyd --format packed",  # the same model, as it is trained
    "qlora": f"--method qlora {UNIFORM}",
    "loftq": f"--method loftq {UNIFORM}",
    "qlora-lloyd": f"--method qlora {LLOYD}",
    "qera": f"--method qera {UNIFORM}",
    "qera-lloyd": f"--method qera {LLOYD}",
    "cloq": f"--method cloq {UNIFORM}",
    "apiq-lw": f"--method apiq-lw {UNIFORM}",
    "apiq-bw": f"--method apiq-bw {UNIFORM}",
    "apiq-bw-paper": f"--method apiq-bw --init qlora --epochs 20 {UNIFORM}",
    "cloq-finish": f"--method cloq --finish-epochs 4 {UNIFORM}",
    "apiq-bw-finish": f"--method apiq-bw --finish-epochs 4 {UNIFORM}",
    "cloq-lloyd": f"--method cloq {LLOYD}",
    "cloq-lloyd-fit": f"--method cloq {LLOYD_FIT}",
    "apiq-bw-lloyd": f"--method apiq-bw {LLOYD}",
    "apiq-bw-finish-lloyd": f"--method apiq-bw --finish-epochs 4 {LLOYD}",
    "apiq-bw-finish-lloyd-fit": f"--method apiq-bw --finish-epochs 4 {LLOYD_FIT}",
}
WITHOUT_TEXT = ("loftq", "qlora")  # every other method is calibrated
COLUMNS = {  # an untuned 2-bit model can be thousands of times worse, so digits are counted, not decimals
    "method": "", "bits": "", "rank": "", "seconds": ".1f", "device, GiB": ".2f", "host, GiB": ".2f",
    "Wikipedia perplexity": ".4g", "Wikipedia, × source": ".4g",
    "Austen perplexity": ".4g", "Austen, × source": ".4g",
}  # fmt: skip


def earlier_rows(common: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows to go on from. Those of another model, protocol or GPU would not compare with ours in one table."""
    for folder in (bench_common.RESULTS, bench_common.HERE):
        if not (file := folder / file_name(NAME)).exists():
            continue
        content = json.loads(file.read_text())
        theirs = {key: content.get(key) for key in common} | {"gpu": content["machine"]["gpu"]}
        if theirs == common | {"gpu": machine()["gpu"]}:
            return content["rows"]
        said = f"{file} is of other settings, {theirs}"
        if folder == bench_common.RESULTS:  # it would be overwritten
            sys.exit(f"{said}: move it away, or name another folder in BENCH_RESULTS")
        say(f"{said}: not used")
    return []


def save_rows(rows: list[dict[str, Any]], common: dict[str, Any]) -> None:
    """By bits, rank and arm, whatever the order in which they were measured; the source comes first."""
    order = {name: position for position, name in enumerate(ARMS)}  # those of --arm come last
    rows.sort(key=lambda row: (row["bits"] or 0, row["rank"] or 0, order.get(row["method"], len(order))))
    save(NAME, rows, command=f"python scripts/bench.py {NAME} --model FOLDER", **common)


def quantize_flags(arm: str, bits: int, rank: int, text: list[str]) -> list[str]:
    """What an arm gives to `loftq quantize`; its own flags come last, for there the last one wins."""
    method = re.search(r"--method[ =](\S+)", arm)
    calibrated = method is not None and method[1] not in WITHOUT_TEXT
    common = ["--bits", str(bits), "--rank", str(rank), "--group-size", str(GROUP_SIZE)]
    return [*common, *(text if calibrated else []), *shlex.split(arm)]


def perplexities(out: Path, source: str | None, evaluation: dict[str, int]) -> dict[str, Any]:
    """Of each text: the protocol, and the perplexity of "source", "base alone" and "base + adapter"."""
    from loftq_cli.evaluate import evaluate

    found = {}
    for text, file in TEXTS.items():
        measured = evaluate(out, file, source, **evaluation)
        found[text] = {"protocol": measured.protocol} | {row.name: row.perplexity for row in measured.rows}
        free()
    return found


def free() -> None:
    """Give the device back to the next process: models hold themselves in cycles."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def measure(
    model: Path, flags: list[str], evaluation: dict[str, int], with_source: bool, cache: Path | None, again: bool
) -> dict[str, Any]:
    """One whole process, and the perplexities of what it wrote, which is then removed unless there is a cache."""
    import torch
    from finetune_base import made

    free()  # what an evaluation that failed has left
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with (
        tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as work,
        made(model, flags, device, cache or Path(work), cache is not None, again) as base,
    ):
        texts = perplexities(base.folder, str(model) if with_source else None, evaluation)
    assert base.report is not None
    return {"process": base.process, "totals": base.report["totals"], "texts": texts}


def source_row(texts: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {**dict.fromkeys(COLUMNS), "method": SOURCE}
    for text, found in texts.items():
        row |= {f"{text} perplexity": found["source"], f"{text}, × source": 1.0}
    return row | {"flags": "", "protocol": {text: found["protocol"] for text, found in texts.items()}}


def make_row(key: dict[str, Any], measured: dict[str, Any], source: dict[str, Any], flags: str) -> dict[str, Any]:
    totals, process = measured["totals"], measured["process"] or {"wall": None, "VmHWM": 0}
    row = {
        **key, "seconds": process["wall"],
        "device, GiB": totals["peak_device_bytes"] / 2**30 or None,  # none on a CPU
        "host, GiB": max(totals["peak_host_bytes"], process["VmHWM"]) / 2**30,  # samples may miss the very last
    }  # fmt: skip
    for text, found in measured["texts"].items():
        perplexity = found["base + adapter"]
        row |= {f"{text} perplexity": perplexity, f"{text}, × source": perplexity / source[f"{text} perplexity"]}
    return row | {
        "base alone": {text: found["base alone"] for text, found in measured["texts"].items()},
        "bits per weight": totals["bits_per_weight"], "relative error": totals["relative_error"],
        "stages, s": totals["seconds"], "flags": flags,
    }  # fmt: skip


def perplexity(
    model: Path, arms: dict[str, str], bits: list[int], ranks: list[int], calibration: str, samples: int, seqlen: int,
    evaluation: dict[str, int], again: bool, cache: Path | None,
) -> list[str]:  # fmt: skip
    """Fill and print the table; the arms that failed."""
    common = {"model": model.resolve().name, "group_size": GROUP_SIZE, "evaluation": evaluation}
    rows, failed = earlier_rows(common), []
    shown = Path(calibration).name if Path(calibration).exists() else calibration  # results name no folders
    for key, arm in [
        ({"method": name, "bits": number, "rank": rank}, arm)
        for number in bits
        for rank in ranks
        for name, arm in arms.items()
    ]:
        label = f"{key['method']}, {key['bits']} bits, rank {key['rank']}"
        windows = ["--samples", str(samples), "--seqlen", str(seqlen)]
        flags = shlex.join(quantize_flags(arm, key["bits"], key["rank"], ["--calibration", shown, *windows]))
        same = [row for row in rows if {column: row[column] for column in key} == key]
        if not again and any(row["flags"] == flags for row in same):
            say(f"{label}: there already")
            continue
        say(label)
        source = next((row for row in rows if row["method"] == SOURCE), None)
        try:
            full = quantize_flags(arm, key["bits"], key["rank"], ["--calibration", calibration, *windows])
            measured = measure(model, full, evaluation, source is None, cache, again)
        except Exception as error:  # whatever became of one arm, the others are worth having
            say(f"  failed: {type(error).__name__}: {error}")
            failed.append(label)
            continue
        if source is None:
            rows.append(source := source_row(measured["texts"]))
        # one row of a name, bits and rank: two with other flags could not be told apart in the table
        rows = [row for row in rows if row not in same] + [make_row(key, measured, source, flags)]
        say("  perplexities:", {text: found["base + adapter"] for text, found in measured["texts"].items()})
        save_rows(rows, common)
    print_table(rows, COLUMNS)
    return failed


def parse(arguments: list[str]) -> argparse.Namespace:
    listing = "\n".join(f"  {name:14} {flags}" for name, flags in ARMS.items())
    parser = argparse.ArgumentParser(
        prog=f"bench.py {NAME}", description=__doc__, epilog=f"methods:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint, e.g. of scripts/get_smollm2.py")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--methods", nargs="+", choices=ARMS, metavar="METHOD", help="default: all, or with --arm none")
    parser.add_argument("--arm", action="append", default=[], metavar="NAME=FLAGS", help="an arm more; repeatable")
    parser.add_argument("--calibration", default=str(DATA / "wikipedia_calibration.txt"), help="for calibrated arms")
    parser.add_argument("--samples", type=int, default=128, help="windows of it")
    parser.add_argument("--seqlen", type=int, default=1024, help="tokens in such a window")
    parser.add_argument("--eval-seqlen", type=int, default=512, help="tokens in a window that is evaluated")
    parser.add_argument("--max-tokens", type=int, default=65536, help="of each text that is evaluated")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="keep bases there, also those that were cut off")
    parser.add_argument("--again", action="store_true", help="measure what is there already, but for the source")
    parsed = parser.parse_args(arguments)
    parsed.arms = {}
    for arm in parsed.arm:
        name, equals, flags = arm.partition("=")
        if not equals or not name or name in (SOURCE, *ARMS, *parsed.arms):
            parser.error(f"--arm {arm!r}: not NAME=FLAGS, or the name is taken")
        parsed.arms[name] = flags
    parsed.arms |= {method: ARMS[method] for method in parsed.methods or ([] if parsed.arm else ARMS)}
    return parsed


def main(arguments: list[str]) -> int:
    """The exit status."""
    parsed = parse(arguments)
    failed = perplexity(
        parsed.model, parsed.arms, parsed.bits, parsed.ranks, parsed.calibration, parsed.samples, parsed.seqlen,
        {"seqlen": parsed.eval_seqlen, "max_tokens": parsed.max_tokens}, parsed.again, parsed.cache,
    )  # fmt: skip
    for label in failed:
        say(f"failed: {label}")
    return 1 if failed else 0
