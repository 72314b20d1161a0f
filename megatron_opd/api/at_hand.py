"""What lies beside a store that a run made: the prompts with their texts and answers."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_opd.data.location import Location
from megatron_opd.data.prompts import read_prompts
from megatron_opd.data.store import StoreReader
from megatron_opd.errors import StoreError, UserError
from megatron_opd.recipe.config import Recipe, SampleStage
from megatron_opd.recipe.evaluation import output_of
from megatron_opd.records import Prompt
from megatron_opd.serve.sample import read_stage_prompts
from megatron_opd.serve.store_run import find_run


def find_prompts(reader: StoreReader, given: str | Path | None = None) -> tuple[list[Prompt] | None, str]:
    """The prompts that a store was sampled from, in their order, with answers, or None; and a sentence that says where they are from, or why not.

    `given`: the prompt file, of which the store holds the first prompts, or those drawn by its seed (each but once, if that is what it
    holds). Which `dates` a store is of, or which share of the prompts, only its run's recipe says. Raises StoreError if the file holds
    others, UserError for what is no prompt file.
    """
    wanted = reader.manifest.all_prompts
    if given is not None:
        split = "test" if reader.manifest.sampler_role == "evaluation" else "train"
        seed = reader.manifest.provenance.get("subset_seed")
        for unique in (False, True):
            try:
                found, prompts = read_prompts(given, limit=wanted.num_prompts, subset_seed=seed, unique=unique, split=split)
            except UserError:
                if not unique:
                    raise
                break
            if found.sha256 == wanted.sha256:
                return prompts, f"from {given}"
        which = "the first" if seed is None else f"those that subset_seed = {seed} draws:"
        raise StoreError(
            f"{reader.location.url}: was sampled from other prompts ({wanted.name}, sha256 {wanted.sha256[:12]}) than {which} "
            f"{wanted.num_prompts} of {given}; give the file that it was sampled from, as it was then. A store that is of some dates, or of a "
            "round's share of the prompts, finds its own in the run's folder: open it there, without prompts"
        )
    run = find_run(reader)
    stage = None if run is None else _stage_of(run, reader.location)
    if stage is None:
        return None, f"no run beside the store says where {wanted.name} is; open the store with prompts=FILE"
    try:
        found, prompts = read_stage_prompts(stage, role=reader.manifest.sampler_role, answers=True)
    except UserError as error:
        return None, str(error)
    if found.sha256 != wanted.sha256:
        return None, f"{stage.prompts} holds other prompts by now; open the store with prompts=FILE"
    return prompts, f"from {stage.prompts}"


def _stage_of(run: Recipe, location: Location) -> SampleStage | None:
    """The stage of a run that sampled the store."""
    place = os.path.realpath(location.root)
    for stage in (run.rollout, run.generate):
        if stage is not None and os.path.realpath(stage.store) == place:
            return stage
    for name, evaluation in run.eval.items():
        if os.path.dirname(place) == os.path.realpath(output_of(run.run_dir) / name):
            fields = {field: getattr(evaluation, field) for field in SampleStage.model_fields.keys() & type(evaluation).model_fields.keys()}
            return SampleStage(**fields, model="", store=location.root)
    return None
