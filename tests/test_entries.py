"""Every entry of a source ends as kept, converted, left out or passed over, by one set of rules for all sources.

Each hostile source is counted from outside (files on disk, lines, members that tarfile sees), and the counts on the
terminal, in actions.jsonl and in the manifest must give that sum.
"""

import json
import os
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, features

from pipeline.entries import index_labels, is_hidden, is_image, no_image
from pipeline.images import SUFFIXES
from pipeline.shards import DatasetError, read_dataset
from tests.test_make_shards import images_by_class, refused, run
from tests.test_shards import picture, stored
from tests.test_sources import Entry, make_tar, special


def counts(out: Path, stdout: str) -> dict[str, dict[str, int]]:
    """The counts of the manifest, once terminal and actions.jsonl have been found to agree with them."""
    dataset = read_dataset(out)
    found = {what: dataset.counts[what] for what in ("kept", "reencoded", "left_out", "passed_over")}
    sums = {what: sum(reasons.values()) for what, reasons in found.items()}
    *lines, total = [json.loads(line) for line in (out / "actions.jsonl").read_text("ascii").splitlines()]
    assert total | sums | {"action": "total", "entries": sum(sums.values())} == total
    for what, action in (("left_out", "left out"), ("passed_over", "passed over")):
        listed = [line for line in lines if line["action"] == action]
        assert sum(line.get("count", 1) for line in listed) == sums[what]
        assert {line["reason"] for line in listed} == found[what].keys()
    printed = re.search(r"(\d+) entries: (\d+) kept.*?, (\d+) converted.*?, (\d+) left out.*?, (\d+) passed", stdout)
    assert printed
    assert list(map(int, printed.groups())) == [sum(sums.values()), *sums.values()]
    assert dataset.samples == sums["kept"] + sums["reencoded"]
    return found


def named(out: Path) -> set[str]:
    lines = [json.loads(line) for line in (out / "actions.jsonl").read_text("ascii").splitlines()]
    return {path for line in lines for path in line.get("paths", [line.get("path", "")])}


# ---- folders


def test_every_file_of_a_hostile_folder_is_accounted_for(tmp_path: Path) -> None:
    """Suffixes in any case and of any format, hidden names, links to nowhere and in circles, folders with odd names."""
    source = tmp_path / "source"
    for folder in ("cat/x.jpg", "dog/.git", "dog/deep", ".thumbs"):
        (source / folder).mkdir(parents=True)
    files = {
        "cat/1.JPG": picture(1),
        "cat/2.jfif": picture(2),
        "cat/3.JPE": picture(3),
        "cat/4.bmp": picture(4, "BMP"),
        "cat/x.jpg/5.jpeg": picture(5),  # a folder whose name is that of an image
        "cat/6.JP2": picture(6, "JPEG2000"),
        "cat/7.png": picture(7),  # what it is, its bytes say
        "dog/deep/8.jpg": picture(8),
        os.fsdecode(b"dog/\xff9.jpg"): picture(9),
        "dog/10.jpg": b"",
        "dog/11.jpg": b"<html>",
        "dog/12.jxl": b"\xff\x0a",
        "dog/13.HEIC": b"heic",
        "dog/image": picture(14),
        "dog/.15.jpg": picture(15),
        "dog/._8.jpg": b"mac",
        "dog/notes.TXT": b"",
        "dog/a.": b"",
        "LICENSE": b"",
        "list.csv": b"",
    }
    for name, content in files.items():
        (source / name).write_bytes(content)
    (source / "dog/.git/config.jpg").write_bytes(b"")  # a hidden folder is one entry
    (source / ".thumbs/1.jpg").write_bytes(picture(1))
    links = {"cat/gone.jpg": "nowhere.jpg", "cat/self.png": "self.png", "cat/gone": "nowhere", "dog/up": "../dog"}
    for name, target in links.items():
        (source / name).symlink_to(target)
    (source / "cat/16.jpg").symlink_to(source / "cat/1.JPG")
    os.mkfifo(source / "dog/pipe.jpg")
    result = run("folder", source, tmp_path / "out")
    assert result.exit_code == 0, result.output
    found = counts(tmp_path / "out", result.stdout)
    assert found == {
        "kept": {"jpg": 8},
        "reencoded": {"BMP RGB": 1, "JPEG2000 RGB": 1},
        "left_out": {
            "a FIFO": 1,
            "a dangling link": 2,
            "empty": 1,
            "no decoder for .heic": 1,
            "no decoder for .jxl": 1,
            "no image": 1,
        },
        "passed_over": {
            ".csv": 1,
            ".txt": 1,
            "a dangling link": 1,
            "hidden": 4,
            "link to a folder that was read": 1,
            "no suffix": 3,
        },
    }
    assert sum(sum(each.values()) for each in found.values()) == len(files) + len(links) + 2 + 2
    unread = {"cat/gone.jpg", "cat/self.png", "dog/12.jxl", "dog/13.HEIC", "dog/image", "dog/pipe.jpg", "dog/.git"}
    assert unread <= named(tmp_path / "out")


@pytest.mark.skipif(not features.check("avif"), reason="Pillow reads AVIF from 11.3 on")
def test_what_pillow_decodes_is_converted_without_a_change_of_pixels(tmp_path: Path) -> None:
    """An AVIF becomes the PNG of the pixels that Pillow gives."""
    import io

    (tmp_path / "source").mkdir()
    (tmp_path / "source/1.AVIF").write_bytes(picture(1, "AVIF"))
    result = run("folder", tmp_path / "source", tmp_path / "out")
    assert counts(tmp_path / "out", result.stdout)["reencoded"] == {"AVIF RGB": 1}
    ((_, image),) = stored(read_dataset(tmp_path / "out"))
    theirs = [Image.open(io.BytesIO(data)).convert("RGB").tobytes() for data in (image, picture(1, "AVIF"))]
    assert theirs[0] == theirs[1]


def test_suffixes_are_those_that_pillow_gives_to_its_formats() -> None:
    """Each belongs to a format that Pillow opens; a suffix of a format is not forgotten beside its others."""
    from pipeline.images import FORMATS

    theirs = Image.registered_extensions()
    for name, suffixes in FORMATS.items():
        ours = {suffix for suffix in suffixes.split() if suffix in theirs}
        kind = {"JPEG": {"JPEG", "MPO"}, "BMP": {"BMP", "DIB"}}.get(name, {name})
        assert ours == {suffix for suffix, format in theirs.items() if format in kind}


def test_names_follow_one_set_of_rules() -> None:
    assert {".jpg", ".jfif", ".jpe", ".avif", ".tif", ".pnm", ".jp2"} < SUFFIXES
    for name in ("a.JPG", "../a.jpg", "./a.jpg", "/x/a.jpg", "a.b/c.Jfif", "ü.d.png"):
        assert is_image(name)
    for name in (".a.jpg", "x/.a.jpg", ".x/a.jpg", "a/.b/c.jpg", "a", "a.", "a.jpg/b", "a.jpg~", "..a/b.jpg"):
        assert not is_image(name)
    assert [is_hidden(name) for name in ("..", "./a", "../a", "a/..b", "...")] == [False, False, False, True, True]
    names = ("a.XML", "a", "a.", "x.y/a", "a.very_long_suffix", "a.b c", ".a")
    assert list(map(no_image, names)) == [".xml", *["no suffix"] * 3, *["odd suffix"] * 2, "hidden"]


# ---- lists


def test_every_line_of_a_hostile_list_is_accounted_for(tmp_path: Path) -> None:
    """Windows' line ends and mark, a header, folders and pipes, a file named again, and what names alone would hide."""
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / ".hidden").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    paths = ("a b.jpg", "a,b.jpg", ".hidden/c.jpg", "d")
    for i, path in enumerate(paths):
        (tmp_path / path).write_bytes(picture(i))
    (tmp_path / "e.jpg").write_bytes(b"")
    labels = ("cat", "dog", "ant", "cat")
    lines = ["file label", *map(" ".join, zip(paths, labels, strict=True)), "./a b.jpg cat", "e.jpg cat"]
    lines += ["folder.jpg dog", "gone.jpg dog", "pipe.jpg dog", "", "  "]
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    result = run("list", tmp_path / "list.txt", tmp_path / "out")
    assert result.exit_code == 0, result.output
    found = counts(tmp_path / "out", result.stdout)
    assert found["kept"] == {"jpg": 4}
    assert found["left_out"] == {"empty": 1, "unreadable": 3}
    assert found["passed_over"] == {"header": 1, "named again": 1}
    expected = {(label, picture(i)) for i, label in enumerate(labels)}
    assert images_by_class(tmp_path / "out") == expected
    assert {"line 1: file label", "line 6: ./a b.jpg", "gone.jpg", "folder.jpg", "pipe.jpg"} <= named(tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.jpg 1\nb c.jpg 0\n", [("a.jpg", 1), ("b c.jpg", 0)]),  # the last blank
        ("a.jpg   sea lion\nd.jpg ant\n", [("a.jpg", 1), ("d.jpg", 0)]),  # the first
        ("a.jpg\nb c.jpg\n", [("a.jpg", None), ("b c.jpg", None)]),
        ("b c.jpg\n", [("b c.jpg", None)]),
        ("e,f.jpg 1\na.jpg 0\n", [("e,f.jpg", 1), ("a.jpg", 0)]),
        ("e,f.jpg\n", [("e,f.jpg", None)]),
        ('"e,f.jpg",1\na.jpg,0\n', [("e,f.jpg", 1), ("a.jpg", 0)]),
        ("b c.jpg\tbig dog\na.jpg\tant, bee\n", [("b c.jpg", 1), ("a.jpg", 0)]),
        ("x.jpg 1\ny.jpg 0\n", [("x.jpg", 1), ("y.jpg", 0)]),  # nothing exists: the last words are no images
        ("x y.jpg\nz.jpg\n", [("x y.jpg", None), ("z.jpg", None)]),
        ("x y.jpg\n", [("x y.jpg", None)]),
        ("x,1\n", [("x", 1)]),
        ("path,label\na.jpg,dog\nd.jpg,cat\n", [("a.jpg", 1), ("d.jpg", 0)]),
        ("image class\nx.jpg 3\ny.jpg 1\n", [("x.jpg", 3), ("y.jpg", 1)]),
        ("a.jpg image\nd.jpg class\n", [("a.jpg", 1), ("d.jpg", 0)]),  # no header: the file is there
    ],
)
def test_what_parts_path_and_label_is_what_makes_paths_of_files(tmp_path: Path, text: str, expected: Any) -> None:
    from pipeline.sources_list import file_list

    for name in ("a.jpg", "b c.jpg", "d.jpg", "e,f.jpg"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "list.txt").write_text(text)
    source = file_list(tmp_path / "list.txt")
    assert [(sample.name, sample.label) for sample in source.samples] == expected


# ---- tars


def test_every_member_of_a_hostile_tar_is_accounted_for(tmp_path: Path) -> None:
    """Upper case, labels before and after, twice the same key, links, devices, climbing and hidden names, no key."""
    entries: list[Entry | tarfile.TarInfo] = [
        ("1.CLS", b"dog"),
        ("1.JPG", picture(1)),
        ("v1.0/2.SEG.PNG", picture(0, "PNG")),
        ("v1.0/2.jfif", picture(2)),
        ("v1.0/2.cls", b" cat\n"),
        ("v1.0/2.json", b"{}"),
        ("../3.gif", picture(3, "GIF")),
        ("../3.cls", b"cat"),
        (os.fsdecode(b"\xff4.jpg"), picture(4)),
        (os.fsdecode(b"\xff4.cls"), b"cat"),
        ("l" * 150 + ".jpg", picture(5)),
        ("l" * 150 + ".cls", b"dog"),
        *[("6.jpg", picture(6))] * 24,
        ("6.cls", b"cat"),
        ("1.jpg", picture(7)),  # a key that comes again is another sample
        ("1.cls", b"cat"),
        ("8.jpg", picture(8)),  # no label
        ("9.cls", b"cat"),
        ("10.jxl", b"\xff\x0a"),
        ("11.jpg", b""),
        (".thumbs/12.jpg", picture(12)),
        ("README", b""),
        ("__info__/x.jpg", picture(13)),
        special("14.jpg", tarfile.SYMTYPE),
        special("15.jpg", tarfile.CHRTYPE),
        special("16.jpg", tarfile.DIRTYPE),  # folders do not count
        ("16.jpg/17.jpg", picture(17)),
        ("16.jpg/17.cls", b"dog"),
    ]
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        (tmp_path / str(format)).mkdir()
        tar = make_tar(tmp_path / str(format) / "HOSTILE.TAR", entries, format)
        (tar.parent / "more.tar.gz").write_bytes(b"")
        out = tmp_path / f"out{format}"
        result = run("webdataset", tar.parent, out)
        assert result.exit_code == 0, result.output
        found = counts(out, result.stdout)
        with tarfile.open(tar) as theirs:
            num = sum(not member.isdir() for member in theirs)
        assert sum(sum(each.values()) for each in found.values()) == num + 1
        assert found["left_out"] == {
            "a character device": 1,
            "a symbolic link": 1,
            "compressed tar": 1,
            "empty": 1,
            "member twice": 24,
            "no decoder for .jxl": 1,
            "no label": 1,
        }
        passed = {".json": 1, "__NAME__ of webdataset": 1, "hidden": 1, "label": 8, "label without an image": 1}
        assert found["passed_over"] == passed | {"no suffix": 1, "other image of a sample": 1}
        assert read_dataset(out).classes == ("cat", "dog")
        images = images_by_class(out)
        assert {("dog", picture(1)), ("cat", picture(2)), ("cat", picture(7)), ("dog", picture(17))} < images
        assert (found["kept"], found["reencoded"]) == ({"jpg": 6}, {"GIF P": 1})


def test_the_member_that_is_the_image_is_chosen_or_asked_for(tmp_path: Path) -> None:
    entries = [(f"{i}.{e}", picture(10 * i + j)) for i in range(3) for j, e in enumerate(("jpg", "seg.png", "L.jpg"))]
    tar = make_tar(tmp_path / "a.tar", entries[:-1])
    for option, number in (((), 0), (("--image-member", "seg.png"), 1), (("--image-member", ".l.JPG"), 2)):
        out = tmp_path / f"out{number}"
        result = run("webdataset", tar, out, *option)
        assert result.exit_code == 0, result.output
        images = {image for _, image in stored(read_dataset(out))}
        assert images == {picture(10 * i + number) for i in range(2 if number == 2 else 3)}
        found = counts(out, result.stdout)
        assert sum(sum(each.values()) for each in found.values()) == 8
        assert found["left_out"] == ({"no member l.jpg": 2} if number == 2 else {})
    message = refused("webdataset", tar, tmp_path / "none", "--image-member", "depth.png")
    assert re.search(r"no image that could be used .*no member depth.png: 8.* first 'a.tar/0.jpg'", message)
    both = make_tar(tmp_path / "b.tar", [("k.left.jpg", picture(0)), ("k.right.jpg", picture(1))])
    for command in ("webdataset", "index"):
        message = refused(command, both, tmp_path / "none")
        assert re.search(r"'k' of b.tar has 2 images, left.jpg, right.jpg: choose one with --image-member", message)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("label", [{"label": "dog"}, {"label": "cat"}, {"label": 3.5}, {"label": None}, ["label"], {"label": {}}]),
        ("meta.class", [{"meta": {"class": "dog"}}, {"meta.class": "cat"}, {"meta": "class"}, {}, 7, {"meta": []}]),
        ("label", [{"label": 1}, {"label": "0"}, {"label": True}, {"label": -1}, {"label": [0]}, "label"]),
    ],
)
def test_labels_come_from_a_field_of_json(tmp_path: Path, field: str, values: list[Any]) -> None:
    """Names or whole numbers; samples whose field holds neither are left out, as are those whose JSON is broken."""
    entries = [
        (f"{i}.{e}", d)
        for i, v in enumerate(values)
        for e, d in (("jpg", picture(i)), ("JSON", json.dumps(v).encode()))
    ]
    entries += [("x.json", b"[" * 100_000), ("x.jpg", picture(9))]
    tar = make_tar(tmp_path / "a.tar", entries)
    result = run("webdataset", tar, tmp_path / "out", "--label-field", field)
    assert result.exit_code == 0, result.output
    classes = ("0", "1") if values[0] == {"label": 1} else ("cat", "dog")
    assert read_dataset(tmp_path / "out").classes == classes
    assert images_by_class(tmp_path / "out") == {(classes[1], picture(0)), (classes[0], picture(1))}
    assert counts(tmp_path / "out", result.stdout)["left_out"] == {"no label": 5}


def test_names_in_cls_are_sorted_or_have_the_places_that_are_given(tmp_path: Path) -> None:
    tar = make_tar(
        tmp_path / "a.tar",
        [(f"{i}.{e}", d) for i, n in enumerate((b"cat", b"ant")) for e, d in (("jpg", picture(i)), ("cls", n))],
    )
    (tmp_path / "names").write_text("\ufeffdog\r\ncat\r\nant\r\n", encoding="utf-8")
    assert run("webdataset", tar, tmp_path / "sorted").exit_code == 0
    result = run("webdataset", tar, tmp_path / "given", "--classes", tmp_path / "names")
    assert read_dataset(tmp_path / "sorted").classes == ("ant", "cat")
    assert read_dataset(tmp_path / "given").classes == ("dog", "cat", "ant")
    assert images_by_class(tmp_path / "sorted") == images_by_class(tmp_path / "given")
    assert "no image of 1 classes: 'dog'" in result.stderr


def test_labels_that_no_image_can_take_are_an_error_and_not_a_set_without_labels(tmp_path: Path) -> None:
    """All images first and all labels after them, as a shell lists *.jpg *.cls: they are in no sample of webdataset."""
    apart = make_tar(
        tmp_path / "a.tar", [*((f"{i}.jpg", picture(i)) for i in range(3)), ("0.cls", b"1"), ("1.cls", b"1")]
    )
    bad = make_tar(tmp_path / "b.tar", [("0.jpg", picture(0)), ("0.cls", b"-1")])
    for command in ("webdataset", "index"):
        assert re.search(r"'a.tar/0.cls' first.*follow each other", refused(command, apart, tmp_path / "out"))
        assert re.search(
            r"'b.tar/0.jpg' has none since its label '0.cls' is '-1'", refused(command, bad, tmp_path / "out")
        )
        result = run(command, apart, tmp_path / command, "--no-labels")
        assert counts(tmp_path / command, result.stdout)["passed_over"] == {".cls": 2}


def test_every_member_of_original_archives_is_accounted_for(tmp_path: Path) -> None:
    """Notes and links beside ImageNet's images; an image or a class that is there twice is no original."""

    def entries(*more: Entry | tarfile.TarInfo) -> list[Entry | tarfile.TarInfo]:
        return [
            ("n01440764_1.JPEG", picture(1)),
            ("notes.txt", b""),
            special("l.JPEG", tarfile.SYMTYPE),
            ("._x.JPEG", b""),
            *more,
        ]

    inner = make_tar(tmp_path / "inner.tar", entries()).read_bytes()
    make_tar(tmp_path / "train.tar", [("n01440764.tar", inner)])
    val = make_tar(tmp_path / "val.tar", entries())
    (tmp_path / "truth.txt").write_text("n01440764_1.JPEG n01440764")
    for command in (["imagenet-train", tmp_path / "train.tar"], ["imagenet-val", val, tmp_path / "truth.txt"]):
        out = tmp_path / str(command[0])
        result = run(*command, out)
        assert result.exit_code == 0, result.output
        found = counts(out, result.stdout)
        assert (found["kept"], found["left_out"]) == ({"jpg": 1}, {"a symbolic link": 1})
        assert found["passed_over"] == {".txt": 1, "hidden": 1}
    make_tar(tmp_path / "train.tar", [("n01440764.tar", inner), ("n01440764.tar", inner)])
    assert "'n01440764.tar' twice" in refused("imagenet-train", tmp_path / "train.tar", tmp_path / "out")
    make_tar(val, entries(("x/n01440764_1.JPEG", picture(2))))
    assert "'n01440764_1.JPEG' twice" in refused("imagenet-val", val, tmp_path / "truth.txt", tmp_path / "out")


# ---- labels


@pytest.mark.parametrize(
    ("labels", "names", "classes", "indices"),
    [
        (["2", "0"], None, ["0", "1", "2"], {"2": 2, "0": 0}),  # gaps stay classes without images
        (["dog", "cat"], None, ["cat", "dog"], {"dog": 1, "cat": 0}),
        (["1", "01"], ["cat", "dog"], ["cat", "dog"], {"1": 1, "01": 1}),
        (["1", "2"], ["cat", "dog"], ["cat", "dog"], {"1": 1}),
        (["20", "10"], ["10", "20"], ["10", "20"], {"20": 1, "10": 0}),  # names, though they look like numbers
        (["cat", "1", "cow"], ["cat", "1"], ["cat", "1"], {"cat": 0, "1": 1}),
        ([], None, [], {}),
    ],
)
def test_labels_are_numbers_or_names(
    labels: list[str], names: Any, classes: list[str], indices: dict[str, int]
) -> None:
    assert index_labels({label: "somewhere" for label in labels}, names) == (classes, indices)


def test_numbers_among_names_need_a_list_of_classes() -> None:
    with pytest.raises(DatasetError, match=r"k.cls has 'cat' and l.cls has '1': .*--classes FILE"):
        index_labels({"1": "l.cls", "cat": "k.cls"}, None)
