"""Golds in the formats of benchmarks (graders/golds.toml): each agrees with itself and its spellings, and with no other."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_opd.errors import UserError
from megatron_opd.evaluate.agreement import main, measure_agreement, read_formats
from megatron_opd.evaluate.grade import PACKAGES

GOLDS = Path(__file__).parent / "graders" / "golds.toml"
FORMATS = read_formats(GOLDS)


@pytest.mark.parametrize("name", FORMATS)
def test_golds(name: str) -> None:
    grader, response, answers = FORMATS[name]
    if grader in PACKAGES:
        pytest.importorskip(PACKAGES[grader])
    found = measure_agreement(grader, response, answers)
    assert not found.wrong, "\n".join(found.wrong)
    assert found.themselves == found.golds == len(answers) > 5
    assert found.agreeing == found.spellings >= 5
    assert found.apart == found.pairs == len(answers) * (len(answers) - 1)


def test_what_disagrees_is_counted_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = measure_agreement("number", "it is %s", [["7", "7.0", "8"], ["8", "8"], ["8.0"]])
    assert (found.golds, found.themselves, found.spellings, found.agreeing, found.pairs, found.apart) == (3, 3, 2, 1, 6, 4)
    assert len(found.wrong) == 3
    path = tmp_path / "golds.toml"
    path.write_text('[two]\ngrader = "number"\nresponse = "%s"\nanswers = [["7"], ["7.0"]]\n')
    assert main(str(path)) == 1
    assert "two: '7' and '7.0': right" in capsys.readouterr().out
    with pytest.raises(UserError, match="answer 'seven' is not a number"):
        measure_agreement("number", "%s", [["seven"]])


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "golds.toml"
    for text in (
        "a = 1",
        '[a]\ngrader = "number"\nresponse = "x"\nanswers = [["1"]]',
        '[a]\ngrader = "number"\nresponse = "%s"\nanswers = [[]]',
    ):
        path.write_text(text)
        with pytest.raises(UserError, match="a: needs grader = NAME"):
            read_formats(path)
