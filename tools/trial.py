"""How will a run go here? Steps, memory, disk and speed, from a few seconds of its own training, for tools/doctor.py.

Checks look at one process of the run; more processes are computed from it, not started.
"""

import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tools import machine
from tools.findings import Finding, fault, ok, warning
from tools.machine import GIB, MIB

if TYPE_CHECKING:
    import torch

    from model.memory_plan import Plan
    from pipeline.loader import Loader
    from pipeline.shards import Dataset
    from train import TrainConfig, Training

STEP_S, LOADER_S, TOGETHER_S = 2.5, 2.0, 4.0  # seconds of the network alone, of the loader alone, of both
# Memory of the backward on top of what the graph holds, as a share of it. Measured on a CPU: 0.24 in fp32, 0.46 in bf16
# (ResNet-18 at 32 px, torch 2.15).
BACKWARD = 0.5
WAIT = 0.1  # share of the time that training may wait for images
LEFT_OVER = 0.1  # share of an epoch that may not fill a batch


def options(config: "TrainConfig", processes: int) -> Finding:
    """No option asks for what would be done in name only."""
    from train import check_config

    check_config(config, processes)
    return ok("every size has a meaning" + (f"; {config.track} is installed" if config.track else ""))


def steps(dataset: "Dataset", config: "TrainConfig", processes: int) -> Finding:
    """The batch divides into processes and micro-batches, and few images of an epoch are left over."""
    from pipeline.order import divide

    if rest := config.batch_size % processes:
        fitting = max(processes, config.batch_size - rest)
        text = f"batch size {config.batch_size} does not divide into {processes} processes"
        return fault(text, f"--batch-size {fitting}")
    num = divide(
        dataset.samples,
        config.batch_size,
        world_size=processes,
        micro_batch=config.micro_batch,
        address=dataset.address,
    ).steps_per_epoch
    left = dataset.samples - num * config.batch_size
    text = f"{num} an epoch of {config.batch_size} images"
    text += f", {config.batch_size // processes} for each of {processes} processes" if processes > 1 else ""
    text += f"; {left} of {dataset.samples} images are left over"
    if left > LEFT_OVER * dataset.samples:
        return warning(f"{text} each epoch", "--batch-size: one that divides the images better")
    return ok(text)


@dataclass(frozen=True)
class Trial:
    """Training steps of one process on random noise."""

    training: "Training"
    part: "Plan"  # the largest part of the process's batch that fitted into STEP_S; the whole batch if it did
    images_per_s: float
    graph_bytes: float  # that the graph of one image holds; on a GPU 0, for `training.plan` has measured it


def try_step(config: "TrainConfig") -> Trial:
    """Time a few training steps. `config` is that of one process: its images, its threads."""
    import torch

    from train import build_accelerator, build_training

    accelerator = build_accelerator(config)
    training = build_training(config, accelerator)
    device = accelerator.device

    def noise(images: int) -> "torch.Tensor":
        shape = (2 * images, 3, config.views.size, config.views.size)
        views = torch.randn(shape, dtype=torch.half if training.half else torch.float, device=device)
        return views.contiguous(memory_format=torch.channels_last)

    def seconds(part: "Plan") -> float:
        views = noise(part.micro_batch)
        wait_for(device)
        start = time.perf_counter()
        training.step(itertools.repeat(views, part.count), 0.0, part)  # at learning rate 0 the weights stay
        wait_for(device)
        return time.perf_counter() - start

    image_bytes = 0
    if device.type == "cpu":
        image_bytes = graph_bytes(training.model, noise(2)) - graph_bytes(training.model, noise(1))
    start = time.perf_counter()
    for part in parts_of(training.plan):
        next_bytes = 2 * part.micro_batch * (1 + BACKWARD) * image_bytes
        crowded = next_bytes > machine.available_memory() / 4
        took = min(seconds(part), seconds(part))  # in the first run of a size the libraries prepare themselves
        if crowded or time.perf_counter() - start > STEP_S:
            break
    return Trial(training, part, part.micro_batch * part.count / took, image_bytes)


def graph_bytes(model: "torch.nn.Module", views: "torch.Tensor") -> int:
    """Bytes that the forward of these views keeps for the backward."""
    from torch.autograd.graph import saved_tensors_hooks

    kept: dict[int, int] = {}

    def pack(tensor: "torch.Tensor") -> "torch.Tensor":
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        z = model(views)  # holds the graph, so that no place in memory is used twice
    del z
    return sum(kept.values())


def parts_of(plan: "Plan") -> Iterator["Plan"]:
    """Parts of a batch that double in size up to the whole: parts of one micro-batch, then several micro-batches."""
    for images in (8 << i for i in itertools.count()):
        micro_batch = min(images, plan.micro_batch)
        count = min(images // micro_batch, plan.count)
        keep = max(1, plan.keep * count // plan.count)
        yield replace(plan, micro_batch=micro_batch, count=count, keep=keep, offload=plan.offload and count > 1)
        if (micro_batch, count) == (plan.micro_batch, plan.count):
            return


def wait_for(device: "torch.device") -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def memory(trial: Trial, processes: int, device: "torch.device") -> Finding:
    """The batch fits in memory: on a GPU by train.py's own plan, on a CPU scaled up from the graph of one image."""
    from model.memory_plan import divisors

    plan = trial.training.plan
    images = plan.micro_batch * plan.count
    if device.type == "cuda":
        text = f"{images} images per process" + (f" in {plan.count} micro-batches" if plan.count > 1 else " at once")
        text += f", {plan.count - plan.keep} of them encoded twice" if plan.count > plan.keep else ""
        text += ", views waiting on the host" if plan.offload else ""
        return ok(text)
    needs = trial.graph_bytes * plan.micro_batch * (plan.keep + BACKWARD)
    room = machine.available_memory() / processes
    text = f"{plan.micro_batch} images at once take about {needs / GIB:.1f} GiB, {room / GIB:.1f} GiB are free"
    text += " for each process" if processes > 1 else ""
    if needs < 0.8 * room:
        return ok(text)
    fitting = next((n for n in divisors(images) if trial.graph_bytes * n * (1 + BACKWARD) < room / 2), None)
    change = f"--micro-batch {fitting}" if fitting else "a smaller encoder or smaller views"
    return Finding("fault" if needs > room else "warning", text, change)


def checkpoints(trial: Trial, config: "TrainConfig", out: Path) -> Finding:
    """The run folder can be written, and its disk has room for the kept checkpoints and the one being written."""
    from torch import Tensor

    state = [value for values in trial.training.optimizer.state.values() for value in values.values()]
    tensors = [*trial.training.network.state_dict().values(), *(value for value in state if isinstance(value, Tensor))]
    size = sum(tensor.nbytes for tensor in tensors)
    needs = (config.keep + 1) * size
    folder = next(parent for parent in (out.absolute(), *out.absolute().parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    text = f"{config.keep} kept and one being written take {needs / MIB:,.0f} MiB"
    text += f", {free / MIB:,.0f} MiB are free at {folder}"
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return fault(f"{folder} is no folder that may be written", "--out in another place")
    if free < needs:
        return fault(text, "make room, or --out on another disk, or --keep 1")
    return ok(text) if free > 3 * needs else warning(text, "make room, or --out on another disk")


@dataclass(frozen=True)
class Pace:
    """Speed of one process: images per second, and the share of the time that training waits for the loader."""

    loader_alone: float
    together: float
    wait: float


def measure(trial: Trial, dataset: "Dataset", config: "TrainConfig", processes: int, device: "torch.device") -> Pace:
    """Time the loader alone, then with training, as one of `processes`. config.num_threads is that of one process."""
    from train import build_loader

    part, training = trial.part, trial.training
    n = part.micro_batch * part.count
    changed = replace(config, batch_size=n * processes, micro_batch=part.micro_batch)
    loader = build_loader(changed, dataset, device, world_size=processes, half=training.half)
    for _ in range(4):  # use up the batches that were prepared before the clock starts
        next(loader)
    alone, _ = rate(lambda: next(loader), part.micro_batch, LOADER_S, loader, device)
    together, wait = rate(
        lambda: training.step((next(loader).views for _ in range(part.count)), 0.0, part), n, TOGETHER_S, loader, device
    )
    return Pace(alone, together, wait)


def speed(pace: Pace, trial: Trial, dataset: "Dataset", config: "TrainConfig", processes: int) -> Finding:
    """How long an epoch and the run will take, and whether the loader keeps up with the network."""
    from pipeline.order import divide

    steps_per_epoch = divide(dataset.samples, config.batch_size, world_size=processes).steps_per_epoch
    total = config.steps or config.epochs * steps_per_epoch
    step_s = config.batch_size / (processes * pace.together)
    together, loader, network = (
        digits(processes * images_per_s) for images_per_s in (pace.together, pace.loader_alone, trial.images_per_s)
    )
    tried, local_batch = (plan.micro_batch * plan.count for plan in (trial.part, trial.training.plan))
    text = "at most" if tried < local_batch else "about"
    text += (
        f" {span(steps_per_epoch * step_s)} an epoch, {span(total * step_s)} for all {total} steps: "
        f"{together} images/s, {loader} the loader alone, {network} the network alone; "
        f"waits for images {pace.wait:.0%} of the time"
    )
    if tried < local_batch:
        text += f"; measured on steps of {tried} images instead of {local_batch}, whose fixed costs weigh more"
    if processes > 1:
        text += f"; {processes} processes reckoned from one, without their exchange"
    if pace.wait <= WAIT:
        return ok(text)
    easier = "--store ppm" if config.views.size <= 96 else "--resize 256"
    return warning(text, f"more cores, or shards that decode faster: make_shards.py ... {easier}")


def rate(
    run: Callable[[], object], images: int, seconds: float, loader: "Loader", device: "torch.device"
) -> tuple[float, float]:
    """Repeat run() for `seconds`, at least once: (images per second, share of the time waiting for the loader)."""
    wait_for(device)
    loader.take_wait_s()
    start, runs = time.perf_counter(), 0
    while not runs or time.perf_counter() - start < seconds:
        run()
        runs += 1
    wait_for(device)
    took = time.perf_counter() - start
    return images * runs / took, loader.take_wait_s() / took


def digits(number: float) -> str:
    return f"{number:,.{0 if number >= 10 else 2}f}"


def span(seconds: float) -> str:
    """100 as "100 s", 600 as "10 min"."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
