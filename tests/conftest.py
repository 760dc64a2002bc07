"""Tiny checkpoints, saved by transformers itself."""

from __future__ import annotations

import os
from pathlib import Path

# Tiny tensors: a second thread costs more than it brings, all the more beside other test processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

TINY_LLAMA = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 128,
}


def save_llama(folder: Path, dtype: torch.dtype = torch.float32, shard_size: str = "5GB", **overrides: object) -> Path:
    """A random Llama with weights that are not all alike: heavy tails and a low-rank part, as real ones have."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**TINY_LLAMA, **overrides}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                m, n = parameter.shape
                tails = torch.randn(m, n) ** 3 * 0.01
                parameter.copy_(tails + 0.02 * torch.randn(m, 4) @ torch.randn(4, n) / 2)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 128}\n')
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file, float32."""
    return save_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def sharded_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Several bfloat16 shards with an index."""
    folder = save_llama(tmp_path_factory.mktemp("models") / "sharded-llama", torch.bfloat16, "300KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


WITHOUT_LOFTQ = """
import sys, torch
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("loftq_cli", *sys.argv[3:]):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
"""
