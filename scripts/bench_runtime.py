"""`bench.py runtime`: memory, a LoRA training step and a decode step of a packed base, beside bitsandbytes and 16 bits.

    python scripts/bench.py runtime                                 # Llama 2 7B's shape, on a GPU
    python scripts/bench.py runtime --layers 2 --scale-down 32      # tried out on a CPU

The base is random and made layer by layer on the device: no file, and nothing larger than a layer.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections.abc import Callable
from typing import Any

from bench_common import now, print_table, save, say
from make_checkpoint import make_config

NAME = "runtime"
COLUMNS = {
    "base": "", "bits": "", "base, GiB": ".3f", "of its bytes": ".3f", "training step, ms": ".1f", "peak, GiB": ".2f",
    "step / bnb": ".2f", "peak / bnb": ".2f", "decode step, ms": ".2f", "in a CUDA graph, ms": ".2f",
    "weights read, GB/s": ".0f", "of copy bandwidth": ".2f",
}  # fmt: skip
KINDS = ("16-bit", "bnb nf4", "packed 4", "packed 3", "packed 2")
RANK, WARM_UP = 16, 2


def make_base(kind: str, config: Any, device: Any) -> tuple[Any, int]:
    """A random model on `device`, and the bytes of its linear layers as they are stored."""
    import torch
    from torch import nn
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)
    stored = 0
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            made = make_linear(kind, layer.out_features, layer.in_features, device)
            stored += sum(t.nbytes for t in (*made.parameters(), *made.buffers())) + extra_bytes(made)
            model.set_submodule(name, made)
        elif not list(layer.children()) and any(p.is_meta for p in layer.parameters()):
            layer.to_empty(device=device)
            for parameter in layer.parameters():
                nn.init.ones_(parameter) if parameter.ndim == 1 else nn.init.normal_(parameter, std=0.02)
    return model.requires_grad_(False).eval(), stored


def make_linear(kind: str, m: int, n: int, device: Any) -> Any:
    import torch
    from torch import nn

    from loftq_cli.quantizers.codebook import LLOYD
    from loftq_cli.runtime import PackedLinear, Scheme

    if kind.startswith("packed"):
        bits = int(kind[-1])
        layer = PackedLinear(n, m, False, Scheme(bits, 64, "codebook", double_quant=True), torch.bfloat16).to(device)
        words = layer.codes.shape
        layer.codes = torch.randint(-(2**31), 2**31 - 1, words, dtype=torch.int32, device=device)
        layer.scale = torch.randint(0, 256, layer.scale.shape, dtype=torch.uint8, device=device)
        layer.codebook = torch.tensor(LLOYD[bits], device=device)
        layer.scale_absmax, layer.scale_offset = layer.scale_absmax.fill_(0.1), layer.scale_offset.fill_(0.0)
        return layer
    weight = torch.randn(m, n, dtype=torch.bfloat16, device=device) * 0.02
    if kind == "16-bit":
        layer = nn.Linear(n, m, bias=False, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        return layer
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(
        n, m, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=True
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        weight.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer
    )
    return layer.to(device)


def extra_bytes(layer: Any) -> int:
    """What bitsandbytes keeps outside parameters and buffers."""
    state = getattr(getattr(layer, "weight", None), "quant_state", None)
    nested = getattr(state, "state2", None)
    return sum(t.nbytes for t in (getattr(state, "absmax", None), getattr(nested, "absmax", None)) if t is not None)


def median_ms(work: Callable[[], None], runs: int) -> float:
    times = []
    for k in range(WARM_UP + runs):
        start = now()
        work()
        if k >= WARM_UP:
            times.append((now() - start) * 1e3)
    return statistics.median(times)


def graph_of(work: Callable[[], None]) -> Any:
    """What `work` launches, to launch again without Python, as servers do."""
    import torch

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def copy_bandwidth(device: Any) -> float:
    """Bytes per second that a large copy reads and writes."""
    import torch

    source = torch.empty(1 << (30 if device.type == "cuda" else 24), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (median_ms(lambda: target.copy_(source), 10) / 1e3)


def decode_times(model: Any, ids: Any, context: int, runs: int) -> tuple[float, float | None]:
    """Milliseconds of a decode step after `context` tokens: from Python, and in a CUDA graph."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)

    def decode() -> None:
        model(ids[:, :1], past_key_values=cache)
        cache.crop(-1)

    with torch.no_grad():
        model(ids[:, :context], past_key_values=cache)
        eager = median_ms(decode, runs)
        return eager, median_ms(graph_of(decode).replay, runs) if ids.is_cuda else None


def measure(kind: str, config: Any, device: Any, tokens: int, context: int, runs: int) -> dict[str, Any]:
    import torch
    from peft import LoraConfig, get_peft_model

    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated() if cuda else 0
    model, stored = make_base(kind, config, device)
    whole = sum(t.nbytes for t in {t.data_ptr(): t for t in model.state_dict().values()}.values())
    resident = torch.cuda.memory_allocated() - before if cuda else whole
    outside = sum(p.nbytes for name, p in model.named_parameters() if "proj" not in name)
    ids = torch.randint(0, config.vocab_size, (1, tokens), device=device)

    decode_ms, graph_ms = decode_times(model, ids, context, 4 * runs)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets)).train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    if cuda:
        torch.cuda.reset_peak_memory_stats()
    step_ms = median_ms(step, runs)
    return {
        "base": kind.split()[0], "bits": {"16-bit": 16, "bnb nf4": 4}.get(kind) or int(kind[-1]),
        "base, GiB": resident / 2**30, "of its bytes": resident / (stored + outside),
        "training step, ms": step_ms, "peak, GiB": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "decode step, ms": decode_ms, "in a CUDA graph, ms": graph_ms,
        "weights read, GB/s": stored / (graph_ms or decode_ms) / 1e6,
    }  # fmt: skip


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench.py runtime", description=__doc__)
    parser.add_argument("--shape", default="llama-2-7b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--scale-down", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--context", type=int, default=512, help="tokens in the cache of a decode step")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    options = parser.parse_args(argv)
    import torch
    from transformers import LlamaConfig

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = LlamaConfig(**make_config(options.shape, options.layers, options.scale_down))
    bandwidth = copy_bandwidth(device)
    say(f"copy bandwidth {bandwidth / 1e9:.0f} GB/s")
    rows = []
    for kind in options.kinds:
        torch.manual_seed(0)
        try:
            row = measure(kind, config, device, options.tokens, options.context, options.runs)
        except ImportError as error:  # bitsandbytes may be missing
            say(f"{kind}: {error}")
            continue
        row["of copy bandwidth"] = row["weights read, GB/s"] * 1e9 / bandwidth
        rows.append(row)
        say(row)
        gc.collect()
        torch.cuda.empty_cache()
    beside = next((row for row in rows if row["base"] == "bnb"), None)
    for row in rows:
        for name, key in (("step / bnb", "training step, ms"), ("peak / bnb", "peak, GiB")):
            row[name] = row[key] / beside[key] if beside and row[key] is not None else None
    print_table(rows, COLUMNS)
    save(NAME, rows, command=" ".join(["python scripts/bench.py", NAME, *argv]), copy_bandwidth=bandwidth)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
