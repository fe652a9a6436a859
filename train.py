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
"""

import ctypes
import functools
import inspect
import itertools
import math
import os
import resource
import shlex
import signal
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_args, get_type_hints

import typer

from model.run_folder import FolderError, Log, Preempted, claim, is_empty, replacing
from pipeline.views import VIEWS, ViewConfig, make_views, parse_changes
from tools import one_message

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import Tensor, nn

    from model.encoder import Encoder
    from model.large_batch import Plan
    from model.simclr import SimCLR
    from pipeline.cache import Cache
    from pipeline.shards import Dataset

KNN_BANK = 100_000  # samples that vote in the kNN of a running training, from all over the data set
EVAL_BATCH = 512
WINDOW = 16  # shards that are mixed together where they have to be fetched; they are shuffled when written
VIEW_TABLES = ("views", "second_views")  # fields of TrainConfig and tables of a file, changed by --view, --second-view


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a run. The texts are the command line's help."""

    data: Annotated[str, "Folder of shards to train on; the demo makes its own."] = ""
    eval_data: Annotated[str, "Folder of labelled shards to query kNN with; `data` is the bank."] = ""
    views: ViewConfig = field(default_factory=ViewConfig)
    second_views: ViewConfig | None = None  # of the second view of each image; None: as `views`

    depth: Annotated[int, "ResNet depth: 18, 34, 50, 101 or 152."] = 50
    width: Annotated[float, "Multiplies every channel: 1, 2 or 4 in the paper."] = 1.0
    stem: Annotated[
        Literal["auto", "standard", "small"], "First layers; auto is small (3x3, no pooling) up to 64 px."
    ] = "auto"
    selective_kernel: Annotated[bool, "SimCLRv2's selective kernels and ResNet-D, from depth 50 on."] = False
    head: Annotated[
        Literal["none", "linear", "nonlinear", "nonlinear3"], "Projection head; the paper's is nonlinear."
    ] = "nonlinear"
    projection_dim: Annotated[int, "Columns of z."] = 128

    batch_size: Annotated[int, "Images per step over all processes."] = 4096
    micro_batch: Annotated[
        int,
        "Images a process encodes at once; the loss is over all. 0: as many as fit a GPU, on a CPU the whole batch.",
    ] = 0
    epochs: Annotated[int, "Passes over the data; decides the learning rate schedule."] = 100
    steps: Annotated[int, "Train this many steps instead of `epochs`; 0: not."] = 0
    temperature: Annotated[float, "Temperature of NT-Xent."] = 0.1
    loss: Annotated[Literal["auto", "triton", "chunked", "reference"], "Implementation of NT-Xent."] = "auto"
    optimizer: Annotated[Literal["lars", "sgd", "adamw"], "LARS is the paper's."] = "lars"
    base_lr: Annotated[float, "Learning rate before scaling with the batch."] = 0.3
    lr_scaling: Annotated[
        Literal["linear", "sqrt", "none"], "Peak: base_lr x batch_size / 256, x sqrt(batch_size), or as it is."
    ] = "linear"
    warmup_epochs: Annotated[float, "Epochs of linear warm-up."] = 10.0
    momentum: Annotated[float, "Momentum of LARS and SGD."] = 0.9
    weight_decay: Annotated[float, "Not applied to norms and biases."] = 1e-6
    precision: Annotated[Literal["bf16", "no"], "Mixed precision of encoder and head."] = "bf16"
    compile: Annotated[
        Literal["auto", "on", "off"], "torch.compile the network; auto: not, for no record has it ahead by enough."
    ] = "auto"
    sync_bn: Annotated[bool, "BatchNorm statistics over all GPUs, as the paper; costs time."] = False
    seed: Annotated[int, "Of weights, order and views."] = 0

    cpu_threads: Annotated[int, "torch's threads per process on CPUs; 0: its share of the cores."] = 0
    num_threads: Annotated[int, "DALI's threads per process; 0: its share of the cores."] = 0
    window: Annotated[
        int, "Shards whose samples are mixed together. 0: all of them; from object storage 16, fetched ahead."
    ] = 0
    lanes: Annotated[
        int,
        "Streams that share out the shards, so that a node fetches its own alone. 0: 1; in object storage one a node.",
    ] = 0
    cache: Annotated[str, "Folder for shards from object storage. (default: ~/.cache/swiftclr)"] = ""
    cache_gib: Annotated[float, "Most that the cache may hold, in GiB."] = 100.0
    skip_damaged: Annotated[
        int, "Replace up to so many damaged samples by others, named in damaged.jsonl; 0: the first one ends the run."
    ] = 0
    keep_graphs: Annotated[
        int, "Micro-batches encoded once and not twice, for their memory. 0: as many as fit a GPU, on a CPU one."
    ] = 0
    max_skipped: Annotated[
        int, "End the run after so many steps in a row that were skipped because the gradient was not finite."
    ] = 10
    log_every: Annotated[int, "Steps between log lines."] = 10
    checkpoint_every: Annotated[int, "Steps between checkpoints; the last step always makes one."] = 500
    keep: Annotated[int, "Newest checkpoints kept."] = 2
    knn_every: Annotated[int, "Epochs between kNN evaluations; 0: only before and after."] = 0
    online_probe: Annotated[
        bool, "Train a linear classifier beside the encoder, which does not notice; without labels there is none."
    ] = True
    track: Annotated[str, "Also log to a tracker of Accelerate, such as tensorboard or wandb."] = ""

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "log_every", "checkpoint_every", "keep", "projection_dim", "max_skipped"):
            if not getattr(self, name) >= 1:  # so that NaN fails too
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("temperature", "width", "cache_gib"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")
        for name in (
            "steps",
            "base_lr",
            "warmup_epochs",
            "weight_decay",
            "seed",
            "micro_batch",
            "cpu_threads",
            "num_threads",
            "keep_graphs",
            "knn_every",
            "window",
            "lanes",
            "skip_damaged",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum: expected at least 0 and less than 1, got {self.momentum}")


# What may change when a run resumes: it touches neither which images stand in a batch, nor their views, nor the recipe.
FREE = frozenset(
    {"num_threads", "log_every", "checkpoint_every", "keep", "track", "data", "eval_data", "knn_every"}
    | {"keep_graphs", "max_skipped", "online_probe", "skip_damaged", "cache", "cache_gib"}
    | {"micro_batch", "cpu_threads"}  # `changed_sums` says what that does
)

RECIPES: dict[str, TrainConfig] = {
    # Embedded drawings. Ours, tuned to show a plain gain within minutes on a CPU: kNN from about 23 % to about 80 %.
    # It says nothing about the method: kNN on the bare pixels of these drawings gives 54 %.
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
    # weight decay 1e-4, temperature 0.5, half the colour strength, no blur; linear evaluation about 91 %.
    "cifar10": TrainConfig(
        views=VIEWS["cifar"],
        depth=18,
        batch_size=512,
        epochs=1000,
        temperature=0.5,
        base_lr=1.0,
        weight_decay=1e-4,
    ),
    # Ours: the paper has no STL-10. ImageNet's views at 96 px with the CIFAR schedule; published ResNet-18 runs of
    # 500 epochs reach 81 % linear with 500 labels per class.
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
    # temperature 0.1; linear evaluation 64.5 %. Below batch 4096 use --lr-scaling sqrt --base-lr 0.075 (appendix B.1).
    "imagenet": TrainConfig(views=VIEWS["imagenet"]),
}


class RunError(ValueError):
    """The caller's options, data or run folder cannot be used; the message says what to do."""


# ---- the step and the loop -----------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What a step came to: () float32 tensors, still on their device, so that nothing waits for them."""

    loss: "Tensor"  # of this process's rows
    skipped: "Tensor"  # 1 if the gradient was not finite and nothing changed, else 0; the same on all processes
    source: "Tensor"  # 1 if this process's own z was not finite, else 0; the loss carries that to all processes


def train_step(
    model: "nn.Module",
    optimizer: "torch.optim.Optimizer",
    micro_batches: "Iterable[Tensor]",
    loss_of: "Callable[[Tensor], Tensor]",
    lr: float,
    *,
    count: int = 1,
    keep: int = 1,
    offload: bool = False,
) -> Outcome:
    """One update from `count` micro-batches of views (2m, 3, S, S), or none if its gradient is not finite.

    optimizer from `build_optimizer`; the rest as in `model.large_batch.backward`.
    """
    import torch

    from model.large_batch import Statistics, backward

    before = Statistics(model)
    loss, z = backward(model, micro_batches, loss_of, count=count, keep=keep, offload=offload)
    # The gradients have been averaged over the processes, so all see the same norm and decide alike.
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    skipped = ~torch.nn.utils.get_total_norm(grads).isfinite()
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad()
    before.restore(where=skipped)
    return Outcome(loss.float(), skipped.float(), (~z.isfinite().all()).float())


def build_optimizer(
    name: Literal["lars", "sgd", "adamw"], groups: list[dict[str, Any]], *, lr: float, momentum: float
) -> "torch.optim.Optimizer":
    """An optimizer whose step changes nothing where its `found_inf`, a () tensor, is 1."""
    import torch

    from model.lars import LARS

    if name == "lars":
        return LARS(groups, lr=lr, momentum=momentum)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=True)
    sgd = torch.optim.SGD(groups, lr=lr, momentum=momentum, fused=True)
    if momentum:
        for param in (param for group in sgd.param_groups for param in group["params"]):
            # torch makes them in the first step without filling them, and leaves them so if that is skipped
            sgd.state[param]["momentum_buffer"] = torch.zeros_like(param)
    return sgd


class Setup(NamedTuple):
    """What a configuration trains, on this process's device."""

    encoder: "Encoder"
    network: "SimCLR"  # encoder and head
    model: "nn.Module"  # network as the processes share it
    optimizer: "torch.optim.Optimizer"
    peak_lr: float
    plan: "Plan"
    dim: int  # columns of z
    loss_of: "Callable[[Tensor], Tensor]"
    half: bool  # views are float16
    compiled: bool


def local_world_size() -> int:
    """Processes that were launched on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def share_of_cores() -> int:
    """Of this process among those that were launched on this machine."""
    return max(1, len(os.sched_getaffinity(0)) // local_world_size())


def shard_cache(config: TrainConfig, dataset: "Dataset", world_size: int) -> "Cache | None":
    """Where shards from object storage are kept, None for those on a disk. RunError where two windows have no room."""
    from pipeline.cache import Cache, default_cache_folder
    from pipeline.store import is_remote

    if not is_remote(dataset.tars_address):
        return None
    lanes = math.ceil(config.lanes * local_world_size() / world_size)  # of this node
    window = sum(sorted(shard.bytes for shard in dataset.shards)[-config.window :])
    if (needed := 2 * lanes * window / 2**30) > config.cache_gib:
        raise RunError(
            f"--cache-gib {config.cache_gib:g} is too little for the shards in use and the next ones: windows of "
            f"{config.window} shards, two of each of this node's {lanes} lane(s), take up to {needed:.3g} GiB. Allow "
            "more, or lower --window"
        )
    return Cache(Path(config.cache) if config.cache else default_cache_folder(), int(config.cache_gib * 2**30))


def changed_sums(before: Mapping[str, Any], config: TrainConfig, world_size: int) -> list[str]:
    """What makes the numbers of a resumed run differ from those of one that was not interrupted, though not its images.

    before  the configuration in the checkpoint with its number of processes, or nothing.
    """
    notes = []
    if before:
        images, were = config.micro_batch, before["micro_batch"]
        if config.sync_bn:
            images, were = images * world_size, were * before["processes"]
        if images != were:
            notes.append(f"BatchNorm's statistics are of {images} images at a time, {were} before")
        if (world_size, config.cpu_threads) != (before["processes"], before["cpu_threads"]):
            now, then = (
                f"{processes} process(es)" + (f" with {threads} threads" if threads else "")
                for processes, threads in (
                    (world_size, config.cpu_threads),
                    (before["processes"], before["cpu_threads"]),
                )
            )
            notes.append(f"sums are made by {now}, by {then} before: the last bits differ")
    return notes


def build_accelerator(config: TrainConfig) -> "Accelerator":
    """The processes that were launched, on GPUs where there are any. RunError where they do not see each other."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=config.precision,
        log_with=config.track or None,
        project_dir=".",  # the run folder, once it is known
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(minutes=10)),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
        ],
    )
    if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", 1)):
        raise RunError(
            f"the launcher started {os.environ['WORLD_SIZE']} processes, but each sees {accelerator.num_processes}; on "
            "CPUs use accelerate launch --multi_gpu --num_processes N train.py ..."
        )
    torch.backends.cudnn.benchmark = accelerator.device.type == "cuda"  # all shapes are fixed
    if config.sync_bn and accelerator.device.type != "cuda":
        raise RunError("--sync-bn needs GPUs: torch's SyncBatchNorm does not exchange statistics between CPU processes")
    return accelerator


def build_training(config: TrainConfig, accelerator: "Accelerator") -> Setup:
    """Network, optimizer, loss and the micro-batches that fit, all as `config` says; its seed becomes torch's."""
    import torch
    import torch.distributed as dist
    from torch import Tensor, nn

    from model.encoder import build_encoder
    from model.large_batch import plan
    from model.lars import param_groups
    from model.nt_xent import nt_xent
    from model.schedule import scaled_lr
    from model.simclr import ProjectionHead, SimCLR

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
    peak = scaled_lr(config.base_lr, config.batch_size, config.lr_scaling)
    optimizer = build_optimizer(config.optimizer, groups, lr=peak, momentum=config.momentum)
    half = device.type == "cuda" and config.precision != "no"
    whole = plan(
        network,
        max(1, config.batch_size // world_size),
        torch.empty(
            1, 3, config.views.size, config.views.size, dtype=torch.half if half else torch.float, device=device
        ),
        micro_batch=config.micro_batch,
        keep=config.keep_graphs,
        agree=lambda number: int(accelerator.gather(torch.tensor([number], device=device)).min()),
    )
    # auto is off: channels_last in benchmarks/records/step.csv (ResNet-18 on a CPU) has compile 4 % behind in fp32 and
    # 10 % ahead in bf16, which has to earn the minutes of compiling first; on a GPU nothing is recorded.
    compiled = config.compile == "on"
    if compiled:  # in place, around DDP, which splits the graph at its buckets; names in state dicts stay
        model.compile(dynamic=False)

    def loss_of(z: Tensor) -> Tensor:
        return nt_xent(z, config.temperature, group=group, impl=config.loss)

    return Setup(encoder, network, model, optimizer, peak, whole, head.out_features, loss_of, half, compiled)


@contextmanager
def leaving_the_group() -> Iterator[None]:
    """End the process group when the run ends, however it does.

    A process whose gloo threads still listen when the main process has gone may abort. Collectives on GPUs that a
    failed process left open would be waited for; there torch ends the group with the process.
    """
    import torch.distributed as dist

    try:
        yield
    except (RunError, Preempted):  # on all processes at once
        if dist.is_initialized():
            dist.destroy_process_group()
        raise
    except BaseException:
        if dist.is_initialized() and dist.get_backend() == "gloo":
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
    from accelerate.utils import broadcast_object_list

    stop = Stop()
    if out is not None and out.exists():
        if not out.is_dir():
            raise RunError(f"{out} is a file; give a folder with --out")
        if not resume and not is_empty(out):
            raise RunError(f"{out} is not empty; go on with --resume, or give a new folder with --out")
    if resume and out is None:
        raise RunError("--resume needs --out, the run folder to go on in")
    accelerator = build_accelerator(config)
    out = broadcast_object_list([out or next_free(Path("runs") / recipe)])[0]
    assert out is not None
    accelerator.project_configuration.project_dir = accelerator.project_configuration.logging_dir = str(out)
    with one_writer(accelerator, out) as holder:
        log = Log(out, accelerator.process_index, holder)
        with log.outcome():
            newest = newest_of_all(accelerator, out / "checkpoints") if resume else None
            return _train(config, accelerator, newest, log, stop, recipe, origin or {})


@contextmanager
def one_writer(accelerator: "Accelerator", out: Path) -> Iterator[str]:
    """The main process claims the run folder; yields the claim's holder. RunError on all where another run has it."""
    from accelerate.utils import broadcast_object_list

    with ExitStack() as stack:
        holder, refusal = "", ""
        if accelerator.is_main_process:
            try:
                holder = stack.enter_context(claim(out)).holder
            except FolderError as error:
                refusal = str(error)
        holder, refusal = broadcast_object_list([(holder, refusal)])[0]
        if refusal:
            raise RunError(refusal)
        yield holder


def newest_of_all(accelerator: "Accelerator", folder: Path) -> Path | None:
    """The newest whole checkpoint that the main process finds, for all processes; it prints what is wrong with newer.

    RunError where there are some and none is whole, or where a process does not see the chosen one.
    """
    from accelerate.utils import broadcast_object_list, gather_object

    from model.checkpoint import DamagedError, latest_whole

    newest, refusal = None, ""
    if accelerator.is_main_process:
        try:
            newest, faults = latest_whole(folder)
            for fault in faults:
                accelerator.print(f"{fault}: passed over, going on from {newest}")
        except DamagedError as error:
            refusal = f"{error}. Put back a copy of one, or start anew with a new --out"
    newest, refusal = broadcast_object_list([(newest, refusal)])[0]
    if refusal:
        raise RunError(refusal)
    if blind := gather_object([accelerator.process_index] if newest and not newest.is_dir() else []):
        raise RunError(
            f"rank {', '.join(map(str, blind))} does not see {newest}, where rank 0 goes on: --out must be a folder "
            "that all nodes share"
        )
    return newest


def _train(
    config: TrainConfig,
    accelerator: "Accelerator",
    newest: Path | None,
    log: Log,
    stop: "Stop",
    recipe: str,
    origin: Mapping[str, str],
) -> Path:
    """`train` in the run folder of `log`, from checkpoint `newest` on."""
    import torch
    from accelerate.utils import gather_object
    from torch import Tensor

    from model import checkpoint
    from model.monitor import OnlineProbe, contrast
    from model.nt_xent import resolve
    from model.schedule import learning_rate, warmup_steps
    from pipeline.loader import Loader, LoaderError
    from pipeline.shards import read_dataset
    from pipeline.store import is_remote

    out, main, cuda = log.out, accelerator.is_main_process, torch.cuda.is_available()
    world_size, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device
    found: dict[str, Any] = checkpoint.read_state(newest) if newest else {"step": 0, "extra": None}
    log.step, saved = found["step"], found["extra"]

    # Data
    if not config.data:
        if recipe != "demo":
            raise RunError(
                "--data is missing: a folder of shards, made by python tools/make_shards.py folder IMAGES OUT"
            )
        if main and not (out / "data").exists():
            from pipeline.demo import write_demo

            write_demo(out / "data")
        accelerator.wait_for_everyone()
        config = replace(config, data=str(out / "data/train"), eval_data=str(out / "data/test"))
    dataset = read_dataset(config.data)
    queries = read_dataset(config.eval_data) if config.eval_data else None
    if queries and (not dataset.labelled or dataset.classes != queries.classes):
        raise RunError(f"kNN needs labels, of the same classes in {config.data} and {config.eval_data}")
    if config.knn_every and not queries:
        raise RunError("--knn-every needs --eval-data, labelled shards to query with")
    cores = share_of_cores()
    num_threads = config.num_threads or cores
    if not cuda:  # the launcher sets OMP_NUM_THREADS=1; sums depend on the number, so a resumed run must have the same
        config = replace(config, cpu_threads=config.cpu_threads or cores)
        torch.set_num_threads(config.cpu_threads)
    before: dict[str, Any] = {"processes": saved.get("processes"), **saved["config"]} if saved else {}
    if saved:
        if "loader" not in saved:
            raise RunError(
                f"{newest} is of a version whose batches depended on the number of processes: finish the run with that "
                "version, or start anew with a new --out"
            )
        # Left open, the micro-batch stays what it was, however much memory there is now.
        fits = config.batch_size // world_size % before["micro_batch"] == 0
        config = replace(config, micro_batch=config.micro_batch or (before["micro_batch"] if fits else 0))
    remote, num_shards = is_remote(dataset.tars_address), len(dataset.shards)
    config = replace(
        config,
        window=config.window or before.get("window") or min(WINDOW if remote else num_shards, num_shards),
        lanes=config.lanes or before.get("lanes") or (max(1, world_size // local_world_size()) if remote else 1),
    )
    if changed := checkpoint.differences(saved["config"], asdict(config), FREE) if saved else []:
        raise RunError(
            f"{newest} cannot go on with other settings ({'; '.join(changed)}): give the old, or a new --out"
        )

    loader_of = functools.partial(
        Loader,
        dataset,
        config.views,
        config.batch_size,
        device,
        rank=rank,
        world_size=world_size,
        seed=config.seed,
        num_threads=num_threads,
        window=config.window,
        lanes=config.lanes,
        second_views=config.second_views,
        skip_damaged=config.skip_damaged,
        cache=shard_cache(config, dataset, world_size),
    )
    loader_of(micro_batch=config.micro_batch)  # a batch that does not divide is refused before a GPU is asked what fits

    # Model
    setup = build_training(config, accelerator)
    encoder, network, model, optimizer = setup.encoder, setup.network, setup.model, setup.optimizer
    whole, half, peak, loss_of = setup.plan, setup.half, setup.peak_lr, setup.loss_of
    config = replace(config, micro_batch=whole.micro_batch)  # BatchNorm's statistics depend on it
    loader = loader_of(half=half, micro_batch=config.micro_batch)
    total_steps = config.steps or config.epochs * loader.steps_per_epoch
    warmup = min(warmup_steps(config.warmup_epochs, dataset.samples, config.batch_size), total_steps)
    rows = 2 * loader.local_batch_size
    impl = resolve(config.loss, device, rows=rows, dim=setup.dim, temperature=config.temperature)

    num_classes = len(dataset.classes or ()) if config.online_probe else 0
    probe = OnlineProbe(encoder, num_classes, device) if num_classes and main else None
    linear = probe.linear if probe else None
    anew = probe and newest and not (newest / "probe.safetensors").exists()

    # Start, or go on
    step = 0
    in_a_row = 0  # skipped steps up to here
    if newest and saved:
        loader.load_state_dict(saved["loader"])
        step, _ = checkpoint.load(newest, model=network, optimizer=optimizer, probe=linear)
        in_a_row = saved.get("skipped_in_a_row", 0)
    if config.track:
        accelerator.init_trackers("swiftclr", config={k: str(v) for k, v in asdict(config).items()})
    if newest and main:
        log.notes += [f"a damaged checkpoint is now {path}" for path in checkpoint.set_aside_newer(newest)]
        if checkpoint.OWN_HASH not in found:
            log.notes.append(f"{newest / 'state.json'} is an earlier version's: no hash tells whether it is as written")
    log.start({"command": shlex.join(["train.py", *sys.argv[1:]]), **asdict(config)}, step)
    where = torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads"
    accelerator.print(
        f"swiftclr {recipe}: {out}, step {step} of {total_steps}\n"
        f"  processes  {world_size} on {where}, precision {accelerator.mixed_precision}, "
        f"{'compiled' if setup.compiled else 'eager'}, DALI threads {num_threads}\n"
        f"  data       {config.data}: {dataset.samples} samples in {len(dataset.shards)} shards\n"
        f"  batch      {config.batch_size} images, {loader.local_batch_size} per process"
        + (f" in {whole.count} micro-batches of {whole.micro_batch}" if whole.count > 1 else "")
        + (f", {whole.count - whole.keep} of them encoded twice" if whole.count > whole.keep else "")
        + (", waiting on the host" if whole.offload else "")
        + f"; {loader.steps_per_epoch} steps per epoch, learning rate to {peak:.4g} in {warmup} steps\n"
        f"  loss       {impl[0]}: {impl[1]}\n"
        f"  probe      "
        + (f"linear, of {num_classes} classes" if num_classes else "off" if dataset.classes else "none without labels")
        + (", from nothing: the checkpoint has none" if anew else "")
        + "\n"
        f"  settings   {settings(config, origin)}"
        + "".join(f"\n  note       {note}" for note in [*log.notes, *changed_sums(before, config, world_size)])
    )
    pending: list[tuple[int, Outcome, float]] = []
    last_z = torch.empty(0)
    clock = Clock(step)

    def watched_loss(z: Tensor) -> Tensor:
        nonlocal last_z
        last_z = z.detach()
        return loss_of(z)

    def monitor() -> dict[str, float | None]:
        """How the main process's first views of the last step do among the second views of all, and its probe."""
        first, second = last_z.chunk(2)
        second = accelerator.gather(second)  # the main process's come first
        if not main:
            return {}
        values = contrast(first, second, config.temperature)
        if probe:
            values["probe_accuracy"] = probe.accuracy()
        numbers = torch.stack(list(values.values())).tolist()
        return {name: x if math.isfinite(x) else None for name, x in zip(values, numbers, strict=True)}

    def flush(monitored: Mapping[str, float | None]) -> None:
        """Write what has happened since the last flush; the one place where the host waits for the device."""
        nonlocal in_a_row
        outcomes = torch.stack([torch.stack(outcome) for _, outcome, _ in pending])
        table = accelerator.gather(outcomes[None]).cpu()  # (processes, steps, Outcome)
        rows: list[dict[str, Any]] = []
        for (at, _, lr), loss, skipped in zip(pending, table[..., 0].mean(0).tolist(), table[0, :, 1], strict=True):
            rows.append({"step": at, "loss": loss if math.isfinite(loss) else None, "lr": lr})
            in_a_row = in_a_row + 1 if skipped else 0
            if skipped:
                rows[-1]["skipped"] = in_a_row
        pending.clear()
        rows[-1] |= monitored
        log.metrics(rows)
        share_damaged()
        if broken := [row["step"] for row in rows if row.get("skipped", 0) >= config.max_skipped]:
            ranks = table[..., 2].any(1).nonzero().flatten().tolist()
            where = f"rank {', '.join(map(str, ranks))}" if ranks else "no rank, so the loss or its gradient overflowed"
            raise FloatingPointError(
                f"{config.max_skipped} steps in a row, up to step {broken[0]}, had a gradient that is not finite and "
                f"were skipped; z was not finite on {where}. The weights and checkpoints are whole: look at the images "
                f"of these steps, or lower --base-lr or raise --temperature and start anew"
            )
        speed = clock.lap(step, config.batch_size, loader.take_wait_s(), device)
        log.speed(speed)
        eta = timedelta(seconds=round((total_steps - step) * config.batch_size / speed["images_per_s"]))
        accelerator.print(
            f"step {step}/{total_steps} {100 * step // total_steps}% | loss {loss:.3f} | "
            + (f"damaged {len(log.told)} | " if log.told else "")
            + (f"skipped {skips} | " if (skips := sum("skipped" in row for row in rows)) else "")
            + (f"probe {100 * hits:.1f}% | " if (hits := monitored.get("probe_accuracy")) is not None else "")
            + f"img/s {speed['images_per_s']:.0f} | data_wait {speed['data_wait_percent']:.1f}% | "
            f"mem {speed['peak_mib'] / 1024:.1f} GiB | lr {rows[-1]['lr']:.3g} | eta {eta}",
        )
        if config.track:
            accelerator.log({"loss": loss, "lr": rows[-1]["lr"], **monitored, **speed}, step=step)

    def share_damaged() -> None:
        """Tell all processes which samples were replaced, and name new ones in damaged.jsonl."""
        if not config.skip_damaged:
            return
        for damaged in gather_object([loader.damaged]):
            loader.learn(damaged)
        everyones = loader.damaged
        if main:
            log.damaged([(*loader.reader.where(sample), problem) for sample, problem in sorted(everyones.items())])
        if len(everyones) > config.skip_damaged:
            raise LoaderError(
                f"{len(everyones)} samples of {dataset.address} are damaged, more than --skip-damaged "
                f"{config.skip_damaged}. {out / 'damaged.jsonl'} names them; `python tools/make_shards.py quarantine "
                f"{dataset.address} --from {out / 'damaged.jsonl'}` leaves them out"
            )

    def evaluate() -> None:
        assert queries is not None
        accuracy = knn_accuracy(accelerator, encoder, dataset, queries, config.views, num_threads)
        accelerator.print(f"step {step}/{total_steps} | kNN accuracy {100 * accuracy:.2f} %")
        log.metrics([{"step": step, "knn": accuracy}])
        if config.track:
            accelerator.log({"knn": accuracy}, step=step)

    def save() -> None:
        if main:
            extra = {
                "config": asdict(config),
                "processes": world_size,
                "recipe": recipe,
                "loader": loader.state_dict(),
                "skipped_in_a_row": in_a_row,
            }
            folder = out / "checkpoints"
            try:
                checkpoint.save(
                    folder, step, model=network, optimizer=optimizer, extra=extra, keep=config.keep, probe=linear
                )
            except checkpoint.NotFiniteError as error:  # training broke the weights before any loss showed it
                raise FloatingPointError(f"{error}. Lower --base-lr, and start anew") from error
        log.status("running")

    def micro_batches() -> Iterator[Tensor]:
        for i in range(whole.count):
            batch = next(loader)
            if step == i == 0 and main:
                save_grid(batch.views, config.views, out / "views.png")
            yield batch.views
            if probe and batch.labels is not None:  # the next one is only asked for when this one is encoded
                try:
                    probe.learn(batch.labels, 1 / whole.count)
                except ValueError as error:
                    raise RunError(str(error)) from error

    if queries and step == 0:
        evaluate()
    clock.start()
    while step < total_steps:
        lr = learning_rate(step, peak=peak, total_steps=total_steps, warmup_steps=warmup)
        outcome = train_step(
            model,
            optimizer,
            micro_batches(),
            watched_loss,
            lr,
            count=whole.count,
            keep=whole.keep,
            offload=whole.offload,
        )
        log.step = step = step + 1
        pending.append((step, outcome, lr))

        last = step == total_steps
        logging = last or step % config.log_every == 0
        saving = last or step % config.checkpoint_every == 0
        knn_steps = config.knn_every * loader.steps_per_epoch
        evaluating = queries is not None and (last or (knn_steps and step % knn_steps == 0))
        stopping = stop.asked(accelerator, step, waits=bool(logging or saving or evaluating))
        saving = saving or stopping
        if logging or saving or evaluating:
            flush(monitor() if logging else {})
        if saving or evaluating:
            if evaluating:
                evaluate()
            if saving:
                save()
            clock.start()
        if stopping and not last:
            raise Preempted(f"stopped by a signal at step {step}; go on with --resume --out {out}")

    path = out / "encoder" / "encoder.safetensors"
    if main:
        kept = {name: value for name, value in asdict(config).items() if name not in FREE}
        checkpoint.export_encoder(
            path.parent,
            encoder,
            image_size=config.views.size,
            mean=config.views.mean,
            std=config.views.std,
            interpolation={"linear": "bilinear", "cubic": "bicubic"}[config.views.interpolation],
            crop_pct=config.views.eval_crop,
            training={"recipe": recipe, "steps": step, "dataset": dataset.fingerprint, "config": kept},
        )
        log.status("done")
    accelerator.print(
        f"encoder      {path}\ncheckpoints  {out / 'checkpoints'}\nmetrics      {out / 'metrics.jsonl'}\n"
        f"views        {out / 'views.png'}"
    )
    scores = log.knn()
    if 0 in scores and total_steps in scores:  # a resumed run may have been given its queries on the way
        accelerator.print(
            f"kNN accuracy {100 * scores[0]:.2f} % at random initialisation, "
            f"{100 * scores[total_steps]:.2f} % after training"
        )
    accelerator.end_training()
    return path


def knn_accuracy(
    accelerator: "Accelerator",
    encoder: "nn.Module",
    bank: "Dataset",
    queries: "Dataset",
    views: ViewConfig,
    num_threads: int,
) -> float:
    """Weighted kNN top-1 (k = 200, temperature 0.1) of `queries`; every process encodes a part, all get the result."""
    import torch

    from model.probe import features, knn
    from pipeline.loader import build_eval_loader

    if accelerator.num_processes > 1:
        for buffer in encoder.buffers():  # one encoder for all: the running statistics that are saved and exported
            torch.distributed.broadcast(buffer, 0)
    gathered: list[Tensor] = []
    for dataset in (bank, queries):
        batches = build_eval_loader(
            dataset,
            views,
            EVAL_BATCH,
            accelerator.device,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            num_threads=num_threads,
            samples=KNN_BANK,
        )
        with accelerator.autocast():
            part = features(encoder, batches, accelerator.device)
        for tensor in part:
            padded = accelerator.pad_across_processes(tensor.to(accelerator.device), pad_index=-1)
            gathered.append(accelerator.gather(padded).cpu())
    bank_features, bank_labels, query_features, query_labels = gathered
    here, there = bank_labels >= 0, query_labels >= 0  # padded rows carry label -1
    assert bank.classes is not None
    with torch.no_grad():
        return knn(
            bank_features[here],
            bank_labels[here],
            query_features[there],
            query_labels[there],
            num_classes=len(bank.classes),
            device=accelerator.device,
        )


def save_grid(views: "Tensor", config: ViewConfig, path: Path) -> None:
    """A PNG of up to eight images, their two views side by side."""
    import torch
    from torchvision.utils import make_grid, save_image

    n = len(views) // 2
    pairs = torch.stack([views[: min(n, 8)], views[n : n + min(n, 8)]], 1).flatten(0, 1)
    with replacing(path) as partial:
        save_image(make_grid(config.pixels(pairs.cpu()), nrow=4), partial, format="png")


# ---- its clock, its end, and how it says what it does --------------------------------------------------------------


class Clock:
    """Wall clock of training alone: evaluation and saving stand outside."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.start()

    def start(self) -> None:
        self.since = time.perf_counter()

    def lap(self, step: int, batch_size: int, wait_s: float, device: "torch.device") -> dict[str, Any]:
        """Rates since the last lap or start: images/s, share of the time spent waiting for batches, peak memory."""
        import torch

        now = time.perf_counter()
        seconds, steps = now - self.since, step - self.step
        self.since, self.step = now, step
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device) / 2**20
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        return {
            "step": step,
            "images_per_s": round(steps * batch_size / seconds, 1),
            "step_ms": round(1000 * seconds / steps, 3),
            "data_wait_percent": round(100 * wait_s / seconds, 2),
            "peak_mib": round(peak, 1),
        }


class Stop:
    """Turns SIGTERM, SIGINT and SIGUSR1 into a clean end soon after; a second Ctrl-C ends at once.

    One request arrives several times: sent to launcher and process, from the launcher, and from the kernel when the
    launcher dies. So only a SIGINT that comes AGAIN_S after the first one is taken for impatience.
    """

    AGAIN_S = 2.0
    AGREE_S = 5.0  # between the steps at which processes agree: to ask each other they wait for their devices

    def __init__(self) -> None:
        self.received = False
        self._interrupted = math.inf  # when the first SIGINT came
        self._agreed = 0, 0.0  # at which step, and when
        self._next = 0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._receive)
        if "ACCELERATE_MIXED_PRECISION" in os.environ and sys.platform == "linux":
            # With one process the launcher forwards no signal, it just dies: have the kernel pass SIGTERM on.
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)

    def _receive(self, number: int, frame: Any) -> None:
        self.received = True
        if number == signal.SIGINT:
            if time.monotonic() >= self._interrupted + self.AGAIN_S:
                signal.default_int_handler(number, frame)
            self._interrupted = min(self._interrupted, time.monotonic())

    def asked(self, accelerator: "Accelerator", step: int, *, waits: bool) -> bool:
        """Whether any process was, as far as is known at `step`; the same answer on all of them.

        Several processes ask each other where the host `waits` for the device anyway, and else about every AGREE_S:
        at a step that all know, for it follows from how long their steps took on average.
        """
        if accelerator.num_processes == 1:
            return self.received
        if step < self._next and not waits:
            return False
        import torch

        (last, since), now = self._agreed, time.monotonic()
        step_s = (now - since) / (step - last) if last else self.AGREE_S  # at first it would count the set-up
        mine = torch.tensor([[float(self.received), step_s]], device=accelerator.device)
        received, step_s = accelerator.gather(mine).mean(0).tolist()
        self._agreed, self._next = (step, now), step + max(1, int(self.AGREE_S / step_s))
        return received > 0


def next_free(path: Path) -> Path:
    """path, or path-2, path-3, ... whichever does not exist yet."""
    candidates = (path if i == 1 else path.with_name(f"{path.name}-{i}") for i in itertools.count(1))
    return next(candidate for candidate in candidates if not candidate.exists())


def settings(config: TrainConfig, origin: Mapping[str, str]) -> str:
    """The configuration in one line; values that do not come from the recipe say where from."""
    flat = asdict(config)
    for views in ("views", "second_views"):
        flat |= {f"{views}.{name}": value for name, value in (flat.pop(views) or {}).items()}
    return ", ".join(f"{k}={v}" + (f" ({origin[k]})" if k in origin else "") for k, v in flat.items() if v != "")


# ---- the command line ----------------------------------------------------------------------------------------------


def _read_config_file(ctx: typer.Context, path: Path | None) -> Path | None:
    """Make a TOML file's values the defaults of the options; its two tables of views go to `ctx.obj`."""
    if path is None:
        return None
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise typer.BadParameter(f"{path} cannot be read: {error}") from error
    ctx.obj = {name: values.pop(name, {}) for name in VIEW_TABLES}
    for name, table in ctx.obj.items():
        if not isinstance(table, dict):
            raise typer.BadParameter(
                f"{path}: {name}: expected a table, got {table!r}; write [{name}]"
                + (f' preset = "{table}"' if name == "views" else " and its options, a line each")
            )
    preset = ctx.obj["views"].get("preset", "imagenet")
    if not isinstance(preset, str) or preset not in VIEWS:
        raise typer.BadParameter(f"{path}: [views] preset: expected one of {', '.join(VIEWS)}, got {preset!r}")
    known = {f.name for f in fields(TrainConfig)} - set(VIEW_TABLES)
    if unknown := sorted(values.keys() - known):
        raise typer.BadParameter(
            f"{path}: unknown key {', '.join(unknown)}; known: {', '.join(sorted(known))}, [views], [second_views]"
        )
    kinds = get_type_hints(TrainConfig)
    for name, value in values.items():
        if isinstance(value, bool) and kinds[name] is not bool:  # Python would take it for 0 or 1
            raise typer.BadParameter(f"{path}: {name}: expected a number or text, got {str(value).lower()}")
        if isinstance(value, str) and "\0" in value:
            raise typer.BadParameter(f"{path}: {name}: expected text without a null character, got {value!r}")
    ctx.default_map = values
    return path


def resolve(
    ctx: typer.Context,
    recipe: str,
    views: str | None,
    view: Sequence[str] | None,
    second_view: Sequence[str] | None,
    **options: Any,
) -> tuple[TrainConfig, dict[str, str]]:
    """What a parsed command line asks for, and where each value came from that is not the recipe's."""
    base, origin = RECIPES.get(recipe), {}
    if base is None:
        raise RunError(f"unknown recipe {recipe!r}; choose one of {', '.join(RECIPES)}")
    for name in options:
        source = ctx.get_parameter_source(name)
        if source is not None and options[name] is not None:
            origin[name] = "file" if source.name == "DEFAULT_MAP" else "command line"
    tables = ctx.obj or {name: {} for name in VIEW_TABLES}
    preset = views or tables["views"].pop("preset", None)
    for name, texts in zip(VIEW_TABLES, (view, second_view), strict=True):
        given = parse_changes(texts or [])
        origin |= {f"{name}.{key}": "file" for key in tables[name]}
        origin |= {f"{name}.{key}": "command line" for key in given}
        tables[name] = tables[name] | given
    made = make_views(preset or base.views, tables["views"])
    second = make_views(made, tables["second_views"]) if tables["second_views"] else None
    chosen = {name: value for name, value in options.items() if value is not None}
    return replace(base, views=made, second_views=second, **chosen), origin


def _command(
    ctx: typer.Context,
    recipe: Annotated[str, typer.Argument(help=f"One of {', '.join(RECIPES)}.")],
    out: Annotated[Path | None, typer.Option(help="Run folder. (default: the next free runs/RECIPE)")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the newest checkpoint in --out, if there is one.")] = False,
    config: Annotated[  # noqa: ARG001  its callback has done the work
        Path | None,
        typer.Option(help="TOML file of options and \\[views] tables.", is_eager=True, callback=_read_config_file),
    ] = None,
    views: Annotated[str | None, typer.Option(help=f"Views other than the recipe's: {', '.join(VIEWS)}.")] = None,
    view: Annotated[list[str] | None, typer.Option(help="Change one view option, such as size=96. Repeatable.")] = None,
    second_view: Annotated[
        list[str] | None, typer.Option(help="Change one option of each image's second view alone. Repeatable.")
    ] = None,
    **options: Any,
) -> None:
    """Train an encoder with SimCLR. A recipe gives every value; a file and then options change them."""
    from torch import OutOfMemoryError
    from torch.distributed.elastic.multiprocessing.errors import record

    rank = f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    with one_message(f"{rank}train"):
        try:
            resolved, origin = resolve(ctx, recipe, views, view, second_view, **options)
            record(train)(resolved, recipe=recipe, out=out, resume=resume, origin=origin)
        except Preempted as error:
            typer.echo(f"{rank}{error}", err=True)
            raise typer.Exit(3) from error
        except OutOfMemoryError as error:
            typer.echo(f"{rank}train: {error} Give a smaller --micro-batch or --keep-graphs.", err=True)
            raise typer.Exit(1) from error


def build_command() -> Callable[..., None]:
    """The command with one option per field of TrainConfig; None where the recipe decides."""
    hints = get_type_hints(TrainConfig, include_extras=True)
    signature = inspect.signature(_command)
    params = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    params = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in params]
    for each in fields(TrainConfig):
        if each.name not in VIEW_TABLES:
            kind, text = get_args(hints[each.name])
            option: Any = Annotated[kind | None, typer.Option(help=text)]  # type: ignore[valid-type]
            params.append(inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=option))

    @functools.wraps(_command)
    def command(**given: Any) -> None:
        _command(**given)

    command.__signature__ = signature.replace(parameters=params)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in params}
    return command


# On CPUs torch's threads and DALI's share the cores; threads that spin while they wait would take them from the others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)
app.command()(build_command())

if __name__ == "__main__":
    app()
