"""Which tensors hold the matrices of experts: one of each expert on disk, or one of all, for one parameter in memory.

transformers has the experts of a layer in modules with parameters [experts, m, n], or [experts, n, m] where they are
`is_transposed`, and makes these while loading: it stacks the tensors of the experts, and concatenates those of the two
projections that see the same input. Whatever the files hold, a job is the matrix of one expert in one of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from loftq_cli.agreement import HINT
from loftq_cli.checkpoint.reader import TensorInfo
from loftq_cli.errors import LoftqError
from loftq_cli.formats.base import Place
from loftq_cli.meta_model import renamed_keys

OF_ONE = re.compile(r"(?:.*\.)?experts\.(\d+)\.(\w+)\.weight")  # the tensor of one expert: its number, its name
PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
STACKS, JOINS, TURNS, TURNS_IF_NEEDED = "MergeModulelist 0", "Concatenate 1", "Transpose 1 2", "Transpose 1 2 if needed"
TRANSPOSED = ("Llama4TextExperts",)  # modules [experts, n, m] that do not say so


@dataclass(frozen=True)
class ExpertStack:
    """A parameter that holds a matrix of every expert.

    Attributes:
        module: the experts' module in the loaded model.
        parameter: its name in that module.
        pieces: what the matrices are made of, one on top of the other: names of the source, e.g. `w1` and `w3`.
        count: of experts.
        transposed: it is [experts, n, m].
        standard: the module computes as `integrations/moe.py` of transformers has it, so that another can stand in, and
            `from_pretrained` finds the tensors of single experts in it, by names made of those in the source.
    """

    module: str
    parameter: str
    pieces: tuple[str, ...]
    count: int
    transposed: bool
    standard: bool


@dataclass(frozen=True)
class ExpertSlot:
    """The place of one matrix: which expert's, and which piece of it."""

    stack: ExpertStack
    expert: int
    piece: str
    transposed: bool  # in the file

    @property
    def name(self) -> str:
        """A module name for it, which no module has: the expert's number stands in it."""
        return f"{self.stack.module}.{self.expert}.{self.piece}"


def find_experts(
    tensors: Mapping[str, TensorInfo], renamed: Mapping[str, tuple[str, str | None]], model: Any
) -> dict[str, ExpertSlot]:
    """Find the matrices of experts: names of tensors, or of slices of them (`name[3]`), and their places.

    Args:
        tensors: of the checkpoint.
        renamed: the key in the model's state dict of each, and the pattern of the converter that makes it, if any.
        model: as transformers builds it, on the meta device.

    Raises:
        LoftqError: tensors of experts are of another shape than the model's, or too many, or missing, or some are no
            floats; names one.
    """
    converters = {
        pattern: Making(position, tuple(map(_told, converter.operations)), tuple(converter.source_patterns))
        for converter in _converters(model)
        for position, pattern in enumerate(converter.source_patterns)
    }
    stacks = {name: p for name, p in model.named_parameters() if p.ndim == 3 and name.rpartition(".")[2] in PARAMETERS}
    members: dict[str, dict[str, Making]] = {}
    for name, (key, pattern) in renamed.items():
        if key in stacks:
            members.setdefault(key, {})[name] = Making(0) if pattern is None else converters[pattern]
    found: dict[str, ExpertSlot] = {}
    for key in stacks:  # in the order in which the model has them
        if (makings := members.get(key)) is None:
            continue
        module, _, parameter = key.rpartition(".")
        owner, shape = model.get_submodule(module), tuple(stacks[key].shape)
        standard = hasattr(owner, "is_transposed")
        infos = [tensors[name] for name in makings]
        floats = [info for info in infos if info.dtype in FLOATS]
        if floats and (standard or type(owner).__name__ in TRANSPOSED):
            _refuse_dtypes(infos, floats)
            turned = bool(getattr(owner, "is_transposed", True))
            stack = ExpertStack(module, parameter, (parameter,), shape[0], turned, standard)
            found |= _of_all(stack, infos, makings, shape) or _one_by_one(stack, infos, makings, shape)
    return _checked(found, model)


@dataclass(frozen=True)
class Making:
    """What transformers makes of a tensor while loading: steps (see `_told`), with it in this place of `patterns`."""

    position: int
    steps: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()


def _of_all(
    stack: ExpertStack, infos: Sequence[TensorInfo], makings: Mapping[str, Making], shape: tuple[int, ...]
) -> dict[str, ExpertSlot]:
    """The places of the slices of a tensor that is the parameter, or its transpose; none if it is made otherwise.

    Raises:
        LoftqError: it is of another shape.
    """
    steps, stored = makings[infos[0].name].steps, infos[0].shape
    turns = steps == (TURNS,) or (steps == (TURNS_IF_NEEDED,) and stored != shape)
    if steps not in ((), (TURNS,), (TURNS_IF_NEEDED,)) or len(infos) > 1:
        return {}
    if stored != (wanted := (shape[0], shape[2], shape[1]) if turns else shape):
        raise _another_shape(infos[0], wanted if steps != (TURNS_IF_NEEDED,) else shape)
    slot = ExpertSlot(stack, 0, stack.parameter, stack.transposed != turns)
    return {f"{infos[0].name}[{number}]": replace(slot, expert=number) for number in range(stack.count)}


def _one_by_one(
    stack: ExpertStack, infos: Sequence[TensorInfo], makings: Mapping[str, Making], shape: tuple[int, ...]
) -> dict[str, ExpertSlot]:
    """The places of tensors that each hold a piece [m, n] of one expert; none if they are made otherwise.

    Raises:
        LoftqError: one is of another shape, or of an expert that the model does not have, or missing.
    """
    if stack.transposed or {making.steps[:1] for making in makings.values()} != {(STACKS,)}:
        return {}
    if any(making.steps[1:] not in ((), (JOINS,)) for making in makings.values()):
        return {}
    names: dict[int, str] = {}
    there: dict[tuple[int, int], TensorInfo] = {}
    for info in infos:
        match, position = OF_ONE.fullmatch(info.name), makings[info.name].position
        if match is None or names.setdefault(position, match[2]) != match[2]:
            return {}
        there[int(match[1]), position] = info
    patterns = makings[infos[0].name].patterns
    pieces = len(patterns)
    if shape[1] % pieces:
        return {}
    for (number, _), info in there.items():
        if number >= stack.count:
            what = f"`{info.name}` in `{info.file}` is of expert {number}, the model that config.json describes has"
            raise LoftqError(f"{what} {stack.count}", HINT)
        if info.shape != (wanted := (shape[1] // pieces, shape[2])):
            raise _another_shape(info, wanted)
    if len(there) < stack.count * pieces:
        number, position = next(key for key in product(range(stack.count), range(pieces)) if key not in there)
        where, name = infos[0].name.rpartition("experts.")[0], patterns[position].split(".")[-2]
        what = f"{where}experts.{number}.{names.get(position, name)}.weight"
        raise LoftqError(f"`{what}` is in none of the files, and `{infos[0].name}` is", HINT)
    stack = replace(stack, pieces=tuple(names[position] for position in sorted(names)))
    return {
        info.name: ExpertSlot(stack, number, names[position], transposed=False)
        for (number, position), info in sorted(there.items(), key=lambda item: item[0])
    }


def _another_shape(info: TensorInfo, wanted: tuple[int, ...]) -> LoftqError:
    found = f"`{info.name}` in `{info.file}` has shape {list(info.shape)}"
    return LoftqError(f"{found}, the model that config.json describes {list(wanted)}", HINT)


def _refuse_dtypes(infos: Sequence[TensorInfo], floats: Sequence[TensorInfo]) -> None:
    """Refuse experts some of which can be quantized, and some not: a layer has all its experts in bits, or none."""
    if other := next((info for info in infos if info.dtype not in FLOATS), None):
        kinds = [str(info.dtype).removeprefix("torch.") for info in (other, floats[0])]
        raise LoftqError(
            f"`{other.name}` in `{other.file}` is stored as {kinds[0]}, and `{floats[0].name}` of the same experts as "
            f"{kinds[1]}",
            f"store it as one of {', '.join(str(kind).removeprefix('torch.') for kind in FLOATS)}",
        )


def _checked(found: dict[str, ExpertSlot], model: Any) -> dict[str, ExpertSlot]:
    """The same, `standard` only where `from_pretrained` would find what single experts are packed in."""
    one_of_each = {(slot.stack, slot.piece): tensor for tensor, slot in found.items()}
    wanted = {f"{Place(tensor, is_expert=True).prefix}_": f"{found[tensor].name}_" for tensor in one_of_each.values()}
    keys = renamed_keys(wanted, model, wanted.values())
    lost = {name for stored, name in wanted.items() if keys[stored] != (name, None)}
    modules = {slot.stack.module for tensor, slot in found.items() if f"{slot.name}_" in lost}
    return {
        tensor: replace(slot, stack=replace(slot.stack, standard=False)) if slot.stack.module in modules else slot
        for tensor, slot in found.items()
    }


def by_parameter(experts: Mapping[str, ExpertSlot]) -> dict[str, dict[str, ExpertSlot]]:
    """The matrices of each parameter, by its name in the model."""
    found: dict[str, dict[str, ExpertSlot]] = {}
    for tensor, slot in experts.items():
        found.setdefault(f"{slot.stack.module}.{slot.stack.parameter}", {})[tensor] = slot
    return found


def stacked(slots: Mapping[str, ExpertSlot], read: Callable[[str], Tensor]) -> Tensor:
    """A parameter, [experts, m, n] or [experts, n, m], of matrices that `read` returns, by their tensors, as [m, n]."""
    whole: Tensor | None = None
    for tensor, slot in slots.items():
        W, stack = read(tensor), slot.stack
        rows, place = len(W), stack.pieces.index(slot.piece)
        if whole is None:
            whole = W.new_empty(stack.count, rows * len(stack.pieces), W.shape[1])
        whole = whole.to(torch.promote_types(whole.dtype, W.dtype))  # the same, where all have one dtype
        whole[slot.expert, place * rows : (place + 1) * rows] = W
    assert whole is not None
    return whole.mT.contiguous() if stack.transposed else whole


def _told(step: Any) -> str:
    """What a step of transformers does, and along which dimensions."""
    dimensions = [str(getattr(step, name)) for name in ("dim", "dim0", "dim1") if hasattr(step, name)]
    needed = ["if needed"] if getattr(step, "check_dims", False) else []  # where shapes differ otherwise
    return " ".join([type(step).__name__, *dimensions, *needed])


def _converters(model: Any) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    return [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightConverter)]
