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

from benchmarks.measure import append, environment
from model.probe import knn
from pipeline.demo import CLASSES, Samples, splits

ROOT = Path(__file__).parents[1]


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
    found = {name: [line for line in lines if re.match(pattern, line)] for name, pattern in patterns.items()}
    for name, matches in found.items():
        if not matches:
            raise RuntimeError(f"train.py demo printed no line like {patterns[name]!r}")
    return {name: matches[0] for name, matches in found.items()}


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
    ask: list[str] = tomllib.loads(project.read_text())["project"]["dependencies"]
    total = 0
    while ask:
        name = re.split(r"[^A-Za-z0-9._-]", ask.pop())[0]
        if name.lower() in seen:
            continue
        seen.add(name.lower())
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # for another platform or Python
            continue
        ask += [need for need in found.requires or () if "extra ==" not in need]
        paths = (Path(str(found.locate_file(file))) for file in found.files or ())
        total += sum(path.stat().st_size for path in paths if path.is_file())
    return total


if __name__ == "__main__":
    typer.run(main)
