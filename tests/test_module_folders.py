"""Checkpoints of Sentence Transformers, whose modules.json names folders: what lies in them goes wherever OUT goes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loftq_cli import pipeline, quantize
from loftq_cli.checkpoint.files import is_ours
from loftq_cli.checkpoint.source import open_checkpoint
from loftq_cli.errors import LoftqError
from loftq_cli.merge import merge
from loftq_cli.push import pack
from loftq_cli.verify import verify
from tests.hub_writes import TOKEN, WritableHub

NAMED = ("", "1_Pooling", "2_Dense", "3_Dense/", "4_Normalize", "./5_Router/query_0_Static")  # the fourth has no files
COPIED = (
    "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "3_Dense/config.json",
    "3_Dense/pytorch_model.bin", "5_Router/query_0_Static/model.safetensors",
    "5_Router/query_0_Static/deeper/tokenizer.json",
)  # fmt: skip
LEFT = ("2_Dense/.hidden.json", "2_Dense/optimizer.pt", "1_Pooling/.git/config.json", "onnx/model.safetensors")
OPTIONS = {"bits": 4, "rank": 4, "iters": 1, "device": "cpu", "format": "dense"}


def name_folders(model: Path, *paths: object) -> None:
    modules = [{"idx": i, "name": str(i), "path": path, "type": "a.Module"} for i, path in enumerate(paths)]
    (model / "modules.json").write_text(json.dumps(modules))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("models") / "sentences"
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(**sizes, vocab_size=50, max_position_embeddings=32)).save_pretrained(folder)
    name_folders(folder, *NAMED)
    for name in (*COPIED, *LEFT):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            save_file({"linear.weight": torch.randn(8, 64)}, path)
        else:
            path.write_bytes(name.encode())  # that of the pickle, too: nobody reads it
    return folder


def test_they_follow_the_model(model: Path, tmp_path: Path) -> None:
    out, dest = tmp_path / "out", tmp_path / "dest"
    report = quantize(model, out, **OPTIONS)
    assert {name for name in report["side_files"] if "/" in name} == set(COPIED)
    for folder in (out, dest):
        if folder == dest:
            merge(out, dest)
        for name in (*COPIED, "modules.json"):
            assert (folder / name).read_bytes() == (model / name).read_bytes(), name
        assert not [name for name in LEFT if (folder / name).exists()]
    assert set(COPIED) < pack(out, "org/sentences").files.keys()
    assert verify(out, str(model)).violations == ()

    dense = out / "2_Dense/model.safetensors"
    dense.write_bytes(dense.read_bytes()[:-1] + b"x")
    assert verify(out).edited == ("2_Dense/model.safetensors",)
    dense.unlink()
    assert verify(out).violations == ("`2_Dense/model.safetensors` is missing",)

    (out / "5_Router" / "mine").touch()
    (out / "5_Router" / "mine, too").touch()
    named = json.loads((out / "loftq_report.json").read_text())
    named["files"]["5_Router/mine, too"] = "0" * 64
    (out / "loftq_report.json").write_text(json.dumps(named))
    quantize(model, out, overwrite=True, **{**OPTIONS, "rank": 2})
    assert verify(out).violations == ()
    (model / "modules.json").rename(tmp_path / "modules.json")  # a model without any takes them away again
    try:
        quantize(model, out, overwrite=True, **OPTIONS)
    finally:
        (tmp_path / "modules.json").rename(model / "modules.json")
    assert {path.name for path in out.iterdir() if path.is_dir()} == {"loftq_init", "5_Router"}
    assert {path.name for path in (out / "5_Router").rglob("*")} == {"mine", "mine, too"}


def test_what_a_stopped_run_has_copied_is_removed(
    model: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise LoftqError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "error_chart", broken)
        with pytest.raises(LoftqError, match="broken"):
            quantize(model, tmp_path, **OPTIONS)
    (tmp_path / "2_Dense" / "config.json").write_text("mine")
    quantize(tiny_llama, tmp_path, overwrite=True, **OPTIONS)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"loftq_init", "2_Dense"}
    assert [path.name for path in (tmp_path / "2_Dense").iterdir()] == ["config.json"]


def test_from_the_hub_and_back(model: Path, tmp_path: Path) -> None:
    """Streamed shard by shard, too."""
    flags = ["--bits=4", "--rank=4", "--iters=1", "--device=cpu", "--format=dense", "--evict"]
    with WritableHub(tmp_path / "store") as hub:
        hub.add("org/sentences", model)
        environment = {**os.environ, **hub.environment(tmp_path / "home", HF_TOKEN=TOKEN)}
        for arguments in (["quantize", *flags, "org/sentences", "out"], ["push", "out", "org/sentences-4bit"]):
            command = [sys.executable, "-m", "loftq_cli", *arguments]
            done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
        pushed = hub.folder("org/sentences-4bit")
        for name in COPIED:
            assert (pushed / name).read_bytes() == (model / name).read_bytes(), name
        assert verify(pushed, str(model)).violations == ()
        assert not [name for name in LEFT if (pushed / name).exists()]
        assert not [name for name in hub.bytes_served if name.endswith(tuple(LEFT))]


@pytest.mark.parametrize(
    "path", ["../beside", "1_Pooling/../../beside", "/tmp", "..\\beside", ".git", "loftq_init", None, 3]
)
def test_folders_elsewhere_are_refused(path: object, model: Path) -> None:
    before = (model / "modules.json").read_bytes()
    try:
        name_folders(model, "", path)
        with pytest.raises(LoftqError, match=r"modules\.json names .*, which is no plain folder inside"):
            open_checkpoint(str(model))
    finally:
        (model / "modules.json").write_bytes(before)


def test_a_link_out_of_the_checkpoint_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "config.json").write_text("{}")
    before = (model / "modules.json").read_bytes()
    try:
        name_folders(model, "", "6_Linked")
        (model / "6_Linked").symlink_to(tmp_path / "secret")
        with pytest.raises(LoftqError, match="leads out of the folder"):
            open_checkpoint(str(model))
    finally:
        (model / "6_Linked").unlink()
        (model / "modules.json").write_bytes(before)


def test_other_files_of_that_name_say_nothing(model: Path) -> None:
    before = (model / "modules.json").read_bytes()
    try:
        (model / "modules.json").write_text('{"path": "2_Dense"}')
        assert not [name for name in open_checkpoint(str(model)).side_files if "/" in name]
    finally:
        (model / "modules.json").write_bytes(before)


def test_what_a_report_may_name(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "linked").symlink_to(tmp_path)
    for name in ("a.json", "loftq_init/a.json", "2_Dense/deeper/a.json"):
        assert is_ours(tmp_path / "out", name), name
    for name in ("../a.json", "/a.json", "2_Dense/../../a.json", ".git/config", "2_Dense/.git/config", "linked/a.json"):
        assert not is_ours(tmp_path / "out", name), name
