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

import hashlib
import inspect
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import Tensor, nn

    from model.encoder import Encoder
    from pipeline.shards import Dataset
    from pipeline.views import ViewConfig

# torch's threads and DALI's share the cores; threads that spin while they wait would take them from the others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)

PROGRESS_S = 30  # seconds without a line before training reports where it is

EncoderPath = Annotated[Path, typer.Argument(help="Run, encoder folder, checkpoint or safetensors file.")]
Train = Annotated[Path, typer.Argument(help="Labelled shards to learn from.")]
Test = Annotated[Path, typer.Argument(help="Labelled shards to score.")]
View = Annotated[
    list[str] | None, typer.Option(help="Change how images are prepared, such as size=96. (default: as the file says)")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images per forward pass and process where nothing is trained.")]
RandomInit = Annotated[bool, typer.Option(help="Evaluate freshly drawn weights of the same architecture.")]
Seed = Annotated[int, typer.Option(min=0, help="Of fresh weights, choices of samples, and the order of batches.")]
Precision = Annotated[
    Literal["auto", "bf16", "no"], typer.Option(help="Mixed precision; auto is bf16 on GPUs, none on CPUs.")
]
Results = Annotated[Path | None, typer.Option(help="File to append to. (default: evaluation.jsonl by the encoder)")]
TrainBatch = Annotated[
    int | None,
    typer.Option(min=1, help="Images per step over all processes. (default: 4096; less where an epoch has no 8 steps)"),
]


@contextmanager
def session(
    encoder: Path,
    sets: list[Path],
    view: View = None,
    batch_size: BatchSize = 256,
    random_init: RandomInit = False,
    seed: Seed = 0,
    precision: Precision = "auto",
    results: Results = None,
) -> "Iterator[Session]":
    """All that a command needs, checked before anything takes time; what has a default is an option of every command.

    Raises ValueError for what the caller can mend.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    from model.encoder_file import load_encoder, weights_file
    from pipeline.shards import read_dataset
    from pipeline.views import make_views, parse_changes
    from tools.files import open_binary
    from tools.runs import training_of
    from tools.signals import stop_with_launcher

    stop_with_launcher()
    file = weights_file(encoder)
    network = load_encoder(file)
    views = make_views("imagenet", training_of(file)[0] | parse_changes(view or []))
    datasets = [read_dataset(path) for path in sets]
    results = results or file.with_name("evaluation.jsonl")
    if not os.access(results.parent, os.W_OK):
        raise ValueError(f"cannot write to {results.parent}: name another file with --results")
    cuda = torch.cuda.is_available()
    mixed = ("bf16" if cuda else "no") if precision == "auto" else precision
    timeout = InitProcessGroupKwargs(timeout=timedelta(hours=1))  # for classifiers that are not equally hard to fit
    accelerator = Accelerator(cpu=not cuda, mixed_precision=mixed, kwargs_handlers=[timeout])
    if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", 1)):
        raise ValueError(
            f"the launcher started {os.environ['WORLD_SIZE']} processes, but each sees {accelerator.num_processes}; on "
            "CPUs use accelerate launch --multi_gpu --num_processes N tools/evaluate.py ..."
        )
    cores = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if not cuda and accelerator.num_processes > 1:
        torch.set_num_threads(cores)  # the launcher has set one
    if random_init:
        network = fresh(network, seed)
    with open_binary(file) as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    facts = {
        "encoder": f"ResNet-{network.depth}, width {network.width:g}, {network.stem} stem",
        "weights": f"random, seed {seed}" if random_init else str(file),
        "sha256": None if random_init else digest,
        "views": {name: getattr(views, name) for name in ("size", "eval_crop", "interpolation", "mean", "std")},
    }
    for name, dataset in zip(("train", "test") if len(sets) == 2 else ("data",), datasets, strict=True):
        facts[name] = {"name": dataset.root.name, "samples": dataset.samples, "fingerprint": dataset.fingerprint}
    yield Session(
        accelerator=accelerator,
        file=file,
        random_init=random_init,
        network=network.to(accelerator.device).to(memory_format=torch.channels_last).eval(),
        views=views,
        sets=datasets,
        facts=facts,
        results=results,
        batch_size=batch_size,
        seed=seed,
        num_threads=cores,
        started=time.perf_counter(),
    )
    accelerator.end_training()


def evaluation(protocol: Callable[..., None]) -> Callable[..., None]:
    """Make a command of a protocol: ENCODER TRAIN TEST, its own options, those of `session`; its docstring."""
    own = list(inspect.signature(protocol).parameters.values())[1:]
    shared = list(inspect.signature(session).parameters.values())[2:]

    def command(encoder: EncoderPath, train: Train, test: Test, **given: Any) -> None:
        from tools.errors import one_message

        options = {each.name: given.pop(each.name) for each in own}
        with one_message("evaluate"), session(encoder, [train, test], **given) as on:
            protocol(on, **options)

    arguments = list(inspect.signature(command).parameters.values())[:3]
    # typer reads both
    command.__signature__ = inspect.Signature([*arguments, *own, *shared])  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in (*arguments, *own, *shared)}
    command.__name__, command.__doc__ = protocol.__name__, protocol.__doc__
    return command


@app.command()
@evaluation
def knn(
    on: "Session",
    k: Annotated[
        list[int] | None, typer.Option(min=1, help="Neighbours that vote, at most all of TRAIN. (default: 200 and 20)")
    ] = None,
    temperature: Annotated[float, typer.Option(help="A vote weighs exp(cosine / temperature).")] = 0.1,
) -> None:
    """Weighted k-nearest-neighbour accuracy on frozen features."""
    from model.probe import knn_votes, neighbours

    check_number("--temperature", temperature, above=0)
    (bank, bank_labels), (queries, labels) = map(on.features, on.labelled())
    mine = on.part(len(queries))
    scores = {}
    for each in dict.fromkeys(neighbours(asked, len(bank)) for asked in k or [200, 20]):
        votes = knn_votes(
            bank,
            bank_labels,
            queries[mine],
            k=each,
            temperature=temperature,
            num_classes=on.num_classes,
            device=on.device,
        )
        scores[f"k={each}"] = on.accuracy([(votes, labels[mine])])
    on.report("knn", scores, {"temperature": temperature})


@app.command()
@evaluation
def linear(
    on: "Session",
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
    chosen, queries = on.labelled()
    recipe = Recipe(epochs, train_batch or usual_batch(chosen.samples, on.world_size), base_lr, eval_every)
    if cached and chosen.samples < recipe.batch_size:
        raise ValueError(
            f"{chosen.address} has {chosen.samples} samples, fewer than one batch of {recipe.batch_size}; lower "
            "--train-batch"
        )
    options = asdict(recipe) | {"seed": on.seed, "cached": cached}
    if cached:
        (inputs, targets), (features, labels) = map(on.features, (chosen, queries))
        del options["eval_every"]
        classifier = linear_probe(
            inputs,
            targets,
            num_classes=on.num_classes,
            epochs=epochs,
            batch_size=recipe.batch_size,
            base_lr=base_lr,
            seed=on.seed,
            device=on.device,
        )
        mine = on.part(len(features))
        scores = on.accuracy([(classifier(features[mine].to(on.device)), labels[mine])])
        on.report("linear", {"linear": scores}, options)
    else:
        on.network.requires_grad_(False).eval()
        on.network.fc = zero_linear(on.network.num_features, on.num_classes)
        curve = fit(on, "linear", on.network, chosen, queries, recipe)
        on.report("linear", {"linear": last(curve)}, options, curves={"linear": curve})


@app.command()
@evaluation
def logistic(
    on: "Session",
    l2: Annotated[
        list[float] | None, typer.Option(min=0, help="Try these l2 (1 / C). (default: 45 from 1e-6 to 1e5)")
    ] = None,
    validation: Annotated[float, typer.Option(help="Share of each class held out to choose l2 on.")] = 0.2,
) -> None:
    """Multinomial logistic regression on cached features, as in appendix B.8: L-BFGS, l2 chosen on held-out samples."""
    import torch
    from accelerate.utils import gather_object

    from model.probe import correct, logistic_regression
    from pipeline.subset import stratified

    check_number("--validation", validation, above=0, most=1)
    if not all(map(math.isfinite, l2 or ())):
        raise ValueError(f"--l2: expected finite numbers, got {l2}")
    (inputs, targets), (features, labels) = map(on.features, on.labelled())
    held = torch.zeros(len(targets), dtype=torch.bool)
    held[torch.from_numpy(stratified(targets.numpy(), validation, on.seed))] = True
    if held.all():
        raise ValueError(f"--validation {validation} leaves no sample to learn from")
    queries, answers = inputs[held].to(on.device).double(), targets[held].to(on.device)
    shared: dict[str, Any] = {"num_classes": on.num_classes, "device": on.device}
    values = sorted(l2 or [10 ** (-6 + i / 4) for i in range(45)], reverse=True)
    tried, classifier = [], None  # from the strongest down, each from where the last one ended
    for each in values[on.rank :: on.world_size]:
        classifier = logistic_regression(inputs[~held], targets[~held], l2=each, start=classifier, **shared)
        tried.append((each, int(correct(classifier(queries), answers)[0]) / len(answers)))
        on.say(f"  l2 {each:<9.3g} {100 * tried[-1][1]:6.2f} % of {len(answers)} held out")
    tried = sorted(gather_object(tried), reverse=True)
    best = max(tried, key=lambda pair: pair[1])[0]  # of equals the strongest
    classifier = logistic_regression(inputs, targets, l2=best, **shared)
    mine = on.part(len(features))
    scores = on.accuracy([(classifier(features[mine].to(on.device).double()), labels[mine])])
    options = {"l2": best, "validation": validation, "seed": on.seed}
    on.report("logistic", {"logistic": scores}, options, tried=tried)


@app.command()
@evaluation
def finetune(
    on: "Session",
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
    chosen, queries = on.labelled()
    if label_list is not None:
        try:
            names = read_text(label_list).splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--label-list {label_list} cannot be read: {error}") from error
        chosen = subset(chosen, named(chosen, names))
    elif percent != 100:
        chosen = subset(chosen, stratified(labels(chosen), percent / 100, on.seed))
    recipe = Recipe(
        epochs or (60 if chosen.samples < 0.05 * on.sets[0].samples else 30),
        train_batch or usual_batch(chosen.samples, on.world_size),
        base_lr,
        eval_every,
    )
    check_statistics(recipe.batch_size // on.world_size, "--train-batch of at least 2 for each process")
    starts = {"pre-trained" if not on.random_init else "random": (on.network, head_of(on.file, head_layers))}
    if from_scratch:
        starts["from scratch"] = (fresh(on.network, on.seed), [])
    curves = {}
    for name, (network, head) in starts.items():
        norms = [layer for layer in head if isinstance(layer, nn.BatchNorm1d)]
        width = norms[-1].num_features if norms else network.num_features
        network.fc = nn.Sequential(*head, zero_linear(width, on.num_classes))
        curves[name] = fit(on, name, network.train(), chosen, queries, recipe)
    on.say("  epoch  " + "  ".join(f"{name:>12}" for name in curves))
    for rows in zip(*curves.values(), strict=True):
        on.say(f"  {rows[0]['epoch']:>5}  " + "  ".join(f"{100 * row['top1']:>10.2f} %" for row in rows))
    options = {
        "labels": chosen.samples,
        "percent": percent if label_list is None else None,
        "label_list": str(label_list) if label_list else None,
        "subset": chosen.fingerprint,
        "head_layers": head_layers,
        **asdict(recipe),
        "seed": on.seed,
    }
    on.report("finetune", {name: last(curve) for name, curve in curves.items()}, options, curves=curves)


@app.command()
def embed(
    encoder: EncoderPath,
    data: Annotated[Path, typer.Argument(help="Shards, labelled or not.")],
    out: Annotated[Path, typer.Argument(help="New file, .npz or .safetensors.")],
    dtype: Annotated[Literal["float32", "float16"], typer.Option(help="Type of the features.")] = "float32",
    view: View = None,
    batch_size: BatchSize = 256,
    random_init: RandomInit = False,
    seed: Seed = 0,
    precision: Precision = "auto",
) -> None:
    """Write features (N, F), labels (N,) if there are any, and keys (N, L), ASCII padded with zeros, to OUT."""
    from tools.errors import one_message
    from tools.files import create, replacing

    with one_message("evaluate"):
        check_new(out, ".npz", ".safetensors")
        with session(encoder, [data], view, batch_size, random_init, seed, precision, out) as on:
            import numpy as np
            import torch

            from model.tensor_files import write_tensors
            from pipeline.subset import keys

            (dataset,) = on.sets
            features, labels = on.features(dataset)
            names = np.array(keys(dataset), dtype=np.bytes_)
            tensors = {
                "features": features.to(getattr(torch, dtype)),
                "keys": torch.from_numpy(names.view(np.uint8).reshape(len(names), -1)),
            } | ({"labels": labels} if dataset.labelled else {})
            if not on.main:
                return
            with replacing(out) as partial:
                if out.suffix == ".npz":
                    with create(partial) as file:
                        arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
                        np.savez(file, about=np.array(json.dumps(on.facts)), **arrays)
                else:
                    write_tensors(partial, tensors, {"about": json.dumps(on.facts)})
            on.say(f"{out}: {', '.join(f'{name} {tuple(tensor.shape)}' for name, tensor in tensors.items())}")


@app.command()
def page(
    encoder: EncoderPath,
    data: Annotated[Path, typer.Argument(help="Shards, labelled or not.")],
    out: Annotated[Path, typer.Argument(help="New file, .html.")],
    points: Annotated[int, typer.Option(min=8, max=10_000, help="Images on the map, drawn by --seed.")] = 2000,
    layout: Annotated[
        Literal["auto", "tsne", "pca"], typer.Option("--map", help="auto is t-SNE where scikit-learn is installed.")
    ] = "auto",
    examples: Annotated[int, typer.Option(min=1, help="Images whose neighbours are shown.")] = 10,
    evaluations: Annotated[
        Path | None, typer.Option(help="Fine-tunings to draw. (default: evaluation.jsonl by the encoder)")
    ] = None,
    view: View = None,
    batch_size: BatchSize = 256,
    random_init: RandomInit = False,
    seed: Seed = 0,
    precision: Precision = "auto",
) -> None:
    """Write one HTML file: a map of the embeddings, nearest neighbours, curves of training and fine-tuning, views."""
    from tools.errors import one_message
    from tools.files import create, replacing

    with one_message("evaluate"):
        check_new(out, ".html")
        with session(encoder, [data], view, batch_size, random_init, seed, precision, out) as on:
            from tools.page import compose, draw_sample

            dataset = draw_sample(on.sets[0], points, seed)
            features, _ = on.features(dataset)
            if not on.main:
                return
            text = compose(
                on.file,
                on.facts,
                dataset,
                on.views,
                features,
                layout=layout,
                examples=examples,
                evaluations=evaluations,
                seed=seed,
            )
            with replacing(out) as partial, create(partial) as file:
                file.write(text.encode("utf-8", "replace"))  # a class folder's name need not be Unicode
            on.say(f"{out}: {dataset.samples} images, {out.stat().st_size / 2**20:.1f} MiB")


# ---- what the commands share ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How `fit` trains; the batch is over all processes, the learning rate base_lr · batch_size / 256."""

    epochs: int
    batch_size: int
    base_lr: float
    eval_every: int


@dataclass(frozen=True, kw_only=True)
class Session:
    """An encoder, data sets, and the processes that evaluate the one on the other."""

    accelerator: "Accelerator"
    file: Path  # the encoder's weights
    random_init: bool  # they are not used
    network: "Encoder"  # on the device, in evaluation mode
    views: "ViewConfig"
    sets: "list[Dataset]"
    facts: dict[str, Any]  # what the results hold for
    results: Path
    batch_size: int
    seed: int
    num_threads: int
    started: float

    @property
    def device(self) -> "torch.device":
        return self.accelerator.device

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def world_size(self) -> int:
        return self.accelerator.num_processes

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def num_classes(self) -> int:
        return len(self.sets[0].classes or ())

    def say(self, text: str) -> None:
        if self.main:
            typer.echo(text)

    def labelled(self) -> "tuple[Dataset, Dataset]":
        """The training and the test set. Raises ValueError if they are not labelled alike."""
        from pipeline.labels import check_alike

        train, test = self.sets
        check_alike(train, test)
        return train, test

    def part(self, count: int) -> slice:
        """This process's share of `count` rows."""
        return slice(count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size)

    def batches(self, dataset: "Dataset") -> "Iterator[tuple[Tensor, Tensor]]":
        """This process's part of a data set as (images, labels), prepared for evaluation."""
        from pipeline.loader import build_eval_loader

        return build_eval_loader(
            dataset,
            self.views,
            self.batch_size,
            self.device,
            rank=self.rank,
            world_size=self.world_size,
            num_threads=self.num_threads,
        )

    def features(self, dataset: "Dataset") -> "tuple[Tensor, Tensor]":
        """Features (N, F) and labels (N,), -1 if none, of all samples in their order, on the CPU of every process."""
        from model.probe import features

        if dataset.samples < self.world_size:
            raise ValueError(
                f"{dataset.address} has {dataset.samples} samples for {self.world_size} processes; use fewer"
            )
        mine = self.part(dataset.samples)
        batches, length = self.batches(dataset), -(-(mine.stop - mine.start) // self.batch_size)
        with self.accelerator.autocast():
            if self.main:
                with typer.progressbar(batches, length=length, label=dataset.address) as shown:
                    found, labels = features(self.network, shown, self.device)
            else:
                found, labels = features(self.network, batches, self.device)
        from train import gathered

        return gathered(self.accelerator, found), gathered(self.accelerator, labels)

    def accuracy(self, scored: "Iterator[tuple[Tensor, Tensor]] | Sequence[tuple[Tensor, Tensor]]") -> dict[str, float]:
        """Top-1 and top-5 over all processes, each giving (scores (m, C), labels (m,)) of its own rows."""
        import torch

        from model.probe import correct

        counts = torch.zeros(3, dtype=torch.int64, device=self.device)
        for scores, labels in scored:
            counts[:2] += correct(scores, labels.to(scores.device)).to(self.device)
            counts[2] += len(labels)
        top1, top5, rows = self.accelerator.reduce(counts, "sum").tolist()
        return {"top1": top1 / rows, "top5": top5 / rows}

    def report(self, kind: str, scores: dict[str, dict[str, float]], options: dict[str, Any], **more: Any) -> None:
        """Print a table and append a line to the results."""
        import torch

        from model.run_folder import append_rows

        if not self.main:
            return
        typer.echo(f"{self.facts['encoder']}, {self.facts['weights']}")
        for name, score in scores.items():
            top5 = f"  top-5 {100 * score['top5']:6.2f} %" if self.num_classes > 5 else ""
            typer.echo(f"  {name:<12} top-1 {100 * score['top1']:6.2f} %{top5}  of {self.sets[1].samples} test images")
        row = {
            "evaluation": kind,
            "scores": scores,
            "options": options,
            **self.facts,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - self.started, 1),
            "processes": self.world_size,
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU",
            "precision": self.accelerator.mixed_precision,
            "torch": torch.__version__,
            **more,
        }
        append_rows(self.results, [row])
        typer.echo(f"  appended to {self.results}")


def check_new(out: Path, *suffixes: str) -> None:
    """Raises ValueError if a file of these kinds cannot be written there without replacing one."""
    if out.suffix not in suffixes:
        raise ValueError(f"{out}: expected a name that ends in {' or '.join(suffixes)}")
    there = os.path.lexists(out)  # a link that leads nowhere too
    if there or not out.parent.is_dir():
        raise ValueError(f"{out} exists already" if there else f"the folder {out.parent} does not exist")


def fit(
    on: Session, name: str, network: "nn.Module", train: "Dataset", test: "Dataset", recipe: Recipe
) -> list[dict[str, Any]]:
    """Train what requires a gradient on random crops and flips; the curve, a row every `eval_every` epochs and at last.

    BatchNorm stays in the mode in which each module comes.
    """
    import torch

    from model.probe import train_classifier
    from model.schedule import scaled_lr
    from pipeline.loader import Loader

    loader = Loader(
        train,
        replace(on.views, jitter_p=0.0, grayscale_p=0.0, blur_p=0.0),
        recipe.batch_size,
        on.device,
        rank=on.rank,
        world_size=on.world_size,
        seed=on.seed,
        num_threads=on.num_threads,
        half=on.device.type == "cuda" and on.accelerator.mixed_precision == "bf16",
    )
    total_steps = recipe.epochs * loader.steps_per_epoch
    peak_lr = scaled_lr(recipe.base_lr, recipe.batch_size, "linear")
    on.say(
        f"{name}: {train.samples} images, batch {recipe.batch_size}, {loader.steps_per_epoch} steps an epoch, "
        f"{recipe.epochs} epochs, learning rate from {peak_lr:.4g}"
    )
    modes = [(module, module.training) for module in network.modules()]
    model = on.accelerator.prepare(network)

    def batches() -> "Iterator[tuple[Tensor, Tensor]]":
        for batch in loader:
            assert batch.labels is not None
            yield batch.views[: loader.local_batch_size], batch.labels.to(on.device)  # the first of both views

    def score() -> dict[str, float]:
        # on the network itself: its wrapper would exchange statistics at every batch, and ranks may differ by one
        if on.world_size > 1:
            for buffer in network.buffers():
                torch.distributed.broadcast(buffer, 0)
        network.eval()
        with torch.no_grad():
            found = on.accuracy((network(images), labels) for images, labels in on.batches(test))
        for module, training in modes:
            module.training = training
        return found

    curve: list[dict[str, Any]] = []
    since, steps = time.perf_counter(), 0  # since the last line
    training = train_classifier(model, batches(), total_steps=total_steps, peak_lr=peak_lr)
    for step, (loss, lr) in enumerate(training, 1):
        epoch, rest = divmod(step, loader.steps_per_epoch)
        steps += 1
        due = not rest and (epoch % recipe.eval_every == 0 or epoch == recipe.epochs)
        if not due and time.perf_counter() - since < PROGRESS_S:
            continue
        where = f"  {name} {step}/{total_steps} | epoch {epoch}"
        rate = steps * recipe.batch_size / (time.perf_counter() - since)
        if due:
            mean = on.accelerator.reduce(loss, "mean").item()
            if not math.isfinite(mean):
                raise FloatingPointError(
                    f"{name}: the loss is {mean} in epoch {epoch}; lower --base-lr {recipe.base_lr}"
                )
            curve.append({"epoch": epoch, "step": step, "lr": lr, "loss": mean, **score()})
            on.say(f"{where} | loss {mean:.3f} | img/s {rate:.0f} | top-1 {100 * curve[-1]['top1']:.2f} %")
        else:
            on.say(f"{where} | loss {loss.item():.3f} | img/s {rate:.0f}")
        since, steps = time.perf_counter(), 0
    return curve


def last(curve: list[dict[str, Any]]) -> dict[str, float]:
    return {name: curve[-1][name] for name in ("top1", "top5")}


def fresh(network: "Encoder", seed: int) -> "Encoder":
    """The same architecture with new weights."""
    import torch

    from model.encoder import build_encoder

    torch.manual_seed(seed)
    encoder = build_encoder(
        network.depth, width=network.width, stem=network.stem, selective_kernel=network.selective_kernel
    )
    return encoder.to(next(network.parameters()).device).to(memory_format=torch.channels_last)


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
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository instead of tools/, as with python -m
    app()
