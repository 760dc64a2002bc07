"""Which tensors of a checkpoint are weights of linear layers, what their modules are called, and why the rest is not.

The model is built on the meta device (no memory, no weights) by transformers; names in the file are mapped to modules
with the renamings that `from_pretrained` itself uses. Where transformers cannot build it, a rule on names and shapes
stands in, and says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from loftq_cli import lean
from loftq_cli.agreement import refuse_disagreement
from loftq_cli.checkpoint.reader import whole_name
from loftq_cli.checkpoint.source import Checkpoint
from loftq_cli.embeddings import TokenEmbedding, find_embeddings
from loftq_cli.errors import LoftqError
from loftq_cli.experts import FLOATS, ExpertSlot, ExpertStack, find_experts
from loftq_cli.heads import Head, choose_head
from loftq_cli.layers import (
    is_conv1d,
    is_linear,
    is_replaceable,
    is_router,
    kept_in_float32,
    kind_of,
    retargeted_by_peft,
    stored_as,
)
from loftq_cli.meta_model import (
    AUTO_CLASSES,
    UnknownModelError,
    build,
    find_auto_class,
    model_classes,
    renamed_keys,
    state_keys,
)

# For the fallback only: parts of names that are two-dimensional weights but not linear layers, or never quantized.
NOT_LINEAR = re.compile(
    r"(embed|^wte|\.wte|^wpe|\.wpe|word_emb|shared\.|norm|^lm_head|\.lm_head|^head\.|output_projection|classifier|"
    r"^score\.|pooler|relative_attention_bias|rel_embeddings|position|router|\.gate\.weight|conv)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Targets:
    """The linear weights of one checkpoint.

    Attributes:
        linears: tensor name → module name, for every weight that may be quantized; of an expert in a tensor of all,
            the name of the slice, `name[3]`.
        experts: the places of those among `linears` that are matrices of experts, see `ExpertSlot`.
        retargeted: modules among `linears` whose adapter PEFT would put on the experts, were they its target modules.
        transposed: names of all weights that are stored [in_features, out_features], those of `Conv1D`.
        skipped: tensor name → reason, for every other tensor.
        skipped_linears: module names of linear layers among `skipped`: loaders must be told to leave them alone.
        module_names: all module names of the model (empty when the fallback rule was used).
        auto_class: what loads the model, e.g. `AutoModelForCausalLM`.
        model_classes: all that may load it or a part of it: Auto class → class; none for foreign code.
        has_fused_experts: some modules hold the weights of several experts in one parameter.
        keeps_float32: transformers keeps some of the model in float32 where the rest is loaded as float16.
        linear_subclass: the name of a class of linear layers that is not `nn.Linear` itself, or None.
        head: the task type for PEFT, and what it makes of the model's head.
        output_head: tensor and module of a head that is tied to nothing, and a linear layer; it is among the skipped.
        embeddings: tables that tokens are looked up in, by tensor; they are among the skipped.
        note: what the user must know about how the layers were found, or None.
    """

    linears: dict[str, str]
    skipped: dict[str, str]
    skipped_linears: tuple[str, ...]
    module_names: tuple[str, ...]
    architecture: str
    auto_class: str
    model_classes: dict[str, str]
    head: Head
    main_input_name: str
    has_fused_experts: bool = False
    keeps_float32: bool = False
    linear_subclass: str | None = None
    transposed: frozenset[str] = frozenset()
    experts: dict[str, ExpertSlot] = field(default_factory=dict)
    retargeted: frozenset[str] = frozenset()
    output_head: tuple[str, str] | None = None
    embeddings: dict[str, TokenEmbedding] = field(default_factory=dict)
    note: str | None = None

    @property
    def stacks(self) -> list[ExpertStack]:
        """The parameters that hold matrices of experts."""
        return list(dict.fromkeys(slot.stack for slot in self.experts.values()))


def find_targets(checkpoint: Checkpoint, trust_remote_code: bool = False) -> Callable[[], Targets]:
    """Begin to find the linear weights of `checkpoint`, from its config and headers alone, and return what ends it.

    In a process that is ours, another one finds them (see `lean`): to be called before this one wakes a GPU.
    """
    plainly = partial(_find, checkpoint, trust_remote_code)
    if trust_remote_code or not lean.possible():
        return plainly
    lightly = lean.begin(_find_lightly, checkpoint)

    def found() -> Targets:
        try:
            return lightly()
        except ChildProcessError:  # perhaps for want of what was hidden
            return plainly()

    return found


def _find_lightly(checkpoint: Checkpoint) -> Targets:
    try:
        return _find(checkpoint, light=True)
    except LoftqError:  # a few models compute with real and with meta tensors at once
        return _find(checkpoint)


def _find(checkpoint: Checkpoint, trust_remote_code: bool = False, light: bool = False) -> Targets:
    try:
        model = build(checkpoint, trust_remote_code, light)
    except UnknownModelError as error:
        note = f"transformers could not build this model ({error}): linear layers were chosen by names and shapes"
        return replace(guess_targets(checkpoint), note=note)
    except Exception as error:  # a broken config, a missing optional package, an error in remote code
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise LoftqError(
            f"transformers cannot build `{checkpoint.model}`: {reason}",
            "it must build this model for the result to load: check config.json, or install what is missing",
        ) from error
    return _by_model(checkpoint, model)


def _by_model(checkpoint: Checkpoint, model: Any) -> Targets:
    modules = dict(model.named_modules())
    renamed = renamed_keys(checkpoint.tensors, model)
    keys, converted = state_keys(checkpoint, model, renamed)
    refuse_disagreement(checkpoint, model, keys, {key for key, _ in renamed.values()})
    experts = find_experts(checkpoint.tensors, renamed, model)
    wholes = {whole_name(tensor) for tensor in experts}
    module_of = {name: module for name, key in keys.items() if (module := key.rpartition(".")[0]) in modules}
    head = model.get_output_embeddings()
    tied = _tied_names(model)
    retargeted = retargeted_by_peft(checkpoint.config.get("model_type"))
    base = getattr(model, model.base_model_prefix, None) if model.base_model_prefix else None
    inside = {id(module) for module in base.modules()} if isinstance(base, torch.nn.Module) else None

    linears: dict[str, str] = {}
    skipped: dict[str, str] = {}
    output_head = None
    for info in checkpoint.tensors.values():
        if info.name in wholes:
            names = [info.name] if info.name in experts else [f"{info.name}[{i}]" for i in range(info.shape[0])]
            linears |= {name: experts[name].name for name in names}
            continue
        if info.name in converted:
            changed = f"changed by transformers while loading ({converted[info.name]})"
            skipped[info.name] = changed if info.dtype in FLOATS else stored_as(info)
            continue
        name = module_of.get(info.name)
        if name is None:
            skipped[info.name] = "not a weight of this architecture: copied, and left out by transformers"
            continue
        module = modules[name]
        if info.name.rsplit(".", 1)[-1] != "weight":
            owner = modules[name.partition(".parametrizations.")[0]]  # of a weight in two parts, as in weight norm
            kind = "convolution" if kind_of(owner) == "convolution" else "not a linear weight"
            skipped[info.name] = "bias" if info.name.endswith("bias") else kind
        elif not is_linear(module) and not is_conv1d(module):
            skipped[info.name] = kind_of(module)
        elif module is head:
            skipped[info.name] = "output head"
            output_head = (info.name, name) if f"{name}.weight" not in tied and info.dtype in FLOATS else None
        elif f"{name}.weight" in tied:
            skipped[info.name] = "tied to another weight"
        elif inside is not None and id(module) not in inside:
            skipped[info.name] = "task head"
        elif kept := kept_in_float32(model, name):
            skipped[info.name] = f"transformers keeps `{kept}` in float32"
        elif is_router(name, module, modules.get(name.rpartition(".")[0]), checkpoint.config):
            skipped[info.name] = "router"
        elif info.dtype not in FLOATS:
            skipped[info.name] = stored_as(info)
        else:
            linears[info.name] = name
    found = set(linears.values())
    architecture = type(model).__name__
    auto_class, suggested = find_auto_class(architecture, model.main_input_name, checkpoint.config)
    return Targets(
        linears=linears,
        skipped=skipped,
        skipped_linears=tuple(name for name, module in modules.items() if is_replaceable(module) and name not in found),
        module_names=tuple(modules),
        architecture=architecture,
        auto_class=auto_class,
        model_classes=model_classes(checkpoint.config.get("model_type"), architecture),
        head=choose_head(model, suggested, keys, linears),
        main_input_name=model.main_input_name,
        has_fused_experts=any(
            parameter.ndim == 3 and "experts" in name for name, parameter in model.named_parameters()
        ),
        keeps_float32=bool(getattr(model, "_keep_in_fp32_modules", None)),
        linear_subclass=next(
            (
                kind
                for name in found.intersection(modules)
                if (kind := type(modules[name]).__name__) not in ("Linear", "Conv1D")
            ),
            None,
        ),
        transposed=frozenset(
            tensor for tensor, name in module_of.items() if is_conv1d(modules[name]) and tensor.endswith(".weight")
        )
        | {tensor for tensor, slot in experts.items() if slot.transposed},
        experts=experts,
        retargeted=frozenset(name for name in found.intersection(modules) if name.rpartition(".")[2] in retargeted),
        output_head=output_head,
        embeddings=find_embeddings(model, checkpoint.tensors, module_of),
    )


def _tied_names(model: Any) -> set[str]:
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return set(tied) | set(tied.values())


def guess_targets(checkpoint: Checkpoint) -> Targets:
    """The linear weights of `checkpoint` by a rule on names and shapes, without transformers."""
    linears: dict[str, str] = {}
    skipped: dict[str, str] = {}
    for info in checkpoint.tensors.values():
        if not info.name.endswith(".weight") or len(info.shape) != 2:
            skipped[info.name] = "bias" if info.name.endswith("bias") else "not a two-dimensional weight"
        elif found := NOT_LINEAR.search(info.name):
            skipped[info.name] = f"its name holds `{found[0]}`"
        elif info.dtype not in FLOATS:
            skipped[info.name] = stored_as(info)
        else:
            linears[info.name] = info.name.removesuffix(".weight")
    architecture = (checkpoint.config.get("architectures") or ["AutoModelForCausalLM"])[0]
    auto_map = checkpoint.config.get("auto_map", {})
    known = {name for name, _, _ in AUTO_CLASSES}  # it is printed as Python to be pasted
    auto_class = next((name for name in auto_map if name in known), "AutoModelForCausalLM")
    return Targets(
        linears=linears,
        skipped=skipped,
        skipped_linears=tuple(
            name.removesuffix(".weight")
            for name, why in skipped.items()
            if name.endswith(".weight") and why.startswith("its name holds")
        ),
        module_names=(),
        architecture=architecture,
        auto_class=auto_class,
        model_classes={},
        head=Head("CAUSAL_LM" if auto_class == "AutoModelForCausalLM" else None),
        main_input_name="input_ids",
        has_fused_experts=any(len(info.shape) == 3 and "experts" in info.name for info in checkpoint.tensors.values()),
    )
