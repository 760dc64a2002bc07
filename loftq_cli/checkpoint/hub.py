"""The Hub: a commit of a model, its files, and what the client raises as sentences. Nothing else asks its client."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loftq_cli.checkpoint.files import near_folders
from loftq_cli.checkpoint.reader import Header, header_bytes, parse_header
from loftq_cli.errors import LoftqError

_FIRST_RANGE_BYTES = 100_000  # holds nearly every header whole: one request a shard


@dataclass(frozen=True)
class HubCommit:
    """One commit of a model on the Hub: `files` is path → bytes, of those in folders, too."""

    model: str
    revision: str
    files: dict[str, int]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of the files at the top, by name."""
        return {file: size for file, size in self.files.items() if "/" not in file}

    def files_in(self, folder: str) -> dict[str, int]:
        """Bytes of the files in one folder, and in folders in that, by path."""
        return {file: size for file, size in self.files.items() if file.startswith(f"{folder}/")}

    def path(self, file: str) -> Path:
        """The path of one file in the cache, downloaded if need be."""
        return self.download(file)

    def download(self, file: str, folder: Path | None = None) -> Path:
        """The path of one file, downloaded if need be: in the cache, or else, given a `folder`, in that."""
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        with hub_errors(self.model, self.revision, self.files.get(file, 0)):
            cached = try_to_load_from_cache(self.model, file, revision=self.revision) if folder else None
            if isinstance(cached, str):
                return Path(cached)
            return Path(hf_hub_download(self.model, file, revision=self.revision, local_dir=folder))

    def header(self, file: str) -> Header:
        """The header of one safetensors file, and no more of it."""
        size = self.files[file]
        with hub_errors(self.model, self.revision):
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


def find_on_hub(model: str, revision: str | None) -> HubCommit | Path:
    """The commit that `revision` of a Hub id stands at; offline, the folder of the cache that holds it."""
    from huggingface_hub import HfApi, constants, hf_hub_download
    from huggingface_hub.errors import OfflineModeIsEnabled

    with hub_errors(model, revision):
        try:
            timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
            info = HfApi().model_info(model, revision=revision, files_metadata=True, timeout=timeout)
        except OfflineModeIsEnabled:
            return _find_in_cache(model, revision)
        files = {file.rfilename: file.size or 0 for file in info.siblings or []}
        if "config.json" in files:
            # by branch name, so that the cache learns which commit the branch is at and later works offline
            hf_hub_download(model, "config.json", revision=revision)
    return HubCommit(model, str(info.sha), files)


def _find_in_cache(model: str, revision: str | None) -> Path:
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
                f"no folder is called so here, either; unset HF_HUB_OFFLINE, or download it: `hf download {model}`",
            ) from error
    return snapshot


@contextmanager
def hub_errors(model: str, revision: str | None, file_bytes: int = 0) -> Iterator[None]:
    """Turn what the Hub client raises into sentences; its own texts can hold signed URLs, so they are not repeated."""
    from huggingface_hub import errors

    try:
        yield
    # HTTPError is that of the client's HTTP library, whichever it uses; older hf_xet raise RuntimeError
    except (OSError, RuntimeError, errors.HTTPError, errors.XetDownloadError) as error:  # type: ignore[attr-defined]
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
        f"no folder is called `{model}` here; for a model of the Hub, check the connection and try again "
        "(HF_HUB_OFFLINE=1 uses what is in the cache)",
    )


def is_repo_id(model: str) -> bool:
    """Whether `model` can be the name of a model on the Hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return True
