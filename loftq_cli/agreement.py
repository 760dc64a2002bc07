"""Whether a checkpoint and the model that its config describes say the same: asked before any work.

Loaders refuse a tensor of another shape, and give a weight that no file holds random values, with a line in a log.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from loftq_cli.checkpoint.source import Checkpoint
from loftq_cli.errors import LoftqError

HINT = "config.json and the weights come from different saves: download or copy all of them again"


def refuse_disagreement(checkpoint: Checkpoint, model: Any, keys: Mapping[str, str], made: set[str]) -> None:
    """Refuse tensors of other shapes than the model's, and parameters of its body that no file holds.

    Args:
        checkpoint: its headers.
        model: on the meta device.
        keys: tensor name → key of the state dict.
        made: keys of the state dict that any tensor becomes, or becomes a part of.

    Raises:
        LoftqError: names the tensor.
    """
    state = model.state_dict()
    for name, key in keys.items():
        info, shape = checkpoint.tensors[name], list(state[key].shape)
        if list(info.shape) != shape:
            what = (
                f"`{name}` in `{info.file}` has shape {list(info.shape)}, the model that config.json describes {shape}"
            )
            raise LoftqError(what, HINT)
    ties = (getattr(model, "all_tied_weights_keys", None) or {}).items()
    filled = {*made, *(key for pair in ties if made.intersection(pair) for key in pair)}
    ignored = [*(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())]
    body = f"{model.base_model_prefix}." if hasattr(model, model.base_model_prefix or " ") else ""
    for key, _ in model.named_parameters():  # of a head, which may be new, nothing is asked
        if key.startswith(body) and key not in filled and not any(re.search(pattern, key) for pattern in ignored):
            what = f"`{key}` is in none of the files, so that loaders would give it random values"
            raise LoftqError(what, HINT)
