"""A data set of shards on disk: what it consists of, and how it is checked before it is read.

A data set is a folder. NAME-000000.tar ... hold KEY.cls (label, ASCII) and KEY.jpg, .png, .webp or .ppm (the original
bytes wherever pipeline/images.py can keep them); beside each lies NAME-000000.tar.idx in DALI's v1.2 format.
`dataset.json` is the manifest, `actions.jsonl` names each image left out or converted and why, `_info.json` (timm) and
`sizes.json` (open_clip) let others read the shards. pipeline/write.py makes it, pipeline/audit.py looks for damage and
leaves samples out later.
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.images import BadImageError
from pipeline.store import address, fetch, is_remote

FORMAT, VERSION = "swiftclr-shards", 2  # version 1 had no raw shape and no quarantine; it is read too
NAME = re.compile(r"[A-Za-z0-9_-]+")
# Of a file that no second attempt would read; any other error may pass, and costs no image.
NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG}


class DatasetError(ValueError):
    """The caller's images, shards or folder cannot be used; the message names the thing and what to do."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One encoded image on its way into a shard: in memory, a file, or a part of a file, such as a member of a tar."""

    name: str  # path of the file, relative to the source's root; for other images any telling name
    label: int | None = None
    data: bytes | None = None  # None: read the file when its turn comes
    file: str | None = None  # the file to read, relative to the source's root; None: `name`
    offset: int = 0  # bytes from the start of the file
    size: int = -1  # bytes; -1: to the end of the file
    fault: str = ""  # why there is nothing to read, where its source knows already: it is left out for that

    def read(self, root: Path) -> bytes:
        """The encoded image.

        Raises BadImageError ("unreadable") where it is not there: no such file, no permission, or a file that ends
        before the image does. Raises OSError naming the file where reading fails otherwise: the image may be sound.
        """
        if self.fault:
            raise BadImageError("unreadable", self.fault)
        if self.data is not None:
            return self.data
        path = root / (self.file or self.name)
        try:
            with open(path, "rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            if error.errno in NOT_THERE:
                raise BadImageError("unreadable", os.strerror(error.errno)) from error
            hint = f"{error.strerror}; the same command goes on once it can be read"
            raise OSError(error.errno, hint, path) from error
        if len(data) < self.size:
            raise BadImageError("unreadable", f"{len(data)} of {self.size} bytes are there")
        return data


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar of a data set, as the manifest records it."""

    file: str
    samples: int  # in the index; the tar holds the quarantined ones too
    bytes: int
    sha256: str
    index_sha256: str
    quarantined: int = 0  # samples that a later index leaves out

    @property
    def index(self) -> str:
        """The file of its DALI index; each quarantine adds one, and the first one stays."""
        return f"{self.file}.idx" if not self.quarantined else f"{self.file}.without-{self.quarantined}.idx"


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A data set as its manifest records it. From `read_dataset`: manifest, tars and indexes fit each other."""

    root: Path
    name: str
    samples: int
    classes: tuple[str, ...] | None  # class names, index = label; None: no labels
    extensions: tuple[str, ...]  # of the images present, sorted: "jpg", "png", "ppm", "webp"
    options: dict[str, Any]  # seed, shard_size and the rules for images
    # when written: kept {extension: n}, reencoded, left_out {reason: n}; now: per_class [n] or None, quarantined [key]
    counts: dict[str, Any]
    shards: tuple[Shard, ...]
    raw: tuple[int, int] | None = None  # (height, width) if every image is a PPM of this size: no decoder is needed

    @property
    def fingerprint(self) -> str:
        """sha256 over the samples, classes and hashes of the shards: the same wherever the folder lies."""
        shards = [[shard.samples, shard.sha256, shard.index_sha256] for shard in self.shards]
        return hashlib.sha256(json.dumps([self.samples, self.classes, shards]).encode()).hexdigest()

    @property
    def labelled(self) -> bool:
        return self.classes is not None

    @property
    def address(self) -> str:
        """The folder, or s3://bucket/prefix: what `read_dataset` was given."""
        return address(self.root)

    @property
    def tars(self) -> list[str]:
        return [f"{self.address}/{shard.file}" for shard in self.shards]

    @property
    def indexes(self) -> list[str]:
        return [f"{self.address}/{shard.index}" for shard in self.shards]


def manifest(dataset: Dataset) -> str:
    """The text of dataset.json."""
    content = {"format": FORMAT, "version": VERSION, "fingerprint": dataset.fingerprint, **asdict(dataset)}
    del content["root"]
    return json.dumps(content, indent=1)


def write_text(path: Path, text: str) -> None:
    """Write a file that is on the disk whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_dataset(path: str | Path, *, check: bool = True) -> Dataset:
    """Read the manifest in folder `path`, or s3:// or gs:// prefix, and check every tar and index against it.

    Tars are checked by size, indexes by content; no tar is opened, so this takes well under a second for 1,282 shards
    and does not see a flipped bit. In object storage, where objects appear whole, only the indexes are checked.
    check=False leaves even that out. Raises DatasetError naming the first faulty file, what was expected and found.
    """
    root, remote = Path(path), is_remote(address(path))
    file = address(root / "dataset.json")
    remake = "Make the shards anew (python tools/make_shards.py folder IMAGES OUT), or copy the data set again"
    try:
        manifest = json.loads(fetch([file])[0])
        kind = (manifest.pop("format"), manifest.pop("version"))
        if kind not in ((FORMAT, 1), (FORMAT, VERSION)):
            raise DatasetError(f"{file} is {kind}, this program reads {(FORMAT, VERSION)}. {remake}")
        fingerprint, shards = manifest.pop("fingerprint"), tuple(Shard(**shard) for shard in manifest.pop("shards"))
        for field in ("classes", "extensions"):
            manifest[field] = manifest[field] and tuple(manifest[field])
        manifest["raw"] = manifest.get("raw") and tuple(manifest["raw"])
        dataset = Dataset(root=root, shards=shards, **manifest)
        intact = dataset.fingerprint == fingerprint and dataset.samples == sum(shard.samples for shard in shards)
        intact = intact and all(NAME.fullmatch(shard.file.removesuffix(".tar")) for shard in shards)
        intact = intact and all(isinstance(shard.quarantined, int) for shard in shards)  # it is part of a file name
    except (FileNotFoundError, NotADirectoryError) as error:
        inside = sorted(str(found.parent) for found in root.glob("*/dataset.json"))
        hint = f"Did you mean {' or '.join(inside)}?" if inside else remake
        reason = "it has no dataset.json" if root.exists() else "it does not exist"
        raise DatasetError(f"{root} is no data set: {reason}. {hint}") from error
    except OSError as error:
        raise DatasetError(f"cannot read {file}: {error.strerror}") from error
    except DatasetError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f"{file} is damaged ({type(error).__name__}: {error}). {remake}") from error
    if not intact:
        raise DatasetError(f"{file} has been changed: its shards do not give its fingerprint or samples. {remake}")
    found: list[str | None] = []
    if check and remote:
        try:
            contents = fetch(dataset.indexes)
        except OSError as error:
            raise DatasetError(f"cannot read the indexes of {dataset.address}: {error.strerror}") from error
        found = [
            content_fault(dataset.address, shard, None, index) for shard, index in zip(shards, contents, strict=True)
        ]
    elif check:
        found = [shard_fault(root, shard) for shard in shards]
    faults = [fault for fault in found if fault]
    if faults:
        others = f" ({len(faults) - 1} other shards have faults too)" if len(faults) > 1 else ""
        raise DatasetError(f"{faults[0]}{others}. {remake}")
    return dataset


def index_text(lines: Sequence[str]) -> str:
    """DALI's index of a tar: a line for each sample, EXTENSION OFFSET SIZE NAME of every member of it."""
    return "\n".join([f"v1.2 {len(lines)}", *lines, ""])


def shard_fault(root: Path, shard: Shard) -> str | None:
    """What is wrong with this tar on disk or its index, or None."""
    try:
        size, index = (root / shard.file).stat().st_size, (root / shard.index).read_bytes()
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror}), expected a shard of {shard.samples} samples"
    return content_fault(str(root), shard, size, index)


def content_fault(folder: str, shard: Shard, size: int | None, content: bytes) -> str | None:
    """What is wrong with a tar of `size` bytes (None: not known) or with the content of its index, or None."""
    tar, index = f"{folder}/{shard.file}", f"{folder}/{shard.index}"
    if size is not None and size != shard.bytes:
        return f"{tar} has {size} bytes, expected {shard.bytes}: truncated, or not the shard that was written"
    if hashlib.sha256(content).hexdigest() == shard.index_sha256:
        return None
    header, *lines = content.split(b"\n")
    if not content:
        return f"{index} is empty, expected an index of {shard.samples} samples"
    if header != b"v1.2 %d" % shard.samples:
        return f"{index} starts with {header[:40]!r}, expected 'v1.2 {shard.samples}': not the index of {shard.file}"
    if len(lines) != shard.samples + 1:
        return f"{index} has {len(lines) - 1} lines of {shard.samples} samples: truncated"
    return f"{index} is stale: it has {shard.samples} samples, but is not the index written with {shard.file}"
