"""One HTML file that shows what an encoder has learnt, and how: what `tools/evaluate.py page` writes.

A map of the embeddings (t-SNE, van der Maaten and Hinton 2008, or PCA) with the image under the pointer or the arrow
keys, nearest neighbours by cosine, every number of metrics.jsonl over the steps, fine-tuning curves, and the views of
training. The file is whole: its images are data in it, and its policy has the browser fetch nothing and run no script
but SCRIPT, whatever the names of classes and keys hold.
"""

import base64
import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import numpy as np
from numpy.typing import NDArray

from model.run_folder import read_rows

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.shards import Dataset
    from pipeline.views import ViewConfig

Line = tuple[Sequence[float], Sequence[float]]  # x and y, equally long
Layout = Literal["auto", "tsne", "pca"]

NEIGHBOURS = 8  # kept of each image
THUMBNAIL = 64  # px at most
SIDE, MARGIN = 1000, 20  # of the map, in its own units
BUCKETS = 300  # points of a curve at most; more rows than that are averaged
VIEW_ROWS, VIEW_PAIRS = 6, 3
FEWEST = 8  # images of a page


# ---- what there is to show -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """N images, where the map has them, and which the encoder finds alike."""

    places: NDArray[np.float64]  # (N, 2), any scale
    layout: str  # how they were found
    keys: Sequence[str]
    labels: Sequence[int]  # places in `classes`; -1 where there are none
    classes: Sequence[str]
    thumbnails: NDArray[np.uint8]  # (N, t, t, 3)
    nearest: NDArray[np.int64]  # (N, k), the most similar first, never the image itself
    cosine: NDArray[np.float32]  # (N, k)

    def class_of(self, i: int) -> str:
        return self.classes[self.labels[i]] if self.classes else ""

    def agreement(self) -> float:
        """The share, 0 … 1, of all N·k neighbours that have the class of the image whose neighbours they are."""
        labels = np.asarray(self.labels)
        return float((labels[self.nearest] == labels[:, None]).mean())

    def examples(self, count: int) -> list[int]:
        """`count` images of as many classes as can be, by class."""
        seen: Counter[int] = Counter()
        turns = []  # the first image of every class, then the second, ...
        for i, label in enumerate(self.labels):
            turns.append((seen[label], i))
            seen[label] += 1
        return sorted((i for _, i in sorted(turns)[:count]), key=lambda i: (self.labels[i], i))


def place(features: "Tensor", layout: Layout, seed: int) -> tuple[NDArray[np.float64], str]:
    """Places (N, 2) of features (N, F) by their direction, and how they were found.

    "auto" is t-SNE where scikit-learn is installed, else PCA. Raises ValueError where there is no map to draw.
    """
    import torch
    from torch.nn.functional import normalize

    if bad := int((~features.isfinite().all(1)).sum()):
        raise ValueError(f"{bad} of {len(features)} images have features that are not finite: the encoder is broken")
    rows = normalize(features.double(), dim=1)
    rows -= rows.mean(0)
    if float(rows.abs().max()) < 1e-6:
        raise ValueError(f"all {len(rows)} images have the same features: the encoder has collapsed")
    installed = find_spec("sklearn") is not None
    if layout == "tsne" and not installed:
        raise ValueError("--map tsne needs scikit-learn: install the extra `eval`, or use --map pca")
    if layout != "pca" and installed:
        from sklearn.manifold import TSNE

        perplexity = min(30, (len(rows) - 1) // 3)
        places = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(rows.float().numpy())
        return places.astype(np.float64), f"t-SNE, perplexity {perplexity}"
    _, scales, axes = torch.linalg.svd(rows, full_matrices=False)
    first, second = (100 * scales[:2] ** 2 / (scales**2).sum()).tolist()
    told = f"PCA: {first:.0f} % of the variance across, {second:.0f} % up"
    return (rows @ axes[:2].T).numpy(), told if layout == "pca" else f"{told}; scikit-learn, for t-SNE, is missing"


def neighbours(features: "Tensor", k: int) -> "tuple[Tensor, Tensor]":
    """The k nearest other rows of each row of (N, F) by cosine: positions and cosines, (N, k), the nearest first."""
    import torch
    from torch.nn.functional import normalize

    rows = normalize(features.float(), dim=1)
    found = []
    for start in range(0, len(rows), 1024):
        cosine = rows[start : start + 1024] @ rows.T
        cosine[torch.arange(len(cosine)), torch.arange(start, start + len(cosine))] = -torch.inf
        found.append(cosine.topk(min(k, len(rows) - 1)))
    return torch.cat([each.indices for each in found]), torch.cat([each.values for each in found])


def gallery(dataset: "Dataset", views: "ViewConfig", features: "Tensor", layout: Layout, seed: int) -> Gallery:
    """A data set as its features (N, F) arrange it; thumbnails are cropped as the encoder saw the images."""
    import torch

    from pipeline.loader import build_eval_loader
    from pipeline.subset import keys
    from pipeline.views import make_views

    places, how = place(features, layout, seed)
    nearest, cosine = neighbours(features, NEIGHBOURS)
    small = make_views(views, {"size": min(views.size, THUMBNAIL)})
    batches = list(build_eval_loader(dataset, small, 256, torch.device("cpu")))
    return Gallery(
        places=places,
        layout=how,
        keys=keys(dataset),
        labels=torch.cat([labels for _, labels in batches]).tolist(),
        classes=dataset.classes or (),
        thumbnails=np.concatenate([to_bytes(small.pixels(images)) for images, _ in batches]),
        nearest=nearest.numpy(),
        cosine=cosine.numpy(),
    )


def to_bytes(pixels: "Tensor") -> NDArray[np.uint8]:
    """Pixels (..., 3, H, W) in [0, 1] as (..., H, W, 3) in 0 … 255."""
    return (255 * pixels.clamp(0, 1)).round().byte().movedim(-3, -1).numpy()


def views_grid(weights: Path, dataset: "Dataset", seed: int) -> NDArray[np.uint8] | None:
    """Pixels (H, W, 3) of the data set's first images beside views as in the training of `weights`; None if unknown."""
    from pipeline.views import make_views
    from tools.runs import training_of
    from tools.show_views import grid

    config = training_of(weights)[1].get("config", {})
    if "views" not in config:
        return None
    views = make_views("imagenet", config["views"])
    second = make_views(views, config.get("second_views") or {})
    return to_bytes(grid(dataset, views, second, images=VIEW_ROWS, pairs=VIEW_PAIRS, seed=seed))


def curves(file: Path) -> dict[str, tuple[Line, int]]:
    """By key of metrics.jsonl: its finite numbers over the steps, and how many of its values are not (null, NaN)."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    lost: Counter[str] = Counter()
    for number, row in enumerate(read_rows(file), 1):
        if not isinstance(row.get("step"), int):
            raise ValueError(f"{file}, line {number}: expected a step, got {row.get('step')!r}")
        for key, value in row.items():
            if key == "step" or isinstance(value, bool) or not isinstance(value, int | float | None):
                continue
            steps, values = found.setdefault(key, ([], []))
            if value is not None and math.isfinite(value):
                steps.append(row["step"])
                values.append(value)
            else:
                lost[key] += 1
    return {key: (line, lost[key]) for key, line in found.items()}


def finetunings(file: Path, sha256: str) -> tuple[dict[tuple[str, str], dict[str, Line]], int]:
    """({(labels used, how): {name: top-1 in % over epochs}}, how many are of other weights and left out).

    What was done in the same way, random weights too, stands together; of the same thing done twice, the last.
    """
    charts: dict[tuple[str, str], dict[str, Line]] = {}
    others = 0
    for number, row in enumerate(read_rows(file), 1):
        if row.get("evaluation") != "finetune":
            continue
        try:
            if row["sha256"] not in (None, sha256):
                others += 1
                continue
            of, train, test = row["options"], row["train"]["name"], row["test"]["name"]
            share = "Listed labels" if of["percent"] is None else f"{of['percent']:g} % of the labels"
            title = f"{share}: top-1 accuracy, %"
            how = (
                f"{of['labels']} images of {train}, scored on {test}, batch {of['batch_size']}, base_lr "
                f"{of['base_lr']:g}, {of['epochs']} epochs, {of['head_layers']} head layers, seed {of['seed']}"
            )
            for name, curve in row["curves"].items():
                line = [each["epoch"] for each in curve], [100 * each["top1"] for each in curve]
                charts.setdefault((title, how), {})[name] = line
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}, line {number}: not what `evaluate.py finetune` records: {error!r}") from error
    return charts, others


# ---- HTML ----------------------------------------------------------------------------------------------------------


def el(tag: str, *children: Element | str, **attributes: object) -> Element:
    """An element; class_ is class, aria_label aria-label, None leaves one out. Text is escaped when it is written."""
    given = {name.rstrip("_").replace("_", "-"): str(each) for name, each in attributes.items() if each is not None}
    made = Element(tag, given)
    for child in children:
        if not isinstance(child, str):
            made.append(child)
        elif len(made):
            made[-1].tail = (made[-1].tail or "") + child
        else:
            made.text = (made.text or "") + child
    return made


def picture(pixels: NDArray[np.uint8]) -> str:
    """(H, W, 3) as a data: address."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=75, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def sheet(thumbnails: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """All (N, t, t, 3) in one picture, row by row, `columns(N)` in each."""
    wide = columns(len(thumbnails))
    high, side = -(-len(thumbnails) // wide), thumbnails.shape[1]
    cells = np.zeros((high * wide, *thumbnails.shape[1:]), np.uint8)
    cells[: len(thumbnails)] = thumbnails
    return cells.reshape(high, wide, side, side, 3).swapaxes(1, 2).reshape(high * side, wide * side, 3)


def columns(count: int) -> int:
    return math.ceil(math.sqrt(count))


def thumbnail(shown: Gallery, i: int) -> Element:
    row, column = divmod(i, columns(len(shown.keys)))
    label = " ".join(filter(None, [shown.class_of(i), shown.keys[i]]))
    return el("span", role="img", class_="thumb", aria_label=label, data_image=i, style=f"--x:{column};--y:{row}")


def page(
    title: str,
    facts: Mapping[str, str],
    shown: Gallery,
    examples: int,
    charts: Mapping[str, tuple[Line, int]],
    tuned: tuple[Mapping[tuple[str, str], Mapping[str, Line]], int],
    grid: NDArray[np.uint8] | None,
) -> str:
    """The file's text; `grid` are pixels (H, W, 3) of views. What there is nothing of has no section."""
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{_digest(SCRIPT)}'"
    style = STYLE + f":root{{--columns:{columns(len(shown.keys))};--sheet:url({picture(sheet(shown.thumbnails))})}}"
    style += "".join(f".c{i}{{--h:{hue:.0f};--k:{i % 2}}}" for i, hue in enumerate(hues(len(shown.classes))))
    sections = [map_section(shown), neighbour_section(shown, examples)]
    if charts:
        drawn = []
        for key, (line, lost) in charts.items():
            note = f"not finite: {lost}" if lost else ""
            drawn.append(chart(key, {key: line}, "step", note) if line[0] else el("p", el("b", key), f" {note}"))
        sections.append(section("Training", el("div", *drawn, class_="charts")))
    if tuned[0] or tuned[1]:
        drawn = [chart(name, lines, "epoch", note) for (name, note), lines in tuned[0].items()]
        left = [el("p", f"Left out, being of other weights: {tuned[1]}.")] if tuned[1] else []
        sections.append(section("Fine-tuning", el("div", *drawn, class_="charts"), *left))
    if grid is not None:
        text = f"{VIEW_ROWS} images: each as it is cropped to be evaluated, then {VIEW_PAIRS} pairs of its views"
        views = el("img", class_="views", alt=text, src=picture(grid), width=grid.shape[1], height=grid.shape[0])
        sections.append(section("Views", el("p", f"{text}, drawn as in training."), views))
    about = [el("div", el("dt", name), el("dd", value)) for name, value in facts.items()]
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", title),
        el("style", style),
    )
    body = el(
        "body",
        el("header", el("h1", title), el("dl", *about)),
        el("main", *sections),
        el("script", _data(shown), type="application/json", id="data"),
        el("script", SCRIPT),
    )
    return "<!DOCTYPE html>\n" + ElementTree.tostring(el("html", head, body, lang="en"), "unicode", method="html")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _data(shown: Gallery) -> str:
    """What the script reads. No name can end the element that it stands in: < is written as JSON's own escape."""
    data = {
        "classes": list(shown.classes),
        "labels": list(shown.labels),
        "keys": list(shown.keys),
        "nearest": shown.nearest.tolist(),
        "columns": columns(len(shown.keys)),
    }
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def section(name: str, *children: Element) -> Element:
    heading = f"about-{name.lower()}"
    return el("section", el("h2", name, id=heading), *children, aria_labelledby=heading)


def map_section(shown: Gallery) -> Element:
    """Dots in the order of the images, a legend that picks classes, and a panel for the image that is chosen."""
    low, high = shown.places.min(0), shown.places.max(0)
    scale = (SIDE - 2 * MARGIN) / (high - low).max()  # of both axes
    width, height = (high - low) * scale + 2 * MARGIN
    spots = np.stack([shown.places[:, 0] - low[0], high[1] - shown.places[:, 1]], 1) * scale + MARGIN
    dots = [
        el("circle", class_=f"c{max(label, 0)}", cx=f"{x:.1f}", cy=f"{y:.1f}", r=7)
        for label, (x, y) in zip(shown.labels, spots, strict=True)
    ]
    counts = Counter(shown.labels)
    legend = [
        el(
            "button",
            el("i", class_=f"c{i}"),
            f"{name} ",
            el("small", str(counts[i])),
            type="button",
            aria_pressed="false",
        )
        for i, name in enumerate(shown.classes)
    ]
    number = f"{len(shown.keys)} images" + (f" of {len(shown.classes)} classes" if shown.classes else "")
    label = f"Map of {number}. {shown.layout}. Arrow keys go from image to image, Page Up and Page Down through all."
    drawing = el(
        "svg",
        el("path", id="links"),
        el("g", *dots, id="dots"),
        el("circle", id="ring", r=14),
        id="map",
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        tabindex=0,
        role="application",
        aria_label=label,
    )
    panel = el(
        "aside", el("p", "Point at an image, or focus the map and use the arrow keys."), id="panel", aria_live="polite"
    )
    beside = [panel]
    if legend:
        shut = None if len(legend) > 20 else ""  # a thousand buttons would stand in the way of the Tab key
        beside.append(el("details", el("summary", "Classes"), el("div", *legend, id="legend"), open=shut))
    told = el("p", f"{number}. {shown.layout}. Lines lead to the nearest neighbours of the chosen image.")
    return section("Map", told, el("div", drawing, el("div", *beside), class_="map"))


def neighbour_section(shown: Gallery, examples: int) -> Element:
    """A row for each example: the image, then its nearest neighbours; another class is marked in word and line."""
    k = shown.nearest.shape[1]
    rows = []
    for i in shown.examples(examples):
        cells = []
        for j, cosine in zip(shown.nearest[i].tolist(), shown.cosine[i].tolist(), strict=True):
            other = shown.labels[i] != shown.labels[j]
            name = [el("span", f"≠ {shown.class_of(j)}" if other else shown.class_of(j))] if shown.classes else []
            cells.append(
                el("td", thumbnail(shown, j), *name, el("small", f"{cosine:.2f}"), class_="other" if other else None)
            )
        name = [el("span", shown.class_of(i))] if shown.classes else []
        rows.append(el("tr", el("th", thumbnail(shown, i), *name, scope="row"), *cells))
    head = el(
        "tr",
        el("th", "image", scope="col"),
        el("th", f"the {k} nearest, with their cosine", scope="colgroup", colspan=k),
    )
    told = f"Nearest among the {len(shown.keys)} images of the map, by cosine."
    if shown.classes:
        told += f" Of all neighbours of all images {100 * shown.agreement():.1f} % have the image's class."
    table = el("table", el("thead", head), el("tbody", *rows))
    return section(
        "Neighbours",
        el("p", told),
        el("div", table, class_="scroll", tabindex=0, role="region", aria_label="Neighbours"),
    )


def hues(count: int) -> list[float]:
    """A hue in degrees for each class: evenly around, or where they are many by the golden angle."""
    turn = 360 / count if 0 < count <= 12 else 137.508
    return [(20 + i * turn) % 360 for i in range(count)]


# ---- charts --------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 10, 24  # margins


def chart(title: str, lines: Mapping[str, Line], x_name: str, note: str = "") -> Element:
    """A figure of named lines over one x; its caption and its label say in words what it shows."""
    xs, ys = (np.concatenate([np.asarray(line[axis], float) for line in lines.values()]) for axis in (0, 1))
    across, up = _ticks(xs.min(), xs.max(), whole=True), _ticks(ys.min(), ys.max())

    def x_of(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - across[0]) / (across[-1] - across[0])

    def y_of(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - up[0]) / (up[-1] - up[0])

    def path(values: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in values)

    drawn = []
    for tick in up:
        level = f"{y_of(tick):.1f}"
        drawn.append(el("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=level, y2=level))
        drawn.append(el("text", _number(tick), x=LEFT - 6, y=level, dy="0.35em", text_anchor="end"))
    for tick in across:
        anchor = "end" if tick == across[-1] else "middle"
        drawn.append(el("text", _number(tick), x=f"{x_of(tick):.1f}", y=HEIGHT - 6, text_anchor=anchor))
    said: list[str] = []
    keys: list[Element] = []
    each = 1  # rows that a point stands for, at most
    for i, (name, (x, y)) in enumerate(lines.items()):
        parts = min(len(x), BUCKETS)
        each = max(each, -(-len(x) // parts))
        steps, values = np.array_split(np.asarray(x, float), parts), np.array_split(np.asarray(y, float), parts)
        middle = [(part.mean(), value.mean()) for part, value in zip(steps, values, strict=True)]
        if len(x) > parts:
            top = [(at, value.max()) for (at, _), value in zip(middle, values, strict=True)]
            floor = [(at, value.min()) for (at, _), value in zip(middle, values, strict=True)]
            drawn.append(el("polygon", class_=f"s{i}", points=path(top + floor[::-1])))
        drawn.append(el("polyline", class_=f"s{i}", points=path(middle)))
        if len(middle) <= 30:
            drawn += [el("circle", class_=f"s{i}", cx=f"{x_of(a):.1f}", cy=f"{y_of(b):.1f}", r=3) for a, b in middle]
        said.append(f"{name}: first {_number(y[0])}, last {_number(y[-1])}, {_number(min(y))} to {_number(max(y))}")
        if len(lines) > 1:
            sample = el("line", class_=f"s{i}", x1=0, x2=24, y1=5, y2=5)
            keys.append(
                el("span", el("svg", sample, viewBox="0 0 24 10", aria_hidden="true"), f"{name} {_number(y[-1])}")
            )
    notes = [f"{x_name} {_number(xs.min())} to {_number(xs.max())}"]
    if len(lines) == 1:
        notes.insert(0, f"last {_number(ys[-1])}")
    if each > 1:
        notes.append(f"mean and range of each {each} rows")
    if note:
        notes.append(note)
    label = f"{title}. {'; '.join(said)}; {', '.join(notes)}"
    svg = el("svg", *drawn, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label)
    return el("figure", el("figcaption", el("b", title), *keys, el("small", ", ".join(notes))), svg)


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Round numbers at equal distances, the first at or below low, the last at or above high."""
    if low == high:
        low, high = low - abs(low) / 20 - whole, high + abs(high) / 20 + (whole or not high)
    scale = 10 ** math.floor(math.log10((high - low) / 4))
    size = next(scale * factor for factor in (1, 2, 2.5, 5, 10) if (high - low) / (scale * factor) <= 4)
    if whole:
        size = max(1, math.ceil(size))
    return [size * i for i in range(math.floor(low / size), math.ceil(high / size) + 1)]


def _number(value: float) -> str:
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


# ---- how it looks and answers --------------------------------------------------------------------------------------

STYLE = """
:root{color-scheme:light dark;--back:#fff;--front:#1b1c1e;--quiet:#5c6066;--line:#d8dade;--raised:#f5f6f7;
--s0:#0b62c4;--s1:#b8430a;--s2:#4d7a0f;--light:.46;--step:.14;--chroma:.15}
@media(prefers-color-scheme:dark){:root{--back:#141517;--front:#e9eaec;--quiet:#a3a7ad;--line:#3a3d42;--raised:#1e2023;
--s0:#7db4ff;--s1:#ffa070;--s2:#a9d65c;--light:.68;--step:.16;--chroma:.14}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:76rem;padding:1rem 1.25rem 4rem;background:var(--back);color:var(--front);
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.75rem;line-height:1.2;margin:1rem 0;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:2.5rem 0 .25rem}
p{margin:.25rem 0 1rem}
small,dt,.charts text{color:var(--quiet)}
small{font-size:.8125rem}
dl{display:flex;flex-wrap:wrap;gap:.5rem 2rem;margin:0}
dt{font-size:.8125rem}
dd{margin:0;overflow-wrap:anywhere}
:focus-visible{outline:3px solid var(--s0);outline-offset:2px}
.thumb{--s:4rem;display:inline-block;width:var(--s);height:var(--s);background:var(--sheet);border-radius:3px;
background-size:calc(var(--s)*var(--columns)) auto;print-color-adjust:exact;
background-position:calc(var(--s)*var(--x)*-1) calc(var(--s)*var(--y)*-1)}
.map{display:flex;flex-wrap:wrap;gap:1rem}
#map{flex:1 1 26rem;align-self:start;min-width:0;max-width:46rem;max-height:46rem;
background:var(--raised);border:1px solid var(--line);border-radius:6px;cursor:crosshair;touch-action:manipulation}
.map>div{flex:1 1 18rem}
#dots circle,i{color:oklch(calc(var(--light) + var(--k,0)*var(--step)) var(--chroma) var(--h,250))}
#dots circle{fill:currentColor;stroke:var(--raised);stroke-width:1.5}
#dots .off{opacity:.08}
#ring{fill:none;stroke:var(--front);stroke-width:3;visibility:hidden}
#links{fill:none;stroke:var(--front);stroke-width:1.5}
#panel{min-height:19rem}
#panel>.thumb{--s:8rem}
#panel p{margin:.25rem 0;overflow-wrap:anywhere}
#panel div{display:flex;flex-wrap:wrap;gap:.5rem}
#panel figure{margin:0;width:5rem;font-size:.8125rem;line-height:1.25;overflow-wrap:anywhere}
summary{cursor:pointer}
#legend{display:flex;flex-wrap:wrap;gap:.375rem;max-height:20rem;overflow:auto;padding:.375rem 4px}
button{font:inherit;font-size:.875rem;color:inherit;background:none;border:1px solid var(--line);border-radius:99px;
padding:.125rem .625rem;cursor:pointer}
button[aria-pressed=true]{border-color:var(--front);background:var(--raised);box-shadow:inset 0 0 0 1px var(--front)}
i{display:inline-block;width:.75rem;height:.75rem;border-radius:50%;background:currentColor;margin-right:.375rem}
.scroll{overflow-x:auto}
table{border-spacing:.375rem;text-align:left;font-size:.8125rem;line-height:1.25}
th,td{vertical-align:top;font-weight:400;padding:0}
thead th{color:var(--quiet)}
tbody th{padding-right:1rem;font-weight:600}
table span{display:block;width:5.75rem;overflow-wrap:anywhere}
table .thumb{--s:5.75rem}
.other .thumb{outline:2px dashed var(--front);outline-offset:1px}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(20rem,100%),1fr));gap:1.5rem}
.charts figure{margin:0;display:flex;flex-direction:column}
.charts figcaption{display:flex;flex-wrap:wrap;gap:0 .75rem;align-items:baseline;flex:1;overflow-wrap:anywhere}
.charts figcaption svg{width:24px;height:10px;margin-right:.375rem}
.charts text{fill:var(--quiet);font-size:11px}
.grid{stroke:var(--line)}
polyline,figcaption line{fill:none;stroke:currentColor;stroke-width:2;stroke-linejoin:round}
polygon{fill:currentColor;opacity:.25}
figure circle{fill:currentColor}
.s0{color:var(--s0)}.s1{color:var(--s1);stroke-dasharray:7 3}.s2{color:var(--s2);stroke-dasharray:2 3}
.views{max-width:100%;min-width:min(100%,40rem);height:auto;image-rendering:pixelated}
"""

SCRIPT = """
"use strict"
const find = id => document.getElementById(id)
const data = JSON.parse(find("data").textContent), map = find("map"), dots = [...find("dots").children]
const places = dots.map(dot => ["cx", "cy"].map(name => +dot.getAttribute(name)))
const picked = new Set()
let current = -1

const shown = i => !picked.size || picked.has(data.labels[i])
const className = i => data.classes.length ? data.classes[data.labels[i]] : ""

function make(tag, text, ...children) {
  const made = document.createElement(tag)
  made.append(text, ...children)
  return made
}

function thumb(i) {
  const made = make("span", "")
  made.className = "thumb"
  made.setAttribute("role", "img")
  made.setAttribute("aria-label", [className(i), data.keys[i]].filter(Boolean).join(" "))
  made.style.setProperty("--x", i % data.columns)
  made.style.setProperty("--y", Math.floor(i / data.columns))
  return made
}

function choose(i) {
  if (i === undefined || i === current) return
  current = i
  const [x, y] = places[i], ring = find("ring")
  ring.setAttribute("cx", x)
  ring.setAttribute("cy", y)
  ring.style.visibility = "visible"
  find("links").setAttribute("d", data.nearest[i].map(j => `M${x} ${y}L${places[j]}`).join(""))
  const near = make("div", "")
  for (const j of data.nearest[i]) near.append(make("figure", thumb(j), make("div", className(j))))
  find("panel").replaceChildren(thumb(i), make("p", make("b", className(i)), " ", make("small", data.keys[i])),
    make("p", make("small", "nearest")), near)
}

function least(cost) {
  let best, lowest = Infinity
  places.forEach((place, i) => {
    const value = shown(i) ? cost(place, i) : Infinity
    if (value < lowest) [best, lowest] = [i, value]
  })
  return best
}

function point(event) {
  const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(map.getScreenCTM().inverse())
  choose(least(([x, y]) => { const d = Math.hypot(x - at.x, y - at.y); return d < 30 ? d : Infinity }))
}
map.addEventListener("pointermove", point)
map.addEventListener("pointerdown", point)

const first = () => least((_, i) => i)
map.addEventListener("focus", () => { if (current < 0) choose(first()) })
map.addEventListener("keydown", event => {
  const way = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key]
  const turn = {PageDown: 1, PageUp: -1}[event.key]
  if (!way && !turn) return
  event.preventDefault()
  if (current < 0) return choose(first())
  if (turn) return choose(least((_, i) => (i - current) * turn > 0 ? (i - current) * turn : Infinity))
  choose(least(([x, y]) => {
    const [dx, dy] = [x - places[current][0], y - places[current][1]]
    const along = dx * way[0] + dy * way[1], aside = Math.abs(dx * way[1]) + Math.abs(dy * way[0])
    return along > 0 && along >= aside ? along + aside : Infinity
  }))
})

find("legend")?.childNodes.forEach((button, label) => button.addEventListener("click", () => {
  if (!picked.delete(label)) picked.add(label)
  button.setAttribute("aria-pressed", picked.has(label))
  dots.forEach((dot, i) => dot.classList.toggle("off", !shown(i)))
}))
"""


# ---- the command ---------------------------------------------------------------------------------------------------


def draw_sample(dataset: "Dataset", count: int, seed: int) -> "Dataset":
    """`count` images drawn from a data set; all, if it has no more.

    Raises ValueError for a data set that is too small for a page.
    """
    from pipeline.subset import subset

    if dataset.samples < FEWEST:
        raise ValueError(f"a page needs at least {FEWEST} images, {dataset.address} has {dataset.samples}")
    if dataset.samples <= count:
        return dataset
    order = np.random.Generator(np.random.Philox(seed)).permutation(dataset.samples)
    return subset(dataset, order[:count])


def compose(
    weights: Path,
    facts: Mapping[str, Any],
    dataset: "Dataset",
    views: "ViewConfig",
    features: "Tensor",
    *,
    layout: Layout,
    examples: int,
    evaluations: Path | None,
    seed: int,
) -> str:
    """The page of an encoder's `weights`, with the `facts` of a session, and features (N, F) of the data set's images.

    Curves come from the metrics.jsonl of the run that the file lies in, and from `evaluations`, by default the
    evaluation.jsonl beside it; weights drawn at random have none. Raises ValueError for files that say something else.
    """
    shown = gallery(dataset, views, features, layout, seed)
    charts: dict[str, tuple[Line, int]] = {}
    tuned: tuple[dict[tuple[str, str], dict[str, Line]], int] = ({}, 0)
    grid = None
    if facts["sha256"]:
        run = next((folder for folder in weights.absolute().parents[1:3] if (folder / "metrics.jsonl").is_file()), None)
        file = evaluations or weights.with_name("evaluation.jsonl")
        if run:
            charts = curves(run / "metrics.jsonl")
        if evaluations or file.is_file():
            tuned = finetunings(file, facts["sha256"])
        grid = views_grid(weights, dataset, seed)
    about = {
        "Encoder": facts["encoder"],
        "Weights": facts["weights"],
        "sha256": (facts["sha256"] or "")[:12],
        "Images": f"{len(shown.keys)} of {facts['data']['samples']} in {facts['data']['name']}",
        "Prepared": f"{views.size} px, centre {100 * views.eval_crop:g} %",
    }
    return page(f"{facts['data']['name']} as the encoder sees it", about, shown, examples, charts, tuned, grid)
