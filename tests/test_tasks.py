"""Fits that are shared out to processes, and fits that go on where they were stopped."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import Images, once, weights_of

import keras_tl_defense as ktd
from keras_tl_defense._keras import keras
from keras_tl_defense.ensemble import backup, fitting, tasks

CHUNK = 1  # bytes: a task for each differentiator


def adapted(student: Any, images: Images, **options: Any) -> Any:
    options = {"ratios": {"conv*": 0.5}, "seed": 0, **options}
    defence = ktd.DifferentiatorEnsemble(student, **options)
    defence.adapt(images.x_train, images.y_train, verbose=0)
    return defence


def fit(defence: Any, images: Images, **options: Any) -> Any:
    options = {"chunk_memory": CHUNK, "verbose": 0, **options}
    return defence.fit(images.x_train, images.y_train, **options)


def check_same(one: Any, other: Any) -> None:
    expected = weights_of(other)
    for name, weight in weights_of(one).items():
        np.testing.assert_allclose(weight, expected[name], rtol=1e-6, atol=1e-6, err_msg=name)


class Forgetful(Executor):
    """Runs tasks at once, and loses every second time what the process knew."""

    def __init__(self) -> None:
        self.payloads: list[bool] = []

    def submit(self, function: Any, /, *args: Any, **_: Any) -> Future[Any]:
        if len(self.payloads) % 2:
            tasks._fitters.clear()
        self.payloads.append(args[1] is not None)
        future: Future[Any] = Future()
        future.set_result(function(*args))
        return future


class Client:
    """Takes functions as Dask's does, but is no executor."""

    def submit(self, function: Any, *args: Any) -> Any:
        raise NotImplementedError


class Vanishing(Forgetful):
    """Breaks once the process keeps something of the fit."""

    def submit(self, function: Any, /, *args: Any, **_: Any) -> Future[Any]:
        if tasks._fitters:
            raise RuntimeError("the cluster is gone")
        return super().submit(function, *args)


def test_what_is_shared_out_is_what_one_process_finds(student: Any, images: Images) -> None:
    here, elsewhere = adapted(student, images), adapted(student, images)
    history = fit(here, images).history
    executor = Forgetful()
    assert fit(elsewhere, images, executor=executor).history == history
    check_same(elsewhere, here)
    sent = sum(executor.payloads)
    assert 1 < sent < len(executor.payloads)
    assert len(executor.payloads) - sent >= 15 + 4


def test_the_secret_key_stays_here(student: Any, images: Images) -> None:
    defence = adapted(student, images, key=bytes(range(16)))
    seen: list[Any] = []

    class Spy(Forgetful):
        def submit(self, function: Any, /, *args: Any, **_: Any) -> Future[Any]:
            seen.append(args[1])
            return super().submit(function, *args)

    fit(defence, images, executor=Spy())
    (payload, *_) = (payload for payload in seen if payload is not None)
    sent = pickle.dumps(payload)
    assert defence.student.get_weights()[0].tobytes() in sent
    assert bytes(range(16)) == np.array(defence._key).tobytes()
    assert bytes(range(16)) not in sent


@pytest.mark.parametrize(
    ("executor", "error", "match"),
    [
        (4, TypeError, r"Executor.*int"),
        (Client(), TypeError, r"client.get_executor\(\).*Client"),
        (
            ProcessPoolExecutor(mp_context=multiprocessing.get_context("fork")),
            ValueError,
            r"does not survive a fork.*spawn",
        ),
    ],
)
def test_executors_that_cannot_work_are_refused(
    executor: Any, error: Any, match: str, student: Any, images: Images
) -> None:
    with pytest.raises(error, match=match):
        fit(adapted(student, images), images, executor=executor)


def test_a_worker_of_the_other_keras_is_told(student: Any, images: Images) -> None:
    payload = tasks.Payload(print, {}, [], [], [], None, None, legacy=not tasks.LEGACY)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="TF_USE_LEGACY_KERAS="):
        tasks.fit_elsewhere("other", payload, fitting.Task(0, np.arange(1)))


@pytest.mark.slow
def test_dask_workers_share_a_fit_and_one_may_die(student: Any, images: Images) -> None:
    distributed = pytest.importorskip("distributed", reason="pip install distributed")
    here, elsewhere = adapted(student, images), adapted(student, images)
    fit(here, images)
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as own,
        distributed.Client(own) as client,
    ):
        executor = client.get_executor()
        killed = []

        class Killer(Executor):
            """Kills a worker when some tasks are done."""

            def submit(self, *args: Any, **_: Any) -> Any:
                future = executor.submit(*args)
                if len(killed) == 8:
                    pid = next(iter(client.run(os.getpid).values()))
                    os.kill(pid, signal.SIGKILL)
                killed.append(future)
                return future

        fit(elsewhere, images, executor=Killer())
        assert len(killed) > 15
    check_same(elsewhere, here)


class StopError(Exception):
    pass


def stopped(defence: Any, images: Images, folder: Path, after: int, **options: Any) -> None:
    """A fit that stops after some tasks."""

    class Stopping(Forgetful):
        def submit(self, function: Any, /, *args: Any, **_: Any) -> Future[Any]:
            if len(self.payloads) == after:
                raise StopError
            return super().submit(function, *args)

    with pytest.raises(StopError):
        fit(defence, images, executor=Stopping(), backup_dir=folder, **options)


@pytest.mark.parametrize("seed", [0, pytest.param(None, marks=once)])
def test_a_fit_goes_on(seed: Any, student: Any, images: Images, tmp_path: Path) -> None:
    """Without a seed, too: what `adapt` drew comes from the backup."""
    options = {"seed": seed, "members_per_class": 3, "key": bytes(range(16))}
    first, again = (adapted(student, images, **options) for _ in range(2))
    stopped(first, images, tmp_path, after=9)
    done = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("task-*")}
    assert len(done) >= 2
    seen: list[Any] = []

    class Watching(Forgetful):
        def submit(self, function: Any, /, *args: Any, **_: Any) -> Future[Any]:
            seen.append(args[2])
            for name, time_written in done.items():
                assert (tmp_path / name).stat().st_mtime_ns == time_written
            return super().submit(function, *args)

    executor = Watching()
    fit(again, images, executor=executor, backup_dir=tmp_path)
    asked = {f"task-level-{task.level}-{task.bodies[0]}.npz" for task in seen}
    assert not asked & set(done)
    np.testing.assert_array_equal(again.member_classes, first.member_classes)
    assert bytes(range(16)) == np.array(again._key).tobytes()
    if seed is not None:
        fit(first, images)
        check_same(again, first)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    fit(again, images, backup_dir=tmp_path)  # all is done
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    rates = again.evaluate(images.x_test, images.y_test, verbose=0)
    assert rates["retention"].rate > 0.5


@once
def test_a_backup_of_something_else_is_refused(
    student: Any, images: Images, tmp_path: Path
) -> None:
    defence = adapted(student, images)
    stopped(defence, images, tmp_path, after=9)
    for name, value in (("ratios", {"conv1": 0.5}), ("head", "pair"), ("seed", 1)):
        other = adapted(student, images, **{name: value})
        message = f"holds the backup of another fit, which differs in {name}. .*remove this one"
        with pytest.raises(ValueError, match=message):
            fit(other, images, backup_dir=tmp_path)
    with pytest.raises(ValueError, match="differs in images_per_class"):
        fit(defence, images, backup_dir=tmp_path, images_per_class=7)
    half = Images(images.x_train[::2], images.y_train[::2], images.x_test, images.y_test)
    with pytest.raises(ValueError, match="other training images"):
        fit(defence, half, backup_dir=tmp_path)
    before = [layer.get_weights() for layer in student.layers]
    try:
        student.layers[-1].set_weights([w + 1 for w in student.layers[-1].get_weights()])
        with pytest.raises(ValueError, match="differs in Student's weights"):
            fit(defence, images, backup_dir=tmp_path)
    finally:
        for layer, weights in zip(student.layers, before, strict=True):
            layer.set_weights(weights)
    fit(defence, images, backup_dir=tmp_path)


@once
def test_a_task_of_another_fit_is_refused(student: Any, images: Images, tmp_path: Path) -> None:
    """Even where all arguments are the same, and only what was drawn is not."""
    folders = [tmp_path / name for name in ("own", "other")]
    defences = [adapted(student, images, seed=None) for _ in folders]
    for defence, folder in zip(defences, folders, strict=True):
        stopped(defence, images, folder, after=9)
    task = sorted(folders[1].glob("task-*"))[0].name
    (folders[0] / task).write_bytes((folders[1] / task).read_bytes())
    with pytest.raises(ValueError, match=r"is of another fit\. Remove this file"):
        fit(defences[0], images, backup_dir=folders[0])
    (folders[0] / task).unlink()
    fit(defences[0], images, backup_dir=folders[0])


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")
def test_one_process_at_a_time(student: Any, images: Images, tmp_path: Path) -> None:
    with (
        backup.Backup(tmp_path, {}),
        pytest.raises(ValueError, match=r"in use by another process\. Wait for it"),
    ):
        fit(adapted(student, images), images, backup_dir=tmp_path)
    fit(adapted(student, images), images, backup_dir=tmp_path)


def test_a_search_without_a_seed_is_warned_of(student: Any, images: Images, tmp_path: Path) -> None:
    defence = adapted(student, images, seed=None)
    defence.search_history = pd.DataFrame()
    with pytest.warns(UserWarning, match=r"searched without a `seed`.*ratios=.*head_layer="):
        fit(defence, images, backup_dir=tmp_path)


def test_a_backup_is_no_file(student: Any, images: Images, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ValueError, match=r"`backup_dir` is a file\. Give the name of a folder"):
        fit(adapted(student, images), images, backup_dir=tmp_path / "notes")


def test_a_folder_with_other_files_is_left_alone(
    student: Any, images: Images, tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="files that are no backup"):
        fit(adapted(student, images), images, backup_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


DAMAGE = ["cut", "first", "middle", "last", "other", "array", "text"]


@pytest.mark.parametrize("name", ["start.npz", "data.npz", "task"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_backup_is_refused(
    name: str, damage: str, student: Any, images: Images, tmp_path: Path
) -> None:
    defence = adapted(student, images)
    stopped(defence, images, tmp_path, after=9)
    path = sorted(tmp_path.glob("task-*"))[0] if name == "task" else tmp_path / name
    content = path.read_bytes()
    middle = len(content) // 2
    if damage == "cut":
        path.write_bytes(content[:middle])
    elif damage == "other":
        np.savez(path, something=np.zeros(3))
    elif damage == "array":
        with open(path, "wb") as file:
            np.save(file, np.zeros(3))
    elif damage == "text":
        path.write_text("mine")
    else:
        start = {"first": 0, "middle": middle, "last": len(content) - 60}[damage]
        flipped = bytes(byte ^ 255 for byte in content[start : start + 100])
        path.write_bytes(content[:start] + flipped + content[start + 100 :])
    with pytest.raises(ValueError, match=r"is damaged.*to begin anew"):
        fit(defence, images, backup_dir=tmp_path)


@pytest.mark.parametrize("change", ["nan", "shape", "missing", "text"])
def test_a_result_that_no_task_gives_is_refused(
    change: str, student: Any, images: Images, tmp_path: Path
) -> None:
    defence = adapted(student, images)
    stopped(defence, images, tmp_path, after=9)
    path = sorted(tmp_path.glob("task-*"))[0]
    with np.load(path) as file:
        arrays = dict(file)
    if change == "nan":
        arrays["kernel"][0, 0, 0] = np.nan
    elif change == "shape":
        arrays["kernel"] = arrays["kernel"][:, :, :-1]
    elif change == "missing":
        del arrays["loss"]
    else:
        arrays["bias"] = arrays["bias"].astype(str)
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match="is damaged"):
        fit(defence, images, backup_dir=tmp_path)


def test_a_backup_knows_what_the_student_computes(
    student: Any, images: Images, tmp_path: Path
) -> None:
    """Other functions with the same weights, and another preprocessing, are something else."""
    stopped(adapted(student, images), images, tmp_path, after=9)
    halved = adapted(student, images, preprocessing=lambda x: x / 2)
    with pytest.raises(ValueError, match="of another Student, or preprocessing"):
        fit(halved, images, backup_dir=tmp_path)
    half = adapted(student, images, preprocessing=lambda x: x / 1)  # any callable will do
    fit(half, images, backup_dir=tmp_path)


def test_a_refused_fit_leaves_the_defence_as_it_was(
    student: Any, images: Images, tmp_path: Path
) -> None:
    options = {"seed": None, "members_per_class": 3}
    stopped(adapted(student, images, **options), images, tmp_path, after=9)
    defence = adapted(student, images, **options)
    fit(defence, images)
    expected = defence.explain(images.x_test, verbose=0)
    half = Images(images.x_train[::2], images.y_train[::2], images.x_test, images.y_test)
    with pytest.raises(ValueError, match="other training images, or in another order"):
        fit(defence, half, backup_dir=tmp_path)
    for name, values in defence.explain(images.x_test, verbose=0).items():
        np.testing.assert_array_equal(values, expected[name])


@once
def test_only_their_owner_reads_the_files(student: Any, images: Images, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    stopped(adapted(student, images), images, tmp_path, after=9)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert {"start.npz", "data.npz"} < set(modes)
    assert set(modes.values()) == {0o600}


def test_the_backup_has_no_key_and_leaves_a_new_one(
    student: Any, images: Images, tmp_path: Path
) -> None:
    defence = adapted(student, images, key=bytes(range(16)))
    stopped(defence, images, tmp_path, after=9)
    kept = [array for path in tmp_path.glob("*.npz") for array in np.load(path).values()]
    assert len(kept) > 10
    assert not any(bytes(range(16)) in array.tobytes() for array in kept)
    defence.rekey()
    key = np.array(defence._key).tobytes()
    assert key != bytes(range(16))
    fit(defence, images, backup_dir=tmp_path)
    assert np.array(defence._key).tobytes() == key


def test_weights_of_the_preprocessing_go_along(images: Images) -> None:
    normalization = keras.layers.Normalization()
    normalization.adapt(images.x_train.astype(np.float32))
    inputs = keras.Input(images.x_train.shape[1:])
    x = keras.layers.Conv2D(8, 3, activation="relu", trainable=False, name="conv")(inputs)
    x = keras.layers.Flatten()(x)
    student = keras.Model(inputs, keras.layers.Dense(6)(x))
    here, elsewhere = (
        adapted(student, images, preprocessing=normalization, ratios={"conv": 0.5})
        for _ in range(2)
    )
    fit(here, images)
    fit(elsewhere, images, executor=Forgetful())
    check_same(elsewhere, here)


def test_what_a_student_has_learned_to_scale_goes_along(images: Images) -> None:
    normalization = keras.layers.Normalization()
    normalization.adapt(images.x_train.astype(np.float32))
    inputs = keras.Input(images.x_train.shape[1:])
    x = keras.layers.Conv2D(8, 3, activation="relu", name="conv")(normalization(inputs))
    base = keras.Model(inputs, keras.layers.Flatten()(x), name="base")
    base.trainable = False
    student = keras.Sequential([keras.Input(images.x_train.shape[1:]), base])
    student.add(keras.layers.Dense(6))
    here, elsewhere = (adapted(student, images) for _ in range(2))
    fit(here, images)
    fit(elsewhere, images, executor=Forgetful())
    check_same(elsewhere, here)


def test_a_preprocessing_that_cannot_travel_is_refused(student: Any, images: Images) -> None:
    defence = adapted(student, images, preprocessing=lambda x: x / 1)
    with pytest.raises(ValueError, match="To share out the work, `preprocessing` must be a Keras"):
        fit(defence, images, executor=Forgetful())


@once
def test_nothing_is_kept_of_a_fit_that_is_over(student: Any, images: Images) -> None:
    fit(adapted(student, images), images, executor=Forgetful())
    assert not tasks._fitters
    with pytest.raises(RuntimeError, match="the cluster is gone"):
        fit(adapted(student, images), images, executor=Vanishing())
    assert not tasks._fitters


SCRIPT = """
    import sys, time
    import numpy as np
    import keras_tl_defense as ktd
    from keras_tl_defense._keras import keras
    from keras_tl_defense.ensemble import tasks

    if sys.argv[2] == "slowly":
        run = tasks.Fitter.__call__

        def slow(*args):
            time.sleep(0.3)
            return run(*args)

        tasks.Fitter.__call__ = slow
    folder = sys.argv[1]
    data = np.load(f"{folder}/images.npz")
    student = keras.models.load_model(f"{folder}/student.keras")
    student.layers[0].trainable = student.get_layer("base").trainable = False
    defence = ktd.DifferentiatorEnsemble(student, {"conv*": 0.5})
    defence.adapt(data["x"], data["y"], verbose=0)
    defence.fit(data["x"], data["y"], chunk_memory=1, backup_dir=f"{folder}/backup", verbose=0)
    defence.save(f"{folder}/defence.keras")
"""


@pytest.mark.slow
def test_a_killed_process_goes_on(student: Any, images: Images, tmp_path: Path) -> None:
    student.save(tmp_path / "student.keras")
    np.savez(tmp_path / "images.npz", x=images.x_train, y=images.y_train)
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path)]
    process = subprocess.Popen([*command, "slowly"])
    folder = tmp_path / "backup"
    while len(list(folder.glob("task-*"))) < 4 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {path.name for path in folder.glob("task-*")}
    assert 4 <= len(done) < 15
    kept = np.load(folder / sorted(done)[0])["kernel"]
    first = int(np.load(folder / sorted(done)[0])["bodies"][0])
    subprocess.run([*command, "fast"], check=True)
    defence = keras.models.load_model(tmp_path / "defence.keras")
    np.testing.assert_allclose(weights_of(defence)["kernel"][first], kept[0], rtol=1e-3, atol=1e-5)
    rates = defence.evaluate(images.x_test, images.y_test, verbose=0)
    assert rates["retention"].rate > 0.5
