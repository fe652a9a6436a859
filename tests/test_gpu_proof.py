"""The script of the GPU proof: its lines at toy size, its limits, its archive, and how that joins the records."""

import importlib.util
import itertools
import re
import runpy
import shlex
import shutil
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import train
from benchmarks import merge, report
from tools.records import RECORDS, append, read

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_proof", ROOT / ".ci/gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_proof"] = module  # where pickle finds what it hands to processes
    spec.loader.exec_module(module)
    return module


# ---- the lines -----------------------------------------------------------------------------------------------------


def test_the_lines_of_a_part_fit_its_seconds_and_both_parts_a_quarter_of_an_hour(script: Any) -> None:
    for seconds, lines in script.PARTS.values():
        assert sum(line.seconds for line in lines) <= seconds
        assert len({line.name for line in lines}) == len(lines)
    assert sum(seconds for seconds, _ in script.PARTS.values()) <= 800  # the machine's start and transfers take 100


def test_the_list_shows_every_line_with_its_seconds(script: Any) -> None:
    shown = CliRunner().invoke(script.app, ["--list"]).output
    for seconds, lines in script.PARTS.values():
        assert f"{seconds} s" in shown
        for line in lines:
            assert f"{line.seconds:5} s  {line.name}\n         {line.command}\n" in shown


def commands(bash: str) -> Iterator[list[str]]:
    """What a line starts with our Python: the module or file, and its arguments."""
    words = shlex.shlex(re.sub(r"\$\(.*?\)", "NAME", bash), posix=True, punctuation_chars=True)
    words.whitespace_split = True
    for _, group in itertools.groupby(words, lambda word: set(word) <= set(";&|()<>")):
        command = list(group)
        if "$PYTHON" in command:
            yield command[command.index("$PYTHON") + 1 :]


def parse(command: Any, arguments: list[str]) -> None:
    """Raises what typer says of arguments, of a command or of one among several; runs nothing."""
    if commands := getattr(command, "commands", None):
        name, *arguments = arguments
        command = commands[name]
    command.make_context(command.name, arguments).close()


@pytest.mark.parametrize("size", ["command", "tiny"])
def test_every_line_gives_options_that_its_program_knows(script: Any, size: str, monkeypatch: Any) -> None:
    """Nothing is run: only what the programs themselves make of their command lines."""
    mains: dict[str, Any] = {}
    monkeypatch.setattr(typer, "run", lambda function: mains.update({name: function}))
    seen = set()
    for _, lines in script.PARTS.values():
        for line in lines:
            for program, *arguments in commands(getattr(line, size)):
                name = arguments.pop(0) if program == "-m" else program
                seen.add(name)
                if name.startswith("benchmarks."):
                    if name not in mains:
                        runpy.run_path(str(ROOT / name.replace(".", "/")) + ".py", run_name="__main__")
                    app = typer.Typer()
                    app.command()(mains[name])
                elif name in ("$ROOT/train.py", "$ROOT/.ci/gpu.py"):
                    app = train.app if name.endswith("train.py") else script.app
                elif name == "pytest":
                    files = [word.replace("$ROOT", str(ROOT)) for word in arguments if word.endswith(".py")]
                    assert files
                    assert all(Path(file).is_file() for file in files)
                    continue
                else:
                    assert (name, arguments) in (("tools.doctor", []), ("-c", arguments))
                    continue
                parse(typer.main.get_command(app), arguments)
    assert len(seen) >= 10


def test_lines_keep_to_their_seconds_and_a_failed_one_is_passed_over(
    script: Any, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """A line may use what those before it left; one that hangs ends with all that it started, and in time."""
    alive = tmp_path / "alive"
    hangs = f"trap '' TERM; (while sleep 0.1; do touch {alive}; done) & sleep 60"
    bash = {"quick": "echo one", "fails": "echo why; exit 7", "longer": "sleep 1.2", "hangs": hangs, "last": "true"}
    lines = [script.Line(name, 1, command, "false") for name, command in bash.items()]
    start = time.monotonic()
    results = script.run_lines(lines, 5, tmp_path, {"PATH": "/usr/bin:/bin"})
    assert 4 <= time.monotonic() - start < 5
    ended = {line.name: how for line, how in results}
    assert {name: how for name, how in ended.items() if name != "hangs"} == {
        "quick": "ok",
        "fails": "exit code 7",
        "longer": "ok",
        "last": "ok",
    }
    assert ended["hangs"].startswith("stopped after")
    said = capfd.readouterr().out
    assert "fails: exit code 7\n    $ echo why; exit 7\n    why\n" in said
    logs = {path.name: path.read_text() for path in (tmp_path / "logs").iterdir()}
    assert logs["00-quick.txt"] == "$ echo one\none\n"
    alive.unlink(missing_ok=True)
    time.sleep(0.3)
    assert not alive.exists()


def test_a_failed_line_is_named_at_the_end_and_its_log_is_in_the_archive(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bash = {"good": "mkdir profile; echo 1 > profile/trace.json", "bad": "exit 3"}
    lines = [script.Line(name, 5, "", tiny) for name, tiny in bash.items()]
    monkeypatch.setattr(script, "PARTS", {1: (10, lines)})
    done = CliRunner().invoke(script.app, ["--part", "1", "--device", "cpu", "--tiny", "--out", str(tmp_path)])
    assert done.exit_code == 1
    assert done.output.endswith("failed:\n  bad: exit code 3\n")
    with tarfile.open(tmp_path / "gpu-part-1.tar.gz") as tar:
        assert tar.getnames() == ["logs/00-good.txt", "logs/01-bad.txt", "profile/trace.json"]


def refused(script: Any, *arguments: str) -> str:
    done = CliRunner().invoke(script.app, ["--device", "cpu", "--tiny", *arguments])
    assert done.exit_code == 2, done.output
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", done.output).split())


def test_what_would_spoil_a_whole_part_is_refused_before_it_starts(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "1 or 2" in refused(script)
    assert "no line of part 2 begins so" in refused(script, "--part", "2", "--only", "LARS")
    assert f"no photographs in {tmp_path}"[:30] in refused(script, "--part", "2", "--photographs", str(tmp_path))
    monkeypatch.setattr(script, "find", lambda _: [])
    assert "give --photographs" in refused(script, "--part", "2")
    monkeypatch.setattr(script.shutil, "which", lambda _: None)
    monkeypatch.delenv("SWIFTCLR_COMMIT", raising=False)
    assert "set SWIFTCLR_COMMIT" in refused(script, "--part", "1")


# ---- a part at toy size, and its archive ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def archives(script: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of a few lines, among them data and training; all others are parsed above, and run by hand before a GPU is."""
    out = tmp_path_factory.mktemp("out")
    for part, only in (("1", ["versions", "LARS"]), ("2", ["data", "training"])):
        arguments = ["--part", part, *(word for name in only for word in ("--only", name))]
        done = CliRunner().invoke(script.app, [*arguments, "--device", "cpu", "--tiny", "--out", str(out)])
        assert done.exit_code == 0, done.output
    return sorted(out.iterdir())


@pytest.mark.slow
def test_an_archive_joins_the_records_once(archives: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Rows behind those that were there; tables and plots as the README's check wants them; a second time, nothing."""
    records, readme, names = tmp_path / "records", tmp_path / "README.md", ("lars", "training")
    records.mkdir()
    for path in (*RECORDS.glob("training-*.png"), *(RECORDS / f"{name}.csv" for name in names)):
        shutil.copy(path, records)
    readme.write_text("".join(f"<!-- report:{name} -->\n<!-- /report -->\n" for name in names))
    before = {name: read(records / f"{name}.csv") for name in names}
    merge.merge(archives, records, [readme])
    after = {name: read(records / f"{name}.csv") for name in names}
    for name in names:
        for old, now in zip(before[name], after[name], strict=False):
            assert now.items() >= old.items()
            assert not any(now[column] for column in now.keys() - old.keys())
    optimizers = {row["implementation"] for row in after["lars"][len(before["lars"]) :]}
    assert optimizers >= {"ours", "ours, 2 parameters", "SGD, foreach"}
    *_, run = added = after["training"][len(before["training"]) :]
    assert [row["step"] for row in added] == ["0", "8"]
    assert run["command"].startswith("train.py cifar10 --data data/small ")
    assert run["command"].endswith("--resume")
    assert not report.faults(readme, records)
    assert run["run"] in readme.read_text()
    said = capsys.readouterr().out
    assert "training.csv: 2 rows added, 0 were there" in said
    assert "nothing was measured in variants" in said
    merge.merge(archives, records, [readme])
    assert "training.csv: 0 rows added, 2 were there" in capsys.readouterr().out
    assert {name: read(records / f"{name}.csv") for name in before} == after


GOOD = {"what": "lars", "implementation": "ours", "median_ms": "1", "device": "NVIDIA H200", "torch": "2.11.0"}
GOOD |= {"commit": "abc1234", "date": "2026-01-02", "load": "0.1", "command": "benchmarks.lars --device cuda"}


def archive_of(folder: Path, name: str, row: dict[str, str]) -> Path:
    append(folder / f"{name}.csv", [row])
    with tarfile.open(folder / "some.tar.gz", "w:gz") as tar:
        tar.add(folder / f"{name}.csv", f"records/{name}.csv")
    return folder / "some.tar.gz"


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        ("demo", GOOD, "demo.csv is no record of .ci/gpu.py; expected one of lars, step"),
        ("lars", GOOD | {"commit": ""}, "lars.csv, line 2 says nothing of commit"),
        ("lars", {key: value for key, value in GOOD.items() if key != "median_ms"}, "line 2 lacks median_ms"),
        ("lars", GOOD | {"command": "benchmarks.sweep /root/data"}, "a path of the machine.*: 'benchmarks.sweep /root"),
        ("lars", GOOD | {"command": "benchmarks.sweep --out=/tmp"}, "a path of the machine"),
    ],
)
def test_rows_that_cannot_stand_are_refused_and_nothing_changes(
    name: str, row: dict[str, str], words: str, tmp_path: Path
) -> None:
    records, readme = tmp_path / "records", tmp_path / "README.md"
    append(records / "lars.csv", [GOOD])
    readme.write_text("<!-- report:lars -->\n<!-- /report -->\n")
    with pytest.raises(ValueError, match=f"nothing was merged:\n.*{words}"):
        merge.merge([archive_of(tmp_path, name, row)], records, [readme])
    assert read(records / "lars.csv") == [GOOD]
    assert [path.name for path in records.iterdir()] == ["lars.csv"]


def test_a_torn_archive_and_a_torn_record_are_refused(script: Any, tmp_path: Path) -> None:
    whole = archive_of(tmp_path, "lars", GOOD)
    torn = tmp_path / "torn.tar.gz"
    torn.write_bytes(whole.read_bytes()[:-4])
    places = ["--records", str(tmp_path / "records"), "--readme", str(tmp_path / "README.md")]
    done = CliRunner().invoke(script.app, ["merge", str(torn), *places])
    assert done.exit_code == 2
    assert "torn.tar.gz is no archive of" in done.output
    ragged = tmp_path / "lars.csv"
    ragged.write_text(ragged.read_text() + "lars,ours\n")
    with tarfile.open(whole, "w:gz") as tar:
        tar.add(ragged, "records/lars.csv")
    with pytest.raises(ValueError, match="line 3 has not as many cells"):
        merge.merge([whole], tmp_path / "records", [tmp_path / "README.md"])


def test_the_best_of_several_variants_is_named_with_the_others_behind_it() -> None:
    gradient = {"what": "gradient", "rows": "16384"}
    tuned = [gradient | {"shape": shape, "median_ms": ms} for shape, ms in (("a", "2"), ("b", "1.5"))]
    alone = {"what": "gradient", "rows": "2048", "shape": "a", "median_ms": "1"}
    loads = [
        {"what": what, "size": "224", "threads": "16", "hw_decoder_load": load, "images_per_s": rate}
        for what, load, rate in (("decoder", "0.65", "9000"), ("decoder", "0.9", "9500"), ("loader", "0.7", "1"))
    ]
    step = {"depth": "50", "size": "224", "images": "256", "layout": "nhwc", "precision": "bf16", "bn": "local"}
    steps = [step | {"mode": mode, "median_ms": ms} for mode, ms in (("graph", "90"), ("eager", "100"))]
    assert merge.winners({"loss_tune": [*tuned, alone], "loader": loads, "step": steps}) == [
        "what gradient, rows 16384: shape b: 1.5 median_ms; a: 2 median_ms (default: shapes() of "
        "model/nt_xent_triton.py)",
        "size 224, threads 16: hw_decoder_load 0.9: 9500 images_per_s; 0.65: 9000 images_per_s (default: Encoding of "
        "pipeline/graph.py)",
        "depth 50, size 224, images 256, layout nhwc, precision bf16, bn local: mode graph: 90 median_ms; eager: 100 "
        "median_ms (default: eager; train.py has --compile and no CUDA graph)",
    ]
    assert merge.winners({"loss_tune": [alone]}) == ["nothing was measured in variants"]


def test_data_are_jpegs_of_imagenets_size_and_bare_pixels(script: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Crops are a function of the data set and the number: classes are the regions of the photographs."""
    from PIL import Image

    photographs = script.find_photographs(None)
    monkeypatch.setenv("PHOTOGRAPHS", ":".join(map(str, photographs)))
    monkeypatch.chdir(tmp_path)
    for number in range(6):
        script.crop("large", number)
        script.crop("small", number)
    large, small = (sorted(tmp_path.glob(f"images/{name}/*/*")) for name in ("large", "small"))
    assert [path.parent.name for path in large] == [f"class-{i:02}" for i in range(6)]
    sizes = [Image.open(path).size for path in large]
    assert all(abs(width - 500) <= 50 and abs(height - 375) <= 38 for width, height in sizes)
    assert len(set(sizes)) > 3
    assert {Image.open(path).size for path in small} == {(32, 32)}
    assert {Image.open(path).format for path in large} == {"JPEG"}
