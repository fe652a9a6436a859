"""kNN and linear probe agree with independent implementations, and features leave the encoder as it was."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from model import probe
from model.encoder import build_encoder
from model.probe import features, knn, linear_probe


def blobs(n, num_classes=5, dim=12, spread=0.3, seed=0):
    """Overlapping classes, so that neighbours disagree and the weights of the votes decide."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(num_classes, (n,), generator=generator)
    return centres[labels] + spread * dim**0.5 * torch.randn(n, dim, generator=generator), labels


def knn_oracle(bank, bank_labels, queries, query_labels, k, temperature, num_classes):
    """float64 and loops: sort all cosines, add exp(cosine / temperature) to each neighbour's class."""
    bank, queries = bank.double().numpy(), queries.double().numpy()
    correct = 0
    for query, label in zip(queries, query_labels.tolist(), strict=True):
        cosine = bank @ query / np.linalg.norm(bank, axis=1) / np.linalg.norm(query)
        votes = np.zeros(num_classes)
        for i in np.argsort(-cosine)[:k]:
            votes[bank_labels[i]] += np.exp(cosine[i] / temperature)
        correct += int(votes.argmax() == label)
    return correct / len(queries)


@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("k", [1, 20, 200])
def test_knn_equals_brute_force(k, temperature):
    """The same accuracy, to the query, on classes that overlap."""
    bank, query = blobs(400), blobs(150, seed=1)
    expected = knn_oracle(*bank, *query, k, temperature, 5)
    assert 0.3 < expected < 0.99, "the task must be neither hopeless nor trivial"
    assert knn(*bank, *query, k=k, temperature=temperature, num_classes=5) == expected


def test_knn_does_not_depend_on_the_chunk(monkeypatch):
    """Seven queries at a time, and one at a time, as all at once."""
    bank, query = blobs(400), blobs(150, seed=1)
    expected = knn(*bank, *query, num_classes=5)
    for elements in (400 * 7, 1):
        monkeypatch.setattr(probe, "CHUNK_ELEMENTS", elements)
        assert knn(*bank, *query, num_classes=5) == expected


def test_knn_with_a_small_bank_and_a_tiny_temperature():
    """k is cut to the bank; exp(1 / 0.001) would be infinite in float32 and every vote a tie."""
    bank, query = blobs(50), blobs(150, seed=1)
    assert knn(*bank, *query, k=200, num_classes=5) == knn_oracle(*bank, *query, 200, 0.1, 5)
    expected = knn_oracle(*bank, *query, 1, 0.1, 5)  # at so low a temperature the nearest decides alone
    assert knn(*bank, *query, k=50, temperature=1e-3, num_classes=5) == pytest.approx(expected, abs=2 / 150)


def test_knn_takes_half_precision_features():
    """float16 features move a cosine by 1e-3 at most, so only queries on the fence may change sides."""
    bank, query = blobs(400), blobs(150, seed=1)
    half = knn(bank[0].half(), bank[1], query[0].half(), query[1], num_classes=5)
    assert half == pytest.approx(knn(*bank, *query, num_classes=5), abs=3 / 150)


def test_linear_probe_matches_logistic_regression():
    """Within 2 % of scikit-learn's optimum on the same features, far above chance and repeatable by seed."""
    train, test = blobs(2000, spread=0.5), blobs(1000, spread=0.5, seed=1)
    regression = LogisticRegression(C=1e6, max_iter=1000).fit(train[0].numpy(), train[1].numpy())
    expected = regression.score(test[0].numpy(), test[1].numpy())
    assert 0.5 < expected < 0.95
    first = linear_probe(*train, *test, num_classes=5, epochs=30, batch_size=256, seed=3)
    assert first == pytest.approx(expected, abs=0.02)
    assert linear_probe(*train, *test, num_classes=5, epochs=30, batch_size=256, seed=3) == first


def test_linear_probe_solves_separable_features():
    """Nothing is lost where nothing need be, also with fewer samples than the batch."""
    train, test = blobs(300, spread=0.02), blobs(300, spread=0.02, seed=1)
    assert linear_probe(*train, *test, num_classes=5) == 1.0


def test_linear_probe_starts_from_zero_and_keeps_the_global_generator():
    """No epochs: all logits are equal, so class 0 is predicted; evaluation does not disturb a training run's draws."""
    train, test = blobs(100), blobs(100, seed=1)
    before = torch.get_rng_state()
    assert linear_probe(*train, *test, num_classes=5, epochs=0) == pytest.approx(float((test[1] == 0).float().mean()))
    linear_probe(*train, *test, num_classes=5, epochs=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_features_are_the_evaluation_mode_encoders():
    """All rows in order, no gradient, and every module back in the mode it had."""
    torch.manual_seed(0)
    encoder = build_encoder(18, width=0.125, stem="small").train()
    encoder.layer4.eval()  # as a frozen stage would be
    modes = [m.training for m in encoder.modules()]
    statistics = encoder.bn1.running_mean.clone()
    images, labels = torch.randn(10, 3, 16, 16), torch.arange(10)
    h, y = features(encoder, zip(images.split(4), labels.view(-1, 1).split(4), strict=True), "cpu")
    assert (h.dtype, h.shape, h.requires_grad) == (torch.float32, (10, encoder.num_features), False)
    assert torch.equal(y, labels)
    assert [m.training for m in encoder.modules()] == modes
    assert torch.equal(encoder.bn1.running_mean, statistics)
    with torch.no_grad():
        # other batch sizes may take other convolution kernels: float32 rounding
        torch.testing.assert_close(h, encoder.eval()(images), rtol=1e-4, atol=1e-5)
    half, _ = features(encoder, [(images, labels)], "cpu", dtype=torch.float16)
    assert half.dtype == torch.float16


def test_modes_come_back_when_a_batch_fails():
    """An error of the loader does not leave the encoder in evaluation mode."""

    def batches():
        yield torch.randn(2, 4), torch.zeros(2)
        raise OSError("shard lost")

    encoder = nn.Linear(4, 2).train()
    with pytest.raises(OSError, match="shard lost"):
        features(encoder, batches(), "cpu")
    assert encoder.training


def test_bad_input_is_refused():
    """Labels outside the classes, no queries, no batches."""
    bank = blobs(20)
    with pytest.raises(ValueError, match="expected 0 to 2"):
        knn(*bank, *bank, num_classes=3)
    with pytest.raises(ValueError, match="expected 0 to 2"):
        linear_probe(*bank, *bank, num_classes=3)
    with pytest.raises(ValueError, match="no samples"):
        knn(*bank, bank[0][:0], bank[1][:0], num_classes=5)
    with pytest.raises(ValueError, match="k must be at least 1"):
        knn(*bank, *bank, k=0, num_classes=5)
    with pytest.raises(ValueError, match="no batch"):
        features(nn.Identity(), [], "cpu")
