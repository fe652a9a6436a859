"""A whole training step on tensors that say they are on a GPU and hold nothing, on a machine that has none.

torch's FakeTensorMode follows shapes, types, strides and devices through every operation. So this finds tensors of two
devices in one operation, reads of a value, for which the host waits, copies to the GPU that may block, and what the
fused optimizers take without a check and read wrongly. Values, kernels and autograd's engine are a GPU's to test.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from model import monitor, nt_xent, nt_xent_tiles
from model.encoder import build_encoder
from model.lars import param_groups
from model.simclr import ProjectionHead, SimCLR
from model.step import build_optimizer, train_step

IMAGES, SIZE, COUNT = 4, 32, 2  # of a micro-batch, of a view, and micro-batches of a step
READS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal.default", "unique")


class Watch(TorchDispatchMode):
    """AssertionError for an operation that waits for the GPU, or that a fused optimizer would get wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: set[str] = set()
        self.pinned: list[Tensor] = []

    def pin(self, t: Tensor) -> Tensor:
        self.pinned.append(t)
        return t

    def is_pinned(self, t: Tensor) -> bool:
        return any(t is each for each in self.pinned)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = str(func), kwargs or {}
        self.calls.add(name)
        on_gpu = any(isinstance(arg, Tensor) and arg.is_cuda for arg in args)
        assert not (on_gpu and any(read in name for read in READS)), f"{name} reads a value of the GPU"
        if "_fused_" in name:
            check_fused(name, [arg for arg in args if isinstance(arg, list)], kwargs)
            return None  # no fake is registered; all are in place
        out = func(*args, **kwargs)
        if name in ("aten._to_copy.default", "aten.copy_.default"):
            check_copy(name, args, kwargs, out)
        return out


def check_copy(name: str, args: Any, kwargs: Any, out: Tensor) -> None:
    in_place = name == "aten.copy_.default"
    source = args[1] if in_place else args[0]
    free = kwargs.get("non_blocking", args[2] if in_place and len(args) > 2 else False)
    if source.device != out.device:
        assert free, f"{name} from {source.device} to {out.device} may block: expected non_blocking=True"
        on_host = source if out.is_cuda else out
        assert on_host.is_pinned(), f"{name} from {source.device} to {out.device} may block: expected pinned memory"


def check_fused(name: str, lists: list[list[Tensor]], kwargs: Any) -> None:
    """What torch's fused kernels ask of tensors before they go through their memory, and what they do not ask."""
    if "sgd" in name:
        wanted = "fused SGD wants momentum buffers only where it has momentum"
        assert any(lists[2:]) == (kwargs["momentum"] > 0), wanted
    for like, *others in zip(*filter(None, lists[: 4 if "adam" in name else 3]), strict=True):
        for other in others:
            assert (like.device.type, other.device.type) == ("cuda", "cuda"), f"{name}: {like.device}, {other.device}"
            assert other.dtype == like.dtype, f"{name}: {other.dtype} beside {like.dtype}"
            assert (other.shape, other.stride()) == (like.shape, like.stride()), f"{name}: strides differ"
    found = kwargs.get("found_inf")
    assert found is not None, f"{name}: no found_inf, and so no step that can be skipped"
    assert (found.device.type, found.dtype) == ("cuda", torch.float32), f"{name}: found_inf is on {found.device}"


def moved(module: nn.Module) -> None:
    """Its parameters and buffers become fakes on the GPU, with the same strides."""

    def there(t: Tensor) -> Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")

    for owner in module.modules():
        for name, param in owner._parameters.items():
            owner._parameters[name] = None if param is None else nn.Parameter(there(param), param.requires_grad)
        for name, buffer in owner._buffers.items():
            owner._buffers[name] = None if buffer is None else there(buffer)


def step(
    optimizer: str,
    loss: str,
    *,
    keep: int = 1,
    offload: bool = False,
    momentum: float = 0.9,
    spoil: Callable[[Tensor], Tensor] = lambda z: z,
) -> Watch:
    """Two training steps with a probe beside them, watched. spoil is done to z before the loss."""
    encoder = build_encoder(18, width=0.25, stem="small")
    network = SimCLR(encoder, ProjectionHead(encoder.num_features)).to(memory_format=torch.channels_last)
    probe = monitor.OnlineProbe(encoder, 10, "cpu")
    watch, tensor, empty_like = Watch(), torch.tensor, torch.empty_like
    counts: list[Any] = []

    # What stands for what fakes cannot do: values of CPU tensors, pinned memory, autograd's engine

    def noted(data: Any, *args: Any, **more: Any) -> Tensor:
        counts[:] = [data]
        return tensor(data, *args, **more)

    def pinning(like: Tensor, *, pin_memory: bool = False, **more: Any) -> Tensor:
        made = empty_like(like, **more)
        return watch.pin(made) if pin_memory else made

    def engine(*_: Any, **__: Any) -> None:
        for p in network.parameters():  # gradients with the strides of their parameters
            p.grad = torch.empty_like(p) if p.grad is None else p.grad.add_(torch.empty_like(p))

    with ExitStack() as stack:

        def replace(place: Any, name: str, with_: Any) -> None:
            stack.enter_context(mock.patch.object(place, name, with_))

        replace(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
        replace(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        replace(nt_xent, "_no_kernels_on", lambda _: None)
        replace(Tensor, "pin_memory", lambda t: watch.pin(t.clone()))
        replace(Tensor, "is_pinned", lambda t: watch.is_pinned(t))
        replace(Tensor, "aminmax", lambda _: (0, 9))  # of the labels
        replace(torch, "empty_like", pinning)
        replace(torch, "tensor", noted)  # just before it asks to repeat by these numbers
        replace(Tensor, "repeat_interleave", lambda _, __: torch.empty(sum(counts[0]), dtype=torch.int64))
        replace(torch.autograd, "grad", lambda _, z: (torch.empty_like(z),))
        for place in (torch.autograd, Tensor):
            replace(place, "backward", engine)
        stack.enter_context(FakeTensorMode())
        moved(network)
        moved(probe.linear)
        forward = network.forward
        network.forward = lambda v: torch.autocast("cuda", torch.bfloat16)(forward)(v).float()  # type: ignore[method-assign]
        made = build_optimizer(optimizer, param_groups(network, 1e-4), lr=0.1, momentum=momentum)  # type: ignore[arg-type]

        def micro_batches() -> Iterator[Tensor]:
            for _ in range(COUNT):
                views = torch.empty(2 * IMAGES, SIZE, SIZE, 3, dtype=torch.half, device="cuda")
                yield views.permute(0, 3, 1, 2)
                probe.learn(torch.zeros(IMAGES, dtype=torch.int64), 1 / COUNT)

        def loss_of(z: Tensor) -> Tensor:
            assert (z.device.type, z.dtype) == ("cuda", torch.float32)
            return nt_xent.nt_xent(spoil(z), 0.1, impl=loss)  # type: ignore[arg-type]

        stack.enter_context(watch)
        for _ in range(2):
            out = train_step(network, made, micro_batches(), loss_of, 0.1, count=COUNT, keep=keep, offload=offload)
        probe.accuracy()
        contrast = monitor.contrast(*torch.empty(2 * IMAGES, 128, device="cuda").chunk(2), 0.1)
        left = [*out, *contrast.values(), *network.buffers(), *network.parameters(), *probe.linear.parameters()]
        assert all(t.is_cuda for t in left)
    return watch


@pytest.mark.parametrize("optimizer", ["lars", "sgd", "adamw"])
@pytest.mark.parametrize("loss", ["reference", "chunked", "triton"])
@pytest.mark.parametrize("keep", [1, COUNT])
def test_a_step_on_a_gpu_waits_for_nothing(optimizer: str, loss: str, keep: int) -> None:
    watch = step(optimizer, loss, keep=keep)
    assert f"aten._fused_{'adamw' if optimizer == 'adamw' else 'sgd'}_" in {c.rsplit(".", 1)[0] for c in watch.calls}
    assert ("swiftclr.nt_xent.default" in watch.calls) == (loss != "reference")


@pytest.mark.parametrize("optimizer", ["lars", "sgd"])
def test_nor_does_one_without_momentum(optimizer: str) -> None:
    step(optimizer, "triton", momentum=0.0)


def test_nor_does_one_whose_views_wait_on_the_host() -> None:
    step("lars", "triton", offload=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.half])
def test_the_tiles_of_the_loss_wait_for_nothing_either(dtype: torch.dtype) -> None:
    """They are inside of an operator, whose shapes alone the step follows. Three tiles a side, no two equal."""
    with FakeTensorMode(), Watch(), torch.no_grad():
        z = torch.empty(9000, 128, dtype=dtype, device="cuda")
        loss, *kept = nt_xent_tiles.forward(z, 0.0135, "", lambda x: x, 0)
        dz = nt_xent_tiles.backward(torch.ones_like(loss), z, *kept, 0.0135, "", 0)
        assert (dz.device, dz.dtype, dz.shape) == (z.device, z.dtype, z.shape)


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (lambda z: z * z.sum().item(), AssertionError, "_local_scalar_dense.* reads a value"),
        (lambda z: z if z.isfinite().all() else -z, AssertionError, "_local_scalar_dense.* reads a value"),
        (lambda z: z * len(z.nonzero()), AssertionError, "nonzero.* reads a value"),
        (lambda z: z * len(z[z > 0]), DynamicOutputShapeException, "nonzero"),
        (lambda z: z.cpu().to("cuda", non_blocking=True), AssertionError, "to cpu may block"),
        (lambda z: z + torch.zeros(128).to("cuda"), AssertionError, "may block"),
        (lambda z: z + torch.zeros(128).to("cuda", non_blocking=True), AssertionError, "may block"),
        (lambda z: z + torch.zeros(128).pin_memory().to("cuda"), AssertionError, "may block"),
        (lambda z: z + torch.zeros(128), RuntimeError, "same device|different devices"),
    ],
)
def test_what_would_wait_or_fail_on_a_gpu_is_found(spoil: Any, error: type[Exception], words: str) -> None:
    """Each planted between the network and the loss."""
    with pytest.raises(error, match=words):
        step("lars", "reference", spoil=spoil)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda lists, more: (lists, more | {"momentum": 0.0}), "momentum buffers only where"),
        (lambda lists, more: ([lists[0], [g.contiguous() for g in lists[1]], lists[2]], more), "strides differ"),
        (lambda lists, more: ([lists[0], [g.half() for g in lists[1]], lists[2]], more), "float16 beside"),
        (lambda lists, more: (lists, more | {"found_inf": None}), "no found_inf"),
        (lambda lists, more: (lists, more | {"found_inf": torch.zeros(())}), "found_inf is on cpu"),
    ],
)
def test_what_a_fused_optimizer_would_get_wrong_is_found(given: Any, words: str) -> None:
    real = torch._fused_sgd_

    def spoiled(*lists: Any, **more: Any) -> Any:
        lists, more = given(lists, more)
        return real(*lists, **more)

    with mock.patch.object(torch, "_fused_sgd_", spoiled), pytest.raises(AssertionError, match=words):
        step("lars", "reference")
