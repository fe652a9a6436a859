"""How the benchmarks measure time, memory and a GPU's state. What is put on record is in tools/records.py.

time_interleaved({name: f}, device)         time functions in turn, so that a busy machine slows all of them
peak_extra_mib(f, device) -> float          peak memory during f(), above what was in use before
count_kernels(f) -> int                     kernels that f() launches on a GPU, by the profiler
held_mib(device) -> float                   memory in use now, of the GPU or of this process
peak_host_mib() -> float                    peak RSS of this process, plus its workers' private memory
cpu_seconds() -> float                      processor time of this process and its workers
gpu_watch() -> [Reading]                    GPU utilisation and power while the block ran, from nvidia-smi

Importing this module does not import torch: a measured program may not need it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import multiprocessing
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil


@dataclass(frozen=True)
class Timing:
    """Milliseconds of `runs` calls: the median and the 20th and 80th percentiles."""

    median: float
    p20: float
    p80: float
    runs: int

    def columns(self) -> dict[str, object]:
        ms = {"median_ms": self.median, "p20_ms": self.p20, "p80_ms": self.p80}
        return {**{name: f"{value:.4g}" for name, value in ms.items()}, "runs": self.runs}


def timing(values: Sequence[float]) -> Timing:
    """Summary of single measurements."""
    values = sorted(values)
    last = len(values) - 1
    return Timing(statistics.median(values), values[round(0.2 * last)], values[round(0.8 * last)], len(values))


class Marks:
    """Points in time, on the GPU's clock where there is one; marking does not wait."""

    def __init__(self, cuda: bool) -> None:
        self.cuda, self.points = cuda, list[Any]()

    def __call__(self) -> None:
        if self.cuda:
            import torch

            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.points.append(event)
        else:
            self.points.append(time.perf_counter())

    def intervals_ms(self) -> list[float]:
        """Milliseconds from each mark to the next; waits until the GPU has passed the last one."""
        if self.cuda:
            import torch

            torch.cuda.synchronize()
            return [a.elapsed_time(b) for a, b in itertools.pairwise(self.points)]
        return [(b - a) * 1e3 for a, b in itertools.pairwise(self.points)]


def call_ms(run: Callable[[], object], cuda: bool) -> float:
    """Milliseconds of one call; on a GPU launches count only where the host cannot keep ahead."""
    if cuda:
        import torch

        torch.cuda.synchronize()
    marks = Marks(cuda)
    marks()
    run()
    marks()
    return marks.intervals_ms()[0]


def time_interleaved(
    contestants: Mapping[str, Callable[[], object]],
    device: str,
    *,
    warmup: int = 1,
    min_runs: int = 5,
    max_runs: int = 50,
    budget_s: float = 5.0,
) -> dict[str, Timing]:
    """Time every contestant once per round, for as many rounds as fit the budget (seconds, for all together)."""
    for run in contestants.values():
        for _ in range(warmup):
            run()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    start, rounds = time.perf_counter(), 0
    while rounds < min_runs or (rounds < max_runs and time.perf_counter() - start < budget_s):
        for name, run in contestants.items():
            times[name].append(call_ms(run, device == "cuda"))
        rounds += 1
    return {name: timing(values) for name, values in times.items()}


# ------------------------------------------------------------------------------------------------------------- memory


def peak_extra_mib(run: Callable[[], object], device: str) -> float:
    """MiB that run() needs above what is in use before it. Warm up first, or its one-time buffers count as well.

    On CUDA what torch's allocator hands out; on the CPU the RSS of this process (Linux only), which includes the
    buffers of libraries.
    """
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that was not returned would hide as much of what run() takes
    Path("/proc/self/clear_refs").write_text("5")  # the peak RSS becomes the RSS of now
    resident = held_mib("cpu")
    run()
    return _peak_rss_mib() - resident


def held_mib(device: str) -> float:
    """MiB in use: of the GPU by all processes, DALI included; on "cpu" the RSS of this process."""
    if device == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info()
        return (total - free) / 2**20
    return float(psutil.Process().memory_info().rss / 2**20)


def peak_host_mib() -> float:
    """Peak RSS of this process in MiB, plus its workers' private memory now (Linux only).

    Pages that a forked worker shares with its parent take memory once.
    """
    return _peak_rss_mib() + sum(worker.memory_full_info().uss for worker in _workers()) / 2**20


def _peak_rss_mib() -> float:
    """psutil does not report it, and getrusage's is at least the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def cpu_seconds() -> float:
    """Processor time of this process, all its threads, and its workers. Other programs change it far less than time."""
    times = (worker.cpu_times() for worker in _workers())
    return time.process_time() + sum(worker.user + worker.system for worker in times)


def _workers() -> list[psutil.Process]:
    """Processes that this one started by multiprocessing, such as those of a DataLoader."""
    return [psutil.Process(worker.pid) for worker in multiprocessing.active_children()]


# --------------------------------------------------------------------------------------------------------------- GPUs


def count_kernels(run: Callable[[], object]) -> int:
    """Kernels that run() launches on the GPU, without copies and fills; warm up first."""
    import torch

    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in on_gpu(profile.events()))


def on_gpu(events: Iterable[Any]) -> list[Any]:
    """Those of a profiler's events or averages that ran on the GPU, without the ranges that programs name."""
    import torch

    cuda = torch.autograd.DeviceType.CUDA
    return [event for event in events if event.device_type == cuda and not event.is_user_annotation]


class Reading(NamedTuple):
    """What nvidia-smi says of one GPU at one moment."""

    utilisation_percent: float
    power_w: float


@contextlib.contextmanager
def gpu_watch() -> Iterator[list[Reading]]:
    """The current GPU, five times a second; filled when the block ends, and empty without nvidia-smi."""
    import torch

    readings: list[Reading] = []
    if not torch.cuda.is_available() or not shutil.which("nvidia-smi"):
        yield readings
        return
    name = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    query = "--query-gpu=utilization.gpu,power.draw"
    command = ["nvidia-smi", f"--id={name}", query, "--format=csv,noheader,nounits", "--loop-ms=200"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as watch:
        try:
            yield readings
        finally:
            watch.terminate()
            readings += parse_readings(watch.communicate()[0])


def parse_readings(text: str) -> list[Reading]:
    """The lines of nvidia-smi that are two numbers: a GPU may not report one ("[N/A]"), the last may be cut off."""
    readings = []
    for line in text.splitlines(keepends=True):
        with contextlib.suppress(ValueError):
            if line.endswith("\n"):
                readings.append(Reading(*map(float, line.split(","))))
    return readings
