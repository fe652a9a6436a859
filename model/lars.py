"""LARS in the form that trained SimCLR, as a few multi-tensor calls.

For a weight w with gradient g, and η the trust coefficient:

    g = g + weight_decay · w
    trust = η ‖w‖ / ‖g‖, or 1 where either norm is 0
    v = momentum · v + lr · trust · g           the learning rate sits inside the buffer
    w = w − v

BatchNorm's γ and β and all biases are left out of decay and adaptation: v = momentum · v + lr · g.
You et al. 2017, arXiv:1708.03888; this form is lars_optimizer.py of the SimCLR authors. Common ports divide by
‖g‖ + weight_decay ‖w‖ + ε and keep the learning rate outside of v, which is another optimizer.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def param_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups by what a parameter is: matrices and kernels, then what a norm layer owns and every bias.

    The second group has weight_decay 0 and `adapt` False. Only LARS reads `adapt`; torch's own optimizers carry it
    along unread, so the groups serve SGD and AdamW too.
    """
    adapted: dict[Tensor, None] = {}  # dicts keep the order and drop what modules share
    excluded: dict[Tensor, None] = {}
    for owner in module.modules():
        for param in owner.parameters(recurse=False):
            # BatchNorm's parameters and biases are vectors; only these two norms may hold anything larger.
            plain = param.ndim < 2 or isinstance(owner, nn.LayerNorm | nn.RMSNorm)
            (excluded if plain else adapted)[param] = None
    return [
        {"params": list(adapted), "weight_decay": weight_decay, "adapt": True},
        {"params": list(excluded), "weight_decay": 0.0, "adapt": False},
    ]


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling.

    params             parameters or groups; param_groups() makes the authors'. A group with `adapt` False has trust 1.
    lr                 ≥ 0, usually set in each group before each step; a number, or a 0-d tensor on the parameters'
                       device (then a captured CUDA graph follows it).
    momentum           0.9 in the paper.
    weight_decay       1e-6 in the paper, 1e-4 in the authors' code and SimCLRv2.
    trust_coefficient  η, 0.001 in the paper.

    The state is one momentum_buffer a parameter, float32 or wider. A step reads p.grad and never changes it, and
    never waits for the device. Parameters without a gradient stay as they are. One group of parameters needs one
    device; a step costs about 20 tensor calls however many parameters there are.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
    ) -> None:
        for name, value in [("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)]:
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if trust_coefficient <= 0:
            raise ValueError(f"trust_coefficient must be positive, got {trust_coefficient}")
        super().__init__(
            params,
            dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust_coefficient=trust_coefficient, adapt=True),
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter that has a gradient. Returns what `closure` returns, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(group, params)
        return loss

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        lr, buffers = group["lr"], [self._momentum_buffer(p) for p in params]
        # .to() hands back the same tensor where the type is right: only half-precision parameters are copied.
        weights = [p.to(v.dtype) for p, v in zip(params, buffers, strict=True)]
        grads = [p.grad.to(v.dtype) for p, v in zip(params, buffers, strict=True)]  # type: ignore[union-attr]
        if group["weight_decay"] != 0:
            grads = list(torch._foreach_add(grads, weights, alpha=group["weight_decay"]))
        torch._foreach_mul_(buffers, group["momentum"])
        if group["adapt"]:
            w_norm = torch.stack(torch._foreach_norm(weights))
            g_norm = torch.stack(torch._foreach_norm(grads))
            trust = torch.where((w_norm > 0) & (g_norm > 0), group["trust_coefficient"] * w_norm / g_norm, 1.0)
            # One call; on CUDA torch still launches it tensor by tensor, since a 0-d factor has no foreach kernel.
            torch._foreach_addcmul_(buffers, grads, (lr * trust).unbind())
        else:
            torch._foreach_add_(buffers, torch._foreach_mul(grads, lr))
        torch._foreach_sub_(params, buffers)

    def _momentum_buffer(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if "momentum_buffer" not in state:
            # bfloat16 has 8 bits: v would stop growing once lr · g falls below 1/256 of it.
            state["momentum_buffer"] = torch.zeros_like(param, dtype=torch.promote_types(param.dtype, torch.float32))
        return state["momentum_buffer"]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but momentum keeps its own type (torch casts it to the parameter's) and is a copy."""
        super().load_state_dict(state_dict)
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, param in zip(ids, params, strict=True):
            if i in state_dict["state"]:
                saved = state_dict["state"][i]["momentum_buffer"]
                self.state[param]["momentum_buffer"] = saved.to(param.device, copy=True)
