"""What blocks hand to one another: the same for all texts, or nobody takes it, or the model is refused beforehand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers.models.t5.modeling_t5 import T5Block

from loftq_cli import pipeline
from loftq_cli.calibration.handed import refuse_shared
from loftq_cli.calibration.stand_in import for_windows
from loftq_cli.config import build_config
from loftq_cli.errors import LoftqError
from loftq_cli.windows import prepare
from tests.test_blocks import SEQ2SEQ, options, text  # noqa: F401
from tests.test_eval import save_tokenizer
from tests.test_families import FAMILIES


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


def test_keys_that_blocks_share_are_told_before_anything_is_written(text: Path, tmp_path: Path) -> None:  # noqa: F811
    torch.manual_seed(0)
    FAMILIES["gemma4, keys shared"][0]().save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    plan = pipeline.plan_quantize(str(tmp_path), build_config(options(text, method="qera")))
    with pytest.raises(
        LoftqError, match=r"`model.layers.0` leaves something .* argument `shared_kv_states`"
    ) as refused:
        prepare(plan, 1)
    assert "--method loftq" in refused.value.hint


class Block(nn.Module):
    """Takes a list, and leaves something in it or not."""

    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.linear, self.writes = nn.Linear(8, 8, device="meta"), writes
        self.scale = nn.Buffer(torch.ones(8))

    def forward(self, hidden: Tensor, beside: list[Tensor] | dict[str, Tensor]) -> Tensor:
        hidden = self.linear(hidden) * self.scale
        if self.writes:
            beside.append(hidden) if isinstance(beside, list) else beside.update(hidden=hidden)
            hidden.sum().item()  # on the meta device it cannot be known: what was written was seen
        return hidden


class Model(nn.Module):
    """Hands one list or dict to all of its blocks, or one to each."""

    def __init__(self, beside: type, shared: bool, writers: list[bool]) -> None:
        super().__init__()
        self.words, self.layers = nn.Embedding(100, 8, device="meta"), nn.ModuleList(map(Block, writers))
        self.beside, self.shared, self.config = beside, shared, tf.LlamaConfig(use_cache=True)

    def forward(self, input_ids: Tensor) -> Tensor:
        assert not self.config.use_cache
        hidden, beside = self.words(input_ids), self.beside()
        for layer in self.layers:
            hidden = layer(hidden, beside if self.shared else self.beside())
        return hidden


@pytest.mark.parametrize("beside", [list, dict])
def test_a_list_or_dict_may_be_shared_if_no_block_leaves_something_for_another(beside: type) -> None:
    tokens = torch.arange(12)[None]
    for shared, writers in ((True, [False, False]), (False, [True, True]), (True, [False, True])):
        model = Model(beside, shared, writers)
        refuse_shared(model, ["layers"], tokens)
        assert all(isinstance(layer, Block) for layer in model.layers)
    with pytest.raises(LoftqError, match=r"`layers.1` leaves something for later blocks in its argument `beside`"):
        refuse_shared(Model(beside, True, [False, True, False]), ["layers"], tokens)


def test_several_text_configurations_are_no_error() -> None:
    """As MusicGen has: which of them a padding token would be of, nobody can say."""

    class Several(tf.LlamaConfig):
        def get_text_config(self, *arguments: Any, **options: Any) -> Any:
            raise ValueError("Multiple valid text configs were found")

    model = Model(list, False, [False])
    model.config = Several(use_cache=True)
    for_windows(model)
    assert not model.config.use_cache
