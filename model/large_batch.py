"""The exact gradient of a batch that does not fit, by encoding it in micro-batches: cached gradients.

    loss, z = backward(model, micro_batches, loss_of, count=16)          p.grad is that of the whole batch

NT-Xent needs every z at once, but of the encoder only z: so the first pass encodes one micro-batch after the other
without a graph, the loss gives its gradient at z, and the second pass encodes each micro-batch again, now with a graph,
and sends its part of that gradient back. The result is that of one graph over all micro-batches, added up in the same
order (bitwise, where a kernel gives equal results for equal input). Each BatchNorm sees one micro-batch at a time, both
views of its images together, and its running statistics move once per micro-batch, in their order.

The last `keep` micro-batches take their graph from the first pass and are not encoded again: 1 costs no memory, all of
them is the plain step. A forward is a third of a step, so a step of K micro-batches takes 1 + (K - keep) / 3K of one.
Gao et al. 2021, arXiv:2101.06983.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

ROOM = 0.8  # of the free GPU memory; the rest is for the optimizer's state, the loss and the image pipeline
FEW = 32  # images in a micro-batch: with fewer a GPU idles, and a BatchNorm's statistics are poor
NO_ROOM = ("out of memory", "ALLOC_FAILED", "unable to find an engine", "Unable to find a valid cuDNN algorithm")


def backward(
    model: nn.Module,
    micro_batches: Iterable[Tensor],
    loss_of: Callable[[Tensor], Tensor],
    *,
    count: int,
    keep: int = 1,
    offload: bool = False,
) -> tuple[Tensor, Tensor]:
    """Add the gradient of loss_of(z) to each p.grad; returns the () loss and z (2n, D), both without a graph.

    model          views -> z, a row for a row; DistributedDataParallel reduces once, in the last backward pass.
    micro_batches  `count` tensors (2m, 3, S, S), each view-major and of any m; taken one by one, so they may be made
                   while the first pass goes on. Those to be encoded again are held until then.
    loss_of        z (2n, D), view-major, the images in the order of the micro-batches -> () loss.
    keep           1 to `count`: micro-batches whose activations stay, at the price of their memory.
    offload        hold micro-batches in pinned host memory; for a batch of views too large for the GPU.
    A loss that is not finite leaves no gradient that is. Never waits for the device. ValueError for a keep out of range
    and for dropout, which would draw anew in the second pass.
    """
    if not 1 <= keep <= count:
        raise ValueError(f"keep: expected 1 to {count}, the number of micro-batches, got {keep}")
    again = count - keep  # the first so many are encoded a second time
    if again and any(isinstance(module, _DropoutNd) and module.p and module.training for module in model.modules()):
        raise ValueError("the model has dropout, which would draw anew when a micro-batch is encoded a second time")

    def encode(views: Tensor, *, graph: bool, last: bool) -> Tensor:
        # DDP reduces in every backward pass from a forward that it saw outside of no_sync on; one may be that.
        quiet = nullcontext if last else getattr(model, "no_sync", nullcontext)
        with torch.set_grad_enabled(graph), quiet():
            return model(views)

    held: list[Tensor] = []
    parts: list[Tensor] = []
    for i, views in enumerate(micro_batches):
        parts.append(encode(views, graph=i >= again, last=i == count - 1 and not again))
        if i < again:
            held.append(_on_host(views) if offload else views)
    assert len(parts) == count
    del views

    # (2m, D) each, view-major, to (2n, D) and the gradient back
    z = torch.cat([part.detach().unflatten(0, (2, -1)) for part in parts], 1).flatten(0, 1).requires_grad_()
    loss = loss_of(z)
    (grad,) = torch.autograd.grad(loss, z)
    grad = torch.where(loss.isfinite(), grad, torch.nan)
    split = grad.unflatten(0, (2, -1)).split([len(part) // 2 for part in parts], 1)
    grads = [each.flatten(0, 1).contiguous() for each in split]

    # From the last to the first, as one graph would add them up
    torch.autograd.backward(parts[again:], grads[again:])
    del parts
    with _fixed_statistics(model):
        while held:
            views = held.pop().to(z.device, non_blocking=True)
            encode(views, graph=True, last=not held).backward(grads[len(held)])
    return loss.detach(), z.detach()


@contextmanager
def _fixed_statistics(model: nn.Module) -> Iterator[None]:
    """BatchNorms normalise as before but leave their running statistics alone: this batch has moved them already."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def _on_host(views: Tensor) -> Tensor:
    return torch.empty_like(views, device="cpu", pin_memory=True).copy_(views, non_blocking=True)


class Statistics:
    """The buffers of a model as they are now, to go back to after a step that turned out not to count."""

    def __init__(self, model: nn.Module) -> None:
        self._groups: list[list[Tensor]] = []
        for dtype in dict.fromkeys(buffer.dtype for buffer in model.buffers()):
            self._groups.append([buffer for buffer in model.buffers() if buffer.dtype == dtype])
        self._before = [_flat(group) for group in self._groups]

    def restore(self, where: Tensor) -> None:
        """Put them back if the () bool `where` is true, without asking the device."""
        for group, before in zip(self._groups, self._before, strict=True):
            chosen = torch.where(where, before, _flat(group)).split([buffer.numel() for buffer in group])
            torch._foreach_copy_(group, [part.view_as(buffer) for part, buffer in zip(chosen, group, strict=True)])


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


@dataclass(frozen=True)
class Plan:
    """How a batch goes through a device; see `plan`. The fields are those of `backward`, and images per micro-batch."""

    micro_batch: int
    count: int
    keep: int
    offload: bool

    def __str__(self) -> str:
        return (
            f"{self.count * self.micro_batch} per process"
            + (f" in {self.count} micro-batches of {self.micro_batch}" if self.count > 1 else "")
            + (f", {self.count - self.keep} of them encoded twice" if self.count > self.keep else "")
            + (", waiting on the host" if self.offload else "")
        )


def plan(
    model: nn.Module,
    images: int,
    like: Tensor,
    *,
    micro_batch: int = 0,
    keep: int = 0,
    agree: Callable[[int], int] = int,
) -> Plan:
    """What fits: the largest micro-batch that divides `images`, and as many kept graphs as there is room for.

    A few images are measured first; sizes that cannot fit by them, and those above `most_images`, are not tried.

    model        not wrapped by DDP, on its device; is run with zeros and left as it was.
    images       of this process's batch.
    like         (1, 3, S, S), of the views' type and device.
    micro_batch  a divisor of `images`; 0 tries them, largest first. A CPU cannot be asked what fits: 0 is `images`.
    keep         0 fills the memory that is left; on a CPU it is 1.
    agree        turns a number of each process into the smallest; all call it equally often.
    ValueError where `micro_batch`, or a single image, does not fit, or `micro_batch` is above `most_images`; and where
    FEW images would fit, but of the divisors only one less than half of that: a prime factor of `images` would make the
    micro-batches tiny.
    """
    if like.device.type != "cuda":
        micro_batch = micro_batch or images
        return Plan(micro_batch, images // micro_batch, min(keep or 1, images // micro_batch), offload=False)

    bound = most_images(model, like)
    if micro_batch > bound:
        raise ValueError(
            f"--micro-batch {micro_batch}: expected at most {bound} of {tuple(like.shape[1:])}, so that the largest "
            f"activation of this encoder has fewer than 2^31 elements, which is as far as CUDA kernels count"
        )
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(like.device)[0]
    room = int(ROOM * free)
    views = 2 * images * like.numel() * like.element_size()
    offload = views > room // 4
    room -= 0 if offload else views
    most = free if micro_batch else room

    def measure(size: int) -> tuple[int, int] | None:
        # Twice: in the first run of a size the libraries hold what they try out.
        return _needs(model, size, like, most) and _needs(model, size, like, most)

    sizes = [micro_batch] if micro_batch else divisors(images)
    few = min(FEW, sizes[0])
    needs = measure(few)
    # What a graph holds grows with the images, but for copies of weights in half precision; a run takes more than that.
    weights = sum(param.numel() * param.element_size() for param in model.parameters())
    likely = agree(max(few, most * few // max(1, needs[1] - weights)) if needs else few - 1)
    for candidate in sizes:
        if candidate > min(likely, bound):
            continue
        needs = needs if candidate == few else measure(candidate)
        if agree(needs is not None):
            break
    else:
        raise ValueError(
            f"{candidate} image(s) of {tuple(like.shape[1:])} in one micro-batch do not fit the {most >> 20} MiB that "
            f"are free on {like.device}; give a smaller --micro-batch or a smaller encoder"
        )
    assert needs is not None
    if not micro_batch and 2 * candidate < FEW == few <= likely:  # for want of divisors, not of memory
        above = next(size for size in reversed(sizes) if size > FEW)
        raise ValueError(
            f"{images} images per process divide into micro-batches of {above}, which do not fit {like.device}, or of "
            f"{candidate}, though {FEW} would fit: choose a --batch-size that gives each process "
            f"{round(images / FEW) * FEW}, or insist with --micro-batch {candidate}"
        )
    peak, graph = needs
    count = images // candidate
    fitting = agree(min(count, 1 + max(0, room - peak) // graph))
    return Plan(candidate, count, min(keep, count) or fitting, offload and count > 1)


def most_images(model: nn.Module, like: Tensor) -> int:
    """Images in a micro-batch, at most, whose largest activation has fewer than 2^31 elements.

    Above that kernels that count in 32 bits write to wrong places, which ends the CUDA context and no error message
    says (pytorch/pytorch#117736). By the shapes that one view has behind each layer, on the meta device.
    """
    largest = like[0].numel()

    def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
        nonlocal largest
        largest = max(largest, output.numel() if isinstance(output, Tensor) else 0)

    hooks = [module.register_forward_hook(note) for module in model.modules()]
    training = model.training
    model.eval()
    try:
        shapes = {name: t.to("meta") for name, t in (*model.named_parameters(), *model.named_buffers())}
        dtype = next((param.dtype for param in model.parameters()), torch.float32)  # autocast overlooks meta tensors
        with torch.no_grad():
            functional_call(model, shapes, (torch.empty(1, *like.shape[1:], dtype=dtype, device="meta"),))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return (2**31 - 1) // (2 * largest)


def divisors(number: int) -> list[int]:
    """Largest first."""
    return [divisor for divisor in range(number, 0, -1) if number % divisor == 0]


def _needs(model: nn.Module, images: int, like: Tensor, room: int) -> tuple[int, int] | None:
    """Bytes that a micro-batch takes at most, and those it holds after its forward; None if `room` is too small."""
    device = like.device
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before, total = torch.cuda.memory_allocated(device), torch.cuda.mem_get_info(device)[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved(device) + room) / total), device)
    training = model.training
    model.eval()  # as large as in training; but statistics stay, and SyncBatchNorm waits for no other process
    try:
        views = like.new_zeros(2 * images, *like.shape[1:]).contiguous(memory_format=torch.channels_last)
        z = model(views)
        graph = torch.cuda.memory_allocated(device) - before
        z.backward(torch.zeros_like(z))
        return torch.cuda.max_memory_allocated(device) - before, graph
    except torch.OutOfMemoryError:
        return None
    except RuntimeError as error:  # so cuDNN and cuBLAS say that they have no room to work in; or that they are broken
        if images == 1 or not any(words in str(error) for words in NO_ROOM):
            raise
        return None
    finally:
        model.zero_grad()
        model.train(training)
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        torch.cuda.reset_peak_memory_stats(device)
