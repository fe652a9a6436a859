"""How rows on record become tables of benchmarks/README.md; each benchmark says which columns."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

Row = dict[str, str]


def newest(rows: Iterable[Row], keys: Sequence[str], within: Sequence[str] = ()) -> list[Row]:
    """For each combination of `keys` the last row and those measured in the same run, one for each `within`."""
    rows = list(rows)

    def run(row: Row) -> list[str]:
        return [row[name] for name in ("device", "commit", "date", "load")]

    last = {tuple(row[key] for key in keys): run(row) for row in rows}
    kept: dict[tuple[str, ...], Row] = {}
    for row in rows:
        key = tuple(row[name] for name in keys)
        if run(row) == last[key]:
            kept[*key, *(row[name] for name in within)] = row
    return list(kept.values())


def of_one_commit(rows: Sequence[Row], *keys: str) -> list[Row]:
    """The rows of the newest clean commit that measured every combination of `keys`; all rows if there is none."""
    wanted = {tuple(row[key] for key in keys) for row in rows}
    for commit in dict.fromkeys(row["commit"] for row in reversed(rows)):
        chosen = [row for row in rows if row["commit"] == commit]
        if not commit.endswith("+") and {tuple(row[key] for key in keys) for row in chosen} == wanted:
            return chosen
    return list(rows)


def grouped(rows: Iterable[Row], *keys: str) -> list[list[Row]]:
    """Rows that agree in `keys`, together; the groups in the order of their first rows."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return list(groups.values())


def by_number(rows: Iterable[Row], *keys: str) -> list[Row]:
    return sorted(rows, key=lambda row: [float(row[key]) for key in keys])


def number(text: str, unit: str = "") -> str:
    """Three digits, or all before the point; empty stays empty."""
    if not text:
        return ""
    value = float(text)
    return (f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}") + unit


def percent(share: str) -> str:
    return f"{100 * float(share):.1f} %"


def over_seeds(rows: Sequence[Row], column: str) -> str:
    """Mean and standard deviation of a share."""
    values = [100 * float(row[column]) for row in rows]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread} %"


def times(value: str, base: str) -> str:
    return f"{float(value) / float(base):.2f} x" if value and base else ""


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Markdown. Columns without any value are left out; other empty cells are dashes."""
    lines = list(lines)
    shown = [i for i in range(len(header)) if any(line[i] for line in lines)]
    rows = [[header[i] for i in shown], ["---"] * len(shown), *([line[i] or "–" for i in shown] for line in lines)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def conditions(rows: Sequence[Row], record: str, plot: str = "") -> str:
    """The line under a table: hardware, versions, commit and date of its rows, and the record that holds them."""

    def all_of(name: str) -> str:
        return ", ".join(dict.fromkeys(row[name] for row in rows if row.get(name)))

    loads = sorted(float(row["load"]) for row in rows)
    load = f"{loads[0]:g}" if loads[0] == loads[-1] else f"{loads[0]:g} to {loads[-1]:g}"
    parts = [all_of("device"), f"driver {all_of('driver')}" if all_of("driver") else ""]
    parts += [all_of("processor") if all_of("driver") else ""]  # without a GPU it is the device
    parts += [f"threads {all_of('threads')}" if all_of("threads") else ""]
    parts += [f"the loader's {all_of('loader_threads')}" if all_of("loader_threads") else ""]
    parts += [f"load {load}", f"torch {all_of('torch')}"]
    parts += [f"DALI {all_of('dali')}", f"commit {all_of('commit')}", all_of("date")]
    link = f", [plot](records/{plot})" if plot else ""
    return f"\n{', '.join(part for part in parts if part)}; `{record}`{link}\n"
