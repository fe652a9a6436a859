"""The evaluations do what their protocols say, from the command line, on one process as on two."""

import csv
import json
import os
import shutil
import socket
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from typer.testing import CliRunner

from model import checkpoint
from model.encoder import build_encoder
from model.encoder_file import export_encoder, load_encoder
from model.probe import train_classifier, zero_linear
from model.simclr import ProjectionHead, SimCLR
from pipeline.demo import CLASSES, draw_image
from pipeline.labels import check_alike
from pipeline.loader import build_eval_loader
from pipeline.shards import DatasetError, Sample, read_dataset
from pipeline.subset import keys
from pipeline.views import make_views
from pipeline.write import write_shards
from tests.processes import Program
from tools.evaluate import app, usual_batch

ROOT = Path(__file__).resolve().parents[1]
KINDS = 6  # classes; more than five, so that top-5 says something
VIEWS = make_views("cifar", {"size": 16, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]})


def drawings(count, seed):
    """(PNG samples, classes): drawn patterns, balanced."""
    import io

    from PIL import Image

    rng, samples = np.random.default_rng(seed), []
    for i in range(count):
        file = io.BytesIO()
        Image.fromarray(draw_image(i % KINDS, rng)).save(file, "PNG")
        samples.append(Sample(f"drawing-{i}.png", i % KINDS, file.getvalue()))
    return samples


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """240 training and 122 test images."""
    folder = tmp_path_factory.mktemp("data")
    write_shards(drawings(240, 0), folder / "train", classes=CLASSES[:KINDS], name="train", shard_size=50)
    write_shards(drawings(122, 1), folder / "test", classes=CLASSES[:KINDS], name="test")
    return folder


def images_of(path):
    """Images (N, 3, 16, 16) and labels of a data set, in its order."""
    batches = list(build_eval_loader(read_dataset(path), VIEWS, 64, torch.device("cpu")))
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A run folder whose encoder is good: taught the classes of 960 other drawings, then stripped of its classifier."""
    folder = tmp_path_factory.mktemp("planted")
    write_shards(drawings(960, 2), folder / "data", classes=CLASSES[:KINDS], name="other")
    torch.manual_seed(0)
    encoder = build_encoder(18, width=0.125, stem="standard").train()
    images, labels = images_of(folder / "data")
    encoder.fc = zero_linear(64, KINDS)
    batches = (torch.randint(len(labels), (64,)) for _ in range(120))
    for _ in train_classifier(encoder, ((images[i], labels[i]) for i in batches), total_steps=120, peak_lr=0.1):
        pass
    encoder.fc = torch.nn.Identity()
    run = folder / "run"
    facts = {"mean": VIEWS.mean, "std": VIEWS.std, "interpolation": "bilinear", "crop_pct": 1.0}
    export_encoder(run / "encoder", encoder, image_size=16, **facts, training={})
    model = SimCLR(encoder, ProjectionHead(64, out_features=8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    checkpoint.save(run / "checkpoints", 1, model=model, optimizer=optimizer, extra={})
    return run


@pytest.fixture(scope="module")
def features(planted, data):
    """Features and labels of both sets, computed here without the tool: ((240, 64), (240,)), ((122, 64), (122,))."""
    encoder = load_encoder(planted)
    with torch.no_grad():
        return [(encoder(images).double().numpy(), labels.numpy()) for images, labels in map(images_of, sets(data))]


def sets(data):
    return data / "train", data / "test"


def run(*words):
    """(exit code, what was printed) of the program, in this process."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


def evaluate(*words, into):
    """The row that an evaluation appends to the file `into`."""
    code, said = run(*words, "--results", into)
    assert code == 0, said
    return json.loads(into.read_text().splitlines()[-1])


def test_knn_is_scikit_learns(planted, data, features):
    """Exactly its accuracy on features computed here; the row says of what, and goes to the encoder's own folder."""
    code, said = run("knn", planted, *sets(data), "--k", 5, "--k", 20)
    assert code == 0, said
    path = planted / "encoder/evaluation.jsonl"
    row = json.loads(path.read_text())
    (bank, bank_labels), (queries, labels) = features
    for k in (5, 20):
        peer = KNeighborsClassifier(k, weights=lambda distance: np.exp((1 - distance) / 0.1), metric="cosine")
        expected = peer.fit(bank, bank_labels).score(queries, labels)
        assert row["scores"][f"k={k}"]["top1"] == pytest.approx(expected, abs=1e-12)
        assert f"k={k}" in said
        assert f"{100 * expected:6.2f} %" in said
    assert 0.5 < row["scores"]["k=5"]["top1"] < row["scores"]["k=5"]["top5"] <= 1
    assert row["train"]["fingerprint"] == read_dataset(data / "train").fingerprint
    assert (row["evaluation"], row["processes"], row["views"]["size"]) == ("knn", 1, 16)
    evaluate("knn", planted, *sets(data), into=path)
    assert len(path.read_text().splitlines()) == 2, "results are added, none is replaced"


def test_logistic_is_scikit_learns(planted, data, features, tmp_path):
    """Within 0.2 % of it at the l2 that was best on held-out samples, trained on all; every l2 is on record."""
    row = evaluate(
        "logistic", planted, *sets(data), *("--l2", 0.1, "--l2", 1000, "--l2", 10), into=tmp_path / "results.jsonl"
    )
    (train, train_labels), (test, labels) = features
    tried = dict(row["tried"])
    assert list(tried) == [1000, 10, 0.1]
    assert row["options"]["l2"] == max(tried, key=tried.get)
    peer = LogisticRegression(C=1 / row["options"]["l2"], max_iter=5000, tol=1e-8).fit(train, train_labels)
    assert row["scores"]["logistic"]["top1"] == pytest.approx(peer.score(test, labels), abs=0.002)


def test_linear_follows_the_protocol(planted, data, features, tmp_path):
    """Learning rate B / 256 down half a cosine, 240 // B steps an epoch, and about as good as the best classifier."""
    words = ("--epochs", 12, "--eval-every", 4, "--train-batch", 32, "--base-lr", 1)
    row = evaluate("linear", planted, *sets(data), *words, into=tmp_path / "results.jsonl")
    curve = row["curves"]["linear"]
    assert [(at["epoch"], at["step"]) for at in curve] == [(4, 28), (8, 56), (12, 84)]
    expected = [1 * 32 / 256 * 0.5 * (1 + np.cos(np.pi * (at["step"] - 1) / 84)) for at in curve]
    assert [at["lr"] for at in curve] == pytest.approx(expected)
    (train, train_labels), (test, labels) = features
    best = LogisticRegression(max_iter=5000).fit(train, train_labels).score(test, labels)
    assert row["scores"]["linear"]["top1"] == pytest.approx(best, abs=0.1)
    assert row["scores"]["linear"] == {name: curve[-1][name] for name in ("top1", "top5")}
    cached = evaluate("linear", planted, *sets(data), "--cached", *words, into=tmp_path / "results.jsonl")
    assert cached["scores"]["linear"]["top1"] == pytest.approx(best, abs=0.1)


def test_linear_leaves_the_encoder_as_it_was(planted, data, monkeypatch, tmp_path):
    """Frozen weights and, in inference mode, frozen statistics; images are cropped and flipped and not recoloured."""
    import model.probe
    import pipeline.loader

    seen = {}
    train, start = model.probe.train_classifier, pipeline.loader.Loader.__init__

    def spy(network, *args, **kwargs):
        seen["network"] = network
        seen["modes"] = {each.training for each in network.modules() if isinstance(each, torch.nn.BatchNorm2d)}
        return train(network, *args, **kwargs)

    def spy_on_views(self, dataset, views, *args, **kwargs):
        seen["views"] = views
        start(self, dataset, views, *args, **kwargs)

    monkeypatch.setattr(model.probe, "train_classifier", spy)
    monkeypatch.setattr(pipeline.loader.Loader, "__init__", spy_on_views)
    evaluate("linear", planted, *sets(data), "--epochs", 1, into=tmp_path / "results.jsonl")
    views = seen["views"]
    assert (views.jitter_p, views.grayscale_p, views.blur_p) == (0, 0, 0)
    assert (views.flip_p, views.crop_area, views.size) == (0.5, (0.08, 1.0), 16)
    assert seen["modes"] == {False}
    before, after = load_encoder(planted).state_dict(), seen["network"].state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert after["fc.weight"].any()
    evaluate("finetune", planted, *sets(data), "--percent", 100, "--epochs", 1, into=tmp_path / "results.jsonl")
    assert seen["modes"] == {True}, "fine-tuning trains BatchNorm too"


def test_finetuning_beats_training_from_scratch(planted, data, tmp_path):
    """On 10 % of the labels, in the same steps; the curve of both is on record."""
    words = ("--percent", 10, "--from-scratch", "--epochs", 6, "--eval-every", 3, "--train-batch", 8)
    row = evaluate("finetune", planted, *sets(data), *words, into=tmp_path / "results.jsonl")
    assert row["options"]["labels"] == 24
    good, bad = (row["scores"][name]["top1"] for name in ("pre-trained", "from scratch"))
    assert good > 0.6
    assert good > bad + 0.2
    assert {name: [at["epoch"] for at in curve] for name, curve in row["curves"].items()} == {
        "pre-trained": [3, 6],
        "from scratch": [3, 6],
    }
    assert row["curves"]["pre-trained"][0]["lr"] == pytest.approx(0.05 * 8 / 256 * 0.5 * (1 + np.cos(np.pi * 8 / 18)))


def test_finetuning_on_a_list_and_from_the_head(planted, data, tmp_path):
    """The samples named and no others; one layer of the run's head stays below the classifier."""
    listed = [f"drawing-{i}.png" for i in range(30)]
    (tmp_path / "list.txt").write_text("\n".join(listed) + "\n")
    words = ("--label-list", tmp_path / "list.txt", "--head-layers", 1, "--epochs", 2, "--train-batch", 8)
    row = evaluate("finetune", planted, *sets(data), *words, into=tmp_path / "results.jsonl")
    assert (row["options"]["labels"], row["options"]["head_layers"], row["options"]["percent"]) == (30, 1, None)
    code, said = run("finetune", planted, *sets(data), "--head-layers", 3)
    assert (code, "has 2" in said) == (2, True)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_embeddings_are_the_features(planted, data, features, tmp_path, suffix):
    """Every sample's features, label and key, in the order of the shards."""
    out = tmp_path / f"test{suffix}"
    assert run("embed", planted, data / "test", out)[0] == 0
    if suffix == ".npz":
        found = dict(np.load(out))
        about = str(found.pop("about"))
    else:
        found = {name: tensor.numpy() for name, tensor in load_file(out).items()}
        with safe_open(out, "np") as file:
            about = file.metadata()["about"]
    expected, labels = features[1]
    np.testing.assert_allclose(found["features"], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found["labels"], labels)
    names = [bytes(row).rstrip(b"\0").decode() for row in found["keys"]]
    assert names == keys(read_dataset(data / "test"))
    assert json.loads(about)["data"]["samples"] == 122
    code, said = run("embed", planted, data / "test", out)
    assert (code, "exists already" in said) == (2, True)


def test_random_weights_and_other_peoples_are_evaluated(planted, data, tmp_path):
    """The baseline is repeatable and worse; a backbone under other names, prepared by --view, scores as ours."""
    into, view = tmp_path / "results.jsonl", ("--view", "size=16", "--view", "eval_crop=1.0")
    ours = evaluate("knn", planted, *sets(data), "--k", 5, into=into)
    random = [evaluate("knn", planted, *sets(data), "--k", 5, "--random-init", into=into) for _ in range(2)]
    assert random[0]["scores"] == random[1]["scores"]
    assert random[0]["scores"]["k=5"]["top1"] < ours["scores"]["k=5"]["top1"] - 0.1
    assert random[0]["sha256"] is None
    assert "random" in random[0]["weights"]
    theirs = {f"backbone.{k}": v for k, v in load_file(planted / "encoder/encoder.safetensors").items()}
    save_file(theirs, tmp_path / "their.safetensors")
    numbers = ("--view", "mean=[0.5, 0.5, 0.5]", "--view", "std=[0.25, 0.25, 0.25]")
    row = evaluate("knn", tmp_path / "their.safetensors", *sets(data), "--k", 5, *view, *numbers, into=into)
    assert row["scores"] == ours["scores"]


def test_two_processes_find_what_one_finds(planted, data, tmp_path):
    """The same scores of every l2 and of the test set, whose parts differ in size; one of them writes."""
    words = ["logistic", planted, *sets(data), "--l2", 100, "--l2", 1, "--l2", 10]
    one = evaluate(*words, into=tmp_path / "one.jsonl")
    launch(tmp_path, *words, "--results", tmp_path / "two.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "two.jsonl").read_text().splitlines()]
    assert len(rows) == 1
    assert rows[0]["processes"] == 2
    assert (rows[0]["scores"], rows[0]["tried"]) == (one["scores"], one["tried"])


def test_two_processes_train_one_network(planted, data, tmp_path):
    """Fine-tuning over processes, whose parts of the test set differ in size, ends and learns as on one."""
    words = ["finetune", planted, *sets(data), "--percent", 20, "--epochs", 4, "--eval-every", 2, "--train-batch", 8]
    launch(tmp_path, *words, "--results", tmp_path / "two.jsonl")
    row = json.loads((tmp_path / "two.jsonl").read_text())
    one = evaluate(*words, into=tmp_path / "one.jsonl")
    assert [at["step"] for at in row["curves"]["pre-trained"]] == [at["step"] for at in one["curves"]["pre-trained"]]
    assert row["scores"]["pre-trained"]["top1"] == pytest.approx(one["scores"]["pre-trained"]["top1"], abs=0.15)


def launch(folder, *words):
    """The program in two CPU processes, which are told of each other as accelerate's launcher tells them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        Program(
            "tools/evaluate.py",
            *map(str, words),
            output=folder / f"rank-{rank}.txt",
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""},
        )
        for rank in range(2)
    ]
    try:
        codes = [process.wait(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], "".join(process.output.read_text() for process in processes)[-3000:]


def test_bad_input_is_said_in_one_line(planted, data, tmp_path):
    """Exit code 2, what was expected and what arrived; nothing is written."""
    write_shards([Sample("0.png", None, drawings(1, 0)[0].data)], tmp_path / "plain", classes=None)
    write_shards(drawings(6, 0), tmp_path / "others", classes=[f"other {i}" for i in range(KINDS)])
    (tmp_path / "list.txt").write_text("drawing-3.png\nnobody.png\n")
    (tmp_path / "alone").mkdir()
    alone = tmp_path / "alone/encoder.safetensors"
    alone.write_bytes((planted / "encoder/encoder.safetensors").read_bytes())
    train, test = sets(data)
    into = tmp_path / "results.jsonl"
    for words, message in [
        (("knn", tmp_path / "none", train, test), "none does not exist; expected a run"),
        (("knn", data, train, test), "holds no encoder"),
        (("knn", planted, tmp_path / "none", test), "is no data set: it does not exist"),
        (("knn", planted, tmp_path / "plain", test), "must be labelled with the same classes"),
        (("knn", planted, train, tmp_path / "others"), "must be labelled with the same classes"),
        (("knn", planted, train, test, "--temperature", 0), "--temperature: expected a finite number above 0, got 0"),
        (("knn", planted, train, test, "--view", "size=nine"), "size"),
        (("logistic", planted, train, test, "--validation", 1), "leaves no sample"),
        (("linear", planted, train, test, "--train-batch", 500), "fewer than one batch of 500"),
        (
            ("finetune", planted, train, test, "--percent", 0),
            "--percent: expected a finite number above 0 and at",
        ),
        (("finetune", planted, train, test, "--label-list", tmp_path / "nolist"), "nolist cannot be read"),
        (("finetune", planted, train, test, "--label-list", tmp_path / "list.txt"), "1 of 2 names are not in"),
        (("finetune", alone, train, test, "--head-layers", 1), "the projection head of"),
    ]:
        code, said = run(*words, "--results", into)
        assert code == 2, said
        assert message in said, said
        assert said.splitlines()[-1].startswith("evaluate: "), said
    assert not into.exists()
    for out, message in [("features.csv", "ends in .npz or .safetensors"), ("none/features.npz", "does not exist")]:
        code, said = run("embed", planted, test, tmp_path / out)
        assert (code, message in said) == (2, True), said


def test_labels_beyond_the_classes_are_refused_before_any_work(planted, data, tmp_path):
    """By shard and key, in the same words by all that learn on one set and score on another."""
    shutil.copytree(data / "test", tmp_path / "test")
    (tar, *_) = sorted((tmp_path / "test").glob("*.tar"))
    with tarfile.open(tar) as file:
        member = next(member for member in file if member.name.endswith(".cls"))
    content = bytearray(tar.read_bytes())
    content[member.offset_data : member.offset_data + 1] = b"9"
    tar.write_bytes(content)
    named = f"{tar.name}:{member.name.removesuffix('.cls')} has the label b'9', expected a number from 0 to {KINDS - 1}"
    for protocol in ("knn", "logistic", "linear", "finetune"):
        code, said = run(protocol, planted, data / "train", tmp_path / "test", "--results", tmp_path / "results.jsonl")
        assert (code, named in said) == (2, True), said
    with pytest.raises(DatasetError, match="has the label b'9'"):  # so do training, doctor and ablate
        check_alike(read_dataset(data / "train"), read_dataset(tmp_path / "test"))
    assert not (tmp_path / "results.jsonl").exists()


def test_a_bank_smaller_than_k_votes_as_a_whole_and_says_so(planted, data, tmp_path):
    train, test = sets(data)
    bank = read_dataset(train).samples
    words = ("--k", 10 * bank, "--k", bank, "--k", 3, "--results", tmp_path / "results.jsonl")
    code, said = run("knn", planted, train, test, *words)
    row = json.loads((tmp_path / "results.jsonl").read_text())
    assert (code, list(row["scores"])) == (0, [f"k={bank}", "k=3"])
    assert (f"k={bank}" in said, f"k={10 * bank}" in said) == (True, False)


def test_numbers_that_mean_nothing_are_refused_by_their_options(planted, data, tmp_path):
    train, test = sets(data)
    for words, message in [
        (("knn", "--temperature", "nan"), "--temperature: expected a finite number above 0, got nan"),
        (("linear", "--base-lr", 0), "--base-lr: expected"),
        (("linear", "--cached", "--train-batch", 5000), "fewer than one batch of 5000"),
        (("logistic", "--l2", "inf"), "--l2: expected finite numbers"),
        (("logistic", "--validation", "nan"), "--validation: expected"),
        (("finetune", "--percent", "nan"), "--percent: expected"),
        (("finetune", "--base-lr", -1), "--base-lr: expected"),
        (
            ("finetune", "--train-batch", 1),
            "BatchNorm takes its statistics from 1 image at a time, expected at least 2",
        ),
    ]:
        code, said = run(words[0], planted, train, test, *words[1:], "--results", tmp_path / "results.jsonl")
        assert (code, message in said) == (2, True), said


def test_fine_tuning_on_ten_images_takes_two_at_a_time(planted, data, tmp_path):
    names = [key.partition("-")[2] for key in keys(read_dataset(data / "train"))[:10]]
    (tmp_path / "list.txt").write_text("\n".join(names))
    words = ("--label-list", tmp_path / "list.txt", "--epochs", 1)
    row = evaluate("finetune", planted, *sets(data), *words, into=tmp_path / "results.jsonl")
    assert (row["options"]["labels"], row["options"]["batch_size"]) == (10, 2)


def test_a_diverging_classifier_is_a_failure_in_one_line(planted, data, tmp_path):
    """Exit code 1, not a row of nonsense."""
    words = ("--epochs", 3, "--train-batch", 32, "--base-lr", 1e30)
    code, said = run(
        "finetune", planted, *sets(data), "--percent", 100, *words, "--results", tmp_path / "results.jsonl"
    )
    assert code == 1
    assert "the loss is" in said.splitlines()[-1]
    assert "lower --base-lr" in said.splitlines()[-1]
    assert not (tmp_path / "results.jsonl").exists()


@pytest.mark.parametrize(
    ("samples", "batch"), [(1_281_167, 4096), (50_000, 4096), (12_811, 1024), (500, 32), (64, 8), (16, 2)]
)
def test_the_usual_batch(samples, batch):
    """4096 as in the paper, at least eight steps to an epoch of a small set; 1024 for 1 % of ImageNet, as SimCLRv2."""
    assert usual_batch(samples) == batch
    assert samples // batch >= min(8, samples)


# ------------------------------------------------------------------------------------------------------- on record


def test_runs_go_on_record_with_what_the_single_commands_say(data, planted, tmp_path):
    """Of a run whose weights are better than random ones; the same run twice is no repetition."""
    from benchmarks.reproduction import main

    config = {"seed": 3, "depth": 18, "width": 0.125, "batch_size": 64, "epochs": 2, "cpu_threads": 2, "command": "c"}
    run = shutil.copytree(planted, tmp_path / "run")
    (run / "config.json").write_text(json.dumps(config))
    (run / "status.json").write_text(json.dumps({"state": "done"}))
    (run / "speed.jsonl").write_text("".join(json.dumps({"step": s, "step_ms": 500}) + "\n" for s in (4, 10)))
    program, record = typer.Typer(), tmp_path / "record.csv"
    program.command()(main)
    words = ["ours", data / "train", data / "test", run, "--percent", "25", "--epochs", "3", "--l2", "1"]
    words = [*map(str, words), "--record", str(record)]
    assert CliRunner().invoke(program, words).exit_code == 0
    (row,) = csv.DictReader(record.open())
    assert (row["run"], row["seed"], float(row["training_s"])) == ("ours", "3", 5.0)
    found = evaluate("knn", planted, *sets(data), "--k", 200, into=tmp_path / "knn.jsonl")
    assert float(row["knn"]) == pytest.approx(found["scores"]["k=200"]["top1"], abs=1e-9)
    assert float(row["knn"]) > float(row["knn_random"]) + 0.2
    assert float(row["logistic"]) > float(row["logistic_random"]) + 0.2
    assert float(row["finetune"]) > float(row["scratch"])
    failed = CliRunner().invoke(program, [*words[:4], str(run), *words[4:]])
    assert "the same seed are no repetitions" in failed.output
    assert len(record.read_text().splitlines()) == 2
