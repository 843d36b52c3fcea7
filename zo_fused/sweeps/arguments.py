"""The arguments of sweeps: their order, and what they must be.

They are checked in two parts. `check_lists` looks at every tensor, `check_rows` at what changes
from call to call, in a time that does not depend on the number of parameters: a prepared sweep
(`zo_fused.sweeps.prepared`) does only this at every call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import mul
from typing import Any, NamedTuple

import torch
from torch import Tensor

WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TRANSFORMS = ("portable", "rademacher", "fast")
RULES = ("momentum", "adam", "sign")

# The lists of tensors that a sweep begins with, and how many of them, the first ones, it writes.
_LABELS = {
    "bits_": ("outs",),
    "normal_": ("outs",),
    "dense_": ("params",),
    "dense_steps_": ("params",),
    "moments_": ("params", "firsts", "seconds"),
    "lowrank_": ("params", "us", "vs"),
    "lowrank_steps_": ("params", "us", "vs"),
    "lowrank_momentum_": ("params", "moments", "us", "vs"),
}
LISTS = {name: len(labels) for name, labels in _LABELS.items()}
WRITTEN = LISTS | {"lowrank_": 1, "lowrank_steps_": 1, "lowrank_momentum_": 2}
_LOWRANK = ("lowrank_", "lowrank_momentum_")

Lists = Sequence[Sequence[Tensor]]


# ---- order --------------------------------------------------------------------------------------


class Parts(NamedTuple):
    """The arguments of a sweep, apart."""

    lists: Lists
    ids: Tensor | None
    offsets: Tensor | None
    rows: tuple[Any, ...]  # the others, in the order of the schema


def split(name: str, args: Sequence[Any]) -> Parts:
    """The arguments of a sweep in the order of its schema; the last defaults may be left out."""
    lists, rest = args[: LISTS[name]], tuple(args[LISTS[name] :])
    if name not in _LOWRANK:
        return Parts(lists, rest[0], rest[1], rest[2:])
    ids, offsets, rounding = (*rest[2:], None, None, None)[:3]
    return Parts(lists, ids, offsets, (*rest[:2], rounding))


def bind(
    sweep: Callable[..., Any], name: str, lists: Lists, ids: Tensor | None, offsets: Tensor | None
) -> Callable[..., None]:
    """A sweep with everything but its rows."""

    def lowrank(coeffs: Tensor, decay: Tensor, rounding: Tensor | None = None) -> None:
        sweep(*lists, coeffs, decay, ids, offsets, rounding)

    def noise(*rows: Any, **options: Any) -> None:
        sweep(*lists, ids, offsets, *rows, **options)

    return lowrank if name in _LOWRANK else noise


# ---- lists, ids and offsets ---------------------------------------------------------------------


@dataclass(frozen=True)
class Checked:
    """What is known of lists that have been checked, and what rows must fit."""

    name: str
    count: int  # parameters
    device: torch.device | None  # None if there are none
    streams: bool  # whether there are ids and offsets
    lengths: tuple[int, ...]  # of the lists
    products: int = 0  # of ``lowrank_steps_``


def check_lists(name: str, lists: Lists, ids: Tensor | None, offsets: Tensor | None) -> Checked:
    """Check the lists of a sweep, ids and offsets.

    Raises:
        TypeError: a tensor has a dtype that the sweep does not take.
        ValueError: anything else that a sweep can't work with.
    """
    params = lists[0]
    if name in ("bits_", "normal_"):
        _check_tensors("outs", params, (torch.int64 if name == "bits_" else torch.float32,))
    else:
        _check_tensors("params", params, WEIGHT_DTYPES)
    if name == "moments_":
        _check_moments(params, lists[1], lists[2])
    if name in _LOWRANK:
        _check_factors(params, lists[-2], lists[-1])
    if name == "lowrank_steps_":
        _check_factors_of_products(params, lists[1], lists[2])
    if name == "lowrank_momentum_":
        _check_factor_moments(lists[1], lists[2])
    streams = ids is not None and offsets is not None
    _check(streams or name in _LOWRANK, "ids and offsets are needed")
    if ids is not None and offsets is not None:
        for label, row in (("ids", ids), ("offsets", offsets)):
            _check_row(label, row, torch.int64, (len(params),))
            _check(row.device.type == "cpu", f"{label} must be a CPU tensor")
    device = params[0].device if params else None
    products = lists[1][0].shape[0] if name == "lowrank_steps_" and params else 0
    return Checked(name, len(params), device, streams, tuple(map(len, lists)), products)


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"zo_fused: {message}")


def _check_tensors(name: str, tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> None:
    """Runs for every parameter, so messages are made only where one is needed."""
    for i, tensor in enumerate(tensors):
        if tensor.dtype not in dtypes:
            wanted = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise TypeError(
                f"zo_fused: {name}[{i}] has dtype {str(tensor.dtype).removeprefix('torch.')}; "
                f"supported: {wanted}"
            )
        if tensor.device != tensors[0].device:
            raise ValueError(
                f"zo_fused: {name}[{i}] is on {tensor.device}, {name}[0] on {tensors[0].device}; "
                "one call serves one device"
            )
        if reason := not_dense(tensor):
            raise ValueError(f"zo_fused: {name}[{i}] {reason}")


def not_dense(tensor: Tensor) -> str:
    """Why a tensor's elements don't fill a piece of memory, each a place of its own; or nothing."""
    if tensor.layout != torch.strided:
        return f"has layout {str(tensor.layout).removeprefix('torch.')}; only dense tensors work"
    if tensor.is_contiguous() or not torch._debug_has_internal_overlap(tensor):
        return ""
    return (
        "is a view with gaps in its memory, or whose elements share memory, of shape "
        f"{tuple(tensor.shape)} and strides {tensor.stride()}; give it memory of its own: "
        ".contiguous(), .clone()"
    )


def overlap(written: Sequence[Tensor], read: Sequence[Tensor] = ()) -> tuple[int, int] | None:
    """Two dense tensors that share memory, one of them written, by their positions in both lists
    together; None if there are none."""
    tensors = [*written, *read]
    starts = map(torch.Tensor.data_ptr, tensors)
    sizes = map(mul, map(torch.Tensor.numel, tensors), map(torch.Tensor.element_size, tensors))
    last_written = last = (0, -1)  # where the memory seen so far ends, and whose it is
    for start, size, i in sorted(zip(starts, sizes, range(len(tensors)), strict=True)):
        if not size:
            continue
        writes = i < len(written)
        end, other = last if writes else last_written
        if start < end:
            return min(i, other), max(i, other)
        last = max(last, (start + size, i))
        if writes:
            last_written = max(last_written, (start + size, i))
    return None


def check_apart(name: str, lists: Lists) -> None:
    """What a sweep writes shares no memory with other tensors of it.

    Raises:
        ValueError: two do.
    """
    written, read = lists[: WRITTEN[name]], lists[WRITTEN[name] :]
    pair = overlap(list(chain.from_iterable(written)), list(chain.from_iterable(read)))
    if pair is not None:
        labels = [
            f"{label}[{i}]"
            for label, tensors in zip(_LABELS[name], lists, strict=True)
            for i in range(len(tensors))
        ]
        first, second = (labels[i] for i in pair)
        raise ValueError(f"zo_fused: {first} and {second} share memory, and one is written")


def _check_moments(
    params: Sequence[Tensor], firsts: Sequence[Tensor], seconds: Sequence[Tensor]
) -> None:
    if firsts:
        _check_state("firsts", firsts, params, float32_only=False)
        _check(
            len({tensor.dtype for tensor in firsts}) < 2
            or all(t.dtype == p.dtype for t, p in zip(firsts, params, strict=True)),
            "firsts must be float32 throughout, or each of its parameter's dtype",
        )
    if seconds:
        _check_state("seconds", seconds, params, float32_only=True)


def _check_length(name: str, length: int, count: int) -> None:
    _check(length == count, f"{count} parameters but {length} tensors in {name}")


def _check_state(
    name: str, tensors: Sequence[Tensor], params: Sequence[Tensor], float32_only: bool
) -> None:
    _check_length(name, len(tensors), len(params))
    for i, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
        wanted = (torch.float32,) if float32_only else (torch.float32, param.dtype)
        if (
            tensor.dtype not in wanted
            or tensor.shape != param.shape
            or tensor.stride() != param.stride()
            or tensor.device != param.device
        ):
            raise ValueError(
                f"zo_fused: {name}[{i}] must be like params[{i}], {tuple(param.shape)} on "
                f"{param.device}, with the same strides, in {' or '.join(map(str, wanted))}; got "
                f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            )


def matrix_shape(param: Tensor) -> tuple[int, int]:
    """The shape as which low-rank sweeps see a parameter: (size(0), the product of the others)."""
    return (param.shape[0] if param.dim() else 1), math.prod(param.shape[1:])


def _check_factors(params: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor]) -> None:
    _check(
        len(us) == len(params) and len(vs) == len(params),
        f"{len(params)} parameters need as many factors, got {len(us)} us and {len(vs)} vs",
    )
    _check_tensors("us", us, (torch.float32,))
    _check_tensors("vs", vs, (torch.float32,))
    for i, (param, u, v) in enumerate(zip(params, us, vs, strict=True)):
        rows, columns = matrix_shape(param)
        rank = u.shape[-1] if u.dim() else 0
        if u.shape != (rows, rank) or v.shape != (columns, rank) or rank < 1:
            raise ValueError(
                f"zo_fused: params[{i}] is seen as ({rows}, {columns}); us[{i}] must be "
                f"({rows}, rank) and vs[{i}] ({columns}, rank) with rank >= 1, got "
                f"{tuple(u.shape)} and {tuple(v.shape)}"
            )
        if not (u.is_contiguous() and v.is_contiguous()):
            raise ValueError(f"zo_fused: us[{i}] and vs[{i}] must be contiguous")
    if params:
        _check_device("us", us[0], params[0].device)
        _check_device("vs", vs[0], params[0].device)


def _check_factors_of_products(
    params: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor]
) -> None:
    products = us[0].shape[0] if us and us[0].dim() else 1
    for i, u in enumerate(us):
        if u.dim() != 3 or u.shape[0] != products or not products or not u.is_contiguous():
            raise ValueError(
                f"zo_fused: us[{i}] must be contiguous, (products, m, rank), with as many products "
                f"as us[0] and at least one; got {tuple(u.shape)}"
            )
    _check_factors(params, [u[0] for u in us], vs)


def _check_factor_moments(moments: Sequence[Tensor], us: Sequence[Tensor]) -> None:
    _check(len(moments) == len(us), f"{len(us)} factors need as many moments, got {len(moments)}")
    _check_tensors("moments", moments, (torch.float32,))
    for i, (moment, u) in enumerate(zip(moments, us, strict=True)):
        if moment.shape != u.shape or not moment.is_contiguous() or moment.device != u.device:
            raise ValueError(
                f"zo_fused: moments[{i}] must be contiguous, of shape {tuple(u.shape)}, "
                f"on {u.device}"
            )


# ---- rows ---------------------------------------------------------------------------------------


def check_rows(checked: Checked, *rows: Any, **options: Any) -> str:
    """Check the other arguments of a sweep, in the order of its schema, and return the transform.

    Raises:
        TypeError: there are too few or too many.
        ValueError: a dtype, shape, device or choice is wrong.
    """
    return _ROWS[checked.name](checked, *rows, **options)


def _check_row(name: str, row: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if row.dtype != dtype or row.shape != shape:
        raise ValueError(
            f"zo_fused: {name} must be {dtype} of shape {shape}, got {row.dtype} of shape "
            f"{tuple(row.shape)}"
        )


def _check_device(name: str, tensor: Tensor, device: torch.device | None) -> None:
    if device is not None and tensor.device != device:
        raise ValueError(f"zo_fused: {name} is on {tensor.device}, the parameters on {device}")


def _check_on(
    name: str, row: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device | None
) -> None:
    _check_row(name, row, dtype, shape)
    _check_device(name, row, device)


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"zo_fused: {name}={value!r}: choose one of {', '.join(choices)}")


def _check_directions(checked: Checked, keys: Tensor, **tables: Tensor) -> None:
    directions = keys.numel()
    _check_on("keys", keys, torch.int64, (directions,), checked.device)
    for name, table in tables.items():
        _check_on(name, table, torch.float32, (checked.count, directions), checked.device)


def _check_update(checked: Checked, decay: Tensor, rounding: Tensor | None) -> None:
    _check_on("decay", decay, torch.float32, (checked.count,), checked.device)
    if rounding is not None:
        _check_on("rounding", rounding, torch.int64, (1,), checked.device)
        _check(checked.streams, "stochastic rounding needs ids and offsets")


def _fill_rows(checked: Checked, keys: Tensor, transform: str = "portable") -> str:
    _check_choice("transform", transform, TRANSFORMS)
    _check_on("keys", keys, torch.int64, (checked.count,), checked.device)
    return transform


def _dense_rows(
    checked: Checked,
    keys: Tensor,
    coeffs: Tensor,
    decay: Tensor,
    rounding: Tensor | None = None,
    transform: str = "portable",
) -> str:
    _check_choice("transform", transform, TRANSFORMS)
    _check_directions(checked, keys, coeffs=coeffs)
    _check_update(checked, decay, rounding)
    return transform


def _check_script(checked: Checked, keys: Tensor, script: Tensor, decay: Tensor) -> int:
    """Returns the number of its sweeps."""
    sweeps = script.shape[0] if script.dim() else 0
    _check_row("script", script, torch.int64, (sweeps, 3))
    _check(script.device.type == "cpu", "script must be a CPU tensor")
    _check_on("keys", keys, torch.int64, (keys.numel(),), checked.device)
    _check_on("decay", decay, torch.float32, (checked.count, sweeps), checked.device)
    return sweeps


def _check_indices(script: Tensor, *ends: int) -> None:
    """A column of a script after the other must lie below these; all but the first may be -1."""
    if type(script) is not Tensor or not script.numel():  # traced: the values are not known
        return
    for column, end in enumerate(ends):
        low, high = (int(x) for x in script[:, column].aminmax())
        first = 0 if column == 0 else -1
        _check(first <= low and high < end, f"column {column} of script is out of range")


def _dense_steps_rows(
    checked: Checked,
    keys: Tensor,
    script: Tensor,
    coeffs: Tensor,
    decay: Tensor,
    transform: str = "portable",
) -> str:
    _check_choice("transform", transform, TRANSFORMS)
    shape = (checked.count, _check_script(checked, keys, script, decay), 2)
    _check_on("coeffs", coeffs, torch.float32, shape, checked.device)
    _check_indices(script, *[keys.numel()] * 3)
    return transform


def _lowrank_steps_rows(
    checked: Checked, keys: Tensor, script: Tensor, coeffs: Tensor, decay: Tensor
) -> str:
    shape = (checked.count, _check_script(checked, keys, script, decay))
    _check_on("coeffs", coeffs, torch.float32, shape, checked.device)
    if checked.count:  # else there are no products
        _check_indices(script, checked.products, 0, keys.numel())
    return "portable"


def _moments_rows(
    checked: Checked,
    keys: Tensor,
    grads: Tensor,
    restores: Tensor,
    coeffs: Tensor,
    decay: Tensor,
    rule: str,
    rounding: Tensor | None = None,
    transform: str = "portable",
    squares: Tensor | None = None,
) -> str:
    _check_choice("rule", rule, RULES)
    _check_choice("transform", transform, TRANSFORMS)
    count, firsts, seconds = checked.count, *checked.lengths[1:]
    if squares is not None:
        _check(rule == "adam", f"rule {rule!r} has no squares")
        _check(not firsts and not seconds, "with squares no firsts and no seconds are kept")
        _check_directions(checked, keys, squares=squares)
    elif rule == "adam":
        _check_length("firsts", firsts, count)
        _check_length("seconds", seconds, count)
    elif seconds:
        raise ValueError(f"zo_fused: rule {rule!r} has no second moments")
    _check_directions(checked, keys, grads=grads, restores=restores)
    _check_on("coeffs", coeffs, torch.float32, (count, 6), checked.device)
    _check_update(checked, decay, rounding)
    return transform


def _lowrank_rows(
    checked: Checked, coeffs: Tensor, decay: Tensor, rounding: Tensor | None = None
) -> str:
    shape = (checked.count,) if checked.name == "lowrank_" else (checked.count, 4)
    _check_on("coeffs", coeffs, torch.float32, shape, checked.device)
    _check_update(checked, decay, rounding)
    return "portable"


def _bits_rows(checked: Checked, keys: Tensor) -> str:
    return _fill_rows(checked, keys)


_ROWS: dict[str, Callable[..., str]] = {
    "bits_": _bits_rows,
    "normal_": _fill_rows,
    "dense_": _dense_rows,
    "dense_steps_": _dense_steps_rows,
    "moments_": _moments_rows,
    "lowrank_": _lowrank_rows,
    "lowrank_steps_": _lowrank_steps_rows,
    "lowrank_momentum_": _lowrank_rows,
}
