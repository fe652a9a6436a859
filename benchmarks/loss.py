"""NT-Xent against its peers and against the limit of the machine.

    python -m benchmarks.loss                                   CPU: 512 to 16384 rows
    python -m benchmarks.loss --device cuda --check --tune      GPU: tests first, then block shapes, then 512 to 131072
    python -m benchmarks.loss --device cuda --no-compile        without torch.compile, which compiles anew at each size
    python -m benchmarks.loss --device cuda --shape 64,64,4,2 --shape 128,128,8,2    both kernels in these shapes alone
    python -m benchmarks.loss --kernels                         registers, spills and shared memory; needs no GPU

Every implementation x rows x (forward, forward+backward), all in turn in one run: rows go to records/loss.csv, the plot
to records/loss-cuda.png or, for four threads, records/loss-cpu-4-threads.png. Peers count where they are installed
(lightly, pytorch-metric-learning). "chunked, torch's threads" is what was not chosen: a plain loop over the tiles, with
torch's threads inside each operation instead of a tile a thread. "limit: products" and "limit: exp" are the matrix
products and exponentials that remain when the symmetry of the matrix is used: on the CPU timed in this run, tile by
tile on as many threads; on a GPU computed from the product rate measured in this run and from 16 exponentials per clock
and multiprocessor.

Read the record's `load`: teams of threads suffer from other processes far more than single ones do, so on a busy
machine only --threads 1 compares the work.
"""

from __future__ import annotations

import functools
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal
from unittest import mock

import psutil
import torch
import typer
from torch import Tensor

from benchmarks.measure import Timing, peak_extra_mib, time_interleaved
from benchmarks.tables import Row, by_number, conditions, grouped, newest, number, of_one_commit, table, times
from model import nt_xent_tiles as tiles
from model.nt_xent import nt_xent, resolve
from model.nt_xent_rows import reference, shift
from tools.records import RECORDS, append, can_plot, environment, save_plot

Loss = Callable[[Tensor], Tensor]

CPU_ROWS = [512 * 2**k for k in range(6)]
CUDA_ROWS = [512 * 2**k for k in range(9)]
TUNED_ROWS = [2048, 16384, 65536]
FORWARD, BOTH = "forward", "forward+backward"


def main(
    device: Literal["cpu", "cuda"] = "cpu",
    rows: Annotated[list[int] | None, typer.Option(help="2n; default 512 to 16384, on CUDA to 131072")] = None,
    dim: int = 128,
    temperature: float = 0.1,
    threads: Annotated[
        int | None, typer.Option(help="of the CPU; one is the fair comparison on a busy machine")
    ] = None,
    budget_s: Annotated[float, typer.Option(help="seconds per size and mode, for all contestants together")] = 20.0,
    check: Annotated[bool, typer.Option(help="first run the GPU tests, and compute-sanitizer on one shape")] = False,
    tune: Annotated[bool, typer.Option(help="time the kernels in many shapes, into records/loss_tune.csv")] = False,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="BLOCK_I,BLOCK_J,WARPS,STAGES: time the kernels in these shapes, and nothing else"),
    ] = None,
    kernels: Annotated[bool, typer.Option(help="only compile, into records/loss_kernels.csv")] = False,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="also time torch.compile, which compiles anew at each size")
    ] = True,
) -> None:
    if threads:
        torch.set_num_threads(threads)
    if kernels:
        record_kernels()
        return
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA device here; --kernels compiles without one", param_hint="--device")
    if shape:
        tune_kernels(device, rows or TUNED_ROWS, dim, temperature, [parse_shape(text) for text in shape])
        return
    if device == "cpu" and (check or tune):
        raise typer.BadParameter("--check and --tune are for --device cuda; the CPU's checks are pytest's")
    if check:
        check_kernels()
    if tune:
        tune_kernels(device, TUNED_ROWS, dim, temperature, list(_shapes()))
    sweep(device, rows or (CUDA_ROWS if device == "cuda" else CPU_ROWS), dim, temperature, budget_s, compiled)


# ------------------------------------------------------------------------------------------------------- contestants


def contestants(device: str, rows: int, dim: int, temperature: float, compiled: bool = True) -> dict[str, Loss]:
    """Losses of z (rows, dim). Those that store matrices leave when a few of them no longer fit."""
    losses: dict[str, Loss] = {}
    kinds = [("chunked", None), ("chunked", "bf16"), ("triton", None), ("triton", "bf16"), ("triton", "tf32")]
    for name, operands in kinds:
        try:
            resolve(name, device, rows=rows, dim=dim, temperature=temperature, operands=operands)  # type: ignore[arg-type]
        except ValueError:
            continue
        label = f"{name} {operands}" if operands else name
        losses[label] = lambda z, name=name, operands=operands: nt_xent(z, temperature, impl=name, operands=operands)  # type: ignore[misc]
    if 6 * 4 * rows**2 < _free_bytes(device):
        losses["reference"] = lambda z: nt_xent(z, temperature, impl="reference")
        if compiled:
            torch.compiler.reset()  # or the fourth size meets the recompilation limit, and eager code is timed
            compile_ = torch.compile(reference, dynamic=False, fullgraph=True)
            losses["reference, torch.compile"] = lambda z: compile_(z, temperature)
        losses |= _peers(device, rows, temperature)
    return losses


def _peers(device: str, rows: int, temperature: float) -> dict[str, Loss]:
    peers: dict[str, Loss] = {}
    n = rows // 2
    try:
        from lightly.loss import NTXentLoss

        lightly = NTXentLoss(temperature=temperature)
        peers["lightly"] = lambda z: lightly(z[:n], z[n:])
    except ImportError:
        print("lightly is not installed and left out")
    try:
        from pytorch_metric_learning.losses import NTXentLoss as MetricLearning

        images = torch.arange(n, device=device).repeat(2)
        learning = MetricLearning(temperature=temperature)
        if rows <= 512:  # it pairs all pairs: 2 GiB and seconds at 512 rows, eight times as much at the next size
            peers["pytorch-metric-learning"] = lambda z: learning(z, images)
    except ImportError:
        print("pytorch-metric-learning is not installed and left out")
    return peers


def _free_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return int(psutil.virtual_memory().available)


# --------------------------------------------------------------------------------------------------------- the limit


def cpu_limits(rows: int, dim: int) -> dict[str, dict[str, Callable[[], object]]]:
    """What remains of `chunked` when only its products, or only its exponentials, are done, per mode."""
    edge = min(tiles.TILE_ON_CPU, rows // 2)
    blocks = rows // edge
    triangle = blocks * (blocks + 1) // 2
    u, e = torch.randn(edge, dim), torch.rand(edge, edge)
    pool = _pool(torch.get_num_threads())

    def logits() -> None:
        torch.mm(u, u.T)

    def weigh() -> None:
        torch.mm(e, u)

    def exponentials() -> None:
        torch.exp(e)

    def work(tasks: list[Callable[[], None]]) -> Callable[[], object]:
        return lambda: list(pool.map(lambda task: task(), tasks))

    return {
        FORWARD: {"limit: products": work([logits] * triangle), "limit: exp": work([exponentials] * triangle)},
        BOTH: {
            "limit: products": work([logits] * 2 * triangle + [weigh] * blocks**2),
            "limit: exp": work([exponentials] * 2 * triangle),
        },
    }


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, initializer=_one_thread)


def _one_thread() -> None:
    """Each operation of this thread runs on it alone."""
    torch.get_num_threads()  # the first question sets a thread's number to the process's; only then set its own
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)


def cuda_limits(rows: int, dim: int) -> dict[str, dict[str, float]]:
    """Milliseconds: M^2 D flop forwards and 5 M^2 D in all, M^2 / 2 exponentials forwards and 3 M^2 / 2 in all."""
    square = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
    ms = time_interleaved({"mm": lambda: square @ square}, "cuda", warmup=3, min_runs=10)["mm"].median
    flop_per_ms = 2 * 8192**3 / ms
    properties = torch.cuda.get_device_properties(0)
    exp_per_ms = 16 * properties.multi_processor_count * properties.clock_rate  # clock_rate is in kHz
    return {
        mode: {
            "limit: products": products * rows**2 * dim / flop_per_ms,
            "limit: exp": exponentials * rows**2 / exp_per_ms,
        }
        for mode, products, exponentials in ((FORWARD, 1, 0.5), (BOTH, 5, 1.5))
    }


# --------------------------------------------------------------------------------------------------------- the sweep


def sweep(device: str, sizes: list[int], dim: int, temperature: float, budget_s: float, compiled: bool = True) -> None:
    name, reason = resolve("auto", device, dim=dim, temperature=temperature)
    print(f"auto on {device}: {name} ({reason})")
    rows_of_record: list[dict[str, object]] = []
    for rows in sizes:
        torch.manual_seed(0)
        z = torch.randn(rows, dim, device=device, requires_grad=True)
        losses = contestants(device, rows, dim, temperature, compiled)
        where = environment(device)
        for mode in (FORWARD, BOTH):
            runs = {label: _step(loss, z, mode) for label, loss in losses.items()}
            limits = {}
            if device == "cpu":
                limits = cpu_limits(rows, dim)[mode]
                if "chunked" in runs:
                    runs["chunked, torch's threads"] = _on_torchs_threads(runs["chunked"])
            timings = time_interleaved(runs | limits, device, min_runs=5 if rows < 8192 else 3, budget_s=budget_s)
            if device == "cuda":
                timings |= {what: Timing(ms, ms, ms, 0) for what, ms in cuda_limits(rows, dim)[mode].items()}
            for label, timing in timings.items():
                peak = f"{peak_extra_mib(runs[label], device):.1f}" if label in runs else ""
                row = {"what": "nt_xent", "implementation": label, "mode": mode, "rows": rows, "dim": dim}
                row |= {"temperature": temperature, **timing.columns(), "peak_mib": peak, **where}
                rows_of_record.append(row)
                append("loss.csv", [row])
        _print_table(rows_of_record, rows)
    rows_as_read = [{key: str(value) for key, value in row.items()} for row in rows_of_record]
    if can_plot():
        draw(rows_as_read, RECORDS / plot_name(rows_as_read[0]))


def _on_torchs_threads(run: Callable[[], object]) -> Callable[[], object]:
    """`run`, its tiles one after the other in a plain loop, with torch's threads inside each operation."""

    def patched() -> None:
        with mock.patch("model.nt_xent.one_thread_each", return_value=nullcontext()):
            run()

    return patched


def _step(loss: Loss, z: Tensor, mode: str) -> Callable[[], object]:
    def forward() -> None:
        with torch.no_grad():
            loss(z)

    def both() -> None:
        z.grad = None
        loss(z).backward()

    return forward if mode == FORWARD else both


def _print_table(record: list[dict[str, object]], rows: int) -> None:
    print(f"\n{rows} rows{'':20} {'forward ms':>12} {'fwd+bwd ms':>12} {'peak MiB':>9} {'of reference':>13}")
    here = {(row["implementation"], row["mode"]): row for row in record if row["rows"] == rows}
    base = here.get(("reference", BOTH))
    for label in dict.fromkeys(name for name, _ in here):
        forward, both = here[label, FORWARD], here[label, BOTH]
        ratio = f"{float(str(base['median_ms'])) / float(str(both['median_ms'])):.2f} x" if base else ""
        print(f"{label:30} {forward['median_ms']:>12} {both['median_ms']:>12} {both['peak_mib']:>9} {ratio:>13}")


# ---------------------------------------------------------------------------------------------------- table and plot


def block(rows: list[Row]) -> str:
    """Forward and backward over the rows, for each device with as many threads as were measured."""
    text = "\nNT-Xent, forward and backward: milliseconds, and MiB at the peak; compare within a line.\n"
    for part in _most_threads(rows):
        measured = [row for row in part if row["mode"] == BOTH and "limit" not in row["implementation"]]
        sizes = grouped(measured, "rows")
        names = [row["implementation"] for row in sizes[-1]]
        lines = []
        for size in sizes:
            cells = {
                row["implementation"]: f"{number(row['median_ms'], ' ms')}, {number(row['peak_mib'], ' MiB')}"
                for row in size
            }
            lines.append([size[0]["rows"], *(cells.get(name, "") for name in names), size[0]["load"]])
        text += "\n" + table(["rows", *names, "load"], lines) + conditions(measured, "loss.csv", plot_name(part[0]))
    return text + "\n"


def headline(rows: list[Row]) -> str:
    """Ours beside lightly's, at the most rows that were measured under a load of fewer programs than threads."""
    text = ""
    for part in _most_threads(rows):
        calm = [row for row in part if row["mode"] == BOTH and float(row["load"]) < int(row["threads"])]
        by_kind = {(row["rows"], row["implementation"]): row for row in calm}
        sizes = [rows for rows, name in by_kind if name == "lightly"]
        if sizes:
            ours = by_kind.get((sizes[-1], "triton")) or by_kind[sizes[-1], "chunked"]
            theirs = by_kind[sizes[-1], "lightly"]
            text += (
                f"- NT-Xent of {sizes[-1]} rows, forward and backward, takes {number(ours['median_ms'], ' ms')} and "
            )
            text += f"{number(ours['peak_mib'], ' MiB')}; lightly's takes {number(theirs['median_ms'], ' ms')} and "
            text += f"{number(theirs['peak_mib'], ' MiB')}: {times(theirs['median_ms'], ours['median_ms'])} the time.\n"
            text += "  " + conditions([ours, theirs], "loss.csv").lstrip()
    return text


def newest_runs(rows: list[Row]) -> list[list[Row]]:
    """The newest rows of each device and number of threads, the rows of z ascending."""
    keys = ["device", "threads", "dim", "temperature"]
    parts = grouped(by_number(newest(rows, [*keys, "rows"], ["implementation", "mode"]), "rows"), *keys)
    return [of_one_commit(part, "rows", "implementation", "mode") for part in parts]


def _most_threads(rows: list[Row]) -> list[list[Row]]:
    parts = sorted(newest_runs(rows), key=lambda part: int(part[0]["threads"]))
    return list({part[0]["device"]: part for part in parts}.values())


def plot_name(row: Row) -> str:
    return f"loss-{'cuda' if row['driver'] else 'cpu-' + row['threads'] + '-threads'}.png"


def plots(rows: list[Row], folder: Path) -> None:
    for part in newest_runs(rows):
        draw(part, folder / plot_name(part[0]))


def draw(rows: Sequence[Row], path: Path) -> None:
    """Time and memory of forward and backward over the rows."""
    from matplotlib.figure import Figure

    both = [row for row in rows if row["mode"] == BOTH]
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2)
    for label in dict.fromkeys(row["implementation"] for row in both):
        mine = [row for row in both if row["implementation"] == label]
        sizes, is_limit = [int(row["rows"]) for row in mine], "limit" in label
        style = {"color": "0.6", "linestyle": ":" if "exp" in label else "--"} if is_limit else {"marker": "o"}
        time_axes.plot(sizes, [float(row["median_ms"]) for row in mine], label=label, **style)
        if not is_limit:
            memory_axes.plot(sizes, [max(0.1, float(row["peak_mib"])) for row in mine], label=label, marker="o")
    time_axes.set(title="forward + backward, median ms", ylabel="ms")
    memory_axes.set(title="peak extra memory", ylabel="MiB")
    for axes in (time_axes, memory_axes):
        axes.set(xscale="log", yscale="log", xlabel="rows (two views of N images)")
        axes.set_xticks(sorted({int(row["rows"]) for row in both}))
        axes.get_xaxis().set_major_formatter(lambda value, _: f"{value:g}")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    time_axes.legend(fontsize=8)
    first = both[0]
    loads = sorted(float(row["load"]) for row in both)
    figure.suptitle(
        f"NT-Xent, D = {first['dim']}, temperature {first['temperature']}: {first['device']}, "
        f"{first['threads']} thread(s), load {loads[0]:g} to {loads[-1]:g}, torch {first['torch']}, {first['date']}",
        fontsize=10,
    )
    save_plot(figure, path, 130)


# --------------------------------------------------------------------------------------------------- the kernels alone


def check_kernels() -> None:
    """Stops the benchmark unless the kernels pass their tests on this GPU; prints what compute-sanitizer finds."""
    tests = ["tests/test_nt_xent_triton.py", "-q", "-k", "cuda"]
    if subprocess.run([sys.executable, "-m", "pytest", *tests]).returncode:
        raise SystemExit("the kernels fail their tests on this GPU; nothing was timed")
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer is not on PATH; out-of-bounds accesses go unchecked")
        return
    one = (
        "import torch; from model.nt_xent import nt_xent; z = torch.randn(514, 100, device='cuda', requires_grad=True)"
    )
    # Calls that torch makes to see what fails are errors of the CUDA API too; only those of the kernels are asked for.
    command = [sanitizer, "--report-api-errors", "no", "--error-exitcode", "1"]
    code = subprocess.run([*command, sys.executable, "-c", f"{one}; nt_xent(z, 0.1).backward()"]).returncode
    print(f"compute-sanitizer ended with {code}" + (", see above: timed all the same" if code else ": no errors"))


def _shapes() -> Iterator[tuple[int, int, int, int]]:
    for block_i, block_j in ((64, 32), (64, 64), (128, 32), (128, 64), (128, 128), (64, 128)):
        for warps in (4, 8):
            for stages in (2, 3, 4):
                yield block_i, block_j, warps, stages


def parse_shape(text: str) -> tuple[int, int, int, int]:
    numbers = text.split(",")
    if len(numbers) != 4 or not all(number.isdecimal() for number in numbers):
        raise typer.BadParameter(f"{text!r}: expected four numbers such as 64,64,4,2", param_hint="--shape")
    block_i, block_j, num_warps, num_stages = map(int, numbers)
    return block_i, block_j, num_warps, num_stages


def tune_kernels(
    device: str, sizes: Sequence[int], dim: int, temperature: float, shapes: Sequence[tuple[int, int, int, int]]
) -> None:
    """Times both matrix kernels in each shape at each number of rows, and records all, the losers too.

    Row sums take the square ones. On a CPU only Triton's interpreter runs them (TRITON_INTERPRET=1).
    """
    from model import nt_xent_triton as kernels

    if device == "cpu" and not kernels.INTERPRETED:
        raise typer.BadParameter("the kernels run on --device cuda, or with TRITON_INTERPRET=1", param_hint="--shape")
    scale, bits = math.log2(math.e) / temperature, shift(temperature)
    where = environment(device)
    for rows in sizes:
        n = rows // 2
        u = torch.nn.functional.normalize(torch.randn(rows, dim, device=device)).half()
        u = torch.nn.functional.pad(u, (0, kernels.padded(dim) - dim))
        r = torch.full((rows,), 1 / rows, device=device)
        runs: dict[str, Callable[[], object]] = {}
        for cut in shapes:
            shape = kernels.Shape(*cut)
            jobs: dict[str, Callable[[], object]] = {
                "gradient": functools.partial(kernels.weighted_sums, u, r, n, 0, dim, scale, bits, "fp16", shape)
            }
            if shape.block_i == shape.block_j:
                for name, triangle in (("row_sums triangle", True), ("row_sums whole", False)):
                    jobs[name] = functools.partial(kernels.row_sums, u, n, 0, scale, bits, "fp16", shape, triangle)
            for name, job in jobs.items():
                try:
                    job()
                except Exception as error:  # a shape that does not fit this GPU is a result too
                    print(f"{name} {cut}: {type(error).__name__}")
                else:
                    runs[f"{name}|{cut}"] = job
        min_runs = 10 if device == "cuda" else 1
        timings = time_interleaved(runs, device, warmup=2, min_runs=min_runs, max_runs=30, budget_s=20 * (min_runs > 1))
        for label, timing in sorted(timings.items(), key=lambda item: item[1].median):
            name, cut_text = label.split("|")
            row = {"what": name, "shape": cut_text, "rows": rows, "dim": dim, **timing.columns(), **where}
            append("loss_tune.csv", [row])
        for name in ("row_sums triangle", "row_sums whole", "gradient"):
            mine = {label: timing.median for label, timing in timings.items() if label.startswith(name)}
            if mine:
                best = min(mine, key=mine.__getitem__)
                print(f"{rows} rows: {best} {mine[best]:.4f} ms")
    print("shipped:", [asdict(shape) for shape in kernels.shapes(dim, "fp16")])


def record_kernels() -> None:
    """Compiles every shipped configuration for sm_80 and sm_90 into records/loss_kernels.csv."""
    from model import nt_xent_triton as kernels

    versions = environment("cpu")
    for capability in (80, 90):
        for operands in ("fp16", "bf16", "tf32", "fp32"):
            for dim in (64, 128, 256, 512):
                for kernel, shape in zip(("row_sums", "gradient"), kernels.shapes(dim, operands), strict=True):
                    used = kernels.resources(kernel, capability, dim, operands)
                    row = {"what": kernel, "target": f"sm_{capability}", "operands": operands, "dim": dim}
                    row |= {**asdict(shape), **used, "triton": versions["triton"]}
                    append("loss_kernels.csv", [row | {"commit": versions["commit"], "date": versions["date"]}])
                    print(*row.values())


if __name__ == "__main__":
    typer.run(main)
