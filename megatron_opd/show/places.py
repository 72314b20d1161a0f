"""Which store is meant: by its address, or by its run."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_opd.data.joined import training_stores_exist
from megatron_opd.data.location import Location
from megatron_opd.recipe.config import require
from megatron_opd.recipe.files import RECIPE_FILE, load_recipe, shipped_recipes
from megatron_opd.recipe.rounds import round_recipe


def find_store(name: str) -> str:
    """The address of a store; for a run's folder or a recipe that of its rollouts, of the last round that has some. Raises UserError."""
    is_recipe = os.path.isfile(name) or os.path.isfile(Path(name, RECIPE_FILE)) or name.removesuffix(".toml") in shipped_recipes()
    if not is_recipe or Location(name).read_attributes("") is not None:
        return name
    recipe = load_recipe(name)
    stores = [require(round_recipe(recipe, number).rollout, "rollout").store for number in range(1, recipe.rounds.count + 1)]
    return next((store for store in reversed(stores) if training_stores_exist(store)), stores[-1])
