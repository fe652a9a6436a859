"""A data set is read from s3:// as from a folder, bit by bit, and what cannot be reached is one clear error."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.loader import LoaderError, build_eval_loader, build_loader
from pipeline.shards import Dataset, DatasetError, read_dataset
from pipeline.store import address, fetch
from tests.test_loader import TINY, noise, write

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
BUCKET = "s3://bucket/a folder/set"

pytest.importorskip("moto", reason="moto, a local S3 server, comes with the extra 'test'")


SERVE = """
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
input()
"""


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    """boto3's client of an S3 server on loopback, which DALI finds by AWS_ENDPOINT_URL.

    The server is a process: while DALI builds a pipeline it holds the interpreter, and no thread of ours could answer.
    """
    import boto3

    command = [sys.executable, "-c", SERVE]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert server.stdout is not None
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{int(server.stdout.readline())}",
        "AWS_ACCESS_KEY_ID": "user",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = dict(os.environ)
    os.environ.update(settings)  # DALI reads them once per process, when it meets its first s3:// address
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    yield client
    os.environ.clear()
    os.environ.update(before)
    server.communicate(b"\n")


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write(tmp_path_factory.mktemp("local") / "set", [noise(i) for i in range(16)])


@pytest.fixture(scope="module")
def remote(s3: Any, local: Dataset) -> Dataset:
    upload(s3, local.root, "a folder/set")
    return read_dataset(BUCKET)


def upload(s3: Any, folder: Path, prefix: str) -> None:
    for file in folder.iterdir():
        s3.put_object(Bucket="bucket", Key=f"{prefix}/{file.name}", Body=file.read_bytes())


@pytest.mark.usefixtures("remote")
@pytest.mark.parametrize("path", [BUCKET, Path(BUCKET), BUCKET + "/"])
def test_the_manifest_is_that_of_the_folder(local: Dataset, path: str | Path) -> None:
    """Also where the address went through pathlib, which folds its slashes, as a command line's argument does."""
    read = read_dataset(path)
    assert (read.fingerprint, read.shards) == (local.fingerprint, local.shards)
    assert read.address == BUCKET
    assert read.tars[0] == f"{BUCKET}/{local.shards[0].file}"


@pytest.mark.parametrize("path", ["/a/b", "a/b", "s3/a", "./s3:/a"])
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
        for (images, labels), (others, digits) in zip(*pairs, strict=True):
            assert torch.equal(images, others)
            assert torch.equal(labels, digits)


def test_many_files_come_in_order(s3: Any) -> None:
    """More than there are connections, of different sizes, the empty one included."""
    contents = [b"%d" % i * i for i in range(1, 37)]
    for i, content in enumerate(contents):
        s3.put_object(Bucket="bucket", Key=f"many/{i}", Body=content)
    assert fetch([f"s3://bucket/many/{i}" for i in range(36)]) == contents


@pytest.mark.usefixtures("remote")
def test_a_missing_bucket_or_prefix_is_one_message_with_what_to_check() -> None:
    for place in ("s3://other/set", "s3://bucket/other", "s3://bucket"):
        with pytest.raises(DatasetError, match=f"cannot read {place}/dataset.json.*AWS_ACCESS_KEY_ID") as caught:
            read_dataset(place)
        assert "\n" not in str(caught.value)


def damage_manifest(s3: Any, _: Dataset) -> str:
    s3.put_object(Bucket="bucket", Key="bad/dataset.json", Body=b"{")
    return "bad/dataset.json is damaged"


def swap_index(s3: Any, data: Dataset) -> str:
    s3.put_object(Bucket="bucket", Key=f"bad/{data.shards[1].file}.idx", Body=b"v1.2 1\n")
    return f"{data.shards[1].file}.idx .*expected"


def remove_index(s3: Any, data: Dataset) -> str:
    s3.delete_object(Bucket="bucket", Key=f"bad/{data.shards[1].file}.idx")
    return rf"{data.shards[1].file}.idx.*Check the address"


@pytest.mark.parametrize("damage", [damage_manifest, swap_index, remove_index])
def test_a_manifest_or_index_that_is_not_the_one_written_is_named(
    s3: Any, local: Dataset, damage: Callable[[Any, Dataset], str]
) -> None:
    upload(s3, local.root, "bad")
    message = damage(s3, local)
    with pytest.raises(DatasetError, match=message):
        read_dataset("s3://bucket/bad")


@pytest.mark.parametrize("kind", ["missing", "cut off", "damaged"])
def test_a_tar_that_cannot_be_read_ends_in_a_loader_error_naming_it(s3: Any, local: Dataset, kind: str) -> None:
    upload(s3, local.root, "tars")
    data = read_dataset("s3://bucket/tars")
    shard = local.shards[1].file
    content = (local.root / shard).read_bytes()
    if kind == "missing":
        s3.delete_object(Bucket="bucket", Key=f"tars/{shard}")
    elif kind == "cut off":
        s3.put_object(Bucket="bucket", Key=f"tars/{shard}", Body=content[:1024])
    else:
        s3.put_object(Bucket="bucket", Key=f"tars/{shard}", Body=content.replace(b"IHDR", b"IXXX"))
    batches = build_loader(data, TINY, 16, CPU, num_threads=1, shuffle=6)
    with pytest.raises(LoaderError, match=shard):
        next(batches)


READ = "from pipeline.shards import read_dataset; read_dataset('s3://bucket/set')"


@pytest.mark.parametrize(
    ("silent", "command"), [(False, ["tools/show_views.py", "s3://bucket/set", "views.png"]), (True, ["-c", READ])]
)
def test_a_store_that_does_not_answer_is_an_error_and_no_hang(silent: bool, command: list[str]) -> None:
    """A closed port, and one that takes connections and says nothing; in another process: a client is made once."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if not silent:
            server.close()
        environment = os.environ | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_EC2_METADATA_DISABLED": "true"}
        environment |= {"AWS_ACCESS_KEY_ID": "user", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_MAX_ATTEMPTS": "2"}
        done = subprocess.run(
            [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=120, cwd=ROOT
        )
    assert done.returncode == (1 if silent else 2)
    assert "cannot read s3://bucket/set/dataset.json" in done.stderr
