"""The transform "hadamard" on every backend, bit by bit, where its tiles make it differ from the
others: their two halves, their ends, and counters of sixteen elements."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.emulated_cuda import emulation
from support.equality import Islands, assert_same_bits
from torch import Tensor

from zo_fused.noise import Purpose, derive_key
from zo_fused.sweeps import dispatch, reference
from zo_fused.sweeps.conversions import int64_tensor

KEYS = [derive_key(3, Purpose.DENSE, step) for step in range(3)]
ROUNDING = int64_tensor([derive_key(3, Purpose.ROUNDING)])
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# In a tile's first and second half, and at its ends; in the last the low counter word wraps.
OFFSETS = (0, 61, 64, 127, 16 * 2**32 - 200)
# Less than a run of eight, a half, a tile and their neighbours; more than blocks of all backends.
SIZES = (1, 8, 64, 129, 0, 4500)


@pytest.fixture(params=["cpu", "triton", "emulated CUDA"])
def sweeps(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A backend's functions on lists."""
    if request.param == "emulated CUDA":
        return emulation(tmp_path_factory).sweeps
    if (reason := dispatch.why_not(request.param, "cpu")) is not None:
        pytest.skip(reason)
    return dispatch.load(request.param)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(
    sweeps: Any, name: str, lists: list[list[Tensor]], offset: int, misalignment: int, *rows: Any
) -> None:
    """The backend writes what the reference writes, and nothing else."""
    count = len(lists[0])
    streams = int64_tensor([2**63 + i for i in range(count)]), int64_tensor([offset] * count)
    results = []
    for functions in (sweeps, reference):
        islands = Islands(torch.device("cpu"), misalignment)
        made = [[islands.put(x) for x in tensors] for tensors in lists]
        getattr(functions, name)(*made, *streams, *rows)
        islands.check()
        results.append([x for tensors in made for x in tensors])
    for number, (got, wanted) in enumerate(zip(*results, strict=True)):
        assert_same_bits(got, wanted, f"{name}, offset {offset}, tensor {number}:")


@pytest.mark.parametrize("offset", OFFSETS)
def test_normals(sweeps: Any, offset: int) -> None:
    outs = [torch.zeros(n) for n in SIZES]
    keys = int64_tensor((KEYS * 2)[: len(outs)])
    check(sweeps, "normal_", [outs], offset, offset % 2, keys, "hadamard")


# Dtypes and numbers of directions, each with all offsets and roundings in turn.
FORMS = [
    (dtype, directions, OFFSETS[i % len(OFFSETS)], (None, ROUNDING)[(i + i // 4) % 2])
    for i, (dtype, directions) in enumerate(itertools.product(DTYPES, range(4)))
]


@pytest.mark.parametrize(("dtype", "directions", "offset", "rounding"), FORMS)
def test_dense(
    sweeps: Any, dtype: torch.dtype, directions: int, offset: int, rounding: Tensor | None
) -> None:
    params = [random(n, dtype=dtype, seed=n) for n in SIZES]
    coeffs, decay = random(len(SIZES), directions, seed=1), 1 + 0.1 * random(len(SIZES), seed=2)
    keys = int64_tensor(KEYS[:directions])
    for misalignment in (0, 1):
        rest = (keys, coeffs, decay, rounding, "hadamard")
        check(sweeps, "dense_", [params], offset, misalignment, *rest)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scripts(sweeps: Any, dtype: torch.dtype) -> None:
    params = [random(n, dtype=dtype, seed=n) for n in SIZES]
    script = torch.tensor([[0, -1, -1], [0, 1, 2], [1, -1, -1]])
    coeffs, decay = random(len(SIZES), 3, 2, seed=1), 1 + 0.1 * random(len(SIZES), 3, seed=2)
    rest = (int64_tensor(KEYS), script, coeffs, decay, "hadamard")
    check(sweeps, "dense_steps_", [params], 61, 0, *rest)


MOMENTS: list[tuple[str, bool, bool, int]] = [  # rule, firsts, seconds, directions
    ("momentum", True, False, 1),
    ("sign", False, False, 2),
    ("adam", True, True, 1),
]


@pytest.mark.parametrize("case", MOMENTS, ids=lambda case: case[0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_moments(sweeps: Any, dtype: torch.dtype, case: tuple[str, bool, bool, int]) -> None:
    rule, first, second, directions = case
    count = len(SIZES)
    params = [random(n, dtype=dtype, seed=n) for n in SIZES]
    firsts = [random(n, seed=n + 1) for n in SIZES] if first else []
    seconds = [random(n, seed=n + 2).abs() for n in SIZES] if second else []
    rows = (
        int64_tensor(KEYS[:directions]),
        random(count, directions, seed=3),
        random(count, directions, seed=4),
        random(count, 6, seed=5).abs(),
        1 + 0.1 * random(count, seed=2),
        rule,
        ROUNDING,
        "hadamard",
        None,
    )
    check(sweeps, "moments_", [params, firsts, seconds], 127, 0, *rows)


def test_adam_of_squares(sweeps: Any) -> None:
    count = len(SIZES)
    params = [random(n, dtype=torch.bfloat16, seed=n) for n in SIZES]
    columns = [random(count, 3, seed=seed) for seed in (3, 4)]
    coeffs, decay = random(count, 6, seed=5).abs(), torch.ones(count)
    rest = (int64_tensor(KEYS), *columns, coeffs, decay, "adam", None, "hadamard")
    check(sweeps, "moments_", [params, [], []], 61, 0, *rest, random(count, 3, seed=6).abs())


@pytest.mark.parametrize("cut", [1, 8, 63, 64, 128, 1000])
def test_parts_are_parts_of_the_whole(cut: int) -> None:
    """What a shard gets is what the whole parameter has there."""
    normal: Callable[..., Tensor] = reference.normal
    where = (KEYS[0], 5)
    whole = normal(1200, *where, 77, torch.device("cpu"), "hadamard")
    part = normal(1200 - cut, *where, 77 + cut, torch.device("cpu"), "hadamard")
    assert_same_bits(part, whole[cut:])
