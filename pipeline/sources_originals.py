"""Original archives: ImageNet's tars, read where they lie; CIFAR and STL-10 through torchvision's readers, which check
the md5 of the original archives before they unpack them in place.
"""

import gzip
import io
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pipeline.entries import Tally, must_be_file, read_lines
from pipeline.images import ppm
from pipeline.shards import DatasetError, Sample
from pipeline.sources import Source
from pipeline.sources_tars import Member, members

WNID = re.compile(r"n\d{8}")
MAX_DEVKIT = 2**26  # bytes of ImageNet's devkit, unpacked; the original has 4 million

# ---- ImageNet ------------------------------------------------------------------------------------------------------


def imagenet_train(archive: Path) -> Source:
    """ILSVRC2012_img_train.tar, a tar of one tar per class: the classes are their WordNet IDs, sorted.

    Labels, names and order are those of the folder that the archive would unpack to. Raises DatasetError, also where
    any of the tars is cut off or damaged: the original must be whole.
    """
    must_be_file(archive)
    images: dict[str, list[Member]] = {}
    tally = Tally()
    with open(archive, "rb") as file:
        for each in members(file, archive):
            wnid = PurePosixPath(each.name).name.removesuffix(".tar")
            if each.fault or not WNID.fullmatch(wnid) or not each.name.endswith(".tar"):
                found = f"{each.name!r}{f', {each.fault}' if each.fault else ''}"
                raise DatasetError(f"{archive} holds {found}, expected only tars of classes, such as n01440764.tar")
            if wnid in images:
                raise DatasetError(f"{archive} holds {each.name!r} twice, expected each class once")
            inside = members(file, f"{archive}, {each.name}", each.offset, each.offset + each.size)
            images[wnid] = sorted(_images(f"{archive}, {each.name}", wnid, inside, tally))
    if empty := [wnid for wnid, found in images.items() if not found] or (not images and ["any class"]):
        raise DatasetError(f"{archive} holds no image of {empty[0]}")
    classes = sorted(images)
    samples = [
        Sample(f"{wnid}/{name}", label, file=archive.name, offset=offset, size=size)
        for label, wnid in enumerate(classes)
        for name, offset, size, _ in images[wnid]
    ]
    return _imagenet(archive, "imagenet-train", samples, classes, tally, 1_281_167)


def _images(archive: Path | str, folder: str, found: Iterator[Member], tally: Tally) -> Iterator[Member]:
    """The images; each has a name of its own, for an original has."""
    names = Counter[str]()
    for member in found:
        if tally.is_image(f"{folder}/{member.name}" if folder else member.name, member.fault):
            name = PurePosixPath(member.name).name
            names[name] += 1
            if names[name] > 1:
                raise DatasetError(f"{archive} holds {name!r} twice, expected each image once")
            yield member


def imagenet_val(archive: Path, truth: Path) -> Source:
    """ILSVRC2012_img_val.tar, with the labels of `truth`; the classes are WordNet IDs, sorted, as in training.

    truth  ILSVRC2012_devkit_t12.tar.gz (this needs scipy), or a text file: lines "FILENAME WNID", or lines "WNID" for
           the images in the order of their names.
    Raises DatasetError unless every image has exactly one label.
    """
    must_be_file(archive)
    must_be_file(truth)
    tally = Tally()
    with open(archive, "rb") as file:
        images = sorted(_images(archive, "", members(file, archive), tally))
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
        Sample(name, labels[wnids[name]], file=archive.name, offset=offset, size=size)
        for name, (_, offset, size, _) in zip(names, images, strict=True)
    ]
    return _imagenet(archive, "imagenet-val", samples, classes, tally, 50_000)


def _imagenet(
    archive: Path, name: str, samples: list[Sample], classes: list[str], tally: Tally, original: int
) -> Source:
    """The source, with a warning unless it has 1000 classes and `original` samples."""
    has = f"{archive} has {len(classes)} classes and {len(samples)} images, the original 1000 and {original}"
    warning = "" if (len(classes), len(samples)) == (1000, original) else has
    return Source(samples=samples, classes=classes, root=archive.parent, name=name, tally=tally, warning=warning)


def _ground_truth(file: Path) -> tuple[list[str], list[str] | dict[str, str]]:
    """(classes, WNIDs in the order of the images, or by file name)."""
    rows = [line.split() for line in read_lines(file)]
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
    must_be_file(root / STL10.base_folder / STL10.class_names_file)
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
