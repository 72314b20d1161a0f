"""What a run is: loss, teacher and initial model do not change without a word, and what does change is written down for good."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from safetensors.torch import load_file, save_file
from stores import make_scored_store
from tiny_models import make_model, write_prompts

from megatron_opd.checkpoints.saved import latest_checkpoint, read_state
from megatron_opd.cli import main
from megatron_opd.data.store import StoreReader
from megatron_opd.data.writer import write_scores
from megatron_opd.hf.lineage import read_lineage
from megatron_opd.pipeline.plan import NOT_FINISHED
from megatron_opd.records import TeacherScores
from megatron_opd.store_records import ScoreManifest

FORWARD = 'train.loss={name="forward_kl"}'


class Runs:
    """Trainings in this process, each in a folder of its own."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]):
        self.folder, self.capsys = folder, capsys

    def arguments(self, stage: str, output: str, *words: str, **options: Any) -> list[str]:
        settings = {"save_every": 1, "global_batch": 4, "micro_batch_tokens": 128, "lr": 1e-2} | options
        paths = {"run_dir": ".", "models.teacher": "teacher", "train.init": "student", "train.store": "store", "train.output": output}
        overrides = [f"{key}={str(self.folder / path)!r}" for key, path in paths.items()]
        return [stage, "tiny", *overrides, *(f"train.{key}={json.dumps(value)}" for key, value in settings.items()), *words]

    def __call__(self, stage: str, output: str, *words: str, code: int = 0, **options: Any) -> str:
        self.capsys.readouterr()
        found = main(self.arguments(stage, output, *words, **options))
        printed = self.capsys.readouterr()
        assert found == code, printed.out + printed.err
        return printed.out + printed.err

    def copy(self, name: str) -> Path:
        """A copy of the finished run of two steps."""
        shutil.copytree(self.folder / "first", self.folder / name)
        return self.folder / name

    def state(self, output: str) -> dict[str, Any]:
        checkpoint = latest_checkpoint(self.folder / output)
        assert checkpoint is not None
        return read_state(checkpoint)

    def history(self, output: str) -> list[dict[str, Any]]:
        path = self.folder / output / "history.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("identity")
    for seed, name in enumerate(("student", "teacher", "other")):
        make_model(folder / name, "qwen3", seed=seed)
    make_scored_store(folder / "store", sampler=folder / "student", teacher=folder / "teacher", top_k=4)
    assert main(Runs(folder, None).arguments("train", "first", steps=2)) == 0  # pyright: ignore[reportArgumentType]
    return folder


@pytest.fixture
def runs(made: Path, capsys: pytest.CaptureFixture[str]) -> Runs:
    return Runs(made, capsys)


def content(output: Path) -> dict[str, str]:
    """Every file of a run's folder by its hash; the lock's holder is another each time."""
    return {
        str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in output.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def edit_state(output: Path, change: Any) -> None:
    checkpoint = latest_checkpoint(output)
    assert checkpoint is not None
    checkpoints.edit_state(checkpoint, change)


def test_a_finished_run_is_not_filed_under_another_loss(runs: Runs) -> None:
    before = content(runs.copy("filed"))
    for words, change in (
        ([FORWARD], "loss.name opd -> forward_kl"),
        (["train.loss.advantage_clip=2.0"], "loss.advantage_clip None -> 2.0"),
        (["train.loss.normalization=token"], "loss.normalization sequence -> token"),
    ):
        for stage in ("train", "check"):
            message = runs(stage, "filed", *words, code=2, steps=2)
            assert change in message
            assert "train.output=..." in message
            assert "--continue-with-changes" in message
    assert content(runs.folder / "filed") == before


def test_a_start_that_trains_nothing_leaves_the_folder_as_it_was(runs: Runs) -> None:
    output = runs.copy("untouched")
    before = content(output)
    runs("train", "untouched", steps=2, log_every=7)  # finished
    runs("train", "untouched", steps=1)  # past its end
    runs("train", "untouched", code=2, steps=4, global_batch=21)  # not ready
    runs("train", "untouched", FORWARD, "--continue-with-changes", steps=2)
    assert content(output) == before
    (output / "STOP").touch()
    assert "stopped after step 2 as asked" in runs("train", "untouched", steps=4)
    assert content(output) == before


def test_steps_of_tokens_hold_what_they_held(runs: Runs) -> None:
    """A teacher that took but the beginnings makes rollouts shorter, and micro-batches where they are cut: steps would hold others."""
    tokens: dict[str, Any] = {"global_batch": None, "global_batch_tokens": 300, "overlong": "cut"}
    reader = StoreReader(str(runs.folder / "store"))
    for part, record in reader.parts.items():
        own, rollouts = reader.score_manifest(part, "teacher"), reader.part_rollouts(part)
        assert own is not None
        scores = [TeacherScores(rollout.cut(24).student_logp) for rollout in rollouts]
        short = ScoreManifest(part=part, teacher=own.teacher, max_tokens=24, part_crc32c=record.crc32c, crc32c={})
        write_scores(reader.location, "short", short, rollouts, scores)
    runs("train", "tokens", steps=1, **tokens)
    for stage in ("train", "check"):
        said = runs(stage, "tokens", "train.teacher=short", "--continue-with-changes", code=2, steps=2, **tokens)
        assert "made with rollouts of other lengths than" in said
        assert "cut_at = 128, now 96" in runs(stage, "tokens", code=2, steps=2, micro_batch_tokens=96, **tokens)
    for changes, said in (
        ({"micro_batch_tokens": 96}, "STALE .*differs from the recipe: cut_at 128 there, 96 here"),
        ({"distributed_optimizer": False}, "STALE .*differs from the recipe: distributed_optimizer True there, False here"),
        ({"lr": 1e-3}, "partial .*goes on with other settings: lr 0.01 there, 0.001 here"),
    ):
        progress = runs("progress", "tokens", "--stage=train", code=NOT_FINISHED, steps=2, **tokens, **changes)
        assert re.search(said, " ".join(progress.split())), progress
    runs("progress", "tokens", "--stage=train", steps=1, distributed_optimizer=False, **tokens)

    edit_state(runs.folder / "tokens", lambda state: state["fixed"].pop("lengths"))  # as older versions left it
    runs("train", "tokens", steps=2, **tokens)
    assert "lengths" in runs.state("tokens")["fixed"]


def test_a_wanted_change_goes_into_history_checkpoints_and_lineage(runs: Runs) -> None:
    runs.copy("wanted")
    override = "train went on after step 2 with other settings: loss.name opd -> forward_kl"
    assert f"WARNING: {override}" in runs("train", "wanted", FORWARD, "--continue-with-changes", steps=3)
    assert 'name = "forward_kl"' in (runs.folder / "wanted/recipe.toml").read_text()
    (row,) = runs.history("wanted")
    assert (row["after_step"], row["objective"], row["settings"]) == (2, ["loss.name opd -> forward_kl"], ["steps 2 -> 3"])
    assert runs.state("wanted")["overrides"] == [override]

    runs("train", "wanted", FORWARD, "--continue-with-changes", steps=4, lr=1e-3)  # the flag again: nothing is new but the rate
    assert [row["after_step"] for row in runs.history("wanted")] == [2, 3]
    assert runs.history("wanted")[1]["settings"] == ["lr 0.01 -> 0.001", "steps 3 -> 4"]
    assert "objective" not in runs.history("wanted")[1]
    assert runs.state("wanted")["overrides"] == [override], "in every later checkpoint, once"
    assert "loss.name forward_kl -> opd" in runs("train", "wanted", code=2, steps=5)

    assert main(["convert", "to-hf", str(runs.folder / "wanted"), str(runs.folder / "wanted-hf")]) == 0
    lineage = read_lineage(runs.folder / "wanted-hf")
    assert lineage is not None
    assert lineage.overrides == [override]


def test_history_is_of_the_steps_that_count(runs: Runs) -> None:
    """Set back to an earlier checkpoint, a run's later changes are as if they had not been."""
    output = runs.copy("back")
    runs("train", "back", FORWARD, "--continue-with-changes", steps=3, keep_last=9)
    (output / "checkpoints/latest").write_text("step_000002\n")
    runs("train", "back", steps=3)
    assert [row.get("objective") for row in runs.history("back")] == [None]
    assert runs.state("back")["overrides"] == []


def test_what_can_not_change_is_refused_with_the_flag_too(runs: Runs) -> None:
    runs.copy("fixed")
    for options in ({"global_batch": 8}, {"seed": 1}, {"distributed_optimizer": False}, {"max_response_tokens": 9}):
        (key,) = options
        message = runs("train", "fixed", "--continue-with-changes", code=2, steps=4, **options)
        assert f"made with {key} = " in message
        assert "train.output=..." in message


def test_another_initial_model_or_teacher(runs: Runs) -> None:
    """By their content: a copy elsewhere is the same; other weights, another rope and other scores are not."""
    output, folder = runs.copy("models"), runs.folder
    copied = Path(shutil.copytree(folder / "student", folder / "elsewhere"))
    runs("train", "models", f"train.init={str(copied)!r}", steps=3)
    config = json.loads((copied / "config.json").read_text())
    config["rms_norm_eps"] = 1e-2
    (copied / "config.json").write_text(json.dumps(config))
    assert "init.norm_eps 1e-06 -> 0.01" in runs("train", "models", f"train.init={str(copied)!r}", code=2, steps=4)

    make_scored_store(folder / "rescored", sampler=folder / "student", teacher=folder / "other", top_k=4)  # the same rollouts
    words = [f"train.store={str(folder / 'rescored')!r}", f"models.teacher={str(folder / 'other')!r}"]
    message = runs("train", "models", *words, code=2, steps=4)
    assert "teacher teacher (weights " in message
    assert " -> other (weights " in message
    assert "WARNING: train went on after step 3 with other settings: teacher teacher (" in runs(
        "train", "models", *words, "--continue-with-changes", steps=4
    )
    assert output.exists()


def test_a_checkpoint_of_an_older_version_goes_on(runs: Runs) -> None:
    """It has no `objective`, its loss among the settings, and the store with the scores in one hash."""
    from megatron_opd.data.identity import content_of
    from megatron_opd.data.store import StoreReader

    hashed = content_of(StoreReader(str(runs.folder / "store"), teacher="teacher"))

    def age(state: dict[str, Any]) -> None:
        loss = state.pop("objective")["loss"]
        state["settings"] |= {"loss": {key: value for key, value in loss.items() if key != "jsd_beta"}}  # not there yet, then
        del state["overrides"], state["content"], state["fixed"]["rollouts"]
        state["fixed"] |= {"teacher": "teacher", "store": hashed}

    edit_state(runs.copy("old"), age)
    assert "loss.name opd -> forward_kl" in runs("train", "old", FORWARD, code=2, steps=3)
    printed = runs("train", "old", steps=3)
    assert "did not record init, scores, teacher: that these are as they were is not checked" in printed
    assert "settings that were others before: steps 2 -> 3" in printed
    assert "loss" in runs.state("old")["objective"]
    edit_state(runs.copy("old-other"), lambda state: (age(state), state["fixed"].update(store="0" * 16)))
    assert "made with other rollouts or scores than" in runs("train", "old-other", code=2, steps=3)


def test_a_state_that_is_not_this_checkpoints(runs: Runs) -> None:
    output = runs.copy("edited")
    edit_state(output, lambda state: state.update(step=8))
    message = runs("train", "edited", steps=2)
    assert "step = 8, but the folder is named step_000002" in message
    assert f"going on after step 1 from {output / 'checkpoints/step_000001'}" in message
    runs.copy("mixed")
    runs("train", "mixed", steps=3)
    state = json.loads((runs.folder / "mixed/checkpoints/step_000003/opd_state.json").read_text())
    edit_state(runs.folder / "mixed", lambda own: own.update(state | {"content": "0" * 16}))
    message = runs("train", "mixed", steps=4)
    assert "written for other weights (content '0000000000000000') than those beside it" in message
    assert f"going on after step 2 from {runs.folder / 'mixed/checkpoints/step_000002'}" in message


def test_the_recipes_teacher_and_the_one_that_scored(runs: Runs) -> None:
    folder = runs.folder
    wrong = f"models.teacher={str(folder / 'other')!r}"
    for stage in ("check", "train"):
        message = runs(stage, "teachers", wrong, code=2, steps=1)
        assert "teacher 'teacher' is teacher (" in message
        assert f"the recipe's teacher {folder / 'other'} is now other (" in message
        assert "score.model=DIR" in message
    assert not (folder / "teachers").exists()
    absent = runs("train", "teachers", "models.teacher=/nowhere", steps=1)
    assert "the recipe's teacher /nowhere is not on this machine, and not compared" in absent
    changed = Path(shutil.copytree(folder / "teacher", folder / "changed"))
    tensors = load_file(changed / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    assert "is now changed (" in runs("check", "teachers", f"models.teacher={str(changed)!r}", code=2)
    named = runs("check", "elsewhere-named", wrong, "score.teacher=second")
    assert "the recipe's score.model is for score.teacher = 'second', and not compared" in named


def test_parts_that_different_teachers_scored(runs: Runs) -> None:
    """Also where they differ in their tokens alone."""
    store = Path(shutil.copytree(runs.folder / "store", runs.folder / "two-teachers"))
    manifest = store / "parts/000001/teacher/teacher/zarr.json"
    tree = json.loads(manifest.read_text())
    del tree["attributes"]["opd_crc32c"]  # of the manifest as it was written
    original = json.dumps(tree)
    for field, value in (("weights_sha256", "a" * 64), ("vocab_sha256", "b" * 64)):
        tree = json.loads(original)
        teacher = tree["attributes"]["opd"]["teacher"]
        (teacher if field == "weights_sha256" else teacher["tokenizer"])[field] = value
        manifest.write_text(json.dumps(tree))
        message = runs("check", "two", f"train.store={str(store)!r}", code=2)
        assert "teacher 'teacher'" in message
        assert "delete the odd parts" in message


def test_a_converted_model_is_known_by_its_checkpoint(runs: Runs) -> None:
    """A copied run's times say nothing; more training shows, whatever they say."""
    output, target = runs.copy("converts"), runs.folder / "opd-hf"
    words = ["convert", "trained", *runs.arguments("train", "converts", steps=2)[1:]]
    assert main(words) == 0
    assert f"wrote {target}" in runs.capsys.readouterr().out
    shutil.rmtree(output)
    runs.copy("converts")  # newer than what was converted
    assert main(words) == 0
    assert f"{target} is there already, of step 2" in runs.capsys.readouterr().out

    runs("train", "converts", steps=3)
    for path in target.iterdir():  # a copy of the older model is newer than the newest checkpoint
        path.touch()
    later = [word.replace("train.steps=2", "train.steps=3") for word in words]
    assert main(later) == 2
    message = runs.capsys.readouterr().err
    assert (
        f"{target} was made of step 2 ({output / 'checkpoints/step_000002'}), but the latest checkpoint of {output} is of step 3" in message
    )
    assert "move the directory away and convert again, or give another run_dir" in message

    (target / "opd_converted.json").unlink()  # an older version's: the weights tell
    assert main(later) == 2
    assert "made of another model, it is not recorded which" in runs.capsys.readouterr().err
    (output / "checkpoints/latest").write_text("step_000002\n")
    assert main(words) == 0
    assert "is there already, of step 2" in runs.capsys.readouterr().out
    assert json.loads((target / "opd_converted.json").read_text())["step"] == 2


def test_sft_has_an_identity_too(runs: Runs, tmp_path: Path) -> None:
    """Its teacher is the one that answered, and it starts from the base student."""
    folder, prompts = runs.folder, str(write_prompts(tmp_path / "prompts.jsonl", 16))
    paths = {"run_dir": tmp_path, "models.teacher": folder / "teacher", "models.student": folder / "student", "generate.prompts": prompts}
    words = ["tiny", *(f"{key}={str(path)!r}" for key, path in paths.items()), "sft.global_batch=4", "generate.sampling.max_new_tokens=4"]
    other = f"={str(folder / 'other')!r}"
    assert main(["generate", *words]) == 0
    assert main(["sft", *words, "sft.steps=1"]) == 0
    before = content(tmp_path / "sft")
    runs.capsys.readouterr()
    for stage in (["sft"], ["check", "--stage", "sft"]):
        assert main([*stage, *words, f"models.student{other}", "sft.steps=2"]) == 2
        message = runs.capsys.readouterr().err
        assert "init student (weights " in message
        assert "sft.output=..." in message
        assert main([*stage, *words, f"models.teacher{other}", "sft.steps=2"]) == 2
        assert f"but the recipe's teacher {folder / 'other'} is now other (" in runs.capsys.readouterr().err
    assert content(tmp_path / "sft") == before
    assert main(["sft", *words, f"models.student{other}", "sft.steps=2", "--continue-with-changes"]) == 0
    assert main(["convert", "trained", *words, "sft.steps=2", "rollout.prompts=p", "--stage", "sft"]) == 0
    lineage = read_lineage(tmp_path / "sft-hf")
    assert lineage is not None
    (override,) = lineage.overrides
    assert override.startswith("sft went on after step 1 with other settings: init student (weights ")
