"""Measured programs: Python functions in processes of their own.

call(function, *arguments)                      its result, from a new process
in_slices(programs, seconds) -> {name: Timeline}    several programs in turn; each is stopped while another one runs
round_edges(timelines, most) -> moments         rounds in each of which every program finished some work
Ranks()                                         the same under a launcher, on all ranks

A program that fails gives a Failure instead: "out of memory", or "failed: why".

Programs alternate in slices of 20 ms, so background load affects all equally. On a machine that others use too, the
same work takes a tenth more or less in one second than in the next, and longer turns do not make a ratio any more
certain. Two copies of one program (ResNet-18 x0.25, batch 256), a minute in all on two cores of an EPYC: ratio 1.022 in
slices of 0.5 s, 1.0033 of 0.1 s, 1.0014 of 20 ms. A GPU goes on with its queue while its program is stopped: there, run
one program at a time, or in slices of seconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.measure import cpu_seconds, peak_host_mib

SLICE_S = 0.02
OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "bad_alloc", "do not fit")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Failure(str):
    """Why a program has no numbers, in one line: the status of its row."""

    @classmethod
    def of(cls, error: Exception) -> Failure:
        memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's
        if memory or any(words in str(error).lower() for words in OUT_OF_MEMORY):
            return cls("out of memory")
        return cls(f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}")


class Progress(NamedTuple):
    """What a program yields after every piece of its work; the first piece is its warm-up."""

    images: int = 0
    waited_s: float = 0.0  # for data, on the clock


class Mark(NamedTuple):
    """Where a program stood: on the machine's monotonic clock, in processor time, and its peak memory so far."""

    at: float
    cpu_s: float
    peak_host_mib: float
    progress: Progress


Program = Callable[[], Iterator[Progress]]


@dataclass(frozen=True)
class Timeline:
    """When one program ran, and what it finished by when. The first mark is the end of its warm-up."""

    slices: list[tuple[float, float]] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)

    def ran_s(self, moments: Any) -> Any:
        """Seconds that it ran before each moment."""
        edges = np.array(self.slices)
        ran = np.repeat(np.cumsum(edges[:, 1] - edges[:, 0]), 2)
        ran[::2] -= edges[:, 1] - edges[:, 0]
        return np.interp(moments, edges.ravel(), ran)

    @property
    def at(self) -> Any:
        """Moments of the marks."""
        return np.array([mark.at for mark in self.marks])

    def images(self, moments: Any) -> Any:
        """Images finished before each moment, evenly from mark to mark."""
        return self._between(moments, np.cumsum([0, *(mark.progress.images for mark in self.marks[1:])]))

    def cpu_s(self, moments: Any) -> Any:
        """Processor time used before each moment."""
        return self._between(moments, [mark.cpu_s for mark in self.marks])

    def _between(self, moments: Any, values: Any) -> Any:
        return np.interp(self.ran_s(moments), self.ran_s(self.at), values)

    def rates(self, moments: Any) -> list[float]:
        """Images/s of the time that it ran, from each moment to the next."""
        return list((np.diff(self.images(moments)) / np.diff(self.ran_s(moments))).tolist())

    def cpu_s_per_image(self, moments: Any) -> list[float]:
        return list((np.diff(self.cpu_s(moments)) / np.diff(self.images(moments))).tolist())

    @property
    def images_per_s(self) -> float:
        return self.rates(self.at[[0, -1]])[0]

    @property
    def steps_s(self) -> list[float]:
        """Seconds that each piece of work ran."""
        return list(np.diff(self.ran_s(self.at)).tolist())

    @property
    def peak_host_mib(self) -> float:
        return max(mark.peak_host_mib for mark in self.marks)

    @property
    def waited(self) -> float:
        """The share of its time in which it waited for data. Both clocks went on while it was stopped."""
        return sum(mark.progress.waited_s for mark in self.marks[1:]) / (self.at[-1] - self.at[0])


def round_edges(timelines: Sequence[Timeline], most: int) -> Any:
    """Moments that divide the time into at most `most` rounds, in each of which every program finished some work."""
    last = min(timeline.at[-1] for timeline in timelines)
    moments = min((timeline.at[timeline.at <= last] for timeline in timelines), key=len)
    return moments[:: max(1, math.ceil((len(moments) - 1) / most))]


# --------------------------------------------------------------------------------------------------------- supervisor


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments) from a new process, or a Failure."""
    with _Process(_answer, function, arguments) as process:
        result = process.receive()
        process.join()
        return result


def in_slices(
    programs: Mapping[str, Program],
    seconds: float,
    *,
    order: Sequence[str] = (),
    fewest: int = 1,
    slice_s: float = SLICE_S,
) -> dict[str, Timeline | Failure]:
    """Run programs in turn for `seconds` on the clock, longer if `fewest` rounds need it.

    A program yields Progress endlessly, and must be importable. It may start processes, but they must not leave its
    process group. All warm up side by side; then they run in turn, or in the `order` given, again and again.
    """
    with contextlib.ExitStack() as stack:
        running = {name: stack.enter_context(_Process(_report, program)) for name, program in programs.items()}
        timelines = {name: Timeline() for name in programs}
        failures = dict[str, Failure]()

        def note(name: str) -> None:
            """Wait for what a program sends next."""
            received = running[name].receive()
            if isinstance(received, Failure):
                failures[name] = received
            else:
                timelines[name].marks.append(received)

        for name, process in running.items():
            note(name)
            if name not in failures:
                process.stop()
                process.link.send("go on")
        end = time.monotonic() + seconds
        while alive := [timeline for name, timeline in timelines.items() if name not in failures]:
            if time.monotonic() >= end and len(round_edges(alive, 2**31)) > fewest:
                break
            for name in order or programs:
                if name in failures:
                    continue
                start, process = time.monotonic(), running[name]
                stop = start + (slice_s if len(programs) > 1 else seconds)
                process.go_on()
                while name not in failures and (left := stop - time.monotonic()) > 0:
                    if process.link.poll(left):
                        note(name)
                if name not in failures:
                    process.stop()
                    timelines[name].slices.append((start, time.monotonic()))
        return {name: failures.get(name, timeline) for name, timeline in timelines.items()}


class _Process:
    """A function in a new process group, which can be stopped and goes with the block.

    Where memory ends Linux kills with SIGKILL, and this process first: so one that was killed is out of memory.
    """

    def __init__(self, function: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.link, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, function, arguments))
        self._process.start()
        there.close()
        self._group = self._process.pid or 0

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._group, signal.SIGKILL)
        self._process.kill()  # should it have no group yet
        self._process.join()

    def join(self) -> None:
        self._process.join(60)

    def receive(self) -> Any:
        """What it sends next; a Failure if it ends instead."""
        try:
            return self.link.recv()
        except EOFError:
            self._process.join()
            killed = self._process.exitcode == -signal.SIGKILL
            return Failure("out of memory" if killed else f"failed: exit code {self._process.exitcode}")

    def go_on(self) -> None:
        os.killpg(self._group, signal.SIGCONT)

    def stop(self) -> None:
        os.killpg(self._group, signal.SIGSTOP)
        os.waitid(os.P_PID, self._group, os.WSTOPPED | os.WEXITED | os.WNOWAIT)


def _serve(link: Connection, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # end with the parent, even while stopped
    os.setpgid(0, 0)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        function(link, *arguments)
    except (EOFError, BrokenPipeError):  # the benchmark has ended
        return
    except Exception as error:
        link.send(Failure.of(error))


def _answer(link: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    link.send(function(*arguments))


def _report(link: Connection, program: Program) -> None:
    for i, progress in enumerate(program()):
        link.send(Mark(time.monotonic(), cpu_seconds(), peak_host_mib(), progress))
        if i == 0:
            link.recv()


# -------------------------------------------------------------------------------------------------- under a launcher

LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


class Ranks:
    """The launched processes. Each calls functions in new processes, whose memory and failures are their own."""

    def __init__(self) -> None:
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    def __enter__(self) -> Ranks:
        if self.world_size > 1:
            import torch.distributed as dist

            dist.init_process_group("gloo")
        return self

    def __exit__(self, *_: object) -> None:
        if self.world_size > 1:
            import torch.distributed as dist

            dist.destroy_process_group()

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result of this rank's call; on every rank the worst Failure if any of them failed."""
        if self.world_size == 1:
            return call(function, *arguments)
        import torch.distributed as dist

        port: list[Any] = [_free_port()]
        dist.broadcast_object_list(port)
        with environment_of(MASTER_PORT=str(port[0]), TORCHELASTIC_USE_AGENT_STORE="False"):
            result = call(function, *arguments)
        failures: list[Any] = [None] * self.world_size
        dist.all_gather_object(failures, result if isinstance(result, Failure) else None)
        return worst(failures) or result

    def call_alone(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result on rank 0, as a single process, while the others wait; None on those."""
        import torch.distributed as dist

        result = None
        if self.rank == 0:
            with environment_of(**dict.fromkeys(LAUNCHED)):
                result = call(function, *arguments)
        dist.barrier()
        return result


def worst(failures: Sequence[Failure | None]) -> Failure | None:
    """Where one rank runs out of memory, the others fail because of it."""
    return max(filter(None, failures), key=lambda failure: failure == "out of memory", default=None)


@contextlib.contextmanager
def environment_of(**changes: str | None) -> Iterator[None]:
    """Environment variables for processes that start in the block; None removes one."""
    before = {name: os.environ.pop(name, None) for name in changes}
    os.environ.update({name: value for name, value in changes.items() if value is not None})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])
