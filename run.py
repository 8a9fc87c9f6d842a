"""Set everything up and run the demonstration or the tests: `python3 run.py demo|test`.

Needs Python 3.10 or newer and nothing else: it makes a virtual environment in `.venv`, installs the
library there with all that it needs, and runs. A second run finds the environment as it is.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
USAGE = """usage: python3 run.py demo [OPTIONS]   attack and defend a Student (demo --help: OPTIONS)
       python3 run.py test [--slow]    check the code, run the tests in both Keras generations; with
                                       --slow those, too, that take a minute or more each"""


def run(*command: str | Path, folder: Path = ROOT, **environment: str) -> None:
    """Run a command, in the project's folder by default; when it fails, stop with its exit code."""
    print("+", *command, *(f"[{k}={v}]" for k, v in environment.items()), flush=True)
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, env={**os.environ, **environment}
    )
    if done.returncode:
        sys.exit(done.returncode)


def set_up(extras: str) -> None:
    """Make the virtual environment and install the library, unless that was done before."""
    needs = [extras, sys.version, (ROOT / "setup.cfg").read_text(encoding="utf-8")]
    state = hashlib.sha256("\n".join(needs).encode()).hexdigest()
    stamp = VENV / f"installed{extras}"
    if PYTHON.exists() and stamp.exists() and stamp.read_text(encoding="utf-8") == state:
        return
    if not PYTHON.exists():
        try:
            run(sys.executable, "-m", "venv", VENV)
        except SystemExit:
            sys.exit("No virtual environment could be made. On Debian: apt install python3-venv")
    print("Installing TensorFlow and what else is needed: a minute or two, 2.5 GB.", flush=True)
    run(PYTHON, "-m", "pip", "install", "--quiet", "--editable", f".{extras}")
    stamp.write_text(state, encoding="utf-8")


def test(markers: tuple[str, ...]) -> None:
    """Lint, check types, and run tests with these markers in both generations of Keras."""
    run(PYTHON, "-m", "ruff", "check", ".")
    run(PYTHON, "-m", "ruff", "format", "--check", ".")
    run(PYTHON, "-m", "mypy")
    every_core = ("-n", "auto", "--dist", "worksteal")  # which leaves a file's tests together
    for marker in markers:
        for legacy in ("0", "1"):
            run(PYTHON, "-m", "pytest", *every_core, "-m", marker, TF_USE_LEGACY_KERAS=legacy)


def main(arguments: list[str]) -> None:
    """Run the command that the arguments name."""
    if sys.version_info < (3, 10):  # noqa: UP036 - whoever starts this may have any Python
        sys.exit(f"Python 3.10 or newer is needed. This is {sys.version.split()[0]}.")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    if arguments[:1] == ["demo"]:
        set_up("")
        run(PYTHON, "-m", "keras_tl_defense", *arguments, folder=Path.cwd())
    elif arguments in (["test"], ["test", "--slow"]):
        set_up("[dev]")
        test(("not slow", "slow") if "--slow" in arguments else ("not slow",))
    elif arguments in (["-h"], ["--help"]):
        print(USAGE)
    else:
        sys.exit(USAGE)


if __name__ == "__main__":
    main(sys.argv[1:])
