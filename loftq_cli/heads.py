"""Task types for PEFT, and the heads that it then wants in the adapter.

With a task type PEFT calls the model by arguments of its own, None where the caller gave nothing, and for classifiers
and questions it makes the head trainable: a copy in the adapter, without which the adapter does not load.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from loftq_cli.checkpoint.source import Checkpoint
from loftq_cli.checkpoint.writer import TensorSpec
from loftq_cli.errors import LoftqError
from loftq_cli.formats.peft_adapter import PREFIX

if TYPE_CHECKING:
    from loftq_cli.targets import Targets

# What the wrappers of peft 0.21 pass beside input_ids, attention_mask and outputs wanted (`peft_model.py`)
PASSED = {
    "CAUSAL_LM": ("inputs_embeds", "labels"),
    "SEQ_2_SEQ_LM": ("inputs_embeds", "labels", "decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds"),
    "SEQ_CLS": ("inputs_embeds", "labels"),
    "TOKEN_CLS": ("inputs_embeds", "labels"),
    "QUESTION_ANS": ("inputs_embeds", "token_type_ids", "position_ids", "start_positions", "end_positions"),
    "FEATURE_EXTRACTION": ("inputs_embeds",),
}
# Ends of the names of modules that it copies by itself
COPIED = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


@dataclass(frozen=True)
class Head:
    """What PEFT does with the model.

    Attributes:
        task_type: None where PEFT must hand all arguments on as they are.
        modules_to_save: modules outside the base model that it is to copy beside those of `COPIED`.
        tensors: of the head that must be in the adapter: tensor name → key of the state dict.
    """

    task_type: str | None
    modules_to_save: tuple[str, ...] = ()
    tensors: Mapping[str, str] = field(default_factory=dict)

    @property
    def note(self) -> str | None:
        """What the user must know of it, or None."""
        names = sorted({key.split(".")[0] for key in self.tensors.values()})
        listed = ", ".join(f"`{name}`" for name in names)
        return f"PEFT trains the head as a whole: a copy of {listed} is in the adapter" if names else None


def choose_head(model: Any, task_type: str | None, keys: Mapping[str, str], linears: Mapping[str, str]) -> Head:
    """The task type if PEFT's wrapper for it fits `model`, and what it needs of the head.

    Args:
        model: on the meta device.
        task_type: what the Auto class suggests.
        keys: tensor name → key of the state dict.
        linears: tensor name → module name of what gets an adapter.
    """
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    if task_type is None or not (takes_any or set(PASSED[task_type]) <= parameters.keys()):
        return Head(None)
    if task_type not in COPIED:
        return Head(task_type)

    names = [name for name, _ in model.named_modules()]
    ends = COPIED[task_type]
    outside = [
        name
        for name, module in model.named_children()
        if model.base_model not in (model, module) and any(True for _ in module.parameters())
    ]
    more = [name for name in outside if not name.endswith(ends) and sum(other.endswith(name) for other in names) == 1]
    copied = [name for name in names if name.endswith((*ends, *more))]
    needed = {key for key in model.state_dict() if any(key.startswith(f"{name}.") for name in copied)}
    tensors = {name: key for name, key in keys.items() if key in needed}
    inside = {module for module in linears.values() if any(f"{module}.".startswith(f"{name}.") for name in copied)}
    if not copied or inside or needed != set(tensors.values()):
        return Head(None)  # it would look for weights that the source does not have, or take away ours
    return Head(task_type, tuple(more), tensors)


def head_layout(checkpoint: Checkpoint, tensors: Mapping[str, str]) -> tuple[TensorSpec, ...]:
    """The tensors of the head (tensor name → key of the state dict) as the adapter holds them."""
    infos = ((checkpoint.tensors[name], adapter_name(key)) for name, key in tensors.items())
    return tuple(TensorSpec(name, info.dtype, info.shape) for info, name in infos)


def adapter_name(key: str) -> str:
    """The name in adapter_model.safetensors of a key of the model's state dict."""
    return f"{PREFIX}{key}"


def with_output_head(targets: Targets, model: str) -> Targets:
    """`targets` with the output head among the linears.

    Raises:
        LoftqError: there is none of its own.
    """
    if targets.output_head is None:
        raise LoftqError(
            f"`--quantize-head`: `{model}` has no output head of its own (as where it is tied to the embeddings)",
            "leave it out",
        )
    tensor, module = targets.output_head
    return replace(
        targets,
        linears={**targets.linears, tensor: module},
        skipped={name: why for name, why in targets.skipped.items() if name != tensor},
        skipped_linears=tuple(name for name in targets.skipped_linears if name != module),
    )
