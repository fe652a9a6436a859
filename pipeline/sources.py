"""Sources: what shards are made of. A source finds the images of a folder, a list, tars or an original archive.

Which entry is an image, a label or neither is settled by pipeline/entries.py alone. Nothing is decoded here and no
archive is unpacked, so nothing can be written where a hostile name points: a sample says where its bytes lie, and
`write_shards` reads them there. This file has the folder; sources_list.py, sources_tars.py and sources_originals.py
have the others.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.entries import Tally, is_hidden
from pipeline.shards import DatasetError, Sample


@dataclass(frozen=True, kw_only=True)
class Source:
    """Samples in an order that only their names decide, and what `write_shards` has to know of them."""

    samples: list[Sample]
    classes: list[str] | None  # class names, index = label; None: no labels
    root: Path = Path()  # where the samples' files start from
    name: str  # first part of the shards' names
    convert: Callable[[bytes], bytes] | None = None  # makes an image of what a sample reads
    tally: Tally = field(default_factory=Tally)  # the entries of which there is no sample
    warning: str = ""


def source_name(source: Path) -> str:
    """The first part of the shards' names, made of that of a file or folder."""
    stem = source.resolve().name.removesuffix(source.suffix if source.is_file() else "")
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in stem) or "shards"


def folder(source: Path) -> Source:
    """The images of a class folder (labels as torchvision's ImageFolder gives them) or of a flat folder (none).

    In class folders images are found at any depth. Raises DatasetError if there are none, if a class has none, or if
    images lie beside class folders.
    """
    if not source.is_dir():
        raise DatasetError(f"{source} is {'a file' if source.exists() else 'missing'}, expected a folder of images")
    tally = Tally()
    flat, classes, images = [], [], []
    for entry in _entries(source):
        kind = _kind(entry)
        if kind == "folder" and not is_hidden(entry.name):
            classes.append(entry.name)
            images.append(sorted(_images(source, entry.name, tally)))
        elif tally.is_image(entry.name, kind):
            flat.append(entry.name)
    if flat and any(images):
        example = next(found[0] for found in images if found)
        raise DatasetError(
            f"{source} mixes images ({flat[0]!r}) with class folders of images ({example!r}): "
            "put every image into a class folder, or all of them into one folder without labels"
        )
    if not flat and not any(images):
        raise DatasetError(f"{source} holds no image that could be used; {tally.summary()}")
    if flat:
        samples = [Sample(path) for path in flat]
        return Source(samples=samples, classes=None, root=source, name=source_name(source), tally=tally)
    if empty := [name for name, found in zip(classes, images, strict=True) if not found]:
        raise DatasetError(
            f"{source} has class folders without an image: {', '.join(map(repr, empty[:5]))}"
            f"{f' and {len(empty) - 5} more' if len(empty) > 5 else ''}. "
            "Each folder is a class and takes a label: fill or remove them"
        )
    samples = [Sample(path, label) for label, found in enumerate(images) for path in found]
    return Source(samples=samples, classes=classes, root=source, name=source_name(source), tally=tally)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _kind(entry: os.DirEntry[str]) -> str:
    """ "folder", "" for a file, both through links too, or why the entry is neither."""
    if entry.is_dir(follow_symlinks=False):
        return "folder"
    if entry.is_file(follow_symlinks=False):
        return ""
    try:
        mode = entry.stat().st_mode
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return "a dangling link"
        raise
    if stat.S_ISDIR(mode) or stat.S_ISREG(mode):
        return "folder" if stat.S_ISDIR(mode) else ""
    return "a FIFO" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"


def _images(source: Path, folder: str, tally: Tally) -> Iterator[str]:
    """Paths, from `source`, of the images at any depth below `folder`; no folder is entered twice through links."""
    seen: set[tuple[int, int]] = set()
    pending = [folder]
    while pending:
        at = pending.pop()
        status = os.stat(source / at)
        if (status.st_dev, status.st_ino) in seen:
            tally.pass_over(at, "link to a folder that was read")
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in _entries(source / at):
            path, kind = f"{at}/{entry.name}", _kind(entry)
            if kind == "folder" and not is_hidden(entry.name):
                pending.append(path)
            elif tally.is_image(path, kind):
                yield path
