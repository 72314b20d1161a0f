"""Did the installed version of transformers read the model that config.json means? Compared after it has loaded it."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from megatron_opd.errors import UserError
from megatron_opd.hf.model_config import MODEL_TYPES, read_rope, spell_for_all

_TOLERANCE = 1e-5  # relative; two RoPE bases that people use differ by far more


def check_loaded(model: Any, config: dict[str, Any], where: str) -> None:
    """Raise UserError if the loaded model rotates positions otherwise than config.json says, or has another head.

    Older versions know other fields for RoPE, ignore those that they don't know and take a default. The rotation is compared with
    what this version makes of the same config in which every version's fields are filled in.
    """
    if model.config.model_type not in MODEL_TYPES.values():
        return
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    if tied != bool(config.get("tie_word_embeddings")):
        said = "ties the LM head to the embedding" if tied else "has an LM head of its own"
        raise UserError(
            f"{where}: transformers {transformers.__version__} {said}, but tie_word_embeddings = {config.get('tie_word_embeddings')!r}; "
            "keep the field and the weights in agreement, or use another version"
        )
    rotary = getattr(getattr(model, "model", None), "rotary_emb", None)
    if rotary is None:
        return
    spelled = type(model.config).from_dict(spell_for_all(config, where))
    wanted, found = type(rotary)(config=spelled).inv_freq.float().cpu(), rotary.inv_freq.float().cpu()
    if wanted.shape != found.shape or not torch.allclose(wanted, found, rtol=_TOLERANCE, atol=0):
        rope = read_rope(config, where)
        raise UserError(
            f"{where}: RoPE is {rope} with theta {rope.theta!r}, but transformers {transformers.__version__} reads other fields and would make another "
            f"model of it; write rope_theta, rope_scaling and rope_parameters alike ('megatron-opd convert' does), or use transformers 5"
        )
