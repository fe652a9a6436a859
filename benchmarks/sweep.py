"""Loader, step and both together at batches of 256 to 8192 images: where the time and the memory go.

    python -m benchmarks.sweep SHARDS --preset cpu              a small network at 32 px, in ten minutes on two cores
    python -m benchmarks.sweep SHARDS --preset cpu-tiny         one so small that decoding full-size JPEGs limits it
    python -m benchmarks.sweep SHARDS --preset imagenet         GPU: ResNet-50 at 224 px
    python -m benchmarks.sweep SHARDS --preset cifar10          GPU: ResNet-18 at 32 px
    python -m benchmarks.sweep SHARDS --images FOLDER --against lightly,solo,torchvision
    python -m benchmarks.sweep SHARDS --check benchmarks/records/sweep.csv
    python -m benchmarks.sweep SHARDS --profile FOLDER --batch-size 1024
    accelerate launch --multi_gpu --num_processes 8 -m benchmarks.sweep SHARDS --preset imagenet

Three things are measured at every batch size, by train.py's network, optimizer, loss and step: the loader alone, the
step on synthetic views, and both. Where one process trains on a CPU, each is a program of its own, and they run in
slices of 20 ms, see slices.py: what else the machine does slows them alike. On a GPU, and under a launcher, one process
(per rank) does the three in turns of seconds; in a virtual machine whose hypervisor runs others during a step, that
step does not count, and a round without one that does is repeated, within twice the budget. Rates are in source images,
of which each gives two views. A process that runs out of memory leaves a row that says so, and the sweep goes on.
Without SHARDS the demo's data serve.

The loader limits where training on synthetic views would be more than 3 % faster: then the stage that adds most time to
it alone is named, see benchmarks/loader.py. On CPUs the two share memory, and cores where `cores_of` cannot part them:
a loader may limit without being waited for. Rows go to records/sweep.csv and records/against.csv; benchmarks/report.py
draws them.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import multiprocessing
import os
import signal
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.distributed as dist
import typer
from torch import Tensor

from benchmarks.loader import PEERS, Task, interleaved, stages
from benchmarks.measure import (
    RECORDS,
    Marks,
    Reading,
    append,
    die_first,
    die_with_parent,
    environment,
    failure,
    gpu_watch,
    held_mib,
    kept_awake,
    on_gpu,
    peak_host_mib,
    read,
    stolen_s,
    timing,
)
from benchmarks.slices import Course, Done, in_slices, rounds
from model.nt_xent import nt_xent
from pipeline.demo import write_demo
from pipeline.loader import Loader
from pipeline.shards import Dataset, read_dataset
from pipeline.views import VIEWS, make_views
from pipeline.workers import share_of_cores
from tools.errors import one_message
from train import RECIPES, TrainConfig, Training, build_accelerator, build_training

BATCH_SIZES = (256, 512, 1024, 2048, 4096, 8192)
ENOUGH = 0.97  # together / synthetic from which on the model limits
RIVALS_NOISE = 0.1  # of a rival's ratio to ours, known no better than this share of it
CALM = 0.01  # share of the processors' time that a hypervisor may take in a step that counts
FEWEST, MOST = 3, 40  # rounds
SLICED_ROUNDS = 10  # at most, of slices
WORKERS_BATCH = 64  # images at most: each worker of a DataLoader holds two ready, of a GPU's micro-batches gigabytes
TURN_MS = 1000.0  # of each of the three in a round, at least
QUEUED = 4  # micro-batches, at least as many as the loader holds ready
WASTE = 0.01  # of an epoch may be read and dropped at its end
OURS = "ours"

# One core loads and the others train, as a GPU would, see `cores_of`: sharing all, a loader could not be free. A CPU
# cannot be asked what fits. So wide a network takes minutes for the largest batch on two cores, and is slow beside a
# loader of small images.
CPU = replace(
    RECIPES["demo"],
    views=make_views(VIEWS["cifar"], {"size": 32}),
    width=0.3125,
    micro_batch=256,
    num_threads=1,
    cpu_threads=max(1, share_of_cores() - 1),
)

PRESETS: dict[str, TrainConfig] = {
    "cpu": CPU,
    "cpu-tiny": replace(CPU, width=0.125),  # from full-size JPEGs the loader limits
    "imagenet": RECIPES["imagenet"],
    "cifar10": RECIPES["cifar10"],
}

# What others train with: the loader of benchmarks/loader.py, the loss, and whether workers load. solo-learn's own graph
# and loss are rebuilt: DALI with masks, and the whole matrix of similarities.
CONTESTANTS = {
    "lightly": ("lightly", "lightly", True),
    "solo": ("DALI, masks", "reference", False),
    "torchvision": ("torchvision, PIL", "reference", True),
}

Measured = tuple[str, dict[str, Any]]  # a status, and where it is "ok" the numbers

FOUND = (
    *("micro_batch", "rounds", "loader_images_per_s", "synthetic_images_per_s", "together_images_per_s"),
    *("ratio", "ratio_unknown", "ratio_p20", "ratio_p80", "data_wait_percent", "step_ms_p50", "step_ms_p95"),
    *("peak_device_mib", "peak_host_mib", "gpu_utilisation_percent", "gpu_power_w"),
)
CONTESTED = (
    *("rounds", "images_per_s", "ratio_to_ours", "status", "ratio_p20", "ratio_p80", "cpu_ms_per_image"),
    "peak_host_mib",
)


def main(
    shards: Annotated[Path | None, typer.Argument(help="a data set of tools/make_shards.py; none: the demo's")] = None,
    preset: Annotated[str, typer.Option(help=", ".join(PRESETS))] = "cpu",
    batch_size: Annotated[list[int] | None, typer.Option(help="source images; default 256, 512, ... 8192")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="images encoded at once; 0: as many as fit a GPU")] = None,
    depth: Annotated[int | None, typer.Option(help="of the ResNet, other than the preset's")] = None,
    width: Annotated[float | None, typer.Option(help="of the ResNet, other than the preset's")] = None,
    size: Annotated[int | None, typer.Option(help="pixels of a view, other than the preset's")] = None,
    budget: Annotated[float, typer.Option(help="seconds of measuring per batch size, three rounds at least")] = 30.0,
    against: Annotated[str, typer.Option(help=f"also train with these: {','.join(CONTESTANTS)}")] = "",
    images: Annotated[Path | None, typer.Option(help="the same images in class folders, for --against")] = None,
    check: Annotated[Path | None, typer.Option(help="sweep.csv or against.csv to hold this run to")] = None,
    margin: Annotated[float, typer.Option(help="by which a ratio may fall below --check's, as a share of it")] = 0.05,
    profile: Annotated[Path | None, typer.Option(help="write traces to this folder, and measure nothing")] = None,
    awake: Annotated[bool, typer.Option("--awake", help="keep processors from sleeping: for virtual machines")] = False,
    out: Annotated[Path, typer.Option(help="folder of sweep.csv and against.csv")] = RECORDS,
) -> None:
    """Measure loader, step and both at every batch size; exit code 1 where one fails, or has fallen below --check."""
    with one_message("sweep"), contextlib.ExitStack() as stack:
        if preset not in PRESETS:
            raise ValueError(f"unknown preset {preset!r}; choose one of {', '.join(PRESETS)}")
        rivals = contestants(against, images)
        if check and not check.is_file():
            raise ValueError(f"--check {check}: no such file; it is a record of this command, such as sweep.csv")
        baseline = read(check.resolve()) if check else []
        if profile and (against or check):
            raise ValueError("--profile measures nothing; leave out --against and --check")
        changes: dict[str, Any] = {"depth": depth, "width": width, "micro_batch": micro_batch}
        config = replace(PRESETS[preset], **{name: value for name, value in changes.items() if value is not None})
        config = replace(config, views=make_views(config.views, {"size": size} if size else {}))
        cores = share_of_cores()
        config = replace(config, cpu_threads=config.cpu_threads or cores, num_threads=config.num_threads or cores)
        name, facts = shards.name if shards else "demo", environment()  # taken first, so that `load` is that of others
        if shards is None:
            shards = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "demo"
            write_demo(shards)
            shards /= "train"
        config = replace(config, data=str(shards))
        data = f"{name}, {read_dataset(config.data).samples} images"  # what is wrong with it is told once
        ranks = stack.enter_context(processes())
        if awake and int(os.environ.get("LOCAL_RANK", 0)) == 0:
            stack.enter_context(kept_awake())
        cases = [at_batch(config, size, ranks.world_size) for size in batch_size or BATCH_SIZES]
        if profile:
            ended = {case.batch_size: ranks.run(trace, case, profile.resolve())[0] for case in cases}
            if failed := [f"{size} images: {status}" for size, status in ended.items() if status != "ok"]:
                print("\n".join(failed))
                raise typer.Exit(1)
            return
        columns = {**facts, "data": data, "threads": config.cpu_threads, "loader_threads": config.num_threads}
        sweep = Sweep(preset, config, ranks, budget, columns, out.resolve())
        rows = [sweep.row(case) for case in cases]
        if ranks.rank:
            return
        rows += [row for found in rows if rivals for row in sweep.against(found, rivals, images)]
        if check:
            fallen, unheld = compare(rows, baseline, margin)
            print("\n".join(["", *unheld, *fallen]))
            print(f"{len(fallen)} ratios are more than {100 * margin:g} % below those in {check}, or noisy")
        if any(str(row["status"]).startswith("failed") for row in rows) or (check and fallen):
            raise typer.Exit(1)


def contestants(names: str, images: Path | None) -> list[str]:
    """The names of --against; raises ValueError for what cannot be compared here."""
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


def at_batch(config: TrainConfig, batch_size: int, world_size: int) -> TrainConfig:
    """The configuration at another batch, whose micro-batch is no larger than the batch of a process."""
    if batch_size < world_size or batch_size % world_size:
        raise ValueError(f"--batch-size {batch_size} does not divide into {world_size} processes")
    return replace(config, batch_size=batch_size, micro_batch=min(config.micro_batch, batch_size // world_size))


def repeats(samples: int, batch_size: int) -> int:
    """How often a data set is listed so that it has a batch, and hardly any of an epoch is dropped at its end."""
    return next(
        n for n in itertools.count(1) if n * samples >= batch_size and n * samples % batch_size <= WASTE * n * samples
    )


def repeated(dataset: Dataset, batch_size: int) -> Dataset:
    n = repeats(dataset.samples, batch_size)
    return replace(dataset, samples=n * dataset.samples, shards=n * dataset.shards)


def verdict(ratio: float, stage_ms: Mapping[str, float]) -> str:
    """What limits training whose rate is `ratio` of that on synthetic views; see `stage_costs`, unused if it is none.

    >>> verdict(0.98, {}), verdict(0.5, {"reading": 0.1, "decode": 3.0, "augmentation": 0.9})
    ('the model limits', 'the loader limits: decode')
    """
    return "the model limits" if ratio >= ENOUGH else f"the loader limits: {max(stage_ms, key=stage_ms.__getitem__)}"


def uncertainty(rounds: Sequence[float]) -> float:
    """How far the median of normal values may be from the true one, 19 times in 20; infinite for fewer than three."""
    n = len(rounds)
    if n < 3:
        return math.inf
    student = 2 * (1 + 1.15 / (n - 2))  # the quantile of n - 1 degrees of freedom, to 2 %
    return student * math.sqrt(math.pi / 2) * statistics.stdev(rounds) / math.sqrt(n)


def noisy(ratio: float, unknown: float) -> bool:
    """Whether the rounds allow no verdict, as where other programs run: then a loader even seems to speed training up.

    What is known of the ratio leaves open on which side of ENOUGH it is; or it is above 1 by more than is unknown.

    >>> noisy(0.98, 0.009), noisy(0.98, 0.02), noisy(0.3, 0.1), noisy(1.2, 0.01)
    (False, True, False, True)
    """
    return abs(ratio - ENOUGH) < unknown or ratio - 1 > max(unknown, 1 - ENOUGH)


def stage_costs(config: TrainConfig, seconds: float) -> dict[str, float]:
    """Milliseconds per source image that each stage adds to those before it when the loader runs alone.

    On CPUs of processor time, which differs less than time on the clock where other programs run.
    """
    dataset = read_dataset(config.data)
    task = Task(
        shards=Path(config.data),
        views=config.views,
        batch_size=min(16, dataset.samples),  # many to a turn, so that what was ready at its start does not count
        threads=config.num_threads,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    possible = stages(config.views, dataset)
    last = {"reading": "read", "decode": "decode", "augmentation": "blur" if "blur" in possible else "colour"}
    runs = {name: (stage, task) for name, stage in last.items() if stage in possible}
    before, costs = 0.0, {}
    for name, (wall, processor) in interleaved(runs, seconds).items():
        ms = (wall if task.device == "cuda" else processor).median
        costs[name], before = ms - before, ms
    return costs


# --------------------------------------------------------------------------------------------------- one batch size


class Step(NamedTuple):
    """How long one call took, and the share of the processors' time in which a hypervisor ran others."""

    ms: float
    stolen: float


@dataclass(frozen=True)
class Round:
    """What was seen in one round: the loader's rate alone, in source images per second, and the steps of both turns."""

    loader: float
    together: list[Step]
    synthetic: list[Step]
    waited: float  # share of the turn with both
    readings: list[Reading]

    @property
    def ratio(self) -> float:
        return mean_ms(self.synthetic) / mean_ms(self.together)

    def calm(self) -> Round:
        """The round without its disturbed steps."""
        both, alone = ([each for each in some if each.stolen <= CALM] for some in (self.together, self.synthetic))
        return replace(self, together=both, synthetic=alone)


def mean_ms(steps: Sequence[Step]) -> float:
    return statistics.mean(step.ms for step in steps)


def measure(config: TrainConfig, budget: float) -> dict[str, Any]:
    """The numbers of one batch size, on every rank of the group that the environment names; run it in a new process."""
    with prepared(config) as (accelerator, setup, loader, synthetic):
        plan, device = setup.plan, accelerator.device
        cuda = device.type == "cuda"

        def largest(value: float) -> float:
            return float(accelerator.gather(torch.tensor([value], device=device)).max())

        def load() -> None:
            next(loader)

        def compute() -> None:
            setup.step(itertools.repeat(synthetic, plan.count), 0.0)

        def both() -> None:
            setup.step((batch.views for batch in itertools.islice(loader, plan.count)), 0.0)

        # Warm up, with no more than two micro-batches: a whole batch may take minutes on a CPU.
        few = min(plan.count, 2)
        short = replace(plan, count=few, keep=min(plan.keep, few))
        for _ in range(2):
            load()
            (warm,) = turn(lambda: setup.step(itertools.repeat(synthetic, few), 0.0, short), 1, cuda)
        step_ms = largest(warm.ms) * plan.count / few
        turn_ms = min(TURN_MS, 1e3 * budget / (3 * FEWEST))
        steps = max(1, math.ceil(turn_ms / step_ms))
        lead = plan.count < 2 * QUEUED
        most = min(MOST, max(FEWEST, int(1e3 * budget / ((lead + 2 * steps) * step_ms + turn_ms))))

        def go_round() -> Round:
            turn(load, QUEUED, cuda)  # what waited in its queue was not made in this turn
            loads, took = 0, 0.0
            while took < turn_ms:
                loads, took = loads + 1, took + turn(load, 1, cuda)[0].ms
            loader_rate = 1e3 * loads * plan.micro_batch / took
            # Its queue is empty now, and after a step as full as steps leave it; that of a step of many micro-batches
            # fills while they are encoded again.
            if lead:
                turn(both, 1, cuda)
            else:
                settle()
            loader.take_wait_s()
            accelerator.wait_for_everyone()  # or who comes first waits for the others in its step
            with gpu_watch() as readings:
                together = turn(both, steps, cuda)
            waited = 1e3 * loader.take_wait_s() / sum(each.ms for each in together)
            settle()  # or the loader fills its queue in the next one's turn
            accelerator.wait_for_everyone()
            alone = turn(compute, steps, cuda)
            # What disturbs one rank, others wait for.
            every = [each._replace(stolen=largest(each.stolen)) for each in [*together, *alone]]
            return Round(loader_rate, every[:steps], every[steps:], waited, readings)

        began, seen, calm = time.perf_counter(), list[Round](), list[Round]()
        while len(calm) < most and (len(seen) < most or largest(time.perf_counter() - began) < 2 * budget):
            seen.append(go_round())
            calm = [each for each in (one.calm() for one in seen) if each.together and each.synthetic]
        counted = calm if len(calm) >= FEWEST else seen
        if counted is seen and accelerator.is_main_process:
            disturbed = f"{len(seen) - len(calm)} of {len(seen)} rounds"
            print(f"{disturbed} were disturbed by other machines on this host; all count")
        device_mib = held_mib("cuda") if cuda else 0.0  # with DALI's, and with what torch keeps but does not use
        if cuda:
            device_mib += (torch.cuda.max_memory_allocated() - torch.cuda.memory_reserved()) / 2**20
        own_loader = torch.tensor([statistics.median(each.loader for each in counted)], device=device)
        ratios = [each.ratio for each in counted]
        ratio, unknown = timing(ratios), math.inf if len(calm) < FEWEST else uncertainty(ratios)
        step_times = [step.ms for each in counted for step in each.together]
        readings = [reading for each in counted for reading in each.readings]
        p95 = sorted(step_times)[math.ceil(0.95 * len(step_times)) - 1]
        means = [statistics.mean(column) for column in zip(*readings, strict=True)] if readings else [None, None]
        values = (
            *(plan.micro_batch, len(counted), float(accelerator.gather(own_loader).sum())),
            *(
                1e3 * config.batch_size / statistics.median(mean_ms(getattr(each, name)) for each in counted)
                for name in ("synthetic", "together")
            ),
            *(ratio.median, unknown, ratio.p20, ratio.p80),
            100 * statistics.mean(each.waited for each in counted),
            *(statistics.median(step_times), p95),
            *(largest(device_mib) if cuda else None, largest(peak_host_mib()), *means),
        )
        return dict(zip(FOUND, values, strict=True))


def loads_or_trains(config: TrainConfig, what: str) -> Iterator[Done]:
    """One of the three for `measure_in_slices`: micro-batches of the loader, or steps."""
    with prepared(config) as (_, setup, loader, synthetic):
        plan = setup.plan
        views = itertools.repeat(synthetic) if what == "synthetic" else (batch.views for batch in loader)
        if what == "loader":
            for _ in itertools.islice(views, QUEUED):
                pass
        else:
            few = min(plan.count, 2)
            short = replace(plan, count=few, keep=min(plan.keep, few))
            # The queue is as full as steps leave it; that of a step of many micro-batches fills while they are encoded
            # again.
            for part in (short, short, plan if plan.count < 2 * QUEUED else short):
                setup.step(itertools.islice(views, part.count), 0.0, part)
        loader.take_wait_s()
        yield Done()
        while True:
            if what == "loader":
                next(views)
            else:
                setup.step(itertools.islice(views, plan.count), 0.0)
            yield Done(plan.micro_batch if what == "loader" else config.batch_size, loader.take_wait_s())


def measure_in_slices(
    config: TrainConfig, budget: float, program: Callable[..., Iterator[Done]] = loads_or_trains
) -> Measured:
    """(status, the same numbers) where this process trains alone on a CPU: the three are programs of their own."""
    names = ("synthetic", "together", "loader")
    programs = {name: partial(program, config, name) for name in names}
    courses = in_slices(programs, budget, order=(*names[:2] * 4, names[2]), fewest=FEWEST)
    done = {name: course for name, course in courses.items() if not isinstance(course, str)}
    if len(done) < len(courses):
        return max((status for status in courses.values() if isinstance(status, str)), key=severity), {}
    together = done["together"]
    moments = rounds([done[name] for name in names[:2]], SLICED_ROUNDS)
    rates = {name: done[name].rates(moments) for name in names[:2]}
    ratios = [both / alone for both, alone in zip(rates["together"], rates["synthetic"], strict=True)]
    ratio, steps_ms = timing(ratios), sorted(1e3 * each for each in together.steps_s)
    values = (
        *(config.micro_batch or config.batch_size, len(ratios), done["loader"].images_per_s),
        *(statistics.median(rates[name]) for name in names[:2]),
        *(ratio.median, uncertainty(ratios), ratio.p20, ratio.p80),
        *(100 * together.waited, statistics.median(steps_ms), steps_ms[math.ceil(0.95 * len(steps_ms)) - 1]),
        *(None, together.peak_host_mib, None, None),
    )
    return "ok", dict(zip(FOUND, values, strict=True))


@contextlib.contextmanager
def prepared(config: TrainConfig) -> Iterator[tuple[Any, Training, Any, Tensor]]:
    """Accelerator, set-up, loader and a synthetic micro-batch (2m, 3, S, S), as train.py would make them."""
    torch.set_num_threads(config.cpu_threads)
    accelerator = build_accelerator(config)
    training, loading = cores_of(config)
    with on_cores(training):
        setup = build_training(config, accelerator)
        synthetic = torch.randn(2 * setup.plan.micro_batch, 3, config.views.size, config.views.size)
        synthetic = synthetic.to(accelerator.device, torch.half if setup.half else torch.float)
        synthetic = synthetic.contiguous(memory_format=torch.channels_last)  # on torch's threads, which start here
    loader = Loader(
        repeated(read_dataset(config.data), config.batch_size),
        config.views,
        config.batch_size,
        accelerator.device,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        num_threads=config.num_threads,
        half=setup.half,
        micro_batch=setup.plan.micro_batch,
    )
    with on_cores(loading):
        next(loader)  # starts the loader's threads
    try:
        with on_cores(training):
            yield accelerator, setup, loader, synthetic
    finally:
        accelerator.end_training()


def cores_of(config: TrainConfig) -> tuple[set[int], set[int]]:
    """Cores for torch's threads and for the loader's: apart where this process's share has one for each of them.

    A thread of the loader that Linux wakes on a core of a step's thread makes that step's other threads wait, too.
    """
    every, share = os.sched_getaffinity(0), share_of_cores()
    if torch.cuda.is_available() or config.cpu_threads + config.num_threads > share:
        return every, every
    own = sorted(every)[share * int(os.environ.get("LOCAL_RANK", 0)) :]
    return set(own[: config.cpu_threads]), set(own[config.cpu_threads :][: config.num_threads])


@contextlib.contextmanager
def on_cores(cores: set[int]) -> Iterator[None]:
    """This thread, and those that it starts in the block, run on these cores; the latter for ever."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def turn(work: Callable[[], object], times: int, cuda: bool) -> list[Step]:
    """Each call, on the GPU's clock where there is one."""
    marks, stolen = Marks(cuda), [stolen_s()]
    marks()
    for _ in range(times):
        work()
        marks()
        stolen.append(stolen_s())
    took = zip(marks.intervals_ms(), itertools.pairwise(stolen), strict=True)
    return [Step(ms, 1e3 * (after - before) / ms / (os.cpu_count() or 1)) for ms, (before, after) in took]


def settle(limit_s: float = 5.0) -> None:
    """Waits until the threads of this process have nothing left to do, at most so long."""
    end = time.perf_counter() + limit_s
    while time.perf_counter() < end:
        before = time.process_time()
        time.sleep(0.1)
        if time.process_time() - before < 0.01:
            return


# --------------------------------------------------------------------------------------------------------- the rows


class Sweep:
    """One command's rows, made in the order of the batch sizes, and on record as soon as they are known."""

    def __init__(
        self, preset: str, config: TrainConfig, ranks: Ranks, budget: float, facts: Mapping[str, Any], out: Path
    ) -> None:
        self.preset, self.config, self.ranks, self.budget = preset, config, ranks, budget
        self.facts, self.out = facts, out  # facts: columns that all rows share
        self.stage_ms: dict[str, float] = {}

    def row(self, config: TrainConfig) -> dict[str, Any]:
        """Measures one batch size, on all ranks; the row is the same on none but rank 0."""
        status, found = self.measured(config)
        says = efficiency = ""
        if status == "ok":
            if self.ranks.world_size > 1:
                efficiency = self.efficiency(config, found["together_images_per_s"])
            if noisy(found["ratio"], found["ratio_unknown"]):
                status = "noisy"
            elif self.ranks.rank == 0:
                if found["ratio"] < ENOUGH and not self.stage_ms:
                    self.stage_ms = stage_costs(config, 10.0)
                says = verdict(found["ratio"], self.stage_ms)
        row = {
            **self.kind(config),
            "micro_batch": "",
            "repeats": repeats(read_dataset(config.data).samples, config.batch_size),
            **{name: rounded(found.get(name)) for name in FOUND},
            **{"status": status, "verdict": says, "scaling_efficiency_percent": efficiency, **self.facts},
        }
        if self.ranks.rank == 0:
            append(self.out / "sweep.csv", [row])
            print_row(row)
        return row

    def measured(self, config: TrainConfig) -> Measured:
        if self.ranks.world_size > 1 or torch.cuda.is_available():
            return self.ranks.run(measure, config, self.budget)
        return measure_in_slices(config, self.budget)

    def kind(self, config: TrainConfig) -> dict[str, Any]:
        """What a row is of; only rows that agree in it can be compared."""
        return {
            **{"preset": self.preset, "batch_size": config.batch_size, "size": config.views.size},
            **{"encoder": f"ResNet-{config.depth} x{config.width:g}", "precision": config.precision},
            "world_size": self.ranks.world_size,
        }

    def efficiency(self, config: TrainConfig, together: float) -> str:
        """Per cent of the rate of as many processes that know nothing of each other, from one with its share."""
        world_size = self.ranks.world_size
        share = replace(config, batch_size=config.batch_size // world_size)
        status, found = self.ranks.run_alone(measure, share, self.budget)
        return rounded(100 * together / (world_size * found["together_images_per_s"])) if status == "ok" else ""

    def against(self, row: dict[str, Any], rivals: Sequence[str], images: Path | None) -> list[dict[str, Any]]:
        """Training with others' loaders and losses at the batch of a row, all in turn."""
        if not row["micro_batch"]:
            return []
        cores = share_of_cores()
        config = replace(self.config, batch_size=row["batch_size"], micro_batch=int(row["micro_batch"]))
        config = replace(config, num_threads=cores, cpu_threads=cores)  # nobody's split of a CPU, but the machine's
        task = Task(
            shards=Path(config.data),
            images=images,
            views=config.views,
            batch_size=config.micro_batch,
            threads=config.num_threads,
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
        programs = {name: partial(trained, task, name, config) for name in (OURS, *rivals)}
        if task.device == "cuda":  # one by one, each with all its memory
            found = {name: in_slices({name: programs[name]}, self.budget, fewest=FEWEST)[name] for name in programs}
        else:
            found = in_slices(programs, self.budget * len(programs), fewest=FEWEST)
        rows = [
            {
                **self.kind(config),
                "what": name,
                **contested(course, found[OURS]),
                **self.facts,
                **{"threads": cores, "loader_threads": cores},
            }
            for name, course in found.items()
        ]
        append(self.out / "against.csv", rows)
        print_against(rows)
        return rows


def contested(course: Course | str, ours: Course | str) -> dict[str, Any]:
    """The numbers of a contestant's row, from what it did and what ours did."""
    row: dict[str, Any] = dict.fromkeys(CONTESTED, "")
    if isinstance(course, str):
        return row | {"status": course}
    row |= {
        "images_per_s": rounded(course.images_per_s),
        "status": "ok",
        "cpu_ms_per_image": rounded(1e3 * course.cpu_s_per_image),
        "peak_host_mib": rounded(course.peak_host_mib),
    }
    if isinstance(ours, str):
        return row
    both = [course, ours]
    apart = course.marks[0].at > ours.marks[-1].at  # one by one, on a GPU
    moments = [rounds([each] if apart else both, SLICED_ROUNDS) for each in both]
    rates = [each.rates(at) for each, at in zip(both, moments, strict=True)]
    ratios = [theirs / mine for theirs, mine in zip(*rates, strict=False)]
    ratio = timing(ratios)
    row |= {"rounds": len(ratios), "ratio_to_ours": rounded(ratio.median)}
    row |= {"ratio_p20": rounded(ratio.p20), "ratio_p80": rounded(ratio.p80)}
    return row | ({"status": "noisy"} if uncertainty(ratios) > RIVALS_NOISE * ratio.median else {})


def trained(task: Task, name: str, config: TrainConfig) -> Iterator[Done]:
    """Steps of one contestant: `task` through its loader, and its loss of all micro-batches."""
    with contextlib.ExitStack() as stack:
        if name == OURS:
            _, setup, loader, _ = stack.enter_context(prepared(config))
            views: Iterator[Tensor] = (batch.views for batch in loader)
        else:
            setup, views = rival(task, name, config)
        for i in itertools.count():
            setup.step(itertools.islice(views, setup.plan.count), 0.0)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            yield Done(config.batch_size if i else 0)


def rival(task: Task, name: str, config: TrainConfig) -> tuple[Training, Iterator[Tensor]]:
    """Our network and optimizer with another's loss, and micro-batches of its loader."""
    loader_name, loss_name, workers = CONTESTANTS[name]
    if workers:
        task = replace(task, batch_size=workers_batch(config.micro_batch))
    batches = PEERS[loader_name](task)
    first = next(batches)  # its workers are forked here, before torch's threads and the GPU's context are made
    torch.set_num_threads(config.cpu_threads)
    accelerator = build_accelerator(config)
    setup = replace(build_training(config, accelerator), loss_of=rival_loss(loss_name, config.temperature))
    dtype = torch.half if setup.half else torch.float
    pairs = (
        [view.to(accelerator.device, dtype, non_blocking=True) for view in pair]
        for _, pair in itertools.chain([first], batches)
    )
    return setup, joined(pairs, config.micro_batch // task.batch_size)


def joined(pairs: Iterator[Sequence[Tensor]], count: int) -> Iterator[Tensor]:
    """(2m, 3, S, S) of `count` pairs of views each: all first ones, then all second ones."""
    for few in zip(*[pairs] * count, strict=False):
        views = [view for side in zip(*few, strict=True) for view in side]
        yield torch.cat(views).contiguous(memory_format=torch.channels_last)


def workers_batch(micro_batch: int) -> int:
    """Images that a worker of a DataLoader makes at once: as many as divide a micro-batch.

    >>> workers_batch(1024), workers_batch(100), workers_batch(48)
    (64, 50, 48)
    """
    return max(n for n in range(1, min(micro_batch, WORKERS_BATCH) + 1) if micro_batch % n == 0)


def rival_loss(name: str, temperature: float) -> Callable[[Tensor], Tensor]:
    if name == "reference":
        return lambda z: nt_xent(z, temperature, impl="reference")
    from lightly.loss import NTXentLoss

    loss = NTXentLoss(temperature=temperature)
    return lambda z: loss(*z.chunk(2))


def rounded(value: float | None) -> str:
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.4g}"


def print_row(row: Mapping[str, Any]) -> None:
    if not row["micro_batch"]:
        print(f"{row['batch_size']:>6} images: {row['status']}", flush=True)
        return
    repeated = f", data {row['repeats']} times" if row["repeats"] > 1 else ""
    views = f"{2 * float(row['together_images_per_s']):.4g}"
    efficiency = row["scaling_efficiency_percent"]
    print(
        f"{row['batch_size']:>6} images in micro-batches of {row['micro_batch']}{repeated}: loader "
        f"{row['loader_images_per_s']}, synthetic {row['synthetic_images_per_s']}, together "
        f"{row['together_images_per_s']} images/s ({views} views/s), ratio {row['ratio']} ({row['ratio_p20']} to "
        f"{row['ratio_p80']} in {row['rounds']} rounds), data_wait {row['data_wait_percent']}%, step "
        f"{row['step_ms_p50']} ms (p95 {row['step_ms_p95']}), host {row['peak_host_mib']} MiB"
        + (f", device {row['peak_device_mib']} MiB" if row["peak_device_mib"] else "")
        + (f", scaling {efficiency} %" if efficiency else "")
        + f": {row['verdict'] or row['status']}",
        flush=True,
    )


def print_against(rows: Sequence[Mapping[str, Any]]) -> None:
    head = f"{'images/s':>18} {'of ours':>9} {'p20 to p80':>16} {'CPU ms/image':>12} {'host MiB':>9}"
    print(f"\n{rows[0]['batch_size']} images {head}")
    for row in rows:
        between = f"{row['ratio_p20']} to {row['ratio_p80']}"
        speed = f"{row['images_per_s']:>9} {row['ratio_to_ours']:>9} {between:>16}"
        print(f"{row['what']:22} {speed} {row['cpu_ms_per_image']:>12} {row['peak_host_mib']:>9} {row['status']}")


# ------------------------------------------------------------------------------------------------------------- check

SAME = (
    *("preset", "batch_size", "what", "world_size", "size", "encoder", "precision", "micro_batch", "data", "device"),
    *("threads", "loader_threads"),
)


def compare(
    rows: Sequence[Mapping[str, Any]], baseline: Sequence[Mapping[str, str]], margin: float
) -> tuple[list[str], list[str]]:
    """(What has fallen, what was held to nothing), a line each, of together / synthetic and ours / a rival's.

    Fallen is a ratio more than `margin` of it below the newest of the same kind that is known; also where there is none
    now, for the run failed, and where it is noisy, for that says nothing. ValueError if nothing could be held.
    """

    def kind(row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(str(row.get(name, "")) for name in SAME)

    known = {kind(row): row for row in baseline if row.get("status") != "noisy" and ratio_of(row)}  # the last counts
    fallen, unheld = [], []
    for now in rows:
        if now.get("what") == OURS:
            continue
        where = f"{now['batch_size']} images" + (f", ours / {now['what']}" if "what" in now else "")
        then = known.get(kind(now))
        if not then:
            unheld.append(f"held to nothing at {where}: the baseline has no such row, or only noisy ones")
        elif now.get("status") == "noisy":
            fallen.append(f"noisy at {where}: its rounds differ too much; run it again")
        elif ratio_of(now) < (1 - margin) * ratio_of(then):
            state = f" ({now['status']})" if now.get("status", "ok") != "ok" else ""
            fallen.append(
                f"fallen at {where}: {ratio_of(now):.3f}{state}, was {ratio_of(then):.3f} on {then.get('date', '')}"
            )
    if rows and len(unheld) == sum(row.get("what") != OURS for row in rows):
        raise ValueError(
            f"no settled row of the baseline has the {', '.join(SAME)} of any row of this run: nothing is checked"
        )
    return fallen, unheld


def ratio_of(row: Mapping[str, Any]) -> float:
    """The larger, the better; 0 for a row that failed."""
    if "what" in row:
        return 1 / float(row["ratio_to_ours"]) if row["ratio_to_ours"] else 0.0
    return float(row["ratio"] or 0)


# ----------------------------------------------------------------------------------------------------------- profile


def trace(config: TrainConfig, folder: Path) -> dict[str, Any]:
    """Profiles three steps with the loader: trace-BATCH-RANK.json in `folder`, for chrome, and what took longest."""
    from torch.profiler import ProfilerActivity

    with prepared(config) as (accelerator, setup, loader, _):
        cuda = accelerator.device.type == "cuda"

        def both() -> None:
            setup.step((batch.views for batch in itertools.islice(loader, setup.plan.count)), 0.0)

        turn(both, 2, cuda)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        with torch.profiler.profile(activities=activities) as seen:
            turn(both, 3, cuda)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"trace-{config.batch_size}-{accelerator.process_index}.json"
        seen.export_chrome_trace(str(path))
        if accelerator.is_main_process:
            kernels = on_gpu(seen.events())
            print(longest(seen, cuda))
            if cuda:
                spans = [(event.time_range.start, event.time_range.end) for event in kernels]
                print(f"no kernel runs for {100 * gaps(spans):.1f} % of the time between the first and the last")
            print(f"trace: {path}", flush=True)
        return {"trace": str(path)}


def longest(seen: Any, cuda: bool, count: int = 10) -> str:
    """A table of the kernels, on a CPU the operators, that took longest by themselves."""
    averages = on_gpu(seen.key_averages()) if cuda else seen.key_averages()
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    total = sum(getattr(each, key) for each in averages) or 1
    lines = [f"{'ms':>10} {'share':>7} {'calls':>7}  {'kernel' if cuda else 'operator'}"]
    for each in sorted(averages, key=lambda each: -getattr(each, key))[:count]:
        own = getattr(each, key)
        lines.append(f"{own / 1e3:10.2f} {100 * own / total:6.1f}% {each.count:>7}  {each.key[:90]}")
    return "\n".join(lines)


def gaps(spans: Iterable[tuple[float, float]]) -> float:
    """The share of the time from the first start to the last end in which none of the spans lies.

    >>> gaps([(0, 2), (1, 4), (6, 10)])
    0.2
    """
    ordered = sorted(spans)
    if not ordered:
        return 0.0
    first, reached, idle = ordered[0][0], ordered[0][0], 0.0
    for start, end in ordered:
        idle += max(0.0, start - reached)
        reached = max(reached, end)
    return idle / (reached - first)


# --------------------------------------------------------------------------------------------------------- processes

LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


class Ranks:
    """The processes that were launched; each runs work in a new process, so that memory and failures are its own."""

    def __init__(self) -> None:
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    def run(self, work: Callable[..., dict[str, Any]], *arguments: Any) -> tuple[str, dict[str, Any]]:
        """(status, result of `work`) on every rank; status is "ok" only if it is on all, else that of the worst."""
        if self.world_size == 1:
            return in_child(work, *arguments)
        port: list[Any] = [free_port()]
        dist.broadcast_object_list(port)
        with environment_of(MASTER_PORT=str(port[0]), TORCHELASTIC_USE_AGENT_STORE="False"):
            status, found = in_child(work, *arguments)
        every: list[Any] = [None] * self.world_size
        dist.all_gather_object(every, status)
        return max(every, key=severity), found

    def run_alone(self, work: Callable[..., dict[str, Any]], *arguments: Any) -> tuple[str, dict[str, Any]]:
        """The same on rank 0, which knows of no other while they wait."""
        status, found = "waited", dict[str, Any]()
        if self.rank == 0:
            with environment_of(**dict.fromkeys(LAUNCHED)):
                status, found = in_child(work, *arguments)
        dist.barrier()
        return status, found


def severity(status: str) -> int:
    """Where one rank runs out of memory the others fail for its sake."""
    return 0 if status == "ok" else 2 if status == "out of memory" else 1


@contextlib.contextmanager
def processes() -> Iterator[Ranks]:
    ranks = Ranks()
    if ranks.world_size > 1:
        dist.init_process_group("gloo")
    try:
        yield ranks
    finally:
        if ranks.world_size > 1:
            dist.destroy_process_group()


@contextlib.contextmanager
def environment_of(**changes: str | None) -> Iterator[None]:
    """Environment variables for processes that start in the block; None takes one away."""
    before = {name: os.environ.pop(name, None) for name in changes}
    os.environ.update({name: value for name, value in changes.items() if value is not None})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def in_child(work: Callable[..., dict[str, Any]], *arguments: Any) -> tuple[str, dict[str, Any]]:
    """("ok", work(*arguments)), from a new process; or ("out of memory" or "failed: why", {}).

    Where memory ends the kernel kills with SIGKILL, and the child is made the first that it chooses: so a killed child
    is one out of memory.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(there, work, arguments), daemon=True)
    process.start()
    there.close()
    try:
        status, found = here.recv()
    except EOFError:
        process.join()
        killed = process.exitcode == -signal.SIGKILL
        return ("out of memory" if killed else f"failed: exit code {process.exitcode}"), {}
    process.join()
    return status, found


def _answer(link: Connection, work: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> None:
    die_with_parent()
    die_first()
    try:
        link.send(("ok", work(*arguments)))
    except Exception as error:
        link.send((failure(error), {}))


if __name__ == "__main__":
    typer.run(main)
