"""Odd sources of models with experts: what their files hold is taken for what it is, or refused before any work."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from loftq_cli import quantize
from loftq_cli.config import build_config
from loftq_cli.errors import LoftqError
from loftq_cli.experts import by_parameter, stacked
from loftq_cli.merge import merge
from loftq_cli.pipeline import plan_quantize
from loftq_cli.plan import Plan
from loftq_cli.quantizers import QUANTIZERS
from loftq_cli.quantizers.base import dequantize
from loftq_cli.runtime import PackedExperts, PackedLinear, PackedWrapper
from loftq_cli.verify import verify
from tests.conftest import WITHOUT_LOFTQ
from tests.test_eval import save_tokenizer
from tests.test_experts import SIZES, report_of
from tests.test_families import DECODER, QWEN_VL
from tests.test_resume import DRIVER, contents

OPTIONS: dict[str, Any] = {"bits": 3, "rank": 4, "group_size": 16, "iters": 1, "device": "cpu"}
FILE = "model.safetensors"
IDS = torch.arange(3, 19)[None]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four experts in each of two layers, one by one on disk."""
    folder = tmp_path_factory.mktemp("mixtral")
    torch.manual_seed(0)
    tf.MixtralForCausalLM(tf.MixtralConfig(**SIZES)).save_pretrained(folder)
    return folder


def changed(model: Path, folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """A copy of `model` in `folder`, with other tensors."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes((model / "config.json").read_bytes())
    tensors = load_file(model / FILE)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / FILE, {"format": "pt"})
    return folder


def planned(folder: Path, **options: Any) -> Plan:
    return plan_quantize(str(folder), build_config({**OPTIONS, **options}))


def adapted(made: Plan) -> dict[str, int]:
    """The rank that each module has."""
    return {job.module: job.rank for job in made.jobs}


# --- shapes and dtypes

EXPERT = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
REFUSED: dict[str, tuple[Callable[[dict[str, Tensor]], Any], list[str]]] = {
    "wider": (lambda t: t.update({EXPERT: torch.zeros(96, 65)}), [f"`{EXPERT}` in `{FILE}`", "[96, 65]", "[96, 64]"]),
    "transposed": (lambda t: t.update({EXPERT: t[EXPERT].T}), [f"`{EXPERT}`", "[64, 96]", "[96, 64]"]),
    "float64": (lambda t: t.update({EXPERT: t[EXPERT].double()}), [f"`{EXPERT}`", "float64", "float32", "store it as"]),
    "int8": (lambda t: t.update({EXPERT: t[EXPERT].to(torch.int8)}), [f"`{EXPERT}`", "int8", "float32"]),
    "missing": (lambda t: t.pop(EXPERT), [f"`{EXPERT}` is in none of the files"]),
    "a piece missing": (
        lambda t: [t.pop(name) for name in list(t) if ".1.block_sparse_moe" in name and ".w3." in name],
        ["`model.layers.1.block_sparse_moe.experts.0.w3.weight` is in none of the files"],
    ),
    "too many": (
        lambda t: t.update({EXPERT.replace("2.w3", f"4.{name}"): t[EXPERT] + 1 for name in ("w1", "w3")}),
        ["experts.4.w1.weight` in", "is of expert 4", "has 4"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_one_expert_that_is_unlike_the_others_is_refused(mixtral: Path, tmp_path: Path, case: str) -> None:
    """Else no expert of its layer would get bits, and nobody would be told."""
    change, words = REFUSED[case]
    with pytest.raises(LoftqError) as refused:
        quantize(changed(mixtral, tmp_path / "model", change), tmp_path / "out", **OPTIONS)
    said = f"{refused.value.message}\n{refused.value.hint}"
    assert not [word for word in words if word not in said], said
    assert not (tmp_path / "out").exists()


def test_experts_in_one_tensor_of_another_shape_are_refused(tmp_path: Path) -> None:
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    tf.Qwen3VLMoeForConditionalGeneration(tf.Qwen3VLMoeConfig(**QWEN_VL)).save_pretrained(tmp_path / "model")
    folder = changed(tmp_path / "model", tmp_path / "other", lambda t: t.update({name: t[name][:, :, 1:]}))
    with pytest.raises(LoftqError, match=rf"`{name}` in `{FILE}` has shape \[4, .*, the model .* describes \[4, "):
        planned(folder)


def test_experts_that_are_all_of_another_dtype_are_left_alone_and_why(mixtral: Path, tmp_path: Path) -> None:
    def widened(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: t.double() for name, t in tensors.items() if ".layers.1." in name and ".w" in name})

    made = planned(changed(mixtral, tmp_path / "model", widened))
    reasons = {why for name, why in made.skipped.items() if ".layers.1." in name and ".experts." in name}
    assert reasons == {"stored as float64"}
    assert any(".layers.0." in job.module and job.expert for job in made.jobs)


@pytest.mark.parametrize("format", ["packed", "dense"])
def test_experts_of_several_float_dtypes(mixtral: Path, tmp_path: Path, format: str) -> None:
    """Each matrix is quantized from the values, and to the dtype, that the file has it in."""

    def narrowed(tensors: dict[str, Tensor]) -> None:
        kinds = {"0.w1": torch.bfloat16, "1.w3": torch.float16, "2.w2": torch.bfloat16}
        for name in tensors:
            if "layers.1.block_sparse_moe.experts" in name:
                tensors[name] = tensors[name].to(kinds.get(name.removesuffix(".weight")[-4:], torch.float32))

    folder, out = changed(mixtral, tmp_path / "model", narrowed), tmp_path / "out"
    report = quantize(folder, out, format=format, **OPTIONS)
    assert len([row for row in report["weights"] if "expert" in row]) == 2 * 4 * 3
    assert verify(out, str(folder)).violations == ()
    source, loaded = load_file(folder / FILE), tf.AutoModelForCausalLM.from_pretrained(out)
    assert {row["dtype"] for row in report["weights"]} == {"float32", "bfloat16", "float16"}
    halves = {
        "w1": ("gate_up_proj", slice(96)),
        "w3": ("gate_up_proj", slice(96, None)),
        "w2": ("down_proj", slice(None)),
    }
    for row in report["weights"]:
        if "expert" not in row:
            continue
        path, number, piece = row["name"].rsplit(".", 2)
        W, (parameter, half) = source[row["tensor"]], halves[piece]
        quantizer = QUANTIZERS[report["config"]["quantizer"]](bits=3, group_size=16, dtype=W.dtype)
        experts = loaded.get_submodule(path)
        stack = (
            experts.dequantize(parameter, torch.float32)
            if isinstance(experts, PackedExperts)
            else getattr(experts, parameter)
        )
        wanted = dequantize(quantizer.quantize(W.float()))
        # the packed layer multiplies in float32 whatever the file's dtype
        rounding = 0 if format == "dense" else 2**-8
        assert torch.allclose(stack[int(number)][half], wanted, atol=0, rtol=rounding), row["name"]
    assert loaded(torch.arange(3, 19)[None]).logits.isfinite().all()


def test_a_parameter_of_several_dtypes_is_put_together_without_rounding(mixtral: Path) -> None:
    """As the block loop of calibrated methods does it."""
    slots = by_parameter(planned(mixtral).targets.experts)["model.layers.0.mlp.experts.gate_up_proj"]
    torch.manual_seed(0)
    values = {tensor: torch.randn(96, 64) for tensor in slots}
    first = next(iter(slots))
    values[first] = values[first].bfloat16()
    whole = stacked(slots, values.__getitem__)
    for tensor, slot in slots.items():
        half = slice(96) if slot.piece == "w1" else slice(96, None)
        assert torch.equal(whole[slot.expert][half], values[tensor].float())


# --- layers beside the experts

DEEPSEEK: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16, "v_head_dim": 16, "n_group": 1, "topk_group": 1,
}  # fmt: skip


def saved(model: Any, folder: Path) -> Path:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return saved(tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**DEEPSEEK)), tmp_path_factory.mktemp("deepseek"))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of its own kind: PEFT leaves the names of its layers alone, and so do we."""
    sizes = {
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
        "mlp_only_layers": [0],
    }
    torch.manual_seed(0)
    model = tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(**{**DECODER, **sizes}))
    return saved(model, tmp_path_factory.mktemp("qwen"))


def attach(out: Path) -> Any:
    base = tf.AutoModelForCausalLM.from_pretrained(out)
    return PeftModel.from_pretrained(base, out, subfolder="loftq_init", is_trainable=True)


def layers_with_adapter(model: Any) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    found = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    return {name.removeprefix("base_model.model.").removesuffix(".packed"): module for name, module in found.items()}


@pytest.fixture(scope="module")
def afmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its attention has a `gate_proj`, too."""
    sizes = {"num_experts": 4, "num_shared_experts": 1, "num_dense_layers": 1, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    model = tf.AfmoeForCausalLM(tf.AfmoeConfig(**{**DECODER, **sizes}))
    return saved(model, tmp_path_factory.mktemp("afmoe"))


@pytest.fixture(scope="module")
def ernie(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its layers have biases."""
    sizes = {"moe_intermediate_size": 32, "moe_k": 2, "moe_num_experts": 4, "moe_num_shared_experts": 1}
    torch.manual_seed(0)
    config = tf.Ernie4_5_MoeConfig(**{**DECODER, **sizes, "moe_layer_start_index": 1, "use_bias": True})
    return saved(tf.Ernie4_5_MoeForCausalLM(config), tmp_path_factory.mktemp("ernie"))


def beside(model: Path) -> list[str]:
    """Layers whose last names PEFT would rewrite to parameters of experts."""
    shared = "shared_expert" if model.name.startswith("qwen") else "shared_experts"
    gates = [f"model.layers.{layer}.self_attn.gate_proj" for layer in (0, 1) if model.name.startswith("afmoe")]
    return gates + [
        f"model.layers.{mlp}.{name}_proj" for mlp in ("0.mlp", f"1.mlp.{shared}") for name in ("down", "gate", "up")
    ]


def check_adapted(model: Path, out: Path, dest: Path) -> Any:
    """What PEFT adds to the layers beside experts is what the report says, trains, and merges; returns its model."""
    rows = {row["name"]: row for row in report_of(out)["weights"]}
    assert verify(out, str(model)).violations == ()
    adapted, source = attach(out).train(), tf.AutoModelForCausalLM.from_pretrained(model)
    found = layers_with_adapter(adapted)
    for name in beside(model):
        assert rows[name]["rank"] == 4
        W = source.get_submodule(name).weight.double()
        layer = found[name]
        rest = W - layer.get_base_layer().weight.double() - layer.get_delta_weight("default").double()
        assert (rest.norm() / W.norm()).item() == pytest.approx(rows[name]["relative_error"], rel=1e-4), name
        assert rows[name]["relative_error"] < 0.99 * rows[name]["relative_error_without_adapter"]
    said = adapted(IDS).logits
    said.square().mean().backward()
    trained = [p.grad for name, p in adapted.named_parameters() if "lora_" in name]
    assert len(trained) >= 2 * len(found)
    assert all(grad is not None and grad.any() for grad in trained)
    merge(out, dest)
    merged = tf.AutoModelForCausalLM.from_pretrained(dest)(IDS).logits
    assert torch.allclose(said, merged, atol=1e-5 * merged.abs().max().item())
    return adapted


def test_shared_experts_and_dense_layers_get_bits(deepseek: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {**OPTIONS, "format": "bnb", "bits": 4, "group_size": 32}
    made = planned(deepseek, **options)
    ranks = adapted(made)
    assert {name: ranks.get(name) for name in beside(deepseek)} == dict.fromkeys(beside(deepseek), 0)
    assert {rank for name, rank in ranks.items() if ".self_attn." in name} == {4}
    assert not [name for name, why in made.skipped.items() if "PEFT" in why]
    (note,) = (note for note in made.notes if "6 weights of other layers" in note)
    assert "PEFT would put it on the experts: `--format packed` and `dense` give them one" in note
    pytest.importorskip("bitsandbytes")
    out = tmp_path / "out"
    report = quantize(deepseek, out, **options)
    assert verify(out, str(deepseek)).violations == ()
    assert "6 weights of other layers have no adapter" in (out / "README.md").read_text()
    model = attach(out).train()
    assert layers_with_adapter(model).keys() == {row["name"] for row in report["weights"] if row["rank"]}
    model(torch.arange(3, 19)[None]).logits.square().mean().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("format", ["packed", "dense"])
@pytest.mark.parametrize("family", ["deepseek", "qwen", "afmoe", "ernie"])
def test_in_packed_and_dense_they_have_an_adapter(
    family: str, format: str, rslora: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model, out = request.getfixturevalue(family), tmp_path / "out"
    report = quantize(model, out, format=format, rslora=rslora, alpha=8, **OPTIONS)
    adapted = check_adapted(model, out, tmp_path / "merged")
    assert layers_with_adapter(adapted).keys() == {row["name"] for row in report["weights"] if row["rank"]}
    assert all(("expert" in row) == (row["rank"] == 0) for row in report["weights"])
    wrapped = {row["name"] for row in report["weights"] if "wrapped" in row}
    assert wrapped == ({*beside(model)} if format == "packed" and family != "qwen" else set())
    told = "have their bits, and no adapter; all other weights have one"
    assert told in (out / "README.md").read_text()
    assert not [note for note in planned(model, format=format).notes if "other layers" in note]
    as_parameters = format == "dense" and family != "qwen"
    assert {type(layers_with_adapter(adapted)[name]).__name__ for name in beside(model)} == {
        "ParamWrapper" if as_parameters else "Linear"
    }
    assert ("no `lora_dropout`" in (out / "README.md").read_text()) == as_parameters


def test_auto_comes_to_a_format_that_has_it(deepseek: Path, without_experts: Path) -> None:
    for model, skip, format in (
        (deepseek, (), "packed"),
        (deepseek, ("*.experts.0.*",), "dense"),  # `packed` has all experts of a layer or none
        (deepseek, ("*.experts.*",), "packed"),
        (without_experts, (), "packed"),
    ):
        made = planned(model, skip=skip, bits=4, group_size=32)
        assert made.config.format == format
        names = [f"model.layers.0.mlp.{name}_proj" for name in ("down", "gate", "up")]
        assert {adapted(made)[name] for name in names} == {4}
        stored = {spec.name for spec in made.adapter_layout}
        inside = ".packed" * (format == "packed")
        assert {f"base_model.model.{name}{inside}.lora_B.weight" for name in names} <= stored
    why = "not `bnb`: PEFT would put the adapter of `model.layers.0.mlp.down_proj` on the experts"
    assert any(why in note for note in made.notes)
    assert adapted(planned(without_experts, bits=4, group_size=32, format="bnb"))[names[0]] == 0


def test_a_rank_above_a_side_of_theirs_is_refused_where_they_have_one(deepseek: Path) -> None:
    options: dict[str, Any] = {"rank": 33, "skip": ("*kv_*", "*.q_*"), "bits": 4, "group_size": 32}
    assert planned(deepseek, format="bnb", **options)
    for format in ("packed", "dense", "auto"):
        with pytest.raises(LoftqError, match=r"`--rank 33` is above .*shared_experts"):
            planned(deepseek, format=format, **options)


@pytest.mark.parametrize("format", ["packed", "dense"])
def test_they_may_be_all_that_has_one(deepseek: Path, tmp_path: Path, format: str) -> None:
    quantize(deepseek, tmp_path / "out", format=format, skip=("*.self_attn.*",), **OPTIONS)
    assert layers_with_adapter(check_adapted(deepseek, tmp_path / "out", tmp_path / "merged")).keys() == {
        *beside(deepseek)
    }


def test_with_an_adapter_on_experts_they_have_one_too(deepseek: Path, tmp_path: Path) -> None:
    quantize(deepseek, tmp_path / "out", experts_adapter=True, **OPTIONS)
    check_adapted(deepseek, tmp_path / "out", tmp_path / "merged")


# --- in `packed` they are wrapped, so that PEFT has another name for them


@pytest.fixture(scope="module")
def wrapped(deepseek: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wrapped") / "out"
    quantize(deepseek, out, format="packed", **OPTIONS)
    return out


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(IDS).logits
    return found


def near(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


def kinds(model: Any, deepseek: Path) -> set[type]:
    return {type(model.get_submodule(name)) for name in beside(deepseek)}


def test_a_wrapped_layer_is_a_module_of_its_own(deepseek: Path, wrapped: Path) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(wrapped)
    assert kinds(model, deepseek) == {PackedWrapper}
    inside = {name for name, layer in model.named_modules() if isinstance(layer, PackedLinear) and "mlp" in name}
    assert inside == {f"{name}.packed" for name in beside(deepseek)}
    named = json.loads((wrapped / "config.json").read_text())["quantization_config"]["schemes"]
    assert inside <= {name for scheme in named for name in scheme["modules"]}
    targets = json.loads((wrapped / "loftq_init/adapter_config.json").read_text())["target_modules"]
    assert {name for name in targets if "packed" in name} == {f"{n}_proj.packed" for n in ("gate", "up", "down")}
    body = tf.AutoModel.from_pretrained(wrapped)  # whose names have no `model.`
    assert near(body(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


def test_wrapped_layers_are_saved_as_they_were(deepseek: Path, wrapped: Path, tmp_path: Path) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(wrapped)
    model.save_pretrained(tmp_path)
    ours, theirs = load_file(wrapped / FILE), load_file(tmp_path / FILE)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert kinds(again, deepseek) == {PackedWrapper}
    assert near(logits(again), logits(model))


def test_a_wrapper_keeps_the_bias(ernie: Path, tmp_path: Path) -> None:
    quantize(ernie, tmp_path / "out", format="packed", **OPTIONS)
    names = {f"{name}.bias" for name in beside(ernie)}
    source, ours = load_file(ernie / FILE), load_file(tmp_path / "out" / FILE)
    assert all(torch.equal(ours[name], source[name]) for name in names)
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    wanted = logits(model)
    model.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / FILE).keys() == ours.keys()
    plain = model.dequantize()
    assert kinds(plain, ernie) == {torch.nn.Linear}
    assert all(torch.equal(plain.get_parameter(name), source[name]) for name in names)
    assert near(logits(plain), wanted)


@pytest.mark.parametrize("how", ["dequantize", "merge", "merge safely", "merge with hooks", "assign"])
def test_a_wrapped_layer_made_dense_is_a_plain_one(deepseek: Path, wrapped: Path, tmp_path: Path, how: str) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(wrapped)
    if how == "merge with hooks":
        model = pytest.importorskip("accelerate").dispatch_model(model, {"": "cpu"}, force_hooks=True)
    adapted = PeftModel.from_pretrained(model, wrapped, subfolder="loftq_init") if how.startswith("merge") else model
    wanted = logits(adapted)
    if how == "assign":
        for name in beside(deepseek):
            layer = model.get_submodule(name).packed
            layer.weight = layer.weight.clone()
        plain = model
    else:
        plain = adapted.merge_and_unload(safe_merge="safely" in how) if adapted is not model else model.dequantize()
        assert kinds(plain, deepseek) == {torch.nn.Linear}
    assert near(logits(plain), wanted)
    plain.save_pretrained(tmp_path)
    assert kinds(plain, deepseek) == {torch.nn.Linear}
    stored = load_file(tmp_path / FILE)
    assert {f"{name}.weight" for name in beside(deepseek)} <= stored.keys()
    assert not [name for name in stored if ".packed" in name]
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert kinds(again, deepseek) == {torch.nn.Linear}
    assert near(logits(again), logits(plain))


def test_an_adapter_of_wrapped_layers_is_unloaded_saved_and_reloaded(
    deepseek: Path, wrapped: Path, tmp_path: Path
) -> None:
    model = attach(wrapped)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-1)
    trained = logits(model)
    model.save_pretrained(tmp_path)
    base = model.unload()
    assert kinds(base, deepseek) == {PackedWrapper}
    assert not near(logits(base), trained, 1e-2)
    assert near(logits(PeftModel.from_pretrained(base, tmp_path)), trained)


def test_wrapped_layers_load_where_loftq_is_not_installed(wrapped: Path, tmp_path: Path) -> None:
    script = (
        WITHOUT_LOFTQ
        + """from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
model = PeftModel.from_pretrained(base, sys.argv[1], subfolder="loftq_init").eval()
with torch.no_grad():
    torch.save(model(torch.arange(3, 19)[None]).logits, sys.argv[2] + "/logits.pt")
"""
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(wrapped), str(tmp_path)],
        env={"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert near(torch.load(tmp_path / "logits.pt"), logits(attach(wrapped)))


def test_wrapped_layers_survive_a_kill(deepseek: Path, wrapped: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "format": "packed"}
    points = [
        (str(tmp_path / f"{where}{nth}"), where, nth, "after", 0)
        for where, nth in (("ShardWriter.write", 40), ("Journal.commit", 6))
    ]
    driver = [sys.executable, "-c", DRIVER, str(deepseek), json.dumps(points), json.dumps(options)]
    assert subprocess.check_output(driver, text=True).split() == [str(int(signal.SIGKILL))] * len(points)
    for out, *_ in points:
        quantize(deepseek, out, resume=True, **options)
        actual, named = contents(Path(out)), "loftq_init/adapter_config.json"
        actual[named] = actual[named].replace(out.encode(), str(wrapped).encode())
        assert actual == contents(wrapped)


# --- text


@pytest.fixture(scope="module")
def without_experts(deepseek: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with dense layers only, of which PEFT says the same."""
    folder = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**{**DEEPSEEK, "first_k_dense_replace": 2})).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


CALIBRATED: dict[str, dict[str, Any]] = {
    "cloq": {"method": "cloq"},
    "apiq-bw": {"method": "apiq-bw", "epochs": 1},
    "apiq-lw": {"method": "apiq-lw", "epochs": 1},
    "cloq, with a finish": {"method": "cloq", "finish_epochs": 1},
}


@pytest.mark.parametrize("format", ["packed", "dense", "bnb"])
@pytest.mark.parametrize("how", CALIBRATED.values(), ids=CALIBRATED)
def test_calibrated_methods_round_them_to_text(
    deepseek: Path, without_experts: Path, tmp_path: Path, how: dict[str, Any], format: str
) -> None:
    (tmp_path / "text.txt").write_text(" ".join(f"w{i * i % 89}" for i in range(900)))
    out, model = tmp_path / "out", without_experts if "finish_epochs" in how else deepseek
    text = {"calibration": str(tmp_path / "text.txt"), "samples": 4, "seqlen": 32, "format": format}
    options = {**OPTIONS, **text, **({"bits": 4, "group_size": 32} if format == "bnb" else {})}
    report = quantize(model, out, **options, **how)
    assert verify(out, str(model)).violations == ()
    rows = {row["name"]: row for row in report["weights"]}
    names = beside(model)[:3] if model == without_experts else beside(model)
    rank = 0 if format == "bnb" else 4
    assert all(rows[name]["rank"] == rank and rows[name]["output_error"] > 0 for name in names)
    assert {row["rank"] for name, row in rows.items() if ".self_attn." in name} == {4}
    if how == {"method": "cloq"} and rank == 0:
        plain_options = {key: value for key, value in options.items() if key != "iters"}
        quantize(model, tmp_path / "plain", **{**plain_options, "method": "qera"})  # which rounds to nearest
        plain = {row["name"]: row for row in report_of(tmp_path / "plain")["weights"]}
        assert all(rows[name]["output_error"] < 0.95 * plain[name]["output_error"] for name in names)


def test_a_plan_without_any_adapter_is_refused(deepseek: Path) -> None:
    options: dict[str, Any] = {"bits": 4, "group_size": 32}
    with pytest.raises(LoftqError, match="no adapter is left: PEFT") as refused:
        planned(deepseek, skip=("*.self_attn.*",), format="bnb", **options)
    assert "--skip" in refused.value.hint
    assert "`--format packed` or `dense`" in refused.value.hint
    with pytest.raises(LoftqError, match="no adapter is left: experts") as refused:
        planned(deepseek, skip=("*.self_attn.*", "*.shared_experts.*", "*.0.mlp.*"))
    assert "--format" not in refused.value.hint


def test_a_layer_more_than_transformers_has_is_kept_as_it_is(deepseek: Path, tmp_path: Path) -> None:
    """DeepSeek's, which predicts one token more: others load it."""

    def longer(tensors: dict[str, Tensor]) -> None:
        more = {name.replace(".1.", ".2.", 1): t for name, t in tensors.items() if name.startswith("model.layers.1.")}
        tensors.update({name: t + 1 for name, t in more.items()} | {"model.layers.2.eh_proj.weight": torch.ones(8, 4)})

    folder, out = changed(deepseek, tmp_path / "model", longer), tmp_path / "out"
    report = quantize(folder, out, format="packed", **OPTIONS)
    reasons = {row["name"]: row["reason"] for row in report["skipped"] if ".layers.2." in row["name"]}
    source, stored = load_file(folder / FILE), load_file(out / FILE)
    assert reasons.keys() == {name for name in source if ".layers.2." in name}
    assert set(reasons.values()) == {"not a weight of this architecture: copied, and left out by transformers"}
    assert all(torch.equal(stored[name], source[name]) for name in reasons)
    assert verify(out, str(folder)).violations == ()
    base = tf.AutoModelForCausalLM.from_pretrained(out)
    assert base(torch.arange(3, 19)[None]).logits.isfinite().all()


def test_experts_that_no_packed_layer_stands_for_go_to_dense_and_why(tmp_path: Path) -> None:
    """Those of Llama 4 see each token times its weight, once for every expert."""
    sizes = {key: value for key, value in SIZES.items() if key != "num_experts_per_tok"}
    tf.Llama4ForCausalLM(tf.Llama4TextConfig(**sizes, intermediate_size_mlp=96)).save_pretrained(tmp_path)
    made = planned(tmp_path, bits=4)
    assert made.config.format == "dense"
    (why,) = (note for note in made.notes if note.startswith("format `dense`"))
    assert "not `packed`: it has no layer for the experts of `model.layers." in why


ROUTED: dict[str, tuple[Any, dict[str, Any], str]] = {  # names and sizes of their own
    "hunyuan": (
        tf.HunYuanMoEV1Config,
        {"num_experts": 4, "moe_topk": 2, "head_dim": 16},
        "model.layers.0.mlp.gate.wg",
    ),
    "longcat": (
        tf.LongcatFlashConfig,
        {
            "n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2, "expert_ffn_hidden_size": 32,
            "ffn_hidden_size": 64, "q_lora_rank": 16, "kv_lora_rank": 16,
            "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
            "head_dim": 16, "num_layers": 1,
        },
        "model.layers.0.mlp.router.classifier",
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", ROUTED)
def test_a_router_is_known_whatever_its_name_and_size(family: str, tmp_path: Path) -> None:
    kind, sizes, router = ROUTED[family]
    config = kind(**{**DECODER, **sizes})
    torch.manual_seed(0)
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    made = plan_quantize(str(tmp_path / "model"), build_config({"bits": 4, "format": "dense", "device": "cpu"}))
    assert made.skipped[f"{router}.weight"] == "router"
    assert not any(job.module == router for job in made.jobs)


def test_what_loaders_leave_in_float32_is_left_alone(tmp_path: Path) -> None:
    """The indexer's `weights_proj`: bitsandbytes's loader never quantizes it, and would find what it does not know."""
    source, out = tmp_path / "source", tmp_path / "out"
    sizes = {"first_k_dense_replace": 2, "index_n_heads": 8, "index_head_dim": 32, "index_topk": 8}
    torch.manual_seed(0)
    saved(tf.DeepseekV32ForCausalLM(tf.DeepseekV32Config(**{**DEEPSEEK, **sizes})), source)
    report = quantize(source, out, bits=4, rank=4, quantizer="nf", group_size=64, format="bnb")
    kept = "model.layers.0.self_attn.indexer.weights_proj.weight"
    reasons = {row["name"]: row["reason"] for row in report["skipped"]}
    assert reasons[kept] == "transformers keeps `indexer.weights_proj` in float32"
    base = tf.AutoModelForCausalLM.from_pretrained(out)
    assert type(base.get_submodule(kept.removesuffix(".weight"))) is torch.nn.Linear
    assert type(base.model.layers[0].self_attn.indexer.wk).__name__ == "Linear4bit"
    tuned = PeftModel.from_pretrained(base, out / "loftq_init").train()  # without what bitsandbytes repacks for a CPU
    assert tuned(torch.arange(12)[None]).logits.isfinite().all()
