"""Commands on data: import, derive."""

from __future__ import annotations

import argparse
import json
import os

from megatron_opd.commands.options import OVERRIDES, Stages, a_path, add_round, add_servers, flag_overrides, recipe_stage, round_of
from megatron_opd.errors import UserError
from megatron_opd.hf.lineage import keep_hashes_in
from megatron_opd.recipe.config import Recipe, require
from megatron_opd.recipe.derivation import METHODS
from megatron_opd.recipe.files import apply_overrides, build_recipe


def add_to(stages: Stages) -> None:
    parser = stages.add_parser(
        "import",
        help="responses that another program made, into a store",
        description="Bring SFT answers or rollouts from JSONL or Parquet into a store, as token ids or as text. Missing log-probabilities are computed.",
    )
    parser.add_argument(
        "file", type=a_path, metavar="FILE", help="JSONL or Parquet file, or a dataset's folder: a prompt and a response a row"
    )
    parser.add_argument("store", type=a_path, metavar="STORE", help="store directory or fsspec URL to make or to go on with")
    parser.add_argument(
        "overrides", nargs="*", metavar="FIELD=VALUE", help=f"{OVERRIDES}: here those of [generate] or [rollout], and [engine]"
    )
    parser.add_argument(
        "--model", type=a_path, required=True, metavar="DIR", help="the model that made the responses, which is declared hereby"
    )
    parser.add_argument(
        "--role", choices=("teacher", "student"), required=True, help="'teacher': answers for SFT; 'student': rollouts to distil on"
    )
    parser.add_argument("--sft-teacher", metavar="DIR", help="declare the SFT teacher of a student that was fine-tuned elsewhere")
    parser.add_argument(
        "--response", metavar="FIELD", help="the field that holds the response, where it has another name than the usual ones"
    )
    parser.add_argument(
        "--compute-logprobs", action="store_true", help="compute log-probabilities with the model, also where the file has some"
    )
    parser.add_argument("--extend", action="store_true", help="the file has grown at its end: import what is new into the same store")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="make the parts p with p %% N == I, beside other workers")
    add_servers(parser)
    parser.set_defaults(run=_import)
    parser = recipe_stage(
        stages,
        "derive",
        "scores made of the teacher's ([score.derived.NAME]), into the same store; no model is needed",
        _derive,
        names="NAME",
    )
    add_round(parser)
    parser.add_argument(
        "--as",
        dest="as_name",
        metavar="NAME",
        help="instead of a recipe give a store: its derived teacher NAME; overrides are fields of its own",
    )
    parser.add_argument("--teacher", metavar="NAME", help="with --as: the teacher that it is made of (default: teacher)")
    parser.add_argument("--method", choices=METHODS, help="with --as: how (default: residualize)")
    with_recipe = parser.get_default("run")
    parser.set_defaults(run=lambda args, arguments: _derive_store(args) if args.as_name else with_recipe(_sort_names(args), arguments))


def _import(args: argparse.Namespace, arguments: list[str]) -> None:
    from megatron_opd.serve.import_responses import import_responses
    from megatron_opd.serve.stage import Shard

    section = "rollout" if args.role == "student" else "generate"
    if args.sft_teacher and args.role == "teacher":
        raise UserError("--sft-teacher is of a student whose rollouts are imported (--role student); a teacher has none")
    given = {"model": args.model, "prompts": args.file, "store": args.store}
    run_dir = "runs/import" if "://" in args.store else os.path.dirname(os.path.abspath(args.store))
    tree = {"name": "import", "run_dir": run_dir, "models": {"teacher": args.model, "student": args.model}, section: given}
    recipe = build_recipe(apply_overrides(tree, args.overrides + flag_overrides(args)), "import")
    stage = require(recipe.rollout if section == "rollout" else recipe.generate, section)
    changed = [key for key, value in given.items() if getattr(stage, key) != value]
    if changed:
        raise UserError(f"{section}.{changed[0]} is what the command line says ({json.dumps(given[changed[0]])}); leave the override out")
    keep_hashes_in(recipe.run_dir)
    import_responses(
        stage,
        recipe.engine_for(args.model),
        role=args.role,
        run_dir=recipe.run_dir,
        shard=Shard.parse(args.shard),
        field=args.response,
        compute_log_probs=args.compute_logprobs,
        extend=args.extend,
    )


def _sort_names(args: argparse.Namespace) -> argparse.Namespace:
    """Names of derived teachers stand among the overrides."""
    args.names = [word for word in args.overrides if "=" not in word]
    args.overrides = [word for word in args.overrides if "=" in word]
    for option in ("teacher", "method"):
        if getattr(args, option) is not None:
            raise UserError(f"--{option} is for a store and a name (--as NAME); a recipe says it in [score.derived.NAME]")
    return args


def _derive(recipe: Recipe, args: argparse.Namespace) -> None:
    from megatron_opd.serve.derive import derive_recipe

    derive_recipe(recipe, args.names, number=round_of(recipe, args))


def _derive_store(args: argparse.Namespace) -> None:
    from megatron_opd.serve.derive import derive_all

    if odd := [word for word in args.overrides if "=" not in word]:
        raise UserError(f"{odd[0]!r}: with --as one teacher is made; FIELD=VALUE is expected, for example smoothing=5")
    stage = {
        "store": args.recipe,
        "teacher": args.teacher or "teacher",
        "derived": {args.as_name: {"method": args.method or "residualize"}},
    }
    tree = {"name": "derive", "models": {"teacher": "unknown", "student": "unknown"}, "score": stage}
    fields = [f"score.derived.{args.as_name}.{word}" for word in args.overrides]
    recipe = build_recipe(apply_overrides(tree, fields), "derive")
    derive_all(recipe.score, recipe.score.derived, run_dir=None)
