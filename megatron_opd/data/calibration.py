"""The record of how far serving and training engine are apart, kept beside a store's parts."""

from __future__ import annotations

from pydantic import ValidationError

from megatron_opd.data.location import Location
from megatron_opd.errors import StoreError, UserError
from megatron_opd.records import Calibration

FILE = "calibration.json"


def read_calibration(location: Location) -> Calibration | None:
    """None if it was never measured. Raises StoreError."""
    try:
        return Calibration.model_validate_json(location.fs.cat_file(location.path(FILE)))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise StoreError(
            f"{location.show(FILE)} is not valid: {error}; delete it and run 'megatron-opd check STORE --model STUDENT'"
        ) from None


def write_calibration(location: Location, record: Calibration) -> None:
    """Replace the record."""
    location.write_file(FILE, record.model_dump_json(indent=1).encode())


def check_calibration(location: Location, teacher_weights: str, bound: float) -> str:
    """A sentence about the noise of the engines; raises UserError where it is over `bound` nats a token on average."""
    record = read_calibration(location)
    if record is None or record.floor is None:
        return f"the noise between serving and training engine is not known; measure it: megatron-opd check {location.url} --model STUDENT"
    gaps = {"scores of the serving engine and of Megatron": record.floor, "pi_ref in the store and Megatron": record.stored}
    gaps["servers of the teacher"] = record.replicas.get(teacher_weights)
    for name, gap in gaps.items():
        if gap is not None and gap.mean > bound:
            raise UserError(
                f"{location.url}: {name} differ by {gap.mean:.4g} nats a token on average, over train.max_engine_gap = {bound:g}; "
                "find out why (dtype, quantization, another model, temperature), or raise the bound"
            )
    return f"noise between serving and training engine: {record.floor.describe()}"
