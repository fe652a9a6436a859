"""The two-view distribution as numbers: what SimCLR draws for each image, before any pixel is touched.

A `ViewConfig` holds the distribution, `draw` samples it. Each sample of a global batch owns 64 uniforms of a
counter-based generator addressed by (seed, epoch, position), so what a position gets depends neither on the number
of ranks nor on where a run was interrupted, and any draw can be repeated alone. The graph (pipeline/graph.py) only
carries the drawn numbers out, on CPU or GPU.

Colour is one affine map per view. Brightness, contrast about the mean grey of the image, saturation and hue are affine
in the pixel x, and an affine map commutes with the mean m of the image, so they compose to A x + B m with 3x3 matrices
that need only the drawn factors. In this form the four commute: the paper's random order would change nothing, so none
is drawn. What this gives up against applying them one by one: values are clipped once at the end instead of after every
operation, which is all that the order is about, and hue turns in the YIQ plane instead of in HSV.

Chen et al. 2020, arXiv:2002.05709, appendix A; crop law and factor laws as in torchvision, which most published PyTorch
results use. The authors' TensorFlow crop draws smaller crops and their contrast works per channel.
"""

import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ATTEMPTS = 10  # crops tried before falling back to the largest central one, as torchvision does
UNIFORMS = 2 * ATTEMPTS + 12  # per view, one of them spare; two views make 64, whole blocks of the generator's 4


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """The distribution of one view; both views of an image are independent draws from it."""

    size: int = 224  # pixels, height and width of a view
    crop_area: tuple[float, float] = (0.08, 1.0)  # uniform share of the image's area
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # log-uniform width / height
    flip_p: float = 0.5
    jitter_p: float = 0.8  # all four colour operations; their order makes no difference
    jitter_strength: float = 1.0  # s: scales the next four
    brightness: float = 0.8  # factor uniform in [1 - 0.8 s, 1 + 0.8 s], cut at 0; same for contrast, saturation
    contrast: float = 0.8
    saturation: float = 0.8
    hue: float = 0.2  # turn uniform in [-0.2 s, 0.2 s] of a full circle
    grayscale_p: float = 0.2
    blur_p: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # uniform, pixels
    blur_kernel: float = 0.1  # widest kernel as a share of `size`: 23 pixels at 224, 9 at 96, 3 at 32
    interpolation: Literal["linear", "cubic"] = "linear"  # antialiased; the authors use cubic without antialiasing
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
            elif name in ("brightness", "contrast", "saturation", "hue", "jitter_strength") and value < 0:
                expected = "a number of at least 0"
            elif name in ("eval_crop", "blur_kernel") and not 0 < value <= 1:
                expected = "a share of the image, above 0 and at most 1"
            elif name == "interpolation" and value not in ("linear", "cubic"):
                expected = "linear or cubic"
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
        if type(value) is not kind:
            raise ValueError(
                f"view option {name}: expected {kind.__name__} like {getattr(base, name)!r}, got {value!r}"
            )
        fields[name] = value
    return replace(base, **fields)


def parse_changes(texts: Iterable[str]) -> dict[str, Any]:
    """["size=96", "crop_area=[0.2, 1.0]"] as {"size": 96, "crop_area": [0.2, 1.0]}. Raises ValueError."""
    changes: dict[str, Any] = {}
    for text in texts:
        try:
            changes |= tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"view option {text!r}: expected NAME=VALUE, such as size=96 or flip_p=0.0") from error
    return changes


Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Everything random about one view of n images.

    width, height  (n, 10) candidate crops: width and height over sqrt(H W); the first that fits is taken
    offset         (n, 2) position (y, x) of the crop within the free space, in [0, 1)
    colour         (n, 3, 3) A and mean_colour (n, 3, 3) B: pixel x becomes A x + B m, m the mean of the crop
    sigma, window  (n,) blur in pixels; window 1 leaves the view as it is
    mirror         (n,) 1 flips left and right
    """

    width: Floats
    height: Floats
    offset: Floats
    colour: Floats
    mean_colour: Floats
    sigma: Floats
    window: NDArray[np.int32]
    mirror: NDArray[np.int32]


def draw(config: ViewConfig, *, seed: int, epoch: int, position: int, n: int) -> tuple[Draws, Draws]:
    """Both views of the n samples at `position`, position + 1, ... of an epoch."""
    generator = np.random.Philox(key=np.array([seed, epoch], np.uint64), counter=position * (2 * UNIFORMS // 4))
    u = np.random.Generator(generator).random((n, 2, UNIFORMS))
    return _view(config, u[:, 0]), _view(config, u[:, 1])


def _view(c: ViewConfig, u: NDArray[np.float64]) -> Draws:
    root_area = np.sqrt(_between(u[:, :ATTEMPTS], c.crop_area), dtype=np.float32)
    root_ratio = np.exp(0.5 * _between(u[:, ATTEMPTS : 2 * ATTEMPTS], np.log(c.crop_ratio)), dtype=np.float32)
    y, x, flip, jitter, b, s, h, k, _, gray, blur, sigma = u[:, 2 * ATTEMPTS :].T
    jittered = jitter < c.jitter_p

    def factor(v: NDArray[np.float64], strength: float) -> NDArray[np.float64]:
        width = strength * c.jitter_strength
        return np.where(jittered, _between(v, (max(1 - width, 0), 1 + width)), 1)

    saturation = np.where(gray < c.grayscale_p, 0, factor(s, c.saturation))  # without chroma: grayscale
    angle = np.where(jittered, 2 * np.pi * c.hue * c.jitter_strength * (2 * h - 1), 0)
    colour, mean_colour = _colour(factor(b, c.brightness), factor(k, c.contrast), saturation, angle)
    sigma = _between(sigma, c.blur_sigma)
    window = np.minimum(2 * np.ceil(3 * sigma) + 1, c.max_window)  # 3 sigma each way hold 99.7 % of the kernel
    return Draws(
        width=root_area * root_ratio,
        height=(root_area / root_ratio).astype(np.float32),
        offset=np.stack([y, x], 1).astype(np.float32),
        colour=colour,
        mean_colour=mean_colour,
        sigma=sigma.astype(np.float32),
        window=np.where(blur < c.blur_p, window, 1).astype(np.int32),
        mirror=(flip < c.flip_p).astype(np.int32),
    )


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
