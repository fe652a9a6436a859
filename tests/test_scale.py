"""ImageNet's size: 1,281,167 samples in 1,282 shards open and start in seconds, in little memory and with few files.

By hand, at full size: python -m tests.test_scale FOLDER
"""

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

from pipeline.shards import Dataset, Shard, manifest
from tests.test_loader import noise

ROOT = Path(__file__).resolve().parents[1]
SAMPLES, SHARDS = 1_281_167, 1_282

OPEN = """
import os, resource, sys, time
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
import torch
import pipeline.graph
from pipeline.loader import Loader
from pipeline.shards import read_dataset
from pipeline.views import make_views

def mib():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20

before, at, files = mib(), time.perf_counter(), len(os.listdir("/proc/self/fd"))
data = read_dataset(sys.argv[1])
checked = time.perf_counter() - at
loader = Loader(data, make_views("cifar", {"size": 8}), 512, torch.device("cpu"), rank=7, world_size=8, num_threads=2)
assert len(next(loader).labels) == 64
first = time.perf_counter() - at
opened = 0
for _ in range(40):  # 2,560 samples of as many shards as there are
    next(loader)
    opened = max(opened, len(os.listdir("/proc/self/fd")) - files)
print(data.samples, loader.steps_per_epoch, opened,
      f"checked in {checked:.2f} s, first batch after {first:.2f} s, {mib() - before:.0f} MiB")
"""


def write_many(folder: Path, samples: int, shards: int) -> None:
    """A data set whose shards are hard links to one or two tars; sizes, indexes and manifest are as they should be."""
    folder.mkdir()
    image, written = noise(0), {}
    for i in range(shards):
        count = samples * (i + 1) // shards - samples * i // shards
        tar = folder / f"train-{i:06d}.tar"
        index = Path(f"{tar}.idx")
        if count in written:
            first = folder / written[count].file
            os.link(first, tar)
            os.link(f"{first}.idx", index)
            continue
        lines = [f"v1.2 {count}"]
        with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as archive:
            for j in range(count):
                line = []
                for extension, content in (("cls", b"0"), ("png", image)):
                    member = tarfile.TarInfo(f"{j:08d}-n01440764_10026.{extension}")
                    member.size = len(content)
                    line.append(f"{extension} {archive.offset + 512} {len(content)} {member.name}")
                    archive.addfile(member, io.BytesIO(content))
                lines.append(" ".join(line))
        text = "\n".join([*lines, ""]).encode()
        index.write_bytes(text)
        written[count] = Shard(
            file=tar.name,
            samples=count,
            bytes=tar.stat().st_size,
            sha256=hashlib.sha256(tar.read_bytes()).hexdigest(),
            index_sha256=hashlib.sha256(text).hexdigest(),
        )
    counts = [samples * (i + 1) // shards - samples * i // shards for i in range(shards)]
    dataset = Dataset(
        root=folder,
        name="train",
        samples=samples,
        classes=tuple(str(i) for i in range(1000)),
        extensions=("png",),
        options={"max_pixels": 64_000_000},
        counts={},
        shards=tuple(replace(written[count], file=f"train-{i:06d}.tar") for i, count in enumerate(counts)),
    )
    (folder / "dataset.json").write_text(manifest(dataset))


def open_and_start(folder: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(folder)], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split(maxsplit=3)


def test_as_many_shards_as_imagenet_has_are_read_with_few_open_files(tmp_path: Path) -> None:
    """1,282 shards of 10 samples where 1,024 files may be open: batches come from all of them, and 256 stay open."""
    write_many(tmp_path / "set", 10 * SHARDS, SHARDS)
    samples, steps, opened, _ = open_and_start(tmp_path / "set")
    assert (samples, steps) == (f"{10 * SHARDS}", f"{10 * SHARDS // 512}")
    assert 256 <= int(opened) < 256 + 32  # and what DALI has open


if __name__ == "__main__":
    where, start = Path(sys.argv[1]), time.perf_counter()
    if not where.exists():
        write_many(where, SAMPLES, SHARDS)
    sys.stdout.write(f"written in {time.perf_counter() - start:.1f} s; {' '.join(open_and_start(where))}\n")
