"""What a seed begins with: teachers, a student before SFT, prompts that no other seed has."""

from __future__ import annotations

from megatron_opd.demo import arithmetic, sentences, smollm2
from megatron_opd.demo.run import CUT, STUDENT, copy_teacher

from .plan import Replicate
from .subject import SMOLLM2

TEACHERS = {"teacher-a": "teacher", "teacher-b": "swapped_teacher"}  # in a seed's folder; as they are shipped


def prepare(replicate: Replicate) -> None:
    """May be run again. Raises UserError where the real language model's packages are missing."""
    settings, folder = replicate.settings, replicate.folder
    if replicate.subject is SMOLLM2:
        smollm2.make_teacher(folder / "teacher-a")
        smollm2.make_student(folder / "teacher-a", folder / "student", **CUT)
        write_prompts = sentences.write_prompts
    else:
        for name, shipped in TEACHERS.items():
            copy_teacher(shipped, folder / name)
        if not (folder / "student").exists():
            arithmetic.LANGUAGE.make_model_dir(folder / "student", **STUDENT | {"seed": replicate.seed})
        write_prompts = arithmetic.write_prompts
    prompts = {"sft-a": settings.sft_prompts, "sft-b": settings.sft_b_prompts, "rollout": settings.prompts, "eval": settings.eval_prompts}
    for name, count in prompts.items():
        path = folder / "prompts" / f"{name}.jsonl"
        if not path.exists():
            write_prompts(path, split=name.partition("-")[0], count=count, seed=replicate.seed)
