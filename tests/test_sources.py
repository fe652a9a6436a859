"""Sources give the bytes that other readers find in the same archives, and hostile archives get nowhere.

The originals are rebuilt small; tarfile, torchvision's readers, pickle and NumPy say what is in them.
"""

import hashlib
import io
import os
import pickle
import random
import tarfile
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline import sources, sources_list, sources_originals, sources_tars
from pipeline.images import BadImageError
from pipeline.shards import DatasetError, Sample
from pipeline.sources import Source
from pipeline.sources_tars import Member, TarError, members
from tests.test_shards import picture
from tests.timed import thrice

Entry = tuple[str, bytes]


def make_tar(path: Path, entries: Sequence[Entry | tarfile.TarInfo], format: int = tarfile.GNU_FORMAT) -> Path:
    """A tar as tarfile writes it; a TarInfo stands for a member without content."""
    with tarfile.open(path, "w", format=format) as tar:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                tar.addfile(entry)
            else:
                info = tarfile.TarInfo(entry[0])
                info.size = len(entry[1])
                tar.addfile(info, io.BytesIO(entry[1]))
    return path


def special(name: str, type: bytes, target: str = "/etc/passwd") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = type, target
    return info


def scan(path: Path, start: int = 0, stop: int | None = None) -> list[Member]:
    with open(path, "rb") as file:
        return list(members(file, path.name, start, stop))


def by_tarfile(path: Path) -> list[Entry]:
    found = []
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isfile():
                content = tar.extractfile(member)
                assert content is not None
                found.append((member.name, content.read()))
    return found


def read(source: Source) -> list[tuple[str, int | None, bytes]]:
    """(name, label, image) of every sample, as write_shards gets them."""
    convert = source.convert or (lambda image: image)
    return [(each.name, each.label, convert(each.read(source.root))) for each in source.samples]


def faults(source: Source) -> dict[str, str]:
    return {each["path"]: each["detail"] for each in source.tally.left_out}


# ---- tars


ODD_NAMES = ["a", "ü é/猫.jpg", "deep/" * 30 + "x.jpg", "long" * 60 + ".jpg", "p/" * 20 + "n" * 90, "x" * 3000, "../up"]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_finds(tmp_path: Path, format: int) -> None:
    """Long, deep and other names, sizes around a block, folders between: the same names and bytes, in order."""
    sizes = (0, 1, 511, 512, 513, 1024, 5000)
    names = [name for name in ODD_NAMES if format != tarfile.USTAR_FORMAT or len(name) < 200]
    entries: list[Entry | tarfile.TarInfo] = [(n, os.urandom(s)) for n, s in zip(names, sizes, strict=False)]
    entries.insert(2, special("folder", tarfile.DIRTYPE))
    path = make_tar(tmp_path / "a.tar", entries, format)
    data = path.read_bytes()
    assert [(m.name, data[m.offset : m.offset + m.size]) for m in scan(path)] == by_tarfile(path)
    assert len(by_tarfile(path)) == len(names)


def test_a_tar_within_a_file_is_read_in_place(tmp_path: Path) -> None:
    """Offsets count from the start of the outer file, and what lies around it is not looked at."""
    inner = make_tar(tmp_path / "inner.tar", [("1.jpg", b"one"), ("2.jpg", b"two")]).read_bytes()
    outer = make_tar(tmp_path / "outer.tar", [("n.tar", inner), ("m.tar", inner[::-1])])
    first = scan(outer)[0]
    data = outer.read_bytes()
    found = scan(outer, first.offset, first.offset + first.size)
    assert [(m.name, data[m.offset : m.offset + m.size]) for m in found] == [("1.jpg", b"one"), ("2.jpg", b"two")]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_what_follows_a_member_of_many_gigabytes_is_found(tmp_path: Path, format: int) -> None:
    """Sizes above 8 GiB do not fit ustar's field; the file here has a hole in place of the bytes."""
    info = tarfile.TarInfo("big")
    info.size = 9 * 2**30 + 5
    head = info.tobuf(format)
    path = tmp_path / "a.tar"
    tail = make_tar(tmp_path / "b.tar", [("1.jpg", b"one")]).read_bytes()
    with open(path, "wb") as file:
        file.write(head)
        file.seek(len(head) + 9 * 2**30 + 512)
        file.write(tail)
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar]
    assert [each[:3] for each in scan(path)] == expected


def test_a_tar_cut_anywhere_is_an_error_and_never_a_shorter_tar(tmp_path: Path) -> None:
    """What is found before the cut is right; only the end mark's padding may be missing."""
    path = make_tar(tmp_path / "a.tar", [(f"{'long' * 30}{i}.jpg", picture(i)) for i in range(4)])
    data, whole = path.read_bytes(), scan(path)
    shortest = -(-len(data.rstrip(b"\0")) // 512) * 512 + 512
    cut = tmp_path / "cut.tar"
    for size in range(0, len(data), 100):
        cut.write_bytes(data[:size])
        if size >= shortest:
            assert scan(cut) == whole
            continue
        found: list[Member] = []
        with open(cut, "rb") as file, pytest.raises(TarError, match=rf"cut off (at byte {size}, |within '.*jpg')"):
            found.extend(members(file, "cut.tar"))
        assert found == [member for member in whole if member.offset + member.size <= size]


def test_an_error_names_the_tar_the_member_and_the_byte(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a.tar", [("1.jpg", bytes(100)), ("2.jpg", bytes(1000))])
    path.write_bytes(path.read_bytes()[: 2048 - 12])
    message = r"a.tar: cut off within '2.jpg': 500 of its 1000 bytes are there; from byte 1024 on nothing is read"
    with pytest.raises(TarError, match=message):
        scan(path)


def block(size: bytes = b"0", type: bytes = b"0", name: bytes = b"x.jpg") -> bytes:
    """A header with a right checksum whatever it says."""
    header = bytearray(512)
    header[: len(name)] = name
    header[100:108], header[124 : 124 + len(size)], header[156:157] = b"0000644\0", size, type
    header[257:265] = b"ustar\x0000"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def base256(value: int) -> bytes:
    return (b"\xff" if value < 0 else b"\x80") + (value % 256**11).to_bytes(11, "big")


def pax(*records: bytes) -> bytes:
    content = b"".join(records)
    return block(b"%o" % len(content), b"x") + content.ljust(-(-len(content) // 512) * 512, b"\0")


END = bytes(1024)
LONG = block(b"%o" % 10, b"L", b"././@LongLink") + b"name.jpg".ljust(512, b"\0")
HOSTILE = {
    "negative size": (block(base256(-512)) + END, "cut off within 'x.jpg'"),
    "size of 2**80": (block(base256(2**80)) + END, "cut off within 'x.jpg'"),
    "size of 8 GiB": (block(b"77777777777") + END, "cut off within 'x.jpg': 1024 of its 8589934591"),
    "size that is no number": (block(b"9z") + END, "no header of a member"),
    "wrong checksum": (block()[:-1] + b"!" + END, "no header of a member: bad checksum"),
    "web page": (b"<html>".ljust(1024), "no header of a member"),
    "gzip": (b"\x1f\x8b".ljust(1024), "it is compressed by gzip: unpack it first"),
    "bzip2": (b"BZh91AY".ljust(1024), "it is compressed by bzip2: unpack it first"),
    "xz": (b"\xfd7zXZ\0".ljust(1024), "it is compressed by xz: unpack it first"),
    "no byte": (b"", "cut off at byte 0, before its end mark"),
    "long name of 8 GiB": (block(b"77777777777", b"L") + END, "header 1 of one member has 8589934591 bytes"),
    "long name of -512 bytes": (block(base256(-512), b"L") + END, "header 1 of one member has -512 bytes"),
    "pax header of 8 GiB": (block(b"77777777777", b"x") + END, "header 1 of one member has 8589934591 bytes"),
    "global pax header of 1 MiB": (block(b"4000000", b"g") + bytes(2**20) + END, "header 1 .* 1048576 bytes"),
    "pax headers without end": (pax(b"12 path=a.b\n") * 1000, "header 9 of one member"),
    "long names without end": (LONG * 1000, "header 9 of one member"),
    "pax header cut off": (block(b"1000", b"x") + bytes(100), "cut off at byte 612, within a header"),
    "pax record longer than its header": (pax(b"99 path=a\n") + block() + END, "damaged pax header"),
    "pax record of no length": (pax(b"0 path=a\n") + block() + END, "damaged pax header"),
    "pax record of negative length": (pax(b"-9 path=a\n") + block() + END, "damaged pax header"),
    "pax record of a million digits": (pax(b"9" * 60000) + block() + END, "damaged pax header"),
    "pax size that is negative": (pax(b"12 size=-99\n") + block() + END, "cut off within"),
    "pax size that is no number": (pax(b"11 size=4x\n") + block() + END, "no header of a member"),
    "sparse file": (block(b"0", b"S") + END, "'x.jpg' is a sparse file"),
    "second tar behind the first": (block() + END + block() + END, "data follow the end mark"),
    "hole where the rest should be": (block() + bytes(2 * 2**20), "data follow the end mark"),
}


@pytest.mark.parametrize("case", HOSTILE)
@thrice
def test_a_hostile_tar_ends_in_one_error_without_much_memory_or_time(tmp_path: Path, case: str) -> None:
    """Sizes are held to the file and to limits before anything is read or made room for."""
    content, message = HOSTILE[case]
    (tmp_path / "a.tar").write_bytes(content)
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(TarError, match=message):
        scan(tmp_path / "a.tar")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20
    assert time.perf_counter() - start < 2


def test_damage_at_random_bytes_gives_an_error_or_members_within_the_file(tmp_path: Path) -> None:
    """No other exception, no endless loop, no member that lies outside."""
    entries: list[Entry] = [("1.jpg", bytes(700)), ("n" * 150, bytes(10)), ("ü" * 80, bytes(600))]
    formats = (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    intact = [make_tar(tmp_path / f"{f}.tar", entries, f).read_bytes() for f in formats]
    rng = random.Random(0)
    outcomes = {"error": 0, "members": 0}
    for i in range(2000):
        damaged = bytearray(intact[i % 2])
        for _ in range(rng.choice((1, 1, 3, 30))):
            damaged[rng.randrange(6000)] = rng.randrange(256)
        for at in range(0, 6000, 512):  # with a checksum that fits, damage gets past the first check
            header = damaged[at : at + 512]
            if rng.random() < 0.7 and header[257:262] == b"ustar":
                header[148:156] = b" " * 8
                damaged[at + 148 : at + 156] = b"%06o\0 " % sum(header)
        try:
            found = list(members(io.BytesIO(damaged), "damaged"))
        except TarError:
            outcomes["error"] += 1
        else:
            outcomes["members"] += 1
            assert all(0 < m.offset <= m.offset + m.size <= len(damaged) for m in found)
    assert min(outcomes.values()) > 200, outcomes


def test_links_devices_and_sparse_files_are_named_and_not_read(tmp_path: Path) -> None:
    """Even a link that would lead to an image; the members behind them are found."""
    kinds = {
        tarfile.SYMTYPE: "a symbolic link",
        tarfile.LNKTYPE: "a hard link",
        tarfile.CHRTYPE: "a character device",
        tarfile.BLKTYPE: "a block device",
        tarfile.FIFOTYPE: "a FIFO",
        b"V": "of the unknown type b'V'",
    }
    entries = [("0.jpg", b"zero"), *(special(f"{i}.jpg", t, "0.jpg") for i, t in enumerate(kinds, 1)), ("9.jpg", b"9")]
    found = scan(make_tar(tmp_path / "a.tar", entries))
    assert [(m.name, m.fault) for m in found[1:-1]] == [(f"{i}.jpg", k) for i, k in enumerate(kinds.values(), 1)]
    assert [(m.name, m.size, m.fault) for m in (found[0], found[-1])] == [("0.jpg", 4, ""), ("9.jpg", 1, "")]
    (tmp_path / "b.tar").write_bytes(pax(b"22 GNU.sparse.major=1\n") + block() + END)
    assert scan(tmp_path / "b.tar")[0].fault == "a sparse file"


# ---- WebDataset shards


def test_webdataset_keys_end_at_the_first_dot_of_the_file_name(tmp_path: Path) -> None:
    """Dots in folders, other alphabets, upper case, order of members and further members: each with its own label."""
    entries = [
        ("a/1.jpg", b"A"),
        ("a/1.CLS", b"1"),
        ("b/1.cls", b"2\n"),
        ("b/1.PNG", b"B"),
        ("v1.0/c.LEFT.Jpg", b"C"),
        ("v1.0/c.cls", b"3"),
        ("d.e/猫.json", b"{}"),
        ("d.e/猫.left.webp", b"D"),
        ("d.e/猫.cls", b"0"),
        (".hidden.jpg", b"H"),
        (".hidden/1.jpg", b"H"),
        ("._1.jpg", b"mac"),
        ("README", b"text"),
        ("__meta__/x.jpg", b"M"),
    ]
    source = sources_tars.webdataset(make_tar(tmp_path / "my set.tar", entries))
    assert source.classes == ["0", "1", "2", "3"]
    assert source.name == "my-set"
    assert read(source) == [
        ("my set.tar/a/1.jpg", 1, b"A"),
        ("my set.tar/b/1.PNG", 2, b"B"),
        ("my set.tar/v1.0/c.LEFT.Jpg", 3, b"C"),
        ("my set.tar/d.e/猫.left.webp", 0, b"D"),
    ]
    passed = {".json": 1, "__NAME__ of webdataset": 1, "hidden": 3, "label": 4, "no suffix": 1}
    assert (source.tally.passed_over, source.tally.left_out) == (passed, [])


def test_webdataset_shards_agree_with_the_webdataset_library(tmp_path: Path) -> None:
    """Several tars of a folder, written by webdataset's writer and read by its reader; no labels stay no labels."""
    import webdataset

    for i in range(3):
        with webdataset.TarWriter(str(tmp_path / f"{i}.tar")) as writer:
            for j in range(4):
                writer.write({"__key__": f"{i}{j}", "jpg": picture(4 * i + j), "cls": 4 * i + j})
    (tmp_path / "notes.txt").write_text("not a tar")
    source = sources_tars.webdataset(tmp_path)
    theirs = webdataset.WebDataset([str(tmp_path / f"{i}.tar") for i in range(3)], shardshuffle=False)
    assert [(label, image) for _, label, image in read(source)] == [(int(each["cls"]), each["jpg"]) for each in theirs]
    assert sources_tars.webdataset(tmp_path, "1.tar").classes == [str(i) for i in range(8)]
    bare = make_tar(tmp_path / "bare.tar", [("1.jpg", b"1")])
    assert sources_tars.webdataset(bare).classes is None


def test_webdataset_tars_of_one_name_in_several_folders_keep_apart(tmp_path: Path) -> None:
    """Each image comes from its own tar, also where a tar of the same name lies further up; a cut one is named so."""
    for folder, image in {"": b"upper", "a": b"first", "b": b"other"}.items():
        (tmp_path / folder).mkdir(exist_ok=True)
        make_tar(tmp_path / folder / "0.tar", [("1.jpg", image), ("1.cls", b"%d" % len(folder))])
    cut = tmp_path / "b" / "1.tar"
    cut.write_bytes((tmp_path / "b" / "0.tar").read_bytes()[:600])
    source = sources_tars.webdataset(tmp_path, "**/*.tar")
    assert read(source) == [
        ("0.tar/1.jpg", 0, b"upper"),
        ("a/0.tar/1.jpg", 1, b"first"),
        ("b/0.tar/1.jpg", 1, b"other"),
    ]
    (lost,) = source.tally.lost
    assert (lost["path"], lost["detail"][:27]) == ("b/1.tar", "b/1.tar: the tar is cut off")


def test_webdataset_samples_with_wrong_labels_links_and_lost_ends_are_left_out(tmp_path: Path) -> None:
    """Each named with what is wrong; the sound samples of the damaged tar are kept."""
    entries: list[Entry | tarfile.TarInfo] = []
    for name, label in {"good": b"1", "void": b"", "minus": b"-1", "huge": b"9" * 12, "none": None}.items():
        entries += [(f"{name}.jpg", b"image"), *([(f"{name}.cls", label)] if label is not None else [])]
    entries += [("bytes.jpg", b"x"), ("bytes.cls", b"\xff\xfe1")]
    entries += [special("link.jpg", tarfile.SYMTYPE), ("link.cls", b"0"), ("l.jpg", b"x"), special("l.cls", b"2")]
    whole = make_tar(tmp_path / "a.tar", entries)
    cut = make_tar(tmp_path / "b.tar", [("1.jpg", b"image"), ("1.cls", b"0"), ("2.jpg", bytes(900))])
    cut.write_bytes(cut.read_bytes()[:3000])
    source = sources_tars.webdataset(tmp_path)
    assert source.classes == ["0", "1"]
    also, number = "and other samples have one", "a whole number from 0 to 99999"
    assert faults(source) == {
        "a.tar/void.jpg": f"its label 'void.cls' is '', expected a name or a whole number, {also}",
        "a.tar/minus.jpg": f"its label 'minus.cls' is '-1', expected a name, or {number}, {also}",
        "a.tar/huge.jpg": f"its label 'huge.cls' is '{'9' * 12}', expected a name, or {number}, {also}",
        "a.tar/bytes.jpg": f"its label 'bytes.cls' is no text: b'\\xff\\xfe1', {also}",
        "a.tar/none.jpg": f"it has no label, {also}",
        "a.tar/link.jpg": "a symbolic link",
        "a.tar/l.jpg": f"its label 'l.cls' is a symbolic link, {also}",
        "b.tar/2.jpg": "cut off",
    }
    assert [sample.name for sample in source.samples] == [f"{whole.name}/good.jpg", f"{cut.name}/1.jpg"]
    assert source.tally.lost[0]["detail"].startswith("b.tar: cut off within '2.jpg': 440 of its 900 bytes")
    assert "1 of 2 tars are cut off or damaged" in source.warning


def test_webdataset_class_names_come_from_a_list_or_from_our_manifest(tmp_path: Path) -> None:
    make_tar(tmp_path / "a.tar", [("1.jpg", b"1"), ("1.cls", b"1")])
    (tmp_path / "names.txt").write_text("cat\ndog\n\n")
    assert sources_tars.webdataset(tmp_path, class_list=tmp_path / "names.txt").classes == ["cat", "dog"]
    (tmp_path / "dataset.json").write_text('{"classes": ["ant", "bee", "cow"]}')
    assert sources_tars.webdataset(tmp_path).classes == ["ant", "bee", "cow"]
    (tmp_path / "names.txt").write_text("cat")
    with pytest.raises(DatasetError, match="label of no class: 1.*'a.tar/1.jpg': its label is '1', .* 1 classes"):
        sources_tars.webdataset(tmp_path, class_list=tmp_path / "names.txt")
    (tmp_path / "names.txt").write_text("cat\ncat\n")
    with pytest.raises(DatasetError, match="names the class 'cat' twice"):
        sources_tars.webdataset(tmp_path, class_list=tmp_path / "names.txt")
    (tmp_path / "dataset.json").write_text('{"classes": 3}')
    with pytest.raises(DatasetError, match="dataset.json gives no class names"):
        sources_tars.webdataset(tmp_path)


def test_webdataset_without_tars_or_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="missing is missing"):
        sources_tars.webdataset(tmp_path / "missing")
    with pytest.raises(DatasetError, match=r"holds no tar that fits '\*.tar'"):
        sources_tars.webdataset(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"<html>".ljust(600))
    with pytest.raises(DatasetError, match="holds no image that could be used in 1 tars; .* no header of a member"):
        sources_tars.webdataset(tmp_path)


# ---- ImageNet


WNIDS = ["n02119789", "n01440764", "n02100735"]  # neither in the order of the devkit's IDs nor sorted


def make_ilsvrc(folder: Path) -> Path:
    """A training archive of 3 classes with 2, 3 and 4 images, and a validation archive of 6, in random order."""
    inner: list[Entry] = []
    for c, wnid in enumerate(WNIDS):
        images = [(f"{wnid}_{i}.JPEG", picture(10 * c + i)) for i in (30, 4, 100, 2)[: 2 + c]]
        inner.append((f"{wnid}.tar", make_tar(folder / "class.tar", images).read_bytes()))
    (folder / "class.tar").unlink()
    make_tar(folder / "ILSVRC2012_img_train.tar", inner)
    make_tar(folder / "val.tar", [(f"ILSVRC2012_val_{i:08d}.JPEG", picture(100 + i)) for i in (3, 1, 6, 2, 5, 4)])
    return folder


@pytest.fixture
def ilsvrc(tmp_path: Path) -> Path:
    return make_ilsvrc(tmp_path)


def test_imagenet_s_training_tar_gives_what_the_unpacked_folder_gives(ilsvrc: Path) -> None:
    """tarfile unpacks it, the folder source and torchvision's ImageFolder read that: samples, labels, order, bytes."""
    from torchvision.datasets import ImageFolder

    archive = ilsvrc / "ILSVRC2012_img_train.tar"
    unpacked = ilsvrc / "train"
    for name, data in by_tarfile(archive):
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            tar.extractall(unpacked / name.removesuffix(".tar"), filter="data")
    source, files = sources_originals.imagenet_train(archive), ImageFolder(unpacked)
    assert source.classes == files.classes == sorted(WNIDS)
    assert read(source) == read(sources.folder(unpacked))
    assert [(label, image) for _, label, image in read(source)] == [
        (label, Path(path).read_bytes()) for path, label in files.samples
    ]
    assert "3 classes and 9 images, the original 1000 and 1281167" in source.warning


def test_imagenet_s_training_tar_must_be_whole_and_nothing_else(ilsvrc: Path) -> None:
    """Damage of the outer and of an inner tar, and members that are not tars of classes, are refused by name."""
    archive = ilsvrc / "ILSVRC2012_img_train.tar"
    entries, data = by_tarfile(archive), archive.read_bytes()
    archive.write_bytes(data[: len(data) // 2])
    with pytest.raises(TarError, match=r"ILSVRC2012_img_train.tar: cut off within 'n\d{8}.tar'"):
        sources_originals.imagenet_train(archive)
    make_tar(archive, [entries[0], (entries[1][0], entries[1][1][:600])])
    with pytest.raises(TarError, match=f"ILSVRC2012_img_train.tar, {entries[1][0]}: cut off within"):
        sources_originals.imagenet_train(archive)
    for odd in ("../n01440764.jpg", "readme.txt", "n1.tar"):
        make_tar(archive, [entries[0], (odd, b"")])
        with pytest.raises(DatasetError, match=f"holds '{odd}', expected only tars of classes"):
            sources_originals.imagenet_train(archive)
    make_tar(archive, [special("n01440764.tar", tarfile.SYMTYPE)])
    with pytest.raises(DatasetError, match="holds 'n01440764.tar', a symbolic link"):
        sources_originals.imagenet_train(archive)
    make_tar(archive, [("n01440764.tar", make_tar(ilsvrc / "x.tar", []).read_bytes())])
    with pytest.raises(DatasetError, match="no image of n01440764"):
        sources_originals.imagenet_train(archive)
    with pytest.raises(DatasetError, match="nowhere.tar is missing"):
        sources_originals.imagenet_train(ilsvrc / "nowhere.tar")


TRUTH = [2, 1, 3, 3, 2, 1]  # the devkit's IDs of the images in the order of their names; ID i is WNIDS[i - 1]


def make_devkit(path: Path, truth: Sequence[object] = TRUTH, wnids: Sequence[str] = WNIDS) -> Path:
    """A devkit in the original's layout: leaves and inner nodes of the tree as a struct array in meta.mat."""
    from scipy.io import savemat

    fields = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height", "num_images")
    rows = [(i, wnid, f"name {i}, other", "text", 0, [], 0, 1300) for i, wnid in enumerate(wnids, 1)]
    rows.append((len(rows) + 1, "n00001740", "entity", "everything", 2, [1, 2], 3, 0))
    synsets = np.array(rows, dtype=[(field, object) for field in fields]).reshape(-1, 1)
    mat = io.BytesIO()
    savemat(mat, {"synsets": synsets}, do_compression=True)
    lines = "".join(f"{i}\n" for i in truth).encode()
    data = "ILSVRC2012_devkit_t12/data"
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(special("ILSVRC2012_devkit_t12", tarfile.DIRTYPE))
        for name, content in (
            (f"{data}/ILSVRC2012_validation_ground_truth.txt", lines),
            (f"{data}/meta.mat", mat.getvalue()),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_imagenet_s_validation_labels_are_those_that_torchvision_reads_from_the_devkit(
    ilsvrc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The devkit counts by its own IDs; the labels must still be the places of the sorted WordNet IDs."""
    import torchvision.datasets.imagenet as theirs

    kit = make_devkit(ilsvrc / "ILSVRC2012_devkit_t12.tar.gz")
    checked = (kit.name, hashlib.md5(kit.read_bytes()).hexdigest())
    monkeypatch.setitem(theirs.ARCHIVE_META, "devkit", checked)
    theirs.parse_devkit_archive(ilsvrc)
    _, val_wnids = theirs.load_meta_file(ilsvrc)
    source = sources_originals.imagenet_val(ilsvrc / "val.tar", kit)
    assert source.classes == sources_originals.imagenet_train(ilsvrc / "ILSVRC2012_img_train.tar").classes
    assert [source.classes[label] for _, label, _ in read(source) if label is not None] == val_wnids
    assert [image for *_, image in read(source)] == [picture(100 + i) for i in range(1, 7)]


def test_imagenet_s_validation_labels_from_a_text_file(ilsvrc: Path) -> None:
    """By the order of the file names or by file name, in any order of lines."""
    wnids = [WNIDS[i - 1] for i in TRUTH]
    kit = read(sources_originals.imagenet_val(ilsvrc / "val.tar", make_devkit(ilsvrc / "kit.tar.gz")))
    truth = ilsvrc / "truth.txt"
    truth.write_text("\n".join(wnids))
    assert read(sources_originals.imagenet_val(ilsvrc / "val.tar", truth)) == kit
    truth.write_text("".join(f"ILSVRC2012_val_{i:08d}.JPEG {w}\n" for i, w in list(enumerate(wnids, 1))[::-1]))
    assert read(sources_originals.imagenet_val(ilsvrc / "val.tar", truth)) == kit
    for text, message in {
        "n01440764\n" * 5: "truth.txt labels 5 images, .*val.tar has 6",
        "n01440764\ncat\n": "line 2 of .*truth.txt is 'cat', expected WNID",
        "a.JPEG n01440764\n": "has no label of 'ILSVRC2012_val_00000001.JPEG' and 5 other",
        "a.JPEG n01440764\n" * 2: "names an image twice",
        "": "truth.txt is empty",
        "\udcff": "truth.txt is not text in UTF-8",
    }.items():
        truth.write_text(text, errors="surrogateescape")
        with pytest.raises(DatasetError, match=message):
            sources_originals.imagenet_val(ilsvrc / "val.tar", truth)


def test_a_devkit_that_is_not_one_is_refused(ilsvrc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Truncated, without its files, with unknown IDs, or unpacking to more than there can be."""
    kit, val = make_devkit(ilsvrc / "kit.tar.gz"), ilsvrc / "val.tar"
    data = kit.read_bytes()
    kit.write_bytes(data[: len(data) // 2])
    with pytest.raises(DatasetError, match="kit.tar.gz is not ImageNet's devkit: EOFError"):
        sources_originals.imagenet_val(val, kit)
    with pytest.raises(DatasetError, match="not ImageNet's devkit: KeyError: 77"):
        sources_originals.imagenet_val(val, make_devkit(kit, [77]))
    with pytest.raises(DatasetError, match="its classes are not WordNet IDs"):
        sources_originals.imagenet_val(val, make_devkit(kit, wnids=["cat", "dog", "cow"]))
    with tarfile.open(kit, "w:gz"):
        pass
    with pytest.raises(DatasetError, match="KeyError: 'meta.mat'"):
        sources_originals.imagenet_val(val, kit)
    monkeypatch.setattr(sources_originals, "MAX_DEVKIT", 1000)
    with pytest.raises(DatasetError, match="unpacks to more than 1000 bytes"):
        sources_originals.imagenet_val(val, kit)


# ---- CIFAR and STL-10


def pack(path: Path, files: dict[str, bytes]) -> str:
    """A .tar.gz of these files; returns its md5."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return hashlib.md5(path.read_bytes()).hexdigest()


def no_network(*_: object, **__: object) -> None:
    raise AssertionError("asked for the network")


def make_cifar(root: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> dict[bool, tuple[Any, list[int]]]:
    """An original-format archive of `number` classes; returns {train: (planes (n, 3, 32, 32), labels)}."""
    from torchvision import datasets

    reader: Any = {10: datasets.CIFAR10, 100: datasets.CIFAR100}[number]
    rng = np.random.default_rng(number)
    files, splits, key = {}, {}, "labels" if number == 10 else "fine_labels"
    for train, names in ((True, reader.train_list), (False, reader.test_list)):
        planes, labels, checked = [], [], []
        for name, _ in names:
            data = rng.integers(0, 256, (4, 3072), np.uint8)
            some = [int(label) for label in rng.integers(0, number, 4)]
            content = pickle.dumps({"data": data, key: some, "coarse_labels": [0] * 4})
            files[f"{reader.base_folder}/{name}"] = content
            checked.append([name, hashlib.md5(content).hexdigest()])
            planes.append(data.reshape(-1, 3, 32, 32))
            labels += some
        monkeypatch.setattr(reader, "train_list" if train else "test_list", checked)
        splits[train] = (np.concatenate(planes), labels)
    content = pickle.dumps({reader.meta["key"]: [f"class {i}" for i in range(number)]})
    files[f"{reader.base_folder}/{reader.meta['filename']}"] = content
    monkeypatch.setattr(reader, "meta", {**reader.meta, "md5": hashlib.md5(content).hexdigest()})
    root.mkdir(exist_ok=True)
    monkeypatch.setattr(reader, "tgz_md5", pack(root / reader.filename, files))
    return splits


def pixels(image: bytes) -> Any:
    """(H, W, 3), as Pillow reads the PPM."""
    with Image.open(io.BytesIO(image), formats=["PPM"]) as picture:
        assert picture.mode == "RGB"
        return np.asarray(picture)


@pytest.mark.parametrize("number", [10, 100])
def test_cifar_keeps_every_pixel_and_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: Any) -> None:
    """The archive alone suffices, without the network; the pickles say what must come out, in their order."""
    splits = make_cifar(tmp_path, number, monkeypatch)
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", no_network)
    for split in ("train", "test"):
        source = sources_originals.cifar(number, tmp_path, split)  # type: ignore[arg-type]
        planes, labels = splits[split == "train"]
        assert source.classes == [f"class {i}" for i in range(number)]
        assert [label for _, label, _ in read(source)] == labels
        found = np.stack([pixels(image) for *_, image in read(source)])
        np.testing.assert_array_equal(found, planes.transpose(0, 2, 3, 1))
        assert source.samples[0].name == f"{split}/00000.ppm"


def test_an_original_that_is_missing_or_changed_is_named_and_not_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --download nothing asks the network: the message says which file belongs where."""
    make_cifar(tmp_path / "made", 10, monkeypatch)
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", no_network)
    archive = tmp_path / "root" / "cifar-10-python.tar.gz"
    with pytest.raises(DatasetError, match=f"{archive} is missing, expected http.* with md5 .*--download"):
        sources_originals.cifar(10, archive.parent, "train")
    assert not archive.parent.exists()
    archive.parent.mkdir()
    archive.write_bytes(b"<html>")
    with pytest.raises(DatasetError, match=f"{archive} is not the original archive"):
        sources_originals.cifar(10, archive.parent, "train")
    archive.write_bytes((tmp_path / "made" / archive.name).read_bytes())
    assert len(sources_originals.cifar(10, archive.parent, "train").samples) == 20
    archive.unlink()
    assert len(sources_originals.cifar(10, archive.parent, "test").samples) == 4  # what was unpacked suffices
    (archive.parent / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"damaged")
    with pytest.raises(DatasetError, match=f"{archive} is missing"):
        sources_originals.cifar(10, archive.parent, "test")


def test_download_is_torchvision_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With download the archive is fetched where it is missing; a failure is one error, with the cause."""
    make_cifar(tmp_path / "made", 10, monkeypatch)
    name = "cifar-10-python.tar.gz"
    data = (tmp_path / "made" / name).read_bytes()

    def fetch(url: str, filename: str | Path, *_: object) -> None:
        assert url.endswith(f"/{name}")
        Path(filename).write_bytes(data)

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", fetch)
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, **_: url)
    assert len(sources_originals.cifar(10, tmp_path / "new", "train", download=True).samples) == 20

    def fail(*_: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", fail)
    with pytest.raises(DatasetError, match=f"cannot get or unpack .*{name}: no route to host"):
        sources_originals.cifar(10, tmp_path / "other", "train", download=True)


def make_stl10(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An original-format archive with 6 training, 4 test and 5 unlabelled images."""
    from torchvision.datasets import STL10

    rng = np.random.default_rng(0)
    counts = {"train": 6, "test": 4, "unlabeled": 5}
    files = {f"{split}_X.bin": rng.bytes(count * 27648) for split, count in counts.items()}
    files |= {f"{split}_y.bin": rng.integers(1, 11, counts[split], np.uint8).tobytes() for split in ("train", "test")}
    for attribute in ("train_list", "test_list"):
        checked = [[name, hashlib.md5(files[name]).hexdigest()] for name, _ in getattr(STL10, attribute)]
        monkeypatch.setattr(STL10, attribute, checked)
    files["class_names.txt"] = b"".join(b"class %d\n" % i for i in range(10))
    root.mkdir(exist_ok=True)
    packed = {f"{STL10.base_folder}/{name}": content for name, content in files.items()}
    monkeypatch.setattr(STL10, "tgz_md5", pack(root / STL10.filename, packed))


@pytest.mark.parametrize("split", ["train", "test", "unlabeled", "train+unlabeled"])
def test_stl10_gives_the_images_of_torchvision_s_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: Any
) -> None:
    """Pixels, labels and order of every split; nothing but offsets is held until the images are written."""
    from torchvision.datasets import STL10

    make_stl10(tmp_path, monkeypatch)
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", no_network)
    source = sources_originals.stl10(tmp_path, split)
    theirs = STL10(tmp_path, split)
    labelled = split in ("train", "test")
    assert source.classes == ([f"class {i}" for i in range(10)] if labelled else None)
    assert all(sample.data is None for sample in source.samples)
    expected = [(np.asarray(image), int(label) if labelled else None) for image, label in theirs]  # type: ignore[misc]
    found = [(pixels(image), label) for _, label, image in read(source)]
    assert len(found) == {"train": 6, "test": 4, "unlabeled": 5, "train+unlabeled": 11}[split]
    for (image, label), (their_image, their_label) in zip(found, expected, strict=True):
        np.testing.assert_array_equal(image, their_image)
        assert label == their_label


# ---- file lists


def listed(file: Path, text: str, **options: Any) -> tuple[list[tuple[str, int | None]], list[str] | None]:
    file.write_text(text)
    source = sources_list.file_list(file, **options)
    return [(each.name, each.label) for each in source.samples], source.classes


def test_a_list_has_paths_with_names_numbers_or_nothing(tmp_path: Path) -> None:
    """Tabs or CSV, names sorted into classes, numbers kept as they are, paths from the list's folder or from root."""
    file = tmp_path / "list.txt"
    assert listed(file, "b c.jpg\n\na.jpg\n") == ([("b c.jpg", None), ("a.jpg", None)], None)
    assert listed(file, "1.jpg,dog\r\n2.jpg, cat\r\n") == ([("1.jpg", 1), ("2.jpg", 0)], ["cat", "dog"])
    assert listed(file, '"a,b.jpg",2\nc.jpg,0\n') == ([("a,b.jpg", 2), ("c.jpg", 0)], ["0", "1", "2"])
    assert listed(file, 'a,"b.jpg\tx,y\n') == ([('a,"b.jpg', 0)], ["x,y"])
    assert listed(file, "\ufeffü.jpg\t10\n猫.jpg\t9\n")[0] == [("ü.jpg", 10), ("猫.jpg", 9)]
    assert listed(file, " a.jpg , 1\n  \nb c.jpg,0\n") == ([("a.jpg", 1), ("b c.jpg", 0)], ["0", "1"])
    assert listed(file, "a.jpg\tx\n \t \n b.jpg\ty\n") == ([("a.jpg", 0), ("b.jpg", 1)], ["x", "y"])
    assert listed(file, "a.jpg,7up\nb.jpg,cat\n")[1] == ["7up", "cat"]
    (tmp_path / "names").write_text("dog\ncat\n")
    options = {"class_list": tmp_path / "names"}
    assert listed(file, "1.jpg,cat\n", **options) == ([("1.jpg", 1)], ["dog", "cat"])
    assert listed(file, "1.jpg,1\n", **options) == ([("1.jpg", 1)], ["dog", "cat"])
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.jpg").write_bytes(b"one")
    assert read(sources_list.file_list(file, class_list=tmp_path / "names", root=tmp_path / "images"))[0][2] == b"one"
    file.write_text(f"images/1.jpg\n{tmp_path}/images/1.jpg")
    source = sources_list.file_list(file)  # one file by two names is one image
    assert ([image for *_, image in read(source)], source.tally.passed_over) == ([b"one"], {"named again": 1})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "list.txt is empty"),
        ("a.jpg,1\nb.jpg\n", r"line 2 of .* has 1 fields parted by commas: .'b.jpg'., expected PATH and LABEL"),
        ("a.jpg\nb.jpg,1\n", "line 2 of .* has 2 fields .* expected PATH$"),
        ("a.jpg\tx\ty\n", "line 1 of .* has 3 fields parted by tabs"),
        ("a.jpg,\n", "line 1 of .* expected PATH, or PATH and LABEL"),
        ('a.jpg,0\n"b.jpg,1\n', "line 2 of .*list.txt is no line of a CSV file"),
        (
            "a.jpg,1\nb.jpg,-1\n",
            "line 2 of .*list.txt: the label of 'b.jpg' is '-1', expected a name, or a whole number from 0 to 99999",
        ),
        ("a.jpg,123456789\n", "the label of 'a.jpg' is '123456789'"),
        ("a.jpg,1\n\nb.jpg,--1\n", "line 3 of .*list.txt: the label of 'b.jpg' is '--1', expected a name, or a whole"),
        (f"a.jpg,{'9' * 5000}\n", "line 1 of .*list.txt: the label of 'a.jpg' is '9"),
        (
            "a.jpg,7up\nb.jpg,7\n",
            "names, or whole numbers.*line 1 of .* has '7up' and line 2 of .* has '7': .*--classes",
        ),
        ("a.jpg\nb\0.jpg\n", "line 2 of .*list.txt holds a null byte"),
        ("a.jpg 1\nb.jpg 1\n./a.jpg 2\n", "gives './a.jpg' the label '1' in line 1 and '2' in line 3"),
    ],
)
def test_a_list_that_does_not_fit_is_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        listed(tmp_path / "list.txt", text)


def test_labels_outside_a_class_list_and_files_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "names").write_text("dog\ncat\n")
    for label in ("cow", "2"):
        with pytest.raises(DatasetError, match=f"the label '{label}', no class of .*names"):
            listed(tmp_path / "list.txt", f"a.jpg,{label}\n", class_list=tmp_path / "names")
    (tmp_path / "list.txt").write_bytes(picture(0))
    with pytest.raises(DatasetError, match="list.txt is not text in UTF-8"):
        sources_list.file_list(tmp_path / "list.txt")
    with pytest.raises(DatasetError, match="is not a file"):
        sources_list.file_list(tmp_path)


def test_a_sample_cut_short_is_an_error_and_not_a_shorter_image(tmp_path: Path) -> None:
    """An archive that shrank after its headers were read."""
    (tmp_path / "a.tar").write_bytes(bytes(100))
    with pytest.raises(BadImageError, match="40 of 50 bytes are there"):
        Sample("x", file="a.tar", offset=60, size=50).read(tmp_path)
