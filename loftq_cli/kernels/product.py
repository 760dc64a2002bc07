"""Products of packed weights with few inputs on CUDA, as in generation: no weight is made at all.

The torch twin is `runtime.unpacking.dequantize` and a product. Shapes: m = out_features, n = in_features, G = groups in
a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loftq_cli.kernels.packed import Packed
from loftq_cli.kernels.unpack import RUN, VALUES, scale_at, unpack_weight

try:  # tried, as in unpack.py
    import triton
    import triton.language as tl
except ImportError:
    raise

ROWS, COLUMNS, WARPS = 8, {2: 4096, 3: 2048, 4: 2048, 8: 1024}, 4  # of the tile of one program, at a time
MOST_INPUTS = 3  # of a product: with more, unpacking first is quicker
POINTERS = [
    "result", "x", "bias", "codes", "scale", "absmax", "offset", "levels", "zero_point", "codebook",
]  # fmt: skip


def inverse_vandermonde(count: int) -> tuple[float, ...]:
    """Of values at -count / 2, 1 - count / 2, …, `count` of them: from them to their polynomial, row by row."""
    places = torch.arange(-count // 2, count // 2, dtype=torch.float64)
    return tuple(torch.linalg.inv(torch.vander(places, increasing=True)).flatten().tolist())


INVERSE_4, INVERSE_8 = tl.constexpr(inverse_vandermonde(4)), tl.constexpr(inverse_vandermonde(8))
_compiled: dict[tuple[Any, ...], Any] = {}  # the kernel that multiplies, by all that it depends on


def multiply(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """Return `x @ weight.T + bias` [..., m] for `x` [..., n], at most `MOST_INPUTS` rows of it, computed in float32.

    For 16-bit `x` a level of 3 bits is off by less than 1e-4 of the largest, which is less than a weight's rounding is.
    """
    (m, n), run = packed.shape, RUN[packed.bits]
    if packed.group_size % run and packed.group_size < n:  # a run would lie in several groups
        return torch.nn.functional.linear(x, unpack_weight(packed, x.dtype), bias)
    x = x.contiguous()
    result = torch.empty(*x.shape[:-1], m, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(m, ROWS), x.numel() // n, 1)
    sizes = run, VALUES[x.dtype], ROWS, COLUMNS[packed.bits] // run
    arguments = (result, x, bias, *packed.arguments().values(), *sizes)
    with torch.cuda.device_of(x):
        if not isinstance(multiply_kernel, triton.JITFunction) or torch.compiler.is_compiling():
            multiply_kernel[grid](*arguments, num_warps=WARPS)
            return result
        # finding the compiled kernel anew takes Triton longer than many a product takes the GPU
        key = (x.device, x.dtype, None if bias is None else bias.dtype, packed.shape, packed.kind)
        if (compiled := _compiled.get(key)) is None:
            _compiled[key] = multiply_kernel[grid](*arguments, num_warps=WARPS)
        else:
            compiled[grid](*arguments)
    return result


@triton.jit
def window_of(first, second, third, j: tl.constexpr, BITS: tl.constexpr, WINDOW: tl.constexpr):
    """The bits of `WINDOW` codes of a run of these words, code number `j` among them, in the low bits."""
    begin: tl.constexpr = j // WINDOW * WINDOW * BITS
    shift: tl.constexpr = begin % 32
    if begin // 32 == 0:
        low, high = first, second
    elif begin // 32 == 1:
        low, high = second, third
    else:
        low, high = third, third
    low = low >> shift
    if shift + WINDOW * BITS > 32:
        low |= high << (32 - shift)
    return low


@triton.jit
def code_in_run(first, second, third, magic, j: tl.constexpr, BITS: tl.constexpr):
    """Code number `j` of a run of these words, less 2**(BITS - 1), float32.

    Its bits, put into those of 2**23 as a float, `magic`, make 2**23 + code · 2**place: one operation to do that, and
    one to take it apart.
    """
    WINDOW: tl.constexpr = 4 if BITS == 3 else 16 // BITS  # their bits stay below number 23
    place: tl.constexpr = j % WINDOW * BITS
    bits = window_of(first, second, third, j, BITS, WINDOW) & ((2**BITS - 1) << place)
    return tl.fma((bits | magic).to(tl.float32, bitcast=True), 0.5**place, -(2.0 ** (23 - place)) - 2 ** (BITS - 1))


@triton.jit
def coefficient(levels, j: tl.constexpr):
    """Of t**j in the polynomial through 4 or 8 levels at t = -2 … 1 or -4 … 3."""
    INVERSE: tl.constexpr = INVERSE_4 if len(levels) == 4 else INVERSE_8
    found = levels[0] * INVERSE[j * len(levels)]
    for k in tl.static_range(1, len(levels)):
        found += levels[k] * INVERSE[j * len(levels) + k]
    return found


@triton.jit
def curve(codebook, BITS: tl.constexpr):
    """The polynomial through the levels of 2 or 3 bits: evaluating it is quicker than looking levels up."""
    a, b, c, d = tl.load(codebook), tl.load(codebook + 1), tl.load(codebook + 2), tl.load(codebook + 3)
    if BITS == 2:
        v = (a, b, c, d)
        return coefficient(v, 0), coefficient(v, 1), coefficient(v, 2), coefficient(v, 3)
    else:
        w = (
            a, b, c, d,
            tl.load(codebook + 4), tl.load(codebook + 5), tl.load(codebook + 6), tl.load(codebook + 7),
        )  # fmt: skip
        return (
            coefficient(w, 0), coefficient(w, 1), coefficient(w, 2), coefficient(w, 3),
            coefficient(w, 4), coefficient(w, 5), coefficient(w, 6), coefficient(w, 7),
        )  # fmt: skip


@triton.jit
def at(polynomial, t):
    """Its value at `t`, by Horner's rule."""
    value = tl.full(t.shape, 0.0, tl.float32) + polynomial[len(polynomial) - 1]
    for j in tl.static_range(2, len(polynomial) + 1):
        value = tl.fma(value, t, polynomial[len(polynomial) - j] + tl.zeros_like(t))
    return value


@triton.jit(do_not_specialize=["words"], do_not_specialize_on_alignment=POINTERS)
def multiply_kernel(
    result, x, bias, codes, scale, absmax, offset, levels, zero_point, codebook, m, n, words, groups,
    G: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr, VALUES: tl.constexpr,
    ROWS: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """`ROWS` outputs of one input. A run lies in one group and is summed before its scale: no weight is made at all."""
    first, number = tl.program_id(0) * ROWS, tl.program_id(1)
    row = (first + tl.arange(0, ROWS)).to(tl.int64)[None, :]
    x += number.to(tl.int64) * n
    CURVE: tl.constexpr = BITS == 2 or (BITS == 3 and not VALUES.is_fp32())
    if codebook is not None and CURVE:
        polynomial = curve(codebook, BITS)
    magic = (0x4B000000 | (words >> 31)).to(tl.uint32)  # 2**23; as a constant it would need an operation of its own
    total = tl.zeros((RUNS, ROWS), tl.float32)
    for start in range(0, tl.cdiv(n, RUN), RUNS):
        run = (start + tl.arange(0, RUNS))[:, None]
        live = (row < m) & (run * RUN < n)
        begin = run * (RUN * BITS // 32)
        word = codes + row * words + begin
        one = tl.load(word, mask=live, other=0).to(tl.uint32, bitcast=True)
        two, three = one, one
        if BITS == 3:
            two = tl.load(word + 1, mask=live & (begin + 1 < words), other=0).to(tl.uint32, bitcast=True)
            three = tl.load(word + 2, mask=live & (begin + 2 < words), other=0).to(tl.uint32, bitcast=True)
        group = row * groups + run * RUN // G
        s, zero = scale_at(group, live, scale, absmax, offset, levels, zero_point, BITS, BLOCK)
        some = tl.zeros((RUNS, ROWS), tl.float32)
        inputs = tl.zeros((RUNS, 1), tl.float32)
        for j in tl.static_range(RUN):
            column = run * RUN + j
            value = tl.load(x + column, mask=column < n, other=0.0).to(tl.float32)
            if codebook is None:
                some += code_in_run(one, two, three, magic, j, BITS) * value
                inputs += value
            elif CURVE:
                some += at(polynomial, code_in_run(one, two, three, magic, j, BITS)) * value
            else:
                code = window_of(one, two, three, j, BITS, 1) & (2**BITS - 1)
                some += tl.load(codebook + code) * value
        if zero_point is not None:
            some += (2 ** (BITS - 1) - zero) * inputs
        total += tl.where(live, some * s, 0.0)
    output = first + tl.arange(0, ROWS)
    outputs = tl.sum(total, 0)
    if bias is not None:
        outputs += tl.load(bias + output, mask=output < m, other=0.0).to(tl.float32)
    tl.store(result + number * m + output, outputs.to(VALUES), mask=output < m)
