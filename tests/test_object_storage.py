"""A data set is read from s3://, gs:// and http:// as from a folder; what cannot be reached is one clear error."""

import hashlib
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import tools.evaluate
import tools.make_shards
from model.encoder import build_encoder
from model.encoder_file import export_encoder
from pipeline.audit import verify
from pipeline.labels import labels
from pipeline.loader import Loader, LoaderError, build_eval_loader
from pipeline.shards import Dataset, DatasetError, Sample, read_dataset
from pipeline.store import address, fetch, opened, read_ranges
from pipeline.subset import keys, named, stratified, subset
from pipeline.write import write_shards
from tests import test_ugly
from tests.slow_store import slow_store
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
    """A bucket, served on loopback by a process."""

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
def files(folder: Path, kind: str) -> Iterator[Store]:
    """A folder behind our slow store, as Google's storage or as a plain server of files."""

    def put(key: str, content: bytes) -> None:
        (folder / "bucket" / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / "bucket" / key).write_bytes(content)

    with slow_store(folder) as server:
        os.environ.update(GOOGLE_BASE_URL=server.url, GOOGLE_SKIP_SIGNATURE="true")
        place = "gs://bucket" if kind == "gs" else f"{server.url}/bucket"
        yield Store(place, put, lambda key: (folder / "bucket" / key).unlink())


@pytest.fixture(scope="module", params=["s3", "gs", "http"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    before = dict(os.environ)
    with s3() if request.param == "s3" else files(tmp_path_factory.mktemp("bucket"), request.param) as bucket:
        yield bucket
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
    assert place.endswith("/bucket/a folder/set")
    for path in (place, Path(place), f"{place}/"):
        read = read_dataset(path)
        assert (read.fingerprint, read.shards) == (local.fingerprint, local.shards)
        assert read.address == place
        assert read.tars[0] == f"{place}/{local.shards[0].file}"


@pytest.mark.parametrize("path", ["/a/b", "a/b", "s3/a", "./s3:/a", "gs/a", "https/a"])
def test_a_local_path_is_its_own_address(path: str) -> None:
    assert address(path) == path


def test_many_files_come_in_order(store: Store) -> None:
    """More than there are connections, of different sizes, the empty one included."""
    contents = [b"%d" % i * i for i in range(1, 37)]
    for i, content in enumerate(contents):
        store.put(f"many/{i}", content)
    assert fetch([f"{store.address}/many/{i}" for i in range(36)]) == contents


def test_parts_of_a_file_come_in_order(store: Store, tmp_path: Path) -> None:
    """Near each other or far apart, in any order, overlapping, empty; as from a file on disk."""
    content = random.Random(0).randbytes(12 << 20)
    (tmp_path / "file").write_bytes(content)
    store.put("parts/file", content)
    offsets, sizes = [11 << 20, 5, 0, 9, len(content), 3 << 20, 7, 0], [1 << 20, 10, 4, 0, 0, 2 << 20, 100, 12 << 20]
    expected = [content[offset:][:size] for offset, size in zip(offsets, sizes, strict=True)]
    for place in (f"{store.address}/parts/file", str(tmp_path / "file")):
        assert read_ranges(place, offsets, sizes) == expected
        assert read_ranges(place, [], []) == []
        for offset in (len(content) - 5, len(content) + 5):
            with pytest.raises(OSError, match=f"{place}.* byte {offset} ") as caught:
                read_ranges(place, [0, offset], [4, 10])
            assert not isinstance(caught.value, FileNotFoundError)


def test_an_opened_file_reads_and_seeks_as_one_on_disk(store: Store, tmp_path: Path) -> None:
    content = random.Random(1).randbytes((9 << 20) + 123)
    (tmp_path / "file").write_bytes(content)
    store.put("opened/file", content)
    for place in (f"{store.address}/opened/file", str(tmp_path / "file")):
        with opened(place) as file:
            assert file.seek(0, os.SEEK_END) == len(content)
            assert file.read(1) == b""
            file.seek(0)
            assert hashlib.file_digest(file, "sha256").digest() == hashlib.sha256(content).digest()
            for offset, size in ((5 << 20, 7), (3, 9), ((4 << 20) - 5, 10), (8 << 20, 2 << 20)):
                assert file.seek(offset) == offset
                assert file.read(size) == content[offset:][:size]
            file.seek(-5, os.SEEK_END)
            assert file.read() == content[-5:]
        with pytest.raises(FileNotFoundError):
            opened(place.replace("file", "none"))


def test_a_missing_file_is_a_file_not_found_error(store: Store, tmp_path: Path) -> None:
    for place in (f"{store.address}/none", str(tmp_path / "none")):
        with pytest.raises(FileNotFoundError, match=place):
            fetch([place])


def test_a_missing_bucket_or_prefix_is_one_message_with_what_to_check(store: Store) -> None:
    for place in (f"{store.address}-2/set", f"{store.address}/other", store.address):
        with pytest.raises(DatasetError, match=f"cannot read {place}/dataset.json.*Check the address") as caught:
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
                said = f"cannot be read .*/damaged/{i}/{ours.shard} is not there.* Check the address"
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
    temporary = Path(tempfile.mkdtemp(dir=tmp_path.parent))  # a short path, for the sockets of processes lie in it
    environment = os.environ | {"TMPDIR": str(temporary)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
    assert done.returncode == 1, done.stderr
    assert "make_shards:" not in done.stderr  # it has found faults, it has not failed
    assert f"{place}: 2 faults in 16 samples in {len(local.shards)} shards" in done.stdout
    assert f"{shard}: its sha256 is not that of the tar that was written" in done.stdout
    assert {file.name for file in tmp_path.iterdir()} == {"report"}
    assert not list(temporary.iterdir())
    refused = CliRunner().invoke(tools.make_shards.app, ["quarantine", place, "--from", str(tmp_path / "report")])
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert f"{place} is only read: leave samples out of a copy on disk" in refused.stderr


# ---- credentials, and no answer


def test_credentials_come_from_a_profile_where_the_environment_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """obstore does not read ~/.aws; boto3 does. What is in the environment comes first."""
    pytest.importorskip("boto3")
    (tmp_path / "credentials").write_text("[other]\naws_access_key_id = OFPROFILE\naws_secret_access_key = secret\n")
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_PROFILE", "other")
    seen: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            for _ in range(2):
                connection, _ = server.accept()
                with connection:
                    seen.append(connection.recv(1 << 16).decode())
                    connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        Thread(target=answer, daemon=True).start()
        for key in ("OFPROFILE", "OFENVIRONMENT"):
            if key == "OFENVIRONMENT":
                monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
                monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
            with pytest.raises(PermissionError, match="s3://bucket/file cannot be read.*403.*AWS_ACCESS_KEY_ID"):
                fetch(["s3://bucket/file"])
            assert f"Credential={key}/" in seen[-1]


def test_without_obstore_an_address_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(OSError, match=r"s3://elsewhere is read through obstore.*pip install obstore"):
        fetch(["s3://elsewhere/file"])


@pytest.mark.parametrize("kind", ["s3", "gs", "http"])
@pytest.mark.parametrize("silent", [False, True])
def test_a_store_that_does_not_answer_is_an_error_and_no_hang(
    kind: str, silent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A closed port, and one that takes connections and says nothing: an error after the stated time."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        if not silent:
            server.close()
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "user")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("GOOGLE_BASE_URL", url)
        monkeypatch.setenv("GOOGLE_SKIP_SIGNATURE", "true")
        monkeypatch.setattr("pipeline.shards.fetch", partial(fetch, patience_s=1.0))
        place = f"{url}/bucket/set" if kind == "http" else f"{kind}://bucket/set"
        complaint = "no answer" if silent else "Connection refused"
        start = time.monotonic()
        with pytest.raises(DatasetError, match=f"cannot read {place}/dataset.json.*tried for 1 s.*{complaint}"):
            read_dataset(place)
        assert 0.9 < time.monotonic() - start < 5


# ---- through the loader


def test_training_and_evaluation_read_the_same_bits_as_from_the_folder(remote: Dataset, local: Dataset) -> None:
    """Views and labels of two epochs, from a restored position on too; a position is good for either place."""
    here, there = (Loader(data, TINY, 6, CPU, num_threads=1) for data in (local, remote))
    for i in range(4):
        if i == 3:
            state = here.state_dict()
            there = Loader(remote, TINY, 6, CPU, num_threads=1)
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
    batches = Loader(data, TINY, 16, CPU, num_threads=1)
    with pytest.raises(LoaderError, match=shard):
        next(batches)


# ---- parts of a data set, and evaluations


def test_a_subset_of_it_is_that_of_the_folder(remote: Dataset, local: Dataset) -> None:
    """Keys, labels, names, and what the loader reads through indexes on the disk of tars in the store."""
    assert keys(remote) == keys(local)
    np.testing.assert_array_equal(labels(remote), labels(local))
    chosen = stratified(labels(remote), 0.5, seed=1)
    np.testing.assert_array_equal(named(remote, [keys(local)[i] for i in chosen]), chosen)
    pairs = []
    for data in (local, remote):
        part = subset(data, chosen)
        assert part.samples == 8
        assert keys(part) == [keys(local)[i] for i in chosen]
        np.testing.assert_array_equal(labels(part), labels(local)[chosen])
        pairs.append(list(build_eval_loader(part, TINY, 5, CPU)))
    for (images, digits), (others, found) in zip(*pairs, strict=True):
        assert torch.equal(images, others)
        assert torch.equal(digits, found)


def test_evaluations_read_it_as_they_read_the_folder(remote: Dataset, local: Dataset, tmp_path: Path) -> None:
    """The features of all and the fine-tuning on a share of it, from the command line."""
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
