"""Which engine a recipe names, opened for a model."""

from __future__ import annotations

from pathlib import Path

from megatron_opd.errors import ConfigError
from megatron_opd.recipe.inference import EngineConfig
from megatron_opd.serve.engine import Engine


def uses_sglang(config: EngineConfig) -> bool:
    """Whether `open_engine` opens SGLang."""
    return config.kind == "sglang" or (config.kind == "auto" and bool(config.urls or config.launch))


def open_engine(
    config: EngineConfig, model: str | Path, *, log_dir: str | Path = "logs", first_gpu: int = 0, reclaim: Path | None = None
) -> Engine:
    """The engine that `config` names for a Hugging Face directory. 'auto': SGLang if urls or launch are given, else transformers.

    Servers that are launched write their output below `log_dir` and take this machine's GPUs from `first_gpu` on. Running ones that have weights
    from below the folder `reclaim` take the model's.
    """
    if config.urls and config.launch is not None:
        raise ConfigError("engine.urls and engine.launch are both given; use running servers, or let the stage start its own")
    if uses_sglang(config):
        if not config.urls and config.launch is None:
            raise ConfigError(
                "engine.kind is 'sglang' but there are no servers; give addresses (--url http://127.0.0.1:30000) or start some (--launch 1)"
            )
        from megatron_opd.serve.sglang import SglangEngine

        return SglangEngine(config, model, log_dir=log_dir, first_gpu=first_gpu, reclaim=reclaim)
    if config.urls or config.launch:
        raise ConfigError("engine.urls or engine.launch are given but engine.kind is 'transformers'; drop one of them")
    from megatron_opd.serve.transformers_engine import TransformersEngine

    return TransformersEngine(config, model)
