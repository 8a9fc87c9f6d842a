"""Pruning by activation with TensorFlow Model Optimization."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import Images
from test_pruning import build_model, check_removed, class_means, compiled, train

import keras_tl_defense as ktd
from keras_tl_defense._keras import LEGACY, keras

if LEGACY:
    import tensorflow_model_optimization as tfmot

legacy = pytest.mark.skipif(not LEGACY, reason="TFMOT works with the legacy Keras only")
CLASSES = (1, 4)


SCHEDULE = ktd.ActivationPruningSchedule(0.5, 2, steps_per_iteration=3)


class Pruned(NamedTuple):
    """A trained model that was wrapped, and the activations that it was pruned by."""

    wrapped: Any
    activations: Any
    stripped: Any
    metrics: Path


@pytest.fixture(scope="module")
def pruned(images: Images, tmp_path_factory: pytest.TempPathFactory) -> Pruned:
    model, logs = build_model(), tmp_path_factory.mktemp("logs")
    activations = class_means(model, images)
    wrapped = compiled(ktd.prune_low_activation(model, activations, CLASSES, SCHEDULE))
    callbacks = [
        tfmot.sparsity.keras.UpdatePruningStep(),
        tfmot.sparsity.keras.PruningSummaries(str(logs)),
    ]
    train(wrapped, images, callbacks)
    stripped = tfmot.sparsity.keras.strip_pruning(wrapped)
    return Pruned(wrapped, activations, stripped, logs / "metrics")


@pytest.mark.skipif(LEGACY, reason="of Keras 3")
def test_keras_3_is_told_of_the_callback(images: Images) -> None:
    model = build_model()
    activations = class_means(model, images)
    schedule = ktd.ActivationPruningSchedule(0.5)
    before = dict(os.environ)
    with pytest.raises(RuntimeError, match=r"callback `keras_tl_defense.ActivationPruning`"):
        ktd.prune_low_activation(model, activations, CLASSES, schedule)
    assert os.environ == before


@legacy
def test_tfmots_own_flow(pruned: Pruned, images: Images, tmp_path: Path) -> None:
    """Wrap, compile, fit with `UpdatePruningStep`, strip, save, gzip."""
    x = images.x_test.astype(np.float32)
    wrapped, stripped = pruned.wrapped, pruned.stripped
    np.testing.assert_array_equal(stripped(x), wrapped(x))
    assert [layer.name for layer in stripped.layers] == [
        layer.name.removeprefix("prune_low_activation_") for layer in wrapped.layers
    ]
    check_removed(stripped, pruned.activations, CLASSES, 0.5, images.x_test)
    for name in ("fc1", "head"):
        kernel = np.array(stripped.get_layer(name).kernel)
        assert np.sum(kernel == 0) == kernel.size // 2
    sizes = {}
    for label, model in (("pruned", stripped), ("whole", build_model())):
        path = tmp_path / f"{label}.h5"
        model.save(path, include_optimizer=False)
        sizes[label] = len(gzip.compress(path.read_bytes()))
    assert sizes["pruned"] < 0.85 * sizes["whole"]
    written = b"".join(path.read_bytes() for path in pruned.metrics.iterdir())
    assert b"prune_low_activation_conv1/mask:0/sparsity" in written


@legacy
def test_it_prunes_what_the_callback_prunes(pruned: Pruned, images: Images) -> None:
    other = compiled(build_model())
    pruning = ktd.ActivationPruning(pruned.activations, CLASSES, SCHEDULE)
    train(other, images, [pruning])
    for name in ("conv1", "conv2", "norm3", "norm4"):
        assert {"kernel", "gamma"} & set(pruning.masks[name])
        for weight, mask in pruning.masks[name].items():
            value = np.array(getattr(pruned.stripped.get_layer(name), weight))
            if weight in ("bias", "beta"):  # stays at its initial zero where no gradient comes
                assert not np.any(value[~mask])
            else:
                np.testing.assert_array_equal(value != 0, mask)


@legacy
@pytest.mark.parametrize("ending", [".keras", ".h5", ""])
def test_it_is_saved_and_loaded(
    pruned: Pruned, images: Images, tmp_path: Path, ending: str
) -> None:
    path = str(tmp_path / f"model{ending}")
    pruned.wrapped.save(path)
    with ktd.activation_prune_scope():
        loaded = keras.models.load_model(path)
    x = images.x_test.astype(np.float32)
    np.testing.assert_allclose(loaded(x), pruned.wrapped(x), atol=1e-5)
    if ending == ".keras":  # and trained on
        train(compiled(loaded), images, [tfmot.sparsity.keras.UpdatePruningStep()], epochs=1)
        stripped = tfmot.sparsity.keras.strip_pruning(loaded)
        check_removed(stripped, pruned.activations, CLASSES, 0.5, images.x_test)


@legacy
def test_layers_and_lists(images: Images, tmp_path: Path) -> None:
    model = build_model()
    activations = class_means(model, images)
    arguments = (activations, CLASSES, ktd.ActivationPruningSchedule(0.5, 1))
    conv, norm = model.get_layer("conv2"), model.get_layer("norm2")
    relu = keras.layers.ReLU()
    both = ktd.prune_low_activation([conv, norm, relu], *arguments)
    assert [type(layer).__name__ for layer in both] == ["PruneLowActivation"] * 2 + ["ReLU"]
    assert both[2] is relu
    alone = ktd.prune_low_activation(model.get_layer("conv1"), *arguments)
    script = keras.Sequential(
        [
            keras.Input((12, 12, 3)),
            alone,
            *both,
            keras.layers.Flatten(),
            keras.layers.Dense(6),
        ]
    )
    callbacks = [tfmot.sparsity.keras.UpdatePruningStep()]
    train(compiled(script), images, callbacks, epochs=1)
    script.save(tmp_path / "script.keras")
    with ktd.activation_prune_scope():
        script = keras.models.load_model(tmp_path / "script.keras")
    stripped = tfmot.sparsity.keras.strip_pruning(script)
    for name, weight in (("conv1", "bias"), ("conv2", "kernel"), ("norm2", "beta")):
        value = np.array(getattr(stripped.get_layer(name), weight))
        alive = value.reshape(-1, value.shape[-1]).any(axis=0)
        assert alive.sum() == len(alive) // 2


@legacy
def test_what_does_not_fit_is_refused(images: Images) -> None:
    model = build_model()
    activations = class_means(model, images)
    schedule = ktd.ActivationPruningSchedule(0.5, 1)
    arguments = (activations, CLASSES, schedule)
    for nothing in (model.get_layer("pool"), [model.get_layer("pool")]):
        with pytest.raises(ValueError, match="These activations prune nothing of pool"):
            ktd.prune_low_activation(nothing, *arguments)
    with pytest.raises(TypeError, match=r"Received: builtins\.int"):
        ktd.prune_low_activation(3, *arguments)
    frozen = keras.Input(model.input_shape[1:])
    guide = keras.Model(frozen, keras.layers.Dense(6)(model(frozen, training=False)))
    with pytest.raises(ValueError, match=r"'model' with `training=False`.*the callback"):
        ktd.prune_low_activation(guide, class_means(guide, images), CLASSES, schedule)
    with pytest.raises(TypeError, match=r"Received: pruning_schedule=0\.5"):
        ktd.prune_low_activation(model, activations, CLASSES, 0.5)
    with pytest.raises(ValueError, match="another model"):
        ktd.prune_low_activation(
            keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]), *arguments
        )
    other = ktd.prune_low_activation(keras.layers.Conv2D(99, 3, name="conv1"), *arguments)
    with pytest.raises(ValueError, match=r"'conv1' has 8 units there.*Received: a layer with 99"):
        other.build((None, 12, 12, 3))


@legacy
def test_mixed_precision_and_layers_stay_as_they_were(images: Images) -> None:
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        model = build_model()
        activations = class_means(model, images, ["conv2"])
        schedule = ktd.ActivationPruningSchedule(0.5, 1)
        wrapped = compiled(ktd.prune_low_activation(model, activations, CLASSES, schedule))
        train(wrapped, images, [tfmot.sparsity.keras.UpdatePruningStep()], epochs=1)
    finally:
        keras.mixed_precision.set_global_policy("float32")
    for name in ("conv2", "norm2"):
        assert not hasattr(model.get_layer(name), "get_prunable_weights")
    beta = tfmot.sparsity.keras.strip_pruning(wrapped).get_layer("norm2").beta
    assert np.sum(np.array(beta) != 0) == 5


@legacy
def test_nested_models(images: Images) -> None:
    model = build_model()
    activations = class_means(model, images)
    outer = keras.Sequential([keras.Input(model.input_shape[1:]), model])
    schedule = ktd.ActivationPruningSchedule(0.5, 1)
    wrapped = compiled(ktd.prune_low_activation(outer, activations, CLASSES, schedule))
    train(wrapped, images, [tfmot.sparsity.keras.UpdatePruningStep()], epochs=1)
    inner = tfmot.sparsity.keras.strip_pruning(wrapped).layers[0]
    check_removed(inner, activations, CLASSES, 0.5, images.x_test)


@legacy
def test_other_schedules_serve_us_and_ours_serves_theirs(images: Images) -> None:
    theirs = tfmot.sparsity.keras.ConstantSparsity(0.5, begin_step=1, frequency=1)
    small = keras.Sequential(
        [
            keras.Input((12, 12, 3)),
            keras.layers.Conv2D(8, 3, name="conv"),
            keras.layers.Flatten(),
            keras.layers.Dense(6),
        ]
    )
    wrapped = ktd.prune_low_activation(small, class_means(small, images, ["conv"]), CLASSES, theirs)
    train(compiled(wrapped), images, [tfmot.sparsity.keras.UpdatePruningStep()], epochs=1)
    kernel = np.array(tfmot.sparsity.keras.strip_pruning(wrapped).get_layer("conv").kernel)
    assert kernel.any(axis=(0, 1, 2)).sum() == 4
    ours = ktd.ActivationPruningSchedule(0.8, iterations=2, steps_per_iteration=2)
    assert isinstance(ours, tfmot.sparsity.keras.PruningSchedule)
    dense = keras.Sequential(
        [keras.Input((12, 12, 3)), keras.layers.Flatten(), keras.layers.Dense(6, name="only")]
    )
    model = compiled(tfmot.sparsity.keras.prune_low_magnitude(dense, pruning_schedule=ours))
    train(model, images, [tfmot.sparsity.keras.UpdatePruningStep()])
    with tfmot.sparsity.keras.prune_scope():
        again = keras.models.clone_model(model)
    assert again.layers[1].pruning_schedule.get_config() == ours.get_config()
    kernel = np.array(tfmot.sparsity.keras.strip_pruning(model).get_layer("only").kernel)
    assert abs(np.sum(kernel == 0) - 0.8 * kernel.size) <= 1
