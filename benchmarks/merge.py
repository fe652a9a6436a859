"""Records that were measured elsewhere, into benchmarks/records/: what `.ci/gpu.py merge` does.

An archive holds records/NAME.csv and, of each run, runs/RUN/metrics.jsonl. All rows are checked before the first is
added; rows that stand in the record already are not added again. The tables and plots follow, and where one
thing was measured in several variants, the best is named: a default changes by hand.
"""

import csv
import gzip
import io
import json
import re
import tarfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from benchmarks import report
from benchmarks.training import draw
from tools.records import RECORDS, append, read

Row = dict[str, str]

RECORDED = ("lars", "step", "loss", "loss_tune", "loader", "sweep", "training")
SHARED = ("device", "torch", "commit", "date", "load", "command")  # columns that no row of theirs leaves empty
MACHINE_PATH = re.compile(r"(?:^|[\s='\"])(?:/|~/)[\w.-]")


def merge(archives: Sequence[Path], records: Path | None = None, pages: list[Path] | None = None) -> None:
    """Adds the rows of archives and writes the tables; ValueError, with nothing changed, where a row cannot stand."""
    records = (records or RECORDS).resolve()
    measured: dict[str, list[Row]] = defaultdict(list)
    runs: dict[str, bytes] = {}
    for archive in archives:
        for path, content in members(archive):
            if path.parts[0] == "records":
                measured[path.stem] += csv.DictReader(io.StringIO(content.decode(), newline=""))
            else:
                runs[path.parts[1]] = content
    known = {name: read(records / f"{name}.csv") for name in measured}
    if problems := [fault for name, rows in measured.items() for fault in faults(name, rows, known[name])]:
        raise ValueError("nothing was merged:\n  " + "\n  ".join(problems))
    for name, rows in measured.items():
        rows_new = new(rows, known[name])
        append(records / f"{name}.csv", rows_new)
        print(f"{name}.csv: {len(rows_new)} rows added, {len(rows) - len(rows_new)} were there")
    for row in measured["training"]:
        metrics = [json.loads(line) for line in runs[run_of(row)].splitlines()]
        draw(records / f"training-{row['run']}.png", row["run"], metrics, row)
    report.main(readme=pages, records=records)
    print("\n".join(["", "which won:", *winners(measured)]))


def members(archive: Path) -> Iterator[tuple[Path, bytes]]:
    """The records of an archive and the metrics of its runs. ValueError where it is none."""
    try:
        with tarfile.open(fileobj=io.BytesIO(gzip.decompress(archive.read_bytes()))) as tar:
            for member in tar:
                name = Path(member.name)
                wanted = name.match("records/*.csv") or name.match("runs/*/metrics.jsonl")
                if wanted and (file := tar.extractfile(member)):
                    yield name, file.read()
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise ValueError(f"{archive} is no archive of .ci/gpu.py: {error}") from error


def run_of(row: Row) -> str:
    """The name of the run folder of a row of training.csv."""
    return Path(row["command"].rpartition("--out ")[2].split()[0]).name


def faults(name: str, rows: Sequence[Row], known: Sequence[Row]) -> list[str]:
    """Why rows cannot stand in a record beside those known, a line each."""
    if name not in RECORDED:
        return [f"{name}.csv is no record of .ci/gpu.py; expected one of {', '.join(RECORDED)}"]
    found = []
    for number, row in enumerate(rows, 2):
        where = f"{name}.csv, line {number}"
        if None in row or None in row.values():
            found.append(f"{where} has not as many cells as the first line")
            continue
        if empty := [column for column in SHARED if not row.get(column)]:
            found.append(f"{where} says nothing of {', '.join(empty)}")
        if lost := [column for column in (known[-1] if known else ()) if column not in row]:
            found.append(f"{where} lacks {', '.join(lost)}, which the record has")
        paths = [value for value in row.values() if MACHINE_PATH.search(value)]
        found += [f"{where} holds a path of the machine that measured: {value!r}" for value in paths]
    return found


def new(rows: Iterable[Row], known: Sequence[Row]) -> list[Row]:
    """The rows that are not known, each once."""
    rows = list(rows)
    columns = dict.fromkeys(column for row in (*known[:1], *rows) for column in row)

    def cells(row: Row) -> tuple[str, ...]:
        return tuple(row.get(column, "") for column in columns)

    before = {cells(row) for row in known}
    return list({cells(row): row for row in rows if cells(row) not in before}.values())


def winners(measured: dict[str, list[Row]]) -> list[str]:
    """What was measured in variants, a line each: the best first, and where the default stands."""
    decoders = [row for row in measured.get("loader", ()) if row["what"] == "decoder"]
    shapes, steps = measured.get("loss_tune", []), measured.get("step", [])
    network = "depth", "size", "images", "layout", "precision", "bn"
    return [
        *ranked(shapes, ("what", "rows"), "shape", "median_ms", "shapes() of model/nt_xent_triton.py"),
        *ranked(decoders, ("size", "threads"), "hw_decoder_load", "images_per_s", "Encoding of pipeline/graph.py"),
        *ranked(steps, network, "mode", "median_ms", "eager; train.py has --compile and no CUDA graph"),
    ] or ["nothing was measured in variants"]


def ranked(rows: Iterable[Row], same: Sequence[str], variant: str, value: str, default: str) -> list[str]:
    """A line for all rows that agree in `same`: the variants and what each reached, the best first."""
    groups: dict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
    for row in rows:
        groups[tuple(row[name] for name in same)][row[variant]] = float(row[value])
    lines = []
    for key, reached in groups.items():
        if len(reached) > 1:
            order = sorted(reached, key=reached.__getitem__, reverse=value.endswith("per_s"))
            what = ", ".join(f"{name} {of}" for name, of in zip(same, key, strict=True))
            said = "; ".join(f"{name}: {reached[name]:g} {value}" for name in order)
            lines.append(f"{what}: {variant} {said} (default: {default})")
    return lines
