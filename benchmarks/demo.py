"""Run the README's first command, `train.py demo`, and put on record what it prints and what it takes.

    python -m benchmarks.demo

One row goes to records/demo.csv: the lines that the README quotes, seconds on the clock, the accuracy that kNN reaches
on the bare pixels of the same images, and the size of the installed packages that SwiftCLR needs.
"""

import io
import json
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import typer
from PIL import Image

from benchmarks.tables import Row, conditions, number, percent
from model.probe import knn
from pipeline.demo import CLASSES, Samples, splits
from tools.records import ROOT, append, environment


def main(record: str = "demo.csv") -> None:
    """Run the demo once, from nothing."""
    where = environment()  # before the demo, so that `load` is that of others
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "runs/demo"
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "train.py", "demo", "--out", run], cwd=ROOT, capture_output=True, text=True
        )
        wall_s = time.perf_counter() - start
        lines = (done.stdout + done.stderr).splitlines()
        if done.returncode:
            raise SystemExit(f"train.py demo ended with exit code {done.returncode}: {lines[-1] if lines else ''}")
        where["threads"] = json.loads((run / "config.json").read_text())["cpu_threads"] or ""
    row = {"what": "demo", **quoted(lines), "wall_s": f"{wall_s:.1f}"}
    row |= {
        "pixels_knn": f"{pixels_knn():.4f}",
        "installed_gib": f"{installed_bytes(ROOT / 'pyproject.toml') / 2**30:.2f}",
    }
    append(record, [{**row, **where, "command": "train.py demo"}])
    typer.echo("\n".join(f"{name:14} {value}" for name, value in row.items()))


def quoted(lines: list[str]) -> dict[str, str]:
    """The lines of the demo's output that show what it does; RuntimeError where one is missing."""
    patterns = {
        "first_line": r"step 0/.*kNN",
        "log_line": r"step [1-9].*\| loss",
        "last_line": r"kNN accuracy .* after",
    }
    quotes = {}
    for name, pattern in patterns.items():
        quotes[name] = next((line for line in lines if re.match(pattern, line)), "")
        if not quotes[name]:
            raise RuntimeError(f"train.py demo printed no line like {pattern!r}")
    return quotes


def pixels_knn() -> float:
    """Accuracy of kNN on the demo's pixels themselves, as bank and queries are used for features."""

    def pixels(samples: Samples) -> tuple[torch.Tensor, torch.Tensor]:
        drawn, labels = zip(*samples, strict=True)
        arrays = [np.asarray(Image.open(io.BytesIO(png))).ravel() for png in drawn]
        return torch.tensor(np.stack(arrays)) / 127.5 - 1, torch.tensor(labels)

    both = dict(splits())
    return knn(*pixels(both["train"]), *pixels(both["test"]), num_classes=len(CLASSES))


def installed_bytes(project: Path) -> int:
    """Of the files of everything that a pyproject.toml asks for, and all that this needs, extras aside."""
    seen: set[str] = set()
    needed: list[str] = tomllib.loads(project.read_text())["project"]["dependencies"]
    total = 0
    while needed:
        name = re.split(r"[^A-Za-z0-9._-]", needed.pop())[0]
        if name.lower() in seen:
            continue
        seen.add(name.lower())
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # for another platform or Python
            continue
        needed += [requirement for requirement in package.requires or () if "extra ==" not in requirement]
        paths = (Path(str(package.locate_file(file))) for file in package.files or ())
        total += sum(path.stat().st_size for path in paths if path.is_file())
    return total


def block(rows: list[Row]) -> str:
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


if __name__ == "__main__":
    typer.run(main)
