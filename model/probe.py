"""How good are the features? Weighted kNN and the paper's linear probe on a frozen encoder.

Both work on features computed once; they know nothing of where images come from. Deterministic on the CPU.
kNN: Wu et al. 2018, arXiv:1805.01978, section 3.4. Linear probe: Chen et al. 2020, arXiv:2002.05709, appendix B.6.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, normalize

from model.schedule import learning_rate, scaled_lr

CHUNK_ELEMENTS = 1 << 26  # similarities held at once: 256 MiB of float32


@torch.no_grad()
def features(
    encoder: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device | str,
    *,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Encode every batch of (images (n, 3, S, S), labels (n,)): features (M, F) of `dtype` and labels (M,), on the CPU.

    The encoder, already on `device`, runs in evaluation mode, then each of its modules goes back to its own. float16
    halves the memory (ResNet-50 on ImageNet is 10.5 GB in float32). Raises ValueError if there is no batch.
    """
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    found: list[Tensor] = []
    labels: list[Tensor] = []
    try:
        for images, targets in batches:
            found.append(encoder(images.to(device)).to("cpu", dtype))
            labels.append(targets.reshape(-1).to("cpu", torch.int64, copy=True))
    finally:
        for module, training in modes:
            module.training = training
    if not found:
        raise ValueError("no batch to compute features of")
    return torch.cat(found), torch.cat(labels)


@torch.no_grad()
def knn(
    bank_features: Tensor,
    bank_labels: Tensor,
    query_features: Tensor,
    query_labels: Tensor,
    *,
    k: int = 200,
    temperature: float = 0.1,
    num_classes: int,
    device: torch.device | str = "cpu",
) -> float:
    """Top-1 accuracy, 0 … 1, of a weighted vote among each query's k nearest bank rows.

    bank_features, query_features  (M, F) and (Q, F), any float type; normalised here, compared by cosine.
    bank_labels, query_labels      (M,) and (Q,), in 0 … num_classes - 1; anything else is a ValueError.
    k                              ≥ 1; a bank smaller than k votes as a whole.
    temperature                    > 0; a neighbour's vote weighs exp(cosine / temperature).
    device                         where to compute; memory is the normalised bank and 256 MiB of similarities.
    """
    _check_labels(num_classes, bank_labels, query_labels)
    if k < 1 or temperature <= 0:
        raise ValueError(f"k must be at least 1 and temperature positive, got {k} and {temperature}")
    bank, labels = normalize(bank_features.to(device, torch.float32), dim=1), bank_labels.to(device)
    k = min(k, len(bank))
    correct = 0
    rows = max(1, CHUNK_ELEMENTS // len(bank))
    for queries, targets in zip(query_features.split(rows), query_labels.split(rows), strict=True):
        similarity, nearest = (normalize(queries.to(device, torch.float32), dim=1) @ bank.T).topk(k)
        # relative to the nearest, which changes no vote's winner and cannot overflow at a small temperature
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = torch.zeros(len(queries), num_classes, device=device).scatter_add_(1, labels[nearest], weight)
        correct += int((votes.argmax(1) == targets.to(device)).sum())
    return correct / len(query_labels)


def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    num_classes: int,
    epochs: int = 90,
    batch_size: int = 4096,
    base_lr: float = 0.1,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> float:
    """Top-1 test accuracy, 0 … 1, of a linear classifier trained on frozen features.

    The paper's recipe: Nesterov momentum 0.9, learning rate base_lr · batch_size / 256 falling by half a cosine
    without warm-up (so the authors' code), no weight decay, features as they are (neither normalised nor
    standardised), weights and bias from zero. Fewer samples than batch_size make one batch. One difference: the
    paper crops and flips anew each epoch; here each image has the one feature it was given.
    features (M, F), any float type; labels (M,) in 0 … num_classes - 1. `seed` orders the batches.
    """
    _check_labels(num_classes, train_labels, test_labels)
    inputs, targets = train_features.to(device, torch.float32), train_labels.to(device)
    batch_size = min(batch_size, len(inputs))
    total_steps = epochs * -(-len(inputs) // batch_size)  # the last batch of an epoch may be smaller
    peak = scaled_lr(base_lr, batch_size, "linear")
    weight = torch.zeros(num_classes, inputs.shape[1], device=device, requires_grad=True)
    bias = torch.zeros(num_classes, device=device, requires_grad=True)
    optimizer = torch.optim.SGD([weight, bias], lr=peak, momentum=0.9, nesterov=True)
    generator = torch.Generator().manual_seed(seed)
    step = 0
    for _ in range(epochs):
        for rows in torch.randperm(len(inputs), generator=generator).to(device).split(batch_size):
            optimizer.param_groups[0]["lr"] = learning_rate(step, peak=peak, total_steps=total_steps, warmup_steps=0)
            optimizer.zero_grad()
            cross_entropy(linear(inputs[rows], weight, bias), targets[rows]).backward()
            optimizer.step()
            step += 1
    with torch.no_grad():
        predicted = linear(test_features.to(device, torch.float32), weight, bias).argmax(1)
    return float((predicted == test_labels.to(device)).float().mean())


def _check_labels(num_classes: int, *label_sets: Tensor) -> None:
    for labels in label_sets:
        if len(labels) == 0:
            raise ValueError("no samples to evaluate on")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= num_classes:
            raise ValueError(f"labels run from {low} to {high}, expected 0 to {num_classes - 1}")
