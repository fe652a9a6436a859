"""A signal ends a program soon, in order: training saves a checkpoint first."""

import ctypes
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor


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
        self._agreed = 0, 0.0  # at which step, and when
        self._next = 0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._receive)
        if "ACCELERATE_MIXED_PRECISION" in os.environ and sys.platform == "linux":
            # With one process the launcher forwards no signal, it just dies: have the kernel pass SIGTERM on.
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)

    def _receive(self, number: int, frame: Any) -> None:
        self.received = True
        if number == signal.SIGINT:
            if time.monotonic() >= self._interrupted + self.AGAIN_S:
                signal.default_int_handler(number, frame)
            self._interrupted = min(self._interrupted, time.monotonic())

    def asked(
        self, step: int, processes: int, gather: "Callable[[Tensor], Tensor]", device: "torch.device", *, waits: bool
    ) -> bool:
        """Whether any process was, as far as is known at `step`; the same answer on all of them.

        Several processes ask each other where the host `waits` for the device anyway, and else about every AGREE_S:
        at a step that all know, for it follows from how long their steps took on average. gather: (1, 2) on the device
        of each process -> those of all, (processes, 2).
        """
        if processes == 1:
            return self.received
        if step < self._next and not waits:
            return False
        import torch

        (last, since), now = self._agreed, time.monotonic()
        step_s = (now - since) / (step - last) if last else self.AGREE_S  # at first it would count the set-up
        received, step_s = gather(torch.tensor([[float(self.received), step_s]], device=device)).mean(0).tolist()
        self._agreed, self._next = (step, now), step + max(1, int(self.AGREE_S / step_s))
        return received > 0
