"""A packed weight as the kernels, and their torch twin, take it."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

NESTED_BLOCK = 256  # scales per scale of scales


class Packed(NamedTuple):  # made in every forward pass, so that a dataclass would take its time
    """The tensors of `formats.packed`, those that the weight has: `W ≈ codebook[codes] · scale`, or without a codebook
    `(codes − zero_point) · scale`, where a missing zero point is 2**(bits − 1).

    Shapes: codes int32 [m, words]; scale float16 [m, G], or uint8 [m, G] with absmax float32
    [ceil(m G / NESTED_BLOCK)], offset float32 [1] and levels float32 [256]; zero_point int32 [ceil(m G bits / 32)];
    codebook float32 [2**bits].
    """

    shape: tuple[int, int]
    bits: int
    group_size: int
    codes: Tensor
    scale: Tensor
    absmax: Tensor | None = None
    offset: Tensor | None = None
    levels: Tensor | None = None
    zero_point: Tensor | None = None
    codebook: Tensor | None = None

    def arguments(self) -> dict[str, Any]:
        """All of it, by the names of the kernels' arguments."""
        m, n = self.shape
        return {
            "codes": self.codes, "scale": self.scale, "absmax": self.absmax, "offset": self.offset,
            "levels": self.levels, "zero_point": self.zero_point, "codebook": self.codebook,
            "m": m, "n": n, "words": self.codes.shape[1], "groups": self.scale.shape[1],
            "G": self.group_size, "BITS": self.bits, "BLOCK": NESTED_BLOCK,
        }  # fmt: skip

    @property
    def kind(self) -> tuple[Any, ...]:
        """What kernels are compiled for, beside sizes: bits and groups, and which tensors there are, in which dtype."""
        optional = (self.absmax, self.offset, self.zero_point, self.codebook)
        dtypes = [None if tensor is None else tensor.dtype for tensor in optional]
        return self.bits, self.group_size, self.scale.dtype, *dtypes
