"""The state of a stage, and what follows from it for the others."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_opd.pipeline.stages import Stage, upstream
from megatron_opd.pipeline.stores import Glance
from megatron_opd.recipe.config import Recipe
from megatron_opd.store_records import Excluded

# Their results are needed only until the next stage has made its own.
_PASSING = ("inputs", "generate", "sft", "rollout", "score", "derive", "engines", "train")


@dataclass(frozen=True)
class Status:
    """`done` of `total` parts or steps; a total of 0 is not known yet. `stale`: why it must be made again; `note`: what else to know."""

    stage: Stage
    unit: str
    where: str = ""
    done: int = 0
    total: int = 0
    stale: str | None = None
    note: str | None = None
    gone: bool = False  # and not needed: what was made of it is there
    outdated: bool = False  # and made again unasked, as that costs nothing

    @property
    def finished(self) -> bool:
        return 0 < self.total <= self.done

    @property
    def settled(self) -> bool:
        """Whether nothing is left to do."""
        return self.stale is None and not self.outdated and (self.finished or self.gone)

    @property
    def state(self) -> str:
        if self.stale is not None:
            return "STALE"
        if self.gone:
            return "not needed"
        if self.outdated:
            return "outdated"
        return "done" if self.finished else "partial" if self.done else "not started"

    @property
    def amount(self) -> str:
        return f"{self.done} of {self.total} {self.unit}" if self.total and self.unit else ""


def quarantined(status: Status, excluded: list[Excluded], found: Glance, limit: float) -> Status:
    """Not settled if more rollouts failed than the stage allows: it refuses to end until they are made again, or allowed."""
    count = sum(entry.quarantined for entry in excluded)
    total = sum(record.num_rollouts + len(record.excluded) for record in found.parts.values())
    if count <= limit * total:
        return status
    return replace(status, outdated=True, note=f"{count} of {total} rollouts were quarantined, over max_quarantined = {limit:g}")


def pass_on_staleness(found: list[Status], recipe: Recipe, begin: int) -> list[Status]:
    """What was made from something stale is stale, too, also through what is gone; what is stale before number `begin` is taken as it is."""
    numbers = {(status.stage.name, status.stage.round): number for number, status in enumerate(found)}
    roots: dict[int, str] = {}  # the nearest stale stage of each
    for number, status in enumerate(found):
        if status.stale is not None:
            if number >= begin:
                roots[number] = status.stage.label
            continue
        before = [numbers[key] for key in upstream(status.stage, recipe) if key in numbers]
        if (root := next((roots[one] for one in before if one in roots), None)) is not None:
            roots[number] = status.stage.label if status.done else root
            if status.done:
                found[number] = replace(status, stale=f"{root} is")
    return found


def mark_gone(found: list[Status], recipe: Recipe) -> list[Status]:
    """What is not there, and was read by stages that are done, is not needed any more."""
    for number in reversed(range(len(found))):
        status, stage = found[number], found[number].stage
        between = stage.name == "opd-hf" and stage.round is not None and stage.round < recipe.rounds.count
        if (stage.name not in _PASSING and not between) or (status.done and not (status.outdated and stage.name == "inputs")):
            continue
        readers = [other for other in found[number + 1 :] if _reads(other.stage, stage, recipe)]
        if readers and all(other.settled for other in readers):
            found[number] = replace(status, gone=True, outdated=False)
    return found


def _reads(reader: Stage, read: Stage, recipe: Recipe) -> bool:
    if read.name == "inputs":
        return reader.name != "report"
    if read.name == "engines":
        return reader.name == "train" and reader.round in (None, 1)
    return (read.name, read.round) in upstream(reader, recipe)
