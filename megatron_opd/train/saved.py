"""What a run has left in its output folder, read without Megatron: checkpoints, their state, and who they are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from megatron_opd.checksums import content_id
from megatron_opd.errors import CheckpointError

STATE_FILE = "opd_state.json"
LATEST = "latest"
STEP_PREFIX = "step_"


def checkpoint_folder(output: Path) -> Path:
    return output / "checkpoints"


def step_name(step: int) -> str:
    return f"{STEP_PREFIX}{step:06d}"


def latest_checkpoint(output: Path) -> Path | None:
    """The newest whole checkpoint of a run, None if there is none. Raises CheckpointError if `latest` names what is not there."""
    folder = checkpoint_folder(output)
    pointer = folder / LATEST
    if not pointer.exists():  # a process killed between its first checkpoint and the pointer leaves the folder
        whole = (path for path in folder.glob(f"{STEP_PREFIX}*") if (path / STATE_FILE).exists())
        return max(whole, key=lambda path: path.name, default=None)
    path = folder / pointer.read_bytes().decode(errors="replace").strip()
    if not (path / STATE_FILE).exists():
        raise CheckpointError(
            f"{pointer} names {path.name}, which is not a whole checkpoint; write the name of another step folder into it"
        )
    return path


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Step, data position, what the run is and its settings. Raises CheckpointError, also for the state of another checkpoint."""
    try:
        state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        if not isinstance(state.get("step"), int):
            raise ValueError("it has no step")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{checkpoint}: no checkpoint of a run ({STATE_FILE}: {error}); point {LATEST} to another step folder"
        ) from None
    named = re.fullmatch(rf"{STEP_PREFIX}(\d+)", checkpoint.name)
    if named and int(named[1]) != state["step"]:
        raise CheckpointError(
            f"{checkpoint / STATE_FILE}: step = {state['step']}, but the folder is named {checkpoint.name}; one of them was changed: "
            f"point {LATEST} to another step folder"
        )
    found = content_id(checkpoint)
    if None not in (found, state.get("content")) and found != state["content"]:
        raise CheckpointError(
            f"{checkpoint / STATE_FILE}: written for other weights (content {state['content']}) than those beside it ({found}); "
            f"copy the checkpoint again, or point {LATEST} to another step folder"
        )
    return state


def last_saved(output: str | Path) -> str:
    """For people: what is saved of a run, in half a sentence."""
    try:
        checkpoint = latest_checkpoint(Path(output))
        return f"the last whole checkpoint is {checkpoint}" if checkpoint else "no checkpoint was saved"
    except CheckpointError as error:
        return str(error)
