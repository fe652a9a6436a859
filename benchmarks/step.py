"""The training step alone, on synthetic views that lie on the device already: what the loader has to keep up with.

    python -m benchmarks.step                                  CPU: ResNet-18 at 32 px
    python -m benchmarks.step --device cuda                    GPU: ResNet-50 at 224 px
    python -m benchmarks.step --device cuda --depth 18 --size 32 --batch 256 --batch 512 --mode eager --mode graph
    torchrun --nproc-per-node 8 -m benchmarks.step --device cuda --bn local --bn sync    the price of global BatchNorm

--mode eager, or eager and graph, leaves torch.compile out, which compiles anew at each batch and layout.
Every layout x mode x precision x BatchNorm steps in turn, batch by batch, and a row each goes to records/step.csv. A
step is forward, loss, backward and LARS, on the GPU's clock; "graph" is all of it captured as one CUDA graph, whose
parts have no times. mfu counts the products of the network, forward and backward, against the rate of a plain product
of the same precision, measured in the same run. On a GPU no step may wait for the device (sync debug mode "error"), and
the kernels of LARS are counted by the profiler.

Bounds of Hopper, computed and not measured: an H200 copies 4.3 TB/s (read and written), so that by the bytes it moves
ResNet-50 at 224 px trains on at most 9,000 views/s eager, and 12,300 with its elementwise work fused.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
import typer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Marks, call_ms, count_kernels, peak_extra_mib, time_interleaved, timing
from benchmarks.tables import Row, conditions, grouped, newest, number, table
from model.encoder import build_encoder
from model.lars import LARS, param_groups
from model.nt_xent import nt_xent
from model.simclr import ProjectionHead, SimCLR
from tools.records import append, environment

PARTS = ("forward", "loss", "backward", "optimizer")
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Step:
    """One contestant: a network, LARS and a batch; calling it trains one step."""

    def __init__(
        self, views: Tensor, *, depth: int, width: float, layout: str, mode: str, precision: str, bn: str
    ) -> None:
        self.device, self.mode, self.precision = views.device, mode, precision
        self.views = views.contiguous(
            memory_format=torch.channels_last if layout == "nhwc" else torch.contiguous_format
        )
        network = build_network(depth, width, views.shape[-1]).to(self.device)
        if layout == "nhwc":
            network = network.to(memory_format=torch.channels_last)
        if bn == "sync":
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        lr = torch.tensor(1e-3, device=self.device)
        self.optimizer = LARS(param_groups(network, 1e-6), lr=lr)
        self.group = dist.group.WORLD if dist.is_initialized() else None
        self.model: nn.Module = nn.parallel.DistributedDataParallel(network) if self.group else network
        if mode == "compile":
            self.model.compile(dynamic=False)
        self.graph: Any = None
        for _ in range(3):  # compiles, tunes convolutions, makes the momentum: nothing that is timed
            self.eager()
        if mode == "graph":
            self._capture()

    def __call__(self) -> None:
        self.graph.replay() if self.graph else self.eager()

    def eager(self, mark: Callable[[], None] = lambda: None) -> None:
        """forward, loss, backward and optimizer, with a mark before, between and behind them."""
        mark()
        with torch.autocast(self.device.type, TYPES[self.precision], enabled=self.precision != "fp32"):
            z = self.model(self.views)
        mark()
        loss = nt_xent(z.float(), 0.1, group=self.group)
        mark()
        loss.backward()
        mark()
        self.optimizer.step()
        self.optimizer.zero_grad()
        mark()

    def parts_ms(self) -> list[float]:
        marks = Marks(self.device.type == "cuda")
        self.eager(marks)
        return marks.intervals_ms()

    def _capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.eager()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.eager()


def main(
    device: Literal["cpu", "cuda"] = "cpu",
    depth: Annotated[int | None, typer.Option(help="default 18, on CUDA 50")] = None,
    width: float = 1.0,
    size: Annotated[int | None, typer.Option(help="of the views in px; default 32, on CUDA 224")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="images; default 64, on CUDA 64, 128 and 256")] = None,
    layout: Annotated[list[str] | None, typer.Option(help="nchw, nhwc")] = None,
    mode: Annotated[list[str] | None, typer.Option(help="eager, compile, graph (CUDA, one process)")] = None,
    precision: Annotated[list[str] | None, typer.Option(help="fp32, bf16")] = None,
    bn: Annotated[list[str] | None, typer.Option(help="local, sync (CUDA, under torchrun)")] = None,
    threads: Annotated[int | None, typer.Option(help="of the CPU")] = None,
    runs: Annotated[int, typer.Option(help="steps timed of every contestant")] = 10,
    profile: Annotated[bool, typer.Option(help="also print where the first contestant's time goes")] = False,
    record: Annotated[str, typer.Option(help="CSV in benchmarks/records/, or a path")] = "step.csv",
) -> None:
    """Time the step, its parts and its memory."""
    cuda = device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA device here", param_hint="--device")
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    axes = {
        "layout": (layout or ["nchw", "nhwc"], ["nchw", "nhwc"]),
        "mode": (mode or ["eager", "compile"], ["eager", "compile", *(["graph"] if cuda and world_size == 1 else [])]),
        "precision": (precision or (["bf16"] if cuda else ["fp32", "bf16"]), ["fp32", "bf16"]),
        "bn": (bn or ["local"], ["local", *(["sync"] if cuda and world_size > 1 else [])]),
    }
    for name, (chosen, possible) in axes.items():
        if unknown := sorted(set(chosen) - set(possible)):
            raise typer.BadParameter(f"{', '.join(unknown)}; here it is one of {possible}", param_hint=f"--{name}")
    torch.backends.cudnn.benchmark = cuda  # as train.py: shapes are fixed
    if threads:
        torch.set_num_threads(threads)
    if world_size > 1:
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if cuda else "gloo")
    kinds = [
        {"layout": a, "mode": b, "precision": c, "bn": d}
        for d in axes["bn"][0]
        for c in axes["precision"][0]
        for a in axes["layout"][0]
        for b in axes["mode"][0]
    ]
    network = {"depth": depth or (50 if cuda else 18), "width": width}
    pixels = size or (224 if cuda else 32)
    for images in batch or ([64, 128, 256] if cuda else [64]):
        sweep(device, images, pixels, network, kinds, runs, world_size, record, profile=profile)
    if world_size > 1:
        dist.destroy_process_group()


def sweep(
    device: str,
    images: int,
    size: int,
    network: dict[str, Any],
    kinds: list[dict[str, str]],
    runs: int,
    world_size: int,
    record: str,
    *,
    profile: bool = False,
) -> None:
    """All contestants on batches of so many images, 2 · images views, in every process."""
    torch.compiler.reset()  # or the recompilation limit is met at the ninth contestant, and eager code timed in silence
    cuda, main = device == "cuda", not dist.is_initialized() or dist.get_rank() == 0
    steps: dict[str, tuple[dict[str, str], Step]] = {}
    for kind in kinds:
        torch.manual_seed(0)
        views = torch.randn(2 * images, 3, size, size, device=device)
        try:  # the loader delivers half precision where bf16 trains on a GPU
            step = Step(views.half() if cuda and kind["precision"] == "bf16" else views, **network, **kind)  # type: ignore[arg-type]
        except torch.OutOfMemoryError:
            typer.echo(f"{images} images, {' '.join(kind.values())}: does not fit")
        else:
            steps[" ".join(kind.values())] = (kind, step)
    totals: dict[str, list[float]] = {name: [] for name in steps}
    parts: dict[str, list[list[float]]] = {name: [] for name in steps}
    for _ in range(runs):
        for name, (_, step) in steps.items():
            if step.graph:
                totals[name].append(call_ms(step, cuda))
            else:
                parts[name].append(step.parts_ms())
                totals[name].append(sum(parts[name][-1]))
    flop_per_view, where = model_flop(network["depth"], network["width"], size), environment(device)
    rates = {name: product_flop_per_s(device, name) for name in {kind["precision"] for kind in kinds}}
    if main:
        typer.echo(f"\nResNet-{network['depth']}, {size} px, {images} images x {world_size} on {where['device']}")
        typer.echo(
            f"{'':30}{'ms':>9}" + "".join(f"{part:>10}" for part in PARTS) + f"{'views/s':>9}{'MiB':>9}{'mfu':>6}"
        )
    rows = []
    for name, (kind, step) in steps.items():
        if cuda:
            _refuse_waiting(step)
        total, peak = timing(totals[name]), peak_extra_mib(step, device)
        medians = [f"{statistics.median(column):.4g}" for column in zip(*parts[name], strict=True)] or [""] * len(PARTS)
        images_per_s = 1e3 * images * world_size / total.median
        mfu = flop_per_view * 2 * images / (total.median / 1e3) / rates[kind["precision"]]
        kernels = count_kernels(_optimizer_alone(step)) if cuda else ""
        row = {"what": "step", **network, "size": size, "images": images, "world_size": world_size, **kind}
        row |= total.columns() | {f"{part}_ms": median for part, median in zip(PARTS, medians, strict=True)}
        row |= {"images_per_s": f"{images_per_s:.1f}", "views_per_s": f"{2 * images_per_s:.1f}"}
        row |= {"peak_extra_mib": f"{peak:.1f}", "mfu": f"{mfu:.3g}", "lars_kernels": kernels, **where}
        rows.append(row)
        if main:
            cells = "".join(f"{median:>10}" for median in medians)
            typer.echo(f"{name:30}{total.median:9.1f}{cells}{2 * images_per_s:9.0f}{peak:9.0f}{mfu:6.2f}")
    if main:
        append(record, rows)
        if profile and steps:
            _print_profile(next(iter(steps.values()))[1], cuda)


def model_flop(depth: int, width: float, size: int) -> float:
    """Floating point operations of the network's products for one view, forward and backward."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        build_network(depth, width, size)(torch.empty(2, 3, size, size)).sum().backward()
    return counter.get_total_flops() / 2


def product_flop_per_s(device: str, precision: str) -> float:
    """The rate of one large matrix product."""
    n = 8192 if device == "cuda" else 1024
    square = torch.randn(n, n, device=device, dtype=TYPES[precision])
    timings = time_interleaved({"mm": lambda: square @ square}, device, warmup=3, min_runs=10, max_runs=20)
    ms = timings["mm"].median
    return 2 * n**3 / ms * 1e3


def build_network(depth: int, width: float, size: int) -> nn.Module:
    encoder = build_encoder(depth, width=width, stem="small" if size <= 64 else "standard")
    return SimCLR(encoder, ProjectionHead(encoder.num_features))


def _refuse_waiting(step: Step) -> None:
    """One step in which any wait for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _optimizer_alone(step: Step) -> Callable[[], Any]:
    for group in step.optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    return step.optimizer.step


def _print_profile(step: Step, cuda: bool) -> None:
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=activities) as profile:
        step()
    typer.echo(profile.key_averages().table(sort_by=f"self_{'cuda' if cuda else 'cpu'}_time_total", row_limit=20))


def block(rows: list[Row]) -> str:
    """The fastest layout and mode of every network, batch and precision."""
    keys = ["device", "threads", "depth", "width", "size", "images", "world_size"]
    rows = newest(rows, keys, ["layout", "mode", "precision", "bn"])
    text = "\nThe step alone, on synthetic views: the fastest layout and mode of each precision.\n"
    for part in grouped(rows, "device", "threads"):
        lines = []
        for alike in grouped(part, *keys, "precision", "bn"):
            row = min(alike, key=lambda row: float(row["median_ms"]))
            many = row["world_size"] != "1"
            width = f", width {row['width']}" if float(row["width"]) != 1 else ""
            images = f"{row['images']} x {row['world_size']}" if many else row["images"]
            kind = f"{row['precision']}, {row['layout']}, {row['mode']}" + (f", {row['bn']} BatchNorm" if many else "")
            cells = [f"ResNet-{row['depth']}{width}, {row['size']} px", images, kind]
            ms = [number(row[f"{name}_ms"]) for name in ("median", *PARTS)]
            lines.append([*cells, *ms, *(number(row[name]) for name in ("views_per_s", "peak_extra_mib", "mfu"))])
        head = ["network", "images", "fastest", "ms", "forward", "loss", "backward", "LARS", "views/s", "MiB", "mfu"]
        text += "\n" + table(head, lines) + conditions(part, "step.csv")
    return text + "\n"


if __name__ == "__main__":
    typer.run(main)
