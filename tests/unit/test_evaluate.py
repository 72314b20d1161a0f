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
from megatron_opd.cost.meter import read_stages
from megatron_opd.data.store import StoreReader
from megatron_opd.data.writer import create_store, write_part
from megatron_opd.evaluate.accuracy import answers_sha256, grade_store, response_text
from megatron_opd.evaluate.grade import GRADING
from megatron_opd.hf.lineage import load_tokenizer
from megatron_opd.recipe.evaluation import Evaluation
from megatron_opd.records import Finish, Prompt, PromptFile, Rollout, SamplingParams
from megatron_opd.serve import stage


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: make_model(folder / name, seed=seed) for seed, name in enumerate(("teacher", "student"))}


class Run:
    """`megatron-opd eval` of the recipe tiny in a folder of its own."""

    def __init__(self, folder: Path, models: dict[str, Path], capsys: pytest.CaptureFixture[str]):
        self.folder, self.capsys = folder, capsys
        self.model = f"mine={models['student']}"
        self.prompts = write_prompts(folder / "prompts.jsonl", 4)
        self.settings = [
            "tiny", f"run_dir={str(folder)!r}", f"eval.held_out.prompts={str(self.prompts)!r}", "eval.held_out.grader=exact", "eval.held_out.teacher=none",
            f"models.teacher={str(models['teacher'])!r}", f"models.student={str(models['student'])!r}",
            "eval.held_out.sampling.max_new_tokens=4", "eval.held_out.models=['teacher','base','sft','opd']",
        ]  # fmt: skip

    def __call__(self, *words: str, command: Sequence[str] = ("eval",), of: Sequence[str] | None = None) -> tuple[int, str, str]:
        """The exit code and what was printed; `of`: by default the student, as a model beside those of the run."""
        models = ["--of", *(of or [self.model])] if command[0] == "eval" else []
        code = main([*command[:1], *self.settings, *words, *command[1:], *models])
        captured = self.capsys.readouterr()
        return code, captured.out, captured.err

    def result(self, label: str = "mine", name: str = "held_out") -> dict[str, Any]:
        def refuse(constant: str) -> None:
            raise ValueError(f"{constant} is not JSON")

        return json.loads((self.folder / "eval" / name / f"{label}.json").read_text(), parse_constant=refuse)


@pytest.fixture
def run(tmp_path: Path, models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(tmp_path, models, capsys)


def test_unreadable_answers_are_found_before_anything_is_sampled(run: Run) -> None:
    rows = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "seven"}, {"prompt": "c"}]
    run.prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for command in (("eval",), ("check", "--stage", "inputs")):
        code, _, error = run(
            "eval.held_out.grader=number", *([] if command == ("eval",) else ["rollout=null", "generate=null"]), command=command
        )
        assert code == 2
        assert f"{run.prompts}: 2 of 3 answers can't be used by the grader 'number'" in error
        assert "prompt 1: answer 'seven' is not a number" in error
        assert "prompt 2: no field 'answer'" in error
    assert not (run.folder / "eval").exists()


def test_a_check_where_the_grader_is_not_installed_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    code, output, _ = run("eval.held_out.grader=math", "rollout=null", "generate=null", command=("check", "--stage", "inputs"))
    assert code == 0
    assert "are not looked at here: the grader 'math' needs the package math-verify" in output
    assert run("eval.held_out.grader=math")[0] == 2


def test_a_baseline_that_is_not_there_is_found_before_anything_is_sampled(run: Run) -> None:
    code, _, error = run("eval.held_out.baseline=base")
    assert code == 2
    assert f"eval.held_out.baseline='base': that model was not evaluated in {run.folder}/eval/held_out (there is none yet)" in error
    assert "make it first: megatron-opd eval RECIPE held_out --of base" in error
    assert run(of=["teacher"])[0] == 0
    code, _, error = run("eval.held_out.baseline=base")
    assert (code, "there are teacher" in error) == (2, True)
    for other in ("sampling.temperature=0.5", "num_prompts=3", "encoding.system=Hush"):
        code, _, error = run("eval.held_out.baseline=teacher", f"eval.held_out.{other}")
        assert code == 2
        assert "eval.held_out.baseline='teacher' was evaluated with other" in error
    code, _, error = run("eval.held_out.baseline=teacher", "eval.held_out.teacher={teacher}")
    assert code == 2
    assert "teacher.opd.zarr" in error
    assert not (run.folder / "eval" / "held_out" / "mine.opd.zarr").exists()
    assert run("eval.held_out.baseline=teacher")[0] == 0
    assert run.result()["against"]["name"] == "teacher"


def test_the_usual_baseline_counts_where_it_is_there(run: Run) -> None:
    code, output, _ = run()
    assert code == 0
    assert f"eval.held_out mine: not compared with 'sft', which has no samples in {run.folder}/eval/held_out" in output
    assert "against" not in run.result()
    folder = run.folder / "eval" / "held_out"
    (folder / "mine.opd.zarr").rename(folder / "sft.opd.zarr")
    code, output, _ = run()
    assert (code, run.result()["against"]["name"]) == (0, "sft")
    code, output, _ = run("eval.held_out.baseline=none")
    assert (code, "against" in run.result(), "not compared" in output) == (0, False, False)
    code, output, _ = run("eval.held_out.num_prompts=3", of=[run.model.replace("mine", "other")])
    assert code == 0
    assert "eval.held_out other: not compared with 'sft', as nobody asked for it: " in output
    assert "was evaluated with other prompts" in output
    assert "against" not in run.result("other")


def test_sampling_and_intervals_are_labelled(run: Run) -> None:
    """The model against itself: the same samples, so no spread in any difference; at temperature 0.5 no reverse KL either."""
    settings = [
        f"eval.held_out.{field}" for field in ("teacher={teacher}", "sampling.temperature=0.5", "sampling.top_k=7", "baseline=base")
    ]
    code, output, _ = run(*settings, of=["base", run.model])
    assert code == 0
    assert (
        output.count("nat/token (sampled at temperature 0.5, top-k 7: not an unbiased estimate)") == 4
    )  # each, the difference, and below the table
    assert "accuracy +0.0 points (no interval: the same for every prompt)" in output
    assert "reverse KL +0.0000 (no interval: the same for every prompt)" in output
    assert run.result()["reverse_kl_caveat"] == "sampled at temperature 0.5, top-k 7"
    assert main(["report", str(run.folder)]) == 0
    report = (run.folder / "report" / "report.md").read_text()
    assert report.count(", sampled at temperature 0.5, top-k 7 |") == 5  # two models in the verdict and in the results, and the difference
    plain = [f"eval.plain.{field}" for field in (f"prompts={str(run.prompts)!r}", "sampling.max_new_tokens=4", "grader=none")]
    assert run(*plain, "plain")[0] == 0
    assert run.result(name="plain")["reverse_kl_caveat"] is None


def test_one_prompt_alone_has_no_interval(run: Run) -> None:
    settings = [f"eval.held_out.{field}" for field in ("num_prompts=1", "teacher={teacher}", "baseline=base")]
    code, output, _ = run(*settings, of=["base", run.model])
    assert code == 0
    assert run.result()["reverse_kl"]["low"] is None
    assert "reverse KL +0.0000 (no interval: one prompt alone)" in output
    assert "inf" not in output
    assert main(["report", str(run.folder)]) == 0
    report = run.capsys.readouterr().out + (run.folder / "report" / "report.md").read_text()
    assert "left out" not in report
    assert "(no interval: one prompt alone)" in report


def test_several_evaluations_and_models_make_one_table(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each model is loaded once; what was made before is in the table too."""
    opened: list[str] = []

    def open_engine(config: Any, model: str, **options: Any) -> Any:
        opened.append(Path(model).name)
        return really_open(config, model, **options)

    really_open = stage.open_engine
    monkeypatch.setattr(stage, "open_engine", open_engine)
    more = [
        f"eval.more.{field}"
        for field in (f"prompts={str(run.prompts)!r}", "num_prompts=2", "sampling={ max_new_tokens = 4, samples_per_prompt = 3 }")
    ]
    assert run(*more, "held_out", of=["teacher"])[0] == 0
    assert opened == ["teacher"]
    opened.clear()
    code, output, _ = run(*more, "held_out", "more", of=["base", "teacher"])
    assert code == 0
    assert opened == ["teacher", "teacher", "student", "teacher"], "of each model once, and once to score: `more` has a teacher"
    table = output[output.rindex("\nmodel ") :].split("\n\n")[0].strip().splitlines()
    assert [line.split("  ")[0] for line in table] == ["model", "-------", "teacher", "base"]
    assert "held_out (average@1)" in table[0]
    assert "more (average@3)" in table[0]
    assert all(line.count("%") == 6 for line in table[2:]), "an accuracy with its interval in each cell"
    code, output, _ = run(*more, of=["base"])
    assert "teacher " in output[output.rindex("\nmodel ") :], "which was made earlier"


def test_names_and_models_that_are_not_there(run: Run, tmp_path: Path) -> None:
    for words, of, expected in (
        (["aime24"], ["base"], "no evaluation 'aime24' in this recipe (there are held_out)"),
        ([], ["student"], "--of student: teacher, base, sft, opd, round-N, or LABEL=DIRECTORY"),
        ([], [f"sft={tmp_path}"], "'sft' is what a model of the run is called"),
        ([], ["x=a", "x=b"], "one label for two models; give each a label of its own"),
        ([], ["round-2"], "round-2: the recipe has rounds.count = 1"),
        ([], ["base", "held_out"], "names of evaluations go before --of"),
        (["eval.held_out=null"], ["base"], "the recipe has no [eval.NAME] section"),
        ([], ["opd"], f"{tmp_path}/opd-hf is not there: run 'megatron-opd"),
    ):
        code, _, error = run(*words, of=of)
        assert (code, expected in error) == (2, True), error
    assert run(of=["base", "eval.held_out.num_prompts=3", f"run_dir={str(tmp_path)!r}"])[0] == 0, "a field behind --of is a field"
    assert run.result("base")["num_prompts"] == 3


def test_programs_of_a_model_run_only_where_that_is_allowed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_opd.evaluate.code.pool.describe_isolation", lambda limits: "walls.")
    for command in (("eval",), ("check", "--stage", "inputs")):
        code, _, error = run("eval.held_out.grader=code", command=command)
        assert code == 2
        assert "eval.held_out: the grader 'code' runs every program that a model answers with, as you" in error
        assert "On this machine programs are kept apart by walls." in error
        assert "to allow it: eval.held_out.allow_code_execution=true" in error
        assert "to leave it out: eval.held_out=null, or in a recipe that extends this one unset = ['eval.held_out']" in error
    assert not (run.folder / "eval").exists()
    code, output, _ = run("eval.held_out.grader=code", command=("run", "--plan"))
    assert code == 3
    assert "to allow it: eval.held_out.allow_code_execution=true" in output


def test_samples_are_graded_again_with_the_answers_of_now(tmp_path: Path, models: dict[str, Path]) -> None:
    stage = Evaluation(name="a", label="opd", model=str(models["student"]), prompts="", grader="number")
    reader = make_store(tmp_path / "s", models["student"], [("#### 12 apples", Finish.STOP), ("7", Finish.STOP)])
    for answers, wanted in ((("12", "8"), [1.0, 0.0]), (("12", "7"), [1.0, 1.0])):
        totals, _ = grade_store(stage, reader, [Prompt(i, "q", answer) for i, answer in enumerate(answers)])
        assert [totals[i] for i in (0, 1)] == [(score, 1.0) for score in wanted]


def test_mended_answers_cost_no_new_samples(run: Run) -> None:
    """The samples stay, and are graded anew; another prompt is another evaluation."""
    assert run("eval.held_out.grader=number")[0] == 0
    part = run.folder / "eval" / "held_out" / "mine.opd.zarr" / "parts" / "000000"
    before = sorted((path, path.stat().st_mtime_ns) for path in part.rglob("*"))
    rows = [json.loads(line) for line in run.prompts.read_text().splitlines()]
    run.prompts.write_text("".join(json.dumps(row | {"answer": [f"{i}00"]}) + "\n" for i, row in enumerate(rows)))
    code, output, _ = run("eval.held_out.grader=number")
    assert code == 0
    assert "has all its parts" in output
    assert run("eval.held_out.grader=number")[0] == 0
    graded = [row for row in read_stages(run.folder / "stages.jsonl") if row["stage"] == "eval.held_out mine grading"]
    assert len(graded) == 2, "when nothing was left to grade nothing is accounted"
    assert all(row["seconds"] > 0 and row["tokens"] == run.result()["response_tokens"] for row in graded)
    assert sorted((path, path.stat().st_mtime_ns) for path in part.rglob("*")) == before
    run.prompts.write_text("".join(json.dumps(row | {"prompt": f"{row['prompt']}?"}) + "\n" for row in rows))
    code, _, error = run("eval.held_out.grader=number")
    assert code == 2
    assert "made with other settings: prompts is" in error


def test_a_baseline_is_graded_by_its_own_evaluation_alone(run: Run) -> None:
    """Graded otherwise, its rows and figures stay, and its accuracy is not compared; graded alike, it is."""
    baseline = "eval.held_out.baseline=teacher"
    assert run(of=["teacher"])[0] == 0
    record = run.result("teacher")
    assert (record["grading_seconds"], record["grading_version"], record["encoding"]["chat_template"]) == (5.0, GRADING, "auto")
    files = [run.folder / "eval" / "held_out" / f"teacher{suffix}" for suffix in (".json", ".prompts.jsonl")]
    before = [path.read_bytes() for path in files]
    mended = [json.loads(line) for line in run.prompts.read_text().splitlines()]
    run.prompts.write_text("".join(json.dumps(row | {"answer": [f"{i}00"]}) + "\n" for i, row in enumerate(mended)))
    for change, what in (("", "answers or tests"), ("eval.held_out.grader=number", "answers or tests, grader (exact and number)")):
        code, output, _ = run(baseline, *[change] * bool(change))
        assert code == 0
        note = f"accuracy is not compared: teacher was graded with other {what}; grade it again: megatron-opd eval RECIPE held_out --of teacher"
        assert run.result()["against"] == {"name": "teacher", "num_prompts": 0, "note": note}
        assert f"held_out mine against teacher:  {note}" in output
    assert [path.read_bytes() for path in files] == before
    assert main(["report", str(run.folder)]) == 0
    assert note in (run.folder / "report" / "report.md").read_text()
    assert run(baseline, "eval.held_out.grader=number", of=["teacher", run.model])[0] == 0
    assert run.result()["answers_sha256"] == run.result("teacher")["answers_sha256"] != record["answers_sha256"]
    assert run.result()["against"]["num_prompts"] == 4


def test_the_hash_of_answers_is_of_the_tests_too() -> None:
    def hashed(grader: str, *rows: dict[str, Any]) -> str:
        stage = Evaluation.model_validate({"name": "a", "label": "opd", "model": "", "prompts": "", "grader": grader})
        return answers_sha256(stage, [Prompt(i, "q", row.get("answer"), row) for i, row in enumerate(rows)])

    one, two = ({"tests": {"kind": "stdin", "cases": [{"stdin": "1", "stdout": out}]}} for out in ("1", "2"))
    assert hashed("code", one) == hashed("code", one | {"source": "another column"})
    assert len({hashed("code", *rows) for rows in ([one], [two], [one, two], [two, one])}) == 4
    assert len({hashed("exact", *({"answer": text} for text in texts)) for texts in ("12", "21", "1", "")}) == 4


def test_a_plan_says_which_figures_are_not_what_the_recipe_asks(run: Run) -> None:
    """What the figures of an older version do not say is taken to be as it is now."""
    assert run(of=["base"])[0] == 0
    path, scored = run.folder / "eval" / "held_out" / "base.json", "eval.held_out.teacher={teacher}"
    figures = json.loads(path.read_text()) | {"grading_seconds": 5.0, "grading_version": GRADING}
    old = {key: value for key, value in figures.items() if not key.startswith("grading_")}
    for there, setting, expected in (
        (figures, "eval.held_out.grading_seconds=5", ""),
        (figures, "eval.held_out.grading_seconds=9", "grading_seconds 5.0 there, 9.0 here"),
        (old, "eval.held_out.grading_seconds=9", ""),
        (figures | {"grading_version": 1}, "eval.held_out.grading_seconds=5", f"grading_version 1 there, {GRADING} here"),
        (figures, scored, "the reverse KL to the teacher is missing"),
    ):
        path.write_text(json.dumps(there))
        _, output, _ = run(setting, "eval.held_out.models=['base']", command=("run", "--plan"))
        assert ("made again from the same samples" in output) == bool(expected)
        assert expected in output
    assert run(scored, of=["base"])[0] == 0
    assert "from the same samples" not in run(scored, "eval.held_out.models=['base']", command=("run", "--plan"))[1]


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
    stage = Evaluation(name="a", label="opd", model=str(models["student"]), prompts="", grader="math", grading_seconds=0.7)
    totals, grading = grade_store(stage, make_store(tmp_path / "s", models["student"], responses), [Prompt(i, "q", "7") for i in range(6)])
    assert [score for score, _ in totals.values()] == [0, 0, 0, 0, 1, 1]
    assert list(totals) == list(range(6))
    counts = {"cut": 2, "unclosed": 1, "no_answer": 0, "timeouts": 1, "errors": 0}
    shares = {f"{name}_share": pytest.approx(count / 6) for name, count in counts.items()}
    assert grading == {"responses": 6, **counts, **shares, "first_fault": "prompt 3: over the limit of time"}


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
