"""Pictures of attacks, of what a defence made of them, and of a search of ratios."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from keras_tl_defense.attacks import AttackResult

_AMPLIFY = 10
_ACCEPTANCE = "acceptance_at_"


def plot_attacks(
    result: AttackResult,
    student_class: np.ndarray,
    answer: np.ndarray,
    chosen: Sequence[int],
    class_names: Sequence[str],
) -> Figure:
    """A row for each attack: source, target, crafted image, their difference, and two verdicts.

    Args:
        result: The attacks.
        student_class: The Student's classes of the crafted images, int array of shape `(n,)`.
        answer: The defence's answers, 0 for rejected or `1..K`, same shape.
        chosen: Numbers of the attacks that are shown.
        class_names: Names of the classes.

    Returns:
        A figure. The difference is shown ten times as strong as it is, around grey; the defence's
        answer is red where the attack succeeds.

    Raises:
        ValueError: No attack is chosen, or the classes of the sources are not known.

    Example:
        >>> details = defence.explain(result.adversarial)
        >>> verdicts = details["student_class"], details["answer"]
        >>> figure = plot_attacks(result, *verdicts, [0, 1], [f"class {c}" for c in range(16)])
        >>> figure.savefig("attacks.png")
    """
    if not len(chosen):
        raise ValueError("Choose at least one attack to show. Received: chosen=[]")
    if result.source is None or result.target is None or result.dssim is None:
        raise ValueError(
            "Only attacks that make images from a source and towards a target can be shown, such "
            "as those of `MimicryAttack`. Received: a result without a source, a target or a DSSIM"
        )
    answered = np.asarray(answer)
    succeeded = (answered > 0) & result.reached(answered - 1)
    titles = ("source", "target", "crafted image", f"difference ×{_AMPLIFY}", "verdicts")
    figure = Figure(figsize=(8.2, 0.35 + 1.35 * len(chosen)), layout="constrained")
    grid = figure.subplots(
        len(chosen), 5, squeeze=False, gridspec_kw={"width_ratios": [1, 1, 1, 1, 2.1]}
    )
    for row, number in zip(grid, chosen, strict=True):
        source = np.asarray(result.source[number], float)
        crafted = np.asarray(result.adversarial[number], float)
        difference = 127.5 + _AMPLIFY * (crafted - source)
        pictures = (source, result.target[number], crafted, difference)
        for axes, picture in zip(row, pictures, strict=False):
            pixels = np.clip(picture, 0, 255).astype(np.uint8)
            axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        if result.y_source is not None:
            row[0].set_xlabel(class_names[result.y_source[number]], fontsize=8)
        if result.y_target is not None:
            row[1].set_xlabel(class_names[result.y_target[number]], fontsize=8)
        row[2].set_xlabel(f"DSSIM {result.dssim[number]:.4f}", fontsize=8)
        defended = class_names[answer[number] - 1] if answer[number] else "rejected"
        row[4].text(0, 0.72, f"undefended: {class_names[student_class[number]]}", fontsize=9)
        row[4].text(
            0,
            0.38,
            f"defended: {defended}",
            fontsize=9,
            weight="bold",
            color="tab:red" if succeeded[number] else "tab:green",
        )
        for axes in row[:4]:
            axes.set_xticks([])
            axes.set_yticks([])
        row[4].axis("off")
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=10)
    return figure


def plot_search(history: pd.DataFrame | None) -> Figure:
    """What the search of ratios measured: attack success against retention.

    Args:
        history: The `search_history` of a defence that was adapted with `ratios="auto"`.

    Returns:
        A figure with a line for each candidate; those that prune nothing are dashed. The candidate
        that was chosen, and the lowest that any reached at each retention, stand out. Attack
        success is the share of all crafted images, of the attack that does best, that mislead the
        Student and are accepted.

    Raises:
        ValueError: Nothing was searched, or this is no such history.

    Example:
        >>> figure = plot_search(defence.search_history)
        >>> figure.savefig("search.png")
    """
    if history is None:
        raise ValueError(
            "There is nothing to show, because no ratios were searched, or the defence was loaded "
            'from a file, which keeps no history. Make the defence with `ratios="auto"` and call '
            "`adapt(x_train, y_train)`. Received: history=None"
        )
    given = [str(name) for name in getattr(history, "columns", ())]
    columns = [name for name in given if name.startswith(_ACCEPTANCE)]
    missing = {"ratios", "head_layer", "chosen"}.difference(given)
    if missing or not columns:
        raise ValueError(
            "This is not the history of a search: it lacks the columns "
            f"{', '.join([*sorted(missing), *([] if columns else [_ACCEPTANCE + '…'])])}. Pass "
            f"`defence.search_history` as it is. Received: {type(history).__name__} with the "
            f"columns {given}"
        )
    columns.sort(key=lambda name: float(name.removeprefix(_ACCEPTANCE)))
    retention = [float(name.removeprefix(_ACCEPTANCE)) for name in columns]
    measured = history[columns].to_numpy(float)
    chosen = history["chosen"].to_numpy(bool)
    pruned = history["ratios"].map(len).to_numpy() > 0

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    looks = (
        (pruned & ~chosen, "candidate", {"color": "0.7", "linewidth": 0.9}),
        (~pruned & ~chosen, "nothing pruned", {"color": "tab:orange", "linestyle": "--"}),
    )
    for group, label, look in looks:
        for number, line in enumerate(measured[group]):
            axes.plot(retention, line, marker=".", label=None if number else label, **look)
    axes.plot(
        retention,
        measured.min(axis=0),
        color="black",
        linestyle=":",
        linewidth=2,
        marker="v",
        label="lowest of all",
        zorder=4,
    )
    best = history[chosen]
    for line, ratios, layer in zip(
        measured[chosen], best["ratios"], best["head_layer"], strict=True
    ):
        axes.plot(
            retention,
            line,
            color="tab:blue",
            linewidth=2.5,
            marker="o",
            label=f"chosen: {len(ratios)} layer{'s' * (len(ratios) != 1)} pruned, "
            f"heads read {layer}",
            zorder=3,
        )
    axes.set_xticks(retention)
    axes.set_ylim(bottom=-0.02 * axes.get_ylim()[1])
    axes.grid(alpha=0.3)
    axes.set_xlabel("retention of honest images")
    axes.set_ylabel("attack success: share of all crafted images")
    axes.set_title(f"What the search measured: {len(history)} candidates")
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    return figure
