"""A data set is read from s3:// and gs:// as from a folder, bit by bit; what cannot be reached is one clear error."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import tools.evaluate
import tools.make_shards
from model.checkpoint import export_encoder
from model.encoder import build_encoder
from pipeline.audit import verify
from pipeline.loader import LoaderError, build_eval_loader, build_loader
from pipeline.shards import Dataset, DatasetError, Sample, read_dataset
from pipeline.store import address, fetch
from pipeline.subset import keys, labels, named, stratified, write_subset
from pipeline.write import write_shards
from tests import test_ugly
from tests.test_loader import TINY, noise

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")

SERVE_S3 = """
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
input()
"""


@dataclass(frozen=True)
class Store:
    """A bucket, served on loopback by a process: while DALI builds a pipeline no thread of this one could answer."""

    address: str
    put: Callable[[str, bytes], object]
    delete: Callable[[str], object]

    def upload(self, folder: Path, prefix: str) -> str:
        for file in folder.iterdir():
            self.put(f"{prefix}/{file.name}", file.read_bytes())
        return f"{self.address}/{prefix}"


@contextmanager
def serving(command: Sequence[object]) -> Iterator[str]:
    """The address of a server that prints its port and ends with its input."""
    arguments = [sys.executable, *map(str, command)]
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT
    ) as server:
        assert server.stdout is not None
        yield f"http://127.0.0.1:{int(server.stdout.readline())}"
        server.communicate(b"\n")


@contextmanager
def s3() -> Iterator[Store]:
    """moto's S3 server."""
    pytest.importorskip("moto", reason="moto, a local S3 server, comes with the extra 'test'")
    import boto3

    with serving(["-c", SERVE_S3]) as url:
        os.environ.update(
            AWS_ENDPOINT_URL=url,
            AWS_ACCESS_KEY_ID="user",
            AWS_SECRET_ACCESS_KEY="secret",
            AWS_DEFAULT_REGION="us-east-1",
            AWS_EC2_METADATA_DISABLED="true",
        )
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        yield Store(
            "s3://bucket",
            lambda key, content: client.put_object(Bucket="bucket", Key=key, Body=content),
            lambda key: client.delete_object(Bucket="bucket", Key=key),
        )


@contextmanager
def gs(folder: Path) -> Iterator[Store]:
    """Our stand-in for Google's."""

    def put(key: str, content: bytes) -> None:
        (folder / "bucket" / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / "bucket" / key).write_bytes(content)

    with serving(["-m", "tests.google_storage", folder]) as url:
        os.environ.update(DALI_GCS_ENDPOINT_URL=url, DALI_GCS_ANONYMOUS="1")
        yield Store("gs://bucket", put, lambda key: (folder / "bucket" / key).unlink())


@pytest.fixture(scope="module", params=["s3", "gs"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    before = dict(os.environ)  # DALI reads them once per process, when it meets its first address of a kind
    with s3() if request.param == "s3" else gs(tmp_path_factory.mktemp("gs")) as opened:
        yield opened
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """16 images of 4 classes in shards of at most 5."""
    samples = [Sample(f"{i}", i % 4, noise(i)) for i in range(16)]
    return write_shards(samples, tmp_path_factory.mktemp("local") / "set", classes=list("abcd"), shard_size=5)


@pytest.fixture(scope="module")
def remote(store: Store, local: Dataset) -> Dataset:
    return read_dataset(store.upload(local.root, "a folder/set"))


def test_the_manifest_is_that_of_the_folder(remote: Dataset, local: Dataset) -> None:
    """Also where the address went through pathlib, which folds its slashes, as a command line's argument does."""
    place = remote.address
    assert place.endswith("://bucket/a folder/set")
    for path in (place, Path(place), f"{place}/"):
        read = read_dataset(path)
        assert (read.fingerprint, read.shards) == (local.fingerprint, local.shards)
        assert read.address == place
        assert read.tars[0] == f"{place}/{local.shards[0].file}"


@pytest.mark.parametrize("path", ["/a/b", "a/b", "s3/a", "./s3:/a", "gs/a"])
def test_a_local_path_is_its_own_address(path: str) -> None:
    assert address(path) == path


def test_training_and_evaluation_read_the_same_bits_as_from_the_folder(remote: Dataset, local: Dataset) -> None:
    """Views and labels of two epochs, from a restored position on too; a position is good for either place."""
    here, there = (build_loader(data, TINY, 6, CPU, num_threads=1, shuffle=6) for data in (local, remote))
    for i in range(4):
        if i == 3:
            state = here.state_dict()
            there = build_loader(remote, TINY, 6, CPU, num_threads=1, shuffle=6)
            there.load_state_dict(state)
        a, b = next(here), next(there)
        assert torch.equal(a.views, b.views)
        assert a.labels is not None
        assert b.labels is not None
        assert torch.equal(a.labels, b.labels)
    for rank in range(2):
        pairs = [build_eval_loader(data, TINY, 5, CPU, rank=rank, world_size=2) for data in (local, remote)]
        for (images, digits), (others, found) in zip(*pairs, strict=True):
            assert torch.equal(images, others)
            assert torch.equal(digits, found)


def test_many_files_come_in_order(store: Store) -> None:
    """More than there are connections, of different sizes, the empty one included."""
    contents = [b"%d" % i * i for i in range(1, 37)]
    for i, content in enumerate(contents):
        store.put(f"many/{i}", content)
    assert fetch([f"{store.address}/many/{i}" for i in range(36)]) == contents


def test_a_missing_bucket_or_prefix_is_one_message_with_what_to_check(store: Store) -> None:
    kind = store.address.partition(":")[0]
    for place in (f"{kind}://other/set", f"{kind}://bucket/other", f"{kind}://bucket"):
        with pytest.raises(DatasetError, match=f"cannot read {place}/dataset.json.*Check .* credentials") as caught:
            read_dataset(place)
        assert "\n" not in str(caught.value)


def damage_manifest(store: Store, _: Dataset) -> str:
    store.put("bad/dataset.json", b"{")
    return "bad/dataset.json is damaged"


def swap_index(store: Store, data: Dataset) -> str:
    store.put(f"bad/{data.shards[1].file}.idx", b"v1.2 1\n")
    return f"{data.shards[1].file}.idx .*expected"


def remove_index(store: Store, data: Dataset) -> str:
    store.delete(f"bad/{data.shards[1].file}.idx")
    return rf"{data.shards[1].file}.idx.*Check the address"


@pytest.mark.parametrize("damage", [damage_manifest, swap_index, remove_index])
def test_a_manifest_or_index_that_is_not_the_one_written_is_named(
    store: Store, local: Dataset, damage: Callable[[Store, Dataset], str]
) -> None:
    place = store.upload(local.root, "bad")
    message = damage(store, local)
    with pytest.raises(DatasetError, match=message):
        read_dataset(place)


@pytest.mark.parametrize("kind", ["missing", "cut off", "damaged"])
def test_a_tar_that_cannot_be_read_ends_in_a_loader_error_naming_it(store: Store, local: Dataset, kind: str) -> None:
    data = read_dataset(store.upload(local.root, "tars"))
    shard = local.shards[1].file
    content = (local.root / shard).read_bytes()
    if kind == "missing":
        store.delete(f"tars/{shard}")
    elif kind == "cut off":
        store.put(f"tars/{shard}", content[:1024])
    else:
        store.put(f"tars/{shard}", content.replace(b"IHDR", b"IXXX"))
    batches = build_loader(data, TINY, 16, CPU, num_threads=1, shuffle=6)
    with pytest.raises(LoaderError, match=shard):
        next(batches)


# ---- verified in place


DAMAGES = [
    [test_ugly.spoil_image, test_ugly.large_label, test_ugly.no_tar],
    [test_ugly.truncate, test_ugly.garbage_index],
    [test_ugly.stale_index, test_ugly.empty_index],
]


def test_verify_finds_there_what_it_finds_in_the_folder(store: Store, tmp_path: Path) -> None:
    """No fault in a whole set; and in damaged ones the same faults, down to the words."""
    whole = test_ugly.whole(tmp_path / "whole")
    calls: list[tuple[int, int]] = []
    place = store.upload(whole.root, "whole")
    assert verify(place, images=True, progress=lambda *done: calls.append(done)) == []
    assert calls == [(5, 20), (10, 20), (15, 20), (20, 20)]
    for i, damages in enumerate(DAMAGES):
        dataset = test_ugly.whole(tmp_path / f"{i}")
        missing = {shard for damage in damages for shard, _ in [damage(dataset)] if damage is test_ugly.no_tar}
        place = store.upload(dataset.root, f"damaged/{i}")
        here, there = verify(dataset.root), verify(place)
        assert [(each.shard, each.key) for each in there] == [(each.shard, each.key) for each in here] != []
        for ours, theirs in zip(here, there, strict=True):
            if ours.shard in missing:
                said = f"cannot be read .* object=damaged/{i}/{ours.shard}.* Check the address"
                assert re.search(said, theirs.problem), theirs.problem
            else:
                assert theirs.problem == ours.problem.replace(str(dataset.root), place)


@pytest.mark.parametrize("store", ["gs"], indirect=True)
def test_verify_s_command_takes_the_address_and_leaves_nothing_on_the_disk(
    store: Store, local: Dataset, tmp_path: Path
) -> None:
    """From two processes; what it names is then left out of a copy on disk, for nothing is written to a store."""
    place = store.upload(local.root, "audited")
    shard = local.shards[1].file
    store.put(f"audited/{shard}", (local.root / shard).read_bytes().replace(b"IHDR", b"IXXX", 1))
    command = [sys.executable, ROOT / "tools/make_shards.py", "verify", place, "--workers", "2", "--report", "report"]
    (tmp_path / "temporary").mkdir()
    environment = os.environ | {"TMPDIR": str(tmp_path / "temporary")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
    assert done.returncode == 1, done.stderr
    assert "make_shards:" not in done.stderr  # it has found faults, it has not failed
    assert f"{place}: 2 faults in 16 samples in {len(local.shards)} shards" in done.stdout
    assert f"{shard}: its sha256 is not that of the tar that was written" in done.stdout
    assert {file.name for file in tmp_path.iterdir()} == {"temporary", "report"}
    assert not list((tmp_path / "temporary").iterdir())
    refused = CliRunner().invoke(tools.make_shards.app, ["quarantine", place, "--from", str(tmp_path / "report")])
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert f"{place} is only read: leave samples out of a copy on disk" in refused.stderr


# ---- parts of a data set, and evaluations


def test_a_subset_of_it_is_that_of_the_folder(remote: Dataset, local: Dataset, tmp_path: Path) -> None:
    """Keys, labels, names, and what the loader reads through indexes on the disk of tars in the store."""
    assert keys(remote) == keys(local)
    np.testing.assert_array_equal(labels(remote), labels(local))
    chosen = stratified(labels(remote), 0.5, seed=1)
    np.testing.assert_array_equal(named(remote, [keys(local)[i] for i in chosen]), chosen)
    pairs = []
    for name, data in (("local", local), ("remote", remote)):
        (tmp_path / name).mkdir()
        subset = write_subset(data, chosen, tmp_path / name)
        assert subset.samples == 8
        assert keys(subset) == [keys(local)[i] for i in chosen]
        np.testing.assert_array_equal(labels(subset), labels(local)[chosen])
        pairs.append(list(build_eval_loader(subset, TINY, 5, CPU)))
    for (images, digits), (others, found) in zip(*pairs, strict=True):
        assert torch.equal(images, others)
        assert torch.equal(digits, found)


def test_evaluations_read_it_as_they_read_the_folder(
    remote: Dataset, local: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The features of all and the fine-tuning on a share of it, from the command line."""
    monkeypatch.setattr("pipeline.loader.build_loader", partial(build_loader, shuffle=6))  # 2048 are as many requests
    torch.manual_seed(0)
    facts = {"mean": TINY.mean, "std": TINY.std, "interpolation": "bilinear", "crop_pct": 1.0}
    export_encoder(tmp_path / "encoder", build_encoder(18, width=0.125), image_size=8, **facts, training={})

    def run(*words: object) -> None:
        done = CliRunner().invoke(tools.evaluate.app, list(map(str, words)))
        assert done.exit_code == 0, done.output

    found, curves = [], []
    for name, data in (("local", local), ("remote", remote)):
        run("embed", tmp_path / "encoder", data.address, tmp_path / f"{name}.npz")
        found.append(np.load(tmp_path / f"{name}.npz"))
        words = ("--percent", 50, "--epochs", 1, "--train-batch", 4, "--results", tmp_path / name)
        run("finetune", tmp_path / "encoder", data.address, data.address, *words)
        curves.append(json.loads((tmp_path / name).read_text())["curves"])
    for name in ("features", "labels", "keys"):
        np.testing.assert_array_equal(found[0][name], found[1][name])
    assert curves[0] == curves[1]


# ---- no answer


READ = "import sys; from pipeline.shards import read_dataset; read_dataset(sys.argv[1])"


@pytest.mark.parametrize("kind", ["s3", "gs"])
@pytest.mark.parametrize(("silent", "command"), [(False, ["tools/make_shards.py", "verify"]), (True, ["-c", READ])])
def test_a_store_that_does_not_answer_is_an_error_and_no_hang(kind: str, silent: bool, command: list[str]) -> None:
    """A closed port, and one that takes connections and says nothing; in another process: a client is made once."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        if not silent:
            server.close()
        environment = os.environ | {"AWS_ENDPOINT_URL": url, "AWS_EC2_METADATA_DISABLED": "true"}
        environment |= {"AWS_ACCESS_KEY_ID": "user", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_MAX_ATTEMPTS": "2"}
        environment |= {"DALI_GCS_ENDPOINT_URL": url, "DALI_GCS_ANONYMOUS": "1", "DALI_GCS_REQUEST_TIMEOUT_SEC": "2"}
        done = subprocess.run(
            [sys.executable, *command, f"{kind}://bucket/set"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            cwd=ROOT,
        )
    assert done.returncode == (1 if silent else 2)
    assert f"cannot read {kind}://bucket/set/dataset.json" in done.stderr
