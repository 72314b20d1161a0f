"""Derived teachers keep a store's rules: any number of workers, no damaged or changed source, no name twice."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from unit.derived_scores import SMALL, by_name, make, score_again, write_again
from unit.derived_scores import scored as scored  # the fixtures
from unit.derived_scores import url as url
from unit.store_parts import fill, make_manifest, make_scores, score, scored_store

from megatron_opd.cli import main
from megatron_opd.data import derived as derived_module
from megatron_opd.data.derived import derive, plan_derived
from megatron_opd.data.joined import open_training_stores
from megatron_opd.data.store import StoreReader
from megatron_opd.data.writer import write_scores
from megatron_opd.errors import StoreError
from megatron_opd.recipe.derivation import DerivedConfig
from megatron_opd.store_records import StoreManifest


def test_several_workers_make_what_one_makes(url: str, tmp_path: Path) -> None:
    other = shutil.copytree(url, tmp_path / "other")
    make(url)
    readers = [StoreReader(str(other)) for _ in range(2)]
    plans = [plan_derived(reader, "less", DerivedConfig(method="residualize", **SMALL).derivation("teacher")) for reader in readers]
    for reader, plan in zip(readers, plans, strict=True):  # the second planned all parts before the first had made them
        derive(reader, plan)
    assert by_name(url, "less") == by_name(str(other), "less")
    assert make(other) == []
    shutil.rmtree(other / "parts/000001/teacher/less")
    assert make(other) == [1]
    assert by_name(url, "less") == by_name(str(other), "less")


def test_what_was_found_in_the_parts_that_were_left(url: str) -> None:
    reader = StoreReader(url)
    derivation = DerivedConfig(method="residualize", **SMALL).derivation("teacher")
    assert "with a variance of" in derive(reader, plan_derived(reader, "less", derivation))
    shutil.rmtree(Path(url) / "parts/000001/teacher/less")
    reader.refresh()
    assert "with a variance in 1 of 3 parts of" in derive(reader, plan_derived(reader, "less", derivation))


def test_too_few_prompts_to_hold_one_out(tmp_path: Path) -> None:
    fill(str(tmp_path / "store"), make_manifest(num_prompts=1))
    score(str(tmp_path / "store"))
    with pytest.raises(StoreError, match="all prompts that have scores fall into one of 3 folds"):
        make(tmp_path / "store")


def test_answers_of_a_teacher_have_no_pi_ref(tmp_path: Path) -> None:
    url = str(tmp_path / "store")
    scored_store(url, num_prompts=4, sampler_role="teacher")
    with pytest.raises(StoreError, match="answers of a teacher, whose log-probabilities are stored in place of pi_ref's"):
        make(url)
    assert make(url, "mixed", "shuffle") == [0]


def test_a_store_that_is_not_scored_to_the_end(url: str) -> None:
    shutil.rmtree(Path(url) / "parts/000002/teacher/teacher")
    with pytest.raises(StoreError, match="'teacher' has not scored 1 of 3 parts"):
        make(url)
    shutil.rmtree(Path(url) / "parts/000002")
    with pytest.raises(StoreError, match="1 of 3 parts are not sealed"):
        make(url)


def damage(url: str, array: str) -> None:
    path = next(path for path in (Path(url) / "parts/000001" / array).rglob("*") if path.is_file() and path.name == "0")
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("array", ["teacher/teacher/logp", "student_logp", "tokens"])
@pytest.mark.parametrize("method", ["residualize", "shuffle"])
def test_a_damaged_source_is_refused(url: str, array: str, method: str) -> None:
    damage(url, array)
    with pytest.raises(StoreError, match=f"parts/000001/{array} is damaged"):
        make(url, method=method)


def test_a_source_that_was_scored_again_makes_it_stale(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    make(url)
    before = by_name(url, "less")
    reader = StoreReader(url, teacher="less")
    shutil.move(Path(url) / "parts/000001/teacher/teacher", Path(url) / "away")
    with pytest.raises(StoreError, match="derived teacher 'less' is stale: 1 of 3 parts have no scores of 'teacher'"):
        StoreReader(url, teacher="less")
    shutil.move(Path(url) / "away", Path(url) / "parts/000001/teacher/teacher")
    score_again(url, 1)
    stale = "the derived teacher 'less' is stale: the scores of 'teacher' are others since .*'megatron-opd derive'"
    for read in (lambda r: r.check_scored("less"), lambda r: r.scores(0, "less"), lambda r: StoreReader(url, teacher="less")):
        with pytest.raises(StoreError, match=stale):
            read(StoreReader(url))
    with pytest.raises(StoreError, match=stale):
        reader.refresh()
    assert main(["inspect", url]) == 0
    assert "STALE              'less': the scores of 'teacher' are others since" in capsys.readouterr().out
    assert make(url) == [0, 1, 2]
    after = by_name(url, "less")
    assert all(after[name] != before[name] for name in before)
    assert main(["inspect", url, "--verify"]) == 0
    printed = capsys.readouterr().out
    assert "STALE" not in printed
    assert "without their recurring part (residualize 1: folds 3, position_bins 4, surprisal_bins 5, smoothing 7, seed 11)" in printed


def test_a_mended_one_that_was_left_half_done_is_stale(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make(url)
    score_again(url, 1)
    written: list[int] = []

    def dies(*arguments: Any, **options: Any) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(1)
        write_scores(*arguments, **options)

    monkeypatch.setattr(derived_module, "write_scores", dies)
    with pytest.raises(KeyboardInterrupt):
        make(url)
    monkeypatch.undo()
    with pytest.raises(StoreError, match="'less' is stale: its parts were derived of other scores"):
        StoreReader(url, teacher="less")
    assert make(url) == [1, 2]
    StoreReader(url).check_scored("less")


def test_names_that_are_taken(url: str) -> None:
    make(url)
    with pytest.raises(StoreError, match=r"derived otherwise, .*seed 11\), now .*seed 12\); give this one another name"):
        make(url, seed=12)
    with pytest.raises(StoreError, match=r"derived otherwise, .*now the scores of 'teacher' SHUFFLED"):
        make(url, method="shuffle")
    score(url, teacher="large")
    with pytest.raises(StoreError, match=r"teacher/large: scores of a model, teacher \(.*give the derived teacher another name"):
        make(url, "large")
    with pytest.raises(StoreError, match="teacher 'less' is derived itself"):
        make(url, "more", source="less")


def test_a_group_that_was_no_derived_one_keeps_its_bytes(url: str) -> None:
    """Older versions, which know no derived teachers, read it."""
    record = StoreReader(url).score_manifest(0, "teacher")
    assert record is not None
    assert "derived" not in record.model_dump()
    assert "opd_scores" not in StoreManifest.model_validate(make_manifest().model_dump()).model_dump()["lineage"]


def test_a_mixture_is_derived_alike(tmp_path: Path) -> None:
    urls = [str(tmp_path / str(seed)) for seed in (1, 2)]
    for seed, store in enumerate(urls):
        fill(store, make_manifest(num_prompts=8, per_part=8), seed=seed)
        score(store)
        make(store)
    joined = open_training_stores(urls, "less")
    joined.check_scored("less")
    assert joined.derived_fault("less") is None
    assert float(joined.scores(0, "less").logp[-1]) == float(StoreReader(urls[0]).scores(0, "less").logp[-1])
    make(urls[0], "odd")
    make(urls[1], "odd", seed=12)
    with pytest.raises(StoreError, match=r"can't be trained on together: how the scores of 'odd' were derived is .*'seed': 11.*'seed': 12"):
        open_training_stores(urls, "odd")


def test_a_store_that_does_not_fit_memory(url: str) -> None:
    make(url)
    reader = StoreReader(url, memory_bytes=1)
    derive(reader, plan_derived(reader, "again", DerivedConfig(method="residualize", **SMALL).derivation("teacher")))
    assert by_name(url, "again") == by_name(url, "less")


def test_a_store_in_an_object_store() -> None:
    url = "memory://derived/store.opd.zarr"
    location = fill(url, make_manifest(num_prompts=6, samples=1, per_part=3))
    score(url)
    assert make(url) == [0, 1]
    before = by_name(url, "less")
    location.fs.rm(location.path("parts/000001/teacher/teacher"), recursive=True)
    write_again(url, 1, make_scores(StoreReader(url).part_rollouts(1), seed=99))
    assert make(url) == [0, 1]
    assert all(before[name] != logp for name, logp in by_name(url, "less").items())
    assert make(url) == []
