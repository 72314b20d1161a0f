"""The stages of a recipe: generate, sft, rollout, score, train, eval; check and progress."""

from __future__ import annotations

import argparse
from dataclasses import replace

from megatron_opd.commands.options import Stages, a_gib, a_path, a_positive, add_round, add_servers, flag_overrides, recipe_stage, round_of
from megatron_opd.cost.gpus import GPUS, Gpu
from megatron_opd.errors import UserError
from megatron_opd.evaluate.chosen import list_evaluations
from megatron_opd.recipe.config import Recipe, require
from megatron_opd.recipe.evaluation import is_model, is_name, output_of
from megatron_opd.recipe.files import apply_overrides, build_recipe
from megatron_opd.recipe.rounds import round_recipe


def add_to(stages: Stages) -> None:
    generate = recipe_stage(stages, "generate", "teacher answers for SFT, into a store", _generate, sharded=True)
    sft = recipe_stage(stages, "sft", "fine-tune the base student on the teacher's answers", _sft, trains=True)
    rollout = recipe_stage(stages, "rollout", "responses of the fine-tuned student, into a store", _rollout, sharded=True)
    rollout.add_argument("--sft-teacher", metavar="DIR", help="declare the SFT teacher of a student that was fine-tuned elsewhere")
    for command in (generate, rollout):
        command.add_argument(
            "--extend",
            action="store_true",
            help="the store may hold the first of these prompts, or fewer samples of each; what is new is made, what it has stays",
        )
    score = recipe_stage(stages, "score", "the teacher's log-probabilities of the rollouts, into the same store", _score, sharded=True)
    train = recipe_stage(stages, "train", "distil on the scored rollouts", _train, trains=True)
    evaluation = recipe_stage(
        stages, "eval", "accuracy, and reverse KL to the teacher, of models; a table of all that were made", _eval, names="EVALUATION"
    )
    evaluation.add_argument(
        "--of",
        nargs="+",
        action="extend",
        default=[],
        metavar="MODEL",
        help="teacher, base (the student before SFT), sft, round-N, opd, or LABEL=DIRECTORY (default: the evaluation's models)",
    )
    add_servers(evaluation)
    evaluate_recipe = evaluation.get_default("run")
    evaluation.set_defaults(run=lambda args, arguments: evaluate_recipe(_sort_words(args), arguments))
    check = recipe_stage(stages, "check", "is everything ready to train? Would it fit (--gpus)? Do the engines agree (--model)?", _check)
    check.add_argument(
        "--stage",
        choices=("inputs", "sft", "train"),
        default="train",
        help="what shall start: 'inputs' looks at what you bring (models, prompt files), before anything has run",
    )
    check.add_argument(
        "--gpus", type=a_positive, metavar="N", help="estimate cost and memory of every stage on N GPUs in all, before anything has run"
    )
    check.add_argument(
        "--nodes",
        type=a_positive,
        metavar="N",
        help="on how many nodes these GPUs are (without --gpus: nodes of 8); refused if nothing would fit",
    )
    check.add_argument("--gpu", choices=sorted(GPUS), help="which GPUs, for --gpus and --nodes (default: h100)")
    check.add_argument("--gpu-memory", type=a_gib, metavar="GIB", help="memory of one GPU, if it is another than that kind's")
    check.add_argument(
        "--node-memory", type=a_gib, metavar="GIB", help="a node's own memory: refused if a save or the optimizer needs more"
    )
    check.add_argument(
        "--simulate",
        action="store_true",
        help="with --gpus or --nodes: run each training's step on simulated GPUs (docs/simulation.md): memory by place, waits, messages",
    )
    check.add_argument("--rank", type=int, metavar="R", help="with --simulate: this rank alone (default: the first of each pipeline stage)")
    check.add_argument("--layers", type=a_positive, metavar="L", help="with --simulate: fewer layers than the student has, to be quick")
    check.add_argument("--no-te", action="store_true", help="with --simulate: Megatron-Core's local layers, as without Transformer Engine")
    check.add_argument(
        "--model", type=a_path, metavar="DIR", help="instead of a recipe give a store, and here its student: compares SGLang and Megatron"
    )
    check.add_argument("--rollouts", type=a_positive, default=64, metavar="N", help="with --model: rollouts to compare on")
    check.add_argument(
        "--engines",
        action="store_true",
        help="compare the engine that sampled the rollouts with Megatron on the student, and record the gap",
    )
    check.add_argument(
        "--ranks", type=a_positive, metavar="N", help="how many processes will train: refused if the layout can't be made of them"
    )
    add_servers(check)
    with_recipe = check.get_default("run")
    check.set_defaults(run=lambda args, arguments: _calibrate(args) if args.model else with_recipe(args, arguments))
    for command in (score, train, check):
        command.add_argument(
            "--allow-teacher-mismatch",
            action="store_true",
            help="go on with a teacher that is not the SFT teacher; recorded for ever after",
        )
    for command in (sft, train, check):
        command.add_argument(
            "--continue-with-changes",
            action="store_true",
            help="go on in the output folder of a run that had another loss, teacher or initial model; recorded for ever after",
        )
    for command in (rollout, score, train, check):
        add_round(command)


def _generate(recipe: Recipe, args: argparse.Namespace) -> None:
    from megatron_opd.serve.sample import generate
    from megatron_opd.serve.stage import Shard

    generate(recipe, Shard.parse(args.shard), extend=args.extend)


def _rollout(recipe: Recipe, args: argparse.Namespace) -> None:
    from megatron_opd.serve.sample import rollout
    from megatron_opd.serve.stage import Shard

    rollout(recipe, Shard.parse(args.shard), number=round_of(recipe, args), extend=args.extend)


def _score(recipe: Recipe, args: argparse.Namespace) -> None:
    from megatron_opd.serve.score import score
    from megatron_opd.serve.stage import Shard

    score(recipe, Shard.parse(args.shard), number=round_of(recipe, args))


def _sft(recipe: Recipe, args: argparse.Namespace) -> None:
    from megatron_opd.train.loop import run_sft

    run_sft(recipe, allow_changes=args.continue_with_changes)


def _train(recipe: Recipe, args: argparse.Namespace) -> None:
    from megatron_opd.train.loop import run_train

    run_train(recipe, number=round_of(recipe, args), allow_changes=args.continue_with_changes)


def _sort_words(args: argparse.Namespace) -> argparse.Namespace:
    """Names of evaluations, and overrides that stand behind --of, where these belong."""
    args.names = [word for word in args.overrides if "=" not in word]
    left = {word: word.partition("=")[0] for word in args.of if "=" in word}
    fields = [word for word, name in left.items() if not is_name(name) or (name in Recipe.model_fields and not is_model(name))]
    args.overrides = [word for word in args.overrides if "=" in word] + fields
    args.of = [word for word in args.of if word not in fields]
    return args


def _eval(recipe: Recipe, args: argparse.Namespace) -> None:
    from megatron_opd.evaluate.run import evaluate
    from megatron_opd.evaluate.side_by_side import made, text

    names = list(dict.fromkeys(args.names)) or list(require(recipe.eval or None, "eval.NAME"))
    evaluate(recipe, list_evaluations(recipe, names, args.of))
    print(f"\n{text(made(output_of(recipe.run_dir) / name for name in names), names)}")


def _simulate(recipe: Recipe, args: argparse.Namespace, gpus: int, gpu: Gpu) -> int:
    from megatron_opd.simulate.check import Request, simulate_recipe

    overrides = args.overrides + flag_overrides(args)
    return simulate_recipe(recipe, Request(args.recipe, overrides, gpus, gpu, args.rank, args.layers, not args.no_te))


def _check(recipe: Recipe, args: argparse.Namespace) -> int:
    for option in ("rank", "layers", "no_te"):
        value = getattr(args, option)
        if value is not None and value is not False and not args.simulate:  # a rank may be 0
            raise UserError(f"--{option.replace('_', '-')} is for a simulation: add --simulate")
    if args.gpus is not None or args.nodes is not None:
        from megatron_opd.estimate.allocation import allocation_of, check_allocation
        from megatron_opd.estimate.recipe import estimate_recipe

        gpu = GPUS[args.gpu or "h100"]
        gpu = replace(gpu, memory_gib=args.gpu_memory or gpu.memory_gib)
        allocation = allocation_of(args.gpus, args.nodes, args.node_memory)
        if args.simulate:
            if args.node_memory is not None:
                raise UserError("--node-memory is for the estimate, as a simulation is of one rank: leave it out, or --simulate")
            for note in check_allocation(recipe, allocation):
                print(note, flush=True)
            return _simulate(recipe, args, allocation.gpus, gpu)
        print("\n".join(estimate_recipe(recipe, allocation, gpu)))
        return 0
    if args.simulate:
        raise UserError("--simulate needs the number of GPUs: add --gpus N")
    for option, value in (("--gpu-memory", args.gpu_memory), ("--node-memory", args.node_memory), ("--gpu", args.gpu)):
        if value is not None:
            raise UserError(f"{option} is for the estimate, which needs the number of GPUs too: add --gpus N")
    if args.stage == "inputs":
        from megatron_opd.checks.inputs import check_inputs, raise_faults
        from megatron_opd.pipeline.inputs_record import record_inputs

        found = check_inputs(recipe, ranks=args.ranks)
        for line in found.lines:
            print(line)
        raise_faults(found.faults)
        record_inputs(recipe)
        return 0
    if args.engines:
        from megatron_opd.checks.calibrate import check_engines

        return check_engines(recipe)
    import torch

    from megatron_opd.data.joined import show_stores
    from megatron_opd.train.readiness import check_start

    if torch.cuda.is_available():
        try:
            torch.cuda.init()  # the notes then say which layers this GPU gets
        except RuntimeError as error:
            print(f"this GPU can't be asked which layers it gets: {error}")
    number = round_of(recipe, args) if args.stage == "train" else None
    ready = check_start(recipe, args.stage, number=number, ranks=args.ranks, allow_changes=args.continue_with_changes)
    for note in ready.notes:
        print(note)
    if args.stage == "sft":
        print(f"ready to fine-tune {ready.init.short()} on {show_stores(recipe.sft.store)}")
    else:
        store = round_recipe(recipe, number).train.store
        print(f"ready to train {ready.init.short()} on {show_stores(store)} with teacher {recipe.train.teacher!r}")
    return 0


def _calibrate(args: argparse.Namespace) -> int:
    from megatron_opd.checks.calibrate import calibrate

    tree = apply_overrides({}, args.overrides + flag_overrides(args))
    recipe = build_recipe({"name": "check", "models": {"teacher": args.model, "student": args.model}} | tree, "check")
    return calibrate(args.recipe, args.model, recipe.engine.serving("student"), rollouts=args.rollouts, max_gap=recipe.train.max_engine_gap)
