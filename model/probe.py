"""How good are the features? Weighted kNN, the paper's linear classifier, and logistic regression.

They take features, or batches of any kind, wherever the images come from. Deterministic on the CPU.
kNN: Wu et al. 2018, arXiv:1805.01978, section 3.4. Classifiers: Chen et al. 2020, arXiv:2002.05709, appendix B.5, 6, 8.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

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

    The encoder, already on `device`, runs in evaluation mode; its modules' own modes are restored afterwards. float16
    halves the memory (ResNet-50 on ImageNet is 10.5 GB in float32). Raises ValueError if there is no batch.
    """
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    encoded: list[Tensor] = []
    labels: list[Tensor] = []
    try:
        for images, targets in batches:
            encoded.append(encoder(images.to(device)).to("cpu", dtype))
            labels.append(targets.reshape(-1).to("cpu", torch.int64, copy=True))
    finally:
        for module, training in modes:
            module.training = training
    if not encoded:
        raise ValueError("no batch to compute features of")
    return torch.cat(encoded), torch.cat(labels)


def correct(scores: Tensor, labels: Tensor, ks: Sequence[int] = (1, 5)) -> Tensor:
    """How many rows of scores (m, C) have their label (m,) among the k best classes: (len(ks),) int64.

    A class whose score is -inf is not among them. With C < k every class that has a score is. Raises ValueError for a
    label that is none of the C classes: it would count as a miss of the encoder's.
    """
    _check_labels(scores.shape[1], labels)
    best = scores.topk(min(max(ks), scores.shape[1]))
    hit = (best.indices == labels[:, None]) & (best.values > -torch.inf)
    return torch.stack([hit[:, :k].sum() for k in ks])


def neighbours(k: int, bank: int) -> int:
    """How many of a bank's rows vote where k are asked for: a smaller bank votes as a whole, and is recorded so."""
    return min(k, bank)


@torch.no_grad()
def knn_votes(
    bank_features: Tensor,
    bank_labels: Tensor,
    query_features: Tensor,
    *,
    k: int = 200,
    temperature: float = 0.1,
    num_classes: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Weighted votes of every query's k nearest bank rows for every class: (Q, num_classes), on the CPU.

    bank_features, query_features  (M, F) and (Q, F), any float type; normalised here, compared by cosine.
    bank_labels                    (M,), in 0 … num_classes - 1; anything else is a ValueError.
    k                              1 … M; of `neighbours`, where a bank may be smaller than what is asked for.
    temperature                    > 0; a neighbour's vote weighs exp(cosine / temperature), up to a factor per query.
    device                         where to compute; memory is the normalised bank and 256 MiB of similarities.
    A class without a vote gets -inf.
    """
    _check_labels(num_classes, bank_labels)
    if not 1 <= k <= len(bank_features):
        raise ValueError(f"k must be at least 1 and at most the {len(bank_features)} rows of the bank, got {k}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    bank, labels = normalize(bank_features.to(device, torch.float32), dim=1), bank_labels.to(device)
    votes_of_parts = []
    for queries in query_features.split(max(1, CHUNK_ELEMENTS // len(bank))):
        similarity, nearest = (normalize(queries.to(device, torch.float32), dim=1) @ bank.T).topk(k)
        # relative to the nearest, which changes no vote's winner and cannot overflow at a small temperature
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = torch.zeros(len(queries), num_classes, device=device).scatter_add_(1, labels[nearest], weight)
        votes_of_parts.append(votes.masked_fill_(votes == 0, -torch.inf).cpu())
    return torch.cat(votes_of_parts) if votes_of_parts else torch.empty(0, num_classes)


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
    """Top-1 accuracy, 0 … 1, of `knn_votes` by `neighbours(k, M)`; query_labels (Q,) in 0 … num_classes - 1."""
    _check_labels(num_classes, query_labels)
    votes = knn_votes(
        bank_features,
        bank_labels,
        query_features,
        k=neighbours(k, len(bank_features)),
        temperature=temperature,
        num_classes=num_classes,
        device=device,
    )
    return int(correct(votes, query_labels.cpu(), ks=(1,))) / len(query_labels)


def train_classifier(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    total_steps: int,
    peak_lr: float,
    momentum: float = 0.9,
) -> Iterator[tuple[Tensor, float]]:
    """Train `model` on `total_steps` batches of (inputs, labels); yields each step's () loss, on its device, and rate.

    The paper's recipe for linear classifiers (B.6) and fine-tuning (B.5): softmax cross-entropy, SGD with Nesterov
    momentum, no weight decay, the learning rate falling from `peak_lr` by half a cosine without warm-up (so the
    authors' code). Only what requires a gradient is trained; the caller chooses the mode that BatchNorm runs in.
    """
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=peak_lr, momentum=momentum, nesterov=momentum > 0)
    for step, (inputs, labels) in enumerate(itertools.islice(batches, total_steps)):
        lr = learning_rate(step, peak=peak_lr, total_steps=total_steps, warmup_steps=0)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        yield loss.detach(), lr


def zero_linear(in_features: int, num_classes: int) -> nn.Linear:
    """A classifier that starts from zero, as the authors' does: every class is equally likely."""
    layer = nn.utils.skip_init(nn.Linear, in_features, num_classes)  # draws nothing from the global generator
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    *,
    num_classes: int,
    epochs: int = 90,
    batch_size: int = 4096,
    base_lr: float = 0.1,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> nn.Linear:
    """The linear classifier of appendix B.6 on features computed once, on `device`.

    `train_classifier` with learning rate base_lr · batch_size / 256 and features as they are (neither normalised nor
    standardised). Fewer samples than batch_size make one batch. One difference: the paper crops and flips anew each
    epoch; here each image has the one feature it was given.
    features (M, F), any float type; labels (M,) in 0 … num_classes - 1. `seed` orders the batches.
    """
    _check_labels(num_classes, train_labels)
    inputs, targets = train_features.to(device, torch.float32), train_labels.to(device)
    batch_size = min(batch_size, len(inputs))
    generator = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(epochs):
            for rows in torch.randperm(len(inputs), generator=generator).to(device).split(batch_size):
                yield inputs[rows], targets[rows]

    classifier = zero_linear(inputs.shape[1], num_classes).to(device)
    total_steps = epochs * -(-len(inputs) // batch_size)  # the last batch of an epoch may be smaller
    peak_lr = scaled_lr(base_lr, batch_size, "linear")
    for _ in train_classifier(classifier, batches(), total_steps=total_steps, peak_lr=peak_lr):
        pass
    return classifier


def logistic_regression(
    train_features: Tensor,
    train_labels: Tensor,
    *,
    num_classes: int,
    l2: float,
    start: nn.Linear | None = None,
    max_iter: int = 1000,
    device: torch.device | str = "cpu",
) -> nn.Linear:
    """The minimiser of Σ cross-entropy + l2 / 2 ‖weight‖² by full-batch L-BFGS, float64, on `device`: appendix B.8.

    l2 is 1 / C of scikit-learn's LogisticRegression; the bias is free. `start` is where to begin (another l2's answer),
    zero if None. max_iter ends what cannot converge: nearly separable features and hardly any regularisation.
    features (M, F), any float type, used as float64 and otherwise as they are; labels (M,) in 0 … num_classes - 1.
    """
    _check_labels(num_classes, train_labels)
    inputs, targets = train_features.to(device, torch.float64), train_labels.to(device)
    # The same problem in centred features of unit size, for the bias takes up the shift: at l2 = 100 on 2050 rectified
    # features 69 evaluations of the objective instead of more than 1000.
    shift = inputs.mean(0)
    inputs = inputs - shift
    scale = inputs.square().mean().sqrt().clamp(min=1e-30)
    inputs /= scale
    classifier = zero_linear(inputs.shape[1], num_classes).to(device, torch.float64)
    weight, bias = classifier.weight, classifier.bias
    if start is not None:
        with torch.no_grad():
            weight.copy_(start.weight * scale)
            bias.copy_(start.bias + start.weight.double() @ shift)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iter,
        max_eval=2 * max_iter,
        tolerance_grad=1e-6,
        tolerance_change=1e-10,
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    rows = max(1, CHUNK_ELEMENTS // num_classes)  # logits of at most 512 MiB are alive at once

    def mean_loss() -> Tensor:  # the objective over M, which leaves its minimiser where it is
        optimizer.zero_grad()
        loss = weight.square().sum() * (l2 / scale**2 / 2 / len(inputs))
        loss.backward()
        total = loss.detach()
        for part, labels in zip(inputs.split(rows), targets.split(rows), strict=True):
            loss = cross_entropy(classifier(part), labels, reduction="sum") / len(inputs)
            loss.backward()
            total += loss.detach()
        return total

    optimizer.step(mean_loss)
    with torch.no_grad():
        weight.div_(scale)
        bias.sub_(weight @ shift)
    return classifier


def _check_labels(num_classes: int, *label_sets: Tensor) -> None:
    for labels in label_sets:
        if len(labels) == 0:
            raise ValueError("no samples to evaluate on")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= num_classes:
            raise ValueError(f"labels run from {low} to {high}, expected 0 to {num_classes - 1}")
