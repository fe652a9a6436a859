"""Two views of each image from JPEGs: what every stage of the pipeline costs, and what its peers take for the same.

    python -m benchmarks.loader SHARDS --images FOLDER                  224 px, stages on 1, 2 and 4 CPU cores
    python -m benchmarks.loader SHARDS --images FOLDER --size 32        CIFAR's views
    python -m benchmarks.loader SHARDS --device cuda                    also hw_decoder_load, and memory over 2000 steps

Stages are the pipeline itself with what follows them left out, so a stage costs the difference to the one before. On a
CPU the matrix that normalises a fast view is the one that recolours it, so there colour adds next to nothing. Peers are
in benchmarks/peers.py. Beside them stands what the calling thread spends in the loader for a batch that is ready.

Every loader is a program of its own, see benchmarks/programs.py, and all are pinned to the same cores. Rows go to
records/loader.csv, the plot to records/loader-DEVICE-SIZE.png. CPU ms per source image depend on what else the machine
does far less than images/s do, but still by a third: look at the record's `load`, and compare within one run only.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer

from benchmarks import peers
from benchmarks.measure import Timing, held_mib, timing
from benchmarks.peers import Batches, Task
from benchmarks.programs import SLICE_S, Failure, Progress, Timeline, in_slices, round_edges
from benchmarks.tables import Row, by_number, conditions, grouped, newest, number, of_one_commit, table, times
from pipeline.loader import Loader
from pipeline.order import Order
from pipeline.reader import Encoded, Reader, ahead
from pipeline.shards import Dataset, read_dataset
from pipeline.views import ViewConfig, make_views, parse_changes
from tools.records import RECORDS, append, can_plot, environment, save_plot

ROUNDS = 5
OURS = "SwiftCLR"
HAND_OVER = "normalise, hand over"


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
    call_steps: Annotated[int, typer.Option(help="batches fetched when they are ready, to time the call")] = 20,
    out: Annotated[Path, typer.Option(help="folder of loader.csv and the plot")] = RECORDS,
) -> None:
    """Measure every stage and, with --images, every peer."""
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

    def record(what: str, label: str, run: Task, **measured: object) -> None:
        row = {"what": what, "implementation": label, **dict.fromkeys(COLUMNS, ""), **measured, **facts}
        rows.append(row | {"threads": run.threads, "hw_decoder_load": run.hw_decoder_load})
        append(out.resolve() / "loader.csv", rows[-1:])

    def measure(what: str, runs: dict[str, tuple[str, Task]]) -> None:
        for label, timings in interleaved(runs, seconds).items():
            name, run = runs[label]
            record(what, label, run, **numbers(*timings), version=peers.version(name))
        print_table(rows[-len(runs) :])

    for count in counts:
        on_count = replace(task, threads=count)
        measure("stage", {name: (name, on_count) for name in stages(config, dataset)})
        if cuda:
            loads = hw_decoder_load or [0.0, 0.35, 0.65, 0.9]
            measure("decoder", {f"{OURS}, {load}": (OURS, replace(on_count, hw_decoder_load=load)) for load in loads})
    if images:
        measure("loader", {name: (name, task) for name in (*LOADERS, *peers.installed())})
    if steps := 2000 * cuda if memory_steps is None else memory_steps:
        grown = f"{memory_growth(task, steps):.1f}"
        record(f"memory, {steps} steps", OURS, task, growth_mib=grown)
        print(f"\n{grown} MiB more in use after {steps} steps than after {max(1, steps // 10)}")
    if call_steps:
        call = call_ms(task, call_steps)
        record(f"call, {call_steps} batches", OURS, task, call_ms=f"{call.median:.3g}", p80_call_ms=f"{call.p80:.3g}")
        print(f"\n{call.median:.3g} ms of the calling thread for a batch of {batch_size} that is ready")
    if can_plot():
        draw(rows, out / f"loader-{device}-{size}.png")


def check_input(dataset: Dataset, images: Path | None) -> None:
    """Raises typer.BadParameter where a comparison would not be one."""
    files = sum(path.is_file() for path in images.glob("*/*")) if images else dataset.samples
    if files != dataset.samples:
        raise typer.BadParameter(
            f"{images} has {files} files in class folders, the shards have {dataset.samples} samples: "
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

    loader.keep_freed_memory()  # as the pipeline does
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
            stream = torch.cuda.current_stream() if gpu else None
            views = torch.empty(2 * n, size, size, 3, device=task.device)
            for image, out in zip(pipe.run(stream), views.chunk(2), strict=True):
                loader.copy_out(image, out, stream)
        else:
            views = colour.finish(torch.cat([levels, levels]), same, none, task.views)
        yield n, views.movedim(-1, 1).chunk(2)


LOADERS: dict[str, Callable[[Task], Batches]] = {OURS: ours, f"{OURS}, reference": partial(ours, profile="reference")}
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


# ---------------------------------------------------------------------------------------------------------- measuring


def load(name: str, task: Task) -> Iterator[Progress]:
    """A stage, ours or a peer as a measured program; without a GPU it keeps to as many cores as it has threads.

    Workers tend to finish together, so progress is that of a batch from each.
    """
    if task.device == "cpu":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: task.threads])
    torch.set_num_threads(task.threads)
    batches = (STAGES | LOADERS | peers.PEERS)[name](task)
    while True:
        images = sum(next(batches)[0] for _ in range(task.threads))
        if task.device == "cuda":
            torch.cuda.synchronize()
        yield Progress(images)


def interleaved(runs: dict[str, tuple[str, Task]], seconds: float) -> dict[str, tuple[Timing, Timing]]:
    """Milliseconds per source image, (on the clock, of processor time), for runs {label: (name, task)}.

    `seconds` is for each; all run in turn. Raises RuntimeError if one fails.
    """
    cuda = any(task.device == "cuda" for _, task in runs.values())
    programs = {label: partial(load, *run) for label, run in runs.items()}
    slice_s = seconds / (2 * ROUNDS) if cuda else SLICE_S
    results = in_slices(programs, seconds * len(runs), fewest=ROUNDS, slice_s=slice_s)
    timelines = dict[str, Timeline]()
    for label, result in results.items():
        if isinstance(result, Failure):
            raise RuntimeError(f"{label}: {result}")
        timelines[label] = result
    edges = round_edges(list(timelines.values()), ROUNDS)
    return {
        label: (
            timing([1e3 / rate for rate in timeline.rates(edges)]),
            timing([1e3 * cpu_s for cpu_s in timeline.cpu_s_per_image(edges)]),
        )
        for label, timeline in timelines.items()
    }


def memory_growth(task: Task, steps: int) -> float:
    """MiB in use after `steps` batches of ours, above what a tenth of them left."""
    batches, early = ours(task), max(1, steps // 10)
    held_at = []
    for step in range(1, steps + 1):
        next(batches)
        if step in (early, steps):
            held_at.append(held_mib(task.device))
    return held_at[-1] - held_at[0]


def call_ms(task: Task, steps: int) -> Timing:
    """Milliseconds that the calling thread spends in the loader for a batch that is ready: it pauses for twice as long
    as one takes before it asks. A training thread cannot issue anything to its GPU in this time."""
    batches = ours(task)
    next(batches)
    start = time.perf_counter()
    for _ in range(4):
        next(batches)
    pause, took = (time.perf_counter() - start) / 2, []
    for _ in range(steps):
        time.sleep(pause)
        start = time.perf_counter()
        next(batches)
        took.append(1e3 * (time.perf_counter() - start))
    return timing(took)


# ------------------------------------------------------------------------------------------------ rows, table, plot

COLUMNS = (
    *("images_per_s", "p20_images_per_s", "p80_images_per_s", "cpu_ms", "p20_cpu_ms", "p80_cpu_ms", "runs"),
    *("growth_mib", "call_ms", "p80_call_ms", "version", "hw_decoder_load"),
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


def block(rows: list[Row]) -> str:
    """Loaders of the same images, and the stages of ours."""
    text = ""
    for part in newest_runs(rows):
        contest, stage_rows = ([row for row in part if row["what"] == what] for what in ("loader", "stage"))
        first = part[0]
        title = f"Two views of {first['size']} px from {first['data']}, views {first['views']}, loaders alone"
        if contest:
            lines = [
                [
                    f"{row['implementation']} {row['version']}".strip(),
                    *map(number, (row["images_per_s"], row["cpu_ms"])),
                    times(row["cpu_ms"], contest[0]["cpu_ms"]),
                ]
                for row in contest
            ]
            files = first.get("peers_files") or "as they are, perhaps compressed where the shards are not"
            text += f"\n{title}; the others, but for webdataset, read the same images in class folders: {files}.\n\n"
            text += table(["loader", "images/s", "CPU ms per image", "of ours"], lines)
        if stage_rows:
            counts = dict.fromkeys(row["threads"] for row in by_number(stage_rows, "threads"))
            cells = {
                (row["implementation"], row["threads"]): f"{number(row['images_per_s'])}, {number(row['cpu_ms'])} ms"
                for row in stage_rows
            }
            names = dict.fromkeys(row["implementation"] for row in stage_rows)
            lines = [[name, *(cells.get((name, count), "") for count in counts)] for name in names]
            head = ["stage, with those above", *(f"{count} thread{'s' * (count != '1')}" for count in counts)]
            text += f"\n{title}, by stages (the last stands alone): images/s, CPU ms per image.\n\n"
            text += table(head, lines)
        text += conditions(part, "loader.csv", plot_name(first))
    return text + "\n" if text else ""


def headline(rows: list[Row]) -> str:
    """Ours beside torchvision's usual transforms, at each size."""
    text = ""
    for part in newest_runs(rows):
        cpu_ms = {row["implementation"]: row["cpu_ms"] for row in part if row["what"] == "loader"}
        if ours_ms := cpu_ms.get(OURS):
            peer_ms = cpu_ms["torchvision, PIL"]
            text += f"- Two views of {part[0]['size']} px take {number(ours_ms)} ms of processor time per image; "
            text += f"torchvision's transforms take {number(peer_ms)} ms, {times(peer_ms, ours_ms)} as much.\n"
            text += "  " + conditions(part, "loader.csv").lstrip()
    return text


def newest_runs(rows: list[Row]) -> list[list[Row]]:
    """The newest run of each size on CPU and GPU: one file, one plot."""
    timed = [row | {"kind": "cuda" if row["driver"] else "cpu"} for row in rows if row["cpu_ms"]]
    keys = ["kind", "size"]
    parts = grouped(newest(timed, keys, ["what", "implementation", "threads"]), *keys)
    return [of_one_commit(part, "what", "implementation", "threads") for part in parts]


def plot_name(row: Row) -> str:
    return f"loader-{'cuda' if row['driver'] else 'cpu'}-{row['size']}.png"


def plots(rows: list[Row], folder: Path) -> None:
    for part in newest_runs(rows):
        if any(row["what"] == "stage" for row in part):
            draw([row | {"threads": int(row["threads"])} for row in part], folder / plot_name(part[0]))


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
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
    save_plot(figure, path)


if __name__ == "__main__":
    typer.run(main)
