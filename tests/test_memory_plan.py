"""The largest micro-batch that fits is found, on every process alike, and nothing that cannot fit is tried."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.encoder import build_encoder
from model.large_batch import backward
from model.memory_plan import Plan, _needs, most_images, plan
from model.simclr import ProjectionHead, SimCLR
from tests.test_large_batch import gpu, loss_of, network

ROOT = Path(__file__).resolve().parents[1]


def test_a_cpu_encodes_the_whole_batch_unless_told() -> None:
    like = torch.empty(1, 3, 32, 32)
    assert plan(nn.Identity(), 12, like) == Plan(12, 1, 1, offload=False)
    assert plan(nn.Identity(), 12, like, micro_batch=3) == Plan(3, 4, 1, offload=False)
    assert plan(nn.Identity(), 12, like, micro_batch=3, keep=9) == Plan(3, 4, 4, offload=False)


class Gpu:
    """What `plan` asks of the one image that it is given, and of the GPU: one on which so many images fit."""

    device = torch.device("cuda")

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        most: int | None = None,
        *,
        size: int = 32,
        free: int = 2**40,
        each: int = 1,
        fixed: int = 0,
        copies: int = 0,
    ) -> None:
        """Up to `most` images fit if that is given; else those whose run fits the part of `free` that `plan` uses.

        A graph is `each` bytes an image and `copies` of weights; a run takes `fixed` beside it.
        """
        self.tried: list[int] = []
        self.shape = (1, 3, size, size)

        def needs(_model: nn.Module, images: int, _like: Any, room: int) -> tuple[int, int] | None:
            self.tried.append(images)
            graph = each * images + copies
            peak = graph + fixed
            return (peak, graph) if (peak <= room if most is None else images <= most) else None

        monkeypatch.setattr("model.memory_plan._needs", needs)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, free))

    def __getitem__(self, _: int) -> "Gpu":
        return self

    def numel(self) -> int:
        return 3 * self.shape[-1] ** 2

    def element_size(self) -> int:
        return 2


@pytest.mark.parametrize(
    ("images", "most", "chosen"),
    [(1202, 700, 601), (1024, 300, 256), (1024, 20, 16), (100, 40, 25), (1202, 31, 2), (31, 30, 1), (8, 3, 2)],
)
def test_the_largest_divisor_that_fits_is_chosen(
    images: int, most: int, chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However small, where no more than that many images fit."""
    assert plan(nn.Identity(), images, Gpu(monkeypatch, most)).micro_batch == chosen  # type: ignore[arg-type]


@pytest.mark.parametrize(("images", "above", "below", "better"), [(1202, 601, 2, 1216), (47, 47, 1, 32)])
def test_a_batch_of_few_divisors_is_refused_unless_told(
    images: int, above: int, below: int, better: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    like: Any = Gpu(monkeypatch, 40)
    named = (
        f"micro-batches of {above}, which do not fit cuda, or of {below}, though 32 would fit: .* {better}, or insist"
    )
    with pytest.raises(ValueError, match=named):
        plan(nn.Identity(), images, like)
    assert plan(nn.Identity(), images, like, micro_batch=below).micro_batch == below
    assert like.tried[-1] == below


def resnet50() -> nn.Module:
    with torch.device("meta"):
        encoder = build_encoder(50)
        return SimCLR(encoder, ProjectionHead(encoder.num_features))


def test_no_activation_that_kernels_cannot_count_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """ResNet-50 at 224 px has 64 · 112² numbers a view behind its first layer: at 2048 images they are 1.53 · 2^31."""
    model = resnet50()
    like: Any = Gpu(monkeypatch, free=2**50, size=224)
    bound = most_images(model, like)
    assert 2 * bound * 64 * 112**2 < 2**31 <= 2 * (bound + 1) * 64 * 112**2
    assert plan(model, 4096, like).micro_batch == max(like.tried) == 1024
    with pytest.raises(ValueError, match=f"--micro-batch 2048: expected at most {bound} .*2\\^31"):
        plan(model, 4096, like, micro_batch=2048)
    assert max(like.tried) == 1024
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bound_follows_the_network(dtype: torch.dtype) -> None:
    """Of one on the CPU, with its weights and statistics left alone; the largest number is that of its widest layer."""
    model = network(dtype, width=0.25)
    before = [t.clone() for t in (*model.parameters(), *model.buffers())]
    assert most_images(model, torch.empty(1, 3, 48, 48)) == (2**31 - 1) // (2 * 16 * 48**2)
    assert all(torch.equal(a, b) for a, b in zip(before, (*model.parameters(), *model.buffers()), strict=True))


@pytest.mark.parametrize(
    ("images", "gib", "tried"),
    [(4096, 139, {32, 1024}), (4096, 80, {32, 512}), (4096, 40, {32, 256}), (1024, 12, {32, 64}), (64, 2, {32, 16, 8})],
)
def test_a_size_that_cannot_fit_is_not_tried(
    images: int, gib: int, tried: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """83.5 MiB of activations an image: a few images say how many may fit.

    What is tried after that fails only where the rest of a run's memory is too much, as at 16 of 64 images here.
    """
    like: Any = Gpu(monkeypatch, free=gib << 30, size=224, each=int(83.5 * 2**20), fixed=2**29)
    chosen = plan(resnet50(), images, like)
    assert set(like.tried) == tried
    assert chosen.micro_batch == like.tried[-1]
    if (images, gib) == (4096, 139):  # an H200: a quarter of the forward passes are not made twice
        assert chosen == Plan(1024, 4, 1, offload=False)


def test_copies_of_weights_do_not_hide_a_size_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 32 px they weigh as much as the activations of a few images; 1024 images fit here with 1 % to spare."""
    model, each = resnet50(), 2**21
    copies = sum(2 * param.numel() for param in model.parameters())
    free = int(1.01 * (1024 * each + copies + 2**20 + 2 * 1024 * 3 * 32**2 * 2) / 0.8)
    like: Any = Gpu(monkeypatch, free=free, each=each, copies=copies, fixed=2**20)
    assert plan(model, 1024, like).micro_batch == 1024


def test_all_processes_try_the_same_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has less memory decides, and all ask each other equally often."""
    asked: list[list[int]] = []
    for mine in (40, 80):
        answers: list[int] = []
        others = iter(asked[0]) if asked else None

        def agree(number: int, answers: list[int] = answers, others: Any = others) -> int:
            answers.append(number)
            return min(number, next(others)) if others else number

        like: Any = Gpu(monkeypatch, free=mine << 30, size=224, each=int(83.5 * 2**20), fixed=2**29)
        assert plan(resnet50(), 4096, like, agree=agree).micro_batch == 256
        asked.append(answers)
    assert len(asked[0]) == len(asked[1])


@pytest.mark.parametrize(
    ("error", "images", "fits"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), 1, None),
        (RuntimeError("GET was unable to find an engine to execute this computation"), 2, None),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), 2, None),
        (RuntimeError("GET was unable to find an engine to execute this computation"), 1, RuntimeError),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 2, RuntimeError),
    ],
)
def test_what_a_library_without_room_says_means_that_it_does_not_fit(
    error: Exception, images: int, fits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless a single image meets it: then something else is wrong."""

    class Broken(nn.Module):
        def forward(self, _: Tensor) -> Tensor:
            raise error

    for name in ("memory_allocated", "memory_reserved", "reset_peak_memory_stats", "set_per_process_memory_fraction"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1, 1))
    with pytest.raises(fits) if fits else contextlib.nullcontext():
        assert _needs(Broken(), images, torch.empty(1, 3, 4, 4), 1) is None


@gpu
@pytest.mark.gpu
def test_a_gpu_is_filled_and_never_overfilled() -> None:
    """With all but 1 GiB taken, a batch that needs many times as much gets micro-batches, and its step fits."""
    model, like = network(width=1.0).cuda(), torch.empty(1, 3, 32, 32, device="cuda")
    everything = plan(model, 64, like)
    assert (everything.count, everything.keep) == (1, 1)
    free = torch.cuda.mem_get_info()[0]
    taken = torch.empty(free - 2**30, dtype=torch.uint8, device="cuda")
    try:
        some = plan(model, 8192, like)
        assert 1 < some.count < 8192
        assert some.micro_batch * some.count == 8192
        views = (torch.randn(2 * some.micro_batch, 3, 32, 32, device="cuda") for _ in range(some.count))
        backward(model, views, loss_of, count=some.count, keep=some.keep, offload=some.offload)
        assert torch.cuda.max_memory_allocated() - taken.numel() < 2**30
    finally:
        del taken  # also where an error keeps this frame
