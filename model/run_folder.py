"""A run folder's files: rows and states that outlive kill -9 and a full disk, written by one process at a time.

How a file is replaced or added to: tools/files.py. metrics.jsonl and its like are read by `read_rows` alone.
"""

import contextlib
import fcntl
import itertools
import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tools.files import append, descriptor_of, lock, overwrite, read_bytes, read_text, remove, write_text

LOCK = ".lock"


class FolderError(ValueError):
    """A folder cannot be written in, or another process writes it; the message names it and says what to do."""


class Preempted(Exception):
    """A signal asked the run to stop; it saved a checkpoint and can go on from there."""


# ---- one writer ----------------------------------------------------------------------------------------------------


class Claim(NamedTuple):
    """A folder that this process alone may write in."""

    descriptor: int  # of the lock: a child that inherits it keeps the folder claimed until it ends, too
    holder: str  # what folder/.lock says as long as the claim holds


@contextmanager
def claim(folder: Path, program: str = "process") -> Iterator[Claim]:
    """Make this process the one writer of `folder`, created if need be, until the block ends or the process dies.

    The lock is an flock on folder/.lock, a file that names its holder and goes with the claim; NFS carries it between
    nodes. A folder that was created here and stayed empty goes too. Raises FolderError if another process, which the
    message calls `program`, is the writer, or if the folder cannot be written in.
    """
    created, file = not folder.exists(), folder / LOCK
    holder = f"process {os.getpid()} on {os.uname().nodename}, since {datetime.now(UTC).isoformat()}"
    try:
        descriptor = _locked(file, holder)
    except BlockingIOError as error:
        raise FolderError(
            f"{folder} is in use by another {program} ({holder_of(folder)}): wait until it has ended, or stop it, or "
            "give another folder"
        ) from error
    except OSError as error:
        where = error.filename or file
        raise FolderError(
            f"{folder} cannot be written in ({where}: {error.strerror}): give another folder, or make room and allow "
            "writing there"
        ) from error
    try:
        yield Claim(descriptor, holder)
    finally:
        with contextlib.suppress(OSError):
            remove(file)
            if created:
                folder.rmdir()  # fails if it holds anything
        os.close(descriptor)


@contextmanager
def claim_for_all(folder: Path, main: bool, of_main: Callable[[Any], Any]) -> Iterator[str]:
    """The main process of several claims `folder`; yields the claim's holder, or raises FolderError, on all of them.

    of_main: gives every process the main one's value.
    """
    with contextlib.ExitStack() as stack:
        holder, refusal = "", ""
        if main:
            try:
                holder = stack.enter_context(claim(folder)).holder
            except FolderError as error:
                refusal = str(error)
        holder, refusal = of_main((holder, refusal))
        if refusal:
            raise FolderError(refusal)
        yield holder


def next_free(path: Path) -> Path:
    """path, or path-2, path-3, ... whichever does not exist yet."""
    candidates = (path if i == 1 else path.with_name(f"{path.name}-{i}") for i in itertools.count(1))
    return next(candidate for candidate in candidates if not candidate.exists())


def holder_of(folder: Path) -> str:
    """Who claimed a folder, in the words of `Claim.holder`; "" if nobody did."""
    try:
        return read_text(folder / LOCK, errors="replace")
    except OSError:
        return ""


def is_empty(folder: Path) -> bool:
    """Whether nothing lies in a folder but perhaps the lock of a process that was killed."""
    return all(path.name == LOCK for path in folder.iterdir())


def _locked(file: Path, holder: str) -> int:
    """A descriptor of `file`, created if need be, that has its lock. Raises BlockingIOError if another process does."""
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError:  # a file in its place, or a folder that its holder removed before mkdir looked at it
            with contextlib.suppress(FileNotFoundError):
                if not stat.S_ISDIR(file.parent.lstat().st_mode):
                    raise
            continue
        try:
            descriptor = descriptor_of(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
        except FileNotFoundError:  # the holder has just removed the folder that it had created
            continue
        try:
            lock(descriptor, file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(file, follow_symlinks=False)):
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, holder.encode(), 0)
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the holder has just removed this file: its lock would keep nobody out


# ---- rows ----------------------------------------------------------------------------------------------------------


def append_rows(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add a line of JSON for each row, as `files.append` does."""
    append(file, "".join(json.dumps(row) + "\n" for row in rows).encode())


def read_rows(file: Path, faults: list[str] | None = None) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines. A last line without its end is still being written, and left out.

    faults  collects what is wrong with the lines that are passed over; None: the first such line is a ValueError that
            names the file and the line.
    """
    rows = []
    *lines, _ = read_bytes(file).split(b"\n")
    for number, line in enumerate(lines, 1):
        expected, row = "an object", None
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            expected = "JSON"
        if isinstance(row, dict):
            rows.append(row)
        else:
            fault = f"line {number}: expected {expected}, got {line[:60].decode(errors='replace')!r}"
            if faults is None:
                raise ValueError(f"{file}, {fault}")
            faults.append(fault)
    return rows


# ---- what a run leaves behind --------------------------------------------------------------------------------------


class Log:
    """The run folder's files. Only the main process writes, except that any process records its failure.

    holder  of the claim that the main process has on `out`.
    notes   lines about files that were damaged.
    """

    def __init__(self, out: Path, rank: int, holder: str) -> None:
        self.out, self.rank, self.main, self.holder = out, rank, rank == 0, holder
        self.replaced: dict[tuple[str, str], Any] = {}  # damaged samples that have been named, by shard and key
        self.started, self.step = False, 0  # steps done
        self.notes: list[str] = []
        if self.main and (state := self._state()) not in (None, "done"):
            if state == "damaged":
                self.notes.append(f"{out / 'status.json'} was damaged: how the run ended before is lost")
            self._status("running", "setting up")  # no longer how it ended last time

    def start(self, config: dict[str, Any], resume_at: int) -> None:
        """Remove the rows of steps after `resume_at`, which will be written again, and damaged rows before it."""
        self.started, self.step = True, resume_at
        if not self.main:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        # every step has a row of metrics, and a checkpoint one of speed at its step
        expected = {"metrics.jsonl": set(range(1, resume_at + 1)), "speed.jsonl": {resume_at} - {0}}
        for name, steps in expected.items():
            rows = self._rows(name) if resume_at else []
            rows = [row for row in rows if type(row.get("step")) is int and row["step"] <= resume_at]
            if lost := len(steps - {row["step"] for row in rows if "knn" not in row}):
                what = f"{lost} of the {resume_at} steps" if name == "metrics.jsonl" else "some steps"
                self._note(name, f"rows of {what} up to the checkpoint are lost")
            self._write_rows(name, rows)
        if (self.out / "damaged.jsonl").exists():
            rows = self._rows("damaged.jsonl")
            named = [row for row in rows if isinstance(row.get("shard"), str) and isinstance(row.get("key"), str)]
            if len(named) < len(rows):
                self._note("damaged.jsonl", f"{len(rows) - len(named)} lines name no shard and key, and are left out")
            self.replaced = {(row["shard"], row["key"]): row for row in named}
            self._write_rows("damaged.jsonl", list(self.replaced.values()))
        write_text(self.out / "config.json", json.dumps(config, indent=1))
        if self._state() != "failed":  # on another rank, meanwhile
            self._status("running", "")

    def metrics(self, rows: list[dict[str, Any]]) -> None:
        self._append("metrics.jsonl", rows)

    def speed(self, row: dict[str, Any]) -> None:
        self._append("speed.jsonl", [row])

    def damaged(self, samples: Sequence[tuple[str, str, str]]) -> None:
        """damaged.jsonl: replaced samples (shard, key, problem), every one once; `quarantine --from` reads it."""
        names = ("shard", "key", "problem")
        rows = {sample[:2]: dict(zip(names, sample, strict=True)) for sample in samples}
        new = {place: row for place, row in rows.items() if place not in self.replaced}
        if new:
            self._append("damaged.jsonl", list(new.values()))
            self.replaced |= new

    def status(self, state: Literal["running", "preempted", "failed", "done"], message: str = "") -> None:
        """Write status.json for programs that watch the run: the launcher hides exit codes.

        Any process writes that it failed, once the folder is a run's and as long as it is this one's. The first one's
        words stay: the others then fail because it is gone.
        """
        ours = self.main or (state == "failed" and holder_of(self.out) == self.holder)
        if ours and self._state() in ("running", "damaged"):
            self._status(state, message)

    @contextmanager
    def outcome(self) -> Iterator[None]:
        try:
            yield
        except Preempted as error:
            self.status("preempted", str(error))
            raise
        except BaseException as error:
            with contextlib.suppress(OSError):  # where not even this can be written, what is raised says why
                self.status("failed", f"{type(error).__name__}: {error}")
            if self.started and type(error) is ValueError:  # what the caller can mend has been looked at before
                raise RuntimeError(f"rank {self.rank} failed in step {self.step + 1}: {error}") from error
            raise

    def knn(self) -> dict[int, float]:
        """Accuracies logged so far, by step; empty on other processes than the main one."""
        rows = read_rows(self.out / "metrics.jsonl") if self.main else []
        return {row["step"]: row["knn"] for row in rows if "knn" in row}

    def _state(self) -> str | None:
        """The state in status.json; None if there is no such file, "damaged" if it cannot be read."""
        try:
            state = json.loads(read_bytes(self.out / "status.json"))["state"]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, RecursionError):
            return "damaged"
        return state if isinstance(state, str) else "damaged"

    def _status(self, state: str, message: str) -> None:
        row = {"state": state, "step": self.step, "rank": self.rank, "message": message}
        if self.replaced:
            row["damaged"] = len(self.replaced)
        file = self.out / "status.json"
        try:
            write_text(file, json.dumps(row))
        except OSError:
            if not file.exists():
                raise
            overwrite(file, json.dumps(row | {"message": message[:1000]}))  # so that a block of 4 KiB is enough

    def _rows(self, name: str) -> list[dict[str, Any]]:
        faults: list[str] = []
        rows = read_rows(self.out / name, faults) if (self.out / name).exists() else []
        if faults:
            self._note(name, f"{len(faults)} lines are left out, the first is {faults[0]}")
        return rows

    def _write_rows(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        write_text(self.out / name, "".join(json.dumps(row) + "\n" for row in rows))

    def _note(self, name: str, what: str) -> None:
        """Add a note; further faults of the same file join its line."""
        start = f"{self.out / name} was damaged: "
        if self.notes and self.notes[-1].startswith(start):
            self.notes[-1] += f"; {what}"
        else:
            self.notes.append(start + what)

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        if self.main:  # a checkpoint follows only after the rows it stands on are on the disk
            append_rows(self.out / name, rows)
