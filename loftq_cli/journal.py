"""The states of OUT, the lock, and the journal that makes a killed run resumable.

While a run is under way OUT holds a work folder `.loftq/` with a lock, the journal and the files being written. Journal
lines are appended after the bytes they speak of are on disk, so a line that exists is true; a line cut short by a kill
is ignored. A finished OUT holds no work folder.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from loftq_cli.errors import LoftqError, again

WORK_FOLDER = ".loftq"
REPORT_FILE = "loftq_report.json"
JOURNAL_FILE = "journal.jsonl"
ADAPTER_CONFIG = "loftq_init/adapter_config.json"


@dataclass(frozen=True)
class Identity:
    """What must be equal for two runs to give the same bytes."""

    version: str
    source: str  # fingerprint of the source checkpoint
    config: dict[str, Any]  # the decided configuration, `device` as its kind

    def differences(self, other: Identity) -> list[str]:
        """One sentence for each field of `other` (the new run) that differs from this one (what is on disk)."""
        pairs: dict[str, tuple[Any, Any]] = {
            "loftq version": (self.version, other.version),
            "source checkpoint": (self.source, other.source),
        }
        for name in sorted({*self.config, *other.config}):
            pairs["--" + name.replace("_", "-")] = (self.config.get(name), other.config.get(name))
        return [f"{name} was {old}, now {new}" for name, (old, new) in pairs.items() if old != new]


@dataclass
class FileProgress:
    """How far one output file is: names of tensors whose bytes are on disk, and its hash once it is whole."""

    written: set[str] = field(default_factory=set)
    sha256: str | None = None


class Journal:
    """Progress of a run: rows of finished weights, tensors on disk by file, seconds by stage."""

    def __init__(self, path: Path, identity: Identity, planned: list[str]) -> None:
        """Open the journal at `path`, reading what an earlier run left, or begin it.

        Args:
            path: the journal file.
            identity: of this run; equal to that of an existing journal (the caller has checked).
            planned: names of all files the run will write in OUT, so that `--overwrite` can remove them.
        """
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        self.files: dict[str, FileProgress] = {}
        self.seconds: dict[str, float] = {}
        lines = _read_lines(path)
        for line in lines[1:]:
            self._apply(line)
        if path.exists():
            _drop_partial_line(path)
        self._file = path.open("a", encoding="utf-8")
        if not lines:
            self._append({"identity": asdict(identity), "planned": planned})

    def file(self, name: str) -> FileProgress:
        """Progress of the output file `name`."""
        return self.files.setdefault(name, FileProgress())

    def commit(
        self,
        written: dict[str, list[str]],
        rows: list[dict[str, Any]],
        seconds: dict[str, float],
        whole: dict[str, str] | None = None,
    ) -> None:
        """Record what is safe on disk: tensors `written` by file, rows of weights, hashes of files that are `whole`.

        `seconds` by stage are those since the last commit; they add up over the sessions of a resumed run.
        """
        line = {"written": written, "rows": rows, "seconds": seconds, "whole": whole or {}}
        self._append(line)
        self._apply(line)

    def keep(self, file: str, written: set[str]) -> None:
        """Forget the tensors of `file` that are not among `written`, those which were really found on disk."""
        if self.file(file).written - written:
            line: dict[str, Any] = {"forget": file}
            self._append(line)
            self._apply(line)

    def close(self) -> None:
        """Close the file; it stays for `--resume`."""
        self._file.close()

    def _apply(self, line: dict[str, Any]) -> None:
        if "forget" in line:
            self.files[line["forget"]] = FileProgress()
            return
        for file, names in line["written"].items():
            self.file(file).written.update(names)
        for file, sha256 in line["whole"].items():
            self.file(file).sha256 = sha256
        self.rows.update({row["tensor"]: row for row in line["rows"]})
        for stage, value in line["seconds"].items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + value

    def _append(self, line: dict[str, Any]) -> None:
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
    begun = _read_lines(work / JOURNAL_FILE)[:1]
    finished = None if begun else finished_identity(out)  # without a journal a work folder is only a kill's leftover
    if overwrite and (work.is_dir() or finished):
        return False
    if finished is None and work.is_dir():
        if not resume:
            raise LoftqError(
                f"`{out}` holds an unfinished run",
                f"finish it with `{again('--resume')}`, or replace it with `--overwrite`",
            )
        if begun and (changed := Identity(**begun[0]["identity"]).differences(identity)):
            raise LoftqError(
                f"`{out}` was begun with other settings: " + "; ".join(changed),
                "resume with the settings it was begun with, choose another OUT, or `--overwrite` it",
            )
        return False
    if finished is None:
        raise LoftqError(f"`{out}` is not empty, and nothing that loftq made", "choose an OUT that is absent or empty")
    if changed := finished.differences(identity):
        raise LoftqError(
            f"`{out}` holds a finished run with other settings: " + "; ".join(changed),
            "choose another OUT, or replace it with `--overwrite`",
        )
    if missing := [name for name in _read_json(out / REPORT_FILE).get("files", {}) if not (out / name).is_file()]:
        raise LoftqError(f"`{out}` is finished, but `{missing[0]}` is gone", "make it again with `--overwrite`")
    return True


@contextmanager
def claimed(
    out: Path, identity: Identity, planned: list[str], resume: bool, overwrite: bool
) -> Iterator[Journal | None]:
    """Take `out` for this process and open its journal; with `overwrite`, first remove what loftq wrote there.

    Yields None where another run finished it in the meantime. Whatever happens, a work folder stays only for what can
    be resumed.

    Raises:
        LoftqError: another run is writing to `out`; or see `check_out`.
    """
    work = out / WORK_FOLDER
    created = not out.exists()
    work.mkdir(parents=True, exist_ok=True)
    lock = FileLock(work / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise LoftqError(f"another run is writing to `{out}`", "wait for it, or choose another OUT") from None
    try:
        if overwrite:
            remove_outputs(out)
        elif finished_identity(out) is not None and check_out(out, identity, resume, overwrite):
            yield None
            return
        journal = Journal(work / JOURNAL_FILE, identity, planned)
        try:
            yield journal
        finally:
            journal.close()
            if not any(file.written or file.sha256 for file in journal.files.values()):
                journal.path.unlink(missing_ok=True)  # stopped before anything was worth keeping
    finally:
        if not (work / JOURNAL_FILE).exists():
            shutil.rmtree(work, ignore_errors=True)  # while the lock is held: nobody else is in it
            if created and out.exists() and not any(out.iterdir()):
                out.rmdir()
        lock.release()


def remove_outputs(out: Path) -> None:
    """Remove the files that an earlier run wrote in `out`, finished or not, and nothing else."""
    report = _read_json(out / REPORT_FILE)
    header = _read_lines(out / WORK_FOLDER / JOURNAL_FILE)[:1]
    listed = [*(header[0]["planned"] if header else []), *report.get("files", {}), *report.get("side_files", [])]
    # a report may come from anywhere: no name of its may lead out of the folder
    names = [name for name in [*listed, "README.md", ADAPTER_CONFIG, REPORT_FILE] if _is_ours(out, name)]
    for name in names if listed else []:
        (out / name).unlink(missing_ok=True)
    for leftover in (out / WORK_FOLDER).glob("*"):
        if leftover.name != "lock":
            leftover.unlink()
    for folder in {(out / name).parent for name in names} - {out}:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _is_ours(out: Path, name: object) -> bool:
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
        return False
    return (out / name).parent.resolve() in (out.resolve(), out.resolve() / "loftq_init")


def finished_identity(out: Path) -> Identity | None:
    """The identity of a finished run in `out`, from its report; None when there is none."""
    report = _read_json(out / REPORT_FILE)
    try:
        return Identity(report["version"], report["source"]["fingerprint"], report["config"])
    except (KeyError, TypeError):
        return None


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal; what a kill cut short is dropped."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _drop_partial_line(path: Path) -> None:
    with path.open("rb+") as file:
        data = file.read()
        file.truncate(data.rfind(b"\n") + 1)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
