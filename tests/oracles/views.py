"""One view of one image in float64, one step at a time, from the definitions.

Crops follow torchvision's RandomResizedCrop: the first candidate that fits, else the largest central crop of a legal
ratio. Resizing is the antialiased interpolation of Pillow and torchvision. Brightness, contrast and saturation blend
with black, the mean grey and the grey image (torchvision's blends), hue turns the chroma in the YIQ plane; here they
are applied one by one, in a given order, without clipping in between. The blur is a normalised Gaussian of `window`
taps, mirrored at the border without repeating the edge. Images are (H, W, 3), in grey levels.

What begins with `authors_` is the TensorFlow code of google-research/simclr (data_util.py) and of the operations it
calls (sample_distorted_bounding_box, adjust_contrast, adjust_saturation, adjust_hue), in its words, on 0 to 255.
"""

import itertools
import math
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
    image: Array,
    box: tuple[float, float, float, float],
    size: tuple[int, int],
    kernel: str = "linear",
    antialias: bool = True,
) -> Array:
    """The (top, left, height, width) part of `image` as `size` pixels; antialias widens the kernel when that shrinks.

    The kernel sees the pixels beside the box. Beyond the image it sees the nearest edge pixel, as DALI does; Pillow and
    torchvision leave those out and renormalise, which differs where the kernel, when shrinking, reaches over the edge.
    """
    for axis in (0, 1):
        start, extent, count = box[axis], box[axis + 2], size[axis]
        step = extent / count
        centre = start + (np.arange(count) + 0.5) * step
        wide = max(step, 1) if antialias else 1
        beyond = 2 + int(2 * wide)
        pixel = np.arange(-beyond, image.shape[axis] + beyond)
        weight = {"linear": triangle, "cubic": keys_cubic}[kernel]((pixel + 0.5 - centre[:, None]) / wide)
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


def blur(image: Array, sigma: float, window: int, mode: str = "reflect") -> Array:
    radius = window // 2
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    taps /= taps.sum()
    padded = np.pad(image, ((radius, radius), (radius, radius), (0, 0)), mode)
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


def authors_crop(
    height: int, width: int, ratios: Sequence[float], shares: Sequence[float], offset: Array
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of sample_distorted_bounding_box with area (0.08, 1) and 0.1 of the image covered.

    Each attempt takes a ratio and, for the height, a share in [0, 1) of the integers it may be; offset is (y, x).
    """
    for ratio, share in zip(ratios, shares, strict=True):
        least, most = 0.08 * height * width, 1.0 * height * width
        h, highest = round(math.sqrt(least / ratio)), round(math.sqrt(most / ratio))
        if round(highest * ratio) > width:
            highest = int((width + 0.5 - 1e-7) / ratio)
            if round(highest * ratio) > width:
                highest -= 1
        highest = min(highest, height)
        h = min(h, highest)
        h += int(share * (highest - h + 1))
        w = round(h * ratio)
        if h * w < least:
            h += 1
            w = round(h * ratio)
        if h * w > most:
            h -= 1
            w = round(h * ratio)
        if least <= h * w <= most and 0 < w <= width and 0 < h <= height and h * w >= 0.1 * height * width:
            return int(offset[0] * (height - h)), int(offset[1] * (width - w)), h, w
    return 0, 0, height, width


def authors_contrast(x: Array, factor: float) -> Array:
    mean = x.mean((0, 1))
    return (x - mean) * factor + mean


def _to_hsv(x: Array) -> tuple[Array, Array, Array]:
    value, least = x.max(-1), x.min(-1)
    chroma = value - least
    safe = np.where(chroma > 0, chroma, 1)
    r, g, b = np.moveaxis(x, -1, 0)
    hue = np.select([r == value, g == value], [(g - b) / safe, 2 + (b - r) / safe], 4 + (r - g) / safe)
    hue = np.where(chroma > 0, hue % 6, 0)
    return hue, np.where(value > 0, chroma / np.where(value > 0, value, 1), 0), value


def _from_hsv(hue: Array, saturation: Array, value: Array) -> Array:
    chroma = saturation * value
    sector, least = np.floor(hue).astype(int) % 6, value - chroma
    rising = least + chroma * (hue - np.floor(hue))
    falling = value - chroma * (hue - np.floor(hue))
    table = [
        (value, rising, least),
        (falling, value, least),
        (least, value, rising),
        (least, falling, value),
        (rising, least, value),
        (value, least, falling),
    ]
    return np.stack([np.choose(sector, [row[channel] for row in table]) for channel in range(3)], -1)


def authors_saturation(x: Array, factor: float) -> Array:
    hue, saturation, value = _to_hsv(x)
    return _from_hsv(hue, (saturation * factor).clip(0, 1), value)


def authors_hue(x: Array, turns: float) -> Array:
    hue, saturation, value = _to_hsv(x)
    return _from_hsv((hue + 6 * turns) % 6, saturation, value)


AUTHORS_OPERATIONS: tuple[Callable[[Array, float], Array], ...] = (
    brightness,
    authors_contrast,
    authors_saturation,
    authors_hue,
)


def authors_colour(x: Array, factors: Sequence[float], order: Sequence[int], gray: bool) -> Array:
    """color_jitter_rand and to_grayscale: clipped after every operation; 4 in `order` stands for none."""
    for operation in order:
        if operation < 4:
            x = AUTHORS_OPERATIONS[operation](x, float(factors[operation])).clip(0, 255)
    if gray:
        x = np.repeat((x @ (0.2989, 0.587, 0.114))[..., None], 3, -1)
    return x.clip(0, 255)


def solarize(image: Array) -> Array:
    return np.where(image < 128, image, 255 - image)


def sobel(image: Array) -> Array:
    """Gradient magnitude, a quarter of the usual kernels' sum, so that a straight edge of d levels gives d."""
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), "reflect")
    right, down = np.zeros_like(image), np.zeros_like(image)
    height, width, _ = image.shape
    for i, j in itertools.product((-1, 0, 1), repeat=2):
        part = padded[1 + i : 1 + i + height, 1 + j : 1 + j + width]
        right += j * (2 - abs(i)) * part / 4
        down += i * (2 - abs(j)) * part / 4
    return np.hypot(right, down)
