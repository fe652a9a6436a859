"""Every command of the README does what it says, as a shell passes its words; every option it names exists.

bash runs the pasted text with stand-ins for python, pip and accelerate that note their words. A program then gets its
words in this process. What takes neither a GPU, a cloud nor minutes works on tiny data (`RUN`); the others stop once
their words have been parsed, training once its settings and views are resolved.
"""

import importlib
import os
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

import train
from model.encoder import build_encoder
from model.encoder_file import export_encoder
from pipeline.demo import draw_image

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PROSE = re.sub(r"^```.*?^```$", "", README, flags=re.DOTALL | re.MULTILINE)
TOOLS = ("make_shards", "show_views", "doctor", "evaluate", "export", "ablate")
BENCHMARKS = ("sweep", "report")
RUN = {"make_shards folder", "make_shards verify", "show_views", "export --help"}
RUN |= {f"evaluate {name}" for name in ("knn", "linear", "logistic", "embed", "page")}
ELSEWHERE = {"--multi_gpu", "--num_processes", "--cpu", "--no-deps", "--from-scratch"}  # accelerate's and pip's

STAND_IN = """#!/bin/bash
printf '%s\\0' "${0##*/}" "$@" >>"$CALLS"; printf '\\n\\0' >>"$CALLS"
"""


def blocks() -> list[str]:
    """The lines of the README's bash blocks."""
    found = re.findall(r"^```bash\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [line for block in found for line in block.splitlines() if line.strip()]


def spans() -> list[str]:
    """The commands within its prose, made whole: `.venv/bin/python` is left out there, as are recipe and data."""
    commands = []
    for text in re.findall(r"`([^`\n]+)`", PROSE):
        first = text.split()[0]
        if first in ("tools/ablate.py", "train.py") and " " in text:
            commands.append(f".venv/bin/python {text}")
        elif first == "make_shards.py":
            commands.append(f".venv/bin/python tools/{text}")
        elif first.startswith("benchmarks.") and " " in text:
            commands.append(f".venv/bin/python -m {text}")
        elif text.startswith("python -m "):
            commands.append(f".venv/bin/{text}")
        elif first in train.RECIPES and "--" in text:
            commands.append(f".venv/bin/python train.py {text} --data data/train")
        elif first.startswith("--") and first not in ELSEWHERE and options(text) <= options_of("train"):
            value = {"N": "3", "NAME=VALUE": "size=160"}
            words = " ".join(value.get(word, word) for word in text.split(" "))
            if " " in words or first in ("--resume", "--selective-kernel", "--sync-bn", "--no-online-probe"):
                commands.append(f".venv/bin/python train.py imagenet --data data/train --out runs/x {words}")
    return list(dict.fromkeys(commands))


def options(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))


def command_of(name: str) -> Any:
    if name in BENCHMARKS:
        app = typer.Typer()
        app.command()(importlib.import_module(f"benchmarks.{name}").main)
    else:
        app = importlib.import_module("train" if name == "train" else f"tools.{name}").app
    return typer.main.get_command(app)


def options_of(name: str) -> set[str]:
    command = command_of(name)
    commands = [command, *getattr(command, "commands", {}).values()]
    return {word for each in commands for param in each.params for word in (*param.opts, *param.secondary_opts)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder like a checkout, with stand-ins, tiny images, and an encoder where a run would have left it."""
    place = tmp_path_factory.mktemp("checkout")
    for name in (".venv/bin/python", ".venv/bin/pip", ".venv/bin/accelerate", "bin/python3", "bin/pip"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(STAND_IN)
        (place / name).chmod(0o755)
    rng = np.random.default_rng(0)
    for i in range(40):
        for folder in ("IMAGES", "queries"):
            file = place / folder / "ab"[i % 2] / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw_image(i % 2, rng)).save(file)
    prepared: dict[str, Any] = {"image_size": 32, "mean": [0.5] * 3, "std": [0.25] * 3, "training": {}}
    export_encoder(place / "runs/first/encoder", build_encoder(18, width=0.125, stem="small"), **prepared)
    (place / "run.toml").write_text(re.findall(r"^```toml\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)[0])
    before = Path.cwd()
    os.chdir(place)
    invoke("make_shards", ["folder", "queries", "data/test"])
    yield place
    os.chdir(before)


def calls(line: str, place: Path) -> list[list[str]]:
    """The programs that a line starts, with their words as bash passes them."""
    log = place / "calls"
    log.unlink(missing_ok=True)
    path = f"{place / 'bin'}:{os.environ['PATH']}"
    told = {"CALLS": str(log), "PATH": path}
    subprocess.run(["bash", "-euo", "pipefail", "-c", line], cwd=place, env=told, check=True)
    return [call.split("\0") for call in log.read_text().split("\0\n\0") if call]


def invoke(name: str, words: list[str]) -> str:
    """What a program printed; it must end well."""
    app = importlib.import_module("train" if name == "train" else f"tools.{name}").app
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, f"{name} {shlex.join(words)}: {done.output} {done.exception!r}"
    return done.output


def program(call: list[str]) -> tuple[str, list[str]]:
    """Its name and its words, past python and accelerate; "" where none of ours is started."""
    from accelerate.commands.launch import launch_command_parser

    name, *words = call
    if name == "accelerate":
        assert words[0] == "launch"
        told = launch_command_parser().parse_args(words[1:])
        words = [told.training_script, *told.training_script_args]
    elif name != "python":
        return "", words
    if words[0] == "-m":
        return words[1].removeprefix("benchmarks."), words[2:]
    assert (ROOT / words[0]).is_file(), words
    return Path(words[0]).stem, words[1:]


def parse(name: str, words: list[str]) -> None:
    """Raises a UsageError for words that the program does not take."""
    command = command_of(name)
    context = command.make_context(name, list(words))
    if hasattr(command, "commands"):
        called, command, rest = command.resolve_command(context, words)
        command.make_context(called, rest, parent=context)


@pytest.mark.parametrize("line", [*blocks(), *spans()])
def test_a_command_is_taken_as_a_shell_passes_it(line: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = [program(call) for call in calls(line, place)]
    assert started, "it starts nothing"
    for name, words in started:
        if name == "train":
            resolved: list[Any] = []
            monkeypatch.setattr(train, "train", lambda config, seen=resolved, **rest: seen.append((config, rest)))
            invoke("train", words)
            assert len(resolved) == 1
        elif line in blocks() and (" ".join([name, *words[:1]]) in RUN or name in RUN):
            invoke(name, words)
        elif name in (*TOOLS, *BENCHMARKS):
            parse(name, words)
        else:
            assert name in ("", "pytest"), name


def test_what_is_installed_is_declared() -> None:
    """The extras that the README names, and all that it installs beside them for CUDA 12."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {extra for text in re.findall(r"'\.\[([\w,]+)\]'", README) for extra in text.split(",")}
    assert named <= declared["optional-dependencies"].keys()
    needed = {re.split(r"[>=\[]", each)[0].replace("cuda130", "cuda120") for each in declared["dependencies"]}
    installed = re.search(r"pip install --no-deps -e \. && pip install ([^`]+)`", README)
    assert installed
    assert needed - {"torch", "torchvision", "numpy", "pillow"} == set(installed[1].split())


def test_every_option_that_is_named_exists() -> None:
    """In prose and blocks, of whichever program."""
    known = set().union(*map(options_of, ("train", *TOOLS, *BENCHMARKS))) | ELSEWHERE | {"--help"}
    assert not options(README) - known


@pytest.mark.parametrize("name", ["train", *TOOLS])
def test_every_option_has_its_line_of_help(name: str) -> None:
    command = command_of(name)
    for each in [command, *getattr(command, "commands", {}).values()]:
        silent = [param.name for param in each.params if not getattr(param, "help", "") and param.name != "help"]
        assert not silent, f"{name} {each.name}: {silent}"
