"""Evaluations during a training: which they are, and what would make them fail, before anything is loaded."""

from __future__ import annotations

import torch

from megatron_opd.errors import ConfigError
from megatron_opd.evaluate.chosen import check_code_allowed
from megatron_opd.evaluate.run import read_questions, sample_stage
from megatron_opd.hf.lineage import load_tokenizer
from megatron_opd.recipe.config import Recipe
from megatron_opd.recipe.evaluation import Evaluation
from megatron_opd.recipe.training_stages import TrainerConfig
from megatron_opd.records import Lineage
from megatron_opd.serve.encode import uses_template
from megatron_opd.serve.opening import uses_sglang
from megatron_opd.serve.sample import prompt_format


def check_evals(recipe: Recipe, name: str, config: TrainerConfig, lineage: Lineage) -> None:
    """Raise UserError for what would make the evaluations of stage `name` fail, as far as it can be known before anything is loaded.

    lineage: of the student that training makes.
    """
    if config.eval_every is None:
        return
    sections = {eval_name: recipe.eval[eval_name] for eval_name in config.evals or []}
    check_code_allowed(sections)
    engine, field = recipe.engine_for(config.init), f"{name}.eval_every = {config.eval_every}"
    if engine.launch is not None or (uses_sglang(engine) and not engine.urls):
        raise ConfigError(
            f"{field}: servers of engine.launch live for one stage, and would want the GPUs of training; start one that serves {config.init}, "
            f"and give its address (engine.launch=null engine.urls=[...]), or leave {name}.eval_every out"
        )
    if not uses_sglang(engine) and engine.device != "cpu" and (engine.device != "auto" or torch.cuda.is_available()):
        raise ConfigError(
            f"{field}: the transformers engine would share the first rank's GPU with training, which fills it; take engine.device=cpu, a "
            f"server on other GPUs (engine.urls=[...]), or leave {name}.eval_every out"
        )
    for eval_name, stage in sections.items():
        found = evaluation_under_way(recipe, config, eval_name, model=config.init, label=name, output=config.output)
        _, prompts = read_questions(found)
        templated = [uses_template(prompt, stage.encoding) for prompt in prompts]
        allowed, section = stage.allow_template_mismatch, f"eval.{eval_name}"
        prompt_format(sample_stage(found), load_tokenizer(config.init), templated, lineage, allow_mismatch=allowed, section=section)


def evaluation_under_way(recipe: Recipe, config: TrainerConfig, name: str, *, model: str, label: str, output: str) -> Evaluation:
    """[eval.NAME] for weights under way: fewer prompts, no teacher and no baseline."""
    stage = recipe.eval[name]
    counts = [count for count in (stage.num_prompts, config.eval_prompts) if count is not None]
    update = {"num_prompts": min(counts, default=None), "teacher": None, "baseline": None, "output": output}
    return Evaluation.model_validate(dict(stage) | update | {"name": name, "label": label, "model": model})
