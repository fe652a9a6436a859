"""How the benchmarks measure, and how they write it down.

environment(device) -> dict                 where and how: GPU, processor, driver, versions, command, commit, date
time_interleaved({name: f}, device)         all contestants in turn, so that a busy machine slows all alike
peak_extra_mib(f, device) -> float          most memory in use during f() above what was in use before
count_kernels(f) -> int                     kernels that f() launches on a GPU, by the profiler
held_mib(device) -> float                   memory in use now: of the GPU, or on "cpu" of this process
peak_host_mib() -> float                    most that this process has been resident with, and what its workers add
gpu_watch() -> [Reading]                    utilisation and power while its block ran, as the driver tells
cpu_seconds() -> float                      processor time of this process and of its workers, so far
stolen_s() -> float                         processor time that a virtual machine did not get, so far
kept_awake()                                no processor sleeps while its block runs
append(record, rows), read(record) -> rows  rows are added to a CSV, never edited
failure(error) -> status                    in one line, "out of memory" for all that say so
die_first()                                 where memory ends, this process and not its parent
die_with_parent()                           no process of a benchmark that was killed goes on using the machine
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import datetime
import gc
import io
import itertools
import multiprocessing
import os
import platform
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tools import files

RECORDS = Path(__file__).parent / "records"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "bad_alloc", "do not fit")


@dataclass(frozen=True)
class Timing:
    """Milliseconds of `runs` calls: the median and the 20th and 80th percentiles."""

    median: float
    p20: float
    p80: float
    runs: int


def environment(device: str = "") -> dict[str, str]:
    """What a timing depends on and a reader cannot know. Columns every record shares.

    `device` is what was measured on, "cuda" or "cpu"; by default the GPU where there is one, as train.py trains.
    """
    gpu = driver = ""
    program = Path(sys.argv[0]).resolve()
    if (device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cuda":
        gpu = torch.cuda.get_device_name()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
    return {
        "device": gpu or _processor(),
        "driver": driver,
        "threads": str(torch.get_num_threads()),
        "load": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "dali": _version("nvidia-dali-cuda130") or _version("nvidia-dali-cuda120"),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "command": shlex.join([f"{program.parent.name}.{program.stem}", *sys.argv[1:]]),
    }


def time_interleaved(
    contestants: Mapping[str, Callable[[], object]],
    device: str,
    *,
    warmup: int = 1,
    min_runs: int = 5,
    max_runs: int = 50,
    budget_s: float = 5.0,
) -> dict[str, Timing]:
    """Times every contestant once per round, for as many rounds as fit the budget (in seconds, for all together)."""
    for run in contestants.values():
        for _ in range(warmup):
            run()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    start, rounds = time.perf_counter(), 0
    while rounds < min_runs or (rounds < max_runs and time.perf_counter() - start < budget_s):
        for name, run in contestants.items():
            times[name].append(_cuda_ms(run) if device == "cuda" else _cpu_ms(run))
        rounds += 1
    return {name: timing(values) for name, values in times.items()}


class Marks:
    """Points in time, on the GPU's clock where there is one; marking waits for nothing."""

    def __init__(self, cuda: bool) -> None:
        self.cuda, self.points = cuda, list[Any]()

    def __call__(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.points.append(event)
        else:
            self.points.append(time.perf_counter())

    def intervals_ms(self) -> list[float]:
        """Milliseconds from each mark to the next; waits until the GPU has passed the last one."""
        if self.cuda:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) for a, b in itertools.pairwise(self.points)]
        return [(b - a) * 1e3 for a, b in itertools.pairwise(self.points)]


def peak_extra_mib(run: Callable[[], object], device: str) -> float:
    """MiB that run() needs above what is in use before it. Warm up first, or its one-time buffers count as well.

    On CUDA what the allocator hands out; on the CPU the resident memory of this process (Linux only), which sees the
    libraries' own buffers too.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed but not returned would hide as much of what run() takes
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak, to what is resident now
    before = _mib("self/status", "VmRSS")
    run()
    return _mib("self/status", "VmHWM") - before


def count_kernels(run: Callable[[], object]) -> int:
    """Kernels that run() launches on the GPU, without copies and fills; warm up first."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in on_gpu(seen.events()))


def on_gpu(events: Iterable[Any]) -> list[Any]:
    """Of a profiler's events or averages those of the GPU itself, without the ranges that programs name around them."""
    cuda = torch.autograd.DeviceType.CUDA
    return [event for event in events if event.device_type == cuda and not event.is_user_annotation]


def held_mib(device: str) -> float:
    """MiB in use: of the GPU by all processes, DALI's share included; on "cpu" those resident of this process."""
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 2**20
    return _mib("self/status", "VmRSS")


def peak_host_mib() -> float:
    """MiB: the most that this process has had resident, and what its workers hold for themselves now (Linux only).

    Most of what a forked worker is resident with are its parent's pages, which take memory once.
    """
    workers = (worker.pid for worker in multiprocessing.active_children())
    return _mib("self/status", "VmHWM") + sum(_mib(f"{pid}/smaps_rollup", "Private_") for pid in workers)


class Reading(NamedTuple):
    """What nvidia-smi says of one GPU at one moment."""

    utilisation_percent: float
    power_w: float


@contextlib.contextmanager
def gpu_watch() -> Iterator[list[Reading]]:
    """The current GPU, five times a second; filled when the block ends, and empty where no driver tells."""
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
    """Of nvidia-smi's lines those that are two numbers; a GPU may not tell ("[N/A]"), and the last may be torn."""
    readings = []
    for line in text.splitlines(keepends=True):
        with contextlib.suppress(ValueError):
            if line.endswith("\n"):
                readings.append(Reading(*map(float, line.split(","))))
    return readings


def cpu_seconds() -> float:
    """Processor time of this process, all its threads, and of the workers it started by multiprocessing (Linux only).

    It depends on what else the machine does far less than time on the clock.
    """
    workers = (worker.pid for worker in multiprocessing.active_children())
    clocks = (~pid << 3 | 2 for pid in workers if pid)  # what clock_getcpuclockid(3) returns, which Python lacks
    return time.process_time() + sum(map(time.clock_gettime, clocks))


def stolen_s() -> float:
    """Seconds, over all processors, in which this machine would have run but its hypervisor ran others; 0 if untold."""
    try:
        ticks = int(Path("/proc/stat").read_text().split(maxsplit=9)[8])
    except (OSError, IndexError, ValueError):
        return 0.0
    return ticks / os.sysconf("SC_CLK_TCK")


_SPIN = """
import os, sys
os.sched_setaffinity(0, {int(sys.argv[1])})
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
while os.getppid() == int(sys.argv[2]):
    pass
"""


@contextlib.contextmanager
def kept_awake() -> Iterator[None]:
    """Keeps all processors of this process busy, at a priority below every other program's (Linux only).

    One of a virtual machine that falls asleep may wait for milliseconds until its hypervisor lets it wake, and threads
    that wait for each other sleep often. stolen_s() counts that wait.
    """
    command = [sys.executable, "-c", _SPIN]
    spinners = [subprocess.Popen([*command, str(core), str(os.getpid())]) for core in os.sched_getaffinity(0)]
    try:
        yield
    finally:
        for each in spinners:
            each.kill()
            each.wait()


def die_with_parent() -> None:
    """Linux ends this process when its parent ends, however that does, and even while this one is stopped."""
    with contextlib.suppress(AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def die_first() -> None:
    """Linux kills this process before others where memory ends."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def failure(error: Exception) -> str:
    """The status of a row that ended so, in one line."""
    memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if memory or any(words in str(error).lower() for words in OUT_OF_MEMORY):
        return "out of memory"
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def append(record: Path | str, rows: Sequence[Mapping[str, object]]) -> None:
    """Adds rows to a CSV in benchmarks/records/ (or at a path of its own). What stands there stays; a column that is
    new goes to the end, and is empty in older rows."""
    path, older = RECORDS / record, read(record)
    columns = list(dict.fromkeys(itertools.chain(*older[:1], *rows)))
    path.parent.mkdir(parents=True, exist_ok=True)
    if rows and older and columns == list(older[0]):
        files.append(path, _csv(columns, rows).encode())
    elif rows:
        files.write_text(path, _csv(columns, [dict(zip(columns, columns, strict=True)), *older, *rows]))


def save_plot(figure: Any, path: Path, dpi: int) -> None:
    """Write a figure of matplotlib."""
    with files.replacing(path) as partial:
        figure.savefig(partial, dpi=dpi, format=path.suffix[1:])


def _csv(columns: list[str], rows: Iterable[Mapping[str, object]]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, columns, restval="").writerows(rows)
    return text.getvalue()


def read(record: Path | str) -> list[dict[str, str]]:
    """All rows of a record, none if there is no such file."""
    path = RECORDS / record
    if not path.exists():
        return []
    with files.open_text(path, newline="") as file:
        return list(csv.DictReader(file))


def timing(values: Sequence[float]) -> Timing:
    """The summary of milliseconds measured one by one."""
    values = sorted(values)
    last = len(values) - 1
    return Timing(statistics.median(values), values[round(0.2 * last)], values[round(0.8 * last)], len(values))


def _cpu_ms(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def _cuda_ms(run: Callable[[], object]) -> float:
    """Time on the GPU alone, launches included where the host cannot keep ahead."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)


def _mib(file: str, field: str) -> float:
    """The sum of the lines of a file in /proc that begin so, which are in kB."""
    found = [line.split()[1] for line in Path("/proc", file).read_text().splitlines() if line.startswith(field)]
    if not found:
        raise RuntimeError(f"no {field} in /proc/{file}; memory on the CPU is measured on Linux only")
    return sum(map(int, found)) / 1024


def _processor() -> str:
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
        unit = ", AMX" if any("amx_bf16" in line for line in lines) else ""
    except (OSError, StopIteration):
        name, unit = platform.machine(), ""
    return f"{name}, {cores} cores{unit}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    """Of the checkout, + where it differs; without git SWIFTCLR_COMMIT. RuntimeError where there is neither."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    measured = (":/", ":(top,exclude)benchmarks/records", ":(top,exclude)README.md")  # not what they write themselves
    try:
        changed = git("status", "--porcelain", "-uno", "--", *measured)
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError) as error:
        if named := os.environ.get("SWIFTCLR_COMMIT"):
            return named
        raise RuntimeError(
            f"a record names the commit that it measured, but git did not tell it ({error}): set SWIFTCLR_COMMIT to "
            "the commit of this code"
        ) from error
