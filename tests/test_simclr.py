"""The projection head is the authors', and SimCLR is one pass of encoder and head over all rows."""

import numpy as np
import pytest
import torch
from torch import nn

from model.encoder import build_encoder
from model.simclr import ProjectionHead, SimCLR


def head_oracle(head, h):
    """The head in float64 from the authors' description: dense, BatchNorm by batch statistics, ReLU between layers."""
    denses = [m for m in head if isinstance(m, nn.Linear)]
    norms = [m for m in head if isinstance(m, nn.BatchNorm1d)]
    x = h.double().numpy()
    for i, (dense, norm) in enumerate(zip(denses, norms, strict=True)):
        x = x @ dense.weight.detach().double().numpy().T
        x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) * norm.weight.detach().double().numpy()
        if i < len(denses) - 1:
            x = np.maximum(x + norm.bias.detach().double().numpy(), 0)
    return x


def randomised_head(kind, in_features=24, out_features=16):
    torch.manual_seed(0)
    head = ProjectionHead(in_features, kind=kind, out_features=out_features)
    for module in head:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight)
        if isinstance(module, nn.BatchNorm1d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            if module.bias is not None:
                nn.init.normal_(module.bias)
    return head


@pytest.mark.parametrize("kind", ["linear", "nonlinear", "nonlinear3"])
def test_head_equals_the_float64_oracle(kind):
    """In training mode, on random γ and β."""
    head = randomised_head(kind)
    h = torch.randn(64, 24)
    z = head(h).detach().double().numpy()
    # float32 rounds each of up to three normalised layers at about 1e-7 of entries of size 1 to 5
    np.testing.assert_allclose(z, head_oracle(head, h), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        ("none", []),
        ("linear", [(16, 24), (16,)]),
        ("nonlinear", [(24, 24), (24,), (24,), (16, 24), (16,)]),
        ("nonlinear3", [(24, 24), (24,), (24,), (24, 24), (24,), (24,), (16, 24), (16,)]),
    ],
)
def test_head_has_exactly_the_authors_parameters(kind, shapes):
    """Hidden width is the encoder's, no dense bias, γ and β inside, γ alone at the end."""
    head = ProjectionHead(24, kind=kind, out_features=16)
    assert [tuple(p.shape) for p in head.parameters()] == shapes
    assert head.out_features == (16 if shapes else 24)


def test_the_head_does_without_arguments_that_an_older_batchnorm_lacks(monkeypatch):
    """torch 2.11's BatchNorm1d knows no bias=False; names and parameters are the same, in the same order."""

    class Older(nn.BatchNorm1d):
        def __init__(self, num_features, eps=1e-5, momentum=0.1, affine=True):
            super().__init__(num_features, eps, momentum, affine)

    monkeypatch.setattr(nn, "BatchNorm1d", Older)
    head = ProjectionHead(24, out_features=16)
    statistics = ["running_mean", "running_var", "num_batches_tracked"]
    norms = [f"1.{name}" for name in ["weight", "bias", *statistics]], [f"4.{name}" for name in ["weight", *statistics]]
    assert list(head.state_dict()) == ["0.weight", *norms[0], "3.weight", *norms[1]]


def test_no_head_is_the_identity():
    """z is h itself."""
    h = torch.randn(4, 24)
    assert ProjectionHead(24, kind="none")(h) is h


def test_dense_weights_are_drawn_with_deviation_one_hundredth():
    """4 M numbers, so the estimate is good to 0.04 %."""
    torch.manual_seed(0)
    head = ProjectionHead(2048)
    assert head[0].weight.std().item() == pytest.approx(0.01, rel=2e-3)
    assert abs(head[0].weight.mean().item()) < 3e-5
    assert head[3].weight.std().item() == pytest.approx(0.01, rel=1e-2)


@pytest.mark.parametrize("kind", ["linear", "nonlinear", "nonlinear3"])
def test_synchronised_batchnorm_keeps_the_head(kind):
    """The converted head computes the same z, its last layer still has no β, and every gradient arrives."""
    head = randomised_head(kind)
    h = torch.randn(64, 24)
    expected = head(h)
    keys = list(head.state_dict())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(head)
    assert isinstance(converted[-1], nn.SyncBatchNorm)
    assert converted[-1].bias is None
    assert list(converted.state_dict()) == keys
    z = converted(h)
    assert torch.equal(z, expected)
    z.square().sum().backward()
    assert all(p.grad is not None for p in converted.parameters())


def test_one_pass_mixes_the_views_in_every_batchnorm():
    """z of 2n rows is the head of the encoder of all rows at once, not of each half by itself."""
    torch.manual_seed(0)
    encoder = build_encoder(18, width=0.125, stem="small")
    model = SimCLR(encoder, ProjectionHead(encoder.num_features, out_features=8))
    assert model.encoder is encoder
    views = torch.randn(12, 3, 16, 16) * torch.linspace(0.5, 2, 12).view(-1, 1, 1, 1)
    z = model(views)
    assert z.shape == (12, 8)
    assert torch.equal(z, model.head(encoder(views)))
    halves = torch.cat([model(views[:6]), model(views[6:])])
    assert not torch.allclose(z, halves, atol=1e-2)


def test_the_whole_model_trains_under_bfloat16_autocast():
    """Channels-last views in, finite z and a gradient at every parameter out."""
    torch.manual_seed(0)
    encoder = build_encoder(18, width=0.125, stem="small")
    model = SimCLR(encoder, ProjectionHead(encoder.num_features)).to(memory_format=torch.channels_last)
    views = torch.randn(8, 3, 16, 16).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        z = model(views)
    assert torch.isfinite(z).all()
    nn.functional.normalize(z.float(), dim=1)[:4].sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_an_unknown_head_is_refused():
    """The message lists the choices."""
    with pytest.raises(ValueError, match="none, linear, nonlinear, nonlinear3"):
        ProjectionHead(8, kind="mlp")
