"""Which prompts, seeds, stores and steps each round of a recipe has; what is no recipe of rounds."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_prompts
from unit.store_parts import fake_fingerprint

from megatron_opd.data.prompts import read_prompts, share_range
from megatron_opd.errors import CheckpointError, ConfigError, UserError
from megatron_opd.recipe.files import build_recipe
from megatron_opd.recipe.rounds import check_number, check_share, entry_of, read_entries, round_recipe, round_steps, student_after
from megatron_opd.records import Lineage, RoundRecord

BASE: dict[str, Any] = {
    "name": "r",
    "run_dir": "/runs/r",
    "models": {"teacher": "t", "student": "s"},
    "rollout": {"prompts": "p", "sampling": {"seed": 5}},
}


def recipe(train: dict[str, Any] | None = None, rollout: dict[str, Any] | None = None, **rounds: Any) -> Any:
    return build_recipe(BASE | {"rollout": BASE["rollout"] | (rollout or {}), "train": train or {}, "rounds": rounds})


def test_shares_are_disjoint_in_order_complete_and_alike() -> None:
    rng = random.Random(0)
    for _ in range(300):
        count, shares = rng.randrange(1, 500), rng.randrange(1, 40)
        pieces = [range(count)[share_range(count, number, shares)] for number in range(1, shares + 1)]
        assert [row for piece in pieces for row in piece] == list(range(count))
        assert max(map(len, pieces)) - min(map(len, pieces)) <= 1


def test_shares_of_a_prompt_file(tmp_path: Path) -> None:
    path = write_prompts(tmp_path / "p.jsonl", 23)
    _, prompts = read_prompts(path, limit=20)
    shares = [read_prompts(path, limit=20, share=(number, 3)) for number in (1, 2, 3)]
    assert [prompt.content for _, share in shares for prompt in share] == [prompt.content for prompt in prompts]
    assert [identity.num_prompts for identity, _ in shares] == [6, 7, 7]
    assert all([prompt.index for prompt in share] == list(range(len(share))) for _, share in shares)
    assert len({identity.sha256 for identity, _ in shares}) == 3
    with pytest.raises(UserError, match="fewer prompts than the 21 shares"):
        read_prompts(path, limit=20, share=(1, 21))
    with pytest.raises(ConfigError, match=r"rollout: .*i at most n"):
        recipe(rollout={"share": [3, 2]})


def test_a_recipe_as_its_rounds_see_it() -> None:
    whole = recipe({"steps": 12}, count=3)
    assert round_steps(whole) == 4
    seen = [round_recipe(whole, number) for number in (1, 2, 3)]
    for number, of in enumerate(seen, 1):
        assert {of.rollout.store, of.score.store, of.train.store} == {f"/runs/r/rounds/00{number}/rollouts.opd.zarr"}
        assert (of.rollout.share, of.rollout.sampling.seed) == ((number, 3), 4 + number)
        assert (of.train.steps, of.train.output) == (12, "/runs/r/opd")
        assert of.rollout.model == of.train.init
    assert [of.train.init for of in seen] == ["/runs/r/sft-hf", "/runs/r/rounds/001/student-hf", "/runs/r/rounds/002/student-hf"]
    assert [student_after(whole, number) for number in (1, 3)] == ["/runs/r/rounds/001/student-hf", "/runs/r/opd-hf"]
    everything = round_recipe(recipe(count=2, steps=5, prompts="all"), 2)
    assert (everything.rollout.share, everything.rollout.sampling.seed, everything.train.steps) == (None, 6, 10)
    single = recipe()
    assert round_recipe(single, None) is single
    assert round_recipe(single, 1) is single


@pytest.mark.parametrize(
    ("train", "rounds", "message"),
    [
        ({}, {"count": 2}, "needs the number of steps"),
        ({"steps": 9}, {"count": 2}, "can't be divided by rounds.count = 2; take 10"),
        ({"steps": 9}, {"count": 2, "steps": 4}, "2 rounds of 4 steps are 8, but train.steps = 9"),
        ({}, {"count": 2, "steps": 4, "until": "drift"}, "needs a limit"),
        ({}, {"until": "drift"}, "for several rounds"),
        ({}, {"steps": 3}, "for several rounds"),
    ],
)
def test_what_does_not_agree_is_refused(train: dict[str, Any], rounds: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(train, **rounds)


def test_fields_that_rounds_fill_in_are_refused() -> None:
    for rollout, message in (
        ({"store": "elsewhere"}, "its own store"),
        ({"share": [1, 2]}, "leave the field out"),
        ({"model": "m"}, "train.init"),
    ):
        with pytest.raises(ConfigError, match=message):
            round_recipe(recipe(rollout=rollout, count=2, steps=1), 1)


def test_shares_must_be_large_enough_for_a_step() -> None:
    fits = recipe({"global_batch": 4}, {"sampling": {"samples_per_prompt": 2}}, count=3, steps=1)
    check_share(fits, 6)
    with pytest.raises(ConfigError, match=r"5 prompts leave a round 2 rollouts, fewer than train.global_batch = 4"):
        check_share(fits, 5)
    check_share(recipe(count=3, steps=1, prompts="all"), 1)
    check_share(recipe(), 1)


def test_the_number_of_a_round() -> None:
    single, three = recipe(), recipe(count=3, steps=1)
    assert check_number(single, None, "train") is None
    assert check_number(single, 1, "train") is None
    assert check_number(three, 2, "train") == 2
    with pytest.raises(ConfigError, match=r"has its own train: say which with --round N \(1 to 3\), or let 'megatron-opd run'"):
        check_number(three, None, "train")
    for of, number in ((single, 2), (three, 4)):
        with pytest.raises(ConfigError, match="--round"):
            check_number(of, number, "train")


def test_entries_of_a_checkpoint_s_state() -> None:
    entry = {"number": 1, "store_id": "a", "rollouts": "b", "scores": "c", "student": "d", "first_step": 1}
    entries = read_entries({"rounds": [entry | {"last_step": 4, "ended_by": "steps"}, entry | {"number": 2, "first_step": 5}]}, "here")
    assert [(found.steps_before, found.last_step) for found in entries] == [(0, 4), (4, None)]
    assert entry_of(entries, 2) is entries[1]
    assert entry_of(entries, 3) is None
    assert entry_of(entries, 0) is None
    assert read_entries({}, "here") == []
    for broken in ("x", [1], [entry | {"number": 2}], [entry | {"more": 1}], [entry | {"first_step": "1"}], [{}]):
        with pytest.raises(CheckpointError, match="here"):
            read_entries({"rounds": broken}, "here")


def test_outside_of_rounds_a_lineage_is_written_as_ever() -> None:
    lineage = Lineage(base=fake_fingerprint())
    assert "rounds" not in lineage.model_dump()
    assert Lineage.model_validate(lineage.model_dump()) == lineage
    through = lineage.model_copy(update={"rounds": [RoundRecord(number=1, store_id="0" * 16)]})
    assert Lineage.model_validate(through.model_dump()) == through
    assert through.model_dump()["rounds"] == [{"number": 1, "store_id": "0" * 16}]
