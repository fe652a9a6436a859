"""Sources: what shards are made of. Each function finds the images of one kind of source and gives a `Source`.

Nothing is decoded here and no archive is unpacked, so nothing can be written where a hostile name points: a sample
says where its bytes lie, and `write_shards` reads them there. Of a tar only the headers are read, about 20,000 a
second (one busy core; a minute for ImageNet), each through `tarfile.TarInfo` and each held to limits. CIFAR and STL-10
come through torchvision's readers, which check the md5 of the original archives before they unpack them in place.
"""

import csv
import gzip
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, NamedTuple

from pipeline.images import ppm
from pipeline.shards import DatasetError, Sample

# torchvision's list and .gif, so that a GIF is reported as left out instead of being overlooked.
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif"}
WNID = re.compile(r"n\d{8}")
MAX_CLASSES = 100_000  # a larger label is taken for damage: each class has its name in the manifest
MAX_LABEL = 32  # bytes of a .cls
MAX_LIST = 2**30  # bytes of a text file
MAX_DEVKIT = 2**26  # bytes of ImageNet's devkit, unpacked; the original has 4 million


@dataclass(frozen=True, kw_only=True)
class Source:
    """Samples in an order that only their names decide, and what `write_shards` has to know of them."""

    samples: list[Sample]
    classes: list[str] | None  # class names, index = label; None: no labels
    root: Path = Path()  # where the samples' files start from
    name: str  # first part of the shards' names
    convert: Callable[[bytes], bytes] | None = None  # makes an image of what a sample reads
    warning: str = ""


# ---- files ---------------------------------------------------------------------------------------------------------


def folder(source: Path) -> Source:
    """The images of a class folder (labels as torchvision's ImageFolder gives them) or of a flat folder (none).

    Images are found by suffix, in class folders at any depth; hidden files and folders are passed over.
    Raises DatasetError if there are none, if a class has none, or if images lie beside class folders.
    """
    if not source.is_dir():
        raise DatasetError(f"{source} is {'a file' if source.exists() else 'missing'}, expected a folder of images")
    flat, others, classes, images = [], 0, [], []
    for entry in sorted(_entries(source), key=lambda entry: entry.name):
        if entry.is_dir():
            classes.append(entry.name)
            images.append(sorted(_images(source, entry.name)))
        elif _is_image(entry.name):
            flat.append(entry.name)
        else:
            others += 1
    if flat and any(images):
        example = next(found[0] for found in images if found)
        raise DatasetError(
            f"{source} mixes images ({flat[0]!r}) with class folders of images ({example!r}): "
            "put every image into a class folder, or all of them into one folder without labels"
        )
    if flat:
        return Source(samples=[Sample(path) for path in flat], classes=None, root=source, name=_name(source))
    if not any(images):
        found = f"{len(classes)} folders without images and {others} other files" if classes or others else "nothing"
        raise DatasetError(f"{source} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}); found {found}")
    if empty := [name for name, found in zip(classes, images, strict=True) if not found]:
        raise DatasetError(
            f"{source} has class folders without an image: {', '.join(map(repr, empty[:5]))}"
            f"{f' and {len(empty) - 5} more' if len(empty) > 5 else ''}. "
            "Each folder is a class and takes a label: fill or remove them"
        )
    samples = [Sample(path, label) for label, found in enumerate(images) for path in found]
    return Source(samples=samples, classes=classes, root=source, name=_name(source))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return [e for e in entries if not e.name.startswith(".") and (e.is_dir() or e.is_file())]


def _images(source: Path, folder: str) -> Iterator[str]:
    """Paths, from `source`, of the images at any depth below `folder`; no folder is entered twice through links."""
    seen: set[tuple[int, int]] = set()
    pending = [folder]
    while pending:
        at = pending.pop()
        status = os.stat(source / at)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in _entries(source / at):
            if entry.is_dir():
                pending.append(f"{at}/{entry.name}")
            elif _is_image(entry.name):
                yield f"{at}/{entry.name}"


def _is_image(path: str) -> bool:
    name = path.rpartition("/")[2]
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _name(source: Path) -> str:
    stem = source.resolve().name.removesuffix(source.suffix if source.is_file() else "")
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in stem) or "shards"


def file_list(file: Path, root: Path | None = None, class_list: Path | None = None) -> Source:
    """The images that a text file names, one a line: PATH or PATH and LABEL, all lines alike; empty lines are passed.

    A tab parts them or, in a file without any tab, a comma; then a path with a comma is quoted as in CSV. Blanks around
    either do not count. A header above numbers is refused, for it would make names of them.
    root        folder that the paths start from; None: that of the list.
    class_list  text file of class names, one a line, index = label. None: whole numbers as labels are indices and name
                their classes themselves, other labels are names, sorted.
    Raises DatasetError naming the first line that does not fit. Files are not looked for: what is missing is left out.
    """
    text = _read_text(file)
    tabs = "\t" in text
    lines = [line if line.strip() else "" for line in text.split("\n")]
    rows = (line.split("\t") for line in lines) if tabs else csv.reader(lines, strict=True)
    paths: list[str] = []
    labels: list[str] = []
    numbers: list[int] = []  # of their lines
    try:
        for number, row in enumerate(rows, 1):
            if not row or row == [""]:
                continue
            if len(row) > 2 or not all(map(str.strip, row)) or (paths and (len(row) == 2) != bool(labels)):
                expected = "PATH and LABEL" if labels else "PATH" if paths else "PATH, or PATH and LABEL"
                found = f"{len(row)} fields parted by {'tabs' if tabs else 'commas'}: {row[:3]}"
                raise DatasetError(f"line {number} of {file} has {found}, expected {expected}")
            paths.append(row[0].strip())
            numbers.append(number)
            labels += (label.strip() for label in row[1:])
    except csv.Error as error:
        raise DatasetError(f"{file} is not a list of files: {error}") from error
    if not paths:
        raise DatasetError(f"{file} is empty, expected one PATH, or PATH and LABEL, a line")
    root = file.parent if root is None else root
    if not labels:
        return Source(samples=[Sample(path) for path in paths], classes=None, root=root, name=_name(file))
    names = _read_lines(class_list) if class_list else None
    numeric = [label.isascii() and label.lstrip("+-").isdigit() for label in labels]
    if all(numeric):
        indices = {label: int(label) if re.fullmatch(r"[+-]?\d{1,9}", label) else -1 for label in labels}
        classes = names or [str(i) for i in range(min(max(indices.values()) + 1, MAX_CLASSES))]
    elif len(labels) > 1 and all(numeric[1:]):
        raise DatasetError(
            f"line {numbers[0]} of {file} looks like a header: its label is {labels[0]!r}, and all others are numbers. "
            "Remove it, or give a number"
        )
    else:
        classes = names or sorted(set(labels))
        indices = {name: label for label, name in enumerate(classes)}
    for number, path, name in zip(numbers, paths, labels, strict=True):
        if indices.get(name, -1) not in range(len(classes)):
            expected = f"a class of {class_list}" if class_list else f"a name, or a number from 0 to {MAX_CLASSES - 1}"
            raise DatasetError(f"line {number} of {file} gives {path!r} the label {name!r}, expected {expected}")
    samples = [Sample(path, indices[name]) for path, name in zip(paths, labels, strict=True)]
    return Source(samples=samples, classes=classes, root=root, name=_name(file))


def _read_text(file: Path) -> str:
    _must_be_file(file)
    if file.stat().st_size > MAX_LIST:
        raise DatasetError(f"{file} has {file.stat().st_size} bytes, more than {MAX_LIST}: expected a text file")
    try:
        return file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{file} is not text in UTF-8: {error}") from error


def _read_lines(file: Path) -> list[str]:
    lines = [line.strip() for line in _read_text(file).split("\n") if line.strip()]
    if not lines:
        raise DatasetError(f"{file} is empty")
    return lines


def _must_be_file(path: Path) -> None:
    if not path.is_file():
        raise DatasetError(f"{path} is {'not a file' if path.exists() else 'missing'}")


# ---- tars ----------------------------------------------------------------------------------------------------------


class TarError(DatasetError):
    """A tar that cannot be read from here on; the message names it, the byte, and what is lost."""


class Member(NamedTuple):
    name: str
    offset: int  # of its content, bytes from the start of the file
    size: int  # bytes
    fault: str  # why it is not read, such as "a symbolic link"; "" for a regular file


MAX_HEADER = 65_536  # bytes of a long name or of a pax header; paths end at 4096
MAX_HEADERS = 8  # of such in a row
MAX_PADDING = 2**20  # bytes after the end mark; tars are padded to 10,240
BLOCK = tarfile.BLOCKSIZE
NOT_READ = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a character device",
    tarfile.BLKTYPE: "a block device",
    tarfile.FIFOTYPE: "a FIFO",
}
PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
HEADERS = (*PAX, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


def members(file: BinaryIO, path: str | Path, start: int = 0, stop: int | None = None) -> Iterator[Member]:
    """The members, without folders, of the tar in `file` from byte `start` to `stop`; None: to its end.

    path  how messages call the tar.
    Reads the headers of ustar, GNU and pax tars; what links, devices and sparse files hold is not read.
    Raises TarError where the tar is cut off or damaged: before `stop` there must be an end mark and nothing after it.
    """
    stop = file.seek(0, os.SEEK_END) if stop is None else stop
    at, name, pax, headers = start, "", dict[str, str](), 0

    def read(offset: int, size: int) -> bytes:
        file.seek(offset)
        return file.read(max(0, min(size, stop - offset)))

    def error(what: str) -> TarError:
        return TarError(f"{path}: {what}; from byte {at} on nothing is read, {max(0, stop - at)} bytes are there")

    while True:
        block = read(at, BLOCK)
        if len(block) < BLOCK:
            raise error(f"the tar is cut off at byte {stop}, before its end mark")
        if not any(block):
            rest = read(at, MAX_PADDING + 1)
            if any(rest) or len(rest) > MAX_PADDING:
                raise error("data follow the end mark")
            return
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            size = int(pax.get("size", info.size))
        except (tarfile.HeaderError, ValueError) as cause:
            hint = " (it is compressed: unpack it first)" if at == start and block.startswith(b"\x1f\x8b") else ""
            raise error(f"no header of a member{hint}: {cause}") from cause
        content = at + BLOCK
        if info.type in HEADERS:
            headers += 1
            if not 0 <= info.size <= MAX_HEADER or headers > MAX_HEADERS:
                raise error(f"header {headers} of one member has {info.size} bytes, at most {MAX_HEADER} are read")
            extension = read(content, info.size)
            if len(extension) < info.size:
                raise error(f"the tar is cut off at byte {stop}, within a header")
            if info.type == tarfile.GNUTYPE_LONGNAME:
                name = extension.partition(b"\0")[0].decode("utf-8", "surrogateescape")
            elif info.type in PAX:
                try:
                    pax |= _pax_records(extension)
                except ValueError as cause:
                    raise error(f"damaged pax header ({cause})") from cause
            at = _padded(content + info.size)
            continue
        name = pax.get("path") or name or info.name
        if info.type == tarfile.GNUTYPE_SPARSE:
            raise error(f"{name!r} is a sparse file")
        holds_data = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES
        if holds_data and not 0 <= size <= stop - content:
            raise error(f"cut off within {name!r}: {max(0, stop - content)} of its {size} bytes are there")
        if not info.isdir():
            fault = NOT_READ.get(info.type, f"of the unknown type {info.type!r}") if not info.isreg() else ""
            if any(key.startswith("GNU.sparse.") for key in pax):
                fault = "a sparse file"
            yield Member(name, content, size, fault)
        at = _padded(content + size) if holds_data else content
        name, pax, headers = "", {}, 0


def _padded(offset: int) -> int:
    return -(-offset // BLOCK) * BLOCK


def _pax_records(header: bytes) -> dict[str, str]:
    """Records "LENGTH KEY=VALUE\\n"; LENGTH counts all of its record. Raises ValueError."""
    records, at = {}, 0
    while at < len(header):
        space = header.index(b" ", at, at + 6)
        stop = at + int(header[at:space])
        key, equals, value = header[space + 1 : stop - 1].partition(b"=")
        if not space < stop <= len(header) or header[stop - 1 : stop] != b"\n" or not equals:
            raise ValueError(f"record at {at} of {len(header)} bytes")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        at = stop
    return records


def webdataset(source: Path, pattern: str = "*.tar", class_list: Path | None = None) -> Source:
    """The images of WebDataset shards: of one tar, or of the tars in a folder whose names fit `pattern`.

    An image is a member with an image's suffix after the last dot of its name; hidden ones are passed over. Its label
    is the whole number in the member of the same name with .cls instead, or with .cls after the first dot of its file
    name: `a/b.left.jpg` takes `a/b.left.cls` or `a/b.cls`. Of members of one name the last counts, as in any tar.
    class_list  text file of class names, one a line. None: those of `dataset.json` beside the tars, else the numbers.
    If any image has a label, one without, or with anything else than a number of a class, is a fault of this sample,
    as are links and devices; what a tar lost that is cut off or damaged is one more faulty sample. Raises DatasetError
    if there is no tar or no image.
    """
    tars = [source] if source.is_file() else sorted(path for path in source.glob(pattern) if path.is_file())
    root = source.parent if source.is_file() else source
    if not tars:
        what = f"holds no tar that fits {pattern!r}" if source.is_dir() else "is missing"
        raise DatasetError(f"{source} {what}, expected WebDataset shards")
    found: list[tuple[str, Member, int | str | None]] = []  # tar, image, label or what is wrong with it
    lost: list[Sample] = []
    for tar in tars:
        tar_name = tar.relative_to(root).as_posix()  # tars of one name may lie in several folders
        images: dict[str, Member] = {}
        labels: dict[str, int | str] = {}
        with open(tar, "rb") as file:
            try:
                for member in members(file, tar_name):
                    stem, suffix = os.path.splitext(member.name)
                    if suffix == ".cls":
                        labels[stem] = read_label(file, member)
                    elif _is_image(member.name):
                        images[member.name] = member
            except TarError as error:
                lost.append(Sample(f"{tar_name}: the rest", fault=str(error), file=tar_name))
        for name, member in images.items():
            stem = os.path.splitext(name)[0]
            folder, slash, file_name = stem.rpartition("/")
            label = labels.get(stem, labels.get(f"{folder}{slash}{file_name.partition('.')[0]}"))
            found.append((tar_name, member, label))
    if not found:
        first = f"; {lost[0].fault}" if lost else ""
        raise DatasetError(f"{source} holds no image in {len(tars)} tars ({', '.join(sorted(IMAGE_SUFFIXES))}){first}")
    labelled = any(label is not None for *_, label in found)
    numbers = [label for *_, label in found if isinstance(label, int)]
    classes = class_names(root, class_list, numbers) if labelled else None
    samples = []
    for tar_name, (name, offset, size, fault), label in found:
        if not fault and classes is not None and (not isinstance(label, int) or label >= len(classes)):
            wrong = "it has no .cls" if label is None else f"its .cls is {label}"
            fault = f"{wrong}, expected a number from 0 to {len(classes) - 1}"
        index = label if isinstance(label, int) else None
        samples.append(Sample(f"{tar_name}/{name}", index, file=tar_name, offset=offset, size=size, fault=fault))
    warning = f"{lost[0].fault} ({len(lost)} of {len(tars)} tars are cut off or damaged)" if lost else ""
    return Source(samples=samples + lost, classes=classes, root=root, name=_name(source), warning=warning)


def read_label(file: BinaryIO, member: Member) -> int | str:
    """The label, or what the member holds or is instead of one."""
    if member.fault:
        return member.fault
    file.seek(member.offset)
    content = file.read(min(member.size, MAX_LABEL))
    label = content.strip()
    if member.size > MAX_LABEL or not label.isdigit() or int(label) >= MAX_CLASSES:
        return repr(content)
    return int(label)


def class_names(root: Path, class_list: Path | None, labels: Collection[int]) -> list[str]:
    """Class names, index = label: those of a text file, else of `dataset.json` in `root`, else the numbers themselves.

    Raises DatasetError if a file gives none.
    """
    manifest = root / "dataset.json"
    if class_list:
        return _read_lines(class_list)
    if not manifest.is_file():
        return [str(i) for i in range(max(labels, default=0) + 1)]
    try:
        classes = json.loads(manifest.read_bytes())["classes"]
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise TypeError(f"classes are {str(classes)[:40]}")
        return classes
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{manifest} gives no class names ({error}); give a list of them, or remove it") from error


# ---- ImageNet ------------------------------------------------------------------------------------------------------


def imagenet_train(archive: Path) -> Source:
    """ILSVRC2012_img_train.tar, a tar of one tar per class: the classes are their WordNet IDs, sorted.

    Labels, names and order are those of the folder that the archive would unpack to. Raises DatasetError, also where
    any of the tars is cut off or damaged: the original must be whole.
    """
    _must_be_file(archive)
    images: dict[str, list[Member]] = {}
    with open(archive, "rb") as file:
        for each in members(file, archive):
            wnid = PurePosixPath(each.name).name.removesuffix(".tar")
            if each.fault or not WNID.fullmatch(wnid) or not each.name.endswith(".tar"):
                found = f"{each.name!r}{f', {each.fault}' if each.fault else ''}"
                raise DatasetError(f"{archive} holds {found}, expected only tars of classes, such as n01440764.tar")
            inside = members(file, f"{archive}, {each.name}", each.offset, each.offset + each.size)
            images[wnid] = sorted(member for member in inside if _is_image(member.name))
    if empty := [wnid for wnid, found in images.items() if not found] or (not images and ["any class"]):
        raise DatasetError(f"{archive} holds no image of {empty[0]}")
    classes = sorted(images)
    samples = [
        Sample(f"{wnid}/{name}", label, file=archive.name, offset=offset, size=size, fault=fault)
        for label, wnid in enumerate(classes)
        for name, offset, size, fault in images[wnid]
    ]
    return _imagenet(archive, "imagenet-train", samples, classes, 1_281_167)


def imagenet_val(archive: Path, truth: Path) -> Source:
    """ILSVRC2012_img_val.tar, with the labels of `truth`; the classes are WordNet IDs, sorted, as in training.

    truth  ILSVRC2012_devkit_t12.tar.gz (this needs scipy), or a text file: lines "FILENAME WNID", or lines "WNID" for
           the images in the order of their names.
    Raises DatasetError unless every image has exactly one label.
    """
    _must_be_file(archive)
    _must_be_file(truth)
    with open(archive, "rb") as file:
        images = sorted(member for member in members(file, archive) if _is_image(member.name))
    names = [PurePosixPath(member.name).name for member in images]
    if not images:
        raise DatasetError(f"{archive} holds no image")
    with open(truth, "rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    classes, wnids = _devkit(truth) if compressed else _ground_truth(truth)
    if isinstance(wnids, list):
        if len(wnids) != len(images):
            raise DatasetError(f"{truth} labels {len(wnids)} images, {archive} has {len(images)}")
        wnids = dict(zip(names, wnids, strict=True))
    if unlabelled := [name for name in names if name not in wnids]:
        raise DatasetError(f"{truth} has no label of {unlabelled[0]!r} and {len(unlabelled) - 1} other images")
    labels = {wnid: label for label, wnid in enumerate(classes)}
    samples = [
        Sample(name, labels[wnids[name]], file=archive.name, offset=offset, size=size, fault=fault)
        for name, (_, offset, size, fault) in zip(names, images, strict=True)
    ]
    return _imagenet(archive, "imagenet-val", samples, classes, 50_000)


def _imagenet(archive: Path, name: str, samples: list[Sample], classes: list[str], original: int) -> Source:
    """The source, with a warning unless it has 1000 classes and `original` samples."""
    has = f"{archive} has {len(classes)} classes and {len(samples)} images, the original 1000 and {original}"
    warning = "" if (len(classes), len(samples)) == (1000, original) else has
    return Source(samples=samples, classes=classes, root=archive.parent, name=name, warning=warning)


def _ground_truth(file: Path) -> tuple[list[str], list[str] | dict[str, str]]:
    """(classes, WNIDs in the order of the images, or by file name)."""
    rows = [line.split() for line in _read_lines(file)]
    for number, row in enumerate(rows, 1):
        if len(row) != len(rows[0]) or len(row) > 2 or not WNID.fullmatch(row[-1]):
            raise DatasetError(f"line {number} of {file} is {' '.join(row)[:80]!r}, expected WNID or FILENAME WNID")
    wnids = [row[-1] for row in rows]
    by_name = {row[0]: row[-1] for row in rows} if len(rows[0]) == 2 else None
    if by_name is not None and len(by_name) != len(rows):
        raise DatasetError(f"{file} names an image twice")
    return sorted(set(wnids)), wnids if by_name is None else by_name


def _devkit(archive: Path) -> tuple[list[str], list[str]]:
    """(classes, WNIDs in the order of the images): the ground truth counts by the IDs of meta.mat, not by WNID."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise DatasetError(
            f"reading {archive} needs scipy, which the extra 'eval' brings; or give a text file, one WNID a line"
        ) from error
    try:
        with gzip.open(archive) as packed:
            data = packed.read(MAX_DEVKIT + 1)
        if len(data) > MAX_DEVKIT:
            raise DatasetError(f"{archive} unpacks to more than {MAX_DEVKIT} bytes: not ImageNet's devkit")
        content = {PurePosixPath(m.name).name: data[m.offset :][: m.size] for m in members(io.BytesIO(data), archive)}
        synsets = loadmat(io.BytesIO(content["meta.mat"]), squeeze_me=True)["synsets"]
        wnids = {int(each["ILSVRC2012_ID"]): str(each["WNID"]) for each in synsets if not each["num_children"]}
        truth = [wnids[int(line)] for line in content["ILSVRC2012_validation_ground_truth.txt"].split()]
    except DatasetError:
        raise
    except Exception as error:  # gzip, scipy and NumPy raise errors of many kinds for bad bytes
        raise DatasetError(f"{archive} is not ImageNet's devkit: {type(error).__name__}: {error}") from error
    if not all(map(WNID.fullmatch, wnids.values())) or len(set(wnids.values())) < len(wnids):
        raise DatasetError(f"{archive} is not ImageNet's devkit: its classes are not WordNet IDs, each once")
    return sorted(wnids.values()), truth


# ---- raw pixels: kept as binary PPM, which is a short header and the pixels -----------------------------------------


def cifar(classes: Literal[10, 100], root: Path, split: Literal["train", "test"], download: bool = False) -> Source:
    """CIFAR-10 or CIFAR-100 (its fine labels) from the original archive in folder `root`, in its order."""
    from torchvision.datasets import CIFAR10, CIFAR100

    data = _original({10: CIFAR10, 100: CIFAR100}[classes], root, download, train=split == "train")
    samples = [
        Sample(f"{split}/{i:05d}.ppm", int(label), ppm(image.tobytes(), 32, 32))
        for i, (image, label) in enumerate(zip(data.data, data.targets, strict=True))
    ]
    return Source(samples=samples, classes=list(data.classes), name=f"cifar{classes}-{split}")


StlSplit = Literal["train", "test", "unlabeled", "train+unlabeled"]


def stl10(root: Path, split: StlSplit, download: bool = False) -> Source:
    """STL-10 from the original archive in folder `root`, in its order; only "train" and "test" have labels.

    The pixels stay in the unpacked files, 2.7 GB for "unlabeled", until each image is written.
    """
    from torchvision.datasets import STL10

    data = _original(STL10, root, download, split="test" if split == "test" else "train")
    _must_be_file(root / STL10.base_folder / STL10.class_names_file)
    labelled = split in ("train", "test")
    size = 3 * STL_SIDE * STL_SIDE
    samples = []
    for part in split.split("+"):
        file = f"{STL10.base_folder}/{part}_X.bin"
        for i in range((root / file).stat().st_size // size):
            label = int(data.labels[i]) if labelled else None
            samples.append(Sample(f"{part}/{i:06d}.ppm", label, file=file, offset=i * size, size=size))
    name = f"stl10-{split.replace('+', '-')}"
    return Source(
        samples=samples, classes=list(data.classes) if labelled else None, root=root, name=name, convert=stl10_ppm
    )


STL_SIDE = 96


def stl10_ppm(pixels: bytes) -> bytes:
    """STL-10's planes of columns as a PPM."""
    import numpy as np

    planes = np.frombuffer(pixels, np.uint8).reshape(3, STL_SIDE, STL_SIDE)
    return ppm(planes.transpose(2, 1, 0).tobytes(), STL_SIDE, STL_SIDE)


def _original(reader: Any, root: Path, download: bool, **split: Any) -> Any:
    """torchvision's reader of what lies unpacked in `root`, of the archive there, or of what it downloads, as told."""
    from torchvision.datasets.utils import check_integrity

    try:
        return reader(root, **split)
    except RuntimeError:  # not unpacked yet, or not wholly
        archive = root / reader.filename
    if not download and not check_integrity(archive, reader.tgz_md5):
        state = "is not the original archive" if archive.exists() else "is missing"
        raise DatasetError(
            f"{archive} {state}, expected {reader.url} there with md5 {reader.tgz_md5} "
            f"(or {root / reader.base_folder}, unpacked from it); put it there, or give --download"
        )
    try:
        return reader(root, download=True, **split)
    except (RuntimeError, OSError) as error:
        raise DatasetError(f"cannot get or unpack {archive}: {error}") from error
