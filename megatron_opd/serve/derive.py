"""Derived teachers of a recipe, [score.derived.NAME], and of a store alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping

from megatron_opd.cost.meter import StageCost
from megatron_opd.data.derived import derive, plan_derived
from megatron_opd.data.missing import require_made
from megatron_opd.data.store import StoreReader
from megatron_opd.errors import ConfigError
from megatron_opd.recipe.config import Recipe, ScoreStage
from megatron_opd.recipe.derivation import DerivedConfig
from megatron_opd.recipe.rounds import round_recipe
from megatron_opd.serve.stage import Bar, round_facts


def derive_recipe(recipe: Recipe, names: Iterable[str] = (), *, number: int | None = None) -> None:
    """Make what is missing or stale of the recipe's derived teachers, or of those called `names`, in round `number` of several. Raises UserError."""
    recipe = round_recipe(recipe, number)
    stage = recipe.score
    if unknown := [name for name in names if name not in stage.derived]:
        raise ConfigError(
            f"the recipe has no derived teacher {', '.join(map(repr, unknown))} ({', '.join(stage.derived) or 'it has none'}); add a section [score.derived.{unknown[0]}]"
        )
    if not stage.derived:
        raise ConfigError("the recipe has no derived teachers; add a section [score.derived.NAME], or give score.derived.NAME.method=...")
    require_made(recipe, stage.store, number=number)
    chosen = list(dict.fromkeys(names)) or list(stage.derived)
    derive_all(stage, {name: stage.derived[name] for name in chosen}, run_dir=recipe.run_dir, number=number)


def derive_all(stage: ScoreStage, derived: Mapping[str, DerivedConfig], *, run_dir: str | None, number: int | None = None) -> None:
    """Make what is missing or stale of these teachers of the stage's store; `run_dir` has the account. Raises UserError."""
    reader = StoreReader(stage.store)
    for name, config in derived.items():
        plan = plan_derived(reader, name, config.derivation(stage.teacher))
        if not plan.parts:
            print(f"derive: {name!r} is made of all parts of {reader.location.url}")
            continue
        with (
            StageCost(run_dir, "derive", facts=round_facts(number)) if run_dir else contextlib.nullcontext() as cost,
            Bar("derive", cost, total=plan.tokens(reader), initial=0, unit="token") as bar,
        ):

            def count(tokens: int, bar: Bar = bar, cost: StageCost | None = cost) -> None:
                bar.update(tokens, tokens=tokens)
                if cost is not None:
                    cost.tokens += tokens

            found = derive(reader, plan, count)
        print(
            f"derive: {name!r} in {len(plan.parts)} of {len(reader.parts)} parts of {reader.location.url}: {plan.wanted.describe()}; {found}"
        )
