"""The embedded demo data: ten kinds of drawn texture, 32 x 32 pixels, made from a seed in seconds.

It is synthetic, not photographs: it shows that the whole path works and that training helps, not how good the method
is. Each class is a pattern (stripes, checks, rings, ...); colours, contrast, scale, phase, angle and noise vary from
image to image and tell nothing about the class. An encoder that has not learnt to look past them does badly.
"""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SIZE = 32
Field = NDArray[np.float64]
Samples = list[tuple[bytes, int]]


def _wave(x: Field) -> Field:
    return 0.5 + 0.5 * np.tanh(3 * np.sin(2 * np.pi * x))


# Each pattern maps coordinates (in periods) to a mask in [0, 1].
PATTERNS: dict[str, Callable[[Field, Field], Field]] = {
    "bricks": lambda x, y: np.maximum(_wave(2 * y) > 0.85, _wave(x + 0.5 * (np.floor(2 * y) % 2)) > 0.9).astype(float),
    "checks": lambda x, y: np.abs(_wave(x) - _wave(y)),
    "crosses": lambda x, y: (
        ((np.abs(x % 1 - 0.5) < 0.12) | (np.abs(y % 1 - 0.5) < 0.12)).astype(float)
        * (np.maximum(np.abs(x % 1 - 0.5), np.abs(y % 1 - 0.5)) < 0.35)
    ),
    "diamonds": lambda x, y: (np.abs(x % 1 - 0.5) + np.abs(y % 1 - 0.5) < 0.32).astype(float),
    "dots": lambda x, y: (np.hypot(x % 1 - 0.5, y % 1 - 0.5) < 0.28).astype(float),
    "grid": lambda x, y: ((x % 1 < 0.2) | (y % 1 < 0.2)).astype(float),
    "rings": lambda x, y: (np.abs(np.hypot(x % 1 - 0.5, y % 1 - 0.5) - 0.3) < 0.09).astype(float),
    "stripes": lambda x, y: _wave(x + 0 * y),
    "waves": lambda x, y: _wave(x + 0.35 * np.sin(2 * np.pi * y)),
    "zigzag": lambda x, y: _wave(x + 1.2 * np.abs(y % 1 - 0.5)),
}
CLASSES = tuple(PATTERNS)


def draw_image(label: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """One (32, 32, 3) image of class `label`."""
    period, angle = rng.uniform(8, 10), rng.uniform(-0.15, 0.15)
    phase_x, phase_y = rng.random(2)
    y, x = np.mgrid[:SIZE, :SIZE] / period
    mask = PATTERNS[CLASSES[label]](
        np.cos(angle) * x + np.sin(angle) * y + phase_x, np.cos(angle) * y - np.sin(angle) * x + phase_y
    )
    if rng.random() < 0.5:
        mask = 1 - mask
    back, front = rng.random((2, 3))
    while np.abs(back - front).max() < 0.35:
        front = rng.random(3)
    image = back + mask[..., None] * (front - back) + rng.normal(0, 0.03, (SIZE, SIZE, 3))
    return (255 * image.clip(0, 1)).astype(np.uint8)


def splits(train: int = 4000, test: int = 1000, seed: int = 0) -> Iterator[tuple[str, Samples]]:
    """("train", samples) and ("test", samples): balanced classes, losslessly encoded as (PNG bytes, label)."""
    from PIL import Image

    for split, (name, count) in enumerate((("train", train), ("test", test))):
        rng = np.random.default_rng([seed, split])
        samples = []
        for i in range(count):
            file = io.BytesIO()
            Image.fromarray(draw_image(i % len(CLASSES), rng)).save(file, "PNG")
            samples.append((file.getvalue(), i % len(CLASSES)))
        yield name, samples


def write_demo(out: str | Path, **options: Any) -> None:
    """Write the demo's two data sets, out/train and out/test, both or neither; options as for `write_shards`."""
    from pipeline.shards import Sample, publish, write_shards

    with publish(out) as folder:
        for name, images in splits():
            samples = [Sample(f"{name}-{i}", label, png) for i, (png, label) in enumerate(images)]
            write_shards(samples, folder / name, classes=CLASSES, name=name, **options)
