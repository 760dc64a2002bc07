"""What `loftq inspect --html` writes: one page that needs nothing else, from a report or a plan alone."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from rich.filesize import decimal as size

from loftq_cli.config import CALIBRATED
from loftq_cli.jobs import BLOCK
from loftq_cli.report import block_order, error_columns, in_figures, layer_groups, pooled_errors, skip_counts, trained

Rows = Sequence[Mapping[str, Any]]
Cell = tuple[float | None, str, str]  # how dark from 0 to 1, what it says, what it says when pointed at


def page(told: Mapping[str, Any]) -> str:
    """HTML of a report, or of a plan's summary (`report.plan_summary`), which has no errors."""
    rows, config, totals = told["weights"], told["config"], told["totals"]
    measured = "relative_error" in totals
    fields = error_columns(config) if measured else {}
    name = escape(told["source"]["model"].rstrip("/").rpartition("/")[2])
    what = "quantized" if measured else "plan"
    of = "what layers say" if config["method"] in CALIBRATED else "weights"
    maps = {f"error of {of}: {head}": _errors(rows, field) for head, field in fields.items()}
    maps["bits"] = _bits(rows)
    maps["parameters"] = _parameters(rows)
    note = trained(told) if measured else None
    return PAGE.format(
        title=f"{name}, {what}",
        choices=CHOICES,
        facts="".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in _facts(told)),
        note=f"<p>{escape(note)}</p>" if note else "",
        maps=_tabs(maps, rows),
        layers=_layers(rows, fields, totals),
        skipped=_table(("reason", "tensors", "e.g."), [(r, f"{n:,}", e) for r, n, e in skip_counts(told["skipped"])]),
        version=escape(told["version"]),
        fingerprint=escape(told["source"]["fingerprint"]),
    )


def _facts(told: Mapping[str, Any]) -> list[tuple[str, str]]:
    totals, config = told["totals"], told["config"]
    facts = [
        ("method", f"{config['method']}, rank {config['rank']}"),
        ("quantizer", f"{config['quantizer']}, group {config['group_size']}"),
        ("format", config["format"]),
        ("bits per weight", f"{totals['bits_per_weight']:.2f}"),
        ("weights", f"{totals['weights']:,}"),
        ("parameters in them", f"{totals['parameters']:,}"),
        ("source", size(totals["source_bytes"])),
        ("base", size(totals["base_bytes"])),
        ("adapter", size(totals["adapter_bytes"])),
    ]
    if "relative_error" in totals:
        before, after = in_figures((totals["relative_error_without_adapter"], totals["relative_error"]))
        facts.append(("error of weights, base alone → base + adapter", f"{before} → {after}"))
    return facts


def _places(rows: Rows) -> tuple[list[str], list[str], dict[tuple[str, str], list[Mapping[str, Any]]]]:
    """Lines (transformer blocks, and what is in none), columns (names within them), and the rows of each place."""
    places: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        block = BLOCK.match(row["name"])
        line = block[0] if block else ""
        column = re.sub(r"\.\d+(?=\.|$)", ".*", row["name"][len(line) :].lstrip("."))  # experts share theirs
        places.setdefault((line, column), []).append(row)
    lines = sorted({line for line, _ in places}, key=block_order)
    return lines, list(dict.fromkeys(column for _, column in places)), places


def _errors(rows: Rows, field: str) -> Callable[[Rows], Cell]:
    """Cells of the pooled error, dark where it is large: on a logarithmic scale from the least to the largest."""
    logs = [math.log(row[field]) for row in rows if row.get(field)]
    low, high = (min(logs), max(logs)) if logs else (0.0, 0.0)

    def cell(there: Rows) -> Cell:
        error = pooled_errors(there, [field])[0]
        if not error:
            return None, "–" if error is None else "0", ""
        return (math.log(error) - low) / (high - low or 1), f"{error:.3f}", f"{error:.6f}"

    return cell


def _bits(rows: Rows) -> Callable[[Rows], Cell]:
    def cell(there: Rows) -> Cell:
        bits = sorted({row["bits"] for row in there})
        return bits[-1] / 10, "/".join(map(str, bits)), f"{', '.join(map(str, bits))} bits"

    return cell


def _parameters(rows: Rows) -> Callable[[Rows], Cell]:
    largest = max((count for there in _places(rows)[2].values() if (count := _count(there))), default=1)

    def cell(there: Rows) -> Cell:
        count = _count(there)
        return count / largest, f"{count / 1e6:.3g}M", f"{count:,} in {len(there)} of {there[0]['shape']}"

    return cell


def _count(rows: Rows) -> int:
    return sum(math.prod(row["shape"]) for row in rows)


def _tabs(maps: Mapping[str, Callable[[Rows], Cell]], rows: Rows) -> str:
    """The maps one above the other, of which style sheets show the chosen one: without a script."""
    inputs, labels, panels = [], [], []
    shown = list(maps)[1 if len(maps) > 2 else 0]  # base + adapter, or what a plan has
    for number, (head, cell) in enumerate(maps.items()):
        checked = " checked" if head == shown else ""
        inputs.append(f'<input type="radio" name="map" id="map{number}"{checked}>')
        labels.append(f'<label for="map{number}">{escape(head)}</label>')
        panels.append(f'<div class="panel">{_map(rows, cell)}</div>')
    return f'<div class="tabs">{"".join(inputs)}<nav>{"".join(labels)}</nav>{"".join(panels)}</div>'


def _map(rows: Rows, cell: Callable[[Rows], Cell]) -> str:
    lines, columns, places = _places(rows)
    head = "".join(f'<th scope="col"><span>{escape(column)}</span></th>' for column in columns)
    body = []
    for line in lines:
        cells = []
        for column in columns:
            if not (there := places.get((line, column))):
                cells.append("<td></td>")
                continue
            dark, text, more = cell(there)
            name = escape(f"{line}.{column}".lstrip("."), quote=True)
            style = "" if dark is None else f' style="--dark:{min(1.0, max(0.0, dark)):.3f}"'
            kind = "" if dark is None else f' class="heat{" deep" if dark > 0.55 else ""}"'
            cells.append(f'<td{kind}{style} title="{name}: {escape(more, quote=True)}">{escape(text)}</td>')
        body.append(f'<tr><th scope="row">{escape(line) or "in no block"}</th>{"".join(cells)}</tr>')
    return f'<table class="map"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'


def _layers(rows: Rows, fields: Mapping[str, str], totals: Mapping[str, Any]) -> str:
    groups = layer_groups(rows, fields.values())
    lines = [(g.kind, str(g.weights), g.shapes, f"{g.parameters:,}", g.bits, *in_figures(g.errors)) for g in groups]
    every = in_figures(pooled_errors(rows, fields.values()))
    lines.append(
        ("all", str(totals["weights"]), "", f"{totals['parameters']:,}", f"{totals['bits_per_weight']:.2f}", *every)
    )
    return _table(("layers", "weights", "shape", "parameters", "bits", *fields), lines)


def _table(heads: Iterable[str], lines: Iterable[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    body = "".join(f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in line)}</tr>" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


MOST_MAPS = 6  # four errors, bits, parameters
CHOICES = "\n".join(
    f".tabs input:nth-of-type({n}):checked ~ .panel:nth-of-type({n}) {{ display: block }}\n"
    f".tabs input:nth-of-type({n}):checked ~ nav label:nth-of-type({n})"
    " { background: var(--ink); color: var(--paper) }\n"
    f".tabs input:nth-of-type({n}):focus-visible ~ nav label:nth-of-type({n}) {{ outline: 2px solid var(--soft) }}"
    for n in range(1, MOST_MAPS + 1)
)
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #1e293b; --soft: #64748b; --line: #e2e8f0; --paper: #fff; --hot: 37 99 235 }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e2e8f0; --soft: #94a3b8; --line: #334155; --paper: #0f172a; --hot: 96 165 250 }}
}}
body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  margin: 2rem auto; padding: 0 1.5rem; max-width: 76rem }}
h1 {{ font-size: 1.5rem; margin: 0 0 1rem }}
h2 {{ font-size: 1.1rem; margin: 2rem 0 .5rem }}
dl {{ display: flex; flex-wrap: wrap; gap: .75rem 2rem; margin: 0 }}
dt {{ color: var(--soft); font-size: .8rem }}
dd {{ margin: 0; font-weight: 600; font-variant-numeric: tabular-nums }}
.panel, .wide {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }}
th {{ font-weight: 600; color: var(--soft) }}
th:first-child, td:first-child {{ text-align: left }}
.map td {{ border: 1px solid var(--paper); font-size: .8rem; text-align: center }}
.map th {{ border: 0; font-size: .8rem; font-weight: 500 }}
.heat {{ background: rgb(var(--hot) / calc(.06 + .94 * var(--dark))) }}
.deep {{ color: var(--paper) }}
.tabs input {{ position: absolute; opacity: 0 }}
.tabs nav {{ display: flex; flex-wrap: wrap; gap: .4rem; margin: .5rem 0 .75rem }}
.tabs label {{ padding: .2rem .7rem; border: 1px solid var(--line); border-radius: 1rem; cursor: pointer;
  font-size: .85rem }}
.panel {{ display: none }}
{choices}
footer {{ color: var(--soft); font-size: .8rem; margin-top: 2.5rem; overflow-wrap: anywhere }}
</style>
<h1>{title}</h1>
<dl>{facts}</dl>
{note}
<h2>Layer by layer</h2>
{maps}
<h2>By kind of layer</h2>
<div class="wide">{layers}</div>
<h2>Kept as they are</h2>
<div class="wide">{skipped}</div>
<footer>loftq {version} · source {fingerprint}</footer>
</html>
"""
