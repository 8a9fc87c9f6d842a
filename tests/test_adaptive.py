"""Attackers who have the defence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import CLASSES, Images, build_student, fitted, once, train

import keras_tl_defense as ktd
from keras_tl_defense._keras import keras
from keras_tl_defense.attacks import (
    AdaptiveAttack,
    GeneralAttack,
    MaskedMimicryAttack,
    MimicryAttack,
)
from keras_tl_defense.attacks.members import MemberChoice


def attacked(images: Images) -> tuple[np.ndarray, ...]:
    """18 sources, their classes and those that they are to be taken for."""
    source = np.arange(0, len(images.y_test), len(images.y_test) // 18)[:18]
    own = images.y_test[source]
    return images.x_test[source], own, (own + 2) % CLASSES


def succeeded(defence: Any, result: Any) -> float:
    """Share that is accepted as the target, within budget."""
    answered = defence.predict(result.adversarial, verbose=0) - 1
    return float(np.mean(result.reached(answered)))


@pytest.mark.parametrize("members", [pytest.param("all", marks=once), "sampled"])
def test_who_has_the_defence_breaks_it_and_a_budget_hinders(
    members: Any, calibrated: Any, images: Images
) -> None:
    rates = []
    for budget in (1e-4, 1.0):
        attack = AdaptiveAttack(calibrated, members=members, samples=3, budget=budget, steps=200)
        rates.append(succeeded(calibrated, attack(*attacked(images), verbose=0)))
    assert rates[0] < rates[1]
    assert rates[1] >= 0.9


@once
def test_it_is_stronger_than_mimicry(calibrated: Any, images: Images) -> None:
    options = {"budget": 0.1, "steps": 200}
    base = calibrated.student.get_layer("base")
    source, own, wanted = attacked(images)
    like = np.stack([images.x_test[images.y_test == label][0] for label in wanted])
    mimicry = MimicryAttack(base, base.layers[-1].name, optimizer="adam", **options)(
        source, like, own, wanted, verbose=0
    )
    adaptive = AdaptiveAttack(calibrated, **options)(*attacked(images), verbose=0)
    assert succeeded(calibrated, adaptive) > succeeded(calibrated, mimicry)
    assert adaptive.within_budget.mean() > 0.9
    assert adaptive.gradients == 200


@once
def test_it_is_no_weaker_than_projected_gradients(calibrated: Any, images: Images) -> None:
    """Of as many steps within the same largest change, through the defence."""
    options = {"budget": 24, "steps": 40}
    passed = {}
    for attack in (
        AdaptiveAttack(calibrated, norm="linf", members="fixed", **options),
        GeneralAttack(calibrated, "pgd", **options),
    ):
        passed[type(attack)] = succeeded(calibrated, attack(*attacked(images), verbose=0))
    assert passed[AdaptiveAttack] >= passed[GeneralAttack] - 0.06 > 0.2, passed


@once
@pytest.mark.parametrize("members", ["all", "sampled"])
def test_all_members_that_know_the_target_hold(
    members: Any, calibrated: Any, images: Images
) -> None:
    """Those that were not drawn in the end, too."""
    given = attacked(images)
    attack = AdaptiveAttack(calibrated, members=members, samples=1, budget=1.0, steps=200)
    result = attack(*given, verbose=0)
    known = calibrated.member_classes
    knowing = np.stack([np.flatnonzero((known == label).any(axis=1)) for label in given[2]])
    assert knowing.shape == (18, CLASSES - 1)
    found = calibrated.white_box(result.adversarial, knowing, given[2])
    assert (np.array(found["margins"]) > 0).mean() > 0.9


def test_no_member_that_knows_the_target_is_left_out(student: Any, images: Images) -> None:
    """Where classes are known by different numbers of them, too."""
    defence = fitted(
        student, images, {"conv*": 0.5}, members_per_class=3, classes_per_member=4, ensemble_size=2
    )
    known, classes = defence.member_classes, np.arange(CLASSES)
    counts = [(known == label).any(axis=1).sum() for label in classes]
    assert min(counts) < max(counts)
    chosen = MemberChoice(defence, "all", 5, seed=0)(classes)(slice(0, CLASSES), 0)
    for label, members in zip(classes, chosen, strict=True):
        assert set(members) == set(np.flatnonzero((known == label).any(axis=1)))
    fixed = MemberChoice(defence, "fixed", min(counts), seed=0)(classes)
    for members in fixed(slice(0, CLASSES), 0):
        assert len(set(members)) == min(counts)


@once
@pytest.mark.parametrize("masked", [False, True])
def test_who_knows_the_draw_needs_no_other_members(
    masked: bool, calibrated: Any, images: Images
) -> None:
    """The members that were attacked accept; others may not."""
    source, own, wanted = attacked(images)
    options = {"members": "fixed", "samples": 3, "budget": 1.0, "steps": 200}
    if masked:
        base = calibrated.student.get_layer("base")
        like = np.stack([images.x_test[images.y_test == label][0] for label in wanted])
        attack: Any = MaskedMimicryAttack(base, base.layers[-1].name, calibrated, **options)
        result = attack(source, like, own, wanted, verbose=0)
    else:
        result = AdaptiveAttack(calibrated, **options)(source, own, wanted, verbose=0)
    assert result.members.shape == (18, 3)
    known = calibrated.member_classes[result.members]
    assert (known == wanted[:, None, None]).any(axis=2).all()
    found = calibrated.white_box(result.adversarial, result.members, wanted)
    score = np.array(found["score"])
    assert (score >= calibrated.calibration.threshold).mean() >= (0.6 if masked else 0.9)


@once
def test_masks_help_who_imitates(calibrated: Any, images: Images) -> None:
    """What the members read comes nearer to the target's than by mimicry of the Teacher alone."""
    source, own, wanted = attacked(images)
    like = np.stack([images.x_test[images.y_test == label][0] for label in wanted])
    base = calibrated.student.get_layer("base")
    given = (source, like, own, wanted)
    options = {"budget": 1.0, "steps": 200}
    results = [
        MimicryAttack(base, base.layers[-1].name, **options)(*given, verbose=0),
        MaskedMimicryAttack(base, base.layers[-1].name, calibrated, members="all", **options)(
            *given, verbose=0
        ),
    ]
    assert results[1].layer == base.layers[-1].name
    apart, accepted = [], []
    for result in results:
        looks = [
            np.array(
                calibrated.white_box(x.astype(np.float32), results[1].members, wanted)["features"]
            )
            for x in (result.adversarial, like)
        ]
        apart.append(np.linalg.norm(looks[0] - looks[1], axis=2).mean())
        accepted.append(succeeded(calibrated, result))
    assert apart[1] < apart[0]
    assert accepted[1] >= accepted[0]


@once
def test_a_student_with_softmax_is_no_harder(images: Images) -> None:
    keras.utils.set_random_seed(0)
    student = train(build_student(softmax=True), images)
    defence = fitted(student, images, {"conv*": 0.5})
    defence.calibrate(images.x_test, images.y_test, verbose=0)
    attack = AdaptiveAttack(defence, samples=3, budget=1.0, steps=200)
    assert succeeded(defence, attack(*attacked(images), verbose=0)) >= 0.9


@once
def test_votes_can_be_attacked(student: Any, images: Images) -> None:
    defence = fitted(student, images, {"conv*": 0.5})
    assert defence.decision == "count"
    attack = AdaptiveAttack(defence, members="all", budget=1.0, steps=200)
    assert succeeded(defence, attack(*attacked(images), verbose=0)) >= 0.8


@once
def test_any_other_class_is_easier_than_a_given_one(calibrated: Any, images: Images) -> None:
    source, own, wanted = attacked(images)
    attack = AdaptiveAttack(calibrated, budget=0.02, steps=100)
    given, free = attack(source, own, wanted, verbose=0), attack(source, own, verbose=0)
    assert not free.targeted
    assert succeeded(calibrated, free) >= succeeded(calibrated, given)
    assert succeeded(calibrated, free) > 0


@once
def test_a_score_may_be_raised_beyond_the_threshold(calibrated: Any, images: Images) -> None:
    source, own, wanted = attacked(images)
    scores = []
    for confidence in (0.5, 100):
        attack = AdaptiveAttack(calibrated, confidence=confidence, budget=1.0, steps=200)
        crafted = attack(source, own, wanted, verbose=0).adversarial
        scores.append(calibrated.explain(crafted, verbose=0)["score"].mean())
    assert scores[1] > scores[0] + 1


@once
def test_the_seed_decides_the_samples(calibrated: Any, images: Images) -> None:
    found = [
        AdaptiveAttack(calibrated, samples=2, steps=20, budget=0.2, seed=seed)(
            *attacked(images), verbose=0
        ).adversarial
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(found[0], found[1])
    assert (found[0] != found[2]).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"members": "drawn"}, "`members` must be one of"),
        ({"samples": 0}, "`samples` must be"),
        ({"confidence": 0}, "`confidence` must be"),
        ({"budget": 2}, "structural dissimilarity is in"),
        ({"steps": 0}, "`steps` must be"),
    ],
)
def test_bad_options(options: Any, message: str, calibrated: Any) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptiveAttack(calibrated, **options)


def test_bad_images(student: Any, calibrated: Any, images: Images) -> None:
    source, y_source, y_target = attacked(images)
    attack = AdaptiveAttack(calibrated, steps=1)
    with pytest.raises(ValueError, match="one label for each"):
        attack(source, y_source, y_target[:-1])
    with pytest.raises(ValueError, match=r"in 0..255"):
        attack(source / 255, y_source, y_target)
    with pytest.raises(ValueError, match=r"of another class.*y_source\[0\]=y_target\[0\]"):
        attack(source, y_source, y_source)
    votes = ktd.DifferentiatorEnsemble(student, 0.5, head="pair", mode="vote")
    votes.adapt(images.x_train, images.y_train, verbose=0)
    votes.fit(images.x_train, images.y_train, verbose=0)
    with pytest.raises(ValueError, match="mode='vote'"):
        AdaptiveAttack(votes)
    with pytest.raises(RuntimeError, match="Call `adapt` and `fit`"):
        AdaptiveAttack(ktd.DifferentiatorEnsemble(student, 0.5))
    with pytest.raises(TypeError, match="must be a `DifferentiatorEnsemble`"):
        AdaptiveAttack(student)
    other = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Flatten(name="flat")])
    with pytest.raises(ValueError, match="must take the images that the Student takes"):
        MaskedMimicryAttack(other, "flat", calibrated)
