"""Asking the Hub for what changes it: again where it says later, and its refusals as sentences."""

from __future__ import annotations

import json
import logging
import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

from loftq_cli.errors import LoftqError

RETRIES = 3  # of a whole step, after those that the Hub's client makes of single requests
LONGEST_WAIT_SECONDS = 600
TOKENS_PAGE = "https://huggingface.co/settings/tokens"
AGAIN = "the same command goes on: what is there is not sent again"
XET_STATUS = re.compile(r"HTTP status \w+ error \((\d{3})[^)]*\)(?:.*?(https?://\S+))?", re.DOTALL)

Note = Callable[[str], None]
T = TypeVar("T")


def patiently(step: Callable[[], T], note: Note) -> T:
    """Do what asks the Hub; again where the Hub says later, or the connection broke, as long as that is no surprise.

    A step may have been done and only its answer lost: it must be one that can be done twice.
    """
    for attempt in range(RETRIES + 1):
        try:
            return step()
        except Exception as error:
            seconds = _wait_seconds(_cause(error), attempt)
            if seconds is None or attempt == RETRIES:
                raise
            note(f"the Hub {_trouble(_cause(error))}: going on in {seconds:.0f} s")
            time.sleep(seconds)
    raise AssertionError("the last attempt returns or raises")


@contextmanager
def sentences(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn what the Hub's client raises into sentences; keep it from talking, for its texts can hold signed URLs."""
    from huggingface_hub import errors

    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except LoftqError:
        raise
    # HTTPError is that of the client's HTTP library, whichever it uses
    except (OSError, RuntimeError, ValueError, errors.HTTPError, errors.XetDownloadError) as error:  # type: ignore[attr-defined]
        raise _sentence(_cause(error), repo_id, revision) from error
    finally:
        logger.setLevel(level)


def somebody_else(repo_id: str, status: int = 412) -> LoftqError:
    """The error for a branch that does not stand where this push found it."""
    return LoftqError(f"something else is writing to `{repo_id}` ({status})", f"wait for it; {AGAIN}")


def _sentence(error: BaseException, repo_id: str, revision: str | None) -> LoftqError:
    from huggingface_hub import constants, errors

    owner, status, again = repo_id.partition("/")[0], _status(error), AGAIN
    if isinstance(error, errors.RevisionNotFoundError):
        return LoftqError(
            f"`{repo_id}` has no `{revision}`", "give a branch, which is made if need be, or a pull request"
        )
    if status in (401, 403, 404) and not _address(error).startswith(constants.ENDPOINT):
        return LoftqError(
            f"the Hub's storage refuses the upload ({status})",
            f"what it was allowed to send may have run out of time, or a proxy is in the way: {again}",
        )
    if status == 401:
        return LoftqError(
            "the Hub does not accept the token (401)",
            f"log in with one that may write to `{owner}`: `hf auth login`; tokens are made at {TOKENS_PAGE}",
        )
    if status in (403, 404):
        return LoftqError(
            f"the token may not write to `{repo_id}` ({status})",
            f"it needs write permission for `{owner}`, see {TOKENS_PAGE}; then `hf auth login`; or push to an owner of "
            "yours",
        )
    if status in (409, 412):
        return somebody_else(repo_id, status)
    if status == 429:
        seconds = _asked_seconds(error)
        how_long = f"{seconds:.0f} s" if seconds else "a few minutes"
        return LoftqError("the Hub says: too many requests (429)", f"wait {how_long}; {again}")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return LoftqError("HF_HUB_OFFLINE keeps the Hub away", "unset it")
    if status is not None and status < 500:
        said = getattr(error, "server_message", None) or "no reason given"
        return LoftqError(f"the Hub refused `{repo_id}` ({status}): {said}", again)
    if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
        return LoftqError(f"the Hub refused `{repo_id}`: {error}")
    if isinstance(error, OSError) and status is None and error.filename:
        return LoftqError(f"cannot read `{error.filename}`: {error.strerror}")
    return LoftqError(f"{constants.ENDPOINT} {_trouble(error)}", f"check the connection; {again}")


def _cause(error: BaseException) -> BaseException:
    """What it failed for, where the client only says that an upload failed, or that a file is not in its cache."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    if isinstance(error, (RuntimeError, LocalEntryNotFoundError)) and error.__cause__ is not None:
        return _cause(error.__cause__)
    return error


def _status(error: BaseException) -> int | None:
    """The status of the answer; hf_xet has it in its text alone."""
    response = getattr(error, "response", None)
    if response is not None:
        return int(response.status_code)
    found = XET_STATUS.search(str(error))
    return int(found[1]) if found else None


def _address(error: BaseException) -> str:
    """Who gave that answer."""
    response = getattr(error, "response", None)
    if response is not None:
        return str(response.request.url)
    found = XET_STATUS.search(str(error))
    return (found[2] or "") if found else ""


def _trouble(error: BaseException) -> str:
    if isinstance(error, json.JSONDecodeError):
        return "answered with what is not JSON"
    status = _status(error)
    return f"answered {status}" if status else f"lost the connection ({type(error).__name__})"


def _wait_seconds(error: BaseException, attempt: int) -> float | None:
    """How long to wait before trying again; None where that is of no use."""
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

    status = _status(error)
    if isinstance(error, OfflineModeIsEnabled) or (status is not None and status != 429 and status < 500):
        return None
    # a proxy's page in place of an answer is no JSON, and the client reads some answers before their status
    if status is None and not isinstance(error, (HTTPError, ConnectionError, json.JSONDecodeError)):
        return None
    seconds = _asked_seconds(error) or 2.0**attempt
    return seconds if seconds <= LONGEST_WAIT_SECONDS else None


def _asked_seconds(error: BaseException) -> float | None:
    """How long the Hub asks to wait, in any of its ways: a limit's headers, seconds, a date."""
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    headers = getattr(getattr(error, "response", None), "headers", {})
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    asked = str(headers.get("Retry-After", "")).strip()
    if asked.isdigit():
        return float(asked)
    try:
        return max(1.0, (parsedate_to_datetime(asked) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):  # no date, or one without a time zone
        return None
