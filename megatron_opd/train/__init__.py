"""Training the student: one loop for SFT and distillation on Megatron-Core."""

import megatron_opd.model  # noqa: F401  before megatron.core
