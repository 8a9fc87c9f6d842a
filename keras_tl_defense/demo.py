"""The demonstration: make a Student, attack it, defend it, and send it the same attacks again."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from keras_tl_defense._keras import keras
from keras_tl_defense._validation import check_integer
from keras_tl_defense.attacks import AttackResult, MimicryAttack, plan_attacks
from keras_tl_defense.datasets import ImageDataset, faces, gtsrb, synthetic
from keras_tl_defense.ensemble.model import DifferentiatorEnsemble
from keras_tl_defense.evaluation import DefenceReport, evaluate_defence, plot_attacks, plot_search
from keras_tl_defense.teachers import build_teacher, load_teacher, make_student

DATA = ("synthetic", "gtsrb", "lfw")
_WORTH_DEFENDING = 0.25
_SHOWN = 4


class DemoError(RuntimeError):
    """The demonstration proves nothing, because the undefended attack does not succeed."""


@dataclass
class Demo:
    """One run of the demonstration.

    Args:
        data: `"synthetic"` draws signs and trains a Teacher on other drawn shapes; `"gtsrb"` and
            `"lfw"` read a folder.
        out: Folder for `report.csv`, `report.md`, pictures and the SavedModel.
        data_root: Folder of the data; not for `"synthetic"`.
        teacher: File of a Keras model with a layer `cut`; not for `"synthetic"`.
        cut: Name of the last layer that the Student takes from the Teacher.
        seed: Decides drawing, training, and which images are attacked. The key of the defence is
            new in every run.
        attacks: Number of targeted attacks, and of non-targeted ones.
        steps: Steps of each attack.
    """

    data: str
    out: Path
    data_root: Path | None = None
    teacher: Path | None = None
    cut: str = "flatten"
    seed: int = 0
    attacks: int = 60
    steps: int = 600
    seconds: dict[str, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        real = self.data != "synthetic"
        if self.data not in DATA:
            raise ValueError(f"`data` must be one of {DATA}. Received: data={self.data!r}")
        if real and (self.data_root is None or self.teacher is None):
            raise ValueError(
                f"`--data {self.data}` needs --data-root DIR, the folder of the images, and "
                "--teacher FILE, a Keras model. "
                f"Received: --data-root {self.data_root} --teacher {self.teacher}"
            )
        for option, value in (("--data-root", self.data_root), ("--teacher", self.teacher)):
            if not real and value is not None:
                raise ValueError(
                    f"`--data synthetic` draws its images and trains its Teacher. Leave {option} "
                    f"out, or choose other data. Received: {option} {value}"
                )
        if self.teacher is not None and not Path(self.teacher).is_file():
            raise FileNotFoundError(
                f"There is no Teacher at the path given. Received: --teacher {self.teacher}"
            )
        check_integer("attacks", self.attacks, 1)

    def run(self) -> DefenceReport:
        """Run every step, print what comes out and write the files.

        Raises:
            DemoError: The undefended attack does not succeed.
            OSError: The folder `out` cannot be written.
        """
        out = writable_folder(self.out)
        keras.utils.set_random_seed(self.seed)
        with self._timed("Teacher"):
            teacher = self._make_teacher()
        with self._timed("data"):
            dataset = self._load(teacher)
        train, validation = dataset.hold_out()
        x_train, y_train = train.x_train, train.y_train
        with self._timed("Student"):
            student = make_student(teacher, self.cut, x_train, y_train, dataset.classes)
        with self._timed("attack"):
            attacks = self._attack(teacher, student, dataset)
        defence = DifferentiatorEnsemble(student, seed=self.seed)
        with self._timed("adapt"):
            defence.adapt(x_train, y_train)
        with self._timed("fit"):
            defence.fit(x_train, y_train)
        with self._timed("calibrate"):
            defence.calibrate(validation.x_train, validation.y_train)
        with self._timed("evaluate"):
            report = evaluate_defence(defence, dataset.x_test, dataset.y_test, attacks)
        with self._timed("export"):
            exported = defence.export(out / "saved_model")
        self._write(out, report, defence, attacks, dataset)
        print(f"\nThe defended model: {exported}")
        _check_attack(report, attacks)
        return report

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        print(f"\n== {step}", flush=True)
        start = time.perf_counter()
        yield
        self.seconds[step] = time.perf_counter() - start

    def _load(self, teacher: Any) -> ImageDataset:
        if self.data == "synthetic":
            return synthetic.load_signs(train_per_class=100, test_per_class=40, seed=self.seed)
        assert self.data_root is not None
        height, width, channels = teacher.inputs[0].shape[1:]
        if height is None or height != width or channels != 3:
            raise ValueError(
                "The Teacher must take square RGB images of a fixed size, to which the data are "
                f"resized. Received: --teacher {self.teacher} of input {(height, width, channels)}"
            )
        return (gtsrb if self.data == "gtsrb" else faces).load(self.data_root, size=height)

    def _make_teacher(self) -> Any:
        if self.teacher is not None:
            return load_teacher(self.teacher)
        return train_synthetic_teacher(self.seed)

    def _attack(self, teacher: Any, student: Any, dataset: ImageDataset) -> dict[str, AttackResult]:
        x, y = dataset.x_test, dataset.y_test
        answered = student.predict(x.astype(np.float32)).argmax(axis=1)
        plan = plan_attacks(y, answered, self.attacks, seed=self.seed)
        attack = MimicryAttack(teacher, self.cut, budget=0.01, steps=self.steps, optimizer="adam")
        sources = x[plan.sources], y[plan.sources]
        return {
            "targeted mimicry": attack(sources[0], x[plan.targets], sources[1], y[plan.targets]),
            "non-targeted mimicry": attack.untargeted(sources[0], x[plan.candidates], sources[1]),
        }

    def _write(
        self,
        out: Path,
        report: DefenceReport,
        defence: DifferentiatorEnsemble,
        attacks: dict[str, AttackResult],
        dataset: ImageDataset,
    ) -> None:
        report.table.to_csv(out / "report.csv", index=False)
        text = self._describe(report, defence, attacks)
        (out / "report.md").write_text(text, encoding="utf-8")
        report.plot().savefig(out / "rates.png", dpi=120)
        report.roc().plot().savefig(out / "roc.png", dpi=120)
        plot_search(defence.search_history).savefig(out / "search.png", dpi=120)
        result = attacks["targeted mimicry"]
        details = report.details["targeted mimicry"]
        reached = result.reached(details["student_class"])
        shown = np.argsort(~reached, kind="stable")[:_SHOWN]
        figure = plot_attacks(
            result, details["student_class"], details["answer"], shown.tolist(), dataset.class_names
        )
        figure.savefig(out / "attacks.png", dpi=120)
        print(f"\n{text}\nWritten to {out}: report.csv, report.md and pictures")

    def _describe(
        self,
        report: DefenceReport,
        defence: DifferentiatorEnsemble,
        attacks: dict[str, AttackResult],
    ) -> str:
        pruned = ", ".join(f"{name} {ratio:g}" for name, ratio in defence.ratios.items())
        assert defence.calibration is not None
        asked, kept = defence.calibration.asked, defence.calibration.retention
        seconds = ", ".join(f"{step} {time:.1f}" for step, time in self.seconds.items())
        return (
            f"# A defended Student ({self.data}, cut at `{defence.cut}`, seed {self.seed})\n\n"
            f"{defence.classes} classes, {len(defence.member_classes)} differentiators, "
            f"{defence.ensemble_size} drawn for each input. The search chose to prune {pruned}, "
            f"with heads that read `{defence.head_layer}`. Calibrated on {kept.n} held-out images "
            f"that the Student answers rightly to keep {asked:.0%}; {kept} are kept. Attacks: "
            f"mimicry at `{self.cut}`, DSSIM at most 0.01, {self.steps} steps, "
            f"{len(attacks['targeted mimicry'].adversarial)} test images each. The attacker knows "
            "the Teacher and not the defence.\n\n"
            f"{report.to_markdown()}\n"
            f"{report.roc().to_markdown()}\n"
            "![Rates](rates.png)\n\n![Success against retention](roc.png)\n\n"
            "![What the search measured](search.png)\n\n"
            "![Attacks that fool the undefended Student](attacks.png)\n\n"
            "`retention`: accepted of the clean images that the Student answers rightly. "
            "`accepted`: crafted images accepted, those that fool nobody and are answered rightly "
            "among them. Success: within budget and "
            "answered as the target (targeted) or not as the source (non-targeted). The draw of "
            "the differentiators is secret and new in every run, so the defended rates differ a "
            "little from run to run. Who knows the seed can recompute the masks: leave it out for "
            "a defence that you ship.\n\n"
            f"Seconds: {seconds}.\n"
        )


def train_synthetic_teacher(seed: int) -> Any:
    """A Teacher of drawn shapes.

    Args:
        seed: Decides what is drawn. What is learned depends on Keras's own seed, too.

    Returns:
        A trained Keras model, as from `build_teacher`.
    """
    shapes = synthetic.load_shapes(train_per_class=150, seed=seed)
    teacher = build_teacher(shapes.image_shape, shapes.classes)
    teacher.compile(
        optimizer=keras.optimizers.Adam(1e-3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    teacher.fit(
        shapes.x_train.astype(np.float32),
        shapes.y_train,
        validation_data=(shapes.x_test.astype(np.float32), shapes.y_test),
        batch_size=64,
        epochs=12,
    )
    return teacher


def writable_folder(path: Path) -> Path:
    """Make the folder if need be and check that files can be written there.

    Raises:
        OSError: They cannot.
    """
    probe = path / f".write-test-{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"The output folder cannot be written ({error.strerror}). Choose another with --out. "
            f"Received: --out {path}"
        ) from error
    return path


def _check_attack(report: DefenceReport, attacks: dict[str, AttackResult]) -> None:
    for name in attacks:
        rate = report.rate(name, "undefended_success")
        if rate < _WORTH_DEFENDING:
            raise DemoError(
                f"Only {rate:.0%} of the {name} attacks succeed against the undefended Student, so "
                "this run says nothing about the defence. Use a Teacher and a cut that the attack "
                f"works on, or more steps. Expected at least {_WORTH_DEFENDING:.0%}."
            )
