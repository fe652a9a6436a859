"""The embedded demo data: ten kinds of drawn pattern, 32 x 32 pixels, made from a seed in seconds.

It is synthetic, not photographs, and drawn to be learnt in minutes on a CPU: the class is what all crops of an image
share, while colours, polarity, period, phase, slant and noise vary from image to image and tell nothing about it. A
rise of accuracy shows that the whole path works, not how good the method is: kNN on the bare pixels already gets more
than half of the test images right.
"""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SIZE = 32
Field = NDArray[np.floating[Any]]
Samples = list[tuple[bytes, int]]


def _saw(x: Field) -> Field:
    """A triangle wave of period 1: 1 where x is whole, 0 half way between."""
    return 2 * np.abs(x % 1 - 0.5)


# Each pattern maps coordinates in periods to a signed height: the front colour shows where it is positive.
PATTERNS: dict[str, Callable[[Field, Field], Field]] = {
    "bricks": lambda x, y: np.minimum(_saw(y) - 0.25, _saw(0.5 * x + 0.5 * (np.floor(y) % 2)) - 0.15),
    "checks": lambda x, y: np.sin(np.pi * x) * np.sin(np.pi * y),
    "columns": lambda x, _: _saw(x) - 0.5,
    "crosses": lambda x, y: np.minimum(0.3 - np.minimum(_saw(x), _saw(y)), 0.75 - np.maximum(_saw(x), _saw(y))),
    "diagonals": lambda x, y: _saw(0.7 * (x + y)) - 0.5,
    "dots": lambda x, y: 0.62 - np.hypot(_saw(x), _saw(y)),
    "grid": lambda x, y: 0.3 - np.minimum(_saw(x), _saw(y)),
    "rings": lambda x, y: 0.25 - np.abs(np.hypot(_saw(0.8 * x), _saw(0.8 * y)) - 0.7),
    "rows": lambda _, y: _saw(y) - 0.5,
    "zigzags": lambda x, y: _saw(y + 0.9 * _saw(0.7 * x)) - 0.5,
}
CLASSES = tuple(PATTERNS)
_Y, _X = np.mgrid[:SIZE, :SIZE].astype(np.float32)


def draw_image(label: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """One (32, 32, 3) image of class `label`: light on dark or dark on light."""
    slant, period = rng.uniform(-0.2, 0.2), rng.uniform(6, 10)  # radians, pixels
    cos, sin = np.float32(np.cos(slant) / period), np.float32(np.sin(slant) / period)
    phase_x, phase_y = 2 * rng.random(2, np.float32)
    height = PATTERNS[CLASSES[label]](cos * _X + sin * _Y + phase_x, cos * _Y - sin * _X + phase_y)
    cover = np.clip(0.5 + height / 0.3, 0, 1)[..., None]  # edges about a pixel soft
    back, front = 0.55 * rng.random(3, np.float32), 1 - 0.55 * rng.random(3, np.float32)
    noise = 0.03 * rng.standard_normal((SIZE, SIZE, 3), np.float32)
    if rng.random() < 0.5:
        back, front = front, back
    image: Field = back + cover * (front - back) + noise
    return (255 * np.clip(image, 0, 1)).astype(np.uint8)


def splits(train: int = 2560, test: int = 1000, seed: int = 0) -> Iterator[tuple[str, Samples]]:
    """("train", samples) and ("test", samples): balanced classes, losslessly encoded as (PNG bytes, label)."""
    from PIL import Image

    for split, (name, count) in enumerate((("train", train), ("test", test))):
        rng = np.random.default_rng([seed, split])
        samples = []
        for i in range(count):
            label, file = i % len(CLASSES), io.BytesIO()
            Image.fromarray(draw_image(label, rng)).save(file, "PNG", compress_level=1)
            samples.append((file.getvalue(), label))
        yield name, samples


def write_demo(out: str | Path, **options: Any) -> None:
    """Write the demo's two data sets, out/train and out/test, both or neither; options as for `write_shards`."""
    from pipeline.shards import Sample
    from pipeline.write import publish, write_shards

    with publish(out) as folder:
        for name, images in splits():
            samples = [Sample(f"{name}-{i}", label, png) for i, (png, label) in enumerate(images)]
            write_shards(samples, folder / name, classes=CLASSES, name=name, **options)
