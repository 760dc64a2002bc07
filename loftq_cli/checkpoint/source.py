"""Where a checkpoint comes from: a local folder or the Hub, described from its headers alone."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.hub import HubCommit, find_on_hub, is_repo_id, near_folders
from loftq_cli.checkpoint.reader import Header, TensorInfo, read_header, sample_hash
from loftq_cli.checkpoint.selection import check_index, choose_side_files, choose_weights, refuse_quantized
from loftq_cli.checkpoint.streamed import Streamed
from loftq_cli.errors import ConfigError, LoftqError

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint"]

README = "README.md"


@dataclass(frozen=True)
class Checkpoint:
    """A safetensors checkpoint as its headers describe it.

    Attributes:
        model: folder or Hub id, as the user gave it.
        revision: the commit of a Hub id; None for a folder.
        config: the content of config.json.
        files: the safetensors files, in order.
        tensors: all tensors by name, in the order of file and offset.
        file_sizes: bytes of every file at the top of the checkpoint, by name.
        index: the content of model.safetensors.index.json, if there is one.
        side_files: files to copy as they are: tokenizer, chat template, generation config, licence, code.
        metadata: the `__metadata__` of each safetensors file.
        fingerprint: sha256 over config.json, all headers, the sizes and the commit; no tensor is read for it.
        readme: the content of README.md, the model card; empty where there is none.
    """

    model: str
    revision: str | None
    config: dict[str, Any]
    files: tuple[str, ...]
    tensors: dict[str, TensorInfo]
    file_sizes: dict[str, int]
    index: dict[str, Any] | None
    side_files: tuple[str, ...]
    metadata: dict[str, dict[str, str]]
    fingerprint: str
    readme: str
    place: Folder | HubCommit | Streamed = field(repr=False)

    def path(self, file: str) -> Path:
        """The local path of one file; that of a Hub id is downloaded now, unless it is in the cache."""
        return self.place.path(file)

    def release(self, file: str) -> None:
        """Learn that a file is not needed any more; what was fetched for this run alone is deleted."""
        if isinstance(self.place, Streamed):
            self.place.release(file)

    @property
    def is_local(self) -> bool:
        """Whether nothing has to be downloaded."""
        return isinstance(self.place, Folder)


@dataclass(frozen=True)
class Folder:
    """A local folder; a snapshot in the Hub's cache keeps its commit as `revision`."""

    folder: Path
    revision: str | None
    sizes: dict[str, int]

    def path(self, file: str) -> Path:
        """The path of one file, which must not lead out of the folder."""
        path, folder = self.folder / file, self.folder.resolve()
        # the Hub's cache keeps its snapshots as links into a folder beside them
        allowed = [folder, *([folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [])]
        if not any(path.resolve().is_relative_to(root) for root in allowed):
            raise LoftqError(f"`{path}` leads out of the folder", "replace the link by the file itself")
        return path

    def header(self, file: str) -> Header:
        """The header of one safetensors file."""
        return read_header(self.path(file))


def open_checkpoint(model: str, revision: str | None = None) -> Checkpoint:
    """Find `model`, a local folder or else a Hub id, and describe it from its config and its headers.

    Raises:
        LoftqError: there is no such model, or none that can be quantized; the hint says what to do.
    """
    place = _find(model, revision)
    files, index = choose_weights(model, revision, place.sizes, lambda name: _read_json(place, name))
    config = _read_json(place, "config.json")
    refuse_quantized(model, config)
    with ThreadPoolExecutor(8) as pool:
        headers = dict(zip(files, pool.map(place.header, files), strict=True))
    if index is not None:
        check_index(index, headers)
    side_files = choose_side_files(place.sizes)
    if isinstance(place, Folder):
        for name in side_files:
            place.path(name)  # a link out of the folder is refused now, not after hours of work
    return Checkpoint(
        model=model,
        revision=place.revision,
        config=config,
        files=files,
        tensors={name: info for header in headers.values() for name, info in header.tensors.items()},
        file_sizes=place.sizes,
        index=index,
        side_files=side_files,
        metadata={file: header.metadata for file, header in headers.items()},
        fingerprint=_fingerprint(place, headers),
        readme=place.path(README).read_text(encoding="utf-8", errors="replace") if README in place.sizes else "",
        place=place,
    )


def _find(model: str, revision: str | None) -> Folder | HubCommit:
    if not model:
        raise ConfigError("MODEL is empty", "give a folder or a Hub id, such as `org/name`")
    folder = Path(os.path.expanduser(model))  # noqa: PTH111 - Path.expanduser raises on an unknown `~user`
    try:
        is_folder, is_there = folder.is_dir(), folder.exists()
    except OSError as error:  # no access, or a name that is too long
        raise LoftqError(f"cannot read `{model}`: {error.strerror or error}") from error
    if is_folder:
        if revision is not None:
            raise ConfigError(f"`--revision {revision}` is for Hub ids, but `{model}` is a local folder")
        return _folder(folder, None)
    if is_there:
        raise LoftqError(f"`{model}` is a file", f"give the folder that holds it: `{folder.parent}`")
    if not is_repo_id(model):
        raise LoftqError(f"no such folder: `{model}`", near_folders(folder) or "a Hub id looks like `org/name`")
    found = find_on_hub(model, revision)
    return _folder(found, found.name) if isinstance(found, Path) else found


def _folder(folder: Path, revision: str | None) -> Folder:
    try:
        return Folder(folder, revision, {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()})
    except OSError as error:
        raise LoftqError(f"cannot read `{folder}`: {error.strerror or error}") from error


def _read_json(place: Folder | HubCommit, file: str) -> dict[str, Any]:
    try:
        content = json.loads(place.path(file).read_bytes())
    except (ValueError, RecursionError) as error:
        raise LoftqError(f"`{file}` is not JSON: {error}", "download or copy it again") from None
    except OSError as error:
        raise LoftqError(f"cannot read `{file}`: {error.strerror or error}") from error
    if not isinstance(content, dict):
        raise LoftqError(f"`{file}` is not a JSON object", "download or copy it again")
    return content


def _fingerprint(place: Folder | HubCommit, headers: dict[str, Header]) -> str:
    parts = [place.revision or "", place.path("config.json").read_bytes().hex()]
    parts += [f"{file} {header.file_bytes} {header.raw.hex()}" for file, header in headers.items()]
    if place.revision is None:  # two checkpoints of one training run differ in nothing but their values
        parts += [sample_hash(place.path(file), header) for file, header in headers.items()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
