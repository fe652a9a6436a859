"""The demo data is the same for everyone, balanced, free of leaks from train to test, and really images."""

import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from pipeline.demo import CLASSES, PATTERNS, SIZE, draw_image, splits


def test_bytes_depend_on_the_seed_alone() -> None:
    small = dict(splits(train=20, test=10, seed=3))
    assert list(small) == ["train", "test"]
    assert small == dict(splits(train=20, test=10, seed=3))
    longer = dict(splits(train=40, test=20, seed=3))
    assert all(longer[name][: len(samples)] == samples for name, samples in small.items())
    other = dict(splits(train=20, test=10, seed=4))
    assert not {image for image, _ in small["train"]} & {image for image, _ in other["train"]}


def test_labels_are_balanced_and_no_image_appears_twice() -> None:
    made = dict(splits(train=200, test=100))
    for name, count in (("train", 20), ("test", 10)):
        assert Counter(label for _, label in made[name]) == dict.fromkeys(range(len(CLASSES)), count)
    assert len({image for samples in made.values() for image, _ in samples}) == 300


def test_images_are_small_rgb_pngs() -> None:
    for encoded, _ in dict(splits(train=20, test=0))["train"]:
        with Image.open(io.BytesIO(encoded)) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (SIZE, SIZE))
            image.load()


@pytest.mark.parametrize("label", range(len(CLASSES)), ids=CLASSES)
def test_each_pattern_shows_both_of_its_colours(label: int) -> None:
    """A pattern that came out flat would be a class that cannot be learnt."""
    y, x = np.mgrid[:400, :400].astype(np.float32) / 100
    assert 0.1 < (PATTERNS[CLASSES[label]](x, y) > 0).mean() < 0.9
    image = draw_image(label, np.random.default_rng(0))
    assert image.dtype == np.uint8
    assert image.mean(2).std() > 10
