"""Encoders leave under any project's names and come back the same; the card says what is known, and nothing else."""

import hashlib
import json
from pathlib import Path

import pytest
import timm
import torch
import torchvision
import yaml
from markdown_it import MarkdownIt
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from model import checkpoint
from model.encoder import build_encoder
from model.encoder_file import export_encoder, load_encoder, load_head, read_metadata, save_head, weights_file
from model.names import from_torchvision, to_torchvision
from model.simclr import NUM_LAYERS, ProjectionHead, SimCLR
from pipeline.views import make_views
from tools.export import app, card

PREPARED = {"image_size": 32, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25], "interpolation": "bilinear"}
TRAINING = {
    "recipe": "cifar10",
    "steps": 40,
    "dataset": "f1" * 32,
    "config": {"temperature": 0.5, "views": {"size": 32}},
}


def settled(depth=18, *, width=0.25, stem="standard", seed=0):
    """An encoder whose statistics and every γ differ from their start, so that no two tensors can be mistaken."""
    torch.manual_seed(seed)
    encoder = build_encoder(depth, width=width, stem=stem)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
    return encoder.eval()


def same(a, b):
    """Equal names and values."""
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]), key


def run(*words):
    """The program's exit code and what it printed."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


def lightning(model):
    """A torchvision ResNet as training frameworks save it: (name of the layout, its state dict)."""
    children = nn.Sequential(*list(model.children())[:-1])
    functional = nn.Sequential(model.conv1, model.bn1, model.layer1, model.layer2, model.layer3, model.layer4)
    shortcut = {key.replace(".downsample.", ".shortcut."): value for key, value in functional.state_dict().items()}
    plain, copy = model.state_dict(), settled(18, width=1, seed=9).state_dict()
    extra = {"projector.0.weight": torch.zeros(4, 4), "classifier.weight": torch.zeros(4, 4)}
    yield "torchvision", plain
    yield "timm", timm.create_model("resnet18").state_dict() | plain
    yield "compiled", {f"module._orig_mod.{key}": value for key, value in plain.items()}
    yield "solo-learn", {f"backbone.{k}": v for k, v in plain.items()} | extra
    momentum = {f"momentum_backbone.{k}": v for k, v in copy.items()}
    yield "solo-learn's BYOL", {f"backbone.{k}": v for k, v in plain.items()} | momentum | extra
    yield "MoCo", {f"encoder_q.{k}": v for k, v in plain.items()} | {f"encoder_k.{k}": v for k, v in copy.items()}
    head = {"projection_head.layers.0.weight": torch.zeros(4, 4)}
    yield "lightly", {f"backbone.{k}": v for k, v in children.state_dict().items()} | head
    yield "lightly's own ResNet", {f"backbone.{k}": v for k, v in shortcut.items()} | head


def test_other_projects_weights_are_read(tmp_path):
    """Every layout gives the encoder that torchvision's own names give, without what surrounds it."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18()
    expected = {key: value for key, value in model.state_dict().items() if not key.startswith("fc.")}
    for name, weights in lightning(model):
        save_file({key: value.clone() for key, value in weights.items()}, tmp_path / "their.safetensors")
        encoder = load_encoder(tmp_path / "their.safetensors")
        assert (encoder.depth, encoder.width, encoder.stem) == (18, 1, "standard"), name
        same(encoder.state_dict(), expected)
    images = torch.randn(2, 3, 64, 64)
    model.fc = nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), model.eval()(images))


@pytest.mark.parametrize("depth", [18, 50])
def test_names_go_there_and_back(depth):
    """lightly's and solo-learn's names of an encoder are distinct and lead back to torchvision's."""
    with torch.device("meta"):
        keys = set(build_encoder(depth).state_dict())
    for names in ("torchvision", "timm", "lightly", "solo-learn"):
        there = {from_torchvision(key, names): key for key in keys}
        assert to_torchvision(there) == there
    children = nn.Sequential(*list(torchvision.models.get_model(f"resnet{depth}").children())[:-1])
    assert {from_torchvision(key, "lightly") for key in keys} == {f"backbone.{key}" for key in children.state_dict()}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["conv1.weight", "fc.weight"], "none among"),
        ([], "none among"),
        (
            ["a.layer1.0.conv1.weight", "b.layer1.0.conv1.weight"],
            "several: 'a.', 'b.'",
        ),
    ],
)
def test_what_is_no_single_resnet_is_refused(keys, message):
    """None, or two of equal rank: nothing is guessed."""
    with pytest.raises(ValueError, match=message):
        to_torchvision(keys)


@pytest.mark.parametrize("names", ["torchvision", "lightly", "solo-learn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_export_comes_back(tmp_path, names, dtype):
    """Rounded to its type and otherwise equal, under any names; counters stay integers."""
    encoder = settled(stem="small")
    path = export_encoder(tmp_path, encoder, **PREPARED, training={}, names=names, dtype=dtype)
    stored = load_file(path)
    assert stored[from_torchvision("conv1.weight", names)].dtype == dtype
    assert stored[from_torchvision("bn1.num_batches_tracked", names)].dtype == torch.int64
    back = load_encoder(path)
    assert (back.depth, back.width, back.stem) == (18, 0.25, "small")
    same(back.state_dict(), {k: v.to(dtype).to(v.dtype) for k, v in encoder.state_dict().items()})


def test_weights_that_overflow_half_precision_are_refused(tmp_path):
    """65504 is the largest float16: infinity is not written in its place."""
    encoder = settled()
    encoder.bn1.running_var.fill_(1e6)
    with pytest.raises(ValueError, match=r"bn1.running_var is not finite as torch.float16"):
        export_encoder(tmp_path, encoder, **PREPARED, training={}, dtype=torch.float16)
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("kind", [kind for kind, layers in NUM_LAYERS.items() if layers])
def test_a_head_comes_back_from_a_checkpoint_and_alone(tmp_path, kind):
    """Its kind and widths are known by its shapes."""
    head = ProjectionHead(128, kind=kind, out_features=16)
    model = SimCLR(settled(), head)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = checkpoint.save(tmp_path, 3, model=model, optimizer=optimizer, extra={})
    save_head(tmp_path / "head.safetensors", head)
    for path in (step, tmp_path / "head.safetensors"):
        found = load_head(path)
        assert found.out_features == 16
        same(found.state_dict(), head.state_dict())
    same(load_encoder(step).state_dict(), model.encoder.state_dict())


@pytest.mark.parametrize("stem", ["standard", "small"])
def test_selective_kernels_are_known_by_their_shapes(tmp_path, stem):
    """A checkpoint says nothing of its architecture, and gives its encoder all the same."""
    torch.manual_seed(0)
    encoder = build_encoder(50, width=0.125, stem=stem, selective_kernel=True)
    save_file({f"encoder.{key}": value for key, value in encoder.state_dict().items()}, tmp_path / "model.safetensors")
    found = load_encoder(tmp_path)
    assert (found.stem, found.selective_kernel, found.width) == (stem, True, 0.125)
    same(found.state_dict(), encoder.state_dict())


def test_a_file_without_a_head_says_so(tmp_path):
    """An exported encoder holds none."""
    with pytest.raises(ValueError, match="no projection head"):
        load_head(export_encoder(tmp_path, settled(), **PREPARED, training={}))


def finished_run(folder: Path):
    """A run as train.py leaves it, of a ResNet-18 of full width: (run folder, encoder, head)."""
    encoder, head = settled(width=1), ProjectionHead(512, out_features=16)
    path = export_encoder(folder / "encoder", encoder, **PREPARED, training=TRAINING)
    model = SimCLR(encoder, head)
    views = {"size": 32, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25], "eval_crop": 1.0, "interpolation": "cubic"}
    extra = {
        "recipe": "cifar10",
        "config": {"temperature": 0.5, "data": "/home/somebody/secret", "views": views},
        "loaders": [{"identity": {"dataset": "f1" * 32}}],
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    checkpoint.save(folder / "checkpoints", 40, model=model, optimizer=optimizer, extra=extra)
    rows = [
        {"step": 0, "knn": 0.1234},
        {"step": 20, "knn": 0.3333},
        {"step": 40, "loss": 3.0},
        {"step": 40, "knn": 0.5678},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, encoder, head, path


def test_a_run_becomes_a_folder_that_timm_loads(tmp_path):
    """Weights, configuration, head and card; timm takes the folder although the head lies in it too."""
    source, encoder, head, _ = finished_run(tmp_path / "run")
    out = tmp_path / "out"
    code, said = run(source, out, "--head", "--license", "cc-by-4.0", "--dataset", "Tiny Drawings")
    assert (code, said) == (0, f"{out}: README.md, config.json, head.safetensors, model.safetensors\n")
    images = torch.randn(2, 3, 64, 64)
    theirs = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), encoder(images))
    config = timm.data.resolve_data_config(model=theirs)
    assert (list(config["mean"]), list(config["input_size"])) == ([0.4, 0.5, 0.6], [3, 32, 32])
    same(load_encoder(out).state_dict(), encoder.state_dict())
    same(load_head(out / "head.safetensors").state_dict(), head.state_dict())
    assert read_metadata(out / "model.safetensors")["training"] == TRAINING


def test_the_card_says_what_is_known(tmp_path):
    """The licence line, the data, the recipe, the run's kNN, and only results of exactly these weights."""
    source, _, _, weights = finished_run(tmp_path / "run")
    row = {
        "evaluation": "linear",
        "scores": {"linear": {"top1": 0.6111, "top5": 0.9222}},
        "options": {"cached": True},
        "train": {"name": "train"},
        "test": {"name": "test"},
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }
    others = [row | {"sha256": None, "scores": {"linear": {"top1": 0.7777, "top5": 1.0}}}]
    tuned = {"pre-trained": {"top1": 0.4444, "top5": 0.8}, "from scratch": {"top1": 0.2929, "top5": 0.7}}
    others += [row | {"evaluation": "finetune", "scores": tuned, "options": {"labels": 50}}]
    weights.with_name("evaluation.jsonl").write_text("".join(json.dumps(each) + "\n" for each in [row, *others]))
    assert run(source, tmp_path / "my-encoder", "--license", "cc-by-4.0", "--dataset", "Tiny Drawings")[0] == 0
    card = (tmp_path / "my-encoder/README.md").read_text()
    header, body = card.removeprefix("---\n").split("---\n", 1)
    assert {line.split(": ")[0]: json.loads(line.split(": ", 1)[1]) for line in header.splitlines()} == {
        "license": "cc-by-4.0",
        "library_name": "timm",
        "tags": ["simclr", "self-supervised", "timm"],
        "pipeline_tag": "image-feature-extraction",
    }
    for expected in (
        "# my-encoder\n",
        "ResNet-18 encoder (width 1, standard stem, 11.2 M parameters)",
        "| images | Tiny Drawings |",
        "| steps | 40 |",
        "| temperature | 0.5 |",
        "| views: size | 32 |",
        f"| shards' fingerprint | {'f1' * 32} |",
        "| kNN in training, step 0 | 12.34 % |  |",
        "| kNN in training, step 40 | 56.78 % |  |",
        "| linear, cached features, train to test | 61.11 % | 92.22 % |",
        "| finetune, 50 labels, train to test | 44.44 % | 80.00 % |",
        "resized to 37 px (bilinearly, antialiased), the central 32 px square",
        "less 0.4, 0.5, 0.6, divided by 0.2, 0.3, 0.25",
        "Of the weights: cc-by-4.0.",
    ):
        assert expected in body, expected
    for wrong in ("77.77", "29.29", "33.33"):  # random weights, fresh weights, another step
        assert wrong not in body, wrong


def test_a_checkpoint_is_stripped_to_its_encoder(tmp_path):
    """What remains is the encoder, the images' preparation and the settings, without the paths of the machine."""
    source, encoder, _, _ = finished_run(tmp_path / "run")
    assert run(source / "checkpoints/step-0000040", tmp_path / "out", "--dtype", "float16")[0] == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    same(
        load_encoder(tmp_path / "out").state_dict(), {k: v.half().to(v.dtype) for k, v in encoder.state_dict().items()}
    )
    told = read_metadata(tmp_path / "out/model.safetensors")
    assert (told["interpolation"], told["crop_pct"], told["training"]["steps"]) == ("bicubic", 1.0, 40)
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert "secret" not in json.dumps(file.metadata())
    assert "secret" not in (tmp_path / "out/README.md").read_text()


def test_a_strangers_file_is_not_called_simclrs(tmp_path):
    """Its card claims no training, no results and no licence; what timm cannot build gets no config."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18()
    save_file({f"backbone.{k}": v for k, v in model.state_dict().items()}, tmp_path / "their.safetensors")
    assert run(tmp_path / "their.safetensors", tmp_path / "plain", "--view", "size=96")[0] == 0
    card = (tmp_path / "plain/README.md").read_text()
    assert "does not say how they were trained" in card
    assert "None measured." in card
    assert 'license: "unknown"' in card
    assert "simclr" not in card.lower()
    assert json.loads((tmp_path / "plain/config.json").read_text())["pretrained_cfg"]["input_size"] == [3, 96, 96]
    assert run(tmp_path / "plain", tmp_path / "lightly", "--names", "lightly")[0] == 0
    assert not (tmp_path / "lightly/config.json").exists()
    children = nn.Sequential(*list(model.children())[:-1])
    written = {k.removeprefix("backbone."): v for k, v in load_file(tmp_path / "lightly/model.safetensors").items()}
    same(written, dict(children.state_dict()))


def test_the_card_of_selective_kernels_names_what_builds_them(tmp_path):
    """torchvision has none, though width and stem are its own."""
    encoder = build_encoder(50, selective_kernel=True)
    export_encoder(tmp_path / "encoder", encoder, **PREPARED, training={})
    assert run(tmp_path / "encoder", tmp_path / "out")[0] == 0
    card = (tmp_path / "out/README.md").read_text()
    assert 'load_encoder("FOLDER")' in card
    assert "torchvision" not in card


def test_what_cannot_be_exported_is_said_in_one_line(tmp_path):
    """Exit code 2, what is wrong and what to do, and nothing written."""
    source, *_ = finished_run(tmp_path / "run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/kept").write_text("kept")
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x02}q\x00." * 20)
    (tmp_path / "empty").mkdir()
    for words, message in [
        ((tmp_path / "none", tmp_path / "out"), "none does not exist; expected a run, its encoder folder"),
        ((tmp_path / "empty", tmp_path / "out"), "empty holds no encoder: neither encoder.safetensors nor"),
        ((tmp_path / "model.ckpt", tmp_path / "out"), "model.ckpt"),
        ((source, tmp_path / "full"), "is not empty, and nothing is ever overwritten"),
        ((source, tmp_path / "out", "--view", "size=nine"), "view option"),
    ]:
        code, said = run(*words)
        assert code == 2, said
        assert message in said
        assert said.count("\n") == 1
    alone = tmp_path / "alone"
    export_encoder(alone, settled(), **PREPARED, training={})
    code, said = run(alone, tmp_path / "out", "--head")
    assert code == 2
    assert "the projection head of" in said
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "full/kept").read_text() == "kept"


def test_a_pickle_is_refused_with_a_way_out(tmp_path):
    """A Lightning checkpoint is never unpickled; the message says how its owner makes it readable."""
    torch.save({"state_dict": {"backbone.conv1.weight": torch.zeros(1)}}, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=r"model.ckpt.*(not a safetensors file|header).*") as error:
        load_encoder(weights_file(tmp_path / "model.ckpt"))
    assert "safetensors.torch.save_file" in str(error.value)


HOSTILE = "a|b\n# h\r- x `c` *b* _e_ snake_case [l](http://x) <img src=x> ![i](y) &amp; ~~s~~ \\ \x07\u2028\x85"
HOSTILE += " \ud83d \U0001f600 ---"


def test_what_the_card_quotes_stays_text():
    """As rendered, each quoted value is its own characters, in one cell or line, and as YAML one value."""
    training = TRAINING | {"recipe": HOSTILE, "config": {HOSTILE: HOSTILE}}
    results = [(f"linear, {HOSTILE} to test", "1 %", "2 %")]
    views = make_views("imagenet", {"size": 32})
    text = card(HOSTILE, settled(), views, training, results, "torchvision", True, HOSTILE, HOSTILE)
    text.encode()
    _, header, body = text.split("---\n", 2)
    assert yaml.safe_load(header)["license"] == HOSTILE.replace("\ud83d", "\ufffd")
    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(body)
    inline = [part for token in tokens for part in token.children or []]
    assert {part.type for part in inline} <= {"text", "text_special", "softbreak"}
    assert not [token for token in tokens if "html" in token.type or "list" in token.type]
    shown = "".join(c if c.isprintable() else " " for c in HOSTILE)
    whole = ["".join(part.content for part in token.children) for token in tokens if token.type == "inline"]
    assert squeezed(whole[0]) == squeezed(shown)
    assert whole.count(whole[0]) == 5, "title, images, recipe and both sides of the option"


def squeezed(text):
    return " ".join(text.split())


def test_a_strange_row_of_results_is_named(tmp_path):
    source, _, _, weights = finished_run(tmp_path / "run")
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    for row in ({}, {"sha256": digest}, {"sha256": digest, "options": [], "evaluation": 1}):
        weights.with_name("evaluation.jsonl").write_text(f"{json.dumps(row)}\n")
        code, said = run(source, tmp_path / "out")
        assert (code, "evaluation.jsonl, row 1 is not an evaluation's" in said) == (2, True), said
