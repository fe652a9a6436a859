"""The reader gives the bytes and labels that tarfile finds, for any numbers of samples, and names what is damaged."""

import contextlib
import errno
import gc
import io
import itertools
import os
import re
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import pipeline.reader
from pipeline.images import ppm
from pipeline.index import index_tars
from pipeline.reader import READERS, DamagedError, Reader, ahead
from pipeline.shards import Dataset, DatasetError, Sample, read_dataset, split_name
from pipeline.write import write_shards
from tests.test_sources import make_tar

Stored = tuple[str, int | None, bytes]  # key, label, image
NUM, CLASSES = 24, 12


def pixels(i: int, height: int = 6, width: int = 4) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (height, width, 3), np.uint8)


def png(i: int) -> bytes:
    """Noise of another size for every i."""
    file = io.BytesIO()
    Image.fromarray(pixels(i, 4 + i % 5, 3 + i % 7)).save(file, "PNG")
    return file.getvalue()


def bare(i: int) -> bytes:
    return ppm(pixels(i).tobytes(), 6, 4)


def written(out: Path, image: Callable[[int], bytes] = png, *, labelled: bool = True, size: int = 6) -> Dataset:
    """Samples in shards of `size`; labels of one digit and of two."""
    samples = [Sample(f"{i}.x", i % CLASSES if labelled else None, image(i)) for i in range(NUM)]
    classes = [f"class {i}" for i in range(CLASSES)] if labelled else None
    return write_shards(samples, out / "set", classes=classes, shard_size=size)


def foreign(out: Path, image: Callable[[int], bytes] = png, extension: str = "png", **options: Any) -> Dataset:
    """Three tars whose images come before their labels."""
    (out / "tars").mkdir()
    for shard in range(3):
        entries = []
        for i in range(8 * shard, 8 * shard + 8):
            entries.append((f"k{i}.{extension}", image(i)))
            entries += [(f"k{i}.other.png", b"no image" * i)] if "." in extension else []
            entries.append((f"k{i}.cls", blanks(i)))
        make_tar(out / f"tars/{shard}.tar", entries)
    return index_tars([out / "tars"], out / "set", **options)


def blanks(i: int) -> bytes:
    """A label, as others write it."""
    return (b"%d", b" %d", b"%d\n", b"\t  %d \r\n", b"00%d", b"%d" + 12 * b" ")[i % 6] % (i % CLASSES)


SETS: dict[str, Callable[[Path], Dataset]] = {
    "PNG": written,
    "PNG without labels": lambda out: written(out, labelled=False),
    "pixels": lambda out: written(out, bare),
    "pixels without labels": lambda out: written(out, bare, labelled=False),
    "foreign": foreign,
    "foreign, labels passed over": lambda out: foreign(out, labels=False),
    "foreign pixels": lambda out: foreign(out, bare, "ppm", verify=True),
    "extension of two parts": lambda out: foreign(out, extension="left.png", image_member="left.png"),
}


def by_tarfile(dataset: Dataset) -> list[Stored]:
    """Every sample, in order: of the members of one key that of `cls`, and the first one else."""
    found: list[Stored] = []
    for path in dataset.tars:
        members = []
        with tarfile.open(path) as tar:
            for member in tar:
                file, parts = tar.extractfile(member), split_name(member.name)
                assert file is not None
                assert parts is not None
                members.append((*parts, file.read()))
        for key, group in itertools.groupby(members, lambda member: member[0]):
            contents = [(extension, content) for _, extension, content in group]
            label = int(dict(contents)["cls"]) if dataset.labelled else None
            found.append((key, label, next(content for extension, content in contents if extension != "cls")))
    return found


def check(reader: Reader, stored: list[Stored], numbers: Any) -> None:
    """`read` and `labels` give what is stored, for these numbers."""
    samples = np.asarray(numbers, np.int64)
    encoded = reader.read(samples)
    np.testing.assert_array_equal(encoded.samples, samples)
    wanted = [stored[i][2] for i in samples]
    if reader.dataset.raw:
        assert isinstance(encoded.images, np.ndarray)
        decoded = np.stack([np.asarray(Image.open(io.BytesIO(image))) for image in wanted])
        np.testing.assert_array_equal(encoded.images, decoded)
        assert encoded.images.dtype == np.uint8
    else:
        assert [bytes(image) for image in encoded.images] == wanted
    if not reader.dataset.labelled:
        assert encoded.labels is None
        return
    assert encoded.labels is not None
    assert encoded.labels.dtype == np.int64
    assert encoded.labels.tolist() == reader.labels(samples).tolist() == [stored[i][1] for i in samples]


# ---- what is whole


@pytest.mark.parametrize("kind", SETS)
def test_any_numbers_in_any_order_give_what_tarfile_finds(tmp_path: Path, kind: str) -> None:
    """One, all, all backwards, and random ones with repeats, also where the indexes have only been read in part."""
    dataset = SETS[kind](tmp_path)
    assert (dataset.samples, bool(dataset.raw)) == (NUM, "pixels" in kind)
    stored, rng = by_tarfile(dataset), np.random.default_rng(0)
    for numbers in (
        [NUM - 1],
        range(NUM),
        range(NUM)[::-1],
        *(rng.integers(0, NUM, 3 * NUM) for _ in range(3)),
        [7, 7],
    ):
        check(Reader(dataset), stored, numbers)
    reader = Reader(dataset)
    for size in (1, 2, 3, 50, 7):
        check(reader, stored, rng.integers(0, NUM, size))
    assert [reader.where(i)[1] for i in range(NUM)] == [key for key, _, _ in stored]


def test_labels_of_a_set_without_any_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="has no labels"):
        Reader(written(tmp_path, labelled=False)).labels(np.arange(2))


def test_a_large_batch_is_split_over_threads_and_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """29 MiB are read by all threads, and what is less than 8 MiB by none but the caller's."""
    samples = [Sample(f"{i}.x", i, ppm(pixels(i, 400, 400).tobytes(), 400, 400)) for i in range(12)]
    dataset = write_shards(samples, tmp_path / "set", classes=list(map(str, range(12))), shard_size=4)
    stored, threads, preadv = by_tarfile(dataset), set[str](), os.preadv

    def noting(*arguments: Any) -> int:
        if (name := threading.current_thread().name) not in threads:
            threads.add(name)
            time.sleep(0.1)  # so that no thread has done another's part before that starts
        return preadv(*arguments)

    monkeypatch.setattr(os, "preadv", noting)
    reader = Reader(dataset)
    reader.read(np.arange(12))
    assert threads == {threading.current_thread().name}
    threads.clear()
    numbers = np.random.default_rng(0).integers(0, 12, 64)
    assert sum(len(stored[i][2]) for i in numbers) > 29 * 2**20
    check(reader, stored, numbers)
    assert len([name for name in threads if name.startswith("reader")]) == READERS


def open_tars(folder: Path) -> int:
    """Tars below `folder` that this process holds open."""
    found = 0
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            file = link.readlink()
            found += file.is_relative_to(folder) and file.suffix == ".tar"
    return found


@pytest.mark.parametrize("threads", [1, READERS])
def test_few_tars_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """Of twelve shards two, and beside them at most the one that each reading thread holds; none when all is over."""
    dataset = written(tmp_path, size=2)
    assert len(dataset.shards) > 10
    stored, most, preadv = by_tarfile(dataset), list[int](), os.preadv

    def counting(*arguments: Any) -> int:
        most.append(open_tars(tmp_path))
        return preadv(*arguments)

    monkeypatch.setattr(pipeline.reader, "MAX_OPEN", 2)
    monkeypatch.setattr(pipeline.reader, "PART", 2**23 if threads == 1 else 100)
    monkeypatch.setattr(os, "preadv", counting)
    reader = Reader(dataset, again=True)
    for seed in range(5):
        check(reader, stored, np.random.default_rng(seed).integers(0, NUM, 40))
        assert open_tars(tmp_path) <= 2
    assert max(most) <= (2 if threads == 1 else 2 + threads)
    del reader
    gc.collect()
    assert open_tars(tmp_path) == 0


def test_several_threads_may_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While tars are closed under their hands, and from the first index on."""
    dataset = written(tmp_path, size=2)
    stored = by_tarfile(dataset)
    monkeypatch.setattr(pipeline.reader, "MAX_OPEN", 2)
    for _ in range(5):
        reader = Reader(dataset)

        def work(seed: int, reader: Reader = reader) -> None:
            rng = np.random.default_rng(seed)
            for _ in range(10):
                check(reader, stored, rng.integers(0, NUM, 20))

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))


# ---- what is damaged


def place(dataset: Dataset, sample: int, cls: bool) -> tuple[Path, int, int]:
    """(tar, offset, size) of the label or image of a sample, by tarfile."""
    found = []
    for path in map(Path, dataset.tars):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".cls") == cls:
                    found.append((path, member.offset_data, member.size))
    return found[sample]


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def of_shard(dataset: Dataset, shard: int) -> set[int]:
    first = sum(each.samples for each in dataset.shards[:shard])
    return set(range(first, first + dataset.shards[shard].samples))


Damaged = tuple[set[int], str]  # the numbers of the samples, and a pattern of the problem


def cut_off(dataset: Dataset) -> Damaged:
    """In the middle of sample 7's image, the second of its shard."""
    tar, offset, size = place(dataset, 7, cls=False)
    os.truncate(tar, offset + size // 2)
    return of_shard(dataset, 1) - {6}, r"is cut off: \d+ of its \d+ bytes are there"


def cut_off_before(dataset: Dataset) -> Damaged:
    cut_off(dataset)
    return of_shard(dataset, 1), r"cannot be read: its shard has \d+ bytes, expected \d+"


def removed(dataset: Dataset) -> Damaged:
    Path(dataset.tars[2]).unlink()
    return of_shard(dataset, 2), r"cannot be read \(No such file or directory\)"


def made_a_folder(dataset: Dataset) -> Damaged:
    Path(dataset.tars[2]).unlink()
    Path(dataset.tars[2]).mkdir()
    return of_shard(dataset, 2), r"cannot be read \(Is a directory\)"


def replaced_by_a_longer_one(dataset: Dataset) -> Damaged:
    tar = Path(dataset.tars[0])
    other = tar.with_name("other")
    other.write_bytes(tar.read_bytes() + bytes(10240))
    other.replace(tar)
    size = dataset.shards[0].bytes
    return of_shard(dataset, 0), f"cannot be read: its shard has {size + 10240} bytes, expected {size}"


def no_number(dataset: Dataset) -> Damaged:
    tar, offset, size = place(dataset, 8, cls=True)
    overwrite(tar, offset, b"x" * size)
    return {8}, r"has the label b'x+', expected a number from 0 to 11"


def negative(dataset: Dataset) -> Damaged:
    sample = next(i for i, (_, label, _) in enumerate(by_tarfile(dataset)) if label == 10)
    tar, offset, _ = place(dataset, sample, cls=True)
    overwrite(tar, offset, b"-1")
    return {sample}, r"has the label b'-1', expected a number from 0 to 11"


def outside_the_classes(dataset: Dataset) -> Damaged:
    """The first label that is none any more, 12, and others that are."""
    labels = [label for _, label, _ in by_tarfile(dataset)]
    wrong = [i for i, label in enumerate(labels) if label in (10, 11)]
    for i in wrong:
        tar, offset, _ = place(dataset, i, cls=True)
        overwrite(tar, offset, b"12")
    return set(wrong), r"has the label b'12', expected a number from 0 to 11"


def all_blank(dataset: Dataset) -> Damaged:
    tar, offset, size = place(dataset, 3, cls=True)
    overwrite(tar, offset, b" " * size)
    return {3}, r"has the label b' +', expected a number from 0 to 11"


BEFORE = cut_off_before, removed, made_a_folder, replaced_by_a_longer_one  # damages that are met when a tar is opened
WITHIN = cut_off, no_number, negative, outside_the_classes, all_blank


def meet(reader: Reader, stored: list[Stored], damaged: Damaged, files: list[str]) -> None:
    """What is damaged is named, exactly, and the rest is read as ever."""
    wrong, problem = damaged
    numbers = np.random.default_rng(0).permutation(np.repeat(np.arange(NUM), 2))
    with pytest.raises(DamagedError) as caught:
        reader.read(numbers)
    assert caught.value.faults.keys() == wrong
    assert all(type(sample) is int for sample in caught.value.faults)
    for sample, told in caught.value.faults.items():
        assert re.fullmatch(problem, told), told
        assert reader.describe(sample, told) == f"{files[sample]}:{stored[sample][0]} {told}"
        with pytest.raises(DamagedError) as again:
            reader.read(np.array([sample]))
        assert again.value.faults == {sample: told}
    check(reader, stored, [i for i in numbers if i not in wrong])


@pytest.mark.parametrize("image", [png, bare])
@pytest.mark.parametrize("damage", [*BEFORE, *WITHIN], ids=lambda each: each.__name__)
def test_damage_is_named_by_number_shard_and_key(tmp_path: Path, damage: Any, image: Any) -> None:
    """All samples of a tar that is another one, those behind a cut, or the one that lies in the damage."""
    dataset = written(tmp_path, image)
    stored, reader = by_tarfile(dataset), Reader(dataset)
    files = [shard.file for shard in dataset.shards for _ in range(shard.samples)]
    if damage not in BEFORE:
        check(reader, stored, range(NUM))  # opens all tars
    meet(reader, stored, damage(dataset), files)


@pytest.mark.parametrize("damage", [removed, replaced_by_a_longer_one], ids=lambda each: each.__name__)
def test_a_tar_that_is_open_stays_as_it_was_opened(tmp_path: Path, damage: Any) -> None:
    dataset = written(tmp_path)
    stored, reader = by_tarfile(dataset), Reader(dataset)
    check(reader, stored, range(NUM))
    damage(dataset)
    check(reader, stored, range(NUM))


@pytest.mark.parametrize("damage", [cut_off_before, removed, no_number, outside_the_classes])
def test_labels_read_alone_meet_the_same_damage(tmp_path: Path, damage: Any) -> None:
    dataset = written(tmp_path)
    wrong, _ = damage(dataset)
    reader = Reader(dataset)
    with pytest.raises(DamagedError) as of_labels:
        reader.labels(np.arange(NUM))
    with pytest.raises(DamagedError) as of_all:
        reader.read(np.arange(NUM))
    assert of_labels.value.faults == of_all.value.faults
    assert of_labels.value.faults.keys() == wrong


@pytest.mark.parametrize("header", [b"P5", b"P6\n6 4", b"p6"])
def test_a_ppm_with_another_header_is_damaged(tmp_path: Path, header: bytes) -> None:
    """Of other pixels, turned, or none; the labels beside are sound."""
    dataset = written(tmp_path, bare)
    stored, reader = by_tarfile(dataset), Reader(dataset)
    files = [shard.file for shard in dataset.shards for _ in range(shard.samples)]
    for sample in (4, 17):
        tar, offset, _ = place(dataset, sample, cls=False)
        overwrite(tar, offset, header)
    labels = reader.labels(np.arange(NUM)).tolist()
    assert labels == [label for _, label, _ in stored]
    meet(reader, stored, ({4, 17}, "is no PPM of 4x6 pixels"), files)


def test_several_damages_of_one_batch_are_all_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where threads share the batch."""
    monkeypatch.setattr(pipeline.reader, "PART", 500)
    dataset = written(tmp_path)
    damages = [all_blank(dataset), cut_off_before(dataset), removed(dataset)]
    with pytest.raises(DamagedError) as caught:
        Reader(dataset).read(np.arange(NUM)[::-1])
    assert caught.value.faults.keys() == set.union(*(wrong for wrong, _ in damages))


def test_what_may_pass_costs_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the disk is not the sample's: it says which file it met, and the next attempt may go well."""
    dataset = written(tmp_path)
    reader, stored = Reader(dataset), by_tarfile(dataset)

    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        with pytest.raises(OSError, match="Input/output error") as caught:
            reader.read(np.array([0]))
    assert caught.value.filename == dataset.tars[0]
    check(reader, stored, range(NUM))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.replace(b"png ", b"png 5", 1), "is stale"),
        (lambda index: index[:-40], "stale|truncated"),
        (lambda _: b"", "is empty"),
        (lambda index: index.replace(b"v1.2 6", b"v1.2 5"), "starts with"),
    ],
)
def test_an_index_that_changed_after_the_data_set_was_opened_is_named(
    tmp_path: Path, change: Callable[[bytes], bytes], message: str
) -> None:
    """The other shards can be read, and this one when its index is back."""
    dataset = read_dataset(written(tmp_path).root)
    stored, reader, index = by_tarfile(dataset), Reader(dataset), Path(dataset.indexes[1])
    before = index.read_bytes()
    index.write_bytes(change(before))
    for numbers in ([7], range(NUM)):
        with pytest.raises(DatasetError, match=f"{index.name} .*({message}).*Copy the data set again"):
            reader.read(np.array(numbers))
    check(reader, stored, [i for i in range(NUM) if i not in of_shard(dataset, 1)])
    index.write_bytes(before)
    check(reader, stored, range(NUM))


# ---- ahead of need


def eventually(fact: Callable[[], bool]) -> bool:
    end = time.monotonic() + 10
    while not fact() and time.monotonic() < end:
        time.sleep(0.005)
    return fact()


@pytest.fixture
def working() -> Iterator[Callable[[], int]]:
    """How many threads of this test read ahead; in the end none may."""
    before = set(threading.enumerate())

    def count() -> int:
        return sum(each.name.startswith("ahead") for each in set(threading.enumerate()) - before)

    yield count
    assert eventually(lambda: not count())


@pytest.mark.parametrize("depth", [0, 1, 3, 100])
@pytest.mark.parametrize("num", [0, 1, 2, 10])
@pytest.mark.usefixtures("working")
def test_results_come_in_the_order_of_their_tasks(depth: int, num: int) -> None:
    """Of tasks that take longer and shorter, each on the one thread."""
    threads = set()

    def task(i: int) -> int:
        threads.add(threading.current_thread())
        time.sleep(0.002 * (i % 3 == 0))
        return i

    assert list(ahead((lambda i=i: task(i) for i in range(num)), depth)) == list(range(num))
    assert len(threads) == min(1, num)
    assert threading.current_thread() not in threads


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.usefixtures("working")
def test_no_more_tasks_than_asked_for_are_begun_before_their_time(depth: int) -> None:
    """With the i-th result, i + 1 + depth tasks are begun, and no more are even looked at."""
    begun, looked_at = list[int](), list[int]()

    def tasks() -> Iterator[Callable[[], int]]:
        for i in itertools.count():
            looked_at.append(i)
            yield lambda i=i: begun.append(i) or i  # type: ignore[func-returns-value,misc]

    results = ahead(tasks(), depth)
    assert begun == looked_at == []
    for i in range(5):
        assert next(results) == i
        assert eventually(lambda i=i: len(begun) == i + 1 + depth)
        time.sleep(0.02)
        assert begun == looked_at == list(range(i + 1 + depth))
    results.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("depth", [0, 2, 10])
@pytest.mark.usefixtures("working")
def test_an_exception_comes_in_its_place_and_nothing_after_it(depth: int) -> None:
    def task(i: int) -> int:
        if i == 3:
            raise DamagedError({i: "is broken"})
        return i

    results = ahead((lambda i=i: task(i) for i in range(6)), depth)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DamagedError, match="is broken"):
        next(results)
    assert list(results) == []


@pytest.mark.parametrize("how", ["closed", "forgotten", "failed"])
def test_the_thread_ends_with_the_generator(working: Callable[[], int], how: str) -> None:
    """At once, though a task is still at work; those that wait for it are not begun."""
    go, begun = threading.Event(), list[int]()

    def task(i: int) -> int:
        begun.append(i)
        if i == 1 and how == "failed":
            raise ValueError
        if i == 2:
            go.wait(10)
        return i

    results = ahead((lambda i=i: task(i) for i in itertools.count()), 4)
    assert next(results) == 0
    assert eventually(lambda: 2 in begun)
    assert working() == 1
    start = time.monotonic()
    if how == "closed":
        results.close()  # type: ignore[attr-defined]
    elif how == "forgotten":
        del results
        gc.collect()
    else:
        with pytest.raises(ValueError):  # noqa: PT011
            next(results)
    assert time.monotonic() - start < 5
    go.set()
    assert eventually(lambda: not working())
    assert begun == [0, 1, 2]
