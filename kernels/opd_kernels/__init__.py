"""Vocabulary-parallel statistics of logits, and the LM-head loss made of them. Imports torch (and triton) alone."""

from opd_kernels.linear import ChunkLoss, linear_loss
from opd_kernels.overlap import topk_overlap
from opd_kernels.stats import vocab_parallel_stats

__all__ = ["ChunkLoss", "linear_loss", "topk_overlap", "vocab_parallel_stats"]
