"""A defence in another process: loaded from a file, or served as a SavedModel."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from conftest import CLASSES, SIZE, Images, fitted
from fresh_process import check_elsewhere

import keras_tl_defense as ktd
from keras_tl_defense import serving
from keras_tl_defense._keras import keras


def test_loaded_and_exported_in_a_fresh_process(
    defence: Any, dense_defence: Any, images: Images, tmp_path: Path
) -> None:
    check_elsewhere({"convolutions": defence, "dense": dense_defence}, images.x_test, tmp_path)


def test_a_loaded_defence_can_be_trained_again(
    defence: Any, images: Images, tmp_path: Path
) -> None:
    defence.save(tmp_path / "defence.keras")
    for compiled in (True, False):
        loaded = keras.models.load_model(tmp_path / "defence.keras", compile=compiled)
        expected = defence.get_compile_config() if compiled else None
        assert loaded.get_compile_config() == expected
        loaded.fit(images.x_train, images.y_train, verbose=0)
        np.testing.assert_allclose(
            loaded.explain(images.x_test, verbose=0)["score"],
            defence.explain(images.x_test, verbose=0)["score"],
            rtol=1e-3,
            atol=1e-4,
        )


def test_the_configuration_holds_no_secret_and_no_data(defence: Any) -> None:
    config = defence.get_config()
    assert set(config) == {
        "name",
        "student",
        "mode",
        "selection",
        "members_per_class",
        "classes_per_member",
        "grouping",
        "ratios",
        "retention",
        "head",
        "head_layer",
        "tune",
        "iterations",
        "jitter",
        "ensemble_size",
        "reject_threshold",
        "cut",
        "preprocessing",
        "search_budget",
        "seed",
    }
    again = ktd.DifferentiatorEnsemble.from_config(config)
    assert again.ratios == defence.ratios == {"conv1": 0.5, "conv2": 0.5}
    assert config["student"]["config"]  # left as it was
    same = again.get_config()
    assert {**same, "student": None} == {**config, "student": None}


def test_the_configuration_keeps_what_was_asked(student: Any) -> None:
    options: dict[str, Any] = {
        "retention": 0.8,
        "head": "pair",
        "head_layer": "pool1",
        "iterations": 2,
        "jitter": 0.5,
        "search_budget": 7,
    }
    for ratios in ("auto", {"conv1": 0.5}):
        config = ktd.DifferentiatorEnsemble(student, ratios, **options).get_config()
        assert config["ratios"] == ratios
        again = ktd.DifferentiatorEnsemble.from_config(config)
        assert {name: getattr(again, name) for name in options} == options
        assert again.ratios == ratios


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
    before = path.read_bytes()
    defence = ktd.DifferentiatorEnsemble(student, 0.5, preprocessing=lambda x: x / 2)
    defence.adapt(images.x_train, images.y_train, verbose=0)
    with pytest.raises(ValueError, match="plain function cannot be saved"):
        defence.save(path)
    assert path.read_bytes() == before


def test_what_is_not_adapted_is_not_saved(student: Any, tmp_path: Path) -> None:
    for ratios in ("auto", 0.5):
        with pytest.raises(RuntimeError, match=r"not pruned yet. Call `adapt"):
            ktd.DifferentiatorEnsemble(student, ratios).save(tmp_path / "defence.keras")
    assert not list(tmp_path.iterdir())


def test_files_that_cannot_be_saved(defence: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ends in \.keras"):
        defence.save(tmp_path / "defence.h5")
    (tmp_path / "file").write_text("in the way")
    for folder in ("file", "missing"):
        with pytest.raises(OSError, match=r"cannot be written .*Received: filepath="):
            defence.save(tmp_path / folder / "defence.keras")
    defence.save(tmp_path / "defence.keras")
    with pytest.raises(ValueError, match="The file exists"):
        defence.save(tmp_path / "defence.keras", overwrite=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["defence.keras", "file"]


def tampered(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of a saved defence with something else in its configuration."""
    other = path.with_name("tampered.keras")
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(other, "w") as copy:
        for name in archive.namelist():
            content = archive.read(name)
            if name == "config.json":
                config = json.loads(content)
                change(config)
                content = json.dumps(config).encode()
            copy.writestr(name, content)
    return other


@pytest.mark.parametrize(
    ("part", "field"), [("config", "preprocessing"), ("compile_config", "optimizer")]
)
@pytest.mark.parametrize(
    "foreign",
    [
        {"module": "os", "class_name": "function", "config": "system", "registered_name": "system"},
        {"module": "builtins", "class_name": "function", "config": "print"},
        {"module": "evil", "class_name": "Evil", "config": {}, "registered_name": None},
        {"module": "evil", "class_name": "tests>halve", "config": {}, "registered_name": None},
        {
            "module": "keras",
            "class_name": "Sequential",
            "config": {"layers": [{"module": "evil", "class_name": "Evil", "config": {}}]},
            "registered_name": None,
        },
    ],
    ids=["os.system", "print", "class", "class of a known name", "nested class"],
)
def test_a_file_that_names_foreign_code_is_refused(
    part: str,
    field: str,
    foreign: dict[str, Any],
    defence: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    defence.save(tmp_path / "defence.keras")
    with pytest.raises((ValueError, TypeError), match=r"(?i)neither Keras's own|could not"):
        keras.models.load_model(
            tampered(tmp_path / "defence.keras", lambda c: c[part].update({field: foreign}))
        )


@pytest.mark.parametrize("kind", ["TFOpLambda", "InstanceMethod", "TensorFlowOpLayer", "TFSMLayer"])
def test_a_student_that_writes_files_is_refused(kind: str, defence: Any, tmp_path: Path) -> None:
    """The legacy Keras calls what a layer of a file names, when it builds the model."""
    written = tmp_path / "written.py"
    layer = {
        "module": "keras.layers",
        "class_name": kind,
        "config": {"name": "odd", "trainable": True, "function": "io.write_file"},
        "registered_name": kind,
        "name": "odd",
        "inbound_nodes": [["_CONSTANT_VALUE", -1, str(written), {"contents": "print()"}]],
    }
    defence.save(tmp_path / "defence.keras")
    with pytest.raises((ValueError, TypeError), match="more than compute"):
        keras.models.load_model(
            tampered(
                tmp_path / "defence.keras",
                lambda c: c["config"]["student"]["config"]["layers"].append(layer),
            )
        )
    assert not written.exists()


def test_a_student_with_arithmetic_can_be_loaded(images: Images, tmp_path: Path) -> None:
    inputs = keras.Input((SIZE, SIZE, 3))
    x = keras.layers.Conv2D(4, 3, activation="relu", trainable=False, name="conv")(
        inputs[:, 1:-1, 1:-1] / 255 - 0.5
    )
    x = keras.layers.GlobalAveragePooling2D()(x) * 2.0
    student = keras.Model(inputs, keras.layers.Dense(CLASSES)(x))
    defence = ktd.DifferentiatorEnsemble(student, {"conv": 0.5})
    defence.adapt(images.x_train, images.y_train, verbose=0)
    defence.save(tmp_path / "defence.keras")
    loaded = keras.models.load_model(tmp_path / "defence.keras")
    assert loaded.ratios == {"conv": 0.5}


def test_a_teacher_file_with_a_lambda_is_refused(tmp_path: Path) -> None:
    inputs = keras.Input((8, 8, 3))
    teacher = keras.Model(inputs, keras.layers.Lambda(lambda t: t + 1)(inputs))
    for name in ("teacher.h5", "teacher.keras"):
        teacher.save(tmp_path / name)
        with pytest.raises((ValueError, TypeError), match=r"(?i)lambda"):
            ktd.teachers.load_teacher(tmp_path / name)


@pytest.mark.filterwarnings("ignore:No layer is pruned")
@pytest.mark.parametrize("ratios", [0, np.float32(0.5), {"conv1": np.float64(0.5)}])
def test_any_number_will_do_as_a_ratio(
    student: Any, images: Images, ratios: Any, tmp_path: Path
) -> None:
    defence = ktd.DifferentiatorEnsemble(student, ratios)
    defence.adapt(images.x_train, images.y_train, verbose=0)
    defence.save(tmp_path / "defence.keras")
    loaded = keras.models.load_model(tmp_path / "defence.keras")
    assert loaded.ratios == defence.ratios


def test_a_cut_at_a_layer_that_is_called_twice_can_be_loaded(
    images: Images, tmp_path: Path
) -> None:
    inputs = keras.Input((SIZE, SIZE, 3))
    relu = keras.layers.ReLU(name="relu")
    convolutions = [keras.layers.Conv2D(3, 3, name=f"conv{i}") for i in (1, 2)]
    for layer in convolutions:
        layer.trainable = False
    x = relu(convolutions[1](relu(convolutions[0](inputs))))
    student = keras.Model(inputs, keras.layers.Dense(4)(keras.layers.Flatten()(x)))
    defence = ktd.DifferentiatorEnsemble(student, {"conv1": 0.5}, cut="relu@2")
    few = images.y_train < 4
    defence.adapt(images.x_train[few], images.y_train[few], verbose=0)
    defence.save(tmp_path / "defence.keras")
    assert keras.models.load_model(tmp_path / "defence.keras").cut == "relu@2"


def test_a_file_that_would_run_code_is_refused(images: Images, tmp_path: Path) -> None:
    inputs = keras.Input((SIZE, SIZE, 3))
    conv = keras.layers.Conv2D(3, 3, name="conv")
    conv.trainable = False
    x = keras.layers.Lambda(lambda t: t + 1)(conv(inputs))
    student = keras.Model(inputs, keras.layers.Dense(6)(keras.layers.Flatten()(x)))
    with pytest.warns(UserWarning, match="No layer is pruned"):
        defence = ktd.DifferentiatorEnsemble(student, 0)
    defence.adapt(images.x_train, images.y_train, verbose=0)
    defence.save(tmp_path / "lambda.keras")
    with pytest.raises((ValueError, TypeError), match=r"(?i)lambda"):
        keras.models.load_model(tmp_path / "lambda.keras")


def test_versions_and_folders_that_will_not_do(defence: Any, tmp_path: Path) -> None:
    first = defence.export(tmp_path / "model")
    assert defence.export(tmp_path / "model").name == "2"
    assert defence.export(tmp_path / "model" / "7").name == "7"
    assert defence.export(tmp_path / "model").name == "8"
    with pytest.raises(ValueError, match="never overwritten"):
        defence.export(first)
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file", tmp_path / "file" / "model"):
        with pytest.raises(OSError, match=r"cannot be written .*Received: path="):
            defence.export(path)
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["1", "2", "7", "8"]


def test_an_export_that_fails_leaves_nothing(
    defence: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(serving, "_write", fail)
    for path in (tmp_path / "7", tmp_path):
        with pytest.raises(OSError, match="No space left on device"):
            defence.export(path)
    assert not list(tmp_path.iterdir())


def test_an_exported_graph_rejects_what_is_not_finite(
    defence: Any, images: Images, tmp_path: Path
) -> None:
    serve = tf.saved_model.load(str(defence.export(tmp_path))).signatures["serving_default"]
    x = images.x_test[:4].astype(np.float32)
    clean = serve(tf.constant(x))
    x[1, 3, 3, 0], x[2, 0, 0, 1] = np.nan, -np.inf
    x[3, 5, 5, 1] = 1e30
    answers = {name: value.numpy() for name, value in serve(tf.constant(x)).items()}
    assert answers["answer"][0] == clean["answer"].numpy()[0]
    assert answers["answer"][1:].tolist() == [0, 0, 0]
    assert not answers["accepted"][1:].any()
    assert (answers["disagreements"][1:] == 3).all()
    assert (answers["score"][1:] == np.finfo(np.float32).min).all()


def test_an_export_holds_every_weight_once(defence: Any, tmp_path: Path) -> None:
    folder = defence.export(tmp_path / "once")
    stored = tf.train.list_variables(str(folder / "variables" / "variables"))
    shapes = [shape for name, shape in stored if name.endswith("VARIABLE_VALUE")]
    assert len(shapes) > 10
    held = sum(int(np.prod(w.shape)) for w in defence.weights)
    assert sum(int(np.prod(shape)) for shape in shapes) <= held


def test_memory_is_what_an_export_holds(dense_defence: Any, tmp_path: Path) -> None:
    table = dense_defence.memory().set_index("part")
    size = (
        (dense_defence.export(tmp_path) / "variables/variables.data-00000-of-00001").stat().st_size
    )
    assert 0 <= size - table.loc["all", "bytes"] < 4096  # the key, the threshold and the like
    student = sum(4 * np.prod(weight.shape) for weight in dense_defence.student.weights)
    assert table.loc["student", "bytes"] == student
    assert table.loc["students instead", "of_student"] == 15 + 1
    # Two heads of 20 numbers in half precision, a scale and an offset in single.
    assert table.loc["heads", "each"] == 2 * (20 * 2 + 4 + 4)
    assert table.loc["own layers", "bytes"] == 0
    masks = (15 + 4) * (18 // 8 + 1)  # bits of filters
    masks += (15 + 4) * (4 + 8)  # a threshold and a tie index for the Dense layer
    assert table.loc["masks", "bytes"] == masks + (15 + 4) * (2 * 4 + 4) + 16
    with pytest.raises(RuntimeError, match="adapt"):
        ktd.DifferentiatorEnsemble(dense_defence.student).memory()
