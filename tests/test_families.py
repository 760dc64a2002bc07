"""The printed lines, run on what `loftq quantize` writes, for one model of each kind; the contract checked on each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from loftq_cli import quantize
from loftq_cli.config import QuantizeConfig, build_config
from loftq_cli.errors import LoftqError
from loftq_cli.formats import FORMATS
from loftq_cli.pipeline import plan_quantize
from loftq_cli.report import load_lines
from loftq_cli.verify import verify
from tests.test_eval import save_tokenizer

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 300,
}
DECODER = {**SIZES, "num_key_value_heads": 2}
WORDS = {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2}
GEMMA4 = {
    **DECODER, "num_hidden_layers": 4, "head_dim": 16, "global_head_dim": 16, "hidden_size_per_layer_input": 64,
    "vocab_size_per_layer_input": 300, "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
MOE = {**DECODER, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16}
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 300}
WHISPER = {
    "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 300, "num_mel_bins": 16, "max_source_positions": 32,
    "max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
IDS = {"input_ids": torch.arange(3, 15)[None]}

SEQ2SEQ = {**IDS, "decoder_input_ids": torch.arange(4)[None]}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)}
VISION = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 16,
}  # fmt: skip
DEEPSEEK = {
    "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 64,
    "q_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip
CLIP = {
    "text_config": {**SIZES, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    "vision_config": VISION, "projection_dim": 64,
}  # fmt: skip
QWEN_VL = {
    "text_config": {
        **MOE, "num_experts": 4, "decoder_sparse_step": 1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
    },
    "vision_config": {
        "depth": 1, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "out_hidden_size": 64,
        "deepstack_visual_indexes": [0],
    },
}  # fmt: skip
LLAVA = {
    "text_config": {**DECODER, "model_type": "llama"}, "vision_config": {**VISION, "model_type": "clip_vision_model"},
    "image_token_index": 9, "vision_feature_select_strategy": "full", "vision_feature_layer": -1,
}  # fmt: skip
QWEN2_VL = {
    "text_config": {**DECODER, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
    "vision_config": {"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 4, "patch_size": 4},
    "image_token_id": 9, "vision_start_token_id": 7, "vision_end_token_id": 8,
}  # fmt: skip
WAV2VEC2 = {
    **SIZES, "conv_dim": (64, 64), "conv_kernel": (8, 4), "conv_stride": (4, 2), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "pad_token_id": 0, "layerdrop": 0.0,
    "classifier_proj_size": 32, "mask_time_prob": 0.0,
}  # fmt: skip
SOUND = {"input_values": torch.linspace(-1, 1, 800)[None]}
IMAGE_IN_TEXT = {  # 4 × 4 patches, merged to 2 × 2 tokens
    "input_ids": torch.tensor([[3, 7, 9, 9, 9, 9, 8, 4]]), "pixel_values": torch.linspace(-1, 1, 16 * 96).view(16, 96),
    "image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0]]),
}  # fmt: skip


def causal(family: str, **config: Any) -> Callable[[], Any]:
    return lambda: getattr(tf, f"{family}ForCausalLM")(getattr(tf, f"{family}Config")(**config))


def llava() -> Any:
    return tf.LlavaForConditionalGeneration(tf.LlavaConfig(**LLAVA))


# name → how to make it, and what it is called with: a new family is one line
FAMILIES: dict[str, tuple[Callable[[], Any], dict[str, torch.Tensor]]] = {
    "llama": (causal("Llama", **DECODER), IDS),
    "mistral": (causal("Mistral", **DECODER), IDS),
    "qwen2, biases": (causal("Qwen2", **DECODER), IDS),
    "qwen3": (causal("Qwen3", **DECODER, head_dim=16), IDS),
    "gemma3": (lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**DECODER, head_dim=16)), IDS),
    "gemma4": (lambda: tf.Gemma4ForCausalLM(tf.Gemma4TextConfig(**GEMMA4)), IDS),
    "gemma4, keys shared": (
        lambda: tf.Gemma4ForCausalLM(tf.Gemma4TextConfig(**{**GEMMA4, "num_kv_shared_layers": 2})), IDS,
    ),
    "phi3, fused": (causal("Phi3", **DECODER, pad_token_id=0), IDS),
    "gpt2, transposed": (
        lambda: tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=300)), IDS,
    ),
    "gpt-neox": (causal("GPTNeoX", **SIZES), IDS),
    "falcon": (causal("Falcon", **SIZES), IDS),
    "bloom": (causal("Bloom", hidden_size=64, n_layer=2, n_head=4, vocab_size=300), IDS),
    "gpt-j": (causal("GPTJ", n_embd=64, n_layer=2, n_head=4, rotary_dim=8, **WORDS), IDS),
    "opt": (causal("OPT", **{**SIZES, "ffn_dim": 128, "word_embed_proj_dim": 64}), IDS),
    "mixtral": (causal("Mixtral", **DECODER, num_local_experts=4), IDS),
    "qwen3 moe": (causal("Qwen3Moe", **MOE, num_experts=4), IDS),
    "deepseek v2": (causal("DeepseekV2", **{**MOE, "num_key_value_heads": 4, **DEEPSEEK}), IDS),
    "deepseek v3": (causal("DeepseekV3", **{**MOE, "num_key_value_heads": 4, **DEEPSEEK}), IDS),
    "gpt-oss": (causal("GptOss", **{**MOE, "num_local_experts": 4}), IDS),
    "qwen3 vl moe": (
        lambda: tf.Qwen3VLMoeForConditionalGeneration(tf.Qwen3VLMoeConfig(**QWEN_VL)), IDS,
    ),
    "llama, classifier": (
        lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**DECODER, num_labels=3, pad_token_id=0)), IDS,
    ),
    "bert, classifier": (lambda: tf.BertForSequenceClassification(tf.BertConfig(**SIZES, num_labels=3)), IDS),
    "bert, masked": (lambda: tf.BertForMaskedLM(tf.BertConfig(**SIZES)), IDS),
    "bert, questions": (lambda: tf.BertForQuestionAnswering(tf.BertConfig(**SIZES)), IDS),
    "roberta, tokens": (lambda: tf.RobertaForTokenClassification(tf.RobertaConfig(**SIZES)), IDS),
    "deberta v2": (lambda: tf.DebertaV2ForSequenceClassification(tf.DebertaV2Config(**SIZES)), IDS),
    "modernbert": (
        lambda: tf.ModernBertForMaskedLM(tf.ModernBertConfig(**SIZES, pad_token_id=0, cls_token_id=1, sep_token_id=2)),
        IDS,
    ),
    "t5": (lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5, decoder_start_token_id=0)), SEQ2SEQ),
    "bart": (
        lambda: tf.BartForConditionalGeneration(
            tf.BartConfig(**{k: v for k, v in WHISPER.items() if not k.startswith(("num_mel", "max_"))})
        ),
        SEQ2SEQ,
    ),
    "whisper": (
        lambda: tf.WhisperForConditionalGeneration(tf.WhisperConfig(**WHISPER)),
        {"input_features": torch.ones(1, 16, 64), "decoder_input_ids": torch.arange(4)[None]},
    ),
    "vit": (lambda: tf.ViTForImageClassification(tf.ViTConfig(**VISION)), PIXELS),
    "clip": (lambda: tf.CLIPModel(tf.CLIPConfig(**CLIP)), {**IDS, **PIXELS}),
    "qwen2-vl": (lambda: tf.Qwen2VLForConditionalGeneration(tf.Qwen2VLConfig(**QWEN2_VL)), IMAGE_IN_TEXT),
    "wav2vec2, ctc": (lambda: tf.Wav2Vec2ForCTC(tf.Wav2Vec2Config(**WAV2VEC2)), SOUND),
    "wav2vec2, classifier": (lambda: tf.Wav2Vec2ForSequenceClassification(tf.Wav2Vec2Config(**WAV2VEC2)), SOUND),
    "bert, features": (lambda: tf.BertModel(tf.BertConfig(**SIZES)), IDS),
    "t5, encoder alone": (lambda: tf.T5EncoderModel(tf.T5Config(**T5)), IDS),
    "llava": (llava, {"input_ids": torch.tensor([[3, 4, *[9] * 5, 5, 6]]), **PIXELS}),
}  # fmt: skip


WITH_EXPERTS = ("mixtral", "qwen3 moe", "deepseek v2", "deepseek v3", "gpt-oss", "qwen3 vl moe")
OPTIONS = {"dense": {"bits": 2, "format": "dense"}, "packed": {"bits": 3, "format": "packed"}, "auto": {"bits": 4}}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_printed_lines_load_what_the_report_says(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    make, inputs = FAMILIES[family]
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    report = quantize(tmp_path / "model", out, rank=4, iters=2, alpha=8, device="cpu", **options)
    assert verify(out, str(tmp_path / "model")).violations == ()

    names: dict[str, Any] = {}
    exec("\n".join(load_lines(report, str(out))), names)
    model = names["model"].train()  # before the first forward, as the notes of bnb say
    adapted = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    layers = {name.removesuffix(".packed") for name in adapted}  # of DeepSeek's, see test_expert_sources.py
    assert layers == {row["name"] for row in report["weights"] if row["rank"]}
    experts = [row for row in report["weights"] if "expert" in row]
    assert bool(experts) == (family in WITH_EXPERTS)
    assert all(row["rank"] == 0 and row["bits"] == options["bits"] for row in experts)
    kept = [row["name"] for row in report["skipped"] if ".experts." in row["name"]]
    assert all(name.endswith("_bias") for name in kept)
    stored = load_file(out / "loftq_init" / "adapter_model.safetensors")
    for name, module in adapted.items():
        for part in ("lora_A", "lora_B"):
            loaded = getattr(module, part)["default"].weight
            assert torch.equal(loaded, stored[f"base_model.model.{name}.{part}.weight"])

    if options.get("format") == "dense":  # the contract, weight by weight, on the loaded model
        source = getattr(tf, type(make()).__name__).from_pretrained(tmp_path / "model")
        for row in report["weights"]:
            if not row["rank"]:  # see test_experts.py
                continue
            W = source.get_submodule(row["name"]).weight.double()
            base = adapted[row["name"]].base_layer.weight.double()
            assert list(W.shape) == row["shape"][::-1] if row.get("transposed") else row["shape"]
            delta = adapted[row["name"]].get_delta_weight("default").double()
            error = ((W - base - delta).norm() / W.norm()).item()
            assert error == pytest.approx(row["relative_error"], rel=1e-3)
    output = model(**inputs)
    sum(value.float().square().sum() for value in output.values() if isinstance(value, torch.Tensor)).backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


VISUAL = {"qwen3 vl moe": "model.visual.*", "qwen2-vl": "model.visual.*", "llava": "model.vision_tower.*"}
NOT_CALIBRATED = {  # and what is said of it
    "gemma4, keys shared": "argument `shared_kv_states`",
    "whisper": "input_features",
    "vit": "pixel_values",
    "clip": "no one table of tokens",
    "wav2vec2, ctc": "input_values",
    "wav2vec2, classifier": "input_values",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_calibrated_or_refused_with_the_reason(
    family: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    model, out, text = tmp_path / "model", tmp_path / "out", tmp_path / "text.txt"
    torch.manual_seed(0)
    FAMILIES[family][0]().save_pretrained(model)
    save_tokenizer(model)
    text.write_text("the quick brown fox jumps over the lazy dog and back again. " * 40)
    skip = (VISUAL[family],) if family in VISUAL else ()
    options = {"bits": 3, "rank": 4, "iters": 1, "format": "packed", "skip": skip, "device": "cpu"}
    calibrated = {**options, "method": "cloq", "calibration": str(text), "samples": 3, "seqlen": 16}
    if family in NOT_CALIBRATED:
        with pytest.raises(LoftqError, match=NOT_CALIBRATED[family]) as refused:
            quantize(model, out, **calibrated)
        assert "--method loftq" in refused.value.hint
        assert not out.exists()
        record_property("calibrated", f"no: {refused.value.message}")
        return
    if skip:
        with pytest.raises(LoftqError, match="does not call its blocks") as refused:
            quantize(model, tmp_path / "refused", **{**calibrated, "skip": ()})
        assert "--skip" in refused.value.hint
        assert not (tmp_path / "refused").exists()
    report = quantize(model, out, **calibrated)
    assert verify(out, str(model)).violations == ()
    reached = [row for row in report["weights"] if "output_error" in row]
    assert all("expert" in row or row.get("unreached") for row in report["weights"] if row not in reached)
    assert all(row["output_error"] <= row["output_error_without_adapter"] for row in reached)
    record_property("calibrated", f"yes, with `--skip '{skip[0]}'`" if skip else "yes")


def refusal(model: Path, format: str) -> LoftqError | None:
    try:
        plan_quantize(str(model), QuantizeConfig(rank=4, format=format))
    except LoftqError as error:
        return error
    return None


@pytest.mark.parametrize("family", FAMILIES)
def test_each_format_holds_it_or_says_why_not(
    family: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family][0]()
    model.save_pretrained(tmp_path)
    refusals = {format: refusal(tmp_path, format) for format in FORMATS}
    for format, refused in refusals.items():
        assert refused is None or (f"--format {format}" in refused.message and "`--format packed`" in refused.hint)
    holding = [format for format, refused in refusals.items() if refused is None]
    assert {"packed", "dense"} <= set(holding)
    record_property("class", type(model).__name__)
    record_property("formats at 4 bits", ", ".join(holding))


def test_a_config_that_names_no_class_is_that_of_the_body(tmp_path: Path) -> None:
    """As those of DeBERTa v3 on the Hub, whose files hold the head of their pretraining, too."""
    torch.manual_seed(0)
    tf.DebertaV2ForMaskedLM(tf.DebertaV2Config(**SIZES)).save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    report = quantize(tmp_path / "model", tmp_path / "out", bits=2, rank=4, iters=1, device="cpu")
    assert len(report["weights"]) == 12
    assert verify(tmp_path / "out", str(tmp_path / "model")).violations == ()
    names: dict[str, Any] = {}
    exec("\n".join(load_lines(report, str(tmp_path / "out"))), names)
    assert sum(isinstance(module, LoraLayer) for module in names["model"].modules()) == 12
    words = load_file(tmp_path / "model" / "model.safetensors")["deberta.embeddings.word_embeddings.weight"]
    assert torch.equal(names["base"].get_input_embeddings().weight, words)
    assert names["model"](**IDS).last_hidden_state.isfinite().all()


def test_a_known_model_that_cannot_be_built_is_refused_not_guessed(tiny_llama: Path, tmp_path: Path) -> None:
    import json

    config = json.loads((tiny_llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForSomethingElse"]}))
    (tmp_path / "model.safetensors").write_bytes((tiny_llama / "model.safetensors").read_bytes())
    with pytest.raises(LoftqError, match="LlamaForSomethingElse"):
        quantize(tmp_path, tmp_path / "out", bits=2, rank=4)


CONVOLUTIONS = {  # name → the tensors whose modules are convolutions
    "vit": ["vit.embeddings.patch_embeddings.projection.weight"],
    "clip": ["vision_model.embeddings.patch_embedding.weight"],
    "whisper": ["model.encoder.conv1.weight", "model.encoder.conv2.weight"],
    "wav2vec2, ctc": [
        *(f"wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original{i}" for i in range(2)),
        *(f"wav2vec2.feature_extractor.conv_layers.{i}.conv.weight" for i in range(2)),
    ],
    "qwen2-vl": ["visual.patch_embed.proj.weight"],
    "llava": ["vision_tower.embeddings.patch_embedding.weight"],
}


@pytest.mark.parametrize("family", CONVOLUTIONS)
def test_convolutions_are_skipped_and_say_so(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family][0]()
    model.save_pretrained(tmp_path / "model")
    plan = plan_quantize(str(tmp_path / "model"), build_config({"bits": 4, "rank": 4}))
    assert sorted(name for name, why in plan.skipped.items() if why == "convolution") == CONVOLUTIONS[family]
    kinds = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    convolutions = {name for name, module in model.named_modules() if isinstance(module, kinds)}
    assert len(convolutions) == len({name.partition(".parametrizations")[0] for name in CONVOLUTIONS[family]})
    assert not convolutions & {job.module for job in plan.jobs}
