"""Shards hold what was put in, in an order fixed by the seed, and whatever does not fit is refused by name."""

import errno
import hashlib
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.shards import Dataset, DatasetError, Sample, manifest, read_dataset
from pipeline.write import publish, write_shards
from tools.files import MARK, MARK_TEXT, write_mark

ROOT = Path(__file__).parents[1]
NUM = 42  # divides by 1, 2 and 3 ranks


def picture(i: int, format: str = "JPEG", size: int = 16, mode: str = "RGB") -> bytes:
    """Encoded noise, another for every i."""
    noise = np.random.default_rng(i).integers(0, 256, (size, size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(file, format)
    return file.getvalue()


def pictures(num: int = NUM) -> list[Sample]:
    """Samples whose label is their identity."""
    return [Sample(f"class {i}/picture.{i}.jpg", i, picture(i)) for i in range(num)]


def names(num: int = NUM) -> list[str]:
    return [f"class {i}" for i in range(num)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stored(dataset: Dataset) -> list[tuple[str, bytes]]:
    """(member name, bytes) of every member in order, as Python's tarfile sees them."""
    members = []
    for path in dataset.tars:
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                members.append((member.name, file.read()))
    return members


def labels(dataset: Dataset) -> list[int]:
    return [int(content) for name, content in stored(dataset) if name.endswith(".cls")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """42 samples in 9 shards; read only."""
    out = tmp_path_factory.mktemp("made") / "set"
    return write_shards(pictures(), out, classes=names(), shard_size=5, seed=3)


def dali_reader(dataset: Dataset, rank: int = 0, ranks: int = 1, decode: bool = False) -> Any:
    """A pipeline of one sample per run: (image, label); `decode` gives pixels instead of the encoded bytes."""
    from nvidia.dali import Pipeline, fn

    pipeline: Any = Pipeline(batch_size=1, num_threads=1, device_id=None)
    with pipeline:
        outputs: Any = fn.readers.webdataset(
            paths=dataset.tars,
            index_paths=dataset.indexes,
            ext=[";".join(dataset.extensions), "cls"],
            missing_component_behavior="error",
            random_shuffle=True,
            initial_fill=8,
            shard_id=rank,
            num_shards=ranks,
            pad_last_batch=True,
        )
        image, label = outputs
        pipeline.set_outputs(fn.decoders.image(image) if decode else image, label)
    return pipeline


# ---- what is written


def test_webdataset_reads_the_same_bytes_and_labels_back(tmp_path: Path) -> None:
    """Every image comes back byte for byte with its own label, through the format's own reader."""
    import webdataset

    samples = pictures()
    dataset = write_shards(samples, tmp_path / "set", classes=names(), shard_size=10)
    found = {int(each["cls"]): each["jpg"] for each in webdataset.WebDataset(dataset.tars, shardshuffle=False)}
    assert found == {sample.label: sample.data for sample in samples}


def test_members_are_sorted_plain_and_carry_no_time_or_owner(made: Dataset) -> None:
    """The bytes depend on nothing but the samples: no clock, user or machine gets in."""
    everything = []
    for path in made.tars:
        with tarfile.open(path) as tar:
            everything += tar.getmembers()
    assert [m.name for m in everything] == sorted(m.name for m in everything)
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.isreg(), m.mode) for m in everything} == {
        (0, 0, 0, "", "", True, 0o444)
    }
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+\.(cls|jpg)", m.name) for m in everything)


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path, made: Dataset, workers: int) -> None:
    """Every file of the data set, manifest and indexes included, is equal."""
    samples = pictures()
    one = write_shards(samples, tmp_path / "one", classes=names(), shard_size=5, seed=3)
    many = write_shards(samples, tmp_path / "many", classes=names(), shard_size=5, seed=3, workers=workers)
    assert contents(one.root) == contents(many.root)
    assert labels(one) == labels(made)


def test_order_is_a_permutation_set_by_the_seed(tmp_path: Path) -> None:
    """Nothing is lost or doubled, neighbours are separated, and another seed gives another order."""
    samples = pictures(200)
    first = labels(write_shards(samples, tmp_path / "a", classes=names(200), seed=0))
    other = labels(write_shards(samples, tmp_path / "b", classes=names(200), seed=1))
    assert sorted(first) == sorted(other) == list(range(200))
    assert first != other
    neighbours = sum(abs(a - b) == 1 for a, b in zip(first, first[1:], strict=False))
    assert neighbours < 12  # 2 are expected of a random order, 199 of none


def test_index_equals_what_dali_s_own_tool_writes(tmp_path: Path, made: Dataset) -> None:
    """wds2idx reads the finished tar; our index comes from the writing pass and must be the same file."""
    from wds2idx import IndexCreator

    for tar, index in zip(made.tars, made.indexes, strict=True):
        with IndexCreator(tar, str(tmp_path / "idx"), verbose=False) as creator:
            creator.create_index()
        assert Path(index).read_bytes() == (tmp_path / "idx").read_bytes()


def test_index_offsets_point_at_the_images(made: Dataset) -> None:
    """A reader that seeks to an offset finds the bytes that tarfile finds under the name."""
    by_name = dict(stored(made))
    seen = 0
    for tar, index in zip(made.tars, made.indexes, strict=True):
        archive = Path(tar).read_bytes()
        for line in Path(index).read_text().splitlines()[1:]:
            fields = line.split()
            for offset, size, name in zip(fields[1::4], fields[2::4], fields[3::4], strict=True):
                assert archive[int(offset) : int(offset) + int(size)] == by_name[name]
                seen += 1
    assert seen == len(by_name) == 2 * NUM


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_dali_gives_every_sample_once_per_epoch(made: Dataset, ranks: int) -> None:
    """Over all ranks together, in each of two epochs, shuffled; the label is the identity."""
    pipelines = [dali_reader(made, rank, ranks) for rank in range(ranks)]
    epochs = []
    for _ in range(2):
        found = []
        for pipeline in pipelines:
            for _ in range(NUM // ranks):
                image, label = pipeline.run()
                found.append(int(bytes(label.at(0))))
                assert bytes(image.at(0)).startswith(b"\xff\xd8")
        epochs.append(found)
    assert [sorted(found) for found in epochs] == [list(range(NUM))] * 2


def test_timm_reads_the_shards(made: Dataset) -> None:
    """timm finds its split in _info.json and yields every label once."""
    from timm.data import create_dataset

    reader = create_dataset("wds/any", root=str(made.root), split="train", batch_size=1)
    assert len(reader) == NUM
    assert sorted(label for _, label in reader) == list(range(NUM))


def test_manifest_matches_the_files(made: Dataset) -> None:
    """Sizes, hashes and counts in dataset.json and sizes.json are those of the files on disk."""
    sizes = json.loads((made.root / "sizes.json").read_text())
    for shard in made.shards:
        tar = (made.root / shard.file).read_bytes()
        assert (len(tar), hashlib.sha256(tar).hexdigest()) == (shard.bytes, shard.sha256)
        with tarfile.open(made.root / shard.file) as archive:
            assert len(archive.getnames()) == 2 * shard.samples == 2 * sizes[shard.file]
    assert (made.samples, made.extensions, made.labelled) == (NUM, ("jpg",), True)
    assert made.classes == tuple(names())
    assert made.counts == {"kept": {"jpg": NUM}, "reencoded": {}, "left_out": {}} | {
        "passed_over": {},
        "damaged_tars": 0,
        "per_class": [1] * NUM,
    }
    (total,) = (made.root / "actions.jsonl").read_text("ascii").splitlines()
    assert json.loads(total)["entries"] == json.loads(total)["kept"] == NUM
    assert not (made.root / "journal.jsonl").exists()


def test_samples_without_labels_have_no_cls(tmp_path: Path) -> None:
    """An unlabelled set holds images only, and says so."""
    dataset = write_shards([Sample(f"{i}", None, picture(i)) for i in range(5)], tmp_path / "set", classes=None)
    assert not dataset.labelled
    assert [name.partition(".")[2] for name, _ in stored(dataset)] == ["jpg"] * 5


@pytest.mark.parametrize(("num", "shards", "largest"), [(3, 3, 1), (64, 16, 4), (100, 15, 7)])
def test_small_sets_still_have_shards_for_several_readers(tmp_path: Path, num: int, shards: int, largest: int) -> None:
    """Without a shard_size, about 16 shards of nearly equal length."""
    dataset = write_shards(pictures(num), tmp_path / "set", classes=names(num))
    lengths = [shard.samples for shard in dataset.shards]
    assert (len(lengths), max(lengths)) == (shards, largest)
    assert max(lengths) - min(lengths) <= 1


def test_fingerprint_is_of_the_content_alone(tmp_path: Path) -> None:
    """A moved data set is the same one; another seed, label or image makes another."""
    samples = pictures()
    same = write_shards(samples, tmp_path / "elsewhere", classes=names(), shard_size=5, seed=3)
    moved = (tmp_path / "elsewhere").rename(tmp_path / "moved")
    assert read_dataset(moved).fingerprint == same.fingerprint
    changed = [Sample("x", 1, samples[0].data), *samples[1:]]
    prints = {
        write_shards(samples, tmp_path / "seed", classes=names(), shard_size=5, seed=4).fingerprint,
        write_shards(changed, tmp_path / "label", classes=names(), shard_size=5, seed=3).fingerprint,
        write_shards(samples, tmp_path / "names", classes=names()[::-1], shard_size=5, seed=3).fingerprint,
        same.fingerprint,
    }
    assert len(prints) == 4


# ---- images that cannot be used


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces its size and has next to no pixels: asked to decode, it fails otherwise."""
    chunks = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b"")
    framed = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


BAD = {
    "zero byte": (b"", "empty"),
    "half a GIF": ((gif := picture(1, "GIF", size=64, mode="L"))[: len(gif) // 2], "does not decode"),
    "web page": (b"<!DOCTYPE html><html>404</html>", "no image"),
    "half a JPEG": ((jpeg := picture(2, size=256))[: len(jpeg) // 2], "does not decode"),
    "JPEG without its last tenth": (jpeg[: len(jpeg) * 9 // 10], "does not decode"),
    "JPEG header": (jpeg[:100], "does not decode"),
    "half a PNG": ((png := picture(3, "PNG", size=64))[: len(png) // 2], "does not decode"),
    "PNG with a flipped byte": (png[:500] + bytes([png[500] ^ 255]) + png[501:], "does not decode"),
    "half a WebP": ((webp := picture(4, "WEBP", size=64))[: len(webp) // 2], "does not decode"),
    "decompression bomb": (png_header(30_000, 30_000), "too many pixels"),
    "image over the cap": (png_header(8_001, 8_000), "too many pixels"),
    "image under the cap without pixels": (png_header(8_000, 8_000), "does not decode"),
    "missing file": (None, "unreadable"),
}


def test_bad_images_among_good_ones_are_left_out_counted_and_named(tmp_path: Path) -> None:
    """The good ones stay with their labels; every bad one is listed with its reason."""
    bad = [Sample(f"bad/{name}", 0, data) for name, (data, _) in BAD.items()]
    good = pictures(30)
    dataset = write_shards([*bad, *good], tmp_path / "set", classes=names(30), root=tmp_path, shard_size=6)
    assert sorted(labels(dataset)) == list(range(30))
    *listed, _ = [json.loads(line) for line in (dataset.root / "actions.jsonl").read_text().splitlines()]
    assert {each["path"]: each["reason"] for each in listed} == {
        f"bad/{name}": reason for name, (_, reason) in BAD.items()
    }
    assert all(each["detail"] for each in listed)
    assert dataset.counts["left_out"] == Counter(reason for _, reason in BAD.values())
    assert dataset.samples == sum(shard.samples for shard in dataset.shards) == 30


def test_shards_of_which_nothing_is_left_leave_no_gap(tmp_path: Path) -> None:
    """One sample per shard and every second one bad: the numbers still run from 0 without a hole."""
    samples = [Sample(f"{i}", i, picture(i) if i % 2 else b"") for i in range(10)]
    dataset = write_shards(samples, tmp_path / "set", classes=names(10), shard_size=1)
    assert [shard.file for shard in dataset.shards] == [f"train-{i:06d}.tar" for i in range(5)]
    assert sorted(labels(dataset)) == [1, 3, 5, 7, 9]
    assert dataset.counts["per_class"] == [0, 1] * 5
    assert len(list(dataset.root.iterdir())) == 2 * 5 + 4


def test_without_verification_only_headers_are_looked_at(tmp_path: Path) -> None:
    """A truncated JPEG passes, an empty file and a web page still do not."""
    samples = [Sample("half", 0, BAD["half a JPEG"][0]), Sample("empty", 0, b""), Sample("page", 0, b"<html>")]
    dataset = write_shards(samples, tmp_path / "set", classes=["a"], verify=False)
    assert dataset.counts["left_out"] == {"empty": 1, "no image": 1}
    assert dataset.samples == 1


# ---- input that cannot be used, and what is left behind


def test_a_set_without_one_good_image_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    """The message names the reasons and the first file."""
    with pytest.raises(DatasetError, match=r"none of the 2 images can be used \(empty: 2\), first '[ab]'"):
        write_shards([Sample("a", 0, b""), Sample("b", 0, b"")], tmp_path / "set", classes=["x"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("label", [-1, 2, None, "1"])
def test_a_label_outside_the_classes_is_refused(tmp_path: Path, label: int | None) -> None:
    """Before anything is written, naming the sample, its label and the range."""
    with pytest.raises(DatasetError, match=rf"'odd' has label {label!r}, expected a label from 0 to 1"):
        write_shards([Sample("odd", label, picture(0))], tmp_path / "set", classes=["a", "b"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "a/b"}, "name 'a/b'"),
        ({"name": ""}, "name ''"),
        ({"shard_size": 0}, "shard_size and workers must be at least 1"),
        ({"workers": 0}, "shard_size and workers must be at least 1"),
        ({"max_pixels": 10**9}, "max_pixels must be 1 to 178956970"),
        ({"resize": 0}, "resize must be at least 1 pixel, not 0"),
        ({"quality": 101}, "quality must be 1 to 100, not 101"),
        ({"on_bad": "ignore"}, "on_bad and store must be .* not 'ignore' and 'original'"),
        ({"store": "png"}, "on_bad and store must be .* not 'reencode' and 'png'"),
    ],
)
def test_nonsense_options_are_refused(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_shards(pictures(2), tmp_path / "set", classes=names(2), **options)
    assert list(tmp_path.iterdir()) == []


def test_no_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no images"):
        write_shards([], tmp_path / "set", classes=None)


def test_what_exists_is_never_overwritten(tmp_path: Path) -> None:
    """A file, or a folder that holds anything, stays exactly as it is; an empty folder may be filled."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    for name, reason in (("file", "is a file"), ("full", "is not empty"), ("file/below", "cannot write")):
        with pytest.raises(DatasetError, match=reason):
            write_shards(pictures(2), tmp_path / name, classes=names(2))
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")} == {"file", "full", "full/note"}
    (tmp_path / "empty").mkdir()
    assert write_shards(pictures(2), tmp_path / "empty", classes=names(2)).samples == 2


def test_a_mount_point_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished folder is renamed into place, and the kernel lets nothing replace a mount point."""
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "disk")
    with pytest.raises(DatasetError, match="disk is a mount point.*give a new folder inside it"):
        write_shards(pictures(2), tmp_path / "disk", classes=names(2))
    assert [path.name for path in tmp_path.iterdir()] == ["disk"]
    assert write_shards(pictures(2), tmp_path / "disk" / "set", classes=names(2)).samples == 2


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    """Two runs on one folder cannot mix: the second stops at the first one's lock, and the first goes on."""
    with publish(tmp_path / "set") as folder:
        (folder / "mine").write_text("")
        with pytest.raises(DatasetError, match="is being written by another process"):
            write_shards(pictures(2), tmp_path / "set", classes=names(2))
        assert (folder / "mine").exists()
    assert [p.name for p in (tmp_path / "set").iterdir()] == ["mine"]


def test_leftovers_of_a_killed_run_do_not_get_in(tmp_path: Path) -> None:
    """What an unlocked temporary folder of ours holds is thrown away."""
    (tmp_path / ".set.partial" / "old").mkdir(parents=True)
    write_mark(tmp_path / ".set.partial")
    (tmp_path / ".set.partial" / "train-000099.tar").write_text("old")
    write_shards(pictures(3), tmp_path / "set", classes=names(3))
    clean = write_shards(pictures(3), tmp_path / "clean", classes=names(3))
    assert set(contents(tmp_path / "set")) == set(contents(clean.root))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clean", "set"]


@pytest.mark.parametrize("what", ["folder", "link", "file"])
def test_nobodys_folder_is_emptied_for_its_name(what: str, tmp_path: Path) -> None:
    """What lies at the temporary name and is not ours is named, and stays as it is; so does what a link leads to."""
    temporary, victim = tmp_path / ".set.partial", tmp_path / "victim"
    victim.mkdir()
    (victim / "mine").write_text("mine")
    if what == "folder":
        victim.rename(temporary)
    elif what == "link":
        (victim / MARK).write_bytes(MARK_TEXT)
        temporary.symlink_to(victim)
    else:
        temporary.write_text("mine")
    before = sorted((path, path.is_dir() or path.read_text()) for path in tmp_path.rglob("*"))
    with pytest.raises(DatasetError, match=r"in the way.*remove it: '.*\.set\.partial'"):
        write_shards(pictures(3), tmp_path / "set", classes=names(3))
    assert sorted((path, path.is_dir() or path.read_text()) for path in tmp_path.rglob("*")) == before


# ---- interrupted and started again


def stop_after(images: int) -> Callable[[int, int], None]:
    """A progress report that fails as soon as so many images are done."""

    def stop(done: int, total: int) -> None:
        if done >= images:
            raise RuntimeError(f"{done} of {total}")

    return stop


def test_a_failure_before_the_first_shard_leaves_nothing(tmp_path: Path) -> None:
    """Here a folder and a missing file: there is nothing that a next call could go on from."""
    (tmp_path / "images" / "a").mkdir(parents=True)
    samples = [Sample("a", 0), Sample("b", 0)]
    with pytest.raises(DatasetError, match="none of the 2 images can be used"):
        write_shards(samples, tmp_path / "set", classes=["x"], root=tmp_path / "images")
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path, workers: int) -> None:
    """Finished shards stay untouched, also those of which nothing was left, and the end is as if nothing happened."""
    samples = [*pictures(18), Sample("bad", 0, b"<html>"), Sample("odd.png", 1, picture(9, "PNG", mode="RGBA"))]
    call: dict[str, Any] = {"classes": names(20), "shard_size": 1}
    whole = write_shards(samples, tmp_path / "whole", **call)
    with pytest.raises(RuntimeError, match="12 of 20"):
        write_shards(samples, tmp_path / "set", **call, workers=workers, progress=stop_after(12))
    partial = tmp_path / ".set.partial"
    finished = {path.name: path.stat().st_mtime_ns for path in partial.glob("train-*")}
    assert len(finished) in (22, 24)
    (partial / "train-000099.tar").write_bytes(b"of an unfinished shard")
    calls: list[int] = []
    again = write_shards(samples, tmp_path / "set", **call, progress=lambda done, _: calls.append(done))
    assert calls == list(range(13, 21))
    assert contents(again.root) == contents(whole.root)
    assert {name: (again.root / name).stat().st_mtime_ns for name in finished} == finished
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "whole"]


def test_a_disk_that_fails_for_a_while_drops_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call ends naming the file; what is finished stays, and the same call ends as if nothing had happened."""
    for i in range(12):
        (tmp_path / f"{i}.jpg").write_bytes(picture(i))
    call: dict[str, Any] = {"samples": [Sample(f"{i}.jpg") for i in range(12)], "classes": None, "root": tmp_path}
    whole = write_shards(out=tmp_path / "whole", shard_size=3, **call)
    opened: list[Path] = []

    def fail_at_the_tenth(path: Path, *arguments: Any, **options: Any) -> Any:
        opened.extend([path] if path.suffix == ".jpg" else [])
        if len(opened) == 10:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return open(path, "rb", *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.shards.open_binary", fail_at_the_tenth)
        with pytest.raises(OSError, match=r"Input/output error; the same command goes on .*/\d+.jpg"):
            write_shards(out=tmp_path / "set", shard_size=3, **call)
    done: list[int] = []
    again = write_shards(out=tmp_path / "set", shard_size=3, **call, progress=lambda each, _: done.append(each))
    assert done == [12]
    assert contents(again.root) == contents(whole.root)


def test_a_set_that_cannot_be_renamed_into_place_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shard stays until the set has its name, and the same call has nothing left to write but the manifest."""

    rename = os.rename

    def fail(old: Path, new: Path) -> None:
        if new == tmp_path / "set":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        rename(old, new)

    whole = write_shards(pictures(8), tmp_path / "whole", classes=names(8), shard_size=2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)
        with pytest.raises(OSError, match="busy"):
            write_shards(pictures(8), tmp_path / "set", classes=names(8), shard_size=2)
    done: list[int] = []
    call: dict[str, Any] = {"classes": names(8), "shard_size": 2, "progress": lambda each, _: done.append(each)}
    assert contents(write_shards(pictures(8), tmp_path / "set", **call).root) == contents(whole.root)
    assert not done


CHANGES: dict[str, tuple[Callable[[Path], object], dict[str, Any], str]] = {
    "another seed": (lambda _: None, {"seed": 1}, "seed differ"),
    "another rule": (lambda _: None, {"resize": 8}, "resize differ"),
    "another quality and name": (lambda _: None, {"quality": 80, "name": "x"}, "quality, name differ"),
    "another conversion": (lambda _: None, {"convert": bytes}, "convert differ"),
    "another shard size": (lambda _: None, {"shard_size": 3}, "shard_size differ"),
    "a file of another size": (lambda root: (root / "3").write_bytes(picture(99)), {}, "samples differ"),
    "a file written again": (lambda root: os.utime(root / "3", ns=(0, 0)), {}, "samples differ"),
    "a file removed": (lambda root: (root / "3").unlink(), {}, "samples differ"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_job_does_not_take_over_what_an_interrupted_one_left(tmp_path: Path, change: str) -> None:
    """It is refused naming what differs, and what is finished stays for the job it belongs to."""
    root = tmp_path / "images"
    root.mkdir()
    for i in range(6):
        (root / f"{i}").write_bytes(picture(i))
    call: dict[str, Any] = {"classes": None, "root": root, "shard_size": 2}
    with pytest.raises(RuntimeError, match="4 of 6"):
        write_shards([Sample(f"{i}") for i in range(6)], tmp_path / "set", **call, progress=stop_after(4))
    before = contents(tmp_path / ".set.partial")
    act, options, message = CHANGES[change]
    act(root)
    with pytest.raises(DatasetError, match=f"2 finished shards of another job: {message}.*remove the folder"):
        write_shards([Sample(f"{i}") for i in range(6)], tmp_path / "set", **call | options)
    assert contents(tmp_path / ".set.partial") == before


DAMAGES = ["torn journal", "truncated tar", "missing index", "torn first line"]
DAMAGES += ["changed tar", "changed count", "line twice", "line of another type", "deep JSON"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_whole_is_written_again(tmp_path: Path, damage: str) -> None:
    """A power cut or a bad disk may leave more behind than a killed process does."""
    whole = write_shards(pictures(8), tmp_path / "whole", classes=names(8), shard_size=2)
    with pytest.raises(RuntimeError, match="6 of 8"):
        write_shards(pictures(8), tmp_path / "set", classes=names(8), shard_size=2, progress=stop_after(6))
    partial = tmp_path / ".set.partial"
    journal, tar = partial / "journal.jsonl", partial / "train-000001.tar"
    first, *rest = journal.read_bytes().splitlines(keepends=True)
    if damage == "torn journal":
        journal.write_bytes(first + b"".join(rest)[:-20])
    elif damage == "torn first line":
        journal.write_bytes(first[:20])
    elif damage == "truncated tar":
        tar.write_bytes(tar.read_bytes()[:-512])
    elif damage == "changed tar":
        content = tar.read_bytes()
        tar.write_bytes(content[:700] + bytes([content[700] ^ 1]) + content[701:])
    elif damage == "changed count":
        journal.write_bytes(first + b"".join(rest).replace(b'"jpg": 2', b'"jpg": 3'))
    elif damage == "line twice":
        journal.write_bytes(first + rest[0] + b"".join(rest))
    elif damage in ("line of another type", "deep JSON"):
        journal.write_bytes(first + rest[0] + (b"7\n" if damage[0] == "l" else b"[" * 100_000 + b"\n"))
    else:
        Path(f"{tar}.idx").unlink()
    assert contents(write_shards(pictures(8), tmp_path / "set", classes=names(8), shard_size=2).root) == contents(
        whole.root
    )


KILLED = """
import os, random, signal, sys, time
from dataclasses import replace
from pathlib import Path
import PIL.Image, webdataset  # the slow part, once for all runs
from pipeline.write import write_shards
from tests.test_shards import names, pictures

def write(name):
    write_shards(samples, out / name, classes=names(160), shard_size=4, resize=12)

out, samples, rng = Path(sys.argv[1]), pictures(160), random.Random(0)
start = time.monotonic()
write("whole")
seconds = time.monotonic() - start
kills = done = 0
while kills < 10 or not done or list(out.glob(".*")):
    child = os.fork()
    if not child:
        write(f"set{done}")
        os._exit(0)
    if kills < 10:
        time.sleep(rng.uniform(0, 0.2 * seconds))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    kills += os.WIFSIGNALED(status)
    done += (out / f"set{done}").exists()
print(kills)
"""


def test_killed_at_ten_random_moments_the_shards_are_the_same(tmp_path: Path) -> None:
    """kill -9 again and again, each time going on: every file is as in a run that was left alone."""
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "10\n"), done.stderr
    for folder in tmp_path.iterdir():
        assert contents(folder) == contents(tmp_path / "whole"), folder
    assert not list(tmp_path.glob(".*"))


# ---- reading a set that is not what its manifest says


def edit(file: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda root: (root / file).write_bytes(change((root / file).read_bytes()))


def edit_manifest(**changes: object) -> Callable[[Path], object]:
    return edit("dataset.json", lambda text: json.dumps({**json.loads(text), **changes}).encode())


TAR, IDX = "train-000001.tar", "train-000001.tar.idx"
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing tar": (lambda root: (root / TAR).unlink(), rf"{TAR} cannot be read .*expected a shard of 4 samples"),
    "empty tar": (edit(TAR, lambda _: b""), rf"{TAR} has 0 bytes, expected \d+"),
    "truncated tar": (edit(TAR, lambda tar: tar[:-512]), rf"{TAR} has \d+ bytes, expected \d+: truncated"),
    "longer tar": (edit(TAR, lambda tar: tar + bytes(512)), rf"{TAR} has \d+ bytes, expected \d+"),
    "missing index": (lambda root: (root / IDX).unlink(), rf"{IDX} cannot be read"),
    "empty index": (edit(IDX, lambda _: b""), rf"{IDX} is empty, expected an index of 4 samples"),
    "garbage index": (edit(IDX, lambda _: b"\x00\xff garbage"), rf"{IDX} starts with .*garbage.*expected 'v1.2 4'"),
    "older index format": (edit(IDX, lambda i: i.replace(b"v1.2", b"v1.1")), rf"{IDX} starts with b'v1.1 4'"),
    "index of a longer shard": (edit(IDX, lambda i: i.replace(b"v1.2 4", b"v1.2 9")), rf"{IDX} starts with b'v1.2 9'"),
    "truncated index": (
        edit(IDX, lambda i: i[: i.index(b"\n", 50) + 1]),
        rf"{IDX} has 1 lines of 4 samples: truncated",
    ),
    "index of another shard": (
        lambda root: (root / IDX).write_bytes((root / "train-000002.tar.idx").read_bytes()),
        rf"{IDX} is stale",
    ),
    "index with a wrong offset": (edit(IDX, lambda i: i.replace(b"cls 512 ", b"cls 999 ")), rf"{IDX} is stale"),
    "missing manifest": (lambda root: (root / "dataset.json").unlink(), "has no dataset.json"),
    "empty manifest": (edit("dataset.json", lambda _: b""), "dataset.json is damaged"),
    "truncated manifest": (edit("dataset.json", lambda text: text[:300]), "dataset.json is damaged"),
    "manifest that is a list": (edit("dataset.json", lambda _: b"[]"), "dataset.json is damaged"),
    "unknown format version": (edit_manifest(version=99), r"dataset.json is .*99.*this program reads"),
    "another program's manifest": (edit_manifest(format="other"), r"dataset.json is .*other"),
    "manifest without shards": (edit_manifest(shards=[]), "dataset.json is damaged .*shards: expected a list"),
    "manifest with another count": (edit_manifest(samples=5), "samples: expected 12, as its shards have, got 5"),
    "manifest with other classes": (edit_manifest(classes=["a"]), "counts.per_class: .* for each of 1 classes"),
    "manifest with an unknown key": (edit_manifest(colour="red"), "dataset.json is damaged"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_set_is_refused_by_name(tmp_path: Path, fault: str) -> None:
    """Each fault ends in a message that names the file, what was expected, and how to go on."""
    write_shards(pictures(12), tmp_path / "set", classes=names(12), shard_size=4)
    damage, message = FAULTS[fault]
    damage(tmp_path / "set")
    with pytest.raises(DatasetError, match=message) as caught:
        read_dataset(tmp_path / "set")
    assert "python tools/make_shards.py" in str(caught.value)


CHANGED: dict[str, object] = {
    "name": "other",
    "extensions": ["png"],
    "options": {"max_pixels": 1},
    "raw": [16, 16],
    "counts": {"left_out": {"empty": 1}},
    "classes": [str(i) for i in range(NUM)],
}


@pytest.mark.parametrize("field", CHANGED)
def test_a_manifest_that_was_changed_in_any_field_is_refused(tmp_path: Path, made: Dataset, field: str) -> None:
    """A changed raw would train on cut images."""
    (tmp_path / "dataset.json").write_bytes((made.root / "dataset.json").read_bytes())
    assert read_dataset(tmp_path, check=False).fingerprint == made.fingerprint
    edit_manifest(**{field: CHANGED[field]})(tmp_path)
    with pytest.raises(DatasetError, match="dataset.json has been changed"):
        read_dataset(tmp_path, check=False)


def test_manifests_without_a_hash_of_their_own_are_read(tmp_path: Path, made: Dataset) -> None:
    """Those of version 3, on whose fingerprints runs resume; another version's number does not undo the hash."""
    content = json.loads((made.root / "dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps(content | {"version": 3}))
    with pytest.raises(DatasetError, match="is damaged"):
        read_dataset(tmp_path, check=False)
    del content["sha256"]
    (tmp_path / "dataset.json").write_text(json.dumps(content | {"version": 3}))
    assert read_dataset(tmp_path, check=False) == replace(made, root=tmp_path)


NO_NUMBERS = (10**30, -1, 0, 1.5, True, "4", None, [])
ABSURD = {
    "samples": NO_NUMBERS,
    "name": (3, None, "a\0b"),
    "classes": ([], "ab", [1, 2], {}),
    "extensions": ([], "jpg", [1]),
    "options": ([], {"max_pixels": 10**30}, {"max_pixels": -1}, {"max_pixels": True}),
    "raw": ([], [16], [10**30, 1], [0, 4], [1.5, 2], 16, "16", [-4, -4]),
    "tars_at": (3, None, "\0", "\ud800"),
    "counts": ([], {"left_out": {"empty": -1}}, {"kept": [1]}, {"per_class": [10**30]}, {"quarantined": [3]}),
    "shards": ([], {}, None),
    "shards[0].samples": NO_NUMBERS,
    "shards[0].bytes": NO_NUMBERS,
    "shards[0].quarantined": (10**30, -1, 1.5, True, "4", None),
    "shards[0].sha256": (3, "ab", None),
    "shards[0].index_sha256": (3, "", None),
    "shards[0].file": (3, None, "", "train-000001.tar"),
}


@pytest.mark.parametrize("field", ABSURD)
def test_a_field_of_another_type_or_range_is_refused_by_its_name(tmp_path: Path, made: Dataset, field: str) -> None:
    """At once, whatever a hash says; 10**30 samples would never end."""
    for value in ABSURD[field]:
        content = json.loads((made.root / "dataset.json").read_text())
        of_shard = field.startswith("shards[0].")
        (content["shards"][0] if of_shard else content)[field.removeprefix("shards[0].")] = value
        (tmp_path / "dataset.json").write_text(json.dumps(content))
        with pytest.raises(DatasetError, match="dataset.json is damaged") as caught:
            read_dataset(tmp_path, check=False)
        named = str(caught.value).partition("ValueError: ")[2].partition(": ")[0]
        assert named.startswith("shards[1].file" if value == "train-000001.tar" else field), (value, str(caught.value))


def test_samples_that_disagree_with_the_indexes_are_refused(tmp_path: Path, made: Dataset) -> None:
    """Even where the manifest agrees with itself."""
    shutil.copytree(made.root, tmp_path / "set")
    shards = (replace(made.shards[0], samples=made.shards[0].samples - 1), *made.shards[1:])
    bent = replace(made, samples=made.samples - 1, shards=shards)
    (tmp_path / "set/dataset.json").write_text(manifest(bent))
    count = made.shards[0].samples
    with pytest.raises(DatasetError, match=rf"train-000000.tar.idx starts with b'v1.2 {count}'"):
        read_dataset(tmp_path / "set")


def test_one_message_counts_the_other_faulty_shards(tmp_path: Path) -> None:
    write_shards(pictures(12), tmp_path / "set", classes=names(12), shard_size=4)
    for path in (tmp_path / "set").glob("*.tar"):
        path.unlink()
    with pytest.raises(DatasetError, match=r"train-000000.tar cannot be read.*\(2 other shards have faults too\)"):
        read_dataset(tmp_path / "set")


def test_a_shard_file_cannot_lie_outside_its_folder(tmp_path: Path) -> None:
    """A manifest is data, not a guide to other folders."""
    root = write_shards(pictures(4), tmp_path / "set", classes=names(4), shard_size=4).root
    for suffix in ("", ".idx"):
        (root / f"train-000000.tar{suffix}").rename(tmp_path / f"outside.tar{suffix}")
    edit("dataset.json", lambda text: text.replace(b"train-000000.tar", b"../outside.tar"))(root)
    with pytest.raises(DatasetError, match=r"shards\[0\].file: expected a tar in the folder"):
        read_dataset(root)


def test_the_folder_above_names_the_sets_inside(tmp_path: Path) -> None:
    write_shards(pictures(2), tmp_path / "demo" / "train", classes=names(2))
    with pytest.raises(DatasetError, match=r"Did you mean .*demo/train\?"):
        read_dataset(tmp_path / "demo")
