"""Cached gradients against one graph over the same micro-batches; steps that a broken gradient must not reach."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.encoder import build_encoder
from model.large_batch import Plan, _needs, backward, most_images, plan
from model.lars import param_groups
from model.nt_xent import nt_xent
from model.simclr import ProjectionHead, SimCLR
from model.step import Outcome, build_optimizer, train_step
from tests.processes import spawn

ROOT = Path(__file__).resolve().parents[1]
RAGGED = (4, 4, 4, 3)  # images in each micro-batch


def network(dtype: torch.dtype = torch.float32, width: float = 0.125) -> nn.Module:
    torch.manual_seed(0)
    encoder = build_encoder(18, width=width, stem="small")
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)  # the zero gammas would hide whole blocks
    model = SimCLR(encoder, ProjectionHead(encoder.num_features, out_features=32))
    return model.to(dtype).to(memory_format=torch.channels_last)


def micro_batches(sizes: tuple[int, ...] = RAGGED, dtype: torch.dtype = torch.float32, size: int = 32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2 * m, 3, size, size, generator=generator).to(dtype) for m in sizes]


def loss_of(z: Tensor) -> Tensor:
    return nt_xent(z, 0.2)


def one_graph(model: nn.Module, batches: list[Tensor]) -> Tensor:
    """The definition: one loss over every row, its views told apart by hand, and one call of autograd."""
    parts = [model(views) for views in batches]
    z = torch.cat([part[: len(part) // 2] for part in parts] + [part[len(part) // 2 :] for part in parts])
    loss = loss_of(z)
    loss.backward()
    return loss.detach()


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


@pytest.fixture
def _one_thread() -> Any:
    """Some of torch's sums depend on how threads share them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("keep", [1, 2, 4])
@pytest.mark.parametrize("sizes", [RAGGED, (5, 5, 5, 5), (2, 6, 1, 7)])
def test_gradients_and_statistics_are_those_of_one_graph(sizes: tuple[int, ...], keep: int) -> None:
    """Bit for bit, whatever is kept and however ragged the micro-batches: nothing is summed in another order."""
    whole, cached = network(), network()
    expected = one_graph(whole, micro_batches(sizes))
    loss, z = backward(cached, iter(micro_batches(sizes)), loss_of, count=4, keep=keep)
    assert torch.equal(loss, expected)
    assert z.shape == (2 * sum(sizes), 32)
    assert grads(whole).keys() == grads(cached).keys() == dict(cached.named_parameters()).keys()
    for name, grad in grads(cached).items():
        assert torch.equal(grad, grads(whole)[name]), name
    for name, buffer in cached.named_buffers():
        assert torch.equal(buffer, whole.get_buffer(name)), name
    assert cached.get_buffer("encoder.bn1.num_batches_tracked") == 4


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_gradients_stay_close_on_many_threads(dtype: torch.dtype, tolerance: float) -> None:
    whole, cached = network(dtype), network(dtype)
    one_graph(whole, micro_batches(dtype=dtype))
    backward(cached, micro_batches(dtype=dtype), loss_of, count=4)
    for name, grad in grads(cached).items():
        expected = grads(whole)[name]
        assert (grad - expected).norm() <= tolerance * expected.norm(), name


def test_one_micro_batch_is_the_plain_step() -> None:
    plain, cached = network(), network()
    (views,) = micro_batches((6,))
    expected = loss_of(plain(views))
    expected.backward()
    loss, _ = backward(cached, [views], loss_of, count=1)
    assert torch.equal(loss, expected)
    assert all(torch.equal(grad, grads(plain)[name]) for name, grad in grads(cached).items())


def test_gradients_are_added_to_what_is_there() -> None:
    """As torch's backward does."""
    once, twice = network(dtype=torch.float64), network(dtype=torch.float64)
    for model, times in ((once, 1), (twice, 2)):
        for _ in range(times):
            backward(model, micro_batches(dtype=torch.float64), loss_of, count=4, keep=2)
    for name, grad in grads(twice).items():
        torch.testing.assert_close(grad, 2 * grads(once)[name], rtol=1e-12, atol=1e-12)


def test_only_what_is_not_kept_is_encoded_twice() -> None:
    for keep, forwards in ((1, 7), (3, 5), (4, 4)):
        model, seen = network(), []
        model.register_forward_hook(lambda *_, seen=seen: seen.append(torch.is_grad_enabled()))
        backward(model, micro_batches(), loss_of, count=4, keep=keep)
        assert (len(seen), sum(seen)) == (forwards, 4)


def test_bfloat16_autocast_gives_the_same_twice() -> None:
    whole, cached = network(), network()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        parts = [whole(views) for views in micro_batches()]
    z = torch.cat([part.float().unflatten(0, (2, -1)) for part in parts], 1).flatten(0, 1)
    loss_of(z).backward()
    forward = cached.forward
    cached.forward = lambda views: autocast(forward, views)  # type: ignore[method-assign]
    backward(cached, micro_batches(), loss_of, count=4)
    for name, grad in grads(cached).items():
        expected = grads(whole)[name]
        assert (grad - expected).norm() <= 1e-2 * expected.norm(), name


def autocast(forward: Any, views: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return forward(views).float()


@pytest.mark.parametrize("keep", [0, 5])
def test_a_keep_out_of_range_is_refused(keep: int) -> None:
    with pytest.raises(ValueError, match="keep: expected 1 to 4"):
        backward(network(), micro_batches(), loss_of, count=4, keep=keep)


def test_dropout_is_refused_where_it_would_draw_twice() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 8), nn.Dropout(0.1))
    with pytest.raises(ValueError, match="dropout"):
        backward(model, micro_batches(size=16), loss_of, count=4)
    backward(model, micro_batches(size=16), loss_of, count=4, keep=4)


# ---- many processes ------------------------------------------------------------------------------------------------


SHARES = (1, 3, 2, 2, 3, 1)  # halves and thirds are equal


def _one_rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=3)
    for world_size in (2, 3):
        group = torch.distributed.new_group(list(range(world_size)))
        if rank >= world_size:
            continue
        model = DistributedDataParallel(
            network(torch.float64), process_group=group, gradient_as_bucket_view=True, broadcast_buffers=False
        )
        share = len(SHARES) // world_size
        mine = micro_batches(SHARES, torch.float64, 16)[rank * share : (rank + 1) * share]
        steps = []
        for keep in (1, len(mine), 1):  # DDP lays its buckets anew after the first backward pass
            loss, _ = backward(model, mine, lambda z, group=group: nt_xent(z, 0.2, group=group), count=share, keep=keep)
            torch.distributed.all_reduce(loss, group=group)
            steps.append((loss / world_size, {name: grad.clone() for name, grad in grads(model.module).items()}))
            model.zero_grad()
        if rank == 0:
            torch.save(steps, Path(folder) / f"{world_size}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_processes_with_micro_batches_step_like_one(tmp_path: Path) -> None:
    """Loss and gradient of 2 and 3 gloo processes under DDP, each with its share of the images, are one graph's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(_one_rank, (port, str(tmp_path)), nprocs=3)
    whole = network(torch.float64)
    expected = one_graph(whole, micro_batches(SHARES, torch.float64, 16))
    for world_size in (2, 3):
        for loss, gradient in torch.load(tmp_path / f"{world_size}.pt", weights_only=True):
            torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
            for name, grad in grads(whole).items():
                assert (gradient[name] - grad).norm() <= 1e-12 * grad.norm(), name


# ---- memory --------------------------------------------------------------------------------------------------------

PEAK = """
import sys, torch
from tests.test_large_batch import backward, loss_of, network
torch.set_num_threads(2)
model, images = network(width=0.125), int(sys.argv[1])
def status(name):
    return int(open("/proc/self/status").read().split(name + ":")[1].split()[0]) // 1024
before = status("VmRSS")
micro_batches = (torch.randn(256, 3, 32, 32) for _ in range(images // 128))
backward(model, micro_batches, loss_of, count=images // 128)
print(status("VmHWM") - before)
"""


@pytest.mark.slow
def test_memory_is_flat_in_the_batch() -> None:
    """ResNet-18 at 32 px in micro-batches of 128 images: 1024 images add at most 1.2 times the memory of 256.

    One graph would take four times as much. The views, which wait for the second pass, are in the count. malloc gives
    large blocks back at once, so that what is counted is what is used.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "2", "MALLOC_MMAP_THRESHOLD_": "262144"}
    commands = [[sys.executable, "-c", PEAK, str(images)] for images in (256, 1024)]
    running = [
        subprocess.Popen(each, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE) for each in commands
    ]
    peaks = [int(process.communicate(timeout=300)[0]) for process in running]
    assert peaks[1] <= 1.2 * peaks[0], f"{peaks} MiB"


# ---- steps that must not happen ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("where", ["views", "loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(name: str, first: bool, where: str) -> None:
    """Weights, momentum, Adam's count and BatchNorm's statistics stay to the bit, and the steps after are not touched.

    NaN comes in by a view, and reaches the running statistics; or the loss overflows; or only its gradient does.
    """

    def state() -> list[Tensor]:
        moments = [value for entry in optimizer.state.values() for value in entry.values()]
        return [t.clone() for t in (*model.parameters(), *model.buffers(), *moments)]

    def step(batches: list[Tensor], scale: float = 1.0) -> Outcome:
        return train_step(model, optimizer, batches, lambda z: scale * loss_of(z), 0.1, count=len(batches))

    good, broken = micro_batches((4, 3), size=16), micro_batches((4, 3), size=16)
    if where == "views":
        broken[1][0, 0, 0, 0] = torch.nan
    scale = {"views": 1.0, "loss": 3e38, "gradient": 3e37}[where]
    ends = []
    for interrupted in (False, True):
        model = network()
        optimizer = build_optimizer(name, param_groups(model, 1e-4), lr=0.1, momentum=0.9)
        if not first:
            assert not step(good).skipped
        if interrupted:
            before = state()
            outcome = step(broken, scale)
            assert outcome.skipped
            assert (bool(outcome.source), bool(outcome.loss.isfinite())) == (where == "views", where == "gradient")
            # the first step makes the state: zeros
            after = state()
            assert all(torch.equal(a, b) for a, b in zip(before, after[: len(before)], strict=True))
            assert all(not t.any() for t in after[len(before) :])
        assert not step(good).skipped
        ends.append(state())
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize(("name", "plain"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_optimizers_that_can_skip_step_like_those_that_cannot(name: str, plain: Any) -> None:
    """Fused kernels go through memory: with another layout of a gradient they would be wrong without a word."""
    ours, theirs = network(), network()
    more = {"momentum": 0.9} if name == "sgd" else {}
    optimizer = build_optimizer(name, param_groups(ours, 1e-2), lr=0.1, momentum=0.9)  # type: ignore[arg-type]
    other = plain(param_groups(theirs, 1e-2), lr=0.1, foreach=False, **more)
    backward(ours, micro_batches((3, 3), size=16), loss_of, count=2)
    for name, param in theirs.named_parameters():
        param.grad = grads(ours)[name].clone()
    for _ in range(3):
        optimizer.step()
        other.step()
    for param, want in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(param, want, rtol=1e-6, atol=1e-7)


# ---- what fits -----------------------------------------------------------------------------------------------------


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

        monkeypatch.setattr("model.large_batch._needs", needs)
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


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


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


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
@pytest.mark.parametrize("offload", [False, True])
def test_a_step_never_waits_for_the_gpu(name: str, offload: bool) -> None:
    """Whether it is skipped or not; and it moves the weights as one graph does."""
    model = network().cuda()
    optimizer = build_optimizer(name, param_groups(model, 1e-4), lr=0.1, momentum=0.9)  # type: ignore[arg-type]
    good = [views.cuda() for views in micro_batches()]
    broken = [*good[:-1], torch.full_like(good[-1], torch.nan)]
    expected = network().cuda()
    one_graph(expected, good)
    outcomes = []
    try:
        for batches in (good, broken):
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            count = len(batches)
            outcomes.append(train_step(model, optimizer, batches, loss_of, 0.1, count=count, offload=offload))
            torch.cuda.set_sync_debug_mode("default")
            if batches is good:
                after = [param.clone() for param in model.parameters()]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [bool(outcome.skipped) for outcome in outcomes] == [False, True]
    assert all(torch.equal(param, kept) for param, kept in zip(model.parameters(), after, strict=True))
    other = build_optimizer(name, param_groups(expected, 1e-4), lr=0.1, momentum=0.9)  # type: ignore[arg-type]
    other.step()
    for param, want in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(param, want, rtol=1e-3, atol=1e-3)
