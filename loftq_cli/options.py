"""The options of `loftq quantize` as the command line has them; what they mean is `QuantizeConfig`'s affair."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

QUANTIZATION, ADAPTER, CALIBRATION, INPUT = "Quantization", "Adapter", "Calibration", "Input"
OUTPUT, HARDWARE = "Output", "Hardware"

Model = Annotated[str, typer.Argument(help="Folder or Hub id of a safetensors checkpoint.")]
Out = Annotated[Path, typer.Argument(help="Folder to make: base checkpoint, adapter in loftq_init/, report, card.")]
Config = Annotated[Path | None, typer.Option("--config", help="YAML file with any of these options.")]
Bits = Annotated[int | None, typer.Option(help="2, 3, 4 or 8. \\[default: 4]", rich_help_panel=QUANTIZATION)]
Quantizer = Annotated[
    str | None,
    typer.Option(
        help="uniform, uniform-symmetric; or a codebook: nf (NormalFloat), nf-search, lloyd, lloyd-fit. "
        "\\[default: lloyd in packed, nf at 4 bits but for cloq and apiq, else uniform]",
        rich_help_panel=QUANTIZATION,
    ),
]
GroupSize = Annotated[
    int | None,
    typer.Option(
        help="Consecutive inputs that share a scale; -1 is a whole row. \\[default: 64]",
        rich_help_panel=QUANTIZATION,
    ),
]
Format = Annotated[
    str | None,
    typer.Option(
        help="auto, bnb, gptq, compressed-tensors, packed or dense. \\[default: auto: the first of bnb, gptq, packed, "
        "dense that holds the result]",
        rich_help_panel=QUANTIZATION,
    ),
]
DoubleQuant = Annotated[
    bool | None,
    typer.Option(
        "--double-quant/--no-double-quant",
        help="Quantize the scales too, as QLoRA does (codebooks). \\[default: no]",
        rich_help_panel=QUANTIZATION,
    ),
]
Skip = Annotated[
    list[str] | None,
    typer.Option(metavar="GLOB", help="Module names to leave as they are; repeatable.", rich_help_panel=QUANTIZATION),
]
BitsFor = Annotated[
    list[str] | None,
    typer.Option(
        metavar="GLOB=BITS",
        help="Other bits for some modules, e.g. '*.down_proj=4', or for some blocks: 'blocks[:50%]=4'; repeatable.",
        rich_help_panel=QUANTIZATION,
    ),
]
Method = Annotated[
    str | None,
    typer.Option(
        help="loftq, qlora (adapter starts at zero); or, from text: qera, cloq, apiq-lw, apiq-bw. \\[default: loftq]",
        rich_help_panel=ADAPTER,
    ),
]
Rank = Annotated[int | None, typer.Option(help="Rank of the adapter. \\[default: 16]", rich_help_panel=ADAPTER)]
Alpha = Annotated[
    float | None,
    typer.Option(help="LoRA alpha; divided out of the factors. \\[default: rank]", rich_help_panel=ADAPTER),
]
Rslora = Annotated[
    bool | None,
    typer.Option("--rslora/--no-rslora", help="Scale by alpha/√rank. \\[default: no]", rich_help_panel=ADAPTER),
]
Iters = Annotated[
    int | None, typer.Option(help="Alternations; the best one is kept. \\[default: 5]", rich_help_panel=ADAPTER)
]
AdapterDtype = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16 or float16. \\[default: float32]", rich_help_panel=ADAPTER),
]
QuantizeHead = Annotated[
    bool | None,
    typer.Option(
        "--quantize-head/--no-quantize-head",
        help="Quantize the output head, too, where it is not tied (formats packed and dense). \\[default: off]",
        rich_help_panel=QUANTIZATION,
    ),
]
QuantizeEmbeddings = Annotated[
    bool | None,
    typer.Option(
        "--quantize-embeddings/--no-quantize-embeddings",
        help="Quantize the token embeddings, too, with an adapter, where nothing is tied to them (formats packed and "
        "dense). \\[default: off]",
        rich_help_panel=QUANTIZATION,
    ),
]
ExpertsAdapter = Annotated[
    bool | None,
    typer.Option(
        "--experts-adapter/--no-experts-adapter",
        help="Give experts an adapter, too, through PEFT's target_parameters (format dense). \\[default: off]",
        rich_help_panel=ADAPTER,
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|DATASET",
        help="Text that a calibrated method sees: a file (.txt; .jsonl with `text`, `messages`, `conversations`, or "
        "`prompt` and `completion`) or a data set NAME:CONFIG:SPLIT. \\[default: four works in the public domain]",
        rich_help_panel=CALIBRATION,
    ),
]
Samples = Annotated[int | None, typer.Option(help="Windows of text. \\[default: 128]", rich_help_panel=CALIBRATION)]
Seqlen = Annotated[
    int | None,
    typer.Option(help="Tokens in a window. \\[default: 2048, or the model's longest]", rich_help_panel=CALIBRATION),
]
Init = Annotated[
    str | None,
    typer.Option(
        help="Where apiq starts: cloq, qera, loftq, or qlora, the published start, which learns to clip. "
        "\\[default: cloq]",
        rich_help_panel=CALIBRATION,
    ),
]
Epochs = Annotated[
    int | None,
    typer.Option(
        help="Passes of apiq over the samples. \\[default: 20 from qlora, else 5]", rich_help_panel=CALIBRATION
    ),
]
FactorLr = Annotated[
    float | None,
    typer.Option(help="Learning rate of apiq's factors. \\[default: 5e-4]", rich_help_panel=CALIBRATION),
]
ClipLr = Annotated[
    float | None,
    typer.Option(help="Of its clip factors, or scales. \\[default: 5e-3]", rich_help_panel=CALIBRATION),
]
CodeLr = Annotated[
    float | None,
    typer.Option(
        help="apiq-bw: of the codes, in steps of the grid, or mean distances of levels; 0 leaves them as the start has "
        "them. \\[default: 2e-3]",
        rich_help_panel=CALIBRATION,
    ),
]
Augmented = Annotated[
    bool | None,
    typer.Option(
        "--augmented/--no-augmented",
        help="apiq-bw: also match the source's block on the quantized model's inputs. \\[default: no]",
        rich_help_panel=CALIBRATION,
    ),
]
FinishEpochs = Annotated[
    int | None,
    typer.Option(
        help="Passes of a finish, which trains the factors of the whole model on what the source says. \\[default: 0]",
        rich_help_panel=CALIBRATION,
    ),
]
FinishLr = Annotated[
    float | None, typer.Option(help="Its learning rate. \\[default: 5e-4]", rich_help_panel=CALIBRATION)
]
ActivationBudget = Annotated[
    float | None,
    typer.Option(
        metavar="GIB",
        help="Main memory for activations; beyond it they go to files in OUT. \\[default: half of what is free]",
        rich_help_panel=HARDWARE,
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.", rich_help_panel=INPUT)]
TrustRemoteCode = Annotated[
    bool | None,
    typer.Option(
        "--trust-remote-code/--no-trust-remote-code",
        help="Run the checkpoint's own Python to find its layers. \\[default: no]",
        rich_help_panel=INPUT,
    ),
]
Evict = Annotated[
    bool | None,
    typer.Option(
        "--evict/--no-evict",
        help="Of a Hub id keep only a few shards on the disk, each deleted after use. \\[default: no]",
        rich_help_panel=INPUT,
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Finish an interrupted run.", rich_help_panel=OUTPUT)]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what loftq wrote in OUT.", rich_help_panel=OUTPUT)
]
PushToHub = Annotated[
    str | None,
    typer.Option(metavar="REPO_ID", help="Then push to the Hub, as `loftq push` does.", rich_help_panel=OUTPUT),
]
Private = Annotated[bool, typer.Option("--private", help="Make that repo private.", rich_help_panel=OUTPUT)]
ReportControl = Annotated[
    bool,
    typer.Option(
        "--report-control",
        help="Also measure what the bytes of base and adapter would buy without an adapter: more bits for the weights "
        "that gain most. Of a finished OUT, too.",
        rich_help_panel=OUTPUT,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Show the plan, from headers alone; write nothing.", rich_help_panel=OUTPUT),
]
Device = Annotated[
    str | None, typer.Option(help="auto, cpu, cuda or cuda:N. \\[default: auto]", rich_help_panel=HARDWARE)
]
Seed = Annotated[int | None, typer.Option(help="\\[default: 0]", rich_help_panel=HARDWARE)]
