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
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from zo_fused.sweeps.shards import is_sharded

_BLOCK = 1 << 16  # words
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_PIECE = 128 * 4 * _BLOCK  # bytes at a time: a GPU then has 64 MiB of products


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """16 hexadecimal digits that tell these weights from others, whatever device they are on.

    Nothing is copied to the host but a number for 256 KiB. Tensors that are not contiguous are
    copied on their device, one at a time.

    Args:
        tensors: strided, of any dtype and shape; or of classes that are made of such (torchao).

    Raises:
        NotImplementedError: one is a DTensor, of which a process has a part.
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        if is_sharded(tensor):
            raise NotImplementedError(
                "a replay log recognises weights by all of their bits, and parameters are sharded: "
                "replay into the whole model, then shard it (docs/sharded.md)"
            )
        for part in _plain_parts(tensor.detach()):
            line = f"{part.dtype} {list(part.shape)} {weighted_sum(part):016x}\n"
            digest.update(line.encode())
    return digest.hexdigest()[:16]


def weighted_sum(tensor: Tensor) -> int:
    """The sum over the bytes of a tensor that the module's docstring defines, below ``2**64``."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    weights, total = _weights(data.device), data.numel()
    sums = _sums_on_cpu if data.device.type == "cpu" else _sums_elsewhere
    for piece in data.split(_PIECE) if len(data) else ():
        for one in sums(_words(piece), weights):
            total = (total * _GOLDEN + one) & _MASK
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
