"""The tour of code: its rows are read as the benchmarks' are, right programs pass, broken ones fail, and splits share nothing."""

from __future__ import annotations

import random
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from benchmark_rows import write_rows

from megatron_opd.data.benchmarks import layout_of
from megatron_opd.data.prompts import read_prompts
from megatron_opd.demo import programs
from megatron_opd.demo.programs import LAYOUTS, ListTask, SumTask
from megatron_opd.errors import UserError
from megatron_opd.evaluate.code.pool import CodePool
from megatron_opd.evaluate.grade import grade
from megatron_opd.hf.tokenizer import fingerprint_loaded_tokenizer, load_tokenizer
from megatron_opd.recipe.code_limits import CodeLimits

TESTS = ("test", "tests", "test_list", "public_test_cases", "private_test_cases")
TEACHER = Path(str(resources.files("megatron_opd") / "demo" / "programs_teacher"))
LONGEST_RESPONSE = 40  # sampling.max_new_tokens of the recipe


def draw(layout: str, count: int) -> list[Any]:
    tasks = programs.draw_tasks("eval", (layout,), 3)
    return [next(tasks)[0] for _ in range(count)]


def row_of(task: Any, layout: str, number: int) -> dict[str, Any]:
    """Its tests' lists are those of any other task's row of this number."""
    return programs.make_row(task, layout, number, random.Random(number))


def broken_programs(task: ListTask, layout: str, number: int) -> list[str]:
    """Other tasks' programs, where these do something else to the lists of the row's tests, and one that gives another form of the result."""
    others = [ListTask(task.steps[::-1]), ListTask((*task.steps[:2], ("add {n}", 1))), ListTask((("reverse", 0), *task.steps[1:]))]

    def tests(of: ListTask) -> list[Any]:
        row = row_of(of, layout, number)
        return [row.get(name) for name in TESTS]

    found = [programs.solution(other, layout) for other in others if tests(other) != tests(task)]
    return [*found, programs.solution(task, layout).replace("return d", "return str(d)").replace("print(*d)", "print(d)")]


def test_right_programs_pass_and_broken_ones_fail(tmp_path: Path) -> None:
    items, wanted = [], []
    for layout in LAYOUTS[1:]:
        tasks = draw(layout, 4)
        file = write_rows(tmp_path / f"{layout}.jsonl", [row_of(task, layout, number) for number, task in enumerate(tasks)])
        for number, (task, prompt) in enumerate(zip(tasks, read_prompts(file, split="test")[1], strict=True)):
            right, broken = programs.solution(task, layout), broken_programs(task, layout, number)
            items += [(prompt, text) for text in (right, *broken, right.replace("```", ""))]
            wanted += ["right", *("wrong" for _ in broken), "no_answer"]
    assert wanted.count("wrong") > 2 * wanted.count("right")
    with CodePool(CodeLimits(seconds=2.0), workers=2) as pool:
        found = [verdict.outcome for verdict in pool.grade(items)]
    for verdict, outcome, (prompt, program) in zip(found, wanted, items, strict=True):
        assert verdict == outcome, (prompt.content, program)


def test_sums(tmp_path: Path) -> None:
    assert programs.solution(SumTask(4, (3, -2, 1)), "aime_like") == r"4+3=7, 7-2=5, 5+1=6, \boxed{6}"
    tasks = draw("aime_like", 20)
    file = write_rows(tmp_path / "rows.jsonl", [row_of(task, "aime_like", number) for number, task in enumerate(tasks)])
    for task, prompt in zip(tasks, read_prompts(file)[1], strict=True):
        written = programs.solution(task, "aime_like")
        assert grade("number", prompt, written).outcome == "right"
        assert grade("number", prompt, written.rpartition(",")[0]).outcome == "right"
        assert grade("number", prompt, written.rpartition(",")[0] + "0").outcome == "wrong"


def test_rows_have_the_columns_of_their_layouts() -> None:
    layouts = {layout: layout_of(row_of(draw(layout, 1)[0], layout, 0)) for layout in LAYOUTS}
    assert layouts == {
        "aime_like": None, "lcb_like": "livecodebench", "humaneval_like": "humaneval", "mbpp_like": "mbpp", "own_tests": None,
    }  # fmt: skip


def test_no_task_is_in_two_splits(tmp_path: Path) -> None:
    found: dict[Any, str] = {}
    for split in programs.SPLITS:
        tasks = programs.draw_tasks(split, LAYOUTS, seed=0)
        for task in [next(tasks)[0] for _ in range(400)]:
            assert found.setdefault(task, split) == split == programs.split_of(task)
    assert len(found) == 400 * len(programs.SPLITS)
    for name, layouts in (("a", LAYOUTS), ("b", LAYOUTS), ("one", LAYOUTS[:1])):
        programs.write_rows(tmp_path / name, split="sft", layouts=layouts, count=10, seed=1)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != (tmp_path / "one").read_bytes()
    with pytest.raises(UserError, match="no split 'test'; choose one of sft, rollout, eval, teacher"):
        programs.write_rows(tmp_path / "x", split="test", layouts=LAYOUTS, count=1, seed=0)
    with pytest.raises(UserError, match=r"split 'eval' has no more than [12]\d\d different tasks of aime_like; take fewer"):
        programs.write_rows(tmp_path / "x", split="eval", layouts=LAYOUTS[:1], count=1000, seed=0)
    with pytest.raises(UserError, match="no layout 'gsm8k'; choose of aime_like, "):
        programs.write_rows(tmp_path / "x", split="sft", layouts=("gsm8k",), count=1, seed=0)


def test_everything_can_be_said_and_fits() -> None:
    tokenizer, rng = programs.LANGUAGE.build_tokenizer(), random.Random(0)
    tasks = programs.draw_tasks("eval", LAYOUTS, 0)
    for number in range(200):
        task, layout = next(tasks)
        prompt, wanted = programs.prompt_of(programs.make_row(task, layout, number, rng)), programs.solution(task, layout)
        before, response = tokenizer(prompt)["input_ids"], tokenizer(wanted)["input_ids"]
        assert tokenizer.unk_token_id not in before + response
        assert tokenizer.decode(before + response) == prompt + wanted
        assert len(response) < LONGEST_RESPONSE <= programs.LANGUAGE.longest - len(before)


def test_the_shipped_teacher_speaks_this_language() -> None:
    """Where the wording of tasks has changed (`data.benchmarks`): make it again, python tools/make_demo_teacher.py --task programs."""
    assert fingerprint_loaded_tokenizer(load_tokenizer(TEACHER)) == fingerprint_loaded_tokenizer(programs.LANGUAGE.build_tokenizer())
    assert (TEACHER / "model.safetensors").stat().st_size <= 1_000_000
