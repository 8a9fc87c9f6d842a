"""What each choice of ratios, heads and decision is worth, on four Students of real images.

    python benchmarks/protection.py DATA CACHE [--students lfw-flatten …] [--attacks 300]

`DATA` holds gtsrb32.npz, lfw64.npz and the Teachers; Students, crafted images and finished rows are
kept in `CACHE`, so that a run that was stopped goes on. Rows are made again when the library
changed, Students and crafted images are not. Attacks are mimicry at the cut, 600 steps, on test
images. Thresholds are calibrated on validation images. Writes `protection.csv` and `protection.md`
to `CACHE`.
"""

from __future__ import annotations

import hashlib
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tensorflow as tf
from scipy.ndimage import median_filter
from students import CASES, Case, load_attacks, load_case, parser, percent

import keras_tl_defense as ktd
from keras_tl_defense.attacks import AttackResult
from keras_tl_defense.ensemble.calibration import score_threshold
from keras_tl_defense.metrics import Auroc

UNIFORM = {
    "unpruned": {},
    "all 0.5": {"*conv*": 0.5},
    "all 0.7": {"*conv*": 0.7},
    "first 0.85": {"conv1*": 0.85},
}
HEADS = ("pair", "one_vs_rest")
AUTO = "auto, one_vs_rest"


def configurations(name: str) -> list[tuple[str, dict[str, Any]]]:
    """Names and arguments of the defences that are compared."""
    found: list[tuple[str, dict[str, Any]]] = []
    for label, ratios in UNIFORM.items():
        for head in HEADS:
            found.append((f"{label}, {head}", {"ratios": ratios, "head": head, "jitter": 0}))
    # The search does not depend on the head, so what it finds serves both.
    found += [
        (AUTO, {}),
        ("auto, pair", {"head": "pair", "ratios": "found"}),
        ("unpruned, heads as auto", {"ratios": "found", "unpruned": True}),
    ]
    if name == "gtsrb-mid":
        ratios = {"conv1*": 0.85, "conv3*": 0.5, "fc": 0.5}
        for rounds in (1, 5):
            found.append(
                (
                    f"first 0.85, unfrozen 0.5, {rounds} rounds",
                    {"ratios": ratios, "tune": "unfrozen", "iterations": rounds, "epochs": 1},
                )
            )
    return found


def measure(
    case: Case, label: str, options: dict[str, Any], attacks: dict[str, AttackResult]
) -> list[dict[str, Any]]:
    """A row for each decision."""
    options = dict(options)
    epochs = options.pop("epochs", 5)
    start = time.perf_counter()
    defence = ktd.DifferentiatorEnsemble(
        case.student, seed=0, preprocessing=case.preprocessing, **options
    )
    defence.adapt(case.x_train, case.y_train, verbose=0)
    adapted = time.perf_counter()
    x, y = case.augmented()
    defence.fit(x, y, epochs=epochs, verbose=0)
    fitted = time.perf_counter()
    seconds = {"seconds adapt": adapted - start, "seconds fit": fitted - adapted}
    return [{**row, **seconds} for row in decisions(case, label, defence, attacks)]


def decisions(
    case: Case, label: str, defence: Any, attacks: dict[str, AttackResult]
) -> list[dict[str, Any]]:
    """A row for the votes and one for the calibrated score; of vote mode only the votes."""
    kinds = {"votes": "count", "calibrated": "score"}
    kept = float("nan")
    if defence.mode == "vote":
        del kinds["calibrated"]
    else:
        kept = defence.calibrate(case.x_val, case.y_val, verbose=0).rate
    rows = []
    for kind, decision in kinds.items():
        if defence.mode != "vote":
            defence.decision = decision
        report = ktd.evaluate_defence(defence, case.x_test, case.y_test, attacks, verbose=0)
        row: dict[str, Any] = {
            "student": case.name,
            "defence": label,
            "decision": kind,
            "ratios": dict(defence.ratios),
            "head layer": defence.head_layer,
            "differentiators": len(defence.member_classes),
            "levels": defence.sparsity().groupby("level")["differentiators"].first().to_dict(),
            "validation retention": kept,
        }
        for rate in report.table.to_dict("records"):
            name = f"{rate['inputs']} {rate['metric']}"
            row[name], row[f"{name} n"] = rate["count"], rate["n"]
        if defence.mode != "vote":
            roc = report.roc().table
            for attack in attacks:
                own = roc[roc["inputs"] == attack]
                row[f"{attack} AUROC"] = float(own["auroc"].iloc[0])
                row[f"{attack} at 0.95"] = int(own.loc[own["asked"] == 0.95, "count"].iloc[0])
        rows.append(row)
    return rows


def transformations(case: Case, attacks: dict[str, AttackResult]) -> list[dict[str, Any]]:
    """The cheap alternative: the Student's own margin, also after a median filter or JPEG."""
    rows = []
    for label, transform in (
        ("the Student's own margin", lambda x: x),
        ("median 2×2", lambda x: median_filter(x, (1, 2, 2, 1))),
        ("median 3×3", lambda x: median_filter(x, (1, 3, 3, 1))),
        ("JPEG 50", jpeg),
    ):

        def margins(x: np.ndarray, classes: np.ndarray, transform: Any = transform) -> np.ndarray:
            logits = case.student.predict(case.prepared(transform(x)), verbose=0)
            own = logits[np.arange(len(x)), classes]
            logits[np.arange(len(x)), classes] = -np.inf
            return np.asarray(own - logits.max(axis=1))

        val, test = case.student_class(case.x_val), case.student_class(case.x_test)
        right = val == case.y_val
        threshold = score_threshold(margins(case.x_val[right], val[right]), 0.95)
        right = test == case.y_test
        honest = margins(case.x_test, test)
        row: dict[str, Any] = {
            "student": case.name,
            "defence": label,
            "decision": "calibrated",
            "clean retention": int(np.sum(honest[right] >= threshold)),
            "clean retention n": int(right.sum()),
            "clean clean_acceptance": int(np.sum(honest >= threshold)),
            "clean clean_acceptance n": len(test),
            "clean clean_accuracy": int(np.sum(honest[right] >= threshold)),
            "clean clean_accuracy n": len(test),
        }
        for kind, result in attacks.items():
            classes = case.student_class(result.adversarial)
            reached = result.reached(classes)
            crafted = margins(result.adversarial, classes)
            row[f"{kind} undefended_success"] = int(reached.sum())
            row[f"{kind} defended_success"] = int(np.sum(reached & (crafted >= threshold)))
            row[f"{kind} defended_success n"] = len(classes)
            own = np.sort(honest[right])[int(0.05 * right.sum())]
            row[f"{kind} at 0.95"] = int(np.sum(reached & (crafted >= own)))
            row[f"{kind} AUROC"] = Auroc.of(honest[right], crafted[reached]).auroc
        rows.append(row)
    return rows


def jpeg(x: np.ndarray) -> np.ndarray:
    """Images after JPEG of quality 50."""
    encoded = [tf.io.encode_jpeg(image, quality=50) for image in x]
    return np.stack([tf.io.decode_jpeg(image).numpy() for image in encoded])


def row_path(cache: Path, name: str, label: str, attacks: int) -> Path:
    """Where the rows of a Student and a defence are kept; of the library as it is now."""
    sources = sorted(Path(ktd.__file__).parent.rglob("*.py"))
    code = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:8]
    return cache / f"row-{code}-{name}-{attacks}-{label.replace(' ', '_')}.json"


def cell(row: Any, name: str) -> str:
    """A count with its Wilson interval in percent."""
    return percent(np.arange(int(row[f"{name} n"])) < row[name])


def markdown(table: pd.DataFrame) -> str:
    """The table for readers: counts with Wilson intervals in percent."""

    kinds = ("targeted", "non-targeted")
    lines = [
        "| Student | defence | decision | retention | clean acceptance | clean accuracy | "
        "targeted success | non-targeted success | successes where just 95 % of the test images "
        "are retained | AUROC |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for _, row in table.iterrows():
        clean = [cell(row, f"clean {m}") for m in ("retention", "clean_acceptance")]
        accuracy = row["clean clean_accuracy"] / row["clean clean_accuracy n"]
        success = [cell(row, f"{kind} defended_success") for kind in kinds]
        auroc = " / ".join(f"{row[f'{kind} AUROC']:.3f}" for kind in kinds)
        cells = (row["student"], row["defence"], row["decision"], *clean, f"{accuracy:.1%}")
        exact = " / ".join(f"{row[f'{kind} at 0.95']:.0f}" for kind in kinds)
        lines.append("| " + " | ".join([*cells, *success, exact, auroc]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what is not in the cache yet, and write the table."""
    given = parser(__doc__)
    given.add_argument("--only", default="", help="measure defences whose name contains this")
    arguments = given.parse_args()
    place = partial(row_path, arguments.cache, attacks=arguments.attacks)
    for name in arguments.students:
        case = load_case(name, arguments.data, arguments.cache)
        attacks = load_attacks(case, arguments.cache, arguments.attacks)
        for label, options in [*configurations(name), ("transformations", {})]:
            path = place(name, label)
            if path.exists() or arguments.only not in label:
                continue
            if options.get("ratios") == "found":
                if not place(name, AUTO).exists():
                    given.error(f"Measure {AUTO!r} first, which searches the ratios")
                known = pd.read_json(place(name, AUTO)).iloc[0]
                ratios = {} if options.pop("unpruned", False) else known["ratios"]
                options |= {"ratios": ratios, "head_layer": known["head layer"]}
            if label == "transformations":
                rows = transformations(case, attacks)
            else:
                rows = measure(case, label, options, attacks)
            pd.DataFrame(rows).to_json(path, orient="records")
            print(markdown(pd.DataFrame(rows)), flush=True)
    paths = [
        place(name, label)
        for name in CASES
        for label, _ in [*configurations(name), ("transformations", {})]
    ]
    table = pd.concat([pd.read_json(path) for path in paths if path.exists()])
    table.to_csv(arguments.cache / "protection.csv", index=False)
    (arguments.cache / "protection.md").write_text(markdown(table), encoding="utf-8")


if __name__ == "__main__":
    main()
