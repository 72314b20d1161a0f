"""Rollouts in a terminal: tokens on coloured ground, or marked by their value where there are no colours."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TextIO

import numpy as np

from megatron_opd.safety.untrusted import one_line
from megatron_opd.show.items import LEVELS, MARKED, Item, level
from megatron_opd.show.tokens import Piece, TokenTexts
from megatron_opd.show.wording import ending, figures, verdict

# (ground, text) of xterm's 256 colours by level. Blue and orange are told apart by the colour-blind; the text's contrast is 4.5 and more.
_LESS = ((230, 16), (223, 16), (216, 16), (208, 16), (130, 231))
_MORE = ((195, 16), (153, 16), (117, 16), (75, 16), (25, 231))
_WORST = 5  # tokens of a table
_CANDIDATES = 3


def wants_colours(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that takes colours, and nobody asked for none (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def legend(colours: bool) -> str:
    """How tokens are coloured or marked."""
    if not colours:
        return (
            f"{{token -1.5}} marks log pi_T - log pi_ref where it is {MARKED:g} nat or more: minus, the teacher finds the token less likely"
        )
    names = [f">= {LEVELS[-1]:g}", *(f"{value:g}" for value in reversed(LEVELS[:-1])), *(f"{value:g}" for value in LEVELS)]
    steps = [*range(-len(LEVELS), 0), *range(1, len(LEVELS) + 1)]
    cells = [_ground(f" {name} ", step) for name, step in zip(names, steps, strict=True)]
    half = len(LEVELS)
    return f"|log pi_T - log pi_ref| from, in nats: {''.join(cells[:half])} less likely to the teacher; {''.join(cells[half:])} more likely"


def lines(items: Sequence[Item], texts: TokenTexts, *, colours: bool) -> Iterator[str]:
    """The rollouts one after another."""
    for item in items:
        prompt, sample = item.place.name
        where = "" if item.place.index is None else f" (rollout {item.place.index})"
        parts = [f"prompt {prompt}, sample {sample}{where}", f"{item.response_len} tokens, {ending(item)}", verdict(item), figures(item)]
        yield ""
        yield _style(one_line("; ".join(part for part in parts if part)), "1", colours)
        if not len(item.tokens):
            continue
        ids = item.tokens.tolist()
        pieces = texts.pieces(ids)
        start = item.prompt_len
        yield f"{_style('prompt', '2', colours)}   {''.join(map(_shown, pieces[:start]))}"
        yield f"{_style('response', '2', colours)} {_coloured(pieces[start:], item.gap[start:], colours)}"
        if np.isfinite(item.student_logp).any():
            yield f"{_style('by log pi_T - log pi_student of now', '2', colours)} {_coloured(pieces[start:], item.left[start:], colours)}"
        yield from _table(item, pieces, texts)


def _coloured(pieces: Sequence[Piece], gap: np.ndarray, colours: bool) -> str:
    shown = []
    for piece, value, step in zip(pieces, gap.tolist(), level(gap).tolist(), strict=True):
        text = _shown(piece)
        if colours:
            shown.append(_ground(text, step))
        else:
            shown.append(f"{{{text} {value:+.1f}}}" if abs(value) >= MARKED else text)
    return "".join(shown)


def _shown(piece: Piece) -> str:
    """A token in running text; ids need a space between them."""
    return f"{piece.text} " if piece.kind == "id" else piece.text.replace("\n", "\\n\n")


def _ground(text: str, step: int) -> str:
    if not step:
        return text
    ground, letters = (_LESS if step < 0 else _MORE)[abs(step) - 1]
    # A line's end is left uncoloured: terminals fill the rest of the line with the ground.
    return "\n".join(f"\x1b[48;5;{ground};38;5;{letters}m{part}\x1b[0m" if part else "" for part in text.split("\n"))


def _style(text: str, code: str, colours: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if colours else text


def _table(item: Item, pieces: Sequence[Piece], texts: TokenTexts) -> Iterator[str]:
    """The tokens of the largest difference."""
    gap = np.abs(np.nan_to_num(item.gap))
    worst = [at for at in np.argsort(-gap, kind="stable")[:_WORST].tolist() if gap[at] >= LEVELS[0]]
    has_student = np.isfinite(item.student_logp).any()
    if worst:
        candidates = ", and the teacher's candidates" if item.candidates.shape[1] else ""
        yield f"  position  log pi_ref  log pi_T  difference  {'log pi_student  ' if has_student else ''}token{candidates}"
    for at in worst:
        student = f"{item.student_logp[at]:>14.2f}  " if has_student else ""
        shares = [
            f"{_quoted(texts.piece(number))} {np.exp(logp):.1%}"
            for number, logp in zip(item.candidates[at].tolist()[:_CANDIDATES], item.candidate_logp[at].tolist(), strict=False)
        ]
        row = f"  {at - item.prompt_len:>8}  {item.ref_logp[at]:>10.2f}  {item.teacher_logp[at]:>8.2f}  {item.gap[at]:>+10.2f}  {student}"
        yield row + f"{_quoted(pieces[at])}{': ' if shares else ''}{', '.join(shares)}"


def _quoted(piece: Piece) -> str:
    return f"id {piece.text}" if piece.kind == "id" else f"'{one_line(piece.text)}'"
