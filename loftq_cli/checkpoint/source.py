"""Where a checkpoint comes from: a local folder or the Hub, described from its headers alone."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.files import fingerprint, json_object, near_folders
from loftq_cli.checkpoint.fp8 import fold_scales
from loftq_cli.checkpoint.reader import Header, TensorInfo, header_bytes, parse_header, read_header
from loftq_cli.checkpoint.selection import (
    check_index,
    choose_side_files,
    choose_weights,
    gguf_refusal,
    pickled_header,
    refuse_quantized,
)
from loftq_cli.errors import ConfigError, LoftqError

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint"]

_FIRST_RANGE_BYTES = 100_000  # holds nearly every header whole: one request a shard


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as its headers describe it: as safetensors, and dequantized, whatever it is.

    Attributes:
        model: folder or Hub id, as the user gave it.
        revision: the commit of a Hub id; None for a folder.
        config: the content of config.json.
        files: the safetensors files, in order; a pickle goes by the name of the safetensors file that stands for it.
        tensors: all tensors by name, in the order of file and offset.
        file_sizes: bytes of every file at the top of the checkpoint, by name.
        index: the content of model.safetensors.index.json, if there is one.
        side_files: files to copy as they are: tokenizer, chat template, generation config, licence, code.
        metadata: the `__metadata__` of each safetensors file.
        fingerprint: sha256 over config.json, all headers, the sizes and the commit; no tensor is read for it.
        stored_in: the files that go by another name: name → the file's own.
        notes: what the user must know about how it is read.
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
    place: Folder | HubCommit = field(repr=False)
    stored_in: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def path(self, file: str) -> Path:
        """The local path of one file; that of a Hub id is downloaded now, unless it is in the cache."""
        return self.place.path(self.stored_in.get(file, file))

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


@dataclass(frozen=True)
class HubCommit:
    """One commit of a model on the Hub."""

    model: str
    revision: str
    sizes: dict[str, int]

    def path(self, file: str) -> Path:
        """The path of one file in the cache, downloaded if need be."""
        from huggingface_hub import hf_hub_download

        with _hub_errors(self.model, self.revision, self.sizes.get(file, 0)):
            return Path(hf_hub_download(self.model, file, revision=self.revision))

    def header(self, file: str) -> Header:
        """The header of one safetensors file, and no more of it."""
        size = self.sizes[file]
        with _hub_errors(self.model, self.revision):
            raw = self._range(file, 0, min(size, _FIRST_RANGE_BYTES)) if size else b""
            length = header_bytes(raw, file, size)
            raw += self._range(file, len(raw), length) if length > len(raw) else b""
        return parse_header(raw[:length], file, size)

    def _range(self, file: str, begin: int, end: int) -> bytes:
        from huggingface_hub import constants, hf_hub_url, hf_raise_for_status
        from huggingface_hub.utils import build_hf_headers, http_backoff  # type: ignore[attr-defined]

        headers = {**build_hf_headers(), "Range": f"bytes={begin}-{end - 1}"}
        url, timeout = hf_hub_url(self.model, file, revision=self.revision), constants.HF_HUB_DOWNLOAD_TIMEOUT
        response = http_backoff("GET", url, headers=headers, timeout=timeout, max_retries=3)
        hf_raise_for_status(response)
        return response.content if response.status_code == 206 else response.content[begin:end]


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
    side_files = choose_side_files(place.sizes)
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
        file_sizes=place.sizes,
        index=index,
        side_files=side_files,
        metadata={file: header.metadata for file, header in headers.items()},
        fingerprint=fingerprint(
            place.revision,
            place.path("config.json"),
            headers,
            lambda file: place.path(weights.stored_in.get(file, file)),
        ),
        place=place,
        stored_in=weights.stored_in,
        notes=(note,) if note else (),
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
    if not _is_repo_id(model):
        raise LoftqError(f"no such folder: `{model}`", near_folders(folder) or "a Hub id looks like `org/name`")
    return _find_on_hub(model, revision)


def _folder(folder: Path, revision: str | None) -> Folder:
    try:
        return Folder(folder, revision, {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()})
    except OSError as error:
        raise LoftqError(f"cannot read `{folder}`: {error.strerror or error}") from error


def _find_on_hub(model: str, revision: str | None) -> Folder | HubCommit:
    from huggingface_hub import HfApi, constants, hf_hub_download
    from huggingface_hub.errors import OfflineModeIsEnabled

    with _hub_errors(model, revision):
        try:
            timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
            info = HfApi().model_info(model, revision=revision, files_metadata=True, timeout=timeout)
        except OfflineModeIsEnabled:
            return _find_in_cache(model, revision)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or [] if "/" not in file.rfilename}
        if "config.json" in sizes:
            # by branch name, so that the cache learns which commit the branch is at and later works offline
            hf_hub_download(model, "config.json", revision=revision)
    return HubCommit(model, str(info.sha), sizes)


def _find_in_cache(model: str, revision: str | None) -> Folder:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        snapshot = Path(snapshot_download(model, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError as error:
        # whether the files that matter are there shows later; here a missing README is enough for the error
        snapshot = Path(getattr(error, "snapshot_path", ""))
        if not snapshot.name:
            at = f" at revision `{revision}`" if revision else ""
            raise LoftqError(
                f"`{model}`{at} is not in the cache, and HF_HUB_OFFLINE keeps the Hub away",
                f"unset HF_HUB_OFFLINE, or download it first: `hf download {model}`",
            ) from error
    return _folder(snapshot, snapshot.name)


@contextmanager
def _hub_errors(model: str, revision: str | None, file_bytes: int = 0) -> Iterator[None]:
    """Turn what the Hub client raises into sentences; its own texts can hold signed URLs, so they are not repeated."""
    from huggingface_hub import errors

    try:
        yield
    # HTTPError is that of the client's HTTP library, whichever it uses; older hf_xet raise RuntimeError
    except (OSError, RuntimeError, errors.HTTPError, getattr(errors, "XetDownloadError", OSError)) as error:  # type: ignore[attr-defined]
        raise _sentence(error, model, revision, file_bytes) from error


def _sentence(error: Exception, model: str, revision: str | None, file_bytes: int) -> LoftqError:
    from huggingface_hub import constants, errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        page = f"{constants.ENDPOINT}/{model}"
        return LoftqError(f"`{model}` is gated", f"accept its terms on {page}, then log in: `hf auth login`")
    if isinstance(error, errors.RevisionNotFoundError):
        return LoftqError(f"`{model}` has no revision `{revision}`", "give a branch, a tag or a full commit hash")
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403):
        near = near_folders(Path(model))
        return LoftqError(
            f"`{model}` is neither a folder here nor a model that the Hub shows you",
            "check the name; if the model is private, log in: `hf auth login`" + (f"; {near}" if near else ""),
        )
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return LoftqError(f"the Hub lost a file of `{model}` at `{revision}`", "try again")
    if status is not None:
        return LoftqError(f"the Hub answered {status} for `{model}`", "try again in a few minutes")
    number, cache = getattr(error, "errno", None), Path(constants.HF_HUB_CACHE)
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
        free = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free
        return LoftqError(
            f"the disk of `{cache}` is full: a file of `{model}` takes {file_bytes} bytes, {free} are free",
            "free the space, or set HF_HOME to a folder on another disk",
        )
    if number is not None and not isinstance(error, ConnectionError):
        return LoftqError(f"cannot use the cache `{cache}`: {os.strerror(number)}", "set HF_HOME to a folder of yours")
    return LoftqError(
        f"cannot reach {constants.ENDPOINT} for `{model}` ({type(error).__name__})",
        "check the connection and try again; HF_HUB_OFFLINE=1 uses what is in the cache",
    )


def _is_repo_id(model: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return True
