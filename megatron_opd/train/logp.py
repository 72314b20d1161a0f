"""Log-probabilities by the training engine itself, for comparison with those of the serving engine.

Legend: S tokens of a sequence, N response tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_opd.config import ParallelConfig
from megatron_opd.convert.to_mcore import load_hf_weights
from megatron_opd.model import parallel
from megatron_opd.model.architecture import read_architecture
from megatron_opd.model.student import build_student, transformer_config

_ROWS = 1024  # logits of so many tokens at once


@torch.no_grad()
def megatron_logp(model: str | Path, sequences: Sequence[tuple[np.ndarray, int]], *, dtype: str = "auto") -> list[np.ndarray]:
    """log p(tokens[t] | tokens[:t]) from `start` on, float32 [N], of each (tokens int32 [S], start), on this process's device.

    The model is built as training builds it (one rank, 'auto': bfloat16 on a GPU, float32 on a CPU). Raises UserError.
    """
    arch = read_architecture(model)
    layout = ParallelConfig()
    device = parallel.start(layout, seed=0)
    try:
        name = dtype if dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
        student = build_student(arch, transformer_config(arch, parallel=layout, dtype=getattr(torch, name)))
        student.to(device)
        load_hf_weights(student, arch, model)
        student.eval()
        weight_VH = student.shared_embedding_or_output_weight() if arch.tied_embeddings else student.output_layer.weight
        assert weight_VH is not None
        results = []
        for tokens, start in sequences:
            ids = torch.from_numpy(tokens.astype(np.int64)).to(device)
            bounds = torch.tensor([0, len(tokens)], dtype=torch.int32, device=device)
            packed = PackedSeqParams(
                qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=len(tokens), max_seqlen_kv=len(tokens)
            )
            positions = torch.arange(len(tokens), device=device)[None]
            hidden_NH = student(ids[None], positions, None, packed_seq_params=packed)[start - 1 : -1, 0]
            pieces = []
            for rows_H, labels in zip(hidden_NH.split(_ROWS), ids[start:].split(_ROWS), strict=True):
                logits_NV = F.linear(rows_H, weight_VH)[:, : arch.vocab_size].float()
                pieces.append(torch.log_softmax(logits_NV, -1).gather(1, labels[:, None])[:, 0])
            results.append(torch.cat(pieces).cpu().numpy())
        return results
    finally:
        parallel.stop()
