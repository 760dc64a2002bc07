"""How a weight is packed, and the tensors that this takes: those of `loftq_cli.formats.packed`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from loftq_cli.kernels.packed import Packed
from loftq_cli.quantizers.nested import NESTED_BLOCK, dynamic_codebook


@dataclass(frozen=True)
class Scheme:
    """How a weight is packed.

    Args:
        bits: 2, 3, 4 or 8.
        group_size: inputs that share a scale; -1 for a whole row.
        grid: `affine` (a zero point per group), `symmetric` (zero point 2**(bits - 1)) or `codebook`.
        double_quant: the scales are 8-bit codes.
    """

    bits: int
    group_size: int
    grid: str
    double_quant: bool = False

    def __post_init__(self) -> None:
        """Refuse what a config.json may say and no weight can be.

        Raises:
            ValueError: there is no such group size.
        """
        if self.group_size < 1 and self.group_size != -1:
            raise ValueError(f"there is no group size {self.group_size}")

    def group(self, n: int) -> int:
        """Inputs that share a scale, of `n`."""
        return n if self.group_size == -1 else self.group_size

    def empty(self, m: int, n: int) -> dict[str, Tensor]:
        """Room for the tensors of a weight [m, n], by their names."""
        groups = math.ceil(n / self.group(n))
        found = {"codes": torch.empty(m, math.ceil(n * self.bits / 32), dtype=torch.int32)}
        if self.grid == "codebook":
            found["codebook"] = torch.empty(2**self.bits, dtype=torch.float32)
        if self.grid == "affine":
            found["zero_point"] = torch.empty(math.ceil(m * groups * self.bits / 32), dtype=torch.int32)
        found["scale"] = torch.empty(m, groups, dtype=torch.uint8 if self.double_quant else torch.float16)
        if self.double_quant:
            found["scale_absmax"] = torch.empty(math.ceil(m * groups / NESTED_BLOCK), dtype=torch.float32)
            found["scale_offset"] = torch.empty(1, dtype=torch.float32)
        return found

    def packed(self, m: int, n: int, get: Callable[[str], Tensor]) -> Packed:
        """The weight [m, n] whose tensors `get` returns by their names."""
        scale = get("scale")
        return Packed(
            shape=(m, n),
            bits=self.bits,
            group_size=self.group(n),
            codes=get("codes"),
            scale=scale,
            absmax=get("scale_absmax") if self.double_quant else None,
            offset=get("scale_offset") if self.double_quant else None,
            levels=dynamic_codebook(scale.device) if self.double_quant else None,
            zero_point=get("zero_point") if self.grid == "affine" else None,
            codebook=get("codebook") if self.grid == "codebook" else None,
        )


def keeping_dtypes(fn: Callable[[Tensor], Tensor], own: set[int]) -> Callable[[Tensor], Tensor]:
    """`fn`, which moves or casts tensors, but for a change of dtype of those with these ids."""

    def keep(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        return tensor.to(moved.device) if id(tensor) in own and moved.dtype != tensor.dtype else moved

    return keep
