"""Offline on-policy distillation of large language models on Megatron-Core."""

__version__ = "0.1.0"
