"""What packed layers share: a weight that stays in packed codes, and reads as a dense one when somebody asks for it.

The layout is that of `loftq_cli.formats.packed`. Shapes: m, n = rows and columns of the weight, G = groups in a row.

This file, and what it imports, also travels inside checkpoints (see `loftq_cli.formats.packed.remote_code`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from loftq_cli.kernels.packed import Packed
from loftq_cli.runtime.scheme import Scheme, keeping_dtypes
from loftq_cli.runtime.unpacking import dequantize


class PackedLayer(nn.Module):
    """A layer with packed codes in place of its weight [m, n]: the base, beside torch's own layer, of packed ones.

    `weight` reads as an ordinary tensor, made when it is used; whoever assigns to it, or to its `data`, as a merge of
    LoRA does, turns this layer into a plain one, of the class `plain`, that holds what was assigned.
    """

    plain: ClassVar[type[nn.Module]]
    shape: tuple[int, int]
    scheme: Scheme
    compute_dtype: torch.dtype  # that of `weight`
    codes: Tensor
    codebook: Tensor
    zero_point: Tensor
    scale: Tensor
    scale_absmax: Tensor
    scale_offset: Tensor

    def make_room(self, m: int, n: int, scheme: Scheme, dtype: torch.dtype) -> None:
        """Begin as a layer whose packed weight is yet to be filled in: for `__init__`, in place of torch's own."""
        nn.Module.__init__(self)  # not that of torch's layer, which would allocate the weight
        self.shape, self.scheme, self.compute_dtype = (m, n), scheme, dtype
        for name, buffer in scheme.empty(m, n).items():
            self.register_buffer(name, buffer)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The dense weight [m, n]: computed in float32, rounded to `dtype`."""
        return dequantize(self.packed(), dtype)

    def packed(self) -> Packed:
        """The tensors, by the names of `formats.packed`."""
        tensors: Any = self._buffers.get  # quicker than attributes of modules: in generation microseconds count
        return self.scheme.packed(*self.shape, tensors)

    @property
    def weight(self) -> Tensor:
        """The dense weight, made when it is used."""
        return _DenseWhenUsed(self)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        self.weight.data = value

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As `nn.Module`, which would find `weight` taken."""
        if name == "weight" and param is not None:
            self.weight.data = param
        else:
            super().register_parameter(name, param)

    def extra_repr(self) -> str:
        """Sizes and scheme."""
        s = self.scheme
        return (
            f"{super().extra_repr()}, bits={s.bits}, group_size={s.group_size}, grid={s.grid}, "
            f"double_quant={s.double_quant}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLayer:
        """Move codes and scales, but never cast them: `to(dtype)` changes what is computed, not what is stored."""
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=self.codes.device)).dtype
        super()._apply(keeping_dtypes(fn, {id(buffer) for buffer in self._buffers.values()}), recurse)
        return self


def become_dense(layer: PackedLayer, weight: Tensor) -> None:
    """Turn `layer` into a plain one with this weight."""
    for name in list(layer._buffers):
        del layer._buffers[name]
    layer.__class__ = layer.plain  # type: ignore[assignment]
    with torch.inference_mode(False):  # whose tensors could not be trained with
        plain = weight.clone() if weight.is_inference() else weight.detach()
        layer.weight = nn.Parameter(plain, requires_grad=False)


class _DenseWhenUsed(Tensor):
    """What `PackedLayer.weight` returns: size, dtype and device are known, the values are made when they are used.

    Whatever writes into it makes the layer dense. Its views (`weight[0]`, `weight.T`) hold values already, which the
    layer would not see changed: writing into them raises.
    """

    layer: PackedLayer
    piece: Tensor | None  # what a view of it sees, else None

    @staticmethod
    def __new__(cls, layer: PackedLayer, piece: Tensor | None = None) -> _DenseWhenUsed:
        made: _DenseWhenUsed = Tensor._make_wrapper_subclass(
            cls,
            layer.shape if piece is None else piece.shape,
            strides=None if piece is None else piece.stride(),
            storage_offset=None if piece is None else piece.storage_offset(),
            dtype=layer.compute_dtype if piece is None else piece.dtype,
            device=layer.codes.device if piece is None else piece.device,
            requires_grad=False,
        )
        made.layer, made.piece = layer, piece
        made._is_hf_initialized = True  # type: ignore[attr-defined]  # for transformers: do not fill it at random
        return made

    def __init__(self, layer: PackedLayer, piece: Tensor | None = None) -> None:
        pass

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute with the dense values; what writes into them makes the layer dense."""
        kwargs = kwargs or {}
        schema = func._schema
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        views = views and isinstance(args[0].layer, PackedLayer)  # else they are views of what it has become
        if views and args[0].piece is None and func is torch.ops.aten.detach.default:
            return cls(args[0].layer)
        values = [args[i] if i < len(args) else kwargs.get(a.name) for i, a in enumerate(schema.arguments)]
        writes = [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments]
        leaves = tree_leaves([value for value, write in zip(values, writes, strict=True) if write])
        written = [leaf for leaf in leaves if isinstance(leaf, cls)]
        if any(weight.piece is not None for weight in written):
            raise RuntimeError(
                f"{func} into a view of a packed weight would be lost: write into a clone, and assign it"
            )
        made: dict[int, Tensor] = {}

        def dense(weight: _DenseWhenUsed) -> Tensor:
            if id(weight) not in made:
                made[id(weight)] = weight._dense()
            return made[id(weight)]

        result = func(*tree_map_only(cls, dense, args), **tree_map_only(cls, dense, kwargs))
        for weight in written:
            weight.data = made[id(weight)]
        return tree_map_only(Tensor, lambda piece: cls(args[0].layer, piece), result) if views else result

    def _dense(self) -> Tensor:
        """The values: of the layer, or of what it has become."""
        if self.piece is not None:
            return self.piece
        layer = self.layer
        return layer.dequantize(self.dtype) if isinstance(layer, PackedLayer) else layer.weight.detach()

    @property
    def data(self) -> Tensor:
        """This tensor, so that what is written into it is not lost."""
        return self

    @data.setter
    def data(self, value: Tensor) -> None:
        if isinstance(value, _DenseWhenUsed):
            if value.layer is self.layer and value.piece is None:  # its own weight: nothing is new
                return
            value = value._dense()
        if self.piece is not None:
            raise RuntimeError("a view of a packed weight cannot be assigned to: assign to the weight")
        if isinstance(self.layer, PackedLayer):
            become_dense(self.layer, value)
        else:
            self.layer.weight.data = value

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """An ordinary tensor, whatever the dtype: a start that works on a copy in float32 gets one in any case."""
        return self._dense().to(*args, **kwargs)

    def numpy(self, *, force: bool = False) -> Any:
        """The values."""
        return self._dense().numpy(force=force)

    def tolist(self) -> Any:
        """The values."""
        return self._dense().tolist()


def _into_layer(operator: str) -> Callable[[_DenseWhenUsed, Any], Tensor]:
    """`w += d` and its like: `w` is then the layer's new weight itself, for whoever puts `w` back into the layer."""
    compute = getattr(Tensor, operator)

    def apply(weight: _DenseWhenUsed, other: Any) -> Tensor:
        result: Tensor = compute(weight, other)
        changed = not isinstance(weight.layer, PackedLayer) and weight.piece is None
        return weight.layer.weight.detach() if changed else result

    return apply


for _operator in ("__iadd__", "__isub__", "__imul__", "__itruediv__"):
    setattr(_DenseWhenUsed, _operator, _into_layer(_operator))
