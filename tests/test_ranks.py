"""Several processes make what one makes, byte for byte; one that dies stops the others, and the run is resumable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loftq_cli.checkpoint.reader import TensorInfo
from loftq_cli.jobs import WeightBatch, WeightJob
from loftq_cli.ranks import Ranks
from loftq_cli.verify import verify
from tests.test_resume import contents, without_times

OPTIONS = ["--bits=2", "--rank=4", "--iters=2", "--group-size=32", "--device=cpu"]

# rank 1 dies by SIGKILL when it is about to compute its third batch; every batch is journaled at once
DYING = """
import os, signal, time
from loftq_cli import batches, outputs
from loftq_cli.cli import main
outputs.COMMIT_SECONDS = 0
original, calls = batches.quantize_batch, [0]
def deadly(*args):
    calls[0] += 1
    if os.environ["RANK"] == "1" and calls[0] == 3:
        time.sleep(1)  # the first two are written meanwhile
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args)
batches.quantize_batch = deadly
main()
"""


# rank 1 comes late to read what is missing, and rank 0 journals every tensor at once
LATE = """
import os, time
from loftq_cli import outputs, pipeline
from loftq_cli.cli import main
outputs.COMMIT_SECONDS = 0
if os.environ["RANK"] == "1":
    original = pipeline.Journal
    pipeline.Journal = lambda *args: time.sleep(1) or original(*args)
main()
"""


def run(command: list[str], ranks: int) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    # sums depend on the number of threads; a rank that crashes says where
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    return subprocess.run([sys.executable, *launcher, *command], capture_output=True, text=True, env=environment)


def test_two_ranks_give_the_bytes_of_one(sharded_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    reports, made = [], []
    for ranks in (0, 2):
        ran = run(["-m", "loftq_cli", "quantize", "--json", *OPTIONS, str(sharded_llama), str(out)], ranks)
        assert ran.returncode == 0, ran.stderr
        reports.append(json.loads(ran.stdout))  # rank 0 alone speaks
        made.append((contents(out), without_times(out)))
        assert verify(out, str(sharded_llama)).violations == ()
        out.rename(tmp_path / f"out-{ranks}")
    assert reports[0]["files"] == reports[1]["files"]
    assert made[0] == made[1]


def test_a_rank_that_is_late_shares_the_same_work(sharded_llama: Path, tmp_path: Path) -> None:
    out, driver = tmp_path / "out", tmp_path / "driver.py"
    driver.write_text(LATE)
    ran = run([str(driver), "quantize", *OPTIONS, str(sharded_llama), str(out)], 2)
    assert ran.returncode == 0, ran.stderr
    assert verify(out, str(sharded_llama)).violations == ()


def test_ranks_must_have_the_same_settings(sharded_llama: Path, tmp_path: Path) -> None:
    driver = tmp_path / "driver.py"
    driver.write_text("import os, sys\nsys.argv[2:2] = ['--seed', os.environ['RANK']]\n" + LATE)
    ran = run([str(driver), "quantize", *OPTIONS, str(sharded_llama), str(tmp_path / "out")], 2)
    assert ran.returncode != 0
    assert "rank 1 differs from rank 0: --seed was 0, now 1" in ran.stderr


def test_a_scheduler_that_counts_processes_is_not_torchrun(tiny_llama: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loftq_cli", "quantize", "--json", *OPTIONS, str(tiny_llama), str(tmp_path)]
    environment = {**os.environ, "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["totals"]["weights"] == 14


def test_a_rank_that_dies_stops_the_run_and_any_number_of_ranks_resumes_it(sharded_llama: Path, tmp_path: Path) -> None:
    straight, out, driver = tmp_path / "straight", tmp_path / "out", tmp_path / "driver.py"
    driver.write_text(DYING)
    arguments = ["quantize", *OPTIONS, str(sharded_llama)]
    assert run(["-m", "loftq_cli", *arguments, str(straight)], 0).returncode == 0
    for ranks in (0, 2):
        died = run([str(driver), *arguments, str(out)], 2)
        assert died.returncode != 0
        journals = sorted(path.name for path in (out / ".loftq").glob("journal*"))
        assert journals == ["journal.1.jsonl", "journal.jsonl"]
        lines = (out / ".loftq" / "journal.1.jsonl").read_text().splitlines()
        assert sum(len(json.loads(line).get("rows", [])) for line in lines) == 3  # in two batches
        resumed = run(["-m", "loftq_cli", *arguments, str(out), "--resume"], ranks)
        assert resumed.returncode == 0, resumed.stderr
        assert without_times(out) == without_times(straight)
        assert verify(out, str(sharded_llama)).violations == ()
        out.rename(tmp_path / f"out-{ranks}")


def test_a_finished_out_and_a_refusal_with_ranks(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["-m", "loftq_cli", "quantize", *OPTIONS, str(tiny_llama), str(out)]
    for expected in ("", "nothing to do"):
        ran = run(command, 2)
        assert ran.returncode == 0, ran.stderr
        assert ran.stderr.count("nothing to do") == (1 if expected else 0)
    ran = run([*command, "--rank=8"], 2)
    assert ran.returncode != 0
    assert "--rank was 4, now 8" in ran.stderr


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@given(sizes=st.lists(st.integers(1, 50), max_size=40))
def test_steps_are_shared_whole_and_evenly(size: int, sizes: list[int]) -> None:
    steps = [
        TensorInfo(str(i), torch.float32, (8 * n,), "f", 0, 4)
        if i % 5 == 0
        else WeightBatch(
            (WeightJob(str(i), "m", "f", (n, 1), torch.float32, torch.float32, 2, 64, "uniform", None, 1),)
        )
        for i, n in enumerate(sizes)
    ]
    shares = [Ranks(rank, size).share(steps) for rank in range(size)]
    assert sorted(map(id, (step for share in shares for step in share))) == sorted(map(id, steps))
    for share in shares:
        assert [steps.index(step) for step in share] == sorted(steps.index(step) for step in share)
    loads = [sum(sizes[steps.index(step)] for step in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes, default=0)
