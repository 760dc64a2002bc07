"""Where calibration text comes from: a file, a data set, or the package itself."""

from __future__ import annotations

import difflib
import json
import os
import re
import shlex
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from loftq_cli.errors import ConfigError, LoftqError

TABLES = {".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}  # what `datasets` calls their readers
_STREAM_CHARACTERS = 20_000_000  # of a data set: 1,000 windows of 4096 tokens, and some seconds of download
SHAREGPT = {  # who speaks; others, such as those that call functions, speak of what is none of a conversation's text
    **{"system": "system", "human": "user", "user": "user"},
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "assistant"), "assistant"),
}

Entry = str | list[dict[str, str]]  # a text, or a conversation as {role, content}


def read_texts(source: str | None) -> list[Entry]:
    """Read the texts of `source`.

    Args:
        source: None for the text in the package; a file, `.jsonl` or `.ndjson` (`text`, `messages`, `conversations`, or
            `prompt` and `completion` in every line) or else plain UTF-8 text; or a data set, `name`, `name:config` or
            `name:config:split` (`train` unless given), of which the first 20 million characters are read.

    Raises:
        LoftqError: there is no such text, or it is not what it should be; the message names the line or row.
    """
    if source is None:
        return [*resources.files(__package__).joinpath("default.txt").read_text(encoding="utf-8").split("\f")[1:]]
    path = Path(os.path.expanduser(source))  # noqa: PTH111 - Path.expanduser raises on an unknown `~user`
    texts = read_file(path) if path.exists() else _read_dataset(source)
    if not any(map(length, texts)):
        raise LoftqError(f"there is no text in `{source}`", "give another source of calibration text")
    return texts


def read_file(path: Path) -> list[Entry]:
    """Read the texts of a file, as `read_texts` does.

    Raises:
        LoftqError: see `read_texts`.
    """
    try:
        if path.is_dir():
            raise LoftqError(f"`{path}` is a folder", "make one file of its texts: cat FOLDER/*.txt > text.txt")
        return _read_jsonl(path) if path.suffix.lower() in (".jsonl", ".ndjson") else _read_plain(path)
    except OSError as error:
        raise LoftqError(f"cannot read `{path}`: {error.strerror or error}", "give a file of plain text") from error


def _read_plain(path: Path) -> list[Entry]:
    if (kind := path.suffix.lower()) in TABLES:  # or the model would be fitted to its commas and braces
        raise LoftqError(
            f"`{path}` is a {kind} file, not plain text",
            "make it a .jsonl file, each line with a `text`, or with `messages` of a conversation; with `datasets`: "
            f"load_dataset({TABLES[kind]!r}, data_files={str(path)!r})['train'].to_json('text.jsonl')",
        )
    try:
        return [path.read_text(encoding="utf-8-sig")]
    except UnicodeDecodeError as error:
        raise LoftqError(
            f"`{path}` is not UTF-8 text: {error.reason} at byte {error.start}",
            f"unpack it: gunzip -k {shlex.quote(str(path))}"
            if kind == ".gz"
            else "convert it: `iconv -f ENCODING -t UTF-8`",
        ) from None


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
    match fields:  # of the data sets that TRL trains on
        case {"prompt": str() as prompt, "completion": str() as completion} if text is None and messages is None:
            text = prompt + completion
        case {"prompt": [*prompt], "completion": [*completion]} if messages is None:
            messages = [*prompt, *completion]
        case {"conversations": [*turns], "system": str() as system} if text is None and messages is None and system:
            messages = [{"role": "system", "content": system}, *turns]
        case {"conversations": [*turns]} if text is None and messages is None:
            messages = turns
    messages = [_message(turn) for turn in messages] if isinstance(messages, list) else messages
    entry: Entry
    if isinstance(text, str):
        entry, strings = text, [text]
    elif isinstance(messages, list) and all(map(_is_message, messages)):
        entry, strings = messages, [message["content"] for message in messages]
    elif isinstance(messages, list):
        number = next(i for i, message in enumerate(messages, 1) if not _is_message(message))
        way = "leave such rows out, as those with calls of tools or with pictures, or write them as `text`"
        raise LoftqError(f"{place}: message {number} has no strings as `role` and `content`", way)
    else:
        raise LoftqError(
            f"{place} has neither a string `text` nor a list `messages` of {{role, content}} strings, nor "
            "`conversations`, nor both `prompt` and `completion`",
            "it has "
            + (", ".join(f"`{key}` ({type(fields[key]).__name__})" for key in fields) or f"no fields: {row!r:.40}")
            + ("; make a `text` of them, as you train on them" if fields.keys() - {"text"} else ""),
        )
    if any(not string.isascii() and re.search("[\ud800-\udfff]", string) for string in strings):
        raise LoftqError(f"{place} holds half of a surrogate pair, which is no character", "remove it")
    return entry


def _message(turn: Any) -> Any:
    """A turn as ShareGPT has it, or one whose parts are all text, as a message {role, content}; else as it is."""
    match turn:
        case {"from": str() as speaker, "value": content} if speaker in SHAREGPT:
            turn = {"role": SHAREGPT[speaker], "content": content}
    match turn:
        case {"content": [_, *_] as parts} if all(map(_is_text, parts)):
            turn = {**turn, "content": "".join(part["text"] for part in parts)}
    return turn


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


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
        characters += length(texts[-1])
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


def length(text: Entry) -> int:
    """Characters of a text or of all messages of a conversation; 0 if it is blank."""
    if isinstance(text, str):
        return 0 if text.isspace() else len(text)
    return sum(len(message["content"]) for message in text)
