import random

import pytest
import torch

from megatron_opd.data.prompts import read_prompts
from megatron_opd.demo import sentences, smollm2
from megatron_opd.errors import UserError
from megatron_opd.evaluate.grade import grade
from megatron_opd.records import Prompt

SCENE = sentences.Scene("Kate", "found", "red", "coat", "cellar")


def test_a_scene():
    assert SCENE.sentence == "Kate found the red coat in the cellar."
    assert [SCENE.ask(form) for form in sentences.FORMS] == [
        "Repeat this sentence: Kate found the red coat in the cellar.",
        "Kate found the red coat in the cellar. Where did Kate find the red coat?",
        "Kate found the red coat in the cellar. What did Kate find in the cellar?",
    ]


def test_splits_share_no_sentence_whatever_the_seeds(tmp_path):
    found = {}
    for split in sentences.SPLITS:
        for seed in (0, 1):
            path = tmp_path / f"{split}-{seed}.jsonl"
            sentences.write_prompts(path, split=split, count=90, seed=seed)
            prompts = read_prompts(path)[1]
            answers = {prompt.answer for prompt in prompts}
            assert len(answers) == 90
            assert all(prompt.answer in prompt.content[1]["content"] for prompt in prompts)
            found.setdefault(split, set()).update(answers)
    assert sum(map(len, found.values())) == len(set().union(*found.values()))
    assert {draw.split for draw in (sentences.draw_scene(random.Random(seed), "eval") for seed in range(20))} == {"eval"}


def test_write_prompts_is_reproducible_and_grows_at_its_end(tmp_path):
    for name, count, seed in (("a", 20, 1), ("b", 20, 1), ("long", 40, 1), ("other", 20, 2)):
        sentences.write_prompts(tmp_path / name, split="sft", count=count, seed=seed)
    a = (tmp_path / "a").read_text()
    assert (tmp_path / "b").read_text() == a
    assert (tmp_path / "long").read_text().startswith(a)
    assert (tmp_path / "other").read_text() != a


def test_write_prompts_refuses(tmp_path):
    with pytest.raises(UserError, match="no split 'test'; choose one of sft, rollout, eval"):
        sentences.write_prompts(tmp_path / "x", split="test", count=1, seed=0)
    for count in (0, 100_000):
        with pytest.raises(UserError, match="1 to 6912 are possible; take fewer prompts"):
            sentences.write_prompts(tmp_path / "x", split="sft", count=count, seed=0)


@pytest.mark.parametrize(("response", "score"), [
    ("Kate found the red coat in the cellar.", 1.0),
    ("Kate found the red coat in the cellar", 1.0),
    ("Kate found the red coat in the garage.", 0.0),
    ("Kate found the red coat in the cellar. She was happy.", 0.0),
    ("The red coat was found in the cellar.", 0.0),
    ("Kate found the red the red coat in the cellar.", 0.0),
])  # fmt: skip
def test_one_wrong_word_spoils_the_answer(response, score):
    prompt = Prompt(index=0, content=SCENE.ask(sentences.FORMS[0]), answer=SCENE.sentence.rstrip("."))
    assert grade("exact", prompt, response).score == score


def test_student_is_the_first_and_last_layers_with_the_logits_of_temperature_one(tmp_path):
    """The teacher's logits are those of the model times 4; the student's are not."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from megatron_opd.demo.arithmetic import LANGUAGE

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 6}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(LANGUAGE.vocabulary), tie_word_embeddings=True, **sizes)).to(torch.bfloat16)
    LANGUAGE.save_model_dir(model, tmp_path / "teacher")
    smollm2.make_student(tmp_path / "teacher", tmp_path / "student", first=1, last=2)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.bfloat16)
    assert student.config.num_hidden_layers == len(student.model.layers) == 3
    for mine, theirs in zip(student.model.layers, (model.model.layers[i] for i in (0, 4, 5)), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))
    assert torch.equal(student.model.norm.weight * smollm2.SHARPNESS, model.model.norm.weight)
    assert torch.equal(student.model.embed_tokens.weight, model.model.embed_tokens.weight)
