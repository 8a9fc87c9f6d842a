"""What a defence is made of, in words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import tensorflow as tf

from keras_tl_defense.ensemble.mask_bank import LEVELS


def describe(defence: Any) -> str:
    """One line: what is defended, by how many differentiators, and what rejects."""
    made = "to be adapted"
    if defence.adapted:
        made = (
            f"{len(defence.member_classes)} differentiators, {defence.head} heads {_place(defence)}"
            f", {_decision(defence) if defence.fitted else 'to be fitted'}"
        )
    name = type(defence).__name__
    return f"<{name} of {defence.student.name!r}, {defence.classes} classes: {made}>"


def summarise(defence: Any) -> str:
    """Some lines: the Student, the differentiators, what is pruned, and what rejects."""
    student = defence.student
    shape = "×".join("?" if n is None else str(n) for n in tuple(student.inputs[0].shape)[1:])
    lines = [
        describe(defence),
        f"  Student   {student.name!r}, {shape} inputs, {student.count_params():,} weights, frozen "
        f"up to {defence.cut!r}",
        f"  Ensemble  {_differentiators(defence)}",
    ]
    if not defence.adapted:
        ratios = "found by `adapt`" if defence.ratios == "auto" else defence.ratios
        return "\n".join([*lines, f"  Ratios    {ratios}", "  Next      adapt(x_train, y_train)"])
    lines.append(f"  Heads     {defence.head}, {_place(defence)}")
    for level, rows in defence.sparsity().groupby("level"):
        share = "" if level == 0 else f", by {LEVELS[level]:.0%} of the ratios"
        lines.append(f"  Pruned    in {rows['differentiators'].iloc[0]} of them{share}:")
        lines += [
            f"              {row.layer}: {row.kept:,} of {row.units:,} kept"
            for row in rows.itertuples()
        ]
    if not defence.ratios:
        lines.append("  Pruned    nothing")
    if not defence.fitted:
        return "\n".join([*lines, "  Next      fit(x_train, y_train)"])
    lines.append(f"  Decision  {_decision(defence)}")
    if defence.calibration is not None:
        found = defence.calibration
        lines.append(
            f"            calibration kept {found.retention.count} of {found.retention.n} images, "
            f"with a score of at least {found.threshold:.3f}"
        )
    return "\n".join(lines)


def memory_table(defence: Any, parts: dict[str, list[Any]]) -> pd.DataFrame:
    """Bytes of the Student and of each part of the differentiators; see `memory`."""
    student = _bytes(defence.student.weights)
    sizes = {"student": student} | {part: _bytes(weights) for part, weights in parts.items()}
    count = len(defence.member_classes)
    sizes["all"] = sum(sizes.values())
    sizes["students instead"] = (count + 1) * student
    table = pd.DataFrame({"part": list(sizes), "bytes": list(sizes.values())})
    return table.assign(
        each=[
            size / count if part in ("heads", "own layers") else float("nan")
            for part, size in sizes.items()
        ],
        of_student=table["bytes"] / student,
    )


def _bytes(weights: list[Any]) -> int:
    return sum(int(np.prod(w.shape)) * tf.as_dtype(w.dtype).size for w in weights)


def _place(defence: Any) -> str:
    """What the heads read."""
    behind = "on own layers behind" if defence.tune == "unfrozen" else "at"
    return f"{behind} {defence.head_layer!r}"


def _differentiators(defence: Any) -> str:
    """Which differentiators there are, and how many check an input."""
    size, each = defence.classes_per_member, defence.members_per_class
    if size > 2:
        known = f"groups of {size} classes, {each} or more for each class, by {defence.grouping}"
    elif each < defence.classes - 1:
        known = f"pairs of classes, {each} for each class"
    else:
        known = "all pairs of classes"
    drawn = "all vote" if defence.mode == "vote" else f"{defence.ensemble_size} check an input"
    own = ", with layers of their own" if defence.tune == "unfrozen" else ""
    return f"{known}{own}; {drawn}" + ("" if defence.mode == "vote" else f", {defence.selection}")


def _decision(defence: Any) -> str:
    """What rejects an input."""
    if defence.mode == "vote":
        return "answers what wins all its votes"
    if defence.decision == "score":
        return f"rejects by the score, calibrated to keep {defence.calibration.asked:.0%}"
    return f"rejects by {defence.reject_threshold} of {defence.ensemble_size} votes"
