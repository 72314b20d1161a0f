"""Log-probabilities by the training engine itself, for comparison with those of the serving engine.

Legend: S tokens of a sequence, N response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_opd.convert.to_mcore import load_hf_weights
from megatron_opd.model import parallel
from megatron_opd.model.architecture import read_architecture
from megatron_opd.model.student import build_chunks, transformer_config
from megatron_opd.recipe.layout import ParallelConfig

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
        (student,) = build_chunks(arch, transformer_config(arch, parallel=layout, dtype=getattr(torch, name)))
        student.to(device)
        load_hf_weights(student, arch, model)
        student.eval()
        results = []
        for tokens, start in sequences:
            ids = torch.from_numpy(tokens.astype(np.int64)).to(device)
            bounds = torch.tensor([0, len(tokens)], dtype=torch.int32, device=device)
            packed = PackedSeqParams(
                qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=len(tokens), max_seqlen_kv=len(tokens)
            )
            positions = torch.arange(len(tokens), device=device)[None]
            hidden = student(ids[None], positions, None, packed_seq_params=packed)
            _, logp_N1, _ = student.linear_loss(
                hidden,
                ids[start:, None],
                lambda logp, *_: logp.sum(),
                rows=torch.arange(start - 1, len(tokens) - 1, device=device),
                vocab_size=arch.vocab_size,
                chunk_tokens=_ROWS,
            )
            results.append(logp_N1[:, 0].cpu().numpy())
        return results
    finally:
        parallel.stop()
