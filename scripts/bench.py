"""Every figure in the README.

    python scripts/bench.py table MODEL     bits × method: bits per weight, errors, seconds, peak memory
    python scripts/bench.py svd MODEL       the same loop with full SVDs: time ratio and error ratio, in one run
    python scripts/bench.py loop            the same comparison on random heavy-tailed matrices of growing size
    python scripts/bench.py agree MODEL     CUDA against CPU on every weight: codes and errors
    python scripts/bench.py quantize MODEL  a whole run beside the time that moving the bytes takes, and full SVDs
    python scripts/bench.py profile MODEL   where the time of a run goes; MODEL with a few layers
    python scripts/bench.py calibrate MODEL calibrated methods, MODEL with a few layers: time per block, memory
    python scripts/bench.py perplexity ...  perplexity before any fine-tuning; it has flags of its own, see its --help
    python scripts/bench.py runtime ...     memory, training and decode steps of a packed base beside bitsandbytes
    python scripts/bench.py families        what the suite says of each family of models
    python scripts/bench.py readme          put the tables of scripts/results/ into README.md

Prints a Markdown table and writes scripts/results/NAME.json (BENCH_RESULTS names another folder), with the machine
named in it. `scripts/make_checkpoint.py` makes a MODEL of any size.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # this loftq, not an installed one
sys.path.insert(0, str(Path(__file__).parent))
import bench_calibrate
import bench_families
import bench_perplexity
import bench_profile
import bench_quantize
import bench_runtime
import finetune_results
from bench_common import (
    GROUP_SIZE,
    ITERS,
    RANK,
    fill_readme,
    full_svd_loop,
    now,
    print_table,
    relative,
    save,
)

COLUMNS = {  # of the printed tables, with their format specifications
    "table": {
        "bits": "", "quantizer": "", "method": "", "format": "", "bits per weight": ".2f", "error, base alone": ".4f",
        "error, base + adapter": ".4f", "seconds": ".1f", "of which low rank": ".1f", "peak RSS, MiB": ".0f",
    },
    "svd": {
        "bits": "", "quantizer": "", "ours, s": ".2f", "full SVD, s": ".1f", "ratio": ".0f",
        "low rank alone: ours, s": ".2f", "full SVD alone, s": ".1f", "ratio alone": ".0f",
        "error, ours": ".5f", "error, full SVD": ".5f", "error ratio": ".5f",
    },
    "loop": {
        "size": "", "bits": "", "ours, ms": ".1f", "full SVD, ms": ".0f", "ratio": ".0f", "error, ours": ".5f",
        "error, full SVD": ".5f", "error ratio": ".5f",
    },
    "agree": {
        "bits": "", "quantizer": "", "method": "", "format": "", "bytes of codes that differ": ".1e",
        "error on CPU": ".6f", "error on CUDA": ".6f", "largest difference of one weight": ".1e",
        "CPU, s": ".1f", "CUDA, s": ".1f",
    },
    "quantize": bench_quantize.COLUMNS,
    "profile": bench_profile.COLUMNS,
    "perplexity": bench_perplexity.COLUMNS,
    "runtime": bench_runtime.COLUMNS,
    "calibrate": bench_calibrate.COLUMNS,
    "finetune": finetune_results.COLUMNS,  # made by finetune.py
    "families": bench_families.COLUMNS,
}  # fmt: skip


def table(model: str) -> None:
    """Whole `loftq quantize` processes, one after another."""
    rows = []
    settings = [(2, "uniform"), (3, "uniform"), (4, "nf"), (4, "uniform"), (2, "nf"), (3, "nf")]
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as work:
        for bits, quantizer in settings:
            for method in ("qlora", "loftq"):
                out = Path(work) / f"{bits}-{quantizer}-{method}"
                command = [sys.executable, "-m", "loftq_cli", "quantize", "--json", "-q", "--bits", str(bits)]
                command += ["--quantizer", quantizer, "--method", method, "--rank", str(RANK), "--iters", str(ITERS)]
                start = time.perf_counter()
                report = json.loads(subprocess.check_output([*command, model, str(out)], text=True))
                wall = time.perf_counter() - start
                totals = report["totals"]
                rows.append({
                    "bits": bits, "quantizer": quantizer, "method": method, "format": report["config"]["format"],
                    "bits per weight": totals["bits_per_weight"],
                    "error, base alone": totals["relative_error_without_adapter"],
                    "error, base + adapter": totals["relative_error"],
                    "seconds": wall, "of which low rank": totals["seconds"]["low_rank"],
                    "peak RSS, MiB": totals["peak_host_bytes"] / 2**20,
                })  # fmt: skip
                print(rows[-1], file=sys.stderr)
    print_table(rows, COLUMNS["table"])
    save("table", rows, model=Path(model).name, group_size=GROUP_SIZE, rank=RANK, iters=ITERS)


def svd(model: str) -> None:
    """LoftQ's alternation as published beside ours, batch by batch of a run, on every weight of a model."""
    import torch

    from loftq_cli.checkpoint.reader import read_tensor
    from loftq_cli.config import QuantizeConfig
    from loftq_cli.device import resolve_device
    from loftq_cli.jobs import WeightBatch
    from loftq_cli.methods import loftq, seed_for, squared_norm
    from loftq_cli.pipeline import plan_quantize
    from loftq_cli.quantizers.base import dequantize

    device = resolve_device("auto")
    rows = []
    for bits in (2, 3, 4):
        plan = plan_quantize(model, QuantizeConfig(bits=bits, rank=RANK))
        seconds = dict.fromkeys(("ours", "full SVD", "low_rank", "quantize", "full SVD alone"), 0.0)
        squares = dict.fromkeys(("ours", "full SVD", "norm"), 0.0)

        @contextmanager
        def timed(stage: str, seconds: dict[str, float] = seconds) -> Iterator[None]:
            start = now()
            yield
            seconds[stage] += now() - start

        batches = [step for shard in plan.shards for step in shard.steps if isinstance(step, WeightBatch)]
        for number, batch in enumerate(batches):
            infos = [plan.checkpoint.tensors[job.tensor] for job in batch.jobs]
            W = torch.stack([read_tensor(plan.checkpoint.path(info.file), info) for info in infos]).to(device).float()
            quantizer, seeds = plan.make_quantizer(batch.first), [seed_for(0, job.tensor) for job in batch.jobs]
            if number == 0:  # warm up: threads, allocator, kernels
                loftq(W, quantizer, RANK, iters=2, seeds=seeds)
                torch.linalg.svd(W[0])
            start = now()
            ours = loftq(W, quantizer, RANK, iters=ITERS, seeds=seeds)
            seconds["ours"] += now() - start
            loftq(W, quantizer, RANK, iters=ITERS, seeds=seeds, timed=timed)  # again: to time stages is to wait
            squares["ours"] += (
                squared_norm(W - dequantize(ours.quantized).view(W.shape) - ours.factors.product()).sum().item()
            )
            for weight in W:
                published = full_svd_loop(weight, quantizer, RANK, ITERS)
                seconds["full SVD"] += published.seconds
                seconds["full SVD alone"] += published.svd_seconds  # as many as our low-rank steps, and nothing else
                squares["full SVD"] += squared_norm((weight - published.approximation)[None]).item()
            squares["norm"] += squared_norm(W).sum().item()
        error = {key: (squares[key] / squares["norm"]) ** 0.5 for key in ("ours", "full SVD")}
        rows.append({
            "bits": bits, "quantizer": plan.config.quantizer,
            "ours, s": seconds["ours"], "full SVD, s": seconds["full SVD"],
            "ratio": seconds["full SVD"] / seconds["ours"],
            "low rank alone: ours, s": seconds["low_rank"], "full SVD alone, s": seconds["full SVD alone"],
            "ratio alone": seconds["full SVD alone"] / seconds["low_rank"],
            "error, ours": error["ours"], "error, full SVD": error["full SVD"],
            "error ratio": error["ours"] / error["full SVD"],
        })  # fmt: skip
        print(rows[-1], file=sys.stderr, flush=True)
        save("svd", rows, model=Path(model).name, group_size=GROUP_SIZE, rank=RANK, iters=ITERS)
    print_table(rows, COLUMNS["svd"])


def loop() -> None:
    """The comparison of `svd` on random heavy-tailed matrices, Student-t with three degrees of freedom."""
    import torch

    from loftq_cli.device import resolve_device
    from loftq_cli.methods import loftq
    from loftq_cli.quantizers import QUANTIZERS
    from loftq_cli.quantizers.base import dequantize

    device = resolve_device("auto")
    rows = []
    for size in (1024, 2048, 4096) if device.type == "cuda" else (512, 1024, 2048):
        for bits in (2, 4):
            torch.manual_seed(0)
            W = (torch.distributions.StudentT(3.0).sample((size, size)) * 0.02).to(device)
            quantizer = QUANTIZERS["uniform"](bits=bits, group_size=GROUP_SIZE)
            times = []
            for _ in range(5):
                start = now()
                ours = loftq(W[None], quantizer, RANK, iters=ITERS, seeds=[0])
                times.append(now() - start)
            published = full_svd_loop(W, quantizer, RANK, ITERS)
            error = relative(W - dequantize(ours.quantized) - ours.factors.product()[0], W)
            full_error = relative(W - published.approximation, W)
            best = sorted(times[1:])[1]  # the first warms up
            rows.append({
                "size": size, "bits": bits, "ours, ms": best * 1e3, "full SVD, ms": published.seconds * 1e3,
                "ratio": published.seconds / best, "error, ours": error, "error, full SVD": full_error,
                "error ratio": error / full_error,
            })  # fmt: skip
            print(rows[-1], file=sys.stderr, flush=True)
            save("loop", rows, group_size=GROUP_SIZE, rank=RANK, iters=ITERS)
    print_table(rows, COLUMNS["loop"])


def agree(model: str) -> None:
    """The same weights on the CPU and on the GPU: how many codes differ, and by how much the errors."""
    import torch

    from loftq_cli.checkpoint.reader import read_tensor
    from loftq_cli.config import QuantizeConfig
    from loftq_cli.jobs import WeightBatch, WeightJob
    from loftq_cli.pipeline import plan_quantize
    from loftq_cli.plan import Plan
    from loftq_cli.report import pooled
    from loftq_cli.worker import WeightResult, quantize_batch

    def compute(plan: Plan, job: WeightJob, weight: torch.Tensor, device: str) -> WeightResult:
        result = quantize_batch(plan, WeightBatch((job,)), weight[None].to(device))
        result.wait()
        return next(result.rows())

    rows = []
    for bits, quantizer in ((2, "uniform"), (3, "uniform"), (4, "nf")):
        for method in ("qlora", "loftq"):
            config = QuantizeConfig(bits=bits, quantizer=quantizer, method=method, rank=RANK, device="cpu")
            plan = plan_quantize(model, config)
            largest, bytes_equal, total, seconds = 0.0, 0, 0, {"cpu": 0.0, "cuda": 0.0}
            errors: dict[str, list[tuple[float, float]]] = {"cpu": [], "cuda": []}
            for number, job in enumerate(plan.jobs):
                info = plan.checkpoint.tensors[job.tensor]
                weight = read_tensor(plan.checkpoint.path(info.file), info)
                results = {}
                for device in ("cuda", "cpu"):
                    if number == 0:
                        compute(plan, job, weight, device)
                    start = time.perf_counter()
                    results[device] = compute(plan, job, weight, device)
                    seconds[device] += time.perf_counter() - start
                    errors[device].append((results[device].row.relative_error, results[device].row.norm))
                pair = results["cpu"].row, results["cuda"].row
                for key in ("relative_error", "relative_error_without_adapter"):
                    largest = max(largest, abs(getattr(pair[0], key) - getattr(pair[1], key)))
                name = next(iter(results["cpu"].base))  # the packed codes come first in every format
                packed = [results[device].base[name].flatten().view(torch.uint8) for device in ("cpu", "cuda")]
                bytes_equal += int((packed[0] == packed[1]).sum())
                total += packed[0].numel()
            rows.append({
                "bits": bits, "quantizer": quantizer, "method": method, "format": plan.config.format,
                "weights": len(plan.jobs), "bytes of codes that differ": 1 - bytes_equal / total,
                "error on CPU": pooled(errors["cpu"]), "error on CUDA": pooled(errors["cuda"]),
                "largest difference of one weight": largest, "CPU, s": seconds["cpu"], "CUDA, s": seconds["cuda"],
            })  # fmt: skip
            print(rows[-1], file=sys.stderr)
    print_table(rows, COLUMNS["agree"])
    save("agree", rows, model=Path(model).name, group_size=GROUP_SIZE, rank=RANK, iters=ITERS)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("table", "svd", "loop", "agree", "quantize", "profile", "calibrate", "readme"))
    parser.add_argument("model", nargs="?")
    group = parser.add_argument_group("quantize")
    group.add_argument("--bits", type=int, default=2)
    group.add_argument("--rank", type=int, default=RANK)
    group.add_argument("--iters", type=int, default=ITERS)
    group.add_argument("--out", type=Path, help="keep the last result here")
    group.add_argument("--runs", type=int, default=2, help="timed ones, after the warm-up: the best counts")
    group.add_argument("--warm-up", type=int, default=1, help="runs before, to fill the page cache")
    group.add_argument("--nproc", type=int, nargs="+", default=[1], help="processes (torchrun), e.g. `1 2`")
    group.add_argument("--no-svd", dest="svd", action="store_false", help="without the loop as published")
    group.add_argument("--svd-rounds", type=int, help="time so many of its rounds and multiply")
    group.add_argument("--svd-seconds", type=float, default=60, help="where all rounds take longer, time one")
    group.add_argument("--per-shape", type=int, default=1, help="weights of each shape to time")
    arguments = parser.parse_args()
    if arguments.model is None and arguments.what not in ("loop", "readme"):
        parser.error(f"{arguments.what} needs a MODEL")
    return arguments


if __name__ == "__main__":
    if sys.argv[1:] == [bench_families.NAME]:
        sys.exit(bench_families.families())
    if sys.argv[1:2] == [bench_perplexity.NAME]:
        sys.exit(bench_perplexity.main(sys.argv[2:]))
    if sys.argv[1:2] == [bench_runtime.NAME]:
        sys.exit(bench_runtime.main(sys.argv[2:]))
    arguments = vars(parse())
    what, model = arguments.pop("what"), arguments.pop("model")
    if what in ("loop", "readme"):
        loop() if what == "loop" else fill_readme(COLUMNS)
    elif what == "quantize":
        bench_quantize.quantize(Path(model), **arguments)
    elif what == "calibrate":
        bench_calibrate.calibrate(Path(model), rank=arguments["rank"])
    elif what == "profile":
        bench_profile.profile(Path(model))
    else:
        {"table": table, "svd": svd, "agree": agree}[what](model)
