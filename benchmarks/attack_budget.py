"""Success of the mimicry attack by its budget, on undefended Students of real images.

    python benchmarks/attack_budget.py DIR

`DIR` holds gtsrb32.npz, lfw64.npz and the Teachers vgg32_tiny_imagenet.h5 and vgg32_faces.h5. Forty
targeted attacks on each Student, 600 steps; about 8 minutes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd

import keras_tl_defense as ktd
from keras_tl_defense._keras import keras
from keras_tl_defense.datasets import faces, gtsrb

STUDENTS = (
    ("gtsrb", gtsrb, "vgg32_tiny_imagenet.h5", "flatten"),
    ("lfw", faces, "vgg32_faces.h5", "flatten"),
    ("lfw", faces, "vgg32_faces.h5", "fc2"),
)
BUDGETS = (0.002, 0.01, 0.03, 1.0)


def main(folder: Path) -> None:
    """Print a table of successes by budget."""
    rows = []
    for name, loader, file, cut in STUDENTS:
        keras.utils.set_random_seed(0)
        teacher = ktd.teachers.load_teacher(folder / file)
        data = loader.load(folder, size=32)
        student = ktd.teachers.make_student(
            teacher, cut, data.x_train, data.y_train, data.classes, verbose=0
        )
        x, y = data.x_test, data.y_test
        answered = student.predict(x.astype(np.float32), verbose=0).argmax(axis=1)
        plan = ktd.attacks.plan_attacks(y, answered, 40, seed=1)
        for budget in BUDGETS:
            attack = ktd.attacks.MimicryAttack(teacher, cut, budget=budget, steps=600)
            result = attack(
                x[plan.sources], x[plan.targets], y[plan.sources], y[plan.targets], verbose=0
            )
            crafted = result.adversarial.astype(np.float32)
            classes = student.predict(crafted, verbose=0).argmax(axis=1)
            misled = result.within_budget & (classes != result.y_source)
            rates = ktd.Rate.of(result.reached(classes)), ktd.Rate.of(misled)
            rows.append((name, cut, budget, *map(str, rates)))
            print(*rows[-1], flush=True)
    columns = ["data", "cut", "budget", "answered as the target", "misled"]
    print(pd.DataFrame(rows, columns=columns).to_string(index=False))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
