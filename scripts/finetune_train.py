"""One model in memory, whose adapter is trained again and again from the same start: several of it at once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench_common import now, say
from finetune_tasks import digest, draw

CURVE = 10  # steps that a point of a loss curve averages
WARM_UP, CLIP = 0.1, 1.0  # part of the steps in which the rate rises; largest norm of a gradient


class Tuned:
    """A base, frozen in its own dtype, and LoRA adapters in float32; matrices multiply in the base's dtype.

    Every training that is done at once has an adapter of its own, on the one base.

    Attributes:
        adapters: the trained parameters of each, by names that are the same for all.
        start: what they begin with.
    """

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
        self.names = [self.model.active_adapter]
        self.adapters = [self.trained()]
        self.start = {name: p.detach().clone() for name, p in self.adapters[0].items()}

    def trained(self) -> dict[str, Any]:
        """The parameters of the active adapter."""
        own = self.model.active_adapter
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        assert named
        assert all(str(p.dtype) == "torch.float32" and "lora_" in name for name, p in named.items())
        return {".".join(part for part in name.split(".") if part != own): p for name, p in named.items()}

    def use(self, number: int) -> None:
        """Have the model computed with that adapter, which is made where it is not there."""
        while number >= len(self.names):
            self.names.append(f"adapter-{len(self.names)}")
            self.model.add_adapter(self.names[-1], self.model.peft_config[self.names[0]])
            self.model.set_adapter(self.names[-1])
            self.adapters.append(self.trained())
        if self.model.active_adapter != self.names[number]:
            self.model.set_adapter(self.names[number])

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Inside, matrices multiply in the base's dtype: where that is not float32, PEFT makes inputs so in vain."""
        import torch
        from peft.helpers import disable_input_dtype_casting

        if self.dtype == torch.float32:
            yield
            return
        rounded = torch.autocast(
            self.device.type, self.dtype, cache_enabled=False
        )  # a graph must not hold cached casts
        with disable_input_dtype_casting(self.model), rounded:
            yield

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

    def reset(self, seed: int, number: int = 0) -> None:
        """The start again. Where it is zero, lora_A is drawn anew as PEFT draws it: for all arms the same by seed."""
        import torch

        self.use(number)
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, p in self.adapters[number].items():
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

    def gradients(self, count: int) -> Any:
        """Those of the first adapters in one vector."""
        import torch

        return torch.cat([p.grad.flatten() for adapter in self.adapters[:count] for p in adapter.values()])

    def stepper(self, task: Any, examples: list[tuple[Any, ...]]) -> Callable[..., list[Any]]:
        """A function of a batch for each adapter: returns their losses and leaves gradients.

        On a GPU it replays recorded kernels. They are small: to launch them one by one takes ten times as long as to
        run them, and those of several adapters run side by side.
        """
        import torch

        def plain(number: int, batch: tuple[Any, ...]) -> Any:
            self.use(number)
            for p in self.adapters[number].values():
                p.grad = None
            with self.autocast():
                loss = task.loss(self, *batch)
            loss.backward()
            return loss.detach()

        def launched(batches: list[tuple[Any, ...]]) -> list[Any]:
            return [plain(number, batch) for number, batch in enumerate(batches)]

        if not self.graphs:
            return launched
        inputs = [tuple(column.clone() for column in example) for example in examples]
        streams = [torch.cuda.Stream() for _ in inputs]

        def beside(times: int) -> list[Any]:
            losses, main = [], torch.cuda.current_stream()
            for number, (stream, batch) in enumerate(zip(streams, inputs, strict=True)):
                stream.wait_stream(main)
                with torch.cuda.stream(stream):
                    losses += [plain(number, batch) for _ in range(times)]
            for stream in streams:
                main.wait_stream(stream)
            return losses

        beside(3)  # recording wants libraries and allocator warm
        expected = self.gradients(len(inputs))
        graph = torch.cuda.CUDAGraph()
        for adapter in self.adapters:
            for p in adapter.values():
                p.grad = None  # so that the graph makes gradients of its own, and every replay writes them anew
        try:
            with torch.cuda.graph(graph):
                losses = beside(1)
            graph.replay()
            if (self.gradients(len(inputs)) - expected).norm() > 0.05 * expected.norm():
                raise RuntimeError("it gives other gradients")
        except RuntimeError as error:
            say(f"  no CUDA graph, and so slower: {str(error).splitlines()[0]}")
            self.graphs = False
            torch.cuda.synchronize()
            return launched

        def replay(batches: list[tuple[Any, ...]]) -> list[Any]:
            for recorded, given in zip(inputs, batches, strict=True):
                for column, values in zip(recorded, given, strict=True):
                    column.copy_(values)
            graph.replay()
            return losses

        return replay

    def train(self, task: Any, pairs: list[tuple[int, float]]) -> list[dict[str, Any]]:
        """Train an adapter for each seed and rate, with AdamW; the rate rises and then falls in lines.

        Returns:
            What a row says of each; the seconds are those of all.
        """
        import torch

        places = [draw(task.count, task.size, seed) for seed, _ in pairs]
        for number, (seed, _) in enumerate(pairs):
            self.reset(seed, number)
        self.model.train()
        on_device, begin = [drawn.to(self.device) for drawn in places], now()
        groups = [{"params": list(self.adapters[k].values()), "lr": lr} for k, (_, lr) in enumerate(pairs)]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=self.device.type == "cuda" or None)
        step_of = self.stepper(task, [task.gather(drawn[0]) for drawn in on_device])
        steps = task.size.steps
        losses = torch.zeros(steps, len(pairs), device=self.device)
        recorded = now()
        for step in range(steps):
            losses[step] = torch.stack(step_of([task.gather(drawn[step]) for drawn in on_device]))
            for group, (_, lr) in zip(optimizer.param_groups, pairs, strict=True):
                group["lr"] = lr * rate(step, steps)
                torch.nn.utils.clip_grad_norm_(group["params"], CLIP)
            optimizer.step()
        end = now()
        means = torch.stack([part.mean(0) for part in losses.double().cpu().split(CURVE)], dim=1).tolist()
        return [
            {
                "data": digest(drawn.tolist()), "dtype": str(self.dtype).removeprefix("torch."), "graph": self.graphs,
                "at once": len(pairs), "train, s": round(end - begin, 2),
                "step, ms": round((end - recorded) / steps * 1e3, 2),
                "curve": [round(loss, 4) if math.isfinite(loss) else None for loss in curve],
            }
            for drawn, curve in zip(places, means, strict=True)
        ]  # fmt: skip


def rate(step: int, steps: int) -> float:
    """The part of the learning rate in a step: up to 1 in the first tenth, then down towards 0."""
    warm_up = max(1, round(WARM_UP * steps))
    return (step + 1) / warm_up if step < warm_up else (steps - step) / (steps - warm_up + 1)


def run(tuned: Tuned, task: Any, pairs: list[tuple[int, float]]) -> list[dict[str, Any]]:
    """Train for each seed and rate, then measure on what chooses the rate and on what is held out."""
    begin, rows = time.perf_counter(), []
    for number, ((seed, lr), trained) in enumerate(zip(pairs, tuned.train(task, pairs), strict=True)):
        tuned.use(number)
        measured = {part: tuned.evaluate(task, part) for part in ("validation", "test")}
        rows.append({"seed": seed, "lr": lr, **measured, **trained})
    seconds = round(time.perf_counter() - begin, 2)  # of all
    return [{**row, "seconds": seconds} for row in rows]
