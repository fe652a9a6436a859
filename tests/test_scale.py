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
import resource, sys, time
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
import torch
import pipeline.graph
from pipeline.loader import build_loader
from pipeline.shards import read_dataset
from pipeline.views import make_views

def mib():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20

def start():
    options = {"rank": 7, "world_size": 8, "shuffle": int(sys.argv[2])}
    loader = build_loader(data, make_views("cifar", {"size": 8}), 512, torch.device("cpu"), **options)
    assert len(next(loader).labels) == 64
    return loader.steps_per_epoch

before, at = mib(), time.perf_counter()
data = read_dataset(sys.argv[1])
checked = time.perf_counter() - at
steps = start()
print(data.samples, steps, f"checked in {checked:.2f} s, first batch after {time.perf_counter() - at:.2f} s, "
      f"{mib() - before:.0f} MiB")
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
try:
    start()
except ValueError as error:
    print(error)
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


def open_and_start(folder: Path, shuffle: int) -> list[str]:
    command = [sys.executable, "-c", OPEN, str(folder), str(shuffle)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_as_many_shards_as_imagenet_has_open_with_the_usual_limit_of_open_files(tmp_path: Path) -> None:
    """1,282 shards of 10 samples where 1,024 files may be open; where no more ever may, a message says so."""
    write_many(tmp_path / "set", 10 * SHARDS, SHARDS)
    report, refusal = open_and_start(tmp_path / "set", 64)
    assert report.startswith(f"{10 * SHARDS} {10 * SHARDS // 8 // 64} ")
    assert refusal.startswith("1282 shards cannot be open at once: this process may open 1024 files")


if __name__ == "__main__":
    where, start = Path(sys.argv[1]), time.perf_counter()
    if not where.exists():
        write_many(where, SAMPLES, SHARDS)
    sys.stdout.write(f"written in {time.perf_counter() - start:.1f} s; {open_and_start(where, 2048)[0]}\n")
