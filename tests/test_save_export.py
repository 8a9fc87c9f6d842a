"""A defence in another process: loaded from a file, or served as a SavedModel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from conftest import SIZE, Images, fitted

import keras_tl_defense as ktd
from keras_tl_defense._keras import keras

LOAD = """
import sys, numpy as np, tensorflow as tf
import keras_tl_defense
defence = tf.keras.models.load_model(sys.argv[1])
details = defence.explain(np.load(sys.argv[2]), batch_size=5, verbose=0)
np.savez(sys.argv[3], **details)
"""
SERVE = """
import sys, numpy as np, tensorflow as tf
serve = tf.saved_model.load(sys.argv[1]).signatures["serving_default"]
x = np.load(sys.argv[2]).astype(np.float32)
parts = [serve(tf.constant(x[i : i + 7])) for i in range(0, len(x), 7)]
np.savez(sys.argv[3], **{k: np.concatenate([p[k] for p in parts]) for k in parts[0]})
assert not any(name.startswith("keras_tl_defense") for name in sys.modules)
"""


def in_fresh_process(script: str, *arguments: Path) -> None:
    """Run a script in a new Python, away from this folder."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        cwd=arguments[-1].parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["defence", "dense_defence"])
def test_loaded_and_exported_in_fresh_processes(
    name: str, request: pytest.FixtureRequest, images: Images, tmp_path: Path
) -> None:
    defence = request.getfixturevalue(name)
    details = defence.explain(images.x_test, verbose=0)
    np.save(tmp_path / "x.npy", images.x_test)
    defence.save(tmp_path / "defence.keras")
    in_fresh_process(LOAD, tmp_path / "defence.keras", tmp_path / "x.npy", tmp_path / "loaded.npz")
    folder = defence.export(tmp_path / "serving" / "defence")
    assert folder == tmp_path / "serving" / "defence" / "1"
    in_fresh_process(SERVE, folder, tmp_path / "x.npy", tmp_path / "served.npz")
    loaded, served = (dict(np.load(tmp_path / f"{kind}.npz")) for kind in ("loaded", "served"))
    assert set(loaded) == set(details)
    assert set(served) == set(details) - {"members"}
    for other in (loaded, served):
        for field in other:
            np.testing.assert_allclose(other[field], details[field], rtol=1e-4, atol=1e-4)


def test_a_loaded_defence_can_be_trained_again(
    defence: Any, images: Images, tmp_path: Path
) -> None:
    defence.save(tmp_path / "defence.keras")
    loaded = keras.models.load_model(tmp_path / "defence.keras")
    loaded.fit(images.x_train, images.y_train, verbose=0)
    np.testing.assert_allclose(
        loaded.explain(images.x_test, verbose=0)["score"],
        defence.explain(images.x_test, verbose=0)["score"],
        rtol=1e-3,
        atol=1e-4,
    )
    copy = keras.models.load_model(tmp_path / "defence.keras", compile=False)
    with pytest.raises(RuntimeError, match="no optimizer"):
        copy.fit(images.x_train, images.y_train)


def test_the_configuration_holds_no_secret_and_no_data(defence: Any) -> None:
    config = defence.get_config()
    assert set(config) == {
        "name",
        "student",
        "ratios",
        "ensemble_size",
        "reject_threshold",
        "cut",
        "preprocessing",
        "seed",
    }
    again = ktd.DifferentiatorEnsemble.from_config(config)
    assert again.layer_ratios == defence.layer_ratios
    assert again.cut == defence.cut


@keras.utils.register_keras_serializable(package="tests")
def halve(x: Any) -> Any:
    return x / 2


def test_preprocessing_is_saved_when_it_can_be(
    student: Any, images: Images, tmp_path: Path
) -> None:
    for number, preprocessing in enumerate((keras.layers.Rescaling(0.5), halve)):
        defence = fitted(student, images, {"conv1": 0.5}, preprocessing=preprocessing)
        path = tmp_path / f"{number}.keras"
        defence.save(path)
        np.testing.assert_array_equal(
            keras.models.load_model(path).predict(images.x_test, verbose=0),
            defence.predict(images.x_test, verbose=0),
        )
    defence = ktd.DifferentiatorEnsemble(student, 0.5, preprocessing=lambda x: x / 2)
    with pytest.raises(ValueError, match="plain function cannot be saved"):
        defence.save(tmp_path / "lambda.keras")


def test_a_file_that_would_run_code_is_refused(images: Images, tmp_path: Path) -> None:
    inputs = keras.Input((SIZE, SIZE, 3))
    conv = keras.layers.Conv2D(3, 3, name="conv")
    conv.trainable = False
    x = keras.layers.Lambda(lambda t: t + 1)(conv(inputs))
    student = keras.Model(inputs, keras.layers.Dense(6)(keras.layers.Flatten()(x)))
    defence = ktd.DifferentiatorEnsemble(student, {"conv": 0.3})
    defence.save(tmp_path / "lambda.keras")
    with pytest.raises((ValueError, TypeError), match=r"(?i)lambda"):
        keras.models.load_model(tmp_path / "lambda.keras")


def test_versions_and_folders_that_will_not_do(defence: Any, tmp_path: Path) -> None:
    first = defence.export(tmp_path / "model")
    assert defence.export(tmp_path / "model").name == "2"
    assert defence.export(tmp_path / "model" / "7").name == "7"
    assert defence.export(tmp_path / "model").name == "8"
    with pytest.raises(FileExistsError, match="never overwritten"):
        defence.export(first)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"cannot be written .*Received: path="):
        defence.export(tmp_path / "file" / "model")


def test_an_exported_graph_rejects_what_is_not_finite(
    defence: Any, images: Images, tmp_path: Path
) -> None:
    serve = tf.saved_model.load(str(defence.export(tmp_path))).signatures["serving_default"]
    x = images.x_test[:4].astype(np.float32)
    clean = serve(tf.constant(x))
    x[1, 3, 3, 0], x[2, 0, 0, 1] = np.nan, -np.inf
    x[3] = 3e38
    answers = {name: value.numpy() for name, value in serve(tf.constant(x)).items()}
    assert answers["answer"][0] == clean["answer"].numpy()[0]
    assert answers["answer"][1:3].tolist() == [0, 0]
    assert not answers["accepted"][1:3].any()
    assert (answers["disagreements"][1:3] == 3).all()
    assert (answers["score"][1:3] == np.finfo(np.float32).min).all()
    assert np.isfinite(answers["score"]).all()  # the last image overflows the network
