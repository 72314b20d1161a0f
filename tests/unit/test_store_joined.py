"""Several stores read as one: numbers go on from store to store, and what can't be one is refused with both names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from unit.store_parts import fake_fingerprint, fill, make_manifest, same_rollout, same_scores, score

from megatron_opd.data.joined import open_training_stores, show_stores, store_list, training_stores_exist
from megatron_opd.data.store import StoreReader
from megatron_opd.errors import ConfigError, StoreError
from megatron_opd.recipe.files import load_recipe
from megatron_opd.records import Lineage, PromptFile, RoundRecord, SftFacts


def make(path: Path, *, seed: int, parts: Any = None, scored: bool = True, **changes: Any) -> str:
    fill(str(path), make_manifest(prompts=PromptFile(name="x", sha256=f"{seed:064x}", num_prompts=10), **changes), parts=parts, seed=seed)
    if scored:
        score(str(path))
    return str(path)


def test_everything_is_the_stores_own(tmp_path: Path) -> None:
    urls = [make(tmp_path / "a", seed=1), make(tmp_path / "b", seed=2, parts=[0, 2]), make(tmp_path / "c", seed=3)]
    readers, joined = [StoreReader(url, teacher="teacher") for url in urls], open_training_stores(urls, "teacher")
    assert (len(joined), joined.num_parts, joined.missing_parts()) == (20 + 12 + 20, 9, [4])
    assert list(joined.parts) == [0, 1, 2, 3, 5, 6, 7, 8]
    index = 0
    for reader in readers:
        for own in range(len(reader)):
            same_rollout(joined.rollout(index), reader.rollout(own))
            same_scores(joined.scores(index, "teacher"), reader.scores(own, "teacher"))
            index += 1
    for name in ("lengths", "prompt_lens", "response_lens", "finishes", "prompt_indices", "sample_indices"):
        np.testing.assert_array_equal(getattr(joined, name), np.concatenate([getattr(reader, name) for reader in readers]))
    assert joined.part_rows(5) == slice(28, 32)
    for left, right in zip(joined.part_rollouts(5), readers[1].part_rollouts(2), strict=True):
        same_rollout(left, right)
    joined.check_scored("teacher")
    assert joined.unscored_parts("nobody") == list(joined.parts)
    assert (joined.teachers(), joined.verify()) == (["teacher"], [])
    with pytest.raises(StoreError, match=f"{re.escape(urls[1])}: 1 of 3 parts are not sealed"):
        joined.check_complete()
    for number in (-1, 52):
        with pytest.raises(IndexError):
            joined.rollout(number)
    fill(urls[1], readers[1].manifest, parts=[1], seed=2)
    joined.refresh()
    assert (len(joined), joined.missing_parts()) == (60, [])
    with pytest.raises(StoreError, match=f"{re.escape(urls[1])}: teacher 'teacher' has not scored 1 of 3 parts"):
        joined.check_scored("teacher")


def lineage(**changes: Any) -> Lineage:
    return Lineage(base=fake_fingerprint("student"), sft_teacher=fake_fingerprint("teacher")).model_copy(update=changes)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"sampler_role": "teacher"}, "sampler_role is 'student' in the first and 'teacher' in the second"),
        ({"sampler": fake_fingerprint("student", weights="other")}, "sampler is student"),
        ({"sampler": fake_fingerprint("student", tokens="other")}, "sampler is student"),
        ({"chat_templates": {"default": "x"}}, "chat_templates is {} in the first"),
        ({"prompt_suffix": [1]}, "prompt_suffix is"),
        ({"prompt_probe": [1]}, "prompt_probe is"),
        ({"turn_end": 2}, "turn_end is None in the first and 2"),
        ({"lineage": lineage(base=fake_fingerprint("other"))}, "lineage.base is student"),
        ({"lineage": lineage(sft_teacher=None)}, "lineage.sft_teacher is teacher .* and not known in the second"),
        ({"lineage": lineage(opd_teacher=fake_fingerprint("teacher"))}, "lineage.opd_teacher is not known in the first"),
        ({"lineage": lineage(sft=SftFacts(num_answers=3))}, "lineage.sft is None"),
        ({"round": 1}, "round is None in the first and 1 in the second"),
        ({"lineage": lineage(rounds=[RoundRecord(number=1, store_id="0" * 16)])}, r"lineage.rounds is \[\] in the first"),
    ],
)  # fmt: skip
def test_what_is_no_mixture(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    urls = [make(tmp_path / "a", seed=1), make(tmp_path / "b", seed=2, **changes)]
    with pytest.raises(StoreError, match=f"{re.escape(urls[0])} and {re.escape(urls[1])} can't be trained on together: {field}"):
        open_training_stores(urls, "teacher")


def test_other_teachers_under_one_name(tmp_path: Path) -> None:
    urls = [make(tmp_path / "a", seed=1), make(tmp_path / "b", seed=2, scored=False)]
    score(urls[1], model=fake_fingerprint("teacher", weights="other"))
    with pytest.raises(StoreError, match="can't be trained on together: teacher 'teacher' is teacher"):
        open_training_stores(urls, "teacher")
    open_training_stores(urls)  # without scores it is no matter


def test_what_may_differ(tmp_path: Path) -> None:
    """Prompts, sampling, the order of stop ids, what was allowed; of teachers' answers, whether the teacher was declared."""
    urls = [
        make(tmp_path / "a", seed=1, stop_ids=[]),
        make(tmp_path / "b", seed=2, samples=1, lineage=lineage(overrides=["x"], sft_teacher_declared=True)),
    ]
    merged = open_training_stores(urls, "teacher").manifest.lineage
    assert merged == lineage(overrides=["x"], sft_teacher_declared=True)


def test_a_part_in_two_stores(tmp_path: Path) -> None:
    urls = [make(tmp_path / "a", seed=1), make(tmp_path / "b", seed=1, stop_ids=[])]
    with pytest.raises(StoreError, match=r"hold the same rollouts \(part 0 of the first is part 0 of the second\)"):
        open_training_stores(urls)


def test_in_a_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    recipe = load_recipe("tiny", ["train.store=['{run_dir}/a', '$SCRATCH/b']", "run_dir=runs/x"])
    assert recipe.train.store == ["runs/x/a", f"{tmp_path}/b"]
    assert load_recipe("tiny", ["train.store=x"]).train.store == "x"
    assert store_list("x") == ["x"]
    assert show_stores(["a", "s3://b/c"]) == "a, s3://b/c"
    assert not training_stores_exist(["x", "y"])
    assert "store = [" in recipe.to_toml()
    for wrong in ("[]", "['a', 'a']", "5", "[5]"):
        with pytest.raises(ConfigError, match=r"train\.store"):
            load_recipe("tiny", [f"train.store={wrong}"])
    with pytest.raises(ConfigError, match=r"train\.store\.1: the address 's3://b' holds a password"):
        load_recipe("tiny", ["train.store=['a', 's3://key:secret@b']"])
    with pytest.raises(ConfigError, match=r"train\.store: the environment variable \$NOWHERE"):
        load_recipe("tiny", ["train.store=['a', '$NOWHERE/b']"])
