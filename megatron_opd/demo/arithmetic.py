"""The demo's task: add two numbers of a fixed number of digits, column by column, in a character-level language.

    prompt    4791+2836:
    response  1+6+0=07,9+3+0=12,7+8+1=16,4+2+1=07,=07627

Each column is `digit+digit+carry=sum`, units first; the answer stands after the last "=", with one digit more than the
numbers. One wrong character spoils the answer, so the accuracy at temperature 1 is a sharp measure of a small model.
"""

from __future__ import annotations

import hashlib
import random
import re
from pathlib import Path

from megatron_opd.cost.meter import write_jsonl
from megatron_opd.demo.language import EOS, PAD, UNKNOWN, Language
from megatron_opd.errors import UserError

DIGITS = 4
LANGUAGE = Language((PAD, EOS, UNKNOWN, *"0123456789", *"abcdefghijklmnopqrstuvwxyz", *"+-*/=<>()[]{},.:;!?#'\"_ \n"))  # 64 tokens
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
