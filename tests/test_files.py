"""What is written is whole on the disk or not there; nothing is read, written or removed through what is no file."""

import errno
import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from model.run_folder import append_rows, read_rows
from tools import files
from tools.files import (
    append,
    create,
    make_folder,
    naming,
    overwrite,
    read_bytes,
    replacing,
    workspace,
    write_new,
    write_text,
)

ROOT = Path(__file__).resolve().parents[1]


def test_what_is_replaced_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: Any) -> None:
    """The bytes are flushed, then renamed; a failure leaves the old file and nothing else."""
    file, order = tmp_path / "status.json", []
    file.write_text("old")
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        order.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).read_text())
        real_fsync(descriptor)

    def replace(old: Path, new: Path) -> None:
        order.append(f"rename to {new.name}")
        real_replace(old, new)

    monkeypatch.setattr(files.os, "fsync", fsync)
    monkeypatch.setattr(files.os, "replace", replace)
    write_text(file, "new")
    assert order == ["new", "rename to status.json"]
    assert file.read_text() == "new"

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*status\.json"):
        write_text(file, "newest")
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]
    assert file.read_text() == "new"


def test_rows_are_added_whole_or_not_at_all(tmp_path: Path) -> None:
    """A last line that was cut off goes first; a disk that is full in the middle of a row leaves the rows before it."""
    file = tmp_path / "evaluation.jsonl"
    append_rows(file, [{"a": 1}, {"b": 2}])
    with file.open("a") as opened:
        opened.write('{"c": ')
    append_rows(file, [{"d": 4}])
    assert read_rows(file) == [{"a": 1}, {"b": 2}, {"d": 4}]
    before = file.read_bytes()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (40, 40))
            try:
                append_rows(file, [{"long": "x" * 100}])
            except OSError as error:
                code = 0 if error.filename == str(file) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert file.read_bytes() == before


def test_several_processes_may_add_rows(tmp_path: Path) -> None:
    """Evaluations of one encoder at once: every row is there, none torn."""
    file = tmp_path / "evaluation.jsonl"
    code = "import sys; from pathlib import Path; from model.run_folder import append_rows\n"
    code += "for i in range(100): append_rows(Path(sys.argv[1]), [{'who': sys.argv[2], 'i': i, 'long': 'x' * 5000}])"
    processes = [subprocess.Popen([sys.executable, "-c", code, str(file), who], cwd=ROOT) for who in "abc"]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    rows = read_rows(file)
    assert sorted((row["who"], row["i"]) for row in rows) == [(who, i) for who in "abc" for i in range(100)]


def test_an_error_without_a_file_gets_one_and_others_keep_theirs(tmp_path: Path) -> None:
    with pytest.raises(PermissionError, match="mine"), naming(tmp_path / "other"):
        raise PermissionError(errno.EACCES, "no", "mine")
    with pytest.raises(OSError, match="No space left on device: '.*/other'"), naming(tmp_path / "other"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="^could not$"), naming(tmp_path / "other"):
        raise OSError("could not")


# ---- links, pipes and folders in the way ---------------------------------------------------------------------------


def planted(path: Path, kind: str, victim: Path) -> None:
    """What somebody may have put at `path`; `victim` is a folder that holds a file."""
    victim.mkdir()
    (victim / "kept").write_text("kept")
    if kind == "link to a folder":
        path.symlink_to(victim)
    elif kind == "link to a file":
        path.symlink_to(victim / "kept")
    elif kind == "link to nothing":
        path.symlink_to(victim / "new")
    elif kind == "folder":
        path.mkdir()
        (path / "kept").write_text("kept")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))


LINKS = ["link to a folder", "link to a file", "link to nothing"]


@pytest.mark.parametrize("kind", [*LINKS, "folder", "pipe", "socket"])
@pytest.mark.parametrize("way", ["append", "create", "overwrite"])
def test_nothing_is_written_through_what_is_no_file(kind: str, way: str, tmp_path: Path) -> None:
    """An error that names the path, at once; the victim of a link stays as it was."""
    path, victim = tmp_path / "evaluation.jsonl", tmp_path / "victim"
    planted(path, kind, victim)
    writing = {"append": lambda: append(path, b"x\n"), "create": lambda: write_new(path, "x")}
    with pytest.raises(OSError, match="evaluation.jsonl"):
        writing.get(way, lambda: overwrite(path, "x"))()
    assert [(each.name, each.read_text()) for each in victim.iterdir()] == [("kept", "kept")]


@pytest.mark.parametrize("kind", LINKS)
def test_a_link_is_replaced_itself(kind: str, tmp_path: Path) -> None:
    path, victim = tmp_path / "status.json", tmp_path / "victim"
    planted(path, kind, victim)
    write_text(path, "new")
    assert not path.is_symlink()
    assert path.read_text() == "new"
    assert [(each.name, each.read_text()) for each in victim.iterdir()] == [("kept", "kept")]


@pytest.mark.parametrize("kind", ["pipe", "socket", "folder", "device"])
def test_only_regular_files_are_read(kind: str, tmp_path: Path) -> None:
    """A pipe would be waited for without an end; a link to a file is read."""
    path = tmp_path / "dataset.json"
    if kind == "device":
        path.symlink_to("/dev/zero")
    else:
        planted(path, kind, tmp_path / "victim")
    what = {"pipe": "it is a named pipe, expected a regular file", "folder": "Is a directory"}
    with pytest.raises(OSError, match=what.get(kind, f"it is a {kind}, expected a regular file")) as failed:
        read_bytes(path)
    assert failed.value.filename == str(path)
    (tmp_path / "real").write_text("text")
    (tmp_path / "link").symlink_to("real")
    assert read_bytes(tmp_path / "link") == b"text"


def test_a_workspace_removes_what_killed_processes_left_and_nothing_else(tmp_path: Path) -> None:
    """Of its own name, marked, and not in use: a link or a folder of anybody stays with all that is in it."""
    with workspace(tmp_path, "encoder") as killed:
        name = killed.name
        (killed / "half").touch()
        with workspace(tmp_path, "encoder") as other:
            assert killed.is_dir()
            assert other != killed
        killed.rename(tmp_path / "kept-for-later")
    (tmp_path / "kept-for-later").rename(killed)
    planted(tmp_path / f"{name[:-8]}0000.tmp", "folder", tmp_path / "one")
    planted(tmp_path / f"{name[:-8]}1111.tmp", "link to a folder", tmp_path / "two")
    (tmp_path / "two" / files.MARK).write_bytes(files.MARK_TEXT)
    before = {path for path in tmp_path.rglob("*") if killed not in (path, *path.parents)}
    unmarked = tmp_path / f"{name[:-8]}2222.tmp"  # of one killed before the mark was there, or after it had gone
    unmarked.mkdir()
    with workspace(tmp_path, "another"):
        assert killed.is_dir()
    with workspace(tmp_path, "encoder") as inside:
        assert not killed.exists()
        assert not unmarked.exists()
        assert (inside / files.MARK).exists()
        (inside / "folder").mkdir()
        (inside / "link").symlink_to(tmp_path / "one")
    assert set(tmp_path.rglob("*")) == before


def test_a_folder_that_would_be_written_in_is_no_link(tmp_path: Path) -> None:
    planted(tmp_path / "checkpoints", "link to a folder", tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic link.*checkpoints"):
        make_folder(tmp_path / "checkpoints")
    make_folder(tmp_path / "new" / "folder")
    assert (tmp_path / "new/folder").is_dir()


def test_names_as_long_as_they_may_be_are_replaced(tmp_path: Path) -> None:
    for name in ("x" * 255, "\N{SNOWMAN}" * 85, "[*]"):
        write_text(tmp_path / name, name)
        with replacing(tmp_path / name) as new, create(new) as file:
            file.write(b"again")
        assert (tmp_path / name).read_text() == "again"
    assert len(list(tmp_path.iterdir())) == 3
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~umask()}


def umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now
