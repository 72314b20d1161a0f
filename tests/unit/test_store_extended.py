"""A store that grows: extensions add parts, and nothing that was there changes; every guarantee of a store made at once holds."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from unit.store_parts import VOCAB, make_manifest, make_rollout, same_rollout, score

from megatron_opd.data import joining
from megatron_opd.data.joining import as_of, join_store
from megatron_opd.data.location import Location
from megatron_opd.data.manifests import part_group, part_id, read_manifest
from megatron_opd.data.store import StoreReader
from megatron_opd.data.writer import create_store, write_part
from megatron_opd.errors import StoreError
from megatron_opd.records import PromptFile, Rollout, SamplingParams
from megatron_opd.show.inspect import inspect_store
from megatron_opd.store_records import Excluded, StoreManifest


def sha256_of(count: int, file: str = "a") -> str:
    """Of the first `count` prompts of one made-up file."""
    return file * 32 + f"{count:032x}"


def asks(prompts: int, samples: int, *, per_part: int = 4, file: str = "a", **changes: Any) -> StoreManifest:
    """What a stage wants that reads the first `prompts` of the file."""
    return make_manifest(
        per_part=per_part,
        prompts=PromptFile(name="prompts.jsonl", sha256=sha256_of(prompts, file), num_prompts=prompts),
        sampling=SamplingParams(samples_per_prompt=samples, max_new_tokens=60),
        **changes,
    )


def join(url: str, wanted: StoreManifest, **how: Any) -> StoreManifest:
    return join_store(url, wanted, lambda count: sha256_of(count, wanted.prompts.sha256[0]), **how)


def rollout_of(prompt: int, sample: int) -> Rollout:
    return make_rollout(np.random.default_rng([prompt, sample]), prompt, sample)


def fill(url: str, manifest: StoreManifest, parts: Any = None) -> None:
    there = StoreReader(url).parts
    for part in range(manifest.num_parts) if parts is None else parts:
        if part not in there:
            write_part(Location(url), part, [rollout_of(*pair) for pair in manifest.pairs(part)], [], {})


def grow(url: str, *sizes: tuple[int, int], per_part: int = 4) -> StoreManifest:
    """A store that was filled for each of the sizes (prompts, samples) in turn."""
    manifest = None
    for size in sizes:
        manifest = join(url, asks(*size, per_part=per_part), extend=True)
        fill(url, manifest)
    assert manifest is not None
    return manifest


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_segments_hold_every_pair_once(data: st.DataObject) -> None:
    """Whatever is asked for, one after the other."""
    manifest = asks(data.draw(st.integers(1, 20)), data.draw(st.integers(1, 4)), per_part=data.draw(st.integers(1, 7)))
    existing, identity = manifest, "0" * 16
    for _ in range(data.draw(st.integers(0, 4))):
        prompts, samples = existing.num_prompts + data.draw(st.integers(0, 9)), existing.samples_per_prompt + data.draw(st.integers(0, 3))
        if (prompts, samples) == (existing.num_prompts, existing.samples_per_prompt):
            continue
        wanted = asks(prompts, samples, per_part=manifest.prompts_per_part)
        before = [existing.pairs(part) for part in range(existing.num_parts)]
        existing = joining._plan(Location("memory://x"), existing, identity, wanted, sha256_of, extend=True)
        identity = existing.extensions[-1].store_id
        assert [existing.pairs(part) for part in range(len(before))] == before
    pairs = [pair for part in range(existing.num_parts) for pair in existing.pairs(part)]
    assert sorted(pairs) == [(p, s) for p in range(existing.num_prompts) for s in range(existing.samples_per_prompt)]
    assert len(pairs) == len(set(pairs))
    assert all(0 < len(existing.prompt_range(part)) <= existing.prompts_per_part for part in range(existing.num_parts))


@pytest.mark.parametrize("sizes", [[(6, 2), (11, 2)], [(6, 2), (6, 3)], [(6, 1), (9, 2), (9, 4), (17, 4)]], ids=str)
def test_a_grown_store_holds_what_one_made_at_once_holds(
    tmp_path: Path, sizes: list[tuple[int, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    once, grown = str(tmp_path / "once"), str(tmp_path / "grown")
    grow(once, sizes[-1])
    grow(grown, *sizes)
    score(grown)
    whole, reader = StoreReader(once), StoreReader(grown, teacher="teacher")
    reader.check_complete("teacher")
    assert reader.verify() == []
    wanted = {(r.prompt_index, r.sample_index): r for r in map(whole.rollout, range(len(whole)))}
    assert len(reader) == len(wanted) == sizes[-1][0] * sizes[-1][1]
    for index in range(len(reader)):
        found = reader.rollout(index)
        same_rollout(found, wanted.pop((found.prompt_index, found.sample_index)))
        reader.scores(index, "teacher").check_against(found)
    assert inspect_store(grown, verify=True) == 0
    printed = capsys.readouterr().out
    prompts, samples = sizes[-1]
    last = f"extension {len(sizes) - 1}"
    assert f"{last:<18} to {samples} samples of each of the prompts prompts.jsonl: {prompts} (sha256 {sha256_of(prompts)[:12]})" in printed


def test_the_parts_that_were_there_stay_to_the_byte(tmp_path: Path) -> None:
    url = str(tmp_path / "s")
    first = grow(url, (6, 2))
    score(url)
    before = {path: path.read_bytes() for path in (tmp_path / "s" / "parts").rglob("*") if path.is_file()}
    ids = read_manifest(Location(url))[1]
    manifest = grow(url, (6, 2), (9, 3))
    assert manifest.num_parts == first.num_parts + 2 + 1
    assert {path: path.read_bytes() for path in before} == before
    reader = StoreReader(url)
    assert reader.store_id != ids == reader.manifest.extensions[0].extends
    assert [record.store_id for record in reader.parts.values()] == [ids] * 2 + [reader.store_id] * 3
    assert reader.unscored_parts("teacher") == [2, 3, 4]
    score(url, parts=[0 + 2, 3, 4])
    assert [reader.score_manifest(part, "teacher").store_id for part in reader.parts] == [ids] * 2 + [reader.store_id] * 3  # type: ignore[union-attr]
    StoreReader(url, teacher="teacher").check_complete("teacher")


def test_a_store_without_extensions_is_as_older_versions_write_it(tmp_path: Path) -> None:
    create_store(str(tmp_path / "s"), asks(6, 2))
    attributes = json.loads((tmp_path / "s" / "zarr.json").read_text())["attributes"]["opd"]
    assert "extensions" not in attributes
    assert attributes["format_version"] == 1
    join(str(tmp_path / "s"), asks(7, 2), extend=True)
    assert json.loads((tmp_path / "s" / "zarr.json").read_text())["attributes"]["opd"]["format_version"] == 2  # older versions refuse it


def test_without_being_asked_for_it_is_refused_and_named(tmp_path: Path) -> None:
    url = str(tmp_path / "s")
    grow(url, (6, 2))
    there = sha256_of(6)[:12]
    for size, field in (
        ((9, 2), "prompts is"),
        ((6, 3), r"sampling.samples_per_prompt is"),
        ((9, 3), r"prompts and sampling.samples_per_prompt are"),
    ):
        here = rf"{size[0]} prompts \(sha256 {sha256_of(size[0])[:12]}\) x {size[1]} now"
        with pytest.raises(StoreError, match=rf"{field} 6 prompts \(sha256 {there}\) x 2 there, {here}.*--extend would make what is new"):
            join(url, asks(*size))
    assert read_manifest(Location(url))[0].extensions == []


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        (asks(9, 2, file="b"), "prompts is .*--extend can't do it: the prompts that the store has are not the first"),
        (asks(5, 2), "prompts is .*are not the first"),
        (asks(6, 1), "sampling is .*samples_per_prompt: 2.*it has more samples of each prompt"),
        (asks(9, 1), "it has more samples"),
        (asks(9, 2, stop_ids=[3]), "stop_ids is"),
        (asks(9, 2, per_part=5), "prompts_per_part is"),
        (asks(6, 3).model_copy(update={"sampling": SamplingParams(samples_per_prompt=3, max_new_tokens=60, seed=1)}), "sampling is .*seed: 0"),
    ],
)  # fmt: skip
def test_what_is_no_extension_is_refused(tmp_path: Path, wanted: StoreManifest, why: str) -> None:
    url = str(tmp_path / "s")
    grow(url, (6, 2))
    before = (tmp_path / "s" / "zarr.json").read_bytes()
    with pytest.raises(StoreError, match=f"made with other settings: .*({why})"):
        join(url, wanted, extend=True)
    assert (tmp_path / "s" / "zarr.json").read_bytes() == before


def test_workers_of_the_old_command_do_no_harm(tmp_path: Path) -> None:
    """One that was begun before the extension seals its parts, one that is begun after it makes those of its own alone."""
    url = str(tmp_path / "s")
    old = join(url, asks(6, 2))
    fill(url, old, [0])
    join(url, asks(9, 3), extend=True)
    again = join(url, asks(6, 2))
    assert again == old
    assert again.num_parts == 2
    fill(url, again, [1])
    now = join(url, asks(9, 3))  # needs no --extend any more
    fill(url, now)
    StoreReader(url).check_complete()
    create_store(url, asks(6, 2))
    create_store(url, asks(9, 3))


def test_a_reader_sees_an_extension_when_it_looks_again(tmp_path: Path) -> None:
    url = str(tmp_path / "s")
    grow(url, (6, 2))
    reader = StoreReader(url)
    grow(url, (9, 2))
    assert len(reader) == 12
    reader.refresh()
    assert len(reader) == 18
    shutil.rmtree(tmp_path / "s")
    grow(url, (6, 3))
    with pytest.raises(StoreError, match="was another store"):
        reader.refresh()


def test_parts_of_another_extension_are_refused(tmp_path: Path) -> None:
    """Also one of the same store that was extended otherwise, or to which it did not come yet."""
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    grow(one, (6, 2), (9, 2))
    grow(two, (6, 2), (6, 3))
    shutil.rmtree(Path(one) / part_group(2))
    shutil.copytree(Path(two) / part_group(2), Path(one) / part_group(2))
    with pytest.raises(StoreError, match="parts/000002 is of another store"):
        StoreReader(one)


def test_what_belongs_to_another_segment_is_refused(tmp_path: Path) -> None:
    url = str(tmp_path / "s")
    grow(url, (6, 2))
    manifest = join(url, asks(6, 3), extend=True)
    pairs = manifest.pairs(2)
    assert pairs == [(0, 2), (1, 2), (2, 2), (3, 2)]
    with pytest.raises(StoreError, match="at odds"):
        write_part(Location(url), 2, [rollout_of(prompt, 1) for prompt, _ in pairs], [], {})
    excluded = [Excluded(prompt_index=prompt, sample_index=1, reason="x") for prompt, _ in pairs]
    write_part(Location(url), 2, [rollout_of(*pair) for pair in pairs], [], {})
    record = Location(url).read_attributes(part_group(2))
    assert record is not None
    Location(url).write_attributes(part_group(2), record | {"excluded": [entry.model_dump() for entry in excluded]})
    with pytest.raises(StoreError, match="parts/000002: prompt 0, sample 1 belongs to another part"):
        StoreReader(url)


def test_a_manifest_whose_extensions_do_not_follow_is_refused(tmp_path: Path) -> None:
    url = str(tmp_path / "s")
    grow(url, (6, 2), (9, 2), (9, 3))
    attributes = Location(url).read_attributes("")
    assert attributes is not None
    for change in (
        {"extensions": attributes["extensions"][1:]},
        {"extensions": []},
        {"format_version": 1},
        {"extensions": [attributes["extensions"][0] | {"store_id": "0" * 16}]},
        {"extensions": [attributes["extensions"][0] | {"samples_per_prompt": 1}]},
        {"seed_of_other": 1},
        {"stop_ids": [7]},
    ):
        Location(url).write_attributes("", attributes | change)
        with pytest.raises(StoreError, match=r"manifest is not valid|is of another store"):
            StoreReader(url)
    Location(url).write_attributes("", attributes)
    assert len(StoreReader(url)) == 27
    with pytest.raises(ValidationError, match="extension from"):
        StoreManifest.model_validate(attributes | {"extensions": [attributes["extensions"][0]] * 2})


def test_part_ids_are_of_the_generation(tmp_path: Path) -> None:
    manifest = grow(str(tmp_path / "s"), (6, 2), (9, 2), (9, 3))
    identity = read_manifest(Location(str(tmp_path / "s")))[1]
    ids = [entry.extends for entry in manifest.extensions] + [identity]
    assert [part_id(manifest, identity, part) for part in range(manifest.num_parts)] == [ids[0]] * 2 + [ids[1]] + [ids[2]] * 3
    assert as_of(manifest, 1).num_parts == 3


def test_many_workers_extend_at_once(tmp_path: Path) -> None:
    """The same extension is made once, of two different ones the second goes on from the first or is refused; none is lost."""
    url = str(tmp_path / "s")
    grow(url, (6, 2))
    outcomes: list[Any] = []
    start = threading.Barrier(8)

    def work(size: tuple[int, int]) -> None:
        start.wait()
        try:
            manifest = join(url, asks(*size), extend=True)
            fill(url, manifest)
            outcomes.append(size)
        except StoreError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=work, args=(size,)) for size in [(9, 2), (12, 2)] * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sizes = [entry.prompts.num_prompts for entry in read_manifest(Location(url))[0].extensions]
    assert sizes in ([9, 12], [12])
    if sizes == [12]:  # who wanted less came too late
        assert sum("made with other settings" in str(outcome) for outcome in outcomes) == 4
    else:
        assert sorted(outcomes) == [(9, 2)] * 4 + [(12, 2)] * 4
    reader = StoreReader(url)
    reader.check_complete()
    assert reader.verify() == []


KILLED = """
import json, os, signal, sys
sys.path[:0] = {path!r}
from unit.test_store_extended import asks, fill, join
count = 0
def extend(url, kill_at):
    def hook(event, arguments):
        global count
        if event in ("open", "os.rename", "os.mkdir", "os.link", "os.remove") and url in str(arguments[0]):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    fill(url, join(url, asks(7, 3), extend=True))
    print(count, flush=True)
    os._exit(0)
for url, kill_at in json.loads(sys.argv[1]):  # in a fork each: imports take longer than the work
    pid = os.fork()
    if not pid:
        extend(url, kill_at)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """What is left is the store as it was or extended; the same command goes on, to the same arrays."""
    pristine = tmp_path / "pristine"
    grow(str(pristine), (5, 2))

    def run(*kills: int) -> list[int]:
        runs = [(str(shutil.copytree(pristine, tmp_path / f"killed{kill_at}")), kill_at) for kill_at in kills]
        command = [sys.executable, "-c", KILLED.format(path=sys.path), json.dumps(runs)]
        return list(map(int, subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout.split()))

    operations, status = run(0)
    assert status == 0
    wanted = {part: record.crc32c for part, record in StoreReader(str(tmp_path / "killed0")).parts.items()}
    assert len(wanted) == 2 + 2 + 1
    kills = [*range(3, 15, 3), *np.linspace(20, operations - 1, 3).astype(int).tolist()]  # the extension itself is among the first
    assert run(*kills) == [9] * len(kills)
    for kill_at in kills:
        url = str(tmp_path / f"killed{kill_at}")
        reader = StoreReader(url)  # readable at once
        assert {part: record.crc32c for part, record in reader.parts.items()}.items() <= wanted.items()
        assert reader.manifest.num_parts in (2, 5)
        fill(url, join(url, asks(7, 3), extend=True))
        assert {part: record.crc32c for part, record in StoreReader(url).parts.items()} == wanted


def test_a_plan_that_was_overtaken_is_given_up(tmp_path: Path) -> None:
    """Part numbers of the plan would be other pairs'."""
    url = str(tmp_path / "s")
    grow(url, (6, 2))
    plan = join(url, asks(12, 2), extend=True, write=False)
    same = join(url, asks(12, 2), extend=True, planned=plan)
    assert same.segments() == plan.segments()
    grow(str(tmp_path / "t"), (6, 2))
    plan = join(str(tmp_path / "t"), asks(12, 2), extend=True, write=False)
    join(str(tmp_path / "t"), asks(9, 2), extend=True)
    with pytest.raises(StoreError, match="extended it otherwise since this one began; run the same command again"):
        join(str(tmp_path / "t"), asks(12, 2), extend=True, planned=plan)
    assert len(read_manifest(Location(str(tmp_path / "t")))[0].extensions) == 1


def test_a_place_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(tmp_path / "s")
    grow(url, (6, 2))

    def refuse(*args: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(joining.fcntl, "flock", refuse)
    with pytest.raises(StoreError, match=r"nothing can be locked there .*train.store takes several"):
        join(url, asks(9, 2), extend=True)
    assert read_manifest(Location(url))[0].extensions == []


def test_on_an_object_store() -> None:
    url = "memory://extended/s"
    manifest = grow(url, (6, 2), (9, 2))
    assert len(StoreReader(url)) == 18
    assert manifest.vocab_size == VOCAB


def test_extend_is_named_where_the_command_has_it(tmp_path: Path) -> None:
    url = str(tmp_path / "store")
    join(url, asks(6, 1))
    for extend in (False, None):
        with pytest.raises(StoreError, match=r"prompts is 6 prompts .* use the same settings, or another store path") as refused:
            join(url, asks(7, 1), extend=extend)
        assert ("--extend" in str(refused.value)) == (extend is False)
