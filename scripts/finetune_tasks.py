"""The two tasks of `finetune.py`: what is trained on, what chooses the learning rate, what is held out.

A task has `steps`, `batch`, `count` places in its training data to draw from, `gather` (a batch from places), `loss`
and `evaluate`. Batches are of one shape, without padding that any token could see, so that a GPU can replay a step.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"
HEADLINES = DATA / "headlines.jsonl"
AUSTEN_TRAIN, AUSTEN_TEST = DATA / "austen_pride_and_prejudice.txt", DATA / "austen_persuasion.txt"
PROMPT = "Headline: {}\nIs this headline satirical? Answer:"
LABELS = (" no", " yes")
ROWS_AT_A_TIME = {"headlines": 200, "austen": 8}  # in an evaluation


@dataclass(frozen=True)
class Size:
    """How much of a task; all arms get the same.

    Attributes:
        steps: of training.
        batch: sequences in a step.
        tokens: in a sequence; longer headlines are left out, Austen is cut into windows.
        validation: headlines, or windows of the other novel, that choose the learning rate.
        test: headlines, or tokens of that novel before them, that are held out.
        rates: learning rates that the search begins with.
    """

    steps: int
    batch: int
    tokens: int
    validation: int
    test: int
    rates: tuple[float, ...]


SIZES = {  # the test of Austen is that of bench_perplexity
    "headlines": Size(steps=400, batch=32, tokens=48, validation=2000, test=4000, rates=(3e-4, 1e-3, 3e-3)),
    "austen": Size(steps=120, batch=8, tokens=512, validation=60, test=65536, rates=(1e-4, 3e-4, 1e-3)),
}


def split_headlines(size: Size) -> dict[str, list[dict[str, Any]]]:
    """Rows with "headline" and "satirical" as "test", "validation" and "train"; the file is shuffled already.

    Headlines that differ in spelling alone count once: no part holds what another does.
    """
    rows: dict[str, dict[str, Any]] = {}
    for line in HEADLINES.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows.setdefault(re.sub(r"\W", "", row["headline"].lower()), row)
    every, end = list(rows.values()), size.test + size.validation
    return {"test": every[: size.test], "validation": every[size.test : end], "train": every[end:]}


def digest(value: Any) -> str:
    """Names data in a row of results, so that one can see that two runs had the same."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def file_digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]


def draw(count: int, size: Size, seed: int) -> Any:
    """Places in the training data, Int64 [steps, batch]: shuffled passes over all of them, by the seed alone."""
    import torch

    generator, needed = torch.Generator().manual_seed(seed), size.steps * size.batch
    passes = [torch.randperm(count, generator=generator) for _ in range(-(-needed // count))]
    return torch.cat(passes)[:needed].view(size.steps, size.batch)


def mean(total: float, count: int) -> float | None:
    """None where it is not finite, which JSON has no word for."""
    return total / count if math.isfinite(total) else None


class Headlines:
    """Is a headline satire? The model learns to go on with " no" or " yes", as in any instruction tuning.

    What counts is which of the two it finds likelier, and −log of the right one's share among the two.
    """

    def __init__(self, tokenizer: Any, device: Any, size: Size) -> None:
        import torch

        words = [tokenizer(label, add_special_tokens=False).input_ids for label in LABELS]
        if any(len(ids) != 1 for ids in words) or words[0] == words[1]:
            raise ValueError(f"the tokenizer does not make one token of each of {LABELS}")
        self.size, self.words, self.parts = size, torch.tensor(words, device=device).flatten(), {}
        for part, rows in split_headlines(size).items():
            texts = tokenizer([PROMPT.format(row["headline"]) for row in rows]).input_ids
            kept = [(ids, row["satirical"]) for ids, row in zip(texts, rows, strict=True) if len(ids) <= size.tokens]
            if not kept:
                raise ValueError(f"no headline has at most {size.tokens} tokens with its question")
            filled = [ids + [ids[-1]] * (size.tokens - len(ids)) for ids, _ in kept]  # no token sees what follows it
            last, label = [len(ids) - 1 for ids, _ in kept], [label for _, label in kept]
            self.parts[part] = tuple(torch.tensor(column, device=device) for column in (filled, last, label))
        self.count = len(self.parts["train"][0])
        self.sizes = {part: len(columns[0]) for part, columns in self.parts.items()}

    def gather(self, places: Any) -> tuple[Any, ...]:
        return tuple(column[places] for column in self.parts["train"])

    def end(self, tuned: Any, ids: Any, last: Any) -> Any:
        """What the head sees at the end of the question, [rows, hidden]."""
        hidden = tuned.hidden(ids)
        return hidden.gather(1, last[:, None, None].expand(-1, 1, hidden.shape[-1]))[:, 0]

    def loss(self, tuned: Any, ids: Any, last: Any, label: Any) -> Any:
        from torch.nn.functional import cross_entropy

        return cross_entropy(tuned.head(self.end(tuned, ids, last)).float(), self.words[label])

    def evaluate(self, tuned: Any, part: str) -> dict[str, float | None]:
        from torch.nn.functional import cross_entropy

        columns = self.parts[part]
        count, right, nll = len(columns[0]), 0, 0.0
        at_a_time = ROWS_AT_A_TIME["headlines"]
        for ids, last, label in zip(*(column.split(at_a_time) for column in columns), strict=True):
            logits = tuned.head_of(self.words, self.end(tuned, ids, last))
            right += int((logits.argmax(dim=1) == label).sum())
            nll += float(cross_entropy(logits.double(), label, reduction="sum"))
        return {"nll": mean(nll, count), "accuracy": right / count if math.isfinite(nll) else None}


class Austen:
    """The prose of one novel, measured on another as `loftq eval` does; a later part of that chooses the rate.

    The end of the first would choose rates that learn it by heart: trained on for more than three passes, it goes on
    getting better at it when it has long been getting worse at the other.
    """

    def __init__(self, tokenizer: Any, device: Any, size: Size) -> None:
        import torch

        from loftq_cli.evaluate import cut

        bos = tokenizer.bos_token_id
        self.size, self.device, self.prefix = size, device, [] if bos is None else [bos]
        train, test = (
            tokenizer(file.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
            for file in (AUSTEN_TRAIN, AUSTEN_TEST)
        )
        step = size.tokens - len(self.prefix)
        held_out = test[: size.test], test[size.test : size.test + size.validation * step]
        if len(train) < step or len(held_out[1]) < size.validation * step:
            raise ValueError(f"{AUSTEN_TRAIN.name} or {AUSTEN_TEST.name} is too short")
        self.text = torch.tensor(train, device=device)
        self.windows = {
            part: cut(ids, bos, size.tokens) for part, ids in zip(("test", "validation"), held_out, strict=True)
        }
        self.count = len(train) - step + 1
        self.sizes = {"train": len(train)} | {part: windows[:, 1:].numel() for part, windows in self.windows.items()}

    def gather(self, places: Any) -> tuple[Any, ...]:
        import torch

        step = self.size.tokens - len(self.prefix)
        ids = self.text[places[:, None] + torch.arange(step, device=self.device)]
        begin = torch.tensor(self.prefix, dtype=torch.int64, device=self.device).expand(len(places), -1)
        return (torch.cat([begin, ids], dim=1),)

    def loss(self, tuned: Any, ids: Any) -> Any:
        from torch.nn.functional import cross_entropy

        return cross_entropy(tuned.head(tuned.hidden(ids)[:, :-1]).float().flatten(0, 1), ids[:, 1:].flatten())

    def evaluate(self, tuned: Any, part: str) -> dict[str, float | None]:
        from loftq_cli.evaluate import sum_nll

        windows = self.windows[part]
        batches = windows.to(self.device).split(ROWS_AT_A_TIME["austen"])
        nll = mean(sum(sum_nll(tuned.model, tuned.causal, batch) for batch in batches), windows[:, 1:].numel())
        return {"nll": nll, "perplexity": None if nll is None or nll > 700 else math.exp(nll)}


def write_text(sizes: dict[str, Size], file: Path) -> Path:
    """What is trained on, as a text to calibrate with: the novel, and as much of headlines with their answers."""
    prose = AUSTEN_TRAIN.read_text(encoding="utf-8")
    answered = [
        PROMPT.format(row["headline"]) + LABELS[row["satirical"]]
        for row in split_headlines(sizes["headlines"])["train"]
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    partial.write_text("\n\n".join([prose, "\n\n".join(answered)[: len(prose)], ""]), encoding="utf-8")
    return partial.replace(file)  # another process may be reading it


TASKS = {"headlines": Headlines, "austen": Austen}


def described(sizes: dict[str, Size]) -> dict[str, Any]:
    """What results of the same table must have in common: sizes, prompt, and the content of files."""
    texts = {"headlines": (HEADLINES,), "austen": (AUSTEN_TRAIN, AUSTEN_TEST)}
    shown = {
        name: {**asdict(size), "rates": list(size.rates), "files": [file_digest(file) for file in texts[name]]}
        for name, size in sizes.items()
    }
    shown["headlines"]["prompt"] = PROMPT
    return shown
