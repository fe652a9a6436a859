"""The two-view distribution as numbers: what SimCLR draws for each image, before any pixel is touched.

A `ViewConfig` holds the distribution, `draw` samples it. Each sample of a global batch owns 64 uniforms of a
counter-based generator addressed by (seed, epoch, position), so what a position gets depends neither on the number
of ranks nor on where a run was interrupted, and any draw can be repeated alone. The graph (pipeline/graph.py) only
carries the drawn numbers out, on CPU or GPU.

Two profiles say how a view is made of its numbers:

"fast": crops follow torchvision's law, which most published PyTorch results use, and colour is one affine map per view.
Brightness, contrast about the mean grey of the image, saturation and hue are affine in the pixel x, and an affine map
commutes with the mean m of the image, so they compose to A x + B m with 3x3 matrices that need only the drawn factors.
In this form the four commute: the paper's random order would change nothing, so none is drawn. What this gives up
against applying them one by one: values are clipped once at the end instead of after every operation, which is all that
the order is about, and hue turns in the YIQ plane instead of in HSV. The blur comes before colour, on whole grey
levels: the two commute but for clipping and rounding.

"reference": the authors' TensorFlow code. Crops in whole pixels by the law of tf.image.sample_distorted_bounding_box,
resized cubically without antialiasing; the four colour operations in a random order, clipped after each, contrast about
the mean of each channel, saturation and hue in HSV; a Gaussian of fixed width over black borders.

Chen et al. 2020, arXiv:2002.05709, appendix A and figure 4; google-research/simclr, data_util.py.
"""

import itertools
import math
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ATTEMPTS = 10  # crops tried before falling back to the largest central one, as torchvision does
UNIFORMS = 2 * ATTEMPTS + 12  # per view; two views make 64, whole blocks of the generator's 4
EXTRA_UNIFORMS = 12  # per view, for the operators of figure 4; a stream of their own leaves the others as they are
OPERATIONS = ("brightness", "contrast", "saturation", "hue")
NOISE_WINDOWS = 256  # places along each axis of the field of noise that a view's noise is cut from


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """The distribution of one view. Both views of an image are independent draws, of one distribution or of two."""

    profile: Literal["fast", "reference"] = "fast"
    size: int = 224  # pixels, height and width of a view
    crop_area: tuple[float, float] = (0.08, 1.0)  # uniform share of the image's area
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # log-uniform width / height
    flip_p: float = 0.5
    jitter_p: float = 0.8  # all four colour operations
    jitter_strength: float = 1.0  # s: scales the next four
    brightness: float = 0.8  # factor uniform in [1 - 0.8 s, 1 + 0.8 s], cut at 0; same for contrast, saturation
    contrast: float = 0.8
    saturation: float = 0.8
    hue: float = 0.2  # turn uniform in [-0.2 s, 0.2 s] of a full circle
    grayscale_p: float = 0.2
    blur_p: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # uniform, pixels
    blur_kernel: float = 0.1  # widest kernel as a share of `size`: 23 pixels at 224, 9 at 96, 3 at 32
    interpolation: Literal["linear", "cubic"] = "linear"  # antialiased; reference views are always cubic and not
    rotation_p: float = 0.0  # turned by 0, 90, 180 or 270 degrees, each as likely; after the crop
    solarize_p: float = 0.0  # levels of at least half inverted; this and the rest come after the blur, in this order
    sobel_p: float = 0.0  # magnitude of the gradient of each channel: an edge of d levels becomes d
    noise_p: float = 0.0  # Gaussian noise
    noise_sigma: float = 0.1  # of pixels in [0, 1]
    cutout_p: float = 0.0  # a square set to `mean`, its centre anywhere in the view
    cutout_size: float = 0.5  # side as a share of `size`
    mean: tuple[float, float, float] = IMAGENET_MEAN  # of pixels in [0, 1]; the authors do not normalise
    std: tuple[float, float, float] = IMAGENET_STD
    eval_crop: float = 0.875  # central share kept when evaluating; 1 where the image is already small

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            expected = ""
            numbers = value if isinstance(value, tuple) else (value,)
            if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
                expected = "finite numbers"
            elif name.endswith("_p") and not 0 <= value <= 1:
                expected = "a probability between 0 and 1"
            elif name in ("crop_area", "crop_ratio", "blur_sigma") and not (
                len(value) == 2 and 0 < value[0] <= value[1]
            ):
                expected = "two positive numbers, the smaller first"
            elif name == "crop_area" and value[1] > 1:
                expected = "shares of the image, at most 1"
            elif name == "std" and not (len(value) == 3 and min(value) > 0):
                expected = "three positive numbers, one per channel"
            elif name == "mean" and len(value) != 3:
                expected = "three numbers, one per channel"
            elif name in (*OPERATIONS, "jitter_strength", "noise_sigma") and value < 0:
                expected = "a number of at least 0"
            elif name in ("eval_crop", "blur_kernel", "cutout_size") and not 0 < value <= 1:
                expected = "a share of the image, above 0 and at most 1"
            elif name == "interpolation" and value not in ("linear", "cubic"):
                expected = "linear or cubic"
            elif name == "profile" and value not in ("fast", "reference"):
                expected = "fast or reference"
            elif name == "size" and value < 8:
                expected = "at least 8 pixels"
            if expected:
                raise ValueError(f"view option {name}: expected {expected}, got {value!r}")

    def pixels(self, views: Any) -> Any:
        """Normalised views (m, 3, S, S), a tensor of any float type, back as float32 pixels in [0, 1]."""
        views = views.float()
        mean, std = (views.new_tensor(numbers).view(3, 1, 1) for numbers in (self.mean, self.std))
        return views * std + mean

    @property
    def recolours(self) -> bool:
        return self.jitter_p > 0 or self.grayscale_p > 0

    @property
    def has_extras(self) -> bool:
        return max(self.rotation_p, self.solarize_p, self.sobel_p, self.noise_p, self.cutout_p) > 0

    @property
    def ends_in_colour(self) -> bool:
        """Whether nothing follows the blur but one affine map of colour and the normalisation."""
        return self.profile == "fast" and not self.has_extras

    @property
    def drawn(self) -> frozenset[str]:
        """The fields of `Draws` that a view needs; the others change nothing."""
        used = {"offset", "mirror"} | ({"width", "height"} if self.profile == "fast" else {"ratio", "share"})
        if self.profile == "fast":
            used |= {"colour", "mean_colour"} if self.recolours else set()
        else:
            used |= {"order", "factors"} if self.jitter_p else set()
            used |= {"gray"} if self.grayscale_p else set()
        return frozenset(
            used
            | ({"sigma", "window"} if self.blur_p else set())
            | ({"angle"} if self.rotation_p else set())
            | ({"threshold"} if self.solarize_p else set())
            | ({"sobel"} if self.sobel_p else set())
            | ({"noise", "noise_offset"} if self.noise_p else set())
            | ({"hole_start", "hole_shape"} if self.cutout_p else set())
        )

    @property
    def max_window(self) -> int:
        """Widest blur kernel in pixels, odd: the authors' 2 * int(size * 0.1 / 2) + 1."""
        return 2 * (int(self.size * self.blur_kernel) // 2) + 1


VIEWS: dict[str, ViewConfig] = {
    # the paper's ImageNet distribution (appendix A)
    "imagenet": ViewConfig(),
    # appendix B.9: half the colour strength, no blur; statistics of the CIFAR-10 training set
    "cifar": ViewConfig(
        size=32,
        jitter_strength=0.5,
        blur_p=0.0,
        eval_crop=1.0,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.247, 0.2435, 0.2616),
    ),
    # the ImageNet distribution at STL-10's resolution; the paper has no STL-10 recipe
    "stl10": ViewConfig(size=96, eval_crop=1.0),
}


def make_views(base: str | ViewConfig, changes: Mapping[str, Any] | None = None) -> ViewConfig:
    """A preset, by name, or a value, with some fields changed. ValueError for an unknown name, field or value."""
    if isinstance(base, str):
        if base not in VIEWS:
            raise ValueError(f"unknown views {base!r}; choose one of {', '.join(VIEWS)}")
        base = VIEWS[base]
    fields: dict[str, Any] = {}
    for name, value in (changes or {}).items():
        if name not in vars(base):
            raise ValueError(f"unknown view option {name!r}; choose one of {', '.join(vars(base))}")
        kind = type(getattr(base, name))
        numbers = value if isinstance(value, (list, tuple)) else [value]
        if kind in (tuple, float) and all(type(number) in (int, float) for number in numbers):
            value = tuple(map(float, numbers)) if isinstance(value, (list, tuple)) else float(value)
        if type(value) is not kind and kind is not str:  # of a choice, ViewConfig names what there is
            raise ValueError(
                f"view option {name}: expected {kind.__name__} like {getattr(base, name)!r}, got {value!r}"
            )
        fields[name] = value
    return replace(base, **fields)


def check_pair(first: ViewConfig, second: ViewConfig) -> None:
    """Raises ValueError for two distributions whose views cannot make one batch of one graph."""
    for name in ("profile", "size", "mean", "std"):
        if getattr(first, name) != getattr(second, name):
            raise ValueError(
                f"view option {name}: both views of an image need the same, "
                f"got {getattr(first, name)!r} and {getattr(second, name)!r}; change it for both"
            )


def parse_changes(texts: Iterable[str]) -> dict[str, Any]:
    """["size=96", "crop_area=[0.2, 1.0]"] as {"size": 96, "crop_area": [0.2, 1.0]}. Raises ValueError.

    Values are TOML, and a bare word is a string: a shell takes the quotes of profile="reference" away.
    """
    changes: dict[str, Any] = {}
    for text in texts:
        if word := re.fullmatch(r"\s*(\w+)\s*=\s*([A-Za-z][\w-]*)\s*", text):
            text = text if word[2] in ("true", "false", "nan", "inf") else f'{word[1]} = "{word[2]}"'
        try:
            changes |= tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise ValueError(
                f"view option {text[:80]!r}: expected NAME=VALUE, such as size=96 or flip_p=0.0"
            ) from error
    return changes


Floats = NDArray[np.float32]
Ints = NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Everything random about one view of n images. Of each line marked with a profile, only that profile's is used.

    fast        width, height  (n, 10) candidate crops: width and height over sqrt(H W); the first that fits is taken
    reference   ratio, share   (n, 10) candidate crops: width / height, and the place in [0, 1) of the height between
                               the smallest and the largest that the area and the image allow; the first legal is taken
    both        offset  (n, 2) position (y, x) of the crop within the free space, in [0, 1)
    fast        colour  (n, 3, 3) A and mean_colour (n, 3, 3) B: pixel x becomes A x + B m, m the mean of the crop
    reference   order  (n, 4) of OPERATIONS, len(OPERATIONS) for none; factors (n, 4), hue in turns of the full circle;
                gray  (n,) 1 leaves only luma
    both        sigma, window  (n,) blur in pixels; window 1 leaves the view as it is
                mirror  (n,) 1 flips left and right
                angle  (n,) degrees, counterclockwise
                threshold  (n,) grey level from which on levels are inverted; above 255 for none
                sobel  (n,) 1 leaves only the gradient
                noise  (n,) standard deviation in grey levels; noise_offset (n, 2) window of the field of noise
                hole_start, hole_shape  (n, 2) pixels (y, x) that are cut out; shape 0 for none
    """

    width: Floats
    height: Floats
    ratio: Floats
    share: Floats
    offset: Floats
    colour: Floats
    mean_colour: Floats
    order: Ints
    factors: Floats
    gray: Ints
    sigma: Floats
    window: Ints
    mirror: Ints
    angle: Floats
    threshold: Floats
    sobel: Ints
    noise: Floats
    noise_offset: Ints
    hole_start: Floats
    hole_shape: Floats


_ORDERS = np.array(list(itertools.permutations(range(4))), np.int32)


def draw(
    config: ViewConfig, second: ViewConfig | None = None, *, seed: int, epoch: int, position: int, n: int
) -> tuple[Draws, Draws]:
    """Both views of the n samples at `position`, position + 1, ... of an epoch; `second` draws the second, if given."""

    def uniforms(stream: int, num: int) -> NDArray[np.float64]:
        counter = (stream << 192) + position * (2 * num // 4)  # 256 bits in all: streams cannot meet
        generator = np.random.Philox(key=np.array([seed, epoch], np.uint64), counter=counter)
        return np.random.Generator(generator).random((n, 2, num))

    configs = config, second or config
    u = uniforms(0, UNIFORMS)
    extra = uniforms(1, EXTRA_UNIFORMS) if any(c.has_extras for c in configs) else np.ones((n, 2, EXTRA_UNIFORMS))
    first, other = (_view(c, u[:, i], extra[:, i]) for i, c in enumerate(configs))
    return first, other


def _view(c: ViewConfig, u: NDArray[np.float64], extra: NDArray[np.float64]) -> Draws:
    shape, place = u[:, ATTEMPTS : 2 * ATTEMPTS], u[:, :ATTEMPTS]
    root_area = np.sqrt(_between(place, c.crop_area), dtype=np.float32)
    root_ratio = np.exp(0.5 * _between(shape, np.log(c.crop_ratio)), dtype=np.float32)
    y, x, flip, jitter, b, s, h, k, order, gray, blur, sigma = u[:, 2 * ATTEMPTS :].T
    jittered, grayed = jitter < c.jitter_p, gray < c.grayscale_p
    orders = _ORDERS[(len(_ORDERS) * order).astype(int)]

    def factor(v: NDArray[np.float64], strength: float) -> NDArray[np.float64]:
        width = strength * c.jitter_strength
        return np.where(jittered, _between(v, (max(1 - width, 0), 1 + width)), 1)

    factors = factor(b, c.brightness), factor(k, c.contrast), factor(s, c.saturation)
    turn = np.where(jittered, c.hue * c.jitter_strength * (1 - 2 * h), 0)  # HSV's way round, the opposite of YIQ's
    # without chroma: grayscale
    colour, mean_colour = _colour(factors[0], factors[1], np.where(grayed, 0, factors[2]), -2 * np.pi * turn)
    sigma = _between(sigma, c.blur_sigma)
    window = c.max_window  # 3 sigma each way hold 99.7 % of the kernel
    if c.profile == "fast":
        window = np.minimum(2 * np.ceil(3 * sigma) + 1, c.max_window)

    rotated, angle, solarized, sobel, noisy, noise_y, noise_x, cut, hole_y, hole_x, _, _ = extra.T
    half = np.where(cut < c.cutout_p, round(c.size * c.cutout_size) / 2, 0)[:, None]
    centre = c.size * np.stack([hole_y, hole_x], 1)
    hole_start, hole_end = (np.rint(centre + side).clip(0, c.size) for side in (-half, half))
    return Draws(
        width=root_area * root_ratio,
        height=(root_area / root_ratio).astype(np.float32),
        ratio=_between(shape, c.crop_ratio).astype(np.float32),
        share=place.astype(np.float32),
        offset=np.stack([y, x], 1).astype(np.float32),
        colour=colour,
        mean_colour=mean_colour,
        order=np.where(jittered[:, None], orders, len(OPERATIONS)).astype(np.int32),
        factors=np.stack([*factors, turn], 1).astype(np.float32),
        gray=grayed.astype(np.int32),
        sigma=sigma.astype(np.float32),
        window=np.where(blur < c.blur_p, window, 1).astype(np.int32),
        mirror=(flip < c.flip_p).astype(np.int32),
        angle=np.where(rotated < c.rotation_p, 90 * np.floor(4 * angle), 0).astype(np.float32),
        threshold=np.where(solarized < c.solarize_p, 128, 256).astype(np.float32),
        sobel=(sobel < c.sobel_p).astype(np.int32),
        noise=np.where(noisy < c.noise_p, 255 * c.noise_sigma, 0).astype(np.float32),
        noise_offset=(NOISE_WINDOWS * np.stack([noise_y, noise_x], 1)).astype(np.int32),
        hole_start=hole_start.astype(np.float32),
        hole_shape=(hole_end - hole_start).astype(np.float32),
    )


def windows(draws: Draws, config: ViewConfig, height: int, width: int) -> tuple[Floats, Floats]:
    """Start and end (n, 2), (y, x) relative to the image, of the fast profile's crops of images of one size.

    The first candidate that fits; where none does, the largest central window of a legal aspect ratio, as torchvision.
    A window that starts at its right end is flipped.
    """
    square = np.float32(height) / np.float32(width)
    tall = np.sqrt(square)  # candidates are in units of sqrt(H W): the image is 1 / tall wide and tall high
    legal = (draws.width * tall <= 1) & (draws.height <= tall)
    first, missed = legal.argmax(1)[:, None], ~legal.any(1, keepdims=True)
    taken = np.take_along_axis(draws.height / tall, first, 1), np.take_along_axis(draws.width * tall, first, 1)
    low, high = np.array(config.crop_ratio, np.float32)
    largest = np.minimum(np.array([1 / (low * square), high * square]), 1)
    extent = np.where(missed, largest, np.concatenate(taken, 1))
    start = (1 - extent) * np.where(missed, np.float32(0.5), draws.offset)
    turned = draws.mirror[:, None] * np.array([0, 1]) > 0
    return np.where(turned, start + extent, start), np.where(turned, start, start + extent)


def _between(u: NDArray[np.float64], bounds: Any) -> NDArray[np.float64]:
    return bounds[0] + (bounds[1] - bounds[0]) * u


LUMA = np.array([0.299, 0.587, 0.114])
_YIQ = np.array([LUMA, [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
GRAY = np.ones((3, 1)) * LUMA
_CHROMA = np.eye(3) - GRAY
_TURN = np.linalg.inv(_YIQ) @ np.array([[0, 0, 0], [0, 0, -1], [0, 1, 0]]) @ _YIQ  # chroma a quarter circle on
_BASIS = np.stack([GRAY, _CHROMA, _TURN]).reshape(3, 9)


def _colour(
    b: NDArray[np.float64], k: NDArray[np.float64], s: NDArray[np.float64], angle: NDArray[np.float64]
) -> tuple[Floats, Floats]:
    """Matrices A, B (n, 3, 3) of x -> A x + B m for brightness b, contrast k, saturation s and hue angle, in any order.

    With x split into luma and chroma, b scales everything, k scales everything about the luma of the mean, s scales
    the chroma and the angle turns it, so A = b k (GRAY + s (cos CHROMA + sin TURN)) and B = b (1 - k) GRAY.
    """
    n, luma, chroma = len(b), b * k, b * k * s
    A = np.stack([luma, chroma * np.cos(angle), chroma * np.sin(angle)], 1) @ _BASIS
    B = (b - luma)[:, None] * _BASIS[0]
    return A.astype(np.float32).reshape(n, 3, 3), B.astype(np.float32).reshape(n, 3, 3)
