"""Creates a store, joins one that was made with the same settings, or extends one that holds the beginning of what is asked for."""

from __future__ import annotations

import errno
import fcntl
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_opd.data.location import Location
from megatron_opd.data.manifests import FREE_FIELDS, as_written, extension_id, read_manifest
from megatron_opd.errors import BRANCH, StoreError
from megatron_opd.safety.durable import file_system
from megatron_opd.safety.untrusted import one_line
from megatron_opd.store_records import EXTENDED_FORMAT, Extension, StoreManifest

_HASH = re.compile(r"[0-9a-f]{64}")
LOCK_FILE = ".extend.lock"
_LOCK_SECONDS = 60.0  # a manifest is written in milliseconds
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
HashFirst = Callable[[int], str]  # sha256 of the first n prompts, as a PromptFile has it


def join_store(
    url: str,
    wanted: StoreManifest,
    hash_first: HashFirst | None = None,
    *,
    extend: bool | None = False,
    write: bool = True,
    planned: StoreManifest | None = None,
) -> StoreManifest:
    """The store's manifest up to what `wanted` asks for; the store is created or, with `extend`, extended for it, unless not `write`.

    `extend` is None for a command that can't. A store that was extended beyond `wanted` is joined as it was before. `hash_first` tells whether a store holds the first of the wanted
    prompts; `planned` is what it answered before, when nothing was written. Raises StoreError naming what differs.
    """
    location = Location(url)
    if location.read_attributes("") is None:
        if not write:
            return wanted
        location.write_attributes("", as_written(wanted), exclusive=True)
    existing, identity = read_manifest(location)
    plan = _plan(location, existing, identity, wanted, hash_first, extend)
    if not write:
        return plan
    if len(plan.extensions) > len(existing.extensions):
        plan = _extend(location, wanted, hash_first, planned)
    _check_planned(location, plan, planned)
    location.make_group("parts")
    for group in ("", "parts"):
        location.remove_leftovers(group)
    return plan


def as_of(manifest: StoreManifest, generation: int) -> StoreManifest:
    """The manifest of a store before its extensions beyond the first `generation`."""
    version = EXTENDED_FORMAT if generation else 1
    return manifest.model_copy(update={"extensions": manifest.extensions[:generation], "format_version": version})


def _check_planned(location: Location, plan: StoreManifest, planned: StoreManifest | None) -> None:
    """Raise StoreError if part numbers would stand for other rollouts than when the work was planned."""
    if planned is not None and plan.segments() != planned.segments():
        raise StoreError(f"{location.url}: another worker extended it otherwise since this one began; run the same command again")


def _extend(location: Location, wanted: StoreManifest, hash_first: HashFirst | None, planned: StoreManifest | None) -> StoreManifest:
    """Write the extension down, in one step; whoever did it first has done it for all."""
    with _locked(location):
        existing, identity = read_manifest(location)
        plan = _plan(location, existing, identity, wanted, hash_first, extend=True)
        _check_planned(location, plan, planned)
        if len(plan.extensions) > len(existing.extensions):
            location.write_attributes("", as_written(plan))
    written = read_manifest(location)[0]
    if [entry.store_id for entry in written.extensions[: len(plan.extensions)]] != [entry.store_id for entry in plan.extensions]:
        raise StoreError(f"{location.url}: another worker extended it at the same time; run the same command again")
    return plan


def _plan(
    location: Location, existing: StoreManifest, identity: str, wanted: StoreManifest, hash_first: HashFirst | None, extend: bool | None
) -> StoreManifest:
    """The manifest that `wanted` is served by: `existing`, as it is or was, or with one more extension. Raises StoreError."""
    for generation in range(len(existing.extensions), -1, -1):
        if not _differences(flat(as_of(existing, generation)), wanted):
            return as_of(existing, generation)
    now = flat(existing)
    found = _differences(now, wanted)
    if found.keys() - {"prompts", "sampling"} or not _only_samples_differ(now, wanted):
        fixed = {key: found[key] for key in found if key != "prompts"} if extend else {}
        raise _refusal(location, fixed or found)
    kept, grows = _prompts_kept(now, wanted, hash_first), wanted.prompts.num_prompts > now.prompts.num_prompts
    more = wanted.sampling.samples_per_prompt - now.sampling.samples_per_prompt
    if not kept or more < 0 or not (grows or more):
        why = (
            ""
            if not extend
            else "; --extend can't do it: "
            + (
                "the prompts that the store has are not the first of those asked for now"
                if not kept
                else "it has more samples of each prompt"
            )
        )
        raise _refusal(location, found, why)
    if not extend:
        there, here = (
            f"{m.prompts.num_prompts} prompts (sha256 {m.prompts.sha256[:12]}) x {m.sampling.samples_per_prompt}" for m in (now, wanted)
        )
        hint = "what it has is the beginning of it, so --extend would make what is new alone; or " if extend is not None else ""
        raise StoreError(
            f"{location.url} was made with other settings: {_fields(grows, more)} {there} there, {here} now; {hint}use the same settings, "
            f"or another store path; {BRANCH}"
        )
    added = Extension(
        prompts=wanted.prompts,
        samples_per_prompt=wanted.sampling.samples_per_prompt,
        extends=identity,
        store_id=extension_id(identity, wanted.prompts, wanted.sampling.samples_per_prompt),
        provenance=wanted.provenance,
    )
    entries = [*existing.extensions, added]
    return StoreManifest.model_validate(
        existing.model_dump() | {"format_version": EXTENDED_FORMAT, "extensions": [e.model_dump() for e in entries]}
    )


def _fields(grows: bool, more: int) -> str:
    return " and ".join([*(["prompts"] if grows else []), *(["sampling.samples_per_prompt"] if more else [])]) + (
        " are" if grows and more else " is"
    )


def flat(manifest: StoreManifest) -> StoreManifest:
    """As a store would say it that was made at once."""
    sampling = manifest.sampling.model_copy(update={"samples_per_prompt": manifest.samples_per_prompt})
    return manifest.model_copy(update={"prompts": manifest.all_prompts, "sampling": sampling, "extensions": [], "format_version": 1})


def _differences(existing: StoreManifest, wanted: StoreManifest) -> dict[str, tuple[Any, Any]]:
    """What differs between two manifests without extensions: field -> (there, here). A prompt file's name is no difference."""
    there, here = existing.model_dump(), wanted.model_dump()
    if here["prompts"]["sha256"] == there["prompts"]["sha256"]:
        here["prompts"]["name"] = there["prompts"]["name"]
    return {
        key: (there.get(key), here.get(key)) for key in here | there if key not in FREE_FIELDS and there.get(key) != here.get(key)
    }  # the round is there in runs of several alone


def _only_samples_differ(now: StoreManifest, wanted: StoreManifest) -> bool:
    return now.sampling.model_copy(update={"samples_per_prompt": wanted.sampling.samples_per_prompt}) == wanted.sampling


def _prompts_kept(now: StoreManifest, wanted: StoreManifest, hash_first: HashFirst | None) -> bool:
    """Whether the store's prompts are the first of those wanted."""
    count = now.prompts.num_prompts
    if wanted.prompts.num_prompts <= count or hash_first is None:
        return wanted.prompts.num_prompts == count and wanted.prompts.sha256 == now.prompts.sha256
    return hash_first(count) == now.prompts.sha256


def _refusal(location: Location, found: dict[str, tuple[Any, Any]], why: str = "") -> StoreError:
    key, (there, here) = next(iter(found.items()))
    return StoreError(
        f"{location.url} was made with other settings: {key} is {_brief(there, here)} there, "
        f"{_brief(here, there)} now{why}; use the same settings, or another store path; {BRANCH}"
    )


def _brief(value: Any, other: Any) -> str:
    """The part of `value` that differs from `other`; of a hash its beginning."""
    if isinstance(value, dict) and isinstance(other, dict):
        return (
            "{"
            + ", ".join(f"{key}: {_brief(value.get(key), other.get(key))}" for key in value | other if value.get(key) != other.get(key))
            + "}"
        )
    return value[:12] if isinstance(value, str) and _HASH.fullmatch(value) else one_line(value)


@contextmanager
def _locked(location: Location) -> Iterator[None]:
    """One process at a time extends a store on a local file system; object stores have no locks. Raises StoreError."""
    if not location.is_local:
        yield
        return
    with Path(location.path(LOCK_FILE)).open("a", encoding="utf-8") as file:
        end = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise StoreError(f"{location.url}: another process holds {LOCK_FILE} for {_LOCK_SECONDS:.0f} s; end it") from None
                time.sleep(0.05)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                raise StoreError(
                    f"{location.url}: nothing can be locked there ({file_system(location.root)}: {error.strerror}), so two workers could extend "
                    "it at once; mount it with locks (Lustre: flock; NFS: not nolock), or sample what is new into another store: train.store takes several"
                ) from None
        yield
