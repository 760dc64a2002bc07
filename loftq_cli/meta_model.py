"""The model that a config.json describes, built by transformers on the meta device, and what loads it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from loftq_cli.checkpoint.source import Checkpoint

# (Auto class, its table in transformers, PEFT task type where PEFT's wrapper may pass the model only arguments it has)
AUTO_CLASSES = (
    ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "CAUSAL_LM"),
    ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "SEQ_2_SEQ_LM"),
    ("AutoModelForSpeechSeq2Seq", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", None),
    ("AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", None),
    ("AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", "SEQ_CLS"),
    ("AutoModelForTokenClassification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES", "TOKEN_CLS"),
    ("AutoModelForQuestionAnswering", "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES", "QUESTION_ANS"),
    ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES", None),
    ("AutoModelForCTC", "MODEL_FOR_CTC_MAPPING_NAMES", None),
    ("AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", None),
    ("AutoModelForAudioClassification", "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES", None),
    ("AutoModel", "MODEL_MAPPING_NAMES", "FEATURE_EXTRACTION"),
)

RANDOM = (torch.rand, torch.randn)
DRAWING = (torch.Tensor.normal_, torch.Tensor.uniform_)
RANGES = (torch.arange, torch.linspace)


class UnknownModelError(Exception):
    """A model type that transformers does not have."""


def build(checkpoint: Checkpoint, trust_remote_code: bool, light: bool) -> Any:
    """Build the model that config.json describes, on the meta device: modules and shapes without memory.

    Args:
        checkpoint: only its config is used, and with `trust_remote_code` its Python files.
        trust_remote_code: run those.
        light: see `_Light`; the modules and shapes are the same.
    """
    with _quiet(), torch.device("meta"), _Light() if light else nullcontext():
        return _build(checkpoint, trust_remote_code)


def build_to_run(checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    """Build it with its parameters alone on the meta device: buffers, such as rotary frequencies, hold their values.

    Linear layers of the kind `Conv1D` become such as all others, with weights [out_features, in_features].
    """
    from transformers.pytorch_utils import Conv1D

    with _quiet(), _parameters_on_meta():
        model = _build(checkpoint, trust_remote_code).eval()
        for name, module in list(model.named_modules()):
            if type(module) is Conv1D:
                n, m = module.weight.shape
                model.set_submodule(name, torch.nn.Linear(n, m, module.bias is not None, device="meta"))
        return model


def _build(checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    source = checkpoint.config
    if trust_remote_code and "auto_map" in source:
        arguments = {"revision": checkpoint.revision, "trust_remote_code": True}
        config = transformers.AutoConfig.from_pretrained(checkpoint.model, **arguments)
        auto = next(name for name, _, _ in AUTO_CLASSES if name in source["auto_map"])
        return getattr(transformers, auto).from_config(config, trust_remote_code=True)
    if source.get("model_type") not in CONFIG_MAPPING:
        hint = "; `--trust-remote-code` would run the checkpoint's own code" if "auto_map" in source else ""
        raise UnknownModelError(f"transformers does not know model_type `{source.get('model_type')}`{hint}")
    config = CONFIG_MAPPING[source["model_type"]].from_dict(dict(source))
    named = source.get("architectures")
    # where nothing is named, as for DeBERTa v3, the body: whatever head a file holds is copied
    architecture = named[0] if named else _body(source["model_type"])
    model_class = getattr(transformers, architecture, None)
    if model_class is None:
        raise LookupError(f"it has no class `{architecture}`, which config.json names under `architectures`")
    return model_class(config)


def _body(model_type: str) -> str:
    """The class that `AutoModel` has for it."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    found = MODEL_MAPPING_NAMES.get(model_type, "?")
    return found if isinstance(found, str) else found[0]


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    register = torch.nn.Module.register_parameter

    def register_on_meta(self: torch.nn.Module, name: str, param: torch.nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:  # else it is shared already
            param = torch.nn.Parameter(param.to("meta"), requires_grad=False)
        register(self, name, param)

    torch.nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


class _Light(TorchFunctionMode):
    """Build without the operators that torch has in Python for the meta device: their first call imports sympy.

    Initial values are not drawn, as there is no memory for them; ranges, from which rotary tables are computed, are
    real tensors.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensor = args[0] if args else kwargs.get("tensor")
        drawing = function in DRAWING or getattr(function, "__module__", "") == "torch.nn.init"
        if drawing and isinstance(tensor, torch.Tensor) and tensor.is_meta:
            return tensor
        if function in RANDOM:
            function = torch.empty
        if function in RANGES and kwargs.get("device") is None:
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


def find_auto_class(architecture: str, main_input_name: str, config: dict[str, Any]) -> tuple[str, str | None]:
    """The Auto class that loads `architecture`, and the task type that PEFT has for it (see `choose_head`)."""
    from transformers.models.auto import modeling_auto

    for auto_class, table, task_type in AUTO_CLASSES:
        names = getattr(modeling_auto, table, {}).values()
        if any(architecture == entry or (isinstance(entry, tuple) and architecture in entry) for entry in names):
            text_only = main_input_name == "input_ids" and not {"vision_config", "audio_config"} & config.keys()
            return auto_class, task_type if text_only else None
    return architecture, None


def model_classes(model_type: str | None, architecture: str) -> dict[str, str]:
    """What transformers' Auto classes load this type of model as: Auto class → class, `architecture` if it is one."""
    from transformers.models.auto import modeling_auto

    found: dict[str, str] = {}
    for name, auto in vars(modeling_auto).items():
        table = getattr(getattr(auto, "_model_mapping", None), "_model_mapping", {})
        if name.startswith("AutoModel") and (entry := table.get(model_type)):
            names = (entry,) if isinstance(entry, str) else entry
            found[name] = architecture if architecture in names else names[0]
    return found


Renamed = dict[str, tuple[str, str | None]]  # tensor name → key, and the pattern of the converter that makes it


def state_keys(
    checkpoint: Checkpoint, model: Any, renamed: Renamed | None = None
) -> tuple[dict[str, str], dict[str, str]]:
    """Map tensor names to keys of the state dict; and converted tensors (fused, split, permuted on load) to why."""
    state = model.state_dict()
    keys: dict[str, str] = {}
    converted: dict[str, str] = {}
    for name, (key, pattern) in (renamed or renamed_keys(checkpoint.tensors, model)).items():
        if key not in state:  # such as of a layer more than the model has
            continue
        if pattern is not None:
            converted[name] = pattern
        else:
            keys[name] = key
    return keys, converted


def renamed_keys(names: Iterable[str], model: Any, more: Iterable[str] = ()) -> Renamed:
    """What `from_pretrained` calls the tensors of files, for a model with `more` keys in its state dict."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = {**model.state_dict(), **dict.fromkeys(more, torch.empty(0))}
    found: Renamed = {}
    for name in names:
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if renamed not in state and name in state:
            renamed, pattern = rename_source_key(name, [], [], model.base_model_prefix, state)
        found[name] = renamed, pattern
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep optional packages that transformers imports from talking on stderr."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)
