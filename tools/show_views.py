"""A picture of what the encoder sees: each image as stored, beside several draws of its two views.

    python tools/show_views.py SHARDS views.png --views imagenet

Column one is the image resized and centre-cropped; then pairs of views, drawn as training draws them.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.shards import Dataset
    from pipeline.views import ViewConfig


def show(
    data: Annotated[Path, typer.Argument(help="Folder of shards.")],
    picture: Annotated[Path, typer.Argument(help="PNG to write.")],
    views: Annotated[str, typer.Option(help="Preset: imagenet, cifar or stl10.")] = "imagenet",
    view: Annotated[list[str] | None, typer.Option(help="Change one view option, such as size=96. Repeatable.")] = None,
    second_view: Annotated[
        list[str] | None, typer.Option(help="Change one option of the second views alone. Repeatable.")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Rows, at most one per image.")] = 8,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of views per row.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the first pair's draws; the next pair takes the next seed.")] = 0,
) -> None:
    """Write a PNG grid of images and their augmented views."""
    from tools.errors import one_message
    from tools.files import replacing

    with one_message("show_views"):
        from torchvision.utils import save_image

        from pipeline.shards import read_dataset
        from pipeline.views import make_views, parse_changes

        config = make_views(views, parse_changes(view or []))
        second = make_views(config, parse_changes(second_view or []))
        dataset = read_dataset(data)
        images = min(images, dataset.samples)
        drawn = grid(dataset, config, second, images=images, pairs=pairs, seed=seed)
        with replacing(picture) as partial:
            save_image(drawn, partial, format="png")
        typer.echo(f"{picture}: {images} images, each with {pairs} pairs of views at {config.size} px")


def grid(
    dataset: "Dataset", config: "ViewConfig", second: "ViewConfig", *, images: int, pairs: int, seed: int
) -> "Tensor":
    """Pixels (3, H, W) in [0, 1]: a row for each of the first `images`, itself and then its pairs of views."""
    import torch
    from torchvision.utils import make_grid

    from pipeline.loader import Loader, build_eval_loader

    device = torch.device("cpu")
    columns = [next(iter(build_eval_loader(dataset, config, images, device)))[0]]
    for pair in range(pairs):
        loader = Loader(dataset, config, images, device, seed=seed + pair, shuffle=False, second_views=second)
        columns += next(loader).views.split(images)
    return make_grid(config.pixels(torch.stack(columns, 1).flatten(0, 1)), nrow=1 + 2 * pairs)


app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)
app.command()(show)

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository instead of tools/, as with python -m
    app()
