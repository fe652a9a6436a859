"""Shards: tar files with DALI indexes and one manifest, written in one pass and checked before they are read.

A data set is a folder. NAME-000000.tar ... hold KEY.cls (label, ASCII) and KEY.jpg, .png or .webp (the original
bytes); beside each lies NAME-000000.tar.idx in DALI's v1.2 format. `dataset.json` is the manifest, `skipped.jsonl`
names each image left out and why, `_info.json` (timm) and `sizes.json` (open_clip) let others read the shards.

Equal samples, order and options give equal bytes with any number of workers: one process writes one whole shard, and
which samples it gets is settled by the seed alone. A killed run leaves no data set: `publish` renames a finished,
fsynced folder into place. webdataset writes the tars; it takes seconds to import, so only the writing process does.
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

FORMAT, VERSION = "swiftclr-shards", 1
NAME = re.compile(r"[A-Za-z0-9_-]+")
MAX_PIXELS = 64_000_000  # ImageNet's largest training image has 28.5 million
PILLOW_MAX_PIXELS = 178_956_970  # above this Pillow refuses by itself


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
        """The encoded image. Raises OSError, also where the file ends before the image does."""
        if self.fault:
            raise OSError(errno.EINVAL, self.fault)
        if self.data is not None:
            return self.data
        with open(root / (self.file or self.name), "rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) < self.size:
            raise OSError(errno.EIO, f"{len(data)} of {self.size} bytes are there")
        return data


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar of a data set, as the manifest records it. Its index is `file` + ".idx"."""

    file: str
    samples: int
    bytes: int
    sha256: str
    index_sha256: str


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A data set as its manifest records it. From `read_dataset`: manifest, tars and indexes fit each other."""

    root: Path
    name: str
    samples: int
    classes: tuple[str, ...] | None  # class names, index = label; None: no labels
    extensions: tuple[str, ...]  # of the images present, sorted: "jpg", "png", "webp"
    options: dict[str, Any]  # seed, shard_size, verify, max_pixels
    counts: dict[str, Any]  # kept {extension: n}, left_out {reason: n}, per_class [n] or None
    shards: tuple[Shard, ...]

    @property
    def fingerprint(self) -> str:
        """sha256 over the samples, classes and hashes of the shards: the same wherever the folder lies."""
        shards = [[shard.samples, shard.sha256, shard.index_sha256] for shard in self.shards]
        return hashlib.sha256(json.dumps([self.samples, self.classes, shards]).encode()).hexdigest()

    @property
    def labelled(self) -> bool:
        return self.classes is not None

    @property
    def tars(self) -> list[str]:
        return [str(self.root / shard.file) for shard in self.shards]

    @property
    def indexes(self) -> list[str]:
        return [f"{tar}.idx" for tar in self.tars]


# ---- writing -------------------------------------------------------------------------------------------------------


def write_shards(
    samples: Sequence[Sample],
    out: str | Path,
    *,
    classes: Sequence[str] | None,
    root: str | Path = ".",
    name: str = "train",
    shard_size: int | None = None,
    seed: int = 0,
    workers: int = 1,
    verify: bool = True,
    max_pixels: int = MAX_PIXELS,
    convert: Callable[[bytes], bytes] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Write `samples`, shuffled by `seed`, as the data set `out`, which must not exist or be an empty folder.

    classes     class names, index = label; every label lies in it. None: no sample has a label.
    root        folder that the names of file samples start from.
    shard_size  most samples per shard. None: 1000, or fewer so that there are about 16 shards to share among readers.
    workers     processes. 1 works in this process; more need the `if __name__ == "__main__":` of multiprocessing.
    verify      decode every image; False trusts whatever starts like a JPEG, PNG or WebP.
    max_pixels  images with more, by their header, are left out undecoded (decompression bombs).
    convert     makes an image of what a sample reads, such as raw pixels; a function that can be pickled.
    progress    called as progress(images done, images in all) after each shard.
    Images that cannot be used are left out, counted in `Dataset.counts` and listed in `skipped.jsonl`.
    Raises DatasetError for the caller's input, OSError when reading the disk or writing to it fails.
    """
    size = shard_size if shard_size is not None else min(1000, -(-len(samples) // 16))
    _check_options(samples, classes, name, size, workers, max_pixels)
    # random.Random.random() is promised to give the same sequence in every Python version; shuffle() is not.
    rng = random.Random(seed)
    draws = [rng.random() for _ in samples]
    order = sorted(range(len(samples)), key=draws.__getitem__)
    num_shards = -(-len(samples) // size)
    bounds = [len(samples) * i // num_shards for i in range(num_shards + 1)]
    tasks = (
        (f"{name}-{i:06d}.tar", start, [samples[j] for j in order[start:stop]])
        for i, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False))
    )
    shards: list[Shard] = []
    kept: Counter[str] = Counter()
    per_label: Counter[int] = Counter()
    skipped: list[dict[str, str]] = []
    with publish(out) as folder:
        write = partial(_write_shard, folder, Path(root).absolute(), max_pixels if verify else None, convert)
        for written, stop in zip(_run(write, tasks, workers), bounds[1:], strict=True):
            if written.shard:
                file = f"{name}-{len(shards):06d}.tar"  # shards of which nothing is left leave no gap in the numbers
                for suffix in ("", ".idx"):
                    (folder / f"{written.shard.file}{suffix}").rename(folder / f"{file}{suffix}")
                shards.append(replace(written.shard, file=file))
            kept += written.kept
            per_label += written.per_label
            skipped += written.skipped
            if progress:
                progress(stop, len(samples))
        left_out = Counter(each["reason"] for each in skipped)
        if not shards:
            reasons = "; ".join(f"{reason}: {count}" for reason, count in sorted(left_out.items()))
            raise DatasetError(
                f"none of the {len(samples)} images can be used ({reasons}), first {skipped[0]['path']!r}: "
                f"{skipped[0]['detail']}. Nothing was written; JPEG, PNG and WebP files that decode are needed"
            )
        dataset = Dataset(
            root=folder,
            name=name,
            samples=sum(shard.samples for shard in shards),
            classes=None if classes is None else tuple(classes),
            extensions=tuple(sorted(kept)),
            options={"seed": seed, "shard_size": size, "verify": verify, "max_pixels": max_pixels},
            counts={
                "kept": dict(sorted(kept.items())),
                "left_out": dict(sorted(left_out.items())),
                "per_class": None if classes is None else [per_label[label] for label in range(len(classes))],
            },
            shards=tuple(shards),
        )
        manifest = {"format": FORMAT, "version": VERSION, "fingerprint": dataset.fingerprint, **asdict(dataset)}
        del manifest["root"]
        files, lengths = [shard.file for shard in shards], [shard.samples for shard in shards]
        split = {"name": name, "num_samples": sum(lengths), "filenames": files, "shard_lengths": lengths}
        if skipped:
            _write_text(folder / "skipped.jsonl", "".join(f"{json.dumps(each)}\n" for each in skipped))
        _write_text(folder / "_info.json", json.dumps({"splits": {name: split}}, indent=1))
        _write_text(folder / "sizes.json", json.dumps(dict(zip(files, lengths, strict=True)), indent=1))
        _write_text(folder / "dataset.json", json.dumps(manifest, indent=1))
    return read_dataset(out)


@contextlib.contextmanager
def publish(out: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `out` that becomes `out` when the block ends well, and vanishes when it fails.

    The folder is locked while the block runs; what a killed run left in it is removed first. Raises DatasetError if
    `out` is a file, holds anything, or is being written by another process.
    """
    target = Path(out).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        kind = "is not empty" if target.is_dir() else "is a file"
        raise DatasetError(f"{out} {kind}, and nothing is ever overwritten: give a new folder, or remove it yourself")
    temporary = target.with_name(f".{target.name}.partial")
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        lock = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise DatasetError(f"cannot write beside {out}: {error}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.path.samestat(os.fstat(lock), os.stat(temporary))
        except (BlockingIOError, FileNotFoundError):
            held = False
        if not held:
            raise DatasetError(f"{out} is being written by another process, which has locked {temporary}")
        try:
            for leftover in temporary.iterdir():
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            yield temporary
            os.fsync(lock)
            os.rename(temporary, target)  # fails if `out` has been filled meanwhile
        except BaseException:
            shutil.rmtree(temporary)
            raise
        parent = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(parent)
        os.close(parent)
    finally:
        os.close(lock)


@dataclass(frozen=True, slots=True)
class _Written:
    """What one worker reports of one shard; `shard` is None if no image of it could be used."""

    shard: Shard | None
    kept: Counter[str]
    per_label: Counter[int]
    skipped: list[dict[str, str]]


class _Hashed:
    """A file that is only written, and knows its size and sha256 without being read again."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.size, self.sha256 = file, 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.size += len(data)
        self.sha256.update(data)
        return self.file.write(data)


def _write_shard(
    folder: Path,
    root: Path,
    max_pixels: int | None,
    convert: Callable[[bytes], bytes] | None,
    task: tuple[str, int, list[Sample]],
) -> _Written:
    """Write one tar and its index, both fsynced. A key is the sample's place in the shuffled order and its stem."""
    from webdataset import TarWriter

    file, start, samples = task
    kept: Counter[str] = Counter()
    per_label: Counter[int] = Counter()
    skipped: list[dict[str, str]] = []
    lines: list[str] = []
    with open(folder / file, "wb") as raw:
        tar = _Hashed(raw)
        with TarWriter(tar, user="", group="", mtime=0, encoder=False) as writer:
            for position, sample in enumerate(samples, start):
                try:
                    image = sample.read(root)
                    if convert:
                        image = convert(image)
                    extension = _check_image(image, max_pixels)
                except (OSError, _BadImageError) as error:
                    reason = error.reason if isinstance(error, _BadImageError) else "unreadable"
                    skipped.append({"path": sample.name, "reason": reason, "detail": _without_path(error)})
                    continue
                key = f"{position:08d}-{re.sub('[^A-Za-z0-9_-]+', '_', Path(sample.name).stem)[:64]}"
                parts = {extension: image} if sample.label is None else {"cls": b"%d" % sample.label, extension: image}
                line, offset = [], writer.tarstream.offset
                for part, content in sorted(parts.items()):  # as TarWriter does; members are header, data, padding
                    line.append(f"{part} {offset + 512} {len(content)} {key}.{part}")
                    offset += 512 + -(-len(content) // 512) * 512
                writer.write({"__key__": key, **parts})
                assert writer.tarstream.offset == offset, f"{key} ends at {writer.tarstream.offset}, not {offset}"
                lines.append(" ".join(line))
                kept[extension] += 1
                if sample.label is not None:
                    per_label[sample.label] += 1
        raw.flush()
        os.fsync(raw.fileno())
    if not lines:
        (folder / file).unlink()
        return _Written(None, kept, per_label, skipped)
    index = "\n".join([f"v1.2 {len(lines)}", *lines, ""])
    _write_text(folder / f"{file}.idx", index)
    shard = Shard(
        file=file,
        samples=len(lines),
        bytes=tar.size,
        sha256=tar.sha256.hexdigest(),
        index_sha256=hashlib.sha256(index.encode()).hexdigest(),
    )
    return _Written(shard, kept, per_label, skipped)


class _BadImageError(Exception):
    """An image that is left out: `reason` is the kind it is counted under, the message the detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def _check_image(image: bytes, max_pixels: int | None) -> str:
    """Return the extension that the bytes call for, whatever the file was named; None as cap: do not decode."""
    if not image:
        raise _BadImageError("empty", "the file has no bytes")
    if image.startswith(b"\xff\xd8\xff"):
        extension, format = "jpg", "JPEG"
    elif image.startswith(b"\x89PNG\r\n\x1a\n"):
        extension, format = "png", "PNG"
    elif image.startswith(b"RIFF") and image[8:12] == b"WEBP":
        extension, format = "webp", "WEBP"
    elif image.startswith(b"P6"):
        extension, format = "ppm", "PPM"
    else:
        raise _BadImageError("not JPEG, PNG or WebP", f"the file starts with {image[:16]!r}")
    if max_pixels is None:
        return extension
    from PIL import Image

    try:
        # Warnings are of odd EXIF and the like: the pixels are what counts.
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(image), formats=[format]) as picture:
            if picture.width * picture.height > max_pixels:
                raise _BadImageError("too many pixels", f"{picture.width}x{picture.height}, more than {max_pixels}")
            # A JPEG is decoded at 1/8 of its size: every entropy-coded byte is still read, so damage shows just the
            # same (1500 damaged ImageNet files, no verdict differed), at 1.6 times the rate of the full inverse DCT.
            picture.draft(None, (max(1, picture.width // 8), max(1, picture.height // 8)))
            picture.load()
    except (_BadImageError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise _BadImageError("too many pixels", str(error)) from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error ... for bad bytes
        raise _BadImageError("does not decode", f"{type(error).__name__}: {error}") from error
    return extension


def _run(write: Callable[[Any], _Written], tasks: Iterator[Any], workers: int) -> Iterator[_Written]:
    """Map in order. Worker processes start from one server that has imported webdataset, and end with this process."""
    if workers == 1:
        yield from map(write, tasks)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["webdataset", "PIL.Image"])
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        yield from pool.map(write, tasks)
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and do not outlive it: a pool's workers would wait for ever for its next task."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _check_options(
    samples: Sequence[Sample], classes: Sequence[str] | None, name: str, size: int, workers: int, max_pixels: int
) -> None:
    if not samples:
        raise DatasetError("there are no images to write")
    if not NAME.fullmatch(name):
        raise DatasetError(f"name {name!r} must be made of letters, digits, - and _")
    if size < 1 or workers < 1:
        raise DatasetError(f"shard_size and workers must be at least 1, not {size} and {workers}")
    if not 1 <= max_pixels <= PILLOW_MAX_PIXELS:
        raise DatasetError(f"max_pixels must be 1 to {PILLOW_MAX_PIXELS} (Pillow's own limit), not {max_pixels}")
    for sample in samples:
        if sample.fault:  # will be left out, so its label may be what is wrong with it
            continue
        if (sample.label is not None) if classes is None else sample.label not in range(len(classes)):
            expected = "no label" if classes is None else f"a label from 0 to {len(classes) - 1}"
            raise DatasetError(f"{sample.name!r} has label {sample.label!r}, expected {expected}")


def _without_path(error: Exception) -> str:
    """The cause alone: the manifest of a data set does not depend on where its source lay."""
    return error.strerror or type(error).__name__ if isinstance(error, OSError) else str(error)


def _write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


# ---- reading -------------------------------------------------------------------------------------------------------


def read_dataset(path: str | Path) -> Dataset:
    """Read the manifest in folder `path` and check that every tar and index is the one it records.

    Tars are checked by size, indexes by content; no tar is opened, so this takes well under a second for 1,282 shards
    and does not see a flipped bit. Raises DatasetError naming the first faulty file, what was expected and found.
    """
    root = Path(path)
    file = root / "dataset.json"
    remake = "Make the shards anew (python tools/make_shards.py folder IMAGES OUT), or copy the data set again"
    try:
        manifest = json.loads(file.read_bytes())
        kind = (manifest.pop("format"), manifest.pop("version"))
        if kind != (FORMAT, VERSION):
            raise DatasetError(f"{file} is {kind}, this program reads {(FORMAT, VERSION)}. {remake}")
        fingerprint, shards = manifest.pop("fingerprint"), tuple(Shard(**shard) for shard in manifest.pop("shards"))
        for field in ("classes", "extensions"):
            manifest[field] = manifest[field] and tuple(manifest[field])
        dataset = Dataset(root=root, shards=shards, **manifest)
        intact = dataset.fingerprint == fingerprint and dataset.samples == sum(shard.samples for shard in shards)
        intact = intact and all(NAME.fullmatch(shard.file.removesuffix(".tar")) for shard in shards)
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
    faults = [fault for shard in shards if (fault := _fault(root, shard))]
    if faults:
        others = f" ({len(faults) - 1} other shards have faults too)" if len(faults) > 1 else ""
        raise DatasetError(f"{faults[0]}{others}. {remake}")
    return dataset


def _fault(root: Path, shard: Shard) -> str | None:
    """What is wrong with this tar or its index, or None."""
    tar, index = root / shard.file, root / f"{shard.file}.idx"
    try:
        size = tar.stat().st_size
        if size != shard.bytes:
            return f"{tar} has {size} bytes, expected {shard.bytes}: truncated, or not the shard that was written"
        content = index.read_bytes()
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror}), expected a shard of {shard.samples} samples"
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
