"""The scripts that measure: what they make is a checkpoint, and what they print can be read."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import torch
from safetensors import safe_open

from scripts import bench, make_checkpoint
from tests.conftest import TINY_LLAMA, save_llama
from tests.test_eval import save_tokenizer

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module")
def small_7b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "small-7b"
    make_checkpoint.make("llama-2-7b", out, layers=3, scale_down=32, shard_bytes=10**6, device="cpu")
    return out


def read(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    return tensors


def test_the_checkpoint_loads(small_7b: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(small_7b, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (model.dtype, model.config.num_hidden_layers) == (torch.bfloat16, 3)
    norm, weight = model.model.norm.weight, model.model.layers[1].mlp.up_proj.weight.float()
    assert (norm == 1).all()
    assert weight.std() > 0.02  # heavier tails than a Gaussian's
    assert weight.abs().max() > 8 * weight.abs().median()


def test_index_and_shards_say_the_same(small_7b: Path) -> None:
    index = json.loads((small_7b / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in small_7b.glob("*.safetensors"))
    assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    assert len(files) > 1
    found = {}
    for name in files:
        with safe_open(small_7b / name, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), name)
        assert (small_7b / name).stat().st_size < 1.1 * 10**6
    assert found == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in read(small_7b).values())
    assert not list(small_7b.parent.glob("*.partial"))


def test_the_seed_decides(small_7b: Path, tmp_path: Path) -> None:
    for seed, workers in ((0, 1), (1, 3)):
        make_checkpoint.make("llama-2-7b", tmp_path / str(seed), 1, 32, seed, device="cpu", workers=workers)
    first, same, other = read(small_7b), read(tmp_path / "0"), read(tmp_path / "1")
    assert all(torch.equal(first[name], same[name]) for name in same)
    assert not torch.equal(same["lm_head.weight"], other["lm_head.weight"])
    assert not torch.equal(same["lm_head.weight"], same["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("shape", "files", "total", "name"),
    [  # as the index on the Hub says
        ("llama-2-7b", 2, 13_476_831_232, "model.layers.31.mlp.down_proj.weight"),
        ("llama-3-70b", 30, 141_107_412_992, "model.layers.79.self_attn.k_proj.weight"),
        ("mixtral-8x7b", 19, 93_405_585_408, "model.layers.31.block_sparse_moe.experts.7.w1.weight"),
        ("qwen3-30b-a3b", 16, 61_064_245_248, "model.layers.47.mlp.experts.127.gate_proj.weight"),
    ],
)
def test_names_and_shards_are_the_hubs(shape: str, files: int, total: int, name: str) -> None:
    tensors = make_checkpoint.tensors_of(make_checkpoint.make_config(shape, None, 1))
    size = make_checkpoint.SHARD_BYTES.get(shape, make_checkpoint.DEFAULT_SHARD_BYTES)
    assert len(make_checkpoint.split(tensors, size)) == files
    assert 2 * sum(tensor.count for tensor in tensors) == total
    assert name in {tensor.name for tensor in tensors}


def test_any_config_and_tied_embeddings(tmp_path: Path) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True, **TINY_LLAMA}
    (tmp_path / "config.json").write_text(json.dumps(config))
    make_checkpoint.make(str(tmp_path / "config.json"), tmp_path / "out", scale_down=2, device="cpu")
    tensors = read(tmp_path / "out")
    assert "lm_head.weight" not in tensors
    assert tensors["model.embed_tokens.weight"].shape == (256, 64)
    with pytest.raises(SystemExit, match="exists"):
        make_checkpoint.make("moe", tmp_path / "out")


def test_io_floor_moves_all_bytes(small_7b: Path, tmp_path: Path) -> None:
    sizes = [17 << 20, 0, 5]
    command = [
        sys.executable,
        str(SCRIPTS / "io_floor.py"),
        str(small_7b),
        str(tmp_path / "scratch"),
        "--device",
        "cpu",
    ]
    output = subprocess.check_output([*command, "--threads", "3", "--write", *map(str, sizes)], text=True)
    result = json.loads(output)
    assert result["read_bytes"] == sum(path.stat().st_size for path in small_7b.glob("*.safetensors"))
    assert [(tmp_path / "scratch" / str(i)).stat().st_size for i in range(3)] == sizes
    assert result["seconds"] >= result["start_seconds"] + result["read_seconds"] > 0


def test_io_floor_fails_aloud(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    command = [
        sys.executable,
        str(SCRIPTS / "io_floor.py"),
        str(tmp_path),
        str(tmp_path / "scratch"),
        "--device",
        "cpu",
    ]
    assert subprocess.run(command, capture_output=True).returncode != 0


def test_full_svd_loop_stops_in_time() -> None:
    from loftq_cli.quantizers import QUANTIZERS

    torch.manual_seed(0)
    W, quantizer = torch.randn(64, 128), QUANTIZERS["uniform"](bits=2, group_size=64)
    whole = bench.full_svd_loop(W, quantizer, 8, 3)
    assert whole.rounds == 3
    assert 0 < (W - whole.approximation).norm() < W.norm()
    for options in ({"limit": 0.0}, {"rounds": 1}):
        part = bench.full_svd_loop(W, quantizer, 8, 3, **options)
        assert (part.approximation, part.rounds) == (None, 1)
        assert part.seconds > part.svd_seconds > 0


def test_a_row_of_another_model_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small_7b: Path) -> None:
    """`bench.py quantize` without its runs: rows, floors and ratios, saved after every step."""
    quantize = bench.bench_quantize
    monkeypatch.setattr("bench_common.RESULTS", tmp_path)
    monkeypatch.setattr("bench_common.HERE", tmp_path)
    tensor = "model.layers.0.mlp.up_proj.weight"

    def run(command: list[str], out: Path, warm_up: int, runs: int) -> tuple[dict[str, Any], dict[str, Any]]:
        out.mkdir(exist_ok=True)
        (out / "file").write_bytes(b"12345")
        totals = {
            "weights": 1, "bits_per_weight": 2.3, "relative_error": 0.3, "peak_device_bytes": 0,
            "seconds": {"total": 1.0, "quantize": 0.5, "low_rank": 0.25},
        }  # fmt: skip
        config = {"bits": 2, "rank": 16, "iters": 5, "format": "gptq"}
        weights = [{"tensor": tensor, "relative_error": 0.3, "norm": 2.0}]
        report = {"totals": totals, "config": config, "weights": weights, "files": {"a": str(len(command))}}
        return {"wall": 2.0, "VmHWM": 1, "RssAnon": 1, "walls": {"timed": [2.0]}}, report

    monkeypatch.setattr(quantize, "timed_quantize", run)
    floor = {"wall": 1.0, "walls": [1.0, 2.0, 4.0]}
    monkeypatch.setattr(quantize, "io_floor", lambda model, sizes, scratch: floor if sizes else {})
    shape = {"shape": [1, 1], "weights": 1, "seconds": 7.0, "timed": [{"tensor": tensor, "error": 0.2}]}
    monkeypatch.setattr(quantize, "full_svd_shapes", lambda *arguments: iter([shape]))
    for model, nproc in (("small-7b", [1]), ("other", [1, 2]), ("small-7b", [1])):
        options = {"out": None, "runs": 1, "warm_up": 0, "svd": True, "svd_rounds": 1, "svd_seconds": 1.0}
        folder = small_7b.with_name(model)
        quantize.quantize(folder, bits=2, rank=16, iters=5, nproc=nproc, per_shape=1, **options)
    (file,) = tmp_path.glob("*.json")
    rows = json.loads(file.read_text())["rows"]
    assert [(row["model"], row["processes"]) for row in rows] == [("other", 1), ("other", 2), ("small-7b", 1)]
    assert [row["files that differ from the first row's"] for row in rows] == [[], ["a"], []]
    assert rows[2]["wall / floor"] == 2
    assert rows[2]["error ratio"] == pytest.approx(1.5)
    assert "| 7 | 1.5000 |" in sys.modules["bench_common"].table_row(rows[2], bench.COLUMNS["quantize"])


def test_memory_of_a_process_and_its_children() -> None:
    child = "import time; x = bytearray(64 << 20); time.sleep(0.4)"
    parent = f"import subprocess, sys, time; time.sleep(0.2); subprocess.run([sys.executable, '-c', {child!r}])"
    parent += "; time.sleep(1)"
    result = bench.bench_quantize.run_process([sys.executable, "-c", f"{child}; {parent}"])
    assert 64 << 20 <= result["RssAnon"] <= result["VmHWM"] < 256 << 20
    with pytest.raises(RuntimeError, match="exit code 3"):
        bench.bench_quantize.run_process([sys.executable, "-c", "raise SystemExit(3)"])


def test_the_table_of_perplexities_is_filled_by_several_calls(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from loftq_cli import quantize
    from loftq_cli.evaluate import evaluate

    perplexity, results, scratch = bench.bench_perplexity, tmp_path / "results", tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    for folder in ("RESULTS", "HERE"):
        monkeypatch.setattr(f"bench_common.{folder}", results)
    texts = {}  # their beginnings: to tokenize them whole takes longer than all the rest
    for name, part in (("Wikipedia", "wikipedia_eval"), ("Austen", "austen_persuasion")):
        assert perplexity.TEXTS[name] == SCRIPTS / f"data/{part}.txt"
        texts[name] = tmp_path / f"{part}.txt"
        texts[name].write_text(perplexity.TEXTS[name].read_text()[:1000])
    monkeypatch.setattr(perplexity, "TEXTS", texts)
    model = save_llama(tmp_path / "model")
    save_tokenizer(model)
    settings = ["--model", str(model), "--bits=2", "--ranks=4", "--samples=3", "--seqlen=64"]
    settings += ["--eval-seqlen=64", "--max-tokens=630"]

    # the first arm fails: it is said, nothing of it is saved, and the others go on
    arguments = [*settings, "--methods", "cloq", "qlora"]
    assert perplexity.main([*arguments, "--arm", "broken=--method absent"]) == 1
    said = capfd.readouterr()
    assert "--method absent" in said.err  # the reason
    assert said.err.endswith("failed: broken, 2 bits, rank 4\n")
    (file,) = results.iterdir()
    content = json.loads(file.read_text())
    source, *rows = content["rows"]
    assert [(row["method"], row["bits"], row["rank"]) for row in rows] == [("qlora", 2, 4), ("cloq", 2, 4)]
    assert [line.split("|")[1].strip() for line in said.out.splitlines()[2:]] == ["source", "qlora", "cloq"]
    assert not list(scratch.iterdir())
    assert str(tmp_path) not in file.read_text()
    assert "--calibration wikipedia_calibration.txt --samples 3 --seqlen 64" in rows[1]["flags"]
    assert "--calibration" not in rows[0]["flags"]

    # what stands there is what two other calls give
    calibration = {"calibration": str(SCRIPTS / "data/wikipedia_calibration.txt"), "samples": 3, "seqlen": 64}
    for row, options in zip(rows, ({}, calibration), strict=True):
        out = tmp_path / row["method"]
        quantize(model, out, method=row["method"], bits=2, rank=4, quantizer="uniform", format="dense", **options)
        for name, file_of_text in texts.items():
            measured = evaluate(out, file_of_text, str(model), seqlen=64, max_tokens=630)
            expected = {line.name: line.perplexity for line in measured.rows}
            assert measured.protocol == source["protocol"][name]
            assert source[f"{name} perplexity"] == pytest.approx(expected["source"], rel=1e-4)
            assert row[f"{name} perplexity"] == pytest.approx(expected["base + adapter"], rel=1e-4)
            assert row["base alone"][name] == pytest.approx(expected["base alone"], rel=1e-4)
            ratio = expected["base + adapter"] / expected["source"]
            assert row[f"{name}, × source"] == pytest.approx(ratio, rel=1e-4)
    values = {row[f"{name} perplexity"] for row in content["rows"] for name in perplexity.TEXTS}
    assert len(values) == 6  # none of them could stand for another
    for row in rows:
        assert row["seconds"] > row["stages, s"]["total"] > 0
        assert 0.1 < row["host, GiB"] < 8

    # a base that was cut off and is kept goes on where it was; how long it took is then not known
    kept = ["--methods", "qlora", "--again", "--cache", str(tmp_path / "kept")]
    assert perplexity.main([*settings, *kept]) == 0
    (base,) = (path for path in (tmp_path / "kept").iterdir() if path.is_dir())
    assert json.loads(file.read_text())["rows"][1]["seconds"] > 0
    file.write_text(json.dumps({**content, "rows": [source]}))
    shutil.rmtree(base)
    base.mkdir()  # by a run that was cut off early
    capfd.readouterr()
    assert perplexity.main([*settings, *kept[:2], *kept[3:]]) == 0
    assert "having gone on" in capfd.readouterr().err
    unknown = {"seconds": None, "host, GiB": ANY, "stages, s": ANY}
    assert json.loads(file.read_text())["rows"] == [source, {**rows[0], **unknown}]
    file.write_text(json.dumps(content))

    # what is there is not measured again, but for an arm with other settings, or where it is asked for
    calls = []

    def measure(
        model: Path, flags: list[str], evaluation: dict[str, int], with_source: bool, cache: None, again: bool
    ) -> dict[str, Any]:
        assert not with_source
        calls.append(flags)
        peaks = {"peak_device_bytes": 1, "peak_host_bytes": 1}
        totals = {"bits_per_weight": 2, "relative_error": 0, "seconds": {}, **peaks}
        texts = {name: {"base alone": 7.0, "base + adapter": 5.0} for name in perplexity.TEXTS}
        return {"process": None, "totals": totals, "texts": texts}

    monkeypatch.setattr(perplexity, "measure", measure)
    before = file.read_text()
    assert perplexity.main(arguments) == 0
    assert (calls, file.read_text()) == ([], before)
    assert "cloq, 2 bits, rank 4: there already" in capfd.readouterr().err
    assert perplexity.main([*arguments, "--samples=2"]) == 0  # qlora sees no text
    assert len(calls) == 1
    assert calls[0][calls[0].index("--samples") + 1] == "2"
    assert perplexity.main([*settings, "--methods", "qlora", "--again"]) == 0
    assert perplexity.main([*settings, "--arm", "more=--iters 9"]) == 0
    assert [flags[-2:] for flags in calls[1:]] == [["--format", "dense"], ["--iters", "9"]]
    rows = json.loads(file.read_text())["rows"]
    assert [(row["method"], row["Austen perplexity"]) for row in rows[1:]] == [("qlora", 5), ("cloq", 5), ("more", 5)]
    assert rows[0] == source
    with pytest.raises(SystemExit, match="other settings"):
        perplexity.main([*settings, "--max-tokens=100"])
    assert json.loads(file.read_text())["rows"] == rows


def test_the_runtime_is_measured_on_any_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runtime = bench.bench_runtime
    monkeypatch.setattr(sys.modules["bench_common"], "RESULTS", tmp_path)
    small = ["--layers=1", "--scale-down=32", "--tokens=16", "--context=4", "--runs=1"]
    assert runtime.main([*small, "--kinds", "16-bit", "packed 3", "packed 2"]) == 0
    (file,) = tmp_path.glob("runtime*.json")
    content = json.loads(file.read_text())
    rows = content["rows"]
    assert [(row["base"], row["bits"]) for row in rows] == [("16-bit", 16), ("packed", 3), ("packed", 2)]
    assert content["command"] == f"python scripts/bench.py runtime {' '.join(small)} --kinds 16-bit packed 3 packed 2"
    for row in rows:
        assert row["of its bytes"] <= 1.02
        assert row["training step, ms"] > 0 < row["decode step, ms"]
    printed = capsys.readouterr().out
    assert all(sys.modules["bench_common"].table_row(row, bench.COLUMNS["runtime"]) in printed for row in rows)


def test_calibrate_extrapolates_from_a_few_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["bench_common"], "RESULTS", tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    make_checkpoint.make("llama-2-7b", tmp_path / "model", layers=2, scale_down=32, device="cpu")
    bench.bench_calibrate.calibrate(tmp_path / "model", samples=4, seqlen=64, rank=4)
    (file,) = tmp_path.glob("calibrate*.json")
    cloq, _, few, more, whole = json.loads(file.read_text())["rows"]
    assert cloq["whole model, min"] * 60 == pytest.approx(cloq["wall, s"] + 30 * cloq["s per block"])
    epoch = (more["whole model, min"] - few["whole model, min"]) / 2
    assert whole["whole model, min"] == pytest.approx(few["whole model, min"] + 19 * epoch)
