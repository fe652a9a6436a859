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

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd


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
                   while the first pass goes on. Those that are encoded twice are held until the second pass.
    loss_of        z (2n, D), view-major, the images in the order of the micro-batches -> () loss.
    keep           1 to `count`: micro-batches whose activations stay, at the price of their memory.
    offload        hold micro-batches in pinned host memory; for a batch of views too large for the GPU.
    A loss that is not finite leaves no gradient that is. Never waits for the device. ValueError for a keep out of range
    and for dropout, which would draw anew in the second pass.
    """
    if not 1 <= keep <= count:
        raise ValueError(f"keep: expected 1 to {count}, the number of micro-batches, got {keep}")
    num_twice = count - keep  # the first of the micro-batches, which are encoded a second time
    if num_twice and any(isinstance(module, _DropoutNd) and module.p and module.training for module in model.modules()):
        raise ValueError("the model has dropout, which would draw anew when a micro-batch is encoded a second time")

    def encode(views: Tensor, *, graph: bool, last: bool) -> Tensor:
        # After a forward outside of no_sync, DDP reduces in every backward pass: only the last forward may be outside.
        without_reduction = nullcontext if last else getattr(model, "no_sync", nullcontext)
        with torch.set_grad_enabled(graph), without_reduction():
            return model(views)

    held: list[Tensor] = []
    parts: list[Tensor] = []
    for i, views in enumerate(micro_batches):
        parts.append(encode(views, graph=i >= num_twice, last=i == count - 1 and not num_twice))
        if i < num_twice:
            held.append(_on_host(views) if offload else views)
    assert len(parts) == count
    del views

    # (2m, D) each, view-major, to (2n, D) and the gradient back
    z = torch.cat([part.detach().unflatten(0, (2, -1)) for part in parts], 1).flatten(0, 1).requires_grad_()
    loss = loss_of(z)
    (grad,) = torch.autograd.grad(loss, z)
    grad = torch.where(loss.isfinite(), grad, torch.nan)
    split = grad.unflatten(0, (2, -1)).split([len(part) // 2 for part in parts], 1)
    grads = [part.flatten(0, 1).contiguous() for part in split]

    # From the last to the first, as one graph would add them up
    torch.autograd.backward(parts[num_twice:], grads[num_twice:])
    del parts
    with _fixed_statistics(model):
        while held:
            views = held.pop().to(z.device, non_blocking=True)
            encode(views, graph=True, last=not held).backward(grads[len(held)])
    return loss.detach(), z.detach()


@contextmanager
def _fixed_statistics(model: nn.Module) -> Iterator[None]:
    """BatchNorms normalise as before but do not update their running statistics: the first pass has done so."""
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
    """A copy of a model's buffers, to restore them after a step that is skipped."""

    def __init__(self, model: nn.Module) -> None:
        self._groups: list[list[Tensor]] = []
        for dtype in dict.fromkeys(buffer.dtype for buffer in model.buffers()):
            self._groups.append([buffer for buffer in model.buffers() if buffer.dtype == dtype])
        self._before = [_flat(group) for group in self._groups]

    def restore(self, where: Tensor) -> None:
        """Put them back where the () bool `where` is true, without waiting for the device."""
        for group, before in zip(self._groups, self._before, strict=True):
            chosen = torch.where(where, before, _flat(group)).split([buffer.numel() for buffer in group])
            torch._foreach_copy_(group, [part.view_as(buffer) for part, buffer in zip(chosen, group, strict=True)])


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])
