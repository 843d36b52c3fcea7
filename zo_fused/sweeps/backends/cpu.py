"""The C++ CPU backend: the operators of the extension ``zo_fused._C``.

They take parameters as a table of addresses, one row each, which is made when a sweep is prepared.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from zo_fused.sweeps import reference
from zo_fused.sweeps.backends import extension, on_lists
from zo_fused.sweeps.numbers import EXACT, NUMBER, NUMBER_OF_DTYPE
from zo_fused.sweeps.signatures import SWEEPS, Lists

TRANSFORMS = EXACT

EXTENSION = "zo_fused._C"
_BUILD = (
    "`pip install --force-reinstall --no-deps --no-cache-dir .` in a clean source tree, with a C++ "
    "compiler"
)

key_ = reference.key_  # is for graphs, and no CPU has any

import_error = extension.load(EXTENSION)  # registers zo_fused_C::*


def why_not(device_type: str) -> str | None:
    """None if this backend serves the device, else the reason."""
    if device_type != "cpu":
        return f"the cpu backend serves CPU tensors, not {device_type!r}"
    if import_error is not None:
        return extension.why_not("the C++ extension", EXTENSION, import_error, _BUILD)
    return None


def isa() -> str:
    """The instruction set chosen at run time: ``avx512``, ``avx2`` or ``portable``."""
    return ("portable", "avx2", "avx512")[torch.ops.zo_fused_C.isa()]


# ---- tables -------------------------------------------------------------------------------------
# Addresses are all that C++ sees of a tensor, so dtypes are checked once more here.


SCALE, MASK = NUMBER_OF_DTYPE[torch.float32], len(NUMBER_OF_DTYPE)  # what a shape is, in C++


def _dtypes(name: str, tensors: Sequence[Tensor]) -> list[int]:
    try:
        return [NUMBER_OF_DTYPE[tensor.dtype] for tensor in tensors]
    except KeyError as dtype:
        raise TypeError(
            f"zo_fused: {name} must be of dtype float16, bfloat16 or float32, got {dtype}"
        ) from None


def _addresses(name: str, tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[int]:
    if dtype is not None and not {tensor.dtype for tensor in tensors} <= {dtype}:
        raise TypeError(f"zo_fused: {name} must be of dtype {dtype}")
    return list(map(torch.Tensor.data_ptr, tensors))


def _numbers(per_parameter: Tensor | None, count: int) -> list[int]:
    return [0] * count if per_parameter is None else per_parameter.tolist()


def _table(*columns: Sequence[int]) -> Tensor:
    numbers = array("q", list(chain.from_iterable(columns)))
    if not numbers:
        return torch.empty(0, len(columns), dtype=torch.int64, device="cpu")
    return torch.frombuffer(numbers, dtype=torch.int64).view(len(columns), -1).t().contiguous()


def noise_table(name: str, lists: Lists, ids: Tensor | None, offsets: Tensor | None) -> Tensor:
    """The table of a sweep over noise or factors, int64 [P, 8]: `Noise` of csrc/cpu/binding.cpp."""
    tensors, firsts, seconds = (*lists, (), ())[:3]
    if name == "shaped_":
        kinds = [MASK if shape.dtype == torch.uint8 else SCALE for shape in firsts]
        _addresses(
            "shapes", [shape for shape in firsts if shape.dtype != torch.uint8], torch.float32
        )
    else:
        kinds = _dtypes("firsts", firsts)
    count, label, dtypes = len(tensors), SWEEPS[name].lists[0], SWEEPS[name].dtypes
    only = dtypes[0] if len(dtypes) == 1 else None
    return _table(
        _addresses(label, tensors, only),
        _numbers(None, count) if only else _dtypes(label, tensors),
        list(map(torch.Tensor.numel, tensors)),
        _numbers(ids, count),
        _numbers(offsets, count),
        _addresses("firsts", firsts) or _numbers(None, count),
        kinds or _numbers(None, count),
        _addresses("seconds", seconds, torch.float32) or _numbers(None, count),
    )


def lowrank_table(lists: Lists, ids: Tensor | None, offsets: Tensor | None) -> Tensor:
    """The table of a low-rank sweep, int64 [P, 9]: `Product` of csrc/cpu/binding.cpp."""
    params, us, vs = lists
    count = len(params)
    shapes = [u.shape for u in us]
    return _table(
        _addresses("params", params),
        _dtypes("params", params),
        _numbers(ids, count),
        _numbers(offsets, count),
        [rows for rows, _ in shapes],
        [v.shape[0] for v in vs],
        [rank for _, rank in shapes],
        _addresses("us", us, torch.float32),
        _addresses("vs", vs, torch.float32),
    )


# ---- sweeps -------------------------------------------------------------------------------------


def prepare(
    name: str, lists: Lists, ids: Tensor | None, offsets: Tensor | None
) -> Callable[..., None]:
    """A sweep over these tensors, which must stay alive and where they are. It takes the rows of
    the operator."""
    if name == "lowrank_momentum_":
        return on_lists.lowrank_momentum(prepare, lists, ids, offsets)
    if name == "lowrank_":
        table = lowrank_table(lists, ids, offsets)
    else:
        table = noise_table(name, lists, ids, offsets)
    operator = getattr(torch.ops.zo_fused_C, name.removesuffix("_")).default
    complete, defaults = SWEEPS[name].complete, SWEEPS[name].defaults
    nearest = name == "lowrank_" and (ids is None or offsets is None)

    def sweep(*given: Any, **options: Any) -> None:
        # A call less than `complete`; rows that fit are the caller's affair.
        rows = complete(given, options) if options else given + defaults[len(given) :]
        if nearest and rows[-1] is not None:
            raise ValueError("zo_fused: stochastic rounding needs ids and offsets")
        # Words stay on this side: torch's stable ABI loses the memory of every string that it hands
        # to C++.
        operator(
            table,
            *[r if r is None else NUMBER[r] if type(r) is str else r.contiguous() for r in rows],
        )

    return sweep


globals().update(on_lists.functions(prepare, on_lists.Kept()))  # dense_ and the others
