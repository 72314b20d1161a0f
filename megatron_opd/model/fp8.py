"""FP8 by Transformer Engine: what each recipe needs, and Megatron-Core's fields for it.

Sources: Transformer Engine's `transformer_engine.common.recipe` and Megatron-Core's `fp8_utils.get_fp8_recipe` for the versions;
FP8 tensor cores come with compute capability 8.9, DeepSeek-style block scaling is for Hopper, MXFP8 for Blackwell.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import megatron.core
import torch

from megatron_opd.errors import UserError
from megatron_opd.model.architecture import Architecture
from megatron_opd.recipe.layout import Fp8Config, ParallelConfig


@dataclass(frozen=True)
class Machine:
    """What decides whether a recipe can run: the GPU's compute capability and Transformer Engine's version, None where absent."""

    capability: tuple[int, int] | None
    transformer_engine: tuple[int, int] | None


# 0.16.1 fails when it saves experts whose FP8 recipe has no state; versions between were not looked at.
_EXPERTS_NEED = (0, 19)
# With FP8 parameters; older versions were not looked at.
_PARAMETERS_NEED = (2, 4)
# recipe: (Transformer Engine at least, compute capability at least and below)
_NEEDS = {
    "delayed": ((1, 0), (8, 9), (99, 0)),
    "tensorwise": ((2, 2), (8, 9), (99, 0)),
    "blockwise": ((2, 3), (9, 0), (10, 0)),
    "mxfp8": ((2, 1), (10, 0), (99, 0)),
}


def uses_transformer_engine() -> bool:
    """True on a GPU with Transformer Engine."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return torch.cuda.is_available() and bool(HAVE_TE)


def this_machine() -> Machine:
    """The first GPU and the installed Transformer Engine."""
    from megatron.core.utils import get_te_version

    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    version = None
    if uses_transformer_engine():
        release: Any = get_te_version()
        version = (release.major, release.minor)
    return Machine(capability, version)


def check_fp8(fp8: Fp8Config, machine: Machine) -> None:
    """Raise UserError, saying what is missing, unless `machine` can run the recipe; nothing else is ever run in its place."""
    engine, least, below = _NEEDS[fp8.recipe]
    if fp8.parameters:
        engine = max(engine, _PARAMETERS_NEED)
    faults = []
    if machine.capability is None:
        faults.append("there is no GPU here")
    elif not least <= machine.capability < below:
        wanted = f"at least {_dotted(least)}" + (f" and below {_dotted(below)}" if below < (99, 0) else "")
        faults.append(f"it needs a GPU of compute capability {wanted}, this one has {_dotted(machine.capability)}")
    if machine.transformer_engine is None:
        faults.append(f"Transformer Engine {_dotted(engine)} or newer is not installed")
    elif machine.transformer_engine < engine:
        faults.append(f"it needs Transformer Engine {_dotted(engine)} or newer, {_dotted(machine.transformer_engine)} is installed")
    if faults:
        raise UserError(f"fp8.recipe = {fp8.recipe!r} can't run: {'; '.join(faults)}. {_suggest(machine)}")


def _suggest(machine: Machine) -> str:
    able = [
        recipe
        for recipe, (engine, least, below) in _NEEDS.items()
        if machine.capability
        and machine.transformer_engine
        and least <= machine.capability < below
        and machine.transformer_engine >= engine
    ]
    return f"Here can run: {', '.join(able)}" if able else "Leave fp8 out to train in bfloat16"


def _dotted(pair: tuple[int, int]) -> str:
    return f"{pair[0]}.{pair[1]}"


def fp8_options(fp8: Fp8Config | None, arch: Architecture, parallel: ParallelConfig) -> dict[str, Any]:
    """TransformerConfig's fields. Raises UserError for a machine or a model that the recipe does not fit."""
    if fp8 is None:
        return {}
    check_fp8(fp8, this_machine())
    found = tuple(map(int, megatron.core.__version__.split(".")[:2]))
    if arch.num_experts and fp8.recipe != "delayed" and found < _EXPERTS_NEED:
        raise UserError(
            f"fp8.recipe = {fp8.recipe!r} with experts needs Megatron-Core {_dotted(_EXPERTS_NEED)} (this is {megatron.core.__version__}): older ones can't "
            "save a checkpoint of it; use 'delayed', or leave fp8 out"
        )
    return megatron_fp8_fields(fp8, arch, parallel)


def megatron_fp8_fields(fp8: Fp8Config, arch: Architecture, parallel: ParallelConfig) -> dict[str, Any]:
    """The fields alone, whatever the machine. Raises UserError if the layers kept in bfloat16 don't fit one pipeline stage."""
    if faults := arch.fp8_faults(fp8, parallel):
        raise UserError("; ".join(faults))
    chosen = fp8.format if fp8.format != "auto" else "hybrid" if fp8.recipe in ("delayed", "tensorwise") else "e4m3"
    return {
        "fp8": chosen,
        "fp8_recipe": fp8.recipe,
        "fp8_param": fp8.parameters,
        "first_last_layers_bf16": bool(fp8.bf16_first_layers or fp8.bf16_last_layers),
        "num_layers_at_start_in_bf16": fp8.bf16_first_layers,
        "num_layers_at_end_in_bf16": fp8.bf16_last_layers,
    }
