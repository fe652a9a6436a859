"""Loader alone, step alone and both together at one batch size, by train.py's network, optimizer, loss and step.

measure_in_slices(config, budget)   one CPU process: three programs that alternate in slices, see benchmarks/programs.py
measure_in_turns(config, budget)    GPUs, and processes under a launcher: one process (per rank) in turns of seconds
prepared(config)                    what both measure with

Rates are in source images, of which each gives two views. On CPUs loader and step share memory, and cores where
`cores_of` cannot separate them.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.measure import Marks, Reading, gpu_watch, held_mib, peak_host_mib, timing
from benchmarks.programs import Failure, Progress, Timeline, in_slices, round_edges, worst
from benchmarks.tables import Row, by_number, grouped, newest, of_one_commit
from model.memory_plan import Plan
from pipeline.loader import Loader
from pipeline.shards import Dataset, read_dataset
from pipeline.workers import share_of_cores
from train import TrainConfig, Training, build_accelerator, build_training

FEWEST, MOST = 3, 40  # rounds
SLICED_ROUNDS = 10  # at most, of slices
TURN_MS = 1000.0  # of each of the three in a round, at least
QUEUED = 4  # micro-batches, at least as many as the loader holds ready
WASTE = 0.01  # of an epoch may be read and dropped at its end

NUMBERS = (
    *("micro_batch", "rounds", "loader_images_per_s", "synthetic_images_per_s", "together_images_per_s"),
    *("ratio", "ratio_unknown", "ratio_p20", "ratio_p80", "data_wait_percent", "step_ms_p50", "step_ms_p95"),
    *("peak_device_mib", "peak_host_mib", "gpu_utilisation_percent", "gpu_power_w"),
)


def numbers(
    micro_batch: int,
    ratios: Sequence[float],
    loader_rate: float,
    synthetic_rate: float,
    together_rate: float,
    waited: float,
    step_ms: Sequence[float],
    *memory_and_gpu: float | None,
) -> dict[str, Any]:
    """The NUMBERS of one batch size; `ratios` are those of the rounds, `memory_and_gpu` the last four columns."""
    ratio, step_ms = timing(ratios), sorted(step_ms)
    p95 = step_ms[math.ceil(0.95 * len(step_ms)) - 1]
    values = (
        *(micro_batch, len(ratios), loader_rate, synthetic_rate, together_rate),
        *(ratio.median, uncertainty(ratios), ratio.p20, ratio.p80, 100 * waited, statistics.median(step_ms), p95),
        *memory_and_gpu,
    )
    return dict(zip(NUMBERS, values, strict=True))


def uncertainty(ratios: Sequence[float]) -> float:
    """How far the median of normal values may be from the true one, 19 times in 20; infinite for fewer than three."""
    n = len(ratios)
    if n < 3:
        return math.inf
    student = 2 * (1 + 1.15 / (n - 2))  # the quantile of n - 1 degrees of freedom, to 2 %
    return student * math.sqrt(math.pi / 2) * statistics.stdev(ratios) / math.sqrt(n)


# ------------------------------------------------------------------------------------------------------------ prepared


@dataclass(frozen=True)
class Bench:
    """What train.py would train with, and a synthetic micro-batch (2m, 3, S, S)."""

    config: TrainConfig
    accelerator: Any
    training: Training
    loader: Any
    synthetic: Tensor

    def load(self) -> None:
        next(self.loader)

    def step_alone(self, plan: Plan | None = None) -> None:
        self.step(itertools.repeat(self.synthetic), plan)

    def step_together(self, plan: Plan | None = None) -> None:
        self.step((batch.views for batch in self.loader), plan)

    def step(self, views: Iterable[Tensor], plan: Plan | None = None) -> None:
        train_one(self.training, views, plan)

    def short_plan(self) -> Plan:
        """To warm up with: a step of many micro-batches may take minutes on a CPU."""
        plan = self.training.plan
        return replace(plan, count=min(plan.count, 2), keep=min(plan.keep, plan.count, 2))


def train_one(training: Training, views: Iterable[Tensor], plan: Plan | None = None) -> None:
    """train.py's step at learning rate 0, which leaves the weights as they are."""
    plan = plan or training.plan
    training.step(itertools.islice(views, plan.count), 0.0, plan)


@contextlib.contextmanager
def prepared(config: TrainConfig) -> Iterator[Bench]:
    torch.set_num_threads(config.cpu_threads)
    accelerator = build_accelerator(config)
    step_cores, loader_cores = cores_of(config)
    with on_cores(step_cores):
        training = build_training(config, accelerator)
        synthetic = torch.randn(2 * training.plan.micro_batch, 3, config.views.size, config.views.size)
        synthetic = synthetic.to(accelerator.device, torch.half if training.half else torch.float)
        synthetic = synthetic.contiguous(memory_format=torch.channels_last)  # on torch's threads, which start here
    loader = Loader(
        repeated(read_dataset(config.data), config.batch_size),
        config.views,
        config.batch_size,
        accelerator.device,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        num_threads=config.num_threads,
        half=training.half,
        micro_batch=training.plan.micro_batch,
    )
    with on_cores(loader_cores):
        next(loader)  # starts the loader's threads
    try:
        with on_cores(step_cores):
            yield Bench(config, accelerator, training, loader, synthetic)
    finally:
        accelerator.end_training()


def repeats(samples: int, batch_size: int) -> int:
    """How often a data set is listed so that it has a batch, and hardly any of an epoch is dropped at its end."""
    return next(
        n for n in itertools.count(1) if n * samples >= batch_size and n * samples % batch_size <= WASTE * n * samples
    )


def repeated(dataset: Dataset, batch_size: int) -> Dataset:
    n = repeats(dataset.samples, batch_size)
    return replace(dataset, samples=n * dataset.samples, shards=n * dataset.shards)


def cores_of(config: TrainConfig) -> tuple[set[int], set[int]]:
    """Cores for torch's threads and for the loader's: separate where this process's share has one for each of them.

    If Linux wakes a thread of the loader on a core of the step's threads, all threads of the step wait for it.
    """
    available, share = os.sched_getaffinity(0), share_of_cores()
    if torch.cuda.is_available() or config.cpu_threads + config.num_threads > share:
        return available, available
    own = sorted(available)[share * int(os.environ.get("LOCAL_RANK", 0)) :]
    return set(own[: config.cpu_threads]), set(own[config.cpu_threads :][: config.num_threads])


@contextlib.contextmanager
def on_cores(cores: set[int]) -> Iterator[None]:
    """Pin this thread in the block, and threads that it starts there for good."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


# ---------------------------------------------------------------------------------------------------------- in slices


def measure_in_slices(config: TrainConfig, budget: float) -> dict[str, Any] | Failure:
    """The NUMBERS where this process trains alone on a CPU, or the worst failure of the three programs."""
    names = ("synthetic", "together", "loader")
    programs = {name: partial(load_or_train, config, name) for name in names}
    results = in_slices(programs, budget, order=(*names[:2] * 4, names[2]), fewest=FEWEST)
    timelines = {name: result for name, result in results.items() if isinstance(result, Timeline)}
    if failure := worst([result for result in results.values() if isinstance(result, Failure)]):
        return failure
    return numbers_of(timelines, config.micro_batch or config.batch_size)


def numbers_of(timelines: dict[str, Timeline], micro_batch: int) -> dict[str, Any]:
    together = timelines["together"]
    edges = round_edges([timelines[name] for name in ("synthetic", "together")], SLICED_ROUNDS)
    alone_rates, rates = timelines["synthetic"].rates(edges), together.rates(edges)
    return numbers(
        micro_batch,
        [rate / alone for rate, alone in zip(rates, alone_rates, strict=True)],
        timelines["loader"].images_per_s,
        statistics.median(alone_rates),
        statistics.median(rates),
        together.waited,
        [1e3 * step_s for step_s in together.steps_s],
        *(None, together.peak_host_mib, None, None),
    )


def load_or_train(config: TrainConfig, what: str) -> Iterator[Progress]:
    """One of the three as a program: micro-batches of the loader, or steps."""
    with prepared(config) as bench:
        plan, short = bench.training.plan, bench.short_plan()
        step = bench.step_alone if what == "synthetic" else bench.step_together
        if what == "loader":
            for _ in range(QUEUED):
                bench.load()
        else:
            # The queue is as full as steps leave it; with many micro-batches it fills while they are encoded again.
            for part in (short, short, plan if plan.count < 2 * QUEUED else short):
                step(part)
        bench.loader.take_wait_s()
        yield Progress()
        while True:
            if what == "loader":
                bench.load()
            else:
                step()
            yield Progress(plan.micro_batch if what == "loader" else config.batch_size, bench.loader.take_wait_s())


# ----------------------------------------------------------------------------------------------------------- in turns


class Round(NamedTuple):
    """One turn of each: the loader's images/s alone, milliseconds of steps, and the share of time they waited."""

    loader_rate: float
    together_ms: list[float]
    synthetic_ms: list[float]
    waited: float
    readings: list[Reading]


def measure_in_turns(config: TrainConfig, budget: float) -> dict[str, Any]:
    """The NUMBERS on every rank of the group that the environment names; run it in a new process."""
    with prepared(config) as bench:
        accelerator, plan, device = bench.accelerator, bench.training.plan, bench.accelerator.device
        cuda = device.type == "cuda"

        def largest(value: float) -> float:
            return float(accelerator.gather(torch.tensor([value], device=device)).max())

        short = bench.short_plan()
        for _ in range(2):
            bench.load()
            (warm_ms,) = turn(lambda: bench.step_alone(short), 1, cuda)
        step_ms = largest(warm_ms) * plan.count / short.count
        turn_ms = min(TURN_MS, 1e3 * budget / (3 * FEWEST))
        steps = max(1, math.ceil(turn_ms / step_ms))
        round_ms = ((plan.count < 2 * QUEUED) + 2 * steps) * step_ms + turn_ms
        count = min(MOST, max(FEWEST, int(1e3 * budget / round_ms)))
        rounds = [one_round(bench, steps, turn_ms) for _ in range(count)]

        device_mib = held_mib("cuda") if cuda else 0.0  # with DALI's, and with what torch keeps but does not use
        if cuda:
            device_mib += (torch.cuda.max_memory_allocated() - torch.cuda.memory_reserved()) / 2**20
        own_loader = torch.tensor([statistics.median(r.loader_rate for r in rounds)], device=device)
        alone_ms = [statistics.mean(r.synthetic_ms) for r in rounds]
        together_ms = [statistics.mean(r.together_ms) for r in rounds]
        readings = [reading for r in rounds for reading in r.readings]
        gpu = [statistics.mean(column) for column in zip(*readings, strict=True)] if readings else [None, None]
        return numbers(
            plan.micro_batch,
            [alone / both for alone, both in zip(alone_ms, together_ms, strict=True)],
            float(accelerator.gather(own_loader).sum()),
            1e3 * config.batch_size / statistics.median(alone_ms),
            1e3 * config.batch_size / statistics.median(together_ms),
            statistics.mean(r.waited for r in rounds),
            [ms for r in rounds for ms in r.together_ms],
            *(largest(device_mib) if cuda else None, largest(peak_host_mib()), *gpu),
        )


def one_round(bench: Bench, steps: int, turn_ms: float) -> Round:
    cuda, plan = bench.accelerator.device.type == "cuda", bench.training.plan
    turn(bench.load, QUEUED, cuda)  # what waited in its queue was not made in this turn
    loads, took = 0, 0.0
    while took < turn_ms:
        loads, took = loads + 1, took + turn(bench.load, 1, cuda)[0]
    loader_rate = 1e3 * loads * plan.micro_batch / took
    # Its queue is empty now, and after a step as full as steps leave it; with many micro-batches it fills while they
    # are encoded again.
    if plan.count < 2 * QUEUED:
        turn(bench.step_together, 1, cuda)
    else:
        wait_until_idle()
    bench.loader.take_wait_s()
    bench.accelerator.wait_for_everyone()  # or the first rank would wait for the others in its step
    with gpu_watch() as readings:
        together = turn(bench.step_together, steps, cuda)
    waited = 1e3 * bench.loader.take_wait_s() / sum(together)
    wait_until_idle()  # or the loader would fill its queue in the next turn
    bench.accelerator.wait_for_everyone()
    return Round(loader_rate, together, turn(bench.step_alone, steps, cuda), waited, readings)


def turn(work: Callable[[], None], times: int, cuda: bool) -> list[float]:
    """Milliseconds of each call, on the GPU's clock where there is one."""
    marks = Marks(cuda)
    marks()
    for _ in range(times):
        work()
        marks()
    return marks.intervals_ms()


def wait_until_idle(limit_s: float = 5.0) -> None:
    """Until the threads of this process have nothing left to do, at most so long."""
    end = time.perf_counter() + limit_s
    while time.perf_counter() < end:
        before = time.process_time()
        time.sleep(0.1)
        if time.process_time() - before < 0.01:
            return


# --------------------------------------------------------------------------------------- rows of sweep.csv, against.csv


def columns_of(preset: str, config: TrainConfig, world_size: int) -> dict[str, Any]:
    """What a row measured; only rows that agree in it can be compared."""
    return {
        **{"preset": preset, "batch_size": config.batch_size, "size": config.views.size},
        **{"encoder": f"ResNet-{config.depth} x{config.width:g}", "precision": config.precision},
        "world_size": world_size,
    }


def rounded(value: float | None) -> str:
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.4g}"


def newest_runs(rows: list[Row], *within: str) -> list[list[Row]]:
    """For every preset and number of processes the newest row of each batch size, on the device and data last used."""
    parts = []
    for part in grouped(rows, "preset", "world_size"):
        names = [name for name in ("device", "encoder", "size", "precision", "data") if name in part[-1]]
        alike = [row for row in part if all(row[name] == part[-1][name] for name in names)]
        part = by_number(newest(alike, ["batch_size"], within), "batch_size")
        parts.append(of_one_commit(part, "batch_size"))
    return parts


def trained_by(row: Row) -> str:
    """What a row trained, in words."""
    processes = f" on {row['world_size']} processes" if row["world_size"] != "1" else ""
    precision = row["precision"].replace("no", "fp32")
    return f"`{row['preset']}`: {row['encoder']} at {row['size']} px, {precision}{processes}"


def source(rows: Sequence[Row]) -> str:
    """The images of the rows and the command that measured them, without its batch sizes."""
    data = dict.fromkeys(row["data"] for row in rows if row.get("data"))
    counts = sorted({int(row["repeats"]) for row in rows if row.get("repeats")})
    spread = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1])))) if counts else ""
    listed = f", listed {spread} times, so in memory" if counts else ""
    commands = dict.fromkeys(re.sub(r" --batch-size \d+", "", row["command"]) for row in rows)
    return f"\n{' and '.join(data) or 'Images as in the command'}{listed}: `{'`, `'.join(commands)}`\n"


def plot_title(rows: Sequence[Row]) -> str:
    first = rows[0]
    return (
        f"{trained_by(first).replace('`', '')}\n{first['device']}, load {first['load']} before, torch "
        f"{first['torch']}, DALI {first['dali']}, {first['commit']}, {first['date']}"
    )
