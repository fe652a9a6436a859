"""The sweep says what limits, survives what fails, and compares what is alike."""

import csv
import io
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from benchmarks import sweep
from benchmarks.measure import failure, kept_awake, parse_readings
from benchmarks.slices import Course, Done, Mark
from benchmarks.sweep import (
    ENOUGH,
    FOUND,
    PRESETS,
    Ranks,
    Step,
    compare,
    gaps,
    in_child,
    noisy,
    repeats,
    uncertainty,
    verdict,
)
from pipeline.shards import Sample, read_dataset
from pipeline.views import make_views
from pipeline.write import write_shards
from tests.test_bench_slices import burn
from tests.timed import thrice
from train import TrainConfig

STAGES_MS = {"reading": 0.2, "decode": 3.0, "augmentation": 1.0}


def write_images(out: Path, number: int, height: int, width: int) -> Path:
    """Noisy JPEGs, whose decoding is work, as shards and in class folders."""
    rng, samples = np.random.default_rng(0), []
    for i in range(number):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(file, "JPEG", quality=95)
        path = out / "images" / f"class{i % 2}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.getvalue())
        samples.append(Sample(path.name, i % 2, file.getvalue()))
    write_shards(samples, out / "shards", classes=["class0", "class1"])
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data"), 24, 24, 24)


@pytest.fixture
def config(data: Path) -> TrainConfig:
    tiny = replace(PRESETS["cpu"], width=1 / 16, batch_size=32, micro_batch=16, cpu_threads=2)
    return replace(tiny, views=make_views(tiny.views, {"size": 16}), data=str(data / "shards"))


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------------------------------------------ the verdict


@pytest.mark.parametrize("stage", STAGES_MS)
def test_the_verdict_names_the_stage_that_adds_most(stage: str) -> None:
    costs = STAGES_MS | {stage: 10.0}
    assert verdict(ENOUGH - 0.001, costs) == f"the loader limits: {stage}"
    assert verdict(ENOUGH, costs) == "the model limits"


@contextmanager
def loader_of(seconds: float) -> Iterator[None]:
    """Each micro-batch takes so long on a processor: the first one, again and again."""
    from pipeline.loader import Loader

    make, kept = Loader._make, list[Any]()

    def again(self: Any, run: int, views: Any) -> Any:
        burn(seconds)
        if not kept:
            kept.append(make(self, run, views))
        return kept[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loader, "_make", again)
        yield


@contextmanager
def model_of(seconds: float) -> Iterator[None]:
    """A step that takes its views and then so long on a processor."""

    def take(*given: Any, **_: Any) -> None:
        list(given[2])
        burn(seconds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.step.train_step", take)
        yield


def slowed(loader_s: float, model_s: float, config: TrainConfig, what: str) -> Iterator[Done]:
    with loader_of(loader_s), model_of(model_s):
        yield from sweep.loads_or_trains(config, what)


@thrice
def test_a_slowed_loader_limits_and_a_slowed_model_does(config: TrainConfig) -> None:
    """A loader of 0.3 s per micro-batch of 16 images allows 53 images/s at most; a step of 0.3 s, too."""
    config = replace(config, batch_size=16)
    status, found = sweep.measure_in_slices(config, 4.0, partial(slowed, 0.3, 0.02))
    assert status == "ok"
    assert set(found) == set(FOUND)
    assert found["loader_images_per_s"] < 16 / 0.3
    assert found["together_images_per_s"] < 16 / 0.3
    assert found["ratio"] < 0.5
    assert found["data_wait_percent"] > 50
    assert not noisy(found["ratio"], found["ratio_unknown"])
    assert verdict(found["ratio"], STAGES_MS) == "the loader limits: decode"
    status, found = sweep.measure_in_slices(config, 4.0, partial(slowed, 0.001, 0.3))
    assert status == "ok"
    assert found["synthetic_images_per_s"] < 16 / 0.3
    assert found["loader_images_per_s"] > 2 * found["synthetic_images_per_s"]
    assert found["data_wait_percent"] < 5
    assert verdict(found["ratio"], STAGES_MS) == "the model limits"
    assert found["step_ms_p95"] >= found["step_ms_p50"] > 300
    assert found["micro_batch"] == 16
    assert found["peak_host_mib"] > 0


@thrice
def test_in_turns_a_slowed_loader_limits_too(config: TrainConfig) -> None:
    """As on a GPU and under a launcher, in one process."""
    config = replace(config, batch_size=16)
    with loader_of(0.3), model_of(0.02):
        found = sweep.measure(config, 1.0)
    assert set(found) == set(FOUND)
    assert found["loader_images_per_s"] < 16 / 0.3
    assert found["ratio"] < 0.5
    assert found["data_wait_percent"] > 50


def test_three_programs_of_which_one_fails_leave_its_reason(config: TrainConfig) -> None:
    found = sweep.measure_in_slices(replace(config, depth=17), 1.0)
    assert found[0].startswith("failed: ValueError: depth 17 is not a ResNet")
    assert found[1] == {}


def test_a_ratio_is_of_neighbours_and_tells_how_far_the_rounds_differ(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine three times slower in every round changes the rates but no ratio; one that swings, the spread."""
    ms = {"load": 100.0, "both": 1000.0, "compute": 900.0, "<lambda>": 10.0}
    swing, slow = iter([1.0, 2.0, 0.5]), [1.0]

    def turn(work: Any, times: int, _: bool) -> list[Step]:
        if work.__name__ == "load" and times == sweep.QUEUED:
            slow[0] *= 3
        return [Step(slow[0] * ms[work.__name__], 0.0)] * times

    monkeypatch.setattr(sweep, "turn", turn)
    found = sweep.measure(config, 1.0)
    assert found["rounds"] == sweep.FEWEST == 3
    assert [found[name] for name in ("ratio", "ratio_p20", "ratio_p80")] == pytest.approx([0.9] * 3)
    assert found["together_images_per_s"] == pytest.approx(32 / 9)
    assert found["synthetic_images_per_s"] == pytest.approx(32 / 9 / 0.9)
    assert found["loader_images_per_s"] == pytest.approx(16 / 0.9)

    def swinging(work: Any, times: int, _: bool) -> list[Step]:
        return [Step(ms[work.__name__] * (next(swing) if work.__name__ == "compute" else 1.0), 0.0)] * times

    monkeypatch.setattr(sweep, "turn", swinging)
    found = sweep.measure(config, 1.0)
    assert [found[name] for name in ("ratio_p20", "ratio", "ratio_p80")] == pytest.approx([0.45, 0.9, 1.8])


def test_processors_are_kept_awake_by_what_gives_way_to_everything() -> None:
    """One spinner a core, of the idle class, gone with the block; and with its parent, if that is killed."""

    def spinners() -> list[int]:
        children = Path("/proc/self/task", str(threading.get_native_id()), "children").read_text().split()
        return [int(child) for child in children]

    before = spinners()
    with kept_awake():
        found = [child for child in spinners() if child not in before]
        assert len(found) == len(os.sched_getaffinity(0))
        wait_for(lambda: all(os.sched_getscheduler(child) == os.SCHED_IDLE for child in found))
        assert sorted(core for child in found for core in os.sched_getaffinity(child)) == sorted(
            os.sched_getaffinity(0)
        )
    assert not any(is_running(child) for child in found)
    code = "import os; from benchmarks.measure import kept_awake; kept_awake().__enter__(); os.kill(os.getpid(), 9)"
    root = Path(sweep.__file__).parents[1]
    with subprocess.Popen([sys.executable, "-c", code], cwd=root) as killed:
        parent = str(killed.pid).encode()

    def left() -> bool:
        with suppress(OSError):  # a process may end while it is looked at
            lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")]
            return any(b"SCHED_IDLE" in line and parent in line.split(b"\0") for line in lines)
        return True

    wait_for(lambda: not left())


def test_the_readings_of_the_driver_are_means_of_the_rounds(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def watch() -> Iterator[list[Any]]:
        readings: list[Any] = []
        yield readings
        readings += parse_readings("90, 600\n80, 500\n")

    monkeypatch.setattr(sweep, "gpu_watch", watch)
    monkeypatch.setattr(sweep, "turn", lambda _work, times, _: [Step(1000.0, 0.0)] * times)
    found = sweep.measure(config, 1.0)
    assert (found["gpu_utilisation_percent"], found["gpu_power_w"]) == (85, 550)


def test_what_ended_early_has_no_numbers_and_a_ratio_to_nothing_is_none() -> None:
    marks = [Mark(float(at), 2.0 * at, 10.0, Done(100 if at else 0)) for at in range(5)]
    ours = Course([(0.0, 5.0)], marks)
    found = sweep.contested(ours, ours)
    assert (found["ratio_to_ours"], found["rounds"], found["status"]) == ("1", 4, "ok")
    assert (found["images_per_s"], found["cpu_ms_per_image"], found["peak_host_mib"]) == ("100", "20", "10")
    assert sweep.contested("out of memory", ours)["status"] == "out of memory"
    alone = sweep.contested(ours, "failed: of itself")
    assert (alone["ratio_to_ours"], alone["status"], alone["cpu_ms_per_image"]) == ("", "ok", "20")
    later = Course([(10.0, 18.0)], [mark._replace(at=10 + 2 * mark.at) for mark in marks])  # one by one, half as fast
    assert sweep.contested(later, ours)["ratio_to_ours"] == "0.5"
    halves = Course([(10.0, 14.5), (14.5, 18.0)], later.marks)  # nor does it matter that it was stopped once
    assert sweep.contested(halves, ours)["ratio_to_ours"] == "0.5"


def test_a_profile_that_fails_is_told(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "run", lambda *_: ("out of memory", {}))
    done = CliRunner().invoke(app(), [str(data / "shards"), "--batch-size", "32", "--profile", str(tmp_path)])
    assert done.exit_code == 1
    assert "32 images: out of memory" in done.output


@pytest.mark.parametrize(
    ("ratio", "unknown", "said"),
    [
        (0.98, 0.009, False),
        (0.98, 0.02, True),
        (0.963, 0.02, True),  # between 0.943 and 0.983
        (0.5, 0.2, False),  # far below 0.97, whatever it is
        (0.85, 0.2, True),
        (1.02, 0.01, False),
        (1.05, 0.02, True),  # training is not faster than its own step
    ],
)
def test_a_row_is_noisy_where_its_ratio_is_not_known_or_training_beats_its_step(
    ratio: float, unknown: float, said: bool
) -> None:
    assert noisy(ratio, unknown) is said


@pytest.mark.parametrize("rounds", [sweep.FEWEST, 5, 10, 40])
def test_the_median_is_known_as_well_as_it_is_said_to_be(rounds: int) -> None:
    """Of 2,000 runs of normal rounds it lies so near in 19 of 20, give or take."""
    drawn = np.random.default_rng(rounds).normal(1.0, 0.05, (2000, rounds))
    hits = [abs(np.median(run) - 1) < uncertainty(run.tolist()) for run in drawn]
    assert 0.93 < np.mean(hits) < 0.98
    assert uncertainty([1.0, 1.0]) == float("inf")


@thrice
def test_the_stage_that_costs_most_is_found(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Images of a quarter of a million pixels for views of 16: their decoding is what takes time."""
    big = write_images(tmp_path_factory.mktemp("big"), 8, 500, 500)
    costs = sweep.stage_costs(replace(config, data=str(big / "shards")), 0.5)
    assert list(costs) == ["reading", "decode", "augmentation"]
    assert verdict(0.5, costs) == "the loader limits: decode"
    assert costs["decode"] > 0.5  # no decoder takes less than 2 ns per pixel on one core


# --------------------------------------------------------------------------------------------------------- the sweep


def test_the_sweep_trains_with_the_step_that_trains(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every micro-batch goes through train.py's step, and a learning rate of 0 keeps the weights as they are."""
    with sweep.prepared(config) as (_, setup, loader, synthetic):
        assert synthetic.shape == (32, 3, 16, 16)
        assert (setup.plan.micro_batch, setup.plan.count) == (16, 2)
        before = [p.detach().clone() for p in setup.network.parameters()]
        views = (batch.views for batch in itertools.islice(loader, 2))
        setup.step(views, 0.0)
        assert all(torch.equal(p, q) for p, q in zip(setup.network.parameters(), before, strict=True))
        seen = []
        monkeypatch.setattr("model.step.train_step", lambda *given, **options: seen.append((list(given[2]), options)))
        setup.step(itertools.repeat(synthetic, 2), 0.0)
    ((micro_batches, options),) = seen
    assert len(micro_batches) == options["count"] == 2


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 3, reason="two threads of the step and one of the loader need cores")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU trains beside all cores")
def test_loader_and_step_run_on_cores_of_their_own(config: TrainConfig) -> None:
    status, found = in_child(cores_in_use, config)
    assert status == "ok", status
    before, training, others, loading, after = found["cores"]
    assert (len(training), len({core for cores in loading for core in cores})) == (2, 1)
    assert not any(training & cores for cores in loading)
    assert others.count(training) >= 1  # torch's second thread
    assert before == after


def cores_in_use(config: TrainConfig) -> dict[str, Any]:
    """Those of this thread before, then of it, of others and of the loader's in the block, and of it afterwards."""
    before = os.sched_getaffinity(0)
    with sweep.prepared(config) as (_, setup, loader, _):
        setup.step((batch.views for batch in itertools.islice(loader, setup.plan.count)), 0.0)
        training, others, loading = os.sched_getaffinity(0), [], []
        ids = {thread.native_id for thread in threading.enumerate() if thread.name.startswith("loader")}
        assert len(ids) == 1
        for task in Path("/proc/self/task").iterdir():
            with suppress(OSError):  # a thread may end while it is looked at
                named = task.joinpath("comm").read_text().startswith(("[DALI]", "PrefetchWorker"))
                cores = os.sched_getaffinity(int(task.name))
                (loading if named or int(task.name) in ids else others).append(cores)
    others.remove(training)  # this thread's own
    return {"cores": (before, training, others, loading, os.sched_getaffinity(0))}


@pytest.mark.parametrize(("samples", "batch"), [(1000, 256), (1000, 8192), (2560, 8192), (50000, 512), (7, 1000)])
def test_data_are_repeated_until_an_epoch_wastes_nothing_to_speak_of(samples: int, batch: int) -> None:
    n = repeats(samples, batch)
    assert n * samples >= batch
    assert n * samples % batch / (n * samples) <= 0.01
    fewer = [m for m in range(1, n) if m * samples >= batch and m * samples % batch <= 0.01 * m * samples]
    assert not fewer


def test_a_command_leaves_rows_and_goes_on_after_one_that_fails(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of which one fits and one is killed: a row each, on record, with all agreed columns."""
    real = sweep.Sweep.measured

    def measured(self: sweep.Sweep, config: TrainConfig) -> Any:
        return ("out of memory", {}) if config.batch_size == 16 else real(self, config)

    monkeypatch.setattr(sweep.Sweep, "measured", measured)
    monkeypatch.setattr(sweep, "stage_costs", lambda *_: STAGES_MS)
    monkeypatch.setattr(sweep, "noisy", lambda *_: False)  # turns so short are
    shape = ["--size", "16", "--width", "0.0625", "--micro-batch", "16", "--budget", "0.5"]
    sizes = ["--batch-size", "16", "--batch-size", "32"]
    command = [str(data / "shards"), *shape, *sizes, "--out", str(tmp_path)]
    done = CliRunner().invoke(app(), command)
    assert done.exit_code == 0, done.output
    killed, measured = rows_of(tmp_path / "sweep.csv")
    assert (killed["batch_size"], killed["status"], killed["verdict"]) == ("16", "out of memory", "")
    assert killed["together_images_per_s"] == ""
    assert (measured["batch_size"], measured["status"], measured["repeats"]) == ("32", "ok", str(repeats(24, 32)))
    assert measured["verdict"].split(":")[0] in ("the model limits", "the loader limits")
    for name in ("loader_images_per_s", "synthetic_images_per_s", "together_images_per_s", "peak_host_mib"):
        assert float(measured[name]) > 0
    assert (measured["size"], measured["encoder"], measured["world_size"]) == ("16", "ResNet-18 x0.0625", "1")
    assert measured["commit"]
    assert "out of memory" in done.output


def app() -> Any:
    import typer

    program = typer.Typer()
    program.command()(sweep.main)
    return program


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset", "tpu"], "unknown preset 'tpu'"),
        (["nowhere"], "nowhere is no data set"),  # told before any process starts
        (["--against", "byol", "--images", "."], "choose from lightly,solo,torchvision"),
        (["--against", "solo"], "needs --images"),
        (["--profile", "traces", "--against", "solo", "--images", "."], "--profile measures nothing"),
    ],
)
def test_bad_options_end_in_one_line(options: list[str], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app(), [*options, "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert message in done.output
    assert len(done.output.splitlines()) == 1
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------- children


def die() -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def ask_for_too_much() -> dict[str, Any]:
    return {"tensor": torch.empty(2**50, dtype=torch.uint8)}


def leave() -> dict[str, Any]:
    os._exit(7)


def answer() -> dict[str, Any]:
    return {"pid": os.getpid(), "adjust": int(Path("/proc/self/oom_score_adj").read_text())}


@pytest.fixture(scope="module")
def children() -> dict[Any, Any]:
    """What each of these left, all at once: a process takes seconds to start."""
    works = (die, ask_for_too_much, leave, answer)
    with ThreadPoolExecutor() as pool:
        return dict(zip(works, pool.map(in_child, works), strict=True))


@pytest.mark.parametrize(
    ("work", "status"),
    [
        (die, "out of memory"),
        (ask_for_too_much, "out of memory"),
        (leave, "failed: exit code 7"),
    ],
)
def test_a_child_that_fails_leaves_its_reason(children: dict[Any, Any], work: Any, status: str) -> None:
    assert children[work] == (status, {})


def test_a_child_is_a_process_of_its_own_and_the_first_to_be_killed(children: dict[Any, Any]) -> None:
    status, found = children[answer]
    assert status == "ok"
    assert found["pid"] != os.getpid()
    assert found["adjust"] == 1000


def test_what_does_not_fit_the_plan_is_out_of_memory() -> None:
    text = "1 image(s) of (3, 224, 224) in one micro-batch do not fit the 10 MiB that are free on cuda:0"
    assert failure(ValueError(text)) == "out of memory"
    assert failure(torch.OutOfMemoryError("CUDA ran out")) == "out of memory"
    assert failure(ValueError("another\nreason")) == "failed: ValueError: another reason"


def test_steps_in_which_the_hypervisor_ran_others_do_not_count(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of four steps with both tells 0.5 and is disturbed, in every other round all are; the calm ones tell 0.9."""
    ms, rounds, whole = {"load": 100.0, "both": 1000.0, "compute": 900.0, "<lambda>": 10.0}, itertools.count(), [False]

    def turn(work: Any, times: int, _: bool) -> list[Step]:
        if work.__name__ == "load" and times == sweep.QUEUED:
            whole[0] = next(rounds) % 2 == 0
        slow = [work.__name__ == "both" and (whole[0] or i % 4 == 0) for i in range(times)]
        return [Step(ms[work.__name__] * (1.8 if each else 1.0), 0.011 if each else 0.009) for each in slow]

    monkeypatch.setattr(sweep, "turn", turn)
    found = sweep.measure(config, 30.0)
    assert found["rounds"] == 9  # of 3.01 s in 30
    assert [found[name] for name in ("ratio", "ratio_p20", "ratio_p80")] == pytest.approx([0.9] * 3)
    assert found["step_ms_p95"] == 1000
    monkeypatch.setattr(sweep, "MOST", 2)  # and where fewer than three rounds have calm steps, all count
    found = sweep.measure(config, 30.0)
    assert found["rounds"] == 4
    assert found["ratio_p20"] == pytest.approx(0.5)
    assert noisy(found["ratio"], found["ratio_unknown"])  # and it has no verdict, however far the ratio is from 0.97


def test_a_step_knows_what_was_stolen_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def work() -> None:
        time.sleep(0.01)
        clock[0] += 0.1 * (os.cpu_count() or 1)

    monkeypatch.setattr(sweep, "stolen_s", lambda: clock[0])
    steps = sweep.turn(work, 2, cuda=False)
    assert [step.stolen * step.ms for step in steps] == pytest.approx([100, 100])  # ms of every processor


KILLED = """
import os, pathlib, time
from benchmarks.sweep import in_child
def work(file):
    pathlib.Path(file).write_text(str(os.getpid()))
    time.sleep(120)
if __name__ == "__main__":
    in_child(work, {file!r})
"""


def test_nothing_goes_on_where_the_sweep_was_killed(tmp_path: Path) -> None:
    """SIGKILL to the sweep alone; its measuring process is gone, though it had two minutes of work."""
    told, script = tmp_path / "pid", tmp_path / "killed.py"
    script.write_text(KILLED.format(file=str(told)))
    environment = {**os.environ, "PYTHONPATH": str(Path(sweep.__file__).parents[1])}
    with subprocess.Popen([sys.executable, str(script)], env=environment) as parent:
        wait_for(lambda: told.exists() and told.read_text())
        parent.kill()
    wait_for(lambda: not is_running(int(told.read_text())))


def wait_for(happened: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.1)


def is_running(process: int) -> bool:
    """Neither gone nor a zombie that its new parent has not asked after."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ------------------------------------------------------------------------------------------- check, profile, readings


def row(ratio: float, **other: Any) -> dict[str, Any]:
    return {"preset": "cpu", "batch_size": 256, "device": "x", "ratio": ratio, "status": "ok"} | other


def test_a_ratio_that_falls_by_more_than_the_margin_is_told() -> None:
    baseline = [{key: str(value) for key, value in each.items()} for each in (row(0.5), row(0.98, date="1 May"))]
    assert compare([row(0.94)], baseline, 0.05) == ([], [])
    ((told,), _) = compare([row(0.93)], baseline, 0.05)
    assert "256 images: 0.930, was 0.980 on 1 May" in told
    ((told,), _) = compare([row("", status="out of memory")], baseline, 0.05)
    assert "out of memory" in told
    ((told,), _) = compare([row(1.0, status="noisy")], baseline, 0.05)
    assert "its rounds differ too much" in told
    later = [{key: str(value) for key, value in row(2.5, status="noisy").items()}]
    assert compare([row(0.94)], [*baseline, *later], 0.05) == ([], [])


@pytest.mark.parametrize("other", [{"device": "y"}, {"data": "z, 10 images"}, {"threads": 2}, {"micro_batch": 8}])
def test_what_the_baseline_does_not_know_is_said_to_be_held_to_nothing(other: dict[str, Any]) -> None:
    """Nor is a row held to one that was measured otherwise, or to a noisy one."""
    baseline = [{key: str(value) for key, value in row(0.98).items()}, row(0.5, batch_size="512", status="noisy")]
    fallen, unheld = compare([row(0.94), row(0.1) | other, row(0.1, batch_size=512)], baseline, 0.05)
    assert fallen == []
    assert ["256 images" in unheld[0], "512 images" in unheld[1]] == [True, True]
    with pytest.raises(ValueError, match="no settled row of the baseline"):
        compare([row(0.9) | other], baseline, 0.05)


def test_a_rival_that_catches_up_is_told() -> None:
    """ratio_to_ours is theirs / ours: 0.5 means that ours is twice as fast."""
    rival = {"preset": "cpu", "batch_size": 256, "what": "lightly", "device": "x"}
    ours = rival | {"what": "ours", "ratio_to_ours": 1}
    baseline = [{**rival, "batch_size": "256", "ratio_to_ours": "0.5"}]
    assert compare([ours, rival | {"ratio_to_ours": 0.52}], baseline, 0.05) == ([], [])
    ((told,), _) = compare([ours, rival | {"ratio_to_ours": 0.6}], baseline, 0.05)
    assert "ours / lightly: 1.667, was 2.000" in told
    ((told,), _) = compare([ours, rival | {"ratio_to_ours": "", "status": "out of memory"}], baseline, 0.05)
    assert "0.000 (out of memory)" in told


def test_the_command_fails_where_a_ratio_has_fallen(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = dict.fromkeys(FOUND, 1.0) | {"micro_batch": 16, "ratio_unknown": 0.01}
    monkeypatch.setattr(sweep.Sweep, "measured", lambda *_: ("ok", found))
    monkeypatch.setattr(sweep, "stage_costs", lambda *_: STAGES_MS)
    command = [str(data / "shards"), "--batch-size", "32", "--out", str(tmp_path)]
    assert CliRunner().invoke(app(), command).exit_code == 0
    baseline = tmp_path / "sweep.csv"
    again = [*command, "--check", str(baseline)]
    assert CliRunner().invoke(app(), again).exit_code == 0
    found["ratio"] = 0.9
    done = CliRunner().invoke(app(), again)
    assert done.exit_code == 1
    assert "fallen at 32 images: 0.900, was 1.000" in done.output
    assert CliRunner().invoke(app(), [*again, "--margin", "0.2"]).exit_code == 0
    found["ratio_unknown"] = 0.1
    done = CliRunner().invoke(app(), command)
    assert done.exit_code == 0
    assert done.output.strip().endswith(": noisy")
    rows = rows_of(baseline)
    assert [each["verdict"] for each in rows[-2:]] == ["the loader limits: decode", ""]
    assert [each["status"] for each in rows[-2:]] == ["ok", "noisy"]


def test_gaps_are_the_time_that_no_span_covers() -> None:
    """Against a count of the milliseconds that lie in no span."""
    rng = np.random.default_rng(0)
    starts = rng.integers(0, 500, 30)
    spans = [(int(a), int(a + n)) for a, n in zip(starts, rng.integers(1, 20, 30), strict=True)]
    covered = np.zeros(max(b for _, b in spans), bool)
    for a, b in spans:
        covered[a:b] = True
    assert gaps(spans) == pytest.approx((~covered[min(starts) :]).mean())


def test_a_profile_is_a_trace_and_the_ten_longest(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep.trace(replace(config, batch_size=16), tmp_path)
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["ms", "share", "calls", "operator"]
    times = [float(line.split()[0]) for line in table[1:11]]
    assert times == sorted(times, reverse=True)
    assert any("convolution" in line or "conv" in line for line in table[1:11])
    assert (tmp_path / "trace-16-0.json").stat().st_size > 1000


def test_the_drivers_readings_are_parsed_and_what_it_does_not_tell_is_left_out() -> None:
    (reading,) = parse_readings("93, 612.5\n[N/A], 600\n95, 6")
    assert (reading.utilisation_percent, reading.power_w) == (93.0, 612.5)


def test_what_workers_load_is_joined_to_the_micro_batches_of_both_views() -> None:
    """Images 0 to 11 by threes, with -image as the second view."""
    images = torch.arange(12.0).reshape(4, 3, 1, 1, 1).expand(-1, -1, 3, 2, 2)
    first, second = sweep.joined(iter([(each, -each) for each in images]), 2)
    assert first[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5, 0, -1, -2, -3, -4, -5]
    assert second[:, 0, 0, 0].tolist() == [6, 7, 8, 9, 10, 11, -6, -7, -8, -9, -10, -11]
    assert first.is_contiguous(memory_format=torch.channels_last)


@thrice
def test_rivals_train_on_the_same_images(data: Path, config: TrainConfig, tmp_path: Path) -> None:
    """Each contestant's step takes the whole batch through its own loader and loss."""
    ranks = Ranks()
    found = sweep.Sweep("cpu", config, ranks, 1.0, {}, tmp_path)
    rows = found.against({"status": "ok", "batch_size": 32, "micro_batch": "16"}, ["torchvision"], data / "images")
    assert [row["what"] for row in rows] == ["ours", "torchvision"]
    assert float(rows[0]["ratio_to_ours"]) == 1.0
    assert float(rows[1]["ratio_to_ours"]) > 0
    assert rows_of(tmp_path / "against.csv")[1]["what"] == "torchvision"
    assert all(float(row["peak_host_mib"]) > 0 for row in rows)
    cores = len(os.sched_getaffinity(0))
    for row in rows:  # no more than all cores can give
        assert 0 < float(row["cpu_ms_per_image"]) < 1.5 * cores * 1e3 / float(row["images_per_s"])
    assert read_dataset(data / "shards").samples == len(list((data / "images").glob("*/*")))
