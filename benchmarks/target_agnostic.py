"""How often inputs made without any image of a Student's classes are taken for one of them.

    python benchmarks/target_agnostic.py DATA CACHE [--students sounds lfw-fc2]

An input for each unit of the cut, at most 200 units chosen at random, from a blank or random start,
or as a small change of a test input: 8 grey levels, or 0.05 where sounds are in -1..1. It succeeds
when it is answered at all, by the defence as some class; changed inputs, as another class than
before. Columns count successes whatever the confidence, and of which the Student is 95 and 99 %
sure; "classes" are those that are reached with 95 %, and "attempts" how many inputs that took,
empty where some classes were not. "sounds": 13 kinds drawn by code, six of the Teacher and seven of
the Student; the Teacher is a network of one-dimensional convolutions. Others as in `students.py`.
Writes `target_agnostic.csv` and `target_agnostic.md` to `CACHE`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import tensorflow as tf
from attacks import load_defence
from backdoor import load_case as load_drawn
from students import CASES, load_case, percent

import keras_tl_defense as ktd
from keras_tl_defense._keras import keras
from keras_tl_defense.attacks import TargetAgnosticAttack, effectiveness

UNITS = 200
ANY = 1e-9  # a confidence that the likeliest class always has
RATIO = 0.7  # of the defence of sounds


class Setting(NamedTuple):
    """A Student, its defence, and what an attacker has."""

    teacher: Any
    cut: str
    student: Any
    defence: Any
    preprocessing: Any
    value_range: tuple[float, float]
    budget: float
    x: np.ndarray
    y: np.ndarray

    def for_defence(self, x: np.ndarray) -> np.ndarray:
        """Inputs as the defence takes them, in 0..255."""
        low, high = self.value_range
        return x if self.value_range == (0, 255) else (x - low) / (high - low) * 255

    def probabilities(self, x: np.ndarray) -> np.ndarray:
        """Of the Student, of inputs in its own range."""
        x = x.astype(np.float32)
        if self.preprocessing is not None:
            x = np.asarray(self.preprocessing(x))
        return np.asarray(tf.nn.softmax(self.student.predict(x, verbose=0)))


def of_sounds() -> Setting:
    """A Student of drawn sounds on the Teacher's last Dense layer but one."""
    case = load_drawn("sounds", 200)
    keras.utils.set_random_seed(1)
    classes = int(case.train[1].max()) + 1
    student = ktd.teachers.make_student(case.teacher, "fc1", *case.train, classes, verbose=0)
    defence = ktd.DifferentiatorEnsemble(
        student, RATIO, seed=0, preprocessing=keras.layers.Rescaling(2 / 255, offset=-1)
    )
    train, validation = ((x + 1) / 2 * 255 for x in (case.train[0], case.validation[0]))
    defence.adapt(train, case.train[1], verbose=0)
    defence.fit(train, case.train[1], verbose=0)
    defence.calibrate(validation, case.validation[1], verbose=0)
    return Setting(case.teacher, "fc1", student, defence, None, (-1, 1), 0.05, *case.test)


def of_images(name: str, data: Path, cache: Path) -> Setting:
    """A Student of real images."""
    case = load_case(name, data, cache)
    given = (case.teacher, case.cut, case.student, load_defence(case, cache))
    return Setting(*given, case.preprocessing, (0, 255), 8, case.x_test, case.y_test)


def measure(setting: Setting) -> Iterator[pd.DataFrame]:
    """A table for each way to begin and defence, with a row for each confidence."""
    size = int(np.prod(setting.teacher.get_layer(setting.cut).output.shape[1:]))
    rng = np.random.default_rng(0)
    units = rng.permutation(size)[:UNITS]
    right = np.flatnonzero(setting.probabilities(setting.x).argmax(axis=1) == setting.y)
    chosen = rng.choice(right, len(units), replace=len(units) > len(right))
    for start in ("blank", "random", "changed"):
        changed = start == "changed"
        attack = TargetAgnosticAttack(
            setting.teacher,
            setting.cut,
            start="blank" if changed else start,  # type: ignore[arg-type]
            budget=setting.budget if changed else None,
            value_range=setting.value_range,
            preprocessing=setting.preprocessing,
        )
        crafted = attack(
            units.tolist(), setting.x[chosen] if changed else None, verbose=0
        ).adversarial
        probabilities = setting.probabilities(crafted)
        details = setting.defence.explain(setting.for_defence(crafted), verbose=0)
        other = probabilities.argmax(axis=1) != setting.y[chosen] if changed else True
        votes = details["disagreements"] < setting.defence.reject_threshold
        for defence, accepted in (
            ("none", np.ones(len(units), bool)),
            ("votes", votes),
            ("calibrated", details["accepted"]),
        ):
            table = effectiveness(probabilities, accepted & other, (ANY, 0.95, 0.99))
            table.insert(0, "start", start)
            table.insert(1, "defence", defence)
            table.insert(2, "K", probabilities.shape[1])
            yield table


def markdown(table: pd.DataFrame) -> str:
    """The table for readers."""
    lines = [
        "| Student | start | defence | any | 95 % sure | 99 % sure | classes | attempts |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key, part in table.groupby(["student", "start", "defence"], sort=False):
        rates = [percent(np.arange(row["n"]) < row["count"]) for row in part.to_dict("records")]
        sure = part.iloc[1]
        attempts = "" if np.isnan(sure["attempts"]) else f"{sure['attempts']:.0f}"
        classes = f"{sure['classes']} of {sure['K']}"
        lines.append("| " + " | ".join([*map(str, key), *rates, classes, attempts]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure every Student, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", type=Path, help="folder with the data sets and the Teachers")
    parser.add_argument("cache", type=Path, help="folder for Students, defences and results")
    parser.add_argument(
        "--students", nargs="+", choices=["sounds", *CASES], default=["sounds", "lfw-fc2"]
    )
    arguments = parser.parse_args()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in arguments.students:
        sounds = name == "sounds"
        setting = of_sounds() if sounds else of_images(name, arguments.data, arguments.cache)
        answers = setting.defence.predict(setting.for_defence(setting.x), verbose=0)
        right = setting.probabilities(setting.x).argmax(axis=1) == setting.y
        print(
            f"{name}: Student right {ktd.Rate.of(right)}, "
            f"of these kept {ktd.Rate.of(answers[right] > 0)}",
            flush=True,
        )
        rows += [table.assign(student=name) for table in measure(setting)]
    table = pd.concat(rows)
    table.to_csv(arguments.cache / "target_agnostic.csv", index=False)
    (arguments.cache / "target_agnostic.md").write_text(markdown(table), encoding="utf-8")
    print(markdown(table))


if __name__ == "__main__":
    main()
