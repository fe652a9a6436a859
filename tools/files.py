"""Files and folders on a disk. Only regular files are read, nothing is written or removed through a symbolic link, and
what takes a file's place is on the disk whole before it has its name.

Whatever opens, writes, renames or removes a path of the program does it by this module, and every OSError names the
path. A folder in which something is prepared holds the file MARK until it is finished: no folder without it is ever
emptied. The locks (flock) on such folders go with their process, so what a killed one left is told from what is in use.
"""

import contextlib
import errno
import fcntl
import glob
import io
import os
import shutil
import stat
import tempfile
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO

MARK = ".swiftclr-unfinished"
MARK_TEXT = b"A command is preparing this folder, or was killed while it did. It may be removed.\n"
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # of a file system that has none
KINDS = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


@contextmanager
def naming(path: Path, advice: str = "") -> Iterator[None]:
    """An OSError that names no file, as that of a full disk, gets the name of `path`, and says what to do about it."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, "; ".join(filter(None, (error.strerror, advice))), str(path)) from error


# ---- reading and adding --------------------------------------------------------------------------------------------


def descriptor_of(path: str | Path, flags: int) -> int:
    """os.open of a regular file, which waits for nothing. Raises OSError naming any other kind of file.

    With O_NOFOLLOW a symbolic link is an error too.
    """
    path = os.fspath(path)
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP and flags & os.O_NOFOLLOW:
            raise OSError(errno.ELOOP, "it is a symbolic link, through which nothing is written", path) from error
        if error.errno == errno.ENXIO:  # a socket, or a pipe that nobody reads
            raise _not_a_file(path, os.stat(path).st_mode) from error
        raise
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise _not_a_file(path, mode)
    return descriptor


def _not_a_file(path: str, mode: int) -> OSError:
    if stat.S_ISDIR(mode):
        return IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    return OSError(errno.ENXIO, f"it is {KINDS.get(stat.S_IFMT(mode), 'no file')}, expected a regular file", path)


def open_binary(path: str | Path) -> io.BufferedReader:
    """A file to read."""
    return open(path, "rb", opener=descriptor_of)


def open_text(path: str | Path, encoding: str = "utf-8", errors: str = "strict", newline: str | None = None) -> IO[str]:
    return open(path, encoding=encoding, errors=errors, newline=newline, opener=descriptor_of)


def read_bytes(path: str | Path) -> bytes:
    with open_binary(path) as file:
        return file.read()


def read_text(path: str | Path, encoding: str = "utf-8", errors: str = "strict") -> str:
    with open_text(path, encoding, errors) as file:
        return file.read()


def open_to_append(path: str | Path) -> io.FileIO:
    """A file to add to, made if need be, without a buffer: one would be written again on closing."""
    opener = partial(_opened, more=os.O_NOFOLLOW)
    return open(path, "a+b", buffering=0, opener=opener)


def _opened(path: str, flags: int, more: int) -> int:
    return descriptor_of(path, flags | more)


def append(path: Path, data: bytes) -> None:
    """Add lines to a file; all are on the disk afterwards, or none is. Several processes may call at once.

    A last line that a killed process cut off is removed first. Raises OSError.
    """
    with naming(path), open_to_append(path) as file:
        lock(file.fileno(), path)  # only as long as it takes to write
        size = file.seek(0, os.SEEK_END)
        if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
            size = os.pread(file.fileno(), size, 0).rfind(b"\n") + 1
            file.truncate(size)
        try:
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())
        except OSError:
            os.ftruncate(file.fileno(), size)
            raise


def overwrite(path: Path, text: str) -> None:
    """Write over a file in the room that it has already, where the disk is full or its folder may not be written."""
    with naming(path):
        descriptor = descriptor_of(path, os.O_WRONLY | os.O_NOFOLLOW)
        try:
            data = text.encode()
            os.pwrite(descriptor, data, 0)
            os.ftruncate(descriptor, len(data))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def lock(descriptor: int, path: Path, how: int = fcntl.LOCK_EX) -> None:
    """flock; a file system without locks is named in a warning. Raises BlockingIOError as flock does."""
    try:
        fcntl.flock(descriptor, how)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        warnings.warn(
            f"{path.parent} lies on a file system without locks ({error.strerror}): see to it that no other process "
            "writes there",
            stacklevel=2,
        )


# ---- new files, and what takes the place of a file -----------------------------------------------------------------


def create(path: Path) -> io.BufferedWriter:
    """A new file to write. Raises FileExistsError if there is anything of that name, a link that leads nowhere too."""
    return open(path, "xb", opener=descriptor_of)


def write_new(path: Path, text: str, encoding: str = "utf-8") -> None:
    """Write a file that was not there, and have it on the disk. Raises FileExistsError as `create` does."""
    with naming(path), create(path) as file:
        file.write(text.encode(encoding))
        file.flush()
        os.fsync(file.fileno())


def flush(path: Path) -> None:
    """fsync: the bytes of a file, or the names in a folder, are on the disk afterwards."""
    with naming(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield where to write what takes the place of `path`, once it is on the disk; if the block fails, nothing changes.

    A link at `path` is replaced itself. An OSError names a file.
    """
    with naming(path), workspace(path.parent, path.name) as inside:
        yield inside / path.name
        flush(inside / path.name)
        os.replace(inside / path.name, path)


def write_text(path: Path, text: str, encoding: str = "utf-8") -> None:
    """Write a file that is on the disk whole, or as it was before."""
    with replacing(path) as new, naming(path), create(new) as file:
        file.write(text.encode(encoding))


# ---- folders -------------------------------------------------------------------------------------------------------


def make_folder(path: Path) -> None:
    """Make a folder, with those above it, if it is not there. Raises OSError if it is a link, or no folder."""
    if path.is_symlink():
        raise OSError(errno.ELOOP, "it is a symbolic link, through which nothing is written or removed", str(path))
    path.mkdir(parents=True, exist_ok=True)


@contextmanager
def workspace(folder: Path, name: str) -> Iterator[Path]:
    """A new folder beside `name` in `folder`, made if need be, where its successor is prepared; gone afterwards.

    What killed processes left for the same name goes first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_abandoned(folder, name)
    while True:
        try:
            path = Path(tempfile.mkdtemp(".tmp", _start(name), folder))
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(folder)) from error
        with contextlib.suppress(BlockingIOError, FileNotFoundError):  # another process took it for abandoned
            held = _hold(path)
            break
    try:
        write_mark(path)
        yield path
    finally:
        with contextlib.suppress(OSError):
            remove_workspace(path)
        os.close(held)


def _start(name: str) -> str:
    return f".{name[:40]}."  # a name has at most 255 bytes


def remove_abandoned(folder: Path, name: str) -> None:
    """Remove the workspaces of processes that are gone; whatever else has such a name stays.

    An empty folder is one of a process that was killed before it had marked it, or after it had removed the mark.
    """
    for path in folder.glob(f"{glob.escape(_start(name))}????????.tmp"):
        with contextlib.suppress(OSError):  # a link or a file, in use, or not to be removed by us
            held = _hold(path)
            try:
                if _is_marked(held):
                    remove_workspace(path)
                else:
                    path.rmdir()  # fails if anything is in it
            finally:
                os.close(held)


def take_unfinished(path: Path) -> int:
    """Make the folder `path`, or take the one that a killed process left there; its descriptor, with the lock.

    Raises BlockingIOError if another process has it, FileExistsError if anything else has this name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        path.mkdir()
    try:
        held = _hold(path)
    except NotADirectoryError:
        raise _in_the_way(path) from None
    try:
        inside = os.listdir(held)
        if not inside:
            write_mark(path)
        elif not _is_marked(held):
            raise _in_the_way(path)
    except BaseException:
        os.close(held)
        raise
    return held


def write_mark(folder: Path) -> None:
    with create(folder / MARK) as file:
        file.write(MARK_TEXT)


def empty(folder: Path, keep: Collection[str] = ()) -> None:
    """Remove all in a folder of ours but its mark and what is named. Links go, and what they lead to stays."""
    for path in list(folder.iterdir()):
        if path.name in (MARK, *keep):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            remove(path)


def remove(path: Path) -> None:
    """Remove a file, or a link itself, if it is there."""
    path.unlink(missing_ok=True)


def remove_workspace(path: Path) -> None:
    """The mark goes last, so that what a killed process leaves has it."""
    empty(path)
    remove(path / MARK)
    path.rmdir()


def _hold(path: Path) -> int:
    """A descriptor of a folder that is no link, with its lock. Raises BlockingIOError, or NotADirectoryError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        lock(descriptor, path, fcntl.LOCK_EX | fcntl.LOCK_NB)
        there = path.lstat() if os.path.lexists(path) else None
        if not there or not os.path.samestat(os.fstat(descriptor), there):
            raise BlockingIOError(errno.EAGAIN, "another process has just finished it", str(path))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _is_marked(folder: int) -> bool:
    """Whether the open folder holds our mark."""
    try:
        mark = os.open(MARK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except OSError:
        return False
    try:
        return stat.S_ISREG(os.fstat(mark).st_mode) and MARK_TEXT.startswith(os.pread(mark, len(MARK_TEXT) + 1, 0))
    finally:
        os.close(mark)


def _in_the_way(path: Path) -> FileExistsError:
    return FileExistsError(
        errno.EEXIST,
        f"it is in the way, and no folder that a killed command left (without {MARK}): remove it",
        str(path),
    )
