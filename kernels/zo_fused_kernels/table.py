"""The descriptor table of a launch, as kernels read it. `zo_fused/sweeps/backends/table.py` writes
it."""

import triton
import triton.language as tl

# Columns of a row of int64 numbers.
FIRST = tl.constexpr(0)  # number of the parameter's first program
ADDRESS = tl.constexpr(1)  # of the weights
INDEX = tl.constexpr(2)  # row of coefficients and decay
ID = tl.constexpr(3)  # parameter id
OFFSET = tl.constexpr(4)  # index of the tensor's first element in the full parameter
ALIGNED = tl.constexpr(5)  # 1 if 16-byte accesses are possible
NUMEL = tl.constexpr(6)
STATES = tl.constexpr(7)  # addresses of up to two tensors that go with the weights
ROWS = tl.constexpr(6)
COLUMNS = tl.constexpr(7)
RANK = tl.constexpr(8)
U = tl.constexpr(9)
V = tl.constexpr(10)
WIDTH = tl.constexpr(12)


@triton.jit
def find(table_ptr, rows):
    """the row of this program's parameter, and the program's number within the parameter"""
    # Steps of a binary search are paid by every program, so they count in 32 bits: there are less
    # than 2**31 programs, and the low half of a number comes first.
    pid = tl.program_id(0)
    firsts = table_ptr.to(tl.pointer_type(tl.int32)) + 2 * FIRST
    low = tl.zeros((), tl.int32)
    high = rows
    while high - low > 1:
        middle = (low + high) >> 1
        beyond = tl.load(firsts + middle * (2 * WIDTH)) > pid
        low = tl.where(beyond, low, middle)
        high = tl.where(beyond, middle, high)
    row_ptr = table_ptr + low * WIDTH
    return row_ptr, pid.to(tl.int64) - tl.load(row_ptr + FIRST)


@triton.jit
def pointer(address, DTYPE: tl.constexpr):
    """an address as a pointer to DTYPE"""
    return address.to(tl.pointer_type(DTYPE))
