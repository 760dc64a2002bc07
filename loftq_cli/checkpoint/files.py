"""Whole small files: written under a temporary name, flushed to the disk, renamed; hashed on the way; and read."""

from __future__ import annotations

import difflib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.reader import CHUNK_BYTES, Header, sample_hash
from loftq_cli.errors import LoftqError


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


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON of the whole lines of a file; what a kill cut short is dropped."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object; an empty one where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def json_object(path: Path) -> dict[str, Any]:
    """The content of a JSON file that holds one object."""
    content = json_value(path)
    if not isinstance(content, dict):
        raise LoftqError(f"`{path.name}` is not a JSON object", "download or copy it again")
    return content


def json_value(path: Path) -> Any:
    """The content of a JSON file."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise LoftqError(f"`{path.name}` is not JSON: {error}", "download or copy it again") from None
    except OSError as error:
        raise LoftqError(f"cannot read `{path}`: {error.strerror or error}") from error


def fingerprint(
    revision: str | None,
    config: Path,
    headers: Mapping[str, Header],
    path: Callable[[str], Path],
    others: Iterable[str] = (),
) -> str:
    """The hash that stands for a checkpoint; `path` finds one of its files by name, if there is no `revision`.

    `others` are files beside that a change of makes it another model.
    """
    parts = [revision or "", config.read_bytes().hex()]
    parts += [f"{file} {header.file_bytes} {header.raw.hex()}" for file, header in headers.items()]
    if revision is None:  # two checkpoints of one training run differ in nothing but their values
        parts += [sample_hash(path(file), header) for file, header in headers.items()]
        parts += [f"{file} {hash_file(path(file))}" for file in others]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def leads_out(folder: Path, name: str) -> bool:
    """Whether a file of `folder` lies elsewhere, by its name or by a link."""
    root = folder.resolve()
    # the Hub's cache keeps its snapshots as links into a folder beside them
    allowed = [root, *([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])]
    place = Path(os.path.realpath(folder / name))  # Path.resolve raises where links go round
    return not any(place.is_relative_to(one) for one in allowed)


def is_ours(out: Path, name: object) -> bool:
    """Whether a name can be that of a file which loftq writes: it leads neither out of `out` nor through a link."""
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in (parts := Path(name).parts) or not parts:
        return False
    if any(part.startswith(".") for part in parts[:-1]):  # `.git`, say, of a folder that is a repo
        return False
    try:
        whole = b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False
    folder = os.path.realpath((out / name).parent) if whole else None
    return folder == str(out.resolve() / Path(name).parent)


def near_folders(folder: Path) -> str:
    """A question after folders that are called nearly so, or nothing."""
    try:
        names = [path.name for path in folder.parent.iterdir() if path.is_dir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(folder.name, names)
    return "did you mean " + " or ".join(f"`{folder.parent / name}`" for name in near) + "?" if near else ""


def _replace_whole(path: Path, chunks: Iterable[bytes]) -> str:
    sha, temporary = hashlib.sha256(), path.with_name(path.name + ".tmp")
    with writing(path):
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
        sync_folder(path.parent)
    return sha.hexdigest()


def _chunks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb", buffering=0) as stream:
            while chunk := stream.read(CHUNK_BYTES):
                yield chunk
    except OSError as error:
        raise LoftqError(f"cannot read `{path}`: {error.strerror or error}") from error


def allocate(path: Path, file_bytes: int, final: Path) -> None:
    """Make the file `path`, to become `final`, in its full size; refuse when there is no room for it."""
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


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a crash of the machine."""
    if os.name == "posix":  # elsewhere a folder cannot be opened, and a rename needs no flush
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say of an error of the operating system that `path` cannot be written."""
    try:
        yield
    except OSError as error:
        hint = "free the space or write to another disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise LoftqError(f"cannot write `{path}`: {error.strerror or error}", hint) from error
