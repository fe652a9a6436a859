"""One update of the network: the gradient of a whole batch, checked, and the optimizer's step.

Nothing here waits for the device: a step whose gradient is not finite changes nothing, and says so in a tensor.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from model.encoder import Encoder
from model.large_batch import Statistics, backward
from model.lars import LARS
from model.memory_plan import Plan
from model.simclr import SimCLR


class Outcome(NamedTuple):
    """The result of a step: () float32 tensors, still on their device, so that nothing waits for them."""

    loss: Tensor  # of this process's rows
    skipped: Tensor  # 1 if the gradient was not finite and nothing changed, else 0; the same on all processes
    source: Tensor  # 1 if this process's own z was not finite, else 0; the loss carries that to all processes


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Iterable[Tensor],
    loss_of: Callable[[Tensor], Tensor],
    lr: float,
    *,
    count: int = 1,
    keep: int = 1,
    offload: bool = False,
) -> Outcome:
    """One update from `count` micro-batches of views (2m, 3, S, S), or none if its gradient is not finite.

    optimizer from `build_optimizer`; the rest as in `model.large_batch.backward`.
    """
    before = Statistics(model)
    loss, z = backward(model, micro_batches, loss_of, count=count, keep=keep, offload=offload)
    # The gradients have been averaged over the processes, so all see the same norm and decide alike.
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    skipped = ~torch.nn.utils.get_total_norm(grads).isfinite()
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad()
    before.restore(where=skipped)
    return Outcome(loss.float(), skipped.float(), (~z.isfinite().all()).float())


def build_optimizer(
    name: Literal["lars", "sgd", "adamw"], groups: list[dict[str, Any]], *, lr: float, momentum: float
) -> torch.optim.Optimizer:
    """An optimizer whose step changes nothing where its `found_inf`, a () tensor, is 1."""
    if name == "lars":
        return LARS(groups, lr=lr, momentum=momentum)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=True)
    sgd = torch.optim.SGD(groups, lr=lr, momentum=momentum, fused=True)
    if momentum:
        for param in (param for group in sgd.param_groups for param in group["params"]):
            # torch creates them uninitialised in the first step, and leaves them so if that step is skipped
            sgd.state[param]["momentum_buffer"] = torch.zeros_like(param)
    return sgd


@dataclass
class Training:
    """What a configuration trains, on this process's device."""

    encoder: Encoder
    network: SimCLR  # encoder and head
    model: nn.Module  # network as the processes share it
    optimizer: torch.optim.Optimizer
    peak_lr: float
    plan: Plan  # how a batch goes through the device
    loss_of: Callable[[Tensor], Tensor]  # z (2n, D) -> () loss
    loss: str  # which implementation, and why
    half: bool  # views are float16
    z: Tensor  # (2n, D) of the last step

    def step(self, micro_batches: Iterable[Tensor], lr: float, part: Plan | None = None) -> Outcome:
        """One update from a batch in micro-batches of views, which follow `plan`, or `part` if that is given."""
        part = part or self.plan

        def loss_of(z: Tensor) -> Tensor:
            self.z = z.detach()
            return self.loss_of(z)

        return train_step(
            self.model,
            self.optimizer,
            micro_batches,
            loss_of,
            lr,
            count=part.count,
            keep=part.keep,
            offload=part.offload,
        )
