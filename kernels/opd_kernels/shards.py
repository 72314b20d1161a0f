"""What a rank knows of its vocabulary shard, and the small per-row tensors that pass between a backend and the collectives.

Legend: N rows (tokens), V columns of this rank's shard, K ids a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Shard:
    """Columns `start` to `start + num_real` of a vocabulary of `vocab_size`; what the shard has beyond them is padding."""

    start: int
    num_real: int
    vocab_size: int
    temperature: float
    with_entropy: bool

    def dtype(self, logits: torch.Tensor) -> torch.dtype:
        """Working precision."""
        return torch.float64 if logits.dtype == torch.float64 else torch.float32

    def local_ids(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Column of each id (0 where it is another rank's) and whether it is here, both [N,K]."""
        local_NK = ids - self.start
        own_NK = (ids >= 0) & (local_NK >= 0) & (local_NK < self.num_real)
        return local_NK.where(own_NK, 0), own_NK


@dataclass(frozen=True)
class LocalStats:
    """Of this rank's columns z/T: max, sum of exp(z - max), sum of exp(z - max)(z - max), and z at the ids that are here (0 else).

    The last three lie in one buffer [2+K,N], which is what the ranks add up.
    """

    max_N: torch.Tensor
    packed: torch.Tensor

    @classmethod
    def empty(cls, n: int, k: int, *, dtype: torch.dtype, device: torch.device) -> LocalStats:
        return cls(torch.empty(n, dtype=dtype, device=device), torch.empty(2 + k, n, dtype=dtype, device=device))

    @property
    def sum_N(self) -> torch.Tensor:
        return self.packed[0]

    @property
    def weighted_N(self) -> torch.Tensor:
        return self.packed[1]

    @property
    def z_ids_NK(self) -> torch.Tensor:
        return self.packed[2:].t()

    def reduce_(self, tp_group: dist.ProcessGroup | None) -> None:
        """Make these the statistics of all columns: one MAX and one SUM over `tp_group`."""
        if tp_group is None or dist.get_world_size(tp_group) == 1:
            return
        own_max_N = self.max_N.clone()
        dist.all_reduce(self.max_N, op=dist.ReduceOp.MAX, group=tp_group)
        # A shard of padding alone has max -inf and sums of 0; keep its 0 * inf out.
        shift_N = (own_max_N - self.max_N).where(own_max_N > -torch.inf, 0.0)
        self.packed[1] += self.packed[0] * shift_N
        self.packed[:2] *= shift_N.exp()
        dist.all_reduce(self.packed, group=tp_group)


@dataclass(frozen=True)
class RowGradients:
    """What the gradient of a row of logits is made of; the same on every rank. g_logp is 0 where an id or a row is ignored."""

    lse_N: torch.Tensor
    entropy_N: torch.Tensor
    z_ids_NK: torch.Tensor
    g_logp_NK: torch.Tensor
    g_entropy_N: torch.Tensor
