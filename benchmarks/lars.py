"""The LARS step against its peers, on the parameters of a ResNet.

    python -m benchmarks.lars                      CPU, one thread: host time, then real sizes
    python -m benchmarks.lars --device cuda        GPU: real sizes, and kernels by the profiler

Contestants step in turn in one run, on copies of the same parameters and gradients; rows go to records/lars.csv. Peers
count where they are installed (timm, lightly; their LARS is another formula, at about the same arithmetic), and torch's
SGD is what an optimizer without norms costs. "host" has the same parameters with one to four numbers each, so that what
remains is the cost of issuing the calls. On a CPU torch's multi-tensor calls go from tensor to tensor, and most of our
host time lies there; "ours, 2 parameters" is the part that remains on a GPU, one parameter in each group. "real" has
them in full size, which on a CPU is the time of its memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
import typer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import count_kernels, time_interleaved
from benchmarks.tables import Row, conditions, grouped, newest, number, table, times
from model.encoder import build_encoder
from model.lars import LARS, param_groups
from model.simclr import ProjectionHead, SimCLR
from tools.records import append, environment

Groups = list[dict[str, Any]]
SETTINGS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
WAITS = ("_local_scalar_dense", "nonzero")


class Calls(TorchDispatchMode):
    """Counts tensor calls, and those among them that wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += not str(func).startswith("profiler.")
        self.waits += any(wait in str(func) for wait in WAITS)
        return func(*args, **(kwargs or {}))


def parameters(depth: int, device: str, *, tiny: bool) -> Groups:
    """SimCLR's network in LARS's groups, with gradients."""
    with torch.device("meta"):
        encoder = build_encoder(depth)
        groups = param_groups(SimCLR(encoder, ProjectionHead(encoder.num_features)), 1e-4)

    def filled(p: Tensor) -> nn.Parameter:
        param = nn.Parameter(0.02 * torch.randn([min(n, 2) for n in p.shape][:2] if tiny else p.shape, device=device))
        param.grad = torch.randn_like(param)
        return param

    return [{**group, "params": [filled(p) for p in group["params"]]} for group in groups]


def contestants(make: Callable[[], Groups]) -> dict[str, torch.optim.Optimizer]:
    """Optimizers, each over parameters of its own."""

    def plain() -> Groups:
        return [{key: value for key, value in group.items() if key != "adapt"} for group in make()]

    optimizers: dict[str, torch.optim.Optimizer] = {
        "ours": LARS(make(), **SETTINGS),
        "SGD, foreach": torch.optim.SGD(plain(), **SETTINGS, foreach=True),
    }
    try:
        from timm.optim import Lars

        optimizers["timm"] = Lars(plain(), **SETTINGS)
    except ImportError:
        typer.echo("timm is not installed and left out")
    try:
        from lightly.utils.lars import LARS as Lightly

        optimizers["lightly"] = Lightly(plain(), **SETTINGS)
    except ImportError:
        typer.echo("lightly is not installed and left out")
    return optimizers


def main(
    device: Literal["cpu", "cuda"] = "cpu",
    depth: Annotated[int, typer.Option(help="of the ResNet whose parameters are stepped")] = 50,
    threads: Annotated[int, typer.Option(help="of the CPU; what a GPU waits for is one thread")] = 1,
    budget_s: Annotated[float, typer.Option(help="seconds per size, for all contestants together")] = 20.0,
    record: Annotated[str, typer.Option(help="CSV in benchmarks/records/, or a path")] = "lars.csv",
) -> None:
    """Time one step of every contestant."""
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA device here", param_hint="--device")
    torch.set_num_threads(threads)
    for size in ("host", "real"):
        groups = parameters(depth, device, tiny=size == "host")
        steps: dict[str, Callable[[], Any]] = {}
        if size == "host":
            few = [{**group, "params": group["params"][:1]} for group in _copied(groups)]
            steps["ours, 2 parameters"] = LARS(few, **SETTINGS).step
        steps |= {name: optimizer.step for name, optimizer in contestants(lambda: _copied(groups)).items()}  # noqa: B023
        timings = time_interleaved(steps, device, warmup=2, min_runs=5, budget_s=budget_s)
        where, rows = environment(device), list[dict[str, object]]()
        num_params = sum(len(group["params"]) for group in groups)
        typer.echo(f"\n{size}: {num_params} parameters of ResNet-{depth} and head on {where['device']}")
        typer.echo(f"{'':20}{'ms':>9}{'of ours':>9}{'calls':>7}{'waits':>7}{'kernels':>9}")
        for name, step in steps.items():
            with Calls() as counted:
                step()
            kernels = count_kernels(step) if device == "cuda" else ""
            ms, ratio = timings[name].median, timings[name].median / timings["ours"].median
            typer.echo(f"{name:20}{ms:9.3f}{ratio:9.2f}{counted.calls:7}{counted.waits:7}{kernels:>9}")
            row: dict[str, object] = {
                "what": "lars",
                "implementation": name,
                "size": size,
                "depth": depth,
                "params": num_params,
            }
            row |= {**timings[name].columns(), "calls": counted.calls, "waits": counted.waits, "kernels": kernels}
            rows.append({**row, "on": device, **where})
        append(record, rows)


def _copied(groups: Groups) -> Groups:
    copies = [{**group, "params": [nn.Parameter(p.detach().clone()) for p in group["params"]]} for group in groups]
    for copy, group in zip(copies, groups, strict=True):
        for p, q in zip(copy["params"], group["params"], strict=True):
            p.grad = q.grad.clone()
    return copies


def block(rows: list[Row]) -> str:
    """One step of each optimizer: what issuing it costs the host, and what it costs in full."""
    text = ""
    for part in grouped(newest(rows, ["device", "depth", "size"], ["implementation"]), "device", "depth"):
        by_name = {(row["implementation"], row["size"]): row for row in part}
        base = by_name.get(("ours", "real"), {}).get("median_ms", "")
        lines = []
        for name in dict.fromkeys(row["implementation"] for row in part):
            host, real = (by_name.get((name, size), {}) for size in ("host", "real"))
            ms = real.get("median_ms", "")
            counts = [(real or host)[count] for count in ("calls", "waits", "kernels")]
            lines.append([name, number(host.get("median_ms", "")), number(ms), times(ms, base), *counts])
        head = ["optimizer", "host ms", "ms", "of ours", "calls", "waits", "kernels"]
        text += f"\nOne step on ResNet-{part[0]['depth']} and its head: issued to parameters of a few numbers (host), "
        text += "and in full.\n\n" + table(head, lines) + conditions(part, "lars.csv")
    return text + "\n"


if __name__ == "__main__":
    typer.run(main)
