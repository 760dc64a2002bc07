"""README.md of the output: a model card."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from loftq_cli.config import CALIBRATED
from loftq_cli.formats import FORMATS
from loftq_cli.journal import CHART_FILE
from loftq_cli.plan import Plan
from loftq_cli.report import (
    PLACEHOLDER,
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
from loftq_cli.stored import TUNED

if TYPE_CHECKING:
    from loftq_cli.evaluate import Evaluation

MEANING = {
    "weight": "`‖W − Ŵ‖ / ‖W‖` (Frobenius), pooled over the weights of a kind, of the base alone and with the adapter.",
    "output": "`‖Y − Ŷ‖ / ‖Y‖` (Frobenius) of what layers say in the source and here, root mean square over the layers "
    "of a kind: without the adapters of their block and with all adapters; on the text that was calibrated on, and on "
    "text held out.",
}
CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")  # from the source's card
FORMAT_TAGS = {"bnb": ("bitsandbytes",), "gptq": ("gptq",), "compressed-tensors": ("compressed-tensors",)}
PAPERS = {
    "loftq": "LoftQ: [arXiv 2310.08659](https://arxiv.org/abs/2310.08659)",
    "qlora": "QLoRA: [arXiv 2305.14314](https://arxiv.org/abs/2305.14314)",
    "nf": "QLoRA: [arXiv 2305.14314](https://arxiv.org/abs/2305.14314)",
    "double_quant": "QLoRA: [arXiv 2305.14314](https://arxiv.org/abs/2305.14314)",
    "qera": "QERA: [arXiv 2410.06040](https://arxiv.org/abs/2410.06040)",
    "cloq": "CLoQ: [arXiv 2501.18475](https://arxiv.org/abs/2501.18475)",
    "apiq-lw": "ApiQ: [arXiv 2402.05147](https://arxiv.org/abs/2402.05147)",
    "apiq-bw": "ApiQ: [arXiv 2402.05147](https://arxiv.org/abs/2402.05147)",
    "rslora": "rsLoRA: [arXiv 2312.03732](https://arxiv.org/abs/2312.03732)",
    "finish": "RILQ: [arXiv 2412.01129](https://arxiv.org/abs/2412.01129)",
}
SETTINGS = (
    "method", "bits", "quantizer", "group_size", "format", "rank", "alpha", "rslora", "iters", "adapter_dtype", "seed",
)  # fmt: skip
OF_PARAMETERS = (
    "some of the adapter is on parameters (`target_parameters`), where PEFT knows no `lora_dropout`, no DoRA and no "
    "weights that are offloaded, and takes the memory of each such weight once more while it trains; merge to generate"
)
IF_GIVEN = ("bits_for", "double_quant", "skip", "quantize_head", "quantize_embeddings", "experts_adapter")


def model_card(plan: Plan, report: Mapping[str, Any]) -> str:
    """README.md of the output: how to load, what was measured, with which settings."""
    totals, config = report["totals"], report["config"]
    name = Path(report["source"]["model"]).resolve().name
    columns = error_columns(config)
    rows = "\n".join(
        f"| `{group.kind}` | {group.weights} | {group.bits} | " + _cells(group.errors)
        for group in layer_groups(report["weights"], columns.values())
    )
    every = _cells(pooled_errors(report["weights"], columns.values()))
    skips = "\n".join(
        f"- {count} × {reason}, e.g. `{first}`" for reason, count, first in skip_counts(report["skipped"])
    )
    given = {key: _told(config[key]) for key in IF_GIVEN if config[key]}
    chosen = {key: config[key] for key in SETTINGS} | given | _calibration(report)
    settings = ", ".join(f"{key.replace('_', '-')} {value}" for key, value in chosen.items())
    calibrated = config["method"] in CALIBRATED
    aim = "says what the original model says, as nearly" if calibrated else "is as near to the original weights"
    told = [sentence for sentence in (about_experts(report), trained(report)) if sentence]
    more = "".join(f"{sentence[0].upper()}{sentence[1:]}.\n\n" for sentence in told)
    load = "\n".join(load_lines(report, PLACEHOLDER))
    notes = "".join(f"- {note}\n" for note in load_notes(report))
    fingerprint = base_fingerprint({k: v for k, v in report["files"].items() if not k.startswith("loftq_init/")})
    matter = yaml.safe_dump(front_matter(plan), sort_keys=False, allow_unicode=True)
    sources = "\n".join(f"- {line}" for line in _sources(config))
    return f"""---
{matter}---

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

![Error of every block, of the base alone and with the adapter]({CHART_FILE})

{more}Settings: {settings}.

## Kept as it was

{skips}

## The adapter belongs to this base only

It holds the difference between the original weights and *this* base: on the original model it would subtract quality.
The header of `adapter_model.safetensors` names the base by its hash, `{fingerprint}`;
`loftq verify` checks it and recomputes the error of every weight from the files.

## Sources

{sources}
"""


def load_notes(report: Mapping[str, Any]) -> tuple[str, ...]:
    """What who loads it must know: also of the loader's code, where that travels along."""
    output = FORMATS[report["config"]["format"]]
    code = getattr(output, "remote_notes", ()) if report["load"].get("remote_code") else ()
    parameters = (OF_PARAMETERS,) if report["adapter_config"].get("target_parameters") else ()
    return (*code, *output.load_notes, *parameters)


def front_matter(plan: Plan) -> dict[str, Any]:
    """What the Hub reads of a card: the source and its licence, language and task, as its own card has them."""
    checkpoint, source = plan.checkpoint, _front_matter(plan.checkpoint.readme)
    hub_id = checkpoint.model if checkpoint.revision is not None and not Path(checkpoint.model).is_dir() else None
    base = {"base_model": hub_id, "base_model_relation": "quantized"} if hub_id else {}
    carried = {key: source[key] for key in CARRIED if source.get(key)}
    library = "sentence-transformers" if checkpoint.modules.files else "transformers"
    tags = ["loftq", "lora", "peft", f"{plan.config.bits}-bit", *FORMAT_TAGS.get(plan.config.format, ())]
    return {**carried, "library_name": library, **base, "tags": tags}


def _front_matter(readme: str) -> dict[str, Any]:
    """The YAML at the top of a card; what cannot be read of it is none."""
    found = re.match(r"\s*---\r?\n(.*?)\r?\n---", readme, re.DOTALL)
    try:
        values = yaml.load(found[1], yaml.BaseLoader) if found else {}
    except yaml.YAMLError:
        return {}
    return values if isinstance(values, dict) else {}


def with_perplexity(card: str, measured: Evaluation, text: str) -> str:
    """The card with perplexities on a text of this name, in place of those that it may have of it already."""
    heading = f"## Perplexity on `{text}`"
    elsewhere = {TUNED: f"{TUNED}, which is not in this folder"}
    rows = "\n".join(
        f"| {elsewhere.get(row.name, row.name)} | {row.nll:.4f} | {row.perplexity:.6g} |" for row in measured.rows
    )
    table = f"| model | nats per token | perplexity |\n|---|---|---|\n{rows}"
    section = f"{heading}\n\n{table}\n\n{measured.protocol[0].upper()}{measured.protocol[1:]}.\n\n"
    before, found, after = card.partition(heading + "\n")
    if found:
        _, next_heading, rest = after.partition("\n## ")
        return before + section + (f"## {rest}" if next_heading else "")
    before, found, after = card.partition("## Kept as it was\n")
    return before + section + found + after if found else f"{card.rstrip()}\n\n{section.rstrip()}\n"


def _sources(config: Mapping[str, Any]) -> list[str]:
    """The papers behind a run."""
    names = ["loftq", config["method"], config.get("init") if config["method"].startswith("apiq") else None]
    names += [config["quantizer"], "double_quant" if config["double_quant"] else None]
    names += ["rslora" if config["rslora"] else None, "finish" if config["finish_epochs"] else None]
    return list(dict.fromkeys(PAPERS[name] for name in names if name in PAPERS))


def _cells(errors: Iterable[float | None]) -> str:
    return " | ".join(in_figures(errors)) + " |"


def text_name(calibration: str) -> str:
    """What others may read of where a text is from: the whole name of a data set, of a path the file's."""
    path = Path(calibration)
    is_file = calibration.startswith(("~", ".")) or path.suffix in (".jsonl", ".txt")
    return path.name if is_file or path.is_absolute() or path.exists() else calibration


def _told(value: Any) -> str:
    """A setting as one gives it, with stars that are none of Markdown's."""
    if isinstance(value, bool):
        return "yes"
    rules = [f"{glob}={bits}" for glob, bits in value.items()] if isinstance(value, Mapping) else value
    return " ".join(f"`{rule}`" for rule in rules)


def _calibration(report: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a calibrated method; of the text its size and what it was, as far as it has a name."""
    config = report["config"]
    if config["method"] not in CALIBRATED:
        return {}
    text = report["calibration"]
    of_training = ("init", "epochs", "factor_lr", "clip_lr", "code_lr") if config["method"].startswith("apiq") else ()
    of_finish = ("finish_epochs", "finish_lr") if config["finish_epochs"] else ()
    name = "the default text" if config["calibration"] is None else f"`{text_name(config['calibration'])}`"
    size = f"{text['samples']} × {text['seqlen']} tokens of {name}"
    return {"calibrated on": size} | {key: config[key] for key in (*of_training, *of_finish)}
