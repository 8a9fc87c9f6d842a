"""How many differentiators should check an input, and how many of them should reject it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import astuple, fields
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from keras_tl_defense._validation import check_integer
from keras_tl_defense.attacks import AttackResult
from keras_tl_defense.evaluation.inputs import check_attacks, explain_labelled
from keras_tl_defense.metrics import Rate

_COLUMNS = ["inputs", "metric", "ensemble_size", "reject_threshold"]
_SHOWN = ("retention", "defended_success")


class SizesReport:
    """The rates of a defence that votes, for ensembles of several sizes.

    Attributes:
        table: DataFrame with the columns `inputs` ("clean" or the name of an attack), `metric`,
            `ensemble_size`, `reject_threshold`, `count`, `n`, `rate`, `low` and `high` (Wilson 95 %
            interval). Metrics are `retention` and `clean_acceptance` of clean inputs, and
            `defended_success` and `accepted` of an attack, as in `DefenceReport`.
    """

    def __init__(self, table: pd.DataFrame) -> None:
        self.table = table

    def __repr__(self) -> str:
        return f"SizesReport\n{self.table.to_string(index=False, float_format='{:.3f}'.format)}"

    def plot(self) -> Figure:
        """Retention and the success of each attack against the size, with intervals."""
        shown = self.table[self.table["metric"].isin(_SHOWN)]
        thresholds = sorted(shown["reject_threshold"].unique())
        figure = Figure(figsize=(1 + 4.2 * len(thresholds), 4.2), layout="constrained")
        grid = figure.subplots(1, len(thresholds), sharey=True, squeeze=False)[0]
        for axes, threshold in zip(grid, thresholds, strict=True):
            own = shown[shown["reject_threshold"] == threshold]
            for number, (inputs, rows) in enumerate(own.groupby("inputs", sort=False)):
                label = "retention" if inputs == "clean" else f"{inputs}: success"
                size, color = rows["ensemble_size"], f"C{number}"
                axes.plot(size, rows["rate"], marker=".", color=color, label=label)
                axes.fill_between(size, rows["low"], rows["high"], color=color, alpha=0.2)
            axes.set_title(f"rejected by {threshold} disagreeing")
            axes.set_xlabel("differentiators that check an input")
            axes.set_xlim(shown["ensemble_size"].min() - 0.5, shown["ensemble_size"].max() + 0.5)
            axes.set_ylim(0, 1.02)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.3)
        grid[0].set_ylabel("rate, with Wilson 95 % interval")
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        return figure


def evaluate_ensemble_sizes(
    defence: Any,
    x_test: Any,
    y_test: Any = None,
    attacks: Mapping[str, AttackResult] | None = None,
    *,
    sizes: Iterable[int] = range(1, 16),
    thresholds: Iterable[int] = (1, 2),
    batch_size: int = 32,
    verbose: int | str = "auto",
) -> SizesReport:
    """Measure what a defence that votes would do with more or fewer members.

    Every image is answered once, by as many members as the largest size; a smaller ensemble is the
    first of them. So the figures of one input are not independent across sizes.

    Args:
        defence: A fitted `DifferentiatorEnsemble`, not one with `mode="vote"`. Its own size,
            threshold and decision do not count.
        x_test: Clean test images of shape `(n, H, W, C)` in 0..255: array, tensor, or batched
            `tf.data.Dataset` of `(images, labels)`.
        y_test: Integer labels of shape `(n,)` in `0..K-1`.
        attacks: Results of attacks by name.
        sizes: Ensemble sizes; those above the number of differentiators that know a class are left
            out.
        thresholds: Numbers of disagreeing members that reject an input; pairs of a size and a
            larger threshold are left out.
        batch_size: Images per batch, for arrays.
        verbose: 0 shows no progress bar.

    Returns:
        The rates, with a plot.

    Raises:
        TypeError: Attacks are not given as results by name, or sizes as several integers.
        ValueError: No size is left, an attack does not fit the defence, or all pairs vote.

    Example:
        >>> report = evaluate_ensemble_sizes(defence, x_test, y_test, {"mimicry": result})
        >>> figure = report.plot()
        >>> sorted(set(report.table["metric"]))
        ['accepted', 'clean_acceptance', 'defended_success', 'retention']

    Reference:
        Wu et al., "Defeating Misclassification Attacks Against Transfer Learning", IEEE TDSC 2022,
        Figure 5.
    """
    if defence.mode == "vote":
        raise ValueError(
            'With `mode="vote"` all pairs vote, so there are no sizes to compare. Give a defence '
            "with `mode=\"validate\"`. Received: mode='vote'"
        )
    attacks = check_attacks({} if attacks is None else attacks, defence)
    known = defence.members_per_class
    asked, needed = _integers("sizes", sizes), _integers("thresholds", thresholds)
    tried = [size for size in asked if size <= known]
    if not tried or not needed or needed[0] > tried[-1]:
        raise ValueError(
            f"No size is left: {known} differentiators know a class, and a size below its "
            "threshold rejects nothing. Give other `sizes` or `thresholds`. "
            f"Received: sizes={asked}, thresholds={needed}"
        )
    # `explain` wants as many as the defence's own threshold, which does not count here.
    options = {"ensemble_size": max(tried[-1], defence.reject_threshold)}
    clean, labels = explain_labelled(defence, x_test, y_test, batch_size, verbose, **options)
    right = clean["student_class"] == labels
    crafted = {
        name: defence.explain(result.adversarial, batch_size, verbose, **options)
        for name, result in attacks.items()
    }
    rows: list[tuple[object, ...]] = []
    for threshold in needed:
        for size in tried:
            if threshold > size:
                continue
            accepted = _accepted(clean, size, threshold)
            rates = {
                ("clean", "retention"): accepted[right],
                ("clean", "clean_acceptance"): accepted,
            }
            for name, result in attacks.items():
                accepted = _accepted(crafted[name], size, threshold)
                reached = result.reached(crafted[name]["student_class"])
                rates[name, "defended_success"] = reached & accepted
                rates[name, "accepted"] = accepted
            rows += [
                (*key, size, threshold, *astuple(Rate.of(hits))) for key, hits in rates.items()
            ]
    columns = [*_COLUMNS, *(field.name for field in fields(Rate))]
    return SizesReport(pd.DataFrame(rows, columns=columns))


def _integers(name: str, values: Any) -> list[int]:
    """Different integers of at least 1, in ascending order."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(
            f"`{name}` must be several integers, as range(1, 16). Received: {name}={values!r}"
        )
    return sorted({check_integer(name, value, 1) for value in values})


def _accepted(details: Mapping[str, np.ndarray], size: int, threshold: int) -> np.ndarray:
    """Which inputs fewer than `threshold` of the first `size` members reject."""
    return np.asarray(np.sum(details["margins"][:, :size] <= 0, axis=1) < threshold)
