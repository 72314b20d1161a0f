"""Stop ids and chat templates: every source counts, what a template ignores is an error, and no template knows what day it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import CHATML, ENDOFTEXT, IM_END, make_base, make_chat_tokenizer, make_instruct, write_chats
from unit.store_parts import VOCAB, fake_fingerprint, fill, make_manifest, make_scores, random_logp

from megatron_opd.cli import main
from megatron_opd.convert.turn_files import write_turns
from megatron_opd.data.store import StoreReader
from megatron_opd.data.stored_format import check_stored_format
from megatron_opd.data.writer import create_store, write_part, write_scores
from megatron_opd.errors import ConfigError, LineageError, StoreError, UserError
from megatron_opd.hf.lineage import CACHE_FILE, load_tokenizer
from megatron_opd.hf.turns import (
    chat_templates,
    check_prompt_format,
    generation_prompt,
    own_stop_ids,
    read_turns,
    render,
    resolve_encoding,
    turn_end,
)
from megatron_opd.recipe.files import load_recipe
from megatron_opd.recipe.inference import EncodingConfig
from megatron_opd.records import Finish, Lineage, Rollout, SamplingParams, SftFacts
from megatron_opd.store_records import ScoreManifest
from megatron_opd.train.endings import check_endings, sft_facts

CHAT = [{"role": "user", "content": "hi"}]
# Templates of the kinds that are published: a date from the clock or from a variable, a switch for thinking, no end of a turn, text ends.
DATED = (
    "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{% endif %}Today: {{ date_string + '\\n' }}"
    + CHATML
)
CLOCK = '{{ strftime_now("%Y-%m-%d") }} {{ strftime_now( "%B" ) + "\\n" }}' + CHATML
SWITCH = CHATML.replace(
    "<|im_start|>assistant\\n' }}",
    "<|im_start|>assistant\\n' }}{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}",
)
OPEN = CHATML.replace(" + '<|im_end|>\\n'", "")
WITH_THOUGHTS = CHATML.replace(
    "+ message.content +", "+ ('<think>\\n\\n</think>\\n\\n' if message.role == 'assistant' else '') + message.content +"
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    make_base(folder / "student", layers=1)
    make_instruct(folder / "teacher", layers=1, template=SWITCH)
    write_chats(folder / "prompts.jsonl", 6)
    return folder


@pytest.fixture
def student(pair: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pair / "student", tmp_path / "student", ignore=shutil.ignore_patterns(CACHE_FILE)))


def tokenizer_with(tmp_path: Path, template: str | None) -> Any:
    make_chat_tokenizer(tmp_path / "tokenizer", eos="<|endoftext|>", template=template)
    return load_tokenizer(tmp_path / "tokenizer")


def edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_every_file_adds_its_stop_ids(student: Path) -> None:
    every = ["generation_config.json", "config.json", "the tokenizer"]
    assert own_stop_ids(student) == {ENDOFTEXT: every}
    edit(student / "generation_config.json", eos_token_id=[7, IM_END, 7])
    assert own_stop_ids(student) == {7: every[:1], IM_END: every[:1], ENDOFTEXT: every[1:]}
    edit(student / "config.json", eos_token_id=None)
    (student / "generation_config.json").unlink()
    assert own_stop_ids(student) == {ENDOFTEXT: every[2:]}


@pytest.mark.parametrize("value", ["</s>", -1, 272, 1.5, True, [1, None, "2"], {"id": 1}])
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_a_stop_id_that_is_none(student: Path, name: str, value: object) -> None:
    edit(student / name, eos_token_id=value)
    with pytest.raises(UserError, match=rf"student/{name}: no valid end-of-turn ids: eos_token_id is .* below 272 are expected"):
        own_stop_ids(student)


@pytest.mark.parametrize(
    ("template", "end"),
    [(CHATML, IM_END), (SWITCH, IM_END), (WITH_THOUGHTS, IM_END), (DATED, IM_END), (OPEN, None), (None, None), ("{{ 1 / 0 }}", None)],
)
def test_the_token_that_closes_a_turn(tmp_path: Path, template: str | None, end: int | None) -> None:
    assert turn_end(tokenizer_with(tmp_path, template)) == end


def test_a_templates_turn_end_is_a_stop_id_where_the_template_is_used(pair: Path) -> None:
    tokenizer = load_tokenizer(pair / "student")
    used = read_turns(pair / "student", tokenizer, EncodingConfig(), templated=[True])
    assert list(used.stop_ids) == [IM_END, ENDOFTEXT]
    plain = read_turns(pair / "student", tokenizer, EncodingConfig(), templated=[False])
    assert (list(plain.stop_ids), plain.chat_templates, plain.prompt_suffix, plain.prompt_probe) == ([ENDOFTEXT], {}, [], [])
    after_sft = read_turns(pair / "student", tokenizer, EncodingConfig(), templated=[False], sft=SftFacts(stop_ids=[65]))
    assert after_sft.stop_ids[65] == ["the SFT answers"]
    asked = read_turns(pair / "student", tokenizer, EncodingConfig(), templated=[True], stop_token_ids=[7, IM_END])
    assert asked.stop_ids[7] == ["sampling.stop_token_ids"]
    assert asked.manifest_fields()["stop_ids"] == [IM_END, ENDOFTEXT, 7]
    with pytest.raises(UserError, match=r"sampling.stop_token_ids has 272, but .*student has 272 tokens"):
        read_turns(pair / "student", tokenizer, EncodingConfig(), templated=[True], stop_token_ids=[272])


@pytest.mark.parametrize(("template", "printed"), [(DATED, "Today: 26 Jul 2024\n"), (CLOCK, "2024-07-26 July\n")])
def test_a_template_that_asks_for_the_date_gets_a_fixed_one(tmp_path: Path, template: str, printed: str) -> None:
    tokenizer = tokenizer_with(tmp_path, template)
    encoding = resolve_encoding(tokenizer, EncodingConfig(), templated=True)
    assert encoding.date_string == "26 Jul 2024"  # from here into the store's manifest
    rest = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert render(tokenizer, CHAT, encoding) == printed + rest
    other = resolve_encoding(tokenizer, EncodingConfig(date_string="01 Feb 2025"), templated=True)
    assert "2025" in render(tokenizer, CHAT, other)


def test_a_date_for_a_template_that_prints_none(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, CHATML)
    assert resolve_encoding(tokenizer, EncodingConfig(), templated=True).date_string is None
    with pytest.raises(UserError, match=r"encoding.date_string = '01 Feb 2025', but the chat template of .* prints no date"):
        resolve_encoding(tokenizer, EncodingConfig(date_string="01 Feb 2025"), templated=True)
    with pytest.raises(ConfigError, match="a date such as '26 Jul 2024' is expected"):
        load_recipe("tiny", ["rollout.encoding.date_string='2025-02-01'"])


def test_a_switch_for_thinking_that_the_template_ignores(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, CHATML)
    for value in (True, False):
        with pytest.raises(UserError, match=f"encoding.enable_thinking = {str(value).lower()}, but the chat template of .* ignores it"):
            resolve_encoding(tokenizer, EncodingConfig(enable_thinking=value), templated=True)
    tokenizer.chat_template = SWITCH
    assert resolve_encoding(tokenizer, EncodingConfig(enable_thinking=True), templated=True).enable_thinking


def test_the_ids_that_ask_for_an_answer(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, SWITCH)
    assert tokenizer.decode(generation_prompt(tokenizer, EncodingConfig())) == "<|im_start|>assistant\n"
    assert tokenizer.decode(generation_prompt(tokenizer, EncodingConfig(enable_thinking=False))).endswith("<think>\n\n</think>\n\n")
    tokenizer.chat_template = OPEN.replace("{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}", "")
    assert generation_prompt(tokenizer, EncodingConfig()) == []


@pytest.mark.parametrize(
    ("template", "reason"), [("{{ 1 / 0 }}", "division by zero"), ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion")]
)
def test_a_template_that_breaks(tmp_path: Path, template: str, reason: str) -> None:
    with pytest.raises(UserError, match=f"the chat template of .*/tokenizer refuses it: .*{reason}"):
        render(tokenizer_with(tmp_path, template), CHAT, EncodingConfig())


def test_a_directory_is_told_how_its_turns_end(student: Path) -> None:
    templates = {"default": SWITCH, "tool_use": CHATML}
    edit(student / "tokenizer_config.json", chat_template="inline, of older versions")
    (student / "chat_template.jinja").unlink()
    write_turns(student, SftFacts(stop_ids=[IM_END], chat_templates=templates))
    assert own_stop_ids(student) == {
        IM_END: ["generation_config.json", "config.json", "the tokenizer"],
        ENDOFTEXT: ["generation_config.json"],
    }
    assert chat_templates(load_tokenizer(student)) == templates
    assert json.loads((student / "generation_config.json").read_text())["max_new_tokens"] == 2048  # the rest is kept
    before = {path.name: path.read_bytes() for path in student.iterdir() if path.is_file()}
    write_turns(student, SftFacts(stop_ids=[IM_END], chat_templates=templates))
    assert {path.name: path.read_bytes() for path in student.iterdir() if path.is_file()} == before


def test_check_inputs_shows_ends_templates_and_first_prompts(pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = {"run_dir": tmp_path / "run", "models.teacher": pair / "teacher", "models.student": pair / "student"}
    paths |= {f"{stage}.prompts": pair / "prompts.jsonl" for stage in ("generate", "rollout", "eval.held_out")}
    command = ["check", "tiny", *(f"{key}={str(path)!r}" for key, path in paths.items()), "--stage", "inputs"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "student: stop ids 256 <|endoftext|> (generation_config.json, config.json, the tokenizer)" in printed
    assert "teacher: stop ids 258 <|im_end|> (" in printed
    assert "after SFT the student stops at 258 <|im_end|> too" in printed
    assert "the chat templates differ: after SFT the student has the teacher's" in printed
    first = r"its first prompt: '<|im_start|>user\nab 0<|im_end|>\n<|im_start|>assistant\n"
    for stage in ("generate", "rollout", "eval.held_out"):
        assert f"{stage}: {first}'" in printed
    assert main([*command, "rollout.encoding.enable_thinking=false"]) == 0
    assert rf"rollout: {first}<think>\n\n</think>\n\n'" in capsys.readouterr().out
    # Two faults of different kinds, both named.
    assert main([*command, "generate.encoding.date_string='01 Feb 2025'", f"eval.held_out.prompts={str(tmp_path / 'nothing')!r}"]) == 2
    message = capsys.readouterr().err
    assert "2 faults" in message
    assert "prints no date" in message
    assert "nothing: no such prompt file" in message


def test_a_student_without_a_template(pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With SFT it gets the teacher's; where it is sampled as it is, it is found before anything is."""
    bare = make_base(tmp_path / "bare", layers=1, template=None)
    paths = {"run_dir": tmp_path / "run", "models.teacher": pair / "teacher", "models.student": bare}
    paths |= {f"{stage}.prompts": pair / "prompts.jsonl" for stage in ("generate", "rollout", "eval.held_out")}
    command = ["check", "tiny", *(f"{key}={str(path)!r}" for key, path in paths.items()), "--stage", "inputs"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "student: stop ids 256 <|endoftext|> (generation_config.json, config.json, the tokenizer); no chat template" in printed
    assert "after SFT the student has the teacher's" in printed
    assert main([*command, f"rollout.model={str(bare)!r}"]) == 2
    assert "the tokenizer has no chat template" in capsys.readouterr().err


def test_a_template_that_writes_the_eos_token_writes_the_tokenizers_own(student: Path) -> None:
    """The text of two templates is the same, their tokens are not."""
    tokenizer = load_tokenizer(student)
    tokenizer.chat_template = CHATML.replace("'<|im_end|>\\n'", "eos_token")
    here = read_turns(student, tokenizer, EncodingConfig(), templated=[True])
    tokenizer.eos_token = "<|im_end|>"
    there = read_turns(student, tokenizer, EncodingConfig(), templated=[True])
    facts = SftFacts(chat_templates=there.chat_templates, prompt_suffix=there.prompt_suffix, prompt_probe=there.prompt_probe)
    assert check_prompt_format(facts, there, "x", tokenizer) is None
    assert "where it wrote '<|im_start|>user\\na<|im_end|>" in str(check_prompt_format(facts, here, "x", tokenizer))


# How a store's responses end.


def responses(url: str, lines: list[tuple[list[int], Finish]], **changes: Any) -> StoreReader:
    """A store with a response for each prompt."""
    manifest = make_manifest(num_prompts=len(lines), samples=1, per_part=len(lines), **changes)
    location = create_store(url, manifest)
    rng = np.random.default_rng(0)
    rollouts = [
        Rollout(np.array([5, 6, *tokens], np.int32), 2, prompt, 0, finish, random_logp(rng, 2, len(tokens)))
        for prompt, (tokens, finish) in enumerate(lines)
    ]
    write_part(location, 0, rollouts, [], {})
    return StoreReader(url)


ENDED = [([9, 9, 1], Finish.STOP), ([9] * 5 + [1], Finish.STOP), ([9] * 8 + [2], Finish.STOP), ([9] * 60, Finish.LENGTH)]


def test_what_sft_answers_tell_of_their_endings(tmp_path: Path) -> None:
    reader = responses(
        str(tmp_path / "store"), ENDED, stop_ids=[2, 1, 3], turn_end=3, chat_templates={"default": "x"}, prompt_suffix=[5, 6]
    )
    facts = sft_facts(reader)
    assert facts.stop_ids == [1, 2, 3]  # by frequency, then the template's, which ended none
    assert (facts.chat_templates, facts.prompt_suffix, facts.num_answers) == ({"default": "x"}, [5, 6], 4)
    assert [facts.expected_stop_share(limit) for limit in (1, 3, 4, 7, 8, 9, 60)] == [0.0, 0.0, 0.25, 0.25, 0.5, 0.75, 0.75]
    assert reader.parts[0].endings == {1: 2, 2: 1}
    assert Lineage.model_validate_json(Lineage(sft=facts).model_dump_json()).sft == facts


@pytest.mark.parametrize(
    ("tokens", "finish", "reason"),
    [
        ([9, 1, 9, 9], Finish.LENGTH, "2 tokens stand behind the stop id 1 in the response"),
        ([1, 9, 1], Finish.STOP, "2 tokens stand behind the stop id 1 in the response"),
        ([9, 9, 9], Finish.STOP, r"it ended by stop at token 9; the stop ids are \[1, 2\]"),
        ([9, 9, 2], Finish.LENGTH, r"it ended by length at token 2; the stop ids are \[1, 2\]"),
    ],
)
def test_a_part_holds_nothing_behind_a_stop_id(tmp_path: Path, tokens: list[int], finish: Finish, reason: str) -> None:
    with pytest.raises(StoreError, match=f"prompt 0, sample 0: {reason}"):
        responses(str(tmp_path / "store"), [(tokens, finish)], stop_ids=[1, 2])


def test_tokens_behind_a_stop_id_that_the_store_did_not_know_of(tmp_path: Path) -> None:
    lines = [*ENDED, ([9, 4, 9, 9], Finish.LENGTH), ([4, 9, 1], Finish.STOP), ([9, 9, 4], Finish.LENGTH)]
    reader = responses(str(tmp_path / "store"), lines, stop_ids=[1, 2])
    assert check_endings(reader, {1, 2}, None, allow=False) == []
    with pytest.raises(
        StoreError, match=r"2 of 7 responses go on behind a stop id of \[4\] \(4 tokens; its manifest's stop ids are \[1, 2\]\)"
    ):
        check_endings(reader, {1, 4}, None, allow=False)
    (recorded,) = check_endings(reader, {1, 4}, None, allow=True)
    assert recorded.startswith("stop mismatch allowed: ")


@pytest.mark.parametrize(("stopped", "fine"), [(0, False), (10, False), (24, False), (40, True), (100, True)])
def test_rollouts_that_end_far_less_often_than_the_sft_answers(tmp_path: Path, stopped: int, fine: bool) -> None:
    facts = SftFacts(stop_ids=[1], num_answers=1000, stopped_within={16: 0.1, 32: 0.995, 4096: 1.0})
    lines = [([9, 1], Finish.STOP)] * stopped + [([9] * 40, Finish.LENGTH)] * (100 - stopped)
    reader = responses(str(tmp_path / "store"), lines, stop_ids=[1], sampling=SamplingParams(max_new_tokens=40))
    if fine:
        assert check_endings(reader, {1}, facts, allow=False) == []
        return
    with pytest.raises(
        StoreError, match=rf"{stopped}.0% of the responses ended by themselves, but of the SFT answers 99.5% did within 40 tokens"
    ):
        check_endings(reader, {1}, facts, allow=False)
    assert len(check_endings(reader, {1}, facts, allow=True)) == 1


def test_what_the_teacher_could_not_score_to_its_end_has_ended_all_the_same(tmp_path: Path) -> None:
    """Endings are those of the sampling; a teacher of a shorter context cuts what training reads."""
    facts = SftFacts(stop_ids=[1], num_answers=1000, stopped_within={32: 0.995})
    url = str(tmp_path / "store")
    reader = responses(url, [([9] * 30 + [1], Finish.STOP)] * 20, stop_ids=[1], sampling=SamplingParams(max_new_tokens=40))
    rollouts = [rollout.cut(12) for rollout in reader.part_rollouts(0)]
    record = ScoreManifest(part=0, teacher=fake_fingerprint("teacher"), max_tokens=12, part_crc32c=reader.parts[0].crc32c, crc32c={})
    write_scores(reader.location, "teacher", record, reader.part_rollouts(0), make_scores(rollouts))
    cut = StoreReader(url, teacher="teacher")
    assert set(cut.finishes) == {Finish.LENGTH}
    assert check_endings(cut, {1}, facts, allow=False) == []


def test_inspect_shows_ends_and_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    responses(str(tmp_path / "store"), ENDED, stop_ids=[2, 1, 3], chat_templates={"default": "x"}, prompt_suffix=[5, 6])
    assert main(["inspect", str(tmp_path / "store")]) == 0
    printed = capsys.readouterr().out
    assert "stop ids           2 (1 responses), 1 (2 responses), 3 (0 responses)" in printed
    assert ", which ends them with the ids [5, 6]" in printed


def test_short_responses_are_compared_with_short_answers(tmp_path: Path) -> None:
    """Answers of 16k tokens and rollouts of 4k: few end within the limit, and few of the answers did."""
    facts = SftFacts(stop_ids=[1], num_answers=1000, stopped_within={16: 0.04, 1024: 0.995})
    reader = responses(str(tmp_path / "store"), [([9] * 20, Finish.LENGTH)] * 40, stop_ids=[1], sampling=SamplingParams(max_new_tokens=20))
    assert check_endings(reader, {1}, facts, allow=False) == []


def test_a_stores_prompts_are_compared_with_those_of_the_sft_answers(tmp_path: Path) -> None:
    facts = SftFacts(chat_templates={"default": "x"}, prompt_suffix=[5, 6])
    lineage = Lineage(base=fake_fingerprint(), sft=facts)
    same: dict[str, Any] = {"lineage": lineage, "chat_templates": {"default": "x"}, "prompt_suffix": [5, 6]}
    check_stored_format(responses(str(tmp_path / "same"), ENDED, **same))
    for name, change, message in (
        ("template", {"chat_templates": {"default": "y"}}, "its chat template is not the one that wrote the prompts"),
        (
            "plain",
            {"chat_templates": {}, "prompt_suffix": []},
            "written as plain text, those of the SFT answers were written by a chat template",
        ),
        ("probe", {"prompt_probe": [3, 4]}, r"writes \[3, 4\] where it wrote \[\] \(bos or eos token"),
        ("suffix", {"prompt_suffix": [6]}, r"prompts end with \[6\], those of the SFT answers ended with \[5, 6\]"),
    ):
        reader = responses(str(tmp_path / name), ENDED, **(same | change))
        with pytest.raises(LineageError, match=message):
            check_stored_format(reader)
        check_stored_format(responses(str(tmp_path / f"{name}-allowed"), ENDED, **(same | change), allow_template_mismatch=True))
    # The manifest says one thing, the tokens another.
    facts = SftFacts(chat_templates={"default": "x"}, prompt_suffix=[7, 8])
    lying = responses(str(tmp_path / "lying"), ENDED, **(same | {"lineage": Lineage(sft=facts), "prompt_suffix": [7, 8]}))
    with pytest.raises(LineageError, match=r"part 0: prompts end with \[5, 6\], those of the SFT answers ended with \[7, 8\]"):
        check_stored_format(lying)


def test_a_store_of_an_older_version_is_read(tmp_path: Path) -> None:
    """It names no stop ids and counts no endings."""
    reader = responses(str(tmp_path / "store"), ENDED)
    assert VOCAB > 9
    attributes = tmp_path / "store" / "parts" / "000000" / "zarr.json"
    content = json.loads(attributes.read_text())
    del content["attributes"]["opd"]["endings"], content["attributes"]["opd_crc32c"]
    attributes.write_text(json.dumps(content))
    reader = StoreReader(str(tmp_path / "store"))
    assert reader.parts[0].endings is None
    assert sft_facts(reader).stop_ids == [1, 2]
    fill(str(tmp_path / "random"), make_manifest())
    assert check_endings(StoreReader(str(tmp_path / "random")), {VOCAB}, None, allow=False) == []
