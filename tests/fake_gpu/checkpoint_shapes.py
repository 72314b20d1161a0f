"""Checkpoints of tensors that only have shapes: everything of a save and a load but the files, which would hold numbers."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Shelf:
    """The last checkpoint, without its tensors: what is no tensor, how the optimizer's state is laid out, and the tensors' names and shapes."""

    def __init__(self) -> None:
        self.common: Any = None
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, tuple[int, ...]] = {}  # global shapes by key, of this rank's
        self.bytes = 0  # of this rank's part, every replica counted
        self.folder = Path()

    def save(self, state: Any, folder: str, *, content_metadata: dict[str, Any], **options: Any) -> Any:
        """In the place of dist_checkpointing.save: keeps what it is given, and ends the save before files."""
        from megatron.core.dist_checkpointing.mapping import ShardedTensor
        from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
        from torch.utils._pytree import tree_leaves

        sharded, self.common = save_preprocess(state, False)
        tensors = [leaf for leaf in tree_leaves(sharded) if isinstance(leaf, ShardedTensor)]
        assert tensors, "a checkpoint without a tensor"
        self.tensors = {tensor.key: tuple(tensor.global_shape) for tensor in tensors}
        self.bytes = sum(tensor.data.numel() * tensor.data.element_size() for tensor in tensors if tensor.data is not None)
        self.metadata, self.folder = dict(content_metadata), Path(folder)
        (self.folder / "shapes.json").write_text(json.dumps(self.tensors))
        raise Shelved

    def load(self, state: Any, folder: str, **options: Any) -> tuple[Any, set[str], set[str]]:
        """In the place of dist_checkpointing.load: new tensors of the shapes that are asked for, which must be in the checkpoint."""
        import torch
        from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, merge
        from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factory_merges
        from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
        from megatron.core.dist_checkpointing.utils import extract_sharded_base

        def content(leaf: Any) -> Any:
            if isinstance(leaf, ShardedTensor):
                assert self.tensors.get(leaf.key) == tuple(leaf.global_shape), f"{leaf.key} {leaf.global_shape} is not in the checkpoint"
                return torch.empty(leaf.local_shape, dtype=leaf.dtype, device="cpu" if leaf.data is None else leaf.data.device)
            return leaf.data if isinstance(leaf, ShardedObject) else leaf

        sharded, rest, factories = load_preprocess(state)
        loaded, _ = extract_sharded_base(sharded)
        dict_list_map_inplace(content, loaded)
        common = _copied(self.common)
        merge(common, rest)
        merge(common, loaded)
        return apply_factory_merges(common, factories), set(), set()


class Shelved(BaseException):
    """A save came to its files."""


def _copied(tree: Any) -> Any:
    """Containers are new, leaves the same."""
    if isinstance(tree, dict):
        return {key: _copied(value) for key, value in tree.items()}
    return [_copied(value) for value in tree] if isinstance(tree, list) else tree


@contextlib.contextmanager
def shelf() -> Iterator[Shelf]:
    """Saves and loads go here."""
    from megatron.core import dist_checkpointing

    from megatron_opd.simulate.gpu import replaced

    place = Shelf()
    with (
        replaced(dist_checkpointing, "save", place.save),
        replaced(dist_checkpointing, "load", place.load),
        replaced(dist_checkpointing, "load_content_metadata", lambda folder: dict(place.metadata)),
    ):
        yield place


def save(trainee: Any, folder: Path) -> None:
    """A save of train/checkpoint.py up to its files."""
    from megatron_opd.records import Lineage
    from megatron_opd.train.checkpoint import CheckpointWriter

    with contextlib.suppress(Shelved):
        CheckpointWriter(folder, "", Lineage(), asynchronous=False).save(trainee, {"step": 1})
