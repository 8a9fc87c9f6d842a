"""Checks of plain arguments that many functions share."""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import Any

import numpy as np


def check_integer(
    name: str, value: object, minimum: int, maximum: int | None = None, why: str = ""
) -> int:
    """An integer within its range.

    Args:
        name: What the argument is called.
        value: What was passed: a Python or NumPy integer.
        minimum: Smallest value allowed.
        maximum: Largest value allowed; `None` for no limit.
        why: A reason for the limits, for the error message.

    Returns:
        The value as an `int`.

    Raises:
        ValueError: It is no integer, or out of range.
    """
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = minimum - 1
    above = maximum is not None and number > maximum
    if isinstance(value, bool | np.bool_) or number < minimum or above:
        limits = f"of at least {minimum}" if maximum is None else f"in {minimum}..{maximum}"
        raise ValueError(
            f"`{name}` must be an integer {limits}{why and ', ' + why}. Received: {name}={value!r}"
        )
    return number


def check_positive(name: str, value: object, maximum: float = math.inf) -> float:
    """A number above 0.

    Args:
        name: What the argument is called.
        value: What was passed: a Python or NumPy number.
        maximum: Largest value allowed.

    Returns:
        The value as a `float`.

    Raises:
        ValueError: It is no number, not finite, or out of range.
    """
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not 0 < number <= maximum or math.isinf(number):
        limits = "positive and finite" if math.isinf(maximum) else f"in (0, {maximum:g}]"
        raise ValueError(f"`{name}` must be a number {limits}. Received: {name}={value!r}")
    return number


def check_callable(name: str, value: Any) -> Any:
    """A callable or `None`, as it came.

    Raises:
        TypeError: It is neither.
    """
    if value is not None and not callable(value):
        raise TypeError(
            f"`{name}` must be a callable such as `keras.layers.Rescaling(1 / 255)`, or None. "
            f"Received: {name}={value!r}"
        )
    return value


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> Any:
    """The value itself; `ValueError` when it is none of `choices`."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {choices}. Received: {name}={value!r}")
    return value
