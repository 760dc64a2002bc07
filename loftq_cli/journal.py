"""The states of OUT, the lock, and the journal that makes a killed run resumable.

While a run is under way OUT holds a work folder `.loftq/` with a lock, the journal and the files being written. Journal
lines are appended after the bytes they speak of are on disk, so a line that exists is true; a line cut short by a kill
is ignored. A finished OUT holds no work folder.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from loftq_cli.checkpoint.files import hash_file, is_ours, read_json, read_lines, write_file, writing
from loftq_cli.checkpoint.reader import read_header
from loftq_cli.errors import LoftqError, again
from loftq_cli.identity import Identity

WORK_FOLDER = ".loftq"
REPORT_FILE = "loftq_report.json"
JOURNAL_FILE = "journal.jsonl"
ADAPTER_CONFIG = "loftq_init/adapter_config.json"
CARD_FILE, CHART_FILE = "README.md", "loftq_errors.svg"


@dataclass
class FileProgress:
    """How far one output file is: names of tensors whose bytes are on disk, and its hash once it is whole."""

    written: set[str] = field(default_factory=set)
    sha256: str | None = None


class Journal:
    """Progress of a run: rows of finished weights, tensors on disk by file, seconds by stage.

    With several ranks each appends to a journal of its own. `begin` gathers what they left in the one of rank 0 and
    gives it a new number; journals of another number, which it did not come to delete, no longer count.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        """Read what the ranks of this or an earlier run have journaled in `folder`."""
        self.folder, self._rank = folder, rank
        self.path = folder / (f"journal.{rank}.jsonl" if rank else JOURNAL_FILE)
        self._file: TextIOWrapper | None = None
        self._lock = threading.Lock()
        self.load()

    def load(self) -> None:
        """Read all ranks' journals anew."""
        self.rows: dict[str, dict[str, Any]] = {}
        self.files: dict[str, FileProgress] = {}
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        header, *lines = read_lines(self.folder / JOURNAL_FILE) or [{}]
        self.number = header.get("number", 0)
        self.identity = Identity(**header["identity"]) if header else None
        of_ranks = [lines]
        for path in sorted(self.folder.glob("journal.*.jsonl")):
            other, *more = read_lines(path) or [{}]
            of_ranks += [more] if other.get("number") == self.number else []
        totals: list[dict[str, float]] = []
        for lines in of_ranks:
            totals.append({})
            for line in lines:
                self._apply(line, totals[-1])
        # ranks work at the same time: the slowest one's seconds count
        for stage in {stage for seconds in totals for stage in seconds}:
            before = header.get("seconds", {}).get(stage, 0.0)
            self.seconds[stage] = before + max(seconds.get(stage, 0.0) for seconds in totals)
        self.seconds = {**header.get("seconds", {}), **self.seconds}

    def begin(self, identity: Identity, planned: list[str]) -> None:
        """Write the journal of rank 0 anew, with all that is known, and open it for more.

        Args:
            identity: of this run; equal to that of an existing journal (the caller has checked).
            planned: names of all files the run will write in OUT, so that `--overwrite` can remove them.
        """
        self.number = secrets.randbits(53)  # not counted on: a rank that does not share OUT may hold an older journal
        header = {"identity": asdict(identity), "planned": planned, "number": self.number, "seconds": self.seconds}
        written = {name: sorted(file.written) for name, file in self.files.items() if file.written}
        whole = {name: file.sha256 for name, file in self.files.items() if file.sha256}
        rows = list(self.rows.values())
        state = {"written": written, "rows": rows, "seconds": {}, "whole": whole, "peaks": self.peaks}
        write_file(self.path, "".join(json.dumps(line) + "\n" for line in (header, state)).encode())
        for path in self.folder.glob("journal.*.jsonl"):
            path.unlink()
        self._file = self.path.open("a", encoding="utf-8")

    def join(self) -> None:
        """Open the journal of another rank, beside the one that rank 0 has begun."""
        self._file = self.path.open("w", encoding="utf-8")
        self._append({"number": self.number})

    def file(self, name: str) -> FileProgress:
        """Progress of the output file `name`."""
        return self.files.setdefault(name, FileProgress())

    def commit(
        self,
        written: dict[str, list[str]],
        rows: list[dict[str, Any]],
        seconds: dict[str, float],
        whole: dict[str, str] | None = None,
        peaks: dict[str, int] | None = None,
    ) -> None:
        """Record what is safe on disk: tensors `written` by file, rows of weights, hashes of files that are `whole`.

        `seconds` by stage are those since the last commit; they add up over the sessions of a resumed run. `peaks` are
        bytes of memory, of which the largest counts.
        """
        line = {"written": written, "rows": rows, "seconds": seconds, "whole": whole or {}, "peaks": peaks or {}}
        with self._lock:
            self._append(line)
            self._apply(line, self.seconds)

    def close(self) -> None:
        """Close the file; it stays for `--resume`."""
        if self._file is not None:
            self._file.close()

    def remove(self) -> None:
        """Remove the journals of all ranks: the run is finished."""
        for path in (self.path, *self.folder.glob("journal.*.jsonl")):
            path.unlink(missing_ok=True)

    def _apply(self, line: dict[str, Any], seconds: dict[str, float]) -> None:
        for file, names in line["written"].items():
            self.file(file).written.update(names)
        for file, sha256 in line["whole"].items():
            self.file(file).sha256 = sha256
        self.rows.update({row["tensor"]: row for row in line["rows"]})
        for stage, value in line["seconds"].items():
            seconds[stage] = seconds.get(stage, 0.0) + value
        for name, peak in line["peaks"].items():
            self.peaks[name] = max(peak, self.peaks.get(name, 0))

    def _append(self, line: dict[str, Any]) -> None:
        assert self._file is not None
        with writing(self.path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())


def check_out(out: Path, identity: Identity, resume: bool, overwrite: bool) -> bool:
    """Decide whether a run may write to `out`, from what is there. Return True when it is finished already.

    Raises:
        LoftqError: `out` holds something else; the message says which flag or folder would do.
    """
    if out.exists() and not out.is_dir():
        raise LoftqError(f"`{out}` is a file", "give a folder that is absent or empty as OUT")
    if not out.exists() or not any(out.iterdir()):
        return False
    work = out / WORK_FOLDER
    begun = read_lines(work / JOURNAL_FILE)[:1]
    finished = None if begun else finished_identity(out)  # without a journal a work folder is only a kill's leftover
    if overwrite and (work.is_dir() or finished):
        return False
    if finished is None and work.is_dir():
        if begun and (changed := Identity(**begun[0]["identity"]).differences(identity)):
            raise LoftqError(
                f"`{out}` was begun with other settings: " + "; ".join(changed),
                "resume with the settings it was begun with, choose another OUT, or `--overwrite` it",
            )
        if not resume:
            with suppress(OSError), _locked(out):  # else who starts a run twice would be told to resume the first
                pass
            raise LoftqError(
                f"`{out}` holds an unfinished run",
                f"finish it with `{again('--resume')}`, or replace it with `--overwrite`",
            )
        return False
    if finished is None:
        raise LoftqError(f"`{out}` is not empty, and nothing that loftq made", "choose an OUT that is absent or empty")
    if changed := finished.differences(identity):
        raise LoftqError(
            f"`{out}` holds a finished run with other settings: " + "; ".join(changed),
            "choose another OUT, or replace it with `--overwrite`",
        )
    for name in read_json(out / REPORT_FILE).get("files", {}):
        problem = None if (out / name).is_file() else "gone"
        if problem is None and name.endswith(".safetensors"):
            try:
                read_header(out / name)  # which knows how long the file is; hashes take `loftq verify`
            except LoftqError:
                problem = "damaged"
        if problem:
            raise LoftqError(f"`{out}` is finished, but `{name}` is {problem}", "make it again with `--overwrite`")
    return True


@contextmanager
def claimed(out: Path, identity: Identity, resume: bool, overwrite: bool) -> Iterator[Journal | None]:
    """Take `out` for this process and read its journal; with `overwrite`, first remove what loftq wrote there.

    Yields None where another run finished it in the meantime. Whatever happens, a work folder stays only for what can
    be resumed.

    Raises:
        LoftqError: another run is writing to `out`; or see `check_out`.
    """
    work = out / WORK_FOLDER
    created = not out.exists()
    if work.is_symlink():  # what it points to would be emptied
        raise LoftqError(f"`{work}` is a link", "remove it, or choose another OUT")
    work.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        try:
            if overwrite:
                remove_outputs(out)
            elif finished_identity(out) is not None and check_out(out, identity, resume, overwrite):
                yield None
                return
            journal = Journal(work)
            refused = False
            try:
                yield journal
            except LoftqError:
                refused = True
                raise
            finally:
                journal.close()
                journal.load()
                # of what was refused on the way, copies alone are not worth keeping
                anything = not refused and any(file.written or file.sha256 for file in journal.files.values())
                if journal.path.exists() and not journal.rows and not anything:
                    with suppress(OSError, LoftqError):  # what stopped the run is what matters
                        remove_outputs(out)
        finally:
            if not (work / JOURNAL_FILE).exists():
                shutil.rmtree(work, ignore_errors=True)  # while the lock is held: nobody else is in it
                if created and out.exists() and not any(out.iterdir()):
                    out.rmdir()


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    try:
        held = FileLock(out / WORK_FOLDER / "lock").acquire(timeout=0)
    except Timeout:
        raise LoftqError(f"another run is writing to `{out}`", "wait for it, or choose another OUT") from None
    with held:
        yield


def remove_outputs(out: Path) -> None:
    """Remove the files that an earlier run wrote in `out`, finished or not, folders that they leave empty, no others.

    Names may come from anywhere: none leads out, and what lies in a folder must have the hash of what was written.
    """
    report, lines = read_json(out / REPORT_FILE), read_lines(out / WORK_FOLDER / JOURNAL_FILE)
    listed = [*(lines[0]["planned"] if lines else []), *(written_files(report) if "files" in report else [])]
    known: dict[str, str] = {}
    for hashes in (report.get("files"), report.get("side_files"), *(line.get("whole") for line in lines)):
        known |= hashes if isinstance(hashes, dict) else {}
    folders: set[Path] = set()
    for name in [name for name in listed if is_ours(out, name)]:
        path = out / name
        with writing(path):
            may_go = path.is_symlink() or path.is_file()
            if path.parent not in (out, out / "loftq_init"):
                may_go = path.is_file() and not path.is_symlink() and hash_file(path) == known.get(name)
            if may_go:
                path.unlink()
                folders |= {out / folder for folder in Path(name).parents} - {out}
    for folder in sorted(folders, key=lambda path: -len(path.parts)):  # what lies in others first
        if not any(folder.iterdir()):
            folder.rmdir()
    for leftover in (out / WORK_FOLDER).glob("*"):
        if leftover.name != "lock":
            shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()


def written_files(report: Mapping[str, Any]) -> list[str]:
    """Names of all files of a finished run, from its report."""
    named = [*report.get("files", {}), *report.get("side_files", [])]
    return [*named, CARD_FILE, CHART_FILE, ADAPTER_CONFIG, REPORT_FILE]


def finished_identity(out: Path) -> Identity | None:
    """The identity of a finished run in `out`, from its report; None when there is none."""
    report = read_json(out / REPORT_FILE)
    try:
        return Identity(report["version"], report["source"]["fingerprint"], report["config"])
    except (KeyError, TypeError):
        return None
