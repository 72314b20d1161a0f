"""`megatron-opd convert trained`: the checkpoints of a recipe as the model directories that its later stages read."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

from megatron_opd.checkpoints.checksums import content_id
from megatron_opd.checkpoints.saved import checkpoint_folder, find_checkpoint, read_state, step_name
from megatron_opd.convert.hf_files import hash_tensor
from megatron_opd.convert.mcore_files import McoreTensors
from megatron_opd.convert.source import stored_dtype
from megatron_opd.convert.to_hf import HF_FOLDER, checkpoint_origin, convert_to_hf, hf_tensors
from megatron_opd.convert.written import check_written, read_origin, read_sums, sum_folder
from megatron_opd.cost.meter import provenance
from megatron_opd.data.missing import require_made
from megatron_opd.errors import CheckpointError, DamagedCheckpoint, UserError
from megatron_opd.hf.lineage import ORIGIN_FILE, hash_tensors, read_lineage
from megatron_opd.model.architecture import read_architecture
from megatron_opd.pipeline.status import training_status
from megatron_opd.recipe.config import Recipe, require
from megatron_opd.recipe.rounds import entry_of, read_entries, student_after
from megatron_opd.safety.durable import write_json
from megatron_opd.safety.untrusted import read_json


def trained_to_hf(recipe: Recipe, stage: str, number: int | None = None) -> str:
    """Convert what `sft` or `train` made, in round `number` of several, to the directory that rollout or eval reads; says what was done.

    A directory that holds the latest checkpoint's model, as it was written, is left alone. Raises UserError for one that holds another
    model or is damaged, and for a run, or a round, that is not finished.
    """
    made = _find_made(recipe, stage, number)
    if number is None:
        require_made(recipe, str(made.source))
    again = f"('megatron-opd {stage}'{f' with --round {number}' if number else ''}), then convert"
    progress = training_status(recipe, stage, number)
    if not progress.finished or made.step is None:  # an older checkpoint than the last is the model of fewer steps
        notes = "".join(f"; {note}" for note in made.notes)
        raise CheckpointError(f"{made.source}: {progress.done} of {progress.total} steps{notes}; finish it {again}")
    target = made.target
    if not (target / "config.json").exists():
        if made.checkpoint is None:
            raise CheckpointError(
                f"{made.source}: round {number} ended after step {made.step}, but that checkpoint is no longer there, and {target} is not either"
            )
        try:
            written = convert_to_hf(made.checkpoint, target)
        except DamagedCheckpoint as error:
            raise CheckpointError(f"{error}; make it again {again}") from None
        for note in made.notes:
            print(f"WARNING: {note}", flush=True)
        return f"wrote {written}"
    origin = read_origin(target)
    sums = None if origin is None else read_sums(origin)
    if sums is not None:
        check_written(target, sums)
    read_lineage(target)  # raises if its weights are others than were written
    contents = {made.content, None if origin is None else origin["content"]}
    old = None in contents or (sums is None and len(contents) == 1)  # an older version made one of them: the weights themselves tell
    remade = (
        number is not None and origin is not None and origin["step"] == made.step
    )  # a last checkpoint that was made again is the same model
    if (len(contents) > 1 and remade) or old:
        same = made.checkpoint is not None and _adopt(made.checkpoint, target, (origin or {}) | checkpoint_origin(made.checkpoint))
    else:
        same = len(contents) == 1
    if not same:
        made_of = f"step {origin['step']} ({origin['checkpoint']})" if origin else "another model, it is not recorded which"
        if origin and origin["step"] == made.step:
            made_of = "other weights, or is damaged"
        name = made.checkpoint.name if made.checkpoint else f"the end of round {number}"
        raise UserError(
            f"{target} was made of {made_of}, but the latest checkpoint of {made.source} is of step {made.step} ({name}); what was made with "
            "that model (rollouts, evaluations) is of it too: move the directory away and convert again, or give another run_dir"
        )
    return f"{target} is there already, of step {made.step}"


class _Made(NamedTuple):
    """What a training, or a round, ended with: None for a step that is not known yet, and for a checkpoint that is gone."""

    source: Path
    target: Path
    step: int | None
    content: str | None
    checkpoint: Path | None
    notes: list[str]


def _find_made(recipe: Recipe, stage: str, number: int | None) -> _Made:
    """Raises UserError."""
    source = Path(recipe.sft.output if stage == "sft" else recipe.train.output)
    target = require(recipe.rollout, "rollout").model if stage == "sft" else student_after(recipe, number)
    found = find_checkpoint(source)
    if found.checkpoint is None:
        return _Made(source, Path(target), None, None, None, found.notes)
    now = checkpoint_origin(found.checkpoint)
    if number is None:
        return _Made(source, Path(target), now["step"], now["content"], found.checkpoint, found.notes)
    entry = entry_of(read_entries(read_state(found.checkpoint), found.checkpoint), number)
    if entry is None or entry.last_step is None:
        return _Made(source, Path(target), None, None, None, found.notes)
    if entry.last_step == now["step"]:
        return _Made(source, Path(target), now["step"], now["content"], found.checkpoint, found.notes)
    path = checkpoint_folder(source) / step_name(entry.last_step)
    there = path if path.is_dir() and content_id(path) == entry.content else None
    return _Made(source, Path(target), entry.last_step, entry.content, there, found.notes)


def _adopt(checkpoint: Path, target: Path, origin: dict[str, Any]) -> bool:
    """Whether `target`, which has no record of what was written, holds the checkpoint's model; what it holds is recorded then."""
    remedy = f"move {target} away and convert again"
    try:
        if not _holds_model_of(checkpoint, target):
            return False
    except DamagedCheckpoint as error:
        raise CheckpointError(f"{error}; {remedy}, of a whole step") from None
    for path in sorted(target.glob("*.json")):  # a power cut may have emptied them
        try:
            read_json(path)
        except UserError as error:
            raise UserError(f"{error}; {remedy}") from None
    if "files" not in origin:
        print(f"{target} does not record what was written (an older version's doesn't); its weights are those of {checkpoint}")
    with contextlib.suppress(OSError):  # a directory that can't be written is compared each time
        write_json(target / ORIGIN_FILE, origin | provenance() | {"files": sum_folder(target)})
    return True


def _holds_model_of(checkpoint: Path, target: Path) -> bool:
    """Whether every tensor in `target` is the checkpoint's, in the dtype that it has there."""
    arch = read_architecture(checkpoint / HF_FOLDER)
    found, dtype = hash_tensors(target), stored_dtype(str(target))
    names = set()
    for name, tensor in hf_tensors(McoreTensors(checkpoint, arch), arch, dtype):
        if found.get(name) != hash_tensor(name, tensor):
            return False
        names.add(name)
    return names == found.keys()
