"""Every rank gets equally many batches, every sample at most once an epoch, and any position comes back exactly."""

import dataclasses
import gc
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipeline.index import index_tars
from pipeline.loader import Batch, Loader, LoaderError, _device_id, build_eval_loader
from pipeline.order import Order
from pipeline.reader import Reader
from pipeline.shards import Dataset, Sample, read_dataset
from pipeline.views import VIEWS, ViewConfig, make_views
from pipeline.write import write_shards
from tests.timed import thrice

CPU = torch.device("cpu")
NUM = 23
TINY = make_views("cifar", {"size": 8})
# No colour operations, and pixels come out as grey levels: a flat image stays what it is, however it is cropped.
FLAT = make_views("cifar", {"size": 8, "jitter_p": 0.0, "grayscale_p": 0.0, "mean": [0.0] * 3, "std": [1 / 255] * 3})


def encode(pixels: Any, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(file, format)
    return file.getvalue()


def flat(i: int, format: str = "PNG") -> bytes:
    """10 x 12 pixels of a colour that no other i has."""
    return encode(np.broadcast_to(colour(i), (10, 12, 3)), format)


def colour(i: int) -> list[int]:
    return [8 * (i % 32), 8 * (i // 32), 255 - 8 * (i % 32)]


def noise(i: int, format: str = "PNG") -> bytes:
    return encode(np.random.default_rng(i).integers(0, 256, (24, 20, 3)), format)


def write(out: Path, images: list[bytes], *, shard_size: int = 5, labelled: bool = True, seed: int = 0) -> Dataset:
    """Labels are identities."""
    samples = [Sample(f"{i}", i if labelled else None, image) for i, image in enumerate(images)]
    classes = [str(i) for i in range(len(images))] if labelled else None
    return write_shards(samples, out, classes=classes, shard_size=shard_size, seed=seed)


@pytest.fixture(scope="module")
def flats(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """23 flat images in 5 shards of 4 or 5; read only."""
    return write(tmp_path_factory.mktemp("flat") / "set", [flat(i) for i in range(NUM)])


@pytest.fixture(scope="module")
def noises(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """23 images of noise in 5 shards; read only."""
    return write(tmp_path_factory.mktemp("noise") / "set", [noise(i) for i in range(NUM)])


def build(dataset: Dataset, batch_size: int = 4, views: ViewConfig = TINY, **options: Any) -> Loader:
    return Loader(dataset, views, batch_size, CPU, **{"seed": 5, "num_threads": 1, "shuffle": True, **options})


def ranks(dataset: Dataset, world_size: int, batch_size: int, **options: Any) -> list[Loader]:
    return [build(dataset, batch_size, rank=rank, world_size=world_size, **options) for rank in range(world_size)]


def labels(batch: Batch) -> list[int]:
    assert batch.labels is not None
    assert batch.labels.dtype == torch.int64
    return batch.labels.tolist()


def equal(a: Batch, b: Batch) -> bool:
    """Bit by bit, place included."""
    return torch.equal(a.views, b.views) and labels(a) == labels(b) and (a.epoch, a.position) == (b.epoch, b.position)


def stored(dataset: Dataset) -> list[int]:
    """Labels in the order of the shards, as Python's tarfile sees them."""
    found = []
    for path in dataset.tars:
        with tarfile.open(path) as tar:
            found += [int(tar.extractfile(member).read()) for member in tar if member.name.endswith(".cls")]  # type: ignore[union-attr]
    return found


def position_of(dataset: Dataset, label: int) -> tuple[Path, dict[str, tuple[int, int]]]:
    """The tar that holds a sample, and {extension: (offset, size)} of its members."""
    for path in dataset.tars:
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            for member in members:
                if member.name.endswith(".cls") and int(tar.extractfile(member).read()) == label:  # type: ignore[union-attr]
                    key = member.name.removesuffix(".cls")
                    same = [m for m in members if m.name.split(".")[0] == key]
                    return Path(path), {m.name.split(".")[1]: (m.offset_data, m.size) for m in same}
    raise AssertionError(f"no sample {label}")


# ---- epochs and ranks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num", "shard_size", "batch_size"), [(23, 5, 4), (23, 5, 12), (24, 24, 6), (17, 3, 16)])
def test_each_sample_comes_at_most_once_an_epoch_and_only_the_last_global_batch_is_dropped(
    tmp_path: Path, num: int, shard_size: int, batch_size: int
) -> None:
    """num // batch_size batches, each rank its part; no label comes twice; each of three epochs has its own order."""
    data = write(tmp_path / "set", [flat(i) for i in range(num)], shard_size=shard_size)
    loaders = ranks(data, 2, batch_size)
    assert {loader.steps_per_epoch for loader in loaders} == {num // batch_size}
    orders = []
    for epoch in range(3):
        order = []
        for step in range(num // batch_size):
            for loader in loaders:
                batch = next(loader)
                assert (batch.epoch, batch.position) == (epoch, step * batch_size)
                order += labels(batch)
        assert len(order) == num // batch_size * batch_size
        assert max(Counter(order).values()) == 1
        orders.append(order)
    # two shuffles of 12 or more samples coincide with probability below 1e-8
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_labels_and_numbers_are_those_of_the_samples(flats: Dataset) -> None:
    """A flat image shows which one it is: label, number and colour agree in every batch."""
    loader, names = build(flats, 4, FLAT), stored(flats)
    for _ in range(8):
        batch = next(loader)
        assert [names[sample] for sample in batch.samples] == labels(batch)
        for view, label in zip(batch.views, [*labels(batch), *labels(batch)], strict=True):
            assert view[:, 4, 4].round().int().tolist() == colour(label)


Keys = list[tuple[int, int, list[int]]]  # epoch, position and samples of each global batch


def global_batches(loaders: list[Loader], steps: int) -> tuple[Keys, list[Tensor]]:
    """The next global batches of all ranks: what they consist of, and the first and the second views of each."""
    found, views = [], []
    for _ in range(steps):
        parts = [next(each) for each in loaders for _ in range(each.local_batch_size // each.micro_batch)]
        assert len({(part.epoch, part.position) for part in parts}) == 1
        found.append((parts[0].epoch, parts[0].position, [n for part in parts for n in part.samples.tolist()]))
        views.append(torch.cat([torch.cat([part.views.chunk(2)[view] for part in parts]) for view in (0, 1)]))
    return found, views


@pytest.mark.parametrize(("window", "lanes"), [(0, 1), (2, 1), (2, 4)])
def test_global_batches_are_the_same_for_any_number_of_processes_and_micro_batches(
    tmp_path: Path, window: int, lanes: int
) -> None:
    """Two epochs for 1, 2, 3 and 4 ranks, and for micro-batches of the whole, a half and a quarter: samples, order and
    views, bit by bit."""
    data = write(tmp_path / "set", [noise(i) for i in range(110)], shard_size=9)
    options = {"window": window, "lanes": lanes}
    whole, steps = ranks(data, 1, 24, **options), 2 * (110 // 24)
    keys, views = global_batches(whole, steps)
    assert whole[0].steps_per_epoch == 110 // lanes // (24 // lanes)
    for world_size, parts in [(2, 1), (3, 1), (4, 1), (1, 2), (1, 4), (2, 2), (3, 4)]:
        others = ranks(data, world_size, 24, micro_batch=24 // world_size // parts, **options)
        found, made = global_batches(others, steps)
        assert found == keys
        assert all(map(torch.equal, made, views))


def test_a_run_that_stops_anywhere_goes_on_with_any_number_of_processes(tmp_path: Path) -> None:
    """Ten stops at random batches of two epochs, each resumed by another number of ranks and micro-batches."""
    data = write(tmp_path / "set", [noise(i) for i in range(110)], shard_size=9)
    keys, views = global_batches(ranks(data, 1, 12), 18)
    rng, at, found, made = np.random.default_rng(3), 0, [], []
    stops = [*np.sort(rng.choice(np.arange(1, 18), 10, replace=False)).tolist(), 18]
    state: dict[str, Any] | None = None
    for number, stop in enumerate(stops):
        world_size, parts = [(1, 1), (2, 3), (3, 2), (4, 1), (1, 4), (2, 1)][number % 6]
        loaders = ranks(data, world_size, 12, micro_batch=12 // world_size // parts, num_threads=1 + number % 2)
        for loader in loaders:
            if state:
                loader.load_state_dict(json.loads(json.dumps(state)))
        more, shown = global_batches(loaders, stop - at)
        found, made, at = found + more, made + shown, stop
        states = [json.dumps(loader.state_dict()) for loader in loaders]
        assert len(set(states)) == 1  # equal on all ranks
        state = json.loads(states[0])
    assert found == keys
    assert all(map(torch.equal, made, views))


def write_sorted(out: Path, samples: int, classes: int, shard_size: int) -> Dataset:
    """Shards of others whose samples lie in the order of their classes, indexed where they lie."""
    out.mkdir()
    for first in range(0, samples, shard_size):
        with tarfile.open(out / f"sorted-{first // shard_size:06d}.tar", "w") as tar:
            for i in range(first, first + shard_size):
                for extension, content in (("cls", b"%d" % (i * classes // samples)), ("png", flat(0))):
                    member = tarfile.TarInfo(f"{i:08d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return index_tars([out], out.with_name("indexed"))


def effective_classes(dataset: Dataset, batch_size: int, batches: int, **options: Any) -> list[float]:
    """1 / sum of squared shares of the classes, of each batch: k where k classes are equally frequent."""
    loader = Loader(dataset, FLAT, batch_size, CPU, **options)
    counts = [np.bincount(labels(next(loader))) for _ in range(batches)]
    return [batch_size**2 / float(np.square(count).sum()) for count in counts]


def test_batches_of_class_sorted_shards_are_as_mixed_as_random_draws(tmp_path: Path) -> None:
    """ImageNet's proportions at 1/16: shards that each hold one class, in tars that others wrote."""
    samples, classes, shard, batch_size = 1920, 30, 64, 32
    ideal = 1 / (1 / classes + (1 - 1 / classes) / batch_size)
    found = effective_classes(write_sorted(tmp_path / "sorted", samples, classes, shard), batch_size, 120)
    for epoch in (found[:60], found[60:]):
        assert np.mean(epoch) > 0.95 * ideal


def test_without_shuffle_batches_follow_the_shards(flats: Dataset) -> None:
    loader = build(flats, 4, shuffle=False)
    for _ in range(2):
        assert [label for _ in range(NUM // 4) for label in labels(next(loader))] == stored(flats)[: NUM // 4 * 4]


def test_the_same_arguments_give_the_same_batches_with_any_number_of_threads(noises: Dataset) -> None:
    for a, b, _ in zip(build(noises, num_threads=1), build(noises, num_threads=3), range(7), strict=False):
        assert equal(a, b)


def test_another_seed_gives_other_views(noises: Dataset) -> None:
    """Also of the same samples in the same order."""
    a, b = next(build(noises, shuffle=False)), next(build(noises, shuffle=False, seed=6))
    assert labels(a) == labels(b)
    assert not torch.equal(a.views, b.views)


def test_micro_batches_that_do_not_divide_the_batch_are_refused(flats: Dataset) -> None:
    with pytest.raises(ValueError, match="micro_batch 5 does not divide the 12 images.*; near are 3, 4, 6"):
        build(flats, 12, micro_batch=5)
    with pytest.raises(ValueError, match="micro_batch -2 is negative"):
        build(flats, micro_batch=-2)


def test_an_image_gets_new_views_every_epoch(tmp_path: Path) -> None:
    """One image, eight epochs of one batch: 16 different views."""
    loader = build(write(tmp_path / "set", [noise(0)]), 1)
    views = torch.cat([next(loader).views for _ in range(8)])
    assert len(torch.unique(views.flatten(1), dim=0)) == 16


# ---- the batch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [False, True])
def test_a_batch_is_view_major_channels_last_and_its_own_memory(flats: Dataset, half: bool) -> None:
    """Rows i and i + n are views of image i with label i; the next batches do not overwrite what was given."""
    loader = build(flats, 4, FLAT, half=half)
    batches = [next(loader) for _ in range(12)]
    for batch in batches:
        assert batch.views.shape == (8, 3, 8, 8)
        assert batch.views.dtype == (torch.float16 if half else torch.float32)
        assert batch.views.is_contiguous(memory_format=torch.channels_last)
        for row, label in enumerate(labels(batch) * 2):
            want = torch.tensor(colour(label), dtype=torch.float32)[:, None, None]
            # whole levels below 256 are exact in float16; scaling by 255 in float32 is off by 255 * 2**-23
            assert (batch.views[row].float() - want).abs().max() <= 1e-4


def test_both_views_of_an_image_differ(noises: Dataset) -> None:
    first, second = next(build(noises, 8)).views.chunk(2)
    assert not (first == second).all(dim=(1, 2, 3)).any()


def test_an_unlabelled_data_set_has_no_labels(tmp_path: Path) -> None:
    data = write(tmp_path / "set", [flat(i) for i in range(9)], labelled=False)
    loader = build(data, 3, FLAT)
    seen = set()
    for _ in range(3):
        batch = next(loader)
        assert batch.labels is None
        assert torch.equal(batch.views[:3, :, 0, 0], batch.views[3:, :, 0, 0])
        seen |= {int(value) for value in batch.views[:3, 0, 0, 0] / 8}
    assert seen == set(range(9))


@pytest.mark.parametrize("formats", [["PNG"], ["JPEG"], ["WEBP"], ["PNG", "JPEG"], ["JPEG", "WEBP", "PNG"]])
def test_kinds_of_files_can_be_mixed(tmp_path: Path, formats: list[str]) -> None:
    """A flat colour survives even lossy coding to 6 levels (chroma is rounded), so images cannot be confused."""
    images = [flat(i, format) for i, format in zip(range(12), itertools.cycle(formats), strict=False)]
    loader = build(write(tmp_path / "set", images), 4, FLAT)
    seen = []
    for _ in range(3):
        batch = next(loader)
        seen += labels(batch)
        for row, label in enumerate(labels(batch) * 2):
            assert (batch.views[row] - torch.tensor(colour(label))[:, None, None]).abs().max() <= 6
    assert sorted(seen) == list(range(12))


def test_waiting_is_measured_from_one_asking_to_the_next(flats: Dataset) -> None:
    """It is the time inside next(), less the call itself, and none of that between."""
    loader = build(flats)
    spent = 0.0
    for _ in range(5):
        start = time.perf_counter()
        next(loader)
        spent += time.perf_counter() - start
        time.sleep(0.02)
    assert spent / 2 < loader.take_wait_s() <= spent
    start = time.perf_counter()
    next(loader)
    assert 0 < loader.take_wait_s() <= time.perf_counter() - start
    assert loader.take_wait_s() == 0


@thrice
def test_the_next_batch_is_made_while_this_one_is_used(flats: Dataset) -> None:
    """0.3 s of loading in 0.6 s of computing are not waited for; the position is that of the batch in use."""
    read, loader = Reader.read, build(flats)

    def slow(self: Reader, samples: Any) -> Any:
        time.sleep(0.3)
        return read(self, samples)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reader, "read", slow)
        next(loader)
        for run in range(2, 5):
            start = time.perf_counter()
            next(loader)
            assert time.perf_counter() - start < 0.2 or run < 4  # DALI asks for three batches before the first
            time.sleep(0.6)
            assert loader.state_dict()["position"] == 4 * run


# ---- position ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world_size", "rank", "shuffle"), [(1, 0, True), (1, 0, False), (3, 2, True)])
def test_a_position_comes_back_exactly_at_every_step_of_three_epochs(
    noises: Dataset, world_size: int, rank: int, shuffle: bool
) -> None:
    """Through JSON into a new loader: mid-epoch, at an epoch's end, and every later batch across further ends."""
    options: dict[str, Any] = {"batch_size": 3 * world_size, "world_size": world_size, "rank": rank, "shuffle": shuffle}
    loader = build(noises, **options)
    total = 3 * loader.steps_per_epoch
    states, batches = [], []
    for _ in range(total):
        states.append(json.dumps(loader.state_dict()))
        batches.append(next(loader))
    assert batches[-1].epoch == 2
    for i in sorted({*range(0, total, 4), *range(loader.steps_per_epoch - 1, loader.steps_per_epoch + 2)}):
        restored = build(noises, **options)
        restored.load_state_dict(json.loads(states[i]))
        assert json.dumps(restored.state_dict()) == states[i]  # saving again before the first batch loses nothing
        for batch in batches[i:]:
            assert equal(next(restored), batch), f"restored at {i}: batch {batch.position} of epoch {batch.epoch}"


def test_a_restored_loader_can_be_saved_and_restored_again(noises: Dataset) -> None:
    """Also without a batch in between, and in a loader that had been somewhere else."""
    loader = build(noises)
    for _ in range(7):
        next(loader)
    state = json.loads(json.dumps(loader.state_dict()))
    want = [next(loader) for _ in range(4)]
    second, third = build(noises), build(noises)
    next(third)
    second.load_state_dict(state)
    third.load_state_dict(second.state_dict())
    assert equal(next(third), want[0])
    assert equal(next(third), want[1])
    third.load_state_dict(build(noises).state_dict())  # back to the very start
    assert equal(next(third), next(build(noises)))


def test_the_dataset_may_have_moved(noises: Dataset, tmp_path: Path) -> None:
    """A position belongs to the content of the shards, not to where they lie."""
    import shutil

    moved = tmp_path / "moved"
    shutil.copytree(noises.root, moved)
    loader = build(noises)
    next(loader)
    other = build(read_dataset(moved))
    other.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    assert equal(next(other), next(loader))


def test_a_position_of_another_stream_is_refused_naming_what_differs(noises: Dataset, tmp_path: Path) -> None:
    """Each argument that decides the stream, alone, and the loader stays usable."""
    loader = build(noises, 6, world_size=3, rank=1)
    next(loader)
    state = json.loads(json.dumps(loader.state_dict()))
    other = write(tmp_path / "set", [noise(i + 1) for i in range(NUM)])
    views = dataclasses.replace(TINY, flip_p=0.25)
    changes: dict[str, tuple[Any, list[str]]] = {
        "dataset": (other, [noises.fingerprint, other.fingerprint]),
        "batch_size": (3, ["6", "3"]),
        "views": (views, ["flip_p", "0.5", "0.25"]),
        "seed": (6, ["5", "6"]),
        "shuffle": (False, ["True", "False"]),
        "window": (2, ["5", "2"]),
        "lanes": (3, ["1", "3"]),
    }
    for name, (value, told) in changes.items():
        fresh = build(**{"dataset": noises, "batch_size": 6, "world_size": 3, "rank": 1, name: value})
        with pytest.raises(ValueError, match=f"{name}: ") as caught:
            fresh.load_state_dict(state)
        message = str(caught.value)
        assert all(each in message for each in told), message
        assert not [each for each in changes.keys() - {name} if f"{each}:" in message], message
        assert next(fresh).position == 0
    assert state == json.loads(json.dumps(state))  # and the caller's state is left as it was


def test_a_position_belongs_to_both_distributions_of_views(noises: Dataset) -> None:
    """With the same second distribution the stream goes on; with another, or none, it is refused by name."""
    second = dataclasses.replace(TINY, flip_p=0.25)
    loader = build(noises, second_views=second)
    next(loader)
    state = json.loads(json.dumps(loader.state_dict()))
    fresh = build(noises, second_views=second)
    fresh.load_state_dict(state)
    assert equal(next(fresh), next(loader))
    for other in (None, dataclasses.replace(TINY, flip_p=0.75)):
        with pytest.raises(ValueError, match="second_views: .*0.25.* saved"):
            build(noises, second_views=other).load_state_dict(state)


def test_threads_precision_and_folder_are_no_part_of_a_position(noises: Dataset) -> None:
    loader = build(noises)
    next(loader)
    other = build(noises, num_threads=2, half=True)
    other.load_state_dict(loader.state_dict())
    a, b = next(loader), next(other)
    assert labels(a) == labels(b)
    torch.testing.assert_close(a.views, b.views.float(), rtol=2**-11, atol=2**-24)


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch_size", "world_size", "names"),
    [
        (24, 1, ["23 samples", "24"]),
        (24, 4, ["23 samples", "24"]),
        (5, 2, ["5", "2 processes"]),
        (2, 3, ["2", "3 processes"]),
        (0, 1, ["0"]),
        (-4, 2, ["-4"]),
    ],
)
def test_batches_that_cannot_be_made_are_refused_before_anything_is_read(
    flats: Dataset, batch_size: int, world_size: int, names: list[str]
) -> None:
    for rank in range(world_size):
        with pytest.raises(ValueError, match="batch") as caught:
            build(flats, batch_size, rank=rank, world_size=world_size)
        assert all(name in str(caught.value) for name in names), caught.value


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_that_the_generators_cannot_take_is_refused_at_once(flats: Dataset, seed: int) -> None:
    with pytest.raises(ValueError, match=rf"seed.*{seed}"):
        build(flats, seed=seed)


@pytest.mark.parametrize(("rank", "world_size"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_outside_the_world_is_refused_at_once(flats: Dataset, rank: int, world_size: int) -> None:
    with pytest.raises(ValueError, match=rf"rank {rank} is none of {world_size} rank"):
        build(flats, rank=rank, world_size=world_size)


@pytest.mark.parametrize(("device", "number"), [("cpu", None), ("cuda", 3), ("cuda:0", 0), ("cuda:1", 1)])
def test_a_gpu_without_a_number_is_the_current_one(
    monkeypatch: pytest.MonkeyPatch, device: str, number: int | None
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert _device_id(torch.device(device)) == number


@pytest.mark.parametrize("load", [-0.1, 1.5])
def test_a_decoder_load_that_is_no_share_is_refused_at_once(flats: Dataset, load: float) -> None:
    with pytest.raises(ValueError, match=rf"hw_decoder_load {load} is not between 0 and 1"):
        build(flats, hw_decoder_load=load)


def zero_image(data: bytearray, members: dict[str, tuple[int, int]]) -> bytearray:
    offset, size = members["png"]
    data[offset : offset + size] = bytes(size)
    return data


def spoil_label(data: bytearray, members: dict[str, tuple[int, int]]) -> bytearray:
    data[members["cls"][0]] = ord("x")
    return data


def cut_off(data: bytearray, members: dict[str, tuple[int, int]]) -> bytearray:
    return data[: members["png"][0]]


DAMAGES = pytest.mark.parametrize("damage", [zero_image, spoil_label, cut_off])


@DAMAGES
@pytest.mark.parametrize("rank", [0, 1])
def test_a_shard_damaged_after_the_check_ends_in_one_message_naming_rank_batch_and_folder(
    tmp_path: Path, damage: Callable[..., bytearray], rank: int
) -> None:
    """Batches before the damage come; the damaged one, and every later one, raises LoaderError: no rank slips a batch.

    A caller that went on would train on other samples than the position says, and out of step with the other ranks.
    """
    data = write(tmp_path / "set", [noise(i) for i in range(16)], shard_size=4)
    order = stored(data)
    part = [order[4 * step + 2 * rank : 4 * step + 2 * rank + 2] for step in range(4)]
    path, members = position_of(data, part[2][1])  # in the third batch of this rank
    path.write_bytes(damage(bytearray(path.read_bytes()), members))
    loader = build(data, 4, rank=rank, world_size=2, shuffle=False)
    assert [labels(next(loader)) for _ in range(2)] == part[:2]
    for _ in range(3):
        with pytest.raises(LoaderError) as caught:
            next(loader)
        message = str(caught.value)
        sample = f"{8 + 2 * rank + (damage is not cut_off):08d}-{part[2][damage is not cut_off]}"
        names = (f"rank {rank}", "batch 2 of epoch 0", str(data.root), f"{path.name}:{sample}", "make_shards.py verify")
        assert all(name in message for name in names), message
        assert "graph.py" not in message  # what is wrong, not where our code met it
        assert message.count("\n") == 0
    assert loader.state_dict()["position"] == 8  # where a run can go on when the shard has been mended


@DAMAGES
def test_damaged_samples_are_replaced_up_to_a_number(tmp_path: Path, damage: Callable[..., bytearray]) -> None:
    """By the next sound one of the order, `Order.substitutes`; the views are those of the position, on any number of
    ranks; the same after a resume that knows nothing of the damage."""
    data = write(tmp_path / "set", [noise(i) for i in range(40)], shard_size=4)
    sound = ranks(data, 1, 8)
    keys, views = global_batches(sound, 10)
    order = Order([4] * 10, 8, seed=5)
    first = keys[2][2][3]  # replaced by the same place in the next batch, which is damaged too
    bad = [first, keys[3][2][3]]
    names = stored(data)
    places = [position_of(data, names[sample]) for sample in bad]
    for path, members in places if damage is not cut_off else places[:1]:
        path.write_bytes(damage(bytearray(path.read_bytes()), members))
    if damage is cut_off:  # the rest of its shard is gone as well, all but what lies before
        bad = list(range(first // 4 * 4, first // 4 * 4 + 4))
    expected = [
        [
            n if n not in bad else next(m for m in order.substitutes(epoch, at + i) if m not in bad)
            for i, n in enumerate(these)
        ]
        for epoch, at, these in keys
    ]
    for world_size in (1, 2):
        loaders = ranks(data, world_size, 8, skip_damaged=len(bad))
        found, made = global_batches(loaders, 10)
        assert [these for _, _, these in found] == expected
        for (_, _, old), (_, _, new), before, after in zip(keys, found, views, made, strict=True):
            same = torch.tensor([a == b for a, b in zip(old, new, strict=True)] * 2)
            assert torch.equal(before[same], after[same])
            assert bool(same.all()) == (old == new)
        met = set.union(*(set(loader.damaged) for loader in loaders))
        assert met == set(bad)
    state = sound[0].state_dict() | {"epoch": 0, "position": 32}
    resumed = build(data, 8, skip_damaged=len(bad))
    resumed.load_state_dict(state)
    assert [next(resumed).samples.tolist() for _ in range(6)] == expected[4:]
    with pytest.raises(ValueError, match="damaged samples have been replaced so far, more than --skip-damaged 0"):
        build(data, 8).load_state_dict(resumed.state_dict())
    with pytest.raises(LoaderError, match="--skip-damaged N, now"):
        global_batches(ranks(data, 1, 8, skip_damaged=len(bad) - 1), 10)


READ_TO_THE_END = """
import sys
import torch
from pipeline.loader import Loader, LoaderError, build_eval_loader
from pipeline.shards import read_dataset
from pipeline.views import make_views

data, views, device = read_dataset(sys.argv[1]), make_views("cifar", {"size": 8}), torch.device("cpu")
for batch_size, threads in [(64, 1), (192, 2)]:
    loader = Loader(data, views, batch_size, device, num_threads=threads)
    batches = build_eval_loader(data, views, batch_size, device, num_threads=threads)
    for read in (lambda: [next(loader) for _ in range(192 // batch_size)], lambda: list(batches)):
        try:
            read()
        except LoaderError as error:
            print(error)
"""


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_a_damaged_header_in_a_large_batch_is_an_error_naming_the_sample_and_no_crash(
    tmp_path: Path, format: str
) -> None:
    """DALI 2.4 by itself crashes in such a batch, so this reads in another process: training and evaluating, twice.

    The image is the last of the shards, and so of its batch in evaluation: there the crash was surest.
    """
    data = write(tmp_path / "set", [noise(i, format) for i in range(192)], shard_size=48)
    extension, label = {"PNG": "png", "JPEG": "jpg"}[format], stored(data)[-1]
    path, members = position_of(data, label)
    offset, _ = members[extension]
    shard = bytearray(path.read_bytes())
    shard[offset : offset + 64] = bytes(64)
    path.write_bytes(shard)
    done = subprocess.run([sys.executable, "-c", READ_TO_THE_END, data.root], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    named = f"{path.name}:00000191-{label} does not"
    assert [named in line for line in done.stdout.splitlines()] == [True] * 4, done.stdout


def test_an_image_with_more_pixels_than_the_manifest_allows_is_not_decoded(tmp_path: Path) -> None:
    """As a bomb in shards written with --no-verify would be, or a damaged header: exactly the limit still passes."""
    data = write(tmp_path / "set", [noise(i) for i in range(8)])  # 24 x 20
    for limit, refused in ((480, False), (479, True)):
        limited = dataclasses.replace(data, options={**data.options, "max_pixels": limit})
        for read in (lambda: next(build(limited, 8)), lambda: list(build_eval_loader(limited, TINY, 8, CPU))):  # noqa: B023
            with pytest.raises(LoaderError, match="20x24 pixels, more than 479") if refused else nullcontext():
                read()


@pytest.mark.parametrize("failure", [RuntimeError, ValueError])
def test_a_failure_that_is_not_the_shards_is_not_blamed_on_them(
    flats: Dataset, monkeypatch: pytest.MonkeyPatch, failure: type[Exception]
) -> None:
    """The message has the cause, and sends nobody to copy or verify shards that are sound."""

    def fail(*_: object) -> None:
        raise failure("out of memory")

    monkeypatch.setattr(Loader, "_draw", fail)
    with pytest.raises(LoaderError, match="rank 0 could not read batch 0 of epoch 0 of .*: out of memory$"):
        next(build(flats))


def test_a_missing_shard_ends_in_one_message_naming_it(tmp_path: Path) -> None:
    data = write(tmp_path / "set", [noise(i) for i in range(16)], shard_size=4)
    Path(data.tars[2]).unlink()
    loader = build(data)
    for _ in range(2):
        with pytest.raises(LoaderError, match=f"{Path(data.tars[2]).name}:.*make_shards.py verify"):
            list(loader)


@DAMAGES
def test_a_damaged_shard_ends_evaluation_with_the_same_message(
    tmp_path: Path, damage: Callable[..., bytearray]
) -> None:
    data = write(tmp_path / "set", [noise(i) for i in range(16)], shard_size=4)
    part = stored(data)[8:]
    path, members = position_of(data, part[5])
    path.write_bytes(damage(bytearray(path.read_bytes()), members))
    batches = build_eval_loader(data, TINY, 3, CPU, rank=1, world_size=2, num_threads=1)
    assert next(batches)[1].tolist() == part[:3]
    with pytest.raises(LoaderError, match="rank 1 could not read batch 1") as caught:
        list(batches)
    assert str(data.root) in str(caught.value)


# ---- evaluation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 23, 100])
def test_evaluation_gives_every_sample_exactly_once_in_order(flats: Dataset, world_size: int, batch_size: int) -> None:
    """Ranks one after the other give the order of the shards; only a rank's last batch is short."""
    found: list[int] = []
    for rank in range(world_size):
        part = NUM * (rank + 1) // world_size - NUM * rank // world_size
        sizes = []
        for images, digits in build_eval_loader(
            flats, FLAT, batch_size, CPU, rank=rank, world_size=world_size, num_threads=1
        ):
            assert images.shape == (len(digits), 3, 8, 8)
            assert images.is_contiguous(memory_format=torch.channels_last)
            assert images.dtype == torch.float32
            want = torch.tensor([colour(label) for label in digits.tolist()], dtype=torch.float32)
            assert (images - want[:, :, None, None]).abs().max() <= 1e-4
            sizes.append(len(digits))
            found += digits.tolist()
        assert sizes == [batch_size] * (part // batch_size) + [part % batch_size] * (part % batch_size > 0)
    assert found == stored(flats)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("samples", [1, 4, 10, 23, 50])
def test_evaluation_can_stop_after_some_samples(flats: Dataset, world_size: int, samples: int) -> None:
    """All ranks together give that many, or all there are, spread evenly: shards of others may be sorted by class."""
    found: list[int] = []
    for rank in range(world_size):
        for _, digits in build_eval_loader(
            flats, FLAT, 4, CPU, rank=rank, world_size=world_size, num_threads=1, samples=samples
        ):
            found += digits.tolist()
    num = min(samples, NUM)
    assert found == [stored(flats)[i * NUM // num] for i in range(num)]


def test_evaluation_batches_keep_their_content(noises: Dataset) -> None:
    """The last batches do not overwrite the first: collected all at once they equal one batch of everything."""
    parts = list(build_eval_loader(noises, TINY, 3, CPU, num_threads=1))
    (whole, digits), *rest = build_eval_loader(noises, TINY, NUM, CPU, num_threads=1)
    assert not rest
    assert torch.equal(torch.cat([images for images, _ in parts]), whole)
    assert torch.equal(torch.cat([labels for _, labels in parts]), digits)


@pytest.mark.parametrize("world_size", [2, 4, 5])
def test_ranks_without_samples_evaluate_nothing(tmp_path: Path, world_size: int) -> None:
    """Fewer samples than ranks: still each exactly once, and the other ranks end at once."""
    data = write(tmp_path / "set", [flat(i) for i in range(2)])
    found: list[int] = []
    for rank in range(world_size):
        for _, digits in build_eval_loader(data, FLAT, 4, CPU, rank=rank, world_size=world_size, num_threads=1):
            found += digits.tolist()
    assert found == stored(data)


def test_evaluation_without_labels(tmp_path: Path) -> None:
    """Labels of -1 that nothing can take for a class; the images are those of the labelled set."""
    images = [noise(i) for i in range(5)]
    data = write(tmp_path / "bare", images, labelled=False)
    twin = write(tmp_path / "labelled", images)
    for (bare, none), (full, digits) in zip(
        *(build_eval_loader(each, TINY, 2, CPU, num_threads=1) for each in (data, twin)), strict=True
    ):
        assert torch.equal(bare, full)
        assert none.tolist() == [-1] * len(digits)


def test_evaluation_images_equal_torchvisions_resize_and_centre_crop(tmp_path: Path) -> None:
    """Normalised, to one grey level (both round once or twice), away from the edge; the reader's way included.

    512 x 640 at 1/4: no side is rounded. At the edge torchvision's kernel sees nothing and DALI's the edge pixel.
    """
    from torchvision.transforms import v2

    views = make_views("imagenet", {"size": 112})
    y, x = np.mgrid[:512, :640]
    waves = [127 + 120 * np.sin(x / (7 + i) + c) * np.cos(y / (9 + c)) for i in range(3) for c in range(3)]
    pictures = [np.stack(waves[3 * i : 3 * i + 3], 2).astype(np.uint8) for i in range(3)]
    data = write(tmp_path / "set", [encode(picture) for picture in pictures])
    theirs = v2.Compose(
        [v2.Resize(128), v2.CenterCrop(112), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
        + [v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    )
    level = 1 / 255 / 0.224
    for image, label in zip(*next(iter(build_eval_loader(data, views, 3, CPU, num_threads=1))), strict=True):
        want = theirs(Image.fromarray(pictures[int(label)]))
        assert (image - want).abs().max() <= 1.01 * level


# ---- the end of a loader -------------------------------------------------------------------------------------------


def dali_threads() -> int:
    num = 0
    for comm in Path("/proc/self/task").glob("*/comm"):
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that ends meanwhile
            num += comm.read_text().startswith("[DALI]")
    return num


def all_dali_threads_end() -> bool:
    """Within 20 s, for a batch that is being made."""
    end = time.monotonic() + 20
    while dali_threads() and time.monotonic() < end:
        time.sleep(0.01)
    return not dali_threads()


def test_a_loader_that_is_let_go_ends_its_threads(flats: Dataset) -> None:
    """Its buffers, which on a GPU are gigabytes, do not wait for a garbage collection."""
    gc.collect()  # of what other tests have left
    assert all_dali_threads_end()
    gc.disable()
    try:
        loader = Loader(flats, TINY, 4, CPU, num_threads=3)
        next(loader)
        assert dali_threads() >= 3
        del loader
        assert all_dali_threads_end()
    finally:
        gc.enable()


def test_a_loader_that_is_let_go_reads_no_further(flats: Dataset) -> None:
    """Without waiting for cycles to be collected; so does an evaluation that is left early."""

    def reading() -> int:
        return sum(thread.name.startswith("ahead") for thread in threading.enumerate())

    def ended(before: int) -> bool:
        end = time.monotonic() + 10
        while reading() > before and time.monotonic() < end:
            time.sleep(0.01)
        return reading() <= before

    gc.collect()
    before = reading()
    gc.disable()
    try:
        loader = build(flats)
        next(loader)
        loader.load_state_dict(loader.state_dict())
        next(loader)
        assert ended(before + 1)
        del loader
        assert ended(before)
        batches = build_eval_loader(flats, TINY, 4, CPU, num_threads=1)
        next(batches)
        del batches
        assert ended(before)
        files = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            list(build_eval_loader(flats, TINY, 4, CPU, num_threads=1))
        assert len(os.listdir("/proc/self/fd")) <= files
    finally:
        gc.enable()


def test_a_forked_child_leaves_its_parents_loaders_alone(flats: Dataset) -> None:
    """A DataLoader's worker that collected one, which is garbage, would join threads that it has not, and crash."""
    loader = Loader(flats, TINY, 4, CPU, num_threads=3)
    next(loader)
    loader.itself = loader  # type: ignore[attr-defined]
    gc.disable()
    try:
        del loader
        child = os.fork()
        if child == 0:
            signal.alarm(20)  # ends it where it waits
            gc.collect()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        gc.enable()


# ---- on a GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.slow
def test_gpu_memory_does_not_grow(tmp_path: Path) -> None:
    """JPEGs of many sizes, shuffled: after 500 steps all buffers have found their size, and 1,500 more add nothing."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    rng = np.random.default_rng(0)
    sizes = rng.integers(40, 500, (512, 2))
    images = [encode(rng.integers(0, 256, (height, width, 3)), "JPEG") for height, width in sizes]
    loader = Loader(write(tmp_path / "set", images, shard_size=64), VIEWS["stl10"], 64, torch.device("cuda", 0))
    used = []
    for step in range(2000):
        next(loader)
        if step in (499, 1999):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            free, total = torch.cuda.mem_get_info()
            used.append((total - free) / 2**20)
    assert used[1] - used[0] <= 64, f"{used[0]:.0f} MiB after 500 steps, {used[1]:.0f} MiB after 2000"


@pytest.mark.gpu
def test_a_gpus_waiting_is_that_of_its_stream(flats: Dataset) -> None:
    """A loader far ahead of a busy GPU is not waited for, however long the host is; one that is asked at once, is."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    loader = Loader(flats, FLAT, 4, torch.device("cuda", 0))
    next(loader)
    torch.cuda.synchronize()
    loader.take_wait_s()
    start = time.perf_counter()
    for _ in range(3):
        torch.cuda._sleep(10**9)  # cycles: half a second
        next(loader)
    torch.cuda.synchronize()
    assert loader.take_wait_s() < 0.1 * (time.perf_counter() - start)
    start = time.perf_counter()
    for _ in range(20):
        next(loader)
    torch.cuda.synchronize()
    assert loader.take_wait_s() > 0.3 * (time.perf_counter() - start)


def test_a_batch_that_does_not_come_is_named(flats: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """By rank, batch and shard, in training and evaluation; the process then ends without its threads."""
    go_on, ends, real = threading.Event(), [], os.preadv

    def stuck(number: int, rows: Any, place: int) -> int:
        if os.readlink(f"/proc/self/fd/{number}").endswith("000003.tar"):
            go_on.wait(60)
        return real(number, rows, place)

    monkeypatch.setattr("pipeline.reader.os.preadv", stuck)
    monkeypatch.setattr("pipeline.loader.threading._register_atexit", ends.append)
    monkeypatch.setattr("pipeline.loader.TIMEOUT_S", 1.0)
    said = f"s, reading {flats.tars[3]}. See whether that disk"
    try:
        with pytest.raises(LoaderError, match=f"rank 0 could not read batch [01] of .*: nothing has come for 1 {said}"):
            list(build_eval_loader(flats, TINY, 8, CPU))
        loader = build(flats, 8, rank=1, world_size=2, shuffle=False, timeout_s=5.0)
        with pytest.raises(LoaderError, match=f"rank 1 could not read batch 0 of epoch 0 .* come for 5 {said}"):
            next(loader)
    finally:
        go_on.set()
    assert len(ends) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("half", [False, True])
def test_no_batch_makes_the_whole_gpu_wait(flats: Dataset, half: bool) -> None:
    """In twenty batches hardly a call waits for all streams of the GPU: what ends the profile does, and no batch."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    loader = Loader(flats, FLAT, 4, torch.device("cuda", 0), half=half)
    for _ in range(10):
        next(loader)
    torch.cuda.synchronize()
    with torch.profiler.profile() as seen:
        for _ in range(20):
            next(loader)
    waits = [event.name for event in seen.events() if "DeviceSynchronize" in event.name]
    assert len(waits) < 5, waits
