"""Heads in full precision, loaded by the printed lines, called and trained through PEFT, saved and loaded again."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loftq_cli import quantize
from loftq_cli.config import build_config
from loftq_cli.pipeline import plan_quantize
from loftq_cli.report import load_lines
from loftq_cli.verify import verify
from tests.test_families import DECODER, IDS, LLAVA, PIXELS, SEQ2SEQ, SIZES, SOUND, T5, VISION, WAV2VEC2, WHISPER

BART = {k: v for k, v in WHISPER.items() if not k.startswith(("num_mel", "max_"))}
ENDED = {"input_ids": torch.tensor([[3, 4, 5, 6, 2]])}
ONE, EACH = {"labels": torch.tensor([1])}, {"labels": torch.ones(1, 12, dtype=torch.int64)}
SPAN = {"start_positions": torch.tensor([1]), "end_positions": torch.tensor([3])}
FEATURES = {"input_features": torch.ones(1, 16, 64), "decoder_input_ids": torch.arange(4)[None]}

# (how to make it, its Auto class, its task type, inputs, labels, the names of the head that PEFT trains)
Case = tuple[Callable[[], Any], str, str | None, dict[str, Any], dict[str, Any], tuple[str, ...]]
CASES: dict[str, Case] = {
    "bert": (
        lambda: tf.BertForSequenceClassification(tf.BertConfig(**SIZES, num_labels=3)),
        "AutoModelForSequenceClassification", "SEQ_CLS", IDS, ONE, ("classifier",),
    ),
    "deberta v2, with a pooler": (
        lambda: tf.DebertaV2ForSequenceClassification(tf.DebertaV2Config(**SIZES)),
        "AutoModelForSequenceClassification", "SEQ_CLS", IDS, ONE, ("classifier", "pooler"),
    ),
    "modernbert, with another layer": (
        lambda: tf.ModernBertForSequenceClassification(
            tf.ModernBertConfig(**SIZES, pad_token_id=0, cls_token_id=1, sep_token_id=2)
        ),
        "AutoModelForSequenceClassification", "SEQ_CLS", IDS, ONE, ("classifier", "head"),
    ),
    "bart, under another name": (
        lambda: tf.BartForSequenceClassification(tf.BartConfig(**BART)),
        "AutoModelForSequenceClassification", "SEQ_CLS", ENDED, ONE, ("classification_head",),
    ),
    "llama": (
        lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**DECODER, num_labels=3, pad_token_id=0)),
        "AutoModelForSequenceClassification", "SEQ_CLS", IDS, ONE, ("score",),
    ),
    "roberta, tokens": (
        lambda: tf.RobertaForTokenClassification(tf.RobertaConfig(**SIZES)),
        "AutoModelForTokenClassification", "TOKEN_CLS", IDS, EACH, ("classifier",),
    ),
    "bert, questions": (
        lambda: tf.BertForQuestionAnswering(tf.BertConfig(**SIZES)),
        "AutoModelForQuestionAnswering", "QUESTION_ANS", IDS, SPAN, ("qa_outputs",),
    ),
    "llama, questions": (
        lambda: tf.LlamaForQuestionAnswering(tf.LlamaConfig(**DECODER)),
        "AutoModelForQuestionAnswering", "QUESTION_ANS", IDS, SPAN, ("qa_outputs",),
    ),
    "distilbert, questions": (
        lambda: tf.DistilBertForQuestionAnswering(
            tf.DistilBertConfig(dim=64, hidden_dim=128, n_layers=1, n_heads=4, vocab_size=160)
        ),
        "AutoModelForQuestionAnswering", "QUESTION_ANS", IDS, SPAN, ("qa_outputs",),
    ),
    "bart, questions": (
        lambda: tf.BartForQuestionAnswering(tf.BartConfig(**BART)),
        "AutoModelForQuestionAnswering", "QUESTION_ANS", IDS, SPAN, ("qa_outputs",),
    ),
    "bert, features": (
        lambda: tf.BertModel(tf.BertConfig(**SIZES)), "AutoModel", "FEATURE_EXTRACTION", IDS, {}, (),
    ),
    "llama, text": (
        lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER)), "AutoModelForCausalLM", "CAUSAL_LM", IDS, EACH, (),
    ),
    "t5, text": (
        lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5, decoder_start_token_id=0)),
        "AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM", SEQ2SEQ, {"labels": torch.ones(1, 4, dtype=torch.int64)}, (),
    ),
    "bert, masked": (
        lambda: tf.BertForMaskedLM(tf.BertConfig(**SIZES)), "AutoModelForMaskedLM", None, IDS, EACH, (),
    ),
    "wav2vec2, ctc": (
        lambda: tf.Wav2Vec2ForCTC(tf.Wav2Vec2Config(**WAV2VEC2)),
        "AutoModelForCTC", None, SOUND, {"labels": torch.tensor([[3, 4]])}, (),
    ),
    "wav2vec2, classes": (
        lambda: tf.Wav2Vec2ForSequenceClassification(tf.Wav2Vec2Config(**WAV2VEC2)),
        "AutoModelForAudioClassification", None, SOUND, ONE, (),
    ),
    "whisper": (
        lambda: tf.WhisperForConditionalGeneration(tf.WhisperConfig(**WHISPER)),
        "AutoModelForSpeechSeq2Seq", None, FEATURES, {"labels": torch.ones(1, 4, dtype=torch.int64)}, (),
    ),
    "vit": (
        lambda: tf.ViTForImageClassification(tf.ViTConfig(**VISION)),
        "AutoModelForImageClassification", None, PIXELS, ONE, (),
    ),
    "vit, features": (lambda: tf.ViTModel(tf.ViTConfig(**VISION)), "AutoModel", None, PIXELS, {}, ()),
    "llava": (
        lambda: tf.LlavaForConditionalGeneration(tf.LlavaConfig(**LLAVA)), "AutoModelForImageTextToText", None,
        {"input_ids": torch.tensor([[3, 4, *[9] * 5, 5, 6]]), **PIXELS},
        {"labels": torch.ones(1, 9, dtype=torch.int64)}, (),
    ),
}  # fmt: skip


def first_output(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return next(value for value in model.eval()(**inputs).values() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("case", CASES)
def test_head(case: str, tmp_path: Path) -> None:
    make, auto_class, task_type, inputs, labels, head = CASES[case]
    torch.manual_seed(0)
    source = make().eval()
    source.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    plan = plan_quantize(str(tmp_path / "model"), build_config({"bits": 4, "rank": 4}))
    assert [f"`{name}`" in note for note in plan.notes if "in the adapter" in note for name in head] == [True] * len(
        head
    )
    report = quantize(tmp_path / "model", out, bits=4, rank=4, iters=1, format="dense", device="cpu")
    assert (report["load"]["auto_class"], report["adapter_config"]["task_type"]) == (auto_class, task_type)
    assert verify(out, str(tmp_path / "model")).violations == ()
    assert not {row["name"].split(".")[0] for row in report["weights"]} & {*head, "classifier", "lm_head", "projector"}

    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        exec("\n".join(load_lines(report, str(out))), names)
    model = names["model"]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert {name.split(".")[2] for name in trained} == set(head)
    for name, parameter in trained.items():  # PEFT's copy is the source's head
        path = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
        assert torch.equal(parameter, source.get_parameter(path)), name
    untouched = {row["name"] for row in report["skipped"]}
    stored, sources = load_file(out / "model.safetensors"), load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(stored[name], sources[name]) for name in untouched)

    assert first_output(model, inputs).isfinite().all()
    if labels:  # without dropout, so that the loss must fall
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        losses = []
        for _ in range(3):
            loss = model(**inputs, **labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert all("lora_" in name or name in trained for name in changed)
        assert {name.split(".")[2] for name in changed if "lora_" not in name} == set(head)
        assert any("lora_" in name for name in changed)

    model.save_pretrained(tmp_path / "trained")
    base = getattr(tf, auto_class).from_pretrained(out)
    again = PeftModel.from_pretrained(base, tmp_path / "trained")
    assert torch.equal(first_output(again, inputs), first_output(model, inputs))


def test_a_head_that_the_source_lacks_is_not_asked_of_the_adapter(tmp_path: Path) -> None:
    """As of a model that was trained for something else: its head is random when it is loaded, and PEFT lets it be."""
    tf.BertForSequenceClassification(tf.BertConfig(**SIZES)).save_pretrained(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("classifier")}
    save_file(kept, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    report = quantize(tmp_path / "model", tmp_path / "out", bits=4, rank=4, format="dense", device="cpu")
    assert report["adapter_config"]["task_type"] is None
    names: dict[str, Any] = {}
    exec("\n".join(load_lines(report, str(tmp_path / "out"))), names)
    assert names["model"](**IDS, **ONE).loss.isfinite()


def test_a_head_of_a_run_that_is_stopped_is_there_after_resume(tmp_path: Path) -> None:
    tf.BertForSequenceClassification(tf.BertConfig(**SIZES)).save_pretrained(tmp_path / "model")
    options: dict[str, Any] = {"bits": 4, "rank": 4, "format": "dense", "device": "cpu"}

    def stop(name: str, _: int) -> None:
        if "layer.1" in name:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(tmp_path / "model", tmp_path / "out", progress=stop, **options)
    resumed = quantize(tmp_path / "model", tmp_path / "out", resume=True, **options)
    assert resumed["files"] == quantize(tmp_path / "model", tmp_path / "whole", **options)["files"]
    adapter = load_file(tmp_path / "out" / "loftq_init" / "adapter_model.safetensors")
    source = load_file(tmp_path / "model" / "model.safetensors")
    assert torch.equal(adapter["base_model.model.classifier.weight"], source["classifier.weight"])


def test_verify_compares_the_head_in_the_adapter_with_the_source(tmp_path: Path) -> None:
    """A report that was made to agree does not hide what is wrong with it."""
    torch.manual_seed(0)
    tf.BertForSequenceClassification(tf.BertConfig(**SIZES)).save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    quantize(tmp_path / "model", out, bits=4, rank=4, format="dense", device="cpu")
    assert verify(out, str(tmp_path / "model")).violations == ()
    file = out / "loftq_init" / "adapter_model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    tensors["base_model.model.classifier.weight"][1, 2] += 1
    save_file(tensors, file, metadata)
    report = json.loads((out / "loftq_report.json").read_text())
    report["files"]["loftq_init/adapter_model.safetensors"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (out / "loftq_report.json").write_text(json.dumps(report))
    assert verify(out).violations == ()
    (violation,) = verify(out, str(tmp_path / "model")).violations
    assert "`base_model.model.classifier.weight`" in violation
    assert "is not the source's" in violation
