"""Shards hold what training's decoder takes, not what Pillow takes: the two differ on damaged JPEGs."""

import io
import json
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from pipeline.audit import quarantine, verify
from pipeline.graph import Decoder, Encoding
from pipeline.images import NOT_DALI, BadImageError, Rules, prepare
from pipeline.index import index_tars
from pipeline.loader import Loader, LoaderError, _Feed, build_eval_loader
from pipeline.reader import Encoded
from pipeline.shards import DatasetError, Sample, read_dataset
from pipeline.views import ViewConfig
from pipeline.write import write_shards
from tools.make_shards import app

VIEWS, CPU = ViewConfig(size=8), torch.device("cpu")


def jpeg(i: int, side: int = 40) -> bytes:
    y, x = np.mgrid[:side, :side] * (i % 5 + 1)
    file = io.BytesIO()
    Image.fromarray(np.stack([x % 256, y % 256, (x + y) % 256], -1).astype(np.uint8)).save(file, "JPEG", quality=80)
    return file.getvalue()


def pillow_only(i: int = 0) -> bytes:
    """A byte between two segments, which libjpeg passes over and DALI's parser does not."""
    image = jpeg(i)
    marker = image.index((b"\xff\xdb", b"\xff\xc0", b"\xff\xc4", b"\xff\xda")[i % 4])
    return image[:marker] + b"\0" + image[marker:]


def mutated(number: int) -> list[bytes]:
    """JPEGs with flipped bits, other bytes in the header, and bytes put in, cut out or zeroed; the same each time."""
    rng, found = random.Random(0), []
    for i in range(number):
        image = bytearray(jpeg(i))
        at = rng.randrange(len(image) if i % 5 else 400)
        if i % 4 == 0:
            image[at] ^= 1 << rng.randrange(8)
        elif i % 4 == 1:
            image[at:at] = rng.randbytes(rng.randint(1, 16))
        elif i % 4 == 2:
            del image[at : at + rng.randint(1, 64)]
        else:
            image[at : at + 32] = bytes(len(image[at : at + 32]))
        found.append(bytes(image))
    return found


def read_through(dataset) -> None:
    """Every stored image, by evaluation and by training."""
    assert sum(len(labels) for _, labels in build_eval_loader(dataset, VIEWS, 16, CPU)) == dataset.samples
    loader = Loader(dataset, VIEWS, dataset.samples, CPU)
    next(loader)


def test_what_make_shards_takes_training_decodes(tmp_path: Path) -> None:
    """400 damaged JPEGs: each is kept, converted or left out and counted, and what is stored is read to the end."""
    images = [*mutated(400), *map(pillow_only, range(4)), jpeg(0)]
    samples = [Sample(f"{i}", data=image) for i, image in enumerate(images)]
    dataset = write_shards(samples, tmp_path / "set", classes=None, shard_size=100)
    counts = {kind: sum(dataset.counts[kind].values()) for kind in ("kept", "reencoded", "left_out")}
    assert sum(counts.values()) == len(images)
    assert (dataset.samples, dataset.counts["reencoded"][NOT_DALI] >= 4) == (counts["kept"] + counts["reencoded"], True)
    actions = [json.loads(line) for line in (tmp_path / "set/actions.jsonl").read_text().splitlines()]
    converted = {int(action["path"]) for action in actions if action.get("reason") == NOT_DALI}
    taken = []
    for i, image in enumerate(images):
        try:
            if prepare(image, Rules()).change is None:
                taken.append(i)
        except BadImageError:
            pass
    decoder = Decoder(Encoding())
    alone = {i for i in taken if decoder.refused([images[i]])}
    assert converted == alone >= set(range(400, 404))
    read_through(dataset)


@pytest.mark.parametrize("on_bad", ["skip", "fail"])
def test_what_training_does_not_decode_counts_as_not_stored_as_it_is(tmp_path: Path, on_bad: str) -> None:
    samples = [Sample("good", data=jpeg(0)), Sample("odd", data=pillow_only())]
    if on_bad == "fail":
        with pytest.raises(DatasetError, match=f"'odd' cannot be stored .{NOT_DALI}"):
            write_shards(samples, tmp_path / "set", classes=None, on_bad="fail")
    else:
        dataset = write_shards(samples, tmp_path / "set", classes=None, on_bad="skip")
        assert (dataset.counts["kept"], dataset.counts["left_out"]) == ({"jpg": 1}, {NOT_DALI: 1})


def test_a_converted_image_that_training_does_not_decode_either_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Decoder, "refused", lambda _, images: {len(images) - 1: "no"} if len(images) < 3 else {1: "no"})
    samples = [Sample(str(i), data=jpeg(i)) for i in range(3)]
    dataset = write_shards(samples, tmp_path / "set", classes=None, shard_size=3)
    assert (dataset.samples, dataset.counts["left_out"]) == (2, {NOT_DALI: 1})


def test_verify_names_what_training_does_not_decode_and_quarantine_takes_its_report(tmp_path: Path) -> None:
    samples = [Sample(f"{i}", data=pillow_only(i) if i in (5, 17) else jpeg(i)) for i in range(20)]
    dataset = write_shards(samples, tmp_path / "set", classes=None, shard_size=5, verify=False)
    with pytest.raises(LoaderError, match=r"train-00000\d.tar:\d+-(5|17) does not decode"):
        read_through(dataset)
    assert verify(tmp_path / "set") == []
    done = CliRunner().invoke(
        app, ["verify", str(tmp_path / "set"), "--images", "--workers", "1", "--report", str(tmp_path / "report")]
    )
    faults = [json.loads(line) for line in (tmp_path / "report").read_text().splitlines()]
    assert (done.exit_code, sorted(fault["key"].partition("-")[2] for fault in faults)) == (1, ["17", "5"])
    for fault in faults:
        assert f"{fault['shard']} {fault['key']}: {fault['key']}.jpg: {NOT_DALI}" in done.output
    assert (
        CliRunner().invoke(app, ["quarantine", str(tmp_path / "set"), "--from", str(tmp_path / "report")]).exit_code
        == 0
    )
    assert verify(tmp_path / "set", images=True) == []
    read_through(read_dataset(tmp_path / "set"))


def test_index_leaves_out_what_training_does_not_decode(tmp_path: Path) -> None:
    """Where it reads images at all, with --verify; and verify --images finds it afterwards."""
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for i in range(20):
            image = pillow_only(i) if i == 3 else jpeg(i)
            member = tarfile.TarInfo(f"{i}.jpg")
            member.size = len(image)
            tar.addfile(member, io.BytesIO(image))
    checked = index_tars([tmp_path / "t.tar"], tmp_path / "checked", verify=True)
    assert (checked.samples, checked.counts["left_out"]) == (19, {NOT_DALI: 1})
    read_through(checked)
    index_tars([tmp_path / "t.tar"], tmp_path / "unread")
    (fault,) = verify(tmp_path / "unread", images=True)
    assert (fault.shard, fault.key, NOT_DALI in fault.problem) == ("t.tar", "3", True)
    read_through(quarantine(tmp_path / "unread", ["3"]))


def test_a_failure_that_comes_up_before_its_batch_is_named_all_the_same() -> None:
    """The pipeline works on batches ahead; none of the batch that it fails in place of is blamed."""
    arrays = [np.frombuffer(image, np.uint8) for image in (jpeg(0), jpeg(1), jpeg(2), pillow_only())]
    batches = [Encoded(np.array([2 * i, 2 * i + 1]), arrays[2 * i : 2 * i + 2], None) for i in range(2)]
    feed = _Feed(iter(batches))
    for number in range(2):
        feed.images(number)
    assert list(feed.undecodable(0, Encoding(), CPU)) == [3]
