"""Differentiators with unfrozen layers of their own, in a mid-layer Student, from end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import KEY, SIZE, Images, weights_of
from fresh_process import check_elsewhere

import keras_tl_defense as ktd
from keras_tl_defense._keras import keras
from keras_tl_defense.ensemble import bank

layers = keras.layers
RATIOS = {"body": 0.5, "own": 0.5, "fc": 0.6}


@pytest.fixture(scope="module")
def three(images: Images) -> Images:
    """Images of the first three classes."""
    train, test = images.y_train < 3, images.y_test < 3
    return Images(
        images.x_train[train], images.y_train[train], images.x_test[test], images.y_test[test]
    )


def build(extra: Any = None) -> Any:
    """A frozen convolution; a convolution and two Dense layers that were retrained."""
    inputs = keras.Input((SIZE, SIZE, 3))
    x = layers.Rescaling(1 / 127.5, offset=-1)(inputs)
    x = layers.Conv2D(6, 3, activation="relu", trainable=False, name="body")(x)
    x = layers.MaxPooling2D(name="pool")(x)
    x = layers.Conv2D(8, 3, activation="relu", name="own")(x)
    if extra is not None:
        x = extra(x)
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dense(10, activation="relu", name="fc")(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(x), name="mid")


@pytest.fixture(scope="module")
def mid(three: Images) -> Any:
    keras.utils.set_random_seed(0)
    student = build()
    student.compile(
        keras.optimizers.Adam(1e-2), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    student.fit(three.x_train.astype(np.float32), three.y_train, epochs=25, verbose=0)
    return student


def fitted(student: Any, three: Images, **options: Any) -> Any:
    options = {"iterations": 1, "seed": 0, "key": KEY, "tune": "unfrozen", **options}
    defence = ktd.DifferentiatorEnsemble(student, options.pop("ratios", RATIOS), **options)
    defence.adapt(three.x_train, three.y_train, verbose=0)
    defence.compile(optimizer=keras.optimizers.Adam(1e-3))
    defence.fit(three.x_train, three.y_train, epochs=2, verbose=0)
    return defence


@pytest.mark.parametrize(
    ("iterations", "head"),
    [
        pytest.param(1, "one_vs_rest", marks=pytest.mark.slow),
        (2, "pair"),
    ],
)
def test_end_to_end(iterations: int, head: str, mid: Any, three: Images, tmp_path: Path) -> None:
    before = [w.copy() for w in mid.get_weights()]
    defence = fitted(mid, three, iterations=iterations, head=head)
    for old, new in zip(before, mid.get_weights(), strict=True):
        np.testing.assert_array_equal(new, old)
    assert defence.ratios == RATIOS
    assert (defence.cut, defence.head_layer) == ("pool", "pool")
    rates = defence.evaluate(three.x_test, three.y_test, verbose=0)
    assert rates["student_accuracy"].rate > 0.9
    assert rates["retention"].rate > 0.7
    noise = np.random.default_rng(5).integers(0, 256, (20, SIZE, SIZE, 3))
    x = np.concatenate([three.x_test, noise]).astype(np.uint8)
    details = defence.explain(x, batch_size=7, verbose=0)
    np.testing.assert_array_equal(defence.predict(x, verbose=0), details["answer"])
    check_elsewhere({"defence": defence}, x, tmp_path)


def test_scores_are_those_of_networks_of_their_own(mid: Any, three: Images) -> None:
    """Every differentiator as a plain, thinner Keras model with the weights that it has."""
    defence = fitted(mid, three)
    weights = weights_of(defence)
    details = defence.explain(three.x_test, verbose=0)
    x = three.x_test.astype(np.float32)
    at_pool = keras.Model(mid.inputs[0], mid.get_layer("pool").output)(x).numpy()
    own = defence.get_layer("differentiators")
    stacks = {name: np.array(w) for name, w in own._top_weights.items()}
    (kept,) = (np.array(w) for w in own._top_kept.values())
    assert kept.shape == (3, 4)
    assert stacks["own/kernel"].shape == (3, 3, 3, 6, 4)
    assert all((stacks["own/kernel"][0] != stacks["own/kernel"][m]).any() for m in (1, 2))
    margins = np.zeros((3, len(x), 2))
    for member in range(3):
        inputs = keras.Input(at_pool.shape[1:])
        thin = layers.Conv2D(4, 3, activation="relu", name="own")(inputs)
        thin = layers.Dense(10, activation="relu", name="fc")(layers.Flatten()(thin))
        network = keras.Model(inputs, layers.Dense(2, name="head")(thin))
        for name in ("own", "fc"):
            parts = [stacks[f"{name}/{part}"][member] for part in ("kernel", "bias")]
            network.get_layer(name).set_weights(parts)
        head = [weights["kernel"][member].T, weights["bias"][member]]
        network.get_layer("head").set_weights(head)
        masked = at_pool * weights["filter_masks"][member]
        margins[member] = network(masked, training=False).numpy()
    assert weights["filter_masks"].shape == (3 + 4, 6)
    heads = zip(weights["reference_kernel"], weights["reference_bias"], strict=True)
    references = [
        (at_pool * mask).reshape(len(x), -1) @ kernel.T + bias
        for mask, (kernel, bias) in zip(weights["filter_masks"][3:], heads, strict=True)
    ]
    assert len(references) == 4
    assert not all(np.allclose(references[0], other) for other in references)
    rivals = np.mean(references, axis=0)
    assert (details["members"] < 3).all()
    for index, answered in enumerate(details["student_class"]):
        drawn = details["members"][index]
        said = [margins[m, index, list(defence.member_classes[m]).index(answered)] for m in drawn]
        others = np.delete(rivals[index], answered)
        score = np.mean(said) + 2 * rivals[index, answered] - 2.25 * max(others)
        assert details["score"][index] == pytest.approx(score, rel=1e-3, abs=1e-3)
        assert details["disagreements"][index] == sum(margin < 0 for margin in said)


def test_the_seed_decides_and_a_second_fit_begins_at_the_student(mid: Any, three: Images) -> None:
    defence = fitted(mid, three)
    first = weights_of(defence)
    defence.fit(three.x_train, three.y_train, epochs=2, verbose=0)
    for name, array in weights_of(defence).items():
        np.testing.assert_allclose(array, first[name], rtol=1e-3, atol=1e-4)


def test_compile_chooses_the_optimizer(mid: Any, three: Images) -> None:
    """One that does nothing leaves the Student's own weights, gathered to what is kept."""
    defence = ktd.DifferentiatorEnsemble(mid, {"own": 0.5}, tune="unfrozen", iterations=1, seed=0)
    defence.adapt(three.x_train, three.y_train, verbose=0)
    defence.compile(optimizer=keras.optimizers.SGD(0.0))
    defence.fit(three.x_train, three.y_train, epochs=1, verbose=0)
    own = defence.get_layer("differentiators")
    kernel, bias = mid.get_layer("own").get_weights()
    (kept,) = (np.array(w) for w in own._top_kept.values())
    for member, filters in enumerate(kept):
        np.testing.assert_allclose(
            np.array(own._top_weights["own/kernel"])[member], kernel[..., filters]
        )
        np.testing.assert_allclose(np.array(own._top_weights["own/bias"])[member], bias[filters])


def test_own_layers_lose_what_the_callback_prunes(mid: Any, three: Images) -> None:
    """Nothing is trained, so that the one activations and weights decide in both."""
    ratio, rounds = 0.6, 2
    defence = ktd.DifferentiatorEnsemble(
        mid, {"own": ratio, "fc": ratio}, tune="unfrozen", iterations=rounds, jitter=0, seed=0
    )
    defence.adapt(three.x_train, three.y_train, verbose=0)
    defence.compile(optimizer=keras.optimizers.SGD(0.0))
    defence.fit(three.x_train, three.y_train, epochs=1, verbose=0)
    own = defence.get_layer("differentiators")
    (filters,) = (np.array(w) for w in own._top_kept.values())
    kernels = np.array(own._top_weights["fc/kernel"])
    activations = ktd.ClassActivations(mid, ["own", "fc"])
    activations.adapt(three.x_train, three.y_train, verbose=0)
    for member, classes in enumerate(defence.member_classes):
        model = keras.models.clone_model(mid)
        model.set_weights(mid.get_weights())
        model.compile(keras.optimizers.SGD(0.0), "mse")
        schedule = ktd.ActivationPruningSchedule(ratio, rounds, steps_per_iteration=1)
        callback = ktd.ActivationPruning(activations, classes, schedule)
        x = three.x_train[:8].astype(np.float32)
        model.fit(x, np.zeros((8, 3)), batch_size=2, callbacks=[callback], verbose=0)
        left = np.flatnonzero(np.abs(model.get_layer("own").get_weights()[0]).sum(axis=(0, 1, 2)))
        np.testing.assert_array_equal(filters[member], left)
        inputs = np.isin(np.arange(72) % 8, left)
        kernel = model.get_layer("fc").get_weights()[0]
        assert np.count_nonzero(kernel) == 720 - 432
        np.testing.assert_array_equal(kernels[member], kernel[inputs])


def test_sparsity_counts_frozen_and_unfrozen_layers(mid: Any, three: Images) -> None:
    defence = fitted(mid, three)
    own = defence.get_layer("differentiators")
    weights = {name: np.array(w) for name, w in own._top_weights.items()}
    table = defence.sparsity()
    assert set(table["level"]) == {0}
    assert (table["differentiators"] == 3).all()
    rows = {row.layer: (row.units, row.kept) for row in table.itertuples()}
    assert list(rows) == ["body", "own", "fc"]
    assert rows["body"] == (6, 3)
    assert rows["own"] == (8, weights["own/kernel"].shape[-1]) == (8, 4)
    assert rows["fc"][0] == 3 * 3 * 8 * 10
    assert rows["fc"][1] == 720 - 432
    for kernel in weights["fc/kernel"]:
        assert 0 < np.count_nonzero(kernel) <= 720 - 432


@pytest.mark.filterwarnings("ignore:The search's own attacks hardly")
@pytest.mark.filterwarnings("ignore:No ratios were found that")
def test_ratios_are_searched_for_frozen_layers(
    mid: Any, three: Images, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from keras_tl_defense.ensemble import trial

    monkeypatch.setattr(trial, "_ATTACKS", 8)
    monkeypatch.setattr(trial, "_STEPS", 20)
    defence = fitted(mid, three, ratios="auto", retention=0.9, search_budget=6)
    assert set(defence.ratios) == {"body", "own", "fc"}
    assert (defence.ratios["own"], defence.ratios["fc"]) == (0.5, 0.5)
    assert set(defence.search_history["head_layer"]) == {"pool"}
    defence.save(tmp_path / "defence.keras")
    loaded = keras.models.load_model(tmp_path / "defence.keras")
    assert loaded.ratios == defence.ratios
    np.testing.assert_array_equal(
        loaded.predict(three.x_test, verbose=0), defence.predict(three.x_test, verbose=0)
    )


def test_too_much_memory_is_refused(mid: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank, "_TOO_MANY_BYTES", 3000)
    with pytest.raises(ValueError, match=r'GiB.*`tune="head"`.*Received: 3 differentiators'):
        ktd.DifferentiatorEnsemble(mid, RATIOS, tune="unfrozen")


def test_unfrozen_layers_that_will_not_do_are_refused_by_name() -> None:
    for odd in (
        layers.LayerNormalization(name="odd"),
        layers.SeparableConv2D(4, 3, name="odd"),
        layers.Conv2D(4, 3, groups=2, name="odd"),
    ):
        student = build(odd)
        with pytest.raises(ValueError, match=r"unfrozen layer 'odd' .*Received: layer='odd'"):
            ktd.DifferentiatorEnsemble(student, {"body": 0.5}, tune="unfrozen")
        with pytest.raises(ValueError, match="unfrozen layer 'odd'"):
            ktd.DifferentiatorEnsemble(student, tune="unfrozen")  # before any search
        assert ktd.DifferentiatorEnsemble(student, {"body": 0.5}).cut == "pool"


def test_a_student_with_operators(three: Images) -> None:
    inputs = keras.Input((SIZE, SIZE, 3))
    x = layers.Conv2D(6, 3, activation="relu", trainable=False, name="body")(inputs / 255)
    x = layers.MaxPooling2D(name="pool")(x)
    y = layers.Conv2D(6, 3, padding="same", activation="relu", name="own")(x)
    x = layers.GlobalAveragePooling2D()(x + y)
    student = keras.Model(inputs, layers.Dense(3, name="head")(x))
    defence = fitted(student, three, ratios={"body": 0.5, "own": 0.5})
    assert set(defence.ratios) == {"body", "own"}
    assert defence.explain(three.x_test, verbose=0)["margins"].shape == (len(three.x_test), 2)


@pytest.mark.parametrize(
    "options",
    [
        {"members_per_class": 1, "ensemble_size": 1},
        {"head": "pair", "mode": "vote"},
        {"head": "pair"},
    ],
)
def test_own_layers_go_with_every_kind_of_ensemble(
    options: dict[str, Any], mid: Any, three: Images, tmp_path: Path
) -> None:
    defence = fitted(mid, three, **options)
    answers = defence.predict(three.x_test, verbose=0)
    right = answers == three.y_test + 1
    assert right.mean() > 0.4
    assert (right | (answers == 0)).mean() > 0.8
    defence.save(tmp_path / "defence.keras")
    loaded = keras.models.load_model(tmp_path / "defence.keras")
    np.testing.assert_array_equal(loaded.predict(three.x_test, verbose=0), answers)


def test_a_student_without_retrained_layers_has_none_to_tune(student: Any) -> None:
    with pytest.raises(ValueError, match=r"no retrained layers .*Received: cut='dropout'"):
        ktd.DifferentiatorEnsemble(student, {"conv*": 0.5}, tune="unfrozen")


def test_the_layer_that_heads_read_is_not_for_choice(mid: Any) -> None:
    with pytest.raises(ValueError, match="Leave `head_layer` out"):
        ktd.DifferentiatorEnsemble(mid, RATIOS, tune="unfrozen", head_layer="body")
    with pytest.raises(ValueError, match=r"matches no prunable layer.*Those are: body, own, fc\."):
        ktd.DifferentiatorEnsemble(mid, {"head": 0.5}, tune="unfrozen")
    with pytest.raises(ValueError, match=r"matches no prunable layer.*Those are: body\."):
        ktd.DifferentiatorEnsemble(mid, {"own": 0.5})
