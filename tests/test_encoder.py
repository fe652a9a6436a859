"""The encoder is torchvision's ResNet under torchvision's names, with SimCLR's changes and nothing else."""

import pytest
import torch
import torchvision
from torch import nn

from model.encoder import build_encoder


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
    "bad", [{"depth": 20}, {"width": 0}, {"width": 0.3}, {"width": float("nan")}, {"width": 1e300}, {"stem": "tiny"}]
)
def test_nonsense_is_refused(bad):
    """The message names the argument."""
    with pytest.raises(ValueError, match=next(iter(bad))):
        build_encoder(**bad)
