"""Chat messages and tools of a row in their many spellings, to the one that chat templates read. What is not known is refused.

A message becomes {role, content} and, where the row has them, `tool_calls` and `reasoning_content` (assistant), `tool_call_id` (tool)
and `name`. The roles are system, developer, user, assistant, tool.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_opd.errors import UserError
from megatron_opd.safety.untrusted import load_json

Message = dict[str, Any]

_SPELLINGS = {  # in any case; a hyphen or a space is as good as the underscore
    "system": ("system",),
    "developer": ("developer",),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "chat_gpt", "gpt4", "gpt_4", "model", "bot", "chatbot", "ai", "bard", "bing", "claude"),
    "tool": ("tool", "observation", "function", "function_response", "tool_response", "tool_result", "tool_results", "ipython"),
    "call": ("function_call", "tool_call"),  # the text is the call, as JSON
}
_ROLES = {spelling: role for role, spellings in _SPELLINGS.items() for spelling in spellings}
_REASONING = ("reasoning_content", "reasoning", "thinking")
_CALLS = ("tool_calls", "function_call")
_TEXT_PARTS = ("text", "input_text", "output_text")
_ABOUT = {"id", "timestamp"}  # say something of a message, and nothing to the model; so do numbers and truth values (weights, loss masks)


def read_messages(entries: Any, field: str, where: str, *, with_answer: bool = False) -> list[Message]:
    """[{role, content, ...}, ...] of a row's messages; `with_answer`: what the assistant says at their end is left out, unread.

    Raises UserError naming row, field and message.
    """
    if isinstance(entries, str):
        entries = load_json(entries, f"{where}: {field!r} must be a list of messages or their JSON text")
    if not isinstance(entries, list):
        raise UserError(f"{where}: {field!r} must be a list of {{role, content}} messages, not {entries!r:.200}")
    places = [f"{where}: {field}[{number}]" for number in range(len(entries))]
    roles = [_role(entry, at, field, where) for entry, at in zip(entries, places, strict=True)]
    while with_answer and roles and roles[-1] in ("assistant", "call"):
        roles.pop()
    return [_message(entry, role, at) for entry, role, at in zip(entries, roles, places, strict=False)]  # without the answers


def read_tools(row: dict[str, Any], where: str) -> list[dict[str, Any]] | None:
    """The tools of a row as {"type": "function", "function": {name, ...}}; None where it has none. Raises UserError."""
    there = [name for name in ("tools", "functions") if row.get(name) not in (None, "", [])]
    if len(there) > 1:
        raise UserError(f"{where}: has both 'tools' and 'functions'; keep one of them")
    field = there[0] if there else "tools"
    tools = row[field] if there else []
    if isinstance(tools, str):
        tools = load_json(tools, f"{where}: {field!r}") or []
    found = []
    for number, tool in enumerate(tools if isinstance(tools, list) else [tools]):
        if isinstance(tool, str):
            tool = load_json(tool, f"{where}: {field}[{number}]")
        if isinstance(tool, dict) and tool.get("function") is None and isinstance(tool.get("name"), str):
            tool = {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
            raise UserError(f"{where}: {field}[{number}] must be the schema of a function with a name, not {tool!r:.200}")
        found.append(tool)
    return found or None


def texts_of(value: Any) -> Iterator[str]:
    """Every text in plain JSON values, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from texts_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts_of(item)


def _role(entry: Any, at: str, field: str, where: str) -> str:
    """The role of a message, 'call' for one that is a tool call as a whole. Raises UserError."""
    roles = {name: entry[name] for name in ("role", "from") if entry.get(name) is not None} if isinstance(entry, dict) else {}
    if not roles or not all(isinstance(role, str) for role in roles.values()):
        raise UserError(f"{where}: {field!r} must be text or a list of {{role, content}} messages, but holds {entry!r:.200}")
    known = {name: _ROLES.get("_".join(role.lower().replace("-", " ").split())) for name, role in roles.items()}
    for name, role in roles.items():
        if known[name] is None:
            raise UserError(f"{at} has the role {role!r:.100}, which is not known; known are {', '.join(_ROLES)}")
    return _same(known, ("role", "from"), at)


def _message(entry: dict[str, Any], role: str, at: str) -> Message:
    """One message; `at` says where it stands. Null and empty fields are what Parquet and APIs write for "not there". Raises UserError."""
    text = _text(_same({key: value for key, value in entry.items() if value is not None}, ("content", "value"), at), at)
    rest = {
        key: value for key, value in entry.items() if key not in ("role", "from", "content", "value") and value not in (None, "", [], {})
    }
    if role == "call":
        called = _calls(load_json(text or "", f"{at} (a tool call by its role)"), at)
        if not called or rest.keys() & {"tool_calls", "function_call"}:
            raise UserError(f"{at} is a tool call by its role, and holds {'none' if not called else 'others besides'}: {text!r:.100}")
        message: Message = {"role": "assistant", "content": "", "tool_calls": called}
    else:
        message = {"role": role, "content": text or ""}
    if message["role"] == "assistant":
        message |= _of_the_assistant(rest, at)
        rest = {key: value for key, value in rest.items() if key not in (*_REASONING, *_CALLS)}
    if text is None and not message.keys() & {"tool_calls", "reasoning_content"}:
        raise UserError(f"{at} has no text: a message must be {{role, content}}, not {entry!r:.200}")
    for key, value in rest.items():
        if key == "name" or (key == "tool_call_id" and role == "tool"):
            if not isinstance(value, str):
                raise UserError(f"{at}: {key!r} must be text, not {value!r:.100}")
            message[key] = value
        elif not isinstance(value, int | float) and key not in _ABOUT:
            raise UserError(
                f"{at}: nothing is known of the field {key!r} of a {message['role']} message ({value!r:.100}), and the model would not see it; "
                "remove it, or write it into the content"
            )
    return message


def _of_the_assistant(entry: dict[str, Any], at: str) -> Message:
    """Reasoning and tool calls of an assistant's message. Raises UserError."""
    found: Message = {}
    if (reasoning := _same(entry, _REASONING, at)) is not None:
        if not isinstance(reasoning, str):
            raise UserError(f"{at}: the reasoning must be text, not {reasoning!r:.200}")
        found["reasoning_content"] = reasoning
    calls = [called for name in _CALLS if name in entry and (called := _calls(entry[name], at))]
    if len(calls) > 1:
        raise UserError(f"{at} has both 'tool_calls' and 'function_call'; keep one of them")
    return found | ({"tool_calls": calls[0]} if calls else {})


def _same(entry: dict[str, Any], names: tuple[str, ...], at: str) -> Any:
    """The value that is there under one of the names, or under several alike. Raises UserError."""
    there = {name: entry[name] for name in names if name in entry}
    values = list(there.values())
    if any(value != values[0] for value in values):
        raise UserError(f"{at} has different {' and '.join(map(repr, there))}; keep one of them")
    return values[0] if values else None


def _text(content: Any, at: str) -> str | None:
    """Text of a message's content: parts are put together without anything between them. Raises UserError."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UserError(f"{at}: the content must be text or a list of text parts, not {content!r:.200}")
    texts = []
    for part in content:
        part = {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else {"type": repr(part)[:50]}
        kind = part.pop("type", "text")
        part.pop("cache_control", None)
        if kind not in _TEXT_PARTS or part.keys() != {"text"} or not isinstance(part["text"], str):
            what = f"a part of type {kind!r}" if kind not in _TEXT_PARTS else f"a text part with the fields {', '.join(part) or 'none'}"
            raise UserError(f"{at}: the content has {what}; only text is understood, as {{'type': 'text', 'text': ...}}")
        texts.append(part["text"])
    return "".join(texts) if texts else None


def _calls(calls: Any, at: str) -> list[dict[str, Any]]:
    """[{"type": "function", "function": {name, arguments: object}}, ...] of tool calls. Raises UserError."""
    if isinstance(calls, str):
        calls = load_json(calls, f"{at}: tool calls") or []
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        if isinstance(call, str):
            call = load_json(call, f"{at}: tool call")
        call = {key: value for key, value in call.items() if value is not None} if isinstance(call, dict) else {}
        function = call.get("function")
        outer = {key: call[key] for key in ("id",) if isinstance(call.get(key), str)}
        inner = (
            dict(function)
            if isinstance(function, dict)
            else {key: value for key, value in call.items() if key not in ("id", "type", "index")}
        )
        name = inner.pop("name", None)
        arguments = _same(inner, ("arguments", "parameters"), at)
        strange = [key for key in inner if key not in ("arguments", "parameters") and inner[key] is not None]
        if isinstance(function, dict):
            strange += [key for key in call if key not in ("id", "type", "index", "function")]
        if not isinstance(name, str) or not name.strip() or strange:
            raise UserError(f"{at}: a tool call must be {{name, arguments}} or hold it as 'function', not {call!r:.200}")
        if isinstance(arguments, str):
            arguments = load_json(arguments, f"{at}: arguments of {name!r}") if arguments.strip() else {}
        if not isinstance(arguments, dict | None):
            raise UserError(f"{at}: the arguments of {name!r} must be an object, not {arguments!r:.100}")
        found.append({**outer, "type": "function", "function": {"name": name, "arguments": arguments or {}}})
    return found
