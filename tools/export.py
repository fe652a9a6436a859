"""Make an encoder ready to be given away: one folder that timm and model hubs take, with a card that says what it is.

    python tools/export.py RUN OUT                                 the encoder of a finished run
    python tools/export.py RUN/checkpoints/step-0000500 OUT        of one that is not, stripped of all else
    python tools/export.py FILE OUT --names torchvision            other people's, under plain names

OUT/model.safetensors holds the weights, OUT/config.json what timm needs ("local-dir:OUT"), where it has the
architecture, and OUT/README.md the card: how to load it and prepare images, what it was trained on and how, and what
tools/evaluate.py found for exactly these weights. OUT appears when it is complete, and is never overwritten.
"""

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from model.encoder import Encoder
    from pipeline.views import ViewConfig

app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


@app.command()
def export(
    encoder: Annotated[Path, typer.Argument(help="Run, encoder folder, checkpoint or safetensors file.")],
    out: Annotated[Path, typer.Argument(help="New folder.")],
    dtype: Annotated[Literal["float32", "float16", "bfloat16"], typer.Option(help="Type of the weights.")] = "float32",
    head: Annotated[bool, typer.Option(help="Write the projection head too, as head.safetensors.")] = False,
    names: Annotated[
        Literal["torchvision", "timm", "lightly", "solo-learn"], typer.Option(help="Whose key names to use.")
    ] = "torchvision",
    license: Annotated[str, typer.Option(help="Licence of the weights, as the card names it.")] = "unknown",
    dataset: Annotated[str, typer.Option(help="Name of the training images, for the card.")] = "",
    view: Annotated[
        list[str] | None, typer.Option(help="Say how images are prepared, such as size=96. (default: as the file says)")
    ] = None,
) -> None:
    """Write an encoder, its configuration for timm, and its model card to a new folder."""
    from tools.errors import one_message
    from tools.files import MARK, write_new

    with one_message("export"):
        import torch

        from model.encoder_file import export_encoder, load_encoder, load_head, save_head, weights_file
        from pipeline.views import make_views, parse_changes
        from pipeline.write import publish
        from tools.runs import head_file, training_of

        file = weights_file(encoder)
        network = load_encoder(file)
        prepared, training = training_of(file)
        views = make_views("imagenet", prepared | parse_changes(view or []))
        kept = load_head(head_file(file)) if head else None
        precision = getattr(torch, dtype)
        with publish(out) as folder:
            export_encoder(
                folder,
                network,
                image_size=views.size,
                mean=views.mean,
                std=views.std,
                interpolation={"linear": "bilinear", "cubic": "bicubic"}[views.interpolation],
                crop_pct=views.eval_crop,
                training=training,
                file="model.safetensors",
                dtype=precision,
                names=names,
            )
            if kept:
                save_head(folder / "head.safetensors", kept.to(precision))
            timm = (folder / "config.json").exists()
            results = results_of(file, training.get("steps"))
            text = card(out.resolve().name, network, views, training, results, names, timm, license, dataset)
            write_new(folder / "README.md", text)
            written = sorted(path.name for path in folder.iterdir() if path.name != MARK)
        typer.echo(f"{out}: {', '.join(written)}")


def results_of(weights: Path, steps: int | None) -> list[tuple[str, str, str]]:
    """(evaluation, top-1, top-5) of exactly these weights: their run's kNN, and what evaluation.jsonl says beside them.

    The run's kNN is that of the start and of `steps`, which is where these weights stand.
    """
    from model.run_folder import read_rows
    from tools.files import open_binary

    results = []
    metrics, rows = weights.parent.parent / "metrics.jsonl", weights.with_name("evaluation.jsonl")
    for row in read_rows(metrics) if metrics.is_file() else []:
        if "knn" in row and row["step"] in (0, steps):
            results.append((f"kNN in training, step {row['step']}", _percent(row["knn"]), ""))
    with open_binary(weights) as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    for number, row in enumerate(read_rows(rows) if rows.is_file() else [], 1):
        try:
            if row["sha256"] == digest:
                results += _scores(row)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{rows}, row {number} is not an evaluation's: {error!r}") from error
    return results


def _scores(row: dict[str, Any]) -> list[tuple[str, str, str]]:
    options, kind = row["options"], row["evaluation"]
    how = {"cached": "cached features", "labels": f"{options.get('labels')} labels", "l2": "l2 swept"}
    words = [text for name, text in how.items() if options.get(name)]
    words += [f"{row['train']['name']} to {row['test']['name']}"]
    results = []
    for name, scores in row["scores"].items():
        if name != "from scratch":  # other weights
            what = ", ".join([kind, *([name] if name not in (kind, "pre-trained") else []), *words])
            results.append((what, _percent(scores["top1"]), _percent(scores["top5"])))
    return results


def card(
    title: str,
    network: "Encoder",
    views: "ViewConfig",
    training: dict[str, Any],
    results: list[tuple[str, str, str]],
    names: str,
    timm: bool,
    license: str,
    dataset: str,
) -> str:
    """The model card, Markdown under YAML; only what is known is in it, and what it quotes is text alone."""
    depth, millions = network.depth, sum(param.numel() for param in network.parameters()) / 1e6
    tags = [*(["simclr", "self-supervised"] if training else []), *(["timm"] if timm else [])]
    head = {"license": license, "library_name": "timm" if timm else "swiftclr", "tags": tags}
    head["pipeline_tag"] = "image-feature-extraction"
    lines = ["---", *(f"{key}: {_yaml(value)}" for key, value in head.items()), "---", "", f"# {_text(title)}", ""]
    lines += [
        f"A ResNet-{depth} encoder (width {network.width:g}, {network.stem} stem, {millions:.1f} M parameters) without "
        f"classifier: images to {network.num_features} features"
        + (", trained without labels by SimCLR (arXiv:2002.05709)." if training else "."),
        "",
        "## Use",
        "",
        "```python",
    ]
    if timm:
        lines += [
            "import timm, torchvision",
            "from safetensors.torch import load_file",
            'model = timm.create_model("local-dir:FOLDER", pretrained=True)',
            f"model = torchvision.models.resnet{depth}()",
            'model.load_state_dict(load_file("FOLDER/model.safetensors"), strict=False)  # fc is missing',
        ]
    elif network.width == 1 and not network.selective_kernel and names in ("torchvision", "timm"):  # the small stem
        lines += [
            "import torch, torchvision",
            "from safetensors.torch import load_file",
            f"model = torchvision.models.resnet{depth}()",
            "model.conv1 = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False)",
            "model.maxpool = torch.nn.Identity()",
            'model.load_state_dict(load_file("FOLDER/model.safetensors"), strict=False)  # fc is missing',
        ]
    else:
        lines += [
            "from model.encoder_file import load_encoder  # of SwiftCLR",
            'model = load_encoder("FOLDER")',
        ]
    resized = round(views.size / views.eval_crop)
    smoothly = {"linear": "bilinearly", "cubic": "bicubically"}[views.interpolation]
    lines += [
        "```",
        "",
        f"Images: shorter side resized to {resized} px ({smoothly}, antialiased), the central {views.size} px square, "
        f"pixels in 0 to 1 less {_numbers(views.mean)}, divided by {_numbers(views.std)} (R, G, B).",
        "",
        "## Training",
        "",
    ]
    config = training.get("config", {})
    facts = {"images": dataset or "unnamed", "steps": training.get("steps"), "recipe": training.get("recipe")}
    facts |= {"shards' fingerprint": training.get("dataset")} | {
        k: v for k, v in config.items() if k not in ("steps", "views")
    }
    facts |= {f"views: {name}": value for name, value in config.get("views", {}).items()}
    rows = [f"| {_text(name)} | {_text(value)} |" for name, value in facts.items() if value not in (None, "")]
    if training:
        lines += ["| what | value |", "|---|---|", *rows, ""]
    else:
        lines += ["The file that these weights came from does not say how they were trained.", ""]
    lines += ["## Results", ""]
    if results:
        lines += [
            "| evaluation | top-1 | top-5 |",
            "|---|---|---|",
            *(f"| {' | '.join(map(_text, each))} |" for each in results),
        ]
    else:
        lines += ["None measured."]
    lines += [
        "",
        "## Licence",
        "",
        f"Of the weights: {_text(license)}. The licence of the training images may limit their use.",
    ]
    return "\n".join([*lines, ""])


def _text(value: object) -> str:
    """A value as Markdown that shows its characters, in one line and one cell of a table."""
    plain = " ".join(re.sub(r"[^ -~\xa0-\ud7ff\ue000-\U0010ffff]", " ", str(value)).split())
    # an underscore within a word is one; a dot or bracket behind a number, a sign or a line would only matter at the
    # start of a line, where no value stands
    return re.sub(r"[\\`*\[\]<>|~&$!#]|(?<!\w)_|_(?!\w)", r"\\\g<0>", plain)


def _yaml(value: object) -> str:
    """JSON as YAML takes it, which knows no surrogates."""
    plain = json.dumps(value, ensure_ascii=False)
    return re.sub(
        r"[^ -~\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]",
        lambda match: "\ufffd" if "\ud800" <= match[0] <= "\udfff" else f"\\u{ord(match[0]):04x}",
        plain,
    )


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository instead of tools/, as with python -m
    app()
