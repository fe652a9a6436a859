"""Shards where they lie: a manifest and DALI indexes for WebDataset tars of other people, of which no byte is copied.

Headers and labels are read, images are passed by, and the tars' own folders stay as they are. Samples are those that
the webdataset library finds (its `tariterators.group_by_keys`), so a tar gives the same samples to both. 100,000
samples of an image and a label, in four tars in the page cache, take 12 s with one process (8,700 samples/s) and 8 s
with two (medians of three runs, start-up included; a host of two cores that others used too).
"""

import glob
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pipeline.entries import Tally, actions_text, class_names, is_number
from pipeline.images import MAX_PIXELS, NOT_DALI, check_all, ppm_shape
from pipeline.shards import Dataset, DatasetError, Shard, index_line, index_text, manifest, read_dataset
from pipeline.sources_tars import TARS, TarSample, compressed_tars, member_extension, no_label, tar_labels, tar_samples
from pipeline.workers import DECODERS, in_order
from pipeline.write import GOES_ON, publish
from tools.files import naming, open_binary, write_new

# What DALI 2.4 decodes, and Pillow too; DALI decodes neither GIF nor AVIF.
KINDS = {"jpg", "jpeg", "jpe", "jfif", "png", "webp", "ppm", "pgm", "pbm", "pnm", "bmp", "tif", "tiff"}


def index_tars(
    tars: Sequence[str | Path],
    out: str | Path,
    *,
    labels: bool = True,
    class_list: Path | None = None,
    image_member: str | None = None,
    verify: bool = False,
    max_pixels: int = MAX_PIXELS,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Make the data set `out`, a new or empty folder, of tars that stay where they are.

    tars          tars, folders (every *.tar in them) and globs, in this order; what one of them names is sorted.
    labels        a sample's label is the whole number in its member `cls`. If any sample has one, those without are
                  left out. False: labels are passed over. Names are refused: training reads the numbers in the tars.
    class_list    text file of class names, one a line. None: those of `dataset.json` in the folder of the tars (the
                  deepest one that holds all), else the numbers.
    image_member  extension of the member that is the image; None: as pipeline/entries.py says. Images that DALI does
                  not decode are left out.
    verify        read everything: hash each tar, and leave out images that do not decode or exceed `max_pixels`.
    progress      called as progress(tars done, tars in all).
    The manifest holds the folder of the tars relative to `out` if it lies in the folder that holds `out`, so that both
    can move together, else as an absolute path. What is left out and passed over is listed in `actions.jsonl` and
    counted in `Dataset.counts`. Raises DatasetError, and writes nothing, if there is no tar or no sample, if labels are
    names, or if a sample has several images.
    """
    root, files = _locate(tars)
    if image_member is not None:
        image_member = member_extension(image_member)
    scan = partial(_scan, root, labels, image_member, max_pixels if verify else None)
    tally = Tally()
    for path in (path for each in map(Path, tars) if each.is_dir() for path in compressed_tars(each)):
        tally.leave_out(str(path), "compressed tar", "unpack it first")
    with publish(out) as folder, naming(folder, GOES_ON):
        found: list[_Tar] = []
        for tar in in_order(scan, iter(files), min(workers, len(files)), DECODERS if verify else ()):
            found.append(tar)
            tally.add(tar.tally)
            if progress:
                progress(len(found), len(files))
        classes, indices = _classes(found, tally, class_names(root, class_list))
        written = [shard for tar in found if (shard := _write_index(folder, tar, classes, indices, tally))]
        if not written:
            raise DatasetError(
                f"{len(files)} tars in {root} hold no sample with an image that could be used; {tally.summary()}. "
                f"Expected members KEY.EXTENSION, the image's being {', '.join(sorted(KINDS))}, or the one of "
                "--image-member"
            )
        used = [sample for tar in found for sample in tar.samples]
        kept = Counter(sample.extension for sample in used)
        per_class = Counter(indices.get(sample.label or "") for sample in used)
        shapes = {shape for tar in found for shape in tar.shapes}
        counts = {
            "kept": dict(sorted(kept.items())),
            "reencoded": {},
            "left_out": tally.reasons(),
            "passed_over": dict(sorted(tally.passed_over.items())),
        }
        write_new(folder / "actions.jsonl", actions_text(tally.actions(), counts, len(tally.lost)))
        dataset = Dataset(
            root=folder,
            name=Path(out).resolve().name,
            samples=len(used),
            classes=None if classes is None else tuple(classes),
            extensions=tuple(sorted(kept)),
            options={
                "indexed_in_place": True,
                "labels": labels,
                "image_member": image_member,
                "verify": verify,
                "max_pixels": max_pixels,
            },
            counts={
                **counts,
                "damaged_tars": len(tally.lost),
                "per_class": None if classes is None else [per_class[label] for label in range(len(classes))],
            },
            shards=tuple(written),
            raw=shapes.pop() if len(shapes) == 1 else None,
            tars_at=_tars_at(root, Path(out)),
        )
        write_new(folder / "dataset.json", manifest(dataset))
    return read_dataset(out)


def _locate(tars: Sequence[str | Path]) -> tuple[Path, list[str]]:
    """The deepest folder that holds all tars, without symbolic links, and the path of each from there."""
    found: list[Path] = []
    for each in tars:
        path = Path(each)
        if path.is_dir():
            here = list(path.glob(TARS))
        else:
            here = [path] if path.is_file() else list(map(Path, glob.glob(str(each), recursive=True)))
        here = sorted(file for file in here if file.is_file())
        if not here:
            what = "holds no *.tar" if path.is_dir() else "is no file, and as a pattern fits none"
            raise DatasetError(f"{each} {what}, expected a tar, a folder of tars, or a pattern in quotes")
        found += (file.parent.resolve() / file.name for file in here)  # a tar may itself be a link to where it is kept
    if not found:
        raise DatasetError("there is no tar to index: name tars, folders or patterns")
    if twice := [file for file, count in Counter(found).items() if count > 1]:
        raise DatasetError(f"{twice[0]} is named twice ({len(twice)} tars are): name each tar once")
    root = Path(os.path.commonpath([file.parent for file in found]))
    return root, [file.relative_to(root).as_posix() for file in found]


def _tars_at(root: Path, out: Path) -> str:
    out = out.resolve()
    return os.path.relpath(root, out) if root.is_relative_to(out.parent) else str(root)


# ---- one tar


class _Sample(NamedTuple):
    """A sample that can be used; all samples of all tars are in memory at once, about 250 bytes each."""

    key: str
    extension: str  # of the image
    image: str  # name of the member
    label: str | None
    fault: str  # why it has none
    line: str  # of the index


@dataclass(slots=True)
class _Tar:
    """What a worker found in one tar."""

    file: str
    bytes: int
    sha256: str = ""
    samples: list[_Sample] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    shapes: set[tuple[int, int] | None] = field(default_factory=set)  # of the images, as PPMs; empty: not looked at


def _scan(root: Path, labels: bool, image_member: str | None, max_pixels: int | None, name: str) -> _Tar:
    """Find the samples of a tar; with `max_pixels`, read and decode them too."""
    with open_binary(root / name) as file:
        tar = _Tar(name, os.fstat(file.fileno()).st_size)
        samples = tar_samples(file, name, tar.tally, labels=labels, image_member=image_member)
        if image_member is None:
            samples = _of_kinds(tar, samples)
        for sample in samples if max_pixels is None else _decoding(tar, file, samples, max_pixels):
            parts = [sample.image]
            if sample.label is not None and sample.label_member:
                parts = sorted((sample.image, sample.label_member), key=lambda member: member.offset)
            line = index_line((part.name, part.offset, part.size) for part in parts)
            tar.samples.append(
                _Sample(sample.key, sample.extension, sample.image.name, sample.label, sample.fault, line)
            )
        if max_pixels is not None:
            file.seek(0)
            tar.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return tar


def _of_kinds(tar: _Tar, samples: Iterable[TarSample]) -> Iterator[TarSample]:
    """Those whose image is of a kind that DALI decodes, by its name; the others are noted."""
    for sample in samples:
        if (kind := sample.extension.rpartition(".")[2]) in KINDS:
            yield sample
        else:
            detail = f"DALI decodes no .{kind}; the command webdataset converts it"
            tar.tally.leave_out(f"{tar.file}/{sample.image.name}", NOT_DALI, detail)


def _decoding(tar: _Tar, file: BinaryIO, samples: Iterable[TarSample], max_pixels: int) -> Iterator[TarSample]:
    """Those whose image decodes; of the others why not is noted."""

    def content(sample: TarSample) -> bytes:
        file.seek(sample.image.offset)
        return file.read(sample.image.size)

    for sample, image, error in check_all(((sample, content(sample)) for sample in samples), max_pixels):
        if error:
            tar.tally.leave_out(f"{tar.file}/{sample.image.name}", error.reason, str(error))
        else:
            tar.shapes.add(ppm_shape(image))
            yield sample


# ---- what is written


def _classes(
    found: Sequence[_Tar], tally: Tally, names: Sequence[str] | None
) -> tuple[list[str] | None, dict[str, int]]:
    """(classes, {label: index}); the labels must be numbers, since training reads them in the tars."""
    samples = [(s.label, s.fault, f"{tar.file}/{s.image}") for tar in found for s in tar.samples]
    for label, _, name in samples:
        if label is not None and not is_number(label):
            raise DatasetError(
                f"the label of {name!r} is the name {label!r}: the tars stay as they are, and training reads whole "
                "numbers in them. The command webdataset takes names; --no-labels does without labels"
            )
    return tar_labels(samples, names, tally) if samples else (None, {})


def _write_index(
    folder: Path, tar: _Tar, classes: Sequence[str] | None, indices: dict[str, int], tally: Tally
) -> Shard | None:
    """Write the index of a tar, without the samples that lack a label where others have one; None: none is left."""
    if classes is not None:
        for sample in tar.samples:
            if (sample.label or "") not in indices:
                tally.leave_out(f"{tar.file}/{sample.image}", *no_label(sample.label, sample.fault, classes))
        tar.samples = [sample for sample in tar.samples if sample.label in indices]
    if not tar.samples:
        return None
    index = index_text([sample.line for sample in tar.samples])
    digest = hashlib.sha256(index.encode()).hexdigest()
    shard = Shard(file=tar.file, samples=len(tar.samples), bytes=tar.bytes, sha256=tar.sha256, index_sha256=digest)
    (folder / shard.index).parent.mkdir(parents=True, exist_ok=True)
    write_new(folder / shard.index, index)
    return shard
