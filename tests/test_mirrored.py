"""A defence made under a strategy that mirrors weights on several devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from conftest import KEY, Images
from fresh_process import in_fresh_process

import keras_tl_defense as ktd

SCRIPT = """
import sys, numpy as np, tensorflow as tf
devices = tf.config.list_physical_devices("CPU")
two = [tf.config.LogicalDeviceConfiguration()] * 2
tf.config.set_logical_device_configuration(devices[0], two)
import keras_tl_defense as ktd
from keras_tl_defense.ensemble import plan
for cost in ("_LOOP", "_CALL", "_ROW_GATHERED", "_COLUMN_GATHERED"):
    setattr(plan, cost, 0.0)  # so that even a small network runs compact
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
assert strategy.num_replicas_in_sync == 2
data = np.load(sys.argv[2])
with strategy.scope():
    student = tf.keras.models.load_model(sys.argv[1])
    defence = ktd.DifferentiatorEnsemble(student, {"conv1": 0.5}, seed=0, key=bytes(range(16)))
    defence.adapt(data["x"], data["y"], verbose=0)
    defence.fit(data["x"], data["y"], images_per_class=5, verbose=0)
    assert defence.get_layer("differentiators")._body._few._compact is not None
    details = defence.explain(data["x_test"], verbose=0)
np.savez(sys.argv[3], **details)
"""


def test_a_mirrored_scope_changes_nothing(student: Any, images: Images, tmp_path: Path) -> None:
    assert bytes(range(16)) == KEY
    defence = ktd.DifferentiatorEnsemble(student, {"conv1": 0.5}, seed=0, key=KEY)
    defence.adapt(images.x_train, images.y_train, verbose=0)
    defence.fit(images.x_train, images.y_train, images_per_class=5, verbose=0)
    expected = defence.explain(images.x_test, verbose=0)
    student.save(tmp_path / "student.keras")
    arrays = {"x": images.x_train, "y": images.y_train, "x_test": images.x_test}
    np.savez(tmp_path / "data.npz", **arrays)
    paths = [tmp_path / name for name in ("student.keras", "data.npz", "found.npz")]
    done = in_fresh_process(SCRIPT, *paths)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "found.npz")
    for name in ("answer", "members", "disagreements"):
        np.testing.assert_array_equal(found[name], expected[name])
    np.testing.assert_allclose(found["score"], expected["score"], rtol=1e-3, atol=1e-4)
