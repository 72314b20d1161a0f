"""Calibration of a model by its samples: is an answer right as often as the model gives it?

The confidence of an answer is the share of its prompt's samples that give it. Expected calibration error: Naeini et al. 2015 (AAAI,
"Obtaining well calibrated probabilities using Bayesian binning"), with the bins of Guo et al. 2017 (arXiv 1706.04599, section 2).

Legend: G prompts, B bins, R resamples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_opd.evaluate.intervals import ratio_interval
from megatron_opd.evaluate.passk import Samples
from megatron_opd.evaluate.rows import Row

NUM_BINS = 10  # of equal width: bin b holds confidences in (b/10, (b+1)/10]
_RESAMPLES = 1000
_SEED = 0


def calibration(samples: Samples) -> dict[str, Any] | None:
    """Expected calibration error and over-confidence over samples that have an answer; None where no prompt has more than one sample.

    ece: sum over bins of (samples in the bin / samples) * |mean confidence - share that is right|, with a 95 % percentile interval of a
    bootstrap over prompts. The error of a finite sample is above 0 also for a calibrated model, the more so the fewer prompts there are;
    so is its interval. overconfidence: mean confidence minus share that is right, with a 95 % interval over prompts. bins: those that
    hold samples. Samples without an answer make the others less frequent, and are counted.
    """
    asked = {prompt: rows for prompt, rows in samples.items() if len(rows) > 1}
    if not asked:
        return None
    count_GB, confidence_GB, right_GB = (np.zeros((len(asked), NUM_BINS)) for _ in range(3))
    for g, rows in enumerate(asked.values()):
        _add(rows, count_GB[g], confidence_GB[g], right_GB[g])
    answered = count_GB.sum()
    total = sum(map(len, asked.values()))
    result: dict[str, Any] = {"prompts": len(asked), "samples": total, "without_answer": int(total - answered), "num_bins": NUM_BINS}
    if not answered:
        return result | {"ece": None, "overconfidence": None, "bins": []}
    gap_GB = confidence_GB - right_GB
    rng = np.random.default_rng(_SEED)
    weights_RG = rng.multinomial(len(asked), np.full(len(asked), 1 / len(asked)), size=_RESAMPLES)
    counts_R = weights_RG @ count_GB.sum(axis=1)
    errors_R = (np.abs(weights_RG @ gap_GB).sum(axis=1) / np.maximum(counts_R, 1))[counts_R > 0]
    low, high = np.percentile(errors_R, [2.5, 97.5]) if len(asked) > 1 else (None, None)
    gaps = ratio_interval({g: (float(gap_GB[g].sum()), float(count_GB[g].sum())) for g in range(len(asked))})
    ece = np.abs(gap_GB.sum(axis=0)).sum() / answered
    return result | {
        "ece": {"mean": float(ece), "low": None if low is None else float(low), "high": None if high is None else float(high)},
        "overconfidence": gaps.record(),
        "bins": [
            {
                "above": b / NUM_BINS,
                "to": (b + 1) / NUM_BINS,
                "samples": int(count_GB[:, b].sum()),
                "confidence": float(confidence_GB[:, b].sum() / count_GB[:, b].sum()),
                "right": float(right_GB[:, b].sum() / count_GB[:, b].sum()),
            }
            for b in range(NUM_BINS)
            if count_GB[:, b].any()
        ],
    }


def _add(rows: Sequence[Row], count_B: np.ndarray, confidence_B: np.ndarray, right_B: np.ndarray) -> None:
    """Count a prompt's samples in the last three arguments, which are written to."""
    n = len(rows)
    given = Counter(row.answer for row in rows if row.answer is not None)
    for row in rows:
        if row.answer is not None:
            times = given[row.answer]
            b = (times * NUM_BINS - 1) // n  # in whole numbers: (b/10, (b+1)/10] holds times / n exactly
            count_B[b] += 1
            confidence_B[b] += times / n
            right_B[b] += row.outcome == "right"
