"""Packed codes to weights on CUDA.

The torch twin is `runtime.unpacking.dequantize`: the same steps and rounding. Shapes: m = out_features, n =
in_features, G = groups in a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loftq_cli.kernels.packed import Packed

try:  # tried, so that transformers does not ask for Triton where it copies this file from a checkpoint
    import triton
    import triton.language as tl
except ImportError:
    raise

VALUES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
RUN = {2: 16, 3: 32, 4: 8, 8: 4}  # codes that begin and end with a word
ROWS, COLUMNS = 8, 512  # of the tile of one program


def unpack_weight(packed: Packed, dtype: torch.dtype) -> Tensor:
    """Return the weight [m, n]: computed in float32, rounded to `dtype`."""
    m, n = packed.shape
    result = torch.empty(m, n, dtype=dtype, device=packed.codes.device)
    blocks, run = triton.cdiv(n, COLUMNS), RUN[packed.bits]
    with torch.cuda.device_of(result):
        unpack_kernel[(blocks * triton.cdiv(m, ROWS),)](
            result, blocks=blocks, **packed.arguments(), VALUES=VALUES[dtype], ROWS=ROWS, RUN=run, RUNS=COLUMNS // run,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return result


@triton.jit
def code_at(pointer, index, mask, BITS: tl.constexpr):
    """Code number `index` of the bit stream there, wherever it is."""
    bit = index * BITS
    word, shift = bit // 32, (bit % 32).to(tl.uint32)
    code = tl.load(pointer + word, mask=mask, other=0).to(tl.uint32, bitcast=True) >> shift
    if 32 % BITS != 0:  # codes may straddle words
        straddles = shift > 32 - BITS
        next_word = tl.load(pointer + word + 1, mask=mask & straddles, other=0).to(tl.uint32, bitcast=True)
        code = code | tl.where(straddles, next_word << ((32 - shift) & 31), 0)
    return (code & (2**BITS - 1)).to(tl.int32)


@triton.jit
def run_of_codes(pointer, run, words, mask, lane, BITS: tl.constexpr):
    """The codes of runs that begin with a word: of 1 word, or at 3 bits of 3, which are loaded once for all of them."""
    if BITS == 3:
        pointer += 3 * run
        left = words - 3 * run
        first = tl.load(pointer, mask=mask, other=0).to(tl.uint32, bitcast=True)
        second = tl.load(pointer + 1, mask=mask & (left > 1), other=0).to(tl.uint32, bitcast=True)
        third = tl.load(pointer + 2, mask=mask & (left > 2), other=0).to(tl.uint32, bitcast=True)
        word, shift = lane * 3 // 32, (lane * 3 % 32).to(tl.uint32)
        low = tl.where(word == 0, first, tl.where(word == 1, second, third))
        high = tl.where(word == 0, second, third)
        code = (low >> shift) | tl.where(shift > 29, high << ((32 - shift) & 31), 0)
    else:
        code = tl.load(pointer + run, mask=mask, other=0).to(tl.uint32, bitcast=True) >> (lane * BITS).to(tl.uint32)
    return (code & (2**BITS - 1)).to(tl.int32)


@triton.jit
def scale_at(group, live, scale, absmax, offset, levels, zero_point, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Scale and zero point of groups, float32."""
    s = tl.load(scale + group, mask=live, other=0)
    if absmax is not None:
        s = tl.load(levels + s.to(tl.int32), mask=live, other=0.0)
        s = s * tl.load(absmax + group // BLOCK, mask=live, other=0.0) + tl.load(offset)
    if zero_point is not None:
        return s.to(tl.float32), code_at(zero_point, group, live, BITS).to(tl.float32)
    else:
        return s.to(tl.float32), tl.full((), 2 ** (BITS - 1), tl.float32)


@triton.jit
def level_of(code, zero, codebook, BITS: tl.constexpr):
    """What codes stand for, in scales."""
    if codebook is None:
        return code.to(tl.float32) - zero
    elif BITS == 2:  # choosing is quicker than looking up
        odd = (code & 1) != 0
        below = tl.where(odd, tl.load(codebook + 1), tl.load(codebook))
        return tl.where(code > 1, tl.where(odd, tl.load(codebook + 3), tl.load(codebook + 2)), below)
    else:
        return tl.load(codebook + code)


@triton.jit
def weights(
    row,  # int64 [ROWS, 1, 1]
    run,  # int32 [1, RUNS, 1]
    lane,  # int32 [1, 1, RUN]
    codes,
    scale,
    absmax,
    offset,
    levels,
    zero_point,
    codebook,
    m,
    n,
    words,
    groups,
    G: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    RUN: tl.constexpr,
    VALUES: tl.constexpr,
):
    """A tile of the weight, float32 [ROWS, RUNS, RUN], rounded to `VALUES`; zero outside.

    A run is the codes of one word (of three at 3 bits). Where groups are made of whole runs, which is the rule, words
    and scales are loaded once for a run.
    """
    column = run * RUN + lane
    inside = (row < m) & (column < n)
    if G % RUN == 0:
        live = (row < m) & (run * RUN < n)
        code = run_of_codes(codes + row * words, run, words, live, lane, BITS)
        group = row * groups + run * RUN // G
    else:
        live = inside
        code = code_at(codes + row * words, column, live, BITS)
        group = row * groups + column // G
    s, zero = scale_at(group, live, scale, absmax, offset, levels, zero_point, BITS, BLOCK)
    value = level_of(code, zero, codebook, BITS)
    return tl.where(inside, (value * s).to(VALUES).to(tl.float32), 0.0)


@triton.jit
def unpack_kernel(
    result, codes, scale, absmax, offset, levels, zero_point, codebook, m, n, words, groups, blocks,
    G: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr, VALUES: tl.constexpr,
    ROWS: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """A tile of `ROWS` times `RUNS` runs."""
    row = (tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None, None]
    run = (tl.program_id(0) % blocks * RUNS + tl.arange(0, RUNS))[None, :, None]
    lane = tl.arange(0, RUN)[None, None, :]
    value = weights(
        row, run, lane, codes, scale, absmax, offset, levels, zero_point, codebook, m, n, words, groups, G, BITS,
        BLOCK, RUN, VALUES,
    )  # fmt: skip
    column = run * RUN + lane
    tl.store(result + row * n + column, value.to(VALUES), mask=(row < m) & (column < n))
