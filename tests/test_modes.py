"""Votes of all pairs, groups of classes, partners that are drawn, and draws that are fresh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from conftest import CLASSES, KEY, Images, fitted, weights_of
from fresh_process import check_elsewhere
from plain_defence import PlainDefence, mixed
from scipy.stats import chisquare

import keras_tl_defense as ktd
from keras_tl_defense._keras import keras
from keras_tl_defense.attacks import AttackResult

RATIOS = {"conv1": 0.5, "conv2": 0.5}
KINDS: dict[str, dict[str, Any]] = {
    "partners": {"members_per_class": 3, "ensemble_size": 3},
    "groups": {"classes_per_member": 3, "members_per_class": 4},
    "groups apart": {"classes_per_member": 4, "head": "pair", "ensemble_size": 2},
    "fresh": {"selection": "random", "ensemble_size": 2},
    "votes": {"mode": "vote", "head": "pair"},
}


@pytest.fixture(scope="module")
def defences(student: Any, images: Images) -> dict[str, Any]:
    return {
        kind: fitted(student, images, RATIOS, jitter=0, **options)
        for kind, options in KINDS.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_members_answer_as_plain_networks(
    kind: str, defences: dict[str, Any], images: Images
) -> None:
    defence = defences[kind]
    x = mixed(images)
    details = defence.explain(x, verbose=0)
    expected = PlainDefence(defence, images, RATIOS).answer(
        x, details["student_class"], details["members"], defence.reject_threshold
    )
    for field in ("margins", "score"):
        np.testing.assert_allclose(details[field], expected[field], rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(details["disagreements"], expected["disagreements"])
    assert details["margins"].shape == details["members"].shape == (len(x), defence.ensemble_size)
    assert all(len(set(row)) == len(row) for row in details["members"])
    if kind != "votes":
        np.testing.assert_array_equal(details["answer"], expected["answer"])
    assert 0.1 < details["accepted"].mean() < 0.9


def test_how_many_know_a_class(defences: dict[str, Any]) -> None:
    partners = defences["partners"]
    assert partners.member_classes.shape == (9, 2)
    assert (np.bincount(partners.member_classes.ravel()) == 3).all()
    groups = defences["groups"]
    assert groups.member_classes.shape == (8, 3)
    assert weights_of(groups)["kernel"].shape == (8, 3, 20)
    apart = defences["groups apart"]
    assert apart.members_per_class == 3  # 15 groups of 4 there are, and 2 hold all classes
    assert np.bincount(apart.member_classes.ravel()).min() >= 3
    assert len(np.unique(apart.member_classes, axis=0)) == len(apart.member_classes) == 6


def test_partners_are_a_secret_of_the_key(student: Any, images: Images) -> None:
    drawn = []
    for key in (KEY, KEY, bytes(16), *[None] * 6):
        defence = ktd.DifferentiatorEnsemble(
            student, RATIOS, seed=0, key=key, members_per_class=2, ensemble_size=2
        )
        defence.adapt(images.x_train, images.y_train, verbose=0)
        drawn.append(defence.member_classes.tolist())
    assert drawn[0] == drawn[1]
    assert len({str(pairs) for pairs in drawn[3:]}) > 1


def all_pairs_say(defence: Any, x: np.ndarray, images: Images) -> np.ndarray:
    """The class that all its K-1 pairs say, of every pair asked by a plain network; -1 if none."""
    plain = PlainDefence(defence, images, RATIOS)
    kernel, bias = (weights_of(defence)[name] for name in ("kernel", "bias"))
    levels = np.array([1.0, 0.75, 0.5])[weights_of(defence)["levels"]]
    votes = np.zeros((len(x), CLASSES), int)
    for member, (first, second) in enumerate(defence.member_classes):
        margin = plain.features((first, second), x, levels[member]) @ kernel[member, 0]
        margin += bias[member, 0]
        votes[np.arange(len(x)), np.where(margin > 0, first, second)] += 1
    return np.where(votes.max(axis=1) == CLASSES - 1, votes.argmax(axis=1), -1)


def test_votes_are_those_of_all_pairs(defences: dict[str, Any], images: Images) -> None:
    defence = defences["votes"]
    x = mixed(images)
    details = defence.explain(x, verbose=0)
    expected = all_pairs_say(defence, x, images)
    np.testing.assert_array_equal(details["answer"], expected + 1)
    np.testing.assert_array_equal(details["accepted"], expected >= 0)
    other = (expected >= 0) & (expected != details["student_class"])
    assert other.sum() > 2  # it classifies what the Student takes for something else
    assert (details["disagreements"][other] > 0).all()
    one = defence.explain(x[other][:1], verbose=0)
    assert one["answer"] == details["answer"][other][0]
    with pytest.raises(RuntimeError, match="votes decide"):
        defence.calibrate(images.x_test, images.y_test, verbose=0)
    with pytest.raises(ValueError, match="all of them vote"):
        defence.explain(x, verbose=0, ensemble_size=2)


def test_a_report_of_votes_goes_by_what_they_answer(
    defences: dict[str, Any], images: Images
) -> None:
    defence = defences["votes"]
    x = mixed(images)
    said = defence.explain(x, verbose=0)
    other = said["accepted"] & (said["answer"] != said["student_class"] + 1)
    x, answer, student = x[other], said["answer"][other] - 1, said["student_class"][other]
    made = {"adversarial": x, "source": x, "target": x, "distance": 0 * answer, "dssim": 0 * answer}
    made["within_budget"] = answer >= 0
    attacks = {
        "answered rightly": AttackResult(**made, y_source=answer, y_target=student),
        "led astray": AttackResult(**made, y_source=student, y_target=answer),
    }
    report = ktd.evaluate_defence(defence, images.x_test, images.y_test, attacks, verbose=0)
    for name, succeeded in (("answered rightly", 0), ("led astray", 1)):
        assert report.rate(name, "accepted") == 1
        assert report.rate(name, "undefended_success") == 1 - succeeded
        assert report.rate(name, "defended_success") == succeeded
        assert report.rate(name, "adversarial_accuracy") == 1 - succeeded
    clean = report.details["clean"]
    kept = (clean["answer"] == clean["student_class"] + 1)[clean["right"]]
    assert report.rate("clean", "retention") == kept.mean()
    with pytest.raises(RuntimeError, match="no score decides"):
        report.roc()


@pytest.mark.parametrize("kind", KINDS)
def test_no_images_and_wrong_shapes(kind: str, defences: dict[str, Any], tmp_path: Path) -> None:
    served = tf.saved_model.load(str(defences[kind].export(tmp_path / "serving")))
    serve = served.signatures["serving_default"]
    for name, values in serve(tf.zeros((0, 12, 12, 3))).items():
        assert len(values) == 0, name
    for shape in ((2, 13, 12, 3), (2, 12, 12, 1)):
        with pytest.raises(tf.errors.InvalidArgumentError):
            serve(tf.zeros(shape))
    assert len(serve(tf.zeros((2, 12, 12, 3)))["answer"]) == 2


@pytest.mark.parametrize("size", [2, 3])
def test_heads_that_tell_nothing_agree_with_nobody(size: int, student: Any, images: Images) -> None:
    """One image of each class is left for nothing when it is held out."""
    first = np.unique(images.y_train, return_index=True)[1]
    defence = ktd.DifferentiatorEnsemble(
        student, RATIOS, head="pair", classes_per_member=size, ensemble_size=2, seed=0, key=KEY
    )
    defence.adapt(images.x_train[first], images.y_train[first], verbose=0)
    with pytest.warns(UserWarning, match="will reject honest ones"):
        defence.fit(images.x_train[first], images.y_train[first], verbose=0)
    details = defence.explain(mixed(images), verbose=0)
    assert (details["margins"] == 0).all()
    assert not details["accepted"].any()


def test_partners_are_not_told_by_warnings(student: Any, images: Images) -> None:
    first = np.unique(images.y_train, return_index=True)[1]
    defence = ktd.DifferentiatorEnsemble(student, RATIOS, members_per_class=1, ensemble_size=1)
    defence.adapt(images.x_train[first], images.y_train[first], verbose=0)
    with pytest.warns(UserWarning, match="Give more images of classes with few") as caught:
        defence.fit(images.x_train[first], images.y_train[first], verbose=0)
    assert not any("of their classes" in str(warning.message) for warning in caught)


def test_they_survive_saving_and_serving(
    defences: dict[str, Any], images: Images, tmp_path: Path
) -> None:
    kinds = {kind: defences[kind] for kind in ("groups apart", "partners", "votes")}
    check_elsewhere(kinds, mixed(images), tmp_path)
    for kind, defence in kinds.items():
        loaded = keras.models.load_model(tmp_path / f"{kind}.keras")
        np.testing.assert_array_equal(loaded.member_classes, defence.member_classes)
        before, after = defence.get_config(), loaded.get_config()
        assert before.pop("student")["class_name"] == after.pop("student")["class_name"]
        assert after == before


def test_fresh_draws_differ_and_are_uniform(defences: dict[str, Any], images: Images) -> None:
    defence = defences["fresh"]
    same = np.repeat(images.x_test[:1], 800, axis=0)
    drawn = defence.explain(same, batch_size=200, verbose=0)["members"]
    known = np.flatnonzero((defence.member_classes == images.y_test[0]).any(axis=1))
    times = np.bincount(drawn.ravel(), minlength=15)[known]
    assert times.sum() == drawn.size
    assert chisquare(times).pvalue > 1e-4
    again = defence.explain(same, batch_size=200, verbose=0)["members"]
    assert (again != drawn).any()


def test_a_new_key_draws_other_members(student: Any, images: Images) -> None:
    defence = fitted(student, images, RATIOS, members_per_class=4, ensemble_size=2)
    known = defence.member_classes
    before = defence.explain(images.x_test, verbose=0)["members"]
    defence.rekey()
    after = defence.explain(images.x_test, verbose=0)["members"]
    assert (before != after).any(axis=1).mean() > 0.5
    np.testing.assert_array_equal(after, defence.explain(images.x_test, verbose=0)["members"])
    np.testing.assert_array_equal(defence.member_classes, known)


def test_more_members_begin_with_the_same(defences: dict[str, Any], images: Images) -> None:
    defence = defences["partners"]
    three = defence.explain(images.x_test, verbose=0)
    for size in (1, 2):
        fewer = defence.explain(images.x_test, verbose=0, ensemble_size=size)
        np.testing.assert_array_equal(fewer["members"], three["members"][:, :size])
        np.testing.assert_allclose(fewer["margins"], three["margins"][:, :size], atol=1e-4)
    with pytest.raises(ValueError, match="only 3 differentiators know a class"):
        defence.explain(images.x_test, verbose=0, ensemble_size=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "vote"}, r"`head` is 'one_vs_rest'.*Received: mode='vote'"),
        ({"mode": "vote", "head": "pair", "members_per_class": 3}, "`members_per_class`"),
        ({"mode": "vote", "head": "pair", "classes_per_member": 3}, "`classes_per_member`"),
        ({"mode": "vote", "head": "pair", "ensemble_size": 3}, "`ensemble_size`"),
        ({"mode": "vote", "head": "pair", "reject_threshold": 2}, "`reject_threshold`"),
        ({"mode": "ballot"}, "`mode` must be one of"),
        ({"selection": "seeded"}, "`selection` must be one of"),
        ({"grouping": "k-means"}, "`grouping` must be one of"),
        ({"members_per_class": 6}, "`members_per_class` must be an integer in 1..5"),
        ({"members_per_class": 3, "ensemble_size": 4}, "only 3 differentiators know a class"),
        ({"classes_per_member": 6}, "`classes_per_member` must be an integer in 2..5"),
        (
            {"classes_per_member": 5, "members_per_class": 4},
            "so that no two are the same",
        ),
    ],
)
def test_what_does_not_go_together(student: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ktd.DifferentiatorEnsemble(student, RATIOS, **options)


def test_a_fresh_draw_stays_fresh(defences: dict[str, Any], images: Images, tmp_path: Path) -> None:
    """Loaded or served, the members change from answer to answer; the score tells it."""
    defence = defences["fresh"]
    defence.save(tmp_path / "defence.keras")
    loaded = keras.models.load_model(tmp_path / "defence.keras")
    served = tf.saved_model.load(str(defence.export(tmp_path / "serving")))
    serve = served.signatures["serving_default"]
    x = mixed(images)
    for answer in (lambda: loaded.explain(x, verbose=0), lambda: serve(tf.constant(x, "float32"))):
        first, second = (np.array(answer()["score"]) for _ in range(2))
        assert (first != second).mean() > 0.3


def test_what_is_not_ready_does_not_answer(student: Any, images: Images) -> None:
    x = images.x_test[:2].astype(np.float32)
    for ratios in ("auto", RATIOS):
        defence = ktd.DifferentiatorEnsemble(student, ratios)
        for answer in (defence, defence.call):
            with pytest.raises(RuntimeError, match="not pruned yet"):
                answer(x)
    defence.adapt(images.x_train, images.y_train, verbose=0)
    with pytest.raises(RuntimeError, match="not trained since"):
        defence(x)
    inputs = keras.Input(x.shape[1:])
    with pytest.raises(RuntimeError, match="not pruned yet"):
        ktd.DifferentiatorEnsemble(student)(inputs)


def test_what_is_fixed_cannot_be_set(defences: dict[str, Any]) -> None:
    for name in ("mode", "head", "selection", "grouping", "members_per_class"):
        with pytest.raises(AttributeError):
            setattr(defences["partners"], name, "random")


def test_many_differentiators_are_warned_of() -> None:
    inputs = keras.Input((12, 12, 3))
    x = keras.layers.Conv2D(2, 3, name="conv", trainable=False)(inputs)
    x = keras.layers.GlobalAveragePooling2D()(x)
    wide = keras.Model(inputs, keras.layers.Dense(200)(x))
    with pytest.warns(UserWarning, match="19900 differentiators.*`members_per_class=10`"):
        ktd.DifferentiatorEnsemble(wide, {"conv": 0.5})


def test_fewer_members_than_reject_are_refused(student: Any, images: Images) -> None:
    defence = fitted(student, images, RATIOS, reject_threshold=2, ensemble_size=3)
    with pytest.raises(ValueError, match=r"in 2\.\.5, because.*2 of them reject an input"):
        defence.explain(images.x_test, ensemble_size=1, verbose=0)


def test_members_are_not_known_before_they_are_drawn(student: Any) -> None:
    defence = ktd.DifferentiatorEnsemble(student, RATIOS, members_per_class=2, ensemble_size=2)
    with pytest.raises(RuntimeError, match="Call `adapt"):
        _ = defence.member_classes


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("partners", ["pairs of classes, 3 for each", "9 differentiators", "3 check an input"]),
        ("groups", ["groups of 3 classes, 4 or more for each class, by likeness", "1 of 4"]),
        ("votes", ["all pairs of classes; all vote", "pair heads", "answers what wins"]),
        ("fresh", ["2 check an input, random", "conv2: 5 of 10 kept"]),
    ],
)
def test_the_summary_says_what_it_is_made_of(
    kind: str, said: list[str], defences: dict[str, Any]
) -> None:
    lines: list[str] = []
    defences[kind].summary(print_fn=lines.append)
    (text,) = lines
    assert text.startswith(repr(defences[kind]))
    for words in [*said, "'student', 12×12×3", "frozen up to 'dropout'"]:
        assert words in text


def test_the_summary_says_what_comes_next(student: Any, images: Images) -> None:
    texts: list[str] = []
    defence = ktd.DifferentiatorEnsemble(student, {"conv1": 0.5}, seed=0)
    defence.summary(texts.append)
    defence.adapt(images.x_train, images.y_train, verbose=0)
    defence.summary(texts.append)
    defence.fit(images.x_train, images.y_train, verbose=0)
    defence.calibrate(images.x_test, images.y_test, retention=0.9, verbose=0)
    defence.summary(texts.append)
    assert "adapt(x_train, y_train)" in texts[0]
    assert "fit(x_train, y_train)" in texts[1]
    assert "calibrated to keep 90%" in texts[2]
    assert f"a score of at least {defence.calibration.threshold:.3f}" in texts[2]
    for secret in np.array(defence._key).tolist():
        assert str(abs(secret)) not in "".join(texts) + repr(defence)
