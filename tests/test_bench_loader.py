"""Every loader that is compared delivers two views of every image, does what it is asked for, and works in its turn."""

import csv
import io
import itertools
import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from torch import Tensor

from benchmarks import loader, peers
from benchmarks.loader import HAND_OVER, LOADERS, STAGES
from benchmarks.measure import cpu_seconds
from benchmarks.peers import PEERS, Task
from benchmarks.programs import Failure, Mark, Timeline
from pipeline.loader import Loader
from pipeline.shards import Sample, read_dataset
from pipeline.views import ViewConfig, make_views
from pipeline.write import write_shards
from tests.timed import thrice

NUM, BATCH, SIZE = 12, 4, 16
LEVELS = {"size": SIZE, "mean": [0.0] * 3, "std": [1 / 255] * 3}  # views come out as grey levels
OFF = {"flip_p": 0.0, "jitter_p": 0.0, "grayscale_p": 0.0, "blur_p": 0.0}
PLAIN = make_views("imagenet", {**LEVELS, **OFF, "blur_kernel": 0.6})


@pytest.fixture(scope="module", params=[*LOADERS, *PEERS])
def name(request: pytest.FixtureRequest) -> str:
    if request.param == "lightly" and not find_spec("lightly"):
        pytest.skip("lightly is not installed")
    return request.param


def make_task(out: Path, images: list[Any], views: ViewConfig = PLAIN) -> Task:
    """The same JPEGs in two class folders and as shards."""
    samples = []
    for i, pixels in enumerate(images):
        file = io.BytesIO()
        Image.fromarray(np.asarray(pixels, np.uint8)).save(file, "JPEG", quality=100, subsampling=0)
        path = out / "images" / f"class{i % 2}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.getvalue())
        samples.append(Sample(path.name, i % 2, file.getvalue()))
    write_shards(samples, out / "shards", classes=["class0", "class1"], shard_size=NUM // 2)
    return Task(shards=out / "shards", images=out / "images", views=views, batch_size=BATCH, threads=2)


def grey(i: int) -> int:
    return 20 * i + 10


@pytest.fixture(scope="module")
def flats(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """Flat images, each of a grey level of its own: however they are cropped, a pixel tells which it was."""
    return make_task(tmp_path_factory.mktemp("flats"), [np.full((40, 48, 3), grey(i)) for i in range(NUM)])


@pytest.fixture(scope="module")
def ramps(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """Dark on the left, bright on the right, and far from grey."""
    ramp = np.linspace(20, 235, 48)[None, :, None] * np.array([1.0, 0.6, 0.2]) + np.zeros((40, 1, 1))
    return make_task(tmp_path_factory.mktemp("ramps"), [ramp] * NUM)


@pytest.fixture(scope="module")
def noises(tmp_path_factory: pytest.TempPathFactory) -> Task:
    rng = np.random.default_rng(0)
    return make_task(tmp_path_factory.mktemp("noises"), [rng.integers(0, 256, (40, 48, 3)) for _ in range(NUM)])


def take(name: str, task: Task, batches: int, **changes: Any) -> list[tuple[int, list[Tensor]]]:
    stream = (LOADERS | PEERS | STAGES)[name](replace(task, views=replace(task.views, **changes)))
    taken = [(n, [view.float().cpu().clone() for view in views]) for n, views in itertools.islice(stream, batches)]
    stream.close()  # type: ignore[attr-defined]
    return taken


def check_form(batch: tuple[int, list[Tensor]]) -> None:
    n, views = batch
    assert n == BATCH
    assert [tuple(view.shape) for view in views] == [(BATCH, 3, SIZE, SIZE)] * 2


def test_an_epoch_gives_both_views_of_every_image_once(name: str, flats: Task) -> None:
    """What is counted is what was delivered: nothing is left out, made twice or paired with another image."""
    seen = []
    for batch in take(name, flats, NUM // BATCH):
        check_form(batch)
        first, second = (view.mean(dim=(1, 2, 3)) for view in batch[1])
        torch.testing.assert_close(first, second, atol=1.5, rtol=0)
        seen += [round((level - 10) / 20) for level in first.tolist()]
        assert all(abs(level - grey(i)) < 3 for level, i in zip(first.tolist(), seen[-BATCH:], strict=True))
    if name == "webdataset + torchvision":  # draws shards with replacement, as its users do
        assert set(seen) <= set(range(NUM))
    else:
        assert sorted(seen) == list(range(NUM))


def test_every_loader_flips_and_greys_as_asked(name: str, ramps: Task) -> None:
    """p = 1 for both: every view is grey, and bright on the left."""
    (batch,) = take(name, ramps, 1, flip_p=1.0, grayscale_p=1.0, crop_area=(0.5, 1.0))
    check_form(batch)
    for view in batch[1]:
        assert (view - view.mean(dim=1, keepdim=True)).abs().max() < 2
        left, right = view[..., : SIZE // 2].mean(dim=(1, 2, 3)), view[..., SIZE // 2 :].mean(dim=(1, 2, 3))
        assert (left > right + 10).all()


def test_every_loader_jitters_as_asked(name: str, ramps: Task) -> None:
    """p = 1: views of one picture differ, and in hue, not in brightness alone."""
    (plain,) = take(name, ramps, 1)
    (batch,) = take(name, ramps, 1, jitter_p=1.0)
    check_form(batch)

    def shades(views: list[Tensor]) -> Tensor:
        """Standard deviation over all views of the share of red, green and blue."""
        mean = torch.cat(views).mean(dim=(2, 3))
        return (mean / mean.sum(dim=1, keepdim=True)).std(dim=0)

    assert shades(plain[1]).max() < 0.005
    assert shades(batch[1]).min() > 0.02


def test_every_loader_blurs_as_asked(name: str, noises: Task) -> None:
    """A sigma of 2 pixels takes most of the contrast out of noise; whole-image crops make the noise the same."""
    options = {"crop_area": (0.9, 1.0), "size": 40}
    plain, blurred = (take(name, noises, 1, blur_p=p, blur_sigma=(1.9, 2.0), **options)[0][1] for p in (0.0, 1.0))
    assert torch.cat(blurred).std() < 0.4 * torch.cat(plain).std()


@pytest.mark.parametrize("stage", ["read", "decode", HAND_OVER])
def test_stages_without_our_loader_count_source_images(stage: str, flats: Task) -> None:
    """Whole batches only, as many as in training: what an epoch leaves over is not made."""
    counts = [n for n, _ in take(stage, replace(flats, batch_size=5), 6)]
    assert counts == [5] * 6


def test_what_is_read_and_decoded_are_the_images_of_training(flats: Task) -> None:
    """Of an epoch of two batches of five none twice; three epochs differ."""
    batches = loader.encoded(replace(flats, batch_size=5))
    epochs = [np.concatenate([next(batches).samples for _ in range(2)]).tolist() for _ in range(3)]
    batches.close()  # type: ignore[attr-defined]
    assert [len(set(samples)) for samples in epochs] == [10] * 3
    assert all(0 <= sample < NUM for samples in epochs for sample in samples)
    assert len(set(map(tuple, epochs))) == 3
    ours = Loader(read_dataset(flats.shards), flats.views, 5, torch.device("cpu"))
    assert [sample for _ in range(6) for sample in next(ours).samples.tolist()] == sum(epochs, [])


def test_the_stages_leave_out_what_follows_them(noises: Task) -> None:
    """Of one seed: "crop" keeps the colours that "colour" changes, and "blur" takes contrast out of that."""
    asked = replace(noises, views=replace(noises.views, jitter_p=1.0, blur_p=1.0, blur_sigma=(2.0, 2.0)))
    cropped, coloured, blurred = (torch.cat(take(stage, asked, 1)[0][1]) for stage in ("crop", "colour", "blur"))
    assert (cropped.mean(dim=(2, 3)) - coloured.mean(dim=(2, 3))).abs().max() > 5
    assert blurred.std(dim=(2, 3)).mean() < 0.7 * coloured.std(dim=(2, 3)).mean()


def _work(seconds: float, link: Connection) -> None:
    while time.process_time() < seconds:
        pass
    link.send(time.process_time())
    link.recv()


@thrice
def test_processor_time_includes_workers() -> None:
    """A worker's own clock says the same; waiting costs nothing."""
    here, there = multiprocessing.Pipe()
    worker = multiprocessing.get_context("fork").Process(target=_work, args=(0.3, there))
    before, mine = cpu_seconds(), time.process_time()
    worker.start()
    worked = here.recv()
    time.sleep(0.2)
    after, mine = cpu_seconds(), time.process_time() - mine
    here.send(None)
    worker.join()
    assert worked <= after - before - mine + 0.02
    assert after - before - mine < worked + 0.1


def in_this_process(programs: dict[str, Any], *_: float, **__: Any) -> dict[str, Timeline]:
    """As `in_slices`, without processes of their own: five pieces of work each, on a clock of a second a piece.

    Processor time is 10 ms an image of the first program, 20 ms of the second and so on.
    """
    timelines = {}
    for number, (label, program) in enumerate(programs.items(), 1):
        running, marks = program(), []
        for at, progress in enumerate(itertools.islice(running, 6)):
            cpu_s = marks[-1].cpu_s + 0.01 * number * progress.images if marks else 0.0
            marks.append(Mark(float(at), cpu_s, 100.0, progress))
        running.close()
        timelines[label] = Timeline([(0.0, 5.0)], marks)
    return timelines


@pytest.fixture
def _instant(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No processes of their own, and this one is afterwards as it was."""
    monkeypatch.setattr(loader, "in_slices", in_this_process)
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    yield
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_instant")
def test_the_record_has_a_row_for_every_stage_and_loader(
    flats: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of 4 from each worker a second, the stages' shares add up to the whole, and the plot is a picture."""
    monkeypatch.setattr(peers, "installed", lambda: ["DALI, conditionals", "DALI, masks"])
    names = [loader.OURS, f"{loader.OURS}, reference", "DALI, conditionals", "DALI, masks"]  # none forks
    options = {
        "images": flats.images,
        "size": SIZE,
        "view": ["blur_kernel=0.3"],
        "batch_size": BATCH,
        "threads": [2, 1],
    }
    options |= {"batch_size": BATCH, "threads": [2, 1], "seconds": 0.1, "memory_steps": 10, "call_steps": 3}
    loader.main(flats.shards, out=tmp_path, **options)
    with (tmp_path / "loader.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["what"], row["implementation"], row["threads"]) for row in rows] == [
        *(("stage", stage, count) for count in "12" for stage in STAGES),
        *(("loader", name, "2") for name in names),
        ("memory, 10 steps", loader.OURS, "2"),
        ("call, 3 batches", loader.OURS, "2"),
    ]
    for number, row in enumerate(rows[:-2]):
        place = 1 + (number % len(STAGES) if row["what"] == "stage" else names.index(row["implementation"]))
        for part in ("p20_", "", "p80_"):
            assert float(row[f"{part}images_per_s"]) == pytest.approx(BATCH * int(row["threads"]))
            assert float(row[f"{part}cpu_ms"]) == pytest.approx(10 * place)
    float(rows[-2]["growth_mib"])
    assert 0 < float(rows[-1]["call_ms"]) <= float(rows[-1]["p80_call_ms"])
    assert {(row["views"], row["size"], row["batch_size"]) for row in rows} == {("imagenet blur_kernel=0.3", "16", "4")}
    assert {row["data"] for row in rows} == {"shards, 12 images"}
    one_thread = rows[: len(STAGES)]
    whole = next(float(row["cpu_ms"]) for row in one_thread if row["implementation"] == "blur")
    assert sum(loader.shares(one_thread).values()) == pytest.approx(whole)
    with Image.open(tmp_path / "loader-cpu-16.png") as picture:
        assert picture.width > picture.height > 300


@thrice
def test_a_call_is_timed_when_its_batch_is_ready(flats: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches take 40 ms to make, beside the caller, and 4 ms to hand over: waiting for them does not count."""

    def batches(_: Task) -> Iterator[tuple[int, list[Tensor]]]:
        ready = time.perf_counter()
        while True:
            time.sleep(max(0.0, ready - time.perf_counter()) + 0.004)
            ready = time.perf_counter() + 0.04
            yield 1, []

    monkeypatch.setattr(loader, "ours", batches)
    assert 4 <= loader.call_ms(flats, 5).median < 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": "one"}, "11 files in class folders, the shards have 12 samples"),
        ({"view": ["wobble=1"]}, "unknown view option 'wobble'"),
        ({"threads": [10_000]}, "10000 threads, but"),
    ],
)
def test_what_would_be_no_comparison_is_refused(
    change: dict[str, Any], message: str, flats: Task, tmp_path: Path
) -> None:
    """Before anything is measured or written."""
    if "images" in change:
        for path in sorted(flats.images.glob("*/*"))[1:]:  # type: ignore[union-attr]
            (tmp_path / path.parent.name).mkdir(exist_ok=True)
            (tmp_path / path.parent.name / path.name).write_bytes(path.read_bytes())
        change = {"images": tmp_path}
    with pytest.raises(typer.BadParameter, match=message):
        loader.main(flats.shards, **{"batch_size": BATCH, "out": tmp_path / "out", **change})
    assert not (tmp_path / "out").exists()


def test_a_loader_that_fails_is_named(flats: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "in_slices", lambda *_, **__: {"a": Failure("failed: DatasetError: nowhere")})
    with pytest.raises(RuntimeError, match="a: failed: DatasetError: nowhere"):
        loader.interleaved({"a": ("read", flats)}, 0.5)


def test_reading_is_measured_in_a_process_of_its_own(flats: Task) -> None:
    """Whole batches of all workers, in fewer than all the processor time that there is."""
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    wall, cpu = loader.interleaved({"a": ("read", replace(flats, threads=1))}, 0.3)["a"]
    assert wall.runs == cpu.runs > 2
    assert 0 < cpu.median < 2 * len(cores) * wall.p80
    assert (os.sched_getaffinity(0), torch.get_num_threads()) == (cores, threads)


def test_stages_that_do_nothing_are_left_out(flats: Task) -> None:
    """No blur at 32 pixels, and no decoder where pixels are stored bare."""
    dataset, cifar = read_dataset(flats.shards), make_views("cifar")
    assert loader.stages(make_views("imagenet"), dataset) == list(STAGES)
    assert loader.stages(cifar, dataset) == [name for name in STAGES if name != "blur"]
    bare = replace(dataset, raw=(32, 32))
    assert loader.stages(cifar, bare) == [name for name in STAGES if name not in ("blur", "decode")]
