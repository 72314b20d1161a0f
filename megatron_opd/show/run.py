"""`megatron-opd show`: rollouts of a store, each token coloured by how much the teacher prefers it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TextIO

from megatron_opd.data.store import StoreReader
from megatron_opd.errors import UserError
from megatron_opd.safety.durable import write_file
from megatron_opd.safety.untrusted import Console, one_line
from megatron_opd.serve.store_run import find_tokenizer
from megatron_opd.show import terminal
from megatron_opd.show.choose import Query, choose
from megatron_opd.show.items import Item, load_item
from megatron_opd.show.places import find_store
from megatron_opd.show.student import add_student
from megatron_opd.show.tokens import TokenTexts
from megatron_opd.show.verdicts import Verdicts, read_verdicts

_MEMORY = 256 << 20  # bytes of a store that are kept, however large it is


@dataclass(frozen=True)
class Shown:
    """What was asked for, and what is said of it. `teacher`: None where nobody scored the store."""

    reader: StoreReader
    teacher: str | None
    student: str | None
    texts: TokenTexts
    tokenizer: str
    verdicts: Verdicts
    items: list[Item]

    def facts(self) -> list[tuple[str, str]]:
        """Name and text of each, for people."""
        reader, missing = self.reader, len(self.reader.missing_parts())
        rows = [
            ("store", reader.location.url),
            ("sampled by", f"{reader.manifest.sampler_role} {reader.manifest.sampler.short()}"),
            ("scored by", self._teacher()),
            ("student of now", self.student or ""),
            ("tokenizer", self.tokenizer),
            ("verdicts", self.verdicts.source),
            ("rollouts", f"{len(self.items)} of {len(reader)}" + (f"; {missing} parts are not there yet" if missing else "")),
        ]
        return [(name, one_line(text)) for name, text in rows if text]

    def _teacher(self) -> str:
        if self.teacher is None:
            return "nobody: there is nothing to colour by"
        records = [record for part in self.reader.parts if (record := self.reader.score_manifest(part, self.teacher)) is not None]
        candidates = f", top-{records[0].top_k}" if records[0].top_k else ", without candidates (score.top_k = 0)"
        return f"{self.teacher!r}: {records[0].teacher.short()}{candidates}"


def show(
    store: str,
    query: Query,
    *,
    teacher: str | None = None,
    student: str | None = None,
    tokenizer: str | None = None,
    page: str | None = None,
) -> Shown:
    """Print rollouts of a store (or of a run), or write them to the HTML file `page`. Raises UserError."""
    reader = StoreReader(find_store(store), memory_bytes=_MEMORY)
    teacher = _choose_teacher(reader, teacher)
    loaded, place = find_tokenizer(reader, tokenizer)
    if loaded is None:
        place += ": tokens are shown by their ids; give its directory with --tokenizer DIR"
    texts, verdicts = TokenTexts(loaded), read_verdicts(reader, loaded)
    places = choose(reader, teacher, query, verdicts, texts)
    items = [load_item(reader, where, teacher, verdicts.get(where.name)) for where in places]
    if student is not None:
        items = add_student(items, student, reader)
    shown = Shown(reader, teacher, student, texts, place, verdicts, items)
    if page is not None:
        from megatron_opd.show.page import page_of

        content = page_of(shown)
        write_file(page, content)
        print(f"show: {page}: {len(items)} of {len(reader)} rollouts, {len(content) / 2**20:.1f} MiB")
    else:
        _print(shown, sys.stdout.unwrapped if isinstance(sys.stdout, Console) else sys.stdout)
    return shown


def _choose_teacher(reader: StoreReader, teacher: str | None) -> str | None:
    """The one that is asked for, or the store's default. Raises UserError."""
    names = reader.teachers()
    if teacher is not None:
        if teacher not in names:
            raise UserError(f"--teacher {teacher!r}: {reader.location.url} is scored by {', '.join(map(repr, names)) or 'nobody'}")
        return teacher
    default = reader.default_teacher()
    if default is None and names:
        raise UserError(f"{reader.location.url} is scored by {', '.join(map(repr, names))}; choose one of them with --teacher")
    return default


def _print(shown: Shown, stream: TextIO) -> None:
    """Past the console that takes escapes away: all texts of others were made printable, and what is left are our colours."""
    colours = terminal.wants_colours(stream)

    def write(line: str) -> None:
        encoding = stream.encoding or "utf-8"
        stream.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")

    for name, text in shown.facts():
        write(f"{name:<15} {text}")
    if shown.teacher is not None:
        write(terminal.legend(colours))
    for line in terminal.lines(shown.items, shown.texts, colours=colours):
        write(line)
    if not shown.items:
        write("\nno rollout is what was asked for")
    stream.flush()
