"""Programs, one typer command line per file, imported by nobody. They share how they fail, and how they read a run."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer


@contextlib.contextmanager
def one_message(program: str) -> Iterator[None]:
    """What the caller can mend ends in one line and exit code 2, what fails on the way in one line and 1."""
    try:
        yield
    except ValueError as error:
        typer.echo(f"{program}: {error}", err=True)
        raise typer.Exit(2) from error
    except (OSError, RuntimeError, FloatingPointError) as error:
        if type(error) is RuntimeError:  # a LoaderError or a killed worker is named; a bare one needs its traceback
            raise
        typer.echo(f"{program}: {error}", err=True)
        raise typer.Exit(1) from error


def training_of(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a weights file of ours says about itself: (view options that prepare an image for it, how it was trained).

    An exported encoder tells in its metadata, a checkpoint in its state.json; both are empty for a stranger's file.
    """
    from model.checkpoint import read_metadata

    if told := read_metadata(file):
        interpolation = {"bilinear": "linear", "bicubic": "cubic"}[told["interpolation"]]
        views = {"size": told["image_size"], "mean": told["mean"], "std": told["std"]}
        return views | {"eval_crop": told["crop_pct"], "interpolation": interpolation}, told["training"]
    if file.name == "model.safetensors" and (state := file.with_name("state.json")).is_file():
        saved = json.loads(state.read_bytes())
        config = saved["extra"]["config"]
        views = {name: config["views"][name] for name in ("size", "mean", "std", "eval_crop", "interpolation")}
        return views, {"recipe": saved["extra"]["recipe"], "steps": saved["step"], "config": config}
    return {}, {}
