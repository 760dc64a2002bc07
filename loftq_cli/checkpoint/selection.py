"""Which files of a checkpoint count: its weights, or why it has none that can be used, and its side files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import PurePath
from typing import Any

from loftq_cli.checkpoint.reader import Header
from loftq_cli.errors import LoftqError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
SIDE_FILES = (
    *("tokenizer*", "vocab*", "merges*", "*.model", "*.spm", "*.bpe", "*.codes", "*.tiktoken", "*.txt"),
    *("*.json", "*.jinja", "*.py"),
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


def choose_weights(
    model: str, revision: str | None, names: Iterable[str], read_json: ReadJson
) -> tuple[tuple[str, ...], dict[str, Any] | None]:
    """The safetensors files that make up the model, in order, and the content of their index, if there is one.

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
    if not weights and INDEX not in names:
        raise _no_weights(model, revision, names, read_json)
    if "config.json" not in names:
        raise LoftqError(f"`{model}` has no config.json", "put the model's config.json beside its weights")
    if INDEX in names:
        index = read_json(INDEX)
        files = _indexed_files(index, names)
        if SINGLE in names and SINGLE not in files:
            raise LoftqError(
                f"`{model}` holds the model twice: {SINGLE} and the shards of {INDEX}",
                "transformers would load the first; keep one of them",
            )
        return files, index
    if SINGLE in weights:
        return (SINGLE,), None
    if len(weights) > 1:
        raise LoftqError(
            f"`{model}` holds {len(weights)} safetensors files, {weights[0]} to {weights[-1]}, but no {INDEX}",
            f"if they are the shards of one model, get its {INDEX}; else leave one of them, as {SINGLE}",
        )
    return tuple(weights), None


def check_index(index: Mapping[str, Any], headers: Mapping[str, Header]) -> None:
    """Refuse an index and shards that do not say the same."""
    hint = "the index and the shards come from different saves: download or copy all of them again"
    for file, header in headers.items():
        claimed = {name for name, where in index["weight_map"].items() if where == file}
        if missing := sorted(claimed - header.tensors.keys()):
            raise LoftqError(f"{INDEX} places tensor `{missing[0]}` in `{file}`, which does not hold it", hint)
        if extra := sorted(header.tensors.keys() - claimed):
            raise LoftqError(f"`{file}` holds tensor `{extra[0]}`, which {INDEX} does not place there", hint)


def refuse_quantized(model: str, config: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose weights are quantized already."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        entry = part.get("quantization_config") or part.get("compression_config")
        if entry:
            by = entry.get("quant_method", "another tool") if isinstance(entry, dict) else "another tool"
            raise LoftqError(
                f"`{model}` is already quantized, by {by}",
                "start from the unquantized checkpoint that it was made from; its model card should name it",
            )


def choose_side_files(names: Iterable[str]) -> tuple[str, ...]:
    """The files to copy as they are: tokenizer, chat template, generation config, licence, code."""
    return tuple(name for name in sorted(names) if _like(name, SIDE_FILES) and not _like(name, NOT_SIDE_FILES))


def _like(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name.lower(), pattern) for pattern in patterns)


def _indexed_files(index: Mapping[str, Any], names: set[str]) -> tuple[str, ...]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LoftqError(f"{INDEX} has no `weight_map`", "download it again")
    for file in weight_map.values():
        if not isinstance(file, str) or file != PurePath(file).name or "\\" in file or file == "..":
            raise LoftqError(f"{INDEX} names `{file}`, which is no plain file name", "download it again")
        if not file.endswith(".safetensors"):
            raise LoftqError(f"{INDEX} names `{file}`, which is no safetensors file", "download it again")
    files = sorted(set(weight_map.values()))
    if missing := [file for file in files if file not in names]:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise LoftqError(f"{INDEX} names `{missing[0]}`{others}, which is not there", "download what is missing")
    return tuple(files)


def _no_weights(model: str, revision: str | None, names: set[str], read_json: ReadJson) -> LoftqError:
    source = json.dumps(model) + (f", revision={json.dumps(revision)}" if revision else "")
    if ADAPTER_CONFIG in names:
        base = read_json(ADAPTER_CONFIG).get("base_model_name_or_path")
        return LoftqError(
            f"`{model}` is an adapter for `{base}`, not a model",
            f"give the base, or merge the adapter into it first:\n{_merge_lines(source)}",
        )
    if any(_like(name, ["pytorch_model*.bin"]) for name in names):
        config = read_json("config.json") if "config.json" in names else {}
        return LoftqError(
            f"`{model}` has its weights as pickle (pytorch_model.bin), which can run code when it is read",
            f"if you trust it, convert it to safetensors:\n{_conversion_lines(source, config)}",
        )
    if gguf := sorted(name for name in names if name.endswith(".gguf")):
        lines = _conversion_lines(source, {}, gguf[0])
        return LoftqError(
            f"`{model}` has its weights as GGUF only ({gguf[0]})",
            "start from the original checkpoint, or from the values that the GGUF file still has:\n" + lines,
        )
    listed = ", ".join(sorted(names)[:5]) or "no files"
    return LoftqError(f"`{model}` has no safetensors weights ({listed})", "give the folder that holds the weights")


def _conversion_lines(source: str, config: Mapping[str, Any], gguf: str | None = None) -> str:
    """Three lines of Python that save the checkpoint as safetensors; `source` is its quoted name, with revision."""
    remote = "auto_map" in config
    names = config.get("architectures")
    # `isidentifier`, because the line is there to be run and the config is not to be trusted
    named = isinstance(names, list) and names and str(names[0]).isidentifier() and not remote
    name = names[0] if names and named else "AutoModelForCausalLM"
    imports, extra = ["AutoTokenizer", name], ", trust_remote_code=True" if remote else ""
    if gguf:
        imports, extra = [*imports, "GgufConfig"], ", quantization_config=GgufConfig(dequantize=True)"
        source += f", gguf_file={json.dumps(gguf)}"
    return (
        f"from transformers import {', '.join(imports)}\n"
        f'{name}.from_pretrained({source}{extra}, dtype="auto").save_pretrained("safetensors-model")\n'
        f'AutoTokenizer.from_pretrained({source}).save_pretrained("safetensors-model")'
    )


def _merge_lines(source: str) -> str:
    model = f'AutoPeftModelForCausalLM.from_pretrained({source}, dtype="auto")'
    return f'from peft import AutoPeftModelForCausalLM\n{model}.merge_and_unload().save_pretrained("merged-model")'
