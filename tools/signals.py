"""A signal ends a program soon, in order: training saves a checkpoint first."""

import ctypes
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Part = TypeVar("Part")
Result = TypeVar("Result")


class Interrupted(Exception):
    """A signal came while what can be done again was going on."""


class Stop:
    """Turns SIGTERM, SIGINT and SIGUSR1 into a clean end soon after; a second Ctrl-C ends at once.

    One request arrives several times: sent to launcher and process, from the launcher, and from the kernel when the
    launcher dies. So only a SIGINT that comes AGAIN_S after the first one is taken for impatience.
    """

    AGAIN_S = 2.0
    AGREE_S = 5.0  # between the steps at which processes agree: to ask each other they wait for their devices

    def __init__(self) -> None:
        self.received = False
        self._interrupted = math.inf  # when the first SIGINT came
        self._interruptible = False  # now
        self._steps: Agreement | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._receive)
        stop_with_launcher()

    def _receive(self, number: int, frame: Any) -> None:
        self.received = True
        if number == signal.SIGINT:
            if time.monotonic() >= self._interrupted + self.AGAIN_S:
                signal.default_int_handler(number, frame)
            self._interrupted = min(self._interrupted, time.monotonic())
        if self._interruptible:
            self._interruptible = False
            raise Interrupted

    def asked(
        self, step: int, processes: int, gather: "Callable[[Tensor], Tensor]", device: "torch.device", *, waits: bool
    ) -> bool:
        """Whether any process was, as far as is known at `step`; the same answer on all of them.

        waits  the host waits for the device anyway; the rest as in `Agreement`
        """
        self._steps = self._steps or Agreement(processes, gather, device, self.AGREE_S)
        return self._steps.any(step, self.received, waits=waits)

    def together(
        self,
        work: "Callable[[Iterator[Part]], Result]",
        parts: "Iterable[Part]" = (),
        shared: int = 0,
        *,
        processes: int,
        gather: "Callable[[Tensor], Tensor]",
        device: "torch.device",
    ) -> "Result | None":
        """What `work` makes of `parts`, or None on all processes if one of them is asked to stop meanwhile.

        shared  parts that every process has at least. A signal interrupts the work, which must not talk to other
                processes itself; they hear of it between two parts.
        """
        agreement, stopped, done = Agreement(processes, gather, device, 1.0), False, None

        def watched() -> "Iterator[Part]":
            nonlocal stopped
            for number, part in enumerate(parts):
                self._interruptible = False
                stopped = number < shared and agreement.any(number, self.received)
                if self.received or stopped:
                    raise Interrupted
                self._interruptible = True
                yield part

        try:
            if self.received:
                raise Interrupted
            self._interruptible = True
            done = work(watched())
            self._interruptible = False
        except Interrupted:
            done = None
        finally:
            self._interruptible = False
        stopped = stopped or agreement.any(0, done is None, waits=True)  # unless all have just agreed on it
        return None if stopped else done


class Agreement:
    """Whether anything is the case on any process, asked about every `every_s`, at the same times on all of them.

    Several processes ask each other where the host `waits` for the device anyway, and else at a step that all know, for
    it follows from how long their steps took on average. gather: (1, 2) on the device of each process -> those of all,
    (processes, 2).
    """

    def __init__(
        self, processes: int, gather: "Callable[[Tensor], Tensor]", device: "torch.device", every_s: float
    ) -> None:
        self.processes, self.gather, self.device, self.every_s = processes, gather, device, every_s
        self._last = 0, 0.0  # at which step, and when
        self._next = 0

    def any(self, step: int, mine: bool, *, waits: bool = False) -> bool:
        if self.processes == 1:
            return mine
        if step < self._next and not waits:
            return False
        import torch

        (last, since), now = self._last, time.monotonic()
        step_s = (now - since) / (step - last) if last and step > last else self.every_s  # at first it counts set-up
        stopping, step_s = self.gather(torch.tensor([[float(mine), step_s]], device=self.device)).mean(0).tolist()
        self._last, self._next = (step, now), step + max(1, int(self.every_s / step_s))
        return stopping > 0


def stop_with_launcher() -> None:
    """With one process `accelerate launch` forwards no signal, it just dies: have the kernel pass SIGTERM on."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
