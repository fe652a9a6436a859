"""Will a long run go well here? Looks at the machine, the data and the run before it starts, in about 20 seconds.

    python tools/doctor.py                                                      the machine alone
    python tools/doctor.py data/train --eval-data data/test                     and the data
    python tools/doctor.py data/train --recipe imagenet --processes 8 --out runs/first --batch-size 8192

A recipe of train.py adds the run: equal steps, memory, disk, and how long an epoch takes. Every option of train.py may
follow. Each check says ok, warning or fault, what it found, and what to change. Exit code 1 where there is a fault.

Checks are functions from what they look at to a `Finding`; where the code that would run refuses, its words are the
fault. Nothing is written but temporary files, and processes beyond this one are reckoned, not started.
"""

import functools
import io
import itertools
import json
import os
import random
import re
import shutil
import sys
import tempfile
import textwrap
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, ParamSpec, TypeVar

import typer

if TYPE_CHECKING:
    import torch

    from model.memory_plan import Plan
    from pipeline.loader import Loader
    from pipeline.shards import Dataset, Shard
    from train import TrainConfig, Training

# torch's threads and DALI's share the cores; threads that spin while they wait would take them from the others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

ROOT = Path(__file__).resolve().parents[1]
DRIVER = Path("/proc/driver/nvidia/gpus")  # an entry for each GPU that NVIDIA's driver sees
SHARED_MEMORY = 2**30  # bytes of /dev/shm that NVIDIA asks for in containers
SAMPLE, SAMPLE_BYTES = 10_000, 2**29  # samples and bytes of the shards that are read from end to end
STEP_S, LOADER_S, TOGETHER_S = 2.5, 2.0, 4.0  # seconds of the network alone, of the loader alone, of both
# Going backward takes so much of what the graph holds on top of it: on a CPU 0.24 in fp32 and 0.46 in bf16 were
# resident for ResNet-18 at 32 px, torch 2.15.
BACKWARD = 0.5
WAIT = 0.1  # share of the time that training may wait for images
LEFT_OVER = 0.1  # share of an epoch that may not fill a batch
MIB, GIB = 2**20, 2**30

Params = ParamSpec("Params")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Finding:
    """What a check came to: what is so, and where that is not well, what to change."""

    state: Literal["ok", "warning", "fault"]
    found: str
    change: str = ""


def ok(found: str) -> Finding:
    return Finding("ok", found)


def warning(found: str, change: str) -> Finding:
    return Finding("warning", found, change)


def fault(found: str, change: str = "") -> Finding:
    """Without a change to make only where `found` says it."""
    return Finding("fault", found, change)


def told(look: Callable[Params, Result], *args: Params.args, **options: Params.kwargs) -> Result | Finding:
    """What `look` returns; what it raises is a fault in the words of whoever refused."""
    try:
        return look(*args, **options)
    except (ValueError, OSError, RuntimeError, ImportError, AttributeError) as error:
        words = " ".join(str(error).split())
        ours = type(error).__module__ != "builtins" or type(error) is ValueError  # says by itself what is wrong
        return fault(words if ours else f"{type(error).__name__}: {words}")


# ---- the machine ---------------------------------------------------------------------------------------------------


def installed() -> dict[str, str]:
    """Versions of all installed packages, by normalised name."""
    found: dict[str, str] = {}
    for package in metadata.distributions():
        found.setdefault(re.sub(r"[-_.]+", "-", package.name).lower(), package.version)
    return found


def dali_packages(versions: Mapping[str, str]) -> dict[str, int]:
    """Installed packages that own the files of DALI, and the CUDA major that each is built for."""
    found = {name: re.fullmatch(r"nvidia-dali-(?:\w+-)?cuda(\d+)0", name) for name in versions}
    return {name: int(match[1]) for name, match in found.items() if match}


def packages(versions: Mapping[str, str]) -> Finding:
    """Everything this project and torchvision ask for is there and recent enough, and torchvision fits torch."""
    from packaging.requirements import Requirement

    project = ROOT / "pyproject.toml"
    if project.exists():
        declared = tomllib.loads(project.read_text())["project"]["dependencies"]
    else:
        declared = metadata.requires("swiftclr") or []
    if "torchvision" in versions:
        declared = [*declared, *(metadata.requires("torchvision") or [])]
    shown, wrong, change = [], [], []
    for need in map(Requirement, declared):
        if need.marker and not need.marker.evaluate({"extra": ""}):
            continue
        dali = need.name.startswith("nvidia-dali-")  # any of its builds will do here
        name = next(iter(dali_packages(versions)), need.name) if dali else need.name
        if name in versions and need.specifier.contains(versions[name], prereleases=True):
            shown.append(f"{name} {versions[name]}")
        else:
            wrong.append(f"{name} {versions.get(name, 'is missing')}, expected {need.specifier or 'any'}")
            change.append(f"'{name}{need.specifier}'")
    if wrong:
        return fault("; ".join(dict.fromkeys(wrong)), f"pip install -U {' '.join(dict.fromkeys(change))}")
    try:
        import torch
        import torchvision

        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)  # its compiled part, which fits one torch only
    except (RuntimeError, ImportError) as error:
        pair = f"torchvision {versions['torchvision']} does not fit torch {versions['torch']}"
        return fault(f"{pair}: {error}", "install both together: pip install -U torch torchvision")
    return ok(", ".join(dict.fromkeys(shown)))


def cuda(versions: Mapping[str, str], torch_cuda: str | None) -> Finding:
    """One DALI, built for the CUDA that torch is built for. torch_cuda is torch.version.cuda, None without CUDA."""
    dali = dali_packages(versions)
    if len(dali) > 1:
        names = " and ".join(sorted(dali))
        return fault(
            f"{names} are both installed, and own the same files",
            f"pip uninstall -y {' '.join(sorted(dali))}, then install the one for your CUDA",
        )
    ((name, major),) = dali.items()
    if torch_cuda is None:
        return ok(f"torch is built without CUDA, {name} beside it")
    if int(torch_cuda.split(".")[0]) != major:
        return fault(
            f"torch is built for CUDA {torch_cuda}, {name} for CUDA {major}",
            f"pip uninstall -y {name} && pip install nvidia-dali-cuda{torch_cuda.split('.')[0]}0",
        )
    return ok(f"torch is built for CUDA {torch_cuda}, {name} for CUDA {major}")


def devices(processes: int) -> Finding:
    """A GPU for each process, free, and the library through which processes talk; or CPUs on purpose."""
    import torch
    import torch.distributed as dist

    backend = "NCCL" if torch.cuda.is_available() else "Gloo"
    there = dist.is_available() and (dist.is_nccl_available() if backend == "NCCL" else dist.is_gloo_available())
    if processes > 1 and not there:
        return fault(f"this torch has no {backend}, which {processes} processes talk through", "reinstall torch")
    if not torch.cuda.is_available():
        if DRIVER.is_dir() and any(DRIVER.iterdir()):
            return fault(
                f"this machine has a GPU, but torch {torch.__version__} cannot use it and would train on the CPU",
                "nvidia-smi shows the driver's CUDA: update it, or install a torch built for it (README, CUDA 12)",
            )
        return ok(f"no GPU: {processes} process{'es' * (processes > 1)} on the CPU")
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    memory = [torch.cuda.mem_get_info(i) for i in range(len(gpus))]
    text = ", ".join(
        f"{gpu.name} ({free / GIB:.0f} of {total / GIB:.0f} GiB free)"
        for gpu, (free, total) in zip(gpus, memory, strict=True)
    )
    if processes > len(gpus):
        return fault(f"{processes} processes, but torch sees {len(gpus)} GPUs: {text}", f"--processes {len(gpus)}")
    if any(free < 0.9 * total for free, total in memory):
        return warning(text, "see in nvidia-smi which programs hold the rest")
    if len({gpu.name for gpu in gpus}) > 1:
        return warning(f"{text}: the slowest sets the pace", "choose equal ones by CUDA_VISIBLE_DEVICES")
    return ok(text + (f"; {backend} for {processes} processes" if processes > 1 else ""))


def shared_memory(processes: int, gpus: int) -> Finding:
    """Room in /dev/shm, through which NCCL passes what GPUs cannot send each other directly."""
    size = shutil.disk_usage("/dev/shm").total
    text = f"/dev/shm has {size / MIB:,.0f} MiB"
    if size >= SHARED_MEMORY:
        return ok(text)
    change = "start the container with --shm-size=1g or --ipc=host"
    if gpus and processes > 1:
        return fault(f"{text}, too little for NCCL between {processes} processes", change)
    return warning(f"{text}: enough for this, too little for several GPUs", change)


def cores(processes: int) -> Finding:
    """Cores for torch's and DALI's threads, and nothing in the environment that takes them away again."""
    from pipeline.workers import share_of_cores

    num = share_of_cores()
    share = max(1, num // processes)
    wrong, change = [], []
    if (quota := cpu_quota()) is not None and quota < 0.9 * num:
        threads = max(1, int(quota / processes))
        wrong.append(f"this container may use {quota:g} of the {num} cores that torch and DALI would start threads for")
        change.append(f"--num-threads {threads} --cpu-threads {threads}")
    if processes > num:
        wrong.append(f"{processes} processes share {num} cores")
        change.append("start fewer processes, or give the machine more cores")
    if os.environ.get("OMP_WAIT_POLICY", "").upper() == "ACTIVE":
        wrong.append("OMP_WAIT_POLICY=ACTIVE: torch's threads spin on the cores that DALI needs")
        change.append("unset OMP_WAIT_POLICY")
    pins = [name for name in ("OMP_PROC_BIND", "GOMP_CPU_AFFINITY") if os.environ.get(name, "false").lower() != "false"]
    if pins:
        wrong.append(f"{' and '.join(f'{name}={os.environ[name]}' for name in pins)} ties all threads to a few cores")
        change.append(f"unset {' '.join(pins)}")
    if (load := os.getloadavg()[0]) > 0.5 * num:
        wrong.append(f"the load is {load:.1f} on {num} cores: other programs run, and what is measured now is too slow")
        change.append("look again when they are done")
    if wrong:
        return warning("; ".join(wrong), "; ".join(change))
    return ok(f"{num} cores, {share} for each process" if processes > 1 else f"{num} cores")


def cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Cores' worth of time that the container may use, by control groups 2 or 1; None: no limit."""
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        if all((root / file).exists() for file in files):
            quota, period = " ".join((root / file).read_text() for file in files).split()
            return None if quota in ("max", "-1") else int(quota) / int(period)
    return None


def decoder(device: "torch.device") -> Finding:
    """A JPEG goes through shards, DALI's reader, decoder and normalisation, and comes out as Pillow decodes it."""
    import numpy as np
    from PIL import Image

    from pipeline.loader import build_eval_loader
    from pipeline.shards import Sample
    from pipeline.views import ViewConfig
    from pipeline.write import write_shards

    size = 64
    y, x = np.mgrid[:size, :size] / size
    drawn = 127.5 + 100 * np.stack([np.sin(6 * x), np.cos(5 * y), np.sin(4 * (x + y))], -1)
    file = io.BytesIO()
    Image.fromarray(drawn.astype(np.uint8)).save(file, "JPEG", quality=90)
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_shards([Sample("drawn", data=file.getvalue())], Path(folder) / "set", classes=None)
        views = ViewConfig(size=size, mean=(0.0,) * 3, std=(1.0,) * 3, eval_crop=1.0)
        images, _ = next(build_eval_loader(dataset, views, 1, device, num_threads=1))
    with Image.open(file) as image:
        expected = np.asarray(image, np.float32)
    difference = np.abs(255 * images[0].float().cpu().numpy().transpose(1, 2, 0) - expected).mean()
    where = "the GPU" if device.type == "cuda" else "the CPU"
    text = f"DALI on {where} decodes a JPEG {difference:.2f} levels of 255 from Pillow's"
    if difference > 2:
        return fault(text, "reinstall DALI, pip install --force-reinstall nvidia-dali-cuda..., and pillow")
    return ok(text)


# ---- the data ------------------------------------------------------------------------------------------------------


def shards(dataset: "Dataset") -> Finding:
    """All tars may be read, and some, chosen at random, hold the bytes that were written; `read_dataset` has run."""
    from pipeline.audit import verify
    from pipeline.shards import manifest
    from pipeline.store import is_remote
    from tools.files import write_new

    mib = sum(shard.bytes for shard in dataset.shards) / MIB
    text = f"{dataset.samples} samples in {len(dataset.shards)} shards, {mib:,.0f} MiB"
    if is_remote(dataset.address):
        return ok(f"{text}; in object storage only the indexes are checked")
    if closed := [shard.file for shard in dataset.shards if not os.access(dataset.tar(shard), os.R_OK)]:
        return fault(f"{len(closed)} tars may not be read, {closed[0]} first", f"chmod -R a+r {dataset.tars_address}")
    part: list[Shard] = []
    samples = size = 0
    for shard in random.sample(dataset.shards, len(dataset.shards)):
        samples, size = samples + shard.samples, size + shard.bytes
        if part and (samples > SAMPLE or size > SAMPLE_BYTES):
            break
        part.append(shard)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for shard in part:
            for link, file in ((shard.file, dataset.tar(shard)), (shard.index, dataset.index(shard))):
                (folder / link).parent.mkdir(parents=True, exist_ok=True)
                (folder / link).symlink_to(Path(file).resolve())
        samples = sum(shard.samples for shard in part)
        smaller = replace(dataset, shards=tuple(part), samples=samples, tars_at=dataset.tars_at and str(folder))
        write_new(folder / "dataset.json", manifest(smaller))
        faults = verify(folder)
    if faults:
        place = f"{faults[0].shard} {faults[0].key or ''}".rstrip()
        more = f"; {len(faults) - 1} more faults" if len(faults) > 1 else ""
        change = f"python tools/make_shards.py verify {dataset.root} --images lists all; copy those shards again"
        return fault(f"{place}: {faults[0].problem}{more}", change)
    return ok(f"{text}; {len(part)} of them read from end to end: as they were written")


def labels(dataset: "Dataset", queries: "Dataset | None") -> Finding:
    """Evaluation needs labels, the same classes on both sides, and other images than those trained on."""
    from pipeline.labels import check_alike

    if queries:
        if finding := told(check_alike, dataset, queries):
            return finding
        if dataset.fingerprint == queries.fingerprint:
            return warning("trained and evaluated on the same images", "give --eval-data shards of other images")
    elif dataset.classes is None:
        return ok("no labels; training needs none")
    assert dataset.classes is not None
    counts = dataset.counts.get("per_class") or ()
    if empty := [name for name, count in zip(dataset.classes, counts, strict=False) if not count]:
        return warning(f"no image of {len(empty)} classes, {empty[0]!r} first", "look into actions.jsonl")
    return ok(f"{len(dataset.classes)} classes" + (", the same in both" if queries else ""))


def first_batch(dataset: "Dataset", config: "TrainConfig", processes: int, device: "torch.device") -> Finding:
    """The loader reads shards and gives views."""
    from train import build_loader

    n = max(1, min(32, dataset.samples // processes))
    start = time.monotonic()
    loader = build_loader(
        replace(config, batch_size=n * processes, micro_batch=0), dataset, device, world_size=processes
    )
    next(loader)
    return ok(f"two views of {n} images in {time.monotonic() - start:.1f} s, start included")


def disk(dataset: "Dataset", images_per_s: float) -> Finding:
    """The shards can be read as fast as training takes them, or fit in memory once they have been read.

    images_per_s is the rate of training, 0 where it is not known.
    """
    total = sum(shard.bytes for shard in dataset.shards)
    cold, warm = (read_rate(dataset, forget=forget) for forget in (True, False))
    text = f"{cold / MIB:,.0f} MiB/s from the disk, {warm / MIB:,.0f} MiB/s from the page cache"
    needed = images_per_s * total / dataset.samples
    if needed:
        text += f"; training reads {digits(needed / MIB)} MiB/s"
    if needed <= cold:
        return ok(text)
    if total < available_memory() / 2:
        return ok(f"{text}: the first epoch is slower, then all {total / MIB:,.0f} MiB are in the page cache")
    return warning(text, "copy the shards to a faster, local disk, or make smaller images with --resize")


def read_rate(dataset: "Dataset", *, forget: bool) -> float:
    """Bytes per second of reading tars for half a second; `forget` asks the page cache to drop each tar first."""
    from tools.files import open_binary

    num, seconds, start = 0, 0.0, time.monotonic()
    for shard in dataset.shards:
        with open_binary(dataset.tar(shard)) as tar:
            if forget:
                os.posix_fadvise(tar.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while seconds < 0.5 and (chunk := tar.read(8 * MIB)):
                num, seconds = num + len(chunk), time.monotonic() - start
        if seconds >= 0.5:
            break
    return num / seconds


def available_memory() -> int:
    """Bytes of host memory that programs may still take; a container's limit counts as if nothing were in use."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    limit = Path("/sys/fs/cgroup/memory.max")
    told_limit = limit.read_text().strip() if limit.exists() else "max"
    return free if told_limit == "max" else min(free, int(told_limit))


# ---- the run -------------------------------------------------------------------------------------------------------


def options(config: "TrainConfig", processes: int) -> Finding:
    """Nothing is asked for that would be done in name only."""
    from train import check_config

    check_config(config, processes)
    return ok("every size has a meaning" + (f"; {config.track} is installed" if config.track else ""))


def steps(dataset: "Dataset", config: "TrainConfig", processes: int) -> Finding:
    """The batch divides into processes and micro-batches, the data fill it, and few images are left over."""
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
    """Steps that one process made on noise."""

    training: "Training"
    part: "Plan"  # the most of the process's batch that a step took; all where STEP_S sufficed
    images_per_s: float
    held: float  # bytes that the graph of one image holds; on a GPU 0, where `training.plan` knows


def try_step(config: "TrainConfig") -> Trial:
    """Train for a moment. `config` is that of one process: its images, its threads."""
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

    held = graph_bytes(training.model, noise(2)) - graph_bytes(training.model, noise(1)) if device.type == "cpu" else 0
    start = time.perf_counter()
    for part in parts_of(training.plan):
        crowded = 2 * part.micro_batch * (1 + BACKWARD) * held > available_memory() / 4  # the next part would be
        took = min(seconds(part), seconds(part))  # in the first run of a size the libraries prepare themselves
        if crowded or time.perf_counter() - start > STEP_S:
            break
    return Trial(training, part, part.micro_batch * part.count / took, held)


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
    """Ever larger parts of a batch, up to the whole: first of one micro-batch, then micro-batches."""
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
    """The batch fits: on a GPU as train.py would plan it there, on a CPU by what a part of it took."""
    from model.memory_plan import divisors

    plan = trial.training.plan
    images = plan.micro_batch * plan.count
    if device.type == "cuda":
        text = f"{images} images per process" + (f" in {plan.count} micro-batches" if plan.count > 1 else " at once")
        text += f", {plan.count - plan.keep} of them encoded twice" if plan.count > plan.keep else ""
        text += ", views waiting on the host" if plan.offload else ""
        return ok(text)
    needs = trial.held * plan.micro_batch * (plan.keep + BACKWARD)
    room = available_memory() / processes
    text = f"{plan.micro_batch} images at once take about {needs / GIB:.1f} GiB, {room / GIB:.1f} GiB are free"
    text += " for each process" if processes > 1 else ""
    if needs < 0.8 * room:
        return ok(text)
    fitting = next((n for n in divisors(images) if trial.held * n * (1 + BACKWARD) < room / 2), None)
    change = f"--micro-batch {fitting}" if fitting else "a smaller encoder or smaller views"
    return Finding("fault" if needs > room else "warning", text, change)


def checkpoints(trial: Trial, config: "TrainConfig", out: Path) -> Finding:
    """Room on the disk for the checkpoints that are kept and the one being written, in a folder that may be written."""
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
    """Of one process with the loader: images per second, and the share of the time that training waits."""

    loader_alone: float
    together: float
    wait: float


def measure(trial: Trial, dataset: "Dataset", config: "TrainConfig", processes: int, device: "torch.device") -> Pace:
    """Load as one of `processes` does, and then train on it. `config` is the run's, its num_threads a process's."""
    from train import build_loader

    part, training = trial.part, trial.training
    n = part.micro_batch * part.count
    changed = replace(config, batch_size=n * processes, micro_batch=part.micro_batch)
    loader = build_loader(changed, dataset, device, world_size=processes, half=training.half)
    for _ in range(4):  # until nothing is left that was made while nobody asked
        next(loader)
    alone, _ = rate(lambda: next(loader), part.micro_batch, LOADER_S, loader, device)
    together, wait = rate(
        lambda: training.step((next(loader).views for _ in range(part.count)), 0.0, part), n, TOGETHER_S, loader, device
    )
    return Pace(alone, together, wait)


def speed(pace: Pace, trial: Trial, dataset: "Dataset", config: "TrainConfig", processes: int) -> Finding:
    """How long an epoch and the run will take, and whether the loader keeps up with the network."""
    num = dataset.samples // processes // (config.batch_size // processes)
    total = config.steps or config.epochs * num
    step_s = config.batch_size / (processes * pace.together)
    together, loader, network = (
        digits(processes * each) for each in (pace.together, pace.loader_alone, trial.images_per_s)
    )
    part, whole = (plan.micro_batch * plan.count for plan in (trial.part, trial.training.plan))
    text = "at most" if part < whole else "about"
    text += (
        f" {span(num * step_s)} an epoch, {span(total * step_s)} for all {total} steps: {together} images/s, "
        f"{loader} the loader alone, {network} the network alone; waits for images {pace.wait:.0%} of the time"
    )
    if part < whole:
        text += f"; measured on steps of {part} images instead of {whole}, whose fixed costs weigh more"
    if processes > 1:
        text += f"; {processes} processes reckoned from one, without their exchange"
    if pace.wait <= WAIT:
        return ok(text)
    easier = "--store ppm" if config.views.size <= 96 else "--resize 256"
    return warning(text, f"more cores, or shards that decode faster: make_shards.py ... {easier}")


def rate(
    run: Callable[[], object], images: int, seconds: float, loader: "Loader", device: "torch.device"
) -> tuple[float, float]:
    """(images per second, share of the time that waited for the loader) of run(), over `seconds` and at least once."""
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


# ---- all of it -----------------------------------------------------------------------------------------------------


def examine(
    data: str, eval_data: str, config: "TrainConfig | None", processes: int | None, out: Path
) -> Iterator[tuple[str, Finding]]:
    """Name and finding of each check, as soon as it is known; those that need what is at fault are left out.

    data, eval_data  folders of shards, or ""
    config           of the run to come, None to look at machine and data alone
    processes        on this machine; None: one for each GPU, or one
    """
    versions = installed()
    there = told(packages, versions)
    yield "packages", there
    if there.state == "fault":  # the rest would only tell of it in other words
        return
    import torch

    from pipeline.shards import read_dataset
    from pipeline.store import is_remote
    from pipeline.workers import share_of_cores
    from train import TrainConfig

    fits = told(cuda, versions, torch.version.cuda)
    yield "CUDA", fits
    if fits.state == "fault":
        return
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device("cuda", 0) if gpus else torch.device("cpu")
    processes = processes or max(1, gpus)
    yield "devices", told(devices, processes)
    yield "shared memory", told(shared_memory, processes, gpus)
    yield "cores", told(cores, processes)
    yield "decoder", told(decoder, device)

    training, queries = (told(read_dataset, path) if path else None for path in (data, eval_data))
    for name, each in (("shards", training), ("evaluation shards", queries)):
        if each:
            yield name, each if isinstance(each, Finding) else told(shards, each)
    dataset = None if isinstance(training, Finding) else training
    starts = False
    if dataset:
        yield "labels", told(labels, dataset, None if isinstance(queries, Finding) else queries)
        start = {"first batch": told(first_batch, dataset, config or TrainConfig(), processes, device)}
        if config:
            start["steps"] = told(steps, dataset, config, processes)
        yield from start.items()
        starts = all(finding.state != "fault" for finding in start.values())

    images_per_s = 0.0
    if config:
        yield "options", told(options, config, processes)
        share = max(1, share_of_cores() // processes)
        if not gpus:
            torch.set_num_threads(config.cpu_threads or share)
        config = replace(config, num_threads=config.num_threads or share, compile="off", track="")
        one = replace(config, batch_size=max(1, config.batch_size // processes))
        trial = told(try_step, one)
        if isinstance(trial, Finding):
            yield "step", trial
        else:
            yield "memory", told(memory, trial, processes, device)
            yield "checkpoints", told(checkpoints, trial, config, out)
            if dataset and starts:
                pace = told(measure, trial, dataset, config, processes, device)
                if isinstance(pace, Finding):
                    yield "speed", pace
                else:
                    images_per_s = processes * pace.together
                    yield "speed", speed(pace, trial, dataset, config, processes)
    if dataset and not is_remote(dataset.address):
        yield "disk", told(disk, dataset, images_per_s)


def _lines(name: str, finding: Finding) -> str:
    start = f"{finding.state:<8} {name:<18} "
    fill = functools.partial(
        textwrap.fill,
        width=max(80, shutil.get_terminal_size((120, 24)).columns),
        subsequent_indent=" " * len(start),
        break_on_hyphens=False,
    )
    lines = [fill(finding.found, initial_indent=start)]
    if finding.change:
        lines.append(fill(finding.change, initial_indent=" " * (len(start) - 3) + "-> "))
    return "\n".join(lines)


app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def doctor(
    ctx: typer.Context,
    data: Annotated[str, typer.Argument(metavar="[SHARDS]", help="Folder of shards to train on.")] = "",
    eval_data: Annotated[str, typer.Option(help="Folder of labelled shards to evaluate on.")] = "",
    recipe: Annotated[
        str, typer.Option(help="Look at a run of this recipe; then every option of train.py may follow.")
    ] = "",
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes on this machine. (default: one for each GPU, or one)")
    ] = None,
    out: Annotated[Path, typer.Option(help="Run folder to be.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check the machine, the data and a run before it starts. Exit code 1 where there is a fault."""
    from tools.errors import one_message
    from tools.runs import config_of

    with one_message("doctor"):
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("start it without a launcher: one process looks for all, and --processes says how many")
        options = list(ctx.args)
        if data.startswith("-"):  # the first of the options, with no shards before it
            data, options = "", [data, *options]
        if options and not recipe:
            raise ValueError(f"{' '.join(options)}: options of train.py need --recipe")
        words = [recipe, *(["--data", data] if data else []), *(["--eval-data", eval_data] if eval_data else [])]
        config = config_of([*words, *options]) if recipe else None
        if config:
            data, eval_data = config.data, config.eval_data
        findings: dict[str, Finding] = {}
        for name, finding in examine(data, eval_data, config, processes, out):
            findings[name] = finding
            if not as_json:
                typer.echo(_lines(name, finding))
    states = [finding.state for finding in findings.values()]
    faults, warnings = states.count("fault"), states.count("warning")
    if as_json:
        rows = [{"check": name, **asdict(finding)} for name, finding in findings.items()]
        typer.echo(json.dumps({"faults": faults, "warnings": warnings, "findings": rows}, indent=1))
    else:
        typer.echo(f"{faults} fault{'s' * (faults != 1)}, {warnings} warning{'s' * (warnings != 1)}")
    if faults:
        raise typer.Exit(1)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # the repository instead of tools/, as with python -m
    app()
