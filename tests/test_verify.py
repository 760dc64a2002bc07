"""`verify` finds what was changed, and names it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from loftq_cli import quantize
from loftq_cli.chart import error_chart
from loftq_cli.checkpoint.files import hash_file
from loftq_cli.checkpoint.reader import read_header
from loftq_cli.cli import app
from loftq_cli.errors import LoftqError
from loftq_cli.merge import merge
from loftq_cli.push import pack
from loftq_cli.verify import verify
from tests.conftest import save_llama

OPTIONS = {"bits": 2, "rank": 4, "iters": 1}
ADAPTER, CONFIG = "loftq_init/adapter_model.safetensors", "loftq_init/adapter_config.json"


@pytest.fixture(scope="module")
def finished(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("verify") / "out"
    quantize(tiny_llama, out, **OPTIONS)
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def edit(path: Path, change: object) -> None:
    value = json.loads(path.read_text())
    change(value)  # type: ignore[operator]
    path.write_text(json.dumps(value))


def found(out: Path, *words: str, source: Path | None = None) -> None:
    violations = verify(out, str(source) if source else None).violations
    assert any(all(word in violation for word in words) for violation in violations), violations


def test_untouched_is_fine_with_and_without_source(out: Path, tiny_llama: Path) -> None:
    assert verify(out).violations == ()
    verdict = verify(out, str(tiny_llama))
    assert (verdict.violations, verdict.weights) == ((), 14)
    shutil.move(out, moved := out.parent / "moved")
    assert verify(moved, str(tiny_llama)).violations == ()


@pytest.mark.parametrize("tensor", ["model.layers.1.mlp.up_proj.qweight", "model.layers.0.self_attn.q_proj.scales"])
def test_a_flipped_bit_of_the_base_names_file_and_tensor(out: Path, tensor: str) -> None:
    info = read_header(out / "model.safetensors").tensors[tensor]
    flip(out / "model.safetensors", info.offset + info.nbytes // 2)
    found(out, "`model.safetensors`", "sha256")
    found(out, tensor, "model.safetensors")


def test_a_flipped_bit_of_the_adapter_names_file_and_tensor(out: Path) -> None:
    tensor = "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"
    flip(out / ADAPTER, read_header(out / ADAPTER).tensors[tensor].offset)
    found(out, tensor, ADAPTER)


def test_a_swapped_adapter(out: Path, tiny_llama: Path, tmp_path: Path) -> None:
    quantize(tiny_llama, tmp_path / "other", **OPTIONS, seed=1, method="qlora")
    shutil.copy(tmp_path / "other" / ADAPTER, out / ADAPTER)
    found(out, ADAPTER, "sha256")
    # even where the report was made to agree, the adapter names the base it belongs to
    quantize(tiny_llama, tmp_path / "third", **{**OPTIONS, "bits": 3})
    shutil.copy(tmp_path / "third" / ADAPTER, out / ADAPTER)
    sha256 = json.loads((tmp_path / "third/loftq_report.json").read_text())["files"][ADAPTER]
    edit(out / "loftq_report.json", lambda report: report["files"].update({ADAPTER: sha256}))
    found(out, ADAPTER, "another base")


def test_a_wrong_report(out: Path, tiny_llama: Path) -> None:
    def better(report: dict[str, list[dict[str, float]]]) -> None:
        report["weights"][3]["relative_error"] *= 0.9

    name = json.loads((out / "loftq_report.json").read_text())["weights"][3]["tensor"]
    edit(out / "loftq_report.json", better)
    found(out, "totals.relative_error")
    edit(out / "loftq_report.json", lambda report: report["totals"].update(relative_error=_pool(report)))
    found(out, "loftq_errors.svg")
    (out / "loftq_errors.svg").write_text(error_chart(json.loads((out / "loftq_report.json").read_text())))
    assert verify(out).violations == ()  # consistent with itself: only the source can tell
    found(out, name, "relative_error", source=tiny_llama)


def _pool(report: dict[str, list[dict[str, float]]]) -> float:
    rows = report["weights"]
    norms = sum(row["norm"] ** 2 for row in rows)
    return (sum((row["relative_error"] * row["norm"]) ** 2 for row in rows) / norms) ** 0.5


@pytest.mark.parametrize(
    "change",
    [{"lora_alpha": 16}, {"target_modules": ["q_proj"]}, {"alpha_pattern": {"q_proj": 1}}, {"use_dora": True}],
    ids=lambda change: next(iter(change)),
)
def test_another_adapter_config(out: Path, change: dict[str, object]) -> None:
    edit(out / "loftq_init/adapter_config.json", lambda config: config.update(change))
    found(out, "adapter_config.json", next(iter(change)))


def test_what_a_push_rewrites_is_no_violation(out: Path, tiny_llama: Path) -> None:
    edit(out / "loftq_init/adapter_config.json", lambda config: config.update(base_model_name_or_path="org/name"))
    (out / "README.md").write_text("edited on the Hub")
    assert verify(out, str(tiny_llama)).violations == ()


def test_a_changed_tokenizer_is_named(out: Path) -> None:
    (out / "tokenizer_config.json").write_text("{}")
    assert verify(out).violations == ()  # of weights
    said = CliRunner().invoke(app, ["verify", str(out)])
    assert said.exit_code == 1
    assert "`tokenizer_config.json` is no longer the source's" in said.stdout
    (out / "tokenizer_config.json").unlink()
    found(out, "`tokenizer_config.json` is missing")


def test_missing_and_extra_files(out: Path) -> None:
    (out / "config.json").unlink()
    shutil.copy(out / "model.safetensors", out / "model-00002.safetensors")
    found(out, "`config.json` is missing")
    found(out, "`model-00002.safetensors`", "not part")


def test_another_source(out: Path, tmp_path: Path) -> None:
    other = save_llama(tmp_path / "other", vocab_size=500)
    found(out, "not the checkpoint", source=other)


def test_of_another_model_little_is_shown(out: Path, tiny_llama: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_llama, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    save_file(
        {name: tensor + 0.01 * ("_proj" in name) for name, tensor in weights.items()},
        other / "model.safetensors",
        metadata={"format": "pt"},
    )
    command = ["verify", str(out), "--source", str(other)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert len(lines) == 5
    assert f"`{other}` is not the checkpoint this was made from, `{tiny_llama}`" in lines[0]
    assert "another model" in lines[0]
    told = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert told["other_source"]
    assert lines[-1] == f"✗ and {len(told['violations']) - 4} more (`--json` has them all)"
    assert {line.split("`")[1] for line in told["violations"][1:]} == {name for name in weights if "_proj" in name}

    damaged = out / "model.safetensors"  # of what is damaged all is shown, as the source is the right one
    flip(damaged, read_header(damaged).tensors["model.embed_tokens.weight"].offset)
    assert not verify(out, str(tiny_llama)).other_source


def test_a_changed_copy_with_a_report_that_agrees(out: Path, tiny_llama: Path) -> None:
    import hashlib

    path = out / "model.safetensors"
    flip(path, read_header(path).tensors["model.embed_tokens.weight"].offset)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    edit(out / "loftq_report.json", lambda report: report["files"].update({"model.safetensors": sha256}))
    found(out, "another base")
    found(out, "model.embed_tokens.weight", "model.safetensors", source=tiny_llama)


@pytest.mark.parametrize("which", ["files", "side_files"])
@pytest.mark.parametrize(
    "name", ["../victim/model.safetensors", "/victim", ".git/config", "linked/a", "a\0", "\ud800", "", "a/../../victim"]
)
def test_a_report_that_names_what_is_not_in_the_folder(out: Path, tmp_path: Path, which: str, name: str) -> None:
    (out / "linked").symlink_to(out / "loftq_init")
    victim = tmp_path / "victim" / "model.safetensors"
    victim.parent.mkdir()
    shutil.copy(out / "model.safetensors", victim)
    before = victim.read_bytes()
    edit(out / "loftq_report.json", lambda report: report[which].update({name: hash_file(victim)}))
    (tmp_path / "deep").mkdir()
    for reads in (verify, lambda out: merge(out, tmp_path / "deep" / "dest"), lambda out: pack(out, "org/name")):
        with pytest.raises(LoftqError) as refused:
            reads(out)
        assert f"names {name!r}, which is not in the folder" in refused.value.message
    assert victim.read_bytes() == before
    assert not any((tmp_path / "deep").iterdir())


@pytest.mark.parametrize("name", ["tokenizer_config.json", "README.md", "model.safetensors", ADAPTER, CONFIG])
def test_a_link_out_of_the_folder_is_not_followed(out: Path, tmp_path: Path, name: str) -> None:
    (out / name).rename(tmp_path / "private")
    (out / name).symlink_to(tmp_path / "private")
    for reads in (verify, lambda out: merge(out, tmp_path / "dest"), lambda out: pack(out, "org/name")):
        with pytest.raises(LoftqError) as refused:
            reads(out)
        assert refused.value.message == f"`{out / name}` leads out of the folder"
    (out / name).unlink()
    (tmp_path / "private").rename(out / "inside")
    (out / name).symlink_to(out / "inside")
    assert verify(out).violations == ()
    (out / name).unlink()
    (out / name).symlink_to(out / name)
    with pytest.raises(LoftqError, match=Path(name).name):
        pack(out, "org/name")


def test_links_of_the_hubs_cache_are_followed(out: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--org--name" / "snapshots" / "abc", tmp_path / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    shutil.copytree(out, snapshot)
    for number, path in enumerate([path for path in snapshot.rglob("*") if path.is_file()]):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))
    assert verify(snapshot).violations == ()
    merge(snapshot, tmp_path / "dest")
    assert pack(snapshot, "org/name").files == pack(out, "org/name").files


def test_not_an_output_of_loftq(tmp_path: Path) -> None:
    with pytest.raises(LoftqError, match=r"no `loftq_report.json`"):
        verify(tmp_path)
    (tmp_path / "loftq_report.json").write_text("[")
    with pytest.raises(LoftqError, match="not valid JSON"):
        verify(tmp_path)
