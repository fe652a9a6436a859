"""Tests of how long something takes, on hosts that others may take for seconds on end."""

import functools
import warnings
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")


def thrice(test: Callable[P, None]) -> Callable[P, None]:
    """Passes where one of three tries does: what is wrong fails in all of them."""

    @functools.wraps(test)
    def tried(*args: P.args, **kwargs: P.kwargs) -> None:
        for _ in range(2):
            try:
                return test(*args, **kwargs)
            except AssertionError as error:
                warnings.warn(f"tried again: {error}", stacklevel=1)
        return test(*args, **kwargs)

    return tried
