"""The block loop: streams against the whole model, what it minimises, what it leaves on disk, what it refuses."""

from __future__ import annotations

import copy
import importlib
import json
import math
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel
from torch import Tensor
from typer.testing import CliRunner

from loftq_cli import blocks, fitting, outputs, pipeline
from loftq_cli.calibration import activations
from loftq_cli.calibration.activations import Activations
from loftq_cli.calibration.observe import by_input, compare, moments
from loftq_cli.calibration.stand_in import calling
from loftq_cli.calibration.stream import BlockStream
from loftq_cli.checkpoint.source import open_checkpoint
from loftq_cli.cli import app
from loftq_cli.errors import ConfigError, LoftqError
from loftq_cli.fitting import Block, Share, micro_batches
from loftq_cli.memory import activation_bytes
from loftq_cli.meta_model import build_to_run, state_keys
from loftq_cli.methods import Inputs
from loftq_cli.methods.training import Training, alone, train
from loftq_cli.report import plan_summary
from loftq_cli.stopwatch import Stopwatch
from loftq_cli.targets import find_targets
from loftq_cli.verify import verify
from loftq_cli.windows import prepare
from loftq_cli.worker import store
from tests.test_eval import save_tokenizer
from tests.test_ranks import run

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA = {**SMALL, "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 64}
SEQ2SEQ = {
    "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 300,
    "decoder_start_token_id": 0,
}  # fmt: skip
BART = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "vocab_size": 300, "max_position_embeddings": 64,
}  # fmt: skip
FAMILIES: dict[str, Any] = {
    "llama": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA)), ["model.layers"]),
    "qwen2": (lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**LLAMA)), ["model.layers"]),
    "gemma3": (
        lambda: tf.Gemma3ForCausalLM(
            tf.Gemma3TextConfig(
                **LLAMA, head_dim=16, sliding_window=8, layer_types=["sliding_attention"] * 2 + ["full_attention"]
            )
        ),
        ["model.layers"],
    ),
    "gpt2": (
        lambda: tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=300, n_positions=64)),
        ["transformer.h"],
    ),
    "bloom": (  # returns attention weights, which no block takes
        lambda: tf.BloomForCausalLM(tf.BloomConfig(hidden_size=64, n_layer=3, n_head=4, vocab_size=300)),
        ["transformer.h"],
    ),
    "deberta": (  # a convolution between its blocks
        lambda: tf.DebertaV2ForMaskedLM(
            tf.DebertaV2Config(
                **SMALL,
                vocab_size=300,
                max_position_embeddings=64,
                conv_kernel_size=3,
                conv_act="gelu",
                relative_attention=True,
                position_buckets=16,
                pos_att_type=["p2c", "c2p"],
            )
        ),
        ["deberta.encoder.layer"],
    ),
    "bert": (lambda: tf.BertForMaskedLM(tf.BertConfig(**SMALL, vocab_size=300)), ["bert.encoder.layer"]),
    "t5": (lambda: tf.T5ForConditionalGeneration(tf.T5Config(**SEQ2SEQ)), ["decoder.block", "encoder.block"]),
    "bart": (
        lambda: tf.BartForConditionalGeneration(tf.BartConfig(**BART)),
        ["model.decoder.layers", "model.encoder.layers"],
    ),
}


def streamed(folder: Path, paths: list[str], tokens: Tensor) -> dict[str, list[Tensor]]:
    """For every stack, what leaves each of its blocks."""
    checkpoint = open_checkpoint(str(folder), None)
    model = build_to_run(checkpoint, trust_remote_code=False)
    names, _ = state_keys(checkpoint, model)
    parts = micro_batches(4, len(tokens), 3)
    turned = find_targets(checkpoint)().transposed
    stream = BlockStream(model, checkpoint, names, turned, {}, paths, tokens, parts, torch.device("cpu"), torch.float32)
    ends: dict[str, Any] = {}
    left: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for stack in stream.stacks:
            activations = stream.begin(stack, ends)
            for number in range(len(stack.blocks)):
                with stream.loaded(stack, number) as block:
                    hidden = stream.outputs(stack, number, block, activations)
                assert all(parameter.is_meta for parameter in block.parameters())
                activations = type(activations)(hidden, ends)
                left.setdefault(stack.path, []).append(torch.cat([hidden[part] for part in parts]))
            ends[stack.path] = activations.hidden
    return left


def both_of(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """What a model is called with: a decoder behind an encoder as in training, to say the same text."""
    encodes = model.config.is_encoder_decoder
    both = {"decoder_input_ids": model.prepare_decoder_input_ids_from_labels(tokens)} if encodes else {}
    return {"input_ids": tokens, **both}


@pytest.mark.parametrize("family", FAMILIES)
def test_streams_are_what_the_whole_model_computes(family: str, tmp_path: Path) -> None:
    make, paths = FAMILIES[family]
    torch.manual_seed(0)
    model = make().eval()
    model.save_pretrained(tmp_path)
    tokens = torch.randint(5, 160, (7, 24), generator=torch.Generator().manual_seed(1))
    expected: dict[str, list[Tensor]] = {path: [] for path in paths}
    for path in paths:
        for block in model.get_submodule(path):
            block.register_forward_hook(
                lambda _, __, out, path=path: expected[path].append(out if isinstance(out, Tensor) else out[0])
            )
    with torch.no_grad():
        model(**both_of(model, tokens))
    found = streamed(tmp_path, paths, tokens)
    assert found.keys() == expected.keys()
    for path, hidden in expected.items():
        for one, other in zip(hidden, found[path], strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gemma3", "gpt2", "bert", "roberta", "t5", "bart"])
def test_whole_families(family: str, text: Path, tmp_path: Path) -> None:
    """Closed form, training, finish; and the last block's error is that of what is loaded."""
    make = {
        **{name: make for name, (make, _) in FAMILIES.items()},
        # its positions begin after the index of padding
        "roberta": lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**SMALL, vocab_size=300, max_position_embeddings=66)),
    }[family]
    torch.manual_seed(0)
    source = make().eval()
    folder, out = tmp_path / "model", tmp_path / "out"
    source.save_pretrained(folder)
    save_tokenizer(folder)
    config = options(text, method="apiq-bw", epochs=1, finish_epochs=1, seqlen=None, samples=4)
    tokens = prepare(pipeline.plan_quantize(str(folder), pipeline.build_config(config)), 1).tokens
    assert tokens.shape[1] == (2048 if family == "t5" else 512 if family == "bert" else 64)
    config["seqlen"] = 64  # quicker
    report = pipeline.quantize(folder, out, **config)
    assert verify(out, str(folder)).violations == ()
    tokens = prepare(pipeline.plan_quantize(str(folder), pipeline.build_config(config)), 1).tokens
    loaded = type(source).from_pretrained(out, dtype=torch.float32)
    model = PeftModel.from_pretrained(loaded, out, subfolder="loftq_init").eval()
    last = report["calibration"]["blocks"][-1]
    left: list[Tensor] = []
    for one in (source, loaded):
        one.get_submodule(last["name"]).register_forward_hook(
            lambda _, __, out: left.append(out if isinstance(out, Tensor) else out[0])
        )
    with torch.no_grad():
        source(**both_of(source, tokens))
        model(**both_of(source, tokens))
    expected = ((left[0] - left[1]).norm() / left[0].norm()).item()
    assert last["output_error"] == pytest.approx(expected, rel=1e-3)


def test_what_cannot_be_run_block_by_block_is_refused(text: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    albert = tf.AlbertConfig(
        **{**SMALL, "num_hidden_layers": 4}, vocab_size=300, embedding_size=32, max_position_embeddings=64
    )
    tf.AlbertForMaskedLM(albert).save_pretrained(tmp_path / "albert")
    save_tokenizer(tmp_path / "albert")
    with pytest.raises(LoftqError, match="more than once"):
        pipeline.quantize(tmp_path / "albert", tmp_path / "out", **options(text, method="cloq"))
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**{**LLAMA, "vocab_size": 300}))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1e25)
        model.model.layers[1].mlp.down_proj.weight.mul_(1e25)
    model.save_pretrained(tmp_path / "infinite")
    save_tokenizer(tmp_path / "infinite")
    with pytest.raises(LoftqError, match=r"source's block `model.layers.1` is not finite"):
        pipeline.quantize(tmp_path / "infinite", tmp_path / "out", overwrite=True, **options(text, method="qera"))


def test_weights_in_no_block_are_left_alone(text: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = tf.OPTConfig(
        hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=300, word_embed_proj_dim=32,
        max_position_embeddings=64,
    )  # fmt: skip
    tf.OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    save_tokenizer(tmp_path / "opt")
    report = pipeline.quantize(tmp_path / "opt", tmp_path / "out", **options(text, method="cloq"))
    outside = {row["name"] for row in report["skipped"] if row["reason"].startswith("outside the transformer blocks")}
    assert outside == {"model.decoder.project_in.weight", "model.decoder.project_out.weight"}
    assert verify(tmp_path / "out", str(tmp_path / "opt")).violations == ()


def test_processes_average_each_parameter_with_itself() -> None:
    """One that has no part in a batch here may have one elsewhere; and a step that is not finite is not taken."""
    first, second = (torch.nn.Parameter(torch.ones(size)) for size in (3, 2))
    seen: list[int] = []

    def loss_of(batch: float) -> Tensor:
        return (second * batch).sum()

    how = Training(epochs=1, factor_lr=0.1, clip_lr=0.1)
    groups = [([first], how.factor_lr), ([second], how.clip_lr)]
    fit = train(groups, [1.0, math.nan, 2.0], [1.0], loss_of, how, lambda t: seen.append(t.numel()))
    assert torch.equal(first, torch.ones(3))
    assert (second < 1).all()
    assert (fit.steps, fit.skipped) == (3, 1)
    assert fit.after < fit.before == 2.0
    assert set(seen) == {2, 5}  # what held-out samples say, and all gradients


@pytest.mark.parametrize("repeats", [True, False], ids=["all repeats", "one operation does not"])
def test_training_repeats_wherever_it_can(repeats: bool) -> None:
    """What torch only warns of, attention does on a GPU: gradients summed in whatever order."""
    factor, modes = torch.nn.Parameter(torch.ones(3)), list[str]()

    def loss_of(batch: float) -> Tensor:
        warns, on = torch.is_deterministic_algorithms_warn_only_enabled(), torch.are_deterministic_algorithms_enabled()
        modes.append("judged" if not on else "warned" if warns else "strict")
        if not repeats and on:  # for this, torch has no way to do it
            with calling("a block"):
                torch.zeros(3).put_(torch.tensor([1]), torch.ones(1))
        return (factor * batch).square().sum()

    how = Training(epochs=2, factor_lr=0.1)
    fit = train([([factor], how.factor_lr)], [1.0, 2.0], [1.0], loss_of, how)
    assert modes == [
        "judged", *(["strict"] * 2 if repeats else ["strict", "warned", "warned"]), "judged",
        *["strict" if repeats else "warned"] * 2, "judged",
    ]  # fmt: skip
    assert (fit.steps, fit.skipped) == (4, 0)
    assert not torch.are_deterministic_algorithms_enabled()


def test_micro_batches_keep_held_out_samples_apart() -> None:
    assert micro_batches(4, 7, 3) == [slice(0, 3), slice(3, 4), slice(4, 7)]
    assert micro_batches(2, 2, 5) == [slice(0, 2)]


@pytest.fixture(scope="module")
def speaking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose layers' inputs are correlated, with a tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "speaking"
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**{**LLAMA, "vocab_size": 300}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                parameter.mul_(4)
        embedding = model.get_input_embeddings().weight
        embedding.copy_(torch.randn(len(embedding), 6) @ torch.randn(6, embedding.shape[1]))
    model.save_pretrained(folder, max_shard_size="60KB")
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    generator = torch.Generator().manual_seed(3)
    path.write_text(" ".join(f"w{int(i)}" for i in torch.randint(0, 90, (4000,), generator=generator)))
    return path


def options(text: Path, **more: Any) -> dict[str, Any]:
    alternates = more.get("method") != "qera" and more.get("init") != "qlora"
    return {
        "bits": 2, "rank": 4, "group_size": 32, "format": "dense", "device": "cpu", "calibration": str(text),
        "samples": 12, "seqlen": 32, **({"iters": 2} if alternates else {}), **more,
    }  # fmt: skip


def test_moments_and_errors_are_those_of_the_layers(speaking: Path) -> None:
    """Of a whole model beside one with other weights, hooked and summed in float64."""
    models = [tf.AutoModelForCausalLM.from_pretrained(speaking, dtype=torch.float32).eval() for _ in range(2)]
    changed = models[1].model.layers[0].self_attn.v_proj.weight
    noise = torch.randn(changed.shape, generator=torch.Generator().manual_seed(2))
    repaired = changed.detach() + 0.1 * noise
    tokens = torch.randint(5, 90, (6, 16), generator=torch.Generator().manual_seed(1))
    entered: dict[str, list[Tensor]] = {"self_attn.v_proj": [], "mlp.down_proj": []}
    changed.data.copy_(repaired)
    for model in models:
        for layer, seen in entered.items():
            model.model.layers[0].get_submodule(layer).register_forward_pre_hook(
                lambda _, args, seen=seen: seen.append(args[0].double())
            )
        with torch.no_grad():
            model(tokens)
    checkpoint = open_checkpoint(str(speaking), None)
    skeleton = build_to_run(checkpoint, trust_remote_code=False)
    names, _ = state_keys(checkpoint, skeleton)
    parts = micro_batches(4, 6, 3)
    stream = BlockStream(
        skeleton, checkpoint, names, (), {}, ["model.layers"], tokens, parts, torch.device("cpu"), torch.float32
    )
    (stack,) = stream.stacks
    enters = stream.begin(stack, {})
    made: dict[str, Tensor] = {name: torch.empty(6, 16, 64) for name in ("whole", "ours", "plain")}

    def hand_on(rows: slice, *parts: Tensor) -> None:
        for tensor, part in zip(made.values(), parts, strict=True):
            tensor[rows] = part

    with stream.loaded(stack, 0) as module, torch.no_grad():
        block = Block(
            stream,
            stack,
            0,
            copy.deepcopy(module),
            module,
            enters,
            enters,
            Share(4, 4, True),
            Stopwatch(torch.device("cpu")),
        )
        layers = [name for name, child in module.named_modules() if isinstance(child, torch.nn.Linear)]
        groups = by_input(module, layers, next(stream.runs(stack, 0, enters)))
        assert [sorted(group) for group in groups] == [
            ["self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"],
            ["self_attn.o_proj"],
            ["mlp.gate_proj", "mlp.up_proj"],
            ["mlp.down_proj"],
        ]
        base = module.get_parameter("self_attn.v_proj.weight") + 0.3 * noise
        bases = {"self_attn.v_proj": base, "mlp.down_proj": module.get_parameter("mlp.down_proj.weight").clone()}
        block.put("self_attn.v_proj", repaired)
        found = [
            moments(block.source, module, "mlp.down_proj", block.pairs(held_out), alone) for held_out in (False, True)
        ]
        errors = compare(block.source, module, bases, block.pairs(), 4, hand_on, alone)
    for which, rows in enumerate((slice(0, 4), slice(4, 6))):
        x, ours = (seen[rows].flatten(0, 1) for seen in entered["mlp.down_proj"])
        for actual, expected in ((found[which].gram, ours.T @ ours), (found[which].drift, (x - ours).T @ ours)):
            torch.testing.assert_close(actual.double(), expected / len(ours), rtol=1e-4, atol=1e-6)
        down = models[0].model.layers[0].mlp.down_proj.weight.detach().double()
        drift = float(((x - ours) @ down.T).norm() / (x @ down.T).norm())
        of_down, of_v = errors["mlp.down_proj"][which], errors["self_attn.v_proj"][which]
        assert of_down is not None
        assert of_v is not None
        assert of_down.with_adapter == pytest.approx(drift, rel=1e-4)
        assert of_down.without_adapter > 2 * drift  # it sees what v_proj does without its adapter
        x = entered["self_attn.v_proj"][0][rows].flatten(0, 1)
        v = models[0].model.layers[0].self_attn.v_proj.weight.detach().double()
        assert of_v.with_adapter == pytest.approx(float((x @ (0.1 * noise.double()).T).norm() / (x @ v.T).norm()), 1e-4)
        assert of_v.without_adapter == pytest.approx(3 * of_v.with_adapter, rel=1e-4)
    assert (made["ours"] - made["whole"]).norm() < (made["plain"] - made["whole"]).norm()


def test_calibrated_methods_lower_the_error_of_outputs(speaking: Path, text: Path, tmp_path: Path) -> None:
    last: dict[str, tuple[float, float]] = {}
    for method in ("qera", "cloq"):
        out = tmp_path / method
        report = pipeline.quantize(speaking, out, **options(text, method=method))
        assert verify(out, str(speaking)).violations == ()
        assert len(report["calibration"]["blocks"]) == 3
        for row in report["weights"]:
            assert row["output_error"] < row["output_error_without_adapter"]
            assert row["held_out_output_error"] > 0
        block = report["calibration"]["blocks"][-1]
        last[method] = block["output_error"], block["held_out_output_error"]
    assert last["cloq"][0] < last["qera"][0]
    assert last["cloq"][1] < last["qera"][1]


def test_training_lowers_what_it_trains_on(
    speaking: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From either start, by layer or by block; and a trained block is what the loaded model computes, too."""
    for module in (fitting, blocks):
        monkeypatch.setattr(module, "STEP_TOKENS", 64)
    last: dict[str, float] = {}
    for name, more in {
        "cloq": {"method": "cloq"},
        "lw": {"method": "apiq-lw", "epochs": 8, "clip_lr": 0.01, "factor_lr": 0.003},
        "bw": {"method": "apiq-bw", "epochs": 8, "clip_lr": 0.01, "factor_lr": 0.003, "code_lr": 1e-3},
        "paper": {"method": "apiq-bw", "init": "qlora", "epochs": 8, "clip_lr": 0.05, "factor_lr": 0.01},
        "codes stay": {"method": "apiq-bw", "epochs": 8, "clip_lr": 0.01, "factor_lr": 0.003, "code_lr": 0},
        "augmented": {"method": "apiq-bw", "augmented": True, "epochs": 2, "rank": 8, "alpha": 16, "code_lr": 1e-3},
        "symmetric": {"method": "apiq-bw", "init": "qlora", "quantizer": "uniform-symmetric", "epochs": 2},
        "lw-paper": {"method": "apiq-lw", "init": "qlora", "epochs": 8, "clip_lr": 0.05, "factor_lr": 0.01},
    }.items():
        report = pipeline.quantize(speaking, tmp_path / name, **options(text, **more))
        assert verify(tmp_path / name, str(speaking)).violations == ()
        last[name] = report["calibration"]["blocks"][-1]["held_out_output_error"]
        of_block = {row["name"]: row["held_out_output_error"] for row in report["calibration"]["blocks"]}
        for row in report["weights"]:
            if name == "cloq":
                assert "training" not in row
                continue
            training = row["training"]
            assert training["skipped"] == 0
            assert training["after"] <= training["before"]
            if ".layers.0." not in row["name"]:  # of which `cloq` may leave nothing to gain
                assert training["after"] < training["before"]
            if name in ("bw", "codes stay", "paper", "symmetric"):
                error = of_block[row["name"].rpartition(".layers.")[0] + ".layers." + row["name"].split(".")[2]]
                assert training["after"] ** 0.5 == pytest.approx(error, rel=0.02)
    assert max(last["bw"], last["codes stay"]) < last["cloq"]


@pytest.mark.parametrize(
    ("quantizer", "more"),
    [
        ("lloyd", {"format": "packed"}),
        ("lloyd-fit", {"format": "packed", "double_quant": True}),
        ("nf-search", {"bits": 3, "group_size": 40}),  # the last group of a row is short
        ("nf", {"format": "bnb", "bits": 4, "double_quant": True}),
    ],
    ids=str,
)
def test_calibrated_methods_take_codebooks(
    speaking: Path, text: Path, tmp_path: Path, quantizer: str, more: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (fitting, blocks):
        monkeypatch.setattr(module, "STEP_TOKENS", 64)
    last: dict[str, float] = {}
    rates = {"epochs": 4, "clip_lr": 0.003, "factor_lr": 0.001}
    for name, method in {
        "qera": {"method": "qera"},
        "cloq": {"method": "cloq"},
        "lw": {"method": "apiq-lw", **rates},
        "bw": {"method": "apiq-bw", "code_lr": 1e-3, **rates},
        "paper": {"method": "apiq-bw", "init": "qlora", "epochs": 4, "clip_lr": 0.02, "factor_lr": 0.01},
    }.items():
        config = options(text, quantizer=quantizer, **more, **method)
        report = pipeline.quantize(speaking, tmp_path / name, **config)
        assert verify(tmp_path / name, str(speaking)).violations == ()
        last[name] = report["calibration"]["blocks"][-1]["held_out_output_error"]
        for row in report["weights"]:
            assert row["quantizer"] == quantizer
            if "training" in row:
                assert row["training"]["after"] <= row["training"]["before"]
                assert row["training"]["skipped"] == 0
    assert last["cloq"] < last["qera"]
    assert last["bw"] < last["cloq"]


def test_a_finish_brings_the_model_closer(speaking: Path, text: Path, tmp_path: Path) -> None:
    """Judged by what source and loaded model say of the samples held out; its report is of the factors it leaves."""
    config = options(text, method="cloq", finish_epochs=6, finish_lr=2e-3)
    plan = pipeline.plan_quantize(str(speaking), pipeline.build_config(config))
    tokens = prepare(plan, 1).held_out
    source = tf.AutoModelForCausalLM.from_pretrained(speaking, dtype=torch.float32).eval()
    divergences = []
    none = {"finish_epochs": 0, "finish_lr": 5e-4}
    for epochs in (0, 6):
        out = tmp_path / str(epochs)
        report = pipeline.quantize(speaking, out, **{**config, **({} if epochs else none)})
        assert verify(out, str(speaking)).violations == ()
        loaded = tf.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        model = PeftModel.from_pretrained(loaded, out, subfolder="loftq_init").eval()
        with torch.no_grad():
            theirs, ours = (model(tokens).logits.double().log_softmax(-1) for model in (source, model))
        divergences.append(float((theirs.exp() * (theirs - ours)).sum(-1).mean()))
    fit = report["calibration"]["finish"]
    assert divergences == pytest.approx([fit["before"], fit["after"]], rel=0.01)
    assert fit["after"] < 0.9 * fit["before"]


# rank 0, which writes, dies by SIGKILL in its second block; every weight is journaled at once
DYING = """
import os, signal
from loftq_cli import outputs
from loftq_cli.cli import main
outputs.COMMIT_SECONDS = 0
original, calls = outputs.Outputs._store, [0]
def deadly(*args):
    calls[0] += 1
    if calls[0] > 9:
        os.kill(os.getpid(), signal.SIGKILL)
    original(*args)
outputs.Outputs._store = deadly
main()
"""

EPOCHS = ["--epochs=8", "--finish-epochs=1"]


@pytest.mark.parametrize(
    ("more", "tolerance"),
    [
        (["--method=qera", "--bits=2", "--samples=5"], 1e-4),
        # a code that falls the other way changes those after it; by one rank's samples alone it is off by 0.3 to 0.8
        (["--method=cloq", "--bits=8", "--samples=4"], 0.2),
        # codes stay, and as many steps are taken; by one rank's samples alone it is off by 0.05 to 0.22
        (
            ["--method=apiq-bw", "--init=loftq", "--bits=2", "--samples=4", "--code-lr=0", "--factor-lr=0.02", *EPOCHS],
            5e-3,
        ),
    ],
    ids=["qera", "cloq", "trained"],
)
def test_ranks_share_the_samples(text: Path, tmp_path: Path, more: list[str], tolerance: float) -> None:
    """Two make what two make, byte for byte, killed on the way or not; and but for rounding what one makes."""
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA))
    model.get_input_embeddings().weight.data.normal_()  # in all directions alike: weak ones make much of rounding
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embed" not in name:
            parameter.data.mul_(4)
    model.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    save_tokenizer(tmp_path / "model")
    words = ["quantize", "--json", "--device=cpu", "--rank=4", "--group-size=32", "--format=dense", "--seqlen=32"]
    words += [*more, f"--calibration={text}", str(tmp_path / "model")]
    again = tmp_path / "again"
    if "--method=apiq-bw" in more:
        (tmp_path / "dying.py").write_text(DYING)
        assert run([str(tmp_path / "dying.py"), *words, str(again)], 2).returncode != 0
        lines = (again / ".loftq" / "journal.jsonl").read_text().splitlines()
        assert sum(len(json.loads(line).get("rows", [])) for line in lines) > 0
    reports = []
    for name, ranks in (("one", 0), ("two", 2), ("again", 2)):
        resume = ["--resume"] if (tmp_path / name).exists() else []
        ran = run(["-m", "loftq_cli", *words, *resume, str(tmp_path / name)], ranks)
        assert ran.returncode == 0, ran.stderr
        reports.append(json.loads(ran.stdout))
        assert verify(tmp_path / name, str(tmp_path / "model")).violations == ()
    assert reports[1]["files"] == reports[2]["files"]
    assert reports[1]["calibration"] == reports[2]["calibration"]
    for one, two in zip(*(report["calibration"]["blocks"] for report in reports[:2]), strict=True):
        for key in ("output_error", "held_out_output_error"):
            assert two[key] == pytest.approx(one[key], rel=tolerance)


def test_ranks_without_samples_are_refused(speaking: Path, text: Path, tmp_path: Path) -> None:
    words = ["-m", "loftq_cli", "quantize", "--bits=2", "--rank=4", "--group-size=32", "--device=cpu", "--method=qera"]
    refused = run([*words, f"--calibration={text}", "--seqlen=32", "--samples=1", str(speaking), str(tmp_path)], 2)
    assert refused.returncode != 0
    assert "2 processes have 1 samples" in refused.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_repeats_itself_on_long_texts(tmp_path: Path) -> None:
    """There attention takes keys apart, and by itself it adds the parts of a gradient in whatever order."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(**{**LLAMA, "vocab_size": 300, "max_position_embeddings": 2048})
    tf.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    (tmp_path / "text.txt").write_text(" ".join(f"w{i * i % 89}" for i in range(20000)))
    how = "--method apiq-bw --epochs 2 --finish-epochs 1 --samples 8 --seqlen 1024 --bits 2 --rank 4 --group-size 32"
    command = [sys.executable, "-m", "loftq_cli", "quantize", "--json", "-q", *how.split(), "--device", "cuda"]
    command += ["--calibration", str(tmp_path / "text.txt"), str(tmp_path / "model")]
    files = []
    for name in ("one", "other"):
        ran = subprocess.run([*command, str(tmp_path / name)], capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        files.append(json.loads(ran.stdout)["files"])
    assert files[0] == files[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("method", ["qera", "cloq", "apiq-lw", "apiq-bw"])
def test_a_gpu_repeats_itself_and_agrees_with_the_cpu(speaking: Path, text: Path, tmp_path: Path, method: str) -> None:
    more = {"epochs": 2, "finish_epochs": 1} if method == "apiq-bw" else {}
    made = [
        pipeline.quantize(speaking, tmp_path / name, **{**options(text, method=method, **more), "device": device})
        for name, device in (("first", "cuda"), ("again", "cuda"), ("cpu", "cpu"))
    ]
    assert made[0]["files"] == made[1]["files"]
    assert made[0]["calibration"] == made[1]["calibration"]
    assert verify(tmp_path / "first", str(speaking)).violations == ()
    for here, there in zip(*(report["calibration"]["blocks"] for report in made[1:]), strict=True):
        assert here["held_out_output_error"] == pytest.approx(there["held_out_output_error"], rel=0.25)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(
    "more",
    [
        {"format": "gptq"},
        {"format": "packed", "quantizer": "uniform"},
        {"format": "packed", "quantizer": "uniform-symmetric"},
        {"format": "packed", "quantizer": "lloyd", "double_quant": True},
        {"format": "compressed-tensors", "bits": 4},
        {"format": "bnb", "bits": 4, "quantizer": "nf", "double_quant": True, "method": "qera", "group_size": 64},
    ],
    ids=str,
)
def test_a_gpu_reads_back_every_format(speaking: Path, text: Path, tmp_path: Path, more: Any) -> None:
    config = options(text, **{"method": "cloq", "device": "cuda", **more})
    pipeline.quantize(speaking, tmp_path / "out", **config)
    assert verify(tmp_path / "out", str(speaking)).violations == ()


def test_activations_in_files_change_nothing(
    speaking: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped, original, reports = [0], activations._mapped, []

    def count(*arguments: Any) -> Tensor:
        mapped[-1] += 1
        return original(*arguments)

    monkeypatch.setattr(activations, "_mapped", count)
    for budget in (1000, 0):  # GiB
        config = options(text, method="apiq-bw", epochs=1, activation_budget=budget)
        reports.append(pipeline.quantize(speaking, tmp_path / str(budget), **config))
        mapped.append(0)
    assert mapped[0] == 0 < mapped[1]
    assert reports[0]["files"] == reports[1]["files"]
    assert reports[0]["config"] == reports[1]["config"]


@pytest.mark.parametrize("more", [{"method": "cloq"}, {"method": "apiq-bw", "epochs": 1}], ids=str)
def test_the_plan_says_what_activations_will_take(
    speaking: Path, text: Path, tmp_path: Path, more: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive, most = 0, 0

    class Counted(Activations):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            nonlocal alive, most
            super().__init__(*arguments, **named)
            size = sum(piece.nbytes for piece in self._pieces)
            alive += size
            most = max(most, alive)
            weakref.finalize(self, release, size)

    def release(size: int) -> None:
        nonlocal alive
        alive -= size

    monkeypatch.setattr("loftq_cli.calibration.stream.Activations", Counted)
    config = options(text, **more)
    plan = pipeline.plan_quantize(str(speaking), pipeline.build_config(config))
    pipeline.quantize(speaking, tmp_path / "out", **config)
    assert 0 < most == activation_bytes(plan) == plan_summary(plan)["totals"]["estimated_activation_bytes"]


@pytest.mark.parametrize("method", ["cloq", "apiq-bw"])
@pytest.mark.parametrize(
    ("more", "tolerance"),
    [
        ({"format": "dense"}, 1e-3),
        ({"format": "packed"}, 1e-3),
        ({"format": "compressed-tensors", "bits": 4}, 1e-3),
        ({"format": "gptq"}, 1e-2),
        # which multiplies in bfloat16 on a CPU that can
        ({"format": "bnb", "bits": 4}, 0.2),
    ],
    ids=lambda value: value["format"] if isinstance(value, dict) else "",
)
def test_block_errors_are_those_of_the_loaded_model(
    speaking: Path, text: Path, tmp_path: Path, method: str, more: Any, tolerance: float
) -> None:
    """What the loop says of the last block is what source and loaded model with its adapter really differ by."""
    config = options(text, **{"method": method, **({"epochs": 1} if method == "apiq-bw" else {}), **more})
    report = pipeline.quantize(speaking, tmp_path / "out", **config)
    assert verify(tmp_path / "out", str(speaking)).violations == ()
    tokens = prepare(pipeline.plan_quantize(str(speaking), pipeline.build_config(config)), 1).tokens
    left: list[Tensor] = []
    source = tf.AutoModelForCausalLM.from_pretrained(speaking, dtype=torch.float32).eval()
    importlib.import_module("loftq_cli.runtime")  # reads what is packed
    dtype = {} if more["format"] == "gptq" else {"dtype": torch.float32}
    base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", **dtype)
    loaded = PeftModel.from_pretrained(base, tmp_path / "out", subfolder="loftq_init").eval()
    for model in (source, loaded):
        layers = [module for name, module in model.named_modules() if name.endswith("model.layers.2")]
        layers[0].register_forward_hook(lambda _, __, out: left.append(out if isinstance(out, Tensor) else out[0]))
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # gptqmodel compiles for seconds
            model(tokens)
    expected = ((left[0] - left[1].float()).norm() / left[0].norm()).item()
    assert report["calibration"]["blocks"][-1]["output_error"] == pytest.approx(expected, rel=tolerance)


def test_training_that_only_harms_leaves_its_start(speaking: Path, text: Path, tmp_path: Path) -> None:
    rates = {"epochs": 1, "factor_lr": 50, "clip_lr": 50, "code_lr": 50}
    started, trained = (
        pipeline.quantize(speaking, tmp_path / config["method"], **options(text, **config))
        for config in ({"method": "cloq"}, {"method": "apiq-bw", **rates})
    )
    assert [row["sha256"] for row in trained["weights"]] == [row["sha256"] for row in started["weights"]]


def test_held_out_samples_decide_what_a_layer_keeps(
    speaking: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They judge before and after; and where their inputs are not finite, nothing is better than the start."""
    how = {"method": "apiq-lw", "epochs": 2}
    started, trained = (
        pipeline.quantize(speaking, tmp_path / config["method"], **options(text, **config))
        for config in ({"method": "cloq"}, how)
    )
    first = [row for row in trained["weights"] if ".layers.0." in row["name"] and row["name"][-6:-5] in "qkv"]
    assert len(first) == 3
    for row in first:  # nothing has drifted that enters them: what they lose is the error of their outputs
        assert row["training"]["after"] ** 0.5 == pytest.approx(row["held_out_output_error"], rel=1e-3)
        assert row["output_error"] != pytest.approx(row["held_out_output_error"], rel=1e-2)
    original = fitting.Block.inputs

    def changed(self: Block, layer: str, held_out: bool) -> Inputs:
        found = original(self, layer, held_out)
        return Inputs(found.gram * math.nan) if held_out else found

    monkeypatch.setattr(fitting.Block, "inputs", changed)
    judged = pipeline.quantize(speaking, tmp_path / "judged", **options(text, **how))
    hashes = [[row["sha256"] for row in report["weights"]] for report in (started, trained, judged)]
    assert hashes[0] == hashes[2] != hashes[1]


def test_augmented_training_also_looks_at_what_really_enters(speaking: Path, text: Path, tmp_path: Path) -> None:
    """Of the first block both losses are one, but for the factor 2: the next ones see two inputs."""
    made = [
        pipeline.quantize(
            speaking, tmp_path / str(augmented), **options(text, method="apiq-bw", epochs=1, augmented=augmented)
        )
        for augmented in (False, True)
    ]
    plain, both = ([row for row in report["weights"] if ".layers.2." in row["name"]] for report in made)
    assert all(one["sha256"] != other["sha256"] for one, other in zip(plain, both, strict=True))
    for row in both:
        assert row["training"]["after"] < row["training"]["before"]


@pytest.mark.parametrize("more", [{"method": "cloq"}, {"method": "apiq-bw", "epochs": 1}], ids=str)
def test_experts_that_no_token_chose(text: Path, tmp_path: Path, more: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They become what the weight-only method makes of them, byte for byte, and no error of outputs is claimed."""
    torch.manual_seed(0)
    config = tf.NllbMoeConfig(**BART, num_experts=4, encoder_sparse_step=2, decoder_sparse_step=2, router_bias=True)
    model = tf.NllbMoeForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if name.endswith("router.classifier.bias"):
            parameter.data[2:] = -1e4
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    asked = options(text, samples=2, seqlen=16, **more)
    report = pipeline.quantize(tmp_path / "model", tmp_path / "out", **asked)
    assert verify(tmp_path / "out", str(tmp_path / "model")).violations == ()
    monkeypatch.setattr("loftq_cli.plan.BATCH_ELEMENTS", {"cpu": 0})
    alone = {name: asked[name] for name in ("bits", "rank", "group_size", "format", "device", "iters")}
    blind = pipeline.quantize(tmp_path / "model", tmp_path / "blind", quantizer="uniform", **alone)
    for row, other in zip(report["weights"], blind["weights"], strict=True):
        unseen = any(f"expert_{i}" in row["name"] for i in (2, 3))
        assert (row["sha256"] == other["sha256"]) == unseen, row["name"]
        assert not unseen or row.get("output_error") is None
        assert not unseen or "training" not in row
    assert sum("expert_" in row["name"] for row in report["weights"]) == 16


TRAINED = {"method": "apiq-bw", "epochs": 2, "finish_epochs": 1}


@contextmanager
def dying_in(method: str, calls: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, a run is interrupted in its next call of that method of `Outputs` after so many; all is journaled."""
    original, left = getattr(outputs.Outputs, method), [calls]

    def dying(self: Any, *arguments: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(outputs, "COMMIT_SECONDS", 0)
        patch.setattr(outputs.Outputs, method, dying)
        with pytest.raises(KeyboardInterrupt):
            yield


@pytest.mark.parametrize(
    ("more", "dies_in", "stop"),
    [
        *(({"method": "cloq"}, "_store", stop) for stop in (1, 9, 16, 20)),
        (TRAINED, "_store", 9),
        (TRAINED, "rewrite", 0),
        (TRAINED, "rewrite", 11),
    ],
    ids=str,
)
def test_resumed_bytes_are_those_of_a_straight_run(
    speaking: Path, text: Path, tmp_path: Path, more: Any, dies_in: str, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.quantize(speaking, tmp_path / "straight", **options(text, **more))
    with dying_in(dies_in, stop, monkeypatch):
        pipeline.quantize(speaking, tmp_path / "out", **options(text, **more))
    assert (tmp_path / "out" / ".loftq").exists()
    report = pipeline.quantize(speaking, tmp_path / "out", resume=True, **options(text, **more))
    straight = json.loads((tmp_path / "straight" / "loftq_report.json").read_text())
    assert report["files"] == straight["files"]
    assert report["calibration"] == straight["calibration"]
    without_times = [
        [{key: value for key, value in row.items() if key != "seconds"} for row in made["weights"]]
        for made in (report, straight)
    ]
    assert without_times[0] == without_times[1]
    assert verify(tmp_path / "out", str(speaking)).violations == ()


@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize("stop", [1, 7, 9, 13, 16, 20])
def test_a_block_is_of_one_session(
    speaking: Path, text: Path, tmp_path: Path, stop: int, lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the next fits it to other bytes (other hardware, say), its weights are still of one fit, as reported.

    And so are blocks behind one of which a file was lost.
    """
    given: list[str] = []
    with dying_in("_store", stop, monkeypatch):
        pipeline.quantize(speaking, tmp_path / "out", **options(text, method="cloq"))
    if lost:
        for folder in (tmp_path / "out", tmp_path / "out/.loftq"):
            (folder / "model-00002-of-00010.safetensors").unlink(missing_ok=True)

    def other(plan: Any, batch: Any, W: Tensor, made: Any, *arguments: Any) -> Any:
        given.append(batch.first.module)
        factors = replace(made.factors, lora_B=0.9 * made.factors.lora_B)
        return store(plan, batch, W, replace(made, factors=factors), *arguments)

    monkeypatch.setattr(blocks, "store", other)
    pipeline.quantize(speaking, tmp_path / "out", resume=True, **options(text, method="cloq"))
    again = [sum(f"layers.{number}." in module for module in given) for number in range(3)]
    assert again == [7 * (lost or stop < 7 * (number + 1)) for number in range(3)]
    assert verify(tmp_path / "out", str(speaking)).violations == ()


def test_too_little_text_is_said(speaking: Path, text: Path, tmp_path: Path) -> None:
    words = ["quantize", "--bits=2", "--rank=4", "--group-size=32", "--format=dense", "--device=cpu"]
    words += ["--method=qera", f"--calibration={text}", "--seqlen=32", "--samples"]
    said = []
    for samples in ("4", "600"):
        out = tmp_path / samples
        said.append(CliRunner().invoke(app, [*words, samples, str(speaking), str(out)]).stderr)
        noted = "note" in json.loads((out / "loftq_report.json").read_text())["calibration"]
        assert noted == ("wanted were" in said[-1]) == (samples == "600")


def test_other_text_is_another_run(speaking: Path, text: Path, tmp_path: Path) -> None:
    copy = tmp_path / "text.txt"
    copy.write_text(text.read_text())
    out = tmp_path / "out"
    pipeline.quantize(speaking, out, **options(copy, method="qera"))
    copy = copy.rename(tmp_path / "moved.txt")
    pipeline.quantize(speaking, out, **options(copy, method="qera"))  # nothing to do
    copy.write_text(text.read_text()[::-1])
    with pytest.raises(LoftqError, match="the text of --calibration was"):
        pipeline.quantize(speaking, out, **options(copy, method="qera"))
    with pytest.raises(LoftqError, match=r"with other settings: --samples was 12, now 6$"):
        pipeline.quantize(speaking, out, **options(copy, method="qera", samples=6))


def test_refusals(speaking: Path, tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(LoftqError, match="tokenizer"):
        pipeline.quantize(tiny_llama, tmp_path / "a", **options(text, method="qera"))
    for method in ("cloq", "apiq-lw", "apiq-bw"):
        with pytest.raises(LoftqError, match="blocks that lie in one row each, and those of 40"):
            pipeline.quantize(speaking, tmp_path / "b", **options(text, method=method, quantizer="nf", group_size=40))
    with pytest.raises(ConfigError, match="makes nothing of it"):
        pipeline.quantize(speaking, tmp_path / "c", **options(text, method="loftq"))
    with pytest.raises(ConfigError, match="give `--finish-epochs`, too"):
        pipeline.quantize(speaking, tmp_path / "c", **options(text, method="cloq", finish_lr=1e-3))
    for idle in ({"epochs": 3}, {"augmented": True, "init": None}, {"finish_lr": 1e-3, "method": "qlora"}):
        with pytest.raises(ConfigError, match="makes nothing of it"):
            pipeline.quantize(speaking, tmp_path / "c", bits=2, **{"method": "cloq", **idle})
    trained = {"method": "apiq-bw", "init": "qlora"}
    for idle in ({"method": "qera", "iters": 3}, {**trained, "init": "qera", "iters": 3}, {**trained, "iters": 3}):
        with pytest.raises(ConfigError, match="makes nothing of `--iters`"):
            pipeline.quantize(speaking, tmp_path / "c", bits=2, **idle)
    with pytest.raises(ConfigError, match="leave out `--code-lr`"):
        pipeline.quantize(speaking, tmp_path / "c", bits=2, **trained, code_lr=0)
    with pytest.raises(LoftqError, match="positions"):
        pipeline.quantize(speaking, tmp_path / "d", **options(text, method="qera", seqlen=100_000))
    assert not any((tmp_path / name).exists() for name in "abcd")
