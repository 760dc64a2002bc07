"""Every figure in the README.

    python scripts/bench.py table MODEL     bits × method: bits per weight, errors, seconds, peak memory
    python scripts/bench.py svd MODEL       the same loop with full SVDs: time ratio and error ratio, in one run
    python scripts/bench.py agree MODEL     CUDA against CPU on every weight: codes and errors

Prints a Markdown table and writes scripts/results/NAME.json, with the machine named in it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
GROUP_SIZE, RANK, ITERS = 64, 16, 5

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
    "agree": {
        "bits": "", "quantizer": "", "method": "", "format": "", "weights": "", "bytes of codes that differ": ".1e",
        "largest difference of errors": ".1e", "CPU, s": ".1f", "CUDA, s": ".1f",
    },
}  # fmt: skip


def machine() -> dict[str, Any]:
    import torch

    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        processor = lines[0].partition(":")[2].strip() if lines else processor
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": processor, "cores": os.cpu_count(), "gpu": gpu, "torch": torch.__version__,
        "python": platform.python_version(),
    }  # fmt: skip


def save(name: str, rows: list[dict[str, Any]], **extra: Any) -> None:
    RESULTS.mkdir(exist_ok=True)
    content = {"command": f"python scripts/bench.py {name}", "machine": machine(), **extra, "rows": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def table_row(row: dict[str, Any], columns: dict[str, str]) -> str:
    return "| " + " | ".join(format(row[key], spec) for key, spec in columns.items()) + " |"


def print_table(rows: list[dict[str, Any]], columns: dict[str, str]) -> None:
    """Markdown; `columns` maps keys to format specifications."""
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print(table_row(row, columns))


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
    """LoftQ's alternation as published (a full SVD every round, the last iterate) beside ours, weight by weight."""
    import torch

    from loftq_cli.checkpoint.reader import read_tensor
    from loftq_cli.config import QuantizeConfig
    from loftq_cli.methods import loftq, seed_for, squared_norm
    from loftq_cli.pipeline import plan_quantize, resolve_device
    from loftq_cli.quantizers.base import dequantize

    device = resolve_device("auto")

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    rows = []
    for bits in (2, 3, 4):
        plan = plan_quantize(model, QuantizeConfig(bits=bits, rank=RANK))
        seconds = dict.fromkeys(("ours", "ours, quantize", "full SVD", "full SVD, quantize"), 0.0)
        squares = dict.fromkeys(("ours", "full SVD", "norm"), 0.0)
        for number, job in enumerate(plan.jobs):
            info = plan.checkpoint.tensors[job.tensor]
            W = read_tensor(plan.checkpoint.path(info.file), info).to(device).float()
            quantizer = plan.make_quantizer(job)
            if number == 0:  # warm up: threads, allocator, kernels
                loftq(W, quantizer, RANK, iters=2, seed=0)

            start = now()
            ours = loftq(W, quantizer, RANK, iters=ITERS, seed=seed_for(0, job.tensor))
            seconds["ours"] += now() - start
            squares["ours"] += squared_norm(W - dequantize(ours.quantized) - ours.factors.product()).item()
            start = now()
            for _ in range(ITERS):
                quantizer.quantize(W)
            seconds["ours, quantize"] += now() - start

            product = torch.zeros_like(W)
            start = now()
            for _ in range(ITERS):
                quantize_start = now()
                base = dequantize(quantizer.quantize(W - product))
                seconds["full SVD, quantize"] += now() - quantize_start
                U, S, Vh = torch.linalg.svd(W - base, full_matrices=False)
                product = (U[:, :RANK] * S[:RANK]) @ Vh[:RANK]
            seconds["full SVD"] += now() - start
            squares["full SVD"] += squared_norm(W - base - product).item()
            squares["norm"] += squared_norm(W).item()
        error = {key: (squares[key] / squares["norm"]) ** 0.5 for key in ("ours", "full SVD")}
        low_rank = {key: seconds[key] - seconds[f"{key}, quantize"] for key in ("ours", "full SVD")}
        rows.append({
            "bits": bits, "quantizer": plan.config.quantizer,
            "ours, s": seconds["ours"], "full SVD, s": seconds["full SVD"],
            "ratio": seconds["full SVD"] / seconds["ours"],
            "low rank alone: ours, s": low_rank["ours"], "full SVD alone, s": low_rank["full SVD"],
            "ratio alone": low_rank["full SVD"] / low_rank["ours"],
            "error, ours": error["ours"], "error, full SVD": error["full SVD"],
            "error ratio": error["ours"] / error["full SVD"],
        })  # fmt: skip
        print(rows[-1], file=sys.stderr)
    print_table(rows, COLUMNS["svd"])
    name = "svd" if device.type == "cpu" else "svd-cuda"
    save(name, rows, model=Path(model).name, group_size=GROUP_SIZE, rank=RANK, iters=ITERS)


def agree(model: str) -> None:
    """The same weights on the CPU and on the GPU: how many codes differ, and by how much the errors."""
    import torch

    from loftq_cli.checkpoint.reader import read_tensor
    from loftq_cli.config import QuantizeConfig
    from loftq_cli.pipeline import plan_quantize
    from loftq_cli.worker import quantize_weight

    rows = []
    for bits, quantizer in ((2, "uniform"), (3, "uniform"), (4, "nf"), (8, "uniform"), (4, "uniform-symmetric")):
        for method in ("qlora", "loftq"):
            config = QuantizeConfig(bits=bits, quantizer=quantizer, method=method, rank=RANK, device="cpu")
            plan = plan_quantize(model, config)
            largest, bytes_equal, total, seconds = 0.0, 0, 0, {"cpu": 0.0, "cuda": 0.0}
            for number, job in enumerate(plan.jobs):
                info = plan.checkpoint.tensors[job.tensor]
                weight = read_tensor(plan.checkpoint.path(info.file), info)
                results = {}
                for device in ("cuda", "cpu"):
                    if number == 0:
                        quantize_weight(plan, job, weight, torch.device(device))
                    start = time.perf_counter()
                    results[device] = quantize_weight(plan, job, weight, torch.device(device))
                    seconds[device] += time.perf_counter() - start
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
                "largest difference of errors": largest, "CPU, s": seconds["cpu"], "CUDA, s": seconds["cuda"],
            })  # fmt: skip
            print(rows[-1], file=sys.stderr)
    print_table(rows, COLUMNS["agree"])
    save("agree", rows, model=Path(model).name, group_size=GROUP_SIZE, rank=RANK, iters=ITERS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("table", "svd", "agree"))
    parser.add_argument("model")
    arguments = parser.parse_args()
    {"table": table, "svd": svd, "agree": agree}[arguments.what](arguments.model)
