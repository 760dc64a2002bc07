"""The windows of text that a run calibrates on, by the model's own tokenizer; and whether the model can be run so."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from loftq_cli.calibration.stream import refuse_unreadable
from loftq_cli.calibration.text import Calibration, read_texts, token_batches
from loftq_cli.errors import LoftqError
from loftq_cli.meta_model import build_to_run
from loftq_cli.plan import Plan
from loftq_cli.targets import state_keys

LONGEST_WINDOW = 2048  # tokens, unless more are asked for


def prepare(plan: Plan, ranks: int) -> Calibration:
    """The token windows that the plan's configuration asks for, by the model's own tokenizer.

    Raises:
        LoftqError: there is no tokenizer, or too little text; or several processes.
    """
    config, checkpoint = plan.config, plan.checkpoint
    if not plan.block_paths:
        raise LoftqError(
            f"`--method {config.method}` found no transformer blocks in `{checkpoint.model}`",
            "use a weight-only method, `--method loftq`",
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            checkpoint.model, revision=checkpoint.revision, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:  # of many kinds, as many as there are tokenizers
        raise LoftqError(
            f"`--method {config.method}` needs the tokenizer of `{checkpoint.model}`, which does not load: "
            f"{type(error).__name__}: {(str(error) or '?').splitlines()[0]}",
            "put its files beside the weights, or use `--method loftq`",
        ) from error
    longest = min(LONGEST_WINDOW, _positions(plan))
    calibration = token_batches(
        read_texts(config.calibration), tokenizer, config.samples, config.seqlen or longest, config.seed
    )
    if len(calibration.tokens) < ranks:
        raise LoftqError(f"{ranks} processes have {len(calibration.tokens)} samples to share", "start fewer of them")
    return calibration


def _positions(plan: Plan) -> int:
    """How many tokens the model has positions for, as far as its configuration says.

    Raises:
        LoftqError: it cannot be run block by block.
    """
    model = build_to_run(plan.checkpoint, plan.config.trust_remote_code)
    refuse_unreadable(model, state_keys(plan.checkpoint, model)[0], plan.block_paths)
    config = plan.checkpoint.config.get("text_config") or plan.checkpoint.config
    positions = config.get("max_position_embeddings") or config.get("n_positions") or LONGEST_WINDOW
    for name, module in model.named_modules():  # RoBERTa's begin after the index of padding
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(positions) - module.padding_idx - 1
    return int(positions)


def describe(calibration: Calibration) -> dict[str, Any]:
    """What the report says of the token windows."""
    sha256 = hashlib.sha256(torch.cat([calibration.tokens, calibration.held_out]).numpy().tobytes()).hexdigest()
    samples, seqlen = calibration.tokens.shape
    note = {} if calibration.note is None else {"note": calibration.note}
    return {"samples": samples, "held_out": len(calibration.held_out), "seqlen": seqlen, "sha256": sha256, **note}
