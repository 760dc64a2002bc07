"""What the benchmarks share: the machine, the clock, files of results, tables, LoftQ as published."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent / "results"
RESULTS = Path(os.environ.get("BENCH_RESULTS", HERE))
GROUP_SIZE, RANK, ITERS = 64, 16, 5


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


def file_name(name: str) -> str:
    import torch

    return f"{name}-cuda.json" if torch.cuda.is_available() else f"{name}.json"


def save(name: str, rows: list[dict[str, Any]], **extra: Any) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    content = {
        "command": f"python scripts/bench.py {name}" + ("" if name == "loop" else " MODEL"),
        "machine": machine(),
        **extra,
        "rows": rows,
    }
    (RESULTS / file_name(name)).write_text(json.dumps(content, indent=1) + "\n")


def saved_rows(name: str) -> list[dict[str, Any]]:
    """Rows that earlier calls saved, of the same kind of machine."""
    for folder in (RESULTS, HERE):
        if (file := folder / file_name(name)).exists():
            content = json.loads(file.read_text())
            return content["rows"] if content["machine"]["gpu"] == machine()["gpu"] else []
    return []


def table_row(row: dict[str, Any], columns: dict[str, str]) -> str:
    """Markdown; what was not measured is a dash."""
    cells = ["–" if row[key] is None else format(row[key], spec) for key, spec in columns.items()]
    return "| " + " | ".join(cells) + " |"


def print_table(rows: list[dict[str, Any]], columns: dict[str, str]) -> None:
    """Markdown; `columns` maps keys to format specifications."""
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print(table_row(row, columns), flush=True)


def fill_readme(tables: dict[str, dict[str, str]], files: str = "*.json") -> None:
    """Replace each `<!-- NAME -->` … `<!-- end -->` of README.md by the table of scripts/results/NAME.json."""
    path = HERE.parent.parent / "README.md"
    text = path.read_text(encoding="utf-8")
    for file in sorted(HERE.glob(files)):
        start, end = f"<!-- {file.stem} -->", "<!-- end -->"
        if start not in text:
            print(f"README.md has no {start}", file=sys.stderr)
            continue
        content = json.loads(file.read_text(encoding="utf-8"))
        columns = tables[file.stem.partition("-cuda")[0]]
        lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += [table_row(row, columns) for row in content["rows"]]
        here = content["machine"]
        place = here["gpu"] or f"{here['cores']} cores of {here['cpu']}"
        lines += ["", f"`{content['command']}` on {place}, torch {here['torch']}."]
        before, _, rest = text.partition(start)
        text = before + start + "\n" + "\n".join(lines) + "\n" + end + rest.partition(end)[2]
    path.write_text(text, encoding="utf-8")


def say(*words: object) -> None:
    """Progress, at once: a command that is cut off shows how far it came."""
    print(*words, file=sys.stderr, flush=True)


def now() -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def relative(residual: Any, W: Any) -> float:
    """‖residual‖ / ‖W‖, summed in float64: over millions of weights float32 would be short on a CPU."""
    import torch

    norm, reference = (torch.linalg.vector_norm(x, dtype=torch.float64) for x in (residual, W))
    return float(norm / reference)


@dataclass(frozen=True)
class Published:
    """What LoftQ as published gave; `approximation` is None where not all rounds were run: then times are for all."""

    approximation: Any
    seconds: float
    svd_seconds: float
    rounds: int


def full_svd_loop(
    W: Any, quantizer: Any, rank: int, iters: int, rounds: int | None = None, limit: float = float("inf")
) -> Published:
    """LoftQ as published: a full SVD every round, the last round kept.

    Stops after `rounds`, or after the first one where all would take more than `limit` seconds, and multiplies.
    """
    import torch

    from loftq_cli.quantizers.base import dequantize

    product, seconds, svd_seconds = torch.zeros_like(W), 0.0, 0.0
    for done in range(1, iters + 1):
        start = now()
        base = dequantize(quantizer.quantize(W - product))
        residual = W - base
        before = now()
        U, S, Vh = torch.linalg.svd(residual, full_matrices=False)
        svd_seconds += now() - before
        product = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        seconds += now() - start
        if done < iters and (done == rounds or (done == 1 and seconds * iters > limit)):
            return Published(None, seconds * iters / done, svd_seconds * iters / done, done)
    return Published(base + product, seconds, svd_seconds, iters)
