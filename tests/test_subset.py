"""A subset is exactly the samples chosen: by share of each class, or by the names in a list."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.index import index_tars
from pipeline.labels import labels
from pipeline.loader import Loader, build_eval_loader
from pipeline.shards import DatasetError, Sample
from pipeline.subset import keys, named, stratified, subset
from pipeline.views import make_views
from pipeline.write import write_shards
from tests.test_sources import make_tar

COUNTS = (40, 15, 4)  # samples of each class
VIEWS = make_views("cifar", {"size": 8, "mean": [0, 0, 0], "std": [1, 1, 1]})


def flat(label: int, i: int) -> bytes:
    """A PNG of one colour, which tells the sample: red is the label, green its number."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (label, i, 7)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory):
    """59 samples in seven shards, named as ImageNet's files are."""
    samples = [
        Sample(f"c{label}/n{label}_{i}.JPEG", label, flat(label, i)) for label, n in enumerate(COUNTS) for i in range(n)
    ]
    out = tmp_path_factory.mktemp("subset") / "data"
    return write_shards(samples, out, classes=["a", "b", "c"], name="train", shard_size=9)


def colours(loader) -> list[tuple[int, int]]:
    """(label by colour, number) of every image of an evaluation loader, which must bear out its label."""
    found = []
    for images, told in loader:
        pixels = (255 * images[:, :, 0, 0]).round().int()
        assert torch.equal(pixels[:, 0], told.int())
        found += [(int(red), int(green)) for red, green, _ in pixels]
    return found


def test_keys_and_labels_are_those_of_the_loader(dataset) -> None:
    """Read from the indexes and tars alone, they stand in the loader's order."""
    seen = colours(build_eval_loader(dataset, VIEWS, 16, torch.device("cpu")))
    assert [key.split("-")[1] for key in keys(dataset)] == [f"n{label}_{i}" for label, i in seen]
    assert labels(dataset).tolist() == [label for label, _ in seen]


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 1.0])
def test_a_share_is_taken_of_every_class(share: float) -> None:
    """Rounded, at least one, by seed; a larger share holds the smaller."""
    truth = np.random.default_rng(0).permutation(np.repeat(range(3), COUNTS))
    chosen = stratified(truth, share, seed=1)
    assert np.bincount(truth[chosen]).tolist() == [max(1, round(share * count)) for count in COUNTS]
    assert (np.diff(chosen) > 0).all()
    assert set(chosen) >= set(stratified(truth, share / 2, seed=1))
    np.testing.assert_array_equal(chosen, stratified(truth, share, seed=1))
    if share < 1:
        assert chosen.tolist() != stratified(truth, share, seed=2).tolist()


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1])
def test_a_share_outside_its_range_is_refused(share: float) -> None:
    """0 % would learn from nothing, 110 % does not exist."""
    with pytest.raises(ValueError, match="above 0 and up to 1"):
        stratified(np.zeros(5, np.int64), share, seed=0)


@pytest.mark.parametrize("ranks", [1, 2])
def test_loaders_read_the_subset_and_nothing_else(dataset, ranks: int) -> None:
    """Every chosen sample once an epoch, in evaluation and in training, on one rank and on two; nothing is written."""
    chosen = stratified(labels(dataset), 0.4, seed=3)
    before = sorted(dataset.root.iterdir())
    part = subset(dataset, chosen)
    assert (part.samples, part.tars) == (len(chosen), dataset.tars[: len(part.shards)])
    assert part.fingerprint != dataset.fingerprint
    assert sorted(dataset.root.iterdir()) == before
    everything = colours(build_eval_loader(dataset, VIEWS, 16, torch.device("cpu")))
    expected = [everything[i] for i in chosen]
    seen = [
        each
        for rank in range(ranks)
        for each in colours(build_eval_loader(part, VIEWS, 4, torch.device("cpu"), rank=rank, world_size=ranks))
    ]
    assert seen == expected
    views = make_views(VIEWS, {"jitter_p": 0, "grayscale_p": 0})
    trained = []
    for rank in range(ranks):
        loader = Loader(part, views, 2 * ranks, torch.device("cpu"), rank=rank, world_size=ranks)
        for _ in range(loader.steps_per_epoch):
            batch = next(loader)
            pixels = (255 * batch.views[:2, :, 0, 0]).round().int()
            assert torch.equal(pixels[:, 0], batch.labels.int())
            trained += [(int(red), int(green)) for red, green, _ in pixels]
    assert len(set(trained)) == len(trained) == len(chosen) // (2 * ranks) * 2 * ranks
    assert set(trained) <= set(expected)


def test_a_shard_of_which_nothing_is_left_is_left_out(dataset) -> None:
    """One sample of the last shard: one shard remains, and gives that sample."""
    part = subset(dataset, [dataset.samples - 1])
    assert [shard.file for shard in part.shards] == [dataset.shards[-1].file]
    everything = colours(build_eval_loader(dataset, VIEWS, 16, torch.device("cpu")))
    assert colours(build_eval_loader(part, VIEWS, 4, torch.device("cpu"))) == everything[-1:]


@pytest.fixture
def nested(tmp_path: Path):
    """Three tars of one name in nested folders, indexed in place: image, then something else, then label in blanks."""
    for place, number in (("b", 5), ("a/deep", 7), ("c d", 4)):
        (tmp_path / "tars" / place).mkdir(parents=True)
        entries = []
        for i in range(number):
            label = b" %d\n" % (i % 3)
            entries += [(f"x.y/k{i}.left.png", flat(i % 3, 10 * number + i)), (f"x.y/k{i}.json", b"{}" * 300 * i)]
            entries += [(f"x.y/k{i}.cls", label)]
        make_tar(tmp_path / "tars" / place / "000.tar", entries)
    return index_tars([tmp_path / "tars/**/*.tar"], tmp_path / "set")


def test_a_subset_of_tars_indexed_where_they_lie_gives_what_was_chosen(nested) -> None:
    """By key, label, evaluation and training; a part of the part too; nothing is written."""
    before = sorted(nested.root.rglob("*"))
    everything = colours(build_eval_loader(nested, VIEWS, 16, torch.device("cpu")))
    assert len(set(everything)) == nested.samples == 16
    chosen = np.array([0, 3, 6, 7, 8, 11, 13])
    part = subset(nested, chosen[::-1])
    assert [shard.file for shard in part.shards] == ["a/deep/000.tar", "b/000.tar", "c d/000.tar"]
    inner = subset(part, [1, 2, 3])
    assert inner.tars == nested.tars[:2]
    for data, numbers in ((part, chosen), (inner, chosen[1:4])):
        assert keys(data) == [keys(nested)[i] for i in numbers]
        assert labels(data).tolist() == [everything[i][0] for i in numbers]
        assert colours(build_eval_loader(data, VIEWS, 3, torch.device("cpu"))) == [everything[i] for i in numbers]
        loader = Loader(data, make_views(VIEWS, {"jitter_p": 0, "grayscale_p": 0}), len(numbers), torch.device("cpu"))
        for _ in range(2):
            batch = next(loader)
            pixels = (255 * batch.views[: len(numbers), :, 0, 0]).round().int()
            trained = [(int(red), int(green)) for red, green, _ in pixels]
            assert sorted(trained) == sorted(everything[i] for i in numbers)
            assert batch.labels.tolist() == [label for label, _ in trained]
    assert len({data.fingerprint for data in (nested, part, inner)}) == 3
    assert sorted(nested.root.rglob("*")) == before


def test_a_list_of_names_is_found(dataset) -> None:
    """File names as in the authors' lists, bare stems, whole keys, in any order, once each."""
    all_keys = keys(dataset)
    chosen = named(dataset, ["n1_3.JPEG", "some/folder/n0_39.JPEG", "", "n2_0", all_keys[5], " n1_3.JPEG"])
    stems = {all_keys[i].split("-")[1] for i in chosen}
    assert stems == {"n1_3", "n0_39", "n2_0", all_keys[5].split("-")[1]}
    assert (np.diff(chosen) > 0).all()


def test_names_that_are_missing_or_ambiguous_are_refused(dataset, tmp_path: Path) -> None:
    """Named, with their number: a list that fits another data set must not train on what happens to match."""
    with pytest.raises(DatasetError, match=r"2 of 3 names are not in .*: n9_9.JPEG, n8_8.JPEG"):
        named(dataset, ["n1_3.JPEG", "n9_9.JPEG", "n8_8.JPEG"])
    with pytest.raises(DatasetError, match="list of names is empty"):
        named(dataset, ["", "  "])
    twice = [Sample(f"{folder}/0001.png", i, flat(i, 1)) for i, folder in enumerate("ab")]
    with pytest.raises(DatasetError, match="0001.png fits several samples"):
        named(write_shards(twice, tmp_path / "twice", classes=["a", "b"]), ["0001.png"])


def test_labels_of_unlabelled_shards_are_refused(tmp_path: Path) -> None:
    """There is nothing to stratify by."""
    samples = [Sample(f"{i}.png", None, flat(0, i)) for i in range(3)]
    with pytest.raises(DatasetError, match="has no labels"):
        labels(write_shards(samples, tmp_path / "plain", classes=None))
