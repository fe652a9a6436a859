"""What reads files from elsewhere, each with small sound files to spoil and with what must be true of the result.

A target is made once, in a folder of its own, and then called with (rng, scratch folder) for each input. It returns
"worked", "refused" or "as it was" (the damage changed nothing); it raises Finding, or whatever the program raises,
where the program does not do as it should: an error of ours, in one line that names the file, or a result that adds up.
"""

import hashlib
import io
import itertools
import json
import math
import shutil
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import train
from model import checkpoint
from model.checkpoint import Saved, latest_whole
from model.encoder import build_encoder
from model.encoder_file import export_encoder, load_encoder, load_head, read_metadata, save_head
from model.run_folder import Log, read_rows
from model.simclr import ProjectionHead
from pipeline import sources_list, sources_originals, sources_tars
from pipeline.audit import verify
from pipeline.index import index_tars
from pipeline.loader import Loader, LoaderError
from pipeline.reader import DamagedError, Reader
from pipeline.shards import Dataset, DatasetError, Sample, manifest, read_dataset
from pipeline.sources import Source
from pipeline.sources_tars import TarError, members
from pipeline.views import ViewConfig
from pipeline.write import write_shards
from tests.fuzz import damage
from tools import make_shards
from tools.errors import one_line

Attempt = Callable[[Random, Path], str]
CPU = torch.device("cpu")
WORKED, REFUSED, UNCHANGED = "worked", "refused", "as it was"
FOREIGN = (json.JSONDecodeError, UnicodeError)  # ValueErrors whose words are not ours


class Finding(AssertionError):
    """The program did not do as it should."""


def refusal(error: BaseException, *names: str | Path) -> str:
    """REFUSED if an error is one of ours and says which of the files it is about; else it is raised."""
    text = one_line(error)  # as the program shows it
    if not isinstance(error, ValueError | OSError | LoaderError) or isinstance(error, FOREIGN):
        raise error
    if isinstance(error, OSError) and error.errno is None:
        raise error
    if not any(Path(name).name in text for name in names):
        raise Finding(f"the message names none of {', '.join(Path(name).name for name in names)}: {text}") from error
    return REFUSED


def must(true: bool, what: str) -> None:
    if not true:
        raise Finding(what)


def picture(i: int, format: str = "JPEG", size: int = 16) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(i).integers(0, 256, (4, 4, 3), np.uint8)
    Image.fromarray(pixels).resize((size, size)).save(file, format)
    return file.getvalue()


def tar(path: Path, entries: Sequence[tuple[str, bytes]], format: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as file:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def spoil(rng: Random, by: damage.Damage, good: Path, bad: Path) -> bool:
    """Write a spoiled copy; whether it differs."""
    before = good.read_bytes()
    after = by(rng, before)
    bad.write_bytes(after)
    return after != before


# ---- sources -------------------------------------------------------------------------------------------------------


def num_members(file: Path) -> int:
    """The files that a tar holds up to the first damage, and one that is cut off there."""
    number = 0
    with open(file, "rb") as opened:
        try:
            for _ in members(opened, file.name):
                number += 1
        except TarError as error:
            number += bool(error.cut_off)
    return number


def check_source(source: Source, entries: int) -> None:
    """Every entry is counted once, and each sample lies in its file, with a label of a class."""
    tally = source.tally
    counted = len(source.samples) + len(tally.left_out) + sum(tally.passed_over.values())
    must(counted == entries, f"{counted} entries are counted of {entries}: {tally}")
    for sample in source.samples:
        file = source.root / (sample.file or sample.name)
        must(
            sample.file is None or 0 < sample.offset <= sample.offset + sample.size <= file.stat().st_size, f"{sample}"
        )
        must(sample.label in (range(len(source.classes)) if source.classes is not None else (None,)), f"{sample}")


def check_shards(source: Source, entries: int, folder: Path) -> None:
    """Written out, the images are counted again; nothing is written elsewhere."""
    before = sorted(folder.rglob("*"))
    out = folder / "out"
    try:
        write_shards(source.samples, out, classes=source.classes, root=source.root, tally=source.tally)
    except DatasetError as error:
        must("none of the" in str(error), f"{error}")
    else:
        total = json.loads((out / "actions.jsonl").read_text().splitlines()[-1])
        must(total["entries"] == entries, f"{total} of {entries} entries")
    must(sorted(path for path in folder.rglob("*") if out not in (path, *path.parents)) == before, "files elsewhere")


def imagenet_tars(work: Path) -> Attempt:
    inner = []
    for k, wnid in enumerate(("n01440764", "n01443537")):
        images = [(f"{wnid}_{i}.JPEG", picture(10 * k + i)) for i in range(3)]
        inner.append((f"{wnid}.tar", tar(work / "inner.tar", images).read_bytes()))
    good = tar(work / "ILSVRC2012_img_train.tar", inner)
    val = tar(work / "val.tar", [(f"ILSVRC2012_val_{i:08d}.JPEG", picture(i)) for i in range(1, 5)])
    truth = work / "truth.txt"
    truth.write_text("".join(f"ILSVRC2012_val_{i:08d}.JPEG n0144{i % 2:04d}\n" for i in range(1, 5)))

    def attempt(rng: Random, folder: Path) -> str:
        if rng.random() < 0.5:
            bad = folder / good.name
            spoil(rng, damage.by_tar, good, bad)
            try:
                source = sources_originals.imagenet_train(bad)
            except DatasetError as error:
                return refusal(error, bad)
            with open(bad, "rb") as file:
                entries = sum(len(list(members(file, "", m.offset, m.offset + m.size))) for m in members(file, ""))
        else:
            bad, labels = folder / val.name, folder / truth.name
            spoil(rng, damage.by_tar if rng.random() < 0.5 else lambda _, data: data, val, bad)
            spoil(rng, damage.by_lines, truth, labels)
            try:
                source = sources_originals.imagenet_val(bad, labels)
            except DatasetError as error:
                return refusal(error, bad, labels)
            entries = num_members(bad)
        check_source(source, entries)
        return WORKED

    return attempt


def cifar_archives(work: Path) -> Attempt:
    import pickle

    from torchvision.datasets import CIFAR10

    reader: Any = CIFAR10
    files, lists = [], {"train_list": [], "test_list": []}  # type: ignore[var-annotated]
    for kind, checked in lists.items():
        for name, _ in getattr(reader, kind):
            content = pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]})
            files.append((f"{reader.base_folder}/{name}", content))
            checked.append([name, hashlib.md5(content).hexdigest()])
        setattr(reader, kind, checked)
    meta = pickle.dumps({reader.meta["key"]: [f"class {i}" for i in range(10)]})
    files.append((f"{reader.base_folder}/{reader.meta['filename']}", meta))
    reader.meta = {**reader.meta, "md5": hashlib.md5(meta).hexdigest()}
    packed = io.BytesIO()
    import gzip

    with gzip.open(packed, "wb", compresslevel=1) as file:
        file.write(tar(work / "cifar.tar", files).read_bytes())
    good = work / reader.filename
    good.write_bytes(packed.getvalue())
    reader.tgz_md5 = hashlib.md5(packed.getvalue()).hexdigest()

    def attempt(rng: Random, folder: Path) -> str:
        """A changed archive, or a changed file of an unpacked one, is not the original."""
        bad = folder / reader.filename
        if rng.random() < 0.7:
            changed, lost = spoil(rng, damage.by_bytes, good, bad), bad
        else:
            shutil.copy(good, bad)
            sources_originals.cifar(10, folder, "train")
            if rng.random() < 0.5:
                bad.unlink()
            lost = rng.choice(sorted((folder / reader.base_folder).iterdir()))
            changed = spoil(rng, damage.by_bytes, lost, lost)
        try:
            source = sources_originals.cifar(10, folder, "train")
        except DatasetError as error:
            must(changed, f"refused as it was: {error}")
            return refusal(error, bad, lost)
        if lost == bad or not bad.exists():  # else what is changed is unpacked anew
            must(not changed, f"a changed {lost.name} is taken for the original")
        must(len(source.samples) == 10, f"{len(source.samples)} samples")
        return WORKED if changed else UNCHANGED

    return attempt


def webdataset_tars(work: Path) -> Attempt:
    entries: list[tuple[str, bytes]] = []
    for i in range(6):
        folder = "a/" if i > 3 else ""
        entries += [(f"{folder}{i}.jpg", picture(i)), (f"{folder}{i}.cls", b"%d" % (i % 2))]
        entries += [(f"{folder}{i}.json", json.dumps({"label": f"class {i % 2}", "meta": {"n": i}}).encode())]
        entries += [(f"{folder}{i}.seg.png", picture(i, "PNG", 4))] * (i % 2)
    entries += [("long" * 40 + ".jpg", picture(7)), ("long" * 40 + ".cls", b"1")]
    goods = [tar(work / f"{name}.tar", entries, format) for name, format in (("gnu", 1), ("pax", 2))]
    packing: tuple[Any, ...] = ({}, {}, {"labels": False}, {"label_field": "label"}, {"label_field": "meta.n"})
    packing += ({"image_member": "seg.png"}, {"image_member": "jpg"})

    def attempt(rng: Random, folder: Path) -> str:
        bad = folder / "tars" / "bad.tar"
        bad.parent.mkdir()
        spoil(rng, damage.by_tar, rng.choice(goods), bad)
        how = rng.choice(packing)
        if rng.random() < 0.3:
            return indexed(rng, bad, folder / "out", {k: v for k, v in how.items() if k != "label_field"})
        try:
            source = sources_tars.webdataset(bad.parent, **how)
        except DatasetError as error:
            return refusal(error, bad, bad.parent)
        entries = num_members(bad)
        check_source(source, entries)
        must(len(source.tally.lost) <= 1, f"{source.tally.lost}")
        if rng.random() < 0.1:
            check_shards(source, entries, folder)
        return WORKED

    def indexed(rng: Random, bad: Path, out: Path, how: dict[str, Any]) -> str:
        try:
            dataset = index_tars([bad], out, verify=rng.random() < 0.5, **how)
        except DatasetError as error:
            must(not out.exists(), f"{out} is there, though {error}")
            return refusal(error, bad, bad.parent)
        counts = dataset.counts
        counted = sum(sum(counts[each].values()) for each in ("kept", "reencoded", "left_out", "passed_over"))
        must(counted == num_members(bad), f"{counted} entries are counted of {num_members(bad)}: {counts}")
        must([fault for fault in verify(out) if fault.key is None] == [], "verify finds a fault of the whole shard")
        return WORKED

    return attempt


def lists(work: Path) -> Attempt:
    for i in range(6):
        (work / f"{i} a.png").write_bytes(b"")
        (work / f"{i}.png").write_bytes(b"")
    texts = [
        "".join(f"{i}.png\n" for i in range(6)),
        "".join(f"{i}.png {i % 2}\n" for i in range(6)),
        "".join(f"{i} a.png\tclass {i % 2}\n" for i in range(6)),
        "path,label\n" + "".join(f'"{i} a.png",class {i % 2}\n' for i in range(6)),
    ]
    classes = work / "classes.txt"
    classes.write_text("class 0\nclass 1\n")

    def attempt(rng: Random, folder: Path) -> str:
        bad, names = folder / "list.txt", folder / "classes.txt"
        bad.write_bytes(damage.by_lines(rng, rng.choice(texts).encode()))
        spoil(rng, damage.by_lines if rng.random() < 0.3 else lambda _, data: data, classes, names)
        try:
            source = sources_list.file_list(bad, work, rng.choice((None, None, names)))
        except DatasetError as error:
            return refusal(error, bad, names)
        text = bad.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        check_source(source, sum(bool(line.strip()) for line in text.split("\n")))
        return WORKED

    return attempt


# ---- data sets -----------------------------------------------------------------------------------------------------


def small_set(out: Path, **more: Any) -> Dataset:
    samples = [Sample(f"{i}.jpg", i % 2, picture(i, ("JPEG", "PNG", "WEBP")[i % 3])) for i in range(12)]
    return write_shards(samples, out, classes=["even", "odd"], shard_size=4, **more)


def manifests(work: Path) -> Attempt:
    goods = [small_set(work / "set"), small_set(work / "raw", store="ppm")]

    def attempt(rng: Random, folder: Path) -> str:
        """What a manifest says is covered by a hash in it, but for the folder of the tars, which may move."""
        good = rng.choice(goods)
        bad = shutil.copytree(good.root, folder / "set") / "dataset.json"
        spoil(rng, damage.by_json, good.root / "dataset.json", bad)
        try:
            dataset = read_dataset(bad.parent)
        except DatasetError as error:
            return refusal(error, bad, bad.parent, good.shards[0].file)
        same = manifest(replace(dataset, tars_at="")) == manifest(good)
        must(same, f"accepted with other facts: {manifest(dataset)}")
        must(dataset.tars_address == dataset.address, f"other tars: {dataset.tars_address}")
        return UNCHANGED

    return attempt


def indexes(work: Path) -> Attempt:
    good = small_set(work / "set")

    def attempt(rng: Random, folder: Path) -> str:
        """A changed index is refused; where its hashes are made to fit, reading it ends well or names the shard."""
        root = shutil.copytree(good.root, folder / "set")
        number = rng.randrange(len(good.shards))
        shard = good.shards[number]
        bad = root / shard.index
        changed = spoil(rng, damage.by_lines, good.root / shard.index, bad)
        try:
            read_dataset(root)
            must(not changed, "a changed index is taken for the one that was written")
            return UNCHANGED
        except DatasetError as error:
            refused = refusal(error, bad, root)
        lines = bad.read_bytes().split(b"\n")[1:-1]
        if not lines or rng.random() < 0.3:
            return refused
        bad.write_bytes(b"\n".join([b"v1.2 %d" % len(lines), *lines, b""]))
        signed = replace(shard, samples=len(lines), index_sha256=hashlib.sha256(bad.read_bytes()).hexdigest())
        shards = [*good.shards[:number], signed, *good.shards[number + 1 :]]
        num = sum(each.samples for each in shards)
        forged = replace(good, root=root, shards=tuple(shards), samples=num)
        (root / "dataset.json").write_text(manifest(forged))
        try:
            dataset = read_dataset(root)
        except DatasetError as error:
            return refusal(error, bad, root)
        verify(root)
        reader = Reader(dataset)
        try:
            try:
                reader.read(np.arange(num))
            except DamagedError as error:
                for sample in error.faults:
                    reader.where(sample)
        except DatasetError as error:
            return refusal(error, bad)
        return WORKED

    return attempt


def quarantine_reports(work: Path) -> Attempt:
    good = small_set(work / "set")
    keys = [Reader(good).where(i) for i in range(3)]
    rows = [{"shard": shard, "key": key, "problem": "does not decode"} for shard, key in keys]
    report = work / "report.jsonl"
    report.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def attempt(rng: Random, folder: Path) -> str:
        root, bad = shutil.copytree(good.root, folder / "set"), folder / report.name
        spoil(rng, damage.by_json_lines, report, bad)
        done = CliRunner().invoke(make_shards.app, ["quarantine", str(root), "--from", str(bad)])
        if done.exit_code:
            must(read_dataset(root).samples == 12, "refused and yet changed")
            return ended(done, bad, root)
        dataset = read_dataset(root)
        must(9 <= dataset.samples <= 12, f"{dataset.samples} samples are left")
        must(dataset.samples + len(dataset.counts.get("quarantined", ())) == 12, f"{dataset.counts}")
        return WORKED

    return attempt


def ended(done: Any, *names: str | Path) -> str:
    """REFUSED for a program that ended with 1 or 2 and a line that names a file."""
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    must(done.exit_code in (1, 2), f"exit code {done.exit_code}")
    must(any(Path(name).name in done.output for name in names), f"no file is named: {done.output}")
    must("Traceback" not in done.output, done.output)
    return REFUSED


def journals(work: Path) -> Attempt:
    samples = [Sample(f"{i}.png", i % 2, picture(i, "PNG")) for i in range(12)]

    def write(out: Path, progress: Any = None) -> Dataset:
        return write_shards(samples, out, classes=["even", "odd"], shard_size=3, progress=progress)

    class Stop(BaseException):
        pass

    def stop(done: int, _: int) -> None:
        if done >= 6:
            raise Stop

    whole = write(work / "whole")
    try:
        write(work / "set", stop)
    except Stop:
        (left,) = (path for path in work.iterdir() if path.name not in ("whole", "set"))
    files = sorted(path.relative_to(left) for path in left.rglob("*") if path.is_file() and path.name[0] != ".")
    must(len(files) >= 5, f"an interrupted run leaves {files}")

    def attempt(rng: Random, folder: Path) -> str:
        """The same command goes on to the same bytes, or names what is in its way."""
        here = shutil.copytree(left, folder / left.name)
        bad = here / rng.choice((*files, *[Path("journal.jsonl")] * 4))
        by = damage.by_json_lines if bad.name == "journal.jsonl" else damage.by_bytes
        changed = spoil(rng, by, left / bad.relative_to(here), bad)
        try:
            dataset = write(folder / "set")
        except DatasetError as error:
            must(changed, "refused as it was")
            return refusal(error, bad, here)
        for file in whole.root.iterdir():
            must(
                file.read_bytes() == (dataset.root / file.name).read_bytes(),
                f"{file.name} differs; {bad.name} was spoilt",
            )
        return WORKED if changed else UNCHANGED

    return attempt


# ---- images through the loader -------------------------------------------------------------------------------------

VIEWS = ViewConfig(size=16)


def check_views(dataset: Dataset, batch_size: int, **more: Any) -> Loader:
    """An epoch of views; all are finite."""
    loader = Loader(dataset, VIEWS, batch_size, CPU, num_threads=1, **more)
    for batch in itertools.islice(loader, loader.steps_per_epoch):
        must(bool(torch.isfinite(batch.views).all()), "a view is not finite")
        must(batch.labels is not None and set(batch.labels.tolist()) <= {0, 1}, f"{batch.labels}")
    return loader


def images(_: Path) -> Attempt:
    kinds = [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("WEBP", {}),
        ("GIF", {}),
        ("TIFF", {}),
        ("BMP", {}),
    ]
    goods = []
    for i, ((format, options), mode) in enumerate(itertools.product(kinds, ("RGB", "L"))):
        file = io.BytesIO()
        pixels = np.random.default_rng(i).integers(0, 256, (5, 6, 3), np.uint8)
        Image.fromarray(pixels).resize((40, 32)).convert(mode).save(file, format, **options)
        goods.append(file.getvalue())

    def attempt(rng: Random, folder: Path) -> str:
        """Twenty spoilt images beside two good ones: what gets into shards, training's decoder decodes."""
        samples = [Sample(f"{i}.img", i % 2, damage.by_bytes(rng, rng.choice(goods))) for i in range(20)]
        samples += [Sample(f"good-{i}.img", i % 2, goods[i]) for i in range(2)]
        dataset = write_shards(samples, folder / "set", classes=["even", "odd"])
        counts = dataset.counts
        must(sum(sum(counts[each].values()) for each in ("kept", "reencoded", "left_out")) == 22, f"{counts}")
        check_views(dataset, dataset.samples)
        return WORKED

    return attempt


def shards(work: Path) -> Attempt:
    goods = [small_set(work / "set"), small_set(work / "raw", store="ppm")]

    def attempt(rng: Random, folder: Path) -> str:
        """Damage that leaves the size: verify finds it, training names it by shard and key, or replaces it."""
        good = rng.choice(goods)
        root = shutil.copytree(good.root, folder / "set")
        shard = rng.choice(good.shards)
        changed = spoil(rng, damage.in_place, good.root / shard.file, root / shard.file)
        faults = verify(root)
        must(changed == any(fault.shard == shard.file for fault in faults), f"verify finds {faults}")
        dataset = read_dataset(root)
        try:
            check_views(dataset, 4)
        except LoaderError as error:
            must(changed, f"{error}")
            must(f"{shard.file}:0" in str(error), f"neither shard nor key: {error}")
            refusal(error, shard.file)
            loader = check_views(dataset, 4, skip_damaged=4)
            must(1 <= len(loader.damaged) <= 4, f"{loader.damaged}")
            return REFUSED
        return WORKED if changed else UNCHANGED

    return attempt


# ---- options, weights and runs -------------------------------------------------------------------------------------

TOML = """batch_size = 1024
lr_scaling = "sqrt"
base_lr = 0.075
warmup_epochs = 10.0
sync_bn = false
cache = "/local/disk"
seed = 3
[views]
preset = "stl10"
size = 160
crop_area = [0.2, 1.0]
hue = 0.1
profile = "fast"
mean = [0.5, 0.5, 0.5]
[second_views]
blur_p = 0.1
solarize_p = 0.2
"""


def config_files(_: Path) -> Attempt:
    class Given(BaseException):
        pass

    def attempt(rng: Random, folder: Path) -> str:
        """What is taken has the types of its options, and no number that is none."""
        bad, seen = folder / "run.toml", []
        bad.write_bytes(damage.by_lines(rng, TOML.encode()))
        real, train.train = train.train, lambda config, **_: seen.append(config)  # type: ignore[assignment, func-returns-value]
        try:
            done = CliRunner(env={"COLUMNS": "4000", "TERMINAL_WIDTH": "4000"}).invoke(
                train.app, ["imagenet", "--config", str(bad)]
            )
        finally:
            train.train = real
        if done.exit_code:
            return ended(done, bad)
        (config,) = seen
        like, views = train.RECIPES["imagenet"], asdict(ViewConfig())
        pairs = [(name, getattr(like, name), new) for name, new in vars(config).items() if "views" not in name]
        pairs += [(name, views[name], new) for name, new in asdict(config.views).items()]
        pairs += [(name, views[name], new) for name, new in asdict(config.second_views or config.views).items()]
        for name, old, new in pairs:
            kinds = (int, float) if type(old) is float else (type(old),)
            must(type(new) in kinds, f"{name} is {new!r}")
            numbers = new if isinstance(new, tuple) else (new,)
            must(all(math.isfinite(each) for each in numbers if isinstance(each, float)), f"{name} is {new!r}")
        return WORKED

    return attempt


def weights(work: Path) -> Attempt:
    torch.manual_seed(0)
    good = export_encoder(
        work, build_encoder(18, width=1 / 64), image_size=64, mean=[0.5] * 3, std=[0.2] * 3, training={"recipe": "demo"}
    )
    head = work / "head.safetensors"
    save_head(head, ProjectionHead(8, out_features=4))

    def attempt(rng: Random, folder: Path) -> str:
        """What has a hash is as it was written; what has none is finite."""
        which, read = rng.choice(((good, load_encoder), (good, load_encoder), (head, load_head)))
        bad = folder / which.name
        spoil(rng, damage.by_safetensors, which, bad)
        try:
            module: nn.Module = read(bad)
            facts = read_metadata(bad)
        except ValueError as error:
            return refusal(error, bad)
        state = module.state_dict()
        if facts and "sha256" in facts:
            must(facts == read_metadata(which), f"other facts: {facts}")
            expected = read(which).state_dict()
            must(all(torch.equal(state[name], tensor) for name, tensor in expected.items()), "other tensors")
            return UNCHANGED
        must(all(bool(torch.isfinite(tensor).all()) for tensor in state.values()), "not finite")
        return WORKED

    return attempt


def checkpoints(work: Path) -> Attempt:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in (1, 2):
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        extra = {"config": {"data": "x", "views": {"size": 16}}, "loader": {"run": step}, "processes": 1}
        checkpoint.save(
            work / "checkpoints", step, model=model, optimizer=optimizer, extra=extra, probe=nn.Linear(2, 2)
        )
    goods = {name: checkpoint.read_state(work / "checkpoints" / name) for name in ("step-0000001", "step-0000002")}

    def attempt(rng: Random, folder: Path) -> str:
        """The newest whole one is gone on from, unchanged; a newer one is named."""
        root = shutil.copytree(work / "checkpoints", folder / "checkpoints")
        spoilt = set()
        for name in rng.choice((["step-0000002"], ["step-0000002"], ["step-0000001"], list(goods))):
            bad = rng.choice(sorted((root / name).iterdir()))
            by = damage.by_json if bad.suffix == ".json" else damage.by_safetensors
            if spoil(rng, by, bad, bad):
                spoilt.add(bad)
        try:
            newest, notes = latest_whole(root)
        except ValueError as error:
            must(len(spoilt) == 2, f"refused, though one is whole: {error}")
            return refusal(error, *spoilt)
        assert newest is not None
        broken = {bad.parent.name for bad in spoilt}
        state = checkpoint.read_state(newest)
        if checkpoint.OWN_HASH in state:
            must(state == goods[newest.name], f"{newest} has another state")
        else:  # like those of earlier versions, which is said
            must("no hash tells" in str(checkpoint.set_aside_newer(Saved(newest, state))), f"{newest} has no hash")
        if newest.name in broken:  # equal as JSON, or not equal at all
            (bad,) = (each for each in spoilt if each.parent == newest)
            must(bad.name == "state.json", f"{bad} is spoilt and taken for whole")
        newer = [name for name in goods if name > newest.name]
        must(len(notes) == len(newer), f"{notes}")
        must(all(any(bad.parent.name in note for bad in spoilt) for note in notes), f"{notes} name none of {spoilt}")
        fresh = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        step, _ = checkpoint.load(
            newest, model=fresh, optimizer=torch.optim.SGD(fresh.parameters(), lr=0.1, momentum=0.9)
        )
        must(f"step-{step:07d}" == newest.name, f"step {step} of {newest}")
        return WORKED if spoilt else UNCHANGED

    return attempt


def run_folders(work: Path) -> Attempt:
    rows = {
        "metrics.jsonl": [{"step": i, "loss": 4.0 / i, "lr": 0.1} for i in range(1, 9)] + [{"step": 4, "knn": 0.5}],
        "speed.jsonl": [{"step": i, "images_per_s": 9.5} for i in (2, 4, 6, 8)],
        "damaged.jsonl": [{"shard": "a.tar", "key": f"{i}", "problem": "does not decode"} for i in range(3)],
    }
    for name, some in rows.items():
        (work / name).write_text("".join(json.dumps(row) + "\n" for row in some))
    (work / "status.json").write_text(json.dumps({"state": "preempted", "step": 6, "rank": 0, "message": "stopped"}))

    def attempt(rng: Random, folder: Path) -> str:
        """Going on at step 6 never fails; what is lost is counted and its file named."""
        out = shutil.copytree(work, folder / "run")
        for name in rng.sample([*rows, "status.json"], rng.choice((1, 1, 2))):
            by = damage.by_json if name.endswith(".json") else damage.by_json_lines
            spoil(rng, by, work / name, out / name)
        log = Log(out, 0, "this test")
        log.start({"data": "x"}, 6)
        kept = read_rows(out / "metrics.jsonl")
        steps = {row["step"] for row in kept if "knn" not in row}
        lost = len(set(range(1, 7)) - steps)
        said = [note for note in log.notes if "metrics.jsonl" in note and f"{lost} of the 6 steps" in note]
        must(bool(lost) == bool(said), f"{lost} steps are lost, the notes are {log.notes}")
        must(all(isinstance(row["step"], int) and row["step"] <= 6 for row in kept), f"{kept}")
        must(json.loads((out / "status.json").read_bytes())["state"] == "running", "status.json")
        must(all("\n" not in note for note in log.notes), f"{log.notes}")
        log.metrics([{"step": 7, "loss": 1.0}])
        log.damaged([("b.tar", "1", "does not decode")])
        log.knn()
        log.status("done")
        return WORKED

    return attempt


TARGETS: dict[str, tuple[Callable[[Path], Attempt], int]] = {  # and how many inputs the suite tries
    "ImageNet's tars": (imagenet_tars, 300),
    "CIFAR's archive": (cifar_archives, 60),
    "WebDataset tars": (webdataset_tars, 300),
    "lists": (lists, 300),
    "manifests": (manifests, 200),
    "indexes": (indexes, 150),
    "quarantine's reports": (quarantine_reports, 50),
    "journals": (journals, 30),
    "images": (images, 4),
    "shards": (shards, 10),
    "config files": (config_files, 80),
    "encoders and heads": (weights, 150),
    "checkpoints": (checkpoints, 150),
    "run folders": (run_folders, 150),
}
