"""Whole files only: written under a temporary name, flushed to the disk, renamed; hashed on the way."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loftq_cli.checkpoint.reader import CHUNK_BYTES, DTYPES, Header, TensorInfo, read_header
from loftq_cli.errors import LoftqError

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def plan_header(layout: Sequence[TensorSpec], metadata: Mapping[str, str], file: str = "") -> Header:
    """Lay out a safetensors file: its header, before any tensor exists.

    Loaders view slices of the file as tensors, so each tensor must be aligned to its dtype: those that take a multiple
    of 8 bytes come first, in the given order, then the others by falling item size.
    """
    ordered = sorted(layout, key=lambda spec: 0 if spec.nbytes % 8 == 0 else 1 / spec.dtype.itemsize)
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for spec in ordered:
        if spec.name in entries:
            raise ValueError(f"`{spec.name}` stands twice in the layout of `{file}`")
        offsets = [offset, offset + spec.nbytes]
        entries[spec.name] = {"dtype": _DTYPE_NAMES[spec.dtype], "shape": spec.shape, "data_offsets": offsets}
        offset += spec.nbytes
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    raw = len(text).to_bytes(8, "little") + text
    infos, position = {}, len(raw)
    for spec in ordered:
        infos[spec.name] = TensorInfo(spec.name, spec.dtype, tuple(spec.shape), file, position, spec.nbytes)
        position += spec.nbytes
    return Header(raw, infos, dict(metadata))


def file_bytes(layout: Sequence[TensorSpec], metadata: Mapping[str, str]) -> int:
    """The size that a file of these tensors and this metadata will have."""
    return plan_header(layout, metadata).file_bytes


class ShardWriter:
    """Writes one safetensors file, its tensors in any order, and resumes it.

    The file has its full size from the start, so that a full disk shows before the work and not after it. The caller
    journals a tensor as written after `sync`; a later writer with the same layout takes the journal's names as
    `resume_written`. Use it from one thread.

    Args:
        temporary: where the file grows; a killed or closed writer leaves it there.
        final: where `finish` moves it, on the same file system.
        layout: the tensors to come.
        metadata: the `__metadata__` of the header.
        resume_written: names of tensors that an earlier writer wrote and synced.

    Attributes:
        written: names of the tensors that the file holds; empty after a resume that found no fitting file.
    """

    def __init__(
        self,
        temporary: Path,
        final: Path,
        layout: Sequence[TensorSpec],
        metadata: Mapping[str, str],
        resume_written: Collection[str] = (),
    ) -> None:
        self._temporary, self._final, self._layout = temporary, final, layout
        self._header = plan_header(layout, metadata, final.name)
        self._infos = self._header.tensors
        resumed = set(resume_written) if self._find_unfinished(set(resume_written)) else set()
        with _writing(temporary):
            if not resumed:
                temporary.parent.mkdir(parents=True, exist_ok=True)
                temporary.unlink(missing_ok=True)
                _allocate(temporary, self._header.file_bytes, final)
            self._file = temporary.open("r+b", buffering=0)
        self.written: set[str] = resumed
        self._write_header()

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, from whatever device it is on."""
        info = self._infos[name]
        if tensor.dtype != info.dtype or tuple(tensor.shape) != info.shape:
            got, planned = f"{tensor.dtype} {list(tensor.shape)}", f"{info.dtype} {list(info.shape)}"
            raise ValueError(f"`{name}` is {got}, but the header of `{info.file}` says {planned}")
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        self.write_chunks(name, [flat.view(torch.uint8).numpy().data])

    def write_chunks(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        """Write one tensor as bytes that come in pieces."""
        info = self._infos[name]
        self.written.discard(name)  # until its last piece is there
        position, end = info.offset, info.offset + info.nbytes
        for chunk in chunks:
            if position + len(chunk) > end:
                raise ValueError(f"more than {info.nbytes} bytes for `{name}` of `{info.file}`")
            self._write_at(position, chunk)
            position += len(chunk)
        if position < end:
            raise ValueError(f"{position - info.offset} bytes for `{name}` of `{info.file}`, not {info.nbytes}")
        self.written.add(name)

    def sync(self) -> None:
        """Flush what is written to the disk: from here on it survives a crash of the machine."""
        with _writing(self._final):
            getattr(os, "fdatasync", os.fsync)(self._file.fileno())

    def set_metadata(self, metadata: Mapping[str, str]) -> None:
        """Replace the metadata by one that takes as many bytes, such as a hash where zeros held its place."""
        header = plan_header(self._layout, metadata, self._final.name)
        if len(header.raw) != len(self._header.raw):
            sizes = f"{len(header.raw)} bytes, not {len(self._header.raw)}"
            raise ValueError(f"with the new metadata the header of `{self._final.name}` takes {sizes}")
        self._header = header
        self._write_header()

    def finish(self) -> str:
        """Make the file final: complete, on the disk and under its own name.

        Returns:
            The sha256 of the whole file, in hex.
        """
        missing = self._infos.keys() - self.written
        if missing:
            raise ValueError(f"`{self._final.name}` lacks {len(missing)} tensors, `{min(missing)}` among them")
        with _writing(self._final):
            self._hash_rest()
            os.fsync(self._file.fileno())
            self.close()
            self._final.parent.mkdir(parents=True, exist_ok=True)
            self._temporary.replace(self._final)
            _sync_folder(self._final.parent)
        return self._sha.hexdigest()

    def close(self) -> None:
        """Let go of the file; an unfinished one stays under its temporary name."""
        self._file.close()

    def _find_unfinished(self, names: set[str]) -> bool:
        """Whether an earlier writer's file is there under the temporary name, moved back there if need be."""
        if not names or not names <= self._infos.keys():
            return False
        # killed between the rename and the caller's journal, the file has its final name already
        found = self._temporary if self._temporary.exists() else self._final
        try:
            header = read_header(found, self._final.name)
        except LoftqError:  # absent, truncated or something else
            return False
        # of the metadata only the names count: `set_metadata` may have changed the values already
        same_metadata = header.metadata.keys() == self._header.metadata.keys()
        if not same_metadata or header.tensors != self._header.tensors:
            return False
        if found == self._final:
            with _writing(self._final):
                self._final.replace(self._temporary)
        return True

    def _write_header(self) -> None:
        self._sha, self._hashed = hashlib.sha256(), 0
        self._write_at(0, self._header.raw)

    def _write_at(self, position: int, data: bytes | memoryview) -> None:
        with _writing(self._final):
            self._file.seek(position)
            view = memoryview(data)
            while view:  # one write stops at 2 GiB
                view = view[self._file.write(view) :]
        if position == self._hashed:
            self._sha.update(data)
            self._hashed += len(data)
        elif position < self._hashed:  # written again: what was hashed is no more, `finish` reads it back
            self._sha, self._hashed = hashlib.sha256(), 0

    def _hash_rest(self) -> None:
        self._file.seek(self._hashed)
        while chunk := self._file.read(CHUNK_BYTES):
            self._sha.update(chunk)
            self._hashed += len(chunk)
        if self._hashed != self._header.file_bytes:
            raise LoftqError(f"`{self._temporary}` lost bytes while it was written", "is another run using it?")


def write_file(path: Path, data: bytes) -> str:
    """Write a small file whole, or not at all; returns its sha256 in hex."""
    return _replace_whole(path, [data])


def copy_file(source: Path, destination: Path) -> str:
    """Copy a file whole, or not at all (what a link points to, not the link); returns its sha256 in hex."""
    return _replace_whole(destination, _chunks(source))


def hash_file(path: Path) -> str:
    """The sha256 of a file, in hex."""
    sha = hashlib.sha256()
    for chunk in _chunks(path):
        sha.update(chunk)
    return sha.hexdigest()


def _replace_whole(path: Path, chunks: Iterable[bytes]) -> str:
    sha, temporary = hashlib.sha256(), path.with_name(path.name + ".tmp")
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as stream:
                for chunk in chunks:
                    stream.write(chunk)
                    sha.update(chunk)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
    return sha.hexdigest()


def _chunks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb", buffering=0) as stream:
            while chunk := stream.read(CHUNK_BYTES):
                yield chunk
    except OSError as error:
        raise LoftqError(f"cannot read `{path}`: {error.strerror or error}") from error


def _allocate(path: Path, file_bytes: int, final: Path) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < file_bytes:  # asked first: allocating would fill the disk before it fails
        raise _disk_full(final, file_bytes, free)
    with path.open("xb") as stream:
        try:
            os.posix_fallocate(stream.fileno(), 0, file_bytes)
        except (AttributeError, OSError) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                path.unlink()
                raise _disk_full(final, file_bytes, shutil.disk_usage(path.parent).free) from error
            stream.truncate(file_bytes)  # not on this system, or not on this file system


def _disk_full(final: Path, file_bytes: int, free: int) -> LoftqError:
    missing = f", {file_bytes - free} bytes too few" if free < file_bytes else " (a quota or a limit on file sizes?)"
    return LoftqError(
        f"no room for `{final}`: it takes {file_bytes} bytes, {free} are free{missing}",
        "free the space or write to another disk; with `--resume` the run goes on from here",
    )


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened, and a rename needs no flush
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hint = "free the space or write to another disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise LoftqError(f"cannot write `{path}`: {error.strerror or error}", hint) from error
