"""What a stage reads and an earlier stage makes: where it is not there, which commands make it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_opd.data.joined import store_list
from megatron_opd.data.location import Location
from megatron_opd.errors import UserError
from megatron_opd.recipe.config import Recipe
from megatron_opd.recipe.rounds import student_after


@dataclass(frozen=True)
class _Product:
    """What the command makes at `path`, of what lies at `inputs`."""

    path: str
    kind: Literal["store", "checkpoints", "model"]
    command: str
    inputs: tuple[str, ...] = ()

    def is_there(self) -> bool:
        if self.kind == "store":
            return Location(self.path).read_attributes("") is not None
        return Path(self.path).exists() if self.kind == "model" else any(Path(self.path).glob("checkpoints/step_*"))


def _products(recipe: Recipe, number: int | None) -> Iterator[_Product]:
    sft, train = recipe.sft, recipe.train
    of_round = "" if number is None else f" --round {number}"
    if recipe.generate is not None:
        yield _Product(recipe.generate.store, "store", "generate RECIPE")
    yield _Product(sft.output, "checkpoints", "sft RECIPE", (sft.init, *store_list(sft.store)))
    if recipe.rollout is not None:
        if number is None or number == 1:
            yield _Product(recipe.rollout.model, "model", "convert trained RECIPE --stage sft", (sft.output,))
        else:
            yield _Product(recipe.rollout.model, "model", f"convert trained RECIPE --round {number - 1}")
        yield _Product(recipe.rollout.store, "store", f"rollout RECIPE{of_round}", (recipe.rollout.model,))
    yield _Product(train.output, "checkpoints", f"train RECIPE{of_round}", (train.init, *store_list(train.store)))
    for one in range(1, recipe.rounds.count + 1):
        which = "" if recipe.rounds.count == 1 else f" --round {one}"
        yield _Product(student_after(recipe, one), "model", f"convert trained RECIPE{which}", (train.output,))


def require_made(recipe: Recipe, *paths: str, scored: bool = False, number: int | None = None) -> None:
    """Raise UserError naming the commands to run first, if one of `paths` is not there and a stage of the recipe makes it.

    With `scored` rollouts are also to be scored. `number` is the round, of several, as which `recipe` sees them. A path that no stage makes is left to whoever reads it.
    """
    made = {product.path: product for product in reversed(list(_products(recipe, number)))}
    missing = [path for path in paths if path in made and not made[path].is_there()]
    if not missing:
        return
    commands: list[str] = []
    for path in missing:
        _collect(path, made, commands, scored=scored)
    words = ", then ".join(f"'megatron-opd {command}'" for command in commands)
    raise UserError(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not there: run {words} first")


def _collect(path: str, made: dict[str, _Product], commands: list[str], *, scored: bool) -> None:
    """Append the commands that make `path`, those that make what they read before them."""
    product = made.get(path)
    if product is None or product.command in commands or product.is_there():
        return
    training = product.command.startswith("train")
    for needed in product.inputs:
        _collect(needed, made, commands, scored=training)
    commands.append(product.command)
    if scored and product.command.startswith("rollout"):
        commands.append(product.command.replace("rollout", "score", 1))
