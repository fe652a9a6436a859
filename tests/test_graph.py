"""The DALI graphs give the views that NumPy gives from the same numbers, for every kind of image.

The graph rounds to whole grey levels up to three times: after the resize and after either pass of the blur. Against the
unrounded oracle that leaves half a level each time, multiplied by what colour does to it, so a view may be off by
3/2 (|A| + |B|) levels, with |.| the largest absolute row sum; `allowed` adds 0.1 for float32.
"""

import colorsys
import io
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from nvidia.dali import backend, fn
from PIL import Image

from pipeline.colour import finish
from pipeline.graph import Decoder, Encoding, _decoded, plain_view, two_views
from pipeline.views import ATTEMPTS, OPERATIONS, VIEWS, Draws, ViewConfig, draw, make_views
from tests.oracles import views as oracle

LEVELS = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}  # views come out in grey levels
Bytes = NDArray[np.uint8]


def encode(image: Bytes, format: str = "PNG", **options: Any) -> Bytes:
    return saved(Image.fromarray(image), format, **options)


def saved(image: Image.Image, format: str, **options: Any) -> Bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return np.frombuffer(file.getvalue(), np.uint8)


def views(
    images: Sequence[Bytes], config: ViewConfig, draws: tuple[Draws, Draws], *, half: bool = False
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Both views of all encoded images; row i is of image i, drawn as row i of `draws`.

    Where the loader finishes them by torch on CPUs, that gives the same: to a hundredth of a level, and a unit in the
    last place of float16.
    """
    first, second = run_two(images, config, draws, half=half)
    made = np.array(first), np.array(second)
    unchanged = all((view.colour == np.eye(3)).all() for view in draws)  # as drawn where nothing recolours
    if config.ends_in_colour and (config.recolours or unchanged):
        levels = [torch.from_numpy(output) for output in run_two(images, config, draws, levels=True)]
        for i, view in enumerate(made):
            finished = finish(levels[i], levels[2 + 2 * i], levels[3 + 2 * i], config)
            exact = 2**-11 * np.abs(view) if half else 0
            assert (np.abs(finished.numpy() - view) <= exact + 0.01 / 255 / min(config.std)).all()
    return made


def run_two(
    images: Sequence[Bytes], config: ViewConfig, draws: tuple[Draws, Draws], device: int | None = None, **options: Any
) -> list[NDArray[Any]]:
    """The outputs of `two_views` for one batch of all images."""
    asked: dict[str, Any] = {"batch_size": len(images), "device_id": device, "num_threads": 2, **options}
    graph = two_views(Encoding(), config, lambda _: list(images), lambda _: draws, **asked)
    return [np.array(output.as_cpu().as_array()) for output in graph.run()]


def run_plain(images: Sequence[Bytes], config: ViewConfig, device: int | None = None) -> NDArray[Any]:
    """The output of `plain_view` for one batch of all images."""
    asked: dict[str, Any] = {"batch_size": len(images), "device_id": device, "num_threads": 1}
    (made,) = plain_view(Encoding(), config, lambda _: list(images), **asked).run()
    return np.array(made.as_cpu().as_array())


def copies(image: Bytes, config: ViewConfig, *, seed: int, num: int) -> list[NDArray[Any]]:
    """Both views of one image, made `num` times in batches of 250."""
    encoded, each = encode(image), 250

    def drawn(batch: int) -> tuple[Draws, Draws]:
        return draw(config, seed=seed, epoch=0, position=batch * each, n=each)

    asked: dict[str, Any] = {"batch_size": each, "device_id": None, "num_threads": 2}
    graph = two_views(Encoding(), config, lambda _: [encoded] * each, drawn, **asked)
    batches = [[np.array(out.as_array()) for out in graph.run()] for _ in range(num // each)]
    return [np.concatenate(view) for view in zip(*batches, strict=True)]


def plain(num: int, **changes: Any) -> Draws:
    """Draws that leave the whole image as it is, except for `changes`."""
    fields: dict[str, Any] = {
        "width": np.ones((num, ATTEMPTS), np.float32),
        "height": np.ones((num, ATTEMPTS), np.float32),
        "ratio": np.ones((num, ATTEMPTS), np.float32),
        "share": np.full((num, ATTEMPTS), 1 - 2**-20, np.float32),
        "offset": np.zeros((num, 2), np.float32),
        "colour": np.tile(np.eye(3, dtype=np.float32), (num, 1, 1)),
        "mean_colour": np.zeros((num, 3, 3), np.float32),
        "sigma": np.ones(num, np.float32),
        "window": np.ones(num, np.int32),
        "mirror": np.zeros(num, np.int32),
        "order": np.full((num, 4), len(OPERATIONS), np.int32),
        "factors": np.tile(np.float32([1, 1, 1, 0]), (num, 1)),
        "gray": np.zeros(num, np.int32),
        "angle": np.zeros(num, np.float32),
        "threshold": np.full(num, 256, np.float32),
        "sobel": np.zeros(num, np.int32),
        "noise": np.zeros(num, np.float32),
        "noise_offset": np.zeros((num, 2), np.int32),
        "hole_start": np.zeros((num, 2), np.float32),
        "hole_shape": np.zeros((num, 2), np.float32),
    }
    assert changes.keys() <= fields.keys()
    return Draws(**{name: np.asarray(changes.get(name, value), value.dtype) for name, value in fields.items()})


def expected(image: Bytes, config: ViewConfig, draws: Draws, i: int) -> NDArray[np.float64]:
    """View i of `image` in grey levels, never rounded: crop, flip, blur, colour, clipped at the end."""
    height, width, _ = image.shape
    unit = np.sqrt(height * width)
    candidates = [(unit * h, unit * w) for h, w in zip(draws.height[i].astype(float), draws.width[i].astype(float))]  # noqa: B905
    box = oracle.crop(height, width, candidates, draws.offset[i].astype(float), config.crop_ratio)
    view = oracle.resize(image.astype(float), box, (config.size, config.size), config.interpolation)
    view = view[:, ::-1] if draws.mirror[i] else view
    if config.blur_p and draws.window[i] > 1:
        view = oracle.blur(view, float(draws.sigma[i]), int(draws.window[i]))
    return recoloured(view, draws, i) if config.recolours else view


def recoloured(view: NDArray[np.float64], draws: Draws, i: int) -> NDArray[np.float64]:
    mean = draws.mean_colour[i].astype(float) @ view.mean((0, 1))
    coloured: NDArray[np.float64] = (view @ draws.colour[i].T.astype(float) + mean).clip(0, 255)
    return coloured


def expected_reference(image: Bytes, config: ViewConfig, draws: Draws, i: int) -> NDArray[np.float64]:
    """View i by the authors' code in float64; the resize sees the pixels beside the crop, which theirs does not."""
    height, width, _ = image.shape
    offset = draws.offset[i].astype(float)
    box = oracle.authors_crop(height, width, draws.ratio[i].tolist(), draws.share[i].tolist(), offset)
    view = oracle.resize(image.astype(float), box, (config.size, config.size), "cubic", antialias=False)
    view = view[:, ::-1] if draws.mirror[i] else view
    view = oracle.authors_colour(view, draws.factors[i], draws.order[i], bool(draws.gray[i]))
    if draws.window[i] > 1:
        view = oracle.blur(view, float(draws.sigma[i]), config.max_window, "constant")
    return view


def allowed(config: ViewConfig, draws: Draws, i: int) -> float:
    rounded = 0.5 * (1 + 2 * (config.blur_p > 0))
    gain = np.abs(draws.colour[i]).sum(1).max() + np.abs(draws.mean_colour[i]).sum(1).max() if config.recolours else 1
    return float(gain * rounded + 0.1)


def ramp(height: int, width: int) -> Bytes:
    """Red rises to the right, green downwards, by whole levels; blue is flat."""
    y, x = np.mgrid[:height, :width]
    return np.stack([255 * x // max(width - 1, 1), 255 * y // max(height - 1, 1), 0 * x + 90], 2).astype(np.uint8)


def noise(height: int, width: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def photos() -> list[Bytes]:
    """Two real photographs that come with scikit-learn, here 214 x 320, and odd cuts of them."""
    from sklearn.datasets import load_sample_image

    china, flower = (np.array(load_sample_image(name))[::2, ::2] for name in ("china.jpg", "flower.jpg"))
    return [china, flower, china[:, :60], flower[100:131, :], china[::3, ::3], flower[100:117, 150:161]]


def extremes() -> list[Bytes]:
    """Shapes of which few or no candidates fit, and the smallest ones."""
    return [ramp(200, 10), noise(10, 200, 1), noise(300, 2, 2), ramp(1, 64), noise(1, 1, 3), noise(40, 31, 4)]


# ---- the whole view ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["imagenet", "cifar", "stl10"])
@pytest.mark.parametrize("images", [photos, extremes])
def test_views_equal_the_oracle(preset: str, images: Any) -> None:
    """Crop, flip, blur, colour as drawn for 4 x 6 images, both views; every pixel within `allowed`.

    Each of the operations is used and left out at least once, so none can be skipped or swapped unseen.
    """
    config = make_views(preset, {**LEVELS, "size": min(VIEWS[preset].size, 96)})
    pictures = 4 * images()
    data = [encode(image) for image in pictures]
    drawn = draw(config, seed=2, epoch=1, position=0, n=len(pictures))
    for draws, got in zip(drawn, views(data, config, drawn), strict=True):
        assert {0, 1} == set(draws.mirror)
        assert bool(config.blur_p) == (draws.window > 1).any()
        for i, image in enumerate(pictures):
            off = np.abs(got[i] - expected(image, config, draws, i))
            assert off.max() <= allowed(config, draws, i), f"image {i} {image.shape}: {off.max():.2f} levels off"
            assert off.mean() <= allowed(config, draws, i) / 2  # the mean of one rounding is half of its most


@pytest.mark.parametrize(("preset", "images"), [("stl10", photos), ("cifar", extremes)])
def test_reference_views_equal_the_authors_operations_one_by_one(preset: str, images: Any) -> None:
    """Crop in whole pixels, flip, the operations in the order drawn, clipped after each, blur over black.

    Nothing is rounded to levels. DALI reads the cubic kernel from a table and is up to 0.25 levels off before colour,
    of which brightness and contrast make at most 1.8 * 1.8 times as much: 0.8 levels at worst, and 0.01 on average.
    The operations in another order are tens of levels away.
    """
    config = make_views(preset, {**LEVELS, "profile": "reference", "size": min(VIEWS[preset].size, 48)})
    pictures = 3 * images()
    data = [encode(image) for image in pictures]
    drawn = draw(config, seed=2, epoch=1, position=0, n=len(pictures))
    for draws, got in zip(drawn, views(data, config, drawn), strict=True):
        assert set(draws.order[:, 0]) == set(range(5))
        assert {0, 1} == set(draws.gray) == set(draws.mirror)
        off = [np.abs(got[i] - expected_reference(image, config, draws, i)) for i, image in enumerate(pictures)]
        assert max(each.max() for each in off) <= 0.8
        assert np.mean([each.mean() for each in off]) <= 0.01
        swapped = Draws(**{**vars(draws), "order": draws.order[:, ::-1]})
        other = [np.abs(got[i] - expected_reference(image, config, swapped, i)) for i, image in enumerate(pictures[:4])]
        assert max(each.max() for each in other) > 20


def test_cubic_views_equal_the_oracle() -> None:
    """Antialiased cubic as Pillow's BICUBIC (a = -0.5); its overshoot is clipped before colour, as by Pillow."""
    config = make_views("cifar", {**LEVELS, "interpolation": "cubic", "jitter_p": 0.0, "grayscale_p": 0.0})
    pictures = 2 * photos()
    data = [encode(image) for image in pictures]
    drawn = draw(config, seed=3, epoch=0, position=0, n=len(pictures))
    for draws, got in zip(drawn, views(data, config, drawn), strict=True):
        for i, image in enumerate(pictures):
            assert np.abs(got[i] - expected(image, config, draws, i).clip(0, 255)).max() <= allowed(config, draws, i)


def test_resizing_is_that_of_pillow() -> None:
    """The drawn window, in fractions of pixels, resized by Pillow: at most one level apart.

    The graph rounds once and Pillow twice, after either pass: half a level each, and a difference of two whole levels
    is no less than 2. Beyond the image's edge the graph sees the edge pixel and Pillow nothing, so it is given an edge.
    """
    config = make_views("cifar", {**LEVELS, "size": 48, "jitter_p": 0.0, "grayscale_p": 0.0, "flip_p": 0.0})
    pictures = photos()
    data = [encode(image) for image in pictures]
    drawn = draw(config, seed=8, epoch=0, position=0, n=len(pictures))
    got = views(data, config, drawn)[0]
    for i, image in enumerate(pictures):
        height, width, _ = image.shape
        unit = np.sqrt(height * width)
        sizes = [(unit * float(h), unit * float(w)) for h, w in zip(drawn[0].height[i], drawn[0].width[i], strict=True)]
        top, left, h, w = oracle.crop(height, width, sizes, drawn[0].offset[i].astype(float), (3 / 4, 4 / 3))
        edge = 32
        padded = Image.fromarray(np.pad(image, ((edge, edge), (edge, edge), (0, 0)), "edge"))
        box = (left + edge, top + edge, left + w + edge, top + h + edge)
        pillow = np.array(padded.resize((48, 48), Image.Resampling.BILINEAR, box), float)
        assert np.abs(got[i] - pillow).max() <= 1


# ---- one step at a time --------------------------------------------------------------------------------------------


def test_a_view_that_changes_nothing_is_the_image() -> None:
    """The whole image at its own size, identity colour, window 1, no flip: every bit the same."""
    image = noise(64, 64)
    config = make_views("imagenet", {**LEVELS, "size": 64})
    for view in views([encode(image)], config, (plain(1), plain(1))):
        np.testing.assert_array_equal(view[0], image)


def test_the_crop_is_the_first_candidate_that_fits_to_a_fifth_of_a_pixel() -> None:
    """On a ramp of 1 level per pixel a line through the view gives both ends of the window.

    88 values rounded to whole levels (standard deviation 0.29) give the intercept to 0.29 * 2 / sqrt(88) = 0.06, the
    slope to 0.1; three times that is allowed. The first candidate is too wide, the second fits, others would fit too.
    """
    size, side = 96, 200
    y, x = np.mgrid[:side, :side]
    image = np.stack([x, y, 0 * x], 2).astype(np.uint8)
    rng = np.random.default_rng(1)
    num = 8
    shape = rng.uniform(0.15, 0.45, (num, 2))  # (height, width) of the candidate that is taken
    height, width = rng.uniform(0.1, 0.9, (2, num, ATTEMPTS))
    height[:, 0], width[:, 0] = 0.5, 1.01
    height[:, 1], width[:, 1] = shape.T
    offset = rng.random((num, 2))
    config = make_views("cifar", {**LEVELS, "size": size})
    draws = plain(num, height=height, width=width, offset=offset)
    got = views(num * [encode(image)], config, (plain(num), draws))[1]
    start = (1 - shape) * offset * side
    inner = slice(4, -4)  # beside the window the kernel sees the image, at its border it does not
    position = (np.arange(size) + 0.5) / size
    for i in range(num):
        for axis, line in ((0, got[i, :, :, 1].mean(1)), (1, got[i, :, :, 0].mean(0))):
            slope, first = np.polyfit(position[inner], line[inner], 1)
            assert abs(first + 0.5 - start[i, axis]) < 0.2
            assert abs(slope - shape[i, axis] * side) < 0.3


@pytest.mark.parametrize(("height", "width"), [(200, 10), (10, 200), (64, 63), (96, 64)])
def test_without_a_candidate_that_fits_the_crop_is_the_largest_central_one(height: int, width: int) -> None:
    """Of 200 x 10 the central 13.3 x 10, of 10 x 200 the central 10 x 13.3, of 64 x 63 all, of 96 x 64 85.3 x 64.

    The offset must not matter, so it is 0.9; within half a level of the exact resize.
    """
    box = {
        (200, 10): (280 / 3, 0, 40 / 3, 10),
        (10, 200): (0, 280 / 3, 10, 40 / 3),
        (64, 63): (0, 0, 64, 63),
        (96, 64): (16 / 3, 0, 256 / 3, 64),
    }[height, width]
    image = ramp(height, width)
    config = make_views("cifar", LEVELS)
    much = np.full((1, ATTEMPTS), 1.5 * np.sqrt(max(height, width) / min(height, width)))
    draws = plain(1, width=much, height=much, offset=[[0.9, 0.9]])
    got = views([encode(image)], config, (draws, draws))[0][0]
    assert np.abs(got - oracle.resize(image.astype(float), box, (32, 32))).max() <= 0.51


def test_colour_of_a_flat_image_is_exact_to_rounding() -> None:
    """A flat image is its own mean: A c + B c, rounded, whatever is cropped; and clipped to 0 and 255."""
    config = make_views("imagenet", {**LEVELS, "size": 32, "blur_p": 0.0})
    num = 60
    colours = np.random.default_rng(5).integers(0, 256, (num, 3))
    images = [np.broadcast_to(c, (40, 50, 3)).astype(np.uint8) for c in colours]
    drawn = draw(config, seed=1, epoch=0, position=0, n=num)
    for draws, got in zip(drawn, views([encode(i) for i in images], config, drawn), strict=True):
        exact = np.einsum("nij,nj->ni", draws.colour.astype(float) + draws.mean_colour, colours).clip(0, 255)
        assert np.ptp(got, axis=(1, 2)).max() == 0
        assert np.abs(got[:, 0, 0] - exact).max() <= 0.501
        assert (exact == 255).any()


def test_contrast_turns_about_the_mean_of_the_crop_and_not_of_the_image() -> None:
    """Contrast 0 leaves only the mean grey: that of the bright half where that is cropped, to half a level."""
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, 32:] = 200, 100, 50
    only_mean = np.ones((3, 1)) * oracle.LUMA
    draws = plain(
        1,
        width=np.full((1, ATTEMPTS), 0.4),
        height=np.full((1, ATTEMPTS), 0.4),
        offset=[[0.0, 0.999]],
        colour=np.zeros((1, 3, 3)),
        mean_colour=only_mean[None],
    )
    config = make_views("imagenet", {**LEVELS, "size": 32})
    got = views([encode(image)], config, (draws, plain(1)))[0]
    assert np.abs(got - oracle.LUMA @ (200, 100, 50)).max() <= 0.5


@pytest.mark.parametrize(("sigma", "window"), [(0.1, 3), (0.7, 7), (1.3, 9), (2.0, 13), (2.0, 3), (1.9, 23)])
def test_the_blur_of_an_impulse_is_the_gaussian_with_its_window(sigma: float, window: int) -> None:
    """A white pixel on black, far from and at the border: 255 times the taps' product, to two roundings.

    A white line gives sigma back: within 3 %, since cutting at 3 sigma takes 1.4 % of it and rounding some more.
    """
    image = np.zeros((64, 64, 3), np.uint8)
    image[30, 33, 0] = image[2, 0, 1] = 255
    image[:, 33, 2] = 255
    config = make_views("imagenet", {**LEVELS, "size": 64, "blur_kernel": 0.4})
    draws = plain(1, sigma=[sigma], window=[window])
    got = views([encode(image)], config, (draws, plain(1)))
    assert np.abs(got[0][0] - oracle.blur(image.astype(float), sigma, window)).max() <= 1.01
    np.testing.assert_array_equal(got[1][0], image)  # window 1 beside it
    if sigma > 0.5 and window >= 6 * sigma:
        line = got[0][0, 30, :, 2]
        measured = np.sqrt((line * (np.arange(64) - 33.0) ** 2).sum() / line.sum())
        assert abs(measured / sigma - 1) < 0.03


@pytest.mark.parametrize("profile", ["fast", "reference"])
def test_the_flip_is_exact_whatever_else_is_done(profile: str) -> None:
    """The mirrored view is the other one reversed left to right, with everything else drawn alike.

    But for the order in which sums are taken, which may round one value in a thousand to the next level; and with
    colour and blur that level is multiplied.
    """
    config = make_views("imagenet", {**LEVELS, "profile": profile, "size": 64})
    drawn = draw(config, seed=6, epoch=0, position=0, n=6)[0]
    flipped, straight = (Draws(**{**vars(drawn), "mirror": np.full(6, value, np.int32)}) for value in (1, 0))
    first, second = views([encode(image) for image in photos()], config, (flipped, straight))
    bare = make_views(config, {"jitter_p": 0.0, "grayscale_p": 0.0, "blur_p": 0.0})
    identity = {"colour": plain(6).colour, "mean_colour": plain(6).mean_colour}
    both = (replace(flipped, **identity), replace(straight, **identity))
    cropped, mirrored = views([encode(image) for image in photos()], bare, both)
    off = np.abs(cropped - mirrored[:, :, ::-1])
    assert np.quantile(off, 0.999) < 1e-3
    assert off.max() <= 1
    off = np.abs(first - second[:, :, ::-1])
    assert np.quantile(off, 0.999) < 1e-3
    assert off.max() <= max(allowed(config, drawn, i) for i in range(6))
    assert np.abs(first - second).max() > 50


@pytest.mark.parametrize("profile", ["fast", "reference"])
def test_the_blur_comes_before_colour_and_in_the_authors_profile_after_it(profile: str) -> None:
    """Gain 4 clips a white pixel on dark grey, before or after it is spread: the two differ by far."""
    image = np.full((32, 32, 3), 20, np.uint8)
    image[16, 16] = 255
    config = make_views("imagenet", {**LEVELS, "profile": profile, "size": 32, "blur_kernel": 0.25})
    gain = {"colour": 4 * np.eye(3)[None], "order": [[0, 4, 4, 4]], "factors": [[4, 1, 1, 0]]}
    draws = plain(1, **gain, sigma=[1.0], window=[7])
    got = views([encode(image)], config, (draws, draws))[0][0]
    border = "constant" if profile == "reference" else "reflect"
    coloured_first = oracle.blur((4 * image.astype(float)).clip(0, 255), 1.0, 7, border)
    blurred_first = (4 * oracle.blur(image.astype(float), 1.0, 7)).clip(0, 255)
    want, other = (coloured_first, blurred_first) if profile == "reference" else (blurred_first, coloured_first)
    assert np.abs(got - want).max() <= 0.51 * (1 if profile == "reference" else 8)  # two roundings, four times
    assert np.abs(got - other).max() > 50


def test_normalisation_is_per_channel_in_float32() -> None:
    """(x / 255 - mean) / std with the preset's numbers, on all 256 levels of each channel, to 1e-6."""
    levels = np.stack([np.arange(256), np.arange(256)[::-1], np.roll(np.arange(256), 77)], 1).reshape(16, 16, 3)
    config = make_views("cifar", {"size": 16})
    got = views([encode(levels.astype(np.uint8))], config, (plain(1), plain(1)))[0]
    assert got.dtype == np.float32
    want = oracle.normalise(levels.astype(float), (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))
    np.testing.assert_allclose(got[0], want, rtol=0, atol=1e-6)


def test_half_views_are_the_float_views_rounded_to_half() -> None:
    """Normalised in float32, then rounded once: within half a unit in the last place of float16, 2**-11 relative."""
    config = VIEWS["stl10"]
    data = [encode(image) for image in photos()]
    drawn = draw(config, seed=7, epoch=0, position=0, n=6)
    for full, half in zip(views(data, config, drawn), views(data, config, drawn, half=True), strict=True):
        assert (full.dtype, half.dtype) == (np.float32, np.float16)
        np.testing.assert_allclose(half.astype(np.float32), full, rtol=2**-11, atol=2**-24)


@pytest.mark.parametrize("changes", [{"profile": "reference"}, {"cutout_p": 0.5}])
def test_levels_of_views_that_do_not_end_in_colour_are_refused(changes: dict[str, Any]) -> None:
    config = make_views("cifar", changes)
    with pytest.raises(ValueError, match="do not end in colour"):
        run_two([encode(noise(8, 8))], config, (plain(1), plain(1)), levels=True)


def test_options_that_are_off_leave_their_operation_out() -> None:
    """No jitter and no grayscale: no colour. No blur: no blur, even where the draws ask for them."""
    image = noise(32, 32)
    loud = plain(1, colour=np.zeros((1, 3, 3)), sigma=[2.0], window=[13])
    data = [encode(image)]
    off = {**LEVELS, "size": 32, "jitter_p": 0.0, "grayscale_p": 0.0, "blur_kernel": 0.5}
    np.testing.assert_array_equal(views(data, make_views("cifar", off), (loud, loud))[0][0], image)
    only_blur = views(data, make_views("imagenet", off), (loud, loud))[0][0]
    assert np.abs(only_blur - oracle.blur(image.astype(float), 2.0, 13)).max() <= 1.01
    only_colour = views(data, make_views("imagenet", {**LEVELS, "size": 32, "blur_p": 0.0}), (loud, loud))[0][0]
    assert (only_colour == 0).all()


# ---- the operators of figure 4, and two distributions --------------------------------------------------------------

BARE = {**LEVELS, "size": 32, "jitter_p": 0.0, "grayscale_p": 0.0, "blur_p": 0.0, "flip_p": 0.0}


@pytest.mark.parametrize("profile", ["fast", "reference"])
@pytest.mark.parametrize("angle", [0, 90, 180, 270])
def test_rotation_is_by_whole_quarters_and_moves_every_pixel_exactly(profile: str, angle: int) -> None:
    """NumPy's rot90 turns the same way, counterclockwise; the view beside it stays. Cubic at scale 1 is exact too."""
    image = noise(32, 32)
    config = make_views("cifar", {**BARE, "profile": profile, "rotation_p": 1.0})
    turned, rest = views([encode(image)], config, (plain(1, angle=[angle]), plain(1)))
    np.testing.assert_allclose(turned[0], np.rot90(image, angle // 90), rtol=0, atol=1e-3)
    np.testing.assert_allclose(rest[0], image, rtol=0, atol=1e-3)


@pytest.mark.parametrize("profile", ["fast", "reference"])
def test_solarize_and_sobel_equal_the_oracle_where_they_are_drawn(profile: str) -> None:
    """Levels from 128 on inverted; the gradient's magnitude, clipped, with the image mirrored at its border."""
    images = [noise(32, 32), photos()[0][40:72, 40:72], ramp(32, 32)]
    data = [encode(image) for image in images]
    for name, on, want in (
        ("solarize_p", plain(3, threshold=[128] * 3), oracle.solarize),
        ("sobel_p", plain(3, sobel=[1] * 3), oracle.sobel),
    ):
        config = make_views("cifar", {**BARE, "profile": profile, name: 1.0})
        got, rest = views(data, config, (on, plain(3)))
        for i, image in enumerate(images):
            np.testing.assert_allclose(got[i], want(image.astype(float)).clip(0, 255), rtol=0, atol=1e-2)
            np.testing.assert_allclose(rest[i], image, rtol=0, atol=1e-3)


def test_a_straight_edge_of_d_levels_has_gradient_d() -> None:
    image = np.full((32, 32, 3), 40, np.uint8)
    image[:, 16:] = 140
    config = make_views("cifar", {**BARE, "sobel_p": 1.0})
    got = views([encode(image)], config, (plain(1, sobel=[1]), plain(1)))[0][0]
    assert (got[:, 15:17] == 100).all()
    assert got[:, :15].max() == got[:, 17:].max() == 0


@pytest.mark.parametrize("profile", ["fast", "reference"])
def test_noise_is_gaussian_of_the_drawn_width_and_a_function_of_what_is_drawn(profile: str) -> None:
    """On mid grey, 60,000 values: mean within 5 standard errors, their law within the DKW bound; far windows differ.

    Equal draws give equal noise, and two windows far apart are uncorrelated.
    """
    from scipy.stats import norm

    image, size = np.full((128, 128, 3), 128, np.uint8), 128
    config = make_views("cifar", {**BARE, "size": size, "profile": profile, "noise_p": 1.0})
    draws = plain(3, noise=[10, 10, 10], noise_offset=[[3, 250], [3, 250], [200, 17]])
    data = [encode(image)] * 3
    got, rest = views(data, config, (draws, plain(3)))
    np.testing.assert_array_equal(got[0], got[1])
    assert (rest == 128).all()
    for view in (got[0], got[2]):
        values = np.sort((view - 128).ravel() / 10)
        assert abs(values.mean()) < 5 / np.sqrt(values.size)
        steps = np.arange(values.size) / values.size
        assert np.abs(norm.cdf(values) - steps).max() < np.sqrt(np.log(2 / 1e-6) / (2 * values.size)) + 1 / values.size
    assert abs(np.corrcoef(got[0].ravel(), got[2].ravel())[0, 1]) < 5 / np.sqrt(got[0].size)


@pytest.mark.parametrize("profile", ["fast", "reference"])
def test_cutout_sets_the_drawn_square_to_the_mean_and_leaves_the_rest(profile: str) -> None:
    """Zero after normalisation, whatever the image; a shape of 0 cuts nothing."""
    image = noise(32, 32)
    config = make_views("cifar", {**BARE, "mean": VIEWS["cifar"].mean, "profile": profile, "cutout_p": 1.0})
    cut = plain(1, hole_start=[[3, 20]], hole_shape=[[16, 12]])
    got, rest = (view[0] for view in views([encode(image)], config, (cut, plain(1))))
    hole = np.zeros((32, 32), bool)
    hole[3:19, 20:32] = True
    assert np.abs(got[hole]).max() <= 1e-3
    np.testing.assert_array_equal(got[~hole], rest[~hole])
    np.testing.assert_allclose(rest, image - 255 * np.array(config.mean), rtol=0, atol=1e-2)


@pytest.mark.parametrize("profile", ["fast", "reference"])
def test_all_operators_together_come_in_the_documented_order(profile: str) -> None:
    """Crop, flip, rotation, then blur and colour or, of the authors, colour and blur; solarize, Sobel, noise, cutout.

    Each is applied by NumPy to what the last gave.

    Solarizing jumps at its threshold, so what is within a level of it before may come out on the other side, and the
    gradient spreads that to its neighbours; everywhere else within 8 times what a view may be off (4 from the gradient
    kernels' two sums, 2 for both directions).
    """
    every = {f"{name}_p": 1.0 for name in ("rotation", "solarize", "sobel", "noise", "cutout", "blur")}
    config = make_views("stl10", {**LEVELS, "profile": profile, **every, "noise_sigma": 0.02})
    pictures = photos()[:2]
    data = [encode(image) for image in pictures]
    field = np.random.default_rng(0).standard_normal((96 + 256, 96 + 256, 3), np.float32)
    drawn = draw(config, seed=5, epoch=0, position=0, n=2)
    for draws, got in zip(drawn, views(data, config, drawn), strict=True):
        for i, image in enumerate(pictures):
            bare = Draws(**{**vars(draws), "window": 0 * draws.window + 1})
            if profile == "fast":
                want = expected(image, replace(config, jitter_p=0.0, grayscale_p=0.0), bare, i)
            else:
                want = expected_reference(image, config, bare, i)
            want = np.rot90(want, int(draws.angle[i]) // 90)
            border = "reflect" if profile == "fast" else "constant"
            want = oracle.blur(want, float(draws.sigma[i]), int(draws.window[i]), border)
            want = recoloured(want, draws, i) if profile == "fast" else want
            near = np.abs(want - 128).min(2) < 3
            near |= np.any([np.roll(near, shift, axis) for shift in (-1, 1) for axis in (0, 1)], 0)
            near |= np.any([np.roll(near, shift, axis) for shift in (-1, 1) for axis in (0, 1)], 0)
            want = oracle.sobel(oracle.solarize(want)).clip(0, 255)
            y, x = draws.noise_offset[i]
            want = (want + draws.noise[i] * field[y : y + 96, x : x + 96]).clip(0, 255)
            (top, left), (height, width) = draws.hole_start[i].astype(int), draws.hole_shape[i].astype(int)
            want[top : top + height, left : left + width] = 0  # LEVELS has mean 0
            off = np.abs(got[i] - want).max(2)[~near]
            assert off.size > 96 * 96 / 4
            assert off.max() <= 8 * (allowed(config, draws, i) if profile == "fast" else 0.8)


def test_the_second_view_may_have_a_distribution_of_its_own() -> None:
    """Changing the second leaves the first as it was, bit for bit, and gives the second what it would be as a first."""
    first = make_views("stl10", {"size": 48})
    second = make_views(first, {"crop_ratio": [1.0, 1.0], "crop_area": [0.5, 0.6], "jitter_p": 0.0, "solarize_p": 0.5})
    data = [encode(image) for image in photos() + extremes()]
    both = draw(first, second, seed=1, epoch=0, position=0, n=12)
    alone, other = (draw(c, seed=1, epoch=0, position=0, n=12) for c in (first, second))
    mixed = run_two(data, first, both, second=second)
    plain_first, plain_second = run_two(data, first, alone), run_two(data, second, other)
    np.testing.assert_array_equal(mixed[0], plain_first[0])
    np.testing.assert_array_equal(mixed[1], plain_second[1])
    assert not np.array_equal(mixed[1], plain_first[1])


@pytest.mark.parametrize("profile", ["fast", "reference"])
def test_the_distributions_are_those_of_the_paper_when_measured_on_views(profile: str) -> None:
    """What went in is forgotten and read off 2 x 1,000 views: factors from flat and two-tone images, sigma of an edge.

    Each by itself: brightness 1 +- 0.8, contrast, saturation, hue +- 0.2 turns, sigma uniform in [0.1, 2], seen from
    0.7 on; flips and grayscale by their rates. Kolmogorov-Smirnov with the DKW bound for 1e-6, and 0.01 for rounding.
    """
    num = 1000
    bound = np.sqrt(np.log(2 / 1e-6) / (2 * num))
    whole = {**BARE, "profile": profile, "crop_area": (1.0, 1.0), "crop_ratio": (1.0, 1.0)}

    def gap(values: NDArray[Any], low: float, high: float) -> float:
        steps = np.arange(len(values)) / len(values)
        return float(np.abs((np.sort(values) - low) / (high - low) - steps).max())

    def seen(image: Bytes, **changes: Any) -> list[NDArray[Any]]:
        config = make_views("cifar", {**whole, "size": 8, **changes})
        return copies(image, config, seed=4, num=num)

    def jittered(image: Bytes, name: str) -> list[NDArray[Any]]:
        others = dict.fromkeys({"brightness", "contrast", "saturation", "hue"} - {name}, 0.0)
        return seen(image, jitter_p=1.0, jitter_strength=1.0, **others)

    grey, tones, colour = (np.full((8, 8, 3), 64, np.uint8) for _ in range(3))
    tones[:, :4], tones[:, 4:], colour[:] = 90, 122, (140, 120, 100)
    for view in jittered(grey, "brightness"):
        assert gap(view[:, 0, 0, 0] / 64, 0.2, 1.8) < bound + 0.01
    for view in jittered(tones, "contrast"):
        assert gap((view[:, 0, 7, 0] - view[:, 0, 0, 0]) / 32, 0.2, 1.8) < bound + 0.01
        np.testing.assert_allclose(view[:, 0].mean((1, 2)), 106, atol=0.1)
    for view in jittered(colour, "saturation"):
        assert gap((view[:, 0, 0, 0] - view[:, 0, 0, 2]) / 40, 0.2, 1.8) < bound + 0.01
    for view in jittered(colour, "hue"):
        if profile == "reference":
            hues = np.array([colorsys.rgb_to_hsv(*pixel)[0] for pixel in view[:, 0, 0].tolist()])
            turns = (hues - colorsys.rgb_to_hsv(140, 120, 100)[0] + 0.5) % 1 - 0.5
        else:
            chroma = (view[:, 0, 0] @ oracle.YIQ.T)[:, 1:] @ (1, 1j)
            turns = np.angle(chroma / ((140, 120, 100) @ oracle.YIQ.T)[1:].dot((1, 1j))) / (2 * np.pi)
        assert gap(turns, -0.2, 0.2) < bound + 0.01
    for view in seen(tones, flip_p=0.5):
        assert abs((view[:, 0, 0, 0] > 100).mean() - 0.5) < bound
    for view in seen(colour, grayscale_p=0.2):
        assert abs((np.ptp(view[:, 0, 0], axis=1) < 0.5).mean() - 0.2) < bound
    edge = np.full((32, 32, 3), 28, np.uint8)
    edge[:, 16:] = 228
    for view in seen(edge, size=32, blur_p=1.0, blur_kernel=0.75):
        step, at = np.diff(view[:, 16, 8:24, 0].astype(float), axis=1) / 200, np.arange(15)
        mean = (step * at).sum(1)
        sigma = np.sqrt(np.maximum((step * at**2).sum(1) - mean**2, 0))
        sigma = sigma[sigma > 0.7]
        assert abs(len(sigma) / num - 1.3 / 1.9) < bound + 0.02  # cutting at 3 sigma takes up to 1.4 % of it
        assert gap(sigma, 0.7, 2.0) < np.sqrt(np.log(2 / 1e-6) / (2 * len(sigma))) + 0.02


@pytest.mark.parametrize("profile", ["fast", "reference"])
def test_views_have_the_moments_of_an_independent_pipeline(profile: str) -> None:
    """Mean and spread of each channel over 2 x 500 views of a photograph, against NumPy with random numbers of its own.

    Within 5 standard errors of the difference of two means over views.
    """
    image = photos()[1][::4, ::4]
    config = make_views("cifar", {**LEVELS, "profile": profile, "size": 16, "jitter_strength": 1.0, "blur_p": 0.5})
    num, rng = 500, np.random.default_rng(9)
    got = np.concatenate(copies(image, config, seed=3, num=num))
    height, width, _ = image.shape
    theirs = np.empty_like(got)
    for i in range(len(theirs)):
        offset, factors = rng.random(2), [*rng.uniform(0.2, 1.8, 3), rng.uniform(-0.2, 0.2)]
        order = rng.permutation(4) if rng.random() < 0.8 else [4] * 4
        gray, flip, sigma = rng.random() < 0.2, rng.random() < 0.5, rng.uniform(0.1, 2)
        window = config.max_window if rng.random() < 0.5 else 1
        if profile == "reference":
            box = oracle.authors_crop(height, width, rng.uniform(3 / 4, 4 / 3, 100), rng.random(100), offset)
            view = oracle.resize(image.astype(float), box, (16, 16), "cubic", antialias=False)
            view = oracle.blur(oracle.authors_colour(view, factors, order, gray), sigma, window, "constant")
        else:
            area, ratio = height * width * rng.uniform(0.08, 1, 10), np.exp(rng.uniform(*np.log([3 / 4, 4 / 3]), 10))
            box = oracle.crop(
                height,
                width,
                list(zip(np.sqrt(area / ratio), np.sqrt(area * ratio), strict=True)),
                offset,
                (3 / 4, 4 / 3),
            )
            view = oracle.resize(image.astype(float), box, (16, 16))
            names = ("brightness", "contrast", "saturation", "hue")
            values = dict(zip(names, [*factors[:3], 2 * np.pi * factors[3]], strict=True))
            view = oracle.jitter(view, values, [names[step] for step in order if step < 4], gray).clip(0, 255)
            view = oracle.blur(view, sigma, min(window, 2 * math.ceil(3 * sigma) + 1))
        theirs[i] = view[:, ::-1] if flip else view
    for name, moment in (("mean", lambda x: x.mean((1, 2))), ("spread", lambda x: x.std((1, 2)))):
        a, b = moment(got), moment(theirs)
        error = np.sqrt((a.var(0) + b.var(0)) / len(a))
        assert (np.abs(a.mean(0) - b.mean(0)) < 5 * error).all(), name


@pytest.mark.parametrize("profile", ["fast", "reference"])
def test_views_of_bare_pixels_are_those_of_the_same_pixels_encoded(profile: str) -> None:
    """Bit for bit, whatever the batch: no decoder, and with the fast profile no nodes for windows."""
    config = make_views("stl10", {"size": 32, "profile": profile})
    pixels = np.stack([noise(40, 56, seed) for seed in range(6)])
    drawn = draw(config, seed=1, epoch=0, position=0, n=6)
    asked: dict[str, Any] = {"batch_size": 6, "device_id": None, "num_threads": 2}
    graph = two_views(Encoding(raw=(40, 56)), config, lambda _: pixels, lambda _: drawn, **asked)
    plain_graph = plain_view(Encoding(raw=(40, 56)), config, lambda _: pixels, **asked)
    encoded = [encode(image) for image in pixels]
    for bare, decoded in zip(graph.run(), run_two(encoded, config, drawn), strict=True):
        np.testing.assert_array_equal(np.array(bare.as_array()), decoded)
    np.testing.assert_array_equal(np.array(plain_graph.run()[0].as_array()), run_plain(encoded, config))


# ---- kinds of images -----------------------------------------------------------------------------------------------


def test_every_kind_of_file_decodes_to_rgb_as_in_pillow() -> None:
    """Gray, palette, alpha, CMYK, progressive and rotated by EXIF; JPEG within 3 levels (another inverse DCT).

    EXIF orientation is ignored, as torchvision and timm do; transparency is dropped, not blended.
    """
    photo = Image.fromarray(photos()[0][50:114, 100:164])
    rotated = Image.Exif()
    rotated[0x0112] = 6
    alpha = photo.convert("RGBA")
    alpha.putalpha(Image.fromarray(np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))))
    kinds: list[tuple[Image.Image, str, dict[str, Any], int]] = [
        (photo, "PNG", {}, 0),
        (photo.convert("L"), "PNG", {}, 0),
        (photo.convert("P"), "PNG", {}, 0),
        (alpha, "PNG", {}, 0),
        (photo, "WEBP", {"lossless": True}, 0),
        (photo, "JPEG", {"quality": 95, "subsampling": 0}, 3),
        (photo, "JPEG", {"quality": 95, "subsampling": 0, "progressive": True}, 3),
        (photo, "JPEG", {"quality": 95, "subsampling": 0, "exif": rotated}, 3),
        (photo.convert("L"), "JPEG", {"quality": 95}, 3),
    ]
    files = []
    for image, format, options, _ in kinds:
        files.append(saved(image, format, **options))
    config = make_views("cifar", {**LEVELS, "size": 64})
    got = views(files, config, (plain(len(files)), plain(len(files))))[0]
    for view, data, (image, format, options, levels) in zip(got, files, kinds, strict=True):
        want = np.array(Image.open(io.BytesIO(data)).convert("RGB"), float)
        assert np.abs(view - want).max() <= levels, f"{format} {image.mode} {options}"


def test_images_that_do_not_decode_are_named_by_their_place() -> None:
    """The decoder's own words for each: cut, no image, too many pixels; the sound ones between are not named."""
    photo = photos()[0][:64, :64]
    jpeg, large = encode(photo, "JPEG"), encode(noise(65, 64))
    images = [encode(photo), jpeg[:20], jpeg, np.zeros(100, np.uint8), large, encode(photo)[:200], encode(photo)]
    found = Decoder(Encoding(max_pixels=64 * 64)).refused(images)
    assert sorted(found) == [1, 3, 4, 5]
    assert all(words and "\n" not in words and "C++" not in words for words in found.values())
    assert Decoder(Encoding()).refused(images[:1] + images[2:3]) == {}
    assert Decoder(Encoding()).refused([]) == {}


# ---- evaluation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
@pytest.mark.parametrize(("size", "share"), [(42, 0.875), (48, 1.0)])
def test_the_plain_view_is_resize_and_centre_crop(interpolation: str, size: int, share: float) -> None:
    """Shorter side to size / share, central square: the oracle's within half a level, torchvision's within one.

    torchvision truncates the longer side, stretches the image to it and may cut one pixel beside, so it is compared
    where no side is rounded; and it sees nothing beyond the image's edge, so not on the outermost two pixels. Pillow
    rounds between its passes too: 0.5 * 1.3 (the cubic's gain) + 0.5 + 0.5 for whole levels, so less than 2. It also
    clips there, so the photographs are made flat enough not to overshoot.
    """
    from torchvision.transforms.functional import InterpolationMode, center_crop, resize

    config = make_views("imagenet", {**LEVELS, "size": size, "eval_crop": share, "interpolation": interpolation})
    china, flower = (64 + photo // 2 for photo in photos()[:2])
    pictures = [flower[:192, :192], flower[:192, :320], china, china[:, :100], ramp(50, 300)]
    pictures += [flower[100:124, 100:124], flower[100:124, 100:136], china[50:80, 90:110]]  # smaller than the view
    data = [encode(image) for image in pictures]
    got, shorter = run_plain(data, config), round(size / share)
    mode = {"linear": InterpolationMode.BILINEAR, "cubic": InterpolationMode.BICUBIC}[interpolation]
    compared = 0
    for i, (view, image) in enumerate(zip(got, pictures, strict=True)):
        exact = oracle.centre_crop(image.astype(float), size, shorter, interpolation).clip(0, 255)
        assert np.abs(view - exact).max() <= 0.6, f"image {i}"  # 0.02 is DALI's table of the cubic
        scaled = np.array(image.shape[:2]) * shorter / min(image.shape[:2])
        if np.array_equal(scaled, scaled.round()) and ((scaled - size) % 2 == 0).all():
            theirs = center_crop(resize(Image.fromarray(image), [shorter], mode), [size, size])
            enlarged = interpolation == "cubic" and min(image.shape[:2]) < shorter  # cubic gain in both of its passes
            assert np.abs(view - np.array(theirs, float))[2:-2, 2:-2].max() <= 1 + enlarged
            compared += 1
    assert compared >= 3


# ---- GPU -----------------------------------------------------------------------------------------------------------


ALL = {f"{name}_p": 0.5 for name in ("rotation", "solarize", "sobel", "noise", "cutout")}


def nodes(graph: Any) -> list[tuple[str, str, Any]]:
    """(operator, "cpu", "gpu" or "mixed", node) of a graph; DALI has no public way to ask before it is built."""
    graph._build_graph()
    return [(getattr(node._op, "schema_name", type(node._op).__name__), node._op.device, node) for node in graph._ops]


def specify(graph: Any) -> list[tuple[str, str, Any]]:
    """The nodes of a GPU graph, once DALI has made the specification of each in C++, which needs no driver.

    Raises what DALI says of an argument or a device that is none of the operator's. Whether an operator has a backend
    for its device DALI asks only where there is a GPU, so that is looked up: LookupError.
    """
    found = nodes(graph)
    registered = {"cpu": backend.RegisteredCPUOps, "gpu": backend.RegisteredGPUOps, "mixed": backend.RegisteredMixedOps}
    for name, device, _ in found:
        names = {name, name.lstrip("_")}  # arithmetic and indexing are registered without it
        if not names & set(registered[device]()):
            raise LookupError(f"{name} has no {device} backend")
    graph._device_id = None
    assert graph.serialize()
    return found


@pytest.mark.parametrize("profile", ["fast", "reference"])
@pytest.mark.parametrize("raw", [None, (32, 32)])
@pytest.mark.parametrize("changes", [{}, ALL, {"size": 32, "interpolation": "cubic"}])
def test_every_gpu_graph_can_be_specified(profile: str, raw: tuple[int, int] | None, changes: dict[str, Any]) -> None:
    config, encoding = make_views("imagenet", {"profile": profile, **changes}), Encoding(raw=raw)
    asked: dict[str, Any] = {"batch_size": 4, "device_id": 0, "num_threads": 4}
    draws = draw(config, seed=0, epoch=0, position=0, n=4)
    for half in (False, True):
        specify(two_views(encoding, config, lambda _: [], lambda _: draws, half=half, **asked))
    specify(plain_view(encoding, config, lambda _: [], **asked))
    specify(_decoded(lambda _: [], encoding, device_id=0))


@pytest.mark.parametrize("profile", ["fast", "reference"])
def test_what_a_gpu_would_refuse_is_found_without_one(profile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fault is planted in the graph's own resize."""
    real = fn.resize
    planted: list[tuple[type[Exception], str, Any]] = [
        (KeyError, "antialais", lambda *given, **more: real(*given, antialais=True, **more)),
        (LookupError, "PeekImageShape has no gpu", lambda *given, **more: real(*given, **more) + _shape(given[0])),
        (RuntimeError, "incompatible device", lambda *given, **more: real(*given, device="cpu", **more)),
        (ValueError, "must be on CPU", lambda *given, **more: real(*given, **more | {"size": _shape(given[0])})),
    ]
    config = make_views("imagenet", {"profile": profile})
    asked: dict[str, Any] = {"batch_size": 1, "device_id": 0, "num_threads": 1}
    for error, words, fault in planted:
        monkeypatch.setattr(fn, "resize", fault)
        with pytest.raises(error, match=words):
            specify(two_views(Encoding(), config, lambda _: [], lambda _: (plain(1), plain(1)), **asked))


def _shape(image: Any) -> Any:
    return fn.peek_image_shape(image, device="gpu")


@pytest.mark.parametrize(("raw", "threads"), [(None, 4), ((8, 8), 8)])
def test_the_decoders_threads_are_among_those_asked_for(raw: tuple[int, int] | None, threads: int) -> None:
    """On a GPU it has as many as the executor, beside them and free to move; bare pixels need none."""
    config = make_views("cifar")
    asked: dict[str, Any] = {"batch_size": 1, "device_id": 0, "num_threads": 8}
    views = two_views(Encoding(raw=raw), config, lambda _: [], lambda _: (plain(1), plain(1)), **asked)
    for graph in (views, plain_view(Encoding(raw=raw), config, lambda _: [], **asked)):
        assert graph.num_threads == threads
        decoders = [node._op._init_args for name, _, node in nodes(graph) if name == "decoders__Image"]
        assert [given["affine"] for given in decoders] == ([] if raw else [False])
    on_cpu = plain_view(Encoding(raw=raw), config, lambda _: [], **asked | {"device_id": None})
    assert on_cpu.num_threads == 8


def test_the_pixels_of_a_gpu_never_come_back() -> None:
    """A copy to the CPU inside the graph would hold up the work there for the batch behind it."""
    for profile in ("fast", "reference"):
        config = make_views("imagenet", {"profile": profile, **ALL})
        asked: dict[str, Any] = {"batch_size": 1, "device_id": 0, "num_threads": 1}
        graph = two_views(Encoding(), config, lambda _: [], lambda _: (plain(1), plain(1)), **asked)
        for name, _, node in nodes(graph):
            for given in node.inputs:
                assert given.device == "gpu" or given.source._op.device == "cpu", f"{name} has an input copied back"


@pytest.mark.parametrize("profile", ["fast", "reference"])
@pytest.mark.parametrize(("preset", "changes"), [("imagenet", {}), ("cifar", {}), ("imagenet", ALL)])
def test_the_gpu_graph_can_be_defined_and_keeps_every_pixel_on_the_gpu(
    preset: str, profile: str, changes: dict[str, float]
) -> None:
    """Without a GPU, by DALI's schemas: each node has a backend on its device, takes its inputs from where they are,
    and knows its arguments; and all that touches pixels is on the GPU.

    What a GPU alone shows is in test_gpu_views_equal_cpu_views.
    """
    config = make_views(preset, {"profile": profile, **changes})
    data, draws = [encode(noise(8, 8))], (plain(1), plain(1))
    asked: dict[str, Any] = {"batch_size": 1, "device_id": 0, "num_threads": 1}
    plain_graph = plain_view(Encoding(), config, lambda _: data, **asked)
    graph = two_views(Encoding(), config, lambda _: data, lambda _: draws, **asked)
    for found in (specify(graph), specify(plain_graph)):
        assert len(found) > 4
        for name, device, node in found:
            schema = backend.GetSchema(name)
            for i, given in enumerate(node.inputs):
                wanted = "cpu"  # of every argument, and of what the decoder reads
                if device != "mixed" and i < node.spec.NumRegularInput():
                    wanted = schema.GetInputDevice(i, given.device, device)
                assert given.device == wanted, f"{name} on the {device} takes input {i} from the {wanted}"
            arguments = {**node._op._init_args, **node._op._call_args}
            assert arguments.get("jpeg_fancy_upsampling") or name != "decoders__Image"
            for argument in arguments:
                assert schema.HasArgument(argument), f"{name} knows no {argument}"
                assert not schema.IsDeprecatedArg(argument), f"{argument} of {name} is deprecated"
        on = {name: device for name, device, _ in found if device != "cpu"}
        assert on["decoders__Image"] == "mixed"
        assert on["Resize"] == on["CropMirrorNormalize"] == "gpu"
    devices: dict[str, set[str]] = {}
    for name, device, _ in nodes(graph):
        devices.setdefault(name, set()).add(device)
    expected = {"reductions__Mean"} | ({"CoordTransform"} if profile == "fast" else {"Stack", "Reinterpret"})
    expected |= ({"Filter"} if config.blur_p else set()) | ({"Rotate", "Erase"} if changes else set())
    assert all(devices[name] == {"gpu"} for name in expected)


@pytest.mark.gpu
@pytest.mark.parametrize("profile", ["fast", "reference"])
@pytest.mark.parametrize("changes", [{}, {"rotation_p": 0.5, "cutout_p": 0.5, "noise_p": 0.5}])
def test_gpu_views_equal_cpu_views(profile: str, changes: dict[str, float]) -> None:
    """The same draws on PNGs: at most what two graphs may each be off the oracle by, and 0.1 levels on average.

    Solarize and Sobel are left out, since what lies at a threshold may fall on either side.
    """
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: the GPU graph is only defined here, not run")
    config = make_views("stl10", {**LEVELS, "profile": profile, **changes})
    pictures = photos() + extremes()
    data = [encode(image) for image in pictures]
    drawn = draw(config, seed=2, epoch=1, position=0, n=12)
    on_cpu, on_gpu = (run_two(data, config, drawn, device) for device in (None, 0))
    for draws, cpu, gpu in zip(drawn, on_cpu, on_gpu, strict=True):
        for i in range(12):
            off = np.abs(cpu[i] - gpu[i])
            assert off.max() <= 2 * (allowed(config, draws, i) if profile == "fast" else 0.8), f"image {i}"
        assert np.abs(cpu - gpu).mean() < 0.1


@pytest.mark.gpu
def test_gpu_decodes_colour_at_half_the_size_as_the_cpu_does() -> None:
    """4:2:0, as most JPEGs are: two inverse DCTs apart; without interpolation the stripes would be off by 45 levels."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: the GPU graph is only defined here, not run")
    stripes = np.tile(np.repeat(np.uint8([[200, 40, 40], [40, 120, 40]]), 6, axis=0), (96, 8, 1))
    data = [encode(image, "JPEG", quality=95, subsampling=2) for image in (stripes, *photos()[:2])]
    config = make_views("stl10", LEVELS)
    cpu, gpu = (run_plain(data, config, device) for device in (None, 0))
    assert np.abs(cpu - gpu).max() <= 10
    assert np.abs(cpu - gpu).mean() < 1
