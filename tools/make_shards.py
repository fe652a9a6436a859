"""Turn images into shards: tar files with DALI indexes and a manifest, ready for training.

    python tools/make_shards.py folder IMAGES OUT     a folder of images, or of class folders
    python tools/make_shards.py demo OUT              the built-in demo data, OUT/train and OUT/test

Every image is decoded once; what does not decode is left out and listed in OUT/skipped.jsonl. The bytes of the images
are kept. OUT appears when it is complete, and is never overwritten. Exit code 2: the input cannot be used; 1: failed.
50,000 CIFAR-10 JPEGs take 13 to 22 s, 1,000 of ImageNet 7 s, 4 of it start-up (4 busy cores, Pillow 13).
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipeline.shards import Dataset, Sample

# torchvision's list and .gif, so that a GIF is reported as left out instead of being overlooked.
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif"}

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)

Out = Annotated[Path, typer.Argument(help="New folder for the shards.")]
ShardSize = Annotated[
    int | None, typer.Option(min=1, help="Most samples per shard. [default: 1000, fewer for small sets]")
]
Seed = Annotated[int, typer.Option(help="Seed of the shuffle.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes. [default: one per core]")]
Verify = Annotated[bool, typer.Option(help="Decode every image once.")]


@app.command()
def folder(
    source: Annotated[Path, typer.Argument(help="Folder of images (no labels), or of one folder per class.")],
    out: Out,
    shard_size: ShardSize = None,
    seed: Seed = 0,
    workers: Workers = None,
    verify: Verify = True,
    name: Annotated[str | None, typer.Option(help="First part of the shards' names. [default: that of SOURCE]")] = None,
) -> None:
    """Shards from a folder: labels from class folders, sorted as torchvision's ImageFolder does, or no labels."""
    from tools import one_message

    with one_message("make_shards"):
        from pipeline.shards import DatasetError, write_shards

        try:
            samples, classes = scan(source)
        except OSError as error:
            raise DatasetError(f"cannot read {source}: {error}") from error
        typer.echo(f"{source}: {len(samples)} images, " + (f"{len(classes)} classes" if classes else "no labels"))
        name = name or "".join(c if c.isascii() and c.isalnum() else "-" for c in source.resolve().name) or "shards"
        with _progress(name) as progress:
            dataset = write_shards(
                samples,
                out,
                classes=classes,
                root=source,
                name=name,
                shard_size=shard_size,
                seed=seed,
                workers=workers or _cores(),
                verify=verify,
                progress=progress,
            )
        _report(dataset)


@app.command()
def demo(
    out: Out, shard_size: ShardSize = None, seed: Seed = 0, workers: Workers = None, verify: Verify = True
) -> None:
    """Shards of the built-in demo data, in OUT/train and OUT/test; needs no download."""
    from tools import one_message

    with one_message("make_shards"):
        from pipeline.demo import write_demo
        from pipeline.shards import read_dataset

        with _progress("demo") as progress:
            write_demo(
                out, shard_size=shard_size, seed=seed, workers=workers or _cores(), verify=verify, progress=progress
            )
        for name in ("train", "test"):
            _report(read_dataset(out / name))


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def scan(source: Path) -> "tuple[list[Sample], list[str] | None]":
    """Find the images of a class folder (labels, class names) or of a flat folder (None as class names).

    Images are found by suffix, in class folders at any depth; hidden files and folders are passed over.
    Raises DatasetError if there are none, if a class has none, or if images lie beside class folders.
    """
    from pipeline.shards import DatasetError, Sample

    if not source.is_dir():
        raise DatasetError(f"{source} is {'a file' if source.exists() else 'missing'}, expected a folder of images")
    flat, others, classes, images = [], 0, [], []
    for entry in sorted(_entries(source), key=lambda entry: entry.name):
        if entry.is_dir():
            classes.append(entry.name)
            images.append(sorted(_images(source, entry.name)))
        elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
            flat.append(entry.name)
        else:
            others += 1
    if flat and any(images):
        example = next(found[0] for found in images if found)
        raise DatasetError(
            f"{source} mixes images ({flat[0]!r}) with class folders of images ({example!r}): "
            "put every image into a class folder, or all of them into one folder without labels"
        )
    if flat:
        return [Sample(path) for path in flat], None
    if not any(images):
        found = f"{len(classes)} folders without images and {others} other files" if classes or others else "nothing"
        raise DatasetError(f"{source} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}); found {found}")
    if empty := [name for name, found in zip(classes, images, strict=True) if not found]:
        raise DatasetError(
            f"{source} has class folders without an image: {', '.join(map(repr, empty[:5]))}"
            f"{f' and {len(empty) - 5} more' if len(empty) > 5 else ''}. "
            "Each folder is a class and takes a label: fill or remove them"
        )
    return [Sample(path, label) for label, found in enumerate(images) for path in found], classes


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return [e for e in entries if not e.name.startswith(".") and (e.is_dir() or e.is_file())]


def _images(source: Path, folder: str) -> Iterator[str]:
    """Paths, from `source`, of the images at any depth below `folder`; no folder is entered twice through links."""
    seen: set[tuple[int, int]] = set()
    pending = [folder]
    while pending:
        at = pending.pop()
        status = os.stat(source / at)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in _entries(source / at):
            if entry.is_dir():
                pending.append(f"{at}/{entry.name}")
            elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
                yield f"{at}/{entry.name}"


def _report(dataset: "Dataset") -> None:
    mib = sum(shard.bytes for shard in dataset.shards) / 2**20
    typer.echo(f"{dataset.root}: {dataset.samples} samples in {len(dataset.shards)} shards, {mib:.1f} MiB")
    if left_out := dataset.counts["left_out"]:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in left_out.items())
        typer.echo(f"left out {sum(left_out.values())} images ({reasons}), see {dataset.root / 'skipped.jsonl'}")
    if empty := [
        name for name, n in zip(dataset.classes or (), dataset.counts["per_class"] or (), strict=True) if not n
    ]:
        typer.echo(f"warning: no image is left of {len(empty)} classes: {', '.join(map(repr, empty[:5]))}", err=True)


@contextlib.contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal; elsewhere a plain line every ten seconds. Both on stderr."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

        columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        start = last = time.monotonic()

        def line(done: int, total: int) -> None:
            nonlocal last
            if (now := time.monotonic()) - last >= 10:
                last = now
                typer.echo(f"{title}: {done}/{total} images, {done / (now - start):.0f} images/s", err=True)

        yield line


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository instead of tools/, as with python -m
    app()
