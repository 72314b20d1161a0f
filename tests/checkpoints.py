"""Checkpoints as other versions, or other people, would have written them: changed, with checksums that fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_opd.checkpoints.checksums import CHECKSUM_FILE, id_of, read_record, record_checksums, sum_files
from megatron_opd.checkpoints.saved import STATE_FILE


def edit_state(checkpoint: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Let `change` change the state."""
    path = checkpoint / STATE_FILE
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))
    if (record := read_record(checkpoint)) is not None and record.side is not None:
        record_checksums(checkpoint, record.data)


def sign_again(checkpoint: Path) -> None:
    """What somebody does who has changed a checkpoint's files, and knows the format."""
    record = read_record(checkpoint)
    assert record is not None
    data = sum_files(checkpoint, record.data)
    state = json.loads((checkpoint / STATE_FILE).read_text())
    (checkpoint / STATE_FILE).write_text(json.dumps(state | {"content": id_of(data)}))
    record_checksums(checkpoint, data)


def make_older(checkpoint: Path, *, checksums: bool) -> None:
    """As before side files had checksums, or anything had."""
    record = read_record(checkpoint)
    assert record is not None
    (checkpoint / CHECKSUM_FILE).unlink()
    if checksums:
        (checkpoint / CHECKSUM_FILE).write_text(json.dumps(record.data))
    else:
        edit_state(checkpoint, lambda state: state.pop("content"))
