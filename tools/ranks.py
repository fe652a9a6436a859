"""Processes that work together: whether they see each other, how long they wait, and which of them is lost."""

import contextlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

RANKS_WAIT = timedelta(minutes=10)  # for each other in the middle of a run, then it ends
LAST_WORDS_S = 10.0  # that a process whose run failed waits to hear which others are still there


def check_launch(accelerator: "Accelerator", program: str) -> None:
    """Raise ValueError where the processes that were launched do not see each other."""
    if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", 1)):
        raise ValueError(
            f"the launcher started {os.environ['WORLD_SIZE']} processes, but each sees {accelerator.num_processes}; on "
            f"CPUs use accelerate launch --multi_gpu --num_processes N {program} ..."
        )


def gathered_rows(accelerator: "Accelerator", rows: "Tensor") -> "Tensor":
    """The rows (m, ...) of every process, in the order of the ranks, on the CPU of each; m may differ."""
    import torch

    if accelerator.num_processes == 1:
        return rows
    counts = accelerator.gather(torch.tensor([len(rows)], device=accelerator.device)).tolist()
    padded = accelerator.pad_across_processes(rows.to(accelerator.device))
    parts = accelerator.gather(padded).cpu().split(max(counts))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


class LostRankError(RuntimeError):
    """Another process has gone or does not answer; the message says which."""


@contextmanager
def naming_lost_ranks(rank: int, world_size: int) -> Iterator[None]:
    """Raise a LostRankError, which names the rank, in place of an error that another process's silence has caused.

    Every process that fails reports to the launcher's store, so the lost rank is the one that does not report.
    ValueErrors, and exceptions that are no errors, are raised by all processes at once and pass unchanged.
    """
    import torch.distributed as dist

    try:
        yield
    except (RuntimeError, OSError, ArithmeticError) as error:
        lost: list[int] = []
        if world_size > 1:
            waiting = isinstance(error, RuntimeError) and ("gloo" in str(error) or isinstance(error, dist.DistError))
            with contextlib.suppress(RuntimeError):  # the store has gone with the process that kept it
                lost = silent_ranks(world_size, rank, waiting)
        if not lost:
            raise
        raise LostRankError(
            f"rank {', '.join(map(str, lost))} has gone, or did not answer for {RANKS_WAIT}: look at what that process "
            "printed last and at its machine, and go on with --resume"
        ) from error


def silent_ranks(world_size: int, rank: int, waiting: bool) -> list[int]:
    """Report that this rank has failed; if `waiting`, return the ranks that have not reported after LAST_WORDS_S.

    Reports go to the store of torch's rendezvous, which the launcher holds, or else rank 0.
    """
    import torch.distributed as dist

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    patience = timedelta(seconds=LAST_WORDS_S if waiting else 1.0)  # who kept the store may have gone already
    try:
        store = dist.TCPStore(address, port, is_master=False, timeout=patience, wait_for_workers=False)
        store.set_timeout(patience)
        store.set(f"swiftclr failed {rank}", "")
    except RuntimeError:
        if waiting and "TORCHELASTIC_USE_AGENT_STORE" not in os.environ and rank:
            return [0]  # who keeps it
        raise
    deadline, others = time.monotonic() + LAST_WORDS_S, {other for other in range(world_size) if other != rank}
    while waiting and others and time.monotonic() < deadline:
        others = {other for other in others if not store.check([f"swiftclr failed {other}"])}
        time.sleep(0.1)
    return sorted(others) if waiting else []
