import sys
from decimal import Decimal

import pytest

from megatron_opd.errors import UserError
from megatron_opd.evaluate.grade import final_answer, grade, last_number
from megatron_opd.records import Prompt


def prompt(answer, **meta):
    return Prompt(index=3, content="question", answer=answer, meta=meta)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("1+6+0=07,=07627", "07627"),
        ("no marker at all", "no marker at all"),
        ("x = 1 = 2\n", "2"),
        ("x = 5. Answer:  seven\tdwarfs \n", "seven dwarfs"),
        ("Answer: 1 and then #### 2", "2"),
        ("#### a = b", "a = b"),
        ("the answers: 3 = 3", "3"),
        ("=", ""),
        ("", ""),
    ],
)
def test_final_answer(text, wanted):
    assert final_answer(text) == wanted


def test_exact_compares_text_not_numbers():
    assert grade("exact", prompt(" 07627 "), "7+8+1=16,=07627") == 1.0
    assert grade("exact", prompt("07627"), "=7627") == 0.0
    assert grade("exact", prompt("07627"), "=07627,") == 0.0
    assert grade("exact", prompt("07627"), "") == 0.0


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("the result is 1,234,567.50 dollars", "1234567.5"),
        ("5-3", "3"),
        ("5 * -3", "-3"),
        ("(2)-7", "7"),
        ("2 - 7", "7"),
        ("x=-.5", "-0.5"),
        ("−4", "-4"),
        ("2e3", "2000"),
        ("it is 12.", "12"),
        ("1, 2, 3", "3"),
        ("12,34", "34"),
        ("=07627", "7627"),
    ],
)
def test_last_number(text, wanted):
    assert last_number(text) == Decimal(wanted)


def test_number():
    assert last_number("none here") is None
    assert last_number("1e99999999999999999999999") is None
    assert grade("number", prompt("1200"), "so it is 1,200.0 in all") == 1.0
    assert grade("number", prompt("-3"), "that makes −3") == 1.0
    assert grade("number", prompt("1200"), "1201") == 0.0
    assert grade("number", prompt("1200"), "I don't know") == 0.0
    with pytest.raises(UserError, match="prompt 3: answer 'seven' is not a number"):
        grade("number", prompt("seven"), "7")
    with pytest.raises(UserError, match="not a number"):
        grade("number", prompt("1/2"), "0.5")


def test_math():
    pytest.importorskip("math_verify")
    assert grade("math", prompt(r"\frac{1}{2}"), r"So we get $\boxed{0.5}$.") == 1.0
    assert grade("math", prompt("$x+1$"), "The answer is $1+x$") == 1.0
    assert grade("math", prompt("42"), "it is 41") == 0.0
    assert grade("math", prompt("42"), "nothing to see") == 0.0


def test_reasoning_gym():
    reasoning_gym = pytest.importorskip("reasoning_gym")
    entry = reasoning_gym.create_dataset("basic_arithmetic", size=1, seed=5)[0]
    source = {"dataset": "basic_arithmetic", "entry": entry}
    right = entry["answer"]
    assert (
        grade("reasoning_gym", prompt(right, reasoning_gym=source), f"thinking <answer>0.1</answer> <answer> {right} </answer> done") == 1.0
    )
    assert grade("reasoning_gym", prompt(right, reasoning_gym=source), f"so 2 + 2 = 4. Answer: {right}") == 1.0
    assert 0.0 <= grade("reasoning_gym", prompt(right, reasoning_gym=source), "a fish") < 1.0
    with pytest.raises(UserError, match='needs the field "reasoning_gym"'):
        grade("reasoning_gym", prompt(right), right)
    with pytest.raises(UserError, match="no dataset 'nothing_of_the_kind'"):
        grade("reasoning_gym", prompt(right, reasoning_gym={"dataset": "nothing_of_the_kind", "entry": entry}), right)


def test_reasoning_gym_blames_the_entry_or_the_response(monkeypatch):
    reasoning_gym = pytest.importorskip("reasoning_gym")

    def fragile(answer, entry):
        return float(int(answer) == int(entry["answer"]))

    monkeypatch.setattr(reasoning_gym, "get_score_answer_fn", lambda name: fragile)
    assert grade("reasoning_gym", prompt("7", reasoning_gym={"dataset": "d", "entry": {"answer": "7"}}), "7") == 1.0
    assert grade("reasoning_gym", prompt("7", reasoning_gym={"dataset": "d", "entry": {"answer": "7"}}), "a fish") == 0.0
    with pytest.raises(UserError, match="can't score this entry of 'd'"):
        grade("reasoning_gym", prompt("7", reasoning_gym={"dataset": "d", "entry": {}}), "7")


@pytest.mark.parametrize(("grader", "package"), [("math", "math_verify"), ("reasoning_gym", "reasoning_gym")])
def test_missing_package_is_named(monkeypatch, grader, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"pip install {package.replace('_', '-')}"):
        grade(grader, prompt("1"), "1")


def test_bad_names_and_missing_answers():
    with pytest.raises(UserError, match="choose one of exact, number, math, reasoning_gym"):
        grade("none", prompt("1"), "1")
    for grader in ("exact", "number"):
        with pytest.raises(UserError, match="prompt 3: no field 'answer'"):
            grade(grader, prompt(None), "1")
