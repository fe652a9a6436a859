"""Programs in slices of time run alone, go on where they were, and are compared over the same moments."""

import hashlib
import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.slices import Course, Done, Mark, in_slices, rounds
from tests.timed import thrice


def course(*slices: tuple[float, float], marks: list[tuple[float, int]]) -> Course:
    begin = Mark(slices[0][0] - 1, 0.5, 10.0, Done())
    return Course(list(slices), [begin, *(Mark(at, 2.5, 20.0, Done(n, 0.25)) for at, n in marks)])


def test_a_course_counts_the_time_that_it_ran_alone() -> None:
    """One second of every three; 10 images by its first half second, 30 more two and a half of its seconds later."""
    found = course((0, 1), (3, 4), (6, 7), (9, 10), marks=[(0.5, 10), (9.0, 30)])
    assert found.ran_s(np.array([-5, 0, 0.25, 1, 2, 3, 3.5, 8, 9.5, 50])).tolist() == [
        *(0, 0, 0.25, 1, 1, 1, 1.5, 3, 3.5, 4),
    ]
    assert found.steps_s == [0.5, 2.5]
    assert found.images(np.array([-1, 0.25, 0.5, 2, 3.75, 9.0])).tolist() == [0, 5, 10, 16, 25, 40]
    assert found.rates(np.array([-1.0, 0.5, 3.75])) == [20.0, 12.0]
    assert found.images_per_s == pytest.approx(40 / 3)
    assert found.cpu_s_per_image == pytest.approx(2 / 40)
    assert found.waited == pytest.approx(0.5 / 10)  # of the time on the clock, from its beginning at -1
    assert found.peak_host_mib == 20


def test_in_every_round_each_program_ended_something() -> None:
    """The one that ends least parts the time, as far as all have come; fewer rounds are made of several."""
    few = course((0, 9), marks=[(2.0, 1), (4.0, 1), (6.0, 1), (8.0, 1)])
    many = course((0, 9), marks=[(0.5 * i, 1) for i in range(1, 14)])
    assert rounds([few, many], 10).tolist() == [-1, 2, 4, 6]
    assert rounds([many, few], 2).tolist() == [-1, 4]  # the rest is no whole round
    assert rounds([many], 13).tolist() == [-1, *(0.5 * i for i in range(1, 14))]


def burn(seconds: float) -> None:
    """Work on one processor that holds no lock of Python's."""
    block, end = bytes(2**20), time.thread_time() + seconds
    while time.thread_time() < end:
        hashlib.sha256(block).digest()


def burning(seconds: float) -> Iterator[Done]:
    yield Done()
    while True:
        burn(seconds)
        yield Done(1)


def ending(how: str) -> Iterator[Done]:
    yield Done()
    burn(0.05)
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "left":
        os._exit(7)
    elif how == "full":
        torch.empty(2**50, dtype=torch.uint8)
    raise ValueError("of itself")


@thrice
def test_rates_are_of_the_work_and_no_program_runs_in_anothers_slices() -> None:
    """One has three times the work of the other."""
    found: Any = in_slices({"a": partial(burning, 0.03), "b": partial(burning, 0.01)}, 2.0)
    slices = sorted([(*each, name) for name in "ab" for each in found[name].slices])
    assert [name for *_, name in slices] == ["a", "b"] * (len(slices) // 2)
    assert all(end <= start for (_, end, _), (start, *_) in zip(slices, slices[1:], strict=False))
    for each in found.values():
        assert all(any(start <= mark.at <= end for start, end in each.slices) for mark in each.marks[1:])
        assert each.marks[0].at < each.slices[0][0]
        assert each.cpu_s_per_image <= 1.1 / each.images_per_s
    moments = rounds(list(found.values()), 10)
    ratios = np.array(found["b"].rates(moments)) / found["a"].rates(moments)
    assert np.median(ratios) == pytest.approx(3, rel=0.15)


def test_as_many_rounds_as_asked_for_and_in_the_order_given() -> None:
    found: Any = in_slices({"a": partial(burning, 0.05), "b": partial(burning, 0.001)}, 0.0, order="aab", fewest=3)
    assert len(rounds(list(found.values()), 100)) >= 4
    assert abs(len(found["a"].slices) - 2 * len(found["b"].slices)) <= 2


def test_a_program_alone_is_not_stopped() -> None:
    found: Any = in_slices({"a": partial(burning, 0.01)}, 0.2)["a"]
    assert len(found.slices) == 1
    assert found.ran_s(1e12) >= 0.2


def test_a_program_that_fails_says_why_and_the_others_go_on() -> None:
    programs = {how: partial(ending, how) for how in ("killed", "left", "full", "raised")}
    found: Any = in_slices({**programs, "lives": partial(burning, 0.01)}, 1.0)
    assert found["lives"].images_per_s > 0
    assert {how: found[how] for how in programs} == {
        "killed": "out of memory",
        "left": "failed: exit code 7",
        "full": "out of memory",
        "raised": "failed: ValueError: of itself",
    }
