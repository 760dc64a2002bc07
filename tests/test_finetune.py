"""`scripts/finetune.py` in miniature: the same script, a tiny model, few steps, on a CPU."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from loftq_cli.evaluate import evaluate
from loftq_cli.pipeline import plan_quantize
from scripts import finetune
from tests.conftest import save_llama
from tests.test_eval import save_tokenizer

tasks, results = sys.modules["finetune_tasks"], sys.modules["finetune_results"]
training, common = sys.modules["finetune_train"], sys.modules["bench_common"]
SIZES = {
    "headlines": tasks.Size(steps=3, batch=2, tokens=96, validation=8, test=12, rates=(1e-2, 3e-2, 1e-1)),
    "austen": tasks.Size(steps=3, batch=2, tokens=32, validation=2, test=200, rates=(1e-2, 3e-2, 1e-1)),
}
ROOT = Path(__file__).parents[1]
ARMS = {"lora16": "16", "qlora": "2", "loftq": "2", "cloq": "2"}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model, and beginnings of the data, whose tokens are bytes."""
    folder = tmp_path_factory.mktemp("finetune")
    save_tokenizer(save_llama(folder / "model"))
    with pytest.MonkeyPatch.context() as patch:
        for name, size in (("HEADLINES", 9000), ("AUSTEN_TRAIN", 1000), ("AUSTEN_TEST", 1000)):
            source: Path = getattr(tasks, name)
            (folder / source.name).write_text(source.read_text()[:size].rpartition("\n")[0])
            patch.setattr(tasks, name, folder / source.name)
        patch.setattr(tasks, "PROMPT", "{}")
        patch.setattr(tasks, "LABELS", ("n", "y"))
        patch.setattr(finetune, "SIZES", SIZES)
        for name in ("HERE", "RESULTS"):
            patch.setattr(common, name, folder / "results")
        yield folder


@pytest.fixture(scope="module")
def settings(small: Path) -> list[str]:
    given = ["--model", str(small / "model"), "--cache", str(small / "cache"), "--bits=2", "--ranks=4", "--device=cpu"]
    return [*given, "--samples=3", "--seqlen=64"]


@pytest.fixture(scope="module")
def filled(small: Path, settings: list[str]) -> dict[str, Any]:
    """All arms in one call, after one that cannot be made."""
    arguments = [*settings, "--arm", "broken=--method absent", "--arms", *ARMS]
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr(finetune, "say", lambda *words: said.append(" ".join(map(str, words))))
        assert finetune.main(arguments) == 1
    assert said[-1] == "failed: broken, 2 bits, rank 4"
    (file,) = (small / "results").glob("*.json")
    assert str(small) not in file.read_text()
    return {"file": file, "arguments": [*settings, "--arms", *ARMS], "content": json.loads(file.read_text())}


def made_by_method(small: Path) -> dict[str, Path]:
    """Outputs of loftq that the arms of `ARMS` were trained on."""
    found = {}
    for file in (small / "cache").glob("*/loftq_report.json"):
        config = json.loads(file.read_text())["config"]
        if not config["bits_for"]:  # of the control
            found[config["method"]] = file.parent
    assert set(found) == set(ARMS) - {"lora16"}
    return found


def test_every_arm_is_trained_on_the_same_data(filled: dict[str, Any]) -> None:
    runs = filled["content"]["runs"]
    found = {(run["arm"], run["task"], run["seed"]) for run in runs}
    assert found == {(arm, task, seed) for arm in ARMS for task in SIZES for seed in range(3)}
    data = {(run["task"], run["seed"], run["data"]) for run in runs}
    assert len(data) == len({names for *_, names in data}) == 6  # one a task and seed, whatever the arm and the rate
    for arm in ARMS:
        for task in SIZES:
            search = [run for run in runs if (run["arm"], run["task"], run["seed"]) == (arm, task, 0)]
            tried = sorted(run["lr"] for run in search)
            best = min(search, key=lambda run: run["validation"]["nll"])
            assert set(SIZES[task].rates) <= set(tried)
            assert tried[0] < best["lr"] < tried[-1] or best["lr"] in (results.LADDER[0], results.LADDER[-1])
            others = [run["lr"] for run in runs if (run["arm"], run["task"]) == (arm, task) and run["seed"]]
            assert others == [best["lr"]] * 2
    assert all(len(run["curve"]) == 1 and run["curve"][0] > 0 and run["dtype"] == "float32" for run in runs)


def test_the_table_is_made_of_the_runs(filled: dict[str, Any]) -> None:
    content = filled["content"]
    assert [row["arm"] for row in content["rows"]] == list(ARMS)
    for row, (arm, bits) in zip(content["rows"], ARMS.items(), strict=True):
        cells = {}
        for task, metric in (("headlines", "accuracy"), ("austen", "perplexity")):
            runs = [run for run in content["runs"] if (run["arm"], run["task"]) == (arm, task)]
            (lr,) = {run["lr"] for run in runs if run["seed"] == 1}
            cells[task] = [run["test"][metric] for run in runs if run["lr"] == lr]
        assert row["bits"] == bits
        perplexity = f"{statistics.fmean(cells['austen']):.2f} ± {statistics.stdev(cells['austen']):.2f}"
        assert row["Austen perplexity"] == perplexity
        accuracy = [100 * value for value in cells["headlines"]]
        assert row["accuracy, %"] == f"{statistics.fmean(accuracy):.1f} ± {statistics.stdev(accuracy):.1f}"
    assert content["rows"][0]["× 16-bit"] == "1.000"
    bits_per_weight = [float(row["bits per weight"]) for row in content["rows"]]
    assert bits_per_weight[0] == 16
    assert all(2.2 < bits < 2.4 for bits in bits_per_weight[1:])  # as packed, though computed dense


def test_a_control_has_the_bytes_and_is_not_trained(filled: dict[str, Any]) -> None:
    arguments = [*filled["arguments"][: filled["arguments"].index("--arms")], "--arms", "same-bytes"]
    before = filled["file"].read_text()
    assert finetune.main(arguments) == 0
    content = json.loads(filled["file"].read_text())
    assert len(content["runs"]) == len(filled["content"]["runs"])
    row, (loftq,) = content["rows"][-1], [row for row in content["rows"] if row["arm"] == "loftq"]
    assert (row["arm"], row["bits"], row["rank"], row["accuracy, %"]) == ("same-bytes", "2", 4, None)
    assert float(loftq["bits per weight"]) + 1 < float(row["bits per weight"]) <= float(loftq["with adapter"])
    errors = {base["arm"]: base["relative error"] for base in content["bases"]}
    assert errors["same-bytes"] < 0.7 * errors["loftq"]
    (base,) = [base for base in content["bases"] if base["arm"] == "same-bytes"]
    assert set(base["before"]) == set(SIZES)

    # the other one has an adapter of rank 1, out of the same bytes, and is trained
    assert finetune.main([*arguments[:-1], "same-bytes-cloq", "--tasks=headlines", "--seeds=0"]) == 0
    content = json.loads(filled["file"].read_text())
    assert [run["arm"] for run in content["runs"]].count("same-bytes-cloq") >= 3
    (base,) = [base for base in content["bases"] if base["arm"] == "same-bytes-cloq"]
    assert base["bits per weight"] + 0.1 < base["with adapter"] <= float(loftq["with adapter"]) + 0.005
    filled["file"].write_text(before)


def test_before_training_it_is_what_loftq_eval_says(filled: dict[str, Any], small: Path) -> None:
    bases = {base["arm"]: base for base in filled["content"]["bases"]}
    size = SIZES["austen"]
    for method, folder in made_by_method(small).items():
        measured = evaluate(folder, tasks.AUSTEN_TEST, seqlen=size.tokens, max_tokens=size.test, device="cpu")
        assert bases[method]["before"]["austen"]["nll"] == pytest.approx(measured.rows[-1].nll, rel=1e-5)
    assert len({base["before"]["austen"]["nll"] for base in bases.values()}) == 4


def test_what_is_there_is_not_done_again(
    filled: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, trained = filled["file"], []

    def run(tuned: Any, task: Any, pairs: list[tuple[int, float]]) -> list[dict[str, Any]]:
        trained.extend(pairs)
        return [{key: value for key, value in lost[0].items() if key not in results.BASE}]

    monkeypatch.setattr(finetune, "run", run)
    before = file.read_text()
    assert finetune.main(filled["arguments"]) == 0
    assert (trained, file.read_text()) == ([], before)
    assert "cloq, 2 bits, rank 4: there already" in capsys.readouterr().err

    # a call that was cut off: what is missing is done, and no more
    content = json.loads(before)
    lost = [run for run in content["runs"] if (run["arm"], run["task"], run["seed"]) == ("loftq", "austen", 2)]
    file.write_text(json.dumps({**content, "runs": [run for run in content["runs"] if run != lost[0]]}))
    assert finetune.main([*filled["arguments"], "--limit-seconds", "0"]) == 0
    assert trained == []
    assert "no time left for: loftq, 2 bits, rank 4" in capsys.readouterr().err
    assert finetune.main(filled["arguments"]) == 0
    assert (trained, file.read_text()) == ([(2, lost[0]["lr"])], before)

    # other flags of an arm, other steps: nothing is mixed up
    assert finetune.main([*filled["arguments"], "--samples=2"]) == 1
    assert "failed: cloq" in (said := capsys.readouterr().err)
    assert "failed: loftq" not in said  # it sees no text
    with pytest.raises(SystemExit, match="other settings"):
        finetune.main([*filled["arguments"], "--steps", "austen=9"])
    assert file.read_text() == before

    # another text of the same name, another model of the same name
    text = tmp_path / finetune.bench_perplexity.DATA.joinpath("wikipedia_calibration.txt").name
    text.write_text(tasks.AUSTEN_TRAIN.read_text())
    for flags in (["--calibration", "a", f"--calibration={text}"], [f"--calibration={text}"]):
        assert finetune.digest_of_text(flags) == tasks.file_digest(text)
    assert finetune.main([*filled["arguments"], f"--calibration={text}"]) == 1
    assert "failed: cloq" in (said := capsys.readouterr().err)
    assert "failed: loftq" not in said
    save_tokenizer(save_llama(tmp_path / "model", torch.bfloat16))
    with pytest.raises(SystemExit, match="weights is"):
        finetune.main([*filled["arguments"], f"--model={tmp_path / 'model'}"])
    assert file.read_text() == before
    monkeypatch.setattr(common, "RESULTS", tmp_path / "own")  # the way out that the refusal names
    assert finetune.main([*filled["arguments"], f"--model={tmp_path / 'model'}", "--limit-seconds=0"]) == 0
    with pytest.raises(SystemExit):
        finetune.main([*filled["arguments"], f"--model={tmp_path}"])
    assert f"--model {tmp_path}: no checkpoint there" in capsys.readouterr().err


def test_results_of_two_machines_become_one_table(
    filled: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = []
    for number in range(2):
        part = tmp_path / f"machine-{number}.json"
        arms = list(ARMS)[2 * number :][:2]
        content = {
            **filled["content"],
            **{key: [row for row in filled["content"][key] if row["arm"] in arms] for key in ("runs", "bases")},
        }
        part.write_text(json.dumps(content))
        parts.append(str(part))
    (tmp_path / "results").mkdir()
    for name in ("HERE", "RESULTS"):
        monkeypatch.setattr(common, name, tmp_path / "scripts" / "results")
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n<!-- {filled['file'].stem} -->\n<!-- end -->\nafter\n")
    assert finetune.main(["--merge", *parts]) == 0
    for content in ("no JSON", '{"rows": []}'):
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(SystemExit, match="is no file of these results"):
            finetune.main(["--merge", str(tmp_path / "other.json")])
    changed = json.loads(json.dumps(filled["content"]))
    for base in changed["bases"]:
        base["made_of"] = "other bytes"
    for run in changed["runs"]:
        run["seed"] += 3  # which would be more of the same
    (tmp_path / "other.json").write_text(json.dumps(changed))
    assert finetune.main(["--merge", str(tmp_path / "other.json")]) == 0
    merged = tmp_path / "scripts" / "results" / filled["file"].name
    assert json.loads(merged.read_text()) == filled["content"]
    elsewhere = {**filled["content"], "machine": {**filled["content"]["machine"], "gpu": "another"}}
    (tmp_path / "other.json").write_text(json.dumps(elsewhere))
    assert finetune.main(["--merge", str(tmp_path / "other.json")]) == 0  # beside the others
    assert len(list((tmp_path / "scripts" / "results").glob("*.json"))) == 2
    (tmp_path / "scripts" / "results" / "finetune-cuda.json").unlink()
    assert finetune.main(["--table"]) == 0
    merged = tmp_path / "scripts" / "results" / filled["file"].name
    assert json.loads(merged.read_text()) == filled["content"]
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert all(common.table_row(row, results.COLUMNS) in text for row in filled["content"]["rows"])
    picture = ElementTree.parse(merged.with_suffix(".svg"))
    lines = [element for element in picture.iter() if element.tag.endswith("polyline")]
    assert len(lines) == len(ARMS) * len(SIZES)


def test_the_rate_is_chosen_by_validation_alone(tmp_path: Path) -> None:
    sizes = {task: {"rates": [1e-4, 3e-4, 1e-3]} for task in SIZES}
    common = {"model": "m", "weights": "w", "group_size": 64, "tasks": sizes, "gpu": None}
    kept = results.Results(tmp_path / "results.json", common, ["loftq"])
    kept.machine = {"gpu": None}
    base = {"arm": "loftq", "bits": "2", "rank": 16}
    key = base | {"task": "austen"}

    def row(lr: float, seed: int, validation: float | None, test: float) -> dict[str, Any]:
        measured = {"validation": {"nll": validation}, "test": {"nll": test, "perplexity": test}, "curve": [1.0]}
        return {**key, "seed": seed, "lr": lr, **measured, "seconds": 1.0}

    kept.add(bases=[{**base, "flags": "", "made_of": "", "before": {}, "bits per weight": 2.25, "with adapter": 3.0}])
    kept.add([row(1e-4, 0, 3.0, 9.0), row(1e-3, 0, 2.0, 30.0)])
    assert kept.table()[0]["Austen perplexity"] is None  # before the search is over there is nothing to show
    assert finetune.next_runs(kept, key, [0, 1]) == [(0, 3e-4)]
    assert finetune.next_runs(kept, key, [1]) == []
    kept.add([row(3e-4, 0, 2.5, 1.0)])
    assert finetune.next_runs(kept, key, [0, 1]) == [(0, 3e-3)]  # the best so far is the highest
    kept.add([row(3e-3, 0, None, 1.0)])  # went astray
    assert finetune.next_runs(kept, key, [0, 1]) == [(1, 1e-3)]
    kept.add([row(1e-3, 1, 9.0, 32.0)])
    assert kept.table()[0]["Austen perplexity"] == "31.00 ± 1.41 (n = 2)"
    assert kept.table()[0]["learning rates"] == "–, 0.001"

    # a base keeps its runs, unless it is of other bytes or measured again
    made = {**kept.bases[0], "made_of": "a"}
    for new, again, count in (
        (made, False, 0),
        (made, False, 1),
        ({**made, "made_of": "b"}, False, 0),
        (made, True, 0),
    ):
        kept.replace(new, again)
        assert len(kept.of(**key)) == count
        kept.add([row(1e-4, 0, 3.0, 9.0)])

    # downwards, too, and to the ladder's end
    other = key | {"arm": "qlora"}
    for lr in (1e-4, 3e-4, 1e-3, 3e-5):
        assert kept.search(**other)[0] is None
        kept.add([row(lr, 0, lr, 1.0) | {"arm": "qlora"}])
    assert kept.search(**other) == (None, [results.LADDER[0]])
    kept.add([row(results.LADDER[0], 0, 0.0, 1.0) | {"arm": "qlora"}])
    assert kept.search(**other) == (results.LADDER[0], [])


def test_an_arm_may_look_at_what_is_trained_on(filled: dict[str, Any], small: Path) -> None:
    """And at nothing that is held out; the results name no folder."""
    flags = "--method cloq --quantizer uniform --format dense --calibration tasks.txt"
    arguments = filled["arguments"][: filled["arguments"].index("--arms")]
    assert finetune.main([*arguments, "--arm", f"text={flags}", "--seeds", "0", "--tasks", "headlines"]) == 0
    (base,) = [base for base in json.loads(filled["file"].read_text())["bases"] if base["arm"] == "text"]
    assert base["flags"].endswith("--calibration tasks.txt")
    assert str(small) not in filled["file"].read_text()
    text = (small / "cache" / "tasks.txt").read_text()
    parts = {
        part: [row["headline"] for row in rows] for part, rows in tasks.split_headlines(SIZES["headlines"]).items()
    }
    assert parts["train"][0] in text
    assert not any(headline in text for part in ("validation", "test") for headline in parts[part])
    assert tasks.AUSTEN_TRAIN.read_text() in text
    assert tasks.AUSTEN_TEST.read_text()[:100] not in text


def test_no_headline_is_held_out_and_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the table's settings and the repository's data."""
    monkeypatch.setattr(finetune, "SIZES", tasks.SIZES)
    monkeypatch.setattr(tasks, "HEADLINES", tasks.DATA / "headlines.jsonl")
    size = finetune.parse(["--table"]).sizes["headlines"]
    parts = tasks.split_headlines(size)
    assert len(parts["test"]) >= 2000
    assert len(parts["train"]) >= size.steps * size.batch
    seen: set[str] = set()
    for rows in parts.values():
        words = {" ".join(re.findall(r"\w+", row["headline"].lower())) for row in rows}
        assert not seen & words
        seen |= words
        assert 0.4 < statistics.fmean(row["satirical"] for row in rows) < 0.6


def test_what_chooses_the_rate_of_prose_is_of_the_novel_that_is_measured(small: Path) -> None:
    """And neither is trained on, nor counted twice."""
    from transformers import AutoTokenizer

    tokenizer, size = AutoTokenizer.from_pretrained(small / "model"), SIZES["austen"]
    novel = tasks.Austen(tokenizer, "cpu", size)
    test, validation = (
        tokenizer.decode(novel.windows[part][:, 1:].flatten().tolist()) for part in ("test", "validation")
    )
    text = tasks.AUSTEN_TEST.read_text()  # a token is a byte
    assert text.startswith(test)
    assert text[size.test :].startswith(validation)
    assert min(len(test), len(validation)) > size.tokens
    assert tokenizer.decode(novel.text.tolist()) == tasks.AUSTEN_TRAIN.read_text()


def test_a_base_of_other_bytes_is_measured_anew(
    filled: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, before, trained = filled["file"], filled["file"].read_text(), []
    content = json.loads(before)
    for base in content["bases"]:
        if base["arm"] == "loftq":
            base["made_of"] = "other"
    runs = {run["task"]: run for run in content["runs"] if run["arm"] == "loftq" and run["seed"] == 2}
    content["runs"].remove(runs["austen"])
    file.write_text(json.dumps(content))

    def run(tuned: Any, task: Any, pairs: list[tuple[int, float]]) -> list[dict[str, Any]]:
        trained.extend(pairs)
        done = runs[type(task).__name__.lower()]
        return [{**done, "seed": seed, "lr": lr} for seed, lr in pairs]

    monkeypatch.setattr(finetune, "run", run)
    assert finetune.main([*filled["arguments"], "--seeds", "0"]) == 0
    assert trained == []  # nothing was missing
    assert finetune.main(filled["arguments"]) == 0
    assert "measured anew" in capsys.readouterr().err
    assert len([seed for seed, _ in trained if seed]) == 2 * len(SIZES)
    file.write_text(before)


def test_headlines_are_measured_as_one_by_one(small: Path) -> None:
    """Neither batches nor what fills them up changes what is said of a headline."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small / "model")
    task = tasks.Headlines(tokenizer, "cpu", SIZES["headlines"])
    tuned = training.Tuned(small / "model", 4, "cpu", fresh=True)
    model = AutoModelForCausalLM.from_pretrained(small / "model").eval()
    words = [tokenizer(word).input_ids[-1] for word in tasks.LABELS]
    losses, right = [], []
    for row in tasks.split_headlines(SIZES["headlines"])["test"]:
        ids = tokenizer(row["headline"], return_tensors="pt").input_ids
        if ids.shape[1] <= SIZES["headlines"].tokens:
            with torch.no_grad():
                shares = model(ids).logits[0, -1, words].double().log_softmax(dim=0)
            losses.append(-shares[row["satirical"]].item())
            right.append(bool(shares.argmax() == row["satirical"]))
    assert 3 < len(losses) == task.sizes["test"]
    measured = tuned.evaluate(task, "test")
    assert measured["nll"] == pytest.approx(statistics.fmean(losses), rel=1e-5)
    assert measured["accuracy"] == pytest.approx(statistics.fmean(right))


def test_every_training_begins_at_the_same_start_and_learns(small: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small / "model")
    for name, make in tasks.TASKS.items():
        task = make(tokenizer, "cpu", replace(SIZES[name], steps=40, batch=4))
        tuned = training.Tuned(small / "model", 8, "cpu", fresh=True)
        before = tuned.evaluate(task, "validation")
        (first,) = tuned.train(task, [(1, 1e-2)])
        assert first["curve"][-1] < 0.9 * first["curve"][0]
        assert (after := tuned.evaluate(task, "validation")) != before
        slower, again, other = tuned.train(task, [(1, 1e-3), (1, 1e-2), (2, 1e-2)])  # at once as one by one
        assert first["curve"] == again["curve"] != other["curve"]
        assert first["curve"][-1] < slower["curve"][-1] < slower["curve"][0]
        assert first["data"] == again["data"] == slower["data"] != other["data"]
        for number, row in enumerate((slower, again, other)):
            tuned.use(number)
            assert (tuned.evaluate(task, "validation") == after) == (row == again)
        tuned.reset(0)
        assert tuned.evaluate(task, "validation") == before


def test_a_bfloat16_model_is_trained_as_one(small: Path, tmp_path: Path) -> None:
    """As every real one is: matrices in bfloat16, factors in float32, and what it learns is much the same."""
    from transformers import AutoTokenizer

    save_tokenizer(save_llama(tmp_path / "model", dtype=torch.bfloat16))
    task = tasks.Headlines(AutoTokenizer.from_pretrained(small / "model"), "cpu", replace(SIZES["headlines"], steps=40))
    tuned, exact = (training.Tuned(folder / "model", 8, "cpu", fresh=True) for folder in (tmp_path, small))
    assert {p.dtype for p in tuned.causal.parameters()} == {torch.bfloat16, torch.float32}
    assert {p.dtype for p in tuned.start.values()} == {torch.float32}
    rounded, other = (model.train(task, [(1, 1e-2)])[0] for model in (tuned, exact))
    assert (rounded["dtype"], other["dtype"]) == ("bfloat16", "float32")
    assert rounded["curve"] == pytest.approx(other["curve"], rel=0.1)
    assert rounded["curve"][-1] < 0.9 * rounded["curve"][0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_replayed_steps_train_as_launched_ones(small: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    from transformers import AutoTokenizer

    save_tokenizer(save_llama(tmp_path / "model", dtype=dtype))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    for name, make in tasks.TASKS.items():
        task = make(tokenizer, "cuda", replace(SIZES[name], steps=40, batch=4))
        replayed, launched = (
            training.Tuned(tmp_path / "model", 8, "cuda", fresh=True, graphs=graphs) for graphs in (True, False)
        )
        pairs = [(1, 1e-2), (2, 1e-2), (1, 1e-3)]
        first, second, again = (tuned.train(task, pairs) for tuned in (replayed, launched, replayed))
        for row, other, repeated in zip(first, second, again, strict=True):
            assert (row["graph"], other["graph"]) == (True, False)
            assert row["curve"] == pytest.approx(other["curve"], rel=0.02)
            assert row["curve"] == pytest.approx(repeated["curve"], rel=0.02)
        (alone,) = replayed.train(task, pairs[:1])
        assert alone["curve"] == pytest.approx(first[0]["curve"], rel=0.02)


def test_zero_adapters_begin_alike_and_others_as_loftq_left_them(small: Path, filled: dict[str, Any]) -> None:
    folders = made_by_method(small)
    fresh = training.Tuned(small / "model", 4, "cpu", fresh=True)
    qlora, loftq = (training.Tuned(folders[name], 4, "cpu", fresh=False) for name in ("qlora", "loftq"))
    for tuned in (fresh, qlora, loftq):
        tuned.reset(5)
    parameters, zero, repaired = (tuned.adapters[0] for tuned in (fresh, qlora, loftq))
    assert list(parameters) == list(zero) == list(repaired)
    for name, p in parameters.items():
        assert torch.equal(p, zero[name])
        assert torch.equal(repaired[name], loftq.start[name])
    assert any(not torch.equal(p, repaired[name]) for name, p in parameters.items())


def test_mixtures_and_their_order(tiny_llama: Path) -> None:
    arms = dict.fromkeys((finetune.FULL, "loftq", "apiq-bw-paper"), "")
    order = [(item["arm"], item["bits"], item["rank"]) for item in finetune.items(arms, list(finetune.BITS), [16, 64])]
    begin = [("lora16", "16", 16), ("loftq", "2", 16), ("apiq-bw-paper", "2", 16), ("loftq", "4", 16)]
    assert order[:5] == [*begin, ("lora16", "16", 64)]
    assert [rank for _, bits, rank in order if bits not in finetune.FIRST] == [16] * 4 + [64] * 4
    assert set(finetune.BITS) | {"16"} == set(results.BITS_ORDER)

    from loftq_cli.config import load_config

    for bits, expected in {"2": 2.0, "3": 3.0, "4": 4.0, "3-mixed": 3.0, "2.5": 3.0, "2.25": 3.0}.items():
        item = {"arm": "loftq", "bits": bits, "rank": 8}
        flags = finetune.quantize_flags(item, "--method loftq --quantizer nf --format packed", [])
        given = dict(zip(flags[::2], flags[1::2], strict=True))
        config = given.pop("--config", None)
        options = {name[2:].replace("-", "_"): int(v) if v.isdigit() else v for name, v in given.items()}
        decided = load_config(Path(finetune.__file__).parents[1] / config if config else None, options)
        jobs = plan_quantize(str(tiny_llama), decided).jobs  # of two blocks one has 4 bits
        assert statistics.fmean(job.bits for job in jobs) == expected
        assert decided.rank == 8


def test_processes_share_the_bases_out(tmp_path: Path) -> None:
    """As `accelerate launch` begins them, with nothing patched: each base is one process's, and each has its GPU."""
    model = save_llama(tmp_path / "model")
    save_tokenizer(model)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=3"]
    command += [
        "--num_machines=1",
        "--mixed_precision=no",
        "--dynamo_backend=no",
        str(ROOT / "scripts" / "finetune.py"),
    ]
    command += ["--model", str(model), "--bits=2", "--ranks", "4", "8", "--arms", "qlora-nf", "loftq-nf", "lora16"]
    # nothing fits into no time
    ran = subprocess.run(
        [*command, "--device=cpu", "--limit-seconds=0"], capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "BENCH_RESULTS": str(tmp_path / "results")},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    left = re.findall(r"^no time left for: (.+), (\S+) bits, rank (\d)$", ran.stderr, re.MULTILINE)
    arms = [("lora16", "16"), ("qlora-nf", "2"), ("loftq-nf", "2")]
    assert sorted(left) == sorted((*arm, rank) for arm in arms for rank in "48")
    assert ran.stdout.count("| arm |") == 3  # each of them prints the table


def test_a_process_has_its_gpu_and_is_no_other_one_s_part(monkeypatch: pytest.MonkeyPatch) -> None:
    for visible, wanted in (("4,5", "5"), ("7", "7"), (None, "1")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")  # which is put back afterwards
        if visible is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1")):
            monkeypatch.setenv(name, value)
        assert list("abcdefgh")[finetune.share_of_process()] == ["d", "h"]
        assert os.environ["CUDA_VISIBLE_DEVICES"] == wanted
        assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & os.environ.keys()  # or what it begins would wait for others
    assert finetune.share_of_process() == slice(0, None, 1)
