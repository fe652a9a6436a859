"""Bring the records into README.md, and draw them.

    python -m benchmarks.report            plots into benchmarks/records/, tables into README.md (plots need matplotlib)
    python -m benchmarks.report --check    writes nothing; exit code 1 where README.md is not what the records give

README.md holds pairs of lines, `<!-- report:NAME -->` and `<!-- /report -->`; what stands between them is written here
from benchmarks/records/NAME.csv, with its conditions. Where measurements were repeated, the newest run counts: the last
row, and those measured together with it. What has no record says nothing. A measured number anywhere else in README.md
fails the check too: it would have no record.
"""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.measure import RECORDS, read, save_plot
from tools.files import read_text, write_text

Row = dict[str, str]

README = RECORDS.parents[1] / "README.md"
BLOCK = re.compile(r"(<!-- report:(\w+) -->\n)(.*?)(<!-- /report -->)", re.DOTALL)
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.DOTALL | re.MULTILINE)
MEASURED = re.compile(r"\d[\d.,]* ?(?:ms|s|seconds|min|minutes|hours?|[KMGT]i?B|%|W|(?:images|views|img)/s)(?!\w)")


def main(
    check: Annotated[bool, typer.Option(help="only compare")] = False,
    readme: Annotated[Path, typer.Option(help="file with the blocks")] = README,
    records: Annotated[Path, typer.Option(help="folder of the CSVs and plots")] = RECORDS,
) -> None:
    """Write the blocks of README.md from the records, and draw the plots."""
    text = read_text(readme)
    blocks = [name for _, name, _, _ in BLOCK.findall(text)]
    if unknown := sorted(set(blocks) - set(BLOCKS)):
        raise typer.BadParameter(f"{readme} has blocks {unknown}; known are {sorted(BLOCKS)}", param_hint="--readme")
    if not text.count("<!-- report:") == text.count("<!-- /report -->") == len(blocks):
        raise typer.BadParameter(f"{readme} has a block that does not begin or does not end", param_hint="--readme")
    if check:
        if problems := faults(text, records):
            typer.echo("\n".join(problems))
            raise typer.Exit(1)
        return
    write_text(readme, filled(text, records))
    draw(records)


def filled(text: str, records: Path) -> str:
    """The text with every block as the records give it; a block whose record is missing is empty."""

    def fill(found: re.Match[str]) -> str:
        begin, name, _, end = found.groups()
        rows = read(records / f"{name}.csv")
        return f"{begin}{BLOCKS[name](rows) if rows else ''}{end}"

    return BLOCK.sub(fill, text)


def faults(text: str, records: Path) -> list[str]:
    """What a reader would be told that no record says: a line each."""
    found, now = [], filled(text, records)
    for (begin, _, old, _), (_, _, new, _) in zip(BLOCK.findall(text), BLOCK.findall(now), strict=True):
        if old != new:
            lines = itertools.zip_longest(old.split("\n"), new.split("\n"), fillvalue="")
            said, true = next((a, b) for a, b in lines if a != b)
            found.append(f"{begin.strip()} says {said!r}, the records {true!r}: run python -m benchmarks.report")
        for link in re.findall(r"\]\(benchmarks/records/([^)]*)\)", new):
            if not (records / link).exists():
                found.append(f"{begin.strip()} links to {link}, which is not there: run python -m benchmarks.report")
    for line in CODE.sub("", BLOCK.sub("", text)).splitlines():
        if number := MEASURED.search(line):
            found.append(f"{number[0]!r} comes from no record; bring it into a block: {line.strip()}")
    return found


# ------------------------------------------------------------------------------------------------------------ records


def newest(rows: Iterable[Row], keys: Sequence[str], each: Sequence[str] = ()) -> list[Row]:
    """Of every combination of `keys` the last row and those that were measured together with it, one per `each`."""
    rows = list(rows)

    def run(row: Row) -> list[str]:
        return [row[name] for name in ("device", "commit", "date", "load")]

    last = {tuple(row[key] for key in keys): run(row) for row in rows}
    kept: dict[tuple[str, ...], Row] = {}
    for row in rows:
        key = tuple(row[name] for name in keys)
        if run(row) == last[key]:
            kept[*key, *(row[name] for name in each)] = row
    return list(kept.values())


def parted(rows: Iterable[Row], *keys: str) -> list[list[Row]]:
    """Rows that agree in `keys`, together; the parts in the order of their first rows."""
    parts: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        parts.setdefault(tuple(row[key] for key in keys), []).append(row)
    return list(parts.values())


def by_number(rows: Iterable[Row], *keys: str) -> list[Row]:
    return sorted(rows, key=lambda row: [float(row[key]) for key in keys])


# ------------------------------------------------------------------------------------------------------------- tables


def number(text: str, unit: str = "") -> str:
    """Three digits, or all before the point; nothing for nothing."""
    if not text:
        return ""
    value = float(text)
    return (f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}") + unit


def percent(share: str) -> str:
    return f"{100 * float(share):.1f} %"


def over_seeds(rows: Sequence[Row], column: str) -> str:
    """Mean and standard deviation of a share."""
    values = [100 * float(row[column]) for row in rows]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread} %"


def times(value: str, base: str) -> str:
    """How many times `base`, of what both are."""
    return f"{float(value) / float(base):.2f} x" if value and base else ""


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Markdown; columns in which nothing stands are left out, single gaps are dashes."""
    lines = list(lines)
    shown = [i for i in range(len(header)) if any(line[i] for line in lines)]
    rows = [[header[i] for i in shown], ["---"] * len(shown), *([line[i] or "–" for i in shown] for line in lines)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def conditions(rows: Sequence[Row], record: str, plot: str = "") -> str:
    """One line under a table: on what, with what and when its rows were measured, and where they stand."""

    def all_of(name: str) -> str:
        return ", ".join(dict.fromkeys(row[name] for row in rows if row.get(name)))

    loads = sorted(float(row["load"]) for row in rows)
    load = f"{loads[0]:g}" if loads[0] == loads[-1] else f"{loads[0]:g} to {loads[-1]:g}"
    parts = [all_of("device"), f"driver {all_of('driver')}" if all_of("driver") else ""]
    parts += [all_of("processor") if all_of("driver") else ""]  # without a GPU it is the device
    parts += [f"threads {all_of('threads')}" if all_of("threads") else ""]
    parts += [f"the loader's {all_of('loader_threads')}" if all_of("loader_threads") else ""]
    parts += [f"load {load}", f"torch {all_of('torch')}"]
    parts += [f"DALI {all_of('dali')}", f"commit {all_of('commit')}", all_of("date")]
    link = f", [plot](benchmarks/records/{plot})" if plot else ""
    return f"\n{', '.join(part for part in parts if part)}; `{record}`{link}\n"


def demo(rows: list[Row]) -> str:
    """What the first command prints, and how long that takes."""
    row = rows[-1]
    return (
        f"\n```\n{row['first_line']}\n{row['log_line']}\n...\nencoder      runs/demo/encoder/encoder.safetensors\n"
        "checkpoints  runs/demo/checkpoints\nmetrics      runs/demo/metrics.jsonl\nviews        runs/demo/views.png\n"
        f"{row['last_line']}\n```\n\nIt took {number(row['wall_s'], ' s')}. It shows that the path works, not how good "
        "the method is: the patterns are drawings, not photographs, and kNN on their bare pixels already gives "
        f"{percent(row['pixels_knn'])}. The installed packages take {number(row['installed_gib'], ' GiB')}, "
        f"for torch and DALI come with CUDA.\n{conditions([row], 'demo.csv')}\n"
    )


def training(rows: list[Row]) -> str:
    """Each run: what it gained, how fast it was, and its command."""
    runs = parted(newest(rows, ["run"], ["step"]), "run")
    lines = []
    for run in runs:
        first, last = run[0], run[-1]
        minutes = f"after {float(last['training_s']) / 60:.0f} min, {last['step']} steps"
        gain = f"{percent(first['knn_top1'])} at random initialisation, " if first["knn_top1"] and len(run) > 1 else ""
        gain = f"{gain}{percent(last['knn_top1'])} {minutes}" if last["knn_top1"] else ""
        wait = number(last["data_wait_percent_median"], " %")
        lines.append([last["run"], gain, number(last["images_per_s_median"]), wait, number(last["peak_mib"])])
    head = ["run", "kNN accuracy", "images/s", "data_wait", "peak MiB"]
    text = "\n" + table(head, lines)
    for run in runs:
        text += f"\n{run[-1]['run']}: `{run[-1]['command']}`\n"
        text += conditions(run, "training.csv", f"training-{run[-1]['run']}.png")
    return text + "\n"


def reproduction(rows: list[Row]) -> str:
    """What encoders reach beside what is published: mean and standard deviation over the seeds."""
    lines, text = [], ""
    for part in parted(newest(rows, ["run"], ["seed"]), "run"):
        first = part[0]
        minutes = statistics.mean(float(row["training_s"]) for row in part) / 60
        what = [first["run"], f"{first['encoder']}, batch {first['batch_size']}, {first['epochs']} epochs"]
        ours = [
            f"{over_seeds(part, name)} ({over_seeds(part, without)})"
            for name, without in (("knn", "knn_random"), ("logistic", "logistic_random"), ("finetune", "scratch"))
        ]
        labels = f"{float(first['percent']):g} % of the labels"
        lines.append([*what, f"{minutes:.0f} min", str(len(part)), *ours, labels, first["published"]])
        text += f"\n{first['run']}: `{first['command']}`\n" + conditions(part, "reproduction.csv")
    head = ["run", "encoder", "training", "seeds", "kNN (random weights)", "logistic (random weights)"]
    head += ["fine-tuned (from scratch)", "on", "published"]
    return "\n" + table(head, lines) + text + "\n"


def ablation(rows: list[Row]) -> str:
    """Every grid of tools/ablate.py: its cells, the best by logistic regression first."""
    text = ""
    for part in parted(rows, "grid", "settings", "data"):
        cells = parted(part, "cell")
        cells.sort(key=lambda cell: -statistics.mean(float(row["logistic"]) for row in cell))
        lines = [
            [cell[0]["cell"], str(len(cell)), *(over_seeds(cell, name) for name in ("logistic", "knn"))]
            for cell in cells
        ]
        first = part[0]
        text += f"\n`tools/ablate.py {first['grid']}` on {first['data']}, `{first['settings']}`:\n\n"
        text += table(["cell", "seeds", "logistic", "kNN"], lines)
        text += conditions(part, "ablation.csv", f"ablation-{first['grid']}.png")
    return text + "\n"


def loss(rows: list[Row]) -> str:
    """Forward and backward over the rows, on each device with as many threads as were measured."""
    text = "\nNT-Xent, forward and backward: milliseconds, and MiB at the peak; compare within a line.\n"
    for part in newest_losses(rows, most_threads=True):
        both = [row for row in part if row["mode"] == "forward+backward" and "limit" not in row["implementation"]]
        sizes = parted(both, "rows")
        names = [row["implementation"] for row in sizes[-1]]
        lines = []
        for size in sizes:
            found = {row["implementation"]: row for row in size}
            cells = [
                f"{number(found[name]['median_ms'], ' ms')}, {number(found[name]['peak_mib'], ' MiB')}"
                if name in found
                else ""
                for name in names
            ]
            lines.append([size[0]["rows"], *cells, size[0]["load"]])
        text += "\n" + table(["rows", *names, "load"], lines) + conditions(both, "loss.csv", loss_plot(both[0]))
    return text + "\n"


def newest_losses(rows: list[Row], *, most_threads: bool = False) -> list[list[Row]]:
    """The newest rows of each device and number of threads, the rows of z ascending."""
    keys = ["device", "threads", "dim", "temperature"]
    parts = parted(by_number(newest(rows, [*keys, "rows"], ["implementation", "mode"]), "rows"), *keys)
    if most_threads:
        most = {part[0]["device"]: part for part in sorted(parts, key=lambda part: int(part[0]["threads"]))}
        return list(most.values())
    return parts


def loss_plot(row: Row) -> str:
    return f"loss-{'cuda' if row['driver'] else 'cpu-' + row['threads'] + '-threads'}.png"


def loader(rows: list[Row]) -> str:
    """Loaders of the same images, and the stages of ours."""
    text = ""
    for part in newest_loaders(rows):
        peers, stages = ([row for row in part if row["what"] == what] for what in ("loader", "stage"))
        first = part[0]
        title = f"Two views of {first['size']} px from {first['data']}, views {first['views']}, loaders alone"
        if peers:
            ours = peers[0]["cpu_ms"]
            lines = [
                [
                    f"{row['implementation']} {row['version']}".strip(),
                    *map(number, (row["images_per_s"], row["cpu_ms"])),
                    times(row["cpu_ms"], ours),
                ]
                for row in peers
            ]
            files = first.get("peers_files") or "as they are, perhaps compressed where the shards are not"
            text += f"\n{title}; the others, but for webdataset, read the same images in class folders: {files}.\n\n"
            text += table(["loader", "images/s", "CPU ms per image", "of ours"], lines)
        if stages:
            counts = parted(by_number(stages, "threads"), "threads")
            lines = []
            for name in dict.fromkeys(row["implementation"] for row in stages):
                found = [row for count in counts for row in count if row["implementation"] == name]
                lines.append([name, *(f"{number(row['images_per_s'])}, {number(row['cpu_ms'])} ms" for row in found)])
            head = [
                "stage, with those above",
                *(f"{n} thread{'s' * (n != '1')}" for n in (count[0]["threads"] for count in counts)),
            ]
            text += f"\n{title}, by stages (the last stands alone): images/s, CPU ms per image.\n\n"
            text += table(head, lines)
        text += conditions(part, "loader.csv", loader_plot(first))
    return text + "\n" if text else ""


def newest_loaders(rows: list[Row]) -> list[list[Row]]:
    """The newest run of each size on CPU and GPU: one file, one plot."""
    timed = [row | {"on": "cuda" if row["driver"] else "cpu"} for row in rows if row["cpu_ms"]]
    return parted(newest(timed, ["on", "size"], ["what", "implementation", "threads"]), "on", "size")


def loader_plot(row: Row) -> str:
    return f"loader-{'cuda' if row['driver'] else 'cpu'}-{row['size']}.png"


def step(rows: list[Row]) -> str:
    """The fastest layout and mode of every network, batch and precision."""
    keys = ["device", "threads", "depth", "width", "size", "images", "world_size"]
    found = newest(rows, keys, ["layout", "mode", "precision", "bn"])
    text = "\nThe step alone, on synthetic views: the fastest layout and mode of each precision.\n"
    for part in parted(found, "device", "threads"):
        lines = []
        for same in parted(part, *keys, "precision", "bn"):
            row = min(same, key=lambda row: float(row["median_ms"]))
            network = f"ResNet-{row['depth']}" + (f", width {row['width']}" if float(row["width"]) != 1 else "")
            images = f"{row['images']} x {row['world_size']}" if row["world_size"] != "1" else row["images"]
            kind = f"{row['precision']}, {row['layout']}, {row['mode']}"
            kind += f", {row['bn']} BatchNorm" if row["world_size"] != "1" else ""
            cells = [f"{network}, {row['size']} px", images, kind, number(row["median_ms"])]
            cells += [number(row[f"{name}_ms"]) for name in ("forward", "loss", "backward", "optimizer")]
            lines.append([*cells, *(number(row[name]) for name in ("views_per_s", "peak_extra_mib", "mfu"))])
        head = ["network", "images", "fastest", "ms", "forward", "loss", "backward", "LARS", "views/s", "MiB", "mfu"]
        text += "\n" + table(head, lines) + conditions(part, "step.csv")
    return text + "\n"


def lars(rows: list[Row]) -> str:
    """One step of each optimizer: what issuing it costs the host, and what it costs in full."""
    found = newest(rows, ["device", "depth", "size"], ["implementation"])
    text = ""
    for part in parted(found, "device", "depth"):
        at = {(row["implementation"], row["size"]): row for row in part}
        lines = []
        for name in dict.fromkeys(row["implementation"] for row in part):
            host, real = at.get((name, "host"), {}), at.get((name, "real"), {})
            base = at.get(("ours", "real"), {}).get("median_ms", "")
            cells = [number(host.get("median_ms", "")), number(real.get("median_ms", ""))]
            any_of = real or host
            lines.append(
                [name, *cells, times(real.get("median_ms", ""), base), any_of["calls"], any_of["waits"]]
                + [any_of["kernels"]]
            )
        head = ["optimizer", "host ms", "ms", "of ours", "calls", "waits", "kernels"]
        text += f"\nOne step on ResNet-{part[0]['depth']} and its head: issued to parameters of a few numbers (host), "
        text += "and in full.\n\n" + table(head, lines) + conditions(part, "lars.csv")
    return text + "\n"


def sweep(rows: list[Row]) -> str:
    """Each preset over the batch sizes."""
    from benchmarks.sweep import ENOUGH

    text = ""
    for part in newest_sweeps(rows):
        lines = []
        for row in part:
            speeds = [number(row[f"{name}_images_per_s"]) for name in ("loader", "synthetic", "together")]
            ratio, low, high = (row[name] and f"{float(row[name]):.3f}" for name in ("ratio", "ratio_p20", "ratio_p80"))
            ratio = ratio and f"{ratio} ({low} to {high}, {row['rounds']} rounds)"
            steps = [number(row["data_wait_percent"], " %"), number(row["step_ms_p50"]), number(row["step_ms_p95"])]
            sizes = [number(row["peak_host_mib"]), number(row["peak_device_mib"])]
            gpu = [number(row["gpu_utilisation_percent"], " %"), number(row["gpu_power_w"], " W")]
            said = row["verdict"] or row["status"]
            if ratio and not row.get("ratio_unknown") and float(low) < ENOUGH < float(high):
                said = "noisy"  # a row of before it was recorded how well its ratio is known
            lines.append([row["batch_size"], row["micro_batch"], *speeds, ratio, *steps, *sizes, *gpu, said])
        head = ["batch", "micro-batch", "loader", "synthetic", "together", "together / synthetic", "data_wait"]
        head += ["step ms", "p95", "host MiB", "device MiB", "GPU", "power", "verdict"]
        text += (
            f"\n{kind(part[0])}; images/s of the loader alone, the step alone on synthetic views, and both together, "
        )
        text += "with the median of the rounds' ratios (p20 to p80).\n\n"
        text += table(head, lines) + source(part) + conditions(part, "sweep.csv", sweep_plot(part[0]))
    return text + "\n"


def source(rows: Sequence[Row]) -> str:
    """The images of a sweep's rows, and the command that measured them, batch sizes apart."""
    data = dict.fromkeys(row["data"] for row in rows if row.get("data"))
    times = sorted({int(row["repeats"]) for row in rows if row.get("repeats")})
    spread = " to ".join(map(str, dict.fromkeys((times[0], times[-1])))) if times else ""
    listed = f", listed {spread} times, so in memory" if times else ""
    commands = dict.fromkeys(re.sub(r" --batch-size \d+", "", row["command"]) for row in rows)
    return f"\n{' and '.join(data) or 'Images as in the command'}{listed}: `{'`, `'.join(commands)}`\n"


def kind(row: Row) -> str:
    """What a row of the sweep trained."""
    processes = f" on {row['world_size']} processes" if row["world_size"] != "1" else ""
    precision = row["precision"].replace("no", "fp32")
    return f"`{row['preset']}`: {row['encoder']} at {row['size']} px, {precision}{processes}"


def newest_sweeps(rows: list[Row], *each: str) -> list[list[Row]]:
    """The newest rows of every preset, number of processes and batch size, of what each was last run on and with."""
    found = []
    for part in parted(rows, "preset", "world_size"):
        names = [name for name in ("device", "encoder", "size", "precision", "data") if name in part[-1]]
        alike = [row for row in part if all(row[name] == part[-1][name] for name in names)]
        found.append(by_number(newest(alike, ["batch_size"], each), "batch_size"))
    return found


def sweep_plot(row: Row) -> str:
    return f"sweep-{row['preset']}{'-' + row['world_size'] + '-processes' if row['world_size'] != '1' else ''}.png"


def against(rows: list[Row]) -> str:
    """The same model and images through the usual loaders and losses."""
    text = ""
    for part in newest_sweeps(rows, "what"):
        lines = []
        for row in part:
            ratio = row["status"]
            if row["ratio_to_ours"]:
                ratio, low, high = (f"{float(row[name]):.2f}" for name in ("ratio_to_ours", "ratio_p20", "ratio_p80"))
                ratio = f"{ratio} x ({low} to {high}{', noisy' if row['status'] == 'noisy' else ''})"
            values = [number(row[name]) for name in ("images_per_s", "cpu_ms_per_image", "peak_host_mib")]
            values.insert(1, ratio)
            lines.append([row["batch_size"], row["what"], *values])
        text += f"\n{kind(part[0])}; the same model and images through other loaders and losses; the median "
        text += f"of {part[0]['rounds']} rounds' ratios (p20 to p80), and processor time with workers.\n\n"
        text += table(["batch", "training with", "images/s", "of ours", "CPU ms per image", "host MiB"], lines)
        text += source(part) + conditions(part, "against.csv", against_plot(part[0]))
    return text + "\n"


def against_plot(row: Row) -> str:
    return f"against-{row['preset']}.png"


def scaling(rows: list[Row]) -> str:
    """How far the scaling model is from what processes measured: predicted here from the pieces on record."""
    from benchmarks.scaling import pieces_of, predict

    text = "\nThe scaling model against processes of one thread each, which share the cores and talk through gloo. "
    text += "Predicted is what talking adds: compute is that of as many processes that do not talk.\n"
    for part in parted(newest(rows, ["device", "images", "world_size"]), "device", "images"):
        lines = []
        for row in by_number(part, "world_size"):
            processes = int(row["world_size"])
            predicted_ms = f"{1e3 * predict(pieces_of(row), processes * int(row['images']), processes).step_s}"
            values = [number(row["step_ms"]), number(predicted_ms), times(predicted_ms, row["step_ms"])]
            lines.append([row["world_size"], row["images"], *values])
        head = ["processes", "images each", "measured ms", "predicted ms", "predicted / measured"]
        text += "\n" + table(head, lines) + conditions(part, "scaling.csv")
    return text + "\n"


BLOCKS: dict[str, Callable[[list[Row]], str]] = {
    "demo": demo,
    "training": training,
    "reproduction": reproduction,
    "ablation": ablation,
    "sweep": sweep,
    "against": against,
    "loader": loader,
    "loss": loss,
    "step": step,
    "lars": lars,
    "scaling": scaling,
}


# -------------------------------------------------------------------------------------------------------------- plots


def draw(records: Path) -> None:
    """Every plot that a block links to, except those of finished runs, which benchmarks/training.py draws."""
    for part in newest_sweeps(read(records / "sweep.csv")):
        draw_sweep(part, records / sweep_plot(part[0]))
    for part in newest_sweeps(read(records / "against.csv"), "what"):
        draw_against(part, records / against_plot(part[0]))
    if losses := read(records / "loss.csv"):
        from benchmarks.loss import plot as plot_losses

        for part in newest_losses(losses):
            plot_losses(part, records / loss_plot(part[0]))
    if loaders := read(records / "loader.csv"):
        from benchmarks.loader import plot as plot_loaders

        for part in newest_loaders(loaders):
            if any(row["what"] == "stage" for row in part):
                plot_loaders([row | {"threads": int(row["threads"])} for row in part], records / loader_plot(part[0]))


def draw_sweep(rows: Sequence[Row], path: Path) -> None:
    """Throughput, its ratio, memory and stall over the batch size; batches that were not measured leave a gap."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    from benchmarks.sweep import ENOUGH

    sizes = [int(row["batch_size"]) for row in rows]
    figure = Figure(figsize=(11, 7), layout="constrained")
    (speed, share), (memory, stall) = figure.subplots(2, 2)

    def values(name: str) -> list[float]:
        return [float(row[name]) if row[name] else float("nan") for row in rows]

    def line(axes: object, name: str, label: str, **style: object) -> None:
        if any(row[name] for row in rows):
            axes.plot(sizes, values(name), label=label, **{"marker": "o"} | style)  # type: ignore[attr-defined]

    line(speed, "loader_images_per_s", "loader alone", color="C0")
    hollow = {"marker": "s", "markersize": 10, "markerfacecolor": "none"}
    line(speed, "synthetic_images_per_s", "step alone, synthetic views", color="0.4", **hollow)
    line(speed, "together_images_per_s", "both together", color="C3")
    speed.set(title="throughput", ylabel="source images/s", yscale="log")
    line(share, "ratio", "median of the rounds", color="C3")
    share.fill_between(
        sizes, values("ratio_p20"), values("ratio_p80"), color="C3", alpha=0.2, linewidth=0, label="p20 to p80"
    )
    noisy = [row["status"] == "noisy" for row in rows]
    if any(noisy):
        at = [(size, ratio) for size, ratio, is_so in zip(sizes, values("ratio"), noisy, strict=True) if is_so]
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
    speed.yaxis.set_major_formatter(ScalarFormatter())
    speed.yaxis.set_minor_formatter(ScalarFormatter() if spans(speed.get_ylim()) < 30 else NullFormatter())
    for axes in (speed, share, memory, stall):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_xlabel("batch size, images")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            axes.legend(fontsize=9, frameon=False)
    figure.suptitle(title(rows), fontsize=9)
    save_plot(figure, path, 120)
    typer.echo(f"plot: {path.name}")


def spans(limits: tuple[float, float]) -> float:
    return limits[1] / limits[0]


def draw_against(rows: Sequence[Row], path: Path) -> None:
    """Images per second of each contestant, batch by batch."""
    from matplotlib.figure import Figure

    sizes = parted(rows, "batch_size")
    before = [sum(len(size) for size in sizes[:i]) for i in range(len(sizes))]
    places = [0.6 * i + before[i] + j for i, size in enumerate(sizes) for j in range(len(size))]
    figure = Figure(figsize=(8, 1.2 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    colours = ["C3" if row["what"] == rows[0]["what"] else "0.7" for row in rows]
    bars = axes.barh(places, [float(row["images_per_s"] or 0) for row in rows], 0.8, color=colours)
    axes.bar_label(bars, [f" {told(row)}" for row in rows], fontsize=8)
    axes.set_yticks(places, [f"{row['what']}, batch {row['batch_size']}" for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.35)
    axes.set(xlabel="source images/s in training, and the median of the rounds' ratios to ours")
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title(rows), fontsize=8)
    save_plot(figure, path, 120)
    typer.echo(f"plot: {path.name}")


def told(row: Row) -> str:
    """A contestant's rate, its ratio to ours, and what is wrong with either."""
    parts = [number(row["images_per_s"]), f"{float(row['ratio_to_ours']):.2f} x" if row["ratio_to_ours"] else ""]
    parts.append(row["status"] if row["status"] != "ok" else "")
    return ", ".join(part for part in parts if part)


def title(rows: Sequence[Row]) -> str:
    first = rows[0]
    return (
        f"{kind(first).replace('`', '')}\n{first['device']}, load {first['load']} before, torch {first['torch']}, DALI "
        f"{first['dali']}, {first['commit']}, {first['date']}"
    )


if __name__ == "__main__":
    typer.run(main)
