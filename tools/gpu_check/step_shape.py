"""The step whose memory and waits are measured on the GPU and simulated on a CPU: one place for both. No torch here."""

from __future__ import annotations

RECIPE, STAGE, MODEL = "opd_8b", "train", "Qwen3-8B"
LAYERS = 4  # of 36, so that one GPU of 80 GB holds all optimizer state
LENGTHS = [4096, 4096]  # tokens of the sequences of each micro-batch
PROMPT = 256  # tokens of each sequence that are prompt: what the simulation assumes
MICRO_BATCHES = 2
OVERRIDES = [
    "train.parallel.tp=1",
    f"train.micro_batch_tokens={sum(LENGTHS)}",
    f"train.global_batch={len(LENGTHS) * MICRO_BATCHES}",
    "train.recompute=none",
]
SETTINGS = {"recipe": RECIPE, "stage": STAGE, "layers": LAYERS, "lengths": LENGTHS, "micro_batches": MICRO_BATCHES, "overrides": OVERRIDES}
