"""A linear layer whose weight stays in packed codes: in memory, in the forward pass and in the backward pass.

The layout is that of `loftq_cli.formats.packed`. Shapes: m = out_features, n = in_features, G = groups in a row.

This file, and what it imports, also travels inside checkpoints (see `loftq_cli.formats.packed.remote_code`).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from loftq_cli.kernels.packed import Packed
from loftq_cli.runtime.scheme import Scheme
from loftq_cli.runtime.unpacking import dequantize, multiply
from loftq_cli.runtime.weight import PackedLayer


class Unpackable(Protocol):
    """What holds one packed weight."""

    def packed(self) -> Packed:
        """Its tensors."""
        ...


class PackedLinear(PackedLayer, nn.Linear):
    """`nn.Linear` with packed codes in place of the weight; frozen, but for the bias."""

    plain = nn.Linear

    def __init__(self, in_features: int, out_features: int, bias: bool, scheme: Scheme, dtype: torch.dtype) -> None:
        self.make_room(out_features, in_features, scheme, dtype)
        self.in_features, self.out_features = in_features, out_features
        nn.Module.register_parameter(
            self, "bias", nn.Parameter(torch.empty(out_features, dtype=dtype)) if bias else None
        )

    def forward(self, input: Tensor) -> Tensor:
        """`input @ weight.T + bias`, in the dtype of `input`."""
        if not isinstance(self, PackedLinear):  # dense by now, and called by who kept this method, as accelerate does
            return nn.functional.linear(input, self.weight, self.bias)
        return product(input, self, self.bias)


class PackedWrapper(nn.Module):
    """A packed layer as a part of another module: PEFT would rewrite a target of that one's name to experts.

    That one keeps the layer's bias, so that its name is the source's. Once the layer is dense, as after a merge, it
    takes the wrapper's place.
    """

    bias: nn.Parameter | None

    def __init__(self, packed: PackedLayer) -> None:
        super().__init__()
        self.register_parameter("bias", packed._parameters.pop("bias"))
        packed.register_parameter("bias", None)
        self.packed = packed

    def __setattr__(self, name: str, value: Any) -> None:
        """As `nn.Module`; a dense layer, such as PEFT puts here after a merge, takes this one's place."""
        super().__setattr__(name, value)
        if name == "packed" and type(value) is PackedLinear.plain:
            value.register_parameter("bias", self.bias)
            self.__dict__, self.__class__ = value.__dict__, type(value)  # type: ignore[assignment]

    def forward(self, input: Tensor) -> Tensor:
        """What the layer makes of it."""
        output: Tensor = self.packed(input)
        return output if self.bias is None else output + self.bias.to(output.dtype)


def product(x: Tensor, layer: Unpackable, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, with gradients of `x` and of the bias."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:  # which autocast leaves alone
        x = x.to(torch.get_autocast_dtype(x.device.type))
    bias = None if bias is None else bias.to(x.dtype)
    trains = x.requires_grad or (bias is not None and bias.requires_grad)
    if not (trains and torch.is_grad_enabled()):
        return multiply(x, layer.packed(), bias)
    packed = layer.packed()
    # flat, for a view that is made within a function of autograd cannot be written into
    output: Tensor = _Product.apply(x.reshape(-1, x.shape[-1]), bias, packed)
    return output.view(*x.shape[:-1], packed.shape[0])


class _Product(torch.autograd.Function):
    """`x @ W.T + bias` with a W that is made, used and dropped in each direction: only codes are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, packed: Packed) -> Tensor:
        ctx.packed = packed  # whatever becomes of the layer until `backward`
        return multiply(x, packed, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        to_x, to_bias, _ = ctx.needs_input_grad
        return (
            gradient @ dequantize(ctx.packed, gradient.dtype) if to_x else None,
            gradient.sum(0) if to_bias else None,
            None,
        )
