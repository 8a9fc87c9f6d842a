"""How far the frozen layers run compact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from conftest import Images, fitted

import keras_tl_defense as ktd
from keras_tl_defense._keras import keras
from keras_tl_defense.blocks import find_blocks
from keras_tl_defense.ensemble import plan as plan_module
from keras_tl_defense.ensemble.masked import MaskedBody
from keras_tl_defense.ensemble.member_bodies import MANY, MemberBodies
from keras_tl_defense.ensemble.plan import Plan, multiply_adds, plan_execution
from keras_tl_defense.graph import ModelGraph

layers = keras.layers


def plan(inputs: Any, x: Any, ratio: float = 0.7) -> tuple[ModelGraph, Plan]:
    graph = ModelGraph(keras.Model(inputs, layers.GlobalAveragePooling2D(name="pool")(x)))
    blocks = find_blocks(graph)
    return graph, plan_execution(graph, graph.output, blocks, {b.name: ratio for b in blocks})


def chain(size: int, filters: int) -> tuple[Any, Any]:
    inputs = x = keras.Input((size, size, 3))
    for number in range(3):
        x = layers.Conv2D(filters, 3, padding="same", activation="relu", name=f"c{number}")(x)
    return inputs, x


def test_many_positions_run_compact() -> None:
    graph, found = plan(*chain(112, 64))
    assert found.split is not None
    ran = {graph.steps[number].name for number in graph.ancestors(found.split)}
    assert {"c0", "c1", "c2"} <= ran
    assert not found.late


def test_few_positions_run_masked() -> None:
    _, found = plan(*chain(8, 16))
    assert found.split is None


def test_wide_layers_with_few_positions_come_after_the_split() -> None:
    inputs, x = chain(112, 64)
    x = layers.AveragePooling2D(56, name="small")(x)
    for number in range(2):
        x = layers.Conv2D(512, 3, padding="same", activation="relu", name=f"late{number}")(x)
    graph, found = plan(inputs, x)
    assert found.split is not None
    ran = {graph.steps[number].name for number in graph.ancestors(found.split)}
    assert "c2" in ran
    assert "late1" not in ran


def test_outputs_are_dropped_late_where_there_are_few_positions() -> None:
    inputs = x = keras.Input((14, 14, 256))
    for number in range(3):
        x = layers.Conv2D(512, 3, padding="same", name=f"c{number}")(x)
    _, found = plan(inputs, layers.Conv2D(512, 3, strides=3, name="few")(x))
    assert found.late == {"few"}


def test_what_only_a_sum_follows_stays_wide() -> None:
    inputs = keras.Input((56, 56, 3))
    x = layers.Conv2D(64, 3, padding="same", name="first")(inputs)
    y = layers.Conv2D(64, 1, name="inner")(x)
    y = layers.BatchNormalization()(layers.Conv2D(64, 1, name="last")(y))
    _, found = plan(inputs, layers.Add()([x, y]))
    assert "last" in found.masked
    assert "inner" not in found.masked


def test_nothing_pruned_runs_nothing() -> None:
    graph = ModelGraph(keras.Model(*chain(16, 4)))
    assert plan_execution(graph, graph.output, [], {}) == Plan(None)


def test_the_split_changes_nothing() -> None:
    inputs, x = chain(112, 64)
    x = layers.AveragePooling2D(28)(x)
    x = layers.Conv2D(512, 3, name="last")(x)
    graph = ModelGraph(keras.Model(inputs, layers.Flatten()(x)))
    blocks = find_blocks(graph)
    ratios = {block.name: 0.7 for block in blocks}
    bodies = MemberBodies(graph, graph.output, blocks, ratios)
    found = plan_execution(graph, graph.output, blocks, ratios)
    assert found.split not in (None, graph.output)
    rng = np.random.default_rng(0)
    masks = rng.random((2, sum(block.units for block in blocks))) < 0.3
    images = rng.normal(0, 1, (3, 112, 112, 3)).astype(np.float32)
    rows, members = tf.constant([[0, 1], [2, 0]]), tf.constant([5, 6])
    values = graph.run(images, [graph.output])
    one = bodies(values, rows, members, tf.constant(masks), lambda *_: None)
    masked = MaskedBody(graph, graph.output, blocks)
    other = masked(values, rows, members, tf.constant(masks), lambda *_: None)
    other = tf.reshape(other, one.shape)
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    assert np.abs(one).max() > 0


def test_differentiators_with_many_images_share_their_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs, x = chain(24, 48)
    graph = ModelGraph(keras.Model(inputs, layers.Flatten()(x)))
    blocks = find_blocks(graph)
    ratios = {block.name: 0.6 for block in blocks}
    few = plan_execution(graph, graph.output, blocks, ratios)
    many = plan_execution(graph, graph.output, blocks, ratios, images=MANY, instead_of=few)
    assert few.split is None
    assert many.split is not None
    bodies = MemberBodies(graph, graph.output, blocks, ratios)
    masked = MaskedBody(graph, graph.output, blocks)
    ran: list[str] = []
    for name in ("_few", "_many"):
        monkeypatch.setattr(bodies, name, Noted(getattr(bodies, name), name, ran))
    rng = np.random.default_rng(0)
    masks = tf.constant(rng.random((2, 144)) < 0.4)
    values = graph.run(rng.normal(0, 1, (40, 24, 24, 3)).astype(np.float32), [graph.output])
    for count, way in ((MANY - 1, "_few"), (MANY, "_many"), (40, "_many")):
        rows = tf.constant(rng.integers(0, 40, (2, count)))
        given = (values, rows, tf.constant([3, 1]), masks, lambda *_: None)
        ran.clear()
        found = bodies(*given)
        assert ran == [way]
        expected = tf.reshape(masked(*given), found.shape)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        assert np.abs(found).max() > 0


def test_frozen_layers_of_a_precision_of_their_own(
    images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers in single precision under a head in another, run in two ways."""
    base = build_base(images)
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        inputs = keras.Input(images.x_train.shape[1:])
        head = layers.Dense(6, dtype="float32")(layers.Flatten()(base(inputs)))
        student = keras.Model(inputs, head)
        costs = {"_CALL": 0, "_ROW_GATHERED": 0, "_COLUMN_GATHERED": 0, "_LOOP": 50_000}
        for cost, value in costs.items():
            monkeypatch.setattr(plan_module, cost, value)
        defence = fitted(student, images, {"conv*": 0.5}, ensemble_size=3)
        body = defence.get_layer("differentiators")._body
        assert body._many is not body._few
        every = defence.predict(images.x_test, batch_size=64, verbose=0)
        alone = defence.predict(images.x_test[:5], batch_size=1, verbose=0)
        np.testing.assert_array_equal(alone, every[:5])
    finally:
        keras.mixed_precision.set_global_policy("float32")


def build_base(images: Images) -> Any:
    inputs = x = keras.Input(images.x_train.shape[1:])
    for number in range(2):
        x = layers.Conv2D(32, 3, padding="same", activation="relu", name=f"conv{number}")(x)
    base = keras.Model(inputs, x, name="base")
    base.trainable = False
    return base


class Noted:
    """Runs something and notes its name."""

    def __init__(self, run: Any, name: str, ran: list[str]) -> None:
        self.run, self.name, self.ran = run, name, ran

    def __call__(self, *given: Any) -> Any:
        self.ran.append(self.name)
        return self.run(*given)


def test_multiply_adds_of_known_layers() -> None:
    inputs = keras.Input((10, 10, 3))
    x = layers.Conv2D(4, 3, name="valid")(inputs)
    x = layers.DepthwiseConv2D(3, strides=2, padding="same", name="deep")(x)
    x = layers.Dense(5, name="dense")(layers.Flatten()(x))
    graph = ModelGraph(keras.Model(inputs, x))
    counts = {step.name: multiply_adds(graph, step) for step in graph.steps}
    assert counts["valid"] == 64 * 9 * 3 * 4
    assert counts["deep"] == 16 * 9 * 4
    assert counts["dense"] == 16 * 4 * 5


@pytest.mark.parametrize("options", [{}, {"head": "pair", "mode": "vote"}])
def test_a_defence_answers_the_same_compact(
    options: Any, student: Any, images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With gathers that cost nothing even a small network runs compact, served, too."""

    def made() -> Any:
        defence = ktd.DifferentiatorEnsemble(
            student, {"conv*": 0.5}, seed=0, key=bytes(16), **options
        )
        defence.adapt(images.x_train, images.y_train, verbose=0)
        defence.fit(images.x_train, images.y_train, verbose=0)
        return defence

    expected = made().explain(images.x_test, verbose=0)
    for cost in ("_LOOP", "_CALL", "_ROW_GATHERED", "_COLUMN_GATHERED"):
        monkeypatch.setattr(plan_module, cost, 0.0)
    defence = made()
    assert defence.get_layer("differentiators")._body._few._compact is not None
    found = defence.explain(images.x_test, verbose=0)
    exported = defence.export(tmp_path)
    served = tf.saved_model.load(str(exported)).signatures["serving_default"]
    answers = served(tf.constant(images.x_test, tf.float32))
    for name in ("answer", "student_class", "disagreements"):
        np.testing.assert_array_equal(found[name], expected[name])
        np.testing.assert_array_equal(answers[name], expected[name])
    np.testing.assert_allclose(found["score"], expected["score"], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found["margins"], expected["margins"], rtol=1e-3, atol=1e-4)
