"""Read back what a run has stored about itself: how an encoder was trained, where its projection head lies."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from train import TrainConfig


def config_of(words: Sequence[str]) -> "TrainConfig":
    """What train.py would run for this recipe and these options, by its own parser."""
    import train
    from tools.command import resolve

    context: Any = typer.main.get_command(train.app).make_context("train.py", list(words))
    given = {name: value for name, value in context.params.items() if name not in ("out", "resume", "config")}
    return resolve(train.RECIPES, context, **given)[0]


def training_of(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a weights file of ours says about itself: (view options that prepare an image for it, how it was trained).

    An exported encoder tells in its metadata, a checkpoint in its state.json; both are empty for a stranger's file.
    """
    from model.checkpoint import read_state
    from model.encoder_file import read_metadata
    from train import MAY_CHANGE

    state = file.with_name("state.json")
    try:
        if facts := read_metadata(file):
            interpolation = {"bilinear": "linear", "bicubic": "cubic"}[facts["interpolation"]]
            views = {"size": facts["image_size"], "mean": facts["mean"], "std": facts["std"]}
            return views | {"eval_crop": facts["crop_pct"], "interpolation": interpolation}, dict(facts["training"])
        if file.name == "model.safetensors" and state.is_file():
            saved = read_state(file.parent, {file.name})
            extra = saved["extra"]
            # what may change stays behind, such as the paths of this machine
            config = {name: value for name, value in extra["config"].items() if name not in MAY_CHANGE}
            views = {name: config["views"][name] for name in ("size", "mean", "std", "eval_crop", "interpolation")}
            loader = extra["loader"] if "loader" in extra else extra["loaders"][0]  # earlier, one for each process
            dataset = loader["identity"]["dataset"]
            return views, {"recipe": extra["recipe"], "steps": saved["step"], "dataset": dataset, "config": config}
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{file}: what it says about its training is incomplete: {error!r}") from error
    return {}, {}


def head_file(weights: Path) -> Path:
    """Where the projection head of an encoder lies: in its checkpoint, beside it, or in its run's newest checkpoint.

    Raises ValueError if nowhere.
    """
    from model.checkpoint import latest

    beside, checkpoints = weights.with_name("head.safetensors"), weights.parent.parent / "checkpoints"
    if weights.with_name("state.json").is_file():
        return weights
    if beside.is_file():
        return beside
    if newest := latest(checkpoints):
        return newest / "model.safetensors"
    raise ValueError(f"the projection head of {weights} is missing: neither {beside} nor a checkpoint in {checkpoints}")
