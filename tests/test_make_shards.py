"""The command line: folders become shards with the right labels, and every mistake ends in one line."""

import fcntl
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tarfile
import time
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import pipeline.demo
from pipeline import sources_originals
from pipeline.shards import read_dataset
from pipeline.write import write_shards
from tests.test_shards import BAD, contents, picture, stored
from tests.test_sources import (
    TRUTH,
    WNIDS,
    by_tarfile,
    make_cifar,
    make_devkit,
    make_ilsvrc,
    make_stl10,
    make_tar,
    special,
)
from tools.make_shards import _progress, app

ROOT = Path(__file__).parents[1]


def run(*arguments: object) -> Result:
    """The command in this process, with one worker."""
    return CliRunner().invoke(app, [*map(str, arguments), "--workers", "1"])


def refused(*arguments: object) -> str:
    """The one line that a command prints before it ends with exit code 2."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line]
    assert len(lines) == 1, result.output
    assert lines[0].startswith("make_shards: ")
    return lines[0]


def fill(folder: Path, *files: str) -> Path:
    """Put an image of its own into each file; folders are made."""
    for i, name in enumerate(files):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(i))
    return folder


def images_by_class(out: Path) -> set[tuple[str, bytes]]:
    dataset = read_dataset(out)
    assert dataset.classes is not None
    members = stored(dataset)
    return {
        (dataset.classes[int(label)], image) for (_, label), (_, image) in zip(members[::2], members[1::2], strict=True)
    }


def test_names_and_zones_of_any_country_change_nothing(tmp_path: Path) -> None:
    """The C locale, a far time zone, files of 2001: paths, class names and bytes are those of anywhere else."""
    source = fill(tmp_path / "ü 猫 'a'", "Émile/é.jpg", "b c/1.jpg", "猫/" + "long " * 40 + ".jpg")
    abroad = os.environ | {"LC_ALL": "C", "LANG": "C", "TZ": "Pacific/Kiritimati"}
    out = tmp_path / "out é 猫"
    done = subprocess.run(
        [sys.executable, "tools/make_shards.py", "folder", str(source), str(out), "--workers", "1"],
        cwd=Path(__file__).parents[1],
        env=abroad,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    for path in source.rglob("*"):
        os.utime(path, (1e9, 1e9))
    assert run("folder", source, tmp_path / "here").exit_code == 0
    assert read_dataset(out).classes == ("b c", "Émile", "猫")
    here = {path.name: path.read_bytes() for path in (tmp_path / "here").iterdir()}
    assert {path.name: path.read_bytes() for path in out.iterdir()} == here


def test_labels_are_those_of_torchvision_s_image_folder(tmp_path: Path) -> None:
    """Names with upper case, spaces, digits and other alphabets; images at any depth; suffixes in any case."""
    from torchvision.datasets import ImageFolder

    files = (
        "b/1.jpg",
        "B c/1.JPEG",
        "a/x y.JPG",
        "a/deep/er/2.png",
        "Émile/é.jpg",
        "猫/猫.webp",
        "10/1.jpeg",
        "9/1.jpg",
    )
    source = fill(tmp_path / "source", *files)
    assert run("folder", source, tmp_path / "out").exit_code == 0
    theirs = ImageFolder(source)
    assert read_dataset(tmp_path / "out").classes == tuple(theirs.classes)
    assert images_by_class(tmp_path / "out") == {
        (theirs.classes[label], Path(path).read_bytes()) for path, label in theirs.samples
    }


def test_a_flat_folder_gives_images_without_labels(tmp_path: Path) -> None:
    """Other files and folders without images do not disturb; hidden files are passed over."""
    source = fill(tmp_path / "my photos", "1.jpg", "2.JPG", "ü 3.jpg")
    fill(source, ".hidden.jpg", "notes/readme.txt", "list.csv")
    result = run("folder", source, tmp_path / "out")
    assert result.exit_code == 0, result.output
    dataset = read_dataset(tmp_path / "out")
    assert dataset.classes is None
    assert {image for _, image in stored(dataset)} == {path.read_bytes() for path in source.glob("[!.l]*.*")}
    assert dataset.shards[0].file == "my-photos-000000.tar"


def test_links_are_followed_but_never_in_a_circle(tmp_path: Path) -> None:
    """Subsets made of links are common; a link to the folder above must not multiply images."""
    source = fill(tmp_path / "source", "a/1.jpg", "b/2.jpg")
    (source / "a" / "linked.jpg").symlink_to(fill(tmp_path / "else", "3.jpg") / "3.jpg")
    (source / "a" / "up").symlink_to(source / "a")
    (source / "c").symlink_to(fill(tmp_path / "whole", "4.jpg"))
    os.mkfifo(source / "a" / "pipe.jpg")  # would block for ever if it were opened
    assert run("folder", source, tmp_path / "out").exit_code == 0
    dataset = read_dataset(tmp_path / "out")
    assert dataset.classes == ("a", "b", "c")
    assert dataset.counts["per_class"] == [2, 1, 1]


def test_bad_files_are_summed_up_on_the_screen_and_listed_in_the_report(tmp_path: Path) -> None:
    """The screen counts them by reason and warns of a class that lost every image; the report has their paths."""
    source = fill(tmp_path / "source", "a/1.jpg", "a/2.jpg", "b/1.jpg", "b/half.jpg")
    (source / "a" / "empty.JPEG").write_bytes(b"")
    (source / "a" / "page.jpg").write_bytes(b"<html>")
    for name in ("1", "half"):
        (source / "b" / f"{name}.jpg").write_bytes(BAD["half a JPEG"][0] or b"")
    result = run("folder", source, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert (
        "6 entries: 2 kept (jpg: 2), 0 converted, 4 left out (does not decode: 2, empty: 1, no image: 1)"
        in result.stdout
    )
    assert "no image of 1 classes: 'b'" in result.stderr
    *listed, total = [json.loads(line) for line in (tmp_path / "out" / "actions.jsonl").read_text().splitlines()]
    assert total["entries"] == 6
    assert {each["path"] for each in listed} == {"a/empty.JPEG", "a/page.jpg", "b/1.jpg", "b/half.jpg"}
    assert read_dataset(tmp_path / "out").classes == ("a", "b")


def test_options_reach_the_shards(tmp_path: Path) -> None:
    source = fill(tmp_path / "source", *(f"{i}.jpg" for i in range(6)))
    (source / "half.jpg").write_bytes(BAD["half a JPEG"][0] or b"")
    options = ("--shard-size", 3, "--seed", 7, "--name", "mine", "--no-verify")
    options += ("--on-bad", "skip", "--resize", 300, "--quality", 70)
    assert run("folder", source, tmp_path / "out", *options).exit_code == 0
    dataset = read_dataset(tmp_path / "out")
    assert [shard.file for shard in dataset.shards] == ["mine-000000.tar", "mine-000001.tar", "mine-000002.tar"]
    assert dataset.options == {
        "seed": 7,
        "shard_size": 3,
        "on_bad": "skip",
        "store": "original",
        "resize": 300,
        "quality": 70,
        "verify": False,
        "max_pixels": 64_000_000,
    }
    assert dataset.samples == 7


def test_each_mistake_ends_in_one_line_that_names_it(tmp_path: Path) -> None:
    """Exit code 2, and nothing is left behind."""
    out = tmp_path / "out"
    empty, texts = tmp_path / "empty", fill(tmp_path / "texts", "a/readme.txt", "b/table.csv", "c.txt")
    empty.mkdir()
    mixed = fill(tmp_path / "mixed", "1.jpg", "cats/2.jpg")
    hole = fill(tmp_path / "hole", "cats/1.jpg", "dogs/readme.txt")
    bad = fill(tmp_path / "bad", "1.jpg")
    (bad / "1.jpg").write_bytes(b"")
    good = fill(tmp_path / "good", "1.jpg")
    assert re.search("missing is missing, expected a folder", refused("folder", tmp_path / "missing", out))
    assert re.search("1.jpg is a file, expected a folder", refused("folder", good / "1.jpg", out))
    assert re.search("empty holds no image .* nothing is there", refused("folder", empty, out))
    assert re.search("texts holds no image .* .txt: 2, .csv: 1", refused("folder", texts, out))
    assert re.search("mixes images .'1.jpg'. with class folders .*'cats/2.jpg'", refused("folder", mixed, out))
    assert re.search("class folders without an image: 'dogs'", refused("folder", hole, out))
    assert re.search("none of the 1 images can be used .empty: 1.", refused("folder", bad, out))
    assert re.search("good is not empty", refused("folder", good, good))
    assert re.search("1.jpg is a file", refused("folder", good, good / "1.jpg"))
    assert re.search("name 'a/b'", refused("folder", good, out, "--name", "a/b"))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"empty", "texts", "mixed", "hole", "bad", "good"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_folders_without_permission_are_named(tmp_path: Path) -> None:
    source = fill(tmp_path / "source", "a/1.jpg")
    (source / "a").chmod(0)
    assert "source/a" in refused("folder", source, tmp_path / "out")
    (source / "a").chmod(0o755)
    (tmp_path / "closed").mkdir(mode=0o555)
    assert "closed" in refused("folder", source, tmp_path / "closed" / "out")


def test_demo_makes_train_and_test_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sets or none; they hold different images of the same classes. Here fewer images than a user gets."""
    monkeypatch.setattr(pipeline.demo, "splits", partial(pipeline.demo.splits, train=60, test=30))
    assert run("demo", tmp_path / "demo").exit_code == 0
    train, test = (read_dataset(tmp_path / "demo" / split) for split in ("train", "test"))
    assert (train.name, test.name) == ("train", "test")
    assert (train.samples, test.samples) == (60, 30)
    assert train.classes == test.classes == pipeline.demo.CLASSES
    assert not {image for _, image in stored(train) if len(image) > 1} & {i for _, i in stored(test) if len(i) > 1}
    assert "demo is not empty" in refused("demo", tmp_path / "demo")


def test_imagenet_s_tar_and_the_folder_it_unpacks_to_give_the_same_shards(tmp_path: Path) -> None:
    """Every file of the data set is equal, so nothing is gained by unpacking; validation has the same classes."""
    ilsvrc = make_ilsvrc(tmp_path)
    archive = ilsvrc / "ILSVRC2012_img_train.tar"
    for name, data in by_tarfile(archive):
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            tar.extractall(ilsvrc / "unpacked" / name.removesuffix(".tar"), filter="data")
    result = run("imagenet-train", archive, ilsvrc / "a", "--seed", 5, "--shard-size", 2)
    assert result.exit_code == 0, result.output
    assert "imagenet-train: 9 images, 3 classes" in result.stdout
    assert "warning: " in result.stderr
    run("folder", ilsvrc / "unpacked", ilsvrc / "b", "--seed", 5, "--shard-size", 2, "--name", "imagenet-train")
    assert contents(ilsvrc / "a") == contents(ilsvrc / "b")
    devkit = make_devkit(ilsvrc / "kit.tar.gz")
    assert run("imagenet-val", ilsvrc / "val.tar", devkit, ilsvrc / "val").exit_code == 0
    assert read_dataset(ilsvrc / "val").classes == read_dataset(ilsvrc / "a").classes
    by_label = {WNIDS[i - 1]: {picture(100 + n) for n, j in enumerate(TRUTH, 1) if j == i} for i in (1, 2, 3)}
    assert images_by_class(ilsvrc / "val") == {(wnid, image) for wnid in WNIDS for image in by_label[wnid]}


def test_raw_pixels_reach_the_loader_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the original archive of CIFAR-10 through shards and DALI to the encoder's input, pixel for pixel."""
    import numpy as np
    import torch

    from pipeline.loader import build_eval_loader
    from pipeline.views import ViewConfig

    planes, labels = make_cifar(tmp_path / "root", 10, monkeypatch)[True]
    assert run("cifar10", tmp_path / "root", tmp_path / "out").exit_code == 0
    views = ViewConfig(size=32, eval_crop=1.0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    batches = list(build_eval_loader(read_dataset(tmp_path / "out"), views, 8, torch.device("cpu"), num_threads=1))
    found = {
        (255 * image.numpy()).round().astype(np.uint8).tobytes(): int(i)
        for x, y in batches
        for image, i in zip(x, y, strict=True)
    }
    assert found == {image.tobytes(): label for image, label in zip(planes, labels, strict=True)}


def test_stl10_is_converted_by_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The unlabelled images, and the same bytes from one process as from two."""
    make_stl10(tmp_path / "root", monkeypatch)
    assert run("stl10", tmp_path / "root", tmp_path / "one").exit_code == 0
    source = sources_originals.stl10(tmp_path / "root", "unlabeled")
    options = {"classes": None, "root": source.root, "name": source.name, "convert": source.convert}
    two = write_shards(source.samples, tmp_path / "two", workers=2, **options)
    assert contents(tmp_path / "one") == contents(two.root)
    with tarfile.open(two.tars[0]) as tar:
        assert re.fullmatch(r"00000000-00000\d.ppm", tar.getnames()[0])
    expected = {source.convert(sample.read(source.root)) for sample in source.samples if source.convert}
    assert {image for _, image in stored(two)} == expected
    assert len(expected) == 5


def test_shards_can_be_made_of_our_own_shards(tmp_path: Path) -> None:
    """The same images under the same classes, shuffled by another seed."""
    source = fill(tmp_path / "source", *(f"{name}/{i}.jpg" for name in ("cat", "dog") for i in range(8)))
    run("folder", source, tmp_path / "a")
    assert run("webdataset", tmp_path / "a", tmp_path / "b", "--seed", 1).exit_code == 0
    assert images_by_class(tmp_path / "a") == images_by_class(tmp_path / "b")
    assert len(images_by_class(tmp_path / "b")) == 16
    assert read_dataset(tmp_path / "b").classes == ("cat", "dog")


def test_a_list_makes_shards_and_what_is_missing_is_left_out_by_name(tmp_path: Path) -> None:
    fill(tmp_path, "x/1.jpg", "y/2.jpg")
    (tmp_path / "list.csv").write_text("x/1.jpg,cat\ny/2.jpg,dog\nz/3.jpg,dog\n")
    result = run("list", tmp_path / "list.csv", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "1 left out (unreadable: 1)" in result.stdout
    assert '"z/3.jpg"' in (tmp_path / "out" / "actions.jsonl").read_text()
    assert images_by_class(tmp_path / "out") == {("cat", picture(0)), ("dog", picture(1))}


def test_hostile_archives_write_nothing_outside_the_output_folder(tmp_path: Path) -> None:
    """Climbing and absolute names are only names; links and devices are left out and listed; no file moves."""
    names = ["../../up.jpg", f"{tmp_path}/absolute.jpg", "a/../../b.jpg", "/etc/passwd.jpg", "~/c.jpg", "x\n y.jpg"]
    specials = [
        special("link.jpg", tarfile.SYMTYPE, "../target"),
        special("hard.jpg", tarfile.LNKTYPE, "/etc/hostname"),
        special("disk.jpg", tarfile.BLKTYPE),
        special("zero.jpg", tarfile.CHRTYPE),
        special("pipe.jpg", tarfile.FIFOTYPE),
        special("link", tarfile.SYMTYPE, str(tmp_path)),
    ]
    entries = [*specials, ("link/through.jpg", picture(9)), *((name, picture(i)) for i, name in enumerate(names))]
    (tmp_path / "in").mkdir()
    (tmp_path / "target").write_text("mine")
    source = make_tar(tmp_path / "in" / "a.tar", entries)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    result = run("webdataset", source, tmp_path / "out")
    assert result.exit_code == 0, result.output
    listed = [json.loads(line) for line in (tmp_path / "out" / "actions.jsonl").read_text().splitlines()]
    assert {each["path"]: each["detail"] for each in listed if each["action"] == "left out"} == {
        "a.tar/link.jpg": "a symbolic link",
        "a.tar/hard.jpg": "a hard link",
        "a.tar/disk.jpg": "a block device",
        "a.tar/zero.jpg": "a character device",
        "a.tar/pipe.jpg": "a FIFO",
    }
    members = stored(read_dataset(tmp_path / "out"))
    assert {image for _, image in members} == {picture(i) for i in (*range(len(names)), 9)}
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+\.jpg", name) for name, _ in members)
    after = {
        path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if tmp_path / "out" not in (path, *path.parents)
    }
    assert after == before


def test_a_cut_off_tar_is_announced_and_its_loss_listed(tmp_path: Path) -> None:
    source = make_tar(tmp_path / "a.tar", [(f"{i}.jpg", picture(i)) for i in range(6)])
    data = source.read_bytes()
    source.write_bytes(data[: data.index(b"5.jpg") + 600])
    result = run("webdataset", source, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "warning: a.tar: cut off within '5.jpg': 88 of its" in result.stderr
    assert "a: 5 images, no labels" in result.stdout
    assert "6 entries: 5 kept (jpg: 5), 0 converted, 1 left out (cut off: 1), 0 passed over" in result.stdout
    assert "warning: 1 damaged tars" in result.stderr
    cut, lost, _ = [json.loads(line) for line in (tmp_path / "out" / "actions.jsonl").read_text().splitlines()]
    assert (cut["action"], cut["path"], lost["action"], lost["path"]) == ("left out", "a.tar/5.jpg", "lost", "a.tar")
    assert lost["detail"].startswith("a.tar: cut off within '5.jpg'")


@pytest.mark.parametrize(
    "command", [["imagenet-train"], ["list"], ["webdataset"], ["imagenet-val", "x"], ["cifar10"], ["stl10"]]
)
def test_every_source_that_is_missing_is_named(tmp_path: Path, command: list[str]) -> None:
    name, *more = command
    assert "missing" in refused(name, tmp_path / "missing", *more, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lines come ten seconds apart at most often, so that logs stay short."""
    clock = iter([0.0, 1.0, 11.0, 12.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with _progress("train") as progress:
        for done in (10, 110, 120):
            progress(done, 200)
    assert capsys.readouterr().err == "train: 110/200 images, 10 images/s\n"
    monkeypatch.undo()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with _progress("train") as progress:
        progress(120, 200)
    assert re.search("train.*120/200", capsys.readouterr().err)


# ---- as a program of its own


def test_help_imports_nothing_heavy() -> None:
    """--help answers at once: no torch, webdataset, Pillow or NumPy."""
    code = "import sys, tools.make_shards; print(*{'torch', 'webdataset', 'PIL', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "\n"


def processes_of(group: int) -> list[str]:
    """States of the living processes of a process group, from Linux's /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, process_group = stat.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(process_group) == group and state != "Z":
            found.append(state)
    return found


def test_a_killed_run_leaves_no_shards_no_lock_and_no_process(tmp_path: Path) -> None:
    """kill -9 in the middle: OUT does not exist, the workers end too, and the next run gives the usual bytes."""
    source = tmp_path / "images" / "train"
    fill(source, "0/0.jpg")
    for i in range(1, 1000):
        os.link(source / "0" / "0.jpg", source / "0" / f"{i}.jpg")
    command = [sys.executable, str(ROOT / "tools" / "make_shards.py"), "folder", str(source), "out"]
    command += ["--workers", "2", "--shard-size", "5"]
    killed = subprocess.Popen(command, cwd=tmp_path, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.partial/*.idx")):
        assert killed.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "no shard in 60 s"
        time.sleep(0.01)
    lock = os.open(tmp_path / ".out.partial", os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(lock)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    while processes_of(killed.pid):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)
    for name in ("out", "again"):
        assert run("folder", source, tmp_path / name, "--shard-size", "5").exit_code == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "images", "out"]


def test_a_full_disk_ends_in_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on file size stands in for the disk: exit code 1, the cause, and no half-written folder."""
    source = fill(tmp_path / "source", *(f"{i}.jpg" for i in range(40)))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)  # Python ignores the signal that goes with it
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, before[1]))
    try:
        result = run("folder", source, tmp_path / "out", "--shard-size", "40")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert result.exit_code == 1, result.stderr
    message = r"make_shards: .*File too large; make room there, and the same command goes on: '.*/[.]out[.]partial'\n"
    assert re.fullmatch(message, result.stderr)
    assert [path.name for path in tmp_path.iterdir()] == [source.name]
