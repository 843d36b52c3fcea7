"""The C++ CPU backend: the operators of the extension ``zo_fused._C``.

They take parameters as a table of addresses, one row each. Every sweep is prepared first, which
makes the table. The functions on lists do it at every call, `zo_fused.sweeps.prepared` keeps what
`prepare` returns.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from zo_fused.sweeps.arguments import Lists, split
from zo_fused.sweeps.backends import extension

TRANSFORMS = ("portable", "rademacher")  # as in `Transform` of csrc/element.h
RULES = ("momentum", "sign", "adam")  # as in `Rule` there
_DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}  # as in csrc/cpu/sweeps.h

EXTENSION = "zo_fused._C"
_BUILD = (
    "`pip install --force-reinstall --no-deps --no-cache-dir .` in a clean source tree, with a C++ "
    "compiler"
)

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


def _dtypes(name: str, tensors: Sequence[Tensor]) -> list[int]:
    try:
        return [_DTYPES[tensor.dtype] for tensor in tensors]
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


def noise_table(
    tensors: Sequence[Tensor],
    dtypes: Sequence[int],
    ids: Tensor,
    offsets: Tensor,
    firsts: Sequence[Tensor] = (),
    seconds: Sequence[Tensor] = (),
) -> Tensor:
    """The table of a sweep over noise, int64 [P, 8]: `Noise` of csrc/cpu/binding.cpp."""
    count = len(tensors)
    return _table(
        _addresses("tensors", tensors),
        dtypes,
        list(map(torch.Tensor.numel, tensors)),
        _numbers(ids, count),
        _numbers(offsets, count),
        _addresses("firsts", firsts) or _numbers(None, count),
        _dtypes("firsts", firsts) or _numbers(None, count),
        _addresses("seconds", seconds, torch.float32) or _numbers(None, count),
    )


def lowrank_table(
    params: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    ids: Tensor | None,
    offsets: Tensor | None,
    moments: Sequence[Tensor] = (),
) -> Tensor:
    """The table of a low-rank sweep, int64 [P, 10]: `Product` of csrc/cpu/binding.cpp."""
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
        _addresses("moments", moments, torch.float32) or _numbers(None, count),
    )


# ---- prepared -----------------------------------------------------------------------------------
# Strings stay on this side: torch's stable ABI loses the memory of every one that it hands to C++.


def _fill_table(outs: Sequence[Tensor], dtype: torch.dtype, ids: Tensor, offsets: Tensor) -> Tensor:
    _addresses("outs", outs, dtype)
    return noise_table(outs, [0] * len(outs), ids, offsets)


def _bits(outs: Sequence[Tensor], ids: Tensor, offsets: Tensor) -> Callable[..., None]:
    table = _fill_table(outs, torch.int64, ids, offsets)
    operator = torch.ops.zo_fused_C.bits.default

    def sweep(keys: Tensor) -> None:
        operator(table, keys.contiguous())

    return sweep


def _normal(outs: Sequence[Tensor], ids: Tensor, offsets: Tensor) -> Callable[..., None]:
    table = _fill_table(outs, torch.float32, ids, offsets)
    operator = torch.ops.zo_fused_C.normal.default

    def sweep(keys: Tensor, transform: str = "portable") -> None:
        operator(table, keys.contiguous(), TRANSFORMS.index(transform))

    return sweep


def _dense(params: Sequence[Tensor], ids: Tensor, offsets: Tensor) -> Callable[..., None]:
    table = noise_table(params, _dtypes("params", params), ids, offsets)
    operator = torch.ops.zo_fused_C.dense.default

    def sweep(
        keys: Tensor,
        coeffs: Tensor,
        decay: Tensor,
        rounding: Tensor | None = None,
        transform: str = "portable",
    ) -> None:
        rows = [row.contiguous() for row in (keys, coeffs, decay)]
        operator(table, *rows, rounding, TRANSFORMS.index(transform))

    return sweep


def _moments(
    params: Sequence[Tensor],
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor],
    ids: Tensor,
    offsets: Tensor,
) -> Callable[..., None]:
    table = noise_table(params, _dtypes("params", params), ids, offsets, firsts, seconds)
    operator = torch.ops.zo_fused_C.moments.default

    def sweep(
        keys: Tensor,
        grads: Tensor,
        restores: Tensor,
        coeffs: Tensor,
        decay: Tensor,
        rule: str,
        rounding: Tensor | None = None,
        transform: str = "portable",
        squares: Tensor | None = None,
    ) -> None:
        rows = [row.contiguous() for row in (keys, grads, restores, coeffs, decay)]
        squares = None if squares is None else squares.contiguous()
        operator(table, *rows, RULES.index(rule), rounding, TRANSFORMS.index(transform), squares)

    return sweep


def _dense_steps(params: Sequence[Tensor], ids: Tensor, offsets: Tensor) -> Callable[..., None]:
    table = noise_table(params, _dtypes("params", params), ids, offsets)
    operator = torch.ops.zo_fused_C.dense_steps.default

    def sweep(
        keys: Tensor,
        script: Tensor,
        coeffs: Tensor,
        decay: Tensor,
        transform: str = "portable",
    ) -> None:
        rows = [row.contiguous() for row in (keys, script, coeffs, decay)]
        operator(table, *rows, TRANSFORMS.index(transform))

    return sweep


def _lowrank_steps(
    params: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    ids: Tensor,
    offsets: Tensor,
) -> Callable[..., None]:
    # Addresses and shapes of the first product; the others follow it.
    table = lowrank_table(params, [u[0] for u in us], vs, ids, offsets)
    products = us[0].shape[0] if us else 0
    operator = torch.ops.zo_fused_C.lowrank_steps.default

    def sweep(*rows: Tensor) -> None:
        operator(table, products, *[row.contiguous() for row in rows])

    return sweep


def _lowrank(name: str) -> Callable[..., Callable[..., None]]:
    def prepare(*arguments: Any) -> Callable[..., None]:
        params, *moments, us, vs, ids, offsets = arguments
        table = lowrank_table(params, us, vs, ids, offsets, *moments)
        operator = getattr(torch.ops.zo_fused_C, name).default

        def sweep(coeffs: Tensor, decay: Tensor, rounding: Tensor | None = None) -> None:
            if rounding is not None and (ids is None or offsets is None):
                raise ValueError("zo_fused: stochastic rounding needs ids and offsets")
            operator(table, coeffs.contiguous(), decay.contiguous(), rounding)

        return sweep

    return prepare


_MAKERS: dict[str, Callable[..., Callable[..., None]]] = {
    "bits_": _bits,
    "normal_": _normal,
    "dense_": _dense,
    "dense_steps_": _dense_steps,
    "moments_": _moments,
    "lowrank_": _lowrank("lowrank"),
    "lowrank_steps_": _lowrank_steps,
    "lowrank_momentum_": _lowrank("lowrank_momentum"),
}


def prepare(
    name: str, lists: Lists, ids: Tensor | None, offsets: Tensor | None
) -> Callable[..., None]:
    """A sweep over these tensors, which must stay alive and where they are. It takes the other
    arguments in the order of the schema."""
    return _MAKERS[name](*lists, ids, offsets)


# ---- on lists -----------------------------------------------------------------------------------


def _on_lists(name: str) -> Callable[..., None]:
    def call(*arguments: Any) -> None:
        lists, ids, offsets, rows = split(name, arguments)
        prepare(name, lists, ids, offsets)(*rows)

    call.__name__ = name
    return call


bits_ = _on_lists("bits_")
normal_ = _on_lists("normal_")
dense_ = _on_lists("dense_")
dense_steps_ = _on_lists("dense_steps_")
moments_ = _on_lists("moments_")
lowrank_ = _on_lists("lowrank_")
lowrank_steps_ = _on_lists("lowrank_steps_")
lowrank_momentum_ = _on_lists("lowrank_momentum_")
