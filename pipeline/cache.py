"""Whole shards of remote data sets on local disk: fetched ahead of need, shared by all processes of a node.

The folder holds KEY-BYTES.shard, whole and checked, and KEY-BYTES.part, being fetched; KEY is a hash of the shard's
address and sha256, so no other data set and no changed shard ever takes its place. Who fetches holds a lock (flock) on
the part; who needs a shard soon, or has it open, holds a shared lock on it. The kernel releases the locks of a killed
process, so what it leaves is seen for what it is. What changes names holds the lock of the file `lock`, for
milliseconds: making room, beginning a part, and renaming it to a shard.
"""

import errno
import fcntl
import hashlib
import os
import re
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pipeline.shards import Dataset
from pipeline.store import PATIENCE_S, begin_range, is_remote
from tools.files import descriptor_of

PART = 8 << 20  # bytes of a request
PARTS_AT_ONCE = 8  # requests in flight for one shard, so 64 MiB of memory
SHARDS_AT_ONCE = 2  # shards that one process fetches ahead of need at a time
AHEAD = 64  # shards of a prefetch that wait on disk for their turn; each is an open file
OURS = re.compile(r"[0-9a-f]{40}-(\d+)\.(shard|part)")


def default_cache_folder() -> Path:
    """swiftclr in $XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swiftclr"


def cache_for(
    dataset: Dataset, folder: str, gib: float, *, window: int, lanes: int, patience_s: float = PATIENCE_S
) -> "Cache | None":
    """Where shards from object storage are kept, None for those on a disk.

    folder  "" is `default_cache_folder`
    gib     the most that it may hold
    window  shards that a lane mixes at a time, and lanes, those of this node; ValueError where two windows of each,
            the one in use and the next, have no room
    """
    if not is_remote(dataset.tars_address):
        return None
    largest = sum(sorted(shard.bytes for shard in dataset.shards)[-window:])
    if (needed := 2 * lanes * largest / 2**30) > gib:
        raise ValueError(
            f"--cache-gib {gib:g} is too little for the shards in use and the next ones: windows of {window} shards, "
            f"two of each of this node's {lanes} lane(s), take up to {needed:.3g} GiB. Allow more, or lower --window"
        )
    return Cache(Path(folder) if folder else default_cache_folder(), int(gib * 2**30), patience_s=patience_s)


@dataclass(frozen=True)
class _Item:
    address: str
    size: int  # bytes
    sha256: str  # "": not known

    @cached_property
    def name(self) -> str:
        return f"{hashlib.sha256(f'{self.address} {self.sha256}'.encode()).hexdigest()[:40]}-{self.size}"


@dataclass
class Stats:
    """What this process has fetched; a part that was fetched twice counts twice."""

    bytes_fetched: int = 0
    shards_fetched: int = 0


class _NoRoom(Exception):
    """All that could make room is needed soon, or being fetched."""


class Cache:
    """Shards of remote data sets on local disk, at most `limit_bytes` of them; for all threads and processes of a node.

    folder       made if need be; shared by all processes that name it
    limit_bytes  of whole shards and those in flight; the least recently used goes first. A file that is deleted while a
                 process has it open takes its space until that closes it
    patience_s   seconds for which every request is tried again after trouble that may pass
    """

    def __init__(self, folder: str | Path, limit_bytes: int, *, patience_s: float = PATIENCE_S) -> None:
        self.folder, self.limit_bytes, self.patience_s = Path(folder), limit_bytes, patience_s
        self.stats = Stats()
        self._changed = threading.Condition()  # guards what follows
        self._wanted: dict[str, _Item] = {}  # by name, in order of need: of `prefetch`, and not yet asked for
        self._kept: dict[str, int] = {}  # those of them that are here: descriptors under a shared lock
        self._busy: set[str] = set()  # those that a thread of ours looks after
        self._requests: set[Future[memoryview]] = set()  # in flight
        self._threads: list[threading.Thread] = []
        self._closed = False
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked():
            self._files()

    def path(self, address: str, size: int, sha256: str) -> Path:
        """The shard's file, whole and checked, once it is there; marks it used.

        size    bytes, as the manifest has it
        sha256  of the whole shard; "" where it is not known: then only the size is checked
        A prefetch, or another process, may delete the file to make room before the caller opens it; `open` cannot
        lose it. Raises OSError naming the shard where it cannot be fetched, or is not the expected one, and ValueError
        if it is larger than the cache.
        """
        os.close(self.open(address, size, sha256))
        return self._file(_Item(address, size, sha256))

    def open(self, address: str, size: int, sha256: str) -> int:
        """As `path`, but a descriptor to read from, which the caller closes; until then no prefetch deletes it."""
        item, began = self._checked(address, size, sha256), time.monotonic()
        while (descriptor := self._opened(item)) is None:
            # Who has waited for another's attempt does not wait as long again for its own.
            patience_s = max(self.patience_s - (time.monotonic() - began), self.patience_s / 10)
            with suppress(_NoRoom):
                descriptor = self._brought(item, patience_s, insist=True)
                if descriptor is not None:
                    break
            with self._changed:
                self._changed.wait(0.02)
        now = time.time_ns()
        os.utime(descriptor, ns=(now, now))
        with self._changed:
            self._wanted.pop(item.name, None)
            self._let_go(item.name)
            self._changed.notify_all()
        return descriptor

    def prefetch(self, items: Iterable[tuple[str, int, str]]) -> None:
        """Bring these shards, (address, size, sha256) in order of need, while the caller goes on.

        The list replaces the one before it. A shard leaves it when `path` or `open` is called for it, and is not
        deleted before, unless the cache is too small even for what is asked for now. A shard that cannot be fetched
        is tried again by `path`, which raises the error. Raises ValueError for a shard larger than the cache.
        """
        wanted = {item.name: item for item in (self._checked(*each) for each in items)}
        with self._changed:
            self._wanted = wanted
            for name in self._kept.keys() - wanted.keys():
                self._let_go(name)
            while wanted and len(self._threads) < SHARDS_AT_ONCE:
                self._threads.append(threading.Thread(target=self._work, name="shard cache", daemon=True))
                self._threads[-1].start()
            self._changed.notify_all()

    def close(self) -> None:
        """Fetch no more: what is on its way is given up, and what is on disk stays there."""
        self.prefetch([])
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            for request in self._requests:
                request.cancel()
        for thread in self._threads:
            thread.join()

    # ---- ahead of need

    def _work(self) -> None:
        """What a thread does: bring the first wanted shard that nobody fetches yet, again and again."""
        while True:
            with self._changed:
                if self._closed:
                    return
                for name in [name for name, descriptor in self._kept.items() if not os.fstat(descriptor).st_nlink]:
                    self._let_go(name)  # another process had to delete it
                first = list(self._wanted.values())[:AHEAD]
                items = [item for item in first if item.name not in self._kept and item.name not in self._busy]
                if not items:
                    self._changed.wait(1.0 if self._wanted else None)
                    continue
            pause_s = 0.05  # others fetch all of them
            try:
                if any(map(self._advance, items)):
                    continue
            except _NoRoom:
                pause_s = 0.5
            except CancelledError:  # the cache is closed, or the process ends
                return
            with self._changed:
                self._changed.wait(pause_s)

    def _advance(self, item: _Item) -> bool:
        """Bring one wanted shard, or leave it to who is fetching it: returns whether anything has changed."""
        with self._changed:
            if self._closed or item.name not in self._wanted or item.name in self._kept or item.name in self._busy:
                return False
            self._busy.add(item.name)
        descriptor = None
        try:
            descriptor = self._opened(item)
            if descriptor is None:
                descriptor = self._brought(item, self.patience_s, insist=False)
        except OSError:  # `path` tries again, and raises what it then meets
            with self._changed:
                self._wanted.pop(item.name, None)
            return True
        finally:
            with self._changed:
                self._busy.discard(item.name)
                if descriptor is not None:
                    self._kept[item.name] = descriptor
                    if item.name not in self._wanted:
                        self._let_go(item.name)
                    self._changed.notify_all()
        return descriptor is not None

    def _let_go(self, name: str) -> None:
        """The caller holds _changed."""
        if name in self._kept:
            os.close(self._kept.pop(name))

    # ---- one shard

    def _checked(self, address: str, size: int, sha256: str) -> _Item:
        if size > self.limit_bytes:
            raise ValueError(
                f"{address} has {size / 2**20:.0f} MiB, the cache in {self.folder} may hold "
                f"{self.limit_bytes / 2**20:.0f} MiB: allow it more, or make smaller shards"
            )
        return _Item(address, size, sha256)

    def _file(self, item: _Item, kind: str = "shard") -> Path:
        return self.folder / f"{item.name}.{kind}"

    def _opened(self, item: _Item) -> int | None:
        """A descriptor of a shard that is here, under a shared lock; None if it is not here."""
        try:
            descriptor = descriptor_of(self._file(item), os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        facts = os.fstat(descriptor)
        if facts.st_nlink and facts.st_size == item.size:
            return descriptor
        if facts.st_nlink:  # cut off when the machine lost its power
            self._file(item).unlink(missing_ok=True)
        os.close(descriptor)
        return None

    def _brought(self, item: _Item, patience_s: float, *, insist: bool) -> int | None:
        """Fetch a shard and open it; None if another thread or process is fetching it, or has just done so."""
        part = self._file(item, "part")
        descriptor = self._begun(item, insist)
        if descriptor is None:
            return None
        try:
            self._fetch(item, descriptor, patience_s)
            with self._locked():  # or a listing of the folder might see neither name
                part.rename(self._file(item))
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            return self._opened(item)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)

    def _begun(self, item: _Item, insist: bool) -> int | None:
        """An empty part under our lock, with room made for it; None as in `_brought`. Raises _NoRoom."""
        part = self._file(item, "part")
        with self._locked():
            descriptor = descriptor_of(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
            if not _lock(descriptor) or not _is_named(descriptor, part):
                os.close(descriptor)
                return None
            try:
                if not self._file(item).exists():
                    self._make_room(insist)
                    return descriptor
            except BaseException:
                part.unlink()
                os.close(descriptor)
                raise
            part.unlink()
            os.close(descriptor)
            return None

    def _fetch(self, item: _Item, descriptor: int, patience_s: float) -> None:
        """Write a shard into its part. One that is not the expected is fetched once more. Raises OSError."""
        for _ in range(2):
            os.ftruncate(descriptor, 0)
            os.lseek(descriptor, 0, os.SEEK_SET)
            found = hashlib.sha256()
            for content in self._contents(item, patience_s):
                found.update(content)
                _write(descriptor, content, self.folder)
                with self._changed:
                    self.stats.bytes_fetched += len(content)
            if item.sha256 in ("", found.hexdigest()):
                with self._changed:
                    self.stats.shards_fetched += 1
                return
        raise OSError(
            errno.EIO,
            f"{item.address} has the sha256 {found.hexdigest()}, expected {item.sha256}, fetched twice: it is not the "
            "shard that was written. Copy it to the store again",
        )

    def _contents(self, item: _Item, patience_s: float) -> Iterator[memoryview]:
        """The parts of a shard, in order, several requests in flight."""
        begun = deque[Future[memoryview]]()
        try:
            for offset in range(0, item.size, PART):
                size = min(PART, item.size - offset)
                with self._changed:
                    if self._closed:
                        raise CancelledError(f"the cache in {self.folder} is closed")
                    begun.append(begin_range(item.address, offset, size, file_size=item.size, patience_s=patience_s))
                    self._requests.add(begun[-1])
                if len(begun) == PARTS_AT_ONCE:
                    yield begun[0].result()
                    self._requests.discard(begun.popleft())
            while begun:
                yield begun[0].result()
                self._requests.discard(begun.popleft())
        finally:
            for request in begun:
                request.cancel()
            with self._changed:
                self._requests -= set(begun)

    # ---- the folder

    @contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = descriptor_of(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _files(self) -> list[tuple[str, int, int]]:
        """(name, bytes, when used) of shards, least recently used first, and of parts in flight, when used -1.

        A part that nobody holds was left by a killed process and is removed. The caller holds the folder's lock.
        """
        found = []
        for entry in os.scandir(self.folder):
            named = OURS.fullmatch(entry.name)
            if not named or not entry.is_file(follow_symlinks=False):
                continue
            with suppress(FileNotFoundError):  # a part becomes a shard without the folder's lock
                if named[2] == "shard":
                    found.append((entry.name, int(named[1]), entry.stat().st_mtime_ns))
                elif not self._delete(entry.name):
                    found.append((entry.name, int(named[1]), -1))
        return sorted(found, key=lambda file: file[2])

    def _make_room(self, insist: bool) -> None:
        """Delete shards until all files fit, that of a part just begun too. Raises _NoRoom.

        Shards that a process keeps for later or has open go only if the caller insists: first what this process needs
        last, then the least recently used.
        """
        files = self._files()
        excess = sum(size for _, size, _ in files) - self.limit_bytes
        sizes = {name: size for name, size, used in files if used >= 0}
        for name in list(sizes):
            if excess > 0 and self._delete(name):
                excess -= sizes.pop(name)
        if excess > 0 and insist:
            with self._changed:
                last = [f"{name}.shard" for name in reversed(self._wanted) if name in self._kept]
            for name in dict.fromkeys([*last, *sizes]):
                if excess > 0 and name in sizes:
                    with self._changed:
                        self._let_go(name.removesuffix(".shard"))
                    (self.folder / name).unlink(missing_ok=True)
                    excess -= sizes[name]
        if excess > 0:
            raise _NoRoom

    def _delete(self, name: str) -> bool:
        """Delete a file unless someone holds a lock on it; returns whether it is gone."""
        path = self.folder / name
        descriptor = descriptor_of(path, os.O_RDWR | os.O_NOFOLLOW)
        try:
            if not _lock(descriptor):
                return False
            if _is_named(descriptor, path):
                path.unlink()
            return True
        finally:
            os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Take the lock of a file for us alone, if nobody holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_named(descriptor: int, path: Path) -> bool:
    """Whether this open file is still the one at `path`: it may have been renamed or deleted before we had its lock."""
    try:
        there = path.lstat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), there)


def _write(descriptor: int, content: memoryview, folder: Path) -> None:
    try:
        while content:
            content = content[os.write(descriptor, content) :]
    except OSError as error:
        text = f"cannot write to the cache in {folder}: {error.strerror}. Free space there, or choose another folder"
        raise OSError(error.errno, text) from error
