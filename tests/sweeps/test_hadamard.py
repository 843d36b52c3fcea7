"""The transform "hadamard" on every backend, bit by bit, where its tiles make it differ from the
others: their two halves, their ends, and counters of sixteen elements. (All that it shares with
the others is in test_parity.py.)"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from support.equality import Islands, assert_same_bits
from support.served import NAMES, Served, serve
from torch import Tensor

from zo_fused.noise import Purpose, derive_key
from zo_fused.sweeps import reference
from zo_fused.sweeps.conversions import int64_tensor

KEYS = [derive_key(3, Purpose.DENSE, step) for step in range(3)]
ROUNDING = int64_tensor([derive_key(3, Purpose.ROUNDING)])
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# In a tile's first and second half, and at its ends; in the last the low counter word wraps.
OFFSETS = (0, 61, 64, 127, 16 * 2**32 - 200)
# Less than a run of eight, a half, a tile and their neighbours; more than blocks of all backends.
SIZES = (1, 8, 64, 129, 0, 4500)


@pytest.fixture(params=NAMES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return serve(request.param, tmp_path_factory)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(
    served: Served, name: str, lists: list[list[Tensor]], offset: int, misalignment: int, *rows: Any
) -> None:
    """The backend writes what the reference writes, and nothing else."""
    count = len(lists[0])
    streams = int64_tensor([2**63 + i for i in range(count)]), int64_tensor([offset] * count)
    results = []
    for functions, device in ((served.sweeps, served.device), (reference, torch.device("cpu"))):
        islands = Islands(device, misalignment)
        made = [[islands.put(x) for x in tensors] for tensors in lists]
        given = [x.to(device) if isinstance(x, Tensor) else x for x in rows]
        getattr(functions, name)(*made, *(x.to(device) for x in streams), *given)
        islands.check()
        results.append([x for tensors in made for x in tensors])
    for number, (got, wanted) in enumerate(zip(*results, strict=True)):
        assert_same_bits(got, wanted, f"{name}, offset {offset}, tensor {number}:")


@pytest.mark.parametrize("offset", OFFSETS)
def test_normals(served: Served, offset: int) -> None:
    outs = [torch.zeros(n) for n in SIZES]
    keys = int64_tensor((KEYS * 2)[: len(outs)])
    check(served, "normal_", [outs], offset, offset % 2, keys, "hadamard")


# Dtypes and numbers of directions, each with all offsets and roundings in turn.
FORMS = [
    (dtype, directions, OFFSETS[i % len(OFFSETS)], (None, ROUNDING)[(i + i // 4) % 2])
    for i, (dtype, directions) in enumerate(itertools.product(DTYPES, range(4)))
]


@pytest.mark.parametrize(("dtype", "directions", "offset", "rounding"), FORMS)
def test_dense(
    served: Served, dtype: torch.dtype, directions: int, offset: int, rounding: Tensor | None
) -> None:
    params = [random(n, dtype=dtype, seed=n) for n in SIZES]
    coeffs, decay = random(len(SIZES), directions, seed=1), 1 + 0.1 * random(len(SIZES), seed=2)
    keys = int64_tensor(KEYS[:directions])
    for misalignment in (0, 1):
        rest = (keys, coeffs, decay, rounding, "hadamard")
        check(served, "dense_", [params], offset, misalignment, *rest)
