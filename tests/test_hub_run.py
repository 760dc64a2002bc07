"""The main job with a Hub id, against a loopback server that speaks the Hub's routes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub_server import HubServer

OPTIONS = ["--bits=2", "--rank=4", "--iters=1", "--device=cpu", "--format=dense"]


@pytest.fixture(scope="module")
def hub(sharded_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    with HubServer() as server:
        model = Path(shutil.copytree(sharded_llama, tmp_path_factory.mktemp("served") / "llama"))
        (model / "README.md").write_text("---\nlicense: mit\n---\n")
        server.add("org/llama", model)
        yield server


def loftq(hub: HubServer, home: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loftq_cli", *(str(argument) for argument in arguments)]
    environment = {**os.environ, **hub.environment(home)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_dry_run_reads_headers_only_and_a_run_verifies(hub: HubServer, sharded_llama: Path, tmp_path: Path) -> None:
    home, out = tmp_path / "home", tmp_path / "out"
    planned = loftq(hub, home, "quantize", *OPTIONS, "--dry-run", "--json", "org/llama", out)
    assert planned.returncode == 0, planned.stderr
    shards = {path.name: path.stat().st_size for path in sharded_llama.glob("*.safetensors")}
    served = {name: sum(count for key, count in hub.bytes_served.items() if name in str(key)) for name in shards}
    assert all(0 < served[name] <= 100_000 < size for name, size in shards.items()), (served, shards)
    assert not out.exists()

    done = loftq(hub, home, "quantize", *OPTIONS, "--json", "--revision=main", "org/llama", out)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["source"]["model"] == "org/llama"
    assert len(report["source"]["revision"]) == 40
    for key in ("weights", "parameters", "bits_per_weight", "base_bytes", "adapter_bytes"):
        assert report["totals"][key] == json.loads(planned.stdout)["totals"][key]
    card = (out / "README.md").read_text()
    assert "\nbase_model: org/llama\nbase_model_relation: quantized\n" in card
    assert "\nlicense: mit\n" in card
    checked = loftq(hub, home, "verify", out, "--source", "org/llama")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "14 weights recomputed" in checked.stdout


def test_what_is_not_there(hub: HubServer, tmp_path: Path) -> None:
    for arguments, said in (
        (["org/absent"], "org/absent"),
        (["--revision=nowhere", "org/llama"], "nowhere"),
    ):
        refused = loftq(hub, tmp_path / "home", "quantize", *OPTIONS, *arguments, tmp_path / "out")
        assert refused.returncode == 1
        assert said in refused.stderr
        assert "Traceback" not in refused.stderr
        assert not (tmp_path / "out").exists()
