"""What blocks hand to one another: the same for all texts, or nobody takes it, or the model is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from transformers.models.t5.modeling_t5 import T5Block

from loftq_cli import pipeline
from loftq_cli.errors import LoftqError
from tests.test_blocks import SEQ2SEQ, options, text  # noqa: F401
from tests.test_eval import save_tokenizer


def test_what_a_later_block_takes_must_be_the_same_for_all_texts(
    text: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """T5's first block hands on a position bias; here with something of the text in it."""
    forward = T5Block.forward

    def of_the_text(self: Any, *args: Any, **kwargs: Any) -> Any:
        hidden, bias, *rest = forward(self, *args, **kwargs)
        return (hidden, bias + hidden.mean((1, 2))[:, None, None, None], *rest)

    torch.manual_seed(0)
    tf.T5ForConditionalGeneration(tf.T5Config(**SEQ2SEQ)).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    monkeypatch.setattr(T5Block, "forward", of_the_text)
    with pytest.raises(LoftqError, match=r"`encoder.block.0` hands to other blocks depends on the text") as refused:
        pipeline.quantize(tmp_path / "model", tmp_path / "out", **options(text, method="qera"))
    assert "--method loftq" in refused.value.hint
    assert not (tmp_path / "out").exists()
