"""The step and LARS benchmarks measure what they say, and record it."""

import csv

import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

from benchmarks import lars, step
from benchmarks.measure import timing

TINY = {"depth": 18, "width": 1 / 16}
KINDS = [
    {"layout": layout, "mode": "eager", "precision": precision, "bn": "local"}
    for layout, precision in (("nchw", "fp32"), ("nhwc", "bf16"))
]


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_sweep_records_every_contestant_and_its_parts(tmp_path, monkeypatch):
    """The parts add up to the step, and rates follow from its median; mfu is of the machine's rate of products."""
    monkeypatch.setattr(step, "product_flop_per_s", lambda _, precision: {"fp32": 1e9, "bf16": 2e9}[precision])
    flop = step.model_flop(18, 1 / 16, 16)
    step.sweep("cpu", 4, 16, TINY, KINDS, 1, 1, tmp_path / "step.csv", profile=True)
    rows = rows_of(tmp_path / "step.csv")
    assert [(row["layout"], row["precision"]) for row in rows] == [("nchw", "fp32"), ("nhwc", "bf16")]
    for row in rows:
        total, parts = float(row["median_ms"]), [float(row[f"{part}_ms"]) for part in step.PARTS]
        assert min(parts) > 0
        assert sum(parts) == pytest.approx(total, rel=1e-2)
        assert float(row["views_per_s"]) == pytest.approx(8 / total * 1e3, rel=1e-2, abs=0.06)  # one decimal
        assert float(row["peak_extra_mib"]) >= 0
        rate = {"fp32": 1e9, "bf16": 2e9}[row["precision"]]
        assert float(row["mfu"]) == pytest.approx(8 * flop / (total / 1e3) / rate, rel=1e-2)
        assert (row["images"], row["runs"], row["world_size"], row["lars_kernels"]) == ("4", "1", "1", "")


def test_the_rate_of_products_is_two_flop_for_each_of_n_cubed(monkeypatch):
    timings = {"mm": timing([2.0])}
    monkeypatch.setattr(step, "time_interleaved", lambda *_, **__: timings)
    assert step.product_flop_per_s("cpu", "fp32") == pytest.approx(2 * 1024**3 / 2e-3)


def test_a_benchmarked_step_trains():
    """Weights move, gradients are gone, layout and precision are those asked for."""
    seen = []
    torch.manual_seed(0)
    contestant = step.Step(torch.randn(8, 3, 16, 16), **TINY, **KINDS[1])
    before = [p.detach().clone() for p in contestant.model.parameters()]
    contestant.model.encoder.layer1.register_forward_hook(lambda _m, _i, y: seen.append((y.dtype, y.stride(1))))
    contestant()
    assert seen == [(torch.bfloat16, 1)]
    assert all(not torch.equal(p, q) for p, q in zip(contestant.model.parameters(), before, strict=True))
    assert all(p.grad is None for p in contestant.model.parameters())


@pytest.mark.parametrize(("depth", "size"), [(18, 32), (50, 224)])
def test_flop_are_those_of_every_product(depth, size):
    """Two for every multiplication forwards and four backwards, but none for the gradient of the views."""
    with torch.device("meta"):
        network, flop = step.build_network(depth, 1, size), []

        def count(module, inputs, output):
            outputs = output[0, 0].numel() if output.ndim == 4 else 1
            products = module.weight.numel() * outputs
            flop.append(2 * products * (2 if inputs[0].shape[1] == 3 else 3))

        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_hook(count)
        network(torch.empty(2, 3, size, size))
    assert step.model_flop(depth, 1, size) == pytest.approx(sum(flop), rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--mode", "graph"], "graph"), (["--bn", "sync"], "sync"), (["--precision", "fp8"], "fp8")],
)
def test_what_cannot_be_measured_here_is_refused(arguments, named):
    """The message names the value and what is possible."""
    done = CliRunner().invoke(_app(step.main), arguments)
    assert done.exit_code == 2
    assert named in done.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("main", [step.main, lars.main])
def test_a_missing_gpu_is_said(main):
    """Instead of a time of something else."""
    done = CliRunner().invoke(_app(main), ["--device", "cuda"])
    assert done.exit_code == 2
    assert "no CUDA device" in done.output


def test_lars_is_recorded_beside_its_peers(tmp_path):
    """Ours in at most thirty calls, none of which waits; timm's in many more over the same parameters."""
    threads = torch.get_num_threads()
    try:
        lars.main(depth=18, budget_s=0.1, record=str(tmp_path / "lars.csv"))
    finally:
        torch.set_num_threads(threads)
    rows = rows_of(tmp_path / "lars.csv")
    ours, theirs = ([row for row in rows if row["implementation"] == name] for name in ("ours", "timm"))
    assert [row["size"] for row in ours] == [row["size"] for row in theirs] == ["host", "real"]
    for us, them in zip(ours, theirs, strict=True):
        assert int(us["calls"]) <= 30 < int(them["calls"])
        assert int(us["waits"]) == 0
        assert us["params"] == them["params"]
        assert float(us["median_ms"]) > 0


def _app(main):
    app = typer.Typer()
    app.command()(main)
    return app
