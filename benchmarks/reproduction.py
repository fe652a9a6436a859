"""Put finished runs on record with what their encoders reach, seed by seed: README's table of reproduced results.

    python -m benchmarks.reproduction cifar10-small data/train data/test runs/seed-0 runs/seed-1 runs/seed-2

Each run's encoder, and freshly drawn weights of the same seed, go through tools/evaluate.py: kNN, logistic regression
on frozen features, and fine-tuning on few labels beside the same network trained on them from scratch. A row per run
goes to records/reproduction.csv; --published says what others report for the same.
"""

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.measure import append, environment
from benchmarks.training import training_s
from model.run_folder import read_rows
from tools.evaluate import app


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
        if json.loads((run / "status.json").read_text())["state"] != "done":
            raise typer.BadParameter(f"{run} is not done; a record is of finished runs", param_hint="RUNS")
    facts = {"published": published, **environment()}  # one `load` for all: what ran beside the scoring
    few = ["--percent", percent, "--epochs", epochs, "--eval-every", epochs, "--from-scratch"]
    more: dict[str, list[object]] = {
        "knn": ["--k", 200],
        "logistic": [word for each in l2 or () for word in ("--l2", each)],
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
            "training_s": round(training_s(speed, speed[-1]["step"]), 1),
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


if __name__ == "__main__":
    typer.run(main)
