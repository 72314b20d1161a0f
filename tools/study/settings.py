"""Sizes of a study, the same for all arms; they are kept in its folder, which then takes no others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from megatron_opd.safety.durable import write_json
from megatron_opd.safety.untrusted import read_object

FILE = "study.json"


@dataclass(frozen=True)
class Settings:
    """Each rollout is trained on once in `steps` steps: prompts * samples = steps * batch. What is not here is the demo's recipe.

    sft_b_*: of the student of teacher B, whose way of writing takes longer to learn.
    """

    sft_prompts: int = 500
    sft_steps: int = 500
    sft_b_prompts: int = 1000
    sft_b_steps: int = 800
    prompts: int = 3200
    samples: int = 4
    steps: int = 200
    batch: int = 64
    eval_prompts: int = 600

    def changed(self, words: Sequence[str]) -> Settings:
        """With FIELD=NUMBER of the command line. Raises ValueError."""
        known = {field.name for field in fields(self)}
        changes: dict[str, int] = {}
        for word in words:
            name, _, value = word.partition("=")
            if name not in known or not value.isdecimal() or int(value) == 0:
                raise ValueError(f"study: {word!r}: FIELD=NUMBER is expected, with a field of {', '.join(sorted(known))}")
            changes[name] = int(value)
        found = replace(self, **changes)
        if found.prompts * found.samples != found.steps * found.batch:
            raise ValueError(
                f"study: {found.prompts} prompts x {found.samples} samples are not {found.steps} steps x {found.batch}: each rollout is "
                "to be trained on once; change prompts, samples, steps or batch"
            )
        return found

    def keep(self, folder: Path) -> None:
        """Write them into the folder of a study. Raises ValueError where that has others."""
        path = folder / FILE
        if path.exists() and (before := read_object(path)) != asdict(self):
            raise ValueError(
                f"study: {path} says {json.dumps(before)}, this study has {json.dumps(asdict(self))}; give another --folder, or these sizes"
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(self))
