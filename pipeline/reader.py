"""The bytes of samples: from their numbers to encoded images and labels, ahead of need.

A sample is one read: the index says where its label and image lie, side by side in a tar, and `os.preadv` puts both
into memory that the whole batch shares. Tars are opened as they are needed, at most MAX_OPEN at a time. Of a data set
in object storage samples are read by ranges, or from whole shards that a cache holds on disk (pipeline/cache.py).

Files in the page cache, two cores of an AMD EPYC, CPU time a sample: 15 us for 3 KB and 67 us for 110 KB; DALI's
WebDataset reader takes 18 and 75.
"""

import math
import os
import resource
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.images import ppm_header
from pipeline.order import Numbers
from pipeline.shards import BLOCK, NOT_THERE, Dataset, DatasetError, content_fault, members
from pipeline.store import is_remote, read_ranges
from tools.files import open_binary

if TYPE_CHECKING:
    from pipeline.cache import Cache

Bytes = NDArray[np.uint8]
MAX_OPEN = 256  # tars of a reader, and a quarter of the files that the process may open at most
READERS = 4  # threads that read parts of a batch, where it is large: a disk in a network answers many at a time
REQUESTS = 16  # at a time, where every shard is one
PART = 1 << 23  # bytes of a batch that are worth a thread
MOST_KEPT = 1 << 30  # bytes of bare pixels
DIGITS = 9  # of a label at most


@dataclass(frozen=True)
class Encoded:
    """n samples as they are stored: what a graph takes."""

    samples: Numbers  # (n,)
    images: list[Bytes] | Bytes  # n encoded images, or pixels (n, H, W, 3) where they lie bare
    labels: Numbers | None  # (n,), None where the data set has none


class DamagedError(Exception):
    """Some samples of a batch cannot be used: what is wrong with each, by its number."""

    def __init__(self, faults: dict[int, str]) -> None:
        super().__init__(str(faults))
        self.faults = faults


class StalledError(Exception):
    """Nothing came in the time that was given."""


class _Kept:
    """The pixels and labels of a data set in memory, filled shard by shard."""

    def __init__(self, dataset: Dataset) -> None:
        assert dataset.raw
        self.shards = [False] * len(dataset.shards)  # that are here
        self.filling = threading.Lock()
        self.faults: dict[int, str] = {}
        self._pixels = np.empty((dataset.samples, *dataset.raw, 3), np.uint8)
        self._labels = np.empty(dataset.samples, np.int64) if dataset.labelled else None

    def put(self, batch: Encoded) -> None:
        self._pixels[batch.samples] = batch.images
        if self._labels is not None and batch.labels is not None:
            self._labels[batch.samples] = batch.labels

    def read(self, samples: Numbers) -> Encoded:
        if self.faults and (faults := {n: self.faults[n] for n in samples.tolist() if n in self.faults}):
            raise DamagedError(faults)
        return Encoded(samples, self._pixels[samples], None if self._labels is None else self._labels[samples])


class Reader:
    """Reads the samples of a data set, which are counted in the order of its shards. For use in several threads."""

    def __init__(self, dataset: Dataset, cache: "Cache | None" = None, *, again: bool = False) -> None:
        """
        cache  where whole shards of object storage are kept; None reads ranges of them
        again  samples will be read again and again, in any order: many tars stay open, and bare pixels that fit in
               MOST_KEPT in memory, for at 32 pixels Python's time for each read is a tenth of what all the rest takes
        """
        self.dataset, self.cache = dataset, cache
        self._tars = dataset.tars
        self._kept: _Kept | None = None
        self._by_ranges = is_remote(self._tars[0]) and not cache
        self._starts = np.concatenate([[0], np.cumsum([shard.samples for shard in dataset.shards], dtype=np.int64)])
        self._located = np.zeros(len(dataset.shards), bool)
        # Of each sample: where it begins in its tar, and where in it label and image are. Filled shard by shard, so
        # that of a subset, or in the first window of many, only what is used takes memory: 32 bytes a sample.
        self._start = np.empty(dataset.samples, np.int64)
        self._label, self._image = (np.empty((dataset.samples, 2), np.int32) for _ in range(2))  # offset, size
        self._locating = threading.Lock()
        if (
            again
            and dataset.raw
            and not is_remote(self._tars[0])
            and 3 * math.prod(dataset.raw) * dataset.samples <= MOST_KEPT
        ):
            self._kept = _Kept(dataset)
        self._open: OrderedDict[int, BinaryIO] = OrderedDict()
        self._opening = threading.Lock()
        self._busy: dict[int, int] = {}  # by thread, the shard that it waits for
        self._most_open = min(MAX_OPEN if again else READERS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
        self._pool = ThreadPoolExecutor(REQUESTS if self._by_ranges else READERS, "reader")

    def shards(self, samples: Numbers) -> Numbers:
        """The shard of each sample."""
        return np.searchsorted(self._starts, samples, "right") - 1

    def where(self, sample: int) -> tuple[str, str]:
        """The file of its shard, and its key."""
        shard = int(self.shards(np.array([sample]))[0])
        (index,) = self.dataset.index_contents([shard])
        number = 1 + sample - int(self._starts[shard])
        try:
            return self.dataset.shards[shard].file, members(index.decode("ascii").split("\n")[number])[0].key
        except ValueError as error:
            place = f"line {number + 1} of {self.dataset.index(self.dataset.shards[shard])}"
            raise DatasetError(f"{place} is malformed: {error}") from error

    def describe(self, sample: int, problem: str) -> str:
        """What is wrong with a sample, by its shard and key."""
        shard, key = self.where(sample)
        return f"{shard}:{key} {problem}"

    def file(self, shard: int) -> tuple[str, int, str]:
        """Address, bytes and sha256 of a tar."""
        return self._tars[shard], self.dataset.shards[shard].bytes, self.dataset.shards[shard].sha256

    def busy(self) -> list[str]:
        """Where the tars or indexes lie that are being read at this moment."""
        return [self._tars[shard] for shard in sorted(set(self._busy.values()))]

    @contextmanager
    def _at(self, shard: int) -> Iterator[None]:
        self._busy[threading.get_ident()] = shard
        try:
            yield
        finally:
            del self._busy[threading.get_ident()]

    def keep(self, shards: Sequence[int]) -> list[int]:
        """Close all tars but those of these shards, so that a cache may delete them; returns which are not open yet."""
        with self._opening:
            for shard in self._open.keys() - set(shards):
                del self._open[shard]
            return [shard for shard in dict.fromkeys(shards) if shard not in self._open]

    def read(self, samples: Numbers) -> Encoded:
        """Raises DamagedError for samples that are not there, whole and with a label of a class; OSError, DatasetError.

        Whether an image decodes is only known to who decodes it.
        """
        if not self._kept:
            return self._read(samples)
        with self._kept.filling:
            for shard in np.unique(self.shards(samples)).tolist():
                if not self._kept.shards[shard]:
                    self._keep_pixels(self._kept, shard)
        return self._kept.read(samples)

    def _keep_pixels(self, kept: "_Kept", shard: int) -> None:
        samples = np.arange(self._starts[shard], self._starts[shard + 1])
        try:
            kept.put(self._read(samples))
        except DamagedError as error:
            kept.faults |= error.faults
            sound = samples[~np.isin(samples, list(error.faults))]
            if len(sound):
                kept.put(self._read(sound))
        kept.shards[shard] = True

    def _read(self, samples: Numbers) -> Encoded:
        shards, faults = self.shards(samples), dict[int, str]()
        self._locate(shards)
        extent = self._extent(samples)
        ends = np.cumsum(extent)
        begins = ends - extent
        memory = np.empty(ends[-1], np.uint8)
        rows = [memory.data[a:b] for a, b in zip(begins.tolist(), ends.tolist(), strict=True)]
        self._fill(samples, shards, self._start[samples], rows, faults)
        images = self._images(samples, memory, begins, faults)
        labels = self._labels(samples, memory, begins, faults) if self.dataset.labelled else None
        if faults:
            raise DamagedError(faults)
        return Encoded(samples, images, labels)

    def labels(self, samples: Numbers) -> Numbers:
        """The label of each sample, read alone. Raises as `read`, or DatasetError where there are no labels."""
        if not self.dataset.labelled:
            raise DatasetError(f"{self.dataset.address} has no labels; make its shards of labelled images")
        shards, faults = self.shards(samples), dict[int, str]()
        self._locate(shards)
        sizes = self._label[samples, 1]
        begins = np.cumsum(sizes) - sizes
        memory = np.empty(int(sizes.sum()), np.uint8)
        rows = [memory.data[a : a + n] for a, n in zip(begins.tolist(), sizes.tolist(), strict=True)]
        self._fill(samples, shards, self._start[samples] + self._label[samples, 0], rows, faults)
        labels = self._labels(samples, memory, begins - self._label[samples, 0], faults)
        if faults:
            raise DamagedError(faults)
        return labels

    def _extent(self, samples: Numbers) -> Numbers:
        """Bytes from the start of each sample to its end."""
        ends = self._image[samples].sum(1, dtype=np.int64)
        return np.maximum(ends, self._label[samples].sum(1)) if self.dataset.labelled else ends

    # ---- where they lie

    def _locate(self, shards: Numbers) -> None:
        """Read the indexes of these shards, of those that have not been read."""
        with self._locating:
            new = [shard for shard in np.unique(shards).tolist() if not self._located[shard]]
            if not new:
                return
            with self._at(new[0]):
                contents = self.dataset.index_contents(new)
            for shard, content in zip(new, contents, strict=True):
                told = self.dataset.shards[shard]
                if fault := content_fault(self._tars[shard], self.dataset.index(told), told, None, content):
                    raise DatasetError(f"{fault}. Copy the data set again")
                self._place(shard, content)
                self._located[shard] = True

    def _place(self, shard: int, index: bytes) -> None:
        """Lines EXTENSION OFFSET SIZE NAME, for the label and the image; taken apart at once, for speed."""
        here, words = slice(self._starts[shard], self._starts[shard + 1]), index.split()[2:]
        each, told = 8 if self.dataset.labelled else 4, self.dataset.shards[shard]
        count, file = told.samples, self.dataset.index(told)
        if len(words) != each * count:
            raise DatasetError(f"{file} has {len(words)} words for {count} samples, expected {each} for each")
        try:
            numbers = np.fromstring(b" ".join(words[1::4] + words[2::4]), np.int64, sep=" ")
        except ValueError as error:
            raise DatasetError(f"{file} is malformed: an offset or a size is no whole number") from error
        offset, size = numbers.reshape(2, count, each // 4)
        first, ends = offset.min(1), (offset + size).max(1)
        if first.min() < BLOCK or size.min() < 0 or ends.max() > told.bytes:
            raise DatasetError(f"{file} names bytes that {self._tars[shard]} does not have")
        if (ends - first).max() >= 2**31:
            raise DatasetError(f"{file}: label and image of a sample lie 2 GiB apart")
        self._start[here] = first
        image = np.zeros(count, np.intp)
        if self.dataset.labelled:
            image = np.array([extension == b"cls" for extension in words[::8]]).astype(np.intp)
            at = np.arange(count), 1 - image
            self._label[here] = np.stack([offset[at] - first, size[at]], 1)
        at = np.arange(count), image
        self._image[here] = np.stack([offset[at] - first, size[at]], 1)

    # ---- bytes

    def _fill(
        self, samples: Numbers, shards: Numbers, places: Numbers, rows: Sequence[memoryview], faults: dict[int, str]
    ) -> None:
        """Read each row from its place in its tar, in the order in which they lie there."""
        order = np.lexsort((places, shards))
        filled = np.cumsum([len(rows[i]) for i in order.tolist()])
        num = int(min(READERS, filled[-1] // PART + 1))
        parts = np.split(order, np.searchsorted(filled, filled[-1] // num * np.arange(1, num), "right"))
        if self._by_ranges:  # each shard of a part is a request, and takes long
            parts = [of_shard for part in parts for of_shard in self._by_shard(part, shards)]

        def fill(part: NDArray[np.intp]) -> None:
            for of_shard in self._by_shard(part, shards):
                shard, here = int(shards[of_shard[0]]), [rows[i] for i in of_shard.tolist()]
                with self._at(shard):
                    fault = self._fill_from(shard, samples[of_shard].tolist(), places[of_shard].tolist(), here)
                faults.update(fault)

        if len(parts) == 1:
            fill(parts[0])
        else:
            list(self._pool.map(fill, parts))

    @staticmethod
    def _by_shard(part: NDArray[np.intp], shards: Numbers) -> list[NDArray[np.intp]]:
        return [same for same in np.split(part, np.flatnonzero(np.diff(shards[part])) + 1) if len(same)]

    def _fill_from(
        self, shard: int, samples: list[int], places: list[int], rows: Sequence[memoryview]
    ) -> dict[int, str]:
        """Read the rows from one tar; what is wrong with samples, by their numbers."""
        if self._by_ranges:
            try:
                contents = read_ranges(self._tars[shard], places, [len(row) for row in rows])
            except FileNotFoundError:
                return dict.fromkeys(samples, "cannot be read: its shard is not there")
            for row, content in zip(rows, contents, strict=True):
                row[:] = content
            return {}
        file = self._file(shard)
        if isinstance(file, str):
            return dict.fromkeys(samples, file)
        number, faults = file.fileno(), {}
        for sample, place, row in zip(samples, places, rows, strict=True):
            try:
                got = os.preadv(number, [row], place)
            except OSError as error:
                raise OSError(error.errno, error.strerror, self._tars[shard]) from error
            if got != len(row):
                faults[sample] = f"is cut off: {got} of its {len(row)} bytes are there"
        return faults

    def _file(self, shard: int) -> BinaryIO | str:
        """The open tar, or what is wrong with it. It is closed when nobody holds it any more."""
        with self._opening:
            if file := self._open.get(shard):
                self._open.move_to_end(shard)
                return file
        told = self.dataset.shards[shard]
        try:
            place = self.cache.open(*self.file(shard)) if self.cache else self._tars[shard]
            file = open(place, "rb") if isinstance(place, int) else open_binary(place)  # noqa: SIM115
        except OSError as error:
            if error.errno not in NOT_THERE:
                raise
            return f"cannot be read ({error.strerror})"
        size = os.fstat(file.fileno()).st_size
        if size != told.bytes:
            return f"cannot be read: its shard has {size} bytes, expected {told.bytes}"
        with self._opening:
            self._open[shard] = file
            if len(self._open) > self._most_open:
                self._open.popitem(last=False)
        return file

    def _images(self, samples: Numbers, memory: Bytes, begins: Numbers, faults: dict[int, str]) -> list[Bytes] | Bytes:
        starts = begins + self._image[samples, 0]
        ends = (starts + self._image[samples, 1]).tolist()
        if not self.dataset.raw:
            return [memory[a:b] for a, b in zip(starts.tolist(), ends, strict=True)]
        header, size = ppm_header(*self.dataset.raw), 3 * self.dataset.raw[0] * self.dataset.raw[1]
        found = memory[np.minimum(starts[:, None] + np.arange(len(header)), len(memory) - 1)]
        wrong = (self._image[samples, 1] != len(header) + size) | (found != np.frombuffer(header, np.uint8)).any(1)
        for sample in samples[wrong].tolist():
            faults.setdefault(sample, f"is no PPM of {self.dataset.raw[1]}x{self.dataset.raw[0]} pixels")
        if faults:
            return []
        pixels = np.concatenate([memory[b - size : b] for b in ends])
        return pixels.reshape(len(samples), *self.dataset.raw, 3)

    def _labels(self, samples: Numbers, memory: Bytes, begins: Numbers, faults: dict[int, str]) -> Numbers:
        """The numbers that .cls members hold in ASCII, read all at once, for in a small image's time they count."""
        starts, sizes = begins + self._label[samples, 0], self._label[samples, 1].astype(np.int64)
        place = np.arange(min(DIGITS, sizes.max()))
        within = place < sizes[:, None]
        digits = memory[np.minimum(starts[:, None] + place, len(memory) - 1)].astype(np.int64) - ord("0")
        plain = (sizes > 0) & (sizes <= DIGITS) & ((digits >= 0) & (digits <= 9) | ~within).all(1)
        labels = np.where(plain, (digits * within * 10 ** np.maximum(sizes[:, None] - 1 - place, 0)).sum(1), -1)
        classes = len(self.dataset.classes or ())
        for i in np.flatnonzero((labels < 0) | (labels >= classes)).tolist():
            text = memory[starts[i] : starts[i] + sizes[i]].tobytes()[:32]
            if text.strip().isdigit() and int(text) < classes:  # with blanks around, as in a shard of others
                labels[i] = int(text)
            else:
                faults.setdefault(int(samples[i]), f"has the label {text!r}, expected a number from 0 to {classes - 1}")
        return labels


Result = TypeVar("Result")


def ahead(tasks: Iterator[Callable[[], Result]], depth: int, timeout_s: float | None = None) -> Iterator[Result]:
    """The results of tasks, in order; a thread works on at most `depth` of them beyond the one that is asked for.

    What a task raises is raised in its place, and nothing comes after it. Raises StalledError where a result that is
    asked for does not come within `timeout_s`.
    """

    def result(future: Future[Result]) -> Result:
        try:
            return future.result(timeout_s)
        except TimeoutError:
            if future.done():
                raise
            raise StalledError from None

    pool, waiting = ThreadPoolExecutor(1, "ahead"), deque[Future[Result]]()
    try:
        for task in tasks:
            waiting.append(pool.submit(task))
            if len(waiting) > depth:
                yield result(waiting.popleft())
        while waiting:
            yield result(waiting.popleft())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
