"""A data set of shards on disk: what it consists of, and how it is checked before it is read.

A data set is a folder. NAME-000000.tar ... hold KEY.cls (label, ASCII) and KEY.jpg, .png, .webp or .ppm (the original
bytes wherever pipeline/images.py can keep them); beside each lies NAME-000000.tar.idx in DALI's v1.2 format.
`dataset.json` is the manifest, `actions.jsonl` accounts for every entry of the source, `_info.json` (timm) and
`sizes.json` (open_clip) let others read the shards. pipeline/write.py makes it, pipeline/audit.py looks for damage and
leaves samples out later. The tars of other people may lie elsewhere: then the folder holds the manifest and the indexes
alone, which pipeline/index.py makes.
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

from pipeline.images import PILLOW_MAX_PIXELS, BadImageError
from pipeline.store import address, fetch, is_remote
from tools.files import open_binary, read_bytes

# Older versions are read too: 1 had no raw shape and no quarantine, 1 and 2 had their tars beside the manifest, 1 to 3
# had no hash over what the fingerprint leaves out.
FORMAT, VERSION = "swiftclr-shards", 4
NAME = re.compile(r"[A-Za-z0-9_-]+")
SHA256 = re.compile(r"[0-9a-f]{64}")
BLOCK = 512  # bytes: a tar consists of such; the header of a member is the one before its content
SAFE = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) not in "%;")  # spelled as it is in an index
MEMBER_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # webdataset's own rule (tariterators.base_plus_ext)
# Of a file that no second attempt would read; any other error may pass, and costs no image.
NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO}


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

    def read(self, root: Path) -> bytes:
        """The encoded image.

        Raises BadImageError ("unreadable") where it is not there: no such file, no permission, no regular file, or a
        file that ends before the image does. Raises OSError naming the file where reading fails otherwise: the image
        may be sound.
        """
        if self.data is not None:
            return self.data
        path = root / (self.file or self.name)
        try:
            with open_binary(path) as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            if error.errno in NOT_THERE:
                raise BadImageError("unreadable", str(error.strerror)) from error
            hint = f"{error.strerror}; the same command goes on once it can be read"
            raise OSError(error.errno, hint, path) from error
        if len(data) < self.size:
            raise BadImageError("unreadable", f"{len(data)} of {self.size} bytes are there")
        return data


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar of a data set, as the manifest records it."""

    file: str  # path of the tar, relative to the folder of the tars
    samples: int  # in the index; the tar holds the quarantined ones too
    bytes: int
    sha256: str  # of the tar; "": it was indexed where it lies, and not read
    index_sha256: str
    quarantined: int = 0  # samples that a later index leaves out

    @property
    def index(self) -> str:
        """The file of its DALI index, below the manifest; each quarantine adds one, and the first one stays."""
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
    # when written: kept {extension: n}, reencoded, left_out, passed_over {reason: n}, damaged_tars n
    # now: per_class [n] or None, quarantined [key]
    counts: dict[str, Any]
    shards: tuple[Shard, ...]
    raw: tuple[int, int] | None = None  # (height, width) if every image is a PPM of this size: no decoder is needed
    tars_at: str = ""  # folder of the tars, absolute or relative to that of the manifest; "": beside it

    @property
    def fingerprint(self) -> str:
        """sha256 over the samples, classes and hashes of the shards: the same wherever the folders lie.

        The size of a tar stands for its hash where it has none. A run resumes on this fingerprint alone; what else the
        manifest says is covered by a hash of its own, so that runs begun before there was one go on.
        """
        shards = [[shard.samples, shard.sha256 or shard.bytes, shard.index_sha256] for shard in self.shards]
        return hashlib.sha256(json.dumps([self.samples, self.classes, shards]).encode()).hexdigest()

    @property
    def labelled(self) -> bool:
        return self.classes is not None

    @property
    def address(self) -> str:
        """The folder, or s3://bucket/prefix: what `read_dataset` was given."""
        return address(self.root)

    @property
    def tars_address(self) -> str:
        """The folder of the tars. Symbolic links are resolved, so that ".." leads where the file system leads."""
        if not self.tars_at:
            return self.address
        joined = os.path.join(self.address, self.tars_at)
        return address(os.path.normpath(joined)) if is_remote(joined) else os.path.realpath(joined)

    def tar(self, shard: Shard) -> str:
        """Path or address of a tar."""
        return f"{self.tars_address}/{shard.file}"

    def index(self, shard: Shard) -> str:
        """Path or address of the index that goes with a tar now."""
        return f"{self.address}/{shard.index}"

    @property
    def tars(self) -> list[str]:
        folder = self.tars_address
        return [f"{folder}/{shard.file}" for shard in self.shards]

    @property
    def indexes(self) -> list[str]:
        return [self.index(shard) for shard in self.shards]

    def index_contents(self, shards: Sequence[int]) -> list[bytes]:
        """The indexes of these shards, by their numbers. Raises OSError."""
        return fetch([self.index(self.shards[shard]) for shard in shards])


def manifest(dataset: Dataset) -> str:
    """The text of dataset.json."""
    content = {"format": FORMAT, "version": VERSION, "fingerprint": dataset.fingerprint, **asdict(dataset)}
    del content["root"]
    return json.dumps({**content, "sha256": _seal(content)}, indent=1)


def _seal(content: Mapping[str, Any]) -> str:
    """sha256 over all that a manifest says, but where the tars lie: they may be moved."""
    sealed = {name: value for name, value in content.items() if name not in ("sha256", "tars_at")}
    return hashlib.sha256(json.dumps(sealed, sort_keys=True).encode()).hexdigest()


def read_dataset(path: str | Path, *, check: bool = True) -> Dataset:
    """Read the manifest in folder `path`, or below an address in object storage, and check tars and indexes against it.

    Tars are checked by size, indexes by content; no tar is opened, so this takes well under a second for 1,282 shards
    and does not see a flipped bit. In object storage, where objects appear whole, only the indexes are checked.
    check=False leaves even that out. Raises DatasetError naming the first faulty file, what was expected and found.
    """
    root, remote = Path(path), is_remote(address(path))
    file = address(root / "dataset.json")
    remake = "Make the shards anew (python tools/make_shards.py folder IMAGES OUT), or copy the data set again"
    try:
        manifest = json.loads(fetch([file])[0])
        seal = _seal(manifest)
        format, version = manifest.pop("format"), manifest.pop("version")
        if format != FORMAT or type(version) is not int or not 1 <= version <= VERSION:
            raise DatasetError(f"{file} is {(format, version)}, this program reads {(FORMAT, VERSION)}. {remake}")
        _check_fields(manifest)
        intact = version < 4 or manifest.pop("sha256") == seal
        fingerprint, shards = manifest.pop("fingerprint"), tuple(Shard(**shard) for shard in manifest.pop("shards"))
        for field in ("classes", "extensions"):
            manifest[field] = manifest[field] and tuple(manifest[field])
        manifest["raw"] = manifest.get("raw") and tuple(manifest["raw"])
        dataset = Dataset(root=root, shards=shards, **manifest)
        intact = intact and dataset.fingerprint == fingerprint
    except (FileNotFoundError, NotADirectoryError) as error:
        if remote:
            raise DatasetError(f"cannot read {file}: {error.strerror}") from error
        inside = sorted(str(found.parent) for found in root.glob("*/dataset.json"))
        hint = f"Did you mean {' or '.join(inside)}?" if inside else remake
        reason = "it has no dataset.json" if root.exists() else "it does not exist"
        raise DatasetError(f"{root} is no data set: {reason}. {hint}") from error
    except OSError as error:
        raise DatasetError(f"cannot read {file}: {error.strerror}") from error
    except DatasetError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DatasetError(f"{file} is damaged ({type(error).__name__}: {error}). {remake}") from error
    if not intact:
        raise DatasetError(f"{file} has been changed: its content does not give its hashes. {remake}")
    found: list[str | None] = []
    if check and remote:
        try:
            contents = fetch(dataset.indexes)
        except OSError as error:
            raise DatasetError(f"cannot read the indexes of {dataset.address}: {error.strerror}") from error
        found = [
            content_fault(tar, address, shard, None, content)
            for tar, address, shard, content in zip(dataset.tars, dataset.indexes, shards, contents, strict=True)
        ]
    elif check:
        found = list(map(shard_fault, dataset.tars, dataset.indexes, shards))
    faults = [fault for fault in found if fault]
    if faults:
        if dataset.tars_at:
            remake = f"Restore {dataset.tars_address}, or index it anew (python tools/make_shards.py index TARS OUT)"
        others = f" ({len(faults) - 1} other shards have faults too)" if len(faults) > 1 else ""
        raise DatasetError(f"{faults[0]}{others}. {remake}")
    return dataset


def _check_fields(manifest: Mapping[str, Any]) -> None:
    """Raises ValueError naming the first field whose type or range is wrong, KeyError for one that is missing."""

    def expect(fits: bool, field: str, expected: str, value: object) -> None:
        if not fits:
            raise ValueError(f"{field}: expected {expected}, got {repr(value)[:80]}")

    def whole(value: object, low: int = 0, high: int = 2**63 - 1) -> bool:
        return type(value) is int and low <= value <= high  # a bool is an int too

    def texts(value: object, least: int = 0) -> bool:
        return isinstance(value, list) and len(value) >= least and all(isinstance(each, str) for each in value)

    def text(value: object) -> bool:
        try:
            return isinstance(value, str) and b"\0" not in os.fsencode(value)
        except UnicodeEncodeError:  # half a character
            return False

    name, samples, classes, extensions = (manifest[name] for name in ("name", "samples", "classes", "extensions"))
    options, counts, shards = (manifest[name] for name in ("options", "counts", "shards"))
    raw, tars_at = manifest.get("raw"), manifest.get("tars_at", "")
    expect(text(name), "name", "text", name)
    expect(whole(samples, 1), "samples", "a whole number from 1", samples)
    expect(classes is None or texts(classes, 1), "classes", "null or a list of names", classes)
    expect(texts(extensions, 1), "extensions", "a list of extensions", extensions)
    expect(isinstance(options, dict), "options", "an object", options)
    most = options["max_pixels"]
    expect(whole(most, 1, PILLOW_MAX_PIXELS), "options.max_pixels", f"1 to {PILLOW_MAX_PIXELS}", most)
    pair = isinstance(raw, list) and len(raw) == 2 and all(whole(side, 1, most) for side in raw)
    fits = raw is None or (pair and raw[0] * raw[1] <= most)
    expect(fits, "raw", f"null, or height and width of PPMs of up to {most} pixels", raw)
    expect(text(tars_at), "tars_at", "a folder", tars_at)
    expect(isinstance(counts, dict), "counts", "an object", counts)
    for what, count in counts.items():
        if what == "quarantined":
            expect(texts(count), "counts.quarantined", "a list of keys", count)
        elif what == "per_class":
            num = len(classes or ())
            fits = count is None or (isinstance(count, list) and len(count) == num and all(map(whole, count)))
            expect(fits, "counts.per_class", f"null, or a whole number for each of {num} classes", count)
        else:
            fits = all(map(whole, count.values())) if isinstance(count, dict) else whole(count)
            expect(fits, f"counts.{what}", "a whole number from 0, or one by kind", count)
    expect(isinstance(shards, list) and len(shards) > 0, "shards", "a list of them", shards)
    files: set[str] = set()
    for i, shard in enumerate(shards):
        at, left_out = f"shards[{i}]", shard.get("quarantined", 0)
        file, size, held = shard["file"], shard["bytes"], shard["samples"]
        inside = text(file) and _lies_inside(file, bool(tars_at)) and file not in files
        expect(inside, f"{at}.file", "a tar in the folder of the tars, named once", file)
        files.add(file)
        expect(whole(size, 1), f"{at}.bytes", "a whole number from 1", size)
        expect(whole(left_out), f"{at}.quarantined", "a whole number from 0", left_out)
        most = size // (2 * BLOCK) - left_out  # a sample has a header and content
        expect(whole(held, 1, most), f"{at}.samples", f"1 to {most}, for {size} bytes hold no more", held)
        for hash in ("sha256", "index_sha256"):
            digits = shard[hash]
            fits = isinstance(digits, str) and bool(SHA256.fullmatch(digits) or (hash == "sha256" and not digits))
            expect(fits, f"{at}.{hash}", "64 hexadecimal digits", digits)
    total = sum(shard["samples"] for shard in shards)
    expect(samples == total, "samples", f"{total}, as its shards have", samples)


def _lies_inside(file: str, elsewhere: bool) -> bool:
    """Whether a shard's file is NAME.tar, or where tars lie elsewhere, a path that stays inside their folder."""
    if not elsewhere:
        return bool(NAME.fullmatch(file.removesuffix(".tar")))
    return not {"", ".", ".."} & set(file.split("/"))


# ---- indexes


class IndexMember(NamedTuple):
    """A file in a tar, as an index gives it."""

    key: str  # of its sample, as `split_name` gives it
    extension: str  # lower-cased, spelled as in the index: what is not in SAFE is percent-encoded
    offset: int  # bytes from the start of the tar to its content
    size: int  # bytes


def split_name(name: str) -> tuple[str, str] | None:
    """(key, extension) of a member, as webdataset splits its name: the key ends at the first dot of the file name.

    Folders belong to the key; the extension is lower-cased and spelled as in an index. None: webdataset skips the file,
    since its name has no dot, or begins with one.
    """
    found = MEMBER_NAME.match(name)
    return (found[1], _spelled(found[2].lower())) if found else None


def _spelled(text: str) -> str:
    """Text as one word of an index. Its words are parted by spaces, and those of an extension by ";" in DALI."""
    return quote(text, safe=SAFE, errors="surrogateescape")


def index_line(members: Iterable[tuple[str, int, int]]) -> str:
    """A sample's line of an index: EXTENSION OFFSET SIZE NAME for (name, offset, size) of each member of it.

    Ordinary names stand as they are; spaces, control characters, "%", ";" and all but ASCII are percent-encoded.
    """
    words: list[str] = []
    for name, offset, size in members:
        parts = split_name(name)
        assert parts, f"{name!r} has no extension"
        words += (parts[1], str(offset), str(size), _spelled(name))
    return " ".join(words)


def members(line: str) -> list[IndexMember]:
    """The members of a sample, from its line of an index, as `index_line` wrote it. Raises ValueError if malformed."""
    words = line.split(" ")
    if len(words) % 4:
        raise ValueError(
            f"expected EXTENSION OFFSET SIZE NAME again and again, found {len(words)} words: {line[:80]!r}"
        )
    found = []
    for extension, offset, size, name in zip(words[::4], words[1::4], words[2::4], words[3::4], strict=True):
        parts = split_name(unquote(name, errors="surrogateescape"))
        if not parts or parts[1] != extension or int(offset) < BLOCK or int(size) < 0:
            raise ValueError(f"expected EXTENSION OFFSET SIZE NAME, found {extension} {offset} {size} {name[:80]!r}")
        found.append(IndexMember(parts[0], extension, int(offset), int(size)))
    return found


def index_text(lines: Sequence[str]) -> str:
    """DALI's index of a tar: a line for each sample, as `index_line` makes it."""
    return "\n".join([f"v1.2 {len(lines)}", *lines, ""])


# ---- what is wrong with a shard


def shard_fault(tar: str, index: str, shard: Shard) -> str | None:
    """What is wrong with the tar and the index that lie at these paths, or None."""
    try:
        size, content = os.stat(tar).st_size, read_bytes(index)
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror}), expected a shard of {shard.samples} samples"
    return content_fault(tar, index, shard, size, content)


def content_fault(tar: str, index: str, shard: Shard, size: int | None, content: bytes) -> str | None:
    """What is wrong with a tar of `size` bytes (None: not known) or with the content of its index, or None.

    tar, index  how messages call them: their paths or addresses.
    """
    if size is not None and size != shard.bytes:
        was = "written" if shard.sha256 else "indexed"
        return f"{tar} has {size} bytes, expected {shard.bytes}: truncated, or not the shard that was {was}"
    if not content:
        return f"{index} is empty, expected an index of {shard.samples} samples"
    header, lines = content[:40].partition(b"\n")[0], content.count(b"\n") - 1
    if header != b"v1.2 %d" % shard.samples:
        return f"{index} starts with {header!r}, expected 'v1.2 {shard.samples}': not the index of {shard.file}"
    if lines != shard.samples:
        return f"{index} has {lines} lines of {shard.samples} samples: truncated"
    if hashlib.sha256(content).hexdigest() == shard.index_sha256:
        return None
    return f"{index} is stale: it has {shard.samples} samples, but is not the index written with {shard.file}"
