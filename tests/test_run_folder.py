"""A run folder has one writer at a time; its files are whole, or named as damaged, also on a full disk."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model import run_folder
from model.run_folder import FolderError, Log, claim, is_empty, read_rows
from tools import files
from tools.files import overwrite

ROOT = Path(__file__).resolve().parents[1]
HOLD = "import sys, time; from pathlib import Path; from model.run_folder import claim\n"
HOLD += "with claim(Path(sys.argv[1])): print('held', flush=True); time.sleep(float(sys.argv[2]))"


@contextlib.contextmanager
def other_process(folder: Path, seconds: float = 60) -> Iterator[subprocess.Popen[str]]:
    """A process that holds a claim on `folder`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), str(seconds)], cwd=ROOT, text=True, stdout=subprocess.PIPE
    )
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


# ---- one writer ----------------------------------------------------------------------------------------------------


def test_a_second_writer_is_refused_by_name_and_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with other_process(folder) as process:
        before = {path: path.read_bytes() for path in folder.iterdir()}
        with (
            pytest.raises(FolderError, match=rf"run is in use by another process \(process {process.pid} on "),
            claim(folder),
        ):
            pass
        assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_claim_ends_with_its_process(tmp_path: Path) -> None:
    """After kill -9 the lock file stays and keeps nobody out, and a folder that holds it alone counts as empty."""
    folder = tmp_path / "run"
    with other_process(folder) as process:
        process.kill()
        process.wait()
        assert is_empty(folder)
        with claim(folder) as mine:
            assert (folder / ".lock").read_text() == mine.holder
            assert f"process {os.getpid()} on" in mine.holder
    assert list(folder.iterdir()) == []


def test_a_claim_leaves_no_trace_where_nothing_was_written(tmp_path: Path) -> None:
    """Its own empty folder goes, a folder that was there stays, and so does what was written."""
    there = tmp_path / "there"
    there.mkdir()
    for folder in (tmp_path / "new", there):
        with claim(folder):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    with claim(tmp_path / "kept"):
        (tmp_path / "kept/file").touch()
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["file"]


def test_a_child_that_inherits_the_lock_keeps_the_folder_claimed(tmp_path: Path) -> None:
    """As ablate.py's trainings do after it has been killed."""
    code = HOLD.split("\n")[0] + "; import subprocess\nwith claim(Path(sys.argv[1])) as mine:\n"
    code += " subprocess.Popen(['sleep', '60'], pass_fds=[mine.descriptor]); print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, text=True, stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        process.kill()
        process.wait()
        with pytest.raises(FolderError, match="in use"), claim(tmp_path):
            pass
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while True:
        try:
            with claim(tmp_path):
                return
        except FolderError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_many_processes_hold_the_claim_one_at_a_time(tmp_path: Path) -> None:
    """They take it, leave it and remove lock and folder as fast as they can; what they count never goes back."""
    code = (
        HOLD.split("\n")[0]
        + "; from model.run_folder import FolderError\nfile = Path(sys.argv[1]) / 'count'; done = 0\n"
    )
    code += "while done < 200:\n try:\n  with claim(file.parent / 'run'):\n"
    code += "   n = int(file.read_text()); file.write_text(str(n + 1))\n"
    code += "   done += 1\n except FolderError as error: assert 'in use' in str(error), error\n"
    (tmp_path / "count").write_text("0")
    command = [sys.executable, "-c", code, str(tmp_path)]
    processes = [subprocess.Popen(command, cwd=ROOT) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "600"


def test_a_folder_that_goes_while_it_is_made_is_made_again(tmp_path: Path, monkeypatch: Any) -> None:
    """Its holder removes it between mkdir's "it exists" and mkdir's look at what it is."""
    real, calls = os.mkdir, []

    def mkdir(path: Any, *rest: Any) -> None:
        calls.append(path)
        if len(calls) == 1:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        real(path, *rest)

    monkeypatch.setattr(os, "mkdir", mkdir)
    with claim(tmp_path / "run") as mine:
        assert (tmp_path / "run/.lock").read_text() == mine.holder
    assert len(calls) == 2


def test_a_folder_that_cannot_be_written_in_is_the_callers_to_mend(tmp_path: Path, monkeypatch: Any) -> None:
    """A file in its place, a read-only disk, a link in place of the lock: one ValueError that names the path."""
    (tmp_path / "file").touch()
    with pytest.raises(FolderError, match="file cannot be written in .*File exists"), claim(tmp_path / "file"):
        pass
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    with pytest.raises(FolderError, match="nowhere cannot be written in .*File exists"), claim(tmp_path / "nowhere"):
        pass
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(FolderError, match=r"run cannot be written in .*\.lock"), claim(tmp_path / "run"):
        pass
    assert not (tmp_path / "victim").exists()

    def read_only(path: Any, *_: Any, **__: Any) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(files.os, "open", read_only)
    with pytest.raises(FolderError, match="new cannot be written in .*Read-only file system"), claim(tmp_path / "new"):
        pass


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", none)
    with pytest.warns(UserWarning, match=f"{tmp_path.name} lies on a file system without locks"), claim(tmp_path):
        pass


def test_lines_that_are_no_rows_are_named(tmp_path: Path) -> None:
    """By number; a last line without its end is left out, for it is still being written."""
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n\xff\xfe\n[1]\n' + b"[" * 100_000 + b'\n\n{"step": 2}\n{"step": 3')
    faults: list[str] = []
    assert read_rows(file, faults) == [{"step": 1}, {"step": 2}]
    assert [fault.partition(":")[0] for fault in faults] == ["line 2", "line 3", "line 4", "line 5"]
    with pytest.raises(ValueError, match="metrics.jsonl, line 2: expected JSON, got"):
        read_rows(file)


# ---- the log of a run ----------------------------------------------------------------------------------------------


def begun(out: Path, rank: int = 0, step: int = 0, holder: str = "me") -> Log:
    log = Log(out, rank, holder)
    log.start({"batch_size": 4}, step)
    return log


def status(out: Path) -> dict[str, Any]:
    return json.loads((out / "status.json").read_text())


def test_a_rank_that_outlives_its_run_leaves_the_next_one_alone(tmp_path: Path) -> None:
    """A rank's failure is its run's end as long as that run has the folder, and not that of the run which follows."""
    with claim(tmp_path) as first:
        begun(tmp_path, holder=first.holder)
        late = Log(tmp_path, 1, first.holder)
    with claim(tmp_path) as second:
        begun(tmp_path, holder=second.holder)
        late.status("failed", "rank 0 is gone")
        assert status(tmp_path)["state"] == "running"
        Log(tmp_path, 1, second.holder).status("failed", "mine")
        assert (status(tmp_path)["state"], status(tmp_path)["message"]) == ("failed", "mine")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"state": 3}', b"\xff", b"\0" * 40, b"[" * 100_000])
def test_a_damaged_status_is_named_and_written_anew(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "status.json").write_bytes(content)
    log = begun(tmp_path)
    assert log.notes == [f"{tmp_path / 'status.json'} was damaged: how the run ended before is lost"]
    assert status(tmp_path)["state"] == "running"
    (tmp_path / "status.json").write_bytes(content)
    log.status("done")
    assert status(tmp_path)["state"] == "done"


def test_damaged_rows_are_left_out_and_what_is_lost_is_said(tmp_path: Path) -> None:
    """One line a file; without damage there is none, also where a killed run wrote on after its checkpoint."""
    log = begun(tmp_path)
    log.metrics([{"step": 0, "knn": 0.1}, *({"step": step, "loss": 1.0} for step in range(1, 9))])
    for step in (4, 8):
        log.speed({"step": step, "step_ms": 1.0})
    log.damaged([("a.tar", "k1", "cut"), ("a.tar", "k2", "cut")])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    whole = {name: (tmp_path / name).read_bytes() for name in ("metrics.jsonl", "speed.jsonl", "damaged.jsonl")}
    assert begun(tmp_path, step=8).notes == []
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole["metrics.jsonl"].rpartition(b"\n")[0] + b"\n"
    lines = whole["metrics.jsonl"].splitlines(keepends=True)
    for content, what in (
        (b"", "rows of 4 of the 4 steps"),
        (b"".join(lines[:4]), "rows of 1 of the 4 steps"),
        (b"".join([*lines[:2], b"{,}\n", *lines[3:]]), "1 lines are left out, the first is line 3: expected JSON"),
    ):
        (tmp_path / "metrics.jsonl").write_bytes(content)
        (note,) = begun(tmp_path, step=4).notes
        assert note.startswith(f"{tmp_path / 'metrics.jsonl'} was damaged: {what}"), note
        assert "up to the checkpoint are lost" in note
    (tmp_path / "metrics.jsonl").write_bytes(whole["metrics.jsonl"])
    (tmp_path / "speed.jsonl").unlink()
    (tmp_path / "damaged.jsonl").write_bytes(b'nothing\n{"shard": [], "key": {}}\n{}\n' + whole["damaged.jsonl"])
    log = begun(tmp_path, step=4)
    assert log.notes[1].endswith("; 2 lines name no shard and key, and are left out")
    assert [note.partition(" was damaged")[0] for note in log.notes] == [
        str(tmp_path / name) for name in ("speed.jsonl", "damaged.jsonl")
    ]
    log.damaged([("a.tar", "k1", "cut"), ("a.tar", "k3", "cut")])
    assert [row["key"] for row in read_rows(tmp_path / "damaged.jsonl")] == ["k1", "k2", "k3"]


def test_status_is_written_in_its_own_room_on_a_full_disk(tmp_path: Path, monkeypatch: Any) -> None:
    """No other file can be made: what there is of status.json is written over, and the error that counts is raised."""
    log = begun(tmp_path)
    log.status("running", "x" * 300)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run_folder, "write_text", full)
    with pytest.raises(OSError, match="the checkpoint"), log.outcome():
        raise OSError(errno.ENOSPC, "no room", "the checkpoint")
    assert status(tmp_path) == {
        "state": "failed",
        "step": 0,
        "rank": 0,
        "message": "OSError: [Errno 28] no room: 'the checkpoint'",
    }
    monkeypatch.setattr(run_folder, "overwrite", full)
    overwrite(tmp_path / "status.json", '{"state": "running"}')
    with pytest.raises(OSError, match="the checkpoint"), log.outcome():
        raise OSError(errno.ENOSPC, "no room", "the checkpoint")


def test_a_full_disk_is_survived(tmp_path: Path) -> None:
    """On a file system of 64 KiB without a free byte; needs the right to mount one."""
    code = """
import os, sys
from pathlib import Path
from model.run_folder import Log, claim
out = Path(sys.argv[1]) / "run"
try:
    with claim(out) as mine:
        log = Log(out, 0, mine.holder)
        with log.outcome():
            log.start({}, 0)
            with open(out / "filler", "wb", buffering=0) as file:
                while True:
                    try:
                        file.write(bytes(1024))
                    except OSError:
                        break
            while True:
                log.metrics([{"step": 1, "loss": 1.0}] * 50)
except OSError as error:
    print(error.filename, (out / "status.json").read_text(), (out / "metrics.jsonl").read_bytes()[-1:])
"""
    script = f"mount -t tmpfs -o size=64k none {tmp_path} && exec {sys.executable} -c '{code}' {tmp_path}"
    done = subprocess.run(["unshare", "-m", "sh", "-c", script], cwd=ROOT, capture_output=True, text=True)
    if "mount" in done.stderr or "unshare" in done.stderr:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f'{tmp_path}/run/metrics.jsonl {{"state": "failed", "step": 0'), done.stdout
    assert "No space left on device" in done.stdout
