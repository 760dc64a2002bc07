"""The README's examples, run as they stand there, in a folder of their own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from loftq_cli import quantize
from loftq_cli.verify import verify
from tests.conftest import save_llama
from tests.test_eval import save_tokenizer
from tests.test_ranks import run

ROOT = Path(__file__).parents[1]
SECTION = re.search(r"\n## Use it\n(.*?)\n## ", (ROOT / "README.md").read_text(), re.DOTALL)
assert SECTION
PYTHON = re.findall(r"```python\n(.*?)```", SECTION[1], re.DOTALL)
SERVED = dict(re.findall(r"^\| (`[^|]*`) \| (.*) \|$", SECTION[1], re.MULTILINE))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the examples name."""
    folder = tmp_path_factory.mktemp("examples")
    save_llama(folder / "MODEL", vocab_size=300)
    save_tokenizer(folder / "MODEL")
    tokenizer = AutoTokenizer.from_pretrained(folder / "MODEL")
    tokenizer.pad_token, tokenizer.eos_token = "<unk>", "<s>"  # which real models have
    tokenizer.save_pretrained(folder / "MODEL")
    (folder / "train.jsonl").write_text(json.dumps({"text": "to be, or not to be: that is the question"}) + "\n")
    return folder


def run_python(code: str, place: Path) -> str:
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "home"), "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_python_example_makes_what_the_training_example_trains(place: Path) -> None:
    pytest.importorskip("trl")
    making, training = PYTHON
    said = run_python(making, place)
    before, after = (float(number) for number in said.split("→"))
    assert 0 < after < before < 1
    assert verify(place / "out", str(place / "MODEL")).violations == ()

    run_python(training, place)
    tuned = json.loads((place / "tuned" / "adapter_config.json").read_text())
    assert Path(tuned["base_model_name_or_path"]).name == "out"
    from safetensors.torch import load_file

    first = load_file(place / "out/loftq_init/adapter_model.safetensors")
    trained = load_file(place / "tuned/adapter_model.safetensors")
    assert first.keys() == trained.keys()
    assert any(not first[name].equal(trained[name]) for name in first)


def test_the_line_for_several_processes(place: Path, tmp_path: Path) -> None:
    line = re.search(r"`(torchrun [^`]*)`", SECTION[1])  # type: ignore[index]
    assert line
    words = line[1].split()
    assert words[:3] == ["torchrun", "--nproc-per-node", "2"]
    shutil.copytree(place / "MODEL", tmp_path / "MODEL")
    arguments = [str(tmp_path / word) if word in ("MODEL", "out") else word for word in words[3:]]
    done = run([*arguments, "--device", "cpu", "--rank", "4", "--iters", "1"], ranks=2)
    assert done.returncode == 0, done.stderr
    alone = tmp_path / "alone"
    quantize(tmp_path / "MODEL", alone, bits=2, rank=4, iters=1, device="cpu")
    shards = [path.name for path in alone.glob("*.safetensors")]
    assert shards
    assert all((tmp_path / "out" / name).read_bytes() == (alone / name).read_bytes() for name in shards)


def test_serving_lines_speak_of_every_format() -> None:
    from loftq_cli.formats import FORMATS

    assert set(re.findall(r"`([\w-]+)`", " ".join(SERVED))) == set(FORMATS)
    assert "have not been run here" in SECTION[1]  # type: ignore[index]
