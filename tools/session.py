"""An encoder, the data sets to evaluate it on, and the processes that do: what the commands of tools/evaluate.py share.

`open_session` checks and loads everything; a `Session` computes features and accuracies over all processes and records
results; `fit` trains a network that it is given.
"""

import hashlib
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
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

PROGRESS_S = 30  # seconds without a line before training reports where it is

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


@contextmanager
def open_session(
    encoder: Path,
    sets: list[Path],
    view: View = None,
    batch_size: BatchSize = 256,
    random_init: RandomInit = False,
    seed: Seed = 0,
    precision: Precision = "auto",
    results: Results = None,
) -> "Iterator[Session]":
    """Everything that a command needs, checked before anything slow starts. Each parameter with a default becomes an
    option of every command.

    Raises ValueError for what the caller can mend.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    from model.encoder_file import load_encoder, weights_file
    from pipeline.shards import read_dataset
    from pipeline.views import make_views, parse_changes
    from pipeline.workers import share_of_cores
    from tools.files import open_binary
    from tools.ranks import check_launch
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
    check_launch(accelerator, "tools/evaluate.py")
    cores = share_of_cores()
    if not cuda and accelerator.num_processes > 1:
        torch.set_num_threads(cores)  # the launcher has set one
    if random_init:
        network = fresh(network, seed)
    with open_binary(file) as weights:
        digest = hashlib.file_digest(weights, "sha256").hexdigest()
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
        from tools.ranks import gathered_rows

        if dataset.samples < self.world_size:
            raise ValueError(
                f"{dataset.address} has {dataset.samples} samples for {self.world_size} processes; use fewer"
            )
        mine = self.part(dataset.samples)
        batches, length = self.batches(dataset), -(-(mine.stop - mine.start) // self.batch_size)
        with self.accelerator.autocast():
            if self.main:
                with typer.progressbar(batches, length=length, label=dataset.address) as bar:
                    rows, labels = features(self.network, bar, self.device)
            else:
                rows, labels = features(self.network, batches, self.device)
        return gathered_rows(self.accelerator, rows), gathered_rows(self.accelerator, labels)

    def gathered(self, objects: list[Any]) -> list[Any]:
        """The lists of all processes, one after another."""
        from accelerate.utils import gather_object

        return list(gather_object(objects))

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


@dataclass(frozen=True)
class Recipe:
    """How `fit` trains; the batch is over all processes, the learning rate base_lr · batch_size / 256."""

    epochs: int
    batch_size: int
    base_lr: float
    eval_every: int


def fit(
    session: Session, name: str, network: "nn.Module", train: "Dataset", test: "Dataset", recipe: Recipe
) -> list[dict[str, Any]]:
    """Train all parameters that require a gradient, on random crops and flips.

    Returns the curve: a row every `eval_every` epochs and one at the end. Modules keep their mode: a BatchNorm in
    evaluation mode keeps its statistics.
    """
    import torch

    from model.probe import train_classifier
    from model.schedule import scaled_lr
    from pipeline.loader import Loader

    loader = Loader(
        train,
        replace(session.views, jitter_p=0.0, grayscale_p=0.0, blur_p=0.0),
        recipe.batch_size,
        session.device,
        rank=session.rank,
        world_size=session.world_size,
        seed=session.seed,
        num_threads=session.num_threads,
        half=session.device.type == "cuda" and session.accelerator.mixed_precision == "bf16",
    )
    total_steps = recipe.epochs * loader.steps_per_epoch
    peak_lr = scaled_lr(recipe.base_lr, recipe.batch_size, "linear")
    session.say(
        f"{name}: {train.samples} images, batch {recipe.batch_size}, {loader.steps_per_epoch} steps an epoch, "
        f"{recipe.epochs} epochs, learning rate from {peak_lr:.4g}"
    )
    modes = [(module, module.training) for module in network.modules()]
    model = session.accelerator.prepare(network)

    def batches() -> "Iterator[tuple[Tensor, Tensor]]":
        for batch in loader:
            assert batch.labels is not None
            yield batch.views[: loader.local_batch_size], batch.labels.to(session.device)  # the first of both views

    def score() -> dict[str, float]:
        # `network`, not `model`: DDP would wait for all ranks at every batch, and some have one batch more
        if session.world_size > 1:
            for buffer in network.buffers():
                torch.distributed.broadcast(buffer, 0)
        network.eval()
        with torch.no_grad():
            accuracy = session.accuracy((network(images), labels) for images, labels in session.batches(test))
        for module, training in modes:
            module.training = training
        return accuracy

    curve: list[dict[str, Any]] = []
    last_line, steps = time.perf_counter(), 0  # steps since the last line
    training = train_classifier(model, batches(), total_steps=total_steps, peak_lr=peak_lr)
    for step, (loss, lr) in enumerate(training, 1):
        epoch, rest = divmod(step, loader.steps_per_epoch)
        steps += 1
        due = not rest and (epoch % recipe.eval_every == 0 or epoch == recipe.epochs)
        if not due and time.perf_counter() - last_line < PROGRESS_S:
            continue
        where = f"  {name} {step}/{total_steps} | epoch {epoch}"
        rate = steps * recipe.batch_size / (time.perf_counter() - last_line)
        if due:
            mean = session.accelerator.reduce(loss, "mean").item()
            if not math.isfinite(mean):
                raise FloatingPointError(
                    f"{name}: the loss is {mean} in epoch {epoch}; lower --base-lr {recipe.base_lr}"
                )
            curve.append({"epoch": epoch, "step": step, "lr": lr, "loss": mean, **score()})
            session.say(f"{where} | loss {mean:.3f} | img/s {rate:.0f} | top-1 {100 * curve[-1]['top1']:.2f} %")
        else:
            session.say(f"{where} | loss {loss.item():.3f} | img/s {rate:.0f}")
        last_line, steps = time.perf_counter(), 0
    return curve


def fresh(network: "Encoder", seed: int) -> "Encoder":
    """The same architecture with new weights."""
    import torch

    from model.encoder import build_encoder

    torch.manual_seed(seed)
    encoder = build_encoder(
        network.depth, width=network.width, stem=network.stem, selective_kernel=network.selective_kernel
    )
    return encoder.to(next(network.parameters()).device).to(memory_format=torch.channels_last)
