"""Put a finished run on record: its kNN curve, its speed and where it ran, as rows and a plot.

    python -m benchmarks.training runs/cifar10 --name cifar10-cpu

Run it right after training, on the same machine and commit. It appends one row per kNN evaluation, or one row without,
to records/training.csv and draws records/training-NAME.png (needs matplotlib: pip install -e '.[eval]').
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.tables import Row, conditions, grouped, newest, number, percent, table
from model.run_folder import read_rows
from tools.records import RECORDS, append, can_plot, environment, save_plot, training_seconds


def main(
    run: Annotated[Path, typer.Argument(help="run folder of train.py")],
    name: Annotated[str, typer.Option(help="what to call the run in the record")],
) -> None:
    """Append a run to the record and draw its curves."""
    check_finished(run)
    config = json.loads((run / "config.json").read_text())
    metrics, speed = (read_rows(run / file) for file in ("metrics.jsonl", "speed.jsonl"))
    scored = [row for row in metrics if "knn" in row]
    facts = {
        "run": name,
        "batch_size": config["batch_size"],
        "images_per_s_median": statistics.median(row["images_per_s"] for row in speed),
        "data_wait_percent_median": statistics.median(row["data_wait_percent"] for row in speed),
        "peak_mib": max(row["peak_mib"] for row in speed),
        **environment(),
        "command": config["command"],
        "threads": config["cpu_threads"] or "",
    }
    rows = [
        {
            "step": row["step"],
            "knn_top1": row.get("knn", ""),
            "training_s": round(training_seconds(speed, row["step"]), 1),
        }
        for row in scored or metrics[-1:]  # a run for speed alone has one row without accuracy
    ]
    append("training.csv", [{**row, **facts} for row in rows])
    if can_plot():
        draw(RECORDS / f"training-{name}.png", name, metrics, facts)
    for row in rows:
        typer.echo(f"step {row['step']:>7}  {row['training_s']:>8.1f} s of training  kNN {row['knn_top1']}")
    typer.echo(f"{facts['images_per_s_median']:.0f} images/s on {facts['device']}")


def check_finished(run: Path) -> None:
    """Raises typer.BadParameter for a run that has not ended: a record is of finished runs."""
    state = json.loads((run / "status.json").read_text())["state"]
    if state != "done":
        raise typer.BadParameter(f"{run} is {state}, not done; only a finished run goes on record")


def draw(path: Path, name: str, metrics: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
    """The loss and kNN accuracy over the steps."""
    from matplotlib.figure import Figure

    losses, scored = ([row for row in metrics if column in row] for column in ("loss", "knn"))
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([row["step"] for row in losses], [row["loss"] for row in losses], linewidth=0.7)
    left.set(xlabel="step", ylabel="NT-Xent")
    right.set(xlabel="step", ylabel="kNN top-1, %")
    if scored:
        right.plot([row["step"] for row in scored], [100 * row["knn"] for row in scored], marker="o")
        right.axhline(100 * scored[0]["knn"], linestyle=":", color="gray")
        right.annotate("random initialisation", (scored[-1]["step"], 100 * scored[0]["knn"]), ha="right", va="bottom")
    figure.suptitle(f"{name}: {facts['device']}, {facts['commit']}, {facts['date']}", fontsize=9)
    save_plot(figure, path, 110)


def block(rows: list[Row]) -> str:
    """Each run: what it gained, how fast it was, and its command."""
    runs = grouped(newest(rows, ["run"], ["step"]), "run")
    lines, text = [], ""
    for run in runs:
        first, last = run[0], run[-1]
        gain = ""
        if last["knn_top1"]:
            before = f"{percent(first['knn_top1'])} at random initialisation, " if len(run) > 1 else ""
            minutes = f"after {float(last['training_s']) / 60:.0f} min, {last['step']} steps"
            gain = f"{before}{percent(last['knn_top1'])} {minutes}"
        wait = number(last["data_wait_percent_median"], " %")
        lines.append([last["run"], gain, number(last["images_per_s_median"]), wait, number(last["peak_mib"])])
        text += f"\n{last['run']}: `{last['command']}`\n"
        text += conditions(run, "training.csv", f"training-{last['run']}.png")
    head = ["run", "kNN accuracy", "images/s", "data_wait", "peak MiB"]
    return "\n" + table(head, lines) + text + "\n"


if __name__ == "__main__":
    typer.run(main)
