"""What the kernels share: one program's tile of weights, and the low-rank product in it.

A tile is `ROWS` groups, one below the other, in three dimensions: [ROWS, PIECES, WIDTH / PIECES]. Triton 3.6 deals
the first and the last out to the threads, 16 weights of a piece to each, so that a thread has 32 weights of one group.
Flat, as [ROWS, WIDTH], it would have 16 of each of two groups, and what is done once per group and candidate (two
divisions, a square root, sums across threads) would be repeated by twice as many threads.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # weights of one program: 32 a thread
VALUES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def shape_of_tile(g: int) -> dict[str, int]:
    """Return the kernels' `PIECES`, `ROWS` and `WIDTH`, the power of two from `g`."""
    width = triton.next_power_of_2(g)
    return {"PIECES": 2 if width >= 32 else 1, "ROWS": min(128, max(1, TILE // width)), "WIDTH": width}


@functools.cache
def on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return `values` there in float32; kept, for each copy of a list to a GPU waits for it."""
    return torch.tensor(values, dtype=torch.float32, device=device)


@triton.jit
def spread(values):
    """One value per group to a tile: the way back from `group_sum`, for another order of axes moves every value."""
    return values[:, None][:, None, :]


@triton.jit
def group_sum(x):
    """Sum over each group of a tile."""
    return tl.sum(tl.sum(x, 1), 1)


@triton.jit
def place(m, n, g, groups, PIECES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Return rows [ROWS], columns [1, PIECES, L] of the weight and where they lie inside it, the group, the matrix.

    Programs that run side by side share their rows, and with them the rows of lora_B.
    """
    group = tl.program_id(0) % groups
    row = tl.program_id(0) // groups * ROWS + tl.arange(0, ROWS)
    within = tl.arange(0, PIECES)[None, :, None] * (WIDTH // PIECES) + tl.arange(0, WIDTH // PIECES)[None, None, :]
    column = group * g + within
    return row, column, row < m, (within < g) & (column < n), group, tl.program_id(1).to(tl.int64)


@triton.jit
def product(lora_A_pointer, lora_B_pointer, m, n, r, g, group, row, PIECES: tl.constexpr, WIDTH: tl.constexpr):
    """`lora_B @ lora_A` in a tile, all in float32: no TF32 may round it."""
    rank, within = tl.arange(0, 16), tl.arange(0, WIDTH)
    column = group * g + within
    in_columns = (within < g) & (column < n)
    a_pointers = lora_A_pointer + rank[:, None] * n + column[None, :]
    b_pointers = lora_B_pointer + row[:, None] * r + rank[None, :]
    total = tl.zeros((row.shape[0], WIDTH), tl.float32)
    for done in range(0, r, 16):
        a = tl.load(a_pointers + done * n, mask=(rank < r - done)[:, None] & in_columns[None, :], other=0.0)
        b = tl.load(b_pointers + done, mask=(row < m)[:, None] & (rank < r - done)[None, :], other=0.0)
        total = tl.dot(b, a, total, input_precision="ieee")
    return total.reshape(row.shape[0], PIECES, WIDTH // PIECES)
