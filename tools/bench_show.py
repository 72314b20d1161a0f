"""What looking at a store costs: `inspect`, `show --worst 3` and `show --html`; the page's size, and how soon a browser shows it.

    python tools/bench_show.py [--rollouts 500] [--shortest 4096] [--longest 4096] [--top-k 0] [--no-page] [--json FILE]

Made-up rollouts with ids as frequent as words. CPU times, as other work on the machine changes wall times; those of the browser are wall
times, and are measured where Chromium is installed. A page has at most 500 rollouts. FILE gets a row more.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import resource
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from bench_score import cpu_seconds

from megatron_opd.cli import main as command
from megatron_opd.cost.meter import provenance
from megatron_opd.data.store import StoreReader
from megatron_opd.data.writer import create_store, write_part, write_scores
from megatron_opd.records import Finish, Lineage, ModelFingerprint, PromptFile, Rollout, SamplingParams, TeacherScores, TokenizerFingerprint
from megatron_opd.store_records import ScoreManifest, StoreManifest

PROMPT, VOCAB, PER_PART = 100, 150_000, 2000  # tokens, ids, rollouts
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))  # for browser.py


def fill(url: str, args: argparse.Namespace) -> None:
    """A whole store, scored."""
    tokenizer = TokenizerFingerprint(vocab_sha256="0" * 64, num_tokens=VOCAB)
    model = ModelFingerprint(name="made-up", config_sha256="0" * 64, weights_sha256="0" * 64, vocab_size=VOCAB, tokenizer=tokenizer)
    manifest = StoreManifest(
        sampler_role="student",
        sampler=model,
        lineage=Lineage(base=model, sft_teacher=model),
        prompts=PromptFile(name="made-up.jsonl", sha256="0" * 64, num_prompts=args.rollouts),
        prompts_per_part=PER_PART,
        sampling=SamplingParams(max_new_tokens=args.longest),
    )
    location, rng = create_store(url, manifest), np.random.default_rng(0)
    for part in range(manifest.num_parts):
        rollouts = [make_rollout(rng, prompt, int(rng.integers(args.shortest, args.longest + 1))) for prompt in manifest.prompt_range(part)]
        write_part(location, part, rollouts, [], {})
        record = StoreReader(url).parts[part]
        scores = [make_scores(rng, rollout, args.top_k) for rollout in rollouts]
        write_scores(
            location,
            "teacher",
            ScoreManifest(part=part, teacher=model, top_k=args.top_k, part_crc32c=record.crc32c, crc32c={}),
            rollouts,
            scores,
        )


def make_rollout(rng: np.random.Generator, prompt: int, length: int) -> Rollout:
    tokens = np.minimum(rng.zipf(1.3, PROMPT + length), VOCAB - 1).astype(np.int32)
    logp = np.full(len(tokens), np.nan, np.float32)
    logp[PROMPT:] = -rng.exponential(0.5, length)
    return Rollout(tokens, PROMPT, prompt, 0, Finish.LENGTH, logp)


def make_scores(rng: np.random.Generator, rollout: Rollout, top_k: int) -> TeacherScores:
    T, R = len(rollout.tokens), rollout.response_len
    logp = np.minimum(rollout.student_logp + rng.laplace(0, 0.1, T).astype(np.float32), 0)
    if not top_k:
        return TeacherScores(logp)
    ids, values = np.full((T, top_k), -1, np.int32), np.full((T, top_k), np.nan, np.float32)
    ids[PROMPT:] = np.minimum(rng.zipf(1.3, (R, 1)), VOCAB - top_k) + np.arange(top_k)
    values[PROMPT:] = -1 - np.sort(rng.exponential(3, (R, top_k)), axis=1)
    return TeacherScores(logp, ids, values)


def cpu_of(*words: str) -> float:
    """CPU seconds of a command in this process."""
    before = cpu_seconds()
    with redirect_stdout(io.StringIO()):
        code = command(list(words))
    assert code == 0, f"{words}: exit code {code}"
    return round(cpu_seconds() - before, 2)


def in_browser(page: Path) -> dict[str, float]:
    """Wall seconds until the page is loaded (median of 3), and until the next rollout stands there."""
    from browser import CHROMIUM, Browser  # pyright: ignore[reportMissingImports]

    if CHROMIUM is None:
        return {}
    with Browser(page.parent / "profile") as tab:
        tab.show(1280, 800)
        loads = sorted(tab.open(page) for _ in range(3))
        key = "new KeyboardEvent('keydown', {key: 'j', bubbles: true})"
        step = tab.run(
            f"(() => {{ const t = performance.now(); document.body.dispatchEvent({key}); document.body.offsetHeight; return performance.now() - t; }})()"
        )
    return {"load_seconds": round(loads[1], 2), "next_rollout_seconds": round(step / 1000, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rollouts", type=int, default=500)
    parser.add_argument("--shortest", type=int, default=4096, help="response tokens")
    parser.add_argument("--longest", type=int, default=4096, help="response tokens")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--no-page", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        url, page = str(Path(folder, "s.opd.zarr")), Path(folder, "page.html")
        maker = multiprocessing.Process(target=fill, args=(url, args))  # so that its memory does not count
        maker.start()
        maker.join()
        assert maker.exitcode == 0, f"exit code {maker.exitcode}"
        row: dict[str, Any] = {name: getattr(args, name) for name in ("rollouts", "shortest", "longest", "top_k")}
        row |= {"inspect_cpu_seconds": cpu_of("inspect", url), "worst_cpu_seconds": cpu_of("show", url, "--worst", "3")}
        row["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        if not args.no_page:
            row["page_cpu_seconds"] = cpu_of("show", url, "--html", str(page))
            row |= {"page_mib": round(page.stat().st_size / 2**20, 1), **in_browser(page)}
    print(json.dumps(row))
    if args.json:
        rows = json.loads(args.json.read_text(encoding="utf-8"))["rows"] if args.json.exists() else []
        args.json.write_text(json.dumps({"rows": [*rows, row], "provenance": provenance()}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
