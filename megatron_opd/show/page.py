"""Rollouts as one HTML page that holds all it needs: no network, nothing but its own script and style run (Content-Security-Policy).

Texts of others reach the page as JSON alone, which its script writes as text. Arrays are base64 of little-endian integers, which are
read when a rollout is opened: so that 500 long rollouts open at once. Legend: T tokens, R response tokens, K candidates.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_opd.safety.page_policy import page_policy
from megatron_opd.safety.untrusted import one_line, printable
from megatron_opd.show.items import LEVELS, Item, disagreement
from megatron_opd.show.tokens import Piece
from megatron_opd.show.wording import ending, figures, verdict

if TYPE_CHECKING:
    from megatron_opd.show.run import Shown

STEP = 0.001  # nats of an integer; below -32.767 and above 32.767 it is that
_MISSING = -32768


def page_of(shown: Shown) -> str:
    """The page of what was asked for."""
    style, script = (resources.files("megatron_opd.show").joinpath(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    policy = page_policy(styles=[style], scripts=[script])
    frame = resources.files("megatron_opd.show").joinpath("page.html").read_text(encoding="utf-8")
    for name, text in (("POLICY", policy), ("STYLE", style), ("SCRIPT", script), ("DATA", _json(_data(shown)))):
        frame = frame.replace(f"@@{name}@@", text, 1)  # what others wrote comes last
    return frame


def _json(value: Any) -> str:
    """JSON in ASCII without a character that HTML gives a meaning."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


class _Table:
    """Different pieces by number, so that a token takes two or four bytes."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, int]] = []
        self._numbers: dict[tuple[str, str, int], int] = {}

    def numbers(self, pieces: Sequence[Piece], ids: Sequence[int]) -> np.ndarray:
        found = np.empty(len(ids), np.uint32)
        for at, (piece, number) in enumerate(zip(pieces, ids, strict=True)):
            row = (piece.text, piece.kind, number)
            if row not in self._numbers:
                self._numbers[row] = len(self.rows)
                self.rows.append(row)
            found[at] = self._numbers[row]
        return found


def _data(shown: Shown) -> dict[str, Any]:
    table = _Table()
    rollouts = [_rollout(item, shown, table) for item in shown.items]
    wide = len(table.rows) > 1 << 16
    for rollout in rollouts:
        for name in ("tokens", "candidates"):
            rollout[name] = _base64(rollout[name].astype("<u4" if wide else "<u2"))
    return {
        "facts": shown.facts(),
        "levels": LEVELS,
        "step": STEP,
        "wide": wide,
        "student": shown.student is not None,
        "scored": shown.teacher is not None,
        "pieces": table.rows,
        "rollouts": rollouts,
    }


def _rollout(item: Item, shown: Shown, table: _Table) -> dict[str, Any]:
    ids, start = item.tokens.tolist(), item.prompt_len
    texts = shown.texts
    gap = np.nan_to_num(item.gap)
    worst = int(np.argmax(np.abs(gap))) if len(gap) else 0
    pieces = texts.pieces(ids)
    K = item.candidates.shape[1]
    candidates = item.candidates[start:].reshape(-1)
    different, where = np.unique(candidates, return_inverse=True)  # -1 behind the last token that was scored
    known = table.numbers([texts.piece(number) for number in different.tolist()], different.tolist())
    row = item.verdict
    return {
        "name": list(item.place.name),
        "index": item.place.index,
        "outcome": None if row is None else row.outcome,
        "verdict": one_line(verdict(item)),
        "reason": "" if row is None else printable(row.reason),
        "ending": ending(item),
        "finished": item.finish == 0,
        "excluded": None if item.place.excluded is None else printable(item.place.excluded),
        "figures": one_line(figures(item)),
        "length": item.response_len,
        "disagreement": round(disagreement(item.gap), 3),
        "worst": [one_line(pieces[worst].text), round(float(gap[worst]), 2)] if len(gap) and gap[worst] else None,
        "start": start,
        "tokens": table.numbers(pieces, ids),
        "ref": _nats(item.ref_logp[start:]),
        "teacher": _nats(item.teacher_logp[start:]),
        "now": _nats(item.student_logp[start:]) if shown.student is not None else "",
        "k": K,
        "candidates": known[where],
        "candidate_logp": _nats(item.candidate_logp[start:].reshape(-1)),
    }


def _nats(logp: np.ndarray) -> str:
    """int16 of `STEP` each, -32768 where there is none."""
    scaled = np.round(np.nan_to_num(logp.astype(np.float64)) / STEP).clip(_MISSING + 1, -_MISSING - 1)
    return _base64(np.where(np.isnan(logp), _MISSING, scaled).astype("<i2"))


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()
