"""What a person at a terminal and a CI job see: streams, exit codes, JSON, sentences."""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from loftq_cli import __version__, pipeline
from loftq_cli.cli import app
from loftq_cli.config import QuantizeConfig, load_config
from loftq_cli.errors import LoftqError, again, was_interrupted
from tests.test_eval import save_tokenizer

FAST = ["--bits=2", "--rank=4", "--iters=1", "--device=cpu"]


def loftq(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_quantize_verify_inspect(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = loftq("quantize", *FAST, tiny_llama, out)
    assert result.exit_code == 0, result.stderr
    assert "model.layers.*.mlp.down_proj" in result.stdout
    assert "output head" in result.stdout
    assert f'AutoModelForCausalLM.from_pretrained("{out}")' in result.stdout
    assert f'PeftModel.from_pretrained(base, "{out}", subfolder="loftq_init", is_trainable=True)' in result.stdout
    assert "gptqmodel" in result.stdout
    assert f"loftq verify {out} --source {tiny_llama}" in result.stdout
    assert "format `gptq`" in result.stderr
    assert not (out / ".loftq").exists()

    checked = loftq("verify", out, "--source", tiny_llama)
    assert checked.exit_code == 0, checked.stdout
    assert "14 weights recomputed" in checked.stdout

    shown = loftq("inspect", out, "--html", tmp_path / "page.html")
    assert shown.exit_code == 0, shown.stderr
    assert "self_attn.q_proj" in shown.stdout
    assert "self_attn.q_proj" in (tmp_path / "page.html").read_text()

    again = loftq("quantize", *FAST, tiny_llama, out)
    assert again.exit_code == 0
    assert "nothing to do" in again.stderr


def test_json_is_one_object_on_stdout(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    printed = json.loads(loftq("quantize", *FAST, "--json", tiny_llama, out).stdout)
    report = json.loads((out / "loftq_report.json").read_text())
    assert printed == {key: value for key, value in report.items() if key != "weights"}
    totals = report["totals"]
    assert totals["weights"] == len(report["weights"]) == 14
    assert totals["parameters"] == sum(m * n for m, n in (row["shape"] for row in report["weights"]))
    assert 0 < totals["relative_error"] < totals["relative_error_without_adapter"] < 1
    assert set(totals["seconds"]) == {"total", "read", "text", "quantize", "low_rank", "train", "write"}
    assert set(report["files"]) == {"model.safetensors", "config.json", "loftq_init/adapter_model.safetensors"}

    assert json.loads(loftq("verify", "--json", out, "--source", tiny_llama).stdout)["ok"] is True
    shown = loftq("inspect", "--json", "--html", out.parent / "page.html", out)
    assert json.loads(shown.stdout)["totals"] == totals
    assert "self_attn.q_proj" in (out.parent / "page.html").read_text()


def test_a_dry_run_says_what_the_run_would_be_refused_for(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    for out, told in ((tmp_path / "mine", "nothing that loftq made"), (tiny_llama, "holds the MODEL itself")):
        result = loftq("quantize", *FAST, "--dry-run", "--json", tiny_llama, out)
        assert result.exit_code == 0
        assert json.loads(result.stdout)["key"]
        assert told in result.stderr.replace("\n", " ")
    assert "refused" not in loftq("quantize", *FAST, "--dry-run", tiny_llama, tmp_path / "new").stderr


def test_dry_run_writes_nothing_and_needs_headers_only(sharded_llama: Path, tmp_path: Path) -> None:
    result = loftq("quantize", *FAST, "--dry-run", "--json", sharded_llama, tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert list(tmp_path.iterdir()) == []
    planned = json.loads(result.stdout)
    reasons = {row["name"]: row["reason"] for row in planned["skipped"]}
    assert reasons["lm_head.weight"] == "output head"
    made = json.loads(loftq("quantize", *FAST, "--json", sharded_llama, tmp_path / "out").stdout)["totals"]
    for key in ("weights", "parameters", "bits_per_weight", "base_bytes", "adapter_bytes"):
        assert planned["totals"][key] == made[key]
    shards = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert made["base_bytes"] == shards
    assert made["adapter_bytes"] == (tmp_path / "out/loftq_init/adapter_model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--bits=5"], 2, "`--bits 5`"),
        (["--quantizer=unifrm"], 2, "did you mean `uniform`"),
        (["--device=gpu"], 2, "`--device gpu`"),
        (["--bits-for=down_proj"], 2, "GLOB=BITS"),
        (["--bits-for=*.down_proj=5"], 2, "`--bits-for *.down_proj=5`"),
        (["--bits-for=blocks[40:]=3"], 1, "`model.layers` has 2"),
        (["--bits-for=block[0]=3"], 1, "`blocks[5:6]`"),
        (["--bits=2", "--double-quant", "--format=gptq"], 2, "packed"),
        (["--resume", "--overwrite"], 2, "contradict"),
        (["--no-such-flag"], 2, "No such option"),
        (["--config=absent.yaml"], 2, "`absent.yaml`"),
        (["--rank=4000"], 1, "--rank 64"),
        (["--bits=2", "--group-size=100", "--format=gptq"], 1, "does not divide"),
        (["--skip=nothing"], 1, "matches no linear layer"),
    ],
)
def test_exit_codes_and_sentences(tiny_llama: Path, tmp_path: Path, arguments: list[str], code: int, said: str) -> None:
    rank = [] if any("rank" in argument for argument in arguments) else ["--rank=4"]
    result = loftq("quantize", *rank, *arguments, tiny_llama, tmp_path / "out")
    assert result.exit_code == code, result.stderr
    assert result.stdout == ""
    assert said in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_bits_that_no_weight_has_are_noticed(tiny_llama: Path, tmp_path: Path) -> None:
    result = loftq("quantize", "--bits=2", "--rank=4", "--bits-for=blocks[:50]=4", "--dry-run", tiny_llama, tmp_path)
    assert "no weight is left at `--bits 2`" in result.stderr.replace("\n", " ")


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    result = loftq("quantize", tmp_path / "absent", tmp_path / "out")
    assert result.exit_code == 1
    assert "absent" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("where", "path"),
    [
        ("mkdir", "out/.loftq"),
        ("iterdir", "model"),
        ("is_dir", "model"),
        ("open", "model/model.safetensors"),
        ("read_bytes", "model/config.json"),
    ],
)
def test_what_one_may_not_read_or_write_is_named_with_a_way_out(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, path: str
) -> None:
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    plain = getattr(Path, where)

    def denied(self: Path, *arguments: object, **options: object) -> object:
        if self == tmp_path / path:  # root may do anything, so chmod would not do
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return plain(self, *arguments, **options)

    monkeypatch.setattr(Path, where, denied)
    result = loftq("quantize", *FAST, "--format=dense", model, tmp_path / "out")
    assert result.exit_code == 1
    said = result.stderr.replace("\n", " ")
    assert "Permission denied" in said
    assert f"`{tmp_path / path}`" in said
    there = tmp_path / path if path.startswith("model") else tmp_path
    assert f"choose another folder, or let the owner of `{there}` give you access" in said
    assert f"`chmod u+rwX {there}`" in said
    assert not (tmp_path / "out").exists()


def test_traceback_only_with_vv(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loftq_cli", "verify", str(tmp_path)]
    assert "Traceback" not in subprocess.run([*command, "-v"], capture_output=True, text=True).stderr
    loud = subprocess.run([*command, "-vv"], capture_output=True, text=True)
    assert loud.returncode == 1
    assert "Traceback" in loud.stderr


def test_ctrl_c_that_a_library_tells_as_its_own_failure(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first second it comes while torch and transformers are imported, which say what they think of that."""

    def as_cause() -> None:
        raise ImportError("cannot import name `x`") from KeyboardInterrupt()

    def as_context() -> None:
        try:
            as_cause()
        except ImportError:
            raise RuntimeError("Failed to import a model") from None

    def while_cleaning_up() -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise LoftqError("cannot write `x`")

    def without_a_trace() -> None:
        error = ImportError("cannot import name `x`")
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise error

    command = ["quantize", *FAST, "--format=dense", tiny_llama, tmp_path / "out"]
    for fail in (as_cause, as_context, while_cleaning_up, without_a_trace):
        for where in ("loftq_cli.pipeline.plan_quantize", "loftq_cli.pipeline.run_plan"):
            with monkeypatch.context() as patch:
                patch.setattr(where, lambda *_, fail=fail, **__: fail())
                result = loftq(*command)
            assert result.exit_code == 130, result.stderr
            assert "error: interrupted" in result.stderr
            assert "import" not in result.stderr
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    loop = ImportError("of itself")
    loop.__context__ = RuntimeError("in a circle")
    loop.__context__.__context__ = loop
    assert not was_interrupted(loop)


def test_ctrl_c_that_python_loses_ends_the_run_all_the_same(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*arguments: object, **options: object) -> object:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        return plan_quantize(*arguments, **options)

    plan_quantize = pipeline.plan_quantize
    monkeypatch.setattr(pipeline, "plan_quantize", lost)
    result = loftq("quantize", *FAST, "--format=dense", tiny_llama, tmp_path / "out")
    assert result.exit_code == 130, result.stderr
    assert "interrupted; what is done is kept" in result.stderr


def test_ctrl_c_waits_for_the_end_of_an_import(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of torch's, it is an abort."""
    (tmp_path / "delicate.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\nended = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    ended = []

    def planning(*_: object, **__: object) -> None:
        ended.append(importlib.import_module("delicate").ended)
        time.sleep(20)
        raise AssertionError("not interrupted")

    monkeypatch.setattr(pipeline, "plan_quantize", planning)
    result = loftq("quantize", *FAST, tiny_llama, tmp_path / "out")
    assert ended == [True]
    assert result.exit_code == 130, result.stderr


def test_names_in_a_checkpoint_cannot_speak_to_the_terminal() -> None:
    from loftq_cli.console import Out

    out = Out()
    out.stdout.file = stream = io.StringIO()
    out.result("a\x1b[2Jb\x1b]0;title\x07c[/red][bold]d")
    out.table("\x1b[2J", [("name", "left")], [["\x9b2Je"]])
    assert not any(character in stream.getvalue() for character in "\x1b\x07\x9b")
    assert "[/red][bold]d" in stream.getvalue()


@pytest.mark.parametrize("quiet", [False, True])
def test_a_log_shows_that_there_is_life(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, quiet: bool
) -> None:
    from loftq_cli import console

    monkeypatch.setattr(console, "LINE_SECONDS", 0)
    with console.Out(quiet=quiet).progress("quantizing", 200) as advance:
        advance("a.b", 50)
        advance("c.d", 100)
    assert capsys.readouterr().err == ("" if quiet else "quantizing: 25%, a.b\nquantizing: 75%, c.d\n")


def test_version() -> None:
    assert loftq("--version").stdout == f"loftq {__version__}\n"


def test_config_file_stands_between_defaults_and_flags(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("bits: 3\nrank: 8\ngroup-size: 32\nskip: ['*.k_proj']\nbits_for: {'*.down_proj': 4}\n")
    config = load_config(file, {"rank": 4, "bits": None})
    assert (config.bits, config.rank, config.group_size) == (3, 4, 32)
    assert config.skip == ("*.k_proj",)
    assert config.bits_for == {"*.down_proj": 4}


@pytest.mark.parametrize("text", ["bit: 2", "bits: two", "- 2", "{", "rank: [1, 2]"])
def test_a_bad_config_file_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(text)
    result = loftq("quantize", "--config", file, "MODEL", "OUT")
    assert result.exit_code == 2
    assert "options.yaml" in result.stderr.replace("\n", "")


def test_flags_and_fields_are_the_same_set() -> None:
    import inspect

    from loftq_cli import cli

    flags = set(inspect.signature(cli.quantize).parameters)
    run_only = {"model", "out", "config", "resume", "overwrite", "dry_run", "json", "quiet", "verbose"}
    run_only |= {"push_to_hub", "private"}
    run_only.add("report_control")  # of a finished output, too
    assert flags - run_only == set(QuantizeConfig.model_fields)


def test_an_option_that_a_file_has_twice_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    """YAML itself takes the last."""
    file = tmp_path / "options.yaml"
    file.write_text("group-size: 32\nbits: 2\ngroup_size: 64\n")
    result = loftq("quantize", "--config", file, tiny_llama, tmp_path / "out")
    assert result.exit_code == 2
    assert "has `group_size` 2 times" in result.stderr.replace("\n", " ")


def test_a_file_on_the_way_to_OUT_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    result = loftq("quantize", *FAST, tiny_llama, tmp_path / "file" / "out")
    assert result.exit_code == 1
    said = result.stderr.replace("\n", " ")
    assert "Not a directory" in said
    assert "something on the way to this one is a file" in said
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[1] / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_presets_are_valid_and_plan(file: Path, tiny_llama: Path, tmp_path: Path) -> None:
    first, *rest = file.read_text().splitlines()
    assert first == f"# loftq quantize --config configs/{file.name} MODEL OUT"
    assert len(rest) < 15
    assert load_config(file)
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    save_tokenizer(model)  # some look at text
    assert loftq("quantize", "--config", file, "--dry-run", model, tmp_path / "out").exit_code == 0


def test_a_2_bit_model_made_without_text_says_what_it_is_worth(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--bits", "2", "--rank", "4", "--iters", "1", "--device", "cpu"]
    code = "import sys; sys.argv[0] = 'loftq'; from loftq_cli.cli import main; main()"
    command = [sys.executable, "-c", code, "quantize", *options, "--method", "loftq", str(tiny_llama), str(out)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120).stderr
    assert "hardly speaks" in said
    assert f"loftq quantize {' '.join(options)} {tiny_llama} {out} --method cloq --overwrite" in said.replace("\n", "")
    # of what no method that looks at text has, nothing is advised that would be refused
    tables = [*command, "--quantize-embeddings", "--format=dense", "--overwrite"]
    tables_said = subprocess.run(tables, capture_output=True, text=True, timeout=120)
    assert tables_said.returncode == 0
    assert "hardly speaks" not in tables_said.stderr
    subprocess.run([*command, "--overwrite"], capture_output=True, timeout=120, check=True)
    inspected = subprocess.run(
        [sys.executable, "-m", "loftq_cli", "inspect", str(out)], capture_output=True, text=True, timeout=120
    )
    assert "hardly" not in inspected.stderr + inspected.stdout
    four = [sys.executable, "-m", "loftq_cli", "quantize", "--rank", "4", "--iters", "1", "--device", "cpu"]
    done = subprocess.run([*four, str(tiny_llama), str(tmp_path / "four")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "hardly" not in done.stderr


def test_what_is_given_anew_replaces_what_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = ["loftq", "quantize", "--bits", "2", "--method", "qlora", "--resume", "MODEL", "OUT"]
    monkeypatch.setattr(sys, "argv", typed)
    assert again("--method", "cloq", "--overwrite") == "loftq quantize --bits 2 MODEL OUT --method cloq --overwrite"
    monkeypatch.setattr(sys, "argv", ["loftq", "quantize", "--method=qlora", "MODEL", "OUT"])
    assert again("--method", "cloq") == "loftq quantize MODEL OUT --method cloq"
    assert again("--resume") == "loftq quantize --method=qlora MODEL OUT --resume"
    monkeypatch.setattr(sys, "argv", ["loftq", "quantize", "--init", "cloq", "MODEL", "cloq"])
    assert again("--method", "cloq") == "loftq quantize --init cloq MODEL cloq --method cloq"
