"""Will a long run go well here? Checks the machine, the data and the run before it starts, in about 20 seconds.

    python tools/doctor.py                                                      the machine alone
    python tools/doctor.py data/train --eval-data data/test                     and the data
    python tools/doctor.py data/train --recipe imagenet --processes 8 --out runs/first --batch-size 8192

A recipe of train.py adds the run: equal steps, memory, disk, and how long an epoch takes. Every option of train.py may
follow. Each check prints ok, warning or fault, what it found, and what to change. Exit code 1 if there is a fault.

A check is a function that returns a `Finding`: those of the machine stand in tools/machine.py, those of the run in
tools/trial.py, those of the data here. Where the code that would run raises an error, its message is the fault. Only
temporary files are written, and no further process is started.
"""

import functools
import json
import os
import random
import shutil
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository instead of tools/, as with python -m

from tools import machine, trial
from tools.findings import Finding, checked, fault, ok, warning
from tools.machine import MIB

if TYPE_CHECKING:
    import torch

    from pipeline.shards import Dataset, Shard
    from train import TrainConfig

# On CPUs torch's threads and DALI's share the cores, so idle ones sleep instead of spinning.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

SAMPLE, SAMPLE_BYTES = 10_000, 2**29  # samples and bytes of the shards that are read from end to end


# ---- the data ------------------------------------------------------------------------------------------------------


def shards(dataset: "Dataset") -> Finding:
    """All tars are readable, and a random sample of them passes `verify`. `read_dataset` has checked the manifest."""
    from pipeline.audit import verify
    from pipeline.shards import manifest
    from pipeline.store import is_remote
    from tools.files import write_new

    mib = sum(shard.bytes for shard in dataset.shards) / MIB
    text = f"{dataset.samples} samples in {len(dataset.shards)} shards, {mib:,.0f} MiB"
    if is_remote(dataset.address):
        return ok(f"{text}; in object storage only the indexes are checked")
    if closed := [shard.file for shard in dataset.shards if not os.access(dataset.tar(shard), os.R_OK)]:
        return fault(f"{len(closed)} tars may not be read, {closed[0]} first", f"chmod -R a+r {dataset.tars_address}")
    part: list[Shard] = []
    samples = size = 0
    for shard in random.sample(dataset.shards, len(dataset.shards)):
        samples, size = samples + shard.samples, size + shard.bytes
        if part and (samples > SAMPLE or size > SAMPLE_BYTES):
            break
        part.append(shard)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for shard in part:
            for link, file in ((shard.file, dataset.tar(shard)), (shard.index, dataset.index(shard))):
                (folder / link).parent.mkdir(parents=True, exist_ok=True)
                (folder / link).symlink_to(Path(file).resolve())
        samples = sum(shard.samples for shard in part)
        smaller = replace(dataset, shards=tuple(part), samples=samples, tars_at=dataset.tars_at and str(folder))
        write_new(folder / "dataset.json", manifest(smaller))
        faults = verify(folder)
    if faults:
        place = f"{faults[0].shard} {faults[0].key or ''}".rstrip()
        more = f"; {len(faults) - 1} more faults" if len(faults) > 1 else ""
        change = f"python tools/make_shards.py verify {dataset.root} --images lists all; copy those shards again"
        return fault(f"{place}: {faults[0].problem}{more}", change)
    return ok(f"{text}; {len(part)} of them read from end to end: as they were written")


def labels(dataset: "Dataset", queries: "Dataset | None") -> Finding:
    """Evaluation needs labels, the same classes on both sides, and other images than those trained on."""
    from pipeline.labels import check_alike

    if queries:
        if finding := checked(check_alike, dataset, queries):
            return finding
        if dataset.fingerprint == queries.fingerprint:
            return warning("trained and evaluated on the same images", "give --eval-data shards of other images")
    elif dataset.classes is None:
        return ok("no labels; training needs none")
    assert dataset.classes is not None
    counts = dataset.counts.get("per_class") or ()
    if empty := [name for name, count in zip(dataset.classes, counts, strict=False) if not count]:
        return warning(f"no image of {len(empty)} classes, {empty[0]!r} first", "look into actions.jsonl")
    return ok(f"{len(dataset.classes)} classes" + (", the same in both" if queries else ""))


def first_batch(dataset: "Dataset", config: "TrainConfig", processes: int, device: "torch.device") -> Finding:
    """The loader reads the shards and returns two views of each image."""
    from train import build_loader

    n = max(1, min(32, dataset.samples // processes))
    start = time.monotonic()
    loader = build_loader(
        replace(config, batch_size=n * processes, micro_batch=0), dataset, device, world_size=processes
    )
    next(loader)
    return ok(f"two views of {n} images in {time.monotonic() - start:.1f} s, start included")


def disk(dataset: "Dataset", images_per_s: float) -> Finding:
    """The disk delivers images as fast as training needs them, or all shards fit in the page cache.

    images_per_s is the rate of training, 0 if unknown.
    """
    total = sum(shard.bytes for shard in dataset.shards)
    cold, warm = (read_rate(dataset, forget=forget) for forget in (True, False))
    text = f"{cold / MIB:,.0f} MiB/s from the disk, {warm / MIB:,.0f} MiB/s from the page cache"
    needed = images_per_s * total / dataset.samples
    if needed:
        text += f"; training reads {trial.digits(needed / MIB)} MiB/s"
    if needed <= cold:
        return ok(text)
    if total < machine.available_memory() / 2:
        return ok(f"{text}: the first epoch is slower, then all {total / MIB:,.0f} MiB are in the page cache")
    return warning(text, "copy the shards to a faster, local disk, or make smaller images with --resize")


def read_rate(dataset: "Dataset", *, forget: bool) -> float:
    """Bytes per second of reading tars for half a second; `forget` asks the page cache to drop each tar first."""
    from tools.files import open_binary

    num, seconds, start = 0, 0.0, time.monotonic()
    for shard in dataset.shards:
        with open_binary(dataset.tar(shard)) as tar:
            if forget:
                os.posix_fadvise(tar.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while seconds < 0.5 and (chunk := tar.read(8 * MIB)):
                num, seconds = num + len(chunk), time.monotonic() - start
        if seconds >= 0.5:
            break
    return num / seconds


# ---- all of it -----------------------------------------------------------------------------------------------------


def examine(
    data: str, eval_data: str, config: "TrainConfig | None", processes: int | None, out: Path
) -> Iterator[tuple[str, Finding]]:
    """Yield name and finding of each check as soon as it is done. A check is skipped if what it needs is at fault.

    data, eval_data  folders of shards, or ""
    config           of the run to come, None to look at machine and data alone
    processes        on this machine; None: one for each GPU, or one
    """
    versions = machine.installed()
    finding = checked(machine.packages, versions)
    yield "packages", finding
    if finding.state == "fault":  # every other check would fail for the same reason
        return
    import torch

    from pipeline.shards import read_dataset
    from pipeline.store import is_remote
    from pipeline.workers import share_of_cores
    from train import TrainConfig

    finding = checked(machine.cuda, versions, torch.version.cuda)
    yield "CUDA", finding
    if finding.state == "fault":
        return
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device("cuda", 0) if gpus else torch.device("cpu")
    processes = processes or max(1, gpus)
    yield "devices", checked(machine.devices, processes)
    yield "shared memory", checked(machine.shared_memory, processes, gpus)
    yield "cores", checked(machine.cores, processes)
    yield "decoder", checked(machine.decoder, device)

    training, queries = (checked(read_dataset, path) if path else None for path in (data, eval_data))
    for name, opened in (("shards", training), ("evaluation shards", queries)):
        if opened:
            yield name, opened if isinstance(opened, Finding) else checked(shards, opened)
    dataset = None if isinstance(training, Finding) else training
    can_train = False
    if dataset:
        yield "labels", checked(labels, dataset, None if isinstance(queries, Finding) else queries)
        findings = {"first batch": checked(first_batch, dataset, config or TrainConfig(), processes, device)}
        if config:
            findings["steps"] = checked(trial.steps, dataset, config, processes)
        yield from findings.items()
        can_train = all(finding.state != "fault" for finding in findings.values())

    images_per_s = 0.0
    if config:
        yield "options", checked(trial.options, config, processes)
        share = max(1, share_of_cores() // processes)
        if not gpus:
            torch.set_num_threads(config.cpu_threads or share)
        config = replace(config, num_threads=config.num_threads or share, compile="off", track="")
        one = replace(config, batch_size=max(1, config.batch_size // processes))
        tried = checked(trial.try_step, one)
        if isinstance(tried, Finding):
            yield "step", tried
        else:
            yield "memory", checked(trial.memory, tried, processes, device)
            yield "checkpoints", checked(trial.checkpoints, tried, config, out)
            if dataset and can_train:
                pace = checked(trial.measure, tried, dataset, config, processes, device)
                if isinstance(pace, Finding):
                    yield "speed", pace
                else:
                    images_per_s = processes * pace.together
                    yield "speed", trial.speed(pace, tried, dataset, config, processes)
    if dataset and not is_remote(dataset.address):
        yield "disk", checked(disk, dataset, images_per_s)


def _lines(name: str, finding: Finding) -> str:
    start = f"{finding.state:<8} {name:<18} "
    fill = functools.partial(
        textwrap.fill,
        width=max(80, shutil.get_terminal_size((120, 24)).columns),
        subsequent_indent=" " * len(start),
        break_on_hyphens=False,
    )
    lines = [fill(finding.found, initial_indent=start)]
    if finding.change:
        lines.append(fill(finding.change, initial_indent=" " * (len(start) - 3) + "-> "))
    return "\n".join(lines)


app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def doctor(
    ctx: typer.Context,
    data: Annotated[str, typer.Argument(metavar="[SHARDS]", help="Folder of shards to train on.")] = "",
    eval_data: Annotated[str, typer.Option(help="Folder of labelled shards to evaluate on.")] = "",
    recipe: Annotated[
        str, typer.Option(help="Look at a run of this recipe; then every option of train.py may follow.")
    ] = "",
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes on this machine. (default: one for each GPU, or one)")
    ] = None,
    out: Annotated[Path, typer.Option(help="Run folder to be.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check the machine, the data and a run before it starts. Exit code 1 where there is a fault."""
    from tools.errors import one_message
    from tools.runs import config_of

    with one_message("doctor"):
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("start it without a launcher: one process looks for all, and --processes says how many")
        options = list(ctx.args)
        if data.startswith("-"):  # the first of the options, with no shards before it
            data, options = "", [data, *options]
        if options and not recipe:
            raise ValueError(f"{' '.join(options)}: options of train.py need --recipe")
        words = [recipe, *(["--data", data] if data else []), *(["--eval-data", eval_data] if eval_data else [])]
        config = config_of([*words, *options]) if recipe else None
        if config:
            data, eval_data = config.data, config.eval_data
        findings: dict[str, Finding] = {}
        for name, finding in examine(data, eval_data, config, processes, out):
            findings[name] = finding
            if not as_json:
                typer.echo(_lines(name, finding))
    states = [finding.state for finding in findings.values()]
    faults, warnings = states.count("fault"), states.count("warning")
    if as_json:
        rows = [{"check": name, **asdict(finding)} for name, finding in findings.items()]
        typer.echo(json.dumps({"faults": faults, "warnings": warnings, "findings": rows}, indent=1))
    else:
        typer.echo(f"{faults} fault{'s' * (faults != 1)}, {warnings} warning{'s' * (warnings != 1)}")
    if faults:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
