"""Tars: their members, the samples in them, and WebDataset shards as a source of images.

Of a tar only the headers and the labels are read, about 20,000 headers a second (one busy core; a minute for ImageNet),
each through `tarfile.TarInfo` and each held to limits. Samples are those of the webdataset library
(`tariterators.group_by_keys`); pipeline/entries.py has the rules.
"""

import json
import os
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from pipeline.entries import (
    MAX_LABEL,
    MAX_NUMBER,
    NO_DECODER,
    SUFFIXES,
    Tally,
    class_names,
    index_labels,
    is_hidden,
    is_number,
    label_fault,
    no_image,
    places,
)
from pipeline.shards import DatasetError, Sample, split_name
from pipeline.sources import Source, source_name

TARS = "*.[tT][aA][rR]"  # the tars of a folder
MAX_JSON = 2**20  # bytes of a member that holds a label among other things
META = re.compile(r"__[^/]*__($|/)")  # members that webdataset skips
COMPRESSED_NAME = re.compile(r"[.](tgz|tbz2?|txz|tzst|tar[.](gz|bz2|xz|zst|lz4|z))$")
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK": "zip"}

# ---- members


class TarError(DatasetError):
    """A tar that cannot be read from here on; the message names it, the byte, and what is lost."""

    cut_off = ""  # name of the member that is cut off, if one is


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
            packed = [kind for magic, kind in COMPRESSED.items() if at == start and block.startswith(magic)]
            hint = f" (it is compressed by {packed[0]}: unpack it first)" if packed else ""
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
            cut = error(f"cut off within {name!r}: {max(0, stop - content)} of its {size} bytes are there")
            cut.cut_off = name
            raise cut
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


# ---- samples


class TarSample(NamedTuple):
    """A sample with an image that can be tried."""

    tar: str
    key: str
    extension: str  # of the image
    image: Member
    label_member: Member | None
    label: str | None  # None: it has none that could be used
    fault: str  # why, then


@dataclass(slots=True)
class _Group:
    """The members of one key that follow each other, with their extensions."""

    key: str
    members: list[tuple[str, Member]] = field(default_factory=list)
    faulty: list[tuple[str, Member]] = field(default_factory=list)  # links and what else is no whole regular file


def tar_samples(
    file: BinaryIO,
    tar: str,
    tally: Tally,
    *,
    labels: bool = True,
    label_field: str | None = None,
    image_member: str | None = None,
) -> Iterator[TarSample]:
    """The samples of a tar; all other members are counted in `tally`.

    tar           how names and messages call it.
    labels        whether to look for labels, in KEY.cls.
    label_field   field of KEY.json that holds the label instead; a dot leads into a field of a field.
    image_member  extension of the image, as `split_name` spells it; None: as pipeline/entries.py says.
    Raises DatasetError if a sample has several images and nothing says which is meant.
    """
    for group in _groups(file, tar, tally):
        extension = image_member or _image(tar, group)
        extensions = [each for each, _ in group.members]
        unique = len(set(extensions)) == len(extensions)
        twice = "" if unique else next(each for each, count in Counter(extensions).items() if count > 1)
        everything = [*group.members, *group.faulty]
        there = any(each == extension for each, _ in everything)
        image: Member | None = None
        label: Member | None = None
        label_extension = ("json" if label_field else "cls") if labels else None
        for each, member in everything:
            path = f"{tar}/{member.name}"
            if each == extension and not unique:
                detail = f"sample {group.key!r} has several members {twice!r}, which webdataset refuses too"
                tally.leave_out(path, "member twice", detail)
            elif each == extension and (member.fault or not member.size):
                tally.leave_out(path, member.fault or "empty", member.fault or "the image has no bytes")
            elif each == extension:
                image = member
            elif each == label_extension:
                tally.pass_over(path, "label" if there else "label without an image")
                label = label or member
            elif _kind(each) in SUFFIXES and not there:
                tally.leave_out(path, f"no member {image_member}", f"sample {group.key!r} has no {image_member!r}")
            elif _kind(each) in SUFFIXES:
                tally.pass_over(path, "other image of a sample")
            elif _kind(each) in NO_DECODER and not there:
                tally.leave_out(path, f"no decoder for {_kind(each)}")
            else:
                tally.pass_over(path, member.fault or no_image(member.name))
        if image:
            text, fault = _read_label(file, label, label_field) if label else (None, "it has no label")
            yield TarSample(tar, group.key, extension, image, label, text, fault)


def _kind(extension: str) -> str:
    return f".{extension.rpartition('.')[2]}"


def _groups(file: BinaryIO, tar: str, tally: Tally) -> Iterator[_Group]:
    """Samples as webdataset groups them: regular files that follow each other and have one key.

    A key that comes again after another one is a new sample. Links and the like are skipped by webdataset, and end no
    group; here they are kept to say what became of them. What is hidden, has no key, or is called __NAME__ is passed
    over. What lies behind the first damage is lost, and the sample before it has the members that are whole.
    """
    group: _Group | None = None
    faulty = defaultdict[str, list[tuple[str, Member]]](list)

    def closed() -> Iterator[_Group]:
        if group:
            group.faulty = faulty.pop(group.key, [])
            yield group

    for member in _until_damage(file, tar, tally):
        parts = None if is_hidden(member.name) or META.match(member.name) else split_name(member.name)
        if not parts:
            meta = META.match(member.name) and not is_hidden(member.name)
            tally.pass_over(f"{tar}/{member.name}", "__NAME__ of webdataset" if meta else no_image(member.name))
            continue
        key, extension = parts
        if member.fault:
            faulty[key].append((extension, member))
            continue
        if group is None or group.key != key:
            yield from closed()
            group = _Group(key)
        group.members.append((extension, member))
    yield from closed()
    for key, alone in faulty.items():
        yield _Group(key, faulty=alone)


def _until_damage(file: BinaryIO, tar: str, tally: Tally) -> Iterator[Member]:
    """The members up to the first damage; one that is cut off has that as its fault."""
    try:
        yield from members(file, tar)
    except TarError as error:
        tally.lose(tar, str(error))
        if error.cut_off:
            yield Member(error.cut_off, 0, 0, "cut off")


def _image(tar: str, group: _Group) -> str:
    """The extension of the image, "" if there is none. Raises DatasetError if there are several."""
    whole, faulty = (
        {each: None for each, _ in parts if _kind(each) in SUFFIXES} for parts in (group.members, group.faulty)
    )
    images = list(whole or faulty)
    images = [each for each in images if "." not in each] or images
    if len(images) > 1:
        raise DatasetError(
            f"sample {group.key!r} of {tar} has {len(images)} images, {', '.join(images[:5])}: choose one with "
            "--image-member EXT; if the dots belong to names of different images, unpack the tar and use the command "
            "folder, where a name ends at its last dot"
        )
    return images[0] if images else ""


def member_extension(text: str) -> str:
    """What --image-member says, as `split_name` spells it; raises DatasetError if it says nothing."""
    _, extension = split_name(f"key.{text.removeprefix('.')}") or ("", "")
    if not extension:
        raise DatasetError("the image member has no extension, expected one such as 'jpg' or 'left.png'")
    return extension


def _read_label(file: BinaryIO, member: Member, label_field: str | None) -> tuple[str | None, str]:
    """(label, "") or (None, what is wrong with it)."""
    name = f"its label {member.name.rpartition('/')[2]!r}"
    if member.fault:
        return None, f"{name} is {member.fault}"
    most = MAX_JSON if label_field else MAX_LABEL
    if member.size > most:
        return None, f"{name} has {member.size} bytes, more than {most}"
    file.seek(member.offset)
    content = file.read(member.size)
    try:
        text = _field(json.loads(content), label_field) if label_field else content.strip().decode()
    except (ValueError, RecursionError):
        return None, f"{name} is no {'JSON' if label_field else 'text'}: {content[:40]!r}"
    except (KeyError, TypeError):
        return None, f"{name} has no field {label_field!r} with a name or a whole number"
    fault = label_fault(text)
    if is_number(text) and not label_field and member.size > MAX_NUMBER:
        fault = f"has {member.size} bytes, at most {MAX_NUMBER} are read"
    return (None, f"{name} {fault}") if fault else (text, "")


def _field(content: Any, path: str) -> str:
    """The field of a JSON object; its name is taken whole, else dots lead into objects. Raises KeyError, TypeError."""
    if path in content:
        value = content[path]
    else:
        value = content
        for name in path.split("."):
            value = value[name]
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise TypeError(f"{path} is a {type(value).__name__}")
    return str(value).strip()


def compressed_tars(folder: Path) -> list[Path]:
    """The files of a folder that are compressed tars by their names."""
    return sorted(path for path in folder.iterdir() if COMPRESSED_NAME.search(path.name.lower()) and path.is_file())


def tar_labels(
    found: Sequence[tuple[str | None, str, str]], names: Sequence[str] | None, tally: Tally
) -> tuple[list[str] | None, dict[str, int]]:
    """(classes, {label: index}) of samples, each given as (label, fault, its name); (None, {}) where none has a label.

    Raises DatasetError if there are labels and no image has one.
    """
    labels = places([(label, name) for label, _, name in found if label is not None])
    if labels:
        return index_labels(labels, names)
    if unused := tally.named.get("label", []) + tally.named.get("label without an image", []):
        raise DatasetError(
            f"no image has a label that could be used, though there are labels ({unused[0]!r} first): {found[0][2]!r} "
            f"has none since {found[0][1]}. The members of a sample follow each other and have one key; a label is a "
            "name or a whole number; --no-labels does without"
        )
    return None, {}


def no_label(label: str | None, fault: str, classes: Sequence[str]) -> tuple[str, str]:
    """(reason, detail) of leaving out a sample whose label is none of the classes."""
    if label is None:
        return "no label", f"{fault}, and other samples have one"
    return "label of no class", f"its label is {label!r}, and the {len(classes)} classes are {classes[0]!r} ..."


# ---- WebDataset shards


def webdataset(
    source: Path,
    pattern: str | None = None,
    class_list: Path | None = None,
    *,
    labels: bool = True,
    label_field: str | None = None,
    image_member: str | None = None,
) -> Source:
    """The images of WebDataset shards: of one tar, or of the tars in a folder.

    pattern     which tars of the folder; None: *.tar, in upper or lower case.
    class_list  text file of class names, one a line. None: those of `dataset.json` beside the tars, else the labels'.
    labels, label_field, image_member: see `tar_samples`. If any image has a label, those without are left out.
    Raises DatasetError if there is no tar or no image, or if there are labels and no image has one.
    """
    tars = [source] if source.is_file() else sorted(path for path in source.glob(pattern or TARS) if path.is_file())
    root = source.parent if source.is_file() else source
    if not tars:
        others = [path.name for path in compressed_tars(source)] if source.is_dir() else []
        what = f"holds no tar that fits {pattern or '*.tar'!r}" if source.is_dir() else "is missing"
        hint = f"; unpack {others[0]!r} (and {len(others) - 1} others) first" if others else ""
        raise DatasetError(f"{source} {what}, expected WebDataset shards{hint}")
    extension = member_extension(image_member) if image_member is not None else None
    tally = Tally()
    for packed in compressed_tars(source) if source.is_dir() else ():
        tally.leave_out(packed.name, "compressed tar", "unpack it first")
    found: list[TarSample] = []
    for tar in tars:
        name = tar.relative_to(root).as_posix()  # tars of one name may lie in several folders
        with open(tar, "rb") as file:
            found += tar_samples(file, name, tally, labels=labels, label_field=label_field, image_member=extension)
    if not found:
        raise DatasetError(f"{source} holds no image that could be used in {len(tars)} tars; {tally.summary()}")
    names = class_names(root, class_list)
    classes, indices = tar_labels([(s.label, s.fault, f"{s.tar}/{s.image.name}") for s in found], names, tally)
    samples = []
    for sample in found:
        path = f"{sample.tar}/{sample.image.name}"
        label = indices.get(sample.label or "")
        if classes is None or label is not None:
            _, offset, size, _ = sample.image
            samples.append(Sample(path, label, file=sample.tar, offset=offset, size=size))
        else:
            tally.leave_out(path, *no_label(sample.label, sample.fault, classes))
    if not samples:
        raise DatasetError(f"{source} holds no image with a label of a class; {tally.summary()}")
    warning = ""
    if tally.lost:
        warning = f"{tally.lost[0]['detail']} ({len(tally.lost)} of {len(tars)} tars are cut off or damaged)"
    return Source(samples=samples, classes=classes, root=root, name=source_name(source), tally=tally, warning=warning)
