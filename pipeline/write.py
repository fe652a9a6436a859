"""Writing shards: images are shuffled, treated by pipeline/images.py and put into tars, indexed in the same pass.

Equal samples, order and options give equal bytes with any number of workers: one process writes one whole shard, and
which samples it gets is settled by the seed alone. A killed run leaves no data set but a folder beside it, where the
same call goes on after the last finished shard; `publish` renames the finished, fsynced folder into place. webdataset
writes the tars; it takes seconds to import, so only the writing process does.
"""

import contextlib
import hashlib
import json
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from importlib.metadata import version
from itertools import count, islice, takewhile
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.entries import Tally, actions_text
from pipeline.images import MAX_PIXELS, BadImageError, OnBad, Prepared, Rules, Store, ppm_shape, prepare_all
from pipeline.shards import (
    BLOCK,
    NAME,
    VERSION,
    Dataset,
    DatasetError,
    Sample,
    Shard,
    index_line,
    index_text,
    manifest,
    read_dataset,
    shard_fault,
)
from pipeline.workers import DECODERS, in_order
from tools.files import (
    MARK,
    append,
    create,
    empty,
    flush,
    naming,
    open_binary,
    read_text,
    remove,
    remove_workspace,
    take_unfinished,
    write_new,
    write_text,
)

GOES_ON = "make room there, and the same command goes on"  # after a full disk
JOURNAL = "journal.jsonl"


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
    on_bad: OnBad = "reencode",
    store: Store = "original",
    resize: int | None = None,
    quality: int = 90,
    verify: bool = True,
    max_pixels: int = MAX_PIXELS,
    convert: Callable[[bytes], bytes] | None = None,
    tally: Tally | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Write `samples`, shuffled by `seed`, as the data set `out`, which must not exist or be an empty folder.

    classes     class names, index = label; every label lies in it. None: no sample has a label.
    root        folder that the names of file samples start from.
    shard_size  most samples per shard. None: 1000, or fewer so that there are about 16 shards to share among readers.
    workers     processes. 1 works in this process; more need the `if __name__ == "__main__":` of multiprocessing.
    on_bad, store, resize, quality, verify, max_pixels: the rules for images, see `pipeline.images.Rules`.
    convert     makes an image of what a sample reads, such as raw pixels; a function that can be pickled.
    tally       the other entries of the source, of which there is no sample.
    progress    called as progress(images done, images in all) after each shard.
    Images that cannot be used are left out; they and the converted ones are listed in `actions.jsonl`, and all entries
    are counted there and in `Dataset.counts`. Where an earlier call with the same samples (files of the same size and
    time) and options was interrupted, its finished shards are used. Raises DatasetError for the caller's input,
    ValueError for rules that make no sense, OSError when reading the disk or writing to it fails: no image is left out
    for that.
    """
    rules = Rules(on_bad=on_bad, store=store, resize=resize, quality=quality, verify=verify, max_pixels=max_pixels)
    size = shard_size if shard_size is not None else min(1000, -(-len(samples) // 16))
    _check_options(samples, classes, name, size, workers)
    options = {"seed": seed, "shard_size": size, **asdict(rules)}
    # random.Random.random() is promised to give the same sequence in every Python version; shuffle() is not.
    rng = random.Random(seed)
    draws = [rng.random() for _ in samples]
    order = sorted(range(len(samples)), key=draws.__getitem__)
    num_shards = -(-len(samples) // size)
    bounds = [len(samples) * i // num_shards for i in range(num_shards + 1)]
    tasks = (
        (f"{i:06d}.part", start, [samples[j] for j in order[start:stop]])
        for i, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False))
    )
    with publish(out, keep=JOURNAL) as folder, naming(folder, GOES_ON):
        job = {
            **options,
            "name": name,
            "classes": None if classes is None else list(classes),
            "samples": _identity(samples, Path(root)),
            "convert": convert and f"{convert.__module__}.{convert.__qualname__}",
            "versions": [VERSION, version("pillow"), version("webdataset")],
        }
        parts = _finished(folder, job)
        num = sum(part.shard is not None for part in parts)
        write = partial(_write_shard, folder, Path(root).absolute(), rules, convert)
        preload = ("webdataset", *DECODERS) if rules.verify else ("webdataset", "PIL.Image")
        try:
            for part in in_order(write, islice(tasks, len(parts), None), workers, preload):
                if part.shard:  # shards of which nothing is left leave no gap in the numbers
                    part.shard = _rename(folder, part.shard, f"{name}-{num:06d}.tar")
                    num += 1
                parts.append(part)
                _record(folder, job, parts)
                if progress:
                    progress(bounds[len(parts)], len(samples))
            if not num:
                left_out, first = _total(parts, "left_out"), parts[0].actions[0]
                reasons = "; ".join(f"{reason}: {count}" for reason, count in left_out.items())
                raise DatasetError(
                    f"none of the {len(samples)} images can be used ({reasons}), first {first['path']!r}: "
                    f"{first['detail']}. Nothing was written; images that decode are needed"
                )
        except DatasetError:
            remove(folder / JOURNAL)  # what is finished helps no call that could succeed
            raise
        _write_manifest(folder, name, classes, options, parts, tally or Tally())
    return read_dataset(out)


def _write_manifest(
    folder: Path,
    name: str,
    classes: Sequence[str] | None,
    options: dict[str, Any],
    parts: Sequence["_Part"],
    tally: Tally,
) -> None:
    """Join the parts: dataset.json, and what others read."""
    shards = [part.shard for part in parts if part.shard]
    shapes = {part.raw for part in parts if part.shard}
    per_label = _total(parts, "per_label")
    counts = {action: _total(parts, action) for action in ("kept", "reencoded", "left_out")}
    counts["left_out"] = dict(sorted((Counter(counts["left_out"]) + Counter(tally.reasons())).items()))
    counts["passed_over"] = dict(sorted(tally.passed_over.items()))
    dataset = Dataset(
        root=folder,
        name=name,
        samples=sum(shard.samples for shard in shards),
        classes=None if classes is None else tuple(classes),
        extensions=tuple(_total(parts, "stored")),
        options=options,
        counts={
            **counts,
            "damaged_tars": len(tally.lost),
            "per_class": None if classes is None else [per_label.get(str(label), 0) for label in range(len(classes))],
        },
        shards=tuple(shards),
        raw=shapes.pop() if len(shapes) == 1 else None,
    )
    files, lengths = [shard.file for shard in shards], [shard.samples for shard in shards]
    split = {"name": name, "num_samples": sum(lengths), "filenames": files, "shard_lengths": lengths}
    actions = [*(action for part in parts for action in part.actions), *tally.actions()]
    write_new(folder / "actions.jsonl", actions_text(actions, counts, len(tally.lost)))
    write_new(folder / "_info.json", json.dumps({"splits": {name: split}}, indent=1))
    write_new(folder / "sizes.json", json.dumps(dict(zip(files, lengths, strict=True)), indent=1))
    write_new(folder / "dataset.json", manifest(dataset))


@contextlib.contextmanager
def publish(out: str | Path, keep: str | None = None) -> Iterator[Path]:
    """Yield a temporary folder beside `out` that becomes `out` when the block ends well, and vanishes when it fails.

    The folder is locked while the block runs; what a killed run left in it is removed first. `keep` names a file that
    prevents both: a folder that holds it outlives failure, and is yielded as it was left. It and the mark of a folder
    that is unfinished are removed last: a run killed just before leaves them in `out`, which is whole.
    Raises DatasetError if `out` is a file, a mount point, holds anything, or is being written by another process, or
    where anything else has the name of the temporary folder.
    """
    target = Path(out).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        kind = "is not empty" if target.is_dir() else "is a file"
        raise DatasetError(f"{out} {kind}, and nothing is ever overwritten: give a new folder, or remove it yourself")
    if os.path.ismount(target):
        raise DatasetError(f"{out} is a mount point, which no finished folder can replace: give a new folder inside it")
    temporary = target.with_name(f".{target.name}.partial")
    kept = temporary / keep if keep else None
    try:
        lock = take_unfinished(temporary)
    except BlockingIOError as error:
        raise DatasetError(f"{out} is being written by another process, which has locked {temporary}") from error
    except OSError as error:
        raise DatasetError(f"cannot write beside {out}: {error}") from error
    try:
        try:
            if not (kept and kept.exists()):
                empty(temporary)
            yield temporary
            os.fsync(lock)
            os.rename(temporary, target)  # fails if `out` has been filled meanwhile
        except BaseException:
            if not (kept and kept.exists()):
                remove_workspace(temporary)
            raise
        for name in filter(None, (keep, MARK)):
            remove(target / name)
        flush(target.parent)
    finally:
        os.close(lock)


# ---- what an interrupted run leaves to the next one


@dataclass(slots=True)
class _Part:
    """What came of one shard's samples: counted by the worker that writes it, kept in the journal."""

    shard: Shard | None = None  # None: no image could be used
    raw: tuple[int, int] | None = None  # (height, width) if every image is a PPM of this size
    stored: dict[str, int] = field(default_factory=dict)  # by extension
    kept: dict[str, int] = field(default_factory=dict)  # of these, original bytes, by extension
    reencoded: dict[str, int] = field(default_factory=dict)  # and new bytes, by reason
    left_out: dict[str, int] = field(default_factory=dict)  # by reason
    per_label: dict[str, int] = field(default_factory=dict)
    actions: list[dict[str, str]] = field(default_factory=list)  # all that is left out, and what had to be reencoded

    def store(self, sample: Sample, key: str, image: Prepared) -> None:
        _count(self.stored, image.extension)
        if sample.label is not None:
            _count(self.per_label, str(sample.label))
        if image.change is None:
            _count(self.kept, image.extension)
            return
        _count(self.reencoded, image.change)
        if image.odd:
            self.actions.append({"action": "reencoded", "reason": image.change, "path": sample.name, "key": key})

    def leave_out(self, sample: Sample, why: BadImageError) -> None:
        _count(self.left_out, why.reason)
        self.actions.append({"action": "left out", "reason": why.reason, "path": sample.name, "detail": str(why)})


def _count(counts: dict[str, int], what: str) -> None:
    counts[what] = counts.get(what, 0) + 1


def _total(parts: Iterable[_Part], counts: str) -> dict[str, int]:
    total: Counter[str] = Counter()
    for part in parts:
        total.update(getattr(part, counts))
    return dict(sorted(total.items()))


def _identity(samples: Sequence[Sample], root: Path) -> str:
    """sha256 over the samples' names, labels and bytes; for those in files, size and time of change stand for bytes."""

    @lru_cache(maxsize=1024)  # the members of an archive follow each other
    def state(file: str) -> tuple[int, int] | None:
        try:
            status = os.stat(os.path.join(root, file))
        except OSError:
            return None
        return status.st_size, status.st_mtime_ns

    digest = hashlib.sha256()
    for sample in samples:
        content = state(sample.file or sample.name) if sample.data is None else hashlib.sha256(sample.data).digest()
        identity = (sample.name, sample.label, sample.file, sample.offset, sample.size, content)
        digest.update(repr(identity).encode())
    return digest.hexdigest()


def _finished(folder: Path, job: dict[str, Any]) -> list[_Part]:
    """The parts that an interrupted run of this job has finished and that are whole; all other files are removed.

    Raises DatasetError where the folder holds another job's parts.
    """
    journal = folder / JOURNAL
    if not journal.exists():
        return []
    lines = read_text(journal, "ascii", "replace").splitlines(keepends=True)
    saved, *finished = list(takewhile(bool, map(_recorded, count(), lines))) or [job]
    if different := [key for key in job if saved.get(key) != job[key]]:
        raise DatasetError(
            f"{folder} holds {len(finished)} finished shards of another job: {', '.join(different)} differ. "
            "Finish that one with its own samples and options, or remove the folder"
        )
    parts: list[_Part] = []
    for fields in finished:
        shard, raw = fields.pop("shard"), fields.pop("raw")
        part = _Part(shard=shard and Shard(**shard), raw=raw and tuple(raw), **fields)
        if part.shard and not _is_whole(folder, part.shard):
            break
        parts.append(part)
    known = {name for part in parts if part.shard for name in (part.shard.file, part.shard.index)}
    if parts:
        write_text(journal, "".join(lines[: 1 + len(parts)]))
        known.add(JOURNAL)
    empty(folder, keep=known)
    return parts


def _is_whole(folder: Path, shard: Shard) -> bool:
    """Whether tar and index are as they were written; a GB takes about a second."""
    if shard_fault(f"{folder}/{shard.file}", f"{folder}/{shard.index}", shard):
        return False
    with open_binary(folder / shard.file) as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256


def _record(folder: Path, job: dict[str, Any], parts: Sequence[_Part]) -> None:
    """Add the last of the finished parts to the journal; there is none before the first."""
    journal, number = folder / JOURNAL, len(parts)
    if number == 1:
        write_new(journal, _journal_line(0, job) + _journal_line(1, asdict(parts[0])))
    else:
        append(journal, _journal_line(number, asdict(parts[-1])).encode())


def _journal_line(number: int, record: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps([number, record]).encode()).hexdigest()
    return f"{json.dumps({'sha256': digest, 'record': record})}\n"


def _recorded(number: int, line: str) -> dict[str, Any]:
    """What a line of the journal records; nothing if it is cut off, damaged or not of this number."""
    try:
        record = json.loads(line)["record"]
        return record if _journal_line(number, record) == line else {}
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}


def _rename(folder: Path, shard: Shard, file: str) -> Shard:
    renamed = replace(shard, file=file)
    for old, new in ((shard.file, renamed.file), (shard.index, renamed.index)):
        (folder / old).rename(folder / new)
    return renamed


# ---- one shard


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
    rules: Rules,
    convert: Callable[[bytes], bytes] | None,
    task: tuple[str, int, list[Sample]],
) -> _Part:
    """Write one tar and its index, both fsynced. A key is the sample's place in the shuffled order and its stem."""
    from webdataset import TarWriter

    def read(sample: Sample) -> bytes | BadImageError:
        try:
            data = sample.read(root)
            return convert(data) if convert else data
        except BadImageError as error:
            return error

    file, start, samples = task
    part, lines = _Part(), []
    shapes: set[tuple[int, int] | None] = set()
    with create(folder / file) as raw:
        tar = _Hashed(raw)
        with TarWriter(tar, user="", group="", mtime=0, encoder=False) as writer:
            contents = ((placed, read(placed[1])) for placed in enumerate(samples, start))
            for (position, sample), image in prepare_all(contents, rules):
                if isinstance(image, BadImageError):
                    if rules.on_bad == "fail":
                        raise DatasetError(
                            f"{sample.name!r} cannot be stored ({image.reason}: {image}), and on_bad is 'fail': mend "
                            "or remove it, or choose 'skip' or 'reencode'. Nothing was written"
                        ) from image
                    part.leave_out(sample, image)
                    continue
                key = f"{position:08d}-{re.sub('[^A-Za-z0-9_-]+', '_', Path(sample.name).stem)[:64]}"
                lines.append(_add(writer, key, image, sample.label))
                shapes.add(ppm_shape(image.data))
                part.store(sample, key, image)
        raw.flush()
        os.fsync(raw.fileno())
    if not lines:
        remove(folder / file)
        return part
    index = index_text(lines)
    part.raw = shapes.pop() if len(shapes) == 1 else None
    part.shard = Shard(
        file=file,
        samples=len(lines),
        bytes=tar.size,
        sha256=tar.sha256.hexdigest(),
        index_sha256=hashlib.sha256(index.encode()).hexdigest(),
    )
    write_new(folder / part.shard.index, index)
    return part


def _add(writer: Any, key: str, image: Prepared, label: int | None) -> str:
    """Write one sample. Returns its line of the index."""
    members = {image.extension: image.data} if label is None else {"cls": b"%d" % label, image.extension: image.data}
    places, offset = [], writer.tarstream.offset
    for extension, content in sorted(members.items()):  # as TarWriter does; members are header, data, padding
        places.append((f"{key}.{extension}", offset + BLOCK, len(content)))
        offset += BLOCK + -(-len(content) // BLOCK) * BLOCK
    writer.write({"__key__": key, **members})
    assert writer.tarstream.offset == offset, f"{key} ends at {writer.tarstream.offset}, not {offset}"
    return index_line(places)


def _check_options(
    samples: Sequence[Sample], classes: Sequence[str] | None, name: str, size: int, workers: int
) -> None:
    if not samples:
        raise DatasetError("there are no images to write")
    if not NAME.fullmatch(name):
        raise DatasetError(f"name {name!r} must be made of letters, digits, - and _")
    if size < 1 or workers < 1:
        raise DatasetError(f"shard_size and workers must be at least 1, not {size} and {workers}")
    for sample in samples:
        if (sample.label is not None) if classes is None else sample.label not in range(len(classes)):
            expected = "no label" if classes is None else f"a label from 0 to {len(classes) - 1}"
            raise DatasetError(f"{sample.name!r} has label {sample.label!r}, expected {expected}")
