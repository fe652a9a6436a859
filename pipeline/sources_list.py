"""The images that a text file names, one a line: PATH, or PATH and LABEL."""

import csv
import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from pipeline.entries import (
    Tally,
    index_labels,
    is_image,
    label_fault,
    places,
    read_classes,
    read_text,
)
from pipeline.shards import DatasetError, Sample
from pipeline.sources import Source, source_name

LOOKED_AT = 100  # lines that decide how PATH and LABEL are parted


def file_list(file: Path, root: Path | None = None, class_list: Path | None = None) -> Source:
    """The images of a list: every line has PATH, or every line PATH and LABEL; empty lines do not count.

    What parts them is the same in the whole file: a tab if there is any; else a comma (as in CSV, so that a path with a
    comma is quoted), the last blank, the first blank or nothing, whichever makes existing files of most of the first
    100 paths. Where that does not decide, a comma does; else a blank, unless the last words look like images.
    A header is passed over: a first line whose path does not exist and has no image's suffix, other than the next one.
    A file that is named again is passed over, unless its label is another one.

    root        folder that the paths start from; None: that of the list.
    class_list  text file of class names, one a line, index = label. None: whole numbers as labels are indices and name
                their classes themselves, other labels are names, sorted.
    Raises DatasetError naming the first line that does not fit. What is missing is left out when its turn comes.
    """
    text = read_text(file)
    lines = [(number, line.strip("\n")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise DatasetError(f"{file} is empty, expected one PATH, or PATH and LABEL, a line")
    root = file.parent if root is None else root
    tally = Tally()
    rows = _rows(file, lines, root)
    if _is_header(rows, root):
        number, *fields = rows.pop(0)
        tally.pass_over(f"line {number}: {' '.join(fields)[:80]}", "header")
    if len(rows[0]) == 2:
        samples = [Sample(path) for _, path in _once(file, root, rows, tally)]
        return Source(samples=samples, classes=None, root=root, name=source_name(file), tally=tally)
    for number, path, label in rows:
        if fault := label_fault(label):
            raise DatasetError(f"line {number} of {file}: the label of {path!r} {fault}")
    names = read_classes(class_list) if class_list else None
    classes, indices = index_labels(places([(row[2], f"line {row[0]} of {file}") for row in rows]), names)
    for number, path, label in rows:
        if label not in indices:
            raise DatasetError(f"line {number} of {file} gives {path!r} the label {label!r}, no class of {class_list}")
    samples = [Sample(row[1], indices[row[2]]) for row in _once(file, root, rows, tally)]
    return Source(samples=samples, classes=classes, root=root, name=source_name(file), tally=tally)


def _comma(line: str) -> list[str]:
    return next(csv.reader([line], strict=True))


PARTED: dict[str, Callable[[str], list[str]]] = {
    "tabs": lambda line: line.split("\t"),
    "commas": _comma,
    "the last blank": lambda line: line.rsplit(None, 1),
    "the first blank": lambda line: line.split(None, 1),
    "nothing": lambda line: [line],
}


def _rows(file: Path, lines: list[tuple[int, str]], root: Path) -> list[tuple[str, ...]]:
    """(number of the line, PATH) or (number, PATH, LABEL) of every line."""
    by = _separator([line for _, line in islice(lines, LOOKED_AT)], root)
    by = "tabs" if any("\t" in line for _, line in lines) else by
    rows: list[tuple[str, ...]] = []
    for number, line in lines:
        try:
            row = [word.strip() for word in PARTED[by](line)]
        except csv.Error as error:
            raise DatasetError(f"line {number} of {file} is no line of a CSV file: {error}") from error
        if len(row) > 2 or not all(row) or (rows and len(row) + 1 != len(rows[0])):
            expected = ("PATH", "PATH and LABEL")[len(rows[0]) - 2] if rows else "PATH, or PATH and LABEL"
            raise DatasetError(f"line {number} of {file} has {len(row)} fields parted by {by}: {row[:3]}, "
                               f"expected {expected}")  # fmt: skip
        rows.append((str(number), *row))
    return rows


def _separator(lines: list[str], root: Path) -> str:
    """What parts PATH and LABEL, by the files that exist."""
    blanks = all(len(line.split()) > 1 for line in lines)
    labelled = blanks and not all(is_image(line.split()[-1]) for line in lines)
    order = ["commas"] * any("," in line for line in lines)
    order += ["the last blank", "the first blank", "nothing"] if labelled else ["nothing"]
    order += ["the last blank", "the first blank"] * (blanks and not labelled)

    def existing(by: str) -> int:
        try:
            return sum(_exists(root, PARTED[by](line)[0].strip()) for line in lines)
        except csv.Error:
            return 0

    return max(order, key=existing)


def _exists(root: Path, path: str) -> bool:
    return bool(path) and os.path.lexists(root / path)


def _is_header(rows: list[tuple[str, ...]], root: Path) -> bool:
    first, *others = (is_image(row[1]) or _exists(root, row[1]) for row in rows[:2])
    return not first and any(others)


def _once(file: Path, root: Path, rows: list[tuple[str, ...]], tally: Tally) -> list[tuple[str, ...]]:
    """The rows without those that name a file again."""
    seen: dict[str, tuple[str, ...]] = {}
    for row in rows:
        earlier = seen.setdefault(os.path.normpath(root / row[1]), row)
        if earlier is row:
            continue
        if earlier[2:] != row[2:]:
            raise DatasetError(
                f"{file} gives {row[1]!r} the label {earlier[2]!r} in line {earlier[0]} and {row[2]!r} in line {row[0]}"
            )
        tally.pass_over(f"line {row[0]}: {row[1]}", "named again")
    return list(seen.values())
