"""Descriptor tables: all parameters of one launch, as rows in device memory.

A GPU kernel serves every parameter of one dtype in one launch. What it must know of each stands in
a row of int64 numbers. Programs are numbered through all parameters; a program looks its parameter
up by the number of the parameter's first program, which rises from row to row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Columns; kernels have copies (`tests/sweeps/test_numbers.py`). The first six are for all sweeps,
FIRST = 0  # number of the parameter's first program
ADDRESS = 1  # of the weights
INDEX = 2  # position in the caller's list: the row of coefficients and decay
ID = 3  # parameter id
OFFSET = 4  # index of the tensor's first element in the full parameter
ALIGNED = 5  # 1 if 16-byte accesses are possible
# these for sweeps over noise,
NUMEL = 6
STATES = 7  # addresses of up to two tensors that go with the weights
# and these for low-rank sweeps.
ROWS = 6
COLUMNS = 7
RANK = 8
U = 9
V = 10

WIDTH = 12  # numbers in a row


@dataclass(frozen=True)
class Launch:
    """Parameters that one launch serves."""

    table: Tensor  # int64 [rows, WIDTH] on the device
    programs: int  # of all rows together
    dtype: torch.dtype  # of the weights
    state_dtypes: tuple[torch.dtype, ...]
    rank: int = 0  # of the factors of most programs
    chunk: int = 0  # elements of a parameter that a program takes, in sweeps over noise

    @property
    def rows(self) -> int:
        return self.table.shape[0]


@dataclass
class Row:
    """One parameter, before it is numbered."""

    dtypes: tuple[torch.dtype, ...]
    programs: int
    cells: dict[int, int]


def aligned(address: int, offset: int, itemsize: int) -> bool:
    """Whether groups of eight elements of the full parameter lie on 16-byte boundaries."""
    return (address - offset % 8 * itemsize) % 16 == 0


def noise_rows(
    tensors: Sequence[Tensor],
    ids: Sequence[int],
    offsets: Sequence[int],
    states: Sequence[Sequence[Tensor]],
    chunk: int,
) -> list[Row]:
    """Rows of a sweep over noise. A program has one chunk: the elements of the full parameter
    between two multiples of `chunk`."""
    rows = []
    for index, (tensor, id_, offset) in enumerate(zip(tensors, ids, offsets, strict=True)):
        together = [tensor, *(state[index] for state in states if state[index].numel())]
        cells = {
            ADDRESS: tensor.data_ptr(),
            INDEX: index,
            ID: id_,
            OFFSET: offset,
            ALIGNED: all(
                aligned(t.data_ptr(), offset, t.element_size())
                for t in together
                if t.dtype != torch.uint8  # bits are read byte by byte
            ),
            NUMEL: tensor.numel(),
        }
        for number, state in enumerate(together[1:]):
            cells[STATES + number] = state.data_ptr()
        programs = -(-(offset % chunk + tensor.numel()) // chunk) if tensor.numel() else 0
        rows.append(Row(tuple(t.dtype for t in together), programs, cells))
    return rows


def lowrank_rows(
    params: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    ids: Sequence[int],
    offsets: Sequence[int],
    tile: tuple[int, int],
) -> list[Row]:
    """Rows of a low-rank sweep. A program has one tile of a matrix, row of tiles by row of tiles.

    A column is taken for a row with the factors exchanged, which changes no bit.
    """
    rows = []
    streams = zip(ids, offsets, strict=True)
    for index, (param, u, v, (id_, offset)) in enumerate(zip(params, us, vs, streams, strict=True)):
        if v.shape[0] == 1:
            u, v = v, u
        m, n, rank = u.shape[0], v.shape[0], v.shape[1]
        address, itemsize = param.data_ptr(), param.element_size()
        cells = {
            ADDRESS: address,
            INDEX: index,
            ID: id_,
            OFFSET: offset,
            ALIGNED: address % 16 == 0 and (m == 1 or n * itemsize % 16 == 0),
            ROWS: m,
            COLUMNS: n,
            RANK: rank,
            U: u.data_ptr(),
            V: v.data_ptr(),
        }
        programs = -(-m // tile[0]) * -(-n // tile[1]) if param.numel() else 0
        rows.append(Row((param.dtype,), programs, cells))
    return rows


def launches(rows: Sequence[Row], device: torch.device, chunk: int = 0) -> list[Launch]:
    """One launch for each combination of dtypes; parameters without elements are left out.

    Raises:
        RuntimeError: a CUDA graph is being captured, into which no table can be copied.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "zo_fused: run a sweep over these parameters once before capturing it in a CUDA graph: "
            "what it needs to know of them must be on the device"
        )
    groups: dict[tuple[torch.dtype, ...], list[Row]] = {}
    for row in rows:
        if row.programs:
            groups.setdefault(row.dtypes, []).append(row)
    made = []
    for dtypes, members in groups.items():
        numbers, first, programs_of_rank = [], 0, dict[int, int]()
        for row in members:
            cells = {FIRST: first} | row.cells
            numbers.append([int(cells.get(column, 0)) for column in range(WIDTH)])
            first += row.programs
            rank = row.cells.get(RANK, 0)
            programs_of_rank[rank] = programs_of_rank.get(rank, 0) + row.programs
        table = torch.tensor(numbers, dtype=torch.int64, device="cpu").to(device)
        rank = max(programs_of_rank, key=lambda r: programs_of_rank[r])
        made.append(Launch(table, first, dtypes[0], dtypes[1:], rank, chunk))
    return made
