"""The search of ratios and of the layer that the heads read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import KEY, SIZE, Images, once, weights_of

import keras_tl_defense as ktd
from keras_tl_defense._keras import keras
from keras_tl_defense.data import Batches
from keras_tl_defense.ensemble import bank, search, trial
from keras_tl_defense.evaluation import plot_search

pytestmark = [
    pytest.mark.filterwarnings("ignore:The search's own attacks hardly"),
    pytest.mark.filterwarnings("ignore:No ratios were found that"),
]


@pytest.fixture(scope="module", autouse=True)
def quick() -> Any:
    """Fewer attacks and steps than users get, and a budget that lets them succeed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "_ATTACKS", 16)
        patch.setattr(trial, "_STEPS", 60)
        patch.setattr(trial, "_BUDGET", 0.15)
        yield


def adapted(student: Any, images: Images, **options: Any) -> Any:
    defence = ktd.DifferentiatorEnsemble(
        student, **{"retention": 0.9, "seed": 0, "key": KEY, "search_budget": 24, **options}
    )
    defence.adapt(images.x_train, images.y_train, verbose=0)
    return defence


@pytest.fixture(scope="module")
def searched(student: Any, images: Images, quick: Any) -> Any:
    assert ktd.DifferentiatorEnsemble(student).ratios == "auto"
    defence = adapted(student, images)
    defence.fit(images.x_train, images.y_train, verbose=0)
    return defence


def test_the_history_says_what_was_measured_and_chosen(searched: Any) -> None:
    history = searched.search_history
    assert list(history.columns) == [
        "step",
        "head_layer",
        "ratios",
        "acceptance_at_0.8",
        "acceptance_at_0.9",
        "acceptance_at_0.95",
        "auroc",
        "accuracy",
        "passes",
        "chosen",
    ]
    assert history["chosen"].sum() == 1
    chosen = history[history["chosen"]].iloc[0]
    assert chosen["ratios"] == searched.ratios != {}
    assert chosen["head_layer"] == searched.head_layer
    for name in history.columns[3:8]:
        assert history[name].between(0, 1).all()
    assert (history["acceptance_at_0.8"] <= history["acceptance_at_0.9"]).all()
    assert (history["acceptance_at_0.9"] <= history["acceptance_at_0.95"]).all()
    assert len(history) > 3


class Prescribed:
    """A trial whose measurements are known: two layers for the heads, two and three to prune."""

    cost, retentions, attack_success = 2.0, (0.9, 0.95, 0.975), 0.5
    layers = ({1: ["a", "b"], 2: ["a", "b", "c"]}, {1: "early", 2: "cut"})

    def __init__(self, *_: Any) -> None:
        pass

    def head_tensors(self, most_features: int) -> list[int]:
        return [tensor for tensor in (1, 2) if tensor <= most_features]

    def names(self, tensor: int) -> list[str]:
        return self.layers[0][tensor]

    def layer_name(self, tensor: int) -> str:
        return self.layers[1][tensor]

    def craft(self, *_: Any) -> None:
        pass

    def measure(self, tensor: int, ratios: dict[str, float]) -> trial.Measured:
        best = {1: {"a": 0.7, "b": 0.92}, 2: {"a": 0.5, "b": 0.0, "c": 0.85}}[tensor]
        away = sum(abs(ratios.get(name, 0) - ratio) for name, ratio in best.items())
        loss = 0.2 * tensor + 0.1 * away
        return trial.Measured((loss / 2, loss, 2 * loss), 0.9, 0.9)


def prescribed(images: Images, student: Any, patch: pytest.MonkeyPatch, **options: Any) -> Any:
    patch.setattr(search, "Trial", Prescribed)
    batches = Batches(
        images.x_train, images.y_train, shape=images.x_train.shape[1:], classes=6, pixels=True
    )
    return search.search_ratios(
        student,
        "flatten",
        batches,
        None,
        **{
            "head_layer": None,
            "retention": 0.95,
            "jitter": 1.0,
            "most_features": 2,
            "budget": 60,
            "seed": 0,
            "verbose": 0,
            **options,
        },
    )


def test_it_finds_the_ratios_with_the_fewest_accepted(
    images: Images, student: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.warns(UserWarning, match="let no more than 10%.* found let 20% pass"):
        found = prescribed(images, student, monkeypatch)
    assert (found.ratios, found.head_layer) == ({"a": 0.7, "b": 0.92}, "early")
    history = found.history
    steps = history["step"].tolist()
    assert steps[:6] == [*["head layer"] * 4, *["sensitivity"] * 2]
    assert set(steps[6:-1]) == {"step"}
    assert (steps[-1], history["ratios"].iloc[-1]) == ("nothing pruned", {})
    assert history["head_layer"].tolist() == [
        *["early"] * 2,
        *["cut"] * 2,
        *["early"] * (len(steps) - 4),
    ]
    losses = history[[f"acceptance_at_{r:g}" for r in Prescribed.retentions]].mean(axis=1)
    assert losses[history["chosen"]].item() == losses.min() < losses[4:].median()
    np.testing.assert_allclose(history["passes"], 2 * np.arange(1, len(steps) + 1))


@once
def test_it_stops_where_the_budget_ends(
    images: Images, student: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = prescribed(images, student, monkeypatch, budget=9)
    assert found.history["passes"].tolist() == [2, 4, 6, 8]
    assert found.history["chosen"].sum() == 1


def test_layers_that_heads_cannot_read_are_left_out(
    images: Images, student: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = prescribed(images, student, monkeypatch, most_features=1)
    assert set(found.history["head_layer"]) == {"early"}
    with pytest.raises(ValueError, match=r"more than 0 features.*Received: cut='flatten'"):
        prescribed(images, student, monkeypatch, most_features=0)


def test_the_budget_is_respected(searched: Any) -> None:
    history = searched.search_history
    assert history["passes"].is_monotonic_increasing
    assert history["passes"].iloc[-1] <= 24
    steps = np.diff(history["passes"], prepend=0)
    np.testing.assert_allclose(steps, steps[0])
    assert history["passes"].iloc[-1] + steps[0] > 24  # it could have taken no more
    assert not history.duplicated(["head_layer"]).all()
    keys = [(row.head_layer, *sorted(row.ratios.items())) for row in history.itertuples()]
    assert len(set(keys)) == len(keys)
    for row in history.itertuples():
        assert set(row.ratios.values()) <= {0.5, 0.7, 0.85, 0.92}


@once
def test_the_seed_decides(searched: Any, student: Any, images: Images) -> None:
    again = adapted(student, images)
    pd.testing.assert_frame_equal(again.search_history, searched.search_history, rtol=1e-3)
    assert (again.ratios, again.head_layer) == (searched.ratios, searched.head_layer)
    np.testing.assert_array_equal(
        weights_of(again)["filter_masks"], weights_of(searched)["filter_masks"]
    )


def test_what_was_found_is_used_saved_and_kept(
    searched: Any, images: Images, tmp_path: Path
) -> None:
    assert searched.evaluate(images.x_test, images.y_test, verbose=0)["retention"].rate > 0.5
    assert set(searched.sparsity()["layer"]) == set(searched.ratios)
    searched.save(tmp_path / "defence.keras")
    loaded = keras.models.load_model(tmp_path / "defence.keras")
    assert (loaded.ratios, loaded.head_layer) == (searched.ratios, searched.head_layer)
    np.testing.assert_array_equal(
        loaded.predict(images.x_test, verbose=0), searched.predict(images.x_test, verbose=0)
    )
    loaded.adapt(images.x_train, images.y_train, verbose=0)
    assert loaded.search_history is None  # it kept what it had
    assert loaded.ratios == searched.ratios


def test_a_layer_that_is_given_is_taken(student: Any, images: Images) -> None:
    defence = adapted(student, images, head_layer="pool1", search_budget=16)
    assert defence.head_layer == "pool1"
    assert set(defence.search_history["head_layer"]) == {"pool1"}
    assert set(defence.ratios) == {"conv1"}
    assert defence.search_history["passes"].iloc[-1] <= 16


@once
def test_few_images_will_do(student: Any, images: Images) -> None:
    few = Images(images.x_train[::2], images.y_train[::2], *images[2:])
    history = adapted(student, few, search_budget=6).search_history
    assert history.notna().all(axis=None)
    plot_search(history)


def test_too_few_images_of_a_class(student: Any, images: Images) -> None:
    keep = np.r_[0:20, 20:22, 40:120]
    with pytest.raises(ValueError, match=r"at least 3 images of every.*fewer than 3 .* class 1$"):
        adapted(student, Images(images.x_train[keep], images.y_train[keep], *images[2:]))
    with pytest.raises(ValueError, match="Add images of class 2"):
        adapted(student, Images(images.x_train[:40], images.y_train[:40], *images[2:]))


def test_a_student_that_knows_nothing(student: Any, images: Images) -> None:
    wrong = (student.predict(images.x_train, verbose=0).argmax(axis=1) + 1) % 6
    with pytest.raises(ValueError, match=r"answers rightly.*Received: 0 such images"):
        adapted(student, Images(images.x_train, wrong, *images[2:]))


def test_a_student_without_convolutions(images: Images) -> None:
    keras.utils.set_random_seed(0)
    dense = keras.layers.Dense(12, activation="relu", trainable=False, name="fc")
    student = keras.Sequential(
        [
            keras.Input((SIZE, SIZE, 3)),
            keras.layers.Rescaling(1 / 127.5, offset=-1),
            keras.layers.Flatten(),
            dense,
            keras.layers.Dense(6, name="head"),
        ]
    )
    student.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    student.fit(images.x_train.astype(np.float32), images.y_train, epochs=20, verbose=0)
    with pytest.raises(ValueError, match=r"No convolution before .*`ratios` yourself"):
        adapted(student, images)


def test_a_bank_that_is_refused_leaves_the_defence_as_it_was(
    student: Any, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    defence = ktd.DifferentiatorEnsemble(student, seed=0, search_budget=6)
    monkeypatch.setattr(bank, "_TOO_MANY_BYTES", 1000)
    with pytest.raises(ValueError, match="more than 9 features"):
        defence.adapt(images.x_train, images.y_train, verbose=0)
    assert (defence.ratios, defence.head_layer, defence.search_history) == ("auto", None, None)


@once
def test_it_warns_when_its_attacks_fail(
    student: Any, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "_BUDGET", 1e-7)
    monkeypatch.setattr(trial, "_STEPS", 2)
    with pytest.warns(UserWarning, match="hardly succeed.* 0% of them"):
        adapted(student, images, search_budget=6)


@once
def test_a_budget_for_nothing_but_the_first_candidate(student: Any, images: Images) -> None:
    defence = adapted(student, images, search_budget=1)
    assert defence.ratios == {"conv1": 0.5}
    assert len(defence.search_history) == 1


def test_nothing_is_known_before_adapt(student: Any, tmp_path: Path) -> None:
    defence = ktd.DifferentiatorEnsemble(student)
    assert (defence.ratios, defence.head_layer) == ("auto", None)
    assert defence.search_history is None
    x = np.zeros((1, SIZE, SIZE, 3))
    for use in (defence.predict, defence.sparsity, defence.export, defence.save):
        with pytest.raises(RuntimeError, match=r"not pruned yet. Call `adapt"):
            use(*{"predict": [x], "sparsity": []}.get(use.__name__, [tmp_path / "a.keras"]))
    for seed in (-1, "a", 1.5):
        with pytest.raises(ValueError, match=f"Received: seed={seed!r}"):
            ktd.DifferentiatorEnsemble(student, seed=seed)
    for budget in (0, -3, 1.5):
        with pytest.raises(ValueError, match=f"Received: search_budget={budget}"):
            ktd.DifferentiatorEnsemble(student, search_budget=budget)
