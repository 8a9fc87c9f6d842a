"""What a crafted input costs an attacker in time and memory, with and without the defence.

    python benchmarks/attack_cost.py DATA CACHE [--students lfw-flatten] [--steps 20] [--images 32]

Each attack is made with the same number of steps on one batch of images. Seconds are medians of
five calls, taken in turn in one process, for one image and step; "times" is in relation to mimicry,
which needs neither the Student nor the defence. Memory is what a fresh process that has attacked
two images needs more at its peak (`VmHWM` of Linux with glibc) for the batch, for one image.
Writes `attack_cost.csv` and `attack_cost.json` to `CACHE`.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from attacks import load_defence
from latency import medians
from students import CASES, load_case

from keras_tl_defense.attacks import (
    AdaptiveAttack,
    GeneralAttack,
    MaskedMimicryAttack,
    MimicryAttack,
    plan_attacks,
)


def attacks(name: str, arguments: argparse.Namespace) -> dict[str, partial[Any]]:
    """Every attack on a Student, ready to be made, after all that it needs was loaded."""
    case = load_case(name, arguments.data, arguments.cache)
    defence = load_defence(case, arguments.cache)
    x, y = case.x_test[:1000], case.y_test[:1000]
    plan = plan_attacks(y, case.student_class(x), arguments.images, seed=1)
    source, target = x[plan.sources], x[plan.targets]
    own, wanted = y[plan.sources], y[plan.targets]
    size: dict[str, Any] = {"steps": arguments.steps, "batch_size": arguments.images}
    at_cut = {"preprocessing": case.preprocessing}
    mimicry = MimicryAttack(case.teacher, case.cut, optimizer="adam", **size, **at_cut)
    masked = MaskedMimicryAttack(case.teacher, case.cut, defence, **size)
    made: dict[str, partial[Any]] = {
        "mimicry, on the Teacher": partial(mimicry, source, target, own, wanted, verbose=0),
        "PGD, on the Student": partial(
            GeneralAttack(case.student, "pgd", **size, **at_cut), source, own, wanted, verbose=0
        ),
        "mimicry, members sampled": partial(masked, source, target, own, wanted, verbose=0),
    }
    for members in ("fixed", "sampled", "all"):
        attack = AdaptiveAttack(defence, members=members, **size)
        made[f"adaptive, members {members}"] = partial(attack, source, own, wanted, verbose=0)
    made["PGD, on the defence"] = partial(
        GeneralAttack(defence, "pgd", **size), source, own, wanted, verbose=0
    )
    return made


def peak() -> float:
    """MiB that this process has needed at most."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if "VmHWM" in line).split()[1]) / 1024


def memory(label: str, arguments: argparse.Namespace, name: str) -> float:
    """MiB for each image of the batch, of a fresh process."""
    given = [arguments.data, arguments.cache, "--students", name, "--alone", label]
    given += ["--images", arguments.images, "--steps", arguments.steps]
    command = [sys.executable, __file__, *map(str, given)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1]) / arguments.images


def main() -> None:
    """Measure every Student, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", type=Path, help="folder with the data sets and the Teachers")
    parser.add_argument("cache", type=Path, help="folder for Students, defences and results")
    parser.add_argument("--students", nargs="+", choices=CASES, default=["lfw-flatten"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        attack = attacks(arguments.students[0], arguments)[arguments.alone]
        attack.func(*(given[:2] for given in attack.args), verbose=0)
        ctypes.CDLL(None).malloc_trim(0)  # or what was freed would be used again, uncounted
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
        before = peak()
        attack()
        print(peak() - before)
        return
    rows = []
    for name in arguments.students:
        made = attacks(name, arguments)
        taken = medians({label: partial(_numbers, attack) for label, attack in made.items()}, 5)
        least = taken["mimicry, on the Teacher"]
        for label, seconds in taken.items():
            rows.append(
                {
                    "student": name,
                    "attack": label,
                    "ms for an image and step": 1e3 * seconds / arguments.images / arguments.steps,
                    "times": seconds / least,
                    "MiB for an image": memory(label, arguments, name),
                }
            )
            print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    table.to_csv(arguments.cache / "attack_cost.csv", index=False)
    table.to_json(arguments.cache / "attack_cost.json", orient="records")
    print(table.to_string(float_format="{:.3g}".format))


def _numbers(attack: Callable[[], Any]) -> np.ndarray:
    return np.asarray(attack().adversarial)


if __name__ == "__main__":
    main()
