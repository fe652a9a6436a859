"""What is wrong with a data set on disk, sample by sample, and how to leave samples out of it without rewriting a tar.

`read_dataset` asks only whether the files are those of the manifest; `verify` reads them. `quarantine` writes indexes
that pass over samples, beside the first ones, and then replaces the manifest in one step; tars and first indexes stay.
Nothing is written beside tars that lie elsewhere than the manifest.
"""

import contextlib
import fcntl
import hashlib
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from io import BufferedIOBase
from pathlib import Path
from typing import BinaryIO, cast

from pipeline.entries import MAX_NUMBER
from pipeline.images import check_all, ppm_shape
from pipeline.shards import (
    BLOCK,
    Dataset,
    DatasetError,
    IndexMember,
    Shard,
    content_fault,
    index_text,
    manifest,
    members,
    read_dataset,
    split_name,
)
from pipeline.sources_tars import TarError
from pipeline.sources_tars import members as members_of_tar
from pipeline.store import fetch, is_remote, opened
from pipeline.workers import DECODERS, in_order
from tools.files import open_binary, read_text, write_text

ORIGINAL = "dataset.json.original"


@dataclass(frozen=True, slots=True)
class Fault:
    """Something wrong with one sample, or with a whole shard."""

    shard: str
    key: str | None  # None: the whole shard
    problem: str


class _Tar:
    """A tar that is being checked."""

    def __init__(self, file: BufferedIOBase, name: str) -> None:
        self.file, self.name = file, name
        self.size = file.seek(0, os.SEEK_END)

    def read(self, offset: int, size: int) -> bytes:
        self.file.seek(offset)
        return self.file.read(size)

    @cached_property
    def scanned(self) -> dict[int, tuple[str, int]]:
        """{offset: (name, bytes)} of the members, up to the first damage: extended headers for long names are read."""
        found = {}
        with contextlib.suppress(TarError):
            for name, offset, size, _ in members_of_tar(cast(BinaryIO, self.file), self.name):
                found[offset] = name, size
        return found


def verify(
    path: str | Path, *, images: bool = False, workers: int = 1, progress: Callable[[int, int], None] | None = None
) -> list[Fault]:
    """Read a data set, from object storage too, from end to end and return every fault found.

    Checked are sizes and hashes of tars (no hash where they were indexed without being read) and indexes, that each
    sample of an index lies in its tar, whole and under its key and extension, its label, and with `images`, or where a
    tar is not the one that was written, that every image decodes. A name is taken from the header before the content;
    where that one differs, as it does for names too long for it, from the extended headers too.
    progress is called as progress(samples done, samples in all) after each shard. A remote tar is read in parts of a
    few MiB and never kept. Raises DatasetError if there is no manifest to go by.
    """
    dataset = read_dataset(path, check=False)
    faults: list[Fault] = []
    done = 0
    check = partial(_faults, dataset, images)
    by_shard = in_order(check, iter(dataset.shards), workers, DECODERS if images else ())
    for shard, found in zip(dataset.shards, by_shard, strict=True):
        faults += found
        done += shard.samples
        if progress:
            progress(done, dataset.samples)
    return faults


def quarantine(path: str | Path, keys: Iterable[str]) -> Dataset:
    """Leave samples out of a data set from now on; returns what it is now, which a running training will not resume on.

    keys  KEY, a member's name KEY.EXTENSION, or either after the file of its shard, as in a/b.tar/KEY: needed where
          tars were indexed in place and several have a sample of this key.
    All such keys stand in `Dataset.counts["quarantined"]`, and those whose label can be read no longer count in its
    `per_class`. The manifest as it was at first stays as dataset.json.original; put back in place of dataset.json, it
    undoes every quarantine. Whoever reads the tars without the indexes still meets the samples. Raises DatasetError for
    unknown or ambiguous keys, if no sample would be left, or for object storage, which is only read; then nothing is
    written.
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
        wanted = _wanted(dataset, keys)
        found: dict[str, str] = {}  # a wanted key, and the shard that has it
        now: set[str] = set()  # what is left out, as the manifest calls it
        shards, indexes = [], dict[Path, str]()
        per_class = list(dataset.counts.get("per_class") or ())
        for shard in dataset.shards:
            _, *lines = read_text(dataset.index(shard), "ascii").splitlines()
            named = [(line, members(line)[0].key) for line in lines]
            out = [(line, key) for line, key in named if key in wanted or f"{shard.file}/{key}" in wanted]
            if out:
                kept = [line for line, key in named if key not in wanted and f"{shard.file}/{key}" not in wanted]
                index = index_text(kept)
                shard = replace(
                    shard,
                    samples=len(kept),
                    quarantined=shard.quarantined + len(out),
                    index_sha256=hashlib.sha256(index.encode()).hexdigest(),
                )
                indexes[root / shard.index] = index
                for label in _labels(dataset.tar(shard), [line for line, _ in out]):
                    if label < len(per_class):
                        per_class[label] -= 1
            for _, key in out:
                if key in wanted and found.setdefault(key, shard.file) != shard.file:
                    raise DatasetError(
                        f"{key!r} is a sample of {found[key]} and of {shard.file}: name the shard too, as in "
                        f"'{found[key]}/{key}'"
                    )
                found[f"{shard.file}/{key}"] = shard.file
                now.add(f"{shard.file}/{key}" if dataset.tars_at else key)
            if shard.samples:
                shards.append(shard)
        done = before | {name.partition(".tar/")[2] for name in before}
        if unknown := sorted(wanted - found.keys() - done):
            raise DatasetError(f"{path} has no sample {', '.join(unknown[:5])} ({len(unknown)} unknown keys)")
        if not shards:
            raise DatasetError(f"no sample of {path} would be left")
        for file, index in indexes.items():
            write_text(file, index)
        if not (root / ORIGINAL).exists():
            write_text(root / ORIGINAL, read_text(root / "dataset.json", "ascii"))
        samples = sum(shard.samples for shard in shards)
        counts = {**dataset.counts, "per_class": per_class or None, "quarantined": sorted(before | now)}
        write_text(
            root / "dataset.json", manifest(replace(dataset, samples=samples, counts=counts, shards=tuple(shards)))
        )
    finally:
        os.close(lock)
    return read_dataset(path)


def _wanted(dataset: Dataset, names: Iterable[str]) -> set[str]:
    """KEY or FILE/KEY of what is named; KEY alone for tars of our own, where it occurs once and has no slash."""
    parts = ((name, split_name(name)) for name in names)
    keys = {found[0] if found else name for name, found in parts}
    return keys if dataset.tars_at else {key.rpartition("/")[2] for key in keys}


def _labels(tar: str, lines: Iterable[str]) -> Iterator[int]:
    """The labels of these samples of an index, as far as they are numbers."""
    with open_binary(tar) as file:
        for member in (member for line in lines for member in members(line) if member.extension == "cls"):
            file.seek(member.offset)
            if (label := file.read(min(member.size, MAX_NUMBER)).strip()).isdigit():
                yield int(label)


def _faults(dataset: Dataset, images: bool, shard: Shard) -> list[Fault]:
    faults: list[Fault] = []
    try:
        with opened(dataset.tar(shard)) as file:
            (index,) = fetch([dataset.index(shard)])
            tar = _Tar(file, shard.file)
            fault = content_fault(dataset.tar(shard), dataset.index(shard), shard, tar.size, index)
            file.seek(0)
            if not fault and shard.sha256 and hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                fault = "its sha256 is not that of the tar that was written: bytes have changed, copy it again"
            if fault:
                faults.append(Fault(shard.file, None, fault))
            lines = index.decode("ascii", "replace").splitlines()[1:]
            encoded = _images(dataset, shard, tar, lines, images or bool(fault), faults)
            for member, _, error in check_all(encoded, dataset.options["max_pixels"]):
                if error:
                    problem = f"{member.key}.{member.extension}: {error.reason} ({error})"
                    faults.append(Fault(shard.file, member.key, problem))
    except OSError as error:
        faults.append(Fault(shard.file, None, f"{error.filename or 'it'} cannot be read ({error.strerror})"))
    return faults


def _images(
    dataset: Dataset, shard: Shard, tar: _Tar, lines: Iterable[str], decode: bool, faults: list[Fault]
) -> Iterator[tuple[IndexMember, bytes]]:
    """The encoded images of an index's lines, if they are to be decoded; what else is wrong goes to `faults`."""
    for number, line in enumerate(lines, 2):
        try:
            sample = members(line)
        except ValueError:
            faults.append(Fault(shard.file, None, f"line {number} of {shard.index} is malformed: {line[:80]!r}"))
            continue
        whole = list[IndexMember]()
        faults += (Fault(shard.file, sample[0].key, problem) for problem in _problems(dataset, tar, sample, whole))
        if decode and not dataset.raw:
            yield from ((member, tar.read(member.offset, member.size)) for member in whole)


def _problems(dataset: Dataset, tar: _Tar, sample: list[IndexMember], whole: list[IndexMember]) -> Iterator[str]:
    """All that is wrong with a sample of a tar before anything is decoded; images that are in their place: `whole`."""
    expected = sorted(["cls"] if dataset.labelled else [])
    found = sorted(member.extension for member in sample)
    if [each for each in found if each not in dataset.extensions] != expected or len(found) != len(expected) + 1:
        images_of = " or ".join(dataset.extensions)
        yield f"it has {' and '.join(found)}, expected {images_of}{' and cls' if dataset.labelled else ''}"
    for member in sample:
        name = f"{member.key}.{member.extension}"
        if member.offset + member.size > tar.size:
            yield f"{name} is cut off: the tar ends at byte {tar.size}, {name} at {member.offset + member.size}"
            continue
        try:
            header = tarfile.TarInfo.frombuf(tar.read(member.offset - BLOCK, BLOCK), "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            yield f"the index puts {name} at byte {member.offset}, where there is none: {error}"
            continue
        there, size = header.name, header.size
        if (split_name(there), size) != ((member.key, member.extension), member.size):
            there, size = tar.scanned.get(member.offset, (there, size))
        if (split_name(there), size) != ((member.key, member.extension), member.size):
            yield f"the index has {name} of {member.size} bytes where the tar has {there} of {size}"
            continue
        if member.extension == "cls":
            content = tar.read(member.offset, member.size)
            num = len(dataset.classes or ())
            digits = content.strip()
            if not (digits.isdigit() and len(digits) < 10 and int(digits) < num):
                yield f"its label is {content[:20]!r}, expected a number from 0 to {num - 1}"
        elif dataset.raw and ppm_shape(tar.read(member.offset, member.size)) != dataset.raw:
            yield f"{name} is no PPM of {dataset.raw[1]}x{dataset.raw[0]} pixels"
        else:
            whole.append(member)
