"""What importing the library does to a process: nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest


def in_fresh_process(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
        capture_output=True,
        text=True,
    )


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
