"""`--report-control`: what the bytes of base and adapter buy without an adapter."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from loftq_cli import quantize
from loftq_cli.cli import app
from loftq_cli.config import build_config
from loftq_cli.control import Width, control, spend
from loftq_cli.pipeline import plan_quantize


def loftq(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 2, "quantizer": "uniform"},
        {"bits": 2, "quantizer": "lloyd-fit", "double_quant": True},
        {"bits": 3, "quantizer": "nf", "bits_for": {"*.down_proj": 4}},
        {"bits": 4, "rank": 3, "method": "qlora", "quantizer": "uniform-symmetric", "format": "dense"},
    ],
    ids=lambda options: f"{options['quantizer']}-{options['bits']}",
)
def test_it_is_what_a_run_with_these_bits_gives(tiny_llama: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """Another run, without a useful adapter, stores as many bits per weight and errs as much."""
    config = build_config({"rank": 2, "device": "cpu", "format": "packed", **options})
    plan = plan_quantize(str(tiny_llama), config)
    found = control(plan)
    packed = plan_quantize(str(tiny_llama), config.model_copy(update={"format": "packed"}))
    factors = sum(4 * config.rank * sum(job.shape) for job in plan.jobs)
    assert found["bytes"] == round(packed.bits_per_weight * packed.parameters / 8) + factors
    assert 0.9 * found["bytes"] < found["bytes_used"] <= found["bytes"]
    assert sum(found["weights"].values()) == len(plan.jobs)

    bits_for = {job.module: job.bits for job in plan.jobs} | found["bits_for"]
    assert 8 not in bits_for.values() or options["quantizer"] == "uniform-symmetric"
    same = {**options, "method": "qlora", "format": "packed", "bits_for": bits_for, "rank": 1, "device": "cpu"}
    totals = quantize(tiny_llama, tmp_path / "out", **same)["totals"]
    assert totals["bits_per_weight"] == pytest.approx(found["bits_per_weight"], abs=1e-4)
    assert totals["relative_error"] == pytest.approx(found["relative_error"], rel=1e-6)


def test_what_remains_of_eight_bits_of_a_codebook_is_uniform(tiny_llama: Path) -> None:
    config = build_config({"bits": 4, "quantizer": "nf", "rank": 64, "device": "cpu"})
    found = control(plan_quantize(str(tiny_llama), config))
    assert found["weights"] == {"8": 14}  # the adapter has more bytes than the base
    W = torch.randn(64, 128)
    assert found["relative_error"] < 0.01 * W.norm() / W.norm() < 1


def test_bytes_go_where_they_bring_most() -> None:
    """As good as the best of all choices, where steps are of one size and bring less and less."""
    torch.manual_seed(0)
    for budget in (0, 1, 3, 5, 8, 99):
        drops = torch.rand(4, 3).sort(dim=1, descending=True).values
        weights = [
            [Width(bits, bits, 10 - row[:level].sum().item()) for level, bits in enumerate((2, 3, 4, 5))]
            for row in drops
        ]
        errors = {
            levels: sum(widths[level].squared_error for widths, level in zip(weights, levels, strict=True))
            for levels in itertools.product(range(4), repeat=4)
            if sum(levels) <= budget
        }
        assert errors[tuple(spend(weights, budget))] == pytest.approx(min(errors.values()))


def test_a_step_that_does_not_fit_leaves_room_for_others() -> None:
    large = [Width(2, 200, 100.0), Width(3, 300, 0.0)]
    small = [Width(2, 20, 1.0), Width(3, 30, 0.9), Width(4, 40, 0.85)]
    assert spend([large, small], 15) == [0, 1]
    assert spend([large, small], 105) == [1, 0]
    assert spend([large, small], 120) == [1, 2]


def test_the_command_says_it_and_reports_it(tiny_llama: Path, tmp_path: Path) -> None:
    out, plain = tmp_path / "out", tmp_path / "plain"
    flags = ["quantize", "--bits=2", "--rank=4", "--iters=1", "--device=cpu", tiny_llama]
    shown = loftq(*flags, out, "--report-control")
    assert shown.exit_code == 0, shown.stderr
    report = json.loads((out / "loftq_report.json").read_text())
    error = report["control"]["relative_error"]
    assert f"without an adapter: {report['control']['bits_per_weight']:.2f} bits per weight" in shown.stdout
    assert (
        f"relative error of weights {error:.4f}, of base + adapter {report['totals']['relative_error']:.4f}"
        in shown.stdout
    )
    assert loftq("verify", out, "--source", tiny_llama).exit_code == 0

    # nothing else is changed by it, and a finished output gets it, too
    assert "Control" not in loftq(*flags, plain).stdout
    without = json.loads((plain / "loftq_report.json").read_text())
    assert "control" not in without
    assert without["files"] == report["files"]
    later = json.loads(loftq(*flags, plain, "--report-control", "--json").stdout)
    assert later["control"] == json.loads((plain / "loftq_report.json").read_text())["control"] == report["control"]
    again = loftq(*flags, plain, "--report-control")
    assert again.exit_code == 0
    assert "nothing to do" in again.stderr
    assert "Control" in again.stdout
