"""Sources that are no plain safetensors of one dtype: taken for what they hold, or refused with lines that work."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor

from loftq_cli import quantize
from loftq_cli.checkpoint import fp8, reader
from loftq_cli.checkpoint.reader import TensorInfo, read_chunks, read_tensor
from loftq_cli.checkpoint.source import open_checkpoint
from loftq_cli.config import build_config
from loftq_cli.errors import LoftqError
from loftq_cli.merge import merge
from loftq_cli.pipeline import plan_quantize
from loftq_cli.plan import ADAPTER_FILE
from loftq_cli.report import load_lines
from loftq_cli.verify import verify
from tests.conftest import save_llama
from tests.test_eval import save_tokenizer

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
DENSE: dict[str, Any] = {"bits": 3, "rank": 4, "iters": 1, "format": "dense", "device": "cpu"}


def refusal(folder: Path | str, *words: str) -> str:
    """The hint of the error that opening raises; message and hint must hold all `words`."""
    with pytest.raises(LoftqError) as caught:
        open_checkpoint(str(folder))
    said = f"{caught.value.message}\n{caught.value.hint}"
    assert not [word for word in words if word not in said], said
    return str(caught.value.hint)


def run_lines(hint: str, count: int | None = None) -> None:
    """Run the lines of a hint, its last ones: those of the tokenizer left out with a `count`."""
    exec("\n".join(hint.splitlines()[1:][:count]), {})


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def loaded(report: dict[str, Any], out: Path) -> Any:
    names: dict[str, Any] = {}
    exec("\n".join(load_lines(report, str(out))), names)
    return names["model"]


# dtypes


def test_dtypes_mixed_in_one_file(tiny_llama: Path, tmp_path: Path) -> None:
    """Each weight in its own dtype; float64, which no loader of formats has, is left alone with that reason."""
    tensors = load_file(tiny_llama / "model.safetensors")
    dtypes = dict(q_proj=torch.float16, k_proj=torch.bfloat16, up_proj=torch.float64)
    for name in tensors:
        tensors[name] = tensors[name].to(dtypes.get(name.split(".")[-2], torch.float32))
    shutil.copytree(tiny_llama, tmp_path / "model")
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    report = quantize(tmp_path / "model", tmp_path / "out", **DENSE)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in stored.items()} == {n: t.dtype for n, t in tensors.items()}
    skipped = {row["name"]: row["reason"] for row in report["skipped"]}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float64:
            assert skipped[name] == "stored as float64"
            assert torch.equal(stored[name], tensor)
    rows = {row["tensor"]: row for row in report["weights"]}
    assert {row["dtype"] for row in rows.values()} == {"float16", "bfloat16", "float32"}
    for name, row in rows.items():
        W = tensors[name].double()
        error = ((W - stored[name].double()).norm() / W.norm()).item()
        assert error == pytest.approx(row["relative_error_without_adapter"], rel=1e-4)
    assert verify(tmp_path / "out", str(tmp_path / "model")).violations == ()
    ids = torch.arange(8)[None]
    assert loaded(report, tmp_path / "out")(input_ids=ids, labels=ids).loss.isfinite()


# fp8


def to_fp8(W: Tensor, bm: int, bn: int) -> tuple[Tensor, Tensor, Tensor]:
    """W as codes and scales of blocks [bm, bn], and what they say, block by block in float64."""
    m, n = W.shape
    codes, exact = torch.empty(m, n, dtype=torch.float8_e4m3fn), torch.empty(m, n, dtype=torch.float64)
    scale = torch.empty(-(-m // bm), -(-n // bn))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = (slice(i * bm, (i + 1) * bm), slice(j * bn, (j + 1) * bn))
            scale[i, j] = W[block].abs().max() / 448
            codes[block] = (W[block] / scale[i, j]).to(torch.float8_e4m3fn)
            exact[block] = codes[block].double() * scale[i, j].double()
    return codes, scale, exact


def save_fp8(folder: Path, block: tuple[int, int], **sizes: int) -> dict[str, Tensor]:
    """An fp8 Llama in two shards, scales in the other one than their weights; returns all values, in float64."""
    save_llama(folder, torch.bfloat16, **sizes)
    values = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    shards: dict[str, dict[str, Tensor]] = {FIRST: {}, SECOND: {}}
    for name, tensor in values.items():
        if "_proj" in name:
            codes, scale, values[name] = to_fp8(tensor.float(), *block)
            shards[FIRST][name], shards[SECOND][f"{name}_scale_inv"] = codes, scale
        else:
            shards[SECOND][name] = tensor.bfloat16()
    for file, tensors in shards.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    entry = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block), "activation_scheme": "dynamic"}
    edit_json(folder / "config.json", lambda config: config.update(quantization_config=entry))
    return values


@pytest.fixture(scope="module")
def fp8_llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """Sizes that blocks of 128 do not divide."""
    folder = tmp_path_factory.mktemp("models") / "fp8"
    return folder, save_fp8(folder, (128, 128), hidden_size=192, intermediate_size=320)


def is_rounded(tensor: Tensor, exact: Tensor) -> bool:
    """Whether it is `exact`, rounded to bfloat16."""
    return tensor.dtype == torch.bfloat16 and bool(((tensor.double() - exact).abs() <= exact.abs() * 2**-8).all())


@pytest.mark.parametrize("step", [fp8.STEP_ELEMENTS, 1000])
def test_fp8_is_dequantized_piece_by_piece(
    fp8_llama: tuple[Path, dict[str, Tensor]], step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, values = fp8_llama
    sizes = []

    def read_at(descriptor: int, view: memoryview, path: Path, info: TensorInfo, begin: int) -> None:
        sizes.append(len(view))
        reader.read_at(descriptor, view, path, info, begin)

    monkeypatch.setattr(fp8, "STEP_ELEMENTS", step)
    monkeypatch.setattr(fp8, "read_at", read_at)  # of the codes
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.tensors.keys() == values.keys()
    assert "quantization_config" not in checkpoint.config
    for name, info in checkpoint.tensors.items():
        whole = read_tensor(checkpoint.path(info.file), info)
        assert whole.shape == values[name].shape
        assert is_rounded(whole, values[name]), name
        pieces = b"".join(read_chunks(checkpoint.path(info.file), info, 1234))
        assert pieces == whole.view(torch.uint8).numpy().tobytes()
    assert 0 < max(sizes) <= step


def test_fp8_source_from_end_to_end(fp8_llama: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    folder, values = fp8_llama
    out = tmp_path / "out"
    notes = plan_quantize(str(folder), build_config(DENSE)).notes
    assert "14 fp8 weights of the source are dequantized to bfloat16 on reading" in notes
    report = quantize(folder, out, skip=["*.down_proj"], **DENSE)
    stored = {**load_file(out / FIRST), **load_file(out / SECOND)}
    assert stored.keys() == values.keys()
    assert json.loads((out / INDEX).read_text())["weight_map"].keys() == values.keys()
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    left = [name for name in values if "down_proj" in name or "_proj" not in name]
    assert all(is_rounded(stored[name], values[name]) for name in left)
    for row in report["weights"]:
        W = values[row["tensor"]]
        error = ((W - stored[row["tensor"]].double()).norm() / W.norm()).item()
        assert error == pytest.approx(row["relative_error_without_adapter"], rel=1e-2)
    assert len(report["weights"]) == 12
    assert verify(out, str(folder)).violations == ()

    merge(out, tmp_path / "merged")
    merged = open_checkpoint(str(tmp_path / "merged"))
    assert all(info.dtype == torch.bfloat16 and info.decoder is None for info in merged.tensors.values())
    ids = torch.arange(8)[None]
    assert loaded(report, out)(input_ids=ids, labels=ids).loss.isfinite()


def test_fp8_run_that_is_stopped_goes_on_to_the_same_bytes(
    fp8_llama: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    folder, _ = fp8_llama
    options = {**DENSE, "skip": ["*.down_proj"]}
    whole = quantize(folder, tmp_path / "whole", **options)

    def stop(name: str, _: int) -> None:
        if "layers.1" in name:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(folder, tmp_path / "out", progress=stop, **options)
    resumed = quantize(folder, tmp_path / "out", resume=True, **options)
    assert {n: h for n, h in resumed["files"].items()} == whole["files"]


@pytest.mark.parametrize("method", ["loftq", "qera"])
def test_fp8_gives_what_its_dequantized_twin_gives(method: str, tmp_path: Path) -> None:
    """By weights alone, and on text that runs through the model."""
    values = save_fp8(tmp_path / "model", (64, 64), num_hidden_layers=1)
    shutil.copytree(tmp_path / "model", tmp_path / "twin")
    for file in (FIRST, SECOND):
        held = load_file(tmp_path / "twin" / file)
        plain = {name: values[name].bfloat16() for name in held if name in values}
        save_file(plain, tmp_path / "twin" / file, metadata={"format": "pt"})
    weight_map = {name: FIRST if "_proj" in name else SECOND for name in values}
    (tmp_path / "twin" / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    edit_json(tmp_path / "twin" / "config.json", lambda config: config.pop("quantization_config"))
    options = {"bits": 2, "rank": 4, "group_size": 32, "format": "dense", "device": "cpu", "method": method}
    if method == "qera":
        text = tmp_path / "text.txt"
        text.write_text(" ".join(f"w{i * i % 89}" for i in range(2000)))
        options |= {"calibration": str(text), "samples": 4, "seqlen": 16}
    reports = []
    for name in ("model", "twin"):
        save_tokenizer(tmp_path / name)
        reports.append(quantize(tmp_path / name, tmp_path / f"{name}-out", **options))
    hashes = [{n: h for n, h in report["files"].items() if n.startswith("model-")} for report in reports]
    assert hashes[0] == hashes[1]
    assert len(hashes[0]) == 2
    adapters = [load_file(tmp_path / f"{name}-out" / ADAPTER_FILE) for name in ("model", "twin")]
    assert all(torch.equal(adapters[1][name], factor) for name, factor in adapters[0].items())


def test_fp8_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    save_fp8(tmp_path / "model", (64, 32))
    state = tf.LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16).state_dict()
    checkpoint = open_checkpoint(str(tmp_path / "model"))
    for name, info in checkpoint.tensors.items():
        assert torch.equal(read_tensor(checkpoint.path(info.file), info), state[name]), name


@pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.tensor([0.5]), torch.tensor([[126]], dtype=torch.uint8)])
def test_fp8_with_one_scale(scale: Tensor, tmp_path: Path) -> None:
    codes = torch.linspace(-4, 4, 48).reshape(6, 8).to(torch.float8_e4m3fn)
    (tmp_path / "config.json").write_text('{"dtype": "float32", "quantization_config": {"quant_method": "fp8"}}')
    tensors = {"x.weight": codes, "x.weight_scale_inv": scale, "x.activation_scale": torch.tensor(2.0)}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.tensors.keys() == {"x.weight"}
    W = read_tensor(checkpoint.path("model.safetensors"), checkpoint.tensors["x.weight"])
    assert torch.equal(W, codes.float() / 2)


@pytest.mark.parametrize("block", [1, 3, 7])
def test_fp8_vectors(block: int, tmp_path: Path) -> None:
    """One scale for all of a vector of 7, or one for each 3, the last one short, or for each one of them."""
    codes = torch.linspace(-4, 4, 7).to(torch.float8_e4m3fn)
    scale = torch.arange(1.0, 1 + -(-7 // block))
    entry = {"quant_method": "fp8", "weight_block_size": [block, block]}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": entry}))
    save_file({"norm.weight": codes, "norm.weight_scale_inv": scale}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.tensors.keys() == {"norm.weight"}
    info = checkpoint.tensors["norm.weight"]
    assert info.shape == (7,)
    exact = codes.double() * scale.double().repeat_interleave(block)[:7]
    assert is_rounded(read_tensor(checkpoint.path(info.file), info), exact)


def test_fp8_of_experts_in_one_tensor(tmp_path: Path) -> None:
    """Blocks of 4 × 3 in three matrices 6 × 5, the last ones short on both sides."""
    matrices = [to_fp8(torch.randn(6, 5), 4, 3) for _ in range(3)]
    codes, scale, exact = (torch.stack(tensors) for tensors in zip(*matrices, strict=True))
    entry = {"quant_method": "fp8", "weight_block_size": [4, 3]}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"quantization_config": entry}}))
    save_file({"up": codes, "up_scale_inv": scale}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.config == {"text_config": {}}
    info = checkpoint.tensors["up"]
    assert is_rounded(read_tensor(checkpoint.path(info.file), info), exact)
    for i in range(3):  # one expert alone
        size = info.nbytes // 3
        one = replace(info, name=f"up[{i}]", shape=info.shape[1:], offset=info.offset + i * size, nbytes=size)
        assert is_rounded(read_tensor(checkpoint.path(info.file), one), exact[i])


CODES = torch.ones(6, 8).to(torch.float8_e4m3fn)
BAD_FP8: dict[str, tuple[dict[str, Tensor], list[str]]] = {
    "no scale": ({"x.weight": CODES}, ["`x.weight`", "has no `x.weight_scale_inv`"]),
    "a vector without scale": ({"norm.weight": CODES[0].clone()}, ["`norm.weight`", "has no `norm.weight_scale_inv`"]),
    "a vector with a scale of other blocks": (
        {"norm.weight": CODES[0].clone(), "norm.weight_scale_inv": torch.ones(3)},
        ["`norm.weight_scale_inv` [3]", "of `norm.weight` [8]"],
    ),
    "scale of other blocks": (
        {"x.weight": CODES, "x.weight_scale_inv": torch.ones(4, 3)},
        ["`x.weight_scale_inv` [4, 3]", "[2, 2] of `x.weight` [6, 8]"],
    ),
    "scale of nothing": ({"y.weight_scale_inv": torch.ones(1)}, ["`y.weight_scale_inv`", "no fp8 weight"]),
}


@pytest.mark.parametrize("case", BAD_FP8)
def test_fp8_that_does_not_fit(case: str, tmp_path: Path) -> None:
    tensors, words = BAD_FP8[case]
    entry = {"quant_method": "fp8", "weight_block_size": [2, 2]}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": entry}))
    save_file(tensors, tmp_path / "model.safetensors")
    refusal(tmp_path, *words)


# low bits already


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "loftq", "fbgemm_fp8", "hqq"])
def test_low_bits_are_refused_by_their_name(method: str, tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "model")
    entry = {"quant_method": method}
    edit_json(tmp_path / "model" / "config.json", lambda config: config.update(quantization_config=entry))
    refusal(tmp_path / "model", f"already quantized, by {method}", "start from the unquantized checkpoint")


def test_an_output_is_refused_with_the_command_that_merges_it(tiny_llama: Path, tmp_path: Path) -> None:
    quantize(tiny_llama, tmp_path / "out", **DENSE)
    assert f"loftq merge {tmp_path / 'out'} merged-model" in refusal(tmp_path / "out", "is an output of loftq")
    merge(tmp_path / "out", tmp_path / "merged-model")
    assert len(open_checkpoint(str(tmp_path / "merged-model")).tensors) == 21


def test_the_lines_that_undo_bitsandbytes(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    config = tf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = tf.LlamaForCausalLM.from_pretrained(tiny_llama, quantization_config=config)
    model.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    run_lines(refusal("model", "by bitsandbytes", ".dequantize()"), 2)
    converted = load_file(tmp_path / "safetensors-model" / "model.safetensors")
    for name, W in load_file(tiny_llama / "model.safetensors").items():
        assert (converted[name].float() - W).norm() < 0.2 * W.norm()
    quantize("safetensors-model", "out", **DENSE)


def test_the_lines_that_undo_mxfp4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    config = tf.GptOssConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=100, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    tf.GptOssForCausalLM(config).bfloat16().save_pretrained(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    levels = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    expected = {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, n, m = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, m, n // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 124, (experts, m, n // 32), dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        values = levels[torch.stack([blocks & 15, blocks >> 4], -1).long()].flatten(3)
        expected[name] = (values * (scales.float() - 127).exp2()[..., None]).reshape(experts, m, n).mT
    assert len(expected) == 2
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    entry = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    edit_json(tmp_path / "model" / "config.json", lambda config: config.update(quantization_config=entry))
    monkeypatch.chdir(tmp_path)
    run_lines(refusal("model", "by mxfp4", "Mxfp4Config(dequantize=True)"), 2)
    converted = load_file(tmp_path / "safetensors-model" / "model.safetensors")
    for name, values in expected.items():
        assert torch.equal(converted[name].float(), values)
    quantize("safetensors-model", "out", **DENSE)


# GGUF


def save_gguf(path: Path, model: Any) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    config, heads = model.config, model.config.num_attention_heads
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokens = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "ab", "abc", "de"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b", "ab c", "d e"])
    writer.add_token_types([1] * len(tokens))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers.": "blk.",
        "self_attn.o_proj": "attn_output", "self_attn.": "attn_", "_proj": "", "mlp.": "ffn_",
        "post_attention_layernorm": "ffn_norm", "input_layernorm": "attn_norm",
    }  # fmt: skip
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:  # rotary halves, interleaved
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        for old, new in names.items():
            name = name.replace(old, new)
        if values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("model", ["folder", "folder/x.gguf"])
def test_the_lines_that_convert_gguf(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    save_llama(tmp_path / "plain", num_key_value_heads=4, vocab_size=32, num_hidden_layers=1)
    source = tf.LlamaForCausalLM.from_pretrained(tmp_path / "plain")
    (tmp_path / "folder").mkdir()
    save_gguf(tmp_path / "folder" / "x.gguf", source)
    monkeypatch.chdir(tmp_path)
    run_lines(refusal(model, "`folder` has its weights as GGUF only (x.gguf)", "pip install gguf"))
    converted = open_checkpoint("safetensors-model")
    assert "tokenizer.json" in converted.side_files
    assert converted.tensors.keys() == source.state_dict().keys()
    for name, W in source.state_dict().items():
        info = converted.tensors[name]
        assert (read_tensor(converted.path(info.file), info).float() - W).norm() <= 0.02 * W.norm()
    quantize("safetensors-model", "out", **DENSE)


# pickles


def as_pickle(folder: Path, shards: int = 1, **options: Any) -> Path:
    """The checkpoint in `folder` beside it, as pytorch_model.bin or as shards of that."""
    pickled = folder.parent / "pickled"
    shutil.copytree(folder, pickled)
    tensors = load_file(pickled / "model.safetensors")
    (pickled / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, pickled / "pytorch_model.bin", **options)
        return pickled
    weight_map = {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05}-of-{shards:05}.bin"
        part = {name: tensor.clone() for i, (name, tensor) in enumerate(tensors.items()) if i % shards == number}
        torch.save(part, pickled / file)
        weight_map |= dict.fromkeys(part, file)
    (pickled / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return pickled


@pytest.mark.parametrize("shards", [1, 3])
def test_pickles_are_read_as_the_safetensors_they_could_be(shards: int, tmp_path: Path) -> None:
    pickled = as_pickle(save_llama(tmp_path / "model", torch.bfloat16), shards)
    report = quantize(pickled, tmp_path / "out", **DENSE)
    plain = quantize(tmp_path / "model", tmp_path / "plain", **DENSE)
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)] if shards > 1 else []
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == (names or ["model.safetensors"])
    assert not list((tmp_path / "out").glob("*.bin*"))
    stored = {
        name: t for file in names or ["model.safetensors"] for name, t in load_file(tmp_path / "out" / file).items()
    }
    expected = load_file(tmp_path / "plain" / "model.safetensors")
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], expected[name]) for name in expected)
    assert report["totals"]["relative_error"] == pytest.approx(plain["totals"]["relative_error"])
    assert verify(tmp_path / "out", str(pickled)).violations == ()
    ids = torch.arange(8)[None]
    assert loaded(report, tmp_path / "out")(input_ids=ids, labels=ids).loss.isfinite()


def test_tensors_of_a_pickle_that_share_or_are_odd(tmp_path: Path) -> None:
    """One storage under two names and a part of it under a third; scalars, empty ones, parameters, other dtypes."""
    base = torch.randn(5, 6)
    tensors = {
        "a": base, "again": base, "rows": base[2:4], "scalar": torch.tensor(3), "none": torch.randn(0, 3),
        "half": torch.randn(3).half(), "fp8": torch.ones(2, 2).to(torch.float8_e4m3fn), "flag": torch.tensor([True]),
        "parameter": torch.nn.Parameter(torch.randn(2)), "line": torch.randn(1, 5).T,
    }  # fmt: skip
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        info = checkpoint.tensors[name]
        read = read_tensor(checkpoint.path(info.file), info)
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(read.float(), tensor.float()), name
    first = checkpoint.fingerprint
    torch.save({**tensors, "half": torch.zeros(3).half()}, tmp_path / "pytorch_model.bin")
    assert open_checkpoint(str(tmp_path)).fingerprint != first


def test_a_tied_head_in_a_pickle(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "model", tie_word_embeddings=True)
    pickled = as_pickle(model)
    tensors = torch.load(pickled / "pytorch_model.bin", weights_only=True)
    torch.save({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}, pickled / "pytorch_model.bin")
    report = quantize(pickled, tmp_path / "out", **DENSE)
    model = loaded(report, tmp_path / "out").get_base_model()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, tensors["model.embed_tokens.weight"])


class Evil:
    ran: list[str] = []  # noqa: RUF012

    def __reduce__(self) -> Any:
        return Evil.ran.append, ("code of the file",)


def with_data(file: Path, data: bytes, how: int = zipfile.ZIP_STORED) -> None:
    """The file with this `data.pkl`."""
    with zipfile.ZipFile(file, "w", how) as archive:
        archive.writestr("archive/data.pkl", data)


BAD_PICKLES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "code": (lambda file: torch.save({"a": torch.ones(2), "b": Evil()}, file), ["cannot be read without running"]),
    "no tensors": (lambda file: torch.save({"epoch": 3}, file), ["its `epoch` is no tensor"]),
    "tensors deeper": (lambda file: torch.save({"model": {"a": torch.ones(2)}}, file), ["`model` is no tensor"]),
    "transposed": (lambda file: torch.save({"a": torch.randn(4, 5).T}, file), ["`a` does not lie in one piece"]),
    "a plain pickle": (lambda file: file.write_bytes(pickle.dumps({"a": 1})), ["before 1.6"]),
    "much of nothing": (lambda file: with_data(file, bytes(1 << 20), zipfile.ZIP_DEFLATED), ["compressed"]),
    "room for billions": (lambda file: with_data(file, b"\x80\x02Nr\xff\xff\xff\x7f."), ["remembers more values"]),
    "tuples in tuples": (lambda file: with_data(file, b"\x80\x02}N" + b"\x85" * 10**6 + b"Ns."), ["nested"]),
    "the same by memory": (
        lambda file: with_data(
            file, b"\x80\x02}Nq\x00" + b"".join(b"h%c\x85q%c" % (i % 250, (i + 1) % 250) for i in range(10**5)) + b"Ns."
        ),
        ["nested"],
    ),
    "the same in a list of pairs": (
        lambda file: with_data(file, b"\x80\x02ccollections\nOrderedDict\n]N" + b"\x85" * 10**6 + b"N\x86a\x85R."),
        ["nested"],
    ),
    "truncated": (lambda file: file.write_bytes(pickled_bytes(file)[:-200]), ["damaged", "download"]),
    "LFS pointer": (lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\n"), ["git lfs pull"]),
    "missing": (lambda file: file.unlink(), ["no safetensors weights"]),
}


def pickled_bytes(file: Path) -> bytes:
    torch.save({"a": torch.ones(2)}, file)
    return file.read_bytes()


@pytest.mark.parametrize("case", BAD_PICKLES)
def test_pickles_that_are_refused(case: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    spoil, words = BAD_PICKLES[case]
    pickled_bytes(tmp_path / "pytorch_model.bin")
    open_checkpoint(str(tmp_path))
    spoil(tmp_path / "pytorch_model.bin")
    refusal(tmp_path, *words)
    assert not Evil.ran


@pytest.mark.parametrize("file", ["../x.bin", "/x.bin", "x.safetensors", "gone.bin", 3])
def test_an_index_of_pickles_that_lies(file: object, tmp_path: Path) -> None:
    pickled = as_pickle(save_llama(tmp_path / "model"), 2)
    index = pickled / "pytorch_model.bin.index.json"
    edit_json(index, lambda content: content["weight_map"].update({"lm_head.weight": file}))
    refusal(pickled, f"pytorch_model.bin.index.json names `{file}`")


def test_old_pickles_and_the_lines_that_convert_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pickled = as_pickle(save_llama(tmp_path / "model"), _use_new_zipfile_serialization=False)
    monkeypatch.chdir(tmp_path)
    run_lines(refusal(pickled, "before 1.6", "LlamaForCausalLM"), 2)
    expected = load_file(tmp_path / "model" / "model.safetensors")
    converted = load_file(tmp_path / "safetensors-model" / "model.safetensors")
    assert all(torch.equal(converted[name], expected[name]) for name in expected)


# adapters


def test_the_lines_that_merge_an_adapter(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig, get_peft_model

    model = tf.LlamaForCausalLM.from_pretrained(tiny_llama)
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    hint = refusal("adapter", f"is an adapter for `{tiny_llama}`", "merge_and_unload", "give `merged-model`")
    run_lines(hint)
    source, merged = load_file(tiny_llama / "model.safetensors"), load_file(Path("merged-model") / "model.safetensors")
    for name, W in adapted.merge_and_unload().state_dict().items():
        assert torch.allclose(merged[name], W, atol=1e-6)
        assert torch.equal(merged[name], source[name]) is ("q_proj" not in name)
    quantize("merged-model", "out", **DENSE)

    shutil.copytree(tiny_llama, "both")
    for file in Path("adapter").iterdir():
        shutil.copy(file, Path("both") / file.name)
    refusal("both", "beside its weights", "remove adapter_config.json", "merge_and_unload")


def test_an_adapter_of_our_own_base_is_merged_by_our_own_command(tiny_llama: Path, tmp_path: Path) -> None:
    """For AutoPeftModel would fill a packed base with random numbers."""
    out, tuned = tmp_path / "out", tmp_path / "my tuned"
    quantize(tiny_llama, out, bits=2, rank=4, format="packed", device="cpu")
    shutil.copytree(out / "loftq_init", tuned)
    hint = refusal(
        tuned, f"is an adapter for `{out}`, an output of loftq", f"loftq merge {out} merged-model --adapter '{tuned}'"
    )
    assert "AutoPeftModel" not in hint
    merge(out, tmp_path / "merged-model", adapter=tuned)
    assert refusal(out / "loftq_init", "is an adapter").endswith(f"loftq merge {out} merged-model")


# what config.json, index and shards say of each other


def test_shapes_and_layers_that_are_not_the_models_are_refused_before_any_work(
    tiny_llama: Path, tmp_path: Path
) -> None:
    def spoiled(change: Callable[[dict[str, Tensor]], Any]) -> Path:
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        shutil.copytree(tiny_llama, tmp_path / "model")
        tensors = load_file(tiny_llama / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
        return tmp_path / "model"

    up, norm = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
    cases: list[tuple[Callable[[dict[str, Tensor]], Any], str]] = [
        (
            lambda t: t.update({up: t[up][:64].clone()}),
            rf"`{up}` in `model.safetensors` has shape \[64, 128\].*\[256, 128\]",
        ),
        (lambda t: t.update({norm: t[norm][:64].clone()}), rf"`{norm}`.* \[64\], .*\[128\]"),
        (lambda t: t.pop(up), f"`{up}` is in none of the files"),
    ]
    for change, words in cases:
        with pytest.raises(LoftqError, match=words) as caught:
            quantize(spoiled(change), tmp_path / "out", **DENSE)
        assert "different saves" in str(caught.value.hint)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "lost", ["model.embed_tokens.weight", "model.norm.weight", "model.layers.1.block_sparse_moe.experts", "gate.weight"]
)
def test_parameters_that_no_file_holds_are_refused(tmp_path: Path, lost: str) -> None:
    """Else what is loaded has random ones there, of which `verify` knows nothing."""
    torch.manual_seed(0)
    config = tf.MixtralConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, num_local_experts=2,
    )  # fmt: skip
    tf.MixtralForCausalLM(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    left = {name: tensor for name, tensor in tensors.items() if lost not in name}
    assert len(left) < len(tensors)
    save_file(left, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoftqError, match="in none of the files"):
        plan_quantize(str(tmp_path), build_config({"rank": 4}))


def test_two_tied_weights_that_are_both_lost_are_refused(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "tied", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    save_file({k: t for k, t in tensors.items() if "embed" not in k}, folder / "model.safetensors")
    with pytest.raises(LoftqError, match=r"`model\.embed_tokens\.weight` is in none of the files"):
        plan_quantize(str(folder), build_config({"rank": 4}))
