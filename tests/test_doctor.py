"""The doctor finds nothing wrong where all is well, and each planted fault by its name, with what to change."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from model.memory_plan import Plan
from pipeline import loader
from pipeline.demo import CLASSES, splits
from pipeline.shards import Sample, read_dataset
from pipeline.write import write_shards
from tools import doctor, machine, trial
from tools.findings import Finding, checked
from tools.runs import config_of
from train import RECIPES

TRAIN, TEST, BATCH = 70, 20, 16
TINY = ["--recipe", "demo", "--width", "0.125", "--batch-size", str(BATCH), "--view", "size=16", "--precision", "no"]
TINY += ["--cpu-threads", "1", "--num-threads", "1"]
ROOT = Path(__file__).resolve().parents[1]
CUDA = torch.cuda.is_available()
MACHINE = ["packages", "CUDA", "devices", "shared memory", "cores", "decoder"]
DATA = ["shards", "evaluation shards", "labels", "first batch"]
RUN = ["steps", "options", "memory", "checkpoints", "speed"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders train, test, unlabelled and fewer (of nine of the ten classes); read only."""
    root = tmp_path_factory.mktemp("sets")
    drawn = dict(splits(TRAIN, TEST))
    for name, images in drawn.items():
        samples = [Sample(f"{name}-{i}", label, png) for i, (png, label) in enumerate(images)]
        write_shards(samples, root / name, classes=CLASSES, shard_size=20)
    samples = [Sample(f"{i}", data=png) for i, (png, _) in enumerate(drawn["test"])]
    write_shards(samples, root / "unlabelled", classes=None)
    samples = [Sample(f"{i}", label, png) for i, (png, label) in enumerate(drawn["test"]) if label < 9]
    write_shards(samples, root / "fewer", classes=CLASSES[:9])
    return root


@pytest.fixture
def sets(made: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(made, tmp_path / "sets"))


@pytest.fixture(autouse=True)
def _quiet_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine without a GPU, whatever else this one is or does; short measurements; torch keeps its threads."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "DRIVER", Path("nowhere"))
    monkeypatch.setattr(os, "getloadavg", lambda: (0.1, 0.1, 0.1))
    monkeypatch.setattr(machine, "cpu_quota", lambda: None)
    monkeypatch.setattr(shutil, "disk_usage", usage(2**40))
    monkeypatch.setattr(machine, "available_memory", lambda: 2**34)
    for name in ("OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    for name in ("STEP_S", "LOADER_S", "TOGETHER_S"):
        monkeypatch.setattr(trial, name, 0.05)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def usage(num: int) -> Callable[[Any], Any]:
    """A disk of `num` bytes, all of them free."""
    return lambda _: SimpleNamespace(total=num, used=0, free=num)


def look(*arguments: object) -> tuple[int, dict[str, Finding]]:
    """Exit code and findings of the program."""
    done = CliRunner().invoke(doctor.app, [*map(str, arguments), "--json"])
    assert done.exit_code in (0, 1), done.output
    rows = json.loads(done.stdout)["findings"]
    return done.exit_code, {row.pop("check"): Finding(**row) for row in rows}


# ---- all is well ---------------------------------------------------------------------------------------------------


def test_a_healthy_machine_and_set_have_no_fault(made: Path, tmp_path: Path) -> None:
    """Every check looks, none complains; the speed of so small a network may well be that of its loader."""
    code, found = look(made / "train", "--eval-data", made / "test", "--out", tmp_path / "run", *TINY)
    assert list(found) == [*MACHINE, *DATA, *RUN, "disk"]
    assert {name for name, finding in found.items() if finding.state != "ok"} <= {"speed"}
    assert code == 0
    assert "4 an epoch of 16 images" in found["steps"].found
    assert "6 of 70 images are left over" in found["steps"].found
    assert "70 samples in 4 shards" in found["shards"].found
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_a_healthy_gpu_has_no_fault(made: Path, tmp_path: Path) -> None:
    """In a process of its own: accelerate keeps to the device that it met first."""
    command = [
        sys.executable,
        "tools/doctor.py",
        made / "train",
        "--out",
        tmp_path,
        *TINY,
        "--processes",
        "1",
        "--json",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = {row["check"]: row for row in json.loads(done.stdout)["findings"]}
    assert done.returncode == 0, done.stdout
    assert "on the GPU" in found["decoder"]["found"]
    assert found["memory"]["found"].startswith("16 images per process at once")


def test_it_looks_at_as_much_as_it_is_given(made: Path) -> None:
    assert list(look()[1]) == MACHINE
    assert list(look(made / "unlabelled")[1]) == [*MACHINE, "shards", "labels", "first batch", "disk"]


def test_a_person_reads_a_line_for_each_check_and_what_to_change(made: Path) -> None:
    done = CliRunner().invoke(doctor.app, [str(made / "train"), "--eval-data", str(made / "fewer")])
    assert done.exit_code == 1
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == ["ok"] * 8 + ["fault", "ok", "ok", "1"]
    at = next(i for i, line in enumerate(lines) if line.startswith("fault"))
    assert "labels" in lines[at]
    assert "make both from the same class folders" in " ".join(" ".join(lines[at:]).split())
    assert lines[-1] == "1 fault, 0 warnings"
    assert not done.stderr


# ---- the machine ---------------------------------------------------------------------------------------------------


def without(name: str) -> Callable[[dict[str, str]], dict[str, str]]:
    return lambda versions: {each: version for each, version in versions.items() if each != name}


@pytest.mark.parametrize(
    ("change", "check", "named"),
    [
        (lambda v: v | {"torch": "2.10.1"}, "packages", "torch 2.10.1, expected >=2.11"),
        (without("webdataset"), "packages", "webdataset is missing, expected >=1.0"),
        (without("torchvision"), "packages", "torchvision is missing"),
        (lambda v: {n: e for n, e in v.items() if "dali" not in n}, "packages", "nvidia-dali-cuda130 is missing"),
        (lambda v: v | {"nvidia-dali-cuda120": "2.4.0", "nvidia-dali-cuda130": "2.4.0"}, "CUDA", "own the same files"),
        (lambda v: without("nvidia-dali-cuda130")(v) | {"nvidia-dali-cuda110": "2.4.0"}, "CUDA", "for CUDA 11"),
    ],
)
def test_packages_that_do_not_fit_are_named(
    change: Callable[[dict[str, str]], dict[str, str]], check: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is looked at that would only tell of it in other words."""
    versions = change(machine.installed())
    monkeypatch.setattr(machine, "installed", lambda: versions)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    code, found = look()
    assert code == 1
    assert list(found)[-1] == check
    assert found[check].state == "fault"
    assert named in found[check].found
    assert "pip" in found[check].change


def test_a_torchvision_built_for_another_torch_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("torchvision.ops.nms", missing)
    code, found = look()
    assert (code, found["packages"].state) == (1, "fault")
    assert "does not fit torch" in found["packages"].found
    assert found["packages"].change.endswith("pip install -U torch torchvision")


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    gpus = [SimpleNamespace(name="H100", free=78 * 2**30) for _ in range(2)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: gpus[i])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (gpus[i].free, 80 * 2**30))
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: True)
    return gpus


def test_gpus_are_enough_free_equal_and_connected(
    two_gpus: list[SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert machine.devices(2).state == "ok"
    assert (machine.devices(3).state, machine.devices(3).change) == ("fault", "--processes 2")
    two_gpus[1].name = "T4"
    assert "slowest" in machine.devices(2).found
    two_gpus[0].free = 2**30
    assert machine.devices(2).state == "warning"
    assert "1 of 80 GiB free" in machine.devices(2).found
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: False)
    assert machine.devices(2).state == "fault"
    assert "NCCL" in machine.devices(2).found
    assert machine.devices(1).state == "warning"


def test_a_gpu_that_torch_cannot_use_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "DRIVER", tmp_path)
    assert machine.devices(1).state == "ok"
    (tmp_path / "0000:01:00.0").mkdir()
    assert machine.devices(1).state == "fault"
    assert "driver" in machine.devices(1).change


def test_little_shared_memory_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", usage(64 * 2**20))  # what a container has unless told otherwise
    assert machine.shared_memory(processes=8, gpus=8).state == "fault"
    assert "--shm-size" in machine.shared_memory(processes=8, gpus=8).change
    assert look()[1]["shared memory"].state == "warning"


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"OMP_PROC_BIND": "true"}, "OMP_PROC_BIND=true ties"),
        ({"GOMP_CPU_AFFINITY": "0-1"}, "GOMP_CPU_AFFINITY=0-1 ties"),
        ({"OMP_WAIT_POLICY": "active"}, "spin"),
    ],
)
def test_settings_of_threads_that_cost_time_are_found(
    environment: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    finding = machine.cores(1)
    assert finding.state == "warning"
    assert named in finding.found
    assert finding.change == f"unset {next(iter(environment))}"


def test_cores_that_are_not_there_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.workers.share_of_cores", lambda: 16)
    assert machine.cores(8) == Finding("ok", "16 cores, 2 for each process")
    assert "17 processes share 16 cores" in machine.cores(17).found
    monkeypatch.setattr(machine, "cpu_quota", lambda: 4.0)
    assert machine.cores(2).change == "--num-threads 2 --cpu-threads 2"
    monkeypatch.setattr(os, "getloadavg", lambda: (9.0, 0.0, 0.0))
    assert "load is 9.0" in machine.cores(2).found


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "250000 100000\n"}, 2.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_a_containers_share_of_cores_is_read(files: dict[str, str], expected: float | None, tmp_path: Path) -> None:
    """As Linux writes it, in control groups 2 and 1."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert QUOTA(tmp_path) == expected


QUOTA = machine.cpu_quota


def test_a_decoder_that_swaps_colours_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = loader.build_eval_loader

    def swapped(*arguments: Any, **options: Any) -> Iterator[Any]:
        for images, labels in whole(*arguments, **options):
            yield images.flip(1), labels

    monkeypatch.setattr(loader, "build_eval_loader", swapped)
    code, found = look()
    assert (code, found["decoder"].state) == (1, "fault")


# ---- the data ------------------------------------------------------------------------------------------------------


def truncate(folder: Path) -> None:
    tar = folder / "train-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-1024])


def mix_up(folder: Path) -> None:
    """An index of another shard, with as many samples."""
    shutil.copy(folder / "train-000003.tar.idx", folder / "train-000001.tar.idx")


def lose(folder: Path) -> None:
    (folder / "train-000002.tar").unlink()


def damage(folder: Path) -> None:
    (folder / "dataset.json").write_text("{}")


def flip(folder: Path) -> None:
    """One byte in the middle of the first image, which leaves every size as it was."""
    line = (folder / "train-000000.tar.idx").read_text().splitlines()[1].split(" ")
    at = line.index("png")
    tar = folder / "train-000000.tar"
    content = bytearray(tar.read_bytes())
    content[int(line[at + 1]) + int(line[at + 2]) // 2] ^= 0xFF
    tar.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (truncate, r"train-000001\.tar has \d+ bytes, expected \d+"),
        (mix_up, r"train-000001\.tar\.idx is stale"),
        (lose, r"train-000002\.tar cannot be read"),
        (damage, r"dataset\.json is damaged"),
        (flip, r"train-000000\.tar: its sha256 is not that of the tar that was written"),
    ],
)
def test_damaged_shards_are_named(spoil: Callable[[Path], None], named: str, sets: Path) -> None:
    """Those to train on as well as those to evaluate on; each with what to do."""
    spoil(sets / "train")
    code, found = look(sets / "train", "--eval-data", sets / "train")
    assert code == 1
    for check in ("shards", "evaluation shards"):
        assert found[check].state == "fault"
        assert re.search(named, found[check].found)
        assert "copy" in found[check].found + found[check].change


def test_shards_that_may_not_be_read_are_found(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, _: "000001" not in str(path))  # root could read them all the same
    found = look(made / "train")[1]
    assert found["shards"].state == "fault"
    assert "1 tars may not be read, train-000001.tar first" in found["shards"].found


def test_a_folder_without_shards_is_found(tmp_path: Path) -> None:
    code, found = look(tmp_path / "nowhere", *TINY)
    assert (code, found["shards"].state) == (1, "fault")
    assert "it does not exist" in found["shards"].found
    assert list(found) == [*MACHINE, "shards", "options", "memory", "checkpoints"]


@pytest.mark.parametrize(
    ("train", "test", "state", "named"),
    [
        ("train", "fewer", "fault", "label 9 is 'zigzags' and no class, in this order"),
        ("train", "unlabelled", "fault", "unlabelled has no labels"),
        ("unlabelled", "test", "fault", "unlabelled has no labels"),
        ("test", "test", "warning", "the same images"),
        ("train", "test", "ok", "10 classes, the same in both"),
    ],
)
def test_labels_fit_each_other(train: str, test: str, state: str, named: str, made: Path) -> None:
    finding = doctor.labels(read_dataset(made / train), read_dataset(made / test))
    assert finding.state == state
    assert named in finding.found
    assert bool(finding.change) == (state == "warning")  # a fault's own words say what to change


def test_classes_without_images_are_found(made: Path, tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(file, "PNG")
    samples = [Sample(f"{i}", 0, file.getvalue()) for i in range(3)]
    dataset = write_shards(samples, tmp_path / "set", classes=["cats", "dogs"])
    finding = doctor.labels(dataset, None)
    assert (finding.state, "'dogs'" in finding.found) == ("warning", True)
    assert doctor.labels(read_dataset(made / "unlabelled"), None).state == "ok"


def test_a_slow_disk_is_found_unless_memory_holds_the_shards(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = read_dataset(made / "train")
    total = sum(shard.bytes for shard in dataset.shards)
    monkeypatch.setattr(doctor, "read_rate", lambda _, *, forget: 1e6 if forget else 1e9)
    assert doctor.disk(dataset, images_per_s=0).state == "ok"
    assert doctor.disk(dataset, images_per_s=0.9e6 * TRAIN / total).state == "ok"
    fast = 1.1e6 * TRAIN / total
    assert "page cache" in doctor.disk(dataset, fast).found
    assert doctor.disk(dataset, fast).state == "ok"
    monkeypatch.setattr(machine, "available_memory", lambda: total)
    assert doctor.disk(dataset, fast).state == "warning"


# ---- the run -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named", "change"),
    [
        (["--batch-size", "128"], "70 samples, fewer than one batch of 128", ""),
        (["--processes", "3"], "16 does not divide into 3 processes", "--batch-size 15"),
        (["--micro-batch", "5"], "micro_batch 5 does not divide the 16 images", ""),
    ],
)
def test_batches_that_do_not_go_into_the_data_are_found(
    options: list[str], named: str, change: str, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "try_step", lambda *_: Finding("ok", ""))  # it is not looked at here
    code, found = look(made / "train", *TINY, *options)
    assert (code, found["steps"].state, found["steps"].change) == (1, "fault", change)
    assert named in found["steps"].found
    assert "speed" not in found


def test_an_epoch_that_leaves_much_out_is_found(made: Path) -> None:
    config = replace(RECIPES["demo"], batch_size=40)
    finding = trial.steps(read_dataset(made / "train"), config, processes=2)
    assert finding.state == "warning"
    assert "1 an epoch of 40 images, 20 for each of 2 processes; 30 of 70" in finding.found


def test_a_full_disk_and_a_batch_beyond_memory_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40 if "shm" in str(path) else 2**20)(path))
    monkeypatch.setattr(machine, "available_memory", lambda: 2**18)
    code, found = look("", "--out", tmp_path / "run", *TINY)
    assert code == 1
    assert (found["checkpoints"].state, found["memory"].state) == ("fault", "fault")
    assert "1 MiB are free" in found["checkpoints"].found
    assert "--keep 1" in found["checkpoints"].change
    assert re.fullmatch(r"--micro-batch [1248]", found["memory"].change)


def test_options_that_would_be_followed_in_name_only_are_a_fault() -> None:
    for change, words in (({"batch_size": 1}, "no negatives"), ({"track": "wandb"}, "pip install wandb")):
        finding = checked(trial.options, replace(RECIPES["demo"], **change), 1)
        assert (finding.state, words in finding.found) == ("fault", True)
    assert "1 image at a time" in checked(trial.options, replace(RECIPES["demo"], batch_size=4), 4).found
    assert trial.options(RECIPES["demo"], 1).state == "ok"


def test_a_step_that_cannot_be_made_is_a_fault() -> None:
    """In train.py's own words."""
    found = look(*TINY, "--sync-bn")[1]
    assert (found["step"].state, "--sync-bn needs GPUs" in found["step"].found) == ("fault", True)
    assert list(found) == [*MACHINE, "options", "step"]


def test_a_run_folder_that_cannot_be_made_is_found(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    tried = SimpleNamespace(training=SimpleNamespace(optimizer=SimpleNamespace(state={}), network=nn.Linear(2, 2)))
    finding = trial.checkpoints(tried, RECIPES["demo"], tmp_path / "file" / "run")  # type: ignore[arg-type]
    assert finding.state == "fault"
    assert trial.checkpoints(tried, RECIPES["demo"], tmp_path / "new" / "run").state == "ok"  # type: ignore[arg-type]


def test_a_loader_too_slow_for_the_network_is_found(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each batch of 16 takes a tenth of a second, so no more than 160 images a second can come of it."""
    whole = loader.Loader.__next__

    def slow(self: loader.Loader) -> loader.Batch:
        time.sleep(0.1)
        self._waited_s += 0.1
        return whole(self)

    monkeypatch.setattr(loader.Loader, "__next__", slow)
    monkeypatch.setattr(trial, "STEP_S", 60.0)
    finding = look(made / "train", *TINY)[1]["speed"]
    assert finding.state == "warning"
    assert "make_shards" in finding.change
    rates = re.search(r": (\S+) images/s, (\S+) the loader alone", finding.found)
    assert rates, finding.found
    assert float(rates[1]) <= 160
    assert float(rates[2]) <= 160


def test_the_time_of_a_run_is_that_of_its_images(made: Path) -> None:
    """4 processes at 50 images/s: 64 of 70 images an epoch in steps of 16; waiting a tenth of the time is too much."""
    dataset, config = read_dataset(made / "train"), replace(RECIPES["demo"], batch_size=16, epochs=1000)
    whole = Plan(4, 1, 1, False)
    tried = trial.Trial(SimpleNamespace(plan=whole), whole, 55.0, 0.0)  # type: ignore[arg-type]
    finding = trial.speed(trial.Pace(200.0, 50.0, 0.02), tried, dataset, config, processes=4)
    assert finding.state == "ok"
    assert "about 0.32 s an epoch, 5.33 min for all 4000 steps: 200 images/s, 800 the loader" in finding.found
    assert "220 the network alone; waits for images 2% of the time; 4 processes reckoned from one" in finding.found
    tried = replace(tried, part=Plan(2, 1, 1, False))
    found = trial.speed(trial.Pace(200, 50, 0), tried, dataset, config, 4).found
    assert found.startswith("at most 0.32 s an epoch")
    assert "steps of 2 images instead of 4" in found
    config = replace(config, steps=10)
    assert "0.8 s for all 10 steps" in trial.speed(trial.Pace(200.0, 50.0, 0.2), tried, dataset, config, 4).found
    assert trial.speed(trial.Pace(200.0, 50.0, 0.2), tried, dataset, config, 4).state == "warning"


@pytest.mark.parametrize(
    ("seconds", "told"), [(0.5, "0.5 s"), (119, "119 s"), (600, "10 min"), (9000, "2.5 h"), (259200, "3 days")]
)
def test_spans_are_told_in_a_fitting_unit(seconds: float, told: str) -> None:
    assert trial.span(seconds) == told


def test_what_a_graph_holds_is_counted() -> None:
    """A product keeps its input, a ReLU its result; the gradient of the weights needs no more."""
    model = nn.Sequential(nn.Linear(10, 20, bias=False), nn.ReLU())
    for rows in (1, 2, 7):
        assert trial.graph_bytes(model, torch.randn(rows, 10)) == 4 * rows * (10 + 20)


@pytest.mark.parametrize(
    "plan", [Plan(512, 1, 1, False), Plan(96, 5, 3, True), Plan(1, 64, 1, True), Plan(2, 1, 1, False)]
)
def test_parts_of_a_batch_grow_to_the_whole(plan: Plan) -> None:
    parts = list(trial.parts_of(plan))
    sizes = [part.micro_batch * part.count for part in parts]
    assert sizes[0] <= 8
    assert all(a < b <= 2 * a + 2 * plan.micro_batch for a, b in zip(sizes, sizes[1:], strict=False))
    assert parts[-1] == plan
    assert all(1 <= part.keep <= part.count for part in parts)


# ---- the command line ----------------------------------------------------------------------------------------------


def test_every_option_of_a_training_may_follow(tmp_path: Path) -> None:
    """As train.py itself would understand them, its file of options included."""
    (tmp_path / "run.toml").write_text("depth = 34\n[views]\nsize = 48\n")
    options = ["--batch-size", "64", "--view", "flip_p=0.0", "--config", str(tmp_path / "run.toml")]
    recipe = RECIPES["cifar10"]
    expected = replace(recipe, views=replace(recipe.views, size=48, flip_p=0.0), depth=34, batch_size=64)
    words = ["cifar10", "--data", "a", "--eval-data", "b", *options]
    assert config_of(words) == replace(expected, data="a", eval_data="b")


def test_shards_are_looked_at_wherever_they_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the first argument, in train.py's option, or in its file."""
    seen: list[tuple[str, str, int]] = []
    monkeypatch.setattr(doctor, "examine", lambda a, b, config, *_: seen.append((a, b, config.batch_size)) or [])
    (tmp_path / "run.toml").write_text('data = "here"\neval_data = "there"\nbatch_size = 7\n')
    for arguments in (
        ["here", "--eval-data", "there", "--batch-size", "7"],
        ["--batch-size", "7", "--data", "here", "--eval-data", "there"],
        ["--config", str(tmp_path / "run.toml")],
    ):
        done = CliRunner().invoke(doctor.app, [*arguments, "--recipe", "cifar10"])
        assert done.exit_code == 0, done.output
    assert seen == [("here", "there", 7)] * 3


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--recipe", "mnist"], "unknown recipe"),
        (["x", "--recipe", "demo", "--procesess", "2"], "--procesess"),
        (["x", "--batch-size", "2"], "need --recipe"),
        (["x", "--processes", "0"], "--processes"),
    ],
)
def test_a_wrong_option_ends_in_one_message(arguments: list[str], named: str) -> None:
    done = CliRunner().invoke(doctor.app, arguments)
    assert done.exit_code == 2
    assert named in done.stderr


def test_it_refuses_to_be_launched_many_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = CliRunner().invoke(doctor.app, [])
    assert done.exit_code == 2
    assert "--processes" in done.stderr
