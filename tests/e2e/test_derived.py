"""Derived teachers by the real commands: scored by a teacher that is not the SFT teacher, derived, trained on, killed, planned."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from fork_server import Job, shared_server
from tiny_models import make_model, write_prompts

from megatron_opd.checkpoints.saved import latest_checkpoint
from megatron_opd.cli import main
from megatron_opd.cost.meter import read_stages
from megatron_opd.data.store import StoreReader
from megatron_opd.hf.lineage import read_lineage
from megatron_opd.pipeline.plan import NOT_FINISHED
from megatron_opd.pipeline.set_aside import set_aside
from megatron_opd.pipeline.stages import list_stages
from megatron_opd.recipe.files import load_recipe
from megatron_opd.records import Derivation

LESS = ["score.derived.less.method=residualize", "train.teacher=less"]
MIXED = ["score.derived.mixed.method=shuffle", "score.derived.mixed.seed=5"]


def words(folder: Path, run: str, command: str, *changes: str) -> list[str]:
    settings = {
        "run_dir": folder / run,
        "models.teacher": folder / "other",
        "models.student": folder / "student",
        "rollout.model": folder / "student",
        "rollout.sft_teacher": folder / "teacher",
        "rollout.prompts": folder / "prompts.jsonl",
        "rollout.prompts_per_part": 4,
        "rollout.sampling.max_new_tokens": 8,
        "train.init": folder / "student",
        "train.global_batch": 8,
        "train.steps": 2,
        "generate": "null",
        "eval": "null",
    }
    options = [change for change in changes if change.startswith("--")]
    return [command, "tiny", *(f"{key}={value}" for key, value in settings.items()), *(c for c in changes if c not in options), *options]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and `run` with rollouts that the teacher 'other' scored, from which 'less' and 'mixed' were derived."""
    folder = tmp_path_factory.mktemp("derived")
    for seed, name in enumerate(("student", "teacher", "other")):
        make_model(folder / name, seed=seed, layers=1)
    write_prompts(folder / "prompts.jsonl", 12)
    assert main(words(folder, "run", "rollout")) == 0
    assert main(words(folder, "run", "score", *LESS, *MIXED)) == 0
    return folder


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Path:
    """The same run, without the checkpoint of a training."""
    return Path(shutil.copytree(folder / "run", folder / tmp_path.name, ignore=shutil.ignore_patterns("opd")))


def command(run: Path, command: str, *changes: str) -> int:
    return main(words(run.parent, run.name, command, *changes))


def checksums(run: Path, name: str) -> dict[int, int]:
    reader = StoreReader(str(run / "rollouts.opd.zarr"))
    return {part: record.crc32c["logp"] for part in reader.parts if (record := reader.score_manifest(part, name)) is not None}


def train(run: Path, *changes: str) -> str:
    log = run / "train.log"
    (ending,) = shared_server().run(Job(words(run.parent, run.name, "train", *changes, "--nproc=1"), str(log)))
    assert ending.code == 0, log.read_text()[-3000:]
    return log.read_text()


def test_an_inconsistent_teacher_trains_through_what_is_derived_of_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "rollouts.opd.zarr/parts/000000/teacher")
    assert command(run, "score", *MIXED) == 2  # training reads the scores themselves
    assert "train on scores derived by 'residualize'" in capsys.readouterr().err
    assert command(run, "score", *LESS, *MIXED) == 0
    printed = capsys.readouterr().out
    assert "but other (" in printed
    assert "training on the scores of 'teacher' themselves will be refused" in printed
    assert "derive: 'less' in 1 of 3 parts" in printed
    assert re.search(
        r"log pi_T - log pi_ref is -?0\.\d{4} nats on average, with a variance in 1 of 3 parts of \d+\.\d{4}, of which -?\d+\.\d% recurs",
        printed,
    )
    for teacher in ("teacher", "mixed"):
        assert command(run, "check", f"train.teacher={teacher}") == 2
        assert "the student was fine-tuned on answers of teacher (" in capsys.readouterr().err
    printed = train(run, *LESS)
    assert "teacher 'less': the scores of 'teacher' without their recurring part (residualize 1: folds 5" in printed
    assert "the student was fine-tuned on answers of teacher (" in printed
    assert "WARNING" not in printed
    checkpoint = latest_checkpoint(run / "opd")
    assert checkpoint is not None
    lineage = read_lineage(checkpoint)
    assert lineage is not None
    assert lineage.overrides == []
    assert lineage.opd_teacher is not None
    assert lineage.opd_teacher.name == "other"
    settings = {"folds": 5, "position_bins": 10, "surprisal_bins": 10, "smoothing": 5.0, "seed": 0}
    assert lineage.opd_scores == Derivation(method="residualize", source="teacher", settings=settings, version=1)
    assert any(row["stage"] == "derive" and row["tokens"] for row in read_stages(run / "stages.jsonl"))


def test_a_shuffled_teacher_needs_what_its_source_needs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = train(run, *MIXED, "train.teacher=mixed", "--allow-teacher-mismatch")
    assert "the scores of 'teacher' SHUFFLED between tokens, as a control (shuffle 1: seed 5)" in printed
    assert "WARNING: teacher mismatch allowed" in printed
    lineage = read_lineage(str(latest_checkpoint(run / "opd")))
    assert lineage is not None
    assert lineage.opd_scores == Derivation(method="shuffle", source="teacher", settings={"seed": 5}, version=1)
    assert len(lineage.overrides) == 1


def test_killed_and_gone_on_with(run: Path) -> None:
    """In the first part, in the second, and once more; then two at once do the rest."""
    wanted, log, parts = checksums(run, "less"), str(run / "derive.log"), run / "rollouts.opd.zarr/parts"
    job = Job(words(run.parent, run.name, "derive", *LESS), log, below="/teacher")

    def forget() -> None:
        for path in parts.glob("*/teacher/less"):
            shutil.rmtree(path)

    forget()
    (ending,) = shared_server().run(job)
    assert checksums(run, "less") == wanted
    forget()
    done = []
    for share in (0.3, 0.6, 0.3):
        (killed,) = shared_server().run(replace(job, kill_at=round(share * ending.operations)))
        assert killed.killed
        done.append(checksums(run, "less"))
        assert done[-1].items() <= wanted.items()
    assert [len(sums) for sums in done] == [0, 1, 1]
    endings = shared_server().run(job, job)
    assert [ending.code for ending in endings] == [0, 0], Path(log).read_text()[-3000:]
    assert checksums(run, "less") == wanted
    assert StoreReader(str(run / "rollouts.opd.zarr")).verify() == []


def states(run: Path, capsys: pytest.CaptureFixture[str], *changes: str) -> dict[str, str]:
    """Of each stage what the plan says."""
    capsys.readouterr()
    command(run, "run", *changes, "--plan")
    lines = capsys.readouterr().out.splitlines()
    named = [number for number, line in enumerate(lines) if line[:1].strip() and not line.startswith("next:")]
    return {
        lines[number].split()[0]: " ".join(" ".join(lines[number:end]).split())
        for number, end in zip(named, [*named[1:], len(lines)], strict=True)
    }


def test_the_plan_knows_them(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "derive done 6 of 6 parts" in states(run, capsys, *LESS, *MIXED)["derive"]
    assert "derive" not in states(run, capsys)
    found = states(run, capsys, *LESS, "score.derived.less.seed=1")["derive"]
    assert "derive STALE" in found
    assert "differs from the recipe: less: settings.seed 0 there, 1 here" in found
    assert command(run, "derive", *LESS, "score.derived.less.seed=1") == 2
    assert "give this one another name" in capsys.readouterr().err
    assert "derive partial 6 of 9 parts" in states(run, capsys, *LESS, *MIXED, "score.derived.new.method=shuffle")["derive"]
    assert command(run, "derive", *LESS, "new", "score.derived.new.method=shuffle", "score.derived.new.seed=9") == 0
    assert set(checksums(run, "new")) == {0, 1, 2}
    _, name, *overrides = words(run.parent, run.name, "derive", *MIXED)
    recipe = load_recipe(name, overrides)
    place = set_aside(recipe, [stage for stage in list_stages(recipe) if stage.name == "derive"])
    assert place is not None
    assert len(list(place.glob("rollouts.opd.zarr/parts/*/teacher/mixed"))) == 3
    assert [set(checksums(run, name)) for name in ("mixed", "less", "teacher")] == [set(), {0, 1, 2}, {0, 1, 2}]
    shutil.rmtree(run / "rollouts.opd.zarr/parts/000001/teacher/teacher")
    found = states(run, capsys, *LESS)["derive"]
    assert "derive outdated 3 of 3 parts" in found
    assert "the scores that 'less' is made of are others since" in found
    assert command(run, "check", *LESS) == 2
    assert "the derived teacher 'less' is stale" in capsys.readouterr().err
    assert command(run, "score", *LESS) == 0
    assert "derive done 3 of 3 parts" in states(run, capsys, *LESS)["derive"]
    assert command(run, "progress", *LESS, "--stage=derive") == 0
    shutil.rmtree(run / "rollouts.opd.zarr/parts/000001/teacher/less")
    assert command(run, "progress", *LESS, "--stage=derive") == NOT_FINISHED


def test_the_plan_of_a_stale_one(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever it wants to know of the rollouts, it says what is to be done, and `run` does it."""
    in_tokens = [*LESS, "train.global_batch=null", "train.global_batch_tokens=60", "train.steps=null"]
    steps = re.search(r"0 of (\d+) steps", states(run, capsys, *in_tokens)["train"])
    train(run, *LESS)
    assert "train done 2 of 2 steps" in states(run, capsys, *LESS)["train"]
    (run / "identities.json").unlink()
    shutil.rmtree(run / "rollouts.opd.zarr/parts/000001/teacher/teacher")
    found = states(run, capsys, *LESS)
    assert "derive outdated 3 of 3 parts" in found["derive"]
    assert "train done 2 of 2 steps" in found["train"]
    assert steps is not None
    assert f"0 of {steps[1]} steps" in states(run, capsys, *in_tokens, f"train.output={run / 'tokens'}")["train"]
    assert command(run, "progress", *LESS, "--stage=train") == 0
    assert command(run, "run", *LESS, "--until=derive") == 0
    assert "derive done 3 of 3 parts" in states(run, capsys, *LESS)["derive"]

    more = [*LESS, "rollout.sampling.samples_per_prompt=3"]
    assert command(run, "rollout", *more, "--extend") == 0
    found = states(run, capsys, *more)
    assert "derive partial 3 of 6 parts" in found["derive"]
    assert "the rollouts in" in found["train"]
    assert "are others since" in found["train"]


def test_a_derived_name_is_not_scored_into(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(run, "score", "score.teacher=less", "--allow-teacher-mismatch") == 2
    assert "teacher 'less' of part 0 is derived (the scores of 'teacher' without" in capsys.readouterr().err


def test_a_store_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = str(run / "rollouts.opd.zarr")
    assert main(["derive", store, "folds=3", "--as", "own"]) == 0
    assert "'own' in 3 of 3 parts" in capsys.readouterr().out
    assert main(["derive", store, "--as", "own", "--method", "shuffle"]) == 2
    assert "derived otherwise" in capsys.readouterr().err
    assert main(["derive", store, "--as", "own", "fold=3"]) == 2
    assert "score.derived.own.fold: no such field; did you mean 'folds'?" in capsys.readouterr().err
    assert main(["derive", store, "--as", "more", "--teacher", "nobody"]) == 2
    assert "teacher 'nobody' has not scored 3 of 3 parts" in capsys.readouterr().err
    assert command(run, "derive", *LESS, "--method=shuffle") == 2
    assert "--method is for a store and a name (--as NAME)" in capsys.readouterr().err
    assert (
        json.loads((Path(store) / "parts/000000/teacher/own/zarr.json").read_text())["attributes"]["opd"]["derived"]["settings"]["folds"]
        == 3
    )
