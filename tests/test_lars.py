"""LARS is the authors', cheap, and restores exactly."""

import copy

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import count_kernels
from model.lars import LARS, param_groups
from model.step import build_optimizer
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


@pytest.mark.parametrize("name", ["lars", "sgd"])
@pytest.mark.parametrize("weight_decay", [0.0, 2**-7])
def test_without_momentum_a_step_is_the_plain_formula_bitwise(name, weight_decay):
    """w - rate · (g + weight_decay · w), also after a step that is skipped.

    Rate and decay are powers of two, so that their products are exact and it does not matter which of them are fused.
    """
    params = make_params()
    optimizer = build_optimizer(name, groups_of(params, weight_decay), lr=0.25, momentum=0.0)
    generator = torch.Generator().manual_seed(1)
    for skipped in (True, False, False):
        draw_grads(params, generator)
        expected = {key: p.detach().clone() for key, p in params.items()}
        for w, p in zip(expected.values(), params.values(), strict=True):
            decay = weight_decay if p.ndim > 1 else 0.0
            p.grad = torch.empty_like(p).copy_(p.grad)  # the layout that autograd gives it, which SGD relies on
            g = torch.add(p.grad, w, alpha=decay)
            rate = torch.tensor(0.25)
            if name == "lars" and p.ndim > 1 and w.any() and g.any():
                rate *= 1e-3 * w.norm() / g.norm()
            if not skipped:
                w -= rate * g
        optimizer.found_inf = torch.tensor(float(skipped))
        optimizer.step()
        for key, p in params.items():
            assert torch.equal(p, expected[key]), key


class CountCalls(TorchDispatchMode):
    """The tensor calls, and how many kernels each launches on CUDA."""

    def __init__(self):
        super().__init__()
        self.calls, self.kernels = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(str(func))
        self.kernels += kernels(func, args)
        # torch has no meta kernel for the fused optimizers; they return nothing
        return None if "_fused_" in str(func) else func(*args, **(kwargs or {}))


def kernels(func, args):
    """By torch's MultiTensorApply.cuh where kernel arguments are limited to 4 KiB; newer CUDA versions need fewer.

    A call over lists of tensors is cut into kernels of 320 pieces of 65,536 numbers, and of so many tensors that their
    addresses fit: 110 of one list, 64 of two, 48 of three. A norm also clears and then adds up its partial sums.
    """
    if func.is_view or str(func).startswith(("profiler.", "aten.empty")):
        return 0
    if not str(func).startswith(("aten._foreach_", "aten._fused_")):
        return 1
    lists = [arg for arg in args if isinstance(arg, list)]
    most, launched, tensors, pieces = {1: 110, 2: 64, 3: 48}[len(lists)], 0, 0, 0
    for tensor in lists[0]:
        tensors += 1
        for piece in range(count := -(-tensor.numel() // 65536)):
            pieces += 1
            last = piece == count - 1
            if pieces == 320 or (tensors == most and last):
                launched, pieces, tensors = launched + 1, 0, 0 if last else 1
    return launched + (pieces > 0) + (2 if "norm" in str(func) else 0)


def test_the_rule_counts_kernels_as_torch_cuts_lists():
    """By hand: a full kernel and a rest, by tensors and by pieces; the tensor that is cut counts in both."""
    call, sizes = torch.ops.aten._foreach_copy_.default, [[1] * 64, [1] * 65, [320 * 65536], [1, 320 * 65536 + 1]]
    lists = [[torch.empty(n, device="meta") for n in each] for each in sizes]
    assert [kernels(call, [each, each]) for each in lists] == [1, 2, 1, 2]
    assert kernels(torch.ops.aten._foreach_norm.Scalar, [lists[1]]) == 3
    assert kernels(torch.ops.aten.mul_.Tensor, lists[0]) == 1
    assert kernels(torch.ops.aten.unsqueeze.default, lists[0]) == 0


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 30), (torch.bfloat16, 36)])
@pytest.mark.parametrize("weight_decay", [0.0, 1e-4])
@pytest.mark.parametrize("lr_is_tensor", [False, True])
def test_a_step_of_resnet50_is_thirty_calls_and_kernels_without_a_sync(dtype, most, weight_decay, lr_is_tensor):
    """161 parameters; common LARS ports make more than 1,200 calls, two of them syncs for every adapted tensor."""
    with torch.device("meta"):
        network = torchvision.models.resnet50(num_classes=128).to(dtype)
        lr = torch.tensor(0.1)
    optimizer = LARS(param_groups(network, weight_decay), lr=0.1)
    for group in optimizer.param_groups:
        group["lr"] = lr if lr_is_tensor else 0.1
    params = list(network.parameters())
    assert len(params) == 161
    for p in params:
        p.grad = torch.empty_like(p)
    with CountCalls():
        optimizer.step()  # the first step also allocates the momentum
    with CountCalls() as count:
        optimizer.step()
    assert len(count.calls) <= 30, count.calls
    assert count.kernels <= most
    assert not [
        c for c in count.calls if "item" in c or "_local_scalar_dense" in c or "nonzero" in c or "_to_copy" in c
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_the_profiler_sees_thirty_kernels_and_nothing_waits():
    """What the rule promises, counted; any wait for the device raises."""
    network = torchvision.models.resnet50().cuda().to(memory_format=torch.channels_last)
    optimizer = LARS(param_groups(network, 1e-4), lr=0.1)
    for p in network.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert count_kernels(optimizer.step) <= 30


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_captured_step_follows_the_learning_rate():
    """A CUDA graph replayed under a changing rate leaves the weights that the eager optimizer leaves."""
    params, lrs, optimizers = [], [], []
    for _ in range(2):
        params.append({name: nn.Parameter(p.detach().cuda()) for name, p in make_params().items()})
        lrs.append(torch.zeros((), device="cuda"))
        optimizers.append(LARS(groups_of(params[-1], 1e-4), lr=lrs[-1]))
        for name, p in params[-1].items():
            p.grad = torch.full_like(p, 0.0 if name == "zero grad" else 0.5)
        optimizers[-1].step()  # at rate 0: the momentum is there, and nothing has moved
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizers[1].step()
    for step in range(10):
        for each in lrs:
            each.fill_(lr_at(step))
        optimizers[0].step()
        graph.replay()
    for name in SHAPES:
        assert torch.equal(params[0][name], params[1][name]), name


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


def test_momentum_survives_a_change_of_what_has_gradients():
    """A frozen parameter keeps its momentum and goes on with it; the others do not notice."""
    names = ("frozen", "other")
    ours = {name: nn.Parameter(torch.ones(3, 700)) for name in names}
    alone = {name: nn.Parameter(torch.ones(3, 700)) for name in names}
    together = LARS(list(ours.values()), lr=1.0)
    single = {name: LARS([p], lr=1.0) for name, p in alone.items()}
    for step in range(6):
        for name in names:
            skipped = name == "frozen" and step in (2, 3)
            for p in (ours[name], alone[name]):
                p.grad = None if skipped else torch.full_like(p, 1.0 + step)
            single[name].step()
        together.step()
    for name in names:
        assert torch.equal(ours[name], alone[name]), name


def test_a_copied_optimizer_goes_on_by_itself():
    """deepcopy takes parameters and momentum along; what the copy does leaves the original alone."""
    params = make_params()
    optimizer = LARS(groups_of(params, 1e-4), lr=0.3)
    draw_grads(params, torch.Generator().manual_seed(4))
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    kept = {name: (p.detach().clone(), optimizer.state[p]["momentum_buffer"].clone()) for name, p in params.items()}
    for group, original in zip(twin.param_groups, optimizer.param_groups, strict=True):
        for p, q in zip(group["params"], original["params"], strict=True):
            p.grad = q.grad.clone()
    twin.step()
    for name, p in params.items():
        assert torch.equal(p, kept[name][0]), name
        assert torch.equal(optimizer.state[p]["momentum_buffer"], kept[name][1]), name
    optimizer.step()
    for group, original in zip(twin.param_groups, optimizer.param_groups, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(group["params"], original["params"], strict=True))


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
