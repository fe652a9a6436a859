"""The loss benchmark times what it is asked to, and a finding of compute-sanitizer does not end it."""

from subprocess import CompletedProcess

import pytest

from benchmarks import loss


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
