"""The demonstration: what it refuses, and, slowly, that it shows what it says."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tensorflow as tf
from conftest import once
from skimage.io import imread

from keras_tl_defense.__main__ import main
from keras_tl_defense.datasets import synthetic
from keras_tl_defense.demo import Demo, DemoError
from keras_tl_defense.ensemble import search, trial
from keras_tl_defense.teachers import build_teacher


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "gtsrb"], "`--data gtsrb` needs --data-root DIR"),
        (
            ["--data", "lfw", "--data-root", "."],
            "`--data lfw` needs --data-root DIR, the folder of the images, and --teacher",
        ),
        (["--data-root", "."], "Leave --data-root out"),
        (["--attacks", "0"], "`attacks` must be an integer of at least 1"),
        (
            ["--data", "lfw", "--data-root", ".", "--teacher", "no.h5"],
            "no Teacher at the path given",
        ),
    ],
)
def test_arguments_that_will_not_do(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert main(["demo", "--out", str(tmp_path / "file" / "out")]) == 2
    assert "output folder cannot be written" in capsys.readouterr().err


def test_a_folder_without_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_teacher((32, 32, 3), 4, widths=(4,)).save(tmp_path / "teacher.keras")
    common = ["demo", "--teacher", str(tmp_path / "teacher.keras"), "--out", str(tmp_path / "o")]
    assert main([*common, "--data", "lfw", "--data-root", str(tmp_path)]) == 2
    assert "lfw64.npz" in capsys.readouterr().err


class TinyDemo(Demo):
    """The whole demonstration on a few images and an untrained Teacher."""

    def _load(self, teacher: Any) -> Any:
        return synthetic.load_signs(train_per_class=24, test_per_class=3, seed=self.seed)

    def _make_teacher(self) -> Any:
        return build_teacher((32, 32, 3), 4, widths=(8,))


@pytest.mark.slow
def test_an_attack_that_fails_proves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "_STEPS", 10)
    monkeypatch.setattr(search, "_GRID", (0.5,))
    demo = TinyDemo("synthetic", tmp_path / "out", attacks=4, steps=1)
    with pytest.raises(DemoError, match=r"Only \d+% of the .* mimicry attacks succeed against"):
        demo.run()
    table = pd.read_csv(tmp_path / "out" / "report.csv")
    assert list(table.columns) == ["inputs", "metric", "count", "n", "rate", "low", "high"]


def run_demo(out: Path, *arguments: str) -> pd.Series:
    """Run the command as a user does; return its table."""
    done = subprocess.run(
        [sys.executable, "-m", "keras_tl_defense", "demo", "--out", str(out), *arguments],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("attacks.png", "rates.png"):
        assert imread(out / name).std() > 10
    assert "Seconds: Teacher" in (out / "report.md").read_text(encoding="utf-8")
    serve = tf.saved_model.load(str(out / "saved_model" / "1")).signatures["serving_default"]
    shape = serve.structured_input_signature[1]["images"].shape[1:]
    assert serve(tf.zeros((2, *shape)))["answer"].shape == (2,)
    table = pd.read_csv(out / "report.csv")
    assert (table["count"] <= table["n"]).all()
    return table.set_index(["inputs", "metric"])["rate"]


@pytest.mark.slow
def test_synthetic(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    rates = run_demo(tmp_path, "--attacks", "60")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert used < 2 * 240  # four minutes of two cores, whatever else runs on them
    assert rates["clean", "student_accuracy"] > 0.85
    assert rates["clean", "retention"] > 0.7
    for attack in ("targeted mimicry", "non-targeted mimicry"):
        assert rates[attack, "undefended_success"] > 0.25
        assert rates[attack, "defended_success"] < 0.8 * rates[attack, "undefended_success"]


@pytest.mark.slow
@once
def test_traffic_signs(data_folder: Path, tmp_path: Path) -> None:
    rates = run_demo(
        tmp_path,
        *("--data", "gtsrb", "--data-root", str(data_folder), "--attacks", "60"),
        *("--teacher", str(data_folder / "vgg32_tiny_imagenet.h5")),
    )
    assert rates["clean", "student_accuracy"] > 0.55
    assert rates["clean", "retention"] > 0.8
    for attack in ("targeted mimicry", "non-targeted mimicry"):
        assert rates[attack, "defended_success"] < 0.8 * rates[attack, "undefended_success"]


@pytest.mark.slow
@once
def test_faces(data_folder: Path, tmp_path: Path) -> None:
    rates = run_demo(
        tmp_path,
        *("--data", "lfw", "--data-root", str(data_folder), "--attacks", "40"),
        *("--teacher", str(data_folder / "vgg32_faces.h5")),
    )
    assert rates["clean", "student_accuracy"] > 0.6
    assert rates["clean", "retention"] > 0.8
    assert rates["non-targeted mimicry", "undefended_success"] > 0.85
    for attack in ("targeted mimicry", "non-targeted mimicry"):
        assert rates[attack, "defended_success"] < 0.5 * rates[attack, "undefended_success"]
