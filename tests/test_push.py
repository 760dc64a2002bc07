"""`loftq push` against a loopback Hub that speaks the routes of the real one, with its faults."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from loftq_cli import quantize
from loftq_cli.cli import app
from loftq_cli.verify import verify
from tests.hub_server import TOKEN, Cut
from tests.hub_writes import READ_TOKEN, SIGNATURE, XET_TOKEN, Fault, WritableHub
from tests.test_hub_source import client_process

REPO = "org/tiny-2bit"
OPTIONS = ["--bits=2", "--rank=4", "--iters=1", "--device=cpu", "--format=dense"]


@pytest.fixture(scope="module")
def model(sharded_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(sharded_llama, tmp_path_factory.mktemp("model") / "secret place" / "tiny"))
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: tiny\nlicense_link: LICENSE\n---\n# Tiny\n")
    (folder / "LICENSE").write_text("do as you like\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"_name_or_path": str(folder), "of_a_part": {"_name_or_path": str(folder)}}  # as older transformers saved
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("push") / "out"
    quantize(model, out, bits=2, rank=4, iters=1, device="cpu", format="dense")
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WritableHub]:
    with WritableHub(tmp_path_factory.mktemp("hub") / "store") as server:
        yield server


@pytest.fixture
def hub(served: WritableHub) -> WritableHub:
    served.clear()
    return served


@dataclass
class Done:
    """What a command said, and how long it would have waited for the Hub."""

    returncode: int
    stdout: str
    stderr: str
    slept: list[float]


Loftq = Callable[..., Done]


def invoke(arguments: list[str], token: str) -> Done:
    """Runs in the client process."""
    slept: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", token)
        patch.setattr(time, "sleep", slept.append)  # the client waits between its attempts; here nobody needs to
        result = CliRunner().invoke(app, arguments)
    return Done(result.exit_code, result.stdout, result.stderr, slept)


def interrupt(arguments: list[str], token: str) -> Done:
    """Runs in the client process: Ctrl-C comes where the upload begins."""

    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.HfApi.create_commit", interrupted)
        return invoke(arguments, token)


@contextmanager
def command(environment: dict[str, str]) -> Iterator[Loftq]:
    """The command, in a process whose environment knows the loopback Hub alone."""
    with client_process(environment) as client:

        def run(*arguments: object, token: str = TOKEN, how: Callable[..., Done] = invoke) -> Done:
            done: Done = client(how, [str(argument) for argument in arguments], token)
            for secret in (TOKEN, READ_TOKEN, XET_TOKEN, SIGNATURE):
                assert secret not in done.stdout + done.stderr
            assert ("Traceback" in done.stderr) == ("-vv" in arguments)
            return done

        yield run


@pytest.fixture(scope="module")
def loftq(served: WritableHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loftq]:
    with command(served.environment(tmp_path_factory.mktemp("home"))) as run:
        yield run


@pytest.fixture(scope="module")
def loftq_xet(served: WritableHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loftq]:
    """As the Hub's client is where hf_xet is installed, which on most machines it is."""
    pytest.importorskip("hf_xet")
    impatient = {"HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1", "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms"}
    with command(served.environment(tmp_path_factory.mktemp("xet"), HF_HUB_DISABLE_XET="0", **impatient)) as run:
        yield run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def said(done: Done) -> str:
    return done.stderr.replace("\n", " ")


def test_pushed_and_downloaded_again_it_verifies_and_loads(
    hub: WritableHub, loftq: Loftq, out: Path, model: Path, tmp_path: Path
) -> None:
    (out / "notes.txt").write_text("mine")
    before = contents(out)
    done = loftq("push", "--json", "--message", "first", out, REPO)
    assert done.returncode == 0, done.stderr
    assert "notes.txt" in done.stderr
    assert contents(out) == before

    told = json.loads(done.stdout)
    assert told["url"] == f"{hub.endpoint}/{REPO}"
    assert told["commit"] == hub.repos[REPO].refs["main"]
    assert hub.messages == ["first"]
    assert not hub.repos[REPO].private
    there = hub.folder(REPO)
    assert told["files"] == {name: len(data) for name, data in contents(there).items() if name != ".gitattributes"}
    rewritten = {"README.md", "loftq_report.json", "loftq_init/adapter_config.json"}
    for name in set(before) - rewritten - {"notes.txt"}:
        assert (there / name).read_bytes() == before[name], name
    assert set(told["files"]) == set(before) - {"notes.txt"}
    for data in contents(there).values():
        assert b"secret place" not in data
        assert str(out).encode() not in data
        assert TOKEN.encode() not in data

    adapter = json.loads((there / "loftq_init/adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == (REPO, None)
    load = f"""
import sys
from huggingface_hub import snapshot_download
snapshot_download({REPO!r}, local_dir=sys.argv[1])
"""
    downloaded = tmp_path / "downloaded"
    environment = {**os.environ, **hub.environment(tmp_path / "home")}
    subprocess.run([sys.executable, "-c", load, str(downloaded)], check=True, env=environment, capture_output=True)
    verdict = verify(downloaded, str(model))
    assert (verdict.violations, verdict.weights) == ((), 14)

    card = (there / "README.md").read_text()
    lines = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert lines
    assert lines[1].count(f'"{REPO}"') == 2
    check = (
        "\nassert model.peft_config['default'].base_model_name_or_path == 'org/tiny-2bit'\nprint(type(base).__name__)"
    )
    ran = subprocess.run([sys.executable, "-c", lines[1] + check], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.endswith("LlamaForCausalLM\n")  # PEFT imports packages that talk

    hub.reset()
    again = loftq("push", out, REPO)  # nothing has changed: no upload, no commit
    assert again.returncode == 0, again.stderr
    assert not hub.uploads
    assert hub.messages == ["first"]
    assert f'from_pretrained("{REPO}")' in again.stdout

    # from where it was downloaded it can be pushed on, to a branch of another repo
    on = loftq("push", "--revision", "trial", downloaded, "org/other")
    assert on.returncode == 0, on.stderr
    other = hub.folder("org/other", "trial")
    assert '"org/other", revision="trial"' in (other / "README.md").read_text()
    assert REPO not in (other / "README.md").read_text()
    adapter = json.loads((other / "loftq_init/adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("org/other", "trial")
    assert verify(other, str(model)).violations == ()
    assert set(contents(hub.folder("org/other"))) == {".gitattributes"}  # main is as it was

    # a pull request is to become part of main: nothing names it
    hub.repos["org/other"].refs["refs/pr/1"] = hub.repos["org/other"].refs["main"]
    assert loftq("push", "--revision", "refs/pr/1", out, "org/other").returncode == 0
    proposed = hub.folder("org/other", "refs/pr/1")
    assert 'from_pretrained("org/other")' in (proposed / "README.md").read_text()
    assert json.loads((proposed / "loftq_init/adapter_config.json").read_text())["revision"] is None


def test_what_the_hub_s_card_says_loads_where_loftq_is_not_installed(
    hub: WritableHub, loftq: Loftq, model: Path, tmp_path: Path
) -> None:
    out, branch = tmp_path / "packed", "some/trïal"
    quantize(model, out, bits=2, rank=4, iters=1, device="cpu", format="packed")
    done = loftq("push", "--revision", branch, out, REPO)
    assert done.returncode == 0, done.stderr
    assert f"{hub.endpoint}/{REPO}/tree/some%2Ftr%C3%AFal" in done.stdout
    assert "import loftq_cli.runtime\n" in (out / "README.md").read_text()
    lines = re.search(r"```python\n(.*?)```", (hub.folder(REPO, branch) / "README.md").read_text(), re.DOTALL)
    assert lines
    assert lines[1].strip() in done.stdout.replace("\n  ", "\n")
    blocked = "import sys\nsys.modules['loftq_cli'] = None\n"
    check = "\nprint(type(base.model.layers[0].mlp.up_proj.base_layer).__name__)"
    environment = {**os.environ, **hub.environment(tmp_path / "home")}
    code = blocked + lines[1] + check
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.endswith("PackedLinear\n")

    # pushed on from where it was downloaded
    downloaded = tmp_path / "downloaded"
    shutil.copytree(hub.folder(REPO, branch), downloaded)
    assert loftq("push", downloaded, "org/other").returncode == 0
    card = (hub.folder("org/other") / "README.md").read_text()
    assert card.count('"org/other", ') == 2
    assert REPO not in card


def test_dry_run_asks_nothing_of_the_hub(hub: WritableHub, loftq: Loftq, out: Path) -> None:
    done = loftq("push", "--dry-run", "--json", out, REPO, token="")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["bytes"] == sum(told["files"].values())
    assert set(told["files"]) == set(contents(out))
    shown = loftq("push", "--dry-run", out, REPO, token="")
    assert f"{told['bytes']:,}" in shown.stdout
    assert hub.requests == []


def test_what_verify_refuses_is_not_pushed(hub: WritableHub, loftq: Loftq, out: Path, tmp_path: Path) -> None:
    path = out / "loftq_init/adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    changed = loftq("push", out, REPO)
    path.unlink()
    missing = loftq("push", out, REPO)
    unfinished = tmp_path / "unfinished"
    (unfinished / ".loftq").mkdir(parents=True)
    (unfinished / ".loftq/journal.jsonl").write_text("{}\n")
    begun = loftq("push", unfinished, REPO)
    foreign = loftq("push", tmp_path, REPO)
    for done, words in (
        (changed, "is not what loftq wrote"),
        (missing, "is not what loftq wrote"),
        (begun, "unfinished run"),
        (foreign, "no `loftq_report.json`"),
    ):
        assert done.returncode == 1
        assert words in said(done)
    assert hub.requests == []


@pytest.mark.parametrize("missing", ["tokenizer_config.json", "README.md"])
def test_what_is_not_for_weights_must_be_there_too(hub: WritableHub, loftq: Loftq, out: Path, missing: str) -> None:
    (out / missing).unlink()
    done = loftq("push", out, REPO)
    assert done.returncode == 1
    assert missing in said(done)
    assert hub.requests == []


def test_a_tokenizer_that_was_mended_is_pushed_as_it_is(hub: WritableHub, loftq: Loftq, out: Path) -> None:
    (out / "tokenizer_config.json").write_text("{}")
    done = loftq("push", out, REPO)
    assert done.returncode == 0, done.stderr
    assert "pushed as it is: tokenizer_config.json" in said(done)
    assert (hub.folder(REPO) / "tokenizer_config.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("/home/me/secret/corpus", "corpus"),
        ("~/secret/corpus", "corpus"),
        ("../secret/corpus.jsonl", "corpus.jsonl"),
        ("secret/corpus.txt", "corpus.txt"),
        ("allenai/c4:en.noblocklist", "allenai/c4:en.noblocklist"),
        ("me/corpus-1.5", "me/corpus-1.5"),
    ],
)
def test_of_a_calibration_text_the_path_stays_here(
    hub: WritableHub, loftq: Loftq, out: Path, given: str, told: str
) -> None:
    report = json.loads((out / "loftq_report.json").read_text())
    report["config"]["calibration"] = given
    (out / "loftq_report.json").write_text(json.dumps(report))
    done = loftq("push", out, REPO)
    assert done.returncode == 0, done.stderr
    assert json.loads((hub.folder(REPO) / "loftq_report.json").read_text())["config"]["calibration"] == told


def test_a_report_that_names_files_elsewhere(hub: WritableHub, loftq: Loftq, out: Path) -> None:
    report = json.loads((out / "loftq_report.json").read_text())
    report["side_files"]["../secret"] = "0" * 64
    (out.parent / "secret").write_text("mine")
    (out / "loftq_report.json").write_text(json.dumps(report))
    done = loftq("push", out, REPO)
    assert done.returncode == 1
    assert "not in the folder" in said(done)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("repo", "token", "code", "words"),
    [
        ("tiny", TOKEN, 2, "owner and name"),
        ("org/a b", TOKEN, 2, "not a Hub id"),
        (REPO, "", 1, "no token"),
        (REPO, "hf_wrong", 1, "does not accept the token (401)"),
        (REPO, READ_TOKEN, 1, "may not write to `org/tiny-2bit` (403)"),
        ("others/tiny", TOKEN, 1, "may not write to `others/tiny` (403)"),
    ],
)
def test_who_may_not(hub: WritableHub, loftq: Loftq, out: Path, repo: str, token: str, code: int, words: str) -> None:
    done = loftq("push", out, repo, token=token)
    assert done.returncode == code
    assert words in said(done)
    if code == 1:
        assert "hf auth login" in said(done)
    assert hub.repos == {}


def test_who_may_not_write_to_what_is_there(
    hub: WritableHub, loftq: Loftq, out: Path, model: Path, tmp_path: Path
) -> None:
    """A token that may not make repos may write to one, and one that reads is refused before hours of work."""
    assert loftq("push", out, REPO).returncode == 0
    hub.reset()
    made = tmp_path / "made"
    for arguments in (["push", out, REPO], ["quantize", *OPTIONS, "--push-to-hub", REPO, model, made]):
        refused = loftq(*arguments, token=READ_TOKEN)
        assert refused.returncode == 1
        assert "may not write to `org/tiny-2bit` (403)" in said(refused)
    assert not made.exists()
    assert not [request for request in hub.requests if "preupload" in request.path]
    hub.repos[REPO].refs["refs/pr/1"] = hub.repos[REPO].refs["main"]
    (out / "README.md").write_text("---\nlicense: mit\n---\n# Better\n")
    proposed = loftq("push", "--revision", "refs/pr/1", out, REPO, token=READ_TOKEN)
    assert proposed.returncode == 0, proposed.stderr
    assert "# Better" in (hub.folder(REPO, "refs/pr/1") / "README.md").read_text()


def test_private_means_private(hub: WritableHub, loftq: Loftq, out: Path) -> None:
    done = loftq("push", "--private", out, REPO)
    assert done.returncode == 0, done.stderr
    assert hub.repos[REPO].private
    hub.repos[REPO].private = False
    hub.reset()
    again = loftq("push", "--private", out, REPO)
    assert again.returncode == 1
    assert "and public" in said(again)
    assert not [request for request in hub.requests if "/commit/" in request.path]


def test_another_model_is_not_replaced_and_an_older_push_is(
    hub: WritableHub, loftq: Loftq, out: Path, model: Path, tmp_path: Path
) -> None:
    mine = Path(shutil.copytree(model, tmp_path / "mine"))
    (mine / "adapter_config.json").write_text("{}")
    others = {"onnx/model-1.safetensors", "tokenizer_config.json", "onnx/config.json"}
    for name in others:
        (mine / name).parent.mkdir(exist_ok=True)
        (mine / name).write_text("{}")
    hub.add("org/mine", mine)
    done = loftq("push", out, "org/mine")
    assert done.returncode == 1
    assert "holds another model" in said(done)
    assert contents(hub.folder("org/mine")) == contents(mine)

    way_out = re.search(r"`hf (repos delete-files org/mine .*)`", said(done))
    assert way_out
    environment = {**os.environ, **hub.environment(tmp_path / "home", HF_TOKEN=TOKEN)}
    deletes = [sys.executable, "-m", "huggingface_hub.cli.hf", *shlex.split(way_out[1])]
    subprocess.run(deletes, check=True, env=environment, capture_output=True)
    assert shlex.split(way_out[1])[3:] == ["adapter_config.json", "model-*-of-*.safetensors"]
    gone = contents(mine).keys() - contents(hub.folder("org/mine")).keys()
    assert gone == {"adapter_config.json", *(path.name for path in model.glob("*.safetensors"))}
    assert loftq("push", out, "org/mine").returncode == 0

    # an earlier push of a single file, with a note of the user's
    assert loftq("push", out, REPO).returncode == 0
    whole = tmp_path / "whole"
    from tests.conftest import save_llama

    quantize(save_llama(tmp_path / "single"), whole, bits=2, rank=4, iters=1, device="cpu", format="dense")
    (hub.folder(REPO) / "NOTES.md").write_text("mine")
    done = loftq("push", "--json", whole, REPO)
    assert done.returncode == 0, done.stderr
    there = contents(hub.folder(REPO))
    assert "NOTES.md" in there
    assert not [name for name in there if name.startswith("model-0")]
    assert set(json.loads(done.stdout)["deleted"]) == set(contents(out)) - set(contents(whole))
    assert verify(hub.folder(REPO)).violations == ()


def test_a_branch_beside_another_model(hub: WritableHub, loftq: Loftq, out: Path, model: Path, tmp_path: Path) -> None:
    """It does not inherit the model of main; where the first commit holds one already, no branch is made."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/.gitattributes").write_text("")
    hub.add("org/mine", tmp_path / "empty")
    hub.add("org/mine", model)
    done = loftq("push", "--revision", "2bit", out, "org/mine")
    assert done.returncode == 0, done.stderr
    assert contents(hub.folder("org/mine")) == contents(model)
    assert set(contents(hub.folder("org/mine", "2bit"))) == {*contents(out), ".gitattributes"}
    assert loftq("push", "--revision", "2bit", out, "org/mine").returncode == 0

    hub.add("org/squashed", model)
    done = loftq("push", "--revision", "2bit", out, "org/squashed")
    assert done.returncode == 1
    assert "holds another model" in said(done)
    assert "delete-files" not in said(done)
    assert hub.repos["org/squashed"].refs.keys() == {"main"}


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "model.Q4_K_M.gguf", "model.onnx", "tf_model.h5", "flax_model.msgpack", "a.pt", "a.ckpt"],
)
def test_a_model_of_another_kind_is_not_replaced(
    hub: WritableHub, loftq: Loftq, out: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_bytes(b"weights")
    (tmp_path / "mine/config.json").write_text("{}")
    hub.add("org/mine", tmp_path / "mine")
    done = loftq("push", out, "org/mine")
    assert done.returncode == 1
    assert f"`{name}` is not from loftq" in said(done)
    assert f"delete-files org/mine {name}`" in said(done)
    assert contents(hub.folder("org/mine")).keys() == {name, "config.json"}


@pytest.mark.parametrize("line", ["*.safetensors", "tokenizer_config.json"])
def test_what_a_gitignore_keeps_out_is_said(
    hub: WritableHub, loftq: Loftq, out: Path, tmp_path: Path, line: str
) -> None:
    """Be it missing there, or still that of an earlier push."""
    if line == "tokenizer_config.json":
        assert loftq("push", out, REPO).returncode == 0
        (out / "tokenizer_config.json").write_text("{}")
    folder = Path(shutil.copytree(hub.folder(REPO), tmp_path / "there")) if REPO in hub.repos else tmp_path / "there"
    folder.mkdir(exist_ok=True)
    (folder / ".gitignore").write_text(line + "\n")
    hub.add(REPO, folder)
    done = loftq("push", out, REPO)
    assert done.returncode == 1
    named = {"*.safetensors": "`, `model-00003-of-00003.safetensors` and 1 more: its"}
    assert named.get(line, f"did not take `{line}`: its") in said(done)
    assert "`.gitignore`" in said(done)
    (hub.folder(REPO) / ".gitignore").unlink()
    done = loftq("push", out, REPO)
    assert done.returncode == 0, done.stderr
    assert contents(hub.folder(REPO))["tokenizer_config.json"] == (out / "tokenizer_config.json").read_bytes()
    assert verify(hub.folder(REPO)).violations == ()


@pytest.mark.parametrize("beside", [[], ["all/9.safetensors"]])
def test_a_way_out_that_deletes_no_more_than_the_other_model(
    hub: WritableHub, loftq: Loftq, out: Path, tmp_path: Path, beside: list[str]
) -> None:
    weights = [f"part{i}[{i}].safetensors" for i in range(2)] + [f"{i}.safetensors" for i in range(4)]
    for name in weights + beside:
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / name).write_text("weights")
    hub.add("org/mine", tmp_path / "mine")
    way_out = re.search(r"`hf repos delete-files org/mine (.*)`", said(loftq("push", out, "org/mine")))
    assert way_out
    assert not re.search(r"'\*", way_out[1])
    there = weights + beside
    taken = {name for pattern in shlex.split(way_out[1]) for name in fnmatch.filter(there, pattern)}
    assert taken == set(weights)


def test_the_hub_says_later(hub: WritableHub, loftq: Loftq, out: Path) -> None:
    """429 with Retry-After where the client itself would give up, and where it tries again."""
    for route in ("repos/create", "preupload", "/upload/"):
        hub.faults.append(Fault(route, 429, headers={"Retry-After": "7"}))
    hub.faults.append(Fault("/commit/", 429, headers={"ratelimit": '"api";r=0;t=33'}))
    done = loftq("push", out, REPO)
    assert done.returncode == 0, done.stderr
    assert verify(hub.folder(REPO)).violations == ()
    assert len([seconds for seconds in done.slept if seconds >= 7]) == 4
    assert 33 in done.slept
    assert "answered 429: going on in 7 s" in said(done)
    assert all(fault.times == 0 for fault in hub.faults)


def test_what_is_read_is_asked_for_again_too(hub: WritableHub, loftq: Loftq, out: Path) -> None:
    assert loftq("push", "--private", out, "org/read").returncode == 0
    (out / "README.md").write_text("---\nlicense: mit\n---\n# Better\n")
    hub.reset()
    for route in ("/auth-check/", "GET /api/models/org/read$"):
        hub.faults += [Fault(route, 503), Fault(route, 0), Fault(route, 429, headers={"Retry-After": "7"})]
    hub.faults += [Fault(hub.faults[-1].pattern, 502, after=place) for place in (1, 2)]  # it is asked three times
    hub.faults.append(Fault("(HEAD|GET) /org/read/resolve/.*report.json", 503, times=7))
    done = loftq("push", "--private", out, "org/read")
    assert done.returncode == 0, done.stderr
    assert all(fault.times == 0 for fault in hub.faults), hub.faults
    assert "# Better" in (hub.folder("org/read") / "README.md").read_text()


def test_a_proxy_s_page_in_place_of_an_answer(hub: WritableHub, loftq: Loftq, out: Path) -> None:
    page = b"<html>502 Bad Gateway</html>"
    hub.faults.append(Fault("validate-yaml", 502, times=2, page=page))
    done = loftq("push", out, REPO)
    assert done.returncode == 0, done.stderr
    hub.clear()
    hub.faults.append(Fault("validate-yaml", 502, times=99, page=page))
    done = loftq("push", out, REPO)
    assert done.returncode == 1
    assert "answered with what is not JSON" in said(done)
    assert "the same command goes on" in said(done)


def test_a_date_to_wait_for(hub: WritableHub, loftq: Loftq, out: Path) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=300), usegmt=True)
    hub.faults.append(Fault("/commit/", 429, headers={"Retry-After": date}))
    done = loftq("push", out, REPO)
    assert done.returncode == 0, done.stderr
    assert [seconds for seconds in done.slept if 200 < seconds <= 300]


def test_what_others_commit_meanwhile_is_not_overwritten(
    hub: WritableHub, loftq: Loftq, out: Path, model: Path, tmp_path: Path
) -> None:
    assert loftq("push", out, REPO).returncode == 0
    theirs = Path(shutil.copytree(hub.folder(REPO), tmp_path / "theirs"))
    (theirs / "README.md").write_text("theirs")
    (out / "README.md").write_text("---\nlicense: mit\n---\n# Better\n")
    hub.on_commit = lambda: void(hub.add(REPO, theirs))
    done = loftq("push", out, REPO)
    assert done.returncode == 1
    assert "something else is writing" in said(done)
    assert contents(hub.folder(REPO))["README.md"] == b"theirs"
    assert loftq("push", out, REPO).returncode == 0
    assert b"# Better" in contents(hub.folder(REPO))["README.md"]


def test_what_others_commit_while_it_waits_is_not_overwritten(
    hub: WritableHub, loftq: Loftq, out: Path, tmp_path: Path
) -> None:
    assert loftq("push", out, REPO).returncode == 0
    theirs = Path(shutil.copytree(hub.folder(REPO), tmp_path / "theirs"))
    (theirs / "README.md").write_text("theirs")
    (theirs / "config.json").write_text("{}")
    (out / "tokenizer_config.json").write_text("{}")  # the report does not tell this push from the last
    hub.faults.append(Fault("/commit/", 429, meanwhile=lambda: hub.add(REPO, theirs)))
    done = loftq("push", out, REPO)
    assert done.returncode == 1
    assert "something else is writing" in said(done)
    assert contents(hub.folder(REPO)) == contents(theirs)
    assert len(hub.messages) == 1


def void(value: object) -> None:
    pass


def test_an_answer_that_is_lost_is_no_second_commit(hub: WritableHub, loftq: Loftq, out: Path) -> None:
    hub.lose_answer = True
    done = loftq("push", "--json", out, REPO)
    assert done.returncode == 0, done.stderr
    assert len(hub.messages) == 1
    assert json.loads(done.stdout)["commit"] == hub.repos[REPO].refs["main"]


def test_interrupted(hub: WritableHub, loftq: Loftq, out: Path, model: Path) -> None:
    pushed = loftq("push", "--revision", "trial", out, REPO, how=interrupt)
    made = loftq("quantize", *OPTIONS, "--push-to-hub", "org/made", "--private", model, out, how=interrupt)
    assert pushed.returncode == made.returncode == 130
    assert "the same command goes on" in said(pushed)
    assert f"go on with `loftq push --private {out} org/made`" in said(made)


def test_one_commit_or_none(hub: WritableHub, loftq_xet: Loftq, out: Path, tmp_path: Path) -> None:
    """However many files and attempts: half a push would leave weights that nobody could tell from another model's."""
    from tests.conftest import save_llama

    many = save_llama(tmp_path / "many", torch.bfloat16, "60KB", num_hidden_layers=3, vocab_size=128)
    large = tmp_path / "large"
    quantize(many, large, bits=2, rank=4, iters=1, device="cpu", format="dense")
    hub.offer(large)
    hub.offer(out)
    hub.faults += [Fault("/commit/", 503, times=36), Fault("/commit/", 503, times=10_000, after=1)]
    broken = loftq_xet("push", large, REPO)
    assert broken.returncode == 1
    assert "answered 503" in said(broken)
    assert hub.bytes_served["xorbs"] > 100_000
    assert set(contents(hub.folder(REPO))) == {".gitattributes"}
    hub.reset()
    done = loftq_xet("push", out, REPO)
    assert done.returncode == 0, done.stderr
    assert verify(hub.folder(REPO)).violations == ()
    done = loftq_xet("push", large, REPO)
    assert done.returncode == 0, done.stderr
    assert verify(hub.folder(REPO)).violations == ()
    assert len(hub.messages) == 2
    assert not [request for request in hub.requests if request.method == "PUT"]


@pytest.mark.parametrize(
    ("route", "status", "words"),
    [
        ("xet-write-token", 401, "does not accept the token (401)"),
        ("xet-write-token", 403, "may not write to `org/tiny-2bit` (403)"),
        ("xet-write-token", 500, "answered 500"),
        ("/v1/shards", 403, "the Hub's storage refuses the upload (403)"),
        ("/v1/shards", 429, "too many requests (429)"),
        ("/v1/shards", 400, "refused `org/tiny-2bit` (400)"),
        ("/v1/shards", 503, "answered 503"),
        ("/v1/shards", 0, "lost the connection"),
    ],
)
def test_what_goes_wrong_over_xet(
    hub: WritableHub, loftq_xet: Loftq, out: Path, route: str, status: int, words: str
) -> None:
    hub.offer(out)
    hub.faults.append(Fault(route, status, times=10_000))
    done = loftq_xet("push", out, REPO)
    assert done.returncode == 1
    assert words in said(done)
    assert hub.storage not in done.stderr
    asked = len([request for request in hub.requests if "xet-write-token" in request.path])
    assert (asked > 1) == (status in (0, 429, 500, 503))  # what can pass is tried again
    hub.faults.clear()
    hub.faults.append(Fault(route, 503, times=3))
    done = loftq_xet("push", out, REPO)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("flags", [[], ["-vv"]])
def test_what_the_storage_refuses(hub: WritableHub, loftq: Loftq, out: Path, flags: list[str]) -> None:
    """Addresses that are signed are as good as a token: not even a traceback shows them."""
    hub.faults.append(Fault("PUT /upload/", 403, times=10_000))
    done = loftq("push", *flags, out, REPO)
    assert done.returncode == 1
    assert "the Hub's storage refuses the upload (403)" in said(done)


@pytest.mark.parametrize(
    ("status", "words"), [(429, "too many requests"), (409, "something else is writing"), (500, "answered 500")]
)
def test_what_does_not_pass_is_said(hub: WritableHub, loftq: Loftq, out: Path, status: int, words: str) -> None:
    hub.faults.append(Fault("/commit/", status, times=99))
    done = loftq("push", out, REPO)
    assert done.returncode == 1
    assert words in said(done)
    assert "the same command goes on" in said(done)
    tries = [request for request in hub.requests if "/commit/" in request.path]
    assert len(tries) == (1 if status == 409 else 4)
    hub.faults.clear()
    hub.uploads.clear()
    assert loftq("push", out, REPO).returncode == 0
    assert not hub.uploads  # they are there; only the commit was missing


def test_a_connection_that_breaks_and_comes_back(hub: WritableHub, loftq: Loftq, out: Path) -> None:
    hub.upload_cuts.append(Cut(after_bytes=1000, times=3))
    done = loftq("push", out, REPO)
    assert done.returncode == 0, done.stderr
    assert hub.upload_cuts[0].times == 0
    assert verify(hub.folder(REPO)).violations == ()


def test_a_push_that_broke_off_goes_on_where_it_was(hub: WritableHub, loftq: Loftq, out: Path) -> None:
    shards = len(list(out.rglob("*.safetensors")))
    hub.faults.append(Fault("PUT /upload/", 403, times=10_000, after=2))
    broken = loftq("push", out, REPO)
    assert broken.returncode == 1
    assert len(hub.uploads) == 2 < shards - 1
    assert set(contents(hub.folder(REPO))) == {".gitattributes"}  # nothing half-made shows
    first = set(hub.uploads)
    hub.reset()
    done = loftq("push", out, REPO)
    assert done.returncode == 0, done.stderr
    assert len(hub.uploads) == shards - 2
    assert not first & set(hub.uploads)
    assert verify(hub.folder(REPO)).violations == ()


def test_no_connection_at_all(out: Path, tmp_path: Path) -> None:
    with WritableHub(tmp_path / "store") as gone:
        environment = gone.environment(tmp_path)
    with client_process(environment) as client:
        done = client(invoke, ["push", str(out), REPO], TOKEN)
    assert done.returncode == 1
    assert f"{gone.endpoint} lost the connection" in said(done)


def test_quantize_pushes_what_it_made(hub: WritableHub, loftq: Loftq, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for flags, token, words in (
        (["--push-to-hub", REPO], READ_TOKEN, "may not write"),
        (["--push-to-hub", REPO], "", "no token"),
        (["--push-to-hub", "tiny"], TOKEN, "owner and name"),
        (["--private"], TOKEN, "`--private` is for `--push-to-hub`"),
    ):
        refused = loftq("quantize", *OPTIONS, *flags, model, out, token=token)
        assert refused.returncode in (1, 2)
        assert words in said(refused)
        assert not out.exists()  # before any work
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    refused = loftq("quantize", *OPTIONS, "--push-to-hub", REPO, model, out)
    assert refused.returncode == 1
    assert "is not empty" in said(refused)
    assert hub.repos == {}  # no repo is made for what is refused here
    shutil.rmtree(out)
    command = ["quantize", *OPTIONS, "--json", "--push-to-hub", REPO, "--private", model, out]
    done = loftq(*command)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["push"]["commit"] == hub.repos[REPO].refs["main"]
    assert told["totals"] == json.loads((out / "loftq_report.json").read_text())["totals"]
    assert hub.repos[REPO].private
    assert verify(hub.folder(REPO), str(model)).violations == ()
    again = loftq(*command)  # in CI it is the same command again
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["push"]["commit"] == told["push"]["commit"]
    (out / "tokenizer_config.json").write_text("{}")
    mended = loftq(*command)
    assert mended.returncode == 0, mended.stderr
    assert "pushed as it is: tokenizer_config.json" in said(mended)
    hub.faults.append(Fault("preupload", 403, times=99))
    failed = loftq(*command)
    assert failed.returncode == 1
    assert "push" not in json.loads(failed.stdout)  # what was made is told all the same
