"""What an output holds for a row of its report: the weight as its loader makes it, and its factors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loftq_cli.checkpoint.reader import TensorInfo, lookup, read_header, read_tensor
from loftq_cli.errors import LoftqError
from loftq_cli.formats import make_quantizer, peft_adapter
from loftq_cli.formats.base import Format, Place, from_store, to_store
from loftq_cli.plan import ADAPTER_FILE
from loftq_cli.quantizers.base import QuantizedWeight

KEPT = 4  # tensors with the factors of many matrices, whose rows follow each other

TUNED = "base + trained adapter"  # what `eval` calls a base with what has been fine-tuned on it


class Factors:
    """The factors of rows of a report, from the files of `out` whose tensors are `infos`."""

    def __init__(self, out: Path, infos: dict[str, TensorInfo]) -> None:
        self._out, self._infos = out, infos
        self._whole: dict[str, Tensor] = {}

    def of(self, row: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """lora_A [r, n] and lora_B [m, r], with their stored values, of a row that has an adapter.

        Raises:
            LoftqError: one of them is in no file.
        """
        first, second = self.stored(row)
        return peft_adapter.of_embedding(first, second) if "embedding" in row else (first, second)

    def stored(self, row: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The tensors that `factor_names` names.

        Raises:
            LoftqError: see `of`.
        """
        if "stacked" not in row:
            name_A, name_B = factor_names(row)
            return stored_tensor(self._out, self._infos, name_A), stored_tensor(self._out, self._infos, name_B)
        place = peft_adapter.StackedFactors(**row["stacked"])
        return place.views(self._read(place.lora_A), self._read(place.lora_B))

    def product(self, row: dict[str, Any], scaling: float) -> Tensor:
        """What the adapter adds to the weight of a row: float32 [m, n], zero where it has none.

        Raises:
            LoftqError: see `of`.
        """
        if row["rank"] == 0:
            return torch.zeros(row["shape"])
        lora_A, lora_B = peft_adapter.applied_factors(*self.of(row), scaling)
        return lora_B @ lora_A

    def _read(self, name: str) -> Tensor:
        if name not in self._whole:
            while len(self._whole) >= KEPT:
                del self._whole[next(iter(self._whole))]
            self._whole[name] = stored_tensor(self._out, self._infos, name)
        return self._whole[name]


def factor_names(row: dict[str, Any]) -> tuple[str, str]:
    """The names of the factors of a row of the report, as they are stored."""
    return peft_adapter.tensor_names(peft_adapter.loaded_name(row["name"], "wrapped" in row), "embedding" in row)


def place_of(row: dict[str, Any]) -> Place:
    """Where the source has the weight of a row of the report, from which follow the names of its stored tensors."""
    return Place(row["tensor"], row.get("transposed", False), "expert" in row, "wrapped" in row)


def stored_weight(
    out: Path,
    stored: dict[str, TensorInfo],
    output: Format,
    row: dict[str, Any],
    config: dict[str, Any],
) -> Tensor:
    """The weight of a row of the report, dequantized from its stored tensors, float32 [m, n]."""
    like = stored_like(output, row, config)
    place = place_of(row)
    tensors = {name: stored_tensor(out, stored, name) for name in to_store(output, place, like)}
    return from_store(output, place, tensors, like)


def stored_like(output: Format, row: dict[str, Any], config: dict[str, Any]) -> QuantizedWeight:
    """The quantized form of the weight of a row of the report, on the meta device."""
    dtype, double_quant = getattr(torch, row["dtype"]), config["double_quant"]
    quantizer = make_quantizer(output, row["quantizer"], row["bits"], row["group_size"], dtype, double_quant)
    return quantizer.empty(*row["shape"])


def stored_tensor(out: Path, infos: dict[str, TensorInfo], name: str) -> Tensor:
    """One tensor of an output, by its name.

    Raises:
        LoftqError: it is in no file.
    """
    if (info := lookup(infos, name)) is None:
        raise LoftqError(f"`{name}` is missing from the files")
    return read_tensor(out / info.file, info)


def read_tuned(out: Path, tuned: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """The configuration and the tensors of an adapter that was trained from that of `out`, as PEFT saved it.

    There may be more tensors than that one has: a head that was trained, DoRA's magnitudes.

    Raises:
        LoftqError: it is no such adapter.
    """
    written = "give the folder that PEFT's `save_pretrained` wrote, of the adapter that `loftq_init` was trained to"
    try:
        config: dict[str, Any] = json.loads((tuned / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoftqError(f"`{tuned}` has no adapter_config.json that can be read: {error}", written) from error
    name = Path(ADAPTER_FILE).name
    if not (tuned / name).is_file():
        raise LoftqError(f"`{tuned}` has no `{name}`", written)
    trained = read_header(tuned / name, name).tensors
    for tensor, info in sorted(read_header(out / ADAPTER_FILE, ADAPTER_FILE).tensors.items()):
        if tensor not in trained or trained[tensor].shape != info.shape:
            found = f"`{tensor}` " + ("is of another shape there" if tensor in trained else "is not in it")
            raise LoftqError(f"`{tuned}` did not begin as the adapter of `{out}`: {found}", written)
    return config, trained
