"""The adapter's contract through PEFT itself: base + scaling · lora_B @ lora_A is the weight that was meant.

LoftQ's own code, and PEFT's, write factors for scaling 1 whatever `alpha / r` is; here any scaling must come out right.
"""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loftq_cli.formats.peft_adapter import (
    adapter_config,
    applied_factors,
    scaling,
    stored_factors,
    target_modules,
    tensor_names,
)
from loftq_cli.heads import Head

RANK = 4


def plan_for(model: Any, alpha: float, rslora: bool) -> Any:
    linears = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    return SimpleNamespace(
        jobs=tuple(
            SimpleNamespace(module=name, transposed=False, rank=RANK, expert=None, embedding=False, wrapped=False)
            for name in linears
        ),
        targets=SimpleNamespace(head=Head("CAUSAL_LM"), stacks=[], retargeted=frozenset(), module_names=()),
        config=SimpleNamespace(rank=RANK, alpha=alpha, rslora=rslora),
    )


def write_adapter(folder: Path, plan: Any, names: list[str], dtype: torch.dtype, base: str) -> dict[str, Tensor]:
    """Random factors for the modules of `plan`; returns what `applied_factors` says each product is."""
    generator = torch.Generator().manual_seed(0)
    tensors, products = {}, {}
    for job in plan.jobs:
        m, n = job.shape
        lora_A = torch.randn(RANK, n, generator=generator) * 0.1
        lora_B = torch.randn(m, RANK, generator=generator) * 0.1
        factor = scaling(RANK, plan.config.alpha, plan.config.rslora)
        stored = stored_factors(lora_A, lora_B, factor, dtype)
        tensors |= dict(zip(tensor_names(job.module), stored, strict=True))
        stored_A, stored_B = applied_factors(*stored, factor)
        products[job.module] = stored_B @ stored_A
        if dtype == torch.float32:
            torch.testing.assert_close(products[job.module], lora_B @ lora_A)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(adapter_config(plan, base, names)))
    return products


@pytest.mark.parametrize("rslora", [False, True], ids=["", "rslora"])
@pytest.mark.parametrize("alpha", [RANK, RANK / 4, 2 * RANK, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_base_and_adapter_are_the_weight_that_was_meant(
    dtype: torch.dtype, alpha: float, rslora: bool, tiny_llama: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    plan = plan_for(base, alpha, rslora)
    for job in plan.jobs:
        job.shape = tuple(base.get_submodule(job.module).weight.shape)
    names = [name for name, _ in base.named_modules()]
    products = write_adapter(tmp_path / "loftq_init", plan, names, dtype, str(tiny_llama))
    wanted = {module: base.get_submodule(module).weight.detach() + product for module, product in products.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*[Uu]nexpected keyword.*")  # PEFT's word for keys it does not know
        model = PeftModel.from_pretrained(base, tmp_path, subfolder="loftq_init", is_trainable=True)
    layers = model.base_model.model
    for module, weight in wanted.items():
        layer = layers.get_submodule(module)
        with torch.no_grad():
            computed = layer(torch.eye(weight.shape[1])).T
        torch.testing.assert_close(computed, weight, rtol=0, atol=1e-5)
        assert layer.scaling["default"] == scaling(RANK, alpha, rslora)
    adapted = {name.split(".lora_A")[0] for name, _ in layers.named_modules() if name.endswith(".lora_A.default")}
    assert adapted == set(products)
    merged = model.merge_and_unload()
    for module, weight in wanted.items():
        torch.testing.assert_close(merged.get_submodule(module).weight.detach(), weight, rtol=0, atol=1e-5)


def test_the_adapter_finds_its_base(tiny_llama: Path, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    plan = plan_for(base, 8.0, False)
    for job in plan.jobs:
        job.shape = tuple(base.get_submodule(job.module).weight.shape)
    write_adapter(tmp_path / "loftq_init", plan, [n for n, _ in base.named_modules()], torch.float32, str(tiny_llama))
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "loftq_init", is_trainable=True)
    saved = load_file(tmp_path / "loftq_init/adapter_model.safetensors")
    loaded = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())


def test_scaling() -> None:
    assert scaling(64, 16, False) == 0.25
    assert scaling(64, 16, True) == 2.0
    assert scaling(8, 8, True) == pytest.approx(math.sqrt(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("factor", [1.0, 0.25, 2.0, 8 / math.sqrt(16)])
def test_a_scaling_that_is_a_power_of_two_rounds_nothing(dtype: torch.dtype, factor: float) -> None:
    lora_A, lora_B = (torch.randn(4, 8).to(dtype).float(), torch.randn(8, 4).to(dtype).float())
    stored = stored_factors(lora_A, lora_B, factor, dtype)
    assert all(tensor.dtype == dtype and tensor.is_contiguous() for tensor in stored)
    again_A, again_B = applied_factors(*stored, factor)
    assert torch.equal(again_A, lora_A)
    assert torch.equal(again_B, lora_B)


def test_lora_A_is_stored_as_the_method_gave_it() -> None:
    """A `qlora` start has `lora_B` = 0, and a `lora_A` whose distribution must be PEFT's own."""
    lora_A = torch.randn(4, 8)
    stored_A, _ = stored_factors(lora_A, torch.zeros(8, 4), 0.3, torch.float32)
    assert torch.equal(stored_A, lora_A)


def test_config_has_no_key_that_peft_lacks() -> None:
    from peft import LoraConfig

    options = SimpleNamespace(rank=RANK, alpha=16.0, rslora=True)
    plan = SimpleNamespace(
        jobs=(SimpleNamespace(module="a.b", transposed=False, rank=RANK, expert=None, embedding=False, wrapped=False),),
        targets=SimpleNamespace(head=Head(None), stacks=[], retargeted=frozenset(), module_names=()),
        config=options,
    )
    config = adapter_config(plan, "owner/name", ["", "a", "a.b", "a.c"])
    known = set(LoraConfig.__dataclass_fields__)
    assert set(config) <= known
    assert config["target_modules"] == ["b"]
    assert isinstance(config["lora_alpha"], int)
    settings = LoraConfig(**{key: value for key, value in config.items() if key != "peft_type"})
    assert settings.init_lora_weights is True
    assert (settings.r, settings.lora_alpha, settings.use_rslora, settings.bias) == (RANK, 16, True, "none")
    assert (settings.task_type, settings.base_model_name_or_path) == (None, "owner/name")


def layers(*inside: str, count: int = 12) -> list[str]:
    return [f"model.layers.{k}.{name}" for k in range(count) for name in inside]


NAMES = ["", "model", "model.layers", *layers("attn", "attn.q", "attn.k", "mlp", "mlp.up"), "lm_head", "vision.attn.q"]


@pytest.mark.parametrize(
    ("modules", "names", "wanted"),
    [
        ([*layers("attn.q", "attn.k", "mlp.up"), "vision.attn.q"], NAMES, ["k", "q", "up"]),
        (layers("attn.k", "mlp.up"), NAMES, ["k", "up"]),
        (layers("attn.q", "mlp.up"), NAMES, sorted([*layers("attn.q"), "up"])),  # `q` would take vision.attn.q
        ([n for n in layers("attn.k") if ".1." not in n], NAMES, sorted(n for n in layers("attn.k") if ".1." not in n)),
        (["model.layers.1.attn.k"], NAMES, ["model.layers.1.attn.k"]),  # and not model.layers.11.attn.k
        (layers("attn.k", "mlp.up"), [], sorted(layers("attn.k", "mlp.up"))),  # names not known
        (["lm_head"], NAMES, ["lm_head"]),
    ],
)
def test_targets_select_exactly_the_modules(modules: list[str], names: list[str], wanted: list[str]) -> None:
    from peft.tuners.tuners_utils import check_target_module_exists

    targets = target_modules(modules, names)
    assert targets == wanted
    config = SimpleNamespace(target_modules=set(targets))
    assert [name for name in NAMES if check_target_module_exists(config, name)] == [n for n in NAMES if n in modules]
