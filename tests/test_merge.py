"""`loftq merge`: a plain checkpoint whose weights are those of base + adapter, in every format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from loftq_cli import quantize
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
