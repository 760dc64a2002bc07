"""What layers see and say: the order in which they are called, moments of their inputs, errors of their outputs.

Two copies of a block are compared: the source model's, on its own stream of activations, and the quantized model's, on
what reaches it there. Shapes: m = out_features, n = in_features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from loftq_cli.calibration.stand_in import reached, until_reached
from loftq_cli.calibration.stream import Run

Pair = tuple[Run, Run]  # the same samples in both streams


@dataclass(frozen=True)
class Moments:
    """Per token: gram E[x̂ x̂ᵀ] of the quantized stream, and drift E[(x − x̂) x̂ᵀ] from it to the source's.

    Shapes: float32 [n, n].
    """

    gram: Tensor
    drift: Tensor


def by_input(block: nn.Module, layers: Sequence[str], run: Run) -> list[list[str]]:
    """The linear layers in the order in which they are called, those that share an input together."""
    groups: dict[tuple[int, int, torch.Size], list[str]] = {}
    kept: list[Tensor] = []  # alive, or another input might come to lie where one was

    def note(layer: str, x: Tensor) -> None:
        kept.append(x)
        group = groups.setdefault((x.data_ptr(), x._version, x.shape), [])
        if not any(layer in others for others in groups.values()):
            group.append(layer)

    with _watching(block, layers, note):
        run(block)
    return [group for group in groups.values() if group]


def moments(
    source: nn.Module, block: nn.Module, layer: str, pairs: Iterable[Pair], mean: Callable[[Tensor], None]
) -> Moments:
    """The moments of what enters `layer`, of all processes (`mean`).

    Of tokens that a router chose, in each block for itself, nothing is known of a drift.
    """
    weight = block.get_parameter(f"{layer}.weight")
    sums = torch.zeros(2, weight.shape[1], weight.shape[1], device=weight.device)
    tokens = torch.zeros(1, dtype=torch.float64, device=weight.device)
    for source_run, run in pairs:
        inputs = [_input_of(layer, source, source_run), _input_of(layer, block, run)]
        x, ours = (None if value is None else value.flatten(0, -2) for value in inputs)
        if ours is None:
            continue
        tokens += len(ours)
        add_product(sums[0], ours, ours)
        if x is not None and _are_all(x, run) and _are_all(ours, run):
            add_product(sums[1], x - ours, ours)
    mean(sums)
    mean(tokens)
    return Moments(*sums.div_(tokens.item() or 1))


def add_product(total: Tensor, x: Tensor, y: Tensor) -> None:
    """`total` += xᵀ y, summed in float32: [n, n] from [tokens, n] each.

    A GPU multiplies 16-bit numbers ten times as fast as float32, and just as exactly: their products fit.
    """
    if x.is_cuda and x.dtype != torch.float32:
        total += torch.mm(x.T, y, out_dtype=torch.float32)
    else:
        total.addmm_(x.T.float(), y.float())


@dataclass(frozen=True)
class OutputErrors:
    """‖Y − Ŷ‖_F / ‖Y‖_F of what a layer says, Y in the source's block and Ŷ in the quantized one, on what reaches each.

    Without adapter: without all those of its block.
    """

    without_adapter: float
    with_adapter: float


# of the samples for calibration, and of those held out; None where no token reached the layer, or a router's choice
LayerErrors = tuple[OutputErrors | None, OutputErrors | None]


def row_fields(errors: LayerErrors) -> dict[str, float | None]:
    """The fields of the report that they fill."""
    seen, held_out = errors
    return {
        "output_error": seen.with_adapter if seen else None,
        "output_error_without_adapter": seen.without_adapter if seen else None,
        "held_out_output_error": held_out.with_adapter if held_out else None,
        "held_out_output_error_without_adapter": held_out.without_adapter if held_out else None,
    }


def compare(
    source: nn.Module,
    block: nn.Module,
    bases: Mapping[str, Tensor],
    pairs: Iterable[Pair],
    seen: int,
    hand_on: Callable[[slice, Tensor, Tensor, Tensor], None],
    mean: Callable[[Tensor], None],
) -> dict[str, LayerErrors]:
    """Run both blocks on all samples, and compare what their layers say, of the first `seen` samples and of the others.

    Args:
        source: with the source's weights.
        block: with those that the loaded model will have.
        bases: dequantize(Q) [m, n] of each layer to compare.
        pairs: micro-batches.
        seen: samples that were calibrated on.
        hand_on: gets samples and what is made of them: by `source`, by `block`, and by `block` with `bases`.
        mean: replaces a tensor by its mean over the processes that have other samples.
    """
    plain = {f"{layer}.weight": base.to(block.get_parameter(f"{layer}.weight").dtype) for layer, base in bases.items()}
    sums = {layer: torch.zeros(2, 3, dtype=torch.float64, device=base.device) for layer, base in bases.items()}
    wanted: dict[str, Tensor] = {}
    # DeBERTa calls layers again, for relative positions: the first call counts, as for moments
    compared: set[str] = set()
    unlike: set[str] = set()  # layers to which a router sends tokens: nothing pairs them
    which, column, tokens = 0, 0, 0

    def add(layer: str, said: Tensor) -> None:
        sums[layer][which, column] += said.float().square().sum(dtype=torch.float64)

    def keep(layer: str, said: Tensor) -> None:
        if layer in wanted:
            return
        wanted[layer] = said
        bias = getattr(source.get_submodule(layer), "bias", None)
        add(layer, said if bias is None else said - bias)

    def subtract(layer: str, said: Tensor) -> None:
        if layer in compared:
            return
        compared.add(layer)
        if layer in wanted and all(x.numel() == tokens * x.shape[-1] for x in (wanted[layer], said)):
            add(layer, wanted[layer].view_as(said) - said)
        else:
            unlike.add(layer)

    def without_adapter(*args: Any, **kwargs: Any) -> Any:
        return functional_call(block, plain, args, kwargs)

    layers = list(bases)
    for source_run, run in pairs:
        which, column, tokens = int(run.rows.start >= seen), 0, run.tokens
        wanted.clear()
        with _watching(source, layers, keep, outputs=True):
            whole = source_run(source)
        with _watching(block, layers, subtract, outputs=True):
            column = 1
            compared.clear()
            alone = run(without_adapter)
            column = 2
            compared.clear()
            ours = run(block)
        hand_on(run.rows, whole, ours, alone)
    for layer, total in sums.items():
        total.masked_fill_(torch.tensor(layer in unlike, device=total.device), torch.nan)  # for all processes
        mean(total)
    return {layer: (_errors(total[0]), _errors(total[1])) for layer, total in sums.items()}


def _are_all(x: Tensor, run: Run) -> bool:
    """Whether [tokens, n] are all tokens of the micro-batch, in order, and not a router's choice of them."""
    return len(x) == run.tokens


def _errors(sums: Tensor) -> OutputErrors | None:
    size, without, repaired = sums.tolist()
    known = size > 0 and math.isfinite(without + repaired)  # all may be NaN
    return OutputErrors((without / size) ** 0.5, (repaired / size) ** 0.5) if known else None


@contextmanager
def _watching(
    block: nn.Module, layers: Sequence[str], see: Callable[[str, Tensor], None], *, outputs: bool = False
) -> Iterator[None]:
    """Inside, `see` gets every input of the layers, [..., n], or every output, [..., m]."""

    def hook(layer: str) -> Callable[..., None]:
        if outputs:
            return lambda module, args, out: see(layer, out)
        return lambda module, args: see(layer, args[0])

    modules = [(block.get_submodule(layer), hook(layer)) for layer in layers]
    handles = [
        module.register_forward_hook(call) if outputs else module.register_forward_pre_hook(call)
        for module, call in modules
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _input_of(layer: str, block: nn.Module, run: Run) -> Tensor | None:
    """What enters `layer`, [..., n]; None where nothing does."""
    found: list[Tensor] = []

    def see(_: str, x: Tensor) -> None:
        found.append(x)
        reached()

    with _watching(block, [layer], see), until_reached():
        run(block)
    return found[0] if found else None
