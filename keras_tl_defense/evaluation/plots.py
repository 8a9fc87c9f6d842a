"""Pictures of attacks and of what a defence made of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from keras_tl_defense.attacks import AttackResult

_AMPLIFY = 10


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
        A figure. The difference is shown ten times as strong as it is, around grey.

    Example:
        >>> details = defence.explain(result.adversarial)
        >>> verdicts = details["student_class"], details["answer"]
        >>> figure = plot_attacks(result, *verdicts, [0, 1], [f"class {c}" for c in range(16)])
        >>> figure.savefig("attacks.png")
    """
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
            axes.imshow(np.clip(picture, 0, 255).astype(np.uint8), interpolation="nearest")
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
            color="tab:red" if answer[number] else "tab:green",
        )
        for axes in row[:4]:
            axes.set_xticks([])
            axes.set_yticks([])
        row[4].axis("off")
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=10)
    return figure
