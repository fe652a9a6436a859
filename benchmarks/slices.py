"""Programs that share a machine in slices so thin that whatever else it does slows all of them alike.

in_slices(programs, seconds) -> {name: Course}     each in processes of its own, stopped while another one runs
rounds(courses, most) -> [moments]                 between which all of them got something done
Course.rates(moments) -> images/s                  of a program, in each round

On a host that others use too, the same work takes a tenth more or less in one second than in the next, and no less so
in one minute than in the next; so turns of seconds tell a ratio no better the longer they are. Two copies of one
program (ResNet-18 x0.25, batch 256), a minute in all on two cores of an EPYC: 1.022 in slices of 0.5 s, 1.0033 of
0.1 s, 1.0014 of 20 ms. A GPU goes on with what it was given while its program is stopped, so there one program runs at
a time.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import numpy as np

from benchmarks.measure import cpu_seconds, die_first, die_with_parent, failure, peak_host_mib

SLICE_S = 0.02


class Done(NamedTuple):
    """What a program says after every piece of its work; the first is its warm-up."""

    images: int = 0
    waited_s: float = 0.0  # for data, on the clock


class Mark(NamedTuple):
    """Where a program stood: on the machine's monotonic clock, in processor time, and the most memory so far."""

    at: float
    cpu_s: float
    peak_host_mib: float
    done: Done


Program = Callable[[], Iterator[Done]]


@dataclass(frozen=True)
class Course:
    """What one program did: when it ran, and what it got done by when. The first mark is where it began."""

    slices: list[tuple[float, float]] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)

    def ran_s(self, at: Any) -> Any:
        """Seconds that it ran before the moments `at`."""
        edges = np.array(self.slices)
        ran = np.repeat(np.cumsum(edges[:, 1] - edges[:, 0]), 2)
        ran[::2] -= edges[:, 1] - edges[:, 0]
        return np.interp(at, edges.ravel(), ran)

    @property
    def at(self) -> Any:
        """Moments of the marks."""
        return np.array([mark.at for mark in self.marks])

    def images(self, at: Any) -> Any:
        """Images done before the moments `at`, evenly from mark to mark."""
        return np.interp(
            self.ran_s(at), self.ran_s(self.at), np.cumsum([0, *(mark.done.images for mark in self.marks[1:])])
        )

    def rates(self, moments: Any) -> list[float]:
        """Images/s of the time that it ran, from each moment to the next."""
        return list((np.diff(self.images(moments)) / np.diff(self.ran_s(moments))).tolist())

    @property
    def steps_s(self) -> list[float]:
        """Seconds that each piece of work ran."""
        return list(np.diff(self.ran_s(self.at)).tolist())

    @property
    def peak_host_mib(self) -> float:
        return max(mark.peak_host_mib for mark in self.marks)

    @property
    def images_per_s(self) -> float:
        return self.rates(self.at[[0, -1]])[0]

    @property
    def cpu_s_per_image(self) -> float:
        images = sum(mark.done.images for mark in self.marks[1:])
        return (self.marks[-1].cpu_s - self.marks[0].cpu_s) / images

    @property
    def waited(self) -> float:
        """The share of its time in which it waited for data. Both clocks went on while it was stopped."""
        return sum(mark.done.waited_s for mark in self.marks[1:]) / (self.at[-1] - self.at[0])


def rounds(courses: Sequence[Course], most: int) -> Any:
    """Moments that part the time into rounds, `most` at most, in each of which every program ended a piece of work."""
    last = min(course.at[-1] for course in courses)
    moments = min((course.at[course.at <= last] for course in courses), key=len)
    return moments[:: max(1, math.ceil((len(moments) - 1) / most))]


def in_slices(
    programs: Mapping[str, Program], seconds: float, *, order: Sequence[str] = (), fewest: int = 1
) -> dict[str, Course | str]:
    """What each program did in `seconds` on the clock, or why it failed; longer where `fewest` rounds need it.

    A program yields `Done` after every piece of work, endlessly, and a new process must be able to import it. It may
    start processes, but not leave their group. All warm up side by side; then they run in turn, or in the `order` that
    is given, again and again.
    """
    with contextlib.ExitStack() as stack:
        runners = {name: stack.enter_context(_Runner.of(program)) for name, program in programs.items()}
        for runner in runners.values():
            runner.warm_up()
        end = time.monotonic() + seconds
        while alive := [runner for runner in runners.values() if not runner.failed]:
            if time.monotonic() >= end and len(rounds([each.course for each in alive], 2**31)) > fewest:
                break
            for runner in (runners[name] for name in order or programs):
                if not runner.failed:
                    runner.run(SLICE_S if len(programs) > 1 else seconds)
        return {name: runner.failed or runner.course for name, runner in runners.items()}


class _Runner:
    """A program in a process group of its own, which stands still between slices."""

    def __init__(self, process: BaseProcess, link: Connection) -> None:
        self.process, self.link, self.group = process, link, process.pid or 0
        self.course, self.failed = Course(), ""

    @classmethod
    @contextlib.contextmanager
    def of(cls, program: Program) -> Iterator[_Runner]:
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(program, there))
        process.start()
        there.close()
        runner = cls(process, here)
        try:
            yield runner
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(runner.group, signal.SIGKILL)
            process.kill()
            process.join()

    def warm_up(self) -> None:
        if first := self._told():
            self._stop()
            self.course.marks.append(first)
            self.link.send("go on")

    def run(self, seconds: float) -> None:
        """One slice; what it gets done meanwhile is noted."""
        start = time.monotonic()
        os.killpg(self.group, signal.SIGCONT)
        while not self.failed and (left := start + seconds - time.monotonic()) > 0:
            if self.link.poll(left) and (mark := self._told()):
                self.course.marks.append(mark)
        if not self.failed:
            self._stop()
            self.course.slices.append((start, time.monotonic()))

    def _stop(self) -> None:
        os.killpg(self.group, signal.SIGSTOP)
        os.waitid(os.P_PID, self.group, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def _told(self) -> Mark | None:
        """Its next mark; None, and `failed` says why, where there is none."""
        try:
            told = self.link.recv()
        except EOFError:
            self.process.join()
            killed = self.process.exitcode == -signal.SIGKILL
            told = "out of memory" if killed else f"failed: exit code {self.process.exitcode}"
        if isinstance(told, str):
            self.failed = told
            return None
        mark: Mark = told
        return mark


def _serve(program: Program, link: Connection) -> None:
    die_with_parent()
    os.setpgid(0, 0)
    die_first()
    try:
        for i, done in enumerate(program()):
            link.send(Mark(time.monotonic(), cpu_seconds(), peak_host_mib(), done))
            if i == 0:
                link.recv()
    except (EOFError, BrokenPipeError):  # the benchmark has ended
        return
    except Exception as error:
        link.send(failure(error))
