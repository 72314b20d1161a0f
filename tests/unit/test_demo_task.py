import json
import random

import pytest

from megatron_opd.data.prompts import read_prompts
from megatron_opd.demo import arithmetic
from megatron_opd.errors import UserError
from megatron_opd.evaluate.grade import grade
from megatron_opd.recipe.inference import EncodingConfig
from megatron_opd.records import Prompt
from megatron_opd.serve.encode import encode_prompt


def test_worked_solution():
    assert arithmetic.worked_solution("4791+2836:") == "1+6+0=07,9+3+0=12,7+8+1=16,4+2+1=07,=07627"
    assert arithmetic.worked_solution("99+01:") == "9+1+0=10,9+0+1=10,=100"
    for bad in ("12+345:", "12+34", "ab+cd:", "12-34:"):
        with pytest.raises(ValueError, match="is not two numbers of one length"):
            arithmetic.worked_solution(bad)


@pytest.mark.parametrize("digits", [1, 2, 4, 7])
def test_worked_solution_is_right_and_graded_so(digits):
    rng = random.Random(digits)
    for _ in range(100):
        prompt = arithmetic.draw_prompt(rng, "eval", digits)
        left, right = map(int, prompt[:-1].split("+"))
        solution = arithmetic.worked_solution(prompt)
        answer = solution.rpartition("=")[2]
        assert int(answer) == left + right
        assert len(answer) == digits + 1
        assert grade("exact", Prompt(index=0, content=prompt, answer=answer), solution).score == 1.0


def test_write_prompts(tmp_path):
    for split in arithmetic.SPLITS:
        arithmetic.write_prompts(tmp_path / f"{split}.jsonl", split=split, count=300, seed=1)
    files = {split: read_prompts(tmp_path / f"{split}.jsonl")[1] for split in arithmetic.SPLITS}
    texts = [prompt.content for prompts in files.values() for prompt in prompts]
    assert len(set(texts)) == len(texts) == 300 * len(arithmetic.SPLITS)
    for split, prompts in files.items():
        assert {arithmetic.split_of(prompt.content) for prompt in prompts} == {split}
        assert all(grade("exact", prompt, arithmetic.worked_solution(prompt.content)).score == 1.0 for prompt in prompts)


def test_write_prompts_is_reproducible_and_grows_at_its_end(tmp_path):
    for name, count, seed in (("a", 50, 1), ("b", 50, 1), ("long", 80, 1), ("other", 50, 2)):
        arithmetic.write_prompts(tmp_path / name, split="sft", count=count, seed=seed)
    a = (tmp_path / "a").read_text()
    assert (tmp_path / "b").read_text() == a
    assert (tmp_path / "long").read_text().startswith(a)
    assert (tmp_path / "other").read_text() != a
    assert set(json.loads(a.splitlines()[0])) == {"prompt", "answer"}


def test_write_prompts_refuses(tmp_path):
    with pytest.raises(UserError, match="no split 'test'; choose one of sft, rollout, eval, teacher"):
        arithmetic.write_prompts(tmp_path / "x", split="test", count=1, seed=0)
    with pytest.raises(UserError, match="1 to 10 are possible"):
        arithmetic.write_prompts(tmp_path / "x", split="sft", count=11, seed=0, digits=1)
    assert not (tmp_path / "x").exists()


def test_tokenizer_round_trip(tmp_path):
    from megatron_opd.hf.tokenizer import fingerprint_loaded_tokenizer, load_tokenizer

    built = arithmetic.LANGUAGE.build_tokenizer(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert fingerprint_loaded_tokenizer(built) == fingerprint_loaded_tokenizer(loaded)
    assert len(loaded) == loaded.vocab_size == 64
    text = "".join(arithmetic.LANGUAGE.vocabulary[3:]) + "  4791+2836:\n 1"
    ids = loaded(text)["input_ids"]
    assert len(ids) == len(text)
    assert loaded.unk_token_id not in ids
    assert loaded.decode(ids) == text
    assert loaded.decode([*loaded("=12")["input_ids"], loaded.eos_token_id], skip_special_tokens=True) == "=12"
    assert loaded("é")["input_ids"] == [loaded.unk_token_id]
    prompts_path = tmp_path / "p.jsonl"
    arithmetic.write_prompts(prompts_path, split="eval", count=1, seed=0)
    prompt = read_prompts(prompts_path)[1][0]
    assert len(encode_prompt(loaded, prompt, EncodingConfig())) == len(prompt.content) == 10


def test_make_model_dir(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    from megatron_opd.hf.lineage import fingerprint_model
    from megatron_opd.hf.tokenizer import check_same_tokenizer
    from megatron_opd.model.architecture import read_architecture
    from megatron_opd.recipe.layout import ParallelConfig

    sizes = {"hidden_size": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn": 64}
    state = torch.random.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        arithmetic.LANGUAGE.make_model_dir(tmp_path / name, **sizes, seed=seed)
    assert torch.equal(torch.random.get_rng_state(), state)
    a, b, c = (fingerprint_model(tmp_path / name) for name in "abc")
    assert a.weights_sha256 == b.weights_sha256 != c.weights_sha256
    check_same_tokenizer(a, c)
    architecture = read_architecture(tmp_path / "a")
    architecture.check_parallel(ParallelConfig(tp=2, pp=2))
    assert (architecture.rope_theta, architecture.vocab_size, architecture.padded_vocab(2)) == (30.0, 64, 64)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert model.dtype == torch.float32
    assert model.config.rope_parameters["rope_theta"] == 30.0
    assert json.loads((tmp_path / "a" / "config.json").read_text())["rope_theta"] == 30.0
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    with pytest.raises(UserError, match="exists already"):
        arithmetic.LANGUAGE.make_model_dir(tmp_path / "a", **sizes, seed=0)
