"""What a defence answers in another process: loaded from its file, and served as a SavedModel."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

SCRIPT = """
import sys, numpy as np, tensorflow as tf
folder, names = sys.argv[1], sys.argv[2:]
x = np.load(f"{folder}/x.npy")
for name in names:
    exported = tf.saved_model.load(f"{folder}/serving/{name}/1")
    serve = exported.signatures["serving_default"]
    parts = [serve(tf.constant(x[i : i + 7], tf.float32)) for i in range(0, len(x), 7)]
    served = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
    np.savez(f"{folder}/{name}-served.npz", **served)
assert not any(name.startswith("keras_tl_defense") for name in sys.modules)
import keras_tl_defense
for name in names:
    defence = tf.keras.models.load_model(f"{folder}/{name}.keras")
    loaded = defence.explain(x, batch_size=5, verbose=0)
    np.savez(f"{folder}/{name}-loaded.npz", **loaded)
"""


def in_fresh_process(
    script: str, *arguments: Path | str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a script in a new Python, away from this folder."""
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
        cwd=tempfile.gettempdir(),
        capture_output=True,
        text=True,
    )


def check_elsewhere(defences: Mapping[str, Any], x: np.ndarray, folder: Path) -> None:
    """Assert that defences answer the same, loaded and served in a fresh process."""
    np.save(folder / "x.npy", x)
    for name, defence in defences.items():
        defence.save(folder / f"{name}.keras")
        exported = defence.export(folder / "serving" / name)
        assert exported == folder / "serving" / name / "1"
    done = in_fresh_process(SCRIPT, folder, *defences)
    assert done.returncode == 0, done.stderr
    for name, defence in defences.items():
        details = defence.explain(x, verbose=0)
        for kind, left_out in (("loaded", set()), ("served", {"members", "margins"})):
            other = np.load(folder / f"{name}-{kind}.npz")
            assert set(other) == set(details) - left_out, f"{name}, {kind}"
            for field in other:
                np.testing.assert_allclose(
                    other[field], details[field], 1e-4, 1e-4, err_msg=f"{name}, {kind}: {field}"
                )
