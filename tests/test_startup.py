"""What the command line leaves out to start quickly: it must leave out much, and change no plan."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers as tf

from tests.conftest import save_llama

DRY_RUN = ("quantize", "--dry-run", "--quiet", "--json", "--bits", "2", "--rank", "4", "--device", "cpu")
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4, "vocab_size": 160}
WHISPER = {
    "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 160, "num_mel_bins": 16, "max_source_positions": 32,
    "max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
MIXTRAL = {**SIZES, "vocab_size": 160, "num_key_value_heads": 2, "num_local_experts": 2}
FAMILIES: dict[str, Callable[[], Any]] = {
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**SIZES, vocab_size=160)),
    "t5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5)),
    "vit": lambda: tf.ViTForImageClassification(tf.ViTConfig(**SIZES, image_size=32, patch_size=16)),
    "whisper": lambda: tf.WhisperForConditionalGeneration(tf.WhisperConfig(**WHISPER)),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**MIXTRAL)),
}
PACKAGES = ("torchvision", "torchaudio", "sklearn", "scipy", "pandas", "torchao")
# `_dynamo.utils`: the compiler itself, not what stands in for it
HEAVY = (*PACKAGES, "sympy", "torch._dynamo.utils", "torch.distributed.tensor")

# as `python -m loftq_cli`
RUN = "import loftq_cli.cli; loftq_cli.cli.main()"
# the same command in a process that is not ours: nothing is hidden
PLAIN = "import loftq_cli.cli; loftq_cli.cli.app()"


def run(code: str, *words: object, path: Path | None = None) -> tuple[dict[str, Any], set[str], str]:
    """The plan, the modules that the process and its children imported, and what else they said."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(path or ""), *sys.path]))}
    command = [sys.executable, "-X", "importtime", "-c", code, *DRY_RUN, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    imports = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    said = "\n".join(line for line in done.stderr.splitlines() if line not in imports)
    return json.loads(done.stdout), {line.rpartition("|")[2].strip() for line in imports}, said


def add_package(site: Path, name: str, version: str, text: str) -> None:
    """Install a package of one file, as transformers looks for it: a module and its metadata."""
    (site / name).mkdir(parents=True)
    (site / name / "__init__.py").write_text(text)
    metadata = site / f"{name}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_a_plan_imports_no_package_that_only_happens_to_be_installed(tiny_llama: Path, tmp_path: Path) -> None:
    for name, version in (("torchvision", "0.30.0"), ("sklearn", "1.9"), ("pandas", "3.0"), ("torchao", "0.18")):
        add_package(tmp_path / "site", name, version, f"raise RuntimeError('{name} was imported')")
    plan, imported, _ = run(RUN, tiny_llama, tmp_path / "out", path=tmp_path / "site")
    assert "transformers" in imported
    assert not imported.intersection(HEAVY)
    assert plan == run(PLAIN, tiny_llama, tmp_path / "out")[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_plans_are_those_of_a_full_process(family: str, tmp_path: Path) -> None:
    FAMILIES[family]().save_pretrained(tmp_path / "model")
    lean, imported, _ = run(RUN, tmp_path / "model", tmp_path / "out")
    assert not imported.intersection(PACKAGES)
    assert lean == run(PLAIN, tmp_path / "model", tmp_path / "out")[0]


def test_a_model_that_needs_what_is_hidden_is_planned_in_a_full_process(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "model", num_hidden_layers=1)
    add_package(tmp_path / "site", "kernels", "0.0.1", "")  # too old for transformers, which then ignores it
    # what a modeling file with an unconditional import comes to: it is run whenever a Python process starts
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import sys, importlib.abc\n"
        "class Needy(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'transformers.models.llama.modeling_llama':\n"
        "            print('needs', 'kernels', file=sys.stderr)\n"
        "            import kernels\n"
        "sys.meta_path.insert(0, Needy())\n"
    )
    plan, imported, said = run(RUN, model, tmp_path / "out", path=tmp_path / "site")
    assert said.count("needs kernels") == 3  # lightly, less lightly, in the process itself
    assert "kernels" in imported
    assert plan == run(PLAIN, model, tmp_path / "out")[0]


def test_a_refusal_is_the_same_in_both(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "model", num_hidden_layers=1)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForSomethingElse"]}))
    said = []
    for code in (RUN, PLAIN):
        command = [sys.executable, "-c", code, *DRY_RUN, str(model), str(tmp_path / "out")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 1
        said.append((done.stdout, done.stderr))
    assert said[0] == said[1]
    assert "LlamaForSomethingElse" in said[0][0] + said[0][1]


def test_a_library_hides_nothing_from_its_host() -> None:
    code = "from loftq_cli import lean, quantize; print(lean.possible())"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"


ENDINGS = {
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "killed in the middle of a word": "os.write(sender.fileno(), b'\\0\\0\\1\\0x'); os.kill(os.getpid(), 9)",
    "raises": "raise SystemExit(3)",
    "hangs": "time.sleep(60)",
    "cannot be understood": "return lambda: None",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_child_that_fails_is_gone_and_said_to_have_failed(ending: str) -> None:
    code = (
        "import os, signal, sys, time\n"
        "from loftq_cli import lean\n"
        "original, sender = lean._answer, None\n"
        "def answer(receiver, end, *rest):\n"
        "    global sender\n"
        "    sender = end\n"
        "    original(receiver, end, *rest)\n"
        "lean._answer, lean.PATIENCE_SECONDS = answer, 3\n"
        "def end():\n"
        f"    {ENDINGS[ending]}\n"
        "result = lean.begin(end)\n"
        "try:\n"
        "    print(result())\n"
        "except ChildProcessError:\n"
        "    lean.PATIENCE_SECONDS = 60\n"
        "    print('failed', lean.begin(os.getppid)() == os.getpid())\n"  # and the next one does not
        "import multiprocessing\n"
        "print(multiprocessing.active_children())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "failed True\n[]\n", done.stderr


def test_without_a_process_to_be_had_planning_stays_in_this_one(tiny_llama: Path, tmp_path: Path) -> None:
    no_fork = (
        "import os\ndef fork():\n    raise BlockingIOError(11, 'Resource temporarily unavailable')\nos.fork = fork\n"
    )
    plan, _, said = run(no_fork + RUN, tiny_llama, tmp_path / "out")
    assert said == ""
    assert plan == run(PLAIN, tiny_llama, tmp_path / "out")[0]


@pytest.mark.parametrize(
    ("number", "to_all", "code"),
    [(signal.SIGINT, True, 130), (signal.SIGINT, False, 130), (signal.SIGTERM, False, -15)],
)
def test_a_signal_while_the_model_is_built_ends_both_processes(
    tmp_path: Path, number: signal.Signals, to_all: bool, code: int
) -> None:
    model = save_llama(tmp_path / "model", num_hidden_layers=1)
    site, started = tmp_path / "site", tmp_path / "started"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import sys, os, time, importlib.abc\n"
        "class Slow(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'transformers.models.llama.modeling_llama':\n"
        f"            open({str(started)!r}, 'w').write(str(os.getpid()))\n"
        "            time.sleep(60)\n"
        "sys.meta_path.insert(0, Slow())\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *sys.path])}
    command = [sys.executable, "-c", RUN, *DRY_RUN, str(model), str(tmp_path / "out")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    while not (started.exists() and started.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    child = int(started.read_text())
    assert child != process.pid
    (os.killpg if to_all else os.kill)(process.pid, number)  # a terminal signals all of them
    _, said = process.communicate(timeout=20)
    assert process.returncode == code
    assert ("interrupted" in said) == (code == 130)
    assert "Traceback" not in said
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or "\nState:\tZ" in Path(f"/proc/{child}/status").read_text():
            return
        time.sleep(0.05)
    pytest.fail("the child lives on")
