"""Stop ids and chat template of the SFT answers, written into a model directory where every serving engine looks for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_opd.errors import UserError
from megatron_opd.hf.lineage import load_tokenizer
from megatron_opd.hf.turns import GENERATION_CONFIG, chat_templates, own_stop_ids, read_object
from megatron_opd.records import SftFacts
from megatron_opd.safety.durable import write_file, write_json

TOKENIZER_CONFIG = "tokenizer_config.json"
# Names and layout of transformers since 4.50, which SGLang and vLLM read through it.
TEMPLATE_FILE, TEMPLATE_FOLDER = "chat_template.jinja", "additional_chat_templates"
_OLD_TEMPLATE_FILE = "chat_template.json"


def write_turns(directory: Path, sft: SftFacts) -> None:
    """Make the directory's files say how its turns begin and end; files that say so already stay as they are. Raises UserError."""
    _write_stop_ids(directory, sft.stop_ids)
    if sft.chat_templates and chat_templates(load_tokenizer(directory)) != sft.chat_templates:
        _write_templates(directory, sft.chat_templates)
        if chat_templates(load_tokenizer(directory)) != sft.chat_templates:
            raise UserError(f"{directory}: the tokenizer does not take the chat template of the SFT answers from {TEMPLATE_FILE}")


def _write_stop_ids(directory: Path, stop_ids: list[int]) -> None:
    """generation_config.json gets all ids, config.json and the tokenizer, which have room for one, that of most answers."""
    if not stop_ids:
        return
    tokenizer, own = load_tokenizer(directory), own_stop_ids(directory)
    named = {source: [token for token in own if source in own[token]] for source in (GENERATION_CONFIG, "config.json")}
    if not set(stop_ids) <= set(named[GENERATION_CONFIG]):
        _set(directory / GENERATION_CONFIG, eos_token_id=list(dict.fromkeys([*stop_ids, *own])))
    if stop_ids[0] not in named["config.json"]:
        _set(directory / "config.json", eos_token_id=stop_ids[0])
    if tokenizer.eos_token_id != stop_ids[0]:
        token = tokenizer.convert_ids_to_tokens(stop_ids[0])
        _set(directory / TOKENIZER_CONFIG, eos_token=token)
        special = directory / "special_tokens_map.json"  # of transformers 4
        if special.exists():
            _set(special, eos_token=token)


def _write_templates(directory: Path, templates: dict[str, str]) -> None:
    config = read_object(directory / TOKENIZER_CONFIG)
    if config.pop("chat_template", None) is not None:
        write_json(directory / TOKENIZER_CONFIG, config)
    folder = directory / TEMPLATE_FOLDER
    for old in (directory / _OLD_TEMPLATE_FILE, directory / TEMPLATE_FILE, *folder.glob("*.jinja")):
        old.unlink(missing_ok=True)
    for name, text in templates.items():
        path = directory / TEMPLATE_FILE if name == "default" else folder / f"{Path(name).name}.jinja"
        path.parent.mkdir(exist_ok=True)
        write_file(path, text)


def _set(path: Path, **fields: Any) -> None:
    write_json(path, read_object(path) | fields)
