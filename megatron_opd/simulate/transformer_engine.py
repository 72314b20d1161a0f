"""Stands in for `transformer_engine_torch`, the compiled half of Transformer Engine; its Python half is the real one.

Every call is bound to the real signature (te-VERSION.json, which tools/te_signatures.py reads from the sdist's C++ sources), its tensors must
be on the GPU, and its results have the real shapes and dtypes. A function that nobody has written a stand-in for raises with its name.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import types
from collections import Counter
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch

from megatron_opd.simulate import te_functions, te_quantized
from megatron_opd.simulate.needs import TABLE_VERSION, check_transformer_engine
from megatron_opd.simulate.te_shapes import TORCH_DTYPES

TABLE: dict[str, Any] = json.loads((Path(__file__).parent / f"te-{TABLE_VERSION}.json").read_text(encoding="utf-8"))
CALLS: Counter[str] = Counter()  # of compiled functions, by name
_MODULE = "transformer_engine_torch"
# Classes that the Python half names; a simulation makes none of them.
_CLASSES = ("CommOverlapHelper", "CommOverlap", "CommOverlapP2P", "CommOverlapCore", "CommOverlapBase", "CommOverlapP2PBase")


class FP8TensorMeta:
    """Scales of delayed scaling; the Python half fills the fields."""

    scale = scale_inv = amax_history = None


def install() -> None:
    """Let `import transformer_engine` find the stand-in; before it or megatron.core is imported. Calling it again does nothing.

    Raises UserError if there is no Transformer Engine, or one of another version than the table's.
    """
    if isinstance(getattr(sys.modules.get(_MODULE), "simulated", None), bool):
        return
    check_transformer_engine()
    if early := [name for name in ("transformer_engine", "megatron.core") if name in sys.modules]:
        raise RuntimeError(f"the stand-in for {_MODULE} must be installed before {early[0]} is imported")
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # its Python half then loads no library
    sys.modules[_MODULE] = _make_module()
    import transformer_engine.common as common  # pyright: ignore[reportMissingImports]

    common.load_framework_extension = lambda framework: None
    import transformer_engine.pytorch.attention.dot_product_attention.utils as choices  # pyright: ignore[reportMissingImports]

    choose = choices.get_attention_backend

    def get_attention_backend(parameters: Any) -> Any:
        # It looks at the exact type of the queries; one that it does not know gets unfused attention, silently.
        import dataclasses

        return choose(dataclasses.replace(parameters, qkv_type=torch.Tensor))

    choices.get_attention_backend = get_attention_backend


def _make_module() -> types.ModuleType:
    module: Any = types.ModuleType(_MODULE)
    module.simulated = True
    for name, members in TABLE["enums"].items():
        setattr(module, name, IntEnum(name, members))
    TORCH_DTYPES.update({member.value: kind for member in module.DType if (kind := _torch_dtype(member.name)) is not None})
    module.FP8TensorMeta = FP8TensorMeta
    for name in _CLASSES:
        setattr(module, name, type(name, (), {}))
    implementations = te_functions.stand_ins(module) | te_quantized.stand_ins()
    if unknown := implementations.keys() - TABLE["functions"].keys():
        raise AssertionError(f"Transformer Engine {TABLE_VERSION} has no {', '.join(sorted(unknown))}")
    for name, arguments in TABLE["functions"].items():  # all at once: the Python half imports *
        setattr(module, name, _function(name, _signature(arguments), implementations.get(name)))
    return module


def _torch_dtype(name: str) -> torch.dtype | None:
    return {
        "kByte": torch.uint8,
        "kInt32": torch.int32,
        "kFloat32": torch.float32,
        "kFloat16": torch.float16,
        "kBFloat16": torch.bfloat16,
        "kFloat8E4M3": torch.float8_e4m3fn,
        "kFloat8E5M2": torch.float8_e5m2,
    }.get(name)


def _function(name: str, signature: inspect.Signature, implementation: Callable[..., Any] | None) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{_MODULE}.{name}: {error}") from None
        for value in (*args, *kwargs.values()):
            _check_device(name, value)
        CALLS[name] += 1
        if implementation is None:
            shapes = [tuple(value.shape) if isinstance(value, torch.Tensor) else value for value in args]
            raise NotImplementedError(f"{_MODULE}.{name} has no stand-in in megatron_opd/simulate: called with {shapes} {sorted(kwargs)}")
        return implementation(*args, **kwargs)

    call.__name__ = name
    return call


def _check_device(name: str, value: Any) -> None:
    if isinstance(value, (list, tuple)):
        for entry in value:
            _check_device(name, entry)
    elif isinstance(value, torch.Tensor) and value.device.type != "cuda":
        raise RuntimeError(f"{_MODULE}.{name}: a tensor {tuple(value.shape)} is on {value.device}, it takes those on a GPU")


def _signature(arguments: list[list[Any]] | int) -> inspect.Signature:
    """Of a compiled function: [name, has a default] each, '*' before keyword-only ones; or the number of positional ones."""
    kinds = inspect.Parameter
    if isinstance(arguments, int):
        return inspect.Signature([kinds(f"a{number}", kinds.POSITIONAL_ONLY) for number in range(arguments)])
    parameters: list[inspect.Parameter] = []
    kind, optional = kinds.POSITIONAL_OR_KEYWORD, False
    for name, has_default in arguments:
        if name == "*":
            kind = kinds.KEYWORD_ONLY
            continue
        # pybind takes a required argument after an optional one, Python's signature does not
        optional |= has_default
        default = None if has_default or (optional and kind is kinds.POSITIONAL_OR_KEYWORD) else kinds.empty
        parameters.append(kinds(name, kind, default=default))
    return inspect.Signature(parameters)
