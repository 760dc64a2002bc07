"""The shards of a Hub id, fetched ahead of their use and, in a folder of their own, deleted after it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

from loftq_cli.checkpoint.hub import HubCommit
from loftq_cli.checkpoint.reader import Header

AHEAD = 2  # shards that are fetched while one is in use
KEPT = 2 + AHEAD  # on the disk at a time, where they are deleted: one more may wait for its results to be written
PATIENCE = 60  # seconds to wait for room


class Streamed:
    """A place as `HubCommit` is one, of which `files` are going to be asked for in this order, by any thread.

    Args:
        commit: where they come from.
        files: the shards that are still needed.
        folder: where they go, to be deleted once they are released; None leaves them in the Hub's cache. What lies in
            that already is used from there, and stays.
    """

    def __init__(self, commit: HubCommit, files: Sequence[str], folder: Path | None) -> None:
        self.revision, self.sizes = commit.revision, commit.sizes
        folder = folder and folder.resolve()  # as the Hub's client returns paths in it
        self._commit, self._files, self._folder = commit, list(files), folder
        self._fetched: dict[str, Future[Path]] = {}
        self._lock = threading.Condition()
        for left in folder.iterdir() if folder is not None and folder.exists() else ():
            if left.is_file() and left.name not in self._files:  # a session ended between its last use and its deletion
                left.unlink()

    def path(self, file: str) -> Path:
        """The local path of one file, once it is there; the next ones begin to be fetched."""
        if file not in self._files:
            return self._commit.path(file)
        with self._lock:
            if self._folder is not None and file not in self._fetched:  # writing lags; it ends, or says why it does not
                self._lock.wait_for(lambda: len(self._fetched) < KEPT, PATIENCE)
            self._begin(file)
            place = self._files.index(file) + 1
            for coming in self._files[place : place + AHEAD]:
                if self._folder is None or len(self._fetched) < KEPT:
                    self._begin(coming)
            fetched = self._fetched[file]
        return fetched.result()

    def header(self, file: str) -> Header:
        """The header of one safetensors file."""
        return self._commit.header(file)

    def release(self, file: str) -> None:
        """Learn that nobody needs a file any more."""
        fetched = self._fetched.get(file) if self._folder is not None else None
        if fetched is None:
            return
        if fetched.result().parent == self._folder:
            fetched.result().unlink(missing_ok=True)
        with self._lock:
            del self._fetched[file]
            self._lock.notify_all()

    def _begin(self, file: str) -> None:
        if file not in self._fetched:
            self._fetched[file] = Future()
            # not of a pool, which would have an interrupted process wait for gigabytes
            threading.Thread(target=self._fetch, args=(file, self._fetched[file]), daemon=True).start()

    def _fetch(self, file: str, fetched: Future[Path]) -> None:
        try:
            fetched.set_result(self._commit.download(file, self._folder))
        except BaseException as error:  # for who asks for the file
            fetched.set_exception(error)
