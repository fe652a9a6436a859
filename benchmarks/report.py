"""Bring the records into README.md and benchmarks/README.md, and draw them.

    python -m benchmarks.report            plots into benchmarks/records/, tables into both files (needs matplotlib)
    python -m benchmarks.report --check    writes nothing; exit code 1 where a file is not what the records give

The files hold pairs of lines, `<!-- report:NAME -->` and `<!-- /report -->`. What stands between them is written here
from benchmarks/records/NAME.csv, by the benchmark's own `block` and, for the block "headlines", `headline`. Where a
measurement was repeated, the newest run counts. A measured number anywhere else in the files fails the check: it would
have no record.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import ablation, against, demo, lars, loader, loss, reproduction, step, sweep, training
from benchmarks.tables import Row
from tools.files import read_text, write_text
from tools.records import RECORDS, ROOT, read

PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md"]
BLOCK = re.compile(r"(<!-- report:(\w+) -->\n)(.*?)(<!-- /report -->)", re.DOTALL)
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.DOTALL | re.MULTILINE)
MEASURED = re.compile(r"\d[\d.,]* ?(?:ms|s|seconds|min|minutes|hours?|[KMGT]i?B|%|W|(?:images|views|img)/s)(?!\w)")

BLOCKS: dict[str, Callable[[list[Row]], str]] = {
    "demo": demo.block,
    "training": training.block,
    "reproduction": reproduction.block,
    "ablation": ablation.block,
    "sweep": sweep.block,
    "against": against.block,
    "loader": loader.block,
    "loss": loss.block,
    "step": step.block,
    "lars": lars.block,
}
HEADLINES = {"sweep": sweep.headline, "loader": loader.headline, "loss": loss.headline}
PLOTS = {"sweep": sweep.plots, "against": against.plots, "loss": loss.plots, "loader": loader.plots}  # of many runs


def main(
    check: Annotated[bool, typer.Option(help="only compare")] = False,
    readme: Annotated[
        list[Path] | None, typer.Option(help="file with blocks; default README.md and benchmarks/README.md")
    ] = None,
    records: Annotated[Path, typer.Option(help="folder of the CSVs and plots")] = RECORDS,
) -> None:
    """Write the blocks of the files from the records, and draw the plots."""
    texts = {page: read_text(page) for page in readme or PAGES}
    for page, text in texts.items():
        names = [name for _, name, _, _ in BLOCK.findall(text)]
        known = {*BLOCKS, "headlines"}
        if unknown := sorted(set(names) - known):
            raise typer.BadParameter(f"{page} has blocks {unknown}; known are {sorted(known)}", param_hint="--readme")
        if not text.count("<!-- report:") == text.count("<!-- /report -->") == len(names):
            raise typer.BadParameter(f"{page} has a block that does not begin or does not end", param_hint="--readme")
    if check:
        if problems := [fault for page in texts for fault in faults(page, records)]:
            typer.echo("\n".join(problems))
            raise typer.Exit(1)
        return
    for page, text in texts.items():
        write_text(page, filled(text, records, page.parent))
    for name, draw in PLOTS.items():
        if rows := read(records / f"{name}.csv"):
            draw(rows, records)


def written(name: str, records: Path) -> str:
    """A block as the records give it; empty without records. Its links begin with records/."""
    if name == "headlines":
        by_name = {record: read(records / f"{record}.csv") for record in HEADLINES}
        text = "".join(headline(by_name[record]) for record, headline in HEADLINES.items() if by_name[record])
        return f"\n{text}\n" if text else ""
    rows = read(records / f"{name}.csv")
    return BLOCKS[name](rows) if rows else ""


def filled(text: str, records: Path, folder: Path) -> str:
    """The text of a file in `folder` with every block as the records give it."""

    def fill(match: re.Match[str]) -> str:
        begin, name, _, end = match.groups()
        block = written(name, records).replace("](records/", f"]({os.path.relpath(records, folder)}/")
        return f"{begin}{block}{end}"

    return BLOCK.sub(fill, text)


def faults(page: Path, records: Path) -> list[str]:
    """Where a file says what no record says: a line each."""
    text = read_text(page)
    problems, now = [], filled(text, records, page.parent)
    for (begin, name, old, _), (_, _, new, _) in zip(BLOCK.findall(text), BLOCK.findall(now), strict=True):
        where = f"{page.name}: {begin.strip()}"
        if old != new:
            lines = itertools.zip_longest(old.split("\n"), new.split("\n"), fillvalue="")
            there, recorded = next((a, b) for a, b in lines if a != b)
            problems.append(f"{where} says {there!r}, the records {recorded!r}: run python -m benchmarks.report")
        for link in re.findall(r"\]\(records/([^)]*)\)", written(name, records)):
            if not (records / link).exists():
                problems.append(f"{where} links to {link}, which is not there: run python -m benchmarks.report")
    for line in CODE.sub("", BLOCK.sub("", text)).splitlines():
        if number := MEASURED.search(line):
            problems.append(f"{number[0]!r} comes from no record; bring it into a block: {line.strip()}")
    return problems


if __name__ == "__main__":
    typer.run(main)
