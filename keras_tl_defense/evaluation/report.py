"""What a defence costs on honest inputs and stops of crafted ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, fields
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from keras_tl_defense.attacks import AttackResult
from keras_tl_defense.evaluation.inputs import check_attacks, explain_labelled
from keras_tl_defense.evaluation.roc import RocReport
from keras_tl_defense.metrics import Rate, clean_rates

_COLUMNS = ["inputs", "metric", *(field.name for field in fields(Rate))]


class DefenceReport:
    """The rates of a defence, with counts and intervals.

    Attributes:
        table: DataFrame with the columns `inputs` ("clean" or the name of an attack), `metric`,
            `count`, `n`, `rate`, `low` and `high` (Wilson 95 % interval). Metrics of clean inputs:
            `student_accuracy`; `retention`, accepted of those that the Student answers rightly;
            `clean_acceptance`, accepted of all; `clean_accuracy`, accepted and right of all.
            Metrics of an attack: `undefended_success`, the Student alone; `defended_success`;
            `accepted`, whatever the answer; `adversarial_accuracy`, answered as the class of its
            source, where that is known. `clean_acceptance` is what the paper calls "TPR" and
            `accepted` what it calls "FPR"; in the usual sense of the words they are the opposite.
        details: What `explain` says of the images, by inputs. Of clean images also `right`, whether
            the Student answers the label; of crafted ones `reached`, whether they do to the Student
            alone what they were made for, and `succeeded`, to the defence. Boolean arrays of shape
            `(n,)`.
    """

    def __init__(
        self,
        table: pd.DataFrame,
        details: Mapping[str, dict[str, np.ndarray]] | None = None,
        *,
        by_score: bool = True,
    ) -> None:
        self.table = table
        self._by_score = by_score
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

    def roc(self) -> RocReport:
        """What each attack achieves at other thresholds of the score than the defence's own.

        Raises:
            ValueError: The report has no attack, or the Student answers no clean image rightly.
            RuntimeError: All pairs vote, and no score decides.
        """
        if not self._by_score:
            raise RuntimeError(
                'With `mode="vote"` no score decides, so there are no thresholds to compare. Make '
                "the defence with `mode=\"validate\"`. Received: mode='vote'"
            )
        return RocReport(self.details)

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
        TypeError: Attacks are not given as results by name.
        ValueError: An attack's images do not fit the defended Student, a non-targeted attack's
            source classes are missing, or an attack is called "clean".

    Example:
        >>> report = evaluate_defence(defence, x_test, y_test, attacks={"mimicry": result})
        >>> report.table["inputs"].unique().tolist()
        ['clean', 'mimicry']
        >>> report.roc().table["asked"].tolist()
        [0.95, 0.9]
    """
    attacks = check_attacks({} if attacks is None else attacks, defence)
    clean, labels = explain_labelled(defence, x_test, y_test, batch_size, verbose)
    clean["right"] = clean["student_class"] == labels
    vote = defence.mode == "vote"
    details = {"clean": clean}
    rates = clean_rates(labels, clean["student_class"], clean["answer"])
    rows = [("clean", metric, *astuple(rate)) for metric, rate in rates.items()]
    for name, result in attacks.items():
        crafted = defence.explain(result.adversarial, batch_size=batch_size, verbose=verbose)
        reached, accepted = result.reached(crafted["student_class"]), crafted["accepted"]
        succeeded = accepted & result.reached(crafted["answer"] - 1)
        details[name] = {**crafted, "reached": reached, "succeeded": succeeded}
        hits = {
            "undefended_success": reached,
            "defended_success": succeeded,
            "accepted": accepted,
        }
        if result.y_source is not None:
            hits["adversarial_accuracy"] = crafted["answer"] - 1 == result.y_source
        rows += [(name, metric, *astuple(Rate.of(hit))) for metric, hit in hits.items()]
    return DefenceReport(pd.DataFrame(rows, columns=_COLUMNS), details, by_score=not vote)
