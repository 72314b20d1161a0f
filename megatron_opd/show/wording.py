"""The words in which terminal and page speak of a rollout."""

from __future__ import annotations

import numpy as np

from megatron_opd.records import Finish
from megatron_opd.show.items import Item, disagreement

_ENDINGS = {Finish.STOP: "ended by itself", Finish.LENGTH: "cut by length", Finish.ABORT: "given up by the engine"}


def ending(item: Item) -> str:
    """How a response ended."""
    return "no response" if item.finish is None else _ENDINGS[item.finish]


def verdict(item: Item) -> str:
    """A sentence without its full stop; "" where none is known."""
    row = item.verdict
    if row is None:
        return ""
    answers = "" if row.answer is None or row.outcome == "right" else f": answered {row.answer!r}"
    gold = "" if row.gold is None or row.outcome == "right" else f", expected {row.gold!r}"
    return f"{row.outcome.replace('_', ' ')}{answers}{gold}"


def figures(item: Item) -> str:
    """Disagreement and mean difference, in nats; or that there are no scores."""
    scored = int(np.isfinite(item.gap).sum())
    if not scored:
        return item.place.excluded or "no scores"
    short = f", of the first {scored} tokens" if scored < item.response_len else ""
    what = "reverse KL estimate" if item.are_log_probs else "mean score gap, derived, no KL:"
    return f"disagreement {disagreement(item.gap):.2f} nat ({what} {-np.nanmean(item.gap):+.4f} nat/token{short})"
