"""How good is an encoder? What the paper's readers do with one: kNN, linear classifiers, fine-tuning; or its features.

    python tools/evaluate.py knn RUN TRAIN TEST           weighted votes of the nearest neighbours: minutes
    python tools/evaluate.py linear RUN TRAIN TEST        the paper's linear evaluation: 90 epochs of crops and flips
    python tools/evaluate.py logistic RUN TRAIN TEST      its transfer protocol: L-BFGS, the best of 45 l2
    python tools/evaluate.py finetune RUN TRAIN TEST --percent 1 --from-scratch
    python tools/evaluate.py embed RUN DATA OUT.npz       features, labels and keys
    python tools/evaluate.py page RUN DATA OUT.html       a map, neighbours, curves and views: one file to look at
    accelerate launch --multi_gpu --num_processes N tools/evaluate.py ...

RUN is a run, its encoder folder, a checkpoint, or a ResNet in safetensors under the names of torchvision, timm, lightly
or solo-learn. TRAIN and TEST are labelled shards of the same classes, folders or s3:// and gs:// addresses. Images are
prepared as the file says; where it says nothing, as for ImageNet, and --view changes that. Results are printed and
appended as one line of JSON to evaluation.jsonl beside the encoder. --random-init evaluates freshly drawn weights of
the same architecture: the baseline that training has to beat. The protocols: Chen et al. 2020, arXiv:2002.05709,
appendix B.5, B.6 and B.8.
"""

import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository instead of tools/, as with python -m

from tools.options import parameters, with_parameters
from tools.session import Recipe, Session, fit, fresh, open_session

if TYPE_CHECKING:
    from torch import nn

# On CPUs torch's threads and DALI's share the cores, so idle ones sleep instead of spinning.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)

EncoderPath = Annotated[Path, typer.Argument(help="Run, encoder folder, checkpoint or safetensors file.")]
Train = Annotated[Path, typer.Argument(help="Labelled shards to learn from.")]
Data = Annotated[Path, typer.Argument(help="Shards, labelled or not.")]
Test = Annotated[Path, typer.Argument(help="Labelled shards to score.")]
TrainBatch = Annotated[
    int | None,
    typer.Option(min=1, help="Images per step over all processes. (default: 4096; less where an epoch has no 8 steps)"),
]


def evaluation(protocol: Callable[..., None]) -> Callable[..., None]:
    """Make a command of protocol(session, OPTIONS): ENCODER TRAIN TEST, these options, those of `open_session`."""
    own, shared = parameters(protocol)[1:], parameters(open_session)[2:]

    def command(encoder: EncoderPath, train: Train, test: Test, **options: Any) -> None:
        from tools.errors import one_message

        own_options = {parameter.name: options.pop(parameter.name) for parameter in own}
        with one_message("evaluate"), open_session(encoder, [train, test], **options) as session:
            protocol(session, **own_options)

    return with_parameters(command, [*parameters(command)[:-1], *own, *shared], like=protocol)


def writes(*suffixes: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of write(session, out, OPTIONS): ENCODER DATA OUT, these options, those of `open_session`.

    OUT is a new file that ends in one of the suffixes.
    """
    Out = Annotated[Path, typer.Argument(help=f"New file, {' or '.join(suffixes)}.")]

    def decorate(write: Callable[..., None]) -> Callable[..., None]:
        own, shared = parameters(write)[2:], parameters(open_session)[2:-1]  # OUT stands for --results

        def command(encoder: EncoderPath, data: Data, out: Out, **options: Any) -> None:  # type: ignore[valid-type]
            from tools.errors import one_message

            own_options = {parameter.name: options.pop(parameter.name) for parameter in own}
            with one_message("evaluate"):
                check_new(out, *suffixes)
                with open_session(encoder, [data], results=out, **options) as session:
                    write(session, out, **own_options)

        return with_parameters(command, [*parameters(command)[:-1], *own, *shared], like=write)

    return decorate


@app.command()
@evaluation
def knn(
    session: Session,
    k: Annotated[
        list[int] | None, typer.Option(min=1, help="Neighbours that vote, at most all of TRAIN. (default: 200 and 20)")
    ] = None,
    temperature: Annotated[float, typer.Option(help="A vote weighs exp(cosine / temperature).")] = 0.1,
) -> None:
    """Weighted k-nearest-neighbour accuracy on frozen features."""
    from model.probe import knn_votes, neighbours

    check_number("--temperature", temperature, above=0)
    (bank, bank_labels), (queries, labels) = map(session.features, session.labelled())
    mine = session.part(len(queries))
    scores = {}
    for voters in dict.fromkeys(neighbours(asked, len(bank)) for asked in k or [200, 20]):
        votes = knn_votes(
            bank,
            bank_labels,
            queries[mine],
            k=voters,
            temperature=temperature,
            num_classes=session.num_classes,
            device=session.device,
        )
        scores[f"k={voters}"] = session.accuracy([(votes, labels[mine])])
    session.report("knn", scores, {"temperature": temperature})


@app.command()
@evaluation
def linear(
    session: Session,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training set.")] = 90,
    train_batch: TrainBatch = None,
    base_lr: Annotated[float, typer.Option(help="Learning rate per 256 images of the batch.")] = 0.1,
    eval_every: Annotated[int, typer.Option(min=1, help="Epochs between test scores.")] = 10,
    cached: Annotated[
        bool,
        typer.Option(
            help="One feature per image, of its centre, instead of new crops and flips: minutes, but not B.6."
        ),
    ] = False,
) -> None:
    """Linear classifier on the frozen encoder, as in appendix B.6: random crops and flips, Nesterov SGD, no decay."""
    from model.probe import linear_probe, zero_linear

    check_number("--base-lr", base_lr, above=0)
    chosen, queries = session.labelled()
    recipe = Recipe(epochs, train_batch or usual_batch(chosen.samples, session.world_size), base_lr, eval_every)
    if cached and chosen.samples < recipe.batch_size:
        raise ValueError(
            f"{chosen.address} has {chosen.samples} samples, fewer than one batch of {recipe.batch_size}; lower "
            "--train-batch"
        )
    options = asdict(recipe) | {"seed": session.seed, "cached": cached}
    if cached:
        (inputs, targets), (features, labels) = map(session.features, (chosen, queries))
        del options["eval_every"]
        classifier = linear_probe(
            inputs,
            targets,
            num_classes=session.num_classes,
            epochs=epochs,
            batch_size=recipe.batch_size,
            base_lr=base_lr,
            seed=session.seed,
            device=session.device,
        )
        mine = session.part(len(features))
        scores = session.accuracy([(classifier(features[mine].to(session.device)), labels[mine])])
        session.report("linear", {"linear": scores}, options)
    else:
        session.network.requires_grad_(False).eval()
        session.network.fc = zero_linear(session.network.num_features, session.num_classes)
        curve = fit(session, "linear", session.network, chosen, queries, recipe)
        session.report("linear", {"linear": last(curve)}, options, curves={"linear": curve})


@app.command()
@evaluation
def logistic(
    session: Session,
    l2: Annotated[
        list[float] | None, typer.Option(min=0, help="Try these l2 (1 / C). (default: 45 from 1e-6 to 1e5)")
    ] = None,
    validation: Annotated[float, typer.Option(help="Share of each class held out to choose l2 on.")] = 0.2,
) -> None:
    """Multinomial logistic regression on cached features, as in appendix B.8: L-BFGS, l2 chosen on held-out samples."""
    import torch

    from model.probe import correct, logistic_regression
    from pipeline.subset import stratified

    check_number("--validation", validation, above=0, most=1)
    if not all(map(math.isfinite, l2 or ())):
        raise ValueError(f"--l2: expected finite numbers, got {l2}")
    (inputs, targets), (features, labels) = map(session.features, session.labelled())
    held = torch.zeros(len(targets), dtype=torch.bool)
    held[torch.from_numpy(stratified(targets.numpy(), validation, session.seed))] = True
    if held.all():
        raise ValueError(f"--validation {validation} leaves no sample to learn from")
    queries, answers = inputs[held].to(session.device).double(), targets[held].to(session.device)
    shared: dict[str, Any] = {"num_classes": session.num_classes, "device": session.device}
    values = sorted(l2 or [10 ** (-6 + i / 4) for i in range(45)], reverse=True)
    tried, classifier = [], None  # from the strongest down, each from where the last one ended
    for strength in values[session.rank :: session.world_size]:
        classifier = logistic_regression(inputs[~held], targets[~held], l2=strength, start=classifier, **shared)
        tried.append((strength, int(correct(classifier(queries), answers)[0]) / len(answers)))
        session.say(f"  l2 {strength:<9.3g} {100 * tried[-1][1]:6.2f} % of {len(answers)} held out")
    tried = sorted(session.gathered(tried), reverse=True)
    best = max(tried, key=lambda pair: pair[1])[0]  # of equals the strongest
    classifier = logistic_regression(inputs, targets, l2=best, **shared)
    mine = session.part(len(features))
    scores = session.accuracy([(classifier(features[mine].to(session.device).double()), labels[mine])])
    options = {"l2": best, "validation": validation, "seed": session.seed}
    session.report("logistic", {"logistic": scores}, options, tried=tried)


@app.command()
@evaluation
def finetune(
    session: Session,
    percent: Annotated[float, typer.Option(help="Share of each class's labels to use, drawn by --seed.")] = 1.0,
    label_list: Annotated[
        Path | None, typer.Option(help="Use the samples listed here instead: file names or keys, one per line.")
    ] = None,
    from_scratch: Annotated[bool, typer.Option(help="Train fresh weights beside it, in the same way.")] = False,
    head_layers: Annotated[
        int, typer.Option(min=0, help="Layers of the run's projection head kept below the classifier; 1 in SimCLRv2.")
    ] = 0,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over the labels used. (default: 60 below 5 % of them, 30 above)")
    ] = None,
    train_batch: TrainBatch = None,
    base_lr: Annotated[float, typer.Option(help="Learning rate per 256 images of the batch.")] = 0.05,
    eval_every: Annotated[int, typer.Option(min=1, help="Epochs between test scores.")] = 5,
) -> None:
    """Train all of the network on few labels, as in appendix B.5: random crops and flips, no regularisation."""
    from torch import nn

    from model.probe import zero_linear
    from model.sizes import check_statistics
    from pipeline.labels import labels
    from pipeline.subset import named, stratified, subset
    from tools.files import read_text

    check_number("--base-lr", base_lr, above=0)
    check_number("--percent", percent, above=0, most=100)
    chosen, queries = session.labelled()
    if label_list is not None:
        try:
            names = read_text(label_list).splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--label-list {label_list} cannot be read: {error}") from error
        chosen = subset(chosen, named(chosen, names))
    elif percent != 100:
        chosen = subset(chosen, stratified(labels(chosen), percent / 100, session.seed))
    recipe = Recipe(
        epochs or (60 if chosen.samples < 0.05 * session.sets[0].samples else 30),
        train_batch or usual_batch(chosen.samples, session.world_size),
        base_lr,
        eval_every,
    )
    check_statistics(recipe.batch_size // session.world_size, "--train-batch of at least 2 for each process")
    starts = {
        "pre-trained" if not session.random_init else "random": (session.network, head_of(session.file, head_layers))
    }
    if from_scratch:
        starts["from scratch"] = (fresh(session.network, session.seed), [])
    curves = {}
    for name, (network, head) in starts.items():
        norms = [layer for layer in head if isinstance(layer, nn.BatchNorm1d)]
        width = norms[-1].num_features if norms else network.num_features
        network.fc = nn.Sequential(*head, zero_linear(width, session.num_classes))
        curves[name] = fit(session, name, network.train(), chosen, queries, recipe)
    session.say("  epoch  " + "  ".join(f"{name:>12}" for name in curves))
    for rows in zip(*curves.values(), strict=True):
        session.say(f"  {rows[0]['epoch']:>5}  " + "  ".join(f"{100 * row['top1']:>10.2f} %" for row in rows))
    options = {
        "labels": chosen.samples,
        "percent": percent if label_list is None else None,
        "label_list": str(label_list) if label_list else None,
        "subset": chosen.fingerprint,
        "head_layers": head_layers,
        **asdict(recipe),
        "seed": session.seed,
    }
    session.report("finetune", {name: last(curve) for name, curve in curves.items()}, options, curves=curves)


@app.command()
@writes(".npz", ".safetensors")
def embed(
    session: Session,
    out: Path,
    dtype: Annotated[Literal["float32", "float16"], typer.Option(help="Type of the features.")] = "float32",
) -> None:
    """Write features (N, F), labels (N,) if there are any, and keys (N, L), ASCII padded with zeros, to OUT."""
    import numpy as np
    import torch

    from model.tensor_files import write_tensors
    from pipeline.subset import keys
    from tools.files import create, replacing

    (dataset,) = session.sets
    features, labels = session.features(dataset)
    names = np.array(keys(dataset), dtype=np.bytes_)
    tensors = {
        "features": features.to(getattr(torch, dtype)),
        "keys": torch.from_numpy(names.view(np.uint8).reshape(len(names), -1)),
    } | ({"labels": labels} if dataset.labelled else {})
    if not session.main:
        return
    with replacing(out) as partial:
        if out.suffix == ".npz":
            with create(partial) as file:
                arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
                np.savez(file, about=np.array(json.dumps(session.facts)), **arrays)
        else:
            write_tensors(partial, tensors, {"about": json.dumps(session.facts)})
    session.say(f"{out}: {', '.join(f'{name} {tuple(tensor.shape)}' for name, tensor in tensors.items())}")


@app.command()
@writes(".html")
def page(
    session: Session,
    out: Path,
    points: Annotated[int, typer.Option(min=8, max=10_000, help="Images on the map, drawn by --seed.")] = 2000,
    layout: Annotated[
        Literal["auto", "tsne", "pca"], typer.Option("--map", help="auto is t-SNE where scikit-learn is installed.")
    ] = "auto",
    examples: Annotated[int, typer.Option(min=1, help="Images whose neighbours are shown.")] = 10,
    evaluations: Annotated[
        Path | None, typer.Option(help="Fine-tunings to draw. (default: evaluation.jsonl by the encoder)")
    ] = None,
) -> None:
    """Write one HTML file: a map of the embeddings, nearest neighbours, curves of training and fine-tuning, views."""
    from tools.files import create, replacing
    from tools.gallery import draw_sample
    from tools.page import compose

    dataset = draw_sample(session.sets[0], points, session.seed)
    features, _ = session.features(dataset)
    if not session.main:
        return
    text = compose(
        session.file,
        session.facts,
        dataset,
        session.views,
        features,
        layout=layout,
        examples=examples,
        evaluations=evaluations,
        seed=session.seed,
    )
    with replacing(out) as partial, create(partial) as file:
        file.write(text.encode("utf-8", "replace"))  # a class folder's name need not be Unicode
    session.say(f"{out}: {dataset.samples} images, {out.stat().st_size / 2**20:.1f} MiB")


# ---- what the commands share ---------------------------------------------------------------------------------------


def check_new(out: Path, *suffixes: str) -> None:
    """Raises ValueError unless `out` ends in one of the suffixes, does not exist, and its folder does."""
    if out.suffix not in suffixes:
        raise ValueError(f"{out}: expected a name that ends in {' or '.join(suffixes)}")
    there = os.path.lexists(out)  # a link that leads nowhere too
    if there or not out.parent.is_dir():
        raise ValueError(f"{out} exists already" if there else f"the folder {out.parent} does not exist")


def last(curve: list[dict[str, Any]]) -> dict[str, float]:
    return {name: curve[-1][name] for name in ("top1", "top5")}


def head_of(weights: Path, layers: int) -> "list[nn.Module]":
    """The first layers of the projection head that an encoder was trained with. Raises ValueError if it has fewer."""
    from model.encoder_file import load_head
    from tools.runs import head_file

    if not layers:
        return []
    file = head_file(weights)
    head = list(load_head(file))
    if len(head) < 3 * layers - 1:  # dense, BatchNorm, ReLU; the last layer has no ReLU
        raise ValueError(f"--head-layers {layers}: the projection head in {file} has {(len(head) + 1) // 3}")
    return head[: 3 * layers]


def usual_batch(samples: int, world_size: int = 1) -> int:
    """The paper's batch of 4096, or for a small set the largest power of two that leaves eight steps to an epoch.

    But two images for each process: BatchNorm has no use for one.
    """
    return max(2 * world_size, min(4096, 2 ** max(0, (samples // 8).bit_length() - 1)))


def check_number(option: str, number: float, *, above: float, most: float = sys.float_info.max) -> None:
    """Raises ValueError unless above < number <= most; NaN and infinity are none."""
    if not above < number <= most:
        until = f" and at most {most:g}" if most < sys.float_info.max else ""
        raise ValueError(f"{option}: expected a finite number above {above:g}{until}, got {number}")


if __name__ == "__main__":
    app()
