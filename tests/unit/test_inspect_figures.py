"""What `inspect` says of tokens, against the same figures worked out at once from all of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from unit.derived_scores import make
from unit.store_parts import fill, make_manifest, score, scored_store
from unit.test_partial_scores import score_in_part

from megatron_opd.cli import main
from megatron_opd.data.store import StoreReader
from megatron_opd.evaluate.intervals import ratio_interval
from megatron_opd.records import Finish
from megatron_opd.show import figures
from megatron_opd.show.figures import Sample, measure


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "store")


def gaps_of(reader: StoreReader, teacher: str) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """(prompt, ids, log pi_T - log pi_ref) of every response, as training sees them."""
    found = []
    for index in range(len(reader)):
        rollout = reader.rollout(index)
        response = slice(rollout.prompt_len, None)
        gap = reader.scores(index, teacher).logp[response] - rollout.student_logp[response]
        found.append((rollout.prompt_index, rollout.tokens[response], gap))
    return found


def check(url: str, teacher: str) -> None:
    reader = StoreReader(url)
    endings, found = measure(reader, [teacher])
    rows = gaps_of(StoreReader(url, teacher=teacher), teacher)
    totals: dict[int, tuple[float, float]] = {}
    for prompt, _, gap in rows:
        nats, count = totals.get(prompt, (0.0, 0.0))
        totals[prompt] = (nats - float(gap.sum(dtype=np.float64)), count + len(gap))
    assert found[teacher].reverse_kl() == pytest.approx(ratio_interval(totals))
    ids, gaps = (np.concatenate(column) for column in list(zip(*rows, strict=True))[1:])
    np.testing.assert_array_equal(np.sort(found[teacher].sample.values), np.sort(gaps))
    assert found[teacher].marked == (np.abs(gaps) >= 1).sum()
    sizes = {int(token): np.abs(gaps[ids == token]).sum() for token in np.unique(ids)}
    wanted = sorted(sizes, key=lambda token: -sizes[token])[:3]
    for (token, count, mean, total), expected in zip(found[teacher].worst(3), wanted, strict=True):
        assert (token, count) == (expected, (ids == expected).sum())
        assert mean == pytest.approx(gaps[ids == expected].mean(), rel=1e-5)
        assert total == pytest.approx(sizes[expected], rel=1e-5)
    assert endings.num_tokens == reader.response_lens.sum()
    assert endings.stopped == (reader.finishes == Finish.STOP).sum()


@pytest.mark.parametrize("at_once", [1, 100, 1 << 18])
def test_figures_are_those_of_all_tokens_at_once(url: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "_AT_ONCE", at_once)
    scored_store(url)
    check(url, "teacher")


@pytest.mark.parametrize("overlong", ["cut", "skip"])
def test_of_what_was_scored_in_part_only_that_counts(url: str, overlong: str) -> None:
    fill(url, make_manifest(num_prompts=8, samples=2), longest=40)
    for part in range(2):
        score_in_part(url, part, overlong)
    check(url, "teacher")


def test_a_sample_is_drawn_evenly_from_the_whole_stream() -> None:
    sample, rng = Sample(1000, seed=1), np.random.default_rng(0)
    numbers, position = np.arange(50_000, dtype=np.float32), 0
    while position < len(numbers):
        step = int(rng.integers(1, 4000))
        sample.add(numbers[position : position + step])
        position += step
    found = sample.values
    assert len(found) == len(set(found.tolist())) == 1000
    # The mean of 1,000 of 0 to 49,999 has a standard error of 456.
    assert abs(found.mean() - 25_000) < 5 * 456
    assert 150 < (found < 10_000).sum() < 250


def test_lines_come_behind_those_that_were_there(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    scored_store(url, stop_ids=[])
    score(url, teacher="other", parts=[0])
    assert main(["inspect", url, "--manifests"]) == 0
    before = capsys.readouterr().out
    assert main(["inspect", url]) == 0
    after = capsys.readouterr().out
    assert after.startswith(before)
    new = after[len(before) :]
    assert "of 20 responses ended by themselves; its stop ids are not known" in new
    for teacher, prompts in (("other", 4), ("teacher", 10)):
        assert f"reverse KL {teacher!r}" in new
        assert f", {prompts} prompts), the mean of log pi_ref - log pi_T over" in new
        assert f"advantage {teacher!r}" in new
    assert "no directory of student" in new


def test_scores_of_no_distribution_have_no_reverse_kl(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    scored_store(url)
    make(url, "less")
    make(url, "mixed", "shuffle")
    assert main(["inspect", url]) == 0
    printed = capsys.readouterr().out
    assert [name for name in ("teacher", "less", "mixed") if f"reverse KL {name!r}" in printed] == ["teacher", "mixed"]
    line = next(line for line in printed.splitlines() if line.startswith("mean score gap 'less'"))
    assert "the mean of log pi_ref - score over" in line
    assert main(["show", url, "--teacher", "less", "--worst", "1"]) == 0
    printed = capsys.readouterr().out
    assert "mean score gap" in printed
    assert "reverse KL" not in printed


def test_damage_of_tokens_is_told_without_verify(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    scored_store(url)
    path = next(Path(url, "parts/000001/teacher/teacher/logp").rglob("c/0*"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert main(["inspect", url, "--manifests"]) == 0
    assert main(["inspect", url]) == 2
    assert "DAMAGED: " in capsys.readouterr().out


def test_tokens_behind_a_stop_id_are_a_fault(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A store of a version that did not look at them when it wrote."""
    fill(url, make_manifest(stop_ids=[]))
    assert main(["inspect", url]) == 0
    for path in Path(url).rglob("zarr.json"):
        content = json.loads(path.read_text())
        if found := content["attributes"].get("opd"):
            content["attributes"].pop("opd_crc32c")
            found.pop("store_id", None)
            found |= {"stop_ids": [5]} if path.parent == Path(url) else {}
            path.write_text(json.dumps(content))
    for words in ([], ["--verify"]):
        capsys.readouterr()
        assert main(["inspect", url, *words]) == 2
        assert "MUST BE 0" in capsys.readouterr().out
    assert main(["inspect", url, "--manifests"]) == 0
