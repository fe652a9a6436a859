"""Which parts make SimCLR work? The paper's ablations: each a grid of trainings, one record, one figure.

    python tools/ablate.py head --data TRAIN --eval-data TEST --out DIR
    python tools/ablate.py augment --data TRAIN --eval-data TEST --out DIR --axis operators=crop,color,blur,rotate
    python tools/ablate.py batch --data TRAIN --eval-data TEST --out DIR --axis epochs=5,10 --width 0.25
    python tools/ablate.py --list                         the grids; with a name, its cells and what each changes

Every cell is a run of train.py for each seed, in a process of its own, so a failure affects its cell alone. Options
that are not named here go to train.py, for all cells. TRAIN and TEST are labelled shards of the same classes; the
frozen features h of the finished encoder are scored by `tools/evaluate.py knn` (k = 200, or all of a smaller TRAIN)
and `logistic`, as are those of freshly drawn weights. The same command goes on where it was stopped; axes and seeds
may have grown.

    DIR/grid.json       what makes the cells comparable: grid, settings, data; another command is refused by it
    DIR/results.csv     one row per finished cell and seed
    DIR/GRID.png        the paper's figure, drawn from results.csv alone (needs matplotlib: pip install -e '.[eval]')
    DIR/CELL/seed=N/    the run of train.py; beside it seed=N.log and seed=N.jsonl, what was printed and what was scored

augment: figure 5's protocol (section 3.1) leaves one view of each image as it is, and applies the operators under test
to the other alone. Here the first view gets them, the second is the image resized to the size of the views, or its
largest central square; so is the first, before the operators. Two operators are applied one after the other in the
order of the pipeline, whatever order they are named in, so the matrix is symmetric. Crop (with its flips) and color
(jitter and grayscale) are as the recipe has them, at its probabilities; every other operator is always applied. What
differs from the paper: there both branches begin with a random crop, the same for both, here with no random crop.

Chen et al. 2020, arXiv:2002.05709: sections 3 to 5; tables 1 and 5, figures 5, 8 and 9.
"""

import ctypes
import itertools
import json
import math
import re
import shlex
import signal
import statistics
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pipeline.shards import Dataset

ROOT = Path(__file__).resolve().parents[1]
SCORES = {"knn": "kNN", "logistic": "logistic regression"}  # columns of results.csv, and what they are called
RANDOM = "random"  # the cell that trains nothing
L2 = (1, 10, 100, 1000, 10000)  # of evaluate.py's 45 those that matter; on 10,000 images the weakest take minutes
PREEMPTED = 3  # exit code of train.py, and ours, after a signal
PR_SET_PDEATHSIG = 1  # prctl(2): the signal that a process gets when its parent ends

# The operators of figure 5 in the order of its rows, and the view options that leave each out.
OPERATORS = {
    "crop": ("crop_area=[1, 1]", "crop_ratio=[1, 1]", "flip_p=0"),
    "cutout": ("cutout_p=0",),
    "color": ("jitter_p=0", "grayscale_p=0"),
    "sobel": ("sobel_p=0",),
    "noise": ("noise_p=0",),
    "blur": ("blur_p=0",),
    "rotate": ("rotation_p=0",),
}


@dataclass(frozen=True)
class Grid:
    """A cell for every combination of the axes' values; an axis is an option of train.py or of its views."""

    about: str
    axes: Mapping[str, tuple[str, ...]]  # the last runs along the figure
    base: tuple[str, ...] = ()  # view options of all cells


GRIDS = {
    "augment": Grid(
        "figure 5: operators alone and in pairs, applied to one of the two views",
        {"operators": tuple(OPERATORS)},
        base=("cutout_p=1", "sobel_p=1", "noise_p=1", "blur_p=1", "rotation_p=1"),
    ),
    "head": Grid(
        "figure 8: projection heads and dimensions of z",
        {
            "head": ("none", "linear", "nonlinear"),
            "projection_dim": ("32", "64", "128", "256", "512", "1024", "2048"),
        },
    ),
    "temperature": Grid("table 5: temperature of NT-Xent", {"temperature": ("0.05", "0.1", "0.5", "1.0")}),
    "batch": Grid(
        "figure 9: batch sizes and epochs",
        {"batch_size": ("256", "512", "1024", "2048", "4096", "8192"), "epochs": ("100", "200", "400", "800")},
    ),
    "color": Grid(
        "table 1: strength of the colour distortion, without blur",
        {"blur_p": ("0.0",), "jitter_strength": ("0.125", "0.25", "0.5", "1.0")},
    ),
}

app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


@app.command(context_settings={"ignore_unknown_options": True})
def ablate(
    name: Annotated[str | None, typer.Argument(metavar="GRID", help=f"One of {', '.join(GRIDS)}.")] = None,
    options: Annotated[
        list[str] | None, typer.Argument(metavar="[OPTION]...", help="Options of train.py, for all cells.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Labelled shards to train on and to learn classifiers from.")
    ] = None,
    eval_data: Annotated[Path | None, typer.Option(help="Labelled shards of the same classes to score on.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the grid: new, or to go on in.")] = None,
    recipe: Annotated[str, typer.Option(help="Recipe of train.py that the cells change.")] = "cifar10",
    seeds: Annotated[int, typer.Option(min=1, help="Train every cell so often, with seeds 0, 1, ...")] = 3,
    axis: Annotated[
        list[str] | None, typer.Option(help="Values of an axis instead of the paper's: NAME=V,V,... Repeatable.")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Show the grids, or the cells of one; train nothing.")] = False,
) -> None:
    """Train and score a named grid of the paper, and draw its figure. Options of train.py scale it down."""
    from tools.errors import one_message

    try:
        with one_message("ablate"):
            if name is None:
                if not list_:
                    raise ValueError(f"name a grid: {', '.join(GRIDS)}; --list says what they are")
                show_grids()
                return
            if name not in GRIDS:
                raise ValueError(f"unknown grid {name!r}; choose one of {', '.join(GRIDS)}")
            axes = narrowed(GRIDS[name].axes, axis or [])
            grid = cells(axes)
            if list_:
                width = max(map(len, grid))
                typer.echo("\n".join(f"{cell:<{width}}  {shlex.join(changes)}" for cell, changes in grid.items()))
                return
            if data is None or eval_data is None or out is None:
                raise ValueError(
                    "--data, --eval-data and --out are needed: shards to train on, to score on, and a folder"
                )
            check_options(options or [], axes)
            settings = [recipe, *views("--view", GRIDS[name].base), *(options or [])]
            check_cells(settings, grid)
            with study(name, settings, data, eval_data, out) as started:
                failed = started.run(grid, seeds)
                rows = started.results()
            typer.echo(f"\n{table(rows)}\n")
            draw(name, rows, out / f"{name}.png")
            if failed:
                raise CellError(f"{failed} failed, see above; the same command tries them again", 1)
    except (KeyboardInterrupt, Stopped):
        typer.echo(f"ablate: stopped; the same command goes on in {out}", err=True)
        raise typer.Exit(PREEMPTED) from None


def show_grids() -> None:
    for name, grid in GRIDS.items():
        axes = " x ".join(f"{axis} {','.join(values)}" for axis, values in grid.axes.items())
        typer.echo(f"{name:<12} {grid.about}\n{'':<12} {axes}: {len(cells(grid.axes))} cells")


def narrowed(axes: Mapping[str, tuple[str, ...]], texts: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The axes with the values that --axis gives, each "NAME=V,V"."""
    chosen = dict(axes)
    for text in texts:
        name, _, values = text.partition("=")
        listed = tuple(dict.fromkeys(values.split(",")))
        if name not in axes or not all(re.fullmatch(r"[\w.]+", value) for value in listed):
            known = ", ".join(f"{axis}={','.join(values)}" for axis, values in axes.items())
            raise ValueError(f"--axis {text!r}: expected NAME=V,V,... of this grid's axes, which are {known}")
        if name == "operators" and (unknown := [value for value in listed if value not in OPERATORS]):
            raise ValueError(f"--axis {text!r}: unknown {', '.join(unknown)}; operators are {', '.join(OPERATORS)}")
        chosen[name] = listed
    return chosen


def check_options(options: Sequence[str], axes: Mapping[str, tuple[str, ...]]) -> None:
    """Raises ValueError for options of train.py that the grid sets itself: the grid's value would override them."""
    decided = {"data", "eval_data", "out", "resume", "seed", "config", *axes}
    if "operators" in axes:
        decided.add("second_view")
    for option in options:
        name = option.removeprefix("--").partition("=")[0].replace("-", "_")
        if name in decided:
            instead = f"give its values with --axis {name}=V,V,..." if name in axes else "leave it out"
            raise ValueError(f"{option}: the grid decides {name}; {instead}")


def check_cells(settings: Sequence[str], grid: Mapping[str, Sequence[str]]) -> None:
    """Raises ValueError for the first cell whose options train.py would refuse: before another takes hours."""
    from tools.runs import config_of
    from train import check_config

    for cell, changes in grid.items():
        try:
            check_config(config_of([*settings, *changes]))
        except ValueError as error:
            raise ValueError(f"{cell}: {error}") from error


def cells(axes: Mapping[str, tuple[str, ...]]) -> dict[str, list[str]]:
    """{cell: the options of train.py that make it}; a cell is called AXIS=VALUE/AXIS=VALUE, as its folder."""
    if "operators" in axes:
        names = sorted(axes["operators"], key=list(OPERATORS).index)
        chosen = [*itertools.combinations(names, 1), *itertools.combinations(names, 2)]
        return {f"operators={'+'.join(operators)}": one_sided(operators) for operators in chosen}
    grid = {}
    for values in itertools.product(*axes.values()):
        settings = dict(zip(axes, values, strict=True))
        if settings.get("head") == "none":  # z is h, whatever dimension is asked for
            del settings["projection_dim"]
        grid["/".join(map("=".join, settings.items()))] = [word for pair in settings.items() for word in option(*pair)]
    return grid


def option(name: str, value: str) -> list[str]:
    from train import TrainConfig

    if name in {field.name for field in fields(TrainConfig)}:
        return [f"--{name.replace('_', '-')}", value]
    return views("--view", [f"{name}={value}"])


def views(flag: str, changes: Iterable[str]) -> list[str]:
    return [word for change in changes for word in (flag, change)]


def one_sided(operators: Sequence[str]) -> list[str]:
    """These operators in the first view alone, none in the second."""
    left_out = [change for name, changes in OPERATORS.items() if name not in operators for change in changes]
    return views("--view", left_out) + views("--second-view", itertools.chain(*OPERATORS.values()))


# ---- running -------------------------------------------------------------------------------------------------------


class CellError(RuntimeError):
    """A program that a cell needs ended with this exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Stopped(Exception):
    """A signal asked for the end; what was being trained has saved a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """A grid and its folder, which this process alone may write."""

    name: str
    settings: list[str]  # of all cells: recipe and options of train.py
    train: "Dataset"
    test: "Dataset"
    out: Path
    lock: int  # file descriptor; the folder stays claimed as long as a process has it

    def run(self, grid: Mapping[str, list[str]], seeds: int) -> int:
        """Train and score each cell that results.csv lacks; return how many failed. ValueError if none can start."""
        done = {(row["cell"], int(row["seed"])) for row in self.results()}
        # Seeds outermost: a grid that is stopped early is whole, with fewer seeds.
        jobs = [(cell, seed) for seed in range(seeds) for cell in (*grid, RANDOM) if (cell, seed) not in done]
        typer.echo(f"{self.name}: {len(jobs)} of {seeds * (len(grid) + 1)} to go, in {self.out}")
        failed = 0
        for i, (cell, seed) in enumerate(jobs, 1):
            run, where = self.folder(cell, seed), f"[{i}/{len(jobs)}] {cell} seed {seed}"
            try:
                if cell == RANDOM:  # the architecture of any run, for no cell changes it
                    trained = next(iter(self.out.glob("*=*/**/encoder.safetensors")), None)
                    if trained is None:
                        continue
                    row = self.score(trained, run, "--random-init", "--seed", seed)
                else:
                    row = self.fit(run, grid[cell], seed)
                    row |= self.score(run, run)
            except CellError as error:
                if error.code == 2 and not done:
                    raise ValueError(f"{cell}: {error}") from error
                failed += 1
                typer.echo(f"{where}: failed: {error}", err=True)
                continue
            self.keep(cell, seed, row)
            done.add((cell, seed))
            typer.echo(f"{where}: " + ", ".join(f"{text} {100 * row[key]:.2f} %" for key, text in SCORES.items()))
        return failed

    def folder(self, cell: str, seed: int) -> Path:
        return self.out / cell / f"seed={seed}"

    def fit(self, run: Path, changes: list[str], seed: int) -> dict[str, Any]:
        """Train to the end, from the newest checkpoint if there is one. Returns columns of results.csv."""
        from model.run_folder import read_rows
        from tools.files import read_text
        from tools.records import training_seconds

        fixed = ["--data", self.train.root, "--out", run, "--resume", "--seed", seed]
        self.call("train.py", [*self.settings, *changes, *fixed], run)
        config = json.loads(read_text(run / "config.json"))
        metrics, speed = read_rows(run / "metrics.jsonl"), read_rows(run / "speed.jsonl")
        losses = [row["loss"] for row in metrics if row.get("loss") is not None]
        return {
            "loss": round(statistics.mean(losses[-(self.train.samples // config["batch_size"]) :]), 4),
            "seconds": round(training_seconds(speed, metrics[-1]["step"]), 1),
            "threads": config["cpu_threads"] or "",
        }

    def score(self, encoder: Path, run: Path, *options: object) -> dict[str, Any]:
        """Top-1 of the frozen features by each of SCORES."""
        from model.run_folder import read_rows
        from tools.files import remove

        results = run.with_name(f"{run.name}.jsonl")
        remove(results)  # of a scoring that was interrupted
        run.parent.mkdir(parents=True, exist_ok=True)
        sets = [encoder, self.train.root, self.test.root, "--results", results]
        self.call("tools/evaluate.py", ["knn", *sets, "--k", 200, *options], run)
        self.call(
            "tools/evaluate.py", ["logistic", *sets, *itertools.chain(*(("--l2", l2) for l2 in L2)), *options], run
        )
        return {row["evaluation"]: next(iter(row["scores"].values()))["top1"] for row in read_rows(results)}

    def keep(self, cell: str, seed: int, columns: Mapping[str, Any]) -> None:
        """A line of results.csv; loss is the mean over the last epoch, seconds are of training alone."""
        from tools.records import append, environment

        row = {
            "grid": self.name,
            "cell": cell,
            "seed": seed,
            **dict.fromkeys((*SCORES, "loss", "seconds"), ""),
            "settings": shlex.join(self.settings),
            "data": f"{self.train.root.name}, {self.train.samples} images",
            **environment(),
            **columns,
        }
        append((self.out / "results.csv").resolve(), [row])

    def results(self) -> list[dict[str, str]]:
        from tools.records import read

        return read((self.out / "results.csv").resolve())

    def call(self, program: str, words: Iterable[object], run: Path) -> None:
        """Run one of our programs to its end; its output goes to a log beside `run`.

        Raises CellError if it fails, and Stopped if it or this process is asked to stop, once it has ended. If this
        process is killed, the program gets SIGTERM and keeps the folder claimed until it ends.
        """
        from tools.files import open_to_append, read_text

        log = run.with_name(f"{run.name}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        libc = ctypes.CDLL(None)
        with open_to_append(log) as file:
            process = subprocess.Popen(
                [sys.executable, str(ROOT / program), *map(str, words)],
                stdout=file,
                stderr=subprocess.STDOUT,
                pass_fds=[self.lock],
                start_new_session=True,  # Ctrl-C comes to this process alone
                preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM),
            )
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise Stopped from None
        if code == PREEMPTED:
            raise Stopped
        if code:
            lines = [line for line in read_text(log, errors="replace").splitlines() if any(map(str.isalnum, line))]
            how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
            raise CellError(
                f"{program} ended with {how}: {lines[-1].strip(' │') if lines else 'no word'} ({log})", code
            )


@contextmanager
def study(name: str, settings: list[str], data: Path, eval_data: Path, out: Path) -> Iterator[Study]:
    """Claim the folder for this process and this grid. Raises ValueError for what the caller can mend."""
    from model.run_folder import claim, is_empty
    from pipeline.labels import check_alike
    from pipeline.shards import read_dataset
    from tools.files import read_bytes, write_text

    train, test = read_dataset(data), read_dataset(eval_data)
    check_alike(train, test)
    this = {"grid": name, "settings": shlex.join(settings), "data": train.fingerprint, "eval_data": test.fingerprint}
    grid_file = out / "grid.json"
    if out.exists() and not (out.is_dir() and (grid_file.exists() or is_empty(out))):
        raise ValueError(f"{out} is not empty and holds no grid: give a new folder with --out")
    with claim(out, "ablate.py, or a training of its that has yet to stop") as lock:
        if any(out.glob("*=*/**/checkpoints/step-*")):
            try:
                stored = json.loads(read_bytes(grid_file))
                changed = [
                    f"{key}: {stored[key]} there, {value} now" for key, value in this.items() if stored[key] != value
                ]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{grid_file} does not say which grid this is ({error}): give a new --out") from error
            if changed:
                raise ValueError(f"{out} holds another grid ({'; '.join(changed)}): give a new folder with --out")
        else:  # no run has begun, so the settings may still change
            write_text(grid_file, json.dumps(this, indent=1))
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            yield Study(name=name, settings=settings, train=train, test=test, out=out, lock=lock.descriptor)
        finally:
            signal.signal(signal.SIGTERM, before)


# ---- table and figure -----------------------------------------------------------------------------------------------


def summary(rows: Sequence[Mapping[str, str]], column: str, scale: float = 100) -> dict[str, tuple[float, float]]:
    """{cell: (mean, standard deviation)} over the seeds; nan without a value, the deviation also with a single one."""
    values: dict[str, list[float]] = {row["cell"]: [] for row in rows}
    for row in rows:
        if row[column]:
            values[row["cell"]].append(scale * float(row[column]))
    return {
        cell: (
            statistics.mean(scores) if scores else math.nan,
            statistics.stdev(scores) if len(scores) > 1 else math.nan,
        )
        for cell, scores in values.items()
    }


def plus_minus(mean: float, spread: float, between: str = " ") -> str:
    return f"{mean:.2f}" + ("" if math.isnan(spread) else f"{between}± {spread:.2f}")


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Markdown: mean and standard deviation over the seeds."""
    columns = [summary(rows, name) for name in SCORES] + [summary(rows, "loss", 1)]
    seeds = {cell: sum(row["cell"] == cell for row in rows) for cell in columns[0]}
    lines = [f"| cell | seeds | {' | '.join(f'{text}, %' for text in SCORES.values())} | loss |", "| --- " * 5 + "|"]
    for cell in sorted(seeds, key=lambda cell: cell == RANDOM):
        numbers = ["" if math.isnan(column[cell][0]) else plus_minus(*column[cell]) for column in columns]
        lines.append(f"| {cell} | {seeds[cell]} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def draw(name: str, rows: Sequence[Mapping[str, str]], path: Path) -> None:
    """The paper's figure, for each score, from the rows of results.csv alone."""
    try:
        from matplotlib.figure import Figure

        from tools.records import save_plot
    except ModuleNotFoundError:
        typer.echo(f"no {path}: matplotlib is missing; pip install -e '.[eval]', and the same command draws it")
        return
    if all(row["cell"] == RANDOM for row in rows):
        return
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, (score, text) in zip(figure.subplots(1, len(SCORES)), SCORES.items(), strict=True):
        scores = summary(rows, score)
        baseline = scores.pop(RANDOM, (math.nan, math.nan))
        if name == "augment":
            matrix(axes, scores)
        else:
            bars(axes, scores)
            axes.axhline(baseline[0], linestyle=":", color="gray")
        known = "" if math.isnan(baseline[0]) else f"; freshly drawn weights {plus_minus(*baseline)}"
        axes.set_title(f"{text}, top-1 in %{known}", fontsize=9)
    seeds = len({row["seed"] for row in rows})
    title = f"{name}: {rows[-1]['data']}, seeds: {seeds}, {rows[-1]['settings']}"
    figure.suptitle(textwrap.fill(title, 150, break_on_hyphens=False), fontsize=8)
    save_plot(figure, path, 110)
    typer.echo(str(path))


def matrix(axes: "Axes", scores: Mapping[str, tuple[float, float]]) -> None:
    """Figure 5: operators alone on the diagonal, pairs off it, the last column the mean of a row."""
    import numpy as np

    chosen = {cell.removeprefix("operators="): value for cell, value in scores.items()}
    names = [name for name in OPERATORS if any(name in pair.split("+") for pair in chosen)]
    means = np.full((len(names), len(names) + 1), np.nan)
    texts = np.full(means.shape, "", dtype=object)
    for i, j in itertools.product(range(len(names)), repeat=2):
        pair = "+".join(names[k] for k in sorted({i, j}))
        if pair in chosen:
            means[i, j], texts[i, j] = chosen[pair][0], plus_minus(*chosen[pair], "\n")
    means[:, -1] = np.nanmean(means[:, :-1], axis=1)
    texts[:, -1] = [f"{mean:.2f}" for mean in means[:, -1]]
    low, high = np.nanmin(means), np.nanmax(means)
    vmax = high + (high - low) / 2  # above all values, so that black text is readable on each
    axes.imshow(means, cmap="Blues", vmin=low, vmax=vmax, aspect="auto")
    for (i, j), text in np.ndenumerate(texts):
        axes.text(j, i, text, ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(names) + 1), [*names, "mean"])
    axes.set_yticks(range(len(names)), names)


def bars(axes: "Axes", scores: Mapping[str, tuple[float, float]]) -> None:
    """Figures 8 and 9: the last axis of the grid runs along x, other axes form groups; error bars span the seeds.

    A cell without the last axis stands at "h": without a head, h goes into the loss.
    """
    settings = {cell: dict(part.split("=") for part in cell.split("/")) for cell in scores}
    *grouping, along = dict.fromkeys(name for values in settings.values() for name in values)
    ticks = sorted(
        {values.get(along, "h") for values in settings.values()}, key=lambda tick: (tick != "h", number(tick), tick)
    )
    groups: dict[str, dict[str, str]] = {}  # {label: {tick: cell}}
    for cell, values in settings.items():
        label = " ".join(f"{name} {values[name]}" for name in grouping)
        groups.setdefault(label, {})[values.get(along, "h")] = cell
    width = 0.8 / len(groups)
    for label, group in groups.items():
        where = []
        for tick in group:  # the bars of a tick stand side by side, centred on it
            beside = [other for other, cells in groups.items() if tick in cells]
            where.append(ticks.index(tick) + (beside.index(label) - (len(beside) - 1) / 2) * width)
        means, spreads = zip(*map(scores.__getitem__, group.values()), strict=True)
        drawn = axes.bar(where, means, width, yerr=spreads, capsize=3, label=label)
        axes.bar_label(drawn, fmt="%.1f", fontsize=7)
    axes.set_xticks(range(len(ticks)), ticks)
    axes.set_xlabel(along)
    if grouping:
        axes.margins(y=0.2)
        axes.legend(fontsize=8, loc="upper center", ncols=3)


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.inf


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # the repository instead of tools/, as with python -m
    app()
