"""Which files of a checkpoint count: its weights, or why it has none that can be used, and its side files."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Any

from loftq_cli.checkpoint.fp8 import is_fp8
from loftq_cli.checkpoint.pickled import NotPlainError, read_pickled
from loftq_cli.checkpoint.reader import Header
from loftq_cli.checkpoint.ways_out import CONVERTED, MERGED, UNDONE, conversion_lines, merge_lines, source_argument
from loftq_cli.errors import LoftqError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
REPORT = "loftq_report.json"
ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
SIDE_FILES = (
    # by name, for whatever else lies in a folder would be pushed, too
    *("tokenizer*", "vocab*", "merges*", "*.model", "*.spm", "*.bpe", "*.codes", "*.tiktoken", "normalizer.json"),
    *("special_tokens_map.json", "added_tokens.json", "generation_config.json", "chat_template*", "*.jinja"),
    *("*processor_config.json", "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"),
    *("license*", "licence*", "notice*", "copying*", "use_policy*"),
)
NOT_SIDE_FILES = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.npz", "*.npy"),  # weights in any form
    *("*.onnx", "*.onnx_data", "*.h5", "*.msgpack", "*.gguf", "*.ot", "*.tflite", "*.index.json"),
    *("config.json", "loftq_report.json", "readme*"),  # what this product writes itself
    "adapter_config.json",  # with it in the folder, loaders take the model for an adapter
    ".*",
)

ReadJson = Callable[[str], dict[str, Any]]


@dataclass(frozen=True)
class Weights:
    """The safetensors files that make up a model, in order, and the content of their index, if there is one.

    `stored_in`: safetensors file → the pickle that it stands for; `way_out` is the hint for one that cannot be read.
    """

    files: tuple[str, ...]
    index: dict[str, Any] | None
    stored_in: dict[str, str] = field(default_factory=dict)
    way_out: str = ""


def choose_weights(model: str, revision: str | None, names: Iterable[str], read_json: ReadJson) -> Weights:
    """The files that make up the model.

    Args:
        model: folder or Hub id, and
        revision: what the user asked for, for errors and for the lines that they offer.
        names: the files at the top of the checkpoint.
        read_json: returns the content of one of them.

    Raises:
        LoftqError: there are none, or which ones is not clear; the hint says what to do.
    """
    names = set(names)
    weights = sorted(name for name in names if name.endswith(".safetensors") and name != ADAPTER)
    if REPORT in names:
        raise LoftqError(
            f"`{model}` is an output of loftq: a quantized base, whose adapter holds a part of every weight",
            "start from the checkpoint that it was made from, or put both together first: "
            + shlex.join(["loftq", "merge", model, MERGED]),
        )
    if ADAPTER_CONFIG in names:
        raise _adapted(model, revision, names, read_json, weights)
    pickles = {PICKLE, PICKLE_INDEX} & names
    if not weights and INDEX not in names and not pickles:
        raise _no_weights(model, revision, names)
    if "config.json" not in names:
        raise LoftqError(f"`{model}` has no config.json", "put the model's config.json beside its weights")
    if not weights and INDEX not in names:
        return _pickled(model, revision, names, read_json)
    if INDEX in names:
        index = read_json(INDEX)
        files = _indexed_files(index, names, INDEX, ".safetensors", "safetensors file")
        if SINGLE in names and SINGLE not in files:
            raise LoftqError(
                f"`{model}` holds the model twice: {SINGLE} and the shards of {INDEX}",
                "transformers would load the first; keep one of them",
            )
        return Weights(files, index)
    if SINGLE in weights:
        return Weights((SINGLE,), None)
    if len(weights) > 1:
        raise LoftqError(
            f"`{model}` holds {len(weights)} safetensors files, {weights[0]} to {weights[-1]}, but no {INDEX}",
            f"if they are the shards of one model, get its {INDEX}; else leave one of them, as {SINGLE}",
        )
    return Weights(tuple(weights), None)


def _pickled(model: str, revision: str | None, names: set[str], read_json: ReadJson) -> Weights:
    """The weights of a model that has them as pytorch_model.bin, or as shards of that."""
    files: tuple[str, ...] = (PICKLE,)
    index = None
    if PICKLE not in names:  # of both, transformers loads the single file
        given = read_json(PICKLE_INDEX)
        files = _indexed_files(given, names, PICKLE_INDEX, ".bin", "pickle of torch")
        weight_map = {name: _safe_name(file) for name, file in given["weight_map"].items()}
        index = {**given, "weight_map": weight_map}
    lines = conversion_lines(source_argument(model, revision), read_json("config.json"))
    way_out = f"if you trust it, let transformers convert it, then give `{CONVERTED}`:\n{lines}"
    return Weights(tuple(map(_safe_name, files)), index, {_safe_name(file): file for file in files}, way_out)


def _safe_name(file: str) -> str:
    """`pytorch_model-00001-of-00002.bin` → `model-00001-of-00002.safetensors`."""
    return file.removeprefix("pytorch_").removesuffix(".bin") + ".safetensors"


def pickled_header(path: Path, stored_in: str, file: str, way_out: str) -> Header:
    """What lies where in the pickle at `path`, called `stored_in`, that goes by the name `file`.

    Raises:
        LoftqError: it is damaged, or is not plain tensors by name.
    """
    try:
        return read_pickled(path, stored_in, file)
    except NotPlainError as error:
        why = f"`{stored_in}` is a pickle that cannot be read without running what it says: {error}"
        raise LoftqError(why, way_out) from None


def check_index(index: Mapping[str, Any], headers: Mapping[str, Header]) -> None:
    """Refuse an index and shards that do not say the same."""
    hint = "the index and the shards come from different saves: download or copy all of them again"
    for file, header in headers.items():
        claimed = {name for name, where in index["weight_map"].items() if where == file}
        if missing := sorted(claimed - header.tensors.keys()):
            raise LoftqError(f"{INDEX} places tensor `{missing[0]}` in `{file}`, which does not hold it", hint)
        if extra := sorted(header.tensors.keys() - claimed):
            raise LoftqError(f"`{file}` holds tensor `{extra[0]}`, which {INDEX} does not place there", hint)


def refuse_quantized(model: str, revision: str | None, config: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose weights are quantized already, in fewer bits than fp8 or in another layout of it."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        entry = part.get("quantization_config") or part.get("compression_config")
        if not entry or (isinstance(entry, dict) and is_fp8(entry)):
            continue
        by = str(entry.get("quant_method", "another tool") if isinstance(entry, dict) else "another tool")
        hint = "start from the unquantized checkpoint that it was made from; its model card should name it"
        if by == "loftq_packed":
            hint += "; or put base and adapter together, `loftq merge OUT DEST`, and start from that"
        if by in UNDONE:
            lines = conversion_lines(source_argument(model, revision), config, quantized_by=by)
            hint += f"; or from the values that are left, in `{CONVERTED}`:\n{lines}"
        raise LoftqError(f"`{model}` is already quantized, by {by}", hint)


def choose_side_files(names: Iterable[str], has_code: bool) -> tuple[str, ...]:
    """The files to copy as they are: tokenizer, chat template, generation config, licence; code."""
    wanted = (*SIDE_FILES, *(("*.py",) if has_code else ()))
    return tuple(name for name in sorted(names) if like(name, wanted) and not like(name, NOT_SIDE_FILES))


def like(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name is as one of the patterns says, whatever its case."""
    return any(fnmatchcase(name.lower(), pattern) for pattern in patterns)


def _indexed_files(index: Mapping[str, Any], names: set[str], called: str, suffix: str, kind: str) -> tuple[str, ...]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LoftqError(f"{called} has no `weight_map`", "download it again")
    for file in weight_map.values():
        if not isinstance(file, str) or file != PurePath(file).name or "\\" in file or file == "..":
            raise LoftqError(f"{called} names `{file}`, which is no plain file name", "download it again")
        if not file.endswith(suffix):
            raise LoftqError(f"{called} names `{file}`, which is no {kind}", "download it again")
    files = sorted(set(weight_map.values()))
    if missing := [file for file in files if file not in names]:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise LoftqError(f"{called} names `{missing[0]}`{others}, which is not there", "download what is missing")
    return tuple(files)


def _adapted(model: str, revision: str | None, names: set[str], read_json: ReadJson, weights: list[str]) -> LoftqError:
    adapter = read_json(ADAPTER_CONFIG)
    base = adapter.get("base_model_name_or_path")
    if isinstance(base, str) and (Path(base) / REPORT).is_file() and Path(model).is_dir():
        # PEFT would not put it on what loftq packs
        tuned = Path(model).resolve() != (Path(base) / "loftq_init").resolve()
        merged = shlex.join(["loftq", "merge", base, MERGED, *(["--adapter", model] if tuned else [])])
        return LoftqError(
            f"`{model}` is an adapter for `{base}`, an output of loftq",
            f"start from the checkpoint that this was made from, or put both together first: {merged}",
        )
    has_tokenizer = any(like(name, ["tokenizer*", "vocab*", "*.model"]) for name in names)
    lines = merge_lines(source_argument(model, revision), adapter, has_tokenizer)
    if weights:
        return LoftqError(
            f"`{model}` holds an adapter for `{base}` beside its weights, which loaders would put on them",
            f"remove {ADAPTER_CONFIG} to quantize the weights as they are, or merge the adapter first, and give "
            f"`{MERGED}`:\n{lines}",
        )
    return LoftqError(
        f"`{model}` is an adapter for `{base}`, not a model",
        f"give the base, or merge the adapter into it first, and give `{MERGED}`:\n{lines}",
    )


def gguf_refusal(model: str, revision: str | None, file: str) -> LoftqError:
    """The error for weights that are there as `file` in `model` only."""
    return LoftqError(
        f"`{model}` has its weights as GGUF only ({file})",
        f"start from the original checkpoint, or from the values that the GGUF file still has, in `{CONVERTED}` "
        f"(`pip install gguf` first):\n{conversion_lines(source_argument(model, revision), {}, file)}",
    )


def _no_weights(model: str, revision: str | None, names: set[str]) -> LoftqError:
    if gguf := sorted(name for name in names if name.endswith(".gguf")):
        return gguf_refusal(model, revision, gguf[0])
    listed = ", ".join(sorted(names)[:5]) or "no files"
    return LoftqError(f"`{model}` has no safetensors weights ({listed})", "give the folder that holds the weights")
