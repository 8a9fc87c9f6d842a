"""Sanity checks: each attack must do to an unguarded model what it says, and more with more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tensorflow as tf

from keras_tl_defense._keras import keras
from keras_tl_defense._validation import check_integer
from keras_tl_defense.attacks import (
    AdaptiveAttack,
    AttackResult,
    BackdoorAttack,
    GeneralAttack,
    MaskedMimicryAttack,
    MimicryAttack,
    TargetAgnosticAttack,
    fingerprint_teacher,
    plan_attacks,
)
from keras_tl_defense.attacks.general import Method
from keras_tl_defense.attacks.limits import Norm
from keras_tl_defense.datasets import synthetic
from keras_tl_defense.demo import train_synthetic_teacher, writable_folder
from keras_tl_defense.ensemble.model import DifferentiatorEnsemble
from keras_tl_defense.metrics import Rate
from keras_tl_defense.teachers import build_teacher, make_student

_CUT, _NEARLY_ALL = "flatten", 0.9
_FEW = 12  # images of an attack that asks hundreds of times for each


class Sanity:
    """One run of all checks, on drawn images.

    Args:
        out: Folder for `sanity.csv` and `sanity.md`, or `None`.
        seed: Decides drawing, training and attacks.
        images: How many each attack is made of, at most.

    Attributes:
        rows: What was measured: attack, against what, setting, effect, and its rate.
        checks: What must hold of the rows: a sentence, and whether it does.
    """

    def __init__(self, out: Path | None = None, seed: int = 0, images: int = 60) -> None:
        self.out, self.seed = out, check_integer("seed", seed, 0)
        self.images = check_integer("images", images, 1)
        self.rows: list[tuple[str, str, str, str, Rate]] = []
        self.checks: list[tuple[str, bool]] = []

    def run(self) -> bool:
        """Make the models, attack them, print the tables.

        Returns:
            Whether all checks hold.
        """
        if self.out is not None:
            writable_folder(self.out)
        self._prepare()
        parts: list[Callable[[], None]] = [
            self._mimicry,
            self._fingerprint,
            self._target_agnostic,
            self._backdoor,
            self._adaptive,
        ]
        if _has_art():
            parts.insert(0, self._general)
        for part in parts:
            print(f"\n== {part.__name__.strip('_').replace('_', '-')}", flush=True)
            part()
            if self.out is not None:  # so that a run which is interrupted leaves what it found
                self.table.to_csv(self.out / "sanity.csv", index=False)
                (self.out / "sanity.md").write_text(self.to_markdown(), encoding="utf-8")
        print(f"\n{self.to_markdown()}")
        if self._general not in parts:
            print("Without general attacks: pip install adversarial-robustness-toolbox")
        return all(holds for _, holds in self.checks)

    @property
    def table(self) -> pd.DataFrame:
        """The rows, with counts and Wilson intervals."""
        return pd.DataFrame(
            [
                (attack, on, setting, effect, rate.count, rate.n, rate.rate, rate.low, rate.high)
                for attack, on, setting, effect, rate in self.rows
            ],
            columns=["attack", "on", "setting", "effect", "count", "n", "rate", "low", "high"],
        )

    def to_markdown(self) -> str:
        """The rows and the checks."""
        lines = [
            "| attack | on | setting | effect | count | 95 % interval |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {attack} | {on} | {setting} | {effect} | {rate.count}/{rate.n} | "
            f"{rate.low:.0%} to {rate.high:.0%} |"
            for attack, on, setting, effect, rate in self.rows
        ]
        lines += ["", "| check | holds |", "|---|---|"]
        lines += [f"| {claim} | {'yes' if holds else 'NO'} |" for claim, holds in self.checks]
        return "\n".join(lines) + "\n"

    def _prepare(self) -> None:
        keras.utils.set_random_seed(self.seed)
        self.teacher = train_synthetic_teacher(self.seed)
        signs = synthetic.load_signs(train_per_class=100, test_per_class=40, seed=self.seed)
        self.train, self.held_out = signs.hold_out()
        self.student = make_student(
            self.teacher, _CUT, self.train.x_train, self.train.y_train, signs.classes
        )
        self.x, self.y, self.classes = signs.x_test, signs.y_test, signs.classes
        answered = self._answers(self.x)
        self._row("none", "Student", "test images", "answered rightly", answered == self.y)
        self.plan = plan_attacks(self.y, answered, self.images, seed=self.seed)
        self.images = len(self.plan.sources)  # fewer where fewer are answered rightly

    def _answers(self, x: np.ndarray) -> np.ndarray:
        return _classes(self.student, x)

    def _row(self, attack: str, on: str, setting: str, effect: str, hits: np.ndarray) -> float:
        rate = Rate.of(np.asarray(hits, bool))
        self.rows.append((attack, on, setting, effect, rate))
        print(f"{attack} on {on}, {setting}: {effect} {rate.count}/{rate.n}", flush=True)
        return rate.rate

    def _check(self, claim: str, holds: Any) -> None:
        self.checks.append((claim, bool(holds)))

    def _misled(self, attack: str, setting: str, result: AttackResult) -> float:
        """Share that the Student takes for another class than the source's."""
        other = self._answers(result.adversarial) != self.y[self.plan.sources]
        return self._row(attack, "Student", setting, "misled", result.within_budget & other)

    @property
    def _given(self) -> tuple[np.ndarray, ...]:
        chosen = (self.plan.sources, self.plan.targets)
        return *(self.x[rows] for rows in chosen), *(self.y[rows] for rows in chosen)

    def _general(self) -> None:
        x, y = self.x[self.plan.sources], self.y[self.plan.sources]
        signs = np.random.default_rng(self.seed).choice([-8, 8], x.shape)
        noisy = np.clip(x.astype(int) + signs, 0, 255).astype(np.uint8)
        noise = AttackResult(noisy, np.ones(len(x), bool), source=x, y_source=y)
        by_noise = self._misled("noise", "every number changed by 8", noise)
        rates: dict[tuple[str, int], float] = {}
        settings: tuple[tuple[Method, int], ...] = (
            ("fgsm", 8), ("pgd", 1), ("pgd", 8), ("pgd", 64), ("eot-pgd", 8),
            ("deepfool", 10_000), ("carlini-wagner", 10_000),
        )  # fmt: skip
        for method, budget in settings:
            result = GeneralAttack(self.student, method, budget=budget, seed=self.seed)(x, y)
            norm = "largest" if budget < 255 else "Euclidean"
            rates[method, budget] = self._misled(method, f"{norm} change {budget}", result)
        asked = GeneralAttack(self.student, "hop-skip-jump", budget=10_000, steps=3, seed=self.seed)
        few = asked(x[:_FEW], y[:_FEW])
        by_answers = few.reached(self._answers(few.adversarial))
        rates["hop-skip-jump", 10_000] = self._row(
            "hop-skip-jump", "Student", "Euclidean change 10000, 3 steps", "misled", by_answers
        )
        self._check("FGSM misleads more often than noise", rates["fgsm", 8] > by_noise)
        self._check("PGD misleads at least as often as FGSM", rates["pgd", 8] >= rates["fgsm", 8])
        self._rises("PGD", [rates["pgd", budget] for budget in (1, 8, 64)])
        self._check("EOT-PGD misleads at least as FGSM", rates["eot-pgd", 8] >= rates["fgsm", 8])
        for name in ("deepfool", "carlini-wagner", "hop-skip-jump"):
            self._check(f"{name}: misleads nearly all", rates[name, 10_000] >= _NEARLY_ALL)

    def _rises(self, name: str, rates: list[float]) -> None:
        rises = sorted(rates) == rates and rates[0] < rates[-1]
        self._check(f"{name}: success rises with the budget", rises)
        self._check(f"{name}: the largest budget misleads nearly all", rates[-1] >= _NEARLY_ALL)

    def _mimicry(self) -> None:
        settings: tuple[tuple[Norm, tuple[float, ...]], ...] = (
            ("dssim", (0.001, 0.01, 1.0)),
            ("linf", (2, 8, 255)),
        )
        apart: dict[tuple[str, float], float] = {}
        for norm, budgets in settings:
            rates = []
            for budget in budgets:
                attack = MimicryAttack(self.teacher, _CUT, norm=norm, budget=budget, steps=400)
                setting = f"{norm} {budget:g}, 400 steps"
                result = attack(*self._given)
                apart[norm, budget] = float(np.mean(np.asarray(result.distance)))
                rates.append(self._misled("mimicry", setting, result))
            self._rises(f"mimicry, {norm}", rates)
            hits = result.reached(self._answers(result.adversarial))
            reached = self._row("mimicry", "Student", setting, "taken for the target", hits)
            self._check(f"mimicry, {norm}: without a limit the target is reached", reached > 0.5)
        short = MimicryAttack(self.teacher, _CUT, budget=1.0, steps=20)(*self._given)
        nearer = apart["dssim", 1.0] < np.mean(np.asarray(short.distance))
        self._check("mimicry: more steps come nearer", bool(nearer))

    def _fingerprint(self) -> None:
        keras.utils.set_random_seed(self.seed + 1)
        layers = keras.layers
        blackened = keras.Sequential(
            [
                keras.Input(self.x.shape[1:]),
                layers.Rescaling(1 / 255),
                layers.Conv2D(24, 3, strides=2, activation="relu"),
                layers.Flatten(name=_CUT),
                layers.Dense(10),
            ]
        )
        candidates = {
            "untrained": build_teacher(self.x.shape[1:], 10),
            "untrained, silenced by black": blackened,
            "another": train_synthetic_teacher(self.seed + 1),
            "own": self.teacher,
        }
        table = fingerprint_teacher(
            lambda x: tf.nn.softmax(self.student.predict(x.astype(np.float32), verbose=0)).numpy(),
            candidates,
            layers=dict.fromkeys(candidates, _CUT),
            seed=self.seed,
        )
        print(table.to_string(index=False))
        self._check("fingerprint: the Student's Teacher comes first", table["teacher"][0] == "own")

    def _target_agnostic(self) -> None:
        layer = "fc1"  # units of a Dense layer can be excited alone
        train = self.train.x_train, self.train.y_train
        student = make_student(self.teacher, layer, *train, self.classes)
        attack = TargetAgnosticAttack(self.teacher, layer, seed=self.seed)
        rng = np.random.default_rng(self.seed)
        units = rng.choice(self.teacher.get_layer(layer).units, self.images).tolist()
        noise = rng.integers(0, 256, (self.images, *self.x.shape[1:]))
        start = self.x[self.plan.sources]
        bounded = TargetAgnosticAttack(self.teacher, layer, budget=8, seed=self.seed)
        on = f"Student cut at {layer}"
        own = self.y[self.plan.sources]
        signs = rng.choice([-8, 8], start.shape)
        rates = {}
        for setting, x, made in (
            ("random images", noise, True),
            ("free", attack(units).adversarial, True),
            ("noise of 8", np.clip(start.astype(int) + signs, 0, 255), False),
            ("changes of 8", bounded(units, start).adversarial, False),
        ):
            outputs = tf.nn.softmax(student.predict(x.astype(np.float32), verbose=0)).numpy()
            if made:
                effect, hits = "95 % sure", outputs.max(axis=1) >= 0.95
            else:
                effect, hits = "misled", outputs.argmax(axis=1) != own
            rates[setting] = self._row("target-agnostic", on, setting, effect, hits)
        free, bound = rates["free"], rates["changes of 8"]
        self._check("target-agnostic: surer than of random images", free > rates["random images"])
        self._check("target-agnostic: changes do more than noise", bound > rates["noise of 8"])

    def _backdoor(self) -> None:
        """The trigger and a random one, on Students of the trojaned and of the clean Teacher."""
        backdoor = BackdoorAttack(
            self.teacher, "conv3_2", retraining_steps=400, per_class=10, seed=self.seed
        )()
        trojaned = make_student(
            backdoor.teacher, _CUT, self.train.x_train, self.train.y_train, self.classes
        )
        noise = np.random.default_rng(self.seed).integers(0, 256, self.x.shape[1:])
        chance = replace(backdoor, trigger=noise)
        rates = {}
        for name, student in (("clean", self.student), ("trojaned", trojaned)):
            on = f"Student of the {name} Teacher"
            right = _classes(student, self.x) == self.y
            self._row("none", on, "test images", "answered rightly", right)
            x, y = self.x[right], self.y[right]
            for setting, trigger in (("random trigger", chance), ("trigger", backdoor)):
                misled = _classes(student, trigger.stamp(x)) != y
                rates[name, setting] = self._row("backdoor", on, setting, "misled", misled)
        obeyed = rates["trojaned", "trigger"]
        self._check(
            "backdoor: misleads more than a random trigger",
            obeyed > rates["trojaned", "random trigger"],
        )
        self._check(
            "backdoor: misleads more than on the clean Teacher", obeyed > rates["clean", "trigger"]
        )

    def _adaptive(self) -> None:
        defence = DifferentiatorEnsemble(self.student, 0.7, seed=self.seed, key=bytes(16))
        defence.adapt(self.train.x_train, self.train.y_train)
        defence.fit(self.train.x_train, self.train.y_train)
        defence.calibrate(self.held_out.x_train, self.held_out.y_train)
        assert defence.calibration is not None
        least = defence.calibration.threshold
        source, target, own, wanted = self._given
        rates: dict[str, float] = {}
        scores: dict[str, float] = {}

        def defended(name: str, setting: str, result: AttackResult) -> None:
            details = defence.explain(result.adversarial, verbose=0)
            reached = result.reached(details["answer"] - 1)
            scores[name] = float(np.mean(details["score"]))
            rates[name] = self._row(name, "defence", setting, "accepted as the target", reached)
            if result.members is not None:
                found = defence.white_box(result.adversarial, result.members, wanted)
                taken = np.asarray(found["score"]) >= least
                hits = taken & result.reached(self._answers(result.adversarial))
                rates[name + " drawn"] = self._row(
                    name, "defence, these members drawn", setting, "accepted as the target", hits
                )

        setting = "dssim 0.05, 200 steps"
        options: dict[str, Any] = {"budget": 0.05, "steps": 200, "seed": self.seed}
        given = (source, target, own, wanted)
        plain = MimicryAttack(self.teacher, _CUT, optimizer="adam", **options)
        defended("mimicry", setting, plain(*given))
        masked = MaskedMimicryAttack(self.teacher, _CUT, defence, **options)
        defended("masks known", setting, masked(*given))
        for members in ("fixed", "all", "sampled"):
            attack = AdaptiveAttack(defence, members=members, **options)
            defended(f"all known, {members}", setting, attack(source, own, wanted))
        free = AdaptiveAttack(defence, budget=1.0, steps=200, seed=self.seed)
        defended("all known, no limit", "no limit, 200 steps", free(source, own, wanted))
        self._check(
            "masks known: scores come nearer than those of mimicry",
            scores["masks known"] > scores["mimicry"],
        )
        self._check(
            "all known, sampled: passes more often than mimicry",
            rates["all known, sampled"] > rates["mimicry"],
        )
        self._check(
            "all known, fixed: passes more often than mimicry where these members are drawn",
            rates["all known, fixed drawn"] > rates["mimicry"],
        )
        self._check(
            "all known, fixed: at least as often where these members are drawn",
            rates["all known, fixed drawn"] >= rates["all known, fixed"],
        )
        self._check(
            "all known: breaks the defence without a limit",
            rates["all known, no limit"] >= _NEARLY_ALL,
        )


def _has_art() -> bool:
    """Whether adversarial-robustness-toolbox is installed; other packages are imported as `art`."""
    try:
        metadata.version("adversarial-robustness-toolbox")
    except metadata.PackageNotFoundError:
        return False
    return True


def _classes(student: Any, x: np.ndarray) -> np.ndarray:
    return np.asarray(student.predict(x.astype(np.float32), verbose=0).argmax(axis=1))
