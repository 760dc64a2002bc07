"""Calibration text: windows of the text's own tokens, the same for the same seed, and refusals that name the place."""

from __future__ import annotations

import json
import re
import sys
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from loftq_cli.calibration import sources
from loftq_cli.calibration import text as module
from loftq_cli.calibration.sources import read_texts
from loftq_cli.calibration.text import token_batches
from loftq_cli.errors import LoftqError

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CHAT = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}{{ eos_token }}"


def byte_tokenizer(**options: str) -> PreTrainedTokenizerFast:
    """One token a byte, so that decoding gives back every character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


PLAIN, MARKED = byte_tokenizer(), byte_tokenizer(**SPECIAL)


def numbered(paragraphs: int) -> str:
    """Paragraphs of 50 characters that are all different."""
    return "".join(f"Paragraph {i:06} says what none of the rest says\n\n" for i in range(paragraphs))


def decoded(tokenizer: PreTrainedTokenizerFast, windows: torch.Tensor) -> list[str]:
    return [tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in windows]


class Counting:
    """A tokenizer that counts the characters it is given."""

    def __init__(self) -> None:
        self.characters, self.bos_token_id, self.eos_token_id = 0, None, None

    def __call__(self, strings: list[str], **options: Any) -> dict[str, list[list[int]]]:
        self.characters += sum(map(len, strings))
        return {"input_ids": [[ord(c) for c in string[::4]] for string in strings]}  # about as English has


def test_same_seed_same_bytes_and_global_state_does_not_matter() -> None:
    texts = [numbered(2000)]
    torch.manual_seed(1)
    first = token_batches(texts, MARKED, 16, 64, seed=7)
    state = torch.get_rng_state()
    again = token_batches(texts, MARKED, 16, 64, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    other = token_batches(texts, MARKED, 16, 64, seed=8)
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.held_out, again.held_out)
    assert not torch.equal(first.tokens, other.tokens)
    assert first.tokens.dtype == first.held_out.dtype == torch.int64
    assert first.tokens.shape == (16, 64)
    assert first.held_out.shape == (1, 64)
    assert first.note is None


@given(
    paragraphs=st.integers(0, 300),
    samples=st.integers(1, 40),
    seqlen=st.integers(2, 200),
    seed=st.integers(0, 2**63),
    marked=st.booleans(),
    stretch=st.sampled_from([2, 16]),
)
def test_windows_are_disjoint_parts_of_the_text(
    paragraphs: int, samples: int, seqlen: int, seed: int, marked: bool, stretch: int
) -> None:
    tokenizer, text = (MARKED if marked else PLAIN), numbered(paragraphs)
    body = seqlen - marked
    if len(text) < body:
        with pytest.raises(LoftqError, match=f"has {len(text)} tokens"):
            token_batches([text], tokenizer, samples, seqlen, seed)
        return
    with mock.patch.object(module, "_STRETCH_CHARACTERS", stretch):  # 2: hardly more than one window a stretch
        made = token_batches([text], tokenizer, samples, seqlen, seed)
    windows = torch.cat([made.tokens, made.held_out])
    held, possible = max(1, samples // 16), len(text) // body
    assert len(windows) == min(samples + held, possible)
    assert len(made.held_out) == (held if possible >= samples + held else min(max(possible - samples, 1), possible - 1))
    assert (made.note is None) == (possible >= samples + held)
    assert not marked or set(windows[:, 0].tolist()) == {tokenizer.bos_token_id}
    left = list(text)
    if body >= 60:  # any 60 characters hold a number that is there once
        for string in decoded(tokenizer, windows[:, int(marked) :]):
            begin = text.index(string)
            assert "" not in left[begin : begin + body], "two windows overlap"
            left[begin : begin + body] = [""] * body


def test_short_text_says_what_there_was() -> None:
    made = token_batches([numbered(10)], PLAIN, 16, 100, 0)
    assert (len(made.tokens), len(made.held_out)) == (4, 1)
    assert made.note is not None
    assert "500 tokens" in made.note
    assert "1 of them held out" in made.note
    assert "1700 tokens" in made.note
    one = token_batches(["x" * 100], PLAIN, 16, 100, 0)
    assert (len(one.tokens), len(one.held_out)) == (1, 0)
    assert "none to judge by" in (one.note or "")


def test_refusals_of_sizes() -> None:
    with pytest.raises(LoftqError, match="has 50 tokens; a window of 64 takes 63") as caught:
        token_batches([numbered(1)], MARKED, 1, 64, 0)
    assert "--seqlen" in caught.value.hint
    with pytest.raises(LoftqError, match="has 0 tokens"):
        token_batches([" \n"], PLAIN, 1, 64, 0)
    for samples, seqlen in ((0, 8), (1, 1)):
        with pytest.raises(LoftqError, match="no window"):
            token_batches(["text"], MARKED, samples, seqlen, 0)


def test_eos_stands_between_texts_and_bos_before_windows() -> None:
    bos, eos = MARKED.bos_token_id, MARKED.eos_token_id
    made = token_batches(["abc", " ", "defg", "hi"], MARKED, 1, 12, 0)  # 9 letters and two EOS, all in one window
    assert made.tokens[0, 0] == bos
    assert decoded(MARKED, made.tokens[:, 1:]) == ["abc</s>defg</s>hi"]
    assert made.tokens[0].tolist().count(eos) == 2
    assert decoded(PLAIN, token_batches(["abc", "defg", "hi"], PLAIN, 1, 9, 0).tokens) == ["abcdefghi"]


def test_encoders_see_cls_and_sep() -> None:
    """As where they are used: CLS begins every window, SEP stands between texts and ends every window."""
    encoder = byte_tokenizer(cls_token="[CLS]", sep_token="[SEP]")
    made = token_batches(["abc", " ", "defg", "hi"], encoder, 1, 13, 0)  # 9 letters, and two SEP between them
    assert decoded(encoder, made.tokens) == ["[CLS]abc[SEP]defg[SEP]hi[SEP]"]
    made = token_batches([numbered(100)], encoder, 16, 64, 0)
    windows = torch.cat([made.tokens, made.held_out])
    assert windows.shape == (17, 64)
    assert set(windows[:, 0].tolist()) == {encoder.cls_token_id}
    assert set(windows[:, -1].tolist()) == {encoder.sep_token_id}
    assert not torch.isin(windows[:, 1:-1], windows[0, [0, -1]]).any()
    made = token_batches([numbered(10)], encoder, 16, 102, 0)
    assert (len(made.tokens), len(made.held_out)) == (4, 1)
    assert "1700 tokens" in (made.note or ""), "of the text: special ones are none of it"
    with pytest.raises(LoftqError, match="a window of 64 takes 62 and special ones"):
        token_batches([numbered(1)], encoder, 1, 64, 0)
    with pytest.raises(LoftqError, match="no window"):
        token_batches(["text"], encoder, 1, 2, 0)
    said = [{"role": "user", "content": "Why?"}]
    ended = byte_tokenizer(cls_token="[CLS]", sep_token="[SEP]", chat_template=CHAT.replace("eos", "sep"))
    made = token_batches([said, "plain"], ended, 1, 12 + 1 + 5 + 2, 0)
    assert decoded(ended, made.tokens) == ["[CLS][user] Why?\n[SEP]plain[SEP]"], "a SEP beside the template's own"


BOTH = {"cls_token": "[CLS]", "sep_token": "[SEP]"}
SAME = {"cls_token": "<s>", "sep_token": "</s>"}


@pytest.mark.parametrize(
    ("special", "adds", "window"),
    [
        ({**SPECIAL, **SAME}, ("<s>", "</s>"), "<s>ab</s>cd</s>"),  # RoBERTa
        ({**SPECIAL, **SAME}, ("</s>", ""), "<s>ab</s>cd"),  # XGLM, a decoder
        ({**SPECIAL, **BOTH}, ("[CLS]", "[SEP]"), "[CLS]ab[SEP]cd[SEP]"),  # BigBird
        ({**SPECIAL, **BOTH}, ("", ""), "<s>ab</s>cd"),
        ({"eos_token": "</s>"}, ("", "</s>"), "ab</s>cd</s>"),  # T5
        ({"eos_token": "</s>", "sep_token": "</s>"}, ("", ""), "ab</s>cd"),
        ({"cls_token": "[CLS]", "eos_token": "</s>"}, ("[CLS]", "</s>"), "[CLS]ab</s>cd</s>"),  # ESM
        ({"bos_token": "<s>"}, ("<s>", ""), "<s>abcd"),
    ],
)
def test_windows_have_what_the_tokenizer_adds(special: dict[str, str], adds: tuple[str, str], window: str) -> None:
    tokenizer = byte_tokenizer(**special)
    tokens = [(token, tokenizer.convert_tokens_to_ids(token)) for token in {*adds} - {""}]
    template = processors.TemplateProcessing(
        single=" ".join(filter(None, (adds[0], "$A", adds[1]))), special_tokens=tokens
    )
    tokenizer.backend_tokenizer.post_processor = template
    seqlen = len(re.sub(r"<[^>]*>|\[[A-Z]*\]", "_", window))
    assert decoded(tokenizer, token_batches(["ab", "cd"], tokenizer, 1, seqlen, 0).tokens) == [window]


def test_pieces_of_a_text_end_with_paragraphs_lines_or_words() -> None:
    for text, end in (
        ("ab cd ef.\n\n" * 99, "\n\n"),
        ("ab cd ef.\n" * 99, "\n"),
        ("ab cd" * 99, "ab"),
        ("a" * 999, "a"),
    ):
        stretches = module._stretches([text], 64)
        pieces = [text[piece.begin : piece.end] for stretch in stretches for piece in stretch]
        assert "".join(pieces) == text
        assert all(piece.endswith(end) and 32 <= len(piece) <= 64 for piece in pieces[:-1])


@pytest.mark.parametrize("texts", [[numbered(400_000)], [numbered(20)] * 20_000], ids=["one", "many"])
def test_of_a_huge_text_little_is_tokenized(texts: list[Any]) -> None:
    counting = Counting()
    made = token_batches(texts, counting, 128, 128, 0)  # type: ignore[arg-type]
    assert (len(made.tokens), len(made.held_out), made.note) == (128, 8, None)
    assert counting.characters < 2 * 4 * 136 * 128


def test_windows_come_from_all_over_the_text() -> None:
    made = token_batches([numbered(20_000)], PLAIN, 64, 100, 0)
    numbers = [int(re.findall(r"\d{6}", string)[0]) for string in decoded(PLAIN, made.tokens)]
    assert {number // 5000 for number in numbers} == {0, 1, 2, 3}


def test_chat_is_rendered_with_the_template(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": messages}) + "\n\n" + json.dumps({"text": "plain"}) + "\n")
    texts = read_texts(str(file))
    assert texts == [messages, "plain"]
    expected = "[user] Why?\n[assistant] Because.\n</s>plain"
    tokenizer = byte_tokenizer(**SPECIAL, chat_template=CHAT)
    made = token_batches(texts, tokenizer, 1, len(expected) - 3 + 1, 0)
    assert decoded(tokenizer, made.tokens) == ["<s>" + expected]
    chatml = byte_tokenizer(bos_token="[", eos_token="</s>", chat_template=CHAT)
    made = token_batches(texts, chatml, 1, len(expected) - 3 + 1, 0)
    assert decoded(chatml, made.tokens) == ["[" + expected], "BOS that marks a turn was taken for the text's own"
    turns = CHAT.replace("\n{% endfor %}{{ eos_token }}", "{{ eos_token }}\n{% endfor %}")  # as ChatML ends them
    said = "[user] Why?</s>\n[assistant] Because.</s>\n"
    ended = byte_tokenizer(**SPECIAL, chat_template=turns)
    made = token_batches([messages, messages, "plain"], ended, 1, 1 + 2 * (len(said) - 6) + 5, 0)
    assert decoded(ended, made.tokens) == ["<s>" + said + said + "plain"], "an EOS beside the template's own"
    with pytest.raises(LoftqError, match="no chat template"):
        token_batches(texts, MARKED, 1, 8, 0)
    picky = byte_tokenizer(**SPECIAL, chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(LoftqError, match=r"refuses the conversation .*Why.*roles must alternate"):
        token_batches(texts, picky, 1, 8, 0)


def test_prompts_and_completions_are_read_as_trl_trains_on_them(tmp_path: Path) -> None:
    asked, said = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
    rows = [{"prompt": "The sky is", "completion": " blue."}, {"prompt": [asked], "completion": [said]}]
    file = tmp_path / "pairs.jsonl"
    rows.append({"prompt": "a", "completion": "b", "messages": [asked]})
    file.write_text("\n".join(map(json.dumps, rows)))
    assert read_texts(str(file)) == ["The sky is blue.", [asked, said], [asked]]


def test_parts_of_a_message_that_are_text_are_joined(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Why"}, {"type": "text", "text": "?"}]
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": parts}]}))
    assert read_texts(str(file)) == [[{"role": "user", "content": "Why?"}]]
    file.write_text(json.dumps({"conversations": [{"from": "human", "value": parts}]}))
    assert read_texts(str(file)) == [[{"role": "user", "content": "Why?"}]]
    for content in ([*parts, {"type": "image"}], [*parts, {"type": "text"}], []):
        file.write_text(json.dumps({"messages": [{"role": "user", "content": content}]}))
        with pytest.raises(LoftqError, match="message 1 has no strings"):
            read_texts(str(file))


def test_conversations_of_sharegpt_are_messages(tmp_path: Path) -> None:
    turns = [("system", "Be brief."), ("human", "Why?"), ("chatgpt", "Because.")]
    said = [
        {"role": role, "content": turn[1]} for role, turn in zip(("system", "user", "assistant"), turns, strict=True)
    ]
    rows = [[{"from": speaker, "value": value} for speaker, value in turns], said]
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(json.dumps({"conversations": row}) for row in rows))
    assert read_texts(str(file)) == [said, said]
    file.write_text(json.dumps({"conversations": rows[0][1:], "system": "Be brief."}))
    assert read_texts(str(file)) == [said]
    file.write_text(json.dumps({"conversations": [*rows[0], {"from": "function_call", "value": "{}"}]}))
    with pytest.raises(LoftqError, match="message 4 has no strings"):
        read_texts(str(file))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt"}]}', "message 2 has no strings"),
        (b'{"conversations": "a"}', "neither"),
        (b'{"prompt": "half"}', "nor both `prompt` and `completion`"),
        (b'{"prompt": "half", "completion": [{"role": "user", "content": "a"}]}', "nor both"),
        (b"{not json}", "not JSON"),
        (b'{"text": "\xff"}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'["text"]', "neither"),
        (b'{"content": "x"}', "neither"),
        (b'{"text": 3}', "neither"),
        (b'{"messages": [{"role": "user"}]}', "message 1 has no strings"),
        (b'{"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": null}]}', "message 2 has no"),
        (b'{"text": "\\ud800"}', "surrogate"),
    ],
)
def test_jsonl_refusals_name_the_line(tmp_path: Path, line: bytes, words: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(LoftqError, match=rf"line 3 of .*{words}") as caught:
        read_texts(str(file))
    assert caught.value.hint


def test_fields_that_are_there_are_named(tmp_path: Path) -> None:
    of_alpaca = "it has `instruction` (str), `output` (str); make a `text` of them, as you train on them"
    file = tmp_path / "bad.jsonl"
    for row, hint in (({"text": 3}, "it has `text` (int)"), ({"instruction": "Add.", "output": "3"}, of_alpaca)):
        file.write_text(json.dumps(row))
        with pytest.raises(LoftqError) as caught:
            read_texts(str(file))
        assert caught.value.hint == hint


def test_plain_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "prose.txt"
    file.write_bytes(b"\xef\xbb\xbfOne\r\n\r\ntwo \xc3\xa9")
    assert read_texts("prose.txt") == ["One\n\ntwo é"]
    file.write_bytes(b"caf\xe9!")
    with pytest.raises(LoftqError, match=r"not UTF-8 text: .* at byte 3"):
        read_texts(str(file))
    file.write_text(" \n")
    with pytest.raises(LoftqError, match="no text in"):
        read_texts(str(file))
    (packed := tmp_path / "text.jsonl.gz").write_bytes(b"\x1f\x8b\x08")
    with pytest.raises(LoftqError) as refused:
        read_texts(str(packed))
    assert refused.value.hint == f"unpack it: gunzip -k {packed}"
    with pytest.raises(LoftqError, match="is a folder"):
        read_texts(str(tmp_path))
    for name in ("pros.txt", "./pros", "a/b/c", "~nobody_here/x"):
        with pytest.raises(LoftqError, match="no such file"):
            read_texts(name)
    with pytest.raises(LoftqError) as caught:
        read_texts("pros.txt")
    assert "did you mean `prose.txt`" in caught.value.hint


@pytest.mark.parametrize("suffix", [".json", ".CSV", ".tsv", ".parquet"])
def test_tables_are_not_read_as_prose(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"chat{suffix}"
    file.write_text('[{"messages": [{"role": "user", "content": "x"}]}]')
    with pytest.raises(LoftqError, match="not plain text") as caught:
        read_texts(str(file))
    assert ".jsonl" in caught.value.hint


def test_ndjson_is_jsonl(tmp_path: Path) -> None:
    (tmp_path / "chat.ndjson").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert read_texts(str(tmp_path / "chat.ndjson")) == ["one", "two"]


def fake_datasets(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[Any]:
    """The package `datasets` with a `load_dataset` that returns or raises `answer`; the calls to it."""
    calls: list[Any] = []

    def load_dataset(*args: Any, **options: Any) -> Any:
        calls.append((*args, options))
        if isinstance(answer, Exception):
            raise answer
        return iter(answer)

    exceptions = SimpleNamespace(DatasetsError=FileNotFoundError)
    packaged = SimpleNamespace(_PACKAGED_DATASETS_MODULES={"json": ()})
    fake = SimpleNamespace(load_dataset=load_dataset, exceptions=exceptions, packaged_modules=packaged)
    monkeypatch.setitem(sys.modules, "datasets", fake)  # type: ignore[arg-type]
    return calls


def test_datasets_are_streamed_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_datasets(monkeypatch, [{"text": "one"}, {"text": "two"}, {"text": "three"}, {"no": "text"}])
    monkeypatch.setattr(sources, "_STREAM_CHARACTERS", 9)
    assert read_texts("org/name") == ["one", "two", "three"]
    assert read_texts("name:config:test")
    assert read_texts("name::test")
    assert calls == [
        ("org/name", None, {"split": "train", "streaming": True}),
        ("name", "config", {"split": "test", "streaming": True}),
        ("name", None, {"split": "test", "streaming": True}),
    ]
    monkeypatch.setattr(sources, "_STREAM_CHARACTERS", 100)
    with pytest.raises(LoftqError, match="row 4 of the data set `org/name` has neither") as caught:
        read_texts("org/name")
    assert "`no`" in caught.value.hint
    with pytest.raises(LoftqError, match="colons"):
        read_texts("a:b:c:d")
    with pytest.raises(LoftqError, match="file format"):
        read_texts("json")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConnectionError("Couldn't reach 'x' on the Hub"), "cannot reach the Hub for the data set `org/name`"),
        (
            ValueError("Config name is missing.\nPick one of ['a', 'b']"),
            "Config name is missing. Pick one of ['a', 'b']",
        ),
        (FileNotFoundError("Dataset 'x' doesn't exist on the Hub"), "Dataset 'x' doesn't exist on the Hub"),
        (RuntimeError("https://signed?Signature=secret"), "`org/name`: RuntimeError"),
    ],
)
def test_what_datasets_raises_becomes_a_sentence(monkeypatch: pytest.MonkeyPatch, error: Exception, words: str) -> None:
    fake_datasets(monkeypatch, error)
    with pytest.raises(LoftqError, match=re.escape(words)) as caught:
        read_texts("org/name")
    assert "secret" not in caught.value.message
    assert caught.value.hint


def test_without_the_package_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # type: ignore[arg-type]
    with pytest.raises(LoftqError, match="takes the package `datasets`") as caught:
        read_texts("org/name")
    assert "pip install datasets" in caught.value.hint


def test_default_text_is_in_the_package_and_long_enough() -> None:
    texts = read_texts(None)
    file = resources.files("loftq_cli.calibration").joinpath("default.txt").read_text(encoding="utf-8")
    header, *works = file.split("\f")
    assert "public domain" in header
    assert texts == works
    assert header.count("\n- ") == len(works) == 4
    assert works[0].startswith("It is a truth universally acknowledged")
    assert "gutenberg" not in file.lower()
    assert file.isascii()
    assert '"loftq_cli.calibration" = ["default.txt"]' in (Path(__file__).parents[1] / "pyproject.toml").read_text()
    for samples, seqlen in ((128, 512), (128, 2048)):
        made = token_batches(texts, Counting(), samples, seqlen, 0)  # type: ignore[arg-type]
        assert len(made.tokens) == samples
        assert made.note is None
