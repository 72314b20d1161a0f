"""What a user can get wrong: each ends with code 2 and a sentence that says what, where and what next; nothing finished is lost."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_models import make_model, make_tokenizer, write_prompts

from megatron_opd.cli import main
from megatron_opd.data.store import StoreReader
from megatron_opd.hf.lineage import CACHE_FILE

PROMPTS, PER_PART = 12, 3


class Workplace:
    """Models, prompts and a run folder; `run` is the command line, in this process."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str] | None = None):
        self.folder, self.capsys = folder, capsys
        self.store = folder / "run" / "rollouts.opd.zarr"

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def arguments(self, stage: str, *changes: str) -> list[str]:
        settings = {
            "run_dir": self.path("run"),
            "models.teacher": self.path("teacher"),
            "models.student": self.path("student"),
            "rollout.model": self.path("student"),
            "rollout.prompts": self.path("prompts.jsonl"),
            "rollout.prompts_per_part": PER_PART,
            "rollout.sampling.max_new_tokens": 6,
            "train.init": self.path("student"),
        }
        flags = [change for change in changes if change.startswith("--")]
        # Overrides first: a flag between them and the recipe ends argparse's list of overrides.
        return [stage, "tiny", *(f"{key}={value}" for key, value in settings.items()), *(c for c in changes if c not in flags), *flags]

    def run(self, stage: str, *changes: str) -> str:
        """A command that must work; returns what it printed."""
        assert main(self.arguments(stage, *changes)) == 0
        return "" if self.capsys is None else self.capsys.readouterr().out

    def refused(self, stage: str, *changes: str) -> str:
        """A command that must be refused; returns the message."""
        assert self.capsys is not None
        self.capsys.readouterr()
        assert main(self.arguments(stage, *changes)) == 2
        printed = self.capsys.readouterr()
        assert "Traceback" not in printed.err + printed.out
        (message,) = [line for line in printed.err.split("\n") if "error:" in line][-1:]
        rest = printed.err[printed.err.index(message) :]
        return rest.removeprefix("megatron-opd: error: ")

    def snapshot(self) -> dict[str, str]:
        """Every file of the store by its hash."""
        files = [path for path in self.store.rglob("*") if path.is_file()]
        return {str(path.relative_to(self.store)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose rollouts are complete and unscored; copied for each test."""
    folder = tmp_path_factory.mktemp("pristine")
    for seed, name in enumerate(("student", "teacher", "other")):
        make_model(folder / name, seed=seed, layers=1)
    shutil.copytree(folder / "teacher", folder / "retokenized", ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    make_tokenizer(folder / "retokenized", extra_token="<another>")
    write_prompts(folder / "prompts.jsonl", PROMPTS)
    Workplace(folder).run("rollout", f"--sft-teacher={folder / 'teacher'}")
    return folder


@pytest.fixture
def work(pristine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Workplace:
    folder = tmp_path / "work"
    shutil.copytree(pristine, folder, ignore=shutil.ignore_patterns(CACHE_FILE))
    capsys.readouterr()
    return Workplace(folder, capsys)


def sealed_checksums(store: Path) -> dict[int, dict[str, int]]:
    return {part: record.crc32c for part, record in StoreReader(str(store)).parts.items()}


def test_a_teacher_with_another_tokenizer(work: Workplace) -> None:
    before = work.snapshot()
    message = work.refused("score", f"score.model={work.path('retokenized')}")
    assert "tokenizers differ: student student has 259 tokens" in message
    assert "teacher retokenized has 259" in message
    assert "choose a teacher of the student's family" in message
    assert "tokenizers differ" in work.refused("score", f"score.model={work.path('retokenized')}", "--allow-teacher-mismatch")
    assert work.snapshot() == before


def test_a_wrong_teacher_and_going_on_with_it(work: Workplace) -> None:
    before = work.snapshot()
    message = work.refused("score", f"score.model={work.path('other')}")
    assert "fine-tuned on answers of teacher (" in message
    assert "but other (" in message
    assert "--allow-teacher-mismatch goes on all the same, and is recorded" in message
    assert work.snapshot() == before
    printed = work.run("score", f"score.model={work.path('other')}", "--allow-teacher-mismatch")
    assert "WARNING: teacher mismatch allowed: the student was fine-tuned on answers of teacher (" in printed
    record = StoreReader(str(work.store)).score_manifest(0, "teacher")
    assert record is not None
    assert record.allow_teacher_mismatch
    # It is in the store for good: every later stage says so without being asked.
    assert "WARNING: teacher mismatch allowed" in work.run("check", f"score.model={work.path('other')}")
    message = work.refused("check")
    assert "teacher 'teacher' is other (" in message
    assert f"but the recipe's teacher {work.path('teacher')} is now teacher (" in message
    assert main(["inspect", str(work.store)]) == 0
    assert work.capsys is not None
    assert "TEACHER MISMATCH ALLOWED" in work.capsys.readouterr().out
    # The right teacher can't slip in under the same name; under another it can.
    assert "teacher 'teacher' of part 0 is other (" in work.refused("score")
    work.run("score", "score.teacher=right")
    assert "WARNING" not in work.run("check", "train.teacher=right")


def test_an_sft_teacher_that_is_not_known(work: Workplace) -> None:
    shutil.rmtree(work.store)
    work.run("rollout")
    message = work.refused("score")
    assert "the student's SFT teacher is not known" in message
    assert "rollout.sft_teacher=DIR, or --sft-teacher DIR" in message
    message = work.refused("rollout", f"--sft-teacher={work.path('teacher')}")
    assert "was made with other settings: lineage is" in message
    assert "use the same settings, or another store path" in message


def test_a_declared_teacher_that_is_not_the_recorded_one(work: Workplace) -> None:
    work.run("score")
    from megatron_opd.hf.lineage import fingerprint_model, write_lineage
    from megatron_opd.records import Lineage

    write_lineage(work.path("student"), Lineage(sft_teacher=fingerprint_model(work.path("other"))), for_weights=True)
    message = work.refused("rollout", f"rollout.store={work.path('run/new.zarr')}", f"--sft-teacher={work.path('teacher')}")
    assert "rollout.sft_teacher declares teacher (" in message
    assert "records other (" in message


def test_an_unsealed_part(work: Workplace) -> None:
    work.run("score")
    work.run("check")
    wanted = sealed_checksums(work.store)
    shutil.rmtree(work.store / "parts/000002/teacher")
    (work.store / "parts/000002/zarr.json").unlink()
    message = work.refused("check")
    assert "1 of 4 parts are not sealed (first: [2]); run the stage again to finish it" in message
    before = work.snapshot()
    work.run("rollout", f"--sft-teacher={work.path('teacher')}")
    assert "has not scored 1 of 4 parts (first: [2]); run 'megatron-opd score'" in work.refused("check")
    work.run("score")
    assert "ready to train student" in work.run("check")
    assert sealed_checksums(work.store) == wanted
    after = work.snapshot()
    untouched = [name for name in before if not name.startswith("parts/000002") and name.count("/") > 1]
    assert {name: before[name] for name in untouched} == {name: after[name] for name in untouched}


@pytest.mark.parametrize("name", ["tokens", "student_logp", "offsets"])
def test_a_corrupt_part(work: Workplace, name: str) -> None:
    wanted = sealed_checksums(work.store)
    (path,) = [path for path in (work.store / "parts/000001" / name / "c").rglob("*") if path.is_file()]
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(bytes(data))
    message = work.refused("score")
    assert f"parts/000001/{name} is damaged" in message
    assert "delete this group and make it again" in message
    assert main(["inspect", str(work.store), "--verify"]) == 2
    assert work.capsys is not None
    printed = work.capsys.readouterr()
    assert f"parts/000001/{name} is damaged" in printed.out + printed.err
    # The remedy that the message gives is the one that works.
    shutil.rmtree(work.store / "parts/000001")
    work.run("rollout", f"--sft-teacher={work.path('teacher')}")
    assert sealed_checksums(work.store) == wanted
    work.run("score")
    work.run("check")


def test_missing_scores(work: Workplace) -> None:
    message = work.refused("check")
    assert "teacher 'teacher' has not scored 4 of 4 parts (first: [0, 1, 2, 3]); run 'megatron-opd score' (scored by: nobody)" in message
    work.run("score")
    assert "teacher 'nobody' has not scored 4 of 4 parts" in work.refused("check", "train.teacher=nobody")


def test_another_number_of_candidates(work: Workplace) -> None:
    work.run("score", "score.top_k=3")
    assert "part 0 was scored with top_k=3, now top_k=5; use the same, or another name" in work.refused("score", "score.top_k=5")
    assert "top_k 301 of a vocabulary of 300" in work.refused("score", "score.top_k=301", "score.teacher=wide")


def test_bad_prompts(work: Workplace) -> None:
    path = work.folder / "prompts.jsonl"
    good = path.read_text()
    before = work.snapshot()
    for text, place, message in (
        ('{"prompt": ""}', 2, "'prompt' must be text or a list of {role, content} messages, not ''"),
        ("{", 2, "not JSON"),
        ('{"query": "?"}', 2, "no field 'prompt' (fields: query)"),
    ):
        lines = good.splitlines()
        lines.insert(place - 1, text)
        path.write_text("\n".join(lines))
        assert f"prompts.jsonl:{place}: {message}" in work.refused("rollout", f"--sft-teacher={work.path('teacher')}")
    path.write_text(good + '{"prompt": "one more"}\n')
    message = work.refused("rollout", f"--sft-teacher={work.path('teacher')}")
    assert "prompts is 12 prompts (sha256 " in message
    assert "13 prompts (sha256 " in message
    assert "--extend would make what is new alone" in message
    assert work.snapshot() == before
    path.write_text(good)
    assert "has all its parts" in work.run("rollout", f"--sft-teacher={work.path('teacher')}")


def test_a_prompt_longer_than_the_context(work: Workplace) -> None:
    path = work.folder / "long.jsonl"
    path.write_text("".join(json.dumps({"prompt": "x" * length}) + "\n" for length in (4, 130, 5, 123, 122)))
    changes = (f"rollout.prompts={path}", f"rollout.store={work.path('run/long.zarr')}")
    message = work.refused("rollout", *changes)
    assert "2 prompt(s) are longer than the 122 tokens that leave room for a response (rows 1, 3; longest 130)" in message
    assert "encoding.overlong_prompt='skip'" in message
    assert "excluded" in work.run("rollout", *changes, "rollout.encoding.overlong_prompt=skip")
    reader = StoreReader(work.path("run/long.zarr"))
    assert sorted(set(reader.prompt_indices.tolist())) == [0, 2, 4]
    assert {excluded.prompt_index: excluded.reason for record in reader.parts.values() for excluded in record.excluded} == {
        1: "prompt of 130 tokens is too long",
        3: "prompt of 123 tokens is too long",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.parallel.tp=3", "tp=3 does not divide the model's 4 attention heads; tp=3 does not divide the model's 2 key-value heads"),
        ("train.parallel.pp=2", "but the model has 1 layer(s); pp * vpp may be at most 1"),
        ("train.micro_batch_tokens=4", "over micro_batch_tokens = 4; raise it, or cut with max_response_tokens"),
        ("train.init={other}", "holds rollouts of student ("),
        ("train.init={none}", "config.json: no such file; a Hugging Face model directory is expected"),
        ("train.store={none}", "no store here; make one with 'megatron-opd rollout'"),
        ("train.lrr=3", "train.lrr: no such field; did you mean 'lr'?"),
        ("train.lr=-1", "train.lr: Input should be greater than 0 (got -1)"),
        ("train.store={{rundir}}/x", "train.store: no placeholder {rundir} here"),
        ("train.lr", "override 'train.lr' is not of the form section.field=value"),
    ],
)
def test_check_refuses(work: Workplace, change: str, message: str) -> None:
    work.run("score")
    work.run("check")
    assert message in work.refused("check", change.format(other=work.path("other"), none=work.path("none")))


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("rollout", ["rollout.prompts={none}"], "none: no such prompt file"),
        (
            "rollout",
            ["rollout.model={none}"],
            "none is not there: run 'megatron-opd generate RECIPE', then 'megatron-opd sft RECIPE', then 'megatron-opd",
        ),
        ("rollout", ["--sft-teacher={none}"], "none/config.json: no such file"),
        ("rollout", ["rollout.sampling.temperature=0.5"], "sampling is {temperature: 1.0} there, {temperature: 0.5} now"),
        ("rollout", ["rollout.model={other}"], "made with other settings: sampler is"),
        ("rollout", ["rollout.num_prompts=99"], "12 prompts, but num_prompts asks for 99"),
        ("generate", ["generate=null"], "the recipe has no [generate] section"),
        ("rollout", ["engine.device=abacus", "rollout.store={none}"], "engine.device is 'abacus'"),
        ("rollout", ["engine.kind=sglang", "rollout.store={none}"], "engine.kind is 'sglang' but there are no servers"),
        ("rollout", ["rollout.store=nowhere://x"], "nowhere://x: no file system for this address"),
        ("rollout", ["rollout.store={folder}/prompts.jsonl"], "prompts.jsonl is a file; a store is a directory"),
        ("rollout", ["--shard=2/2"], "shard 2/2: i/N with 0 <= i < N is expected"),
        ("rollout", ["--shard=half"], "--shard 'half': i/N is expected, for example 0/8"),
        ("score", ["score.model={none}"], "none/config.json: no such file"),
        ("score", ["score.store={none}"], "none: no store here"),
        ("score", ["score.store={none}", "rollout.store={none}"], "none is not there: run 'megatron-opd rollout RECIPE' first"),
        ("score", ["--shard=-1/2"], "--shard '-1/2': i/N is expected"),
    ],
)
def test_sampling_and_scoring_refuse(work: Workplace, stage: str, changes: list[str], message: str) -> None:
    before = work.snapshot()
    paths = {"none": work.path("none"), "other": work.path("other"), "folder": work.folder}
    changes = [change.format(**paths) for change in changes]
    if stage == "rollout" and not any(change.startswith("--sft-teacher") for change in changes):
        changes.append(f"--sft-teacher={work.path('teacher')}")
    assert message in work.refused(stage, *changes)
    assert work.snapshot() == before


def test_a_damaged_model(work: Workplace) -> None:
    weights = work.folder / "teacher" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert "teacher/model.safetensors: not a whole safetensors file" in work.refused("score")


def test_no_such_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "tinny"]) == 2
    assert "no recipe 'tinny': neither a file nor the folder of a run nor one of the shipped recipes" in capsys.readouterr().err
    for arguments in (["no-such-stage"], [], ["rollout"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """A small file system of its own at tmp_path/disk; a call mounts it again with other options."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"this machine mounts nothing: {mounted.stderr.strip()}")

    def remount(options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)

    yield remount
    subprocess.run(["umount", str(folder)], check=True)


def fill_disk(folder: Path, *, leave: int) -> Path:
    filler = folder / "filler"
    free = os.statvfs(folder)
    with filler.open("wb") as file:
        file.write(b"x" * (free.f_bavail * free.f_frsize - leave))
    return filler


@pytest.mark.parametrize("leave", [0, 150_000])
def test_a_full_disk(work: Workplace, disk: Callable[[str], None], tmp_path: Path, leave: int) -> None:
    """At once, and after a part or two."""
    wanted = sealed_checksums(work.store)
    run_dir = tmp_path / "disk" / "run"
    changes = (f"run_dir={run_dir}", f"--sft-teacher={work.path('teacher')}")
    filler = fill_disk(tmp_path / "disk", leave=leave)
    message = work.refused("rollout", *changes)
    assert "No space left on device; nothing that was finished is lost: fix this and run the same command again" in message
    store = Workplace(tmp_path / "disk")
    before = store.snapshot()
    sealed = sealed_checksums(store.store) if leave else {}
    assert bool(sealed) == bool(leave)
    assert len(sealed) < len(wanted)
    filler.unlink()
    work.run("rollout", *changes)
    assert sealed_checksums(store.store) == wanted
    assert {name: hash_ for name, hash_ in store.snapshot().items() if name in before and name.count("/") > 1} == {
        name: hash_ for name, hash_ in before.items() if name.count("/") > 1
    }
    assert not list(store.store.rglob("*.tmp"))
    # The same for scores.
    filler = fill_disk(tmp_path / "disk", leave=leave // 3)
    assert "No space left on device" in work.refused("score", *changes[:1])
    assert sealed_checksums(store.store) == wanted
    filler.unlink()
    work.run("score", *changes[:1])
    work.run("check", *changes[:1])
    assert StoreReader(str(store.store)).verify() == []


def test_a_read_only_disk(work: Workplace, disk: Callable[[str], None], tmp_path: Path) -> None:
    run_dir = tmp_path / "disk" / "run"
    changes = (f"run_dir={run_dir}", f"--sft-teacher={work.path('teacher')}")
    wanted = sealed_checksums(work.store)
    disk("ro")
    message = work.refused("rollout", *changes)
    assert "Read-only file system; nothing that was finished is lost" in message
    disk("rw")
    work.run("rollout", *changes)
    store = Workplace(tmp_path / "disk")
    assert sealed_checksums(store.store) == wanted
    before = store.snapshot()
    disk("ro")
    assert "Read-only file system" in work.refused("score", *changes[:1])
    assert "has not scored" in work.refused("check", *changes[:1])  # reading works
    assert store.snapshot() == before
    disk("rw")
    work.run("score", *changes[:1])
    disk("ro")
    assert "ready to train student" in work.run("check", *changes[:1])
