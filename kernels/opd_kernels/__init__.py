"""Vocabulary-parallel statistics of logits, and the losses made of them. Imports torch (and triton) alone."""

from opd_kernels.stats import vocab_parallel_stats

__all__ = ["vocab_parallel_stats"]
