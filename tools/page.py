"""One HTML file that shows what an encoder has learnt, and how: what `tools/evaluate.py page` writes.

It holds a map of the embeddings with the image under the pointer or the arrow keys, nearest neighbours, every number of
metrics.jsonl over the steps, fine-tuning curves, and the views of training. tools/gallery.py collects what there is to
show; tools/page.css and tools/page.js are copied into the file. The file needs no other: its images are data in it, and
its Content-Security-Policy lets the browser fetch nothing and run no script but page.js, whatever text the names of
classes and keys hold.
"""

import base64
import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import numpy as np
from numpy.typing import NDArray

from tools.files import read_text
from tools.gallery import VIEW_PAIRS, VIEW_ROWS, Gallery, Layout, Line, curves, finetunings, gallery, views_grid

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.shards import Dataset
    from pipeline.views import ViewConfig

STYLE, SCRIPT = (read_text(Path(__file__).with_name(name)) for name in ("page.css", "page.js"))
SIDE, MARGIN = 1000, 20  # of the map, in its own units
BUCKETS = 300  # points of a curve at most; more rows than that are averaged


# ---- HTML ----------------------------------------------------------------------------------------------------------


def el(tag: str, *children: Element | str, **attributes: object) -> Element:
    """An element; class_ is class, aria_label aria-label, None leaves one out. Text is escaped when it is written."""
    given = {name.rstrip("_").replace("_", "-"): str(value) for name, value in attributes.items() if value is not None}
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
    """The file's text; `grid` holds pixels (H, W, 3) of views. Empty sections are omitted."""
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
    """The JSON that page.js reads. < is written as \\u003c, so that no name can close the script element."""
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
    caption = el("p", f"{number}. {shown.layout}. Lines lead to the nearest neighbours of the chosen image.")
    return section("Map", caption, el("div", drawing, el("div", *beside), class_="map"))


def neighbour_section(shown: Gallery, examples: int) -> Element:
    """A row for each example: the image, then its nearest neighbours. Those of another class get "≠" and an outline."""
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
    caption = f"Nearest among the {len(shown.keys)} images of the map, by cosine."
    if shown.classes:
        caption += f" Of all neighbours of all images {100 * shown.agreement():.1f} % have the image's class."
    table = el("table", el("thead", head), el("tbody", *rows))
    return section(
        "Neighbours",
        el("p", caption),
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
    """A figure of named lines over one x. Its caption and its aria-label give first, last, least and greatest value."""
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
    summaries: list[str] = []
    keys: list[Element] = []
    rows_per_point = 1  # at most
    for i, (name, (x, y)) in enumerate(lines.items()):
        parts = min(len(x), BUCKETS)
        rows_per_point = max(rows_per_point, -(-len(x) // parts))
        steps, values = np.array_split(np.asarray(x, float), parts), np.array_split(np.asarray(y, float), parts)
        middle = [(part.mean(), value.mean()) for part, value in zip(steps, values, strict=True)]
        if len(x) > parts:
            top = [(at, value.max()) for (at, _), value in zip(middle, values, strict=True)]
            floor = [(at, value.min()) for (at, _), value in zip(middle, values, strict=True)]
            drawn.append(el("polygon", class_=f"s{i}", points=path(top + floor[::-1])))
        drawn.append(el("polyline", class_=f"s{i}", points=path(middle)))
        if len(middle) <= 30:
            drawn += [el("circle", class_=f"s{i}", cx=f"{x_of(a):.1f}", cy=f"{y_of(b):.1f}", r=3) for a, b in middle]
        summaries.append(
            f"{name}: first {_number(y[0])}, last {_number(y[-1])}, {_number(min(y))} to {_number(max(y))}"
        )
        if len(lines) > 1:
            sample = el("line", class_=f"s{i}", x1=0, x2=24, y1=5, y2=5)
            keys.append(
                el("span", el("svg", sample, viewBox="0 0 24 10", aria_hidden="true"), f"{name} {_number(y[-1])}")
            )
    notes = [f"{x_name} {_number(xs.min())} to {_number(xs.max())}"]
    if len(lines) == 1:
        notes.insert(0, f"last {_number(ys[-1])}")
    if rows_per_point > 1:
        notes.append(f"mean and range of each {rows_per_point} rows")
    if note:
        notes.append(note)
    label = f"{title}. {'; '.join(summaries)}; {', '.join(notes)}"
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


# ---- the command ---------------------------------------------------------------------------------------------------


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

    Training curves come from the metrics.jsonl of the run that holds the weights, fine-tuning curves from `evaluations`
    (default: the evaluation.jsonl beside the weights). Random weights have neither. Raises ValueError if a file cannot
    be read as such.
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
