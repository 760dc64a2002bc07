"""Experts whose matrices stay in packed codes: unpacked are those that tokens chose, one matrix at a time.

transformers keeps the experts of a layer in one module with parameters [experts, ...], and computes with them as
`integrations/moe.py` has it (5.17 to 5.23). Here that module keeps its class, its biases and its activation; in place
of those parameters it has a submodule for each expert, called by its number, with the packed tensors as buffers.

This file also travels inside checkpoints (see `loftq_cli.formats.packed.remote_code`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loftq_cli.kernels.packed import Packed
from loftq_cli.runtime.layer import product
from loftq_cli.runtime.scheme import Scheme, keeping_dtypes
from loftq_cli.runtime.unpacking import dequantize

Pieces = dict[str, tuple[str, ...]]  # of each parameter: what its matrices are made of, one on top of the other


class PackedExpert(nn.Module):
    """The matrices of one expert: tensors `w1_codes`, `w1_scale` and so on.

    Args:
        shapes: [m, n] of each matrix, by its name.
        schemes: how each is packed.
    """

    def __init__(self, shapes: dict[str, tuple[int, int]], schemes: dict[str, Scheme]) -> None:
        super().__init__()
        self.shapes, self.schemes = shapes, schemes
        for piece, (m, n) in shapes.items():
            for key, buffer in schemes[piece].empty(m, n).items():
                self.register_buffer(f"{piece}_{key}", buffer)

    def packed(self, piece: str) -> Packed:
        """One matrix."""
        tensors: Any = self._buffers.get
        return self.schemes[piece].packed(*self.shapes[piece], lambda key: tensors(f"{piece}_{key}"))

    def forward(self, x: Tensor, pieces: tuple[str, ...]) -> Tensor:
        """`x @ W.T`, W being these matrices one on top of the other."""
        parts = [product(x, _Matrix(self, piece)) for piece in pieces]
        return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]

    def extra_repr(self) -> str:
        """Sizes and schemes."""
        return ", ".join(f"{piece}={list(shape)} {self.schemes[piece]}" for piece, shape in self.shapes.items())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedExpert:
        """Move codes and scales, but never cast them."""
        super()._apply(keeping_dtypes(fn, {id(buffer) for buffer in self._buffers.values()}), recurse)
        return self


@dataclass(frozen=True)
class _Matrix:
    """One matrix of one expert, unpacked when it is needed: in forward, and again in backward."""

    expert: PackedExpert
    piece: str

    def packed(self) -> Packed:
        return self.expert.packed(self.piece)


class PackedExperts(nn.Module):
    """What a module of experts becomes: of its own class, and of this one, which is asked first."""

    pieces: Pieces
    compute_dtype: torch.dtype  # of the parameters that the packed tensors stand for
    num_experts: int
    is_transposed: bool
    _apply_gate: Callable[[Tensor], Tensor]
    act_fn: nn.Module
    post_expert_norm: nn.Module

    def expert(self, number: int) -> PackedExpert:
        """One of them."""
        found = self._modules[str(number)]
        assert isinstance(found, PackedExpert)
        return found

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Each token through the experts that it chose: hidden states [T, h], choices and their weights [T, k]."""
        tokens, k = top_k_index.shape
        chosen, order = torch.sort(top_k_index.reshape(-1), stable=True)
        counts = torch.bincount(chosen).tolist()
        inputs = hidden_states[order // k].split(counts)
        made = torch.cat([self._through(number, x) for number, x in enumerate(inputs) if len(x)])
        made = made * top_k_weights.reshape(-1)[order, None]
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return made[back].view(tokens, k, -1).sum(1).to(hidden_states.dtype)

    def _through(self, number: int, x: Tensor) -> Tensor:
        expert, first = self.expert(number), next(name for name in self.pieces if name != "down_proj")
        x = self._biased(expert(x, self.pieces[first]), first, number)
        x = self._apply_gate(x) if getattr(self, "has_gate", True) else self.act_fn(x)
        x = self._biased(expert(x, self.pieces["down_proj"]), "down_proj", number)
        return self.post_expert_norm(x) if getattr(self, "has_post_expert_norm", False) else x

    def _biased(self, x: Tensor, parameter: str, number: int) -> Tensor:
        return x + getattr(self, f"{parameter}_bias")[number].to(x.dtype) if getattr(self, "has_bias", False) else x

    def dequantize(self, parameter: str, dtype: torch.dtype) -> Tensor:
        """A parameter as it would be without packing: [experts, m, n], or [experts, n, m]."""
        whole: Tensor | None = None
        for number in range(self.num_experts):
            expert = self.expert(number)
            W = torch.cat([dequantize(expert.packed(piece), dtype) for piece in self.pieces[parameter]])
            W = W.T if self.is_transposed else W
            whole = W.new_empty(self.num_experts, *W.shape) if whole is None else whole
            whole[number] = W
        assert whole is not None
        return whole

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedExperts:
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        super()._apply(fn, recurse)
        return self

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """For copies and pickles: the class is made when it is needed, and has no name of its own to be found by."""
        return _empty, (type(self).__bases__[1],), self.__dict__


_classes: dict[type, type[PackedExperts]] = {}


def _packed_class(kind: type[nn.Module]) -> type[PackedExperts]:
    if kind not in _classes:
        _classes[kind] = type(f"Packed{kind.__name__}", (PackedExperts, kind), {})
    return _classes[kind]


def _empty(kind: type[nn.Module]) -> PackedExperts:
    made = _packed_class(kind)
    return made.__new__(made)


def pack_experts(module: nn.Module, pieces: Pieces, scheme: Callable[[int, str], Scheme]) -> None:
    """Turn a module of experts into one with room for packed matrices, on the device of its parameters.

    Args:
        module: as transformers builds it.
        pieces: see `Pieces`.
        scheme: of an expert's matrix, by their number and name.

    Raises:
        ValueError: the module is not one that can be packed.
    """
    shapes: dict[str, tuple[int, int]] = {}
    for parameter, names in pieces.items():
        stack = getattr(module, parameter, None)
        if not hasattr(module, "is_transposed") or not isinstance(stack, nn.Parameter) or stack.ndim != 3:
            raise ValueError(f"`{parameter}` is packed in the checkpoint, and not in {type(module).__name__}")
        count, m, n = (stack.mT if module.is_transposed else stack).shape
        shapes |= dict.fromkeys(names, (m // len(names), n))
        dtype, device = stack.dtype, stack.device
        module.register_parameter(parameter, None)
    module.__class__ = _packed_class(type(module))
    assert isinstance(module, PackedExperts)
    module.pieces, module.compute_dtype, module.num_experts = pieces, dtype, count
    for number in range(count):
        with device:
            expert = PackedExpert(shapes, {piece: scheme(number, piece) for piece in shapes})
        module.add_module(str(number), expert)
    module._is_hf_initialized = True  # type: ignore[assignment]  # for transformers: do not fill it at random


def unpack_experts(module: PackedExperts, dtype: torch.dtype) -> None:
    """Turn a packed module back into one of its own class, with dense parameters."""
    stacks = {parameter: module.dequantize(parameter, dtype) for parameter in module.pieces}
    for number in range(module.num_experts):
        delattr(module, str(number))
    module.__class__ = type(module).__bases__[1]
    for parameter, stack in stacks.items():
        module.register_parameter(parameter, nn.Parameter(stack, requires_grad=False))


def packed_pieces(module: PackedExperts) -> dict[str, Scheme]:
    """The scheme of each matrix, by `3.w1`, or by `*.w1` where all experts have the same."""
    found: dict[str, Scheme] = {}
    for names in module.pieces.values():
        for piece in names:
            schemes = [module.expert(number).schemes[piece] for number in range(module.num_experts)]
            if len(set(schemes)) == 1:
                found[f"*.{piece}"] = schemes[0]
            else:
                found |= {f"{number}.{piece}": scheme for number, scheme in enumerate(schemes)}
    return found
