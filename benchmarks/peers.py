"""Loaders of other libraries, asked for the same two views: peers of benchmarks/loader.py and benchmarks/against.py.

They read the same images from class folders (webdataset: the same shards) with the same probabilities, strengths and
sizes: torchvision's transforms on PIL images and (v2) on tensors, lightly's SimCLRTransform, webdataset with
torchvision's, each with one DataLoader worker per core; and DALI graphs written the usual way: colour by color_twist,
blur with the widest window, on the images that a coin picks (conditionals), or on all of them with the coin deciding
which result to keep (masks, as solo-learn does).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.shards import read_dataset
from pipeline.views import ViewConfig

SHUFFLE = 2048  # samples in the shuffle buffer of loaders that have one
Batches = Iterator[tuple[int, Sequence[Tensor]]]  # source images, and their two views (n, 3, S, S) where it makes any


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a loader is asked for: both views of `shards` or `images` (class folders of the same files), endlessly."""

    shards: Path
    images: Path | None = None
    views: ViewConfig
    batch_size: int
    threads: int  # of DALI, or workers of a DataLoader; on a CPU also the number of cores they share
    device: str = "cpu"
    hw_decoder_load: float | None = None  # None: the loader's own choice

    @property
    def device_id(self) -> int | None:
        return 0 if self.device == "cuda" else None


class TwoViews:
    """Both views of an image, by one transform."""

    def __init__(self, transform: Callable[[Any], Tensor]) -> None:
        self.transform = transform

    def __call__(self, image: Any) -> tuple[Tensor, Tensor]:
        return self.transform(image), self.transform(image)


def simclr_transform(transforms: Any, to_float: Callable[[Any], Tensor], c: ViewConfig) -> Callable[[Any], Tensor]:
    """SimCLR's augmentation of torchvision.transforms, or of its v2, which has the same names."""
    strength = c.jitter_strength
    interpolation = {"linear": transforms.InterpolationMode.BILINEAR, "cubic": transforms.InterpolationMode.BICUBIC}
    jitter = transforms.ColorJitter(
        c.brightness * strength, c.contrast * strength, c.saturation * strength, c.hue * strength
    )
    blur = transforms.GaussianBlur(c.max_window, c.blur_sigma)
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(
                c.size, c.crop_area, c.crop_ratio, interpolation=interpolation[c.interpolation], antialias=True
            ),
            transforms.RandomHorizontalFlip(c.flip_p),
            transforms.RandomApply([jitter], c.jitter_p),
            transforms.RandomGrayscale(c.grayscale_p),
            *([transforms.RandomApply([blur], c.blur_p)] if c.blur_p else []),
            to_float,
            transforms.Normalize(c.mean, c.std),
        ]
    )


def batches_of(task: Task, dataset: Any, **options: Any) -> Batches:
    """A DataLoader with one worker per core over ((view, view), label)."""
    options |= {"num_workers": task.threads, "multiprocessing_context": "fork", "pin_memory": task.device == "cuda"}
    loader = torch.utils.data.DataLoader(dataset, persistent_workers=True, **options)
    for views, _ in loader:
        yield len(views[0]), views


def endless(dataset: Any, task: Task) -> dict[str, Any]:
    """Options that shuffle a dataset anew every epoch, with no pause between epochs."""
    sampler = torch.utils.data.RandomSampler(dataset, num_samples=2**40)
    return {"sampler": sampler, "batch_size": task.batch_size}


def folder(task: Task, transform: Callable[[Any], Tensor], **options: Any) -> Batches:
    from torchvision.datasets import ImageFolder

    dataset = ImageFolder(str(task.images), TwoViews(transform), **options)
    return batches_of(task, dataset, **endless(dataset, task))


def torchvision_pil(task: Task) -> Batches:
    from torchvision import transforms

    return folder(task, simclr_transform(transforms, transforms.ToTensor(), task.views))


def torchvision_v2(task: Task) -> Batches:
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms import v2

    transform = simclr_transform(v2, v2.ToDtype(torch.float32, scale=True), task.views)
    return folder(task, transform, loader=partial(decode_image, mode=ImageReadMode.RGB))


def lightly_simclr(task: Task) -> Batches:
    from lightly.transforms import SimCLRTransform

    c = task.views
    transform = SimCLRTransform(
        input_size=c.size,
        cj_prob=c.jitter_p,
        cj_strength=c.jitter_strength,
        cj_bright=c.brightness,
        cj_contrast=c.contrast,
        cj_sat=c.saturation,
        cj_hue=c.hue,
        min_scale=c.crop_area[0],
        random_gray_scale=c.grayscale_p,
        gaussian_blur=c.blur_p,
        sigmas=c.blur_sigma,
        hf_prob=c.flip_p,
        normalize={"mean": list(c.mean), "std": list(c.std)},
    )
    from torchvision.datasets import ImageFolder

    dataset = ImageFolder(str(task.images), transform)  # it gives both views itself
    return batches_of(task, dataset, **endless(dataset, task))


def webdataset(task: Task) -> Batches:
    import webdataset as wds
    from torchvision import transforms

    dataset = read_dataset(task.shards)
    members = [";".join(dataset.extensions), *(["cls"] if dataset.labelled else ["__key__"])]
    views = TwoViews(simclr_transform(transforms, transforms.ToTensor(), task.views))
    stream = wds.WebDataset(dataset.tars, resampled=True, shardshuffle=False).shuffle(SHUFFLE // task.threads)
    stream = stream.decode("pilrgb").to_tuple(*members).map_tuple(views, lambda label: label)
    return batches_of(task, stream.batched(task.batch_size, collation_fn=_collate), batch_size=None)


def _collate(samples: list[Any]) -> Any:
    return torch.utils.data.default_collate(samples)


def usual_dali(task: Task, *, masks: bool = False) -> Batches:
    """One decode, then per view: random_resized_crop, color_twist, grey by saturation 0, blur, and normalised flip."""
    from nvidia.dali import fn, pipeline_def, types

    c, gpu = task.views, task.device == "cuda"

    def uniform(middle: float, width: float) -> Any:
        return fn.random.uniform(range=[max(middle - width, 0.0) if middle else -width, middle + width])

    def jitter(view: Any) -> Any:
        b, k, s, h = (c.jitter_strength * x for x in (c.brightness, c.contrast, c.saturation, c.hue))
        return fn.color_twist(
            view, brightness=uniform(1, b), contrast=uniform(1, k), saturation=uniform(1, s), hue=uniform(0, 360 * h)
        )

    def gray(view: Any) -> Any:
        return fn.hsv(view, saturation=0.0)

    def blur(view: Any) -> Any:
        return fn.gaussian_blur(view, sigma=fn.random.uniform(range=c.blur_sigma), window_size=c.max_window)

    def sometimes(operation: Any, view: Any, p: float) -> Any:
        if masks:
            picked = fn.random.coin_flip(probability=p, dtype=types.UINT8)
            return operation(view) * picked + view * (1 - picked)
        if fn.random.coin_flip(probability=p, dtype=types.BOOL):
            view = operation(view)
        return view

    def augment(image: Any) -> Any:
        kind = {"linear": types.INTERP_LINEAR, "cubic": types.INTERP_CUBIC}[c.interpolation]
        area, ratio = list(c.crop_area), list(c.crop_ratio)
        view = fn.random_resized_crop(
            image, size=[c.size, c.size], random_area=area, random_aspect_ratio=ratio, interp_type=kind
        )
        view = sometimes(jitter, view, c.jitter_p)
        view = sometimes(gray, view, c.grayscale_p)
        if c.blur_p > 0:
            view = sometimes(blur, view, c.blur_p)
        return fn.crop_mirror_normalize(
            view,
            mirror=fn.random.coin_flip(probability=c.flip_p),
            mean=[255 * m for m in c.mean],
            std=[255 * s for s in c.std],
            dtype=types.FLOAT,
        )

    @pipeline_def(
        batch_size=task.batch_size, num_threads=task.threads, device_id=task.device_id, enable_conditionals=not masks
    )
    def build() -> Any:
        encoded, _ = fn.readers.file(file_root=str(task.images), random_shuffle=True, initial_fill=SHUFFLE)
        image = fn.decoders.image(encoded, device="mixed" if gpu else "cpu", output_type=types.RGB)
        return augment(image), augment(image)

    pipe = build()
    while True:
        yield task.batch_size, [torch.from_dlpack(view.as_tensor()) for view in pipe.run()]


PEERS: dict[str, Callable[[Task], Batches]] = {
    "torchvision, PIL": torchvision_pil,
    "torchvision v2, tensors": torchvision_v2,
    "webdataset + torchvision": webdataset,
    "lightly": lightly_simclr,
    "DALI, conditionals": usual_dali,
    "DALI, masks": partial(usual_dali, masks=True),
}


def installed() -> list[str]:
    """The peers that can be measured here."""
    if find_spec("lightly"):
        return list(PEERS)
    print("lightly is not installed and left out")
    return [name for name in PEERS if name != "lightly"]


def version(name: str) -> str:
    """Of the library that a loader shows; empty for ours and DALI's."""
    package = name.replace(",", " ").split()[0]
    return metadata.version(package) if package in ("torchvision", "webdataset", "lightly") else ""
