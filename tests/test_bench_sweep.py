"""The sweep says what limits, survives what fails, and compares what is alike."""

import csv
import io
import itertools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from benchmarks import against, sweep, throughput
from benchmarks.measure import parse_readings
from benchmarks.programs import Failure, Mark, Progress, Ranks, Timeline, call
from benchmarks.sweep import ENOUGH, PRESETS, compare, noisy, verdict
from benchmarks.throughput import NUMBERS, repeats, uncertainty
from benchmarks.trace import gaps, trace
from pipeline.shards import Sample
from pipeline.views import make_views
from pipeline.write import write_shards
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


def timeline(starts: float, piece_s: float, images: int, waited_s: float = 0.0, count: int = 12) -> Timeline:
    """Pieces of work of which each ran so long, one after the other."""
    marks = [
        Mark(starts + i * piece_s, 2.0 * i * piece_s, 100.0 + i, Progress(images if i else 0, waited_s if i else 0.0))
        for i in range(count + 1)
    ]
    return Timeline([(starts, starts + count * piece_s)], marks)


def alternating(piece_s: dict[str, float], images: dict[str, int], waited_s: float = 0.0) -> dict[str, Timeline]:
    """Programs in turn, in slices of 20 ms of a clock that no other program slows."""
    names, timelines = list(piece_s), {}
    for k, name in enumerate(names):
        slices = [(at, at + 0.02) for at in np.arange(k * 0.02, 60, 0.02 * len(names))]
        moments = np.arange(0, 0.02 * len(slices), piece_s[name])
        at = [slices[int(moment / 0.02 + 1e-9)][0] + moment % 0.02 for moment in moments]
        marks = [Mark(t, i, 100.0, Progress(images[name] * (i > 0), waited_s * (i > 0))) for i, t in enumerate(at)]
        timelines[name] = Timeline(slices, marks)
    return timelines


@pytest.mark.parametrize(
    ("loader_s", "step_s", "waited_s", "what_limits"),
    [(0.307, 0.023, 0.284, "the loader limits: decode"), (0.0013, 0.307, 0.0, "the model limits")],
)
def test_a_slow_loader_limits_and_a_slow_model_does(
    loader_s: float, step_s: float, waited_s: float, what_limits: str
) -> None:
    """Together a step takes as long as the slower of the two; micro-batches and steps are of 16 images."""
    piece_s = {"synthetic": step_s, "together": max(loader_s, step_s), "loader": loader_s}
    result = throughput.numbers_of(alternating(piece_s, dict.fromkeys(piece_s, 16), 3 * waited_s), 16)
    assert set(result) == set(NUMBERS)
    for name, seconds in piece_s.items():
        assert result[f"{name}_images_per_s"] == pytest.approx(16 / seconds, rel=0.01)
    assert result["ratio"] == pytest.approx(step_s / max(loader_s, step_s), rel=0.01)
    assert result["data_wait_percent"] == pytest.approx(100 * waited_s / max(loader_s, step_s), rel=0.1)
    assert result["step_ms_p95"] == pytest.approx(result["step_ms_p50"])
    assert result["step_ms_p50"] == pytest.approx(1e3 * max(loader_s, step_s))
    assert (result["micro_batch"], result["peak_host_mib"]) == (16, 100)
    assert not noisy(result["ratio"], result["ratio_unknown"])
    assert verdict(result["ratio"], STAGES_MS) == what_limits


@pytest.mark.parametrize("what", ["loader", "synthetic", "together"])
def test_the_three_programs_count_what_they_did(what: str, config: TrainConfig, monkeypatch: Any) -> None:
    """Micro-batches of 16, or steps of 32; only with the loader is there anything to wait for."""
    monkeypatch.setattr(throughput, "cores_of", lambda _: (os.sched_getaffinity(0),) * 2)
    warm, *pieces = itertools.islice(throughput.load_or_train(config, what), 3)
    assert warm == Progress()
    assert [piece.images for piece in pieces] == [16 if what == "loader" else 32] * 2
    assert all((piece.waited_s > 0) == (what != "synthetic") for piece in pieces)


def test_three_programs_of_which_one_fails_leave_its_reason(config: TrainConfig, monkeypatch: Any) -> None:
    failures = {"synthetic": Failure("failed: connection"), "together": Failure("out of memory")}
    monkeypatch.setattr(throughput, "in_slices", lambda *_, **__: failures | {"loader": timeline(0, 1, 16)})
    assert throughput.measure_in_slices(config, 1.0) == "out of memory"


def test_a_ratio_is_of_neighbours_and_tells_how_far_the_rounds_differ(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine three times slower in every round changes the rates but no ratio; one that swings, the spread."""
    ms = {"load": 100.0, "step_together": 1000.0, "step_alone": 900.0, "<lambda>": 10.0}
    swing, slow = iter([1.0, 2.0, 0.5]), [1.0]

    def turn(work: Any, times: int, _: bool) -> list[float]:
        if work.__name__ == "load" and times == throughput.QUEUED:
            slow[0] *= 3
        return [slow[0] * ms[work.__name__]] * times

    monkeypatch.setattr(throughput, "wait_until_idle", lambda: None)
    monkeypatch.setattr(throughput, "turn", turn)
    found = throughput.measure_in_turns(config, 1.0)
    assert found["rounds"] == throughput.FEWEST == 3
    assert [found[name] for name in ("ratio", "ratio_p20", "ratio_p80")] == pytest.approx([0.9] * 3)
    assert found["together_images_per_s"] == pytest.approx(32 / 9)
    assert found["synthetic_images_per_s"] == pytest.approx(32 / 9 / 0.9)
    assert found["loader_images_per_s"] == pytest.approx(16 / 0.9)

    def swinging(work: Any, times: int, _: bool) -> list[float]:
        return [ms[work.__name__] * (next(swing) if work.__name__ == "step_alone" else 1.0)] * times

    monkeypatch.setattr(throughput, "turn", swinging)
    found = throughput.measure_in_turns(config, 1.0)
    assert [found[name] for name in ("ratio_p20", "ratio", "ratio_p80")] == pytest.approx([0.45, 0.9, 1.8])


def test_the_readings_of_the_driver_are_means_of_the_rounds(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def watch() -> Iterator[list[Any]]:
        readings: list[Any] = []
        yield readings
        readings += parse_readings("90, 600\n80, 500\n")

    monkeypatch.setattr(throughput, "gpu_watch", watch)
    monkeypatch.setattr(throughput, "wait_until_idle", lambda: None)
    monkeypatch.setattr(throughput, "turn", lambda _work, times, _: [1000.0] * times)
    found = throughput.measure_in_turns(config, 1.0)
    assert (found["gpu_utilisation_percent"], found["gpu_power_w"]) == (85, 550)


def test_what_ended_early_has_no_numbers_and_a_ratio_to_nothing_is_none() -> None:
    marks = [Mark(float(at), 2.0 * at, 10.0, Progress(100 if at else 0)) for at in range(5)]
    ours = Timeline([(0.0, 5.0)], marks)
    found = against.numbers(ours, ours)
    assert (found["ratio_to_ours"], found["rounds"], found["status"]) == ("1", 4, "ok")
    assert (found["images_per_s"], found["cpu_ms_per_image"], found["peak_host_mib"]) == ("100", "20", "10")
    assert against.numbers(Failure("out of memory"), ours)["status"] == "out of memory"
    alone = against.numbers(ours, Failure("failed: of itself"))
    assert (alone["ratio_to_ours"], alone["status"], alone["cpu_ms_per_image"]) == ("", "ok", "20")
    later = Timeline([(10.0, 18.0)], [mark._replace(at=10 + 2 * mark.at) for mark in marks])  # one by one, half as fast
    assert against.numbers(later, ours)["ratio_to_ours"] == "0.5"
    halves = Timeline([(10.0, 14.5), (14.5, 18.0)], later.marks)  # nor does it matter that it was stopped once
    assert against.numbers(halves, ours)["ratio_to_ours"] == "0.5"


def test_a_profile_that_fails_is_told(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "call", lambda *_: Failure("out of memory"))
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


@pytest.mark.parametrize("rounds", [throughput.FEWEST, 5, 10, 40])
def test_the_median_is_known_as_well_as_it_is_said_to_be(rounds: int) -> None:
    """Of 2,000 runs of normal rounds it lies so near in 19 of 20, give or take."""
    drawn = np.random.default_rng(rounds).normal(1.0, 0.05, (2000, rounds))
    hits = [abs(np.median(run) - 1) < uncertainty(run.tolist()) for run in drawn]
    assert 0.93 < np.mean(hits) < 0.98
    assert uncertainty([1.0, 1.0]) == float("inf")


def test_the_stage_that_costs_most_is_found(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stage's processor time less that of the stages before it: 0.2, 3 and 1 of 0.2, 3.2 and 4.2."""
    asked = []

    def interleaved(runs: dict[str, Any], seconds: float) -> dict[str, Any]:
        asked.append(({label: stage for label, (stage, _) in runs.items()}, seconds))
        return {label: (ms(99), ms(total)) for label, total in zip(runs, (0.2, 3.2, 4.2), strict=True)}

    def ms(value: float) -> Any:
        return throughput.timing([value])

    monkeypatch.setattr(sweep, "interleaved", interleaved)
    blurred = replace(config, views=make_views(config.views, {"blur_p": 0.5}))
    assert sweep.stage_costs(blurred, 0.5) == pytest.approx(STAGES_MS)
    sweep.stage_costs(config, 0.5)
    stages = {"reading": "read", "decode": "decode", "augmentation": "blur"}
    assert asked == [(stages, 0.5), (stages | {"augmentation": "colour"}, 0.5)]


# --------------------------------------------------------------------------------------------------------- the sweep


def test_the_sweep_trains_with_the_step_that_trains(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every micro-batch goes through train.py's step, and a learning rate of 0 keeps the weights as they are."""
    with throughput.prepared(config) as bench:
        assert bench.synthetic.shape == (32, 3, 16, 16)
        assert (bench.training.plan.micro_batch, bench.training.plan.count) == (16, 2)
        before = [p.detach().clone() for p in bench.training.network.parameters()]
        bench.step_together()
        assert all(torch.equal(p, q) for p, q in zip(bench.training.network.parameters(), before, strict=True))
        seen = []
        take = lambda *given, **options: seen.append((list(given[2]), options))  # noqa: E731
        monkeypatch.setattr("model.step.train_step", take)
        bench.step_alone()
        bench.step_together()
    for micro_batches, options in seen:
        assert len(micro_batches) == options["count"] == 2


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 3, reason="two threads of the step and one of the loader need cores")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU trains beside all cores")
def test_loader_and_step_run_on_cores_of_their_own(config: TrainConfig) -> None:
    found = call(cores_in_use, config)
    assert not isinstance(found, Failure), found
    before, training, others, loading, after = found
    assert (len(training), len({core for cores in loading for core in cores})) == (2, 1)
    assert not any(training & cores for cores in loading)
    assert others.count(training) >= 1  # torch's second thread
    assert before == after


def cores_in_use(config: TrainConfig) -> tuple[Any, ...]:
    """Those of this thread before, then of it, of others and of the loader's in the block, and of it afterwards."""
    before = os.sched_getaffinity(0)
    with throughput.prepared(config) as bench:
        bench.step_together()
        training, others, loading = os.sched_getaffinity(0), [], []
        ids = {thread.native_id for thread in threading.enumerate() if thread.name.startswith("loader")}
        assert len(ids) == 1
        for task in Path("/proc/self/task").iterdir():
            with suppress(OSError):  # a thread may end while it is looked at
                named = task.joinpath("comm").read_text().startswith(("[DALI]", "PrefetchWorker"))
                cores = os.sched_getaffinity(int(task.name))
                (loading if named or int(task.name) in ids else others).append(cores)
    others.remove(training)  # this thread's own
    return before, training, others, loading, os.sched_getaffinity(0)


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
    """Batches of which one fits and one is killed: a row each, on record, with all agreed columns.

    The one sweep that is measured as users measure it, in processes of its own.
    """
    real = sweep.Sweep.measured

    def measured(self: sweep.Sweep, config: TrainConfig) -> Any:
        return Failure("out of memory") if config.batch_size == 16 else real(self, config)

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
    found: dict[str, Any] = dict.fromkeys(NUMBERS, 1.0) | {"micro_batch": 16, "ratio_unknown": 0.01}
    monkeypatch.setattr(sweep.Sweep, "measured", lambda *_: found)
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
    trace(replace(config, batch_size=16), tmp_path)
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
    first, second = against.joined(iter([(each, -each) for each in images]), 2)
    assert first[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5, 0, -1, -2, -3, -4, -5]
    assert second[:, 0, 0, 0].tolist() == [6, 7, 8, 9, 10, 11, -6, -7, -8, -9, -10, -11]
    assert first.is_contiguous(memory_format=torch.channels_last)


def in_this_process(programs: dict[str, Any], *_: float, **__: Any) -> dict[str, Timeline]:
    """As `in_slices`, without processes of their own: three steps each, of 1 s the first, 2 s the second."""
    timelines = {}
    for number, (name, program) in enumerate(programs.items(), 1):
        running = program()
        marks = [Mark(i * number, 2.0 * i * number, 50.0, done) for i, done in enumerate(itertools.islice(running, 4))]
        running.close()
        timelines[name] = Timeline([(0.0, 12.0)], marks)
    return timelines


def test_rivals_train_on_the_same_images(
    data: Path, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each contestant's step takes the whole batch through its own loader and loss."""
    rival = "solo"  # whose loader does not fork this process
    monkeypatch.setattr(against, "in_slices", in_this_process)
    steps = []
    train_one = against.train_one

    def watched(training: Any, views: Any) -> None:
        taken = [next(views) for _ in range(training.plan.count)]
        steps.append([tuple(view.shape) for view in taken])
        train_one(training, iter(taken))

    monkeypatch.setattr(against, "train_one", watched)
    threads = torch.get_num_threads()
    facts = {"threads": 1, "loader_threads": 1}
    row = {"status": "ok", "batch_size": 32, "micro_batch": "16"}
    rows = sweep.Sweep("cpu", Ranks(), 1.0, facts, tmp_path).against(row, config, [rival], data / "images")
    torch.set_num_threads(threads)
    assert rows_of(tmp_path / "against.csv") == [{name: str(value) for name, value in row.items()} for row in rows]
    assert [row["what"] for row in rows] == ["ours", rival]
    assert [row["images_per_s"] for row in rows] == ["32", "16"]
    assert [row["ratio_to_ours"] for row in rows] == ["1", "0.5"]
    assert [row["cpu_ms_per_image"] for row in rows] == ["62.5", "125"]
    assert [row["threads"] for row in rows] == [len(os.sched_getaffinity(0))] * 2
    assert steps == [[(32, 3, 16, 16)] * 2] * len(steps)
