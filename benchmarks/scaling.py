"""Predict the training step on many processes from pieces measured on one, and hold the prediction to real processes.

    python -m benchmarks.scaling                                    GPUs, from the records of one
    python -m benchmarks.scaling --device cpu --depth 18 --size 32 --precision fp32 --batch-size 256 --processes 4
    python -m benchmarks.scaling --step-ms MS --step-images 128 --loss-ms MS --loss-rows 256      pieces from elsewhere
    python -m benchmarks.scaling --measure 1 --measure 2 --measure 4                  CPU processes, into the record

A step of W processes on B images, n = B / W each in passes of at most m, M = 2B rows of z in D columns:

    compute     n / m x (forward + backward) of a measured pass of m images, + optimizer; a pass smaller than any that
                was measured is taken to be as efficient, which flatters many processes: measure small passes too
    recompute   the forward again, for the images of all passes but the last (model/large_batch.py, one pass kept)
    loss        measured forward + backward at sqrt(M x 2n) rows: time goes with M x 2n, down to the smallest measured
    gather      z, D values a row, and row sums of fp32:  2 (W - 1) latency + (W - 1) / W x bytes / bandwidth
    reduce      gradients of fp32, by a ring:  2 (W - 1) latency + 2 (W - 1) / W x bytes / bandwidth, less what is
                hidden: `overlap` x the backward of the last pass
    loader      a process cannot step faster than n / its loader's images/s
    storage     images/s x the mean bytes of an image

It assumes processes of equal speed, BatchNorm per process, a bandwidth that is that of the slowest link, no pauses to
save or evaluate, and a loader that is measured with the cores that each process has. Small messages by a ring cost most
at many processes, where NCCL takes trees: there `reduce` is an upper bound. Predictions are printed and drawn, never
recorded; --measure records measured pieces and the measured step, from which benchmarks/report.py predicts again.

Processes on one CPU share its cores and memory, so each has one thread, and `compute` is what that many processes take
that do not talk, in turn with the talking step; latency and bandwidth are those of two processes in the same run.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import typer

from benchmarks.measure import RECORDS, append, environment, read, save_plot, timing
from benchmarks.report import Row, by_number, newest
from benchmarks.step import PARTS, Step, build_network

IMAGENET_IMAGES = 1_281_167
IMAGENET_BYTES = 147_897_477_120  # of ILSVRC2012_img_train.tar
DIM = 128  # columns of z


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """What a prediction is made of. Seconds and bytes; those of the pass and the loss are measured on one process."""

    pass_images: int  # m
    forward_s: float
    backward_s: float
    optimizer_s: float
    losses: tuple[tuple[int, float], ...]  # (rows, seconds of forward + backward at rows x rows), rows ascending
    gradient_bytes: float
    row_bytes: float  # of z, as it is gathered
    latency_s: float = 0.0  # of one message
    bandwidth: float = math.inf  # bytes per second and process, each way
    overlap: float = 0.0  # share of the last backward during which gradients travel
    loader_images_per_s: float = math.inf  # of one process
    image_bytes: float = IMAGENET_BYTES / IMAGENET_IMAGES


@dataclass(frozen=True)
class Prediction:
    """One step of all processes: seconds, and what follows from them. Bytes are per second."""

    world_size: int
    compute_s: float
    recompute_s: float
    loss_s: float
    gather_s: float
    reduce_s: float  # what the backward does not hide
    loader_s: float
    step_s: float
    images_per_s: float
    network_per_process: float
    storage: float
    imagenet_hours: float  # 100 epochs
    limit: Literal["loader", "compute", "loss", "network"]


def predict(pieces: Pieces, batch_size: int, world_size: int) -> Prediction:
    """ValueError unless the batch divides evenly among the processes."""
    if batch_size % world_size:
        raise ValueError(f"a batch of {batch_size} does not divide among {world_size} processes")
    p, n, others = pieces, batch_size // world_size, world_size - 1
    passes = math.ceil(n / p.pass_images)
    measured = n / p.pass_images  # in passes of the measured size
    compute_s = measured * (p.forward_s + p.backward_s) + p.optimizer_s
    recompute_s = measured * (passes - 1) / passes * p.forward_s
    loss_s = _loss_s(p.losses, math.sqrt(2 * batch_size * 2 * n))
    gathered = others / world_size * 2 * batch_size * (p.row_bytes + 4)
    reduced = 2 * others / world_size * p.gradient_bytes
    gather_s = 2 * others * p.latency_s + gathered / p.bandwidth
    hidden_s = p.overlap * measured / passes * p.backward_s
    reduce_s = max(0.0, 2 * others * p.latency_s + reduced / p.bandwidth - hidden_s)
    loader_s = n / p.loader_images_per_s
    shares = {"compute": compute_s + recompute_s, "loss": loss_s, "network": gather_s + reduce_s}
    step_s = max(sum(shares.values()), loader_s)
    images_per_s = batch_size / step_s
    return Prediction(
        world_size,
        compute_s,
        recompute_s,
        loss_s,
        gather_s,
        reduce_s,
        loader_s,
        step_s,
        images_per_s,
        network_per_process=(gathered + reduced) / step_s,
        storage=images_per_s * p.image_bytes,
        imagenet_hours=100 * (IMAGENET_IMAGES // batch_size) * step_s / 3600,
        limit="loader" if loader_s >= sum(shares.values()) else max(shares, key=lambda name: shares[name]),  # type: ignore[arg-type]
    )


def _loss_s(losses: Sequence[tuple[int, float]], rows: float) -> float:
    """Seconds at rows x rows: between two measured sizes by a power of the rows, beyond the largest by their square."""
    sizes, seconds = zip(*losses, strict=True)
    beyond = max(1.0, rows / sizes[-1]) ** 2
    return beyond * float(np.exp(np.interp(np.log(rows), np.log(sizes), np.log(seconds))))


# --------------------------------------------------------------------------------------------------- pieces and table


def pieces_of(row: Row) -> Pieces:
    """Of a row of records/scaling.csv."""
    latency_s, bandwidth = 0.0, math.inf
    if row["world_size"] != "1":
        latency_s, bandwidth = float(row["latency_us"]) / 1e6, 1e6 * float(row["bandwidth_mb_s"])
    forward_s, loss_s, backward_s, optimizer_s = (float(row[f"{part}_ms"]) / 1e3 for part in PARTS)
    return Pieces(
        pass_images=int(row["images"]),
        forward_s=forward_s,
        backward_s=backward_s,
        optimizer_s=optimizer_s,
        losses=((2 * int(row["images"]), loss_s),),
        gradient_bytes=float(row["gradient_bytes"]),
        row_bytes=4 * DIM,
        latency_s=latency_s,
        bandwidth=bandwidth,
    )


def recorded(
    records: Path, device: str, depth: int, size: int, precision: str, images: int
) -> tuple[dict[str, Any], str]:
    """Fields of Pieces from the records of one device, and which those are: the newest that fits.

    Of its passes in step.csv the fastest of the largest that is no larger than `images`, or else of the smallest; the
    losses of loss.csv and our loader alone from loader.csv, where measured. typer.BadParameter without a pass.
    """
    asked = {"depth": str(depth), "size": str(size), "precision": precision, "world_size": "1", "bn": "local"}
    asked |= {"width": "1.0"}
    rows = [row for row in read(records / "step.csv") if all(row[key] == value for key, value in asked.items())]
    rows = [row for row in rows if bool(row["driver"]) == (device == "cuda") and row["forward_ms"]]
    if not rows:
        raise typer.BadParameter(
            f"records/step.csv has no step of ResNet-{depth} at {size} px in {precision} on {device}, eager or "
            "compiled, and nothing is guessed: measure it with python -m benchmarks.step, or give --step-ms"
        )
    where = {name: rows[-1][name] for name in ("device", "threads")}

    def here(record: str, **values: str) -> list[Row]:
        values |= where
        return [row for row in read(records / record) if all(row[key] == value for key, value in values.items())]

    passes = by_number(
        newest([row for row in rows if row.items() >= where.items()], ["images"], ["layout", "mode"]), "images"
    )
    chosen = ([row for row in passes if int(row["images"]) <= images] or passes[:1])[-1]["images"]
    row = min((row for row in passes if row["images"] == chosen), key=lambda row: float(row["median_ms"]))
    found: dict[str, Any] = {f"{part}_s": float(row[f"{part}_ms"]) / 1e3 for part in PARTS if part != "loss"} | {
        "pass_images": int(chosen)
    }
    losses = here("loss.csv", implementation="triton" if device == "cuda" else "chunked", mode="forward+backward")
    if losses:
        ordered = by_number(newest(losses, ["rows"]), "rows")
        found["losses"] = tuple((int(row["rows"]), float(row["median_ms"]) / 1e3) for row in ordered)
    del where["threads"]  # the loader's are its own
    if loaders := here("loader.csv", what="loader", implementation="SwiftCLR", size=str(size)):
        found["loader_images_per_s"] = float(loaders[-1]["images_per_s"])
    kind = f"{row['mode']}, {row['layout']}, commit {row['commit']}, {row['date']}"
    return found, f"{row['device']} with {row['threads']} threads, passes of {chosen} images, {kind}"


def print_table(predictions: Sequence[Prediction], batch_size: int) -> None:
    typer.echo(f"\npredicted, not measured: batches of {batch_size}; ms of a step, MB/s per process and of storage")
    columns = ("compute", "again", "loss", "gather", "reduce", "loader", "step")
    head = f"{'processes':>9}" + "".join(f"{name:>10}" for name in columns)
    typer.echo(f"{head}{'images/s':>11}{'network':>10}{'storage':>10}{'hours':>9}  limit")
    for p in predictions:
        seconds = (p.compute_s, p.recompute_s, p.loss_s, p.gather_s, p.reduce_s, p.loader_s, p.step_s)
        cells = "".join(f"{1e3 * value:10.4g}" for value in seconds)
        rates = f"{p.images_per_s:11,.0f}{p.network_per_process / 1e6:10,.0f}{p.storage / 1e6:10,.0f}"
        typer.echo(f"{p.world_size:9}{cells}{rates}{p.imagenet_hours:9.3g}  {p.limit}")


def plot(predictions: Sequence[Prediction], title: str, path: Path) -> None:
    """Throughput and the parts of a step over the processes, labelled as predicted."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    speed, parts = figure.subplots(1, 2)
    sizes = [p.world_size for p in predictions]
    first = predictions[0]
    ideal = [first.images_per_s * size / first.world_size for size in sizes]
    speed.plot(sizes, ideal, color="0.6", linestyle="--", label="in proportion")
    speed.plot(sizes, [p.images_per_s for p in predictions], marker="o", color="C3", label="predicted")
    speed.set(title="throughput, predicted", ylabel="source images/s", yscale="log")
    bottom = np.zeros(len(sizes))
    for name in ("compute", "recompute", "loss", "gather", "reduce"):
        heights = np.array([getattr(p, f"{name}_s") / p.step_s for p in predictions])
        parts.bar([str(size) for size in sizes], 100 * heights, bottom=bottom, label=name)
        bottom += 100 * heights
    parts.set(title="parts of the step, predicted", ylabel="%", xlabel="processes")
    speed.set_xscale("log", base=2)
    speed.set_xticks(sizes, [str(size) for size in sizes])
    speed.set_xlabel("processes")
    for axes in (speed, parts):
        axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1) if axes is parts else None)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=9)
    save_plot(figure, path, 120)
    typer.echo(f"plot: {path}")


def main(
    batch_size: Annotated[int, typer.Option(help="images per step, over all processes")] = 4096,
    processes: Annotated[list[int] | None, typer.Option(min=1, help="default 1, 2, 4 ... 1024, as divide it")] = None,
    device: Annotated[Literal["cuda", "cpu"], typer.Option(help="whose records")] = "cuda",
    depth: Annotated[int, typer.Option(help="of the ResNet")] = 50,
    size: Annotated[int, typer.Option(help="of the views in px")] = 224,
    precision: Annotated[str, typer.Option(help="of the step: bf16, fp32")] = "bf16",
    pass_images: Annotated[int | None, typer.Option(help="most images encoded at once; default: all")] = None,
    step_ms: Annotated[float | None, typer.Option(help="given instead of measured, loss apart; needs the next")] = None,
    step_images: Annotated[int | None, typer.Option(help="of that step; its forward counts as a third")] = None,
    loss_ms: Annotated[float | None, typer.Option(help="given instead of measured; needs the next")] = None,
    loss_rows: Annotated[int | None, typer.Option(help="of that loss, 2n")] = None,
    loader_images_per_s: Annotated[float | None, typer.Option(help="per process; default as recorded")] = None,
    image_bytes: Annotated[float, typer.Option(help="mean of an image")] = IMAGENET_BYTES / IMAGENET_IMAGES,
    bandwidth_gb_s: Annotated[float, typer.Option(help="per process, each way; an assumption")] = 25.0,
    latency_us: Annotated[float, typer.Option(help="of one message; an assumption")] = 10.0,
    overlap: Annotated[float, typer.Option(help="0 to 1; share of the backward that hides the network")] = 0.0,
    plot_to: Annotated[Path | None, typer.Option(help="also draw it, into this PNG")] = None,
    measure: Annotated[list[int] | None, typer.Option(help="instead: so many CPU processes, measured")] = None,
    rounds: Annotated[int, typer.Option(help="of --measure")] = 15,
    records: Annotated[Path, typer.Option(help="folder of step.csv, loss.csv and loader.csv")] = RECORDS,
    record: Annotated[str, typer.Option(help="CSV of --measure, in benchmarks/records/ or a path")] = "scaling.csv",
) -> None:
    """Predict for many processes, or measure a few."""
    if measure:
        for world_size in measure:
            measure_processes(world_size, rounds=rounds, record=record)
        return
    for name, one, other in (("step", step_ms, step_images), ("loss", loss_ms, loss_rows)):
        if (one is None) != (other is None):
            raise typer.BadParameter("the milliseconds and their size are given together", param_hint=f"--{name}-ms")
    if pass_images and step_ms is not None:
        raise typer.BadParameter("chooses among measured passes; --step-images is that of the step given")
    if not 0 <= overlap <= 1:
        raise typer.BadParameter(f"expected 0 to 1, got {overlap}", param_hint="--overlap")
    given: dict[str, Any] = {
        "gradient_bytes": gradient_bytes(depth, 1.0, size),
        "row_bytes": DIM * (2 if device == "cuda" else 4),
    }
    given |= {
        "bandwidth": 1e9 * bandwidth_gb_s,
        "latency_s": latency_us / 1e6,
        "overlap": overlap,
        "image_bytes": image_bytes,
    }
    if loader_images_per_s:
        given["loader_images_per_s"] = loader_images_per_s
    if loss_ms is not None and loss_rows is not None:
        given["losses"] = ((loss_rows, loss_ms / 1e3),)
    if step_ms is not None and step_images is not None:
        given |= {
            "forward_s": step_ms / 3e3,
            "backward_s": step_ms / 1.5e3,
            "optimizer_s": 0.0,
            "pass_images": step_images,
        }
    predictions, sources = [], []
    for world_size in processes or [2**k for k in range(11) if batch_size % 2**k == 0]:
        found, source = given, "a step as given, not measured here"
        if step_ms is None:
            n = batch_size // world_size
            measured, source = recorded(records, device, depth, size, precision, min(n, pass_images or n))
            found = measured | given
        if "losses" not in found:
            raise typer.BadParameter(
                f"records/loss.csv has no loss of {source.split(', passes')[0]}: measure it, or give --loss-ms and "
                "--loss-rows"
            )
        try:
            predictions.append(predict(Pieces(**found), batch_size, world_size))
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--processes") from error
        sources.append(source)
    print_table(predictions, batch_size)
    rate = found.get("loader_images_per_s")
    said = [*dict.fromkeys(sources), f"ResNet-{depth} at {size} px, {precision}"]
    said += [f"loss measured at {', '.join(str(rows) for rows, _ in found['losses'])} rows"]
    said += [f"loader {rate:,.0f} images/s per process" if rate else "a loader that never limits"]
    said += [
        f"{bandwidth_gb_s:g} GB/s and {latency_us:g} us per process",
        f"{overlap:.0%} of the last backward hide the network",
    ]
    said += [f"100 epochs of {IMAGENET_IMAGES:,} images of {image_bytes / 1e3:.0f} kB"]
    typer.echo("assumed: " + "; ".join(said) + "; and what benchmarks/scaling.py opens with")
    if plot_to:
        plot(predictions, f"predicted, not measured: batches of {batch_size}; {'; '.join(said[:2])}", plot_to)


def gradient_bytes(depth: int, width: float, size: int) -> int:
    """Of all gradients of encoder and head, in fp32."""
    with torch.device("meta"):
        return 4 * sum(p.numel() for p in build_network(depth, width, size).parameters())


# ----------------------------------------------------------------------------------------------------- real processes


def measure_processes(
    world_size: int, *, images: int = 32, depth: int = 18, width: float = 0.25, rounds: int = 15, record: str
) -> None:
    """One row: the step of so many gloo processes of a thread each, and the pieces that it is predicted from."""
    where = environment("cpu") | {"threads": "1"}
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, (world_size, images, depth, width, rounds, folder), nprocs=world_size)
        found = json.loads((Path(folder) / "found.json").read_text())
    row = {"what": "scaling", "world_size": world_size, "images": images, "depth": depth, "width": width, "size": 32}
    row |= {"gradient_bytes": gradient_bytes(depth, width, 32)}
    row |= {name: f"{value:.5g}" if value != "" else "" for name, value in found.items()} | {"runs": rounds}
    append(record, [{**row, **where}])
    predicted = (
        1e3
        * predict(pieces_of({key: str(value) for key, value in row.items()}), world_size * images, world_size).step_s
    )
    typer.echo(
        f"{world_size} processes, {images} images each: measured {found['step_ms']:.1f} ms, "
        f"predicted {predicted:.1f} ms, {predicted / found['step_ms']:.2f} x"
    )


def _process(rank: int, world_size: int, images: int, depth: int, width: float, rounds: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    views = torch.randn(2 * images, 3, 32, 32)
    kind = {"layout": "nchw", "mode": "eager", "precision": "fp32", "bn": "local"}
    silent = Step(views, depth=depth, width=width, **kind)  # made before there is a group, so it knows of none
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    talking = Step(views, depth=depth, width=width, **kind)
    num_bytes = gradient_bytes(depth, width, 32)
    pair = dist.new_group([0, 1]) if world_size > 1 else None
    alone, together, network = list[list[float]](), list[float](), list[tuple[float, float]]()
    for _ in range(rounds):
        dist.barrier()
        alone.append(_slowest(silent.parts_ms(), world_size))
        dist.barrier()
        together.append(sum(_slowest(talking.parts_ms(), world_size)))
        dist.barrier()
        if pair and rank < 2:
            network.append((_all_reduce_s(1, pair), _all_reduce_s(num_bytes // 4, pair)))
    if rank == 0:
        medians = [statistics.median(column) for column in zip(*alone, strict=True)]
        found: dict[str, float | str] = {f"{part}_ms": value for part, value in zip(PARTS, medians, strict=True)}
        found |= {"latency_us": "", "bandwidth_mb_s": ""}
        if network:
            small, large = (statistics.median(column) for column in zip(*network, strict=True))
            found |= {"latency_us": 1e6 * small / 2, "bandwidth_mb_s": num_bytes / max(large - small, 1e-9) / 1e6}
        talked = timing(together)
        found |= {"step_ms": talked.median, "p20_step_ms": talked.p20, "p80_step_ms": talked.p80}
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _slowest(parts: list[float], world_size: int) -> list[float]:
    """The parts of the process whose step took longest: the others wait for it."""
    all_parts = [torch.zeros(len(parts), dtype=torch.float64) for _ in range(world_size)]
    dist.all_gather(all_parts, torch.tensor(parts, dtype=torch.float64))
    return max((each.tolist() for each in all_parts), key=sum)


def _all_reduce_s(numel: int, group: Any) -> float:
    x = torch.zeros(numel)
    start = time.perf_counter()
    dist.all_reduce(x, group=group)
    return time.perf_counter() - start


if __name__ == "__main__":
    typer.run(main)
