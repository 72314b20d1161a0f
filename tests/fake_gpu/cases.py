"""The layouts and precisions that recipes and docs offer, a few layers each. Every field that matters is written here: shipped recipes may change."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from megatron_opd.estimate.known_models import KNOWN
from megatron_opd.estimate.workload import PROMPT_TOKENS
from megatron_opd.model.architecture import Architecture, parse_architecture
from megatron_opd.recipe.config import Recipe
from megatron_opd.recipe.files import build_recipe
from megatron_opd.recipe.training_stages import TrainerConfig

DENSE, MIXTURE = "Qwen3-8B", "Qwen3-30B-A3B"
OLDEST, NEWEST = "0.16.1", "0.19.2"
STEP = {"micro_batch_tokens": 16384, "max_response_tokens": 4096, "global_batch": 256, "recompute": "full"}


@dataclass(frozen=True)
class Case:
    """A training step of `stage` as rank `rank` of `gpus`; `fields` are the stage's, `versions` those of Megatron-Core that can run it."""

    id: str
    fields: dict[str, Any] = field(default_factory=dict)
    model: str = DENSE
    stage: str = "train"
    gpus: int = 8
    rank: int = 0
    layers: int = 2
    micro_batches: int = 2
    gpu: str = "h100"
    top_k: int = 0  # the teacher's candidates in the store
    with_te: bool = True
    versions: tuple[str, ...] = (OLDEST, NEWEST)

    @property
    def recipe(self) -> Recipe:
        models = {"student": f"models/{self.model}", "teacher": "models/Qwen3-32B"}
        sections = {"score": {"top_k": self.top_k}, self.stage: STEP | self.fields}
        return build_recipe({"name": "fake_gpu", "models": models} | sections)

    @property
    def config(self) -> TrainerConfig:
        return getattr(self.recipe, self.stage)

    @property
    def arch(self) -> Architecture:
        return replace(parse_architecture(KNOWN[self.model], self.model), num_layers=self.layers)

    @property
    def lengths(self) -> list[int]:
        """Sequences of a micro-batch, tokens: as many of the longest as fit, and the rest."""
        longest = min(PROMPT_TOKENS + (self.config.max_response_tokens or 16128), self.config.micro_batch_tokens)
        whole, rest = divmod(self.config.micro_batch_tokens, longest)
        return [longest] * whole + ([rest] if rest else [])

    @property
    def pipeline_stage(self) -> int:
        return self.rank // (self.gpus // self.config.parallel.pp)

    def to_json(self) -> dict[str, Any]:
        names = ("stage", "gpus", "rank", "layers", "micro_batches", "gpu", "top_k", "with_te", "model", "fields", "id")
        return {name: getattr(self, name) for name in names}


def layout(**sizes: Any) -> dict[str, Any]:
    return {"parallel": sizes}


def fp8(recipe: str, **options: Any) -> dict[str, Any]:
    return layout(tp=4) | {"fp8": {"recipe": recipe, **options}}


def precise(**options: Any) -> dict[str, Any]:
    return layout(tp=4) | {"precision_aware_optimizer": True, **options}


TP4, PP2, VPP2 = layout(tp=4), layout(tp=4, pp=2), layout(tp=4, pp=2, vpp=2)
EXPERTS = layout(tp=4, ep=8) | {"micro_batch_tokens": 12288}
AGAIN = {"recompute": "selective"}

DENSE_CASES = [
    Case("tp4", TP4),
    Case("tp4-rank5", TP4, rank=5),
    Case("sft", TP4 | {"micro_batch_tokens": 20480, "max_response_tokens": None}, stage="sft"),
    Case("tp1", layout(tp=1)),
    Case("tp2-tied", layout(tp=2), model="Qwen3-4B"),
    Case("tp4-no-sequence-parallel", layout(tp=4, sequence_parallel=False)),
    Case("k64", TP4 | {"loss": {"name": "reverse_kl"}}, top_k=64),
    Case("pp2-first", PP2, layers=4, micro_batches=4),
    Case("pp2-last", PP2, rank=4, layers=4, micro_batches=4),
    Case("vpp2-first", VPP2, layers=4, micro_batches=4),
    Case("vpp2-last", VPP2, rank=4, layers=4, micro_batches=4),
    Case("pp4-middle", layout(tp=2, pp=4), rank=3, layers=8, micro_batches=4),
    Case("uneven-stages", PP2, layers=5, micro_batches=2),
    Case("cp2", layout(tp=2, cp=2)),
    Case("cp2-rank3", layout(tp=2, cp=2), rank=3),
    Case("cp4", layout(tp=1, cp=4) | {"recompute": "none"}),
    Case("512-gpus", layout(tp=8, pp=2, vpp=2), model="Qwen3-32B", gpus=512, rank=300, layers=4, micro_batches=4),
    Case("recompute-none", TP4 | {"recompute": "none"}),
    Case("recompute-attention", TP4 | AGAIN | {"recompute_modules": ["core_attn"]}),
    Case("recompute-norms-mlp", TP4 | AGAIN | {"recompute_modules": ["layernorm", "mlp"]}),
    Case("replicated-optimizer", TP4 | {"distributed_optimizer": False}),
    Case("deterministic", TP4 | {"deterministic": True}),
    Case("fp8-delayed", fp8("delayed")),
    Case("fp8-tensorwise", fp8("tensorwise")),
    Case("fp8-tensorwise-parameters", fp8("tensorwise", parameters=True)),
    Case("fp8-blockwise", fp8("blockwise")),
    Case("fp8-blockwise-edges", fp8("blockwise", bf16_first_layers=1, bf16_last_layers=1), layers=4),
    Case("fp8-blockwise-parameters", fp8("blockwise", parameters=True)),
    Case("mxfp8", fp8("mxfp8"), gpu="b200"),
    Case("mxfp8-parameters", fp8("mxfp8", parameters=True), gpu="b200"),
    Case("moments-bf16", precise(moments_dtype="bfloat16", main_grads_dtype="bfloat16")),
    Case("moments-fp16", precise(moments_dtype="float16")),
    Case("moments-fp8", precise(moments_dtype="fp8")),
    Case("offload-half", precise(optimizer_offload=0.5)),
    Case("offload-half-bf16-grads", precise(optimizer_offload=0.5, main_grads_dtype="bfloat16")),
    Case("offload-all", precise(optimizer_offload=1.0)),
]
MIXTURE_CASES = [
    Case("moe", EXPERTS, model=MIXTURE),
    Case("moe-rank5", EXPERTS, model=MIXTURE, rank=5),
    Case("moe-sft", EXPERTS | {"micro_batch_tokens": 20480, "max_response_tokens": None}, model=MIXTURE, stage="sft"),
    Case("moe-ep1", EXPERTS | layout(tp=4), model=MIXTURE),
    Case("moe-64-gpus", EXPERTS, model=MIXTURE, gpus=64, rank=63),
    Case("moe-pp2", EXPERTS | layout(tp=4, ep=8, pp=2), model=MIXTURE, gpus=16, rank=15, layers=4),
    Case("moe-cp2", EXPERTS | layout(tp=2, ep=8, cp=2), model=MIXTURE, gpus=16, rank=15),
    Case("moe-recompute-none", EXPERTS | {"recompute": "none"}, model=MIXTURE),
    Case("moe-recompute-moe", EXPERTS | AGAIN | {"recompute_modules": ["moe"]}, model=MIXTURE),
    Case(
        "moe-recompute-act-norms",
        EXPERTS | AGAIN | {"recompute_modules": ["moe_act", "layernorm"]},
        model=MIXTURE,
    ),
    Case("moe-offload-all", EXPERTS | {"precision_aware_optimizer": True, "optimizer_offload": 1.0}, model=MIXTURE),
    Case("moe-fp8-delayed", EXPERTS | {"fp8": {"recipe": "delayed"}}, model=MIXTURE),
    Case("moe-fp8-blockwise", EXPERTS | {"fp8": {"recipe": "blockwise"}}, model=MIXTURE, versions=(NEWEST,)),
]
LOCAL_CASES = [
    Case("no-te", TP4, with_te=False),
    Case("no-te-moe", EXPERTS, model=MIXTURE, with_te=False),
]
CASES = [*DENSE_CASES, *MIXTURE_CASES, *LOCAL_CASES]
