"""The errors of a model's layers as a small SVG, from its report alone: the same report, the same bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

from loftq_cli.jobs import BLOCK
from loftq_cli.report import block_order, error_columns, pooled_errors

WIDTH, HEIGHT = 720, 276
LEFT, RIGHT, TOP, BOTTOM = 68, 12, 40, 50  # margins
COLOURS = ("#9aa5b1", "#2563eb")  # the base alone, with its adapter
STEPS = (1, 2, 2.5, 5, 10)


def error_chart(report: Mapping[str, Any]) -> str:
    """Two bars for every transformer block, or for every weight outside one: of the base alone, and with its adapter.

    The errors are those of the card's table: of weights, or where a method looks at text, of what layers say.
    """
    heads = list(error_columns(report["config"]).items())[:2]
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in report["weights"]:
        block = BLOCK.match(row["name"])
        groups.setdefault(block[0] if block else row["name"], []).append(row)
    names = sorted(groups, key=block_order)
    fields = [field for _, field in heads]
    values = [[error or 0.0 for error in pooled_errors(groups[name], fields)] for name in names]
    of = "weights" if "output" not in fields[0] else "outputs"
    title = f"Relative error of {of} by block"
    return _svg(title, [head for head, _ in heads], names, values)


def _svg(title: str, heads: Sequence[str], names: Sequence[str], values: Sequence[Sequence[float]]) -> str:
    highest = max((value for pair in values for value in pair), default=0.0) or 1.0
    step = _step(highest)
    top = step * -(-highest // step)
    inner_width, inner_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    room = inner_width / max(1, len(names))
    bar = room * 0.38

    def y(value: float) -> float:
        return TOP + inner_height * (1 - value / top)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="system-ui, sans-serif" font-size="12" fill="#334155" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="22" font-weight="600">{escape(title)}</text>',
    ]
    for number, head in enumerate(heads):
        begin = WIDTH - RIGHT - 120 * (len(heads) - number)
        parts.append(f'<rect x="{begin}" y="13" width="10" height="10" fill="{COLOURS[number]}"/>')
        parts.append(f'<text x="{begin + 15}" y="22">{escape(head)}</text>')
    for line in range(round(top / step) + 1):
        height = y(line * step)
        parts.append(f'<path d="M{LEFT} {height:.1f}H{WIDTH - RIGHT}" stroke="#e2e8f0"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{height + 4:.1f}" text-anchor="end">{line * step:.3g}</text>')
    middle = TOP + inner_height / 2
    parts.append(f'<text transform="translate(18 {middle:.0f}) rotate(-90)" text-anchor="middle">relative error</text>')
    parts.append(
        f'<text x="{LEFT + inner_width / 2:.0f}" y="{HEIGHT - 9}" text-anchor="middle">transformer block</text>'
    )
    every = -(-len(names) // 16)  # labels that find room
    for place, (name, pair) in enumerate(zip(names, values, strict=True)):
        middle = LEFT + room * (place + 0.5)
        parts.append(f"<g><title>{escape(name)}: {', '.join(f'{value:.4f}' for value in pair)}</title>")
        for number, value in enumerate(pair):
            x, height = middle + bar * (number - len(pair) / 2), inner_height * value / top
            size = f'width="{bar:.2f}" height="{height:.2f}"'
            parts.append(f'<rect x="{x:.2f}" y="{y(value):.2f}" {size} fill="{COLOURS[number]}"/>')
        parts.append("</g>")
        if place % every == 0:
            parts.append(f'<text x="{middle:.1f}" y="{HEIGHT - 30}" text-anchor="middle">{escape(_short(name))}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _step(highest: float) -> float:
    """A round distance of lines, of which four or so reach `highest`."""
    power = 10.0 ** int(f"{highest / 4:e}".partition("e")[2])
    return next(step * power for step in STEPS if step * power >= highest / 4)


def _short(name: str) -> str:
    """The number of a block, or the last part of a module's name."""
    return name.rstrip(".").rpartition(".")[2]
