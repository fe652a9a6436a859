"""Two views of each image from JPEGs: what every stage of the pipeline costs, and what its peers take for the same.

    python -m benchmarks.loader SHARDS --images FOLDER                  224 px, stages on 1, 2 and 4 CPU cores
    python -m benchmarks.loader SHARDS --images FOLDER --size 32        CIFAR's views
    python -m benchmarks.loader SHARDS --device cuda                    also hw_decoder_load, and memory over 2000 steps

Stages are the pipeline itself with what follows them left out, so what one adds is the difference to the one before. On
a CPU the matrix that normalises a fast view is the one that recolours it, so there colour adds next to nothing.
Peers read the same images from class folders, or the same shards, with the same probabilities, strengths and sizes:
torchvision's transforms on PIL images and (v2) on tensors, lightly's SimCLRTransform where it is installed, webdataset
with torchvision's, each with one DataLoader worker per core; and DALI graphs written the usual way: colour by
color_twist, blur with the widest window, on the images that a coin picks (conditionals) or on all of them with the
coin deciding which result to keep (masks, as solo-learn does).

Every loader lives in a process of its own, pinned to the same cores, and stands still between its turns; rounds go
through all of them, the first is warm-up, and the median of the rest counts. Rows go to records/loader.csv, the plot to
records/loader-DEVICE-SIZE.png. CPU ms per source image depend on what else the machine does far less than images/s do,
but still by a third: for either, look at the record's `load`, and compare within one run only.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from torch import Tensor

from benchmarks.measure import (
    RECORDS,
    Timing,
    append,
    cpu_seconds,
    die_with_parent,
    environment,
    held_mib,
    peak_host_mib,
    save_plot,
    timing,
)
from pipeline.loader import Loader
from pipeline.order import Order
from pipeline.reader import Encoded, Reader, ahead
from pipeline.shards import Dataset, read_dataset
from pipeline.views import ViewConfig, make_views, parse_changes

ROUNDS = 5
OURS = "SwiftCLR"
HAND_OVER = "normalise, hand over"


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


SHUFFLE = 2048  # samples in the shuffle buffer of loaders that have one
Batches = Iterator[tuple[int, Sequence[Tensor]]]  # source images, and their two views (n, 3, S, S) where it makes any


def main(
    shards: Annotated[Path, typer.Argument(help="a data set of tools/make_shards.py")],
    images: Annotated[Path | None, typer.Option(help="the same images in class folders; none: no peers")] = None,
    size: Annotated[int, typer.Option(help="pixels of a view")] = 224,
    views: Annotated[str | None, typer.Option(help="preset; default cifar at 32 px, else imagenet")] = None,
    view: Annotated[list[str] | None, typer.Option(help="NAME=VALUE of a view option, for all loaders")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="source images; default 125, on CUDA 250; at 32 px 500")
    ] = None,
    threads: Annotated[list[int] | None, typer.Option(help="default 1, 2 and 4; on CUDA 4, 8 and 16")] = None,
    seconds: Annotated[float, typer.Option(help="per loader, over all rounds, warm-up excluded")] = 20.0,
    device: Literal["cpu", "cuda"] = "cpu",
    hw_decoder_load: Annotated[list[float] | None, typer.Option(help="CUDA only; default 0, 0.35, 0.65, 0.9")] = None,
    memory_steps: Annotated[int | None, typer.Option(help="watched for growth; default 2000 on CUDA")] = None,
    out: Annotated[Path, typer.Option(help="folder of loader.csv and the plot")] = RECORDS,
) -> None:
    cuda = device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA device here", param_hint="--device")
    batch_size = batch_size or (500 if size == 32 else 250 if cuda else 125)
    preset = views or ("cifar" if size == 32 else "imagenet")
    try:
        dataset, config = read_dataset(shards), make_views(preset, {"size": size, **parse_changes(view or ())})
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    check_input(dataset, images)
    counts = sorted(threads or ([4, 8, 16] if cuda else [1, 2, 4]))
    if not cuda and counts[-1] > len(os.sched_getaffinity(0)):
        raise typer.BadParameter(f"{counts[-1]} threads, but {len(os.sched_getaffinity(0))} cores to pin them to")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as train.py: waiting threads must not take the cores
    task = Task(shards=shards, images=images, views=config, batch_size=batch_size, threads=counts[-1], device=device)
    facts = {
        "data": f"{shards.name}, {dataset.samples} images",
        "views": " ".join([preset, *(view or ())]),
        "size": size,
        "batch_size": batch_size,
        "peers_files": ", ".join(sorted({path.suffix.lower() for path in images.glob("*/*")})) if images else "",
        **environment(device),  # taken before anything runs, so that `load` is that of others
    }
    rows: list[dict[str, Any]] = []

    def record(what: str, label: str, asked: Task, **found: object) -> None:
        row = {"what": what, "implementation": label, **dict.fromkeys(COLUMNS, ""), **found, **facts}
        rows.append(row | {"threads": asked.threads, "hw_decoder_load": asked.hw_decoder_load})
        append(out.resolve() / "loader.csv", rows[-1:])

    def measure(what: str, runs: dict[str, tuple[str, Task]]) -> None:
        for label, timings in interleaved(runs, seconds).items():
            name, asked = runs[label]
            record(what, label, asked, **numbers(*timings), version=version(name))
        print_table(rows[-len(runs) :])

    for count in counts:
        asked = replace(task, threads=count)
        measure("stage", {name: (name, asked) for name in stages(config, dataset)})
        if cuda:
            loads = hw_decoder_load or [0.0, 0.35, 0.65, 0.9]
            measure("decoder", {f"{OURS}, {load}": (OURS, replace(asked, hw_decoder_load=load)) for load in loads})
    if images:
        measure("loader", {name: (name, task) for name in peers()})
    if steps := 2000 * cuda if memory_steps is None else memory_steps:
        grown = f"{memory_growth(task, steps):.1f}"
        record(f"memory, {steps} steps", OURS, task, growth_mib=grown)
        print(f"\n{grown} MiB more in use after {steps} steps than after {max(1, steps // 10)}")
    plot(rows, out / f"loader-{device}-{size}.png")


def check_input(dataset: Dataset, images: Path | None) -> None:
    """Raises typer.BadParameter where a comparison would not be one."""
    found = sum(path.is_file() for path in images.glob("*/*")) if images else dataset.samples
    if found != dataset.samples:
        raise typer.BadParameter(
            f"{images} has {found} files in class folders, the shards have {dataset.samples} samples: "
            "the loaders would not read the same images"
        )


# ------------------------------------------------------------------------------------------------------------ stages


def ours(task: Task, **changes: Any) -> Batches:
    """The pipeline as train.py gets it, with some of its operators off."""
    options: dict[str, Any] = {} if task.hw_decoder_load is None else {"hw_decoder_load": task.hw_decoder_load}
    loader = Loader(
        read_dataset(task.shards),
        replace(task.views, **changes),
        task.batch_size,
        torch.device(task.device),
        num_threads=task.threads,
        **options,
    )
    for batch in loader:
        yield len(batch.views) // 2, batch.views.chunk(2)


def encoded(task: Task) -> Iterator[Encoded]:
    """The bytes of every batch, in the order of training."""
    dataset = read_dataset(task.shards)
    order = Order([shard.samples for shard in dataset.shards], task.batch_size, seed=0)
    reader = Reader(dataset)

    def batch(epoch: int, step: int) -> Encoded:
        positions = np.arange(task.batch_size) + step * task.batch_size
        return reader.read(order.samples_at(epoch, positions))

    batches = ((epoch, step) for epoch in itertools.count() for step in range(order.steps_per_epoch))
    return ahead((partial(batch, *at) for at in batches), 2)


def read(task: Task) -> Batches:
    """The pipeline's reader alone."""
    for batch in encoded(task):
        yield len(batch.samples), ()


def decode(task: Task) -> Batches:
    """The pipeline's reader and the decoder."""
    from nvidia.dali import fn, pipeline_def, types

    batches, device = encoded(task), "cpu" if task.device == "cpu" else "mixed"

    @pipeline_def(batch_size=task.batch_size, num_threads=task.threads, device_id=task.device_id)
    def build() -> Any:
        images = fn.external_source(lambda: next(batches).images, batch=True)
        return fn.decoders.image(images, device=device, output_type=types.RGB)

    pipe = build()
    while True:
        pipe.run()
        yield task.batch_size, ()


def hand_over(task: Task) -> Batches:
    """Only the end of the pipeline: bytes in memory are normalised and put into one tensor."""
    from nvidia.dali import fn, pipeline_def

    from pipeline import colour, graph, loader

    loader.keep_freed_memory()  # as where it is a part of the pipeline
    n, size, gpu = task.batch_size, task.views.size, task.device == "cuda"
    pixels = np.random.default_rng(0).integers(0, 256, (n, size, size, 3), np.uint8)
    levels, same, none = torch.from_numpy(pixels), torch.eye(3).expand(2 * n, 3, 3), torch.zeros(2 * n, 3, 3)

    @pipeline_def(batch_size=n, num_threads=task.threads, device_id=task.device_id)
    def build() -> Any:
        images = fn.external_source(lambda: (pixels, pixels), num_outputs=2, batch=True, no_copy=True)
        return tuple(graph.normalise(image.gpu() if gpu else image, task.views, False) for image in images)

    pipe = build() if gpu or not task.views.ends_in_colour else None
    while True:
        if pipe:
            images = pipe.run(torch.cuda.current_stream() if gpu else None)
            views = torch.cat([torch.from_dlpack(image.as_tensor()) for image in images])
        else:
            views = colour.finish(torch.cat([levels, levels]), same, none, task.views)
        yield n, views.movedim(-1, 1).chunk(2)


STAGES: dict[str, Callable[[Task], Batches]] = {
    "read": read,
    "decode": decode,
    "crop": partial(ours, jitter_p=0.0, grayscale_p=0.0, blur_p=0.0),
    "colour": partial(ours, blur_p=0.0),
    "blur": ours,
    HAND_OVER: hand_over,
}


def stages(config: ViewConfig, dataset: Dataset) -> list[str]:
    """Each with all before it, except the last: that is alone, and what "crop" and the following have at their end."""
    idle = {"blur"} if not config.blur_p else set()
    if dataset.raw:  # bare pixels are not decoded
        idle.add("decode")
    return [name for name in STAGES if name not in idle]


# ------------------------------------------------------------------------------------------------------------- peers


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
    OURS: ours,
    f"{OURS}, reference": partial(ours, profile="reference"),
    "torchvision, PIL": torchvision_pil,
    "torchvision v2, tensors": torchvision_v2,
    "webdataset + torchvision": webdataset,
    "lightly": lightly_simclr,
    "DALI, conditionals": usual_dali,
    "DALI, masks": partial(usual_dali, masks=True),
}


def peers() -> list[str]:
    """Ours and those that are installed."""
    if find_spec("lightly"):
        return list(PEERS)
    print("lightly is not installed and left out")
    return [name for name in PEERS if name != "lightly"]


def version(name: str) -> str:
    """Of the library that a loader shows, where it is not ours."""
    package = name.replace(",", " ").split()[0]
    return metadata.version(package) if package in ("torchvision", "webdataset", "lightly") else ""


# ------------------------------------------------------------------------------------------------------------- turns


@dataclass(frozen=True)
class Turn:
    """Source images delivered in one turn, on the clock and in processor time of all threads and workers."""

    images: int
    wall_s: float
    cpu_s: float
    peak_host_mib: float


def take_turn(batches: Batches, seconds: float, multiple: int) -> Turn:
    """Batches for so many seconds, then up to a multiple: workers tend to finish theirs together."""
    images, start, cpu = 0, time.perf_counter(), cpu_seconds()
    for count in itertools.count():
        if time.perf_counter() - start >= seconds and count and count % multiple == 0:
            break
        images += next(batches)[0]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Turn(images, time.perf_counter() - start, cpu_seconds() - cpu, peak_host_mib())


def interleaved(runs: dict[str, tuple[str, Task]], seconds: float) -> dict[str, tuple[Timing, Timing]]:
    """Milliseconds per source image, (on the clock, of processor time), of loaders in STAGES or PEERS, by label."""
    with contextlib.ExitStack() as stack:
        turns = [stack.enter_context(standing_still(*run)) for run in runs.values()]
        rounds = [[turn(seconds / ROUNDS) for turn in turns] for _ in range(ROUNDS + 1)][1:]
    return {
        label: (
            timing([1e3 * turn.wall_s / turn.images for turn in mine]),
            timing([1e3 * turn.cpu_s / turn.images for turn in mine]),
        )
        for label, mine in zip(runs, zip(*rounds, strict=True), strict=True)
    }


@contextlib.contextmanager
def standing_still(name: str, task: Task) -> Iterator[Callable[[float], Turn]]:
    """A loader in a process of its own that moves only while the function given is called; raises RuntimeError.

    It is the one of STAGES or PEERS of that name. A turn ends with a multiple of as many batches as it has workers;
    without a GPU it keeps to so many cores.

    In between, its process group is stopped: no queue is filled in another's turn, and none starts a turn full.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=((STAGES | PEERS)[name], task, there))
    process.start()
    there.close()
    group = process.pid or 0

    def turn(seconds: float) -> Turn:
        with contextlib.suppress(ProcessLookupError):  # before its first turn it may have no group yet
            os.killpg(group, signal.SIGCONT)
        here.send(seconds)
        try:
            said = here.recv()
        except EOFError:
            process.join()
            raise RuntimeError(f"{name} died with exit code {process.exitcode}") from None
        if isinstance(said, str):
            raise RuntimeError(f"{name}: {said}")
        os.killpg(group, signal.SIGSTOP)
        taken: Turn = said
        return taken

    try:
        yield turn
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        process.kill()
        process.join()


def _serve(make: Callable[[Task], Batches], task: Task, link: Connection) -> None:
    die_with_parent()
    os.setpgid(0, 0)
    if task.device == "cpu":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: task.threads])
    torch.set_num_threads(task.threads)
    try:
        batches = make(task)
        while True:
            link.send(take_turn(batches, link.recv(), task.threads))
    except (EOFError, BrokenPipeError):  # the benchmark has ended
        return
    except Exception as error:
        link.send(f"{type(error).__name__}: {error}")


def memory_growth(task: Task, steps: int) -> float:
    """MiB in use after `steps` batches of ours, above what a tenth of them left."""
    batches, early = ours(task), max(1, steps // 10)
    held = []
    for step in range(1, steps + 1):
        next(batches)
        if step in (early, steps):
            held.append(held_mib(task.device))
    return held[-1] - held[0]


# ------------------------------------------------------------------------------------------------------------ report

COLUMNS = (
    *("images_per_s", "p20_images_per_s", "p80_images_per_s", "cpu_ms", "p20_cpu_ms", "p80_cpu_ms", "runs"),
    *("growth_mib", "version", "hw_decoder_load"),
)


def numbers(wall: Timing, cpu: Timing) -> dict[str, object]:
    """Source images per second, and CPU ms per source image."""
    return {
        "images_per_s": f"{1e3 / wall.median:.4g}",
        "p20_images_per_s": f"{1e3 / wall.p80:.4g}",
        "p80_images_per_s": f"{1e3 / wall.p20:.4g}",
        "cpu_ms": f"{cpu.median:.4g}",
        "p20_cpu_ms": f"{cpu.p20:.4g}",
        "p80_cpu_ms": f"{cpu.p80:.4g}",
        "runs": wall.runs,
    }


def shares(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """CPU ms per source image that each stage adds; all together are those of the whole pipeline."""
    cpu = {row["implementation"]: float(row["cpu_ms"]) for row in rows}
    alone = cpu.pop(HAND_OVER)
    added = {name: ms - before for (name, ms), before in zip(cpu.items(), [0.0, *cpu.values()], strict=False)}
    added["crop"] -= alone  # which is at the end of "crop" and of all that follow
    return added | {HAND_OVER: alone}


def print_table(rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    added = shares(rows) if first["what"] == "stage" else {}
    title = f"{first['what']}, {first['size']} px, {first['threads']} thread(s)"
    print(f"\n{title:34} {'images/s':>9} {'CPU ms':>8} {'adds' if added else 'of ours':>9}")
    base = next((float(row["cpu_ms"]) for row in rows if row["implementation"] == OURS), 0.0)
    for row in rows:
        name, cpu = row["implementation"], float(row["cpu_ms"])
        last = f"{added[name]:.3f}" if added else f"{cpu / base:.2f} x" if base else ""
        print(f"{name:34} {row['images_per_s']:>9} {row['cpu_ms']:>8} {last:>9}")


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """CPU ms per source image: of the stages for each number of threads, and of ours beside its peers."""
    from matplotlib.figure import Figure

    counts = sorted({row["threads"] for row in rows if row["what"] == "stage"})
    loaders = [row for row in rows if row["what"] in ("loader", "decoder") and row["threads"] == counts[-1]]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    bottom = np.zeros(len(counts))
    by_count = [shares([row for row in rows if row["what"] == "stage" and row["threads"] == n]) for n in counts]
    for name in by_count[0]:
        heights = np.array([max(added[name], 0.0) for added in by_count])
        left.bar([str(count) for count in counts], heights, 0.6, bottom, label=name)
        bottom += heights
    left.set(xlabel="threads", ylabel="CPU ms per source image", title="stages of the pipeline")
    handles, labels = left.get_legend_handles_labels()
    left.legend(handles[::-1], labels[::-1], fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    loaders.sort(key=lambda row: -float(row["cpu_ms"]))
    bars = right.barh(
        [row["implementation"] for row in loaders],
        [float(row["cpu_ms"]) for row in loaders],
        color=["C3" if row["implementation"].startswith(OURS) else "0.7" for row in loaders],
    )
    right.bar_label(bars, [f" {row['cpu_ms']} ms, {row['images_per_s']} images/s" for row in loaders], fontsize=8)
    right.margins(x=0.5)
    right.set(xlabel="CPU ms per source image", title=f"two views of the same images, {counts[-1]} threads or workers")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    first = rows[0]
    figure.suptitle(
        f"{first['data']}, {first['size']} px, views {first['views']}: {first['device']}, load {first['load']} before, "
        f"DALI {first['dali']}, torch {first['torch']}, {first['commit']}, {first['date']}",
        fontsize=8,
    )
    save_plot(figure, path, 120)
    print(f"\nplot: {path}")


if __name__ == "__main__":
    typer.run(main)
