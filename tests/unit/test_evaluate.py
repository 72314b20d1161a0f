"""eval: what is found before anything is sampled, what counts as an answer, and how figures are labelled. Tiny models, real stages."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import make_model, write_prompts
from unit.store_parts import make_manifest

from megatron_opd.cli import main
from megatron_opd.config import EvalStage
from megatron_opd.data.store import StoreReader
from megatron_opd.data.writer import create_store, write_part
from megatron_opd.evaluate.accuracy import grade_store, response_text
from megatron_opd.lineage import load_tokenizer
from megatron_opd.records import Finish, Prompt, PromptFile, Rollout, SamplingParams


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: make_model(folder / name, seed=seed) for seed, name in enumerate(("teacher", "student"))}


class Run:
    """`megatron-opd eval` of the recipe tiny in a folder of its own."""

    def __init__(self, folder: Path, models: dict[str, Path], capsys: pytest.CaptureFixture[str]):
        self.folder, self.capsys = folder, capsys
        self.prompts = write_prompts(folder / "prompts.jsonl", 4)
        self.settings = [
            "tiny", f"run_dir={str(folder)!r}", f"eval.prompts={str(self.prompts)!r}", "eval.grader=exact", "eval.teacher=none",
            f"models.teacher={str(models['teacher'])!r}", f"models.student={str(models['student'])!r}",
            f"eval.model={str(models['student'])!r}", "eval.sampling.max_new_tokens=4",
        ]  # fmt: skip

    def __call__(self, *overrides: str, command: Sequence[str] = ("eval",)) -> tuple[int, str, str]:
        code = main([*command[:1], *self.settings, *overrides, *command[1:]])
        captured = self.capsys.readouterr()
        return code, captured.out, captured.err

    def result(self, name: str = "opd") -> dict[str, Any]:
        def refuse(constant: str) -> None:
            raise ValueError(f"{constant} is not JSON")

        return json.loads((self.folder / "eval" / f"{name}.json").read_text(), parse_constant=refuse)


@pytest.fixture
def run(tmp_path: Path, models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(tmp_path, models, capsys)


def test_unreadable_answers_are_found_before_anything_is_sampled(run: Run) -> None:
    rows = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "seven"}, {"prompt": "c"}]
    run.prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for command in (("eval",), ("check", "--stage", "inputs")):
        code, _, error = run("eval.grader=number", "rollout=null", "generate=null", command=command)
        assert code == 2
        assert f"{run.prompts}: 2 of 3 answers can't be used by the grader 'number'" in error
        assert "prompt 1: answer 'seven' is not a number" in error
        assert "prompt 2: no field 'answer'" in error
    assert not (run.folder / "eval").exists()


def test_a_check_where_the_grader_is_not_installed_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    code, output, _ = run("eval.grader=math", "rollout=null", "generate=null", command=("check", "--stage", "inputs"))
    assert code == 0
    assert "are not looked at here: the grader 'math' needs the package math-verify" in output
    assert run("eval.grader=math")[0] == 2


def test_a_baseline_that_is_not_there_is_found_before_anything_is_sampled(run: Run) -> None:
    code, _, error = run("eval.baseline=sft")
    assert code == 2
    assert "eval.baseline='sft': no such evaluation" in error
    assert "there is none yet" in error
    assert "megatron-opd eval RECIPE eval.name=sft eval.model=... eval.baseline=null" in error
    assert run("eval.name=base")[0] == 0
    code, _, error = run("eval.baseline=sft")
    assert (code, "there are base" in error) == (2, True)
    for other in ("eval.sampling.temperature=0.5", "eval.num_prompts=3", "eval.encoding.system=Hush"):
        code, _, error = run("eval.baseline=base", other)
        assert code == 2
        assert "eval.baseline='base' was evaluated with other" in error
    code, _, error = run("eval.baseline=base", "eval.teacher={teacher}")
    assert code == 2
    assert "base.opd.zarr" in error
    code, _, error = run("eval.baseline=opd")
    assert code == 2
    assert "is this evaluation's own name" in error
    assert not (run.folder / "eval" / "opd.opd.zarr").exists()
    assert run("eval.baseline=base")[0] == 0
    assert run.result()["against"]["name"] == "base"


def test_sampling_and_intervals_are_labelled(run: Run) -> None:
    """The model against itself: the same samples, so no spread in any difference; at temperature 0.5 no reverse KL either."""
    settings = ("eval.teacher={teacher}", "eval.sampling.temperature=0.5", "eval.sampling.top_k=7")
    assert run(*settings, "eval.name=base")[0] == 0
    code, output, _ = run(*settings, "eval.baseline=base")
    assert code == 0
    assert output.count("nat/token (sampled at temperature 0.5, top-k 7: not an unbiased estimate)") == 2
    assert "accuracy +0.0 points (no interval: the same for every prompt)" in output
    assert "reverse KL +0.0000 (no interval: the same for every prompt)" in output
    assert run.result()["reverse_kl_caveat"] == "sampled at temperature 0.5, top-k 7"
    assert main(["report", str(run.folder)]) == 0
    report = (run.folder / "report" / "report.md").read_text()
    assert report.count(", sampled at temperature 0.5, top-k 7 |") == 3
    assert run("eval.teacher={teacher}", "eval.name=plain")[0] == 0
    assert run.result("plain")["reverse_kl_caveat"] is None


def test_one_prompt_alone_has_no_interval(run: Run) -> None:
    settings = ("eval.num_prompts=1", "eval.teacher={teacher}")
    assert run(*settings, "eval.name=base")[0] == 0
    code, output, _ = run(*settings, "eval.baseline=base")
    assert code == 0
    assert output.count("(no interval: one prompt alone)") == 3  # accuracy itself has Wilson's
    assert run.result()["reverse_kl"]["low"] is None
    assert "inf" not in output
    assert main(["report", str(run.folder)]) == 0
    report = run.capsys.readouterr().out + (run.folder / "report" / "report.md").read_text()
    assert "left out" not in report
    assert "(no interval: one prompt alone)" in report


def test_samples_are_graded_again_with_the_answers_of_now(tmp_path: Path, models: dict[str, Path]) -> None:
    stage = EvalStage(model=str(models["student"]), prompts="", grader="number")
    reader = make_store(tmp_path / "s", models["student"], [("#### 12 apples", Finish.STOP), ("7", Finish.STOP)])
    for answers, wanted in ((("12", "8"), [1.0, 0.0]), (("12", "7"), [1.0, 1.0])):
        totals, _ = grade_store(stage, reader, [Prompt(i, "q", answer) for i, answer in enumerate(answers)])
        assert [totals[i] for i in (0, 1)] == [(score, 1.0) for score in wanted]


def test_mended_answers_cost_no_new_samples(run: Run) -> None:
    """The samples stay, and are graded anew; another prompt is another evaluation."""
    assert run("eval.grader=number")[0] == 0
    part = run.folder / "eval" / "opd.opd.zarr" / "parts" / "000000"
    before = sorted((path, path.stat().st_mtime_ns) for path in part.rglob("*"))
    rows = [json.loads(line) for line in run.prompts.read_text().splitlines()]
    run.prompts.write_text("".join(json.dumps(row | {"answer": [f"{i}00"]}) + "\n" for i, row in enumerate(rows)))
    code, output, _ = run("eval.grader=number")
    assert code == 0
    assert "has all its parts" in output
    assert sorted((path, path.stat().st_mtime_ns) for path in part.rglob("*")) == before
    run.prompts.write_text("".join(json.dumps(row | {"prompt": f"{row['prompt']}?"}) + "\n" for row in rows))
    code, _, error = run("eval.grader=number")
    assert code == 2
    assert "made with other settings: prompts is" in error


def test_what_scores_nothing_without_a_comparison_is_counted(tmp_path: Path, models: dict[str, Path]) -> None:
    pytest.importorskip("math_verify")
    responses = [
        (r"<think> try \boxed{7} then", Finish.LENGTH),
        (r"\boxed{7}", Finish.LENGTH),
        (r"<think> try \boxed{7} then", Finish.STOP),
        (r"\boxed{7^{9^9}}", Finish.STOP),
        (r"<think> try \boxed{8}</think> \boxed{7}", Finish.STOP),
        (r"\boxed{7}", Finish.STOP),
    ]
    stage = EvalStage(model=str(models["student"]), prompts="", grader="math", grading_seconds=0.7)
    totals, grading = grade_store(stage, make_store(tmp_path / "s", models["student"], responses), [Prompt(i, "q", "7") for i in range(6)])
    assert [score for score, _ in totals.values()] == [0, 0, 0, 0, 1, 1]
    assert list(totals) == list(range(6))
    counts = {"responses": 6, "cut": 2, "unclosed": 1, "timeouts": 1, "errors": 0, "cut_share": pytest.approx(1 / 3)}
    assert grading == counts | {"first_fault": "prompt 3: over the limit of time"}


def test_a_template_may_open_the_thinking_and_tags_may_be_special_tokens(models: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(models["student"])
    prompt, response = (tokenizer(text)["input_ids"] for text in ("<user>hi<assistant><think>\n", "8</think>7"))
    tokens = np.array([*prompt, *response, tokenizer.eos_token_id], np.int32)
    assert response_text(tokenizer, tokens, len(prompt)) == "<think>8</think>7"
    assert response_text(tokenizer, tokens, len(prompt) - 1) == "<think>\n8</think>7"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    tokens = np.array([*tokenizer("hi")["input_ids"], *tokenizer("<think>8</think>7<eos>")["input_ids"]], np.int32)
    assert response_text(tokenizer, tokens, 2) == "<think>8</think>7"


def make_store(path: Path, model: Path, responses: list[tuple[str, Finish]]) -> StoreReader:
    """A store of the given responses, one to a prompt."""
    tokenizer = load_tokenizer(model)
    prompts = PromptFile(name="p", sha256="0" * 64, num_prompts=len(responses))
    manifest = make_manifest(
        per_part=len(responses),
        prompts=prompts,
        sampling=SamplingParams(),
        sampler=make_manifest().sampler.model_copy(update={"vocab_size": 300}),
    )
    rollouts = []
    for number, (text, finish) in enumerate(responses):
        tokens = np.array([*tokenizer("q")["input_ids"], *tokenizer(text)["input_ids"]], np.int32)
        logp = np.array([math.nan, *[-1.0] * (len(tokens) - 1)], np.float32)
        rollouts.append(Rollout(tokens, 1, number, 0, finish, logp))
    write_part(create_store(str(path), manifest), 0, rollouts, [], {})
    return StoreReader(str(path))
