"""`bench.py calibrate`: what the block loop takes on a model of which MODEL has a few layers, and on all of them.

    python scripts/make_checkpoint.py llama-2-7b FOLDER --layers 4
    python scripts/bench.py calibrate FOLDER

Whole `loftq quantize` processes with `cloq`, without and with a finish, and, for one epoch and for three, `apiq-bw`.
Start-up, and what the first use of a kernel takes, are in the time of a block.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_common import RANK, print_table, save, say
from bench_quantize import run_process

COLUMNS = {
    "model": "", "method": "", "rank": "", "samples": "", "tokens each": "", "wall, s": ".1f", "s per block": ".2f",
    "device, GiB": ".2f", "host, GiB": ".2f", "whole model, min": ".1f",
}  # fmt: skip
EPOCHS = (1, 3)  # their difference is what an epoch takes
WHOLE = {"llama": 32, "qwen3_moe": 48}  # layers, by type of model
OF_A_RUN = 20  # epochs, as published


def calibrate(model: Path, samples: int = 128, seqlen: int = 2048, rank: int = RANK) -> None:
    """Measure, print, save."""
    config = json.loads((model / "config.json").read_text())
    layers, whole = config["num_hidden_layers"], WHOLE[config["model_type"]]
    rows: list[dict[str, Any]] = []

    def run(name: str, *flags: str) -> float:
        with tempfile.TemporaryDirectory() as work:
            quantize = [
                sys.executable,
                "-m",
                "loftq_cli",
                "quantize",
                "--json",
                "-q",
                "--bits",
                "2",
                "--rank",
                str(rank),
            ]
            windows = ["--samples", str(samples), "--seqlen", str(seqlen)]
            command = [*quantize, *windows, *flags, str(model), f"{work}/out"]
            result = run_process(command)
        totals = json.loads(result["output"])["totals"]
        say(f"  {name}: {result['wall']:.1f} s, {totals['seconds']}")
        rows.append({
            "model": f"{model.name}, {layers} of {whole} layers", "method": name, "rank": rank, "samples": samples,
            "tokens each": seqlen, "wall, s": result["wall"], "s per block": totals["seconds"]["total"] / layers,
            "device, GiB": totals["peak_device_bytes"] / 2**30 or None, "host, GiB": totals["peak_host_bytes"] / 2**30,
            "whole model, min": (result["wall"] + totals["seconds"]["total"] * (whole - layers) / layers) / 60,
            "seconds of the report": totals["seconds"],
        })  # fmt: skip
        save("calibrate", rows)
        return float(rows[-1]["whole model, min"])

    run("cloq", "--method", "cloq")
    run("cloq, finish of 1 epoch", "--method", "cloq", "--finish-epochs", "1")
    few, more = (run(f"apiq-bw, {n} epochs", "--method", "apiq-bw", "--epochs", str(n)) for n in EPOCHS)
    minutes = few + (more - few) / (EPOCHS[1] - EPOCHS[0]) * (OF_A_RUN - EPOCHS[0])
    unknown = dict.fromkeys(("wall, s", "s per block", "device, GiB", "host, GiB"))
    rows.append(
        {**rows[-1], **unknown, "method": f"apiq-bw, {OF_A_RUN} epochs, extrapolated", "whole model, min": minutes}
    )
    save("calibrate", rows)
    print_table(rows, COLUMNS)
