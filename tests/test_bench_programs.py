"""Measured programs run alone in their slices, are compared over the same moments, and say why they fail.

This file does not import torch: every process that is started here imports it.
"""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from benchmarks.programs import (
    Failure,
    Mark,
    Progress,
    Ranks,
    Timeline,
    call,
    environment_of,
    in_slices,
    round_edges,
    worst,
)

ROOT = Path(__file__).parents[1]


def timeline(*slices: tuple[float, float], marks: list[tuple[float, int]]) -> Timeline:
    begin = Mark(slices[0][0] - 1, 0.5, 10.0, Progress())
    return Timeline(list(slices), [begin, *(Mark(at, 2.5, 20.0, Progress(n, 0.25)) for at, n in marks)])


def test_a_timeline_counts_the_time_that_its_program_ran() -> None:
    """One second of every three; 10 images by its first half second, 30 more two and a half of its seconds later."""
    ours = timeline((0, 1), (3, 4), (6, 7), (9, 10), marks=[(0.5, 10), (9.0, 30)])
    assert ours.ran_s(np.array([-5, 0, 0.25, 1, 2, 3, 3.5, 8, 9.5, 50])).tolist() == [
        *(0, 0, 0.25, 1, 1, 1, 1.5, 3, 3.5, 4),
    ]
    assert ours.steps_s == [0.5, 2.5]
    assert ours.images(np.array([-1, 0.25, 0.5, 2, 3.75, 9.0])).tolist() == [0, 5, 10, 16, 25, 40]
    assert ours.rates(np.array([-1.0, 0.5, 3.75])) == [20.0, 12.0]
    assert ours.images_per_s == pytest.approx(40 / 3)
    assert ours.cpu_s_per_image([-1, 9]) == [pytest.approx(2 / 40)]
    assert ours.cpu_s_per_image([-1, 0.25, 0.5, 9]) == pytest.approx([2 / 10, 2 / 10, 0])
    assert ours.waited == pytest.approx(0.5 / 10)  # of the time on the clock, from its beginning at -1
    assert ours.peak_host_mib == 20


def test_in_every_round_each_program_finished_something() -> None:
    """The one that finishes least divides the time, as far as all have come; fewer rounds are made of several."""
    few = timeline((0, 9), marks=[(2.0, 1), (4.0, 1), (6.0, 1), (8.0, 1)])
    many = timeline((0, 9), marks=[(0.5 * i, 1) for i in range(1, 14)])
    assert round_edges([few, many], 10).tolist() == [-1, 2, 4, 6]
    assert round_edges([many, few], 2).tolist() == [-1, 4]  # the rest is no whole round
    assert round_edges([many], 13).tolist() == [-1, *(0.5 * i for i in range(1, 14))]


# ------------------------------------------------------------------------------------------------- in processes


def burn(seconds: float) -> None:
    """Work on one processor that holds no lock of Python's."""
    block, end = bytes(2**18), time.thread_time() + seconds
    while time.thread_time() < end:
        hashlib.sha256(block).digest()


def burning(seconds: float) -> Iterator[Progress]:
    yield Progress()
    while True:
        burn(seconds)
        yield Progress(1)


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave() -> None:
    os._exit(7)


def ask_for_too_much() -> None:
    np.empty(2**60, np.uint8)


def complain() -> None:
    raise ValueError("of itself")


REASONS = {
    kill_itself: "out of memory",
    leave: "failed: exit code 7",
    ask_for_too_much: "out of memory",
    complain: "failed: ValueError: of itself",
}


def failing(how: Callable[[], None]) -> Iterator[Progress]:
    yield Progress()
    burn(0.02)
    how()


@pytest.fixture(scope="module")
def sliced() -> dict[Any, Any]:
    """Two programs, of which one has three times the work and twice the slices, beside four that fail."""
    programs: dict[Any, Any] = {"a": partial(burning, 0.03), "b": partial(burning, 0.01)}
    programs |= {how: partial(failing, how) for how in REASONS}
    return in_slices(programs, 1.0, order=["a", "a", "b", *REASONS], fewest=5)  # type: ignore[list-item]


def test_no_program_runs_in_anothers_slices(sliced: dict[Any, Any]) -> None:
    slices = sorted((*edges, name) for name in "ab" for edges in sliced[name].slices)
    assert all(end <= start for (_, end, _), (start, *_) in zip(slices, slices[1:], strict=False))
    assert [name for *_, name in slices] == ["a", "a", "b"] * (len(slices) // 3)
    for name in "ab":
        marks = sliced[name].marks
        assert all(any(start <= mark.at <= end for start, end in sliced[name].slices) for mark in marks[1:])
        assert marks[0].at < sliced[name].slices[0][0]


def test_processor_time_is_that_of_the_work(sliced: dict[Any, Any]) -> None:
    """However busy the machine is; and at most one processor's."""
    edges = round_edges([sliced["a"], sliced["b"]], 10)
    assert len(edges) > 5
    a, b = (np.array(sliced[name].cpu_s_per_image(edges)) for name in "ab")
    assert np.median(a / b) == pytest.approx(3, rel=0.2)
    for name in "ab":
        assert sliced[name].images_per_s * sliced[name].cpu_s_per_image(edges[[0, -1]])[0] < 1.1
        assert sliced[name].peak_host_mib > 10


@pytest.mark.parametrize("how", REASONS)
def test_a_program_that_fails_says_why_and_the_others_go_on(how: Any, sliced: dict[Any, Any]) -> None:
    assert sliced[how] == REASONS[how]
    assert isinstance(sliced[how], Failure)
    assert sliced["a"].images_per_s > 0


def test_a_program_alone_is_not_stopped() -> None:
    alone: Any = in_slices({"a": partial(burning, 0.01)}, 0.2)["a"]
    assert len(alone.slices) == 1
    assert alone.ran_s(1e12) >= 0.2


def answer(number: int) -> dict[str, int]:
    adjust = Path("/proc/self/oom_score_adj").read_text()
    return {"number": number, "process": os.getpid(), "group": os.getpgid(0), "adjust": int(adjust)}


@pytest.fixture(scope="module")
def called() -> dict[Any, Any]:
    """What calls returned, all made at once."""
    with ThreadPoolExecutor() as pool:
        calls = {how: pool.submit(call, how) for how in REASONS} | {answer: pool.submit(call, answer, 5)}
        return {function: future.result() for function, future in calls.items()}


@pytest.mark.parametrize("how", REASONS)
def test_a_call_that_fails_returns_its_reason(how: Any, called: dict[Any, Any]) -> None:
    assert called[how] == REASONS[how]
    assert isinstance(called[how], Failure)


def test_a_call_is_a_process_of_its_own_and_the_first_that_linux_kills(called: dict[Any, Any]) -> None:
    result = called[answer]
    assert result["number"] == 5
    assert result["process"] == result["group"] != os.getpid()
    assert result["adjust"] == 1000


KILLED = """
import os, pathlib, time
from benchmarks.programs import call
def work(file):
    pathlib.Path(file).write_text(str(os.getpid()))
    time.sleep(120)
if __name__ == "__main__":
    call(work, {file!r})
"""


def test_nothing_goes_on_where_the_benchmark_was_killed(tmp_path: Path) -> None:
    """SIGKILL to the benchmark alone; its measured process is gone, though it had two minutes of work."""
    named, script = tmp_path / "pid", tmp_path / "killed.py"
    script.write_text(KILLED.format(file=str(named)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, str(script)], env=environment) as parent:
        wait_for(lambda: named.exists() and named.read_text())
        parent.kill()
    wait_for(lambda: not is_running(int(named.read_text())))


def wait_for(happened: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_running(process: int) -> bool:
    """Neither gone nor a zombie that its new parent has not asked after."""
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# ------------------------------------------------------------------------------------------------------ failures


class OutOfMemoryError(RuntimeError):
    """As torch calls its own."""


def test_a_failure_is_one_line_and_knows_what_is_out_of_memory() -> None:
    text = "1 image(s) of (3, 224, 224) in one micro-batch do not fit the 10 MiB that are free on cuda:0"
    assert Failure.of(ValueError(text)) == "out of memory"
    assert Failure.of(OutOfMemoryError("CUDA ran out")) == "out of memory"
    assert Failure.of(ValueError("another\nreason")) == "failed: ValueError: another reason"


def test_the_worst_failure_of_the_ranks_is_the_one_without_memory() -> None:
    """The others fail because it went."""
    full, lost = Failure("out of memory"), Failure("failed: connection")
    assert worst([None, lost, full, lost]) == full
    assert worst([lost, None]) == lost
    assert worst([None, None]) is None


def test_a_single_process_is_rank_0_of_1_and_its_environment_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_RANK", "3")
    with Ranks() as ranks:
        assert (ranks.rank, ranks.world_size) == (0, 1)
    with environment_of(LOCAL_RANK=None, MASTER_PORT="1"):
        assert "LOCAL_RANK" not in os.environ
        assert os.environ["MASTER_PORT"] == "1"
    assert os.environ["LOCAL_RANK"] == "3"
    assert "MASTER_PORT" not in os.environ
