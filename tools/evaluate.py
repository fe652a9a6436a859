"""How good is an encoder? kNN and a linear probe on its frozen features, from shards.

    python tools/evaluate.py knn RUN/encoder TRAIN TEST
    python tools/evaluate.py linear RUN/encoder TRAIN TEST

ENCODER is a run's encoder folder or file, or any ResNet in safetensors under torchvision's names. TRAIN and TEST are
labelled shards of the same classes. Images are prepared as the file says: resized, centre-cropped, normalised. The
result is printed and written beside the encoder as knn.json or linear.json. --random-init evaluates the same
architecture with freshly drawn weights, the baseline that training has to beat.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)

EncoderPath = Annotated[Path, typer.Argument(help="Encoder folder or safetensors file.")]
Train = Annotated[Path, typer.Argument(help="Labelled shards to learn from: the kNN bank, the probe's training set.")]
Test = Annotated[Path, typer.Argument(help="Labelled shards to score.")]
Size = Annotated[int | None, typer.Option(help="Image side in px. [default: the encoder's, 224 if it does not say]")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images per forward pass.")]
RandomInit = Annotated[bool, typer.Option(help="Evaluate freshly drawn weights of the same architecture.")]
Seed = Annotated[int, typer.Option(help="Of the fresh weights, and of the probe's batch order.")]


@app.command()
def knn(
    encoder: EncoderPath,
    train: Train,
    test: Test,
    size: Size = None,
    batch_size: BatchSize = 256,
    random_init: RandomInit = False,
    seed: Seed = 0,
    k: Annotated[list[int] | None, typer.Option(help="Neighbours that vote. [default: 200 and 20]")] = None,
    temperature: Annotated[float, typer.Option(help="A vote weighs exp(cosine / temperature).")] = 0.1,
) -> None:
    """Weighted k-nearest-neighbour accuracy."""
    from tools import one_message

    with one_message("evaluate"):
        data = encode(encoder, train, test, size, batch_size, random_init, seed)
        from model.probe import knn as vote

        found = {
            f"k={each}": vote(
                *data.both, k=each, temperature=temperature, num_classes=data.num_classes, device=data.device
            )
            for each in k or [200, 20]
        }
        _report("knn", encoder, data, found, {"temperature": temperature})


@app.command()
def linear(
    encoder: EncoderPath,
    train: Train,
    test: Test,
    size: Size = None,
    batch_size: BatchSize = 256,
    random_init: RandomInit = False,
    seed: Seed = 0,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the features.")] = 90,
    base_lr: Annotated[float, typer.Option(help="Learning rate per 256 samples of the batch.")] = 0.1,
    probe_batch: Annotated[int, typer.Option(min=1, help="Samples per step of the probe.")] = 4096,
) -> None:
    """Accuracy of a linear classifier on features computed once, trained as in the paper (Nesterov SGD, no decay)."""
    from tools import one_message

    with one_message("evaluate"):
        data = encode(encoder, train, test, size, batch_size, random_init, seed)
        from model.probe import linear_probe

        options: dict[str, Any] = {"epochs": epochs, "batch_size": probe_batch, "base_lr": base_lr, "seed": seed}
        accuracy = linear_probe(*data.both, num_classes=data.num_classes, device=data.device, **options)
        _report("linear", encoder, data, {"linear": accuracy}, options)


@dataclass(frozen=True)
class Features:
    """Features and labels of both sets: (train features (M, F), labels (M,), test features (Q, F), labels (Q,))."""

    both: "tuple[Tensor, Tensor, Tensor, Tensor]"
    num_classes: int
    device: "torch.device"
    facts: dict[str, Any]


def encode(
    encoder: Path, train: Path, test: Path, size: int | None, batch_size: int, random_init: bool, seed: int
) -> Features:
    """Both data sets through the frozen encoder, on the GPU where there is one."""
    import torch

    from model.checkpoint import load_encoder, read_metadata
    from model.encoder import build_encoder
    from model.probe import features
    from pipeline.loader import build_eval_loader
    from pipeline.shards import DatasetError, read_dataset
    from pipeline.views import make_views

    network = load_encoder(encoder)
    if random_init:
        torch.manual_seed(seed)
        network = build_encoder(
            network.depth, width=network.width, stem=network.stem, selective_kernel=network.selective_kernel
        )
    told = read_metadata(encoder / "encoder.safetensors" if encoder.is_dir() else encoder) or {}
    changes: dict[str, Any] = {"size": size or told.get("image_size", 224)}
    if told:
        interpolation = {"bilinear": "linear", "bicubic": "cubic"}[told["interpolation"]]
        changes |= {"mean": told["mean"], "std": told["std"], "interpolation": interpolation}
        changes["eval_crop"] = told["crop_pct"]
    views = make_views("imagenet", changes)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    network.to(device).to(memory_format=torch.channels_last)
    sets = [read_dataset(path) for path in (train, test)]
    for dataset in sets:
        if not dataset.labelled or dataset.classes != sets[0].classes:
            raise DatasetError(
                f"{train} and {test} must be labelled with the same classes; make them from class folders"
            )
    found: list[Tensor] = []
    for dataset in sets:
        loader = build_eval_loader(dataset, views, batch_size, device, num_threads=len(os.sched_getaffinity(0)))
        with typer.progressbar(loader, length=-(-dataset.samples // batch_size), label=str(dataset.root)) as batches:
            found += features(network, batches, device)
    facts = {
        "encoder": f"ResNet-{network.depth}, width {network.width:g}, {network.stem} stem"
        + ", selective kernels" * network.selective_kernel,
        "weights": f"random, seed {seed}" if random_init else str(encoder),
        "views": {name: getattr(views, name) for name in ("size", "eval_crop", "interpolation", "mean", "std")},
        "train": {"samples": sets[0].samples, "fingerprint": sets[0].fingerprint},
        "test": {"samples": sets[1].samples, "fingerprint": sets[1].fingerprint},
    }
    return Features((found[0], found[1], found[2], found[3]), len(sets[0].classes or ()), device, facts)


def _report(kind: str, encoder: Path, data: Features, accuracies: dict[str, float], options: dict[str, Any]) -> None:
    typer.echo(f"{data.facts['encoder']}, {data.facts['weights']}")
    for name, accuracy in accuracies.items():
        typer.echo(f"  {name:<8} top-1 {100 * accuracy:6.2f} %  of {data.facts['test']['samples']} test images")
    random = "-random" if data.facts["weights"].startswith("random") else ""
    path = (encoder if encoder.is_dir() else encoder.parent) / f"{kind}{random}.json"
    path.write_text(json.dumps({"top1": accuracies, "options": options, **data.facts}, indent=1))
    typer.echo(f"  written to {path}")


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository instead of tools/, as with python -m
    app()
