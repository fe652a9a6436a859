"""What an encoder has learnt, as data for a page: a map of its embeddings, nearest neighbours, curves, views.

The map is t-SNE (van der Maaten and Hinton 2008) or PCA of the features' directions; neighbours are by cosine. Curves
come from a run's metrics.jsonl and from the evaluation.jsonl of tools/evaluate.py. tools/page.py makes HTML of it.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from model.run_folder import read_rows

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.shards import Dataset
    from pipeline.views import ViewConfig

Line = tuple[Sequence[float], Sequence[float]]  # x and y, equally long
Layout = Literal["auto", "tsne", "pca"]

NEIGHBOURS = 8  # kept of each image
THUMBNAIL = 64  # px at most
VIEW_ROWS, VIEW_PAIRS = 6, 3
FEWEST = 8  # images of a page


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """N images, their places on the map, and each one's nearest neighbours."""

    places: NDArray[np.float64]  # (N, 2), any scale
    layout: str  # how they were found
    keys: Sequence[str]
    labels: Sequence[int]  # places in `classes`; -1 where there are none
    classes: Sequence[str]
    thumbnails: NDArray[np.uint8]  # (N, t, t, 3)
    nearest: NDArray[np.int64]  # (N, k), the most similar first, never the image itself
    cosine: NDArray[np.float32]  # (N, k)

    def class_of(self, i: int) -> str:
        return self.classes[self.labels[i]] if self.classes else ""

    def agreement(self) -> float:
        """The share, 0 … 1, of all N·k neighbours that have the class of the image whose neighbours they are."""
        labels = np.asarray(self.labels)
        return float((labels[self.nearest] == labels[:, None]).mean())

    def examples(self, count: int) -> list[int]:
        """`count` images from as many classes as possible, sorted by class."""
        seen: Counter[int] = Counter()
        turns = []  # the first image of every class, then the second, ...
        for i, label in enumerate(self.labels):
            turns.append((seen[label], i))
            seen[label] += 1
        return sorted((i for _, i in sorted(turns)[:count]), key=lambda i: (self.labels[i], i))


def draw_sample(dataset: "Dataset", count: int, seed: int) -> "Dataset":
    """`count` images drawn from a data set; all, if it has no more.

    Raises ValueError for a data set that is too small for a page.
    """
    from pipeline.subset import subset

    if dataset.samples < FEWEST:
        raise ValueError(f"a page needs at least {FEWEST} images, {dataset.address} has {dataset.samples}")
    if dataset.samples <= count:
        return dataset
    order = np.random.Generator(np.random.Philox(seed)).permutation(dataset.samples)
    return subset(dataset, order[:count])


def place(features: "Tensor", layout: Layout, seed: int) -> tuple[NDArray[np.float64], str]:
    """Where features (N, F) stand on the map by their direction, (N, 2), and the name of the method.

    "auto" is t-SNE where scikit-learn is installed, else PCA. Raises ValueError for features that are not
    finite or all equal.
    """
    import torch
    from torch.nn.functional import normalize

    if bad := int((~features.isfinite().all(1)).sum()):
        raise ValueError(f"{bad} of {len(features)} images have features that are not finite: the encoder is broken")
    rows = normalize(features.double(), dim=1)
    rows -= rows.mean(0)
    if float(rows.abs().max()) < 1e-6:
        raise ValueError(f"all {len(rows)} images have the same features: the encoder has collapsed")
    installed = find_spec("sklearn") is not None
    if layout == "tsne" and not installed:
        raise ValueError("--map tsne needs scikit-learn: install the extra `eval`, or use --map pca")
    if layout != "pca" and installed:
        from sklearn.manifold import TSNE

        perplexity = min(30, (len(rows) - 1) // 3)
        places = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(rows.float().numpy())
        return places.astype(np.float64), f"t-SNE, perplexity {perplexity}"
    _, scales, axes = torch.linalg.svd(rows, full_matrices=False)
    first, second = (100 * scales[:2] ** 2 / (scales**2).sum()).tolist()
    how = f"PCA: {first:.0f} % of the variance across, {second:.0f} % up"
    return (rows @ axes[:2].T).numpy(), how if layout == "pca" else f"{how}; scikit-learn, for t-SNE, is missing"


def neighbours(features: "Tensor", k: int) -> "tuple[Tensor, Tensor]":
    """The k nearest other rows of each row of (N, F) by cosine: positions and cosines, (N, k), the nearest first."""
    import torch
    from torch.nn.functional import normalize

    rows = normalize(features.float(), dim=1)
    nearest = []
    for start in range(0, len(rows), 1024):
        cosine = rows[start : start + 1024] @ rows.T
        cosine[torch.arange(len(cosine)), torch.arange(start, start + len(cosine))] = -torch.inf
        nearest.append(cosine.topk(min(k, len(rows) - 1)))
    return torch.cat([top.indices for top in nearest]), torch.cat([top.values for top in nearest])


def gallery(dataset: "Dataset", views: "ViewConfig", features: "Tensor", layout: Layout, seed: int) -> Gallery:
    """The gallery of a data set with features (N, F); thumbnails are cropped as the encoder saw the images."""
    import torch

    from pipeline.loader import build_eval_loader
    from pipeline.subset import keys
    from pipeline.views import make_views

    places, how = place(features, layout, seed)
    nearest, cosine = neighbours(features, NEIGHBOURS)
    small = make_views(views, {"size": min(views.size, THUMBNAIL)})
    batches = list(build_eval_loader(dataset, small, 256, torch.device("cpu")))
    return Gallery(
        places=places,
        layout=how,
        keys=keys(dataset),
        labels=torch.cat([labels for _, labels in batches]).tolist(),
        classes=dataset.classes or (),
        thumbnails=np.concatenate([to_bytes(small.pixels(images)) for images, _ in batches]),
        nearest=nearest.numpy(),
        cosine=cosine.numpy(),
    )


def to_bytes(pixels: "Tensor") -> NDArray[np.uint8]:
    """Pixels (..., 3, H, W) in [0, 1] as (..., H, W, 3) in 0 … 255."""
    return (255 * pixels.clamp(0, 1)).round().byte().movedim(-3, -1).numpy()


def views_grid(weights: Path, dataset: "Dataset", seed: int) -> NDArray[np.uint8] | None:
    """Pixels (H, W, 3) of the data set's first images beside views as in the training of `weights`; None if unknown."""
    from pipeline.views import make_views
    from tools.runs import training_of
    from tools.show_views import grid

    config = training_of(weights)[1].get("config", {})
    if "views" not in config:
        return None
    views = make_views("imagenet", config["views"])
    second = make_views(views, config.get("second_views") or {})
    return to_bytes(grid(dataset, views, second, images=VIEW_ROWS, pairs=VIEW_PAIRS, seed=seed))


def curves(file: Path) -> dict[str, tuple[Line, int]]:
    """{key of metrics.jsonl: (its finite numbers over the steps, how many values are null or not finite)}."""
    lines: dict[str, tuple[list[float], list[float]]] = {}
    lost: Counter[str] = Counter()
    for number, row in enumerate(read_rows(file), 1):
        if not isinstance(row.get("step"), int):
            raise ValueError(f"{file}, line {number}: expected a step, got {row.get('step')!r}")
        for key, value in row.items():
            if key == "step" or isinstance(value, bool) or not isinstance(value, int | float | None):
                continue
            steps, values = lines.setdefault(key, ([], []))
            if value is not None and math.isfinite(value):
                steps.append(row["step"])
                values.append(value)
            else:
                lost[key] += 1
    return {key: (line, lost[key]) for key, line in lines.items()}


def finetunings(file: Path, sha256: str) -> tuple[dict[tuple[str, str], dict[str, Line]], int]:
    """({(title, settings): {name: top-1 in % over epochs}}, how many rows were left out: those of other weights).

    Runs with equal settings share a chart, random weights among them; a later run replaces an earlier one of its name.
    """
    charts: dict[tuple[str, str], dict[str, Line]] = {}
    others = 0
    for number, row in enumerate(read_rows(file), 1):
        if row.get("evaluation") != "finetune":
            continue
        try:
            if row["sha256"] not in (None, sha256):
                others += 1
                continue
            of, train, test = row["options"], row["train"]["name"], row["test"]["name"]
            share = "Listed labels" if of["percent"] is None else f"{of['percent']:g} % of the labels"
            title = f"{share}: top-1 accuracy, %"
            how = (
                f"{of['labels']} images of {train}, scored on {test}, batch {of['batch_size']}, base_lr "
                f"{of['base_lr']:g}, {of['epochs']} epochs, {of['head_layers']} head layers, seed {of['seed']}"
            )
            for name, curve in row["curves"].items():
                line = [point["epoch"] for point in curve], [100 * point["top1"] for point in curve]
                charts.setdefault((title, how), {})[name] = line
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}, line {number}: not what `evaluate.py finetune` records: {error!r}") from error
    return charts, others
