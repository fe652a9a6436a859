"""What every implementation of NT-Xent shares: rows at length 1, their gathering, the shift, and the plain reference.

The loss and the letters are explained in `model.nt_xent`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

Gather = Callable[[Tensor], Tensor]  # this rank's rows -> the rows of all ranks, one rank's below the other's


def shift(temperature: float) -> float:
    """What is subtracted from every logit s / tau, in bits (powers of two), so that e and its sums stay in fp32.

    Unit rows bound the logits by 1 / tau, so no row needs a maximum of its own, and from tau = 0.0143 up not even a
    shift: 2^24 terms of exp(1 / tau) stay below 2^126. Less shift is more accurate, since logits near 0 round finer.
    """
    return max(0.0, math.log2(math.e) / temperature - 101.0)


def unit_rows(z: Tensor) -> tuple[Tensor, Tensor]:
    """(2n, D) rows of z at length 1, and (2n, 1) inverse lengths; fp32, or fp64 for fp64 z.

    Each row is first divided by its largest entry, so that squares neither overflow nor vanish. A row without a normal
    number in it counts as zero: its unit row and its inverse length are 0, so that its gradient is 0 too.
    """
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    largest = z.detach().abs().amax(dim=1, keepdim=True)
    tiny = torch.finfo(z.dtype).tiny
    scaled = torch.where(largest < tiny, 0.0, z / largest.clamp_min(tiny))
    length = torch.linalg.vector_norm(scaled, dim=1, keepdim=True).clamp_min(1.0)  # below 1 only for a zero row
    return scaled / length, torch.where(largest < tiny, 0.0, 1.0 / length / largest.clamp_min(tiny))


def reference(z: Tensor, temperature: float, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """NT-Xent as cross-entropy over the matrix of similarities: what a reader checks first. Any device, any type."""
    with torch.autocast(z.device.type, enabled=False):
        u, _ = unit_rows(z)
        rows = torch.arange(len(u), device=u.device)
        positive = rows.roll(len(u) // 2)
        candidates = u
        if group is not None:
            candidates = _GatherWithGradient.apply(u, group)
            rows, positive = (index + dist.get_rank(group) * len(u) for index in (rows, positive))
        logits = u @ candidates.T / temperature
        return F.cross_entropy(logits.scatter(1, rows[:, None], -math.inf), positive)


class _GatherWithGradient(torch.autograd.Function):
    """All ranks' rows of u; backwards, every rank's gradient of this rank's rows, added up."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.rows = group, len(u)
        return gather_rows(u, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].contiguous()
        dist.all_reduce(total, group=ctx.group)
        return total[dist.get_rank(ctx.group) * ctx.rows :][: ctx.rows], None


def gather_rows(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All ranks' x, one below the other."""
    out = x.new_empty((dist.get_world_size(group) * len(x), *x.shape[1:]))
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # torch 2.14 renamed it
    gather(out, x.contiguous(), group=group)
    return out
