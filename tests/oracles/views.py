"""One view of one image in float64, one step at a time, from the definitions.

Crops follow torchvision's RandomResizedCrop: the first candidate that fits, else the largest central crop of a legal
ratio. Resizing is the antialiased interpolation of Pillow and torchvision. Brightness, contrast and saturation blend
with black, the mean grey and the grey image (torchvision's blends), hue turns the chroma in the YIQ plane; here they
are applied one by one, in a given order, without clipping in between. The blur is a normalised Gaussian of `window`
taps, mirrored at the border without repeating the edge. Images are (H, W, 3).
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LUMA = np.array([0.299, 0.587, 0.114])
YIQ = np.array([LUMA, [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
ORDERS = tuple(itertools.permutations(("brightness", "contrast", "saturation", "hue")))


def crop(
    height: int, width: int, candidates: Sequence[tuple[float, float]], offset: Array, ratio: tuple[float, float]
) -> tuple[float, float, float, float]:
    """(top, left, height, width) in pixels of the first (height, width) candidate that fits, else of the fallback.

    offset (y, x) in [0, 1) places a candidate within the free space; the fallback is central.
    """
    for h, w in candidates:
        if h <= height and w <= width:
            return (height - h) * offset[0], (width - w) * offset[1], h, w
    h, w = float(height), float(width)
    if width / height < ratio[0]:
        h = width / ratio[0]
    elif width / height > ratio[1]:
        w = height * ratio[1]
    return (height - h) / 2, (width - w) / 2, h, w


def triangle(x: Array) -> Array:
    return np.maximum(1 - np.abs(x), 0)


def keys_cubic(x: Array) -> Array:
    """Keys' kernel with a = -0.5, 2 pixels each way."""
    x = np.abs(x)
    return np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))


def resize(
    image: Array, box: tuple[float, float, float, float], size: tuple[int, int], kernel: str = "linear"
) -> Array:
    """The (top, left, height, width) part of `image` as `size` pixels; the kernel widens when that shrinks it.

    The kernel sees the pixels beside the box. Beyond the image it sees the nearest edge pixel, as DALI does; Pillow and
    torchvision leave those out and renormalise, which differs where the kernel, when shrinking, reaches over the edge.
    """
    for axis in (0, 1):
        start, extent, count = box[axis], box[axis + 2], size[axis]
        step = extent / count
        centre = start + (np.arange(count) + 0.5) * step
        beyond = 2 + int(2 * max(step, 1))
        pixel = np.arange(-beyond, image.shape[axis] + beyond)
        weight = {"linear": triangle, "cubic": keys_cubic}[kernel]((pixel + 0.5 - centre[:, None]) / max(step, 1))
        weight /= weight.sum(1, keepdims=True)
        extended = np.take(image, pixel.clip(0, image.shape[axis] - 1), axis)
        image = np.moveaxis(np.tensordot(weight, extended, (1, axis)), 0, axis)
    return image


def brightness(x: Array, factor: float) -> Array:
    return factor * x


def contrast(x: Array, factor: float) -> Array:
    return factor * x + (1 - factor) * (x @ LUMA).mean()


def saturation(x: Array, factor: float) -> Array:
    return factor * x + (1 - factor) * (x @ LUMA)[..., None]


def hue(x: Array, angle: float) -> Array:
    """The chroma (I, Q) of every pixel, as a complex number, turned by `angle` radians."""
    y, i, q = np.moveaxis(x @ YIQ.T, -1, 0)
    turned = (i + 1j * q) * np.exp(1j * angle)
    return np.stack([y, turned.real, turned.imag], -1) @ np.linalg.inv(YIQ).T


def grayscale(x: Array) -> Array:
    return np.repeat((x @ LUMA)[..., None], 3, -1)


OPERATIONS: dict[str, Callable[[Array, float], Array]] = {
    "brightness": brightness,
    "contrast": contrast,
    "saturation": saturation,
    "hue": hue,
}


def jitter(x: Array, factors: dict[str, float], order: Sequence[str], gray: bool = False) -> Array:
    for name in order:
        x = OPERATIONS[name](x, factors[name])
    return grayscale(x) if gray else x


def blur(image: Array, sigma: float, window: int) -> Array:
    radius = window // 2
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    taps /= taps.sum()
    padded = np.pad(image, ((radius, radius), (radius, radius), (0, 0)), "reflect")
    height, width, _ = image.shape
    rows = sum(tap * padded[i : i + height] for i, tap in enumerate(taps))
    return np.asarray(sum(tap * rows[:, i : i + width] for i, tap in enumerate(taps)))


def normalise(image: Array, mean: Sequence[float], std: Sequence[float]) -> Array:
    return (image / 255 - np.array(mean)) / np.array(std)


def centre_crop(image: Array, size: int, shorter: int, kernel: str = "linear") -> Array:
    """Both sides scaled alike so that the shorter one becomes `shorter`, and the central square of `size` pixels kept.

    The longer side is rounded to whole pixels around the image's centre, keeping the scale, as DALI does; torchvision
    truncates it and stretches the image to it.
    """
    height, width, _ = image.shape
    scale = shorter / min(height, width)
    target = int(height * scale + 0.5), int(width * scale + 0.5)
    seen = target[0] / scale, target[1] / scale
    image = resize(image, ((height - seen[0]) / 2, (width - seen[1]) / 2, *seen), target, kernel)
    top, left = int((target[0] - size) / 2 + 0.5), int((target[1] - size) / 2 + 0.5)
    return image[top : top + size, left : left + size]
