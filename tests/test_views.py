"""What is drawn follows the published laws, and is a pure function of (seed, epoch, position).

Statistical bounds are distribution-free: 20,000 independent draws stray from a distribution by more than `bound` with
probability at most 1e-6 (Dvoretzky, Kiefer, Wolfowitz; Hoeffding for a rate), for any law. Seeds are fixed.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.views import ATTEMPTS, VIEWS, Draws, ViewConfig, check_pair, draw, make_views, windows
from tests.oracles import views as oracle

NUM = 20_000
FALSE_ALARM = 1e-6
LAWS = ["imagenet", "cifar"]  # strengths 1 and 0.5, with and without blur
Array = NDArray[Any]


def bound(num: int) -> float:
    return math.sqrt(math.log(2 / FALSE_ALARM) / (2 * num))


def distance(values: Array, cdf: Callable[[Array], Array]) -> float:
    """Largest distance between the empirical distribution of `values` and `cdf`."""
    expected = cdf(np.sort(values.ravel()))
    steps = np.arange(expected.size + 1) / expected.size
    return float(max((steps[1:] - expected).max(), (expected - steps[:-1]).max()))


def uniform(low: float, high: float) -> Callable[[Array], Array]:
    return lambda x: (x - low) / (high - low)


def factors(view: Draws) -> dict[str, Array]:
    """Brightness, contrast, saturation and hue angle that the matrices A (x -> A x + B m) and B amount to.

    On greys A is brightness times contrast and A + B is brightness; in YIQ, A is a scaled turn of the chroma.
    """
    A, B = view.colour.astype(np.float64), view.mean_colour.astype(np.float64)
    luma, shift = A.sum(2).mean(1), B.sum(2).mean(1)
    chroma = (oracle.YIQ @ A @ np.linalg.inv(oracle.YIQ))[:, 1:, 1:]
    turned = chroma[:, 0, 0] + 1j * chroma[:, 1, 0]
    return {
        "brightness": luma + shift,
        "contrast": luma / (luma + shift),
        "saturation": np.abs(turned) / luma,
        "hue": np.angle(turned),
    }


def is_gray(view: Draws) -> Array:
    """Whether all three channels come out the same."""
    return np.ptp(view.colour, axis=1).max(1) < 1e-6


def is_jittered(view: Draws) -> Array:
    """Whether colour is touched by anything but grayscale."""
    return (np.abs(view.colour.sum(2) - 1).max(1) > 1e-6) | (np.abs(view.mean_colour).max((1, 2)) > 1e-6)


def columns(view: Draws) -> dict[str, Array]:
    """One number per image for everything that is drawn."""
    found: dict[str, Array] = {f"area{i}": view.width[:, i] * view.height[:, i] for i in (0, 1, ATTEMPTS - 1)}
    found |= {f"ratio{i}": np.log(view.width[:, i] / view.height[:, i]) for i in (0, 1, ATTEMPTS - 1)}
    found |= {"y": view.offset[:, 0], "x": view.offset[:, 1], "mirror": view.mirror, "sigma": view.sigma}
    found |= {"blurred": view.window > 1, "gray": is_gray(view), "jittered": is_jittered(view)}
    # saturation and hue cannot be told from a gray view, so a number that exists for all stands in for them
    found |= {"brightness": factors(view)["brightness"], "contrast": factors(view)["contrast"]}
    return {name: np.asarray(column, np.float64) for name, column in found.items()}


@pytest.fixture(scope="module", params=LAWS)
def drawn(request: pytest.FixtureRequest) -> tuple[ViewConfig, tuple[Draws, Draws]]:
    config = VIEWS[request.param]
    return config, draw(config, seed=11, epoch=3, position=0, n=NUM)


def rows(view: Draws, which: slice) -> dict[str, Array]:
    return {field.name: getattr(view, field.name)[which] for field in dataclasses.fields(view)}


def same(a: dict[str, Array], b: dict[str, Array]) -> bool:
    return all(np.array_equal(a[name], b[name]) for name in a)


# ---- purity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("position", "n"), [(0, 1), (0, 7), (13, 1), (13, 50), (63, 1)])
def test_a_position_gets_the_same_draws_whatever_batch_it_is_part_of(position: int, n: int) -> None:
    whole = draw(VIEWS["imagenet"], seed=5, epoch=2, position=0, n=64)
    part = draw(VIEWS["imagenet"], seed=5, epoch=2, position=position, n=n)
    for view, view_part in zip(whole, part, strict=True):
        assert same(rows(view, slice(position, position + n)), rows(view_part, slice(None)))


def test_seed_epoch_position_and_view_each_change_every_draw() -> None:
    """Continuous draws never coincide; seed and epoch do not stand in for each other; position may be huge."""
    config = VIEWS["imagenet"]
    places = [(5, 2, 0), (6, 2, 0), (5, 3, 0), (2, 5, 0), (5, 2, 64), (5, 2, 2**40), (2**63 - 1, 2, 0), (5, 2**31, 0)]
    views = [view for s, e, p in places for view in draw(config, seed=s, epoch=e, position=p, n=64)]
    for a, b in itertools.combinations(views, 2):
        for name in ("width", "height", "offset", "sigma"):
            assert not np.isclose(getattr(a, name), getattr(b, name), rtol=1e-6, atol=0).all(), name
        # 1,280 crop candidates each: by chance a few agree to 1e-6, a shared stream would make all of them agree
        assert np.isclose(a.width, b.width, rtol=1e-6, atol=0).mean() < 0.05
        assert np.mean(np.abs(a.colour - b.colour).max((1, 2)) < 1e-6) < 0.25  # 4 % of pairs are both left alone


def test_draws_have_the_types_and_shapes_that_the_graph_is_fed() -> None:
    """float32 and int32, finite, and never an even or empty blur window."""
    for view in draw(VIEWS["stl10"], seed=0, epoch=0, position=0, n=33):
        shapes = {name: (array.shape[1:], array.dtype.name) for name, array in rows(view, slice(None)).items()}
        assert shapes == {
            "width": ((ATTEMPTS,), "float32"),
            "height": ((ATTEMPTS,), "float32"),
            "ratio": ((ATTEMPTS,), "float32"),
            "share": ((ATTEMPTS,), "float32"),
            "offset": ((2,), "float32"),
            "colour": ((3, 3), "float32"),
            "mean_colour": ((3, 3), "float32"),
            "sigma": ((), "float32"),
            "window": ((), "int32"),
            "mirror": ((), "int32"),
            "order": ((4,), "int32"),
            "factors": ((4,), "float32"),
            "gray": ((), "int32"),
            "angle": ((), "float32"),
            "threshold": ((), "float32"),
            "sobel": ((), "int32"),
            "noise": ((), "float32"),
            "noise_offset": ((2,), "int32"),
            "hole_start": ((2,), "float32"),
            "hole_shape": ((2,), "float32"),
        }
        assert all(len(array) == 33 and np.isfinite(array).all() for array in rows(view, slice(None)).values())
        assert (view.window % 2 == 1).all()
        assert (view.window >= 1).all()
        assert (view.sigma > 0).all()


# ---- laws ----------------------------------------------------------------------------------------------------------


def test_crop_candidates_have_uniform_area_and_log_uniform_ratio(drawn: tuple[ViewConfig, Any]) -> None:
    """Every one of the ten: area share uniform in [0.08, 1], log(width / height) uniform in log [3/4, 4/3]."""
    _, views = drawn
    for view, i in itertools.product(views, range(ATTEMPTS)):
        area, ratio = view.width[:, i] * view.height[:, i], np.log(view.width[:, i] / view.height[:, i])
        assert distance(area, uniform(0.08, 1)) < bound(NUM)
        assert distance(ratio, uniform(math.log(3 / 4), math.log(4 / 3))) < bound(NUM)
        assert 0.08 - 1e-6 < area.min() < 0.081  # the ends are reached: 0.081 is missed with probability 4e-10
        assert 0.999 < area.max() < 1 + 1e-6


def test_crop_offsets_are_uniform(drawn: tuple[ViewConfig, Any]) -> None:
    for view, axis in itertools.product(drawn[1], (0, 1)):
        assert distance(view.offset[:, axis], uniform(0, 1)) < bound(NUM)


@pytest.mark.parametrize(("height", "width"), [(5000, 3750), (4000, 4000), (1000, 4000)])
def test_crops_taken_follow_torchvisions_random_resized_crop(height: int, width: int) -> None:
    """The first candidate that fits has the law of RandomResizedCrop.get_params: area, ratio and both positions.

    Two samples of 8,000, both in whole pixels as torchvision's are. Asymptotic two-sample Kolmogorov-Smirnov bound,
    false alarm 1e-6 each. Of a 1:4 image a seventh of the crops are the fallback.
    """
    import torch
    from torchvision.transforms import RandomResizedCrop

    num = 8000
    view = draw(VIEWS["imagenet"], seed=1, epoch=0, position=0, n=num)[0]
    unit = math.sqrt(height * width)
    ours = np.array(
        [
            oracle.crop(height, width, list(zip(unit * h, unit * w, strict=True)), offset, (3 / 4, 4 / 3))
            for h, w, offset in zip(view.height, view.width, view.offset, strict=True)
        ]
    ).round()
    torch.manual_seed(0)
    image = torch.empty(1, 1, 1).expand(1, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(num)], float)
    limit = math.sqrt(math.log(2 / FALSE_ALARM) / 2 * (2 / num))
    for name, read in {
        "area": lambda box: box[:, 2] * box[:, 3],
        "ratio": lambda box: box[:, 3] / box[:, 2],
        "top": lambda box: box[:, 0] / height,
        "left": lambda box: box[:, 1] / width,
    }.items():
        a, b = np.sort(read(ours)), np.sort(read(theirs))
        grid = np.concatenate([a, b])
        gap = np.abs(np.searchsorted(a, grid, "right") - np.searchsorted(b, grid, "right")).max() / num
        assert gap < limit, f"{name}: the distributions are {gap:.3f} apart, expected less than {limit:.3f}"


@pytest.mark.parametrize(("height", "width"), [(32, 32), (96, 64), (10, 200), (1000, 4000)])
def test_windows_are_the_first_candidates_that_fit_or_the_central_fallback(height: int, width: int) -> None:
    """Of 10 x 200 all miss, of 1000 x 4000 a seventh, of the others about none; by the oracle, in float32.

    Those that are flipped start at their right end.
    """
    config = VIEWS["cifar"]
    view = draw(config, seed=1, epoch=0, position=0, n=1000)[1]
    unit = math.sqrt(height * width)
    boxes = np.array(
        [
            oracle.crop(height, width, list(zip(unit * h, unit * w, strict=True)), offset, config.crop_ratio)
            for h, w, offset in zip(view.height, view.width, view.offset, strict=True)
        ]
    ) / [height, width, height, width]
    start, end = windows(view, config, height, width)
    assert (start.dtype, end.dtype, start.shape) == (np.float32, np.float32, (1000, 2))
    assert (start[:, 0] < end[:, 0]).all()
    np.testing.assert_array_equal(start[:, 1] > end[:, 1], view.mirror)
    start, end = np.minimum(start, end), np.maximum(start, end)
    np.testing.assert_allclose(start, boxes[:, :2], atol=1e-6)
    np.testing.assert_allclose(end, boxes[:, :2] + boxes[:, 2:], atol=1e-6)
    assert start.min() >= 0
    assert end.max() <= 1 + 1e-6


@pytest.mark.parametrize(("height", "width"), [(375, 500), (32, 32), (400, 100)])
def test_reference_crops_follow_the_law_of_the_authors(height: int, width: int) -> None:
    """The graph's ten attempts have the law of sample_distorted_bounding_box with a hundred and uniforms of its own.

    Whole pixels, two samples of 8,000, asymptotic two-sample Kolmogorov-Smirnov bound, false alarm 1e-6 each. Crops are
    smaller than torchvision's: mean area 0.39 against 0.43 at 375 x 500. All hold a tenth of the image.
    """
    num = 8000
    config = make_views("imagenet", {"profile": "reference"})
    view = draw(config, seed=1, epoch=0, position=0, n=num)[1]
    rows = zip(view.ratio.tolist(), view.share.tolist(), view.offset.astype(float), strict=True)
    ours = np.array([oracle.authors_crop(height, width, *row) for row in rows], float)
    rng = np.random.default_rng(0)
    theirs = np.array(
        [
            oracle.authors_crop(height, width, rng.uniform(3 / 4, 4 / 3, 100), rng.random(100), rng.random(2))
            for _ in range(num)
        ],
        float,
    )
    limit = math.sqrt(math.log(2 / FALSE_ALARM) / 2 * (2 / num))
    assert (ours[:, 2] * ours[:, 3]).min() >= 0.1 * height * width
    for name, read in {
        "area": lambda box: box[:, 2] * box[:, 3],
        "ratio": lambda box: box[:, 3] / box[:, 2],
        "top": lambda box: box[:, 0],
        "left": lambda box: box[:, 1],
    }.items():
        a, b = np.sort(read(ours)), np.sort(read(theirs))
        grid = np.concatenate([a, b])
        gap = np.abs(np.searchsorted(a, grid, "right") - np.searchsorted(b, grid, "right")).max() / num
        assert gap < limit, f"{name}: the distributions are {gap:.3f} apart, expected less than {limit:.3f}"
    if (height, width) == (375, 500):
        assert abs((ours[:, 2] * ours[:, 3]).mean() / (height * width) - 0.39) < 0.01


@pytest.mark.parametrize("preset", LAWS)
def test_reference_draws_take_all_orders_alike_and_factors_in_their_ranges(preset: str) -> None:
    """24 orders, each within a DKW bound of 1/24 of the jittered; factors as drawn for the fast profile, in floats.

    The order is independent of what the operations do, and of the other view's.
    """
    config = make_views(preset, {"profile": "reference"})
    views = draw(config, seed=11, epoch=3, position=0, n=NUM)
    codes = []
    for view in views:
        jittered = view.order[:, 0] < 4
        assert abs(jittered.mean() - 0.8) < bound(NUM)
        assert (view.order[~jittered] == 4).all()
        assert (view.factors[~jittered] == (1, 1, 1, 0)).all()
        assert (np.sort(view.order[jittered], 1) == range(4)).all()
        codes.append(view.order.astype(float) @ (64, 16, 4, 1))
        rates = np.unique(codes[-1][jittered], return_counts=True)[1] / jittered.sum()
        assert len(rates) == 24
        assert np.abs(rates - 1 / 24).max() < 2 * bound(jittered.sum())
        s = config.jitter_strength
        for column, (low, high) in enumerate([(1 - 0.8 * s, 1 + 0.8 * s)] * 3 + [(-0.2 * s, 0.2 * s)]):
            values = view.factors[jittered, column].astype(float)
            assert distance(values, uniform(low, high)) < bound(len(values))
            assert abs(np.corrcoef(values, codes[-1][jittered])[0, 1]) < 5.7 / math.sqrt(len(values))
        assert abs(view.gray.mean() - 0.2) < bound(NUM)
        blurred = view.window > 1
        assert set(view.window[blurred]) <= {config.max_window}
    assert abs(np.corrcoef(*codes)[0, 1]) < 5.7 / math.sqrt(NUM)


def test_profiles_draw_the_same_numbers() -> None:
    """So that one can be shown beside the other: flips, strengths, grayscale, sigma; factors within float32."""
    fast, reference = (
        draw(make_views("imagenet", {"profile": profile}), seed=1, epoch=0, position=0, n=500)[0]
        for profile in ("fast", "reference")
    )
    for name in ("mirror", "sigma", "gray", "factors", "offset"):
        np.testing.assert_array_equal(getattr(fast, name), getattr(reference, name))
    np.testing.assert_array_equal(fast.window > 1, reference.window > 1)
    visible = ~is_gray(fast)
    found = factors(fast)
    np.testing.assert_allclose(found["brightness"], reference.factors[:, 0], atol=1e-5)
    np.testing.assert_allclose(found["saturation"][visible], reference.factors[visible, 2], atol=1e-5)
    np.testing.assert_allclose(found["hue"][visible], -2 * np.pi * reference.factors[visible, 3], atol=1e-5)


EXTRAS = {
    f"{name}_p": p
    for name, p in zip(("rotation", "solarize", "sobel", "noise", "cutout"), (0.1, 0.3, 0.5, 0.7, 0.9), strict=True)
}


def test_further_operators_are_drawn_at_their_rates_with_their_laws_and_change_no_other_draw() -> None:
    """Each rate its own; turns uniform over four, holes and windows of noise uniform in place; all independent."""
    config = make_views("stl10", EXTRAS)
    plain, views = (draw(c, seed=2, epoch=1, position=0, n=NUM) for c in (VIEWS["stl10"], config))
    untouched = {"angle": 0, "threshold": 256, "sobel": 0, "noise": 0, "hole_shape": 0}
    for without, view in zip(plain, views, strict=True):
        for name in set(vars(view)) - {*untouched, "noise_offset", "hole_start"}:
            np.testing.assert_array_equal(getattr(without, name), getattr(view, name))
        assert all((getattr(without, name) == value).all() for name, value in untouched.items())
        assert set(view.angle) == {0, 90, 180, 270}
        assert set(view.threshold) == {128, 256}
        assert set(view.noise) == {0, np.float32(25.5)}
        for angle in (90, 180, 270):
            assert abs((view.angle == angle).mean() - 0.1 / 4) < bound(NUM)
        cut = view.hole_shape.min(1) > 0
        for rate, drawn in ((0.3, view.threshold < 256), (0.5, view.sobel == 1), (0.7, view.noise > 0), (0.9, cut)):
            assert abs(drawn.mean() - rate) < bound(NUM)
        # 48 pixels around a centre uniform in 96, cut at the border
        top, height = view.hole_start[cut, 0], view.hole_shape[cut, 0]
        assert ((top >= 0) & (top + height <= 96) & (height >= 24) & (height <= 48)).all()
        assert abs((height == 48).mean() - 0.5) < bound(cut.sum()) + 1 / 96
        middle = np.where(top == 0, top + height - 24, top + 24)
        assert (
            distance(middle + 1e-3 * np.arange(len(middle)) / len(middle), uniform(0, 96)) < bound(cut.sum()) + 1 / 96
        )
        for axis in (0, 1):
            assert (view.noise_offset[:, axis].min(), view.noise_offset[:, axis].max()) == (0, 255)
            assert distance(view.noise_offset[:, axis] + 0.5, uniform(0, 256)) < bound(NUM) + 1 / 256
    names = ("angle", "threshold", "sobel", "noise", "mirror", "sigma")
    for a, b in itertools.product(names, names):
        assert abs(np.corrcoef(getattr(views[0], a), getattr(views[1], b))[0, 1]) < 5.7 / math.sqrt(NUM), (a, b)
        if a < b:
            assert abs(np.corrcoef(getattr(views[0], a), getattr(views[0], b))[0, 1]) < 5.7 / math.sqrt(NUM), (a, b)


def test_a_rank_draws_for_its_positions_what_one_process_draws_for_them() -> None:
    """Two views of different distributions, with every operator: four ranks of 8 are the batch of 32."""
    first, second = make_views("stl10", EXTRAS), make_views("stl10", {"jitter_p": 0.0, "cutout_p": 0.5})
    whole = draw(first, second, seed=5, epoch=2, position=64, n=32)
    for rank in range(4):
        part = draw(first, second, seed=5, epoch=2, position=64 + 8 * rank, n=8)
        for view, view_part in zip(whole, part, strict=True):
            assert same(rows(view, slice(8 * rank, 8 * rank + 8)), rows(view_part, slice(None)))
    assert same(rows(whole[0], slice(None)), rows(draw(first, seed=5, epoch=2, position=64, n=32)[0], slice(None)))
    assert same(rows(whole[1], slice(None)), rows(draw(second, seed=5, epoch=2, position=64, n=32)[1], slice(None)))


def test_rates_are_those_of_the_paper(drawn: tuple[ViewConfig, Any]) -> None:
    """Flip 0.5, jitter 0.8, grayscale 0.2, blur 0.5 (CIFAR: never)."""
    config, views = drawn
    for view in views:
        # a jitter that changes nothing to float32 precision has probability 0
        rates = (view.mirror.mean(), is_jittered(view).mean(), is_gray(view).mean(), (view.window > 1).mean())
        for rate, expected in zip(rates, (0.5, 0.8, 0.2, 0.5 if config.size > 32 else 0), strict=True):
            assert abs(rate - expected) < bound(NUM) if expected else rate == 0


def test_colour_factors_are_uniform_in_their_ranges(drawn: tuple[ViewConfig, Any]) -> None:
    """Brightness, contrast, saturation in 1 +- 0.8 s, hue in +- 0.2 s turns, recovered from the matrices."""
    config, views = drawn
    s = config.jitter_strength
    for view in views:
        jittered = is_jittered(view)
        visible = jittered & ~is_gray(view)  # of a gray view neither saturation nor hue can be told
        found = factors(view)
        for name in ("brightness", "contrast", "saturation"):
            values = found[name][visible if name == "saturation" else jittered]
            assert distance(values, uniform(1 - 0.8 * s, 1 + 0.8 * s)) < bound(len(values))
        assert distance(found["hue"][visible] / (2 * np.pi), uniform(-0.2 * s, 0.2 * s)) < bound(visible.sum())


def test_each_colour_operation_has_its_own_strength_and_draw() -> None:
    """Four different strengths: each shapes its own factor only, and no two factors of an image are correlated."""
    strengths = {"brightness": 0.1, "contrast": 0.2, "saturation": 0.3, "hue": 0.05}
    config = make_views("imagenet", {**strengths, "jitter_p": 1.0, "grayscale_p": 0.0})
    view = draw(config, seed=1, epoch=0, position=0, n=NUM)[0]
    found = factors(view)
    for name, strength in strengths.items():
        middle, unit = (0, 2 * np.pi) if name == "hue" else (1, 1)
        assert distance(found[name] / unit, uniform(middle - strength, middle + strength)) < bound(NUM), name
    for a, b in itertools.combinations([*found.values(), *view.offset.T, view.sigma], 2):
        assert abs(np.corrcoef(a, b)[0, 1]) < 5.7 / math.sqrt(NUM)


def test_factors_are_cut_at_zero() -> None:
    """Strength 2 asks for 1 +- 1.6; negative factors would invert the picture, so the range is [0, 2.6]."""
    config = make_views("imagenet", {"jitter_strength": 2.0, "jitter_p": 1.0, "grayscale_p": 0.0})
    brightness = factors(draw(config, seed=0, epoch=0, position=0, n=NUM)[0])["brightness"]
    assert distance(brightness, uniform(0, 2.6)) < bound(NUM)


def test_colour_is_left_alone_without_jitter_and_grayscale(drawn: tuple[ViewConfig, Any]) -> None:
    """To the last bit of float32: A is the identity, or the grey of the pixel, and B is zero."""
    view = drawn[1][0]
    rest = ~is_jittered(view)
    gray = rest & is_gray(view)
    assert (view.mean_colour[rest] == 0).all()
    np.testing.assert_allclose(
        view.colour[rest & ~gray], np.broadcast_to(np.eye(3), (sum(rest & ~gray), 3, 3)), atol=6e-8
    )
    np.testing.assert_allclose(view.colour[gray], np.broadcast_to(oracle.LUMA, (gray.sum(), 3, 3)), atol=6e-8)
    assert gray.sum() > 100
    assert (rest & ~gray).sum() > 100


def test_blur_is_uniform_in_sigma_and_its_window_holds_three_sigma_up_to_the_authors_kernel() -> None:
    """Kernels of at most 23, 9 and 3 pixels at 224, 96 and 32 (a tenth of the height, made odd)."""
    for size, kernel in ((224, 23), (96, 9), (32, 3)):
        config = make_views("imagenet", {"size": size})
        view = draw(config, seed=9, epoch=0, position=0, n=NUM)[1]
        assert config.max_window == kernel
        assert distance(view.sigma, uniform(0.1, 2)) < bound(NUM)
        blurred = view.window > 1
        radius = np.array([min(math.ceil(3 * sigma), kernel // 2) for sigma in view.sigma.astype(float)])
        np.testing.assert_array_equal(view.window[blurred], 2 * radius[blurred] + 1)
        assert distance(view.sigma[blurred], uniform(0.1, 2)) < bound(blurred.sum())


def test_all_draws_of_an_image_are_independent_of_each_other_of_the_other_view_and_of_the_next_image(
    drawn: tuple[ViewConfig, Any],
) -> None:
    """Every correlation stays below 5.7 standard errors: 1.2e-8 each, 1e-5 for all 1,000 together.

    Within a view, contrast and brightness exist only together (where jittered), so those three are left out there.
    """
    first, second = (columns(view) for view in drawn[1])
    together = {"jittered", "brightness", "contrast"}

    def correlated(a: Array, b: Array) -> bool:
        return min(a.std(), b.std()) > 0 and abs(np.corrcoef(a, b)[0, 1]) > 5.7 / math.sqrt(len(a))

    for a, b in itertools.product(first, second):
        assert not correlated(first[a], second[b]), f"{a} of view 1 and {b} of view 2"
        assert not correlated(first[a][1:], first[b][:-1]), f"{a} and {b} of the image before"
    for a, b in itertools.combinations(first, 2):
        if not {a, b} <= together:
            assert not correlated(first[a], first[b]), f"{a} and {b} of one view"


# ---- colour --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", LAWS)
def test_the_matrices_are_the_operations_one_by_one_in_any_order(preset: str) -> None:
    """A x + B m equals brightness, contrast, saturation and hue applied in float64 in each of the 24 orders.

    So a random order would change nothing as long as nothing is clipped. Images lie in [0, 1]; float32 matrices of
    norm up to 10 leave 10 * 2**-24 = 6e-7, and as much again for recovering the factors from them.
    """
    view = draw(VIEWS[preset], seed=4, epoch=0, position=0, n=40)[0]
    found, gray = factors(view), is_gray(view)
    rng = np.random.default_rng(0)
    for i in range(len(view.sigma)):
        x = rng.random((6, 5, 3))
        ours = x @ view.colour[i].T.astype(float) + view.mean_colour[i].astype(float) @ x.mean((0, 1))
        one = {name: values[i] for name, values in found.items()}
        if gray[i]:
            one |= {"saturation": 1.0, "hue": 0.0}
        for order in oracle.ORDERS:
            np.testing.assert_allclose(ours, oracle.jitter(x, one, order, gray[i]), rtol=0, atol=1.2e-6)


def test_all_of_the_colour_law_is_exercised_by_that_comparison() -> None:
    """Jittered, gray, both and neither are all among its 40 images."""
    view = draw(VIEWS["imagenet"], seed=4, epoch=0, position=0, n=40)[0]
    kinds = set(zip(is_jittered(view).tolist(), is_gray(view).tolist(), strict=True))
    assert kinds == {(False, False), (False, True), (True, False), (True, True)}


# ---- presets and refusals ------------------------------------------------------------------------------------------


def test_presets_hold_the_published_numbers() -> None:
    """Chen et al. 2020, appendix A and B.9: strength 0.5 and no blur for CIFAR, otherwise one distribution."""
    for name, config in VIEWS.items():
        assert (config.crop_area, config.crop_ratio) == ((0.08, 1.0), (3 / 4, 4 / 3)), name
        assert (config.flip_p, config.jitter_p, config.grayscale_p) == (0.5, 0.8, 0.2), name
        assert (config.brightness, config.contrast, config.saturation, config.hue) == (0.8, 0.8, 0.8, 0.2), name
        assert config.blur_sigma == (0.1, 2.0), name
    assert {name: (c.size, c.jitter_strength, c.blur_p) for name, c in VIEWS.items()} == {
        "imagenet": (224, 1.0, 0.5),
        "cifar": (32, 0.5, 0.0),
        "stl10": (96, 1.0, 0.5),
    }


def test_changes_apply_to_a_preset_and_leave_the_rest() -> None:
    """Lists become tuples and whole numbers floats, as TOML and JSON give them."""
    config = make_views("cifar", {"size": 64, "crop_area": [0.2, 1.0], "jitter_strength": 1})
    assert config == dataclasses.replace(VIEWS["cifar"], size=64, crop_area=(0.2, 1.0), jitter_strength=1.0)
    assert isinstance(config.jitter_strength, float)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"colour": 1.0}, "colour"),
        ({"size": 4}, "size"),
        ({"size": 32.5}, "size"),
        ({"flip_p": 1.5}, "flip_p"),
        ({"flip_p": True}, "flip_p"),
        ({"blur_p": -0.1}, "blur_p"),
        ({"crop_area": [0.5, 0.2]}, "crop_area"),
        ({"crop_area": [0.5, 1.2]}, "crop_area"),
        ({"crop_ratio": [1.0]}, "crop_ratio"),
        ({"blur_sigma": [0.0, 2.0]}, "blur_sigma"),
        ({"hue": -0.1}, "hue"),
        ({"mean": [0.5, 0.5]}, "mean"),
        ({"std": [0.5, 0.5, 0.0]}, "std"),
        ({"interpolation": "lanczos"}, "interpolation"),
        ({"eval_crop": 0.0}, "eval_crop"),
        ({"mean": ["a", 0, 0]}, "mean"),
        ({"jitter_strength": math.nan}, "jitter_strength"),
        ({"blur_kernel": 0.0}, "blur_kernel"),
        ({"profile": "exact"}, "profile"),
        ({"cutout_p": 2.0}, "cutout_p"),
        ({"cutout_size": 0.0}, "cutout_size"),
        ({"noise_sigma": -1.0}, "noise_sigma"),
    ],
)
def test_views_that_make_no_sense_are_refused_by_name(changes: dict[str, Any], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        make_views("imagenet", changes)


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'imagenet22k'.*imagenet, cifar, stl10"):
        make_views("imagenet22k")


@pytest.mark.parametrize(
    ("name", "value"), [("size", 96), ("profile", "reference"), ("mean", [0.5, 0.5, 0.5]), ("std", [0.5, 0.5, 0.5])]
)
def test_two_views_that_cannot_make_one_batch_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}: both views"):
        check_pair(VIEWS["imagenet"], make_views("imagenet", {name: value}))
