"""All that a prompt says is in the text that its chat template makes, or the prompt is refused by the text that is lost."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
from chat_templates import HEADERS, MARKS, REASONING, STRICT
from tiny_models import make_tokenizer

from megatron_opd.errors import UserError
from megatron_opd.hf.lineage import load_tokenizer
from megatron_opd.recipe.inference import EncodingConfig
from megatron_opd.records import Prompt
from megatron_opd.serve.encode import describe_encoding, encode_prompt, encode_prompts

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'The weather; for instance "Köln"',
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Where"}}},
    },
}


def says(role: str, content: str = "", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def calls(*names: str, **arguments: Any) -> dict[str, Any]:
    return says("assistant", tool_calls=[{"type": "function", "function": {"name": name, "arguments": arguments}} for name in names])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    directory = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(directory)
    return load_tokenizer(directory)


def text_of(tokenizer, template: str, content: Any, tools: list[dict[str, Any]] | None = None, **options: Any) -> str:
    tokenizer.chat_template = template
    return tokenizer.decode(encode_prompt(tokenizer, Prompt(3, content, tools=tools), EncodingConfig(**options)))


DIALOGUE = [says("system", "Be brief."), says("user", " hi\n"), says("assistant", "yo"), says("user", "so?")]
TOOL_USE = [
    says("user", "Cold in Köln?"),
    calls("get_weather", city='"Köln"\n', days=2),
    says("tool", 'now: "3 °C"\nrain', tool_call_id="a"),
]


# The system message within the first turn.
MERGED = """{% set own = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}
{%- for message in messages if message.role != 'system' %}<{{ own if loop.first }}{{ message.content | trim }}>{% endfor %}"""
# Nothing but objects, so that no mark can stand for them; it leaves out {1} unless that comes first.
OF_OBJECTS = """{% for message in messages %}{% if message.content[0] != '{' %}{{ raise_exception('no object') }}{% endif %}
{%- if loop.first or message.content != '{1}' or messages[0].content == '{1}' %}<{{ message.content }}>{% endif %}{% endfor %}"""


@pytest.mark.parametrize(
    ("template", "content", "tools", "text"),
    [
        (MARKS, DIALOGUE, None, "[system]Be brief.[end][user] hi\n[end][assistant]yo[end][user]so?[end][assistant]"),
        (HEADERS, DIALOGUE[1:2], None, "(system)\n\nToday: 26 Jul 2024\n\n(eot)(user)\n\nhi(eot)(assistant)\n\n"),
        (REASONING, DIALOGUE[:2], None, "[system]Be brief.[end][user] hi\n[end][assistant]"),
        (STRICT, DIALOGUE[1:], None, "user: hi;assistant: yo;user: so?;model: "),
        (MERGED, [says("system", "hi"), says("user", " hi ")], None, "<hi\n\nhi>"),
        (OF_OBJECTS, [says("user", "{1}"), says("user", "{2}")], None, "<{1}><{2}>"),
        # Short texts that the template's own words hold too.
        (MARKS, [says("user", "a"), says("assistant", "a"), says("user", "a")], None, None),
        (HEADERS, [says("system", "2"), says("user", "0"), says("assistant", "26"), says("user", "Jul")], None, None),
        (MARKS, [says("system", ""), says("user", "   ")], None, "[system][end][user]   [end][assistant]"),
        (MARKS, TOOL_USE, [WEATHER], None),
        (HEADERS, TOOL_USE, [WEATHER], None),
        (REASONING, TOOL_USE, None, None),
        (MARKS.replace(" | tojson", ""), TOOL_USE, [WEATHER], None),  # objects as Python writes them
        (
            MARKS,
            [*TOOL_USE, says("assistant", "3 °C"), says("user", "And here?"), calls("get_weather"), says("tool", "2")],
            [WEATHER, WEATHER],
            None,
        ),
    ],
)
def test_what_a_template_prints_is_taken(tokenizer, template: str, content: list, tools: list | None, text: str | None) -> None:
    given = text_of(tokenizer, template, content, tools)
    assert text is None or given == text
    assert text_of(tokenizer, template, content, tools) == given


NO_TOOLS = MARKS.replace("{%- if tools %}", "{%- if false %}")
USER_ONLY = "{% for message in messages if message.role == 'user' %}<{{ message.content }}>{% endfor %}"


@pytest.mark.parametrize(
    ("template", "content", "tools", "message"),
    [
        (USER_ONLY, DIALOGUE, None, r"prompt 3: the chat template does not print the content of message 0 \(system\), 'Be brief.'; use a model"),
        (USER_ONLY, [says("user", "b"), says("assistant", "a"), says("user", "a b a")], None, r"message 1 \(assistant\), 'a'"),
        (USER_ONLY, [says("user", "x" * 90), says("tool", "y" * 90)], None, r"message 1 \(tool\), 'y{77}\.\.\.'"),
        (NO_TOOLS, TOOL_USE, [WEATHER], "the name of a tool, 'get_weather'; use a model whose template prints tools"),
        (MARKS.replace("message.tool_calls", "false"), TOOL_USE, [WEATHER], r"a tool call of message 1 \(assistant\), 'get_weather'"),
        (MARKS.replace('{{ call.arguments | tojson }}', "{}"), TOOL_USE, [WEATHER], r"a tool call of message 1 \(assistant\), 'city'"),
        (MARKS.replace("{{ tool | tojson }}", "{{ tool.function.name }}"), TOOL_USE, [WEATHER], "the description of a tool, 'The weather; "),
        (MARKS.replace("{{ tool | tojson }}", "{{ tool.function.name }}: {{ tool.function.description }}"), TOOL_USE, [WEATHER], "a parameter of a tool, 'city'"),
        (MARKS.replace("{{ tool | tojson }}", "{{ tool.function.name }}: {{ tool.function.description }}({{ tool.function.parameters.properties | join(',') }})"),
         TOOL_USE, [WEATHER], "the description of a tool's parameter 'city', 'Where'"),
        (HEADERS, [says("user", "hi"), {**calls("f"), "content": "I look it up."}, says("tool", "2")], None, "'I look it up.'"),
        (HEADERS, [says("user", "hi"), calls("f", "g"), says("tool", "2")], None, "prompt 3: the chat template of .* refuses it: one call"),
        (STRICT, DIALOGUE, None, "prompt 3: the chat template of .* refuses it: no system role"),
        (STRICT, [says("assistant", "hi"), says("user", "a")], None, "refuses it: roles must alternate"),
        (MARKS, [says("user", "hi", name="Ada")], None, r"the name of message 0 \(user\), 'Ada'; remove the name"),
        ("{{ messages[-1].content }}", [says("user", "hi"), says("assistant", "hi"), says("user", "hi")], None, r"message 0 \(user\), 'hi'"),
        (OF_OBJECTS, [says("user", "{2}"), says("user", "{1}")], None, r"message 1 \(user\), '\{1}'"),
        # Lost for what it says, not for where it stands.
        ("{% for m in messages %}[{{ m.content[:5] }}]{% endfor %}", [says("user", "too long")], None, "'too long'"),
        ("{% for m in messages if m.content | length != 1 %}[{{ m.content }}]{% endfor %} a", [says("user", "abab"), says("user", "a")], None, "'a'"),
        ("{% for m in messages %}{% if loop.first or m.content != 'same' %}[{{ m.content }}]{% endif %}{% endfor %}", [says("user", "same")] * 2, None, "'same'"),
        ("{{ 1 // 0 }}", [says("user", "hi")], None, "refuses it: integer division"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", [says("user", "hi")], None, "refuses it: maximum recursion"),
    ],
)  # fmt: skip
def test_what_a_template_loses_is_named(tokenizer, template: str, content: list, tools: list | None, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        text_of(tokenizer, template, content, tools)
    assert "\n" not in str(error.value)


def test_reasoning_of_earlier_turns_may_be_left_out(tokenizer) -> None:
    thought = "<think>\nlong thought\n</think>\n\nFour."
    for turn in (says("assistant", thought), says("assistant", "Four.", reasoning_content="long thought")):
        assert (
            text_of(tokenizer, REASONING, [says("user", "2+2"), turn, says("user", "so?")])
            == "[user]2+2[end][assistant]Four.[end][user]so?[end][assistant]"
        )
    # Between a tool's results the model goes on from what it thought.
    between = [says("user", "2+2"), {**calls("add"), "reasoning_content": "long thought"}, says("tool", "4")]
    assert "<think>\nlong thought\n</think>" in text_of(tokenizer, REASONING, between)
    with pytest.raises(UserError, match=r"the reasoning of message 1 \(assistant\), 'long thought'"):
        text_of(tokenizer, MARKS, between)
    between[1] = {**calls("add"), "content": thought}
    assert "<think>\nlong thought\n</think>\n\nFour.<call>" in text_of(tokenizer, REASONING, between)
    # The answer itself is never left out.
    cut = REASONING.replace("{% set content = content.split('</think>')[-1].lstrip('\\n') %}", "{% set content = '' %}")
    assert cut != REASONING
    with pytest.raises(UserError, match=r"'Four.'"):
        text_of(tokenizer, cut, [says("user", "2+2"), says("assistant", thought), says("user", "so?")])


def test_developer_messages_become_system_messages_where_the_template_knows_none(tokenizer) -> None:
    content = [says("developer", "in French"), says("user", "hi")]
    assert text_of(tokenizer, MARKS, content) == "[system]in French[end][user]hi[end][assistant]"
    (line,) = describe_encoding(tokenizer, [Prompt(0, content), Prompt(1, content[1:])], EncodingConfig())
    assert line.startswith("1 of 2 prompts have developer messages")
    knows = MARKS.replace("message.role == 'user' or", "message.role in ('user', 'developer') or")
    assert "[developer]in French[end]" in text_of(tokenizer, knows, content)
    assert describe_encoding(tokenizer, [Prompt(0, content)], EncodingConfig()) == []
    both = [says("system", "s"), says("developer", "in French"), says("user", "hi")]
    assert text_of(tokenizer, MARKS, both) == "[system]s[end][system]in French[end][user]hi[end][assistant]"


def test_a_prompt_that_ends_in_an_assistant_turn(tokenizer) -> None:
    content = [says("user", "2+2?"), says("assistant", "It is")]
    with pytest.raises(UserError, match=r"prompt 3 ends in an assistant message \('It is'\); encoding.assistant_last='continue'"):
        text_of(tokenizer, MARKS, content)
    for template, text in (
        (MARKS, "[system]Be a helpful assistant.[end][user]2+2?[end][assistant]It is"),
        (HEADERS, "(system)\n\nToday: 26 Jul 2024\n\n(eot)(user)\n\n2+2?(eot)(assistant)\n\nIt is"),
        (REASONING, "[user]2+2?[end][assistant]<think>\n\n</think>\n\nIt is"),
        (STRICT, "user: 2+2?;assistant: It is"),
    ):
        assert text_of(tokenizer, template, content, assistant_last="continue") == text
    # Other prompts of the same stage are as ever.
    assert text_of(tokenizer, MARKS, content[:1], assistant_last="continue") == text_of(tokenizer, MARKS, content[:1])
    # White space before the answer is part of what the model goes on from.
    spaced = [says("user", "2+2?"), says("assistant", "It is ")]
    assert text_of(tokenizer, MARKS, spaced, assistant_last="continue").endswith("[assistant]It is ")
    with pytest.raises(UserError, match="white space at its end is what templates strip"):
        text_of(tokenizer, HEADERS, spaced, assistant_last="continue")
    closed = [says("user", "2+2?"), says("assistant", "<think>\nFour.\n</think>\n\nIt is")]
    assert text_of(tokenizer, REASONING, closed, assistant_last="continue").endswith("[assistant]<think>\nFour.\n</think>\n\nIt is")
    with pytest.raises(UserError, match="closes the reasoning before the assistant's last message"):
        text_of(tokenizer, REASONING, [says("user", "2+2?"), says("assistant", "<think>\nFour")], assistant_last="continue")
    with pytest.raises(UserError, match=r"prompt 3: the chat template of .* refuses it"):
        text_of(tokenizer, USER_ONLY, content, assistant_last="continue")
    with pytest.raises(UserError, match="prompt 3 ends in a tool call"):
        text_of(tokenizer, MARKS, [says("user", "hi"), calls("f")], assistant_last="continue")


def test_a_rows_system_message_beside_the_recipes(tokenizer) -> None:
    for role in ("system", "developer"):
        content = [says(role, "In French."), says("user", "hi")]
        with pytest.raises(
            UserError, match=r"prompt 3 has the system message 'In French.', and encoding.system is 'Be brief.'; encoding.row_system="
        ):
            text_of(tokenizer, MARKS, content, system="Be brief.")
        kept, replaced = (text_of(tokenizer, MARKS, content, system="Be brief.", row_system=rule) for rule in ("keep", "replace"))
        assert kept == "[system]In French.[end][user]hi[end][assistant]"
        assert replaced == "[system]Be brief.[end][user]hi[end][assistant]" == text_of(tokenizer, MARKS, content[1:], system="Be brief.")
        assert text_of(tokenizer, MARKS, content, system="In French.") == kept


def test_a_store_keeps_what_changes_prompts() -> None:
    """Stores made before a field that refuses was there still match."""
    assert EncodingConfig().recorded() == {"chat_template": "auto", "overlong_prompt": "error"}
    changed = EncodingConfig(system="s", assistant_last="continue", row_system="keep").recorded()
    assert changed == {
        "chat_template": "auto",
        "overlong_prompt": "error",
        "system": "s",
        "assistant_last": "continue",
        "row_system": "keep",
    }


def test_text_beside_a_chat_template_is_said(tokenizer, tmp_path: Path) -> None:
    tokenizer.chat_template = MARKS
    prompts = [Prompt(0, "hi"), Prompt(1, [says("user", "hi")])]
    (line,) = describe_encoding(tokenizer, prompts, EncodingConfig())
    assert line.startswith(
        "1 of 2 prompts are text and go to the model as they are, although it has a chat template; encoding.chat_template="
    )
    assert len(describe_encoding(tokenizer, prompts[:1], EncodingConfig(chat_template="never"))) == 1
    assert describe_encoding(tokenizer, prompts, EncodingConfig(chat_template="always")) == []
    tokenizer.chat_template = None
    assert describe_encoding(tokenizer, prompts[:1], EncodingConfig()) == []
    with pytest.raises(UserError, match="prompt 0 has tools, which only a chat template prints"):
        encode_prompt(tokenizer, Prompt(0, "hi", tools=[WEATHER]), EncodingConfig())


ATOMS = [
    "a",
    "n",
    "2",
    '"',
    "'",
    "\n",
    "\t",
    " ",
    "\\",
    "\\n",
    "é",
    "😀",
    "{",
    "}",
    ": ",
    "[end]",
    "user",
    "assistant",
    "system",
    "name",
    "arguments",
    "Today",
]


def random_dialogue(random: Random, reasoning: bool) -> list[dict[str, Any]]:
    """System, user, tool and assistant messages of a few words that templates use themselves, or that JSON writes otherwise."""

    def text(least: int = 0) -> str:
        return "".join(random.choices(ATOMS, k=random.randint(least, 4)))

    def thing() -> Any:
        return random.choice([text(), random.randint(0, 9), True, [text(), 1], {text(1): text()}])

    messages = [says("system", text())] if random.random() < 0.5 else []
    for _ in range(random.randint(1, 3)):
        messages.append(says("user", text()))
        if random.random() < 0.5:
            messages += [calls("f" + text(), **{text(1): thing() for _ in range(random.randint(0, 2))}), says("tool", text())]
        thought = f"<think>\n{text()}\n</think>\n\n" if reasoning and random.random() < 0.5 else ""
        messages.append(says("assistant", thought + text()))
    return messages[:-1]


def test_random_dialogues_are_printed_or_refused(tokenizer) -> None:
    """Whatever the texts are, a template that prints them is taken, and one that leaves out a text for what it says is not."""
    random = Random(7)
    for template in (MARKS, HEADERS, REASONING):
        dialogues = [random_dialogue(random, template is REASONING) for _ in range(150)]
        tokenizer.chat_template = template
        encode_prompts(tokenizer, [Prompt(number, messages) for number, messages in enumerate(dialogues)], EncodingConfig())
        for messages in dialogues[:100] if template is MARKS else ():
            lost = random.choice(messages)
            first_system = lost is messages[0] and lost["role"] == "system"
            if lost["content"].strip() and not first_system:
                hiding = template.replace(
                    "{{ message.content }}", "{{ '' if message.content == " + repr(lost["content"]) + " else message.content }}"
                )
                with pytest.raises(UserError, match="the chat template does not print the content of message"):
                    text_of(tokenizer, hiding, messages)
