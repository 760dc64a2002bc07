"""Curves of the training loss as SVG, written by hand: a panel for each task, bits and rank, a line for each arm.

Arms are those of the table that are trained, each with its own learning rate.
"""

from __future__ import annotations

import math
from html import escape
from pathlib import Path
from typing import Any

from finetune_results import BITS_ORDER, FULL, Results
from finetune_train import CURVE

WIDTH, HEIGHT, LEFT, TOP, LEGEND = 380, 230, 56, 34, 190  # of a panel, its margins, and what names the lines
COLORS = (
    "#000000", "#999999", "#d55e00", "#e69f00", "#8c564b", "#009e73", "#56b4e9", "#0072b2", "#cc79a7", "#7a3db8",
    "#b8b800", "#1b9e77", "#e7298a", "#66a61e", "#a6761d", "#1f78b4", "#fb9a99", "#c7a76c",
)  # fmt: skip
TITLES = {"headlines": "headlines", "austen": "Austen"}


def curves(results: Results, bits: str, rank: int, task: str) -> dict[str, list[float]]:
    """Of each arm the mean over its seeds, up to where one of them went astray."""
    found = {}
    shown = [row for row in results.published() if row["rank"] == rank]
    if not any(row["bits"] == bits for row in shown):
        return {}
    for arm in dict.fromkeys(row["arm"] for row in shown if row["bits"] in (bits, "16")):
        runs = results.chosen(arm=arm, bits="16" if arm == FULL else bits, rank=rank, task=task)
        points = []
        for column in zip(*(run["curve"] for run in runs), strict=True):
            if None in column:
                break
            points.append(sum(column) / len(column))
        if points:
            found[arm] = points
    return found


def panel(lines: dict[str, list[float]], colors: dict[str, str], title: str, x: int, y: int) -> list[str]:
    """Loss on a logarithmic axis over training steps."""
    every = [max(value, 1e-4) for points in lines.values() for value in points]
    low, high = math.log(min(every)), math.log(max(every))
    high = max(high, low + 0.1)
    longest = max(map(len, lines.values()))
    inner_width, inner_height = WIDTH - LEFT - 12, HEIGHT - TOP - 34

    def at(position: float, value: float) -> str:
        along = LEFT + inner_width * (position + 0.5) / longest
        down = TOP + inner_height * (high - math.log(max(value, 1e-4))) / (high - low)
        return f"{x + along:.1f},{y + down:.1f}"

    svg = [f'<text x="{x + LEFT}" y="{y + 20}" font-weight="bold">{escape(title)}</text>']
    svg.append(
        f'<rect x="{x + LEFT}" y="{y + TOP}" width="{inner_width}" height="{inner_height}" fill="none" stroke="#888"/>'
    )
    for number in range(5):
        value = math.exp(low + (high - low) * number / 4)
        _, down = at(0, value).split(",")
        svg.append(f'<text x="{x + LEFT - 5}" y="{float(down) + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for part, anchor in ((0, "start"), (1, "end")):
        along = x + LEFT + part * inner_width
        svg.append(
            f'<text x="{along}" y="{y + HEIGHT - 18}" text-anchor="{anchor}">{part * longest * CURVE}'
            f"{' steps' if part else ''}</text>"
        )
    for arm, points in lines.items():
        places = " ".join(at(position, value) for position, value in enumerate(points))
        width = 2.2 if arm == FULL else 1.3
        svg.append(f'<polyline points="{places}" fill="none" stroke="{colors[arm]}" stroke-width="{width}"/>')
    return svg


def plot(results: Results, file: Path) -> bool:
    """Write `file`; False where there is nothing to draw."""
    panels: list[tuple[str, int, dict[str, dict[str, list[float]]]]] = []
    for rank in sorted({base["rank"] for base in results.bases}):
        for bits in reversed(BITS_ORDER[1:]):
            tasks = {task: curves(results, bits, rank, task) for task in TITLES}
            if any(tasks.values()):
                panels.append((bits, rank, tasks))
    if not panels:
        return False
    arms = dict.fromkeys(arm for _, _, tasks in panels for lines in tasks.values() for arm in lines)
    colors = {arm: COLORS[number % len(COLORS)] for number, arm in enumerate(sorted(arms, key=lambda a: a != FULL))}
    size = len(TITLES) * WIDTH + LEGEND, len(panels) * HEIGHT + 10
    svg: list[Any] = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" width="{size[0]}" '
        f'height="{size[1]}" font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="#fff"/>'
    ]
    for row, (bits, rank, tasks) in enumerate(panels):
        y = row * HEIGHT
        for column, (task, lines) in enumerate(tasks.items()):
            if lines:
                title = f"{TITLES[task]}, {bits} bits, rank {rank}: training loss"
                svg += panel(lines, colors, title, column * WIDTH, y)
        for number, arm in enumerate(dict.fromkeys(arm for lines in tasks.values() for arm in lines)):
            x, down = len(TITLES) * WIDTH + 8, y + TOP + 8 + 15 * number
            svg.append(f'<path d="M{x} {down}h18" stroke="{colors[arm]}" stroke-width="3"/>')
            svg.append(f'<text x="{x + 24}" y="{down + 4}">{escape(arm)}</text>')
    file.write_text("\n".join([*svg, "</svg>", ""]), encoding="utf-8")
    return True
