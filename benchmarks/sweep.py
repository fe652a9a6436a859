"""Loader, step and both together at batches of 256 to 8192 images: where the time and the memory go.

    python -m benchmarks.sweep SHARDS --preset cpu              a small network at 32 px, in ten minutes on two cores
    python -m benchmarks.sweep SHARDS --preset cpu-tiny         one so small that decoding full-size JPEGs limits it
    python -m benchmarks.sweep SHARDS --preset imagenet         GPU: ResNet-50 at 224 px
    python -m benchmarks.sweep SHARDS --preset cifar10          GPU: ResNet-18 at 32 px
    python -m benchmarks.sweep SHARDS --images FOLDER --against lightly,solo,torchvision
    python -m benchmarks.sweep SHARDS --check benchmarks/records/sweep.csv
    python -m benchmarks.sweep SHARDS --profile FOLDER --batch-size 1024
    accelerate launch --multi_gpu --num_processes 8 -m benchmarks.sweep SHARDS --preset imagenet

benchmarks/throughput.py measures three things at every batch size: the loader alone, the step on synthetic views, and
both. Each batch size runs in processes of its own: one that runs out of memory leaves a row that says so, and the sweep
goes on. Without SHARDS the demo's data serve.

The loader limits where training on synthetic views would be more than 3 % faster: then the stage that adds most time to
it alone is named, see benchmarks/loader.py. Rows go to records/sweep.csv, those of --against to records/against.csv.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import against as rivals
from benchmarks.loader import Task, interleaved, stages
from benchmarks.programs import Failure, Ranks
from benchmarks.tables import Row, conditions, number, table
from benchmarks.throughput import (
    NUMBERS,
    columns_of,
    measure_in_slices,
    measure_in_turns,
    newest_runs,
    plot_title,
    repeats,
    rounded,
    source,
    trained_by,
)
from benchmarks.trace import trace
from pipeline.demo import write_demo
from pipeline.shards import read_dataset
from pipeline.views import VIEWS, make_views
from pipeline.workers import share_of_cores
from tools.errors import one_message
from tools.records import RECORDS, append, environment, read, save_plot
from train import RECIPES, TrainConfig

BATCH_SIZES = (256, 512, 1024, 2048, 4096, 8192)
ENOUGH = 0.97  # together / synthetic from which on the model limits

# One core loads and the others train, as a GPU would, see `cores_of`: if they shared all, loading would slow the step.
# A CPU cannot be asked which micro-batch fits. The network is so wide that it is slower than a loader of small images,
# and that its largest batch takes minutes on two cores.
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
    "cpu-tiny": replace(CPU, width=0.125),  # with full-size JPEGs the loader limits
    "imagenet": RECIPES["imagenet"],
    "cifar10": RECIPES["cifar10"],
}


def main(
    shards: Annotated[Path | None, typer.Argument(help="a data set of tools/make_shards.py; none: the demo's")] = None,
    preset: Annotated[str, typer.Option(help=", ".join(PRESETS))] = "cpu",
    batch_size: Annotated[list[int] | None, typer.Option(help="source images; default 256, 512, ... 8192")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="images encoded at once; 0: as many as fit a GPU")] = None,
    depth: Annotated[int | None, typer.Option(help="of the ResNet, other than the preset's")] = None,
    width: Annotated[float | None, typer.Option(help="of the ResNet, other than the preset's")] = None,
    size: Annotated[int | None, typer.Option(help="pixels of a view, other than the preset's")] = None,
    budget: Annotated[float, typer.Option(help="seconds of measuring per batch size, three rounds at least")] = 30.0,
    against: Annotated[str, typer.Option(help=f"also train with these: {','.join(rivals.CONTESTANTS)}")] = "",
    images: Annotated[Path | None, typer.Option(help="the same images in class folders, for --against")] = None,
    check: Annotated[Path | None, typer.Option(help="sweep.csv or against.csv to compare this run with")] = None,
    margin: Annotated[float, typer.Option(help="by which a ratio may fall below --check's, as a share of it")] = 0.05,
    profile: Annotated[Path | None, typer.Option(help="write traces to this folder, and measure nothing")] = None,
    out: Annotated[Path, typer.Option(help="folder of sweep.csv and against.csv")] = RECORDS,
) -> None:
    """Measure loader, step and both at every batch size; exit code 1 where one fails, or has fallen below --check."""
    with one_message("sweep"), contextlib.ExitStack() as stack:
        if preset not in PRESETS:
            raise ValueError(f"unknown preset {preset!r}; choose one of {', '.join(PRESETS)}")
        chosen = rivals.contestants(against, images)
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
        data = f"{name}, {read_dataset(config.data).samples} images"  # raises if it is no data set, before any process
        ranks = stack.enter_context(Ranks())
        cases = [at_batch(config, size, ranks.world_size) for size in batch_size or BATCH_SIZES]
        if profile:
            traces = {case.batch_size: ranks.call(trace, case, profile.resolve()) for case in cases}
            if failed := [f"{size} images: {result}" for size, result in traces.items() if isinstance(result, Failure)]:
                print("\n".join(failed))
                raise typer.Exit(1)
            return
        columns = {**facts, "data": data, "threads": config.cpu_threads, "loader_threads": config.num_threads}
        sweep = Sweep(preset, ranks, budget, columns, out.resolve())
        rows = [sweep.row(case) for case in cases]
        if ranks.rank:
            return
        if chosen:
            measured = [row for row in rows if row["micro_batch"]]
            rows += [row for found in measured for row in sweep.against(found, config, chosen, images)]
        fallen: list[str] = []
        if check:
            fallen, unknown = compare(rows, baseline, margin)
            print("\n".join(["", *unknown, *fallen]))
            print(f"{len(fallen)} ratios are more than {100 * margin:g} % below those in {check}, or noisy")
        if fallen or any(str(row["status"]).startswith("failed") for row in rows):
            raise typer.Exit(1)


def at_batch(config: TrainConfig, batch_size: int, world_size: int) -> TrainConfig:
    """The configuration at another batch, whose micro-batch is no larger than the batch of a process."""
    if batch_size < world_size or batch_size % world_size:
        raise ValueError(f"--batch-size {batch_size} does not divide into {world_size} processes")
    return replace(config, batch_size=batch_size, micro_batch=min(config.micro_batch, batch_size // world_size))


def verdict(ratio: float, stage_ms: Mapping[str, float]) -> str:
    """What limits training whose rate is `ratio` of that on synthetic views; `stage_ms` as `stage_costs` gives it.

    >>> verdict(0.98, {}), verdict(0.5, {"reading": 0.1, "decode": 3.0, "augmentation": 0.9})
    ('the model limits', 'the loader limits: decode')
    """
    return "the model limits" if ratio >= ENOUGH else f"the loader limits: {max(stage_ms, key=stage_ms.__getitem__)}"


def noisy(ratio: float, unknown: float) -> bool:
    """Whether the rounds allow no verdict.

    Either the ratio's uncertainty includes ENOUGH, or training is faster than its own step by more than is uncertain.

    >>> noisy(0.98, 0.009), noisy(0.98, 0.02), noisy(0.3, 0.1), noisy(1.2, 0.01)
    (False, True, False, True)
    """
    return abs(ratio - ENOUGH) < unknown or ratio - 1 > max(unknown, 1 - ENOUGH)


def stage_costs(config: TrainConfig, seconds: float) -> dict[str, float]:
    """Milliseconds per source image that each stage adds to those before it when the loader runs alone.

    On CPUs of processor time, which other programs change less than time on the clock.
    """
    dataset = read_dataset(config.data)
    task = Task(
        shards=Path(config.data),
        views=config.views,
        batch_size=min(16, dataset.samples),
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


# ---------------------------------------------------------------------------------------------------------------- rows


@dataclass
class Sweep:
    """One command's rows, on record as soon as they are known."""

    preset: str
    ranks: Ranks
    budget: float
    facts: Mapping[str, Any]  # columns that all rows share
    out: Path
    stage_ms: dict[str, float] = field(default_factory=dict)  # measured once, when it is first needed

    def row(self, config: TrainConfig) -> dict[str, Any]:
        """Measure one batch size, on all ranks; only rank 0's row counts."""
        result = self.measured(config)
        status, what_limits, efficiency = "ok", "", ""
        if isinstance(result, Failure):
            status, result = str(result), {}
        else:
            if self.ranks.world_size > 1:
                efficiency = self.efficiency(config, result["together_images_per_s"])
            if noisy(result["ratio"], result["ratio_unknown"]):
                status = "noisy"
            elif self.ranks.rank == 0:
                if result["ratio"] < ENOUGH and not self.stage_ms:
                    self.stage_ms = stage_costs(config, 10.0)
                what_limits = verdict(result["ratio"], self.stage_ms)
        row = {
            **columns_of(self.preset, config, self.ranks.world_size),
            "micro_batch": "",
            "repeats": repeats(read_dataset(config.data).samples, config.batch_size),
            **{name: rounded(result.get(name)) for name in NUMBERS},
            **{"status": status, "verdict": what_limits, "scaling_efficiency_percent": efficiency, **self.facts},
        }
        if self.ranks.rank == 0:
            append(self.out / "sweep.csv", [row])
            print_row(row)
        return row

    def measured(self, config: TrainConfig) -> Any:
        if self.ranks.world_size > 1 or torch.cuda.is_available():
            return self.ranks.call(measure_in_turns, config, self.budget)
        return measure_in_slices(config, self.budget)

    def efficiency(self, config: TrainConfig, together: float) -> str:
        """Per cent of the rate of as many independent processes, from one with its share of the batch."""
        world_size = self.ranks.world_size
        share = replace(config, batch_size=config.batch_size // world_size)
        result = self.ranks.call_alone(measure_in_turns, share, self.budget)
        return rounded(100 * together / (world_size * result["together_images_per_s"])) if _is_measured(result) else ""

    def against(
        self, row: Mapping[str, Any], config: TrainConfig, names: Sequence[str], images: Path | None
    ) -> list[dict[str, Any]]:
        """Training with others' loaders and losses at the batch of a row."""
        cores = share_of_cores()  # all of them for each, for only ours separates loading from training
        config = replace(config, batch_size=row["batch_size"], micro_batch=int(row["micro_batch"]))
        config = replace(config, num_threads=cores, cpu_threads=cores)
        facts = {**self.facts, "threads": cores, "loader_threads": cores}
        rows = [
            {**columns_of(self.preset, config, self.ranks.world_size), "what": name, **numbers, **facts}
            for name, numbers in rivals.measure(config, names, images, self.budget).items()
        ]
        append(self.out / "against.csv", rows)
        rivals.print_rows(rows)
        return rows


def _is_measured(result: Any) -> bool:
    return result is not None and not isinstance(result, Failure)


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


# --------------------------------------------------------------------------------------------------------------- check

SAME = (
    *("preset", "batch_size", "what", "world_size", "size", "encoder", "precision", "micro_batch", "data", "device"),
    *("threads", "loader_threads"),
)


def compare(
    rows: Sequence[Mapping[str, Any]], baseline: Sequence[Mapping[str, str]], margin: float
) -> tuple[list[str], list[str]]:
    """(Ratios that have fallen, rows that the baseline does not know), a line each.

    Ratios are together / synthetic and ours / a rival's. One has fallen where it is more than `margin` of it below the
    newest of the same kind in the baseline, where the run failed, and where it is noisy, which says nothing. Raises
    ValueError if nothing could be compared.
    """

    def kind(row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(str(row.get(name, "")) for name in SAME)

    known = {kind(row): row for row in baseline if row.get("status") != "noisy" and ratio_of(row)}  # the last counts
    compared = [row for row in rows if row.get("what") != rivals.OURS]
    fallen, unknown = [], []
    for row in compared:
        where = f"{row['batch_size']} images" + (f", ours / {row['what']}" if "what" in row else "")
        before = known.get(kind(row))
        if not before:
            unknown.append(f"not compared at {where}: the baseline has no such row, or only noisy ones")
        elif row.get("status") == "noisy":
            fallen.append(f"noisy at {where}: its rounds differ too much; run it again")
        elif ratio_of(row) < (1 - margin) * ratio_of(before):
            state = f" ({row['status']})" if row.get("status", "ok") != "ok" else ""
            was = f"{ratio_of(before):.3f} on {before.get('date', '')}"
            fallen.append(f"fallen at {where}: {ratio_of(row):.3f}{state}, was {was}")
    if compared and len(unknown) == len(compared):
        raise ValueError(
            f"no settled row of the baseline has the {', '.join(SAME)} of any row of this run: nothing is checked"
        )
    return fallen, unknown


def ratio_of(row: Mapping[str, Any]) -> float:
    """The larger, the better; 0 for a row that failed."""
    if "what" in row:
        return 1 / float(row["ratio_to_ours"]) if row["ratio_to_ours"] else 0.0
    return float(row["ratio"] or 0)


# ------------------------------------------------------------------------------------------------------ table and plot


def block(rows: list[Row]) -> str:
    """Each preset over the batch sizes."""
    text = ""
    for part in newest_runs(rows):
        lines = []
        for row in part:
            rates = [number(row[f"{name}_images_per_s"]) for name in ("loader", "synthetic", "together")]
            ratio, low, high = (row[name] and f"{float(row[name]):.3f}" for name in ("ratio", "ratio_p20", "ratio_p80"))
            ratio = ratio and f"{ratio} ({low} to {high}, {row['rounds']} rounds)"
            steps = [number(row["data_wait_percent"], " %"), number(row["step_ms_p50"]), number(row["step_ms_p95"])]
            sizes = [number(row["peak_host_mib"]), number(row["peak_device_mib"])]
            scaling = number(row.get("scaling_efficiency_percent", ""), " %")
            gpu = [number(row["gpu_utilisation_percent"], " %"), number(row["gpu_power_w"], " W")]
            result = row["verdict"] or row["status"]
            if ratio and not row.get("ratio_unknown") and float(low) < ENOUGH < float(high):
                result = "noisy"  # a row from before the uncertainty of its ratio was recorded
            lines.append([row["batch_size"], row["micro_batch"], *rates, ratio, *steps, *sizes, *gpu, scaling, result])
        head = ["batch", "micro-batch", "loader", "synthetic", "together", "together / synthetic", "data_wait"]
        head += ["step ms", "p95", "host MiB", "device MiB", "GPU", "power", "scaling", "verdict"]
        text += f"\n{trained_by(part[0])}; images/s of the loader alone, the step alone on synthetic views, and both "
        text += "together, with the median of the rounds' ratios (p20 to p80).\n\n"
        text += table(head, lines) + source(part) + conditions(part, "sweep.csv", plot_name(part[0]))
    return text + "\n"


def headline(rows: list[Row]) -> str:
    """The range of together / synthetic of each preset that was measured at several batch sizes."""
    text = ""
    for part in newest_runs(rows):
        ratios = sorted(float(row["ratio"]) for row in part if row["ratio"])
        if len(ratios) > 1:
            text += f"- Training runs at {ratios[0]:.3f} to {ratios[-1]:.3f} of the rate of its steps on synthetic "
            text += f"views, at batches of {part[0]['batch_size']} to {part[-1]['batch_size']} images "
            text += f"({trained_by(part[0]).partition(': ')[2]}).\n  " + conditions(part, "sweep.csv").lstrip()
    return text


def plot_name(row: Row) -> str:
    return f"sweep-{row['preset']}{'-' + row['world_size'] + '-processes' if row['world_size'] != '1' else ''}.png"


def plots(rows: list[Row], folder: Path) -> None:
    for part in newest_runs(rows):
        draw(part, folder / plot_name(part[0]))


def draw(rows: Sequence[Row], path: Path) -> None:
    """Throughput, its ratio, memory and stall over the batch size; batches that were not measured leave a gap."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    sizes = [int(row["batch_size"]) for row in rows]
    figure = Figure(figsize=(11, 7), layout="constrained")
    (speed, share), (memory, stall) = figure.subplots(2, 2)

    def values(name: str) -> list[float]:
        return [float(row[name]) if row[name] else float("nan") for row in rows]

    def line(axes: Any, name: str, label: str, **style: object) -> None:
        if any(row[name] for row in rows):
            axes.plot(sizes, values(name), label=label, **{"marker": "o"} | style)

    line(speed, "loader_images_per_s", "loader alone", color="C0")
    hollow = {"marker": "s", "markersize": 10, "markerfacecolor": "none"}
    line(speed, "synthetic_images_per_s", "step alone, synthetic views", color="0.4", **hollow)
    line(speed, "together_images_per_s", "both together", color="C3")
    speed.set(title="throughput", ylabel="source images/s", yscale="log")
    line(share, "ratio", "median of the rounds", color="C3")
    band = values("ratio_p20"), values("ratio_p80")
    share.fill_between(sizes, *band, color="C3", alpha=0.2, linewidth=0, label="p20 to p80")
    if at := [(int(row["batch_size"]), float(row["ratio"])) for row in rows if row["status"] == "noisy"]:
        share.plot(*zip(*at, strict=True), "o", color="C3", markerfacecolor="white", label="noisy: no verdict")
    share.axhline(ENOUGH, color="0.5", linestyle="--", linewidth=1, label=f"{ENOUGH}: from here on the model limits")
    share.set(title="together / synthetic", ylabel="ratio of the rates")
    line(memory, "peak_device_mib", "device")
    line(memory, "peak_host_mib", "host")
    memory.set(title="peak memory", ylabel="MiB")
    line(stall, "data_wait_percent", "time waiting for images", color="C3")
    stall.set(title="stall", ylabel="% of the step")
    for axes in (memory, stall):
        axes.set_ylim(0, 1.15 * max(1e-9, axes.get_ylim()[1]))
    low, high = speed.get_ylim()
    speed.yaxis.set_major_formatter(ScalarFormatter())
    speed.yaxis.set_minor_formatter(ScalarFormatter() if high / low < 30 else NullFormatter())
    for axes in (speed, share, memory, stall):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_xlabel("batch size, images")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            axes.legend(fontsize=9, frameon=False)
    figure.suptitle(plot_title(rows), fontsize=9)
    save_plot(figure, path)


if __name__ == "__main__":
    typer.run(main)
