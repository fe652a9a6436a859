"""Training: what a run is made of, that ranks and interruptions do not change it, and how bad input ends."""

import contextlib
import errno
import functools
import io
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

import tools.make_shards
import tools.ranks
import train
from model.checkpoint import OWN_HASH, NotFiniteError, latest, latest_whole, save
from model.encoder import build_encoder
from model.encoder_file import load_encoder
from model.nt_xent import nt_xent
from model.simclr import ProjectionHead, SimCLR
from model.step import Outcome, train_step
from pipeline.loader import Batch, Loader, LoaderError
from pipeline.shards import Sample, read_dataset
from pipeline.write import write_shards
from tests.oracles.monitor import contrast
from tests.processes import Program, spawn
from tools import signals
from tools.errors import one_message
from tools.files import write_mark
from tools.runs import training_of

ROOT = Path(__file__).resolve().parents[1]
NUM, BATCH = 70, 16  # four steps an epoch, six samples over
TINY = ["demo", "--depth", "18", "--width", "0.125", "--batch-size", "16", "--warmup-epochs", "1", "--seed", "3"]
TINY += ["--precision", "no", "--cpu-threads", "1", "--num-threads", "1", "--view", "size=16"]


def png(i: int) -> bytes:
    noise = np.random.default_rng(i).integers(0, 256, (4, 4, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((16, 16)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "train"
    samples = [Sample(f"{i}.png", i % 2, png(i)) for i in range(NUM)]
    write_shards(samples, out, classes=["even", "odd"], name="train", shard_size=30)
    return out


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """Training takes over signals and torch's threads; give them back."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before, threads = [signal.getsignal(number) for number in numbers], torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(train.app, [*TINY, *arguments])


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- configuration -------------------------------------------------------------------------------------------------


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `train` is called with, instead of training."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(train, "train", lambda config, **rest: seen.update(rest, config=config))
    return seen


def test_command_line_beats_file_beats_recipe(resolved: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('epochs = 7\nbatch_size = 64\nhead = "linear"\n[views]\nsize = 48\nflip_p = 0.25\n')
    arguments = ["cifar10", "--config", str(file), "--batch-size", "128", "--view", "flip_p=0"]
    done = CliRunner().invoke(train.app, arguments)
    assert done.exit_code == 0, done.output
    config, origin = resolved["config"], resolved["origin"]
    assert (config.batch_size, config.epochs, config.head, config.temperature) == (128, 7, "linear", 0.5)
    assert (config.views.flip_p, config.views.size, config.views.jitter_strength) == (0.0, 48, 0.5)
    assert (origin["batch_size"], origin["epochs"], origin["views.flip_p"]) == ("command line", "file", "command line")
    assert "temperature" not in origin


def test_the_second_view_is_the_first_with_its_own_changes(resolved: dict[str, Any], tmp_path: Path) -> None:
    """--view and [views] change both, --second-view and [second_views] the second alone; without them it has none."""
    file = tmp_path / "run.toml"
    file.write_text("[views]\nflip_p = 0.25\n[second_views]\nsolarize_p = 0.2\nblur_p = 0.1\n")
    arguments = ["cifar10", "--view", 'profile="reference"', "--second-view", "blur_p=0.5", "--config", str(file)]
    done = CliRunner().invoke(train.app, arguments)
    assert done.exit_code == 0, done.output
    config, origin = resolved["config"], resolved["origin"]
    assert config.views == replace(train.RECIPES["cifar10"].views, profile="reference", flip_p=0.25)
    assert config.second_views == replace(config.views, solarize_p=0.2, blur_p=0.5)
    assert (origin["second_views.solarize_p"], origin["second_views.blur_p"]) == ("file", "command line")
    assert "second_views.blur_p=0.5 (command line)" in train.settings(config, origin)
    CliRunner().invoke(train.app, ["cifar10", "--view", "blur_p=0.5"])
    assert resolved["config"].second_views is None


def test_a_view_option_is_taken_as_a_shell_passes_it(resolved: dict[str, Any]) -> None:
    """The shell takes the quotes of --view profile="reference" away: a bare word is a string."""
    for text in ('profile="reference"', "profile='reference'", "profile=reference", "profile = reference"):
        words = shlex.split(f"cifar10 --view {shlex.quote(text)}")
        assert CliRunner().invoke(train.app, words).exit_code == 0
        assert resolved["config"].views.profile == "reference"
    words = shlex.split('cifar10 --view profile="reference"')
    assert CliRunner().invoke(train.app, words).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["imagenett"], "unknown recipe 'imagenett'; choose one of demo, cifar10, stl10, imagenet"),
        (["cifar10", "--view", "colour=1"], "unknown view option 'colour'"),
        (["cifar10", "--view", "size"], "expected NAME=VALUE"),
        (["cifar10", "--second-view", "colour=1"], "unknown view option 'colour'"),
        (["cifar10", "--view", "flip_p=2.0"], "flip_p: expected a probability"),
        (["cifar10", "--view", "flip_p=half"], "flip_p: expected float like 0.5, got 'half'"),
        (["cifar10", "--view", "profile=slow"], "profile: expected fast or reference, got 'slow'"),
        (["cifar10", "--view", "profile=3"], "profile: expected fast or reference, got 3"),
        (["cifar10", "--view", "interpolation=true"], "interpolation: expected linear or cubic, got True"),
        (["cifar10", "--view", "size=" + "[" * 5000], "expected NAME=VALUE"),
        (["cifar10", "--views", "mnist"], "unknown views 'mnist'"),
        (["cifar10", "--batch-size", "0"], "batch_size: expected at least 1, got 0"),
        (["cifar10", "--head", "deep"], "deep"),
        (["cifar10", "--base-lr", "nan"], "base_lr: expected at least 0, got nan"),
        (["cifar10", "--temperature", "nan"], "temperature: expected more than 0, got nan"),
        (["cifar10", "--width", "inf"], "width: expected more than 0, got inf"),
        (["cifar10", "--momentum", "1"], "momentum: expected at least 0 and less than 1, got 1.0"),
    ],
)
def test_a_wrong_option_ends_in_one_message(arguments: list[str], named: str, resolved: dict[str, Any]) -> None:
    done = CliRunner().invoke(train.app, arguments)
    assert done.exit_code == 2
    assert named in done.output
    assert not resolved


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("batchsize = 3", "unknown key batchsize"),
        ("epochs = 'many'", "epochs: expected a whole number, got 'many'"),
        ("epochs = 3.0", "epochs: expected a whole number, got 3.0"),
        ("base_lr = nan", "base_lr: expected a number, got nan"),
        ("base_lr = -1", "base_lr: expected at least 0, got -1"),
        ("sync_bn = 'x'", "sync_bn: expected true or false, got 'x'"),
        ("optimizer = 'adam'", "optimizer: expected one of lars, sgd, adamw, got 'adam'"),
        ("epochs = ", "cannot be read"),
        ("views = 'cifar'", "views: expected a table, got 'cifar'; write [views] preset = \"cifar\""),
        ("[views]\npreset = true", "[views] preset: expected one of imagenet, cifar, stl10, got True"),
        ("[views]\npreset = ['cifar']", "[views] preset: expected one of imagenet, cifar, stl10, got ['cifar']"),
        ("[views]\npreset = 'mnist'", "[views] preset: expected one of imagenet, cifar, stl10, got 'mnist'"),
        ("epochs = " + "[" * 5000, "cannot be read"),
        ("[views]\nsize = true", "[views] view option size: expected int like 224, got True"),
        ("[views]\nsize = {a = 1}", "[views] view option size: expected int like 224, got {'a': 1}"),
        ("[views]\nsize = 1", "[views] view option size: expected at least 8 pixels, got 1"),
        ("[second_views]\nseed = 1", "[second_views] unknown view option 'seed'"),
        ("[views]\nmean = ['a', 'b', 'c']", "mean"),
        ("[views]\ncrop_area = 0.5", "crop_area"),
        ("[views]\ncrop_area = []", "crop_area"),
        ("epochs = true", "epochs: expected a whole number, got true"),
        ("epochs = [1]", "epochs"),
        ("epochs = {a = 1}", "epochs"),
        ("base_lr = 1979-05-27", "base"),
        ('data = "a\\u0000b"', "data: expected text in quotes, without a null character, got"),
        ("data = ['a']", "data: expected text in quotes, without a null character, got ['a']"),
        (
            "track = 1979-05-27",
            "track: expected text in quotes, without a null character, got datetime.date(1979, 5, 27)",
        ),
        (
            "window = 18446744073709551616",
            "window: expected at least 0 and less than 2.14748e+09, got 18446744073709551616",
        ),
        ("num_threads = 5000", "num_threads: expected at least 0 and less than 4096, got 5000"),
        ("second_views = 3", "second_views: expected a table, got 3; write [second_views]"),
    ],
)
def test_a_wrong_file_ends_in_one_message(text: str, named: str, tmp_path: Path, resolved: dict[str, Any]) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    done = CliRunner().invoke(train.app, ["cifar10", "--config", str(file)])
    assert done.exit_code == 2
    said = " ".join(done.output.replace("│", " ").split())  # in a box, where a long path breaks the line
    assert named in said
    assert "run.toml" in said.replace(" ", "")
    assert not resolved


# ---- a run ---------------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_folder_complete(shards: Path, tmp_path: Path) -> None:
    """Nine steps cross two epochs; every file a user or a tool looks for is there and says the same."""
    out = tmp_path / "run"
    common = ("--data", str(shards), "--eval-data", str(shards), "--out", str(out), "--steps", "9")
    done = run(*common, "--log-every", "4", "--track", "tensorboard")
    assert done.exit_code == 0, done.output
    assert [row["step"] for row in rows(out) if "loss" in row] == list(range(1, 10))
    assert [row["step"] for row in rows(out) if "knn" in row] == [0, 9]
    assert [row["step"] for row in rows(out, "speed.jsonl")] == [4, 8, 9]
    assert json.loads((out / "status.json").read_text())["state"] == "done"
    config, bank = json.loads((out / "config.json").read_text()), read_dataset(shards).samples
    assert (config["batch_size"], config["knn_k"]) == (BATCH, bank)  # fewer than the usual 200 are there to vote
    assert f"kNN        the {bank} nearest of {bank} images vote" in done.output
    assert Image.open(out / "views.png").width > 4 * 16
    newest = latest(out / "checkpoints")
    assert newest is not None
    assert newest.name == "step-0000009"
    assert load_encoder(out / "encoder").num_features == 64
    assert list((out / "swiftclr").rglob("events.out.tfevents*"))
    assert "step 9/9 100% | loss" in done.output
    assert "data_wait" in done.output


def test_a_compiled_run_is_the_eager_one_under_the_same_names(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is traced is what runs eagerly, and neither checkpoint nor encoder knows of the wrapper."""
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:  # the default one calls a C++ compiler for a minute
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    for choice in ("on", "off"):
        done = run("--data", str(shards), "--steps", "3", "--compile", choice, "--out", str(tmp_path / choice))
        assert done.exit_code == 0, done.output
        assert ("compiled" if choice == "on" else "eager") in done.output
        assert len(graphs) == 1, "one graph without a break, and none where it is off"
    assert [row["loss"] for row in rows(tmp_path / "on")] == pytest.approx(
        [row["loss"] for row in rows(tmp_path / "off")], rel=1e-5
    )
    ends = [load_file(latest(tmp_path / choice / "checkpoints") / "model.safetensors") for choice in ("on", "off")]
    assert list(ends[0]) == list(ends[1])
    for name, tensor in ends[1].items():
        torch.testing.assert_close(ends[0][name], tensor, rtol=1e-4, atol=1e-5)
    assert (
        load_encoder(tmp_path / "on" / "encoder").state_dict().keys()
        == build_encoder(18, width=0.125).state_dict().keys()
    )


def test_a_finished_run_may_be_resumed_with_queries_added(shards: Path, tmp_path: Path) -> None:
    """There is nothing left to train, and no accuracy from before to compare with; it just ends well again.

    What a kill in the last save has left goes: a workspace, and the oldest checkpoint but for those kept.
    """
    common = ("--data", str(shards), "--out", str(tmp_path / "run"), "--steps", "3", "--checkpoint-every", "1")
    assert run(*common, "--keep", "3").exit_code == 0
    left = tmp_path / "run/checkpoints/.checkpoint.abcdefgh.tmp"
    left.mkdir()
    write_mark(left)
    done = run(*common, "--resume", "--eval-data", str(shards))
    assert (done.exit_code, "random initialisation" in done.output) == (0, False), done.output
    assert sorted(path.name for path in left.parent.iterdir()) == ["step-0000002", "step-0000003"]


def test_equal_seeds_give_equal_runs(shards: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert run("--data", str(shards), "--out", str(tmp_path / name), "--steps", "3").exit_code == 0
    assert (tmp_path / "a/metrics.jsonl").read_bytes() == (tmp_path / "b/metrics.jsonl").read_bytes()
    assert run("--data", str(shards), "--out", str(tmp_path / "c"), "--steps", "3", "--seed", "4").exit_code == 0
    assert (tmp_path / "a/metrics.jsonl").read_bytes() != (tmp_path / "c/metrics.jsonl").read_bytes()


# ---- interruptions -------------------------------------------------------------------------------------------------


def start(shards: Path, out: Path, *more: str) -> Program:
    arguments = [*TINY, "--data", str(shards), "--out", str(out), "--steps", "30", "--checkpoint-every", "3", *more]
    environment = {name: value for name, value in os.environ.items() if name != "ACCELERATE_MIXED_PRECISION"}
    output = out.with_name(f"{out.name}-{time.monotonic_ns()}.txt")
    return Program("train.py", *arguments, "--log-every", "2", output=output, env=environment)


def wait_for_step(process: Program, out: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if (out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_text().splitlines()) >= step:
            return
        time.sleep(0.002)
    raise AssertionError(f"no step {step}: {process.communicate()[0] if process.poll() is not None else 'timed out'}")


def test_a_killed_run_goes_on_bit_for_bit(shards: Path, tmp_path: Path) -> None:
    """SIGKILL, SIGTERM and SIGKILL at random moments; rows and weights are those of a run that was left alone.

    30 steps cross seven epochs' ends. SIGTERM finishes its step, saves and says so; SIGKILL cannot.
    """
    rng = random.Random(int.from_bytes(os.urandom(4)))
    whole = start(shards, tmp_path / "whole")
    out = tmp_path / "killed"
    for number, step in ((signal.SIGKILL, 6), (signal.SIGTERM, 13), (signal.SIGKILL, 20)):
        process = start(shards, out, "--resume")
        wait_for_step(process, out, step)
        time.sleep(rng.uniform(0, 0.2))
        process.send_signal(number)
        printed = process.communicate(timeout=120)[0]
        if number == signal.SIGTERM and process.returncode != 0:  # 0: it was already at its end
            assert process.returncode == 3, printed
            status = json.loads((out / "status.json").read_text())
            newest = latest(out / "checkpoints")
            assert newest is not None
            assert (status["state"], int(newest.name[5:])) == ("preempted", status["step"])
    last = start(shards, out, "--resume")
    assert last.wait(timeout=120) == 0, last.communicate()[0]
    assert whole.wait(timeout=120) == 0, whole.communicate()[0]
    assert (out / "metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    mine, others = (load_encoder(folder / "encoder").state_dict() for folder in (out, tmp_path / "whole"))
    assert all(torch.equal(mine[name], others[name]) for name in others)
    ends = [latest(folder / "checkpoints") for folder in (out, tmp_path / "whole")]
    hashes = [json.loads((end / "state.json").read_text())["sha256"] for end in ends if end]
    assert hashes[0] == hashes[1]
    assert hashes[0].keys() == {"model.safetensors", "optimizer.safetensors", "probe.safetensors"}


SLOW = """
import time
from model import checkpoint
import train
save = checkpoint.save
def slow(*arguments, **more):
    time.sleep(2)
    return save(*arguments, **more)
checkpoint.save = slow
train.app()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "processes"), [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGTERM, 2)])
def test_a_signal_to_the_launcher_and_all_it_started_saves(
    number: signal.Signals, processes: int, shards: Path, tmp_path: Path
) -> None:
    """Ctrl-C, systemd and Slurm: the process gets it twice or more, within the seconds that it saves, and no log line
    is near."""
    out, program = tmp_path / "run", tmp_path / "slow.py"
    program.write_text(SLOW)
    launch = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    launch += ["--num_processes", str(processes), "--cpu" if processes == 1 else "--multi_gpu"]
    far = ["--steps", "100000", "--log-every", "100000", "--checkpoint-every", "100000"]
    process = Program(
        "-m accelerate.commands.launch",
        *[*launch, str(program), *TINY, "--data", str(shards), "--out", str(out), *far],
        output=tmp_path / "output.txt",
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not (out / "views.png").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.5)
        os.killpg(process.pid, number)
        process.wait(timeout=60)
        deadline = time.monotonic() + 60  # for the last process, where the launcher ended before it
        while json.loads((out / "status.json").read_text())["state"] == "running" and time.monotonic() < deadline:
            time.sleep(0.01)
        printed = (tmp_path / "output.txt").read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    status = json.loads((out / "status.json").read_text())
    assert status["state"] == "preempted", printed
    newest = latest(out / "checkpoints")
    assert newest is not None
    assert int(newest.name[5:]) == status["step"] == len(rows(out))


def test_only_a_second_interrupt_after_a_while_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stop, now = signals.Stop(), [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.raise_signal(number)
    now[0] += stop.AGAIN_S
    signal.raise_signal(signal.SIGTERM)
    assert stop.received
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("when", [0, 1, 2])
def test_a_signal_interrupts_an_evaluation_which_the_resumed_run_makes_up_for(
    when: int, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, in the middle of and after training: at once, however long it would take; what is left is the same."""
    common = ("--data", str(shards), "--eval-data", str(shards), "--steps", "6", "--knn-every", "1", "--log-every", "1")
    assert run(*common, "--out", str(tmp_path / "whole")).exit_code == 0
    evaluations = []

    def slow(*arguments: Any, **options: Any) -> float:
        evaluations.append(arguments)
        if len(evaluations) == when + 1:
            signal.raise_signal(signal.SIGTERM)
            time.sleep(60)
        return knn(*arguments, **options)

    knn = train.knn
    monkeypatch.setattr(train, "knn", slow)
    begun, out = time.monotonic(), tmp_path / "run"
    stopped = run(*common, "--out", str(out))
    assert time.monotonic() - begun < 50
    assert stopped.exit_code == 3, stopped.output
    assert json.loads((out / "status.json").read_text())["state"] == "preempted"
    assert run(*common, "--out", str(out), "--resume").exit_code == 0
    assert ends(out) == ends(tmp_path / "whole")
    assert json.loads((out / "status.json").read_text())["state"] == "done"


def exchange(rank: int, barrier: threading.Barrier, table: list[torch.Tensor], mine: torch.Tensor) -> torch.Tensor:
    """What processes gather, among threads."""
    table[rank] = mine
    barrier.wait(20)
    everyones = torch.cat(table)
    barrier.wait(20)
    return everyones


@pytest.mark.parametrize("asked", [None, (0, 0), (1, 7), (2, 20), (2, 21)])
def test_processes_give_an_evaluation_up_together_or_not_at_all(asked: tuple[int, int] | None) -> None:
    """Whichever of them is asked, and with parts that differ by one, they agree and none is left waiting."""
    lengths, stops = (20, 21, 22), [signals.Stop() for _ in range(3)]
    barrier, table = threading.Barrier(3), [torch.empty(0)] * 3

    def work(rank: int) -> Any:
        def parts() -> Iterator[int]:
            for number in range(lengths[rank]):
                if asked == (rank, number):
                    stops[rank].received = True
                time.sleep(0.001 * (rank + 1))
                yield number

        gather = functools.partial(exchange, rank, barrier, table)
        together: Any = functools.partial(stops[rank].together, processes=3, gather=gather, device=torch.device("cpu"))
        return together(lambda shown: len(list(shown)), parts(), 20), together(lambda _: "voted")

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(work, range(3)))
    assert found == ([(None, None)] * 3 if asked else [(length, "voted") for length in lengths])


STALLED = """
import os, sys, time
read = os.preadv
def stalled(number, rows, place):
    if os.readlink(f"/proc/self/fd/{number}").endswith("train-000001.tar"):
        time.sleep(600)
    return read(number, rows, place)
os.preadv = stalled
import pipeline.graph, train  # DALI takes seconds to import
train.app()
"""


def test_a_loader_that_gives_nothing_ends_the_run(shards: Path, tmp_path: Path) -> None:
    """Naming rank and shard, and the process does not wait for the thread that hangs."""
    out = tmp_path / "run"
    arguments = [*TINY, "--data", str(shards), "--out", str(out), "--steps", "30", "--data-timeout", "12"]
    done = subprocess.run([sys.executable, "-c", STALLED, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    said = f"rank 0 could not read batch 0 of epoch 0 of {shards}: nothing has come for 12 s, reading "
    assert said + f"{shards}/train-000001.tar. See whether" in done.stderr
    assert said in json.loads((out / "status.json").read_text())["message"]


# ---- micro-batches, and steps that are not finite ------------------------------------------------------------------


def poison(monkeypatch: pytest.MonkeyPatch, runs: range) -> None:
    """One pixel is NaN in the batches that the loader gives in these runs."""
    whole = Loader.__next__

    def broken(loader: Loader) -> Batch:
        batch = whole(loader)
        if loader._runs - 1 in runs:
            batch.views[0, 0, 0, 0] = torch.nan
        return batch

    monkeypatch.setattr(Loader, "__next__", broken)


def ends(out: Path) -> tuple[bytes, dict[str, str]]:
    newest = latest(out / "checkpoints")
    assert newest is not None
    return (out / "metrics.jsonl").read_bytes(), json.loads((newest / "state.json").read_text())["sha256"]


def test_a_run_in_micro_batches_resumes_bit_for_bit(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six steps cross an epoch's end; two of them in a row are skipped, on both sides of the checkpoint."""
    poison(monkeypatch, range(9, 13))  # three micro-batches of step 3, one of step 4
    common = (
        "--data",
        str(shards),
        "--log-every",
        "2",
        "--steps",
        "6",
        "--micro-batch",
        "4",
        "--checkpoint-every",
        "3",
    )
    done = run(*common, "--out", str(tmp_path / "whole"))
    assert done.exit_code == 0, done.output
    assert "in 4 micro-batches of 4, 3 of them encoded twice" in done.output
    assert "| skipped 1 |" in done.output
    assert [row.get("skipped") for row in rows(tmp_path / "whole")] == [None, None, 1, 2, None, None]
    assert [row["loss"] is None for row in rows(tmp_path / "whole")] == [False, False, True, True, False, False]

    out, real, calls = tmp_path / "cut", train_step, iter(range(4))

    def cut(*arguments: Any, **more: Any) -> Outcome:
        if next(calls, None) is None:
            raise OSError("the plug was pulled")
        return real(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr("model.step.train_step", cut)
        assert "the plug was pulled" in run(*common, "--out", str(out)).output
    assert ends(out) != ends(tmp_path / "whole")
    done = run(*common, "--out", str(out), "--resume", "--keep-graphs", "3")
    assert done.exit_code == 0, done.output
    assert "1 of them encoded twice" in done.output
    assert ends(out) == ends(tmp_path / "whole")
    other = run(*common[:-4], "--micro-batch", "8", "--checkpoint-every", "3", "--out", str(out), "--resume")
    assert other.exit_code == 0, other.output
    assert "note       BatchNorm's statistics are of 8 images at a time, 4 before" in other.output


def test_a_micro_batch_that_does_not_divide_is_refused(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a GPU is asked what fits."""
    monkeypatch.delattr(train, "build_training")
    done = run("--data", str(shards), "--out", str(tmp_path / "run"), "--micro-batch", "5")
    assert done.exit_code == 2
    assert "micro_batch 5 does not divide the 16 images of a process's batch; near are 2, 4, 8" in done.output
    assert not (tmp_path / "run").exists()


def _watched_rank(rank: int, world_size: int, port: int, data: str, out: str) -> None:
    """Train with broken images on rank 1 from the third step on; keep each step's z as the loss saw it."""
    join(rank, world_size, port)
    if rank == 1:
        poison(pytest.MonkeyPatch(), range(2, 100))
    real, seen = train_step, []

    def keeping(model: Any, optimizer: Any, views: Any, loss_of: Any, *more: Any, **options: Any) -> Outcome:
        def loss(z: torch.Tensor) -> torch.Tensor:
            seen.append(z.detach().clone())
            return loss_of(z)

        return real(model, optimizer, views, loss, *more, **options)

    pytest.MonkeyPatch().setattr("model.step.train_step", keeping)
    done = run("--data", data, "--out", out, "--steps", "30", "--max-skipped", "3", "--log-every", "1")
    (Path(out) / f"rank-{rank}.txt").write_text(f"{done.exit_code} {done.output}")
    torch.save(seen, Path(out) / f"rank-{rank}.pt")


@pytest.fixture(scope="module")
def two_ranks(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of `_watched_rank` on two gloo processes."""
    out = tmp_path_factory.mktemp("two") / "run"
    spawn(_watched_rank, (2, free_port(), str(shards), str(out)), nprocs=2)
    return out


def test_a_broken_image_on_one_rank_skips_the_step_on_all(two_ranks: Path) -> None:
    """The third one in a row ends the run on both; the weights are those of before the first."""
    assert [row.get("skipped") for row in rows(two_ranks)] == [None, None, 1, 2, 3]
    for rank in range(2):
        printed = (two_ranks / f"rank-{rank}.txt").read_text()
        assert printed.startswith("1 "), printed
        assert "3 steps in a row, up to step 5, had a gradient that is not finite" in printed
        assert "z was not finite on rank 1." in printed
    assert json.loads((two_ranks / "status.json").read_text())["state"] == "failed"
    assert latest(two_ranks / "checkpoints") is None


def test_first_views_of_one_process_meet_second_views_of_all(two_ranks: Path) -> None:
    """What is monitored is that of the joined batch; where images are broken, what has no value says so."""
    z = [torch.load(two_ranks / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]
    found = rows(two_ranks)
    for step, row in enumerate(found[:2]):
        first = z[0][step].chunk(2)[0].double().numpy()
        second = torch.cat([part[step].chunk(2)[1] for part in z]).double().numpy()
        assert (len(first), len(second)) == (BATCH // 2, BATCH)
        expected = contrast(first, second, 0.2)
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert all(0 <= row["probe_accuracy"] <= 1 for row in found)
    assert [row["uniformity"] is None for row in found] == [False, False, True, True, True]


# ---- many processes ------------------------------------------------------------------------------------------------


def frozen_network(seed: int = 0) -> nn.Module:
    """BatchNorm by running statistics, so that a row's z does not depend on which rows share its process."""
    torch.manual_seed(seed)
    encoder = build_encoder(18, width=0.125, stem="small")
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)  # the zero gammas would hide whole blocks
    return SimCLR(encoder, ProjectionHead(encoder.num_features, out_features=32)).eval()


def views_of(images: int) -> torch.Tensor:
    return torch.randn(2, images, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def join(rank: int, world_size: int, port: int) -> None:
    """What the launcher would have told this process."""
    ranks = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ |= {name: str(value) for name, value in ranks.items()}
    torch.set_num_threads(1)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _one_rank(rank: int, world_size: int, port: int, folder: str) -> None:
    from accelerate import Accelerator

    join(rank, world_size, port)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == world_size
    network = frozen_network()
    model = accelerator.prepare(network).eval()
    mine = views_of(8).chunk(world_size, 1)[rank].flatten(0, 1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0, fused=True)
    kept: list[torch.Tensor] = []
    optimizer.register_step_pre_hook(lambda *_: kept.extend(p.grad.clone() for p in network.parameters()))
    group = torch.distributed.group.WORLD
    loss = train_step(model, optimizer, [mine], lambda z: nt_xent(z, 0.2, group=group), 0.0).loss
    loss = accelerator.reduce(loss, "mean")
    if rank == 0:
        torch.save((loss, kept), Path(folder) / "stepped.pt")
    accelerator.end_training()


def test_two_processes_step_like_one(tmp_path: Path) -> None:
    """Loss and gradients of two gloo processes under DDP are those of one with the joined batch, to float32's 1e-5."""
    spawn(_one_rank, (2, free_port(), str(tmp_path)), nprocs=2)
    two_loss, two = torch.load(tmp_path / "stepped.pt", weights_only=True)
    network = frozen_network()
    loss = nt_xent(network(views_of(8).flatten(0, 1)), 0.2)
    loss.backward()
    torch.testing.assert_close(two_loss, loss.detach(), rtol=1e-5, atol=0)
    for (name, param), grad in zip(network.named_parameters(), two, strict=True):
        assert param.grad is not None
        assert (grad - param.grad).norm() <= 1e-5 * param.grad.norm(), name


def test_a_run_goes_on_with_one_process_and_again_with_two(shards: Path, tmp_path: Path) -> None:
    """The launcher's way, two CPU processes: a row a step from one of them, kNN over both, and a checkpoint of both.

    From its third step on one process trains as two would have, and from the sixth on two again: with micro-batches of
    4 BatchNorm sees the same images together, so losses agree but for the order of sums.
    """
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    common = ["--data", str(shards), "--eval-data", str(shards), "--steps", "9", "--checkpoint-every", "3"]
    common += ["--keep", "9", "--log-every", "1", "--base-lr", "0.5"]
    two, one, again = (tmp_path / name for name in ("two", "one", "again"))

    def train_two(out: Path, *more: str) -> str:
        command = [*launch, str(ROOT / "train.py"), *TINY, *common, "--out", str(out), *more]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def begin(out: Path, source: Path, step: int) -> None:
        """A run folder that was killed after a step."""
        shutil.copytree(source, out)
        for folder in (out / "checkpoints").glob("step-*"):
            if int(folder.name.removeprefix("step-")) > step:
                shutil.rmtree(folder)

    def losses(out: Path) -> dict[int, float]:
        return {row["step"]: row["loss"] for row in rows(out) if "loss" in row}

    assert "processes  2 on CPU" in train_two(two, "--micro-batch", "4")
    assert [row["step"] for row in rows(two)] == [0, *range(1, 10), 9], "each row once, from one process"
    begin(one, two, 3)
    done = run(*common, "--out", str(one), "--resume")
    assert done.exit_code == 0, done.output
    assert "16 per process in 4 micro-batches of 4" in done.output
    assert "sums are made by 1 process(es) with 1 threads, by 2 process(es) with 1 threads before" in done.output
    begin(again, one, 6)
    assert "sums are made by 2 process(es)" in train_two(again, "--resume")
    for out in (one, again):
        assert losses(out) == pytest.approx(losses(two), rel=1e-3)
    states = [json.loads((two / "checkpoints" / f"step-000000{step}" / "state.json").read_text()) for step in (3, 9)]
    third, ninth = (state["extra"]["loader"] for state in states)
    assert third | {"epoch": 2, "position": 16} == ninth


def test_a_checkpoint_of_another_order_is_refused(shards: Path, tmp_path: Path) -> None:
    """Where the batches depended on the number of processes the state was a list, one for each of them."""
    out = tmp_path / "run"
    assert run("--data", str(shards), "--out", str(out), "--steps", "2").exit_code == 0
    file = out / "checkpoints" / "step-0000002" / "state.json"
    state = json.loads(file.read_text())
    state["extra"]["loaders"] = [state["extra"].pop("loader")]
    del state[OWN_HASH]  # of a later version
    file.write_text(json.dumps(state))
    done = run("--data", str(shards), "--out", str(out), "--steps", "2", "--resume")
    assert (done.exit_code, "finish the run with that version" in done.output) == (2, True), done.output


def test_damaged_images_are_replaced_and_named(shards: Path, tmp_path: Path) -> None:
    """Up to --skip-damaged of them: in damaged.jsonl, as quarantine takes it, the log line and status.json."""
    data = tmp_path / "data"
    shutil.copytree(shards, data)
    tar = data / "train-000001.tar"
    content = bytearray(tar.read_bytes())
    keys = []
    with tarfile.open(tar) as file:
        for member in [member for member in file if member.name.endswith(".png")][3:5]:
            content[member.offset_data : member.offset_data + member.size] = bytes(member.size)
            keys.append(member.name.removesuffix(".png"))
    tar.write_bytes(content)
    common = ("--data", str(data), "--steps", "8", "--log-every", "2")
    done = run(*common, "--out", str(tmp_path / "none"))
    assert (done.exit_code, "does not begin like an image" in done.output) == (1, True), done.output
    done = run(*common, "--out", str(tmp_path / "one"), "--skip-damaged", "1")
    assert (done.exit_code, "--skip-damaged N, now 1" in done.output) == (1, True), done.output
    out = tmp_path / "two"
    done = run(*common, "--out", str(out), "--skip-damaged", "2")
    assert done.exit_code == 0, done.output
    assert "| damaged 2 |" in done.output
    assert sorted(row["key"] for row in rows(out, "damaged.jsonl")) == keys
    assert {(row["shard"], row["problem"]) for row in rows(out, "damaged.jsonl")} == {
        (tar.name, "does not begin like an image")
    }
    assert json.loads((out / "status.json").read_text())["damaged"] == 2
    arguments = ["quarantine", str(data), "--from", str(out / "damaged.jsonl")]
    done = CliRunner().invoke(tools.make_shards.app, arguments)
    assert (done.exit_code, "68 samples in 3 shards, 2 in quarantine" in done.output) == (0, True), done.output


def _failing_rank(rank: int, world_size: int, port: int, data: str, out: str) -> None:
    """Rank 1 cannot read in the third step."""
    join(rank, world_size, port)
    whole = Loader.__next__

    def broken(loader: Loader) -> Batch:
        if loader._runs == 2:
            raise LoaderError("rank 1 could not read")
        return whole(loader)

    if rank == 1:
        pytest.MonkeyPatch().setattr(Loader, "__next__", broken)
    done = run("--data", data, "--out", out, "--steps", "4", "--log-every", "1")
    assert done.exit_code == 1, done.output
    os._exit(0)  # gone, as after a failure; rank 0 would wait


@pytest.mark.slow
def test_the_process_that_fails_writes_why(shards: Path, tmp_path: Path) -> None:
    """The others then fail because it is gone, and leave its words."""
    out = tmp_path / "run"
    spawn(_failing_rank, (2, free_port(), str(shards), str(out)), nprocs=2)
    status = json.loads((out / "status.json").read_text())
    assert status == {"state": "failed", "step": 2, "rank": 1, "message": "LoaderError: rank 1 could not read"}


def _stopping_rank(rank: int, world_size: int, port: int, data: str, out: str) -> None:
    """Rank 1 stops for ever in the third step; the other one's backend waits as long as it was told."""
    join(rank, world_size, port)
    patch = pytest.MonkeyPatch()
    for module in (train, tools.ranks):
        patch.setattr(module, "RANKS_WAIT", timedelta(seconds=4))
    patch.setattr(tools.ranks, "LAST_WORDS_S", 2.0)
    whole = Loader.__next__

    def stopping(loader: Loader) -> Batch:
        backend = torch.distributed.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
        assert 4 <= backend.options._timeout.total_seconds() < 4.1
        if rank == 1 and loader._runs == 2:
            Path(out, "stopped").write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
        return whole(loader)

    patch.setattr(Loader, "__next__", stopping)
    done = run("--data", data, "--out", out, "--steps", "4", "--log-every", "1")
    assert (rank, done.exit_code) == (0, 1), done.output
    assert "rank 0: train: rank 1 has gone, or did not answer for 0:00:04" in done.output
    os.kill(int(Path(out, "stopped").read_text()), signal.SIGKILL)
    os._exit(0)


def test_a_rank_that_stops_for_ever_is_named(shards: Path, tmp_path: Path) -> None:
    """The others end when the time is up that they were given, and status.json says which rank they missed."""
    out = tmp_path / "run"
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="process 1 terminated with signal SIGKILL"):
        torch.multiprocessing.spawn(_stopping_rank, (2, free_port(), str(shards), str(out)), nprocs=2)
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["step"], status["rank"]) == ("failed", 2, 0)
    assert status["message"].startswith("LostRankError: rank 1 has gone, or did not answer for 0:00:04")


@pytest.fixture(scope="module")
def killed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps, with checkpoints at 2, 4 and 6, that seems to have been killed after the last one."""
    out = tmp_path_factory.mktemp("killed") / "run"
    done = run(*SIX, "--data", str(shards), "--out", str(out))
    assert done.exit_code == 0, done.output
    status = json.loads((out / "status.json").read_text())
    (out / "status.json").write_text(json.dumps(status | {"state": "running"}))
    return out


SIX = ("--steps", "6", "--checkpoint-every", "2", "--keep", "9", "--log-every", "2")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("state.json", lambda data: data.replace(b'"base_lr": 8.0', b'"base_lr": 9.0')),
        ("state.json", lambda data: data.replace(b'"step": 6', b'"step": 9')),
        ("state.json", lambda _: b""),
        ("model.safetensors", lambda data: data[:-1]),
        ("probe.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
        ("optimizer.safetensors", None),
    ],
)
def test_a_damaged_newest_checkpoint_is_passed_over(
    name: str, change: Any, killed: Path, shards: Path, tmp_path: Path
) -> None:
    """One line names the file; the run goes on from the one before and ends as if nothing had been."""
    out = tmp_path / "run"
    shutil.copytree(killed, out)
    file = out / "checkpoints/step-0000006" / name
    if change:
        data = file.read_bytes()
        file.write_bytes(change(data))
        assert file.read_bytes() != data
    else:
        file.unlink()
    done = run(*SIX, "--data", str(shards), "--out", str(out), "--resume")
    assert done.exit_code == 0, done.output
    (line,) = [line for line in done.output.splitlines() if "passed over" in line]
    assert str(file) in line
    assert line.endswith(f"passed over, going on from {out}/checkpoints/step-0000004")
    assert f"note       a damaged checkpoint is now {out}/checkpoints/damaged-step-0000006" in done.output
    assert ends(out) == ends(killed)


def test_without_a_whole_checkpoint_a_run_is_not_begun_anew(killed: Path, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(killed, out)
    for step in (2, 4, 6):
        (out / f"checkpoints/step-000000{step}/state.json").write_bytes(b"{}")
    before = contents(out)
    done = run(*SIX, "--data", str(shards), "--out", str(out), "--resume")
    assert done.exit_code == 2
    assert "no checkpoint in" in done.output
    assert all(f"step-000000{step}/state.json is damaged" in done.output for step in (2, 4, 6))
    assert {path for path, data in contents(out).items() if before.get(path) != data} == {out / "status.json"}


def test_a_checkpoint_of_an_earlier_version_is_gone_on_from(killed: Path, shards: Path, tmp_path: Path) -> None:
    """Its state.json had no hash of its own: a note says so, and the next checkpoint has one."""
    out = tmp_path / "run"
    shutil.copytree(killed, out)
    shutil.rmtree(out / "checkpoints/step-0000006")
    file = out / "checkpoints/step-0000004/state.json"
    state = json.loads(file.read_text())
    del state[OWN_HASH]
    file.write_text(json.dumps(state, indent=1))
    done = run(*SIX, "--data", str(shards), "--out", str(out), "--resume")
    assert done.exit_code == 0, done.output
    assert f"note       {file} is an earlier version's: no hash tells whether it is as written" in done.output
    assert ends(out) == ends(killed)


def test_a_checkpoint_says_how_it_was_trained(killed: Path, shards: Path, tmp_path: Path) -> None:
    """To evaluate.py and export.py, whatever name it is copied to; not where its state.json has been changed."""
    shutil.copytree(killed / "checkpoints/step-0000004", tmp_path / "best")
    views, training = training_of(tmp_path / "best/model.safetensors")
    assert (views["size"], training["steps"], training["recipe"]) == (16, 4, "demo")
    assert training["dataset"] == read_dataset(shards).fingerprint
    file = tmp_path / "best/state.json"
    file.write_text(file.read_text().replace('"size": 16', '"size": 61'))
    with pytest.raises(ValueError, match="best/state.json is damaged"):
        training_of(tmp_path / "best/model.safetensors")


@pytest.mark.parametrize("content", [b"", b'{"st', b"\xff\x00\n"])
def test_damaged_records_stop_no_resume(content: bytes, killed: Path, shards: Path, tmp_path: Path) -> None:
    """status.json, metrics.jsonl and speed.jsonl, each named in one line; the weights are those of a whole run."""
    out = tmp_path / "run"
    shutil.copytree(killed, out)
    shutil.rmtree(out / "checkpoints/step-0000006")
    names = ("status.json", "metrics.jsonl", "speed.jsonl")
    for name in names:
        (out / name).write_bytes(content)
    done = run(*SIX, "--data", str(shards), "--out", str(out), "--resume")
    assert done.exit_code == 0, done.output
    for name in names:
        assert done.output.count(f"note       {out / name} was damaged: ") == 1, done.output
    assert "rows of 4 of the 4 steps up to the checkpoint are lost" in done.output
    assert [row["step"] for row in rows(out)] == [5, 6]
    assert json.loads((out / "status.json").read_text())["state"] == "done"
    assert ends(out)[1] == ends(killed)[1]


def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(
    killed: Path, shards: Path, tmp_path: Path
) -> None:
    """Files may have 40 kB, so the first checkpoint has no room: status.json says it failed, and where."""
    out = tmp_path / "run"
    command = [sys.executable, str(ROOT / "train.py"), *TINY, *SIX, "--data", str(shards), "--out", str(out)]
    limited = ["bash", "-c", 'trap "" XFSZ; ulimit -f 40; exec "$@"', "-", *command]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    status = json.loads((out / "status.json").read_text())
    assert status["state"] == "failed"
    for said in (done.stderr.splitlines()[-1], status["message"]):
        assert re.search(f"{re.escape(str(out))}/checkpoints/.*step-0000002/model.safetensors", said)
        assert "File too large" in said
    assert run(*SIX, "--data", str(shards), "--out", str(out), "--resume").exit_code == 0
    assert ends(out) == ends(killed)


def test_a_run_on_a_full_disk_does_not_seem_to_go_on(shards: Path, tmp_path: Path) -> None:
    """A file system of 60 KiB is full to the last byte after some steps: status.json says so, and the message where."""
    script = 'mount -t tmpfs -o size=60k none "$0" && { "$@"; echo "exit $?"; cat "$0/run/status.json"; }'
    command = [sys.executable, str(ROOT / "train.py"), *TINY, "--data", str(shards), "--out", str(tmp_path / "run")]
    command = ["unshare", "-m", "sh", "-c", script, str(tmp_path), *command, "--steps", "1000", "--log-every", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if "mount:" in done.stderr or "unshare:" in done.stderr:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    *_, code, status = done.stdout.splitlines()
    assert (code, json.loads(status)["state"]) == ("exit 1", "failed"), done.stderr
    for said in (done.stderr.splitlines()[-1], json.loads(status)["message"]):
        assert "No space left on device" in said
        assert f"{tmp_path}/run/" in said


def _blind_rank(rank: int, world_size: int, port: int, folder: str) -> None:
    """Rank 1 has an older checkpoint than rank 0 in its own folder, then the same one."""
    from accelerate import Accelerator

    join(rank, world_size, port)
    accelerator, mine = Accelerator(cpu=True), Path(folder) / str(rank)
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.chdir(mine)
    assert train.newest_for_all(Path("none"), accelerator) is None
    with pytest.raises(train.RunError, match="rank 1 does not see own/step-0000002, where rank 0 goes on: --out must"):
        train.newest_for_all(Path("own"), accelerator)
    assert train.newest_for_all(Path("shared"), accelerator) == Path("shared/step-0000002")
    accelerator.end_training()


@pytest.mark.slow
def test_processes_go_on_from_one_checkpoint_or_not_at_all(tmp_path: Path) -> None:
    """Folders of two nodes that are not shared, or that one still sees as they were."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for rank, steps in ((0, {"own": (1, 2), "shared": (1, 2)}), (1, {"own": (1,), "shared": (1, 2, 3)})):
        for name, numbers in steps.items():
            for step in numbers:
                save(tmp_path / str(rank) / name, step, model=model, optimizer=optimizer, extra={})
    spawn(_blind_rank, (2, free_port(), str(tmp_path)), nprocs=2)


# ---- how it fails ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("zip() argument 2 is longer"), None),
        (RuntimeError("bare"), None),
        (torch.distributed.DistBackendError("NCCL is gone"), None),
        (torch.AcceleratorError("an illegal access"), None),
        (
            torch.OutOfMemoryError("CUDA is full."),
            "train: CUDA is full. Give a smaller --micro-batch or --keep-graphs.",
        ),
        (LoaderError("rank 0 could not read"), "train: rank 0 could not read"),
        (OSError("the plug was pulled"), "train: the plug was pulled"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_errors_of_ours_are_one_line(
    error: Exception, line: str | None, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the way, not even a ValueError is about the options: a traceback says where it came from."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("model.step.train_step", fail)
    done = run("--data", str(shards), "--out", str(tmp_path / "run"))
    assert done.exit_code == 1
    if line:
        assert done.stderr.splitlines()[-1] == line
    else:
        assert error in (done.exception, done.exception.__cause__)
        assert "train:" not in done.stderr
    assert json.loads((tmp_path / "run/status.json").read_text())["message"] == f"{type(error).__name__}: {error}"


def test_a_message_is_one_line_whatever_it_quotes(capsys: pytest.CaptureFixture[str]) -> None:
    """Names from archives may hold line breaks, commands to a terminal, bytes that are no text, or a book."""
    with pytest.raises(typer.Exit), one_message("tool"):
        raise ValueError("a\nb\x1b[31m\udcffc é猫\n")
    assert capsys.readouterr().err == "tool: a\\nb\\x1b[31m\\udcffc é猫\n"
    with pytest.raises(typer.Exit), one_message("tool"):
        raise ValueError("first " + "x" * 10**6 + " last")
    said = capsys.readouterr().err
    assert said.startswith("tool: first xxx")
    assert said.endswith("xxx last\n")
    assert len(said) < 2100


@pytest.mark.parametrize(
    ("error", "advice"), [(NotFiniteError("fc.weight is not finite"), True), (ValueError("the optimizer"), False)]
)
def test_only_broken_weights_are_the_learning_rate_s_fault(
    error: Exception, advice: bool, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("model.checkpoint.save", fail)
    done = run("--data", str(shards), "--out", str(tmp_path / "run"), "--steps", "1")
    assert (done.exit_code, "Lower --base-lr" in done.stderr) == (1, advice)
    assert str(error) in str(done.exception if not advice else done.stderr)


def test_a_run_goes_on_after_its_memory_was_full(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line says which options to lower; the checkpoint before it is whole, and the run ends as if nothing was."""
    common = ("--data", str(shards), "--steps", "4", "--checkpoint-every", "2", "--micro-batch", "8")
    out, real, calls = tmp_path / "run", train_step, iter(range(3))

    def full(*arguments: Any, **more: Any) -> Outcome:
        if next(calls) == 2:
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB, of which 1.50 GiB is free.")
        return real(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr("model.step.train_step", full)
        done = run(*common, "--out", str(out))
    assert done.exit_code == 1
    line = done.stderr.strip().splitlines()[-1]
    assert line.endswith("of which 1.50 GiB is free. Give a smaller --micro-batch or --keep-graphs."), done.stderr
    assert json.loads((out / "status.json").read_text())["state"] == "failed"
    assert latest_whole(out / "checkpoints") == (out / "checkpoints/step-0000002", [])
    for folder in (out, tmp_path / "whole"):
        done = run(*common, "--out", str(folder), "--resume")
        assert done.exit_code == 0, done.output
    assert ends(out) == ends(tmp_path / "whole")


@pytest.mark.parametrize("where", ["start", "log", "finish"])
def test_a_tracker_that_fails_ends_no_run(
    where: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a network, say: one line names it, and the rows are those of a run without a tracker."""

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("api.tracker.invalid: no address\nassociated with hostname")

    monkeypatch.setattr(f"accelerate.tracking.TensorBoardTracker.{where}", fail)
    common = ("--data", str(shards), "--steps", "2", "--log-every", "1")
    done = run(*common, "--out", str(tmp_path / "tracked"), "--track", "tensorboard")
    assert done.exit_code == 0, done.output
    said = "note: the tracker failed and gets no more values, only metrics.jsonl does (ConnectionError: api.tracker"
    assert done.output.count(said) == 1
    assert run(*common, "--out", str(tmp_path / "plain")).exit_code == 0
    assert ends(tmp_path / "tracked") == ends(tmp_path / "plain")


def test_tools_keep_the_traceback_of_what_is_not_theirs() -> None:
    for error in (torch.OutOfMemoryError("CUDA is full"), RecursionError("too deep")):
        with pytest.raises(type(error)), one_message("tool"):
            raise error
    with pytest.raises(typer.Exit), one_message("tool"):
        raise LoaderError("could not read")


# ---- bad input -----------------------------------------------------------------------------------------------------


def test_a_run_folder_that_cannot_be_written_is_the_callers_to_mend(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file, a folder below a file, a read-only disk: exit code 2 and one line that names the path."""
    file = tmp_path / "file"
    file.touch()
    for words in ((), ("--resume",)):
        done = run("--data", str(shards), "--out", str(file), *words)
        assert (done.exit_code, f"{file} is a file; give a folder" in done.output) == (2, True), done.output
    done = run("--data", str(shards), "--out", str(file / "run"))
    assert (done.exit_code, f"{file}/run cannot be written in" in done.output) == (2, True), done.output

    def read_only(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "mkdir", read_only)
    done = run("--data", str(shards), "--out", str(tmp_path / "run"))
    assert (done.exit_code, f"{tmp_path}/run: Read-only file system" in done.output) == (2, True), done.output


@pytest.mark.parametrize(("number", "code"), [(errno.EROFS, 2), (errno.EACCES, 2), (errno.ENOSPC, 1), (errno.EIO, 1)])
def test_a_wrong_path_is_told_from_a_disk_that_fails(number: int, code: int) -> None:
    with pytest.raises(typer.Exit) as ended, one_message("tool"):
        raise OSError(number, os.strerror(number), "somewhere")
    assert ended.value.exit_code == code


def test_a_batch_larger_than_the_data_is_refused(shards: Path, tmp_path: Path) -> None:
    done = run("--data", str(shards), "--out", str(tmp_path / "run"), "--batch-size", "71")
    assert done.exit_code == 2
    assert f"{NUM} samples, fewer than one batch of 71" in done.output
    assert not (tmp_path / "run").exists()


def test_a_truncated_shard_is_refused_by_name(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_shards([Sample(f"{i}.png", 0, png(i)) for i in range(20)], data, classes=["one"], shard_size=10)
    tar = data / "train-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-1024])
    done = run("--data", str(data), "--out", str(tmp_path / "run"))
    assert done.exit_code == 2
    assert str(tar) in done.output
    assert not (tmp_path / "run").exists()


def test_missing_data_and_missing_labels_are_refused(shards: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(train.app, ["cifar10", "--precision", "no", "--out", str(tmp_path / "run")])
    assert (done.exit_code, "--data is missing" in done.output) == (2, True)
    flat = tmp_path / "flat"
    write_shards([Sample(f"{i}.png", None, png(i)) for i in range(20)], flat, classes=None)
    done = run("--data", str(flat), "--eval-data", str(shards), "--out", str(tmp_path / "run"))
    assert (done.exit_code, "must be labelled with the same classes" in done.output) == (2, True)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--batch-size", "1"), "NT-Xent has no negatives in a batch of 1 image, expected at least 2"),
        (("--micro-batch", "1"), "BatchNorm takes its statistics from 1 image at a time, expected at least 2"),
        (("--projection-dim", "1"), "z of 1 column is 1 or -1 once it has unit length, expected at least 2"),
        (("--track", "wandb"), "--track wandb is not installed: pip install wandb"),
        (("--track", "paper"), "aim"),
    ],
)
def test_what_would_be_done_in_name_only_is_refused(
    shards: Path, tmp_path: Path, words: tuple[str, ...], complaint: str
) -> None:
    """Training at loss 0 to the end, or without the tracker that was asked for."""
    done = run("--data", str(shards), "--out", str(tmp_path / "run"), "--steps", "1", *words)
    assert (done.exit_code, complaint in done.output) == (2, True), done.output
    assert not (tmp_path / "run").exists()


def test_statistics_count_images_of_a_process_or_of_all_that_share_them() -> None:
    config = replace(train.RECIPES["cifar10"], batch_size=4)
    train.check_config(config, world_size=2)
    with pytest.raises(ValueError, match="1 image at a time"):
        train.check_config(config, world_size=4)
    train.check_config(replace(config, sync_bn=True), world_size=4)
    train.check_config(replace(config, head="none", projection_dim=1))  # there is no layer of that width


def test_processes_that_do_not_see_each_other_are_refused(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would train the whole batch alone and write the same folder; the line says how to start them instead."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    done = run("--data", str(shards), "--out", str(tmp_path / "run"))
    assert done.exit_code == 2, done.output
    assert "the launcher started 2 processes, but each sees 1" in done.stderr
    assert "use accelerate launch --multi_gpu --num_processes N train.py" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_run_is_never_overwritten_nor_resumed_with_other_settings(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    same = ("--data", str(shards), "--out", str(out), "--steps", "2")
    assert run(*same).exit_code == 0

    before = contents(out)
    again = run(*same)
    assert (again.exit_code, "is not empty; go on with --resume" in again.output) == (2, True)
    assert before == contents(out)
    other = run(*same, "--resume", "--batch-size", "8", "--view", "flip_p=0.1")
    assert other.exit_code == 2
    assert "batch_size: 16 in the checkpoint, 8 now" in other.output
    assert "views.flip_p: 0.5 in the checkpoint, 0.1 now" in other.output
    assert before == contents(out)  # what is done stays done
    stopped = json.loads(before[out / "status.json"]) | {"state": "preempted"}
    (out / "status.json").write_text(json.dumps(stopped))
    assert run(*same, "--resume", "--batch-size", "8").exit_code == 2
    after = contents(out)
    assert {path for path in after if after[path] != before.get(path)} == {out / "status.json"}
    status = json.loads(after[out / "status.json"])
    assert (status["state"], status["step"], status["rank"]) == ("failed", 2, 0)
    assert status["message"].startswith("RunError: ")
    assert run(*same, "--resume").exit_code == 0
    assert json.loads((out / "status.json").read_text())["state"] == "done"


def test_a_second_training_on_one_folder_is_refused_and_changes_nothing(shards: Path, tmp_path: Path) -> None:
    """By name and with exit code 2, on every process of it; the first goes on to its end as if alone."""
    out = tmp_path / "run"
    first = start(shards, out)
    wait_for_step(first, out, 3)
    first.send_signal(signal.SIGSTOP)  # so that nothing changes but by the others
    before = contents(out)
    refused = run("--data", str(shards), "--out", str(out), "--steps", "30", "--resume")
    again = run("--data", str(shards), "--out", str(out), "--steps", "30")
    spawn(_refused_rank, (2, free_port(), str(shards), str(out)), nprocs=2)
    assert contents(out) == before
    first.send_signal(signal.SIGCONT)
    assert first.wait(timeout=120) == 0, first.communicate()[0]
    assert (refused.exit_code, f"{out} is in use by another process (process {first.pid} on " in refused.output) == (
        2,
        True,
    ), refused.output
    assert (again.exit_code, "is not empty; go on with --resume" in again.output) == (2, True)
    assert json.loads((out / "status.json").read_text())["state"] == "done"
    assert [row["step"] for row in rows(out)] == list(range(1, 31))
    assert not (out / ".lock").exists()


def _refused_rank(rank: int, world_size: int, port: int, data: str, out: str) -> None:
    join(rank, world_size, port)
    done = run("--data", data, "--out", out, "--steps", "30", "--resume")
    assert (done.exit_code, f"rank {rank}: train: {out} is in use" in done.output) == (2, True), done.output
    assert not torch.distributed.is_initialized()  # else the process may abort at its end


def test_another_data_set_is_not_resumed(shards: Path, tmp_path: Path) -> None:
    out, data = tmp_path / "run", tmp_path / "data"
    assert run("--data", str(shards), "--out", str(out), "--steps", "2").exit_code == 0
    write_shards([Sample(f"{i}.png", 0, png(i + 1)) for i in range(NUM)], data, classes=["one"])
    done = run("--data", str(data), "--out", str(out), "--steps", "2", "--resume")
    assert done.exit_code == 2
    assert "dataset:" in done.output


def test_a_loss_that_is_not_finite_stops_the_run(shards: Path, tmp_path: Path) -> None:
    """Weights that a learning rate blew up give no gradient; the run ends after ten such steps in a row."""
    out = tmp_path / "run"
    common = ("--data", str(shards), "--out", str(out), "--steps", "40", "--optimizer", "sgd", "--warmup-epochs", "0")
    done = run(*common, "--base-lr", "1e30", "--lr-scaling", "none", "--log-every", "1", "--checkpoint-every", "1")
    assert done.exit_code == 1
    assert "10 steps in a row, up to step 11, had a gradient that is not finite" in done.output
    assert [row.get("skipped") for row in rows(out)] == [None, *range(1, 11)]
    assert json.loads((out / "status.json").read_text())["state"] == "failed"
    newest = latest(out / "checkpoints")
    assert newest is None or load_weights_finite(newest)


def load_weights_finite(path: Path) -> bool:
    from safetensors.torch import load_file

    return all(bool(t.isfinite().all()) for t in load_file(path / "model.safetensors").values())
