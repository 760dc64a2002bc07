"""Each format, written from its own tensors, loaded by its real consumer: same values bit for bit, and it trains.

The library names of the values: bitsandbytes 0.50, GPTQModel 7.6 with optimum 2.3, compressed-tensors 0.20,
transformers 5.23, peft 0.21.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import loftq_cli.runtime  # noqa: F401  (loads `packed`)
from loftq_cli.errors import LoftqError
from loftq_cli.formats import AUTO_ORDER, FORMATS, bnb, make_quantizer, peft_adapter
from loftq_cli.heads import Head
from loftq_cli.quantizers import QUANTIZERS
from loftq_cli.quantizers.base import dequantize
from tests.conftest import save_llama

NEEDS = {"bnb": ("bitsandbytes",), "gptq": ("gptqmodel", "optimum"), "compressed-tensors": ("compressed_tensors",)}
RANK = 4
TOKENS = torch.arange(16)[None] * 7

# format, quantizer, bits, group size, dtype of the checkpoint, double quantization
CASES = [
    ("bnb", "nf", 4, 64, torch.float32, False),
    ("bnb", "nf", 4, 32, torch.bfloat16, False),
    ("bnb", "nf", 4, 64, torch.bfloat16, True),
    ("bnb", "nf", 4, 128, torch.float16, True),
    ("gptq", "uniform", 2, 64, torch.float32, False),
    ("gptq", "uniform", 3, 32, torch.bfloat16, False),
    ("gptq", "uniform", 4, 128, torch.float32, False),
    ("gptq", "uniform", 8, -1, torch.bfloat16, False),
    ("gptq", "uniform-symmetric", 2, -1, torch.bfloat16, False),
    ("gptq", "uniform-symmetric", 3, 128, torch.float32, False),
    ("gptq", "uniform-symmetric", 4, 32, torch.bfloat16, False),
    ("gptq", "uniform-symmetric", 8, 64, torch.float16, False),
    ("compressed-tensors", "uniform-symmetric", 2, 64, torch.float32, False),
    ("compressed-tensors", "uniform-symmetric", 2, -1, torch.bfloat16, False),
    ("compressed-tensors", "uniform-symmetric", 3, 32, torch.bfloat16, False),
    ("compressed-tensors", "uniform-symmetric", 4, 128, torch.bfloat16, False),
    ("compressed-tensors", "uniform-symmetric", 8, -1, torch.float16, False),
    ("packed", "lloyd", 2, 64, torch.bfloat16, True),
    ("packed", "lloyd", 3, 48, torch.float32, False),  # a short last group
    ("packed", "lloyd", 4, 32, torch.float16, False),
    ("packed", "nf-search", 2, -1, torch.float32, True),
    ("packed", "nf", 2, 64, torch.bfloat16, False),
    ("packed", "nf", 3, 128, torch.float32, True),
    ("packed", "uniform", 3, 32, torch.bfloat16, False),
    ("packed", "uniform", 8, -1, torch.float32, False),
    ("packed", "uniform-symmetric", 2, 64, torch.float16, False),
    ("dense", "nf", 2, 64, torch.float32, False),
    ("dense", "uniform", 3, -1, torch.bfloat16, False),
    ("dense", "uniform-symmetric", 4, 48, torch.float16, False),  # a short last group
]
TRAINED = [CASES[k] for k in (0, 2, 4, 5, 6, 7, 11, 12, 14, 17, 18, 20, 23, 26)]


def case_id(case: tuple[Any, ...]) -> str:
    return "-".join(str(part).removeprefix("torch.") for part in case)


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """No compilation: gptqmodel's takes 15 seconds a time, and one test below lets it. One thread, for tiny tensors."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.compiler.set_stance("force_eager"):
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A tiny Llama, saved by transformers, of any dtype and number of layers."""
    saved: dict[str, Path] = {}

    def source(dtype: torch.dtype = torch.float32, **overrides: object) -> Path:
        key = f"{dtype} {overrides}"
        if key not in saved:
            saved[key] = save_llama(tmp_path_factory.mktemp("llama"), dtype, **overrides)
        return saved[key]

    return source


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


TARGETS = {
    "architecture": "LlamaForCausalLM",
    "main_input_name": "input_ids",
    "has_fused_experts": False,
    "stacks": [],
    "retargeted": frozenset(),
    "linear_subclass": None,
}


def plan_for(model: Any, case: tuple[Any, ...], skip: tuple[str, ...] = ()) -> Any:
    """What the formats read of a `Plan`, for every linear of `model` but the head and `skip`."""
    _, quantizer, bits, group_size, dtype, double_quant = case
    linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    skipped = tuple(name for name in linears if name == "lm_head" or name in skip)
    jobs = tuple(
        SimpleNamespace(
            module=name,
            tensor=f"{name}.weight",
            shape=tuple(layer.weight.shape),
            bits=bits,
            group_size=group_size,
            quantizer=quantizer,
            dtype=dtype,
            block=".".join(name.split(".")[:3]),
            transposed=False,
            rank=RANK,
            expert=None,
            embedding=False,
            wrapped=False,
            loaded_module=name,
        )
        for name, layer in linears.items()
        if name not in skipped
    )
    return SimpleNamespace(
        jobs=jobs,
        skipped_linears=skipped,
        targets=SimpleNamespace(
            **TARGETS, head=Head("CAUSAL_LM"), module_names=tuple(name for name, _ in model.named_modules())
        ),
        config=SimpleNamespace(
            rank=RANK,
            alpha=2.0 * RANK,
            rslora=False,
            double_quant=double_quant,
            experts_adapter=False,
        ),
        quantizes_head=False,
        block_paths=("model.layers",),
    )


def quantizer_for(output: Any, job: Any, double_quant: bool) -> Any:
    return make_quantizer(output, job.quantizer, job.bits, job.group_size, job.dtype, double_quant)


def write(source: Path, out: Path, case: tuple[Any, ...], plan: Any) -> dict[str, Tensor]:
    """Write a checkpoint in the format of `case`; return what `read` says each module's weight is."""
    output = FORMATS[case[0]]
    assert output.why_not(plan) is None
    tensors = load_file(source / "model.safetensors")
    values = {}
    for job in plan.jobs:
        quantizer = quantizer_for(output, job, plan.config.double_quant)
        quantized = quantizer.quantize(tensors.pop(job.tensor).float())
        stored = output.tensors(job.module, quantized)
        values[job.module] = output.read(job.module, stored, quantizer.empty(*job.shape))
        assert torch.equal(values[job.module], dequantize(quantized))
        tensors |= {name: tensor.clone() for name, tensor in stored.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    if quantization := output.quantization_config(plan):
        config["quantization_config"] = quantization
    (out / "config.json").write_text(json.dumps(config))
    return values


def write_adapter(out: Path, plan: Any, zero_B: bool = False) -> None:
    generator = torch.Generator().manual_seed(1)
    rank = plan.config.rank
    scaling = peft_adapter.scaling(rank, plan.config.alpha, plan.config.rslora)
    tensors: dict[str, Tensor] = {}
    for job in plan.jobs:
        m, n = job.shape
        lora_A = torch.randn(rank, n, generator=generator) * 0.05
        lora_B = torch.zeros(m, rank) if zero_B else torch.randn(m, rank, generator=generator) * 0.05
        stored = peft_adapter.stored_factors(lora_A, lora_B, scaling, torch.float32)
        tensors |= dict(zip(peft_adapter.tensor_names(job.module), stored, strict=True))
    folder = out / "loftq_init"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = peft_adapter.adapter_config(plan, str(out), plan.targets.module_names)
    (folder / "adapter_config.json").write_text(json.dumps(config))


def attach(base: Any, out: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(base, out, subfolder="loftq_init", is_trainable=True)


def loaded_weight(layer: Any) -> Tensor:
    """What the consumer's own code dequantizes the weight of `layer` to."""
    kind = type(layer).__name__
    if kind == "Linear4bit":
        import bitsandbytes

        return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    if kind == "TorchLinear":
        return type(layer).dequantize_weight(layer).T.float()
    assert kind in ("Linear", "PackedLinear")
    return layer.weight.data.float()


def with_values(source: Path, values: dict[str, Tensor]) -> Any:
    """The dense source model, holding `values`."""
    model = load(source)
    with torch.no_grad():
        for name, value in values.items():
            model.get_submodule(name).weight.copy_(value)
    return model


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / a.float().norm())


def need(case: tuple[Any, ...]) -> None:
    for library in NEEDS.get(case[0], ()):
        pytest.importorskip(library)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_the_real_loader_has_the_values_that_read_says(
    case: tuple[Any, ...], llama: Callable[..., Path], tmp_path: Path
) -> None:
    need(case)
    source = llama(case[4])
    plan = plan_for(load(source), case)
    values = write(source, tmp_path, case, plan)
    model, reference = load(tmp_path), with_values(source, values)
    for name, value in values.items():
        assert torch.equal(loaded_weight(model.get_submodule(name)), value), name
    if case[0] in ("gptq", "compressed-tensors") and case[1] == "uniform-symmetric":
        scales = [t for name, t in load_file(tmp_path / "model.safetensors").items() if "scale" in name]
        assert any((scale < 0).any() for scale in scales)  # the quantizer's signed scales went through the loader
    with torch.no_grad():
        wanted = reference(TOKENS).logits
        # gptqmodel multiplies what lies transposed, which some CPUs add up in another order: a rounding of float16
        rounding = 2**-11 if case[0] == "gptq" and wanted.dtype == torch.float16 else 1e-6
        # train mode first: in eval mode, bitsandbytes on AVX512-BF16 CPUs computes with bfloat16 weights
        assert relative(wanted, model.train()(TOKENS).logits) < rounding
        assert relative(wanted, model.eval()(TOKENS).logits) < (2e-2 if case[0] == "bnb" else rounding)


def assert_same_gradients(model: Any, reference: Any, tolerance: float) -> None:
    for each in (model, reference):
        each.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if "lora_" in name}
    wanted = {name: p.grad for name, p in reference.named_parameters() if "lora_" in name}
    assert gradients.keys() == wanted.keys()
    assert {name.split(".lora_")[1][0] for name in gradients} == {"A", "B"}
    for name, gradient in gradients.items():
        assert wanted[name].norm() > 0, name
        assert relative(wanted[name], gradient) < tolerance, name


@pytest.mark.parametrize("case", TRAINED, ids=case_id)
def test_gradients_are_those_of_a_dense_model(
    case: tuple[Any, ...], llama: Callable[..., Path], tmp_path: Path
) -> None:
    """After an eval-mode forward, which two libraries have kernels for that leave no way back to training."""
    need(case)
    source = llama(case[4])
    plan = plan_for(load(source), case)
    values = write(source, tmp_path, case, plan)
    write_adapter(tmp_path, plan)
    model, reference = attach(load(tmp_path), tmp_path), attach(with_values(source, values), tmp_path)
    for layer in model.modules():
        if type(layer).__name__ == "Linear4bit":
            layer.support_avx512bf16_for_cpu = False  # what the load note says; else these gradients are wrong
    with torch.no_grad():
        model.eval()(TOKENS)
    assert_same_gradients(model, reference, 1e-4 if case[4] == torch.float32 else 0.1)
    generated = model.eval().generate(input_ids=TOKENS[:, :4], max_new_tokens=3, do_sample=False)
    assert generated.shape[1] > 4


def test_bnb_trains_when_the_first_forward_is_in_train_mode(llama: Callable[..., Path], tmp_path: Path) -> None:
    """The other way of the load note, with nothing set."""
    need(CASES[0])
    plan = plan_for(load(llama()), CASES[0])
    values = write(llama(), tmp_path, CASES[0], plan)
    write_adapter(tmp_path, plan)
    model, reference = attach(load(tmp_path), tmp_path), attach(with_values(llama(), values), tmp_path)
    assert_same_gradients(model, reference, 1e-4)


@pytest.mark.parametrize("case", [TRAINED[k] for k in (0, 3, 7, 9)], ids=case_id)
def test_a_qlora_start_trains_every_lora_B(case: tuple[Any, ...], llama: Callable[..., Path], tmp_path: Path) -> None:
    need(case)
    source = llama(case[4])
    plan = plan_for(load(source), case)
    write(source, tmp_path, case, plan)
    write_adapter(tmp_path, plan, zero_B=True)
    model = attach(load(tmp_path), tmp_path).train()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert len(trained) == len(plan.jobs)
    assert all("lora_B" in name for name in trained)


SKIPS = {
    "some": (2, ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj")),
    "a name that begins others": (12, ("model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj")),
}


@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[6], CASES[12]], ids=case_id)
@pytest.mark.parametrize("skips", SKIPS)
def test_skipped_linears_stay_as_they_are(
    case: tuple[Any, ...], skips: str, llama: Callable[..., Path], tmp_path: Path
) -> None:
    need(case)
    layers, skip = SKIPS[skips]
    source = llama(case[4], num_hidden_layers=layers)
    original = load(source)
    plan = plan_for(original, case, skip)
    assert {*skip, "lm_head"} == set(plan.skipped_linears)
    values = write(source, tmp_path, case, plan)
    write_adapter(tmp_path, plan)
    base = load(tmp_path)
    for name in plan.skipped_linears:
        layer = base.get_submodule(name)
        assert type(layer) is torch.nn.Linear
        assert torch.equal(layer.weight, original.get_submodule(name).weight), name
    for name, value in values.items():
        assert torch.equal(loaded_weight(base.get_submodule(name)), value), name
    reference = with_values(source, values)
    with torch.no_grad():
        assert relative(reference(TOKENS).logits, base.train()(TOKENS).logits) < 1e-6
    adapted = {name.split(".lora_A")[0] for name, _ in attach(base, tmp_path).named_parameters() if ".lora_A" in name}
    assert adapted == {f"base_model.model.{job.module}" for job in plan.jobs}


def test_gptq_keeps_biases(llama: Callable[..., Path], tmp_path: Path) -> None:
    need(CASES[6])
    source = llama(attention_bias=True)
    tensors = load_file(source / "model.safetensors")
    biases = {name: torch.randn_like(tensor) for name, tensor in tensors.items() if name.endswith(".bias")}
    biased = tmp_path / "source"
    biased.mkdir()
    shutil.copy(source / "config.json", biased)
    save_file({**tensors, **biases}, biased / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    out.mkdir()
    write(biased, out, CASES[6], plan_for(load(biased), CASES[6]))
    loaded = dict(load(out).named_buffers())
    assert len(biases) == 8
    for name, bias in biases.items():  # GPTQModel rounds biases to float16 too
        assert torch.equal(loaded[name], bias.half())


@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bnb_files_are_what_transformers_itself_saves(
    double_quant: bool, dtype: torch.dtype, llama: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    case = ("bnb", "nf", 4, 64, dtype, double_quant)
    source = llama(dtype)
    plan = plan_for(load(source), case)
    write(source, tmp_path, case, plan)
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
    )  # fmt: skip
    theirs_folder = tmp_path / "theirs"
    AutoModelForCausalLM.from_pretrained(source, quantization_config=config).save_pretrained(theirs_folder)
    ours, theirs = load_file(tmp_path / "model.safetensors"), load_file(theirs_folder / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if name.endswith("bitsandbytes__nf4"):  # ours is filled up with spaces where its length depends on the weight
            assert bytes(ours[name].tolist()).rstrip() == bytes(tensor.tolist()), name
            assert double_quant or len(ours[name]) == len(tensor)
        else:
            assert ours[name].dtype == tensor.dtype
            assert torch.equal(ours[name], tensor), name
    written = json.loads((theirs_folder / "config.json").read_text())["quantization_config"]
    mine = bnb.quantization_config(plan)
    assert mine is not None
    assert {key: written[key] for key in mine if key != "llm_int8_skip_modules"} == {
        key: value for key, value in mine.items() if key != "llm_int8_skip_modules"
    }


def nf4_of_bitsandbytes(W: Tensor, block: int, double_quant: bool) -> dict[str, Tensor]:
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(W, blocksize=block, quant_type="nf4", compress_statistics=double_quant)
    return {"x.weight": packed} | {f"x.weight.{name}": t for name, t in state.as_dict(packed=True).items()}


@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("shape", [(64, 256), (33, 130), (5, 8)], ids=str)
@pytest.mark.parametrize("block", [32, 64, 4096])
def test_bnb_reads_what_bitsandbytes_wrote(shape: tuple[int, int], block: int, double_quant: bool) -> None:
    """Also where the blocks do not divide the weight, and from offsets of any length."""
    functional = pytest.importorskip("bitsandbytes.functional")
    quantizer = QUANTIZERS["nf"](4, block, dtype=torch.bfloat16, double_quant=double_quant)
    for seed in range(3):
        W = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).bfloat16()
        theirs = nf4_of_bitsandbytes(W, block, double_quant)
        ours = bnb.tensors("x", quantizer.quantize(W.float()))
        assert list(ours) == list(theirs)
        state = "x.weight.quant_state.bitsandbytes__nf4"
        padded = bytes(theirs[state].tolist()).ljust(len(ours[state]))
        theirs[state] = torch.tensor(list(padded), dtype=torch.uint8)
        for name, tensor in theirs.items():
            assert torch.equal(ours[name], tensor), name
        state_of = functional.QuantState.from_dict({k: t for k, t in theirs.items() if k != "x.weight"}, "cpu")
        wanted = functional.dequantize_4bit(theirs["x.weight"], state_of)
        assert torch.equal(bnb.read("x", ours, quantizer.empty(*shape)), wanted.float())


def small(case: tuple[Any, ...]) -> tuple[Any, Any, dict[str, Tensor]]:
    """A format, what its quantizer returns on the meta device, and the stored tensors of a small weight."""
    output = FORMATS[case[0]]
    job = SimpleNamespace(quantizer=case[1], bits=case[2], group_size=case[3], dtype=case[4])
    quantizer = quantizer_for(output, job, case[5])
    W = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    return output, quantizer.empty(64, 128), output.tensors("a.b", quantizer.quantize(W))


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_headers_are_known_without_values(case: tuple[Any, ...]) -> None:
    output, like, stored = small(case)
    on_meta = output.tensors("a.b", like)
    assert all(tensor.is_meta for tensor in on_meta.values())
    shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in stored.items()}
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in on_meta.items()} == shapes
    assert list(on_meta) == list(stored)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_read_names_the_tensor_that_is_wrong(case: tuple[Any, ...]) -> None:
    output, like, stored = small(case)
    for name, tensor in stored.items():
        longer, other = torch.cat([tensor, tensor[:1]]), tensor.to(torch.float64)
        for damaged in ({}, {name: longer}, {name: other}):
            with pytest.raises(LoftqError) as raised:
                output.read("a.b", {**{k: t for k, t in stored.items() if k != name}, **damaged}, like)
            assert f"`{name}`" in str(raised.value)


def test_read_refuses_metadata_of_another_weight() -> None:
    output, like, stored = small(CASES[4])
    with pytest.raises(LoftqError, match=r"a\.b\.g_idx"):
        output.read("a.b", {**stored, "a.b.g_idx": stored["a.b.g_idx"].flip(0)}, like)
    output, like, stored = small(CASES[12])
    with pytest.raises(LoftqError, match=r"a\.b\.weight_shape"):
        output.read("a.b", {**stored, "a.b.weight_shape": torch.tensor([128, 64])}, like)
    output, like, stored = small(CASES[0])
    state = "a.b.weight.quant_state.bitsandbytes__nf4"
    for old, new in ((b"float32", b"float16"), (b"64, 128", b"128, 64"), (b"{", b"[")):
        text = bytes(stored[state].tolist()).replace(old, new)
        with pytest.raises(LoftqError, match="quant_state"):
            output.read("a.b", {**stored, state: torch.tensor(list(text), dtype=torch.uint8)}, like)


def plan_of(jobs: list[dict[str, Any]], **overrides: Any) -> Any:
    """A plan of jobs that differ from a plain one, to be refused or not."""
    plain = {
        "module": "model.layers.0.q",
        "shape": (64, 128),
        "bits": 4,
        "group_size": 64,
        "quantizer": "uniform",
        "dtype": torch.bfloat16,
        "block": "model.layers.0",
        "transposed": False,
        "rank": RANK,
        "expert": None,
        "embedding": False,
        "wrapped": False,
    }
    named = [SimpleNamespace(**{**plain, **job}) for job in jobs]
    for job in named:
        job.tensor = f"{job.module}.weight"
    paths = dict.fromkeys(job.block.rpartition(".")[0] for job in named if job.block)
    fields: dict[str, Any] = {
        "jobs": tuple(named),
        "skipped_linears": ("lm_head",),
        "targets": SimpleNamespace(**{name: overrides.pop(name, value) for name, value in TARGETS.items()}),
        "block_paths": tuple(paths),
        "config": SimpleNamespace(double_quant=False, experts_adapter=False),
        "quantizes_head": False,
    }
    return SimpleNamespace(**{**fields, **overrides})


NF = {"quantizer": "nf"}
SYMMETRIC = {"quantizer": "uniform-symmetric"}
SECOND = "model.layers.1.q"


@pytest.mark.parametrize(
    ("name", "plan", "reason"),
    [
        ("bnb", plan_of([NF]), None),
        ("bnb", plan_of([{}]), "`uniform` at 4 bits"),
        ("bnb", plan_of([NF, {**NF, "module": SECOND, "bits": 2}]), f"{SECOND}.weight"),
        ("bnb", plan_of([{**NF, "group_size": 48}]), "not 48"),
        ("bnb", plan_of([{**NF, "dtype": torch.float64}]), "float64"),
        ("bnb", plan_of([NF], skipped_linears=("q",)), "`q` without leaving out `model.layers.0.q`"),
        ("bnb", plan_of([NF], skipped_linears=("model.layers.0",)), "`model.layers.0`"),
        ("bnb", plan_of([{**NF, "module": SECOND}], skipped_linears=("model.layers.11.q", "er.1.qq")), None),
        ("gptq", plan_of([{}]), None),
        ("gptq", plan_of([SYMMETRIC]), None),
        ("gptq", plan_of([{"group_size": -1, "bits": 2}]), None),
        ("gptq", plan_of([NF]), "`nf`"),
        ("gptq", plan_of([{}], architecture="BertForMaskedLM"), "BertForMaskedLM"),
        ("gptq", plan_of([{}], main_input_name="pixel_values"), "text models"),
        ("gptq", plan_of([{}], has_fused_experts=True), "experts"),
        ("gptq", plan_of([{}], linear_subclass="FalconLinear"), "FalconLinear"),
        ("gptq", plan_of([{"transposed": True}]), "`model.layers.0.q.weight` is transposed"),
        ("compressed-tensors", plan_of([{**SYMMETRIC, "transposed": True}]), "`Conv1D`"),
        ("bnb", plan_of([NF], linear_subclass="FalconLinear"), "FalconLinear"),
        ("gptq", plan_of([{"block": None}]), "`model.layers.0.q.weight` is in none"),
        ("gptq", plan_of([{}, {"block": "model.vision.3"}]), "`model.layers` and `model.vision`"),
        ("gptq", plan_of([{"block": "backbone.layers.0"}]), "backbone.layers"),
        ("gptq", plan_of([{}, {"module": SECOND, "bits": 2}]), f"not 4 (`model.layers.0.q.weight`) and 2 (`{SECOND}"),
        ("gptq", plan_of([{}, {"module": SECOND, "group_size": 32}]), "`group_size`"),
        ("gptq", plan_of([{"group_size": 48}]), "groups of 48"),
        ("gptq", plan_of([{"shape": (48, 128)}]), "48 and 128"),
        ("gptq", plan_of([{"shape": (64, 96)}]), "does not divide in_features 96"),
        ("gptq", plan_of([{"module": "layers.1.q"}], skipped_linears=("model.layers.1.q",)), "`model.layers.1.q`"),
        ("gptq", plan_of([{"module": "model.layers.1.q"}], skipped_linears=("model.layers.11.q",)), None),
        ("compressed-tensors", plan_of([SYMMETRIC]), None),
        ("compressed-tensors", plan_of([{}]), "not `uniform`"),
        ("compressed-tensors", plan_of([SYMMETRIC, {**SYMMETRIC, "module": SECOND, "bits": 2}]), SECOND),
        ("compressed-tensors", plan_of([{**SYMMETRIC, "shape": (64, 96)}]), "does not divide"),
        ("compressed-tensors", plan_of([SYMMETRIC], has_fused_experts=True), "experts"),
        ("packed", plan_of([{}, {**NF, "module": SECOND, "bits": 2}], has_fused_experts=True), None),
        ("packed", plan_of([{"shape": (3, 5), "group_size": 32}]), None),
        ("packed", plan_of([{**NF, "shape": (64, 96)}]), "span the rows of `model.layers.0.q.weight`"),
        ("packed", plan_of([{"bits": 5}]), "5 bits"),
        ("packed", plan_of([{"dtype": torch.float64}]), "float64"),
        ("dense", plan_of([NF, {"module": SECOND, "shape": (3, 5)}], has_fused_experts=True), None),
    ],
)
def test_why_not(name: str, plan: Any, reason: str | None) -> None:
    problem = FORMATS[name].why_not(plan)
    assert problem is None if reason is None else reason in (problem or "")


def test_bnb_refuses_exactly_the_names_that_transformers_would_confuse() -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    names = ["h", "lm_head", "h.1", "h.11", "h.1.q", "h.11.q", "h.1.q.x", "x.h.1.q", "h.1.qq", "h.1.fq", "hx1.q", "q"]
    for skip in names:
        for module in names:
            plan = plan_of([{**NF, "module": module}], skipped_linears=("nothing", skip))
            converts = should_convert_module(module, list(plan.skipped_linears))
            assert (bnb.why_not(plan) is None) == converts, (skip, module)


def test_every_format_has_what_the_protocol_says() -> None:
    assert list(FORMATS) == ["bnb", "gptq", "compressed-tensors", "packed", "dense"]
    assert set(AUTO_ORDER) <= set(FORMATS)
    for name, output in FORMATS.items():
        assert output.name == name
        assert set(output.quantizers) <= set(QUANTIZERS)
        assert all(isinstance(text, str) for text in (*output.requirements, *output.load_notes))


def test_configs_say_what_was_stored() -> None:
    gptq, ct = FORMATS["gptq"].quantization_config, FORMATS["compressed-tensors"].quantization_config
    for bits, backend in ((2, "auto_trainable"), (3, "auto_trainable"), (4, "torch"), (8, "auto_trainable")):
        config = gptq(plan_of([{"bits": bits}, {"bits": bits, "module": SECOND}]))
        assert config is not None
        assert (config["bits"], config["backend"], config["sym"]) == (bits, backend, False)
        assert config["checkpoint_format"] == "gptq_v2"
        assert config["block_name_to_quantize"] == "model.layers"
        assert "modules_in_block_to_quantize" not in config
    config = gptq(plan_of([{**SYMMETRIC, "group_size": -1}], skipped_linears=("model.layers.0.k", "lm_head")))
    assert config is not None
    assert (config["group_size"], config["sym"]) == (-1, True)
    assert config["modules_in_block_to_quantize"] == [["model.layers.0.q"]]
    for group_size, scheme in ((64, {"strategy": "group", "group_size": 64}), (-1, {"strategy": "channel"})):
        config = ct(plan_of([{**SYMMETRIC, "group_size": group_size}]))
        assert config is not None
        assert config["ignore"] == ["lm_head"]
        weights = config["config_groups"]["group_0"]["weights"]
        assert weights == {"num_bits": 4, "type": "int", "symmetric": True, "dynamic": False, **scheme}
    config = bnb.quantization_config(plan_of([NF, {**NF, "dtype": torch.float32}], skipped_linears=()))
    assert config is not None
    assert config["bnb_4bit_compute_dtype"] == "float32"
    assert config["llm_int8_skip_modules"] == []


def test_gptq_block_paths_are_those_of_optimum() -> None:
    pytest.importorskip("optimum")
    from optimum.gptq.constants import BLOCK_PATTERNS

    from loftq_cli.formats.gptq import BLOCK_PATHS

    assert list(BLOCK_PATHS) == BLOCK_PATTERNS


@pytest.mark.parametrize("compiler", [True, False], ids=["compiled", "without a compiler"])
def test_gptq_first_forward_in_a_fresh_process(compiler: bool, llama: Callable[..., Path], tmp_path: Path) -> None:
    """As a user meets it: compiled, or, as the load note says, with TORCHDYNAMO_DISABLE=1 where no compiler is."""
    need(CASES[4])
    if compiler and shutil.which("g++") is None:
        pytest.skip("needs g++")
    source = llama()
    original = load(source)
    kept = "model.layers.1.mlp.up_proj"  # one layer: a compilation takes seconds
    plan = plan_for(original, CASES[4], tuple(n for n, m in original.named_modules() if "proj" in n and n != kept))
    values = write(source, tmp_path, CASES[4], plan)
    with torch.no_grad():
        torch.save(with_values(source, values)(TOKENS).logits, tmp_path / "logits.pt")
    script = (
        "import torch, sys; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "with torch.no_grad(): logits = model(torch.arange(16)[None] * 7).logits\n"
        "assert torch.allclose(logits, torch.load(sys.argv[1] + '/logits.pt'), rtol=1e-5, atol=1e-5)\n"
    )
    if not compiler:
        empty = tmp_path / "empty"
        empty.mkdir()
    environment = dict(os.environ, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    environment |= {} if compiler else {"PATH": str(empty), "CXX": "", "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
