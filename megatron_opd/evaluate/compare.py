"""compare: two models, of one or of two runs, evaluation by evaluation, paired by prompt."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opd.errors import UserError
from megatron_opd.evaluate.intervals import difference_interval, proportion_interval
from megatron_opd.evaluate.passk import Samples, prompt_means
from megatron_opd.evaluate.rows import by_prompt, read_rows
from megatron_opd.evaluate.settings import ALL, differences
from megatron_opd.evaluate.wording import interval
from megatron_opd.safety.durable import write_json
from megatron_opd.safety.untrusted import read_object

_ROWS = ".prompts.jsonl"
_DEFAULT = "opd"
_AGAIN = "run 'megatron-opd eval' again"
_COLUMNS = ("evaluation", "before", "after", "difference, points (95 % interval)", "prompts", "solved by one alone: before", "after")


@dataclass(frozen=True)
class Side:
    """A model of a run: its evaluations lie in RUN/eval/NAME/MODEL.json and MODEL.prompts.jsonl."""

    run: Path
    model: str

    @property
    def title(self) -> str:
        return f"{self.run}:{self.model}"

    def evaluations(self) -> dict[str, Path]:
        """The files of rows, by the name of the evaluation."""
        return {path.parent.name: path for path in sorted((self.run / "eval").glob(f"*/{self.model}{_ROWS}"))}

    def ungraded(self) -> list[str]:
        """Names of evaluations that have figures of this model, and no rows: with the grader "none"."""
        found = (path.parent.name for path in sorted((self.run / "eval").glob(f"*/{self.model}.json")))
        return [name for name in found if name not in self.evaluations()]


def find_side(text: str) -> Side:
    """RUN or RUN:MODEL. Without MODEL it is "opd", or the only one that was evaluated. Raises UserError."""
    run, colon, model = (text, "", "") if os.path.isdir(text) else text.rpartition(":")
    if not colon:
        run = text
    found = sorted({path.name.removesuffix(_ROWS) for path in (Path(run) / "eval").glob(f"*/*{_ROWS}")})
    if not found:
        raise UserError(f"{run}: no evaluation whose samples were graded (no eval/*/*{_ROWS}); run 'megatron-opd eval' of its recipe")
    if not model:
        if _DEFAULT not in found and len(found) > 1:
            raise UserError(f"{run}: several models were evaluated; name one, as in {run}:{found[0]} (there are {', '.join(found)})")
        model = _DEFAULT if _DEFAULT in found else found[0]
    if model not in found:
        raise UserError(f"{run}: {model!r} was not evaluated; there are {', '.join(found)}")
    return Side(Path(run), model)


def compare(before: str, after: str, *, output: str | None = None) -> dict[str, Any]:
    """Print a table of `after` minus `before` for each evaluation that both have; returns what is written to `output` as JSON.

    One whose prompts or answers are not the same is left out and said, with the reason. Raises UserError where nothing is left.
    """
    sides = find_side(before), find_side(after)
    if sides[0] == sides[1]:
        raise UserError(f"{sides[0].title}: a model can't be compared with itself; give another RUN or RUN:MODEL")
    first, second = (side.evaluations() for side in sides)
    both = [name for name in first if name in second]
    if not both:
        raise UserError(f"{sides[0].title} and {sides[1].title} have no evaluation in common: {', '.join(first)}; {', '.join(second)}")
    compared: dict[str, dict[str, Any]] = {}
    refused: dict[str, str] = {}
    for name in both:
        try:
            compared[name] = compare_evaluation(first[name], second[name])
        except UserError as error:
            refused[name] = str(error)
    if not compared:
        raise UserError("\n".join(refused.values()))
    result = {"before": sides[0].title, "after": sides[1].title, "evaluations": compared, "refused": refused}
    print(f"{result['after']} minus {result['before']}, paired by prompt; accuracy alone, no reverse KL")
    _print(compared)
    for name, why in refused.items():
        print(f"{name} is left out: {why}")
    for side, here, there in ((sides[0], first, second), (sides[1], second, first)):
        if alone := [name for name in here if name not in there]:
            print(f"of {side.title} alone: {', '.join(alone)}")
        if ungraded := side.ungraded():
            print(f"of {side.title} not graded, so not compared: {', '.join(ungraded)}")
    if output is not None:
        write_json(output, result)
    return result


def compare_evaluation(before: Path, after: Path) -> dict[str, Any]:
    """The difference of two models over the same prompts. Raises UserError where they are not, naming what differs.

    A prompt is solved by one alone if at least one of its samples is right there, and none here. `notes`: settings that differ.
    """
    (record, first), (other, second) = (read_graded(path) for path in (before, after))
    for field in ("prompts_sha256", "grader", "answers_sha256"):
        if record.get(field) is None or other.get(field) is None:
            older = before if record.get(field) is None else after
            raise UserError(f"{older}: the .json file beside it does not say its {ALL[field]}: it is of an older version; {_AGAIN}")
        if found := differences(record, other, [field]):
            raise UserError(
                f"{before} and {after} were made with other {found[field]}; {_AGAIN} for both, with one file of prompts and one grader"
            )
    notes = [f"other {text}" for text in differences(record, other).values()]
    both = sorted(first.keys() & second.keys())
    if not both:
        raise UserError(f"{before} and {after} can't be compared: no prompt has a response in both")
    for prompt in both:
        golds = [rows[prompt][0].gold for rows in (first, second)]
        if golds[0] != golds[1]:
            raise UserError(
                f"{before} and {after} can't be compared: the answer of prompt {prompt} was {golds[0]!r:.80} and {golds[1]!r:.80} when "
                f"they were graded; {_AGAIN} for both, with one file of prompts"
            )
    if dropped := (first.keys() | second.keys()) - set(both):
        notes.append(f"{len(dropped)} prompts are left out, which one of them has no response to")
    totals = [prompt_means({prompt: rows[prompt] for prompt in both}) for rows in (first, second)]
    solved = [{prompt for prompt in both if any(row.outcome == "right" for row in rows[prompt])} for rows in (first, second)]
    return {
        "prompts": len(both),
        "before": proportion_interval(totals[0]).record(),
        "after": proportion_interval(totals[1]).record(),
        "difference": difference_interval(totals[1], totals[0]).record(),
        "solved_before_alone": [_named(prompt, first) for prompt in sorted(solved[0] - solved[1])],
        "solved_after_alone": [_named(prompt, second) for prompt in sorted(solved[1] - solved[0])],
        "notes": notes,
    }


def read_graded(rows: Path) -> tuple[dict[str, Any], Samples]:
    """The figures of a model (MODEL.json) and its graded samples by prompt, from the file of its rows. Raises UserError unless both are whole."""
    path = rows.with_name(rows.name.removesuffix(_ROWS) + ".json")
    try:
        record = read_object(path)
    except FileNotFoundError:
        raise UserError(f"{path}: not there, so the evaluation was not finished; {_AGAIN}") from None
    samples = by_prompt(read_rows(rows))
    graded, wanted = sum(map(len, samples.values())), (record.get("grading") or {}).get("responses")
    if graded != wanted:
        raise UserError(f"{rows}: {graded} samples are graded, and its .json file says {wanted}; {_AGAIN}")
    return record, samples


def _named(prompt: int, rows: Any) -> dict[str, Any]:
    return {"prompt": prompt, "id": rows[prompt][0].id}


def _print(evaluations: dict[str, dict[str, Any]]) -> None:
    table: list[tuple[str, ...]] = [_COLUMNS]
    for name, found in evaluations.items():
        figures = [interval(found[side], ".1%") for side in ("before", "after")]
        difference = interval(found["difference"], ".1f", factor=100, signed=True)
        alone = (str(len(found[f"solved_{side}_alone"])) for side in ("before", "after"))
        table.append((name, *figures, difference, str(found["prompts"]), *alone))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for name, found in evaluations.items():
        for note in found["notes"]:
            print(f"{name}: {note}")
