"""The page shows what is there: every point, neighbour, thumbnail and curve against an independent answer."""

import base64
import hashlib
import io
import json
import re
from dataclasses import asdict
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA
from threadpoolctl import threadpool_limits
from typer.testing import CliRunner

from model.encoder import build_encoder
from model.encoder_file import export_encoder, load_encoder
from pipeline.demo import draw_image
from pipeline.loader import build_eval_loader
from pipeline.shards import Sample, read_dataset
from pipeline.subset import keys
from pipeline.views import make_views
from pipeline.write import write_shards
from tests.browser import Browser, eventually
from tools.evaluate import app
from tools.gallery import Gallery, place
from tools.page import SCRIPT, page

CLASSES = ("<script>alert(1)</script>", "a & \"b\" 'c'", "rings", "</style><b>")
VIEWS = make_views("cifar", {"size": 32, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]})
COUNT, STEPS = 62, 700


class Node:
    def __init__(self, tag, attributes):
        self.tag, self.attributes, self.children, self.text = tag, attributes, [], ""

    def __getitem__(self, name):
        return self.attributes[name]

    def all(self, tag, **wanted):
        """Elements inside, in their order, of a tag and with these attributes (class_, data_key ...)."""
        wanted = {name.rstrip("_").replace("_", "-"): value for name, value in wanted.items()}
        found = []
        for child in self.children:
            if child.tag == tag and wanted.items() <= child.attributes.items():
                found.append(child)
            found += child.all(tag, **wanted)
        return found

    def one(self, tag, **wanted):
        (found,) = self.all(tag, **wanted)
        return found

    def words(self):
        return " ".join(" ".join([self.text, *(child.words() for child in self.children)]).split())


class Tree(HTMLParser):
    """Parses a document as browsers do, and insists that every element is closed where it should be."""

    VOID = frozenset({"meta", "img", "br", "link", "input", "hr", "base", "source"})

    def __init__(self, text):
        super().__init__()
        self.root = Node("", {})
        self.open = [self.root]
        self.feed(text)
        self.close()
        assert self.open == [self.root], "elements are left open"

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute of {tag} is given twice"
        node = Node(tag, dict(attrs))
        self.open[-1].children.append(node)
        if tag not in self.VOID:
            self.open.append(node)

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        self.open[-1].text += data


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run: an encoder as its random weights are, 700 rows of metrics, fine-tunings of it, of others and of none."""
    run = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    encoder = build_encoder(18, width=0.125, stem="standard")
    facts = {"mean": VIEWS.mean, "std": VIEWS.std, "interpolation": "bilinear", "crop_pct": 1.0}
    weights = export_encoder(
        run / "encoder", encoder, image_size=32, **facts, training={"config": {"views": asdict(VIEWS)}}
    )
    rows = [{"step": 0, "knn": 0.25}]
    rows += [{"step": i + 1, "loss": 6 - i / 200 + (i % 7) / 10, "lr": 0.1, "<b>key</b>": i} for i in range(STEPS)]
    rows[10] |= {"loss": None, "skipped": 1}
    rows.append({"step": STEPS, "knn": 0.75, "note": "no number", "flag": True, "probe": None})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "metrics.jsonl").write_text(text + '{"step": 701, "lo')  # a row that is still being written
    options = {
        "percent": 1.0,
        "labels": 500,
        "batch_size": 32,
        "base_lr": 0.05,
        "epochs": 4,
        "head_layers": 1,
        "seed": 0,
    }
    tuned = {"evaluation": "finetune", "options": options, "train": {"name": "train"}, "test": {"name": "test"}}

    def curve(*scores):
        return [{"epoch": 2 * i + 2, "top1": score, "top5": 1.0} for i, score in enumerate(scores)]

    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    results = [
        {"evaluation": "knn", "sha256": digest},
        tuned | {"sha256": digest, "curves": {"pre-trained": curve(0.5, 0.6), "from scratch": curve(0.1, 0.3)}},
        tuned | {"sha256": None, "curves": {"random": curve(0.2, 0.25)}},
        tuned | {"sha256": "0" * 64, "curves": {"pre-trained": curve(0.99, 0.99)}},
    ]
    (run / "encoder/evaluation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in results))
    return run


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """62 lossless drawings of four classes with hostile names; the drawings themselves by their names."""
    folder, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    drawings = {f"drawing-{i}": draw_image(i % len(CLASSES), rng) for i in range(COUNT)}
    pairs = enumerate(drawings.items())
    samples = [Sample(f"{name}.png", i % len(CLASSES), to_png(each)) for i, (name, each) in pairs]
    write_shards(samples, folder / "labelled", classes=CLASSES, name="drawings")
    write_shards([Sample(s.name, None, s.data) for s in samples], folder / "plain", classes=None, name="plain")
    return folder, drawings


def to_png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def written(run_folder, shards, tmp_path_factory):
    """(the file, its tree, the text) of the page of all images, by PCA."""
    file = tmp_path_factory.mktemp("page") / "page.html"
    said = make(run_folder, shards[0] / "labelled", file, "--map", "pca", "--examples", 6)
    assert f"{COUNT} images" in said
    text = file.read_text(encoding="utf-8")
    return file, Tree(text).root, text


@pytest.fixture(scope="module")
def features(run_folder, shards):
    """(62, 64) float64, of length 1, in the order of the shards, computed without the page."""
    encoder = load_encoder(run_folder)
    batches = build_eval_loader(read_dataset(shards[0] / "labelled"), VIEWS, 64, torch.device("cpu"))
    with torch.no_grad():
        rows = torch.cat([encoder(images) for images, _ in batches]).double().numpy()
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def make(*words, fails=0):
    done = CliRunner().invoke(app, ["page", *map(str, words)])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == fails, done.output
    return done.output


def data_of(tree):
    return json.loads(tree.one("script", id="data").text)


def test_nothing_comes_from_elsewhere_and_no_name_is_code(written):
    """No address but data:, no script but ours, and the policy says so; hostile class names and keys are plain text."""
    _, tree, text = written
    everything = tree.all("html")[0]
    for node in [everything, *descendants(everything)]:
        assert not any(name.startswith("on") for name in node.attributes)
        for name in ("src", "href", "data", "action", "poster", "srcset"):
            assert node.attributes.get(name, "data:").startswith("data:")
    assert not re.search(r"https?:|@import|//[a-z]", re.sub(r"data:[^)\"]*", "", text))
    assert set(re.findall(r"url\((.{5})", text)) == {"data:"}
    data, script = tree.all("script")
    assert (data["type"], script.text) == ("application/json", SCRIPT)
    policy = tree.one("meta", http_equiv="Content-Security-Policy")["content"]
    digest = base64.b64encode(hashlib.sha256(script.text.encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    legend = [button.words() for button in tree.one("div", id="legend").all("button")]
    assert legend == [f"{name} {count}" for name, count in zip(CLASSES, (16, 16, 15, 15), strict=True)]
    names = [node["id"] for node in descendants(everything) if "id" in node.attributes]
    assert len(names) == len(set(names))
    assert {node["aria-labelledby"] for node in tree.all("section")} <= set(names)
    assert "<script>alert" not in text
    assert all(image["alt"] for image in tree.all("img"))
    assert all(node["aria-label"] for node in descendants(everything) if node.attributes.get("role") == "img")


def descendants(node):
    return [each for child in node.children for each in [child, *descendants(child)]]


def test_the_map_has_every_image_where_pca_puts_it(written, shards, features):
    """scikit-learn's components of the same features, to one scale on both axes; a dot's class is its sample's."""
    _, tree, _ = written
    dots = tree.one("g", id="dots").all("circle")
    assert len(dots) == COUNT
    assert f"{COUNT} images of 4 classes" in tree.one("section", aria_labelledby="about-map").words()
    places = np.array([[float(dot["cx"]), float(dot["cy"])] for dot in dots])
    assert places.min() >= 0
    assert places.max() <= 1000
    expected = PCA(2).fit(features)
    found, wanted = places - places.mean(0), expected.transform(features)
    scales = [np.dot(found[:, axis], wanted[:, axis]) / np.dot(wanted[:, axis], wanted[:, axis]) for axis in (0, 1)]
    assert abs(scales[0]) == pytest.approx(abs(scales[1]), rel=1e-3)
    np.testing.assert_allclose(found, wanted * scales, atol=0.1)
    first, second = 100 * expected.explained_variance_ratio_
    assert f"PCA: {first:.0f} % of the variance across, {second:.0f} % up" in tree.words()
    data, names = data_of(tree), keys(read_dataset(shards[0] / "labelled"))
    assert data["keys"] == names
    assert data["classes"] == list(CLASSES)
    labels = [int(name.rpartition("-")[2]) % len(CLASSES) for name in names]
    assert data["labels"] == labels
    assert [dot["class"] for dot in dots] == [f"c{label}" for label in labels]


def test_neighbours_are_those_of_brute_force(written, features):
    """Of every image in the data, of the examples in the table, with their cosines; the share of the same class."""
    _, tree, _ = written
    cosine = features @ features.T
    np.fill_diagonal(cosine, -np.inf)
    order = np.argsort(-cosine, axis=1)[:, :8]
    data = data_of(tree)
    found = np.array(data["nearest"])
    np.testing.assert_allclose(
        np.take_along_axis(cosine, found, 1), np.take_along_axis(cosine, order, 1), atol=1e-6
    )  # of equals either will do
    assert all(len(set(row)) == 8 for row in found.tolist())
    labels = np.array(data["labels"])
    share = 100 * (labels[found] == labels[:, None]).mean()
    section = tree.one("section", aria_labelledby="about-neighbours")
    assert f"{share:.1f} % have the image's class" in section.words()
    rows = section.one("tbody").all("tr")
    assert len(rows) == 6
    shown = []
    for row in rows:
        query, *nearest = [int(image["data-image"]) for image in row.all("span", role="img")]
        shown.append(query)
        assert nearest == found[query].tolist()
        for cell, i in zip(row.all("td"), nearest, strict=True):
            assert cell.one("small").text == f"{cosine[query, i]:.2f}"
            assert (cell.attributes.get("class") == "other") == (labels[query] != labels[i]) == ("≠" in cell.words())
            assert cell.one("span", role="img")["aria-label"] == f"{CLASSES[labels[i]]} {data['keys'][i]}"
    assert set(labels[shown].tolist()) == {0, 1, 2, 3}
    assert len(set(shown)) == 6


def test_thumbnails_are_the_images(written, shards):
    """Cut out of the sheet where the style says, each is the drawing of its key, up to the picture's compression."""
    _, tree, text = written
    sheet = np.asarray(
        Image.open(io.BytesIO(base64.b64decode(re.search(r"--sheet:url\(data:image/jpeg;base64,(.*?)\)", text)[1])))
    )
    _, drawings = shards
    data = data_of(tree)
    assert f"--columns:{data['columns']}" in text
    everything = np.stack(list(drawings.values())).astype(float)
    for image in tree.all("span", role="img"):
        i = int(image["data-image"])
        x, y = map(int, re.fullmatch(r"--x:(\d+);--y:(\d+)", image["style"]).groups())
        assert (x, y) == (i % data["columns"], i // data["columns"])
        cell = sheet[32 * y : 32 * y + 32, 32 * x : 32 * x + 32].astype(float)
        apart = np.abs(everything - cell).mean((1, 2, 3))
        assert list(drawings)[apart.argmin()] == "drawing-" + data["keys"][i].rpartition("-")[2]
        assert apart.min() < 15


def test_every_number_of_the_metrics_is_drawn(written):
    """A chart a key, heights in proportion to the values; what is no number has none, what is missing is counted."""
    _, tree, _ = written
    figures = tree.one("section", aria_labelledby="about-training").all("figure")
    charts = {figure.one("b").text: figure for figure in figures}
    assert list(charts) == ["knn", "loss", "lr", "<b>key</b>", "skipped"]
    (bare,) = [each.words() for each in tree.one("section", aria_labelledby="about-training").one("div").all("p")]
    assert bare == "not finite: 1 probe"
    loss = np.array([6 - i / 200 + (i % 7) / 10 for i in range(STEPS) if i != 9])
    label = charts["loss"].one("svg", role="img")["aria-label"]
    assert f"loss: first {loss[0]:.4g}, last {loss[-1]:.4g}, {loss.min():.4g} to {loss.max():.4g}; " in label
    assert "step 1 to 700" in label
    assert "not finite: 1" in charts["loss"].words()
    assert "mean and range of each 3 rows" in charts["loss"].words()
    points = line_of(charts["loss"])
    parts = np.array_split(loss, 300)
    assert len(points) == 300
    assert np.corrcoef(points[:, 1], [part.mean() for part in parts])[0, 1] == pytest.approx(-1, abs=1e-3)
    band = np.array([list(map(float, pair.split(","))) for pair in charts["loss"].one("polygon")["points"].split()])
    assert np.corrcoef(band[:300, 1], [part.max() for part in parts])[0, 1] == pytest.approx(-1, abs=1e-3)
    knn = line_of(charts["knn"])
    assert len(knn) == 2
    assert knn[0, 0] < knn[1, 0]
    assert knn[0, 1] > knn[1, 1], "better is higher"


def line_of(figure, name="s0"):
    pairs = figure.one("polyline", class_=name)["points"].split()
    return np.array([list(map(float, pair.split(","))) for pair in pairs])


def test_fine_tuning_stands_beside_training_from_scratch(written):
    """What was done alike shares a chart and its axes; the curves of other weights are counted, not drawn."""
    _, tree, _ = written
    section = tree.one("section", aria_labelledby="about-fine-tuning")
    assert "Left out, being of other weights: 1." in section.words()
    figure = section.one("figure")
    assert figure.one("b").text == "1 % of the labels: top-1 accuracy, %"
    assert "500 images of train, scored on test, batch 32" in figure.words()
    assert [key.words() for key in figure.one("figcaption").all("span")] == [
        "pre-trained 60",
        "from scratch 30",
        "random 25",
    ]
    heights = np.concatenate([line_of(figure, f"s{i}")[:, 1] for i in range(3)])
    assert np.corrcoef(heights, [50, 60, 10, 30, 20, 25])[0, 1] == pytest.approx(-1, abs=1e-4)


def test_the_views_are_there(written, shards):
    """Six rows of an image and three pairs; the first picture of a row is its sample."""
    _, tree, _ = written
    image = tree.one("img", class_="views")
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2]))))
    assert pixels.shape == (6 * 34 + 2, 7 * 34 + 2, 3) == (int(image["height"]), int(image["width"]), 3)
    drawing = shards[1]["drawing-" + data_of(tree)["keys"][0].rpartition("-")[2]].astype(float)
    assert np.abs(pixels[2:34, 2:34] - drawing).mean() < 10


def test_a_part_of_the_images_and_none_of_the_classes(run_folder, shards, tmp_path):
    """The 20 images that the seed draws, in their order; without labels nothing speaks of classes."""
    file = tmp_path / "page.html"
    make(run_folder, shards[0] / "plain", file, "--map", "pca", "--points", 20, "--seed", 3)
    names = keys(read_dataset(shards[0] / "plain"))
    drawn = np.random.Generator(np.random.Philox(3)).permutation(COUNT)[:20]
    tree = Tree(file.read_text()).root
    assert data_of(tree)["keys"] == [names[i] for i in sorted(drawn)]
    assert "20 of 62" in tree.one("header").words()
    assert not tree.all("div", id="legend")
    assert "class" not in tree.one("main").words()


def test_random_weights_have_no_curves(run_folder, shards, tmp_path):
    """Training's curves are not those of freshly drawn weights."""
    make(run_folder, shards[0] / "labelled", tmp_path / "page.html", "--map", "pca", "--random-init")
    tree = Tree((tmp_path / "page.html").read_text()).root
    assert [section["aria-labelledby"] for section in tree.all("section")] == ["about-map", "about-neighbours"]
    assert "random, seed 0" in tree.one("header").words()


def test_tsne_keeps_clusters_together():
    """Three far clusters of directions: on the map every image's nearest is of its own; the same seed, the same map."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 20)
    features = torch.from_numpy(10 * np.eye(3, 16)[labels] + rng.standard_normal((60, 16)))
    with threadpool_limits(1):  # threads that wait for each other take ten times as long where cores are busy
        places, how = place(features, "tsne", 0)
        again, _ = place(features, "auto", 0)
    assert how == "t-SNE, perplexity 19"
    apart = np.linalg.norm(places[:, None] - places, axis=2) + np.diag(np.full(60, np.inf))
    assert (labels[apart.argmin(1)] == labels).all()
    np.testing.assert_array_equal(again, places)


def test_two_thousand_images_fit_in_five_megabytes():
    """Drawings with noise, which compress worse than photographs of their size."""
    rng = np.random.default_rng(0)
    images = np.stack([draw_image(i % 10, rng) for i in range(2000)])
    shown = Gallery(
        places=rng.standard_normal((2000, 2)),
        layout="none",
        keys=[f"{i:08d}-ILSVRC2012_val_{i:08d}" for i in range(2000)],
        labels=[i % 10 for i in range(2000)],
        classes=[f"n{i:08d}" for i in range(10)],
        thumbnails=images,
        nearest=rng.integers(0, 2000, (2000, 8)),
        cosine=rng.random((2000, 8), np.float32),
    )
    assert len(page("title", {}, shown, 10, {}, ({}, 0), None)) < 5e6


@pytest.mark.parametrize("fault", ["exists", "suffix", "metrics", "evaluations", "few", "collapsed", "not finite"])
def test_what_cannot_be_shown_is_said_in_a_line(fault, run_folder, shards, tmp_path):
    """Exit code 2, the reason and the file, and no page."""
    file, words, reason = tmp_path / "page.html", [], ""
    run, data, before = run_folder, shards[0] / "labelled", None
    if fault == "exists":
        file.write_text("mine")
        before, reason = "mine", "exists already"
    elif fault == "suffix":
        file, reason = tmp_path / "page.pdf", "ends in .html"
    elif fault == "metrics":
        run = tmp_path / "run"
        (run / "encoder").mkdir(parents=True)
        (run / "encoder/encoder.safetensors").write_bytes((run_folder / "encoder/encoder.safetensors").read_bytes())
        (run / "metrics.jsonl").write_text('{"step": 0}\nloss 5\n{"step": 1}\n')
        reason = "metrics.jsonl, line 2: expected JSON, got 'loss 5"
    elif fault == "evaluations":
        words, reason = ["--evaluations", tmp_path / "curves.jsonl"], "curves.jsonl, line 1: "
        (tmp_path / "curves.jsonl").write_text('{"evaluation": "finetune"}\n')
    elif fault == "few":
        data, reason = tmp_path / "few", "a page needs at least 8 images, "
        images = [Sample(f"{i}.png", None, to_png(each)) for i, each in enumerate(list(shards[1].values())[:7])]
        write_shards(images, data, classes=None, name="few")
    else:
        encoder = load_encoder(run_folder)
        for layer in encoder.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.weight.data.zero_()
                layer.bias.data.fill_(1 if fault == "collapsed" else 3e38)
        run = export_encoder(tmp_path / "other", encoder, image_size=32, mean=VIEWS.mean, std=VIEWS.std, training={})
        reason = "all 62 images have the same features" if fault == "collapsed" else "62 of 62 images have features"
    said = make(run, data, file, "--map", "pca", *words, fails=2)
    assert reason in said
    assert said.strip().splitlines()[-1].startswith("evaluate: ")
    assert (file.read_text() if file.exists() else None) == before
    assert not list(tmp_path.glob(".*"))


CHOSEN = "(({ring, panel}) => [ring.getAttribute('cx'), ring.getAttribute('cy'), panel.textContent])(window)"
BOX = "(node => { const {x, y, width, height} = node.getBoundingClientRect(); return [x, y, width, height] })"
CONTRAST = """(() => {  // of colours as drawn, by WCAG's formula
  const canvas = Object.assign(document.createElement("canvas"), {width: 1, height: 1})
  const context = canvas.getContext("2d", {willReadFrequently: true})
  const light = color => {
    context.fillStyle = color
    context.fillRect(0, 0, 1, 1)
    const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map(
      value => value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b
  }
  const of = (one, other) => {
    const [a, b] = [light(one), light(other)].sort((a, b) => b - a)
    return (a + 0.05) / (b + 0.05)
  }
  const all = (selector, property) =>
    [...document.querySelectorAll(selector)].map(node => getComputedStyle(node)[property])
  const [body] = all("body", "backgroundColor"), [map] = all("#map", "backgroundColor")
  return {
    body: light(body),
    text: Math.min(...all("h1, p, dt, dd, small, summary, button, th, td, b", "color").map(color => of(color, body))),
    axes: Math.min(...all(".charts text", "fill").map(color => of(color, body))),
    dots: Math.min(...[...Array(720).keys()].map(i => {  // whatever the class: all hues of both kinds
      const {style} = document.querySelector("#dots circle")
      style.setProperty("--h", i % 360)
      style.setProperty("--k", i < 360 ? 0 : 1)
      return of(all("#dots circle", "color")[0], map)
    })),
    lines: Math.min(...all("polyline", "color").map(color => of(color, body))),
  }
})()"""


@pytest.mark.parametrize(("theme", "width"), [("light", 1200), ("dark", 400)])
def test_a_browser_shows_what_is_pointed_at(theme, width, written, shards, tmp_path):
    """Mouse and keys choose images, the panel has their words and pixels, the legend picks; nothing else is fetched."""
    file, tree, _ = written
    data = data_of(tree)
    dots = [(dot["cx"], dot["cy"]) for dot in tree.one("g", id="dots").all("circle")]

    def is_chosen(i):
        near = "".join(CLASSES[data["labels"][j]] for j in data["nearest"][i])
        text = f"{CLASSES[data['labels'][i]]} {data['keys'][i]}nearest{near}"
        return eventually(lambda: page.script(CHOSEN) == [*dots[i], text])

    def is_drawn(i):
        x, y, w, h = map(round, page.script(f"{BOX}(document.getElementById('panel').firstChild)"))
        page.shoot(tmp_path / "page.png")
        seen = Image.open(tmp_path / "page.png").convert("RGB").crop((x, y, x + w, y + h)).resize((32, 32))
        apart = {name: np.abs(np.asarray(seen) - each.astype(float)).mean() for name, each in shards[1].items()}
        return min(apart, key=apart.get) == "drawing-" + data["keys"][i].rpartition("-")[2]

    with Browser(file, theme, width, 900) as page:
        assert page.script("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than its window"
        page.key("Tab")
        assert is_chosen(0), "the map is the first thing that the Tab key comes to"
        page.key("PageDown")
        assert is_chosen(1)
        for _ in range(16):
            page.key("PageDown")
        page.key("PageUp")
        assert is_chosen(16)
        page.key("Left")
        assert eventually(lambda: page.script(CHOSEN)[:2] != list(dots[16]))
        right, down = np.array(page.script(CHOSEN)[:2], float) - np.array(dots[16], float)
        assert right < 0
        assert -right >= abs(down)

        page.script("document.getElementById('map').scrollIntoView()")
        x, y, w, h = page.script(f"{BOX}(document.getElementById('dots').children[17])")
        page.move(x + w / 2, y + h / 2)
        assert is_chosen(17)
        page.script("document.getElementById('panel').scrollIntoView()")
        assert eventually(lambda: is_drawn(17))

        button = "document.getElementById('legend').children[2]"
        page.script(f"{button}.scrollIntoView()")
        x, y, w, h = page.script(f"{BOX}({button})")
        page.click(x + w / 2, y + h / 2)
        assert eventually(lambda: page.script(f"{button}.getAttribute('aria-pressed')") == "true")
        dim = page.script(
            "[...document.getElementById('dots').children].map(dot => getComputedStyle(dot).opacity < 0.5)"
        )
        assert dim == [label != 2 for label in data["labels"]]
        contrast = page.script(CONTRAST)
        assert (contrast["body"] > 0.5) == (theme == "light")
        assert min(contrast["text"], contrast["axes"]) >= 4.5
        assert min(contrast["dots"], contrast["lines"]) >= 3
        assert page.requests == [file.as_uri()]
        assert page.console == []


@pytest.mark.parametrize("policy", [True, False])
def test_the_policy_keeps_planted_code_out(policy, written, tmp_path):
    """A script and a picture from a network, planted in the page, do nothing; without the policy both do."""
    _, _, text = written
    planted = '<img src="http://127.0.0.1:9/spy.png"><script>document.title = "taken over"</script></body>'
    text = text.replace("</body>", planted)
    if not policy:
        text = re.sub("<meta http-equiv=[^>]*>", "", text)
    (tmp_path / "page.html").write_text(text)
    with Browser(tmp_path / "page.html", "light", 800, 600) as page:
        assert (page.script("document.title") == "taken over") == (not policy)
        if not policy:
            assert eventually(lambda: any("spy.png" in address for address in page.requests))
        assert any("spy.png" in address for address in page.requests) == (not policy)
