"""What importing the library does to a process: nothing."""

from __future__ import annotations

import os
import re

import pytest
from fresh_process import in_fresh_process


def test_the_environment_and_keras_stay_as_they_were() -> None:
    script = """
import os, sys
before = dict(os.environ)
import tensorflow as tf
mine = tf.keras.Model
import keras_tl_defense
after = {k: v for k, v in os.environ.items() if not k.startswith(("TF2_", "TPU_", "KMP_"))}
assert {k: v for k, v in before.items() if k in after} == after, set(after) ^ set(before)
assert tf.keras.Model is mine
assert "tensorflow_model_optimization" not in sys.modules
"""
    done = in_fresh_process(script)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(os.environ.get("TF_USE_LEGACY_KERAS") == "1", reason="Keras 3 has backends")
def test_another_backend_is_refused() -> None:
    done = in_fresh_process("import keras_tl_defense", KERAS_BACKEND="jax")
    assert done.returncode == 1
    assert "et the environment variable KERAS_BACKEND=tensorflow" in done.stderr
    assert re.search("Received: .*jax", done.stderr)


@pytest.mark.parametrize("first", ["keras_tl_defense", "tensorflow_model_optimization"])
def test_either_library_may_come_first(first: str) -> None:
    second = {"keras_tl_defense", "tensorflow_model_optimization"} - {first}
    script = f"""
import importlib, os
import tensorflow as tf
mine = tf.keras.Model
for name in ("{first}", "{second.pop()}"):
    before = os.environ.get("TF_USE_LEGACY_KERAS")
    importlib.import_module(name)
    if name == "keras_tl_defense":
        assert os.environ.get("TF_USE_LEGACY_KERAS") == before
assert tf.keras.Model is mine
from keras_tl_defense._keras import keras
assert keras.Model is mine
"""
    done = in_fresh_process(script)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(os.environ.get("TF_USE_LEGACY_KERAS") == "1", reason="of Keras 3")
def test_the_callback_leaves_tfmot_alone() -> None:
    script = """
import os, sys
import keras_tl_defense as ktd
before = os.environ.get("TF_USE_LEGACY_KERAS")
ktd.ActivationPruning, ktd.ActivationPruningSchedule(0.5), ktd.prune_low_activation
assert "tensorflow_model_optimization" not in sys.modules and "tf_keras" not in sys.modules
assert os.environ.get("TF_USE_LEGACY_KERAS") == before
"""
    done = in_fresh_process(script)
    assert done.returncode == 0, done.stderr


def test_without_distutils_it_says_what_to_install() -> None:
    """Python 3.12 has none; TFMOT imports it."""
    script = """
import sys
sys.modules["distutils"] = sys.modules["distutils.version"] = None
import keras_tl_defense as ktd
ktd.ActivationPruningSchedule(0.5)
"""
    done = in_fresh_process(script, TF_USE_LEGACY_KERAS="1")
    assert done.returncode == 1
    assert "Run `pip install setuptools`" in done.stderr
