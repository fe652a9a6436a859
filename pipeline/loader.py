"""Batches of two views for training, and of plain images for evaluation, for one rank of many.

`Loader` is endless. An epoch has the batches that pipeline/order.py says, whatever the number of ranks and the size of
micro-batches, and the views of a position are drawn for it alone. So the loader's state is a position.

`build_eval_loader` gives every sample of the data set exactly once, in the order of the shards.

A batch passes through three places, each ahead of the next: a thread that reads bytes (pipeline/reader.py), DALI's own
threads, and a thread that takes what DALI made into the memory of the batch. The caller's thread only waits.
"""

import ctypes
import gc
import io
import itertools
import os
import sys
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pipeline.colour import finish
from pipeline.order import Numbers, Order, divide
from pipeline.reader import DamagedError, Encoded, Reader, StalledError, ahead
from pipeline.shards import Dataset, DatasetError
from pipeline.views import Draws, ViewConfig, check_pair, draw

if TYPE_CHECKING:
    from nvidia.dali.pipeline import Pipeline

    from pipeline.cache import Cache
    from pipeline.graph import Encoding

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
IN_FLIGHT = 1 << 28  # bytes of encoded images that are read ahead, if one batch is not more by itself
TIMEOUT_S = 300.0  # without a batch: a disk that does not answer, rather than a slow one
MOST_AHEAD = 4  # batches
IN_GRAPH = 4  # batches whose images DALI may still hold: it prepares two ahead

# A forked child, such as a DataLoader's worker, that collected its parent's pipelines would join threads it has not.
os.register_at_fork(after_in_child=gc.freeze)


@dataclass(frozen=True)
class Batch:
    """views (2n, 3, S, S) channels_last, view-major: rows i and i + n come from image i.

    labels (n,) int64 stay on the CPU, wherever the views are; None where the data set has none.
    position is the place of the global batch's first sample within its epoch; samples (n,) are the numbers of this
    rank's images, counted in the order of the shards.
    """

    views: Tensor
    labels: Tensor | None
    epoch: int
    position: int
    samples: Numbers


class LoaderError(RuntimeError):
    """A batch could not be made; the message names the rank, the batch, the sample or what DALI complained of."""


class _Feed:
    """Encoded batches on their way into a pipeline, which asks for them before it gives the views of earlier ones."""

    def __init__(self, encoded: Iterator[Encoded]) -> None:
        self._encoded, self._failure = encoded, Exception("nothing has been read")
        self._given = deque[tuple[int, Encoded]](maxlen=IN_GRAPH)

    def images(self, number: int) -> Any:
        """Those of the batch of this number, for the pipeline; what fails in reading waits for the batch's turn."""
        try:
            encoded = next(self._encoded, None)
        except Exception as error:
            self._failure = error.with_traceback(None)  # which would hold the frames that called, and so the pipeline
            encoded = None
        if encoded is None:
            raise StopIteration
        self._given.append((number, encoded))
        return encoded.images

    def outputs(self, pipe: "Pipeline", stream: Any) -> tuple[Any, ...]:
        """The pipeline's next outputs, in its memory. Raises RuntimeError, or what failed in reading."""
        try:
            outputs: tuple[Any, ...] = pipe.run(stream)
            return outputs
        except StopIteration:
            raise self._failure from None

    def encoded(self, number: int) -> Encoded | None:
        """The batch of this number, if it is one of those given last."""
        return next((encoded for given, encoded in self._given if given == number), None)

    def undecodable(self, number: int, encoding: "Encoding", device: torch.device) -> dict[int, str]:
        """What is wrong with images that do not decode, by sample: of the batch of this number, or of a later one.

        The pipeline works on several batches at a time, and what fails in one may come up in place of another.
        """
        given = [encoded for at, encoded in self._given if at >= number]
        return next(filter(None, (_undecodable(encoded, encoding, device) for encoded in given)), {})


def copy_out(output: Any, out: Tensor, stream: Any) -> None:
    """Copies an output of a pipeline that ran with `stream` into memory of torch's, (n, S, S, 3) as the output is.

    On a GPU the copy waits in the stream and the host for nothing; DALI frees the output in the order of that stream.
    Shared by DLPack instead, each output would be freed by a thread of DALI's own that waits for the whole GPU first.
    """
    from nvidia.dali.plugin.pytorch import feed_ndarray

    assert out.is_contiguous()
    feed_ndarray(output.as_tensor(), out, cuda_stream=stream)


class Loader:
    """Endless iterator of `Batch`: this rank's part of each global batch."""

    def __init__(
        self,
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
        shuffle: bool = True,
        window: int = 0,
        lanes: int = 1,
        micro_batch: int = 0,
        second_views: ViewConfig | None = None,
        hw_decoder_load: float = 0.65,
        skip_damaged: int = 0,
        timeout_s: float = TIMEOUT_S,
        cache: "Cache | None" = None,
    ) -> None:
        """
        batch_size   images per step over all ranks; a multiple of world_size and of lanes
        device       where the views are made and left: JPEGs are decoded and augmented there
        num_threads  DALI's CPU threads for this rank, half of them the decoder's where a GPU takes part; torch's, too,
                     where it finishes views that a CPU makes
        half         float16 views instead of float32
        shuffle      False reads in the order of the shards
        window       shards whose samples are mixed together, and lanes, streams that share them out: pipeline/order.py
        micro_batch  gives this rank's batch in parts of so many images, a divisor of it, with the views that the whole
                     has; the pipeline and its memory are of that size. 0 gives the whole.
        second_views the distribution of the second view of each image, if it is not that of the first
        hw_decoder_load  share of a batch's JPEGs that the GPU's hardware decoder takes, where it has one (A100, Hopper)
        skip_damaged samples that may be damaged before this rank gives up; each is replaced by `Order.substitutes`
        timeout_s    how long a batch is waited for
        cache        where shards of object storage are kept; without, samples are read from it by ranges
        Raises ValueError for arguments out of range or a data set smaller than one batch, LoaderError where a batch
        cannot be read or does not come.
        """
        check_pair(views, second_views or views)
        if not 0 <= hw_decoder_load <= 1:
            raise ValueError(f"hw_decoder_load {hw_decoder_load} is not between 0 and 1")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed {seed} is not between 0 and 2**63 - 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is none of {world_size} rank(s), which count from 0")
        division = divide(
            dataset.samples,
            batch_size,
            world_size=world_size,
            micro_batch=micro_batch,
            lanes=lanes if shuffle else 1,
            address=dataset.address,
        )
        self.local_batch_size, self.micro_batch = division.local_batch_size, division.micro_batch
        self._micro_batches = division.num_micro_batches
        counts = [shard.samples for shard in dataset.shards]
        self._order = Order(counts, batch_size, seed=seed, window=window, lanes=lanes, shuffle=shuffle)
        self.steps_per_epoch = self._order.steps_per_epoch
        self.dataset, self.views, self.device, self.rank, self.world_size = dataset, views, device, rank, world_size
        self._num_threads, self._half, self._second_views = num_threads, half, second_views
        self._hw_decoder_load, self._cache = hw_decoder_load, cache
        self._near: tuple[int, dict[int, range]] | None = None  # epoch and windows that the cache was asked for last
        self._damaged: dict[int, str] = {}  # samples that were replaced, and what is wrong with each
        self._skip_damaged, self._timeout_s = skip_damaged, timeout_s
        self._noting = threading.Lock()
        self._pipe: Pipeline | None = None  # goes before the feed, whose images it may still read
        self._feed = _Feed(iter(()))
        self._ahead: Future[tuple[Batch, Any]] | None = None
        self._runs = 0  # (micro-)batches given; the next one to make is that or the one behind
        self._waits = deque[tuple[Any, Any]]()  # marks before and behind batches, not yet counted
        self._waited_s = 0.0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        start = self._mark()
        waiting = self._ahead or self._submit(self._runs)
        try:
            batch, made = waiting.result(self._timeout_s)
        except BaseException as error:
            self._ahead = waiting  # it says so again, for this rank must not get out of step with the others
            if not isinstance(error, TimeoutError) or waiting.done():
                raise
            raise stalled(self._failed(self._runs), self._timeout_s, self.reader) from None
        if made is not None:
            torch.cuda.current_stream(self.device).wait_event(made)
        self._runs += 1
        self._ahead = self._submit(self._runs)
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

    def _submit(self, run: int) -> "Future[tuple[Batch, Any]]":
        """Have the worker make a batch, in memory of this thread: that of another's heap may be too small."""
        size, dtype = self.views.size, torch.half if self._half and not self._in_levels else torch.float
        views = torch.empty(2 * self.micro_batch, size, size, 3, dtype=dtype, device=self.device)
        if self._stream is None:
            return self._worker.submit(self._make, run, views)
        views.record_stream(self._stream)
        free = torch.cuda.current_stream(self.device).record_event()  # what had that memory before is done with it
        return self._worker.submit(self._make_on_gpu, run, views, free)

    @cached_property
    def _worker(self) -> ThreadPoolExecutor:
        """A thread whose torch operators use as many threads as DALI has; the caller's keep theirs."""
        threads, worker = torch.get_num_threads(), ThreadPoolExecutor(1, "loader")
        worker.submit(torch.set_num_threads, self._num_threads).result()
        torch.set_num_threads(threads)
        return worker

    @cached_property
    def _stream(self) -> "torch.cuda.Stream | None":
        return torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def _make_on_gpu(self, run: int, views: Tensor, free: Any) -> tuple[Batch, Any]:
        assert self._stream is not None
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(free)
            batch, _ = self._make(run, views)
            return batch, self._stream.record_event()

    def _make(self, run: int, views: Tensor) -> tuple[Batch, None]:
        """The views of a batch, written to `views`."""
        while True:
            if self._pipe is None:
                self._pipe = self._build(run)
            try:
                first, second, *colours = self._feed.outputs(self._pipe, self._stream)
                break
            except LoaderError:
                raise
            except (RuntimeError, ValueError) as error:
                self._pipe = None  # it has gone on, and so has what was read for it
                self._note(run, self._undecodable(run, error))
        encoded = self._feed.encoded(run)
        assert encoded is not None
        if colours:
            first, second, *colours = (torch.from_dlpack(each.as_tensor()) for each in (first, second, *colours))
            for levels, A, B, out in zip((first, second), colours[::2], colours[1::2], views.chunk(2), strict=True):
                finish(levels, A, B, self.views, out)
            views = views.half() if self._half else views
        else:
            for view, out in zip((first, second), views.chunk(2), strict=True):
                copy_out(view, out, self._stream)
        labels = None if encoded.labels is None else torch.from_numpy(encoded.labels)
        epoch, step, _ = self._place(run)
        return Batch(views.permute(0, 3, 1, 2), labels, epoch, step * self._order.batch_size, encoded.samples), None

    def _build(self, run: int) -> "Pipeline":
        """A pipeline whose first batch is that of `run`."""
        from pipeline.graph import two_views

        if self.device.type == "cpu":
            keep_freed_memory()
        me = weakref.proxy(self)  # DALI holds its callbacks, and what they hold, until cycles are collected
        each = sum(shard.bytes for shard in self.dataset.shards) // self.dataset.samples
        depth = max(1, min(MOST_AHEAD, IN_FLIGHT // max(1, each * self.micro_batch)))
        self._feed = _Feed(ahead((partial(Loader._read, me, number) for number in itertools.count(run)), depth))
        return two_views(
            self._encoding,
            self.views,
            lambda i: me._feed.images(run + i),
            lambda i: Loader._draw(me, run + i),
            second=self._second_views,
            batch_size=self.micro_batch,
            device_id=_device_id(self.device),
            num_threads=self._num_threads,
            half=self._half,
            levels=self._in_levels,
        )

    def _place(self, run: int) -> tuple[int, int, int]:
        """Of a (micro-)batch: its epoch, its global batch in it, and the position of its first image."""
        batch, part = divmod(run, self._micro_batches)
        epoch, step = divmod(batch, self.steps_per_epoch)
        first = (step * self.world_size + self.rank) * self.local_batch_size + part * self.micro_batch
        return epoch, step, first

    def _draw(self, run: int) -> tuple[Draws, Draws]:
        epoch, _, position = self._place(run)
        n, seed = self.micro_batch, self._order.seed
        return draw(self.views, self._second_views, seed=seed, epoch=epoch, position=position, n=n)

    # ---- bytes, and what is wrong with them

    def _read(self, run: int) -> Encoded:
        epoch, step, first = self._place(run)
        positions = np.arange(first, first + self.micro_batch)
        wanted = self._order.samples_at(epoch, positions)
        if self._cache:
            self._bring(epoch, step)
        while True:
            samples = self._sound(epoch, positions, wanted)
            try:
                return self.reader.read(samples)
            except DamagedError as error:
                self._note(run, error.faults)
            except (OSError, DatasetError) as error:
                raise LoaderError(f"{self._failed(run)}: {error}") from error

    def _sound(self, epoch: int, positions: Numbers, samples: Numbers) -> Numbers:
        """The samples, with others for those known to be damaged."""
        damaged = self._damaged
        if not damaged:
            return samples
        samples = samples.copy()
        for i in np.flatnonzero(np.isin(samples, list(damaged))).tolist():
            others = self._order.substitutes(epoch, int(positions[i]))
            samples[i] = next(other for other in others if other not in damaged)
        return samples

    def _note(self, run: int, faults: Mapping[int, str]) -> None:
        """Remember damaged samples. Raises LoaderError where there are more than may be replaced."""
        with self._noting:
            more = len(self._damaged.keys() | faults.keys()) > self._skip_damaged
            if not more:
                self._damaged = {**self._damaged, **faults}
        if more:
            before = f" {len(self._damaged)} were replaced before it." if self._damaged else ""
            advice = f".{before} --skip-damaged N, now {self._skip_damaged}, replaces up to N samples of a run"
            raise LoaderError(_damaged(self._failed(run), faults, self.reader) + advice)

    def _undecodable(self, run: int, error: Exception) -> dict[int, str]:
        """The images of a failed batch that do not decode. Raises LoaderError where all do."""
        faults = self._feed.undecodable(run, self._encoding, self.device)
        if not faults:
            from pipeline.graph import complaint

            raise LoaderError(f"{self._failed(run)}: {complaint(error)}") from error
        return faults

    def _failed(self, run: int) -> str:
        epoch, step, _ = self._place(run)
        return f"rank {self.rank} could not read batch {step} of epoch {epoch} of {self.dataset.address}"

    def _bring(self, epoch: int, step: int) -> None:
        """Have the cache fetch the shards of the windows that a batch reads from, and of the next ones."""
        assert self._cache is not None
        start, order = self.rank * self.local_batch_size, self._order
        lanes = {
            lane: order.windows_of(epoch, lane, step) for lane in order.lanes_of(start, start + self.local_batch_size)
        }
        if self._near == (epoch, lanes):
            return
        self._near = epoch, lanes
        near = [  # by turns: every lane's next window is needed at about the same time
            [*order.shards_of(epoch, lane), *order.shards_of(epoch + 1, lane)[:1]][windows.start : windows.stop + 1]
            for lane, windows in lanes.items()
        ]
        shards = [shard for part in itertools.zip_longest(*near, fillvalue=()) for window in part for shard in window]
        self._cache.prefetch(map(self.reader.file, self.reader.keep(shards)))

    @cached_property
    def reader(self) -> Reader:
        return Reader(self.dataset, self._cache, again=True)

    @cached_property
    def _encoding(self) -> "Encoding":
        return _encoding(self.dataset, self._hw_decoder_load)

    @cached_property
    def _in_levels(self) -> bool:
        """Whether the graph gives levels, and `finish` makes views of them."""
        views = self.views, self._second_views or self.views
        return self.device.type == "cpu" and all(view.ends_in_colour for view in views)

    @property
    def damaged(self) -> dict[int, str]:
        """Samples that were replaced, by number, and what is wrong with each: by this rank, and of `learn`."""
        return dict(self._damaged)

    def learn(self, damaged: Mapping[int, str]) -> None:
        """Replace these samples too, which other ranks met."""
        with self._noting:
            self._damaged = {**self._damaged, **damaged}

    # ---- position

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the stream of batches; equal on all ranks."""
        return {
            "dataset": self.dataset.fingerprint,
            "batch_size": self._order.batch_size,
            "views": asdict(self.views),
            "second_views": asdict(self._second_views) if self._second_views else None,
            "seed": self._order.seed,
            "shuffle": self._order.shuffle,
            "window": self._order.window,
            "lanes": self._order.lanes,
        }

    def state_dict(self) -> dict[str, Any]:
        """The position of the next global batch, JSON-able, equal on all ranks; of one given in part, its own.

        damaged is this rank's: whoever saves the state joins those of all ranks.
        """
        epoch, step, _ = self._place(self._runs)
        return {
            "identity": self.identity,
            "epoch": epoch,
            "position": step * self._order.batch_size,
            "damaged": {str(sample): problem for sample, problem in self._damaged.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position, of any number of ranks.

        Raises ValueError naming what decides another stream, or where more samples have been replaced than may be.
        """
        saved, mine = dict(state["identity"]), self.identity
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
        if len(state["damaged"]) > self._skip_damaged:
            raise ValueError(
                f"{len(state['damaged'])} damaged samples have been replaced so far, more than --skip-damaged "
                f"{self._skip_damaged} allows; give at least as many"
            )
        wait([self._ahead] if self._ahead else [])  # it uses the pipeline
        self._ahead = self._pipe = None
        self._damaged = {int(sample): problem for sample, problem in state["damaged"].items()}
        batches = state["epoch"] * self.steps_per_epoch + state["position"] // self._order.batch_size
        self._runs = batches * self._micro_batches


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

    batch_size is per rank; the last batch holds the rest. samples is the most that all ranks together give, spread
    evenly over the data set, which may be sorted by class; None gives all.
    Raises LoaderError where a batch cannot be read.
    """
    from pipeline.graph import complaint, plain_view

    num = dataset.samples if samples is None else min(samples, dataset.samples)
    first, stop = (num * number // world_size for number in (rank, rank + 1))
    if first == stop:
        return
    batch_size = min(batch_size, stop - first)
    mine = np.arange(first, stop) * dataset.samples // num
    parts = [mine[at : at + batch_size] for at in range(0, len(mine), batch_size)]
    if device.type == "cpu":
        keep_freed_memory()
    reader, encoding = Reader(dataset), _encoding(dataset)
    feed = _Feed(ahead((partial(reader.read, part) for part in parts), 1, TIMEOUT_S))
    its = weakref.proxy(feed)  # as in `Loader`
    pipe = plain_view(
        encoding,
        views,
        lambda i: its.images(i),
        batch_size=batch_size,
        device_id=_device_id(device),
        num_threads=num_threads,
    )
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    try:
        for step in range(len(parts)):
            failed = f"rank {rank} could not read batch {step} of {dataset.address}"
            try:
                (output,) = feed.outputs(pipe, stream)
            except DamagedError as error:
                raise LoaderError(_damaged(failed, error.faults, reader)) from error
            except StalledError:
                raise stalled(failed, TIMEOUT_S, reader) from None
            except (OSError, DatasetError) as error:
                raise LoaderError(f"{failed}: {error}") from error
            except RuntimeError as error:
                faults = feed.undecodable(step, encoding, device)
                said = _damaged(failed, faults, reader) if faults else f"{failed}: {complaint(error)}"
                raise LoaderError(said) from error
            batch = feed.encoded(step)
            assert batch is not None
            n, size = len(batch.samples), views.size
            images = torch.empty(n, size, size, 3, device=device)
            copy_out(output, images, stream)
            labels = torch.full((n,), -1) if batch.labels is None else torch.from_numpy(batch.labels)
            yield images.permute(0, 3, 1, 2), labels
    finally:
        del pipe  # before the feed, whose images it may still read


def stalled(failed: str, seconds: float, reader: Reader) -> LoaderError:
    """What to say where nothing has come for so long; from now on the process ends without waiting for its threads."""
    threading._register_atexit(_leave)  # type: ignore[attr-defined]  # the last registered goes first
    busy = reader.busy()
    where = f"reading {', '.join(busy)}" if busy else "it is being decoded or augmented"
    return LoaderError(
        f"{failed}: nothing has come for {seconds:g} s, {where}. See whether that disk or store answers, and go on; "
        "train.py waits as long as --data-timeout says"
    )


def _leave() -> None:
    """A thread that hangs in a system call would be joined before the process ends."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _encoding(dataset: Dataset, hw_decoder_load: float = 0.65) -> "Encoding":
    from pipeline.graph import Encoding

    return Encoding(raw=dataset.raw, max_pixels=dataset.options["max_pixels"], hw_decoder_load=hw_decoder_load)


def _damaged(failed: str, faults: Mapping[int, str], reader: Reader) -> str:
    """What to say of damaged samples that end the reading."""
    first = reader.describe(*next(iter(faults.items())))
    return (
        f"{failed}: {first}. If a shard changed since it was written, copy it again; else let "
        f"`python tools/make_shards.py verify {reader.dataset.address} --images` list what cannot be read, and "
        "`quarantine` leave it out"
    )


def _undecodable(encoded: Encoded, encoding: "Encoding", device: torch.device) -> dict[int, str]:
    """What is wrong with each image of a batch that DALI does not decode, by the number of its sample.

    In Pillow's words, where it refuses too.
    """
    from PIL import Image, UnidentifiedImageError

    from pipeline.graph import Decoder

    faults: dict[int, str] = {}
    if not isinstance(encoded.images, list):  # pixels need no decoder
        return faults
    for i, complaint in Decoder(encoding, _device_id(device)).refused(encoded.images).items():
        sample, content = int(encoded.samples[i]), encoded.images[i].tobytes()
        why = f"does not decode ({complaint})"
        try:
            with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(content)) as image:
                if image.width * image.height > encoding.max_pixels:
                    why = f"has {image.width}x{image.height} pixels, more than {encoding.max_pixels}"
                else:
                    image.load()
        except UnidentifiedImageError:
            why = "does not begin like an image"
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error ... for bad bytes
            why = f"does not decode ({error})"
        faults[sample] = why
    return faults


def _device_id(device: torch.device) -> int | None:
    """The number of a GPU, which DALI wants; torch's current one where the device has none, and None for the CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def keep_freed_memory() -> None:
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
