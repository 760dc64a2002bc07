"""README.md of the output: a model card."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loftq_cli.config import CALIBRATED
from loftq_cli.plan import Plan
from loftq_cli.report import (
    about_experts,
    base_fingerprint,
    error_columns,
    in_figures,
    install_line,
    layer_groups,
    load_lines,
    pooled_errors,
    skip_counts,
    trained,
)

MEANING = {
    "weight": "`‖W − Ŵ‖ / ‖W‖` (Frobenius), pooled over the weights of a kind, of the base alone and with the adapter.",
    "output": "`‖Y − Ŷ‖ / ‖Y‖` (Frobenius) of what layers say in the source and here, root mean square over the layers "
    "of a kind: without the adapters of their block and with all adapters; on the text that was calibrated on, and on "
    "text held out.",
}
SETTINGS = (
    "method", "bits", "quantizer", "group_size", "format", "rank", "alpha", "rslora", "iters", "adapter_dtype", "seed",
)  # fmt: skip


def model_card(plan: Plan, report: Mapping[str, Any]) -> str:
    """README.md of the output: how to load, what was measured, with which settings."""
    totals, config = report["totals"], report["config"]
    name = Path(report["source"]["model"]).resolve().name
    hub_id = "" if Path(report["source"]["model"]).is_dir() else f"base_model: {report['source']['model']}\n"
    columns = error_columns(config)
    rows = "\n".join(
        f"| `{group.kind}` | {group.weights} | {group.bits} | " + _cells(group.errors)
        for group in layer_groups(report["weights"], columns.values())
    )
    every = _cells(pooled_errors(report["weights"], columns.values()))
    skips = "\n".join(
        f"- {count} × {reason}, e.g. `{first}`" for reason, count, first in skip_counts(report["skipped"])
    )
    chosen = {key: config[key] for key in SETTINGS} | _calibration(report)
    settings = ", ".join(f"{key.replace('_', '-')} {value}" for key, value in chosen.items())
    calibrated = config["method"] in CALIBRATED
    aim = "says what the original model says, as nearly" if calibrated else "is as near to the original weights"
    told = [sentence for sentence in (about_experts(report), trained(report)) if sentence]
    more = "".join(f"{sentence[0].upper()}{sentence[1:]}.\n\n" for sentence in told)
    load = "\n".join(load_lines(report, "PATH_OR_HUB_ID_OF_THIS_FOLDER"))
    notes = "".join(f"- {note}\n" for note in plan.format.load_notes)
    fingerprint = base_fingerprint({k: v for k, v in report["files"].items() if not k.startswith("loftq_init/")})
    return f"""---
library_name: peft
{hub_id}base_model_relation: quantized
tags:
- loftq
- lora
---

# {name}: {config["bits"]}-bit base with a LoRA adapter that repairs it

Made by [loftq](https://arxiv.org/abs/2310.08659) {report["version"]}: this folder is a quantized base checkpoint, and
`loftq_init/` holds a LoRA adapter of rank {config["rank"]} to fine-tune from, so that `base + adapter` {aim}
as the method makes it.

```bash
{install_line(report)}
```

```python
{load}
```

{notes}
## Error

{MEANING["output" if calibrated else "weight"]}

| layers | weights | bits | {" | ".join(columns)} |
|---|---|---|{"---|" * len(columns)}
{rows}
| **all** | {totals["weights"]} | {totals["bits_per_weight"]:.2f} stored | {every}

{more}Settings: {settings}.

## Kept as it was

{skips}

## The adapter belongs to this base only

It holds the difference between the original weights and *this* base: on the original model it would subtract quality.
The header of `adapter_model.safetensors` names the base by its hash, `{fingerprint}`;
`loftq verify` checks it and recomputes the error of every weight from the files.
"""


def _cells(errors: Iterable[float | None]) -> str:
    return " | ".join(in_figures(errors)) + " |"


def _calibration(report: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a calibrated method; of the text its size and what it was, as far as it has a name."""
    config = report["config"]
    if config["method"] not in CALIBRATED:
        return {}
    text = report["calibration"]
    of_training = ("init", "epochs", "factor_lr", "clip_lr", "code_lr") if config["method"].startswith("apiq") else ()
    of_finish = ("finish_epochs", "finish_lr") if config["finish_epochs"] else ()
    name = "the default text" if config["calibration"] is None else f"`{Path(config['calibration']).name}`"
    size = f"{text['samples']} × {text['seqlen']} tokens of {name}"
    return {"calibrated on": size} | {key: config[key] for key in (*of_training, *of_finish)}
