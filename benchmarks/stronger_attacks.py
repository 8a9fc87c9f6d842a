"""What attackers who try harder achieve against the defence as it is made by default.

    python benchmarks/stronger_attacks.py DATA CACHE [--students gtsrb-mid …] [--attacks 100]

Targeted and non-targeted mimicry on test images: at the cut as in `protection.py`, with targets
that are like their sources instead of random ones, at the very layer that the heads read, with 1000
steps instead of 600, and with twice the DSSIM budget. `DATA` and `CACHE` are as for
`protection.py`.
"""

from __future__ import annotations

from typing import Any

from members import searched
from students import load_attacks, load_case, parser, percent

import keras_tl_defense as ktd


def main() -> None:
    """Print a row for each attack."""
    arguments = parser(__doc__, attacks=100).parse_args()
    print("| Student | attack | kind | undefended | defended, votes | defended, calibrated |")
    print("|---|---|---|---|---|---|", flush=True)
    for name in arguments.students:
        case = load_case(name, arguments.data, arguments.cache)
        defence = ktd.DifferentiatorEnsemble(
            case.student,
            seed=0,
            preprocessing=case.preprocessing,
            **searched(case, arguments.cache),
        )
        defence.adapt(case.x_train, case.y_train, verbose=0)
        defence.fit(*case.augmented(), verbose=0)
        defence.calibrate(case.x_val, case.y_val, verbose=0)
        variants: dict[str, dict[str, Any]] = {
            "at the cut, 600 steps": {},
            "likest targets": {"likest": True},
            f"at {defence.head_layer}": {"layer": defence.head_layer},
            "1000 steps": {"steps": 1000},
            f"DSSIM {2 * case.budget:g}": {"budget": 2 * case.budget},
        }
        for label, options in variants.items():
            attacks = load_attacks(case, arguments.cache, arguments.attacks, **options)
            for kind, result in attacks.items():
                details = defence.explain(result.adversarial, verbose=0)
                reached = result.reached(details["student_class"])
                votes = details["disagreements"] < defence.reject_threshold
                rates = (reached, reached & votes, reached & details["accepted"])
                cells = " | ".join(percent(rate) for rate in rates)
                print(f"| {name} | {label} | {kind} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
