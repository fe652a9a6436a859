"""Training from object storage: the batches of the folder, each node fetching its part of the shards, once."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import train
from pipeline.cache import Cache
from pipeline.loader import Loader
from pipeline.shards import Dataset, read_dataset
from tests.slow_store import SlowStore, slow_store
from tests.test_loader import TINY, global_batches, noise, write
from tests.test_train import TINY as SMALL_RUN

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
SHARDS, BATCH = 40, 16


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """320 images in 40 shards of 8, and so 20 batches of 16."""
    return write(tmp_path_factory.mktemp("store") / "set", [noise(i) for i in range(8 * SHARDS)], shard_size=8)


@pytest.fixture
def store(local: Dataset) -> Iterator[SlowStore]:
    with slow_store(local.root.parent) as opened:
        yield opened


def remote(store: SlowStore) -> Dataset:
    return read_dataset(f"{store.url}/set")


def node(store: SlowStore, folder: Path, rank: int, world_size: int, gib: float = 1.0, **options: int) -> Loader:
    """One node with one process and a cache of its own."""
    cache = Cache(folder, int(gib * 2**30), patience_s=20)
    options = {"window": 4, "lanes": 4, "seed": 5, "num_threads": 1} | options
    return Loader(remote(store), TINY, BATCH, CPU, rank=rank, world_size=world_size, cache=cache, **options)


def fetched(store: SlowStore) -> int:
    """Bytes of tars that the store has sent."""
    return sum(sent for path, (_, sent) in store.counts().items() if path.endswith(".tar"))


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_each_node_fetches_its_share_of_the_shards_once(
    store: SlowStore, local: Dataset, tmp_path: Path, nodes: int
) -> None:
    """Two epochs of one order, whatever the number of nodes: that of the folder. In the second nothing is fetched."""
    total = sum(shard.bytes for shard in local.shards)
    loaders = [node(store, tmp_path / f"{rank}", rank, nodes) for rank in range(nodes)]
    steps = loaders[0].steps_per_epoch
    here = Loader(local, TINY, BATCH, CPU, seed=5, num_threads=1, window=4, lanes=4)
    expected, made = global_batches([here], 2 * steps), global_batches(loaders, 2 * steps)
    assert made[0] == expected[0]
    assert all(map(torch.equal, made[1], expected[1]))
    for loader in loaders:
        assert loader._cache is not None
        assert 0.9 * total / nodes <= loader._cache.stats.bytes_fetched <= 1.1 * total / nodes
    assert total <= fetched(store) <= 1.1 * total


def test_processes_of_a_node_fetch_no_shard_twice(store: SlowStore, local: Dataset, tmp_path: Path) -> None:
    """Four ranks that share a folder, and lanes too."""
    loaders = [node(store, tmp_path / "cache", rank, 4, lanes=2) for rank in range(4)]
    keys, _ = global_batches(loaders, loaders[0].steps_per_epoch)
    assert len({sample for _, _, samples in keys for sample in samples}) == 8 * SHARDS
    assert fetched(store) == sum(shard.bytes for shard in local.shards)


def test_a_cache_smaller_than_the_data_set_serves_it(store: SlowStore, local: Dataset, tmp_path: Path) -> None:
    """One lane in windows of 3 of 40 shards, a cache of 10: two epochs fetch everything about twice."""
    total, most = sum(shard.bytes for shard in local.shards), 10 * local.shards[0].bytes
    loader = node(store, tmp_path, 0, 1, most / 2**30, window=3, lanes=1)
    here = Loader(local, TINY, BATCH, CPU, seed=5, num_threads=1, window=3)
    steps = 2 * loader.steps_per_epoch
    assert global_batches([loader], steps)[0] == global_batches([here], steps)[0]
    assert sum(path.stat().st_size for path in tmp_path.glob("*.shard")) <= most
    assert 1.5 * total <= fetched(store) <= 2.5 * total  # with what is read ahead at the end


def test_a_store_that_dies_and_comes_back_loses_nothing(store: SlowStore, local: Dataset, tmp_path: Path) -> None:
    loader = node(store, tmp_path, 0, 1, window=2, lanes=1)
    here = Loader(local, TINY, BATCH, CPU, seed=5, num_threads=1, window=2)
    steps = loader.steps_per_epoch
    found, made = global_batches([loader], 4)
    store.kill()
    time.sleep(1)
    store.start()
    more, shown = global_batches([loader], steps - 4)
    expected = global_batches([here], steps)
    assert (found + more) == expected[0]
    assert all(map(torch.equal, made + shown, expected[1]))


LOAD = """
import sys, torch
from pipeline.cache import Cache
from pipeline.loader import Loader
from pipeline.shards import read_dataset
from pipeline.views import make_views

options = {"window": 2, "cache": Cache(sys.argv[2], 2**30)}
for batch in Loader(read_dataset(sys.argv[1]), make_views("cifar", {"size": 8}), 16, torch.device("cpu"), **options):
    print(batch.position, flush=True)
"""


def test_ctrl_c_ends_a_loader_that_waits_for_a_store(store: SlowStore, tmp_path: Path) -> None:
    """Not after the five minutes for which requests are tried again."""
    command = [sys.executable, "-c", LOAD, f"{store.url}/set", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "0\n"
        store.kill()
        time.sleep(3)  # what had come by then has been used
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert time.monotonic() - start < 10
        assert "KeyboardInterrupt" in said


def test_a_run_trains_from_a_store_and_goes_on_from_the_folder(
    store: SlowStore, local: Dataset, tmp_path: Path
) -> None:
    """The command line: the order of a run stays what it was where it began, wherever its shards are read from."""
    out, common = tmp_path / "run", ["--steps", "8", "--checkpoint-every", "4", "--keep", "4", "--log-every", "1"]
    place = f"{store.url}/set"

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(train.app, [*SMALL_RUN, *common, *arguments])
        assert done.exit_code == 0, done.output
        return done.output

    run("--data", place, "--out", str(out), "--cache", str(tmp_path / "cache"), "--window", "4")
    whole = (out / "metrics.jsonl").read_text()
    for folder in (out / "checkpoints").glob("*8"):
        folder.rename(tmp_path / folder.name)
    run("--data", str(local.root), "--out", str(out), "--resume")
    assert (out / "metrics.jsonl").read_text() == whole
    config = json.loads((out / "config.json").read_text())
    assert (config["window"], config["lanes"]) == (4, 1)


def test_a_cache_without_room_for_two_windows_is_refused(store: SlowStore, tmp_path: Path) -> None:
    arguments = ["--data", f"{store.url}/set", "--out", str(tmp_path / "run"), "--cache-gib", "0.0001"]
    done = CliRunner().invoke(train.app, [*SMALL_RUN, *arguments])
    assert (done.exit_code, "--cache-gib 0.0001 is too little" in done.output) == (2, True), done.output
