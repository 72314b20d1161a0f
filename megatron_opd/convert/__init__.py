"""Checkpoint conversion: Hugging Face directories to Megatron-Core checkpoints and back, by one table."""

import megatron_opd.model  # noqa: F401  before megatron.core
