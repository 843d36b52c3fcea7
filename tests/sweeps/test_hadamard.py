"""The transform "hadamard" on every backend, bit by bit, where its tiles make it differ from the
others: their two halves, their ends, and counters of sixteen elements. (All that it shares with
the others is in test_parity.py.)"""

from __future__ import annotations

import pytest
from support.calls import check, dense, fill, places
from support.matrix import covering
from support.served import NAMES, Served, serve

# Weights of all sizes overflow, and NumPy warns of it in Triton's interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) enc:RuntimeWarning")

# Less than a run of eight, a half, a tile and their neighbours; more than blocks of all backends.
SIZES = (1, 8, 64, 129, 4500)
# In a tile's first and second half, and at its ends; in the last the low counter word wraps.
OFFSETS = (0, 61, 64, 127, 16 * 2**32 - 200)
TILES = places(SIZES, OFFSETS, (0, 1))


@pytest.fixture(params=NAMES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return serve(request.param, tmp_path_factory)


def test_normals(served: Served) -> None:
    check(served, fill(TILES, "hadamard"))


@covering(directions=(0, 1, 2, 3), rounding=(False, True))
def test_dense(served: Served, directions: int, rounding: bool) -> None:
    check(served, dense(TILES, directions, rounding, "hadamard"))
