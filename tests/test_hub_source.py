"""Hub ids, against a Hub on the loopback; the client runs in a process of its own, as its environment asks."""

from __future__ import annotations

import errno
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loftq_cli.checkpoint.reader import read_tensor
from loftq_cli.checkpoint.selection import INDEX
from loftq_cli.checkpoint.source import Checkpoint, open_checkpoint
from loftq_cli.errors import LoftqError
from tests.hub_server import TOKEN, Cut, HubServer

Client = Callable[..., Any]  # runs a function of this module, with arguments, in the client process
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SHARD_BYTES = 1 << 20


def make(folder: Path, seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    weight_map = {"a": FIRST, "b": SECOND}
    for name, file in weight_map.items():
        save_file({name: torch.randn(SHARD_BYTES // 4 + seed, generator=generator)}, folder / file, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "seed": seed}))
    for name in ("tokenizer.json", "README.md", "LICENSE", "original/model.safetensors", "onnx/tokenizer.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    return folder


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def hub(served: HubServer) -> HubServer:
    served.reset()
    return served


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hf_home")


@contextmanager
def client_process(environment: dict[str, str]) -> Iterator[Client]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            pool.submit(int).result()  # starts the process, which takes the environment over
        yield lambda work, *arguments: pool.submit(work, *arguments).result(timeout=60)


@pytest.fixture(scope="module")
def client(served: HubServer, home: Path) -> Iterator[Client]:
    with client_process(served.environment(home)) as run:
        yield run


@pytest.fixture(scope="module")
def offline_client(served: HubServer, home: Path) -> Iterator[Client]:
    with client_process(served.environment(home, HF_HUB_OFFLINE="1")) as run:
        yield run


# what runs in the client


def located(checkpoint: Checkpoint, file: str) -> Path:
    return checkpoint.path(file)


def with_token(work: Callable[..., Any], *arguments: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", TOKEN)
        return work(*arguments)


def impatiently(work: Callable[..., Any], *arguments: Any) -> Any:
    """The client waits between its attempts; here nobody needs to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", lambda seconds: None)
        return work(*arguments)


def with_failing_download(error: OSError, work: Callable[..., Any], *arguments: Any) -> Any:
    import huggingface_hub

    def fails(*args: Any, **kwargs: Any) -> str:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub, "hf_hub_download", fails)
        return work(*arguments)


def opened_in(folder: str, model: str) -> Checkpoint:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return open_checkpoint(model)


def values(model: str) -> dict[str, list[Any]]:
    """Everything that opening and reading finds, by lists: tensors would come from the client in shared memory."""
    checkpoint = open_checkpoint(model)
    return {
        name: read_tensor(checkpoint.path(info.file), info).float().flatten().tolist()
        for name, info in checkpoint.tensors.items()
    }


def refusal(client: Client, work: Callable[..., Any], *arguments: Any) -> str:
    """Message and hint of the error that `work` raises in the client."""
    with pytest.raises(LoftqError) as caught:
        client(work, *arguments)
    said = f"{caught.value.message}\n{caught.value.hint}"
    assert TOKEN not in said
    return said


# tests


def test_headers_at_first_and_each_shard_when_it_is_needed(hub: HubServer, client: Client, tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    commit = hub.add("org/plain", folder)
    checkpoint = client(open_checkpoint, "org/plain")
    local = open_checkpoint(str(folder))
    assert (checkpoint.model, checkpoint.revision) == ("org/plain", commit)
    assert checkpoint.tensors == local.tensors
    assert (checkpoint.files, checkpoint.index, checkpoint.config) == (local.files, local.index, local.config)
    assert checkpoint.metadata == local.metadata
    assert checkpoint.file_sizes == local.file_sizes
    assert checkpoint.fingerprint != local.fingerprint  # it has the commit in it
    assert checkpoint.side_files == local.side_files == ("LICENSE", "tokenizer.json")
    assert 0 < hub.bytes_served[FIRST] <= 100_000
    assert 0 < hub.bytes_served[SECOND] <= 100_000
    assert hub.bytes_served["tokenizer.json"] == 0

    before = hub.bytes_served[SECOND]
    path = client(located, checkpoint, FIRST)
    assert path.read_bytes() == (folder / FIRST).read_bytes()
    assert torch.equal(read_tensor(path, checkpoint.tensors["a"]), read_tensor(folder / FIRST, checkpoint.tensors["a"]))
    assert hub.bytes_served[SECOND] == before
    served = hub.bytes_served[FIRST]
    assert served >= SHARD_BYTES
    assert client(located, checkpoint, FIRST) == path
    assert hub.bytes_served[FIRST] == served
    assert client(located, checkpoint, "tokenizer.json").read_text() == "{}"


def test_long_headers(hub: HubServer, client: Client, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    names = [f"{'a.long.prefix.' * 8}{number}" for number in range(1500)]
    save_file({name: torch.zeros(512, dtype=torch.uint8) for name in names}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    hub.add("org/long", folder)
    assert client(open_checkpoint, "org/long").tensors == open_checkpoint(str(folder)).tensors
    assert 100_000 < hub.bytes_served["model.safetensors"] < (folder / "model.safetensors").stat().st_size
    ranges = [request.range for request in hub.requests if "/storage/" in request.path]
    assert len(ranges) == 2


def test_revisions(hub: HubServer, client: Client, tmp_path: Path) -> None:
    main = hub.add("org/two", make(tmp_path / "main"))
    other = hub.add("org/two", make(tmp_path / "other", seed=1), ref="refs/pr/1")
    first = client(open_checkpoint, "org/two")
    second = client(open_checkpoint, "org/two", "refs/pr/1")
    assert (first.revision, second.revision) == (main, other)
    assert (first.config["seed"], second.config["seed"]) == (0, 1)
    assert second.tensors == open_checkpoint(str(tmp_path / "other")).tensors != first.tensors
    assert first.fingerprint != second.fingerprint
    assert client(open_checkpoint, "org/two", other) == second
    assert client(open_checkpoint, "org/two").fingerprint == first.fingerprint
    said = refusal(client, open_checkpoint, "org/two", "v9")
    assert "`org/two` has no revision `v9`" in said


def test_the_commit_stays_when_the_branch_moves(hub: HubServer, client: Client, tmp_path: Path) -> None:
    first = hub.add("org/moves", make(tmp_path / "first"))
    checkpoint = client(open_checkpoint, "org/moves")
    second = hub.add("org/moves", make(tmp_path / "second", seed=1))
    assert client(located, checkpoint, FIRST).read_bytes() == (tmp_path / "first" / FIRST).read_bytes()
    assert checkpoint.revision == first
    assert client(open_checkpoint, "org/moves").revision == second


def test_missing_repo(hub: HubServer, client: Client, tmp_path: Path) -> None:
    said = refusal(client, open_checkpoint, "org/nothing")
    assert "`org/nothing` is neither a folder here nor a model that the Hub shows you" in said
    assert "hf auth login" in said
    (tmp_path / "models" / "llama-3").mkdir(parents=True)
    said = refusal(client, opened_in, str(tmp_path), "models/lama-3")
    assert "did you mean `models/llama-3`?" in said


@pytest.mark.parametrize(
    ("state", "words"), [("private", "neither a folder here"), ("gated", "is gated\naccept its terms on http")]
)
def test_closed_repo(hub: HubServer, client: Client, tmp_path: Path, state: str, words: str) -> None:
    folder = make(tmp_path / "m")
    model = f"org/{state}"
    hub.add(model, folder, private=state == "private", gated=state == "gated")
    said = refusal(client, open_checkpoint, model)
    assert words in said
    assert "hf auth login" in said
    checkpoint = client(with_token, open_checkpoint, model)
    path = client(with_token, located, checkpoint, FIRST)
    assert path.read_bytes() == (folder / FIRST).read_bytes()
    storage = [request.authorized for request in hub.requests if "/storage/" in request.path]
    assert storage
    assert not any(storage)
    assert any(request.authorized for request in hub.requests)


@pytest.mark.parametrize(("status", "words"), [(403, "hf auth login"), (500, "the Hub answered 500"), (429, "429")])
def test_error_answers(hub: HubServer, client: Client, status: int, words: str) -> None:
    hub.fail_with = status
    assert words in refusal(client, impatiently, open_checkpoint, "org/plain")


def test_refusals_name_the_hub_id_and_the_revision(hub: HubServer, client: Client, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_text("")
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    hub.add("org/pickle", tmp_path, ref="v1")
    said = refusal(client, open_checkpoint, "org/pickle", "v1")
    assert 'BertModel.from_pretrained("org/pickle", revision="v1"' in said


def test_pickles_and_fp8_with_scales_in_another_shard(hub: HubServer, client: Client, tmp_path: Path) -> None:
    tensors = {"a.weight": torch.randn(4, 6), "b": torch.randn(3).half()}
    pickled, scaled = tmp_path / "pickled", tmp_path / "scaled"
    for folder in (pickled, scaled):
        folder.mkdir()
    torch.save(tensors, pickled / "pytorch_model.bin")
    (pickled / "config.json").write_text("{}")
    codes, scale = tensors["a.weight"].to(torch.float8_e4m3fn), torch.rand(2, 3)
    save_file({"a.weight": codes}, scaled / FIRST)
    save_file({"a.weight_scale_inv": scale}, scaled / SECOND)
    (scaled / INDEX).write_text(json.dumps({"weight_map": {"a.weight": FIRST, "a.weight_scale_inv": SECOND}}))
    entry = {"quant_method": "fp8", "weight_block_size": [2, 2]}
    (scaled / "config.json").write_text(json.dumps({"dtype": "float32", "quantization_config": entry}))
    hub.add("org/pickled", pickled)
    hub.add("org/scaled", scaled)
    assert client(values, "org/pickled") == {name: tensor.flatten().tolist() for name, tensor in tensors.items()}
    dequantized = codes.float() * scale.repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert client(values, "org/scaled") == {"a.weight": dequantized.flatten().tolist()}


def test_broken_connections(hub: HubServer, client: Client, tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    hub.add("org/cut", folder)
    hub.cuts[FIRST] = Cut(after_bytes=10, times=1)
    checkpoint = client(impatiently, open_checkpoint, "org/cut")
    assert hub.cuts[FIRST].times == 0
    assert checkpoint.tensors == open_checkpoint(str(folder)).tensors

    hub.cuts[FIRST] = Cut(after_bytes=1000, times=2)
    path = client(impatiently, located, checkpoint, FIRST)
    assert hub.cuts[FIRST].times == 0
    assert path.read_bytes() == (folder / FIRST).read_bytes()

    hub.cuts[SECOND] = Cut(after_bytes=0, times=100)
    for work, argument in ((located, SECOND), (opened_again, "org/cut")):
        said = refusal(client, impatiently, work, checkpoint, argument)
        assert "cannot reach http://127.0.0.1" in said
        assert "`org/cut`" in said


def opened_again(checkpoint: Checkpoint, model: str) -> Checkpoint:
    return open_checkpoint(model)


def test_no_connection(tmp_path: Path) -> None:
    with HubServer() as gone:
        environment = gone.environment(tmp_path)
    with client_process(environment) as client:
        said = refusal(client, open_checkpoint, "org/plain")
    assert f"cannot reach {environment['HF_ENDPOINT']} for `org/plain` (ConnectError)" in said
    assert "HF_HUB_OFFLINE=1" in said


def test_full_disk_and_closed_cache(hub: HubServer, client: Client, home: Path, tmp_path: Path) -> None:
    hub.add("org/full", make(tmp_path / "m"))
    checkpoint = client(open_checkpoint, "org/full")
    said = refusal(client, with_failing_download, OSError(errno.ENOSPC, "No space left"), located, checkpoint, FIRST)
    assert f"the disk of `{home / 'hub'}` is full" in said
    assert f"takes {checkpoint.file_sizes[FIRST]} bytes" in said
    said = refusal(client, with_failing_download, PermissionError(errno.EACCES, "x"), located, checkpoint, FIRST)
    assert f"cannot use the cache `{home / 'hub'}`: Permission denied" in said


def test_offline(hub: HubServer, client: Client, offline_client: Client, tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    commit = hub.add("org/cached", folder)
    said = refusal(offline_client, open_checkpoint, "org/cached")
    assert "`org/cached` is not in the cache, and HF_HUB_OFFLINE keeps the Hub away" in said
    assert "hf download org/cached" in said

    online = client(open_checkpoint, "org/cached")
    said = refusal(offline_client, open_checkpoint, "org/cached")
    assert f"`{FIRST}` and 1 more, which is not there" in said

    for file in (FIRST, SECOND, "tokenizer.json"):
        client(located, online, file)
    hub.reset()
    for revision in (None, "main", commit):
        checkpoint = offline_client(open_checkpoint, "org/cached", revision)
        assert (checkpoint.model, checkpoint.revision) == ("org/cached", commit)
        assert checkpoint.fingerprint == online.fingerprint
        assert checkpoint.tensors == online.tensors
        assert checkpoint.side_files == ("tokenizer.json",)
        path = offline_client(located, checkpoint, SECOND)
        assert path.read_bytes() == (folder / SECOND).read_bytes()
    said = refusal(offline_client, open_checkpoint, "org/cached", "v9")
    assert "`org/cached` at revision `v9` is not in the cache" in said
    assert hub.requests == []


def downloaded(model: str) -> str:
    from huggingface_hub import snapshot_download

    return str(snapshot_download(model, ignore_patterns=["README.md", "on*", "or*"]))


def test_offline_with_a_snapshot_that_lacks_what_does_not_matter(
    hub: HubServer, client: Client, offline_client: Client, tmp_path: Path
) -> None:
    """`snapshot_download` keeps a list of all files, and offline it refuses a snapshot that lacks any."""
    commit = hub.add("org/partial", make(tmp_path / "m"))
    client(downloaded, "org/partial")
    assert offline_client(open_checkpoint, "org/partial").revision == commit
