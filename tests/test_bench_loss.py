"""The loss benchmark times what it is asked to, and a finding of compute-sanitizer does not end it."""

import math
from subprocess import CompletedProcess

import pytest
import torch

from benchmarks import loss
from model import nt_xent_tiles
from model.nt_xent import nt_xent


def test_torch_compile_can_be_left_out():
    with_, without = (loss.contestants("cpu", 64, 32, 0.1, compiled) for compiled in (True, False))
    assert with_.keys() - without.keys() == {"reference, torch.compile"}
    assert "reference" in without


@pytest.mark.parametrize(("code", "said"), [(1, "ended with 1, see above: timed all the same"), (0, "no errors")])
def test_a_finding_of_compute_sanitizer_is_told_and_the_kernels_are_timed(code, said, monkeypatch, capfd):
    """It is asked for the kernels' errors alone; the tests of the kernels do end the benchmark."""
    commands = []

    def run(command, **_):
        commands.append(command)
        return CompletedProcess(command, code if "compute-sanitizer" in command[0] else failed)

    monkeypatch.setattr(loss.shutil, "which", lambda name: name)
    monkeypatch.setattr(loss.subprocess, "run", run)
    failed = 0
    loss.check_kernels()
    assert said in capfd.readouterr().out
    assert commands[1][:3] == ["compute-sanitizer", "--report-api-errors", "no"]
    failed = 1
    with pytest.raises(SystemExit, match="the kernels fail their tests"):
        loss.check_kernels()


def test_the_plain_loop_over_tiles_computes_the_same(monkeypatch):
    """What it is compared with: every operation on torch's own threads, none in the pool."""
    monkeypatch.setattr(nt_xent_tiles, "TILE_ON_CPU", 64)
    monkeypatch.setattr(nt_xent_tiles, "_pool", lambda threads: pytest.fail(f"{threads} threads started"))
    seen = []
    step = loss._step(lambda z: seen.append(nt_xent(z, 0.1, impl="chunked")) or seen[-1], torch.ones(256, 8), "forward")
    loss._on_torchs_threads(step)()
    assert math.isclose(seen[0], math.log(255), rel_tol=1e-6)
