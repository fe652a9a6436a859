"""Put a finished run on record: its kNN curve, its speed and where it ran, as rows and a picture.

    python -m benchmarks.training runs/cifar10 --name cifar10-cpu

Run it right after training, on the same machine and commit. It appends one row per kNN evaluation, or
one without, to records/training.csv and draws records/training-NAME.png (needs matplotlib: pip install -e '.[eval]').
"""

import json
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer

from model.run_folder import read_rows


def record(
    run: Annotated[Path, typer.Argument(help="Run folder of train.py.")],
    name: Annotated[str, typer.Option(help="What to call the run in the record.")],
) -> None:
    """Append a run to the record and draw its curves."""
    from benchmarks.measure import RECORDS, append, environment

    config = json.loads((run / "config.json").read_text())
    metrics, speed = (read_rows(run / file) for file in ("metrics.jsonl", "speed.jsonl"))
    if json.loads((run / "status.json").read_text())["state"] != "done":
        raise typer.BadParameter(f"{run} is not done; a record is of a finished run")
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
        {"step": row["step"], "knn_top1": row.get("knn", ""), "training_s": round(training_s(speed, row["step"]), 1)}
        for row in scored or metrics[-1:]  # a run for speed alone has one row without accuracy
    ]
    append("training.csv", [{**row, **facts} for row in rows])
    _draw(RECORDS / f"training-{name}.png", name, metrics, scored, facts)
    for row in rows:
        typer.echo(f"step {row['step']:>7}  {row['training_s']:>8.1f} s of training  kNN {row['knn_top1']}")
    typer.echo(f"{facts['images_per_s_median']:.0f} images/s on {facts['device']}")


def training_s(speed: list[dict[str, Any]], step: int) -> float:
    """Seconds of training alone up to `step`: a row's step time holds for the steps since the row before."""
    before = [0, *(row["step"] for row in speed)]
    rows = [(row, row["step"] - start) for start, row in zip(before, speed, strict=False) if row["step"] <= step]
    return sum(steps * row["step_ms"] / 1000 for row, steps in rows)


def _draw(
    path: Path, name: str, metrics: list[dict[str, Any]], scored: list[dict[str, Any]], facts: dict[str, Any]
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from benchmarks.measure import save_plot

    losses = [row for row in metrics if "loss" in row]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    left.plot([row["step"] for row in losses], [row["loss"] for row in losses], linewidth=0.7)
    left.set(xlabel="step", ylabel="NT-Xent")
    right.set(xlabel="step", ylabel="kNN top-1, %")
    if scored:
        right.plot([row["step"] for row in scored], [100 * row["knn"] for row in scored], marker="o")
        right.axhline(100 * scored[0]["knn"], linestyle=":", color="gray")
        right.annotate("random initialisation", (scored[-1]["step"], 100 * scored[0]["knn"]), ha="right", va="bottom")
    figure.suptitle(f"{name}: {facts['device']}, {facts['commit']}, {facts['date']}", fontsize=9)
    save_plot(figure, path, 110)


if __name__ == "__main__":
    typer.run(record)
