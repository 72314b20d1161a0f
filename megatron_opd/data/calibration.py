"""The record of how far serving and training engine are apart, kept beside a store's parts."""

from __future__ import annotations

import json

from megatron_opd.data.location import Location, check_record, record_checksum
from megatron_opd.data.manifests import parse_manifest
from megatron_opd.errors import StoreError, UserError
from megatron_opd.safety.untrusted import load_json
from megatron_opd.store_records import Calibration

FILE, _CHECKSUM = "calibration.json", "crc32c"
_ROUNDING = 1e-3  # nats


def read_calibration(location: Location) -> Calibration | None:
    """None if it was never measured. Raises StoreError."""
    content, shown = location.read_file(FILE), location.show(FILE)
    if content is None:
        return None
    remedy = f"delete it and run 'megatron-opd check {location.url} --model STUDENT'"
    try:
        record = load_json(content, shown)
        if not isinstance(record, dict):
            raise UserError(f"{shown}: must be a JSON object, not {type(record).__name__}")
        crc32c = record.pop(_CHECKSUM, None)  # those of older versions have none
        check_record(record, crc32c, shown, "measure again")
        return parse_manifest(Calibration, record, shown)
    except UserError as error:
        raise StoreError(f"{error}; {remedy}") from None


def write_calibration(location: Location, calibration: Calibration) -> None:
    """Replace the record."""
    record = calibration.model_dump(mode="json")
    location.write_file(FILE, json.dumps({**record, _CHECKSUM: record_checksum(record)}, indent=1).encode())


def servers_differ(record: Calibration, weights: str, bound: float) -> str | None:
    """What to say if servers of the model with these weights differ by more than the engines do, or than `bound` where these were not compared.

    Two servers of the same dtype have no reason to differ by more than two programs do; a thousandth is fp32 rounding.
    """
    replicas, limit = record.replicas.get(weights), record.floor.mean if record.floor is not None else bound
    if replicas is None or replicas.mean <= max(limit, _ROUNDING):
        return None
    return f"the servers differ by more than the engines ({replicas.mean:.4g} over {limit:.4g} nats): start them alike"


def check_calibration(location: Location, teacher_weights: str, bound: float, *, sampler: str = "STUDENT") -> str:
    """A sentence about the noise of the engines; raises UserError where it is over `bound` nats a token on average."""
    record = read_calibration(location)
    if record is not None and record.skipped is not None:
        return f"the noise between serving and training engine was not measured: {record.skipped}"
    if record is None or record.floor is None:
        return (
            f"the noise between serving and training engine is not known; measure it: megatron-opd check {location.url} --model {sampler}"
        )
    gaps = {"scores of the serving engine and of Megatron": record.floor, "pi_ref in the store and Megatron": record.stored}
    gaps["servers of the teacher"] = record.replicas.get(teacher_weights)
    for name, gap in gaps.items():
        if gap is not None and gap.mean > bound:
            raise UserError(
                f"{location.url}: {name} differ by {gap.mean:.4g} nats a token on average, over train.max_engine_gap = {bound:g}; "
                "find out why (dtype, quantization, another model, temperature), or raise the bound"
            )
    return f"noise between serving and training engine: {record.floor.describe()}"
