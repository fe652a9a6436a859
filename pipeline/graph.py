"""The DALI graphs, one definition for CPU and GPU: two augmented views, and the plain view for evaluation.

Encoded images come from pipeline/reader.py, are decoded once, and leave as (n, size, size, 3). All randomness is drawn
in pipeline/views.py and enters as numbers beside the images, so the graph itself draws nothing and has no state. On a
CPU the graph may stop before colour, which pipeline/colour.py then adds faster. EXIF orientation is ignored, as
torchvision, timm and the authors do.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from nvidia.dali import fn, math, pipeline_def, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline

from pipeline.images import MAX_PIXELS
from pipeline.reader import Bytes
from pipeline.views import ATTEMPTS, NOISE_WINDOWS, OPERATIONS, Draws, ViewConfig, check_pair, windows

CROPS = frozenset({"width", "height", "ratio", "share", "offset", "mirror"})  # what decides the window of a view
COLOUR = ("colour", "mean_colour")
_INTERP = {"linear": types.INTERP_LINEAR, "cubic": types.INTERP_CUBIC}


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """What the images of a data set are, and how they are decoded."""

    raw: tuple[int, int] | None = None  # (height, width) if they come as pixels of this size, and need no decoder
    max_pixels: int = MAX_PIXELS  # larger images are an error, whatever a header claims
    hw_decoder_load: float = 0.65  # share of a batch's JPEGs for the GPU's hardware decoder, if it has one; DALI's own


CHECKED_AT_ONCE = 16  # images that a `Decoder` holds decoded
Images = Callable[[int], list[Bytes] | Bytes]  # the i-th batch: n encoded images, or pixels (n, H, W, 3)


def _encoded(images: Images, encoding: Encoding, gpu: bool) -> DataNode:
    return fn.external_source(
        lambda info: images(info.iteration),
        batch=True,
        batch_info=True,
        dtype=types.UINT8,
        layout="HWC" if encoding.raw else None,
        no_copy=not gpu,  # whoever gives a batch keeps it until its views are there
    )


def _image(encoded: DataNode, encoding: Encoding, gpu: bool) -> tuple[DataNode, DataNode]:
    """The decoded image, and its height and width (and channels) as floats on the CPU.

    A header that does not parse, or claims too many pixels, is an error before the decoder sees it. DALI 2.4's parses
    the headers of a batch in its thread pool, and the last of them beside it: when one of those raises, the pool goes
    on writing to a stack frame that has gone, and the process crashes.
    """
    if encoding.raw:
        return encoded.gpu() if gpu else encoded, types.Constant(np.array(encoding.raw, np.float32))
    shape = fn.peek_image_shape(encoded, dtype=types.FLOAT, adjust_orientation=False)
    fits = shape[0:1] * shape[1:2] <= float(encoding.max_pixels)
    image = fn.decoders.image(
        fn.reshape(encoded, rel_shape=fits * 1.0),  # a view of the same bytes; of none, which is refused, if too large
        device="mixed" if gpu else "cpu",
        output_type=types.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,  # on GPUs as on CPUs, and as Pillow: most JPEGs hold their colour at half the size
        hw_decoder_load=encoding.hw_decoder_load,
        affine=False,  # pinned, its threads would keep to cores that others use, the training thread's among them
    )
    return image, shape


def _windows(shape: DataNode, drawn: dict[str, DataNode], configs: Sequence[ViewConfig]) -> Any:
    """Start and end (2, 2) of both views' crops, rows (y, x), as pipeline.views.windows; shape is the image's.

    Both views go through each node together: at 32 pixels these few numbers cost as much as the pixels, since every
    node costs microseconds per sample.
    """
    law = _authors_windows if configs[0].profile == "reference" else _torchvisions_windows
    start, end = law(shape, drawn, configs)
    mirror = fn.expand_dims(drawn["mirror"], axes=1) * types.Constant(np.array([[0, 1]], np.float32))
    return start * (1.0 - mirror) + end * mirror, end * (1.0 - mirror) + start * mirror


def _torchvisions_windows(shape: DataNode, drawn: dict[str, DataNode], configs: Sequence[ViewConfig]) -> Any:
    """RandomResizedCrop: the first candidate that fits, else the largest central window of a legal aspect ratio."""
    width, height, offset = drawn["width"], drawn["height"], drawn["offset"]
    square = shape[0] / shape[1]
    tall = math.sqrt(square)  # candidates are in units of sqrt(H W): the image is 1 / tall wide and tall high
    chosen, missed = _first((width * tall <= 1.0) & (height <= tall))
    low, high = (types.Constant(np.array([[c.crop_ratio[i]] for c in configs], np.float32)) for i in (0, 1))
    taken = fn.cat(_pick(height, chosen) / tall, _pick(width, chosen) * tall, axis=1)
    largest = math.min(fn.cat(1.0 / (low * square), high * square, axis=1), 1.0)
    extent = taken + missed * largest
    start = (1.0 - extent) * (offset + missed * (0.5 - offset))
    return start, start + extent


COVERED = 0.1  # share of the image that a crop of the authors holds at least, whatever crop_area says


def _authors_windows(shape: DataNode, drawn: dict[str, DataNode], configs: Sequence[ViewConfig]) -> Any:
    """tf.image.sample_distorted_bounding_box, in whole pixels: height uniform, width = ratio times height.

    Ten attempts of the authors' hundred: of an image below 4 : 1 fewer than one crop in a million is missed.
    """
    high, wide, ratio, share = shape[0], shape[1], drawn["ratio"], drawn["share"]
    area = high * wide
    least, most = (area * types.Constant(np.array([[c.crop_area[i]] for c in configs], np.float32)) for i in (0, 1))
    lowest, highest = _rounded(math.sqrt(least / ratio)), _rounded(math.sqrt(most / ratio))
    fits = _rounded(highest * ratio) <= wide
    highest = math.min(fits * highest + (fits ^ True) * math.floor((wide + 0.4999) / ratio), high)
    lowest = math.min(lowest, highest)
    height = lowest + math.floor(share * (highest - lowest + 1.0))
    height = height + (height * _rounded(height * ratio) < least)
    height = height - (height * _rounded(height * ratio) > most)
    width = _rounded(height * ratio)
    taken = height * width
    chosen, missed = _first((taken >= math.max(least, COVERED * area)) & (taken <= most) & (width <= wide))
    size = fn.cat(_pick(height, chosen), _pick(width, chosen), axis=1) + missed * shape[:2]
    start = math.floor((shape[:2] - size) * drawn["offset"])
    return start / shape[:2], (start + size) / shape[:2]


def _rounded(number: DataNode) -> DataNode:
    return math.floor(number + 0.5)


def _first(legal: DataNode) -> tuple[DataNode, DataNode]:
    """Of (2, 10) candidates: which is each row's first legal one, and (2, 1) whether there is none."""
    score = types.Constant(np.arange(ATTEMPTS, 0, -1, dtype=np.float32)) * legal
    best = fn.reductions.max(score, axes=1, keep_dims=True)
    missed = best == 0.0
    return (score == best) ^ missed, missed  # where none is legal all scores equal the best


def _pick(number: DataNode, chosen: DataNode) -> DataNode:
    return fn.reductions.sum(chosen * number, axes=1, keep_dims=True)


def _view(image: DataNode, start: DataNode, end: DataNode, draws: Any, config: ViewConfig) -> DataNode:
    """The part of a view that moves pixels: crop and flip, turn, and for the fast profile the blur, as uint8 levels."""
    reference = config.profile == "reference"
    view = fn.resize(
        image,
        size=[config.size, config.size],
        roi_start=start,
        roi_end=end,  # left of the start where the view is flipped
        roi_relative=True,
        interp_type=_INTERP["cubic" if reference else config.interpolation],
        antialias=not reference,
        dtype=types.FLOAT if reference else types.UINT8,  # the authors' overshoot lives until colour is done
    )
    if config.rotation_p:
        view = fn.rotate(view, angle=draws.angle, keep_size=True, interp_type=types.INTERP_NN)
    if config.blur_p and not reference:
        view = _blur(view, draws.sigma, draws.window, config.max_window, "reflect_101")
    return view


def _finished(view: DataNode, draws: Any, config: ViewConfig, half: bool) -> DataNode:
    """Colour, grayscale and the authors' blur; then what is not in their recipe; then normalised."""
    if config.profile == "reference":
        if config.recolours:
            view = _recolour_in_steps(view, draws, config)
        view = _clip(view)
        if config.blur_p:
            view = _blur(view, draws.sigma, draws.window, config.max_window, "constant")  # black, as their padding
    elif config.recolours:
        view = _recolour(view, draws)
    if config.solarize_p:
        view = _solarize(view, draws.threshold)
    if config.sobel_p:
        view = _sobel(view, draws.sobel)
    if config.noise_p:
        view = _clip(view + _beside(view, draws.noise) * _noise(view, draws.noise_offset, config.size))
    if config.cutout_p:
        view = fn.cast(view, dtype=types.FLOAT)  # on whole levels the mean would be cut to one
        fill = [255 * m for m in config.mean]
        view = fn.erase(view, anchor=draws.hole_start, shape=draws.hole_shape, axis_names="HW", fill_value=fill)
    return normalise(view, config, half)


def _beside(view: DataNode, number: DataNode) -> DataNode:
    """A number per sample on the device where its view is."""
    return number.gpu() if view.device == "gpu" else number


def _clip(view: DataNode) -> DataNode:
    return math.clamp(view, 0.0, 255.0)


def _recolour(view: DataNode, draws: Any) -> DataNode:
    shift = fn.reductions.sum(_beside(view, draws.mean_colour) * fn.reductions.mean(view, axes=[0, 1]), axes=1)
    # float and clipped: rounding to whole levels here takes longer than the matrix itself
    if view.device == "gpu":  # T is read on the CPU, and the shift's way there would have to wait for the view
        return _clip(fn.coord_transform(view, M=draws.colour, dtype=types.FLOAT) + shift)
    return _clip(fn.coord_transform(view, M=draws.colour, T=shift, dtype=types.FLOAT))


def _recolour_in_steps(view: DataNode, draws: Any, config: ViewConfig) -> DataNode:
    """The authors' color_jitter_rand and to_grayscale, on float grey levels, in planes, which are taken apart fast."""
    planes = fn.transpose(view, perm=[2, 0, 1])
    for slot in range(len(OPERATIONS) if config.jitter_p else 0):
        operation, factors = draws.order[slot], _beside(view, draws.factors)
        if operation == OPERATIONS.index("brightness"):
            planes = _clip(planes * factors[0])
        elif operation == OPERATIONS.index("contrast"):
            mean = fn.reductions.mean(planes, axes=[1, 2], keep_dims=True)
            planes = _clip(planes * factors[1] + mean * (1.0 - factors[1]))
        elif operation == OPERATIONS.index("saturation"):
            planes = _clip(_saturate(planes, factors[2]))
        elif operation == OPERATIONS.index("hue"):
            planes = _clip(_turn_hue(planes, factors[3]))
    if config.grayscale_p:
        planes = _drop_colour(planes, draws.gray)
    return fn.transpose(planes, perm=[1, 2, 0])


def _drop_colour(planes: DataNode, chosen: DataNode) -> DataNode:
    if chosen != 0:
        luma = 0.2989 * planes[0] + 0.587 * planes[1] + 0.114 * planes[2]
        planes = _stack(luma, luma, luma)
    return planes


def _stack(*planes: DataNode) -> DataNode:
    return fn.reinterpret(fn.stack(*planes), layout="CHW")


NO_CHROMA = 1e-6  # grey levels; keeps 0 / 0 out where a pixel is gray


def _saturate(planes: DataNode, factor: DataNode) -> DataNode:
    """HSV saturation times `factor`, cut at 1, at the same value V: x becomes V - (V - x) min(factor, V / chroma)."""
    rgb = planes[0], planes[1], planes[2]
    value = math.max(math.max(rgb[0], rgb[1]), rgb[2])
    chroma = value - math.min(math.min(rgb[0], rgb[1]), rgb[2])
    scale = math.min(value / math.max(chroma, NO_CHROMA), factor)
    return _stack(*(value - (value - plane) * scale for plane in rgb))


def _turn_hue(planes: DataNode, turns: DataNode) -> DataNode:
    """HSV hue moved by `turns` of the circle at the same value V and chroma C.

    With the hue h in sixths of the circle, 0 <= h < 6, red, green and blue are V - C + C clip(t, 0, 1), where t is
    |h - 3| - 1, 2 - |h - 2| and 2 - |h - 4|.
    """
    red, green, blue = planes[0], planes[1], planes[2]
    value = math.max(math.max(red, green), blue)
    least = math.min(math.min(red, green), blue)
    chroma = value - least
    is_red = red == value
    is_green = (green == value) & (is_red ^ True)
    is_blue = (is_red | is_green) ^ True
    part = is_red * (green - blue) + is_green * (blue - red) + is_blue * (red - green)
    hue = part / math.max(chroma, NO_CHROMA) + 2.0 * is_green + 4.0 * is_blue + 6.0 * turns
    hue = hue - 6.0 * math.floor(hue / 6.0)
    shares = math.abs(hue - 3.0) - 1.0, 2.0 - math.abs(hue - 2.0), 2.0 - math.abs(hue - 4.0)
    return _stack(*(least + chroma * math.min(math.max(share, 0.0), 1.0) for share in shares))


def _blur(view: DataNode, sigma: DataNode, window: DataNode, max_window: int, border: str) -> DataNode:
    """A normalised Gaussian of `window` taps along each axis, in the view's own type; window 1 changes nothing.

    fn.gaussian_blur does the same, ten times slower on CPUs (9 taps at 224 pixels: 4.7 against 0.5 ms).
    """
    if window > 1:
        reach = max_window // 2
        at = types.Constant(np.arange(-reach, reach + 1, dtype=np.float32))
        taps = math.exp(-0.5 * (at / sigma) * (at / sigma))
        taps = fn.slice(taps, start=(max_window - window) // 2, shape=window, axes=[0])
        taps = _beside(view, taps / fn.reductions.sum(taps))
        across = fn.filter(view, fn.expand_dims(taps, axes=0), border=border)
        view = fn.filter(across, fn.expand_dims(taps, axes=1), border=border)
    return view


def _solarize(view: DataNode, threshold: DataNode) -> DataNode:
    return view + (view >= _beside(view, threshold)) * (255.0 - view * 2.0)


def _sobel(view: DataNode, chosen: DataNode) -> DataNode:
    if chosen != 0:
        kernel = np.outer([1, 2, 1], [-1, 0, 1]).astype(np.float32) / 4
        across, down = (
            fn.filter(view, types.Constant(k, device=view.device), dtype=types.FLOAT) for k in (kernel, kernel.T.copy())
        )
        view = _clip(math.sqrt(across * across + down * down))
    else:
        view = fn.cast(view, dtype=types.FLOAT)
    return view


def _noise(view: DataNode, offset: DataNode, size: int) -> DataNode:
    """A (size, size, 3) window of one fixed field of standard normals: the graph stays a function of what is drawn."""
    side = size + NOISE_WINDOWS
    field = np.random.default_rng(0).standard_normal((side, side, 3), np.float32)
    return fn.slice(types.Constant(field, device=view.device), start=offset, shape=[size, size], axes=[0, 1])


def normalise(image: DataNode, config: ViewConfig, half: bool) -> DataNode:
    return fn.crop_mirror_normalize(
        image,
        mean=[255 * m for m in config.mean],
        std=[255 * s for s in config.std],
        output_layout="HWC",
        dtype=types.FLOAT16 if half else types.FLOAT,
    )


def _threads(num_threads: int, encoding: Encoding, gpu: bool) -> int:
    """The executor's: half of all for a GPU that decodes, whose decoder starts as many of its own."""
    return max(1, num_threads // 2) if gpu and not encoding.raw else num_threads


def two_views(
    encoding: Encoding,
    config: ViewConfig,
    images: Images,
    draw_batch: Callable[[int], tuple[Draws, Draws]],
    *,
    second: ViewConfig | None = None,
    batch_size: int,
    device_id: int | None,
    num_threads: int,
    half: bool = False,
    levels: bool = False,
) -> Pipeline:
    """Pipeline of (view, view); `images(i)` gives its i-th batch, of up to batch_size, `draw_batch(i)` its numbers.

    Either may raise StopIteration where there is no batch. On a CPU the images of a batch stay where they are until its
    views have been made.
    second is the distribution of the second view, None the first's. num_threads are all that DALI starts for images: on
    a GPU half of them are the decoder's, unless pixels come raw. device_id None runs everything on the CPU. half
    makes the views float16 instead of float32. levels stops before colour, for views that end in it: (view, view, A, B,
    A, B), the views in uint8 levels, A and B what each is to be recoloured by.
    """
    configs = config, second or config
    check_pair(*configs)
    if levels and not all(c.ends_in_colour for c in configs):
        raise ValueError("levels: these views do not end in colour")
    size = encoding.raw if config.profile == "fast" else None  # where all images have one, nodes for windows are waste
    joint = [] if size else sorted(config.drawn & CROPS)
    names = [sorted(c.drawn - CROPS | (set(COLOUR) if levels else set())) for c in configs]

    def source(info: types.BatchInfo) -> tuple[Any, ...]:
        both = draw_batch(info.iteration)
        crops = [np.stack([getattr(draws, name) for draws in both], 1) for name in joint]
        if size:
            crops = [bound for draws, c in zip(both, configs, strict=True) for bound in windows(draws, c, *size)]
        return (*crops, *(getattr(draws, name) for draws, mine in zip(both, names, strict=True) for name in mine))

    threads = _threads(num_threads, encoding, gpu=device_id is not None)

    @pipeline_def(batch_size=batch_size, num_threads=threads, device_id=device_id, enable_conditionals=True)
    def graph() -> tuple[DataNode, ...]:
        encoded = _encoded(images, encoding, gpu=device_id is not None)
        inputs = (2 * len(configs) if size else len(joint)) + len(names[0]) + len(names[1])
        drawn = iter(fn.external_source(source, num_outputs=inputs, batch=True, batch_info=True))
        image, shape = _image(encoded, encoding, gpu=device_id is not None)
        if size:
            bounds = [(next(drawn), next(drawn)) for _ in configs]
        else:
            start, end = _windows(shape, {name: next(drawn) for name in joint}, configs)
            bounds = [(start[i], end[i]) for i in range(2)]
        views, colours = [], []
        for i in range(2):
            draws = SimpleNamespace(**{name: next(drawn) for name in names[i]})
            view = _view(image, *bounds[i], draws, configs[i])
            views.append(view if levels else _finished(view, draws, configs[i], half))
            colours += [getattr(draws, name) for name in COLOUR] if levels else []
        return (*views, *colours)

    return graph()


def plain_view(
    encoding: Encoding, config: ViewConfig, images: Images, *, batch_size: int, device_id: int | None, num_threads: int
) -> Pipeline:
    """Pipeline of images for evaluation: shorter side resized, central `size` square kept. `images` as `two_views`."""
    threads = _threads(num_threads, encoding, gpu=device_id is not None)

    @pipeline_def(batch_size=batch_size, num_threads=threads, device_id=device_id)
    def graph() -> DataNode:
        image, _ = _image(_encoded(images, encoding, gpu=device_id is not None), encoding, gpu=device_id is not None)
        shorter = round(config.size / config.eval_crop)
        image = fn.resize(image, resize_shorter=shorter, interp_type=_INTERP[config.interpolation])
        image = fn.crop(image, crop=[config.size, config.size])
        return normalise(image, config, half=False)

    return graph()


class Decoder:
    """The decoder of the graphs by itself: what it says of images that it does not decode.

    One thread. Of several images at once each takes 0.1 ms more than its decoding, alone it takes 0.5 ms more.
    """

    def __init__(self, encoding: Encoding, device_id: int | None = None) -> None:
        self._encoding, self._device_id = encoding, device_id
        self._pipe: Pipeline | None = None
        self._images: list[Bytes] = []

    def refused(self, images: Sequence[bytes | Bytes]) -> dict[int, str]:
        """What is wrong with each image that does not decode, by its place."""
        arrays = [np.frombuffer(image, np.uint8) for image in images]
        faults: dict[int, str] = {}
        for first in range(0, len(arrays), CHECKED_AT_ONCE):
            part = arrays[first : first + CHECKED_AT_ONCE]
            if self._run(part):
                alone = {place: self._run([image]) for place, image in enumerate(part, first)}
                faults |= {place: said for place, said in alone.items() if said}
        return faults

    def _run(self, images: list[Bytes]) -> str:
        self._images = images
        me = weakref.proxy(self)  # DALI holds its callbacks, and what they hold, until cycles are collected
        self._pipe = self._pipe or _decoded(lambda _: me._images, self._encoding, self._device_id)
        try:
            self._pipe.run()
        except RuntimeError as error:
            self._pipe = None  # it is of no more use
            return complaint(error)
        return ""


def _decoded(images: Images, encoding: Encoding, device_id: int | None) -> Pipeline:
    """Pipeline of decoded images, none of them ahead."""

    @pipeline_def(batch_size=CHECKED_AT_ONCE, num_threads=1, device_id=device_id, prefetch_queue_depth=1)
    def graph() -> DataNode:
        gpu = device_id is not None
        return _image(_encoded(images, encoding, gpu), encoding, gpu)[0]

    return graph()


def complaint(error: Exception) -> str:
    """What DALI complains of, without where in its own code."""
    cause = " ".join(str(error).rpartition("encountered:")[2].partition("C++ context")[0].split())
    return cause.removesuffix(" Current pipeline object is no longer valid." * 2)
