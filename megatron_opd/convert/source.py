"""A Hugging Face directory as the source of weights: are they just those that its config.json asks for? Needs no Megatron."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from megatron_opd.convert.hf_files import DTYPE_NAMES, HfTensors
from megatron_opd.convert.mapping import Entry, Index, table
from megatron_opd.errors import UserError
from megatron_opd.hf.lineage import HEAD, StoredTensor, check_head, tensor_index
from megatron_opd.hf.model_config import refuse_quantised
from megatron_opd.model.architecture import Architecture

_NOT_TRAINED = "rotary_emb.inv_freq"  # old Llama directories hold these; every engine computes them
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
# How quantisers (FP8 blocks, GPTQ, AWQ, compressed-tensors, bitsandbytes) name what they keep beside or instead of a weight.
_QUANTISED = (
    "weight_scale_inv",
    "weight_scale",
    "input_scale",
    "qweight",
    "qzeros",
    "g_idx",
    "weight_packed",
    "absmax",
    "quant_map",
    "SCB",
)
PLAIN_WEIGHTS = "use the model's unquantised weights, or dequantise them (from_pretrained, dequantize, save_pretrained)"


def open_source(directory: str | Path, arch: Architecture) -> HfTensors:
    """The directory's tensors. Raises UserError unless they are just those of the architecture, in its shapes and in floating point."""
    refuse_quantised(directory, "training", PLAIN_WEIGHTS)
    source = HfTensors(directory)
    if marks := sorted(name for name in source.names() if name.endswith(_QUANTISED)):
        raise UserError(f"{source.directory}: quantised weights ({marks[0]} and the like), but training needs plain ones; {PLAIN_WEIGHTS}")
    check_head(source.directory)
    if faults := _structure_faults(source.index, arch):
        raise UserError(f"{source.directory}: {'; '.join(faults)}")
    return source


def _structure_faults(index: dict[str, StoredTensor], arch: Architecture) -> list[str]:
    """A sentence for each way in which the tensors are not those of the architecture."""
    entries = table(arch)
    count = sum(len(entry.hf) * entry.count(arch) for entry in entries)
    if count > 2 * len(index) + 100:  # it would take long, and much memory, to name them all
        return [f"{len(index)} tensors, but config.json asks for {count}; does it belong to these weights?"]
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in entries:
        parts = [tuple(part.shape) for part in entry.to_hf(torch.empty(entry.shape, device="meta"), arch)]
        for position in entry.indices(arch):
            shapes |= zip(entry.hf_names(position), parts, strict=True)
    faults = []
    if missing := sorted(shapes.keys() - index.keys()):
        faults.append(f"{len(missing)} tensors are missing: {', '.join(missing[:5])}")
    ignored = {name for name in index if name.endswith(_NOT_TRAINED)} | ({HEAD} if arch.tied_embeddings else set())
    if foreign := sorted(index.keys() - shapes.keys() - ignored):
        files = sorted({index[name].path.name for name in foreign})
        faults.append(f"{len(foreign)} tensors are not part of a {arch.name}: {', '.join(foreign[:5])} (in {', '.join(files[:3])})")
    there = sorted(shapes.keys() & index.keys())
    if wrong := [name for name in there if tuple(index[name].shape) != shapes[name]]:
        name = wrong[0]
        others = f" ({len(wrong)} such tensors)" if len(wrong) > 1 else ""
        faults.append(f"{name} has shape {tuple(index[name].shape)}; config.json asks for {shapes[name]}{others}")
    if odd := [name for name in there if index[name].dtype not in _DTYPES]:
        faults.append(f"{len(odd)} tensors are of type {index[odd[0]].dtype} (first: {odd[0]}); supported: {', '.join(_DTYPES)}")
    return faults


def stored_dtype(model: str) -> torch.dtype:
    """The one dtype of the weights. Raises UserError for a mixture, as one would silently be cast to the other."""
    counts = Counter(tensor.dtype for name, tensor in tensor_index(model).items() if not name.endswith(_NOT_TRAINED))
    if len(counts) != 1 or next(iter(counts)) not in _DTYPES:
        raise UserError(
            f"{model}: tensors of {', '.join(f'{dtype} ({n})' for dtype, n in counts.items())}; one of {', '.join(_DTYPES)} for all is expected"
        )
    return _DTYPES[next(iter(counts))]


def global_tensor(source: HfTensors, entry: Entry, arch: Architecture, index: Index) -> torch.Tensor:
    """One global tensor, from the Hugging Face tensors that make it."""
    return entry.to_mcore([source.read(name) for name in entry.hf_names(index)], arch)
