"""Calibration text, cut into windows of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loftq_cli.calibration.sources import Entry, length
from loftq_cli.errors import ConfigError, LoftqError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_STRETCH_CHARACTERS = 16  # for each token of a window: about four windows of English


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


def samples_wanted(samples: int) -> int:
    """Windows to calibrate on and those held out."""
    return samples + max(1, samples // 16)


def token_batches(
    texts: list[Entry], tokenizer: PreTrainedTokenizerBase, samples: int, seqlen: int, seed: int
) -> Calibration:
    """Cut `texts` into windows of `seqlen` tokens; `samples` are to calibrate on, `max(1, samples // 16)` held out.

    Texts follow each other with the EOS id between them; a window begins with the BOS id, where the tokenizer has one.
    An encoder's has CLS and SEP in their place, and then a window ends with SEP, too: so it always reads its texts.

    No more is tokenized than is needed: the texts are divided, without a look at their tokens, into stretches of about
    16 · seqlen characters, each a part of a long text that ends at a paragraph's end (else at a line's, else at a
    space), or a row of short texts. Stretches are tokenized in an order that the seed alone decides, so from all over
    the text, until they hold enough windows. Those that turn out to be neighbours are joined before they are cut, so
    that a text that is needed whole is used whole. The windows are then shuffled.

    Raises:
        LoftqError: the texts are shorter than a window, or hold conversations that the tokenizer cannot render.
    """
    begin, between, end = _special(tokenizer)
    body = seqlen - len(begin) - len(end)
    if samples < 1 or body < 1:
        raise ConfigError(f"no window can be made of {samples} samples of {seqlen} tokens", "give larger numbers")
    wanted = samples_wanted(samples)
    texts = [text for text in texts if length(text)]
    generator = torch.Generator().manual_seed(seed)
    stretches = _stretches(texts, _STRETCH_CHARACTERS * seqlen)
    order = torch.randperm(len(stretches), generator=generator).tolist()
    tokens: dict[int, Tensor] = {}
    windows = torch.empty(0, body, dtype=torch.int64)
    while len(windows) < wanted and len(tokens) < len(order):
        more = max(1, len(tokens) // 8 if tokens else wanted // 4)  # in proportion: cutting anew every time costs too
        chosen = order[len(tokens) : len(tokens) + more]
        tokens |= zip(chosen, _tokenize(texts, [stretches[i] for i in chosen], tokenizer, between), strict=True)
        windows = _windows(tokens, body)
    total = sum(map(len, tokens.values()))
    if not len(windows):
        special = " and special ones" if begin or end else ""
        raise LoftqError(
            f"the calibration text has {total} tokens; a window of {seqlen} takes {body}{special}",
            "give more text, or a smaller `--seqlen`",
        )
    found = len(windows)
    windows = windows[torch.randperm(len(windows), generator=generator)[:wanted]]
    first, last = (torch.tensor(ids, dtype=torch.int64).expand(len(windows), -1) for ids in (begin, end))
    windows = torch.cat([first, windows, last], dim=1)
    used = min(samples, max(1, len(windows) - 1))
    note = None
    if found < wanted:
        judging = f"{found - used} of them held out to judge by" if found > used else "none to judge by"
        note = (
            f"the calibration text has {total} tokens, {found} windows of {seqlen}, {judging}; wanted were "
            f"{wanted * body} tokens, {wanted} windows"
        )
    return Calibration(windows[:used], windows[used:], note)


def _special(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int], list[int]]:
    """The ids, one or none each, that a window begins with, that stand between texts, and that a window ends with."""
    found = (getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "cls", "sep"))
    bos, eos, cls, sep = ([] if token is None else [token] for token in found)
    (text,) = tokenizer(["a"], verbose=False)["input_ids"]
    if cls and sep and (text[:1], text[-1:]) == (cls, sep):  # whatever else there is, an encoder reads these
        return cls, sep, sep
    return bos or cls, eos or sep, eos if eos and text[-1:] == eos else [] if eos else sep  # T5 reads its EOS, too


def _stretches(texts: list[Entry], characters: int) -> list[list[_Piece]]:
    """Divide all of `texts`, in order, into rows of pieces of 1/2 to 3/2 of `characters`."""
    stretches: list[list[_Piece]] = []
    filled = characters
    for entry, text in enumerate(texts):
        begin, last = 0, length(text)
        while begin < last:
            # a conversation is a whole: its parts are nothing that the chat template knows
            end = _paragraph_end(text, begin, begin + characters) if isinstance(text, str) else last
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


def _tokenize(
    texts: list[Entry], stretches: list[list[_Piece]], tokenizer: PreTrainedTokenizerBase, between: list[int]
) -> list[Tensor]:
    """The tokens of each stretch, int64 [n], with `between` after every text but the last, and those that end so."""
    pieces = [piece for stretch in stretches for piece in stretch]
    strings = [
        text[piece.begin : piece.end] if isinstance(text := texts[piece.entry], str) else render(text, tokenizer)
        for piece in pieces
    ]
    # not verbose: a stretch may be longer than the model's context, of which the tokenizer would warn
    made = iter(zip(strings, tokenizer(strings, add_special_tokens=False, verbose=False)["input_ids"], strict=True))
    mark = str(tokenizer.eos_token or tokenizer.sep_token) if between else None
    tokens = []
    for stretch in stretches:
        joined: list[int] = []
        for piece in stretch:
            string, more = next(made)
            ends = piece.end == length(texts[piece.entry]) and piece.entry < len(texts) - 1
            ends &= not (mark and string.rstrip().endswith(mark))  # a newline follows ChatML's
            joined += more + (between if ends else [])
        tokens.append(torch.tensor(joined, dtype=torch.int64))
    return tokens


def render(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    """A conversation in the chat template.

    Raises:
        LoftqError: there is none, or it refuses this one.
    """
    if not tokenizer.chat_template:
        raise LoftqError(
            "the text holds conversations, but the tokenizer has no chat template",
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
