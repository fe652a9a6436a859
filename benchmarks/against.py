"""The same network and images trained through other libraries' loaders and losses: `benchmarks.sweep --against`.

What others train with is a loader of benchmarks/peers.py and a loss. solo-learn's own graph and loss are rebuilt: DALI
with masks, and the whole matrix of similarities. Rows go to records/against.csv.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import timing
from benchmarks.peers import PEERS, Task
from benchmarks.programs import Failure, Progress, Timeline, in_slices, round_edges
from benchmarks.tables import Row, conditions, grouped, number, table
from benchmarks.throughput import (
    FEWEST,
    SLICED_ROUNDS,
    newest_runs,
    plot_title,
    prepared,
    rounded,
    source,
    train_one,
    trained_by,
    uncertainty,
)
from model.nt_xent import nt_xent
from tools.records import save_plot
from train import TrainConfig, Training, build_accelerator, build_training

OURS = "ours"
NOISE = 0.1  # of a ratio to ours: one that is known no better than this share of it is noisy
WORKERS_BATCH = 64  # images at most: each worker of a DataLoader holds two ready, of a GPU's micro-batches gigabytes

CONTESTANTS = {  # (loader, loss, whether workers load)
    "lightly": ("lightly", "lightly", True),
    "solo": ("DALI, masks", "reference", False),
    "torchvision": ("torchvision, PIL", "reference", True),
}

NUMBERS = (
    *("rounds", "images_per_s", "ratio_to_ours", "status", "ratio_p20", "ratio_p80", "cpu_ms_per_image"),
    "peak_host_mib",
)


def contestants(names: str, images: Path | None) -> list[str]:
    """The names of --against. Raises ValueError for what cannot be compared here."""
    chosen = [name for name in names.split(",") if name]
    if unknown := sorted(set(chosen) - set(CONTESTANTS)):
        raise ValueError(f"--against {','.join(unknown)}: choose from {','.join(CONTESTANTS)}")
    if "lightly" in chosen and not find_spec("lightly"):
        raise ValueError("--against lightly: it is not installed (pip install lightly)")
    if chosen and (images is None or not images.is_dir()):
        raise ValueError(f"--against needs --images, the same images in class folders; got {images}")
    if chosen and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("--against compares in one process; start it without a launcher")
    return chosen


def measure(config: TrainConfig, names: Sequence[str], images: Path | None, budget: float) -> dict[str, dict[str, Any]]:
    """{name: NUMBERS} of ours and of each contestant, all in turn; budget in seconds for each."""
    task = Task(
        shards=Path(config.data),
        images=images,
        views=config.views,
        batch_size=config.micro_batch,
        threads=config.num_threads,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    programs = {name: partial(train_with, task, name, config) for name in (OURS, *names)}
    if task.device == "cuda":  # one by one, each with all its memory
        results = {name: in_slices({name: programs[name]}, budget, fewest=FEWEST)[name] for name in programs}
    else:
        results = in_slices(programs, budget * len(programs), fewest=FEWEST)
    return {name: numbers(result, results[OURS]) for name, result in results.items()}


def numbers(result: Timeline | Failure, ours: Timeline | Failure) -> dict[str, Any]:
    """The NUMBERS of a contestant, from what it did and what ours did."""
    row: dict[str, Any] = dict.fromkeys(NUMBERS, "")
    if isinstance(result, Failure):
        return row | {"status": str(result)}
    row |= {
        "images_per_s": rounded(result.images_per_s),
        "status": "ok",
        "cpu_ms_per_image": rounded(1e3 * result.cpu_s_per_image(result.at[[0, -1]])[0]),
        "peak_host_mib": rounded(result.peak_host_mib),
    }
    if isinstance(ours, Failure):
        return row
    one_by_one = result.marks[0].at > ours.marks[-1].at  # on a GPU
    edges = [round_edges([one] if one_by_one else [result, ours], SLICED_ROUNDS) for one in (result, ours)]
    ratios = [theirs / mine for theirs, mine in zip(result.rates(edges[0]), ours.rates(edges[1]), strict=False)]
    ratio = timing(ratios)
    row |= {"rounds": len(ratios), "ratio_to_ours": rounded(ratio.median)}
    row |= {"ratio_p20": rounded(ratio.p20), "ratio_p80": rounded(ratio.p80)}
    return row | ({"status": "noisy"} if uncertainty(ratios) > NOISE * ratio.median else {})


# --------------------------------------------------------------------------------------------------------- contestants


def train_with(task: Task, name: str, config: TrainConfig) -> Iterator[Progress]:
    """Steps of one contestant as a program: micro-batches of its loader, and its loss of all of them."""
    if name == OURS:
        with prepared(config) as bench:
            yield from steps(bench.training, (batch.views for batch in bench.loader), config.batch_size)
    else:
        yield from steps(*rival(task, name, config), config.batch_size)


def steps(training: Training, views: Iterator[Tensor], batch_size: int) -> Iterator[Progress]:
    for i in itertools.count():
        train_one(training, views)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        yield Progress(batch_size if i else 0)


def rival(task: Task, name: str, config: TrainConfig) -> tuple[Training, Iterator[Tensor]]:
    """Our network and optimizer with another's loss, and micro-batches of its loader."""
    loader_name, loss_name, has_workers = CONTESTANTS[name]
    if has_workers:
        task = replace(task, batch_size=workers_batch(config.micro_batch))
    batches = PEERS[loader_name](task)
    first = next(batches)  # its workers are forked here, before torch's threads and the GPU's context are made
    torch.set_num_threads(config.cpu_threads)
    accelerator = build_accelerator(config)
    training = replace(build_training(config, accelerator), loss_of=loss_of(loss_name, config.temperature))
    dtype = torch.half if training.half else torch.float
    pairs = (
        [view.to(accelerator.device, dtype, non_blocking=True) for view in pair]
        for _, pair in itertools.chain([first], batches)
    )
    return training, joined(pairs, config.micro_batch // task.batch_size)


def joined(pairs: Iterator[Sequence[Tensor]], count: int) -> Iterator[Tensor]:
    """(2m, 3, S, S) of `count` pairs of views each: all first ones, then all second ones."""
    for few in zip(*[pairs] * count, strict=False):
        views = [view for side in zip(*few, strict=True) for view in side]
        yield torch.cat(views).contiguous(memory_format=torch.channels_last)


def workers_batch(micro_batch: int) -> int:
    """Images that a worker of a DataLoader makes at once: the largest divisor of a micro-batch up to WORKERS_BATCH.

    >>> workers_batch(1024), workers_batch(100), workers_batch(48)
    (64, 50, 48)
    """
    return max(n for n in range(1, min(micro_batch, WORKERS_BATCH) + 1) if micro_batch % n == 0)


def loss_of(name: str, temperature: float) -> Callable[[Tensor], Tensor]:
    if name == "reference":
        return lambda z: nt_xent(z, temperature, impl="reference")
    from lightly.loss import NTXentLoss

    loss = NTXentLoss(temperature=temperature)
    return lambda z: loss(*z.chunk(2))


# ------------------------------------------------------------------------------------------------------ table and plot


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    head = f"{'images/s':>18} {'of ours':>9} {'p20 to p80':>16} {'CPU ms/image':>12} {'host MiB':>9}"
    print(f"\n{rows[0]['batch_size']} images {head}")
    for row in rows:
        between = f"{row['ratio_p20']} to {row['ratio_p80']}"
        speed = f"{row['images_per_s']:>9} {row['ratio_to_ours']:>9} {between:>16}"
        print(f"{row['what']:22} {speed} {row['cpu_ms_per_image']:>12} {row['peak_host_mib']:>9} {row['status']}")


def block(rows: list[Row]) -> str:
    """Each preset: ours and the contestants at every batch size."""
    text = ""
    for part in newest_runs(rows, "what"):
        lines = []
        for row in part:
            ratio = row["status"]
            if row["ratio_to_ours"]:
                ratio, low, high = (f"{float(row[name]):.2f}" for name in ("ratio_to_ours", "ratio_p20", "ratio_p80"))
                ratio = f"{ratio} x ({low} to {high}{', noisy' if row['status'] == 'noisy' else ''})"
            rate, cpu_ms, mib = (number(row[name]) for name in ("images_per_s", "cpu_ms_per_image", "peak_host_mib"))
            lines.append([row["batch_size"], row["what"], rate, ratio, cpu_ms, mib])
        text += f"\n{trained_by(part[0])}; the same model and images through other loaders and losses; the median "
        text += f"of {part[0]['rounds']} rounds' ratios (p20 to p80), and processor time with workers.\n\n"
        text += table(["batch", "training with", "images/s", "of ours", "CPU ms per image", "host MiB"], lines)
        text += source(part) + conditions(part, "against.csv", plot_name(part[0]))
    return text + "\n"


def plot_name(row: Row) -> str:
    return f"against-{row['preset']}.png"


def plots(rows: list[Row], folder: Path) -> None:
    for part in newest_runs(rows, "what"):
        draw(part, folder / plot_name(part[0]))


def draw(rows: Sequence[Row], path: Path) -> None:
    """Images per second of each contestant, batch by batch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.2 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    place, places = 0.0, []
    for batch in grouped(rows, "batch_size"):
        places += [place + i for i in range(len(batch))]
        place = places[-1] + 1.6
    colours = ["C3" if row["what"] == rows[0]["what"] else "0.7" for row in rows]
    bars = axes.barh(places, [float(row["images_per_s"] or 0) for row in rows], 0.8, color=colours)
    axes.bar_label(bars, [f" {bar_label(row)}" for row in rows], fontsize=8)
    axes.set_yticks(places, [f"{row['what']}, batch {row['batch_size']}" for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.35)
    axes.set(xlabel="source images/s in training, and the median of the rounds' ratios to ours")
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(plot_title(rows), fontsize=8)
    save_plot(figure, path)


def bar_label(row: Row) -> str:
    """A contestant's rate, its ratio to ours, and what is wrong with either."""
    parts = [number(row["images_per_s"]), f"{float(row['ratio_to_ours']):.2f} x" if row["ratio_to_ours"] else ""]
    parts.append(row["status"] if row["status"] != "ok" else "")
    return ", ".join(part for part in parts if part)
