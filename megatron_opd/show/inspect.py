"""`megatron-opd inspect`: what is in a store, for people; new lines come behind those that are there."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_opd.data.calibration import read_calibration
from megatron_opd.data.imported import import_record
from megatron_opd.data.store import StoreReader
from megatron_opd.errors import StoreError
from megatron_opd.records import Finish, ModelFingerprint, PromptFile
from megatron_opd.safety.untrusted import one_line
from megatron_opd.store_records import Extension, PartManifest, ScoreManifest, StoreManifest

_BAR = 40
_MEMORY = 256 << 20  # bytes of a store that are kept, however large it is


def inspect_store(url: str, *, verify: bool = False, tokens: bool = True, tokenizer: str | None = None) -> int:
    """Print manifest, lineage, counts, lengths, scores; with `tokens` read them all for the figures of `show.figures`, and with `verify`
    compare every checksum. `tokenizer`: the sampler's directory, searched for by default. Returns 0, or 2 if something is damaged, or tokens
    stand behind a stop id. Raises LineageError if the tokenizer is another one."""
    reader = StoreReader(url, memory_bytes=_MEMORY)
    manifest = reader.manifest
    lineage = manifest.lineage
    rows = [
        ("store", f"{reader.location.url} (format {manifest.format_version}, identity {reader.store_id})"),
        ("sampled by", f"{manifest.sampler_role} {_model(manifest.sampler)}"),
        ("base model", _model(lineage.base)),
        ("SFT teacher", _model(lineage.sft_teacher) + (" (declared by the user)" if lineage.sft_teacher_declared else "")),
        *(("OVERRIDE", text) for text in lineage.overrides),
        ("tokenizer", f"{manifest.sampler.tokenizer.num_tokens} tokens, table {manifest.sampler.tokenizer.vocab_sha256[:12]}"),
        ("prompts", _prompts(manifest.prompts) + _drawn(manifest.provenance)),
        ("sampling", ", ".join(f"{key} {value}" for key, value in manifest.sampling.model_dump(exclude={"stop_token_ids"}).items())),
        ("prompts written", _prompt_format(manifest)),
        ("stop ids", _endings(reader)),
        ("made", _made(manifest.provenance)),
        *(("imported", _imported(record)) for record in [import_record(manifest.provenance)] if record is not None),
        *((f"extension {number}", _extension(entry)) for number, entry in enumerate(manifest.extensions, start=1)),
        ("parts", f"{len(reader.parts)} of {manifest.num_parts} sealed, {manifest.prompts_per_part} prompts each"),
        ("rollouts", _counts(reader)),
        *(("NOTE", note) for note in reader.notes),
    ]
    scores = {name: [record for part in reader.parts if (record := reader.score_manifest(part, name))] for name in reader.teachers()}
    rows += [(f"scores {name!r}", _scores(reader, records)) for name, records in scores.items()]
    stale = {name: fault for name in scores if (fault := reader.derived_fault(name)) is not None}
    rows += [("STALE", f"{name!r}: {fault}") for name, fault in stale.items()]
    if not scores:
        rows.append(("scores", "none; SFT needs none" if manifest.sampler_role == "teacher" else "none; run 'megatron-opd score'"))
    calibration = read_calibration(reader.location)
    if calibration is not None and calibration.floor is not None:
        rows.append(("engines", f"{calibration.engine.get('kind')} and Megatron differ by {calibration.floor.describe()}"))
    for name, text in rows:
        print(one_line(f"{name:<18} {text}"))
    _print_exclusions([*reader.parts.values(), *(record for records in scores.values() for record in records)])
    if len(reader):
        print("response length, tokens")
        print("\n".join(histogram(reader.response_lens)))
    damaged = _print_figures(reader, [name for name in scores if name not in stale], tokenizer) if tokens and len(reader) else False
    if not verify:
        return 2 if damaged else 0
    problems = reader.verify()
    for problem in problems:
        print(f"DAMAGED: {problem}")
    print(f"verified: {'every checksum holds' if not problems else f'{len(problems)} arrays are damaged'}")
    return 2 if problems or damaged else 0


def _print_figures(reader: StoreReader, teachers: Sequence[str], given: str | None) -> bool:
    """What the tokens say; returns whether some can't be read, or are no responses."""
    from megatron_opd.serve.store_run import find_tokenizer
    from megatron_opd.show.figures import lines, measure
    from megatron_opd.show.tokens import TokenTexts

    tokenizer, place = find_tokenizer(reader, given) if teachers else (None, "")
    try:
        endings, found = measure(reader, teachers)
    except StoreError as error:
        print(f"DAMAGED: {error}")
        return True
    for line in lines(reader, TokenTexts(tokenizer), endings, found):
        print(line)
    if teachers:
        print(
            one_line(
                f"{'tokenizer of texts':<18} {place}{': tokens are shown by their ids; give --tokenizer DIR' if tokenizer is None else ''}"
            )
        )
    return endings.behind > 0


def _model(model: ModelFingerprint | None) -> str:
    return "not known" if model is None else f"{model.name} (weights {model.weights_sha256[:12]})"


def _prompts(prompts: PromptFile) -> str:
    return f"{prompts.name}: {prompts.num_prompts} (sha256 {prompts.sha256[:12]})"


def _drawn(provenance: dict[str, Any]) -> str:
    return f", drawn from its file by seed {provenance['subset_seed']}" if "subset_seed" in provenance else ""


def _made(provenance: dict[str, Any]) -> str:
    return f"{provenance.get('created', '?')} at commit {provenance.get('git_commit', 'unknown')}"


def _imported(record: dict[str, Any]) -> str:
    return f"from {record.get('file')}; that {record.get('model')} made the responses is declared, their log-probabilities were {record.get('log_probs')}"


def _extension(entry: Extension) -> str:
    return f"to {entry.samples_per_prompt} samples of each of the prompts {_prompts(entry.prompts)}, {_made(entry.provenance)}, identity {entry.store_id}"


def _prompt_format(manifest: StoreManifest) -> str:
    if not manifest.chat_templates:
        return "as plain text"
    allowed = "; OTHERWISE THAN THE SFT ANSWERS', WHICH WAS ALLOWED" if manifest.allow_template_mismatch else ""
    texts = hashlib.sha256(json.dumps(manifest.chat_templates, sort_keys=True).encode()).hexdigest()
    return f"by chat template {texts[:12]}, which ends them with the ids {manifest.prompt_suffix}{allowed}"


def _endings(reader: StoreReader) -> str:
    """Every stop id, and how many responses it ended."""
    counts: Counter[int] = Counter()
    for record in reader.parts.values():
        counts.update(record.endings or {})
    ids = dict.fromkeys([*reader.manifest.stop_ids, *counts])
    return ", ".join(f"{token} ({counts[token]} responses)" for token in ids) or "not known: a store of an older version"


def _counts(reader: StoreReader) -> str:
    if not len(reader):
        return "none"
    finishes = ", ".join(
        f"{(reader.finishes == finish).mean():.1%} {finish.name.lower()}" for finish in Finish if (reader.finishes == finish).any()
    )
    return f"{len(reader)} ({finishes}); {int(reader.response_lens.sum()):,} response tokens, {int(reader.lengths.sum()):,} in all"


def _scores(reader: StoreReader, records: Sequence[ScoreManifest]) -> str:
    mismatch = "; TEACHER MISMATCH ALLOWED" if any(record.allow_teacher_mismatch for record in records) else ""
    top_k = f", top-{records[0].top_k}" if records[0].top_k else ""
    excluded = sum(len(record.excluded) for record in records)
    cut = [record.max_tokens for record in records if record.max_tokens is not None]
    notes = (f"; {excluded} rollouts have none" if excluded else "") + (f"; cut at {min(cut)} tokens" if cut else "")
    derived = f"; {records[0].derived.describe()}" if records[0].derived is not None else ""
    return f"{_model(records[0].teacher)}{top_k}, {len(records)} of {len(reader.parts)} parts{notes}{mismatch}{derived}"


def _print_exclusions(records: Sequence[PartManifest | ScoreManifest]) -> None:
    reasons = Counter(excluded.reason for record in records for excluded in record.excluded)
    for reason, count in reasons.most_common(10):
        print(one_line(f"{'excluded':<18} {count} x {reason}"))


def histogram(values: np.ndarray, *, bins: int = 10) -> list[str]:
    """Lines of a text histogram."""
    counts, edges = np.histogram(values, bins=min(bins, max(1, int(values.max() - values.min()))))
    return [
        f"{low:>10.0f} to {high:<8.0f} {count:>8} {'#' * round(_BAR * count / counts.max())}"
        for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]
