"""Write tests/golden/algorithms.json: one number per algorithm, from references that share no code with loftq.

Everything here is plain numpy in float64, slow and obvious. The tests also use the functions directly.
Run `python scripts/make_golden.py` after a deliberate change of an algorithm, and say why in the commit.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

Array = NDArray[np.float64]


def gaussian(m: int, n: int, seed: int = 0) -> Array:
    """Float32 numbers that no library update will change."""
    return np.random.RandomState(seed).standard_normal((m, n)).astype(np.float32).astype(np.float64)


def fp16(scale: Array) -> Array:
    with np.errstate(over="ignore"):
        rounded = scale.astype(np.float16).astype(np.float64)
    return np.where(np.abs(rounded) < 2.0**-24, 2.0**-24, rounded)


def on_grid(w: Array, scale: Array, zero_point: Array, bits: int) -> Array:
    """Dequantized values of the rows of `w` [groups, g], for one scale and zero point a row."""
    codes = np.clip(np.rint(w / scale[:, None] + zero_point[:, None]), 0, 2**bits - 1)
    return (codes - zero_point[:, None]) * scale[:, None]


def min_max(w: Array, bits: int) -> Array:
    """Round to nearest on the grid that covers each row and zero."""
    low, high = np.minimum(w.min(1), 0), np.maximum(w.max(1), 0)
    scale = fp16((high - low) / (2**bits - 1))
    return on_grid(w, scale, np.clip(np.rint(-low / scale), 0, 2**bits - 1), bits)


def grid_search(w: Array, bits: int, symmetric: bool = False, steps: int = 300) -> Array:
    """The best of every zero point and `steps` scales up to the covering one, for each row of `w` [groups, g]."""
    top, half = 2**bits - 1, 2 ** (bits - 1)
    reach = np.abs(w).max(1) / (half - 1) if symmetric else (np.maximum(w.max(1), 0) - np.minimum(w.min(1), 0)) / top
    best, least = np.zeros_like(w), np.full(len(w), np.inf)
    for zero_point in [half] if symmetric else range(top + 1):
        for share in np.linspace(0.02, 1.05, steps):
            for sign in (1, -1) if symmetric else (1,):
                values = on_grid(w, fp16(sign * share * reach), np.full(len(w), float(zero_point)), bits)
                error = ((values - w) ** 2).sum(1)
                best = np.where((error < least)[:, None], values, best)
                least = np.minimum(error, least)
    return best


def normal_float_levels(bits: int) -> Array:
    """The construction of QLoRA and LoftQ, with scipy."""
    half = 2 ** (bits - 1)
    above = norm.ppf(np.linspace(0.9677083, 0.5, half + 1)[:-1])
    below = -norm.ppf(np.linspace(0.9677083, 0.5, half)[:-1])
    levels = np.sort(np.concatenate([above, [0.0], below]))
    return levels / levels.max()


def normal_float(W: Array, bits: int, block: int = 64) -> Array:
    """Dequantized NormalFloat by exhaustive comparison with every level; the size must be a multiple of `block`."""
    blocks = W.reshape(-1, block)
    absmax = np.abs(blocks).max(1, keepdims=True)
    levels = normal_float_levels(bits)
    nearest = np.abs(blocks[..., None] / absmax[..., None] - levels).argmin(-1)
    return (levels[nearest] * absmax).reshape(W.shape)


def truncated(residual: Array, rank: int) -> Array:
    u, s, vt = np.linalg.svd(residual, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def loftq_errors(W: Array, fake_quantize: Callable[[Array], Array], rank: int, iters: int) -> list[float]:
    """LoftQ's algorithm 1 with a full singular value decomposition; the relative error after each alternation."""
    product, errors = np.zeros_like(W), []
    for _ in range(iters):
        quantized = fake_quantize(W - product)
        product = truncated(W - quantized, rank)
        errors.append(float(np.linalg.norm(W - quantized - product) / np.linalg.norm(W)))
    return errors


def golden() -> dict[str, float]:
    W, small = gaussian(256, 384), gaussian(64, 64)

    def share(values: Array, w: Array) -> float:
        return float(((values - w) ** 2).sum() / (w**2).sum())

    return {
        **{f"nf{bits}": share(normal_float(W, bits), W) for bits in (2, 3, 4)},
        **{f"uniform{bits}": share(grid_search(small, bits), small) for bits in (2, 3, 4)},
        **{f"uniform-symmetric{bits}": share(grid_search(small, bits, symmetric=True), small) for bits in (2, 3, 4)},
        "top_r": share(truncated(W, 16), W),
        "loftq": min(loftq_errors(W, lambda x: normal_float(x, 4), 16, 5)),
        "qlora": share(normal_float(W, 4), W) ** 0.5,
    }


if __name__ == "__main__":
    path = Path(__file__).parent.parent / "tests" / "golden" / "algorithms.json"
    path.write_text(json.dumps({name: round(value, 8) for name, value in golden().items()}, indent=2) + "\n")
    print(path.read_text())
