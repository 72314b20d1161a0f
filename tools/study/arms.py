"""The arms of the study: which student, which teacher, which loss, on whose responses, for how many steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

VOCABULARY = 64  # tokens of the demo's language: so many candidates are all of them
PLAIN = {"name": "opd", "advantage_clip": 10.0}  # the paper's loss, with the clip of its recipes
CLIPPED = {"name": "opd", "advantage_clip": 0.5}  # chosen for this task, with batches of some thousand tokens
TWICE_CLIPPED = {**CLIPPED, "importance_clip": 1.0}  # and a token counts less where the student has made it less likely
REVERSE_KL = {"name": "reverse_kl"}
TOP_K = 8
LOW_RATE = 2e-4
GROUPS = {
    "start": "Before distillation",
    "consistent": "Rollouts once, the teacher of SFT",
    "rounds": "New rollouts while training goes on",
    "inconsistent": "Another teacher than that of SFT",
    "controls": "Does the teacher matter?",
    "steps": "More steps",
    "lower rate": "A lower learning rate",
    "candidates": "The number of candidates K",
}


@dataclass(frozen=True)
class Arm:
    """A way to train a student that was fine-tuned on the answers of teacher `student` with the scores of teacher `teacher` ("a" or "b").

    scores: of the sampled tokens alone, or with the teacher's candidates ("top_k"); or made of the first ("shuffle", "residualize").
    every: steps between new rollouts, None for rollouts once. own_answers: the teacher's own responses in place of the student's.
    times: of the steps that all others have.
    """

    name: str
    title: str
    group: str
    student: Literal["a", "b"] = "a"
    teacher: Literal["a", "b"] = "a"
    loss: dict[str, Any] = field(default_factory=lambda: dict(PLAIN))
    scores: Literal["sampled", "top_k", "shuffle", "residualize"] = "sampled"
    top_k: int = TOP_K
    every: int | None = None
    own_answers: bool = False
    times: int = 1
    lr: float | None = None

    @property
    def consistent(self) -> bool:
        return self.student == self.teacher

    @property
    def scores_name(self) -> str:
        """Of the teacher's group in the store."""
        if self.scores == "top_k":
            return f"{self.teacher}-top{self.top_k}"
        return self.teacher if self.scores == "sampled" else f"{self.teacher}-{self.scores}d"


def _both(name: str, title: str, group: str, **changes: Any) -> list[Arm]:
    """With the paper's loss, and with the reverse KL over the teacher's candidates."""
    plain = Arm(f"{name}-plain", f"{title}, plain", group, **changes)
    return [
        plain,
        replace(plain, name=f"{name}-reverse-kl", title=f"{title}, reverse KL, K = {TOP_K}", loss=REVERSE_KL, scores="top_k"),
    ]


def _inconsistent(student: Literal["a", "b"], teacher: Literal["a", "b"]) -> list[Arm]:
    pair: dict[str, Any] = {"student": student, "teacher": teacher}
    name, title = f"{student}-by-{teacher}", f"SFT({student.upper()}), teacher {teacher.upper()}"
    residual = Arm(f"{name}-residual", f"{title}, residualized, plain", "inconsistent", scores="residualize", **pair)
    longer = [arm for times in (2, 4) for arm in _both(f"{name}-{times}x", f"{title}, {times} x the steps", "steps", times=times, **pair)]
    return [
        *_both(f"{name}-online", f"{title}, rollouts every 5 steps", "inconsistent", every=5, **pair),
        *_both(name, f"{title}, offline", "inconsistent", **pair),
        residual,
        *(longer if student == "a" else []),
    ]


# The longest first: two lanes then end at about the same time.
ARMS: list[Arm] = [
    *_both("every-1", "rollouts every step", "rounds", every=1),
    *_both("every-5", "rollouts every 5 steps", "rounds", every=5),
    *_inconsistent("a", "b"),
    *_inconsistent("b", "a"),
    *_both("4x", "offline, 4 x the steps", "steps", times=4),
    *_both("every-20", "rollouts every 20 steps", "rounds", every=20),
    *_both("every-50", "rollouts every 50 steps", "rounds", every=50),
    *_both("2x", "offline, 2 x the steps", "steps", times=2),
    *_both("offline", "offline", "consistent"),
    Arm("offline-clipped", "offline, plain with clip 0.5", "consistent", loss=CLIPPED),
    Arm("offline-twice-clipped", "offline, plain with clip 0.5, weights up to 1", "consistent", loss=TWICE_CLIPPED),
    *_both("naive", "the teacher's own answers", "consistent", own_answers=True),
    Arm("offline-residual", "offline, residualized, plain", "consistent", scores="residualize"),
    Arm("constant", "constant negative advantage", "controls", loss={"name": "constant"}),
    Arm("shuffled", "shuffled teacher scores, plain", "controls", scores="shuffle"),
    *_both("b-by-b", "SFT(B), teacher B, offline", "consistent", student="b", teacher="b"),
    Arm("low-rate-plain", f"offline, plain, lr {LOW_RATE:g}", "lower rate", lr=LOW_RATE),
    Arm("every-5-low-rate-plain", f"rollouts every 5 steps, plain, lr {LOW_RATE:g}", "lower rate", every=5, lr=LOW_RATE),
    *(
        Arm(f"top-{k}", f"offline, reverse KL, K = {k}", "candidates", loss=REVERSE_KL, scores="top_k", top_k=k)
        for k in (1, 2, 4, 16, VOCABULARY)
    ),
]


# Those that STUDY=quick has: the main ones, and those that say why others fail.
QUICK = {
    "offline-plain", "offline-clipped", "offline-reverse-kl", "naive-plain", "naive-reverse-kl", "every-20-plain", "every-20-reverse-kl",
    "every-5-plain", "a-by-b-plain", "a-by-b-reverse-kl", "a-by-b-residual", "b-by-a-plain", "b-by-a-reverse-kl", "b-by-a-residual",
    "b-by-b-plain", "b-by-b-reverse-kl", "b-by-a-online-reverse-kl", "constant", "shuffled", "low-rate-plain", "every-5-low-rate-plain",
}  # fmt: skip


def in_order(arms: Sequence[Arm]) -> list[Arm]:
    """As people read them: group by group."""
    groups = list(GROUPS)

    def place(arm: Arm) -> tuple[Any, ...]:
        return groups.index(arm.group), arm.student, arm.teacher, arm.every or 0, arm.times, arm.top_k if arm.group == "candidates" else 0

    return sorted(arms, key=place)


def choose(names: Sequence[str] | None, *, quick: bool) -> list[Arm]:
    """Raises ValueError for a name that no arm has."""
    known = {arm.name: arm for arm in ARMS}
    if unknown := [name for name in names or [] if name not in known]:
        raise ValueError(f"study: {unknown[0]!r} is no arm; the arms are {', '.join(known)}")
    return [arm for arm in ARMS if (arm.name in names if names else arm.name in QUICK or not quick)]


# (arm, what it is compared with), by names; "sft-a" and "sft-b" are the students before distillation.
COMPARISONS: list[tuple[str, str]] = [
    ("offline-reverse-kl", "offline-plain"),
    ("offline-reverse-kl", "offline-clipped"),
    ("offline-twice-clipped", "offline-clipped"),
    *((f"offline-{loss}", f"every-{steps}-{loss}") for loss in ("plain", "reverse-kl") for steps in (1, 5, 20, 50)),
    ("naive-plain", "offline-plain"),
    ("naive-reverse-kl", "offline-reverse-kl"),
    *((f"{control}", "offline-plain") for control in ("constant", "shuffled", "offline-residual")),
    *((f"a-by-b-{loss}", f"offline-{loss}") for loss in ("plain", "reverse-kl")),
    *((f"b-by-a-{loss}", f"b-by-b-{loss}") for loss in ("plain", "reverse-kl")),
    *((f"{pair}-{other}", f"{pair}-plain") for pair in ("a-by-b", "b-by-a") for other in ("residual", "online-plain")),
    *((f"{pair}-online-reverse-kl", f"{pair}-reverse-kl") for pair in ("a-by-b", "b-by-a")),
    *((f"{times}-{loss}", f"offline-{loss}") for loss in ("plain", "reverse-kl") for times in ("2x", "4x")),
    *((f"a-by-b-{times}-{loss}", f"a-by-b-{loss}") for loss in ("plain", "reverse-kl") for times in ("2x", "4x")),
    ("low-rate-plain", "offline-plain"),
    ("every-5-low-rate-plain", "low-rate-plain"),
    ("every-5-low-rate-plain", "every-5-plain"),
    *((f"top-{k}", "offline-reverse-kl") for k in (1, 2, 4, 16, VOCABULARY)),
]
