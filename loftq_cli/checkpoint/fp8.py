"""fp8 checkpoints (DeepSeek's layout): weights float8 with a scale per block, dequantized piece by piece on read.

A weight `x` lies beside `x_scale_inv`, one float32 (or power of two, as float8_e8m0 or uint8) per block of its last two
dimensions, a last block perhaps short, or one for all of it: `W = x.float() * scale` (as `Fp8Dequantize` of
transformers has it, in float32, rounded once to the dtype of the model).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from loftq_cli.checkpoint.reader import TensorInfo, read_at, read_tensor
from loftq_cli.errors import LoftqError

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# What transformers takes for the scales of `x.weight`, and scales of activations, which no weight needs.
SCALES = ("{weight}_scale_inv", "{module}.scale", "{module}.qscale_weight")
UNUSED = ("{module}.activation_scale", "{module}.input_scale", "{module}.qscale_act")
STEP_ELEMENTS = 1 << 20  # dequantized at once, in float32


class Place(Protocol):
    """Where the files of a checkpoint are."""

    def path(self, file: str) -> Path:
        """The local path of one of them."""
        ...


@dataclass(frozen=True)
class Scaled:
    """A dequantized tensor [..., m, n], read from `codes` [..., m, n] and `scale`, one for each block [bm, bn]."""

    codes: TensorInfo
    scale: TensorInfo
    block: tuple[int, int]
    dtype: torch.dtype
    place: Place

    def read_at(self, descriptor: int, view: memoryview, path: Path, info: TensorInfo, begin: int) -> None:
        """Fill `view` from byte `begin` on of the dequantized tensor, or slice of it, `info`; of the codes' file.

        Raises:
            LoftqError: a file cannot be read, or ends too early.
        """
        if not len(view):  # torch takes no empty buffer
            return
        target = torch.frombuffer(view, dtype=self.dtype)
        first = (info.offset - self.codes.offset + begin) // self.dtype.itemsize
        end = first + len(target)
        scale = self._scales()
        for start in range(first, end, STEP_ELEMENTS):
            stop = min(start + STEP_ELEMENTS, end)
            raw = torch.empty(stop - start, dtype=torch.uint8)
            read_at(descriptor, raw.numpy().data, path, self.codes, start)
            values = raw.view(self.codes.dtype).float() * self._expanded(scale, start, stop)
            target[start - first : stop - first] = values.to(self.dtype)

    def _scales(self) -> Tensor:
        """Float32 [matrices · block rows, block columns]."""
        stored = read_tensor(self.place.path(self.scale.file), self.scale)
        values = (stored.float() - 127).exp2() if stored.dtype == torch.uint8 else stored.float()
        return values.reshape(-1, -(-self.codes.shape[-1] // self.block[1]))

    def _expanded(self, scale: Tensor, start: int, stop: int) -> Tensor:
        """The scale of each element from `start` to `stop` of the flattened tensor."""
        (m, n), (bm, bn) = self.codes.shape[-2:], self.block
        rows = torch.arange(start // n, -(-stop // n))
        lines = rows // m * -(-m // bm) + rows % m // bm
        return scale[lines].repeat_interleave(bn, 1)[:, :n].flatten()[start % n : start % n + stop - start]


def is_fp8(config: Mapping[str, Any]) -> bool:
    """Whether the `quantization_config` of a checkpoint is that of this layout."""
    return config.get("quant_method") == "fp8"


def fold_scales(
    place: Place, config: dict[str, Any], tensors: dict[str, TensorInfo]
) -> tuple[dict[str, Any], dict[str, TensorInfo], str | None]:
    """What an fp8 checkpoint is once dequantized: its config, its tensors, and a sentence that says so.

    Any other checkpoint comes back as it is.

    Raises:
        LoftqError: a weight without a scale, or a scale that fits no weight; names the tensor.
    """
    entry = next((found for part in _parts(config) if is_fp8(found := _entry(part))), None)
    if entry is None:
        return config, tensors, None
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    for key, value in plain.items():
        if isinstance(value, dict) and is_fp8(_entry(value)):
            plain[key] = {name: part for name, part in value.items() if name != "quantization_config"}
    text = config.get("text_config") or {}
    named = getattr(torch, str(next(filter(None, _dtypes(config, text)), "bfloat16")), None)
    dtype = named if named in FLOATS else torch.bfloat16

    folded, used = dict(tensors), 0
    for name, info in tensors.items():
        if info.dtype not in FP8:
            continue
        names = {"weight": name, "module": name.removesuffix(".weight")}
        scale = next((tensors[key] for row in SCALES if (key := row.format(**names)) in tensors), None)
        if scale is None:
            raise LoftqError(f"`{name}` in `{info.file}` is fp8 and has no `{name}_scale_inv` beside it", _HINT)
        block = _block(info, scale, entry.get("weight_block_size"))
        decoder = Scaled(replace(info, shape=_as_matrix(info.shape)), scale, block, dtype, place)
        nbytes = math.prod(info.shape) * dtype.itemsize
        folded[name] = replace(info, dtype=dtype, nbytes=nbytes, decoder=decoder)
        folded.pop(scale.name, None)
        for row in UNUSED:
            folded.pop(row.format(**names), None)
        used += 1
    if lost := next((name for name in folded if name.endswith("_scale_inv")), None):
        raise LoftqError(f"`{lost}` in `{folded[lost].file}` is the scale of no fp8 weight", _HINT)
    sentence = f"{used} fp8 weights of the source are dequantized to {str(dtype).removeprefix('torch.')} on reading"
    return plain, folded, sentence if used else None


_HINT = "download or copy the checkpoint again; or dequantize it with the tool that made it"


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [config, *(value for value in config.values() if isinstance(value, dict))]


def _entry(part: Mapping[str, Any]) -> Mapping[str, Any]:
    entry = part.get("quantization_config")
    return entry if isinstance(entry, dict) else {}


def _dtypes(*parts: Any) -> list[Any]:
    return [part.get(key) for part in parts if isinstance(part, dict) for key in ("dtype", "torch_dtype")]


def _as_matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    """That of a vector or a number as one of a matrix of one row, and any other as it is."""
    return (1,) * (2 - len(shape)) + shape


def _block(info: TensorInfo, scale: TensorInfo, named: Any) -> tuple[int, int]:
    """The block [bm, bn] that one scale is for: the config's where it fits, else what both shapes say."""
    shape, grid = _as_matrix(info.shape), _as_matrix(scale.shape)
    m, n = shape[-2:]
    if math.prod(grid) == 1 and len(shape) == 2:
        return m, n
    match named:
        case [int(bm), int(bn)] if bm > 0 and bn > 0 and grid == (*shape[:-2], -(-m // bm), -(-n // bn)):
            return bm, bn
    if len(grid) == len(shape) and grid[:-2] == shape[:-2] and 0 not in grid and not (m % grid[-2] or n % grid[-1]):
        return m // grid[-2], n // grid[-1]
    raise LoftqError(
        f"`{scale.name}` {list(scale.shape)} in `{scale.file}` fits no blocks {named} of "
        f"`{info.name}` {list(info.shape)}",
        _HINT,
    )
