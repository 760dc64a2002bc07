"""safetensors files: headers against safetensors itself, whole and resumed files, memory."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from loftq_cli.checkpoint.files import copy_file, hash_file, write_file
from loftq_cli.checkpoint.reader import DTYPES, header_bytes, parse_header, read_chunks, read_header, read_tensor
from loftq_cli.checkpoint.writer import ShardWriter, TensorSpec, file_bytes
from loftq_cli.errors import LoftqError

FUZZ = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def shorten(path: Path, by: int) -> None:
    os.truncate(path, path.stat().st_size - by)


# headers


def file_of(entries: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BAD_FILES = {
    "empty": (b"", "0 bytes"),
    "short": (b"\x02\0\0", "3 bytes"),
    "header beyond the limit": (file_of(b"{}", length=200_000_000), "limit is 100000000"),
    "header beyond the file": (file_of(b"{}", length=50), "58 bytes long, the file only 10"),
    "not JSON": (file_of(b"{nope"), "not JSON"),
    "not UTF-8": (file_of(b'{"\xff": 1}'), "not JSON"),
    "nested": (file_of(b"[" * 100_000), "not JSON"),
    "a list": (file_of([]), "not a JSON object"),
    "leading space": (file_of(b' {"a": 1}'), "not a JSON object"),
    "metadata of numbers": (file_of({"__metadata__": {"a": 1}}), "__metadata__"),
    "no shape": (file_of({"w": {"dtype": "F32", "data_offsets": [0, 8]}}, b"x" * 8), "`w` lacks"),
    "entry a list": (file_of({"w": [1]}), "`w` lacks"),
    "three offsets": (file_of({"w": entry(offsets=[0, 8, 9])}, b"x" * 8), "`w` lacks"),
    "dtype unknown": (file_of({"w": entry("F33")}, b"x" * 8), "`w` has dtype F33"),
    "negative size": (file_of({"w": entry(shape=[-2])}, b"x" * 8), "shape [-2]"),
    "size true": (file_of({"w": entry(shape=[True, 2])}, b"x" * 8), "shape [True, 2]"),
    "size 2.0": (file_of({"w": entry(shape=[2.0])}, b"x" * 8), "shape [2.0]"),
    "offsets reversed": (file_of({"w": entry(offsets=[8, 0])}, b"x" * 8), "offsets 8, 0"),
    "too few bytes": (file_of({"w": entry(offsets=[0, 4])}, b"x" * 4), "takes 4 bytes, its F32 [2] needs 8"),
    "hole": (file_of({"v": entry(), "w": entry(offsets=[12, 20])}, b"x" * 20), "`w` leaves a hole"),
    "hole at the start": (file_of({"w": entry(offsets=[4, 12])}, b"x" * 12), "`w` leaves a hole"),
    "overlap": (file_of({"v": entry(), "w": entry(offsets=[4, 12])}, b"x" * 12), "`w` overlaps"),
    "truncated": (file_of({"w": entry()}, b"x" * 7), "truncated"),
    "bytes at the end": (file_of({"w": entry()}, b"x" * 9), "1 bytes follow"),
    "name twice": (
        file_of(b'{"w": %s, "w": %s}' % ((json.dumps(entry()).encode(),) * 2), b"x" * 8),
        "`w` stands in it twice",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_headers(tmp_path: Path, case: str) -> None:
    content, word = BAD_FILES[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(LoftqError) as caught:
        read_header(path)
    assert "`x.safetensors`" in caught.value.message
    assert word in caught.value.message
    if case not in {"name twice"}:  # there safetensors takes the last one
        with pytest.raises(SafetensorError), safe_open(path, "pt"):
            pass


def test_truncation_names_both_sizes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.ones(100)}, path)
    size = path.stat().st_size
    shorten(path, 10)
    with pytest.raises(LoftqError, match=f"{size - 10} bytes of {size}"):
        read_header(path)


@FUZZ
@given(data=st.data())
def test_what_our_parser_accepts_safetensors_accepts(tmp_path: Path, data: st.DataObject) -> None:
    """A valid header with some bytes replaced: never accepted by us alone, never read differently."""
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3, 2), "b": torch.ones(5, dtype=torch.uint8)}, path, metadata={"k": "v"})
    content = bytearray(path.read_bytes())
    header_end = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, header_end - 1))
        content[position] = data.draw(st.sampled_from(b'0123456789,:"[]{} F-.' + bytes([0, 255])))
    path.write_bytes(content)
    try:
        header = read_header(path)
    except LoftqError:
        return
    with safe_open(path, "pt") as theirs:
        assert {name: info.shape for name, info in header.tensors.items()} == {
            name: tuple(theirs.get_slice(name).get_shape())
            for name in theirs.keys()  # noqa: SIM118
        }
        for name, info in header.tensors.items():
            assert torch.equal(bits(read_tensor(path, info)), bits(theirs.get_tensor(name)))


def test_a_file_that_shrinks_after_its_header_was_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.ones(100)}, path)
    info = read_header(path).tensors["w"]
    shorten(path, 8)
    for read in (read_tensor, lambda *args: list(read_chunks(*args))):
        with pytest.raises(LoftqError, match=r"x\.safetensors` ends inside tensor `w`: 392 of its 400 bytes"):
            read(path, info)
    path.unlink()
    with pytest.raises(LoftqError, match="cannot read"):
        read_tensor(path, info)


# writing


def noise(spec: TensorSpec, seed: int) -> Tensor:
    data = torch.randint(0, 256, (spec.nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return (data & 1 if spec.dtype == torch.bool else data).view(spec.dtype).reshape(spec.shape)


LAYOUTS = st.lists(
    st.builds(
        TensorSpec,
        TEXT,
        st.sampled_from(list(DTYPES.values())),
        st.lists(st.integers(0, 5), max_size=3).map(tuple),
    ),
    max_size=8,
    unique_by=lambda spec: spec.name,
)


@settings(FUZZ, max_examples=150)
@given(layout=LAYOUTS, metadata=st.dictionaries(st.sampled_from("abc"), TEXT), seed=st.integers(0, 99))
def test_round_trip(tmp_path: Path, layout: list[TensorSpec], metadata: dict[str, str], seed: int) -> None:
    """Any dtypes and shapes, written in any order, whole or in chunks: safetensors and our reader give them back."""
    path = tmp_path / "x.safetensors"
    tensors = {spec.name: noise(spec, seed) for spec in layout}
    shard = ShardWriter(tmp_path / "growing", path, layout, metadata)
    for number, spec in enumerate(random.Random(seed).sample(layout, len(layout))):
        if number % 2:
            content = bytes(bits(tensors[spec.name]).tolist())
            shard.write_chunks(spec.name, [content[:3], memoryview(content)[3:]])
        else:
            shard.write(spec.name, tensors[spec.name])
    sha256 = shard.finish()

    assert sha256 == hash_file(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.stat().st_size == file_bytes(layout, metadata)
    assert sorted(tmp_path.iterdir()) == [path]
    header = read_header(path)
    assert len(header.raw) % 8 == 0
    for info in header.tensors.values():
        assert info.offset % info.dtype.itemsize == 0, info
    whole = [spec.name for spec in layout if spec.nbytes % 8 == 0]
    assert [name for name in header.tensors if name in whole] == whole
    theirs = load_file(path)
    assert theirs.keys() == header.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        for loaded in (theirs[name], read_tensor(path, header.tensors[name])):
            assert (loaded.dtype, loaded.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(bits(loaded), bits(tensor))
    with safe_open(path, "pt") as opened:
        assert (opened.metadata() or {}) == metadata


def test_every_dtype_of_safetensors_that_torch_has() -> None:
    from safetensors.torch import _TYPES

    assert _TYPES.items() <= DTYPES.items()


def test_strided_tensors_are_written_as_they_look(tmp_path: Path) -> None:
    tensors = {"w": torch.arange(12.0).reshape(3, 4).t()[1:, ::2].requires_grad_(), "v": torch.arange(6.0)[::2]}
    layout = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    shard = ShardWriter(tmp_path / "t", tmp_path / "f", layout, {})
    for name, tensor in tensors.items():
        shard.write(name, tensor)
    shard.finish()
    for name, tensor in load_file(tmp_path / "f").items():
        assert torch.equal(tensor, tensors[name])


class Slow(FileIO):
    """A file that moves few bytes a call, as every file does beyond 2 GiB."""

    def readinto(self, buffer: Any) -> int:
        return super().readinto(memoryview(buffer)[:7]) or 0

    def write(self, data: Any) -> int:
        return super().write(memoryview(data)[:7]) or 0


def test_partial_reads_and_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor, path = torch.arange(100.0), tmp_path / "f"
    monkeypatch.setattr(Path, "open", lambda path, mode, buffering=-1: Slow(path, mode.replace("b", "")))
    shard = ShardWriter(tmp_path / "t", path, [TensorSpec("w", tensor.dtype, (100,))], {})
    shard.write("w", tensor)
    sha256 = shard.finish()
    info = read_header(path).tensors["w"]
    assert torch.equal(read_tensor(path, info), tensor)
    assert b"".join(read_chunks(path, info, 60)) == bytes(bits(tensor).tolist())
    monkeypatch.undo()
    assert sha256 == hash_file(path)
    assert torch.equal(load_file(path)["w"], tensor)


LAYOUT = [
    TensorSpec("one", torch.bfloat16, (4, 8)),
    TensorSpec("odd", torch.uint8, (5,)),
    TensorSpec("two", torch.float32, (3, 2)),
    TensorSpec("empty", torch.float16, (0, 7)),
    TensorSpec("three", torch.int64, ()),
]
TENSORS = {spec.name: noise(spec, 1) for spec in LAYOUT}
METADATA = {"format": "pt", "base": "0" * 64}


def shard_writer(folder: Path, written: Any = (), metadata: dict[str, str] = METADATA) -> ShardWriter:
    return ShardWriter(folder / "work" / "growing", folder / "out" / "x.safetensors", LAYOUT, metadata, set(written))


def write_all(shard: ShardWriter, skip: Any = ()) -> None:
    for name, tensor in TENSORS.items():
        if name not in skip:
            shard.write(name, tensor)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, str]:
    folder = tmp_path_factory.mktemp("straight")
    shard = shard_writer(folder)
    write_all(shard)
    return (folder / "out/x.safetensors").read_bytes() if (sha256 := shard.finish()) else b"", sha256


def finished_like(shard: ShardWriter, folder: Path, straight: tuple[bytes, str]) -> bool:
    sha256 = shard.finish()
    left = list((folder / "work").iterdir())
    return ((folder / "out/x.safetensors").read_bytes(), sha256) == straight and not left


@pytest.mark.parametrize("count", range(len(LAYOUT) + 1))
def test_resumed_after_each_tensor(tmp_path: Path, straight: tuple[bytes, str], count: int) -> None:
    first, names = shard_writer(tmp_path), list(TENSORS)
    for name in names[:count]:
        first.write(name, TENSORS[name])
    first.sync()
    if count < len(names):
        first.write_chunks(names[count], [b"\xff" * LAYOUT[count].nbytes])  # written, but killed before the journal
    first.close()
    second = shard_writer(tmp_path, names[:count])
    assert second.written == set(names[:count])
    write_all(second, skip=second.written)
    assert finished_like(second, tmp_path, straight)


def test_resumed_after_the_rename(tmp_path: Path, straight: tuple[bytes, str]) -> None:
    first = shard_writer(tmp_path)
    write_all(first)
    first.finish()
    second = shard_writer(tmp_path, ["one", "two"])
    assert not (tmp_path / "out/x.safetensors").exists()
    assert second.written == {"one", "two"}
    write_all(second, skip=second.written)
    assert finished_like(second, tmp_path, straight)


def test_resumed_after_the_metadata_was_set(tmp_path: Path, straight: tuple[bytes, str]) -> None:
    first = shard_writer(tmp_path)
    write_all(first)
    first.set_metadata({**METADATA, "base": "f" * 64})
    first.close()
    second = shard_writer(tmp_path, TENSORS)
    assert second.written == set(TENSORS)
    assert finished_like(second, tmp_path, straight)


def another_file(folder: Path) -> None:
    (folder / "work/growing").unlink()
    write_file(folder / "out/x.safetensors", file_of({"one": entry()}, b"x" * 8))


SPOILED: dict[str, Callable[[Path], Any]] = {
    "truncated": lambda f: shorten(f / "work/growing", 1),
    "longer": lambda f: (f / "work/growing").open("ab").write(b"x"),
    "only a header": lambda f: shorten(f / "work/growing", 60),
    "empty": lambda f: (f / "work/growing").write_bytes(b""),
    "gone": lambda f: (f / "work/growing").unlink(),
    "another layout": lambda f: save_file({"one": torch.ones(4)}, f / "work/growing"),
    "the same in another order": lambda f: ShardWriter(f / "work/growing", f / "x", LAYOUT[::-1], METADATA).close(),
    "other metadata": lambda f: shard_writer(f, metadata={"format": "pt", "source": "0" * 62}).close(),
    "another file is there": another_file,
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_file_that_does_not_fit_is_started_afresh(tmp_path: Path, straight: tuple[bytes, str], case: str) -> None:
    first = shard_writer(tmp_path)
    write_all(first)
    first.close()
    SPOILED[case](tmp_path)
    second = shard_writer(tmp_path, ["one", "two"])
    assert second.written == set()
    assert (tmp_path / "out/x.safetensors").exists() == (case == "another file is there")
    write_all(second)
    assert finished_like(second, tmp_path, straight)


def test_names_that_are_not_in_the_layout_start_afresh(tmp_path: Path) -> None:
    first = shard_writer(tmp_path)
    write_all(first)
    first.close()
    assert shard_writer(tmp_path, ["one", "what"]).written == set()


def test_metadata_known_at_the_end(tmp_path: Path) -> None:
    shard = shard_writer(tmp_path)
    write_all(shard)
    with pytest.raises(ValueError, match="takes"):
        shard.set_metadata({**METADATA, "base": "f" * 640})
    shard.set_metadata({**METADATA, "base": "f" * 64})
    sha256, path = shard.finish(), tmp_path / "out/x.safetensors"
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_header(path).metadata["base"] == "f" * 64
    assert torch.equal(load_file(path)["two"], TENSORS["two"])


@pytest.mark.parametrize("order", [1, -1])
def test_hashed_while_written_in_any_order(tmp_path: Path, order: int) -> None:
    shard = shard_writer(tmp_path)
    for name in list(shard._infos)[::order]:
        shard.write(name, TENSORS[name])
    assert shard._hashed == shard._header.file_bytes  # nothing is left to `finish`
    assert shard.finish() == hash_file(tmp_path / "out/x.safetensors")


def test_written_by_several_threads_and_processes(tmp_path: Path, straight: tuple[bytes, str]) -> None:
    first = shard_writer(tmp_path)
    second = ShardWriter(tmp_path / "work/growing", tmp_path / "out" / "x.safetensors", LAYOUT, METADATA, join=True)
    names = list(first._infos)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: first.write(name, TENSORS[name]), names[::2]))
        list(pool.map(lambda name: second.write(name, TENSORS[name]), names[1::2]))
    second.close()
    first.written.update(second.written)
    assert finished_like(first, tmp_path, straight)


def test_a_tensor_written_again(tmp_path: Path, straight: tuple[bytes, str]) -> None:
    shard = shard_writer(tmp_path)
    shard.write("one", torch.zeros_like(TENSORS["one"]))

    def breaks() -> Any:
        yield b"12"
        raise LoftqError("read error")

    with pytest.raises(LoftqError, match="read error"):
        shard.write_chunks("one", breaks())
    assert "one" not in shard.written
    write_all(shard)
    assert finished_like(shard, tmp_path, straight)


def test_misuse(tmp_path: Path) -> None:
    shard = shard_writer(tmp_path)
    for wrong in (TENSORS["two"].double(), TENSORS["two"].t()):
        with pytest.raises(ValueError, match=r"the header of `x\.safetensors` says"):
            shard.write("two", wrong)
    for content in (b"x" * 23, b"x" * 25):
        with pytest.raises(ValueError, match="`two`"):
            shard.write_chunks("two", [content])
    with pytest.raises(KeyError):
        shard.write("four", TENSORS["two"])
    shard.write("one", TENSORS["one"])
    with pytest.raises(ValueError, match="lacks 4 tensors, `empty` among them"):
        shard.finish()
    shard.close()
    assert (tmp_path / "work/growing").exists()
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="twice"):
        ShardWriter(tmp_path / "t", tmp_path / "f", [LAYOUT[0], LAYOUT[0]], {})


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = file_bytes(LAYOUT, METADATA)
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size - 17))
        with pytest.raises(LoftqError, match="17 bytes too few"):
            shard_writer(tmp_path)
    for number in (errno.ENOSPC, errno.EDQUOT):

        def full(*args: Any, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", full)
            with pytest.raises(LoftqError, match=f"takes {size} bytes"):
                shard_writer(tmp_path)
        assert not (tmp_path / "work/growing").exists()


def test_file_systems_that_cannot_allocate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, straight: tuple[bytes, str]
) -> None:
    def unsupported(*args: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    shard = shard_writer(tmp_path)
    write_all(shard)
    assert finished_like(shard, tmp_path, straight)


def test_the_space_is_taken_at_the_start(tmp_path: Path) -> None:
    shard = ShardWriter(tmp_path / "t", tmp_path / "f", [TensorSpec("w", torch.uint8, (1 << 22,))], {})
    assert (tmp_path / "t").stat().st_blocks * 512 >= 1 << 22
    shard.close()


def test_small_files_are_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sub" / "a.json"
    assert write_file(path, b"old") == hashlib.sha256(b"old").hexdigest()
    (tmp_path / "link").symlink_to(path)
    assert copy_file(tmp_path / "link", tmp_path / "copy") == hash_file(path)
    assert not (tmp_path / "copy").is_symlink()
    assert (tmp_path / "copy").read_bytes() == b"old"

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LoftqError, match=r"cannot write .*a\.json.*No space"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(LoftqError, match="cannot read"):
        copy_file(tmp_path / "absent", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"old"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_memory_holds_one_tensor(tmp_path: Path) -> None:
    """Eight tensors of 32 MiB: reading each grows the peak by one of them, copying all by a few chunks."""
    specs = [TensorSpec(str(number), torch.float16, (1 << 12, 1 << 12)) for number in range(8)]
    shard = ShardWriter(tmp_path / "t", tmp_path / "x.safetensors", specs, {})
    for spec in specs:
        shard.write(spec.name, torch.full(spec.shape, int(spec.name), dtype=spec.dtype))
    shard.finish()
    code = """
import sys
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from loftq_cli.checkpoint.reader import read_chunks, read_header, read_tensor
from loftq_cli.checkpoint.writer import ShardWriter, TensorSpec
def status(key):
    return int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1]) / 1024
def grown(work):
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    work()
    return status("VmHWM") - before
path = Path(sys.argv[1])
tensors = read_header(path).tensors
def read():
    for info in tensors.values():
        assert read_tensor(path, info)[-1, -1] == int(info.name)
def copy():
    layout = [TensorSpec(info.name, info.dtype, info.shape) for info in tensors.values()]
    shard = ShardWriter(path.with_name("t"), path.with_name("y"), layout, {})
    for info in tensors.values():
        shard.write_chunks(info.name, read_chunks(path, info, 1 << 22))
    shard.finish()
print(grown(read), grown(copy))
"""
    ran = subprocess.run([sys.executable, "-c", code, tmp_path / "x.safetensors"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    read_mib, copy_mib = map(float, ran.stdout.split())
    assert 24 < read_mib < 48
    assert copy_mib < 30
    assert (tmp_path / "y").read_bytes() == (tmp_path / "x.safetensors").read_bytes()


def test_tensors_come_in_file_order_whatever_the_order_in_the_header(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_of({"w": entry(offsets=[8, 16]), "v": entry()}, b"x" * 16))
    assert list(read_header(path).tensors) == ["v", "w"]


def test_header_of_bytes_that_came_over_the_wire() -> None:
    content = file_of({"w": entry()}, b"x" * 8)
    length = header_bytes(content[:8], "x", len(content))
    header = parse_header(content[:length], "x", len(content))
    assert header.file_bytes == len(content)
    assert header.tensors["w"].offset == length
