"""Damaged inputs of every kind, the same ones each time. `python -m tests.fuzz --minutes 60` tries ever new ones."""

import os
import signal
import time
from pathlib import Path
from random import Random

import pytest

from tests.fuzz.__main__ import Tried, slice_of
from tests.fuzz.targets import TARGETS
from tests.processes import Program


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> str:
    program = Program("-m tests.fuzz", "--seed", "0", output=tmp_path_factory.mktemp("fuzz") / "output.txt")
    return program.communicate(timeout=600)[0]


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_damaged_is_refused_by_name_or_counted(target: str, printed: str) -> None:
    """No signal, hang, foreign error or silent acceptance."""
    (line,) = (line for line in printed.splitlines() if line.startswith(f"{target}: "))
    assert f"{TARGETS[target][1]} inputs" in line, printed
    assert "finding" not in line, printed


def hostile(rng: Random, folder: Path) -> str:
    """A reader that takes every file for granted, and a rare one for much worse."""
    what = rng.randrange(4)
    if what == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if what == 1:
        time.sleep(60)
    if what == 2:
        raise KeyError(folder.name)
    return "worked"


def test_a_reader_that_hangs_dies_or_fails_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a finding of its own, and the inputs after it are tried."""
    monkeypatch.setattr("tests.fuzz.__main__.LIMIT_S", 0.5)
    tried = Tried()
    slice_of("hostile", hostile, tried, seed=1, inputs=12, seconds=60, work=tmp_path)
    assert tried.next == sum(tried.outcomes.values()) == 12
    assert tried.outcomes["worked"] == 12 - len(tried.findings)
    for sign in ("nothing came for 0.5 s", "the process ended with -9", "KeyError: 'input'"):
        assert any(sign in finding for finding in tried.findings), tried.findings
