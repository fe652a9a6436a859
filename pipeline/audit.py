"""What is wrong with a data set on disk, sample by sample, and how to leave samples out of it without rewriting a tar.

`read_dataset` asks only whether the files are those of the manifest; `verify` reads them. `quarantine` writes indexes
that pass over samples, beside the first ones, and then replaces the manifest in one step; tars and first indexes stay.
"""

import fcntl
import hashlib
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from io import BufferedIOBase
from pathlib import Path

from pipeline.images import BadImageError, Rules, ppm_shape, prepare
from pipeline.shards import Dataset, DatasetError, Shard, content_fault, index_text, manifest, read_dataset, write_text
from pipeline.store import fetch, is_remote, opened
from pipeline.workers import in_order

ORIGINAL = "dataset.json.original"


@dataclass(frozen=True, slots=True)
class Fault:
    """Something wrong with one sample, or with a whole shard."""

    shard: str
    key: str | None  # None: the whole shard
    problem: str


@dataclass(frozen=True, slots=True)
class _Member:
    """A file in a tar, as the index gives it."""

    key: str
    extension: str
    offset: int  # of its first byte, behind the header
    size: int


def verify(
    path: str | Path, *, images: bool = False, workers: int = 1, progress: Callable[[int, int], None] | None = None
) -> list[Fault]:
    """Read a data set, from object storage too, from end to end and return every fault found.

    Checked are sizes and hashes of tars and indexes, that each sample of an index lies in its tar, whole and under its
    name, its label, and with `images`, or where a tar is not the one that was written, that every image decodes.
    progress is called as progress(samples done, samples in all) after each shard. A remote tar is in memory while a
    worker reads it, and never on the disk. Raises DatasetError if there is no manifest to go by.
    """
    dataset = read_dataset(path, check=False)
    faults: list[Fault] = []
    done = 0
    check = partial(_faults, dataset, images)
    for shard, found in zip(dataset.shards, in_order(check, iter(dataset.shards), workers), strict=True):
        faults += found
        done += shard.samples
        if progress:
            progress(done, dataset.samples)
    return faults


def quarantine(path: str | Path, keys: Iterable[str]) -> Dataset:
    """Leave samples out of a data set from now on; returns what it is now, which a running training will not resume on.

    All such keys stand in `Dataset.counts["quarantined"]`, and those whose label can be read no longer count in its
    `per_class`. The manifest as it was at first stays as dataset.json.original; put back in place of dataset.json, it
    undoes every quarantine. Whoever reads the tars without the indexes still meets the samples. Raises DatasetError for
    unknown keys, if no sample would be left, or for object storage, which is only read; then nothing is written.
    """
    dataset = read_dataset(path)
    if is_remote(dataset.address):
        raise DatasetError(
            f"{dataset.address} is only read: leave samples out of a copy on disk, and upload its new *.idx and, last, "
            "its dataset.json"
        )
    root = dataset.root
    lock = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        dataset = read_dataset(path)
        before = set(dataset.counts.get("quarantined", ()))
        wanted = {key.partition(".")[0] for key in keys} - before  # a member's name will do: keys have no dot
        found: set[str] = set()
        shards, indexes = [], dict[Path, str]()
        per_class = list(dataset.counts.get("per_class") or ())
        for shard in dataset.shards:
            _, *lines = (root / shard.index).read_text(encoding="ascii").splitlines()
            out = [line for line in lines if _key(line) in wanted]
            if out:
                kept = [line for line in lines if _key(line) not in wanted]
                index = index_text(kept)
                shard = replace(
                    shard,
                    samples=len(kept),
                    quarantined=shard.quarantined + len(out),
                    index_sha256=hashlib.sha256(index.encode()).hexdigest(),
                )
                indexes[root / shard.index] = index
                for label in _labels(root / shard.file, out):
                    if label < len(per_class):
                        per_class[label] -= 1
            found |= {_key(line) for line in out}
            if shard.samples:
                shards.append(shard)
        if unknown := sorted(wanted - found):
            raise DatasetError(f"{path} has no sample {', '.join(unknown[:5])} ({len(unknown)} unknown keys)")
        if not shards:
            raise DatasetError(f"no sample of {path} would be left")
        for file, index in indexes.items():
            write_text(file, index)
        if not (root / ORIGINAL).exists():
            write_text(root / ORIGINAL, (root / "dataset.json").read_text(encoding="ascii"))
        samples = sum(shard.samples for shard in shards)
        counts = {**dataset.counts, "per_class": per_class or None, "quarantined": sorted(before | found)}
        write_text(
            root / "dataset.json", manifest(replace(dataset, samples=samples, counts=counts, shards=tuple(shards)))
        )
    finally:
        os.close(lock)
    return read_dataset(path)


def _key(line: str) -> str:
    """The key in a line of an index, whose fourth word is KEY.EXTENSION."""
    return line.split(" ", 4)[3].partition(".")[0]


def _labels(tar: Path, lines: Iterable[str]) -> Iterator[int]:
    """The labels of these samples of an index, as far as they are numbers."""
    with open(tar, "rb") as file:
        for member in (member for line in lines for member in _members(line) if member.extension == "cls"):
            file.seek(member.offset)
            if (label := file.read(min(member.size, 10))).isdigit():
                yield int(label)


def _faults(dataset: Dataset, images: bool, shard: Shard) -> list[Fault]:
    faults: list[Fault] = []
    try:
        with opened(f"{dataset.address}/{shard.file}") as tar:
            (index,) = fetch([f"{dataset.address}/{shard.index}"])
            size = tar.seek(0, os.SEEK_END)
            fault = content_fault(dataset.address, shard, size, index)
            tar.seek(0)
            if not fault and hashlib.file_digest(tar, "sha256").hexdigest() != shard.sha256:
                fault = "its sha256 is not that of the tar that was written: bytes have changed, copy it again"
            if fault:
                faults.append(Fault(shard.file, None, fault))
            lines = index.decode("ascii", "replace").splitlines()[1:]
            for number, line in enumerate(lines, 2):
                try:
                    members = list(_members(line))
                except ValueError:
                    faults.append(
                        Fault(shard.file, None, f"line {number} of {shard.index} is malformed: {line[:80]!r}")
                    )
                    continue
                problems = _problems(dataset, tar, size, members, images or bool(fault))
                faults += (Fault(shard.file, members[0].key, problem) for problem in problems)
    except OSError as error:
        faults.append(Fault(shard.file, None, f"{error.filename or 'it'} cannot be read ({error.strerror})"))
    return faults


def _members(line: str) -> Iterator[_Member]:
    """The parts of a sample in a line of an index: EXTENSION OFFSET SIZE NAME, again and again. Raises ValueError."""
    words = line.split(" ")
    if len(words) % 4:
        raise ValueError(line)
    for extension, offset, size, name in zip(words[::4], words[1::4], words[2::4], words[3::4], strict=True):
        key, _, rest = name.partition(".")
        if rest != extension or int(offset) < tarfile.BLOCKSIZE or int(size) < 0:
            raise ValueError(line)
        yield _Member(key, extension, int(offset), int(size))


def _problems(dataset: Dataset, tar: BufferedIOBase, end: int, members: list[_Member], images: bool) -> Iterator[str]:
    """All that is wrong with a sample of a tar that ends at byte `end`."""
    expected = sorted(["cls"] if dataset.labelled else [])
    found = sorted(member.extension for member in members)
    if [each for each in found if each not in dataset.extensions] != expected or len(found) != len(expected) + 1:
        images_of = " or ".join(dataset.extensions)
        yield f"it has {' and '.join(found)}, expected {images_of}{' and cls' if dataset.labelled else ''}"
    for member in members:
        name = f"{member.key}.{member.extension}"
        if member.offset + member.size > end:
            yield f"{name} is cut off: the tar ends at byte {end}, {name} at {member.offset + member.size}"
            continue
        tar.seek(member.offset - tarfile.BLOCKSIZE)
        try:
            header = tarfile.TarInfo.frombuf(tar.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            yield f"the index puts {name} at byte {member.offset}, where there is none: {error}"
            continue
        if (header.name, header.size) != (name, member.size):
            yield f"the index has {name} of {member.size} bytes where the tar has {header.name} of {header.size}"
            continue
        content = tar.read(member.size)
        if member.extension == "cls":
            num = len(dataset.classes or ())
            if not (content.isdigit() and len(content) < 10 and int(content) < num):
                yield f"its label is {content[:20]!r}, expected a number from 0 to {num - 1}"
        elif dataset.raw and ppm_shape(content) != dataset.raw:
            yield f"{name} is no PPM of {dataset.raw[1]}x{dataset.raw[0]} pixels"
        elif images:
            try:
                prepare(content, Rules(max_pixels=dataset.options["max_pixels"]))
            except BadImageError as error:
                yield f"{name}: {error.reason} ({error})"
