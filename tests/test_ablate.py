"""Ablations: cells are what the paper compares, a grid survives what happens to it, its figure says what came of it."""

import csv
import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from typer.testing import CliRunner

import train
from pipeline.demo import CLASSES, draw_image
from pipeline.loader import Loader
from pipeline.shards import Sample, read_dataset
from pipeline.views import make_views, parse_changes
from pipeline.write import write_shards
from tools import ablate, evaluate

ROOT = Path(__file__).resolve().parents[1]
OFF = {
    "crop": {"crop_area": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip_p": 0.0},
    "cutout": {"cutout_p": 0.0},
    "color": {"jitter_p": 0.0, "grayscale_p": 0.0},
    "sobel": {"sobel_p": 0.0},
    "noise": {"noise_p": 0.0},
    "blur": {"blur_p": 0.0},
    "rotate": {"rotation_p": 0.0},
}


def samples(count: int, size: tuple[int, int] = (32, 32)) -> list[Sample]:
    found = []
    for i in range(count):
        file = io.BytesIO()
        Image.fromarray(draw_image(i % 3, np.random.default_rng(i))).resize(size).save(file, "PNG")
        found.append(Sample(f"{i:03d}.png", i % 3, file.getvalue()))
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_shards(samples(48), folder / "train", classes=CLASSES[:3], name="train")
    write_shards(samples(24), folder / "test", classes=CLASSES[:3], name="test")
    return folder


def run(*words: object) -> tuple[int, str]:
    """(exit code, what was printed) of the program, in this process."""
    done = CliRunner().invoke(ablate.app, [str(word) for word in words])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


# ---- the cells -----------------------------------------------------------------------------------------------------


def resolved(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> dict[str, Any]:
    """The configuration that train.py makes of its command line."""
    found: list[train.TrainConfig] = []
    monkeypatch.setattr(train, "train", lambda config, **_: found.append(config))
    done = CliRunner().invoke(train.app, words)
    assert done.exit_code == 0, done.output
    return asdict(found[0])


@pytest.mark.parametrize(("name", "count"), [("head", 15), ("temperature", 4), ("batch", 24)])
def test_a_cell_changes_what_its_name_says_and_nothing_else(monkeypatch, name, count):
    grid = ablate.cells(ablate.GRIDS[name].axes)
    assert len(grid) == count
    recipe = resolved(monkeypatch, ["imagenet"])
    for cell, options in grid.items():
        named = dict(part.split("=") for part in cell.split("/"))
        config = resolved(monkeypatch, ["imagenet", *options])
        assert {key: str(config[key]) for key in named} == named
        assert {key: value for key, value in config.items() if key not in named} == {
            key: value for key, value in recipe.items() if key not in named
        }


def test_colour_strength_is_varied_without_blur(monkeypatch):
    recipe = resolved(monkeypatch, ["imagenet"])
    found = [
        resolved(monkeypatch, ["imagenet", *options]) for options in ablate.cells(ablate.GRIDS["color"].axes).values()
    ]
    assert [config["views"]["jitter_strength"] for config in found] == [1 / 8, 1 / 4, 1 / 2, 1]
    for config in found:
        assert config["views"] == recipe["views"] | {
            "blur_p": 0.0,
            "jitter_strength": config["views"]["jitter_strength"],
        }
        assert config | {"views": None} == recipe | {"views": None}


@pytest.mark.parametrize("recipe", ["cifar10", "imagenet"])
def test_operators_under_test_are_in_the_first_view_alone(monkeypatch, recipe):
    """Singles and pairs; everything else is off, and the second view is the image as it is."""
    grid = ablate.cells(ablate.GRIDS["augment"].axes)
    assert len(grid) == 7 + 7 * 6 / 2
    base = ablate.views("--view", ablate.GRIDS["augment"].base)
    views = resolved(monkeypatch, [recipe])["views"]
    always = {"cutout_p": 1.0, "sobel_p": 1.0, "noise_p": 1.0, "blur_p": 1.0, "rotation_p": 1.0}
    for cell, options in grid.items():
        tested = cell.removeprefix("operators=").split("+")
        config = resolved(monkeypatch, [recipe, *base, *options])
        off = {key: value for name, fields in OFF.items() if name not in tested for key, value in fields.items()}
        none = {key: value for fields in OFF.values() for key, value in fields.items()}
        assert config["views"] == views | always | off
        assert config["second_views"] == views | none
        assert 1 <= len(tested) <= 2


def test_the_paper_s_matrix_can_be_narrowed():
    """Four operators: four alone and six pairs, in the order of the pipeline whatever the order given."""
    code, said = run("augment", "--list", "--axis", "operators=rotate,blur,crop,color")
    assert code == 0
    names = ["crop", "color", "blur", "rotate"]
    names += ["crop+color", "crop+blur", "crop+rotate", "color+blur", "color+rotate", "blur+rotate"]
    assert [line.split()[0] for line in said.splitlines()] == [f"operators={name}" for name in names]


@pytest.mark.parametrize("size", [(32, 32), (48, 32)])
def test_a_view_without_operators_is_the_image(tmp_path, size):
    """Pixel for pixel, or its largest central square; rotated alone it is that square, turned."""
    images = samples(6, size)
    write_shards(images, tmp_path / "data", classes=CLASSES[:3], name="data")
    options = ablate.views("--view", ablate.GRIDS["augment"].base) + ablate.one_sided(["rotate"])
    flags, changes = options[::2], options[1::2]
    first = make_views(
        "cifar", parse_changes(text for flag, text in zip(flags, changes, strict=True) if flag == "--view")
    )
    second = make_views(
        first, parse_changes(text for flag, text in zip(flags, changes, strict=True) if flag == "--second-view")
    )
    batch = next(
        Loader(read_dataset(tmp_path / "data"), first, 6, torch.device("cpu"), shuffle=False, second_views=second)
    )
    pixels = (255 * first.pixels(batch.views)).round().permute(0, 2, 3, 1).numpy().astype(int)
    left = (size[0] - 32) // 2
    stored = [np.asarray(Image.open(io.BytesIO(each.data or b"")), int)[:, left : left + 32] for each in images]
    found, turns = set(), set()
    for turned, plain in zip(pixels[:6], pixels[6:], strict=True):
        found |= {i for i, image in enumerate(stored) if (image == plain).all()}  # shards are in an order of their own
        by = [k for k in range(4) if (np.rot90(plain, k) == turned).all()]
        assert by
        turns |= set(by)
    assert len(found) == 6
    assert len(turns) > 1


# ---- a grid and what happens to it ---------------------------------------------------------------------------------

FAKE_TRAIN = """
import json, pathlib, signal, sys, time
here, words = pathlib.Path(__file__).parent, sys.argv[1:]
with open(here / "calls.jsonl", "a") as file:
    file.write(json.dumps(words) + "\\n")
for fault, code in json.loads((here / "faults.json").read_text()).items():
    if fault in words:
        print("train: what is " + fault + "?")
        sys.exit(code)
temperature, seed = float(words[words.index("--temperature") + 1]), int(words[words.index("--seed") + 1])
out = pathlib.Path(words[words.index("--out") + 1])
(out / "encoder").mkdir(parents=True, exist_ok=True)
(out / "checkpoints/step-0000006").mkdir(parents=True, exist_ok=True)
if (here / "slow").exists():
    def save(*_):
        time.sleep(1)
        (out / "saved").touch()
        sys.exit(3)
    signal.signal(signal.SIGTERM, save)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    (here / "started").touch()
    time.sleep(60)
def write(name, rows):
    (out / name).write_text("".join(json.dumps(row) + "\\n" for row in rows))
write("metrics.jsonl", [{"step": i, "loss": 9.0 - i} for i in range(1, 7)])
write("speed.jsonl", [{"step": 2, "step_ms": 500.0}, {"step": 6, "step_ms": 250.0}])
(out / "config.json").write_text(json.dumps({"batch_size": 16, "cpu_threads": 1}))
(out / "encoder/encoder.safetensors").write_text(json.dumps(temperature / 2 + seed / 100))
"""
FAKE_EVALUATE = """
import json, pathlib, sys
kind, encoder, train, test, *words = sys.argv[1:]
encoder = pathlib.Path(encoder)
if encoder.is_dir():
    encoder = encoder / "encoder/encoder.safetensors"
top1 = 0.05 if "--random-init" in words else json.loads(encoder.read_text())
with open(words[words.index("--results") + 1], "a") as file:
    file.write(json.dumps({"evaluation": kind, "scores": {"it": {"top1": top1 + 0.1 * (kind == "logistic")}}}) + "\\n")
"""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for the repository: a train.py and an evaluate.py that answer at once, and say how they were called."""
    folder = tmp_path / "programs"
    (folder / "tools").mkdir(parents=True)
    (folder / "train.py").write_text(FAKE_TRAIN)
    (folder / "tools/evaluate.py").write_text(FAKE_EVALUATE)
    (folder / "faults.json").write_text("{}")
    monkeypatch.setattr(ablate, "ROOT", folder)
    return folder


def calls(programs: Path) -> list[list[str]]:
    path = programs / "calls.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    path.unlink(missing_ok=True)
    return found


def rows(out: Path) -> list[dict[str, str]]:
    with open(out / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def grid(data: Path, out: Path, *words: object, seeds: int = 1) -> tuple[int, str]:
    chosen = ("temperature", "--axis", "temperature=0.1,0.5", "--seeds", seeds, "--epochs", 2)
    return run(*chosen, "--data", data / "train", "--eval-data", data / "test", "--out", out, *words)


def test_a_grid_is_recorded_drawn_and_not_done_twice(programs, data, tmp_path):
    out = tmp_path / "out"
    code, said = grid(data, out, "--view", "size=16", seeds=2)
    assert code == 0, said
    made = calls(programs)
    common = ["cifar10", "--epochs", "2", "--view", "size=16", "--temperature"]
    assert [words[:8] for words in made] == [[*common, value, "--data"] for _ in range(2) for value in ("0.1", "0.5")]
    assert all("--resume" in words for words in made)
    assert [words[-1] for words in made] == ["0", "0", "1", "1"]
    found = rows(out)
    assert [(row["cell"], row["seed"]) for row in found] == [
        (cell, seed) for seed in "01" for cell in ("temperature=0.1", "temperature=0.5", "random")
    ]
    scores = [[0.05, 0.15], [0.25, 0.35], [0.05, 0.15], [0.06, 0.16], [0.26, 0.36], [0.05, 0.15]]
    assert [[float(row["knn"]), float(row["logistic"])] for row in found] == [pytest.approx(pair) for pair in scores]
    trained = found[0]
    assert (float(trained["loss"]), float(trained["seconds"])) == (4.0, 2.0)  # steps 4 to 6; 2 x 0.5 s and 4 x 0.25 s
    assert trained["settings"] == "cifar10 --epochs 2 --view size=16"
    assert trained["torch"] == torch.__version__
    assert "| temperature=0.5 | 2 | 25.50 ± 0.71 | 35.50 ± 0.71 | 4.00 ± 0.00 |" in said
    assert "| random | 2 | 5.00 ± 0.00 | 15.00 ± 0.00 |  |" in said
    assert Image.open(out / "temperature.png").size > (800, 300)

    (out / "temperature.png").unlink()
    code, again = grid(data, out, "--view", "size=16", seeds=2)
    assert code == 0
    assert not calls(programs), "nothing is left to train"
    assert again.splitlines()[1:] == said.splitlines()[-len(again.splitlines()) + 1 :]
    assert (out / "temperature.png").exists()

    code, said = grid(data, out, "--view", "size=16", "--axis", "temperature=0.1,0.2", seeds=3)
    assert code == 0
    asked = [(words[words.index("--temperature") + 1], words[-1]) for words in calls(programs)]
    assert asked == [("0.2", "0"), ("0.2", "1"), ("0.1", "2"), ("0.2", "2")], "axes and seeds may grow"
    assert "temperature=0.5" in said


def test_a_failure_costs_its_cell_alone(programs, data, tmp_path):
    out = tmp_path / "out"
    (programs / "faults.json").write_text('{"0.5": 1}')
    code, said = grid(data, out)
    assert code == 1
    assert "temperature=0.5 seed 0: failed: train.py ended with exit code 1: train: what is 0.5?" in said
    assert said.splitlines()[-1] == "ablate: 1 failed, see above; the same command tries them again"
    assert [row["cell"] for row in rows(out)] == ["temperature=0.1", "random"]
    (programs / "faults.json").write_text("{}")
    calls(programs)
    code, said = grid(data, out)
    assert code == 0
    assert [words[4] for words in calls(programs)] == ["0.5"]
    assert "| temperature=0.5 | 1 | 25.00 | 35.00 | 4.00 |" in said


def test_settings_that_no_cell_can_use_end_the_grid_and_can_be_mended(programs, data, tmp_path):
    """Before a cell is trained where the options show it, at the first cell where only a program finds it."""
    for words, complaint in (
        (("--widht", 2), "No such option: --widht"),
        (("--batch-size", 1), "ablate: temperature=0.1: NT-Xent has no negatives in a batch of 1 image"),
        (("--micro-batch", 1), "ablate: temperature=0.1: BatchNorm takes its statistics from 1 image at a time"),
        (("--track", "wandb"), "ablate: temperature=0.1: --track wandb is not installed"),
    ):
        code, said = grid(data, tmp_path / "out", *words)
        assert (code, complaint in said) == (2, True), said
        assert not (tmp_path / "out").exists()
    (programs / "faults.json").write_text('{"--width": 2}')
    code, said = grid(data, tmp_path / "out", "--width", 2)
    assert code == 2
    assert "ablate: temperature=0.1: train.py ended with exit code 2: train: what is --width?" in said
    assert len(calls(programs)) == 1
    assert grid(data, tmp_path / "out", "--depth", 18)[0] == 0


def test_a_folder_holds_one_grid(programs, data, tmp_path):
    """Another grid, other settings, other data and a stranger's folder are refused, and nothing is trained or lost."""
    out = tmp_path / "out"
    assert grid(data, out)[0] == 0
    calls(programs)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    where = ("--data", data / "train", "--eval-data", data / "test", "--out", out)
    for words, expected in (
        (("head", *where, "--epochs", 2), "grid: temperature there, head now"),
        (("temperature", *where, "--epochs", 3), "settings: cifar10 --epochs 2 there, cifar10 --epochs 3 now"),
        (("temperature", "--epochs", 2, *where, "--recipe", "stl10"), "cifar10 --epochs 2 there, stl10"),
        (("temperature", "--epochs", 2, *where, "--data", data / "test"), "data: "),
    ):
        code, said = run(*words)
        assert (code, len(said.splitlines())) == (2, 1)
        assert f"ablate: {out} holds another grid (" in said
        assert expected in said
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "thesis.tex").write_text("x")
    code, said = grid(data, stranger)
    assert code == 2
    assert "is not empty and holds no grid" in said
    assert [path.name for path in stranger.iterdir()] == ["thesis.tex"]
    assert not calls(programs)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["colour"], "unknown grid 'colour'; choose one of augment, head, temperature, batch, color"),
        ([], "name a grid"),
        (["head"], "--data, --eval-data and --out are needed"),
        (
            ["head", "--axis", "dim=2"],
            "expected NAME=V,V,... of this grid's axes, which are head=none,linear,nonlinear",
        ),
        (["head", "--axis", "projection_dim=1/2"], "expected NAME=V,V"),
        (["augment", "--axis", "operators=crop,colour"], "unknown colour; operators are crop, cutout, color"),
        (["batch", "--epochs", "3"], "the grid decides epochs; give its values with --axis epochs=V,V,..."),
        (["color", "--view", "jitter_strength=1"], "the grid decides jitter_strength; give its values with --axis"),
        (["augment", "--second-view", "flip_p=0"], "the grid decides second_view; leave it out"),
        (["head", "--", "--seed=3"], "the grid decides seed; leave it out"),
    ],
)
def test_bad_input_is_refused_in_one_line(data, tmp_path, words, expected):
    where = ["--data", data / "train", "--eval-data", data / "test", "--out", tmp_path / "out"]
    code, said = run(*words[:1], *(where if words[1:] else []), *words[1:])
    assert (code, len(said.splitlines())) == (2, 1)
    assert expected in said
    assert not (tmp_path / "out").exists()


def test_data_without_labels_is_refused(data, tmp_path):
    write_shards(
        [Sample(each.name, None, each.data) for each in samples(4)], tmp_path / "bare", classes=None, name="bare"
    )
    code, said = grid(data, tmp_path / "out", "--data", tmp_path / "bare")
    assert code == 2
    assert "must be labelled with the same classes" in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stop_waits_until_the_training_has_saved(programs, data, tmp_path, number):
    """A signal is passed on once; after kill -9 the training still saves, and the folder is in use until it has."""
    out = tmp_path / "out"
    (programs / "slow").touch()
    words = ["temperature", "--axis", "temperature=0.5", "--seeds", "1", "--epochs", "2", "--out", str(out)]
    words += ["--data", str(data / "train"), "--eval-data", str(data / "test")]
    code = (
        "import pathlib, signal; from tools import ablate; signal.signal(signal.SIGINT, signal.default_int_handler); "
    )
    code += f"ablate.ROOT = pathlib.Path({str(programs)!r}); ablate.app()"  # in the background SIGINT may be ignored
    process = subprocess.Popen([sys.executable, "-c", code, *words], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for(programs / "started", process)
    code, said = run(*words)
    assert code == 2
    assert "is in use by another ablate.py" in said
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    saved = out / "temperature=0.5/seed=0/saved"
    if number == signal.SIGKILL:
        assert "is in use by" in run(*words)[1]
        wait_for(saved)
    else:
        assert (process.returncode, saved.exists()) == (3, True)
        assert said == f"ablate: stopped; the same command goes on in {out}\n"
    (programs / "slow").unlink()
    code, said = run(*words)
    deadline = time.monotonic() + 30
    while "is in use by" in said and time.monotonic() < deadline:  # it has saved, but has yet to end
        code, said = run(*words)
    assert code == 0
    assert "| temperature=0.5 | 1 |" in said


def wait_for(path: Path, process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process is None or process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.02)


# ---- what came of it -----------------------------------------------------------------------------------------------


def results(scores: dict[str, list[float]]) -> list[dict[str, str]]:
    where = {"settings": "s", "data": "d", "loss": ""}
    return [
        {"cell": cell, "seed": str(seed), "knn": str(value), "logistic": str(value / 2), **where}
        for cell, values in scores.items()
        for seed, value in enumerate(values)
    ]


def drawn(monkeypatch: pytest.MonkeyPatch, name: str, found: list[dict[str, str]], path: Path) -> Figure:
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1])
    ablate.draw(name, found, path)
    assert path.exists()
    return figures[0]


def test_the_matrix_shows_the_means_of_singles_and_pairs(monkeypatch, tmp_path):
    """Alone on the diagonal, pairs on both sides of it, the mean of each row last; what is missing stays empty."""
    rng = np.random.default_rng(0)
    names = ["crop", "color", "blur"]
    pairs = ["crop", "color", "blur", "crop+color", "color+blur"]
    scores = {f"operators={pair}": list(rng.random(3)) for pair in pairs}
    figure = drawn(monkeypatch, "augment", results(scores | {"random": [0.1]}), tmp_path / "a.png")
    for axes, scale in zip(figure.axes, (100, 50), strict=True):
        shown = axes.images[0].get_array().filled(np.nan)
        expected = np.full((3, 4), np.nan)
        for pair in pairs:
            i, j = [names.index(name) for name in pair.split("+")][:1] + [names.index(pair.split("+")[-1])]
            expected[i, j] = expected[j, i] = scale * np.mean(scores[f"operators={pair}"])
        expected[:, 3] = np.nanmean(expected[:, :3], axis=1)
        np.testing.assert_allclose(shown, expected)
        assert [tick.get_text() for tick in axes.get_xticklabels()] == [*names, "mean"]
        assert [tick.get_text() for tick in axes.get_yticklabels()] == names
        said = [text.get_text() for text in axes.texts]
        spread = scale * np.std(scores["operators=crop+color"], ddof=1)
        assert said.count(f"{expected[0, 1]:.2f}\n± {spread:.2f}") == 2


def test_bars_stand_in_groups_along_the_last_axis(monkeypatch, tmp_path):
    scores = {
        "head=none": [0.2, 0.4],
        "head=linear/projection_dim=32": [0.5, 0.7],
        "head=linear/projection_dim=256": [0.6],
        "head=nonlinear/projection_dim=256": [0.8, 0.9],
        "random": [0.1],
    }
    axes = drawn(monkeypatch, "head", results(scores), tmp_path / "h.png").axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["h", "32", "256"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["head none", "head linear", "head nonlinear"]
    groups = [each.patches for each in axes.containers if hasattr(each, "patches")]
    assert [[bar.get_height() for bar in bars] for bars in groups] == [
        [pytest.approx(x) for x in y] for y in ([30], [60, 60], [85])
    ]
    middles = [[bar.get_x() + bar.get_width() / 2 for bar in bars] for bars in groups]
    half = groups[0][0].get_width() / 2
    assert middles == [[pytest.approx(x) for x in y] for y in ([0], [1, 2 - half], [2 + half])]
    assert axes.lines[-1].get_ydata()[0] == pytest.approx(10)


def test_without_matplotlib_the_table_still_comes(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    ablate.draw("head", results({"head=none": [0.2]}), tmp_path / "h.png")
    assert "matplotlib is missing; pip install -e '.[eval]'" in capsys.readouterr().out
    assert not (tmp_path / "h.png").exists()


def test_a_real_grid_from_end_to_end(data, tmp_path, monkeypatch):
    """train.py and evaluate.py understand what they are asked for; here in this process, which saves their start."""
    real = {"train.py": train.app, "tools/evaluate.py": evaluate.app}

    def call(_self: ablate.Study, program: str, words: Iterable[object], run: Path) -> None:  # noqa: ARG001
        done = CliRunner().invoke(real[program], list(map(str, words)))
        assert done.exit_code == 0, done.output

    monkeypatch.setattr(ablate.Study, "call", call)
    monkeypatch.setattr(ablate, "L2", (100, 1000))
    out = tmp_path / "out"
    tiny = [
        "--depth",
        18,
        "--width",
        0.125,
        "--stem",
        "standard",
        "--batch-size",
        16,
        "--steps",
        2,
        "--precision",
        "no",
    ]
    code, said = run(
        *("augment", "--axis", "operators=color", "--seeds", 1, "--out", out, *tiny, "--view", "size=16"),
        *("--data", data / "train", "--eval-data", data / "test", "--cpu-threads", 1, "--num-threads", 1),
    )
    assert code == 0, said
    for row in rows(out):
        told = [json.loads(line) for line in (out / row["cell"] / "seed=0.jsonl").read_text().splitlines()]
        assert [each["evaluation"] for each in told] == ["knn", "logistic"]
        assert [l2 for l2, _ in told[1]["tried"]] == [1000, 100]
        assert float(row["knn"]) == next(iter(told[0]["scores"].values()))["top1"]
        assert float(row["logistic"]) == told[1]["scores"]["logistic"]["top1"]
        assert (told[0]["weights"] == "random, seed 0") == (row["cell"] == "random")
    assert (out / "augment.png").exists()
