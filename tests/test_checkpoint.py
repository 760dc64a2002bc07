"""Local checkpoints: what is opened, and what is refused with which way out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from loftq_cli.checkpoint.reader import read_chunks, read_tensor
from loftq_cli.checkpoint.selection import INDEX
from loftq_cli.checkpoint.source import open_checkpoint
from loftq_cli.errors import ConfigError, LoftqError

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
SHARDS = {
    "model-00001-of-00002.safetensors": {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(3, dtype=torch.bool)},
    "model-00002-of-00002.safetensors": {"c": torch.tensor(7, dtype=torch.int64)},
}
FIRST, SECOND = SHARDS


def make(folder: Path, shards: dict[str, dict[str, Tensor]] | None = None, **files: Any) -> Path:
    """A checkpoint: safetensors files, an index if they are several, config.json and further files."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = {"model.safetensors": SHARDS["model-00001-of-00002.safetensors"]} if shards is None else shards
    for file, tensors in shards.items():
        save_file(tensors, folder / file, metadata={"format": "pt", "of": file})
    if len(shards) > 1:
        weight_map = {name: file for file, tensors in shards.items() for name in tensors}
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def edit_index(folder: Path, **changes: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= changes
    (folder / INDEX).write_text(json.dumps(index))


def refusal(folder: Path | str, *words: str, revision: str | None = None) -> LoftqError:
    """The error that opening raises; message and hint together must hold all `words`."""
    with pytest.raises(LoftqError) as caught:
        open_checkpoint(str(folder), revision)
    said = f"{caught.value.message}\n{caught.value.hint}"
    assert not [word for word in words if word not in said], said
    return caught.value


# what is opened


def test_sharded_folder(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(make(tmp_path, SHARDS)))
    assert checkpoint.model == str(tmp_path)
    assert checkpoint.revision is None
    assert checkpoint.config == CONFIG
    assert checkpoint.files == tuple(SHARDS)
    assert checkpoint.index is not None
    assert checkpoint.index["metadata"] == {"total_size": 1}
    assert checkpoint.metadata == {file: {"format": "pt", "of": file} for file in SHARDS}
    assert checkpoint.file_sizes[checkpoint.files[0]] == (tmp_path / checkpoint.files[0]).stat().st_size
    order = [(info.file, info.offset) for info in checkpoint.tensors.values()]
    assert order == sorted(order)
    for file, tensors in SHARDS.items():
        for name, tensor in tensors.items():
            info = checkpoint.tensors[name]
            assert (info.name, info.file, info.dtype, info.shape) == (name, file, tensor.dtype, tuple(tensor.shape))
            assert torch.equal(read_tensor(checkpoint.path(file), info), tensor)
            assert b"".join(read_chunks(checkpoint.path(file), info, 5)) == bytes(
                tensor.reshape(-1).view(torch.uint8).tolist()
            )


def test_single_file_is_found_under_any_name(tmp_path: Path) -> None:
    tensors = {"w": torch.ones(2)}
    assert open_checkpoint(str(make(tmp_path / "a"))).files == ("model.safetensors",)
    assert open_checkpoint(str(make(tmp_path / "b", {"weights.safetensors": tensors}))).files == (
        "weights.safetensors",
    )
    both = make(tmp_path / "c", {"model.safetensors": tensors})
    save_file(tensors, both / "consolidated.safetensors")
    save_file(tensors, both / "adapter_model.safetensors")
    assert open_checkpoint(str(both)).files == ("model.safetensors",)


def test_side_files(tmp_path: Path) -> None:
    copied = [
        *("LICENSE", "NOTICE.txt", "USE_POLICY.md", "generation_config.json", "preprocessor_config.json"),
        *("added_tokens.json", "merges.txt", "source.spm", "special_tokens_map.json", "tokenizer.json"),
        *("tokenizer.model", "tokenizer_config.json", "vocab.json", "chat_template.jinja"),
    ]
    left = [
        *("README.md", ".gitattributes", "training_args.bin"),
        *("pytorch_model.bin", "pytorch_model.bin.index.json", "tokenizer.bin", "flax_model.msgpack", "optimizer.pt"),
        *("model.onnx", "tf_model.h5", "x.gguf", "rust_model.ot", "consolidated.00.pth"),
        *("hf_token.txt", "customers.json", "trainer_state.json", "train.py"),  # which a push would make public
    ]
    folder = make(tmp_path, SHARDS, **dict.fromkeys(copied + left, "{}"))
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    assert open_checkpoint(str(folder)).side_files == tuple(sorted(copied))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "train.Model"}}))
    assert open_checkpoint(str(folder)).side_files == tuple(sorted([*copied, "train.py"]))


def test_fingerprint_follows_config_headers_and_sizes_only(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", SHARDS)
    first = open_checkpoint(str(folder)).fingerprint
    assert len(first) == 64
    same = tmp_path / "b"
    shutil.copytree(folder, same)  # not saved again: safetensors orders the metadata at random
    (same / "README.md").write_text("other")
    assert open_checkpoint(str(same)).fingerprint == first
    seen = {first}
    (folder / "config.json").write_text(json.dumps({**CONFIG, "x": 1}))
    seen.add(open_checkpoint(str(folder)).fingerprint)
    save_file({"c": torch.tensor(7)}, folder / SECOND, metadata={"format": "np"})
    seen.add(open_checkpoint(str(folder)).fingerprint)
    save_file({"d": torch.tensor(7)}, folder / SECOND, metadata={"format": "np"})
    rename_in_index(folder, "c", "d")
    seen.add(open_checkpoint(str(folder)).fingerprint)
    assert len(seen) == 4


def rename_in_index(folder: Path, old: str, new: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][new] = index["weight_map"].pop(old)
    (folder / INDEX).write_text(json.dumps(index))


def test_a_snapshot_of_the_hub_cache_opens_by_its_path(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--o--n" / "blobs", tmp_path / "models--o--n" / "snapshots" / ("a" * 40)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(make(tmp_path / "plain", SHARDS, **{"vocab.json": "{}"}).iterdir()):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    linked = tmp_path / "linked"
    linked.symlink_to(snapshot)
    for folder in (snapshot, linked):
        checkpoint = open_checkpoint(str(folder))
        assert set(checkpoint.tensors) == {"a", "b", "c"}
        assert checkpoint.side_files == ("vocab.json",)


def test_a_local_folder_needs_no_hub_client(tmp_path: Path) -> None:
    code = (
        "import sys; from loftq_cli.checkpoint.source import open_checkpoint\n"
        f"open_checkpoint({str(make(tmp_path))!r}); assert 'huggingface_hub' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# what is refused


def test_names_that_are_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "llama-3")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    refusal("./lama-3", "no such folder: `./lama-3`", "did you mean `llama-3`")
    refusal("./" + "x" * 5000, "cannot read")
    refusal(tmp_path / "lama-3", f"did you mean `{tmp_path / 'llama-3'}`")
    refusal("~/lama-3", "did you mean", "llama-3`")
    refusal("../lama-3", "no such folder")
    refusal("a/b/c", "no such folder", "org/name")
    refusal("llama 3!", "no such folder")
    refusal("llama-3/config.json", "is a file", "give the folder that holds it: `llama-3`")
    assert open_checkpoint("~/llama-3").files == open_checkpoint("llama-3").files
    assert isinstance(refusal("llama-3", "--revision main", "local folder", revision="main"), ConfigError)
    assert isinstance(refusal("", "MODEL is empty"), ConfigError)


def link_out(folder: Path, name: str) -> None:
    shutil.move(folder / name, folder.parent / "outside")
    (folder / name).symlink_to(folder.parent / "outside")


def truncate(path: Path, by: int) -> None:
    os.truncate(path, path.stat().st_size - by)


BAD_FOLDERS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no config": (lambda f: (f / "config.json").unlink(), ["no config.json"]),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), ["config.json` is not JSON"]),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), ["not a JSON object"]),
    "quantized": (
        lambda f: (f / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}'),
        ["already quantized, by gptq", "unquantized checkpoint"],
    ),
    "quantized inside": (
        lambda f: (f / "config.json").write_text('{"text_config": {"quantization_config": {"quant_method": "awq"}}}'),
        ["already quantized, by awq"],
    ),
    "index not JSON": (lambda f: (f / INDEX).write_text("nope"), [f"{INDEX}` is not JSON"]),
    "index empty": (lambda f: (f / INDEX).write_text("{}"), ["no `weight_map`"]),
    "index leaves by ..": (lambda f: edit_index(f, c=f"../{SECOND}"), [f"`../{SECOND}`", "no plain file name"]),
    "index leaves by /": (lambda f: edit_index(f, c="/etc/x.safetensors"), ["no plain file name"]),
    "index names a sub-folder": (lambda f: edit_index(f, c=f"sub/{SECOND}"), ["no plain file name"]),
    "index names ..": (lambda f: edit_index(f, c=".."), ["`..`", "no plain file name"]),
    "index names a pickle": (lambda f: edit_index(f, c="x.bin"), ["`x.bin`", "no safetensors file"]),
    "index names a number": (lambda f: (f / INDEX).write_text('{"weight_map": {"a": 1}}'), ["no plain file name"]),
    "shard missing": (lambda f: (f / SECOND).unlink(), [f"`{SECOND}`", "not there"]),
    "shard links out": (lambda f: link_out(f, SECOND), [SECOND, "leads out of the folder"]),
    "config links out": (lambda f: link_out(f, "config.json"), ["leads out of the folder"]),
    "tensor not in its file": (lambda f: edit_index(f, d=SECOND), ["`d`", f"`{SECOND}`", "does not hold it"]),
    "tensor in another file": (lambda f: edit_index(f, a=SECOND), ["`a`", f"`{FIRST}`", "does not place there"]),
    "tensor not in the index": (lambda f: rename_in_index(f, "a", "b"), ["`a`", f"`{FIRST}`"]),
    "tensor in both shards": (
        lambda f: save_file({**SHARDS[FIRST], **SHARDS[SECOND]}, f / SECOND),
        ["`a`", f"`{SECOND}` holds tensor", "does not place there"],
    ),
    "an output of loftq": (
        lambda f: (f / "loftq_report.json").write_text("{}"),
        ["output of loftq", "loftq merge", "merged-model"],
    ),
    "an adapter beside it": (
        lambda f: (f / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}'),
        ["adapter for `org/base` beside its weights", "remove adapter_config.json", "merge_and_unload"],
    ),
    "both index and single": (
        lambda f: shutil.copy(f / FIRST, f / "model.safetensors"),
        ["holds the model twice", "keep one"],
    ),
    "no index": (lambda f: (f / INDEX).unlink(), ["2 safetensors files", FIRST, SECOND, f"get its {INDEX}"]),
    "truncated": (lambda f: truncate(f / SECOND, 3), [f"`{SECOND}`", "truncated", "download"]),
    "LFS pointer": (
        lambda f: (f / SECOND).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n"),
        [f"`{SECOND}`", "git lfs pull"],
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folders(tmp_path: Path, case: str) -> None:
    folder = make(tmp_path / "model", SHARDS)
    spoil, words = BAD_FOLDERS[case]
    open_checkpoint(str(folder))
    spoil(folder)
    refusal(folder, *words)


def test_a_side_file_that_links_out_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", SHARDS, **{"tokenizer.json": "{}", "notes.md": "x"})
    link_out(folder, "notes.md")  # is not copied, so may be anywhere
    open_checkpoint(str(folder))
    link_out(folder, "tokenizer.json")
    refusal(folder, "tokenizer.json", "leads out of the folder")


def test_adapter_folder(tmp_path: Path) -> None:
    folder = make(tmp_path / "lora", {"adapter_model.safetensors": {"x": torch.ones(1)}})
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    refusal(folder, "is an adapter for `org/base`", "AutoPeftModelForCausalLM", "merge_and_unload", f'"{folder}"')


def test_gguf_folder(tmp_path: Path) -> None:
    (tmp_path / "x-q4.gguf").write_text("")
    error = refusal(tmp_path, "GGUF only (x-q4.gguf)", 'gguf_file="x-q4.gguf"', "GgufConfig(dequantize=True)")
    compile(error.hint.partition("\n")[2], "hint", "exec")


def test_empty_folder(tmp_path: Path) -> None:
    refusal(tmp_path, "no safetensors weights (no files)")


def test_conversion_lines_run_nothing_that_the_config_says(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_text("no pickle at all")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["x; import os"]}))
    assert "import os" not in refusal(tmp_path, "AutoModelForCausalLM").hint
