"""Every figure in the README.

    python scripts/bench.py table MODEL     bits × method: bits per weight, errors, seconds, peak memory
    python scripts/bench.py svd MODEL       the same loop with full SVDs: time ratio and error ratio, in one run
    python scripts/bench.py loop            the same comparison on random heavy-tailed matrices of growing size
    python scripts/bench.py agree MODEL     CUDA against CPU on every weight: codes and errors
    python scripts/bench.py readme          put the tables of scripts/results/ into README.md

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
    "loop": {
        "size": "", "bits": "", "ours, ms": ".1f", "full SVD, ms": ".0f", "ratio": ".0f", "error, ours": ".5f",
        "error, full SVD": ".5f", "error ratio": ".5f",
    },
    "agree": {
        "bits": "", "quantizer": "", "method": "", "format": "", "bytes of codes that differ": ".1e",
        "error on CPU": ".6f", "error on CUDA": ".6f", "largest difference of one weight": ".1e",
        "CPU, s": ".1f", "CUDA, s": ".1f",
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
    here = machine()
    content = {
        "command": f"python scripts/bench.py {name}" + ("" if name == "loop" else " MODEL"),
        "machine": here,
        **extra,
        "rows": rows,
    }
    file = f"{name}-cuda" if here["gpu"] else name
    (RESULTS / f"{file}.json").write_text(json.dumps(content, indent=1) + "\n")


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


def full_svd_loop(W: Any, quantizer: Any, rank: int, iters: int) -> tuple[Any, float]:
    """LoftQ as published: a full SVD every round, the last round kept. Returns the result and seconds quantizing."""
    import torch

    from loftq_cli.quantizers.base import dequantize

    product, seconds = torch.zeros_like(W), 0.0
    for _ in range(iters):
        start = now()
        base = dequantize(quantizer.quantize(W - product))
        seconds += now() - start
        U, S, Vh = torch.linalg.svd(W - base, full_matrices=False)
        product = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    return base + product, seconds


def now() -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def svd(model: str) -> None:
    """LoftQ's alternation as published beside ours, weight by weight, on every weight of a model."""
    import torch

    from loftq_cli.checkpoint.reader import read_tensor
    from loftq_cli.config import QuantizeConfig
    from loftq_cli.methods import loftq, seed_for, squared_norm
    from loftq_cli.pipeline import plan_quantize, resolve_device
    from loftq_cli.quantizers.base import dequantize

    device = resolve_device("auto")
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
                torch.linalg.svd(W)
            start = now()
            ours = loftq(W, quantizer, RANK, iters=ITERS, seed=seed_for(0, job.tensor))
            seconds["ours"] += now() - start
            start = now()
            for _ in range(ITERS):
                dequantize(quantizer.quantize(W))
            seconds["ours, quantize"] += now() - start
            start = now()
            published, quantize_seconds = full_svd_loop(W, quantizer, RANK, ITERS)
            seconds["full SVD"] += now() - start
            seconds["full SVD, quantize"] += quantize_seconds
            squares["ours"] += squared_norm(W - dequantize(ours.quantized) - ours.factors.product()).item()
            squares["full SVD"] += squared_norm(W - published).item()
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
    save("svd", rows, model=Path(model).name, group_size=GROUP_SIZE, rank=RANK, iters=ITERS)


def loop() -> None:
    """The comparison of `svd` on random heavy-tailed matrices, Student-t with three degrees of freedom."""
    import torch

    from loftq_cli.methods import loftq
    from loftq_cli.pipeline import resolve_device
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
                ours = loftq(W, quantizer, RANK, iters=ITERS, seed=0)
                times.append(now() - start)
            start = now()
            published, _ = full_svd_loop(W, quantizer, RANK, ITERS)
            full_seconds = now() - start
            error = (W - dequantize(ours.quantized) - ours.factors.product()).norm() / W.norm()
            full_error = (W - published).norm() / W.norm()
            best = sorted(times[1:])[1]  # the first warms up
            rows.append({
                "size": size, "bits": bits, "ours, ms": best * 1e3, "full SVD, ms": full_seconds * 1e3,
                "ratio": full_seconds / best, "error, ours": error.item(), "error, full SVD": full_error.item(),
                "error ratio": (error / full_error).item(),
            })  # fmt: skip
            print(rows[-1], file=sys.stderr)
    print_table(rows, COLUMNS["loop"])
    save("loop", rows, group_size=GROUP_SIZE, rank=RANK, iters=ITERS)


def agree(model: str) -> None:
    """The same weights on the CPU and on the GPU: how many codes differ, and by how much the errors."""
    import torch

    from loftq_cli.checkpoint.reader import read_tensor
    from loftq_cli.config import QuantizeConfig
    from loftq_cli.pipeline import plan_quantize
    from loftq_cli.report import pooled
    from loftq_cli.worker import quantize_weight

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
                        quantize_weight(plan, job, weight, torch.device(device))
                    start = time.perf_counter()
                    results[device] = quantize_weight(plan, job, weight, torch.device(device))
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


def readme() -> None:
    """Replace each `<!-- NAME -->` … `<!-- end -->` of README.md by the table of scripts/results/NAME.json."""
    path = RESULTS.parent.parent / "README.md"
    text = path.read_text(encoding="utf-8")
    for file in sorted(RESULTS.glob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        columns = COLUMNS[file.stem.removesuffix("-cuda")]
        lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += [table_row(row, columns) for row in content["rows"]]
        here = content["machine"]
        place = here["gpu"] or f"{here['cores']} cores of {here['cpu']}"
        lines += ["", f"`{content['command']}` on {place}, torch {here['torch']}."]
        start, end = f"<!-- {file.stem} -->", "<!-- end -->"
        before, _, rest = text.partition(start)
        text = before + start + "\n" + "\n".join(lines) + "\n" + end + rest.partition(end)[2]
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("table", "svd", "loop", "agree", "readme"))
    parser.add_argument("model", nargs="?")
    arguments = parser.parse_args()
    if arguments.what in ("loop", "readme"):
        {"loop": loop, "readme": readme}[arguments.what]()
    elif arguments.model is None:
        parser.error(f"{arguments.what} needs a MODEL")
    else:
        {"table": table, "svd": svd, "agree": agree}[arguments.what](arguments.model)
