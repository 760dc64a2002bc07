"""Experts: each one's matrices get bits, on disk and packed in memory, in models that hold them in one parameter."""

from __future__ import annotations

import copy
import json
import math
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from loftq_cli import memory, pipeline, plan, quantize
from loftq_cli.errors import LoftqError
from loftq_cli.merge import merge
from loftq_cli.methods import METHODS, seed_for
from loftq_cli.quantizers import QUANTIZERS
from loftq_cli.quantizers.base import dequantize
from loftq_cli.runtime import PackedExperts
from loftq_cli.verify import verify
from loftq_cli.windows import prepare
from tests.conftest import WITHOUT_LOFTQ
from tests.test_eval import save_tokenizer
from tests.test_families import QWEN_VL
from tests.test_resume import DRIVER, contents, without_times

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16,
}  # fmt: skip
MODELS = {
    "one by one": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**SIZES)),
    "all in one": lambda: tf.GptOssForCausalLM(tf.GptOssConfig(**SIZES)),  # transposed, with biases
}
OPTIONS = {
    "bits": 3, "bits_for": {"*.experts.1.*": 2, "*.self_attn.*": 4}, "quantizer": "lloyd", "double_quant": True,
    "group_size": 32, "rank": 4, "iters": 2, "alpha": 6.0, "device": "cpu",
}  # fmt: skip
TOKENS = torch.arange(3, 19)[None]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with weights of a usual size, quantized with the same options as `packed` and as `dense`."""
    folder = tmp_path_factory.mktemp("experts")
    torch.manual_seed(0)
    model = MODELS[request.param]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    model.save_pretrained(folder / "model")
    save_tokenizer(folder / "model")
    for format in ("packed", "dense"):
        quantize(folder / "model", folder / format, format=format, **OPTIONS)
    return folder


def load(folder: Path, **arguments: Any) -> Any:
    return tf.AutoModelForCausalLM.from_pretrained(folder, **arguments)


def packed_modules(model: Any) -> dict[str, PackedExperts]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedExperts)}


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return float((a - b).norm()) <= tolerance * float(b.norm())


def report_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "loftq_report.json").read_text())
    return found


def expert_rows(out: Path) -> list[dict[str, Any]]:
    return [row for row in report_of(out)["weights"] if "expert" in row]


def is_one_by_one(folder: Path) -> bool:
    return any(".experts.0." in name for name in load_file(folder / "model/model.safetensors"))


# --- what is stored


def test_each_matrix_is_what_its_quantizer_makes_of_it_alone(folder: Path) -> None:
    source, dense = load(folder / "model"), load(folder / "dense")
    ours, theirs = (load_file(folder / name / "model.safetensors") for name in ("dense", "model"))
    assert {name: (t.dtype, t.shape) for name, t in ours.items()} == {n: (t.dtype, t.shape) for n, t in theirs.items()}
    seen = 0
    for row in expert_rows(folder / "dense"):
        assert row["rank"] == 0
        assert row["bits"] == (2 if row["expert"] == 1 else 3)
        path, _, piece = row["name"].rpartition(".")
        module, name = path.rpartition(".")[0], {"w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"}
        half = {"w1": slice(None, 96), "w3": slice(96, None)}.get(piece, slice(None))
        W, Q = (
            model.get_submodule(module).get_parameter(name.get(piece, piece))[row["expert"]]
            for model in (source, dense)
        )
        W, Q = (M.mT if row.get("transposed") else M[half] for M in (W, Q))
        quantizer = QUANTIZERS["lloyd"](bits=row["bits"], group_size=32, double_quant=True)
        wanted = dequantize(quantizer.quantize(W.detach().contiguous()))
        assert torch.equal(Q, wanted), row["name"]
        error = ((W.double() - Q.double()).norm() / W.double().norm()).item()
        assert row["relative_error"] == pytest.approx(error, rel=1e-5) == row["relative_error_without_adapter"]
        seen += Q.numel()
    assert seen == sum(p.numel() for n, p in source.named_parameters() if ".experts." in n and p.ndim == 3)


@pytest.mark.parametrize("format", ["packed", "dense"])
def test_experts_that_transformers_turns_while_loading(tmp_path: Path, format: str) -> None:
    """As the published files of Qwen3-VL-MoE have them: [experts, n, m] on disk, [experts, m, n] in memory."""
    torch.manual_seed(0)
    model = tf.Qwen3VLMoeForConditionalGeneration(tf.Qwen3VLMoeConfig(**QWEN_VL))
    model.save_pretrained(tmp_path / "model")
    tensors = load_file(tmp_path / "model/model.safetensors")
    turned = {name: t.mT.contiguous() if name.endswith("experts.gate_up_proj") else t for name, t in tensors.items()}
    save_file(turned, tmp_path / "model/model.safetensors", {"format": "pt"})
    report = quantize(tmp_path / "model", tmp_path / "out", format=format, bits=3, rank=4, group_size=16, device="cpu")
    assert verify(tmp_path / "out", str(tmp_path / "model")).violations == ()
    loaded = type(model).from_pretrained(tmp_path / "out")
    quantizer = QUANTIZERS[report["config"]["quantizer"]](bits=3, group_size=16)
    rows = [row for row in report["weights"] if "expert" in row]
    assert {row.get("transposed") for row in rows if "gate_up" in row["name"]} == {True}
    for row in rows:
        path, number, parameter = row["name"].rsplit(".", 2)
        W, experts = model.get_submodule(path).get_parameter(parameter)[int(number)], loaded.get_submodule(path)
        packed = isinstance(experts, PackedExperts)
        assert packed == (format == "packed")
        stack = experts.dequantize(parameter, torch.float32) if packed else getattr(experts, parameter)
        assert torch.equal(stack[int(number)], dequantize(quantizer.quantize(W.detach())))


def test_batches_give_what_weights_give_one_by_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**OPTIONS, "double_quant": False, "bits_for": {}, "format": "packed"}
    quantize(folder / "model", tmp_path / "batches", **options)
    made = pipeline.plan_quantize(str(folder / "model"), pipeline.build_config(options))
    assert any(len(step.jobs) >= 8 for step in made.shards[0].steps if isinstance(step, plan.WeightBatch))
    monkeypatch.setitem(plan.BATCH_ELEMENTS, "cpu", 1)
    quantize(folder / "model", tmp_path / "alone", **options)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("batches", "alone"))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_the_report_and_the_card_say_that_experts_have_no_adapter(folder: Path) -> None:
    rows = expert_rows(folder / "packed")
    assert (
        f"{len(rows)} weights of experts have their bits, and no adapter" in (folder / "packed/README.md").read_text()
    )
    assert not any(".experts." in name for name in load_file(folder / "packed/loftq_init/adapter_model.safetensors"))
    made = pipeline.plan_quantize(str(folder / "model"), pipeline.build_config(OPTIONS))
    assert made.config.format == "packed"
    assert any(note.startswith("experts: ") and "no adapter" in note for note in made.notes)


# --- packed in memory


def test_packed_experts_say_what_dense_ones_say(folder: Path) -> None:
    packed, dense = load(folder / "packed"), load(folder / "dense")
    modules = packed_modules(packed)
    assert len(modules) == 2
    for name, module in modules.items():
        other = dense.get_submodule(name)
        assert type(other) in type(module).__mro__
        torch.manual_seed(1)
        chosen = torch.stack([torch.randperm(4)[:2] for _ in range(9)])
        chosen[chosen == 2] = 3  # an expert that nobody chose; and one that is chosen twice by a token
        x, weights = torch.randn(9, 64), torch.rand(9, 2)
        results = []
        for experts in (module, other):
            entering = [value.clone().requires_grad_() for value in (x, weights)]
            out = experts(entering[0], chosen, entering[1])
            (out * torch.arange(64)).sum().backward()
            results.append((out, *(value.grad for value in entering)))
        assert all(close(one, two) for one, two in zip(*results, strict=True))
        for parameter in ("gate_up_proj", "down_proj"):
            assert torch.equal(module.dequantize(parameter, torch.float32), getattr(other, parameter))
    assert close(packed(TOKENS).logits, dense(TOKENS).logits)


def test_no_dense_matrix_is_kept_for_backward(folder: Path) -> None:
    module = next(iter(packed_modules(load(folder / "packed")).values()))
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    x = torch.randn(9, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(x, torch.tensor([[0, 1]] * 9), torch.rand(9, 2)).sum().backward()
    assert kept
    assert max(kept) < 64 * 96  # one matrix of one expert


def test_memory_is_that_of_the_file_and_casts_leave_it_alone(folder: Path) -> None:
    model = load(folder / "packed")
    assert model.get_memory_footprint() <= 1.02 * (folder / "packed/model.safetensors").stat().st_size
    half = model.to(torch.bfloat16)
    assert next(iter(packed_modules(half).values())).compute_dtype == torch.bfloat16
    assert not any(buffer.dtype == torch.bfloat16 for name, buffer in half.named_buffers() if ".experts." in name)
    with torch.no_grad():
        assert close(half(TOKENS).logits.float(), load(folder / "packed")(TOKENS).logits, 5e-2)


def test_an_adapter_trains_on_packed_experts_with_checkpointing(folder: Path) -> None:
    from peft import PeftModel

    gradients = []
    for format, checkpointing in (("packed", True), ("packed", False), ("dense", False)):
        base = load(folder / format)
        model = PeftModel.from_pretrained(base, folder / "packed", subfolder="loftq_init", is_trainable=True).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model(TOKENS, labels=TOKENS).loss.backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert all(grad is not None and grad.any() for name, grad in found.items() if "lora_A" in name)
        gradients.append(torch.cat([grad.flatten() for grad in found.values()]))
    assert all(close(gradient, gradients[-1], 1e-4) for gradient in gradients[:-1])


def test_saved_copied_and_made_dense(folder: Path, tmp_path: Path) -> None:
    model = load(folder / "packed", device_map="auto")
    wanted = model(TOKENS).logits
    assert torch.equal(copy.deepcopy(model)(TOKENS).logits, wanted)
    assert torch.equal(pickle.loads(pickle.dumps(model))(TOKENS).logits, wanted)
    model.save_pretrained(tmp_path / "saved")
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder / "packed", tmp_path / "saved"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    again = load(tmp_path / "saved")
    assert torch.equal(again(TOKENS).logits, wanted)
    plain = again.dequantize()
    assert not packed_modules(plain)
    assert close(plain(TOKENS).logits, wanted)
    plain.save_pretrained(tmp_path / "plain")
    assert torch.equal(load(tmp_path / "plain")(TOKENS).logits, load(folder / "dense")(TOKENS).logits)


def test_remote_code_loads_packed_experts(folder: Path, tmp_path: Path) -> None:
    if not is_one_by_one(folder):
        pytest.skip("the code is the same, and takes seconds to import")
    script = (
        WITHOUT_LOFTQ
        + """from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
torch.save(model(torch.arange(3, 19)[None]).logits.detach(), sys.argv[2] + "/logits.pt")
"""
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder / "packed"), str(tmp_path)],
        env={"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.equal(torch.load(tmp_path / "logits.pt"), load(folder / "packed")(TOKENS).logits)


def test_a_tensor_that_is_missing_is_no_silence(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "packed/config.json").read_bytes())
    tensors = load_file(folder / "packed/model.safetensors")
    lost = next(name for name in tensors if ".experts.2." in name and name.endswith("_codes"))
    save_file({k: v for k, v in tensors.items() if k != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"experts\.2\.\w+_codes"):
        load(tmp_path)


# --- verify, merge, resume


@pytest.mark.parametrize("format", ["packed", "dense"])
def test_verify_recomputes_and_names_a_changed_expert(folder: Path, tmp_path: Path, format: str) -> None:
    out, source = folder / format, folder / "model"
    verdict = verify(out, str(source))
    assert verdict.violations == ()
    assert verdict.weights == len(report_of(out)["weights"])
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in out.rglob("*"):
        if path.is_file():
            (changed / path.relative_to(out)).parent.mkdir(exist_ok=True)
            (changed / path.relative_to(out)).write_bytes(path.read_bytes())
    tensors = load_file(out / "model.safetensors")
    row = next(row for row in expert_rows(out) if row["expert"] == 2)
    name = next(iter(row["sha256"]))
    whole, bracket, _ = name.partition("[")
    (tensors[whole][2] if bracket else tensors[whole]).view(-1)[7] += 1
    save_file(tensors, changed / "model.safetensors", {"format": "pt"})
    violations = verify(changed).violations
    assert [text for text in violations if f"`{row['tensor']}`" in text]
    assert len([text for text in violations if "is not what was written" in text]) == 1
    with pytest.raises(LoftqError, match="is not what was written"):
        merge(changed, tmp_path / "never")


def test_verify_recomputes_errors_of_experts(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "model"
    load(folder / "model").save_pretrained(other)
    tensors = load_file(other / "model.safetensors")
    name = next(name for name in tensors if ".experts." in name and tensors[name].ndim >= 2 and "bias" not in name)
    (tensors[name][1] if tensors[name].ndim == 3 else tensors[name]).mul_(1.5)
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    violations = verify(folder / "dense", str(other)).violations
    wanted = f"`{name}[1]`: relative_error" if tensors[name].ndim == 3 else f"`{name}`: relative_error"
    assert any(wanted in text for text in violations)
    assert all("not the checkpoint" in text or wanted in text for text in violations)


def test_merge_gives_the_sources_files_with_quantized_experts(folder: Path, tmp_path: Path) -> None:
    results = []
    for format in ("packed", "dense"):
        merge(folder / format, tmp_path / format)
        results.append(load_file(tmp_path / format / "model.safetensors"))
    source, dense = (load_file(folder / name / "model.safetensors") for name in ("model", "dense"))
    for merged in results:
        assert {n: (t.dtype, t.shape) for n, t in merged.items()} == {n: (t.dtype, t.shape) for n, t in source.items()}
        assert all(torch.equal(tensor, dense[name]) for name, tensor in merged.items() if ".experts." in name)


def test_killed_and_resumed_gives_identical_bytes(folder: Path, tmp_path: Path) -> None:
    format = "packed" if is_one_by_one(folder) else "dense"  # where slices of one tensor are written one by one
    options = {**OPTIONS, "format": format}
    points = [
        (str(tmp_path / f"{where}{nth}"), where, nth, "after", 0)
        for where, nth in (("ShardWriter.write", 9), ("ShardWriter.write", 30), ("Journal.commit", 6))
    ]
    driver = [sys.executable, "-c", DRIVER, str(folder / "model"), json.dumps(points), json.dumps(options)]
    assert subprocess.check_output(driver, text=True).split() == [str(int(signal.SIGKILL))] * len(points)
    straight = folder / format
    for out, *_ in points:
        quantize(folder / "model", out, resume=True, **options)
        actual, named = contents(Path(out)), "loftq_init/adapter_config.json"
        actual[named] = actual[named].replace(out.encode(), str(straight).encode())
        assert actual == contents(straight)
        assert without_times(Path(out)) == without_times(straight)


# --- refusals


def test_formats_that_cannot_hold_experts_say_so(folder: Path, tmp_path: Path) -> None:
    common = {"bits": 4, "rank": 4, "device": "cpu"}
    with pytest.raises(LoftqError, match="experts") as refused:
        quantize(folder / "model", tmp_path / "out", format="gptq", group_size=32, **common)
    assert "--format packed" in refused.value.hint
    report = quantize(folder / "model", tmp_path / "bnb", format="bnb", **common)
    assert not any(".experts." in row["name"] for row in report["weights"])
    kept = [row for row in report["skipped"] if ".experts." in row["name"] and "bias" not in row["name"]]
    assert kept
    assert all("16 bits" in row["reason"] for row in kept)
    assert not (tmp_path / "out").exists()


def test_compressed_tensors_holds_experts_that_the_files_have_one_by_one(folder: Path, tmp_path: Path) -> None:
    options = {"bits": 3, "rank": 4, "group_size": 16, "iters": 1, "format": "compressed-tensors", "device": "cpu"}
    if not is_one_by_one(folder):
        with pytest.raises(LoftqError, match="one by one"):
            quantize(folder / "model", tmp_path / "never", **options)
        return
    with pytest.raises(LoftqError, match="not float16") as refused:
        quantize(folder / "model", tmp_path / "never", **options)
    assert "--format packed" in refused.value.hint
    half = tmp_path / "half"
    load(folder / "model", dtype=torch.float16).save_pretrained(half)
    quantize(half, tmp_path / "out", **options)
    assert verify(tmp_path / "out", str(half)).violations == ()
    source, loaded = load(half), load(tmp_path / "out")
    quantizer = QUANTIZERS["uniform-symmetric"](bits=3, group_size=16, dtype=torch.float16)
    for name, stack in source.named_parameters():
        if ".experts." in name:
            Q = loaded.get_parameter(name)
            assert Q.dtype == torch.float16
            for W, made in zip(stack, Q, strict=True):
                assert torch.equal(made.float(), dequantize(quantizer.quantize(W.detach().float()))), name
    assert loaded(TOKENS).logits.isfinite().all()
    with pytest.raises(LoftqError, match="unless all are quantized"):
        quantize(half, tmp_path / "never", **options, skip=("*.w2",))
    assert not (tmp_path / "never").exists()


def test_some_experts_left_out(folder: Path, tmp_path: Path) -> None:
    skip = {**OPTIONS, "bits_for": {}, "skip": ("*.experts.0.*",)}
    for format in ("packed", "dense"):
        if format == "dense" and is_one_by_one(folder):
            report = quantize(folder / "model", tmp_path / format, format=format, **skip)
            assert {row["expert"] for row in report["weights"] if "expert" in row} == {1, 2, 3}
            continue
        with pytest.raises(LoftqError, match="experts"):
            quantize(folder / "model", tmp_path / format, format=format, **skip)
        assert not (tmp_path / format).exists()
    none = quantize(folder / "model", tmp_path / "none", format="packed", **{**skip, "skip": ("*.experts.*",)})
    assert not any("expert" in row for row in none["weights"])
    assert not packed_modules(load(tmp_path / "none"))


# --- calibrated methods


@pytest.mark.parametrize("method", ["cloq", "apiq-bw"])
def test_calibrated_methods_see_the_experts_that_will_be_loaded(folder: Path, tmp_path: Path, method: str) -> None:
    """Experts are quantized without text, and what is measured of a block is that of the model that is loaded."""
    from peft import PeftModel

    (tmp_path / "text.txt").write_text(" ".join(f"w{i * i % 89}" for i in range(900)))
    more = {"epochs": 1} if method == "apiq-bw" else {}
    config = {
        "bits": 2, "rank": 4, "group_size": 32, "iters": 1, "format": "packed", "device": "cpu", "samples": 4,
        "seqlen": 32, "calibration": str(tmp_path / "text.txt"), "method": method, **more,
    }  # fmt: skip
    out = tmp_path / "out"
    report = quantize(folder / "model", out, **config)
    assert verify(out, str(folder / "model")).violations == ()
    experts = [row for row in report["weights"] if "expert" in row]
    assert len(experts) == len(expert_rows(folder / "packed"))
    assert not any("output_error" in row for row in experts)
    assert "chosen without looking at text" in (out / "README.md").read_text()
    tokens = prepare(pipeline.plan_quantize(str(folder / "model"), pipeline.build_config(config)), 1).tokens
    last, left = report["calibration"]["blocks"][-1], []
    base = load(out, dtype=torch.float32)
    for model in (load(folder / "model", dtype=torch.float32), base):
        model.get_submodule(last["name"]).register_forward_hook(lambda _, __, out: left.append(out))
        if model is base:
            PeftModel.from_pretrained(base, out, subfolder="loftq_init").eval()
        with torch.no_grad():
            model(tokens)
    expected = ((left[0] - left[1]).norm() / left[0].norm()).item()
    assert last["output_error"] == pytest.approx(expected, rel=1e-3)


def test_a_finish_of_experts_is_refused_before_any_work(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LoftqError, match="finish") as refused:
        quantize(folder / "model", tmp_path / "out", method="cloq", rank=4, group_size=32, finish_epochs=1)
    assert "--finish-epochs" in refused.value.hint
    assert not (tmp_path / "out").exists()


def test_the_estimate_of_memory_has_no_experts_among_what_trains(folder: Path) -> None:
    asked = {"bits": 2, "rank": 4, "group_size": 32, "device": "cpu", "method": "apiq-bw"}
    made = pipeline.plan_quantize(str(folder / "model"), pipeline.build_config(asked))
    rest = sum(math.prod(job.shape) for job in made.jobs if job.block is not None)
    everything = sum(math.prod(job.shape) for job in made.jobs)
    assert everything > 2 * rest
    fitting = memory._fitting_bytes(made, 8)
    widest = max(job.shape[1] for job in made.jobs if job.block)
    assert fitting <= max(memory.TRAINED_BYTES * rest, memory.MOMENT_BYTES * widest**2) + 8 * everything
    assert fitting < memory.TRAINED_BYTES * everything


# --- an adapter on experts

ADAPTED = {**OPTIONS, "double_quant": False, "experts_adapter": True, "adapter_dtype": "float32"}


@pytest.fixture(scope="module")
def adapted(folder: Path) -> Path:
    quantize(folder / "model", folder / "adapted", **ADAPTED, rslora=True)
    return folder / "adapted"


def wrappers(model: Any) -> dict[str, Any]:
    """PEFT's wrappers, by the name of the parameter that each adapts."""
    return {
        f"{name.removeprefix('base_model.model.').replace('.base_layer', '')}.{module.parameter_name}": module
        for name, module in model.named_modules()
        if type(module).__name__ == "ParamWrapper"
    }


def attach(out: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(load(out), out, subfolder="loftq_init", is_trainable=True)


def test_peft_adds_what_the_method_makes_of_each_expert(folder: Path, adapted: Path) -> None:
    report, source, model = report_of(adapted), load(folder / "model"), attach(adapted)
    assert report["config"]["format"] == "dense"
    found = wrappers(model)
    assert len(found) == 4
    products: dict[str, dict[int, dict[str, Tensor]]] = {}
    for row in expert_rows(adapted):
        assert row["rank"] == 4
        path, _, piece = row["name"].rpartition(".")
        parameter = {"w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"}.get(piece, piece)
        name = f"{path.rpartition('.')[0]}.{parameter}"
        stack = source.get_parameter(name).detach()[row["expert"]]
        W = (
            stack.mT
            if row.get("transposed")
            else stack[{"w1": slice(96), "w3": slice(96, None)}.get(piece, slice(None))]
        )
        quantizer = QUANTIZERS["lloyd"](bits=row["bits"], group_size=32)
        seeds = [seed_for(0, row["tensor"])]
        made = METHODS["loftq"](W.contiguous()[None], quantizer, 4, iters=2, seeds=seeds)
        products.setdefault(name, {}).setdefault(row["expert"], {})[piece] = made.factors.product()[0].double()
        error = W.double() - dequantize(made.quantized).double() - products[name][row["expert"]][piece]
        assert row["relative_error"] == pytest.approx((error.norm() / W.double().norm()).item(), rel=1e-4)
    assert found.keys() == products.keys()
    for name, module in found.items():
        delta = module.get_delta_weight("default").double()
        for expert, pieces in products[name].items():
            whole = torch.cat([pieces[piece] for piece in sorted(pieces)])
            whole = whole.mT if module.get_base_layer().is_transposed else whole
            assert close(delta[expert], whole, 1e-5), (name, expert)
    # and so does the model that PEFT runs: that of the source is as near as the report says
    with torch.no_grad():
        for name, module in found.items():
            source.get_parameter(name).copy_(module.get_param() + module.get_delta_weight("default"))
        for name, layer in model.named_modules():
            if hasattr(layer, "get_delta_weight") and type(layer).__name__ != "ParamWrapper":
                weight = source.get_submodule(name.removeprefix("base_model.model.")).weight
                weight.copy_(layer.base_layer.weight + layer.get_delta_weight("default"))
    assert close(model(TOKENS).logits, source(TOKENS).logits)
    model(TOKENS).logits.square().sum().backward()
    assert all(
        p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "experts" in n and p.requires_grad
    )


def test_an_adapter_on_experts_is_verified_merged_and_told(folder: Path, adapted: Path, tmp_path: Path) -> None:
    assert verify(adapted, str(folder / "model")).violations == ()
    merge(adapted, tmp_path / "merged")
    assert close(load(tmp_path / "merged")(TOKENS).logits, attach(adapted)(TOKENS).logits)
    assert "have their bits, and an adapter each" in (adapted / "README.md").read_text()
    changed = tmp_path / "changed"
    for path in adapted.rglob("*"):
        if path.is_file():
            (changed / path.relative_to(adapted)).parent.mkdir(exist_ok=True, parents=True)
            (changed / path.relative_to(adapted)).write_bytes(path.read_bytes())
    file = changed / "loftq_init/adapter_model.safetensors"
    with safe_open(adapted / "loftq_init/adapter_model.safetensors", "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("mlp.experts.lora_B.weight"))
    tensors[name][5, 3] += 1  # columns count experts fastest
    save_file(tensors, file, metadata)
    (violation,) = [text for text in verify(changed).violations if "lora_B" in text]
    assert ".experts.3." in violation


def test_an_adapter_on_experts_survives_a_kill(folder: Path, adapted: Path, tmp_path: Path) -> None:
    if not is_one_by_one(folder):
        pytest.skip("the files are the same, and every process takes seconds to start")
    options = {**ADAPTED, "rslora": True}
    points = [
        (str(tmp_path / f"{where}{nth}"), where, nth, when, 0)
        for where, nth, when in (("Journal.commit", 5, "after"), ("pipeline.write_file", 1, "after"))
    ]
    driver = [sys.executable, "-c", DRIVER, str(folder / "model"), json.dumps(points), json.dumps(options)]
    assert subprocess.check_output(driver, text=True).split() == [str(int(signal.SIGKILL))] * len(points)
    for out, *_ in points:
        quantize(folder / "model", out, resume=True, **options)
        actual, named = contents(Path(out)), "loftq_init/adapter_config.json"
        actual[named] = actual[named].replace(out.encode(), str(adapted).encode())
        assert actual == contents(adapted)


@pytest.mark.parametrize("format", ["packed", "gptq", "bnb", "compressed-tensors"])
def test_an_adapter_on_experts_is_refused_where_peft_has_no_parameter(
    folder: Path, tmp_path: Path, format: str
) -> None:
    with pytest.raises(LoftqError, match="experts"):
        quantize(folder / "model", tmp_path / "out", bits=4, group_size=32, rank=4, format=format, experts_adapter=True)
    assert not (tmp_path / "out").exists()


def test_an_adapter_on_experts_of_a_model_without_any_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(LoftqError, match="no experts"):
        quantize(tiny_llama, tmp_path / "out", rank=4, experts_adapter=True)
