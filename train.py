"""Train an encoder with SimCLR: shards in, encoder.safetensors out.

    accelerate launch train.py demo                                   embedded data, no GPU needed, a few minutes
    accelerate launch train.py cifar10 --data SHARDS --out RUN        one process
    accelerate launch --multi_gpu --num_processes 8 train.py imagenet --data SHARDS --out RUN
    accelerate launch train.py cifar10 --data SHARDS --out RUN --resume

A recipe is one complete `TrainConfig`; options change it, a TOML file given with --config stands between the two.
The run folder holds config.json, metrics.jsonl (one row a step, the same for equal runs), speed.jsonl (wall clock),
status.json, views.png, checkpoints/ and encoder/ with encoder.safetensors, and damaged.jsonl where samples were
replaced. One run at a time may write it: .lock says which. A run that is killed at any moment goes on from its newest
whole checkpoint with --resume, on any number of processes with the same images and views; bit for bit on the CPU with
equal numbers of processes and threads.

The file reads from top to bottom: what a run is (`TrainConfig`, `RECIPES`), its command line, `train`, and then the
parts of `train` in the order in which it calls them.
"""

import functools
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple

from model.run_folder import Log, Preempted, claim_for_all, is_empty, next_free
from pipeline.views import VIEWS, ViewConfig, make_views
from tools.command import RunError, answer_help_and_mistakes, train_command
from tools.files import replacing
from tools.options import check_ranges, option, options_of
from tools.ranks import RANKS_WAIT, check_launch, gathered_rows, naming_lost_ranks
from tools.signals import Stop

KNN_K = 200  # neighbours that vote, where the bank has so many
KNN_BANK = 100_000  # samples that vote in the kNN of a running training, from all over the data set
EVAL_BATCH = 512
WINDOW = 16  # shards that are mixed together where they have to be fetched; they are shuffled when written


# ---- what a run is -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a run. The texts are the command line's help.

    may_change: on resuming. Such a field touches neither which images stand in a batch, nor their views, nor the
    recipe; `changed_sums` says what a change of micro_batch or cpu_threads does.
    """

    data: str = option("", "Folder of shards to train on; the demo makes its own.", may_change=True)
    eval_data: str = option("", "Folder of labelled shards to query kNN with; `data` is the bank.", may_change=True)
    views: ViewConfig = field(default_factory=ViewConfig)
    second_views: ViewConfig | None = None  # of the second view of each image; None: as `views`

    depth: int = option(50, "ResNet depth: 18, 34, 50, 101 or 152.")
    width: float = option(1.0, "Multiplies every channel: 1, 2 or 4 in the paper.", more_than=0)
    stem: Literal["auto", "standard", "small"] = option(
        "auto", "First layers; auto is small (3x3, no pooling) up to 64 px."
    )
    selective_kernel: bool = option(False, "SimCLRv2's selective kernels and ResNet-D, from depth 50 on.")
    head: Literal["none", "linear", "nonlinear", "nonlinear3"] = option(
        "nonlinear", "Projection head; the paper's is nonlinear."
    )
    projection_dim: int = option(128, "Columns of z.", at_least=1)

    batch_size: int = option(4096, "Images per step over all processes.", at_least=1)
    micro_batch: int = option(
        0,
        "Images a process encodes at once; the loss is over all. 0: as many as fit a GPU, on a CPU the whole batch.",
        at_least=0,
        may_change=True,
    )
    epochs: int = option(100, "Passes over the data; decides the learning rate schedule.", at_least=1)
    steps: int = option(0, "Train this many steps instead of `epochs`; 0: not.", at_least=0)
    temperature: float = option(0.1, "Temperature of NT-Xent.", more_than=0)
    loss: Literal["auto", "triton", "chunked", "reference"] = option("auto", "Implementation of NT-Xent.")
    optimizer: Literal["lars", "sgd", "adamw"] = option("lars", "LARS is the paper's.")
    base_lr: float = option(0.3, "Learning rate before scaling with the batch.", at_least=0)
    lr_scaling: Literal["linear", "sqrt", "none"] = option(
        "linear", "Peak: base_lr x batch_size / 256, x sqrt(batch_size), or as it is."
    )
    warmup_epochs: float = option(10.0, "Epochs of linear warm-up.", at_least=0)
    momentum: float = option(0.9, "Momentum of LARS and SGD.", at_least=0, less_than=1)
    weight_decay: float = option(1e-6, "Not applied to norms and biases.", at_least=0)
    precision: Literal["bf16", "no"] = option("bf16", "Mixed precision of encoder and head.")
    compile: Literal["on", "off"] = option("off", "torch.compile the network; no record has it ahead by enough.")
    sync_bn: bool = option(False, "BatchNorm statistics over all GPUs, as the paper; costs time.")
    seed: int = option(0, "Of weights, order and views.", at_least=0, less_than=2**63)

    cpu_threads: int = option(
        0,
        "torch's threads per process on CPUs; 0: its share of the cores.",
        at_least=0,
        less_than=4096,
        may_change=True,
    )
    num_threads: int = option(
        0, "DALI's threads per process; 0: its share of the cores.", at_least=0, less_than=4096, may_change=True
    )
    window: int = option(
        0,
        "Shards whose samples are mixed together. 0: all of them; from object storage 16, fetched ahead.",
        at_least=0,
        less_than=2**31,
    )
    lanes: int = option(
        0,
        "Streams that share out the shards, so that a node fetches its own alone. 0: 1; in object storage one a node.",
        at_least=0,
    )
    cache: str = option("", "Folder for shards from object storage. (default: ~/.cache/swiftclr)", may_change=True)
    cache_gib: float = option(100.0, "Most that the cache may hold, in GiB.", more_than=0, may_change=True)
    data_timeout: float = option(
        300.0, "Seconds without a batch that end the run, naming rank and shard.", more_than=0, may_change=True
    )
    skip_damaged: int = option(
        0,
        "Replace up to so many damaged samples by others, named in damaged.jsonl; 0: the first one ends the run.",
        at_least=0,
        may_change=True,
    )
    keep_graphs: int = option(
        0,
        "Micro-batches encoded once and not twice, for their memory. 0: as many as fit a GPU, on a CPU one.",
        at_least=0,
        may_change=True,
    )
    max_skipped: int = option(
        10,
        "End the run after so many steps in a row that were skipped because the gradient was not finite.",
        at_least=1,
        may_change=True,
    )
    log_every: int = option(10, "Steps between log lines.", at_least=1, may_change=True)
    checkpoint_every: int = option(
        500, "Steps between checkpoints; the last step always makes one.", at_least=1, may_change=True
    )
    keep: int = option(2, "Newest checkpoints kept.", at_least=1, may_change=True)
    knn_every: int = option(0, "Epochs between kNN evaluations; 0: only before and after.", at_least=0, may_change=True)
    online_probe: bool = option(
        True, "Train a linear probe on detached features beside the encoder; needs labels.", may_change=True
    )
    track: str = option("", "Also log to a tracker of Accelerate, such as tensorboard or wandb.", may_change=True)

    def __post_init__(self) -> None:
        check_ranges(self)


MAY_CHANGE = frozenset(name for name, limits in options_of(TrainConfig).items() if limits.may_change)

RECIPES: dict[str, TrainConfig] = {
    # Ours, for embedded drawings: shows within two minutes on four CPU cores that everything works. kNN rises from 21 %
    # to 84 % (benchmarks/records/demo.csv). It says nothing about the method: kNN on bare pixels gives 54 %.
    "demo": TrainConfig(
        views=make_views(
            "cifar",
            {
                "crop_area": (0.3, 1.0),
                "jitter_strength": 1.0,
                "hue": 0.5,
                "grayscale_p": 0.5,
                "mean": (0.5, 0.5, 0.5),
                "std": (0.25, 0.25, 0.25),
            },
        ),
        depth=18,
        width=0.25,
        stem="standard",
        batch_size=128,
        epochs=25,
        temperature=0.2,
        base_lr=8.0,
        warmup_epochs=8,
        weight_decay=1e-4,
        precision="no",
        log_every=20,
    ),
    # The authors' command (README of google-research/simclr): ResNet-18, batch 512, 1000 epochs, LARS 1.0 linear,
    # weight decay 1e-4, temperature 0.5, half the colour strength, no blur. Published: 91 % by linear evaluation. Not
    # yet run to its end here: no GPU has been at hand.
    "cifar10": TrainConfig(
        views=VIEWS["cifar"],
        depth=18,
        batch_size=512,
        epochs=1000,
        temperature=0.5,
        base_lr=1.0,
        weight_decay=1e-4,
    ),
    # Ours, for the paper has no STL-10: ImageNet's views at 96 px with the CIFAR schedule. Published ResNet-18 runs of
    # 500 epochs reach 81 % linear with 500 labels per class. Not yet run to its end here.
    "stl10": TrainConfig(
        views=VIEWS["stl10"],
        depth=18,
        batch_size=512,
        epochs=500,
        temperature=0.2,
        base_lr=1.0,
        weight_decay=1e-4,
    ),
    # The paper, section 2.2 and appendix A: ResNet-50, batch 4096, 100 epochs, LARS 0.3 linear, weight decay 1e-6,
    # temperature 0.1. Published: 64.5 % by linear evaluation, 1.5 hours on 128 TPU v3 cores. Below batch 4096 use
    # --lr-scaling sqrt --base-lr 0.075 (appendix B.1). Not yet run to its end here.
    "imagenet": TrainConfig(views=VIEWS["imagenet"]),
}


# ---- the command line: parsed before torch is imported, which takes seconds ----------------------------------------


# On CPUs torch's threads and DALI's share the cores, so idle ones sleep instead of spinning.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _train(config: TrainConfig, **options: Any) -> None:
    """`train`, which tells torch's launcher how it failed."""
    record(train)(config, **options)


app = train_command(TrainConfig, RECIPES, _train)

if __name__ == "__main__":
    answer_help_and_mistakes(app)

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from torchvision.utils import make_grid, save_image

from model import checkpoint
from model.checkpoint import Saved
from model.encoder import Encoder, build_encoder
from model.encoder_file import export_encoder
from model.lars import param_groups
from model.memory_plan import plan
from model.monitor import OnlineProbe
from model.nt_xent import nt_xent
from model.nt_xent import resolve as choose_loss
from model.probe import features, knn, neighbours
from model.report import Report
from model.schedule import learning_rate, scaled_lr, warmup_steps
from model.simclr import ProjectionHead, SimCLR
from model.sizes import check_contrast, check_statistics
from model.step import Training, build_optimizer
from pipeline.cache import cache_for
from pipeline.demo import write_demo
from pipeline.labels import check_alike
from pipeline.loader import Loader, LoaderError, build_eval_loader
from pipeline.order import divide
from pipeline.shards import Dataset, read_dataset
from pipeline.store import PATIENCE_S, is_remote
from pipeline.workers import local_world_size, share_of_cores

# ---- a run, from its folder to its encoder -------------------------------------------------------------------------


@contextmanager
def leaving_the_group() -> Iterator[None]:
    """End the process group when a run fails, so that no process's gloo threads listen to one that has gone and abort.

    On GPUs only where all fail alike, as of what the caller can mend: what one of them left open would be waited for.
    """
    try:
        yield
    except BaseException as error:
        if dist.is_initialized() and (dist.get_backend() == "gloo" or isinstance(error, ValueError | Preempted)):
            dist.destroy_process_group()
        raise


@leaving_the_group()
def train(
    config: TrainConfig,
    *,
    recipe: str = "",
    out: Path | None = None,
    resume: bool = False,
    origin: Mapping[str, str] | None = None,
) -> Path:
    """Run `config` to its end in folder `out`, the next free runs/RECIPE if None; returns the exported encoder's path.

    resume goes on from the newest whole checkpoint in `out`, or starts where there is none. origin says where a value
    came from, for the banner. Raises ValueError (RunError, DatasetError) for what the caller can mend, before the first
    step; LoaderError, FloatingPointError or OSError for what goes wrong on the way, Preempted after a signal. Another
    ValueError on the way is no fault of the caller's and comes as a RuntimeError.
    """
    stop = Stop()
    check_folder(out, resume)
    accelerator = build_accelerator(config)
    device, world_size = accelerator.device, accelerator.num_processes
    check_config(config, world_size)
    with open_run(out, recipe, resume, accelerator) as (log, saved):
        # The data, and what the configuration left open
        config = with_demo_data(config, recipe, log.out, accelerator)
        dataset, queries = open_data(config)
        config = settle(config, dataset, accelerator, saved)
        if device.type == "cpu":
            torch.set_num_threads(config.cpu_threads)  # the launcher sets OMP_NUM_THREADS=1; sums depend on the number

        # Network, optimizer, loss, loader, schedule
        training = build_training(config, accelerator)
        config = replace(config, micro_batch=training.plan.micro_batch)
        check_config(config, world_size)
        loader = build_loader(
            config, dataset, device, rank=accelerator.process_index, world_size=world_size, half=training.half
        )
        total_steps = config.steps or config.epochs * loader.steps_per_epoch
        warmup = min(warmup_steps(config.warmup_epochs, dataset.samples, config.batch_size), total_steps)
        lr_at = functools.partial(learning_rate, peak=training.peak_lr, total_steps=total_steps, warmup_steps=warmup)
        probe = build_probe(config, training, dataset, accelerator)

        # Start, or go on
        step, skipped = go_on(saved, training, loader, probe)
        track = start_tracker(config, accelerator)
        if saved and log.main:
            log.notes += checkpoint.set_aside_newer(saved)
            checkpoint.prune(saved.path.parent, config.keep, saved.path)  # a run killed in its last save makes no other
        log.start(facts(config, dataset, queries), step)
        accelerator.print(
            f"swiftclr {recipe}: {log.out}, step {step} of {total_steps}\n"
            f"  processes  {describe_processes(config, accelerator)}\n"
            f"  data       {config.data}: {dataset.samples} samples in {len(dataset.shards)} shards\n"
            f"  batch      {config.batch_size} images, {training.plan}; {loader.steps_per_epoch} steps "
            f"per epoch, learning rate to {training.peak_lr:.4g} in {warmup} steps\n"
            f"  loss       {training.loss}\n"
            f"  probe      {describe_probe(config, dataset, saved)}\n"
            f"  kNN        {describe_votes(dataset, queries)}\n"
            f"  settings   {settings(config, origin or {})}"
            + "".join(f"\n  note       {note}" for note in [*log.notes, *changed_sums(saved, config, world_size)])
        )
        report = Report(
            log,
            probe,
            device=device,
            batch_size=config.batch_size,
            total_steps=total_steps,
            temperature=config.temperature,
            max_skipped=config.max_skipped,
            skipped=skipped,
            gather=accelerator.gather,
            say=accelerator.print,
            track=track,
        )

        def evaluate() -> bool:
            """Whether it was done: a signal interrupts it, and the resumed run does it first."""
            assert queries
            accuracy = knn_accuracy(config, training.encoder, dataset, queries, accelerator, stop)
            if accuracy is not None:
                report.accuracy(step, accuracy)
            return accuracy is not None

        due = what_is_due(config, step, total_steps, loader.steps_per_epoch)
        if due.evaluate and not of_main(step in log.knn()) and not evaluate():
            raise Preempted(f"stopped by a signal before step {step + 1}; go on with --resume --out {log.out}")
        report.start_clock()
        while step < total_steps:
            lr = lr_at(step)
            views_png = log.out / "views.png" if step == 0 and log.main else None
            views = micro_batches(loader, training.plan.count, probe, views_png)
            report.add(step + 1, training.step(views, lr), lr)
            log.step = step = step + 1

            due = what_is_due(config, step, total_steps, loader.steps_per_epoch)
            stopping = stop.asked(step, world_size, accelerator.gather, device, waits=any(due))
            if any(due) or stopping:
                share_damaged(loader, log, config.skip_damaged)
                report.write(loader.take_wait_s(), training.z if due.log else None)
            evaluated = not due.evaluate or (not stopping and evaluate())
            stopping = stopping or not evaluated
            if due.save or stopping:
                save(config, recipe, log, training, loader, probe, processes=world_size, skipped=report.skipped)
            if due.evaluate or due.save:
                report.start_clock()
            if stopping and not (step == total_steps and evaluated):
                raise Preempted(f"stopped by a signal at step {step}; go on with --resume --out {log.out}")

        # The encoder
        path = log.out / "encoder" / "encoder.safetensors"
        if log.main:
            export(path.parent, training.encoder, config, recipe, step, dataset)
            log.status("done")
        report.end(str(path))
        end_training(accelerator)
        return path


# ---- processes and folder ------------------------------------------------------------------------------------------


def check_folder(out: Path | None, resume: bool) -> None:
    """Raise RunError where a run cannot start, or go on, in `out`."""
    if out is None:
        if resume:
            raise RunError("--resume needs --out, the run folder to go on in")
    elif out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file; give a folder with --out")
    elif out.exists() and not resume and not is_empty(out):
        raise RunError(f"{out} is not empty; go on with --resume, or give a new folder with --out")


def check_config(config: TrainConfig, world_size: int = 1) -> None:
    """Raises ValueError for what would be done in name only: sizes that are void, a tracker that is not installed."""
    check_contrast(config.batch_size, None if config.head == "none" else config.projection_dim)
    images = config.micro_batch or config.batch_size // world_size
    change = f"--micro-batch, or --batch-size for each of {world_size} processes"
    check_statistics(images * world_size if config.sync_bn else images, change)
    if config.track and config.track not in (there := list(map(str, get_available_trackers()))):
        # Accelerate would leave it out without a word
        raise RunError(f"--track {config.track} is not installed: pip install {config.track}. Installed: {there}")


def build_accelerator(config: TrainConfig) -> Accelerator:
    """The processes that were launched, on GPUs where there are any. ValueError where they do not see each other."""
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=config.precision,
        log_with=config.track or None,
        project_dir=".",  # the run folder, once it is known
        kwargs_handlers=[
            # a little more, for accelerate drops a value that equals its own default, and gloo then waits half an hour
            InitProcessGroupKwargs(timeout=RANKS_WAIT + timedelta(milliseconds=1)),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
        ],
    )
    check_launch(accelerator, "train.py")
    torch.backends.cudnn.benchmark = accelerator.device.type == "cuda"  # all shapes are fixed
    if config.sync_bn and accelerator.device.type != "cuda":
        raise RunError("--sync-bn needs GPUs: torch's SyncBatchNorm does not exchange statistics between CPU processes")
    return accelerator


@contextmanager
def open_run(
    out: Path | None, recipe: str, resume: bool, accelerator: Accelerator
) -> Iterator[tuple[Log, Saved | None]]:
    """The run folder, which this run alone may write, and the newest whole checkpoint in it if `resume`.

    status.json says how the block ends. RunError on all processes where another run has the folder.
    """

    out = of_main(out or next_free(Path("runs") / recipe))
    assert out is not None
    accelerator.project_configuration.project_dir = accelerator.project_configuration.logging_dir = str(out)
    with claim_for_all(out, accelerator.is_main_process, of_main) as holder:
        log = Log(out, accelerator.process_index, holder)
        with log.outcome(), naming_lost_ranks(accelerator.process_index, accelerator.num_processes):
            newest = newest_for_all(out / "checkpoints", accelerator) if resume else None
            saved = Saved(newest, checkpoint.read_state(newest)) if newest else None
            log.step = saved.state["step"] if saved else 0
            yield log, saved


def newest_for_all(folder: Path, accelerator: Accelerator) -> Path | None:
    """The newest whole checkpoint that the main process finds. RunError where another process does not see it."""
    newest, notes = checkpoint.latest_for_all(folder, accelerator.is_main_process, of_main)
    for note in notes:
        accelerator.print(note)
    if blind := gather_object([accelerator.process_index] if newest and not newest.is_dir() else []):
        raise RunError(
            f"rank {', '.join(map(str, blind))} does not see {newest}, where rank 0 goes on: --out must be a folder "
            "that all nodes share"
        )
    return newest


def of_main(value: Any) -> Any:
    """The main process's value, on all."""
    return broadcast_object_list([value])[0]


# ---- data, and what was left open ----------------------------------------------------------------------------------


def with_demo_data(config: TrainConfig, recipe: str, out: Path, accelerator: Accelerator) -> TrainConfig:
    """The demo makes its own data, in the run folder; RunError where another recipe has none."""
    if config.data:
        return config
    if recipe != "demo":
        raise RunError("--data is missing: a folder of shards, made by python tools/make_shards.py folder IMAGES OUT")
    if accelerator.is_main_process and not (out / "data").exists():
        write_demo(out / "data")
    accelerator.wait_for_everyone()
    return replace(config, data=str(out / "data/train"), eval_data=str(out / "data/test"))


def open_data(config: TrainConfig) -> tuple[Dataset, Dataset | None]:
    """The images to train on, and those to query kNN with. RunError where they do not go together."""
    dataset = read_dataset(config.data)
    queries = read_dataset(config.eval_data) if config.eval_data else None
    if queries:
        check_alike(dataset, queries)
    if config.knn_every and not queries:
        raise RunError("--knn-every needs --eval-data, labelled shards to query with")
    return dataset, queries


def settle(config: TrainConfig, dataset: Dataset, accelerator: Accelerator, saved: Saved | None) -> TrainConfig:
    """`config` with values for what was left open, but for what memory decides: as saved, else as the machine is.

    RunError where `saved` cannot go on with it; ValueError where the batch does not divide.
    """
    world_size, before = accelerator.num_processes, saved.config if saved else {}
    if saved and "loader" not in saved.extra:
        raise RunError(
            f"{saved.path} is of a version whose batches depended on the number of processes: finish the run with that "
            "version, or start anew with a new --out"
        )
    if accelerator.device.type == "cpu":
        config = replace(config, cpu_threads=config.cpu_threads or share_of_cores())
    if before and config.batch_size // world_size % before["micro_batch"] == 0:
        config = replace(config, micro_batch=config.micro_batch or before["micro_batch"])
    remote, num_shards = is_remote(dataset.tars_address), len(dataset.shards)
    config = replace(
        config,
        window=config.window or before.get("window") or min(WINDOW if remote else num_shards, num_shards),
        lanes=config.lanes or before.get("lanes") or (max(1, world_size // local_world_size()) if remote else 1),
    )
    if saved and (changed := checkpoint.differences(before, asdict(config), MAY_CHANGE)):
        raise RunError(
            f"{saved.path} cannot go on with other settings ({'; '.join(changed)}): give the old, or a new --out"
        )
    divide(
        dataset.samples,
        config.batch_size,
        world_size=world_size,
        micro_batch=config.micro_batch,
        lanes=config.lanes,
        address=dataset.address,
    )
    return config


def build_loader(
    config: TrainConfig,
    dataset: Dataset,
    device: torch.device,
    *,
    rank: int = 0,
    world_size: int = 1,
    half: bool = False,
) -> Loader:
    """The loader of one process of a run."""
    return Loader(
        dataset,
        config.views,
        config.batch_size,
        device,
        rank=rank,
        world_size=world_size,
        seed=config.seed,
        num_threads=config.num_threads or share_of_cores(),
        half=half,
        window=config.window,
        lanes=config.lanes or 1,
        micro_batch=config.micro_batch,
        second_views=config.second_views,
        skip_damaged=config.skip_damaged,
        timeout_s=config.data_timeout,
        cache=cache_for(
            dataset,
            config.cache,
            config.cache_gib,
            window=config.window,
            lanes=math.ceil(config.lanes * local_world_size() / world_size),
            patience_s=min(PATIENCE_S, 0.8 * config.data_timeout),  # so that the store's complaint comes first
        ),
    )


# ---- network, optimizer and loss -----------------------------------------------------------------------------------


def build_training(config: TrainConfig, accelerator: Accelerator) -> Training:
    """Network, optimizer, loss and the micro-batches that fit, all as `config` says; its seed becomes torch's."""
    device, world_size = accelerator.device, accelerator.num_processes
    group = dist.group.WORLD if world_size > 1 else None
    torch.manual_seed(config.seed)
    stem: Any = ("small" if config.views.size <= 64 else "standard") if config.stem == "auto" else config.stem
    encoder = build_encoder(config.depth, width=config.width, stem=stem, selective_kernel=config.selective_kernel)
    head = ProjectionHead(encoder.num_features, kind=config.head, out_features=config.projection_dim)
    network = SimCLR(encoder, head).to(device).to(memory_format=torch.channels_last)
    if config.sync_bn:
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    model = accelerator.prepare(network)
    groups = param_groups(network, config.weight_decay)
    peak_lr = scaled_lr(config.base_lr, config.batch_size, config.lr_scaling)
    optimizer = build_optimizer(config.optimizer, groups, lr=peak_lr, momentum=config.momentum)
    half = device.type == "cuda" and config.precision != "no"
    images = max(1, config.batch_size // world_size)
    size = config.views.size
    memory_plan = plan(
        network,
        images,
        torch.empty(1, 3, size, size, dtype=torch.half if half else torch.float, device=device),
        micro_batch=config.micro_batch,
        keep=config.keep_graphs,
        agree=lambda number: int(accelerator.gather(torch.tensor([number], device=device)).min()),
    )
    if config.compile == "on":  # in place, around DDP, which splits the graph at its buckets; names in state dicts stay
        model.compile(dynamic=False)
    loss = ": ".join(
        choose_loss(config.loss, device, rows=2 * images, dim=head.out_features, temperature=config.temperature)
    )
    loss_of = functools.partial(nt_xent, temperature=config.temperature, group=group, impl=config.loss)
    nothing = torch.empty(0, device=device)
    return Training(encoder, network, model, optimizer, peak_lr, memory_plan, loss_of, loss, half, nothing)


def build_probe(
    config: TrainConfig, training: Training, dataset: Dataset, accelerator: Accelerator
) -> OnlineProbe | None:
    """The linear probe of the main process; None on others, without labels, or where none is wanted."""
    if not config.online_probe or not dataset.classes or not accelerator.is_main_process:
        return None
    return OnlineProbe(training.encoder, len(dataset.classes), accelerator.device)


# ---- starting and going on -----------------------------------------------------------------------------------------


def go_on(saved: Saved | None, training: Training, loader: Loader, probe: OnlineProbe | None) -> tuple[int, int]:
    """Put everything where the checkpoint left it: (steps done, steps skipped in a row up to there)."""
    if not saved:
        return 0, 0
    loader.load_state_dict(saved.extra["loader"])
    step, _ = checkpoint.load(
        saved.path, model=training.network, optimizer=training.optimizer, probe=probe.linear if probe else None
    )
    return step, saved.extra.get("skipped_in_a_row", 0)


def start_tracker(config: TrainConfig, accelerator: Accelerator) -> Callable[[dict[str, Any], int], None] | None:
    """What logs (values, step), if a tracker is wanted."""
    if not config.track:
        return None
    values = {k: str(v) for k, v in asdict(config).items()}
    tracking(accelerator, lambda: accelerator.init_trackers("swiftclr", config=values))
    return lambda values, step: tracking(accelerator, lambda: accelerator.log(values, step=step))


def end_training(accelerator: Accelerator) -> None:
    """Close the tracker and the process group."""
    tracking(accelerator, lambda: [tracker.finish() for tracker in accelerator.trackers])
    accelerator.trackers = []
    accelerator.end_training()


def tracking(accelerator: Accelerator, call: Callable[[], object]) -> None:
    """Do something with the tracker. One that fails, as without a network, is named once and then left alone.

    A run of days does not end for its curves: metrics.jsonl has them too.
    """
    try:
        call()
    except Exception as error:  # trackers raise what they like
        accelerator.trackers = []
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        accelerator.print(f"note: the tracker failed and gets no more values, only metrics.jsonl does ({said})")


def changed_sums(saved: Saved | None, config: TrainConfig, world_size: int) -> list[str]:
    """What makes a resumed run's numbers differ from those of one that was not interrupted, though not its images."""
    if not saved:
        return []
    notes, before, processes = [], saved.config, saved.extra["processes"]
    images, were = config.micro_batch, before["micro_batch"]
    if config.sync_bn:
        images, were = images * world_size, were * processes
    if images != were:
        notes.append(f"BatchNorm's statistics are of {images} images at a time, {were} before")
    if (world_size, config.cpu_threads) != (processes, before["cpu_threads"]):
        now, then = (
            f"{processes} process(es)" + (f" with {threads} threads" if threads else "")
            for processes, threads in ((world_size, config.cpu_threads), (processes, before["cpu_threads"]))
        )
        notes.append(f"sums are made by {now}, by {then} before: the last bits differ")
    return notes


def describe_processes(config: TrainConfig, accelerator: Accelerator) -> str:
    device = accelerator.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return (
        f"{accelerator.num_processes} on {where}, precision {accelerator.mixed_precision}, "
        f"{'compiled' if config.compile == 'on' else 'eager'}, DALI threads {config.num_threads or share_of_cores()}"
    )


def facts(config: TrainConfig, dataset: Dataset, queries: Dataset | None) -> dict[str, Any]:
    """config.json: the command, the resolved settings and, where kNN is asked for, how many neighbours vote in it."""
    votes = {"knn_k": neighbours(KNN_K, min(KNN_BANK, dataset.samples))} if queries else {}
    return {"command": shlex.join(["train.py", *sys.argv[1:]]), **asdict(config), **votes}


def describe_votes(bank: Dataset, queries: Dataset | None) -> str:
    images = min(KNN_BANK, bank.samples)
    return f"the {neighbours(KNN_K, images)} nearest of {images} images vote" if queries else "off"


def describe_probe(config: TrainConfig, dataset: Dataset, saved: Saved | None) -> str:
    if not dataset.classes:
        return "none without labels"
    if not config.online_probe:
        return "off"
    anew = saved and not (saved.path / "probe.safetensors").exists()
    return f"linear, of {len(dataset.classes)} classes" + (", from nothing: the checkpoint has none" if anew else "")


def settings(config: TrainConfig, origin: Mapping[str, str]) -> str:
    """The configuration in one line; values that do not come from the recipe say where from."""
    flat = asdict(config)
    for views in ("views", "second_views"):
        flat |= {f"{views}.{name}": value for name, value in (flat.pop(views) or {}).items()}
    return ", ".join(f"{k}={v}" + (f" ({origin[k]})" if k in origin else "") for k, v in flat.items() if v != "")


# ---- the loop's parts ----------------------------------------------------------------------------------------------


class Due(NamedTuple):
    """What follows a step."""

    log: bool
    save: bool
    evaluate: bool


def what_is_due(config: TrainConfig, step: int, total_steps: int, steps_per_epoch: int) -> Due:
    last, knn_steps = step == total_steps, config.knn_every * steps_per_epoch
    return Due(
        log=last or step % config.log_every == 0,
        save=last or step % config.checkpoint_every == 0,
        evaluate=bool(config.eval_data) and (last or step == 0 or (knn_steps > 0 and step % knn_steps == 0)),
    )


def micro_batches(loader: Loader, count: int, probe: OnlineProbe | None, views_png: Path | None) -> Iterator[Tensor]:
    """The views of one batch, part by part; the probe learns from each, and some of the first are drawn."""
    for i in range(count):
        batch = next(loader)
        if views_png and i == 0:
            save_grid(batch.views, loader.views, views_png)
        yield batch.views
        if probe and batch.labels is not None:  # the next one is only asked for when this one is encoded
            try:
                probe.learn(batch.labels, 1 / count)
            except ValueError as error:
                raise RunError(str(error)) from error


def save_grid(views: Tensor, config: ViewConfig, path: Path) -> None:
    """A PNG of up to eight images, their two views side by side."""
    n = len(views) // 2
    pairs = torch.stack([views[: min(n, 8)], views[n : n + min(n, 8)]], 1).flatten(0, 1)
    with replacing(path) as partial:
        save_image(make_grid(config.pixels(pairs.cpu()), nrow=4), partial, format="png")


def share_damaged(loader: Loader, log: Log, most: int) -> None:
    """Tell all processes which samples were replaced, and name new ones in damaged.jsonl. LoaderError above `most`."""
    if not most:
        return
    for damaged in gather_object([loader.damaged]):
        loader.learn(damaged)
    damaged, address, file = loader.damaged, loader.dataset.address, log.out / "damaged.jsonl"
    if log.main:
        log.damaged([(*loader.reader.where(sample), problem) for sample, problem in sorted(damaged.items())])
    if len(damaged) > most:
        raise LoaderError(
            f"{len(damaged)} samples of {address} are damaged, more than --skip-damaged {most}. {file} names them; "
            f"`python tools/make_shards.py quarantine {address} --from {file}` leaves them out"
        )


# ---- evaluating, saving, exporting ---------------------------------------------------------------------------------


def knn_accuracy(
    config: TrainConfig, encoder: Encoder, bank: Dataset, queries: Dataset, accelerator: Accelerator, stop: Stop
) -> float | None:
    """Weighted kNN top-1 (KNN_K, temperature 0.1) of `queries`; every process encodes a part, all get the result.

    None on all of them if one was asked to stop meanwhile.
    """
    device, processes, parts = accelerator.device, accelerator.num_processes, []
    together = functools.partial(stop.together, processes=processes, gather=accelerator.gather, device=device)
    # a process that is asked to stop tells the others between two batches, which on a CPU must not take long
    batch_size = EVAL_BATCH if device.type == "cuda" else max(1, min(EVAL_BATCH, 2**21 // config.views.size**2))
    if accelerator.num_processes > 1:
        for buffer in encoder.buffers():  # one encoder for all: the running statistics that are saved and exported
            dist.broadcast(buffer, 0)
    for dataset in (bank, queries):
        batches = build_eval_loader(
            dataset,
            config.views,
            batch_size,
            device,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            num_threads=config.num_threads or share_of_cores(),
            samples=KNN_BANK,
        )
        shared = min(KNN_BANK, dataset.samples) // processes // batch_size  # batches that all have
        with accelerator.autocast():
            encoded = together(functools.partial(features, encoder, device=device), batches, shared)
        if encoded is None:
            return None
        parts += [gathered_rows(accelerator, rows) for rows in encoded]
    num_classes = len(bank.classes or ())
    with torch.no_grad():
        return together(lambda _: knn(*parts, k=KNN_K, num_classes=num_classes, device=device))


def save(
    config: TrainConfig,
    recipe: str,
    log: Log,
    training: Training,
    loader: Loader,
    probe: OnlineProbe | None,
    *,
    processes: int,
    skipped: int,
) -> None:
    """A checkpoint of the last step, by the main process: BatchNorm's running statistics are its own."""
    if log.main:
        try:
            checkpoint.save(
                log.out / "checkpoints",
                log.step,
                model=training.network,
                optimizer=training.optimizer,
                extra={
                    "config": asdict(config),
                    "processes": processes,
                    "recipe": recipe,
                    "loader": loader.state_dict(),
                    "skipped_in_a_row": skipped,
                },
                keep=config.keep,
                probe=probe.linear if probe else None,
            )
        except checkpoint.NotFiniteError as error:  # training broke the weights before any loss showed it
            raise FloatingPointError(f"{error}. Lower --base-lr, and start anew") from error
    log.status("running")


def export(folder: Path, encoder: Encoder, config: TrainConfig, recipe: str, steps: int, dataset: Dataset) -> None:
    """encoder.safetensors with what its metadata say of preprocessing and training; the paths of this machine stay."""
    kept = {name: value for name, value in asdict(config).items() if name not in MAY_CHANGE}
    export_encoder(
        folder,
        encoder,
        image_size=config.views.size,
        mean=config.views.mean,
        std=config.views.std,
        interpolation={"linear": "bilinear", "cubic": "bicubic"}[config.views.interpolation],
        crop_pct=config.views.eval_crop,
        training={"recipe": recipe, "steps": steps, "dataset": dataset.fingerprint, "config": kept},
    )


if __name__ == "__main__":
    app()
