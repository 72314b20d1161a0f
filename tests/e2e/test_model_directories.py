"""Models that don't fit each other or are not whole: found by `check --stage inputs`, all at once, or named before a token is scored."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from stores import make_scored_store, random_candidates
from tiny_models import make_model, make_tokenizer, write_prompts

from megatron_opd.cli import main
from megatron_opd.data.store import StoreReader
from megatron_opd.data.writer import create_store, write_part, write_scores
from megatron_opd.errors import StoreError
from megatron_opd.hf import lineage
from megatron_opd.hf.lineage import CACHE_FILE, RUN_CACHE_FILE, fingerprint_model
from megatron_opd.recipe.training_stages import TrainStage
from megatron_opd.records import Finish, Lineage, PromptFile, Rollout, SamplingParams, TeacherScores
from megatron_opd.store_records import ScoreManifest, StoreManifest
from megatron_opd.train.batches import BatchSource

PUBLIC = ("student", "teacher")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    for seed, name in enumerate(PUBLIC):
        make_model(folder / name, seed=seed, layers=1)
    make_model(folder / "small", seed=3, layers=1, vocab=290)
    make_model(folder / "large", seed=4, layers=1, vocab=320)
    write_prompts(folder / "prompts.jsonl", 8)
    return folder


@pytest.fixture
def work(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "work", ignore=shutil.ignore_patterns(CACHE_FILE)))


def arguments(work: Path, stage: str, *more: str) -> list[str]:
    models = [f"models.{name}={str(work / name)!r}" for name in PUBLIC if not any(m.startswith(f"models.{name}=") for m in more)]
    prompts = [f"{name}.prompts={str(work / 'prompts.jsonl')!r}" for name in ("generate", "rollout", "eval.held_out")]
    overrides = [word for word in more if not word.startswith("--")]
    return [
        stage,
        "tiny",
        *models,
        *prompts,
        f"run_dir={str(work / 'run')!r}",
        *overrides,
        *(word for word in more if word.startswith("--")),
    ]


def inputs(work: Path, *more: str) -> int:
    return main([*arguments(work, "check", *more), "--stage", "inputs"])


def change(folder: Path, name: str = "config.json", **fields: Any) -> None:
    path = folder / name
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_all_faults_of_both_models_at_once(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inputs(work) == 0
    change(work / "student", quantization_config={"quant_method": "awq"}, auto_map={"AutoConfig": "x.C"})
    for path in (work / "student").glob("tokenizer*"):
        path.unlink()
    change(work / "teacher", quantization_config={"quant_method": "fp8"})
    (work / "prompts.jsonl").unlink()
    capsys.readouterr()
    assert inputs(work) == 2
    printed = capsys.readouterr()
    assert "student: config.json has auto_map (x.py): this code is not run" in printed.out
    error = printed.err
    assert error.startswith("megatron-opd: error: 4 faults")
    for said in (
        "student: quantization_config (awq): the weights are quantised, and training needs plain ones",
        "student: no tokenizer in it",
        "teacher: quantization_config (fp8): the weights are quantised, and engine 'transformers' needs plain ones; serve it with SGLang",
        "no such prompt file",
    ):
        assert error.count(said) == 1


def test_tokenizers_are_compared_though_the_weights_are_damaged(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tokenizer(work / "teacher", extra_token="<another>")
    (work / "student" / "model.safetensors").write_bytes(b"")
    assert inputs(work) == 2
    error = capsys.readouterr().err
    assert error.startswith("megatron-opd: error: 2 faults")
    assert "not a whole safetensors file" in error
    assert "tokenizers differ: student student has 259 tokens" in error


def test_a_quantised_teacher_is_served_by_sglang_alone(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its tensors are not looked at: they are the engine's."""
    change(work / "teacher", quantization_config={"quant_method": "fp8"})
    assert inputs(work, "engine.urls=['http://127.0.0.1:9']") == 0
    assert main(arguments(work, "generate")) == 2
    assert (
        "quantization_config (fp8): the weights are quantised, and engine 'transformers' needs plain ones; serve it with SGLang"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("name", PUBLIC)
def test_an_adapter_or_another_head_is_found_for_both(work: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    change(work / name, tie_word_embeddings=True)
    assert inputs(work) == 2
    assert f"{name}/config.json: tie_word_embeddings = true, but model.safetensors has an lm_head.weight" in capsys.readouterr().err
    (work / name / "adapter_config.json").write_text("{}")
    assert inputs(work) == 2
    assert capsys.readouterr().err.count(f"{name}/adapter_config.json: a LoRA adapter, not a whole model") == 1


def damage_shards(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}})
    )


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "model-00002.safetensors").write_bytes(b""), "model-00002.safetensors: not a whole safetensors file (no header)"),
        (lambda folder: shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00001.safetensors"), "two copies of weights lie side by side"),
        (damage_shards, "model-00001-of-00002.safetensors (1 of 1 files that model.safetensors.index.json names) missing"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "pickled weights (.bin, .pt) are not read"),
        (lambda folder: change(folder, intermediate_size=65), "config.json asks for (32, 65)"),
        (lambda folder: change(folder, vocab_size=258), "config.json asks for (258, 32)"),
        (lambda folder: (folder / "config.json").write_text("[" * 100_000), "config.json: nested more than 100 levels deep"),
    ],
    ids=["empty", "twice", "shard", "pickled", "sizes", "rows", "deep"],
)  # fmt: skip
def test_what_sft_would_refuse_is_refused_first(
    work: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object], said: str
) -> None:
    damage(work / "student")
    assert inputs(work) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def scored(
    work: Path,
    *,
    sampler: str,
    teacher: str,
    ids: list[int],
    candidates: list[int] | None = None,
    scores: bool = True,
    role: str = "student",
) -> Path:
    """A store of one part: two prompts, whose responses are `ids`, and the teacher's candidates."""
    student_fp, teacher_fp = fingerprint_model(work / sampler), fingerprint_model(work / teacher)
    manifest = StoreManifest(
        sampler_role=role, sampler=student_fp, lineage=Lineage(base=student_fp, sft_teacher=teacher_fp),
        prompts=PromptFile(name="prompts.jsonl", sha256="0" * 64, num_prompts=2), prompts_per_part=2, sampling=SamplingParams(max_new_tokens=60),
    )  # fmt: skip
    path = work / "store.opd.zarr"
    location = create_store(str(path), manifest)
    logp = np.array([np.nan, *[-1.0] * len(ids)], np.float32)
    rollouts = [Rollout(np.array([5, *ids], np.int32), 1, prompt, 0, Finish.STOP, logp) for prompt in range(2)]
    write_part(location, 0, rollouts, [], {})
    if scores:
        top_k = len(candidates or [])
        rng = np.random.default_rng(0)
        given = [TeacherScores(logp, *random_candidates(rng, rollout, 300, top_k)) for rollout in rollouts]
        for score in given:
            if score.topk_ids is not None:
                score.topk_ids[1:] = candidates
        largest = max(candidates) if candidates else None
        record = ScoreManifest(
            part=0,
            teacher=teacher_fp,
            top_k=top_k,
            largest_candidate=largest,
            part_crc32c=StoreReader(str(path)).parts[0].crc32c,
            crc32c={},
        )
        write_scores(location, "teacher", record, rollouts, given)
    return path


def test_an_id_that_the_teacher_has_no_row_for_is_named_before_it_is_scored(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = scored(work, sampler="student", teacher="small", ids=[7, 295], scores=False)
    overrides = [f"score.store={str(store)!r}", f"score.model={str(work / 'small')!r}"]
    assert main(arguments(work, "score", *overrides)) == 2
    assert f"{store}, prompt 0, sample 0: token id 295, but teacher small (" in (error := capsys.readouterr().err)
    assert "has 290 embedding rows" in error
    shutil.rmtree(store)
    scored(work, sampler="student", teacher="small", ids=[7, 289], scores=False)
    assert main(arguments(work, "score", *overrides)) == 0


def test_a_candidate_that_the_student_has_no_row_for(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a teacher with more rows: an error while it scores if the recipe trains on candidates, and at the latest before training."""
    store = scored(work, sampler="student", teacher="large", ids=[7, 8], scores=False)
    overrides = [f"score.store={str(store)!r}", f"score.model={str(work / 'large')!r}", "score.top_k=320"]
    assert main(arguments(work, "score", *overrides, "train.loss={name='forward_kl'}")) == 2
    error = capsys.readouterr().err
    assert "the teacher's candidates at prompt 0, sample 0: token id 319, but student student (" in error
    assert "lower score.top_k, or set score.top_k = 0 and train.loss.name = 'opd'" in error
    assert main(arguments(work, "score", *overrides)) == 0
    record = StoreReader(str(store)).score_manifest(0, "teacher")
    assert record is not None
    assert record.largest_candidate == 319
    train = [f"train.store={str(store)!r}", f"train.init={str(work / 'student')!r}", "train.global_batch=2"]
    train += [f"score.model={str(work / 'large')!r}"]
    assert main(arguments(work, "check", *train)) == 0
    capsys.readouterr()
    assert main(arguments(work, "check", *train, "train.loss={name='forward_kl'}")) == 2
    assert "part 0 has the candidate id 319 of teacher 'teacher', but the student has 300 embedding rows" in capsys.readouterr().err


def test_an_answer_with_an_id_that_the_student_has_no_row_for(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a teacher with more rows: named before fine-tuning."""
    store = scored(work, sampler="large", teacher="large", ids=[7, 310], scores=False, role="teacher")
    sft = [f"sft.store={str(store)!r}", f"sft.init={str(work / 'student')!r}", "sft.global_batch=2"]
    sft += [f"generate.model={str(work / 'large')!r}"]
    assert main([*arguments(work, "check", *sft), "--stage", "sft"]) == 2
    assert f"{store}, prompt 0, sample 0: token id 310, but student student (" in capsys.readouterr().err
    shutil.rmtree(store)
    scored(work, sampler="large", teacher="large", ids=[7, 299], scores=False, role="teacher")
    assert main([*arguments(work, "check", *sft), "--stage", "sft"]) == 0


@pytest.mark.parametrize(
    ("ids", "candidates", "said"),
    [([7, 295], None, "rollout 0: token id 295"), ([7, 8], [3, 295], "candidates of 'teacher': token id 295")],
)
def test_a_batch_names_the_id(work: Path, ids: list[int], candidates: list[int] | None, said: str) -> None:
    store = scored(work, sampler="student", teacher="teacher", ids=ids, candidates=candidates)
    config = TrainStage(
        init=str(work / "small"), store=str(store), output=str(work / "out"), lr=1e-3, global_batch=2, micro_batch_tokens=96
    )
    source = BatchSource(
        StoreReader(str(store), teacher="teacher"), config, teacher="teacher", sequence_mean=True, dp_rank=0, dp_size=1, pad_multiple=1, topk=candidates is not None
    )  # fmt: skip
    with pytest.raises(StoreError, match=f"{said}, but the student .* has 290 embedding rows"):
        source.build([0, 1])


def add_token(folder: Path, token: str) -> int:
    """Give the tokenizer one more added token; returns its id."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    number = len(content["model"]["vocab"])
    content["added_tokens"].append(
        {"id": number, "content": token, "special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    )
    path.write_text(json.dumps(content))
    return number


def test_a_teacher_with_one_more_added_token(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Accepted, said, and looked for in the data: in rollouts before they are scored, in answers before they are trained on."""
    extra = add_token(work / "teacher", "<think>")
    assert extra == 259
    assert inputs(work) == 0
    assert (
        "tokenizers: 1 added tokens are known to one model alone and must not occur in the data: '<think>' (259)" in capsys.readouterr().out
    )
    overrides = [f"score.store={str(work / 'store.opd.zarr')!r}", f"train.store={str(work / 'store.opd.zarr')!r}", "train.global_batch=2"]
    init = f"train.init={str(work / 'student')!r}"
    store = scored(work, sampler="student", teacher="teacher", ids=[7, extra], scores=False)
    assert main(arguments(work, "score", *overrides)) == 2
    assert (
        f"{store}, prompt 0, sample 0: token id 259 ('<think>'), which the tokenizer of one of the two models lacks"
        in capsys.readouterr().err
    )
    shutil.rmtree(store)
    scored(work, sampler="student", teacher="teacher", ids=[7, extra])
    assert main(arguments(work, "check", *overrides, init)) == 2
    assert "token id 259 ('<think>')" in capsys.readouterr().err
    shutil.rmtree(store)
    scored(work, sampler="student", teacher="teacher", ids=[7, 258], scores=False)
    assert main(arguments(work, "score", *overrides)) == 0
    assert main(arguments(work, "check", *overrides, init)) == 0


def test_weights_changed_with_size_and_time_kept_are_noticed(work: Path) -> None:
    before = fingerprint_model(work / "student")
    weights = work / "student" / "model.safetensors"
    times = weights.stat()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (weights.stat().st_size, weights.stat().st_mtime_ns) == (times.st_size, times.st_mtime_ns)
    assert fingerprint_model(work / "student").weights_sha256 != before.weights_sha256


def test_a_directory_that_can_not_be_written_is_hashed_once(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By this process, and by the run: root may write anywhere, so the cache's name is taken by a folder."""
    hashed: list[str] = []
    hash_tensors = lineage.hash_tensors
    monkeypatch.setattr(lineage, "hash_tensors", lambda folder: hashed.append(Path(folder).name) or hash_tensors(folder))
    for name in PUBLIC:
        (work / name / CACHE_FILE).mkdir()
    assert inputs(work) == 0
    assert sorted(hashed) == ["student", "teacher"]
    assert set(json.loads((work / "run" / RUN_CACHE_FILE).read_text())) == {str((work / name).resolve()) for name in PUBLIC}
    lineage._known.clear()  # another process
    assert inputs(work) == 0
    assert len(hashed) == 2
    (work / "run" / RUN_CACHE_FILE).write_text("[")
    assert inputs(work) == 0
    assert len(hashed) == 2  # this process knows
    weights = work / "student" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    assert inputs(work) == 0
    assert hashed[2:] == ["student"]


def test_stores_of_older_versions_have_no_new_fields(work: Path) -> None:
    store = make_scored_store(work / "old.opd.zarr", sampler=work / "student", teacher=work / "teacher", prompts=4)
    tree = json.loads(store.manifest.model_dump_json())
    for field in ("base_sha256", "added", "reading_sha256"):
        del tree["sampler"]["tokenizer"][field]
    assert StoreManifest.model_validate(tree).sampler.tokenizer.added is None
