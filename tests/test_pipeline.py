"""The main path, end to end on tiny checkpoints: every method with every quantizer and format."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loftq_cli import pipeline, quantize
from loftq_cli.errors import LoftqError
from loftq_cli.verify import verify
from tests.conftest import save_llama

COMBINATIONS = [
    ("bnb", "nf", 4),
    ("gptq", "uniform", 2),
    ("gptq", "uniform", 3),
    ("gptq", "uniform-symmetric", 4),
    ("gptq", "uniform", 8),
    ("compressed-tensors", "uniform-symmetric", 2),
    ("compressed-tensors", "uniform-symmetric", 8),
    ("packed", "lloyd", 2),
    ("packed", "lloyd-fit", 3),
    ("packed", "nf-search", 4),
    ("packed", "nf", 2),
    ("packed", "uniform", 8),
    ("dense", "uniform", 2),
    ("dense", "uniform-symmetric", 3),
    ("dense", "nf", 2),
    ("dense", "nf", 3),
    ("dense", "nf", 4),
]


ALL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Path]:
    folder = tmp_path_factory.mktemp("one-layer")
    return {dtype: save_llama(folder / str(dtype), dtype, num_hidden_layers=1) for dtype in ALL_DTYPES}


@pytest.mark.parametrize(
    ("format", "quantizer", "bits", "dtype"),
    [(*row, torch.float32) for row in COMBINATIONS]
    + [(*row, dtype) for row in COMBINATIONS[:8:3] for dtype in (torch.bfloat16, torch.float16)],
    ids=str,
)
def test_both_methods_in_every_format(
    one_layer: dict[torch.dtype, Path], tmp_path: Path, dtype: torch.dtype, format: str, quantizer: str, bits: int
) -> None:
    model = one_layer[dtype]
    options = {"format": format, "quantizer": quantizer, "bits": bits, "rank": 4, "iters": 2, "alpha": 7.0}
    totals = {}
    for method in ("qlora", "loftq"):
        out = tmp_path / method
        report = quantize(model, out, method=method, **options)
        verdict = verify(out, str(model))
        assert verdict.violations == ()
        assert verdict.weights == 7
        totals[method] = report["totals"]
        factors = load_file(out / "loftq_init" / "adapter_model.safetensors")
        zeros = [name for name, tensor in factors.items() if not tensor.any()]
        assert len(zeros) == (7 if method == "qlora" else 0)
        assert all("lora_B" in name for name in zeros)
    qlora, loftq = totals["qlora"], totals["loftq"]
    assert qlora["relative_error"] == qlora["relative_error_without_adapter"]
    assert loftq["relative_error"] < 0.97 * qlora["relative_error"]


def test_what_comes_out(sharded_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = quantize(sharded_llama, out, bits=2, rank=4, iters=2, alpha=16, rslora=True, adapter_dtype="bfloat16")
    assert sorted(path.name for path in out.glob("*.safetensors")) == sorted(
        path.name for path in sharded_llama.glob("*.safetensors")
    )
    index = json.loads((out / "model.safetensors.index.json").read_text())
    held = {name: path.name for path in out.glob("*.safetensors") for name in load_file(path)}
    assert index["weight_map"] == held
    for name in ("generation_config.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (sharded_llama / name).read_bytes()
    config = json.loads((out / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "gptq"
    assert config == json.loads((sharded_llama / "config.json").read_text())
    adapter = json.loads((out / "loftq_init/adapter_config.json").read_text())
    assert adapter["init_lora_weights"] is True
    assert (adapter["r"], adapter["lora_alpha"], adapter["use_rslora"]) == (4, 16, True)
    assert load_file(out / "loftq_init/adapter_model.safetensors").popitem()[1].dtype == torch.bfloat16
    card = (out / "README.md").read_text()
    assert f"{report['totals']['relative_error']:.4f}" in card
    assert str(tmp_path) not in card
    assert not list(out.rglob("*.tmp"))
    assert not (out / ".loftq").exists()


def test_mixed_bits(tiny_llama: Path, tmp_path: Path) -> None:
    report = quantize(tiny_llama, tmp_path / "out", bits=2, rank=4, iters=1, bits_for={"model.layers.0.*": 4})
    bits = {row["name"].split(".")[2]: row["bits"] for row in report["weights"]}
    assert bits == {"0": 4, "1": 2}
    assert verify(tmp_path / "out", str(tiny_llama)).violations == ()


def test_same_input_same_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    first = quantize(tiny_llama, tmp_path / "1", bits=2, rank=4, iters=2)
    second = quantize(tiny_llama, tmp_path / "2", bits=2, rank=4, iters=2)
    assert first["files"] == second["files"]
    other_seed = quantize(tiny_llama, tmp_path / "3", bits=2, rank=4, method="qlora", seed=1)
    other = quantize(tiny_llama, tmp_path / "4", bits=2, rank=4, method="qlora", seed=2)
    assert other_seed["files"] != other["files"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused_by_name(tiny_llama: Path, tmp_path: Path, value: float) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    tensors = load_file(tiny_llama / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoftqError, match=rf"`{name}`.*1 NaN or infinite") as refused:
        quantize(model, tmp_path / "out", bits=2, rank=4, iters=1)
    assert "--skip 'model.layers.1.mlp.up_proj'" in refused.value.hint
    report = quantize(model, tmp_path / "out2", bits=2, rank=4, iters=1, skip=("model.layers.1.mlp.up_proj",))
    assert report["totals"]["weights"] == 13


@pytest.mark.parametrize("scale", [0.0, 1e-7, 1e4])
def test_zero_tiny_and_huge_weights(tiny_llama: Path, tmp_path: Path, scale: float) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    tensors = load_file(tiny_llama / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name] * scale
    tensors["model.layers.0.self_attn.o_proj.weight"].fill_(0.25)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    report = quantize(model, tmp_path / "out", bits=2, rank=4, iters=2, format="dense")
    rows = {row["tensor"]: row for row in report["weights"]}
    assert rows[name]["relative_error"] <= rows[name]["relative_error_without_adapter"] <= 1
    assert rows["model.layers.0.self_attn.o_proj.weight"]["relative_error"] < 1e-3
    assert verify(tmp_path / "out", str(model)).violations == ()
    adapter = load_file(tmp_path / "out/loftq_init/adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in adapter.values())
    assert all(tensor.any() for key, tensor in adapter.items() if "lora_A" in key)  # both zero would never train


def test_scales_beyond_float16_are_refused_by_name(tiny_llama: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    tensors = load_file(tiny_llama / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name] * 1e8
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoftqError, match=rf"`{name}`.*beyond float16"):
        quantize(model, tmp_path / "out", bits=2, rank=4, iters=1)


def test_a_checkpoint_several_times_larger_than_the_memory_it_takes(tmp_path: Path) -> None:
    """Host memory is bounded by a few weights: 32 layers grow the peak no more than 4 do, within two weights."""
    code = (
        "import sys, torch\n"
        "from loftq_cli import pipeline\n"
        "from loftq_cli.report import peak_host_bytes\n"
        "plan = pipeline.plan_quantize(sys.argv[1], pipeline.build_config("
        "dict(bits=2, rank=4, iters=1, device='cpu', format='gptq')))\n"
        "torch.randn(512, 512) @ torch.randn(512, 512)\n"
        "before = peak_host_bytes()\n"
        "pipeline.run_plan(plan, __import__('pathlib').Path(sys.argv[2]))\n"
        "print(peak_host_bytes() - before)\n"
    )
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 8}
    growth, total = {}, {}
    for layers in (4, 32):
        model = save_llama(tmp_path / f"{layers}", num_hidden_layers=layers, **sizes)
        total[layers] = (model / "model.safetensors").stat().st_size
        arguments = [sys.executable, "-c", code, str(model), str(tmp_path / f"out{layers}")]
        growth[layers] = int(subprocess.check_output(arguments, text=True))
    largest = 512 * 2048 * 4
    assert total[32] > 500e6
    assert growth[32] < total[32] / 4, growth
    assert growth[32] < growth[4] + 6 * largest, growth


def test_base_plus_adapter_in_transformers_and_peft_is_what_the_report_says(tmp_path: Path) -> None:
    """The contract: W ≈ dequantize(Q) + scaling · B A, as the loaded model computes it, with the error reported."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = save_llama(tmp_path / "model", num_hidden_layers=1)
    source = load_file(model / "model.safetensors")
    for alpha, rslora in ((4.0, False), (32.0, False), (1.0, False), (3.0, True)):
        out = tmp_path / f"out-{alpha}-{rslora}"
        report = pipeline.quantize(model, out, bits=3, rank=4, format="dense", alpha=alpha, rslora=rslora)
        base = AutoModelForCausalLM.from_pretrained(out)
        merged = PeftModel.from_pretrained(base, out, subfolder="loftq_init", is_trainable=True).merge_and_unload()
        loaded = merged.state_dict()
        for row in report["weights"]:
            W = source[row["tensor"]].double()
            error = (W - loaded[row["tensor"]].double()).norm() / W.norm()
            assert error.item() == pytest.approx(row["relative_error"], rel=1e-4)
        assert report["totals"]["relative_error"] < report["totals"]["relative_error_without_adapter"]
