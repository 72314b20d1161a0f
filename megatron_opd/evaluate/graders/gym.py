"""reasoning_gym's own scorers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megatron_opd.errors import UserError
from megatron_opd.evaluate.graders.reading import after_marker, bare, brief, last_box, one_line, tagged
from megatron_opd.evaluate.verdict import Verdict

if TYPE_CHECKING:
    from megatron_opd.records import Prompt


def check(prompt: Prompt) -> None:
    score, entry, dataset = _scorer(prompt)
    try:
        score(answer=entry.get("answer"), entry=entry)
    except Exception as error:
        raise UserError(
            f"prompt {prompt.index}: reasoning_gym can't score this entry of {dataset!r}: {type(error).__name__}: {error}"
        ) from None


def grade(prompt: Prompt, response: str) -> Verdict:
    """No answer: nothing in the tags, behind the marker, in the box, or in the response. Some scorers raise on what they can't parse."""
    score, entry, dataset = _scorer(prompt)
    answer, where = _given(response)
    if not answer:
        return Verdict(0.0, "no_answer", reason=f"nothing stands {where}")
    ways = dict.fromkeys((answer, bare(answer)))
    # The scorer sees the answer as it is, and without markup if that is another one; the better counts.
    given, value = max(((way, min(1.0, max(0.0, float(score(answer=way, entry=entry))))) for way in ways), key=lambda pair: pair[1])
    outcome = "right" if value == 1.0 else "partial" if value > 0 else "wrong"
    return Verdict(value, outcome, one_line(given), f"{dataset}'s scorer gives {value:g} for {brief(one_line(given))} {where}")


def _given(response: str) -> tuple[str, str]:
    within = tagged(response)
    if within is not None:
        return within, "in the last <answer>"
    marked = after_marker(response)
    if marked is not None:
        return marked, "behind the last marker"
    box = last_box(response)
    return (response.strip(), "in the response") if box is None else (box.strip(), "in the last box")


def _scorer(prompt: Prompt) -> tuple[Callable[..., Any], dict[str, Any], str]:
    """reasoning_gym's scorer, the entry, and the dataset's name. Raises UserError."""
    try:
        import reasoning_gym
    except ImportError:
        raise UserError("the grader 'reasoning_gym' needs the package reasoning-gym; install it with: pip install reasoning-gym") from None
    source = prompt.meta.get("reasoning_gym")
    if not isinstance(source, dict) or not isinstance(source.get("dataset"), str) or not isinstance(source.get("entry"), dict):
        raise UserError(
            f'prompt {prompt.index}: the grader \'reasoning_gym\' needs the field "reasoning_gym": {{"dataset": name, "entry": {{...}}}} in its row'
        )
    try:
        return reasoning_gym.get_score_answer_fn(source["dataset"]), source["entry"], source["dataset"]
    except ValueError:
        raise UserError(f"prompt {prompt.index}: reasoning_gym has no dataset {source['dataset']!r}") from None
