"""Programs, one typer command line per file, imported by nobody. They share how they fail."""

import contextlib
from collections.abc import Iterator

import typer


@contextlib.contextmanager
def one_message(program: str) -> Iterator[None]:
    """What the caller can mend ends in one line and exit code 2, what fails on the way in one line and 1."""
    try:
        yield
    except ValueError as error:
        typer.echo(f"{program}: {error}", err=True)
        raise typer.Exit(2) from error
    except (OSError, RuntimeError) as error:
        if type(error) is RuntimeError:  # a LoaderError or a killed worker is named; a bare one needs its traceback
            raise
        typer.echo(f"{program}: {error}", err=True)
        raise typer.Exit(1) from error
