"""What the number of differentiators, their classes and their votes are worth, on real images.

    python benchmarks/members.py DATA CACHE [--students lfw-flatten …]

Mimicry at the cut, 600 steps, 300 attacks of each kind, on test images, as in `protection.py`,
whose `DATA` and `CACHE` these are. Ratios and the layer that the heads read are searched once for a
Student. Finished rows are kept in `CACHE` and made again when the library changed. Writes
`members.csv`, `members.md`, and for each Student `sizes-….csv` and `sizes-….png`: ensembles of 1 to
15 members that reject by one or two of their votes.
"""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from protection import cell, decisions, row_path
from students import CASES, Case, load_attacks, load_case, parser

import keras_tl_defense as ktd
from keras_tl_defense.evaluation import evaluate_ensemble_sizes

ROWS: dict[str, dict[str, Any]] = {
    "all pairs": {},
    "all pairs, pair heads": {"head": "pair"},
    "all pairs vote": {"head": "pair", "mode": "vote"},
    "10 for each class": {"members_per_class": 10},
    "5 for each class": {"members_per_class": 5},
    "groups of 3, alike": {"classes_per_member": 3},
    "groups of 3, random": {"classes_per_member": 3, "grouping": "random"},
    "groups of 3, alike, pair heads": {"classes_per_member": 3, "head": "pair"},
    "groups of 3, random, pair heads": {
        "classes_per_member": 3,
        "head": "pair",
        "grouping": "random",
    },
    "10 for each class, random selection": {"members_per_class": 10, "selection": "random"},
}
STUDENTS = [name for name in CASES if name != "lfw-mobilenet"]
KINDS = ("targeted", "non-targeted")


def searched(case: Case, cache: Path) -> dict[str, Any]:
    """The ratios and the layer of the heads that the search finds, kept in the cache."""
    path = row_path(cache, case.name, "searched", 0)
    if not path.exists():
        defence = ktd.DifferentiatorEnsemble(case.student, seed=0, preprocessing=case.preprocessing)
        defence.adapt(case.x_train, case.y_train, verbose=0)
        found = {"ratios": defence.ratios, "head_layer": defence.head_layer}
        path.write_text(json.dumps(found), encoding="utf-8")
    return dict(json.loads(path.read_text(encoding="utf-8")))


def measure(case: Case, label: str, attacks: Any, cache: Path) -> list[dict[str, Any]]:
    """Make one defence and measure it."""
    defence = ktd.DifferentiatorEnsemble(
        case.student,
        seed=0,
        key=bytes(16),
        preprocessing=case.preprocessing,
        **searched(case, cache),
        **ROWS[label],
    )
    start = time.perf_counter()
    defence.adapt(case.x_train, case.y_train, verbose=0)
    defence.fit(*case.augmented(), verbose=0)
    seconds = time.perf_counter() - start
    rows = decisions(case, label, defence, attacks)
    if label == "all pairs":
        sizes = evaluate_ensemble_sizes(defence, case.x_test, case.y_test, attacks, verbose=0)
        sizes.table.to_csv(cache / f"sizes-{case.name}.csv", index=False)
        sizes.plot().savefig(cache / f"sizes-{case.name}.png", dpi=150)
    return [{**row, "seconds": seconds} for row in rows]


def markdown(table: pd.DataFrame) -> str:
    """The table for readers: counts with Wilson intervals in percent."""
    lines = [
        "| Student | differentiators | how many | decision | retention | targeted success | "
        "non-targeted success | targeted answered rightly | non-targeted answered rightly | "
        "fitted in |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for _, row in table.iterrows():
        rates = [cell(row, "clean retention")]
        rates += [cell(row, f"{kind} defended_success") for kind in KINDS]
        rates += [cell(row, f"{kind} adversarial_accuracy") for kind in KINDS]
        cells = (row["student"], row["defence"], str(row["differentiators"]), row["decision"])
        lines.append("| " + " | ".join([*cells, *rates, f"{row['seconds']:.0f} s"]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what is not in the cache yet, and write the table."""
    given = parser(__doc__, STUDENTS)
    given.add_argument("--only", default="", help="measure rows whose name contains this")
    arguments = given.parse_args()
    cache = arguments.cache
    place = partial(row_path, cache, attacks=arguments.attacks)
    for name in arguments.students:
        case = load_case(name, arguments.data, cache)
        attacks = load_attacks(case, cache, arguments.attacks)
        for label in ROWS:
            path = place(f"members-{name}", label)
            if not path.exists() and arguments.only in label:
                rows = pd.DataFrame(measure(case, label, attacks, cache))
                rows.to_json(path, orient="records")
                print(markdown(rows), flush=True)
    paths = [place(f"members-{name}", label) for name in CASES for label in ROWS]
    table = pd.concat([pd.read_json(path) for path in paths if path.exists()])
    table.to_csv(cache / "members.csv", index=False)
    (cache / "members.md").write_text(markdown(table), encoding="utf-8")


if __name__ == "__main__":
    main()
