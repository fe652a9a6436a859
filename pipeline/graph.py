"""The DALI graphs, one definition for CPU and GPU: two augmented views, and the plain view for evaluation.

Samples come from the WebDataset reader, are decoded once, and leave as (n, size, size, 3). All randomness is drawn in
pipeline/views.py and enters as numbers beside the images, so the graph itself draws nothing; only the reader has a
state, and DALI checkpoints it. EXIF orientation is ignored, as torchvision and timm do.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any

import numpy as np
from nvidia.dali import fn, math, pipeline_def, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline

from pipeline.images import MAX_PIXELS, ppm_header
from pipeline.views import ATTEMPTS, Draws, ViewConfig

LABEL_DIGITS = 10  # .cls members hold the label as ASCII digits; they leave the graph padded with zeros to this width
_INTERP = {"linear": types.INTERP_LINEAR, "cubic": types.INTERP_CUBIC}


@dataclass(frozen=True, kw_only=True)
class Reader:
    """What one rank reads: its part of the samples, and how far they are shuffled.

    shuffle is the number of samples in the reader's local buffer; 0 keeps the order of the shards. Shuffling also
    permutes the order of the shards every epoch.
    """

    tars: Sequence[str]
    indexes: Sequence[str]
    image_ext: str  # "jpg", or alternatives as in "jpg;png"
    labelled: bool
    raw: tuple[int, int] | None = None  # (height, width) if all images are PPMs of this size, as `pipeline.images.ppm`
    max_pixels: int = MAX_PIXELS  # larger images are an error, whatever a header claims
    hw_decoder_load: float = 0.65  # share of a batch's JPEGs for the GPU's hardware decoder, if it has one; DALI's own
    rank: int = 0
    world_size: int = 1
    shuffle: int = 0
    seed: int = 0


def _read(reader: Reader) -> tuple[DataNode, DataNode | None]:
    shuffled: dict[str, Any] = {
        "random_shuffle": True,
        "initial_fill": reader.shuffle,
        "seed": reader.seed,
        "shuffle_after_epoch": True,
        "shuffle_after_epoch_seed": reader.seed,  # DALI's default is one order of the shards for every run
    }
    read: Any = fn.readers.webdataset(
        name="reader",
        paths=list(reader.tars),
        index_paths=list(reader.indexes),
        ext=[reader.image_ext, "cls"][: 2 if reader.labelled else 1],
        missing_component_behavior="error",
        shard_id=reader.rank,
        num_shards=reader.world_size,
        pad_last_batch=True,  # every epoch starts with a new batch; the loader drops the padded rest
        dont_use_mmap=True,  # a shard replaced on disk is then an error message instead of SIGBUS
        **(shuffled if reader.shuffle else {}),
    )
    if not reader.labelled:  # one extension gives a node, not a list of one
        return read, None
    encoded, label = read
    return encoded, fn.pad(label, shape=[LABEL_DIGITS])


def _image(encoded: DataNode, reader: Reader, gpu: bool) -> tuple[DataNode, DataNode]:
    """The decoded image, and its height and width (and channels) as floats on the CPU.

    A header that does not parse, or claims too many pixels, is an error before the decoder sees it. DALI 2.4's parses
    the headers of a batch in its thread pool, and the last of them beside it: when one of those raises, the pool goes
    on writing to a stack frame that has gone, and the process crashes.
    """
    if reader.raw:  # the pixels lie there as they are, behind the header
        skip, num = len(ppm_header(*reader.raw)), 3 * reader.raw[0] * reader.raw[1]
        image = fn.reshape(fn.slice(encoded, [skip], [num], axes=[0]), shape=[*reader.raw, 3], layout="HWC")
        return image.gpu() if gpu else image, types.Constant(np.array(reader.raw, np.float32))
    shape = fn.peek_image_shape(encoded, dtype=types.FLOAT, adjust_orientation=False)
    fits = shape[0:1] * shape[1:2] <= float(reader.max_pixels)
    image = fn.decoders.image(
        fn.reshape(encoded, rel_shape=fits * 1.0),  # a view of the same bytes; of none, which is refused, if too large
        device="mixed" if gpu else "cpu",
        output_type=types.RGB,
        adjust_orientation=False,
        hw_decoder_load=reader.hw_decoder_load,
    )
    return image, shape


def _windows(shape: DataNode, width: DataNode, height: DataNode, offset: DataNode, config: ViewConfig) -> Any:
    """Start and end (2, 2) of both views' crops, rows (y, x) relative to the image: the first candidate that fits.

    shape is the image's; width, height (2, 10) and offset (2, 2) are those of `Draws`. Both views go through each node
    together: at 32 pixels these few numbers cost as much as the pixels, since every node costs microseconds per sample.
    """
    square = shape[0] / shape[1]
    tall = math.sqrt(square)  # candidates are in units of sqrt(H W): the image is 1 / tall wide and tall high
    rank = types.Constant(np.arange(ATTEMPTS, 0, -1, dtype=np.float32))
    score = rank * ((width * tall <= 1.0) & (height <= tall))
    best = fn.reductions.max(score, axes=1, keep_dims=True)
    missed = best == 0.0
    chosen = (score == best) ^ missed  # where none fits all scores equal the best
    low, high = config.crop_ratio
    taken = fn.cat(
        fn.reductions.sum(chosen * height, axes=1, keep_dims=True) / tall,
        fn.reductions.sum(chosen * width, axes=1, keep_dims=True) * tall,
        axis=1,
    )
    largest = math.min(fn.stack(1.0 / (low * square), high * square), 1.0)
    extent = taken + missed * largest
    start = (1.0 - extent) * (offset + missed * (0.5 - offset))
    return start, start + extent


def _view(image: DataNode, start: DataNode, end: DataNode, draws: Any, config: ViewConfig, half: bool) -> DataNode:
    view = fn.resize(
        image,
        size=[config.size, config.size],
        roi_start=start,
        roi_end=end,
        roi_relative=True,
        interp_type=_INTERP[config.interpolation],
    )
    if config.recolours:
        mean = fn.reductions.mean(view, axes=[0, 1]).cpu()
        shift = fn.reductions.sum(draws.mean_colour * mean, axes=1)
        view = fn.coord_transform(view, M=draws.colour, T=shift, dtype=types.UINT8)
    if config.blur_p:
        view = fn.gaussian_blur(view, sigma=draws.sigma, window_size=draws.window)
    return _normalise(view, config, half, mirror=draws.mirror)


def _normalise(image: DataNode, config: ViewConfig, half: bool, mirror: DataNode | int = 0) -> DataNode:
    return fn.crop_mirror_normalize(
        image,
        mirror=mirror,
        mean=[255 * m for m in config.mean],
        std=[255 * s for s in config.std],
        output_layout="HWC",
        dtype=types.FLOAT16 if half else types.FLOAT,
    )


def two_views(
    reader: Reader,
    config: ViewConfig,
    draw_batch: Callable[[int], tuple[Draws, Draws]],
    *,
    batch_size: int,
    device_id: int | None,
    num_threads: int,
    half: bool = False,
    checkpoint: bytes | None = None,
) -> Pipeline:
    """Pipeline of (view, view[, label digits]) for each batch; `draw_batch(i)` gives the numbers of its i-th batch.

    device_id None runs everything on the CPU. half makes the views float16 instead of float32. checkpoint restores the
    state a pipeline built with the same arguments had given by `Pipeline.checkpoint()`.
    """
    unused = ({"colour", "mean_colour"} if not config.recolours else set()) | (
        {"sigma", "window"} if not config.blur_p else set()
    )
    joint = ("width", "height", "offset")
    names = [f.name for f in fields(Draws) if f.name not in unused and f.name not in joint]

    def source(info: types.BatchInfo) -> tuple[Any, ...]:
        both = draw_batch(info.iteration)
        crops = (np.stack([getattr(draws, name) for draws in both], 1) for name in joint)
        return (*crops, *(getattr(draws, name) for draws in both for name in names))

    @pipeline_def(
        batch_size=batch_size,
        num_threads=num_threads,
        device_id=device_id,
        enable_checkpointing=True,
        checkpoint=checkpoint,
    )
    def graph() -> tuple[DataNode, ...]:
        encoded, label = _read(reader)
        width, height, offset, *rest = fn.external_source(
            source, num_outputs=len(joint) + 2 * len(names), batch=True, batch_info=True
        )
        image, shape = _image(encoded, reader, gpu=device_id is not None)
        start, end = _windows(shape, width, height, offset, config)
        views = []
        for i in range(2):
            draws = SimpleNamespace(**dict(zip(names, rest[i * len(names) :], strict=False)))
            views.append(_view(image, start[i], end[i], draws, config, half))
        return (*views, label) if label is not None else tuple(views)

    return graph()


def plain_view(
    reader: Reader, config: ViewConfig, *, batch_size: int, device_id: int | None, num_threads: int, half: bool = False
) -> Pipeline:
    """Pipeline of (image[, label digits]) for evaluation: shorter side resized, central `size` square kept."""

    @pipeline_def(batch_size=batch_size, num_threads=num_threads, device_id=device_id, enable_checkpointing=True)
    def graph() -> tuple[DataNode, ...]:
        encoded, label = _read(reader)
        image, _ = _image(encoded, reader, gpu=device_id is not None)
        shorter = round(config.size / config.eval_crop)
        image = fn.resize(image, resize_shorter=shorter, interp_type=_INTERP[config.interpolation])
        image = fn.crop(image, crop=[config.size, config.size])
        image = _normalise(image, config, half)
        return (image, label) if label is not None else (image,)

    return graph()


def stored_images(reader: Reader, batch_size: int, checkpoint: bytes) -> list[tuple[str, bytes]]:
    """(TAR:OFFSET:MEMBER, bytes) of the images that a pipeline with this checkpoint reads next, not decoded.

    Raises RuntimeError where they cannot be read.
    """

    @pipeline_def(batch_size=batch_size, num_threads=1, device_id=None, enable_checkpointing=True)
    def graph() -> DataNode:
        return _read(reader)[0]

    def record(checkpoint: bytes) -> bytes:
        """The reader's part: DALI keeps a protobuf record, here of less than 128 bytes, for each operator."""
        name = checkpoint.index(b"\n\x06reader\x12")
        return checkpoint[name - 2 : name + checkpoint[name - 1]]

    start = graph().checkpoint()
    (images,) = graph(checkpoint=start.replace(record(start), record(checkpoint))).run()
    return [(image.source_info(), np.asarray(image).tobytes()) for image in images]
