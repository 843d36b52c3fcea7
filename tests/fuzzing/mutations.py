"""Files that are nearly good: bytes, and values in lines of JSON, that are something else."""

from __future__ import annotations

import json
import random
from typing import Any

VALUES: list[Any] = [
    *(0, 1, -1, 2, 0.5, -0.0, 1e39, 1e-46, 1e308, 2**31, 2**53, 2**63, 2**64, 10**30, True, False),
    *(
        None,
        "",
        "x",
        "0.5",
        "\ud83d",
        "a\n",
        [],
        {},
        [[]],
        [0],
        [None],
        {"": {}},
        "restore",
        "MeZO",
    ),
]
# Deep, long, no text, no number, half a character.
INSERTED = [
    b"[" * 5000,
    b'{"":' * 3000,
    b"- " * 3000,
    b"9" * 5000,
    b"\xff",
    b"\x00",
    b"NaN",
    b'"\\ud83d"',
]


def mutated(value: Any, rng: random.Random, others: list[Any] = VALUES) -> Any:
    """JSON, or what is made alike, with something in it that is something else."""
    many = isinstance(value, list | dict) and bool(value)
    if not many or rng.random() < 0.2:
        return rng.choice(others)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key, copy, what = rng.choice(keys), value.copy(), rng.random()
    if what < 0.1:
        del copy[key]
    elif what < 0.2 and isinstance(copy, list):
        copy.insert(key, rng.choice([copy[key], *others]))
    elif what < 0.3 and isinstance(copy, dict):
        copy[rng.choice([*map(str, VALUES), *copy])] = rng.choice(others)
    else:
        copy[key] = mutated(copy[key], rng, others)
    return copy


def changed(data: bytes, rng: random.Random) -> bytes:
    """A file with a change or two."""
    for _ in range(rng.choice([1, 1, 2])):
        lines = data.split(b"\n")
        line = rng.choice([0, rng.randrange(len(lines))])
        what = rng.random()
        if what < 0.7:
            try:
                value = mutated(json.loads(lines[line]), rng)
                lines[line] = json.dumps(value, separators=(",", ":")).encode()
            except (ValueError, RecursionError):  # no JSON
                what = 1.0
        if what >= 0.7:
            place = rng.randrange(len(lines[line]) + 1)
            length, new = rng.choice([0, 1, 5]), rng.choice([*INSERTED, rng.randbytes(2), b""])
            lines[line] = lines[line][:place] + new + lines[line][place + length :]
        data = b"\n".join(lines)
    return data
