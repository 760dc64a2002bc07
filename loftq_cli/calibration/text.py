"""Calibration text: read from a file, a data set or the package itself, and cut into windows of tokens."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loftq_cli.errors import ConfigError, LoftqError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_STREAM_CHARACTERS = 20_000_000  # of a data set: 1,000 windows of 4096 tokens, and some seconds of download
_STRETCH_CHARACTERS = 16  # for each token of a window: about four windows of English

Entry = str | list[dict[str, str]]  # a text, or a conversation as {role, content}


@dataclass(frozen=True)
class Calibration:
    """Windows of tokens, none of which overlaps another.

    Attributes:
        tokens: to calibrate on, int64 [samples, seqlen].
        held_out: to judge the result on, int64 [k, seqlen]; k is 0 where the text is one window long.
        note: a sentence for the user if there was less text than wanted.
    """

    tokens: Tensor
    held_out: Tensor
    note: str | None


@dataclass(frozen=True)
class _Piece:
    """Characters `begin` to `end` of one text, or a whole conversation."""

    entry: int
    begin: int
    end: int


def read_texts(source: str | None) -> list[Entry]:
    """Read the texts of `source`.

    Args:
        source: None for the text in the package; a file, `.jsonl` (`text` or `messages` in every line) or else plain
            UTF-8 text; or a data set, `name`, `name:config` or `name:config:split` (`train` unless given), of which the
            first 20 million characters are read.

    Raises:
        LoftqError: there is no such text, or it is not what it should be; the message names the line or row.
    """
    if source is None:
        return [*resources.files(__package__).joinpath("default.txt").read_text(encoding="utf-8").split("\f")[1:]]
    path = Path(os.path.expanduser(source))  # noqa: PTH111 - Path.expanduser raises on an unknown `~user`
    try:
        if path.is_dir():
            raise LoftqError(f"`{source}` is a folder", "give a text file, a .jsonl file or the name of a data set")
        if path.exists():
            texts = _read_jsonl(path) if path.suffix.lower() == ".jsonl" else _read_plain(path)
        else:
            texts = _read_dataset(source)
    except OSError as error:
        raise LoftqError(f"cannot read `{source}`: {error.strerror or error}") from error
    if not any(map(_length, texts)):
        raise LoftqError(f"there is no text in `{source}`", "give another source of calibration text")
    return texts


def token_batches(
    texts: list[Entry], tokenizer: PreTrainedTokenizerBase, samples: int, seqlen: int, seed: int
) -> Calibration:
    """Cut `texts` into windows of `seqlen` tokens; `samples` are to calibrate on, `max(1, samples // 16)` held out.

    Texts follow each other with the EOS id between them; a window begins with the BOS id, where the tokenizer has one.

    No more is tokenized than is needed: the texts are divided, without a look at their tokens, into stretches of about
    16 · seqlen characters, each a part of a long text that ends at a paragraph's end (else at a line's, else at a
    space), or a row of short texts. Stretches are tokenized in an order that the seed alone decides, so from all over
    the text, until they hold enough windows. Those that turn out to be neighbours are joined before they are cut, so
    that a text that is needed whole is used whole. The windows are then shuffled.

    Raises:
        LoftqError: the texts are shorter than a window, or hold conversations that the tokenizer cannot render.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    body = seqlen - len(bos)
    if samples < 1 or body < 1:
        raise ConfigError(f"no window can be made of {samples} samples of {seqlen} tokens", "give larger numbers")
    wanted = samples + max(1, samples // 16)
    texts = [text for text in texts if _length(text)]
    generator = torch.Generator().manual_seed(seed)
    stretches = _stretches(texts, _STRETCH_CHARACTERS * seqlen)
    order = torch.randperm(len(stretches), generator=generator).tolist()
    tokens: dict[int, Tensor] = {}
    windows = torch.empty(0, body, dtype=torch.int64)
    while len(windows) < wanted and len(tokens) < len(order):
        more = max(1, len(tokens) // 8 if tokens else wanted // 4)  # in proportion: cutting anew every time costs too
        chosen = order[len(tokens) : len(tokens) + more]
        tokens |= zip(chosen, _tokenize(texts, [stretches[i] for i in chosen], tokenizer), strict=True)
        windows = _windows(tokens, body)
    total = sum(map(len, tokens.values()))
    if not len(windows):
        raise LoftqError(
            f"the calibration text has {total} tokens; a window of {seqlen} takes {body}{' and its BOS' * len(bos)}",
            "give more text, or a smaller `--seqlen`",
        )
    got = f"the calibration text has {total} tokens, {len(windows)} windows of {seqlen}"
    note = f"{got}; wanted were {wanted * body} tokens, {wanted} windows" if len(windows) < wanted else None
    windows = windows[torch.randperm(len(windows), generator=generator)[:wanted]]
    windows = torch.cat([torch.tensor(bos, dtype=torch.int64).expand(len(windows), -1), windows], dim=1)
    used = min(samples, max(1, len(windows) - 1))
    return Calibration(windows[:used], windows[used:], note)


def _read_plain(path: Path) -> list[Entry]:
    try:
        return [path.read_text(encoding="utf-8-sig")]
    except UnicodeDecodeError as error:
        raise LoftqError(f"`{path}` is not UTF-8 text: {error.reason} at byte {error.start}", "convert it") from None


def _read_jsonl(path: Path) -> list[Entry]:
    texts = []
    with path.open("rb") as file:  # bytes, so that a line that is not UTF-8 can be named
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise LoftqError(f"line {number} of `{path}` is not JSON: {error}", "one JSON object a line") from None
            texts.append(_entry(row, f"line {number} of `{path}`"))
    return texts


def _entry(row: Any, place: str) -> Entry:
    """The text or the conversation of one row; `place` names the row."""
    fields = row if isinstance(row, dict) else {}
    text, messages = fields.get("text"), fields.get("messages")
    entry: Entry
    if isinstance(text, str):
        entry, strings = text, [text]
    elif isinstance(messages, list) and all(map(_is_message, messages)):
        entry, strings = messages, [message["content"] for message in messages]
    else:
        raise LoftqError(
            f"{place} has neither a string `text` nor a list `messages` of {{role, content}} strings",
            "it has " + (", ".join(f"`{name}`" for name in fields) or f"no fields: {row!r:.40}"),
        )
    if any(not string.isascii() and re.search("[\ud800-\udfff]", string) for string in strings):
        raise LoftqError(f"{place} holds half of a surrogate pair, which is no character", "remove it")
    return entry


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _read_dataset(source: str) -> list[Entry]:
    name, *rest = source.split(":")
    if not re.fullmatch(r"(?!.*\.(?:txt|jsonl?|md|csv|gz)$)\w[\w.-]*(?:/[\w.-]+)?", name, re.ASCII):
        raise LoftqError(f"no such file: `{source}`", _near_files(Path(source)) or "a data set looks like `org/name`")
    if len(rest) > 2:
        raise ConfigError(f"`{source}` has too many colons", "a data set is `name:config:split`")
    config, split = [*rest, "", ""][:2]
    texts, characters = [], 0
    for number, row in enumerate(_rows(name, config or None, split or "train"), 1):
        texts.append(_entry(row, f"row {number} of the data set `{source}`"))
        characters += _length(texts[-1])
        if characters >= _STREAM_CHARACTERS:
            break
    return texts


def _rows(name: str, config: str | None, split: str) -> Iterator[Any]:
    """The rows of a data set as they come from the Hub; whatever goes wrong is a LoftqError."""
    try:
        import datasets
    except ImportError as error:
        raise LoftqError(
            f"`{name}` is no file here, and to read it as a data set takes the package `datasets`",
            "pip install datasets, or give a .txt or .jsonl file",
        ) from error
    if name in getattr(datasets.packaged_modules, "_PACKAGED_DATASETS_MODULES", ()):
        # `text`, `json` and their like would read every such file under the current folder
        raise LoftqError(f"`{name}` is a file format, not a data set", "give a file, or a data set as `org/name`")
    try:
        yield from datasets.load_dataset(name, config, split=split, streaming=True)
    except ConnectionError as error:
        raise LoftqError(
            f"cannot reach the Hub for the data set `{name}`, and there is no file of that name",
            "check the name and the connection, or give a .txt or .jsonl file",
        ) from error
    except Exception as error:  # the package passes on what builders, file readers and HTTP clients raise
        # others can hold signed URLs; these name the configs and splits to choose from
        told = isinstance(error, ValueError | datasets.exceptions.DatasetsError) and str(error).strip()
        reason = re.sub(r"\s*\n\s*", " ", told) if told else type(error).__name__
        raise LoftqError(f"cannot read the data set `{name}`: {reason}", "`name:config:split` picks a part") from error


def _near_files(path: Path) -> str:
    try:
        near = difflib.get_close_matches(path.name, [file.name for file in path.parent.iterdir() if file.is_file()])
    except OSError:
        return ""
    return "did you mean " + " or ".join(f"`{path.parent / name}`" for name in near) + "?" if near else ""


def _length(text: Entry) -> int:
    """Characters of a text or of all messages of a conversation; 0 if it is blank."""
    if isinstance(text, str):
        return 0 if text.isspace() else len(text)
    return sum(len(message["content"]) for message in text)


def _stretches(texts: list[Entry], characters: int) -> list[list[_Piece]]:
    """Divide all of `texts`, in order, into rows of pieces of 1/2 to 3/2 of `characters`."""
    stretches: list[list[_Piece]] = []
    filled = characters
    for entry, text in enumerate(texts):
        begin, length = 0, _length(text)
        while begin < length:
            # a conversation is a whole: its parts are nothing that the chat template knows
            end = _paragraph_end(text, begin, begin + characters) if isinstance(text, str) else length
            if 2 * filled >= characters:
                stretches.append([])
                filled = 0
            stretches[-1].append(_Piece(entry, begin, end))
            filled += end - begin
            begin = end
    return stretches


def _paragraph_end(text: str, begin: int, limit: int) -> int:
    """Where to cut `text` in the second half of `begin` to `limit`, so that as little as possible is torn apart."""
    if limit >= len(text):
        return len(text)
    for separator, keep in (("\n\n", 2), ("\n", 1), (" ", 0)):  # tokens begin with a space, but do not end with one
        found = text.rfind(separator, (begin + limit + 1) // 2, limit)
        if found > begin:
            return found + keep
    return limit


def _tokenize(texts: list[Entry], stretches: list[list[_Piece]], tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
    """The tokens of each stretch, int64 [n], with an EOS after every text but the last, and those that end with one."""
    pieces = [piece for stretch in stretches for piece in stretch]
    strings = [
        text[piece.begin : piece.end] if isinstance(text := texts[piece.entry], str) else _render(text, tokenizer)
        for piece in pieces
    ]
    # not verbose: a stretch may be longer than the model's context, of which the tokenizer would warn
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    made = iter(zip(strings, tokenizer(strings, add_special_tokens=False, verbose=False)["input_ids"], strict=True))
    tokens = []
    for stretch in stretches:
        joined: list[int] = []
        for piece in stretch:
            string, more = next(made)
            ends = piece.end == _length(texts[piece.entry]) and piece.entry < len(texts) - 1
            ends &= not (eos and string.rstrip().endswith(str(tokenizer.eos_token)))  # a newline follows ChatML's
            joined += more + (eos if ends else [])
        tokens.append(torch.tensor(joined, dtype=torch.int64))
    return tokens


def _render(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        raise LoftqError(
            "the calibration text holds conversations, but the tokenizer has no chat template",
            "give plain text (`text` in place of `messages`), or a tokenizer with a chat template",
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template is a program of the model's author: it raises what it likes
        shown = f"{messages!r:.80}"
        raise LoftqError(f"the chat template refuses the conversation `{shown}…`: {error}", "leave it out") from error


def _windows(tokens: dict[int, Tensor], body: int) -> Tensor:
    """Join stretches that follow each other, and cut each run into windows, int64 [n, body]; its last rest is lost."""
    runs: list[list[Tensor]] = []
    for i in sorted(tokens):
        if i - 1 not in tokens:
            runs.append([])
        runs[-1].append(tokens[i])
    joined = [torch.cat(run) for run in runs]
    return torch.cat([run[: len(run) // body * body].view(-1, body) for run in joined])
