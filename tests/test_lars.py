"""LARS is the authors', cheap, and restores exactly."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from model.encoder import build_encoder
from model.lars import LARS, param_groups
from tests.oracles.lars import lars_update

SHAPES = {
    "conv": (8, 4, 3, 3),
    "dense": (16, 8),
    "zero weight": (5, 5),
    "zero grad": (6, 2),
    "gamma": (16,),
    "beta": (3,),
}


def make_params(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    params = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    params["zero weight"].zero_()
    params["conv"] = params["conv"].to(memory_format=torch.channels_last)
    return {name: nn.Parameter(p.to(dtype)) for name, p in params.items()}


def groups_of(params, weight_decay):
    return [
        {"params": [p for p in params.values() if p.ndim > 1], "weight_decay": weight_decay, "adapt": True},
        {"params": [p for p in params.values() if p.ndim == 1], "weight_decay": 0.0, "adapt": False},
    ]


def draw_grads(params, generator):
    for name, p in params.items():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        if name == "zero grad":
            p.grad.zero_()


def lr_at(step):
    return 0.0 if step == 0 else 0.3 * step if step < 6 else 4.8 / step  # warm-up from 0, then a jump and a decay


@pytest.mark.parametrize("weight_decay", [0.0, 1e-4, 0.1])
@pytest.mark.parametrize("lr_is_tensor", [False, True])
def test_twenty_steps_equal_the_float64_oracle(weight_decay, lr_is_tensor):
    """Every tensor, zero weights, zero gradients and excluded vectors included, under a changing learning rate."""
    params = make_params()
    optimizer = LARS(groups_of(params, weight_decay), lr=0.0)
    w = {name: p.detach().double().numpy().copy() for name, p in params.items()}
    v = {name: np.zeros_like(x) for name, x in w.items()}
    generator = torch.Generator().manual_seed(1)
    for step in range(20):
        draw_grads(params, generator)
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(lr_at(step)) if lr_is_tensor else lr_at(step)
        optimizer.step()
        for name, p in params.items():
            w[name], v[name] = lars_update(
                w[name],
                p.grad.double().numpy(),
                v[name],
                lr=lr_at(step),
                momentum=0.9,
                weight_decay=weight_decay,
                eta=1e-3,
                excluded=p.ndim == 1,
            )
    for name, p in params.items():
        error = np.linalg.norm(p.detach().double().numpy() - w[name]) / np.linalg.norm(w[name])
        assert error <= 1e-6, f"{name}: {error:.1e}"
    assert np.any(w["zero weight"] != 0), "a tensor that starts at zero must move, with trust 1"


def test_the_learning_rate_sits_inside_the_momentum():
    """After the rate drops to 0 the weights still coast on the buffer; with the rate outside they would stop."""
    w = nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([w], lr=1.0)
    w.grad = torch.ones(2, 2)
    optimizer.step()
    before = w.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    torch.testing.assert_close(before - w.detach(), torch.full((2, 2), 0.9e-3), rtol=1e-4, atol=0)  # η·m; cancellation


class CountCalls(TorchDispatchMode):
    """Counts the tensor calls and forbids the ones that wait for the device."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("weight_decay", [0.0, 1e-4])
def test_a_step_of_resnet50_is_thirty_tensor_calls_without_a_sync(weight_decay):
    """161 parameters; common LARS ports make more than 1,200 calls, two of them syncs for every adapted tensor."""
    encoder = build_encoder(50)
    optimizer = LARS(param_groups(encoder, weight_decay), lr=0.1)
    params = list(encoder.parameters())
    assert len(params) == 159  # torchvision's 161 without the classifier
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()  # the first step also allocates the momentum
    with CountCalls() as count:
        optimizer.step()
    assert len(count.calls) <= 30, count.calls
    assert not [c for c in count.calls if "item" in c or "_local_scalar_dense" in c or "nonzero" in c]


def test_gradients_are_left_as_they_are():
    """p.grad is the same tensor with the same values after a step with weight decay."""
    params = make_params()
    optimizer = LARS(groups_of(params, 0.1), lr=0.5)
    draw_grads(params, torch.Generator().manual_seed(2))
    grads = {name: (p.grad, p.grad.clone()) for name, p in params.items()}
    optimizer.step()
    for name, p in params.items():
        assert p.grad is grads[name][0]
        assert torch.equal(p.grad, grads[name][1])


def test_a_parameter_without_gradient_stays():
    """Frozen layers keep their weights and get no state; the others move."""
    still, moving = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([still, moving], lr=1.0, weight_decay=0.1)
    moving.grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(still, torch.ones(2, 2))
    assert still not in optimizer.state
    assert not torch.equal(moving, torch.ones(2, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_restored_optimizer_continues_bitwise(dtype):
    """state_dict into a fresh LARS, then five steps: the same bits, and the saved dict is not written to."""
    params = make_params(dtype)
    optimizer = LARS(groups_of(params, 1e-4), lr=0.3)
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        draw_grads(params, generator)
        optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(state)
    twins = {name: nn.Parameter(p.detach().clone()) for name, p in params.items()}
    restored = LARS(groups_of(twins, 0.5), lr=9.0)
    restored.load_state_dict(state)
    for _ in range(5):
        draw_grads(params, generator)
        for p, twin in zip(params.values(), twins.values(), strict=True):
            twin.grad = p.grad.clone()
        optimizer.step()
        restored.step()
    for name, p in params.items():
        assert torch.equal(p, twins[name]), name
        assert torch.equal(optimizer.state[p]["momentum_buffer"], restored.state[twins[name]]["momentum_buffer"])
    for i, saved in kept["state"].items():
        assert torch.equal(saved["momentum_buffer"], state["state"][i]["momentum_buffer"])


def test_bfloat16_parameters_have_float32_momentum():
    """A small gradient still adds up in the buffer, where bfloat16 would have stopped at 256 times it."""
    w = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = LARS([{"params": [w], "adapt": False}], lr=1e-6, momentum=1.0)
    for _ in range(600):
        w.grad = torch.ones(4, dtype=torch.bfloat16)
        optimizer.step()
    momentum = optimizer.state[w]["momentum_buffer"]
    assert momentum.dtype == torch.float32
    torch.testing.assert_close(momentum, torch.full((4,), 600e-6), rtol=1e-4, atol=0)  # 600 float32 additions


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm((4, 5, 5)))
        self.bn_looking_weight = nn.Linear(100, 7)
        self.tied = self.bn_looking_weight


def test_groups_follow_what_a_parameter_is():
    """Kernels and matrices are adapted, whatever their name; norm layers, even 3-d ones, and biases are not."""
    module = Mixed()
    adapted, excluded = param_groups(module, 1e-4)
    names = {p: name for name, p in module.named_parameters()}
    assert [names[p] for p in adapted["params"]] == ["net.0.weight", "bn_looking_weight.weight"]
    assert {names[p] for p in excluded["params"]} == set(names.values()) - {"net.0.weight", "bn_looking_weight.weight"}
    assert (adapted["weight_decay"], adapted["adapt"]) == (1e-4, True)
    assert (excluded["weight_decay"], excluded["adapt"]) == (0.0, False)


@pytest.mark.parametrize(
    "make",
    [
        lambda groups: torch.optim.SGD(groups, lr=0.1, weight_decay=0.5),
        lambda groups: torch.optim.AdamW(groups, lr=0.1, weight_decay=0.5),
    ],
)
def test_groups_serve_torch_optimizers(make):
    """SGD and AdamW run on the groups and decay the first group only."""
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    bias, weight = module[0].bias.detach().clone(), module[0].weight.detach().clone()
    optimizer = make(param_groups(module, 1e-2))
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(module[0].bias, bias)
    torch.testing.assert_close(module[0].weight, weight * (1 - 0.1 * 1e-2))
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("bad", [{"lr": -1}, {"momentum": -0.1}, {"weight_decay": -1}, {"trust_coefficient": 0}])
def test_nonsense_is_refused(bad):
    """The message names the argument."""
    with pytest.raises(ValueError, match=next(iter(bad))):
        LARS([nn.Parameter(torch.ones(2))], **{"lr": 0.1, **bad})
