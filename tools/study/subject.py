"""What a study distils: a demo's models, task and recipe, with the sizes that two cores have time for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .arms import ARMS, Arm, choose
from .settings import Settings


@dataclass(frozen=True)
class Subject:
    """recipe: the shipped one that all arms extend. evaluation: what that calls its own. other_teacher: whether there is a teacher B.

    arms: names of those that are run where none are named; empty for all.
    """

    name: str
    recipe: str
    evaluation: str
    max_new_tokens: int
    settings: Settings
    other_teacher: bool = True
    arms: tuple[str, ...] = ()

    @property
    def possible(self) -> list[Arm]:
        """The arms that do without a teacher that there is not."""
        return [arm for arm in ARMS if self.other_teacher or "b" not in (arm.student, arm.teacher)]

    def choose(self, names: Sequence[str] | None, *, quick: bool) -> list[Arm]:
        """The arms of these names, or those that are run where none are named. Raises ValueError."""
        arms = choose(names or self.arms, quick=quick)
        if strange := [arm.name for arm in arms if arm not in self.possible]:
            raise ValueError(f"study: arm {strange[0]!r} needs a teacher B, which {self.name} has not; leave it out")
        return arms


ARITHMETIC = Subject("arithmetic", "demo", "addition", 64, Settings())
SMOLLM2 = Subject(
    "smollm2", "smollm2", "sentences", 32,
    Settings(sft_prompts=192, sft_steps=16, prompts=320, samples=1, steps=20, batch=16, eval_prompts=150),
    other_teacher=False, arms=("offline-plain", "offline-reverse-kl", "naive-plain", "constant"),
)  # fmt: skip
SUBJECTS = {subject.name: subject for subject in (ARITHMETIC, SMOLLM2)}
