"""A run killed at any point and resumed gives the bytes of a run that was not."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from loftq_cli import batches, journal, outputs, pipeline
from loftq_cli.errors import LoftqError
from loftq_cli.journal import Journal
from loftq_cli.verify import verify

OPTIONS = {"bits": 2, "rank": 4, "iters": 2, "group_size": 32, "format": "dense"}
WITH_TIMES = {"loftq_report.json", "README.md"}

# Loads everything once, then forks a child for every kill point: the child dies by SIGKILL inside the n-th call.
DRIVER = """
import json, os, signal, sys
from loftq_cli import journal, outputs, pipeline
from loftq_cli.checkpoint import writer

model, points = sys.argv[1], json.loads(sys.argv[2])
options = json.loads(sys.argv[3])
owners = {
    "ShardWriter": writer.ShardWriter, "Journal": journal.Journal, "Outputs": outputs.Outputs, "pipeline": pipeline,
}

def kill_in(where, nth, when):
    owner, name = where.split(".")
    original, calls = getattr(owners[owner], name), [0]
    def deadly(*args, **kwargs):
        calls[0] += 1
        if calls[0] == nth and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if calls[0] == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owners[owner], name, deadly)

for out, where, nth, when, commit_seconds in points:
    pid = os.fork()
    if pid == 0:
        outputs.COMMIT_SECONDS = commit_seconds
        kill_in(where, nth, when)
        pipeline.quantize(model, out, **options)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else -1, flush=True)
"""

# (where, n-th call, before or after it, seconds between commits: 0 journals every weight, 99 only whole shards)
POINTS = [
    ("ShardWriter.write", 1, "before", 0),
    ("ShardWriter.write", 5, "after", 0),
    ("ShardWriter.write", 20, "after", 0),
    ("ShardWriter.write", 20, "after", 99),
    ("ShardWriter.write_chunks", 9, "before", 0),
    ("ShardWriter.sync", 6, "before", 0),
    ("Journal.begin", 1, "before", 0),
    ("Journal.begin", 1, "after", 0),
    ("Outputs.__init__", 1, "after", 0),  # all files are there, and empty
    ("Journal.commit", 1, "before", 0),
    ("Journal.commit", 4, "after", 0),
    ("ShardWriter.finish", 1, "before", 99),
    ("ShardWriter.finish", 1, "after", 99),  # renamed, not journaled
    ("ShardWriter.finish", 2, "after", 0),
    ("ShardWriter.set_metadata", 1, "after", 0),
    ("ShardWriter.finish", -1, "after", 0),  # the adapter, the last file of tensors
    ("pipeline.write_file", 1, "after", 0),
    ("pipeline.copy_file", 1, "before", 0),
    ("pipeline.write_file", 3, "after", 0),
    ("pipeline.write_file", 6, "before", 0),  # the report: all but it is there
    ("pipeline.write_file", 6, "after", 0),  # the journal is still there
]


def contents(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name not in WITH_TIMES
    }


def without_times(out: Path) -> dict[str, object]:
    report = json.loads((out / "loftq_report.json").read_text())
    for key in ("seconds", "peak_host_bytes", "peak_device_bytes"):
        del report["totals"][key]
    for row in report["weights"]:
        del row["seconds"]
    return report


def test_killed_anywhere_and_resumed_gives_identical_bytes(sharded_llama: Path, tmp_path: Path) -> None:
    straight = tmp_path / "straight" / "out"
    pipeline.quantize(sharded_llama, straight, **OPTIONS)
    shards = len(list(sharded_llama.glob("*.safetensors")))
    points = []
    for number, (where, nth, when, commit_seconds) in enumerate(POINTS):
        # every run is made under the same absolute path: adapter_config.json names it
        points.append((str(tmp_path / f"{number}"), where, shards + 1 if nth == -1 else nth, when, commit_seconds))
    driver = [sys.executable, "-c", DRIVER, str(sharded_llama), json.dumps(points), json.dumps(OPTIONS)]
    signals = subprocess.check_output(driver, text=True).split()
    assert signals == [str(int(signal.SIGKILL))] * len(points)

    expected = contents(straight)
    for out, *point in points:
        assert (Path(out) / ".loftq").is_dir(), point
        with pytest.raises(LoftqError, match="unfinished") as refused:
            pipeline.quantize(sharded_llama, out, **OPTIONS)
        assert "--resume" in refused.value.hint
        journal = Path(out) / ".loftq/journal.jsonl"
        known = journal.exists() and "\n" in journal.read_text()  # else it was killed before it began
        with pytest.raises(LoftqError, match="other settings" if known else "unfinished"):  # not: resume, and then no
            pipeline.quantize(sharded_llama, out, **{**OPTIONS, "seed": 7})
        pipeline.quantize(sharded_llama, out, resume=True, **OPTIONS)
        actual = contents(Path(out))
        named = "loftq_init/adapter_config.json"
        actual[named] = actual[named].replace(out.encode(), str(straight).encode())
        assert actual == expected, point
        assert without_times(Path(out)) == without_times(straight), point


def test_a_journal_line_cut_short_is_ignored(sharded_llama: Path, tmp_path: Path) -> None:
    straight, out = tmp_path / "straight", tmp_path / "out"
    pipeline.quantize(sharded_llama, straight, **OPTIONS)
    _stop_after(3, sharded_llama, out)
    journal = out / ".loftq" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-7])
    pipeline.quantize(sharded_llama, out, resume=True, **OPTIONS)
    assert contents(out).keys() == contents(straight).keys()
    assert without_times(out) == without_times(straight)


def test_resume_does_not_compute_again_what_is_journaled(
    sharded_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    _stop_after(6, sharded_llama, out)
    computed = []
    original = batches.quantize_batch
    monkeypatch.setattr(
        batches, "quantize_batch", lambda plan, batch, W: computed.append(batch) or original(plan, batch, W)
    )
    journaled = Journal(out / ".loftq").rows.keys()
    assert len(journaled) >= 6
    report = pipeline.quantize(sharded_llama, out, resume=True, **OPTIONS)
    assert {job.tensor for batch in computed for job in batch.jobs} == {
        row["tensor"] for row in report["weights"]
    } - journaled


def test_resume_with_other_settings_is_refused_naming_field_old_and_new(sharded_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _stop_after(2, sharded_llama, out)
    with pytest.raises(LoftqError, match=r"--rank was 4, now 8") as refused:
        pipeline.quantize(sharded_llama, out, resume=True, **{**OPTIONS, "rank": 8})
    assert "--overwrite" in refused.value.hint
    pipeline.quantize(sharded_llama, out, overwrite=True, **{**OPTIONS, "rank": 8})


def test_resume_notices_another_source(sharded_llama: Path, tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _stop_after(2, sharded_llama, out)
    with pytest.raises(LoftqError, match=r"source checkpoint was [0-9a-f]{12}…, now [0-9a-f]{12}…$"):
        pipeline.quantize(tiny_llama, out, resume=True, **OPTIONS)


def test_resume_on_nothing_starts_fresh(tiny_llama: Path, tmp_path: Path) -> None:
    for name, prepare in {"absent": None, "empty": "mkdir", "begun": "work folder"}.items():
        out = tmp_path / name
        if prepare:
            out.mkdir()
        if prepare == "work folder":
            (out / ".loftq").mkdir()
        assert pipeline.quantize(tiny_llama, out, resume=True, **OPTIONS)["totals"]["weights"] == 14


def test_finished_and_asked_again_is_left_alone(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = pipeline.quantize(tiny_llama, out, **OPTIONS)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert pipeline.quantize(tiny_llama, out, **OPTIONS) == first
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(LoftqError, match="--bits was 2, now 4"):
        pipeline.quantize(tiny_llama, out, **{**OPTIONS, "bits": 4, "quantizer": "uniform"})


def test_overwrite_removes_only_what_loftq_wrote(sharded_llama: Path, tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pipeline.quantize(sharded_llama, out, **OPTIONS)
    (out / "notes.txt").write_text("mine")
    pipeline.quantize(tiny_llama, out, overwrite=True, **OPTIONS)
    names = {path.name for path in out.glob("*")}
    assert (out / "notes.txt").read_text() == "mine"
    assert "model.safetensors" in names
    assert not any("-of-" in name or name.endswith("index.json") for name in names)


def test_a_folder_of_somebody_else_is_never_written_to(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for flags in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(LoftqError, match="nothing that loftq made"):
            pipeline.quantize(tiny_llama, tmp_path, **flags, **OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    with pytest.raises(LoftqError, match="is a file"):
        pipeline.quantize(tiny_llama, tmp_path / "config.json", **OPTIONS)


def test_a_leftover_work_folder_of_a_finished_run_is_no_unfinished_run(tiny_llama: Path, tmp_path: Path) -> None:
    """Killed between the journal's end and that of its folder."""
    out = tmp_path / "out"
    report = pipeline.quantize(tiny_llama, out, **OPTIONS)
    (out / ".loftq").mkdir()
    (out / ".loftq" / "lock").touch()
    assert verify(out).violations == ()
    for flags in ({}, {"resume": True}):
        assert pipeline.quantize(tiny_llama, out, **flags, **OPTIONS) == report
    assert verify(out).violations == ()


def test_a_file_lost_between_two_interruptions_is_made_again(sharded_llama: Path, tmp_path: Path) -> None:
    for lost in ("model-*.safetensors", "adapter_model.safetensors"):
        out = tmp_path / lost[:5]
        _stop_after(3, sharded_llama, out)
        for path in (out / ".loftq").glob(lost):
            path.unlink()
        _stop_after(2, sharded_llama, out, resume=True)
        pipeline.quantize(sharded_llama, out, resume=True, **OPTIONS)
        assert verify(out, str(sharded_llama)).violations == ()


def test_what_is_lost_is_forgotten_before_a_file_takes_its_place(
    sharded_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fresh file has its full size and a header that fits: zeros would pass for tensors."""
    for broken in ("begin", "ShardWriter"):
        out = tmp_path / broken
        _stop_after(6, sharded_llama, out)
        for path in (out / ".loftq").glob("*.safetensors"):
            path.unlink()
        with monkeypatch.context() as patch:
            where = Journal if broken == "begin" else outputs

            def fails(*args: object, **kwargs: object) -> None:
                raise LoftqError("no room")

            patch.setattr(where, broken, fails)
            with pytest.raises(LoftqError, match="no room"):
                pipeline.quantize(sharded_llama, out, resume=True, **OPTIONS)
        pipeline.quantize(sharded_llama, out, resume=True, **OPTIONS)
        assert verify(out, str(sharded_llama)).violations == ()


def test_overwrite_never_leaves_the_folder(tiny_llama: Path, tmp_path: Path) -> None:
    out, victim = tmp_path / "out", tmp_path / "victim.txt"
    pipeline.quantize(tiny_llama, out, **OPTIONS)
    victim.write_text("mine")
    report = json.loads((out / "loftq_report.json").read_text())
    report["side_files"] = ["../victim.txt", str(victim), "loftq_init/../../victim.txt"]
    (out / "loftq_report.json").write_text(json.dumps(report))
    pipeline.quantize(tiny_llama, out, overwrite=True, **OPTIONS)
    assert victim.read_text() == "mine"


def test_overwrite_finds_odd_things_under_its_names(tiny_llama: Path, tmp_path: Path) -> None:
    out, victim = tmp_path / "out", tmp_path / "victim"
    pipeline.quantize(tiny_llama, out, **OPTIONS)
    victim.mkdir()
    (victim / "a.json").write_text("mine")
    (out / "folder.json").mkdir()
    (out / "file").write_text("mine")
    (out / "inside").mkdir()
    (out / "inside" / "a.json").write_text("mine")
    (out / "linked").symlink_to(out / "inside")
    (out / "link.json").symlink_to(victim / "a.json")
    report = json.loads((out / "loftq_report.json").read_text())
    sha256 = hashlib.sha256(b"mine").hexdigest()
    odd = ["folder.json", "file/a.json", "linked/a.json", "link.json", "a\0.json", "b\0/a.json", "\ud800", "", "."]
    report["files"] |= dict.fromkeys(odd, sha256)
    (out / "loftq_report.json").write_text(json.dumps(report))
    pipeline.quantize(tiny_llama, out, overwrite=True, **OPTIONS)
    assert (victim / "a.json").read_text() == (out / "inside" / "a.json").read_text() == "mine"
    assert (out / "file").read_text() == "mine"
    assert (out / "folder.json").is_dir()
    assert not (out / "link.json").is_symlink()
    assert verify(out).violations == ()

    shutil.rmtree(out / ".loftq", ignore_errors=True)
    (out / ".loftq").symlink_to(victim)
    with pytest.raises(LoftqError, match=r"\.loftq` is a link"):
        pipeline.quantize(tiny_llama, out, overwrite=True, **OPTIONS)
    assert (victim / "a.json").read_text() == "mine"


def test_what_cannot_be_removed_does_not_hide_what_went_wrong(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise LoftqError("the true one")

    def refused(*args: object, **kwargs: object) -> None:
        raise PermissionError("no")

    monkeypatch.setattr(pipeline, "run_steps", broken)
    monkeypatch.setattr(journal, "remove_outputs", refused)
    with pytest.raises(LoftqError, match="the true one"):
        pipeline.quantize(tiny_llama, tmp_path / "out", **OPTIONS)


def test_the_model_is_never_the_out(tiny_llama: Path, tmp_path: Path) -> None:
    model = tmp_path / "folder" / "model"
    shutil.copytree(tiny_llama, model)
    before = contents(model)
    for out in (model, tmp_path / "folder"):
        with pytest.raises(LoftqError, match="holds the MODEL itself"):
            pipeline.quantize(model, out, overwrite=True, **OPTIONS)
    assert contents(model) == before


def test_another_checkpoint_of_the_same_training_run_is_another_source(tiny_llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(tiny_llama, model)
    pipeline.quantize(model, out, **OPTIONS)
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name] * 1.01}, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoftqError, match=r"source checkpoint was [0-9a-f]{12}…, now [0-9a-f]{12}…$"):
        pipeline.quantize(model, out, **OPTIONS)
    assert any(name in violation for violation in verify(out, str(model)).violations)


def test_a_finished_out_that_lacks_a_file_is_not_called_finished(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pipeline.quantize(tiny_llama, out, **OPTIONS)
    whole = (out / "model.safetensors").read_bytes()
    for rest, problem in ((whole[:-100], "damaged"), (whole[:100], "damaged"), (None, "gone")):
        (out / "model.safetensors").unlink()
        if rest is not None:
            (out / "model.safetensors").write_bytes(rest)
        with pytest.raises(LoftqError, match=rf"`model.safetensors` is {problem}"):
            pipeline.quantize(tiny_llama, out, **OPTIONS)


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}], ids=str)
def test_two_runs_on_one_out(sharded_llama: Path, tmp_path: Path, how: dict[str, Any]) -> None:
    out = tmp_path / "out"
    refusals = []

    def second_run(name: str, size: int) -> None:
        with pytest.raises(LoftqError) as refused:
            pipeline.quantize(sharded_llama, out, **{**OPTIONS, **how})
        refusals.append(refused.value.message)

    pipeline.quantize(sharded_llama, out, progress=second_run, **OPTIONS)
    assert set(refusals) == {f"another run is writing to `{out}`"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_the_work_and_says_how_to_go_on(
    sharded_llama: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "loftq_cli", "quantize", "--bits=2", "--rank=4", "--iters=3000", "--group-size=32"]
    command += ["--format=dense", str(sharded_llama), str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if (out / ".loftq" / "journal.jsonl").exists():
            time.sleep(3.0)
            process.send_signal(number)
            break
        time.sleep(0.05)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stdout == ""
    assert f"loftq quantize --bits=2 --rank=4 --iters=3000 --group-size=32 --format=dense {sharded_llama}" in stderr
    assert "--resume" in stderr
    assert "Traceback" not in stderr


def test_a_failure_before_any_progress_leaves_nothing(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise LoftqError("broken")

    monkeypatch.setattr(pipeline, "run_steps", broken)
    with pytest.raises(LoftqError, match="broken"):
        pipeline.quantize(tiny_llama, tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_not_enough_disk_is_said_before_any_work(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(LoftqError, match="GiB are free"):
        pipeline.quantize(tiny_llama, tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()


def _stop_after(weights: int, model: Path, out: Path, **flags: bool) -> None:
    """Run until so many weights are written, or a few more, then stop as Ctrl-C does."""
    done = []

    def progress(name: str, size: int) -> None:
        done.append(name)
        if len(done) == weights:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize(model, out, progress=progress, **flags, **OPTIONS)
