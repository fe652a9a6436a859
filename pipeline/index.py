"""Shards where they lie: a manifest and DALI indexes for WebDataset tars of other people, of which no byte is copied.

Headers and labels are read, images are passed by, and the tars' own folders stay as they are. Samples are those that
the webdataset library finds (its `tariterators.group_by_keys`), so a tar gives the same samples to both. 100,000
samples of an image and a label, in four tars in the page cache, take 12 s with one process (8,700 samples/s) and 8 s
with two (medians of three runs, start-up included; a host of two cores that others used too).
"""

import glob
import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pipeline import shards
from pipeline.images import MAX_PIXELS, BadImageError, Rules, ppm_shape, prepare
from pipeline.shards import (
    Dataset,
    DatasetError,
    Shard,
    index_line,
    index_text,
    manifest,
    read_dataset,
    split_name,
    write_text,
)
from pipeline.sources import MAX_CLASSES, Member, TarError, class_names, members, read_label
from pipeline.workers import in_order
from pipeline.write import publish

# What DALI 2.4 decodes, and Pillow too; DALI decodes neither GIF nor AVIF.
KINDS = {"jpg", "jpeg", "jpe", "jfif", "png", "webp", "ppm", "pgm", "pbm", "pnm", "bmp", "tif", "tiff"}
META = re.compile(r"__[^/]*__($|/)")  # members that webdataset skips
NONE = "/"  # no extension is that


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
                  left out. False: labels are passed over.
    class_list    text file of class names, one a line. None: those of `dataset.json` in the folder of the tars (the
                  deepest one that holds all), else the numbers.
    image_member  extension of the member that is the image. None: the one member whose extension ends in one of KINDS;
                  where there are several, the one whose extension has no dot (k.jpg, not k.seg.png).
    verify        read everything: hash each tar, and leave out images that do not decode or exceed `max_pixels`.
    progress      called as progress(tars done, tars in all).
    The manifest holds the folder of the tars relative to `out` if it lies in the folder that holds `out`, so that both
    can move together, else as an absolute path. What is left out and passed over is listed in `actions.jsonl` and
    counted in `Dataset.counts`. Raises DatasetError, and writes nothing, if there is no tar or no sample, if a label is
    no number of a class, or if a sample has several images.
    """
    root, files = _locate(tars)
    if image_member is not None:
        _, image_member = split_name(f"key.{image_member.removeprefix('.')}") or ("", "")  # as it stands in an index
        if not image_member:
            raise DatasetError("the image member has no extension, expected one such as 'jpg' or 'left.png'")
    scan = partial(_scan, root, labels, image_member, Rules(max_pixels=max_pixels) if verify else None)
    with publish(out) as folder:
        found: list[_Tar] = []
        for tar in in_order(scan, iter(files), min(workers, len(files))):
            found.append(tar)
            if progress:
                progress(len(found), len(files))
        numbers = {sample.label for tar in found for sample in tar.samples if sample.label is not None}
        classes = class_names(root, class_list, numbers) if numbers else None
        written = [shard for tar in found if (shard := _write_index(folder, tar, classes))]
        left_out = Counter(action["reason"] for tar in found for action in tar.left_out)
        if not written:
            reasons = "; ".join(f"{reason}: {count}" for reason, count in sorted(left_out.items())) or "they are empty"
            raise DatasetError(
                f"{len(files)} tars in {root} hold no sample with an image that could be used ({reasons}). Expected "
                f"members KEY.EXTENSION, the image's being {', '.join(sorted(KINDS))}, or the one of --image-member"
            )
        used = [sample for tar in found for sample in tar.samples]
        kept = Counter(sample.extension for sample in used)
        per_class = Counter(sample.label for sample in used)
        passed_over: Counter[str] = sum((tar.passed_over for tar in found), Counter())
        shapes = {shape for tar in found for shape in tar.shapes}
        _write_actions(folder / "actions.jsonl", found)
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
                "kept": dict(sorted(kept.items())),
                "reencoded": {},
                "left_out": dict(sorted(left_out.items())),
                "passed_over": dict(sorted(passed_over.items())),
                "per_class": None if classes is None else [per_class[label] for label in range(len(classes))],
            },
            shards=tuple(written),
            raw=shapes.pop() if len(shapes) == 1 else None,
            tars_at=_tars_at(root, Path(out)),
        )
        write_text(folder / "dataset.json", manifest(dataset))
    return read_dataset(out)


def _locate(tars: Sequence[str | Path]) -> tuple[Path, list[str]]:
    """The deepest folder that holds all tars, without symbolic links, and the path of each from there."""
    found: list[Path] = []
    for each in tars:
        path = Path(each)
        if path.is_dir():
            here = list(path.glob("*.tar"))
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

    extension: str  # of the image
    label: int | None
    line: str  # of the index


@dataclass(slots=True)
class _Group:
    """The members of one key that follow each other."""

    key: str
    members: list[tuple[str, Member]] = field(default_factory=list)  # with their extensions
    links: list[tuple[str, Member]] = field(default_factory=list)  # and what else is no regular file
    label: int | str | None = None  # str: what its `cls` holds instead of a label


@dataclass(slots=True)
class _Tar:
    """What a worker found in one tar."""

    file: str
    bytes: int
    sha256: str = ""
    samples: list[_Sample] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)  # members, by the last part of their extensions
    first: dict[str, str] = field(default_factory=dict)  # the first member of each such kind
    left_out: list[dict[str, str]] = field(default_factory=list)  # as in actions.jsonl
    shapes: set[tuple[int, int] | None] = field(default_factory=set)  # of the images, as PPMs; empty: not looked at

    def leave_out(self, name: str, reason: str, detail: str) -> None:
        path = f"{self.file}/{name}"
        self.left_out.append({"action": "left out", "reason": reason, "path": path, "detail": detail})

    def pass_over(self, name: str, kind: str) -> None:
        self.passed_over[kind] += 1
        self.first.setdefault(kind, f"{self.file}/{name}")


def _scan(root: Path, labels: bool, wanted: str | None, rules: Rules | None, name: str) -> _Tar:
    """Find the samples of a tar; with `rules`, read and decode them too."""
    with open(root / name, "rb") as file:
        tar = _Tar(name, os.fstat(file.fileno()).st_size)
        for group in _groups(tar, file, labels):
            extension = _image(tar, group, wanted)
            image = _used(tar, group, extension, {extension, "cls"} if labels else {extension})
            if image and (rules is None or _decodes(tar, file, image, rules)):
                label = _label(tar, group)
                parts = [image] if label is None else sorted((image, dict(group.members)["cls"]), key=_offset)
                line = index_line((part.name, part.offset, part.size) for part in parts)
                tar.samples.append(_Sample(extension, label, line))
        if rules:
            file.seek(0)
            tar.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return tar


def _offset(member: Member) -> int:
    return member.offset


def _groups(tar: _Tar, file: BinaryIO, labels: bool) -> Iterator[_Group]:
    """Samples as webdataset groups them: regular files that follow each other and have one key.

    A key that comes again after another one is a new sample. Links and the like are skipped by webdataset, and end no
    group; here they are kept to say what became of them. Members without a key, or called __NAME__, are passed over.
    What lies behind the first damage is left out, and the sample before it has the members that are whole.
    """
    group: _Group | None = None
    links = defaultdict[str, list[tuple[str, Member]]](list)
    try:
        for member in members(file, tar.file):
            parts = None if META.match(member.name) else split_name(member.name)
            if not parts:
                tar.pass_over(member.name, "no key")
                continue
            key, extension = parts
            if member.fault:
                links[key].append((extension, member))
                continue
            if group is None or group.key != key:
                if group:
                    group.links = links.pop(group.key, [])
                    yield group
                group = _Group(key)
            group.members.append((extension, member))
            if labels and extension == "cls":
                group.label = read_label(file, member)
    except TarError as error:
        tar.leave_out("the rest", "damaged tar", str(error))
    if group:
        group.links = links.pop(group.key, [])
        yield group
    for key, alone in links.items():
        yield _Group(key, links=alone)


def _used(tar: _Tar, group: _Group, extension: str, own: set[str]) -> Member | None:
    """The image, if the group can be a sample of it; else why not is noted. Members not in `own` are passed over."""
    parts = dict(group.members)
    image = parts.get(extension)
    link = next((member for each, member in group.links if each == extension), None)
    for each, member in (*group.members, *group.links):
        if each not in own or not (parts or link):
            tar.pass_over(member.name, each.rpartition(".")[2])
    if len(parts) < len(group.members):
        twice = next(each for each, count in Counter(each for each, _ in group.members).items() if count > 1)
        tar.leave_out(group.key, "member twice", f"it has several members {twice}, which webdataset refuses too")
    elif image and image.size:
        return image
    elif image:
        tar.leave_out(image.name, "empty", "the image has no bytes")
    elif link:
        tar.leave_out(link.name, link.fault, f"its image is {link.fault}")
    elif parts:
        tar.leave_out(group.key, "no image", f"its members are {', '.join(parts)}")
    return None


def _label(tar: _Tar, group: _Group) -> int | None:
    if isinstance(group.label, str):
        raise DatasetError(
            f"sample {group.key!r} of {tar.file} has the label {group.label}, expected a whole number from 0 to "
            f"{MAX_CLASSES - 1}; --no-labels does without labels"
        )
    return group.label


def _image(tar: _Tar, group: _Group, wanted: str | None) -> str:
    """The extension of the image, NONE if there is none. Raises DatasetError if there are several."""
    if wanted is not None:
        return wanted
    found, linked = (
        {each: None for each, _ in parts if each.rpartition(".")[2] in KINDS} for parts in (group.members, group.links)
    )
    images = list(found or linked)
    images = [each for each in images if "." not in each] or images
    if len(images) > 1:
        raise DatasetError(
            f"sample {group.key!r} of {tar.file} has {len(images)} images, {', '.join(images[:5])}: choose one with "
            "--image-member EXT; if the dots belong to names of different images, use the command webdataset, where a "
            "name ends at its last dot"
        )
    return images[0] if images else NONE


def _decodes(tar: _Tar, file: BinaryIO, image: Member, rules: Rules) -> bool:
    """Whether an image decodes; if not, why is noted."""
    file.seek(image.offset)
    content = file.read(image.size)
    try:
        prepare(content, rules)
    except BadImageError as error:
        tar.leave_out(image.name, error.reason, str(error))
        return False
    tar.shapes.add(ppm_shape(content))
    return True


# ---- what is written


def _write_index(folder: Path, tar: _Tar, classes: Sequence[str] | None) -> Shard | None:
    """Write the index of a tar, without the samples that lack a label where others have one; None: none is left."""
    if classes is not None:
        for sample in tar.samples:
            if sample.label is None:
                tar.leave_out(_key(sample), "no label", "it has no cls, and other samples have one")
            elif sample.label >= len(classes):
                raise DatasetError(
                    f"sample {_key(sample)!r} of {tar.file} has the label {sample.label}, and there are {len(classes)} "
                    "classes: give a class list with more names, or --no-labels"
                )
        tar.samples = [sample for sample in tar.samples if sample.label is not None]
    if not tar.samples:
        return None
    index = index_text([sample.line for sample in tar.samples])
    digest = hashlib.sha256(index.encode()).hexdigest()
    shard = Shard(file=tar.file, samples=len(tar.samples), bytes=tar.bytes, sha256=tar.sha256, index_sha256=digest)
    (folder / shard.index).parent.mkdir(parents=True, exist_ok=True)
    write_text(folder / shard.index, index)
    return shard


def _key(sample: _Sample) -> str:
    return shards.members(sample.line)[0].key


def _write_actions(path: Path, tars: Iterable[_Tar]) -> None:
    """A line for each sample that is left out, and one for each kind of member that is passed over in a tar."""
    actions = [action for tar in tars for action in tar.left_out]
    for tar in tars:
        for kind, count in sorted(tar.passed_over.items()):
            detail = f"{count} members of {tar.file}"
            actions.append({"action": "passed over", "reason": kind, "path": tar.first[kind], "detail": detail})
    if actions:
        write_text(path, "".join(f"{json.dumps(action)}\n" for action in actions))
