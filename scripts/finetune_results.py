"""What `finetune.py` keeps: a file of runs that several processes fill, its table, and its loss curves as a picture.

The file holds "runs" (one training each), "bases" (what was trained on), and "rows", the table made from both, without
rows that lack a task.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench_common import say
from finetune_tasks import digest

SEARCH_SEED = 0  # the one that tries several learning rates
LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # of rates; the search ends between two worse ones
RUN = ("arm", "bits", "rank", "task", "seed", "lr")  # names a run
BASE = ("arm", "bits", "rank")
FULL = "lora16"  # the arm that is not quantized
CONTROLS = {  # as many bytes as base and adapter of the rank
    "same-bytes": "--method qlora --format dense",  # plain rounding without an adapter: measured, not trained
    "same-bytes-cloq": "--method cloq --format dense",  # looking at text, and an adapter of rank 1 that is trained
}
UNTRAINED = ("same-bytes",)
BITS_ORDER = ("16", "4", "3", "3-mixed", "2.5", "2.25", "2")
COLUMNS = dict.fromkeys((
    "arm", "bits", "rank", "bits per weight", "with adapter", "accuracy, %", "NLL", "Austen perplexity", "× 16-bit",
    "learning rates", "untrained: accuracy, %", "Austen perplexity, untrained",
), "")  # fmt: skip
TRAINED = ("accuracy, %", "Austen perplexity")  # a row is published once it has both
SHOWN = {"headlines": (("accuracy", "accuracy, %", 100, ".1f"), ("nll", "NLL", 1, ".3f")),
         "austen": (("perplexity", "Austen perplexity", 1, ".2f"),)}  # fmt: skip


def same(row: dict[str, Any], key: dict[str, Any]) -> bool:
    return all(row[name] == value for name, value in key.items())


def key_of(row: dict[str, Any], names: Iterable[str]) -> tuple[Any, ...]:
    return tuple(row[name] for name in names)


class Results:
    """`file`, as it is now; every row that is added is in it at once, whoever else adds some."""

    def __init__(self, file: Path, common: dict[str, Any], arms: Iterable[str], begin: Path | None = None) -> None:
        """Rows of `begin` are taken over where there is no `file` yet, if they are of the same settings.

        Raises:
            SystemExit: the file is of other settings, with which nothing could be compared.
        """
        self.file, self.common, self.order = file, common, {name: position for position, name in enumerate(arms)}
        self.runs: list[dict[str, Any]] = []
        self.bases: list[dict[str, Any]] = []
        self.machine: dict[str, Any] | None = None  # that measured
        if file.exists():
            self.take(file)
        elif begin is not None and begin.exists() and self.settings(begin) == common:
            self.take(begin)

    @staticmethod
    def settings(file: Path) -> dict[str, Any]:
        """What all rows of a file have in common."""
        content = json.loads(file.read_text(encoding="utf-8"))
        settings = {key: content.get(key) for key in ("model", "weights", "group_size", "tasks")}
        return settings | {"gpu": content["machine"]["gpu"]}

    def take(self, file: Path) -> None:
        """Add the rows of another file that are new here, but for those of bases that are of other bytes here."""
        content = json.loads(file.read_text(encoding="utf-8"))
        theirs = self.settings(file)
        if different := [key for key in self.common if theirs[key] != self.common[key]]:
            said = "; ".join(f"{key} is {theirs[key]} there, {self.common[key]} here" for key in different)
            raise SystemExit(f"{file} is of other settings: {said}; move it away, or name a folder in BENCH_RESULTS")
        self.machine = self.machine or content["machine"]
        made_of = {key_of(base, BASE): base["made_of"] for base in self.bases}
        other = {
            key
            for base in content["bases"]
            if made_of.get(key := key_of(base, BASE), base["made_of"]) != base["made_of"]
        }
        for ours, new, names in ((self.runs, content["runs"], RUN), (self.bases, content["bases"], BASE)):
            there = {key_of(row, names) for row in ours}
            ours.extend(row for row in new if key_of(row, names) not in there and key_of(row, BASE) not in other)
        for arm, bits, rank in sorted(other):
            say(f"{file}: {arm}, {bits} bits, rank {rank} is of other bytes there than here: left out")

    def add(self, runs: Iterable[dict[str, Any]] = (), bases: Iterable[dict[str, Any]] = ()) -> None:
        """Add rows to the file; one with the name of another takes its place."""
        with self.locked():
            for ours, new, names in ((self.runs, runs, RUN), (self.bases, bases, BASE)):
                for row in new:
                    known = next((old for old in ours if same(old, {name: row[name] for name in names})), {})
                    ours[:] = [old for old in ours if old is not known]
                    ours.append(
                        {**row, "before": {**known.get("before", {}), **row["before"]}} if "before" in row else row
                    )

    def replace(self, base: dict[str, Any], again: bool) -> None:
        """A base in the place of the one of its name, whose runs say nothing of it and are removed.

        Unless that one is of the same bytes: another process has begun with it, too. With `again` in any case.
        """
        key = {name: base[name] for name in BASE}
        with self.locked():
            if not again and any(same(row, {**key, "made_of": base["made_of"]}) for row in self.bases):
                return
            self.runs, self.bases = ([row for row in rows if not same(row, key)] for rows in (self.runs, self.bases))
            self.bases.append(base)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """The rows as the file has them now; what becomes of them is written."""
        from filelock import FileLock

        self.file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(Path(tempfile.gettempdir()) / f"finetune-{digest(str(self.file.resolve()))}.lock"):
            if self.file.exists():
                self.runs, self.bases = [], []
                self.take(self.file)
            yield
            self.write()

    def write(self) -> None:
        def key(row: dict[str, Any]) -> tuple[Any, ...]:
            place = BITS_ORDER.index(row["bits"]), row["rank"], self.order.get(row["arm"], len(self.order)), row["arm"]
            return (*place, *(row[name] for name in ("task", "seed", "lr") if name in row))

        self.runs.sort(key=key)
        self.bases.sort(key=key)
        settings = {key: value for key, value in self.common.items() if key != "gpu"}  # which is the machine's
        head = {"command": "python scripts/finetune.py --model FOLDER", "machine": self.machine, **settings}
        parts = [f' "{name}": {json.dumps(value, ensure_ascii=False)}' for name, value in head.items()]
        for name, rows in (("rows", self.published()), ("bases", self.bases), ("runs", self.runs)):
            lines = ",\n".join("  " + json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
            parts.append(f' "{name}": [\n{lines}\n ]')
        partial = self.file.with_suffix(f".{os.getpid()}.partial")
        partial.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
        partial.replace(self.file)

    def of(self, **key: Any) -> list[dict[str, Any]]:
        return [run for run in self.runs if same(run, key)]

    def search(self, **key: Any) -> tuple[float | None, list[float]]:
        """The learning rate with the least validation loss, or None and those to be tried next.

        It is found once the next rate on either side is worse, so that no arm is cut off by what is tried for all.
        """
        tried = {run["lr"]: run["validation"]["nll"] for run in self.of(seed=SEARCH_SEED, **key)}
        if missing := [lr for lr in self.common["tasks"][key["task"]]["rates"] if lr not in tried]:
            return None, missing
        best = min(sorted(tried), key=lambda lr: math.inf if tried[lr] is None else tried[lr])
        below = max((lr for lr in LADDER if lr < best), default=best)
        above = min((lr for lr in LADDER if lr > best), default=best)
        if best == min(tried) and below not in tried:
            return None, [below]
        return (None, [above]) if best == max(tried) and above not in tried else (best, [])

    def chosen(self, **key: Any) -> list[dict[str, Any]]:
        """The runs, one a seed, with the learning rate that was chosen."""
        lr, _ = self.search(**key)
        return [] if lr is None else self.of(lr=lr, **key)

    def published(self) -> list[dict[str, Any]]:
        """The rows of the table that lack no task."""
        return [row for row in self.table() if row["arm"] in UNTRAINED or all(row[name] for name in TRAINED)]

    def table(self) -> list[dict[str, Any]]:
        """Text for every cell of `COLUMNS`, mean ± standard deviation over seeds; None where nothing is measured."""
        rows = []
        full = {
            rank: self.chosen(arm=FULL, bits="16", rank=rank, task="austen")
            for rank in {base["rank"] for base in self.bases}
        }
        for base in self.bases:
            row: dict[str, Any] = {**dict.fromkeys(COLUMNS), **{name: base[name] for name in BASE}}
            key = {name: base[name] for name in BASE}
            for column in ("bits per weight", "with adapter"):
                row[column] = None if base[column] is None else f"{base[column]:.2f}"
            rates = []
            for task, shown in SHOWN.items():
                runs = self.chosen(**key, task=task)
                for metric, column, factor, digits in shown:
                    row[column] = spread([run["test"][metric] for run in runs], factor, digits)
                rates.append(f"{runs[0]['lr']:g}" if runs else "–")
                seeds = {run["seed"] for run in runs}
                theirs = [run for run in full[base["rank"]] if run["seed"] in seeds]
                if task == "austen" and runs and len(theirs) == len(runs):
                    ours, bar = (mean_of(run["test"]["perplexity"] for run in of) for of in (runs, theirs))
                    row["× 16-bit"] = f"{ours / bar:.3f}" if ours and bar else None
            row["learning rates"] = ", ".join(rates)
            before = base["before"]
            if (value := before.get("headlines", {}).get("accuracy")) is not None:
                row["untrained: accuracy, %"] = f"{100 * value:.1f}"
            if (value := before.get("austen", {}).get("perplexity")) is not None:
                row["Austen perplexity, untrained"] = f"{value:.4g}"
            rows.append(row)
        return rows


def mean_of(values: Iterable[float | None]) -> float | None:
    """None where one of them is missing, which a run that went astray has."""
    known = list(values)
    return None if not known or None in known else statistics.fmean(known)


def spread(values: list[float | None], factor: float, digits: str) -> str | None:
    """`mean ± standard deviation`, the latter of two values or more; how many runs where they are not three."""
    if not values:
        return None
    finite = [factor * value for value in values if value is not None]
    if len(finite) < len(values):
        return f"{len(values) - len(finite)} of {len(values)} runs diverged"
    text = format(statistics.fmean(finite), digits)
    text += f" ± {format(statistics.stdev(finite), digits)}" if len(finite) > 1 else ""
    return text + (f" (n = {len(finite)})" if len(finite) != 3 else "")


def merge(files: Iterable[Path], folder: Path, name: str, arms: Iterable[str]) -> None:
    """Add the rows of `files` that are new to the results in `folder`, each to those of its kind of machine."""
    for file in files:
        try:
            settings = Results.settings(file)
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise SystemExit(f"{file} is no file of these results: {type(error).__name__}: {error}") from None
        ours = Results(folder / f"{name}{'-cuda' if settings['gpu'] else ''}.json", settings, arms)
        with ours.locked():
            before = len(ours.runs), len(ours.bases)
            ours.take(file)
            runs, bases = len(ours.runs) - before[0], len(ours.bases) - before[1]
        say(f"{file}: {runs} trainings and {bases} bases that are new, now in {ours.file}")


@contextmanager
def reported(label: str, failed: list[str]) -> Iterator[None]:
    """Whatever becomes of one arm, the others are worth having."""
    try:
        yield
    except Exception as error:
        said = str(error).strip().splitlines() or [""]
        say(f"  failed: {type(error).__name__}: {' … '.join(dict.fromkeys((said[0], said[-1])))}")
        failed.append(label)
