"""The one output sink: results on stdout, everything else on stderr; bars on a terminal, and in logs lines."""

from __future__ import annotations

import _thread
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from loftq_cli.errors import Interrupted, LoftqError, permission_hint, was_interrupted

LINE_SECONDS = 30  # between lines of progress in a log
RETRY_SECONDS = 0.05  # after Ctrl-C that came while something is imported
SIGNED = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]+")  # an address with a query: a signature is as good as a token
TABLE_WIDTH = 140  # where stdout is no terminal, so that tables in logs and files are not cut


def _plain(text: str) -> str:
    """`text` with neither markup nor control characters, which names in a checkpoint may hold."""
    return escape("".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text))


class Out:
    """What a command says, and where.

    Attributes:
        json: stdout carries one JSON object and nothing else.
        quiet: no notes and no progress.
        verbose: 0, 1 (details), 2 (tracebacks).
        silent: errors only; for all ranks of a run but the first.
        interrupted: Ctrl-C has come, whatever has become of it.
    """

    def __init__(self, json: bool = False, quiet: bool = False, verbose: int = 0, silent: bool = False) -> None:
        self.json, self.quiet, self.verbose, self.silent = json, quiet or silent, verbose, silent
        self.interrupted = False
        self.stdout = Console(soft_wrap=True, width=None if sys.stdout.isatty() else TABLE_WIDTH)
        self.stderr = Console(stderr=True, soft_wrap=True)

    def result(self, text: str) -> None:
        """A line of the result, for people."""
        if not self.json and not self.silent:
            self.stdout.print(_plain(text), highlight=False)

    def table(
        self, title: str, columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]], total: int = 0
    ) -> None:
        """A table for people; `columns` are (heading, "left" | "right"), the last `total` rows stand apart."""
        if self.json or self.silent:
            return
        table = Table(title=_plain(title), title_justify="left")
        for heading, justify in columns:
            table.add_column(_plain(heading), justify="right" if justify == "right" else "left", overflow="fold")
        for position, row in enumerate(rows):
            if total and position == len(rows) - total:
                table.add_section()
            table.add_row(*(_plain(cell) for cell in row))
        self.stdout.print(table)

    def data(self, value: Mapping[str, Any]) -> None:
        """The result, for programs."""
        if self.json and not self.silent:
            sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")

    def note(self, text: str) -> None:
        """Something to know, on stderr."""
        if not self.quiet:
            self.stderr.print(_plain(text), highlight=False)

    def warning(self, text: str) -> None:
        """Something to act on, on stderr, also with `--quiet`."""
        if not self.silent:
            self.stderr.print(f"[yellow]warning:[/] {_plain(text)}", highlight=False)

    def error(self, error: LoftqError) -> None:
        """What stopped the command, and the way out."""
        self.stderr.print(f"[red]error:[/] {_plain(error.message)}", highlight=False)
        if error.hint:
            self.stderr.print(f"\n[cyan]hint:[/] {_plain(error.hint)}", highlight=False)

    @contextmanager
    def progress(self, label: str, total_bytes: int, *, rate: bool = True) -> Iterator[Callable[[str, int], None]]:
        """A bar that advances by bytes of weights; yields `advance(name, bytes)`. In logs, a line now and then.

        Without `rate` it does not say how many: where they are passed several times, or take unequal times.
        """
        columns = (
            SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(),
            *((DownloadColumn(), TransferSpeedColumn()) if rate else ()), _Remaining(),
            TextColumn("{task.fields[module]}", style="dim", markup=False),
        )  # fmt: skip
        hidden = self.quiet or not sys.stderr.isatty()
        with Progress(*columns, console=self.stderr, transient=True, disable=hidden) as bar:
            task = bar.add_task(label, total=total_bytes, module="")
            done, told = 0, time.monotonic()

            def advance(name: str, size: int) -> None:
                nonlocal done, told
                if self.interrupted:  # and that was lost, as in a callback of Python's own
                    raise KeyboardInterrupt
                done += size
                bar.update(task, advance=size, module="".join(c for c in name if c.isprintable()))
                if not hidden:
                    return
                if self.verbose:
                    self.note(f"{label} {name}")
                elif time.monotonic() - told >= LINE_SECONDS:  # for logs, which are to show that there is life
                    told = time.monotonic()
                    self.note(f"{label}: {done / max(total_bytes, 1):.0%}, {name}")

            yield advance


class _Remaining(TimeRemainingColumn):
    """The time left, once there is something to tell it by."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.percentage >= 5 else Text("")


@contextmanager
def speaking(json_only: bool, quiet: bool, verbose: int, silent: bool = False) -> Iterator[Out]:
    """Give the command its sink, and turn what it raises into a sentence and an exit code."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if sys.stderr.isatty() and not quiet else "1")
    output = Out(json=json_only, quiet=quiet, verbose=verbose, silent=silent)
    try:
        with _noticing_interrupts(output):
            yield output
    except typer.Exit:  # a RuntimeError: must not be taken for a failure below
        raise
    except (Exception, KeyboardInterrupt) as error:
        failure = _told(error, output.interrupted)
    else:
        return
    if verbose >= 2:
        sys.stderr.write(SIGNED.sub(r"\1?…", traceback.format_exc()))
    output.error(failure)
    raise typer.Exit(failure.exit_code)


@contextmanager
def _noticing_interrupts(output: Out) -> Iterator[None]:
    """Have `output` know of Ctrl-C, which libraries turn into failures of their own, or lose.

    While something is imported it waits, unless it comes again: in the middle of torch's import it is an abort.
    """
    retried, over = threading.Event(), threading.Event()

    def retry() -> None:
        if not over.is_set():
            retried.set()
            _thread.interrupt_main()

    def interrupt(number: int, frame: FrameType | None) -> None:
        insisting = output.interrupted and not retried.is_set()
        output.interrupted = True
        retried.clear()
        if insisting or not _imports(frame):
            signal.default_int_handler(number, frame)
        later = threading.Timer(RETRY_SECONDS, retry)
        later.daemon = True
        later.start()

    ours = threading.current_thread() is threading.main_thread()  # others may not
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        over.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _imports(frame: FrameType | None) -> bool:
    """Whether what runs there is part of an import."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _told(error: BaseException, interrupted: bool) -> LoftqError:
    """What to tell of an error."""
    if isinstance(error, Interrupted):
        return error
    if interrupted or was_interrupted(error):
        return Interrupted("interrupted")
    if isinstance(error, LoftqError):
        error.hint = error.hint or permission_hint(error.__cause__)
        return error
    if isinstance(error, OSError):
        what = f"{error.strerror or error}" + (f": `{error.filename}`" if error.filename else "")
        return LoftqError(what, permission_hint(error))
    return LoftqError(f"unexpected {type(error).__name__}: {error}", "run again with `-vv` for the traceback")
