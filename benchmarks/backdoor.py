"""How often a trojaned Teacher's trigger misleads Students, under several defences.

    python benchmarks/backdoor.py OUTPUT [--cases scans heartbeats] [--variants ranked …]
        [--per-class 100] [--seeds 3]

Teachers are trained on some classes of drawn data, trojaned without any data but for the variant of
random neurons, which are chosen of those that a Student's inputs excite, and Students made
from them for the other classes. Success is the share of test inputs, of those that the defended
Student answers rightly, that are answered otherwise once they carry the trigger; under this
library's defence, that are accepted and answered otherwise, of those that the Student answers
rightly. A trigger that moves every input to one class reaches (K-1)/K. "random trigger" has values
at random under the same mask. Prints Markdown tables and writes `backdoor.csv` and `neurons.csv` to
`OUTPUT`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import keras_tl_defense as ktd
from keras_tl_defense._keras import keras
from keras_tl_defense.attacks import Backdoor, BackdoorAttack, train_autoencoder
from keras_tl_defense.attacks.neurons import Neurons
from keras_tl_defense.datasets import scans, signals
from keras_tl_defense.pruning.masks import class_set_scores, filter_masks

LAYER, CUT = "conv3_2", "flatten"
RATIOS = (0.5, 0.7, 0.9)
FINE_PRUNING, LAST_LAYER, DEFENCE = 0.5, 0.8, 0.7
EPOCHS = 10  # of retraining, and of fine-pruning

_STRONG = {"strength": 30, "neurons": 12, "size": 0.2, "retraining_steps": 1000}
VARIANTS: dict[str, dict[str, Any]] = {
    "ranked": {},
    "through autoencoder": {"through_autoencoder": True},
    "random neurons": {"neurons": "random"},
    "12 neurons": {"neurons": 12},
    "strength 3": {"strength": 3},
    "strength 30": {"strength": 30},
    "larger trigger": {"size": 0.2},
    "longer retraining": {"retraining_steps": 2000},
    "pruned": {"pruned": 0.9},
    "all": {**_STRONG, "through_autoencoder": True, "pruned": 0.9},
}


@dataclass(frozen=True)
class Case:
    """A Teacher, and the data of the classes that its Students tell apart.

    Attributes:
        name: One of `CASES`.
        teacher: The clean Teacher.
        value_range: Of inputs.
        train, validation, test: Inputs with their labels.
    """

    name: str
    teacher: Any
    value_range: tuple[float, float]
    train: tuple[np.ndarray, np.ndarray]
    validation: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]

    def student(self, teacher: Any) -> Any:
        """A Student with its own last layer."""
        keras.utils.set_random_seed(1)
        classes = int(self.train[1].max()) + 1
        return ktd.teachers.make_student(teacher, CUT, *self.train, classes, verbose=0)


def load_case(name: str, per_class: int) -> Case:
    """Draw the data and train the Teacher."""
    keras.utils.set_random_seed(0)
    names: tuple[str, ...]
    load: Callable[..., Any]
    build: Callable[..., Any]
    if name == "scans":
        load, names, own = scans.load_scans, scans.SCANS, 10
        build = ktd.teachers.build_teacher
        value_range, epochs = (0.0, 255.0), 15
    else:
        sounds = name == "sounds"
        load = signals.load_sounds if sounds else signals.load_heartbeats
        names, own = (signals.SOUNDS if sounds else signals.HEARTBEATS), 6
        build, value_range, epochs = ktd.teachers.build_signal_teacher, (-1.0, 1.0), 12
    public = load(2 * per_class, 1, classes=names[:own])
    private = load(per_class, per_class, classes=names[own:])
    held_out = load(per_class // 2, 1, seed=1, classes=names[own:])
    teacher = build(public.x_train.shape[1:], own)
    _compile(teacher)
    teacher.fit(public.x_train.astype(np.float32), public.y_train, epochs=epochs, verbose=0)
    return Case(
        name,
        teacher,
        value_range,
        (private.x_train, private.y_train),
        (held_out.x_train, held_out.y_train),
        (private.x_test, private.y_test),
    )


def attack(case: Case, options: dict[str, Any]) -> Backdoor:
    """Trojan the case's Teacher, without data."""
    options = {"size": 0.1, "retraining_steps": 500, "per_class": 20, **options}
    if options.get("neurons") == "random":
        live = Neurons(case.teacher, LAYER).excitation_of(case.train[0][::7]).max(axis=0) > 0
        rng = np.random.default_rng(options["seed"])
        options["neurons"] = rng.choice(np.flatnonzero(live), 4, replace=False).tolist()
    trojan = BackdoorAttack(case.teacher, LAYER, value_range=case.value_range, **options)
    return trojan(verbose=0)


def defend(case: Case, student: Any) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Other defences: what each makes of inputs, as classes of the Student."""

    def classes_of(model: Any) -> Callable[[np.ndarray], np.ndarray]:
        return lambda x: np.asarray(model.predict(x.astype("f"), verbose=0).argmax(axis=1))

    retrained = _unfrozen(student)
    x, y = case.train[0].astype(np.float32), case.train[1]
    retrained.fit(x, y, epochs=EPOCHS, verbose=0)
    filters = ktd.ClassActivations(student).filters
    autoencoder = train_autoencoder(
        case.train[0], value_range=case.value_range, width=24, seed=7, verbose=0
    )
    plain = classes_of(student)
    return {
        "none": plain,
        f"fine-pruning, all layers, {FINE_PRUNING}": classes_of(
            _fine_pruned(student, x, y, filters, FINE_PRUNING)
        ),
        f"fine-pruning, {LAYER}, {LAST_LAYER}": classes_of(
            _fine_pruned(student, x, y, [LAYER], LAST_LAYER)
        ),
        "retraining": classes_of(retrained),
        "autoencoder": lambda x: plain(autoencoder.predict(x.astype("f"), verbose=0)),
    }


def ensemble_answers(case: Case, student: Any) -> Callable[[np.ndarray], np.ndarray]:
    """This library's defence: answers, 0 for rejected."""
    low, high = case.value_range
    grey = case.value_range == (0, 255)

    def scaled(x: np.ndarray) -> np.ndarray:
        return x if grey else (x - low) / (high - low) * 255

    preprocessing = None if grey else keras.layers.Rescaling((high - low) / 255, offset=low)
    defence = ktd.DifferentiatorEnsemble(
        student, DEFENCE, seed=0, key=bytes(16), preprocessing=preprocessing
    )
    x, y = scaled(case.train[0]), case.train[1]
    defence.adapt(x, y, verbose=0)
    defence.compile()
    defence.fit(x, y, verbose=0)
    defence.calibrate(scaled(case.validation[0]), case.validation[1], verbose=0)
    return lambda x: np.asarray(defence.predict(scaled(x), verbose=0))


def measure(case: Case, backdoor: Backdoor) -> list[dict[str, Any]]:
    """A row for each defence of a Student of the trojaned Teacher."""
    x, y = case.test
    stamped = backdoor.stamp(x)
    low, high = backdoor.value_range
    rng = np.random.default_rng(0)
    chance = replace(backdoor, trigger=rng.uniform(low, high, x.shape[1:]).astype("f")).stamp(x)
    clean, trojaned = case.student(case.teacher), case.student(backdoor.teacher)
    rows: list[dict[str, Any]] = []

    def add(defence: str, before: np.ndarray, after: np.ndarray, **more: int) -> None:
        right = before == y
        often = np.bincount(after, minlength=1).max()
        counts = {"right": right.sum(), "misled": (after != y)[right].sum(), "often": often}
        rows.append({"defence": defence, "inputs": len(y), **counts, **more})

    def of(model: Any, inputs: np.ndarray) -> np.ndarray:
        return np.asarray(model.predict(inputs.astype("f"), verbose=0).argmax(axis=1))

    add("none, clean Teacher", of(clean, x), of(clean, stamped))
    add("none, random trigger", of(trojaned, x), of(trojaned, chance))
    for name, classes in defend(case, trojaned).items():
        add(name, classes(x), classes(stamped))
    answers, before = ensemble_answers(case, trojaned), of(trojaned, x)
    right, honest, crafted = before == y, answers(x), answers(stamped)
    rows.append(
        {
            "defence": f"DifferentiatorEnsemble({DEFENCE})",
            "inputs": len(y),
            "right": right.sum(),
            "misled": ((crafted > 0) & (crafted - 1 != y))[right].sum(),
            "often": np.bincount(crafted, minlength=2)[1:].max(),
            "answered rightly": (honest - 1 == y).sum(),
            "retained": (honest > 0)[right].sum(),
            "accepted": (crafted > 0)[right].sum(),
        }
    )
    return rows


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Rates over all seeds, and the success of each seed."""
    table = []
    for (case, variant, defence), part in rows.groupby(["case", "variant", "defence"], sort=False):
        total = part.sum(numeric_only=True)
        accepting = part["retained"].notna().all()

        def rate(column: str, of: str = "right", total: Any = total) -> str:
            return str(ktd.Rate.of_counts(int(total[column]), int(total[of])))

        table.append(
            {
                "case": case,
                "variant": variant,
                "defence": defence,
                "clean accuracy": total["answered rightly" if accepting else "right"]
                / total["inputs"],
                "success": rate("misled"),
                "of each seed": " ".join(f"{r:.2f}" for r in part["misled"] / part["right"]),
                "most frequent class": total["often"] / total["inputs"],
                "retention": rate("retained") if accepting else "",
                "attack acceptance": rate("accepted") if accepting else "",
            }
        )
    return pd.DataFrame(table)


def survival(case: Case, backdoor: Backdoor) -> dict[str, Any]:
    """Which share of the chosen neurons differentiators of all pairs keep, at some ratios."""
    student = case.student(backdoor.teacher)
    activations = ktd.ClassActivations(student, [LAYER])
    activations.adapt(*case.train, verbose=0)
    pairs = np.array(list(combinations(range(activations.classes), 2)))
    scores = class_set_scores(activations[LAYER], pairs)
    kept = {
        f"kept at {ratio}": filter_masks(scores, ratio)[:, list(backdoor.neurons)].mean()
        for ratio in RATIOS
    }
    excited = {"excitation": float(backdoor.excitation.mean()), "seconds": backdoor.seconds}
    return {**kept, **excited}


def markdown(table: pd.DataFrame) -> str:
    """The table as Markdown."""

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return "" if np.isnan(value) else f"{value:.3f}"
        return str(value)

    rows = [list(table.columns), ["---"] * len(table.columns), *table.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(map(cell, row)) + " |" for row in rows)


def _fine_pruned(
    student: Any, x: np.ndarray, y: np.ndarray, layers: list[str], ratio: float
) -> Any:
    """A copy whose least active filters were pruned in rounds while all its layers trained."""
    copy = _unfrozen(student)
    activations = ktd.ClassActivations(copy, layers)
    activations.adapt(x, y, verbose=0)
    steps = -(-len(x) // 32)
    schedule = ktd.ActivationPruningSchedule(ratio, iterations=3, steps_per_iteration=steps)
    pruning = ktd.ActivationPruning(activations, range(activations.classes), schedule)
    copy.fit(x, y, epochs=EPOCHS, callbacks=[pruning], verbose=0)
    return copy


def _unfrozen(student: Any) -> Any:
    copy = keras.models.clone_model(student)
    copy.set_weights(student.get_weights())
    copy.trainable = True
    _compile(copy)
    return copy


def _compile(model: Any) -> None:
    model.compile(
        optimizer=keras.optimizers.Adam(1e-3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )


def main() -> None:
    """Measure every case and variant, and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=["scans", "heartbeats", "sounds"],
        default=["scans", "heartbeats"],
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--per-class", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=1, help="attacks, and Students, of each kind")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows, neurons = [], []
    for name in arguments.cases:
        case = load_case(name, arguments.per_class)
        for variant in arguments.variants:
            for seed in range(arguments.seeds):
                backdoor = attack(case, {**VARIANTS[variant], "seed": seed})
                of = {"case": name, "variant": variant, "seed": seed}
                rows += [{**of, **row} for row in measure(case, backdoor)]
                neurons.append({**of, **survival(case, backdoor)})
                pd.DataFrame(rows).to_csv(arguments.output / "backdoor.csv", index=False)
                pd.DataFrame(neurons).to_csv(arguments.output / "neurons.csv", index=False)
                print(f"{name}, {variant}, {seed}: {backdoor}", flush=True)
    means = pd.DataFrame(neurons).groupby(["case", "variant"], sort=False).mean().reset_index()
    print(markdown(summary(pd.DataFrame(rows))), "\n")
    print(markdown(means.drop(columns="seed")))


if __name__ == "__main__":
    main()
