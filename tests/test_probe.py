"""kNN and linear probe agree with independent implementations, and features leave the encoder as it was."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from model import probe
from model.encoder import build_encoder
from model.probe import correct, features, knn, knn_votes, linear_probe, logistic_regression, train_classifier


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


@pytest.mark.parametrize("k", [5, 50])
def test_knn_is_scikit_learns_to_the_query(k):
    """Predictions, not only their share: scikit-learn's cosine neighbours, weighted alike, on the same features."""
    bank, query = blobs(400), blobs(150, seed=1)
    peer = KNeighborsClassifier(k, weights=lambda distance: np.exp((1 - distance) / 0.1), metric="cosine")
    peer.fit(bank[0].double().numpy(), bank[1].numpy())
    votes = knn_votes(*bank, query[0], k=k, num_classes=5)
    np.testing.assert_array_equal(votes.argmax(1), peer.predict(query[0].double().numpy()))


def test_top_k_counts_what_scikit_learn_counts():
    """Top-1 and top-5 of 20 classes; a label without any vote is never among the best."""
    generator = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(300, 20, generator=generator), torch.randint(20, (300,), generator=generator)
    scores[torch.arange(300), labels] += 1
    expected = [top_k_accuracy_score(labels, scores, k=k, normalize=False) for k in (1, 5)]
    assert correct(scores, labels).tolist() == expected
    assert 0 < expected[0] < expected[1] < 300
    nobody = torch.full((1, 3), -torch.inf)
    assert correct(nobody, torch.tensor([1])).tolist() == [0, 0]
    one_vote = knn_votes(torch.eye(4), torch.arange(4), torch.eye(4)[:1], k=1, num_classes=4)
    assert [correct(one_vote, torch.tensor([label]))[1].item() for label in range(4)] == [1, 0, 0, 0]


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
    first = linear_probe(*train, num_classes=5, epochs=30, batch_size=256, seed=3)
    assert share(first, test) == pytest.approx(expected, abs=0.02)
    again = linear_probe(*train, num_classes=5, epochs=30, batch_size=256, seed=3)
    assert torch.equal(again.weight, first.weight)


def share(classifier, test):
    """Top-1 accuracy of a classifier on (features, labels)."""
    return int(correct(classifier(test[0].to(classifier.weight.dtype)), test[1])[0]) / len(test[1])


def test_linear_probe_solves_separable_features():
    """Nothing is lost where nothing need be, also with fewer samples than the batch."""
    train, test = blobs(300, spread=0.02), blobs(300, spread=0.02, seed=1)
    assert share(linear_probe(*train, num_classes=5), test) == 1.0


def test_linear_probe_starts_from_zero_and_keeps_the_global_generator():
    """No epochs: all logits are equal, so class 0 is predicted; evaluation does not disturb a training run's draws."""
    train = blobs(100)
    before = torch.get_rng_state()
    untrained = linear_probe(*train, num_classes=5, epochs=0)
    assert not untrained.weight.any()
    assert not untrained.bias.any()
    linear_probe(*train, num_classes=5, epochs=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("epochs", [1, 3])
def test_linear_probe_is_the_papers_recipe(epochs):
    """Written out in NumPy: lr 0.1 B / 256 on half a cosine, Nesterov momentum 0.9, no decay, from zero."""
    features_, labels = blobs(100)
    order = torch.Generator().manual_seed(7)
    x, y = features_.double().numpy(), np.eye(5)[labels]
    weight, bias = np.zeros((5, 12)), np.zeros(5)
    velocity = [np.zeros_like(weight), np.zeros_like(bias)]
    step, total = 0, 4 * epochs
    for _ in range(epochs):
        for rows in torch.randperm(100, generator=order).split(32):
            logits = x[rows] @ weight.T + bias
            p = np.exp(logits - logits.max(1, keepdims=True))
            error = (p / p.sum(1, keepdims=True) - y[rows]) / len(rows)
            lr = 0.1 * 32 / 256 * 0.5 * (1 + np.cos(np.pi * step / total))
            for value, gradient, v in zip((weight, bias), (error.T @ x[rows], error.sum(0)), velocity, strict=True):
                v *= 0.9
                v += gradient
                value -= lr * (gradient + 0.9 * v)
            step += 1
    found = linear_probe(features_, labels, num_classes=5, epochs=epochs, batch_size=32, seed=7)
    np.testing.assert_allclose(found.weight.detach(), weight, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.bias.detach(), bias, rtol=1e-4, atol=1e-6)


def test_only_what_requires_a_gradient_is_trained():
    """A frozen part stays bit for bit, and training ends with the batches asked for."""
    model = nn.Sequential(nn.Linear(12, 8).requires_grad_(False), nn.Linear(8, 5))
    frozen, free = model[0].weight.clone(), model[1].weight.clone()
    rates = [lr for _, lr in train_classifier(model, iter([blobs(20)] * 9), total_steps=4, peak_lr=1.0)]
    assert rates == pytest.approx([1.0, 0.8535534, 0.5, 0.1464466])
    assert torch.equal(model[0].weight, frozen)
    assert not torch.equal(model[1].weight, free)


@pytest.mark.parametrize("l2", [1e3, 1.0, 1e-3])
def test_logistic_regression_is_scikit_learns(l2):
    """The same coefficients on rectified features far from centred, and so the same accuracy, within 0.2 %."""
    (x, labels), (queries, answers) = blobs(300, spread=0.5), blobs(500, spread=0.5, seed=1)
    x, queries = 10 * (x + 1).relu(), 10 * (queries + 1).relu()
    peer = LogisticRegression(C=1 / l2, max_iter=20_000, tol=1e-9).fit(x.double().numpy(), labels.numpy())
    expected = peer.score(queries.double().numpy(), answers.numpy())
    assert 0.4 < expected < 0.95
    other = logistic_regression(x, labels, num_classes=5, l2=30 * l2)
    for start in (None, other):
        found = logistic_regression(x, labels, num_classes=5, l2=l2, start=start)
        assert share(found, (queries, answers)) == pytest.approx(expected, abs=0.002)
        np.testing.assert_allclose(found.weight.detach(), peer.coef_, rtol=1e-2, atol=1e-3 * abs(peer.coef_).max())


def test_logistic_regression_does_not_depend_on_the_chunk(monkeypatch):
    """Logits of seven rows at a time, as of all at once."""
    train = blobs(100)
    whole = logistic_regression(*train, num_classes=5, l2=1.0)
    monkeypatch.setattr(probe, "CHUNK_ELEMENTS", 35)
    torch.testing.assert_close(logistic_regression(*train, num_classes=5, l2=1.0).weight, whole.weight)


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
        linear_probe(*bank, num_classes=3)
    with pytest.raises(ValueError, match="expected 0 to 2"):
        logistic_regression(*bank, num_classes=3, l2=1.0)
    with pytest.raises(ValueError, match="no samples"):
        knn(*bank, bank[0][:0], bank[1][:0], num_classes=5)
    with pytest.raises(ValueError, match="k must be at least 1"):
        knn(*bank, *bank, k=0, num_classes=5)
    with pytest.raises(ValueError, match="at most the 20 rows of the bank, got 21"):
        knn_votes(*bank, bank[0], k=21, num_classes=5)
    for temperature in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temperature must be positive and finite"):
            knn(*bank, *bank, temperature=temperature, num_classes=5)
    for label in (-1, 3):  # a miss of the encoder's, it would seem
        with pytest.raises(ValueError, match="expected 0 to 2"):
            correct(torch.zeros(2, 3), torch.tensor([0, label]))
    with pytest.raises(ValueError, match="no batch"):
        features(nn.Identity(), [], "cpu")
