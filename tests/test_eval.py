"""`loftq eval`: perplexities beside a plain loop in float64 over models that transformers and PEFT load themselves."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from loftq_cli import evaluate as evaluation
from loftq_cli import quantize
from loftq_cli.cli import app
from loftq_cli.errors import LoftqError
from loftq_cli.evaluate import cut, evaluate, sum_nll
from tests.conftest import save_llama

TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune, " * 3  # 273 bytes
BOS, SEQLEN = 257, 32
FORMATS = {"dense": (), "bnb": ("bitsandbytes",), "gptq": ("gptqmodel", "optimum")}


def save_tokenizer(folder: Path, bos: bool = True) -> None:
    """One token a byte, whatever the text, and BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = Tokenizer(models.BPE(vocab={**words, "<unk>": 256, "<s>": BOS}, merges=[], unk_token="<unk>"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"bos_token": "<s>"} if bos else {}
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", **special).save_pretrained(folder)


@pytest.fixture(autouse=True, scope="module")
def uncompiled() -> Iterator[None]:
    """gptqmodel's compilation takes 15 seconds; tests/test_formats.py lets it."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_llama(tmp_path_factory.mktemp("eval") / "model")
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def out(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval") / "out"
    quantize(model, folder, bits=2, format="dense", rank=8, iters=1, device="cpu")
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def loaded(folder: Path, adapter: bool = False) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder)
    return (PeftModel.from_pretrained(base, folder, subfolder="loftq_init") if adapter else base).eval()


def plain_nll(model: Any, folder: Path, seqlen: int = SEQLEN, bos: bool = True) -> tuple[int, float]:
    """(predicted tokens, mean) of windows cut from TEXT, token by token, in float64."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(TEXT).input_ids
    assert len(ids) == len(TEXT)  # one token a byte, no BOS of the tokenizer's own
    step = seqlen - bos
    losses = []
    for start in range(0, len(ids) - step + 1, step):
        window = [BOS] * bos + ids[start : start + step]
        with torch.no_grad():
            logits = model(torch.tensor([window])).logits[0].double()
        for k in range(1, seqlen):
            losses.append(float(torch.logsumexp(logits[k - 1], 0) - logits[k - 1, window[k]]))
    return len(losses), sum(losses) / len(losses)


def loftq(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("format", FORMATS)
def test_every_row_is_what_a_plain_loop_gives(format: str, model: Path, text: Path, tmp_path: Path) -> None:
    for package in FORMATS[format]:
        pytest.importorskip(package)
    from transformers import AutoTokenizer

    out = tmp_path / "out"
    bits = 4 if format == "bnb" else 2
    quantize(model, out, bits=bits, format=format, rank=8, iters=1, device="cpu")
    flags = ["--seqlen", SEQLEN, "--device=cpu", "--json", "--card"]
    ran = loftq("eval", out, "--text", text, "--source", model, *flags)
    assert ran.exit_code == 0, ran.stderr
    told = json.loads(ran.stdout)
    card = (out / "README.md").read_text()
    assert "## Perplexity on `text.txt`" in card
    for row in told["rows"]:
        assert f"| {row['name']} | {row['nll']:.4f} | {row['perplexity']:.6g} |" in card
    assert told.keys() == {"tokens", "windows", "seqlen", "protocol", "rows", "notes"}
    assert told["notes"] == []
    rows = {row["name"]: row for row in told["rows"]}
    assert list(rows) == ["source", "base alone", "base + adapter"]
    models = {"source": loaded(model), "base alone": loaded(out), "base + adapter": loaded(out, adapter=True)}
    means = {}
    for name, row in rows.items():
        count, means[name] = plain_nll(models[name], out)
        assert (told["tokens"], told["windows"], told["seqlen"]) == (count, count // (SEQLEN - 1), SEQLEN)
        assert row["nll"] == pytest.approx(means[name], rel=1e-5)
        assert row["perplexity"] == pytest.approx(math.exp(means[name]), rel=1e-4)
    base = loaded(out)  # never seen by PEFT
    windows = cut(AutoTokenizer.from_pretrained(out)(TEXT).input_ids, BOS, SEQLEN)
    with torch.no_grad():  # with gradients bitsandbytes computes another way
        total = sum(sum_nll(base, base, window[None]) for window in windows)
    assert total / count == rows["base alone"]["nll"]
    assert min(abs(a - b) for k, a in means.items() for n, b in means.items() if k < n) > 1e-3  # they can be told apart


def test_a_trained_adapter_is_measured_beside_the_one_that_it_began_as(out: Path, text: Path, tmp_path: Path) -> None:
    trained = loaded(out, adapter=True)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.5)
    trained.save_pretrained(tmp_path / "adapter")
    flags = ("--seqlen", SEQLEN, "--device=cpu", "--json", "--adapter")
    ran = loftq("eval", out, "--text", text, *flags, tmp_path / "adapter")
    assert ran.exit_code == 0, ran.stderr
    rows = {row["name"]: row["nll"] for row in json.loads(ran.stdout)["rows"]}
    assert [*rows] == ["base alone", "base + adapter", "base + trained adapter"]
    assert rows["base + trained adapter"] == pytest.approx(plain_nll(trained.eval(), out)[1], rel=1e-5)
    began = plain_nll(loaded(out, adapter=True), out)[1]
    assert rows["base + adapter"] == pytest.approx(began, rel=1e-5) != rows["base + trained adapter"]
    refused = loftq("eval", out, "--text", text, *flags, out)
    assert refused.exit_code == 1
    assert "no adapter_config.json" in refused.stderr.replace("\n", " ")


def test_the_table_says_how(out: Path, text: Path) -> None:
    ran = loftq("eval", out, "--text", text, "--seqlen", SEQLEN, "--device=cpu", "-q")
    assert ran.exit_code == 0, ran.stderr
    assert ran.stderr == ""
    assert "source" not in ran.stdout
    _, mean = plain_nll(loaded(out), out)
    printed = next(line for line in ran.stdout.splitlines() if "base alone" in line).split("│")
    assert float(printed[2]) == pytest.approx(mean, rel=1e-5)
    assert f"{len(TEXT) // 31 * 31} predicted tokens in 8 windows of 32 tokens" in ran.stdout
    assert "each begun with BOS" in ran.stdout


def test_neither_chunks_nor_batches_nor_a_model_without_logits_to_keep_change_anything(
    out: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM, LlamaModel

    heads, bodies = [], []
    whole = evaluate(out, text, seqlen=SEQLEN, device="cpu").rows
    with monkeypatch.context() as patch:
        head, body = torch.nn.functional.linear, LlamaModel.forward
        patch.setattr(evaluation, "LOGIT_BYTES", 3 * 5 * 512 * 4)  # five tokens of three windows at a time

        def watch(*args: Any, **kwargs: Any) -> Any:
            result = head(*args, **kwargs)
            heads.append(result.numel() if result.shape[-1] == 512 else 0)
            return result

        def count(*args: Any, **kwargs: Any) -> Any:
            bodies.append(1)
            return body(*args, **kwargs)

        patch.setattr(torch.nn.functional, "linear", watch)
        patch.setattr(LlamaModel, "forward", count)
        pieces = evaluate(out, text, seqlen=SEQLEN, batch_size=3, device="cpu").rows
    assert max(heads) == 3 * 5 * 512
    assert len(bodies) == 2 * 3  # 8 windows in batches of 3, for two rows: once each, however many chunks
    forward = LlamaForCausalLM.forward
    monkeypatch.setattr(LlamaForCausalLM, "forward", lambda self, input_ids, **_: forward(self, input_ids))
    plain = evaluate(out, text, seqlen=SEQLEN, device="cpu").rows
    for other in (pieces, plain):
        assert [row.nll for row in other] == pytest.approx([row.nll for row in whole], rel=1e-6)


def test_windows() -> None:
    ids = list(range(10))
    assert cut(ids, 99, 4).tolist() == [[99, 0, 1, 2], [99, 3, 4, 5], [99, 6, 7, 8]]
    assert cut(ids, None, 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert cut(ids, 99, 64).tolist() == [[99, *ids]]  # incomplete, but the only one
    assert cut(ids, 99, 11).tolist() == [[99, *ids]]


def test_without_bos_and_up_to_the_models_length(out: Path, text: Path, tmp_path: Path) -> None:
    plain = shutil.copytree(out, tmp_path / "plain")
    save_tokenizer(plain, bos=False)
    measured = evaluate(plain, text, device="cpu")
    assert (measured.seqlen, measured.windows, measured.tokens) == (128, 2, 254)  # the model has 128 positions
    assert "without BOS" in measured.protocol
    assert measured.rows[0].nll == pytest.approx(plain_nll(loaded(plain), plain, 128, bos=False)[1], rel=1e-5)
    assert evaluate(out, text, device="cpu", max_tokens=40).tokens == 40


def test_jsonl_is_the_texts_with_blank_lines_between(out: Path, tmp_path: Path) -> None:
    lines, plain = tmp_path / "lines.jsonl", tmp_path / "plain.txt"
    lines.write_text('{"text": "some\u2028words"}\n\n{"id": 2, "text": "and more"}\n')
    plain.write_text("some\u2028words\n\nand more")
    assert evaluate(out, lines, device="cpu") == evaluate(out, plain, device="cpu")
    lines.write_text('{"text": "some"}\n{"content": "words"}\n')
    with pytest.raises(LoftqError, match="line 2"):
        evaluate(out, lines, device="cpu")


def test_conversations_are_measured_in_the_chat_template(out: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = shutil.copytree(out, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    tokenizer.save_pretrained(folder)
    said = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "Whose?"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": said}))
    (tmp_path / "plain.txt").write_text(f"[user] {TEXT}\n[assistant] Whose?\n")
    rows = [evaluate(folder, tmp_path / name, seqlen=SEQLEN, device="cpu").rows for name in ("chat.jsonl", "plain.txt")]
    assert rows[0] == rows[1]


def test_a_source_that_is_another_model_is_said(out: Path, text: Path, tmp_path: Path) -> None:
    other = save_llama(tmp_path / "other", num_hidden_layers=1)
    ran = loftq("eval", out, "--text", text, "--source", other, "--device=cpu", "--json")
    assert "fingerprint differs" in json.loads(ran.stdout)["notes"][0]
    assert "fingerprint differs" in ran.stderr.replace("\n", " ")
    small = save_llama(tmp_path / "small", vocab_size=100)
    with pytest.raises(LoftqError, match="knows 100 tokens"):
        evaluate(out, text, str(small), device="cpu")


def test_beyond_what_a_float_holds(out: Path, text: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    wild = shutil.copytree(out, tmp_path / "wild")
    tensors = load_file(wild / "model.safetensors")
    tensors["lm_head.weight"] *= 1e5
    save_file(tensors, wild / "model.safetensors", metadata={"format": "pt"})
    ran = loftq("eval", wild, "--text", text, "--device=cpu", "--json")
    row = json.loads(ran.stdout)["rows"][0]
    assert row["nll"] > 1000
    assert row["perplexity"] is None
    assert "Infinity" not in ran.stdout
    shown = loftq("eval", wild, "--text", text, "--device=cpu").stdout
    assert "inf" in shown
    assert f"{row['nll']:.6f}" in shown


def edit_report(out: Path, **load: Any) -> None:
    report = json.loads((out / "loftq_report.json").read_text())
    report["load"] |= load
    (out / "loftq_report.json").write_text(json.dumps(report))


def strip_tokenizer(out: Path) -> None:
    for file in out.glob("tokenizer*"):
        file.unlink()


REFUSALS = {
    "no tokenizer": (strip_tokenizer, (), "has no tokenizer"),
    "empty text": (lambda out: (out / "t.txt").write_text(""), (), "too short"),
    "no text": (lambda out: (out / "t.txt").unlink(), (), "No such file"),
    "not UTF-8": (lambda out: (out / "t.txt").write_bytes(b"ab\xff"), (), "invalid start byte at byte 2"),
    "conversations": (
        lambda out: (out / "t.jsonl").write_text('{"messages": [{"role": "user", "content": "Why?"}]}'),
        ("--text={out}/t.jsonl",), "no chat template",
    ),
    "not a causal LM": (lambda out: edit_report(out, auto_class="AutoModelForSeq2SeqLM"), (), "AutoModelForSeq2SeqLM"),
    "missing package": (lambda out: edit_report(out, requirements=["absent-pkg>=7"]), (), "pip install transformers"),
    "old package": (lambda out: edit_report(out, requirements=["torch>=99"]), (), "needs torch>=99"),
    "no output": (lambda out: (out / "loftq_report.json").unlink(), (), "has no `loftq_report.json`"),
    "too long": (lambda out: None, ("--seqlen=129",), "128 positions"),
    "no such source": (lambda out: None, ("--source=./absent",), "no such folder"),
    "no weight": (lambda out: (out / "config.json").write_text(
        (out / "config.json").read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    ), (), "at random"),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSALS)
def test_refusals(reason: str, out: Path, tmp_path: Path) -> None:
    spoil, options, said = REFUSALS[reason]
    folder = shutil.copytree(out, tmp_path / "out")
    (folder / "t.txt").write_text(TEXT)
    spoil(folder)
    options = [option.format(out=folder) for option in options]
    ran = loftq("eval", folder, "--text", folder / "t.txt", "--device=cpu", *options)
    assert ran.exit_code == 1, ran.stderr
    assert ran.stdout == ""
    assert said in ran.stderr.replace("\n", " ")
    assert "unexpected" not in ran.stderr


def test_an_unfinished_output_is_refused_as_verify_does(out: Path, text: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(out, tmp_path / "out")
    (folder / ".loftq").mkdir()
    from loftq_cli.journal import JOURNAL_FILE

    (folder / ".loftq" / JOURNAL_FILE).write_text("")
    ran, verified = loftq("eval", folder, "--text", text), loftq("verify", folder)
    assert ran.exit_code == verified.exit_code == 1
    assert ran.stderr == verified.stderr
    assert "unfinished" in ran.stderr


@pytest.mark.parametrize("option", ["--device=gpu", "--seqlen=1", "--batch-size=0", "--max-tokens=0", "--text"])
def test_bad_options_exit_with_2(option: str, out: Path, text: Path) -> None:
    assert loftq("eval", out, "--text", text, option).exit_code == 2
