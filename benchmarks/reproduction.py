"""Put finished runs on record with what their encoders reach, seed by seed: README's table of reproduced results.

    python -m benchmarks.reproduction cifar10-small data/train data/test runs/seed-0 runs/seed-1 runs/seed-2

Each run's encoder, and freshly drawn weights of the same seed, go through tools/evaluate.py: kNN, logistic regression
on frozen features, and fine-tuning on few labels beside the same network trained on them from scratch. A row per run
goes to records/reproduction.csv; --published says what others report for the same.
"""

import json
import statistics
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.tables import Row, conditions, grouped, newest, over_seeds, table
from benchmarks.training import check_finished
from model.run_folder import read_rows
from tools.evaluate import app
from tools.records import append, environment, training_seconds


def main(
    name: Annotated[str, typer.Argument(help="what to call these runs in the record")],
    train: Annotated[Path, typer.Argument(help="labelled shards to learn classifiers from")],
    test: Annotated[Path, typer.Argument(help="labelled shards to score")],
    runs: Annotated[list[Path], typer.Argument(help="finished run folders of train.py, which differ in their seed")],
    published: Annotated[str, typer.Option(help="accuracy that others report for it, and who")] = "",
    percent: Annotated[float, typer.Option(help="of the labels, to fine-tune on")] = 1.0,
    epochs: Annotated[int, typer.Option(help="of fine-tuning; the paper's 60 for 1 %")] = 60,
    l2: Annotated[list[float] | None, typer.Option(help="tried for logistic regression; default evaluate.py's")] = None,
    record: Annotated[str, typer.Option(help="CSV in benchmarks/records/, or a path")] = "reproduction.csv",
) -> None:
    """Score every run by every protocol; a row each."""
    configs = [json.loads((run / "config.json").read_text()) for run in runs]
    seeds = [config["seed"] for config in configs]
    if len(set(seeds)) < len(seeds):
        raise typer.BadParameter(f"runs of the same seed are no repetitions: seeds {seeds}", param_hint="RUNS")
    for run in runs:
        check_finished(run)
    facts = {"published": published, **environment()}  # one `load` for all: what ran beside the scoring
    few = ["--percent", percent, "--epochs", epochs, "--eval-every", epochs, "--from-scratch"]
    more: dict[str, list[object]] = {
        "knn": ["--k", 200],
        "logistic": [word for value in l2 or () for word in ("--l2", value)],
    }
    for run, config in zip(runs, configs, strict=True):
        sets = (run, train, test, "--seed", config["seed"])
        tuned = evaluate("finetune", *sets, *few)["scores"]
        speed = read_rows(run / "speed.jsonl")
        row = {
            "run": name,
            "seed": config["seed"],
            "data": f"{train.name}, {test.name}",
            "encoder": f"ResNet-{config['depth']}" + (f", width {config['width']:g}" if config["width"] != 1 else ""),
            "batch_size": config["batch_size"],
            "epochs": config["epochs"],
            "training_s": round(training_seconds(speed, speed[-1]["step"]), 1),
            "percent": percent,
            "finetune": tuned["pre-trained"]["top1"],
            "scratch": tuned["from scratch"]["top1"],
        }
        for kind, options in more.items():
            row[kind], row[f"{kind}_random"] = (
                next(iter(evaluate(kind, *sets, *options, *weights)["scores"].values()))["top1"]
                for weights in ([], ["--random-init"])
            )
        conditions = {**facts, "command": config["command"], "threads": config["cpu_threads"] or ""}
        append(record, [{**row, **conditions}])
        scores = "knn", "logistic", "finetune", "scratch", "knn_random", "logistic_random"
        typer.echo(f"{run}: " + ", ".join(f"{key} {100 * row[key]:.2f} %" for key in scores))


def evaluate(*words: object) -> dict[str, Any]:
    """What tools/evaluate.py appends to its results. Raises typer.Exit where it fails; it has said why."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.jsonl"
        if code := app([*map(str, words), "--results", str(results)], standalone_mode=False):
            raise typer.Exit(code)
        return dict(json.loads(results.read_text()))


def block(rows: list[Row]) -> str:
    """What encoders reach beside what is published: mean and standard deviation over the seeds."""
    lines, text = [], ""
    for part in grouped(newest(rows, ["run"], ["seed"]), "run"):
        first = part[0]
        minutes = statistics.mean(float(row["training_s"]) for row in part) / 60
        setting = f"{first['encoder']}, batch {first['batch_size']}, {first['epochs']} epochs"
        scores = [
            f"{over_seeds(part, name)} ({over_seeds(part, baseline)})"
            for name, baseline in (("knn", "knn_random"), ("logistic", "logistic_random"), ("finetune", "scratch"))
        ]
        labels = f"{float(first['percent']):g} % of the labels"
        cells = [first["run"], setting, f"{minutes:.0f} min", str(len(part)), *scores, labels, first["published"]]
        lines.append(cells)
        text += f"\n{first['run']}: `{first['command']}`\n" + conditions(part, "reproduction.csv")
    head = ["run", "encoder", "training", "seeds", "kNN (random weights)", "logistic (random weights)"]
    head += ["fine-tuned (from scratch)", "on", "published"]
    return "\n" + table(head, lines) + text + "\n"


if __name__ == "__main__":
    typer.run(main)
