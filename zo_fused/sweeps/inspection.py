"""The noise itself, for inspection, tests and other engines. Contract: docs/noise.md."""

from __future__ import annotations

import torch
from torch import Tensor

from zo_fused.checks import whole
from zo_fused.noise.keys import on_device
from zo_fused.noise.streams import MAX_ELEMENTS
from zo_fused.sweeps import operators
from zo_fused.sweeps.conversions import int64_tensor


def _fill(op, dtype, numel: int, key: int, id: int, offset: int, device, *options) -> Tensor:  # type: ignore[no-untyped-def]
    size, start = whole("numel", numel, 0, bits=62), whole("offset", offset, 0, bits=62)
    if start + size > MAX_ELEMENTS:
        raise ValueError(f"offset + numel must not exceed 2**62, got {offset} + {numel}")
    numbers = [whole(name, value, 0, bits=64) for name, value in (("id", id), ("key", key))]
    ids, offsets, keys = (int64_tensor([value]) for value in (numbers[0], start, numbers[1]))
    out = torch.empty(size, dtype=dtype, device=device)
    op([out], ids, offsets, on_device(keys, out.device), *options)
    return out


def normal(
    numel: int,
    key: int,
    id: int = 0,
    offset: int = 0,
    device: torch.device | str = "cpu",
    *,
    transform: str = "portable",
) -> Tensor:
    """Standard normals, or signs, of elements ``offset .. offset + numel`` of parameter ``id``.

    Args:
        numel: how many.
        key: 64-bit stream key, used as it is (`derive_key` makes them).
        id: 64-bit parameter id.
        offset: index of the first element in the full parameter, below ``2**62``.
        device: where to make them; the values don't depend on it.
        transform: "portable", or on GPUs "fast", whose values are close to these; "hadamard":
            near-normals instead (docs/noise.md); "signs": +1 and -1, equally probable.

    Returns:
        float32 tensor [numel].
    """
    return _fill(operators.normal_, torch.float32, numel, key, id, offset, device, transform)


def random_bits(
    numel: int, key: int, id: int = 0, offset: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """The raw Philox words behind `normal`, in element order: int64 [numel], below ``2**32``."""
    return _fill(operators.bits_, torch.int64, numel, key, id, offset, device)
