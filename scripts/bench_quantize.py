"""`bench.py quantize`: whole processes beside the time that moving the bytes takes, and beside full SVDs; one run."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from bench_common import full_svd_loop, machine, print_table, relative, save, saved_rows, say

FLOOR_THREADS = (4, 8, 16)  # of the I/O floor: one run each, the best is taken
SAMPLE_SECONDS = 0.05
COLUMNS = {
    "model": "", "weights": "", "source, GiB": ".1f", "processes": "", "iters": "", "wall, s": ".1f",
    "I/O floor, s": ".1f", "wall / floor": ".2f", "of medians": ".2f", "GB/s": ".2f", "compute, s": ".1f",
    "full SVD loop, s": ".0f", "error ratio": ".4f", "device, GiB": ".2f", "anonymous, GiB": ".2f", "RSS, GiB": ".2f",
}  # fmt: skip
FLOOR_SCRIPT = Path(__file__).parent / "io_floor.py"
MODEL_FREE_PTQ = """
import sys
from llmcompressor import model_free_ptq
model_free_ptq(model_stub=sys.argv[1], save_directory=sys.argv[2], scheme="W4A16", max_workers=8, device=sys.argv[3],
               ignore=["re:.*gate$", "lm_head", "re:.*embed_tokens$"])
"""


class Memory(threading.Thread):
    """Watches a process and its children, from /proc: the largest of each figure of any one of them."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.stop = pid, threading.Event()
        self.peak = {"VmHWM": 0, "RssAnon": 0}

    def run(self) -> None:
        sample, family = 0, [self.pid]
        while not self.stop.is_set():
            if sample % 20 == 0:  # once a second: looking for children reads all of /proc
                family = descendants(self.pid)
            for pid in family:
                self._look(pid)
            sample += 1
            self.stop.wait(SAMPLE_SECONDS)

    def _look(self, pid: int) -> None:
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:  # it has ended
            return
        for line in lines:
            key, _, value = line.partition(":")
            if key in self.peak:
                self.peak[key] = max(self.peak[key], int(value.split()[0]) * 1024)


def descendants(pid: int) -> list[int]:
    """A process, its children, their children and so on."""
    parent: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    family = [pid]
    for member in family:  # grows while it is walked
        family += [child for child, its_parent in parent.items() if its_parent == member]
    return family


def run_process(command: list[str]) -> dict[str, Any]:
    """Run a whole process: wall time, standard output, peak memory."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    memory = Memory(process.pid)
    memory.start()
    output, _ = process.communicate()
    wall = time.perf_counter() - start
    memory.stop.set()
    memory.join()
    if process.returncode != 0:
        raise RuntimeError(f"exit code {process.returncode}: {' '.join(command)}\n{output[-2000:]}")
    return {"wall": wall, "output": output, **memory.peak}


def quantize_command(model: Path, out: Path, nproc: int, bits: int, rank: int, iters: int) -> list[str]:
    several = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc), "-m"] if nproc > 1 else []
    command = [sys.executable, "-m", *several, "loftq_cli", "quantize", "--json", "-q", "--bits", str(bits)]
    return [*command, "--rank", str(rank), "--iters", str(iters), str(model), str(out)]


def sizes_in(folder: Path) -> list[int]:
    return [file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()]


def timed_quantize(command: list[str], out: Path, warm_up: int, runs: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The best of `runs` whole processes after `warm_up`, which fills the page cache; and its report."""
    best: dict[str, Any] = {}
    walls: dict[str, list[float]] = {"warm-up": [], "timed": []}
    for number in range(warm_up + runs):
        shutil.rmtree(out, ignore_errors=True)
        result = run_process(command)
        walls["timed" if number >= warm_up else "warm-up"].append(result["wall"])
        say(f"  {'run' if number >= warm_up else 'warm-up'}: {result['wall']:.2f} s")
        if number >= warm_up and result["wall"] == min(walls["timed"]):
            best = {**result, "report": json.loads((out / "loftq_report.json").read_text())}
    report = best.pop("report")
    return {**best, "walls": walls}, report


def io_floor(model: Path, sizes: list[int], scratch: Path) -> dict[str, Any]:
    """The best whole process of `io_floor.py` over `FLOOR_THREADS`."""
    runs = []
    for threads in FLOOR_THREADS:
        command = [sys.executable, str(FLOOR_SCRIPT), str(model), str(scratch), "--threads", str(threads)]
        result = run_process([*command, "--write", *map(str, sizes)])
        shutil.rmtree(scratch)
        runs.append({"wall": result["wall"], **json.loads(result["output"])})
        say(f"  I/O floor, {threads} threads: {result['wall']:.2f} s", runs[-1])
    return {**min(runs, key=lambda run: run["wall"]), "walls": [run["wall"] for run in runs]}


def full_svd_shapes(
    model: Path, bits: int, rank: int, iters: int, per_shape: int, rounds: int | None, limit: float
) -> Iterator[dict[str, Any]]:
    """For each shape: seconds of the loop as published for all weights of that shape, from `per_shape` of them."""
    import torch
    from safetensors import safe_open

    from loftq_cli.config import QuantizeConfig
    from loftq_cli.pipeline import plan_quantize

    plan = plan_quantize(str(model), QuantizeConfig(bits=bits, rank=rank, iters=iters))
    shapes = defaultdict(list)
    for job in plan.jobs:
        shapes[tuple(job.shape), job.bits].append(job)
    device = torch.device(plan.config.device)
    by_size = sorted(shapes.items(), key=lambda item: math.prod(item[0][0]))
    for (shape, _), jobs in by_size:
        done = []
        for job in jobs[:: -(-len(jobs) // per_shape)]:
            with safe_open(plan.checkpoint.path(job.file), framework="pt") as file:
                W = file.get_tensor(job.tensor).to(device).float()
            if job is by_size[0][1][0]:  # warm up: libraries and kernels are loaded at their first call
                full_svd_loop(W, plan.make_quantizer(job), rank, 1)
            published = full_svd_loop(W, plan.make_quantizer(job), rank, iters, rounds, limit)
            error = None if published.approximation is None else relative(W - published.approximation, W)
            done.append({
                "tensor": job.tensor, "seconds": published.seconds, "rounds": published.rounds, "error": error,
            })  # fmt: skip
        each = sum(weight["seconds"] for weight in done) / len(done)
        yield {"shape": list(shape), "weights": len(jobs), "seconds": each * len(jobs), "timed": done}


def error_ratio(shapes: list[dict[str, Any]], report: dict[str, Any]) -> tuple[float | None, int]:
    """Our error over that of full SVDs, pooled over the weights on which all rounds were run; and their number."""
    rows = {row["tensor"]: row for row in report["weights"]}
    pairs = [
        (rows[weight["tensor"]]["relative_error"], weight["error"], rows[weight["tensor"]]["norm"])
        for shape in shapes
        for weight in shape["timed"]
        if weight["error"] is not None
    ]
    published = math.fsum((error * norm) ** 2 for _, error, norm in pairs)
    ours = math.fsum((error * norm) ** 2 for error, _, norm in pairs)
    return (math.sqrt(ours / published) if published else None), len(pairs)


def model_free_ptq(model: Path, work: Path) -> float | str:
    """Seconds of llm-compressor's quantization without an adapter (4 bits: it has no 2-bit scheme)."""
    if importlib.util.find_spec("llmcompressor") is None:
        return "not installed"
    device = "cuda:0" if machine()["gpu"] else "cpu"
    try:
        return run_process([sys.executable, "-c", MODEL_FREE_PTQ, str(model), str(work), device])["wall"]
    except RuntimeError as error:
        return f"failed: {error}"
    finally:
        shutil.rmtree(work, ignore_errors=True)


def make_row(model: Path, nproc: int, best: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    totals, source_bytes = report["totals"], sum(file.stat().st_size for file in model.glob("*.safetensors"))
    seconds = totals["seconds"]
    return {
        "model": model.name, "weights": totals["weights"], "source, GiB": source_bytes / 2**30, "processes": nproc,
        "wall, s": best["wall"], "I/O floor, s": None, "wall / floor": None, "of medians": None,
        "GB/s": source_bytes / best["wall"] / 1e9,
        "compute, s": seconds["quantize"] + seconds["low_rank"], "full SVD loop, s": None, "error ratio": None,
        "device, GiB": totals["peak_device_bytes"] / 2**30, "anonymous, GiB": best["RssAnon"] / 2**30,
        "RSS, GiB": best["VmHWM"] / 2**30,
        "start-up, s": best["wall"] - seconds["total"], "seconds of the report": seconds, "walls": best["walls"],
        "memory": "the largest process", "source bytes": source_bytes, "cores": os.cpu_count(),
        "bits": report["config"]["bits"], "rank": report["config"]["rank"], "iters": report["config"]["iters"],
        "format": report["config"]["format"], "bits per weight": totals["bits_per_weight"],
        "relative error": totals["relative_error"],
    }  # fmt: skip


def quantize(
    model: Path, bits: int, rank: int, iters: int, out: Path | None, runs: int, warm_up: int, nproc: list[int],
    svd: bool, svd_rounds: int | None, svd_seconds: float, per_shape: int,
) -> None:  # fmt: skip
    model = model.resolve()
    if out is not None and out.exists() and not (out / "loftq_report.json").exists():
        sys.exit(f"{out} exists, and is no output of loftq")  # it would be removed
    rows: list[dict[str, Any]] = []
    reports: list[dict[str, Any]] = []
    earlier = [row for row in saved_rows("quantize") if row["model"] != model.name]

    def keep(**values: Any) -> None:
        """Save after every step, for the machine may be taken away before the last one."""
        for row in rows:
            row.update(values)
        save("quantize", [*earlier, *rows], note="best of the timed runs after a warm-up, page cache warm")

    work = Path(tempfile.mkdtemp(dir=os.environ.get("TMPDIR")))
    target, sizes = out or work / "out", [0]
    try:
        for processes in nproc:
            say(f"{model.name}: {processes} process(es)")
            command = quantize_command(model, target, processes, bits, rank, iters)
            try:
                best, report = timed_quantize(command, target, warm_up, runs)
            except RuntimeError as error:
                say(error)
                continue
            reports.append(report)
            rows.append(make_row(model, processes, best, report))
            # with several processes, the same bytes must come out
            different = [name for name, sha in report["files"].items() if reports[0]["files"].get(name) != sha]
            rows[-1] |= {"files that differ from the first row's": different}
            say(f"  {len(different)} of {len(report['files'])} files differ from the first row's")
            sizes = sizes_in(target)
            keep()
        if not rows:
            sys.exit("no run succeeded")
        if out is None:
            shutil.rmtree(target, ignore_errors=True)
        try:
            floor = io_floor(model, sizes, work / "floor")
            for row in rows:
                row["wall / floor"] = row["wall, s"] / floor["wall"]
                row["of medians"] = median(row["walls"]["timed"]) / median(floor["walls"])
            keep(**{"I/O floor, s": floor["wall"], "I/O floor": floor, "output bytes": sum(sizes)})
        except RuntimeError as error:  # a full disk, say
            say(error)
        keep(**{"model_free_ptq, s": model_free_ptq(model, work / "ptq")})
        print_table(rows, COLUMNS)
        shapes: list[dict[str, Any]] = []
        for shape in full_svd_shapes(model, bits, rank, iters, per_shape, svd_rounds, svd_seconds) if svd else ():
            shapes.append(shape)
            say(f"  full SVD, {shape}")
            for row, report in zip(rows, reports, strict=True):
                row["error ratio"], row["weights compared"] = error_ratio(shapes, report)
            keep(**{"full SVD shapes": shapes})
        if shapes:
            keep(**{"full SVD loop, s": sum(shape["seconds"] for shape in shapes)})
            print_table(rows, COLUMNS)
    finally:
        shutil.rmtree(work, ignore_errors=True)
