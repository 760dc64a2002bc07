"""One model with its adapter in memory, trained again and again from the same start."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from bench_common import now, say
from finetune_tasks import digest, draw, mean

CURVE = 10  # steps that a point of a loss curve averages
WARM_UP, CLIP = 0.1, 1.0  # part of the steps in which the rate rises; largest norm of a gradient


class Tuned:
    """A base, frozen in its own dtype, and a LoRA adapter in float32; matrices multiply in the base's dtype."""

    def __init__(self, base: Path, rank: int, device: Any, fresh: bool, graphs: bool = True) -> None:
        """Load `base`, with the adapter that loftq gave it, or with a new one on the same layers where `fresh`."""
        import torch
        from peft import LoraConfig, PeftModel, get_peft_model
        from transformers import AutoModelForCausalLM

        self.causal: Any = AutoModelForCausalLM.from_pretrained(base, dtype="auto").to(device)
        if fresh:
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
            self.model: Any = get_peft_model(self.causal, config)
        else:
            self.model = PeftModel.from_pretrained(self.causal, str(base), subfolder="loftq_init", is_trainable=True)
        self.device, self.dtype = torch.device(device), self.causal.dtype
        if self.device.index is not None:
            torch.cuda.set_device(self.device)  # graphs are recorded on the current one
        self.graphs = graphs and self.device.type == "cuda"
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        assert named
        assert all(p.dtype == torch.float32 and "lora_" in name for name, p in named)
        self.parameters = dict(named)
        self.start = {name: p.detach().clone() for name, p in named}

    def autocast(self) -> AbstractContextManager[Any]:
        import torch

        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype, cache_enabled=False)  # a graph must not hold cached casts

    def hidden(self, ids: Any) -> Any:
        """What the head sees, [rows, tokens, hidden]. The mask is given: made inside, a GPU would be waited for."""
        import torch

        length = ids.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()[None, None]
        return self.causal.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state

    def head(self, hidden: Any) -> Any:
        return self.causal.get_output_embeddings()(hidden)

    def head_of(self, words: Any, hidden: Any) -> Any:
        """Logits of some words, in float32: in bfloat16 close ones would be equal."""
        import torch

        head = self.causal.get_output_embeddings()
        assert head.bias is None
        with torch.autocast(self.device.type, enabled=False):
            return hidden.float() @ head.weight[words].float().T

    def reset(self, seed: int) -> None:
        """The start again. Where it is zero, lora_A is drawn anew as PEFT draws it: for all arms the same by seed."""
        import torch

        torch.manual_seed(seed)
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(self.start[name])
                if "lora_A" in name:
                    drawn = torch.empty(p.shape)
                    torch.nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
                    if not self.start[name.replace("lora_A", "lora_B")].any():
                        p.copy_(drawn)

    def evaluate(self, task: Any, part: str) -> dict[str, float | None]:
        import torch

        self.model.eval()
        with torch.no_grad(), self.autocast():
            return task.evaluate(self, part)

    def gradients(self) -> Any:
        """All of them in one vector."""
        import torch

        return torch.cat([p.grad.flatten() for p in self.parameters.values()])

    def stepper(self, task: Any, example: tuple[Any, ...]) -> Callable[..., Any]:
        """A function of a batch that returns its loss and leaves gradients; on a GPU it replays recorded kernels.

        They are small, and to launch them one by one takes ten times as long as to run them.
        """
        import torch

        def plain(*batch: Any) -> Any:
            for p in self.parameters.values():
                p.grad = None
            with self.autocast():
                loss = task.loss(self, *batch)
            loss.backward()
            return loss.detach()

        if not self.graphs:
            return plain
        inputs = tuple(column.clone() for column in example)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # recording wants libraries and allocator warm
            for _ in range(3):
                plain(*inputs)
        torch.cuda.current_stream().wait_stream(aside)
        expected = self.gradients()
        graph = torch.cuda.CUDAGraph()
        for p in self.parameters.values():
            p.grad = None  # so that the graph makes gradients of its own, and every replay writes them anew
        try:
            with torch.cuda.graph(graph):
                loss = plain(*inputs)
            graph.replay()
            if (self.gradients() - expected).norm() > 0.05 * expected.norm():
                raise RuntimeError("it gives other gradients")
        except RuntimeError as error:
            say(f"  no CUDA graph, and so slower: {str(error).splitlines()[0]}")
            self.graphs = False
            torch.cuda.synchronize()
            return plain

        def replay(*batch: Any) -> Any:
            for column, given in zip(inputs, batch, strict=True):
                column.copy_(given)
            graph.replay()
            return loss

        return replay

    def train(self, task: Any, lr: float, seed: int) -> dict[str, Any]:
        """Train from the start, with AdamW and a rate that rises and then falls in lines; what a row says of it."""
        import torch

        places = draw(task.count, task.size, seed)
        self.reset(seed)
        self.model.train()
        on_device, begin = places.to(self.device), now()
        parameters = list(self.parameters.values())
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=self.device.type == "cuda" or None)
        step_of, steps = self.stepper(task, task.gather(on_device[0])), task.size.steps
        losses = torch.zeros(steps, device=self.device)
        recorded = now()
        for step in range(steps):
            losses[step] = step_of(*task.gather(on_device[step]))
            for group in optimizer.param_groups:
                group["lr"] = lr * rate(step, steps)
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
        end = now()
        curve = [mean(float(part.sum()), len(part)) for part in losses.double().cpu().split(CURVE)]
        return {
            "data": digest(places.tolist()), "dtype": str(self.dtype).removeprefix("torch."), "graph": self.graphs,
            "train, s": round(end - begin, 2), "step, ms": round((end - recorded) / steps * 1e3, 2),
            "curve": [None if loss is None else round(loss, 4) for loss in curve],
        }  # fmt: skip


def rate(step: int, steps: int) -> float:
    """The part of the learning rate in a step: up to 1 in the first tenth, then down towards 0."""
    warm_up = max(1, round(WARM_UP * steps))
    return (step + 1) / warm_up if step < warm_up else (steps - step) / (steps - warm_up + 1)


def run(tuned: Tuned, task: Any, lr: float, seed: int) -> dict[str, Any]:
    """Train, then measure on what chooses the rate and on what is held out."""
    begin = time.perf_counter()
    trained = tuned.train(task, lr, seed)
    measured = {part: tuned.evaluate(task, part) for part in ("validation", "test")}
    return {**measured, "seconds": round(time.perf_counter() - begin, 2), **trained}
