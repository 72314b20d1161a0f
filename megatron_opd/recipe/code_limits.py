"""What a program may take: the recipe's section `eval.NAME.code`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_opd.recipe.layout import LONGEST, MOST, Section, source

Mode = Literal["namespaces", "bubblewrap", "plain"]


class CodeLimits(Section):
    """Limits of one program at one test, and how it is isolated."""

    seconds: float = Field(
        default=6.0,
        ge=0.05,
        le=LONGEST,
        description="seconds of CPU time at a test (HumanEval gives 3)",
        json_schema_extra=source("LiveCodeBench"),
    )
    wall_seconds: float = Field(default=60.0, ge=0.1, le=LONGEST, description="seconds by the clock at a test, for a program that waits")
    memory_mib: int = Field(default=2048, ge=64, le=MOST, description="MiB of address space of the program")
    disk_mib: int = Field(default=16, ge=1, le=4096, description="MiB that it may keep in its folder; in memory, on top of memory_mib")
    output_mib: int = Field(default=16, ge=1, le=1024, description="MiB that it may print at a test, or return")
    threads: int = Field(default=32, ge=1, le=1024, description="threads at a time; a program is one process")
    isolation: Literal["auto", Mode] = Field(
        default="auto", description="'auto': the first of these that the machine has; docs/code_grading.md"
    )
    python: str | None = Field(
        default=None, description="interpreter (3.11 or later) that runs the programs; by default the one that grades"
    )
