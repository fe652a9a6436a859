"""Kill -9 at random moments of a training of two processes: gone on with, it ends as one that was never killed.

    python -m tests.kills --kills 100 --seed 1
    python -m tests.kills --kills 20 --seed 2 --command      by `accelerate launch`, whose start takes ten seconds

Killed are rank 0, rank 1, both, or the launcher alone, whose processes then save and go. After each kill the same line
with --resume follows at once, until the run is done; then metrics.jsonl, the last checkpoint and the encoder are, byte
for byte, those of a run that was left alone, and nothing else lies in the folder. A new run follows until the kills are
spent. Launcher and ranks are forked with torch and train.py imported; --command starts them as a user does.
"""

import argparse
import io
import itertools
import json
import os
import random
import re
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import train
from pipeline.shards import Sample
from pipeline.write import write_shards

ROOT = Path(__file__).resolve().parents[1]
KEEP = 2
OPTIONS = "demo --depth 18 --width 0.125 --batch-size 16 --warmup-epochs 1 --precision no --cpu-threads 1 "
OPTIONS += f"--num-threads 1 --view size=16 --checkpoint-every 2 --keep {KEEP} --log-every 1 --resume"
COMMAND = "accelerate.commands.launch --num_machines 1 --mixed_precision no --dynamo_backend no --multi_gpu "
COMMAND += "--num_processes 2 --main_process_port 0"
KINDS = "rank 0", "both ranks", "rank 1", "the launcher"
PATIENCE = 300  # seconds for what must happen soon


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=60, help="of a run; 4 are an epoch")
    parser.add_argument("--command", action="store_true", help="start by the command `accelerate launch`")
    args = parser.parse_args()
    rng, counts, start = random.Random(args.seed), Counter[str](), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        os.environ["TMPDIR"] = tempfile.tempdir = folder  # where a killed process leaves DALI's and torch's files
        wait(fork(write_data, work / "data"))
        whole = work / "whole"
        assert wait(launch(work, whole, args)) == 0, printed(whole)
        for number in itertools.count(1):
            out = work / f"run-{number}"
            kill_until_done(work, out, args, rng, counts)
            assert_equal(out, whole, args.steps)
            report(f"run {number} ended as the one that was left alone, {sum(counts[kind] for kind in KINDS)} kills")
            if sum(counts[kind] for kind in KINDS) >= args.kills:
                break
    report(", ".join(f"{name}: {count}" for name, count in sorted(counts.items())))
    report(f"{number} runs, all equal, {time.monotonic() - start:.0f} s")


def report(line: str) -> None:
    print(line, flush=True)  # noqa: T201


# ---- a run and its processes ---------------------------------------------------------------------------------------


def write_data(out: Path) -> None:
    """70 images: four steps an epoch, six samples over."""
    samples = []
    for i in range(70):
        file = io.BytesIO()
        pixels = np.random.default_rng(i).integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(pixels).resize((16, 16)).save(file, "PNG")
        samples.append(Sample(f"{i}.png", i % 2, file.getvalue()))
    write_shards(samples, out, classes=["even", "odd"], name="train", shard_size=30)


def fork(function, *arguments) -> int:  # type: ignore[no-untyped-def]
    child = os.fork()
    if not child:
        code = 1
        try:
            function(*arguments)
            code = 0
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(code)
    return child


def launch(work: Path, out: Path, args: argparse.Namespace) -> int:
    """The process of a launcher that trains in `out`, or goes on there; what it prints is in OUT.log."""
    arguments = [*OPTIONS.split(), "--steps", str(args.steps), "--data", str(work / "data"), "--out", str(out)]
    return fork(run_command if args.command else run_ranks, arguments, out)


def redirect(out: Path) -> None:
    os.setsid()
    log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(ROOT)


def run_command(arguments: list[str], out: Path) -> None:
    redirect(out)
    os.execv(sys.executable, [sys.executable, "-m", *COMMAND.split(), str(ROOT / "train.py"), *arguments])


def run_ranks(arguments: list[str], out: Path) -> None:
    """What torch's launcher does: when one rank has failed, it ends the other, after 30 s without its consent."""
    redirect(out)
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    running = [fork(run_rank, number, port, arguments) for number in (0, 1)]
    while running:
        ended, status = os.waitpid(-1, 0)
        running.remove(ended)
        if status:
            deadline = time.monotonic() + 30
            for pid in running:
                os.kill(pid, signal.SIGTERM)
            while running and not os.waitpid(running[0], os.WNOHANG)[0]:
                if time.monotonic() > deadline:
                    os.kill(running[0], signal.SIGKILL)
                time.sleep(0.01)
            sys.exit(1)


def run_rank(number: int, port: int, arguments: list[str]) -> None:
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"  # by which train.py knows that it was launched
    sys.argv = ["train.py", *arguments]
    train.app()


def wait(child: int) -> int:
    """The exit code of a child, negative for a signal; it is killed when it takes too long."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError(f"process {child} did not end within {PATIENCE} s")


def children(parent: int) -> list[int]:
    """Its children that are alive, in the order in which they were started."""
    pids = []
    for tasks in Path(f"/proc/{parent}/task").glob("*/children"):
        pids += [int(pid) for pid in tasks.read_text().split()]
    return [pid for pid in sorted(pids) if is_alive(pid)]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def printed(out: Path) -> str:
    return out.with_suffix(".log").read_text()


def rows(out: Path) -> int:
    try:
        return (out / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


# ---- kills ---------------------------------------------------------------------------------------------------------


def kill_until_done(work: Path, out: Path, args: argparse.Namespace, rng: random.Random, counts: Counter[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        launcher = launch(work, out, args)
        left = args.kills - sum(counts[kind] for kind in KINDS)
        kind = KINDS[(args.seed + args.kills - left) % len(KINDS)]
        victims = kill_once(kind, launcher, out, args.steps, rng, counts) if left > 0 else []
        code = wait(launcher)
        text = printed(out)
        if code == 0:
            return
        if "is in use by another process" in text:  # what the launcher left behind is still saving
            assert time.monotonic() < deadline, f"the folder stays in use:\n{text}"
            counts["resumes while the folder was in use"] += 1
            time.sleep(0.2)
            continue
        assert victims, f"exit code {code} without a kill:\n{text}"
        deadline = time.monotonic() + PATIENCE
        for pid in victims:  # a launcher that lives ends all of them; one that was killed leaves them to save
            while launcher not in victims and is_alive(pid):
                assert time.monotonic() < deadline, f"process {pid} is left behind:\n{text}"
                time.sleep(0.01)


def kill_once(kind: str, launcher: int, out: Path, last: int, rng: random.Random, counts: Counter[str]) -> list[int]:
    """Kill at a random moment, [] if the run ended before it; else all its processes."""
    before = rows(out)
    steps = rng.choice((0, 1, 1, 2, 3, 4, 5, 8))  # 0: within some seconds, mostly before the first step
    pause = rng.uniform(0, 6) if not steps else rng.uniform(0, 0.4)
    grown, deadline = before, time.monotonic() + PATIENCE
    while steps and grown < min(before + steps, last) and is_alive(launcher):
        assert time.monotonic() < deadline, f"no step {before + steps}:\n{printed(out)}"
        time.sleep(0.002)
        now = rows(out)
        before, grown = min(before, now), now  # on going on, rows after the checkpoint are dropped
    time.sleep(pause)
    ranks = children(launcher)
    doomed = {"rank 0": ranks[:1], "rank 1": ranks[1:], "both ranks": ranks, "the launcher": [launcher]}[kind]
    if not is_alive(launcher) or not doomed or (kind != "the launcher" and len(ranks) < 2):
        return []
    for pid in doomed:
        os.kill(pid, signal.SIGKILL)
    counts[kind] += 1
    saving = any((out / "checkpoints").glob(".*")) or any(out.glob(".*.tmp"))
    now = rows(out)
    counts["at a moment " + ("within a save" if saving else "between steps" if now > before else "of the set-up")] += 1
    return [launcher, *ranks] if kind == "the launcher" else ranks


def assert_equal(out: Path, whole: Path, steps: int) -> None:
    assert json.loads((out / "status.json").read_bytes()) == json.loads((whole / "status.json").read_bytes())
    checkpoints = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert all(re.fullmatch(r"step-\d{7}", name) for name in checkpoints), checkpoints
    assert len(checkpoints) == KEEP, checkpoints
    last = f"checkpoints/step-{steps:07d}"
    equal = ["metrics.jsonl", "encoder/encoder.safetensors", *(f"{last}/{p.name}" for p in (whole / last).iterdir())]
    for name in equal:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), f"{name} differs"
    mine, others = (
        {str(p.relative_to(f)) for p in f.rglob("*") if "checkpoints/" not in str(p.relative_to(f))}
        for f in (out, whole)
    )
    assert mine == others, f"of one alone: {mine ^ others}"


if __name__ == "__main__":
    torch.set_num_threads(1)  # no pool of threads that a fork would lose
    main()
