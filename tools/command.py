"""train.py's command line: a recipe, options over it, and a TOML file of options between the two."""

import inspect
import math
import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import typer

from model.run_folder import Preempted
from pipeline.views import VIEWS, make_views, parse_changes
from tools.errors import one_message
from tools.files import read_text
from tools.options import Option, options_of, parameters, with_parameters

VIEW_TABLES = ("views", "second_views")  # fields of the config and tables of a file, changed by --view, --second-view
Config = TypeVar("Config")


class RunError(ValueError):
    """The caller's options, data or run folder cannot be used; the message says what to do."""


def train_command(config_class: type, recipes: Mapping[str, Any], train: Callable[..., None]) -> typer.Typer:
    """The command with an option for each of the config's; it calls train(config, recipe=, out=, resume=, origin=)."""

    def config_file(ctx: typer.Context, path: Path | None) -> Path | None:
        if path:
            ctx.default_map, ctx.obj = read_file(path, config_class)
        return path

    def command(
        ctx: typer.Context,
        recipe: Annotated[str, typer.Argument(help=f"One of {', '.join(recipes)}.")],
        out: Annotated[Path | None, typer.Option(help="Run folder. (default: the next free runs/RECIPE)")] = None,
        resume: Annotated[
            bool, typer.Option(help="Go on from the newest checkpoint in --out, if there is one.")
        ] = False,
        config: Annotated[  # noqa: ARG001  its callback has done the work
            Path | None,
            typer.Option(help="TOML file of options and \\[views] tables.", is_eager=True, callback=config_file),
        ] = None,
        views: Annotated[str | None, typer.Option(help=f"Views other than the recipe's: {', '.join(VIEWS)}.")] = None,
        view: Annotated[
            list[str] | None, typer.Option(help="Change one view option, such as size=96. Repeatable.")
        ] = None,
        second_view: Annotated[
            list[str] | None, typer.Option(help="Change one option of each image's second view alone. Repeatable.")
        ] = None,
        **options: Any,
    ) -> None:
        """Train an encoder with SimCLR. A recipe gives every value; a file and then options change them."""
        from torch import OutOfMemoryError

        rank = f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
        with one_message(f"{rank}train"):
            try:
                resolved, origin = resolve(recipes, ctx, recipe, views, view, second_view, **options)
                train(resolved, recipe=recipe, out=out, resume=resume, origin=origin)
            except Preempted as error:
                typer.echo(f"{rank}{error}", err=True)
                raise typer.Exit(3) from error
            except OutOfMemoryError as error:
                typer.echo(f"{rank}train: {error} Give a smaller --micro-batch or --keep-graphs.", err=True)
                raise typer.Exit(1) from error

    app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)
    app.command()(with_options(command, config_class))
    return app


def resolve(
    recipes: Mapping[str, Config],
    ctx: typer.Context,
    recipe: str,
    views: str | None,
    view: Sequence[str] | None,
    second_view: Sequence[str] | None,
    **options: Any,
) -> tuple[Config, dict[str, str]]:
    """The config of a parsed command line, and the origin ("file", "command line") of values not from the recipe."""
    base: Any = recipes.get(recipe)
    origin: dict[str, str] = {}
    if base is None:
        raise RunError(f"unknown recipe {recipe!r}; choose one of {', '.join(recipes)}")
    for name in options:
        source = ctx.get_parameter_source(name)
        if source is not None and options[name] is not None:
            origin[name] = "file" if source.name == "DEFAULT_MAP" else "command line"
    tables = ctx.obj or {name: {} for name in VIEW_TABLES}
    preset = views or tables["views"].pop("preset", None)
    for name, texts in zip(VIEW_TABLES, (view, second_view), strict=True):
        changes = parse_changes(texts or [])
        origin |= {f"{name}.{key}": "file" for key in tables[name]}
        origin |= {f"{name}.{key}": "command line" for key in changes}
        tables[name] = tables[name] | changes
    made = make_views(preset or base.views, tables["views"])
    second = make_views(made, tables["second_views"]) if tables["second_views"] else None
    chosen = {name: value for name, value in options.items() if value is not None}
    return replace(base, views=made, second_views=second, **chosen), origin


def with_options(command: Callable[..., None], config: type) -> Callable[..., None]:
    """`command` with an option for each field of the dataclass in place of its **options; None if it is not given."""
    hints, shown = get_type_hints(config), parameters(command)[:-1]
    for name, limits in options_of(config).items():
        kind: Any = Annotated[hints[name] | None, typer.Option(help=limits.help)]
        shown.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind))
    return with_parameters(command, shown, like=command)


def read_file(path: Path, config: type) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Options and [views] tables of a TOML file. Raises typer.BadParameter that names the file and the wrong entry."""
    try:
        values = tomllib.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise typer.BadParameter(f"{path} cannot be read: {error}") from error
    tables = {name: values.pop(name, {}) for name in VIEW_TABLES}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise typer.BadParameter(
                f"{path}: {name}: expected a table, got {table!r}; write [{name}]"
                + (f' preset = "{table}"' if name == "views" else " and its options, a line each")
            )
    preset = tables["views"].get("preset", "imagenet")
    if not isinstance(preset, str) or preset not in VIEWS:
        raise typer.BadParameter(f"{path}: [views] preset: expected one of {', '.join(VIEWS)}, got {preset!r}")
    for name, table in tables.items():
        try:
            make_views(preset, {key: value for key, value in table.items() if key != "preset" or name != "views"})
        except ValueError as error:
            raise typer.BadParameter(f"{path}: [{name}] {error}") from error
    known, kinds = options_of(config), get_type_hints(config)
    if unknown := sorted(values.keys() - known):
        raise typer.BadParameter(
            f"{path}: unknown key {', '.join(unknown)}; known: {', '.join(sorted(known))}, "
            + ", ".join(f"[{name}]" for name in VIEW_TABLES)
        )
    for name, value in values.items():
        if expected := _expected(kinds[name], known[name], value):
            shown = str(value).lower() if isinstance(value, bool) else repr(value)
            raise typer.BadParameter(f"{path}: {name}: expected {expected}, got {shown}")
    return values, tables


def _expected(kind: Any, limits: Option, value: Any) -> str:
    """What an option of a file should be, or "" if its value is that."""
    if choices := get_args(kind):
        return "" if value in choices else f"one of {', '.join(choices)}"
    if kind is str:
        return "" if isinstance(value, str) and "\0" not in value else "text in quotes, without a null character"
    if kind is bool:
        return "" if isinstance(value, bool) else "true or false"
    number = "a whole number" if kind is int else "a number"
    if type(value) not in (int, kind) or value in (math.inf, -math.inf) or value != value:
        return number
    return "" if limits.allows(value) else limits.expected


def answer_help_and_mistakes(app: typer.Typer) -> None:
    """End the program where its arguments ask for help or cannot be parsed; for before slow imports."""
    parsed: list[Any] = []
    command = typer.main.get_command(app)
    command.callback = lambda **given: parsed.append(given)
    try:
        command.main()
    except SystemExit:
        if not parsed:
            raise
