"""On a GPU: the same result as on the CPU, but for ties."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loftq_cli import quantize
from loftq_cli.checkpoint.reader import read_tensor
from loftq_cli.config import GRIDS, QuantizeConfig
from loftq_cli.jobs import WeightBatch
from loftq_cli.pipeline import plan_quantize
from loftq_cli.quantizers import QUANTIZERS, LloydFit, Uniform, UniformSymmetric, uniform
from loftq_cli.quantizers.base import dequantize, fitted
from loftq_cli.quantizers.codebook import LLOYD
from loftq_cli.report import pooled
from loftq_cli.verify import verify
from loftq_cli.worker import WeightRow, quantize_batch
from tests.conftest import save_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_codes_equal_those_of_the_cpu_except_ties(quantizer: str, bits: int) -> None:
    if bits == 8 and quantizer not in GRIDS:
        pytest.skip("codebooks have up to 4 bits")
    W = torch.distributions.StudentT(3.0).sample((384, 512)) * 0.02
    quantize_one = QUANTIZERS[quantizer](bits=bits, group_size=64).quantize
    here, there = quantize_one(W), quantize_one(W.cuda())
    same = (here.codes == there.codes.cpu()).double().mean().item()
    assert same > 0.998  # ties: two scales that serve a group equally well
    errors = [(W - dequantize(q).cpu()).norm() / W.norm() for q in (here, there)]
    assert errors[0].item() == pytest.approx(errors[1].item(), abs=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_fitted_there_are_those_of_the_cpu(bits: int) -> None:
    W = torch.distributions.StudentT(3.0).sample((384, 512)) * 0.02
    here, there = fitted(LloydFit(bits, 64), W), fitted(LloydFit(bits, 64), W.cuda())
    levels = [quantizer.codebook(W.cuda().device).cpu() for quantizer in (here, there)]
    assert (levels[0] - levels[1]).abs().max() < 2e-3  # ties of scales
    assert levels[0].tolist() != list(LLOYD[bits])
    errors = [(W - dequantize(q.quantize(W.to(d))).cpu()).norm() for q, d in ((here, "cpu"), (there, "cuda"))]
    assert errors[0].item() == pytest.approx(errors[1].item(), rel=3e-4)
    again = fitted(LloydFit(bits, 64), W.cuda())
    assert again.levels() == there.levels()
    same = (here.quantize(W).codes == there.quantize(W.cuda()).codes.cpu()).double().mean().item()
    assert same > 0.99


@pytest.mark.parametrize("g", [32, 64, 100, 576, 4096])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_fused_search_is_its_torch_twin(symmetric: bool, bits: int, g: int) -> None:
    w = torch.distributions.StudentT(3.0).sample((max(64, 65536 // g), g)) * 0.02
    w[3], w[4], w[5], w[6], w[7], w[8] = 0, 5, -2, w[6] * 1e-7, w[7] * 1e8, w[8].abs()
    q = (UniformSymmetric if symmetric else Uniform)(bits, -1).quantize(w.cuda())
    assert q.zero_point is not None
    fused, twin = (q.codes, q.scale[:, 0], q.zero_point[:, 0]), uniform.search(w.cuda(), bits, symmetric)
    for name, ours, expected in zip(("codes", "scale", "zero_point"), fused, twin, strict=True):
        same = (ours.float() == expected.to(ours.dtype).float()).double().mean().item()
        assert same > 0.97, name  # in the rest two candidates are equally good, but for the last bit of a sum
    errors = [
        (w - (codes.float().cpu() - zero_point.float().cpu()[:, None]) * scale.float().cpu()[:, None]).norm(dim=1)
        for codes, scale, zero_point in (fused, twin)
    ]
    finite = twin[1].cpu().isfinite()
    assert errors[0][finite].norm().item() == pytest.approx(errors[1][finite].norm().item(), rel=1e-4)


@pytest.mark.parametrize("method", ["loftq", "qlora"])
@pytest.mark.parametrize(("bits", "format"), [(2, "gptq"), (4, "bnb"), (3, "dense")])
def test_errors_agree_with_the_cpu(tiny_llama: Path, method: str, bits: int, format: str) -> None:
    plan = plan_quantize(str(tiny_llama), QuantizeConfig(bits=bits, method=method, rank=4, device="cpu", format=format))
    squares: dict[str, list[WeightRow]] = {"cpu": [], "cuda": []}
    for job in plan.jobs:
        info = plan.checkpoint.tensors[job.tensor]
        weight = read_tensor(plan.checkpoint.path(info.file), info)
        for device, rows in squares.items():
            result = quantize_batch(plan, WeightBatch((job,)), weight[None].to(device))
            result.wait()
            rows += [each.row for each in result.rows()]
    for key in ("relative_error", "relative_error_without_adapter"):
        errors = [pooled((getattr(row, key), row.norm) for row in rows) for rows in squares.values()]
        # a code that moves in one round moves others in the next
        assert errors[0] == pytest.approx(errors[1], abs=1e-4 if method == "qlora" else 5e-4)


@pytest.mark.parametrize(
    "options", [{"bits": 2}, {"bits": 4}, {"bits": 2, "quantizer": "nf"}, {"bits": 2, "quantizer": "lloyd-fit"}]
)
def test_a_run_on_the_gpu_verifies_and_repeats(sharded_llama: Path, tmp_path: Path, options: dict[str, object]) -> None:
    reports = [quantize(sharded_llama, tmp_path / str(number), rank=4, device="cuda", **options) for number in range(2)]
    assert reports[0]["files"] == reports[1]["files"]
    assert reports[0]["totals"]["peak_device_bytes"] > 0
    assert verify(tmp_path / "0", str(sharded_llama)).violations == ()


SMALL_GPU = """
import sys, torch
from loftq_cli import quantize
torch.cuda.set_per_process_memory_fraction(float(sys.argv[3]) / torch.cuda.get_device_properties(0).total_memory)
report = quantize(sys.argv[1], sys.argv[2], bits=2, rank=4, iters=1, device="cuda")
print(*sorted({row["device"] for row in report["weights"]}))
"""


@pytest.mark.parametrize(("mib", "devices"), [(1000, "cuda"), (150, "cpu cuda"), (24, "cpu")])
def test_too_little_memory_means_smaller_pieces_and_then_the_cpu(tmp_path: Path, mib: int, devices: str) -> None:
    model = save_llama(tmp_path / "model", torch.bfloat16, hidden_size=2048, intermediate_size=4096)
    out = tmp_path / "out"
    command = [sys.executable, "-c", SMALL_GPU, str(model), str(out), str(mib << 20)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == devices.split()
    assert verify(out, str(model)).violations == ()


def test_the_command_speaks_to_the_end(tiny_llama: Path, tmp_path: Path) -> None:
    """It leaves without taking the GPU's context apart."""
    command = [sys.executable, "-m", "loftq_cli", "quantize", "--json", "--rank=4", str(tiny_llama), str(tmp_path)]
    for expected, more in ((0, []), (1, ["--bits=2"])):  # the second is another run on a finished OUT
        ran = subprocess.run([*command, *more], capture_output=True, text=True)
        assert ran.returncode == expected, ran.stderr
        assert (json.loads(ran.stdout)["config"]["device"] == "cuda") if expected == 0 else "was 4, now 2" in ran.stderr


def test_bitsandbytes_on_the_gpu_dequantizes_to_the_same_values_and_trains(tiny_llama: Path, tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from loftq_cli.formats import bnb
    from loftq_cli.pipeline import plan_quantize

    out = tmp_path / "out"
    quantize(tiny_llama, out, bits=4, rank=4, device="cuda")
    base = AutoModelForCausalLM.from_pretrained(out, device_map={"": 0})
    plan = plan_quantize(str(tiny_llama), QuantizeConfig(bits=4, rank=4, device="cpu"))
    from safetensors.torch import load_file

    stored = load_file(out / "model.safetensors")
    for job in plan.jobs:
        weight = base.get_submodule(job.module).weight
        loaded = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        expected = bnb.read(job.place.prefix, stored, plan.empty(job))
        assert torch.equal(loaded.cpu().float(), expected)
    model = PeftModel.from_pretrained(base, out, subfolder="loftq_init", is_trainable=True)
    ids = torch.arange(1, 17, device="cuda")[None]
    model(ids, labels=ids).loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert len(gradients) == 28
    assert all(gradient is not None and gradient.any() for gradient in gradients)
