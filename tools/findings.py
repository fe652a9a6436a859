"""What a check of tools/doctor.py finds: ok, a warning or a fault, and what to change."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, ParamSpec, TypeVar

Params = ParamSpec("Params")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Finding:
    """The result of a check: its state, what was found, and what to change where that is not ok."""

    state: Literal["ok", "warning", "fault"]
    found: str
    change: str = ""


def ok(found: str) -> Finding:
    return Finding("ok", found)


def warning(found: str, change: str) -> Finding:
    return Finding("warning", found, change)


def fault(found: str, change: str = "") -> Finding:
    """`change` may be left out only if `found` already says what to do."""
    return Finding("fault", found, change)


def checked(check: Callable[Params, Result], *args: Params.args, **options: Params.kwargs) -> Result | Finding:
    """Run a check; turn its exception into a fault with the exception's message."""
    try:
        return check(*args, **options)
    except (ValueError, OSError, RuntimeError, ImportError, AttributeError) as error:
        message = " ".join(str(error).split())
        explained = type(error).__module__ != "builtins" or type(error) is ValueError  # the message needs no more
        return fault(message if explained else f"{type(error).__name__}: {message}")
