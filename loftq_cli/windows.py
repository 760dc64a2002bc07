"""The windows of text that a run calibrates on, by the model's own tokenizer; and whether the model can be run so."""

from __future__ import annotations

import hashlib
import sys
from typing import Any

import torch

from loftq_cli.calibration.handed import refuse_shared
from loftq_cli.calibration.sources import read_texts
from loftq_cli.calibration.stand_in import WAY_OUT
from loftq_cli.calibration.stream import BlockStream, ties_of
from loftq_cli.calibration.text import Calibration, token_batches
from loftq_cli.errors import LoftqError
from loftq_cli.experts import by_parameter
from loftq_cli.meta_model import build_to_run, state_keys
from loftq_cli.plan import Plan

LONGEST_WINDOW = 2048  # tokens, unless more are asked for
SLOW = 1e13  # operations of running the text through source and quantized model: minutes of a CPU


def prepare(plan: Plan, ranks: int) -> Calibration:
    """The token windows that the plan's configuration asks for, by the model's own tokenizer.

    Raises:
        LoftqError: there is no tokenizer, or too little text; or the model cannot be run on it block by block.
    """
    config, checkpoint = plan.config, plan.checkpoint
    if not plan.block_paths:
        raise LoftqError(
            f"`--method {config.method}` found no transformer blocks in `{checkpoint.model}`",
            WAY_OUT,
        )
    from transformers import AutoTokenizer

    if plan.targets.main_input_name != "input_ids":
        raise _not_text(plan, f"whose input is `{plan.targets.main_input_name}`")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            checkpoint.model, revision=checkpoint.revision, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:  # of many kinds, as many as there are tokenizers
        raise LoftqError(
            f"`--method {config.method}` needs the tokenizer of `{checkpoint.model}`, and there is none that loads "
            f"({type(error).__name__}: {(str(error) or '?').splitlines()[0].rstrip(' :')})",
            "put its files beside the weights, or use `--method loftq`",
        ) from error
    model = build_to_run(checkpoint, config.trust_remote_code)
    names = state_keys(checkpoint, model)[0]
    _refuse_unreadable(model, names, plan)
    longest = positions(checkpoint.config, model)
    if (config.seqlen or 0) > longest:
        raise LoftqError(f"`--seqlen {config.seqlen}` is more than the model has positions for", f"up to {longest}")
    seqlen = config.seqlen or min(LONGEST_WINDOW, longest)
    calibration = token_batches(read_texts(config.calibration), tokenizer, config.samples, seqlen, config.seed)
    if len(calibration.tokens) < ranks:
        raise LoftqError(f"{ranks} processes have {len(calibration.tokens)} samples to share", "start fewer of them")
    try:
        words = model.get_input_embeddings().num_embeddings
    except (AttributeError, NotImplementedError):  # of several parts, each with its own
        raise _not_text(plan, "that has no one table of tokens") from None
    if (highest := int(torch.cat([calibration.tokens, calibration.held_out]).max())) >= words:
        raise LoftqError(
            f"the tokenizer of `{checkpoint.model}` says {highest}, and the model knows {words} tokens",
            "put the tokenizer that it was trained with beside the weights",
        )
    refuse_shared(model, plan.block_paths, calibration.tokens)
    if len(plan.block_paths) > 1 and any(job.expert for job in plan.jobs):
        _refuse_uncalled(model, names, plan, calibration)
    return calibration


def _not_text(plan: Plan, why: str) -> LoftqError:
    return LoftqError(
        f"`--method {plan.config.method}` runs text through the model, and `{plan.targets.architecture}` is one {why}",
        WAY_OUT,
    )


def _refuse_unreadable(model: Any, names: dict[str, str], plan: Plan) -> None:
    """Refuse a model of which a parameter that is needed is in no file under a name of its own.

    Args:
        model: from `build_to_run`.
        names: tensor name → key in the model's state dict, from `state_keys`.
        plan: a finish needs all of the model, others its blocks.
    """
    experts = by_parameter(plan.targets.experts)
    if experts and plan.config.finish_epochs > 0:
        raise LoftqError(
            f"a finish would hold all experts of `{plan.targets.architecture}` in memory at once",
            "leave out `--finish-epochs`",
        )
    there = {*names.values(), *ties_of(model), *experts}
    in_blocks = tuple(f"{path}." for path in plan.block_paths)
    for name, _ in model.named_parameters(remove_duplicate=False):
        if name in there:
            continue
        if name.startswith(in_blocks):
            raise LoftqError(
                f"`{name}` is in no file as it stands: transformers makes it while loading",
                "calibrated methods cannot run this model yet: use `--method loftq`",
            )
        if plan.config.finish_epochs > 0:
            raise LoftqError(f"`{name}` is in no file, so what the model says is not known", "leave out the finish")


def _refuse_uncalled(model: Any, names: dict[str, str], plan: Plan, calibration: Calibration) -> None:
    """Refuse blocks that text does not reach, as of a vision tower; the block loop would, once all experts are made.

    It takes what is outside the blocks, such as embeddings, and the first sample.
    """
    tokens, dtype = calibration.tokens[:1], plan.jobs[0].dtype
    turned, paths = plan.targets.transposed, plan.block_paths
    BlockStream(model, plan.checkpoint, names, turned, {}, paths, tokens, [slice(1)], torch.device("cpu"), dtype)


def positions(config: dict[str, Any], model: Any = None) -> int:
    """How many tokens the model has positions for, as far as its configuration says; without the model about."""
    text = config.get("text_config") or config
    known = next((text[name] for name in ("max_position_embeddings", "n_positions") if text.get(name)), None)
    if known is None:
        return sys.maxsize
    for name, module in model.named_modules() if model else ():  # RoBERTa's begin after the index of padding
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(known) - int(module.padding_idx) - 1
    return int(known)


def told(plan: Plan, calibration: Calibration) -> str:
    """What it is, in a sentence, and what to do where it takes long."""
    samples, seqlen = calibration.tokens.shape
    source, work = plan.config.calibration, 4 * plan.parameters * calibration.tokens.numel()
    text = "the default text" if source is None else f"`{source}`"
    less = "" if calibration.note is None else f"; {calibration.note}"
    judges = f"{len(calibration.held_out)} × {seqlen:,} more judge"
    slow = "; slow on a CPU, where smaller `--samples` and `--seqlen` help" if not plan.on_gpu and work > SLOW else ""
    return f"calibrating on {samples} × {seqlen:,} tokens of {text}; {judges}{less}{slow}"


def describe(calibration: Calibration) -> dict[str, Any]:
    """What the report says of the token windows."""
    sha256 = hashlib.sha256(torch.cat([calibration.tokens, calibration.held_out]).numpy().tobytes()).hexdigest()
    samples, seqlen = calibration.tokens.shape
    note = {} if calibration.note is None else {"note": calibration.note}
    return {"samples": samples, "held_out": len(calibration.held_out), "seqlen": seqlen, "sha256": sha256, **note}
