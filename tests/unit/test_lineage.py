"""Who made what: hashes that see every change of content and no change of packaging, and the rules that stand on them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CHAT_TEMPLATE, make_model, make_tokenizer
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from unit.store_parts import fake_fingerprint

from megatron_opd.errors import LineageError, UserError
from megatron_opd.hf.lineage import (
    CACHE_FILE,
    LINEAGE_FILE,
    check_teacher,
    fingerprint_model,
    hash_tensors,
    load_tokenizer,
    read_lineage,
    same_model,
    tensor_index,
    write_lineage,
)
from megatron_opd.hf.tokenizer import check_same_tokenizer, fingerprint_tokenizer
from megatron_opd.records import Lineage

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b": torch.arange(6, dtype=torch.int64),
    "c": torch.tensor(0.5, dtype=torch.bfloat16),
    "d": torch.zeros(0, 4),
    "e.weight": torch.randn(300, 7, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model directory; copy it before a change."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny", layers=1)


@pytest.fixture
def copied(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copied", ignore=shutil.ignore_patterns(CACHE_FILE)))


def save(directory: Path, *groups: dict[str, torch.Tensor]) -> Path:
    directory.mkdir(parents=True)
    for number, tensors in enumerate(groups):
        save_file(tensors, directory / f"model-{number}.safetensors")
    return directory


def test_the_hash_does_not_depend_on_the_split_into_files(tmp_path: Path) -> None:
    names = list(TENSORS)
    one = save(tmp_path / "one", TENSORS)
    three = save(tmp_path / "three", *({name: TENSORS[name] for name in names[start::3]} for start in range(3)))
    backwards = save(tmp_path / "backwards", {name: TENSORS[name] for name in reversed(names)})
    assert hash_tensors(one) == hash_tensors(three) == hash_tensors(backwards)
    assert set(hash_tensors(one)) == set(names)


def bit_flipped(tensor: torch.Tensor) -> torch.Tensor:
    changed = tensor.clone()
    changed.view(torch.int16).view(-1)[-1] ^= 1
    return changed


@pytest.mark.parametrize(
    "change",
    [
        {"e.weight": bit_flipped(TENSORS["e.weight"])},
        {"a": TENSORS["a"].reshape(4, 3)},
        {"a": TENSORS["a"].view(torch.int32)},
        {"d": torch.zeros(4, 0)},
        {"extra": torch.zeros(0)},
        {"a": None},
    ],
    ids=["bit", "shape", "dtype", "empty shape", "one more", "one fewer"],
)
def test_the_hash_sees_every_change(tmp_path: Path, change: dict[str, torch.Tensor | None]) -> None:
    changed = {name: tensor for name, tensor in (TENSORS | change).items() if tensor is not None}
    before, after = hash_tensors(save(tmp_path / "before", TENSORS)), hash_tensors(save(tmp_path / "after", changed))
    differing = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert differing == set(change)


def test_the_hash_sees_exchanged_names(tmp_path: Path) -> None:
    left = {"x": torch.zeros(3), "y": torch.ones(3)}
    right = {"x": left["y"], "y": left["x"]}
    assert hash_tensors(save(tmp_path / "left", left)) != hash_tensors(save(tmp_path / "right", right))


def test_a_model_saved_in_shards_is_the_same_model(copied: Path) -> None:
    before = fingerprint_model(copied)
    loaded = AutoModelForCausalLM.from_pretrained(copied)
    (copied / "model.safetensors").unlink()
    loaded.save_pretrained(copied, max_shard_size="30KB")
    assert len(list(copied.glob("*.safetensors"))) > 2
    assert fingerprint_model(copied) == before


def test_the_name_and_the_config(model: Path, copied: Path) -> None:
    fingerprint = fingerprint_model(model)
    assert (fingerprint.name, fingerprint.vocab_size) == ("tiny", 300)
    assert fingerprint_model(copied, name="other").name == "other"
    path = copied / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    changed = fingerprint_model(copied)
    assert changed.config_sha256 != fingerprint.config_sha256
    assert same_model(changed, fingerprint)
    path.write_text(json.dumps(dict(reversed(config.items())) | {"_name_or_path": "elsewhere"}))
    assert fingerprint_model(copied).config_sha256 == fingerprint.config_sha256


def test_the_cache_is_used_and_seen_through(copied: Path) -> None:
    first = fingerprint_model(copied).weights_sha256
    cache = copied / CACHE_FILE
    cached = json.loads(cache.read_text())
    cache.write_text(json.dumps(cached | {"weights_sha256": "from the cache"}))
    assert fingerprint_model(copied).weights_sha256 == "from the cache"
    weights = copied / "model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    assert fingerprint_model(copied).weights_sha256 == first
    tensors = load_file(weights)
    tensors["model.norm.weight"] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    changed = fingerprint_model(copied).weights_sha256
    assert changed != first
    (copied / "more.safetensors").write_bytes(weights.read_bytes()[:0])
    with pytest.raises(UserError, match=r"more.safetensors: not a whole safetensors file"):
        fingerprint_model(copied)


@pytest.mark.parametrize("content", ["", "[]", "{}", "null", '{"files": []}', "\x00\xff"])
def test_a_broken_cache_does_not_matter(copied: Path, content: str) -> None:
    first = fingerprint_model(copied)
    (copied / CACHE_FILE).write_text(content)
    assert fingerprint_model(copied) == first
    assert json.loads((copied / CACHE_FILE).read_text())["weights_sha256"] == first.weights_sha256


def test_a_directory_that_can_not_be_written(copied: Path, model: Path) -> None:
    """The hash is made again each time; root may write anywhere, so the cache's name is taken by a folder instead."""
    (copied / CACHE_FILE).mkdir()
    assert fingerprint_model(copied) == fingerprint_model(model, name="copied")


@pytest.mark.parametrize("size", [0, 4, 8, 100, -1, -5000])
def test_a_cut_file_is_named(copied: Path, size: int) -> None:
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(UserError, match=r"model.safetensors: not a whole safetensors file \(.*\); copy or convert it again"):
        fingerprint_model(copied)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b'{"x": 3}',
        b'{"x": {"dtype": "F32", "shape": [1]}}',
        b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": 4}}',
        b"\xff\xff",
    ],
)
def test_a_broken_header_is_named(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 64)
    with pytest.raises(UserError, match=r"x.safetensors: not a whole safetensors file"):
        tensor_index(tmp_path)


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model-1.safetensors and model-0.safetensors both hold tensor b: .* move one away"):
        hash_tensors(save(tmp_path / "m", {"a": TENSORS["a"], "b": TENSORS["b"]}, {"b": TENSORS["b"]}))


def test_a_shard_that_the_index_names_is_missing(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", {"a": TENSORS["a"]}, {"b": TENSORS["b"]})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-0.safetensors", "b": "model-1.safetensors"}}))
    assert set(tensor_index(folder)) == {"a", "b"}
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"model-1.safetensors \(1 of 2 files that model.safetensors.index.json names\) missing; copy again$"
    ):
        tensor_index(folder)
    save_file(TENSORS, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"copy again \(or remove the index, if model.safetensors is the whole model\)"):
        tensor_index(folder)
    for text in ('{"weight_map": 3}', '{"weight_map": {"a": []}}'):
        index.write_text(text)
        with pytest.raises(UserError, match="not an index of shards"):
            tensor_index(folder)


def test_what_is_not_a_model(copied: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path / "copied" / "config.json"):
        with pytest.raises(UserError, match=f"{path}/config.json: no such file; a Hugging Face model directory is expected"):
            fingerprint_model(path)
    with pytest.raises(UserError, match="none: no such directory"):
        load_tokenizer(tmp_path / "none")
    config = (copied / "config.json").read_text()
    for text, message in (
        ("{", "config.json: not JSON"),
        ("[]", "config.json: must be a JSON object, not list"),
        ("{}", "config.json: no 'vocab_size'; only text models"),
        ('{"vocab_size": "many"}', "config.json: vocab_size is 'many', not a whole number"),
    ):
        (copied / "config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            fingerprint_model(copied)
    (copied / "config.json").write_bytes(b"\xff\xff")
    with pytest.raises(UserError, match=r"config.json: not JSON"):
        fingerprint_model(copied)
    (copied / "config.json").write_text(config)
    for text in ("{", "{}", '{"version": "1.0", "model": {}}'):
        (copied / "tokenizer.json").write_text(text)
        with pytest.raises(UserError, match="copied: no tokenizer could be loaded"):
            fingerprint_model(copied)
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"copied: no \*.safetensors files; pickled weights .* are not read"):
        fingerprint_model(copied)


def save_tokenizer(directory: Path, vocab: dict[str, int], *, eos: str = "<eos>", template: str | None = CHAT_TEMPLATE) -> Path:
    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="<eos>")), eos_token=eos)
    fast.chat_template = template
    fast.save_pretrained(str(directory))
    return directory


VOCAB = {"<eos>": 0, "a": 1, "b": 2, "<other>": 3}


def test_the_tokenizer_is_known_by_what_it_does(tmp_path: Path) -> None:
    base = fingerprint_tokenizer(save_tokenizer(tmp_path / "base", VOCAB))
    assert (base.num_tokens, base.eos_token_id) == (4, 0)
    respelled = save_tokenizer(tmp_path / "respelled", dict(reversed(VOCAB.items())))
    path = respelled / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 17, "name_or_path": "x"}))
    assert fingerprint_tokenizer(respelled) == base
    exchanged = fingerprint_tokenizer(save_tokenizer(tmp_path / "exchanged", VOCAB | {"a": 2, "b": 1}))
    assert exchanged.vocab_sha256 != base.vocab_sha256
    longer = fingerprint_tokenizer(save_tokenizer(tmp_path / "longer", VOCAB | {"c": 4}))
    assert longer.vocab_sha256 != base.vocab_sha256
    assert longer.num_tokens == 5
    other_eos = fingerprint_tokenizer(save_tokenizer(tmp_path / "eos", VOCAB, eos="<other>"))
    assert (other_eos.vocab_sha256, other_eos.eos_token_id) == (base.vocab_sha256, 3)
    plain = fingerprint_tokenizer(save_tokenizer(tmp_path / "plain", VOCAB, template=None))
    assert plain == base.model_copy(update={"chat_template_sha256": None})
    other = fingerprint_tokenizer(save_tokenizer(tmp_path / "template", VOCAB, template=CHAT_TEMPLATE + " "))
    assert other.chat_template_sha256 not in (None, base.chat_template_sha256)


def test_added_tokens_count(tmp_path: Path) -> None:
    for name, token in (("one", "<extra>"), ("two", "<more>")):
        make_tokenizer(tmp_path / name, extra_token=token)
    one, two = fingerprint_tokenizer(tmp_path / "one"), fingerprint_tokenizer(tmp_path / "two")
    assert one.num_tokens == two.num_tokens == 259
    assert one.vocab_sha256 != two.vocab_sha256


def test_a_lineage_file_is_bound_to_its_weights(copied: Path, model: Path) -> None:
    assert read_lineage(copied) is None
    lineage = Lineage(base=fingerprint_model(model), sft_teacher=fake_fingerprint("teacher"), overrides=["one"])
    write_lineage(copied, lineage, for_weights=True)
    assert read_lineage(copied) == lineage
    tensors = load_file(copied / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        LineageError, match=rf"{LINEAGE_FILE} was written for other weights .*delete it and declare the SFT teacher \(rollout.sft_teacher\)"
    ):
        read_lineage(copied)
    write_lineage(copied, lineage, for_weights=False)
    assert read_lineage(copied) == lineage


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"lineage": 3}', '{"lineage": {"sft_teecher": null}}', "\x00"])
def test_a_broken_lineage_file_is_an_error(copied: Path, content: str) -> None:
    """Never the same as no lineage."""
    (copied / LINEAGE_FILE).write_text(content)
    with pytest.raises(LineageError, match=f"{LINEAGE_FILE}: not a lineage file"):
        read_lineage(copied)


def test_the_teacher_rule() -> None:
    teacher = fake_fingerprint("teacher")
    known = Lineage(sft_teacher=teacher)
    assert check_teacher(known, teacher, allow_mismatch=False) is None
    assert check_teacher(known, teacher, allow_mismatch=True) is None
    renamed = teacher.model_copy(update={"name": "moved", "config_sha256": "other"})
    assert check_teacher(known, renamed, allow_mismatch=False) is None
    other = fake_fingerprint("larger")
    with pytest.raises(
        LineageError, match=r"fine-tuned on answers of teacher \(\w{12}\), but larger \(\w{12}\) scores; .*--allow-teacher-mismatch"
    ):
        check_teacher(known, other, allow_mismatch=False)
    recorded = check_teacher(known, other, allow_mismatch=True)
    assert recorded is not None
    assert recorded.startswith("teacher mismatch allowed: the student was fine-tuned on answers of teacher (")
    with pytest.raises(LineageError, match=r"SFT teacher is not known; declare it \(rollout.sft_teacher=DIR, or --sft-teacher DIR\)"):
        check_teacher(Lineage(), teacher, allow_mismatch=False)
    assert "not known" in (check_teacher(Lineage(), teacher, allow_mismatch=True) or "")


def test_equal_weights_with_another_tokenizer_are_another_teacher() -> None:
    teacher = fake_fingerprint("teacher")
    retokenized = fake_fingerprint("teacher", tokens="others")
    assert not same_model(teacher, retokenized)
    with pytest.raises(LineageError):
        check_teacher(Lineage(sft_teacher=teacher), retokenized, allow_mismatch=False)


def test_the_tokenizer_rule() -> None:
    student = fake_fingerprint("student")
    check_same_tokenizer(student, fake_fingerprint("teacher"))
    padded = fake_fingerprint("teacher").model_copy(update={"vocab_size": 128})
    check_same_tokenizer(student, padded)  # more rows in the embedding, the same tokens
    templated = student.tokenizer.model_copy(update={"chat_template_sha256": "x", "eos_token_id": 2})
    check_same_tokenizer(student, padded.model_copy(update={"tokenizer": templated}))
    with pytest.raises(
        LineageError,
        match=r"tokenizers differ: student student has 64 tokens \(table \w{12}\), teacher teacher has 70 .*choose a teacher of",
    ):
        check_same_tokenizer(student, fake_fingerprint("teacher", tokens="others", vocab_size=70))
