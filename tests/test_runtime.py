"""`import loftq_cli.runtime`: a packed base is, to transformers and PEFT, what the dense base of the same run is."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from loftq_cli import quantize
from loftq_cli.card import load_notes
from loftq_cli.runtime import PackedConfig, PackedEmbedding, PackedLinear, Scheme
from tests.conftest import WITHOUT_LOFTQ, save_llama

TOKENS = torch.arange(16)[None] * 7
Q_PROJ = "model.layers.0.self_attn.q_proj"
OPTIONS = {
    "bits": 2,
    "bits_for": {"model.layers.1.*": 4, "*.v_proj": 3},
    "quantizer": "lloyd",
    "double_quant": True,
    "rank": 4,
    "alpha": 6.0,
    "skip": ("model.layers.1.mlp.up_proj",),
    "quantize_embeddings": True,
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One bfloat16 model with biases, quantized with the same options as `packed` and as `dense`."""
    folder = tmp_path_factory.mktemp("runtime")
    source = save_llama(folder / "source", torch.bfloat16, attention_bias=True)
    tensors = load_file(source / "model.safetensors")
    biases = {name: torch.randn_like(t) / 9 for name, t in tensors.items() if name.endswith(".bias")}
    assert biases
    save_file({**tensors, **biases}, source / "model.safetensors", metadata={"format": "pt"})
    for format in ("packed", "dense"):
        quantize(str(source), folder / format, format=format, device="cpu", **OPTIONS)
    return folder / "packed", folder / "dense"


def load(folder: Path, **arguments: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **arguments)


def attach(base: Any, out: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(base, out, subfolder="loftq_init", is_trainable=True)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(TOKENS).logits.float()
    return found


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return float((a - b).norm()) <= tolerance * float(b.norm())


# --- loading and saving


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("device_map", [None, "auto", {"": "cpu"}], ids=str)
def test_loads_as_the_dense_output_of_the_same_run(
    outputs: tuple[Path, Path], dtype: torch.dtype | None, device_map: Any
) -> None:
    arguments = {"device_map": device_map} | ({} if dtype is None else {"dtype": dtype})
    packed, dense = (load(out, **arguments) for out in outputs)
    layers = packed_layers(packed)
    assert len(layers) == 13
    assert {layer.scheme.bits for layer in layers.values()} == {2, 3, 4}
    assert type(packed.model.layers[1].mlp.up_proj) is nn.Linear
    assert type(packed.lm_head) is nn.Linear
    for name, layer in layers.items():
        wanted = dense.get_submodule(name).weight
        assert layer.weight.dtype == wanted.dtype == (dtype or torch.bfloat16)
        # the dense file holds values rounded to bfloat16, the packed one the codes of them
        assert torch.equal(layer.dequantize(torch.bfloat16), wanted.to(torch.bfloat16)), name
        assert layer.bias is None or torch.equal(layer.bias, dense.get_submodule(name).bias)
    assert close(logits(packed), logits(dense), 0 if dtype in (None, torch.bfloat16) else 1e-2)


def test_loads_where_accelerate_moves_a_part(outputs: tuple[Path, Path], tmp_path: Path) -> None:
    places = {"lm_head": "cpu", "model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = load(outputs[0], device_map=places, offload_folder=str(tmp_path))
    assert torch.equal(logits(model), logits(load(outputs[0])))


def test_offload_takes_the_codes_too(outputs: tuple[Path, Path], tmp_path: Path) -> None:
    parts = dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    places = {**parts, "model.layers.1": "disk"}
    model = load(outputs[0], device_map=places, offload_folder=tmp_path, offload_buffers=True)
    assert model.model.layers[1].self_attn.q_proj.codes.is_meta
    assert torch.equal(logits(model), logits(load(outputs[0])))


def test_memory_is_that_of_the_file(outputs: tuple[Path, Path]) -> None:
    model = load(outputs[0])
    file = (outputs[0] / "model.safetensors").stat().st_size
    assert model.get_memory_footprint() <= 1.02 * file
    assert logits(model).isfinite().all()
    assert model.get_memory_footprint() <= 1.02 * file


def test_save_pretrained_and_back(outputs: tuple[Path, Path], tmp_path: Path) -> None:
    model = load(outputs[0])
    model.save_pretrained(tmp_path)
    ours, theirs = load_file(outputs[0] / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name
    assert torch.equal(logits(load(tmp_path)), logits(model))


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=str)
def test_dequantize_gives_a_plain_model(outputs: tuple[Path, Path], tmp_path: Path, dtype: torch.dtype | None) -> None:
    model = load(outputs[0])
    before = logits(model)
    plain = model.dequantize(**({} if dtype is None else {"dtype": dtype}))
    assert not packed_layers(plain)
    assert type(plain.get_submodule(Q_PROJ)) is nn.Linear
    assert plain.get_submodule(Q_PROJ).weight.dtype == (dtype or torch.bfloat16)
    if dtype is None:
        assert torch.equal(logits(plain), before)
        plain.save_pretrained(tmp_path)
        assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
        assert torch.equal(logits(load(tmp_path)), before)


@pytest.mark.parametrize("plain", [False, True])
def test_what_is_saved_names_no_code_that_is_not_saved(outputs: tuple[Path, Path], tmp_path: Path, plain: bool) -> None:
    model = load(outputs[0])
    (model.dequantize() if plain else model).save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(logits(load(tmp_path, trust_remote_code=True)), logits(load(outputs[0])))


def test_dequantize_after_saving(outputs: tuple[Path, Path], tmp_path: Path) -> None:
    model = load(outputs[0])
    before = logits(model)
    model.save_pretrained(tmp_path)  # which leaves the dtype of the config as a word
    assert torch.equal(logits(model.dequantize()), before)


def edited(out: Path, folder: Path, old: str, new: str) -> Path:
    """A copy of `out` with other words in its schemes."""
    shutil.copytree(out, folder)
    config = json.loads((out / "config.json").read_text())
    schemes = json.dumps(config["quantization_config"]["schemes"])
    assert old in schemes
    config["quantization_config"]["schemes"] = json.loads(schemes.replace(old, new))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_names_that_the_model_has_not_are_no_silence(outputs: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has 0 of the 14 packed layers.* no `decoder\."):
        load(edited(outputs[0], tmp_path / "all", "model.", "decoder."))
    with pytest.warns(UserWarning, match=r"has 9 of the 14 packed layers.* no `model\.layers\.0\.ffn\."):
        load(edited(outputs[0], tmp_path / "some", ".mlp.", ".ffn."))
    with pytest.raises(ValueError, match=r"`model\.layers\.0\.mlp` is packed in the checkpoint, and a LlamaMLP"):
        load(edited(outputs[0], tmp_path / "other", "0.mlp.gate_proj", "0.mlp"))


def test_a_missing_tensor_is_refused(outputs: tuple[Path, Path], tmp_path: Path) -> None:
    folder = edited(outputs[0], tmp_path / "out", "layers", "layers")
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{Q_PROJ}.scale"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"no tensor for `{Q_PROJ}\.scale`"):
        load(folder)


def test_a_tensor_of_another_dtype_is_refused(outputs: tuple[Path, Path], tmp_path: Path) -> None:
    broken = shutil.copytree(outputs[0], tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors[f"{Q_PROJ}.codes"] = tensors[f"{Q_PROJ}.codes"].long()
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{Q_PROJ}\.codes.*int64"):
        load(broken)


@pytest.mark.parametrize("group_size", [0, -7])
def test_there_are_no_such_groups(group_size: int) -> None:
    with pytest.raises(ValueError, match="group size"):
        Scheme(2, group_size, "codebook")


def test_the_body_alone_loads_too(outputs: tuple[Path, Path]) -> None:
    from transformers import AutoModel

    body, whole = AutoModel.from_pretrained(outputs[0]), load(outputs[0])
    assert len(packed_layers(body)) == 13
    with torch.no_grad():
        assert torch.equal(body(TOKENS).last_hidden_state, whole.model(TOKENS).last_hidden_state)


def test_a_new_head_is_not_packed(outputs: tuple[Path, Path]) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(outputs[0], num_labels=3)
    assert type(model.score) is nn.Linear
    assert len(packed_layers(model)) == 13


def test_a_later_version_of_the_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="version 2"):
        PackedConfig([], version=2)


@pytest.mark.parametrize("blocked", ["loftq_cli", "loftq_cli triton"])
def test_remote_code_loads_it_where_loftq_is_not_installed(
    outputs: tuple[Path, Path], tmp_path: Path, blocked: str
) -> None:
    script = (
        WITHOUT_LOFTQ
        + """import transformers
from transformers import AutoModelForCausalLM
for auto in ("AutoModel", "AutoModelForSequenceClassification", "AutoModelForTokenClassification"):
    part = getattr(transformers, auto).from_pretrained(sys.argv[1], trust_remote_code=True)
    assert sum(type(layer).__name__ == "PackedLinear" for layer in part.modules()) == 13, auto
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    torch.save(model(torch.arange(16)[None] * 7).logits.float(), sys.argv[2] + "/logits.pt")
model.save_pretrained(sys.argv[2] + "/again")
AutoModelForCausalLM.from_pretrained(sys.argv[2] + "/again", trust_remote_code=True)
"""
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(outputs[0]), str(tmp_path), *blocked.split()],
        env={"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    wanted = logits(load(outputs[0]))
    assert torch.equal(torch.load(tmp_path / "logits.pt"), wanted)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert torch.equal(logits(load(tmp_path / "again")), wanted)  # and the import loads what that one saved


def test_the_package_takes_over_from_a_checkpoints_copy(outputs: tuple[Path, Path], tmp_path: Path) -> None:
    script = """
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
kind = type(model.model.layers[0].self_attn.q_proj)
assert kind.__module__.startswith("transformers_modules"), kind
import loftq_cli.runtime
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model.model.layers[0].self_attn.q_proj) is loftq_cli.runtime.PackedLinear
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model.model.layers[0].self_attn.q_proj) is loftq_cli.runtime.PackedLinear
"""
    subprocess.run(
        [sys.executable, "-c", script, str(outputs[0])], check=True, cwd=Path(__file__).parents[1],
        env={"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PATH": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_the_card_says_what_to_import(outputs: tuple[Path, Path]) -> None:
    packed, dense = ((out / "README.md").read_text() for out in outputs)
    lines = packed[packed.index("```python") :].splitlines()
    assert lines[1] == "import loftq_cli.runtime"
    assert "random numbers" in packed
    notes = [line for line in packed[packed.index("```python") :].splitlines() if line.startswith("- ")]
    assert "`trust_remote_code=True` runs the copy of loftq's loader in this folder" in notes[0]
    assert (outputs[0] / "modeling_loftq_packed.py").exists()
    # who finds it on the Hub has no folder of loftq's about them
    assert "`pip install -e .` in the folder that holds loftq's own `pyproject.toml`" in notes[1]
    own_code = {
        "config": {"format": "packed"},
        "load": {"remote_code": False},
        "adapter_config": {},
    }  # with which no copy travels
    assert [f"- {note}" for note in load_notes(own_code)] == notes[1:3]
    assert "pip install transformers peft\n" in packed  # loftq is on no index
    assert "loftq_cli.runtime" not in dense


def test_nothing_is_registered_until_the_runtime_is_imported() -> None:
    script = (
        "import sys, loftq_cli.quantizers, loftq_cli.formats, loftq_cli.pipeline\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known\n"
        "assert 'loftq_packed' not in known and 'loftq_cli.runtime' not in sys.modules\n"
        "import loftq_cli.runtime\n"
        "assert 'loftq_packed' in known\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# --- the layer


def layer_like(m: int, n: int, scheme: Scheme, bias: bool = False) -> PackedLinear:
    generator = torch.Generator().manual_seed(0)
    layer = PackedLinear(n, m, bias, scheme, torch.float32)
    for name, buffer in layer.named_buffers():
        if buffer.dtype == torch.int32:
            words = torch.randint(-(2**31), 2**31 - 1, buffer.shape, generator=generator)
            buffer.copy_(words.to(torch.int32))
        elif buffer.dtype == torch.uint8:
            buffer.copy_(torch.randint(0, 256, buffer.shape, generator=generator))
        else:
            buffer.copy_(torch.randn(buffer.shape, generator=generator).abs() + (name == "scale"))
    if layer.bias is not None:
        layer.bias.data.normal_(generator=generator)
    return layer


def test_casts_change_what_is_computed_not_what_is_stored(outputs: tuple[Path, Path]) -> None:
    layer = packed_layers(load(outputs[0]))[Q_PROJ]
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    values = layer.dequantize(torch.float32)
    for dtype in (torch.float16, torch.float32, torch.bfloat16, torch.float64):
        layer.to(dtype)
        assert layer.weight.dtype == layer.bias.dtype == dtype
        assert torch.equal(layer.weight.float(), values.to(dtype).float())
    for name, buffer in layer.named_buffers():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer, before[name])


@pytest.mark.parametrize("grid", ["codebook", "affine", "symmetric"])
@pytest.mark.parametrize("shape", [(3, 5), (33, 130), (64, 96)], ids=str)
def test_forward_and_backward_are_those_of_the_dense_weight(shape: tuple[int, int], grid: str) -> None:
    m, n = shape
    for bits in (2, 3, 4, 8):
        for scheme in (Scheme(bits, 32, grid), Scheme(bits, -1, grid, double_quant=True)):
            layer = layer_like(m, n, scheme, bias=True)
            W = layer.dequantize(torch.float32)
            x = torch.randn(2, 7, n, requires_grad=True)
            output = layer(x)
            assert torch.equal(output, nn.functional.linear(x, W, layer.bias))
            upstream = torch.randn_like(output)
            (gradient,) = torch.autograd.grad(output, x, upstream, retain_graph=True)
            assert torch.equal(gradient, upstream @ W)
            (of_bias,) = torch.autograd.grad(output, layer.bias, upstream)
            assert torch.allclose(of_bias, upstream.sum((0, 1)), atol=1e-5)


def test_nothing_dense_is_kept_for_the_backward_pass() -> None:
    layer = layer_like(64, 96, Scheme(2, 32, "codebook"))
    kept: list[Tensor] = []

    def pack_hook(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = torch.randn(5, 96, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
        output = layer(x)
    assert all(tensor.numel() < 64 * 96 for tensor in kept)
    product = output.grad_fn.next_functions[0][0]  # behind the view of it
    held = [t for t in product.packed if isinstance(t, Tensor)]
    assert len(held) == len(layer._buffers)
    assert all(any(t is own for own in layer._buffers.values()) for t in held)
    output.sum().backward()
    assert x.grad is not None


def test_autocast_computes_in_its_dtype() -> None:
    layer = layer_like(64, 96, Scheme(4, 32, "codebook"), bias=True)
    x = torch.randn(5, 96, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert close(x.grad, layer.dequantize(torch.float32).sum(0).expand(5, 96), 1e-2)


def test_the_weight_is_read_without_values_until_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_like(64, 96, Scheme(2, 32, "affine"))
    with monkeypatch.context() as patch:
        patch.setattr(PackedLinear, "dequantize", lambda *_: pytest.fail("made the values"))
        weight = layer.weight
        assert (weight.shape, weight.dtype, weight.device, weight.numel()) == (
            (64, 96),
            torch.float32,
            layer.codes.device,
            6144,
        )
        assert not weight.requires_grad
        assert isinstance(weight, Tensor)
    assert torch.equal(layer.weight.T @ torch.ones(64), layer.dequantize(torch.float32).T @ torch.ones(64))
    assert isinstance(layer, PackedLinear)


@pytest.mark.parametrize(
    "write",
    [
        lambda layer, new: setattr(layer.weight, "data", new),
        lambda layer, new: setattr(layer, "weight", nn.Parameter(new)),
        lambda layer, new: setattr(layer, "weight", new),
        lambda layer, new: layer.weight.copy_(new),
        lambda layer, new: layer.weight.mul_(0).add_(new),
        lambda layer, new: layer.weight.data.copy_(new),
        lambda layer, new: layer.weight.data.zero_().add_(new),
        lambda layer, new: layer.weight.data.__setitem__(slice(None), new),
        lambda layer, new: layer.weight.detach().copy_(new),
        lambda layer, new: torch.mul(new, 1, out=layer.weight),
        lambda layer, new: torch._foreach_copy_([layer.weight], [new]),
    ],
    ids=[
        "data", "parameter", "tensor", "copy_", "in place", "data.copy_", "data in place", "data[:]", "detached", "out",
        "list",
    ],
)  # fmt: skip
def test_whoever_writes_the_weight_gets_a_plain_layer(write: Any) -> None:
    layer = layer_like(64, 96, Scheme(3, 32, "affine"), bias=True)
    new = torch.randn(64, 96)
    write(layer, new)
    assert type(layer) is nn.Linear
    assert torch.equal(layer.weight, new)
    assert set(layer.state_dict()) == {"weight", "bias"}
    x = torch.randn(2, 96)
    assert torch.equal(layer(x), nn.functional.linear(x, new, layer.bias))


@pytest.mark.parametrize(
    "write",
    [
        lambda weight: weight[0].fill_(1),
        lambda weight: weight.view(-1).copy_(torch.ones(64 * 96)),
        lambda weight: weight.data.T.zero_(),
        lambda weight: weight.unbind()[3].zero_(),
        lambda weight: weight.__setitem__(0, 1.0),
        lambda weight: setattr(weight.T, "data", torch.ones(96, 64)),
    ],
    ids=["row", "view", "transposed", "unbound", "setitem", "data of a view"],
)
def test_what_a_view_cannot_tell_the_layer_raises(write: Any) -> None:
    layer = layer_like(64, 96, Scheme(3, 32, "affine"))
    with pytest.raises(RuntimeError, match="view of a packed weight"):
        write(layer.weight)
    assert isinstance(layer, PackedLinear)


@pytest.mark.parametrize(
    "read",
    [
        lambda layer: torch.zeros(64, 96).add_(layer.weight),
        lambda layer: torch.empty(64, 96).copy_(layer.weight),
        lambda layer: torch.mm(layer.weight, torch.ones(96, 2), out=torch.empty(64, 2)),
        lambda layer: layer.weight.detach().cpu().numpy(),
        lambda layer: layer.weight[0].tolist(),
        lambda layer: repr(layer.weight),
        lambda layer: setattr(layer, "weight", layer.weight),
        lambda layer: setattr(layer.weight, "data", layer.weight.contiguous()),
        lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight, requires_grad=False)),
    ],
    ids=["add_", "copy_", "out", "numpy", "tolist", "repr", "itself", "its data", "its parameter"],
)
def test_whoever_reads_the_weight_leaves_it_packed(read: Any) -> None:
    layer = layer_like(64, 96, Scheme(3, 32, "affine"))
    read(layer)
    assert isinstance(layer, PackedLinear)
    assert "codes" in layer.state_dict()


def test_what_is_made_of_the_weight_can_be_assigned_to_it() -> None:
    layer = layer_like(96, 96, Scheme(3, 32, "affine"))
    W = layer.dequantize(torch.float32)
    layer.weight = layer.weight.T
    assert type(layer) is nn.Linear
    assert torch.equal(layer.weight, W.T)


def test_a_weight_read_before_a_write_follows_the_layer() -> None:
    layer = layer_like(64, 96, Scheme(3, 32, "affine"))
    weight, W = layer.weight, layer.dequantize(torch.float32)
    weight.add_(1)
    assert torch.equal(weight.detach()[0], W[0] + 1)
    weight[0].zero_()  # a view of what the layer holds now
    assert not layer.weight[0].any()


def test_an_argument_given_twice_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_like(64, 96, Scheme(3, 32, "affine"))
    weight, made = layer.weight, []
    dequantize = PackedLinear.dequantize
    monkeypatch.setattr(PackedLinear, "dequantize", lambda *a: made.append(a) or dequantize(*a))
    assert torch.equal(weight * weight, dequantize(layer, torch.float32) ** 2)
    assert len(made) == 1


@pytest.mark.parametrize("shape", [(1, 192), (2, 48), (101,)], ids=str)
def test_inputs_of_another_width_are_refused_as_torch_does(shape: tuple[int, ...]) -> None:
    layer = layer_like(40, 96, Scheme(2, 32, "codebook"))
    for x in (torch.randn(shape), torch.randn(shape).requires_grad_()):
        with pytest.raises(RuntimeError, match=r"mat1|size"):
            layer(x)


@pytest.mark.parametrize("shape", [(2, 3, 96), (96,), (4, 96)], ids=str)
def test_the_output_can_be_written_into_while_training(shape: tuple[int, ...]) -> None:
    layer = layer_like(40, 96, Scheme(3, 32, "affine"), bias=True)
    x = torch.randn(shape).requires_grad_()
    y = layer(x)
    y += 1
    y.sum().backward()
    assert close(x.grad, layer.dequantize(torch.float32).sum(0).expand(shape), 1e-5)


def test_gradients_do_not_change_with_the_layer() -> None:
    layer = layer_like(40, 96, Scheme(2, 32, "codebook"))
    W, x = layer.dequantize(torch.float32), torch.randn(3, 96).requires_grad_()
    y = layer(x)
    layer.weight.data += 1
    y.sum().backward()
    assert torch.allclose(x.grad, W.sum(0).expand(3, 96), atol=1e-5)


def test_what_is_merged_in_inference_mode_can_be_trained_on() -> None:
    layer = layer_like(40, 96, Scheme(2, 32, "codebook"))
    with torch.inference_mode():
        layer.weight.data += 1
    x = torch.randn(3, 96).requires_grad_()
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.weight.sum(0).expand(3, 96), atol=1e-4)


def test_one_input_without_a_batch_trains_the_bias() -> None:
    layer = layer_like(64, 96, Scheme(3, 32, "affine"), bias=True)
    layer(torch.randn(96)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.ones(64))


def test_copies_are_packed_too() -> None:
    layer = layer_like(64, 96, Scheme(2, 32, "codebook", double_quant=True))
    other = copy.deepcopy(layer)
    other.weight.data = torch.zeros(64, 96)
    assert isinstance(layer, PackedLinear)
    assert type(other) is nn.Linear


# --- PEFT


def trained_gradients(model: Any, checkpointing: bool) -> dict[str, Tensor]:
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    return {name: p.grad.float() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_gradients_are_those_of_the_dense_base(outputs: tuple[Path, Path], dora: bool, checkpointing: bool) -> None:
    from peft import LoraConfig, get_peft_model

    found = []
    for out in outputs:
        base = load(out, dtype=torch.float32) if dora else load(out)
        if out == outputs[1] and dora:  # the dense file's values are rounded, the packed layer's are not
            for name, layer in load(outputs[0], dtype=torch.float32).named_modules():
                if isinstance(layer, PackedLinear | PackedEmbedding):
                    base.get_submodule(name).weight.data = layer.dequantize(torch.float32)
        if dora:
            torch.manual_seed(0)
            targets = ["q_proj", "v_proj", "down_proj"]
            model = get_peft_model(
                base, LoraConfig(r=4, use_dora=True, target_modules=targets, init_lora_weights=False)
            )
        else:
            model = attach(base, out)
        found.append(trained_gradients(model, checkpointing))
    ours, wanted = found
    assert ours.keys() == wanted.keys()
    assert len(ours) == (3 * 3 * 2 if dora else 14 * 2)
    for name, gradient in ours.items():
        assert wanted[name].norm() > 0
        assert close(gradient, wanted[name], 1e-4 if dora else 0), name


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_merge_and_unload_is_not_lost(outputs: tuple[Path, Path], tmp_path: Path, dora: bool, safe: bool) -> None:
    from peft import LoraConfig, get_peft_model

    base = load(outputs[0], dtype=torch.float32)
    alone = logits(base)
    if dora:
        torch.manual_seed(0)
        config = LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        model = get_peft_model(base, config).eval()
    else:
        model = attach(base, outputs[0]).eval()
    wanted = logits(model)
    assert not close(wanted, alone, 0.02)
    merged = model.merge_and_unload(safe_merge=safe)
    assert close(logits(merged), wanted, 1e-5)
    assert type(merged.get_submodule(Q_PROJ)) is nn.Linear
    assert len(packed_layers(merged)) == (13 - 4 if dora else 0)
    merged.save_pretrained(tmp_path)  # where some layers stay packed, its config names only those
    again = load(tmp_path)
    assert torch.equal(logits(again), logits(merged))
    assert packed_layers(again).keys() == packed_layers(merged).keys()


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("kind", ["HiraConfig", "DeloraConfig", "OFTConfig", "LoHaConfig", "VeraConfig", "ShiraConfig"])
def test_no_other_adapters_merge_is_lost(outputs: tuple[Path, Path], kind: str, safe: bool) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    options: dict[str, Any] = {"r": 4, "init_weights": False}
    if kind == "OFTConfig":
        options = {"oft_block_size": 4, "init_weights": False}
    config = getattr(peft, kind)(target_modules=["q_proj", "down_proj"], **options)
    base = load(outputs[0], dtype=torch.float32)
    alone = logits(base)
    model = peft.get_peft_model(base, config).eval()
    wanted = logits(model)
    assert not close(wanted, alone, 1e-3)
    merged = model.merge_and_unload(safe_merge=safe)
    assert close(logits(merged), wanted, 1e-5)
    assert len(packed_layers(merged)) == 13 - 4


@pytest.mark.parametrize("kind", ["AdaLoraConfig", "C3AConfig", "GraloraConfig"])
def test_adapters_that_write_into_the_output_train(outputs: tuple[Path, Path], kind: str) -> None:
    peft = pytest.importorskip("peft")
    options: dict[str, Any] = {
        "AdaLoraConfig": {"init_r": 4, "target_r": 2, "total_step": 10, "init_lora_weights": False},
        "C3AConfig": {"block_size": 32, "init_weights": False},
        "GraloraConfig": {"r": 4, "init_weights": False},
    }[kind]

    def gradients(folder: Path) -> list[Tensor]:
        torch.manual_seed(0)
        config = getattr(peft, kind)(target_modules=["q_proj", "down_proj"], **options)
        model = peft.get_peft_model(load(folder), config).train()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    packed, dense = gradients(outputs[0]), gradients(outputs[1])
    assert len(packed) == len(dense) >= 4
    assert all(close(a.float(), b.float(), 1e-3) for a, b in zip(packed, dense, strict=True))


@pytest.mark.parametrize("make_plain", ["merge_and_unload", "dequantize"])
def test_layers_with_accelerates_hooks_become_plain(outputs: tuple[Path, Path], make_plain: str) -> None:
    """As where layers lie on two devices: accelerate keeps the `forward` that the layer had."""
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.dispatch_model(load(outputs[0], dtype=torch.float32), {"": "cpu"}, force_hooks=True)
    model = attach(model, outputs[0]).eval() if make_plain == "merge_and_unload" else model
    wanted = logits(model)
    plain = getattr(model, make_plain)()
    assert not packed_layers(plain) or make_plain == "merge_and_unload"
    assert close(logits(plain), wanted, 1e-4)


def test_unloading_leaves_the_base_packed(outputs: tuple[Path, Path], tmp_path: Path) -> None:
    base = load(outputs[0])
    before, names = logits(base), packed_layers(base).keys()
    model = attach(base, outputs[0])
    base.save_pretrained(tmp_path)  # with layers called by PEFT's names
    assert "base_layer" not in json.dumps(base.config.quantization_config.to_dict())
    base = model.unload()
    assert packed_layers(base).keys() == names
    assert torch.equal(logits(base), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("init", ["olora", "pissa"])
def test_starts_that_change_the_base_make_its_layers_dense(
    outputs: tuple[Path, Path], init: Any, dtype: torch.dtype
) -> None:
    from peft import LoraConfig, get_peft_model

    base = load(outputs[0], dtype=dtype)
    before = logits(base)
    model = get_peft_model(base, LoraConfig(r=4, init_lora_weights=init, target_modules=["q_proj"])).eval()
    assert len(packed_layers(model)) == 13 - 2
    assert close(logits(model), before, 1e-5 if dtype == torch.float32 else 0.05)


def test_a_layer_made_plain_can_be_trained_whole(outputs: tuple[Path, Path]) -> None:
    from peft import LoraConfig, get_peft_model

    base = load(outputs[0])
    layer = base.get_submodule(Q_PROJ)
    layer.weight = layer.weight.clone()
    saved = LoraConfig(r=4, target_modules=["v_proj"], modules_to_save=["layers.0.self_attn.q_proj"])
    gradients = trained_gradients(get_peft_model(base, saved), checkpointing=True)
    assert any("q_proj" in name and name.endswith(".weight") and g.norm() > 0 for name, g in gradients.items())


def test_merge_and_unmerge_in_place(outputs: tuple[Path, Path]) -> None:
    model = attach(load(outputs[0], dtype=torch.float32), outputs[0]).eval()
    wanted = logits(model)
    with model.disable_adapter():
        alone = logits(model)
    model.merge_adapter()
    assert close(logits(model), wanted, 1e-5)
    model.unmerge_adapter()
    assert close(logits(model), wanted, 1e-5)
    with model.disable_adapter():
        assert close(logits(model), alone, 1e-5)


def test_adapters_are_swapped_saved_and_reloaded(outputs: tuple[Path, Path], tmp_path: Path) -> None:
    model = attach(load(outputs[0]), outputs[0])
    first = logits(model.eval())
    model.load_adapter(outputs[0] / "loftq_init", "second", is_trainable=True)
    model.set_adapter("second")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.second" in name:
                parameter.mul_(-1)
    second = logits(model)
    assert not close(second, first, 0.02)
    model.save_pretrained(tmp_path)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.delete_adapter("second")
    assert torch.equal(logits(model), first)
    from peft import PeftModel

    again = PeftModel.from_pretrained(load(outputs[0]), tmp_path / "second").eval()
    assert torch.equal(logits(again), second)
    assert len(packed_layers(again)) == 13


def test_auto_peft_model_loads_base_and_adapter(outputs: tuple[Path, Path]) -> None:
    from peft import AutoPeftModelForCausalLM

    model = AutoPeftModelForCausalLM.from_pretrained(outputs[0] / "loftq_init").eval()
    assert torch.equal(logits(model), logits(attach(load(outputs[0]), outputs[0]).eval()))
    generated = model.generate(input_ids=TOKENS[:, :4], max_new_tokens=3, do_sample=False)
    assert generated.shape == (1, 7)


def test_trains_under_the_trainer(outputs: tuple[Path, Path], tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = attach(load(outputs[0]), outputs[0])
    base = {name: buffer.clone() for name, buffer in model.named_buffers()}
    examples = [{"input_ids": TOKENS[0], "labels": TOKENS[0]}] * 4
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=8, per_device_train_batch_size=2, learning_rate=5e-3, report_to=[],
        use_cpu=True, save_strategy="no", logging_steps=1, gradient_checkpointing=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=examples)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, base[name]), name


def test_trains_under_sft_trainer(outputs: tuple[Path, Path], tmp_path: Path) -> None:
    import datasets
    import trl

    model = attach(load(outputs[0]), outputs[0])
    table = datasets.table.InMemoryTable.from_pylist([{"input_ids": TOKENS[0].tolist()}] * 4)
    data = datasets.Dataset(table, fingerprint="tokens")
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=8, per_device_train_batch_size=2, learning_rate=5e-3, report_to=[],
        use_cpu=True, bf16=False, save_strategy="no", logging_steps=1, disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {str(i): i for i in range(512)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="0")), pad_token="1", eos_token="2"
    )
    trainer = trl.SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
