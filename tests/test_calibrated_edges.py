"""Calibrated methods where something is missing: nothing held out, weights of zeros, what is in no file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel
from typer.testing import CliRunner

from loftq_cli import finishing, pipeline, windows
from loftq_cli.calibration import activations
from loftq_cli.calibration.text import Calibration
from loftq_cli.cli import app
from loftq_cli.errors import LoftqError
from loftq_cli.verify import verify
from loftq_cli.windows import prepare
from tests.test_blocks import BART, options, speaking, text  # noqa: F401
from tests.test_eval import save_tokenizer


def test_without_held_out_samples_a_finish_is_told_and_shown(speaking: Path, text: Path, tmp_path: Path) -> None:  # noqa: F811
    """Of text of one window nothing is held out: no figures, not zeros; also after a finish, and in the tables."""
    short = tmp_path / "short.txt"
    short.write_text(text.read_text()[:60])
    one = options(short, method="cloq", samples=1, seqlen=32, finish_epochs=1)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in one.items()]
    result = CliRunner().invoke(app, ["quantize", *flags, str(speaking), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "loftq_report.json").read_text())
    assert report["calibration"]["held_out"] == 0
    assert "output_error" in report["weights"][0]
    assert "held_out_output_error" not in report["weights"][0]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "–" in card
    fit = report["calibration"]["finish"]
    gained = f"{fit['before']:.4g} → {fit['after']:.4g}" if fit["after"] < fit["before"] else "no gain"
    for told in (result.output, card):
        assert f"inish on the text itself, for want of any held out: {gained}" in told
    assert "calibrating on 1 × 32 tokens of" in result.output
    assert "no text reached" not in result.output


def test_a_weight_of_zeros_stays_zero(speaking: Path, text: Path, tmp_path: Path) -> None:  # noqa: F811
    """As blocks that were added to a trained model begin."""
    model = tf.AutoModelForCausalLM.from_pretrained(speaking)
    model.model.layers[1].mlp.down_proj.weight.data.zero_()
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    for method in ("apiq-lw", "apiq-bw"):
        report = pipeline.quantize(
            tmp_path / "model", tmp_path / method, **options(text, method=method, epochs=1, finish_epochs=1)
        )
        (row,) = [row for row in report["weights"] if row["name"].endswith("1.mlp.down_proj")]
        assert row["relative_error_without_adapter"] == 0
        assert verify(tmp_path / method, str(tmp_path / "model")).violations == ()


def test_text_that_the_model_cannot_take(
    speaking: Path,  # noqa: F811
    text: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(LoftqError, match="positions"):
        pipeline.quantize(speaking, tmp_path / "out", **options(text, method="qera", seqlen=100_000))
    model = tf.AutoModelForCausalLM.from_pretrained(speaking)
    model.resize_token_embeddings(20)
    model.save_pretrained(tmp_path / "small")
    save_tokenizer(tmp_path / "small")
    with pytest.raises(LoftqError, match="the model knows 20 tokens"):
        pipeline.quantize(tmp_path / "small", tmp_path / "out", **options(text, method="qera"))
    judges = Calibration(torch.zeros(12, 32, dtype=torch.int64), torch.full((1, 32), 300), None)
    monkeypatch.setattr(windows, "token_batches", lambda *_: judges)
    with pytest.raises(LoftqError, match="says 300, and the model knows 300 tokens"):
        pipeline.quantize(speaking, tmp_path / "out", **options(text, method="qera"))
    assert not (tmp_path / "out").exists()


def test_a_finish_needs_the_whole_model(speaking: Path, text: Path, tmp_path: Path) -> None:  # noqa: F811
    config = tf.BertConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, vocab_size=300
    )
    tf.BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "model")
    saved = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**saved, "architectures": ["BertForMaskedLM"]}))
    save_tokenizer(tmp_path / "model")
    with pytest.raises(LoftqError, match="is in no file, so what the model says is not known"):
        pipeline.quantize(tmp_path / "model", tmp_path / "out", **options(text, method="qera", finish_epochs=1))
    pipeline.quantize(tmp_path / "model", tmp_path / "out", **options(text, method="qera"))


def test_divergence_is_that_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finishing, "LOGIT_TOKENS", 4)
    ours, theirs = torch.randn(2, 5, 30, requires_grad=True), torch.randn(2, 5, 30)
    wanted = torch.nn.functional.kl_div(
        ours.double().log_softmax(-1).flatten(0, 1), theirs.double().log_softmax(-1).flatten(0, 1),
        reduction="batchmean", log_target=True,
    )  # fmt: skip
    found = finishing.divergence(ours, theirs)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    gradients = [torch.autograd.grad(loss, ours)[0] for loss in (found, wanted)]
    assert torch.allclose(*gradients, atol=1e-6)


def test_a_container_has_no_more_memory_than_it_may_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "CGROUP", tmp_path)
    free = activations.available_bytes()
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert activations.available_bytes() == pytest.approx(free, rel=0.2)
    (tmp_path / "memory.max").write_text("5000\n")
    assert activations.available_bytes() == 4000


HEADS: dict[str, tuple[Any, dict[str, Any], tuple[str, ...]]] = {
    "an answer's begin and end": (tf.BertForQuestionAnswering, {}, ("start_logits", "end_logits")),
    "one number": (tf.BertForSequenceClassification, {"num_labels": 1}, ("logits",)),
    "labels of their own": (
        tf.BertForSequenceClassification, {"num_labels": 3, "problem_type": "multi_label_classification"}, ("logits",)
    ),
    "a decoder without padding": (tf.LlamaForSequenceClassification, {"num_labels": 3}, ("logits",)),
}  # fmt: skip


@pytest.mark.parametrize("head", HEADS)
def test_a_finish_brings_every_output_closer(head: str, text: Path, tmp_path: Path) -> None:  # noqa: F811
    """Measured on source and loaded model, by what the outputs are: distributions, or numbers."""
    cls, more, names = HEADS[head]
    torch.manual_seed(0)
    config = cls.config_class(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=300,
        max_position_embeddings=64, pad_token_id=None, **more,
    )  # fmt: skip
    source = cls(config)
    with torch.no_grad():
        for parameter in source.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    source.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    asked = options(text, method="qera", finish_epochs=12, finish_lr=2e-3, samples=32)
    tokens = prepare(pipeline.plan_quantize(str(tmp_path / "model"), pipeline.build_config(asked)), 1).tokens
    source.eval().config.pad_token_id = loaded_pad = -1
    apart = []
    for epochs in (0, 12):
        out = tmp_path / str(epochs)
        rest = {} if epochs else {"finish_epochs": 0, "finish_lr": 5e-4}
        report = pipeline.quantize(tmp_path / "model", out, **{**asked, **rest})
        base = cls.from_pretrained(out, dtype=torch.float32)
        base.config.pad_token_id = loaded_pad
        model = PeftModel.from_pretrained(base, out, subfolder="loftq_init").eval()
        with torch.no_grad():
            theirs, ours = source(tokens), model(tokens)
        numbers = more.get("num_labels") == 1 or "problem_type" in more
        both = [[said[name] if numbers else said[name].softmax(-1) for name in names] for said in (ours, theirs)]
        apart.append([float((one - other).norm() / other.norm()) for one, other in zip(*both, strict=True)])
    assert 0 < report["calibration"]["finish"]["after"] < report["calibration"]["finish"]["before"]
    for before, after in zip(*apart, strict=True):
        assert after < 0.9 * before


@pytest.mark.parametrize(
    ("name", "shape", "problem", "numbers"),
    [
        ("logits", (2, 5, 30), None, False),  # words, or kinds of tokens
        ("logits", (2, 3), None, False),
        ("logits", (2, 5), "single_label_classification", False),
        ("logits", (2, 3), "multi_label_classification", True),
        ("logits", (2, 1), None, True),
        ("logits", (2, 5), None, True),  # Electra's: whether each token was replaced
        ("start_logits", (2, 5), None, False),
        ("relevance_logits", (2,), None, True),  # of DPR's reader
        ("mc_logits", (2,), "single_label_classification", True),
        ("first", (2, 5, 30), None, True),  # hidden states
        ("first", (2, 5, 30), "single_label_classification", True),
    ],
)
def test_what_is_a_distribution(name: str, shape: tuple[int, ...], problem: str | None, numbers: bool) -> None:
    assert finishing.are_numbers(name, torch.zeros(shape), torch.Size((2, 5)), problem) == numbers


def test_a_head_that_refuses_the_text_is_told(speaking: Path, text: Path, tmp_path: Path) -> None:  # noqa: F811
    """BART's classifiers want as many EOS in every sample."""
    torch.manual_seed(0)
    config = tf.BartConfig(**BART, num_labels=3, eos_token_id=7)
    tf.BartForSequenceClassification(config).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    with pytest.raises(LoftqError, match="the model as a whole cannot be run on text by itself: ValueError") as refused:
        pipeline.quantize(tmp_path / "model", tmp_path / "out", **options(text, method="qera", finish_epochs=1))
    assert "--finish-epochs" in refused.value.hint


def test_a_finish_of_a_large_model_holds_no_block_s_matrices(
    speaking: Path,  # noqa: F811
    text: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not those with bits, nor those that are skipped; and what is kept of a small one are the same numbers."""
    asked = options(text, method="cloq", finish_epochs=1, skip=("*.layers.[01].mlp.*",))
    kept = pipeline.quantize(speaking, tmp_path / "kept", **asked)["files"]
    there: list[bool] = []
    original = finishing.train

    def watched(groups: Any, batches: Any, held_out: Any, loss_of: Any, *more: Any) -> Any:
        def loss(rows: slice) -> torch.Tensor:
            there.extend(
                p.is_meta for stack in stream.stacks for b in stack.blocks for p in b.parameters() if p.ndim > 1
            )
            return loss_of(rows)

        return original(groups, batches, held_out, loss, *more)

    def streaming(given: Any, *more: Any) -> Any:
        nonlocal stream
        stream = given
        return lively(given, *more)

    stream: Any = None
    lively = finishing.live_blocks
    monkeypatch.setattr(finishing, "KEPT_BYTES", 0)
    monkeypatch.setattr(finishing, "live_blocks", streaming)
    monkeypatch.setattr(finishing, "train", watched)
    assert pipeline.quantize(speaking, tmp_path / "read", **asked)["files"] == kept
    assert there
    assert all(there)
