"""Reading and writing Megatron-Core checkpoints (torch_dist) a few tensors at a time, without a model and without process groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load as load_dcp
from torch.distributed.checkpoint.state_dict_saver import save as save_dcp

from megatron_opd.convert.mapping import Entry, Index, table
from megatron_opd.convert.pickles import read_metadata
from megatron_opd.convert.staging import not_written
from megatron_opd.errors import CheckpointError, DamagedCheckpoint
from megatron_opd.model.architecture import Architecture

Piece = tuple[Entry, Index]


def pieces_by_layer(arch: Architecture) -> list[list[Piece]]:
    """All tensors of a model in groups that are read together: each layer, and what comes before and after the layers."""
    groups: list[list[Piece]] = [[] for _ in range(arch.num_layers + 2)]
    for entry in table(arch):
        for index in entry.indices(arch):
            first = entry.mcore.startswith("embedding.")
            groups[index[0] + 1 if index else 0 if first else -1].append((entry, index))
    return groups


class McoreTensors:
    """Global tensors of a checkpoint, whatever layout saved it. Raises CheckpointError if it is not a whole one of this architecture."""

    def __init__(self, checkpoint: Path, arch: Architecture):
        self._reader = FileSystemReader(checkpoint)
        metadata = read_metadata(checkpoint).state_dict_metadata
        self.stored = {key: entry for key, entry in metadata.items() if isinstance(entry, TensorStorageMetadata)}
        missing = [entry.mcore for entry in table(arch) if entry.mcore not in self.stored]
        if missing:
            raise CheckpointError(
                f"{checkpoint}: the checkpoint has no {', '.join(missing)}; it was made for another architecture than {arch.name}"
            )
        for entry in table(arch):
            size, wanted = tuple(self.stored[entry.mcore].size), (*entry.stacked(arch), *entry.shape)
            if size != wanted and not (entry.shape[0] == arch.vocab_size and size[1:] == wanted[1:] and size[0] > wanted[0]):
                raise CheckpointError(f"{checkpoint}: {entry.mcore} has shape {size}; config.json asks for {wanted}")
        self.dtype = self.stored[table(arch)[0].mcore].properties.dtype

    def read(self, pieces: Sequence[Piece]) -> list[torch.Tensor]:
        """The global tensors of `pieces`, in their order, with the padding of a vocabulary."""
        wanted: dict[str, dict[Index, torch.Tensor]] = {}
        for entry, index in pieces:
            record = self.stored[entry.mcore]
            inner = record.size[len(index) :]
            tensor = torch.empty(*[1] * len(index), *inner, dtype=record.properties.dtype)
            wanted.setdefault(entry.mcore, {})[(*index, *[0] * len(inner))] = tensor
        try:
            load_dcp({}, storage_reader=self._reader, planner=_PieceLoader(wanted), no_dist=True)
        except CheckpointException as error:
            cause = _cause(error)
            raise DamagedCheckpoint(f"{self._reader.path}: it can't be read ({str(cause) or type(cause).__name__})") from error
        inner_zeros = {entry.mcore: (0,) * len(entry.shape) for entry, _ in pieces}
        return [wanted[entry.mcore][(*index, *inner_zeros[entry.mcore])][(0,) * len(index)] for entry, index in pieces]


def _cause(error: CheckpointException) -> BaseException:
    """The first rank's error: the exception itself prints tracebacks."""
    return next(iter(error.failures.values()))[0]


class _PieceLoader(DefaultLoadPlanner):
    """Loads chosen pieces of stacked tensors: key -> first element -> tensor to fill."""

    def __init__(self, wanted: dict[str, dict[Index, torch.Tensor]]):
        super().__init__()
        self.wanted = wanted

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items: list[ReadItem] = []
        for key, tensors in self.wanted.items():
            record = self.metadata.state_dict_metadata[key]
            assert isinstance(record, TensorStorageMetadata)
            chunks = [ChunkStorageMetadata(torch.Size(first), tensor.size()) for first, tensor in tensors.items()]
            items += create_read_items_for_chunk_list(key, record, chunks)
        return LoadPlan(items)

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        assert read_item.dest_index.offset is not None
        tensor = self.wanted[read_item.dest_index.fqn][tuple(read_item.dest_index.offset)]
        return tensor[tuple(slice(start, start + size) for start, size in zip(read_item.dest_offsets, read_item.lengths, strict=True))]

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """The tensor is a view of its target."""


def write_mcore_checkpoint(folder: Path, arch: Architecture, dtype: torch.dtype, make: Callable[[Entry, Index], torch.Tensor]) -> None:
    """Write a model as Megatron-Core's torch_dist format; `make` is asked for one global tensor after another, each held alone.

    Vocabularies are padded with zero rows as one rank pads them; Megatron-Core pads or cuts them further when it loads.
    """
    try:
        save_dcp({}, storage_writer=FileSystemWriter(folder), planner=_PieceSaver(arch, dtype, make), no_dist=True)
        torch.save({"content_metadata": {"singleton_local_shards": False}}, folder / COMMON_STATE_FNAME)
        save_config(CheckpointingConfig("torch_dist"), str(folder))
    except CheckpointException as error:  # wrapped for many ranks
        cause = _cause(error)
        raise not_written(folder, cause) if isinstance(cause, OSError | RuntimeError) else cause from error
    except (OSError, RuntimeError) as error:  # a full disk; torch.save has no class of its own for it
        raise not_written(folder, error) from error


class _PieceSaver(DefaultSavePlanner):
    """Plans every tensor of a model from its architecture alone, and makes each when its turn to be written comes."""

    def __init__(self, arch: Architecture, dtype: torch.dtype, make: Callable[[Entry, Index], torch.Tensor]):
        super().__init__(flatten_state_dict=False)
        self.arch, self.dtype, self.make = arch, dtype, make
        self.pieces: dict[tuple[str, tuple[int, ...]], Piece] = {}

    def create_local_plan(self) -> SavePlan:
        items = []
        for entry, index in (piece for group in pieces_by_layer(self.arch) for piece in group):
            shape = self._padded(entry)
            offsets, sizes = torch.Size((*index, *[0] * len(shape))), torch.Size((*[1] * len(index), *shape))
            whole = torch.Size((*entry.stacked(self.arch), *shape))
            self.pieces[entry.mcore, tuple(offsets)] = (entry, index)
            data = TensorWriteData(ChunkStorageMetadata(offsets, sizes), TensorProperties(dtype=self.dtype), whole)
            items.append(WriteItem(MetadataIndex(entry.mcore, offsets), WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        assert write_item.index.offset is not None
        entry, index = self.pieces[write_item.index.fqn, tuple(write_item.index.offset)]
        tensor = self.make(entry, index)
        rows = self._padded(entry)[0] - len(tensor)
        if rows:
            tensor = torch.cat([tensor, tensor.new_zeros(rows, *tensor.shape[1:])])
        return tensor.to(self.dtype)[(None,) * len(index)].contiguous()

    def _padded(self, entry: Entry) -> tuple[int, ...]:
        rows = self.arch.padded_vocab(1) if entry.mcore in ("embedding.word_embeddings.weight", "output_layer.weight") else entry.shape[0]
        return (rows, *entry.shape[1:])
