"""Turn images into shards: tar files with DALI indexes and a manifest, ready for training.

    python tools/make_shards.py folder IMAGES OUT              a folder of images, or of class folders
    python tools/make_shards.py list FILE OUT                  the files that a text file names, with or without labels
    python tools/make_shards.py imagenet-train ARCHIVE OUT     ILSVRC2012_img_train.tar, not unpacked
    python tools/make_shards.py imagenet-val ARCHIVE TRUTH OUT ILSVRC2012_img_val.tar and its devkit or a list of labels
    python tools/make_shards.py cifar10 ROOT OUT               or cifar100, stl10: the original archive in ROOT
    python tools/make_shards.py webdataset TARS OUT            WebDataset shards, shuffled, checked and indexed anew
    python tools/make_shards.py index TARS... OUT              WebDataset shards indexed where they lie, not copied
    python tools/make_shards.py demo OUT                       the built-in demo data, OUT/train and OUT/test
    python tools/make_shards.py verify DIR                     shards read from end to end, every fault named; DIR may
                                                               be s3://BUCKET/PREFIX or gs://BUCKET/PREFIX
    python tools/make_shards.py quarantine DIR KEY...          leave samples out without rewriting a tar

Every image is decoded, by Pillow and by DALI. 8-bit RGB or gray JPEG, PNG and WebP keep their bytes; other kinds
(CMYK, 16-bit, alpha, palette, GIF, BMP, TIFF, AVIF and what else Pillow decodes) are converted, and so is what DALI,
the decoder of training, refuses though Pillow takes it; what does not decode is left out; --on-bad decides otherwise.
Every entry of the source is counted at the end as kept, converted, left out or passed over, with the reasons, and
OUT/actions.jsonl has their names. Names follow the same rules everywhere: case does not matter, what starts with a
dot is hidden and passed over, an image is known by its suffix, but what a list names is always tried. OUT appears
when it is complete, and is never overwritten; where a run was interrupted, the same command goes on. Exit code 2: the
input cannot be used; 1: failed, or faults were found.
50,000 CIFAR-10 JPEGs take 13 to 22 s, 1,000 of ImageNet 7 s, 4 of it start-up (4 busy cores, Pillow 13),
before DALI was asked: that takes 1.1 s more to start, 0.1 ms of a core for an image of 32 px and 1 ms for one of 30 KB.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository instead of tools/, as with python -m

from tools.options import parameters, with_parameters

if TYPE_CHECKING:
    from pipeline.shards import Dataset
    from pipeline.sources import Source

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)

Out = Annotated[Path, typer.Argument(help="New folder for the shards.")]
ShardSize = Annotated[
    int | None, typer.Option(min=1, help="Most samples per shard. (default: 1000, fewer for small sets)")
]
Seed = Annotated[int, typer.Option(help="Seed of the shuffle.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes. (default: one per core)")]
Verify = Annotated[bool, typer.Option(help="Decode every image, by Pillow and DALI; without, only headers are read.")]
OnBad = Annotated[
    Literal["fail", "skip", "reencode"],
    typer.Option(help="Images not stored as they are: end, leave them out, or convert those that decode."),
]
Store = Annotated[
    Literal["original", "ppm"],
    typer.Option(help="ppm: bare RGB pixels, which need no decoder; for small images, best of one size."),
]
Resize = Annotated[
    int | None, typer.Option(min=1, help="Shrink images to this shorter side, as JPEG. (default: keep their size)")
]
Quality = Annotated[int, typer.Option(min=1, max=100, help="Of the JPEGs that shrinking or converting writes.")]
Name = Annotated[str | None, typer.Option(help="First part of the shards' names. (default: that of the source)")]
Root = Annotated[Path, typer.Argument(help="Folder of the original archive.")]
Split = Annotated[Literal["train", "test"], typer.Option(help="50,000 or 10,000 images.")]
Download = Annotated[bool, typer.Option("--download", help="Get the archive into ROOT if it is not there.")]
ClassList = Annotated[
    Path | None, typer.Option(help="Text file of class names, one a line, label 0 first. (default: found in SOURCE)")
]
ImageMember = Annotated[
    str | None,
    typer.Option(metavar="EXT", help="The image is KEY.EXT. (default: the only one; k.jpg before k.seg.png)"),
]


def makes_shards(find: "Callable[..., Source]") -> Callable[..., None]:
    """Make a command of a function that finds a source: its parameters, then those of `write`; its docstring."""
    own, shared = parameters(find), parameters(write)[1:]

    def command(**options: Any) -> None:
        from tools.errors import one_message

        with one_message("make_shards"):
            try:
                source = find(**{parameter.name: options.pop(parameter.name) for parameter in own})
            except OSError as error:
                from pipeline.shards import DatasetError

                raise DatasetError(f"cannot read the source: {error}") from error
            write(source, **options)

    return with_parameters(command, [*own, *shared], like=find)


def write(
    source: "Source",
    out: Out,
    shard_size: ShardSize = None,
    seed: Seed = 0,
    workers: Workers = None,
    verify: Verify = True,
    on_bad: OnBad = "reencode",
    resize: Resize = None,
    quality: Quality = 90,
    store: Store = "original",
    name: Name = None,
) -> None:
    """Write the shards of a source. Every command that finds a source has the options of this function."""
    from pipeline.write import write_shards

    labels = f"{len(source.classes)} classes" if source.classes is not None else "no labels"
    typer.echo(f"{source.name}: {len(source.samples)} images, {labels}")
    if source.warning:
        typer.echo(f"warning: {source.warning}", err=True)
    with _progress(source.name) as progress:
        dataset = write_shards(
            source.samples,
            out,
            classes=source.classes,
            root=source.root,
            convert=source.convert,
            tally=source.tally,
            name=name or source.name,
            shard_size=shard_size,
            seed=seed,
            workers=workers or _cores(),
            verify=verify,
            on_bad=on_bad,
            resize=resize,
            quality=quality,
            store=store,
            progress=progress,
        )
    _report(dataset)


@app.command()
@makes_shards
def folder(
    source: Annotated[Path, typer.Argument(help="Folder of images (no labels), or of one folder per class.")],
) -> "Source":
    """Shards from a folder: labels from class folders, sorted as torchvision's ImageFolder does, or no labels."""
    from pipeline import sources

    return sources.folder(source)


@app.command("list")
@makes_shards
def file_list(
    file: Annotated[Path, typer.Argument(help="Text file: PATH, or PATH and LABEL, a line.")],
    root: Annotated[Path | None, typer.Option(help="Folder that paths start from. (default: that of FILE)")] = None,
    classes: ClassList = None,
) -> "Source":
    """Shards of the files that a list names, one a line, with or without labels.

    A tab parts PATH and LABEL in the whole file if it has any; else a comma (CSV), the last blank, the first blank or
    nothing, whichever makes existing files of most of the first 100 paths. A header is passed over, and so is a file
    that is named again. Labels are whole numbers from 0, or names, which become the classes in their order; give
    --classes where two lists, say of training and test images, must have equal classes.
    """
    from pipeline import sources_list

    return sources_list.file_list(file, root, classes)


@app.command()
@makes_shards
def imagenet_train(
    archive: Annotated[Path, typer.Argument(help="ILSVRC2012_img_train.tar.")],
) -> "Source":
    """Shards of ImageNet's training images, straight from the tar of 1000 tars; nothing is unpacked.

    The headers of 1,281,167 images are read first, which takes about a minute. Labels are those of the unpacked folder.
    """
    from pipeline import sources_originals

    return sources_originals.imagenet_train(archive)


@app.command()
@makes_shards
def imagenet_val(
    archive: Annotated[Path, typer.Argument(help="ILSVRC2012_img_val.tar.")],
    truth: Annotated[
        Path,
        typer.Argument(
            help="ILSVRC2012_devkit_t12.tar.gz (needs scipy), or a text file: FILENAME WNID a line, or WNID a line in "
            "the order of the file names."
        ),
    ],
) -> "Source":
    """Shards of ImageNet's validation images, straight from the tar; labels agree with those of imagenet-train."""
    from pipeline import sources_originals

    return sources_originals.imagenet_val(archive, truth)


@app.command()
@makes_shards
def cifar10(root: Root, split: Split = "train", download: Download = False) -> "Source":
    """Shards of CIFAR-10 from cifar-10-python.tar.gz in ROOT, which is unpacked there; pixels are kept as they are."""
    from pipeline import sources_originals

    return sources_originals.cifar(10, root, split, download)


@app.command()
@makes_shards
def cifar100(root: Root, split: Split = "train", download: Download = False) -> "Source":
    """Shards of CIFAR-100 from cifar-100-python.tar.gz in ROOT, which is unpacked there; the labels are the fine ones.

    Pixels are kept as they are.
    """
    from pipeline import sources_originals

    return sources_originals.cifar(100, root, split, download)


@app.command()
@makes_shards
def stl10(
    root: Root,
    split: Annotated[
        Literal["train", "test", "unlabeled", "train+unlabeled"],
        typer.Option(help="5,000, 8,000, 100,000 or 105,000 images; the last two without labels."),
    ] = "unlabeled",
    download: Download = False,
) -> "Source":
    """Shards of STL-10 from stl10_binary.tar.gz in ROOT, which is unpacked there; pixels are kept as they are."""
    from pipeline import sources_originals

    return sources_originals.stl10(root, split, download)


@app.command()
@makes_shards
def webdataset(
    source: Annotated[Path, typer.Argument(help="Folder of tars, or one tar.")],
    pattern: Annotated[
        str | None, typer.Option(help="Which tars of the folder. (default: *.tar in upper or lower case)")
    ] = None,
    classes: ClassList = None,
    labels: Annotated[bool, typer.Option(help="Labels are in KEY.cls; without, they are ignored.")] = True,
    label_field: Annotated[
        str | None, typer.Option(metavar="NAME", help="Labels are this field of KEY.json, such as label or meta.class.")
    ] = None,
    image_member: ImageMember = None,
) -> "Source":
    """Shards of WebDataset shards: shuffled anew, checked and indexed; nothing is unpacked.

    Samples are those of the webdataset library: members that follow each other and have one KEY, which ends at the
    first dot of the file name; extensions are taken in lower case. Labels are whole numbers from 0, or names, which
    become the classes in their order. Links, devices, images without a label among labelled ones and members that a
    sample has twice are left out by name; what a damaged tar has lost is announced.
    """
    from pipeline import sources_tars

    return sources_tars.webdataset(
        source,
        pattern,
        classes,
        labels=labels,
        label_field=label_field,
        image_member=image_member,
    )


@app.command()
def index(
    tars: Annotated[list[Path], typer.Argument(metavar="TARS...", help="Tars, folders of tars, patterns in quotes.")],
    out: Annotated[Path, typer.Argument(help="New folder for the manifest and the indexes.")],
    labels: Annotated[
        bool, typer.Option(help="Labels are the whole numbers in KEY.cls; without, they are ignored.")
    ] = True,
    classes: ClassList = None,
    image_member: ImageMember = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Read everything: hash each tar, leave out what does not decode."),
    ] = False,
    workers: Workers = None,
) -> None:
    """Make a data set of WebDataset shards where they lie: only a manifest and indexes are written, into OUT.

    Samples are those of the webdataset library: members that follow each other and have one KEY, which ends at the
    first dot of the file name. Training reads images and labels in the tars, so images that DALI does not decode are
    left out, and labels that are names are refused; the command webdataset takes both. The tars must stay where they
    are, or move together with OUT where both lie in one folder; a tar of another size is refused.
    """
    from tools.errors import one_message

    with one_message("make_shards"):
        from pipeline.index import index_tars

        with _progress("index", "tars") as progress:
            dataset = index_tars(
                tars,
                out,
                labels=labels,
                class_list=classes,
                image_member=image_member,
                verify=verify,
                workers=workers or _cores(),
                progress=progress,
            )
        _report(dataset)
        typer.echo(f"labels: {'none' if dataset.classes is None else f'of {len(dataset.classes)} classes'}")


@app.command()
def demo(
    out: Out, shard_size: ShardSize = None, seed: Seed = 0, workers: Workers = None, verify: Verify = True
) -> None:
    """Shards of the built-in demo data, in OUT/train and OUT/test; needs no download."""
    from tools.errors import one_message

    with one_message("make_shards"):
        from pipeline.demo import write_demo
        from pipeline.shards import read_dataset

        with _progress("demo") as progress:
            write_demo(
                out, shard_size=shard_size, seed=seed, workers=workers or _cores(), verify=verify, progress=progress
            )
        for name in ("train", "test"):
            _report(read_dataset(out / name))


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of shards, or its s3:// or gs:// address.")],
    images: Annotated[bool, typer.Option("--images", help="Decode every image too, by Pillow and by DALI.")] = False,
    workers: Workers = None,
    report: Annotated[Path | None, typer.Option(help="New file for the faults, JSON lines; for quarantine.")] = None,
) -> None:
    """Read shards from end to end: sizes, hashes, indexes against tars, labels, and images on request.

    Every fault is printed with its shard and key. Exit code 0: none; 1: some; 2: there is no manifest to go by.
    """
    from tools.errors import one_message
    from tools.files import write_new

    with one_message("make_shards"):
        from dataclasses import asdict

        from pipeline.audit import verify
        from pipeline.shards import DatasetError, read_dataset

        if report and os.path.lexists(report):
            raise DatasetError(f"{report} exists, and nothing is ever overwritten: give a new file")
        dataset = read_dataset(folder, check=False)
        start = time.monotonic()
        with _progress(dataset.name) as progress:
            faults = verify(folder, images=images, workers=workers or _cores(), progress=progress)
        seconds = time.monotonic() - start
        for fault in faults:
            typer.echo(f"{fault.shard}{f' {fault.key}' if fault.key else ''}: {fault.problem}")
        if report:
            write_new(report, "".join(f"{json.dumps(asdict(fault))}\n" for fault in faults))
        mib = sum(shard.bytes for shard in dataset.shards) / 2**20
        rate = f"{dataset.samples / seconds:.0f} samples/s, {mib / seconds:.0f} MiB/s"
        count = f"{len(faults) or 'no'} fault{'s' * (len(faults) > 1)}"
        typer.echo(f"{dataset.address}: {count} in {dataset.samples} samples in {len(dataset.shards)} shards ({rate})")
        if faults:
            raise typer.Exit(1)


@app.command()
def quarantine(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of shards.")],
    keys: Annotated[
        list[str] | None, typer.Argument(metavar="KEY...", help="As verify prints them; or SHARD/KEY.")
    ] = None,
    report: Annotated[Path | None, typer.Option("--from", help="A report of verify: all its keys.")] = None,
) -> None:
    """Leave samples out of shards from now on, without rewriting a tar.

    New indexes are written beside the old ones and dataset.json is replaced. To undo every quarantine, put
    dataset.json.original back in its place. A run that has begun does not resume on the changed data set.
    """
    from tools.errors import one_message
    from tools.files import read_text

    with one_message("make_shards"):
        from pipeline.audit import quarantine
        from pipeline.shards import DatasetError

        chosen = list(keys or ())
        if report:
            try:
                faults = [json.loads(line) for line in read_text(report, "ascii").splitlines()]
                chosen += [f"{fault['shard']}/{fault['key']}" for fault in faults if fault["key"]]
            except (ValueError, KeyError, TypeError) as error:
                raise DatasetError(f"{report} is not a report of verify: {type(error).__name__}: {error}") from error
        if not chosen:
            raise DatasetError(
                f"{report or 'the command'} names no key to leave out: name keys, or a report that does with --from"
            )
        dataset = quarantine(folder, chosen)
        out = len(dataset.counts["quarantined"])
        typer.echo(f"{folder}: {dataset.samples} samples in {len(dataset.shards)} shards, {out} in quarantine")


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _report(dataset: "Dataset") -> None:
    from pipeline.entries import reasons

    mib = sum(shard.bytes for shard in dataset.shards) / 2**20
    typer.echo(f"{dataset.root}: {dataset.samples} samples in {len(dataset.shards)} shards, {mib:.1f} MiB")
    names = {"kept": "kept", "reencoded": "converted", "left_out": "left out", "passed_over": "passed over"}
    counts = {name: dataset.counts[count] for count, name in names.items()}
    parts = [f"{sum(by.values())} {name}{f' ({reasons(by)})' if by else ''}" for name, by in counts.items()]
    typer.echo(f"{sum(sum(by.values()) for by in counts.values())} entries: {', '.join(parts)}")
    typer.echo(f"their names: {dataset.root / 'actions.jsonl'}")
    if damaged := dataset.counts["damaged_tars"]:
        typer.echo(f"warning: {damaged} damaged tars have lost what follows the damage, see actions.jsonl", err=True)
    if empty := [
        name for name, n in zip(dataset.classes or (), dataset.counts["per_class"] or (), strict=True) if not n
    ]:
        typer.echo(f"warning: no image of {len(empty)} classes: {', '.join(map(repr, empty[:5]))}", err=True)


@contextlib.contextmanager
def _progress(title: str, unit: str = "images") -> Iterator[Callable[[int, int], None]]:
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
                typer.echo(
                    f"{title}: {done}/{total} {unit}, {done / (now - start):.{0 if unit == 'images' else 1}f} {unit}/s",
                    err=True,
                )

        yield line


if __name__ == "__main__":
    app()
