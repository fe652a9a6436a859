"""The table of tools/ablate.py's grids. Their rows, from a grid's results.csv, are appended to records/ablation.csv."""

import statistics

from benchmarks.tables import Row, conditions, grouped, over_seeds, table


def block(rows: list[Row]) -> str:
    """Every grid: its cells, the best by logistic regression first."""
    text = ""
    for part in grouped(rows, "grid", "settings", "data"):
        cells = grouped(part, "cell")
        cells.sort(key=lambda cell: -statistics.mean(float(row["logistic"]) for row in cell))
        lines = [
            [cell[0]["cell"], str(len(cell)), *(over_seeds(cell, name) for name in ("logistic", "knn"))]
            for cell in cells
        ]
        first = part[0]
        text += f"\n`tools/ablate.py {first['grid']}` on {first['data']}, `{first['settings']}`:\n\n"
        text += table(["cell", "seeds", "logistic", "kNN"], lines)
        text += conditions(part, "ablation.csv", f"ablation-{first['grid']}.png")
    return text + "\n"
