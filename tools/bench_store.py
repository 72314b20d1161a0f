"""What the store costs: bytes a token, time of a random rollout, bulk reading and writing; beside Parquet with the same content.

    python tools/bench_store.py [--rollouts 512] [--repeats 5] [--json FILE]

Rollouts of 4,096 tokens with ids as frequent as words, pi_ref and one teacher's log-probs. Files are in the page cache. Times are wall
times; CPU times stand beside the rates, as other work on the machine does not change them much.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from bench_score import PROMPT, RESPONSE, cpu_seconds, make_model, make_store
from pyarrow import parquet

from megatron_opd.cost.meter import provenance
from megatron_opd.data.store import StoreReader
from megatron_opd.data.writer import write_scores
from megatron_opd.records import TeacherScores
from megatron_opd.store_records import ScoreManifest

TEACHER = "teacher"
RAW_BYTES = 12  # a token's id, pi_ref and teacher log-prob


def score(url: str) -> None:
    """Made-up scores near the sampler's."""
    reader = StoreReader(url)
    rng = np.random.default_rng(1)
    for part, manifest in reader.parts.items():
        rollouts = reader.part_rollouts(part)
        scores = [TeacherScores(np.minimum(r.student_logp + rng.normal(0, 0.3, len(r.tokens)).astype(np.float32), 0)) for r in rollouts]
        record = ScoreManifest(part=part, teacher=reader.manifest.sampler, part_crc32c=manifest.crc32c, crc32c={})
        write_scores(reader.location, TEACHER, record, rollouts, scores)


def write_parquet(url: str, path: Path) -> None:
    """The same columns as lists, zstd, a row group of as many rollouts as a part has."""
    reader = StoreReader(url)
    columns: dict[str, list[np.ndarray]] = {"tokens": [], "student_logp": [], "teacher_logp": []}
    for index in range(len(reader)):
        rollout = reader.rollout(index)
        columns["tokens"].append(rollout.tokens)
        columns["student_logp"].append(rollout.student_logp)
        columns["teacher_logp"].append(reader.scores(index, TEACHER).logp)
    parquet.write_table(pa.table(columns), path, compression="zstd", row_group_size=reader.manifest.prompts_per_part)


def folder_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    before, start = cpu_seconds(), time.perf_counter()
    work()
    return time.perf_counter() - start, cpu_seconds() - before


def rate(num_bytes: int, work: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Median MB/s of wall and of CPU time."""
    runs = [timed(work) for _ in range(repeats)]
    wall, cpu = (statistics.median(run[which] for run in runs) for which in (0, 1))
    return {"MB_per_second": num_bytes / wall / 1e6, "MB_per_cpu_second": num_bytes / cpu / 1e6}


def latency(read: Callable[[int], Any], indices: np.ndarray) -> dict[str, float]:
    """Milliseconds of single reads."""
    times = [timed(lambda index=int(index): read(index)) for index in indices]
    wall, cpu = (np.array([each[which] for each in times]) * 1e3 for which in (0, 1))
    return {"median_ms": float(np.median(wall)), "p99_ms": float(np.quantile(wall, 0.99)), "mean_cpu_ms": float(cpu.mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description="Bytes, latency and bandwidth of the store, beside Parquet.")
    parser.add_argument("--rollouts", type=int, default=512, help=f"of {PROMPT} + {RESPONSE} tokens")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    results: dict[str, Any] = {"command": " ".join(["python", "tools/bench_store.py", *sys.argv[1:]]), **provenance()}
    results |= {"pyarrow": pa.__version__, "cores": os.cpu_count(), "load_average_before": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store, table = folder / "store.opd.zarr", folder / "rollouts.parquet"
        model = make_model(folder / "model")
        tokens = args.rollouts * (PROMPT + RESPONSE)
        raw = tokens * RAW_BYTES

        def write() -> None:
            make_store(str(store), model, args.rollouts)
            score(str(store))

        write()
        write_parquet(str(store), table)
        num_bytes = {"zarr": folder_bytes(store), "parquet": table.stat().st_size}
        results["bytes_a_token"] = {"raw": RAW_BYTES, **{key: value / tokens for key, value in num_bytes.items()}}

        def open_small() -> StoreReader:
            return StoreReader(str(store), memory_bytes=1 << 20)  # keeps what one rollout needs

        reader = open_small()
        file = parquet.ParquetFile(table)
        rows = reader.manifest.prompts_per_part

        def read_zarr(index: int) -> None:
            reader.rollout(index)
            reader.scores(index, TEACHER)

        def read_parquet(index: int) -> None:
            group = file.read_row_group(index // rows)
            for column in ("tokens", "student_logp", "teacher_logp"):
                group.column(column)[index % rows].values.to_numpy()

        indices = np.random.default_rng(2).integers(0, args.rollouts, 200)
        results["random_rollout"] = {"zarr": latency(read_zarr, indices), "parquet": latency(read_parquet, indices)}

        def bulk_zarr() -> None:
            whole = StoreReader(str(store))
            for index in range(len(whole)):
                whole.rollout(index)
                whole.scores(index, TEACHER)

        def bulk_parquet() -> None:
            read = parquet.read_table(table)
            for column in ("tokens", "student_logp", "teacher_logp"):
                read.column(column).combine_chunks().values.to_numpy()

        results["bulk_read"] = {
            "zarr, as checked rollouts and scores": rate(raw, bulk_zarr, args.repeats),
            "parquet, arrays": rate(raw, bulk_parquet, args.repeats),
        }
    results["load_average_after"] = os.getloadavg()[0]
    print(json.dumps({key: value for key, value in results.items() if key != "versions"}, indent=1))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
