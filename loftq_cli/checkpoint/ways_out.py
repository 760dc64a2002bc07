"""What to type where a checkpoint cannot be taken as it is: lines of Python that make one that can.

They are there to be pasted, and the files they are made from are not to be trusted: whatever comes from these is quoted
or a plain name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

CONVERTED, MERGED = "safetensors-model", "merged-model"
# quantization methods that transformers undoes itself: what to hand to `from_pretrained`, and the call that follows
UNDONE = {
    "mxfp4": ("Mxfp4Config", "Mxfp4Config(dequantize=True)", ""),
    "bitsandbytes": ("", "", ".dequantize()"),
}
PEFT_CLASSES = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}


def source_argument(model: str, revision: str | None) -> str:
    """The first arguments of `from_pretrained`."""
    return json.dumps(model) + (f", revision={json.dumps(revision)}" if revision else "")


def conversion_lines(
    source: str, config: Mapping[str, Any], gguf: str | None = None, quantized_by: str | None = None
) -> str:
    """Three lines that save the checkpoint as plain safetensors; `source` is its `source_argument`."""
    remote = "auto_map" in config
    names = config.get("architectures")
    # `isidentifier`, because the line is there to be run
    named = isinstance(names, list) and names and str(names[0]).isidentifier() and not remote
    name = names[0] if names and named else "AutoModelForCausalLM"
    imports, extra = ["AutoTokenizer", name], ", trust_remote_code=True" if remote else ""
    after, plainly = "", ""
    if quantized_by in UNDONE:
        imported, value, after = UNDONE[quantized_by]
        # else transformers would save under the names of the quantized file, or fail at it
        plainly = ", save_original_format=False"
        imports += [imported] if imported else []
        extra += f", quantization_config={value}" if value else ""
    if gguf:
        imports, extra = [*imports, "GgufConfig"], ", quantization_config=GgufConfig(dequantize=True)"
        source += f", gguf_file={json.dumps(gguf)}"
    return (
        f"from transformers import {', '.join(imports)}\n"
        f'{name}.from_pretrained({source}{extra}, dtype="auto"){after}.save_pretrained("{CONVERTED}"{plainly})\n'
        f'AutoTokenizer.from_pretrained({source}).save_pretrained("{CONVERTED}")'
    )


def merge_lines(source: str, adapter: Mapping[str, Any], has_tokenizer: bool) -> str:
    """Lines that merge a PEFT adapter into its base; `adapter` is the content of its adapter_config.json."""
    name = PEFT_CLASSES.get(str(adapter.get("task_type")), PEFT_CLASSES["CAUSAL_LM"])
    lines = [
        f"from peft import {name}",
        f'model = {name}.from_pretrained({source}, dtype="auto")',
        f'model.merge_and_unload().save_pretrained("{MERGED}")',
    ]
    if has_tokenizer:
        lines += [
            "from transformers import AutoTokenizer",
            f'AutoTokenizer.from_pretrained({source}).save_pretrained("{MERGED}")',
        ]
    return "\n".join(lines)
