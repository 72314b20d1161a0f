"""What `check --stage inputs` found sound, kept in the run's folder until something of it changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_opd.errors import UserError
from megatron_opd.pipeline.identities import Identities, Unread, selection_of
from megatron_opd.pipeline.stores import differences, short
from megatron_opd.recipe.config import Recipe
from megatron_opd.safety.durable import make_folder, write_json
from megatron_opd.safety.untrusted import read_object

INPUTS_FILE = "inputs.json"
_NOT_OF_INPUTS = {"run_dir"}


def record_inputs(recipe: Recipe) -> None:
    """Write down models, prompts and settings as they were when the check found no fault; says so where that can't be written."""
    identities = Identities(recipe.run_dir)
    try:
        make_folder(Path(recipe.run_dir))
        write_json(Path(recipe.run_dir) / INPUTS_FILE, _identity(recipe, identities))
    except OSError as error:
        print(f"not recorded, so 'run' checks them again: {recipe.run_dir}: {error.strerror}")
    identities.save()


def inputs_difference(recipe: Recipe, identities: Identities) -> str | None:
    """None if the inputs were never checked; "" if they are as they were, otherwise what is not."""
    try:
        recorded = read_object(Path(recipe.run_dir) / INPUTS_FILE)
    except (OSError, UserError):
        return None
    try:
        return "; ".join(differences(recorded, _identity(recipe, identities)))
    except Unread as unread:
        return str(unread)


def _identity(recipe: Recipe, identities: Identities) -> dict[str, Any]:
    """JSON, as it is read back."""
    found: dict[str, Any] = {"settings": recipe.recorded(mode="json", exclude=_NOT_OF_INPUTS)}
    for role in ("teacher", "student"):
        model = identities.model(getattr(recipe.models, role))
        found[role] = None if model is None else short(model.weights_sha256)
    evaluations = ((f"eval.{name}", stage) for name, stage in recipe.eval.items())
    for name, stage in (("generate", recipe.generate), ("rollout", recipe.rollout), *evaluations):
        if stage is None:
            continue
        prompts = identities.prompts(stage.prompts, **selection_of(stage))
        found[f"{name} prompts"] = None if prompts is None else f"{prompts.num_prompts} ({short(prompts.sha256)})"
    return found
