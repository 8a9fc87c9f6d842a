"""What every attack of the library achieves against real Students, with and without the defence.

    python benchmarks/attacks.py DATA CACHE [--students lfw-flatten …] [--attacks 200]
        [--only pgd …]

`DATA` and `CACHE` are as for `protection.py`; ratios and the heads' layer are searched once for a
Student, everything else is the default. All attacks are on the same test images, and within the
same budgets: the Student's DSSIM budget, or a largest change of 8 or a Euclidean one of 500 grey
levels. Attacks on an own defence raise its score as far as the budget allows. Finished rows are
kept in `CACHE`: take another one after a change of the library. Writes `attacks.csv` and
`attacks.md`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from members import searched
from students import Case, load_case, parser, percent

import keras_tl_defense as ktd
from keras_tl_defense._keras import keras
from keras_tl_defense.attacks import (
    AdaptiveAttack,
    AttackResult,
    GeneralAttack,
    MaskedMimicryAttack,
    MimicryAttack,
    TargetAgnosticAttack,
    plan_attacks,
)
from keras_tl_defense.evaluation import evaluate_defence

STUDENTS = ("gtsrb-mid", "lfw-flatten", "lfw-mobilenet")
FACTORS = (0.5, 0.75, 1.0, 1.25)
MODEL = "all but the key"
SURELY = 10  # by which Carlini's and Wagner's logit exceeds the others
HIGH = 100.0  # a score that is never reached: as high as the budget allows
METHODS = ("fgsm", "pgd", "eot-pgd", "deepfool", "carlini-wagner")


class Attack(NamedTuple):
    """A row to be: what the attacker has, and how to attack each source, once or more often."""

    knows: str
    name: str
    make: Callable[[], AttackResult]
    tries: int = 1


def load_defence(case: Case, cache: Path, label: str = "defence", **options: Any) -> Any:
    """Read or make a calibrated defence of a Student, by default as searched, of all pairs."""
    path = cache / f"{case.name}-{label}.keras"
    if not path.exists():
        options = {**searched(case, cache), **options}
        defence = ktd.DifferentiatorEnsemble(
            case.student, seed=0, preprocessing=case.preprocessing, **options
        )
        defence.adapt(case.x_train, case.y_train, verbose=0)
        defence.fit(*case.augmented(), verbose=0)
        defence.calibrate(case.x_val, case.y_val, verbose=0)
        defence.save(path)
    return keras.models.load_model(path)


Known = Literal["nothing", "masks", "images"]


def rebuilt(case: Case, cache: Path, factor: float = 1.0, known: Known = "nothing") -> Any:
    """What an attacker builds of the validation images who guesses the ratios.

    Who knows the masks has all pairs, the defence's seed, and heads of the validation images; who
    knows the images that the defence was trained on has other masks, and heads of those images.
    """
    exact = known == "masks"
    found = searched(case, cache)
    ratios = {name: min(0.99, factor * ratio) for name, ratio in found["ratios"].items()}
    label = {"nothing": "", "masks": "-exact", "images": "-images"}[known]
    path = cache / f"{case.name}-rebuilt-{factor:g}{label}.keras"
    if not path.exists():
        own = ktd.DifferentiatorEnsemble(
            case.student,
            ratios,
            head_layer=found["head_layer"],
            members_per_class=None if exact else 10,
            seed=0 if exact else 1,
            preprocessing=case.preprocessing,
        )
        held_out = case.x_val, case.y_val
        own.adapt(*held_out if known == "nothing" else (case.x_train, case.y_train), verbose=0)
        own.fit(*case.augmented() if known == "images" else held_out, verbose=0)
        own.calibrate(case.x_val, case.y_val, verbose=0)
        own.save(path)
    return keras.models.load_model(path)


def attacks(case: Case, defence: Any, cache: Path, count: int, steps: int) -> Iterator[Attack]:
    """Every attack on a Student, from who knows least to who knows all."""
    x, y = case.x_test, case.y_test
    plan = plan_attacks(y, case.student_class(x), count, seed=1)
    source, target = x[plan.sources], x[plan.targets]
    own, wanted = y[plan.sources], y[plan.targets]
    at_cut = {"preprocessing": case.preprocessing}
    within: dict[str, Any] = {"budget": case.budget, "steps": steps, "batch_size": 32}
    given = (source, target, own, wanted)
    tries = plan.candidates.shape[1]
    others = plan.candidates.T.ravel()
    repeated = (np.tile(source, (tries, 1, 1, 1)), x[others], np.tile(own, tries), y[others])

    def mimicry(images: Any = given, **options: Any) -> AttackResult:
        attack = MimicryAttack(
            case.teacher, case.cut, steps=600, optimizer="adam", **at_cut, **options
        )
        if images is not None:
            return attack(*images, verbose=0)
        return attack.untargeted(source, x[plan.candidates], own, verbose=0)

    def general(model: Any, method: Any, **options: Any) -> AttackResult:
        return GeneralAttack(model, method, **at_cut, **options)(source, own, verbose=0)

    def adaptive(known: Any, **options: Any) -> AttackResult:
        return AdaptiveAttack(known, **within, **options)(source, own, wanted, verbose=0)

    def by_masks() -> AttackResult:
        attack = MaskedMimicryAttack(case.teacher, case.cut, defence, **{**within, "steps": 600})
        return attack(*given, verbose=0)

    def anything(known: Known = "nothing") -> AttackResult:
        attack = AdaptiveAttack(rebuilt(case, cache, known=known), confidence=HIGH, **within)
        return attack(source, own, verbose=0)

    def anything_often() -> AttackResult:
        attack = AdaptiveAttack(rebuilt(case, cache), confidence=HIGH, **within)
        return attack(repeated[0], *repeated[2:], verbose=0)

    def narrow(known: Any) -> AttackResult:
        attack = AdaptiveAttack(known, norm="linf", steps=steps, batch_size=32)
        return attack(source, own, wanted, verbose=0)

    def by_gradients() -> AttackResult:
        return GeneralAttack(defence, "pgd")(source, own, wanted, verbose=0)

    def guessed(factor: float = 1.0, known: Known = "nothing", **options: Any) -> AttackResult:
        return adaptive(rebuilt(case, cache, factor, known), confidence=HIGH, **options)

    knows = "the Teacher"
    yield Attack(knows, "mimicry, targeted", partial(mimicry, budget=case.budget))
    yield Attack(knows, "mimicry, non-targeted", partial(mimicry, None, budget=case.budget))
    made = partial(mimicry, repeated, budget=case.budget)
    yield Attack(knows, f"mimicry, any of {tries} targets", made, tries)
    yield Attack(knows, "mimicry, largest change 8", partial(mimicry, norm="linf"))
    if case.name != "lfw-mobilenet":  # whose Teacher comes without classes
        for method in METHODS:
            yield Attack(knows, f"{method} on the Teacher", partial(general, case.teacher, method))
        made = partial(general, case.teacher, "carlini-wagner", confidence=SURELY)
        yield Attack(knows, f"carlini-wagner on the Teacher, by {SURELY}", made)
    for budget in (None, 8):
        label = "free" if budget is None else f"largest change {budget}"
        made = partial(agnostic, case, source, own, budget)
        yield Attack(knows, f"target-agnostic, {label}", made)
    for method in METHODS:
        made = partial(general, case.student, method)
        yield Attack("the Student", f"{method} on the Student", made)
    made = partial(general, case.student, "carlini-wagner", confidence=SURELY)
    yield Attack("the Student", f"carlini-wagner on the Student, by {SURELY}", made)
    rebuilding = "the Student, how defences are built"
    for factor in FACTORS:
        label = f"adaptive, own defence with {factor:g} times the ratios"
        yield Attack(rebuilding, label, partial(guessed, factor))
    yield Attack(rebuilding, "adaptive, own defence, any other class", anything)
    often = f"adaptive, own defence, any of {tries} targets"
    yield Attack(rebuilding, often, anything_often, tries)
    yield Attack(rebuilding, "adaptive, own defence, all members", partial(guessed, members="all"))
    trained_on = "the Student, the images that the defence was trained on"
    yield Attack(trained_on, "adaptive, own masks", partial(guessed, known="images"))
    yield Attack(trained_on, "adaptive, own masks, any other class", partial(anything, "images"))
    masks = "the Student, the masks"
    yield Attack(masks, "adaptive, own heads", partial(guessed, known="masks"))
    yield Attack(masks, "mimicry of sampled members", by_masks)
    for members in ("fixed", "sampled"):
        made = partial(adaptive, defence, members=members)
        yield Attack(MODEL, f"adaptive, {members} members", made)
    yield Attack(MODEL, "adaptive, largest change 8", partial(narrow, defence))
    yield Attack("all, the key, too", "pgd on the defence, largest change 8", by_gradients)
    asked = "answers only"
    for model in (case.student, defence):
        label = "defence" if model is defence else "Student"
        made = partial(by_questions, case, model, source, own)
        yield Attack(asked, f"hop-skip-jump on the {label}, nearest other class", made)


def agnostic(case: Case, source: np.ndarray, own: np.ndarray, budget: float | None) -> AttackResult:
    """Inputs for as many units of the cut as there are sources; drawn at random where more."""
    attack = TargetAgnosticAttack(
        case.teacher, case.cut, budget=budget, preprocessing=case.preprocessing
    )
    size = int(np.prod(case.teacher.get_layer(case.cut).output.shape[1:]))
    units = np.random.default_rng(0).choice(size, len(source), replace=len(source) > size)
    given = () if budget is None else (source, own)
    return attack(units.tolist(), *given, verbose=0)


def by_questions(case: Case, model: Any, source: np.ndarray, own: np.ndarray) -> AttackResult:
    """From the nearest validation image that is answered as another class, by answers alone."""
    if model is case.student:
        answered, given = case.student_class(case.x_val), {"preprocessing": case.preprocessing}
    else:
        answered, given = model.predict(case.x_val, verbose=0) - 1, {}
    pool = case.x_val.astype(np.float32)
    apart = np.stack([np.square(pool - image).sum(axis=(1, 2, 3)) for image in source])
    apart[(answered < 0) | (answered == own[:, None])] = np.inf
    nearest = apart.argmin(axis=1)
    attack = GeneralAttack(model, "hop-skip-jump", steps=10, **given)
    start, wanted = case.x_val[nearest], answered[nearest]
    return attack(source, own, wanted, x_start=start, verbose=0)


def measure(case: Case, defence: Any, attack: Attack) -> dict[str, Any]:
    """Attack, and see what the Student and the defence say."""
    result = attack.make()
    details = defence.explain(result.adversarial, verbose=0)
    if result.y_source is None:  # made from nothing: whatever the Student is sure of
        outputs = case.student.predict(case.prepared(result.adversarial), verbose=0)
        shifted = np.exp(outputs - outputs.max(axis=1, keepdims=True))
        reached = (shifted / shifted.sum(axis=1, keepdims=True)).max(axis=1) >= 0.95
    else:
        reached = result.reached(details["student_class"])
    votes = details["disagreements"] < defence.reject_threshold
    hits = {
        "undefended": reached,
        "votes": reached & votes,
        "calibrated": reached & details["accepted"],
    }
    if attack.knows == MODEL and result.members is not None and result.y_target is not None:
        found = [
            np.asarray(
                defence.white_box(
                    result.adversarial[s : s + 32].astype(np.float32),
                    result.members[s : s + 32],
                    result.y_target[s : s + 32],
                )["score"]
            )
            for s in range(0, len(reached), 32)
        ]
        hits["if drawn"] = reached & (np.concatenate(found) >= defence.calibration.threshold)
    row: dict[str, Any] = {"student": case.name, "knows": attack.knows, "attack": attack.name}
    for name, each in hits.items():
        hit = each.reshape(attack.tries, -1).any(axis=0)
        row |= {name: int(hit.sum()), "n": len(hit)}
    measure = np.asarray(result.dssim) if result.dssim is not None else np.array([np.nan])
    return {
        **row,
        "dssim": float(np.nanmedian(measure)),
        "seconds": result.seconds / len(reached) * attack.tries,
        "gradients": float(result.gradients),
    }


def markdown(table: pd.DataFrame) -> str:
    """For readers: a table for what the attacker has, with all Students below each attack."""
    lines = []
    for knows, part in table.groupby("knows", sort=False):
        drawn = [] if part["if drawn"].isna().all() else ["if drawn"]
        rates = ["undefended", "votes", "calibrated", *drawn]
        head = ["attack", "Student", *rates, "DSSIM, median", "s for an input"]
        lines += [f"The attacker has {knows}:", "", _line(head), "|---" * len(head) + "|"]
        for name, rows in part.groupby("attack", sort=False):
            for row in rows.to_dict("records"):
                cells = [
                    percent(np.arange(row["n"]) < row[rate]) if row[rate] == row[rate] else ""
                    for rate in rates
                ]
                likeness = f"{row['dssim']:.4f}" if row["dssim"] == row["dssim"] else ""
                cells += [likeness, f"{row['seconds']:.2g}"]
                lines.append(_line([str(name), row["student"], *cells]))
        lines.append("")
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Measure what is not in the cache yet, and write the table."""
    given = parser(__doc__, STUDENTS, attacks=200)
    given.add_argument("--only", nargs="+", default=[""], help="parts of names of attacks, in turn")
    given.add_argument("--steps", type=int, default=150, help="of attacks on a defence")
    arguments = given.parse_args()
    cache, rows = arguments.cache, []
    for name in arguments.students:
        case = load_case(name, arguments.data, cache)
        defence = load_defence(case, cache)
        clean = evaluate_defence(defence, case.x_test, case.y_test, verbose=0)
        print(f"{name}\n{clean.to_markdown()}", flush=True)
        known = list(attacks(case, defence, cache, arguments.attacks, arguments.steps))
        kept = f"attack-{name}-{arguments.attacks}-{arguments.steps}"
        paths = {a: cache / f"{kept}-{a.name}.json".replace(" ", "_") for a in known}
        for attack in [a for text in arguments.only for a in known if text in a.name]:
            if not paths[attack].exists():
                start = time.perf_counter()
                row = measure(case, defence, attack)
                paths[attack].write_text(json.dumps(row), encoding="utf-8")
                print(f"{row} in {time.perf_counter() - start:.0f} s", flush=True)
        done = (path for path in paths.values() if path.exists())
        rows += [json.loads(path.read_text(encoding="utf-8")) for path in done]
    table = pd.DataFrame([{"if drawn": np.nan, **row} for row in rows])
    table.to_csv(cache / "attacks.csv", index=False)
    (cache / "attacks.md").write_text(markdown(table), encoding="utf-8")
    print(markdown(table))


if __name__ == "__main__":
    main()
