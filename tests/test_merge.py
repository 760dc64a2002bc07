"""`loftq merge`: a plain checkpoint whose weights are those of base + adapter, in every format."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from loftq_cli import merge as merging
from loftq_cli import quantize
from loftq_cli import verify as verifying
from loftq_cli.checkpoint.reader import read_header
from loftq_cli.cli import app
from loftq_cli.errors import LoftqError
from loftq_cli.merge import merge
from tests.conftest import save_llama

FORMATS = [("bnb", "nf", 4), ("gptq", "uniform", 2), ("compressed-tensors", "uniform-symmetric", 3)]
FORMATS += [("packed", "lloyd-fit", 2), ("dense", "uniform", 3)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize(("format", "quantizer", "bits"), FORMATS)
def test_the_error_of_the_merged_weights_is_the_reports(
    format: str, quantizer: str, bits: int, sharded_llama: Path, tmp_path: Path
) -> None:
    out, dest = tmp_path / "out", tmp_path / "dest"
    options = {"format": format, "quantizer": quantizer, "bits": bits, "rank": 8, "alpha": 3.0, "rslora": True}
    report = quantize(sharded_llama, out, device="cpu", iters=1, skip=("*.0.mlp.up_proj",), **options)
    told: list[str] = []
    merged = merge(out, dest, lambda name, _: told.append(name))
    assert merged.weights == len(report["weights"]) == len(told) == 13

    before, after = weights(sharded_llama), weights(dest)
    assert before.keys() == after.keys()
    rows = {row["tensor"]: row for row in report["weights"]}
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        if name not in rows:
            assert torch.equal(tensor, before[name])
            continue
        difference = tensor.double() - before[name].double()
        error = float(difference.norm() / before[name].double().norm())
        assert error == pytest.approx(rows[name]["relative_error"], rel=1e-3)  # but for the rounding to bfloat16
    assert {path.name for path in dest.iterdir()} == {path.name for path in sharded_llama.iterdir()}
    assert json.loads((dest / "config.json").read_text()) == json.loads((sharded_llama / "config.json").read_text())
    index = json.loads((dest / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == before.keys()

    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(dest, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(
        model.state_dict()["model.layers.1.mlp.up_proj.weight"], after["model.layers.1.mlp.up_proj.weight"]
    )
    again = quantize(dest, tmp_path / "again", device="cpu", bits=8, rank=4, iters=1, format="dense")
    assert again["totals"]["relative_error"] < 0.02


def test_the_merged_model_computes_what_base_and_adapter_do(tmp_path: Path) -> None:
    import loftq_cli.runtime  # noqa: F401

    source = save_llama(tmp_path / "source", torch.float32)
    quantize(source, tmp_path / "out", device="cpu", bits=2, rank=8, alpha=5.0, format="packed")
    result = CliRunner().invoke(app, ["merge", str(tmp_path / "out"), str(tmp_path / "dest"), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["weights"] == 14
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(16)[None] * 7
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model = PeftModel.from_pretrained(base, tmp_path / "out", subfolder="loftq_init").eval()
    with torch.no_grad():
        wanted = model(tokens).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "dest")(tokens).logits
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


def test_what_cannot_be_merged_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(tiny_llama, out, device="cpu", bits=2, rank=4, iters=1, format="dense")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a file").touch()
    with pytest.raises(LoftqError, match="is not empty"):
        merge(out, tmp_path / "full")
    with pytest.raises(LoftqError, match=r"has no `loftq_report\.json`"):
        merge(tiny_llama, tmp_path / "dest")
    up_proj = "model.layers.0.mlp.up_proj"
    for file, changed in (
        ("model.safetensors", f"{up_proj}.weight"),
        ("loftq_init/adapter_model.safetensors", f"base_model.model.{up_proj}.lora_B.weight"),
    ):
        whole = (out / file).read_bytes()
        tensors = load_file(out / file)
        tensors[changed][0, 0] += 1
        with safe_open(out / file, "pt") as opened:
            metadata = opened.metadata()
        save_file(tensors, out / file, metadata=metadata)
        with pytest.raises(LoftqError, match=rf"`{changed}` in `{file}` is not what was written"):
            merge(out, tmp_path / f"dest-{Path(file).stem}")
        assert not (tmp_path / f"dest-{Path(file).stem}" / "config.json").exists()
        (out / file).write_bytes(whole)
    config = out / "loftq_init" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 4', '"lora_alpha": 8'))
    with pytest.raises(LoftqError, match="`lora_alpha` is 8, written was 4"):
        merge(out, tmp_path / "dest")
    assert not (tmp_path / "dest").exists()


@pytest.fixture(scope="module")
def finished(sharded_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merge") / "out"
    quantize(sharded_llama, out, device="cpu", bits=2, rank=4, iters=1, format="packed")
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("tensor", ["model.norm.weight", "model.layers.0.mlp.up_proj.codes", None])
def test_a_base_that_was_changed_since_is_not_merged(finished: Path, tmp_path: Path, tensor: str | None) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    name, position = "config.json", 5
    if tensor is not None:
        headers = {path.name: read_header(path).tensors for path in out.glob("*.safetensors")}
        name = next(file for file, infos in headers.items() if tensor in infos)
        position = headers[name][tensor].offset
    damaged = bytearray((out / name).read_bytes())
    damaged[position] ^= 1
    (out / name).write_bytes(damaged)
    with pytest.raises(LoftqError) as refused:
        merge(out, tmp_path / "dest")
    assert f"`{name}`" in refused.value.message
    assert tensor is None or "codes" not in tensor or f"`{tensor}`" in refused.value.message
    assert "loftq verify" in refused.value.hint
    assert "--overwrite" in refused.value.hint
    assert not (tmp_path / "dest").exists()


@pytest.mark.parametrize(
    "which", ["a shard", "loftq_init/adapter_model.safetensors", "config.json", "generation_config.json"]
)
def test_a_missing_file_is_named(finished: Path, tmp_path: Path, which: str) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    name = max(path.name for path in out.glob("*.safetensors")) if which == "a shard" else which
    (out / name).unlink()
    with pytest.raises(LoftqError) as refused:
        merge(out, tmp_path / "dest")
    assert refused.value.message == f"`{name}` is missing"


def test_nothing_is_hashed_twice(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(verifying, "hash_tensor", refuse)  # the files have been hashed
    merge(finished, tmp_path / "dest")


@pytest.mark.parametrize("given", [True, False])
def test_interrupted_it_leaves_nothing(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: bool
) -> None:
    dest = tmp_path / "dest"
    if given:
        dest.mkdir()
    told: list[str] = []

    def interrupt(*arguments: object) -> torch.Tensor:
        told.append("one")
        if len(told) == 9:  # in the second shard
            signal.raise_signal(signal.SIGINT)
        return plain(*arguments)

    plain = merging._merged
    with monkeypatch.context() as patch:
        patch.setattr(merging, "_merged", interrupt)
        result = CliRunner().invoke(app, ["merge", str(finished), str(dest)])
    assert result.exit_code == 130, result.output
    assert "interrupted; nothing of it is left" in result.stderr
    assert "the same command begins anew" in result.stderr
    assert dest.exists() == given
    assert not given or not any(dest.iterdir())
    assert CliRunner().invoke(app, ["merge", str(finished), str(dest)]).exit_code == 0


def killed(out: Path, dest: Path, at: str) -> None:
    """A merge that is killed where `at` says."""
    code = f"""
import os
from pathlib import Path
from loftq_cli import merge as merging
told = []
def die(*_, at):
    told.append(1)
    if len(told) == at:
        os.kill(os.getpid(), 9)
progress = None
{at}
merging.merge(Path({str(out)!r}), Path({str(dest)!r}), progress)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -9


IN_A_SHARD = "progress = lambda *_: die(at=9)"
IN_THE_MOVE = "rename = Path.rename; Path.rename = lambda *paths: (die(at=3), rename(*paths))"
AFTER_THE_MOVE = "merging.sync_folder = lambda *_: die(at=1)"


def test_what_a_killed_one_has_staged_is_replaced(finished: Path, tmp_path: Path) -> None:
    merge(finished, tmp_path / "whole")
    dest = tmp_path / "dest"
    killed(finished, dest, IN_A_SHARD)
    left = contents(dest)
    assert [name for name in left if name.endswith(".safetensors")]
    assert [name for name in left if name.endswith(".safetensors.tmp")]
    assert {Path(name).parts[0] for name in left} == {".loftq-merge"}

    (dest / "config.json").write_text("mine")  # another model's, that has come there since
    left = contents(dest)
    with pytest.raises(LoftqError, match="is not empty, and a merge that was killed left"):
        merge(finished, dest)
    assert contents(dest) == left
    (dest / "config.json").unlink()

    def meanwhile(*_: object) -> None:
        with pytest.raises(LoftqError, match="another merge is writing"):
            merge(finished, dest)
        refused.append(True)

    refused: list[bool] = []
    merge(finished, dest, meanwhile)
    assert refused
    assert contents(dest) == contents(tmp_path / "whole")


@pytest.mark.parametrize("at", [IN_THE_MOVE, AFTER_THE_MOVE], ids=["within", "after"])
def test_what_a_killed_one_has_moved_is_like_anybodys(finished: Path, tmp_path: Path, at: str) -> None:
    dest = tmp_path / "dest"
    killed(finished, dest, at)
    left = contents(dest)
    assert ("config.json" in left) == (at == AFTER_THE_MOVE)
    assert [name for name in left if "/" not in name and name.endswith(".safetensors")]
    with pytest.raises(LoftqError, match="is not empty, and a merge that was killed left"):
        merge(finished, dest)
    assert contents(dest) == left


def test_what_came_to_dest_meanwhile_is_kept(finished: Path, tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    with pytest.raises(LoftqError, match=r"there is a `config\.json` in"):
        merge(finished, dest, lambda *_: (dest / "config.json").write_text("mine"))
    assert contents(dest) == {"config.json": b"mine"}
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / ".loftq-merge").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "files").write_text("mine")
    with pytest.raises(LoftqError, match="is not empty"):
        merge(finished, tmp_path / "linked")
    assert contents(tmp_path / "elsewhere") == {"files": b"mine"}


def tuned(out: Path, folder: Path) -> Path:
    """An adapter that was trained from that of `out`, as far as files can tell."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(out / "loftq_init/adapter_model.safetensors")
    moved = {name: t + torch.randn(t.shape, generator=generator) * t.std() for name, t in tensors.items()}
    save_file(moved, folder / "adapter_model.safetensors", {"format": "pt"})
    shutil.copy(out / "loftq_init/adapter_config.json", folder)
    return folder


@pytest.mark.parametrize(("format", "quantizer", "bits"), FORMATS)
def test_what_was_trained_is_folded_in_whatever_the_format(
    format: str, quantizer: str, bits: int, tiny_llama: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = {"format": format, "quantizer": quantizer, "bits": bits, "rank": 8, "alpha": 3.0, "rslora": True}
    report = quantize(tiny_llama, out, device="cpu", iters=1, **options)
    adapter = tuned(out, tmp_path / "tuned")
    merge(out, tmp_path / "start")
    ran = CliRunner().invoke(app, ["merge", str(out), str(tmp_path / "end"), "--adapter", str(adapter)])
    assert ran.exit_code == 0, ran.output
    start, end = weights(tmp_path / "start"), weights(tmp_path / "end")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (out / "loftq_init", adapter))
    assert start.keys() == end.keys()
    for row in report["weights"]:
        names = [f"base_model.model.{row['name']}.lora_{part}.weight" for part in "BA"]
        products = [t[names[0]].double() @ t[names[1]].double() * 3 / 8**0.5 for t in (before, after)]
        wanted, found = products[1] - products[0], end[row["tensor"]].double() - start[row["tensor"]].double()
        assert (found - wanted).norm() < 0.02 * wanted.norm(), row["name"]  # but for the rounding to bfloat16


def test_what_peft_has_trained_is_what_is_folded_in(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model, out = save_llama(tmp_path / "model", torch.float32), tmp_path / "out"
    quantize(model, out, bits=2, rank=8, format="dense", device="cpu", iters=1)
    base = AutoModelForCausalLM.from_pretrained(out)
    peft = PeftModel.from_pretrained(base, out, subfolder="loftq_init", is_trainable=True)
    ids = torch.arange(3, 19)[None]
    begun = peft(ids).logits.detach()
    optimizer = torch.optim.SGD([p for p in peft.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        peft(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    peft.save_pretrained(tmp_path / "tuned")
    wanted = peft.eval()(ids).logits.detach()
    assert (wanted - begun).norm() > 0.01 * begun.norm()
    merge(out, tmp_path / "merged", adapter=tmp_path / "tuned")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


def test_what_did_not_begin_as_the_adapter_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    out, dest = tmp_path / "out", tmp_path / "dest"
    quantize(tiny_llama, out, bits=4, rank=8, device="cpu", iters=1)
    adapter = tuned(out, tmp_path / "tuned")
    file, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    tensors, written = load_file(file), json.loads(config.read_text())
    first = min(tensors)
    for changed, told in (
        ({name: t for name, t in tensors.items() if name != first}, f"did not begin as .*`{first}` is not in it"),
        ({**tensors, first: tensors[first][:4].clone()}, f"did not begin as .*`{first}` is of another shape"),
        ({**tensors, "base_model.model.lm_head.weight": torch.ones(2, 2)}, "has `base_model.model.lm_head.weight`"),
    ):
        save_file(changed, file)
        with pytest.raises(LoftqError, match=told):
            merge(out, dest, adapter=adapter)
    save_file(tensors, file)
    for key, value in (("use_dora", True), ("rank_pattern", {"q_proj": 4}), ("modules_to_save", ["lm_head"])):
        config.write_text(json.dumps({**written, key: value}))
        with pytest.raises(LoftqError, match=f"has `{key}`, which is more"):
            merge(out, dest, adapter=adapter)
    config.write_text("{")
    with pytest.raises(LoftqError, match=r"no adapter_config.json that can be read"):
        merge(out, dest, adapter=adapter)
    config.write_text(json.dumps(written))
    file.unlink()
    with pytest.raises(LoftqError, match=r"has no `adapter_model.safetensors`"):
        merge(out, dest, adapter=adapter)
    with pytest.raises(LoftqError, match="adapter_config") as refused:
        merge(out, dest, adapter=tmp_path / "nowhere")
    assert "save_pretrained" in refused.value.hint
    assert not dest.exists()
