"""What a `modules.json` of Sentence Transformers names: folders of pooling, projections and the like, and code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from loftq_cli.checkpoint.selection import SIDE_FILES, like
from loftq_cli.errors import LoftqError

MODULES = "modules.json"
ADAPTER_FOLDER = "loftq_init"  # of an output
SAFE, PICKLES = ("model*.safetensors",), ("pytorch_model*.bin",)
MODULE_FILES = ("*.json", "*.txt", *SAFE, *PICKLES, *SIDE_FILES)
OWN, BARE = "sentence_transformers.", "Normalize"  # types that need no code beside them; and of them, no folder
NAME_BYTES = 255  # of a file, at most


@dataclass(frozen=True)
class Modules:
    """What follows the model.

    `files`: path → bytes, to copy as they are; `has_code`: whether a type is none of Sentence Transformers' own, and so
    may be code beside the model; `absent`: folders that it would load a module from, and that hold nothing to copy.
    """

    files: dict[str, int] = field(default_factory=dict)
    has_code: bool = False
    absent: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def find_modules(content: Any, files_in: Callable[[str], dict[str, int]], has_code: bool) -> Modules:
    """What a `modules.json` of this content names; nothing where it is another file of that name.

    Args:
        content: its JSON.
        files_in: returns the files in a folder of the checkpoint, and in folders in that: path → bytes.
        has_code: whether the model has code of its own anyway.

    Raises:
        LoftqError: it names what is no folder of the checkpoint.
    """
    entries = [entry for entry in content if isinstance(entry, dict)] if isinstance(content, list) else []
    has_code |= any(not str(entry.get("type", OWN)).startswith(OWN) for entry in entries)
    files: dict[str, int] = {}
    absent, notes = [], []
    for entry in entries:
        folder, kind = _folder(entry.get("path", "")), str(entry.get("type", ""))
        found = _choose(files_in(folder), has_code) if folder else {}  # that of the model itself is mostly ``
        files |= found
        if not folder or found or kind.endswith(BARE):
            continue
        if kind.startswith(OWN):
            absent.append(folder)
        else:
            notes.append(f"{MODULES} names the folder `{folder}`, of a `{kind}`, and nothing of it is here to copy")
    if weights := {name: size for name, size in files.items() if _named(name, (*SAFE, *PICKLES))}:
        first = next(iter(weights))
        size = f"{sum(weights.values()) / 2**20:.1f} MiB"
        notes.append(f"weights that {MODULES} names are copied in full precision, {size}: `{first}`{_more(weights)}")
    if pickles := [name for name in files if _named(name, PICKLES)]:
        notes.append(f"a pickle travels along, unread: `{pickles[0]}`{_more(pickles)}")
    return Modules(dict(sorted(files.items())), has_code, tuple(absent), tuple(notes))


def _folder(path: Any) -> str:
    """The folder of one module, as plain `a/b`; empty for that of the model."""
    parts = PurePosixPath(path).parts if isinstance(path, str) and "\\" not in path else ("..",)
    if any(part[0] in "./" or part == ADAPTER_FOLDER or not _can_be_a_name(part) for part in parts):
        raise LoftqError(
            f"{MODULES} names `{path if len(str(path)) < NAME_BYTES else str(path)[:40] + '…'}`, "
            "which is no plain folder inside the checkpoint",
            f"download it again; or remove {MODULES}, if nobody loads the model with Sentence Transformers",
        )
    return "/".join(parts)


def _can_be_a_name(part: str) -> bool:
    return part.isprintable() and len(part.encode()) <= NAME_BYTES


def _choose(files: dict[str, int], has_code: bool) -> dict[str, int]:
    """Of the files in one folder those to copy: configs, tokenizers, code and weights; pickles only for want of others.

    As Sentence Transformers itself reads safetensors first.
    """
    wanted = (*MODULE_FILES, *(("*.py",) if has_code else ()))
    safe = {PurePosixPath(name).parent for name in files if _named(name, SAFE)}
    return {
        name: size
        for name, size in files.items()
        if _named(name, wanted)
        and not any(part.startswith(".") for part in name.split("/"))
        and not (_named(name, (*PICKLES, "pytorch_model*.bin.index.json")) and PurePosixPath(name).parent in safe)
    }


def _named(path: str, patterns: tuple[str, ...]) -> bool:
    return like(PurePosixPath(path).name, patterns)


def _more(names: Any) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
