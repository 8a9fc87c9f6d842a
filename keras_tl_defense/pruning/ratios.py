"""What users may give as pruning ratios, what each layer gets, and how a ratio rises."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from fractions import Fraction
from numbers import Real

from keras_tl_defense.pruning.masks import Ratio, exact


def resolve_ratios(ratios: float | Mapping[str, float], layers: Sequence[str]) -> dict[str, float]:
    """The ratio of each prunable layer.

    Args:
        ratios: One fraction for every layer, in `[0, 1)`, or a mapping from `fnmatch` patterns of
            layer names to fractions. The first pattern that matches a layer counts; a layer that
            none matches is not pruned.
        layers: Names of the prunable layers.

    Returns:
        The layers that are pruned, with their ratios.

    Raises:
        TypeError: A ratio is not a number, or `ratios` is neither a number nor a mapping.
        ValueError: A ratio is outside `[0, 1)`, or a pattern matches no layer.

    Example:
        >>> resolve_ratios({"conv1*": 0.85}, ["conv1_1", "conv1_2", "conv2_1"])
        {'conv1_1': 0.85, 'conv1_2': 0.85}
    """
    if isinstance(ratios, Mapping):
        patterns = dict(ratios)
    elif isinstance(ratios, Real) and not isinstance(ratios, bool):
        patterns = {"*": float(ratios)}
    else:
        raise TypeError(
            "`ratios` must be a number in [0, 1) or a mapping from layer-name patterns to such "
            f"numbers, as {{'conv1*': 0.85}}. Received: ratios={ratios!r}"
        )
    for pattern, ratio in patterns.items():
        check_ratio(f"ratios[{pattern!r}]", ratio)
        if not any(_matches(name, pattern, layers) for name in layers):
            raise ValueError(
                f"The pattern {pattern!r} matches no prunable layer before the cut. Those are: "
                f"{', '.join(layers) or 'none'}. Received: ratios={ratios!r}"
            )
    resolved = {}
    for name in layers:
        for pattern, ratio in patterns.items():
            if _matches(name, pattern, layers):
                if ratio > 0:
                    resolved[name] = float(ratio)
                break
    return resolved


def _matches(name: str, pattern: str, layers: Sequence[str]) -> bool:
    """Whether a pattern means a layer; a layer's very name means that one, as saved ratios do."""
    return name == pattern if pattern in layers else fnmatchcase(name, pattern)


def check_ratio(name: str, ratio: object) -> float:
    """A fraction that may be pruned.

    Args:
        name: What the argument is called.
        ratio: What was passed.

    Raises:
        TypeError: It is not a number.
        ValueError: It is outside `[0, 1)`.
    """
    if not isinstance(ratio, Real) or isinstance(ratio, bool):
        raise TypeError(f"A ratio must be a number. Received: {name}={ratio!r}")
    number = float(ratio)
    if not math.isfinite(number) or not 0 <= number < 1:
        raise ValueError(
            "A ratio is the fraction of a layer that is pruned and must be in [0, 1). "
            f"Received: {name}={ratio!r}"
        )
    return number


def rising_ratio(ratio: Ratio, round: int, iterations: int) -> Fraction:
    """The ratio of one round of pruning and training in turn: `ratio * round / iterations`.

    Args:
        ratio: Fraction pruned after the last round, in `[0, 1)`, taken as the decimal number that
            it prints as.
        round: Number of the round, from 1 to `iterations`.
        iterations: Number of rounds.

    Returns:
        The exact number, so that a third of 0.5 prunes one filter of six.

    Raises:
        ValueError: There is no such round.

    Example:
        >>> [str(rising_ratio(0.5, round, 3)) for round in (1, 2, 3)]
        ['1/6', '1/3', '1/2']
    """
    if not 1 <= round <= iterations:
        raise ValueError(
            "Rounds are numbered from 1 to `iterations`. "
            f"Received: round={round}, iterations={iterations}"
        )
    return exact(ratio) * round / iterations
