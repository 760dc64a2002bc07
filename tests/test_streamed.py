"""Shards of a Hub id: fetched ahead of their use and, with `--evict`, deleted after it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from loftq_cli import quantize
from loftq_cli.checkpoint.hub import HubCommit
from loftq_cli.checkpoint.loader import Loader
from loftq_cli.checkpoint.reader import read_header
from loftq_cli.checkpoint.streamed import AHEAD, KEPT, Streamed
from loftq_cli.cli import app
from loftq_cli.config import QuantizeConfig
from loftq_cli.errors import ConfigError, LoftqError
from loftq_cli.pipeline import plan_quantize
from loftq_cli.resume import check_disk
from loftq_cli.streaming import refuse_sharing
from tests.conftest import save_llama
from tests.hub_server import HubServer

OPTIONS = {"bits": 2, "rank": 4, "iters": 1, "device": "cpu", "format": "dense"}
FILES = [f"{number}.safetensors" for number in range(9)]


class Commit(HubCommit):
    """A commit whose files come when the test says so."""

    def __init__(self) -> None:
        super().__init__("org/name", "0" * 40, {})
        object.__setattr__(self, "asked", [])
        object.__setattr__(self, "come", threading.Semaphore(0))

    def download(self, file: str, folder: Path | None = None) -> Path:
        self.asked.append(file)  # type: ignore[attr-defined]
        assert self.come.acquire(timeout=10)  # type: ignore[attr-defined]
        if file == "lost.safetensors":
            raise LoftqError("lost")
        path = (folder or Path("cache")) / file
        if folder:
            path.write_bytes(b"x")
        return path


def wait_for(condition: object) -> None:
    for _ in range(1000):
        if condition():  # type: ignore[operator]
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not happen")


def test_the_next_shards_are_fetched_while_one_is_used(tmp_path: Path) -> None:
    commit = Commit()
    place = Streamed(commit, FILES, None)
    assert commit.asked == []  # nothing before it is needed
    for _ in FILES:
        commit.come.release()
    assert place.path(FILES[0]) == Path("cache") / FILES[0]
    wait_for(lambda: sorted(commit.asked) == FILES[: 1 + AHEAD])
    place.path(FILES[1])
    wait_for(lambda: sorted(commit.asked) == FILES[: 2 + AHEAD])
    assert place.path("tokenizer.json") == Path("cache") / "tokenizer.json"
    place.release(FILES[0])  # the cache is not ours to clear
    place.path(FILES[0])
    assert commit.asked.count(FILES[0]) == 1


def test_evicted_shards_make_room_for_the_next(tmp_path: Path) -> None:
    commit = Commit()
    (tmp_path / "old.safetensors").write_bytes(b"of an earlier session")
    place = Streamed(commit, FILES, tmp_path)
    assert list(tmp_path.iterdir()) == []
    for _ in range(100):
        commit.come.release()
    for number, file in enumerate(FILES):
        assert place.path(file).read_bytes() == b"x"
        wait_for(lambda: not any(not fetched.done() for fetched in place._fetched.values()))
        held = sorted(path.name for path in tmp_path.iterdir())
        assert file in held
        assert len(held) <= KEPT
        if number > 1:  # as if results were written late
            place.release(FILES[number - 2])
            assert FILES[number - 2] not in {path.name for path in tmp_path.iterdir()}
    assert sorted(commit.asked) == FILES


def test_what_went_wrong_ahead_is_said_when_the_shard_is_needed() -> None:
    commit = Commit()
    place = Streamed(commit, ["a.safetensors", "lost.safetensors"], None)
    commit.come.release(2)
    place.path("a.safetensors")
    with pytest.raises(LoftqError, match="lost"):
        place.path("lost.safetensors")


def test_a_file_that_was_deleted_is_not_held_open(tmp_path: Path) -> None:
    for name in "ab":
        save_file({name: torch.arange(1000.0)}, tmp_path / f"{name}.safetensors")
    infos = {name: read_header(tmp_path / f"{name}.safetensors").tensors[name] for name in "ab"}
    loader = Loader(torch.device("cpu"))
    loader.load([(tmp_path / "a.safetensors", infos["a"])]).wait()
    loader.load([(tmp_path / "b.safetensors", infos["b"])]).wait()
    held = {str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()}
    loader.close()
    assert str(tmp_path / "b.safetensors") in held
    assert str(tmp_path / "a.safetensors") not in held


def test_where_nothing_may_be_deleted(tiny_llama: Path, tmp_path: Path) -> None:
    command = ["quantize", "--evict", "--device", "cpu"]
    refused = CliRunner().invoke(app, [*command, "--dry-run", str(tiny_llama), str(tmp_path / "out")])
    assert refused.exit_code == 2
    assert "`--evict` is for Hub ids" in refused.stderr.replace("\n", " ")
    assert sorted(tiny_llama.glob("*.safetensors"))
    refused = CliRunner().invoke(app, [*command, "--method", "cloq", "org/name", str(tmp_path / "out")])
    assert refused.exit_code == 2
    assert "`--evict` is for `--method` loftq, qlora" in refused.stderr.replace("\n", " ")
    with pytest.raises(ConfigError, match="one process"):
        refuse_sharing(QuantizeConfig(evict=True), 2)


# against the loopback Hub, in processes of their own


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_llama(tmp_path_factory.mktemp("many"), torch.bfloat16, "60KB", num_hidden_layers=3, vocab_size=128)
    assert len(list(folder.glob("*.safetensors"))) > 3 * KEPT
    return folder


@pytest.fixture(scope="module")
def hub(model: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        server.add("org/many", model)
        yield server


RUN = """
import json, os, sys
from pathlib import Path
from loftq_cli import quantize
out, stop, resume, options = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "resume", json.loads(sys.argv[4])
done = []
def progress(name, size):
    done.append(name)
    if len(done) == stop:
        os._exit(9)  # as if killed
quantize("org/many", out, resume=resume, progress=progress, **options)
"""


def run(hub: HubServer, home: Path, out: Path, stop: int = -1, resume: str = "", **options: object) -> int:
    command = [sys.executable, "-c", RUN, str(out), str(stop), resume, json.dumps({**OPTIONS, **options})]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **hub.environment(home)})
    assert done.returncode in (0, 9), done.stderr
    return done.returncode


def contents(out: Path) -> dict[str, bytes]:
    named = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    return {name: data for name, data in named.items() if name not in ("loftq_report.json", "README.md")}


def test_the_disk_stays_bounded_and_bytes_are_the_same_killed_or_not(
    hub: HubServer, model: Path, tmp_path: Path
) -> None:
    out, home = tmp_path / "run" / "out", tmp_path / "home"
    shards = sorted(path.name for path in model.glob("*.safetensors"))
    largest = max((model / name).stat().st_size for name in shards)
    held: list[int] = []

    def look(name: str) -> None:
        """Bytes of source shards on the disk whenever another one is asked for."""
        places = [*(out / ".loftq" / "source").rglob("*"), *home.rglob("*")]
        held.append(sum(path.stat().st_size for path in places if path.is_file() and path.stat().st_size > 20_000))

    hub.reset()
    hub.on_download = look
    assert run(hub, home, out, stop=6, evict=True) == 9
    assert (out / ".loftq" / "journal.jsonl").exists()
    assert run(hub, home, out, resume="resume", evict=True) == 0
    hub.on_download = None
    assert len(held) >= len(shards)
    assert max(held) <= KEPT * largest < sum((model / name).stat().st_size for name in shards) / 3
    assert max(held) > largest  # it saw some at all, and more than one: they come ahead
    assert not list(home.rglob("*.safetensors"))
    assert not (out / ".loftq").exists()

    plain = tmp_path / "plain" / "out"
    assert run(hub, tmp_path / "other-home", plain) == 0
    kept = {path.name for path in (tmp_path / "other-home").rglob("*.safetensors")}
    assert kept == set(shards)  # without --evict they stay in the cache
    expected, actual = contents(plain), contents(out)
    named = "loftq_init/adapter_config.json"
    actual[named] = actual[named].replace(str(out).encode(), str(plain).encode())
    assert actual == expected
    local = tmp_path / "local" / "out"
    quantize(model, local, **OPTIONS)
    assert all(contents(local)[name] == expected[name] for name in shards)

    # what lies in the cache is used from there, and stays
    hub.reset()
    again = tmp_path / "again" / "out"
    assert run(hub, tmp_path / "other-home", again, evict=True) == 0
    assert {path.name for path in (tmp_path / "other-home").rglob("*.safetensors")} == kept
    assert all(hub.bytes_served[name] <= 100_000 for name in shards)
    assert {name: contents(again)[name] for name in shards} == {name: expected[name] for name in shards}


def test_a_head_that_goes_to_the_adapter_is_fetched_once(tmp_path: Path) -> None:
    """It is written with its shard, which is deleted then."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, vocab_size=64,
        num_labels=50, pad_token_id=0,
    )  # fmt: skip
    model, out, home = tmp_path / "model", tmp_path / "out", tmp_path / "home"
    tf.LlamaForSequenceClassification(config).save_pretrained(model, max_shard_size="150KB")
    shards = {path.name: path.stat().st_size for path in model.glob("*.safetensors")}
    assert len(shards) > 3 * KEPT
    (weight_map,) = (json.loads(path.read_text())["weight_map"] for path in model.glob("*.index.json"))
    held: list[int] = []

    def look(name: str) -> None:
        places = [*(out / ".loftq" / "source").rglob("*"), *home.rglob("*")]
        held.append(sum(path.stat().st_size for path in places if path.is_file() and path.suffix != ".json"))

    with HubServer() as server:
        server.add("org/many", model)
        server.on_download = look
        assert run(server, home, out, evict=True) == 0
        # and before that its header was looked for in the first 100 KB
        assert all(server.bytes_served[name] == size + min(size, 100_000) for name, size in shards.items())
    assert max(held) <= KEPT * max(shards.values())
    adapter = load_file(out / "loftq_init" / "adapter_model.safetensors")
    source = load_file(model / weight_map["score.weight"])
    assert torch.equal(adapter["base_model.model.score.weight"], source["score.weight"])


def test_overwrite_clears_what_was_fetched(hub: HubServer, tmp_path: Path) -> None:
    out, home = tmp_path / "out", tmp_path / "home"
    assert run(hub, home, out, stop=3, evict=True) == 9
    assert list((out / ".loftq" / "source").glob("*.safetensors"))
    command = [sys.executable, "-m", "loftq_cli", "quantize", "--evict", "--overwrite"]
    flags = [f"--{name}={value}" for name, value in OPTIONS.items()]
    environment = {**os.environ, **hub.environment(home)}
    done = subprocess.run([*command, *flags, "org/many", str(out)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert not (out / ".loftq").exists()


def test_the_shards_that_pass_through_need_room_too(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a plan that fits just so, the one with `--evict` does not."""
    plan = plan_quantize(str(tiny_llama), QuantizeConfig(bits=2, rank=4, device="cpu"))
    enough = plan.base_bytes + plan.adapter_bytes + (17 << 20)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=enough))
    check_disk(plan, Path("/nowhere"))
    largest = max(path.stat().st_size for path in tiny_llama.glob("*.safetensors"))
    assert largest * KEPT > 1 << 20
    with pytest.raises(LoftqError, match="are free on its disk"):
        check_disk(replace(plan, config=plan.config.model_copy(update={"evict": True})), Path("/nowhere"))


def test_a_relative_folder_is_emptied_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("out") / "source"

    class Commit:
        revision, sizes = "main", {"a.safetensors": 1, "b.safetensors": 1}

        def download(self, file: str, folder: Path) -> Path:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(b"x")
            return (folder / file).resolve()  # as hf_hub_download does

    place = Streamed(Commit(), ["a.safetensors", "b.safetensors"], folder)  # type: ignore[arg-type]
    assert place.path("a.safetensors").exists()
    place.release("a.safetensors")
    assert not (folder / "a.safetensors").exists()
