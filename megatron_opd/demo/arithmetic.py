"""The demo's task: add two numbers of a fixed number of digits, column by column, in a character-level language.

    prompt    4791+2836:
    response  1+6+0=07,9+3+0=12,7+8+1=16,4+2+1=07,=07627

Each column is `digit+digit+carry=sum`, units first; the answer stands after the last "=", with one digit more than the
numbers. One wrong character spoils the answer, so the accuracy at temperature 1 is a sharp measure of a small model.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from pathlib import Path
from typing import Any

from megatron_opd.convert.staging import whole_directory
from megatron_opd.cost import write_jsonl
from megatron_opd.durable import write_file
from megatron_opd.errors import UserError
from megatron_opd.hf_config import spell_for_all
from megatron_opd.untrusted import read_object

DIGITS = 4
PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
VOCABULARY = (PAD, EOS, UNKNOWN, *"0123456789", *"abcdefghijklmnopqrstuvwxyz", *"+-*/=<>()[]{},.:;!?#'\"_ \n")  # 64 tokens
# Every prompt belongs to one split, by its hash: per cent of all prompts. Whatever the seeds, splits never share a prompt.
SPLITS = {"sft": range(20), "rollout": range(20, 60), "eval": range(60, 80), "teacher": range(80, 100)}
_PROMPT = re.compile(r"(\d+)\+(\d+):")


def worked_solution(prompt: str) -> str:
    """The response that the task wants for a prompt such as '4791+2836:'. Raises ValueError."""
    match = _PROMPT.fullmatch(prompt)
    if match is None or len(match[1]) != len(match[2]):
        raise ValueError(f"{prompt!r} is not two numbers of one length as '4791+2836:'")
    carry, columns, digits = 0, [], []
    for left, right in zip(reversed(match[1]), reversed(match[2]), strict=True):
        total = int(left) + int(right) + carry
        columns.append(f"{left}+{right}+{carry}={total:02d}")
        carry = total // 10
        digits.append(str(total % 10))
    return ",".join([*columns, "=" + str(carry) + "".join(reversed(digits))])


def split_of(prompt: str) -> str:
    """Name of the split that a prompt belongs to."""
    percent = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") % 100
    return next(name for name, percents in SPLITS.items() if percent in percents)


def draw_prompt(rng: random.Random, split: str, digits: int = DIGITS) -> str:
    """A prompt drawn uniformly from a split."""
    while True:
        prompt = "".join(rng.choices("0123456789", k=digits)) + "+" + "".join(rng.choices("0123456789", k=digits)) + ":"
        if split_of(prompt) == split:
            return prompt


def write_prompts(path: str | Path, *, split: str, count: int, seed: int, digits: int = DIGITS) -> None:
    """Write `count` different prompts of a split as JSONL rows {"prompt", "answer"}; the same arguments give the same bytes. Raises UserError."""
    if split not in SPLITS:
        raise UserError(f"no split {split!r}; choose one of {', '.join(SPLITS)}")
    available = 100**digits * len(SPLITS[split]) // 100
    if digits < 1 or count < 1 or count > available // 2:
        raise UserError(
            f"{count} different prompts of {digits} digits from split {split!r}: 1 to {available // 2} are possible; take more digits or fewer prompts"
        )
    rng = random.Random(f"{split} {seed}")
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        prompts[draw_prompt(rng, split, digits)] = None
    write_jsonl(Path(path), [{"prompt": prompt, "answer": worked_solution(prompt).rpartition("=")[2]} for prompt in prompts])


def build_tokenizer(directory: str | Path | None = None) -> Any:
    """The task's tokenizer, a token a character, as a transformers fast tokenizer; saved as Hugging Face files if `directory` is given."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({token: number for number, token in enumerate(VOCABULARY)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
    if directory is not None:
        fast.save_pretrained(str(directory))
    return fast


def make_model_dir(
    directory: str | Path,
    *,
    hidden_size: int,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    ffn: int,
    seed: int,
    rope_theta: float = 30.0,
    initializer_range: float = 0.1,
) -> None:
    """Write a Qwen3 model with random fp32 weights as a Hugging Face directory; the directory appears whole. Raises UserError if it exists.

    The defaults are for narrow models and short texts: Qwen's own 1e6 and 0.02 need several times as many steps here.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    directory = Path(directory)
    if directory.exists():
        raise UserError(f"{directory}: exists already; choose another directory or remove it")
    config = Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=ffn,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        tie_word_embeddings=False,
        initializer_range=initializer_range,
        bos_token_id=None,
        eos_token_id=VOCABULARY.index(EOS),
        pad_token_id=VOCABULARY.index(PAD),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    save_model_dir(model, directory)


def save_model_dir(model: Any, directory: str | Path) -> None:
    """Save a transformers model with the task's tokenizer; the directory appears whole. Raises UserError if it holds something."""
    with whole_directory(Path(directory)) as staging:
        model.save_pretrained(str(staging))
        # transformers 5 writes the RoPE base in `rope_parameters` alone, where version 4 (in many serving containers) doesn't look.
        path = staging / "config.json"
        write_file(path, json.dumps(spell_for_all(read_object(path), str(path)), indent=2, sort_keys=True) + "\n")
        (staging / "model.safetensors").chmod(path.stat().st_mode)  # safetensors writes for the owner alone
        build_tokenizer(staging)
