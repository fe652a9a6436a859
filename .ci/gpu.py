#!/usr/bin/env python3
"""The proof on one GPU: two parts of six and seven minutes of an H200 with 16 cores, correctness first, then records.

    .ci/gpu.py --list                       the lines of both parts, and the seconds that each may take
    .ci/gpu.py --part 1 --out OUT           without DALI: kernels, optimizer, memory plan, step, loss
    .ci/gpu.py --part 2 --out OUT           with DALI: data made on the spot, loader, sweep, a large batch, training
    .ci/gpu.py merge OUT/gpu-part-1.tar.gz OUT/gpu-part-2.tar.gz      at home: rows into benchmarks/records/, tables
    .ci/gpu.py --part 1 --device cpu --tiny                           the same lines at toy size, to try this script

Each line has seconds of its own, and what the lines before it left. One that fails or runs out of them is told, and the
rest goes on: a part ends in time whatever its lines do, with all records, logs and profiles in one archive, and exit
code 1 where a line failed. The package need not be installed, only what it depends on. A machine without git needs
SWIFTCLR_COMMIT, the commit of this code; part 2 needs photographs: those of scikit-learn or matplotlib, or a folder.
"""

import contextlib
import functools
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from PIL.Image import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the checkout itself, whatever is installed


# ---- the lines -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A line of bash, run in the work folder with $PYTHON and $ROOT, and its like at toy size for a CPU."""

    name: str
    seconds: int
    command: str
    tiny: str


def at_once(commands: Iterable[str]) -> str:
    """Bash that runs the commands side by side and fails where one fails."""
    started = " ".join(f"{command} & pids+=($!);" for command in commands)
    return f'pids=(); {started} code=0; for pid in "${{pids[@]}}"; do wait $pid || code=1; done; exit $code'


def in_turn(commands: Iterable[str]) -> str:
    """Bash that runs the commands one after the other, also behind one that fails, and then fails."""
    return "code=0; " + " ".join(f"{command} || code=1;" for command in commands) + " exit $code"


def gpu_tests(*files: str, only: str = "") -> str:
    """The tests marked gpu of these files, without pytest-xdist; where there is no GPU they say so and pass."""
    paths = " ".join(f"$ROOT/tests/test_{name}.py" for name in files)
    chosen = f" -k '{only}'" if only else ""
    return f"$PYTHON -m pytest -q -ra -m gpu -o addopts= -p no:cacheprovider -c $ROOT/pyproject.toml {paths}{chosen}"


def training(options: str, before: int) -> str:
    """Bash: training that gets SIGTERM behind so many steps, goes on by --resume and is put on record."""
    train = f"$PYTHON $ROOT/train.py cifar10 {options} --out runs/cifar10"
    return (
        f"{train} & pid=$!; "
        f'while kill -0 $pid 2>&-; do [ "$(cat runs/cifar10/metrics.jsonl 2>&- | wc -l)" -lt {before} ] || break; '
        "sleep 0.1; done; kill -TERM $pid; wait $pid && code=0 || code=$?; "
        '[ $code -eq 3 ] || { echo "expected exit code 3 after SIGTERM, got $code"; exit 1; }; '
        f"{train} --resume && $PYTHON -m benchmarks.training runs/cifar10 --name gpu-$(date +%F)"
    )


BENCH, SELF = "$PYTHON -m benchmarks.", "$PYTHON $ROOT/.ci/gpu.py"
SANITIZED = (
    "\"import torch; from model.nt_xent import nt_xent; z = torch.randn(514, 100, device='cuda', requires_grad=True); "
    'nt_xent(z, 0.1).backward()"'
)
PATH = "PATH=$PATH:/usr/local/cuda/bin"
KINDS = "value_and", "operand_type", "degenerate"  # of the kernels' tests, about equally many
ROWS, SHAPES = (4096, 16384, 65536), ("128,128,8,2", "128,128,4,2", "64,64,4,2", "128,64,8,2")
LAYOUT, MODES = "--layout nhwc", "--mode eager --mode graph"
TINY_SWEEP = "--preset cpu --width 0.125 --micro-batch 16"
CIFAR = "--data data/small --eval-data data/small-test"

PARTS: dict[int, tuple[int, list[Line]]] = {  # seconds of each part, its archive included, and its lines
    1: (
        365,
        [
            Line("versions", 10, f"nvidia-smi; {SELF} versions --device cuda", f"{SELF} versions --device cpu"),
            Line(
                "tests of kernels, LARS, monitor, large batch",
                70,
                at_once(
                    [
                        *(gpu_tests("nt_xent_triton", only=kind) for kind in KINDS),
                        gpu_tests("nt_xent_triton", only=" and ".join(f"not {kind}" for kind in KINDS)),
                        gpu_tests("lars", "monitor"),
                        gpu_tests("large_batch"),
                    ]
                ),
                gpu_tests("nt_xent_triton", "lars", "monitor", "large_batch"),
            ),
            Line("test that fills the memory", 15, *[gpu_tests("memory_plan")] * 2),
            Line(
                "compute-sanitizer",
                30,
                f"export {PATH}; if command -v compute-sanitizer; then compute-sanitizer --report-api-errors no "
                f"--error-exitcode 1 $PYTHON -c {SANITIZED}; else echo not on PATH: out-of-bounds goes unchecked; fi",
                f"{PATH} command -v compute-sanitizer || echo not on PATH: out-of-bounds goes unchecked",
            ),
            Line(
                "memory plan and a step of ResNet-50 at 1024 and 4096",
                45,
                in_turn(f"{SELF} plan imagenet {batch}" for batch in (1024, 4096)),
                in_turn(f"{SELF} plan demo {batch}" for batch in (16, 32)),
            ),
            Line("LARS", 15, f"{BENCH}lars --device cuda --budget-s 3", f"{BENCH}lars --depth 18 --budget-s 1"),
            Line(
                "step of ResNet-50, eager and as a CUDA graph",
                40,
                f"{BENCH}step --device cuda --batch 256 {LAYOUT} {MODES} --profile",
                f"{BENCH}step --batch 2 --width 0.25 {LAYOUT} --mode eager --precision fp32 --runs 2 --profile",
            ),
            Line(
                "step of ResNet-18 at 32 px, eager and as a CUDA graph",
                20,
                f"{BENCH}step --device cuda --depth 18 --size 32 --batch 512 {LAYOUT} {MODES}",
                f"{BENCH}step --batch 4 --width 0.25 {LAYOUT} --mode eager --precision fp32 --runs 2",
            ),
            Line(
                "loss",
                55,
                f"{BENCH}loss --device cuda --no-compile --budget-s 3 " + " ".join(f"--rows {rows}" for rows in ROWS),
                f"{BENCH}loss --no-compile --budget-s 1 --rows 64 --rows 128",
            ),
            Line(
                "shapes of the loss's kernels",
                35,
                f"{BENCH}loss --device cuda " + " ".join(f"--shape {shape}" for shape in SHAPES),
                f"TRITON_INTERPRET=1 {BENCH}loss --rows 64 --dim 16 --shape 32,32,4,1 --shape 32,16,4,1",
            ),
            Line(
                "torch.compile",
                30,
                f"{BENCH}step --device cuda --depth 18 --size 32 --batch 512 {LAYOUT} --mode compile",
                f"TORCH_COMPILE_DISABLE=1 {BENCH}step --batch 2 --width 0.25 {LAYOUT} --mode compile --precision fp32 "
                "--runs 2",
            ),
        ],
    ),
    2: (
        430,
        [
            Line("the machine, by doctor", 25, "$PYTHON -m tools.doctor", "$PYTHON -m tools.doctor"),
            Line("data", 40, f"{SELF} data --large 4096 --small 12800", f"{SELF} data --large 48 --small 300"),
            Line(
                "tests of graph, loader, doctor",
                55,
                at_once([gpu_tests("graph"), gpu_tests("loader"), gpu_tests("doctor")]),
                gpu_tests("graph", "loader", "doctor"),
            ),
            Line(
                "sweep at 224 px",
                75,
                f"{BENCH}sweep data/large --preset imagenet --batch-size 256 --batch-size 1024 --budget 8",
                f"{BENCH}sweep data/large --size 32 --batch-size 32 --budget 2 {TINY_SWEEP}",
            ),
            Line(
                "loader at 224 px, by shares of the hardware decoder",
                55,
                f"{BENCH}loader data/large --device cuda --threads 16 --seconds 2 --hw-decoder-load 0.65 "
                "--hw-decoder-load 0.9 --memory-steps 200",
                f"{BENCH}loader data/large --size 32 --threads 1 --seconds 0.5 --batch-size 16 --memory-steps 5",
            ),
            Line(
                "sweep at 32 px",
                30,
                f"{BENCH}sweep data/small --preset cifar10 --batch-size 512 --budget 6",
                f"{BENCH}sweep data/small --batch-size 32 --budget 2 {TINY_SWEEP}",
            ),
            Line(
                "large batch",
                60,
                f"{BENCH}sweep data/large --preset imagenet --batch-size 8192 --budget 1",
                f"{BENCH}sweep data/large --size 32 --batch-size 64 --budget 1 {TINY_SWEEP}",
            ),
            Line(
                "training, SIGTERM, --resume",
                50,
                training(f"{CIFAR} --steps 300 --knn-every 4 --log-every 20", before=60),
                training(
                    f"{CIFAR} --steps 8 --batch-size 32 --width 0.125 --log-every 2 --warmup-epochs 0 --precision no",
                    before=2,
                ),
            ),
            Line(
                "profile",
                30,
                f"{BENCH}sweep data/large --preset imagenet --batch-size 1024 --profile profile",
                f"{BENCH}sweep data/small --batch-size 32 --profile profile {TINY_SWEEP}",
            ),
        ],
    ),
}


# ---- running them --------------------------------------------------------------------------------------------------

app = typer.Typer(add_completion=False, help=__doc__.split("\n")[0])


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    part: Annotated[Literal["1", "2"] | None, typer.Option(help="which part to run")] = None,
    list_: Annotated[bool, typer.Option("--list", help="print the lines and their seconds")] = False,
    only: Annotated[list[str] | None, typer.Option(help="lines whose names begin so, instead of all")] = None,
    device: Annotated[Literal["cuda", "cpu"], typer.Option(help="cpu: with --tiny")] = "cuda",
    tiny: Annotated[bool, typer.Option("--tiny", help="toy sizes, for a CPU")] = False,
    out: Annotated[Path, typer.Option(help="folder of the archive")] = Path("."),
    photographs: Annotated[Path | None, typer.Option(help="a folder of them, for part 2; else a package's")] = None,
) -> None:
    """Run one part."""
    if context.invoked_subcommand:
        return
    if list_:
        print_lines(PARTS, tiny)
        return
    if part is None:
        raise typer.BadParameter("1 or 2; --list shows what they do", param_hint="--part")
    if tiny != (device == "cpu"):
        raise typer.BadParameter("the toy sizes are for a CPU and the others for a GPU: give both or none of "
                                 "--device cpu and --tiny")  # fmt: skip
    seconds, lines = PARTS[int(part)]
    chosen = [line for line in lines if not only or line.name.startswith(tuple(only))]
    if not chosen:
        raise typer.BadParameter(f"no line of part {part} begins so; --list shows them", param_hint="--only")
    environment = {"PYTHON": sys.executable, "ROOT": str(ROOT), "PYTHONUNBUFFERED": "1"}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    environment |= {"SWIFTCLR_COMMIT": commit()}
    if any(line.name == "data" for line in chosen):
        environment["PHOTOGRAPHS"] = os.pathsep.join(map(str, find_photographs(photographs)))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        work = Path(folder)
        try:
            results = run_lines(chosen, seconds, work, os.environ | environment, tiny=tiny)
        finally:
            archive = pack(work, out / f"gpu-part-{part}.tar.gz")
    typer.echo(f"{archive}: {archive.stat().st_size / 2**20:.1f} MiB")
    if failed := [f"{line.name}: {ended}" for line, ended in results if ended != "ok"]:
        typer.echo("failed:\n  " + "\n  ".join(failed))
        raise typer.Exit(1)


def print_lines(parts: dict[int, tuple[int, list[Line]]], tiny: bool) -> None:
    for number, (seconds, lines) in parts.items():
        typer.echo(f"part {number}: {seconds} s")
        for line in lines:
            typer.echo(f"{line.seconds:5} s  {line.name}\n         {line.tiny if tiny else line.command}")


def commit() -> str:
    """That of the checkout, or SWIFTCLR_COMMIT; without either no record could be made."""
    done = None
    if shutil.which("git"):
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    named = os.environ.get("SWIFTCLR_COMMIT") or (done.stdout.strip() if done and not done.returncode else "")
    if not named:
        raise typer.BadParameter("git does not tell the commit here: set SWIFTCLR_COMMIT", param_hint="SWIFTCLR_COMMIT")
    return named


def run_lines(
    lines: Sequence[Line], seconds: float, work: Path, environment: dict[str, str], *, tiny: bool = False
) -> list[tuple[Line, str]]:
    """Each line and how it ended: "ok", or what failed. A line may use what those before it left of their seconds.

    Records go to work/records, what a line prints to work/logs. Toy sizes have three times the seconds, on any CPU.
    """
    patience = 3 if tiny else 1
    for name in ("records", "logs"):
        (work / name).mkdir()
    environment = environment | {"SWIFTCLR_RECORDS": str(work / "records")}
    began, end, results = time.monotonic(), 0.0, []
    for i, line in enumerate(lines):
        end = min(end + patience * line.seconds, patience * seconds)
        start = time.monotonic()
        log = work / "logs" / f"{i:02}-{re.sub(r'[^a-z0-9]+', '-', line.name.lower())}.txt"
        ended = run(line.tiny if tiny else line.command, log, end - (start - began), work, environment)
        typer.echo(f"{time.monotonic() - start:6.1f} s of {line.seconds:3}  {line.name}: {ended}")
        if ended != "ok":
            typer.echo("".join(f"    {text}\n" for text in log.read_text(errors="replace").splitlines()[-15:]))
        results.append((line, ended))
    return results


def run(command: str, log: Path, seconds: float, work: Path, environment: dict[str, str]) -> str:
    """How a line of bash ended; its whole process group goes with it, at the latest after so many seconds."""
    with log.open("w") as file:
        file.write(f"$ {command}\n")
        file.flush()
        process = subprocess.Popen(
            ["bash", "-c", command], cwd=work, env=environment, stdout=file, stderr=file, start_new_session=True
        )
        try:
            code: int | None = process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return "ok" if code == 0 else f"exit code {code}" if code is not None else f"stopped after {seconds:.0f} s"


def pack(work: Path, archive: Path) -> Path:
    """Everything but the data and the weights, in one archive."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:gz", compresslevel=6) as tar:
        for path in sorted(work.rglob("*")):
            inside = path.relative_to(work)
            kept = inside.parts[0] in ("records", "logs", "profile")
            kept |= inside.parts[0] == "runs" and len(inside.parts) == 3 and path.suffix in (".json", ".jsonl", ".png")
            if path.is_file() and kept:
                tar.add(path, str(inside))
    return archive


# ---- what lines call -----------------------------------------------------------------------------------------------


@app.command(hidden=True)
def versions(device: Annotated[Literal["cuda", "cpu"], typer.Option()]) -> None:
    """What is installed; fails where the device is missing."""
    import numpy
    import torch

    typer.echo(f"Python {sys.version.split()[0]}, torch {torch.__version__}, NumPy {numpy.__version__}")
    there = {package: bool(find(package)) for package in ("triton", "nvidia.dali", "accelerate", "timm", "matplotlib")}
    typer.echo(", ".join(f"{package} {'there' if found else 'missing'}" for package, found in there.items()))
    if device == "cuda":
        typer.echo(torch.cuda.get_device_name())


def find(package: str) -> list[Path]:
    """Folders of an installed package, which is not imported."""
    try:
        spec = find_spec(package)
    except ModuleNotFoundError:
        spec = None
    return [Path(place) for place in spec.submodule_search_locations or ()] if spec else []


@app.command(hidden=True)
def plan(recipe: str, batch_size: int) -> None:
    """What a batch of a recipe takes: its micro-batches, and the seconds and memory of steps on synthetic views."""
    from dataclasses import replace

    import torch

    from train import RECIPES, build_accelerator, build_training

    config = replace(RECIPES[recipe], batch_size=batch_size)
    accelerator = build_accelerator(config)
    cuda, start = accelerator.device.type == "cuda", time.perf_counter()
    setup = build_training(config, accelerator)
    typer.echo(f"{recipe} at {batch_size}: {setup.plan}, planned in {time.perf_counter() - start:.1f} s")
    shape = 2 * setup.plan.micro_batch, 3, config.views.size, config.views.size
    views = torch.randn(shape, device=accelerator.device, dtype=torch.half if setup.half else torch.float)
    views = views.contiguous(memory_format=torch.channels_last)
    for name in ("first", "second"):
        start = time.perf_counter()
        setup.step(itertools.repeat(views, setup.plan.count), 0.0)
        if cuda:
            torch.cuda.synchronize()
        typer.echo(f"{name} step: {time.perf_counter() - start:.2f} s")
    if cuda:
        typer.echo(f"peak: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


PACKAGED = {"sklearn": "datasets/images/*.jpg", "matplotlib": "mpl-data/sample_data/*.jpg"}


def find_photographs(folder: Path | None) -> list[Path]:
    """Those of a folder, or of installed packages, which are not imported."""
    places = [(folder, "*")] if folder else [(place, glob) for name, glob in PACKAGED.items() for place in find(name)]
    found = [path for place, glob in places for path in sorted(place.glob(glob)) if path.suffix.lower() != ".txt"]
    if not found:
        where = folder or "scikit-learn or matplotlib, neither of which has them here"
        raise typer.BadParameter(f"no photographs in {where}: give --photographs FOLDER", param_hint="--photographs")
    return found


REGIONS = 5  # of each photograph, from left to right: what a crop is of is its class
SIZES = {"large": (500, 375), "small": (32, 32), "small-test": (32, 32)}


@app.command(hidden=True)
def data(large: Annotated[int, typer.Option()], small: Annotated[int, typer.Option()]) -> None:
    """data/large: JPEGs of about 500 x 375; data/small and small-test: bare pixels, 32 x 32; crops of photographs."""
    from concurrent.futures import ProcessPoolExecutor

    for name, count in {"large": large, "small": small, "small-test": small // 10}.items():
        with ProcessPoolExecutor() as pool:
            list(pool.map(functools.partial(crop, name), range(count), chunksize=16))
        make = [sys.executable, "-m", "tools.make_shards", "folder", f"images/{name}", f"data/{name}"]
        subprocess.run(make + (["--store", "ppm"] if name != "large" else []), check=True)


def crop(name: str, number: int) -> None:
    """Writes the crop of this number of a data set to the folder of its class."""
    import numpy as np
    from PIL import Image

    rng, paths = np.random.default_rng([list(SIZES).index(name), number]), os.environ["PHOTOGRAPHS"].split(os.pathsep)
    label, large = number % (REGIONS * len(paths)), name == "large"
    image = opened(paths[label // REGIONS])
    width, height = (round(side * rng.uniform(0.9, 1.1)) if large else side for side in SIZES[name])
    high = image.height * (rng.uniform(0.5, 1) if large else rng.uniform(0.2, 0.4))
    wide = min(high * width / height, image.width / 2)
    left, top = (label % REGIONS + rng.random()) / REGIONS * (image.width - wide), rng.random() * (image.height - high)
    view = image.resize((width, height), Image.Resampling.BICUBIC, (left, top, left + wide, top + high))
    path = Path("images", name, f"class-{label:02}", f"{number:06}.{'jpg' if large else 'png'}")
    path.parent.mkdir(parents=True, exist_ok=True)
    view.save(path, quality=95)


@functools.cache
def opened(path: str) -> "Image":
    from PIL import Image

    return Image.open(path).convert("RGB")


# ---- at home -------------------------------------------------------------------------------------------------------


@app.command()
def merge(
    archives: list[Path],
    records: Annotated[Path | None, typer.Option(help="folder of the CSVs; default benchmarks/records")] = None,
    readme: Annotated[list[Path] | None, typer.Option(help="file with tables; default as benchmarks.report")] = None,
) -> None:
    """Add the rows of archives to the records, bring the tables up to date, and say which of the variants won."""
    from benchmarks.merge import merge
    from tools.errors import one_message

    with one_message("merge"):
        merge(archives, records, readme)


if __name__ == "__main__":
    app()
