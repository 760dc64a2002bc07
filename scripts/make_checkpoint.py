"""Write a random bfloat16 checkpoint with the shapes, names and shards of a well-known model, to measure with.

    python scripts/make_checkpoint.py llama-2-7b /tmp/7b
    python scripts/make_checkpoint.py llama-3-70b /tmp/70b --layers 30
    python scripts/make_checkpoint.py moe /tmp/moe --layers 12              (qwen3-30b-a3b)
    python scripts/make_checkpoint.py some/config.json /tmp/small --scale-down 16

Weights are Student-t with three degrees of freedom × 0.02 (heavy tails, as real ones have); norms are ones. Shards are
filled up to the size that the Hub's copies were saved with: 10 GB for Llama 2 7B (2 files), 5 GB for Llama 3 70B (30)
and Mixtral (19), 4 GB for Qwen3 30B (16). `--layers` leaves that size as it is, `--scale-down` keeps the number of
files. The same arguments on the same kind of device write the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SHARED = {"hidden_act": "silu", "initializer_range": 0.02, "tie_word_embeddings": False, "use_cache": True}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "bos_token_id": 1, "eos_token_id": 2,
        "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 4096, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-5, "vocab_size": 32000, **SHARED,
    },
    "llama-3-70b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "bos_token_id": 128000, "eos_token_id": 128001,
        "hidden_size": 8192, "intermediate_size": 28672, "max_position_embeddings": 8192, "num_attention_heads": 64,
        "num_hidden_layers": 80, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "vocab_size": 128256, **SHARED,
    },
    "mixtral-8x7b": {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "bos_token_id": 1, "eos_token_id": 2,
        "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
        "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32000, **SHARED,
    },
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": False,
        "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_size": 2048,
        "intermediate_size": 6144, "max_position_embeddings": 40960, "mlp_only_layers": [],
        "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "vocab_size": 151936, **SHARED,
    },
}  # fmt: skip
SHARD_BYTES = {"llama-2-7b": 10**10, "qwen3-30b-a3b": 4 * 10**9}
DEFAULT_SHARD_BYTES = 5 * 10**9
PIECE = 2 << 20  # elements drawn at once by one thread: its float32 copies are what memory is needed for


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)


def make_config(shape: str, layers: int | None, scale_down: int) -> dict[str, Any]:
    source = CONFIGS.get(shape) or json.loads(Path(shape).read_text())
    config = {key: value for key, value in source.items() if key not in ("dtype", "quantization_config")}
    config["torch_dtype"] = "bfloat16"
    if layers is not None:
        config["num_hidden_layers"] = layers
    if scale_down > 1:
        config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
        for key in ("hidden_size", "intermediate_size", "moe_intermediate_size", "vocab_size"):
            if key in config:  # multiples of 64, for groups of 64 inputs
                config[key] = math.ceil(config[key] / scale_down / 64) * 64
        groups = config["num_key_value_heads"] = max(1, config["num_key_value_heads"] // scale_down)
        config["num_attention_heads"] = max(1, config["num_attention_heads"] // scale_down // groups) * groups
        config["bos_token_id"], config["eos_token_id"] = 1, 2
    return config


def tensors_of(config: dict[str, Any]) -> list[Tensor]:
    """Names and shapes as the Hub's files have them, in the order of the model's layers.

    transformers fuses experts in memory; what it would save is what the Hub has, a tensor for each expert.
    """
    import transformers
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    logging.disable(logging.WARNING)
    with torch.device("meta"):
        model = getattr(transformers, config["architectures"][0])(
            CONFIG_MAPPING[config["model_type"]].from_dict(config)
        )
    state = revert_weight_conversion(model, model.state_dict())
    tied = set(model.all_tied_weights_keys) if config.get("tie_word_embeddings") else set()

    def order(name: str) -> tuple[bool, list[Any]]:
        numbered = [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
        return not name.startswith(f"{model.base_model_prefix}."), numbered  # the head comes last

    return [Tensor(name, tuple(state[name].shape)) for name in sorted(state.keys() - tied, key=order)]


def split(tensors: list[Tensor], shard_bytes: int) -> list[list[Tensor]]:
    """Fill one shard after another, as `save_pretrained` does; in a file, names are in alphabetical order."""
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + 2 * tensor.count > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += 2 * tensor.count
    return [sorted(shard, key=lambda tensor: tensor.name) for shard in shards]


def header_of(shard: list[Tensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in shard:
        begin, end = end, end + 2 * tensor.count
        entries[tensor.name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def draw(name: str, begin: int, count: int, seed: int, device: torch.device) -> torch.Tensor:
    """One piece of a tensor, bfloat16 [count]; it depends on the seed, the name and the place alone."""
    digest = hashlib.sha256(f"{seed}:{name}:{begin}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    x = torch.empty(count, device=device)
    squares = torch.zeros(count, device=device)
    for _ in range(3):
        squares.addcmul_(x.normal_(generator=generator), x)
    return x.normal_(generator=generator).mul_(squares.div_(3).rsqrt_()).mul_(0.02).bfloat16()


class Painter:
    """Draws pieces and writes them where they belong, each thread with buffers and a stream of its own."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed, self.device, self.local = seed, device, threading.local()
        self.done, self.lock = 0, threading.Lock()

    def paint(self, file: int, offset: int, tensor: Tensor, begin: int, count: int) -> None:
        if len(tensor.shape) == 1 and tensor.name.endswith("weight"):  # a norm
            data = torch.ones(count, dtype=torch.bfloat16)
        elif self.device.type == "cuda":
            if not hasattr(self.local, "pinned"):
                self.local.pinned = torch.empty(PIECE, dtype=torch.bfloat16, pin_memory=True)
                self.local.stream = torch.cuda.Stream(self.device)
            data = self.local.pinned[:count]
            with torch.cuda.stream(self.local.stream):
                data.copy_(draw(tensor.name, begin, count, self.seed, self.device), non_blocking=True)
            self.local.stream.synchronize()
        else:
            data = draw(tensor.name, begin, count, self.seed, self.device)
        view = data.view(torch.uint8).numpy().data
        while view:
            written = os.pwrite(file, view, offset)
            view, offset = view[written:], offset + written
        with self.lock:
            self.done += 2 * count


def pieces(shard: list[Tensor], offset: int) -> Iterator[tuple[int, Tensor, int, int]]:
    for tensor in shard:
        for begin in range(0, tensor.count, PIECE):
            count = min(PIECE, tensor.count - begin)
            yield offset, tensor, begin, count
            offset += 2 * count


def write_shards(folder: Path, files: dict[str, list[Tensor]], seed: int, device: torch.device, workers: int) -> None:
    painter, start, total = (
        Painter(seed, device),
        time.perf_counter(),
        2 * sum(t.count for s in files.values() for t in s),
    )
    flushes: list[Future[None]] = []
    stop = threading.Event()

    def report() -> None:
        seconds = time.perf_counter() - start
        print(f"{painter.done / 1e9:7.2f} of {total / 1e9:.2f} GB, {seconds:5.1f} s", flush=True)

    def report_often() -> None:
        while not stop.wait(5):
            report()

    def flush(descriptor: int) -> None:
        """On the disk while the next file is drawn, so that what is measured later does not wait for it."""
        os.fsync(descriptor)
        os.close(descriptor)

    threading.Thread(target=report_often, daemon=True).start()
    torch.set_num_threads(1)  # the pieces are what runs in parallel
    with ThreadPoolExecutor(workers) as pool, ThreadPoolExecutor(1) as flusher:
        for name, shard in files.items():
            header = header_of(shard)
            descriptor = os.open(folder / name, os.O_CREAT | os.O_WRONLY, 0o644)
            os.pwrite(descriptor, header, 0)
            for _ in pool.map(lambda piece, file=descriptor: painter.paint(file, *piece), pieces(shard, len(header))):
                pass
            flushes.append(flusher.submit(flush, descriptor))
        report()
    for future in flushes:
        future.result()
    stop.set()
    print(f"on the disk after {time.perf_counter() - start:.1f} s", flush=True)


def write_tokenizer(folder: Path) -> None:
    """One token for every byte: random weights do not care, and calibration wants tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}\n')


def make(
    shape: str, out: Path, layers: int | None = None, scale_down: int = 1, seed: int = 0,
    shard_bytes: int | None = None, device: str | None = None, workers: int | None = None,
) -> None:  # fmt: skip
    shape = {"moe": "qwen3-30b-a3b"}.get(shape, shape)
    if out.exists():
        sys.exit(f"{out} exists")
    config = make_config(shape, layers, scale_down)
    tensors = tensors_of(config)
    shards = split(tensors, shard_bytes or SHARD_BYTES.get(shape, DEFAULT_SHARD_BYTES) // scale_down**2)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    files = dict(zip(names if len(shards) > 1 else ["model.safetensors"], shards, strict=True))
    total = 2 * sum(tensor.count for tensor in tensors)
    print(f"{shape}: {len(tensors)} tensors, {total / 1e9:.2f} GB in {len(files)} files", flush=True)

    partial = out.with_name(out.name + ".partial")  # an interrupted run leaves no half model under the name
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if (free := shutil.disk_usage(partial).free) < total + (64 << 20):
        partial.rmdir()
        sys.exit(f"{out} takes {total / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: use fewer --layers")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    write_shards(partial, files, seed, where, workers or min(16, os.cpu_count() or 1))
    if len(files) > 1:
        weight_map = {tensor.name: name for name, shard in files.items() for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id") if key in config}
    (partial / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    write_tokenizer(partial)
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    partial.rename(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", help=f"{', '.join(CONFIGS)}, moe, or a config.json")
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, help="instead of the model's own number")
    parser.add_argument("--scale-down", type=int, default=1, help="divide hidden sizes, heads and the vocabulary")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-bytes", type=int)
    parser.add_argument("--device")
    parser.add_argument("--workers", type=int)
    make(**vars(parser.parse_args()))
