"""Measurements on record: rows of a CSV, with what each was measured on.

environment(device) -> dict      GPU, processor, driver, versions, command, commit, date
append(record, rows)             add rows to a CSV; rows on record are never edited
read(record) -> rows             all rows of a CSV
can_plot()                       whether matplotlib is installed
save_plot(figure, path)          write a matplotlib figure
training_seconds(speed, step)    time of training alone, from the rows of a run's speed.jsonl

A record is named by its file in benchmarks/records/, or in the folder SWIFTCLR_RECORDS, or by a path.
"""

import csv
import datetime
import io
import itertools
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tools import files

ROOT = Path(__file__).resolve().parents[1]
RECORDS = Path(os.environ.get("SWIFTCLR_RECORDS") or ROOT / "benchmarks" / "records")


def environment(device: str = "") -> dict[str, str]:
    """The conditions of a measurement: columns that all records share.

    device  "cuda" or "cpu", where it was measured; default: the GPU if there is one, as train.py chooses.
    """
    import torch

    gpu = driver = ""
    program = Path(sys.argv[0]).resolve()
    if (device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cuda":
        gpu = torch.cuda.get_device_name()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
    return {
        "device": gpu or _processor(),
        "driver": driver,
        "threads": str(torch.get_num_threads()),
        "load": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "dali": _version("nvidia-dali-cuda130") or _version("nvidia-dali-cuda120"),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "command": shlex.join([f"{program.parent.name}.{program.stem}", *sys.argv[1:]]),
    }


def append(record: Path | str, rows: Sequence[Mapping[str, object]]) -> None:
    """Add rows to a record. A new column goes to the end and is empty in older rows."""
    path, older = RECORDS / record, read(record)
    columns = list(dict.fromkeys(itertools.chain(*older[:1], *rows)))
    path.parent.mkdir(parents=True, exist_ok=True)
    if rows and older and columns == list(older[0]):
        files.append(path, _csv(columns, rows).encode())
    elif rows:
        files.write_text(path, _csv(columns, [dict(zip(columns, columns, strict=True)), *older, *rows]))


def _csv(columns: list[str], rows: Iterable[Mapping[str, object]]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, columns, restval="").writerows(rows)
    return text.getvalue()


def read(record: Path | str) -> list[dict[str, str]]:
    """All rows of a record; none if the file does not exist."""
    path = RECORDS / record
    if not path.exists():
        return []
    with files.open_text(path, newline="") as file:
        return list(csv.DictReader(file))


def can_plot() -> bool:
    """Whether matplotlib is installed; says so if it is not."""
    installed = find_spec("matplotlib") is not None
    if not installed:
        print("matplotlib is not installed and nothing is drawn: python -m benchmarks.report draws what is on record")
    return installed


def save_plot(figure: Any, path: Path, dpi: int = 120) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as new:
        figure.savefig(new, dpi=dpi, format=path.suffix[1:])
    print(f"plot: {path}")


def training_seconds(speed: Sequence[Mapping[str, Any]], step: int) -> float:
    """Seconds of training alone up to `step`: each row's step time holds for the steps since the row before."""
    before = [0, *(row["step"] for row in speed)]
    rows = [(row, row["step"] - start) for start, row in zip(before, speed, strict=False) if row["step"] <= step]
    return float(sum(steps * row["step_ms"] / 1000 for row, steps in rows))


def _processor() -> str:
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
        unit = ", AMX" if any("amx_bf16" in line for line in lines) else ""
    except (OSError, StopIteration):
        name, unit = platform.machine(), ""
    return f"{name}, {cores} cores{unit}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    """The checkout's commit, with + if files differ from it, or SWIFTCLR_COMMIT. Raises RuntimeError without both."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    written = ("benchmarks/records", "benchmarks/README.md", "README.md")  # by the benchmarks themselves
    try:
        changed = git("status", "--porcelain", "-uno", "--", ":/", *(f":(top,exclude){path}" for path in written))
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError) as error:
        if named := os.environ.get("SWIFTCLR_COMMIT"):
            return named
        raise RuntimeError(
            f"a record names the commit that was measured, but git did not say it ({error}): set SWIFTCLR_COMMIT to "
            "the commit of this code"
        ) from error
