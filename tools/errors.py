"""How every program ends: user errors exit with code 2, runtime failures with 1, both with a one-line message."""

import contextlib
import errno
from collections.abc import Iterator

import typer

# The given path cannot be used: a user error. Errors that may pass, or need space, such as a full disk, are not.
WRONG_PATH = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}
WRONG_PATH |= {errno.ELOOP, errno.ENXIO}  # a link, or a pipe, in place of a file


MOST = 2000  # characters of a message: it may quote what a file holds


def one_line(error: BaseException) -> str:
    """A message as a terminal may show it: what is no printable character is spelled out, such as \\n or \\x1b."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(error).strip())
    return text if len(text) <= MOST else f"{text[: MOST // 2]} ... {text[-MOST // 2 :]}"


@contextlib.contextmanager
def one_message(program: str) -> Iterator[None]:
    """Turn an error into one line on stderr and an exit code: ValueError and wrong paths 2, failures 1.

    A RuntimeError of torch or Python itself keeps its traceback; a LoaderError or a killed worker needs none.
    """
    try:
        yield
    except typer.Exit:  # a RuntimeError too
        raise
    except ValueError as error:
        typer.echo(f"{program}: {one_line(error)}", err=True)
        raise typer.Exit(2) from error
    except (OSError, RuntimeError, FloatingPointError) as error:
        if isinstance(error, RuntimeError) and type(error).__module__.partition(".")[0] in ("builtins", "torch"):
            raise
        typer.echo(f"{program}: {one_line(error)}", err=True)
        raise typer.Exit(2 if isinstance(error, OSError) and error.errno in WRONG_PATH else 1) from error
