"""Every ugly image and every damaged shard meets what the documentation says, named by path or by shard and key.

Nothing may hang: a test that takes longer than two minutes ends the whole run with a traceback.
"""

import faulthandler
import io
import itertools
import json
import re
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageCms
from typer.testing import CliRunner, Result

from pipeline.audit import Fault, quarantine, verify
from pipeline.images import BadImageError, OnBad, Rules, ppm, ppm_shape, prepare
from pipeline.loader import Loader, LoaderError, build_eval_loader
from pipeline.shards import Dataset, DatasetError, Sample, read_dataset
from pipeline.views import ViewConfig
from pipeline.write import write_shards
from tests.test_shards import contents, labels, stored
from tools.make_shards import app

CPU = torch.device("cpu")
PLAIN = ViewConfig(size=48, eval_crop=1.0, mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255))


@pytest.fixture(autouse=True)
def _no_hanging() -> Iterator[None]:
    faulthandler.dump_traceback_later(120, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def smooth(height: int = 48, width: int = 64, channels: int = 3) -> NDArray[np.uint8]:
    """Gentle colours, so that what JPEG or a resize change is little."""
    y, x = np.mgrid[:height, :width] / (height + width)
    return np.stack([255 * (0.2 + 0.6 * a) for a in (x, y, 0.8 - x, 0.9 - y)[:channels]], -1).round().astype(np.uint8)


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def decode(image: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))


def cmyk(adobe: bool) -> bytes:
    """A JPEG of four inks, inverted as Adobe's programs write it, with their mark or without."""
    inks = 255 - smooth()
    image = Image.fromarray(np.dstack([inks, np.zeros_like(inks[..., :1])]), "CMYK")
    data = encode(image, "JPEG", quality=95)
    start = data.index(b"\xff\xeeAdobe" if b"\xff\xeeAdobe" in data else b"\xff\xee")
    assert b"Adobe" in data[start : start + 12]
    return data if adobe else data[:start] + data[start + 2 + struct.unpack(">H", data[start + 2 : start + 4])[0] :]


def png(width: int, height: int, bits: int, colour: bool, pixels: bytes) -> bytes:
    """Written by hand: Pillow writes no 16-bit RGB, and no more pixels in the header than there are."""
    head = struct.pack(">IIBBBBB", width, height, bits, 2 if colour else 0, 0, 0, 0)
    chunks = (b"IHDR" + head, b"IDAT" + zlib.compress(pixels), b"IEND")
    framed = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def wide_png(colour: bool) -> bytes:
    """16 bits per channel, the lower 8 of them noise."""
    high = smooth() if colour else smooth()[..., :1]
    low = np.random.default_rng(0).integers(0, 256, high.shape, np.uint8)
    rows = np.stack([high, low], -1).reshape(len(high), -1)
    return png(64, 48, 16, colour, b"".join(b"\0" + row.tobytes() for row in rows))


RGB = Image.fromarray(smooth())
GRAY = Image.fromarray(smooth()[..., 0])
RGBA = Image.fromarray(np.dstack([smooth(), np.tile(np.arange(64, dtype=np.uint8) * 4, (48, 1))]))
TURNED = Image.Exif()
TURNED[0x0112] = 6
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
JPEG = encode(RGB, "JPEG", quality=95)
WEBP = {"format": "WEBP", "lossless": True}
TURN = {"save_all": True, "append_images": [RGB.rotate(180)]}  # a second frame
ONE_BIT = GRAY.convert("1")
PALETTE = RGB.quantize(256)
GRAY_OF_RGB = np.asarray(RGB.convert("L").convert("RGB"))
GRAY3 = np.asarray(GRAY.convert("RGB"))

KEPT = {  # stored byte for byte: (image, extension)
    "plain.jpg": (JPEG, "jpg"),
    "gray.jpg": (encode(GRAY, "JPEG"), "jpg"),
    "progressive.jpg": (encode(RGB, "JPEG", progressive=True), "jpg"),
    "turned by EXIF.jpg": (encode(RGB, "JPEG", exif=TURNED), "jpg"),
    "with a profile.jpg": (encode(RGB, "JPEG", icc_profile=PROFILE), "jpg"),
    "JPEG after its end.jpg": (JPEG + b"trailing", "jpg"),
    "several in one.jpg": (encode(RGB, "MPO", **TURN), "jpg"),
    "png named.JPEG": (encode(RGB, "PNG"), "png"),
    "gray.png": (encode(GRAY, "PNG"), "png"),
    "1x1.png": (encode(RGB.resize((1, 1)), "PNG"), "png"),
    "20000x10.jpg": (encode(RGB.resize((20_000, 10)), "JPEG"), "jpg"),
    "plain.webp": (encode(RGB, **WEBP), "webp"),
    "plain.ppm": (ppm(smooth().tobytes(), 48, 64), "ppm"),
    "a.b..c.tar.jpg": (JPEG, "jpg"),
    "猫 é \\ '\".jpg": (JPEG, "jpg"),
}  # fmt: skip
CONVERTED = {  # (image, what it is called, extension it gets, its pixels, levels they may be off by)
    "adobe.jpg": (cmyk(adobe=True), "JPEG CMYK", "jpg", smooth(), 6),
    "inks.jpg": (cmyk(adobe=False), "JPEG CMYK", "jpg", smooth(), 6),
    "16 bits.png": (wide_png(colour=True), "PNG 16-bit", "png", smooth(), 0),
    "16 bits gray.png": (wide_png(colour=False), "PNG 16-bit", "png", GRAY3, 0),
    "alpha.png": (encode(RGBA, "PNG"), "PNG RGBA", "png", smooth(), 0),
    "alpha.webp": (encode(RGBA, **WEBP, exact=True), "WEBP RGBA", "png", smooth(), 0),
    "gray and alpha.png": (encode(RGBA.convert("LA"), "PNG"), "PNG LA", "png", GRAY_OF_RGB, 0),
    "palette.png": (encode(PALETTE, "PNG"), "PNG P", "png", np.asarray(PALETTE.convert("RGB")), 0),
    "1 bit.png": (encode(ONE_BIT, "PNG"), "PNG 1", "png", np.asarray(ONE_BIT)[..., None] * np.full(3, 255), 0),
    "moving.webp": (encode(RGB, **WEBP, **TURN), "WEBP animated", "png", smooth(), 0),
    "moving.gif": (encode(GRAY, "GIF", save_all=True, append_images=[GRAY.rotate(180)]), "GIF", "png", GRAY3, 0),
    "plain.bmp": (encode(RGB, "BMP"), "BMP RGB", "png", smooth(), 0),
    "plain.tiff": (encode(RGB, "TIFF"), "TIFF RGB", "png", smooth(), 0),
    "gray.pgm": (encode(GRAY, "PPM"), "PPM L", "png", GRAY3, 0),
    "remark.ppm": (b"P6\n# made by hand\n64 48\n255\n" + smooth().tobytes(), "PPM RGB", "png", smooth(), 0),
}  # fmt: skip
REFUSED = {  # (bytes, the reason they are counted under)
    "zero byte": (b"", "empty"),
    "half": (JPEG[:-200], "does not decode"),
    "half an alpha.png": ((alpha := CONVERTED["alpha.png"][0])[: len(alpha) // 2], "does not decode"),
    "half an inks.jpg": (CONVERTED["inks.jpg"][0][:-400], "does not decode"),
    "short.ppm": (ppm(smooth().tobytes(), 48, 64)[:-1], "does not decode"),
    "garbage": (np.random.default_rng(0).bytes(5000), "no image"),
    "page.html": (b"<!DOCTYPE html><html>404</html>", "no image"),
    "picture.svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "no image"),
    "float.tiff": (encode(Image.fromarray(smooth()[..., 0].astype(np.float32)), "TIFF"), "no 8-bit form"),
    "bomb.png": (png(30_000, 30_000, 8, True, b""), "too many pixels"),
    "bomb.ppm": (b"P6\n9000 8000\n255\n", "too many pixels"),
    "missing": (None, "unreadable"),
}  # fmt: skip


def samples(images: dict[str, Any]) -> list[Sample]:
    """Labels count from 0; an image of None is a file that is not there."""
    return [Sample(name, label, image[0]) for label, (name, image) in enumerate(images.items())]


def actions(dataset: Dataset) -> list[dict[str, str]]:
    *listed, total = [json.loads(line) for line in (dataset.root / "actions.jsonl").read_text("ascii").splitlines()]
    assert total["action"] == "total"
    return listed


def by_label(dataset: Dataset) -> dict[int, tuple[str, bytes]]:
    """(extension, image) of each label."""
    members = stored(dataset)
    pairs = zip(members[::2], members[1::2], strict=True)
    return {int(label): (name.rpartition(".")[2], image) for (_, label), (name, image) in pairs}


def evaluated(dataset: Dataset, views: ViewConfig) -> Iterator[tuple[int, torch.Tensor]]:
    """(label, image (3, S, S)) of every sample, through the loader, four at a time."""
    for images, some in build_eval_loader(dataset, views, 4, CPU, num_threads=2):
        yield from zip(some.tolist(), images, strict=True)


def write(out: Path, images: dict[str, Any], on_bad: OnBad = "reencode", **options: Any) -> Dataset:
    classes = [f"class {i}" for i in range(len(images))]
    return write_shards(samples(images), out, classes=classes, root=out.parent, shard_size=5, on_bad=on_bad, **options)


# ---- images


@pytest.fixture(scope="module")
def ugly(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Everything in one data set, as the default treats it; read only."""
    return write(tmp_path_factory.mktemp("ugly") / "set", {**KEPT, **CONVERTED, **REFUSED})


def test_what_is_fit_keeps_its_bytes_and_gets_its_own_extension(ugly: Dataset) -> None:
    """Whatever the file was called; keys are plain, for names of any kind."""
    found = by_label(ugly)
    for label, (image, extension) in enumerate(KEPT.values()):
        assert found[label] == (extension, image)
    assert ugly.counts["kept"] == {"jpg": 9, "png": 3, "ppm": 1, "webp": 1} | {"jpg": len(KEPT) - 5}
    assert all(name.isascii() and name.count(".") == 1 for name, _ in stored(ugly))


def test_what_can_be_converted_keeps_its_pixels(ugly: Dataset) -> None:
    """JPEGs become JPEGs, all else is lossless; each is listed with what it was and the key it has now."""
    found = by_label(ugly)
    listed = {each["path"]: each for each in actions(ugly) if each["action"] == "reencoded"}
    for label, (name, (_, kind, extension, pixels, levels)) in enumerate(CONVERTED.items(), len(KEPT)):
        assert found[label][0] == extension, name
        assert Image.open(io.BytesIO(found[label][1])).mode in ("RGB", "L"), name
        off = np.abs(decode(found[label][1]).astype(int) - pixels).max()
        assert off <= levels, (name, off)
        assert listed[name]["reason"].startswith(kind), name
        assert f"{listed[name]['key']}.{extension}" in dict(stored(ugly)), name
    assert len(listed) == len(CONVERTED) == sum(ugly.counts["reencoded"].values())


def test_what_cannot_be_used_is_left_out_and_named(ugly: Dataset) -> None:
    listed = {each["path"]: each for each in actions(ugly) if each["action"] == "left out"}
    assert {name: each["reason"] for name, each in listed.items()} == {name: bad for name, (_, bad) in REFUSED.items()}
    assert all(each["detail"] for each in listed.values())
    assert sum(ugly.counts["left_out"].values()) == len(REFUSED)
    assert ugly.samples == len(KEPT) + len(CONVERTED)


def test_skip_leaves_out_whatever_is_not_stored_as_it_is(tmp_path: Path) -> None:
    dataset = write(tmp_path / "set", {**KEPT, **CONVERTED, **REFUSED}, "skip")
    assert by_label(dataset) == {label: (each[1], each[0]) for label, each in enumerate(KEPT.values())}
    assert {each["path"] for each in actions(dataset)} == {*CONVERTED, *REFUSED}
    assert {each["action"] for each in actions(dataset)} == {"left out"}
    assert dataset.counts["reencoded"] == {}


@pytest.mark.parametrize("name", [*CONVERTED, *REFUSED])
def test_fail_ends_at_the_first_one_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    """The message names the image and why it cannot be stored."""
    images = {"good.jpg": (JPEG, "jpg"), name: {**CONVERTED, **REFUSED}[name]}
    with pytest.raises(DatasetError, match=rf"'{name}' cannot be stored \(.*: .*\).*Nothing was written"):
        write(tmp_path / "set", images, "fail")
    assert list(tmp_path.iterdir()) == []


def test_fail_lets_a_clean_set_through(tmp_path: Path) -> None:
    assert write(tmp_path / "set", KEPT, "fail").samples == len(KEPT)


def test_all_that_is_stored_is_read_as_pillow_reads_it(ugly: Dataset) -> None:
    """DALI's decoder against Pillow's, EXIF ignored by both: the label finds the image, of any size and kind."""
    found = by_label(ugly)
    read = dict(evaluated(ugly, PLAIN))
    assert sorted(read) == sorted(found)
    for label, (_, image) in found.items():
        pixels = Image.fromarray(decode(image))
        assert read[label].shape == (3, 48, 48)
        if pixels.size == (64, 48):  # others are resized, which other tests are about
            off = np.abs(read[label].permute(1, 2, 0).numpy() - np.asarray(pixels)[:, 8:56]).max()
            assert off <= 4, (label, off)


def test_training_views_come_of_all_that_is_stored(ugly: Dataset) -> None:
    loader = Loader(ugly, ViewConfig(size=16), 4, CPU, num_threads=2)
    for _ in range(loader.steps_per_epoch):
        views = next(loader).views
        assert views.shape == (8, 3, 16, 16)
        assert torch.isfinite(views).all()


def test_without_verification_headers_still_decide(tmp_path: Path) -> None:
    """What is broken further on gets in; what its header shows to be unfit is treated as ever."""
    dataset = write(tmp_path / "set", {**KEPT, **CONVERTED, **REFUSED}, verify=False)
    unseen = {"half"}
    assert {each["path"] for each in actions(dataset)} == {*CONVERTED, *REFUSED} - unseen


# ---- shrinking, and bare pixels


@pytest.mark.parametrize(
    ("size", "expected"),
    [((300, 200), (48, 32)), ((200, 301), (32, 48)), ((2000, 33), (1939, 32)), ((32, 100), None), ((31, 900), None)],
)
def test_resize_shrinks_the_shorter_side_as_torchvision_does(size: tuple[int, int], expected: Any) -> None:
    """The size and the pixels are those of torchvision's antialiased bicubic Resize; small images keep their bytes."""
    from torchvision.transforms import InterpolationMode, Resize

    image = Image.fromarray(smooth(size[1], size[0]))
    for format, levels in (("PNG", 4), ("JPEG", 5)):
        data = encode(image, format, **({"quality": 95} if format == "JPEG" else {}))
        result = prepare(data, Rules(resize=32, quality=95))
        if not expected:
            assert (result.data, result.change) == (data, None)
            continue
        assert (result.extension, result.change) == ("jpg", "resized")
        assert Image.open(io.BytesIO(result.data)).size == expected
        reference = Resize(32, InterpolationMode.BICUBIC)(image)
        assert np.abs(decode(result.data).astype(int) - np.asarray(reference)).max() <= levels


def test_quality_sets_the_size_of_what_is_shrunk() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8))
    sizes = [len(prepare(encode(noise, "PNG"), Rules(resize=64, quality=q)).data) for q in (50, 90, 100)]
    assert sizes[0] < sizes[1] < sizes[2]


def test_a_shrunk_image_carries_nothing_but_pixels() -> None:
    """An EXIF orientation or a profile that stayed would be applied by some readers, to other pixels than meant."""
    for name in ("turned by EXIF.jpg", "with a profile.jpg"):
        result = Image.open(io.BytesIO(prepare(KEPT[name][0], Rules(resize=20)).data))
        assert result.size == (26, 20)
        assert not {"exif", "icc_profile"} & set(result.info)


def test_resized_images_are_counted_but_not_listed(tmp_path: Path) -> None:
    images = {f"{i}.jpg": (encode(RGB.resize((20 * i, 20 * i)), "JPEG"), "jpg") for i in range(1, 6)}
    dataset = write(tmp_path / "set", images, resize=40, quality=80)
    assert dataset.counts["kept"] == {"jpg": 2}
    assert dataset.counts["reencoded"] == {"resized": 3}
    assert actions(dataset) == []
    assert (dataset.options["resize"], dataset.options["quality"]) == (40, 80)


def tiles(num: int, height: int = 24, width: int = 20) -> dict[str, Any]:
    """Images of one size, each of its own colours."""
    rng = np.random.default_rng(0)
    return {f"{i}": (rng.integers(0, 256, (height, width, 3), np.uint8), "ppm") for i in range(num)}


@pytest.mark.parametrize("format", ["PPM", "PNG", "BMP"])
def test_bare_pixels_are_stored_and_read_without_a_change(tmp_path: Path, format: str) -> None:
    """PPM files as they come, others on request; the reader gives the very pixels back, with no decoder between."""
    pixels = [image for image, _ in tiles(7).values()]
    images = {f"{i}": (encode(Image.fromarray(image), format), "") for i, image in enumerate(pixels)}
    dataset = write(tmp_path / "set", images, **({} if format == "PPM" else {"store": "ppm"}))
    assert (dataset.raw, dataset.extensions) == ((24, 20), ("ppm",))
    for label, (extension, image) in by_label(dataset).items():
        assert (extension, ppm_shape(image)) == ("ppm", (24, 20))
        assert np.array_equal(decode(image), pixels[label])
    config = ViewConfig(size=20, eval_crop=1.0, mean=PLAIN.mean, std=PLAIN.std)
    for label, image in evaluated(dataset, config):
        assert np.allclose(image.permute(1, 2, 0).numpy(), pixels[label][2:22], atol=1e-3)


def test_views_of_bare_pixels_equal_those_of_png_files(tmp_path: Path) -> None:
    """The same samples in the same order: how they are stored changes no view by a bit."""
    images = {name: (encode(Image.fromarray(image), "PNG"), "png") for name, (image, _) in tiles(12).items()}
    config = ViewConfig(size=16)
    batches = []
    for store in ("original", "ppm"):
        dataset = write(tmp_path / store, images, store=store)
        batches.append(next(Loader(dataset, config, 8, CPU, num_threads=2)))
    assert torch.equal(batches[0].labels, batches[1].labels)
    assert torch.equal(batches[0].views, batches[1].views)


def test_bare_pixels_of_several_sizes_go_through_the_decoder(tmp_path: Path) -> None:
    images = {f"{i}": (ppm(bytes([i] * 3 * 16 * (16 + i)), 16 + i, 16), "") for i in range(6)}
    dataset = write(tmp_path / "set", images)
    assert (dataset.raw, dataset.extensions) == (None, ("ppm",))
    read = dict(evaluated(dataset, PLAIN))
    assert sorted(read) == list(range(6))
    assert all(torch.allclose(image, torch.full((3, 48, 48), float(i)), atol=1e-3) for i, image in read.items())
    assert next(Loader(dataset, ViewConfig(size=16), 4, CPU)).views.shape == (8, 3, 16, 16)


def test_one_odd_image_among_bare_pixels_is_known(tmp_path: Path) -> None:
    """raw promises that every image has this form; a JPEG among them takes the promise back."""
    images = {**{f"{i}": (ppm(bytes(3 * 16 * 16), 16, 16), "") for i in range(6)}, "odd": (JPEG, "")}
    assert write(tmp_path / "set", images).raw is None
    with pytest.raises(BadImageError, match="too many pixels|more than"):
        prepare(ppm(bytes(3 * 16 * 16), 16, 16), Rules(max_pixels=255))


# ---- labels


@pytest.mark.parametrize("label", [None, "cat", 1.5, -1, 3])
def test_a_label_that_is_none_is_refused_by_the_writer(tmp_path: Path, label: Any) -> None:
    """Before anything is written, naming the sample."""
    with pytest.raises(DatasetError, match=rf"'odd.jpg' has label {label!r}, expected a label from 0 to 2"):
        write_shards([Sample("odd.jpg", label, JPEG)], tmp_path / "set", classes=["a", "b", "c"])
    assert list(tmp_path.iterdir()) == []


# ---- shards damaged after they were written


def place(dataset: Dataset, label: int, part: str) -> tuple[Path, str, int, int]:
    """(tar, key, offset, size) of a member of the sample with that label."""
    for path in map(Path, dataset.tars):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                if member.name.endswith(".cls") and int(file.read()) == label:
                    key = member.name.removesuffix(".cls")
                    found = member if part == "cls" else next(m for m in tar if m.name.startswith(key) and m != member)
                    return path, key, found.offset_data, found.size
    raise AssertionError(label)


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def whole(out: Path, **options: Any) -> Dataset:
    images = {f"{i}": (encode(Image.fromarray(image), "PNG"), "png") for i, (image, _) in enumerate(tiles(20).values())}
    return write(out, images, **options)


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_whole_set_has_no_fault(tmp_path: Path, images: bool, workers: int) -> None:
    dataset = whole(tmp_path / "set")
    calls: list[tuple[int, int]] = []
    assert verify(dataset.root, images=images, workers=workers, progress=lambda *done: calls.append(done)) == []
    assert calls == [(5, 20), (10, 20), (15, 20), (20, 20)]


def spoil_image(dataset: Dataset) -> tuple[str, str | None]:
    tar, key, offset, size = place(dataset, 3, "png")
    overwrite(tar, offset, bytes(size))
    return tar.name, key


def spoil_label(dataset: Dataset) -> tuple[str, str | None]:
    tar, key, offset, _ = place(dataset, 3, "cls")
    overwrite(tar, offset, b"x")
    return tar.name, key


def large_label(dataset: Dataset) -> tuple[str, str | None]:
    tar, key, offset, size = place(dataset, 13, "cls")
    overwrite(tar, offset, b"9" * size)
    return tar.name, key


def spoil_header(dataset: Dataset) -> tuple[str, str | None]:
    tar, key, offset, _ = place(dataset, 3, "png")
    overwrite(tar, offset - 512, b"another name")
    return tar.name, key


def flip_padding(dataset: Dataset) -> tuple[str, str | None]:
    tar, _, offset, size = place(dataset, 3, "cls")
    overwrite(tar, offset + size, b"x")
    return tar.name, None


def truncate(dataset: Dataset) -> tuple[str, str | None]:
    tar, key, offset, size = place(dataset, 3, "png")
    tar.write_bytes(tar.read_bytes()[: offset + size // 2])
    return tar.name, key


def stale_index(dataset: Dataset) -> tuple[str, str | None]:
    tar, key, offset, _ = place(dataset, 3, "png")
    index = Path(f"{tar}.idx")
    index.write_text(index.read_text().replace(f" {offset} ", f" {offset + 512} "))
    return tar.name, key


def garbage_index(dataset: Dataset) -> tuple[str, str | None]:
    Path(f"{dataset.tars[1]}.idx").write_bytes(b"\xff\n1 2 3\ncls -1 1 a.cls\ncls 1%s 1 a.cls\n\n" % bytes(b"0" * 40))
    return Path(dataset.tars[1]).name, None


def empty_index(dataset: Dataset) -> tuple[str, str | None]:
    Path(f"{dataset.tars[2]}.idx").write_bytes(b"")
    return Path(dataset.tars[2]).name, None


def label_left_out(dataset: Dataset) -> tuple[str, str | None]:
    tar, key, *_ = place(dataset, 3, "cls")
    index = Path(f"{tar}.idx")
    lines = [" ".join(line.split()[4:]) if f"{key}." in line else line for line in index.read_text().splitlines()]
    index.write_text("\n".join([*lines, ""]))
    return tar.name, key


def no_tar(dataset: Dataset) -> tuple[str, str | None]:
    Path(dataset.tars[1]).unlink()
    return Path(dataset.tars[1]).name, None


DAMAGES: dict[Callable[[Dataset], tuple[str, str | None]], str] = {
    spoil_image: r"png: no image \(",
    spoil_label: r"its label is b'x.*', expected a number from 0 to 19",
    large_label: r"its label is b'99', expected a number from 0 to 19",
    spoil_header: r"the index puts .*\.png at byte \d+, where there is none: bad checksum",
    flip_padding: r"sha256 is not that of the tar that was written",
    truncate: r"png is cut off: the tar ends at byte \d+",
    stale_index: r"the index puts .*\.png at byte \d+, where there is none",
    garbage_index: r"line 2 of .*idx is malformed: '1 2 3'",
    empty_index: r"idx is empty, expected an index of 5 samples",
    label_left_out: r"it has png, expected png and cls",
    no_tar: r"cannot be read \(No such file or directory\)",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_each_damage_is_found_naming_shard_and_key(tmp_path: Path, damage: Any) -> None:
    """In one shard of four; the shard itself is named too, and the other shards are not."""
    dataset = whole(tmp_path / "set")
    shard, key = damage(dataset)
    faults = verify(dataset.root)
    assert {fault.shard for fault in faults} == {shard}
    assert any(fault.key is None for fault in faults)
    assert [fault for fault in faults if fault.key == key and re.search(DAMAGES[damage], fault.problem)], faults


def test_many_damages_are_found_at_once(tmp_path: Path) -> None:
    dataset = whole(tmp_path / "set")
    named = {spoil_image(dataset), large_label(dataset), no_tar(dataset)}
    assert named <= {(fault.shard, fault.key) for fault in verify(dataset.root, workers=2)}


def test_a_damaged_bare_image_is_found(tmp_path: Path) -> None:
    dataset = whole(tmp_path / "set", store="ppm")
    tar, key, offset, _ = place(dataset, 3, "ppm")
    overwrite(tar, offset, b"P5")
    assert Fault(tar.name, key, f"{key}.ppm is no PPM of 20x24 pixels") in verify(dataset.root)


@pytest.mark.parametrize("damage", [truncate, stale_index, garbage_index, empty_index, label_left_out, no_tar])
def test_the_loader_never_starts_on_files_that_are_not_the_manifest_s(tmp_path: Path, damage: Any) -> None:
    dataset = whole(tmp_path / "set")
    shard, _ = damage(dataset)
    with pytest.raises(DatasetError, match=shard):
        read_dataset(dataset.root)


@pytest.mark.parametrize("damage", [spoil_image, spoil_label, large_label])
def test_the_loader_stops_at_what_it_cannot_read(tmp_path: Path, damage: Any) -> None:
    """In-place damage keeps size and index: the batch of 4 that meets it fails and names data set, shard and key."""
    dataset = whole(tmp_path / "set")
    shard, key = damage(dataset)
    loader = Loader(read_dataset(dataset.root), ViewConfig(size=16), 4, CPU, shuffle=False)
    with pytest.raises(LoaderError, match=f"{dataset.root}: {shard}:{key} "):
        list(itertools.islice(loader, loader.steps_per_epoch))
    with pytest.raises(LoaderError, match=f"{dataset.root}: {shard}:{key} "):
        list(evaluated(dataset, PLAIN))


# ---- quarantine


def test_quarantined_samples_are_not_read_any_more(tmp_path: Path) -> None:
    """The others are, once each; no tar and no first index is touched, and the set is another one to a run."""
    dataset = whole(tmp_path / "set")
    before = contents(dataset.root)
    keys = {label: place(dataset, label, "cls")[1] for label in (3, 4, 11)}
    after = quarantine(dataset.root, [keys[3]])
    assert after.samples == 19
    after = quarantine(dataset.root, [*keys.values(), f"{keys[3]}.png"])
    assert after == read_dataset(dataset.root)
    assert after.counts["quarantined"] == sorted(keys.values())
    assert after.samples == 17
    assert after.counts["per_class"] == [int(label not in keys) for label in range(20)]
    assert after.fingerprint != dataset.fingerprint
    assert sorted(label for label, _ in evaluated(after, PLAIN)) == sorted(set(range(20)) - set(keys))
    now = contents(dataset.root)
    assert {name: now[name] for name in before if name != "dataset.json"} == {
        name: data for name, data in before.items() if name != "dataset.json"
    }
    assert verify(dataset.root, images=True) == []


def test_a_quarantine_can_be_undone(tmp_path: Path) -> None:
    dataset = whole(tmp_path / "set")
    key = place(dataset, 5, "cls")[1]
    quarantine(dataset.root, [key])
    quarantine(dataset.root, [place(dataset, 6, "cls")[1]])
    (dataset.root / "dataset.json.original").replace(dataset.root / "dataset.json")
    assert read_dataset(dataset.root) == dataset
    assert quarantine(dataset.root, [key]).samples == 19


@pytest.mark.parametrize("damage", [spoil_image, spoil_label, large_label], ids=lambda damage: damage.__name__)
def test_a_damaged_sample_is_found_left_out_and_training_goes_on(tmp_path: Path, damage: Any) -> None:
    dataset = whole(tmp_path / "set")
    damage(dataset)
    keys = [fault.key for fault in verify(dataset.root) if fault.key]
    after = quarantine(dataset.root, keys)
    loader = Loader(after, ViewConfig(size=16), 4, CPU)
    for _ in range(2 * loader.steps_per_epoch):
        next(loader)


def test_a_shard_may_lose_all_its_samples_but_a_set_may_not(tmp_path: Path) -> None:
    dataset = whole(tmp_path / "set")
    keys = [name.partition(".")[0] for name, _ in stored(dataset) if name.endswith(".cls")]
    after = quarantine(dataset.root, keys[:5])
    assert [shard.file for shard in after.shards] == [f"train-00000{i}.tar" for i in (1, 2, 3)]
    assert sorted(labels(after)) == sorted(set(range(20)) - set(labels(dataset)[:5]))
    before = contents(dataset.root)
    with pytest.raises(DatasetError, match="no sample of .* would be left"):
        quarantine(dataset.root, keys)
    assert contents(dataset.root) == before
    assert read_dataset(dataset.root) == after


def test_unknown_keys_are_refused_and_nothing_changes(tmp_path: Path) -> None:
    dataset = whole(tmp_path / "set")
    key, before = place(dataset, 5, "cls")[1], contents(dataset.root)
    with pytest.raises(DatasetError, match=r"has no sample nonsense \(1 unknown keys\)"):
        quarantine(dataset.root, [key, "nonsense"])
    assert contents(dataset.root) == before


def test_a_quarantine_that_was_cut_short_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest is replaced last and at once: before that, new indexes lie unused beside the old ones."""
    import pipeline.audit

    dataset = whole(tmp_path / "set")
    keys = [place(dataset, label, "cls")[1] for label in range(20)][::3]
    write_text = pipeline.audit.write_text

    def fail(path: Path, text: str) -> None:
        if path.name == "dataset.json":
            raise OSError(28, "No space left on device")
        write_text(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.audit, "write_text", fail)
        with pytest.raises(OSError, match="No space"):
            quarantine(dataset.root, keys)
    assert read_dataset(dataset.root) == dataset
    assert quarantine(dataset.root, keys).samples == 20 - len(keys)


# ---- the commands


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_verify_and_quarantine_work_hand_in_hand(tmp_path: Path) -> None:
    """verify names the fault and ends with 1; its report tells quarantine what to leave out; then images all decode."""
    dataset = whole(tmp_path / "set")
    clean = command("verify", dataset.root, "--images", "--workers", 1)
    assert (clean.exit_code, clean.stderr) == (0, "")
    assert re.search(r"set: no fault in 20 samples in 4 shards \(\d+ samples/s, \d+ MiB/s\)", clean.stdout)
    shard, key = spoil_image(dataset)
    report = tmp_path / "faults.jsonl"
    found = command("verify", dataset.root, "--report", report, "--workers", 1)
    assert found.exit_code == 1
    assert f"{shard} {key}: {key}.png: no image (" in found.stdout
    assert f"{shard}: its sha256 is not that" in found.stdout
    assert "2 faults in 20 samples" in found.stdout
    assert "make_shards:" not in found.stderr
    left = command("quarantine", dataset.root, "--from", report)
    assert (left.exit_code, left.stdout) == (0, f"{dataset.root}: 19 samples in 4 shards, 1 in quarantine\n")
    again = command("verify", dataset.root, "--workers", 1)
    assert "1 fault in 19 samples" in again.stdout  # the tar stays as damaged as it was


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "nowhere"], "nowhere is no data set: it does not exist"),
        (["quarantine", "nowhere", "key"], "nowhere is no data set: it does not exist"),
        (["quarantine", "set"], "the command names no key to leave out"),
        (["quarantine", "set", "key"], "has no sample key"),
        (["quarantine", "set", "--from", "set/dataset.json"], "is not a report of verify"),
    ],
)
def test_each_mistake_ends_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    """Exit code 2, and nothing changes."""
    monkeypatch.chdir(tmp_path)
    dataset = whole(tmp_path / "set")
    result = command(*arguments)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert message in result.stderr
    assert read_dataset(dataset.root) == dataset


def test_a_report_is_never_overwritten(tmp_path: Path) -> None:
    dataset = whole(tmp_path / "set")
    (tmp_path / "report").write_text("mine")
    result = command("verify", dataset.root, "--report", tmp_path / "report")
    assert result.exit_code == 2
    assert "exists, and nothing is ever overwritten" in result.stderr
    assert (tmp_path / "report").read_text() == "mine"
