"""The command line: `python -m keras_tl_defense demo` and `sanity`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from keras_tl_defense.demo import DATA, Demo, DemoError
from keras_tl_defense.sanity import Sanity


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: What follows the program's name; defaults to `sys.argv`.

    Returns:
        0, 1 when the demonstration proves nothing or a check fails, 2 when it cannot run.
    """
    parser = argparse.ArgumentParser(prog="python -m keras_tl_defense", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="make a Student, attack it, defend it, attack it again",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--data", choices=DATA, default="synthetic", help="what to classify")
    demo.add_argument(
        "--data-root",
        type=Path,
        metavar="DIR",
        help="folder with gtsrb32.npz or the official GTSRB folders, or with lfw64.npz",
    )
    demo.add_argument(
        "--teacher",
        type=Path,
        metavar="FILE",
        help="Keras model of square RGB images in 0..255, for gtsrb and lfw",
    )
    demo.add_argument("--cut", default="flatten", help="last layer taken from the Teacher")
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("demo-output"),
        metavar="DIR",
        help="folder for the report, the pictures and the SavedModel",
    )
    demo.add_argument("--seed", type=int, default=0, help="of drawing, training and attacks")
    demo.add_argument("--attacks", type=int, default=60, metavar="N", help="attacks of each kind")
    sanity = commands.add_parser(
        "sanity",
        help="check that each attack does to an unguarded model what it says",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    sanity.add_argument("--out", type=Path, metavar="DIR", help="folder for the tables")
    sanity.add_argument("--seed", type=int, default=0, help="of drawing, training and attacks")
    sanity.add_argument("--images", type=int, default=60, metavar="N", help="for each attack")
    options = vars(parser.parse_args(arguments))
    command = options.pop("command")
    try:
        if command == "sanity":
            return 0 if Sanity(**options).run() else 1
        Demo(**options).run()
    except DemoError as failure:
        print(f"The demonstration failed. {failure}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
