"""What attacks achieve at every threshold of the score, and what it costs honest inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, fields
from math import ceil
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from keras_tl_defense.metrics import Auroc, Rate

_RETENTIONS = (0.95, 0.90)
_SHOWN_FROM = 0.5  # retention; less is shown only where the defence itself keeps less
_TABLE = [
    *("inputs", "auroc", "auroc_low", "auroc_high", "asked", "retention", "threshold"),
    *(field.name for field in fields(Rate)),
]
_RING: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 8, "fillstyle": "none"}
_DOT: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 8, "markeredgecolor": "black"}


class RocReport:
    """How well the score tells honest inputs from crafted ones, whatever the threshold.

    Honest inputs are the clean images that the Student answers rightly; *retention* is the share
    of them that scores at least the threshold. An attack succeeds where a crafted input does to
    the Student what it was made for and scores at least the threshold; the share is of *all*
    crafted inputs, failures among them.

    Every threshold here is chosen on the very clean images whose retention is told, and with the
    test set in view: what a defence could reach, not what it will. `calibrate` sets its threshold
    on images of their own, and `operating` tells what came of that.

    Args:
        details: What `evaluate_defence` keeps: `details["clean"]` with `score`, `accepted` and
            `right`; of each attack `score`, `accepted` and `reached`.

    Attributes:
        table: DataFrame, for each attack a row for a retention of 0.95 and one for 0.90. `inputs`,
            its name; `auroc`, how likely an honest input scores higher than a crafted one that
            fools the Student, `auroc_low` and `auroc_high` (95 % interval, see `Auroc`; NaN where
            no attack succeeds); `asked`, the retention asked for; `retention`, the one that the
            highest `threshold` that keeps so many has; attack success there as `count`, `n`,
            `rate`, `low` and `high` (Wilson 95 % interval).
        curve: DataFrame with the columns `inputs`, `threshold`, `retention` and `attack_success`:
            for each attack every threshold at which anything changes, the last one infinite.
        operating: DataFrame with the columns `inputs`, `retention` and `attack_success`: what the
            defence itself decided. When it counts disagreements, this need not lie on the curve.

    Raises:
        ValueError: There is no attack, or the Student answers no clean image rightly.

    Example:
        >>> report = evaluate_defence(defence, x_test, y_test, attacks={"mimicry": result})
        >>> roc = report.roc()
        >>> roc.plot().savefig("roc.png")
        >>> roc.table.columns.tolist()[:4]
        ['inputs', 'auroc', 'auroc_low', 'auroc_high']
    """

    def __init__(self, details: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        attacks = {name: crafted for name, crafted in details.items() if name != "clean"}
        if "clean" not in details or not attacks:
            raise ValueError(
                "A curve needs clean images and an attack. Pass the attack's result to "
                '`evaluate_defence(defence, x_test, y_test, attacks={"mimicry": result})`. '
                f"Received: details of {', '.join(details) or 'nothing'}"
            )
        clean = details["clean"]
        right = clean["right"]
        if not right.any():
            raise ValueError(
                "Retention has no meaning, because the Student answers no clean image rightly. "
                "Check that `y_test` are its own classes from 0, and that its training went well. "
                f"Received: {len(right)} clean images, none of them answered rightly"
            )
        honest = np.sort(clean["score"][right].astype(float))
        retained = float(clean["accepted"][right].mean())
        rows: list[tuple[object, ...]] = []
        curves, operating = [], []
        for name, crafted in attacks.items():
            reached = crafted["reached"]
            score = crafted["score"].astype(float)
            auroc = Auroc.of(honest, score[reached])
            for asked in _RETENTIONS:
                threshold = _threshold(honest, asked)
                kept = float(np.mean(honest >= threshold))
                success = Rate.of(reached & (score >= threshold))
                rows.append((name, *astuple(auroc), asked, kept, threshold, *astuple(success)))
            curves.append(_curve(name, honest, np.sort(score[reached]), len(score)))
            operating.append((name, retained, float(np.mean(reached & crafted["accepted"]))))
        self.table = pd.DataFrame(rows, columns=_TABLE)
        self.curve = pd.concat(curves, ignore_index=True)
        self.operating = pd.DataFrame(operating, columns=["inputs", "retention", "attack_success"])

    def __repr__(self) -> str:
        return f"RocReport\n{self.table.to_string(index=False, float_format='{:.3f}'.format)}"

    def to_markdown(self) -> str:
        """The table as Markdown, rates in percent."""
        lines = [
            "| inputs | AUROC | 95 % interval | retention | attack success | 95 % interval |",
            "|---|---|---|---|---|---|",
        ]
        known_areas = self.table["auroc"].notna()
        for row, known in zip(self.table.itertuples(index=False), known_areas, strict=True):
            area = f"{row.auroc:.3f}" if known else "–"
            interval = f"{row.auroc_low:.3f} to {row.auroc_high:.3f}" if known else "–"
            lines.append(
                f"| {row.inputs} | {area} | {interval} | "
                f"{row.retention:.1%} | {row.count}/{row.n} = {row.rate:.1%} | "
                f"{row.low:.1%} to {row.high:.1%} |"
            )
        return "\n".join(lines) + "\n"

    def plot(self) -> Figure:
        """Attack success against retention, a line for each attack.

        Returns:
            A figure. Rings mark a retention of 0.95 and of 0.90; a dot with a black edge is what
            the defence itself decided.
        """
        figure = Figure(figsize=(6.4, 4.6), layout="constrained")
        axes = figure.subplots()
        for asked in _RETENTIONS:
            axes.axvline(asked, color="0.85", linewidth=1, zorder=0)
        for number, name in enumerate(self.operating["inputs"]):
            curve, marked, own = (
                rows[rows["inputs"] == name] for rows in (self.curve, self.table, self.operating)
            )
            area = marked["auroc"].iloc[0]
            label = f"{name} ({'no success' if np.isnan(area) else f'AUROC {area:.2f}'})"
            color = f"C{number}"
            axes.plot(curve["retention"], curve["attack_success"], color=color, label=label)
            axes.plot(marked["retention"], marked["rate"], **_RING, color=color)
            axes.plot(own["retention"], own["attack_success"], **_DOT, color=color)
        axes.plot([], [], **_RING, color="black", label="retention 0.95 and 0.90")
        axes.plot([], [], **_DOT, color="0.6", label="decided by the defence")
        lowest = min(_SHOWN_FROM, self.operating["retention"].min() - 0.05)
        axes.set_xlim(max(lowest, 0), 1.01)
        highest = max(0.1, self.curve["attack_success"].max())
        axes.set_ylim(-0.03 * highest, 1.05 * highest)
        axes.set_xlabel("retention: share of honest images accepted")
        axes.set_ylabel("attack success: share of all crafted inputs")
        figure.legend(loc="outside lower center", ncols=2, fontsize=9)
        return figure


def _threshold(honest: np.ndarray, retention: float) -> float:
    """The highest threshold that keeps the share `retention` of scores sorted from below."""
    return float(honest[len(honest) - ceil(retention * len(honest) - 1e-9)])


def _curve(name: str, honest: np.ndarray, successful: np.ndarray, n: int) -> pd.DataFrame:
    """Retention and success at each distinct threshold; the scores are sorted from below."""
    thresholds = np.append(np.unique(np.concatenate([honest, successful])), np.inf)
    return pd.DataFrame(
        {
            "inputs": name,
            "threshold": thresholds,
            "retention": (len(honest) - np.searchsorted(honest, thresholds)) / len(honest),
            "attack_success": (len(successful) - np.searchsorted(successful, thresholds)) / n,
        }
    )
