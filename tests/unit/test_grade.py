import sys
from dataclasses import replace
from decimal import Decimal

import pytest

from megatron_opd.errors import UserError
from megatron_opd.evaluate.grade import answer_part, check_gold
from megatron_opd.evaluate.grade import grade as verdict_of
from megatron_opd.evaluate.graders.reading import final_answer, last_number
from megatron_opd.records import Prompt


def grade(name, prompt, text):
    return verdict_of(name, prompt, text).score


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
    for gold in ("1/2", "12 apples", "x=3", "1e99999999999999999999999", ""):
        with pytest.raises(UserError, match="not a number"):
            check_gold("number", prompt(gold))


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
    for bad, words in (
        ({}, 'needs the field "reasoning_gym"'),
        ({"reasoning_gym": source | {"dataset": "no_such"}}, "no dataset 'no_such'"),
    ):
        with pytest.raises(UserError, match=words):
            check_gold("reasoning_gym", prompt(right, **bad))


def test_reasoning_gym_blames_the_entry_before_any_response(monkeypatch):
    reasoning_gym = pytest.importorskip("reasoning_gym")

    def fragile(answer, entry):
        return float(int(answer) == int(entry["answer"]))

    monkeypatch.setattr(reasoning_gym, "get_score_answer_fn", lambda name: fragile)
    whole = prompt("7", reasoning_gym={"dataset": "d", "entry": {"answer": "7"}})
    check_gold("reasoning_gym", whole)
    assert grade("reasoning_gym", whole, "7") == 1.0
    with pytest.raises(ValueError, match="a fish"):  # the worker counts it as an error of this response
        grade("reasoning_gym", whole, "a fish")
    with pytest.raises(UserError, match="can't score this entry of 'd'"):
        check_gold("reasoning_gym", prompt("7", reasoning_gym={"dataset": "d", "entry": {}}))


def test_reasoning_gym_keeps_the_lines_of_an_answer_without_tags():
    reasoning_gym = pytest.importorskip("reasoning_gym")
    entry = reasoning_gym.create_dataset("n_queens", size=1, seed=5)[0]
    board = prompt(entry["answer"], reasoning_gym={"dataset": "n_queens", "entry": entry})
    for response in (entry["answer"], f"Answer:\n{entry['answer']}", f"<answer>\n_ _\n<ANSWER>{entry['answer']}</answer> <answer>"):
        assert grade("reasoning_gym", board, response) == 1.0


@pytest.mark.parametrize(("grader", "package"), [("math", "math_verify"), ("reasoning_gym", "reasoning_gym")])
def test_missing_package_is_named(monkeypatch, grader, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"pip install {package.replace('_', '-')}"):
        grade(grader, prompt("1"), "1")


def test_bad_names_and_missing_answers():
    with pytest.raises(UserError, match="choose one of exact, number, math, choice, reasoning_gym"):
        grade("none", prompt("1"), "1")
    for grader in ("exact", "number"):
        with pytest.raises(UserError, match="prompt 3: no field 'answer'"):
            grade(grader, prompt(None), "1")
    other = replace(prompt(None), meta={"Ground_Truth": "1", "level": 3, "target": "1"})
    with pytest.raises(
        UserError, match=r"compares with \(there is 'Ground_Truth', 'target'; if that holds it, rename it to 'answer'\); add it"
    ):
        grade("number", other, "1")


def test_golds():
    pytest.importorskip("math_verify")
    for grader, gold in (
        ("exact", "x=3"), ("number", "1{,}200"), ("number", "−3"), ("number", "１２"),
        ("math", r"\$18.90"), ("math", r"\boxed{\$18.90}"), ("math", r"\frac12"), ("math", r"\text{Evelyn}"), ("math", "$x+1$"), ("math", "x>=3"),
    ):  # fmt: skip
        check_gold(grader, prompt(gold))
    for grader, gold in (("exact", " \n"), ("math", ""), ("math", "$$"), ("math", r"\frac{1}{"), ("number", "nan")):
        with pytest.raises(UserError, match="prompt 3"):
            check_gold(grader, prompt(gold))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("7", "7"),
        ("<think>5</think>7", "7"),
        ("5</think> 7", " 7"),
        ("<think>a</think>5<think>b</think>7", "7"),
        (r"<think> try \boxed{7} then", None),
        ("<think>a</think> 7 <think> or", None),
        ("<think>7</think>", ""),
    ],
)
def test_what_is_thought_is_no_answer(text, wanted):
    assert answer_part(text) == wanted
    if wanted is None:
        assert grade("number", prompt("7"), text) == 0.0


@pytest.mark.parametrize(
    ("gold", "response", "score"),
    [
        ("12", "so\n#### 12 apples", 1),
        ("12", "#### 12.", 1),
        ("12", "#### 12. She had 5 before.", 1),
        ("12", "#### 12\n\nI hope that this helps with all 5 questions!", 1),
        ("12", "**Answer:** 12", 1),
        ("Paris", "Answer: Paris.\nIt lies on the Seine.", 1),
        ("12", "#### 12.5", 0),
        ("12", "#### 12,5", 0),
        ("12", "#### 12 + 5", 0),
        ("12", "#### 12 or 13", 0),
        ("2", "#### 2. Then add\nso it is 9", 0),
        ("x>=3", "so x >= 3", 0),
        ("x>=3", "x >= 3", 1),
        ("3", "x>=3", 0),
        ("x=3", "2x=6, x = 3", 1),
        ("x=3", "#### x=3", 1),
        ("x=3", "2x=3", 0),
        ("46", "12+34=46", 1),
    ],
)
def test_exact_answers_with_something_around_them(gold, response, score):
    assert grade("exact", prompt(gold), response) == score


@pytest.mark.parametrize(
    ("gold", "response", "score"),
    [
        ("12", "#### 12 apples. She had 5 before.", 1),
        ("5", "#### 12 apples. She had 5 before.", 0),
        ("7", "#### 3 + 4 = 7", 1),
        ("9", "#### 2. Then add\nso it is 9", 1),
        ("18.9", r"\$18.90", 1),
        ("12", "it is １２", 1),
        ("1200", "1{,}200 or so", 1),
        ("1200", r"$1\,200$", 1),
        ("1200", "1\u202f200", 1),
        ("0.5", r"\frac12", 1),
        ("2", r"\frac{1}{2}", 0),
        ("2", "1/2", 0),
        ("3.5", r"3\frac{1}{2} cups", 1),
        ("3.5", "3 1/2 cups", 1),
        ("3.5", "#### 3 1/2", 1),
        ("30", "#### 12:30", 1),
        ("12", "#### 12 cups or so", 1),
        ("24", "48/2", 1),
        ("50", r"50\%", 1),
        ("12", "12 cm^2", 1),
        ("10", "2^{10}", 0),
        ("300000", r"3 \times 10^5", 1),
        ("300000", "3 x 10^{5}", 1),
        ("1", "1/0", 0),
        ("12", "**12**", 1),
    ],
)
def test_numbers_as_people_write_them(gold, response, score):
    assert grade("number", prompt(gold), response) == score


@pytest.mark.parametrize(
    ("gold", "response", "score"),
    [
        (r"\$18.90", r"so \boxed{\$18.90}.", 1),
        (r"18.90", r"so $\boxed{\$18.90}$.", 1),
        (r"\$18.90", "it costs 18.90", 1),
        ("x>=3", "x>=3", 1),
        ("x>=3", r"$x \ge 3$", 1),
        ("3", "x>=3", 0),
        ("x=3", r"\boxed{3}", 1),
        ("12", "#### 12 apples", 1),
        ("12", "#### 12. She had 5 before.", 1),
        (r"3\sqrt{2}", r"#### $3\sqrt{2}$", 1),
        ("3", r"#### $3\sqrt{2}$", 0),
        ("12x", "#### $12x$", 1),
        ("12", "#### $12x$", 0),
        ("1,2", "#### $1, 2$", 1),
        ("7/2", r"#### $3\frac{1}{2}$", 1),
        ("12000", r"\boxed{12\,000}", 1),
        (r"12\,000", r"\boxed{12000}", 1),
        ("12000", r"\boxed{12{,}000}", 1),
        ("12", r"\boxed{１２}", 1),
        ("-3", r"\boxed{−3}", 1),
        ("0.5", r"\boxed{\frac12}", 1),
        (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}", 1),
        (r"50\%", r"\boxed{50\%}", 1),
        ("12", r"\boxed{12\text{ cm}}", 1),
        (r"\{1,2\}", r"\boxed{\{2,1\}}", 1),
        ("[1,2)", r"\boxed{[1,2)}", 1),
        ("[1,2)", r"\boxed{[1,2]}", 0),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\boxed{\begin{pmatrix}1&2\\3&4\end{pmatrix}}", 1),
        (r"3\frac{1}{2}", r"\boxed{3.5}", 1),
        ("7", r"first \boxed{3}, then \boxed{7}", 1),
        ("3", r"first \boxed{3}, then \boxed{7}", 0),
        ("7", r"We see \boxed{7} is the answer, out of 12.", 1),
        (r"\frac{1}{\sqrt{2}}", r"\boxed{\frac{1}{\sqrt{2}}}", 1),
    ],
)
def test_formulas_as_people_write_them(gold, response, score):
    pytest.importorskip("math_verify")
    check_gold("math", prompt(gold))
    assert grade("math", prompt(gold), response) == score
