"""A picture of what the encoder sees: each image as stored, beside several draws of its two views.

    python tools/show_views.py SHARDS views.png --views imagenet

Column one is the image resized and centre-cropped; then pairs of views, drawn as training draws them.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer


def show(
    data: Annotated[Path, typer.Argument(help="Folder of shards.")],
    picture: Annotated[Path, typer.Argument(help="PNG to write.")],
    views: Annotated[str, typer.Option(help="Preset: imagenet, cifar or stl10.")] = "imagenet",
    view: Annotated[list[str] | None, typer.Option(help="Change one view option, such as size=96. Repeatable.")] = None,
    second_view: Annotated[
        list[str] | None, typer.Option(help="Change one option of the second views alone. Repeatable.")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Rows.")] = 8,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of views per row.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the first pair's draws; the next pair takes the next seed.")] = 0,
) -> None:
    """Write a PNG grid of images and their augmented views."""
    from tools import one_message

    with one_message("show_views"):
        import torch
        from torchvision.utils import make_grid, save_image

        from pipeline.loader import build_eval_loader, build_loader
        from pipeline.shards import read_dataset
        from pipeline.views import make_views, parse_changes

        config, dataset, device = make_views(views, parse_changes(view or [])), read_dataset(data), torch.device("cpu")
        columns = [next(iter(build_eval_loader(dataset, config, images, device)))[0]]
        second = make_views(config, parse_changes(second_view or []))
        for pair in range(pairs):
            loader = build_loader(dataset, config, images, device, seed=seed + pair, shuffle=0, second_views=second)
            batch = next(loader)
            columns += batch.views.split(images)
        rows = config.pixels(torch.stack(columns, 1).flatten(0, 1))
        picture.parent.mkdir(parents=True, exist_ok=True)
        save_image(make_grid(rows, nrow=1 + 2 * pairs), picture)
        typer.echo(f"{picture}: {images} images, each with {pairs} pairs of views at {config.size} px")


app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)
app.command()(show)

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository instead of tools/, as with python -m
    app()
