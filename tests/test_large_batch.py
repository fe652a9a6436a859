"""Cached gradients against one graph over the same micro-batches; steps that a broken gradient must not reach."""

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
from model.large_batch import backward
from model.lars import param_groups
from model.nt_xent import nt_xent
from model.simclr import ProjectionHead, SimCLR
from model.step import Outcome, build_optimizer, train_step
from tests.processes import spawn

ROOT = Path(__file__).resolve().parents[1]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
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
