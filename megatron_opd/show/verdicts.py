"""Verdicts on the rollouts of a store: those that its evaluation wrote beside it. Of others none are known, and none are made up."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_opd.data.store import StoreReader
from megatron_opd.evaluate.rows import Row, SampleName, read_rows
from megatron_opd.records import Finish

_SUFFIX = ".opd.zarr"
# The order of `--sort verdict`: what a reader looks for first.
ORDER = ("wrong", "no_answer", "unclosed", "cut", "timeout", "error", "partial", "right")


@dataclass(frozen=True)
class Verdicts:
    """Rows by (prompt, sample), without responses. `source`: where they are from, or why there are none, for people."""

    source: str
    rows: dict[SampleName, Row] = field(default_factory=dict)

    def get(self, name: SampleName) -> Row | None:
        return self.rows.get(name)


def read_verdicts(reader: StoreReader, tokenizer: Any | None) -> Verdicts:
    """Of MODEL.prompts.jsonl beside MODEL.opd.zarr. Rows whose response is not the text of the store's are dropped, which is said.

    Without the sampler's `tokenizer` none are known. Raises UserError for a damaged file.
    """
    path = Path(reader.location.address)
    rows_path = path.with_name(f"{path.name.removesuffix(_SUFFIX)}.prompts.jsonl")
    if not reader.location.is_local or not path.name.endswith(_SUFFIX) or not rows_path.exists():
        return Verdicts("not known: they are in the stores of evaluations (RUN/eval/NAME/MODEL.opd.zarr) that were graded")
    if tokenizer is None:
        return Verdicts(
            f"not known: without a tokenizer nothing shows whether {rows_path.name} is of these responses; give --tokenizer DIR"
        )
    from megatron_opd.evaluate.accuracy import response_text

    index = {name: at for at, name in enumerate(zip(reader.prompt_indices.tolist(), reader.sample_indices.tolist(), strict=True))}

    def is_of(row: Row, at: int) -> bool:
        """Whether the row's response is rollout `at`; the text, which takes longest, last."""
        finish = "stop" if reader.finishes[at] == Finish.STOP else "length"
        if (row.tokens, row.finish) != (int(reader.response_lens[at]), finish):
            return False
        rollout = reader.rollout(at)
        return row.response == response_text(tokenizer, rollout.tokens, rollout.prompt_len)

    rows, others = {}, 0
    for row in read_rows(rows_path):
        if row.outcome == "excluded":
            continue
        if row.name not in index or not is_of(row, index[row.name]):
            others += 1
            continue
        rows[row.name] = replace(row, response=None)
    note = f"; {others} rows there are of other responses: run 'megatron-opd eval' again" if others else ""
    return Verdicts(f"{rows_path.name}{note}", rows)
