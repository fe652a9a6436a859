"""Batches of two views for training, and of plain images for evaluation, for one rank of many.

`build_loader` gives an endless `Loader`: every epoch each rank yields the same number of batches, each sample appears
at most once, and only the last incomplete global batch is dropped. It knows its position and restores it exactly in
the middle of an epoch. What an epoch's global batches consist of depends on the number of ranks, because each rank
reads its own contiguous part of the shards, in sequence, and shuffles it in a buffer of its own: one order for any
number of ranks would need reads at random places. The augmentation drawn for a position does not depend on it.

`build_eval_loader` gives every sample of the data set exactly once, in the order of the shards.
"""

import base64
import ctypes
import gc
import io
import itertools
import math
import os
import random
import resource
import time
import warnings
import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipeline.colour import finish
from pipeline.shards import Dataset, DatasetError
from pipeline.views import Draws, ViewConfig, check_pair, draw

if TYPE_CHECKING:
    from nvidia.dali.pipeline import Pipeline

    from pipeline.graph import Reader

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
SHUFFLE = 2048  # samples in each rank's shuffle buffer; the shards themselves are shuffled when written

# A forked child, such as a DataLoader's worker, that collected its parent's pipelines would join threads it has not.
os.register_at_fork(after_in_child=gc.freeze)


@dataclass(frozen=True)
class Batch:
    """views (2n, 3, S, S) channels_last, view-major: rows i and i + n come from image i.

    labels (n,) int64 stay on the CPU, wherever the views are; None where the data set has none.
    position is the place of the global batch's first sample within its epoch.
    """

    views: Tensor
    labels: Tensor | None
    epoch: int
    position: int


_Position = tuple[int, bytes | None]  # runs of the pipeline, and DALI's checkpoint behind the last of them


class LoaderError(RuntimeError):
    """A batch could not be made; the message names the rank, the batch and the reader's own complaint."""


class Loader:
    """Endless iterator of `Batch`; see `build_loader`."""

    def __init__(
        self,
        dataset: Dataset,
        views: ViewConfig,
        batch_size: int,
        device: torch.device,
        rank: int,
        world_size: int,
        seed: int,
        num_threads: int,
        half: bool,
        shuffle: int,
        micro_batch: int,
        second_views: ViewConfig | None,
        hw_decoder_load: float,
    ) -> None:
        check_pair(views, second_views or views)
        if not 0 <= hw_decoder_load <= 1:
            raise ValueError(f"hw_decoder_load {hw_decoder_load} is not between 0 and 1")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed {seed} is not between 0 and 2**63 - 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is none of {world_size} rank(s), which count from 0")
        if micro_batch < 0:
            raise ValueError(f"micro_batch {micro_batch} is negative; expected a number of images, or 0 for all")
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"batch_size {batch_size} does not divide into {world_size} ranks")
        per_rank = dataset.samples // world_size
        self.local_batch_size = batch_size // world_size
        self.steps_per_epoch = per_rank // self.local_batch_size
        if not self.steps_per_epoch:
            raise ValueError(
                f"{dataset.address} has {dataset.samples} samples, fewer than one batch of {batch_size} over "
                f"{world_size} rank(s) ({per_rank} per rank, {self.local_batch_size} needed); lower the batch size"
            )
        self.micro_batch = micro_batch or self.local_batch_size
        self._micro_batches, rest = divmod(self.local_batch_size, self.micro_batch)
        if rest:
            near = sorted(_divisors(self.local_batch_size), key=lambda divisor: abs(divisor - micro_batch))[:3]
            raise ValueError(
                f"micro_batch {micro_batch} does not divide the {self.local_batch_size} images of a rank's batch; near "
                f"are {', '.join(map(str, sorted(near)))}"
            )
        # The reader pads each rank's part to whole runs; what is beyond the last whole batch is read and dropped.
        self._runs_per_epoch = math.ceil(math.ceil(dataset.samples / world_size) / self.micro_batch)
        self._used_per_epoch = self.steps_per_epoch * self._micro_batches
        self.dataset, self.views, self.device, self.rank, self.world_size = dataset, views, device, rank, world_size
        self._batch_size, self._seed, self._num_threads = batch_size, seed, num_threads
        self._half, self._shuffle, self._second_views = half, shuffle, second_views
        self._hw_decoder_load = hw_decoder_load
        self._pipe: Pipeline | None = None
        self._ahead: Future[tuple[Batch, _Position]] | None = None
        self._failure: LoaderError | None = None
        self._runs = 0  # batches the pipeline has given, dropped ones included
        self._position: _Position = 0, None
        self._waits = deque[tuple[Any, Any]]()  # marks before and behind batches, not yet counted
        self._waited_s = 0.0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._failure:
            raise self._failure
        start = self._mark()
        try:
            batch, self._position = self._ahead.result() if self._ahead else self._make(self._room())
        except LoaderError as error:
            self._failure = error  # DALI would go on with the next batch, and this rank out of step with the others
            raise
        if self.device.type == "cpu":  # a GPU makes batches beside what runs here by itself
            self._ahead = self._worker.submit(self._make, self._room())
        self._waits.append((start, self._mark()))
        self._count_waits()
        return batch

    def take_wait_s(self) -> float:
        """Seconds spent waiting for batches since this was last asked.

        On a GPU they are its stream's: the host may wait while there is work queued, and goes on before a batch is
        there. Batches that the stream has not come to are counted when it has.
        """
        self._count_waits()
        taken, self._waited_s = self._waited_s, 0.0
        return taken

    def _mark(self) -> Any:
        if self.device.type == "cpu":
            return time.perf_counter()
        mark = torch.cuda.Event(enable_timing=True)
        mark.record(torch.cuda.current_stream(self.device))
        return mark

    def _count_waits(self) -> None:
        while self._waits and (self.device.type == "cpu" or self._waits[0][1].query()):
            before, behind = self._waits.popleft()
            self._waited_s += behind - before if self.device.type == "cpu" else before.elapsed_time(behind) / 1e3

    @cached_property
    def _worker(self) -> ThreadPoolExecutor:
        """A thread whose torch operators use as many threads as DALI has; the caller's keep theirs."""
        threads, worker = torch.get_num_threads(), ThreadPoolExecutor(1, "loader")
        worker.submit(torch.set_num_threads, self._num_threads).result()
        torch.set_num_threads(threads)
        return worker

    def _room(self) -> Tensor:
        """Memory for a batch's views (2n, S, S, 3), of the thread that asks: more than another's heap may hold."""
        size, dtype = self.views.size, torch.half if self._half and not self._in_levels else torch.float
        return torch.empty(2 * self.micro_batch, size, size, 3, dtype=dtype, device=self.device)

    def _make(self, views: Tensor) -> tuple[Batch, _Position]:
        """The next batch, written to `views`, and the position behind it."""
        if self._pipe is None:
            self._pipe = self._build(None)
        if self._runs % self._runs_per_epoch == self._used_per_epoch:
            self._skip_to_next_epoch(self._pipe)
        epoch, run = divmod(self._runs, self._runs_per_epoch)
        (first, second, *colours), labels = self._run(self._pipe)
        if colours:
            for levels, A, B, out in zip((first, second), colours[::2], colours[1::2], views.chunk(2), strict=True):
                finish(levels, A, B, self.views, out)
            views = views.half() if self._half else views
        else:
            torch.cat([first, second], out=views)
        batch = Batch(views.permute(0, 3, 1, 2), labels, epoch, run // self._micro_batches * self._batch_size)
        return batch, (self._runs, self._pipe.checkpoint())

    def _skip_to_next_epoch(self, pipe: "Pipeline") -> None:
        while self._runs % self._runs_per_epoch:
            self._run(pipe)

    def _run(self, pipe: "Pipeline") -> tuple[list[Tensor], Tensor | None]:
        epoch, run = divmod(self._runs, self._runs_per_epoch)
        outputs = _outputs(
            pipe,
            self._reader,
            self.dataset,
            self.device,
            f"rank {self.rank} could not read batch {run // self._micro_batches} of epoch {epoch}",
        )
        self._runs += 1
        return outputs

    def _draw(self, run: int) -> tuple[Draws, Draws]:
        epoch, run = divmod(run, self._runs_per_epoch)
        step, part = divmod(run, self._micro_batches)
        position = (step * self.world_size + self.rank) * self.local_batch_size + part * self.micro_batch
        n = self.micro_batch
        return draw(self.views, self._second_views, seed=self._seed, epoch=epoch, position=position, n=n)

    def _build(self, checkpoint: bytes | None) -> "Pipeline":
        from pipeline.graph import two_views

        if self.device.type == "cpu":
            _keep_freed_memory()
        return two_views(
            self._reader,
            self.views,
            partial(Loader._draw, weakref.proxy(self)),  # or it would live until cycles are collected
            second=self._second_views,
            batch_size=self.micro_batch,
            device_id=_device_id(self.device),
            num_threads=self._num_threads,
            half=self._half,
            levels=self._in_levels,
            checkpoint=checkpoint,
        )

    @cached_property
    def _in_levels(self) -> bool:
        """Whether the graph gives levels, and `finish` makes views of them."""
        views = self.views, self._second_views or self.views
        return self.device.type == "cpu" and all(view.ends_in_colour for view in views)

    @cached_property  # it names every shard, and ImageNet has more than a thousand
    def _reader(self) -> "Reader":
        reader = _reader(self.dataset, self.rank, self.world_size, self._shuffle, self._seed)
        return replace(reader, hw_decoder_load=self._hw_decoder_load)

    @property
    def identity(self) -> dict[str, Any]:
        """What a position is only valid for; equal on all ranks."""
        return {
            "dataset": self.dataset.fingerprint,
            "batch_size": self._batch_size,
            "micro_batch": self.micro_batch,
            "world_size": self.world_size,
            "device": self.device.type,  # DALI's part of a position is of one graph, and a GPU's is another
            "views": asdict(self.views),
            "second_views": asdict(self._second_views) if self._second_views else None,
            "seed": self._seed,
            "shuffle": self._shuffle,
        }

    def state_dict(self) -> dict[str, Any]:
        """The exact position of this rank, JSON-able; the identity stands beside it."""
        if self._failure:
            raise self._failure
        runs, reader = self._position
        return {
            "identity": self.identity,
            "rank": self.rank,
            "runs": runs,
            "reader": base64.b64encode(reader).decode() if reader is not None else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position. Raises ValueError naming what differs from when it was saved."""
        saved, mine = state["identity"] | {"rank": state["rank"]}, self.identity | {"rank": self.rank}
        for name in ("views", "second_views"):
            fields = saved.get(name)
            saved[name] = fields and {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        different = [
            f"{key}: {saved.get(key, 'nothing')} saved, {mine[key]} now"
            for key in mine
            if saved.get(key, "nothing") != mine[key]
        ]
        if different:
            raise ValueError("the saved position belongs to another stream of batches; " + "; ".join(different))
        wait([self._ahead] if self._ahead else [])  # it uses the pipeline
        self._ahead = self._failure = None
        reader = base64.b64decode(state["reader"]) if state["reader"] is not None else None
        self._pipe = self._build(reader) if reader is not None else None
        self._runs, self._position = state["runs"], (state["runs"], reader)


def build_loader(
    dataset: Dataset,
    views: ViewConfig,
    batch_size: int,
    device: torch.device,
    *,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    num_threads: int = 4,
    half: bool = False,
    shuffle: int = SHUFFLE,
    micro_batch: int = 0,
    second_views: ViewConfig | None = None,
    hw_decoder_load: float = 0.65,
) -> Loader:
    """This rank's endless stream of two-view batches.

    batch_size   images per step over all ranks; a multiple of world_size
    device       where the views are made and left: JPEGs are decoded and augmented there
    num_threads  DALI's CPU threads for this rank, and torch's where it finishes views that a CPU makes: one batch ahead
    half         float16 views instead of float32
    shuffle      samples in this rank's shuffle buffer; 0 reads in the order of the shards
    micro_batch  gives this rank's batch in parts of so many images, a divisor of it, with the views that the whole has;
                 the pipeline and its memory are of that size. 0 gives the whole.
    second_views the distribution of the second view of each image, if it is not that of the first
    hw_decoder_load  share of a batch's JPEGs that the GPU's hardware decoder takes, where it has one (A100, H100)
    Raises ValueError for arguments out of range or a data set smaller than one batch, LoaderError where a batch cannot
    be read.
    """
    return Loader(
        dataset,
        views,
        batch_size,
        device,
        rank,
        world_size,
        seed,
        num_threads,
        half,
        shuffle,
        micro_batch,
        second_views,
        hw_decoder_load,
    )


def build_eval_loader(
    dataset: Dataset,
    views: ViewConfig,
    batch_size: int,
    device: torch.device,
    *,
    rank: int = 0,
    world_size: int = 1,
    num_threads: int = 4,
    samples: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(images (n, 3, S, S) channels_last, labels (n,), -1 if none) of this rank's part, each sample once, in order.

    batch_size is per rank; the last batch holds the rest. samples is the most that all ranks together give, None all.
    """
    from pipeline.graph import plain_view

    if dataset.samples < world_size:  # DALI refuses so many parts: the first rank reads everything
        if rank:
            return
        world_size = 1
    left = dataset.samples * (rank + 1) // world_size - dataset.samples * rank // world_size
    if samples is not None:
        left = min(left, samples * (rank + 1) // world_size - samples * rank // world_size)
    if not left:
        return
    reader = _reader(dataset, rank, world_size, 0, 0)
    if device.type == "cpu":
        _keep_freed_memory()
    pipe = plain_view(
        reader,
        views,
        batch_size=min(batch_size, left),
        device_id=_device_id(device),
        num_threads=num_threads,
    )
    for step in itertools.count():
        (padded,), labels = _outputs(pipe, reader, dataset, device, f"rank {rank} could not read batch {step}")
        images = padded.clone()[:left]
        left -= len(images)
        labels = labels[: len(images)] if labels is not None else torch.full((len(images),), -1)
        yield images.permute(0, 3, 1, 2), labels
        if not left:
            return


def _outputs(
    pipe: "Pipeline", reader: "Reader", dataset: Dataset, device: torch.device, failed: str
) -> tuple[list[Tensor], Tensor | None]:
    """The pipeline's next images (n, S, S, 3), still in DALI's memory, and labels. Raises LoaderError."""
    # Outputs bound to torch's stream are freed in its order: not before a copy that only waits in it is done.
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    try:
        images = list(pipe.run(stream))
        labels = _parse_labels(images.pop()) if dataset.labelled else None
        return [torch.from_dlpack(image.as_tensor()) for image in images], labels
    except (RuntimeError, ValueError) as error:
        cause = " ".join(str(error).rpartition("encountered:")[2].partition("C++ context")[0].split())
        cause = cause.removesuffix(" Current pipeline object is no longer valid." * 2)
        sample = _faulty_image(reader, pipe) if isinstance(error, RuntimeError) else None
        advice = (
            ". If a shard changed since it was written, copy it again; else let "
            f"`python tools/make_shards.py verify {dataset.address} --images` list what cannot be read, and "
            "`quarantine` leave it out"
        )
        damaged = sample or isinstance(error, DatasetError) or "readers.webdataset`" in str(error)
        raise LoaderError(f"{failed} of {dataset.address}: {sample or cause}{advice if damaged else ''}") from error


def _faulty_image(reader: "Reader", pipe: "Pipeline") -> str | None:
    """The first image that cannot be used of the batch that `pipe` failed to give, and why; None if all can."""
    from PIL import Image, UnidentifiedImageError

    from pipeline.graph import stored_images

    try:
        images = stored_images(reader, pipe.max_batch_size, pipe.checkpoint())
    except (RuntimeError, ValueError):  # reading fails, and the reader has said why
        return None
    for source, content in images:
        try:
            with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(content)) as image:
                if image.width * image.height > reader.max_pixels:
                    return f"{source} has {image.width}x{image.height} pixels, more than {reader.max_pixels}"
                image.load()
        except UnidentifiedImageError:
            return f"{source} does not begin like an image"
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error ... for bad bytes
            return f"{source} does not decode ({error})"
    return None


def _reader(dataset: Dataset, rank: int, world_size: int, shuffle: int, seed: int) -> "Reader":
    from pipeline.graph import Reader

    tars, indexes = dataset.tars, dataset.indexes
    _allow_open_files(len(tars))
    if shuffle:  # the reader itself permutes the shards between epochs only
        order = random.Random(seed).sample(range(len(tars)), len(tars))
        tars, indexes = [tars[i] for i in order], [indexes[i] for i in order]
    return Reader(
        tars=tars,
        indexes=indexes,
        image_ext=";".join(dataset.extensions),
        labelled=dataset.labelled,
        max_pixels=dataset.options["max_pixels"],
        raw=dataset.raw,
        rank=rank,
        world_size=world_size,
        shuffle=shuffle,
        seed=seed,
    )


def _device_id(device: torch.device) -> int | None:
    """The number of a GPU, which DALI wants; torch's current one where the device has none, and None for the CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def _allow_open_files(shards: int) -> None:
    """DALI keeps every shard open, and ImageNet has more of them than the 1,024 files a process may usually open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < shards + 256:  # 256 for everything else
        raise ValueError(
            f"{shards} shards cannot be open at once: this process may open {hard} files. Raise the hard limit "
            "(ulimit -Hn), or make fewer shards (--shard-size)"
        )
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _keep_freed_memory() -> None:
    """DALI's CPU operators allocate every batch anew.

    glibc gives blocks of megabytes back to the kernel when they are freed, and the kernel clears their pages again: an
    eighth of the processor time of views at 224 pixels, for a tenth less memory. Threads beside the first hold blocks
    in heaps of 64 MB; with a pad of more than that glibc keeps those that are empty. One arena for all would cost a
    training thread some 5 % of its time, waiting for it and touching new pages (a small ResNet-18, 32 px, two cores).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's own
    if mallopt:
        mallopt(_M_TOP_PAD, 1 << 27)
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _parse_labels(digits: Any) -> Tensor:
    """(n, LABEL_DIGITS) zero-padded ASCII to (n,) int64. Raises DatasetError naming the sample that has no number."""
    rows = digits.as_array()
    texts = rows.view(f"S{rows.shape[1]}").ravel()
    try:
        return torch.from_numpy(texts.astype("int64"))
    except ValueError:
        broken = next(i for i, text in enumerate(texts) if not text.isdigit())
        raise DatasetError(f"{digits[broken].source_info()} is no label: {bytes(texts[broken])!r}") from None
