"""Where a checkpoint comes from: a local folder or the Hub, described from its headers alone."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.files import fingerprint, json_object, json_value, leads_out, near_folders
from loftq_cli.checkpoint.fp8 import fold_scales
from loftq_cli.checkpoint.hub import HubCommit, find_on_hub, is_repo_id
from loftq_cli.checkpoint.modules import MODULES, Modules, find_modules
from loftq_cli.checkpoint.reader import Header, TensorInfo, read_header
from loftq_cli.checkpoint.selection import (
    check_index,
    choose_side_files,
    choose_weights,
    gguf_refusal,
    pickled_header,
    refuse_quantized,
)
from loftq_cli.checkpoint.streamed import Streamed
from loftq_cli.errors import ConfigError, LoftqError

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint"]

README = "README.md"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as its headers describe it: as safetensors, and dequantized, whatever it is.

    Attributes:
        model: folder or Hub id, as the user gave it.
        revision: the commit of a Hub id; None for a folder.
        config: the content of config.json.
        files: the safetensors files, in order; a pickle goes by the name of the safetensors file that stands for it.
        tensors: all tensors by name, in the order of file and offset.
        file_sizes: bytes of every file at the top of the checkpoint, and of every side file, by name.
        index: the content of model.safetensors.index.json, if there is one.
        side_files: files to copy as they are: tokenizer, chat template, generation config, licence, code, and what
            lies in the folders that a `modules.json` names.
        metadata: the `__metadata__` of each safetensors file.
        fingerprint: sha256 over config.json, all headers, the sizes and the commit, or without one samples of tensors
            and all that a `modules.json` names.
        modules: what that names.
        stored_in: the files that go by another name: name → the file's own.
        notes: what the user must know about how it is read.
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
    stored_in: dict[str, str] = field(default_factory=dict)
    modules: Modules = field(default_factory=Modules)
    notes: tuple[str, ...] = ()

    def path(self, file: str) -> Path:
        """The local path of one file; that of a Hub id is downloaded now, unless it is in the cache."""
        return self.place.path(self.stored_in.get(file, file))

    def release(self, file: str) -> None:
        """Learn that a file is not needed any more; what was fetched for this run alone is deleted."""
        if isinstance(self.place, Streamed):
            self.place.release(self.stored_in.get(file, file))

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

    def files_in(self, folder: str) -> dict[str, int]:
        """Bytes of the files in one folder of it, and in folders in that, by path."""
        try:
            paths = [path for path in (self.folder / folder).rglob("*") if path.is_file()]
            return {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in paths}
        except OSError as error:
            why = f"cannot read `{self.folder / folder}`, which {MODULES} names: {error.strerror or error}"
            raise LoftqError(why) from error

    def path(self, file: str) -> Path:
        """The path of one file, which must not lead out of the folder."""
        if leads_out(self.folder, file):
            raise LoftqError(f"`{self.folder / file}` leads out of the folder", "replace the link by the file itself")
        return self.folder / file

    def header(self, file: str) -> Header:
        """The header of one safetensors file."""
        return read_header(self.path(file))


def open_checkpoint(model: str, revision: str | None = None) -> Checkpoint:
    """Find `model`, a local folder or else a Hub id, and describe it from its config and its headers.

    Raises:
        LoftqError: there is no such model, or none that can be quantized; the hint says what to do.
    """
    place = _find(model, revision)
    weights = choose_weights(model, revision, place.sizes, lambda name: json_object(place.path(name)))
    files, index = weights.files, weights.index
    config = json_object(place.path("config.json"))
    refuse_quantized(model, revision, config)

    def header(file: str) -> Header:
        stored_in = weights.stored_in.get(file)
        return (
            pickled_header(place.path(stored_in), stored_in, file, weights.way_out) if stored_in else place.header(file)
        )

    with ThreadPoolExecutor(8) as pool:
        headers = dict(zip(files, pool.map(header, files), strict=True))
    if index is not None:
        check_index(index, headers)
    has_code = "auto_map" in config
    modules = Modules(has_code=has_code)
    if MODULES in place.sizes:
        modules = find_modules(json_value(place.path(MODULES)), place.files_in, has_code)
    side_files = (*choose_side_files(place.sizes, modules.has_code), *modules.files)
    computing = (MODULES, *modules.files) if MODULES in place.sizes else ()
    if isinstance(place, Folder):
        for name in side_files:
            place.path(name)  # a link out of the folder is refused now, not after hours of work
    stored = {name: info for header in headers.values() for name, info in header.tensors.items()}
    plain, tensors, note = fold_scales(place, config, stored)
    return Checkpoint(
        model=model,
        revision=place.revision,
        config=plain,
        files=files,
        tensors=tensors,
        file_sizes=place.sizes | modules.files,
        index=index,
        side_files=side_files,
        metadata={file: header.metadata for file, header in headers.items()},
        fingerprint=fingerprint(
            place.revision,
            place.path("config.json"),
            headers,
            lambda file: place.path(weights.stored_in.get(file, file)),
            computing,
        ),
        readme=place.path(README).read_text(encoding="utf-8", errors="replace") if README in place.sizes else "",
        place=place,
        stored_in=weights.stored_in,
        modules=modules,
        notes=((note,) if note else ()) + modules.notes,
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
    if is_there and folder.suffix == ".gguf":
        raise gguf_refusal(str(folder.parent), None, folder.name)
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
