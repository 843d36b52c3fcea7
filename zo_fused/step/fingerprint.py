"""A fingerprint of weights that sees every bit, in one read, the same on every device.

The bytes of a tensor (its elements in row-major order, little endian) are filled up with zeros to
whole words of 32 bits, read as signed numbers x[0], x[1], .., and cut into blocks of 65,536 words.
All arithmetic is modulo ``2**64``:

* a block's sum is ``sum_j x[j] * w[j]``; the weight w[j] is output number j + 1 of SplitMix64 with
  seed 0 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014) with
  its lowest bit set;
* a tensor's sum is that of its blocks by Horner's rule, ``h <- h * 0x9e3779b97f4a7c15 + sum``, from
  its number of bytes on.

The fingerprint is the beginning of SHA-256 over ``dtype shape sum`` of every tensor, a line each.
It finds accidents, a single changed word for certain; it is no protection from an adversary.

A tensor's sum is one over its words, each with a factor of its own, ``w[j]`` times a power of the
number in Horner's rule. So parts of a tensor, on several processes, have sums that add up.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from zo_fused.sweeps.shards import Run, Shard, cut_among, is_sharded, local, shard_of

_BLOCK_BITS = 16
_BLOCK = 1 << _BLOCK_BITS  # words
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_PIECE = 128 * 4 * _BLOCK  # bytes at a time: a GPU then has 64 MiB of products
_ELEMENTS = (1 << 16, 1 << 22)  # at a time on a CPU and elsewhere, where each has its own place


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """16 hexadecimal digits that tell these weights from others, whatever device they are on, and
    however they are sharded. All processes that have parts of a DTensor must call it.

    Nothing is copied to the host but a number for 256 KiB. Tensors that are not contiguous are
    copied on their device, one at a time.

    Args:
        tensors: strided, of any dtype and shape; or of classes that are made of such (torchao), or
            DTensors.

    Raises:
        NotImplementedError: a DTensor is placed so that a process has no box of its elements.
    """
    kinds: list[str] = []
    sums: list[int] = []
    shared: dict[Any, dict[int, Tensor]] = {}  # by where the parts of a tensor are: [] each
    for tensor in tensors:
        if is_sharded(tensor):
            kinds.append(_kind(tensor))
            sums.append(0)
            part = local(tensor.detach())
            of_part = sum_of_part(part, shard_of(tensor, "a parameter"))
            shared.setdefault((part.device, cut_among(tensor)), {})[len(sums) - 1] = of_part
            sums[-1] = _of_size(tensor)
            continue
        for part in _plain_parts(tensor.detach()):
            kinds.append(_kind(part))
            sums.append(weighted_sum(part))
    for (device, groups), parts in shared.items():
        numbers = torch.stack(list(parts.values())).to(device)
        for group in groups:
            torch.distributed.all_reduce(numbers, group=group)
        for row, number in zip(parts, numbers.tolist(), strict=True):
            sums[row] = (sums[row] + number) & _MASK
    lines = (f"{kind} {total:016x}\n" for kind, total in zip(kinds, sums, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def weighted_sum(tensor: Tensor) -> int:
    """The sum over the bytes of a tensor that the module's docstring defines, below ``2**64``."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    return (_of_size(tensor) + _sum_of_bytes(data, 0, len(data))) & _MASK


def sum_of_part(tensor: Tensor, place: Shard) -> Tensor:
    """What the bytes of a part of a tensor add to the sum of the whole, int64 []: with those of all
    other parts, and with what its number of bytes adds, they make it (modulo ``2**64``)."""
    runs = place.runs(tensor.shape)
    size, whole = tensor.element_size(), math.prod(place.global_shape) * tensor.element_size()
    if len(runs) > 1:
        return _sum_of_runs(tensor.contiguous(), runs, whole)
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    total = _sum_of_bytes(data, runs[0].start * size, whole) if runs else 0
    return torch.tensor(total - (total >> 63 << 64), dtype=torch.int64, device="cpu")


def _of_size(tensor: Tensor) -> int:
    """What the number of bytes of a tensor adds to its sum."""
    size = tensor.numel() * tensor.element_size()
    return size * pow(_GOLDEN, _blocks(size), 1 << 64) & _MASK


def _blocks(size: int) -> int:
    return -(-size // (4 * _BLOCK))


def _sum_of_bytes(data: Tensor, start: int, whole: int) -> int:
    """Of bytes that lie one after the other in so many, from a start on."""
    first, skipped = divmod(start, 4 * _BLOCK)
    head = data[: 4 * _BLOCK - skipped] if skipped else data[:0]
    weights, total, blocks = _weights(data.device), 0, first
    sums = _sums_on_cpu if data.device.type == "cpu" else _sums_elsewhere
    pieces = [torch.cat([data.new_zeros(skipped), head])] if len(head) else []
    pieces += data[len(head) :].split(_PIECE) if len(data) > len(head) else ()
    for piece in pieces:
        for one in sums(_words(piece), weights):
            total = (total * _GOLDEN + one) & _MASK
            blocks += 1
    return total * pow(_GOLDEN, _blocks(whole) - blocks, 1 << 64) & _MASK


def _sum_of_runs(tensor: Tensor, runs: Sequence[Run], whole: int) -> Tensor:
    """Of a contiguous tensor that lies in several places, element by element: each is a word, some
    of them, or a part of one, with zeros for the rest."""
    size, device = min(tensor.element_size(), 4), tensor.device
    words = tensor.element_size() // size  # an element
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32}[size]
    rows = tensor.view(-1).view(kind).view(len(runs), -1)
    starts = torch.tensor([run.start * words for run in runs], dtype=torch.int64, device=device)
    along = torch.arange(rows.shape[1], device=device)
    blocks, per = _blocks(whole), 4 // size
    powers = [pow(_GOLDEN, blocks - 1 - block, 1 << 64) for block in range(blocks)]
    signed = [power - (power >> 63 << 64) for power in powers]
    factors = torch.tensor(signed, dtype=torch.int64, device=device)
    weights, mask = _weights(device), (1 << 8 * size) - 1
    total = torch.zeros((), dtype=torch.int64, device=device)
    height = max(1, _ELEMENTS[device.type != "cpu"] // rows.shape[1])
    for part, begin in zip(rows.split(height), starts.split(height), strict=True):
        index, values = begin[:, None] + along, part.long()
        if per > 1:
            place = index & per - 1
            values = torch.where(place == per - 1, values, values & mask) << place * (8 * size)
            index >>= per // 2  # 2 or 4 of them: 1 or 2 bits
        total += (values * weights[index & _BLOCK - 1] * factors[index >> _BLOCK_BITS]).sum()
    return total


def _sums_on_cpu(words: Tensor, weights: Tensor) -> list[int]:
    """Of every block, without leaving the cache."""
    return [
        int(torch.dot(block.long(), weights[: len(block)])) for block in words.split(len(weights))
    ]


def _sums_elsewhere(words: Tensor, weights: Tensor) -> list[int]:
    """The same in a few kernels for all blocks; GPUs have no dot product of whole numbers."""
    whole = len(words) // len(weights) * len(weights)
    sums: list[int] = (words[:whole].view(-1, len(weights)) * weights).sum(1).tolist()
    rest = words[whole:]
    return [*sums, int((rest * weights[: len(rest)]).sum())] if len(rest) else sums


def _words(data: Tensor) -> Tensor:
    """Bytes as int32, with zeros at the end."""
    missing = -data.numel() % 4
    if missing:
        data = torch.cat([data, data.new_zeros(missing)])
    elif data.storage_offset() % 4 or data.data_ptr() % 4:
        data = data.clone()
    return data.view(torch.int32)


@cache
def _weights(device: torch.device) -> Tensor:
    """Odd pseudo-random numbers, int64 [_BLOCK]."""
    made = []
    for j in range(1, _BLOCK + 1):
        z = j * _GOLDEN & _MASK
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        z = (z ^ z >> 27) * 0x94D049BB133111EB & _MASK
        z = (z ^ z >> 31) | 1
        made.append(z - (z >> 63 << 64))
    return torch.tensor(made, dtype=torch.int64, device="cpu").to(device)


def _plain_parts(tensor: Tensor) -> list[Tensor]:
    """What a tensor is made of: a frozen one may be quantized, and so of a class that has no
    views (torchao)."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _plain_parts(getattr(tensor, name))]
