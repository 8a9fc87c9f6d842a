"""Write a Keras file that is there whole or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def save_whole(write: Callable[[str], Any], filepath: str | Path, overwrite: bool) -> None:
    """Write a `.keras` file beside its place, then move it there.

    Args:
        write: Writes it under the name that it is given.
        filepath: Its place, ending in `.keras`.
        overwrite: Whether a file that is there may be replaced.

    Raises:
        ValueError: The name does not end in `.keras`, or the file exists and may not be replaced.
        OSError: The folder cannot be written.
    """
    path = Path(filepath)
    if path.suffix != ".keras":
        raise ValueError(
            "A defence is saved in Keras's own format. Give a name that ends in .keras. "
            f"Received: filepath={str(path)!r}"
        )
    if path.exists() and not overwrite:
        raise ValueError(f"The file exists. Pass overwrite=True. Received: filepath={str(path)!r}")
    try:
        with tempfile.TemporaryDirectory(prefix=".save-", dir=path.parent) as unfinished:
            whole = Path(unfinished) / path.name
            write(str(whole))
            whole.replace(path)
    except OSError as error:
        raise OSError(
            f"The file cannot be written ({error.strerror or error}). Choose a folder that "
            f"exists and that you may write to. Received: filepath={str(path)!r}"
        ) from error
