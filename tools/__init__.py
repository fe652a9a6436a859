"""Programs, one typer command line per file. They share how they fail, as train.py does, and how they read a run.

page.py alone is none: it makes what `evaluate.py page` writes, with the grid that show_views.py draws.
"""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

# A path that cannot be used as it was given. What passes or needs room, such as a full disk, is none of the caller's.
WRONG_PATH = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}


@contextlib.contextmanager
def one_message(program: str) -> Iterator[None]:
    """What the caller can mend ends in one line and exit code 2, what fails on the way in one line and 1."""
    try:
        yield
    except typer.Exit:  # a RuntimeError too
        raise
    except ValueError as error:
        typer.echo(f"{program}: {error}", err=True)
        raise typer.Exit(2) from error
    except (OSError, RuntimeError, FloatingPointError) as error:
        # A LoaderError or a killed worker is named; what torch or Python itself raises needs its traceback.
        if isinstance(error, RuntimeError) and type(error).__module__.partition(".")[0] in ("builtins", "torch"):
            raise
        typer.echo(f"{program}: {error}", err=True)
        raise typer.Exit(2 if isinstance(error, OSError) and error.errno in WRONG_PATH else 1) from error


def training_of(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a weights file of ours says about itself: (view options that prepare an image for it, how it was trained).

    An exported encoder tells in its metadata, a checkpoint in its state.json; both are empty for a stranger's file.
    """
    from model.checkpoint import read_metadata, read_state
    from train import FREE

    state = file.with_name("state.json")
    try:
        if told := read_metadata(file):
            interpolation = {"bilinear": "linear", "bicubic": "cubic"}[told["interpolation"]]
            views = {"size": told["image_size"], "mean": told["mean"], "std": told["std"]}
            return views | {"eval_crop": told["crop_pct"], "interpolation": interpolation}, dict(told["training"])
        if file.name == "model.safetensors" and state.is_file():
            saved = read_state(file.parent, {file.name})
            extra = saved["extra"]
            config = {name: value for name, value in extra["config"].items() if name not in FREE}  # paths stay here
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
