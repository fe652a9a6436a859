"""Try damaged inputs of every kind, and say what came of them.

    python -m tests.fuzz --minutes 60 --seed 1         by turns, as long as that; exit code 1 if there is a finding
    python -m tests.fuzz --only lists --seed 1 --first 1234 --inputs 1      one input again, its files kept

An input is decided by its target, the seed and its number. Targets run in a process forked for them, so that a signal,
a hang or memory without end is a finding like any other.
"""

import argparse
import gc
import os
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from random import Random

import torch

from tests.fuzz.targets import TARGETS, Attempt

LIMIT_S = 60.0  # for an input, which takes milliseconds
MEMORY = 6 << 30
SLICE_S = 20.0  # of a target, before it is the next one's turn


class Tried:
    """What came of a target's inputs."""

    def __init__(self) -> None:
        self.outcomes, self.findings, self.next = Counter[str](), list[str](), 0


def slice_of(name: str, attempt: Attempt, tried: Tried, *, seed: int, inputs: int, seconds: float, work: Path) -> None:
    """Try inputs in a process of their own, up to so many and so long, from `tried.next` on."""
    stop, end = tried.next + inputs, time.monotonic() + seconds
    while tried.next < stop and time.monotonic() < end:
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.close(reading)
            run_inputs(name, attempt, seed, tried.next, stop, end, work, os.fdopen(writing, "w"))
        os.close(writing)
        follow(name, child, reading, tried)


def run_inputs(
    name: str, attempt: Attempt, seed: int, first: int, stop: int, end: float, work: Path, say: "os.PathLike[str]"
) -> None:
    code = 1
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        warnings.simplefilter("ignore")
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        for number in range(first, stop):
            if time.monotonic() > end and number > first:
                break
            folder = work / "input"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            try:
                outcome = attempt(Random(f"{name}/{seed}/{number}"), folder)
            except BaseException as error:
                outcome = "finding\t" + "".join(traceback.format_exception(error, chain=False, limit=-3)).replace(
                    "\n", "\\n"
                )
            gc.collect()  # loaders, whose threads go with them
            print(outcome, file=say, flush=True)  # type: ignore[call-overload]
        code = 0
    finally:
        os._exit(code)


def follow(name: str, child: int, reading: int, tried: Tried) -> None:
    """Read outcomes until the child ends; one that says nothing for too long, or dies, has met a finding."""
    buffer, why = b"", ""
    while True:
        if not select.select([reading], [], [], LIMIT_S)[0]:
            os.kill(child, signal.SIGKILL)
            why = f"nothing came for {LIMIT_S:g} s"
            break
        data = os.read(reading, 1 << 16)
        if not data:
            break
        *lines, buffer = (buffer + data).split(b"\n")
        for line in lines:
            outcome, _, detail = line.decode(errors="replace").partition("\t")
            if detail:
                tried.findings.append(f"{name}, input {tried.next}: " + detail.replace("\\n", "\n"))
            tried.outcomes[outcome] += 1
            tried.next += 1
    os.close(reading)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code or why:
        tried.findings.append(f"{name}, input {tried.next}: " + (why or f"the process ended with {code}"))
        tried.outcomes["finding"] += 1
        tried.next += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, help="go on by turns for so long")
    parser.add_argument("--inputs", type=int, help="of each target; without minutes, the suite's number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--only", choices=TARGETS, action="append", help="a target")
    args = parser.parse_args()
    torch.set_num_threads(1)  # no pool of threads that a fork would lose
    start, all_tried = time.monotonic(), dict[str, Tried]()
    fast = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = tempfile.tempdir = tempfile.mkdtemp(dir=fast)  # where DALI's own files go, too
    try:
        attempts = {}
        for name in args.only or TARGETS:
            (work := Path(folder) / name.replace("'", "").replace(" ", "-")).mkdir()
            attempts[name], all_tried[name] = TARGETS[name][0](work), Tried()
            all_tried[name].next = args.first
        over = False
        while not over:
            over = True
            for name, attempt in attempts.items():
                left = args.minutes * 60 - (time.monotonic() - start) if args.minutes else float("inf")
                if left <= 0:
                    continue
                over = not args.minutes
                inputs = sys.maxsize if args.minutes else args.inputs or TARGETS[name][1]
                seconds = min(SLICE_S, left) if args.minutes else float("inf")
                slice_of(
                    name, attempt, all_tried[name], seed=args.seed, inputs=inputs, seconds=seconds, work=Path(folder)
                )
    finally:
        if args.inputs == 1:
            print(f"files: {folder}")  # noqa: T201
        else:
            shutil.rmtree(folder)
    report(all_tried, args.first, time.monotonic() - start)
    sys.exit(any(tried.findings for tried in all_tried.values()))


def report(all_tried: dict[str, Tried], first: int, seconds: float) -> None:
    for name, tried in all_tried.items():
        outcomes = ", ".join(f"{outcome} {count}" for outcome, count in sorted(tried.outcomes.items()))
        print(f"{name}: {tried.next - first} inputs: {outcomes}")  # noqa: T201
    kinds = dict[str, list[str]]()
    for finding in (finding for tried in all_tried.values() for finding in tried.findings):
        kinds.setdefault(kind_of(finding), []).append(finding)
    for same in sorted(kinds.values(), key=len, reverse=True):
        print(f"\n{len(same)} FINDINGS like {same[0]}")  # noqa: T201
    total = sum(tried.next - first for tried in all_tried.values())
    findings = sum(len(tried.findings) for tried in all_tried.values())
    print(f"\n{total} inputs, {findings} findings, {seconds:.0f} s")  # noqa: T201


def kind_of(finding: str) -> str:
    """Target, and the start of the last line, without numbers."""
    return re.sub("[0-9]+", "", finding.partition(",")[0] + finding.strip().splitlines()[-1][:70])


if __name__ == "__main__":
    main()
