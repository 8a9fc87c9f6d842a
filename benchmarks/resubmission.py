"""How often a crafted image succeeds when the attacker may try again.

    python benchmarks/resubmission.py DATA CACHE [--students lfw-flatten …]

The same crafted image is sent 20 times, as it is, or with one value of one pixel changed by one
grey level each time; to a defence that draws by the key, and to one that draws at random, ten
differentiators for each class; it succeeds when one of the tries does. Attacks, `DATA` and `CACHE`
are those of `members.py`.
"""

from __future__ import annotations

import numpy as np
from members import STUDENTS, searched
from students import load_attacks, load_case, parser, percent

import keras_tl_defense as ktd

TRIES = (1, 5, 20)


def nudge(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Change one value of each image by one grey level."""
    nudged = images.copy()
    where = (np.arange(len(images)), *(rng.integers(0, n, len(images)) for n in images.shape[1:]))
    nudged[where] += np.where(nudged[where] < 255, 1, -1).astype(np.uint8)
    return nudged


def main() -> None:
    """Print a row for each Student, selection, decision and kind of attack."""
    arguments = parser(__doc__, STUDENTS).parse_args()
    tries = " | ".join(f"{count} tries" for count in TRIES)
    print(f"| Student | selection | sent | attack | decision | {tries} |")
    print("|---" * (5 + len(TRIES)) + "|", flush=True)
    for name in arguments.students:
        case = load_case(name, arguments.data, arguments.cache)
        attacks = load_attacks(case, arguments.cache, arguments.attacks)
        for selection in ("keyed", "random"):
            defence = ktd.DifferentiatorEnsemble(
                case.student,
                seed=0,
                key=bytes(16),
                preprocessing=case.preprocessing,
                members_per_class=10,
                selection=selection,
                **searched(case, arguments.cache),
            )
            defence.adapt(case.x_train, case.y_train, verbose=0)
            defence.fit(*case.augmented(), verbose=0)
            defence.calibrate(case.x_val, case.y_val, verbose=0)
            for sent in ("as it is", "one pixel changed"):
                for kind, result in attacks.items():
                    rng = np.random.default_rng(0)
                    images = result.adversarial
                    hits: dict[str, list[np.ndarray]] = {"votes": [], "calibrated": []}
                    for number in range(max(TRIES)):
                        # The first try is the crafted image itself.
                        changed = sent == "one pixel changed" and number > 0
                        tried = nudge(images, rng) if changed else images
                        details = defence.explain(tried, verbose=0)
                        reached = result.reached(details["student_class"])
                        votes = details["disagreements"] < defence.reject_threshold
                        hits["votes"].append(reached & votes)
                        hits["calibrated"].append(reached & details["accepted"])
                    for decision, all_tries in hits.items():
                        cells = [percent(np.any(all_tries[:count], axis=0)) for count in TRIES]
                        row = (name, selection, sent, kind, decision, *cells)
                        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
