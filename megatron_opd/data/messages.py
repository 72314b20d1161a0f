"""Chat messages and tools of a row in their many spellings, to the one that chat templates read. What is not known is refused.

A message becomes {role, content} and, where the row has them, `tool_calls` and `reasoning_content` (assistant), `tool_call_id` (tool)
and `name`. The roles are system, developer, user, assistant, tool.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_opd.data.prompt_files import load_json
from megatron_opd.errors import UserError

Message = dict[str, Any]

_SPELLINGS = {
    "system": ("system",),
    "developer": ("developer",),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "gpt4", "gpt-4", "model", "bot", "chatbot", "ai", "bard", "bing", "claude"),
    "tool": ("tool", "observation", "function", "function_response", "tool_response", "tool_result", "tool_results", "ipython"),
    "call": ("function_call", "tool_call"),  # the text is the call, as JSON
}
_ROLES = {spelling: role for role, spellings in _SPELLINGS.items() for spelling in spellings}
_REASONING = ("reasoning_content", "reasoning", "thinking")
_TEXT_PARTS = ("text", "input_text", "output_text")
_ABOUT = {"id", "timestamp"}  # say something of a message, and nothing to the model; so do numbers and truth values (weights, loss masks)


def read_messages(entries: Any, field: str, where: str) -> list[Message]:
    """[{role, content, ...}, ...] of a row's messages. Raises UserError naming row, field and message."""
    if isinstance(entries, str):
        entries = load_json(entries, f"{where}: {field!r} must be a list of messages or their JSON text")
    if not isinstance(entries, list):
        raise UserError(f"{where}: {field!r} must be a list of {{role, content}} messages, not {entries!r:.200}")
    return [_message(entry, field, f"{where}: {field}[{number}]", where) for number, entry in enumerate(entries)]


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


def _message(entry: Any, field: str, at: str, where: str) -> Message:
    """One message; `at` says where it stands."""
    whole = entry
    if isinstance(entry, dict):  # null and empty are what Parquet and APIs write for "not there"
        entry = {key: value for key, value in entry.items() if value not in (None, [], {}) and (value != "" or key in ("content", "value"))}
    roles = {name: entry[name] for name in ("role", "from") if name in entry} if isinstance(entry, dict) else {}
    if not roles or not all(isinstance(role, str) for role in roles.values()):
        raise _no_message(whole, field, where)
    for role in roles.values():
        if role.strip().lower() not in _ROLES:
            raise UserError(f"{at} has the role {role!r:.100}, which is not known; known are {', '.join(_ROLES)}")
    known = _same({name: _ROLES[role.strip().lower()] for name, role in roles.items()}, ("role", "from"), at)
    content = _same(entry, ("content", "value"), at)
    text = _text(content, at)
    message: Message = {"role": "assistant" if known == "call" else known, "content": text if text is not None else ""}
    if known == "call":
        if text is None:
            raise _no_message(whole, field, where)
        message |= {"content": "", "tool_calls": _calls(load_json(text, f"{at} (a tool call by its role)"), at)}
        if not message["tool_calls"]:
            raise UserError(f"{at} is a tool call by its role, and holds none: {text!r:.100}")
    rest = {key: value for key, value in entry.items() if key not in ("role", "from", "content", "value")}
    if message["role"] == "assistant":
        if (reasoning := _same(rest, _REASONING, at)) is not None:
            if not isinstance(reasoning, str):
                raise UserError(f"{at}: the reasoning must be text, not {reasoning!r:.200}")
            message["reasoning_content"] = reasoning
        calls = [rest.pop(name) for name in ("tool_calls", "function_call") if name in rest]
        if len(calls) + (known == "call") > 1:
            raise UserError(f"{at} has tool calls in two places; keep one of them")
        if calls and (called := _calls(calls[0], at)):
            message["tool_calls"] = called
        rest = {key: value for key, value in rest.items() if key not in _REASONING}
    if text is None and not message.keys() & {"tool_calls", "reasoning_content"}:
        raise _no_message(whole, field, where)
    for key, value in rest.items():
        if key == "name" or (key == "tool_call_id" and message["role"] == "tool"):
            if not isinstance(value, str):
                raise UserError(f"{at}: {key!r} must be text, not {value!r:.100}")
            message[key] = value
        elif not isinstance(value, int | float) and key not in _ABOUT:
            raise UserError(
                f"{at}: nothing is known of the field {key!r} of a {message['role']} message ({value!r:.100}), and the model would not see it; "
                "remove it, or write it into the content"
            )
    return message


def _no_message(entry: Any, field: str, where: str) -> UserError:
    return UserError(f"{where}: {field!r} must be text or a list of {{role, content}} messages, but holds {entry!r:.200}")


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
