"""Every decision and refusal comes from headers, before any work."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration

from loftq_cli.config import QuantizeConfig, build_config
from loftq_cli.errors import ConfigError, LoftqError
from loftq_cli.memory import running_dtype
from loftq_cli.pipeline import plan_quantize
from loftq_cli.plan import ADAPTER_FILE, Plan
from tests.conftest import save_llama

LORA_B = "base_model.model.lm_head.lora_B.weight"


def plan(model: Path, **options: object) -> Plan:
    return plan_quantize(str(model), build_config({"device": "cpu", **options}))


def test_linears_are_found_and_the_rest_is_skipped_with_reasons(tiny_llama: Path) -> None:
    found = plan(tiny_llama, bits=2, rank=4)
    assert [job.module for job in found.jobs if ".0." in job.module] == [
        f"model.layers.0.{name}"
        for name in (
            "mlp.down_proj", "mlp.gate_proj", "mlp.up_proj",
            "self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj",
        )
    ]  # fmt: skip
    assert found.skipped["lm_head.weight"] == "output head"
    assert found.skipped["model.embed_tokens.weight"] == "embedding"
    assert found.skipped["model.norm.weight"] == "norm"
    assert set(found.skipped) | {job.tensor for job in found.jobs} == set(found.checkpoint.tensors)
    assert (found.targets.architecture, found.targets.auto_class, found.targets.head.task_type) == (
        "LlamaForCausalLM", "AutoModelForCausalLM", "CAUSAL_LM",
    )  # fmt: skip


@pytest.mark.parametrize("format", ["packed", "dense"])
def test_an_output_head_is_quantized_on_request(tiny_llama: Path, tmp_path: Path, format: str) -> None:
    from loftq_cli import quantize
    from loftq_cli.merge import merge
    from loftq_cli.report import load_lines
    from loftq_cli.verify import verify

    report = quantize(tiny_llama, tmp_path / "out", bits=4, rank=4, format=format, quantize_head=True, device="cpu")
    row = next(row for row in report["weights"] if row["name"] == "lm_head")
    assert row["relative_error"] < row["relative_error_without_adapter"]
    assert verify(tmp_path / "out", str(tiny_llama)).violations == ()
    names: dict[str, Any] = {}
    exec("\n".join(load_lines(report, str(tmp_path / "out"))), names)
    head = names["model"].base_model.model.lm_head
    assert torch.equal(head.lora_B["default"].weight, load_file(tmp_path / "out" / ADAPTER_FILE)[LORA_B])
    source = load_file(tiny_llama / "model.safetensors")["lm_head.weight"].double()
    merged = head.base_layer.weight.double() + head.get_delta_weight("default").double()
    assert ((source - merged).norm() / source.norm()).item() == pytest.approx(row["relative_error"], rel=1e-3)
    merge(tmp_path / "out", tmp_path / "merged")
    plain = load_file(tmp_path / "merged" / "model.safetensors")["lm_head.weight"].double()
    assert (plain - merged).norm() <= 1e-6 * merged.norm()


def test_a_head_that_cannot_be_quantized(tiny_llama: Path, tmp_path: Path) -> None:
    tied = save_llama(tmp_path / "tied", tie_word_embeddings=True)
    with pytest.raises(LoftqError, match="no output head of its own"):
        plan(tied, rank=4, quantize_head=True)
    for format in ("bnb", "gptq", "compressed-tensors"):
        with pytest.raises(LoftqError, match=f"`--format {format}` cannot hold this"):
            plan(tiny_llama, rank=4, quantize_head=True, format=format)
    with pytest.raises(ConfigError, match="--quantize-head"):
        plan(tiny_llama, rank=4, quantize_head=True, method="cloq")
    assert plan(tiny_llama, rank=4, bits=2, quantize_head=True).config.format == "packed"


def test_what_is_left_alone_anyway_may_be_skipped(tiny_llama: Path) -> None:
    """As bitsandbytes and llm-compressor want a head to be."""
    plain, found = plan(tiny_llama, rank=4), plan(tiny_llama, rank=4, skip=("lm_head", "*norm*"))
    assert (found.jobs, found.skipped) == (plain.jobs, plain.skipped)


def test_what_is_skipped_after_all_leaves_the_format_to_the_rest(tiny_llama: Path) -> None:
    for flag, glob in (("quantize_head", "lm_head"), ("quantize_embeddings", "*.embed_tokens")):
        found = plan(tiny_llama, rank=4, skip=(glob,), **{flag: True})
        without = plan(tiny_llama, rank=4)
        assert found.config.format == "bnb"
        assert (found.jobs, set(found.skipped_linears)) == (without.jobs, set(without.skipped_linears))
        said = f"`--{flag.replace('_', '-')}` does nothing"
        assert [note for note in found.notes if note.startswith(said)]
        for format in ("gptq", "compressed-tensors"):
            assert plan(tiny_llama, rank=4, skip=(glob,), format=format, **{flag: True}).config.format == format
        quantized = plan(tiny_llama, rank=4, **{flag: True})
        assert quantized.config.format == "packed"
        assert not [note for note in quantized.notes if "does nothing" in note]


def test_weights_at_8_bits_take_no_codebook_from_the_others(tiny_llama: Path, tmp_path: Path) -> None:
    import loftq_cli.runtime  # noqa: F401
    from loftq_cli import quantize
    from loftq_cli.report import load_lines
    from loftq_cli.verify import verify

    options = {"bits": 2, "bits_for": {"*.0.mlp.down_proj": 8}, "rank": 4}
    asked = plan(tiny_llama, **options, quantizer="lloyd-fit")
    assert {(job.bits, job.quantizer) for job in asked.jobs} == {(8, "uniform"), (2, "lloyd-fit")}
    assert any("what has 8 bits is `uniform`" in note for note in plan(tiny_llama, **options).notes)
    assert not any("what has 8 bits" in note for note in plan(tiny_llama, rank=4, bits=8).notes)
    report = quantize(tiny_llama, tmp_path / "out", device="cpu", **options)
    kinds = {row["name"]: (row["bits"], row["quantizer"]) for row in report["weights"]}
    assert kinds.pop("model.layers.0.mlp.down_proj") == (8, "uniform")
    assert set(kinds.values()) == {(2, "lloyd")}
    assert verify(tmp_path / "out", str(tiny_llama)).violations == ()

    names: dict[str, Any] = {}
    exec("\n".join(load_lines(report, str(tmp_path / "out"))), names)
    source = load_file(tiny_llama / "model.safetensors")
    for row in report["weights"]:
        layer = names["model"].base_model.model.get_submodule(row["name"])
        loaded = layer.base_layer.weight.double() + layer.get_delta_weight("default").double()
        W = source[row["tensor"]].double()
        assert ((W - loaded).norm() / W.norm()).item() == pytest.approx(row["relative_error"], rel=1e-3)


def test_tied_head_is_not_in_the_file_and_not_quantized(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "tied", tie_word_embeddings=True)
    found = plan(model, bits=2, rank=4)
    assert "lm_head.weight" not in found.checkpoint.tensors
    assert "lm_head" in found.skipped_linears
    assert found.skipped["model.embed_tokens.weight"] == "embedding"


@pytest.mark.parametrize(
    ("options", "format", "quantizer"),
    [
        ({}, "bnb", "nf"),
        ({"bits": 4, "quantizer": "uniform"}, "gptq", "uniform"),
        ({"bits": 2}, "gptq", "uniform"),
        ({"bits": 8}, "gptq", "uniform"),
        ({"bits": 2, "quantizer": "nf"}, "packed", "nf"),
        ({"bits": 4, "quantizer": "lloyd"}, "packed", "lloyd"),
        ({"bits": 2, "format": "packed"}, "packed", "lloyd"),
        ({"bits": 8, "format": "packed"}, "packed", "uniform"),
        ({"bits": 2, "double_quant": True}, "packed", "lloyd"),
        ({"bits": 4, "double_quant": True}, "bnb", "nf"),
        ({"bits": 2, "bits_for": {"blocks[:50%]": 4}}, "packed", "lloyd"),
        ({"bits": 2, "bits_for": {"blocks[:50%]": 4}, "quantizer": "uniform"}, "packed", "uniform"),
        ({"bits": 3, "format": "compressed-tensors"}, "compressed-tensors", "uniform-symmetric"),
        ({"bits": 4, "format": "gptq"}, "gptq", "uniform"),
        ({"bits": 2, "bits_for": {"*.down_proj": 4}}, "packed", "lloyd"),
        ({"bits": 4, "bits_for": {"*.down_proj": 2}}, "packed", "lloyd"),
        ({"bits": 4, "bits_for": {"*.down_proj": 8}, "format": "dense"}, "dense", "nf"),
    ],
)
def test_defaults(tiny_llama: Path, options: dict[str, object], format: str, quantizer: str) -> None:
    found = plan(tiny_llama, rank=4, **options)
    assert (found.config.format, found.config.quantizer, found.config.alpha) == (format, quantizer, 4.0)
    if "format" not in options:
        assert any(note.startswith(f"format `{format}`") for note in found.notes)


def test_bits_for_the_last_matching_rule_wins(tiny_llama: Path) -> None:
    found = plan(tiny_llama, rank=4, bits=2, bits_for={"model.layers.0.*": 4, "*.down_proj": 8})
    bits = {job.module: job.bits for job in found.jobs}
    assert bits["model.layers.0.mlp.up_proj"] == 4
    assert bits["model.layers.0.mlp.down_proj"] == 8
    assert bits["model.layers.1.mlp.up_proj"] == 2


@pytest.mark.parametrize(
    ("rule", "blocks"),
    [
        ("blocks[:50%]", range(0, 5)),
        ("blocks[:25%]", range(0, 3)),  # of ten, two and a half
        ("blocks[:12.5%]", range(0, 1)),
        ("blocks[:1%]", range(0, 1)),
        ("blocks[25%:75%]", range(3, 8)),
        ("blocks[-2:]", range(8, 10)),
        ("blocks[4:6]", range(4, 6)),
        ("blocks[:]", range(0, 10)),
        ("blocks[:900]", range(0, 10)),
    ],
)
def test_bits_for_a_slice_of_the_blocks(rule: str, blocks: range, tmp_path: Path) -> None:
    found = plan(save_llama(tmp_path / "deep", num_hidden_layers=10), rank=4, bits=2, bits_for=[f"{rule}=4"])
    four = {job.module for job in found.jobs if job.bits == 4}
    assert four == {job.module for job in found.jobs if int(job.module.split(".")[2]) in blocks}


def test_each_list_of_blocks_is_sliced_by_its_own_depth() -> None:
    from loftq_cli.jobs import _select

    modules = [f"encoder.block.{i}.layer.0.q" for i in range(4)] + [f"decoder.block.{i}.layer.1.q" for i in range(8)]
    assert _select("blocks[:50%]", [*modules, "head"]) == {*modules[:2], *modules[4:8]}


@pytest.mark.parametrize("skip", ["*.layers.[0-4].*", "*.layers.[5-9].*", "*.mlp.*"])
def test_skips_move_no_slice_of_the_blocks(skip: str, tmp_path: Path) -> None:
    deep = save_llama(tmp_path / "deep", num_hidden_layers=10)
    found = plan(deep, rank=4, bits=2, bits_for=["blocks[30%:70%]=4"], skip=(skip,))
    bits = {(int(job.module.split(".")[2]), job.bits) for job in found.jobs}
    blocks = {number for number, _ in bits}
    assert bits == {(number, 4 if 3 <= number < 7 else 2) for number in blocks}
    with pytest.raises(LoftqError, match="matches no linear layer"):
        plan(deep, rank=4, bits=2, bits_for=["blocks[:1]=4"], skip=("*.layers.0.*",))


@pytest.mark.parametrize(
    "rule", ["blocks[5:5]", "blocks[:0%]", "blocks[:50]x", "blocks[a:]", "blocks[:1.2.3%]", "blocks[:.%]"]
)
def test_a_slice_of_nothing_is_refused(rule: str, tiny_llama: Path) -> None:
    with pytest.raises(LoftqError, match="matches no linear layer") as refused:
        plan(tiny_llama, rank=4, bits=2, bits_for={rule: 4})
    assert "blocks[:50%]" in refused.value.hint


@pytest.mark.parametrize(("config", "average"), [("paper-3bit", 3.0), ("paper-2.5bit", 2.5), ("paper-2.25bit", 2.25)])
@pytest.mark.parametrize("format", ["packed", "dense"])
def test_the_papers_mixed_precision_at_any_depth(config: str, average: float, format: str, tmp_path: Path) -> None:
    from loftq_cli.config import load_config

    model = save_llama(tmp_path / "deep", num_hidden_layers=8)
    file = Path(__file__).parents[1] / "configs" / f"{config}.yaml"
    found = plan_quantize(str(model), load_config(file, {"device": "cpu", "format": format}))
    assert sum(job.bits for job in found.jobs) / len(found.jobs) == average
    assert {job.bits for job in found.jobs if job.block == "model.layers.0"} == {4}
    with pytest.raises(LoftqError, match=r"one number of `bits`, not 4 .* and 2"):
        plan_quantize(str(model), load_config(file, {"device": "cpu", "format": "gptq", "quantizer": "uniform"}))
    flags = {"device": "cpu", "format": "compressed-tensors", "quantizer": "uniform-symmetric"}
    with pytest.raises(LoftqError, match=r"its loader takes one number of `bits` for all layers, not 4 .* and 2"):
        plan_quantize(str(model), load_config(file, flags))


def test_bits_per_weight_counts_scales_zero_points_and_indices(tiny_llama: Path) -> None:
    found = plan(tiny_llama, bits=2, rank=4)
    bits = sum(
        m * n * 2 + (n // 64) * m * (16 + 2) + 32 * n  # codes, float16 scales and 2-bit zero points, int32 g_idx
        for m, n in (job.shape for job in found.jobs)
    )
    assert found.bits_per_weight == pytest.approx(bits / found.parameters)


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        (
            {"rank": 65},
            r"`--rank 65` is above the smaller side of `model.layers.0.self_attn.k_proj.weight`.*3 more",
            "64",
        ),
        (
            {"rank": 4, "bits": 2, "group_size": 96, "format": "gptq"},
            r"`--group-size 96` does not divide in_features 256.*13 more",
            "128, 64",
        ),
        ({"rank": 4, "skip": ("*.qproj",)}, r"`--skip \*.qproj` matches no linear layer", "did you mean `q_proj`"),
        ({"rank": 4, "bits_for": {"lm_head": 4}}, "`--bits-for lm_head` matches no linear layer", "module names"),
        (
            {"rank": 4, "bits": 2, "quantizer": "nf", "format": "gptq"},
            "`--format gptq` cannot hold this",
            "--format packed",
        ),
        ({"rank": 4, "bits": 2, "format": "bnb"}, "`--format bnb` cannot hold this.*2 bits", "--format gptq"),
        ({"rank": 4, "skip": ("model.*",)}, "no linear weight to quantize", "--skip"),
        ({"rank": 4, "device": "cuda:7"}, "`--device cuda:7`: torch sees", "auto"),
    ],
)
def test_refusals_name_the_tensor_and_the_way_out(
    tiny_llama: Path, options: dict[str, object], message: str, hint: str
) -> None:
    with pytest.raises(LoftqError, match=message) as refused:
        plan(tiny_llama, **options)
    assert refused.value.exit_code == 1
    assert hint in refused.value.hint


def test_rank_hint_is_the_largest_that_works(tiny_llama: Path) -> None:
    assert plan(tiny_llama, rank=64).config.rank == 64


@pytest.mark.parametrize("format", ["packed", "dense"])
def test_a_short_last_group_has_a_place_in(format: str, tiny_llama: Path) -> None:
    assert plan(tiny_llama, rank=4, bits=2, group_size=96, format=format, quantizer="uniform").jobs


@pytest.mark.parametrize(
    ("options", "scales"),
    [({}, 16), ({"double_quant": True}, 8 + 32 / 256), ({"quantizer": "uniform"}, 16 + 2)],
)
def test_packed_stores_two_bits_and_little_more(tiny_llama: Path, options: dict[str, object], scales: float) -> None:
    found = plan(tiny_llama, rank=4, bits=2, format="packed", **options)
    assert found.bits_per_weight == pytest.approx(2 + scales / 64, abs=0.01)
    assert found.bits_per_weight < 2.14 or not options.get("double_quant")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "`--bits 5`"),
        ({"quantizer": "nf", "bits": 8}, "nf has 2, 3 or 4 bits"),
        ({"double_quant": True, "quantizer": "uniform"}, "`--double-quant` quantizes the scales"),
        ({"double_quant": True, "bits_for": {"*.down_proj": 8}}, "8 bits have none"),
        ({"double_quant": True, "bits": 2, "format": "gptq"}, "gptq has no 8-bit scales"),
        ({"group_size": 3}, "out of range"),
        ({"iters": 0}, "`--iters 0`"),
        ({"device": "gpu"}, "`--device gpu`"),
        ({"quantiser": "nf"}, "unknown option `quantiser`"),
    ],
)
def test_options_wrong_in_themselves(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        build_config(options)
    assert refused.value.exit_code == 2


def test_an_unknown_architecture_falls_back_to_a_rule_and_says_so(tiny_llama: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_llama / "config.json").read_text())
    config |= {"model_type": "brand-new", "architectures": ["BrandNewForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((tiny_llama / "model.safetensors").read_bytes())
    found = plan(tmp_path, bits=2, rank=4, format="dense")
    assert len(found.jobs) == 14
    assert "names and shapes" in found.notes[0]
    assert "brand-new" in found.notes[0]
    assert "lm_head" in found.skipped_linears


def test_what_is_not_of_the_model_is_left_alone(tiny_llama: Path, tmp_path: Path) -> None:
    tensors = {**load_file(tiny_llama / "model.safetensors"), "extra.weight": torch.zeros(64, 64)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    assert plan(tmp_path, bits=2, rank=4).skipped["extra.weight"].startswith("not a weight of this architecture")


def test_every_choice_of_the_configuration_is_a_row_of_its_table() -> None:
    from typing import get_args

    from loftq_cli.config import CALIBRATED, TRAINED
    from loftq_cli.formats import FORMATS
    from loftq_cli.methods import GRAM_METHODS, METHODS
    from loftq_cli.quantizers import QUANTIZERS

    fields = QuantizeConfig.model_fields
    assert set(get_args(fields["method"].annotation)) == {*METHODS, *GRAM_METHODS, *TRAINED}
    assert set(CALIBRATED) == {*GRAM_METHODS, *TRAINED}
    inits = next(arg for arg in get_args(fields["init"].annotation) if arg is not type(None))
    assert set(get_args(inits)) == {*METHODS, *GRAM_METHODS}
    assert set(get_args(fields["format"].annotation)) == {"auto", *FORMATS}
    quantizers = next(arg for arg in get_args(fields["quantizer"].annotation) if arg is not type(None))
    assert set(get_args(quantizers)) == set(QUANTIZERS)


@pytest.mark.parametrize(("half", "wanted"), [(torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_what_does_not_fit_float16_runs_in_float32(tmp_path: Path, half: torch.dtype, wanted: torch.dtype) -> None:
    """T5's `wo`, which transformers keeps in float32, and all that is added to what it returns."""
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    T5ForConditionalGeneration(T5Config(**sizes)).to(half).save_pretrained(tmp_path)
    found = plan(tmp_path, bits=2, rank=4)
    assert found.skipped["encoder.block.0.layer.1.DenseReluDense.wo.weight"] == "transformers keeps `wo` in float32"
    assert running_dtype(replace(found, config=found.config.model_copy(update={"device": "cuda"}))) == wanted


def test_a_llama_of_float16_runs_in_float16_on_a_gpu(tmp_path: Path) -> None:
    found = plan(save_llama(tmp_path, dtype=torch.float16), bits=2, rank=4)
    assert running_dtype(replace(found, config=found.config.model_copy(update={"device": "cuda"}))) == torch.float16
    assert running_dtype(found) == torch.float32
