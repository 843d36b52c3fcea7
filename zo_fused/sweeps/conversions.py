"""What callers of the functions give, as the operators take it: tensors of one dtype and device.

Everything is converted, or refused by its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zo_fused.checks import finite, whole
from zo_fused.noise.keys import on_device
from zo_fused.noise.streams import MAX_ELEMENTS, as_int64


def int64_tensor(
    values: Sequence[int] | Tensor,
    device: torch.device | str = "cpu",
    name: str = "values",
    bits: int = 64,
) -> Tensor:
    """64-bit numbers, ``0 <= value < 2**bits``, as an int64 tensor of the same bits.

    Raises:
        TypeError: a tensor that is not of 64-bit integers.
        ValueError: a number that is no whole one, or out of range.
    """
    if isinstance(values, Tensor):
        if values.dtype not in (torch.int64, torch.uint64):
            raise TypeError(f"zo_fused: {name} must be a tensor of int64, got {values.dtype}")
        return values.to(device=device, dtype=torch.int64)
    numbers = list(values)
    if set(map(type, numbers)) - {int} or (numbers and (min(numbers) < 0 or max(numbers) >> bits)):
        numbers = [whole(f"zo_fused: {name}[{i}]", v, 0, bits) for i, v in enumerate(numbers)]
    signed = list(map(as_int64, numbers))
    return on_device(torch.tensor(signed, dtype=torch.int64, device="cpu"), device)


def listed(params: Sequence[Tensor], name: str = "params") -> tuple[list[Tensor], torch.device]:
    """The tensors of a call and their device.

    Raises:
        TypeError: it is no list of tensors.
        ValueError: one is on the meta device.
    """
    if isinstance(params, Tensor):
        raise TypeError(f"zo_fused: {name} must be a list of tensors, got one: write [p]")
    tensors = list(params)
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"zo_fused: {name}[{i}] must be a tensor, got {type(tensor).__name__}")
        if tensor.device.type == "meta":
            raise ValueError(
                f"zo_fused: {name}[{i}] is on the meta device: it has no data to change"
            )
    return tensors, tensors[0].device if tensors else torch.device("cpu")


def table_of(
    name: str, value: Any, device: torch.device, forms: Sequence[tuple[int, ...]]
) -> Tensor:
    """Numbers as a float32 tensor of the last of the forms; those of another form broadcast.

    Args:
        forms: shapes that the numbers may have. Those of the host must be finite, unless they are
            being traced.
    """
    shape = forms[-1]
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "fiu":  # text would become numbers, too
            raise TypeError(f"zo_fused: {name} must be real numbers, got an array of {value.dtype}")
        value = torch.from_numpy(np.array(value, dtype=np.float64, order="C"))
    if isinstance(value, Tensor):
        if value.is_complex() or value.dtype == torch.bool or value.is_meta:
            what = "the meta device" if value.is_meta else f"{value.dtype}"
            raise TypeError(f"zo_fused: {name} must be real numbers, got a tensor of {what}")
        numbers = value.to(dtype=torch.float32, device=device)
        known = value.device.type == "cpu" and not torch.compiler.is_compiling()
        if known and not torch.isfinite(value.float()).all():
            raise ValueError(f"zo_fused: {name} must be finite in float32, got {value}")
    elif isinstance(value, Sequence) and not isinstance(value, str):
        row = [finite(f"zo_fused: {name}[{i}]", x) for i, x in enumerate(value)]
        numbers = on_device(torch.tensor(row, dtype=torch.float32, device="cpu"), device)
    else:  # filled on the device: nothing waits for a copy
        plain = finite(f"zo_fused: {name}", value)
        numbers = torch.full((), plain, dtype=torch.float32, device=device)
    if tuple(numbers.shape) not in forms:
        wanted = " or ".join("a number" if not form else str(list(form)) for form in forms)
        got = "a number" if not numbers.dim() else str(list(numbers.shape))
        raise ValueError(f"zo_fused: {name} must be {wanted}, got {got}")
    return numbers.expand(shape).contiguous()


def column(name: str, value: Any, params: Sequence[Tensor], device: torch.device) -> Tensor:
    """A number, or one a parameter, as float32 [P]."""
    return table_of(name, value, device, [(), (len(params),)])


def rows_of(
    name: str, value: Any, params: Sequence[Tensor], keys: Tensor, one_for_all: bool = False
) -> Tensor:
    """A number a key, for each parameter or for all, as float32 [P, K].

    Args:
        one_for_all: one number may stand for all keys; else it must be the only one's.
    """
    directions = len(keys)
    alone: list[tuple[int, ...]] = [()] if one_for_all or directions == 1 else []
    return table_of(name, value, keys.device, [*alone, (directions,), (len(params), directions)])


def streams_of(
    params: Sequence[Tensor],
    ids: Sequence[int] | Tensor | None,
    offsets: Sequence[int] | Tensor | None,
) -> tuple[Tensor, Tensor]:
    table = int64_tensor(range(len(params)) if ids is None else ids, name="ids")
    if table.shape != (len(params),):
        raise ValueError(f"zo_fused: {len(params)} parameters but {table.numel()} ids")
    if offsets is None and len(table.unique()) != len(table):
        raise ValueError(
            "zo_fused: two parameters have the same id and would get the same noise; "
            "shards of one parameter need `offsets`"
        )
    if offsets is None:
        return table, torch.zeros_like(table)
    starts = int64_tensor(offsets, "cpu", "offsets", 62)
    if starts.shape != (len(params),):
        raise ValueError(f"zo_fused: {len(params)} parameters but {starts.numel()} offsets")
    for start, p in zip(starts.tolist(), params, strict=True):
        if not 0 <= start <= MAX_ELEMENTS - p.numel():
            raise ValueError(
                f"zo_fused: elements must lie in [0, 2**62), got offset {start} and {p.numel()} "
                "elements"
            )
    return table, starts


def keys_of(keys: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    row = int64_tensor(keys, device, "keys")
    if row.dim() != 1:
        raise ValueError(f"zo_fused: keys must be [K], got {list(row.shape)}")
    return row


def rounding_of(rounding_key: int | Tensor | None, device: torch.device) -> Tensor | None:
    if rounding_key is None or (isinstance(rounding_key, Tensor) and rounding_key.dim()):
        return rounding_key
    return int64_tensor([rounding_key], device, "rounding_key")  # type: ignore[list-item]
