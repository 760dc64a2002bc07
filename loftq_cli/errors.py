"""The error family: every stated reason to stop is a `LoftqError` with a sentence, a hint and an exit code."""

from __future__ import annotations

import difflib
import errno
import os
import shlex
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path


class LoftqError(Exception):
    """The run stops for a stated reason (exit code 1).

    Args:
        message: what is wrong, with the value and the place; no final full stop.
        hint: what to do about it; printed on a line of its own.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigError(LoftqError):
    """An option or a configuration file is wrong in itself (exit code 2)."""

    exit_code = 2


class Interrupted(LoftqError):
    """The user interrupted the run; what is done is kept and can be resumed (exit code 130)."""

    exit_code = 130


@contextmanager
def interruptible(hint: str, state: str = "what has arrived is kept") -> Iterator[None]:
    """Say of what is interrupted inside what is left of it, and how it goes on."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if not was_interrupted(error):
            raise
        raise Interrupted(f"interrupted; {state}", hint) from None


def was_interrupted(error: BaseException) -> bool:
    """Whether Ctrl-C is behind an error: what imports a library, or cleans up, may tell of it as its own failure."""
    behind: list[BaseException | None] = [error]
    seen = set[int]()
    while behind:
        one = behind.pop()
        if one is None or id(one) in seen:
            continue
        if isinstance(one, KeyboardInterrupt):
            return True
        seen.add(id(one))
        behind += [one.__cause__, one.__context__]
    return False


def permission_hint(error: BaseException | None) -> str:
    """What to do where the operating system does not let this user read or write, or no folder can be; else nothing."""
    if isinstance(error, NotADirectoryError):
        return "choose another folder: something on the way to this one is a file"
    if not isinstance(error, OSError) or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ""
    if error.errno == errno.EROFS or error.filename is None:
        return "choose another folder, which you may write to"
    path = Path(os.fsdecode(error.filename)).absolute()
    there = next(one for one in (path, *path.parents) if os.access(one, os.F_OK) or one == Path(one.anchor))
    allow = shlex.join(["chmod", "u+rwX", str(there)])
    return f"choose another folder, or let the owner of `{there}` give you access (if that is you: `{allow}`)"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a hint that lists `known` and names the entry nearest to `word`, if one is near."""
    choices = sorted(known)
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    listed = "known: " + ", ".join(f"`{choice}`" for choice in choices)
    return f"did you mean `{near[0]}`? {listed}" if near else listed


def again(*flags: str) -> str:
    """This process's `loftq` command line with `flags` added, to be typed again; in another program, they alone."""
    if Path(sys.argv[0]).name not in ("loftq", "__main__.py"):
        return shlex.join(flags)
    # what is given anew replaces what was given, and its value
    anew = {"--resume", "--overwrite", *(flag for flag in flags if flag.startswith("--"))}
    with_value = {flag for flag, value in pairwise(flags) if flag.startswith("--") and not value.startswith("--")}
    words = [
        word
        for before, word in pairwise(["", *sys.argv[1:]])
        if word.partition("=")[0] not in anew and before not in with_value
    ]
    several = "TORCHELASTIC_RUN_ID" in os.environ
    command = "torchrun … -m loftq_cli" if several else "loftq"  # it does not tell how it was started
    return f"{command} {shlex.join([*words, *flags])}"


def is_unrepeatable(error: Exception) -> bool:
    """Whether torch was asked for the same bytes each time, of an operation that cannot give them."""
    return isinstance(error, RuntimeError) and "determinis" in str(error)
