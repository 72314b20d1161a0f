#!/usr/bin/env python3
"""Makes the arithmetic demo's teacher: python tools/make_demo_teacher.py OUTPUT_DIR [--seed 0]

Plain PyTorch on a CPU, some minutes. Two phases: right solutions; then solutions with slips, where the loss leaves out the
slips themselves but not what follows, so that the teacher goes on consistently after a mistake (a student makes them, and a teacher
that has seen none would punish everything after one). The weights in megatron_opd/demo/teacher were made by this command.
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from megatron_opd.demo import arithmetic

SIZES: dict[str, Any] = {"hidden_size": 128, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 32, "ffn": 384, "initializer_range": 0.08}
SLIP_RATE = 0.03  # of the digits, in the second phase


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, nargs=2, default=(800, 450), help="steps of the two phases")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    tokenizer = arithmetic.build_tokenizer()
    model = new_model(args.seed)
    started = time.time()
    train(model, tokenizer, rng, steps=args.steps[0], lr=2e-3, slip_rate=0.0, batch=16)
    train(model, tokenizer, rng, steps=args.steps[1], lr=5e-4, slip_rate=SLIP_RATE, batch=24)
    torch.manual_seed(args.seed)
    right = accuracy(model.eval(), tokenizer, random.Random(args.seed + 1), count=1000)
    arithmetic.save_model_dir(model.to(torch.bfloat16), args.output)
    print(f"{right:.1%} of 1000 answers at temperature 1 are right; {time.time() - started:.0f} s; wrote {args.output}")


def new_model(seed: int) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        arithmetic.make_model_dir(Path(folder) / "model", **SIZES, seed=seed)
        return AutoModelForCausalLM.from_pretrained(str(Path(folder) / "model"))


def train(model: Any, tokenizer: Any, rng: random.Random, *, steps: int, lr: float, slip_rate: float, batch: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(steps):
        rows = [example(tokenizer, rng, slip_rate) for _ in range(batch)]  # prompts and solutions of one length: no padding
        ids_BT = torch.tensor([ids for ids, _ in rows])
        weights_BT = torch.tensor([weights for _, weights in rows])
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


def example(tokenizer: Any, rng: random.Random, slip_rate: float) -> tuple[list[int], list[float]]:
    """Token ids of a prompt and a solution with slips, and weights: 0 for the prompt and for each slip."""
    prompt = arithmetic.draw_prompt(rng, "teacher")
    text, weights = solution_with_slips(prompt, rng, slip_rate)
    ids = tokenizer(prompt + text)["input_ids"] + [arithmetic.VOCABULARY.index(arithmetic.EOS)]
    return ids, [0.0] * len(prompt) + weights + [1.0]


def solution_with_slips(prompt: str, rng: random.Random, slip_rate: float) -> tuple[str, list[float]]:
    """The worked solution, each digit wrong with probability `slip_rate`, and what follows consistent with what was written."""
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
        x, _, y, _, z, _ = write(a + "+" + b + "+" + carry + "=")
        carry, digit = write(f"{int(x) + int(y) + int(z):02d}")
        write(",")
        digits = digit + digits
    write("=" + carry + digits)
    return "".join(written), weights


@torch.inference_mode()
def accuracy(model: Any, tokenizer: Any, rng: random.Random, *, count: int) -> float:
    """Share of right answers at temperature 1 to prompts of the 'eval' split."""
    prompts = [arithmetic.draw_prompt(rng, "eval") for _ in range(count)]
    ids = torch.tensor([tokenizer(prompt)["input_ids"] for prompt in prompts])
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, max_new_tokens=64)
    texts = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    return sum(text == arithmetic.worked_solution(prompt) for text, prompt in zip(texts, prompts, strict=True)) / count


if __name__ == "__main__":
    main()
