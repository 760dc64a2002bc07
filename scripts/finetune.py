"""What a low-bit base is worth after fine-tuning: every arm on two tasks, beside LoRA on the 16-bit model.

    python scripts/get_smollm2.py FOLDER
    python scripts/finetune.py --model FOLDER                                     # all of it: hours on a GPU
    python scripts/finetune.py --model FOLDER --bits 2 --ranks 16 --arms loftq-nf apiq-bw --limit-seconds 500
    python scripts/finetune.py --model FOLDER --bits 2 --arm "mine=--method cloq --quantizer lloyd --format dense"
    accelerate launch --multi_gpu --num_processes 8 scripts/finetune.py --model FOLDER    # shared out among GPUs
    python scripts/finetune.py --merge FILE...                                    # of other machines with such a GPU
    python scripts/finetune.py --table                                            # into README.md, with the plot

Every base is one `loftq quantize`, used for all tasks, learning rates and seeds. All arms see the same data in the
same order, with the same steps and batches. One seed searches the learning rate, by what is held out for that, up to
where higher and lower ones are worse; the other seeds take that. What can be trained at once is, on the one base in
memory, side by side. Every training is saved when it is done and never repeated, so the table can be filled by several
calls, one after another or beside each other. An arm that fails is reported, and the others go on.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # this loftq, not an installed one
sys.path.insert(0, str(Path(__file__).parent))
import bench_common
import bench_perplexity
from bench_common import file_name, print_table, say
from finetune_base import describe_base, digest_of_text, digest_of_weights, made, share_of_process, write_control
from finetune_plot import plot
from finetune_results import COLUMNS, CONTROLS, FULL, SEARCH_SEED, UNTRAINED, Results, merge, reported
from finetune_tasks import SIZES, TASKS, described, write_text
from finetune_train import Tuned, run

NAME = "finetune"
BITS = {  # what is asked for → what `loftq quantize` is given; the blocks of LoftQ's mixtures have 4 bits or 2
    "2": (2, None), "4": (4, None), "3": (3, None), "3-mixed": (2, "configs/paper-3bit.yaml"),
    "2.5": (2, "configs/paper-2.5bit.yaml"), "2.25": (2, "configs/paper-2.25bit.yaml"),
}  # fmt: skip
FIRST = ("16", "2", "4")  # before the others, with all ranks
ARMS = (
    "qlora-nf", "qlora-lloyd", "loftq-nf", "loftq", "loftq-lloyd", "qera-lloyd", "cloq-lloyd", "apiq-bw-lloyd",
    "apiq-bw-finish-lloyd", "apiq-bw-paper",
)  # fmt: skip
BEST, TASK_TEXT = bench_perplexity.ARMS["apiq-bw-finish-lloyd"], "tasks.txt"
BEYOND = {  # what may bring 2 bits nearer to 16: more bytes, training, windows, or a text of what is to be learnt
    "group-32": f"{BEST} --group-size 32",
    "epochs-20": f"{BEST} --epochs 20",
    "finish-12": f"{BEST} --finish-epochs 12",
    "windows-240": f"{BEST} --samples 240",  # all that there are in the text
    "task-text": f"{BEST} --calibration {TASK_TEXT}",
    "task-text-more": f"{BEST} --calibration {TASK_TEXT} --samples 240 --finish-epochs 12",
}
ONLY_AT = {name: ("2",) for name in ("apiq-bw-paper", *BEYOND, *CONTROLS)}  # the first's 20 epochs take long
NAMES = (FULL, *bench_perplexity.ARMS, *BEYOND, *CONTROLS)


class Clock:
    """Whether another piece of work fits into what a call may take."""

    def __init__(self, limit: float | None) -> None:
        self.begin, self.limit, self.left = time.perf_counter(), limit, list[str]()

    def fits(self, seconds: float, label: str) -> bool:
        fits = self.limit is None or time.perf_counter() - self.begin + seconds <= self.limit
        if not fits:
            self.left.append(label)
        return fits


def quantize_flags(item: dict[str, Any], arm: str, calibration: list[str]) -> list[str]:
    """As of `bench.py perplexity`; files of configurations are relative, to the repository or to what is kept."""
    if item["arm"] == FULL:
        return []
    if item["arm"] in CONTROLS:
        file = f"{item['arm']}-{item['rank']}.yaml"
        return ["--config", file, *bench_perplexity.quantize_flags(arm, 2, 1, calibration)]
    width, config = BITS[item["bits"]]
    flags = bench_perplexity.quantize_flags(arm, width, item["rank"], calibration)
    return ["--config", config, *flags] if config else flags


def items(arms: dict[str, str], bits: list[str], ranks: list[int]) -> list[dict[str, Any]]:
    """Bases, those first that matter most: 2 and 4 bits with every rank."""
    found = [
        {"arm": arm, "bits": width, "rank": rank}
        for width in ("16", *bits)
        for rank in ranks
        for arm in arms
        if (arm == FULL) == (width == "16") and width in ONLY_AT.get(arm, (width,))
    ]
    return sorted(found, key=lambda item: (item["bits"] not in FIRST, item["rank"]))


def next_runs(results: Results, key: dict[str, Any], seeds: list[int]) -> list[tuple[int, float]]:
    """Seeds and learning rates of trainings that are missing and can be done now; the search comes first."""
    best, following = results.search(**key)
    if best is None:
        return [(SEARCH_SEED, lr) for lr in following if SEARCH_SEED in seeds]
    return [(seed, best) for seed in seeds if not results.of(seed=seed, lr=best, **key)]


def expected(results: Results, task: str) -> float:
    """Seconds of trainings: as long as the longest so far."""
    return max((run["seconds"] for run in results.runs if run["task"] == task), default=0.0)


def fill(results: Results, arguments: argparse.Namespace, clock: Clock, cache: Path) -> list[str]:
    """Train what is missing; the arms that failed."""
    failed: list[str] = []
    tasks: dict[str, Any] = {}
    for item in items(arguments.arms, arguments.bits, arguments.ranks)[arguments.share]:
        label = f"{item['arm']}, {item['bits']} bits, rank {item['rank']}"
        with reported(label, failed):
            fill_item(results, item, label, arguments, clock, cache, tasks)
        bench_perplexity.free()
    return failed


def fill_item(
    results: Results, item: dict[str, Any], label: str, arguments: argparse.Namespace, clock: Clock, cache: Path,
    tasks: dict[str, Any],
) -> None:  # fmt: skip
    """One base: made where it is not there, and trained for every task."""
    windows = ["--samples", str(arguments.samples), "--seqlen", str(arguments.seqlen)]
    given = Path(arguments.calibration)
    flags, shown = (
        quantize_flags(item, arguments.arms[item["arm"]], ["--calibration", text, *windows])
        for text in (str(given), given.name if given.exists() else str(given))  # results name no folders
    )
    if TASK_TEXT in flags:
        flags[flags.index(TASK_TEXT)] = str(write_text(arguments.sizes, cache / TASK_TEXT))
    text = digest_of_text(flags)
    known = next((base for base in results.bases if all(base[name] == value for name, value in item.items())), None)
    known, again = (None, True) if arguments.again else (known, False)
    if known and (known["flags"], known["text"]) != (shlex.join(shown), text):
        of = "" if known["text"] == text else f", whose text is {known['text']}, now {text}"
        raise ValueError(
            f"what is there was made with `{known['flags']}`{of}: measure it `--again`, or name another --arm"
        )

    untrained = item["arm"] in UNTRAINED

    def missing(task: str) -> list[tuple[int, float]]:
        return [] if untrained else next_runs(results, item | {"task": task}, arguments.seeds)

    wanted = [t for t in arguments.tasks if again or missing(t) or (untrained and not (known and t in known["before"]))]
    if not wanted:
        done = untrained or all(results.chosen(**item, task=task) for task in arguments.tasks)
        say(f"{label}: {'there already' if done else f'its rate is not searched yet, which seed {SEARCH_SEED} does'}")
        return
    seconds = (known and known["seconds"]) or guess(shown)
    if not clock.fits(seconds + expected(results, wanted[0]), label):
        return
    say(label)
    if item["arm"] in CONTROLS:
        file = cache / flags[1]
        flags[1] = str(write_control(arguments.model, item["rank"], arguments.device, file, 0 if untrained else 1))
    with made(arguments.model, flags, arguments.device, cache, arguments.cache is not None, again) as base:
        tuned = Tuned(base.folder, item["rank"], arguments.device, fresh=not flags, graphs=not arguments.eager)
        described_as = known or describe_base(item, base, arguments.model, shown, text)
        if base.made_of != described_as["made_of"]:
            say("  not the bytes that were trained on before: measured anew")
            described_as = describe_base(item, base, arguments.model, shown, text)
        if described_as is not known:
            results.replace(described_as, again)
            wanted = arguments.tasks
        for name in wanted:
            if name not in tasks:
                tasks[name] = load_task(name, arguments)
            if name not in described_as["before"]:
                tuned.reset(SEARCH_SEED)
                before = {**described_as["before"], name: tuned.evaluate(tasks[name], "test")}
                described_as = {**described_as, "before": before}
                results.add(bases=[described_as])
                say(f"  {name} before training:", before[name])
            while pairs := missing(name)[: arguments.at_once]:
                if not clock.fits(expected(results, name), f"{label}, {name}"):
                    break
                rows = [item | {"task": name} | row for row in run(tuned, tasks[name], pairs)]
                results.add(runs=rows)
                for row in rows:  # the seconds are those of all
                    say(f"  {name}, seed {row['seed']}, rate {row['lr']:g}: {row['seconds']:.1f} s", row["test"])


def guess(flags: list[str]) -> float:
    """Seconds that `loftq quantize` takes of a small model on a GPU, where it is not known; with SmolLM2 measured."""
    method = re.search(r"--method (\S+)", shlex.join(flags))
    if method is None or method[1] in bench_perplexity.WITHOUT_TEXT:
        return 10.0 if method else 0.0
    return 45.0 if not method[1].startswith("apiq") else 600.0 if "--epochs" in flags else 300.0


def load_task(name: str, arguments: argparse.Namespace) -> Any:
    from transformers import AutoTokenizer

    task = TASKS[name](AutoTokenizer.from_pretrained(arguments.model), arguments.device, arguments.sizes[name])
    say(f"  {name}: {task.sizes}")
    return task


def parse(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, help="a checkpoint, e.g. of scripts/get_smollm2.py")
    add("--bits", nargs="+", choices=BITS, default=list(BITS))
    add("--ranks", type=int, nargs="+", default=[16, 64])
    add("--arms", nargs="+", choices=NAMES, metavar="ARM", help="default: all of the table")
    add("--arm", action="append", default=[], metavar="NAME=FLAGS", help="an arm of `loftq quantize` more; repeatable")
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help=f"{SEARCH_SEED} searches the learning rate")
    add("--lrs", type=float, nargs="+", help="where the search of learning rates begins, other than the table's")
    add("--steps", nargs="+", default=[], metavar="TASK=N", help="of training, other than the table's")
    add("--limit-seconds", type=float, metavar="N", help="begin nothing that would not be done N seconds from now")
    add("--cache", type=Path, metavar="FOLDER", help="keep quantized models here; else each is removed after its use")
    add("--calibration", default=str(bench_perplexity.DATA / "wikipedia_calibration.txt"), help="of calibrated arms")
    add("--samples", type=int, default=128, help="windows of it")
    add("--seqlen", type=int, default=1024, help="tokens in such a window")
    add("--device", default=None, help="default: the first GPU, else the CPU")
    add("--at-once", type=int, default=3, metavar="N", help="so many trainings side by side on one base; default: 3")
    add("--eager", action="store_true", help="on a GPU launch every kernel anew: no CUDA graphs")
    add("--again", action="store_true", help="quantize these arms anew, and measure them instead of what is there")
    add("--merge", type=Path, nargs="+", metavar="FILE", help="add the rows of other files of results, and stop")
    add("--table", action="store_true", help="print the table, put it into README.md, draw the loss curves, and stop")
    parsed = parser.parse_args(given)
    if parsed.model is None and not (parsed.table or parsed.merge):
        parser.error("the following arguments are required: --model")
    if parsed.model is not None and not (parsed.model / "config.json").exists():
        parser.error(f"--model {parsed.model}: no checkpoint there, for it has no config.json")
    if parsed.at_once < 1:
        parser.error(f"--at-once {parsed.at_once}: at least one")
    extra = {}
    for arm in parsed.arm:
        name, equals, flags = arm.partition("=")
        if not equals or not name or name in (*NAMES, *extra):
            parser.error(f"--arm {arm!r}: not NAME=FLAGS, or the name is taken")
        extra[name] = flags
    names = parsed.arms or ([] if extra else [FULL, *ARMS, *BEYOND, *CONTROLS])
    parsed.arms = {name: (bench_perplexity.ARMS | BEYOND | CONTROLS).get(name, "") for name in names} | extra
    parsed.sizes = {
        name: replace(size, rates=tuple(parsed.lrs)) if parsed.lrs else size for name, size in SIZES.items()
    }
    for assignment in parsed.steps:
        name, _, number = assignment.partition("=")
        if name not in SIZES or not number.isdigit() or int(number) < 1:
            parser.error(f"--steps {assignment!r}: not TASK=N, with one of {', '.join(SIZES)}")
        parsed.sizes[name] = replace(parsed.sizes[name], steps=int(number))
    return parsed


def main(given: list[str]) -> int:
    """The exit status."""
    arguments = parse(given)
    arguments.share = share_of_process()
    clock = Clock(arguments.limit_seconds)
    file = bench_common.RESULTS / file_name(NAME)
    if arguments.table or arguments.merge:
        merge(arguments.merge or [], bench_common.RESULTS, NAME, NAMES)
        return table() if arguments.table else 0
    machine, begin = bench_common.machine(), bench_common.HERE / file.name
    arguments.device = arguments.device or ("cuda" if machine["gpu"] else "cpu")
    common = {
        "model": arguments.model.resolve().name, "weights": digest_of_weights(arguments.model),
        "group_size": bench_common.GROUP_SIZE, "tasks": described(arguments.sizes), "gpu": machine["gpu"],
    }  # fmt: skip
    results = Results(file, common, NAMES, begin=begin)
    results.machine = machine
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as work:
        failed = fill(results, arguments, clock, arguments.cache or Path(work))
    print_table(results.table(), COLUMNS)
    for label in clock.left:
        say(f"no time left for: {label}")
    for label in failed:
        say(f"failed: {label}")
    return 1 if failed else 0


def table() -> int:
    """Print tables, put them into README.md, and draw the loss curves beside the files."""
    files = [file for kind in ("", "-cuda") if (file := bench_common.HERE / f"{NAME}{kind}.json").exists()]
    for file in files:
        results = Results(file, Results.settings(file), NAMES)
        with results.locked():  # written anew, as tables are made now
            print_table(results.table(), COLUMNS)
        plot(results, file.with_suffix(".svg"))
    bench_common.fill_readme({NAME: COLUMNS}, f"{NAME}*.json")
    return 0 if files else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
