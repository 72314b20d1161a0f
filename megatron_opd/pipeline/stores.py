"""What a store's manifests say, without its arrays: enough to tell how far it is and what it was made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_opd.data.joined import store_list
from megatron_opd.data.location import Location
from megatron_opd.data.manifests import part_id, part_number, read_manifest, read_part, read_scores
from megatron_opd.recipe.config import EvalStage, SampleStage
from megatron_opd.recipe.inference import EncodingConfig
from megatron_opd.records import PromptFile, SamplingParams
from megatron_opd.store_records import PartManifest, ScoreManifest, StoreManifest


@dataclass(frozen=True)
class Glance:
    """The manifests of a store, of its sealed parts, and of a teacher's scores of them."""

    manifest: StoreManifest
    parts: dict[int, PartManifest]
    scores: dict[int, ScoreManifest]

    @property
    def num_rollouts(self) -> int:
        """Those that training gets: sampled, and not without scores where there are any."""
        sampled = sum(record.num_rollouts for record in self.parts.values())
        return sampled - sum(len(record.excluded) for record in self.scores.values())


def glance(address: str, teacher: str | None = None) -> Glance | None:
    """None where no store is. Raises StoreError for a manifest that is damaged."""
    location = Location(address)
    if location.read_attributes("") is None:
        return None
    manifest, identity = read_manifest(location)
    parts, scores = {}, {}
    for number in sorted(number for name in location.children("parts") if (number := part_number(name)) is not None):
        own = part_id(manifest, identity, number)
        if (found := read_part(location, number, own)) is None:
            continue
        parts[number] = found[0]
        if teacher is not None and (scored := read_scores(location, found[0], teacher, own)) is not None:
            scores[number] = scored[0]
    return Glance(manifest, parts, scores)


def glance_at_all(store: str | list[str], teacher: str | None = None) -> Glance | None:
    """The stores of a training as one, parts numbered on from store to store; None unless all of them are there."""
    found = [glance(address, teacher) for address in store_list(store)]
    there = [one for one in found if one is not None]
    if not there or len(there) < len(found):
        return None
    firsts = np.cumsum([0, *(one.manifest.num_parts for one in there)]).tolist()
    parts = {first + number: record for first, one in zip(firsts, there, strict=False) for number, record in one.parts.items()}
    scores = {first + number: record for first, one in zip(firsts, there, strict=False) for number, record in one.scores.items()}
    return Glance(there[0].manifest, parts, scores)


def differences(there: Any, here: Any, name: str = "") -> list[str]:
    """'temperature 1.0 there, 0.8 here' for each field that both have and that is not the same."""
    if isinstance(there, dict) and isinstance(here, dict):
        return [text for key in there if key in here for text in differences(there[key], here[key], f"{name}.{key}".lstrip("."))]
    return [] if there == here else [f"{name} {_shown(there)} there, {_shown(here)} here"]


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)[:80]


def sampling_differences(manifest: StoreManifest, stage: SampleStage | EvalStage, sampling: SamplingParams) -> list[str]:
    """How the recipe asks for responses otherwise than they were asked for."""
    found = differences(manifest.sampling.model_dump(), sampling.model_dump())
    encoding, there = stage.encoding.recorded(), EncodingConfig.model_validate(manifest.encoding).recorded()
    if "date_string" not in encoding:  # filled in for a template that prints one
        there.pop("date_string", None)
    found += differences(dict.fromkeys(encoding) | there, dict.fromkeys(there) | encoding, "encoding")
    if isinstance(stage, SampleStage):
        found += differences(manifest.prompts_per_part, stage.prompts_per_part, "prompts_per_part")
    return found


def prompt_difference(there: PromptFile, here: PromptFile | None) -> str | None:
    """Which prompts were asked, and which would be now."""
    if here is None or there.sha256 == here.sha256:
        return None
    return f"prompts {there.num_prompts} ({short(there.sha256)}) there, {here.num_prompts} ({short(here.sha256)}) here"


def short(digest: str) -> str:
    return digest[:6]
