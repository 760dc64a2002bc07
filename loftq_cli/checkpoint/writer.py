"""One safetensors file, written tensor by tensor under a temporary name, hashed on the way, and renamed once whole."""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loftq_cli.checkpoint.files import allocate, sync_folder, writing
from loftq_cli.checkpoint.reader import DTYPES, Header, TensorInfo, lookup, read_header, whole_name
from loftq_cli.errors import LoftqError

HASH_BYTES = 8 << 20  # read back at once, out of the page cache
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written; if `sliced`, in slices along its first dimension, which are called `name[i]`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    sliced: bool = False

    @property
    def nbytes(self) -> int:
        """Its bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def joined(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """The tensors of a file whose slices and tensors are `specs`; slices that follow each other are those of one."""
    parts: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        parts.setdefault(whole_name(spec.name), []).append(spec)
    return [
        TensorSpec(name, of[0].dtype, (len(of), *of[0].shape), sliced=True) if of[0].name != name else of[0]
        for name, of in parts.items()
    ]


def _pieces(layout: Iterable[TensorSpec], header: Header) -> dict[str, TensorInfo]:
    """What is written at a time: tensors, or slices of them, in the order of the bytes."""
    count = {spec.name: spec.shape[0] if spec.sliced else None for spec in layout}
    pieces: dict[str, TensorInfo] = {}
    for name, info in header.tensors.items():
        number = count[name]
        for part in [name] if number is None else [f"{name}[{i}]" for i in range(number)]:
            found = lookup({name: info}, part)
            assert found is not None
            pieces[part] = found
    return pieces


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


def is_unfinished(
    temporary: Path,
    final: Path,
    layout: Sequence[TensorSpec],
    metadata: Mapping[str, str],
    written: Collection[str],
) -> bool:
    """Whether the file of an earlier `ShardWriter` with this layout is there, for these tensors of it to be kept."""
    planned = plan_header(layout, metadata, final.name)
    if not written or not set(written) <= _pieces(layout, planned).keys():
        return False
    try:
        header = read_header(temporary if temporary.exists() else final, final.name)
    except LoftqError:  # absent, truncated or something else
        return False
    # of the metadata only the names count: `set_metadata` may have changed the values already
    return header.metadata.keys() == planned.metadata.keys() and header.tensors == planned.tensors


class ShardWriter:
    """Writes one safetensors file, its tensors in any order, and resumes it.

    The file has its full size from the start, so that a full disk shows before the work and not after it. The caller
    journals a tensor as written after `sync`; a later writer with the same layout takes the journal's names as
    `resume_written`. Several threads, and with `join` several processes, may write tensors at once.

    Args:
        temporary: where the file grows; a killed or closed writer leaves it there.
        final: where `finish` moves it, on the same file system.
        layout: the tensors to come.
        metadata: the `__metadata__` of the header.
        resume_written: names of tensors that an earlier writer wrote and synced.
        join: the file is there, begun by another process of this run.
        hash_ahead: hash while it is written; in vain where the metadata will be replaced.

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
        join: bool = False,
        hash_ahead: bool = True,
    ) -> None:
        self._temporary, self._final, self._layout = temporary, final, layout
        self._header = plan_header(layout, metadata, final.name)
        self._infos = _pieces(layout, self._header)
        there = join or is_unfinished(temporary, final, layout, metadata, resume_written)
        resumed = set(resume_written) if there else set()
        self._hashes_ahead = hash_ahead
        with writing(temporary):
            if resumed and not temporary.exists():  # killed between the rename and the caller's journal
                final.replace(temporary)
            if not resumed and not join:
                temporary.parent.mkdir(parents=True, exist_ok=True)
                temporary.unlink(missing_ok=True)
                allocate(temporary, self._header.file_bytes, final)
            self._file = temporary.open("r+b", buffering=0)
        self.written: set[str] = resumed
        self._hashing, self._closing = threading.Lock(), threading.Lock()
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
        self.forget([name])  # until its last piece is there
        position, end = info.offset, info.offset + info.nbytes
        for chunk in chunks:
            if position + len(chunk) > end:
                raise ValueError(f"more than {info.nbytes} bytes for `{name}` of `{info.file}`")
            self._write_at(position, chunk)
            position += len(chunk)
        if position < end:
            raise ValueError(f"{position - info.offset} bytes for `{name}` of `{info.file}`, not {info.nbytes}")
        self.written.add(name)
        self._hash_ahead()

    def forget(self, names: Iterable[str]) -> None:
        """Take tensors for not written: they will come again."""
        for name in self.written.intersection(names):
            self.written.discard(name)
            with self._hashing:
                if self._infos[name].offset < self._hashed:  # what was hashed is no more
                    self._restart_hash()

    def sync(self) -> None:
        """Flush what is written to the disk, unless it is closed: from here on it survives a crash of the machine."""
        with self._closing, writing(self._final):
            if not self._file.closed:
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
        with writing(self._final):
            with self._hashing:
                self._hash_to(self._header.file_bytes)
            os.fsync(self._file.fileno())
            self.close()
            self._final.parent.mkdir(parents=True, exist_ok=True)
            self._temporary.replace(self._final)
            sync_folder(self._final.parent)
        return self._sha.hexdigest()

    def close(self) -> None:
        """Let go of the file; an unfinished one stays under its temporary name."""
        with self._closing:
            self._file.close()

    def _write_header(self) -> None:
        self._write_at(0, self._header.raw)
        with self._hashing:
            self._restart_hash()

    def _write_at(self, position: int, data: bytes | memoryview) -> None:
        with writing(self._final):
            view = memoryview(data).cast("B")
            while view:  # one write stops at 2 GiB
                count = os.pwrite(self._file.fileno(), view, position)
                view, position = view[count:], position + count

    def _restart_hash(self) -> None:
        self._sha, self._hashed, self._unhashed = hashlib.sha256(), 0, deque(self._infos.values())

    def _hash_ahead(self) -> None:
        """Hash what is there without a gap, so that little is left to `finish`; not if another thread is at it."""
        if not self._hashes_ahead or not self._hashing.acquire(blocking=False):
            return
        try:
            end = 0
            while self._unhashed and self._unhashed[0].name in self.written:
                info = self._unhashed.popleft()
                end = info.offset + info.nbytes
            with writing(self._final):
                self._hash_to(end)
        finally:
            self._hashing.release()

    def _hash_to(self, end: int) -> None:
        while self._hashed < end:
            chunk = os.pread(self._file.fileno(), min(HASH_BYTES, end - self._hashed), self._hashed)
            if not chunk:
                raise LoftqError(f"`{self._temporary}` lost bytes while it was written", "is another run using it?")
            self._sha.update(chunk)
            self._hashed += len(chunk)
