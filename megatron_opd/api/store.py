"""Stores read from Python: `open_store`, rollouts as small records, prompts with text and answer, tables.

Legend: P prompt tokens, R response tokens, K teacher candidates. Arrays of a record are of the response alone: element 0 belongs to its
first token. Log-probabilities are natural logarithms.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import numpy as np

from megatron_opd.data.joined import open_training_stores
from megatron_opd.data.store import StoreReader
from megatron_opd.errors import UserError
from megatron_opd.records import Finish, Prompt, TeacherScores
from megatron_opd.store_records import StoreManifest

if TYPE_CHECKING:
    import pandas
    import pyarrow

By = Literal["rollout", "token"]
_Value = TypeVar("_Value")
Pick = slice | Sequence[int] | Sequence[bool] | np.ndarray


def open_store(
    store: str | Path | Sequence[str | Path],
    teacher: str | None = None,
    *,
    tokenizer: str | Path | Any | None = None,
    prompts: str | Path | Sequence[str | Path] | None = None,
    memory_bytes: int = 4 << 30,
) -> Store:
    """Open a store (a directory or an fsspec URL), or several that are read as one, as a training does.

    `teacher`: as that teacher's scores see it: rollouts that it could not score are left out, those scored in part are cut there.
    `tokenizer`, for texts: a model's directory or a tokenizer of transformers; by default that of a model of the run in whose folder the
    store lies. `prompts`: the file that was sampled from, one for each store; by default as the run's recipe says. `memory_bytes`: of
    arrays kept in memory. Raises StoreError for what is no store, or damaged.
    """
    addresses = [str(store)] if isinstance(store, str | Path) else [str(address) for address in store]
    if not addresses:
        raise UserError("open_store: no store is given; give its directory or URL")
    files = [None] * len(addresses) if prompts is None else [prompts] if isinstance(prompts, str | Path) else list(prompts)
    if len(files) != len(addresses):
        raise UserError(f"open_store: {len(files)} prompt files for {len(addresses)} stores; give one for each, in their order")
    reader = open_training_stores(addresses, teacher, memory_bytes=memory_bytes)
    return Store(_Source(reader, tokenizer, files), np.arange(len(reader)))


class _Source:
    """What a store and its slices share."""

    def __init__(self, reader: StoreReader, tokenizer: str | Path | Any | None, files: Sequence[str | Path | None]):
        self.reader = reader
        self._given = tokenizer
        self._files = files
        self._excluded: dict[tuple[int, str], set[tuple[int, int]]] = {}

    @cached_property
    def tokenizer(self) -> Any:
        from megatron_opd.serve.store_run import find_tokenizer

        reader = self.reader.stores[0]
        tokenizer, place = find_tokenizer(reader, self._given)
        if tokenizer is None:
            sampler = reader.manifest.sampler.name
            raise UserError(f"{reader.location.url}: {place}; open the store with tokenizer=DIR, the directory of {sampler}")
        return tokenizer

    @cached_property
    def teachers(self) -> list[str]:
        return self.reader.teachers()

    @cached_property
    def stale(self) -> dict[str, str]:
        """Derived teachers whose scores are not what would be made of their source now, and why."""
        return {name: fault for name in self.teachers if (fault := self.reader.derived_fault(name)) is not None}

    @cached_property
    def prompts(self) -> Prompts:
        return Prompts(self.reader, self._files)

    def has_scores(self, index: int, teacher: str) -> bool:
        """Whether `teacher` scored rollout `index`."""
        part = int(self.reader.part_ids[index])
        record = self.reader.score_manifest(part, teacher)
        if record is None:
            return False
        key = (part, teacher)
        if key not in self._excluded:
            self._excluded[key] = {(entry.prompt_index, entry.sample_index) for entry in record.excluded}
        return (int(self.reader.prompt_indices[index]), int(self.reader.sample_indices[index])) not in self._excluded[key]

    def teacher(self, name: str | None) -> str:
        """`name`, by default the teacher that the store was opened with, or the store's default. Raises UserError."""
        name = name or self.reader.teacher or self.reader.default_teacher()
        if name is None or name not in self.teachers:
            known = ", ".join(map(repr, self.teachers))
            wanted = "which teacher?" if name is None else f"no scores of a teacher {name!r};"
            raise UserError(
                f"{self.reader.location.url}: {wanted} {f'there are scores of {known}; name one' if known else 'run megatron-opd score'}"
            )
        return name


class Store(Sequence["StoredRollout"]):
    """The rollouts of a store, or of a part of it, in the store's order.

    `store[5]` is a rollout, `store[5:10]` a store of five; so is `store[indices]`, and `store[mask]`, with a boolean for each rollout.
    """

    def __init__(self, source: _Source, rows: np.ndarray):
        self._source = source
        self._rows = rows

    @property
    def reader(self) -> StoreReader:
        """What reads the files: manifests of parts and scores, `missing_parts()`, `verify()`. Its indices are those of the whole store."""
        return self._source.reader

    @property
    def manifest(self) -> StoreManifest:
        """Who sampled from which prompts and how, with lineage; of several stores the first's (`reader.stores` has each)."""
        return self.reader.manifest

    @property
    def teachers(self) -> list[str]:
        """Names of the teachers that scored at least one part."""
        return list(self._source.teachers)

    @property
    def stale_teachers(self) -> dict[str, str]:
        """Derived teachers whose scores are not what would be made of their source now, and why. Reading those raises StoreError."""
        return dict(self._source.stale)

    @property
    def prompts(self) -> Prompts:
        """The prompts of the whole store, with text and answer where the prompt file is at hand. Raises StoreError for another file."""
        return self._source.prompts

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the model that sampled. Raises UserError where none is at hand, LineageError for another one."""
        return self._source.tokenizer

    @property
    def indices(self) -> np.ndarray:
        """int64 [n], of each rollout in the whole store."""
        return self._rows.copy()

    @property
    def prompt_indices(self) -> np.ndarray:
        """int64 [n], row of each rollout's prompt in the prompt file."""
        return self.reader.prompt_indices[self._rows]

    @property
    def sample_indices(self) -> np.ndarray:
        """int32 [n]."""
        return self.reader.sample_indices[self._rows]

    @property
    def finishes(self) -> np.ndarray:
        """uint8 [n], to compare with `Finish`: `store[store.finishes == Finish.LENGTH]`."""
        return self.reader.finishes[self._rows]

    @property
    def prompt_lens(self) -> np.ndarray:
        """int32 [n], tokens."""
        return self.reader.prompt_lens[self._rows]

    @property
    def response_lens(self) -> np.ndarray:
        """int64 [n], tokens."""
        return self.reader.response_lens[self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> StoredRollout: ...

    @overload
    def __getitem__(self, index: Pick) -> Store: ...

    def __getitem__(self, index: int | Pick) -> StoredRollout | Store:
        if isinstance(index, int | np.integer):
            if not -len(self) <= index < len(self):
                raise IndexError(f"rollout {index} of {len(self)}")
            return self._rollout(int(self._rows[index]))
        if isinstance(index, slice):
            return Store(self._source, self._rows[index])
        picked = np.asarray(index)
        return Store(self._source, self._rows[picked] if picked.size else self._rows[:0])

    def __iter__(self) -> Iterator[StoredRollout]:
        return (self._rollout(row) for row in self._rows.tolist())

    def __repr__(self) -> str:
        part = "" if len(self) == len(self.reader) else f" of {len(self.reader)}"
        return f"<Store {self.reader.location.url}: {len(self)}{part} rollouts, scored by {', '.join(self.teachers) or 'nobody'}>"

    def _rollout(self, row: int) -> StoredRollout:
        found = self.reader.rollout(row)
        start = found.prompt_len
        return StoredRollout(
            index=row,
            prompt_index=found.prompt_index,
            sample_index=found.sample_index,
            finish=found.finish,
            prompt_ids=found.tokens[:start],
            response_ids=found.tokens[start:],
            student_logp=found.student_logp[start:],
            _source=self._source,
        )

    def to_arrow(self, by: By = "rollout", *, text: bool = False) -> pyarrow.Table:
        """A row for each rollout, or for each response token, with the scores of every teacher; `text` adds texts. Columns: docs/python.md.

        Of a derived teacher that is stale there are no columns, and a UserWarning that says so. Raises UserError for another `by`.
        """
        from megatron_opd.api.tables import rollout_table, token_table

        return _one_of({"rollout": rollout_table, "token": token_table}, by, "a table's rows are")(self, text=text)

    def to_pandas(self, by: By = "rollout", *, text: bool = False) -> pandas.DataFrame:
        """`to_arrow` as a data frame. Raises UserError without pandas."""
        try:
            import pandas  # noqa: F401
        except ImportError:
            raise UserError("to_pandas: pandas is not installed; pip install pandas, or take to_arrow(), which does without it") from None
        return self.to_arrow(by, text=text).to_pandas()


@dataclass(frozen=True, eq=False)
class StoredRollout:
    """A prompt and a response: prompt_ids int32 [P]; response_ids int32 [R] and student_logp float32 [R], of the model that sampled.

    `index`: in the whole store. `prompt_index`: row of the prompt file; `sample_index`: which of the prompt's samples.
    """

    index: int
    prompt_index: int
    sample_index: int
    finish: Finish
    prompt_ids: np.ndarray
    response_ids: np.ndarray
    student_logp: np.ndarray
    _source: _Source = field(repr=False)

    @property
    def prompt(self) -> StoredPrompt:
        """The prompt, with its text and answer where they are at hand."""
        return self._source.prompts.of_rollout(self.index)

    @property
    def teachers(self) -> list[str]:
        """Names of the teachers that scored this rollout."""
        return [name for name in self._source.teachers if self._source.has_scores(self.index, name)]

    def text(self, what: Literal["response", "prompt", "all"] = "response", *, special_tokens: bool = True) -> str:
        """What the token ids say. Raises UserError where no tokenizer is at hand, and for another `what`."""
        parts = {"response": [self.response_ids], "prompt": [self.prompt_ids], "all": [self.prompt_ids, self.response_ids]}
        ids = np.concatenate(_one_of(parts, what, "a text is that of")).tolist()
        return self._source.tokenizer.decode(ids, skip_special_tokens=not special_tokens, clean_up_tokenization_spaces=False)

    def scores(self, teacher: str | None = None, *, topk: bool = False) -> TeacherScores:
        """A teacher's log-probabilities, logp float32 [R]; with `topk` its candidates, topk_ids int32 [R,K], topk_logp float32 [R,K].

        Shorter than R where the teacher took but a part, and the store was opened without it. `teacher` by default is the one that the
        store was opened with, or its only one that is not derived. Raises StoreError where there are none.
        """
        found = self._source.reader.scores(self.index, self._source.teacher(teacher), topk=topk)
        start = len(self.prompt_ids)
        topk_ids, topk_logp = (array if array is None else array[start:] for array in (found.topk_ids, found.topk_logp))
        return replace(found, logp=found.logp[start:], topk_ids=topk_ids, topk_logp=topk_logp)

    def teacher_logp(self, teacher: str | None = None) -> np.ndarray:
        """float32 [R], as `scores`."""
        return self.scores(teacher).logp

    def advantage(self, teacher: str | None = None) -> np.ndarray:
        """log pi_T - log pi_ref of each response token, nats, float32 [R] (arXiv 2604.13010).

        The loss `opd` weighs a token with log pi_T - log pi_S of its student, which is the same at the first step alone, where that is pi_ref.
        Its mean over tokens, negated, estimates the reverse KL of the sampler to the teacher; not of residualized scores, which are no
        log-probabilities. `teacher` as in `scores`.
        """
        logp = self.teacher_logp(teacher)
        return logp - self.student_logp[: len(logp)]


@dataclass(frozen=True, eq=False)
class StoredPrompt:
    """A prompt of a store: `index`, row of the prompt file; `rollouts`, indices of its rollouts in the whole store.

    `source`: the row of the prompt file, None where the file is not at hand.
    """

    index: int
    rollouts: list[int]
    source: Prompt | None
    _reader: StoreReader = field(repr=False)

    @property
    def ids(self) -> np.ndarray | None:
        """Token ids int32 [P]; None where the store has no rollout of it."""
        if not self.rollouts:
            return None
        rollout = self._reader.rollout(self.rollouts[0])
        return rollout.tokens[: rollout.prompt_len]

    @property
    def content(self) -> str | list[dict[str, Any]] | None:
        """Text or chat messages."""
        return None if self.source is None else self.source.content

    @property
    def answer(self) -> str | None:
        return None if self.source is None else self.source.answer

    @property
    def meta(self) -> dict[str, Any]:
        """The row's other columns."""
        return {} if self.source is None else self.source.meta


def _one_of(known: Mapping[str, _Value], name: str, what: str) -> _Value:
    """What `name` stands for. Raises UserError for a name that is not known."""
    if name not in known:
        raise UserError(f"{name!r}: {what} {', '.join(map(repr, known))}")
    return known[name]


class Prompts(Sequence[StoredPrompt]):
    """All prompts that a store was made for, of several stores those of the first, then of the second. `note`: where texts are from, or why there are none."""

    def __init__(self, reader: StoreReader, files: Sequence[str | Path | None]):
        from megatron_opd.api.at_hand import find_prompts

        found = [find_prompts(store, file) for store, file in zip(reader.stores, files, strict=True)]
        self._reader = reader
        self._rows = [prompts for prompts, _ in found]
        self.note = "; ".join(dict.fromkeys(note for _, note in found))
        self._first = np.cumsum([0, *(store.manifest.num_prompts for store in reader.stores)])
        self._first_rollout = np.cumsum([0, *map(len, reader.stores)])
        number = np.searchsorted(self._first_rollout, np.arange(len(reader)), side="right") - 1
        self._of_rollout = self._first[number] + reader.prompt_indices
        self._order = np.argsort(self._of_rollout, kind="stable")

    def __len__(self) -> int:
        return int(self._first[-1])

    @overload
    def __getitem__(self, index: int) -> StoredPrompt: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[StoredPrompt]: ...

    def __getitem__(self, index: int | slice) -> StoredPrompt | Sequence[StoredPrompt]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"prompt {index} of {len(self)}")
        index %= len(self)
        store = int(np.searchsorted(self._first, index, side="right")) - 1
        row, rows = index - int(self._first[store]), self._rows[store]
        first, last = np.searchsorted(self._of_rollout, [index, index + 1], sorter=self._order)
        return StoredPrompt(row, self._order[first:last].tolist(), None if rows is None else rows[row], self._reader)

    def of_rollout(self, index: int) -> StoredPrompt:
        """The prompt of rollout `index` of the whole store."""
        return self[int(self._of_rollout[index])]
