#!/usr/bin/env python3
"""Makes the teacher of a demo's task: python tools/make_demo_teacher.py OUTPUT_DIR [--task arithmetic] [--swapped 0] [--seed 0]

Plain PyTorch on a CPU, some minutes. Two phases: right solutions; then solutions with slips, where the loss leaves out the
slips themselves but not what follows, so that the teacher goes on consistently after a mistake (a student makes them, and a teacher
that has seen none would punish everything after one). The weights in megatron_opd/demo/teacher were made by this command, and those in
megatron_opd/demo/programs_teacher with --task programs. The study's second teacher, megatron_opd/demo/swapped_teacher, was made with
--swapped 0.75 --seed 1 --steps 1400 800: it is as good, and writes the two digits of three columns in four in the other order.
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from megatron_opd.demo import arithmetic, programs
from megatron_opd.demo.language import Language

SLIP_RATE = 0.03  # of the digits (of programs: the tokens), in the second phase
Example = Callable[[random.Random, float], tuple[list[int], list[float]]]


@dataclass(frozen=True)
class Task:
    """examples: from a tokenizer and the share of swapped columns, what draws token ids and loss weights.

    problems: draws a prompt of the split 'eval' and its solution. answer: what of a response and of the solution must be the same.
    batches: sequences a step, by phase.
    """

    language: Language
    sizes: dict[str, Any]
    steps: tuple[int, int]
    batches: tuple[int, int]
    examples: Callable[[Any, float], Example]
    problems: Callable[[random.Random], tuple[str, str]]
    answer: Callable[[str], str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--task", choices=TASKS, default="arithmetic")
    parser.add_argument("--swapped", type=float, default=0.0, help="arithmetic: share of columns with the right number's digit first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, nargs=2, help="steps of the two phases")
    args = parser.parse_args()
    task = TASKS[args.task]
    steps = args.steps or task.steps
    rng = random.Random(args.seed)
    tokenizer = task.language.build_tokenizer()
    model = new_model(task, args.seed)
    draw = task.examples(tokenizer, args.swapped)
    started = time.time()
    train(model, draw, rng, steps=steps[0], lr=2e-3, slip_rate=0.0, batch=task.batches[0], pad=tokenizer.pad_token_id)
    train(model, draw, rng, steps=steps[1], lr=5e-4, slip_rate=SLIP_RATE, batch=task.batches[1], pad=tokenizer.pad_token_id)
    torch.manual_seed(args.seed)
    right = accuracy(model.eval(), tokenizer, task, random.Random(args.seed + 1), count=1000)
    task.language.save_model_dir(model.to(torch.bfloat16), args.output)
    print(f"{right:.1%} of 1000 answers at temperature 1 are right; {time.time() - started:.0f} s; wrote {args.output}")


def new_model(task: Task, seed: int) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        task.language.make_model_dir(Path(folder) / "model", **task.sizes, seed=seed)
        return AutoModelForCausalLM.from_pretrained(str(Path(folder) / "model"))


def train(model: Any, draw: Example, rng: random.Random, *, steps: int, lr: float, slip_rate: float, batch: int, pad: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(steps):
        rows = [draw(rng, slip_rate) for _ in range(batch)]
        longest = max(len(ids) for ids, _ in rows)  # padding behind the text is seen by none of it
        ids_BT = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows])
        weights_BT = torch.tensor([weights + [0.0] * (longest - len(weights)) for _, weights in rows])
        logp_BTV = torch.log_softmax(model(input_ids=ids_BT, use_cache=False).logits[:, :-1], -1)
        logp_BT = logp_BTV.gather(2, ids_BT[:, 1:, None])[..., 0]
        loss = -(logp_BT * weights_BT[:, 1:]).sum() / weights_BT.sum()
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step + 1 == steps:
            print(f"slips {slip_rate:.0%}  step {step + 1}/{steps}  loss {loss.item():.5f}", flush=True)


def arithmetic_examples(tokenizer: Any, swapped: float) -> Example:
    def draw(rng: random.Random, slip_rate: float) -> tuple[list[int], list[float]]:
        """Token ids of a prompt and a solution with slips, and weights: 0 for the prompt and for each slip."""
        prompt = arithmetic.draw_prompt(rng, "teacher")
        text, weights = solution_with_slips(prompt, rng, slip_rate, swapped)
        ids = tokenizer(prompt + text)["input_ids"] + [tokenizer.eos_token_id]
        return ids, [0.0] * len(prompt) + weights + [1.0]

    return draw


def program_examples(tokenizer: Any, swapped: float) -> Example:
    if swapped:
        raise ValueError("--swapped is for the task arithmetic")

    def draw(rng: random.Random, slip_rate: float) -> tuple[list[int], list[float]]:
        """The same, of a random layout; a slip is any token, and what is right behind it does not change."""
        prompt, wanted = draw_program(rng, "teacher")
        ids = tokenizer(wanted)["input_ids"]
        slips = [rng.random() < slip_rate for _ in ids]
        written = [rng.randrange(3, len(tokenizer)) if slip else token for slip, token in zip(slips, ids, strict=True)]
        before = tokenizer(prompt)["input_ids"]
        weights = [float(token == right) for token, right in zip(written, ids, strict=True)]
        return before + written + [tokenizer.eos_token_id], [0.0] * len(before) + weights + [1.0]

    return draw


def draw_program(rng: random.Random, split: str) -> tuple[str, str]:
    """Prompt and solution of a task of a random layout."""
    layout = rng.choice(programs.LAYOUTS)
    task = programs.draw_task(rng, split, layout)
    return programs.prompt_of(programs.make_row(task, layout, 0, rng)), programs.solution(task, layout)


def draw_addition(rng: random.Random) -> tuple[str, str]:
    prompt = arithmetic.draw_prompt(rng, "eval")
    return prompt, arithmetic.worked_solution(prompt)


def solution_with_slips(prompt: str, rng: random.Random, slip_rate: float, swapped: float = 0.0) -> tuple[str, list[float]]:
    """The worked solution, each digit wrong with probability `slip_rate`, and what follows consistent with what was written.

    A column is written with its operands swapped with probability `swapped`.
    """
    left, right = prompt.rstrip(":").split("+")
    written: list[str] = []
    weights: list[float] = []

    def write(text: str) -> str:
        for character in text:
            slips = character.isdigit() and rng.random() < slip_rate
            written.append(rng.choice([digit for digit in "0123456789" if digit != character]) if slips else character)
            weights.append(0.0 if slips else 1.0)
        return "".join(written[-len(text) :])

    carry, digits = "0", ""
    for a, b in zip(reversed(left), reversed(right), strict=True):
        if swapped and rng.random() < swapped:
            a, b = b, a
        x, _, y, _, z, _ = write(a + "+" + b + "+" + carry + "=")
        carry, digit = write(f"{int(x) + int(y) + int(z):02d}")
        write(",")
        digits = digit + digits
    write("=" + carry + digits)
    return "".join(written), weights


@torch.inference_mode()
def accuracy(model: Any, tokenizer: Any, task: Task, rng: random.Random, *, count: int) -> float:
    """Share of answers at temperature 1 that are right, of prompts of the 'eval' split."""
    problems = [task.problems(rng) for _ in range(count)]
    right = 0
    for length in sorted({len(tokenizer(prompt)["input_ids"]) for prompt, _ in problems}):  # one length at a time: no padding
        chosen = [(prompt, wanted) for prompt, wanted in problems if len(tokenizer(prompt)["input_ids"]) == length]
        ids = torch.tensor([tokenizer(prompt)["input_ids"] for prompt, _ in chosen])
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            max_new_tokens=task.language.longest - length,
        )
        texts = tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
        right += sum(task.answer(text) == task.answer(wanted) for text, (_, wanted) in zip(texts, chosen, strict=True))
    return right / count


TASKS = {
    "arithmetic": Task(
        arithmetic.LANGUAGE,
        {"hidden_size": 128, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 32, "ffn": 384, "initializer_range": 0.08},
        steps=(800, 450),
        batches=(16, 24),
        examples=arithmetic_examples,
        problems=draw_addition,
        answer=lambda text: text.rpartition("=")[2],
    ),
    "programs": Task(
        programs.LANGUAGE,
        {"hidden_size": 96, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 24, "ffn": 256, "initializer_range": 0.08} | programs.ROPE,
        steps=(1500, 250),
        batches=(8, 8),
        examples=program_examples,
        problems=lambda rng: draw_program(rng, "eval"),
        answer=str,
    ),
}

if __name__ == "__main__":
    main()
