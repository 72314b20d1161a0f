"""The store: what is written is what is read, in whatever order, by however many workers, with however little memory."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from unit.store_parts import (
    PART_ARRAYS,
    fake_fingerprint,
    fill,
    make_manifest,
    make_rollout,
    make_rollouts,
    same_rollout,
    same_scores,
    score,
    scored_store,
)

from megatron_opd.data import location as location_module
from megatron_opd.data.location import Location
from megatron_opd.data.manifests import part_group, read_manifest
from megatron_opd.data.store import StoreReader
from megatron_opd.data.writer import create_store, write_part
from megatron_opd.errors import StoreError
from megatron_opd.records import Lineage, PromptFile, Rollout, SamplingParams
from megatron_opd.store_records import Excluded


@pytest.fixture(params=["local", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "local":
        yield str(tmp_path / "store.opd.zarr")
        return
    address = f"memory://{uuid.uuid4().hex}.opd.zarr"
    yield address
    place = Location(address)
    if place.fs.exists(place.root):
        place.fs.rm(place.root, recursive=True)


def checksums(url: str) -> dict[int, dict[str, int]]:
    return {part: record.crc32c for part, record in StoreReader(url).parts.items()}


def test_round_trip(url: str) -> None:
    manifest = make_manifest()
    fill(url, manifest)
    reader = StoreReader(url)
    assert reader.manifest == manifest
    assert manifest.num_parts == 3
    wanted = [rollout for part in range(3) for rollout in make_rollouts(manifest, part)]
    assert len(reader) == len(wanted) == 20
    for index, rollout in enumerate(wanted):
        same_rollout(reader.rollout(index), rollout)
    assert reader.lengths.tolist() == [len(rollout.tokens) for rollout in wanted]
    assert reader.response_lens.tolist() == [rollout.response_len for rollout in wanted]
    assert reader.prompt_indices.tolist() == [rollout.prompt_index for rollout in wanted]
    assert reader.finishes.tolist() == [rollout.finish for rollout in wanted]
    for part in range(3):
        for got, want in zip(reader.part_rollouts(part), make_rollouts(manifest, part), strict=True):
            same_rollout(got, want)
        assert set(reader.parts[part].crc32c) == set(PART_ARRAYS)
        assert reader.parts[part].num_response_tokens == sum(r.response_len for r in make_rollouts(manifest, part))
    assert reader.verify() == []
    reader.check_complete()
    for index in (-1, 20):
        with pytest.raises(IndexError, match="of 20"):
            reader.rollout(index)


@given(
    prompts=st.integers(1, 4),
    samples=st.integers(1, 3),
    per_part=st.integers(1, 5),
    longest=st.sampled_from([2, 3, 17, 60]),
    chunk=st.sampled_from([32, 100, 1 << 16]),
    top_k=st.sampled_from([0, 1, 5]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_reading_does_not_depend_on_the_memory_budget(
    prompts: int, samples: int, per_part: int, longest: int, chunk: int, top_k: int, seed: int
) -> None:
    """Small chunks, so that sequences straddle them; then a reader that holds all and one that holds next to nothing."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(location_module, "CHUNK_ITEMS", chunk)
        manifest = make_manifest(num_prompts=prompts, samples=samples, per_part=per_part)
        fill(folder, manifest, seed=seed, longest=longest)
        score(folder, top_k=top_k)
        large, small = StoreReader(folder), StoreReader(folder, memory_bytes=200)
        wanted = [r for part in range(manifest.num_parts) for r in make_rollouts(manifest, part, seed=seed, longest=longest)]
        assert len(large) == len(small) == len(wanted)
        order = list(range(len(wanted)))
        random.Random(seed).shuffle(order)
        for index in order:
            same_rollout(large.rollout(index), wanted[index])
            same_rollout(small.rollout(index), wanted[index])
            same_scores(large.scores(index, "teacher", topk=top_k > 0), small.scores(index, "teacher", topk=top_k > 0))
        assert small.verify() == large.verify() == []


def test_a_part_of_many_chunks(tmp_path: Path) -> None:
    """The real chunk size: 300,000 tokens of one part are five inner chunks of one file."""
    rng = np.random.default_rng(0)
    manifest = make_manifest(num_prompts=30, samples=1, per_part=30)
    location = create_store(str(tmp_path), manifest)
    rollouts = [make_rollout(rng, prompt, 0, longest=20_000) for prompt in range(30)]
    write_part(location, 0, rollouts, [], {})
    small = StoreReader(str(tmp_path), memory_bytes=1 << 20)
    assert small.parts[0].num_tokens > 3 * location_module.CHUNK_ITEMS
    for index in rng.permutation(30):
        same_rollout(small.rollout(int(index)), rollouts[index])
    assert 0 < small._cache.num_bytes <= 1 << 20
    assert len(list((tmp_path / "parts/000000/tokens").rglob("0"))) == 1  # one file, not one a chunk


def test_a_growing_store(url: str) -> None:
    manifest = make_manifest()
    create_store(url, manifest)
    reader = StoreReader(url)
    assert len(reader) == 0
    assert reader.missing_parts() == [0, 1, 2]
    with pytest.raises(StoreError, match=r"3 of 3 parts are not sealed \(first: \[0, 1, 2\]\)"):
        reader.check_complete()
    for part, missing in ((2, [0, 1]), (0, [1]), (1, [])):
        fill(url, manifest, parts=[part])
        assert part not in reader.parts
        reader.refresh()
        assert reader.missing_parts() == missing
        for got, want in zip(reader.part_rollouts(part), make_rollouts(manifest, part), strict=True):
            same_rollout(got, want)
    reader.check_complete()
    with pytest.raises(StoreError, match="parts/000007: not sealed"):
        reader.part_rollouts(7)


def test_refresh_sees_a_part_that_was_made_again(url: str) -> None:
    """As the error of a damaged part advises: delete it and run the stage again."""
    manifest = scored_store(url)
    reader = StoreReader(url)
    for index in range(len(reader)):
        reader.rollout(index), reader.scores(index, "teacher")
    reader.location.fs.rm(reader.location.path(part_group(1)), recursive=True)
    fill(url, manifest, seed=5)
    reader.refresh()
    for got, want in zip(reader.part_rollouts(1), make_rollouts(manifest, 1, seed=5), strict=True):
        same_rollout(got, want)
    assert reader.unscored_parts("teacher") == [1]
    score(url, parts=[1])
    reader.refresh()
    fresh = StoreReader(url)
    for index in range(len(reader)):
        same_scores(reader.scores(index, "teacher"), fresh.scores(index, "teacher"))


def test_any_order_and_any_number_of_shards_give_the_same_arrays(tmp_path: Path) -> None:
    manifest = make_manifest(num_prompts=18, samples=2, per_part=4)
    fill(str(tmp_path / "plain"), manifest)
    plain = StoreReader(str(tmp_path / "plain"))
    for count in (1, 2, 4):
        url = str(tmp_path / f"shards{count}")
        order = random.Random(count).sample(range(5), 5)
        for shard in reversed(range(count)):
            fill(url, manifest, parts=[part for part in order if part % count == shard])
        assert checksums(url) == checksums(str(tmp_path / "plain"))
        reader = StoreReader(url)
        for index in range(len(plain)):
            same_rollout(reader.rollout(index), plain.rollout(index))


def test_rollouts_may_be_given_in_any_order(tmp_path: Path) -> None:
    manifest = make_manifest()
    location = create_store(str(tmp_path), manifest)
    rollouts = make_rollouts(manifest, 0)
    write_part(location, 0, rollouts[::-1], [], {})
    for got, want in zip(StoreReader(str(tmp_path)).part_rollouts(0), rollouts, strict=True):
        same_rollout(got, want)


def test_an_empty_part(url: str) -> None:
    """Every prompt of it was left out."""
    manifest = make_manifest()
    location = fill(url, manifest, parts=[0, 2])
    excluded = [Excluded(prompt_index=p, sample_index=s, reason="too long") for p in range(4, 8) for s in range(2)]
    write_part(location, 1, [], excluded, {})
    score(url, top_k=3)
    reader = StoreReader(url)
    reader.check_complete("teacher")
    assert len(reader) == 12
    assert reader.part_rollouts(1) == []
    assert reader.parts[1].excluded == excluded
    assert reader.verify() == []
    for index in range(12):
        assert reader.rollout(index).prompt_index not in range(4, 8)
        reader.scores(index, "teacher", topk=True)
    for got, want in zip(reader.part_rollouts(2), make_rollouts(manifest, 2), strict=True):
        same_rollout(got, want)


def test_a_store_with_nothing_in_it(url: str) -> None:
    manifest = make_manifest(num_prompts=2, samples=1)
    write_part(create_store(url, manifest), 0, [], [Excluded(prompt_index=p, sample_index=0, reason="x") for p in range(2)], {})
    reader = StoreReader(url)
    reader.check_complete()
    assert len(reader) == 0
    assert reader.response_lens.tolist() == []


def test_wrong_rollouts_are_refused(tmp_path: Path) -> None:
    manifest = make_manifest()
    location = create_store(str(tmp_path), manifest)
    rollouts = make_rollouts(manifest, 1)
    other = make_rollouts(manifest, 0)[0]
    with pytest.raises(StoreError, match=r"parts/000001: 7 rollouts and exclusions for 8 expected; at odds: \[\(4, 0\)\]"):
        write_part(location, 1, rollouts[1:], [], {})
    for wrong in ([*rollouts, rollouts[0]], [other, *rollouts[1:]], [*rollouts, other], []):
        with pytest.raises(StoreError, match="for 8 expected"):
            write_part(location, 1, wrong, [], {})
    with pytest.raises(StoreError, match="for 8 expected"):
        write_part(location, 1, rollouts, [Excluded(prompt_index=4, sample_index=0, reason="twice")], {})
    for part in (-1, 3):
        with pytest.raises(StoreError, match=f"part {part} of 3"):
            write_part(location, part, [], [], {})
    wide = Rollout(rollouts[0].tokens + 64, rollouts[0].prompt_len, 4, 0, rollouts[0].finish, rollouts[0].student_logp)
    with pytest.raises(StoreError, match=r"prompt 4, sample 0: token id .* in a vocabulary of 64"):
        write_part(location, 1, [wide, *rollouts[1:]], [], {})
    assert StoreReader(str(tmp_path)).parts == {}


def test_a_sealed_part_is_left_as_it_is(url: str) -> None:
    manifest = make_manifest()
    fill(url, manifest)
    before = checksums(url)
    fill(url, manifest, seed=1)
    assert checksums(url) == before
    assert StoreReader(url).verify() == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sampling": SamplingParams(samples_per_prompt=2, max_new_tokens=60, temperature=0.7)}, r"sampling is \{temperature: 1.0\} there, \{temperature: 0.7\} now"),
        ({"sampler": fake_fingerprint("other")}, "sampler is .*name: student.* there, .*name: other.* now"),
        ({"prompts": PromptFile(name="b.jsonl", sha256="1" * 64, num_prompts=10)}, "prompts is .*sha256"),
        ({"prompts": PromptFile(name="prompts.jsonl", sha256="0" * 64, num_prompts=11)}, r"prompts is \{num_prompts: 10\} there, \{num_prompts: 11\} now"),
        ({"prompts_per_part": 5}, "prompts_per_part is 4 there, 5 now"),
        ({"sampler_role": "teacher"}, "sampler_role is student there, teacher now"),
        ({"lineage": Lineage()}, "lineage is .*sft_teacher"),
        ({"encoding": {"system": "Be brief."}}, "encoding is .* there, .*Be brief"),
    ],
)  # fmt: skip
def test_other_settings_are_refused_by_name(url: str, changes: dict, named: str) -> None:
    create_store(url, make_manifest())
    with pytest.raises(StoreError, match=f"made with other settings: {named}"):
        create_store(url, make_manifest(**changes))
    assert read_manifest(Location(url))[0] == make_manifest()


def test_what_may_differ_between_runs(url: str) -> None:
    create_store(url, make_manifest())
    prompts = PromptFile(name="the_same_file_moved.jsonl", sha256="0" * 64, num_prompts=10)
    create_store(url, make_manifest(prompts=prompts, provenance={"created": "later"}))
    assert read_manifest(Location(url))[0] == make_manifest()


def test_no_store_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"nothing: no store here; make one with 'megatron-opd rollout'"):
        StoreReader(str(tmp_path / "nothing"))
    (tmp_path / "file").write_text("x")
    for path in ("file", "file/below"):
        with pytest.raises(StoreError, match="is a file"):
            StoreReader(str(tmp_path / path))
    for address in ("nowhere://bucket/store", "s3://bucket/store"):
        with pytest.raises(StoreError, match=f"{address}: no file system"):
            StoreReader(address)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    manifest = make_manifest()
    Location(str(tmp_path)).write_attributes("", manifest.model_dump() | {"format_version": 3})
    with pytest.raises(StoreError, match="store format 3, this program reads 1 and 2"):
        StoreReader(str(tmp_path))


def test_threads_that_write_the_same_parts(tmp_path: Path) -> None:
    """Four writers of all parts at once, each with rollouts of its own, and a reader that looks all the time."""
    manifest = make_manifest(num_prompts=16, samples=1, per_part=4)
    url = str(tmp_path)
    create_store(url, manifest)
    start, seen, errors = threading.Barrier(5), [], []

    def write(seed: int) -> None:
        try:
            start.wait()
            fill(url, manifest, seed=seed)
        except Exception as error:
            errors.append(error)

    def read() -> None:
        start.wait()
        while len(seen) == 0 or len(seen[-1]) < 4:
            try:
                reader = StoreReader(url)
                assert reader.verify() == []
                seen.append({part: record.crc32c["tokens"] for part, record in reader.parts.items()})
            except Exception as error:
                errors.append(error)
                return

    threads = [threading.Thread(target=write, args=(seed,)) for seed in range(4)] + [threading.Thread(target=read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert errors == []
    for earlier, later in itertools.pairwise(seen):  # what a reader has seen sealed stays
        assert earlier.items() <= later.items()
    assert_one_writer_each(url, range(4))


WRITER = """
import sys, time
from pathlib import Path
from unit.store_parts import fill, make_manifest
url, seed = sys.argv[1], int(sys.argv[2])
Path(url, f"ready{seed}").touch()
while not all(Path(url, f"ready{s}").exists() for s in range(2)):
    time.sleep(0.001)
fill(url, make_manifest(num_prompts=40, samples=1), seed=seed)
"""


def test_processes_that_write_the_same_parts(tmp_path: Path) -> None:
    tests = Path(__file__).parents[1]
    code = f"import sys; sys.path.insert(0, {str(tests)!r})\n{WRITER}"
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(seed)], cwd=tests.parent) for seed in range(2)]
    assert [writer.wait(timeout=180) for writer in writers] == [0, 0]
    assert_one_writer_each(str(tmp_path), range(2))


def assert_one_writer_each(url: str, seeds: range) -> None:
    """Each part is whole and exactly one writer's, and nothing else is left."""
    reader = StoreReader(url)
    reader.check_complete()
    assert reader.verify() == []
    for part in reader.parts:
        wanted = {seed: make_rollouts(reader.manifest, part, seed=seed) for seed in seeds}
        tokens = np.concatenate([rollout.tokens for rollout in reader.part_rollouts(part)])
        (winner,) = [seed for seed in seeds if np.array_equal(tokens, np.concatenate([r.tokens for r in wanted[seed]]))]
        for got, want in zip(reader.part_rollouts(part), wanted[winner], strict=True):
            same_rollout(got, want)
    assert list(Path(url).rglob("*.tmp")) == []
