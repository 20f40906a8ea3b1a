"""The front page: short, and what it tells a newcomer to type works as printed."""

from pathlib import Path

import pytest

from documents import TEXTS, run_blocks

README = TEXTS["README.md"]
LINES = 200  # of a front page that is read


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= LINES


@pytest.mark.slow
@pytest.mark.minutes
def test_every_block_runs_in_order(tmp_path: Path) -> None:
    printed = run_blocks(README, tmp_path)
    assert "looks at the ECG" in printed[0]
    assert (tmp_path / "runs" / "quickstart" / "report.html").is_file()
    answer = "inferior"
    assert answer in printed[2], "the chat does not answer as the README has it"
    assert printed[3].strip() == answer
    assert (tmp_path / "record.svg").is_file()
    assert "III" in printed[2].partition("rests most on")[2], (
        "the answer does not rest on the leads that the picture shows"
    )
    assert (tmp_path / "why.svg").is_file()
    assert list(tmp_path.glob("runs/my_elm/evaluation/*/report.html"))
