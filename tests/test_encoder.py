"""The encoder is torchvision's ResNet under torchvision's names, with SimCLR's changes and nothing else."""

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from model.encoder import SelectiveKernel, build_encoder


def images(n=2, size=48):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def randomise(module):
    """BatchNorm far from its initial values, so that no layer hides behind γ = 0."""
    generator = torch.Generator().manual_seed(1)
    for tensor in module.state_dict().values():
        if tensor.ndim == 1:
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))


def meta_encoder(*args, **kwargs):
    with torch.device("meta"):
        return build_encoder(*args, **kwargs)


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_state_dict_has_torchvisions_keys_and_shapes(depth):
    """All of torchvision's entries but fc, in its order."""
    ours = {k: v.shape for k, v in meta_encoder(depth).state_dict().items()}
    with torch.device("meta"):
        theirs = getattr(torchvision.models, f"resnet{depth}")().state_dict()
    expected = {k: v.shape for k, v in theirs.items() if k not in ("fc.weight", "fc.bias")}
    assert list(ours.items()) == list(expected.items())


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("training", [False, True])
def test_same_weights_give_torchvisions_features(depth, training):
    """Bit for bit, with running statistics and with batch statistics."""
    encoder = build_encoder(depth)
    randomise(encoder)
    theirs = getattr(torchvision.models, f"resnet{depth}")()
    missing, unexpected = theirs.load_state_dict(encoder.state_dict(), strict=False)
    assert missing == ["fc.weight", "fc.bias"]
    assert unexpected == []
    theirs.fc = nn.Identity()
    features = encoder.train(training)(images())
    assert features.shape == (2, encoder.num_features)
    assert features.std() > 0
    assert torch.equal(features, theirs.train(training)(images()))


@pytest.mark.parametrize("width", [1 / 16, 1 / 8, 1 / 4])
def test_gradients_of_narrow_networks_are_right_in_channels_last(width):
    """Those of float64, ten times over: what oneDNN made of few channels differed from call to call."""
    torch.manual_seed(0)  # other weights may have a sum so near 0 that ReLU lets it pass in one precision alone
    encoder = build_encoder(18, width=width, stem="small")
    randomise(encoder)
    double = build_encoder(18, width=width, stem="small").double()
    double.load_state_dict(encoder.state_dict())
    exact = torch.autograd.grad(double(images(8, 16).double()).square().sum(), list(double.parameters()))
    encoder = encoder.to(memory_format=torch.channels_last)
    for _ in range(10):
        loss = encoder(images(8, 16).contiguous(memory_format=torch.channels_last)).square().sum()
        for (name, _), found, right in zip(
            encoder.named_parameters(), torch.autograd.grad(loss, list(encoder.parameters())), exact, strict=True
        ):
            assert (found - right).norm() <= 1e-3 * right.norm() + 1e-6, name


def test_small_stem_is_torchvision_with_three_by_three_and_no_pool():
    """At 32 px layer4 still sees 4x4, and the features are those of the usual surgery on torchvision's model."""
    encoder = build_encoder(18, stem="small")
    randomise(encoder)
    theirs = torchvision.models.resnet18()
    theirs.conv1, theirs.maxpool, theirs.fc = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity(), nn.Identity()
    theirs.load_state_dict(encoder.state_dict())
    sizes = []
    encoder.layer4.register_forward_hook(lambda _module, _inputs, output: sizes.append(output.shape[-1]))
    assert torch.equal(encoder.eval()(images(size=32)), theirs.eval()(images(size=32)))
    assert sizes == [4]


@pytest.mark.parametrize(("width", "millions"), [(1, 24), (2, 94), (4, 375)])
def test_parameter_counts_are_the_published_ones(width, millions):
    """SimCLRv2's table for ResNet-50 without the classifier, to the million."""
    encoder = meta_encoder(50, width=width)
    assert round(sum(p.numel() for p in encoder.parameters()) / 1e6) == millions
    assert encoder.num_features == 2048 * width


@pytest.mark.parametrize(
    ("depth", "width", "plain", "selective"),
    [(50, 1, 24, 35), (50, 2, 94, 140), (101, 1, 43, 65), (101, 2, 170, 257), (152, 1, 58, 89), (152, 2, 233, 354)],
)
def test_parameter_counts_are_those_of_the_second_paper(depth, width, plain, selective):
    """SimCLRv2's table in millions, which counts the running statistics too."""
    for selective_kernel, millions in ((False, plain), (True, selective)):
        tensors = meta_encoder(depth, width=width, selective_kernel=selective_kernel).state_dict().values()
        assert round(sum(t.numel() for t in tensors if t.ndim) / 1e6) == millions


def test_the_largest_published_encoder_has_795_million():
    """ResNet-152, three times as wide, with selective kernels."""
    tensors = meta_encoder(152, width=3, selective_kernel=True).state_dict().values()
    assert round(sum(t.numel() for t in tensors if t.ndim) / 1e6) == 795


@pytest.mark.parametrize("stride", [1, 2])
def test_a_selective_kernel_equals_the_formula_in_float64(stride):
    """Two convolutions, normalised by the batch; a softmax over the two, of what their pooled sum says."""
    torch.manual_seed(0)
    module = SelectiveKernel(48, stride).double()
    for norm in (module.split[1], module.select[2]):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    x = torch.randn(5, 48, 7, 7, dtype=torch.float64)

    def relu_norm(y, norm):
        weight, bias = (p.detach().numpy()[:, None, None] for p in (norm.weight, norm.bias))
        y = (y - y.mean((0, 2, 3), keepdims=True)) / np.sqrt(y.var((0, 2, 3), keepdims=True) + 1e-5)
        return np.maximum(y * weight + bias, 0)

    kernels = module.split[0].weight.detach()
    both = [
        nn.functional.conv2d(x, kernel, stride=stride, padding=1).numpy() for kernel in (kernels[:48], kernels[48:])
    ]
    streams = relu_norm(np.concatenate(both, 1), module.split[1])
    streams = np.stack([streams[:, :48], streams[:, 48:]])
    pooled = streams.sum(0).mean((2, 3))
    squeeze, expand = (module.select[i].weight.detach().numpy()[:, :, 0, 0] for i in (1, 4))
    assert squeeze.shape == (32, 48)
    hidden = relu_norm((pooled @ squeeze.T)[..., None, None], module.select[2])[..., 0, 0]
    logits = (hidden @ expand.T).reshape(5, 2, 48).swapaxes(0, 1)
    shares = np.exp(logits) / np.exp(logits).sum(0)
    expected = (streams * shares[..., None, None]).sum(0)
    np.testing.assert_allclose(module(x).detach().numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [6, 7])
@pytest.mark.parametrize("stride", [1, 2])
def test_selective_shortcuts_average_as_tensorflow_does(size, stride):
    """Two by two from each pixel to the right and down: halving, zeros count beyond the edge; else only pixels do."""
    encoder = build_encoder(50, width=1 / 16, selective_kernel=True)
    pool = (encoder.layer1 if stride == 1 else encoder.layer2)[0].downsample[0]
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    expected = np.zeros((2, 3, -(-size // stride), -(-size // stride)))
    for i in range(expected.shape[2]):
        for j in range(expected.shape[3]):
            window = x.numpy()[:, :, stride * i : stride * i + 2, stride * j : stride * j + 2]
            expected[:, :, i, j] = window.sum((2, 3)) / (4 if stride == 2 else window[0, 0].size)
    np.testing.assert_allclose(pool(x).numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stem", ["standard", "small"])
def test_a_selective_encoder_trains_in_channels_last(stem):
    """Features of every image, no copy into another layout on the way, and a gradient at every parameter."""
    torch.manual_seed(0)
    encoder = build_encoder(50, width=1 / 8, stem=stem, selective_kernel=True).to(memory_format=torch.channels_last)
    layouts = []
    for module in encoder.modules():
        if isinstance(module, SelectiveKernel):
            module.register_forward_hook(lambda _module, _inputs, y: layouts.append(y.stride(1)))
    nn.init.ones_(encoder.layer4[2].bn3.weight)
    with torch.autocast("cpu", torch.bfloat16):
        features = encoder(images(4).to(memory_format=torch.channels_last))
    assert features.shape == (4, encoder.num_features)
    assert layouts == [1] * 16
    for block in (block for i in range(1, 5) for block in getattr(encoder, f"layer{i}")):
        nn.init.ones_(block.bn3.weight)  # with γ = 0 nothing behind it would learn
    encoder(images(4)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())


@pytest.mark.parametrize(
    ("depth", "width", "features"), [(18, 0.25, 128), (50, 0.5, 1024), (34, 1 / 64, 8), (18, 1.5, 768)]
)
def test_width_multiplies_every_channel(depth, width, features):
    """Each axis of each tensor is the plain encoder's times width, the three colours aside."""
    encoder = build_encoder(depth, width=width, stem="small")
    assert (encoder.depth, encoder.width, encoder.stem, encoder.num_features) == (depth, width, "small", features)
    assert encoder(images(size=16)).shape == (2, features)
    for (key, ours), plain in zip(
        encoder.state_dict().items(), meta_encoder(depth, stem="small").state_dict().values(), strict=True
    ):
        if plain.ndim:
            assert ours.shape[0] == plain.shape[0] * width, key
        if plain.ndim == 4 and key != "conv1.weight":
            assert ours.shape[1] == plain.shape[1] * width, key


@pytest.mark.parametrize(("depth", "last"), [(18, "bn2"), (50, "bn3")])
def test_every_block_starts_as_its_shortcut(depth, last):
    """γ is 0 in the last BatchNorm of a block and 1 in all others; momentum and eps are the authors'."""
    encoder = build_encoder(depth, width=0.25)
    for name, module in encoder.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            expected = 0 if name.startswith("layer") and name.endswith(last) else 1
            assert torch.equal(module.weight, torch.full_like(module.weight, expected)), name
            assert torch.count_nonzero(module.bias) == 0
            assert (module.momentum, module.eps) == (0.1, 1e-5)


def test_convolutions_are_drawn_as_the_authors_draw():
    """Variance 1 / fan_in, nothing beyond two sigma of the uncut normal."""
    torch.manual_seed(0)
    weight = build_encoder(18).layer4[1].conv1.weight  # 2.4 M numbers: the estimate is good to 0.1 %
    fan_in = 512 * 9
    assert weight.var().item() * fan_in == pytest.approx(1, rel=5e-3)
    assert weight.abs().max().item() <= 2 / 0.8796 / fan_in**0.5
    assert weight.abs().max().item() > 1.99 / 0.8796 / fan_in**0.5


@pytest.mark.parametrize(
    "bad",
    [
        *({"depth": 20}, {"width": 0}, {"width": 0.3}, {"width": float("nan")}, {"width": 1e300}, {"stem": "tiny"}),
        {"selective_kernel": True, "depth": 34},
    ],
)
def test_nonsense_is_refused(bad):
    """The message names the argument."""
    with pytest.raises(ValueError, match=next(iter(bad))):
        build_encoder(**bad)
