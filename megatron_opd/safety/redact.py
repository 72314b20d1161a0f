"""Secrets of a recipe stay out of what is written, printed and sent to others: values of variables, words behind --api-key, passwords of addresses."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import parse_qsl

from megatron_opd.safety.untrusted import one_line

NOT_KEPT = "(not kept)"  # stands for a value in what is written
_SHORT = 8
_SECRET_PARTS = {
    "accesskey",
    "apikey",
    "auth",
    "bearer",
    "credential",
    "credentials",
    "key",
    "passwd",
    "password",
    "pwd",
    "secret",
    "secretkey",
    "sig",
    "signature",
}
_MODELS = ("teacher", "student")  # sections of engine.launch
_REDACTED = (
    "engine.launch.environment",
    "engine.launch.command",
    *(f"engine.launch.{of}options" for of in ("", "teacher.", "student.")),
    "slurm.environment",
    "slurm.prologue",
)
_SECTIONS = ("engine", "slurm", "engine.launch", *(f"engine.launch.{model}" for model in _MODELS))
# What stands between :// and a host: a user, or a user and a password, which may hold a slash. And what stands behind the path.
# A colon before digits and a slash is of a host's port: what comes then is a path, in which an @ says nothing.
_USER = re.compile(r"(?<=://)(?![^/@:]*:\d+/)((?:[^/@]*:.*|[^/@]*))@", re.DOTALL)
_BEHIND = re.compile(r"[?#].*", re.DOTALL)
_ASSIGNMENT = re.compile(r"(-*[A-Za-z_][\w-]*)=(\"[^\"]*\"|'[^']*'|[^\s;]+)")
_REFERENCE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")


def is_secret_name(name: str) -> bool:
    """Whether an option, variable or field of this name holds a secret.

    A whole word of it says so (--api-key; not --max-total-tokens), "token" as the last (HF_TOKEN; not --speculative-token-map).
    """
    words = re.split(r"[^a-z0-9]+", name.lower())
    return words[-1] == "token" or not _SECRET_PARTS.isdisjoint(words)


def referenced(value: str) -> str | None:
    """NAME if `value` is $NAME or ${NAME}, which stands for the variable of that name."""
    match = _REFERENCE.fullmatch(value)
    return None if match is None else match[1] or match[2]


def redact_variables(variables: dict[str, str]) -> dict[str, str]:
    """Environment variables for a record: their values are not kept, but for empty ones and references."""
    return {name: value if not value or referenced(value) else NOT_KEPT for name, value in variables.items()}


def redact_words(words: list[str]) -> list[str]:
    """Words of a command line for a record, without the values of options and variables whose names say that they are secret."""
    kept = []
    for number, word in enumerate(words):
        name, sign, _ = word.partition("=")
        before = words[number - 1] if number else ""
        if sign and is_secret_name(name):
            word = f"{name}={NOT_KEPT}"
        elif before.startswith("-") and "=" not in before and is_secret_name(before) and not word.startswith("-"):
            word = NOT_KEPT
        kept.append(NOT_KEPT if holds_secret(word) else word)
    return kept


def secret_values(variables: dict[str, str], words: list[str]) -> list[str]:
    """What must not be repeated from a program's output: secret words, and values of variables that are not short or paths."""
    values = [value for name, value in variables.items() if is_secret_name(name) or (len(value) >= _SHORT and "/" not in value)]
    values += [
        word.removeprefix(f"{word.partition('=')[0]}=") for word, kept in zip(words, redact_words(words), strict=True) if word != kept
    ]
    return sorted(filter(None, values), key=len, reverse=True)


def redact_override(override: str) -> str:
    """An override section.field=value for an error."""
    key, sign, value = override.partition("=")
    return f"{key}={NOT_KEPT}" if sign and is_redacted(key, value) else override


def is_redacted(field: str, value: object) -> bool:
    """Whether the value of a recipe's field (section.field) may hold secrets, so that it is not repeated in an error."""
    text = str(value)
    is_address = "://" in text or field.startswith("engine.urls")
    return field in _SECTIONS or field.startswith(_REDACTED) or (is_address and ("@" in text or "?" in text))


def redact_address(text: str) -> str:
    """The address of a server for people: as `public_address`, also where http:// is missing."""
    if "://" not in text and ":" in text.rpartition("@")[0]:
        return text.rpartition("@")[2]
    return public_address(text)


def public_address(address: str) -> str:
    """The address of a store for people and records: without user, password, query and fragment. A path of this machine stays as it is."""
    if "://" not in address:
        return one_line(address)
    return one_line("::".join(_BEHIND.sub("", _USER.sub("", piece)) for piece in address.split("::")))


def holds_secret(address: str) -> bool:
    """Whether an address (scheme://..., or a chain of them with ::) holds a password, or a query that says that it is a key."""
    return any(map(_holds_secret, address.split("::")))


def _holds_secret(address: str) -> bool:
    if "://" not in address:
        return False
    user = _USER.search(address)
    if user and (":" in user[1] or "%3a" in user[1].lower()):
        return True
    query = address.partition("?")[2].partition("#")[0]
    return any(is_secret_name(name) for name, _ in parse_qsl(query, keep_blank_values=True))


def redact(tree: dict[str, Any]) -> dict[str, Any]:
    """A recipe, as a tree, for a record."""
    kept = dict(tree)
    if launch := (tree.get("engine") or {}).get("launch"):
        kept["engine"] = {**tree["engine"], "launch": _redact_launch(launch)}
    if cluster := tree.get("slurm"):
        kept["slurm"] = {
            **cluster,
            "environment": redact_settings(cluster["environment"]),
            "prologue": [redact_line(line) for line in cluster["prologue"]],
        }
    return kept


def _redact_launch(launch: dict[str, Any]) -> dict[str, Any]:
    kept = {
        **launch,
        "environment": redact_variables(launch["environment"]),
        "options": redact_words(launch["options"]),
        "command": redact_words(launch["command"]),
    }
    for model in _MODELS:
        if (launch.get(model) or {}).get("options"):
            kept[model] = {**launch[model], "options": redact_words(launch[model]["options"])}
    return kept


def redact_settings(variables: dict[str, str]) -> dict[str, str]:
    """Environment variables of a job for a record: settings stay, values of those whose names say that they are secret do not."""
    return {
        name: NOT_KEPT if value and referenced(value) is None and (is_secret_name(name) or holds_secret(value)) else value
        for name, value in variables.items()
    }


def redact_line(line: str) -> str:
    """A line of shell for a record: export HF_TOKEN=abc -> export HF_TOKEN=(not kept)."""

    def shown(match: re.Match[str]) -> str:
        secret = is_secret_name(match[1]) and referenced(match[2].strip("\"'")) is None
        return f"{match[1]}={NOT_KEPT}" if secret else match[0]

    return _ASSIGNMENT.sub(shown, line)
