"""How often a crafted image succeeds when the attacker may try again.

    python benchmarks/resubmission.py

Each try after the first changes one value of one pixel by one grey level, which draws other
differentiators. Drawn signs, mimicry at the cut, DSSIM at most 0.01, 600 steps; about 6 minutes.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

import keras_tl_defense as ktd
from keras_tl_defense._keras import keras
from keras_tl_defense.demo import train_synthetic_teacher

CUT, ATTACKS, TRIES, SEED = "flatten", 200, (1, 5, 20), 0


def nudge(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Change one value of each image by one grey level."""
    nudged = images.copy()
    where = (np.arange(len(images)), *(rng.integers(0, n, len(images)) for n in images.shape[1:]))
    nudged[where] += np.where(nudged[where] < 255, 1, -1).astype(np.uint8)
    return nudged


def main() -> None:
    """Print a table of successes by number of tries."""
    keras.utils.set_random_seed(SEED)
    teacher = train_synthetic_teacher(SEED)
    signs = ktd.datasets.synthetic.load_signs(train_per_class=100, test_per_class=40, seed=SEED)
    x, y = signs.x_test, signs.y_test
    train, validation = signs.hold_out()
    student = ktd.teachers.make_student(
        teacher, CUT, train.x_train, train.y_train, signs.classes, verbose=0
    )
    defence = ktd.DifferentiatorEnsemble(student, seed=SEED)
    defence.adapt(train.x_train, train.y_train, verbose=0)
    defence.fit(train.x_train, train.y_train, verbose=0)
    defence.calibrate(validation.x_train, validation.y_train, verbose=0)
    answered = student.predict(x.astype(np.float32), verbose=0).argmax(axis=1)
    plan = ktd.attacks.plan_attacks(y, answered, ATTACKS, seed=SEED)
    attack = ktd.attacks.MimicryAttack(teacher, CUT, budget=0.01, steps=600)
    source = x[plan.sources], y[plan.sources]
    results = {
        "targeted": attack(source[0], x[plan.targets], source[1], y[plan.targets]),
        "non-targeted": attack.untargeted(source[0], x[plan.candidates], source[1]),
    }
    rng = np.random.default_rng(SEED)
    rows = []
    for name, result in results.items():
        images, succeeded = result.adversarial, np.zeros(len(result.adversarial), bool)
        details = defence.explain(images, verbose=0)
        undefended = ktd.Rate.of(result.reached(details["student_class"]))
        rows.append((name, "undefended", str(undefended)))
        for tried in range(1, max(TRIES) + 1):
            succeeded |= result.reached(details["student_class"]) & details["accepted"]
            if tried in TRIES:
                rows.append((name, f"defended, {tried} tries", str(ktd.Rate.of(succeeded))))
            details = defence.explain(nudge(images, rng), verbose=0)
    print(pd.DataFrame(rows, columns=["attack", "model", "success"]).to_string(index=False))


if __name__ == "__main__":
    main()
