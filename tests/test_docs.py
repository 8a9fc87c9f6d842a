"""The examples of README and docstrings run."""

from __future__ import annotations

import doctest
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from conftest import draw_history, once

import keras_tl_defense as ktd
from keras_tl_defense import activations, metrics, teachers
from keras_tl_defense._keras import keras
from keras_tl_defense.attacks import (
    adaptive,
    art,
    autoencoder,
    backdoor,
    base,
    general,
    masked_mimicry,
    mimicry,
    reverse_engineering,
    target_agnostic,
    targets,
)
from keras_tl_defense.datasets import scans, signals
from keras_tl_defense.ensemble import calibration, heads, model, search, trial
from keras_tl_defense.evaluation import plots, report, roc, sizes
from keras_tl_defense.pruning import callback, channel_mask, masks, ratios, schedule

README = Path(__file__).parent.parent / "README.md"


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What the examples take for granted: a Teacher, a Student, and images."""
    keras.utils.set_random_seed(0)
    signs = ktd.datasets.synthetic.load_signs(train_per_class=12, test_per_class=12)
    teacher = ktd.teachers.build_teacher((32, 32, 3), 28)
    student = ktd.teachers.make_student(
        teacher, "flatten", signs.x_train, signs.y_train, 16, epochs=20, verbose=0
    )
    x, y = signs.x_test[::3], signs.y_test[::3]
    return {
        "ktd": ktd,
        "keras": keras,
        "np": np,
        "tf": tf,
        "teacher": teacher,
        "student": student,
        "model": student,
        "x_train": signs.x_train,
        "y_train": signs.y_train,
        "x_val": np.concatenate([signs.x_test[1::3], signs.x_test[2::3]]),
        "y_val": np.concatenate([signs.y_test[1::3], signs.y_test[2::3]]),
        "x_test": x,
        "y_test": y,
        "x_source": x[:4],
        "y_source": y[:4],
        "x_target": x[20:24],
        "y_target": y[20:24],
    }


@pytest.fixture(autouse=True)
def no_progress_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    bar = keras.utils.Progbar

    def silent(target: Any, verbose: int = 1, **options: Any) -> Any:
        return bar(target, verbose=0, **options)

    monkeypatch.setattr(keras.utils, "Progbar", silent)


ENSEMBLE = [calibration, heads, model]
PRUNING = [masks, ratios, schedule, callback, channel_mask]
ATTACKS = [targets, mimicry, target_agnostic, autoencoder, backdoor, reverse_engineering]
LIKE_ANY = [pytest.param(module, marks=once) for module in (*ATTACKS, scans, signals)]
MODULES = [*PRUNING, metrics, activations, *ENSEMBLE, teachers, *LIKE_ANY]


HIDDEN = [  # by functions of the same names
    sys.modules[f"keras_tl_defense.attacks.{name}"]
    for name in ("best_layer", "dssim", "fingerprint")
]


@pytest.mark.parametrize("module", [*MODULES, *(pytest.param(m, marks=once) for m in HIDDEN)])
def test_docstrings(module: Any, names: dict[str, Any]) -> None:
    result = doctest.testmod(module, globs={**vars(module), **names})
    assert result.attempted > 0
    assert result.failed == 0


@once
def test_docstrings_of_results(
    names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    defence = ktd.DifferentiatorEnsemble(names["student"], 0.5)
    x, y = names["x_train"], names["y_train"]
    defence.adapt(x, y)
    defence.compile()
    defence.fit(x, y)
    attack = ktd.attacks.MimicryAttack(names["teacher"], "flatten", steps=1)
    result = attack(*(names[n] for n in ("x_source", "x_target", "y_source", "y_target")))
    defence.search_history = draw_history()
    for module in (base, report, plots, roc, sizes, adaptive, art, general, masked_mimicry):
        made = {"evaluate_defence": ktd.evaluate_defence}
        globs = {**made, **vars(module), **names, "defence": defence, "result": result}
        examples = doctest.testmod(module, globs=globs)
        assert examples.attempted > 0
        assert examples.failed == 0


def test_readme(names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All its Python, one block after the other."""
    monkeypatch.setattr(trial, "_STEPS", 20)
    monkeypatch.setattr(search, "_GRID", (0.5,))
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 2
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        quick = block.replace("count=60", "count=4").replace("steps=600", "steps=20")
        exec(compile(quick, "README.md", "exec"), names)
    assert (tmp_path / "serving" / "defence" / "1" / "saved_model.pb").exists()
    assert set(names["answers"]) <= set(range(17))
    assert set(names["report"].table["inputs"]) == {"clean", "mimicry"}


def test_readme_links_and_pictures_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (README.parent / target).exists(), target
