"""LARS in the form that trained SimCLR, in a few calls over all parameters, none of which waits for the device.

For a weight w with gradient g, and η the trust coefficient:

    g = g + weight_decay · w
    trust = η ‖w‖ / ‖g‖, or 1 where either norm is 0
    v = momentum · v + lr · trust · g           the learning rate sits inside the buffer
    w = w − v

BatchNorm's γ and β and all biases are left out of decay and adaptation: v = momentum · v + lr · g.
You et al. 2017, arXiv:1708.03888; this form is lars_optimizer.py of the SimCLR authors. Common ports divide by
‖g‖ + weight_decay ‖w‖ + ε and keep the learning rate outside of v, which is another optimizer.
"""

import functools
import itertools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

ROW = 1024


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


class Rows:
    """Parameters of one device, and room for their momentum and gradients in matrices of ROW columns.

    A parameter owns whole rows, the last one filled up with zeros, so that a factor a parameter is a factor a row:
    one broadcast product, where torch's multi-tensor calls know no factor that stays on the device. Matrices are
    float32, or wider where a parameter is; bfloat16 has 8 bits, and v would stop growing at 256 times lr · g.
    """

    def __init__(self, params: list[Tensor]) -> None:
        counts = [-(-p.numel() // ROW) for p in params]
        self.params, self.starts = params, [0, *itertools.accumulate(counts)]
        self.dtype = functools.reduce(torch.promote_types, {p.dtype for p in params}, torch.float32)
        owner, device = torch.arange(len(params)).repeat_interleave(torch.tensor(counts)), params[0].device
        owner = owner.pin_memory() if device.type == "cuda" else owner  # or the copy would wait for the device
        self.owner = owner.to(device, non_blocking=True)
        self.one = torch.ones(1, dtype=self.dtype, device=device)
        self.momentum, self.momenta = self._matrix()
        self.gradient, self.grads = self._matrix()
        self.weights = params if all(p.dtype == self.dtype for p in params) else self._matrix()[1]

    def _matrix(self) -> tuple[Tensor, list[Tensor]]:
        """Zeros, and views of them with the shapes and strides of the parameters: other strides mean slow calls."""
        matrix = torch.zeros(self.starts[-1], ROW, dtype=self.dtype, device=self.params[0].device)
        strides = [torch.empty_like(p, device="meta").stride() for p in self.params]
        places = zip(self.params, strides, self.starts, strict=False)
        return matrix, [matrix.as_strided(p.shape, stride, start * ROW) for p, stride, start in places]


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling.

    params             parameters or groups; param_groups() makes the authors'. A group with `adapt` False has trust 1.
    lr                 ≥ 0, usually set in each group before each step; a number, or a 0-d tensor on the parameters'
                       device (then a captured CUDA graph follows it).
    momentum           0.9 in the paper; with 0 the momentum buffers stay zero.
    weight_decay       1e-6 in the paper, 1e-4 in the authors' code and SimCLRv2.
    trust_coefficient  η, 0.001 in the paper.

    The state is one momentum_buffer a parameter, float32 or wider. A step reads p.grad and never changes it, and
    never waits for the device. Parameters without a gradient stay as they are. One group of parameters needs one
    device. Beside the momentum, LARS keeps a float32 copy of the gradients, and one of half-precision weights. A step
    looks at `found_inf` if that is set, a () float32 tensor on the device, and changes nothing where it is 1: the way
    torch's fused optimizers skip a step.

    A step of ResNet-50's 161 parameters is 22 tensor calls and at most 27 kernels (35 for half precision): torch cuts
    a multi-tensor call into kernels of 64 pairs or 48 triples of tensors and 320 pieces of 65,536 numbers, or longer
    ones where the CUDA version lets it.
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
        self._rows: dict[int, Rows] = {}  # by the number of the group

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter that has a gradient. Returns what `closure` returns, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for i, group in enumerate(self.param_groups):
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(group, self._rows_of(i, params))
        return loss

    def _update(self, group: dict[str, Any], rows: Rows) -> None:
        torch._foreach_copy_(rows.grads, [p.grad for p in rows.params])  # type: ignore[misc]  # all have one
        if rows.weights is not rows.params:
            torch._foreach_copy_(rows.weights, rows.params)
        if group["weight_decay"] != 0:
            torch._foreach_add_(rows.grads, rows.weights, alpha=group["weight_decay"])
        if group["adapt"]:
            norms = torch.stack(torch._foreach_norm(rows.weights + rows.grads)).view(2, -1)
            w_norm, g_norm = norms
            trust = (group["trust_coefficient"] * w_norm / g_norm).masked_fill_((norms == 0).any(0), 1.0)
            rate = (group["lr"] * trust)[rows.owner, None]
        else:
            rate = group["lr"] * rows.one
        rows.gradient.mul_(rate)
        # v = momentum v + what is given, w = w - v, or nothing at all where found_inf is 1: a NaN cannot be masked away
        # by arithmetic, and a branch here would wait for the device.
        torch._fused_sgd_(
            rows.weights,
            rows.grads,
            rows.momenta if group["momentum"] else [],  # which the fused call refuses where it would not use them
            weight_decay=0.0,
            momentum=group["momentum"],
            lr=1.0,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
            found_inf=getattr(self, "found_inf", None),
        )
        if rows.weights is not rows.params:
            torch._foreach_copy_(rows.params, rows.weights)

    def _rows_of(self, i: int, params: list[Tensor]) -> Rows:
        """The rows of group `i`, made anew where other parameters have gradients than the last time."""
        rows = self._rows.get(i)
        if rows is None or len(rows.params) != len(params) or any(map(operator.is_not, rows.params, params)):
            rows = self._rows[i] = Rows(params)
            for param, momentum in zip(params, rows.momenta, strict=True):
                if "momentum_buffer" in self.state[param]:
                    momentum.copy_(self.state[param]["momentum_buffer"])
                self.state[param]["momentum_buffer"] = momentum
        return rows

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._rows = {}  # the momentum has come from elsewhere; load_state_dict passes here too

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but momentum keeps its own type (torch casts it to the parameter's) and is a copy."""
        super().load_state_dict(state_dict)
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, param in zip(ids, params, strict=True):
            if i in state_dict["state"]:
                saved = state_dict["state"][i]["momentum_buffer"]
                self.state[param]["momentum_buffer"] = saved.to(param.device, copy=True)
