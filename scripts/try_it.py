"""Load an output of `loftq quantize` with the two printed lines, take three training steps, and generate a sentence.

Usage: python scripts/try_it.py OUT [PROMPT]
"""

from __future__ import annotations

import sys
import warnings

warnings.filterwarnings("ignore")
PROMPT = "What is the capital of France, and what is it known for?"


def main(folder: str, prompt: str) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    base = AutoModelForCausalLM.from_pretrained(folder)
    model = PeftModel.from_pretrained(base, folder, subfolder="loftq_init", is_trainable=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    model.train()
    text = "It is a truth universally acknowledged, that a single man in possession of a good fortune must want a wife."
    batch = tokenizer(text, return_tensors="pt").to(model.device)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)
    losses = []
    for _ in range(3):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(f"{loss.item():.3f}")
    print("training loss on one sentence, three steps:", " → ".join(losses))

    model.eval()
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    answer = model.generate(**chat, max_new_tokens=40, do_sample=False)[0, chat["input_ids"].shape[1] :]
    print(f"{prompt}\n→ {tokenizer.decode(answer, skip_special_tokens=True)}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else PROMPT)
