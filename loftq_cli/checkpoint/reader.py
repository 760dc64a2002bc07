"""safetensors files: a validated header, and plain positional reads of one tensor at a time."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from loftq_cli.errors import LoftqError

MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
CHUNK_BYTES = 16 * 2**20
SLICE = re.compile(r"(.+)\[(\d+)\]")  # the name of one slice of a tensor, along its first dimension

# F4 and F6 are left out on purpose: torch has no dtype whose element is one of theirs
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, attribute)
    for name, attribute in {
        "F64": "float64",
        "F32": "float32",
        "F16": "float16",
        "BF16": "bfloat16",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E4M3FNUZ": "float8_e4m3fnuz",
        "F8_E5M2": "float8_e5m2",
        "F8_E5M2FNUZ": "float8_e5m2fnuz",
        "F8_E8M0": "float8_e8m0fnu",
        "C64": "complex64",
        "I64": "int64",
        "I32": "int32",
        "I16": "int16",
        "I8": "int8",
        "U64": "uint64",
        "U32": "uint32",
        "U16": "uint16",
        "U8": "uint8",
        "BOOL": "bool",
    }.items()
    if hasattr(torch, attribute)  # F8_E8M0 came with torch 2.7
}


class Decoder(Protocol):
    """What reads a tensor that is stored as something else than what it is taken for."""

    def read_at(self, descriptor: int, view: memoryview, path: Path, info: TensorInfo, begin: int) -> None:
        """As `read_at` of this module, in bytes of the decoded tensor."""
        ...


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of one file; `offset` counts from the start of the file.

    With a `decoder`, `dtype` and `nbytes` are those of what it makes, and a slice begins as many of these bytes after
    the `offset` of the whole.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int
    decoder: Decoder | None = None


@dataclass(frozen=True)
class Header:
    """A safetensors header: its bytes (length prefix included) and what they say, tensors by name in file order."""

    raw: bytes
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]

    @property
    def file_bytes(self) -> int:
        """The size of the whole file."""
        return len(self.raw) + sum(info.nbytes for info in self.tensors.values())


def header_bytes(start: bytes, file: str, file_bytes: int) -> int:
    """The length of the header of `file`, the prefix included, from the first 8 bytes of the file."""
    if start.startswith(b"version "):
        raise LoftqError(f"`{file}` is a Git LFS pointer, not the file itself", "run `git lfs pull` in its folder")
    if file_bytes < 8 or len(start) < 8:
        raise _damaged(file, f"it has {file_bytes} bytes, fewer than a header")
    length = int.from_bytes(start[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise _damaged(file, f"its header would be {length} bytes long (the limit is {MAX_HEADER_BYTES})")
    if 8 + length > file_bytes:
        raise _damaged(file, f"its header alone is {8 + length} bytes long, the file only {file_bytes}")
    return 8 + length


def parse_header(raw: bytes, file: str, file_bytes: int) -> Header:
    """Parse and validate the header bytes of a safetensors file, as strictly as safetensors does.

    Args:
        raw: the first `header_bytes(...)` bytes of the file.
        file: its name, for the infos and for errors.
        file_bytes: the size of the whole file.

    Raises:
        LoftqError: the header is malformed, or the file does not end where its header says.
    """
    try:
        entries = json.loads(raw[8:].decode(), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"its header is not JSON ({error})") from None
    if raw[8:9] != b"{" or not isinstance(entries, dict):
        raise _damaged(file, "its header is not a JSON object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(file, "its `__metadata__` is not a table of strings")

    infos = [_tensor_info(name, entry, file, len(raw)) for name, entry in entries.items()]
    infos.sort(key=lambda info: (info.offset, info.nbytes))
    end = len(raw)
    for info in infos:
        if info.offset != end:
            what = "overlaps the tensor before it" if info.offset < end else "leaves a hole before it"
            raise _damaged(file, f"tensor `{info.name}` {what} (it starts at byte {info.offset}, not {end})")
        end += info.nbytes
    if end > file_bytes:
        raise _damaged(file, f"it is truncated: {file_bytes} bytes of {end}")
    if end < file_bytes:
        raise _damaged(file, f"{file_bytes - end} bytes follow its last tensor: {file_bytes} bytes, expected {end}")
    return Header(raw, {info.name: info for info in infos}, metadata)


def read_header(path: Path, file: str | None = None) -> Header:
    """Read and validate the header of the safetensors file at `path`, called `file` in the infos and in errors."""
    file = file or path.name
    with _open(path) as stream:
        file_bytes = path.stat().st_size
        start = stream.read(8)
        return parse_header(start + stream.read(header_bytes(start, file, file_bytes) - 8), file, file_bytes)


def lookup(infos: Mapping[str, TensorInfo], name: str) -> TensorInfo | None:
    """The tensor called `name`, or the slice `name[i]` of one that is called so; None if there is none."""
    if name in infos or (match := SLICE.fullmatch(name)) is None:
        return infos.get(name)
    whole, i = infos.get(match[1]), int(match[2])
    if whole is None or not whole.shape or i >= whole.shape[0]:
        return None
    each = whole.nbytes // whole.shape[0]  # it lies in one piece, as a tensor does
    return replace(whole, name=name, shape=whole.shape[1:], offset=whole.offset + i * each, nbytes=each)


def whole_name(name: str) -> str:
    """The name of the tensor that `name` is, or is a slice of."""
    match = SLICE.fullmatch(name)
    return match[1] if match else name


def read_tensor(path: Path, info: TensorInfo) -> Tensor:
    """Read one tensor into memory of its own.

    Not a memory map: the pages of a map stay in the process, and a pass over a model would end up holding all of it.
    """
    buffer = torch.empty(info.nbytes, dtype=torch.uint8)
    read_into(buffer.numpy().data, path, info, 0)
    return buffer.view(info.dtype).reshape(info.shape)


def read_into(view: memoryview, path: Path, info: TensorInfo, begin: int) -> None:
    """Fill `view` with the bytes of one tensor from its byte `begin` on."""
    with _open(path) as stream:
        read_at(stream.fileno(), view, path, info, begin)


def read_at(descriptor: int, view: memoryview, path: Path, info: TensorInfo, begin: int) -> None:
    """As `read_into`, from a file that is open already."""
    if info.decoder is not None:
        info.decoder.read_at(descriptor, view, path, info, begin)
        return
    done = 0
    while done < len(view):  # one read stops at 2 GiB
        try:
            count = os.preadv(descriptor, [view[done:]], info.offset + begin + done)
        except OSError as error:
            raise LoftqError(f"cannot read `{path}`: {error.strerror or error}") from error
        if not count:
            raise LoftqError(
                f"`{path}` ends inside tensor `{info.name}`: {begin + done} of its {info.nbytes} bytes are there",
                "the file changed since its header was read: put it back, or download it again",
            )
        done += count


def sample_hash(path: Path, header: Header) -> str:
    """The sha256 of the first 4 KiB of every tensor: a cheap stand-in for that of the whole file."""
    sha = hashlib.sha256()
    with _open(path) as stream:
        for info in header.tensors.values():
            stream.seek(info.offset)
            sha.update(stream.read(min(info.nbytes, 4096)))
    return sha.hexdigest()


def read_chunks(path: Path, info: TensorInfo, chunk_bytes: int = CHUNK_BYTES) -> Iterator[memoryview]:
    """Yield the bytes of one tensor in order, for copies that never look at it; each chunk is the caller's to keep."""
    with _open(path) as stream:
        for begin in range(0, info.nbytes, chunk_bytes):
            chunk = memoryview(bytearray(min(chunk_bytes, info.nbytes - begin)))
            read_at(stream.fileno(), chunk, path, info, begin)
            yield chunk


def open_file(path: Path) -> FileIO:
    """Open a file for reading, unbuffered."""
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise LoftqError(f"cannot read `{path}`: {error.strerror or error}") from error


@contextmanager
def _open(path: Path) -> Iterator[FileIO]:
    with open_file(path) as stream:
        try:
            yield stream
        except OSError as error:
            raise LoftqError(f"cannot read `{path}`: {error.strerror or error}") from error


def _tensor_info(name: str, entry: Any, file: str, data_start: int) -> TensorInfo:
    match entry:
        case {"dtype": str(dtype_name), "shape": [*shape], "data_offsets": [begin, end]}:
            numbers = [*shape, begin, end]
        case _:
            raise _damaged(file, f"the entry of tensor `{name}` lacks dtype, shape or data_offsets")
    if dtype_name not in DTYPES:
        raise LoftqError(f"`{file}`: tensor `{name}` has dtype {dtype_name}, which torch {torch.__version__} lacks")
    if not all(type(number) is int and number >= 0 for number in numbers) or end < begin:
        raise _damaged(file, f"tensor `{name}` has shape {shape} and offsets {begin}, {end}")
    dtype = DTYPES[dtype_name]
    expected = math.prod(shape) * dtype.itemsize
    if end - begin != expected:
        raise _damaged(file, f"tensor `{name}` takes {end - begin} bytes, its {dtype_name} {shape} needs {expected}")
    return TensorInfo(name, dtype, tuple(shape), file, data_start + begin, expected)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"`{twice}` stands in it twice")
    return table


def _damaged(file: str, why: str) -> LoftqError:
    return LoftqError(f"`{file}` is damaged: {why}", "download or copy it again")
