"""Options as fields of a frozen dataclass: each holds its default, its help and its range.

    batch_size: int = option(4096, "Images per step.", at_least=1)

`check_ranges` belongs into __post_init__; tools/command.py makes the command line. `with_parameters` gives a command
parameters that its def does not list: the fields of such a dataclass, or options that several commands share.
"""

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Option:
    help: str
    at_least: float = -math.inf
    more_than: float = -math.inf
    less_than: float = math.inf
    may_change: bool = False  # when a run resumes

    @property
    def expected(self) -> str:
        limits = ("at least", self.at_least), ("more than", self.more_than), ("less than", self.less_than)
        return " and ".join(f"{words} {limit:g}" for words, limit in limits if math.isfinite(limit))

    def allows(self, value: Any) -> bool:
        """False for NaN and infinity too, where there is a range."""
        return not self.expected or (self.at_least <= value < self.less_than and value > self.more_than)


def option(default: T, help: str, **limits: Any) -> T:
    """A field of a dataclass of options; limits are those of `Option`."""
    return field(default=default, metadata={"option": Option(help=help, **limits)})


def options_of(config: Any) -> dict[str, Option]:
    """The fields of a dataclass, or an instance of one, that are options."""
    return {item.name: item.metadata["option"] for item in fields(config) if "option" in item.metadata}


def check_ranges(config: Any) -> None:
    """Raise ValueError for the first option that is out of its range."""
    for name, limits in options_of(config).items():
        if not limits.allows(value := getattr(config, name)):
            raise ValueError(f"{name}: expected {limits.expected}, got {value}")


def parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def with_parameters(
    command: Callable[..., None], shown: Iterable[inspect.Parameter], *, like: Callable[..., Any]
) -> Callable[..., None]:
    """`command`, which takes **options, with these parameters for typer to read, and the name and docstring of `like`.

    All become keyword-only, so that one with a default may stand before one without.
    """
    shown = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in shown]
    command.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
    command.__name__, command.__doc__ = like.__name__, like.__doc__
    return command
