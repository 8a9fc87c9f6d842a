"""The command that checks the attacks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import once

from keras_tl_defense import sanity
from keras_tl_defense.__main__ import main


def test_a_check_that_fails_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def prepare(self: sanity.Sanity) -> None:
        self._row("FGSM", "Student", "largest change 8", "misled", np.array([True, False, True]))
        self._check("it misleads nearly all", False)

    monkeypatch.setattr(sanity.Sanity, "_prepare", prepare)
    parts = ("general", "mimicry", "fingerprint", "target_agnostic", "backdoor", "adaptive")
    for part in parts:
        monkeypatch.setattr(sanity.Sanity, f"_{part}", lambda self: None)
    assert main(["sanity", "--out", str(tmp_path / "new")]) == 1
    printed = capsys.readouterr().out
    assert "| FGSM | Student | largest change 8 | misled | 2/3 | 21% to 94% |" in printed
    assert "| it misleads nearly all | NO |" in printed
    table = pd.read_csv(tmp_path / "new" / "sanity.csv")
    assert table[["count", "n"]].to_numpy().tolist() == [[2, 3]]


@pytest.mark.slow
@once
def test_the_attacks_are_sane(tmp_path: Path) -> None:
    assert main(["sanity", "--out", str(tmp_path), "--images", "24"]) == 0
    assert "NO" not in (tmp_path / "sanity.md").read_text(encoding="utf-8")
