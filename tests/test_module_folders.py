"""Checkpoints of Sentence Transformers, whose modules.json names folders: what lies in them goes wherever OUT goes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loftq_cli import pipeline, quantize
from loftq_cli.checkpoint.files import is_ours
from loftq_cli.checkpoint.source import open_checkpoint
from loftq_cli.config import build_config
from loftq_cli.errors import LoftqError
from loftq_cli.merge import merge
from loftq_cli.pipeline import plan_quantize
from loftq_cli.push import pack
from loftq_cli.resume import check_disk
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
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{str(path).split(chr(95))[-1]}"}
        for i, path in enumerate(paths)
    ]
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
    assert "library_name: sentence-transformers\n" in (out / "README.md").read_text()
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
    changed = verify(out)
    assert ["2_Dense/model.safetensors" in line and "sha256" in line for line in changed.violations] == [True]
    assert changed.edited == ()
    with pytest.raises(LoftqError, match=r"2_Dense/model.safetensors.*sha256"):
        merge(out, tmp_path / "changed")
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


@pytest.fixture
def own(model: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(model, tmp_path / "own"))


def plan_of(folder: Path) -> Any:
    return plan_quantize(str(folder), build_config(OPTIONS))


def test_they_need_room(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(free: int) -> bool:
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
            try:
                check_disk(plan, Path("/nowhere"))
            except LoftqError:
                return True
        return False

    usage = shutil.disk_usage(own)
    free = 64 << 20
    plan = plan_of(own)
    assert not refused(free)
    with (own / "2_Dense/model.safetensors").open("r+b") as stream:
        stream.truncate(300 << 20)
    plan = plan_of(own)
    assert refused(free)
    assert not refused(free + (300 << 20))
    assert [note for note in plan.notes if "full precision, 300.0 MiB: `2_Dense/model.safetensors` and 2 more" in note]


def test_a_folder_that_is_not_there_is_refused(own: Path) -> None:
    shutil.rmtree(own / "1_Pooling")
    open_checkpoint(str(own))  # for `eval`, which needs none
    with pytest.raises(LoftqError, match="names the folder `1_Pooling`, and nothing of it is in") as refused:
        plan_of(own)
    assert "or remove modules.json" in refused.value.hint
    own_type = {"path": "1_Mine", "type": "mine.Bare"}  # may well need none
    (own / "modules.json").write_text(json.dumps([own_type]))
    assert [note for note in plan_of(own).notes if "names the folder `1_Mine`, of a `mine.Bare`" in note]


def test_an_offline_cache_that_lacks_one_is_refused(own: Path, tmp_path: Path) -> None:
    with WritableHub(tmp_path / "store") as hub:
        hub.add("org/sentences", own)
        environment = {**os.environ, **hub.environment(tmp_path / "home", HF_TOKEN=TOKEN)}
        code = "from huggingface_hub import hf_hub_download as get\n"
        code += "for file in ('config.json', 'model.safetensors', 'modules.json'): get('org/sentences', file)"
        subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=tmp_path)
        command = [sys.executable, "-m", "loftq_cli", "quantize", "--format=dense", "--dry-run", "org/sentences", "out"]
        environment["HF_HUB_OFFLINE"] = "1"
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode != 0
    said = " ".join(done.stderr.split())
    assert "names the folder `1_Pooling`" in said
    assert "hf download org/sentences" in said


@pytest.mark.parametrize("name", ["1_Pooling/config.json", "2_Dense/model.safetensors", "modules.json"])
def test_another_module_makes_another_model(name: str, own: Path, tmp_path: Path) -> None:
    quantize(own, tmp_path / "out", **OPTIONS)
    quantize(own, tmp_path / "out", **OPTIONS)  # finished, nothing to do
    before = (own / name).read_bytes()
    (own / name).write_bytes(before[:-1] + b"x" if name != "modules.json" else before + b"\n")
    with pytest.raises(LoftqError, match="source"):
        quantize(own, tmp_path / "out", **OPTIONS)
    verdict = verify(tmp_path / "out", str(own))
    assert "fingerprint differs" in verdict.violations[0]
    assert verdict.violations[1:] == (f"`{name}` is not the source's",)


def test_without_modules_a_fingerprint_is_as_ever(own: Path) -> None:
    (own / "modules.json").unlink()
    before = open_checkpoint(str(own)).fingerprint
    (own / "1_Pooling/config.json").write_text("{}")
    assert open_checkpoint(str(own)).fingerprint == before


@pytest.mark.parametrize("folder", ["README.md", "loftq_report.json", "loftq_errors.svg", "readme.MD/deeper"])
def test_a_folder_called_like_a_file_of_out_is_refused(folder: str, own: Path) -> None:
    (own / folder).mkdir(parents=True)
    (own / folder / "config.json").write_text("{}")
    name_folders(own, "", folder)
    with pytest.raises(LoftqError, match="where OUT has a file of that name"):
        plan_of(own)


def test_pickles_travel_for_want_of_others(own: Path) -> None:
    for name in ("2_Dense/pytorch_model.bin", "2_Dense/pytorch_model.bin.index.json"):
        (own / name).write_bytes(b"unread")
    plan = plan_of(own)
    assert {name for name in plan.checkpoint.side_files if "/" in name} == set(COPIED)
    assert "a pickle travels along, unread: `3_Dense/pytorch_model.bin`" in plan.notes
    (own / "3_Dense/pytorch_model.bin").unlink()
    assert not [note for note in plan_of(own).notes if "pickle" in note]


def test_code_of_types_of_its_own_travels(own: Path) -> None:
    for name in ("custom_st.py", "1_Pooling/custom_pooling.py"):
        (own / name).write_text("")
    assert not [name for name in open_checkpoint(str(own)).side_files if name.endswith(".py")]
    modules = json.loads((own / "modules.json").read_text())
    (own / "modules.json").write_text(json.dumps([modules[0] | {"type": "custom_st.Transformer"}, *modules[1:]]))
    code = {name for name in plan_of(own).checkpoint.side_files if name.endswith(".py")}
    assert code == {"custom_st.py", "1_Pooling/custom_pooling.py"}


@pytest.mark.parametrize(
    "path",
    ["n" * 300, "nul\0", "../beside", "1_Pooling/../../beside", "/tmp", "..\\beside", ".git", "loftq_init", None, 3],
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
