"""How turns begin and end: the stop ids and the chat template of a model directory, and what of both belongs to a student after SFT.

Rules (docs/facts.md): a response ends at any id that generation_config.json, config.json or the tokenizer name, at the token with which the
chat template closes an assistant's turn where the prompt was rendered by it, and at those that ended the answers of the SFT store. The
template of the SFT store is the student's.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from megatron_opd.errors import LineageError, UserError
from megatron_opd.hf.lineage import load_tokenizer
from megatron_opd.hf.model_config import read_config
from megatron_opd.recipe.inference import DATE_FORMAT, EncodingConfig
from megatron_opd.records import Lineage, SftFacts
from megatron_opd.safety import untrusted
from megatron_opd.safety.confined import Ended, run_confined
from megatron_opd.store_records import StoreManifest

GENERATION_CONFIG = "generation_config.json"
# The date that Llama 3's template falls back to where there is no clock.
DEFAULT_DATE = "26 Jul 2024"
# SGLang stops at this token whatever the files say, if the tokenizer has it.
_SGLANG_STOPS = "<|eom_id|>"
_CONTENT = "opdprobe"
T = TypeVar("T")
_ended: dict[str, str] = {}  # chat templates that had to be ended, and why: they are not tried again
_NOW_CALL = re.compile(r"strftime_now\s*\(\s*(['\"])(.*?)\1\s*\)")


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object of a model directory, empty where there is no file. Raises UserError."""
    return untrusted.read_object(path) if path.exists() else {}


def own_stop_ids(directory: str | Path, tokenizer: Any = None) -> dict[int, list[str]]:
    """Ids that end a response by the directory's own files, each with the files that name it.

    Files that disagree add up: published models name some of their ids in one file and some in another. Raises UserError.
    """
    folder = Path(directory)
    config = read_config(folder)
    found: dict[int, list[str]] = {}

    def add(source: str, value: Any) -> None:
        for token in value if isinstance(value, list) else [value]:
            if token is None:
                continue
            if type(token) is not int or not 0 <= token < config["vocab_size"]:
                where = folder / source if source.endswith(".json") else f"{folder}, {source}"
                raise UserError(
                    f"{where}: no valid end-of-turn ids: eos_token_id is {value!r:.100}, but whole numbers below {config['vocab_size']} are expected"
                )
            if source not in (sources := found.setdefault(token, [])):
                sources.append(source)

    add(GENERATION_CONFIG, read_object(folder / GENERATION_CONFIG).get("eos_token_id"))
    add("config.json", config.get("eos_token_id"))
    tokenizer = load_tokenizer(folder) if tokenizer is None else tokenizer  # after config.json, whose faults it would report in its own way
    add("the tokenizer", tokenizer.eos_token_id)
    extra = tokenizer.get_added_vocab().get(_SGLANG_STOPS)
    add("the tokenizer", extra)
    return found


@dataclass(frozen=True)
class Turns:
    """How the prompts of a stage are written and its responses end; what a store's manifest keeps of it."""

    encoding: EncodingConfig
    stop_ids: dict[int, list[str]]  # each with who says so
    turn_end: int | None
    chat_templates: dict[str, str]  # empty: prompts are plain text
    prompt_suffix: list[int]
    prompt_probe: list[int]

    def manifest_fields(self) -> dict[str, Any]:
        """Of a StoreManifest."""
        fields = {name: getattr(self, name) for name in ("turn_end", "chat_templates", "prompt_suffix", "prompt_probe")}
        return {**fields, "encoding": self.encoding.recorded(), "stop_ids": list(self.stop_ids)}


def read_turns(
    directory: str | Path,
    tokenizer: Any,
    encoding: EncodingConfig,
    *,
    templated: Sequence[bool],
    sft: SftFacts | None = None,
    stop_token_ids: Sequence[int] = (),
) -> Turns:
    """See `Turns`. `templated`: for each prompt, whether the chat template renders it; `stop_token_ids`: the recipe's. Raises UserError."""
    some = any(templated)
    ends = {token: ["the SFT answers"] for token in (sft.stop_ids if sft is not None else [])}
    end = turn_end(tokenizer) if some else None
    if end is not None:
        ends.setdefault(end, []).append("the chat template")
    for token, sources in own_stop_ids(directory, tokenizer).items():
        ends.setdefault(token, []).extend(sources)
    vocab_size = read_config(directory)["vocab_size"]
    for token in stop_token_ids:
        if token >= vocab_size:
            raise UserError(f"sampling.stop_token_ids has {token}, but {directory} has {vocab_size} tokens; leave it out")
        ends.setdefault(token, []).append("sampling.stop_token_ids")
    encoding = resolve_encoding(tokenizer, encoding, templated=some)
    suffix = generation_prompt(tokenizer, encoding) if templated and all(templated) else []
    probe = _encoded_probe(tokenizer, encoding) if some else []
    return Turns(encoding, ends, end, chat_templates(tokenizer) if some else {}, suffix, probe)


def describe_tokens(tokenizer: Any, tokens: Iterable[int], sources: Mapping[int, Sequence[str]] | None = None) -> str:
    """'151645 <|im_end|> (config.json), ...', the sources only where they are given; 'none' of none."""
    texts = []
    for token in tokens:
        origin = f" ({', '.join(sources[token])})" if sources is not None else ""
        texts.append(f"{token} {tokenizer.convert_ids_to_tokens(token)}{origin}")
    return ", ".join(texts) or "none"


def chat_templates(tokenizer: Any) -> dict[str, str]:
    """The tokenizer's chat templates by name; a single one is 'default'; empty without any."""
    template = tokenizer.chat_template
    if template is None:
        return {}
    return {"default": template} if isinstance(template, str) else dict(template)


def render(
    tokenizer: Any,
    messages: Sequence[Any],
    config: EncodingConfig,
    *,
    tools: list[Any] | None = None,
    add_generation_prompt: bool = True,
    **how: Any,
) -> str:
    """The text of a conversation by the chat template, which is told nothing of today's date. Raises UserError for what it refuses.

    A template is a program, so it runs confined (`confined_texts` for many conversations). `how` goes to the tokenizer's `apply_chat_template`.
    """

    def text(messages: Sequence[Any]) -> str:
        return _render(tokenizer, messages, config, tools=tools, add_generation_prompt=add_generation_prompt, **how)

    return next(confined_texts(tokenizer, text, [messages], lambda _: "a conversation"))


def confined_texts(
    tokenizer: Any, function: Callable[[T], str], items: Sequence[T], name: Callable[[T], str]
) -> Generator[str, None, None]:
    """`function`, which renders by the tokenizer's chat template, of every item, within limits of time and memory. Raises UserError."""
    template = str(tokenizer.chat_template)
    if template in _ended:
        raise UserError(_ended[template])
    try:
        yield from run_confined(function, items, lambda item: f"the chat template of {tokenizer.name_or_path} was ended at {name(item)}")
    except Ended as error:
        _ended[template] = str(error)
        raise


def _render(tokenizer: Any, messages: Sequence[Any], config: EncodingConfig, *, tools: list[Any] | None, **how: Any) -> str:
    if tokenizer.chat_template is None:
        raise UserError(
            f"{tokenizer.name_or_path}: the tokenizer has no chat template; give prompts as text and set encoding.chat_template='never'"
        )
    options: dict[str, Any] = {} if config.enable_thinking is None else {"enable_thinking": config.enable_thinking}
    try:
        text = tokenizer.get_chat_template(None, tools)
        if "strftime_now" in text or "date_string" in text:
            options |= {"chat_template": _with_fixed_clock(text), **_fixed_dates(text, config.date_string or DEFAULT_DATE)}
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options, **how)
    except UserError:
        raise
    except Exception as error:  # a template is a program: it may raise what it likes, divide by zero, recurse
        reason = str(error) or type(error).__name__
        raise UserError(f"the chat template of {tokenizer.name_or_path} refuses it: {reason.strip().partition(chr(10))[0]}") from None


def _with_fixed_clock(template: str) -> str:
    """The template with `strftime_now` looked up in the variable `opd_dates`; its other output stays to the letter."""
    return "{% macro strftime_now(format) %}{{ opd_dates[format] }}{% endmacro +%}" + template


def _fixed_dates(template: str, date: str) -> dict[str, Any]:
    day = datetime.strptime(date, DATE_FORMAT)
    formats = {match[2] for match in _NOW_CALL.finditer(template)}
    return {"date_string": date, "opd_dates": {text: day.strftime(text) for text in formats}}


def resolve_encoding(tokenizer: Any, config: EncodingConfig, *, templated: bool) -> EncodingConfig:
    """`config` with the date that the template will be told, if it prints one. Raises UserError for settings that the template ignores."""
    if not templated:
        return config
    probe = [{"role": "user", "content": _CONTENT}]

    def rendered(**changes: Any) -> str:
        return render(tokenizer, probe, config.model_copy(update=changes))

    where = f"the chat template of {tokenizer.name_or_path}"
    if config.enable_thinking is not None and rendered(enable_thinking=True) == rendered(enable_thinking=False):
        raise UserError(f"encoding.enable_thinking = {str(config.enable_thinking).lower()}, but {where} ignores it; leave it out")
    dated = rendered(date_string="01 Jan 2001") != rendered(date_string="02 Feb 2002")
    if config.date_string is not None and not dated:
        raise UserError(f"encoding.date_string = {config.date_string!r}, but {where} prints no date; leave it out")
    return config.model_copy(update={"date_string": config.date_string or DEFAULT_DATE}) if dated else config


def turn_end(tokenizer: Any) -> int | None:
    """Id of the special token with which the chat template closes an assistant's turn; None where it has none, or closes it by text."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _CONTENT}]
    try:
        text = render(tokenizer, messages, EncodingConfig(), add_generation_prompt=False)
    except UserError:
        return None
    _, found, rest = text.rpartition(_CONTENT)
    rest = rest.lstrip()
    ends = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if found and rest.startswith(str(token))}
    return ends[max(ends, key=len)] if ends else None


def generation_prompt(tokenizer: Any, config: EncodingConfig) -> list[int]:
    """Ids that the template writes behind the last message to ask for an answer; empty where it writes nothing there.

    Without those that merge with the text before them.
    """
    probe = [{"role": "user", "content": _CONTENT}]
    whole = render(tokenizer, probe, config)
    before = render(tokenizer, probe, config, add_generation_prompt=False)
    if not whole.startswith(before):
        return []
    ids, alone = (tokenizer(text, add_special_tokens=False)["input_ids"] if text else [] for text in (whole, whole[len(before) :]))
    same = 0
    while same < min(len(ids), len(alone)) and ids[-1 - same] == alone[-1 - same]:
        same += 1
    return ids[len(ids) - same :]


def _encoded_probe(tokenizer: Any, config: EncodingConfig) -> list[int]:
    """Ids of a fixed conversation; of a question alone, where the template takes no more."""
    for chat in ([("user", "a"), ("assistant", "b"), ("user", "c")], [("user", "a")]):
        with contextlib.suppress(UserError):
            text = render(tokenizer, [{"role": role, "content": content} for role, content in chat], config)
            return tokenizer(text, add_special_tokens=False)["input_ids"]
    return []


def check_prompt_format(sft: SftFacts, written: Turns | StoreManifest, where: str, tokenizer: Any = None) -> str | None:
    """None if prompts are written as those of the SFT store were, else what differs, in a sentence."""
    if written.chat_templates != sft.chat_templates:
        if not sft.chat_templates or not written.chat_templates:
            ours, theirs = ("by a chat template" if found else "as plain text" for found in (written.chat_templates, sft.chat_templates))
            return f"{where}: prompts are written {ours}, those of the SFT answers were written {theirs}"
        return (
            f"{where}: its chat template is not the one that wrote the prompts of the SFT answers (they ended with "
            f"{tokens_as_text(tokenizer, sft.prompt_suffix)}, these end with {tokens_as_text(tokenizer, written.prompt_suffix)})"
        )
    if written.prompt_suffix != sft.prompt_suffix:
        return (
            f"{where}: prompts end with {tokens_as_text(tokenizer, written.prompt_suffix)}, those of the SFT answers ended with "
            f"{tokens_as_text(tokenizer, sft.prompt_suffix)} (encoding.enable_thinking?)"
        )
    if written.prompt_probe != sft.prompt_probe:
        return (
            f"{where}: the chat template is that of the SFT answers but writes {tokens_as_text(tokenizer, written.prompt_probe)} where it wrote "
            f"{tokens_as_text(tokenizer, sft.prompt_probe)} (bos or eos token, encoding.date_string?)"
        )
    return None


def tokens_as_text(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of tokens, quoted; the ids where there is no tokenizer."""
    return repr(tokenizer.decode(tokens)) if tokenizer is not None and tokens else str(list(tokens))


def visible(tokenizer: Any, tokens: Sequence[int], *, most: int = 400) -> str:
    """Token ids as text with special tokens and line ends visible, the middle left out where it is long."""
    text = repr(tokenizer.decode(tokens, skip_special_tokens=False))
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def with_override(lineage: Lineage, problem: str | None, *, allowed: bool, remedy: str) -> Lineage:
    """The lineage, in which an allowed problem is recorded. Raises LineageError for one that is not allowed."""
    if problem is None:
        return lineage
    if not allowed:
        raise LineageError(f"{problem}; {remedy}")
    override = f"prompt format mismatch allowed: {problem}"
    return lineage if override in lineage.overrides else lineage.model_copy(update={"overrides": [*lineage.overrides, override]})
