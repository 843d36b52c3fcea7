"""Names of random streams: purposes, stream keys and parameter ids of the noise contract.

Pure Python integers. ``docs/noise.md`` is the contract in prose, with test vectors.
"""

from __future__ import annotations

import enum
import hashlib

from zo_fused.checks import whole

CONTRACT_VERSION = 1

MASK32 = 0xFFFFFFFF
MASK64 = 0xFFFFFFFFFFFFFFFF
MAX_ELEMENTS = 1 << 62  # of a parameter

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 10


class Purpose(enum.IntEnum):
    """What the numbers of a stream are used for. The values are part of the contract."""

    DENSE = 1
    U = 2
    V = 3
    ROUNDING = 4
    LEFT = 5  # low rank: the left basis of a window
    CORE = 6  # coordinates in a basis
    RIGHT = 7  # low rank: the factor of a query that stands right of a window's basis
    PROBE = 8  # dense directions that a direction learns from
    TEST = 9  # where the search for a space begins
    SCALAR = 10  # a number of a step's query, of a parameter or for all of them: id 0
    INIT = 11  # what a state begins with
    MASK = 12  # words that choose the weights of a window


def philox4x32(
    counter: tuple[int, int, int, int], key: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Philox4x32-10 of one counter (Salmon et al., SC'11), on Python integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        p0 = c0 * PHILOX_MULTIPLIERS[0]
        p1 = c2 * PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK32, (p0 >> 32) ^ c3 ^ k1, p0 & MASK32
        k0 = (k0 + PHILOX_WEYL[0]) & MASK32
        k1 = (k1 + PHILOX_WEYL[1]) & MASK32
    return c0, c1, c2, c3


def derive_key(seed: int, purpose: int, step: int = 0, query: int = 0) -> int:
    """The 64-bit key of a stream.

    Words 0 (low) and 1 (high) of Philox4x32-10 with key ``seed`` and counter
    ``(step low, step high, query, purpose)``.

    Args:
        seed: base seed of the run, ``0 <= seed < 2**64``.
        purpose: a `Purpose`, or any other number below ``2**32``.
        step: the step, or the window for a lazily sampled factor, ``0 <= step < 2**64``.
        query: index of the direction within the step, ``0 <= query < 2**32``.

    Raises:
        ValueError: an argument is no whole number, or out of range.
    """
    seed = whole("seed", seed, 0, bits=64)
    purpose = whole("purpose", purpose, 0, bits=32)
    step = whole("step", step, 0, bits=64)
    query = whole("query", query, 0, bits=32)
    words = philox4x32((step & MASK32, step >> 32, query, purpose), (seed & MASK32, seed >> 32))
    return words[0] | words[1] << 32


def uniform(seed: int, step: int, query: int = 0, element: int = 0) -> float:
    """A number in (-1, 1) that a step's query has for all parameters, exact in float32.

    ``(2 (w >> 9) + 1) 2^-23 - 1`` with the word w of an element of stream (SCALAR, step, query),
    parameter id 0.
    """
    key = derive_key(seed, Purpose.SCALAR, step, query)
    words = philox4x32((element // 4, 0, 0, 0), (key & MASK32, key >> 32))
    return (2 * (words[element % 4] >> 9) + 1) * 2.0**-23 - 1.0


# What torch puts between the parts of a name where it wraps a module.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def plain_name(name: str) -> str:
    """A parameter's name in the plain model: without what `torch.compile` (``_orig_mod.``) and
    other wrappers of torch put in, and without ``module.`` at the front (DistributedDataParallel).
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        del parts[0]
    return ".".join(parts)


def parameter_id(name: str) -> int:
    """The 64-bit id of a named parameter: first 8 bytes, little endian, of SHA-256 of its name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def as_int64(value: int) -> int:
    """The signed 64-bit integer with the bits of an unsigned one (torch has no full uint64)."""
    value &= MASK64
    return value - (1 << 64) if value >> 63 else value
