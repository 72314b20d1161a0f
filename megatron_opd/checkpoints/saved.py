"""What a run has left in its output folder, read without Megatron: checkpoints, their state, and who they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_opd.checkpoints.checksums import CHECKSUM_FILE, check_files, content_id
from megatron_opd.errors import CheckpointError, DamagedCheckpoint, UserError
from megatron_opd.safety.untrusted import read_object

STATE_FILE = "opd_state.json"
LATEST = "latest"
STEP_PREFIX = "step_"
# Files of at most so many bytes are read whenever a checkpoint is looked for; all of them, before it is loaded or converted.
_SMALL = 1 << 20


def checkpoint_folder(output: Path) -> Path:
    return output / "checkpoints"


def step_name(step: int) -> str:
    return f"{STEP_PREFIX}{step:06d}"


def step_of(name: str) -> int | None:
    """The step that a folder's name tells."""
    number = name.removeprefix(STEP_PREFIX)
    return int(number) if name.startswith(STEP_PREFIX) and number.isascii() and number.isdecimal() and len(number) < 20 else None


@dataclass(frozen=True)
class Found:
    """The checkpoint that is taken, None if a run has none yet, and what is to be said of others."""

    checkpoint: Path | None
    notes: list[str] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)  # steps that were passed over


def latest_checkpoint(output: Path) -> Path | None:
    """As `find_checkpoint`, for who says nothing."""
    return find_checkpoint(output).checkpoint


def find_checkpoint(output: Path, damaged: Mapping[Path, str] | None = None, *, read_small: bool = True) -> Found:
    """The checkpoint that `latest` names or, where that one is damaged or gone, the newest whole one.

    Whole is one whose files are all there with their sizes, and the small ones as they were written; `damaged` has what else is known.
    Raises CheckpointError if there are checkpoints and none is whole, or if `latest` leads out of the folder.
    """
    folder = checkpoint_folder(output)
    steps = {step: path for path in folder.glob(f"{STEP_PREFIX}*") if (step := step_of(path.name)) is not None and path.is_dir()}
    candidates = [steps[step] for step in sorted(steps, reverse=True)]
    notes: list[str] = []
    passed: list[int] = []
    if (named := _named(folder)) is not None:
        step = step_of(named.name)
        if not named.is_dir():
            notes.append(f"{folder / LATEST} names {named.name}, which is not there")
        elif step is None:
            candidates.insert(0, named)
        else:  # newer ones were set back
            if newer := [path.name for path in candidates if (step_of(path.name) or 0) > step]:
                notes.append(f"{folder / LATEST} names {named.name}; {', '.join(newer)} beside it is newer, and not taken")
            candidates = [path for path in candidates if (step_of(path.name) or 0) <= step]
    for path in candidates:
        fault = (damaged or {}).get(path) or _fault(path, _SMALL if read_small else -1)
        if fault is None:
            return Found(path, [*notes, f"the checkpoint that is taken is {path}"] if notes else [], passed)
        notes.append(fault)
        passed += [step for step in [step_of(path.name)] if step is not None]
    if notes:
        raise CheckpointError(f"{'; '.join(notes)}; no checkpoint in {folder} is whole: copy one back, or begin again in another folder")
    return Found(None)


def _fault(checkpoint: Path, largest: int) -> str | None:
    try:
        check_files(checkpoint, largest=largest)
        read_state(checkpoint)
    except DamagedCheckpoint as error:
        return str(error)
    return None


def _named(folder: Path) -> Path | None:
    """The folder that `latest` names, None if it names none. Raises CheckpointError for what is no name of a folder beside it."""
    pointer = folder / LATEST
    try:
        with pointer.open("rb") as file:
            name = file.read(256).decode(errors="replace").strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{pointer} can't be read ({error.strerror}); remove it, and the newest whole checkpoint is taken") from None
    if not name:  # a power cut may leave so
        return None
    if name.startswith(".") or not name.isprintable() or "/" in name or len(name) > 100:
        raise CheckpointError(
            f"{pointer} holds {name[:100]!a}, which is no name of a folder beside it ({step_name(50)} is one); "
            "write one into it, or remove it, and the newest whole checkpoint is taken"
        )
    return folder / name


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Step, data position, what the run is and its settings. Raises DamagedCheckpoint, also for the state of another checkpoint."""
    path = checkpoint / STATE_FILE
    try:
        state = read_object(path)
        if type(state.get("step")) is not int or state["step"] < 0:
            raise ValueError("it has no step")
    except (OSError, UserError, ValueError) as error:
        raise DamagedCheckpoint(f"{checkpoint}: no checkpoint of a run ({STATE_FILE}: {error})") from None
    step = step_of(checkpoint.name)
    if step is not None and step != state["step"]:
        raise DamagedCheckpoint(f"{path}: step = {state['step']}, but the folder is named {checkpoint.name}; one of them was changed")
    found = content_id(checkpoint)
    if found is None and state.get("content") is not None:
        raise DamagedCheckpoint(f"{checkpoint / CHECKSUM_FILE} is missing")
    if None not in (found, state.get("content")) and found != state["content"]:
        raise DamagedCheckpoint(f"{path}: written for other weights (content {state['content']!a}) than those beside it ({found})")
    return state


def last_saved(output: str | Path) -> str:
    """For people, in half a sentence: what is saved of a run. Signal handlers call it, so it starts no threads."""
    try:
        checkpoint = find_checkpoint(Path(output), read_small=False).checkpoint
        return f"the last whole checkpoint is {checkpoint}" if checkpoint else "no checkpoint was saved"
    except CheckpointError as error:
        return str(error)
