"""Foreign WebDataset tars are indexed where they lie, and the webdataset library says what is in them.

Samples are read through the indexes with nothing but `open` and `seek`, and must be those that the library yields.
"""

import json
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
from typer.testing import CliRunner, Result

from pipeline.audit import Fault, quarantine, verify
from pipeline.images import ppm
from pipeline.index import KINDS, index_tars
from pipeline.loader import Loader, build_eval_loader
from pipeline.shards import (
    Dataset,
    DatasetError,
    Shard,
    index_line,
    manifest,
    members,
    read_dataset,
    split_name,
)
from pipeline.sources_tars import META
from pipeline.views import ViewConfig
from tests.test_shards import dali_reader, picture
from tests.test_sources import Entry, make_tar, special
from tools import doctor
from tools.make_shards import app

Found = list[tuple[str, bytes | None, bytes]]  # key, label, image


def read(dataset: Dataset) -> Found:
    """Every sample, in order, through the indexes."""
    found: Found = []
    for tar, index in zip(dataset.tars, dataset.indexes, strict=True):
        header, *lines = Path(index).read_text("ascii").splitlines()
        assert header == f"v1.2 {len(lines)}"
        with open(tar, "rb") as file:
            for line in lines:
                parts = {}
                for member in members(line):
                    file.seek(member.offset)
                    parts[member.extension] = file.read(member.size)
                label = parts.pop("cls", None)
                ((extension, image),) = parts.items()
                assert extension in dataset.extensions
                found.append((members(line)[0].key, label, image))
    return found


def by_webdataset(tars: Sequence[str], *extensions: str) -> Found:
    """Every sample that has one of these members, as the library yields them."""
    stream = webdataset.WebDataset(list(tars), shardshuffle=False)
    return [
        (each["__key__"], each.get("cls"), next(each[e] for e in extensions if e in each))
        for each in stream
        if any(e in each for e in extensions)
    ]


def entries(num: int, *, labels: bool = True, image: str = "jpg", label: str = "cls", at: str = "") -> list[Entry]:
    """Images 0, 1, ... whose label is their number."""
    found: list[Entry] = []
    for i in range(num):
        found.append((f"{at}{i:04d}.{image}", picture(i)))
        found += [(f"{at}{i:04d}.{label}", b"%d" % i)] if labels else []
    return found


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    """What lies in a folder, at any depth, and when it was changed."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def actions(dataset: Dataset) -> list[dict[str, Any]]:
    path = dataset.root / "actions.jsonl"
    return [json.loads(line) for line in path.read_text("ascii").splitlines()] if path.exists() else []


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


# ---- the same samples as the webdataset library


def by_tar_writer(folder: Path) -> None:
    for shard in range(3):
        with webdataset.TarWriter(str(folder / f"t-{shard}.tar")) as writer:
            for i in range(4):
                content = {"jpg": picture(4 * shard + i), "cls": 4 * shard + i, "json": {"i": i}, "txt": "a text"}
                writer.write({"__key__": f"{shard}-{i:03d}", **content})


def by_gnu_tar(folder: Path, format: str = "gnu", name: str = "k") -> None:
    """Unpacked files, put into a tar by the program; names may be long or hold other letters."""
    files = folder.parent / "files"
    (files / "a folder.d").mkdir(parents=True)
    for i in range(5):
        (files / "a folder.d" / f"{name}{i}.png").write_bytes(picture(i, "PNG"))
        (files / "a folder.d" / f"{name}{i}.cls").write_text(f" {i}\n")
    sort = ["tar", f"--format={format}", "--sort=name", "-C", files, "-cf", folder / "t.tar", "."]
    subprocess.run(sort, check=True)


def by_pax(folder: Path) -> None:
    by_gnu_tar(folder, "pax", "猫 é " + "long " * 25)


def by_long_gnu(folder: Path) -> None:
    by_gnu_tar(folder, "gnu", "Ünï%cödé;" + "x" * 120)


def with_upper_case(folder: Path) -> None:
    make_tar(folder / "t.tar", entries(5, image="JPG", label="CLS"))


def with_masks(folder: Path) -> None:
    """A mask before the image, and other members before, between and behind."""
    found: list[Entry] = [("README", b"no dot"), ("__info__/x.jpg", b"meta"), (".hidden", b"")]
    for i, (name, image) in enumerate(entries(4, labels=False)):
        key = name.removesuffix(".jpg")
        found += [
            (f"{key}.seg.png", picture(i + 9, "PNG")),
            (f"{key}.json", b"{}"),
            (name, image),
            (f"{key}.cls", b"0"),
        ]
    make_tar(folder / "t.tar", [*found, ("checksums.md5", b"")])


def in_folders(folder: Path) -> None:
    """Tars of one name in several folders, with the same keys in each."""
    for i, place in enumerate(("b", "a/deep", "c d")):
        (folder / place).mkdir(parents=True)
        make_tar(folder / place / "000.tar", [(f"x.y/{i + j}.jpg", picture(10 * i + j)) for j in range(3)])


def sorted_by_class(folder: Path) -> None:
    for label in range(3):
        found = [
            (f"n{label}/{i}.{e}", picture(i) if e == "jpeg" else b"%d" % label)
            for i in range(3)
            for e in ("cls", "jpeg")
        ]
        make_tar(folder / f"class{label}.tar", found)


def with_a_key_again(folder: Path) -> None:
    """A key that comes again behind another is a sample of its own; links and folders part nothing."""
    found: list[Any] = [("a.jpg", picture(0)), special("b.jpg", tarfile.SYMTYPE), special("d", tarfile.DIRTYPE)]
    found += [("a.cls", b"0"), ("c.jpg", picture(1)), ("c.cls", b"1"), ("a.jpg", picture(2)), ("a.cls", b"2")]
    make_tar(folder / "t.tar", found)


TARS: dict[str, Callable[[Path], None]] = {
    "TarWriter": by_tar_writer,
    "GNU tar": by_gnu_tar,
    "GNU tar, long names": by_long_gnu,
    "pax, long names with other letters": by_pax,
    "upper case": with_upper_case,
    "masks and more": with_masks,
    "folders": in_folders,
    "sorted by class": sorted_by_class,
    "a key again": with_a_key_again,
}


@pytest.mark.parametrize("kind", TARS)
def test_samples_are_those_of_the_webdataset_library(tmp_path: Path, kind: str) -> None:
    """Keys, labels and images, in order; nothing is written beside the tars, and verify agrees with the indexes."""
    tars = tmp_path / "tars"
    tars.mkdir()
    TARS[kind](tars)
    before = state(tars)
    dataset = index_tars([tars / "**/*.tar"], tmp_path / "set")
    assert dataset.tars == sorted(map(str, tars.rglob("*.tar")))
    assert read(dataset) == by_webdataset(dataset.tars, "jpg", "jpeg", "png")
    assert state(tars) == before
    assert dataset.labelled == any(label is not None for _, label, _ in read(dataset))
    assert verify(dataset.root, images=True) == []
    checked = index_tars([tars / "**/*.tar"], tmp_path / "checked", verify=True, workers=2)
    assert [Path(index).read_bytes() for index in checked.indexes] == [Path(i).read_bytes() for i in dataset.indexes]
    assert verify(checked.root) == []


def test_dali_reads_the_same_bytes(tmp_path: Path) -> None:
    """Through names that are encoded, extensions with a dot and upper case."""
    found = [(f"a b;%/é {i}.Left {'PNG' if i % 2 else 'JPG'}", picture(i)) for i in range(6)]
    found += [(f"{name.partition('.')[0]}.CLS", b"%d" % i) for i, (name, _) in enumerate(found)]
    tar = make_tar(tmp_path / "t.tar", sorted(found, key=lambda entry: entry[0].partition(".")[0]))
    dataset = index_tars([tar], tmp_path / "set", image_member="left jpg", labels=True)
    assert dataset.extensions == ("left%20jpg",)
    pipeline = dali_reader(dataset)
    got = {
        int(bytes(label.as_array()[0])): bytes(image.as_array()[0])
        for image, label in (pipeline.run() for _ in range(3))
    }
    assert got == {i: picture(i) for i in (0, 2, 4)}
    assert dataset.counts["passed_over"] == {"label": 3, "label without an image": 3, "odd suffix": 3}


def test_names_are_split_as_webdataset_splits_them() -> None:
    """Odd names too; a line of an index gives back what it was made of."""
    pieces = ("a", ".", "/", "__", " ", "é", "%", ";", "\n", "B")
    names = [f"{a}{b}{c}{d}" for a in pieces for b in pieces for c in pieces for d in pieces]
    for name in names:
        key, extension = webdataset.tariterators.base_plus_ext(name)
        parts = split_name(name)
        assert (parts is None) == (key is None), name
        if parts and extension:
            assert parts[0] == key
            line = index_line([(name, 512, 3), (name, 1024, 0)])
            assert line.isascii()
            assert line.isprintable()
            assert [(m.key, m.extension, m.offset, m.size) for m in members(line)] == [
                (*parts, 512, 3),
                (*parts, 1024, 0),
            ]
    assert index_line([("a-b_C.0/(d)+e=f,g.jpg", 512, 3)]) == "jpg 512 3 a-b_C.0/(d)+e=f,g.jpg"
    for line in (
        "jpg 512 3",
        "jpg 512 3 a.png",
        "jpg x 3 a.jpg",
        "jpg 0 3 a.jpg",
        "jpg 512 -1 a.jpg",
        "",
        "jpg 512 3 jpg",
    ):
        with pytest.raises(ValueError):  # noqa: PT011
            members(line)


def test_meta_members_are_those_that_webdataset_skips(tmp_path: Path) -> None:
    names = ["__a__", "__a__/b.jpg", "__a.jpg__", "__a__.jpg", "x/__a__", "__a/b__/c.jpg", "_a_/b.jpg", "ok.jpg"]
    with open(make_tar(tmp_path / "t.tar", [(name, b"x") for name in names]), "rb") as file:
        kept = {each["fname"] for each in webdataset.tariterators.tar_file_iterator(file)}
    assert {name for name in names if not META.match(name)} == kept


@pytest.mark.parametrize("labelled", [True, False])
def test_the_loader_takes_an_indexed_set_like_any_other(tmp_path: Path, labelled: bool) -> None:
    (tmp_path / "tars/deep").mkdir(parents=True)
    for i, name in enumerate(("deep/a.tar", "b.tar")):
        make_tar(tmp_path / "tars" / name, entries(2 + i, labels=labelled))
    dataset = index_tars([tmp_path / "tars/**/*.tar"], tmp_path / "set")
    batches = list(build_eval_loader(dataset, ViewConfig(size=16), 5, torch.device("cpu"), num_threads=1))
    assert [len(images) for images, _ in batches] == [5]
    assert not labelled or batches[0][1].tolist() == [0, 1, 2, 0, 1]


def test_tars_of_any_sizes_give_every_process_the_same_number_of_steps(tmp_path: Path) -> None:
    """1, 3 and 17 samples for 2 processes: equal steps in each of two epochs, all samples but the rest, none twice."""
    for name, num in (("a", 1), ("b", 3), ("c", 17)):
        make_tar(tmp_path / f"{name}.tar", entries(num))
    dataset = index_tars([tmp_path], tmp_path / "set")
    loaders = [
        Loader(dataset, ViewConfig(size=16), 4, torch.device("cpu"), rank=rank, world_size=2, num_threads=1)
        for rank in range(2)
    ]
    assert [loader.steps_per_epoch for loader in loaders] == [5, 5]
    for epoch in range(2):
        batches = [next(loader) for _ in range(5) for loader in loaders]
        assert {batch.epoch for batch in batches} == {epoch}
        samples = [number for batch in batches for number in batch.samples.tolist()]
        assert len(samples) == len(set(samples)) == 20


# ---- where the tars lie


def test_manifest_and_tars_move_together_or_the_tars_stay(tmp_path: Path) -> None:
    """Below the folder that holds OUT the way is relative, elsewhere absolute; the fingerprint tells no place."""
    (tmp_path / "here/tars").mkdir(parents=True)
    tar = make_tar(tmp_path / "here/tars/t.tar", entries(3))
    beside = index_tars([tar], tmp_path / "here/set")
    away = index_tars([tar], tmp_path / "there/set")
    above = index_tars([tmp_path / "here/tars"], tmp_path / "here/tars/set")
    assert (beside.tars_at, away.tars_at, above.tars_at) == ("../tars", str(tar.parent), "..")
    assert beside.tars == away.tars == above.tars == [str(tar)]
    assert len({each.fingerprint for each in (beside, away, above)}) == 1
    (tmp_path / "here").rename(tmp_path / "moved")
    moved = read_dataset(tmp_path / "moved/set")
    assert (moved.tars, moved.fingerprint) == ([str(tmp_path / "moved/tars/t.tar")], beside.fingerprint)
    (tmp_path / "link").symlink_to(tmp_path / "moved/set")
    assert read(read_dataset(tmp_path / "link")) == read(moved)
    with pytest.raises(DatasetError, match=r"t.tar cannot be read .*make_shards.py index"):
        read_dataset(away.root)


def test_arguments_keep_their_order_and_name_each_tar_once(tmp_path: Path) -> None:
    for name in ("b/2.tar", "b/1.tar", "a/3.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        make_tar(tmp_path / name, entries(1))
    dataset = index_tars([tmp_path / "b", tmp_path / "a/*.tar"], tmp_path / "set")
    assert [shard.file for shard in dataset.shards] == ["b/1.tar", "b/2.tar", "a/3.tar"]
    assert sorted(state(dataset.root)) == [
        "a/3.tar.idx",
        "actions.jsonl",
        "b/1.tar.idx",
        "b/2.tar.idx",
        "dataset.json",
    ]
    for tars, message in (
        ([tmp_path / "b", tmp_path / "b/1.tar"], "b/1.tar is named twice"),
        ([tmp_path], "holds no .*expected a tar"),
        ([tmp_path / "x*"], "fits none"),
        ([], "no tar to index"),
    ):
        with pytest.raises(DatasetError, match=message):
            index_tars(tars, tmp_path / "other")
    with pytest.raises(DatasetError, match="is not empty"):
        index_tars([tmp_path / "b"], tmp_path / "a")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("file", ["../t.tar", "/t.tar", "a/../t.tar", "a//t.tar", "./t.tar", "", "t\0.tar"])
def test_a_shard_stays_inside_the_folder_of_the_tars(tmp_path: Path, file: str) -> None:
    (tmp_path / "tars").mkdir()
    dataset = index_tars([make_tar(tmp_path / "tars/t.tar", entries(2))], tmp_path / "set")
    bent = replace(dataset, shards=(replace(dataset.shards[0], file=file),))
    (dataset.root / "dataset.json").write_text(manifest(bent))
    with pytest.raises(DatasetError, match=r"shards\[0\]\.file: expected a tar in the folder of the tars"):
        read_dataset(dataset.root)


@pytest.mark.parametrize("change", [lambda tar: tar[:-512], lambda tar: tar + bytes(512), lambda _: b""])
def test_a_tar_that_has_changed_its_size_is_refused(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    tar = make_tar(tmp_path / "t.tar", entries(2))
    index_tars([tar], tmp_path / "set")
    tar.write_bytes(change(tar.read_bytes()))
    with pytest.raises(DatasetError, match=r"t.tar has \d+ bytes, expected \d+: .* not the shard that was indexed"):
        read_dataset(tmp_path / "set")


# ---- what is left out, passed over and refused


def test_every_member_is_accounted_for(tmp_path: Path) -> None:
    """Each sample that webdataset would give and that is not used is named with its reason; the others are counted."""
    half = make_tar(tmp_path / "half.tar", entries(4))
    half.write_bytes(half.read_bytes()[: half.read_bytes().index(picture(3)) + 100])
    found: list[Any] = [
        ("empty.jpg", b""),
        ("empty.cls", b"1"),
        special("link.jpg", tarfile.SYMTYPE),
        ("link.cls", b"1"),
    ]
    found += [("text.txt", b"x"), ("text.cls", b"1"), ("bare.jpg", picture(7)), ("bare.json", b"{}")]
    found += [special("alone.png", tarfile.LNKTYPE), special("link.json", tarfile.FIFOTYPE), special("p.cls", b"2")]
    found += [("moving.gif", b"GIF"), ("moving.cls", b"1"), ("twice.jpg", picture(8)), ("twice.JPG", picture(9))]
    make_tar(tmp_path / "other.tar", [*found, ("good.cls", b"9"), ("good.jpg", picture(9)), ("README", b"")])
    dataset = index_tars([tmp_path / "*.tar"], tmp_path / "set")
    assert [key for key, *_ in read(dataset)] == ["0000", "0001", "0002", "good"]
    left_out = {each["path"]: each["reason"] for each in actions(dataset) if each["action"] == "left out"}
    assert left_out == {
        "half.tar/0003.jpg": "cut off",
        "other.tar/empty.jpg": "empty",
        "other.tar/link.jpg": "a symbolic link",
        "other.tar/bare.jpg": "no label",
        "other.tar/alone.png": "a hard link",
        "other.tar/moving.gif": "not decoded by DALI",
        "other.tar/twice.jpg": "member twice",
        "other.tar/twice.JPG": "member twice",
    }
    (lost,) = (each for each in actions(dataset) if each["action"] == "lost")
    assert (lost["path"], "cut off within '0003.jpg'" in lost["detail"]) == ("half.tar", True)
    passed_over = {".json": 1, ".txt": 1, "a FIFO": 1, "label": 7, "label without an image": 2, "no suffix": 1}
    assert dataset.counts["passed_over"] == passed_over
    total = actions(dataset)[-1]
    assert total == {
        "action": "total",
        "entries": 7 + 18,
        "kept": 4,
        "reencoded": 0,
        "left_out": 8,
        "passed_over": 13,
        "damaged_tars": 1,
    }
    assert dataset.counts["kept"] == {"jpg": 4}
    assert dataset.counts["per_class"] == [1, 1, 1, 0, 0, 0, 0, 0, 0, 1]
    passed = {each["reason"]: each for each in actions(dataset) if each["action"] == "passed over"}
    assert passed[".txt"] | {"count": 1, "paths": ["other.tar/text.txt"]} == passed[".txt"]
    assert dataset.options | {"indexed_in_place": True, "max_pixels": 64_000_000} == dataset.options
    assert {shard.sha256 for shard in dataset.shards} == {""}
    assert not dataset.raw


def test_several_images_of_a_sample_are_asked_about(tmp_path: Path) -> None:
    """One extension without a dot wins; else the caller chooses."""
    found = [("k.left.jpg", picture(0)), ("k.right.jpg", picture(1)), ("k.json", b"")]
    tar = make_tar(tmp_path / "t.tar", found)
    with pytest.raises(DatasetError, match=r"sample 'k' of t.tar has 2 images, left.jpg, right.jpg: choose .*EXT"):
        index_tars([tar], tmp_path / "set")
    dataset = index_tars([tar], tmp_path / "set", image_member=".Right.JPG")
    assert read(dataset) == [("k", None, picture(1))]
    assert (dataset.extensions, dataset.counts["passed_over"]) == (
        ("right.jpg",),
        {".json": 1, "other image of a sample": 1},
    )
    tar = make_tar(tmp_path / "t.tar", [*found, ("k.jpg", picture(2)), ("k.png", picture(3, "PNG"))])
    with pytest.raises(DatasetError, match="has 2 images, jpg, png"):
        index_tars([tar], tmp_path / "again")
    with pytest.raises(DatasetError, match=r"no sample .*no member webp: 4"):
        index_tars([tar], tmp_path / "again", image_member="webp")


@pytest.mark.parametrize("label", [b"cat", b"", b"1.0", b"-1", b"100000", "１".encode(), b"1" * 40, b" " * 40 + b"1"])
def test_a_label_that_is_no_number_is_named(tmp_path: Path, label: bytes) -> None:
    """Names are refused, for training would not read them; what is no label leaves its sample out."""
    tar = make_tar(tmp_path / "t.tar", [*entries(1), ("k.jpg", picture(0)), ("k.cls", label)])
    if label in (b"cat", "１".encode()):
        with pytest.raises(
            DatasetError, match=r"label of 't.tar/k.jpg' is the name '.*command webdataset.*--no-labels"
        ):
            index_tars([tar], tmp_path / "set")
    else:
        dataset = index_tars([tar], tmp_path / "set")
        assert (dataset.samples, dataset.counts["left_out"]) == (1, {"no label": 1})
        assert "its label 'k.cls'" in actions(dataset)[0]["detail"]
    dataset = index_tars([tar], tmp_path / "none", labels=False)
    assert (dataset.labelled, dataset.samples, dataset.counts["passed_over"]) == (False, 2, {".cls": 2})


def test_class_names_come_from_a_list_or_from_beside_the_tars(tmp_path: Path) -> None:
    tar, names = make_tar(tmp_path / "t.tar", entries(3)), tmp_path / "names.txt"
    assert index_tars([tar], tmp_path / "a").classes == ("0", "1", "2")
    (tmp_path / "dataset.json").write_text(json.dumps({"classes": ["ant", "bee", "cat", "dog"]}))
    dataset = index_tars([tar], tmp_path / "b")
    assert dataset.classes == ("ant", "bee", "cat", "dog")
    assert dataset.counts["per_class"] == [1, 1, 1, 0]
    names.write_text("x\ny\nz\n")
    assert index_tars([tar], tmp_path / "c", class_list=names).classes == ("x", "y", "z")
    names.write_text("x\ny\n")
    dataset = index_tars([tar], tmp_path / "d", class_list=names)
    assert (dataset.samples, dataset.counts["left_out"]) == (2, {"label of no class": 1})
    assert "its label is '2', and the 2 classes" in actions(dataset)[0]["detail"]


def test_verify_hashes_tars_and_leaves_out_what_does_not_decode(tmp_path: Path) -> None:
    """Without it such an image stays in the index; verify then finds it, and quarantine leaves it out."""
    found = [*entries(3), ("bad.jpg", picture(5)[:-200]), ("bad.cls", b"1"), ("no.png", b"text"), ("no.cls", b"1")]
    tar = make_tar(tmp_path / "t.tar", found)
    checked = index_tars([tar], tmp_path / "checked", verify=True)
    assert checked.counts["left_out"] == {"does not decode": 1, "no image": 1}
    assert [each["path"] for each in actions(checked) if "path" in each] == ["t.tar/bad.jpg", "t.tar/no.png"]
    assert len(checked.shards[0].sha256) == 64
    assert verify(checked.root, images=True) == []
    content = bytearray(tar.read_bytes())
    content[-1] = 1
    tar.write_bytes(content)
    assert [fault.problem for fault in verify(checked.root)] == [
        "its sha256 is not that of the tar that was written: bytes have changed, copy it again"
    ]
    assert {fault.key for fault in verify(index_tars([tar], tmp_path / "set").root, images=True)} == {"bad", "no"}


def test_bare_pixels_of_one_size_need_no_decoder_once_they_were_read(tmp_path: Path) -> None:
    images = [ppm(bytes([i]) * 48, 4, 4) for i in range(3)]
    tar = make_tar(tmp_path / "t.tar", [(f"{i}.ppm", image) for i, image in enumerate(images)])
    assert index_tars([tar], tmp_path / "a", verify=True).raw == (4, 4)
    assert index_tars([tar], tmp_path / "b").raw is None


def test_dali_decodes_every_kind(tmp_path: Path) -> None:
    """What counts as an image is what DALI can decode."""
    formats = {"jpg": "JPEG", "jpeg": "JPEG", "jpe": "JPEG", "jfif": "JPEG", "tif": "TIFF", "pnm": "PPM"}
    formats |= {kind: "PPM" for kind in ("ppm", "pgm", "pbm")}
    modes = {"pgm": "L", "pbm": "1"}
    found = []
    for i, kind in enumerate(sorted(KINDS)):
        found.append((f"{i}.{kind}", picture(i, formats.get(kind, kind.upper()), mode=modes.get(kind, "RGB"))))
        found.append((f"{i}.cls", b"%d\n" % i))
    dataset = index_tars([make_tar(tmp_path / "t.tar", found)], tmp_path / "set", verify=True)
    assert dataset.samples == len(KINDS)
    pipeline = dali_reader(dataset, decode=True)
    assert {pipeline.run()[0].as_array().shape for _ in range(len(KINDS))} == {(1, 16, 16, 3)}


# ---- verify and quarantine


def two_of_a_name(tmp_path: Path) -> Dataset:
    for place in ("a", "b"):
        (tmp_path / "tars" / place).mkdir(parents=True)
        make_tar(tmp_path / "tars" / place / "t.tar", entries(3), tarfile.PAX_FORMAT)
    return index_tars([tmp_path / "tars/*/*.tar"], tmp_path / "set")


def test_quarantine_writes_into_out_alone(tmp_path: Path) -> None:
    """A key that several tars have needs its shard; the original manifest brings everything back."""
    dataset = two_of_a_name(tmp_path)
    before, whole = state(tmp_path / "tars"), read(dataset)
    with pytest.raises(DatasetError, match=r"'0001' is a sample of a/t.tar and of b/t.tar: .* 'a/t.tar/0001'"):
        quarantine(dataset.root, ["0001"])
    for keys in (["a/t.tar/0001"], ["a/t.tar/0001.jpg", "b/t.tar/0000"]):
        after = quarantine(dataset.root, keys)
    assert after.counts["quarantined"] == ["a/t.tar/0001", "b/t.tar/0000"]
    assert after.counts["per_class"] == [1, 1, 2]
    assert read(after) == [whole[i] for i in (0, 2, 4, 5)]
    assert verify(dataset.root, images=True) == []
    assert state(tmp_path / "tars") == before
    with pytest.raises(DatasetError, match="no sample a/t.tar/7"):
        quarantine(dataset.root, ["a/t.tar/7"])
    (dataset.root / "dataset.json.original").replace(dataset.root / "dataset.json")
    assert read_dataset(dataset.root) == dataset


def test_verify_names_a_damaged_sample_and_its_report_leaves_it_out(tmp_path: Path) -> None:
    """Only the one in the tar that is damaged, though another tar has a sample of this key."""
    dataset = two_of_a_name(tmp_path)
    tar = Path(dataset.tars[1])
    tar.write_bytes(tar.read_bytes().replace(picture(1), bytes(len(picture(1)))))
    report = tmp_path / "report.jsonl"
    result = command("verify", dataset.root, "--images", "--report", report, "--workers", 1)
    assert (result.exit_code, result.stdout.count("b/t.tar 0001: 0001.jpg: no image")) == (1, 1)
    left = command("quarantine", dataset.root, "--from", report)
    assert (left.exit_code, left.stdout) == (0, f"{dataset.root}: 5 samples in 2 shards, 1 in quarantine\n")
    assert verify(dataset.root, images=True) == []


def test_doctor_finds_the_tars(tmp_path: Path) -> None:
    dataset = two_of_a_name(tmp_path)
    assert doctor.shards(dataset).state == "ok"
    assert doctor.read_rate(dataset, forget=False) > 0
    Path(dataset.tars[0]).write_bytes(bytes(dataset.shards[0].bytes))
    assert doctor.shards(dataset).state == "fault"


def test_verify_compares_names_with_the_extended_headers(tmp_path: Path) -> None:
    """A name that does not fit into a header is compared whole."""
    key = "x" * 150
    tar = make_tar(tmp_path / "t.tar", [(f"{key}{i}.jpg", picture(i)) for i in range(3)], tarfile.PAX_FORMAT)
    dataset = index_tars([tar], tmp_path / "set")
    assert verify(dataset.root) == []
    tar.write_bytes(tar.read_bytes().replace(f"{key}1.jpg".encode(), f"{key}7.jpg".encode()))
    size = len(picture(1))
    assert verify(dataset.root) == [
        Fault("t.tar", f"{key}1", f"the index has {key}1.jpg of {size} bytes where the tar has {key}7.jpg of {size}")
    ]


# ---- manifests of before


@pytest.mark.parametrize("version", [1, 2])
def test_older_manifests_are_read_with_the_fingerprints_they_had(tmp_path: Path, version: int) -> None:
    """A run resumes on its data set; the value is what the program gave before tars could lie elsewhere."""
    shards = [
        {
            "file": f"train-00000{i}.tar",
            "samples": 2 + i,
            "bytes": 10240,
            "sha256": f"{i}" * 64,
            "index_sha256": "ab" * 32,
        }
        | ({"quarantined": 0} if version == 2 else {})
        for i in range(2)
    ]
    fingerprint = "c22cf7a4c4bf2b9c92999cfe62a93d60835ef401e18f44d7f3c6179f6ba2a66f"
    content = {
        "format": "swiftclr-shards",
        "version": version,
        "fingerprint": fingerprint,
        "name": "train",
        "samples": 5,
    }
    content |= {"classes": ["cat", "dog"], "extensions": ["jpg"], "options": {"max_pixels": 1}, "counts": {}}
    content |= {"shards": shards} | ({"raw": None} if version == 2 else {})
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    dataset = read_dataset(tmp_path, check=False)
    assert (dataset.fingerprint, dataset.tars_at) == (fingerprint, "")
    assert dataset.tars == [f"{tmp_path}/train-000000.tar", f"{tmp_path}/train-000001.tar"]
    assert dataset.tar(dataset.shards[1]) == dataset.tars[1]
    assert dataset.index(dataset.shards[1]) == dataset.indexes[1] == f"{dataset.tars[1]}.idx"


def test_tars_in_object_storage_are_found_beside_their_manifest() -> None:
    """Addresses are joined as paths are."""
    shard = Shard(file="a/t.tar", samples=1, bytes=1, sha256="", index_sha256="")
    facts: dict[str, Any] = {"name": "", "samples": 1, "classes": None, "extensions": (), "options": {}, "counts": {}}
    dataset = Dataset(root=Path("s3://bucket/data/set"), shards=(shard,), tars_at="../tars", **facts)
    assert dataset.tars == [dataset.tar(shard)] == ["s3://bucket/data/tars/a/t.tar"]
    assert dataset.indexes == [dataset.index(shard)] == ["s3://bucket/data/set/a/t.tar.idx"]


# ---- the command


def test_the_command_reports_what_it_did(tmp_path: Path) -> None:
    make_tar(tmp_path / "t.tar", [*entries(3), ("x.json", b""), ("0.txt", b"")])
    result = command("index", tmp_path / "*.tar", tmp_path / "set", "--workers", 1)
    assert (result.exit_code, result.stdout.splitlines()) == (
        0,
        [
            f"{tmp_path / 'set'}: 3 samples in 1 shards, 0.0 MiB",
            "8 entries: 3 kept (jpg: 3), 0 converted, 0 left out, 5 passed over (.json: 1, .txt: 1, label: 3)",
            f"their names: {tmp_path / 'set' / 'actions.jsonl'}",
            "labels: of 3 classes",
        ],
    )
    none = command("index", tmp_path / "none.tar", tmp_path / "other", "--workers", 1)
    assert (none.exit_code, none.stderr.count("\n")) == (2, 1)
    assert command("verify", tmp_path / "set", "--workers", 1).exit_code == 0
