"""What a defence costs on honest inputs and stops of crafted ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, fields
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from keras_tl_defense.attacks import AttackResult
from keras_tl_defense.data import check_labels
from keras_tl_defense.metrics import Rate

_COLUMNS = ["inputs", "metric", *(field.name for field in fields(Rate))]


class DefenceReport:
    """The rates of a defence, with counts and intervals.

    Attributes:
        table: DataFrame with the columns `inputs` ("clean" or the name of an attack), `metric`,
            `count`, `n`, `rate`, `low` and `high` (Wilson 95 % interval). Metrics of clean inputs:
            `student_accuracy`; `retention`, accepted of those that the Student answers rightly;
            `clean_acceptance`, accepted of all; `clean_accuracy`, accepted and right of all.
            Metrics of an attack: `undefended_success`, the Student alone; `defended_success`;
            `accepted`, whatever the answer. `clean_acceptance` is what the paper calls "TPR" and
            `accepted` what it calls "FPR"; in the usual sense of the words they are the opposite.
        details: For each attack what `explain` says of its images.
    """

    def __init__(
        self, table: pd.DataFrame, details: Mapping[str, dict[str, np.ndarray]] | None = None
    ) -> None:
        self.table = table
        self.details = dict(details or {})

    def __repr__(self) -> str:
        return f"DefenceReport\n{self.table.to_string(index=False, float_format='{:.3f}'.format)}"

    def rate(self, inputs: str, metric: str) -> float:
        """One rate of the table.

        Args:
            inputs: `"clean"` or the name of an attack.
            metric: A metric of these inputs.

        Returns:
            The rate, in 0..1.

        Raises:
            KeyError: The table has no such row.
        """
        row = (self.table["inputs"] == inputs) & (self.table["metric"] == metric)
        if not row.any():
            raise KeyError(
                f"The report has no {metric!r} of {inputs!r}. It has: "
                f"{', '.join(f'{r.inputs} {r.metric}' for r in self.table.itertuples())}"
            )
        return float(self.table.loc[row, "rate"].iloc[0])

    def to_markdown(self) -> str:
        """The table as Markdown, rates in percent."""
        lines = ["| inputs | metric | count | rate | 95 % interval |", "|---|---|---|---|---|"]
        for row in self.table.itertuples(index=False):
            lines.append(
                f"| {row.inputs} | {row.metric} | {row.count}/{row.n} | {row.rate:.1%} | "
                f"{row.low:.1%} to {row.high:.1%} |"
            )
        return "\n".join(lines) + "\n"

    def plot(self) -> Figure:
        """Every rate with its interval, a group of bars for each kind of inputs."""
        groups = self.table["inputs"].unique()
        figure = Figure(figsize=(7, 0.9 + 0.34 * len(self.table)), layout="constrained")
        axes = figure.subplots()
        y = np.arange(len(self.table))[::-1]
        for number, inputs in enumerate(groups):
            chosen = (self.table["inputs"] == inputs).to_numpy()
            rows = self.table[chosen]
            errors = np.stack([rows["rate"] - rows["low"], rows["high"] - rows["rate"]])
            axes.barh(y[chosen], rows["rate"], xerr=errors, color=f"C{number}", label=inputs)
        axes.set_yticks(y, [f"{r.inputs}: {r.metric}" for r in self.table.itertuples()])
        axes.set_xlim(0, 1)
        axes.set_xlabel("rate, with Wilson 95 % interval")
        return figure


def evaluate_defence(
    defence: Any,
    x_test: Any,
    y_test: Any = None,
    attacks: Mapping[str, AttackResult] | None = None,
    *,
    batch_size: int = 32,
    verbose: int | str = "auto",
) -> DefenceReport:
    """Measure a defence on clean test images and on crafted ones, with and without it.

    Args:
        defence: A fitted `DifferentiatorEnsemble`.
        x_test: Clean test images of shape `(n, H, W, C)` in 0..255: array, tensor, or batched
            `tf.data.Dataset` of `(images, labels)`.
        y_test: Integer labels of shape `(n,)` in `0..K-1`.
        attacks: Results of attacks by name. They need the classes of their sources.
        batch_size: Images per batch, for arrays.
        verbose: 0 shows no progress bar.

    Returns:
        The report. An attack *succeeds* when its image is within budget, accepted, and answered as
        the target (targeted) or not as the source (non-targeted).

    Raises:
        ValueError: An attack's images do not fit the defended Student, or a non-targeted attack's
            source classes are missing.

    Example:
        >>> report = evaluate_defence(defence, x_test, y_test, attacks={"mimicry": result})
        >>> report.table["inputs"].unique().tolist()
        ['clean', 'mimicry']
    """
    rows: list[tuple[object, ...]] = []
    details: dict[str, dict[str, np.ndarray]] = {}
    clean = defence.evaluate(x_test, y_test, batch_size=batch_size, verbose=verbose)
    rows += [("clean", metric, *astuple(rate)) for metric, rate in clean.items()]
    shape = tuple(defence.student.inputs[0].shape)[1:]
    attacks = {} if attacks is None else attacks
    if not isinstance(attacks, Mapping) or not all(
        isinstance(result, AttackResult) for result in attacks.values()
    ):
        raise TypeError(
            'Attacks are given by name, as `attacks={"mimicry": result}` with what the attack '
            f"returned. Received: attacks={type(attacks).__name__}"
        )
    for name, result in attacks.items():
        if name == "clean":
            raise ValueError(
                'An attack cannot be called "clean", as the clean images are. Rename it. '
                'Received: attacks["clean"]'
            )
        if result.adversarial.shape[1:] != shape:
            raise ValueError(
                "An attack's images do not fit the defended Student, so its Teacher takes another "
                "input than the Student. Attack the Teacher that the Student's layers come from. "
                f"Received: attacks[{name!r}] with images of shape {result.adversarial.shape[1:]}, "
                f"a Student that takes {shape}"
            )
        for field, labels in (("y_source", result.y_source), ("y_target", result.y_target)):
            if labels is not None:
                where = f"attacks[{name!r}].{field}"
                check_labels(labels, defence.classes, len(result.adversarial), where)
        details[name] = defence.explain(result.adversarial, batch_size=batch_size, verbose=verbose)
        reached = result.reached(details[name]["student_class"])
        accepted = details[name]["accepted"]
        for metric, hits in (
            ("undefended_success", reached),
            ("defended_success", reached & accepted),
            ("accepted", accepted),
        ):
            rows.append((name, metric, *astuple(Rate.of(hits))))
    return DefenceReport(pd.DataFrame(rows, columns=_COLUMNS), details)
