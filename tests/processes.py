"""Processes that begin with torch, accelerate and train.py imported: forked from one server that has them.

Importing them takes three seconds of a core in every process that a test starts by itself.
"""

import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
PRELOAD = ["torch", "accelerate", "train", "tools.evaluate"]


def spawn(function: Callable[..., None], arguments: tuple[Any, ...], nprocs: int) -> None:
    """torch.multiprocessing.spawn: function(rank, *arguments) in each process; raises what one of them raised."""
    multiprocessing.set_forkserver_preload(PRELOAD)
    torch.multiprocessing.start_processes(function, arguments, nprocs, start_method="forkserver")


class Program:
    """A Python program of the repository as a process of its own, like subprocess.Popen; its output goes to a file."""

    def __init__(
        self,
        program: str,
        *arguments: str,
        output: Path,
        env: Mapping[str, str] | None = None,
        new_session: bool = False,
    ) -> None:
        """program: a path, from the root of the repository on, or "-m MODULE". env: as it is here if None."""
        multiprocessing.set_forkserver_preload(PRELOAD)
        self.output = output
        environment = dict(os.environ if env is None else env)
        self._process = multiprocessing.get_context("forkserver").Process(
            target=_run, args=(program, arguments, str(output), environment, new_session)
        )
        self._process.start()
        assert self._process.pid
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.output.name, timeout or 0)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """What it printed, once it has ended."""
        self.wait(timeout)
        return self.output.read_text(), None

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    @property
    def returncode(self) -> int | None:
        return self.poll()


def _run(program: str, arguments: tuple[str, ...], output: str, environment: dict[str, str], new_session: bool) -> None:
    if new_session:
        os.setsid()
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.clear()
    os.environ.update(environment)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [program, *arguments]
    if program.startswith("-m "):
        runpy.run_module(program.removeprefix("-m "), run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(str(ROOT / program), run_name="__main__")
