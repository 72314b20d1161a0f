"""The task of the demo with a real language model: say a sentence again, or answer a question about it with it.

    prompt    Kate put the red coat in the cellar. Where did Kate put the red coat?
    response  Kate put the red coat in the cellar.

Names, verbs, colours, things and places are drawn; the answer is always the whole sentence, so one wrong word spoils it. A language model of
135 million parameters can do that most of the time, which is not so of arithmetic or of reasoning.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from megatron_opd.cost.meter import write_jsonl
from megatron_opd.errors import UserError

NAMES = ("Ana", "Ben", "Emma", "Eva", "Finn", "Jack", "Kate", "Leo", "Lily", "Max", "Mia", "Nora", "Paul", "Rosa", "Sam", "Tom")
VERBS = {"put": "put", "found": "find", "left": "leave", "saw": "see", "hid": "hide"}  # past -> infinitive
COLORS = ("red", "blue", "green", "yellow", "black", "white", "brown", "pink", "purple")
THINGS = ("car", "bike", "hat", "bag", "coat", "ball", "cup", "book", "lamp", "chair", "box", "shirt")
PLACES = ("kitchen", "garden", "garage", "bedroom", "office", "library", "cellar", "hall")
FORMS = (
    "Repeat this sentence: {sentence}",
    "{sentence} Where did {name} {infinitive} the {color} {thing}?",
    "{sentence} What did {name} {infinitive} in the {place}?",
)
INSTRUCTION = "Answer in one short sentence."
# Every sentence belongs to one split, by its hash: per cent of all sentences. Whatever the seeds, splits never share a sentence.
SPLITS = {"sft": range(20), "rollout": range(20, 70), "eval": range(70, 100)}


@dataclass(frozen=True)
class Scene:
    """What a sentence says."""

    name: str
    verb: str
    color: str
    thing: str
    place: str

    @property
    def sentence(self) -> str:
        return f"{self.name} {self.verb} the {self.color} {self.thing} in the {self.place}."

    @property
    def split(self) -> str:
        percent = int.from_bytes(hashlib.sha256(" ".join(astuple(self)).encode()).digest()[:8], "big") % 100
        return next(name for name, percents in SPLITS.items() if percent in percents)

    def ask(self, form: str) -> str:
        """The prompt in one of FORMS."""
        words = {"name": self.name, "color": self.color, "thing": self.thing, "place": self.place}
        return form.format(sentence=self.sentence, infinitive=VERBS[self.verb], **words)


def draw_scene(rng: random.Random, split: str) -> Scene:
    """A scene drawn uniformly from a split."""
    while True:
        scene = Scene(rng.choice(NAMES), rng.choice(list(VERBS)), rng.choice(COLORS), rng.choice(THINGS), rng.choice(PLACES))
        if scene.split == split:
            return scene


def write_prompts(path: str | Path, *, split: str, count: int, seed: int) -> None:
    """Write `count` rows {"prompt": messages, "answer"} of different sentences of a split, the forms in turn, as JSONL.

    The same arguments give the same bytes, and more rows begin with the same. Raises UserError.
    """
    if split not in SPLITS:
        raise UserError(f"no split {split!r}; choose one of {', '.join(SPLITS)}")
    available = len(NAMES) * len(VERBS) * len(COLORS) * len(THINGS) * len(PLACES) * len(SPLITS[split]) // 100
    if not 1 <= count <= available // 2:
        raise UserError(f"{count} different sentences of split {split!r}: 1 to {available // 2} are possible; take fewer prompts")
    rng = random.Random(f"{split} {seed}")
    scenes: dict[Scene, None] = {}
    while len(scenes) < count:
        scenes[draw_scene(rng, split)] = None
    write_jsonl(Path(path), [_row(scene, FORMS[number % len(FORMS)]) for number, scene in enumerate(scenes)])


def _row(scene: Scene, form: str) -> dict[str, Any]:
    messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": scene.ask(form)}]
    return {"prompt": messages, "answer": scene.sentence.rstrip(".")}  # the grader takes it with a full stop and without
