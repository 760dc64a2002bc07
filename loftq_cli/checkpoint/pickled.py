"""`pytorch_model.bin`: where its tensors lie in the file, found without running anything that the file says.

`torch.save` writes a zip file: a pickle that says how each tensor is made from a storage, and the storages, one file
each, not compressed. Of the pickle only the few names below are understood, and they make descriptions, not objects; so
tensors are read where they lie, as those of a safetensors file are.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loftq_cli.checkpoint.reader import Header, TensorInfo, header_bytes
from loftq_cli.errors import LoftqError

STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
DTYPES = {"float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64"}  # of `_rebuild_tensor_v3`
LOCAL_HEADER_BYTES = 30  # of a file in a zip file; its name and an extra field follow, whose lengths stand in it
DEEPEST = 50  # tuples in each other: torch has three
MOST_BYTES = 100_000_000  # of what is no values, as safetensors allows in a header
# by the names of a pickle's operations: whether each takes all up to a mark, how many values more, how many it leaves
EFFECTS = {
    code.name: (
        pickletools.markobject in code.stack_before,
        [*code.stack_before, pickletools.markobject].index(pickletools.markobject),
        len(code.stack_after),
    )
    for code in pickletools.opcodes
}


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: torch.dtype


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class NotPlainError(Exception):
    """A file that holds something else than tensors by name, or holds them otherwise."""


def read_pickled(path: Path, file: str, shown_as: str) -> Header:
    """Find the tensors of the file at `path`, called `file` in errors; their infos say they are in `shown_as`.

    Raises:
        LoftqError: it cannot be read, or is damaged.
        NotPlainError: it is none that this reader understands.
    """
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as stream:
            start = stream.read(8)
            if start[:2] != b"PK":
                header_bytes(start if start.startswith(b"version ") else bytes(8), file, max(file_bytes, 8))
                raise NotPlainError("it is in the format of torch before 1.6, or none of torch at all")
            with zipfile.ZipFile(stream) as archive:
                records = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
                if "data.pkl" not in records:
                    raise NotPlainError("it holds no `data.pkl`")
                # else little on disk could be much to read
                for small in {"data.pkl", "byteorder"} & records.keys():
                    if records[small].compress_type != zipfile.ZIP_STORED or records[small].file_size > MOST_BYTES:
                        raise NotPlainError(f"its `{small}` is compressed, or beyond all measure")
                if "byteorder" in records and archive.read(records["byteorder"]) != b"little":
                    raise NotPlainError("its numbers are big-endian")
                raw = archive.read(records["data.pkl"])
            _refuse_bombs(raw)
            content = _Unpickler(raw).load()
            tensors = {}
            for name, tensor in _flat(content).items():
                record = records.get(f"data/{tensor.storage.key}")
                if record is None or record.compress_type != zipfile.ZIP_STORED:
                    raise NotPlainError(f"the values of `{name}` are missing, or compressed")
                tensors[name] = _info(name, tensor, record, _data_start(stream, record), shown_as, file)
    except OSError as error:
        raise LoftqError(f"cannot read `{path}`: {error.strerror or error}") from error
    except (NotPlainError, LoftqError):
        raise
    except zipfile.BadZipFile as error:
        raise LoftqError(f"`{file}` is damaged: {error}", "download or copy it again") from None
    except Exception as error:  # whatever a made-up pickle can make pickle raise
        raise NotPlainError(f"{type(error).__name__}: {error}".splitlines()[0][:200]) from None
    infos = sorted(tensors.values(), key=lambda info: info.offset)
    return Header(raw, {info.name: info for info in infos}, {})


def _refuse_bombs(raw: bytes) -> None:
    """Refuse what would end the process rather than raise: it goes through what the pickle does, and makes nothing.

    A value remembered under a number beyond those before it makes room for all between. A tuple of a tuple of a tuple,
    as the name of a tensor, is hashed from the outside in, each within the call for the other.
    """
    stack: list[int | None] = []  # how deep tuples are in what lies there; None for a mark
    memo: dict[int, int | None] = {}
    for count, (code, argument, _) in enumerate(pickletools.genops(raw)):
        if code.name.endswith("PUT"):
            if int(argument or 0) > count:
                raise NotPlainError("it remembers more values than it has")
            memo[int(argument or 0)] = stack[-1]
        elif code.name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif code.name.endswith("GET"):
            stack.append(memo[int(argument or 0)])
        elif code.name == "MARK":
            stack.append(None)
        else:
            to_mark, more, made = EFFECTS[code.name]
            deepest = 0
            while to_mark and (depth := stack.pop()) is not None:
                deepest = max(deepest, depth)
            for _ in range(more):
                deepest = max(deepest, stack.pop() or 0)
            deepest += code.name.startswith("TUPLE")
            if deepest > DEEPEST:
                raise NotPlainError("its values are nested beyond all measure")
            stack += [deepest] * made


def _flat(content: Any) -> Mapping[str, _Tensor]:
    if not isinstance(content, dict) or not content:
        raise NotPlainError("it holds no table of tensors")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, _Tensor):
            raise NotPlainError(f"its `{name}` is no tensor")
    return content


def _info(name: str, tensor: _Tensor, record: zipfile.ZipInfo, start: int, shown_as: str, file: str) -> TensorInfo:
    if not _is_contiguous(tensor):
        raise NotPlainError(f"`{name}` does not lie in one piece")
    begin, nbytes = tensor.offset * tensor.dtype.itemsize, math.prod(tensor.shape) * tensor.dtype.itemsize
    if begin < 0 or min(tensor.shape, default=0) < 0 or begin + nbytes > record.file_size:
        raise LoftqError(f"`{file}` is damaged: `{name}` reaches beyond its storage", "download or copy it again")
    return TensorInfo(name, tensor.dtype, tensor.shape, shown_as, start + begin, nbytes)


def _is_contiguous(tensor: _Tensor) -> bool:
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if size > 1 and stride != expected:
            return False
        expected *= max(size, 1)
    return True


def _data_start(stream: io.BufferedReader, record: zipfile.ZipInfo) -> int:
    stream.seek(record.header_offset)
    local = stream.read(LOCAL_HEADER_BYTES)
    lengths = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    return record.header_offset + LOCAL_HEADER_BYTES + lengths


def _tensor(storage: _Storage, offset: int, shape: Any, strides: Any, *_: Any) -> _Tensor:
    return _Tensor(storage, storage.dtype, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


def _tensor_of_dtype(
    storage: _Storage, offset: int, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: torch.dtype, *_: Any
) -> _Tensor:
    return _Tensor(storage, dtype, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


def _parameter(data: _Tensor, *_: Any) -> _Tensor:
    return data


MAKERS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_of_dtype,
    ("torch._utils", "_rebuild_parameter"): _parameter,
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, raw: bytes) -> None:
        super().__init__(io.BytesIO(raw), encoding="utf-8")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in MAKERS:
            return MAKERS[module, name]
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if module == "torch" and name in DTYPES:
            return getattr(torch, name)
        if (module, name) == ("torch.storage", "UntypedStorage"):
            return torch.uint8
        raise NotPlainError(f"it names `{module}.{name}`, which is no part of a tensor")

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", torch.dtype() as dtype, str(key), *_):
                return _Storage(key, dtype)
        raise NotPlainError("its storages are none of torch's")
