"""What the arguments of sweeps must be. Which there are is told in `zo_fused.sweeps.signatures`.

They are checked in two parts. `check_lists` looks at every tensor, `check_rows` at what changes
from call to call, in a time that does not depend on the number of parameters: a prepared sweep
(`zo_fused.sweeps.prepared`) does only this at every call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import mul
from typing import Any

import torch
from torch import Tensor

from zo_fused.sweeps.signatures import CHOICES, SWEEPS, Argument, Lists

# ---- lists, ids and offsets ---------------------------------------------------------------------


@dataclass(frozen=True)
class Checked:
    """What is known of lists that have been checked, and what rows must fit."""

    name: str
    count: int  # parameters
    device: torch.device | None  # None if there are none
    streams: bool  # whether there are ids and offsets
    lengths: tuple[int, ...]  # of the lists


def check_lists(name: str, lists: Lists, ids: Tensor | None, offsets: Tensor | None) -> Checked:
    """Check the lists of a sweep, ids and offsets.

    Raises:
        TypeError: a tensor has a dtype that the sweep does not take.
        ValueError: anything else that a sweep can't work with.
    """
    signature, params = SWEEPS[name], lists[0]
    _check_tensors(signature.lists[0], params, signature.dtypes)
    if name == "moments_":
        _check_moments(*lists)
    if name == "shaped_":
        _check_shapes(params, lists[1], offsets)
    if "vs" in signature.lists:
        _check_factors(params, lists[-2], lists[-1])
    if "moments" in signature.lists:
        moments = signature.lists.index("moments")
        _check_factor_moments(lists[moments], lists[moments + 1])
    streams = ids is not None and offsets is not None
    _check(streams or not signature.needs_streams, "ids and offsets are needed")
    if ids is not None and offsets is not None:
        for label, row in (("ids", ids), ("offsets", offsets)):
            _check_row(label, row, torch.int64, (len(params),))
            _check(row.device.type == "cpu", f"{label} must be a CPU tensor")
    device = params[0].device if params else None
    return Checked(name, len(params), device, streams, tuple(map(len, lists)))


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


def not_in_memory(tensor: Tensor) -> str:
    """Why a tensor's numbers are not those that lie in its memory; or nothing."""
    if tensor.is_neg():
        return "is a view that negates what lies in memory; take .resolve_neg() of it"
    last = tensor.storage_offset() + tensor.numel()  # of what `not_dense` has nothing against
    short = tensor.untyped_storage().nbytes() < last * tensor.element_size()
    if tensor.numel() and (short or not tensor.data_ptr()):
        return (
            f"has no memory of its own: it was freed, or a {type(tensor).__name__} is made of "
            "other tensors; give it some, or leave it out"
        )
    return ""


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
    """Tensors are in memory, and what a sweep writes shares none with others of it.

    Raises:
        ValueError: one isn't, or two do.
    """
    signature = SWEEPS[name]
    for label, tensors in zip(signature.lists, lists, strict=True):
        if not all(map(torch.Tensor.data_ptr, tensors)) or any(map(torch.Tensor.is_neg, tensors)):
            for i, tensor in enumerate(tensors):
                if reason := not_in_memory(tensor):
                    raise ValueError(f"zo_fused: {label}[{i}] {reason}")
    written, read = lists[: signature.written], lists[signature.written :]
    pair = overlap(list(chain.from_iterable(written)), list(chain.from_iterable(read)))
    if pair is not None:
        labels = [
            f"{label}[{i}]"
            for label, tensors in zip(signature.lists, lists, strict=True)
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


def mask_bytes(numel: int, offset: int) -> int:
    """The size of a packed mask: a bit an element, eight neighbours of the full parameter a byte
    (`zo_fused.sweeps.reference.shaped_`)."""
    return (offset % 8 + numel + 7) // 8 if numel else 0


def _check_shapes(
    params: Sequence[Tensor], shapes: Sequence[Tensor], offsets: Tensor | None
) -> None:
    _check_length("shapes", len(shapes), len(params))
    # Traced, offsets are not known, nor is the size of a mask.
    starts = offsets.tolist() if type(offsets) is Tensor else [None] * len(params)
    for i, (shape, param, start) in enumerate(zip(shapes, params, starts, strict=False)):
        if shape.device != param.device:
            raise ValueError(f"zo_fused: shapes[{i}] is on {shape.device}, not on {param.device}")
        if shape.dtype == torch.uint8:
            size = shape.numel() if start is None else mask_bytes(param.numel(), start)
            if shape.shape not in ((size,), (0,)):
                raise ValueError(
                    f"zo_fused: shapes[{i}], a packed mask of {param.numel()} weights from element "
                    f"{start} on, must have shape ({size},), got {tuple(shape.shape)}"
                )
            _check(shape.is_contiguous(), f"shapes[{i}] must be contiguous")
        elif shape.dtype != torch.float32:
            raise TypeError(
                f"zo_fused: shapes[{i}] must be uint8, a packed mask, or float32, got {shape.dtype}"
            )
        elif shape.numel() and (shape.shape != param.shape or shape.stride() != param.stride()):
            raise ValueError(
                f"zo_fused: shapes[{i}] must have the shape {tuple(param.shape)} and strides of "
                f"params[{i}], got {tuple(shape.shape)}"
            )


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


def _check_factor_moments(moments: Sequence[Tensor], us: Sequence[Tensor]) -> None:
    _check(len(moments) == len(us), f"{len(us)} factors need as many moments, got {len(moments)}")
    _check_tensors("moments", moments, (torch.float32,))
    _check_tensors("us", us, (torch.float32,))
    for i, (moment, u) in enumerate(zip(moments, us, strict=True)):
        _check(u.is_contiguous(), f"us[{i}] must be contiguous")
        if moment.shape != u.shape or not moment.is_contiguous() or moment.device != u.device:
            raise ValueError(
                f"zo_fused: moments[{i}] must be contiguous, of shape {tuple(u.shape)}, "
                f"on {u.device}"
            )


# ---- rows ---------------------------------------------------------------------------------------


# What the signs of shapes stand for that are no letters.
_SIZES = {
    size: int(size)
    for signature in SWEEPS.values()
    for argument in signature.rows
    for size in argument.shape
    if size.isdigit()
}


def check_rows(checked: Checked, *rows: Any, **options: Any) -> str:
    """Check the other arguments of a sweep, in the order of its schema, and return the transform.

    Raises:
        TypeError: there are too few or too many.
        ValueError: a dtype, shape, device or choice is wrong.
    """
    signature = SWEEPS[checked.name]
    sizes = {"P": checked.count, **_SIZES}
    values = signature.complete(rows, options)
    given = {a.name: value for a, value in zip(signature.rows, values, strict=True)}
    for argument, value in zip(signature.rows, values, strict=True):
        if argument.name in CHOICES:
            _check_choice(argument.name, value, CHOICES[argument.name])
        elif value is not None or not argument.optional:
            _check_table(checked, argument, value, sizes)
    if checked.name == "moments_":
        _check_kept(checked, given)
    if checked.name == "dense_steps_":
        _check_indices(given["script"], given["keys"].numel())
    transform: str = given.get("transform", "portable")
    return transform


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"zo_fused: {name}={value!r}: choose one of {', '.join(choices)}")


def _check_table(
    checked: Checked, argument: Argument, value: Tensor, sizes: dict[str, int]
) -> None:
    """Shape, dtype and device of a row. A size that only it can tell is noted for the others."""
    for i, letter in enumerate(argument.shape):
        if letter not in sizes:
            alone = len(argument.shape) == 1
            sizes[letter] = value.numel() if alone else value.shape[i] if value.dim() > i else 0
    shape = tuple([sizes[letter] for letter in argument.shape])
    _check_row(argument.name, value, argument.dtype, shape)
    if argument.on_host:
        _check(value.device.type == "cpu", f"{argument.name} must be a CPU tensor")
    else:
        _check_device(argument.name, value, checked.device)
    if argument.name == "rounding":
        _check(checked.streams, "stochastic rounding needs ids and offsets")


def _check_row(name: str, row: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if row.dtype != dtype or row.shape != shape:
        raise ValueError(
            f"zo_fused: {name} must be {dtype} of shape {shape}, got {row.dtype} of shape "
            f"{tuple(row.shape)}"
        )


def _check_device(name: str, tensor: Tensor, device: torch.device | None) -> None:
    if device is not None and tensor.device != device:
        raise ValueError(f"zo_fused: {name} is on {tensor.device}, the parameters on {device}")


def _check_kept(checked: Checked, given: Mapping[str, Any]) -> None:
    """The moments that are kept are those of the rule."""
    rule, (count, firsts, seconds) = given["rule"], checked.lengths
    if rule == "hizoo":
        _check(given["squares"] is not None, "rule 'hizoo' needs squares")
        _check(not firsts, "rule 'hizoo' has no first moments")
        _check_length("seconds", seconds, count)
    elif given["squares"] is not None:
        _check(rule == "adam", f"rule {rule!r} has no squares")
        _check(not firsts and not seconds, "with squares no firsts and no seconds are kept")
    elif rule == "adam":
        _check_length("firsts", firsts, count)
        _check_length("seconds", seconds, count)
    elif seconds:
        raise ValueError(f"zo_fused: rule {rule!r} has no second moments")


def _check_indices(script: Tensor, keys: int) -> None:
    """A script's columns are indices of keys; all but the first may be -1."""
    if type(script) is not Tensor or not script.numel():  # traced: the values are not known
        return
    for column in range(script.shape[1]):
        low, high = (int(x) for x in script[:, column].aminmax())
        first = 0 if column == 0 else -1
        _check(first <= low and high < keys, f"column {column} of script is out of range")
