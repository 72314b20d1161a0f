"""Steps of a number of tokens: the same in any layout and with any micro-batches, and a run that goes on sees what it would have seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fork_server import Job, shared_server
from stores import make_scored_store
from tiny_models import make_model

from megatron_opd.data.order import TrainingOrder
from megatron_opd.data.store import StoreReader

TOKENS = 300
STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    make_model(folder / "student", "qwen3", seed=5)
    make_model(folder / "teacher", "qwen3", seed=6)
    make_scored_store(folder / "store", sampler=folder / "student", teacher=folder / "teacher", sampler_role="teacher")
    sft(folder, "whole")
    return folder


def sft(folder: Path, output: str, *, ranks: int = 1, code: int = 0, **options: Any) -> str:
    """What the command says; `options` over settings of four steps."""
    settings = {"steps": STEPS, "global_batch_tokens": TOKENS, "micro_batch_tokens": 100, "lr": 1e-3, "save_every": 2, "keep_last": 9}
    overrides = [f"sft.{key}={'null' if value is None else json.dumps(value)}" for key, value in (settings | options).items()]
    paths = {"run_dir": output, "sft.init": "student", "sft.store": "store", "sft.output": output}
    overrides += [f"{key}={str(folder / path)!r}" for key, path in paths.items()]
    log = folder / f"{output}-{len(list(folder.glob('*.log')))}.log"
    words = ["sft", "tiny", "generate=null", "sft.schedule.warmup_steps=0", *overrides, "--nproc", str(ranks)]
    (ending,) = shared_server().run(Job(words, str(log)))
    assert ending.code == code, log.read_text()[-3000:]
    return log.read_text()


def rows(folder: Path, output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / output / "metrics.jsonl").read_text().splitlines()]


def test_steps_are_the_order_cut_at_the_budget(folder: Path) -> None:
    lengths = StoreReader(str(folder / "store")).lengths
    order = TrainingOrder(lengths, 0, None, TOKENS)
    assert [row["batch_tokens"] for row in rows(folder, "whole")] == [lengths[order.rollouts(step)].sum() for step in range(STEPS)]
    assert len({len(order.rollouts(step)) for step in range(STEPS)}) > 1, "the number of rollouts differs"


@pytest.mark.parametrize("options", [{"ranks": 2, "packing": False}, {"micro_batch_tokens": 280}], ids=str)
def test_a_step_does_not_depend_on_how_it_is_cut(folder: Path, options: dict[str, Any]) -> None:
    output = "-".join(map(str, options.values()))
    sft(folder, output, **options)
    for row, whole in zip(rows(folder, output), rows(folder, "whole"), strict=True):
        assert (row["batch_tokens"], row["response_tokens"]) == (whole["batch_tokens"], whole["response_tokens"])
        np.testing.assert_allclose([row["loss"], row["grad_norm"]], [whole["loss"], whole["grad_norm"]], rtol=2e-5)


def test_a_resumed_run_goes_on_where_it_was(folder: Path) -> None:
    """Bit for bit, and no other budget, nor another cut of what is too long."""
    sft(folder, "resumed", steps=2)
    fixed = {"global_batch_tokens = 300, now 301": {"global_batch_tokens": 301}, "cut_at = None, now 100": {"overlong": "cut"}}
    for words, changed in fixed.items():
        assert f"made with {words}" in sft(folder, "resumed", code=2, **changed)
    said = sft(folder, "resumed", code=2, global_batch_tokens=None, global_batch=4)
    assert "made with global_batch = None, now 4" in said
    sft(folder, "resumed")
    for row, whole in zip(rows(folder, "resumed"), rows(folder, "whole"), strict=True):
        assert [row[name] for name in ("loss", "grad_norm", "batch_tokens")] == [
            whole[name] for name in ("loss", "grad_norm", "batch_tokens")
        ]


def test_by_default_steps_are_an_epoch_and_too_large_a_batch_is_refused(folder: Path) -> None:
    total = int(StoreReader(str(folder / "store")).lengths.sum())
    assert f"{-(-total // 700)} steps of 700 tokens" in sft(folder, "epoch", steps=None, global_batch_tokens=700)
    said = sft(folder, "large", code=2, global_batch_tokens=total + 1)
    assert f"20 rollouts of {total} tokens, fewer than global_batch_tokens = {total + 1}" in said
    said = sft(folder, "ranks", code=2, ranks=4)
    assert "sft.global_batch_tokens = 300 is less than a micro-batch of 100 for each of 4 data-parallel ranks" in said
