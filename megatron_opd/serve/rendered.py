"""Whether a chat template printed all that a prompt says: templates leave out, without a word, roles and fields that they do not know."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_opd.errors import UserError

Messages = list[dict[str, Any]]
Render = Callable[[Messages, list[dict[str, Any]] | None], str]

_MARK = "qzmk{:05d}kmzq"  # letters and digits: the same in JSON
_MARKS = re.compile(r"qzmk(\d{5})kmzq")


@dataclass(frozen=True)
class _Piece:
    """A text of a prompt, where it stands, and those of its parts that must be printed as they are (without white space around them)."""

    place: str
    text: str
    wanted: tuple[str, ...]
    remedy: str


def check_printed(render: Render, messages: Messages, tools: list[dict[str, Any]] | None, text: str, where: str) -> None:
    """Raise UserError, naming the first text that is lost, unless `text` (what `render` gave) holds every text of the prompt.

    Every text is first replaced by a mark of its own, which must be printed: so a short text is not found in another one by chance.
    Then `text` must be what was printed with each mark replaced by its text. If it is not, the template looks into the texts: then the
    marks come one at a time, and each text must stand in `text` once more than where its mark stands for it.
    Not wanted: ids of tool calls, names of tool messages, and the reasoning of an assistant turn before a user's (templates of reasoning
    models leave it out, and the models were trained so).
    """
    pieces: list[_Piece] = []
    marked_messages = _mark_messages(messages, pieces)
    marked_tools = None if tools is None else _mark_tools(tools, pieces)
    try:
        probe = render(marked_messages, marked_tools)
    except UserError:
        probe = None  # it wants texts of some form
    if probe is not None:
        printed = {int(number) for number in _MARKS.findall(probe)}
        for number, piece in enumerate(pieces):
            if piece.wanted and number not in printed:
                raise _lost(piece, piece.text, where)
        if _is_filled_in(probe, pieces, text):
            return
    for number, piece in enumerate(pieces):
        try:
            without = render(*_unmark((marked_messages, marked_tools), pieces, number)).replace(_MARK.format(number), "\0")
        except UserError:
            without = ""
        for wanted in piece.wanted:
            if _count(text, wanted) <= _count(without, wanted):
                raise _lost(piece, wanted, where)


def _lost(piece: _Piece, text: str, where: str) -> UserError:
    shown = text.strip() if len(text.strip()) <= 80 else f"{text.strip()[:77]}..."
    return UserError(f"{where}: the chat template does not print {piece.place}, {shown!r}; {piece.remedy}")


def _is_filled_in(probe: str, pieces: list[_Piece], text: str) -> bool:
    """Whether `text` is the probe with every mark replaced by its text, in a spelling that templates give it."""
    ends = {0}  # positions of `text` up to where the probe's parts so far can reach
    for number, part in enumerate(_MARKS.split(probe)):  # own words, mark, own words, ...
        options = {part} if number % 2 == 0 else _spellings(pieces[int(part)].text)
        ends = {end + len(option) for end in ends for option in options if text.startswith(option, end)}
    return len(text) in ends


def _spellings(text: str) -> set[str]:
    """A text as it is, without white space around it, and as JSON and Python write it (templates print objects either way)."""
    trimmed = {text, text.strip(), text.lstrip(), text.rstrip(), text.strip("\n")}
    written = {json.dumps(spelling, ensure_ascii=ascii_only)[1:-1] for spelling in trimmed for ascii_only in (False, True)}
    return trimmed | written | {repr(spelling)[1:-1] for spelling in trimmed}


def _count(text: str, wanted: str) -> int:
    return sum(map(text.count, _spellings(wanted)))


def _unmark(marked: Any, pieces: list[_Piece], kept: int) -> Any:
    """Messages and tools with the texts in place of all marks but one."""
    if isinstance(marked, str):
        match = _MARKS.fullmatch(marked)
        return pieces[int(match[1])].text if match and int(match[1]) != kept else marked
    if isinstance(marked, dict):
        return {_unmark(key, pieces, kept): _unmark(value, pieces, kept) for key, value in marked.items()}
    return [_unmark(item, pieces, kept) for item in marked] if isinstance(marked, list | tuple) else marked


def _mark_messages(messages: Messages, pieces: list[_Piece]) -> Messages:
    last_user = max((number for number, message in enumerate(messages) if message["role"] == "user"), default=-1)
    marked = []
    for number, message in enumerate(messages):
        role = message["role"]
        of = f"of message {number} ({role})"
        remedy = f"use a model whose template knows {role} messages, or write it into another message"
        earlier = role == "assistant" and number < last_user
        copy = dict(message)
        content = message["content"]
        wanted = _without_reasoning(content, earlier) if role == "assistant" else (content,)
        copy["content"] = _put(pieces, f"the content {of}", content, wanted, remedy)
        if "reasoning_content" in message:
            reasoning = message["reasoning_content"]
            copy["reasoning_content"] = _put(pieces, f"the reasoning {of}", reasoning, () if earlier else (reasoning,), remedy)
        if "name" in message and role != "tool":
            copy["name"] = _put(
                pieces, f"the name {of}", message["name"], (message["name"],), "remove the name, or write it into the content"
            )
        if "tool_calls" in message:
            copy["tool_calls"] = [_mark_call(call, f"a tool call {of}", pieces) for call in message["tool_calls"]]
        marked.append(copy)
    return marked


def _without_reasoning(content: str, earlier: bool) -> tuple[str, ...]:
    """The parts of an assistant's content that a template has to print; it may set the tags itself."""
    before, tag, answer = content.rpartition("</think>")
    if not tag:
        return (content,)
    return (answer,) if earlier else (before.strip().removeprefix("<think>"), answer)


_TOOLS_REMEDY = "use a model whose template prints tools, or leave such rows out"


def _mark_tools(tools: list[dict[str, Any]], pieces: list[_Piece]) -> list[dict[str, Any]]:
    """Names and descriptions of functions and of their parameters are marked; what else a schema says, templates may look into."""

    def mark(entry: dict[str, Any], keys: Sequence[str], of: str) -> dict[str, Any]:
        texts = {key: entry[key] for key in keys if isinstance(entry.get(key), str)}
        return {**entry, **{key: _put(pieces, f"the {key} of {of}", text, (text,), _TOOLS_REMEDY) for key, text in texts.items()}}

    marked = []
    for tool in tools:
        function = mark(tool["function"], ("name", "description"), "a tool")
        parameters = function.get("parameters")
        if isinstance(parameters, dict) and isinstance(parameters.get("properties"), dict):
            properties = {
                _put(pieces, "a parameter of a tool", name, (name,), _TOOLS_REMEDY): mark(
                    schema, ("description",), f"a tool's parameter {name!r}"
                )
                if isinstance(schema, dict)
                else schema
                for name, schema in parameters["properties"].items()
            }
            function["parameters"] = {**parameters, "properties": properties}
        marked.append({**tool, "function": function})
    return marked


def _mark_call(call: dict[str, Any], place: str, pieces: list[_Piece]) -> dict[str, Any]:
    def mark(value: Any) -> Any:
        if isinstance(value, str):
            return _put(pieces, place, value, (value,), _TOOLS_REMEDY)
        if isinstance(value, dict):
            return {mark(key): mark(item) for key, item in value.items()}
        return [mark(item) for item in value] if isinstance(value, list) else value

    function = call["function"]
    return {**call, "function": {**function, "name": mark(function["name"]), "arguments": mark(function["arguments"])}}


def _put(pieces: list[_Piece], place: str, text: str, wanted: Sequence[str], remedy: str) -> str:
    """The mark that stands for `text`; text without anything to see stays."""
    if not text.strip():
        return text
    pieces.append(_Piece(place, text, tuple(part.strip() for part in wanted if part.strip()), remedy))
    return _MARK.format(len(pieces) - 1)
