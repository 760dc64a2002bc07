"""`--quantize-embeddings`: tables with bits and an adapter, loaded by the printed lines, trained, saved, merged."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from loftq_cli import batches, quantize
from loftq_cli.checkpoint.reader import read_header
from loftq_cli.checkpoint.source import open_checkpoint
from loftq_cli.cli import app
from loftq_cli.config import build_config
from loftq_cli.errors import ConfigError, LoftqError
from loftq_cli.formats import FORMATS
from loftq_cli.merge import merge
from loftq_cli.pipeline import plan_quantize
from loftq_cli.plan import ADAPTER_FILE, Plan
from loftq_cli.report import load_lines
from loftq_cli.runtime import PackedEmbedding, Scheme, layer, unpacking
from loftq_cli.stored import stored_weight
from loftq_cli.verify import verify
from tests.test_families import DECODER, IDS, SEQ2SEQ, SIZES, T5, VISION

RANK, ALPHA = 4, 6.0
OPTIONS: dict[str, Any] = {
    "bits": 2, "rank": RANK, "alpha": ALPHA, "iters": 2, "quantize_embeddings": True, "device": "cpu",
}  # fmt: skip
GPT2 = {"n_embd": 64, "n_layer": 1, "n_head": 4, "vocab_size": 300, "pad_token_id": 0}
MARIAN = {
    "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 300,
    "decoder_vocab_size": 200, "share_encoder_decoder_embeddings": False, "tie_word_embeddings": False,
    "pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
ONE, SEVERAL = {"labels": torch.tensor([1])}, {"labels": torch.ones(1, 12, dtype=torch.int64)}
Case = tuple[Callable[[], Any], dict[str, Tensor], dict[str, Tensor], tuple[str, ...]]
CASES: dict[str, Case] = {  # how to make it, inputs, labels, its tables
    "deberta": (
        lambda: tf.DebertaV2ForSequenceClassification(tf.DebertaV2Config(**SIZES, num_labels=3)), IDS, ONE,
        ("deberta.embeddings.word_embeddings",),
    ),
    "llama": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER)), IDS, SEVERAL, ("model.embed_tokens",)),
    "llama, body": (lambda: tf.LlamaModel(tf.LlamaConfig(**DECODER)), IDS, {}, ("embed_tokens",)),
    "gpt2, beside transposed weights": (
        lambda: tf.GPT2ForSequenceClassification(tf.GPT2Config(**GPT2, num_labels=3)), IDS, ONE, ("transformer.wte",),
    ),
    "marian, two tables": (
        lambda: tf.MarianMTModel(tf.MarianConfig(**MARIAN)), SEQ2SEQ, {"labels": torch.ones(1, 4, dtype=torch.int64)},
        ("model.encoder.embed_tokens", "model.decoder.embed_tokens"),
    ),
}  # fmt: skip


def save(folder: Path, make: Callable[[], Any]) -> Any:
    """A random model whose tables are not all alike, nor are those rows zero that stand for padding."""
    torch.manual_seed(0)
    model = make().eval()
    for module in model.modules():
        if type(module) is nn.Embedding:
            m, n = module.weight.shape
            module.weight.data = torch.randn(m, n) ** 3 * 0.02 + torch.randn(m, 2) @ torch.randn(2, n) / 4
    model.save_pretrained(folder)
    return model


def load(report: dict[str, Any], out: Path) -> Any:
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        exec("\n".join(load_lines(report, str(out))), names)
    return names["model"].eval()


def first_output(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return next(value for value in model(**inputs).values() if isinstance(value, Tensor))


def intended(out: Path, report: dict[str, Any]) -> dict[str, Tensor]:
    """Q + BA of every module, float64, from what lies in the files; an embedding's as PEFT documents it."""
    factors = {name: tensor.double() for name, tensor in load_file(out / ADAPTER_FILE).items()}
    stored = read_header(out / "model.safetensors", "model.safetensors").tensors
    found = {}
    for row in report["weights"]:
        W = stored_weight(out, stored, FORMATS[report["config"]["format"]], row, report["config"]).double()
        name = f"base_model.model.{row['name']}"
        if f"{name}.lora_embedding_A" in factors:
            A, B = factors[f"{name}.lora_embedding_A"], factors[f"{name}.lora_embedding_B"]
            assert (A.shape, B.shape) == ((RANK, W.shape[0]), (W.shape[1], RANK))
            found[row["name"]] = W + (B @ A).T * ALPHA / RANK
        else:
            product = factors[f"{name}.lora_B.weight"] @ factors[f"{name}.lora_A.weight"]
            found[row["name"]] = W + product * ALPHA / RANK
    return found


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a.double() - b.double()).norm() <= tolerance * b.double().norm())


@pytest.mark.parametrize("format", ["dense", "packed"])
@pytest.mark.parametrize("case", CASES)
def test_the_contract(case: str, format: str, tmp_path: Path) -> None:
    make, inputs, labels, tables = CASES[case]
    source, out = save(tmp_path / "model", make), tmp_path / "out"
    report = quantize(tmp_path / "model", out, format=format, **OPTIONS)
    rows = {row["name"]: row for row in report["weights"]}
    assert {name for name, row in rows.items() if "embedding" in row} == set(tables)
    assert not {f"{table}.weight" for table in tables} & {row["name"] for row in report["skipped"]}
    assert verify(out, str(tmp_path / "model")).violations == ()

    wanted = intended(out, report)
    for table in tables:  # the error is the one stated, and smaller than the base's own
        W, row = source.get_submodule(table).weight.double(), rows[table]
        assert ((W - wanted[table]).norm() / W.norm()).item() == pytest.approx(row["relative_error"], rel=1e-4)
        assert row["relative_error"] < 0.9 * row["relative_error_without_adapter"]

    model = load(report, out)
    looked_up = {table: model.base_model.model.get_submodule(table) for table in tables}
    for table, module in looked_up.items():
        assert type(module.base_layer) is (PackedEmbedding if format == "packed" else nn.Embedding)
        assert close(module(torch.arange(len(wanted[table]))), wanted[table], 1e-6)
    reference = source.double()
    for name, W in wanted.items():
        module = reference.get_submodule(name)
        module.weight.data = W.T if type(module).__name__ == "Conv1D" else W
    expected = first_output(reference, inputs)
    assert close(first_output(model, inputs), expected)

    if labels:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        before = model(**inputs, **labels).loss
        before.backward()
        for module in looked_up.values():
            A, B = (getattr(module, f"lora_embedding_{side}")["default"].grad for side in "AB")
            assert B.norm() > 0
            assert 0 < len(A.any(0).nonzero()) <= 12  # of the tokens that were there
        optimizer.step()
        assert model(**inputs, **labels).loss < before
        expected = first_output(model, inputs)

    model.save_pretrained(tmp_path / "trained")
    names = load_file(tmp_path / "trained" / "adapter_model.safetensors")
    # PEFT saves the base's table with an adapter that targets the name `embed_tokens` itself
    assert any("base_layer" in name for name in names) == (case == "llama, body")
    base = getattr(tf, report["load"]["auto_class"]).from_pretrained(out)
    again = PeftModel.from_pretrained(base, tmp_path / "trained").eval()
    assert torch.equal(first_output(again, inputs), first_output(model, inputs))
    merged = again.merge_and_unload()
    assert close(first_output(merged, inputs), expected)
    assert all(type(merged.get_submodule(table)) is nn.Embedding for table in tables)

    merge(out, tmp_path / "merged")
    plain = getattr(tf, report["load"]["auto_class"]).from_pretrained(tmp_path / "merged")
    assert all(close(plain.get_submodule(table).weight, wanted[table], 1e-6) for table in tables)


def test_packed_goes_round(tmp_path: Path) -> None:
    save(tmp_path / "model", CASES["deberta"][0])
    report = quantize(tmp_path / "model", tmp_path / "out", format="packed", double_quant=True, **OPTIONS)
    auto = getattr(tf, report["load"]["auto_class"])
    model = auto.from_pretrained(tmp_path / "out").eval()
    wanted = first_output(model, IDS)
    model.save_pretrained(tmp_path / "again")
    again = auto.from_pretrained(tmp_path / "again").eval()
    assert type(again.get_input_embeddings()) is PackedEmbedding
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    # what is computed from the same tensors depends, on some CPUs, on where they lie
    assert torch.allclose(first_output(again, IDS), wanted, rtol=1e-5, atol=1e-6)
    plain = again.dequantize()
    assert type(plain.get_input_embeddings()) is nn.Embedding
    assert close(first_output(plain, IDS), wanted)


def test_a_resized_table_is_a_plain_one(tmp_path: Path) -> None:
    save(tmp_path / "model", CASES["deberta"][0])
    quantize(tmp_path / "model", tmp_path / "out", format="packed", **OPTIONS)
    model = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    wanted = first_output(model, IDS)
    model.resize_token_embeddings(310, mean_resizing=False)
    assert type(model.get_input_embeddings()) is nn.Embedding
    assert close(first_output(model, IDS), wanted)


def test_what_was_changed_is_named(tmp_path: Path) -> None:
    save(tmp_path / "model", CASES["llama"][0])
    out = tmp_path / "out"
    quantize(tmp_path / "model", out, format="dense", **OPTIONS)
    tensors = load_file(out / ADAPTER_FILE)
    name = "base_model.model.model.embed_tokens.lora_embedding_A"
    tensors[name][0, 0] += 1
    save_file(tensors, out / ADAPTER_FILE, metadata=read_header(out / ADAPTER_FILE).metadata)
    assert any(f"`{name}`" in text for text in verify(out).violations)


def test_an_adapter_that_starts_at_zero_starts_as_pefts_does(tmp_path: Path) -> None:
    save(tmp_path / "model", CASES["llama"][0])
    report = quantize(tmp_path / "model", tmp_path / "out", **{**OPTIONS, "method": "qlora", "rank": 32})
    (row,) = (row for row in report["weights"] if "embedding" in row)
    assert row["iterations"] == 0
    assert row["relative_error"] == row["relative_error_without_adapter"]
    factors = load_file(tmp_path / "out" / ADAPTER_FILE)
    assert not factors["base_model.model.model.embed_tokens.lora_embedding_A"].any()
    B = factors["base_model.model.model.embed_tokens.lora_embedding_B"]
    assert B.mean().abs() < 0.1
    assert B.std().item() == pytest.approx(1, rel=0.05)
    assert (B.abs() < 1).float().mean().item() == pytest.approx(0.683, abs=0.04)  # normal


def test_a_stopped_run_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    save(tmp_path / "model", CASES["deberta"][0])

    def stop(name: str, _: int) -> None:
        if "word_embeddings" in name:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(tmp_path / "model", tmp_path / "out", progress=stop, **OPTIONS)
    resumed = quantize(tmp_path / "model", tmp_path / "out", resume=True, **OPTIONS)
    assert resumed["files"] == quantize(tmp_path / "model", tmp_path / "whole", **OPTIONS)["files"]


# --- plans and refusals


def plan(model: Path, **options: Any) -> Plan:
    return plan_quantize(str(model), build_config({**OPTIONS, **options}))


def test_tables_stay_as_they_are_unless_asked_for(tiny_llama: Path) -> None:
    assert plan(tiny_llama, quantize_embeddings=False).skipped["model.embed_tokens.weight"] == "embedding"
    asked = plan(tiny_llama, bits_for={"*.embed_tokens": 8})
    assert asked.config.format == "packed"
    assert [job.bits for job in asked.jobs if job.embedding] == [8]
    skipped = plan(tiny_llama, skip=("*.embed_tokens",)).skipped
    assert skipped["model.embed_tokens.weight"] == "`--skip *.embed_tokens`"


def test_position_and_type_tables_stay_as_they_are(tmp_path: Path) -> None:
    save(tmp_path / "model", lambda: tf.BertForSequenceClassification(tf.BertConfig(**SIZES)))
    found = plan(tmp_path / "model")
    assert [job.module for job in found.jobs if job.embedding] == ["bert.embeddings.word_embeddings"]
    for kind in ("position", "token_type"):
        assert found.skipped[f"bert.embeddings.{kind}_embeddings.weight"] == "embedding"


TIED: dict[str, tuple[Callable[[], Any], str, str]] = {
    "llama": (
        lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER, tie_word_embeddings=True)),
        "model.embed_tokens.weight", "it is tied to `lm_head.weight`",
    ),
    "deberta, head of its own class": (
        lambda: tf.DebertaV2ForMaskedLM(tf.DebertaV2Config(**SIZES)),
        "deberta.embeddings.word_embeddings.weight", "it is tied to `cls.predictions.decoder.weight`",
    ),
    "deberta, a head that ends in the table": (
        lambda: tf.DebertaV2ForMaskedLM(tf.DebertaV2Config(**SIZES, legacy=False)),
        "deberta.embeddings.word_embeddings.weight", "its adapter",  # transformers 5.17 has it tied
    ),
    "t5": (
        lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5)),
        "shared.weight", "`encoder.embed_tokens.weight`, `decoder.embed_tokens.weight`",
    ),
    "bart, without a head": (
        lambda: tf.BartModel(tf.BartConfig(**{k: v for k, v in MARIAN.items() if k.startswith(("d_m", "enc", "dec"))})),
        "shared.weight", "its BartScaledWordEmbedding is not quite torch's `Embedding`",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TIED)
def test_a_table_that_others_use_is_refused(case: str, tmp_path: Path) -> None:
    make, tensor, why = TIED[case]
    save(tmp_path / "model", make)
    with pytest.raises(LoftqError) as refusal:
        plan(tmp_path / "model")
    assert f"`{tensor}`" in refusal.value.message
    assert why in refusal.value.message
    assert refusal.value.hint is not None
    assert "leave it out" in refusal.value.hint
    assert ("untie" in refusal.value.hint) == (why.count("tied to") == 1)  # to a head alone


def test_untied_as_the_refusal_says_it_is_taken(tmp_path: Path) -> None:
    model = save(tmp_path / "tied", TIED["llama"][0])
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path / "untied")
    assert [job.module for job in plan(tmp_path / "untied").jobs if job.embedding] == ["model.embed_tokens"]


def test_a_table_that_must_stay_can_be_skipped_beside_one_that_need_not(tmp_path: Path) -> None:
    save(tmp_path / "model", lambda: tf.MarianMTModel(tf.MarianConfig(**{**MARIAN, "tie_word_embeddings": True})))
    with pytest.raises(LoftqError, match=r"`model.decoder.embed_tokens.weight` must stay") as refusal:
        plan(tmp_path / "model")
    assert "`--skip 'model.decoder.embed_tokens'`" in str(refusal.value.hint)
    made = plan(tmp_path / "model", skip=("model.decoder.embed_tokens",))
    assert [job.module for job in made.jobs if job.embedding] == ["model.encoder.embed_tokens"]
    assert "model.decoder.embed_tokens" in str(list(made.skipped))


def test_a_gpu_rehearses_it_without_what_a_guess_cannot_know(tiny_llama: Path) -> None:
    for flag in ("quantize_embeddings", "quantize_head", "experts_adapter"):
        batches.rehearse(open_checkpoint(str(tiny_llama)), build_config({"device": "cpu", flag: True}).decided())


def test_models_methods_and_formats_that_have_none(tiny_llama: Path, tmp_path: Path) -> None:
    save(tmp_path / "vit", lambda: tf.ViTModel(tf.ViTConfig(**VISION)))
    with pytest.raises(LoftqError, match="no token embeddings were found"):
        plan(tmp_path / "vit")
    for format in ("bnb", "gptq", "compressed-tensors"):
        with pytest.raises(LoftqError, match=f"`--format {format}` cannot hold this: embeddings") as refusal:
            plan(tiny_llama, format=format, bits=4)
        assert "`--format packed`" in str(refusal.value.hint)
        assert "`--format dense`" in str(refusal.value.hint)
    for method in ("qera", "cloq", "apiq-lw", "apiq-bw"):
        with pytest.raises(ConfigError, match=r"--quantize-embeddings` is for .*loftq"):
            build_config({"quantize_embeddings": True, "method": method})


def test_the_flag(tiny_llama: Path) -> None:
    flags = ("--rank", "4", "--quantize-embeddings", "--dry-run", "--json")
    result = CliRunner().invoke(app, ["quantize", str(tiny_llama), "out", *flags])
    assert "model.embed_tokens" in [row["name"] for row in json.loads(result.stdout)["weights"]]


# --- the packed table


def table(scheme: Scheme, m: int, n: int, dtype: torch.dtype = torch.float32) -> PackedEmbedding:
    generator = torch.Generator().manual_seed(0)
    made = PackedEmbedding(m, n, 0, scheme, dtype)
    for name, buffer in made.named_buffers():
        if buffer.dtype == torch.int32:
            buffer.copy_(torch.randint(-(2**31), 2**31 - 1, buffer.shape, generator=generator).to(torch.int32))
        elif buffer.dtype == torch.uint8:
            buffer.copy_(torch.randint(0, 256, buffer.shape, generator=generator))
        else:
            buffer.copy_(torch.randn(buffer.shape, generator=generator).abs() + (name == "scale"))
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "group_size"), [(96, 32), (70, 32), (64, -1), (33, 8)])
@pytest.mark.parametrize("grid", ["affine", "symmetric", "codebook", "double"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rows_are_those_of_the_whole(
    bits: int, grid: str, n: int, group_size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme = Scheme(bits, group_size, "codebook" if grid == "double" else grid, double_quant=grid == "double")
    made = table(scheme, 77, n, dtype)
    tokens = torch.tensor([[76, 0, 5, 5], [1, 75, 33, 76]])
    wanted = made.dequantize(dtype)[tokens]
    monkeypatch.setattr(unpacking, "CHUNK", {"cpu": 3 * n})  # three rows at a time
    monkeypatch.setattr(PackedEmbedding, "dequantize", lambda *_: pytest.fail("unpacked all of it"))
    unpacked: list[int] = []
    unpack = unpacking.unpack
    monkeypatch.setattr(unpacking, "unpack", lambda w, b, k: unpacked.append(len(w) * k) or unpack(w, b, k))
    found = made(tokens)
    assert found.dtype == dtype
    assert torch.equal(found, wanted)
    assert sum(unpacked) == 8 * n


def test_no_tokens_and_no_such_tokens() -> None:
    made = table(Scheme(3, 32, "affine"), 10, 64)
    assert made(torch.empty(2, 0, dtype=torch.int32)).shape == (2, 0, 64)
    assert torch.equal(made(torch.tensor(4, dtype=torch.int32)), made.dequantize(torch.float32)[4])
    for token in (-1, 10):
        with pytest.raises(IndexError):
            made(torch.tensor([token]))


def test_whoever_writes_the_table_gets_a_plain_one() -> None:
    made = table(Scheme(4, 32, "affine"), 10, 64)
    W = made.weight.clone()
    made.weight.data += 1
    assert type(made) is nn.Embedding
    assert made.padding_idx == 0
    assert torch.equal(made(torch.arange(10)), W + 1)
    assert not isinstance(made, layer.PackedLayer)
