"""The encoder's file loads everywhere, comes back exactly, and is believed only where it matches the architecture."""

import json
import os
import struct

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

from model.checkpoint import DamagedError, save
from model.encoder import build_encoder
from model.encoder_file import export_encoder, load_encoder, load_head, read_metadata, save_head
from model.simclr import ProjectionHead
from tests.test_checkpoint import build, killed_at

IMAGE = {"image_size": 64, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear"}


def trained(depth=18, **kwargs):
    """An encoder whose every weight and statistic is away from its initial value."""
    torch.manual_seed(0)
    encoder = build_encoder(depth, **kwargs)
    for tensor in encoder.state_dict().values():
        if tensor.ndim == 1:
            tensor.copy_(0.5 + torch.rand(tensor.shape))
    return encoder.to(memory_format=torch.channels_last).eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A ResNet-18, its folder, images, and the features it must give."""
    encoder, folder = trained(), tmp_path_factory.mktemp("run")
    export_encoder(folder, encoder, **IMAGE, training={"recipe": "cifar10", "knn": 0.8})
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        return folder, images, encoder(images)


def assert_same_features(model, images, features):
    """float32 rounding apart: the file is contiguous, the encoder was channels_last, and their kernels differ."""
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), features, rtol=1e-4, atol=1e-5)


def test_torchvision_loads_the_file(exported):
    """strict=False, and only fc is missing."""
    folder, images, features = exported
    model = torchvision.models.resnet18()
    missing, unexpected = model.load_state_dict(load_file(folder / "encoder.safetensors"), strict=False)
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])
    model.fc = nn.Identity()
    assert_same_features(model, images, features)


def test_timm_loads_the_file_and_the_folder(exported):
    """checkpoint_path=, local-dir: with and without a new classifier, and the preprocessing we state."""
    folder, images, features = exported
    path = folder / "encoder.safetensors"
    assert_same_features(timm.create_model("resnet18", num_classes=0, checkpoint_path=path), images, features)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert_same_features(model, images, features)
    config = timm.data.resolve_model_data_config(model)
    assert tuple(config["input_size"]) == (3, 64, 64)
    assert (config["mean"], config["std"], config["interpolation"]) == (IMAGE["mean"], IMAGE["std"], "bilinear")
    assert config["crop_pct"] == 0.875
    classifier = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=10)
    assert classifier(images).shape == (2, 10)


@pytest.mark.parametrize(
    "architecture",
    [
        {"depth": 18},
        {"depth": 18, "stem": "small"},
        {"depth": 34, "width": 0.25},
        {"depth": 50, "width": 0.125, "stem": "small"},
    ],
)
@pytest.mark.parametrize("ours", [True, False])
def test_load_encoder_rebuilds_every_architecture(tmp_path, architecture, ours):
    """From our metadata, and from the shapes alone where there are none."""
    encoder = trained(**architecture)
    path = export_encoder(tmp_path, encoder, **IMAGE, training={})
    if not ours:
        save_file(load_file(path), path := tmp_path / "plain.safetensors")
    loaded = load_encoder(path)
    assert not loaded.training
    for attribute in ("depth", "width", "stem", "num_features"):
        assert getattr(loaded, attribute) == getattr(encoder, attribute)
    for (key, a), b in zip(loaded.state_dict().items(), encoder.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    assert all(p.requires_grad and p.device.type == "cpu" for p in loaded.parameters())
    standard = architecture == {"depth": 18}
    assert (tmp_path / "config.json").exists() == standard, "a config.json is a promise that timm can load the folder"


@pytest.mark.parametrize(("width", "stem"), [(1, "standard"), (0.125, "small")])
def test_selective_kernels_come_back_and_are_promised_to_nobody_else(tmp_path, width, stem):
    """load_encoder rebuilds them from the metadata, or from bare weights; timm gets no config.json."""
    encoder = trained(50, width=width, stem=stem, selective_kernel=True)
    path = export_encoder(tmp_path, encoder, **IMAGE, training={})
    loaded = load_encoder(path)
    assert loaded.selective_kernel
    for (key, a), b in zip(loaded.state_dict().items(), encoder.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    assert not (tmp_path / "config.json").exists()
    assert "no such selective kernels" in read_metadata(path)["loads_in"]
    save_file(load_file(path), tmp_path / "plain.safetensors")
    assert load_encoder(tmp_path / "plain.safetensors").selective_kernel


def test_load_encoder_takes_torchvisions_own_file(tmp_path):
    """With its fc, which is left out."""
    theirs = torchvision.models.resnet18()
    save_file(theirs.state_dict(), tmp_path / "resnet18.safetensors")
    theirs.fc = nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert_same_features(load_encoder(tmp_path / "resnet18.safetensors"), images, theirs.eval()(images))


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_the_small_stem_loads_as_its_metadata_say(tmp_path, library):
    """`loads_in` names two replacements; after them both libraries give the encoder's features."""
    encoder = trained(stem="small")
    path = export_encoder(tmp_path, encoder, **IMAGE, training={})
    assert "conv1 = Conv2d(3, 64, 3, 1, 1, bias=False) and maxpool = Identity()" in read_metadata(path)["loads_in"]
    model = torchvision.models.resnet18() if library == "torchvision" else timm.create_model("resnet18", num_classes=0)
    model.conv1, model.maxpool, model.fc = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity(), nn.Identity()
    model.load_state_dict(load_file(path))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert_same_features(model, images, encoder(images))


def test_export_is_plain_repeatable_and_honours_the_umask(tmp_path):
    """One metadata key of sorted JSON, so equal encoders give equal bytes; mode 0666 less the umask; float32."""
    encoder = trained(width=1 / 64).to(torch.bfloat16)
    training = {"z": 1, "a": {"é": [1, None]}}
    first = export_encoder(tmp_path / "a", encoder, **IMAGE, training=training)
    before = os.umask(0o027)
    try:
        second = export_encoder(tmp_path / "b", encoder, **IMAGE, training=dict(reversed(training.items())))
    finally:
        os.umask(before)
    assert first.read_bytes() == second.read_bytes()
    assert second.stat().st_mode & 0o777 == 0o640
    facts = read_metadata(first)
    assert facts["training"] == training
    assert facts["mean"] == IMAGE["mean"]
    assert (facts["depth"], facts["width"], facts["stem"], facts["num_features"]) == (18, 1 / 64, "standard", 8)
    assert {t.dtype for t in load_file(first).values()} == {torch.float32, torch.int64}


def test_a_changed_bit_in_an_encoder_or_a_head_is_found(tmp_path):
    """In any weight, its shape's text, or what the metadata say; the same file without its hash loads as before."""
    encoder, head = trained(width=1 / 64), ProjectionHead(8, out_features=4)
    save_head(tmp_path / "head.safetensors", head)
    path = export_encoder(tmp_path, encoder, **IMAGE, training={"recipe": "demo"}, dtype=torch.bfloat16)
    for file, read in ((path, load_encoder), (tmp_path / "head.safetensors", load_head)):
        read(file)
        data = file.read_bytes()
        start = 8 + struct.unpack("<Q", data[:8])[0]
        for at in range(start, len(data), max(1, (len(data) - start) // 40)):
            file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            with pytest.raises(ValueError, match=rf"{file.name}.* (is damaged: the sha256|is not finite)"):
                read(file)
        file.write_bytes(data)
    data = path.read_bytes()
    path.write_bytes(facts_of(data, mean=[0.4, 0.5, 0.7]))
    with pytest.raises(ValueError, match="encoder.safetensors is damaged: the sha256 of its tensors and metadata is"):
        load_encoder(path)
    facts = read_metadata(path) | {"mean": IMAGE["mean"]}
    del facts["sha256"]
    path.write_bytes(with_metadata(data, json.dumps(facts)))
    for (key, a), b in zip(load_encoder(path).state_dict().items(), encoder.state_dict().values(), strict=True):
        assert torch.equal(a, b.bfloat16().to(b.dtype)), key


def test_weights_in_a_checkpoint_are_held_to_its_hash(tmp_path):
    """Encoder and head; the optimizer's state may be gone."""
    model, optimizer = build()
    path = save(tmp_path, 1, model=model, optimizer=optimizer, extra={})
    (path / "optimizer.safetensors").unlink()
    load_encoder(path)
    load_head(path)
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    for read in (load_encoder, load_head):
        with pytest.raises(DamagedError, match="step-0000001/model.safetensors is damaged: its sha256 is"):
            read(path)


def test_an_encoder_with_nan_is_not_exported(tmp_path):
    """The error names the tensor, and the encoder exported before stays."""
    encoder = build_encoder(18, width=1 / 64)
    path = export_encoder(tmp_path, encoder, **IMAGE, training={})
    before = path.read_bytes()
    nn.init.constant_(encoder.layer2[0].conv1.weight, float("nan"))
    with pytest.raises(ValueError, match=r"layer2\.0\.conv1\.weight"):
        export_encoder(tmp_path, encoder, **IMAGE, training={})
    assert path.read_bytes() == before


# ------------------------------------------------------------------------------------------------------ hostile files


def split(data):
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(header, body):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def edited(data, key="conv1.weight", **changes):
    header, body = split(data)
    header[key] = header[key] | changes
    return joined(header, body)


def with_metadata(data, text):
    header, body = split(data)
    return joined(header | {"__metadata__": {"swiftclr": text}}, body)


def renamed(data, old, new):
    header, body = split(data)
    return joined({new if key == old else key: value for key, value in header.items()}, body)


def facts_of(data, **changes):
    return with_metadata(data, json.dumps(json.loads(split(data)[0]["__metadata__"]["swiftclr"]) | changes))


def doubled(data):
    header, body = split(data)
    entry = json.dumps(header["conv1.weight"])
    return joined(b'{"evil":' + entry.encode() + b"," + json.dumps(header).encode()[1:], body)


def with_hole(data):
    header, body = split(data)
    last = max((k for k in header if k != "__metadata__"), key=lambda k: header[k]["data_offsets"][1])
    header[last]["data_offsets"] = [offset + 8 for offset in header[last]["data_offsets"]]
    return joined(header, body + bytes(8))


def many_empty(data):
    header, body = split(data)
    end = len(body)
    extra = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [end, end]} for i in range(100_000)}
    return joined(header | extra, body)


def poisoned(data):
    header, body = split(data)
    start = header["conv1.weight"]["data_offsets"][0]
    return joined(header, body[:start] + struct.pack("<f", float("nan")) + body[start + 4 :])


HOSTILE = {
    "empty": (lambda _: b"", "not a safetensors file"),
    "seven bytes": (lambda d: d[:7], "safetensors file|header"),
    "a header of 2^63 bytes": (lambda d: struct.pack("<Q", 2**63) + d[8:], "header of 9223372036854775808 bytes"),
    "a header of a gigabyte": (lambda d: struct.pack("<Q", 10**9) + d[8:], "header of 1000000000 bytes"),
    "truncated": (lambda d: d[:-1], "not a safetensors file"),
    "bytes at the end": (lambda d: d + b"x", "not a safetensors file"),
    "overlap": (lambda d: edited(d, data_offsets=[0, 108]), "not a safetensors file"),
    "hole": (with_hole, "not a safetensors file"),
    "shape overflow": (lambda d: edited(d, shape=[2**62, 2**62, 7, 7]), "not a safetensors file"),
    "negative shape": (lambda d: edited(d, shape=[-1, 3, 7, 7]), "not a safetensors file"),
    "unknown type": (lambda d: edited(d, dtype="F31"), "not a safetensors file"),
    "deep JSON": (lambda _: joined(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b""), "not a safetensors file"),
    "fifty megabytes of metadata": (lambda d: with_metadata(d, "x" * 50_000_000), "header of"),
    "100,000 empty tensors": (many_empty, "header of"),
    "a key too many": (doubled, "evil|not a safetensors file"),
    "a key like a path": (lambda d: renamed(d, "conv1.weight", "../../conv1.weight"), "conv1.weight"),
    "a key missing": (lambda d: renamed(d, "bn1.bias", "bn1.beta"), "bn1.beta' is unexpected"),
    "another type": (lambda d: edited(d, dtype="I32"), "conv1.weight is torch.int32"),
    "another shape": (lambda d: edited(d, shape=[3, 1, 7, 7]), r"conv1.weight is torch.float32 \(3, 1, 7, 7\)"),
    "NaN": (poisoned, "conv1.weight is not finite"),
    "metadata that are no JSON": (lambda d: with_metadata(d, "{"), "metadata"),
    "metadata that are deep JSON": (lambda d: with_metadata(d, "[" * 100_000), "metadata"),
    "metadata that are a number": (lambda d: with_metadata(d, "7"), "metadata"),
    "metadata of the future": (lambda d: facts_of(d, format=2), "format 2"),
    "a depth that is none": (lambda d: facts_of(d, depth=10**9), "depth"),
    "a depth that is a list": (lambda d: facts_of(d, depth=[18]), "metadata"),
    "a gigantic width": (lambda d: facts_of(d, width=1e9), "width"),
    "a width that is text": (lambda d: facts_of(d, width="1"), "metadata"),
    "the wrong width": (lambda d: facts_of(d, width=4), "expected torch.float32"),
    "a pickle": (lambda _: b"\x80\x04cos\nsystem\n(S'touch hacked'\ntR.", "header of|safetensors"),
}


@pytest.mark.parametrize("case", list(HOSTILE))
def test_hostile_and_foreign_files_are_refused(tmp_path, case, monkeypatch):
    """One ValueError that names the file and the trouble; nothing runs, nothing large is allocated."""
    monkeypatch.chdir(tmp_path)
    path = export_encoder(tmp_path, build_encoder(18, width=1 / 64), **IMAGE, training={})
    change, message = HOSTILE[case]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as error:
        load_encoder(path)
    assert "encoder.safetensors" in str(error.value)
    assert not (tmp_path / "hacked").exists()


def test_a_file_that_is_no_resnet_is_refused(tmp_path):
    """Plain safetensors of another network: what was looked for and what was there."""
    save_file({"weight": torch.zeros(3)}, tmp_path / "linear.safetensors")
    with pytest.raises(ValueError, match="expected one ResNet under torchvision.s"):
        load_encoder(tmp_path / "linear.safetensors")
    with pytest.raises(ValueError, match="missing.safetensors does not exist"):
        load_encoder(tmp_path / "missing.safetensors")


def test_kill_anywhere_in_an_export_leaves_a_whole_encoder(tmp_path, monkeypatch):
    """The old or the new file, never a part; the next export cleans up."""
    old, new = build_encoder(18, width=1 / 64), build_encoder(18, width=1 / 64)
    seen = []
    for point in range(1, 1000):
        folder = tmp_path / str(point)
        export_encoder(folder, old, **IMAGE, training={"run": "old"})
        killed = killed_at(monkeypatch, point, export_encoder, folder, new, **IMAGE, training={"run": "new"})
        run = read_metadata(folder / "encoder.safetensors")["training"]["run"]
        expected = {"old": old, "new": new}[run]
        assert torch.equal(load_encoder(folder).conv1.weight, expected.conv1.weight)
        seen.append(run)
        export_encoder(folder, new, **IMAGE, training={})
        assert [p.name for p in folder.iterdir()] == ["encoder.safetensors"]
        if not killed:
            break
    assert seen == sorted(seen, reverse=True)
    assert set(seen) == {"old", "new"}
