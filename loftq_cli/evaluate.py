"""Perplexity on a text, of the source, the base alone and base + adapter: the same tokens, one protocol."""

from __future__ import annotations

import gc
import inspect
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from loftq_cli.calibration.sources import read_file
from loftq_cli.calibration.text import render
from loftq_cli.checkpoint.source import open_checkpoint
from loftq_cli.config import build_config
from loftq_cli.device import is_out_of_memory, resolve_device
from loftq_cli.errors import LoftqError
from loftq_cli.report import import_loader, install_line
from loftq_cli.stored import TUNED, read_tuned
from loftq_cli.verify import read_report

SEQLEN = 2048
LOGIT_BYTES = 1 << 27  # of float32 logits at a time: 256 tokens of a vocabulary of 128k

Progress = Callable[[str, int], AbstractContextManager[Callable[[str, int], None]]]


@dataclass(frozen=True)
class Row:
    """One model: mean negative log-likelihood in nats, and its exponential, which is inf beyond what a float holds."""

    name: str
    nll: float
    perplexity: float


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured: `tokens` were predicted, in `windows` of `seqlen` tokens each, as `protocol` says."""

    tokens: int
    windows: int
    seqlen: int
    protocol: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


def evaluate(
    out: Path,
    text: Path,
    source: str | None = None,
    adapter: Path | None = None,
    *,
    seqlen: int | None = None,
    max_tokens: int | None = None,
    batch_size: int = 1,
    device: str = "auto",
    progress: Progress = lambda label, total: nullcontext(lambda name, size: None),
) -> Evaluation:
    """Perplexity on `text` of base and base + adapter in `out`, with `source` of what they were made from, too.

    Args:
        out: a finished output of loftq that loads as AutoModelForCausalLM, with its tokenizer.
        text: a file as `--calibration` takes it; texts are joined by blank lines, conversations in the chat template.
        source: folder or Hub id.
        adapter: one that was trained from that of `out`, a folder as PEFT saves it, to be measured as well.
        seqlen: tokens of a window; None is 2048, or as many as the model has positions for.
        max_tokens: how many tokens of the text to take, from its beginning.
        batch_size: windows at a time.
        device: auto, cpu, cuda or cuda:N.
        progress: makes a bar from a label and the bytes of text that all models together go through.

    Raises:
        LoftqError: nothing can be measured; the hint says what to do.
    """
    report = read_report(out)
    _refuse_unloadable(out, report)
    place = resolve_device(build_config({"device": device}).device)
    texts = read_file(text)
    adapters = {"base + adapter": out / "loftq_init"}
    if adapter is not None:
        read_tuned(out, adapter)  # refuses what is no such adapter
        adapters[TUNED] = adapter
    made_from, checkpoint = report["source"], None
    notes: tuple[str, ...] = ()
    if source is not None:
        checkpoint = open_checkpoint(source, None if Path(source).is_dir() else made_from["revision"])
        if checkpoint.fingerprint != made_from["fingerprint"]:
            notes = (f"`{source}` is not the checkpoint that `{out}` was made from: its fingerprint differs",)
    # a torch.device, because PEFT moves a model whose map says "cpu" in letters to a GPU if it sees one
    arguments = {"device_map": {"": place}, "trust_remote_code": report["config"]["trust_remote_code"]}

    with _quiet(), _sentences(out, report, batch_size), torch.no_grad():
        from peft import PeftModel

        tokenizer = _tokenizer(out, report)
        content = "\n\n".join(entry if isinstance(entry, str) else render(entry, tokenizer) for entry in texts)
        ids = tokenizer(content, add_special_tokens=False).input_ids
        bos = tokenizer.bos_token_id
        windows = cut(ids[:max_tokens], bos, _window_length(out, report, seqlen))
        if windows.shape[1] < 2:
            raise LoftqError(f"`{text}` is too short: it has no token to predict", "give a longer text")
        token_bytes = len(content.encode()) / len(ids)
        rows: list[Row] = []
        models = len(adapters) + (2 if checkpoint else 1)
        with progress("evaluating", int(models * windows.numel() * token_bytes)) as advance:

            def measure(name: str, model: Any, causal: Any) -> None:
                total = 0.0
                for k, batch in enumerate(windows.split(batch_size)):
                    total += sum_nll(model, causal, batch.to(place))
                    advance(f"{name}, window {k * batch_size + len(batch)}", int(batch.numel() * token_bytes))
                nll = total / windows[:, 1:].numel()
                rows.append(Row(name, nll, math.exp(nll) if nll < 709 else nll * math.inf))  # nan stays nan

            if checkpoint is not None:
                model = _load(checkpoint.model, windows, revision=checkpoint.revision or "main", **arguments)
                measure("source", model, model)
                del model
            for name, folder in adapters.items():
                gc.collect()  # modules and hooks hold each other: without it, two models would be there at once
                torch.cuda.empty_cache()
                base = _load(str(out), windows, **arguments)
                model = PeftModel.from_pretrained(base, str(folder)).eval()
                if name == "base + adapter":
                    with model.disable_adapter():
                        measure("base alone", model, base)
                measure(name, model, base)
                del base, model
    (count, length), tokens = windows.shape, windows[:, 1:].numel()
    protocol = (
        f"perplexity = exp(mean negative log-likelihood) of {tokens} predicted tokens in {count} windows of {length} "
        f"tokens that do not overlap, {'without' if bos is None else 'each begun with'} BOS; the text is tokenized "
        "once without special tokens, an incomplete last window dropped unless it is the only one"
    )
    return Evaluation(tokens, count, length, protocol, tuple(rows), notes)


def cut(ids: list[int], bos: int | None, seqlen: int) -> Tensor:
    """Windows of `seqlen` tokens, Int64 [windows, seqlen], each begun with `bos` where there is one.

    What is left over is dropped; a text that does not fill one window is a shorter one.
    """
    prefix = [] if bos is None else [bos]
    step = seqlen - len(prefix)
    count = max(1, len(ids) // step)
    windows = torch.tensor(ids[: count * step], dtype=torch.int64).view(count, -1)
    return torch.cat([torch.tensor(prefix, dtype=torch.int64).expand(count, -1), windows], dim=1)


def sum_nll(model: Any, causal: Any, ids: Tensor) -> float:
    """Σ −log p in nats of all of `ids` [rows, tokens] but the first column; `causal` is the model inside PEFT's."""
    total = 0.0
    for at, logits in _logits(model, causal, ids):
        losses = cross_entropy(logits.float().flatten(0, 1), ids[:, at + 1].flatten(), reduction="none")
        total += losses.double().sum().item()
    return total


def _logits(model: Any, causal: Any, ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Positions [n] and their logits [rows, n, words], for all positions but the last, LOGIT_BYTES at a time.

    Only the model's own forward knows what it does after the head (scaling, capping), so that is called for some
    positions at a time, while its body computes once. Models that cannot leave positions out give all at once.
    """
    words = causal.get_output_embeddings().weight.shape[0]
    positions = torch.arange(ids.shape[1] - 1, device=ids.device)
    chunks = positions.split(max(1, LOGIT_BYTES // (4 * words * ids.shape[0])))
    if "logits_to_keep" not in inspect.signature(causal.forward).parameters or causal.base_model is causal:
        logits = model(input_ids=ids, use_cache=False).logits
        yield from ((at, logits[:, at]) for at in chunks)
        return
    with _computing_once(causal.base_model):
        for at in chunks:
            yield at, model(input_ids=ids, use_cache=False, logits_to_keep=at).logits


@contextmanager
def _computing_once(body: Any) -> Iterator[None]:
    """Have `body` keep its first output, and return that whenever it is called."""
    forward = body.forward
    kept: list[Any] = []

    def remember(*args: Any, **kwargs: Any) -> Any:
        if not kept:
            kept.append(forward(*args, **kwargs))
        return kept[0]

    body.forward = remember
    try:
        yield
    finally:
        body.forward = forward


def _load(model: str, windows: Tensor, **arguments: Any) -> Any:
    """The model in the dtype that its config names, ready for `windows`."""
    from transformers import AutoModelForCausalLM

    made: Any = AutoModelForCausalLM.from_pretrained(model, output_loading_info=True, **arguments)
    loaded, info = made
    if missing := sorted(info["missing_keys"]):
        raise LoftqError(f"`{model}` has no `{missing[0]}`, which transformers would draw at random")
    if (largest := int(windows.max())) >= (words := loaded.get_input_embeddings().weight.shape[0]):
        raise LoftqError(f"`{model}` knows {words} tokens, the tokenizer made number {largest}", "they must match")
    return loaded.eval()


def _tokenizer(out: Path, report: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(out), trust_remote_code=report["config"]["trust_remote_code"])
    except (OSError, ValueError):  # transformers' texts are about its own classes
        hint = f"copy tokenizer.json and tokenizer_config.json of `{report['source']['model']}` into it"
        raise LoftqError(f"`{out}` has no tokenizer that transformers can load", hint) from None


def _window_length(out: Path, report: dict[str, Any], seqlen: int | None) -> int:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(out), trust_remote_code=report["config"]["trust_remote_code"])
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    if seqlen is not None and seqlen > limit:
        raise LoftqError(f"`--seqlen {seqlen}`: `{out}` has {limit} positions", f"use `--seqlen {limit}` or less")
    return min(SEQLEN, limit) if seqlen is None else seqlen


def _refuse_unloadable(out: Path, report: dict[str, Any]) -> None:
    """Refuse what does not predict the next token, and what the installed packages cannot load."""
    if (auto_class := report["load"]["auto_class"]) != "AutoModelForCausalLM":
        what = f"`{out}` loads with {auto_class}: perplexity is of models that predict the next token"
        raise LoftqError(what, "give an output that loads with AutoModelForCausalLM")
    from packaging.requirements import Requirement  # transformers has it

    for requirement in map(Requirement, ["peft", *report["load"]["requirements"]]):
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            missing = f"`{out}` needs {requirement.name} to load, which is missing"
            raise LoftqError(missing, install_line(report)) from None
        if not requirement.specifier.contains(installed, prereleases=True):
            raise LoftqError(f"`{out}` needs {requirement} to load; installed is {installed}", install_line(report))
    import_loader(report)


@contextmanager
def _sentences(out: Path, report: dict[str, Any], batch_size: int) -> Iterator[None]:
    """Turn what loaders and forwards are known to raise into sentences."""
    try:
        yield
    except ImportError as error:
        raise LoftqError(f"`{out}` does not load: {error}", install_line(report)) from error
    except RuntimeError as error:
        if is_out_of_memory(error):
            smaller = "`--batch-size 1`, a smaller `--seqlen`" if batch_size > 1 else "a smaller `--seqlen`"
            raise LoftqError("the GPU's memory does not suffice", f"use {smaller}, or `--device cpu`") from error
        if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):  # gptqmodel's first forward
            raise LoftqError(
                f"torch cannot compile what computes `{out}`: {str(error).splitlines()[0]}",
                "install a C++ compiler, or set the environment variable TORCHDYNAMO_DISABLE=1",
            ) from error
        raise


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers and the formats' packages, which talk on both streams, from speaking between our lines."""
    from transformers.utils import logging as transformers_logging

    previous, bars = logging.root.manager.disable, transformers_logging.is_progress_bar_enabled()
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
        if bars:
            transformers_logging.enable_progress_bar()
