"""Shards come from a store to the disk once, whole and checked, within the limit, whatever dies meanwhile."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline import cache as cache_module
from pipeline.cache import Cache, default_cache_folder
from tests.slow_store import SlowStore, slow_store
from tests.timed import thrice

ROOT = Path(__file__).resolve().parents[1]
SIZE = 3 << 18  # bytes of a shard, in parts of 256 KiB
Item = tuple[str, int, str]


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "PART", 1 << 18)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlowStore]:
    """12 shards of SIZE bytes, and set/big.tar of 100 MiB."""
    folder = tmp_path_factory.mktemp("store")
    (folder / "set").mkdir()
    draw = random.Random(0)
    for i in range(12):
        (folder / f"set/{i}.tar").write_bytes(draw.randbytes(SIZE))
    (folder / "set/big.tar").write_bytes(draw.randbytes(1 << 20) * 100)
    with slow_store(folder) as server:
        yield server


@pytest.fixture
def store(server: SlowStore) -> SlowStore:
    """Fast and sound again, and its counts start from 0."""
    server.kill()
    server.settings = {}
    server.start()
    return server


@pytest.fixture
def items(store: SlowStore) -> list[Item]:
    """Address, size and sha256 of the 12 shards."""
    return [item(store, f"{i}.tar") for i in range(12)]


@pytest.fixture
def new(tmp_path: Path) -> Iterator[Callable[..., Cache]]:
    """Makes caches of so many shards on one folder."""
    made: list[Cache] = []

    def make(shards: float = 100, **options: float) -> Cache:
        made.append(Cache(tmp_path / "cache", int(shards * SIZE), **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def item(store: SlowStore, name: str) -> Item:
    content = (store.folder / "set" / name).read_bytes()
    return f"{store.url}/set/{name}", len(content), hashlib.sha256(content).hexdigest()


def content(store: SlowStore, number: int) -> bytes:
    return (store.folder / f"set/{number}.tar").read_bytes()


def fetches(store: SlowStore) -> dict[int, int]:
    """How often each shard has been fetched, by the bytes that the store has sent."""
    sent = store.counts()
    return {i: sent[f"/set/{i}.tar"][1] // SIZE for i in range(12) if f"/set/{i}.tar" in sent}


def on_disk(cache: Cache, items: list[Item]) -> list[int]:
    names = {cache._checked(*each).name: i for i, each in enumerate(items)}
    return sorted(names[file.stem] for file in cache.folder.glob("*.shard") if file.stem in names)


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("not within 10 s")


# ---- what is there


def test_a_shard_is_the_store_s_and_is_there_after_a_restart(
    store: SlowStore, items: list[Item], new: Callable[..., Cache]
) -> None:
    first = new()
    for i, each in enumerate(items[:3]):
        assert first.path(*each).read_bytes() == content(store, i)
    assert (first.stats.shards_fetched, first.stats.bytes_fetched) == (3, 3 * SIZE)
    second = new()
    for i, each in enumerate(items[:3]):
        descriptor = second.open(*each)
        assert os.pread(descriptor, SIZE, 0) == content(store, i)
        os.close(descriptor)
    assert second.stats.shards_fetched == 0
    assert fetches(store) == {0: 1, 1: 1, 2: 1}


def test_another_sha256_or_size_is_another_shard(
    store: SlowStore, items: list[Item], new: Callable[..., Cache]
) -> None:
    """A shard that was written anew under its old name is fetched anew; without a sha256 the size decides."""
    cache = new()
    place, size, _ = items[0]
    old = cache.path(*items[0])
    file, before = store.folder / "set/0.tar", content(store, 0)
    try:
        file.write_bytes(content(store, 1))
        assert cache.path(place, size, items[1][2]).read_bytes() == content(store, 1)
        assert old.read_bytes() == before
        assert cache.path(place, size, "").read_bytes() == content(store, 1)
        with pytest.raises(OSError, match=rf"{place} has {size} bytes, expected {size - 1}"):
            cache.path(place, size - 1, "")
    finally:
        file.write_bytes(before)


def test_a_shard_that_is_not_the_one_written_is_fetched_twice_and_then_an_error(
    store: SlowStore, items: list[Item], new: Callable[..., Cache]
) -> None:
    cache = new()
    store.set(damage=1)
    assert cache.path(*items[0]).read_bytes() == content(store, 0)
    assert fetches(store) == {0: 2}
    wrong = "0" * 64
    with pytest.raises(OSError, match=f"{items[1][0]} has the sha256 {items[1][2]}, expected {wrong}, fetched twice"):
        cache.path(items[1][0], SIZE, wrong)
    assert fetches(store) == {0: 2, 1: 2}
    assert [file.suffix for file in cache.folder.iterdir() if file.name != "lock"] == [".shard"]


def test_what_is_not_there_or_not_permitted_is_an_error_at_once(
    store: SlowStore, items: list[Item], new: Callable[..., Cache]
) -> None:
    cache = new()
    with pytest.raises(FileNotFoundError, match=r"set/none.tar.* is not there"):
        cache.path(f"{store.url}/set/none.tar", SIZE, "")
    store.set(status=403)
    cache.prefetch(items[:1])
    with pytest.raises(PermissionError, match=f"{items[0][0]}.*403"):
        cache.path(*items[0])


def test_a_file_that_a_power_cut_has_cut_off_is_fetched_again(
    store: SlowStore, items: list[Item], new: Callable[..., Cache]
) -> None:
    os.truncate(new().path(*items[0]), SIZE // 2)
    assert new().path(*items[0]).read_bytes() == content(store, 0)


def test_the_default_folder_is_the_user_s_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert default_cache_folder() == Path("/elsewhere/swiftclr")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_folder() == Path.home() / ".cache/swiftclr"


# ---- the limit


def test_the_least_recently_used_goes_first(items: list[Item], new: Callable[..., Cache]) -> None:
    cache = new(3.5)
    for i in (0, 1, 2, 0, 3):
        cache.path(*items[i])
    assert on_disk(cache, items) == [0, 2, 3]
    cache.path(*items[4])
    assert on_disk(cache, items) == [0, 3, 4]


def test_only_its_own_files_are_deleted(items: list[Item], new: Callable[..., Cache], tmp_path: Path) -> None:
    """Neither what others put into the folder nor what a link under one of its names points to."""
    cache = new(1)
    theirs = cache.folder / "notes.shard"
    theirs.write_bytes(b"mine")
    (tmp_path / "precious").write_bytes(b"mine")
    (cache.folder / f"{'0' * 40}-4.shard").symlink_to(tmp_path / "precious")
    for each in items[:3]:
        cache.path(*each)
    assert on_disk(cache, items) == [2]
    assert theirs.read_bytes() == (tmp_path / "precious").read_bytes() == b"mine"


def test_a_shard_larger_than_the_cache_is_an_error(items: list[Item], new: Callable[..., Cache]) -> None:
    for ask in (lambda: new(0.5).path(*items[0]), lambda: new(0.5).prefetch(items)):
        with pytest.raises(ValueError, match=r"0.tar has 1 MiB, the cache in .* may hold 0 MiB: allow it more"):
            ask()


def test_an_open_file_outlives_its_name(store: SlowStore, items: list[Item], new: Callable[..., Cache]) -> None:
    cache = new(1)
    descriptor = cache.open(*items[0])
    cache.path(*items[1])
    assert on_disk(cache, items) == [1]
    assert os.pread(descriptor, SIZE, 0) == content(store, 0)
    os.close(descriptor)


def test_a_prefetch_longer_than_the_cache_waits_for_its_turn(
    store: SlowStore, items: list[Item], new: Callable[..., Cache]
) -> None:
    """Never more than the limit on disk, in flight included, and nothing is deleted before it was asked for."""
    cache = new(4)
    cache.path(*items[11])  # of an earlier epoch: it makes room
    cache.prefetch(items)
    wait_for(lambda: on_disk(cache, items) in ([0, 1, 2, 3], [0, 1, 2, 11]))
    for i, each in enumerate(items):
        with open(cache.open(*each), "rb") as file:
            assert file.read() == content(store, i)
        with cache._locked():
            assert len(list(cache.folder.glob("*-*"))) <= 4
    found = fetches(store)
    assert found.pop(11) in (1, 2)
    assert found == dict.fromkeys(range(11), 1)


def test_what_is_asked_for_now_takes_the_place_of_what_is_needed_last(
    store: SlowStore, items: list[Item], new: Callable[..., Cache]
) -> None:
    cache = new(3)
    cache.prefetch(items[:3])
    wait_for(lambda: len(cache._kept) == 3)  # on the disk, and known to be there
    assert cache.path(*items[9]).read_bytes() == content(store, 9)
    assert {0, 1} <= set(on_disk(cache, items))


def test_a_new_prefetch_replaces_the_old_one(items: list[Item], new: Callable[..., Cache]) -> None:
    cache = new(2)
    cache.prefetch(items[:2])
    wait_for(lambda: on_disk(cache, items) == [0, 1])
    cache.prefetch(items[4:6])
    wait_for(lambda: on_disk(cache, items) == [4, 5])


# ---- threads and processes

PREFETCH = """
import sys
from pipeline import cache as module
from pipeline.cache import Cache
module.PART = 1 << 18
cache = Cache(sys.argv[1], int(sys.argv[2]))
items = [(place, int(size), sha256) for place, size, sha256 in zip(*[iter(sys.argv[3:])] * 3)]
cache.prefetch(items)
"""
ASK = """
for item in items:
    cache.path(*item)
print(cache.stats.shards_fetched)
"""


def started(script: str, cache: Cache, items: list[Item]) -> "subprocess.Popen[str]":
    words = [str(cache.folder), str(cache.limit_bytes), *(str(word) for each in items for word in each)]
    script = (
        f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n{script}"  # it may be ignored here
    )
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", script, *words], cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


def test_processes_share_the_work_and_never_fetch_a_shard_twice(
    store: SlowStore, items: list[Item], new: Callable[..., Cache]
) -> None:
    store.set(mib_per_s=4)
    processes = [started(PREFETCH + ASK, new(), items) for _ in range(3)]
    fetched = [int(process.communicate(timeout=60)[0]) for process in processes]
    assert sum(fetched) == 12
    assert max(fetched) < 12
    assert fetches(store) == dict.fromkeys(range(12), 1)


def test_threads_never_fetch_a_shard_twice(store: SlowStore, items: list[Item], new: Callable[..., Cache]) -> None:
    store.set(latency_ms=20)
    cache = new()
    cache.prefetch(items)
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(cache.path(*items[5]).read_bytes())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for each in items:
        cache.path(*each)
    for thread in threads:
        thread.join()
    assert found == [content(store, 5)] * 8
    assert fetches(store) == dict.fromkeys(range(12), 1)


def test_a_process_killed_while_it_fetches_leaves_nothing_that_is_taken_for_whole(
    store: SlowStore, items: list[Item], new: Callable[..., Cache]
) -> None:
    """Another goes on at once, and what the dead one left of other shards is removed."""
    cache = new()
    store.set(mib_per_s=0.5)
    process = started(PREFETCH + ASK, cache, items[:2])
    wait_for(lambda: any(sent for _, sent in store.counts().values()))
    process.kill()
    process.communicate()
    store.kill()
    store.settings = {}
    store.start()
    assert len(list(cache.folder.glob("*.part"))) == 2
    assert not list(cache.folder.glob("*.shard"))
    start = time.monotonic()
    assert cache.path(*items[0]).read_bytes() == content(store, 0)
    assert time.monotonic() - start < 5
    assert not list(cache.folder.glob("*.part"))
    assert on_disk(cache, items) == [0]


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_program_ends_at_once_while_shards_are_on_their_way(
    store: SlowStore, items: list[Item], new: Callable[..., Cache], interrupted: bool
) -> None:
    """At its end, and at Ctrl-C while it waits for one."""
    store.set(silent=1)
    process = started(f"{PREFETCH}print('begun', flush=True)\n{ASK if interrupted else ''}", new(), items)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.3)
    start = time.monotonic()
    if interrupted:
        process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=20)[1]
    assert time.monotonic() - start < 5
    assert process.returncode == (-signal.SIGINT if interrupted else 0), said
    assert said.strip().rpartition("\n")[2] == ("KeyboardInterrupt" if interrupted else "")


# ---- a store in trouble


def test_nothing_is_lost_when_the_store_dies_and_comes_back(
    store: SlowStore, items: list[Item], new: Callable[..., Cache]
) -> None:
    """In the middle of shards that are fetched ahead and of one that is waited for."""
    store.set(mib_per_s=2)
    cache = new(patience_s=30)
    cache.prefetch(items[:4])
    wait_for(lambda: any(map(os.path.getsize, cache.folder.glob("*.part"))))
    store.kill()
    store.settings = {}
    threading.Timer(1.0, store.start).start()
    for i, each in enumerate(items[:4]):
        assert cache.path(*each).read_bytes() == content(store, i)
    assert cache.stats.shards_fetched == 4


@pytest.mark.parametrize(
    ("trouble", "complaint"),
    [("dead", "Connection refused"), ("silent", "no answer"), ("status", "503 Service Unavailable")],
)
def test_a_store_that_is_gone_for_longer_is_an_error_naming_it_after_the_stated_time(
    store: SlowStore, items: list[Item], new: Callable[..., Cache], trouble: str, complaint: str
) -> None:
    """Whether it refuses, takes requests and says nothing, or is out of order; fetched ahead of need or not."""
    if trouble == "dead":
        store.kill()
    else:
        store.set(**{trouble: 503})
    cache = new(patience_s=1.5)
    for ahead in ([], items[:1]):
        cache.prefetch(ahead)
        start = time.monotonic()
        with pytest.raises(OSError, match=rf"{items[0][0]}, .* tried for .* s, .*{complaint}.*Check the address"):
            cache.path(*items[0])
        assert 1.4 < time.monotonic() - start < 3
    assert not list(cache.folder.glob("*.part"))


@thrice
def test_parts_in_parallel_hide_the_latency(tmp_path: Path, store: SlowStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The 13 parts of 100 MiB at 0.4 s a request: one by one they take 5 s."""
    monkeypatch.undo()
    store.set(latency_ms=400)
    cache = Cache(tmp_path / f"{time.monotonic_ns()}", 200 << 20)
    big = item(store, "big.tar")
    start = time.monotonic()
    cache.path(*big)
    assert time.monotonic() - start < 2.6
