"""The CI job that the README documents, its steps run as GitHub runs them: in bash, one after the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from loftq_cli.config import QuantizeConfig
from loftq_cli.pipeline import identity, plan_quantize
from loftq_cli.verify import verify
from tests.conftest import save_llama
from tests.hub_server import TOKEN
from tests.hub_writes import WritableHub

ROOT = Path(__file__).parents[1]
FILE = ROOT / "configs" / "github-actions.yml"


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text())


def run_job(job: dict[str, Any], folder: Path, hub: WritableHub, **changed: str) -> dict[str, str]:
    """Run all `run:` steps, as `bash -e` does on a runner; what steps put out is returned."""
    programs = folder / "programs"
    programs.mkdir(exist_ok=True)
    for name, line in (("loftq", f'exec "{sys.executable}" -m loftq_cli "$@"'), ("pip", 'echo "$@" >> pip.log')):
        (programs / name).write_text(f"#!/bin/bash\n{line}\n")
        (programs / name).chmod(0o755)
    output = folder / "output"
    output.write_text("")
    environment = {
        **os.environ, **hub.environment(folder / "home"), **job["env"], **changed, "GITHUB_OUTPUT": str(output),
        "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    for step in job["jobs"]["prepare"]["steps"]:
        if "run" in step:
            secret = {name: TOKEN for name in step.get("env", {})}
            subprocess.run(["bash", "-e", "-c", step["run"]], cwd=folder, env={**environment, **secret}, check=True)
    return dict(line.split("=", 1) for line in output.read_text().splitlines())


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in (folder / "out").rglob("*") if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_the_job_prepares_and_the_second_time_it_does_nothing(job: dict[str, Any], tmp_path: Path) -> None:
    model = save_llama(tmp_path / "model")
    small = {"MODEL": str(model), "OPTIONS": "--bits 2 --rank 4 --iters 1 --device cpu", "REPO_ID": "org/prepared"}
    with WritableHub(tmp_path / "store") as hub:
        first = run_job(job, tmp_path, hub, **small)
        made = state(tmp_path)
        verdict, pushed = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("verdict", "pushed"))
        assert verdict["ok"]
        assert verdict["weights"] == 14
        assert pushed["commit"] == hub.repos["org/prepared"].refs["main"]
        assert verify(hub.folder("org/prepared"), str(model)).violations == ()
        report = json.loads((tmp_path / "report.json").read_text())

        hub.reset()
        assert run_job(job, tmp_path, hub, **small) == first
        assert state(tmp_path) == made
        assert json.loads((tmp_path / "report.json").read_text()) == report
        assert not hub.uploads
        assert json.loads((tmp_path / "pushed.json").read_text())["commit"] == pushed["commit"]
    assert len(first["key"]) == 64
    assert "[bnb,gptq]" in (tmp_path / "pip.log").read_text()


def test_a_step_that_fails_fails_the_job(job: dict[str, Any], tmp_path: Path) -> None:
    with WritableHub(tmp_path / "store") as hub, pytest.raises(subprocess.CalledProcessError) as failed:
        run_job(job, tmp_path, hub, MODEL=str(tmp_path), OPTIONS="--bits 5")
    assert failed.value.returncode == 2


def test_the_cache_knows_the_key_and_the_folder(job: dict[str, Any]) -> None:
    steps = job["jobs"]["prepare"]["steps"]
    assert [step["id"] for step in steps if "GITHUB_OUTPUT" in step.get("run", "")] == ["plan"]
    caches = [step["with"] for step in steps if "actions/cache" in step.get("uses", "")]
    assert len(caches) == 2
    for cache in caches:
        assert cache["path"] == job["env"]["OUT"]
        assert cache["key"].startswith("loftq-${{ steps.plan.outputs.key }}")
    QuantizeConfig(bits=2, rank=16, method="cloq")  # what its OPTIONS ask for
    assert job["env"]["OPTIONS"] == "--bits 2 --rank 16 --method cloq"


def test_the_key_is_that_of_the_result(tiny_llama: Path, tmp_path: Path) -> None:
    def key(model: Path = tiny_llama, **options: Any) -> str:
        return identity(plan_quantize(str(model), QuantizeConfig(device="cpu", **options)), None).key

    other = save_llama(tmp_path / "other", vocab_size=500)
    keys = [key(), key(bits=2), key(rank=8), key(seed=1), key(other)]
    assert len(set(keys)) == len(keys)
    assert key(activation_budget=3.0) == key(quantizer="nf") == key()  # decides no byte; the default, said aloud
