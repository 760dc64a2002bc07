"""Reading ahead, batches, and what happens where a GPU's memory is too small."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loftq_cli import batches, pipeline, worker
from loftq_cli.checkpoint import loader
from loftq_cli.checkpoint.loader import Loader, ahead
from loftq_cli.checkpoint.reader import TensorInfo, read_header
from loftq_cli.checkpoint.source import open_checkpoint
from loftq_cli.config import QuantizeConfig
from loftq_cli.errors import LoftqError
from loftq_cli.jobs import WeightBatch, make_batches
from loftq_cli.journal import Journal
from loftq_cli.outputs import Outputs
from loftq_cli.plan import Plan, make_plan
from loftq_cli.room import Room
from loftq_cli.targets import guess_targets
from loftq_cli.verify import verify

OPTIONS = {"bits": 2, "rank": 4, "iters": 2, "group_size": 32}


def test_loaded_in_pieces_is_what_the_file_holds(
    sharded_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "PIECE_BYTES", 1000)
    source = Loader(torch.device("cpu"))
    for path in sharded_llama.glob("*.safetensors"):
        expected = load_file(path)
        infos = read_header(path).tensors
        for name, info in infos.items():
            weights, seconds = source.load([(path, info), (path, info)]).wait()
            assert torch.equal(weights, torch.stack([expected[name]] * 2))
            assert seconds > 0
    cut = tmp_path / path.name
    cut.write_bytes(path.read_bytes()[: info.offset + 10])
    with pytest.raises(LoftqError, match="ends inside tensor"):
        source.load([(cut, info)]).wait()
    source.close()


def test_ahead_begins_so_many_and_keeps_the_order() -> None:
    begun: list[int] = []
    for number, (item, result) in enumerate(ahead(range(5), lambda i: begun.append(i) or i * i, depth=2)):
        assert (item, result) == (number, number * number)
        assert begun == list(range(min(5, number + 3)))


def test_who_asks_for_more_than_all_is_alone() -> None:
    room, beside, most, lock = Room(10), [0], [0, 0], threading.Lock()

    def work(share: int) -> None:
        with room.share(share):
            with lock:
                beside[0] += share
                if share < 10:
                    most[0] = max(most[0], beside[0])
                else:
                    most[1] = max(most[1], beside[0] - share)
            time.sleep(0.003)
            with lock:
                beside[0] -= share

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, [5, 4, 50, 3, 2, 30, 5, 5] * 4))
    assert 5 < most[0] <= 10  # several at once, never more than there is room for
    assert most[1] == 0  # nothing beside the large ones
    with room.share(room.whole):  # all of it is free again
        pass


def plan(model: Path, **options: object) -> Plan:
    return pipeline.plan_quantize(str(model), QuantizeConfig(**{**OPTIONS, **options}, device="cpu"))


def test_batches_hold_like_weights_whole_and_once(sharded_llama: Path) -> None:
    jobs = plan(sharded_llama, bits_for={"*.k_proj": 4}, format="dense").jobs
    for elements in (0, 10_000, 20_000, 1 << 30):
        batches = make_batches(jobs, lambda job: True, elements)
        assert sorted(job.tensor for batch in batches for job in batch.jobs) == sorted(job.tensor for job in jobs)
        for batch in batches:
            assert len({(job.shape, job.bits) for job in batch.jobs}) == 1
            assert len(batch.jobs) == 1 or batch.parameters <= elements
    assert {len(batch.jobs) for batch in make_batches(jobs, lambda job: False, 1 << 30)} == {1}
    assert max(len(batch.jobs) for batch in batches) > 1


@pytest.mark.parametrize("options", [{}, {"bits": 4, "quantizer": "nf"}, {"method": "qlora"}], ids=str)
def test_in_batches_the_result_is_the_same_but_for_the_order_of_sums(
    sharded_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    monkeypatch.setattr("loftq_cli.plan.BATCH_ELEMENTS", {"cpu": 0})
    alone = pipeline.quantize(sharded_llama, tmp_path / "alone", **{**OPTIONS, **options, "device": "cpu"})
    monkeypatch.setattr("loftq_cli.plan.BATCH_ELEMENTS", {"cpu": 1 << 16})
    made = plan(sharded_llama, **options)
    batches = [step for shard in made.shards for step in shard.steps if hasattr(step, "jobs")]
    assert max(len(batch.jobs) for batch in batches) > 1
    together = pipeline.run_plan(made, tmp_path / "together")
    assert verify(tmp_path / "together", str(sharded_llama)).violations == ()
    for one, other in zip(alone["weights"], together["weights"], strict=True):
        assert one["name"] == other["name"]
        assert one["relative_error"] == pytest.approx(other["relative_error"], rel=2e-3)
    assert alone["totals"]["relative_error"] == pytest.approx(together["totals"]["relative_error"], rel=2e-4)


def test_too_little_gpu_memory_means_smaller_pieces_and_then_the_cpu(
    sharded_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Played on a CPU: batches of two and one weight do not fit `the GPU`."""
    monkeypatch.setattr("loftq_cli.plan.BATCH_ELEMENTS", {"cpu": 1 << 16})
    original, tried = batches.quantize_batch, []

    def small(plan: Plan, batch: object, weights: torch.Tensor) -> object:
        tried.append(len(weights))
        if len(weights) > 1 or (batch.jobs[0].tensor.endswith("down_proj.weight") and tried.count(1) % 2):
            library = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
            raise library if len(tried) % 2 else torch.OutOfMemoryError
        return original(plan, batch, weights)

    monkeypatch.setattr(batches, "quantize_batch", small)
    loads, load = [], Loader.load

    def full(self: Loader, tensors: object, *device: torch.device) -> object:
        loads.append(device)
        if len(loads) < 3:
            raise torch.OutOfMemoryError
        return load(self, tensors, *device)

    monkeypatch.setattr(Loader, "load", full)
    out = tmp_path / "out"
    report = pipeline.quantize(sharded_llama, out, device="cpu", **OPTIONS)
    assert loads[:4] == [(), (), (torch.device("cpu"),), ()]
    assert max(tried) > 1
    assert tried.count(1) > report["totals"]["weights"]  # some were tried twice
    assert verify(out, str(sharded_llama)).violations == ()


def test_results_travel_as_one_tensor_and_come_apart_again() -> None:
    tensors = [
        torch.randn(3, 5).half(), torch.arange(7, dtype=torch.uint8), torch.randn(2, 3, dtype=torch.float64),
        torch.randn(4, 6).T, torch.zeros(0, 3), torch.tensor(2.5), torch.randint(9, (3,), dtype=torch.int32),
    ]  # fmt: skip
    flat = worker.flatten(tensors)
    assert flat.dtype == torch.uint8
    assert flat.numel() == sum(tensor.nbytes for tensor in tensors)
    for tensor, back in zip(tensors, worker.unflatten(flat, tensors), strict=True):
        assert back.dtype == tensor.dtype
        assert torch.equal(back, tensor)


def test_a_gpu_rehearses_what_the_run_begins_with(sharded_llama: Path) -> None:
    checkpoint = open_checkpoint(str(sharded_llama), None)
    config = QuantizeConfig(**OPTIONS, device="cpu")
    rehearsed = make_plan(checkpoint, config, guess_targets(checkpoint))
    assert rehearsed.jobs == plan(sharded_llama).jobs
    assert rehearsed.shards == plan(sharded_llama).shards  # so its first batch is that of the run
    batches.rehearse(checkpoint, config)


def test_what_is_copied_comes_a_shard_early(sharded_llama: Path, tmp_path: Path) -> None:
    planned = plan(sharded_llama)
    assert len(planned.shards) >= 3
    journal = Journal(tmp_path / "work")
    with Outputs(planned, tmp_path / "out", journal, torch.device("cpu")) as outputs:
        steps = outputs.missing()
    assert sorted(map(repr, steps)) == sorted(repr(step) for shard in planned.shards for step in shard.steps)
    number = {shard.file: i for i, shard in enumerate(planned.shards)}
    batches = [number[step.first.file] for step in steps if isinstance(step, WeightBatch)]
    assert batches == sorted(batches)
    for position, step in enumerate(steps):
        if isinstance(step, TensorInfo) and number[step.file] > 0:
            following = next(s for s in steps[position:] if isinstance(s, WeightBatch))
            assert number[following.first.file] == number[step.file] - 1
